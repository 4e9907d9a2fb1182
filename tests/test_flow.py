"Flow: laws of paths, noise levels, losses, samplers, seeds and guidance; nothing here needs a net that was trained."
import math, sys
from dataclasses import replace
from functools import partial

import pytest
import torch
from scipy.special import logit
from scipy.stats import kstest, truncnorm

from vfmvae.core import Gaussian, UserError
from vfmvae.dit import DiT, DiTConfig, NetFeatures
from vfmvae.flow_task import FlowConfig
from vfmvae.presets import FLOW_PRESETS
from vfmvae.flow import (coefficients, convert, cosine_loss, dimension_shift, DiTOutput, flow_loss, FLOW_WEIGHTS,
                         FlowTargets, half_diffusion, interpolate, PATHS, prediction_error, PREDICTIONS, repa_loss,
                         sample_t, shift_t, t_interval, TIME_DISTRIBUTIONS)
from vfmvae.samplers import (classifier_free, diffusion, DIFFUSION_COEFFICIENTS, guide, ImageNoise, internal_guidance,
                             methods, ODES, pack_state, sample, sample_latents, Sampler, SDES, time_grid, trajectory, unpack_state,
                             velocity_field)

MU, S = torch.tensor([-1.5, .4, 2.], dtype=torch.float64), torch.tensor([.3, 1.4, .7], dtype=torch.float64)   # data: N(MU, S^2), coordinate by coordinate


def gen(seed=0): return torch.Generator().manual_seed(seed)
def normal(*shape, seed=0): return torch.randn(*shape, generator=gen(seed), dtype=torch.float64)


def gaussian(z, t, path='linear', mu=MU, s=S):
    "The exact velocity field of that Gaussian."
    c = coefficients(t, path)
    return c.d_alpha*mu + (c.alpha*c.d_alpha*s**2 + c.sigma*c.d_sigma)/(c.alpha**2*s**2 + c.sigma**2)*(z-c.alpha*mu)


def carried(z, path, t0, t1):
    "Where the exact field carries z from t0 to t1: the same number of standard deviations from the mean."
    a, b = coefficients(t0, path), coefficients(t1, path)
    return b.alpha*MU + (b.alpha**2*S**2 + b.sigma**2).sqrt()*(z-a.alpha*MU)/(a.alpha**2*S**2 + a.sigma**2).sqrt()


def slope(errors, factor=2.):
    "Order of convergence: how steeply the error falls when the steps are `factor` times as many."
    return math.log(errors[-2]/errors[-1], factor)


# paths and predictions ---------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('path', PATHS)
@pytest.mark.parametrize('source', PREDICTIONS)
@pytest.mark.parametrize('to', PREDICTIONS)
def test_predictions_convert_both_ways(path, source, to):
    z, noise, t = normal(40, 3, 2, 2), normal(40, 3, 2, 2, seed=1), torch.linspace(.02, .98, 40, dtype=torch.float64)
    z_t, v = interpolate(z, noise, t, path)
    truth = dict(velocity=v, data=z, noise=noise, score=-noise/coefficients(t, path).sigma.view(-1, 1, 1, 1))
    assert torch.allclose(convert(truth[source], z_t, t, source, to, path), truth[to], rtol=1e-10, atol=1e-10)
    there = convert(truth[source], z_t, t, source, to, path)
    assert torch.allclose(convert(there, z_t, t, to, source, path), truth[source], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize('path', ('linear', 'gvp'))
@pytest.mark.parametrize('t', (0., 1.))
def test_a_velocity_is_safe_at_both_ends(path, t):
    z, noise = normal(5, 3), normal(5, 3, seed=1)
    z_t, v = interpolate(z, noise, t, path)
    for to, want in (('data', z), ('noise', noise)): assert torch.allclose(convert(v, z_t, t, 'velocity', to, path), want, atol=1e-12)
    if t == 1: assert torch.allclose(convert(v, z_t, t, 'velocity', 'score', path), -noise, atol=1e-12)


@pytest.mark.parametrize('path', PATHS)
def test_velocity_is_score_and_drift(path):
    t, z, score = torch.linspace(.05, .95, 19, dtype=torch.float64), normal(19, 4), normal(19, 4, seed=1)
    c = coefficients(t, path)
    want = (c.d_alpha/c.alpha)[:, None]*z - half_diffusion(t, path)[:, None]*score
    assert torch.allclose(convert(score, z, t, 'score', 'velocity', path), want, rtol=1e-10)


def test_half_precision_is_left_at_once():
    z, noise = normal(4, 3, 2, 2).bfloat16(), normal(4, 3, 2, 2, seed=1).bfloat16()
    z_t, v = interpolate(z, noise, torch.full((4,), .37))
    assert z_t.dtype == v.dtype == torch.float32 and torch.equal(v, noise.float()-z.float())


@pytest.mark.parametrize('bad', (-.1, 1.0001, math.nan, torch.tensor([.1, .2, 7., .3])))
def test_t_is_between_0_and_1(bad):
    z = normal(4, 3)
    for f in (lambda: interpolate(z, z, bad), lambda: convert(z, z, bad, 'velocity', 'score'), lambda: shift_t(bad, 2.), lambda: diffusion(bad),
              lambda: coefficients(bad)):
        with pytest.raises(UserError, match='between 0 .data. and 1 .noise.'): f()


@pytest.mark.parametrize('call, message', [
    (lambda z: interpolate(z, z[:2], .5), 'must be equal'), (lambda z: interpolate(z, z, torch.rand(3)), 'batch of 4'),
    (lambda z: interpolate(z, z, torch.rand(4, 1)), 'batch of 4'), (lambda z: interpolate(z, z, .5, 'cosine'), 'known: linear, gvp, vp'),
    (lambda z: convert(z, z[:, :2], .5, 'noise', 'data'), 'must be equal'), (lambda z: convert(z, z, .5, 'eps', 'data'), "no prediction named 'eps'"),
    (lambda z: t_interval('linear', 'velocty'), 'nearest: velocity'), (lambda z: diffusion(.5, 'sbmd'), 'nearest: sbdm')])
def test_bad_input_of_paths(call, message):
    with pytest.raises(UserError, match=message): call(normal(4, 3))


# noise levels -------------------------------------------------------------------------------------------------------------------------------------

def cdf(t, law, mean, std):
    x = dict(logit_normal=lambda: torch.logit(t), truncated_logit_normal=lambda: torch.logit(t), cosine_lognormal=lambda: torch.tan(t*math.pi/2).log())
    return t if law == 'uniform' else torch.special.ndtr((x[law]()-mean)/std)


@pytest.mark.parametrize('law', TIME_DISTRIBUTIONS)
@pytest.mark.parametrize('mean, std, shift, interval', [(0., 1., 1., None), (.8, .8, 1., None), (0., 1., 6.93, None), (-.5, 2., .5, (.1, .9))])
def test_time_laws(law, mean, std, shift, interval):
    # Kolmogorov and Smirnov against the law's own distribution function: 1.95/sqrt(n) is the 0.1 % level
    n = 20_000
    t = sample_t(n, law, gen(), mean=mean, std=std, shift=shift, interval=interval).double()
    low, high = interval or (0., .999 if 'truncated' in law else 1.)
    assert t.shape == (n,) and shift_t(low, shift)-1e-6 <= t.min() and t.max() <= shift_t(high, shift)+1e-6
    f = cdf(shift_t(t.clamp(0, 1), 1/shift).sort().values, law, mean, std)
    a, b = cdf(torch.tensor([low, high], dtype=torch.float64), law, mean, std)
    f = (f-a)/(b-a)
    assert (f-(torch.arange(n)+.5)/n).abs().max() < 1.95/math.sqrt(n)


@pytest.mark.parametrize('mean, std, interval', [(0., 1., (0., 1.)), (.8, .8, (.1, .9)), (-7., 1., (.5, 1.)), (-20., 1., (.5, 1.)), (20., 1., (0., .5)),
                                                 (3., .3, (0., .001))])
def test_a_law_far_from_its_interval_is_scipys_truncated_normal(mean, std, interval):
    n, (a, b) = 20_000, [(logit(t)-mean)/std for t in interval]
    t = sample_t(n, 'logit_normal', gen(), mean=mean, std=std, interval=interval).double().numpy()
    assert kstest(logit(t), truncnorm(a, b, mean, std).cdf).statistic < 1.95/math.sqrt(n)
    with pytest.raises(UserError, match='no share'): sample_t(4, 'logit_normal', mean=50., std=.1, interval=(0., .5))


def test_noise_levels_follow_the_generator_and_stay_off_forbidden_ends():
    assert torch.equal(sample_t(5, 'logit_normal', gen(3)), sample_t(5, 'logit_normal', gen(3)))
    assert sample_t(5, generator=gen(3)).dtype == torch.float32
    assert t_interval() == (0, 1) and t_interval('gvp', 'noise') == (1e-3, .999)
    assert t_interval('vp') == (1e-5, 1) and t_interval('vp', sampling=True) == (1e-3, 1)
    t = flow_loss(lambda z, t, y: z, torch.zeros(5000, 1), torch.zeros(5000), predict='noise', generator=gen())['t']
    assert 1e-3 <= t.min() and t.max() <= .999


def test_shifts():
    t = torch.linspace(0, 1, 50, dtype=torch.float64)
    assert torch.allclose(1-shift_t(t, 1/.3), shift_t(1-t, .3), atol=1e-14) and torch.equal(shift_t(t, 1.), t)
    assert abs(dimension_shift((768, 16, 16))-6.9282) < 1e-4 and abs(dimension_shift((1024, 16, 16))-8) < 1e-12 and dimension_shift((4, 4, 4)) == 1.


@pytest.mark.parametrize('call, message', [
    (lambda: sample_t(4, 'lognormal'), 'nearest: logit_normal'), (lambda: sample_t(0), 'n > 0'), (lambda: sample_t(4, std=0.), 'std > 0'),
    (lambda: sample_t(4, interval=(.5, .5)), 'low < high'), (lambda: sample_t(4, interval=(0, 1000)), 'low < high'), (lambda: shift_t(.5, -1.), 'positive'),
    (lambda: time_grid(0), 'at least 1'), (lambda: time_grid(5, interval=(1., 0.)), 'low < last step < high'),
    (lambda: time_grid(5, last_step=1.), 'low < last step')])
def test_bad_input_of_noise_levels(call, message):
    with pytest.raises(UserError, match=message): call()


# losses -------------------------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('path', PATHS)
@pytest.mark.parametrize('predict', PREDICTIONS)
def test_who_is_right_has_no_loss(path, predict):
    z, noise, y = normal(8, 3, 2, 2), normal(8, 3, 2, 2, seed=1), torch.zeros(8)
    def net(z_t, t, y): return convert(noise, z_t, t, 'noise', predict, path) if predict != 'data' else z
    out = flow_loss(net, z, y, dict(flow=1., cosine=1.), noise=noise, path=path, predict=predict, generator=gen())
    assert out['flow'] < 1e-16 and out['cosine'] < 1e-9 and out['loss'] == out['flow']+out['cosine']


def test_terms_are_unweighted_and_only_what_has_a_weight_is_computed():
    z, y, cls, h = normal(6, 4, 2, 2).float(), torch.zeros(6), normal(6, 5).float(), normal(6, 9, 7).float()
    def net(z_t, t, y, cls=None): return DiTOutput(torch.zeros_like(z_t), cls if cls is None else torch.zeros_like(cls), projections=(h+1, h))
    w = dict(flow=1., cosine=.1, repa=.5, cls=.03)
    out = flow_loss(net, z, y, w, targets=FlowTargets(cls, tokens=[h, h]), generator=gen())
    assert set(out) == {*w, 'loss', 't', 'per_sample'}
    assert torch.allclose(out['loss'], sum(w[k]*out[k] for k in w)) and torch.allclose(out['per_sample'].mean(), out['flow'])
    assert torch.allclose(out['repa'], (repa_loss([h+1], [h])+repa_loss([h], [h]))/2)
    less = flow_loss(net, z, y, dict(flow=2.), targets=FlowTargets(tokens=[h, h]), generator=gen())
    assert set(less) == {'flow', 'loss', 't', 'per_sample'} and less['loss'] == 2*less['flow']
    assert torch.equal(less['flow'], out['flow'])   # the class token draws its noise last, so the rest stays


def test_a_class_token_is_compared_row_by_row_on_any_path():
    # a published loss broadcasts the target of the curved path to (b,1,b,d)
    z, cls, noise, cls_noise, t = normal(5, 2, 2, 2), normal(5, 6, seed=1), normal(5, 2, 2, 2, seed=2), normal(5, 6, seed=3), torch.linspace(.1, .9, 5).double()
    for path in ('linear', 'gvp'):
        want = interpolate(cls, cls_noise, t, path)[1]
        def net(z_t, t, y, c, want=want): return z_t, want+2
        out = flow_loss(net, z, torch.zeros(5), dict(cls=1.), t=t, noise=noise, targets=FlowTargets(cls, cls_noise), path=path)
        assert abs(out['cls']-4) < 1e-12


def test_cosines_survive_half_precision():
    big = (normal(2, 5, 64)*400).half()      # its square sum overflows float16
    assert abs(repa_loss([big], [big])+1) < 1e-3
    with torch.autocast('cpu', torch.bfloat16): assert abs(cosine_loss(big.float(), 2*big.float())).max() < 1e-6
    v = torch.zeros(2, 3, 2, 2, requires_grad=True)   # a net at its first step says zero
    cosine_loss(v, normal(2, 3, 2, 2).float()).sum().backward()
    assert v.grad.isfinite().all()


@pytest.mark.parametrize('kw, message', [
    (dict(weights=dict(floww=1.)), 'nearest: flow'), (dict(weights={}), 'at least one of'), (dict(weights=FLOW_WEIGHTS['reg']), 'give both or none'),
    (dict(targets=FlowTargets(torch.zeros(4, 2))), 'give both or none'),
    (dict(weights=FLOW_WEIGHTS['repa']), 'needs FlowTargets.tokens'),
    (dict(weights=dict(cls=1.), targets=FlowTargets(torch.zeros(4, 2))), "no output for the weight 'cls'"),
    (dict(weights=dict(repa=1.), targets=FlowTargets(tokens=[torch.zeros(4, 2, 3)])), "no output for the weight 'repa'"),

    (dict(y=torch.zeros(3)), '3 conditions for 4'), (dict(law='logit'), 'nearest: logit_normal'), (dict(noise=torch.zeros(4, 3)), 'must be equal'),
    (dict(t=torch.full((4,), 500.)), 'between 0'), (dict(t=torch.rand(3)), 'batch of 4'), (dict(predict='epsilon'), 'no prediction'),
    (dict(weighting='velocity'), 'velocity has no weighting'), (dict(predict='noise', weighting='likelyhood'), 'nearest: likelihood'),
    (dict(net=lambda z, t, y: z[:, :2]), 'prediction and latents have shapes')])
def test_bad_input_of_the_loss(kw, message):
    args = dict(net=lambda z, t, y, *c: z, z=torch.zeros(4, 4, 2, 2), y=torch.zeros(4)) | kw
    with pytest.raises(UserError, match=message): flow_loss(**args)


def test_score_error_is_the_error_of_the_noise_it_implies():
    z, noise, t = normal(6, 3), normal(6, 3, seed=1), torch.linspace(.1, .9, 6).double()
    guess = normal(6, 3, seed=2)
    score = prediction_error(-guess/coefficients(t).sigma[:, None], z, noise, t, predict='score')
    assert torch.allclose(score, prediction_error(guess, z, noise, t, predict='noise'))


# samplers: the exact field of a Gaussian ----------------------------------------------------------------------------------------------------------

ORDER = dict(euler=1, midpoint=2, heun=2, heun_held=2, rk4=4)


@pytest.mark.parametrize('path', PATHS)
@pytest.mark.parametrize('method', ODES)
def test_order_of_convergence(path, method):
    z, (low, high) = normal(50, 3), t_interval(path, sampling=True)
    end = carried(z, path, high, low)
    # steps shrink towards the data on the VP path, whose field changes fast there
    grid = (lambda n: time_grid(n, interval=(low, high))) if path != 'vp' else lambda n: low + (high-low)*torch.linspace(1, 0, n+1, dtype=torch.float64)**3
    def f(z, t): return gaussian(z, t, path)
    errors = [(sample(f, z, Sampler(method=method, path=path, grid=grid(n)))-end).abs().max().item() for n in (40, 80)]
    order = 3 if (method, path) == ('midpoint', 'linear') else ORDER[method]   # there the variance is quadratic in t, and the rule gains one
    assert abs(slope(errors)-order) < .3, errors
    assert errors[-1] < (.1 if method == 'euler' else 5e-3)


@pytest.mark.parametrize('method', ('euler', 'midpoint', 'heun'))   # rk4 asks at t = 0, where this field is 0/0
def test_a_point_mass_is_hit_exactly_by_one_step(method):
    assert torch.allclose(sample(lambda z, t: (z-MU)/t, normal(7, 3), Sampler(1, method)), MU.expand(7, 3), atol=1e-12)


@pytest.mark.parametrize('path', ('linear', 'gvp'))
def test_dopri5_keeps_its_promise_and_stays_in_range(path):
    pytest.importorskip('torchdiffeq')
    z, asked = normal(30, 3), []
    def f(z, t):
        asked.append(t)
        return gaussian(z, t, path)
    off = [(sample(f, z, Sampler(4, 'dopri5', path=path, rtol=r, atol=r/100))-carried(z, path, 1., 0.)).abs().max() for r in (1e-3, 1e-6)]
    assert off[0] < 2e-2 and off[1] < 2e-5
    assert 0 <= min(asked) and max(asked) <= 1
    every = sample(f, z, Sampler(4, 'dopri5', path=path, rtol=1e-6, atol=1e-8), states=True)
    for t, x in zip(time_grid(4).tolist(), every, strict=True): assert torch.allclose(x, carried(z, path, 1., t), atol=1e-4)


def test_dopri5_without_torchdiffeq_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, 'torchdiffeq', None)
    with pytest.raises(UserError, match="torchdiffeq is not installed: pip install 'vfmvae.ode.*'heun'"): sample(gaussian, normal(2, 3), Sampler(4, 'dopri5'))


def marginal(method, steps, path='linear', mu=.7, s=.6, **kw):
    """Mean and variance of what the chain makes of N(0,1) noise, without drawing any: everything is affine in the noise, so one row
    without noise gives the mean, and one row for each number (a one there, zeros else) its share of the variance."""
    f = partial(gaussian, path=path, mu=mu, s=s)
    rows = torch.eye(steps+2, dtype=torch.float64)[1:, :, None]   # of the starting noise, then of each step
    z = sample(f, rows[0], Sampler(steps, method, path=path, **kw), draw=iter(rows[1:]).__next__)[:, 0]
    return z[0].item(), (z[1:]-z[0]).square().sum().item()


@pytest.mark.parametrize('path', ('linear', 'gvp'))
@pytest.mark.parametrize('method', SDES)
@pytest.mark.parametrize('form', [f for f in DIFFUSION_COEFFICIENTS if f != 'sbdm'])
def test_sde_has_the_marginal_of_the_data(path, method, form):
    (mean, var), (mean2, var2) = (marginal(method, n, path, form=form, norm=.7, last=None) for n in (48, 96))
    assert abs(var2-.36) < .012 and abs(2*var2-var-.36) < 1.2e-3            # order 1: without its 1/n the error is gone
    if path == 'linear': assert abs(mean2-.7) < 1e-12                        # the mean moves on a straight line
    else: assert slope([abs(mean-.7), abs(mean2-.7)]) > dict(sde=.9, sde_heun=1.9)[method] and abs(mean2-.7) < .01


@pytest.mark.parametrize('method', SDES)
@pytest.mark.parametrize('last', ('mean', 'euler', 'tweedie'))
def test_published_last_steps(method, last):
    # the fixed last step of .04 leaves out its noise: a bias that more steps do not cure
    mean, var = marginal(method, 100, last=last)
    assert abs(mean-.7) < .02 and abs(var-.36) < .02
    calls = []
    def f(z, t):
        calls.append(t)
        return gaussian(z, t)
    sample(f, normal(2, 3), Sampler(10, 'sde', last=last), draw=lambda: torch.zeros(2, 3))
    assert len(calls) == 10 and torch.allclose(torch.tensor(calls), torch.linspace(1, .04, 10))


@pytest.mark.parametrize('method', SDES)
def test_sbdm_is_finite_and_right(method):
    assert all(math.isfinite(x) for path in PATHS for x in marginal(method, 20, path, form='sbdm'))
    mean, var = marginal(method, 100, form='sbdm', last=None)
    assert abs(mean-.7) < 1e-4 and abs(var-.36) < 1e-3
    with pytest.raises(UserError, match='sbdm'): Sampler(method=method, form='sbdm', grid=time_grid(5))


def test_heun_sde_does_not_ask_for_the_score_of_data():
    for form in DIFFUSION_COEFFICIENTS:
        s = Sampler(20, 'sde_heun', form=form, last=None)
        assert sample(gaussian, normal(4, 3), s, draw=lambda: normal(4, 3, seed=1)).isfinite().all()


@pytest.mark.parametrize('method', [m for m in methods() if m != 'dopri5'])
@pytest.mark.parametrize('shape', ((2,), (3, 2, 2)))
def test_a_sample_does_not_depend_on_its_batch(method, shape):
    def net(z, t, y): return torch.sin(3*z)+y.view(-1, *[1]*(z.ndim-1))*t.view(-1, *[1]*(z.ndim-1))
    labels = torch.arange(10)
    def draw(index, seed=5): return sample(classifier_free(net, labels[index], 9, 2., interval=(.2, .8)), ImageNoise(seed, index, shape), Sampler(7, method))
    whole = draw(list(range(10)))
    for index in ([3], [8, 2], [9, 0, 1, 7]): assert torch.allclose(draw(index), whole[index], atol=1e-6, rtol=1e-6)
    assert not torch.allclose(draw([3], seed=6), whole[[3]], atol=1e-2) and whole.dtype == torch.float32


def test_streams_of_noise():
    a = ImageNoise(0, range(4000), (3, 4), torch.float64)
    x = torch.stack([a(), a()])
    assert abs(x.mean()) < .01 and abs(x.std()-1) < .01
    rows = x.transpose(0, 1).flatten(1)
    assert (torch.corrcoef(rows.T)-torch.eye(24)).abs().max() < .08        # within an image, and from one call to the next
    assert abs((rows[:-1]*rows[1:]).mean()) < .02                           # from one image to the next
    assert abs((rows[1:]*ImageNoise(1, range(3999), (24,), torch.float64)()).mean()) < .02   # (0, i+1) is not (1, i)
    assert torch.equal(ImageNoise(-1, [2**40], (2,))(), ImageNoise(-1, [2**40], (2,))())
    assert torch.equal(ImageNoise(7, [1], (5,), torch.float64)().float(), ImageNoise(7, [1], (5,))())


def test_state_is_float64_and_the_net_sees_the_precision_of_the_noise():
    seen = set()
    def f(z, t):
        seen.add(z.dtype)
        return gaussian(z, t).to(z.dtype)
    z = normal(100, 3).float()
    fine, coarse = (sample(f, z, Sampler(500, 'euler'), dtype=d) for d in (torch.float64, torch.float32))
    truth = sample(gaussian, z.double(), Sampler(500, 'euler'))
    assert seen == {torch.float32} and fine.dtype == torch.float32
    assert (fine-truth).abs().max() < (coarse-truth).abs().max()/2
    assert sample(f, z.bfloat16(), Sampler(3, 'euler')).dtype == torch.bfloat16


def test_states_come_one_by_one():
    asked = []
    def f(z, t):
        asked.append(t)
        return gaussian(z, t)
    walk = trajectory(f, normal(4, 3), Sampler(10, 'euler'))
    assert next(walk)[0] == 1 and not asked
    assert next(walk)[0] == .9 and len(asked) == 1
    every = sample(gaussian, normal(4, 3), Sampler(10, 'euler'), states=True)
    end = sample(gaussian, normal(4, 3), Sampler(10, 'euler'))
    assert every.shape == (11, 4, 3) and torch.equal(every[0], normal(4, 3)) and torch.equal(every[-1], end)
    assert torch.allclose(sample(gaussian, every[4], Sampler(method='euler', grid=time_grid(10)[4:])), end, atol=1e-14)   # a walk can be taken up anywhere


@pytest.mark.parametrize('kw, message', [
    (dict(method='eular'), 'nearest: euler'), (dict(steps=0), 'at least 1'), (dict(path='vq'), 'nearest: vp'),
    (dict(grid=torch.tensor([1., .5, .5])), 'without repeats'), (dict(grid=torch.tensor([0., 1.])), 'without repeats'),
    (dict(grid=torch.tensor([1.])), 'without repeats'), (dict(grid=torch.tensor([999., 0.])), 'between 0'),
    (dict(channels=3, weak='base'), 'null label alone'),
    (dict(method='sde'), 'ImageNoise'), (dict(method='sde', draw=lambda: 0, last='mode'), "no last step named 'mode'"),
    (dict(method='sde', draw=lambda: torch.zeros(3)), 'drawn noise'), (dict(shift=0.), 'positive'),
    (dict(method='sde', draw=lambda: torch.zeros(4, 3), form='sigm'), 'nearest: sigma'), (dict(velocity=lambda z, t: z[:2]), 'velocity and state')])
def test_bad_input_of_samplers(kw, message):
    kw = dict(kw)
    with pytest.raises(UserError, match=message):
        given = {k: kw.pop(k) for k in ('velocity', 'draw') if k in kw}
        sample(**dict(velocity=gaussian, noise=normal(4, 3), sampler=Sampler(**dict(steps=3, method='euler') | kw)) | given)


@pytest.mark.parametrize('how', [dict(steps=7), dict(steps=7, method='sde'), dict(grid=(1., .5, 0.)),
                                 dict(steps=7, shift=3., grid=torch.linspace(1, 0, 5))], ids=str)
def test_a_record_says_the_steps_that_were_taken(how):
    s = Sampler(**how)
    assert s.facts()['steps'] == len(s.levels())-1 and s.facts()['shift'] == 1. and replace(s, guidance=2.).levels() == s.levels()


@pytest.mark.parametrize('ask', [
    lambda: sample_t(4, interval='ab'), lambda: sample_t(4, interval=(0, .5, 1)), lambda: time_grid(3, interval=3), lambda: time_grid(3, interval=(.5,)),
    lambda: dimension_shift(3), lambda: dimension_shift((16, 8, 8), 0), *(lambda g=g: Sampler(grid=g).levels() for g in (3, 'ab', [[1, 0], [0]])),
    *(lambda i=i: classifier_free(gaussian, torch.tensor([0]), 10, 2., interval=i) for i in (3, 'ab', (0, .5, 1), None))])
def test_what_is_no_sequence_of_numbers_is_one_line(ask):
    with pytest.raises(UserError) as e: ask()
    assert '\n' not in str(e.value)


# guidance -----------------------------------------------------------------------------------------------------------------------------------------

class Counting:
    "A net that counts its calls, by label; velocity 3 with a label, 1 without."
    def __init__(self): self.calls = []
    def __call__(self, z, t, y):
        self.calls.append((t[0].item(), y[0].item()))
        return torch.where(y == 10, 1., 3.).to(z).view(-1, *[1]*(z.ndim-1)).expand_as(z)


@pytest.mark.parametrize('method, asked', dict(euler=1, midpoint=2, rk4=4).items())
def test_outside_the_interval_half_the_cost(method, asked):
    net = Counting()
    sample(classifier_free(net, torch.tensor([4, 7]), 10, 2., interval=(.25, .5)), normal(2, 4), Sampler(grid=torch.linspace(1, 0, 9).double(), method=method))
    with_null = [t for t, y in net.calls if y == 10]
    assert len(net.calls)-len(with_null) == 8*asked and all(.25 <= t <= .5 for t in with_null)
    assert len(with_null) == sum(.25 <= t <= .5 for t, y in net.calls if y != 10) > 0


def test_scale_1_costs_nothing_and_changes_nothing():
    net, z = Counting(), normal(2, 4)
    f = classifier_free(net, torch.tensor([4, 7]), 10, 1.)
    assert torch.equal(f(z, .5), torch.full_like(z, 3.)) and len(net.calls) == 1


@pytest.mark.parametrize('t, inside', [(.3, True), (.9, True), (.299, False), (.901, False)])
def test_both_bounds_belong_to_the_interval(t, inside):
    assert (guide(lambda z, t: 3+0*z, lambda z, t: 1+0*z, 2., (.3, .9))(torch.zeros(2, 3), t) == (5 if inside else 3)).all()
    assert (internal_guidance(lambda z, t: (3+0*z, 1+0*z), 2., (.3, .9))(torch.zeros(2, 3), t) == (5 if inside else 3)).all()


def test_three_channels_and_all():
    y, z = torch.tensor([4, 7]), torch.zeros(2, 4, 2, 2)
    assert classifier_free(Counting(), y, 10, 2., channels=3)(z, .5)[0, :, 0, 0].tolist() == [5, 5, 5, 3]
    assert classifier_free(Counting(), y, 10, 2.)(z, .5)[0, :, 0, 0].tolist() == [5, 5, 5, 5]


@pytest.mark.parametrize('cls_scale, cls_wanted', [(0., 3), (1., 3), (2.3, 5.6)])
def test_class_token_has_its_own_scale(cls_scale, cls_wanted):
    net, shape = Counting(), (4, 2, 2)
    state = pack_state(torch.zeros(2, *shape), torch.zeros(2, 5))
    def both(z, t, y, cls): return net(z, t, y), net(cls, t, y)
    f = classifier_free(both, torch.tensor([4, 7]), 10, 2., channels=3, shape=shape, cls_scale=cls_scale)
    z, cls = unpack_state(f(state, .5), shape)
    assert z.shape == (2, *shape) and z[0, :, 0, 0].tolist() == [5, 5, 5, 3] and torch.allclose(cls, torch.full((2, 5), float(cls_wanted)))
    a, b = unpack_state(pack_state(normal(2, *shape), normal(2, 5)), shape)
    assert torch.equal(a, normal(2, *shape)) and torch.equal(b, normal(2, 5))


def test_guidance_nests():
    # AutoGuidance on top of classifier-free guidance, each with an interval of its own
    y, z = torch.tensor([4, 7]), torch.zeros(2, 3)
    strong = classifier_free(Counting(), y, 10, 2., interval=(0, .5))
    f = guide(strong, lambda z, t: 2+0*z, 1.5, (.4, 1))
    assert [f(z, t)[0, 0].item() for t in (.2, .45, .8)] == [5, 6.5, 3.5]


@pytest.mark.parametrize('method, mean', [('heun', (5+3.5)/2), ('heun_held', (5+5)/2)])
def test_a_step_that_holds_its_guidance_holds_it_through_any_field(method, mean):
    strong = classifier_free(Counting(), torch.tensor([4, 7]), 10, 2., interval=(0, .5))
    f = guide(strong, lambda z, t: 2+0*z, 1.5, (.4, 1))
    for field in (f, lambda z, t: f(z, t)):                    # a field is f(z, t), also what somebody puts around one
        assert ODES[method](field, torch.zeros(2, 3), .2, .8)[0, 0].item() == pytest.approx(.6*mean)


def test_nets_that_predict_something_else_are_fields_too():
    z, y = normal(6, 3), torch.zeros(6).long()
    for path in ('linear', 'gvp'):
        for predict in PREDICTIONS:
            def net(z, t, y, path=path, predict=predict): return convert(gaussian(z, t[0].item(), path), z, t, 'velocity', predict, path)
            assert torch.allclose(velocity_field(net, y, predict=predict, path=path)(z, .6), gaussian(z, .6, path), atol=1e-10)


def test_gradients_are_the_callers_choice():
    w = torch.ones(3, requires_grad=True, dtype=torch.float64)
    sample(lambda z, t: z*w, normal(2, 3), Sampler(4)).sum().backward()
    assert w.grad.isfinite().all() and (w.grad != 0).all()


@pytest.mark.parametrize('call, message', [
    (lambda n, z: guide(n, n, 2., (.8, .2)), 'low, high'), (lambda n, z: guide(n, n, 2., (0, 1000)), 'low, high'),
    (lambda n, z: internal_guidance(n, 2., (-1, 1)), 'low, high'), (lambda n, z: classifier_free(n, torch.zeros(2), 10, 2., channels=0), 'at least 1'),
    (lambda n, z: velocity_field(n, torch.zeros(3))(z, .5), '3 conditions for 2'),
    (lambda n, z: velocity_field(lambda z, t, y: (z, z), torch.zeros(2))(z, .5), 'class token'),
    (lambda n, z: velocity_field(lambda z, t, y: z[:, :1], torch.zeros(2))(z, .5), 'must be equal')])
def test_bad_input_of_guidance(call, message):
    with pytest.raises(UserError, match=message): call(Counting(), torch.zeros(2, 4))


# what a net says, on which path, for which labels ------------------------------------------------------------------------------------------------

def exact_net(predict, path, **meta):
    "A DiT that answers exactly for latents N(MU, S^2), channel by channel, and refuses a noise level that its training never had."
    net = DiT(DiTConfig(in_channels=3, hidden_size=16, depth=1, num_heads=1, num_classes=300, predict=predict)).eval()
    mu, s, (low, high) = MU.view(3, 1, 1), S.view(3, 1, 1), t_interval(path, predict)
    def answer(z, t, y, layers=None):
        assert predict == 'data' or low <= t[0].item()+1e-6 and t[0].item() <= high+1e-6, t
        v = gaussian(z.double(), t[0].double(), path, mu, s)
        v = convert(v, z.double(), t[0].double(), 'velocity', predict, path) if predict != 'velocity' else v
        return DiTOutput(v, base=v) if layers is not None else v
    net.forward, net.meta = answer, meta
    return net.double()


@pytest.mark.parametrize(('path', 'how'), [*((p, {}) for p in PATHS), *(('gvp', dict(guidance=2., weak=w)) for w in (None, 'base', 'given'))], ids=str)
@pytest.mark.parametrize('predict', PREDICTIONS)
def test_a_net_is_sampled_by_what_it_says_on_its_path(predict, path, how):
    "Noise and score were asked for at t = 1, where they are no velocity (NaN), and every path but the linear one was forgotten."
    net, weak = exact_net(predict, path), exact_net('velocity', path) if how.get('weak') == 'given' else None
    if how.get('weak') == 'base': object.__setattr__(net.config, 'base_depth', 1)
    noise = ImageNoise(0, [0, 1], (3, 2, 4))()
    got = sample_latents(net, [0, 1], (3, 2, 4), sampler=Sampler(40, 'heun', path=path, **how), weak=weak).double()
    start = t_interval(path, sampling=True)[1]
    want = carried(noise.permute(0, 2, 3, 1).double(), path, start, t_interval(path, sampling=True)[0]).permute(0, 3, 1, 2)
    assert (got-want).abs().max() < (.25 if predict == 'data' else .08)          # data: divided by no less than .05


@pytest.mark.parametrize('kind', [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float32, list, tuple, range], ids=str)
@pytest.mark.parametrize('guidance', [1., 2.])
def test_labels_of_any_kind_of_whole_numbers_are_labels(kind, guidance):
    "The null label of ImageNet does not fit into a byte."
    net = exact_net('velocity', 'linear')
    labels = torch.tensor([0, 1]).to(kind) if isinstance(kind, torch.dtype) else kind(2) if kind is range else kind([0, 1])
    seen, answer = [], net.forward
    net.forward = lambda z, t, y, *more: (seen.append(y), answer(z, t, y, *more))[1]
    assert sample_latents(net, labels, (3, 2, 2), sampler=Sampler(1, 'euler', guidance=guidance)).shape == (2, 3, 2, 2)
    assert all(y.dtype == torch.int64 for y in seen) and seen[0].tolist() == [0, 1] and seen[-1].tolist() == ([0, 1] if guidance == 1 else [300, 300])
    for bad in (torch.tensor([.5]), torch.tensor([True]), torch.tensor([301]), torch.tensor([[0, 1]]), [-1]):
        with pytest.raises(UserError, match=r'^label[^\n]+$'): sample_latents(net, bad, (3, 2, 2), sampler=Sampler(1, 'euler'))


@pytest.mark.parametrize('steps', [10, 20, 25, 35, 40])
def test_both_ends_of_a_guidance_interval_are_in_it(steps):
    "linspace gives .30000000000000004 for .3."
    for i in range(steps+1):
        t, x = time_grid(steps)[i].item(), (steps-i)/steps
        for ends in ((x, 1.), (0., x)) if 0 < x < 1 else ():
            fields = guide(lambda z, t: z, lambda z, t: 0*z, 3., ends), internal_guidance(lambda z, t: (z, 0*z), 3., ends)
            assert [f(torch.ones(1), t).item() for f in fields] == [3., 3.], (steps, x, t, ends)
            apart = 1e-6 if ends[0] == 0 else -1e-6
            assert [f(torch.ones(1), t+apart).item() for f in fields] == [1., 1.]


def test_dopri5_that_cannot_go_on_is_one_line():
    pytest.importorskip('torchdiffeq')
    for f, how in ((lambda z, t: z*math.nan, {}), (lambda z, t: z.square()*1e5, {})):
        with pytest.raises(UserError, match=r"^sampling by 'dopri5' ended in [^\n]+$"): sample(f, normal(2, 3), Sampler(2, 'dopri5', **how))


def test_a_net_whose_file_names_its_path_is_sampled_on_no_other():
    net = exact_net('velocity', 'gvp', recipe=dict(flow=dict(path='gvp')))
    assert net.path == 'gvp' and sample_latents(net, [0], (3, 2, 2), sampler=Sampler(2, path='gvp')).isfinite().all()
    with pytest.raises(UserError, match="learned the path 'gvp'"): sample_latents(net, [0], (3, 2, 2), sampler=Sampler(2))
    with pytest.raises(UserError, match='give both the same'): replace(FLOW_PRESETS['dit-conv-f8d16'], flow=FlowConfig(path='gvp'))
    tok = type('Tok', (torch.nn.Module,), dict(name='tok', channels=3, encode=lambda self, x: Gaussian(x, None), device='cpu'))()
    x = images = torch.rand(2, 3, 4, 4)*2-1
    draws = {p: NetFeatures(net, tok, .3, path=p).noised(x)[0] for p in (None, 'linear', 'gvp')}
    assert torch.equal(draws[None], draws['gvp']) and not torch.equal(draws['linear'], draws['gvp'])
    noise = (draws['linear']-.7*images)/.3
    torch.testing.assert_close(draws['gvp'], interpolate(images, noise, .3, 'gvp')[0], rtol=1e-4, atol=1e-4)
