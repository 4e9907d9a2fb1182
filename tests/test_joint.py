"""A tokenizer and a net that learn together (REPA-E): each half of the step against one written down plainly, with torch's own batch norm; what a step that
fails, a run that stops, a file that is read again must keep."""
import math
from dataclasses import replace
from functools import partial

import pytest
import smoke
import torch
from torch import nn

from fakecuda import clear, CUDA, cuda, SYNC
from vfmvae.core import Draws, UserError
from vfmvae.data import loader
from vfmvae.files import data_dir
from vfmvae.flow import flow_loss, FlowTargets, interpolate, repa_loss, sample_t
from vfmvae.flow_task import vfm_targets
from vfmvae.generation import generate, JOINT, open_net, train_jointly
from vfmvae.presets import FLOW_PRESETS, PRESETS
from vfmvae.recipes import build_training, train_tokenizer
from vfmvae.run import load_task_state, Run, task_state
from vfmvae.runtime import device_of
from vfmvae.tokenizer import load_tokenizer, reconstruct
from vfmvae.tokenizer_task import TokenizerTask
from vfmvae.train import fit, NotFinite
from vfmvae.vfm import VFM
from vfmvae.world import World

quiet = dict(show=lambda h: None)
BASE, NET, PLAIN = FLOW_PRESETS['dit-conv-tiny-f8d16'], smoke.JOINT_NET, smoke.JOINT_STAGE
task_of = smoke.joint_task


def batch_of(n=4, seed=3): return dict(World(n, seed=5).batch(range(n)), draws=Draws(seed, range(n)))


def plain_sync(values=True): return values


@pytest.mark.parametrize('preset', ['conv-tiny-f8d16', 'tiny'])
def test_each_half_moves_its_own_by_its_own_losses(preset):
    task, b = task_of(preset), batch_of()
    task.norm.running_mean.normal_(generator=torch.Generator().manual_seed(1))
    task.norm.running_var.uniform_(.5, 2, generator=torch.Generator().manual_seed(2))
    norm = nn.BatchNorm2d(16, eps=1e-4, momentum=.1, affine=False)
    norm.load_state_dict(task.norm.state_dict())
    terms = task._model_terms(0, b, b['draws'].named('model'), len(b['label']))
    terms['loss'].backward()
    model, net = task.nets['model'], task.nets['net']
    got = {k: p.grad.clone() for k, p in [*model.trainable().items(), *net.named_parameters()] if p.grad is not None}
    for p in [*model.parameters(), *net.parameters()]: p.grad = None

    draws = b['draws'].named('model')
    z = model.encode_parts(b['image'], model.vfm_features(b['image']), draws).posterior.sample(draws)
    again = draws.named('net')
    t = sample_t(4, **NET.flow.law(0) if isinstance(NET.flow.law(0), dict) else dict(law=NET.flow.law(0)), generator=again)
    noise, drop = again.normal('noise', z.shape[1:]), again.uniform('label') < NET.net.label_dropout
    targets = FlowTargets(tokens=[vfm_targets(VFM('tiny'), b['image'], (4, 4))[1]])
    # the tokenizer: the norm and the net as they are
    seen = net(interpolate(norm.eval()(z), noise, t)[0], t, b['label'], None, drop, layers=())
    for p in model.trainable().values(): p.grad = None
    loss = (model.decode_scales(z)[0]-b['image']).abs().mean() + 1.5*repa_loss(seen.projections, targets.tokens)
    wanted = dict(zip(model.trainable(), torch.autograd.grad(loss, [*model.trainable().values()], allow_unused=True), strict=True))
    # the net: the same latents, cut off, normed by their batch
    of_net = flow_loss(lambda x, t, y: net(x, t, y, None, drop, layers=()), norm.train()(z.detach()), b['label'], NET.flow.weights, t, noise, targets=targets)
    own = [(k, p) for k, p in net.named_parameters() if p.requires_grad]
    wanted |= dict(zip([k for k, _ in own], torch.autograd.grad(of_net['loss'], [p for _, p in own], allow_unused=True), strict=True))
    wanted = {k: g for k, g in wanted.items() if g is not None}
    assert {k for k in wanted if wanted[k].any()} <= {*got} <= {*wanted}
    for k, g in got.items(): assert torch.allclose(g, wanted[k], atol=1e-5+1e-4*wanted[k].abs().max().item()), k
    assert torch.allclose(terms['loss'], loss+of_net['loss'], atol=1e-5)
    for k in ('running_mean', 'running_var'): assert torch.allclose(getattr(task.norm, k), getattr(norm, k), atol=1e-5), k


def test_the_loss_of_the_flow_does_not_reach_the_tokenizer():
    task, b = task_of(), batch_of()
    own = task._model_terms(0, b, None, 4)['net_loss']
    assert torch.autograd.grad(own, [*task.nets['model'].trainable().values()], allow_unused=True) == (None,)*len(task.nets['model'].trainable())


def test_it_stops_and_goes_on_as_the_straight_run(tmp_path):
    how = dict(seed=3, log_every=1, save_every=2, **quiet)
    feed = loader(World(24), 4)
    straight, stopped, again = task_of(), task_of(), task_of()
    rows = fit(straight, feed, 4*4, **how)
    fit(stopped, feed, 4*2, Run(tmp_path/'run'), **how)
    resumed = fit(again, feed, 4*4, Run(tmp_path/'run'), **how)
    (a, _), (b, _) = task_state(straight), task_state(again)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert [r['loss'] for r in rows] == [r['loss'] for r in resumed] and {'grad_norm_net', 'net_flow', 'net_repa', 'repa', 'l1'} <= rows[-1].keys()
    assert any('norm' in k for k in a) and any('net_average' in k for k in a)
    other = task_of(net=replace(NET, flow=replace(NET.flow, lr=3e-4)))
    with pytest.raises(UserError, match=r'flow\.flow\.lr'): fit(other, feed, 4*6, Run(tmp_path/'run'), **how)


@pytest.mark.parametrize('what', ['picture', 'net', 'tokenizer'])
def test_a_step_that_fails_changes_nothing(what):
    task, b = task_of(), batch_of()
    task.step([b], lambda loss: loss.backward(), plain_sync, 4)
    if what == 'picture': b = dict(b, image=torch.full_like(b['image'], math.nan))
    else: next(p for p in task.nets[dict(net='net', tokenizer='model')[what]].parameters() if p.requires_grad).data.view(-1)[0] = math.inf
    before, state = task_state(task)
    before = {k: v.clone() for k, v in before.items()}
    with pytest.raises(NotFinite): task.step([b], lambda loss: loss.backward(), plain_sync, 8)
    after, _ = task_state(task)
    assert all(torch.equal(before[k], after[k]) for k in before) and before.keys() == after.keys()
    assert all(p.grad is None and p.requires_grad for o in task.optimizers.values() for g in o.param_groups for p in g['params'])
    if what == 'picture': load_task_state(task, before, state)


def test_the_published_stage_has_a_discriminator_that_learns_too():
    task, b = task_of(stage=JOINT), batch_of()
    was = {k: [p.detach().clone() for p in n.parameters() if p.requires_grad] for k, n in task.nets.items() if k != 'norm'}
    logs = task.step([b], lambda loss: loss.backward(), plain_sync, 4)
    for k in ('model', 'gan', 'net'):
        assert any(not torch.equal(p, q) for p, q in zip(was[k], [p for p in task.nets[k].parameters() if p.requires_grad], strict=True)), k
    assert {'l1', 'perceptual', 'gan', 'kl', 'repa', 'net_flow', 'net_repa', 'gan_real', 'grad_norm', 'grad_norm_net', 'grad_norm_d'} <= logs.keys()


def note_length(optimizer, into, name):
    "Instead of a step: how long its gradients are together."
    into[name] = torch.cat([p.grad.flatten() for g in optimizer.param_groups for p in g['params'] if p.grad is not None]).norm().item()


def test_lengths_of_gradients_are_clipped_each_by_its_own():
    b, found = batch_of(), {}
    for clip in (None, 1e-3):
        task = task_of(net=replace(NET, flow=replace(NET.flow, clip=clip)))
        steps = {}
        for k, o in task.optimizers.items(): o.step = partial(note_length, o, steps, k)
        found[clip] = task.step([b], lambda loss: loss.backward(), plain_sync, 4), steps
    (logs, free), (clipped, short) = found[None], found[1e-3]
    assert logs == clipped and abs(free['model']-short['model']) < 1e-6 and abs(free['net']-logs['grad_norm_net']) < 1e-5 and abs(short['net']-1e-3) < 1e-6


@pytest.mark.parametrize('mean', [0., 10., 100.])
def test_the_norm_is_torchs_own_wherever_the_mean_lies(mean):
    z = torch.randn(8, 16, 8, 8, generator=torch.Generator().manual_seed(0))*torch.logspace(-2, 0, 16)[:, None, None] + mean
    task, norm = task_of(), nn.BatchNorm2d(16, eps=1e-4, momentum=.1, affine=False).double()
    with torch.no_grad(): assert (task.normed(z, True)-norm(z.double())).abs().max() < 1e-6*max(1., 50*mean)     # .01: a step of rounding of 100 is 1e-5
    for k in ('running_mean', 'running_var'): torch.testing.assert_close(getattr(task.norm, k), getattr(norm, k).float(), rtol=1e-4, atol=1e-6)


def test_the_norm_becomes_the_scale():
    task, x = task_of(), World(12, seed=6).batch(range(12))['image']
    task.ema.net.stats.set(torch.linspace(-1, 1, 16), torch.linspace(.5, 2, 16))        # of a tokenizer that had one
    fit(task, loader(World(24), 4), 4*3, **quiet)
    with torch.no_grad():
        tok = task.ema.net.eval()
        z, y = task.normed(tok.encode(x).mode(), False), reconstruct(tok, x)
        done, net = task.finish()
        assert torch.allclose(done.encode(x).mode(), z, atol=1e-4) and torch.allclose(reconstruct(done, x), y, atol=1e-4)
    assert net is task.flow.ema.net and not net.training and not done.training


@pytest.fixture(scope='module')
def pair(tmp_path_factory):
    out = tmp_path_factory.mktemp('joint')/'net.safetensors'
    return out, *train_jointly('conv-tiny-f8d16', NET, World(24, seed=100), stage=PLAIN, num_images=16, batch_size=4, out=out, **quiet)


def test_a_pair_is_read_again_and_belongs_together(pair, tmp_path):
    out, tok, net, rows = pair
    beside = out.with_name('net-tokenizer.safetensors')
    want = generate(net, [0, 5], tokenizer=tok, steps=2).images
    assert torch.equal(generate(out, [0, 5], tokenizer=beside, steps=2).images, want) and rows[-1]['images'] == 16
    assert open_net(out).meta['recipe']['stage']['weights'] == PLAIN.weights and load_tokenizer(beside).stats.fitted
    with pytest.raises(UserError, match='another scale|other weights'): generate(out, [0], tokenizer='conv-tiny-f8d16', steps=2)
    # from there on: the tokenizer as any other, and the two once more
    with torch.no_grad(): assert load_tokenizer(beside).encode(World(2).batch([0])['image']).mode().shape == (1, 16, 8, 8)
    more, _, rows = train_jointly('conv-tiny-f8d16', NET, World(24, seed=100), start=beside, stage=PLAIN, num_images=4, batch_size=4, **quiet)
    assert more.stats.fitted and math.isfinite(rows[-1]['loss'])


def test_it_begins_where_the_preset_says(tmp_path):
    "As the stages of a tokenizer do; images are those of whole steps."
    begun, plain = (replace(PRESETS['conv-tiny-f8d16'], start=start) for start in ('conv-tiny-f8d16', None))
    how = dict(stage=PLAIN, num_images=6, batch_size=4, **quiet)
    _, net, rows = train_jointly(begun, NET, World(24, seed=100), **how)
    given = train_jointly(plain, NET, World(24, seed=100), start=data_dir()/'weights'/'conv-tiny-f8d16.safetensors', **how)[2]
    fresh = train_jointly(plain, NET, World(24, seed=100), **how)[2]
    assert rows[-1]['l1'] == given[-1]['l1'] < .6*fresh[-1]['l1'] and net.meta['recipe']['images'] == 4


@pytest.mark.parametrize('says, call', [
    ("weigh 'repa' in the stage", lambda: train_jointly('conv-tiny-f8d16', BASE, stage=PLAIN)),
    ("weigh 'repa' in the stage", lambda: train_jointly('conv-tiny-f8d16', NET, stage=replace(PLAIN, weights=dict(l1=1.)))),
    ('changes the size of latents', lambda: train_jointly('conv-tiny-f8d16', NET, stage=replace(PLAIN, equivariance=(.5, 1.)))),
    ('the latent of rae-tiny-f8d128 is fixed', lambda: train_jointly('rae-tiny-f8d128', replace(NET, net=replace(NET.net, in_channels=128)), stage=PLAIN)),
    ('latents .* for a net of 8 channels', lambda: train_jointly('conv-tiny-f8d16', replace(NET, net=replace(NET.net, in_channels=8)), World(8), stage=PLAIN,
                                                               num_images=4, batch_size=4, **quiet)),
    ('give one of classes', lambda: train_jointly('conv-tiny-f8d16', replace(FLOW_PRESETS['lumina-conv-tiny-f8d16'], flow=NET.flow, vfms=('tiny',),
                                     net=replace(FLOW_PRESETS['lumina-conv-tiny-f8d16'].net, z_dims=(128,), encoder_depth=1)), stage=PLAIN)),
    ("stage is 'gan'; give a Stage", lambda: train_jointly('conv-tiny-f8d16', NET, stage='gan')),
    ('leave shard out', lambda: train_jointly('conv-tiny-f8d16', NET, stage=PLAIN, shard=True)),
    ('weighs repa, which is of a net', lambda: train_tokenizer(replace(PRESETS['conv-tiny-f8d16'], stages=(replace(PLAIN, num_images=8),)), World(8),
                                                              batch_size=4, **quiet)),
    ('use train_flow', lambda: train_jointly('dit-conv-tiny-f8d16', NET)),
    ('use train_tokenizer', lambda: train_jointly('conv-tiny-f8d16', 'tiny'))])
def test_what_cannot_be_is_one_line(says, call):
    with pytest.raises(UserError, match=says) as e: call()
    assert '\n' not in str(e.value)


def test_a_stage_of_a_tokenizer_alone_is_as_it_was():
    "What came for the joint stage, at rest, moves nothing else: no other optimizer, no other term."
    torch.manual_seed(0)
    model, judges, perceptual = build_training(PRESETS['conv-tiny-f8d16'], [replace(PLAIN, weights=dict(l1=1.))])
    task = TokenizerTask(model, replace(PLAIN, weights=dict(l1=1.)), perceptual, discriminators=judges)
    logs = task.step([batch_of()], lambda loss: loss.backward(), plain_sync, 4)
    assert {*logs} == {'l1', 'loss', 'grad_norm'} and {*task.optimizers} == {'model'}


def test_both_learn_on_the_card_and_a_step_waits_once_a_descent():
    with cuda():
        task, feed = task_of(stage=JOINT), loader(World(24), 4, device='cuda')
        fit(task, feed, 4, **quiet)
        clear()
        fit(task, feed, 8, log_every=1000, **quiet)
        waits = {k: n for k, n in SYNC.items() if 'backward' not in k and ' write ' not in k and not ('_descend' in k and 'copy_' in k)}
        assert sum(waits.values()) <= 2*2, waits
        tok, net = task.finish()
        assert device_of(tok) == device_of(net) == tok.stats.mean.device == CUDA
        out = train_jointly('conv-tiny-f8d16', NET, World(8), stage=PLAIN, num_images=4, batch_size=4, **quiet)
        assert device_of(out[0]) == device_of(out[1]) == CUDA and generate(out[1], [0], tokenizer=out[0], steps=1).images.isfinite().all()
