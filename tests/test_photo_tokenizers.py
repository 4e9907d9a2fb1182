"What a net knows of photographs, and the recipes of the tokenizers that learn from them."
import json
from dataclasses import replace

import pytest
from scope import thorough
import torch

from vfmvae.align import cknna, prepare
from vfmvae.cli import main
from vfmvae.data import select_classes
from vfmvae.extractors import check_judge, vfm_root, VFMExtractor
from vfmvae.core import UserError
from vfmvae.features import extract
from vfmvae.files import data_dir, digest, load_weights
from vfmvae.folders import shards
from vfmvae.images import to_pil
from vfmvae.presets import PRESETS
from vfmvae.recipes import build_training, evaluate_tokenizer, open_data, train_tokenizer
from vfmvae.tokenizer import in_name, LatentFeatures, open_tokenizer, unfamiliar
from vfmvae.vfm import VFM
from vfmvae.world import World

NAMES = 'vfmvae-photo-f8d16', 'vfmvae-efficientnet-f8d16', 'conv-photo-f8d16', 'conv-f8d16.photo', 'rae-photo-f8d192'

@pytest.fixture(scope='module')
def results() -> dict: return json.loads((data_dir()/'results'/'photo_tokenizers.json').read_text())

# ---- names, files, budgets

@pytest.fixture(scope='module')
def exam(shared):
    "800 photographs of the 16 classes that no training saw."
    return select_classes(shards(shared/'data/photos64/photos64-val-000000.tar', size=64), range(2, 80, 5))

@pytest.mark.parametrize('name', NAMES)
def test_each_opens_under_its_name(name):
    tok = open_tokenizer(name)
    assert tok.name == name and tok.config.name == name.removesuffix('.photo') and tok.stride == 8
    assert tok.decode(tok.encode(torch.zeros(2, 3, 64, 64)).mode()).shape == (2, 3, 64, 64)
    assert tok.encode(torch.zeros(1, 3, 128, 128)).mode().shape[2:] == (16, 16)

@pytest.mark.parametrize('name', NAMES)
def test_a_card_says_data_licence_numbers_and_recipe(name):
    p, tok = PRESETS[name], open_tokenizer(name)
    card = tok.meta
    assert 'research only' in card['trained_on'] and card['licence'] == 'Apache-2.0' and p.config == tok.config
    assert card['source'] == 'nbs/train/photo_tokenizers.ipynb' and card['measured']['n'] == 800
    assert card['recipe']['batch'] == p.batch_size and card['recipe']['images'] == p.num_images
    for stage, was in zip(p.stages, card['recipe']['stages'], strict=True):
        assert {k: was[k] for k in ('name', 'images', 'lr', 'adaptive')} == {k: stage.config()[k] for k in ('name', 'images', 'lr', 'adaptive')}
        assert {k: v for k, v in was['weights'].items() if v} == dict(stage.weights)

@pytest.fixture(scope='module')
def teachers(exam): return prepare(extract(VFM('photo'), exam, [-1], quiet=True)[-1])

@pytest.mark.parametrize('name', thorough(NAMES, ['vfmvae-photo-f8d16', 'conv-photo-f8d16']))
def test_numbers_of_the_card_come_out_again(name, exam, teachers, results):
    tok, said = open_tokenizer(name), open_tokenizer(name).meta['measured']
    found = evaluate_tokenizer(tok, exam, None)
    assert found['n'] == 800 and abs(found['psnr']-said['psnr']) < .02 and abs(found['ssim']-said['ssim']) < .002
    assert said['psnr'] == results['measured'][name]['psnr']
    z = prepare(extract(LatentFeatures(tok), exam, ['latent'], quiet=True)['latent'])
    assert abs(cknna(z, teachers)-said['cknna to photo']) < .01

def test_the_results_are_about_the_bundled_weights(results):
    found = {n: digest(load_weights(data_dir()/'weights'/f'{n}.safetensors')[0]) for n in results['tokenizers']}
    assert found == results['tokenizers'] and {*found} == {*results['measured'], *results['world']['measured']} >= {*NAMES}

def test_frozen_features_are_a_ceiling_and_another_shape(results):
    shapes = {n: open_tokenizer(n).encode(torch.zeros(1, 3, 64, 64)).mode().shape[1:] for n in NAMES}
    assert shapes.pop('rae-photo-f8d192') == (192, 8, 8) and {*shapes.values()} == {(16, 8, 8)}
    own = {r['source']: r for r in results['aligned'] if r['reference'] == 'photo'}
    found = own.pop('rae-photo-f8d192')
    assert found['clean_low'] > max(r['clean_high'] for r in own.values())

def test_the_pyramid_stands_in_names_by_its_first_word():
    assert in_name('efficientnet-lite0') == 'efficientnet' and in_name('siglip2-l') == 'siglip2l'
    assert vfm_root('efficientnet') == vfm_root('efficientnetlite0') == vfm_root('efficientnet-lite0') == vfm_root('photo')

@pytest.mark.parametrize('name', NAMES)
def test_a_recipe_builds_what_its_name_says(name):
    p = PRESETS[name]
    assert p.config.name == name.removesuffix('.photo') and p.num_images == 176_000
    assert [(s.name, s.num_images) for s in p.stages] == [('strong', 48_000), ('weak', 96_000), ('ssim', 32_000)]
    other = [{k: v for k, v in s.weights.items() if k not in ('vf', 'kl', 'multiscale')} for s in p.stages]
    assert other == [dict(l1=1., l2=2.)]*2+[dict(l1=1., l2=2., ssim=.2)]
    few = open_data('clothes', augment=True)
    tok, rows = train_tokenizer(name, few, num_images=24, batch_size=8, log_every=1, show=lambda r: None)
    assert [r['stage'] for r in rows] == ['strong', 'weak', 'ssim'] and tok.decode(tok.encode(torch.zeros(1, 3, 128, 128)).mode()).shape[2:] == (128, 128)

def test_one_decoder_budget():
    ours = ('decoder', 'post_quant_conv', 'ldm_adapter.post_quant', 'mapping', 'synthesis', 'blocks', 'inp', 'out', 'norm')
    decoders = []
    for name in NAMES:
        net = build_training(PRESETS[name], PRESETS[name].stages)[0]
        decoders.append(sum(v.numel() for k, v in net.trainable().items() if k.startswith(ours)))
    assert max(decoders) < 1.05*min(decoders)

@pytest.mark.parametrize('name', ['vfmvae-photo-f8d16', 'vfmvae-efficientnet-f8d16', 'conv-photo-f8d16', 'rae-photo-f8d192'])
@pytest.mark.parametrize('vfm', ['photo', 'efficientnet-lite0'])
def test_no_relative_judges_them(name, vfm):
    judge = VFMExtractor(VFM(vfm), size=64)
    for subject in (name, build_training(PRESETS[name], PRESETS[name].stages)[0]):
        with pytest.raises(UserError, match='cannot judge'): check_judge(judge, subject)
    check_judge(judge, 'conv-f8d16.photo', 'vfmvae-tiny-f8d16')

def test_a_relative_is_called_itself_where_it_is():
    judge = VFMExtractor(VFM('efficientnet-lite0'), size=64)
    with pytest.raises(UserError, match='aligned with it;'): check_judge(judge, 'vfmvae-efficientnet-f8d16')
    with pytest.raises(UserError, match='aligned with photo, a relative of it;'): check_judge(judge, 'conv-photo-f8d16')

def test_every_trial_names_its_budget(results):
    trials: dict[str, int] = {}
    for t in results['sweep']: trials[t['tokenizer']] = trials.get(t['tokenizer'], 0)+1
    assert {*trials} == {*NAMES} and min(trials.values()) >= 5 and all(t['images'] == 9600 and t['n'] == 800 for t in results['sweep'])

def test_a_preset_may_go_on_from_a_bundled_tokenizer(results):
    p = replace(PRESETS['tiny'], start='vfmvae-tiny-f8d16')
    _, rows = train_tokenizer(p, 'world', stages=['first'], num_images=16, log_every=1, show=lambda r: None)
    _, fresh = train_tokenizer('tiny', 'world', stages=['first'], num_images=16, log_every=1, show=lambda r: None)
    assert rows[0]['l1'] < .5*fresh[0]['l1'] and rows[0]['images'] > open_tokenizer(p.start).meta['recipe']['images']

def test_preset_photo_goes_on_from_the_bundled_weights():
    mine = open_data('clothes', augment=True)
    after, rows = train_tokenizer('photo', mine, num_images=16, log_every=1, show=lambda r: None)
    fresh, _ = train_tokenizer('vfmvae-photo-f8d16', mine, stages=['strong'], num_images=16, log_every=1, show=lambda r: None)
    then, now, new = (evaluate_tokenizer(t, 'clothes-val', 64)['psnr'] for t in ('vfmvae-photo-f8d16', after, fresh))
    assert now > new+5 and now > then-1 and rows[0]['images'] > 176_000

def test_the_command_says_the_cost_first_and_takes_128_px(tmp_path, capsys):
    out, pictures = tmp_path/'mine.safetensors', tmp_path/'pictures'
    pictures.mkdir()
    for i, x in enumerate(open_data('examples').batch(range(8))['image']): to_pil(x).save(pictures/f'{i}.png')
    for size in (64, 128):
        assert main(['train-tokenizer', '--preset', 'photo', '--data', str(pictures), '--num-images', '8', '--size', str(size), '--out', str(out)]) == 0
        said = capsys.readouterr().out
        assert said.index('together') < said.index('written') and 'images/s' in said
        assert open_tokenizer(out).config == replace(open_tokenizer('vfmvae-photo-f8d16').config, img_size=size)

def test_too_few_images_are_said_before_the_cost(tmp_path, capsys):
    to_pil(open_data('examples')[0]['image']).save(tmp_path/'one.png')
    for words, batch in (([], 8), (['--batch-size', '4', '--accumulate', '2'], 2)):
        assert main(['train-tokenizer', '--preset', 'photo', '--data', str(tmp_path), '--out', str(tmp_path/'mine.safetensors'), *words]) == 2
        said = capsys.readouterr()
        assert said.out == '' and f'a batch of {batch} is larger than the set (1 images)' in said.err and said.err.count('\n') == 1

# ---- what lies outside of photographs

def drawn(kind: str):
    if kind == 'noise': return torch.rand(64, 3, 64, 64, generator=torch.Generator().manual_seed(3))*2-1
    if kind == 'one colour': return (torch.rand(64, 3, 1, 1, generator=torch.Generator().manual_seed(3))*2-1).expand(-1, -1, 64, 64)
    if kind == 'large': return World(64, seed=12, size=128)
    return World(500, seed=12) if kind == 'world' else World(64, seed=12).batch(range(64))['image']

@pytest.mark.parametrize('kind', ['world', 'tensor of the world', 'large', 'noise', 'one colour'])
def test_they_say_what_lies_outside_of_photographs(kind):
    text = unfamiliar(VFM('photo'), drawn(kind))
    for name in NAMES: assert unfamiliar(open_tokenizer(name), drawn(kind)) == text.replace('photo has', f'{name} has', 1)
    assert text.startswith('photo has only ever seen photographs') and 'stage 2 of VFM efficientnet-lite0' in text and '\n' not in text

def test_the_distance_is_scipys_of_timms_features():
    import torch.nn.functional as F
    from scipy.spatial.distance import mahalanobis
    x = drawn('tensor of the world')
    large = F.interpolate(x, (128, 128), mode='bicubic', align_corners=False).clamp(-1, 1)
    with torch.no_grad(): maps = VFM('efficientnet-lite0').net.forward_intermediates(large, intermediates_only=True)
    h = F.pixel_unshuffle(maps[2], 2).mean((2, 3)).double().numpy()      # stride 8, four positions to a cell
    known, _ = load_weights(data_dir()/'weights'/'known-photo.safetensors')
    mean, root = (known[k].double().numpy() for k in ('mean', 'root'))
    found = torch.tensor([mahalanobis(row, mean, root.T @ root)/len(mean)**.5 for row in h]).median().item()
    assert f'{found:.2f}' in unfamiliar(VFM('photo'), x)

@pytest.mark.parametrize('data', ['clothes', 'clothes-val', 'examples'])
@pytest.mark.parametrize('size', [64, 128])
def test_photographs_are_familiar(data, size):
    for net in (VFM('photo'), open_tokenizer(NAMES[0])): assert unfamiliar(net, open_data(data, size=size)) == ''

def test_real_photographs_and_the_world_to_both_kinds(shared):
    apart = select_classes(shards(shared/'data/photos64/photos64-val-000000.tar', size=64), range(2, 80, 5))
    files = sorted((shared/'data/photos256').glob('*.tar')) or [shared/'data/photos256']
    larger = open_data(str(files[-1]), size=64)
    for data in (apart, larger, apart.batch(range(64))['image']):
        assert unfamiliar(VFM('photo'), data) == '' and 'procedural world' in unfamiliar(VFM('tiny'), data)
    assert unfamiliar(VFM('tiny'), World(500, seed=12)) == unfamiliar(open_tokenizer('vfmvae-tiny-f8d16'), World(500, seed=12)) == ''

def test_the_limit_is_what_was_measured(results):
    kinds, limit = results['seen_before']['kinds'], results['seen_before']['limit']
    assert VFM('photo').spec['known']['limit'] == limit and kinds['learned classes']['over'] <= .0105
    for k in ('classes kept apart', 'clothes', 'CIFAR-10'): assert kinds[k]['median'] < limit
    for k in ('the world', 'noise', 'one colour each'): assert kinds[k]['median'] > limit


def test_preset_photo_was_worth_it():
    "On two sets of photographs and at two sizes, and the gain is more than chance."
    kept, full = json.loads((data_dir()/'results'/'own_photographs.json').read_text()), PRESETS['photo'].num_images
    assert {k: (f['n'], f['images']) for k, f in kept['sets'].items()} == {
        'photos256, 64 px': (160, full), 'clothes, 64 px': (713, full), 'photos256, 128 px': (160, full//4)}
    for name, found in kept['sets'].items(): assert found['gain']['low'] > 0 and found['minutes'] < 60, name
