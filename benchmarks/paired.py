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
from vfmvae.data import World, folder, loader, to_pil
from vfmvae.features import extract
from vfmvae.tokenizer import tokenizers, reconstruct
from vfmvae.vfm import VFM
from vfmvae import align, evaluate, generate, latents, recipes, core
tmp = Path(tempfile.mkdtemp())
os.environ['VFMVAE_HOME'] = str(tmp/'home')
world, tok, vfm, eye = World(512, seed=8), tokenizers['vfmvae-tiny-f8d16'], VFM('tiny'), evaluate.bundled_extractor()
for i in range(96):
    at = tmp/'pics'/f'c{i//24}'
    at.mkdir(parents=True, exist_ok=True)
    to_pil(world[i]['image']).resize((96, 80)).save(at/f'{i}.png')
pics, x = folder(tmp/'pics', size=64), world.batch(range(64))['image']
a, b = (torch.randn(2000, 64, generator=torch.Generator().manual_seed(i)) for i in range(2))
y, count = torch.arange(2000) % 10, iter(range(10**9))
bank = core.save_weights(tmp/'w.safetensors', dict(w=torch.randn(1000, 1000)), {})
def cache(): latents.cache_latents(tok, pics, tmp/f'cache{next(count)}')
def train_tokenizer(): recipes.train_tokenizer('tiny', world, images=16*6, stages=['first'])
def train_flow():
    recipes_ = dict(images=64*6, batch=64, cache=flow)
    generate.train_flow('dit-vfmvae-tiny-f8d16', world, **recipes_)
flow = latents.cache_latents(tok, world, tmp/'flow')
steps = dict(
    extract=lambda: extract(vfm, world, [-1], quiet=True), decode=lambda: torch.no_grad()(reconstruct)(tok, x),
    read_folder=lambda: [pics.batch(range(96)) for _ in range(4)], open_folder=lambda: [folder(tmp/'pics', size=64) for _ in range(20)],
    cache=cache, evaluate=lambda: recipes.evaluate_tokenizer(tok, world, 128), rfid=lambda: evaluate.rfid(tok, World(128, seed=8), eye, pr_n=0),
    cknna=lambda: align.cknna_score(align.prepare(a), align.prepare(b), times=50), cka=lambda: align.cka(a, b),
    probe=lambda: align.linear_probe(a[:1500], y[:1500], a[1500:], y[1500:]), se_cknna=lambda: align.se_cknna(tok, vfm, World(64, seed=8), 'axes', times=20),
    sample=lambda: generate.generate('dit-vfmvae-tiny-f8d16', 16, steps=4), weights=lambda: [core.load_weights(bank) for _ in range(20)],
    open_tokenizer=lambda: tokenizers['vfmvae-tiny-f8d16'], train_tokenizer=train_tokenizer, train_flow=train_flow)
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
