"""Laws of training: resuming, accumulation and several processes change nothing; what is not named does not move."""
import json, subprocess, sys, textwrap
import pytest, torch
from torch import nn
from vfmvae.core import UserError, load_weights
from vfmvae.data import World, loader
from vfmvae.tok_train import TINY, Stage, TokenizerTask, select, tokenizer_losses
from vfmvae.train import Run, fit, task_state, warm_cosine
from vfmvae.vae import VFMVAE
from vfmvae.vfm import VFM

STAGE = Stage('test', dict(l1=1., multiscale=.1, kl=1e-6, vf=1.))


def task(seed=0, stage=STAGE, **kw):
    torch.manual_seed(seed)
    return TokenizerTask(VFMVAE(TINY, VFM('tiny', pretrained=False)), stage, half_life=100, **kw)


def data(batch=4): return loader(World(64), batch)
def quiet(history): return None


def same(a, b):
    (x, _), (y, _) = task_state(a), task_state(b)
    return x.keys() == y.keys() and [k for k in x if not torch.equal(x[k], y[k])] == []


def test_stop_and_resume_is_bitwise_the_straight_run(tmp_path):
    kw = dict(lr=warm_cosine(1e-3, 6), log_every=2, show=quiet)
    straight, stopped, resumed = task(), task(), task(seed=1)    # the VFM is not saved with a run, so it must be the same one
    resumed.model.vfm.load_state_dict(stopped.model.vfm.state_dict()); resumed.ema.net.vfm.load_state_dict(stopped.model.vfm.state_dict())
    a = fit(straight, data(), 24, run=Run(tmp_path/'a'), **kw)
    fit(stopped, data(), 16, run=Run(tmp_path/'b'), **kw)
    b = fit(resumed, data(), 24, run=Run(tmp_path/'b'), **kw)
    assert same(straight, resumed)
    assert [{k: v for k, v in r.items() if k != 'images_per_s'} for r in a] == [{k: v for k, v in r.items() if k != 'images_per_s'} for r in b]
    assert len(Run(tmp_path/'b').history()) == len(b)


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


def test_a_loss_that_is_not_finite_stops_before_any_weight_moves():
    t = task()
    t.model.synthesis.blocks[3].torgb.bias.data.fill_(float('nan'))
    start = {k: v.clone() for k, v in t.model.named_parameters()}
    with pytest.raises(UserError, match='l1'): fit(t, data(), 4, show=quiet)
    assert all(torch.equal(v, start[k]) or v.isnan().any() for k, v in t.model.named_parameters())


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
    (tmp_path/'toy.py').write_text(textwrap.dedent(TOY))
    import socket
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    launch = [sys.executable, '-m', 'torch.distributed.run', '--master_port', str(port), '--nproc_per_node']
    for n in (1, 2):
        done = subprocess.run([*launch, str(n), str(tmp_path/'toy.py'), str(tmp_path/f'{n}.safetensors')], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
    (a, one), (b, two) = (load_weights(tmp_path/f'{n}.safetensors') for n in (1, 2))
    assert (one['processes'], two['processes']) == (1, 2)
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(torch.tensor(one['loss']), torch.tensor(two['loss']), atol=1e-5, rtol=1e-4)


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
