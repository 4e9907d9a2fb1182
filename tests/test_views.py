"""Views, SE-CKNNA and robustness: the published draws, the same pixels for everybody, names that must agree, numbers that follow from the parts."""
import json
import numpy as np
import pytest, torch
from vfmvae.neighbours import prepare
from vfmvae.align import cknna, score_sources, se_cknna, summarize
from vfmvae.core import UserError
from vfmvae.images import published_noise, to_pil, to_uint8, transform
from vfmvae.world import World
from vfmvae.folders import folder
from vfmvae.features import Bank, batches
from vfmvae.files import Table
from vfmvae.robustness import AXES, layer_figure, layer_scores, robustness, robustness_figure
from vfmvae.tokenizer import LatentFeatures, tokenizers
from vfmvae.statistics import read_samples, write_samples
from vfmvae.vfm import VFM
from vfmvae.views import apply_view, extract_views, NOISE, view_name, views


@pytest.fixture(scope='module')
def tiny(): return VFM('tiny'), tokenizers['vfmvae-tiny-f8d16']


def test_the_sets_are_those_of_the_paper(shared):
    assert [view_name(v) for v in views('published')] == ['mixed', 'noise 0.05', 'noise 0.1', 'noise 0.15', 'noise 0.2']
    turns, scales = {f'rotation {s}' for s in (90, 180, 270)}, {f'scale {s}' for s in (.25, .5, .75)}
    assert {view_name(v) for v in views('axes')} == {f'noise {s:g}' for s in NOISE} | turns | scales
    expected = json.loads((shared/'golden/alignment/expected.json').read_text())
    key = next(k for k in expected if k.startswith('se_transform_records'))
    records = expected[key]
    records = list(records.values()) if isinstance(records, dict) else records
    x = World(12).batch(range(12))['image']
    sizes = {r: images.shape[-1] for rows, images in apply_view(x, ('mixed', 1.), range(12)) for r, images in zip(rows, images[:, None], strict=True)}
    assert [sizes[i] for i in range(12)] == [int(64*float(r['scale'])) for r in records]


def test_noise_is_the_published_one_to_the_bit():
    x = World(5, seed=3).batch(range(5))['image']
    seen = apply_view(x, ('noise', .15), [7, 8, 9, 100, 3])[0][1]
    for i, j in enumerate([7, 8, 9, 100, 3]):
        by_hand = published_noise(to_uint8(x[i]).permute(1, 2, 0).numpy(), .15, j)
        assert np.array_equal(to_uint8(seen[i]).permute(1, 2, 0).numpy(), by_hand)


@pytest.mark.parametrize('view', [('mixed', 1.), ('noise', .1), ('crop', .3), ('occlusion', .2), ('colour', .4), ('translation', .2)], ids=view_name)
def test_what_an_image_draws_depends_on_its_place_alone(view, tiny):
    vfm, world = tiny[0], World(20)
    whole, parts = (extract_views({'v': (vfm, [-1])}, world, [view], batch_size=b, quiet=True)[view_name(view), 'v', -1].features for b in (20, 7))
    torch.testing.assert_close(whole, parts, atol=1e-5, rtol=1e-5)


def test_places_follow_the_names_of_a_set_not_its_order(tmp_path, tiny):
    for i, name in enumerate(['b', 'a', 'd', 'c']): to_pil(World()[i]['image']).save(tmp_path/f'{name}.png')
    ds = folder(tmp_path, size=64)
    assert ds.keys == ['a.png', 'b.png', 'c.png', 'd.png']
    turned = list(range(len(ds)))[::-1]
    class Backwards:
        keys = [ds.keys[i] for i in turned]
        def __len__(self): return len(ds)
        def batch(self, at): return ds.batch([turned[i] for i in at])
    one, two = (extract_views({'v': (tiny[0], [-1])}, d, ['mixed', ('noise', .2)], quiet=True) for d in (ds, Backwards()))
    for at in one: torch.testing.assert_close(two[at].select(one[at].names).features, one[at].features, atol=1e-5, rtol=1e-5)


def test_banks_of_views_are_saved_and_compared_by_name(tmp_path, tiny):
    seen = extract_views({'v': (tiny[0], [-1])}, World(12), ['mixed'], quiet=True)
    a = Bank.load(seen['mixed', 'v', -1].save(tmp_path/'a.safetensors'))
    assert a.meta == dict(source='v', layer=-1, pooling='mean', transform='mixed') and torch.equal(a.features, seen['mixed', 'v', -1].features)
    a.check(seen['clean', 'v', -1])
    with pytest.raises(UserError, match='different images'): a.check(extract_views({'v': (tiny[0], [-1])}, World(12, seed=1), quiet=True)['clean', 'v', -1])


def test_se_cknna_is_the_mean_of_its_parts(tiny):
    vfm, tok = tiny
    world = World(80, seed=8)
    t = se_cknna(tok, vfm, world, 'axes', k=5, times=20, quiet=True)
    assert len(t) == 11 and t[0]['transform'] == 'clean' and t.mean == pytest.approx(sum(r['value'] for r in t[1:])/10, abs=1e-12)
    assert t.change == pytest.approx(t.mean/t.clean - 1) and t.mean_low <= t.mean <= t.mean_high and (t.n, t.k, t.pooling) == (80, 5, 'mean')
    turned = torch.stack([transform(s['image'][None], 'rotation', 90)[0] for s in (world[i] for i in range(80))])
    with torch.no_grad(): a, b = LatentFeatures(tok).features(turned)['latent'].mean(1), vfm.features(turned, [-1])[-1].mean(1)
    assert t.where(transform='rotation 90')[0]['value'] == pytest.approx(cknna(prepare(a), prepare(b), 5), abs=1e-7)
    plain = vfm.features(world.batch(range(80))['image'], [-1])[-1].mean(1)
    clean = se_cknna(tok, vfm, world, [('rotation', 90)], 'clean', k=5, times=20, quiet=True)
    assert clean[1]['value'] == pytest.approx(cknna(prepare(a), prepare(plain), 5), abs=1e-7) and clean.reference_state == 'clean'


def test_intervals_of_views_are_paired(tiny):
    vfm, tok = tiny
    t = score_sources([(tok, vfm), ((vfm, 2), vfm)], World(100, seed=8), [('noise', .05), ('noise', .1)], times=40, quiet=True)
    s = summarize(t)
    assert [(r['source'], r['reference']) for r in s] == [('vfmvae-tiny-f8d16', 'tiny'), ('tiny [2]', 'tiny')]
    alone = t.draws['tiny [2]', 'tiny', 'noise 0.05']
    assert len(alone) == 41 and alone[0].item() == pytest.approx(t.where(source='tiny [2]', transform='noise 0.05')[0]['value'])
    for r in s: assert r['change_high']-r['change_low'] < (r['mean_high']-r['mean_low'])/r['clean'] + (r['clean_high']-r['clean_low'])/r['clean']


def test_unrelated_sources_are_undecided(tiny):
    class Random:
        name, layers = 'random', (0,)
        def features(self, x, layers=None):
            g = torch.Generator().manual_seed(int(x.abs().sum()*1000) % 2**31)
            return {0: torch.randn(len(x), 4, 8, generator=g)}
    t = se_cknna(Random(), tiny[0], World(120, seed=8), [('noise', .1)], times=40, quiet=True)
    assert not t.decided and t[0]['p'] > .02
    rows = [dict(r, low=-.01) if r['axis'] == 'clean' else r for r in t]       # a clean score that may be 0: nothing is a share of it
    none = summarize(Table(rows, draws=t.draws))[0]
    assert t.change_low < t.change < t.change_high and all(none[k] != none[k] for k in ('change', 'change_low', 'change_high'))
    at = next(i for i, r in enumerate(t) if r['axis'] != 'clean')
    points = lambda table: sum(len(line.get_xdata()) for ax in robustness_figure(table).axes for line in ax.lines)
    for undefined in (None, float('nan')):                   # as a file has it, and as `score_banks` gives it
        less = Table([dict(r, value=undefined, low=undefined, high=undefined, q95=undefined) if i == at else r for i, r in enumerate(t)])
        assert points(less) < points(t)
    layers = layer_scores([Random(), tiny[0]], [tiny[0]], World(40, seed=8), times=20, quiet=True)
    less = Table([dict(r, value=None, low=None, high=None, q95=None) if r['layer'] == layers[-1]['layer'] else r for r in layers])
    assert sum(len(line.get_xdata()) for ax in layer_figure(less).axes for line in ax.lines) < sum(
        len(line.get_xdata()) for ax in layer_figure(layers).axes for line in ax.lines)
    with pytest.raises(UserError, match='clean images alone'): robustness_figure(t.where(axis='clean'))


def test_oblong_pictures_lie_and_stand(tiny):
    x = World(16, size=96).batch(range(16))['image'][:, :, 16:80]
    groups = apply_view(x, ('mixed', 1.), range(16))
    shapes = [tuple(i.shape[2:]) for _, i in groups]
    assert len(shapes) == len({*shapes}) > 4 and any(h > w for h, w in shapes) and any(h < w for h, w in shapes)
    assert sorted(r for rows, _ in groups for r in rows) == [*range(16)]
    for rows, images in groups:
        for r, i in zip(rows, images, strict=True): assert torch.equal(apply_view(x[r:r+1], ('mixed', 1.), [r])[0][1][0], i)
    assert se_cknna(tiny[1], tiny[0], x, ['mixed'], k=3, times=20, quiet=True).mean > 0


def test_a_list_of_batches_is_a_list_of_pictures(tiny, tmp_path):
    x = World(20).batch(range(20))['image']
    parts, how = [x[:12], x[12:]], dict(transforms=['hflip'], k=3, times=20, quiet=True)
    assert [*se_cknna(tiny[0], tiny[0], parts, **how)] == [*se_cknna(tiny[0], tiny[0], x, **how)]
    assert se_cknna(tiny[0], tiny[0], parts, n=15, **how).n == 15
    for some in (parts, [dict(image=p, key=[f'{i}' for i in range(len(p))]) for p in parts], iter(parts), batches(x, 12)):
        file = read_samples(write_samples(tmp_path/'a.npz', some, 20 if hasattr(some, '__next__') else None))
        assert len(file) == 20 and torch.equal(torch.cat([*file]), x)



@pytest.mark.parametrize('width', ['column', 4.5, 'full'])
@pytest.mark.parametrize('names', [
    ('a', 'b'), ('vfmvae-photo-f8d16', 'conv-photo-f8d16', 'conv-f8d16.photo'), tuple(f'vfmvae-efficientnet-f8d16 {i}' for i in range(6))])
def test_a_legend_lies_within_its_figure(width, names):
    "As matplotlib measures what it has drawn."
    row = dict(reference='tiny', low=.1, high=.3, q95=.05, value=.2)
    table = Table([dict(row, source=n, axis=a, strength=s) for n in names for a, s in (('clean', None), ('blur', 1.), ('blur', 2.))])
    fig = robustness_figure(table, width)
    fig.canvas.draw()
    box = fig.legends[0].get_window_extent()
    assert box.x0 >= 0 and box.x1 <= fig.bbox.x1 and [t.get_text() for t in fig.legends[0].get_texts()] == [*names, 'chance']


def test_every_axis_has_a_curve(tiny):
    vfm, _ = tiny
    t = robustness([((vfm, 0), vfm)], World(24, seed=8), AXES, k=3, times=20, quiet=True)
    fig = robustness_figure(t)
    assert {r['axis'] for r in t} == {'clean', *AXES} and len([a for a in fig.axes if a.lines]) == len(AXES)
    assert all('low' in r for r in fig.data if r['series'] != 'chance')


def test_layers_of_any_source(tiny):
    vfm, tok = tiny
    t = layer_scores([vfm, tok], [vfm, (vfm, 0)], World(60, seed=8), k=5, times=20, quiet=True)
    assert len(t) == (len(vfm.layers)+1)*2 and t.where(source='tiny', layer=0, reference='tiny [0]')[0]['value'] > .9
    assert len(layer_figure(t, {'between two VFMs': .5}).axes) == 2
    with pytest.raises(UserError, match='nothing to compare'): layer_scores([vfm], [], World(60))


def test_bad_input_is_said_before_any_work(tiny):
    vfm, tok = tiny
    twin = VFM('tiny', pretrained=False)
    cases = [(lambda: se_cknna(tok, vfm, World(9), 'publised'), 'nearest: published'), (lambda: se_cknna(tok, vfm, World(9), k=9, quiet=True), 'k = 9'),
             (lambda: se_cknna(tok, vfm, World(20), reference_state='x'), 'same'), (lambda: score_sources([(vfm, twin)], World(9)), 'two different sources'),
             (lambda: se_cknna(3, vfm, World(9)), 'neither features nor encode'),
             (lambda: se_cknna((tok, 'block'), vfm, World(20), quiet=True), "no layer 'block'"),
             (lambda: se_cknna(tok, vfm, [], quiet=True), 'no images'), (lambda: views([('scale', 0)]), 'strengths from')]
    for call, says in cases:
        with pytest.raises(UserError, match=says): call()


def test_places_are_asked_for_only_by_what_draws(tiny):
    # to sort a million names takes seconds, and the plain features of images need no place
    from collections.abc import Sequence
    from vfmvae.features import extract
    asked = []
    class Names(Sequence):
        def __len__(self): return 6
        def __getitem__(self, i): return f'{5-range(6)[i]}.png'
        def __iter__(self):
            asked.append(1)
            return (self[i] for i in range(6))
    class Named:
        keys, size, world = Names(), 64, World(6)
        def __len__(self): return 6
        def batch(self, at): return dict(self.world.batch(at), key=[self.keys[i] for i in at])
    plain = extract(tiny[0], Named(), [-1], quiet=True)[-1]
    assert not asked and torch.equal(plain, extract(tiny[0], World(6), [-1], quiet=True)[-1])
    seen = extract_views({'v': (tiny[0], [-1])}, Named(), [('noise', .1)], quiet=True)
    by_rank = extract_views({'v': (tiny[0], [-1])}, Named.world.batch(range(6))['image'].flip(0), [('noise', .1)], quiet=True)
    assert asked and torch.equal(seen['noise 0.1', 'v', -1].features, by_rank['noise 0.1', 'v', -1].features.flip(0))
