"""The bundled nets on latents of photographs are what their cards and data/results/photo_diffusion.json say."""
import json

import pytest
import torch
from scipy.stats import binomtest

from vfmvae.extractors import bundled_extractor
from vfmvae.files import data_dir, load_weights
from vfmvae.generation import generate, nets, tokenizer_of
from vfmvae.presets import FLOW_PRESETS
from vfmvae.samplers import sample_latents, Sampler

NAMES = 'conv-f8d16.photo', 'conv-photo-f8d16', 'vfmvae-photo-f8d16'
RESULTS = data_dir()/'results'/'photo_diffusion.json'


@pytest.fixture(scope='module')
def kept(): return json.loads(RESULTS.read_text())


@pytest.mark.parametrize('name', NAMES)
def test_a_net_draws_what_it_is_asked_for_as_often_as_its_card_says(name, kept):
    look, net = bundled_extractor('photo'), nets[f'dit-{name}']
    said = net.meta['measured']
    assert net.meta['sampling']['guidance'] == kept['best'][name] == said['guidance']
    assert {k: said[k] for k in ('guidance', 'fd', 'accuracy', 'n')} in kept['guidance'][name]
    s = generate(f'dit-{name}', [*range(64)]*2, seed=77)
    with torch.no_grad(): right = (torch.cat([look(x)['probs'].argmax(1) for x in s.images.split(64)]) == s.labels).sum().item()
    assert binomtest(right, 128, said['accuracy']).pvalue > 1e-3 and said['accuracy'] > 4/64, (right, said)
    assert 'research only' in net.meta['trained_on'] and len(s.classes) == 64 and 'gondola' not in s.classes       # one of the sixteen kept apart


@pytest.mark.parametrize('name', NAMES)
def test_the_latents_of_six_moments_end_with_those_of_the_bundled_net(name):
    z, facts = load_weights(data_dir()/'results'/'photo_diffusion_drawn.safetensors')
    assert len(facts['images']) == 6 and 19_000 < facts['images'][0] < 21_000 and facts['images'][-1] == FLOW_PRESETS[f'dit-{name}'].num_images
    assert z[name].shape == (6, len(facts['labels']), 16, 8, 8)
    now = sample_latents(nets[f'dit-{name}'], facts['labels'], (16, 8, 8), facts['seed'], sampler=Sampler(facts['steps'], guidance=facts['guidance']))
    off = [(now-m.float()).abs().mean().item() for m in z[name]]
    assert off[-1] < .05 and off == sorted(off, reverse=True), off                   # each moment is nearer to the end


def test_three_nets_differ_in_nothing_but_the_latent(kept):
    metas = [nets[f'dit-{n}'].meta for n in NAMES]
    for k in ('images', 'batch', 'cosine', 'precision', 'latents', 'seed', 'taken', 'flow'): assert len({json.dumps(m['recipe'][k]) for m in metas}) == 1, k
    assert {tokenizer_of(nets[f'dit-{n}']).name for n in NAMES} == {*NAMES}
    assert all(len(kept['curves'][n]) == 6 and {r['images'] for r in kept['curves'][n]} == {r['images'] for r in kept['curves'][NAMES[0]]} for n in NAMES)


def test_nearest_training_photographs_are_counted_for_samples_and_for_photographs(kept):
    rows = kept['nearest']
    assert {*rows} == {'validation photographs', *NAMES} and all(r['n'] >= 1000 and 0 < r['low'] < r['median'] < r['high'] for r in rows.values())
    assert abs(rows['validation photographs']['nearer'] - .01*rows['validation photographs']['n']) <= 1          # what the limit means
    assert {r['judge'] for r in kept['judged']} >= {'photo-judge'} and {r['n'] for r in kept['judged']} == {3200}


def test_weights_of_nets_have_the_precision_that_is_said():
    for name in NAMES:
        for k, v in load_weights(data_dir()/'weights'/f'dit-{name}.safetensors')[0].items():
            if v.ndim > 1: assert v.dtype == torch.float16 and torch.equal(v.float(), v.bfloat16().float()), k


@pytest.mark.parametrize('name', NAMES)
def test_what_table_2_lists_is_of_the_bundled_files_and_agrees_with_the_sweep(name, kept):
    "In a file of its own, since it was measured later: the same noise and photographs, and weights that were rounded since."
    table = json.loads((RESULTS.with_name('photo_table2.json')).read_text())
    rows, sweep = table['rows'][name], {g['guidance']: g for g in kept['guidance'][name]}
    assert [r['guidance'] for r in rows] == [1., kept['best'][name]] and table['judge'] == 'photo-judge' and table['reference_n'] == 3200
    for r in rows:
        assert abs(r['fd']/sweep[r['guidance']]['fd']-1) < .01 and abs(r['accuracy']-sweep[r['guidance']]['accuracy']) < .01
        assert r['n'] == sweep[r['guidance']]['n'] and 0 < r['precision'] < 1 and 0 < r['recall'] < 1 and 1 < r['is'] < 64 and r['sfid'] > 0
    assert rows[0]['is'] < rows[1]['is'] and rows[0]['accuracy'] < rows[1]['accuracy']         # guidance draws what is sure
