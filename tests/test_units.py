"No score knows the unit of its features, features that say nothing give nan or a refusal, and images that come twice are noticed and counted."
import math
import warnings

import numpy as np
import pytest
import torch

from vfmvae.neighbours import knn_graph, mutual_knn, prepare
from vfmvae.align import cka, cknna, cknna_pairs, cknna_score
from vfmvae.probes import knn_accuracy, linear_probe, ridge_probe
from vfmvae.core import UserError
from vfmvae.similarity import compare, lds, METRICS, rmsc
from vfmvae.neighbours import copies_of


def normal(n, d, seed=0, dtype=torch.float64): return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=dtype)
def pair(n=60, d=12, e=12): return (x := normal(n, d)), x@normal(d, e, 1)/d**.5 + .5*normal(n, e, 2)
@pytest.fixture
def strict():
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        yield


SCALES = [(1e-6, 1.), (1., 1e6), (1e6, 1e-6), (.01, .01), (1e-20, 1.), (1., 1e20), (1e20, 1e-20), (3e-12, 7e12)]

@pytest.mark.parametrize('dtype, tol', [(torch.float64, 1e-7), (torch.float32, 2e-5)])
def test_no_measure_knows_the_unit(strict, dtype, tol):
    a, b = (x.to(dtype) for x in pair())
    want = compare(a, b)
    assert len({r['metric'] for r in want}) == len(METRICS) and not want.left_out
    for s, t in SCALES:
        got = compare(a*s, b*t)
        for w, g in zip(want, got, strict=True): assert g['value'] == pytest.approx(w['value'], rel=tol, abs=tol), (w['metric'], s, t)


@pytest.mark.parametrize('dtype', (torch.float64, torch.float32))
@pytest.mark.parametrize('kind', ('raw', 'unit', 'offset', 'wide'))
def test_scores_of_rows_as_they_come(strict, dtype, kind):
    "cknna and cka take rows as the caller gives them: eps counts in their unit, and is the published one for rows of length 1."
    make = dict(raw=lambda x: x, unit=prepare, offset=lambda x: x+100, wide=lambda x: torch.cat([x]*9, 1))[kind]
    a, b = (make(x.to(dtype)) for x in pair())
    score = dict(cknna=cknna, biased=lambda x, y: cknna(x, y, unbiased=False), mutual=mutual_knn, cka=cka, unbiased=lambda x, y: cka(x, y, unbiased=True),
                 exact=lambda x, y: cknna(x, y, eps=0), p=lambda x, y: cknna_score(x, y, times=20).low)
    tol = 1e-9 if dtype == torch.float64 else 2e-3 if kind == 'offset' else 1e-5     # float32 keeps five digits beside an offset of 100
    for name, f in score.items():
        want = f(a, b)
        for s, t in SCALES: assert f(a*s, b*t) == pytest.approx(want, abs=tol), (name, s, t)


def test_cka_is_the_definition_at_every_scale():
    a, b = pair()
    H = torch.eye(60, dtype=torch.float64)-1/60
    K, L = (H@x@x.T@H for x in (a, b))
    want = ((K*L).sum()/(K.norm()*L.norm())).item()
    for s in (1., .01, .001, 1e-9):
        assert cka(a*s, b*s) == pytest.approx(want, abs=1e-6) and cka(a*s+1, b*s-3) == pytest.approx(want, abs=1e-4)
    with pytest.warns(match='more than half of the denominator'): assert cka(prepare(a+1e4), prepare(b+1e4), unbiased=True) < want/2     # published, and said


def test_prepare_takes_any_length():
    x = normal(50, 40, dtype=torch.float32)
    for s in (1e-38, 1e-30, 1e-13, 1e13, 1e20, 1e37): assert torch.allclose(prepare(x*s), prepare(x), atol=1e-5 if s < 1e-37 else 1e-6), s
    y = x.double()*torch.logspace(-150, 150, 50, dtype=torch.float64)[:, None]          # each row with a unit of its own
    assert torch.allclose(prepare(y, 1), prepare(x.double(), 1), atol=1e-12)
    assert cknna(prepare(x*1e20), prepare(x)) == pytest.approx(cknna(prepare(x), prepare(x)), abs=1e-6) and not prepare(0*x).any()
    tokens = x.view(2, 25, 40)
    for f in (rmsc, lambda t: lds(t, (5, 5))): torch.testing.assert_close(f(tokens*1e-20), f(tokens), atol=1e-6, rtol=0)


def test_the_rbf_kernel_has_an_absolute_width():
    a, b = (prepare(x) for x in pair(40))
    assert cka(a*1e6, b*1e6, 'rbf', 1e6) == pytest.approx(cka(a, b, 'rbf'), abs=1e-9)
    for s, unbiased in ((1e-6, False), (1e6, False), (1e6, True), (1e-6, True)):
        with pytest.warns(match='give a sigma near'): assert math.isnan(cka(a*s, b, 'rbf', unbiased=unbiased))
    far = torch.repeat_interleave(1e7*normal(8, 6, 3), 5, 0) + .3*normal(40, 6, 4)          # groups far from each other: only own groups are near
    K, L = ((-torch.cdist(x, x, compute_mode='donot_use_mm_for_euclid_dist').square()/2).exp() for x in (far, b))
    H = torch.eye(40, dtype=torch.float64)-1/40
    assert cka(far, b, 'rbf') == pytest.approx(((H@K@H*L).sum()/((H@K@H*K).sum()*(H@L@H*L).sum()).sqrt()).item(), abs=.02)


@pytest.mark.parametrize('still', (torch.zeros(60, 12), torch.full((60, 12), .1), torch.ones(60, 12).double()*1e-9), ids=('zero', 'tenths', 'small'))
def test_features_that_never_vary_say_nothing(still):
    a = pair()[0].to(still.dtype)
    for x, y in ((still, a), (a, still), (still, still)):
        for f in (cknna, mutual_knn, cka, lambda x, y: cka(x, y, unbiased=True), lambda x, y: cka(x, y, 'rbf')):
            with pytest.warns(match='same'): assert math.isnan(f(x, y))
        with pytest.warns(match='never vary'): s = cknna_score(x, y, times=20)
        assert all(math.isnan(v) for v in s[:7]) and s.n == 60
        with warnings.catch_warnings(record=True): t = compare(x, y)
        sides = ('a', 'a -> b', 'b -> a') if x is still else ('b', 'a -> b', 'b -> a')
        length = still.any() and ('uniformity', 'rankme', 'mean_cosine', 'pair_distance')         # these know directions, not variance
        for r in t: assert math.isnan(r['value']) or r['of'] not in sides or r['metric'] in (length or ()), r
    y = torch.arange(60) % 3
    with pytest.warns(match='probe is nan'): assert all(math.isnan(v) for v in knn_accuracy(still[:40], y[:40], a[40:], y[40:], 3))
    with pytest.warns(match='probe is nan'): assert all(math.isnan(v) for v in linear_probe(still[:40], y[:40], a[40:], y[40:]))
    with pytest.warns(match='probe is nan'): assert all(math.isnan(v) for v in ridge_probe(still[:40], a[:40, 0], a[40:], a[40:, 0]))
    wide = torch.cat([a, still], 1)                                                          # a constant column changes nothing
    assert linear_probe(wide[:40], y[:40], wide[40:], y[40:]).value == linear_probe(a[:40], y[:40], a[40:], y[40:]).value
    with pytest.raises(UserError, match='never varies'): ridge_probe(a[:40], still[:40, 0], a[40:], still[40:, 0])


@pytest.mark.parametrize('dtype', (torch.float32, torch.float64))
def test_probes_do_not_know_the_unit(dtype):
    x = normal(200, 10, dtype=dtype)
    y = (x[:, 0] > 0).long() + 2*(x[:, 1] > 0)
    ask = lambda s, t=1.: (linear_probe(x[:150]*s, y[:150], x[150:]*s, y[150:]).value, knn_accuracy(x[:150]*s, y[:150], x[150:]*s, y[150:], 5).value,
                           ridge_probe(x[:150]*s, x[:150, 0]*t, x[150:]*s, x[150:, 0]*t).value)
    want = ask(1.)
    assert want[0] > .8 and want[2] > .99
    for s in (1e-6, 1e6, 1e-20, 1e20): assert ask(s, s) == pytest.approx(want, abs=1e-6)
    columns = torch.logspace(-9, 9, 10, dtype=dtype)                                        # every feature in a unit of its own
    assert linear_probe(x[:150]*columns, y[:150], x[150:]*columns, y[150:]).value == pytest.approx(want[0], abs=.02)


# twins ----------------------------------------------------------------------------------------------------------------------------------------

KINDS = {'normal': lambda x: x, 'relu': lambda x: x.clamp(min=0), 'half': lambda x: x.half(), 'offset': lambda x: x+30, 'unit': prepare,
         'lengths': lambda x: x*torch.logspace(-2, 2, len(x), dtype=x.dtype)[:, None], 'small': lambda x: x*1e-20, 'large': lambda x: x*1e18}

@pytest.mark.parametrize('kind', KINDS)
def test_copies_are_counted_and_ordinary_rows_are_not(strict, kind):
    for n, d in ((80, 3), (400, 50), (1500, 16)):
        x = KINDS[kind](normal(n, d, n, torch.float32))
        if kind != 'relu' or d > 3: knn_graph(x, 3)                                         # no warning
        for times in ([2]*5, [4]*(n//4), [n-7]):
            twins = x.repeat_interleave(torch.tensor(times + [1]*(n-len(times))), 0)[torch.randperm(sum(times)+n-len(times),
                                                                                            generator=torch.Generator().manual_seed(d))]
            if kind == 'relu' and d == 3: continue
            found = copies_of(twins)
            assert len(twins)-len(found.unique()) == sum(times)-len(times)
            same = (twins[:40, None] == twins[None, :40]).all(2)
            assert torch.equal(found[:40, None] == found[None, :40], same)


def test_a_copy_in_another_batch_differs_in_its_last_bits():
    x = normal(200, 64, dtype=torch.float32)
    twins = torch.cat([x, x*(1+1e-7*torch.sign(normal(200, 64, 1, torch.float32)))])
    assert len(copies_of(twins).unique()) == 200 and copies_of(torch.cat([x, x+1e-3*normal(200, 64, 1, torch.float32)])) is None


@pytest.mark.parametrize('k', (3, 10))
def test_unrelated_features_of_copies_are_no_finding(k):
    "Each image four times, some twice, and all but one once: the p-value is that of chance."
    for times in ([4]*30, [2]*20+[1]*40):
        p = []
        for seed in range(12):
            a, b = (prepare(normal(len(times), 8, 2*seed+i).repeat_interleave(torch.tensor(times), 0)) for i in (0, 1))
            with pytest.warns(match=f'{sum(times)-len(times)} of {sum(times)} rows are copies'): p.append(cknna_score(a, b, k, times=39).p)
        assert np.mean(np.array(p) <= .05) <= .25 and np.mean(p) > .3, p                     # 12 draws; were they unnoticed: all at 1/40
    a = prepare(normal(30, 8).repeat_interleave(4, 0))
    with pytest.warns(match='copies'): assert cknna_score(a, a, 10, times=39).p < .03        # what is related stays found
    with pytest.warns(match='90 of 120'): mutual_knn(a, a, 3)
    with pytest.warns(match='90 of 120'): cknna_pairs({'a': a}, {'a': a}, 3, times=20)
    with pytest.warns(match='90 of 120'): compare(a, a, 'cknna', k=3)
    with pytest.warns(match='rows of a probe are copies'): knn_accuracy(a, torch.arange(120) % 4, k=3)
    with pytest.warns(match='rows of a probe are copies'): linear_probe(a, torch.arange(120) % 4, a.flip(0), torch.arange(120) % 4)


def test_without_copies_the_shuffles_are_the_plain_ones():
    from vfmvae.align import _orders
    a, b = (knn_graph(prepare(normal(50, 6, s)), 4) for s in (0, 1))
    g = torch.Generator().manual_seed(3)
    for o in _orders(a, b, 3, 3): assert torch.equal(o, torch.randperm(50, generator=g))
    with pytest.warns(match='copies'): c, d = (knn_graph(prepare(normal(50, 6, s)[torch.arange(60) % 50]), 4) for s in (0, 1))
    for o in _orders(c, d, 5, 0):
        assert o.sort().values.tolist() == list(range(60)) and all(o[i+50] % 50 == o[i] % 50 for i in range(10))


@pytest.mark.parametrize('call', [
    lambda a, b: knn_graph(a, 2.5), lambda a, b: knn_graph(a, True), lambda a, b: knn_graph(a, 'ten'), lambda a, b: knn_graph(a, math.nan),
    lambda a, b: prepare(a, math.nan), lambda a, b: prepare(a, 'x'), lambda a, b: cknna(a, b, eps=-1), lambda a, b: cknna(a, b, eps=math.nan),
    lambda a, b: cka(a, b, eps=None), lambda a, b: cka(a, b, 'rbf', 0), lambda a, b: cka(a, b, 'rbf', math.inf), lambda a, b: cka(a, b, 'rbf', -1),
    lambda a, b: cknna_score(a, b, times=math.nan), lambda a, b: cknna_score(a, b, times='many'), lambda a, b: cknna_score(a, b, seed=.5),
    lambda a, b: cknna_pairs({'a': a}, {'b': b}, k='5'), lambda a, b: cknna_pairs({'a': a}, {'b': b}, k=[3, None]),
    lambda a, b: compare(a, b, k=3.3), lambda a, b: compare(a, b, lam=math.nan), lambda a, b: compare(a, b, sigma='x'),
    lambda a, b: compare(a, b, directions=0), lambda a, b: compare(a, b, 'ridge_r2', lam=-1), lambda a, b: knn_graph([[1, 2], [3]], 1),
    lambda a, b: knn_graph(a.to(torch.complex64), 3), lambda a, b: prepare(a.to_sparse()), lambda a, b: compare([['x']], b),
    lambda a, b: knn_accuracy(a, torch.arange(60) % 3, k=0), lambda a, b: knn_accuracy(a, torch.arange(60) % 3, temperature=0),
    lambda a, b: linear_probe(a, torch.arange(60) % 3, b, torch.arange(60) % 3, seed=math.nan),
    lambda a, b: linear_probe(a, torch.arange(60) % 3, b, torch.arange(60) % 3, components=0)])
def test_bad_numbers_are_one_line(call):
    with pytest.raises(UserError) as e: call(*pair())
    assert '\n' not in str(e.value)


def test_a_probe_of_one_row_a_class_says_so():
    x, y = torch.randn(16, 8), torch.arange(16)
    with pytest.raises(UserError, match='16 training rows of 16 classes.*more of each class'): linear_probe(x, y, x, y)
