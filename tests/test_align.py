"CKNNA, CKA, mutual kNN against the published numbers; laws; probes against other implementations."
import json
import os
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from vfmvae import align, neighbours
from vfmvae.neighbours import knn_graph, mutual_knn, prepare
from vfmvae.align import cka, cknna, cknna_null, cknna_pairs, cknna_parts, cknna_score
from vfmvae.core import UserError
from vfmvae.probes import knn_accuracy, linear_probe, ridge_probe

SHARED = Path(os.environ.get('VFMVAE_SHARED') or Path(__file__).resolve().parents[2]/'shared')/'golden'
GOLD = SHARED/'alignment'
golden = pytest.mark.skipif(not (GOLD/'expected.json').is_file(), reason='golden numbers absent; set VFMVAE_SHARED')
EXPECTED = json.loads((GOLD/'expected.json').read_text()) if (GOLD/'expected.json').is_file() else {}
PAIRS = [k for k, v in EXPECTED.items() if isinstance(v, dict) and 'float64' in v]
TIES = [k for k in EXPECTED if k.startswith('tie')]
PREPS = {'prepared(q=.95,exact,l2)': .95, 'l2_only': 1.}


def normal(n, d, seed=0, dtype=torch.float32): return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=dtype)
def pair(n=150, d=24, noise=.5): return prepare(x := normal(n, d)), prepare(x@normal(d, 30, 1)/d**.5+noise*normal(n, 30, 2))


def measure(key, a, b):
    "(our value, its place in the golden block) of one golden key; None for keys of other measures."
    name, _, k = key.rpartition('_k')
    unbiased = 'unbiased' in key
    if name.startswith('cknna') and name.endswith('parts'): return cknna_parts(a, b, int(k), unbiased)
    if name.startswith('cknna'): return cknna(a, b, int(k), unbiased)
    if name == 'mutual_knn': return mutual_knn(a, b, int(k))
    if key.startswith('cka'): return cka(a, b, key.split('_')[1], float(key.split('sigma')[1]) if 'sigma' in key else 1., unbiased)
    if key.startswith('checksum'): return (a if key.endswith('A') else b).double().abs().sum().item()
    return None


def compare(case, dtype, prep, tol):
    "Largest-error report of every golden key that is ours; `tol(key)` None skips."
    f, seen = load_file(GOLD/f'{case}.safetensors'), []
    a, b = (prepare(f[s].to(dtype), PREPS[prep]) for s in 'AB')
    for key, want in EXPECTED[case][str(dtype)[6:]][prep].items():
        if (got := measure(key, a, b)) is None or (t := tol(key)) is None: continue
        if isinstance(want, dict): assert got['pairs'] == want['intersection_nnz'], key
        wants, gots = ([want], [got]) if not isinstance(want, dict) else ([want[s] for s in ('kl', 'kk', 'll')], [got[s] for s in ('kl', 'kk', 'll')])
        np.testing.assert_allclose(gots, wants, atol=t, rtol=t, err_msg=f'{case} {key}')
        seen.append(key)
    return seen


@golden
@pytest.mark.parametrize('prep', PREPS)
@pytest.mark.parametrize('case', PAIRS)
def test_float64(case, prep):
    sensitive = 'tie_sensitive_keys' in EXPECTED[case]
    def tol(key):
        if sensitive and key.startswith('cknna_biased'): return None   # a row and its twin tie: the published order is arbitrary
        return 1e-6 if key.startswith('mutual') else 1e-12 if key.startswith('cknna') and 'parts' not in key else 1e-10
    seen = compare(case, torch.float64, prep, tol)
    assert {k.split('_')[0] for k in seen} >= {'cknna', 'cka', 'mutual'} and len(seen) >= 9


@golden
@pytest.mark.parametrize('prep', PREPS)
@pytest.mark.parametrize('case', PAIRS)
def test_float32(case, prep):
    "float32 features; ours accumulates in float64, so where float32 itself loses digits (rbf, strong means) the float64 numbers are the reference."
    sensitive = 'tie_sensitive_keys' in EXPECTED[case]
    def tol(key):
        if key.startswith('cka') or (sensitive and key.startswith('cknna_biased')): return None
        return 1e-5
    assert len(compare(case, torch.float32, prep, tol)) >= 4
    f = load_file(GOLD/f'{case}.safetensors')
    a, b = (prepare(f[s], PREPS[prep]) for s in 'AB')
    for key, want in EXPECTED[case]['float64'][prep].items():
        if key.startswith('cka'): assert measure(key, a, b) == pytest.approx(want, abs=1e-5), key


@golden
@pytest.mark.parametrize('case', TIES)
def test_ties_are_exact(case):
    f, want, k = load_file(GOLD/f'{case}.safetensors'), EXPECTED[case]['canonical'], int(case.split('_k')[1])
    for dtype in (torch.float32, torch.float64):
        ga, gb = (knn_graph(f[s].to(dtype), k) for s in 'AB')
        for g, s in ((ga, 'A'), (gb, 'B')): assert torch.equal(g.idx, f[f'idx_{s}']) and torch.equal(g.val, f[f'val_{s}'])
        parts = cknna_parts(ga, gb, k)
        assert parts['pairs'] == want['intersection_nnz']
        for s in ('kl', 'kk', 'll'): assert parts[s] == pytest.approx(want[f'hsic_{s}'], abs=1e-15)
        assert cknna(ga, gb, k) == pytest.approx(want['cknna_unbiased'], abs=1e-12)
        assert cknna(ga, gb, k, eps=0) == pytest.approx(want['cknna_unbiased_eps0'], abs=1e-12)
        assert mutual_knn(ga, gb, k) == pytest.approx(want['mutual_knn'], abs=1e-12)


@golden
def test_evaluation_file():
    g = load_file(SHARED/'vfmvae/evaluation.safetensors')
    a, b = prepare(g['A']), prepare(g['B'])
    assert torch.equal(a, F.normalize(g['A_clamped'], dim=1, eps=1e-12))
    for k in (2, 5, 10, 50, 199): assert cknna(a, b, k) == pytest.approx(g[f'cknna.k{k}'].item(), abs=1e-6)
    assert cknna(a, b, None) == pytest.approx(g['cknna.k199'].item(), abs=1e-6)
    assert cknna(a, b, 10, unbiased=False) == pytest.approx(g['cknna.k10.biased'].item(), abs=1e-6)
    assert cka(a, b) == pytest.approx(g['cka'].item(), abs=1e-6)
    assert cka(a, b, unbiased=True) == pytest.approx(g['cka.unbiased'].item(), abs=1e-6)
    assert mutual_knn(a, b) == pytest.approx(g['mutual_knn.k10'].item(), abs=1e-6)


def dense_cknna(a, b, k, unbiased, eps=1e-6):
    n = len(a)
    K, L = a.double()@a.double().T, b.double()@b.double().T
    def mask(x):
        sim = x.clone()
        if unbiased: sim.fill_diagonal_(-torch.inf)
        return torch.zeros(n, n, dtype=torch.float64).scatter_(1, sim.argsort(dim=1, descending=True, stable=True)[:, :k], 1)
    def hsic(P, Q):
        if not unbiased:
            H = torch.eye(n, dtype=torch.float64)-1/n
            return (P@H@Q@H).trace()
        P, Q = P-P.diag().diag(), Q-Q.diag().diag()
        return ((P@Q).trace() + P.sum()*Q.sum()/(n-1)/(n-2) - 2/(n-2)*(P@Q).sum())/n/(n-3)
    A, B = mask(K), mask(L)
    return (hsic(A*B*K, A*B*L)/((hsic(A*K, A*K)*hsic(B*L, B*L)).sqrt()+eps)).item()


@pytest.mark.parametrize('k', (2, 10, 40))
@pytest.mark.parametrize('unbiased', (True, False))
def test_cknna_is_the_dense_definition(k, unbiased):
    a, b = (x.double() for x in pair())
    assert cknna(a, b, k, unbiased) == pytest.approx(dense_cknna(a, b, k, unbiased), abs=1e-12)


def test_block_size_changes_nothing(monkeypatch):
    x = prepare(torch.cat([y := normal(60, 17), y[::2]]))   # with twins
    whole, c = knn_graph(x, 9), cka(x, x[:, :3], 'rbf')
    for module in (align, neighbours): monkeypatch.setattr(module, 'row_blocks', lambda n, width: (slice(i, min(n, i+7)) for i in range(0, n, 7)))
    assert torch.equal(knn_graph(x, 9).idx, whole.idx) and cka(x, x[:, :3], 'rbf') == pytest.approx(c, abs=1e-12)
    for block, group in ((36, 4), (40, 32), (64, 7), (89, 5)):
        monkeypatch.setattr(neighbours, 'BLOCK', block); monkeypatch.setattr(neighbours, 'GROUP', group)
        assert torch.equal(knn_graph(x, 9).idx, whole.idx)
        np.testing.assert_allclose(knn_graph(x, 9).val, whole.val, atol=1e-14)


def nearest_by_definition(q, x, k, alone):
    "Float64 products summed in one order, rounded to the type of the features, value descending, index ascending."
    sim = torch.stack([(x.double()*row).sum(1) for row in q.double()]).to(x.dtype)
    if alone: sim.fill_diagonal_(-torch.inf)
    return sim.argsort(dim=1, descending=True, stable=True)[:, :k]


KINDS = {
    'normal': lambda x: x, 'unit': prepare, 'twins': lambda x: x[torch.arange(len(x)) % max(2, len(x)//3)], 'signs': lambda x: x.sign(),
    'zeros': lambda x: x*(torch.arange(len(x)) % 3 > 0)[:, None], 'constant': torch.ones_like, 'offset': lambda x: x+30, 'negative': lambda x: -x.abs(),
    'few': lambda x: x.where(torch.arange(len(x))[:, None] > 5, 0.),
    'sizes': lambda x: x*torch.logspace(-4, 4, len(x))[:, None], 'coarse': lambda x: (2*x).round()/2,
    'large': lambda x: x*1e12, 'small': lambda x: x*1e-12, 'turned': lambda x: prepare(x).T.contiguous().T,
}


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('dtype', (torch.float32, torch.float64))
def test_the_fast_graph_is_the_definition(monkeypatch, kind, dtype):
    draw = np.random.default_rng(list(KINDS).index(kind))
    walked = 0
    offer = neighbours._Pool.offer
    def counting(*args, **kwargs):
        nonlocal walked
        walked += 1
        return offer(*args, **kwargs)
    monkeypatch.setattr(neighbours._Pool, 'offer', counting)
    for seed in range(8):
        n, d = (700, 5) if seed == 7 else (int(draw.integers(4, 250)), int(draw.integers(1, 200 if seed < 3 else 40)))
        block = int(draw.integers(8, 120))
        monkeypatch.setattr(neighbours, 'BLOCK', block); monkeypatch.setattr(neighbours, 'GROUP', int(draw.integers(2, 33)))
        k = int(draw.integers(1, max(2, min(n-1, block//4)+1))) if seed % 4 else int(draw.integers(1, n))
        x, loops = KINDS[kind](normal(n, d, seed).to(dtype)), bool(seed % 2)
        g = knn_graph(x, k, loops)
        assert torch.equal(g.idx, nearest_by_definition(x, x, k, not loops)), (n, d, k, block)
        some = slice(0, 40)
        np.testing.assert_allclose(g.val[some], (x.double()[some, None]*x.double()[g.idx[some]]).sum(2), rtol=1e-12,
                                   atol=1e-13*x.double().square().sum(1).max())
    assert walked > 20


def test_crowded_rows_go_back_to_whole_rows(monkeypatch):
    monkeypatch.setattr(neighbours, 'BLOCK', 64); monkeypatch.setattr(neighbours, 'GROUP', 8)
    seen, whole = [], neighbours._whole
    def spy(x, k, alone, at=None):
        seen.append(len(at))
        return whole(x, k, alone, at)
    monkeypatch.setattr(neighbours, '_whole', spy)
    x = torch.cat([normal(200, 16), normal(1, 16, 1).repeat(200, 1)])   # 200 equal images among 400
    assert torch.equal(knn_graph(x, 5).idx, nearest_by_definition(x, x, 5, True))
    assert len(seen) == 1 and 200 <= seen[0] < 400
    knn_graph(normal(300, 16), 5)
    assert len(seen) == 1


@pytest.mark.parametrize('setting', ('medium', 'high', 'highest'))
def test_reduced_precision_cannot_enter(setting):
    x, before = prepare(normal(1500, 40)), torch.get_float32_matmul_precision()
    want = nearest_by_definition(x, x, 7, True)
    try:
        torch.set_float32_matmul_precision(setting)
        with torch.autocast('cpu'): assert torch.equal(knn_graph(x.clone().requires_grad_(), 7).idx, want)
        assert torch.get_float32_matmul_precision() == setting
    finally: torch.set_float32_matmul_precision(before)


def test_a_relabelled_set_has_the_relabelled_graph(monkeypatch):
    monkeypatch.setattr(neighbours, 'BLOCK', 50); monkeypatch.setattr(neighbours, 'GROUP', 8)
    x, order = prepare(normal(333, 20)), torch.randperm(333, generator=torch.Generator().manual_seed(2))
    g, h = knn_graph(x, 8), knn_graph(x[order], 8)
    assert torch.equal(g.shuffled(order).idx, h.idx) and torch.allclose(g.shuffled(order).val, h.val, atol=1e-15)
    assert torch.equal(knn_graph(x, 12).first(8).idx, g.idx)


def test_the_graph_takes_little_memory(monkeypatch):
    "Nothing as large as the n x n matrix, nor a float64 copy of the input, is ever made."
    from torch.utils._python_dispatch import TorchDispatchMode
    largest = 0
    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, f, types, args=(), kwargs=None):
            nonlocal largest
            out = f(*args, **(kwargs or {}))
            for t in out if isinstance(out, tuple | list) else (out,):
                if isinstance(t, torch.Tensor): largest = max(largest, t.untyped_storage().nbytes() if t.data_ptr() != x.data_ptr() else 0)
            return out
    x = prepare(normal(6000, 512))
    with Watch(): knn_graph(x, 10)
    assert 0 < largest <= 12*2**20 < x.nbytes*1.05 and 12*2**20 < 6000**2*4/10


def test_golden_through_the_walk(monkeypatch):
    "The golden numbers again, with blocks so small that nothing is done whole."
    monkeypatch.setattr(neighbours, 'BLOCK', 44); monkeypatch.setattr(neighbours, 'GROUP', 8)
    if not EXPECTED: pytest.skip('golden numbers absent; set VFMVAE_SHARED')
    for case in PAIRS: test_float64(case, 'prepared(q=.95,exact,l2)')
    for case in TIES: test_ties_are_exact(case)


def test_twins_keep_the_index_order():
    x = prepare(normal(40, 13).repeat(3, 1))
    g = knn_graph(x, 2)
    assert g.idx[:40].tolist() == [[i+40, i+80] for i in range(40)] and g.idx[80:].tolist() == [[i, i+40] for i in range(40)]


@pytest.mark.parametrize('kind, says', [('plain', ''), ('signs', 'beyond'), ('signs of 12', 'beyond'), ('some twins', ''), ('one in twenty', '')])
def test_ties_at_rank_k_are_said_and_change_nothing(kind, says):
    "Ties are broken by index on both sides alike: 12 signs of 1,000 rows, unrelated, had p <= .05 in up to half of all pairs, in silence."
    x = normal(400, 24)
    rows = {'plain': x, 'signs': x.sign(), 'signs of 12': x[:, :12].sign(), 'some twins': torch.cat([x, x[:200]]),
            'one in twenty': torch.cat([x[:380], x[:20].sign()])}[kind]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        g = knn_graph(rows, 7)
    found = [str(w.message) for w in said if 'as near as the k-th' in str(w.message)]
    assert len(found) == bool(says) and all('\n' not in t and 'p too low' in t for t in found)
    wide = rows.double()
    sim = (wide@wide.T).fill_diagonal_(-torch.inf).to(rows.dtype)
    assert torch.equal(g.idx, sim.argsort(dim=1, descending=True, stable=True)[:, :7]) and g.val.shape == (len(rows), 7)
    with warnings.catch_warnings(): # all neighbours: nothing is beyond
        warnings.simplefilter('error')
        knn_graph(x.sign()[:60], None)


def test_null_is_a_shuffle_of_rows():
    a, b = pair()
    orders, g = [], torch.Generator().manual_seed(5)
    for _ in range(4): orders.append(torch.randperm(150, generator=g))
    assert cknna_null(a, b, times=4, seed=5).tolist() == pytest.approx([cknna(a, b[o]) for o in orders], abs=1e-9)
    assert cknna(a, b) > cknna_null(a, b, times=50).max()


@golden
@pytest.mark.parametrize('case', PAIRS)
def test_prepare_is_the_published_one(case):
    f = load_file(GOLD/f'{case}.safetensors')
    for dtype in (torch.float64, torch.float32):
        for side in 'AB':
            x, want = f[side].to(dtype), EXPECTED[case][str(dtype)[6:]]['prepared(q=.95,exact,l2)']
            if (key := f'clamp_{side}') in want: assert neighbours._selected(x, int(.95*x.numel())).item() == pytest.approx(want[key], rel=1e-7)
            assert torch.equal(prepare(x, 1), F.normalize(x, dim=1, eps=1e-12))
            assert prepare(x).dtype == dtype
            torch.testing.assert_close(prepare(x.T.contiguous().T), prepare(x), rtol=1e-6, atol=1e-7)   # a norm is summed in the order of memory


def test_score_says_all():
    a, b = pair()
    s = cknna_score(a, b, k=8, times=50)
    assert s.value == cknna(a, b, 8) and s.low < s.value < s.high and (s.n, s.k) == (150, 8) and s.p == pytest.approx(1/51)
    null = cknna_null(a, b, 8, times=50)
    assert s.null == pytest.approx(null.mean().item(), abs=1e-12) and s.q95 == pytest.approx(null.quantile(.95).item(), abs=1e-12)
    assert s.calibrated == pytest.approx((s.value-s.q95)/(1-s.q95))
    assert cknna_score(knn_graph(a, 20), knn_graph(b, 9), k=8, times=50) == pytest.approx(s)
    wider = cknna_score(a[:40], b[:40], k=8, times=50)
    assert wider.high-wider.low > 1.3*(s.high-s.low)
    biased = cknna_score(a, b, k=8, unbiased=False, times=20)
    assert biased.value == cknna(a, b, 8, unbiased=False)


def test_a_weight_is_a_copy_of_a_row():
    "With full weights on both sides the weighted HSIC is that of the matrix with its rows and columns repeated."
    g = knn_graph(pair(60)[0], 6)
    w = torch.randint(0, 3, (60,), generator=torch.Generator().manual_seed(0)).double()
    K = torch.zeros(60, 60, dtype=torch.float64).scatter_(1, g.idx, g.val)
    i = torch.arange(60).repeat_interleave(w.long())
    P, n = K[i][:, i], 60
    want = ((P*P.T).sum() + P.sum()**2/((n-1)*(n-2)) - 2/(n-2)*(P.sum(0)@P.sum(1)))/(n*(n-3))
    assert align._own(g).hsic(True, w, follow=1.).item() == pytest.approx(want.item(), abs=1e-15)


def test_all_pairs_build_each_graph_once(monkeypatch):
    a, b = pair()
    calls, build = [], neighbours.knn_graph
    monkeypatch.setattr(neighbours, 'knn_graph', lambda *args: (calls.append(1), build(*args))[1])
    t = cknna_pairs({'a': a, 'noise': prepare(normal(150, 5, 9))}, {'a': a, 'b': b, 'g': build(b, 30)}, k=(3, 10), times=20)
    assert len(calls) == 3 and len(t) == 12 and t.where(left='a', right='b')[1]['value'] == cknna(a, b)
    assert t.where(right='b')[0]['value'] == t.where(right='g')[0]['value'] == cknna(a, b, 3)


@pytest.mark.parametrize('dtype', (torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool))
def test_other_types_become_float32(dtype):
    x = (10*normal(40, 6)).clamp(min=0).to(dtype)
    assert prepare(x).dtype == torch.float32 and torch.equal(knn_graph(x, 3).idx, knn_graph(x.float(), 3).idx)
    assert cknna(x, x.float(), 3) == cknna(x.float(), x.float(), 3)
    assert cknna(x.tolist(), x.float().numpy(), 3) == cknna(x.float(), x.float(), 3)


def test_constant_and_zero_rows_have_a_documented_result():
    one = torch.ones(12, 3)
    with pytest.warns(match='all 12 rows are the same'): g = knn_graph(one, 4)
    with pytest.warns(match='all 12 rows are the same'): zero = knn_graph(0*one, 4)
    assert g.idx[0].tolist() == [1, 2, 3, 4] and zero.idx[11].tolist() == [0, 1, 2, 3] and torch.equal(prepare(0*one), 0*one)


def test_prepare_takes_the_order_statistic():
    x = normal(37, 11).double()
    for q in (0., .3, .95, .999):
        v = x.abs().flatten().sort().values[int(q*x.numel())]
        assert torch.allclose(prepare(x, q), F.normalize(x.clamp(-v, v), dim=1), atol=1e-15)


def test_a_clamp_that_erases_all_says_so():
    "More than 95 % of zeros, as in one-hot rows of 21 classes: all was clamped away, and then 'never varied'."
    one = torch.eye(21)[torch.arange(63) % 21]
    with pytest.warns(match='more than 95% of the numbers are 0.*give q=1'): assert not prepare(one).any()
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert torch.equal(prepare(one, 1), one) and prepare(torch.eye(19)).any() and not prepare(0*one).any()


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16])
def test_what_varies_by_rounding_alone_has_no_cka(dtype):
    "Two readings of one constant, .1 and its last bit, had a CKA of up to .77."
    still = lambda s: (.1*(1 + torch.finfo(dtype).eps*(normal(200, 8, s) > 1).double())).to(dtype)
    a, b = still(1), still(2)
    assert (a != a[0]).any()
    for x, y in ((a, b), (a, normal(200, 8)), (normal(200, 8), b)):
        with pytest.warns(match='are the same'): assert np.isnan(cka(x, y))
    with pytest.warns(match='no training feature varies'): assert np.isnan(knn_accuracy(a, torch.arange(200) % 2).value)
    assert cka(normal(200, 8).to(dtype), normal(200, 8).to(dtype)) == pytest.approx(1, abs=1e-6)


def clouds(n, d=20, classes=5, seed=0, apart=.6):
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(classes, (n,), generator=g)
    return torch.randn(classes, d, generator=torch.Generator().manual_seed(9))[y]*apart+torch.randn(n, d, generator=g), y


def test_knn_accuracy_is_sklearn():
    neighbors = pytest.importorskip('sklearn.neighbors')
    (x, y), (u, v) = clouds(300), clouds(200, seed=1)
    ref = neighbors.KNeighborsClassifier(15, metric='cosine').fit(x.double(), y).score(u.double(), v)
    assert knn_accuracy(x, y, u, v, k=15).value == pytest.approx(ref)


def test_linear_probe_agrees_with_sklearn():
    linear = pytest.importorskip('sklearn.linear_model')
    (x, y), (u, v) = clouds(500), clouds(400, seed=1)
    ref = linear.LogisticRegression(C=.05, max_iter=500).fit(x.numpy(), y.numpy()).score(u.numpy(), v.numpy())
    ours = linear_probe(x, y, u, v)
    assert ours.value == pytest.approx(ref, abs=.03)
    assert ours.low < ours.value < ours.high


@pytest.mark.parametrize('form', [torch.Tensor.numpy, lambda x: x, torch.Tensor.tolist], ids=['array', 'tensor', 'list'])
def test_a_single_feature_can_be_probed(form):
    # one feature alone, and beside one that never varies, is the same probe
    sk = pytest.importorskip('sklearn.neighbors')
    (x, y), (u, v) = ((a[:, :1].contiguous(), b) for a, b in (clouds(300), clouds(200, seed=1)))
    wide = lambda a: form(torch.cat([a, torch.full_like(a, 7.)], 1))
    for probe, known, asked in ((linear_probe, y, v), (ridge_probe, 2*x[:, 0]+1, 2*u[:, 0]+1), (knn_accuracy, y, v)):
        assert probe(form(x), known, form(u), asked) == probe(wide(x), known, wide(u), asked)
    ours = knn_accuracy(form(x), y, form(u), v, k=15).value
    assert ours == pytest.approx(sk.KNeighborsClassifier(15, metric='cosine').fit(x.double(), y).score(u.double(), v), abs=.05)
    assert ridge_probe(form(x), 2*x[:, 0]+1, form(u), 2*u[:, 0]+1).value > .99


def test_probes_are_deterministic_and_leave_the_random_state_alone():
    (x, y), (u, v) = clouds(200, d=300, apart=.1), clouds(100, d=300, seed=1, apart=.1)
    torch.manual_seed(3); state = torch.get_rng_state()
    first = linear_probe(x, y, u, v, components=40), ridge_probe(x, y, u, v), knn_accuracy(x, y, u, v)
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(4)
    assert (linear_probe(x, y, u, v, components=40), ridge_probe(x, y, u, v), knn_accuracy(x, y, u, v)) == first
    assert linear_probe(x, y, u, v, seed=1)[1:] != first[0][1:]


def test_wide_and_constant_features():
    (x, y), (u, v) = clouds(200), clouds(150, seed=1)
    pad = lambda t: torch.cat([t, torch.full((len(t), 50), 7.)], 1)
    assert linear_probe(pad(x), y, pad(u), v).value == pytest.approx(linear_probe(x, y, u, v).value, abs=.02)
    turn = torch.linalg.qr(normal(600, 600))[0][:20]          # 20 directions hidden in 600 features, fewer rows than features
    assert linear_probe(x@turn, y, u@turn, v).value == pytest.approx(linear_probe(x, y, u, v).value, abs=.06)


def test_unseen_labels_are_wrong():
    (x, y), (u, v) = clouds(200), clouds(100, seed=1)
    assert linear_probe(x, y, u, v+100).value == knn_accuracy(x, y, u, v+100).value == 0


def test_a_rare_factor_has_an_interval():
    """Resamples without any of three images in which a factor differs have no R^2; they gave ends of 1e14."""
    x, u = normal(300, 6), normal(200, 6, 1)
    rare = lambda v, k: torch.stack([v[:, 0], (torch.arange(len(v)) < k).double()], 1)
    s = ridge_probe(x, rare(x, 5), u, rare(u, 3))
    assert -1 < s.low < s.value < s.high < 1


def test_a_small_temperature_is_the_nearest_neighbour():
    "All weights vanished below about 1/745 of the distance, and the first class won."
    (x, y), (u, v) = clouds(200), clouds(100, seed=1)
    one = knn_accuracy(x, y, u, v, k=1)
    assert knn_accuracy(x, y, u, v, k=9, temperature=1e-6) == knn_accuracy(x, y, u, v, k=9, temperature=1e-300) == one


def test_words_are_classes_however_they_are_kept():
    x, words = normal(60, 4), np.array(['cat', 'dog']*30)
    for y in (words.astype(object), words.tolist(), tuple(words), words.astype(object)[:, None][::-1][::-1], words.astype('S'), [w.encode() for w in words]):
        assert knn_accuracy(x, y, k=3) == knn_accuracy(x, words, k=3)
    assert knn_accuracy(x, ['ä', 'ö']*30, x, np.array(['ä'.encode(), 'ö'.encode()]*30), k=3) == knn_accuracy(x, words, x, words, k=3)     # as in HDF5
    with pytest.raises(UserError, match='different lengths'): knn_accuracy(x, np.array(['cat', 1]*30, object), k=3)



def test_ridge_probe_knows_the_answer():
    x, u, w = normal(400, 12), normal(300, 12, 1), normal(12, 2, 2)
    noise = .5*w.norm(dim=0)
    y, v = x@w+noise*normal(400, 2, 3), u@w+noise*normal(300, 2, 4)
    s = ridge_probe(x, y, u, v)
    assert s.low < 1/(1+.25) < s.high and s.value == pytest.approx(.8, abs=.05)
    each = [ridge_probe(x, y[:, i], u, v[:, i]).value for i in (0, 1)]
    assert s.value == pytest.approx(np.mean(each), abs=1e-3)


@pytest.mark.parametrize('call, says', [
    (lambda a, b: cknna(a, b[:9]), 'same images'), (lambda a, b: cknna(a, b, k=1), 'k = 2'), (lambda a, b: cknna(a, b, k=150), 'between 1 and 149'),
    (lambda a, b: cknna(a/0, b), 'NaN'), (lambda a, b: mutual_knn(b, a/0), 'NaN'), (lambda a, b: prepare(a*torch.inf), 'infinity'),
    (lambda a, b: cka(a/0, b), 'NaN'),
    (lambda a, b: knn_graph(a, 0), 'between 1 and 149'), (lambda a, b: knn_graph(a, -3), 'between 1 and 149'), (lambda a, b: cknna(a[:3], b[:3], 2), '4 rows'),
    (lambda a, b: cka(a[:3], b[:3]), 'at least 4'), (lambda a, b: prepare(a[:0]), 'pool the tokens'), (lambda a, b: prepare(a[:, :0]), 'pool the tokens'),
    (lambda a, b: cknna_null(a, b[:9]), 'same images'),
    (lambda a, b: cknna_score(a, b, k=150), 'between 1 and 149'), (lambda a, b: cknna_score(a, b, times=1), 'at least 20'),
    (lambda a, b: cknna_pairs({'a': a}, {'b': b[:9]}), 'a: 150, b: 9'), (lambda a, b: cknna_pairs({}, {'b': b}), 'nothing to compare'),
    (lambda a, b: cknna(a[None], b[None]), 'pool the tokens'), (lambda a, b: cka(a, b, 'poly'), 'rbf'),
    (lambda a, b: cka(a, b[:9]), 'same images'), (lambda a, b: prepare(a, 2), 'at most 1'),
    (lambda a, b: cknna(knn_graph(a, 3), b), 'larger k'), (lambda a, b: cknna(knn_graph(a), b, unbiased=False), 'loops=True'),
    (lambda a, b: knn_accuracy(a, torch.zeros(150), b, torch.zeros(150)), 'same layer'),
    (lambda a, b: linear_probe(a, torch.zeros(150), a+1, torch.zeros(150)), 'two classes'),
    (lambda a, b: ridge_probe(a, torch.zeros(150), a, torch.zeros(150)), 'never varies'),
    (lambda a, b: linear_probe(a, torch.zeros(10), a, torch.zeros(150)), 'one for each row'),
])
def test_bad_input_is_one_line(call, says):
    with pytest.raises(UserError) as e: call(*pair())
    assert says in str(e.value) and '\n' not in str(e.value)


@golden
def test_leave_one_out_accuracy_is_the_golden_one():
    seen = 0
    for case in PAIRS:
        want, f = EXPECTED[case].get('extras_on_raw_float64', {}), load_file(GOLD/f'{case}.safetensors')
        for key, value in want.items():
            if not (m := re.match(r'knn_top1_(majority|softT0.07)_k(\d+)_([AB])$', key)): continue
            score = knn_accuracy(f[m[3]], f['labels'], k=int(m[2]), temperature=.07 if m[1].startswith('soft') else None)
            assert score.value == pytest.approx(value, abs=1e-12)
            seen += 1
    assert seen == 12


def test_a_probe_of_any_source_is_its_parts():
    from vfmvae.world import World
    from vfmvae.features import extract
    from vfmvae.probes import probe
    from vfmvae.tokenizer import LatentFeatures, tokenizers
    tok, train, test = LatentFeatures(tokenizers['vfmvae-tiny-f8d16']), World(120, seed=7), World(80, seed=8)
    row = probe(tok, train, test, seeds=(0, 1), k=5, batch_size=32)[0]
    a, b = (extract(tok, w, quiet=True)['latent'] for w in (train, test))
    ya, yb = (w.batch(range(len(w)))['label'] for w in (train, test))
    scores = [linear_probe(a, ya, b, yb, s) for s in (0, 1)]
    assert row['linear'] == pytest.approx(sum(s.value for s in scores)/2) and row['knn'] == knn_accuracy(a, ya, b, yb, 5).value and row['layer'] == 'latent'
    assert row['linear_low'] == min(s.low for s in scores) and row['linear_spread'] == pytest.approx(abs(scores[0].value-scores[1].value))
    with pytest.raises(UserError, match='labelled images'): probe(tok, [], test)
    with pytest.raises(UserError, match='at least one seed'): probe(tok, train, test, seeds=())
