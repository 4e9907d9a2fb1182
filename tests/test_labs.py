"Laws of the explorer and its sisters: what they show is what the library computes, heavy work is done once, and bad input leaves them alive."
import asyncio, copy, dataclasses, datetime, html, inspect, io, json, time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import fields, replace
import numpy as np
import pytest
import torch
from PIL import Image
from vfmvae.neighbours import knn_graph, prepare
from vfmvae.align import cknna, score_sources
from vfmvae.core import UserError
from vfmvae.files import data_dir
from vfmvae.world import World
from vfmvae.dit import caption_maps, DiT, DiTConfig
from vfmvae.generation import generate
from vfmvae.presets import FLOW_PRESETS
from vfmvae.session import FeatureCache, ReferenceImages
from vfmvae.explorer import Explorer, ExplorerState, neighbour_overlap
from vfmvae.labs import edit_latent, EDITS, EmbeddingLab, LayerLab, NeighbourLab, ReconstructionLab
from vfmvae.sampler_lab import PromptLab, SamplerLab
from vfmvae.tokenizer import save_tokenizer, tokenizers
from vfmvae.vfm import VFM
from vfmvae.views import as_source, ResizePadVFM

NAMES = ('vfm-tiny', 'vfmvae-tiny-f8d16', 'conv-f8d16')
pytestmark = pytest.mark.skipif(not all((data_dir()/'weights'/f'{n}.safetensors').is_file() for n in NAMES), reason='the bundled weights are not there')
ONE_LINE = r'^[^\n]+$'
NOW = datetime.datetime.now(datetime.UTC)


@pytest.fixture(scope='module')
def lab():
    pytest.importorskip('ipywidgets')
    lab = Explorer(images='world', tokenizers='vfmvae-tiny-f8d16', vfm='tiny', n=32, k=5, transform='blur', strength=2.)
    lab.widget()
    lab.settle()
    return lab


def test_the_curve_is_the_library(lab):
    lab.set(tokenizers='vfmvae-tiny-f8d16', transform='blur', strength=2., k=5, layer=-1, image=0)
    few = [World(seed=8)[i] for i in range(32)]
    table = score_sources([(tokenizers['vfmvae-tiny-f8d16'], (ResizePadVFM(VFM('tiny')), -1))], few, [('blur', 2), ('blur', 4)], k=5, times=20, quiet=True)
    mine = {d['strength']: d['agrees_with_vfm'] for d in lab.figure().data}
    for strength, row in zip((0, 2, 4), table, strict=True): assert abs(mine[strength]-row['value']) < 1e-5


def test_the_overlap_is_the_row_of_the_graph_and_an_unchanged_image_keeps_all():
    f = torch.randn(40, 16, generator=torch.Generator().manual_seed(0))
    for i in (0, 7, 39):
        s = neighbour_overlap(f, f[[i, i]], 6, own=i)
        assert list(s.near) == knn_graph(prepare(f), 6).idx[i].tolist() and all(s.kept)
    s = neighbour_overlap(f, torch.stack([f[3], -f[3]]), 6, own=3)
    assert not any(s.kept)


def test_of_twenty_events_most_are_not_computed_and_the_last_one_is_shown(lab):
    computed = []
    compute = lab.compute
    lab.compute = lambda s: (computed.append(s.strength), compute(s))[1]
    async def drag():
        for strength in (.5, 1., 2., 3., 4.)*4:
            lab.controls['strength'].value = strength
            await asyncio.sleep(.002)
        assert 'computing' in lab.status.value
        await lab._latest.task
    try:
        lab.set(strength=3.)
        computed.clear()
        asyncio.run(drag())
    finally: lab.compute = compute
    assert len(computed) <= 12 and computed[-1] == lab.state.strength == 4. and 'blur 4' in lab.readout.value
    assert lab.picture.value == lab.layout(lab.compute(lab.state)).html()


def test_two_tokenizers_are_one_click_and_leave_at_least_one(lab):
    lab.set(tokenizers='vfmvae-tiny-f8d16', strength=2.).settle()
    boxes = lab.controls['tokenizers']
    button = dict(zip(boxes.options, boxes.buttons, strict=True))
    button['conv-f8d16'].value = True
    lab.settle()
    assert {*lab.state.tokenizers} == {'vfmvae-tiny-f8d16', 'conv-f8d16'} and lab.readout.value.count('dB') == 2
    button['conv-f8d16'].value = button['vfmvae-tiny-f8d16'].value = False
    assert 'one to four' in lab.status.value and len(lab.state.tokenizers) == 1 and sum(b.value for b in button.values()) == 1
    lab.set(tokenizers='vfmvae-tiny-f8d16').settle()


def test_features_are_found_again_and_not_those_of_other_weights_or_images(tmp_path):
    class Own:
        name, layers, calls = 'own', ('a',), 0
        def features(self, x, layers=None):
            Own.calls += 1
            return {'a': x.flatten(2).transpose(1, 2)}
    images, mine, own = ReferenceImages(World(seed=8), 16), as_source(tokenizers['conv-f8d16']), Own()
    cache = FeatureCache(images, tmp_path)
    free, seen = [], []
    cache.job([mine, own], None).run(lambda: free.append(1), seen.append)
    asked = Own.calls
    assert max(seen) <= 8 and sum(seen) == 16 and len(free) == len(seen)         # a move of the user waits for few images
    again = FeatureCache(images, tmp_path)
    assert torch.equal(again.get(mine, None)['latent'], cache.get(mine, None)['latent'])
    assert FeatureCache(ReferenceImages(World(seed=9), 16), tmp_path).get(mine, None) is None
    # nobody can know what code of one's own computed in another session: it is found again as long as it lives
    assert cache.get(own, None)['a'].shape == (16, 3) and Own.calls == asked and again.get(own, None) is None and cache.get(Own(), None) is None
    other = as_source(copy.deepcopy(mine.tokenizer))
    assert torch.equal(again.get(other, None)['latent'], cache.get(mine, None)['latent'])          # two objects of one net
    with torch.no_grad(): other.tokenizer.stats.mean.copy_(other.tokenizer.stats.mean.flip(0))     # the same numbers in another order
    assert again.get(other, None) is None


def tiles(lab, part=0): return [t.pixels for t in lab.page().sections[part].tiles]


def upload(lab, name, content):
    "As the control hands a file over."
    lab.controls['upload'].value = (dict(name=name, type='image/png', size=len(content), content=content, last_modified=NOW),)
    lab.controls['upload'].value = ()


def data(im, kind='PNG', **how):
    im.save(f := io.BytesIO(), kind, **how)
    return f.getvalue()


@pytest.mark.parametrize('name, content, words', [('a.txt', b'hello', 'not an image'), ('b.png', data(Image.new('RGB', (1, 1))), '1 x 1'),
                                                  ('c.png', data(Image.new('RGB', (90, 90)))[:60], 'c.png'), ('d.png', b'', 'd.png')])
def test_an_upload_that_is_no_image_is_told_and_changes_nothing(lab, name, content, words):
    before = lab.state
    upload(lab, name, memoryview(content))
    assert words in lab.status.value and lab.state == before and name not in lab.uploads


@pytest.mark.parametrize('name', ['deep', 'cmyk', 'moving', 'clear'])
def test_every_kind_of_image_can_be_uploaded(lab, name):
    two = [Image.new('RGB', (80, 60), c) for c in ('red', 'blue')]
    content = dict(deep=lambda: data(Image.fromarray((np.arange(64*70).reshape(64, 70)*14).astype(np.uint16))),
                   cmyk=lambda: data(Image.new('CMYK', (70, 90), (9, 99, 0, 0)), 'JPEG'),
                   moving=lambda: data(two[0], 'WEBP', save_all=True, append_images=two[1:]),
                   clear=lambda: data(Image.new('RGBA', (40, 40), (9, 9, 9, 0))))[name]()
    upload(lab, name, content)
    lab.settle()
    assert lab.state.uploaded == name and f'image {name} of' in lab.readout.value
    lab.set(uploaded='').settle()


@pytest.mark.parametrize('bad', [dict(images='nowhere'), dict(image=10**6), dict(tokenizers=()), dict(tokenizers='conv'), dict(vfm='mixer_s32_224'),
                                 dict(layer=9), dict(layer=True), dict(layer='latent'), dict(k=31), dict(k=1), dict(metric='x'), dict(strength=-1.),
                                 dict(strength=float('nan')), dict(seed=-1), dict(uploaded='x'), dict(colour=1), dict(tokenizers='no.safetensors')])
def test_a_state_that_cannot_be_shown_is_refused_in_one_line(lab, bad):
    before = lab.state
    with pytest.raises(UserError, match=ONE_LINE): lab.set(**bad)
    assert lab.state is before


@pytest.mark.parametrize('Other, bad', [(NeighbourLab, dict(layer=9)), (NeighbourLab, dict(second='conv')), (NeighbourLab, dict(first='x')),
                                        (LayerLab, dict(k=1)), (LayerLab, dict(t='a')), (LayerLab, dict(row=99)), (LayerLab, dict(first='x')),
                                        (EmbeddingLab, dict(strength='x')), (EmbeddingLab, dict(source='x')), (EmbeddingLab, dict(chosen=(1, 999))),
                                        (EmbeddingLab, dict(chosen=('a',))),
                                        (ReconstructionLab, dict(amount=float('nan'))), (ReconstructionLab, dict(tokenizer='conv'))])
def test_the_other_labs_refuse_in_one_line_too(Other, bad):
    lab = Other()
    before = lab.state
    with pytest.raises(UserError, match=ONE_LINE): lab.set(**bad)
    assert lab.state is before


@pytest.mark.parametrize('Other', [Explorer, ReconstructionLab, NeighbourLab, LayerLab, EmbeddingLab, SamplerLab, PromptLab])
def test_whatever_a_field_is_given_the_answer_is_a_line_or_the_state_is_a_value(Other):
    lab = Other(**({} if Other in (ReconstructionLab, SamplerLab, PromptLab) else dict(n=24)))
    for f in fields(lab.State):
        for bad in (3.5, None, ['a'], -7, 'zz', b'x', (), float('nan'), {}, [3], np.int64(3), np.float32('nan'), 10**30, -10**30, np.array([1, 2])):
            before = lab.state
            try: lab.set(**{f.name: bad})
            except UserError as e: assert '\n' not in str(e) and lab.state is before
            else: assert hash(lab.state) is not None and isinstance(getattr(lab.state, f.name), type(f.default) | int)
            lab.set(**{f.name: getattr(before, f.name)})
    with pytest.raises(UserError, match='steps'): SamplerLab(net(), TINY, steps=10**9)


@pytest.mark.parametrize('Other', [Explorer, ReconstructionLab, NeighbourLab, LayerLab, EmbeddingLab, SamplerLab, PromptLab])
def test_whatever_a_lab_is_made_with_the_answer_is_a_line(Other):
    "Nets, states and images that are none ended in AttributeError and TypeError, some of them at the first move only."
    makers = [vars(c)['__init__'] for c in Other.__mro__ if '__init__' in vars(c) and c.__module__.startswith('vfmvae.')]
    known = {p.name: p for m in makers[::-1] for p in inspect.signature(m).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD}
    for name in {*known} - {'self'} - ({'n'} if Other is ReconstructionLab else set()):
        for bad in (5, object(), None):
            if bad is None and known[name].default is None: continue
            with pytest.raises(UserError, match=ONE_LINE) if name in ('images', 'nets', 'state', 'own') else suppress(UserError): Other(**{name: bad})


def test_a_layer_counted_from_the_end_is_the_same_layer(lab):
    last = lab.session.vfm('tiny').vfm.depth
    assert lab.set(layer=-2).state.layer == last and lab.set(layer=-2).figure().data[0]['layer'] == f'layer {last}'
    assert lab.set(layer=-1).state.layer == -1


def test_a_picture_depends_on_the_state_and_not_on_the_way_there(lab):
    def uploaded(colour): upload(lab, 'same name', data(Image.new('RGB', (64, 64), colour)))
    lab.set(image=0, layer=-1, tokenizers='vfmvae-tiny-f8d16', transform='blur', strength=1.)
    for move in (dict(image=3), dict(layer=2), dict(strength=2.), dict(tokenizers=('conv-f8d16', 'vfmvae-tiny-f8d16')), dict(layer=0), dict(k=4),
                 'red', 'blue', dict(image=0)):
        uploaded(move) if isinstance(move, str) else lab.set(**move)
        fresh = Explorer(lab.state if not lab.state.uploaded else None, n=32)
        if lab.state.uploaded:
            fresh.uploads = dict(lab.uploads)
            fresh.set(**{k: getattr(lab.state, k) for k in lab.state.__dataclass_fields__})
        assert lab.page().html() == fresh.page().html(), move
    lab.set(tokenizers='vfmvae-tiny-f8d16', k=5, layer=-1)


def test_a_size_without_a_grid_is_told_and_the_next_move_works(lab):
    lab.set(transform='scale', strength=.3)
    assert 'multiples of 8' in lab.settle().status.value
    lab.set(transform='blur', strength=1.).settle()
    assert 'blur 1' in lab.readout.value and 'CKNNA' in lab.readout.value


def test_every_control_is_described(lab):
    panel = lab.panel(lab.state)
    assert all(c.help for c in panel.values())
    assert {*panel} >= {'images', 'image', 'upload', 'tokenizers', 'vfm', 'layer', 'transform', 'strength', 'k', 'metric', 'reference_state', 'sort'}
    assert 'seed' not in panel and 'seed' in lab.panel(replace(lab.state, transform='noise', strength=.1))
    assert all(lab.controls[n].tooltip and lab.controls[n].description for n in panel)


# the sisters -------------------------------------------------------------------------------------------------------------------------------------

def test_edits_at_zero_change_nothing_and_at_one_everything():
    z, o = torch.randn(2, 1, 4, 6, 6, generator=torch.Generator().manual_seed(3))
    for e in EDITS: assert torch.allclose(edit_latent(z, o, e, 0.), z)
    assert torch.equal(edit_latent(z, o, 'swap', 1.), o) and torch.allclose(edit_latent(z, o, 'interpolate', 1.), o) and not edit_latent(z, o, 'mask', 1.).any()


def test_the_reconstruction_lab_takes_tokenizers_of_ones_own_and_a_folder(tmp_path):
    own = tokenizers['conv-tiny-f8d16']
    own.name = 'mine'
    for i in range(3): Image.new('RGB', (50, 70), (80*i, 40, 90)).save(tmp_path/f'{i}.png')
    lab = ReconstructionLab(images=str(tmp_path), size=32, own=[own], tokenizer='mine', image=2, other=0)
    assert tiles(lab)[0].shape == (3, 32, 32) and {d['tokenizer'] for d in lab.figure().data} == {'mine'}
    assert 'mine' in lab.panel(lab.state)['tokenizer'].options
    with pytest.raises(UserError, match='there are 3'): lab.set(image=3)
    with pytest.raises(UserError, match=ONE_LINE): ReconstructionLab(images=str(tmp_path/'none'))


def test_a_file_stands_among_the_nets_to_choose_from(tmp_path):
    "The layer lab could not be shown: its control had no such choice."
    path = str(save_tokenizer(tmp_path/'mine.safetensors', tokenizers['conv-tiny-f8d16']))
    for lab, name in ((Explorer(tokenizers=path), 'tokenizers'), (ReconstructionLab(tokenizer=path), 'tokenizer'), (NeighbourLab(second=path), 'second'),
                      (LayerLab(second=path), 'second'), (EmbeddingLab(second=path), 'second')): assert path in lab.panel(lab.state)[name].options, lab


def test_the_neighbour_lab_adds_up_and_sets_all_against_all():
    lab = NeighbourLab(images='world', first='tiny', second='vfmvae-tiny-f8d16', n=24, k=4, image=2)
    data, cache = lab.figure().data, lab.session.cache('world')
    graphs = [knn_graph(prepare(cache.get(lab.source(n), None)[at]), 4) for n, at in (('tiny', -1), ('vfmvae-tiny-f8d16', 'latent'))]
    shared = [bool({*a} & {*b}) for a, b in zip(*(g.idx.tolist() for g in graphs), strict=True)]
    assert [d['adds'] > 0 for d in data] == shared
    score = cknna(*graphs, 4)
    assert f'{score:.3f}' in lab.text() and all(abs(d['cknna']-score) < 1e-9 and d['n'] == 24 for d in data)
    adds, matrix = (s.chart for s in lab.page().sections if s.chart)
    assert [s.y for s in adds.spots] == sorted((s.y for s in adds.spots), reverse=True) and abs(sum(s.y for s in adds.spots)-1) < 1e-9
    cell = next(s for s in matrix.spots if s.go == dict(first='vfmvae-tiny-f8d16', second='tiny'))
    assert cell.tip.endswith(f'{score:.3f}') and len(matrix.spots) == len(lab.names(lab.state))**2


def test_the_strip_shows_the_images_that_lose_most():
    lab = Explorer(images='world', tokenizers='conv-f8d16', vfm='tiny', n=32, k=5, transform='noise', strength=.3)
    lab.page()
    cache = lab.session.cache('world')
    graphs = [knn_graph(prepare(cache.get(lab.source('conv-f8d16'), v)['latent']), 5).idx.tolist() for v in (None, ('noise', .3))]
    kept = [len({*a} & {*b}) for a, b in zip(*graphs, strict=True)]
    assert [v for _, v in lab.compute(lab.state).losers] == sorted(kept)[:10] and all(kept[i] == v for i, v in lab.compute(lab.state).losers)
    assert lab.compute(lab.set(strength=0.).state).losers is None                # nothing is changed, nothing is lost
    part = next(p for p in lab.set(strength=.3, sort='agrees').page().sections if 'lose most' in p.heading)
    assert len(part.tiles) == 10 and part.tiles[0].go == dict(image=lab.compute(lab.state).losers[0][0])


@pytest.mark.parametrize('kind', ['same', 'clean'])
def test_agreement_says_and_takes_its_reference_state(kind):
    lab = Explorer(images='world', tokenizers='conv-f8d16', vfm='tiny', n=24, k=5, transform='rotation', strength=90., reference_state=kind)
    row = next(r for r in lab.page().rows if r['strength'] == 90)
    cache, turned = lab.session.cache('world'), ('rotation', 90.)
    mine, vfm = cache.get(lab.source('conv-f8d16'), turned)['latent'], cache.get(lab.source('tiny'), turned if kind == 'same' else None)[-1]
    assert abs(row['agrees_with_vfm']-cknna(prepare(mine), prepare(vfm), 5)) < 1e-9
    said = {'same': 'both see the changed images', 'clean': 'the VFM sees the clean images'}[kind]
    assert row['reference_state'] == said and said in lab.text() and any(said in p.heading for p in lab.page().sections)


def net(channels=16, seed=0):
    torch.manual_seed(seed)
    made = DiT(DiTConfig(in_channels=channels, patch_size=1, hidden_size=24, depth=2, num_heads=2, num_classes=16)).eval()
    with torch.no_grad(): made.final_layer.linear.weight.normal_(std=.1)
    return made


def test_the_layer_lab_knows_nets_and_itself():
    tok = tokenizers['vfmvae-tiny-f8d16']
    lab = LayerLab(nets=dict(a=(net(seed=0), tok), b=(net(seed=1), tok)), images='world', first='a', second='a', n=24, k=4, t=.25)
    def scores(): return torch.tensor([d['cknna'] for d in lab.page().rows]).view(4, 4)
    own = scores()
    assert (own.diagonal() > .999).all()
    lab.set(second='b')
    assert not torch.allclose(scores(), own)     # two nets of one tokenizer do not share a cache
    assert 'noise level 0.25' in lab.text().lower()


def test_the_embedding_lab_puts_the_chosen_image_first():
    lab = EmbeddingLab(n=24, image=5, colour='transform', transform='noise', strength=.1)
    page = lab.page()
    first, *near = [t.caption for t in page.sections[1].tiles]
    assert first == 'image 5' and len(near) == 8 and '5' not in near and len(page.rows) == len(lab.figure().data) == 48
    at = torch.tensor([(d['x'], d['y']) for d in page.rows])
    assert near == [str(i) for i in (at[:24]-at[5]).square().sum(1).argsort()[1:9].tolist()]
    with pytest.raises(UserError, match='no method .* .known: pca, umap.'): lab.set(method='tsne')


TINY = 'vfmvae-tiny-f8d16'      # whose latents these nets stand for
def only(lab): return lab.trajectory(lab.state, lab.stages(lab.state)[0])


def test_the_sampler_lab_walks_from_its_noise_to_its_end():
    lab = SamplerLab(net(), TINY, steps=4, step=4)
    def shown(lab): return [t.pixels for s in lab.page().sections for t in s.tiles]
    rows = lab.page().rows
    assert [rows[i]['t'] for i in (0, 4)] == [1, 0] and rows[-1]['distance'] == 0 < rows[0]['distance'] and torch.equal(shown(lab)[0], shown(lab)[2])
    first = shown(lab.set(step=0))
    assert lab.page().sections[1].tiles[0].caption == 'step 0, t 1.00' and not torch.equal(first[0], first[2]) and len(lab.trajectories) == 1
    assert [s.go for s in lab.page().sections[0].chart.spots] == [dict(step=i) for i in range(5)]
    for bad in (dict(step=5), dict(label=17), dict(method='x'), dict(net='x'), dict(guidance=-1.), dict(guidance=float('nan')), dict(guidance='x')):
        with pytest.raises(UserError, match=ONE_LINE): lab.set(**bad)
    with pytest.raises(UserError, match='at least one'): SamplerLab({})


def test_stages_stand_side_by_side_and_start_from_one_noise():
    lab = SamplerLab(dict(early=net(seed=0), late=net(seed=1)), TINY, steps=3, step=0)
    early, late = ([t.pixels for t in s.tiles] for s in lab.page().sections[1:3])
    assert torch.equal(early[0], late[0]) and not torch.equal(early[2], late[2]) and {r['stage'] for r in lab.page().rows} == {'early', 'late'}


def test_a_long_way_is_shown_as_far_as_it_is_and_left_when_another_is_asked_for():
    pytest.importorskip('ipywidgets')
    mine = net()
    lab, seen, calls = SamplerLab(mine, TINY, steps=12, step=12), [], []
    lab.patience = 0.
    mine.register_forward_hook(lambda *_: calls.append(time.sleep(.01)))
    async def drag():
        lab.widget()
        lab.picture.observe(lambda _: seen.append(lab.readout.value), 'value')
        await lab._latest.task
        lab.controls['seed'].value = 1
        await lab._latest.task
        assert 'seed 1' in lab.readout.value and 'step 0 of 12' in lab.readout.value and 'sampling ...' in lab.readout.value
        await lab._filler
    asyncio.run(drag())
    assert 'seed 1' in lab.readout.value and 'step 12 of 12' in lab.readout.value and 'distance' in lab.readout.value
    assert lab.mark.layout.visibility == 'hidden' and lab.picture.value == lab.page().html() and len(only(lab).done) == 13
    assert len(lab.trajectory(replace(lab.state, seed=0), lab.stages(lab.state)[0]).done) < 13 and len(calls) < 2*24
    fresh = SamplerLab(mine, TINY, state=lab.state)
    assert torch.equal(only(fresh).points and fresh.page().sections[1].tiles[2].pixels, lab.page().sections[1].tiles[2].pixels)


def test_the_jobs_of_many_labs_leave_the_pictures_a_thread():
    pytest.importorskip('ipywidgets')
    labs = [SamplerLab(net(), TINY, steps=6, seed=i) for i in range(3)]
    for lab in labs:
        lab.patience = 0.
        lab.stages(lab.state)[0].net.register_forward_hook(lambda *_: time.sleep(.01))
    async def all_at_once():
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
        for lab in labs: lab.widget()
        for lab in labs: await lab._latest.task
        for lab in labs: lab.controls['label'].value = 3
        for lab in labs: await asyncio.wait_for(lab._latest.task, 60)
        for lab in labs: await asyncio.wait_for(lab._filler, 60)
    asyncio.run(all_at_once())
    assert all('class 3' in lab.readout.value and 'distance' in lab.readout.value for lab in labs)


def test_labs_that_need_the_same_features_all_come_to_their_end(tmp_path, monkeypatch):
    pytest.importorskip('ipywidgets')
    monkeypatch.setenv('VFMVAE_HOME', str(tmp_path))
    monkeypatch.setattr(NeighbourLab, 'vfm_names', lambda self: ('photo', 'efficientnet-lite0'))
    monkeypatch.setattr(NeighbourLab, 'tokenizer_names', lambda self: ())
    labs = [NeighbourLab(n=24, k=4, second='efficientnet-lite0'), LayerLab(n=24, k=4), EmbeddingLab(n=24), NeighbourLab(n=24, k=4, second='efficientnet-lite0')]
    def open_(lab): return 'computed' in lab.readout.value or 'computing' in lab.status.value+lab.readout.value or lab._incomplete
    async def all_at_once():
        for lab in labs: lab.widget()
        end = time.time()+120
        while any(map(open_, labs)) and time.time() < end: await asyncio.sleep(.02)
    asyncio.run(all_at_once())
    for lab in labs: assert not open_(lab) and lab.readout.value.count(html.escape(lab.text())) == 1, lab
    assert len(list(tmp_path.rglob('*.safetensors'))) == 2 and not list(tmp_path.rglob('*.tmp'))


def test_a_file_that_cannot_be_written_is_refused_before_the_work(tmp_path, monkeypatch):
    "An export of 300 frames, or a figure of a minute, was thrown away at its end."
    lab = ReconstructionLab(size=64)
    monkeypatch.setattr(lab, 'page', lambda *state: pytest.fail('worked before it looked'))
    (tmp_path/'a.html').mkdir()
    (tmp_path/'b').write_text('')
    for path, ask in ((tmp_path/'a.html', lab.export), (tmp_path/'b'/'lab.html', lab.export), (tmp_path/'b'/'fig.pdf', lab.save)):
        with pytest.raises(UserError, match=ONE_LINE): ask(path)


def test_every_lab_has_pictures_words_and_controls():
    pytest.importorskip('ipywidgets')
    for lab in (ReconstructionLab().set(edit='noise'), NeighbourLab(n=24, k=4), LayerLab(n=24, k=4), EmbeddingLab(n=24), SamplerLab(net(), TINY, steps=3),
                PromptLab(steps=2, instead='cross')):
        lab.widget()
        lab.settle()
        assert 'data:image/png;base64,iVBOR' in lab.picture.value or 'sprite' in lab.picture.value
        assert lab.text() and all(c.help for c in lab.panel(lab.state).values())
        assert lab.figure('column').get_figwidth() == 3.25 and lab.figure().data


def test_states_are_values():
    assert ExplorerState() == ExplorerState(tokenizers=['vfmvae-photo-f8d16']) and hash(ExplorerState()) == hash(ExplorerState())
    assert ExplorerState(transform='scale', strength=1.).view is None


@pytest.mark.parametrize('name', [n for n in tokenizers if 'tiny' not in n])
def test_every_bundled_name_is_taken_as_one(name):
    "Also one with a tag, such as conv-f8d16.photo, which looks like a file."
    lab = Explorer(n=16, k=4, tokenizers=name, transform='hflip', strength=1.)
    assert {d['tokenizer'] for d in lab.figure().data} == {name}
    few, labs = dict(n=16), [ReconstructionLab(tokenizer=name)]
    labs += [NeighbourLab(second=name, k=4, **few), LayerLab(second=name, k=4, **few), EmbeddingLab(source=name, **few)]
    for other in labs: assert other.figure().data


# the prompt lab ----------------------------------------------------------------------------------------------------------------------------------

def prompt_lab(**state):
    torch.manual_seed(0)
    drawer = DiT(FLOW_PRESETS['lumina-vfmvae-tiny-f8d16'].net).eval()
    for p in drawer.parameters():                      # what begins as nothing says something
        if not p.any(): torch.nn.init.normal_(p, std=.05)
    return PromptLab({'mine': drawer}, tokenizers['vfmvae-tiny-f8d16'], **dict(steps=3) | state)


def test_the_prompt_lab_draws_what_generate_draws_and_another_word_is_another_prompt():
    lab = prompt_lab(word=2, instead='cross', seed=4)
    drawer = lab.stages(lab.state)[0].net
    shown = [s.tiles[2].pixels for s in lab.page().sections if len(s.tiles) == 6 and s.tiles[0].caption.startswith('step')]
    both = [lab.state.prompt, lab.state.prompt.replace('ring', 'cross')]
    for own, prompt in zip(shown, both, strict=True):
        want = generate(drawer, prompt, 4, tokenizers['vfmvae-tiny-f8d16'], guidance=3., steps=3, method='heun').images[0]
        assert torch.allclose(own*2-1, want, atol=1e-3)
    assert not torch.allclose(*shown, atol=1e-3) and {r['prompt'] for r in lab.page().rows} == {*both}
    assert prompt_lab(state=lab.state).text() == lab.text()


def test_a_share_of_a_look_is_that_of_the_attention_that_mixes():
    lab = prompt_lab(step=1)
    stage = lab.stages(lab.state)[0]
    lab.finish()
    t, z = lab.trajectory(lab.state, stage).done[1]
    text, mixed, real = lab.encode(lab.state)[:1], [], torch.nn.functional.scaled_dot_product_attention
    def record(q, k, v, attn_mask=None, **how):        # torch's own, of values that say which token they are
        n = k.shape[2]
        if attn_mask is not None and q.shape[2] == 16: mixed.append(real(q, k, torch.eye(n).expand(1, k.shape[1], n, n), attn_mask=attn_mask, **how))
        return real(q, k, v, attn_mask=attn_mask, **how)
    with pytest.MonkeyPatch.context() as m:
        m.setattr('torch.nn.functional.scaled_dot_product_attention', record)
        with torch.no_grad(): stage.net(z, torch.full((1,), t), text)
    gates = torch.stack([b.attn.gate.detach().tanh().abs() for b in stage.net.blocks])
    want = (torch.stack(mixed)[:, 0]*gates[..., None, None]).sum((0, 1))/gates.sum()
    assert torch.allclose(caption_maps(stage.net, z, t, text)[0].flatten(1).T, want, atol=1e-5)
    learning = DiT(replace(stage.net.config, label_dropout=.99)).train()                     # no caption is dropped, and the mode stays
    learning.load_state_dict(stage.net.state_dict())
    assert torch.allclose(caption_maps(learning, z, t, text)[0].flatten(1).T, want, atol=1e-5) and learning.training


@pytest.mark.parametrize('bad, why', [(dict(prompt='a rign on a red ground'), "no word 'rign'; nearest: ring"), (dict(instead='blu'), 'nearest: blue'),
                                      (dict(word=11), 'its words are 0 to 10'), (dict(shape='hexagon'), "no word 'hexagon'"), (dict(shape=''), 'no shape'),
                                      (dict(prompt='red '*19), 'at most 18'), (dict(net='x'), 'no net'), (dict(guidance=-1.), 'guidance')])
def test_what_the_prompt_lab_cannot_ask_is_a_line(bad, why):
    lab = prompt_lab()
    before = lab.state
    with pytest.raises(UserError, match=ONE_LINE) as e: lab.set(**bad)
    assert why in str(e.value) and lab.state is before


def test_words_make_the_prompt_and_the_prompt_says_its_words():
    lab = prompt_lab()
    assert lab.set(shape='square', size='').state.prompt == 'a square with stripes on a green ground with waves'
    assert lab.set(prompt='before a red ground, a large striped ring').state.ground == 'red' and lab.state.texture == 'stripes'
    lab.state = dict(shape='cross')
    assert lab.state.prompt == 'a large cross with stripes on a green ground with waves'
    lab.state = dict(prompt='a small ring on a blue ground')
    assert (lab.state.shape, lab.state.texture, lab.state.size, lab.state.word) == ('ring', '', 'small', 2)
    lab.set(prompt='', word=0)
    assert lab.text() and 'word' not in lab.panel(lab.state)         # the empty caption is legal, and has no word to exchange
    lab.state = json.loads(json.dumps(dataclasses.asdict(lab.state)))
    assert lab.state.prompt == ''
