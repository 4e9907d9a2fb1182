"""Judges that are not in the race: the bundled ones, who may not judge whom, validation of a judge, and two that disagree."""
import copy, json
from dataclasses import replace
import pytest, torch
import torch.nn.functional as F
from vfmvae import cli, extractors, generation
from vfmvae.core import Gaussian, UserError
from vfmvae.data import select_classes
from vfmvae.evaluate import compare_judges, DEGRADATIONS, gfid, Record, rfid, validate
from vfmvae.extractors import bundled_extractor, check_judge, EXTRACTORS, vfm_root, VFMExtractor
from vfmvae.files import data_dir, digest, load_weights
from vfmvae.baselines import ConvVAE, ConvVAEConfig, RAE, RAEConfig
from vfmvae.generation import evaluate_samples, Samples
from vfmvae.recipes import open_data
from vfmvae.statistics import compute_statistics
from vfmvae.tokenizer import tokenizers
from vfmvae.vfm import VFM
from vfmvae.world import World

WORLD = World(80, seed=3)


@pytest.fixture(scope='module')
def tiny(): return VFMExtractor(VFM('tiny'))


@pytest.fixture(scope='module')
def photo(): return bundled_extractor('photo')


def refused(judge, *subjects):
    try: check_judge(judge, *subjects)
    except UserError as e: return str(e)
    return ''


# the bundled ones --------------------------------------------------------------------------------------------------------------------------------

def test_a_bundled_judge_is_had_by_name(photo):
    assert [*EXTRACTORS] == ['world', 'photo'] and (bundled_extractor().name, photo.name) == ('world', 'photo-judge')
    with pytest.raises(UserError, match='nearest: photo'): bundled_extractor('phto')
    x = torch.rand(2, 3, 64, 64)*2-1
    assert photo(x)['probs'].shape == (2, 64) and (photo(x)['features']-bundled_extractor()(x)['features']).abs().max() > .1
    assert sum(p.numel() for p in photo.parameters()) < 1e6


def test_the_photographic_judge_was_validated_and_is_the_one_that_was():
    kept = json.loads((data_dir()/'results'/'photo_extractor.json').read_text(encoding='utf-8'))
    file = data_dir()/'weights'/'extractor-photo.safetensors'
    assert kept['weights'] == digest(load_weights(file)[0])
    card = load_weights(file)[1]
    assert card['licence'] == 'Apache-2.0' and 'research' in card['data'] and card['recipe']['kept_apart'] == list(range(2, 80, 5))
    own = kept['judges']['photo-judge']
    assert own['ok'] and own['rises'] == {a: True for a in DEGRADATIONS} | {'occlusion': True} and kept['moved_by_half_precision'] < .005
    for v in kept['judges'].values():       # the second one rises, too, if not to twice its halves
        values = [v['by_n'][k] for k in ('250', '500', '1000', '2000')]
        assert values == sorted(values, reverse=True) and min(r['fd'] for r in v['rows']) > v['halves'] == v['by_n'][str(v['n'])]


def test_the_photographic_judge_sees_what_is_wrong_with_other_photographs(photo):
    clothes = open_data('clothes')
    t = validate(photo, clothes, 300, dict(blur=(1, 4), noise=(.1, .3), jpeg=(85, 95), missing=(8,), repeated=(4, 8)), sizes=(600,))
    assert t.ok and t.by_n[600] < t.by_n[300] == t.halves


# nobody judges a relative ------------------------------------------------------------------------------------------------------------------------

class Tok:
    "A tokenizer of somebody's own: what it says of its VFM is what the case gives it."
    stride, channels = 8, 3
    def __init__(self, name='mine', **said):
        self.name = name
        for k, v in said.items(): setattr(self, k, v)
    def encode(self, x): return Gaussian(F.avg_pool2d(x, 8))
    def decode(self, z): return F.interpolate(z, scale_factor=8)


@pytest.mark.parametrize('name', ['rae-tiny-f8d128', 'conv-tiny-f8d16', 'vfmvae-tiny-f8d16'])
def test_a_vfm_does_not_judge_what_was_built_on_it_or_aligned_with_it(name, tiny):
    for subject in (name, f'dit-{name}', tokenizers[name]):
        said = refused(tiny, subject)
        assert 'tiny cannot judge' in said and 'bundled_extractor' in said and '\n' not in said
    with pytest.raises(UserError, match='cannot judge'): rfid(tokenizers[name], WORLD, tiny)
    assert not refused(bundled_extractor(), name, tokenizers[name])


def test_a_plain_tokenizer_is_judged_by_any(tiny):
    for subject in ('conv-f8d16', 'conv-f8d4', 'somebody', None, tokenizers['conv-f8d16']): assert not refused(tiny, subject)
    assert rfid(Tok(), World(140, seed=3), tiny).vfm is None


def test_a_teacher_and_a_student_are_relatives_by_every_name(tiny):
    teacher, student = VFMExtractor(VFM('efficientnet-lite0')), VFMExtractor(VFM('photo'))
    for judge in (teacher, student):
        for subject in ('conv-photo-f8d16', 'rae-efficientnetlite0-f8d16', VFM('photo'), VFM('efficientnet-lite0')):
            assert refused(judge, subject), (judge.name, subject)
    assert 'a relative' in refused(teacher, 'conv-photo-f8d16') and 'a relative' not in refused(student, 'conv-photo-f8d16')
    assert not refused(tiny, 'conv-photo-f8d16', VFM('photo')) and not refused(student, 'conv-tiny-f8d16', 'rae-dinov2b-f16d768')
    assert vfm_root('tf_efficientnet_lite0') == vfm_root('tf_efficientnet_lite0.in1k') == vfm_root('photo') == 'efficientnet-lite0'


def test_timms_names_and_short_ones_are_the_same():
    full = vfm_root('dinov2-s')
    assert full == 'vit_small_patch14_dinov2.lvd142m' == vfm_root('dinov2s') == vfm_root('vit_small_patch14_dinov2')
    assert len({full, vfm_root('dinov2-b'), vfm_root('dinov2-b-reg'), vfm_root('mae-b'), vfm_root('vit_base_patch16_224')}) == 5
    judge = VFMExtractor(VFM('vit_small_patch14_dinov2.lvd142m', pretrained=False, depth=1), size=28)
    assert refused(judge, ConvVAEConfig(vfm='vit_small_patch14_dinov2.lvd142m').name)
    assert refused(judge, 'vfmvae-dinov2s-f14d16') and refused(judge, Tok(config=Tok(vfm='dinov2-s'))) and not refused(judge, 'rae-dinov2b-f16d768')


def test_the_same_weights_under_another_name_are_the_same():
    again = VFM('mine', net=VFM('tiny').net)
    torch.manual_seed(0)
    other = VFM('mine', net=VFM('tiny', pretrained=False).net)
    assert refused(VFMExtractor(again), tokenizers['rae-tiny-f8d128']) and not refused(VFMExtractor(other), tokenizers['rae-tiny-f8d128'])


def test_what_was_made_here_and_adapters_are_known_too(tiny):
    vfm, other = VFM('tiny'), VFM('photo')
    rae = RAE(RAEConfig().for_vfm(vfm), vfm)
    aligned = ConvVAE(ConvVAEConfig(vfm='tiny').for_vfm(vfm))       # opened without the VFM, which only its training needs
    for subject in (rae, aligned, Tok(tokenizer=rae), Tok(vfm=vfm), Tok('rae-tiny-f8d128')): assert 'tiny cannot judge' in refused(tiny, subject)
    assert not refused(VFMExtractor(other), rae, aligned, Tok(tokenizer=rae)) and not refused(tiny, ConvVAE(ConvVAEConfig()))


def test_samples_are_refused_by_what_is_known_of_them(tiny):
    x, known = torch.rand(130, 3, 64, 64)*2-1, compute_statistics(World(130, seed=4), tiny)
    for facts in (dict(subject='dit-conv-tiny-f8d16'), dict(subject='my net', vfm='photo, tiny')):
        with pytest.raises(UserError, match='tiny cannot judge'): gfid(x, known, tiny, **facts)
    assert gfid(x, known, tiny, subject='dit-conv-f8d16', vfm='photo').vfm == 'photo'
    made = dict(net='my net', tokenizer='rae-tiny-f8d128', labels='balanced', vfm='tiny')
    samples = Samples(x, torch.zeros(130, dtype=torch.int64), made)
    with pytest.raises(UserError, match='tiny cannot judge'): evaluate_samples(samples, known, tiny)
    assert evaluate_samples(replace(samples, facts=made | dict(vfm=None)), known, tiny).value > 0


def test_what_a_net_draws_says_whose_latents_it_learned():
    assert generation.generate('dit-conv-tiny-f8d16', 1, steps=1).facts['vfm'] == 'tiny'
    net = copy.deepcopy(generation.open_net('dit-conv-f8d16'))
    assert generation.generate(net, 1, steps=1).facts['vfm'] is None
    net.meta = net.meta | dict(recipe=dict(vfms=['dinov2-b']))             # REPA: the net was taught, not its tokenizer
    assert generation.generate(net, 1, steps=1).facts['vfm'] == 'dinov2-b'


# the command line --------------------------------------------------------------------------------------------------------------------------------

def test_the_command_refuses_before_it_draws(monkeypatch, capsys):
    monkeypatch.setattr(generation, 'generate', lambda *a, **k: pytest.fail('it drew'))
    assert cli.main(['evaluate-samples', '--extractor', 'tiny']) == 2
    assert 'tiny cannot judge' in capsys.readouterr().err


@pytest.mark.parametrize('word, made', [('world', 'bundled world'), ('photo-judge', 'bundled photo'), ('inception', 'Inception'), ('dinov2-s', 'VFM dinov2-s'),
                                        ('photo', 'VFM photo')])
def test_a_word_of_the_command_means_one_judge(word, made, monkeypatch, capsys):
    def stop(what): raise UserError(f'<{what}>')
    monkeypatch.setattr(extractors, 'bundled_extractor', lambda name='world': stop(f'bundled {name}'))
    monkeypatch.setattr(extractors, 'Inception', lambda: stop('Inception'))
    monkeypatch.setattr('vfmvae.VFM', lambda name: stop(f'VFM {name}'), raising=False)
    assert cli.main(['evaluate-samples', '--extractor', word]) == 2 and f'<{made}>' in capsys.readouterr().err


# validation --------------------------------------------------------------------------------------------------------------------------------------

class Mean:
    "Mean colours, or numbers that have nothing to do with the picture."
    preprocessing = 'none'
    def __init__(self, blind=False): self.name, self.blind, self.gen = 'mean colours', blind, torch.Generator().manual_seed(1)
    def __call__(self, x): return dict(features=torch.randn(len(x), 3, generator=self.gen, dtype=torch.float64) if self.blind else x.mean((2, 3)).double())


def test_sets_can_be_at_fault_and_a_blind_judge_fails():
    axes = dict(missing=(4, 12), repeated=(4, 16))
    sees, blind = (validate(Mean(b), World(900, seed=5), 150, axes) for b in (False, True))
    assert sees.rises['repeated'] and not blind.ok and blind.rises == dict(missing=False, repeated=False)


def test_classes_that_are_missing_are_sixteenths_of_those_there_are():
    clothes = open_data('clothes')          # ten classes
    assert len(validate(Mean(), clothes, 100, dict(missing=(1, 8, 12))).rows) == 3
    two = select_classes(clothes, [0, 1])
    with pytest.raises(UserError, match='without the first 2 classes'): validate(Mean(), two, 20, dict(missing=(16,)))


def test_the_distance_of_nothing_is_said_for_several_n():
    t = validate(Mean(), World(400, seed=5), 100, dict(blur=(4,)), sizes=(50, 200))
    assert [*t.by_n] == [50, 100, 200] and t.by_n[100] == t.halves
    with pytest.raises(UserError, match='two halves of 201'): validate(Mean(), World(400), 100, sizes=(201,))


# two that disagree -------------------------------------------------------------------------------------------------------------------------------

def said(judge, **values):
    return [Record('rFID', v, dict(fd=v), 100, 'w', 100, judge, '', False, subject=k) for k, v in values.items()]


def test_two_orders_are_told_apart():
    t = compare_judges([*said('one', a=1., b=2., c=3.), *said('two', a=1., c=2., b=5.)])
    assert t.pairs == [('b', 'c')] and abs(t.tau-1/3) < 1e-12 and 'disagree about 1 of 3 pairs' in repr(t) and 'b and c' in repr(t)
    assert t.column('subject') == ['a', 'b', 'c'] and t.column('place by two') == [1, 3, 2]
    same = compare_judges([*said('one', a=1., b=2.), *said('two', a=10., b=11.)])
    assert same.tau == 1 and same.pairs == [] and 'disagree' not in repr(same) and 'agree about all 1 pairs' in repr(same)
    assert compare_judges([*said('one', a=1., b=2., c=3.), *said('two', a=3., b=2., c=1.)]).tau == -1
    tied = compare_judges([*said('one', a=1., b=1.), *said('two', a=1., b=2.)])
    assert tied.tau == 0 and tied.pairs == [('a', 'b')] and tied.column('place by one') == [1, 1]


@pytest.mark.parametrize('records, why', [(said('one', a=1., b=2.), 'two extractors'), ([*said('one', a=1., b=2.), *said('two', a=1.)], 'b was seen'),
                                          ([*said('one', a=1.), *said('two', a=1.)], 'no order'), ([*said('one', a=1.), *said('one', a=2.)], 'twice'),
                                          ([*said('one', a=1., b=2.), *(replace(r, n=7) for r in said('two', a=1., b=2.))], 'one kind'),
                                          ([replace(r, subject=None) for r in said('one', a=1.)], 'does not say')])
def test_what_cannot_be_compared_is_refused(records, why):
    with pytest.raises(UserError, match=why): compare_judges(records)
