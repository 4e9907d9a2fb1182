"Metrics against other implementations and slow definitions."
import numpy as np
import pytest
import torch

from vfmvae.core import UserError
from vfmvae.metrics import _inside, frechet, frechet_features, inception_score, moments, precision_recall, psnr, ssim


def normal(n, d, seed=0): return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
def images(seed): return (torch.randn(3, 3, 24, 20, generator=torch.Generator().manual_seed(seed))*.4).clamp(-1, 1)


def test_frechet_is_the_sqrtm_formula():
    linalg = pytest.importorskip('scipy.linalg')
    (m1, c1), (m2, c2) = moments(normal(60, 8) @ normal(8, 8, 1)), moments(normal(50, 8, 2) @ normal(8, 8, 3)+1)
    ref = ((m1-m2)**2).sum() + c1.trace() + c2.trace() - 2*np.trace(linalg.sqrtm((c1@c2).numpy()).real)
    assert frechet(m1, c1, m2, c2) == pytest.approx(ref.item(), rel=1e-10)


def test_moments_do_not_depend_on_dtype_or_order():
    x = (normal(400, 6)+300).float()
    assert torch.allclose(moments(x)[1], moments(x.flip(0).numpy())[1], rtol=1e-12)
    assert torch.allclose(moments(x)[1], torch.from_numpy(np.cov(x.double().numpy().T)), rtol=1e-10)


def test_frechet_falls_with_the_count():
    far = [np.mean([frechet_features(normal(n, 8, s), normal(n, 8, s+50)) for s in range(5)]) for n in (20, 80, 320)]
    assert far[0] > 2*far[1] > 4*far[2] > 0


def test_image_metrics_are_torchmetrics_per_image():
    from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure
    x, y = images(0), images(1)
    for i in range(3):
        a, b = x[i:i+1], y[i:i+1]
        assert torch.allclose(psnr(x, y)[i], peak_signal_noise_ratio(a, b, data_range=2.))
        assert torch.allclose(ssim(x, y)[i], structural_similarity_index_measure(a, b, data_range=2.), atol=1e-6)


def test_one_image_is_a_batch():
    assert ssim(images(0)[:1], images(1)[:1]).shape == psnr(images(0)[:1], images(1)[:1]).shape == (1,)


def test_inception_score_is_the_slow_sum():
    p = normal(12, 5).softmax(1)
    m = p.mean(0)
    slow = sum(float(q*(q/r).log()) for row in p for q, r in zip(row, m, strict=True))/12
    assert inception_score(p) == pytest.approx(np.exp(slow), rel=1e-12)
    assert 1 < inception_score(p, splits=3) < 5


def test_precision_recall_slow_and_chunked():
    a, b = normal(40, 3), normal(30, 3, 1)*1.5
    d = torch.cdist(a, a, compute_mode='donot_use_mm_for_euclid_dist').sort(1).values[:, 3]
    slow = np.mean([any((x-c).norm() <= r for c, r in zip(a, d, strict=True)) for x in b])
    assert precision_recall(a, b)[0] == pytest.approx(slow)
    assert _inside(b, a, 3, chunk=7) == _inside(b, a, 3)


@pytest.mark.parametrize('call, says', [
    (lambda: moments(torch.randn(3)), '(n,d)'),
    (lambda: frechet_features(normal(5, 2), normal(5, 3)), 'same feature extractor'),
    (lambda: inception_score(normal(5, 3)), 'softmax'),
    (lambda: precision_recall(normal(5, 2), normal(5, 2), k=5), 'between 1 and 4'),
    (lambda: psnr(images(0), images(1)[0]), 'cannot be compared'),
])
def test_bad_input_is_one_line(call, says):
    with pytest.raises(UserError) as e: call()
    assert says in str(e.value) and '\n' not in str(e.value)
