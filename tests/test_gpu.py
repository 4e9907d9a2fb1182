"""`make gpu` at its smoke size in a bare environment; every line of it can fail; nothing that happens in a part stops the others."""
import importlib.util, json, os, subprocess, sys
from pathlib import Path

import pytest
from scope import ALL, thorough
import torch

ROOT = Path(__file__).resolve().parent.parent
BARE = ('nbdev', 'pytest', 'pandas', 'seaborn', 'ipywidgets', 'IPython', 'matplotlib', 'umap', 'transformers', 'diffusers', 'fastcore')
spec = importlib.util.spec_from_file_location('gpu_bench', ROOT/'benchmarks/gpu.py')
gpu = importlib.util.module_from_spec(spec)
sys.modules['gpu_bench'] = gpu
spec.loader.exec_module(gpu)
gpu.SMOKE = True


_BARE = """
import sys, importlib.metadata as m
plain = m.distribution
def distribution(name):
    if name in {names}: raise m.PackageNotFoundError(name)
    return plain(name)
m.distribution = distribution
for name in {names}: sys.modules[name] = None
"""


def run(tmp_path, *words, **env):
    (tmp_path/'sitecustomize.py').write_text(_BARE.format(names=BARE))        # also in what is launched
    path = os.pathsep.join([str(tmp_path), os.environ.get('PYTHONPATH', '')])
    env = {k: v for k, v in os.environ.items() if k != 'VFMVAE_SMOKE'} | dict(PYTHONPATH=path, CUDA_VISIBLE_DEVICES='') | env
    return subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, env=env, cwd=tmp_path)


def test_the_smoke_size_passes_in_a_bare_environment(tmp_path):
    out = run(tmp_path, ROOT/'benchmarks/gpu.py', '--out', tmp_path/'a.json', VFMVAE_SMOKE='1')
    record, = json.loads((tmp_path/'a.json').read_text())['runs']
    lines = record['lines']
    assert out.returncode == 0 and [x for x in lines if x['result'] == 'fail'] == [], out.stdout[-2000:] + out.stderr[-2000:]
    assert [(x['part'], x['line']) for x in lines] == [(k, x.name) for k, f in gpu.PARTS.items() for x in f()]
    assert [x['line'] for x in lines if x['result'] == 'skip'] == ["Accelerate's FSDP"] and record['smoke'] and record['card'] == 'cpu'
    assert all(x['device'] == 'cpu' and x['seconds'] >= 0 for x in lines)
    assert all(x['value'] is not None and (x['low'] is not None or x['high'] is not None) for x in lines if x['result'] == 'pass')


# every line can fail -----------------------------------------------------------------------------------------------------------------------

def other(x):
    "What `gpu.there` gives, with other numbers in it."
    x, noise = GOOD(x), lambda t: torch.randn_like(t)*.5*t.std(unbiased=False).clamp(min=.1)
    if isinstance(x, torch.Tensor): return x + noise(x)
    with torch.no_grad():
        for p in x.parameters(): p.add_(noise(p))
    return x

GOOD = gpu.there


def reading(task, b):
    step = STEP(task, b)
    def more():
        step()
        for _ in range(20): torch.ones(()).item()
    return more

STEP = gpu.step_of


class Odd:
    "Draws whose numbers depend on how many were asked for, and are too wide."
    count = 0
    def __init__(self, seed, index, where):
        from vfmvae.core import Draws
        Odd.count += 1
        self.d = Draws(seed+len(index)+Odd.count, index, where)
    def __getattr__(self, k): return (lambda *a: 1.1*self.d.normal(*a)) if k == 'normal' else getattr(self.d, k)


def unlike_noise(m):
    from vfmvae import samplers
    class Unlike(samplers.ImageNoise):
        def __init__(self, seed, index, *a, **k): super().__init__(seed, range(len(index)), *a, **k)
    m.setattr(samplers, 'ImageNoise', Unlike)


def waiting(m):
    from vfmvae import train
    plain = train.to_device
    m.setattr(train, 'to_device', lambda b, d: (plain(b, d), b['image'].sum().item())[0])


def half_card(m):
    says = iter([True])
    m.setattr(gpu, 'on_card', lambda: next(says, False))


PATCHES = dict(
    other=lambda m: m.setattr(gpu, 'there', other), slow=lambda m: m.setattr(gpu, 'seconds', lambda f, rounds=1: 1e9),
    card=lambda m: m.setattr(gpu, 'matmul_tflops', lambda: 1e12),
    large=lambda m: m.setattr(gpu, 'peak_gb', lambda: 1e4), odd=lambda m: m.setattr(gpu, 'keyed', Odd), noise=unlike_noise,
    reads=lambda m: m.setattr(gpu, 'step_of', reading), waiting=waiting,
    forgets=lambda m: m.setattr('vfmvae.run.load_task_state', lambda *a: None), dark=lambda m: m.setattr(gpu, 'pinned', lambda x: x//2),
    broken=lambda m: m.setattr(gpu, 'PYTHON', ['false']), plain=half_card)

BREAKS = (   # part, words in the line's name, what spoils it; the first that fits
    ('draws', '', 'odd'), ('nets', 'samples', 'noise'), ('alignment', '50,000', 'slow'), ('decode', 'memory', 'large'), ('decode', '', 'slow'),
    ('train', 'memory', 'large'), ('train', 'host syncs', 'reads'), ('train', 'float64', 'other'), ('train', '', 'slow'), ('flow', 'share', 'card'),
    ('flow', '', 'slow'),
    ('resume', '', 'forgets'), ('transfers', 'host syncs', 'waiting'), ('transfers', 'GB', 'slow'), ('transfers', 'pinned', 'slow'),
    ('transfers', '', 'dark'), ('launch', 'FSDP', 'plain'), ('launch', '', 'broken'), ('', '', 'other'))


@pytest.mark.parametrize('name', thorough(gpu.PARTS, ['draws', 'nets', 'alignment', 'transfers']))
def test_every_line_can_fail(name, monkeypatch):
    "In `make test`, of the lines that there are for each bundled tokenizer, those of one of each family."
    known = gpu.bundled()
    if not ALL: monkeypatch.setattr(gpu, 'bundled', lambda: {k: known[k] for k in ('vfmvae-tiny-f8d16', 'conv-f8d16', 'rae-tiny-f8d128')})
    for i, line in enumerate(gpu.PARTS[name]()):
        spoils = next(how for part, words, how in BREAKS if name.startswith(part) and words in line.name)
        with monkeypatch.context() as m:
            PATCHES[spoils](m)
            row = gpu.judge([*gpu.PARTS[name]()][i])
        assert row['result'] == 'fail' and row['reason'], (spoils, row)


@pytest.mark.parametrize('measure, result, reason', [
    (lambda: 1., 'pass', ''), (lambda: (1., dict(a=2)), 'pass', ''), (lambda: 3., 'fail', '3 is above 2'), (lambda: .1, 'fail', '0.1 is below 0.5'),
    (lambda: float('nan'), 'fail', 'nan is no number'), (lambda: {}['x'], 'fail', 'KeyError'),
    (lambda: __import__('no_such'), 'fail', "No module named 'no_such'"),
    (lambda: (_ for _ in ()).throw(torch.OutOfMemoryError('CUDA out of memory. Tried')), 'fail', 'out of memory: CUDA'),
    (lambda: (_ for _ in ()).throw(gpu.Skip('no hub')), 'skip', 'no hub')])
def test_a_line_passes_fails_or_is_skipped_with_a_word(measure, result, reason):
    row = gpu.judge(gpu.Line('x', measure, .5, 2))
    assert row['result'] == result and reason in row['reason'] and bool(row['reason']) == (result != 'pass')


# nothing stops the others ------------------------------------------------------------------------------------------------------------------

_WORLD = '''
import os, signal, subprocess, sys, time
sys.path.insert(0, {root!r})
import gpu
from gpu import Line, part
gpu.PARTS.clear()
gpu.load_early = lambda: None
gpu.clear = lambda: None
def hang():
    p = subprocess.Popen(['sleep', '600'])
    open('pid', 'w').write(str(p.pid))
    time.sleep(600)
@part
def good():
    yield Line('one', lambda: 1)
    yield Line('dies', lambda: os.kill(os.getpid(), signal.SIGKILL))
    yield Line('leaves', lambda: os._exit(3))
    yield Line('two', lambda: 2)
@part
def bad():
    import no_such_package
    yield Line('never', lambda: 1)
@part
def long():
    yield Line('short', lambda: 1)
    yield Line('hangs', hang)
    yield Line('waits', lambda: 1)
@part
def late(): yield Line('late', lambda: 1)
sys.exit(gpu.main())
'''


def test_nothing_stops_the_others(tmp_path):
    script = tmp_path/'world.py'
    script.write_text(_WORLD.format(root=str(ROOT/'benchmarks')))
    out = run(tmp_path, script, '--smoke', '--limit', 4, '--out', tmp_path/'a.json')
    lines = {x['line']: x for x in json.loads((tmp_path/'a.json').read_text())['runs'][0]['lines']}
    assert {k: x['result'] for k, x in lines.items()} == dict(
        one='pass', dies='fail', leaves='fail', two='pass', begins='fail', short='pass', hangs='fail', waits='skip', late='pass'), out.stdout + out.stderr
    assert [lines[k]['reason'] for k in ('dies', 'leaves', 'hangs', 'waits')] == [
        'it ended its process (status -9)', 'it ended its process (status 3)', 'stopped: the part had 4 s', 'no time left']
    assert "No module named 'no_such_package'" in lines['begins']['reason'] and out.returncode == 1
    state = subprocess.run(['ps', '-o', 'stat=', '-p', (tmp_path/'pid').read_text()], capture_output=True, text=True).stdout.strip()
    assert state[:1] in ('', 'Z'), state                                                               # nor does what it started live on
    out = run(tmp_path, script, 'late', 'good', '--smoke', '--total', 1, '--out', tmp_path/'a.json')     # appended; no time for any
    runs = json.loads((tmp_path/'a.json').read_text())['runs']
    assert len(runs) == 2 and len(runs[0]['lines']) == 9 and {(x['result'], x['reason']) for x in runs[1]['lines']} == {('skip', 'no time left')}
    assert [x['line'] for x in runs[1]['lines']] == ['late', 'one', 'dies', 'leaves', 'two']


def test_without_a_card_it_says_how_to_go_on(tmp_path):
    out = run(tmp_path, ROOT/'benchmarks/gpu.py', 'draws')
    assert out.returncode == 2 and 'no card here; --smoke' in out.stderr
    assert 'no part' in run(tmp_path, ROOT/'benchmarks/gpu.py', 'nonsense').stderr


def test_make_gpu_installs_nothing():
    said = subprocess.run(['make', '-n', 'gpu', 'PARTS=decode flow', 'PYTHON=/some/python', 'VENV=/nowhere'], cwd=ROOT, capture_output=True, text=True).stdout
    assert said.split('\n')[:-1] == ['/some/python benchmarks/gpu.py decode flow ']
