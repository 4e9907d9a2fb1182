"""The switches of the study: at their neutral value nothing changes, to the bit; each does what its paper says; nonsense is one line."""
import json
from dataclasses import asdict, replace
from functools import partial
import pytest, torch
import torch.nn.functional as F
from torch import nn
from vfmvae.baselines import ConvVAE, ConvVAEConfig, RAE, RAEConfig
from vfmvae.core import build_config, Draws, normal_like, to_grid, UserError
from vfmvae.data import loader
from vfmvae.dit import DiT, DiTConfig, save_net
from vfmvae.flow import convert, flow_loss, FLOW_WEIGHTS, interpolate, prediction_error, repa_loss, spatial_norm
from vfmvae.flow_task import FlowConfig, FlowTask, vfm_targets
from vfmvae.layers import add_noise, fuse_layers, FUSIONS, noise_levels, PriorTarget
from vfmvae.losses import distance_matrix, moved_latents, sample_equivariance, scr_loss, ssr_loss
from vfmvae.run import load_nets, read_nets, Run, task_state
from vfmvae.samplers import _guided, sample_latents, Sampler, velocity_field
from vfmvae.tokenizer import fit_stats, load_tokenizer, save_tokenizer
from vfmvae.tokenizer_task import check_stage, EQUIVARIANCE, forward_training, SCALES, Stage, TINY, TokenizerTask
from vfmvae.train import fit, MuonAdamW
from vfmvae.vae import VFMVAE, VFMVAEConfig
from vfmvae.vfm import VFM
from vfmvae.world import World

SMALL = replace(TINY, channel_base=1024, channel_max=32, fusion=(32, 32, 32, 16), attention=(), out_dims=(32,)*3, widen=2)
PLAIN = ConvVAEConfig(channels=16, width=8, mults=(1, 1, 2, 2), blocks=1, decoder_blocks=1, img_size=64)
CONV = replace(PLAIN, vfm='tiny', patch=8, dim=128)
FROZEN = RAEConfig('tiny', 8, 128, stride=8, img_size=64, width=32, depth=1, heads=2)
CONFIGS = dict(vfmvae=SMALL, conv=CONV, plain=PLAIN, rae=FROZEN)
CLASSES = {VFMVAEConfig: VFMVAE, ConvVAEConfig: ConvVAE, RAEConfig: RAE}


def build(config, seed=0):
    torch.manual_seed(seed)
    return CLASSES[type(config)](config, VFM('tiny') if config.vfm else None)


def images(n=2): return World(n, seed=3).batch(range(n))['image']


def draws(seed=0, n=2): return Draws(seed, range(n))


def step(tok, stage, seed=0, **how):
    "What one step of a stage logs; its random numbers are those of its images."
    task = TokenizerTask(tok, stage, half_life=100, **how)
    return task.step([dict(image=images(), draws=draws(seed))], lambda loss: loss.backward(), lambda ok=True: ok, 2)


def resumes(make, folder, data=None, n=8):
    "A run of four steps that stops after two and goes on in a task of other random weights is the run that never stopped."
    data, how = data or loader(World(32), 2), dict(log_every=1, show=lambda rows: None)
    straight, first, second = make(0), make(0), make(1)
    fit(straight, data, n, run=Run(folder/'a'), **how)
    fit(first, data, n//2, run=Run(folder/'b'), **how)
    fit(second, data, n, run=Run(folder/'b'), **how)
    (a, _), (b, _) = task_state(straight), task_state(second)
    assert a.keys() == b.keys() and not [k for k in a if not torch.equal(a[k], b[k])]
    return straight


def one_line(says, make):
    with pytest.raises(UserError, match=says) as e: make()
    assert '\n' not in str(e.value)


def without(config, *new):
    "A configuration as a file from before the switch has it."
    return {k: v for k, v in json.loads(json.dumps(asdict(config))).items() if k not in new}


# fusion of layers --------------------------------------------------------------------------------------------------------------------------------

def test_one_layer_of_an_rae_is_the_norm_of_that_layer_to_the_bit():
    x, h = images(), VFM('tiny').features(images(), [-1, 2])
    for k, layer in ((dict(), -1), (dict(layer=2), 2), (dict(layers=(2,)), 2), *((dict(layers=(-1,), fuse=f), -1) for f in FUSIONS)):
        z = build(replace(FROZEN, **k)).eval().encode(x).mode()
        assert torch.equal(z, to_grid(F.layer_norm(h[layer], (128,), eps=FROZEN.eps), 8)), k


def test_fused_layers_are_what_their_names_say():
    x, at = images(), (0, 2, -1)
    each = [F.layer_norm(h, (128,), eps=FROZEN.eps) for h in VFM('tiny').features(x, at).values()]
    latent = lambda **k: build(replace(FROZEN, layers=at, **k)).eval().encode(x).mode()
    torch.testing.assert_close(latent(fuse='mean'), to_grid(sum(each)/3, 8))
    torch.testing.assert_close(latent(fuse='sum'), to_grid(sum(each), 8))
    torch.testing.assert_close(latent(fuse='last'), to_grid(each[-1], 8))
    torch.testing.assert_close(latent(fuse='concat', channels=384), to_grid(torch.cat(each, -1), 8))
    torch.testing.assert_close(latent(global_mean=True), to_grid(sum(each)/3 + each[-1].mean(1, keepdim=True), 8))


@pytest.mark.parametrize('fuse', FUSIONS)
def test_a_fused_latent_decodes_trains_and_comes_back_from_its_file(fuse, tmp_path):
    for config in (replace(FROZEN, layers=(0, -1), fuse=fuse, channels=256 if fuse == 'concat' else 128), replace(SMALL, fuse=fuse)):
        assert build_config(type(config), json.loads(json.dumps(asdict(config)))) == config
        tok, x = build(config), images(2)
        tok.decode(tok.train().encode(x).sample()).square().mean().backward()
        own = [p for k, p in tok.trainable().items() if k.startswith(('ldm_adapter.patch_quants', 'inp'))]
        assert own and all(p.grad is not None for p in own)
        again = load_tokenizer(save_tokenizer(tmp_path/'a.safetensors', tok.eval()))
        assert again.config == config and torch.equal(again.encode(x).mode(), tok.encode(x).mode())


def test_a_fused_vfmvae_projects_one_map_to_as_many_channels():
    x, plain, mixed = images(2), build(SMALL).eval(), build(replace(SMALL, fuse='mean')).eval()
    assert torch.equal(build(replace(SMALL, fuse='concat')).encode(x).mean, plain.encode(x).mean)
    assert (plain.config.projected, mixed.config.projected) == (((128, 32),)*3, ((128, 96),))
    h = plain.vfm_features(x)
    same = mixed.ldm_adapter.final_quant(mixed.ldm_adapter.patch_quants[0](F.pad(fuse_layers([*h.values()]), (0, 64))))
    assert torch.equal(mixed.encode_parts(x).moments, to_grid(same, 8))


def test_files_from_before_the_fusion_are_read_as_they_were():
    assert build_config(RAEConfig, without(FROZEN, 'layers', 'fuse', 'global_mean')) == FROZEN
    assert build_config(VFMVAEConfig, without(SMALL, 'fuse')) == SMALL


@pytest.mark.parametrize('says, make', [
    ("no fusion of RAEConfig.fuse named 'men'", lambda: replace(FROZEN, fuse='men')),
    ("choose fuse='mean'", lambda: replace(FROZEN, layers=(0, -1), fuse='concat', channels=256, global_mean=True)),
    ('config.for_vfm', lambda: build(replace(FROZEN, layers=(0, -1), fuse='concat'))),
    ('layer', lambda: build(replace(FROZEN, layers=(99,)))),
    ('layers', lambda: replace(FROZEN, layers='all')),
    ('is not one of last, mean, sum, concat', lambda: replace(SMALL, fuse='max')),
    ("use fuse='concat'", lambda: replace(SMALL, fuse='mean', in_dims=(128, 64, 128))),
    ('no fusion named', lambda: fuse_layers([torch.zeros(1, 2, 3)], 'all'))])
def test_a_fusion_that_cannot_be_is_one_line(says, make): one_line(says, make)


# regulariser of the latent -----------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('family', ['vfmvae', 'conv', 'plain'])
def test_an_rms_latent_lies_on_a_sphere_without_spread(family, tmp_path):
    config = replace(CONFIGS[family], mode='rms')
    tok, x = build(config).train(), images(2)
    parts = tok.encode_parts(x)
    h = parts.moments
    torch.testing.assert_close(parts.raw.mean, h/(h.square().mean(1, keepdim=True)+1e-6).sqrt())
    assert h.shape == (2, 16, 8, 8) and not parts.raw.std.any() and torch.equal(parts.posterior.sample(), parts.posterior.mean)
    assert step(tok, Stage('s', dict(l1=1.), ()))['l1'] > 0
    again = load_tokenizer(save_tokenizer(tmp_path/'a.safetensors', tok.eval()))
    assert again.config == config and torch.equal(again.encode(x).mode(), tok.encode(x).mode())


@pytest.mark.parametrize('family', CONFIGS)
def test_without_a_kl_loss_every_family_trains_and_no_kl_is_computed(family):
    zero, absent = (step(build(CONFIGS[family]), Stage('s', dict(l1=1., **w), ())) for w in (dict(kl=0.), dict()))
    assert 'kl' not in zero and zero == absent


def test_the_latent_with_a_spread_is_that_from_before_the_switch():
    assert build_config(ConvVAEConfig, without(CONV, 'mode')) == CONV and ConvVAEConfig.mode == 'kl'
    for config in (CONV, SMALL):
        tok, x = build(config).eval(), images(2)
        parts = tok.encode_parts(x)
        mean, logvar = parts.moments.chunk(2, 1)
        assert torch.equal(parts.raw.mean, mean) and torch.equal(parts.raw.logvar, logvar.clamp(-30, 20))


KL = Stage('s', dict(l1=1., kl=1e-6), ())

@pytest.mark.parametrize('says, make', [
    ("no mode of ConvVAEConfig.mode named 'rmss'; nearest: rms", lambda: replace(CONV, mode='rmss')),
    ("is not 'kl', 'rms' or 'discrete'", lambda: replace(TINY, mode='sphere')),
    ('weighs kl, but the latent of conv-tiny-f8d16 is on a sphere; leave it out', lambda: check_stage(build(replace(CONV, mode='rms')), KL)),
    ('on a sphere', lambda: check_stage(build(replace(SMALL, mode='rms')), KL))])
def test_a_regulariser_that_cannot_be_is_one_line(says, make): one_line(says, make)


# noise for the decoder ---------------------------------------------------------------------------------------------------------------------------

NOISES = {'rae': dict(kind='add', law='uniform', scale=.8), 'gae': dict(kind='add', law='normal', scale=.25),
          'l-detok': dict(kind='mix', law='uniform', scale=3.)}
PIXELS = {'vfmvae': dict(l1=1., multiscale=.1, kl=1e-6, vf=1.), 'conv': dict(l1=1., kl=1e-6, vf=1.), 'plain': dict(l1=1., kl=1e-6), 'rae': dict(l1=1.)}
CLEAN = CONFIGS | dict(rae=replace(FROZEN, tau=0.))


@pytest.mark.parametrize('family', CONFIGS)
def test_a_stage_without_noise_decodes_the_sample_to_the_bit(family):
    tok, x = build(CONFIGS[family]).train(), images()
    code, z, pictures, _ = forward_training(tok, x, draws=draws())
    again = tok.encode_parts(x, draws=draws()).posterior.sample(draws())
    assert torch.equal(z, again) and all(torch.equal(a, b) for a, b in zip(pictures, tok.decode_scales(again), strict=True))
    assert 'noise' in Stage('s', PIXELS[family], ()).config() and Stage('s', PIXELS[family], ()).noise is None


@pytest.mark.parametrize('family, kind', [('vfmvae', 'l-detok'), ('conv', 'gae'), ('plain', 'rae'), ('rae', 'l-detok'), ('rae', 'rae')])
def test_noise_reaches_the_decoder_alone_and_is_that_of_its_images(family, kind):
    stage = Stage('s', PIXELS[family], (), noise=NOISES[kind])
    clean, noisy, again, other = (step(build(CLEAN[family]), replace(stage, noise=n), seed)
                                  for n, seed in ((None, 0), (stage.noise, 0), (stage.noise, 0), (stage.noise, 1)))
    assert noisy == again and noisy['l1'] != clean['l1'] and (noisy['l1'] != other['l1'])
    assert [noisy.get(k) for k in ('kl', 'vf')] == [clean.get(k) for k in ('kl', 'vf')]          # of the clean latent
    x = images()
    tok, same = build(CLEAN[family]), build(CLEAN[family])
    with torch.no_grad(): forward_training(tok.train(), x, draws=draws(), noise=stage.noise)
    assert all(torch.equal(v, fit_stats(same.eval(), x).state_dict()[k]) for k, v in fit_stats(tok.eval(), x).state_dict().items())


def test_noise_is_in_units_of_the_clean_channels():
    z = 5 + torch.tensor([1., 10.])[:, None, None]*torch.randn(2, 2, 64, 64, generator=torch.Generator().manual_seed(0))
    z = z.requires_grad_()
    for noise in NOISES.values():
        y = add_noise(z, draws=draws(), **noise)
        got = (y-z).flatten(2).std(2)/z.flatten(2).std(2)
        torch.testing.assert_close(got[:, 0], got[:, 1], atol=.03, rtol=.05)
        assert torch.autograd.grad(y.sum(), z)[0].max() <= 1                                    # its size has no gradient
    s, n = noise_levels(z, 'uniform', 1., draws()), normal_like(z, draws())
    mean, std = (f((0, 2, 3), keepdim=True) for f in (z.mean, partial(z.std, correction=0)))
    torch.testing.assert_close(y, mean + std*((1-s)*(z-mean)/std + s*3*n))                      # l-DeTok, on the normalised latent
    assert torch.equal(add_noise(z[:1], draws=draws(n=1), like=z), add_noise(z, draws=draws())[:1])


def test_an_raes_own_tau_is_the_same_noise_inside():
    tok, x = build(FROZEN).train(), images()
    parts, clean = tok.encode_parts(x, draws=draws()), build(replace(FROZEN, tau=0.)).train().encode_parts(x).posterior
    sigma = noise_levels(clean.mean, 'uniform', FROZEN.tau, draws())
    assert torch.equal(sigma, (.8*draws().uniform('sigma'))[:, None, None, None]) and clean.logvar is None
    assert torch.equal(parts.raw.logvar, (2*sigma.clamp(min=1e-6).log()).expand_as(clean.mean))
    torch.testing.assert_close(parts.posterior.sample(draws()), clean.mean + sigma*normal_like(clean.mean, draws(), 'posterior'))


@pytest.mark.parametrize('family', ['vfmvae', 'rae'])
def test_a_run_with_noise_stops_and_resumes_to_the_bit(family, tmp_path):
    resumes(lambda seed: TokenizerTask(build(CLEAN[family], seed), Stage('s', PIXELS[family], (), noise=NOISES['l-detok']), half_life=100), tmp_path)


@pytest.mark.parametrize('says, noise', [
    ("give dict.kind='add'", 'add'), ("give dict.kind='add'", dict(kind='add')), ("give dict.kind='add'", dict(NOISES['rae'], sigma=1.)),
    ("no kind of noise named 'ad'", dict(NOISES['rae'], kind='ad')), ("no law of noise named 'gauss'", dict(NOISES['rae'], law='gauss')),
    ("no law of noise named 'normal'.*known: uniform", dict(NOISES['l-detok'], law='normal')), ('scale of its noise', dict(NOISES['rae'], scale=0)),
    ('scale of its noise', dict(NOISES['rae'], scale='x')), ('scale of its noise', dict(NOISES['rae'], scale=float('nan')))])
def test_noise_that_cannot_be_is_one_line(says, noise): one_line(says, lambda: Stage('s', dict(l1=1.), (), noise=noise))


def test_two_noises_at_once_are_refused():
    one_line('set its tau=0', lambda: check_stage(build(FROZEN), Stage('s', dict(l1=1.), (), noise=NOISES['rae'])))


# predicting the clean latent ---------------------------------------------------------------------------------------------------------------------

TINY_NET = dict(in_channels=4, num_classes=3, patch_size=2, hidden_size=32, depth=2, num_heads=2)
def net_of(seed=0, **how):
    torch.manual_seed(seed)
    net = DiT(DiTConfig(**TINY_NET | how))
    for p in net.parameters():
        if not p.any(): torch.nn.init.normal_(p, std=.05)
    return net


class Latents:
    "Latents in memory, with the pictures that they would be of."
    augment, shape = False, (4, 8, 8)
    def __init__(self, n=8, **how): self.mean, self.label, self.pictures = rand(0, n, 4, 8, 8), torch.arange(n) % 3, images(n)
    def __len__(self): return len(self.mean)
    def batch(self, at): return dict(mean=self.mean[[*at]], label=self.label[[*at]], key=[str(i) for i in at], image=self.pictures[[*at]])


def rand(seed, *shape): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
def guess(z, t, y): return .3*z + 1


@pytest.mark.parametrize('path', ['linear', 'gvp'])
def test_the_weighted_error_of_data_is_that_of_the_velocity_it_implies(path):
    z, noise, out = (rand(i, 6, 4, 3, 3).double() for i in range(3))
    t = torch.tensor([.01, .049, .05, .1, .6, .99], dtype=torch.float64)
    got = prediction_error(out, z, noise, t, path, 'data', 'velocity')
    implied = convert(out, interpolate(z, noise, t, path)[0], t, 'data', 'velocity', path)
    torch.testing.assert_close(got[2:], prediction_error(implied, z, noise, t, path)[2:])
    if path == 'linear':
        torch.testing.assert_close(got, prediction_error(out, z, noise, t, path, 'data')/t.clamp(min=.05)**2)
        clamped = (interpolate(z, noise, t)[0]-out)/t.clamp(min=.05).view(-1, 1, 1, 1), (interpolate(z, noise, t)[0]-z)/t.clamp(min=.05).view(-1, 1, 1, 1)
        torch.testing.assert_close(got, (clamped[0]-clamped[1]).square().flatten(1).mean(1))             # RAEv2's own two lines


def test_sampling_divides_a_prediction_of_data_by_the_same_number():
    y, z = torch.zeros(2, dtype=torch.int64), rand(0, 2, 4, 3, 3)
    for t in (.001, .03, .05, .4): torch.testing.assert_close(velocity_field(guess, y, predict='data')(z, t), (z-guess(z, t, y))/max(t, .05))
    net = net_of(predict='data', base_depth=1).eval()
    z = rand(1, 2, 4, 8, 8)
    level, read = torch.full((2,), .02), lambda out: (z-out)/.05
    with torch.no_grad(): out = net(z, level, y, layers=())
    torch.testing.assert_close(velocity_field(net, y)(z, .02), read(out.v))
    torch.testing.assert_close(_guided(net, y, None, Sampler(2, guidance=1.5, weak='base'), None)(z, .02), read(out.base) + 1.5*(read(out.v)-read(out.base)))
    assert torch.equal(velocity_field(net, y, predict='velocity')(z, .02), out.v)


def test_a_net_that_predicts_data_learns_samples_and_comes_back(tmp_path):
    flow = FlowConfig(predict='data', weighting='velocity', lr=1e-3, clip=1.)
    assert build_config(FlowConfig, json.loads(json.dumps(asdict(flow)))) == replace(flow, laws=(('uniform', 0),))
    task = FlowTask(net_of(predict='data'), flow)
    rows = fit(task, loader(Latents(), 8), 8*30, log_every=10, show=lambda h: None)
    assert rows[-1]['flow'] < rows[0]['flow']
    again = DiT.load(save_net(tmp_path/'net.safetensors', task.net.eval()))
    assert again.config.predict == 'data' and torch.equal(sample_latents(again, [0, 1], (4, 8, 8), sampler=Sampler(3)),
                                                          sample_latents(task.net, [0, 1], (4, 8, 8), sampler=Sampler(3)))
    as_velocity = net_of(predict='velocity').eval()
    as_velocity.load_state_dict(again.state_dict())
    assert not torch.allclose(sample_latents(again, [0], (4, 8, 8), sampler=Sampler(3)), sample_latents(as_velocity, [0], (4, 8, 8), sampler=Sampler(3)))


def test_a_velocity_net_learns_and_samples_as_before_the_switch():
    z, y, noise, t = rand(0, 3, 4, 8, 8), torch.tensor([0, 1, 2]), rand(1, 3, 4, 8, 8), torch.tensor([.001, .3, .9])
    z_t, v = interpolate(z, noise, t)
    net = net_of().eval()
    want = (net(z_t, t, y)-v).square().flatten(1).mean(1)
    assert torch.equal(flow_loss(net, z, y, t=t, noise=noise)['per_sample'], want)
    task = FlowTask(net, FlowConfig())
    with torch.no_grad(): assert torch.equal(task.terms(dict(mean=z, label=y), t=t, noise=noise, net=net.eval())['per_sample'], want)
    assert torch.equal(velocity_field(net, y)(z, .01), net(z, torch.full((3,), .01), y))
    assert build_config(FlowConfig, without(FlowConfig(), *NEW)) == FlowConfig() and build_config(DiTConfig, without(DiTConfig(), *NEW)) == DiTConfig()
NEW = 'weighting', 'predict', 'spatial', 'projector', 'optimizer'


@pytest.mark.parametrize('says, make', [
    ("no weighting named 'likelihood'", lambda: prediction_error(*(torch.zeros(1, 2),)*3, torch.zeros(1), predict='data', weighting='likelihood')),
    ('velocity has no weighting; leave it out', lambda: prediction_error(*(torch.zeros(1, 2),)*3, torch.zeros(1), weighting='velocity')),
    ('no weighting of a predicted velocity', lambda: FlowConfig(weighting='velocity')),
    ("no weighting of a predicted data named 'likelihood'", lambda: FlowConfig(predict='data', weighting='likelihood')),
    ("'datum' is none of velocity", lambda: DiTConfig(predict='datum')),
    ('a net predicts the velocity', lambda: DiTConfig(predict='data', data_time=True)),
    ('give both the same', lambda: FlowTask(net_of(), FlowConfig(predict='data')))])
def test_a_prediction_that_cannot_be_is_one_line(says, make): one_line(says, make)


# iREPA -------------------------------------------------------------------------------------------------------------------------------------------

REPA = dict(z_dims=(128,), projector_dim=8, encoder_depth=1)
IREPA = FlowConfig(FLOW_WEIGHTS['irepa'], spatial=1., lr=1e-3)
def outputs(net, z): return net(z, torch.full((len(z),), .4), torch.zeros(len(z), dtype=torch.int64), layers=[0])


def test_the_projector_of_irepa_is_one_convolution_on_the_grid():
    net, z = net_of(**REPA, projector='conv').eval(), rand(0, 2, 4, 4, 8)
    out = outputs(net, z)
    want = net.projectors[0](out.tokens[0].transpose(1, 2).unflatten(2, (2, 4))).flatten(2).transpose(1, 2)
    assert torch.equal(out.projections[0], want) and net.projectors[0].weight.shape == (128, 32, 3, 3)
    plain = net_of(**REPA).eval()
    assert torch.equal(outputs(plain, z).projections[0], plain.projectors[0](outputs(plain, z).tokens[0]))


def test_the_target_of_irepa_is_normed_over_the_tokens_of_each_image():
    h = 5 + rand(0, 2, 16, 7)*torch.arange(1, 8)
    for a in (0., .6, 1.): torch.testing.assert_close(spatial_norm(h, a), (h-a*h.mean(1, keepdim=True))/(h.std(1, correction=0, keepdim=True)+1e-6))
    vfm, batch = VFM('tiny'), Latents().batch(range(2))
    tasks = {k: FlowTask(net_of(**REPA, projector='conv'), f, [vfm]) for k, f in dict(new=IREPA, old=replace(IREPA, spatial=None)).items()}
    how = dict(t=torch.tensor([.3, .6]), noise=rand(3, 2, 4, 8, 8))
    with torch.no_grad():
        got = {k: t.terms(batch, net=t.net.eval(), **how) for k, t in tasks.items()}
        p = outputs_at(tasks['old'].net, batch, **how)
        tokens = vfm_targets(vfm, batch['image'], (4, 4))[1]
    assert torch.equal(got['old']['repa'], repa_loss(p, [tokens])) and torch.equal(got['new']['repa'], repa_loss(p, [spatial_norm(tokens)]))
    assert torch.equal(got['new']['loss'], got['new']['flow'] + got['new']['repa'])


def outputs_at(net, batch, t, noise): return net(interpolate(batch['mean'], noise, t)[0], t, batch['label'], layers=()).projections


def test_a_net_of_irepa_learns_and_comes_back(tmp_path):
    task = FlowTask(net_of(**REPA, projector='conv'), IREPA, [VFM('tiny')])
    assert build_config(FlowConfig, json.loads(json.dumps(asdict(IREPA)))) == IREPA
    rows = fit(task, loader(Latents(), 8), 8*20, log_every=5, show=lambda h: None)
    assert rows[-1]['repa'] < rows[0]['repa']
    again = DiT.load(save_net(tmp_path/'net.safetensors', task.net.eval()))
    a, b = (outputs(net, rand(0, 1, 4, 8, 8)).projections[0] for net in (again, task.net))
    assert again.config == task.net.config and torch.equal(a, b)


@pytest.mark.parametrize('says, make', [
    ("'convolution' is none of mlp, conv", lambda: DiTConfig(projector='convolution')),
    ('no place on a grid', lambda: DiTConfig(z_dims=(8,), cls_dim=8, projector='conv')),
    ("weigh 'repa' too, or leave it None", lambda: FlowConfig(spatial=1.)),
    ('FlowConfig.spatial', lambda: replace(IREPA, spatial=2.)), ('FlowConfig.spatial', lambda: replace(IREPA, spatial='x'))])
def test_an_alignment_that_cannot_be_is_one_line(says, make): one_line(says, make)


# Muon --------------------------------------------------------------------------------------------------------------------------------------------

def same_start(): return nn.ModuleDict(dict(a=nn.Linear(6, 4), b=nn.Conv2d(2, 3, 3)))


def test_muon_moves_matrices_and_adamw_the_rest_as_each_does_alone():
    torch.manual_seed(0)
    net = same_start()
    twin = same_start()
    twin.load_state_dict(net.state_dict())
    opt = MuonAdamW(net.parameters(), .01, (.8, .95), .1)
    flat, rest = ([p for p in twin.parameters() if (p.ndim == 2) == two] for two in (True, False))
    alone = torch.optim.Muon(flat, lr=.01, weight_decay=.1, adjust_lr_fn='match_rms_adamw'), torch.optim.AdamW(rest, .01, (.8, .95), weight_decay=.1)
    for i in range(3):
        for n, optimizers in ((net, [opt]), (twin, alone)):
            for j, p in enumerate(n.parameters()): p.grad = rand(10*i+j, *p.shape)
            for o in optimizers: o.step()
    assert len(flat) == 1 and all(torch.equal(a, b) for a, b in zip(net.parameters(), twin.parameters(), strict=True))
    for g in opt.param_groups: g['lr'] = 0.
    kept = [p.detach().clone() for p in net.parameters()]
    opt.step()
    assert all(torch.equal(a, b) for a, b in zip(kept, net.parameters(), strict=True))            # a schedule reaches both
    for some in ([flat[0]], rest): assert len(MuonAdamW(some, .01).param_groups) == 1


def test_a_net_trained_with_muon_stops_and_resumes_to_the_bit(tmp_path):
    make = lambda seed: FlowTask(net_of(seed), FlowConfig(optimizer='muon', lr=1e-3, clip=1., ema=.9))
    task = resumes(make, tmp_path, loader(Latents(), 2))
    assert isinstance(task.optimizers['net'], MuonAdamW) and task.config()['flow']['optimizer'] == 'muon'
    with pytest.raises(UserError, match='flow.optimizer: muon there, adamw here'):
        fit(FlowTask(net_of(), FlowConfig(lr=1e-3, clip=1., ema=.9)), loader(Latents(), 2), 16, run=Run(tmp_path/'a'), show=lambda h: None)


def test_a_tokenizer_trained_with_muon_stops_and_resumes_to_the_bit(tmp_path):
    task = resumes(lambda seed: TokenizerTask(build(FROZEN, seed), Stage('s', PIXELS['rae'], ()), half_life=100, optimizer='muon'), tmp_path)
    assert any('momentum_buffer' in s for s in task.optimizers['model'].state.values())


def test_the_optimizers_from_before_the_switch_are_those_of_today(tmp_path):
    task, net = TokenizerTask(build(FROZEN), Stage('s', PIXELS['rae'], ())), FlowTask(net_of(), FlowConfig())
    assert type(task.optimizers['model']) is torch.optim.Adam and type(net.optimizers['net']) is torch.optim.AdamW
    group, = task.optimizers['model'].param_groups
    assert (group['betas'], group['eps'], group['lr']) == ((0., .99), 1e-8, 1e-4) and net.optimizers['net'].param_groups[0]['fused']
    class Old(FlowTask):
        def config(self):
            found = super().config()
            return found | dict(flow={k: v for k, v in found['flow'].items() if k not in NEW}, net={k: v for k, v in found['net'].items() if k not in NEW})
    fit(Old(net_of(), FlowConfig()), loader(Latents(), 4), 8, run=Run(tmp_path/'old'), show=lambda h: None)
    fit(FlowTask(net_of(1), FlowConfig()), loader(Latents(), 4), 16, run=Run(tmp_path/'old'), show=lambda h: None)     # an old run goes on


def test_an_optimizer_that_cannot_be_is_one_line(monkeypatch):
    one_line("no optimizer of FlowConfig.optimizer named 'mon'", lambda: FlowConfig(optimizer='mon'))
    one_line("no optimizer named 'sgd'", lambda: TokenizerTask(build(FROZEN), KL, optimizer='sgd'))
    monkeypatch.delattr(torch.optim, 'Muon')
    one_line("install torch 2.9 or later, or choose optimizer='adamw'", lambda: FlowTask(net_of(), FlowConfig(optimizer='muon')))


# PAE's losses ------------------------------------------------------------------------------------------------------------------------------------

PRIOR = dict(ssr=.2, scr=1., mcr=.5)
AIMED = {k: replace(CONFIGS[k], target=True) for k in ('vfmvae', 'conv')}
PAE = {k: Stage('pae', PIXELS[k] | PRIOR, (), lr=1e-3) for k in CONFIGS}


def test_the_losses_of_pae_are_what_their_formulas_say():
    z, t = rand(0, 2, 6, 4, 4), rand(1, 2, 6, 4, 4)
    g = [(n := F.normalize(x.flatten(2), dim=1)).mT@n for x in (z, t)]
    torch.testing.assert_close(ssr_loss(z, t), (g[0]-g[1]).square().mean())
    assert torch.equal(distance_matrix(z, t, .1), F.relu((g[0]-g[1]).abs()-.1).mean())                    # the loss that shares its lines, as it was
    cos = F.cosine_similarity(z, t, dim=1).mean(), F.cosine_similarity(z.mean((2, 3)), t.mean((2, 3)), dim=1).mean()
    torch.testing.assert_close(scr_loss(z, t), 2-sum(cos))
    assert ssr_loss(2*z, z) < 1e-10 and scr_loss(2*z, z).abs() < 1e-5
    middle, large = moved_latents(z, draws=draws())
    for m, angle in ((middle, 42.5), (large, 85.)):
        torch.testing.assert_close(F.cosine_similarity(m, z, dim=1).acos().rad2deg(), torch.full((2, 4, 4), angle))
        torch.testing.assert_close(m.norm(dim=1), z.norm(dim=1))
    assert torch.equal(moved_latents(z, draws=draws())[1], large) and not torch.equal(moved_latents(z, draws=draws(1))[1], large)
    flat = torch.stack([F.normalize(x, dim=1) for x in (z, middle, large)]).flatten(3)                    # one direction for both: they lie in a plane
    assert torch.linalg.matrix_rank(flat.permute(1, 3, 0, 2), tol=1e-4).max() == 2


def test_the_target_is_the_principal_components_of_the_first_batch_and_stays():
    torch.manual_seed(0)
    target, a = PriorTarget(7, 3), rand(0, 4, 7, 5, 5)*torch.arange(1., 8)[:, None, None] + 3
    assert not target.eval()(a).any() and target.train() and target(a).any()
    x = a.transpose(0, 1).flatten(1).T
    want = torch.linalg.svd(x-x.mean(0), full_matrices=False)[2][:3]
    torch.testing.assert_close((target.axes@want.T).abs(), torch.eye(3), atol=1e-4, rtol=1e-4)
    kept = target(a)
    target(5*a)
    assert torch.equal(target(a), kept)
    one_line('no 8 principal components', lambda: PriorTarget(7, 8))


@pytest.mark.parametrize('family', AIMED)
def test_a_run_with_paes_losses_stops_and_resumes_to_the_bit_and_the_next_stage_keeps_its_target(family, tmp_path):
    task = resumes(lambda seed: TokenizerTask(build(AIMED[family], seed), PAE[family], half_life=100), tmp_path)
    axes = task.model.prior_target.axes.clone()
    assert axes.any() and torch.equal(task.ema.net.prior_target.axes, axes)
    state, _ = read_nets(tmp_path/'a')
    later = TokenizerTask(build(AIMED[family], 1), replace(PAE[family], name='later'), half_life=100)
    load_nets(later, state)
    logs = later.step([dict(image=images(), draws=draws())], lambda loss: loss.backward(), lambda ok=True: ok, 2)
    assert {'ssr', 'scr', 'mcr'} <= {*logs} and torch.equal(later.model.prior_target.axes, axes)
    again = load_tokenizer(save_tokenizer(tmp_path/'t.safetensors', task.model.eval()))
    assert torch.equal(again.prior_target.axes, axes) and again.config.target


def test_each_loss_of_pae_falls_when_it_is_asked_for():
    for k in ('ssr', 'scr', 'mcr'):
        task = TokenizerTask(build(replace(CONV, target=True)), Stage('s', {'l1': .01, k: 1.}, (), lr=2e-3), half_life=100, betas=(.9, .99))
        rows = fit(task, loader(World(8), 4), 4*12, log_every=4, show=lambda h: None)
        assert rows[-1][k] < rows[0][k], k


@pytest.mark.parametrize('family', ['plain', 'rae'])
def test_continuity_needs_no_target(family):
    seen = []
    logs = step(build(CLEAN[family]), Stage('s', dict(l1=1., mcr=1.), ()), perceptual=lambda x, y: seen.append(y.requires_grad) or (x-y).square().mean())
    assert logs['mcr'] > 0 and seen == [False, False]
    assert logs['mcr'] > step(build(CLEAN[family]), Stage('s', dict(l1=1., mcr=1.), ()))['mcr']           # perception counts where it is given


def test_files_without_a_target_are_read_as_they_were():
    for config, new in ((SMALL, AIMED['vfmvae']), (CONV, AIMED['conv'])):
        assert build_config(type(config), without(config, 'target')) == config
        plain, aimed = build(config).own_state(), build(new).own_state()
        assert {*aimed}-{*plain} == {'prior_target.mean', 'prior_target.axes'} and all(torch.equal(v, aimed[k]) for k, v in plain.items())


@pytest.mark.parametrize('says, make', [
    ('weighs scr and ssr; build a VFM-VAE or an aligned convolutional VAE with target=True', lambda: check_stage(build(CONV), PAE['conv'])),
    ('with target=True', lambda: check_stage(build(FROZEN), PAE['rae'])),
    ('looks at no VFM; give vfm', lambda: replace(PLAIN, target=True)),
    ('a target needs layer -1', lambda: replace(SMALL, target=True, align=False, layers=(0, 2, 3))),
    ("no loss named 'srs'", lambda: Stage('s', dict(srs=1.)))])
def test_losses_of_pae_that_cannot_be_are_one_line(says, make): one_line(says, make)


# EQ-VAE by its name ------------------------------------------------------------------------------------------------------------------------------

def test_the_prior_of_eq_vae_has_a_name():
    named = Stage('s', dict(l1=1.), equivariance='eq-vae')
    assert named == Stage('s', dict(l1=1.), equivariance=SCALES) == Stage('s', dict(l1=1.), equivariance=EQUIVARIANCE['eq-vae'])
    assert json.loads(json.dumps(named.config()))['equivariance'] == list(SCALES) and Stage('s', dict(l1=1.)).equivariance == ()
    drawn = [sample_equivariance(named.equivariance, Draws(0, [0], step=i)) for i in range(4000)]
    half, shrunk = (sum(map(f, drawn))/4000 for f in (lambda w: not w.prior, lambda w: w.prior and w.scale < 1))
    assert abs(half-.5) < .03 and abs(shrunk-.5*.25) < .02                                                # published: prior .5, its scale .25
    one_line("no equivariance named 'eqvae'; nearest: eq-vae", lambda: Stage('s', dict(l1=1.), equivariance='eqvae'))
