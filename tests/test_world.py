"""Laws of the procedural world: a pure function of (seed, index), factors known, hard for pixels, easy for the bundled VFM."""
import numpy as np
import pytest, torch
from vfmvae.probes import linear_probe
from vfmvae.files import data_dir
from vfmvae.world import CLASSES, factors, render, render_buffers, World
from vfmvae.features import extract
from vfmvae.vfm import VFM


@pytest.mark.parametrize('seed, size', [(0, 64), (5, 32), (123, 41), (2**40, 96)])
def test_one_image_is_the_same_alone_in_a_batch_and_in_any_order(seed, size):
    w, order = World(500, seed=seed, size=size), np.random.default_rng(0).permutation(500)[:48]
    b = w.batch(order)
    assert b['image'].shape == (48, 3, size, size)
    for j in (0, 7, 47): assert torch.equal(w[int(order[j])]['image'], b['image'][j])
    assert [w[int(i)]['label'] for i in order[:5]] == b['label'][:5].tolist()


def test_seeds_and_indices_make_different_images():
    a, b = World(64, seed=0).batch(range(64))['image'], World(64, seed=1).batch(range(64))['image']
    flat = torch.cat([a, b]).flatten(1)
    assert (torch.cdist(flat, flat) + 99*torch.eye(128)).min() > 1


def test_values_are_eight_bit_and_in_range():
    x = World(64, seed=3).batch(range(64))['image']
    levels = (x+1)*127.5
    assert x.min() >= -1 and x.max() <= 1 and (levels-levels.round()).abs().max() < 1e-3


def test_size_changes_the_resolution_not_the_picture():
    f = factors(0, range(16))
    big, small = render(f, 128), render(f, 64)
    assert (torch.nn.functional.avg_pool2d(big, 2)-small).abs().mean() < .02


def test_every_factor_is_seen():
    f = factors(0, range(1600))
    assert torch.bincount(f['label']).tolist() == [100]*len(CLASSES)
    assert set(f['background'].tolist()) == {0, 1, 2, 3} == set(f['distractors'].tolist())
    for k in ('angle', 'radius', 'x', 'y', 'aspect', 'width', 'frequency', 'phase', 'lamp', 'light', 'dark', 'ground'):
        change = {**f, k: f[k].roll(1, 0)}
        assert (render({n: v[:32] for n, v in change.items()}, 32) != render({n: v[:32] for n, v in f.items()}, 32)).any(), k


def test_buffers_agree_with_the_picture():
    f = factors(4, range(32))
    img, known = render_buffers(f)
    inside = known['mask'] == 1
    assert torch.equal(img, render(f)) and 0 < inside.float().mean() < 1
    # inside the object the picture is the albedo under the lamp: a factor of at most 1 +- .3 * sqrt 2
    ratio = ((img+1)/2).expand_as(known['albedo'])[inside.expand_as(img)]/known['albedo'][inside.expand_as(img)].clamp(min=.05)
    assert ratio.quantile(.01) > .5 and ratio.quantile(.99) < 1.5


def test_hard_for_pixels_easy_for_the_bundled_vfm():
    train, test = World(1200, seed=7), World(400, seed=8)
    y, t = (w.batch(range(len(w)))['label'] for w in (train, test))
    pixels = linear_probe(*(z for w, l in ((train, y), (test, t)) for z in (w.batch(range(len(w)))['image'].flatten(1), l)))
    assert pixels.value < .55
    if not (data_dir()/'weights/vfm-tiny.safetensors').exists(): pytest.skip('the tiny VFM is not bundled')
    vfm = VFM('tiny')
    h = [extract(vfm, w, [-1], pool='mean')[-1] for w in (train, test)]
    assert linear_probe(h[0], y, h[1], t).value >= .85
