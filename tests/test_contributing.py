"CONTRIBUTING.md: each recipe is run as it stands, and its toy must do what the bundled ones do; the rooms and tests that it names are there."
import re
from dataclasses import replace
from pathlib import Path

import pytest
import test_flow
import test_recipes
import torch

from vfmvae.align import se_cknna
from vfmvae.core import UserError
from vfmvae.data import loader
from vfmvae.features import extract, FeatureSource
from vfmvae.samplers import ODES, sample, Sampler
from vfmvae.similarity import compare, METRICS
from vfmvae.tokenizer import tokenizers
from vfmvae.tokenizer_task import LOSSES, Stage, TINY, tokenizer_losses, TokenizerTask
from vfmvae.train import fit
from vfmvae.vae import VFMVAE
from vfmvae.vfm import VFM
from vfmvae.world import World

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT/'CONTRIBUTING.md').read_text(encoding='utf-8')
RECIPES = dict(re.findall(r'(?ms)^## Add an? (.+?)\n(.*?)(?=^## |\Z)', TEXT))
TABLES = tokenizers._f, LOSSES, ODES, METRICS, test_flow.ORDER


@pytest.fixture
def add():
    "Runs the code of a recipe and returns its names; what it added to a table is gone afterwards."
    before = [dict(t) for t in TABLES]
    def run(title):
        code, = re.findall(r'(?s)```python\n(.*?)```', RECIPES[title])
        exec(compile(code, 'CONTRIBUTING.md', 'exec'), names := {'__name__': 'recipe'})
        return names
    yield run
    for table, old in zip(TABLES, before, strict=True):
        table.clear()
        table.update(old)


def test_a_tokenizer(add):
    add('tokenizer')
    test_recipes.test_every_registered_tokenizer_keeps_the_protocol('averages-f8d3')
    t = se_cknna('averages-f8d3', VFM('tiny'), World(60, seed=8), 'rotation', k=5, times=20, quiet=True)
    assert t.n == 60 and 0 <= t.clean < 1
    with pytest.raises(UserError, match='registered already'): add('tokenizer')


def test_a_loss_of_the_tokenizer(add):
    with pytest.raises(UserError, match="no loss named 'edges'"): Stage('first', dict(edges=1.))
    edges = add('loss of the tokenizer')['edges']
    model, x, stage = VFMVAE(TINY, VFM('tiny')).train(), World().batch(range(8))['image'], Stage('first', dict(l1=1., edges=.5, vf=1.))
    out = tokenizer_losses(model, x, stage)
    assert torch.allclose(out['l1'] + .5*out['edges'] + out['vf_scale']*out['vf'], out['loss'])
    # it counts as reconstruction: more of it, and the alignment pulls harder
    torch.manual_seed(0)
    light = tokenizer_losses(model, x, stage)['vf_scale']
    torch.manual_seed(0)
    assert tokenizer_losses(model, x, replace(stage, weights=dict(l1=1., edges=5., vf=1.)))['vf_scale'] > 1.5*light
    assert edges(x, x) == 0 and edges(x, -x) > 0
    rows = fit(TokenizerTask(model, stage), loader(World(32), 8, seed=1), 16, log_every=1, show=lambda h: None)
    assert [r['step'] for r in rows] == [1, 2] and all(r['edges'] > 0 for r in rows)


def test_a_vfm(add):
    source, data = add('VFM')['source'], World(60, seed=8)
    assert isinstance(source, FeatureSource)
    found = extract(source, data, layers=[8, 16], quiet=True)
    x = data.batch(range(60))['image']
    assert torch.allclose(found[16], x.mean((2, 3)), atol=1e-5)
    assert se_cknna((source, 8), VFM('tiny'), data, 'rotation', k=5, times=20, quiet=True).views > 1


def test_a_sampler(add):
    with pytest.raises(UserError, match="no sampler named 'ralston'"): Sampler(method='ralston')
    add('sampler')
    test_flow.ORDER['ralston'] = 2
    test_flow.test_order_of_convergence('vp', 'ralston')
    z = torch.randn(5, 3, dtype=torch.float64)
    assert not torch.equal(sample(lambda z, t: -z*t, z, Sampler(4, 'ralston')), sample(lambda z, t: -z*t, z, Sampler(4, 'heun')))


def test_a_measure(add):
    add('measure')
    a = torch.randn(50, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    a[:, 0] *= 100
    table = compare(a, a[:, 1:], 'top_share')
    assert [r['of'] for r in table.rows] == ['a', 'b'] and table.rows[0]['value'] > .99 > .6 > table.rows[1]['value'] > 1/3
    a[0, 0] = float('nan')
    with pytest.raises(UserError): compare(a, a, 'top_share')


def test_a_lab(add, tmp_path):
    pytest.importorskip('ipywidgets')
    lab = add('lab')['lab']
    assert lab.set(image=3).text().startswith('Image 3, mean value') and lab.state.image == 3
    files = lab.save(tmp_path/'one.pdf')
    assert {p.suffix for p in files} == {'.pdf', '.png', '.csv'} and all(p.stat().st_size for p in files)
    page = lab.export(tmp_path/'one.html').read_text(encoding='utf-8')
    assert all(f'Image {i}, mean value' in page for i in range(8))
    lab.widget()
    lab.controls['image'].value = 6
    lab.settle()
    assert 'Image 6' in lab.readout.value


def test_the_recipes_name_rooms_and_tests_that_are_there():
    assert len(RECIPES) == 6
    for title, body in RECIPES.items():
        named = re.findall(r'`((?:nbs|tests)/[\w/]+\.(?:ipynb|py))`', body)
        assert any(n.startswith('nbs/') for n in named) and any(n.startswith('tests/') for n in named), title
        assert [n for n in named if not (ROOT/n).is_file()] == [], title
