"Paths, losses, samplers and guidance against the numbers of the published code (needs VFMVAE_SHARED)."
import importlib, json, os, re
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vfmvae.flow import PATHS as PATHS_OF
from vfmvae.flow import (coefficients, convert, cosine_loss, dimension_shift, flow_loss, FLOW_WEIGHTS, FlowTargets,
                         half_diffusion, interpolate, prediction_error, repa_loss, shift_t)
from vfmvae.samplers import (classifier_free, diffusion, guide, pack_state, sample, Sampler, time_grid, unpack_state,
                             velocity_field)

SHARED = Path(os.environ.get('VFMVAE_SHARED') or Path(__file__).resolve().parents[2]/'shared')
GOLD = SHARED/'golden/diffusion'
pytestmark = pytest.mark.skipif(not (GOLD/'transport.safetensors').is_file(), reason='golden numbers absent; set VFMVAE_SHARED')
PATHS = dict(Linear='linear', GVP='gvp', VP='vp')
gold = load_file(GOLD/'transport.safetensors') if GOLD.is_dir() else {}
walks = load_file(GOLD/'samplers.safetensors') if GOLD.is_dir() else {}
SEEN: set[str] = set()   # golden values of transport and samplers that some test has compared


def close(a, name, tol, source=None):
    "Largest error relative to the largest value."
    want = (walks if source is None else source)[name].double()
    SEEN.add(name)
    assert a.shape == want.shape, (name, a.shape, want.shape)
    assert (a.double()-want).abs().max() <= tol*max(1., want.abs().max().item()), (name, (a.double()-want).abs().max())


exactly = partial(close, tol=1e-10)
def transported(a, name, tol=1e-10): close(a, name, tol, gold)


# transport: `t` of the file is 1 for data, unless the key says repa or rae --------------------------------------------------------------------

@pytest.mark.parametrize('kind', PATHS)
def test_path(kind):
    path, t = PATHS[kind], 1-gold['t']
    x, n = gold['x1_data'], gold['x0_noise']
    c = coefficients(t, path)
    for got, name in ((c.alpha, 'alpha'), (c.sigma, 'sigma'), (-c.d_alpha, 'd_alpha'), (-c.d_sigma, 'd_sigma'), (half_diffusion(t, path), 'drift_var')):
        transported(got, f'{kind}.{name}')
    z, v = interpolate(x, n, t, path)
    transported(z, f'{kind}.xt')
    transported(-v, f'{kind}.ut')
    transported(convert(torch.zeros_like(z), z, t, 'score', 'velocity', path), f'{kind}.drift')
    said = gold['model_output']   # a velocity there is minus a velocity here
    for to in ('score', 'noise'): transported(convert(-said, z, t, 'velocity', to, path), f'{kind}.{to}_from_velocity')
    transported(-convert(said, z, t, 'score', 'velocity', path), f'{kind}.velocity_from_score')


@pytest.mark.parametrize('kind', PATHS)
@pytest.mark.parametrize('form', ('constant', 'SBDM', 'sigma', 'linear', 'decreasing', 'inccreasing-decreasing'))
def test_diffusion(kind, form):
    ours = dict([('inccreasing-decreasing', 'increasing_decreasing')]).get(form, form.lower())
    transported(diffusion(1-gold['t'], ours, .7, PATHS[kind]).expand(6), f'{kind}.diffusion.{form}.norm0.7')


@pytest.mark.parametrize('key', [k for k in gold if re.fullmatch(r'\w+\.(velocity|noise|score)\.\w+\.loss', k)])
def test_losses(key):
    kind, predict, weighting, _ = key.split('.')
    said = gold['model_output']*(-1 if predict == 'velocity' else 1)
    w = None if weighting == 'None' else weighting
    transported(prediction_error(said, gold['x1_data'], gold['x0_noise'], 1-gold['t'], PATHS[kind], predict, w), key)
    out = flow_loss(lambda z, t, y: said, gold['x1_data'], torch.zeros(6).long(), t=1-gold['t'], noise=gold['x0_noise'],
                    path=PATHS[kind], predict=predict, weighting=w)
    assert torch.allclose(out['per_sample'], gold[key], rtol=1e-10, atol=0) and torch.allclose(out['loss'], gold[key].mean(), rtol=1e-10)


def test_lightningdit_loss():
    x, n, said = gold['x1_data'], gold['x0_noise'], -gold['model_output']
    _, v = interpolate(x, n, 1-gold['t'])
    transported(prediction_error(said, x, n, 1-gold['t']), 'lightningdit.loss')
    transported(cosine_loss(said, v), 'lightningdit.cos_loss')


@pytest.mark.parametrize('kind', ('linear', 'cosine'))
def test_repa_path(kind):
    path, t = dict(linear='linear', cosine='gvp')[kind], gold['t']
    z, v = interpolate(gold['x1_data'], gold['x0_noise'], t, path)
    transported(z, f'repa.{kind}.xt')
    transported(v, f'repa.{kind}.target')
    transported(convert(gold['model_output'], z, t, 'velocity', 'score', path), f'repa.{kind}.score_from_velocity')


def test_rae_path_and_shifts():
    z, v = interpolate(gold['x1_data'], gold['x0_noise'], gold['t'])
    transported(z, 'rae.Linear.xt')
    transported(v, 'rae.Linear.ut')
    for m, shape in ((1., (4, 32, 32)), (6.9282, (768, 16, 16)), (1.4142, (32, 16, 16))):
        assert abs(dimension_shift(shape)-m) < 1e-4
        transported(shift_t(gold['t'], dimension_shift(shape)), f'rae.shifted_t.shift{m:.4f}')
    for m in ('0.1', '0.3', '0.5'): transported(1-time_grid(10, 1/float(m)), f'lightningdit.ode_grid_n11.shift{m}', 1e-7)   # that grid is float32


# samplers: the exact velocity of diagonal Gaussians -------------------------------------------------------------------------------------------

NULL = 10

def law(z, t, y, path='linear', offset=0.):
    "A net for z (b,d,...): noise - data of N(mu[y], s[y]^2); any label above the classes is the null label."
    c = PATHS_OF[path](t.double())   # unchecked: as published, dopri5 asks beyond the end
    mu, s = (walks[f'{k}_table'][y.clamp(max=NULL)] for k in ('mu', 's'))
    a, b, da, db, mu, s = (v.view(len(z), -1, *[1]*(z.ndim-2)) for v in (*c, mu+offset, s))
    return da*mu + (a*da*s**2 + b*db)/(a**2*s**2 + b**2)*(z - a*mu)


def exact(path='linear'): return velocity_field(partial(law, path=path), walks['labels'])


def states(kind, method, **kw): return sample(exact(PATHS[kind]), walks['z_init'], Sampler(25, method, path=PATHS[kind], **kw), states=True)


def test_the_net_of_these_tests_ends_where_the_file_says():
    exactly(sample(exact(), walks['z_init'], Sampler(400, 'rk4')), 'exact_endpoint_from_prior', tol=1e-9)


@pytest.mark.parametrize('kind', ('Linear', 'GVP'))
@pytest.mark.parametrize('method', ('euler', 'midpoint', 'rk4'))
def test_sit_ode(kind, method): close(states(kind, method), f'sit.ode.{kind}.{method}.n26.traj', 1e-5)


@pytest.mark.parametrize('key', [k for k in walks if '.dopri5.' in k])
def test_dopri5(key):
    pytest.importorskip('torchdiffeq')
    kind = next((k for k in PATHS if f'.{k}.' in key), 'Linear')
    got, theirs = (states(kind, 'dopri5', shift=1/.3 if 'shift0.3' in key else 1., overshoot=o) for o in (False, True))
    close(theirs, key, 1e-5)
    off, off_theirs = ((x[-1]-walks['exact_endpoint_from_prior']).abs().max() for x in (got, theirs))
    assert off <= 5e-3 and off < off_theirs


@pytest.mark.parametrize('key', [k for k in walks if re.match(r'sit\.sde\.\w+\.(Euler|Heun)\.', k)])
def test_sit_sde(key):
    _, _, kind, method, form, last, _, _ = key.split('.')
    last = None if last == 'lastNone' else last.removeprefix('last').lower()
    s = Sampler(26 if last else 25, dict(Euler='sde', Heun='sde_heun')[method], path=PATHS[kind], form=form, last=last)
    got = sample(exact(PATHS[kind]), walks['z_init'], s, states=True, draw=iter(walks['sit.sde.noise']).__next__)[1:]
    if last is None: got = torch.cat([got, got[-1:]])   # they save the identity as a step
    close(got, key, 1e-5)
    SEEN.add('sit.sde.noise')


def test_sbdm_starts_where_it_is_finite():
    SEEN.add('sit.sde.Linear.SBDM.first_state_nonfinite_flag')
    assert walks['sit.sde.Linear.SBDM.first_state_nonfinite_flag'] == 1   # theirs
    draw = partial(torch.randn, 4, 5, generator=torch.Generator().manual_seed(0))
    for method in ('sde', 'sde_heun'): assert sample(exact(), walks['z_init'], Sampler(60, method, form='sbdm'), states=True, draw=draw).isfinite().all()


@pytest.mark.parametrize('shift', ('0.0', '0.3'))
def test_lightningdit_ode(shift):
    close(states('Linear', 'euler', shift=1/float(shift) if shift != '0.0' else 1.), f'lightningdit.ode.euler.shift{shift}.n26.traj', 1e-5)


def test_lightningdit_guidance_on_three_channels():
    y, z = walks['labels'], walks['lightningdit.cfg.z_init']
    guided, null = classifier_free(law, y, NULL, 3., channels=3, interval=(0, .875)), velocity_field(law, torch.full_like(y, NULL))
    how = Sampler(25, 'euler', 1/.3)
    close(sample(guided, z, how, states=True), 'lightningdit.cfg3.start0.125.shift0.3.n26.traj_cond_half', 1e-5)
    def both(x, t):   # their batch is [conditional; null]: the second half sees the states of the first, and its unguided channels stay null's
        v = guided(x[:4], t)
        return torch.cat([v, torch.cat([v[:, :3], null(x[:4], t)[:, 3:]], 1)])
    close(sample(both, torch.cat([z, z]), how)[4:], 'lightningdit.cfg3.final_null_half', 1e-5)
    SEEN.add('lightningdit.cfg.z_init')


@pytest.mark.parametrize('key', [k for k in walks if re.match(r'repa\.(ode|sde)\..*cfg', k)])
def test_repa(key):
    mode, kind, *_, = key.split('.')[1:]
    scale, low, high = map(float, re.search(r'cfg(\d\.\d)\.(\d\.\d)-(\d\.\d)', key).groups())
    path = dict(linear='linear', cosine='gvp')[kind]
    f = classifier_free(partial(law, path=path), walks['labels'], 1000, scale, interval=(low, high))
    if mode == 'ode': got = sample(f, walks['z_init'], Sampler(20, 'heun_held' if 'heun1' in key else 'euler', path=path))
    else: got = sample(f, walks['z_init'], Sampler(20, 'sde', path=path, form='linear'), draw=iter(walks['repa.sde.noise']).__next__)
    exactly(got, key, tol=1e-9)
    SEEN.add('repa.sde.noise')


def test_heun_asks_the_interval_at_both_ends_unless_told_otherwise():
    f = classifier_free(law, walks['labels'], 1000, 1.8, interval=(0., .7))
    key = 'repa.ode.linear.heun1.cfg1.8.0.0-0.7.n20'
    assert 1e-5 < (sample(f, walks['z_init'], Sampler(20))-walks[key]).abs().max() < .5


@pytest.mark.parametrize('key', [k for k in walks if re.match(r'reg\.sde\.cfg', k)])
def test_reg(key):
    scale, cls_scale, high = map(float, re.search(r'\.cfg([\d.]+)\.clscfg([\d.]+)\.high([\d.]+)\.n', key).groups())
    def net(z, t, y, cls): return law(z, t, y), law(cls, t, y, offset=.5)
    f = classifier_free(net, walks['labels'], 1000, scale, interval=(0., high), shape=(5,), cls_scale=cls_scale)
    noise = walks['reg.sde.noise_img_then_cls_interleaved'].view(19, 2, 4, 5)
    got = sample(f, pack_state(walks['z_init'], walks['reg.cls_z_init']), Sampler(20, 'sde'), draw=iter([pack_state(*n) for n in noise]).__next__)
    exactly(unpack_state(got, (5,))[0], key, tol=1e-9)
    SEEN.update(('reg.cls_z_init', 'reg.sde.noise_img_then_cls_interleaved'))


@pytest.mark.parametrize('shift', ('1.000', '6.928'))
def test_rae(shift):
    grid = time_grid(25, dimension_shift((768, 16, 16)) if shift != '1.000' else 1., (1e-3, 1))
    got = sample(exact(), walks['z_init'], Sampler(method='euler', grid=grid), states=True)
    close(got, f'rae.ode.euler.shift{shift}.n26.traj', 1e-5)


def test_every_value_of_the_two_files_is_compared():
    inputs = {'x1_data', 'x0_noise', 't', 'model_output', 'mu_table', 's_table', 'labels', 'z_init'}
    if not importlib.util.find_spec('torchdiffeq'): inputs |= {k for k in walks if '.dopri5.' in k}
    assert {*gold, *walks} - inputs - SEEN == set()


# losses and guidance of nets ------------------------------------------------------------------------------------------------------------------

ALIGNED = ('repa_sit_tiny', 'reg_sit_tiny', 'reg_vfmvae_sit_tiny')

@pytest.mark.parametrize('name', ALIGNED)
def test_weights_of_repa_and_reg(name):
    g = load_file(GOLD/f'{name}.safetensors')
    parts = dict(flow=g['loss.denoise_per_sample'], repa=g['loss.proj']) | ({'cls': g['loss.denoise_cls_per_sample']} if 'in.cls' in g else {})
    w = FLOW_WEIGHTS[name.split('_')[0]]
    assert w.keys() == parts.keys() and torch.allclose(sum(w[k]*v.mean() for k, v in parts.items()), g['loss.total'], rtol=1e-6)
    zs, z0 = g['out.zs0'].double(), g['in.z0'].double()
    unit = lambda x: x/x.norm(dim=-1, keepdim=True)
    assert torch.allclose(repa_loss([zs.float()], [z0.float()]).double(), -(unit(zs)*unit(z0)).sum(-1).mean(), atol=1e-7)


def loaded(name):
    "The net of a golden file, as the library's loader makes it, with time as here."
    try: from vfmvae.published import load_net
    except ImportError: pytest.skip('vfmvae.published.load_net does not exist yet')
    g, facts = load_file(GOLD/f'{name}.safetensors'), json.loads((GOLD/'manifest.json').read_text())[name]
    family = next(f for f in ('lightningdit', 'repa', 'reg', 'rae', 'sit') if name.startswith(f))
    return load_net({k[3:]: v for k, v in g.items() if k.startswith('sd.')}, family, **facts['cfg']).eval(), g


def near(got, want): assert (got-want).abs().max() <= 2e-5*want.abs().max(), (got-want).abs().max()


NETS = ('sit_tiny_ls1', 'sit_tiny_ls0', 'lightningdit_tiny_published', 'lightningdit_tiny_qknorm_vfmvae', 'lightningdit_tiny_plain',
        'lightningdit_tiny_woshift_p2', 'rae_ditdh_tiny')

@torch.no_grad()
@pytest.mark.parametrize('name', NETS)
def test_guidance_of_nets(name):
    net, g = loaded(name)
    keys = [k for k in g if k.startswith('cfg.out')]
    assert keys
    z, y = g['cfg.x'][:3], g['cfg.y'][:3]
    for key in keys:
        scale = float(re.search(r'scale([\d.]+?)(?:_|$)', key)[1])
        t = float(m[1]) if (m := re.search(r'_t([\d.]+)$', key)) else g['cfg.t'][0].item()
        if name.startswith('rae'):
            near(classifier_free(net, y, NULL, scale, interval=(.3, .9))(z, t), g[key][:3])
            continue
        start = float(m[1]) if (m := re.search(r'_start([\d.]+)_', key)) else 0.
        near(-classifier_free(net, y, NULL, scale, channels=3, interval=(0, 1-start))(z, 1-t), g[key][:3])


@torch.no_grad()
@pytest.mark.parametrize('name', [n for n in NETS if n.startswith('lightningdit')])
def test_lightningdit_losses_of_nets(name):
    net, g = loaded(name)
    out = flow_loss(net, g['in.x'], g['in.y'], FLOW_WEIGHTS['lightningdit'], t=1-g['in.t'], noise=g['loss.x0'])
    near(out['per_sample'], g['loss.mse_per_sample'])
    near(out['cosine'], g['loss.cos_per_sample'].mean())
    near(out['loss'], g['loss.total'])


@torch.no_grad()
@pytest.mark.parametrize('name', ALIGNED)
def test_repa_and_reg_losses_of_nets(name):
    net, g = loaded(name)
    extra = dict(targets=FlowTargets(g['in.cls'], g['loss.noise_cls'])) if 'in.cls' in g else {}
    out = flow_loss(net, g['in.x'], g['in.y'], dict(flow=1.) | ({'cls': .03} if extra else {}), t=g['loss.t'], noise=g['loss.noise'], **extra)
    near(out['per_sample'], g['loss.denoise_per_sample'])
    if extra: near(out['cls'], g['loss.denoise_cls_per_sample'].mean())


def test_autoguidance_is_the_same_arithmetic():
    a, b = (velocity_field(partial(law, offset=o), walks['labels']) for o in (0., .3))
    z = walks['z_init']
    assert torch.allclose(guide(a, b, 1.42)(z, .5), b(z, .5)+1.42*(a(z, .5)-b(z, .5)), atol=1e-14)
