"""Several processes do what one does: the same losses for every kind of bundled stage, whole and sharded, the same files; by `torchrun` on gloo."""
import json
import math
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from scope import ALL, thorough
import torch

from vfmvae.core import Draws, UserError
from vfmvae.world import World
from vfmvae.data import loader
from vfmvae.run import load_shards, save_shard
from vfmvae.train import fit, shard
from vfmvae.vfm import VFM

SCRIPT, STEPS = Path(__file__).with_name('processes.py'), 3
# an absolute difference (L1) has a kink where it is 0, a LeakyReLU and a hinge too: rounding that tips one pixel of 98,304 over it moves a
# gradient by 1e-4, and with it the adaptive weight in the loss; the others are smooth
SMOOTH = ('dit-vfmvae-tiny-f8d16', 'dit-conv-tiny-f8d16', 'dit-conv-f8d16', 'conv-f8d16/first', 'rae-tiny-f8d128/first', 'tiny/first',
          'smooth/strong_align')

FOUR = ('dit-vfmvae-tiny-f8d16', 'smooth/strong_align', 'rae-tiny-f8d128/first', 'discrete')

OTHERS = ('files', 'rfid', 'bank', 'grows')


def torchrun(n, *args):
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    launch = [sys.executable, '-m', 'torch.distributed.run', '--master_port', str(port), '--nproc_per_node', str(n)]
    done = subprocess.run([*launch, *map(str, args)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f'{done.stderr[:3000]}\n...\n{done.stderr[-2000:]}'     # who aborts says why at its start


@pytest.fixture(scope='module')
def out(tmp_path_factory): return tmp_path_factory.mktemp('processes')


@pytest.fixture(scope='module')
def found(out):
    for n in (1, 2): torchrun(n, SCRIPT, out, STEPS)
    if ALL: torchrun(4, SCRIPT, out, STEPS, ','.join(FOUR))
    return {n: json.loads((out/f'losses-{n}.json').read_text()) for n in (1, 2, *([4] if ALL else []))}


def apart(a, b, keys): return max(abs(x[k]-y[k])/max(1e-3, abs(x[k])) for x, y in zip(a, b, strict=True) for k in keys if k in x)


def assert_same_losses(name, one, many):
    """Every step's loss agrees. Under the VF loss's adaptive weight, a ratio of gradients (of absolute differences of distances, which have kinks),
    each term does, to the bound of the smooth: the ratio alone was off, by 7e-5 on one machine and 1e-6 on another; why there, was not traced."""
    weighed = name in SMOOTH and 'vf_scale' in one[0]
    assert apart(one, many, ['loss']) < (1e-5 if name in SMOOTH and not weighed else 1e-3), name
    if weighed: assert apart(one, many, ['l2', 'perceptual', 'kl', 'vf', 'loss_d']) < 1e-5, name


@pytest.mark.parametrize('n', thorough((2, 4), [2]))
def test_every_recipe_has_the_losses_of_one_process(found, n):
    one, many = {k: v for k, v in found[1].items() if k not in OTHERS}, {k: v for k, v in found[n].items() if ' ' not in k and k not in OTHERS}
    assert many.keys() == ({*one} if n == 2 else {*FOUR}) and len(one) >= 12
    for name, rows in many.items():
        assert len(rows) == STEPS and all(r.keys() == o.keys() for r, o in zip(rows, one[name], strict=True))
        terms = [k for k in rows[0] if k not in ('grad_norm', 'grad_norm_d', 'vf_scale', 'lr', 'step', 'images', 'gan')]
        assert apart(one[name][:1], rows[:1], terms) < 1e-5, name                  # before a weight has moved, all of it
        assert_same_losses(name, one[name], rows)
        assert len({r['loss'] for r in rows}) == STEPS                             # each step is another one


@pytest.mark.parametrize('n', thorough((2, 4), [2]))
def test_sharded_nets_learn_the_same_stop_and_go_on(found, n):
    names = [k.removesuffix(' sharded') for k in found[n] if k.endswith(' sharded')]
    assert len(names) == (4 if n == 2 else 3)
    for name in names:
        assert_same_losses(name, found[1][name], found[n][f'{name} sharded'])
        assert found[n][f'{name} resumed'] is True, name
        parts = [f for f in found[n][f'{name} files'] if f.startswith('shard-')]
        assert {f'shard-{STEPS:08d}-{r+1}-of-{n}.safetensors' for r in range(n)} <= {*parts} and len(parts) == 2*n


@pytest.mark.parametrize('n', thorough((2, 4), [2]))
def test_caches_samples_rfid_and_banks_are_those_of_one_process(found, n):
    one, many = found[1], found[n]
    assert many['files'] == one['files'] and len(one['files']['cache']) == 5 and len(one['files']['samples']) == 10      # to the bit
    assert many['rfid'].keys() == one['rfid'].keys() >= {'fd', 'precision', 'recall'}
    for k, v in one['rfid'].items(): assert many['rfid'][k] == pytest.approx(v, rel=1e-6), k                             # the batch size differs, too
    assert many['bank'] == pytest.approx(one['bank'], rel=1e-6)


@pytest.mark.parametrize('n', (1, 2))
def test_tensorboard_has_the_rows_of_the_log(found, out, n):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    folder = out/f'told-{n}'
    rows = [json.loads(line) for line in (folder/'log.jsonl').read_text().splitlines()]
    assert len(list((folder/folder.name).glob('events*'))) == 1                          # one process writes
    told = EventAccumulator(str(folder/folder.name))
    told.Reload()
    assert [(s.step, s.value) for s in told.Scalars('loss')] == [(r['images'], pytest.approx(r['loss'])) for r in rows] and len(rows) == 3


def test_a_tracker_that_is_not_there_is_one_line():
    from vfmvae.tokenizer_task import Stage, TINY, TokenizerTask
    from vfmvae.vae import VFMVAE
    task = TokenizerTask(VFMVAE(TINY, VFM('tiny')), Stage('a', dict(l1=1.)))
    with pytest.raises(UserError, match="no tracker 'tensorbord'; nearest: tensorboard"):
        fit(task, loader(World(8), 4), 4, trackers='tensorbord', show=lambda h: None)


@pytest.mark.thorough
def test_four_processes_go_on_with_what_two_began(found):
    assert len(found[2]['grows']) == 3 and len(found[4]['grows']) == 6
    assert apart(found[1]['grows'], found[4]['grows'], ['loss']) < 1e-5


def test_parts_are_put_together_and_one_that_is_missing_is_named(tmp_path):
    t = torch.randn(5, 3)
    paths = [save_shard(tmp_path/f'{i}.safetensors', dict(w=part)) for i, part in enumerate(t.chunk(2))]
    assert torch.equal(load_shards(paths)['w'], t) and load_shards([]) == {}
    paths[1].unlink()
    with pytest.raises(UserError, match='1.safetensors'): load_shards(paths)
    paths[1].write_bytes(paths[0].read_bytes()[:50])
    with pytest.raises(UserError, match='all 2 parts'): load_shards(paths)


def test_one_process_has_nothing_to_shard_and_accelerates_fsdp_on_a_cpu_is_refused(monkeypatch):
    from vfmvae.tokenizer_task import Stage, TINY, TokenizerTask
    from vfmvae.vae import VFMVAE
    task = TokenizerTask(VFMVAE(TINY, VFM('tiny')), Stage('a', dict(l1=1.)))
    with pytest.raises(UserError, match='nothing to shard'): shard(task, 'cpu')
    monkeypatch.setenv('ACCELERATE_USE_FSDP', 'true')
    with pytest.raises(UserError, match='plain data parallelism'): fit(task, loader(World(8), 4), 4, show=lambda h: None)


def test_draws_depend_on_seed_image_and_use_alone():
    a, b = Draws(5, range(40)), Draws(5, [39, 3])
    for ask in (lambda d: d.normal('x', (7,)), lambda d: d.uniform('x', (7,)), lambda d: d.integers('x', 0, 10**6, (7,)),
                lambda d: d.named('p').normal('x', (3,))):
        assert torch.equal(ask(a)[[39, 3]], ask(b))
    assert not torch.equal(a.normal('x', (7,)), Draws(6, range(40)).normal('x', (7,)))
    assert not torch.equal(a.normal('x', (7,)), a.named('p').normal('x', (7,)))
    assert torch.equal(Draws(5, [1], step=3).shared.uniform('w', (2,)), Draws(5, [2, 9], step=3).shared.uniform('w', (2,)))
    assert not torch.equal(Draws(5, [1], step=3).shared.uniform('w', (2,)), Draws(5, [1], step=4).shared.uniform('w', (2,)))
    assert torch.equal(Draws(-1, [2**63]).uniform('x', (2,)), Draws(-1, [-2**63]).uniform('x', (2,)))


def test_long_rows_are_numpys_philox_and_short_ones_the_same_by_torch():
    import zlib
    import numpy as np
    from vfmvae.core import philox
    seed, at = 2**63+11, [3, 2**63+5, 9, 2**40]
    mine = Draws(seed, at).normal('x', (5, 7), torch.float64)
    for row, i in zip(mine, at, strict=True):
        stream = np.random.Philox(key=np.array([seed, i], np.uint64), counter=np.array([0, 0, zlib.crc32(b'x'), 0], np.uint64))
        assert np.array_equal(np.random.Generator(stream).standard_normal(35), row.flatten().numpy())
    halves = lambda v: (v & 0xffffffff, v >> 32)
    words = philox((torch.arange(3)[None], zlib.crc32(b'x'), *torch.tensor([halves(i) for i in at]).T[:, :, None]), halves(seed))   # as on a card
    words = torch.stack(torch.broadcast_tensors(*words), -1).flatten(1)[:, :10]
    assert torch.equal((words >> 8).float()/2**24, Draws(seed, at).uniform('x', (10,)))
    assert torch.equal(words*9 >> 32, Draws(seed, at).integers('x', 0, 9, (10,)))


@pytest.mark.parametrize('most', (math.inf, 1e9, 1., .01))
def test_gradients_are_clipped_as_torch_does(most):
    from vfmvae.train import clip_gradients
    g = torch.Generator().manual_seed(0)
    ours, theirs = ([torch.nn.Parameter(torch.zeros(n, 3)) for n in (4, 1, 50)] + [torch.nn.Parameter(torch.zeros(2))] for _ in range(2))
    for a, b in zip(ours[:3], theirs[:3], strict=True): a.grad, b.grad = (x := torch.randn(a.shape, generator=g)), x.clone()     # the last has none
    assert torch.equal(clip_gradients(ours, most), torch.nn.utils.clip_grad_norm_(theirs, most, foreach=True))
    for a, b in zip(ours[:3], theirs[:3], strict=True): assert torch.equal(a.grad, b.grad)


def test_draws_of_neighbours_are_not_alike():
    from scipy.stats import kstest
    u, z = Draws(0, range(2000)).uniform('x', (8,)).double(), Draws(0, range(2000)).normal('x', (8,)).double()
    assert kstest(u.flatten().numpy(), 'uniform').pvalue > 1e-4 and kstest(z.flatten().numpy(), 'norm').pvalue > 1e-4
    for x in (u-.5, z):
        x = x/x.std()
        for shifted in (x.roll(1, 0), x.roll(1, 1)): assert abs((x*shifted).mean()) < 5/math.sqrt(x.numel())
