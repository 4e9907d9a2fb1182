"""Is a step slower than before? Two trees of the library in two processes, the same steps in turns, ratios of processor time with a 95 % interval.

    python benchmarks/paired.py ../before .            # folders that hold `vfmvae/`; writes data/results/paired.json with --out
"""
import argparse, json, os, random, subprocess, sys, time
from pathlib import Path

STEPS = '''
import sys, time, tempfile, warnings, contextlib, io, os
warnings.simplefilter('ignore')
import torch
torch.set_num_threads(1)
from pathlib import Path
from PIL import Image
import importlib, pkgutil, vfmvae
modules = [importlib.import_module(f'vfmvae.{m.name}') for m in pkgutil.iter_modules(vfmvae.__path__) if not m.name.startswith('_') and 'bench' not in m.name]
def named(name):
    "A name of the library, in whichever module this tree has it: modules are split and renamed."
    return next(getattr(m, name) for m in modules if name in getattr(m, '__all__', ()))
for name in """World folder loader to_pil extract tokenizers reconstruct VFM bundled_extractor cache_latents train_tokenizer train_flow generate save_weights load_weights
               evaluate_tokenizer rfid cknna_score prepare cka linear_probe se_cknna""".split(): globals()[name] = named(name)
renamed = any('TrainOptions' in getattr(m, '__all__', ()) for m in modules)     # the other tree may have the words of before
tmp = Path(tempfile.mkdtemp())
os.environ['VFMVAE_HOME'] = str(tmp/'home')
world, tok, vfm, eye = World(512, seed=8), tokenizers['vfmvae-tiny-f8d16'], VFM('tiny'), bundled_extractor()
for i in range(96):
    at = tmp/'pics'/f'c{i//24}'
    at.mkdir(parents=True, exist_ok=True)
    to_pil(world[i]['image']).resize((96, 80)).save(at/f'{i}.png')
pics, x = folder(tmp/'pics', size=64), world.batch(range(64))['image']
a, b = (torch.randn(2000, 64, generator=torch.Generator().manual_seed(i)) for i in range(2))
y, count = torch.arange(2000) % 10, iter(range(10**9))
bank = save_weights(tmp/'w.safetensors', dict(w=torch.randn(1000, 1000)), {})
def cache(): cache_latents(tok, pics, tmp/f'cache{next(count)}')
def lasts(num_images, batch_size): return dict(num_images=num_images, batch_size=batch_size) if renamed else dict(images=num_images, batch=batch_size)
flow = cache_latents(tok, world, tmp/'flow')
steps = dict(
    extract=lambda: extract(vfm, world, [-1], quiet=True), decode=lambda: torch.no_grad()(reconstruct)(tok, x),
    read_folder=lambda: [pics.batch(range(96)) for _ in range(4)], open_folder=lambda: [folder(tmp/'pics', size=64) for _ in range(20)],
    cache=cache, evaluate=lambda: evaluate_tokenizer(tok, world, 128), rfid=lambda: rfid(tok, World(128, seed=8), eye, pr_n=0),
    cknna=lambda: cknna_score(prepare(a), prepare(b), times=50), cka=lambda: cka(a, b),
    probe=lambda: linear_probe(a[:1500], y[:1500], a[1500:], y[1500:]), se_cknna=lambda: se_cknna(tok, vfm, World(64, seed=8), 'axes', times=20),
    sample=lambda: generate('dit-vfmvae-tiny-f8d16', 16, steps=4), weights=lambda: [load_weights(bank) for _ in range(20)],
    open_tokenizer=lambda: tokenizers['vfmvae-tiny-f8d16'],
    train_tokenizer=lambda: train_tokenizer('tiny', world, stages=['first'], **lasts(16*6, 16)),
    train_flow=lambda: train_flow('dit-vfmvae-tiny-f8d16', world, cache=flow, **lasts(64*6, 64)))
out = sys.stdout
print(' '.join(steps), flush=True)
for line in sys.stdin:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        t = time.process_time()
        steps[line.strip()]()
        t = time.process_time()-t
    print(t, file=out, flush=True)
'''


def child(tree):
    env = dict(os.environ, PYTHONPATH=str(Path(tree).resolve()), OMP_NUM_THREADS='1', MPLBACKEND='agg')
    return subprocess.Popen([sys.executable, '-c', STEPS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env, cwd=tree)


def ask(p, step):
    p.stdin.write(step+'\n')
    p.stdin.flush()
    return float(p.stdout.readline())


def interval(pairs, seed=0):
    "Median ratio after/before, and its 95 % bootstrap interval."
    rng, ratios = random.Random(seed), sorted(b/a for a, b in pairs)
    mid = lambda r: sorted(r)[len(r)//2]
    drawn = sorted(mid(rng.choices(ratios, k=len(ratios))) for _ in range(2000))
    return mid(ratios), drawn[50], drawn[1949]


def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('before')
    p.add_argument('after')
    p.add_argument('--pairs', type=int, default=15)
    p.add_argument('--steps', default='')
    p.add_argument('--out')
    a = p.parse_args()
    kids = [child(a.before), child(a.after)]
    names = [k.stdout.readline().split() for k in kids][1]
    rows = []
    for step in a.steps.split(',') if a.steps else names:
        pairs = []
        for i in range(a.pairs+1):
            order = (0, 1) if i % 2 else (1, 0)
            got = {k: ask(kids[k], step) for k in order}
            if i: pairs.append((got[0], got[1]))          # the first run warms up
        mid, low, high = interval(pairs)
        rows.append(dict(step=step, before=sorted(p[0] for p in pairs)[len(pairs)//2], ratio=mid, low=low, high=high, pairs=len(pairs)))
        print(f"{step:16s} {rows[-1]['before']:.3f} s  ratio {mid:.3f} [{low:.3f}, {high:.3f}]", flush=True)
    for k in kids: k.kill()
    if a.out:
        commit = [subprocess.run(['git', 'rev-parse', '--short', 'HEAD'], cwd=t, capture_output=True, text=True).stdout.strip() for t in (a.before, a.after)]
        made = dict(before=commit[0], after=commit[1], date=time.strftime('%Y-%m-%d'), hardware=f'CPU, {os.cpu_count()} cores', threads=1, seed=0)
        Path(a.out).write_text(json.dumps(dict(what='processor seconds after/before, median of pairs run in turns, 95 % bootstrap interval', rows=rows, made=made), indent=1)+'\n')


if __name__ == '__main__': main()
