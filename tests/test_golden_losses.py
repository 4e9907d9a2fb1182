"Losses against the numbers of the published code (needs VFMVAE_SHARED)."
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vfmvae.core import Gaussian
from vfmvae.losses import (adaptive_weight, align_loss, latent_transform, multiscale, pixel, resize,
                           sample_equivariance, ssim_loss, target_transform)

SHARED = Path(os.environ.get('VFMVAE_SHARED') or Path(__file__).resolve().parents[2]/'shared')
FILE = SHARED/'golden/vfmvae/losses.safetensors'
pytestmark = pytest.mark.skipif(not FILE.is_file(), reason='golden numbers absent; set VFMVAE_SHARED')
MODES = 'bilinear', 'bicubic'


@pytest.fixture(scope='module')
def gold(): return load_file(FILE)


def close(a, b, tol=5e-7): torch.testing.assert_close(a, b.squeeze(), atol=tol, rtol=1e-6)


@pytest.mark.parametrize('j', range(3))
def test_align(gold, j):
    u, a, params, out = (gold[f'vf.{j}.{k}'] for k in ('z_proj', 'aux', 'params_dm_cm_dw_cw', 'out'))
    close(align_loss(u, a, *params.tolist()), out)


def test_ssim_and_pixels(gold):
    x, y = gold['ssim.gen'], gold['ssim.real']
    close(ssim_loss(x, y), gold['ssim.loss'])
    close(pixel(x, y), gold['pix.l1'])
    close(pixel(x, y, p=2), gold['pix.l2'])


def test_kl(gold):
    q = Gaussian.split(gold['kl.params'])
    close(q.kl(), gold['kl.per_sample'])
    close(q.kl().mean(), gold['kl.out'])
    close(q.std, gold['kl.std'])


def test_adaptive_weight(gold):
    w = gold['adaptive.w'].clone().requires_grad_()
    y = gold['adaptive.x'] @ w.T
    close(adaptive_weight(10*(y-1).abs().mean(), y.square().mean(), w, 5.), gold['adaptive.weight'])


@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('scale', (.25, .5, .75, 1.))
@pytest.mark.parametrize('k', (0, 1, 3))
def test_target_transform(gold, mode, scale, k):
    out = target_transform(gold['it.img']*2-1, scale, k, mode)
    close(out[0], gold[f'it.{mode}.s{scale}.k{k}'][0]*2-1, 1e-6)


@pytest.mark.parametrize('mode', MODES)
def test_multiscale_targets(gold, mode):
    scales = [gold[f'it.{mode}.ms.{i}']*2-1 for i in range(4)]
    img = gold['it.img']*2-1
    assert [s.shape[-1] for s in scales] == [32, 16, 8, 4]
    for s in scales: close(resize(img, s.shape[-1], mode=mode)[0], s[0], 1e-6)
    assert max(multiscale(scales, img, mode)) < 1e-6
    other = [s.shape[-1] for s in scales if multiscale([s], img, MODES[mode == 'bilinear'])[0] > 1e-3]
    assert other == [32, 16, 8, 4]  # the other mode is seen


def test_equivariance_sampler():
    import json, random
    from collections import Counter
    gold = json.loads((SHARED/'golden/vfmvae/eq_sampler.json').read_text())
    random.seed(gold['python_random_seed'])
    assert [list(sample_equivariance()) for _ in range(40)] == gold['first_40']
    random.seed(gold['python_random_seed'])
    assert Counter(str(tuple(sample_equivariance())) for _ in range(4000)) == gold['counts_4000']


@pytest.mark.parametrize('s', (.25, .5, .75))
def test_latent_transform(s):
    g = load_file(SHARED/'golden/vfmvae/tiny_b_eq.safetensors')
    close(latent_transform(g['in.z'], s, 1)[0], g[f'eq.z_scale{s}_rot1'][0], 1e-6)
