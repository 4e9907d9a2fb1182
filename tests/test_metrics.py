"Metrics against other implementations and slow definitions."
import numpy as np
import pytest
import torch

from vfmvae.core import UserError
from vfmvae.losses import ssim_loss
from vfmvae.evaluate import compare_statistics
from vfmvae.metrics import (_inside, frechet, frechet_features, frechet_interval, inception_score, kid, moments, precision_recall, psnr, ssim,
                            ssim_signed)
from vfmvae.plots import correlation, curves, scatter_fit
from vfmvae.probes import knn_accuracy, share
from vfmvae.statistics import Statistics


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
        assert torch.allclose(ssim(x, y)[i], structural_similarity_index_measure((a+1)/2, (b+1)/2, data_range=1.), atol=1e-6)
        assert torch.allclose(ssim_signed(x, y)[i], structural_similarity_index_measure(a, b, data_range=2.), atol=1e-6)
    assert torch.allclose(1-ssim_signed(x, y).mean(), ssim_loss(x, y), atol=1e-6)
    assert torch.allclose(ssim(x.bfloat16(), x.bfloat16()), torch.ones(3)) and psnr(x.half(), y.half()).dtype == torch.float32


@pytest.mark.parametrize('metric', [psnr, ssim, ssim_signed])
@pytest.mark.parametrize('spoil', [lambda x: x*float('nan'), lambda x: ((x+1)*127.5).byte(), lambda x: (x+1)*127.5, lambda x: x[..., :19], lambda x: x[:2],
                                   lambda x: x[0], lambda x: x[:, :1], lambda x: None])
def test_what_is_no_picture_is_one_line(metric, spoil):
    for pair in ((images(0), spoil(images(0))), (spoil(images(0)), images(0))):
        with pytest.raises(UserError) as e: metric(*pair)
        assert '\n' not in str(e.value)


def test_one_image_is_a_batch():
    assert ssim(images(0)[:1], images(1)[:1]).shape == psnr(images(0)[:1], images(1)[:1]).shape == (1,)


def test_inception_score_is_the_slow_sum():
    p = normal(12, 5).softmax(1)
    m = p.mean(0)
    slow = sum(float(q*(q/r).log()) for row in p for q, r in zip(row, m, strict=True))/12
    assert inception_score(p) == pytest.approx(np.exp(slow), rel=1e-12)
    assert 1 < inception_score(p, splits=3) < 5


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_probabilities_of_half_precision_are_some(dtype):
    p = torch.softmax(3*normal(300, 200), 1)
    assert inception_score(p.to(dtype)) == pytest.approx(inception_score(p), rel=2e-3)
    known = Statistics(torch.zeros(2), torch.eye(2), n=300, probs=p.to(dtype).float())
    assert compare_statistics(known, known)['is'] == pytest.approx(inception_score(p), rel=2e-3)
    with pytest.raises(UserError, match='apply softmax'): inception_score(p*1.02)



def test_precision_recall_slow_and_chunked():
    a, b = normal(40, 3), normal(30, 3, 1)*1.5
    d = torch.cdist(a, a, compute_mode='donot_use_mm_for_euclid_dist').sort(1).values[:, 3]
    slow = np.mean([any((x-c).norm() <= r for c, r in zip(a, d, strict=True)) for x in b])
    assert precision_recall(a, b)[0] == pytest.approx(slow)
    assert _inside(b, a, 3, chunk=7) == _inside(b, a, 3)


@pytest.mark.parametrize('scale', [1e-200, 1e-6, 1e6, 1e150])
def test_scores_do_not_depend_on_the_unit_of_the_features(scale):
    a, b = normal(60, 5), normal(50, 5, 1)*1.5
    assert precision_recall(a*scale, b*scale) == precision_recall(a, b) == precision_recall(a+1e6, b+1e6)
    if scale in (1e-6, 1e6): assert frechet_features(a*scale, b*scale) == pytest.approx(scale**2*frechet_features(a, b), rel=1e-10)


@pytest.mark.parametrize('far', [1e7, 1e12])
def test_one_far_row_says_nothing_about_the_others(far):
    "The slack for rounding was that of the largest row: one of 1e9 made the recall of samples elsewhere 1."
    a, b = normal(200, 8), normal(200, 8, 1)
    spoilt = torch.cat([a[:-1], torch.full((1, 8), far)])
    assert precision_recall(spoilt, b+9)[1] == precision_recall(b+9, spoilt)[0] == 0
    assert precision_recall(spoilt, b)[1] == _inside(a[:-1], b, 3)*199/200


def test_twins_lie_in_each_others_balls_of_radius_zero():
    a = normal(40, 64).repeat(4, 1)+3
    order = torch.randperm(160, generator=torch.Generator().manual_seed(2))
    assert precision_recall(a, a[order]) == (1, 1)
    assert precision_recall(a, a[order]+1e-3) == (0, 0)


def test_torch_fidelity_agrees():
    pytest.importorskip('torch_fidelity')
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_prc import calculate_precision_recall_full
    a, b = normal(90, 6), normal(70, 6, 1)*1.3+.2
    theirs = fid_statistics_to_metric(*(fid_features_to_statistics(x) for x in (a, b)), False)['frechet_inception_distance']
    assert frechet_features(a, b) == pytest.approx(theirs, rel=1e-9)
    assert precision_recall(a, b) == pytest.approx(calculate_precision_recall_full(b, a), abs=1e-6)
    for splits in (1, 7): assert inception_score(a.softmax(1), splits) == pytest.approx(
        isc_features_to_metric(a, splits, shuffle=False)['inception_score_mean'], rel=1e-9)


# what order a set has -----------------------------------------------------------------------------------------------------------------------

ORDERS = dict(sorted=lambda n, k: torch.arange(n)*k//n, turns=lambda n, k: torch.arange(n) % k)

@pytest.mark.parametrize('order', ORDERS)
@pytest.mark.parametrize('classes', [16, 20, 100])
def test_an_interval_is_as_wide_whatever_order_the_classes_have(order, classes):
    "Samples walk through the classes in turn: every twentieth row was of few classes, and the interval several times too wide."
    label, places = ORDERS[order](1000, classes), normal(classes, 8, 1)*2
    x, y = places[label]+normal(1000, 8, 2), (places+.3)[label[torch.randperm(1000, generator=torch.Generator().manual_seed(6))]]+normal(1000, 8, 3)
    mixed = [torch.randperm(1000, generator=torch.Generator().manual_seed(s)) for s in (4, 5)]
    wide = [high-low for low, high in (frechet_interval(x, y), frechet_interval(x[mixed[0]], y[mixed[1]]))]
    assert .4 < wide[0]/wide[1] < 1.7


@pytest.mark.parametrize('order', ORDERS)
def test_inception_score_and_precision_see_all_classes_of_an_ordered_set(order):
    "Two parts of 5,000 sure answers of 8 classes, sorted: each part has 4, and the score was 4. The same of the first 200 features."
    n, k = 10_000, 8
    label = ORDERS[order](n, k)
    probs, x = torch.eye(k)[label], (torch.eye(k)*40)[label].double() + normal(n, k)
    of = lambda f: Statistics(*moments(f), n=n, features=f, probs=probs)
    got = compare_statistics(of(x), of(x.flip(0)), pr_n=200)
    assert got['is'] == pytest.approx(k, rel=.01) and min(got['precision'], got['recall']) > .7


# shares and correlations --------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('n', [20, 100, 400])
@pytest.mark.parametrize('p', [.5, .9, .98])
def test_the_interval_of_a_share_holds_it_as_often_as_it_says(n, p):
    "Exactly, by the binomial distribution; a bootstrap's interval held .98 of 20 in a third of all cases."
    binom, every = pytest.importorskip('scipy.stats').binom, [share(k, n) for k in range(n+1)]
    assert all(0 <= s.low <= s.value <= s.high <= 1 for s in every) and every[n].low < 1 and every[0].high > 0
    assert sum(binom.pmf(k, n, p) for k, s in enumerate(every) if s.low <= p <= s.high) > .91


def test_an_accuracy_of_one_is_not_certain():
    x = torch.eye(2).repeat(10, 1)
    got = knn_accuracy(torch.eye(2), [0, 1], x, [0, 1]*10, k=1)
    assert got.value == got.high == 1 and got.low == pytest.approx(.8389, abs=1e-4)         # of statsmodels and scipy


def test_a_correlation_of_what_never_varies_is_none_whatever_its_digits():
    for n in (3, 7, 10): assert np.isnan(correlation([.1]*n, [.3]*n)).all() and np.isnan(correlation([.1]*n, [*range(n)])).all()
    rise = np.array([1., 2., 4., 3.])
    for unit in (1e-170, 1e-9, 1e200): assert correlation(rise*unit, rise) == pytest.approx((1, 1))
    assert np.isnan(correlation([1, NAN, 3], [1, 2, 3])).all()
    for x, y in (([1, 2, 3], [1, 2]), ([1], [2]), ([[1, 2]], [[1, 2]])):                    # it was a ValueError of numpy, or nan
        for f in (correlation, scatter_fit):
            with pytest.raises(UserError, match='two equal rows of at least 2 numbers'): f(x, y)


def test_a_correlation_is_scipys():
    stats, g = pytest.importorskip('scipy.stats'), np.random.default_rng(0)
    for x in (g.normal(size=40), g.integers(0, 5, 40), g.normal(size=40) > 0):
        y = x + g.normal(size=40)
        assert correlation(x, y) == (stats.pearsonr(x.astype(float), y)[0], stats.spearmanr(x, y)[0])


def test_a_figure_keeps_the_numbers_that_it_was_given():
    x = torch.tensor([1+1e-12, 1+2e-12, 1.1], dtype=torch.float64)
    assert [r['y'] for r in curves({'a': x}, 'x', 'y').data] == x.tolist()
    assert [r['label'] for r in scatter_fit([1, 2, 3], [1, 2, 3], labels=['one']).data] == ['one', '', '']


EYE, NAN = np.eye(3), float('nan')
LOPSIDED = EYE + np.triu(np.full((3, 3), .1), 1)
@pytest.mark.parametrize('call, says', [
    (lambda: moments(torch.randn(3)), '(n,d)'),
    (lambda: moments(torch.zeros(5, 0)), '(n,d)'),
    (lambda: moments(normal(5, 2)*1j), 'complex'),
    (lambda: moments(normal(5, 2) > 0), 'bool'),
    (lambda: moments(normal(5, 2).numpy() > 0), 'bool'), (lambda: moments([[True, False], [False, True]]), 'bool'),
    (lambda: moments(normal(5, 2).to_sparse()), 'sparse'),
    (lambda: moments([[1, 2], [3]]), 'different lengths'),
    (lambda: moments([['a', 'b'], ['c', 'd']]), 'real numbers'),
    (lambda: moments(np.array(['2026-01-01', '2026-01-02'], 'datetime64[D]')), 'real numbers'),
    (lambda: moments(normal(5, 2)*NAN), 'NaN'),
    (lambda: frechet_features(normal(5, 2), normal(5, 3)), 'same feature extractor'),
    (lambda: frechet(np.zeros(3), EYE, np.zeros(3), -EYE), 'second covariance'),
    (lambda: frechet(np.zeros(3), -EYE, np.zeros(3), EYE), 'first covariance'),
    (lambda: frechet(np.zeros(3), EYE, np.zeros(3), EYE+np.array([[0, 2, 0], [2, 0, 0], [0, 0, 0]])), 'negative variances'),
    (lambda: frechet(np.zeros(3), LOPSIDED, np.zeros(3), EYE), 'not symmetric'),
    (lambda: frechet(np.zeros(3), EYE, np.zeros(3), LOPSIDED), 'not symmetric'),
    (lambda: frechet(np.zeros(3), EYE[:2], np.zeros(3), EYE), '(d,d)'),
    (lambda: frechet(np.zeros((1, 3)), EYE, np.zeros(3), EYE), '(d,)'),
    (lambda: frechet(np.full(3, NAN), EYE, np.zeros(3), EYE), 'NaN'),
    (lambda: frechet(np.full(3, 1e200), EYE, np.zeros(3), EYE), 'scale the features'),
    (lambda: inception_score(normal(5, 3)), 'softmax'),
    *((lambda s=s: inception_score(normal(5, 3).softmax(1), s), 'splits') for s in (0, 6, -1, 1.5, True, NAN, '1', None)),
    *((lambda k=k: precision_recall(normal(5, 2), normal(6, 2), k), 'k') for k in (0, 5, -1, 1.5, True, NAN, '1', None)),
    (lambda: precision_recall(normal(5, 2), normal(5, 2)*NAN), 'fake features'),
    (lambda: psnr(images(0), images(1)[:1]), 'cannot be compared'),
])
def test_bad_input_is_one_line(call, says):
    with pytest.raises(UserError) as e: call()
    assert says in str(e.value) and '\n' not in str(e.value)


@pytest.mark.parametrize('scale', [1e-150, 1e-100, 1e-30, 1e-8, 1e-3])
def test_small_features_have_a_kernel_distance(scale):
    "They drowned in the 1 of the kernel: 0, or a rounding error, in silence."
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(30, 5, generator=g, dtype=torch.float64), torch.randn(20, 5, generator=g, dtype=torch.float64)*1.5+.3
    def linear(p, q): return ((p@q.T).sum()-(p*p).sum()*(p is q))/(len(p)*(len(q)-(p is q)))/5       # of (1+u)^3 the first term is 3u
    want = 3*(linear(x, x) + linear(y, y) - 2*linear(x, y)).item()
    got = kid(x*scale, y*scale)/scale/scale
    assert abs(got-want) < abs(want)*max(1e-9, 50*scale**2)


def test_large_features_have_a_line():
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(0)).double()
    for scale in (1e80, 1e200):
        with pytest.raises(UserError, match='kernel distance is beyond what float64 holds; scale'): kid(x*scale, torch.ones(8, 3))
