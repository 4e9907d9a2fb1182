"""Laws of training: resuming, accumulation and several processes change nothing; what is not named does not move."""
import json, subprocess, sys, textwrap
import pytest, torch
from torch import nn
from dataclasses import replace
from functools import partial
from vfmvae.adversarial import PatchGAN, ProjectedDiscriminator
from vfmvae.core import UserError, load_weights
from vfmvae.data import World, loader
from vfmvae.losses import latent_transform, pixel, ssim_loss, target_transform
from vfmvae.tok_train import SCALES, STAGES, TINY, Settled, Stage, TokenizerTask, fitting_scales, select, tokenizer_losses
from vfmvae.train import NotFinite, Run, fit, load_nets, read_nets, task_state, warm_cosine
from vfmvae.vae import VFMVAE, VFMVAEConfig
from vfmvae.vfm import VFM

STAGE = Stage('test', dict(l1=1., multiscale=.1, kl=1e-6, vf=1.))


FULL = Stage('full', dict(l1=1., perceptual=1., multiscale=.1, kl=1e-6, vf=1., gan=.1, patchgan=.1, feature_matching=1.), equivariance=SCALES, warmup=('gan',))


def task(seed=0, stage=STAGE, **kw):
    torch.manual_seed(seed)
    return TokenizerTask(VFMVAE(TINY, VFM('tiny', pretrained=False)), stage, half_life=100, **kw)


def critics(**kw):
    torch.manual_seed(5)
    return dict(gan=ProjectedDiscriminator(VFM('tiny'), **kw), patchgan=PatchGAN(width=4))


def full(seed=0, stage=FULL, **kw): return task(seed, stage, perceptual=partial(pixel, p=2), critics=critics(), **kw)
def plain(history): return [{k: v for k, v in r.items() if k not in ('images_per_s', 'memory_gb')} for r in history]


def data(batch=4): return loader(World(64), batch)
def quiet(history): return None


def same(a, b):
    (x, _), (y, _) = task_state(a), task_state(b)
    return x.keys() == y.keys() and [k for k in x if not torch.equal(x[k], y[k])] == []


def test_cosine_cycles_are_one_cosine_after_another():
    one, two = warm_cosine(1., 50, 1, floor=.1), warm_cosine(1., 100, 1, floor=.1, cycles=2)
    for s in range(50): assert two(s) == pytest.approx(one(s)) and two(s+50) == pytest.approx(one(s))
    assert two(50) == pytest.approx(1.) and two(100) == two(500) == pytest.approx(.1)
    assert warm_cosine(1., 100, 10, cycles=2)(50) == pytest.approx(1.)       # warm once



def test_stop_and_resume_is_bitwise_the_straight_run(tmp_path):
    kw = dict(lr=warm_cosine(1e-3, 6), log_every=2, show=quiet)
    straight, stopped, resumed = task(), task(), task(seed=1)    # the VFM is not saved with a run, so it must be the same one
    resumed.model.vfm.load_state_dict(stopped.model.vfm.state_dict()); resumed.ema.net.vfm.load_state_dict(stopped.model.vfm.state_dict())
    a = fit(straight, data(), 24, run=Run(tmp_path/'a'), **kw)
    fit(stopped, data(), 16, run=Run(tmp_path/'b'), **kw)
    b = fit(resumed, data(), 24, run=Run(tmp_path/'b'), **kw)
    assert same(straight, resumed)
    assert plain(a) == plain(b)
    assert len(Run(tmp_path/'b').history()) == len(b)


def test_stop_and_resume_with_discriminators_and_a_warm_up_is_bitwise_the_straight_run(tmp_path):
    kw = dict(lr=warm_cosine(1e-3, 10), log_every=2, show=quiet)
    straight, stopped, resumed = full(), full(), full(seed=1)
    resumed.model.vfm.load_state_dict(stopped.model.vfm.state_dict())
    for t in (straight, stopped, resumed): t.waits['gan'] = Settled(9., 9., window=4, times=2)   # begins within the run: after 6 steps
    a = fit(straight, data(), 40, run=Run(tmp_path/'a'), **kw)
    fit(stopped, data(), 16, run=Run(tmp_path/'b'), **kw)
    assert not stopped.waits['gan'].done and stopped.waits['gan'].values
    b = fit(resumed, data(), 40, run=Run(tmp_path/'b'), **kw)
    assert same(straight, resumed) and plain(a) == plain(b)
    assert [('gan' in r) for r in a] == [False, False, False, True, True] and all('patchgan' in r for r in a)
    assert {n.split('.')[1] for n in task_state(straight)[0]} >= {'nets', 'optimizers', 'ema'} and len(straight.optimizers['critics'].state) > 0


def test_a_torn_checkpoint_is_not_resumed(tmp_path):
    run = Run(tmp_path/'a', keep=5)
    fit(task(), data(), 16, run=run, save_every=2, show=quiet)
    whole, torn = run.checkpoints()
    torn.with_suffix('.json').unlink()
    assert run.checkpoints() == [whole] and run.load(task()) == 2


def test_a_damaged_checkpoint_is_one_line(tmp_path):
    run = Run(tmp_path/'a')
    fit(task(), data(), 4, run=run, show=quiet)
    f = run.checkpoints()[-1]
    f.write_bytes(f.read_bytes()[:-100])
    with pytest.raises(UserError, match='whole safetensors') as e: run.load(task())
    assert '\n' not in str(e.value)


def test_another_configuration_is_refused(tmp_path):
    fit(task(), data(), 4, run=Run(tmp_path/'a'), show=quiet)
    with pytest.raises(UserError, match='another configuration'): fit(task(stage=Stage('other', dict(l1=1.))), data(), 8, run=Run(tmp_path/'a'), show=quiet)
    assert json.loads((tmp_path/'a/config.json').read_text())['task']['stage']['name'] == 'test'


def test_no_pickle_is_written(tmp_path):
    fit(task(), data(), 4, run=Run(tmp_path/'a'), show=quiet)
    assert {p.suffix for p in (tmp_path/'a').iterdir()} == {'.json', '.jsonl', '.safetensors'}
    tensors, meta = load_weights(Run(tmp_path/'a').checkpoints()[-1])
    assert not any('vfm.' in k for k in tensors) and meta['made']['versions']['torch'] == torch.__version__


@pytest.mark.parametrize('prefixes', [('ldm_adapter',), ('synthesis.blocks.3', 'synthesis.z_convs.3'), ('mapping', 'ldm_adapter.post_quant')])
def test_only_the_named_parameters_move(prefixes):
    t = task(stage=Stage('part', dict(l1=1., vf=1., kl=1e-6), train=prefixes, adaptive='ldm_adapter' in prefixes))
    named, start = set(select(t.model, prefixes)), {k: v.clone() for k, v in t.model.state_dict().items()}
    fit(t, data(), 8, show=quiet)
    moved = {k for k, v in t.model.state_dict().items() if not torch.equal(v, start[k])} - {'mapping.x_avg'}
    assert moved and moved <= named
    assert not any(k.startswith('vfm.') for k in moved)


# a norm or a softmax takes these away again: their gradient is rounding, or nothing
HIDDEN = ('dwconv.bias', 'proj.bias', 'main.0.0.bias', 'main.1.fn.0.bias', 'affine.proj.bias', 'null_kv', 'w2.bias')


@pytest.mark.parametrize('row', STAGES, ids=lambda s: s.name)
def test_a_published_stage_moves_what_it_names_and_nothing_else(row):
    t, state = full(stage=row), lambda: {f'{k}.{n}': v.clone() for k, net in t.nets.items() for n, v in net.state_dict().items()}
    for block in t.model.synthesis.blocks:                               # gamma and the attention's output are (nearly) 0 at birth and hide what is behind them
        block.conv0.gamma.data.fill_(1.)
        for a in getattr(block, 'self_attns', ()): torch.nn.init.normal_(a.attn.to_out.weight), torch.nn.init.normal_(a.ff[3].weight)
    start = state()
    fit(t, data(), 8, show=quiet)
    moved = {k for k, v in state().items() if not torch.equal(v, start[k])}
    buffers = {f'{k}.{n}' for k, net in t.nets.items() for n, _ in net.named_buffers()}
    wanted = {f'model.{k}' for k in select(t.model, row.train)} | {f'{k}.{n}' for k, c in t.critics.items() for n in c.trainable()}
    if 'vf' not in row.weights: wanted -= {'model.ldm_adapter.linear_proj.weight'}
    still = wanted - moved
    assert moved - buffers <= wanted and not [k for k in still if not k.endswith(HIDDEN)], still
    assert not any('.vfm.' in k for k in moved)


def test_stage_three_trains_the_blocks_above_32_px_and_their_branch():
    names = {k.split('.')[1]+'.'+k.split('.')[2] for k in select(task().model, STAGES[3].train)}
    assert names == {'blocks.3', 'z_convs.3'}
    large = VFMVAE(replace(TINY, img_size=128, blocks=5, stride=16, scale=.5, fusion=(128, 64, 32, 16), attention=(1,)))
    assert {'.'.join(k.split('.')[1:3]) for k in select(large, ['synthesis>32'])} == {'blocks.3', 'blocks.4', 'z_convs.3'}
    for bad in ('synthesis>64', 'synthesis>', 'mapping>32'):
        with pytest.raises(UserError, match='decoder blocks'): select(task().model, [bad])


def bad_at(*steps):
    "A perceptual loss that is not finite at some calls."
    calls = iter(range(10**6))
    return lambda y, x: pixel(y, x)*(float('inf') if next(calls) in steps else 1.)


def test_a_loss_that_is_not_finite_skips_the_step_and_says_so(tmp_path, capsys):
    run = Run(tmp_path/'a')
    t = task(stage=FULL, perceptual=bad_at(1, 2), critics=critics())
    history = fit(t, data(), 20, run=run, log_every=1, show=quiet, patience=3)
    skipped = [json.loads(x) for x in (run.dir/'skipped.jsonl').read_text().splitlines()]
    assert [r['step'] for r in skipped] == [2, 3] and all(r['terms'] == ['perceptual'] for r in skipped)
    assert skipped[0]['keys'] == data().batch_at(1)['key'] and 'perceptual' in capsys.readouterr().err
    assert [r.get('skipped', 0) for r in history] == [0, 1, 1, 0, 0]


def test_a_skipped_step_changes_nothing():
    for terms in (bad_at(0), lambda y, x: (y-y.detach()).abs().sqrt().sum()):           # an infinite loss; a finite one with an infinite slope
        t = task(stage=replace(FULL, warmup=()), perceptual=terms, critics=critics())
        start = {k: v.clone() for k, v in task_state(t)[0].items()}
        with pytest.raises(NotFinite, match='perceptual'): t.step([data().batch_at(0)], lambda x: x.backward(), lambda ok=True: ok, 4)
        end = task_state(t)[0]
        assert start.keys() == end.keys() and all(torch.equal(v, start[k]) for k, v in end.items())


def test_a_picture_that_is_not_finite_is_named_by_every_loss_and_leaves_no_trace():
    t, b = full(stage=replace(FULL, warmup=())), data().batch_at(0)
    t.step([data().batch_at(1)], lambda x: x.backward(), lambda ok=True: ok, 4)
    start = {k: v.clone() for k, v in task_state(t)[0].items()}
    b['image'][1, 0, 3, 3] = float('nan')
    with pytest.raises(NotFinite, match='gan_real'): t.step([b], lambda x: x.backward(), lambda ok=True: ok, 4)
    assert all(torch.equal(v, start[k]) for k, v in task_state(t)[0].items())


def test_too_many_bad_steps_in_a_row_stop_the_run(tmp_path):
    run = Run(tmp_path/'a')
    t = task(stage=replace(FULL, warmup=()), perceptual=bad_at(*range(2, 99)), critics=critics())
    with pytest.raises(UserError, match='perceptual not finite') as e: fit(t, data(), 80, run=run, show=quiet, patience=3, save_every=1)
    assert '\n' not in str(e.value) and len((run.dir/'skipped.jsonl').read_text().splitlines()) == 3
    assert run.load(full(stage=replace(FULL, warmup=()))) == 4                                # the last checkpoint before it gave up: nothing was lost


def test_a_stage_that_lacks_its_discriminator_or_has_a_strange_precision_is_one_line():
    with pytest.raises(UserError, match='no such discriminator'): task(stage=Stage('a', dict(gan=1.)))
    with pytest.raises(UserError, match='fp32, bf16, fp16'): task(precision='fp8')


def test_a_patchgan_that_waited_ends_the_reconstruction_losses():
    t = full(stage=replace(FULL, warmup=('patchgan',)))
    t.waits['patchgan'] = Settled(9., 9., window=2, times=1)
    history = fit(t, data(), 20, log_every=1, show=quiet)
    terms = [{k for k in r if k in ('l1', 'kl', 'vf', 'gan', 'patchgan', 'feature_matching')} for r in history]
    assert terms[1] == {'l1', 'kl', 'vf', 'gan'} and terms[2] == terms[4] == {'gan', 'patchgan', 'feature_matching'}


def test_settled_follows_its_definition():
    s = Settled(.1, .01)
    assert [i for i in range(1200) if s.add(.05)][0] == 99 + 9*50          # ten windows, half of each new
    s = Settled(.1, .01)
    assert not any(s.add(.05 if i % 100 < 50 else .09) for i in range(3000))   # low but not flat
    again = Settled(.1, .01)
    again.load(json.loads(json.dumps(s.state())))
    assert again.state() == s.state()


def test_a_skipped_step_forgets_what_a_discriminator_that_just_began_has_learned():
    t = full()                                                     # gan waits, patchgan learns
    t.waits['gan'] = Settled(9., 9., window=2, times=1)
    for i in (0, 1): t.step([data().batch_at(i)], lambda x: x.backward(), lambda ok=True: ok, 4)
    assert t.waits['gan'].done
    start = {k: v.clone() for k, v in task_state(t)[0].items()}
    t.perceptual = bad_at(0)
    with pytest.raises(NotFinite, match='perceptual'): t.step([data().batch_at(2)], lambda x: x.backward(), lambda ok=True: ok, 4)
    end = task_state(t)[0]
    assert start.keys() == end.keys() and all(torch.equal(v, start[k]) for k, v in end.items())


def test_discrete_training_resumes_bitwise(tmp_path):
    kw = dict(log_every=2, show=quiet)
    a, b, c = no_chance(), no_chance(), no_chance()
    fit(a, data(), 24, run=Run(tmp_path/'a'), **kw)
    fit(b, data(), 12, run=Run(tmp_path/'b'), **kw)
    fit(c, data(), 24, run=Run(tmp_path/'b'), **kw)
    assert same(a, c) and [q.steps for q in a.codebooks] == [q.steps for q in c.codebooks] and a.codebooks[0].steps > 6


def test_a_run_is_not_resumed_with_another_batch_seed_or_discriminator(tmp_path):
    stage = replace(FULL, warmup=())
    fit(full(stage=stage), data(), 8, run=Run(tmp_path/'a'), show=quiet)
    with pytest.raises(UserError, match='batch: 4 there, 8 here'): fit(full(stage=stage), data(8), 16, run=Run(tmp_path/'a'), show=quiet)
    with pytest.raises(UserError, match='seed: 0 there, 3 here'): fit(full(stage=stage), data(), 16, run=Run(tmp_path/'a'), seed=3, show=quiet)
    other = task(stage=stage, perceptual=partial(pixel, p=2), critics=critics(policy='color'))
    with pytest.raises(UserError, match='critics.gan.policy') as e: fit(other, data(), 16, run=Run(tmp_path/'a'), show=quiet)
    assert len(str(e.value)) < 400
    other = task(stage=stage, perceptual=partial(pixel, p=2), critics=critics() | dict(patchgan=PatchGAN(width=8)))
    with pytest.raises(UserError, match='patchgan: .*tokenizer'): load_nets(other, read_nets(tmp_path/'a')[0])


@pytest.mark.parametrize('side', range(64, 513, 16))
def test_every_size_fits_every_warp(side):
    for config in (replace(TINY, img_size=side), *([replace(VFMVAEConfig(), img_size=side)] if side % 64 == 0 else [])):
        fold = round(config.branch(0))
        assert side % (config.stride*fold) == 0
        for s in fitting_scales(config, SCALES):
            latent, image = torch.zeros(1, 1, side//config.stride, side//config.stride), torch.zeros(1, 3, side, side)
            h, x = latent_transform(latent, s).shape[2], target_transform(image, s).shape[2]
            assert h % fold == 0 < h and x == h*config.stride
    assert fitting_scales(VFMVAEConfig(), SCALES) == SCALES


CANNOT = {
    'needs mode': dict(stage=Stage('a', dict(l1=1., vq=1.))), 'does not train': dict(stage=Stage('a', dict(l1=1., vf=1.), train=('synthesis',))),
    '11 px': dict(stage=Stage('a', dict(ssim=1.), equivariance=(.25, 1.)),
                  config=replace(TINY, img_size=32, stride=4, scale=2., blocks=3, channel_base=8192, fusion=(128, 64, 32)))}


@pytest.mark.parametrize('says', CANNOT)
def test_what_a_stage_and_a_model_cannot_do_together_is_said_before_the_first_step(says):
    case = CANNOT[says]
    with pytest.raises(UserError, match=says): TokenizerTask(VFMVAE(case.get('config', TINY), VFM('tiny')), case['stage'])


@pytest.mark.parametrize('wrong,says', [(dict(weights={}), 'no loss'), (dict(weights=dict(l1=1.), warmup=('vf',)), 'warm-up'),
                                        (dict(weights=dict(l1=1.), equivariance=(.5,)), 'end with 1'), (dict(weights=dict(vf=1.)), 'adaptive')])
def test_a_stage_that_makes_no_sense_is_refused(wrong, says):
    with pytest.raises(UserError, match=says): Stage('a', **wrong)


def test_losses_that_depend_on_nothing_trained_are_refused():
    t = task(stage=Stage('a', dict(kl=1.), train=('synthesis',)))
    with pytest.raises(UserError, match='depend on nothing'): fit(t, data(), 4, show=quiet)


def test_a_branch_begins_with_the_weights_of_the_stage_it_leaves(tmp_path):
    t = full(stage=replace(FULL, warmup=()))
    fit(t, data(), 8, run=Run(tmp_path/'a'), show=quiet)
    state, seen = read_nets(tmp_path/'a')
    new = full(seed=3, stage=STAGES[3], start=seen)
    load_nets(new, state)
    assert seen == 8 and all(torch.equal(v, t.model.own_state()[k]) for k, v in new.model.own_state().items())
    assert all(torch.equal(v, t.ema.net.own_state()[k]) for k, v in new.ema.net.own_state().items())
    assert all(torch.equal(v, t.critics['gan'].own_state()[k]) for k, v in new.critics['gan'].own_state().items())
    with pytest.raises(UserError, match='no checkpoint'): read_nets(tmp_path)


@pytest.mark.parametrize('precision,floor', [('bf16', .97), ('fp16', .97)])
def test_gradients_of_lower_precision_point_where_those_of_the_full_one_do(precision, floor):
    x, grads = data().batch_at(0)['image'], {}
    stage = Stage('a', dict(l1=1e-3, ssim=1e-3, multiscale=1e-4, vf=1e-3, kl=1e-9, gan=1e-4), adaptive=False)   # small, as a mean over many pixels would be
    for p in ('fp32', precision):
        t = task(stage=stage, precision=p, critics=critics(policy=''))
        for block in t.model.synthesis.blocks: block.conv0.gamma.data.fill_(1.)
        seen = []
        t.optimizers['model'].step = lambda t=t, seen=seen: seen.extend(q.grad.clone() for q in t.params if q.grad is not None)
        torch.manual_seed(1)
        t.step([dict(image=x)], lambda x: x.backward(), lambda ok=True: ok, 4)
        grads[p] = torch.cat([g.flatten() for g in seen])
    assert torch.nn.functional.cosine_similarity(grads['fp32'], grads[precision], dim=0) > floor and not torch.equal(grads['fp32'], grads[precision])


def test_lower_precision_ends_with_its_task_and_spares_the_losses_and_the_average():
    t = task(precision='fp16')
    assert t.model.synthesis.half_blocks == 3 and t.ema.net.synthesis.half_blocks == 0
    assert TokenizerTask(t.model, STAGE).model.synthesis.half_blocks == 0
    x = data().batch_at(0)['image']
    with torch.autocast('cpu', torch.bfloat16): assert abs(ssim_loss(x, x)) < 1e-6


def test_a_missing_weight_means_the_loss_is_not_computed():
    t = task(stage=Stage('one', dict(l1=1., vf=0.)))
    assert set(tokenizer_losses(t.model, data().batch_at(0)['image'], t.stage)) == {'l1', 'loss'}


def test_discrete_mode_trains():
    from dataclasses import replace
    torch.manual_seed(0)
    model = VFMVAE(replace(TINY, mode='discrete', vocab=64, codebooks=4, channels=32), VFM('tiny', pretrained=False))
    t = TokenizerTask(model, Stage('vq', dict(l1=1., vq=1., entropy=.01, vf=1.)), half_life=100)
    logs = fit(t, data(), 8, log_every=1, show=quiet)
    assert {'vq', 'entropy', 'l1', 'vf', 'loss'} <= set(logs[-1])


def no_chance(**kw):
    "Both optimizers, nothing drawn: discrete codes, no augmentation, batches that split into the same groups of eight."
    torch.manual_seed(0)
    model = VFMVAE(replace(TINY, mode='discrete', vocab=64, codebooks=4, channels=32), VFM('tiny'))
    stage = Stage('a', dict(l1=1., vq=1., vf=1., gan=.1, patchgan=.1, feature_matching=1.), lr=1e-4, adaptive=False)
    return TokenizerTask(model, stage, half_life=100, critics=critics(policy='', crop=False), betas=(.9, .99), **kw)


def test_accumulated_steps_of_both_optimizers_equal_the_large_batch():
    a, b = no_chance(), no_chance()
    for opt in (*a.optimizers.values(), *b.optimizers.values()): opt.step = lambda: None     # Adam divides by the gradient: compare that
    grads = []
    for t, micro in ((a, [data(16).batch_at(0)]), (b, [data(8).batch_at(i) for i in (0, 1)])):
        seen, done = {}, t._descend
        def spy(name, params, *rest, t=t, seen=seen, done=done):
            logs = done(name, params, *rest)
            seen[name] = [None if p.grad is None else p.grad.clone() for p in params]
            return logs
        t._descend = spy
        t.step(micro, lambda x: x.backward(), lambda ok=True: ok, 16)
        grads.append(seen)
    assert [k for k in data(16).batch_at(0)['key']] == [k for i in (0, 1) for k in data(8).batch_at(i)['key']]
    for name in ('critics', 'model'):
        for x, y in zip(grads[0][name], grads[1][name], strict=True): torch.testing.assert_close(x, y, atol=2e-6, rtol=2e-3)


TOY = '''
import sys, torch
from torch import nn
from vfmvae.core import save_weights
from vfmvae.data import World, loader
from vfmvae.train import EMA, fit, processes
class Toy:
    def __init__(self, seed):
        torch.manual_seed(seed)                # differs by rank: the loop must make the start the same
        net = nn.Sequential(nn.Conv2d(3, 4, 8, 8), nn.ConvTranspose2d(4, 3, 8, 8))
        self.nets, self.ema, self.optimizers = dict(net=net), EMA(net, 50), dict(net=torch.optim.Adam(net.parameters(), 3e-3))
    def config(self): return {}
    def step(self, micro, backward, sync, seen):
        net, opt = self.nets['net'], self.optimizers['net']
        opt.zero_grad()
        loss = sum((net(b['image'])-b['image']).pow(2).mean() for b in micro)/len(micro)
        backward(loss); sync(); opt.step(); self.ema.update(net, 8, seen)
        return dict(loss=loss.item())
acc = processes()
toy = Toy(acc.process_index)
h = fit(toy, loader(World(64), 8, rank=acc.process_index, world=acc.num_processes), 48, log_every=1, show=lambda h: None, accelerator=acc)
if acc.is_main_process: save_weights(sys.argv[1], toy.nets['net'].state_dict(), dict(loss=[r['loss'] for r in h], processes=acc.num_processes))
'''


def test_two_processes_train_the_same_model(tmp_path):
    (a, one), (b, two) = in_processes(tmp_path, TOY)
    assert (one['processes'], two['processes']) == (1, 2)
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(torch.tensor(one['loss']), torch.tensor(two['loss']), atol=1e-5, rtol=1e-4)


TOKENIZER = '''
import sys, torch
from dataclasses import replace
from vfmvae.adversarial import PatchGAN, ProjectedDiscriminator
from vfmvae.core import save_weights
from vfmvae.data import Loader, World
from vfmvae.tok_train import TINY, Stage, TokenizerTask
from vfmvae.train import fit, processes, task_state
from vfmvae.vae import VFMVAE
from vfmvae.vfm import VFM
class Interleaved(Loader):                     # one process sees the batch in the order in which two would share it
    def batch_at(self, step):
        b, order = super().batch_at(step), [*range(0, 16, 2), *range(1, 16, 2)]
        return {k: v[order] if isinstance(v, torch.Tensor) else v for k, v in b.items()}
acc = processes()
torch.manual_seed(0)
model = VFMVAE(replace(TINY, mode="discrete", vocab=64, codebooks=4, channels=32), VFM("tiny"))
critics = dict(gan=ProjectedDiscriminator(VFM("tiny"), policy="", crop=False), patchgan=PatchGAN(width=4))
stage = Stage("a", dict(l1=1., vq=1., vf=1., gan=.1, patchgan=.1, feature_matching=1.), lr=1e-5, adaptive=False, warmup=("gan",))
task = TokenizerTask(model, stage, half_life=50, critics=critics, betas=(.9, .99))
task.waits["gan"].window, task.waits["gan"].times, task.waits["gan"].below, task.waits["gan"].within = 2, 1, 9., 9.
feed = (Interleaved if acc.num_processes == 1 else Loader)(World(64), 16, 0, acc.process_index, acc.num_processes, 0)
h = fit(task, feed, 64, log_every=1, show=lambda h: None, accelerator=acc)
names = ("loss", "loss_d", "l1", "gan", "patchgan", "feature_matching", "vf", "grad_norm", "grad_norm_d")
rows = [{k: r[k] for k in names if k in r} for r in h]
if acc.is_main_process: save_weights(sys.argv[1], model.synthesis.state_dict(), dict(rows=rows, processes=acc.num_processes, waits=task.state()))
'''


def in_processes(folder, source, counts=(1, 2)):
    "Runs a script under each number of processes; what each wrote."
    import socket
    (folder/'script.py').write_text(textwrap.dedent(source)+'\nfrom vfmvae.train import leave\nleave()\n')
    for n in counts:
        with socket.socket() as s:
            s.bind(('127.0.0.1', 0))
            port = s.getsockname()[1]
        launch = [sys.executable, '-m', 'torch.distributed.run', '--master_port', str(port), '--nproc_per_node', str(n)]
        done = subprocess.run([*launch, str(folder/'script.py'), str(folder/f'{n}.safetensors')], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, f'{done.stderr[:3000]}\n...\n{done.stderr[-2000:]}'     # who aborts says why at its start
    return [load_weights(folder/f'{n}.safetensors') for n in counts]


def test_two_processes_train_tokenizer_and_discriminators_alike(tmp_path):
    (a, one), (b, two) = in_processes(tmp_path, TOKENIZER)
    assert (one['processes'], two['processes']) == (1, 2) and 'gan' in one['rows'][2] and 'gan' not in one['rows'][1]
    for x, y in zip(one['rows'], two['rows'], strict=True):
        assert x.keys() == y.keys()
        for k in x: assert abs(x[k]-y[k]) <= 1e-4 + 2e-3*abs(x[k]), (k, x[k], y[k])
    torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)


def test_a_loader_for_another_number_of_processes_is_refused():
    with pytest.raises(UserError, match='world=1'): fit(task(), loader(World(64), 4, rank=0, world=2), 8, show=quiet)


def test_accumulated_gradient_is_that_of_the_large_batch():
    class Toy:
        def __init__(self):
            torch.manual_seed(0)
            self.net = nn.Conv2d(3, 3, 3)
            self.nets, self.ema, self.optimizers = dict(net=self.net), None, dict(net=torch.optim.SGD(self.net.parameters(), .1))
        def config(self): return {}
        def step(self, micro, backward, sync, seen):
            self.optimizers['net'].zero_grad()
            for b in micro: backward(self.net(b['image']).square().mean()/len(micro))
            sync(); self.optimizers['net'].step()
            return {}
    a, b = Toy(), Toy()
    fit(a, data(16), 32, show=quiet)
    fit(b, data(4), 32, accumulate=4, show=quiet)
    torch.testing.assert_close(a.net.weight, b.net.weight, atol=1e-6, rtol=1e-5)


def test_the_live_plot_redraws_curves_and_pictures_in_place(monkeypatch):
    from vfmvae.plots import show_images
    from vfmvae.train import Live
    shown = []
    class Handle:
        def __init__(self, fig): self.drawn = [fig]; shown.append(self)
        def update(self, fig): self.drawn.append(fig)
    monkeypatch.setattr('IPython.display.display', lambda fig, display_id: Handle(fig))
    t = task()
    live = Live(every=0, look=lambda: show_images(t.ema.net.decode(torch.zeros(2, 16, 8, 8)).detach()))
    live.on = True
    fit(t, data(), 16, log_every=1, show=live)
    assert [len(h.drawn) for h in shown] == [3, 3]                             # from the second row on: the curves, the pictures
    names = {ax.get_ylabel() for ax in shown[0].drawn[-1].axes}
    assert {'loss', 'gradient norm', 'adaptive weight', 'images/s', 'memory (GB)'} <= names


def test_a_compiled_decoder_trains_the_same_model():
    out = []
    for compiled in (False, True):
        t = task()
        if compiled: t.model.synthesis.compile(backend='eager')               # the tracing, without minutes of compiling
        torch.manual_seed(1)
        out.append(t.step([data().batch_at(0)], lambda x: x.backward(), lambda ok=True: ok, 4))
        assert not [k for k in t.model.own_state() if '_orig_mod' in k]
    assert out[0] == out[1]
