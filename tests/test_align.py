"CKNNA, CKA, mutual kNN against the published numbers; laws; probes against other implementations."
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from vfmvae import align
from vfmvae.align import cka, cknna, cknna_null, cknna_parts, knn_accuracy, knn_graph, linear_probe, mutual_knn, prepare, ridge_probe
from vfmvae.core import UserError

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
    monkeypatch.setattr(align, '_blocks', lambda n, width: (slice(i, min(n, i+7)) for i in range(0, n, 7)))
    assert torch.equal(knn_graph(x, 9).idx, whole.idx) and cka(x, x[:, :3], 'rbf') == pytest.approx(c, abs=1e-12)


def test_twins_keep_the_index_order():
    x = prepare(normal(40, 13).repeat(3, 1))
    g = knn_graph(x, 2)
    assert g.idx[:40].tolist() == [[i+40, i+80] for i in range(40)] and g.idx[80:].tolist() == [[i, i+40] for i in range(40)]


def test_null_is_a_shuffle_of_rows():
    a, b = pair()
    orders, g = [], torch.Generator().manual_seed(5)
    for _ in range(4): orders.append(torch.randperm(150, generator=g))
    assert cknna_null(a, b, times=4, seed=5).tolist() == pytest.approx([cknna(a, b[o]) for o in orders], abs=1e-9)
    assert cknna(a, b) > cknna_null(a, b, times=50).max()


def test_prepare_takes_the_order_statistic():
    x = normal(37, 11).double()
    for q in (0., .3, .95, .999):
        v = x.abs().flatten().sort().values[int(q*x.numel())]
        assert torch.allclose(prepare(x, q), F.normalize(x.clamp(-v, v), dim=1), atol=1e-15)


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
    (lambda a, b: cknna(a/0, b), 'NaN'), (lambda a, b: cknna(a[None], b[None]), 'pool the tokens'), (lambda a, b: cka(a, b, 'poly'), 'rbf'),
    (lambda a, b: cka(a, b[:9]), 'same images'), (lambda a, b: prepare(a, 2), 'between 0 and 1'),
    (lambda a, b: cknna(knn_graph(a, 3), b), 'larger k'), (lambda a, b: cknna(knn_graph(a), b, unbiased=False), 'loops=True'),
    (lambda a, b: knn_accuracy(a, torch.zeros(150), b, torch.zeros(150)), 'same layer'),
    (lambda a, b: linear_probe(a, torch.zeros(150), a, torch.zeros(150)), 'two classes'),
    (lambda a, b: ridge_probe(a, torch.zeros(150), a, torch.zeros(150)), 'never varies'),
    (lambda a, b: linear_probe(a, torch.zeros(10), a, torch.zeros(150)), 'one for each row'),
])
def test_bad_input_is_one_line(call, says):
    with pytest.raises(UserError) as e: call(*pair())
    assert says in str(e.value) and '\n' not in str(e.value)
