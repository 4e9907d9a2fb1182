"""Laws of the diffusability measures: closed forms on data that are made for them, invariances, chance levels, and what is refused. Nets have random
weights; the published divisors of FDr6 belong to weights of the hub, which are not here."""
import itertools, math
from dataclasses import replace
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from vfmvae.core import UserError, to_grid
from vfmvae.dit import DiT, DiTConfig, FAMILIES
from vfmvae.diffusability import (FDR6, compare_diffusability, diffusability, epochs_to, fdr6, interpolation_fd, local_continuity,
                                  local_label_consistency, path_shape, spatial_structure, spectral_energy, viv, _variances)
from vfmvae.evaluate import compare_judges, rfid
from vfmvae.extractors import bundled_extractor, VFMExtractor
from vfmvae.features import extract
from vfmvae.metrics import frechet_features, kid
from vfmvae.samplers import Sampler, sample_latents
from vfmvae.similarity import srss
from vfmvae.statistics import compute_statistics
from vfmvae.tokenizer import LatentFeatures, tokenizers
from vfmvae.vfm import VFM
from vfmvae.world import World

TINY = 'vfmvae-tiny-f8d16'
pytestmark = pytest.mark.filterwarnings('ignore::UserWarning')      # sets are small


def normal(*shape, seed=0): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def kronecker(n, seed=0, c=3, h=3, w=4):
    "Latents whose covariance is a known Kronecker product, each channel of variance 1, and its eigenvalues."
    def correlated(k, s):
        a = normal(k, k, seed=s)
        a = a@a.T + k*torch.eye(k)
        return a/torch.outer(a.diag().sqrt(), a.diag().sqrt())
    channels, places = correlated(c, seed+10), correlated(h*w, seed+20)
    z = torch.linalg.cholesky(channels)@normal(n, c, h*w, seed=seed)@torch.linalg.cholesky(places).T
    return z.view(n, c, h, w), torch.outer(torch.linalg.eigvalsh(channels), torch.linalg.eigvalsh(places)).flatten()


# VIV ----------------------------------------------------------------------------------------------------------------------------------------------------

def test_viv_of_a_known_covariance_is_its_closed_form():
    z, values = kronecker(6000)
    one = torch.zeros(len(z), dtype=torch.long)
    assert values.max() > 3*values.min() and abs(values.mean()-1) < 1e-9        # else white noise would do as well
    assert viv(z, one) == pytest.approx((math.pi/2*values.sqrt().mean()).item(), rel=.01)
    for t in (.2, .5, .9): assert viv(z, one, t) == pytest.approx((values/(t*t+(1-t)**2*values)).mean().item(), rel=.01), t
    assert viv(z, one) < .99*math.pi/2


def test_the_integral_over_levels_is_half_pi_root_lambda():
    z, _ = kronecker(400, 1)
    y = torch.arange(400) % 2
    ts = (torch.arange(300)+.5)/300
    assert sum(viv(z, y, t) for t in ts.tolist())/300 == pytest.approx(viv(z, y), rel=1e-3)


def test_viv_of_white_noise_and_at_both_ends():
    z = normal(3000, 4, 4, 4)
    assert viv(z, [0]*3000) == pytest.approx(math.pi/2, rel=.005)
    assert viv(z, [0]*3000, 0) == pytest.approx(1) and viv(z, [0]*3000, 1) == pytest.approx(1, rel=1e-3)
    assert viv(z, [0]*3000, .5) == pytest.approx(2, rel=.005)


def test_at_the_noise_end_viv_is_the_variance_within_classes():
    y = torch.arange(1000) % 10
    z = .8**.5*normal(10, 4, 4, 4, seed=1)[y] + .2**.5*normal(1000, 4, 4, 4)
    x = (z-z.mean((0, 2, 3), keepdim=True))/z.std((0, 2, 3), correction=0, keepdim=True)
    within = sum(x[y == k].var(0).mean() for k in range(10))/10
    assert viv(z, y, 1) == pytest.approx(within.item(), rel=1e-9) and viv(z, y) < .6*viv(z, [0]*1000)


def test_viv_does_not_depend_on_names_of_classes_order_or_unit():
    z, _ = kronecker(120, 2)
    y, order = torch.arange(120) % 4, torch.randperm(120, generator=torch.Generator().manual_seed(3))
    want = viv(z, y)
    for other in (viv(z, (3-y).tolist()), viv(z, [f'class {k}' for k in y.tolist()]), viv(z, np.array([7, 11, 3, 5])[y.numpy()]),
                  viv(z[order], y[order]), viv(z*torch.tensor([.01, 1, 100]).view(3, 1, 1)-4, y)):
        assert other == pytest.approx(want, rel=1e-9)
    assert viv(z.half(), y.float()) == pytest.approx(want, rel=2e-3)
    assert abs(viv(z, y[order])/want-1) > 1e-3          # the labels do matter


def test_a_class_of_copies_leaves_nothing_to_guess():
    z = normal(2, 3, 2, 2)[torch.arange(20) % 2]
    assert viv(z, torch.arange(20) % 2) == pytest.approx(0, abs=1e-9)


def test_the_fit_has_converged_after_five_rounds_and_not_after_one():
    x = kronecker(12, c=4)[0].flatten(2)
    one, five, many = (_variances(x, r).sqrt().mean().item() for r in (1, 5, 50))
    assert abs(five/many-1) < 2e-4 < 1e-3 < abs(one/many-1)
    assert _variances(x).sum().item() == pytest.approx(x.var(0).sum().item())


def test_viv_of_few_images_is_too_low():
    z, values = kronecker(100, c=4, h=4, w=4)
    found = [viv(z[:n], [0]*n)/(math.pi/2*values.sqrt().mean()).item() for n in (5, 10, 100)]
    assert found[0] < .9 and found[0] < found[1] < found[2] and found[2] == pytest.approx(1, abs=.02)


# SEC ----------------------------------------------------------------------------------------------------------------------------------------------------

def wave(u, v, h=6, w=8):
    one, two = (torch.cos(math.pi*k*(2*torch.arange(n).double()+1)/(2*n)) for k, n in ((u, h), (v, w)))
    return normal(40, 2, 1, 1)*torch.outer(one, two)


@pytest.mark.parametrize('u, v', [(0, 0), (0, 7), (5, 0), (3, 3), (3, 4), (5, 7), (1, 2)])
def test_sec_of_one_mode_is_0_or_1(u, v):
    for rho in (.25, .5): assert spectral_energy(wave(u, v), rho) == pytest.approx(float(u+v > rho*12), abs=1e-9)


def test_sec_of_what_is_constant_within_each_image_is_0(): assert spectral_energy(normal(30, 3, 1, 1).expand(30, 3, 5, 5)) < 1e-12


def test_sec_of_white_noise_counts_modes_and_is_scipys():
    z = normal(600, 3, 6, 8)
    for rho in (.25, .5):
        high = np.add.outer(np.arange(6), np.arange(8)) > rho*12
        assert spectral_energy(z, rho) == pytest.approx(high.mean(), abs=.01)
        x = ((z-z.mean((0, 2, 3), keepdim=True))/z.std((0, 2, 3), correction=0, keepdim=True)).numpy()
        energy = (pytest.importorskip('scipy.fft').dctn(x, axes=(2, 3), norm='ortho')**2).sum((0, 1))
        assert spectral_energy(z, rho) == pytest.approx(energy[high].sum()/energy.sum(), rel=1e-9)
    assert spectral_energy(z, 0) < 1 and spectral_energy(z, 1) == 0


def test_sec_does_not_depend_on_unit_order_or_type():
    z, flat = normal(50, 3, 6, 6), normal(50, 3, 1, 1, seed=1)
    z = z + 3*flat
    want = spectral_energy(z)
    assert want < .2
    for other in (z.flip(0), z*torch.tensor([1, 9., 99]).view(3, 1, 1)+2, z.mT): assert spectral_energy(other) == pytest.approx(want)
    assert spectral_energy(z.half()) == pytest.approx(want, rel=1e-2)


# LNC ----------------------------------------------------------------------------------------------------------------------------------------------------

def test_lnc_of_separated_and_of_random_labels():
    y = torch.arange(300) % 5
    apart = 5*normal(5, 12, 1, 1)[y] + normal(300, 12, 4, 4, seed=1)
    assert local_label_consistency(apart, y, 10) == local_label_consistency(apart, [f'{k}' for k in y.tolist()], 5) == 1
    chance = 59/299
    random = [local_label_consistency(normal(300, 12, 4, 4, seed=s), y) for s in range(4)]
    assert sum(random)/4 == pytest.approx(chance, abs=.02)
    order = torch.randperm(300)
    assert local_label_consistency(apart[order], y[order]) == 1 and local_label_consistency(apart, y[order]) < .5


def test_lnc_is_the_slow_definition_on_the_foreground():
    z, y = normal(30, 4, 3, 3), torch.arange(30) % 3
    mask = normal(30, 3, 3, seed=5) > -1
    x = (z-z.mean((0, 2, 3), keepdim=True))/z.std((0, 2, 3), correction=0, keepdim=True)
    u = F.normalize(torch.stack([x[i][:, mask[i]].mean(1) for i in range(30)]), dim=1)
    slow = np.mean([[float(y[j] == y[i]) for j in sorted(range(30), key=lambda j: -(u[i]@u[j]).item()) if j != i][:4] for i in range(30)])
    assert local_label_consistency(z, y, 4, mask) == pytest.approx(slow) != local_label_consistency(z, y, 4)
    assert local_label_consistency(z, y, 4, mask.float()) == pytest.approx(slow)


# SRSS ----------------------------------------------------------------------------------------------------------------------------------------------------

def placed(n=60, side=8, c=4):
    mask = torch.zeros(n, side, side)
    mask[:, 1:4, 1:4] = 1
    a = normal(n, c, 1, 1)
    a = a/a.norm(dim=1, keepdim=True)
    return a*mask[:, None] - a*(1-mask[:, None]), mask      # unit scale keeps the signs apart


def test_srss_of_a_constructed_map():
    z, mask = placed()
    of = lambda z, mask: spatial_structure(z, mask).where(metric='srss')[0]['value']
    assert of(z, mask) == pytest.approx(2, abs=.05)
    assert abs(of(normal(400, 6, 8, 8), mask[:1].expand(400, 8, 8))) < .02
    assert of(z, 1-mask) == pytest.approx(2, abs=.05) and of(z.flip(3), mask.flip(2)) == pytest.approx(of(z, mask))
    assert [r['metric'] for r in spatial_structure(z)] == ['lds', 'cds', 'rmsc']


@pytest.mark.parametrize('side, far', [(16, 6), (8, 3), (12, 4), (32, 12), (4, 2)])
def test_far_scales_with_the_grid(side, far):
    z, mask = normal(4, 3, side, side), normal(4, side, side, seed=1) > 0
    table = spatial_structure(z, mask)
    x = (z-z.mean((0, 2, 3), keepdim=True))/z.std((0, 2, 3), correction=0, keepdim=True)
    assert table.far == far and torch.equal(table.per_image['srss'], srss(x.flatten(2).mT, mask, (side, side), far=far))


def test_a_grid_need_not_be_square():
    z, mask = normal(5, 3, 4, 9), normal(5, 4, 9, seed=1) > 0
    want, got = spatial_structure(z, mask), spatial_structure(z.mT, mask.mT)
    assert want.grid == (4, 9) and [r['value'] for r in got] == pytest.approx([r['value'] for r in want])
    assert spectral_energy(z.mT) == pytest.approx(spectral_energy(z)) and viv(z.mT, [0]*5) == pytest.approx(viv(z, [0]*5))


# LPC ----------------------------------------------------------------------------------------------------------------------------------------------------

class Decoder:
    name, stride, channels = 'decoder', 1, 3
    def __init__(self, f): self.decode = f


def rms(x, y): return (x-y).square().flatten(1).mean(1).sqrt()


def test_lpc_of_a_constant_decoder_is_0_and_of_a_linear_one_grows_linearly():
    z = normal(20, 3, 4, 4)*torch.tensor([1., 5, .2]).view(3, 1, 1)
    assert local_continuity(Decoder(lambda z: z*0+1), z, rms).lpc == 0
    turn = normal(3, 3, seed=4).float()
    found = local_continuity(Decoder(lambda z: torch.einsum('ij,bjhw->bihw', turn, z)), z, rms, (.1, .5, 1, 2))
    d = found.column('distance')
    for rho, v in zip((.1, .5, 1, 2), d, strict=True): assert v == pytest.approx(d[0]*rho/.1, rel=1e-4) and v > 0
    assert found.lpc == pytest.approx(4*d[0]/.1/(10+2+1+.5), rel=1e-4) and found.n == 20
    curved = local_continuity(Decoder(lambda z: z**3), z, rms).column('distance')
    assert curved[3] > 30*curved[0]


def test_lpc_of_a_decoder_that_copies_is_the_length_of_the_step():
    z = normal(20, 3, 4, 4)
    x = (z-z.mean((0, 2, 3), keepdim=True))/z.std((0, 2, 3), correction=0, keepdim=True)
    found = local_continuity(Decoder(lambda v: v), x, lambda a, b: (a-b).flatten(1).norm(dim=1), (.5,))
    assert found.lpc == pytest.approx(.5*x.flatten(1).norm(dim=1).mean().item(), rel=1e-3)


def test_lpc_does_not_depend_on_batches_and_takes_one_number_a_batch():
    z, f = normal(20, 3, 4, 4), Decoder(lambda z: z.sin())
    want = local_continuity(f, z, rms)
    for size in (7, 20):
        assert local_continuity(f, z, rms, batch_size=size).column('distance') == pytest.approx(want.column('distance'), rel=1e-5)
    assert local_continuity(f, z, lambda a, b: rms(a, b).mean(), batch_size=3).lpc == pytest.approx(want.lpc, rel=1e-5)
    assert local_continuity(f, z, rms, seed=1).lpc != want.lpc and local_continuity(f, z.half(), rms).lpc == pytest.approx(want.lpc, rel=1e-2)
    for number in (float, np.float32, np.asarray):
        assert local_continuity(f, z, lambda a, b, n=number: n(rms(a, b).mean())).lpc == pytest.approx(want.lpc, rel=1e-5)


def test_rounding_is_no_variation():
    "A channel of .1 and its last bit was brought to unit scale, and counted as much as any other."
    z = normal(20, 3, 4, 4)
    for dtype, step in ((torch.float32, 1e-8), (torch.float64, 1e-17), (torch.bfloat16, 3e-4)):
        still = torch.cat([z[:, :1], .1 + step*z[:, 1:]], 1).to(dtype)
        assert (still[:, 1:] != still[0, 1, 0, 0]).any() or dtype == torch.float64
        with pytest.raises(UserError, match='never varies'): spectral_energy(still)
    assert spectral_energy(torch.cat([z[:, :1], .1 + 1e-4*z[:, 1:]], 1).float()) == pytest.approx(spectral_energy(z), rel=1e-2)


# paths --------------------------------------------------------------------------------------------------------------------------------------------------

def test_a_straight_line_is_straight_and_efficient_at_any_speed():
    a, b = normal(5, 3, 2, 2), normal(5, 3, 2, 2, seed=1)
    for grid in (torch.linspace(0, 1, 5), torch.tensor([0, .1, .7, 1])):
        states = torch.stack([a + s*(b-a) for s in grid.tolist()])
        for given in (states, [*states], states.float()):
            assert path_shape(given) == pytest.approx(dict(straightness=1, efficiency=1), abs=1e-5)
    assert path_shape([a, b, a]) == pytest.approx(dict(straightness=-1, efficiency=0), abs=1e-9)
    pause = path_shape([a, a, (a+b)/2, b, b])                     # it was a right angle: 1/3
    assert pause == pytest.approx(dict(straightness=1, efficiency=1), abs=1e-9)
    alone = path_shape([torch.cat([a, a]), torch.cat([b, a]), torch.cat([2*b-a, b])])       # of one path two steps, of the other one
    assert alone['straightness'] == pytest.approx(1) and math.isnan(path_shape([a, b, b])['straightness'])


def test_a_circle_has_its_own_numbers_and_rotation_changes_none():
    angle = torch.linspace(0, math.pi, 13, dtype=torch.float64)
    arc = torch.stack([angle.cos(), angle.sin()], 1)[:, None]
    want = dict(straightness=math.cos(math.pi/12), efficiency=1/(12*math.sin(math.pi/24)))
    turn = torch.linalg.qr(normal(2, 2))[0]
    for states in (arc, arc@turn, 7*arc+3, arc.flip(0)): assert path_shape(states) == pytest.approx(want)


def test_states_of_a_net_are_taken_as_they_come():
    torch.manual_seed(0)
    net = DiT(DiTConfig(**FAMILIES['sit'] | dict(in_channels=4, num_classes=3, patch_size=2, hidden_size=32, depth=1, num_heads=2))).eval()
    for p in net.parameters():
        if not p.any(): torch.nn.init.normal_(p, std=.2)
    found = path_shape(sample_latents(net, [0, 1], (4, 4, 4), sampler=Sampler(6), states=True))
    assert 0 < found['efficiency'] < 1 and found['straightness'] < 1


# FD of interpolations -----------------------------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def seen():
    data, eyes, net = World(96, seed=6), bundled_extractor(), tokenizers[TINY]
    z = to_grid(extract(LatentFeatures(net), data, pool='none', quiet=True)['latent'])
    return data, eyes, net, z, compute_statistics(data, eyes, name='World')


def test_interpolations_start_at_the_reconstructions_and_end_at_their_neighbours(seen):
    data, eyes, net, z, known = seen
    here = interpolation_fd(net, z, eyes, known, 0)
    assert here.value == pytest.approx(rfid(net, data, eyes, pr_n=0).value, rel=1e-4)
    x = ((z-z.mean((0, 2, 3), keepdim=True))/z.std((0, 2, 3), correction=0, keepdim=True)).flatten(1).double()
    to = z[(torch.cdist(x, x) + 1e9*torch.eye(len(x))).argmin(1)]
    assert interpolation_fd(net, z, eyes, known, 1).value == pytest.approx(interpolation_fd(net, to, eyes, known, 0).value, rel=1e-4)
    half = interpolation_fd(net, z, eyes, known)
    assert half.value > 2*here.value and (half.kind, half.subject, half.n, half.vfm) == ('iFD', TINY, 96, 'tiny') and '0.5 of the way' in half.latent
    with pytest.raises(UserError, match='one kind'): compare_judges([half, replace(here, extractor='b', kind='rFID')])


def test_a_relative_judges_no_interpolation(seen):
    _, _, net, z, known = seen
    with pytest.raises(UserError, match='cannot judge'): interpolation_fd(net, z, VFMExtractor(VFM('tiny')), known)
    mine = Decoder(net.decode)
    mine.vfm = net.vfm                  # which says nothing of it in its name
    with pytest.raises(UserError, match='cannot judge decoder'): interpolation_fd(mine, z, VFMExtractor(VFM('tiny')), known)


# distances ----------------------------------------------------------------------------------------------------------------------------------------------

def test_distances_do_not_depend_on_order_or_rotation_and_are_0_for_equal_sets():
    a, b, turn = normal(200, 6), 1.5*normal(150, 6, seed=1)+.5, torch.linalg.qr(normal(6, 6, seed=2))[0]
    for far in (frechet_features, kid):
        assert far(a@turn, b@turn) == pytest.approx(far(a, b), rel=1e-8) and far(a.flip(0), b) == pytest.approx(far(a, b), rel=1e-8)
        assert far(a, b) == pytest.approx(far(b, a), rel=1e-8) and far(a, b) > .5
    assert frechet_features(a, a) == pytest.approx(0, abs=1e-9)


def test_kid_is_torchmetrics_and_torch_fidelitys():
    a, b = normal(80, 16), normal(80, 16, seed=1)*1.3+.2
    from torchmetrics.image.kid import poly_mmd
    assert kid(a, b) == pytest.approx(poly_mmd(a, b, degree=3, coef=1.).item(), rel=1e-9)
    fidelity = pytest.importorskip('torch_fidelity.metric_kid', reason='the [eval] extra is not installed')
    got = fidelity.kid_features_to_metric(a, b, kid_subsets=1, kid_subset_size=80, kid_kernel='poly', verbose=False)   # of one subset: all rows
    assert kid(a, b) == pytest.approx(got[fidelity.KEY_METRIC_KID_MEAN], rel=1e-9)


def test_kid_is_the_slow_definition_for_unequal_counts_and_has_no_bias():
    a, b = normal(7, 3), normal(5, 3, seed=1)
    k = lambda x, y: (x@y/3+1)**3
    within = lambda p: np.mean([k(x, y).item() for i, x in enumerate(p) for j, y in enumerate(p) if i != j])
    slow = within(a)+within(b)-2*np.mean([k(x, y).item() for x, y in itertools.product(a, b)])
    assert kid(a, b) == pytest.approx(slow)
    many = torch.tensor([kid(normal(12, 4, seed=s), normal(12, 4, seed=1000+s)) for s in range(600)])
    assert abs(many.mean()) < 3*many.std()/600**.5 and (many < 0).any()


SMALL = dict(depth=1, embed_dim=48, num_heads=4)


@pytest.fixture(scope='module')
def six():
    "The six architectures, small and with random weights."
    torch.manual_seed(0)
    vit = {k: VFMExtractor(VFM(of, False, **SMALL), size) for k, (of, size, _) in FDR6.items() if size and k != 'convnextv2-b'}
    of, size, _ = FDR6['convnextv2-b']
    return {'inception': bundled_extractor(), 'convnextv2-b': VFMExtractor(VFM(of, False, depths=(1, 1, 1, 1), dims=(8, 16, 24, 32)), size), **vit}


def test_fdr6_is_the_mean_of_six_ratios(six):
    a, b = World(10, seed=1).batch(range(10))['image'], World(10, seed=2).batch(range(10))['image']
    table = fdr6(a, b, six, batch_size=5, subject='a')
    assert table.column('extractor') == list(FDR6) and table.column('own') == [1.68, 56.87, 14.19, .04, .6, 5.6]
    for row in table:
        direct = frechet_features(*(six[row['extractor']](x)['features'] for x in (a, b)))
        assert row['fd'] == pytest.approx(direct, rel=1e-3) and row['ratio'] == row['fd']/row['own']
    assert table.fdr6 == pytest.approx(np.mean(table.column('ratio'))) and table.records['mae-l'].subject == 'a'
    known = {k: compute_statistics(b, e) for k, e in six.items()}
    assert fdr6(a, known, six, batch_size=5).fdr6 == pytest.approx(table.fdr6, rel=1e-4)
    assert max(fdr6(b, known, six).column('fd')) < 1e-3*max(table.column('fd'))
    with pytest.raises(UserError, match='no reference named .*clip-l'): fdr6(a, {k: v for k, v in known.items() if k != 'clip-l'}, six)


def test_an_extractor_sees_the_whole_patches_of_a_size_that_its_patches_do_not_divide(six):
    judge, x = six['dinov2-l'], World(2, seed=1, size=256).batch(range(2))['image']
    assert judge.preprocessing.count('the first 252 px') == 1 and 'the first' not in six['mae-l'].preprocessing
    torch.testing.assert_close(judge(x)['features'], judge.vfm.with_class(x[..., :252, :252].clamp(-1, 1))[0])


def test_the_table_names_weights_that_timm_knows():
    import timm
    assert all(timm.is_model_pretrained(of) for of, size, _ in FDR6.values() if size)


# logs ---------------------------------------------------------------------------------------------------------------------------------------------------

def test_epochs_to_a_level():
    log = [dict(images=1000*i, gfid=64/2**i) for i in range(1, 6)]
    assert epochs_to(log, 16) == pytest.approx(2000) and epochs_to(log, 5) == pytest.approx(1000*math.log2(64/5))       # an exponential is met exactly
    assert epochs_to(log, 5, 500) == pytest.approx(2*math.log2(64/5)) and epochs_to(log[::-1], 5) == epochs_to(log, 5)
    assert epochs_to(log, 1) is None and epochs_to(log, 100) == 1000
    up = [dict(images=i, gfid=v) for i, v in ((1, 9.), (2, 3.), (3, 5.), (4, 1.))]
    assert 1 < epochs_to(up, 4) < 2 and 3 < epochs_to(up, 2) < 4
    noise = [dict(images=1, gfid=.5, guidance=2.), dict(images=2, gfid=math.nan), dict(images=3, loss=1.), dict(images=4, gfid=None)]
    assert epochs_to(log+noise, 16) == pytest.approx(2000)
    record = [dict(images=5, gfid=1., guidance=dict(guidance=s)) for s in (1., 2.)]         # as `evaluate.Record` says it
    assert epochs_to(record[:1], 2) == 5
    with pytest.raises(UserError, match='unguided'): epochs_to(record[1:], 2)
    for rows in (noise, []):
        with pytest.raises(UserError, match='unguided'): epochs_to(rows, 2)


def test_a_log_may_be_a_table_of_text():
    "Rows of csv.DictReader were a TypeError, rows without images a KeyError, and the NaN of pandas counted as guidance."
    log = [dict(images=1000*i, gfid=64/2**i) for i in range(1, 6)]
    want, nan = epochs_to(log, 5), float('nan')
    text = [{k: str(v) for k, v in r.items()} | dict(guidance=g) for r, g in zip(log, ('', '1', '1.0', None, nan), strict=True)]
    odd = [dict(gfid=.5), dict(images='', gfid='.5'), dict(images='2', gfid=''), dict(images=2, gfid='none'), dict(images=2, gfid='.5', guidance='1.5'),
           dict(images=2, gfid=.5, guidance="{'guidance': 1.5}"), dict(images=2, gfid=math.inf), dict(images=nan, gfid=.5)]
    assert epochs_to(text, 5) == epochs_to(text+odd, 5) == epochs_to(log+odd, 5) == want
    with pytest.raises(UserError, match='unguided'): epochs_to(odd, 5)


# the row ------------------------------------------------------------------------------------------------------------------------------------------------

def test_a_row_holds_what_each_measure_says(seen):
    data, _, net, z, _ = seen
    y, mask = data.factors(range(96))['label'], normal(96, 8, 8) > 0
    kept = torch.isin(y, (y.bincount() > 1).nonzero()[:, 0])
    z, y, mask = z[kept], y[kept], mask[kept]
    table = diffusability(z, labels=y, mask=mask, k=5, name='a')
    row = table[0]
    assert (row['viv'], row['lnc']) == (viv(z, y), local_label_consistency(z, y, 5, mask))
    assert (row['sec_25'], row['sec_50']) == (spectral_energy(z, .25), spectral_energy(z))
    assert all(row[r['metric']] == r['value'] for r in spatial_structure(z, mask)) and 'srss' in row
    assert table.facts == dict(shape=(16, 8, 8), n=len(z), k=5, classes=len(y.unique()))
    assert {*diffusability(z)[0]} == {'name', 'sec_25', 'sec_50', 'lds', 'cds', 'rmsc'}


def test_a_tokenizer_and_its_latents_give_one_row(seen):
    data, _, net, z, _ = seen
    a, b = diffusability(net, data), diffusability(z, name=TINY)
    assert a == b and a.facts == b.facts and diffusability(TINY, data, n=20).n == 20
    assert [r['name'] for r in compare_diffusability([a, b])] == [TINY, TINY]


@pytest.mark.parametrize('height, width', [(32, 128), (64, 32)])
def test_oblong_pictures_have_oblong_latents(seen, height, width):
    "64 tokens of 4 x 16 places were read as 8 x 8."
    net, x = seen[2], World(12, size=128).batch(range(12))['image'][:, :, :height, :width]
    table = diffusability(net, x)
    assert table.shape == (16, height//8, width//8) and table == diffusability(net.encode(x).mode().detach(), name=net.name)
    with pytest.raises(UserError, match='unequal size'): diffusability(net, [*x, x[0].mT])



def test_rows_of_other_shapes_or_counts_are_refused_in_one_line():
    rows = [diffusability(normal(20, c, 8, 8), name=f'd{c}') for c in (2, 3)]
    with pytest.raises(UserError, match='within one shape only') as e: compare_diffusability(rows)
    assert 'd3' in str(e.value) and '(3, 8, 8)' in str(e.value) and '\n' not in str(e.value)
    for other in (diffusability(normal(21, 2, 8, 8)), diffusability(normal(20, 2, 8, 8), labels=[0, 1]*10)):
        with pytest.raises(UserError, match='as many images'): compare_diffusability([rows[0], other])
    assert compare_diffusability([]) == []


# what is refused ----------------------------------------------------------------------------------------------------------------------------------------

Z, Y = normal(12, 3, 6, 6), [0, 1, 2]*4


@pytest.mark.parametrize('call, why', [
    (lambda: viv(Z, None), 'no labels'), (lambda: local_label_consistency(Z, None), 'no labels'),
    (lambda: viv(Z, range(12)), 'class 0 has one image'), (lambda: viv(Z, ['cat']*11+['dog']), 'class dog has one image'),
    (lambda: viv(Z, Y[:-1]), '12 rows with 11 labels'), (lambda: viv(Z, torch.tensor(Y)+.5), 'which is no class'),
    (lambda: viv(Z, [[0, 1]]*12), r'labels of shape \(12, 2\)'), (lambda: viv(Z, Y, 1.5), 't: 1.5'),
    (lambda: viv(Z[0], Y), r'\(n,c,h,w\)'), (lambda: viv(Z[:1], [0]), 'n >= 2'), (lambda: viv(Z.flatten(2), Y), r'\(n,c,h,w\)'),
    (lambda: spectral_energy(Z*torch.nan), 'NaN'), (lambda: spectral_energy(torch.where(Z > 2, torch.inf, Z)), 'infinity'),
    (lambda: spectral_energy(Z*0+1), 'never varies'), (lambda: spectral_energy(Z, -1), 'rho'), (lambda: spectral_energy('abc'), 'latents must be'),
    (lambda: local_label_consistency(Z, Y, 12), 'choose k'), (lambda: local_label_consistency(Z, Y, 3, torch.ones(12, 6, 5)), r'give \(n,h,w\)'),
    (lambda: local_label_consistency(Z, Y, 3, torch.ones(12, 1, 6, 6)), r'give \(n,h,w\)'),
    (lambda: local_label_consistency(Z, Y, 3, torch.zeros(12, 6, 6)), 'some foreground in each image'),
    (lambda: spatial_structure(Z, torch.ones(12, 5, 6)), 'masks of shape'), (lambda: spatial_structure(Z[..., :1, :1]), 'apart'),
    (lambda: local_continuity(Decoder(lambda z: z), Z, rms, ()), 'no rho'), (lambda: local_continuity(Decoder(lambda z: z), Z, rms, (0,)), 'rho'),
    (lambda: local_continuity(Decoder(lambda z: z*torch.nan), Z, rms), 'NaN'),
    (lambda: local_continuity(Decoder(lambda z: z), Z, rms, batch_size=0), 'batch_size'),
    (lambda: path_shape(Z[:2]), 'two steps'), (lambda: path_shape([Z, Z, Z]), 'does not move'), (lambda: path_shape([Z, Z[:3], Z]), 'different lengths'),
    (lambda: diffusability(TINY), 'no images'), (lambda: diffusability(normal(5, 3, 6, 6), labels=[0, 1]), '5 rows with 2 labels'),
    (lambda: kid(Z[:, 0, 0], Z[:, 0, 0, :3]), 'same feature extractor'), (lambda: epochs_to([dict(images=1, gfid=2.)], 0), 'level')])
def test_bad_input_is_one_line(call, why):
    with pytest.raises(UserError, match=why) as e: call()
    assert '\n' not in str(e.value)


def test_lists_arrays_and_short_floats_are_taken():
    want = viv(Z, Y)
    for z, y in ((Z.numpy(), np.array(Y)), (Z.tolist(), Y), (Z.float(), torch.tensor(Y)), (Z.bfloat16(), [str(k) for k in Y])):
        assert viv(z, y) == pytest.approx(want, rel=2e-2) and np.isfinite(local_label_consistency(z, y, 3)) and 0 < spectral_energy(z) < 1
    assert path_shape([Z.half(), Z.half()+1, Z.half()+2])['efficiency'] == pytest.approx(1, abs=1e-3)
