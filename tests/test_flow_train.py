"""Training nets on latents: the loss is `flow_loss`'s, resuming and splitting change nothing, and what cannot be is refused."""
import math, shutil
from dataclasses import asdict, replace
import pytest
import torch
from scope import ALL
from vfmvae.core import Gaussian, UserError
from vfmvae.files import load_weights
from vfmvae.runtime import seed_all
from vfmvae.world import World
from vfmvae.data import loader
from vfmvae.dit import DiT, DiTConfig, FAMILIES, save_net
from vfmvae.extractors import bundled_extractor
from vfmvae.flow import flow_loss, FLOW_WEIGHTS, FlowTargets
from vfmvae.samplers import Sampler
from vfmvae.presets import flow_cost, FLOW_PRESETS, FlowPreset, forward_gflop
from vfmvae.samplers import sample_latents
from vfmvae.flow_task import FlowConfig, FlowMonitor, FlowTask, loss_by_level, vfm_targets
from vfmvae.generation import encoder_of, generate, nets, open_net, sample_labels, tokenizer_of, train_flow
from vfmvae.latents import LatentCache
from vfmvae.presets import PRESETS
from vfmvae.recipes import get_preset, train_tokenizer
from vfmvae.run import Run, task_state
from vfmvae.train import fit, NotFinite
from vfmvae.vfm import VFM

quiet = lambda rows: None


class Rows:
    "Latents in memory: mean and logvar by a seed."
    augment = False
    def __init__(self, n=64, classes=4, wide=True, images=False):
        g = torch.Generator().manual_seed(n)
        self.mean, self.logvar = torch.randn(n, 3, 4, 4, generator=g), torch.randn(n, 3, 4, 4, generator=g)-3
        self.label, self.wide, self.shape, self.images = torch.randint(0, classes, (n,), generator=g), wide, (3, 4, 4), images
    def __len__(self): return len(self.mean)
    def batch(self, at):
        at = list(at)
        more = {'logvar': self.logvar[at]} if self.wide else {}
        if self.images: more['image'] = World(len(self), seed=3).batch(at)['image']
        return dict(mean=self.mean[at], label=self.label[at], key=[str(i) for i in at], **more)


def net_of(family='lightningdit', seed=0, alive=True, **more):
    seed_all(seed)
    shape = dict(in_channels=3, num_classes=4, patch_size=2, hidden_size=16, depth=2, num_heads=2, projector_dim=8, encoder_depth=1)
    if family in ('repa', 'reg'): shape |= dict(z_dims=(128,)) | (dict(cls_dim=128) if family == 'reg' else {})
    if family == 'rae': shape |= dict(head_hidden_size=16, head_num_heads=2)
    net = DiT(DiTConfig(**FAMILIES[family] | shape | more))
    if alive:
        for p in net.parameters():
            if not p.any(): torch.nn.init.normal_(p, std=.05)
    return net


def task_of(family='lightningdit', config=None, alive=True, **more):
    vfms = [VFM('tiny')] if family in ('repa', 'reg') else []
    weights = FLOW_WEIGHTS.get(family, FLOW_WEIGHTS['sit'])
    return FlowTask(net_of(family, alive=alive, **more), config or FlowConfig(weights, lr=1e-3, clip=1., ema=.9), vfms)


@pytest.mark.parametrize('family', [*FAMILIES])
def test_every_family_takes_a_step_and_learns(family):
    t = task_of(family, alive=False)
    rows = fit(t, loader(Rows(images=family in ('repa', 'reg')), 16), 16*30, log_every=10, show=quiet)
    assert rows[-1]['loss'] < rows[0]['loss'] and {*t.flow.weights} <= {*rows[-1]}
    z = sample_latents(t.ema.net, [0, 1, 4], (3, 4, 4), sampler=Sampler(3, guidance=1.5))
    assert z.shape == (3, 3, 4, 4) and z.isfinite().all()


@pytest.mark.parametrize('family', ['sit', 'lightningdit', 'reg'])
def test_the_terms_are_those_of_flow_loss(family):
    t, b = task_of(family), Rows(images=True).batch(range(8))
    net, vfm = t.net.eval(), VFM('tiny')
    seed_all(5)
    got = t.terms(b, net=net)
    seed_all(5)
    z = Gaussian(b['mean'], b['logvar']).sample()
    more = {}
    def call(*inputs): return net(*inputs, layers=())
    if family == 'reg':
        cls, h = vfm_targets(vfm, b['image'], (2, 2))
        more = dict(targets=FlowTargets(cls, tokens=[torch.cat([cls[:, None], h], 1)]))
    want = flow_loss(call, z, b['label'], FLOW_WEIGHTS[family], **more)
    for k in want: torch.testing.assert_close(got[k], want[k])


def test_the_law_changes_when_it_should():
    c = FlowConfig(laws=(('logit_normal', 0), (dict(law='uniform', interval=(.9, 1.)), 100)))
    t, b = task_of(config=replace(c, weights=FLOW_WEIGHTS['lightningdit'])), Rows().batch(range(64))
    assert t.terms(b, 99)['t'].min() < .5 and t.terms(b, 100)['t'].min() >= .9
    t.step([b], lambda loss: loss.backward(), lambda ok=True: ok, 164)         # 64 of them are this step's own: 100 had been seen
    assert t.per_sample[0].min() >= .9


@pytest.mark.parametrize('family', ['lightningdit', 'reg'])
def test_stop_and_resume_is_the_straight_run_bitwise(tmp_path, family):
    def go(name, images):
        t = task_of(family)
        return t, fit(t, loader(Rows(images=family == 'reg'), 8), images, Run(tmp_path/name), log_every=1, save_every=3, show=quiet)
    a, rows_a = go('a', 80)
    go('b', 40)
    shutil.rmtree(tmp_path/'b'/'none', ignore_errors=True)
    b, rows_b = go('b', 80)
    same = lambda x, y: all(torch.equal(p, q) for p, q in zip(x.state_dict().values(), y.state_dict().values(), strict=True))
    assert same(a.net, b.net) and same(a.ema.net, b.ema.net)
    drop = lambda rows: [{k: v for k, v in r.items() if k not in ('images_per_s', 'memory_gb')} for r in rows]
    assert drop(rows_a) == drop(rows_b)
    for p, q in zip(a.net.parameters(), b.net.parameters(), strict=True):
        assert all(torch.equal(s, t) for s, t in zip(a.optimizers['net'].state[p].values(), b.optimizers['net'].state[q].values(), strict=True))
    other = FlowTask(net_of(family), replace(a.flow, ema=.5), a.vfms)
    with pytest.raises(UserError, match='flow.ema: 0.9 there, 0.5 here'):
        fit(other, loader(Rows(images=True), 8), 96, Run(tmp_path/'a'), show=quiet)


def test_the_average_is_the_average():
    t = task_of()
    before = {k: v.clone() for k, v in t.net.state_dict().items()}
    want = {k: v.clone() for k, v in before.items()}
    feed = loader(Rows(), 8)
    for step in range(4):
        t.step([feed.batch_at(step)], lambda loss: loss.backward(), lambda ok=True: ok, 8*(step+1))
        for k, v in t.net.state_dict().items(): want[k] = .9*want[k] + .1*v
    for k, v in t.ema.net.state_dict().items(): torch.testing.assert_close(v, want[k], atol=1e-6, rtol=1e-5)
    assert any(not torch.equal(v, before[k]) for k, v in t.net.state_dict().items())


def test_labels_are_dropped_at_their_rate_and_never_in_eval():
    seen = []
    t = task_of(label_dropout=.25)
    t.net.y_embedder.register_forward_hook(lambda m, args, out: seen.append(args[1]))
    b = Rows(256).batch(range(256))
    for _ in range(8): t.terms(b)
    share = torch.cat(seen).double().mean()
    assert abs(share-.25) < .04
    seen.clear()
    t.terms(b, net=t.net.eval())
    assert seen[0] is None or not seen[0].any()


@pytest.mark.parametrize('poison', ['nan', 'inf', 'gradient'])
def test_a_step_that_is_not_finite_changes_nothing(poison):
    t, b = task_of(), Rows().batch(range(8))
    t.step([b], lambda loss: loss.backward(), lambda ok=True: ok, 8)           # so that the optimizer has a state
    tensors = lambda: [*t.net.state_dict().values(), *t.ema.net.state_dict().values(), *[v for s in t.optimizers['net'].state.values() for v in s.values()]]
    before = [v.clone() for v in tensors()]
    bad = dict(b, mean=b['mean']*float(poison)) if poison != 'gradient' else b
    spoil = (lambda loss: (loss*1e38*1e5).backward()) if poison == 'gradient' else (lambda loss: loss.backward())
    with pytest.raises(NotFinite): t.step([b, bad], spoil, lambda ok=True: ok, 16)
    assert all(torch.equal(x, y) for x, y in zip(before, tensors(), strict=True))
    assert all(p.grad is None for p in t.net.parameters())


def test_training_stops_after_many_bad_steps_with_batch_and_state_beside_it(tmp_path):
    class Spoilt(Rows):
        def batch(self, at):
            b = super().batch(at)
            return b if self.good else dict(b, mean=b['mean']*math.nan)
        good = True
        def fingerprint(self): return 'the same set'
    data, t = Spoilt(), task_of()
    fit(t, loader(data, 8), 16, Run(tmp_path/'r'), show=quiet)
    data.good = False
    with pytest.raises(UserError, match='not finite too many times in a row, last at step 5;.*stopped.safetensors') as e:
        fit(task_of(), loader(data, 8), 80, Run(tmp_path/'r'), patience=3, show=quiet)
    assert '\n' not in str(e.value)
    batch, row = load_weights(tmp_path/'r'/'skipped.safetensors')
    state, meta = load_weights(tmp_path/'r'/'stopped.safetensors')
    assert row['step'] == 5 and batch['mean.0'].isnan().all() and batch['label.0'].shape == (8,)
    assert all(torch.equal(state[f'task.nets.net.{k}'], v) for k, v in t.net.state_dict().items())
    assert meta['config'] == load_weights(Run(tmp_path/'r').checkpoints()[-1])[1]['config']
    data.good = True                                # and the run goes on from its last checkpoint
    assert fit(task_of(), loader(data, 8), 40, Run(tmp_path/'r'), log_every=1, show=quiet)[-1]['images'] == 40


PARALLEL = '''
import sys, torch
sys.path.insert(0, TESTS)
from test_flow_train import Rows, net_of
from vfmvae.files import save_weights
from vfmvae.data import ImageLoader
from vfmvae.flow_task import FlowConfig, FlowTask
from vfmvae.runtime import make_accelerator
from vfmvae.train import fit
class Fixed(FlowTask):                         # noise and its level by the latent: no process draws anything
    def terms(self, batch, seen=0, net=None, **given):
        z = batch["mean"]
        return super().terms(batch, seen, net, t=z.flatten(1).std(1).clamp(0, 1), noise=z.flip(-1)*1.5)
acc = make_accelerator()
task = Fixed(net_of(label_dropout=0.), FlowConfig(lr=1e-3, clip=.5, ema=.9))
rows = fit(task, ImageLoader(Rows(wide=False), 16, 0, acc.process_index, acc.num_processes, 0), 96, log_every=1, show=lambda h: None, accelerator=acc)
meta = dict(rows=[(r["flow"], r["grad_norm"]) for r in rows], processes=acc.num_processes)
if acc.is_main_process: save_weights(sys.argv[1], task.ema.net.state_dict(), meta)
'''


def test_two_processes_train_the_net_of_one(tmp_path):
    from pathlib import Path

    from test_train import in_processes
    (a, one), (b, two) = in_processes(tmp_path, PARALLEL.replace('TESTS', repr(str(Path(__file__).parent))))
    assert (one['processes'], two['processes']) == (1, 2)
    torch.testing.assert_close(torch.tensor(one['rows']), torch.tensor(two['rows']), atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-3)


def test_accumulation_is_the_large_batch():
    def gradient(parts):
        t = task_of(label_dropout=0.)
        class Fixed(FlowTask): pass
        total = []
        def step():
            for p in parts:
                z = p['mean']
                loss = FlowTask.terms(t, {k: v for k, v in p.items() if k != 'logvar'}, t=z.flatten(1).std(1).clamp(0, 1), noise=z.flip(-1))['loss']/len(parts)
                loss.backward()
        step()
        total = torch.cat([q.grad.flatten() for q in t.net.parameters() if q.grad is not None])
        return total
    rows = Rows(wide=False)
    torch.testing.assert_close(gradient([rows.batch(range(16))]), gradient([rows.batch(range(i, i+4)) for i in range(0, 16, 4)]), atol=1e-6, rtol=1e-4)


def test_bf16_stays_close_and_the_loss_is_float32():
    b = Rows().batch(range(32))
    grads, losses = [], []
    for precision in ('fp32', 'bf16'):
        t = FlowTask(net_of(label_dropout=0.), FlowConfig(FLOW_WEIGHTS['lightningdit']), precision=precision)
        seed_all(1)
        terms = t.terms(b)
        assert all(v.dtype == torch.float32 for v in terms.values())
        terms['loss'].backward()
        losses.append(terms['loss'].item())
        grads.append(torch.cat([p.grad.flatten() for p in t.net.parameters() if p.grad is not None]))
    assert abs(losses[0]-losses[1]) < .02*losses[0] and torch.cosine_similarity(*grads, dim=0) > .99 and not torch.equal(*grads)


def test_the_compiled_step_is_the_same_step():
    "Its graph and its gradients in `make test`; by torch's own C++, which takes more than a minute, in `make test-all`."
    compiled = True if ALL and (shutil.which('g++') or shutil.which('c++')) else 'aot_eager'
    b, seen = Rows(wide=False).batch(range(8)), []
    for compile in (False, compiled):
        t = FlowTask(net_of(depth=1), FlowConfig(FLOW_WEIGHTS['lightningdit'], clip=1.), compile=compile)
        seed_all(1)
        seen.append(t.step([b], lambda loss: loss.backward(), lambda ok=True: ok, 8) | dict(net=t.net.state_dict()))
        with pytest.raises(UserError, match='labels from 0 to 9'): t.terms(dict(b, label=b['label']*0 + torch.arange(8)+2 - 2*(torch.arange(8) == 0)))
    for k in ('loss', 'grad_norm'): assert abs(seen[0][k]-seen[1][k]) < 1e-4*abs(seen[0][k])
    for k, v in seen[0]['net'].items(): torch.testing.assert_close(v, seen[1]['net'][k], atol=3e-4, rtol=1e-3)


def test_what_does_not_fit_is_refused():
    b = Rows().batch(range(4))
    for t, batch, says in ((task_of(), dict(b, mean=torch.randn(4, 5, 4, 4), logvar=None), 'net of 3 channels'),
                           (task_of(), dict(b, label=b['label']+4), 'net of 4 classes'),
                           (task_of(), dict(b, label=b['label']-9), 'net of 4 classes'), (task_of('reg'), b, 'with_images'),
                           (task_of(), dict(mean=torch.randn(4, 3, 5, 5), label=b['label']), 'patches of 2')):
        with pytest.raises(UserError, match=says) as e: t.terms(batch)
        assert '\n' not in str(e.value)
    for make, says in ((lambda: FlowTask(net_of('repa')), "weight 'repa'"), (lambda: FlowTask(net_of(), FlowConfig(FLOW_WEIGHTS['reg'])), "weight 'repa'"),
                       (lambda: FlowTask(net_of('repa'), FlowConfig(FLOW_WEIGHTS['repa'])), 'aligns with 1 VFMs, 0'),
                       (lambda: FlowTask(net_of(), precision='fp8'), 'fp8'),
                       (lambda: FlowConfig(lr=0), 'FlowConfig.lr'), (lambda: FlowConfig(laws=()), 'laws'),
                       (lambda: FlowMonitor(task_of(), Rows(), 0), 'every: 0 is out of range')):
        with pytest.raises(UserError, match=says) as e: make()
        assert '\n' not in str(e.value)


def test_a_sample_depends_on_seed_and_number_alone():
    net = net_of()
    z = sample_latents(net, [0, 1, 2, 3, 4], (3, 4, 4), sampler=Sampler(4, guidance=2.), seed=7, batch_size=5)
    for size in (1, 2, 3):
        some = sample_latents(net, [0, 1, 2, 3, 4], (3, 4, 4), sampler=Sampler(4, guidance=2.), seed=7, batch_size=size)
        torch.testing.assert_close(some, z, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(sample_latents(net, [3, 1], (3, 4, 4), sampler=Sampler(4, guidance=2.), seed=7, index=[3, 1]), z[[3, 1]], atol=1e-5, rtol=1e-4)
    for method in ('sde', 'sde_heun'):
        a = sample_latents(net, [0, 1, 2], (3, 4, 4), sampler=Sampler(4, method), seed=7)
        torch.testing.assert_close(sample_latents(net, [2], (3, 4, 4), sampler=Sampler(4, method), seed=7, index=[2]), a[2:], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(sample_latents(net, [0], (3, 4, 4), sampler=Sampler(4), seed=8), z[:1], atol=1e-2)
    net.train()
    a = sample_latents(net, [0, 1], (3, 4, 4), sampler=Sampler(2))
    assert net.training and torch.equal(a, sample_latents(net.eval(), [0, 1], (3, 4, 4), sampler=Sampler(2)))         # no label is dropped


def test_watching_draws_no_number_of_the_run(tmp_path):
    a, b = task_of(), task_of()
    fit(a, loader(Rows(), 8), 160, log_every=2, show=quiet)
    w = FlowMonitor(b, Rows(48), 64, Run(tmp_path/'w'), n=20)
    fit(b, loader(Rows(), 8), 160, Run(tmp_path/'w'), log_every=2, show=w)
    assert all(torch.equal(p, q) for p, q in zip(a.net.parameters(), b.net.parameters(), strict=True))
    assert [r['images'] for r in w.rows] == [64, 128] and len((tmp_path/'w'/'watch.jsonl').read_text().splitlines()) == 2


def test_loss_by_level_is_the_error_at_that_level():
    t, data = task_of(), Rows(40, wide=False)
    rows = loss_by_level(t, data, levels=4, n=40)
    assert [r['t'] for r in rows] == [.125, .375, .625, .875]
    for size in (7, 40): assert all(abs(a['flow']-b['flow']) < 1e-5 for a, b in zip(rows, loss_by_level(t, data, levels=4, n=40, batch_size=size), strict=True))
    class Zero(torch.nn.Module): pass
    still = task_of(alive=False)                   # a net that says 0: the error is E|noise - z|^2, which does not depend on t
    errors = [r['flow'] for r in loss_by_level(still, data, levels=3, n=40)]
    assert max(errors)-min(errors) < 1e-5 and abs(errors[0]-(1+data.mean.square().mean().item())) < .15


def test_presets_are_the_published_recipes():
    light, reg = FLOW_PRESETS['lightningdit-560ep'], FLOW_PRESETS['reg-640ep']
    assert light.num_images//light.batch_size == 560*1251 and reg.num_images//reg.batch_size == 640*1251 and light.batch_size == reg.batch_size == 1024
    assert light.flow.law(600_000*1024-1) == 'logit_normal' and light.flow.law(600_000*1024) == 'uniform' and reg.flow.law(0) == 'uniform'
    f = light.flow
    assert (f.lr, f.betas, f.weight_decay, f.clip, f.ema) == (2e-4, (.9, .95), 0, None, .9999) and reg.flow.clip == 1.
    assert light.flow.weights == dict(flow=1., cosine=1.) and reg.flow.weights == dict(flow=1., repa=.5, cls=.03)
    assert (light.net.qk_norm, reg.net.qk_norm, reg.net.cls_dim, reg.net.z_dims, reg.net.encoder_depth) == ('rms', 'layer', 768, (768,), 8)
    assert abs(forward_gflop(light.net, light.latent)-237.3) < .1 and abs(forward_gflop(reg.net, reg.latent)-242.4) < .1
    assert light.sampling.channels == 3 and reg.sampling.method == 'sde' and not reg.flips and light.flips
    half, whole = (flow_cost(FLOW_PRESETS[f'reg-{n}ep'])['hours'] for n in (80, 640))
    assert abs(whole/half-8) < 1e-9
    assert {*FLOW_PRESETS} <= {*PRESETS} and get_preset('reg-80ep', FlowPreset) is FLOW_PRESETS['reg-80ep']
    with pytest.raises(UserError, match='use train_flow'): train_tokenizer('reg-80ep')
    with pytest.raises(UserError, match='use train_tokenizer'): train_flow('tiny')


def test_a_net_says_whose_latents_it_learned(tmp_path):
    p = replace(FLOW_PRESETS['dit-vfmvae-tiny-f8d16'], net=replace(FLOW_PRESETS['dit-vfmvae-tiny-f8d16'].net, hidden_size=32, depth=1, num_heads=2))
    net, rows = train_flow(p, World(24, seed=9), tmp_path/'c', num_images=48, batch_size=8, out=tmp_path/'n.safetensors', log_every=2, show=quiet)
    opened = DiT.load(tmp_path/'n.safetensors')
    assert opened.meta['recipe']['latents'] == 24 and opened.meta['scale']['std'] == net.meta['scale']['std'] and len(rows) == 3
    a, b = (generate(x, [1, 2], steps=2).images for x in (net, tmp_path/'n.safetensors'))
    torch.testing.assert_close(a, b)
    generate(opened, [1, 2, 3], steps=2, out=tmp_path/'png', batch_size=2, rank=1, num_processes=2)
    assert [f.name for f in sorted((tmp_path/'png').iterdir())] == ['000002.png']
    bare = net_of()
    with pytest.raises(UserError, match='does not say whose latents'): tokenizer_of(bare)
    with pytest.raises(UserError, match='16 channels, this net 3'): tokenizer_of(bare, tokenizer_of(net))
    save_net(tmp_path/'wrong.safetensors', net, **dict(net.meta, scale=dict(mean=[0.]*16, std=[9.]*16)))
    with pytest.raises(UserError, match='trained anew'): generate(tmp_path/'wrong.safetensors', 2, steps=2)
    with pytest.raises(UserError, match='nearest'): generate('dit-vfmvae-tiny', 2)
    with pytest.raises(UserError, match='another path|another cache'): train_flow(p, World(24, seed=10), tmp_path/'c', num_images=48, batch_size=8)


def test_the_second_final_layer_learns_and_guides():
    t = FlowTask(net_of(alive=False, base_depth=1), FlowConfig(dict(flow=1., base=.5), lr=2e-3, clip=1., ema=.9))
    rows = fit(t, loader(Rows(), 16), 16*30, log_every=10, show=quiet)
    assert rows[-1]['base'] < rows[0]['base'] and abs(rows[-1]['loss']-rows[-1]['flow']-.5*rows[-1]['base']) < 1e-5
    net, b = t.ema.net.eval(), Rows().batch(range(8))
    draws = dict(t=torch.rand(8), noise=torch.randn(8, 3, 4, 4))
    terms = t.terms(dict(b, logvar=None), net=net, **draws)
    level = draws['t'].view(-1, 1, 1, 1)
    z_t = (1-level)*b['mean'] + level*draws['noise']
    said = net(z_t, draws['t'], b['label'], layers=())
    torch.testing.assert_close(terms['base'], (said.base-(draws['noise']-b['mean'])).square().mean())
    walk = lambda **how: sample_latents(net, [0, 1, 3], (3, 4, 4), sampler=Sampler(3, 'euler', **how))
    torch.testing.assert_close(walk(weak='base'), walk())
    assert not torch.allclose(walk(weak='base', guidance=2.), walk(guidance=2.), atol=1e-3)
    for act, words in ((lambda: sample_latents(net_of(), [0], (3, 4, 4), sampler=Sampler(weak='base')), 'second final layer'),
                       (lambda: walk(weak='bsae'), "'bsae'"),
                       (lambda: FlowTask(net_of(base_depth=1)), 'go together'),
                       (lambda: FlowTask(net_of(), FlowConfig(dict(flow=1., base=1.))), 'go together')):
        with pytest.raises(UserError, match=words): act()
    z, y = b['mean'], b['label']
    with pytest.raises(UserError, match="no output for the weight 'base'"): flow_loss(net_of(), z, y, dict(flow=1., base=1.))


def test_a_weaker_net_without_class_is_guidance_and_autoguidance_in_one():
    net, other = net_of(seed=1).eval(), net_of(seed=2).eval()
    walk = lambda **how: sample_latents(net, [0, 1, 3], (3, 4, 4), sampler=Sampler(3, 'euler', guidance=2., weak_null=how.pop('weak_null', False)), **how)
    torch.testing.assert_close(walk(weak=net, weak_null=True), walk())
    null = lambda z, t, y: other(z, t, torch.full_like(y, 4))
    class Told(torch.nn.Module):
        config, x_embedder = other.config, other.x_embedder
        def forward(self, *a): return null(*a)
    torch.testing.assert_close(walk(weak=other, weak_null=True), walk(weak=Told()))
    assert not torch.allclose(walk(weak=other, weak_null=True), walk(weak=other), atol=1e-3)
    with pytest.raises(UserError, match='other channels'): walk(weak=net_of(in_channels=4))


def test_labels_of_a_set():
    assert sample_labels(35, 16).bincount().tolist() == [3]*3+[2]*13
    y = sample_labels(4000, 16, 'random', 1)
    assert y.bincount(minlength=16).min() > 180 and not torch.equal(y, sample_labels(4000, 16, 'random', 2))
    assert torch.equal(y, sample_labels(4000, 16, 'random', 1))


@pytest.mark.parametrize('name', [*nets])
def test_bundled_nets_belong_to_bundled_tokenizers(name):
    net, late = nets[name], name.removesuffix('-early')
    tok, p = tokenizer_of(net), FLOW_PRESETS[late]
    # a net of captions has no table of classes, whatever their number is said to be
    want = replace(p.net, num_classes=net.config.num_classes) if p.net.text_dim else p.net
    assert late == f"{'lumina' if want.text_dim else 'dit'}-{tok.name}" and net.config == want
    assert net.meta['recipe']['images'] == (p.num_images if late == name else 4800*p.batch_size)
    assert {v.dtype for v in net.state_dict().values()} == {torch.float32}
    assert not net.training and isinstance(LatentCache, type)
    asked = encoder_of(net)(['a ring', 'a large cross with stripes']) if net.config.text_dim else [0, 5]
    z = sample_latents(net, asked, tuple(net.meta['latent']), sampler=Sampler(4))
    assert z.isfinite().all() and .3 < z.std() < 3


def test_the_bundled_net_draws_what_is_asked_for():
    s, look = generate('dit-vfmvae-tiny-f8d16', 128, seed=11, steps=8), bundled_extractor()
    with torch.no_grad(): said = torch.cat([look(x)['probs'].argmax(1) for x in s.images.split(64)])
    assert (said == s.labels).double().mean() > .7      # .8 of what it says of real images, less three errors of 128 samples
    assert s.facts['guidance'] == dict(guidance=4.5, interval=(.2, 1.), weak='dit-vfmvae-tiny-f8d16-early', weak_null=True)


NAN = float('nan')
CONFIGS = [dict(lr=v) for v in (-1., 0, NAN, math.inf, 1e300, 'x', True)] + [dict(ema=v) for v in (1., -.1, NAN, 'x')] + [
    dict(betas=v) for v in (.9, (.9,), (.9, 1.), (NAN, .9), 'ab')] + [dict(weight_decay=v) for v in (-1, NAN, 'x')] + [
    dict(clip=v) for v in (0, -1, NAN, 'x', True)] + [dict(path='liner'), dict(predict=3)] + [
    dict(weights=v) for v in (dict(flow=NAN), dict(flow=-1.), dict(flow='x'), dict(flw=1.), 3, ['flow'])] + [
    dict(laws=v) for v in (('uniform', 0), (('uniform', 1),), (('uniform', 0), ('uniform', 0)), (('uniforn', 0),), (('uniform', 'x'),), 3, None, (),
                           ((dict(law='uniform', shift=-1.), 0),), ((dict(low='uniform'), 0),), ((dict(law='logit_normal', std=NAN), 0),), ((3, 0),))]


@pytest.mark.parametrize('wrong', CONFIGS, ids=str)
def test_a_recipe_of_wrong_values_is_one_line(wrong):
    with pytest.raises(UserError, match=f'FlowConfig.{next(iter(wrong))}') as e: FlowConfig(**wrong)
    assert '\n' not in str(e.value)


def test_a_law_in_another_spelling_is_the_same_recipe():
    assert FlowConfig(laws=((dict(law='uniform'), 0),)) == FlowConfig(laws=[['uniform', 0.]]) == FlowConfig()
    how = dict(law='logit_normal', mean=.8)
    assert FlowConfig(laws=(('uniform', 0), (how, 10))).laws == (('uniform', 0), (how, 10))


SAMPLING = [dict(steps=v) for v in (0, -1, 1.5, NAN, 'x', True)] + [dict(guidance=v) for v in (NAN, math.inf, -math.inf, 1e30, 'x', None)] + [
    dict(shift=v) for v in (0, -1, NAN, math.inf, 'x')] + [dict(batch_size=v) for v in (0, -1, .5)] + [dict(channels=v) for v in (0, 1.5, 'x')] + [
    dict(interval=v) for v in ((.8, .2), (NAN, 1.), (0, 'x'), 3, (0,))] + [dict(seed=v) for v in (.5, NAN, 'x')] + [
    dict(norm=NAN, method='sde'), dict(last_step=2., method='sde'), dict(atol=-1., method='dopri5')]


@pytest.mark.parametrize('wrong', SAMPLING, ids=str)
def test_sampling_of_wrong_values_is_one_line(wrong):
    net = net_of()
    for weak in (None, net) if 'guidance' in wrong else (None,):
        with pytest.raises(UserError) as e:
            own = {k: v for k, v in wrong.items() if k in ('seed', 'batch_size')}
            sampler = Sampler(**dict(steps=2) | {k: v for k, v in wrong.items() if k not in own})
            sample_latents(net, [0, 1], (3, 4, 4), sampler=sampler, weak=weak, **own)
        assert '\n' not in str(e.value)


@pytest.mark.parametrize('labels', [[], [5], [-1], [.5], ['x'], torch.tensor([7]), 4, None], ids=str)
def test_labels_that_are_none_are_one_line(labels):
    with pytest.raises(UserError) as e: sample_latents(net_of(), labels, (3, 4, 4), sampler=Sampler(1))
    assert '\n' not in str(e.value)


@pytest.mark.parametrize('method', ['euler', 'heun', 'rk4', 'sde'])
def test_sampling_that_leaves_the_numbers_says_so(method):
    net = net_of()
    with torch.no_grad(): net.final_layer.linear.weight.fill_(3e38)
    for how in (dict(), dict(states=True)):
        with pytest.raises(UserError, match='ended in NaN or infinity') as e: sample_latents(net, [0, 1], (3, 4, 4), sampler=Sampler(2, method), **how)
        assert '\n' not in str(e.value) and not net.final_layer.linear.weight.isnan().any()
    for seed in (2**60, -3): assert sample_latents(net_of(), [0], (3, 4, 4), sampler=Sampler(1), seed=seed).isfinite().all()


def test_a_watch_that_goes_on_keeps_its_schedule(tmp_path):
    def go(name, images):
        t, run = task_of(), Run(tmp_path/name)
        w = FlowMonitor(t, Rows(48), 64, run, n=8)
        fit(t, loader(Rows(), 8), images, run, log_every=2, save_every=3, show=w)
        return w.rows, run.rows('watch.jsonl')
    straight, _ = go('a', 200)
    go('b', 88)                                   # looked at 64; the last row of the log is at 88
    again, kept = go('b', 200)
    assert [r['images'] for r in straight] == [64, 128, 192] and straight == again == kept


def test_a_flow_run_goes_on_behind_the_same_vfm_only(tmp_path):
    run, ds = Run(tmp_path/'r'), Rows(images=True)
    fit(task_of('repa'), loader(ds, 8), 8, run, show=quiet)
    other = task_of('repa')
    with torch.no_grad(): next(other.vfms[0].parameters()).add_(1e-3)
    with pytest.raises(UserError, match='frozen.vfm0: .* there'): fit(other, loader(ds, 8), 16, run, show=quiet)
    with pytest.raises(UserError, match='data: .* there'): fit(task_of('repa'), loader(Rows(images=True, classes=3), 8), 16, run, show=quiet)
    assert fit(task_of('repa'), loader(ds, 8), 16, run, log_every=1, show=quiet)[-1]['images'] == 16


def test_a_picture_that_is_not_finite_is_skipped_with_its_step():
    t, b = task_of('repa'), Rows(images=True).batch(range(4))
    b['image'][1, 0, 3, 3] = math.nan
    start = {k: v.clone() for k, v in task_state(t)[0].items()}
    with pytest.raises(NotFinite, match='repa'): t.step([b], lambda x: x.backward(), lambda ok=True: ok, 4)
    assert all(torch.equal(v, start[k]) for k, v in task_state(t)[0].items())


def test_channels_that_a_file_names_are_not_those_of_a_weaker_net():
    "They are guided away from the null label; a Sampler that names both is refused, and so is a caller who does."
    net = open_net('dit-vfmvae-tiny-f8d16')
    net.meta = dict(net.meta, sampling=asdict(Sampler(2, guidance=2., channels=3)))
    ask = lambda **how: generate(net, [3], weak='dit-vfmvae-tiny-f8d16-early', **how)
    assert torch.equal(ask().images, ask(sampler=Sampler(2, guidance=2.)).images)
    for both in (dict(channels=3), dict(sampler=Sampler(2, channels=3))):
        with pytest.raises(UserError, match='null label alone'): ask(**both)


@pytest.mark.parametrize('shape', [3, 'abc', (3, 4), (3, 4, 4, 4), (3, 0, 4), (3, 4.5, 4), None], ids=str)
def test_a_shape_that_is_none_is_one_line(shape):
    with pytest.raises(UserError, match='shape') as e: sample_latents(net_of(), [0], shape, sampler=Sampler(1))
    assert '\n' not in str(e.value)
