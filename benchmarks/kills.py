"""Kills training, caching, extraction, sampling and evaluation at random times and lets each go on: same bits, clean folder?

`python benchmarks/kills.py --n 100 --seed 0 --out data/results/kills.json` prints a table and writes it with seed, commit and hardware."""
import argparse, json, multiprocessing, os, random, re, signal, sys, tempfile, time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

CONTEXT = multiprocessing.get_context('forkserver')   # children begin with everything imported and nothing computed
PRELOAD = ['torch', 'torch._dynamo', 'torchvision', 'timm', 'accelerate', 'torchmetrics', 'vfmvae.generation', 'vfmvae.demo',
           'safetensors.torch', 'matplotlib.pyplot', 'matplotlib.backends.backend_agg']
VOLATILE = {'made', 'date', 'images_per_s', 'memory_gb', 'pair'}    # true of one run, not of its numbers


def tokenizer(folder: Path) -> None:
    from vfmvae.recipes import train_tokenizer
    out = folder/'net.safetensors'
    train_tokenizer('conv-f8d16', 'world', num_images=8, batch_size=4, run=folder/'run', out=out, log_every=1, save_every=1)


def flow(folder: Path) -> None:
    from vfmvae.world import World
    from vfmvae.presets import FLOW_PRESETS
    from vfmvae.flow_task import FlowMonitor
    from vfmvae.generation import train_flow
    from vfmvae.latents import LatentCache
    from vfmvae.run import Run
    p = FLOW_PRESETS['dit-conv-f8d16']
    p = replace(p, net=replace(p.net, hidden_size=32, depth=1, num_heads=2))
    def watch(task: Any) -> FlowMonitor: return FlowMonitor(task, LatentCache(folder/'latents'), 16, Run(folder/'run'), n=4)
    train_flow(p, World(16, seed=2), folder/'latents', num_images=48, batch_size=8, run=folder/'run', out=folder/'net.safetensors',
               monitor=watch, log_every=1, save_every=2, keep=1)


def cache(folder: Path) -> None:
    from vfmvae.world import World
    from vfmvae.latents import cache_latents
    from vfmvae.tokenizer import tokenizers
    cache_latents(tokenizers['conv-f8d16'], World(40, seed=3), folder/'latents', shard_size=16, batch_size=8)


def extraction(folder: Path) -> None:
    from vfmvae.world import World
    from vfmvae.features import banks
    from vfmvae.vfm import VFM
    made = banks(VFM('tiny'), World(32, seed=4), layers=(0, 2, -1))
    for layer, bank in made.items(): bank.save(folder/f'layer{layer}.safetensors')


def sampling(folder: Path) -> None:
    from vfmvae.generation import generate
    generate('dit-conv-f8d16', 6, seed=5, out=folder/'pictures', steps=2, batch_size=2)


def evaluation(folder: Path) -> None:
    from vfmvae.files import write_json
    from vfmvae.world import World
    from vfmvae.extractors import bundled_extractor
    from vfmvae.statistics import compute_statistics
    from vfmvae.evaluate import gfid, rfid
    from vfmvae.tokenizer import tokenizers
    data, eye = World(48, seed=6), bundled_extractor()
    compute_statistics(data, eye, name='world').save(folder/'world.npz')
    write_json(folder/'gfid.json', gfid(World(48, seed=7), folder/'world.npz', eye).json())
    write_json(folder/'rfid.json', rfid(tokenizers['conv-f8d16'], data, eye).json())


JOBS: dict[str, Callable[[Path], None]] = dict(tokenizer=tokenizer, flow=flow, cache=cache, extraction=extraction,
                                               sampling=sampling, evaluation=evaluation)


def plain(x: Any) -> Any:
    "JSON without what is true of one run alone."
    if isinstance(x, dict): return {k: plain(v) for k, v in x.items() if k not in VOLATILE}
    return [plain(v) for v in x] if isinstance(x, list) else x


def state(folder: Path) -> dict[str, Any]:
    "Every file below a folder by its content."
    import numpy as np
    from safetensors import safe_open
    from vfmvae.files import digest
    found: dict[str, Any] = {}
    for p in sorted(q for q in folder.rglob('*') if q.is_file()):
        if p.suffix == '.safetensors':
            with safe_open(p, 'pt') as f: value: Any = digest({k: f.get_tensor(k) for k in f.keys()})
        elif p.suffix == '.json': value = plain(json.loads(p.read_text(encoding='utf-8')))
        elif p.suffix == '.jsonl': value = [plain(json.loads(x)) for x in p.read_text(encoding='utf-8').splitlines()]
        elif p.suffix == '.npz':
            with np.load(p) as a: value = {k: a[k].tobytes() for k in a.files}
        else: value = p.read_bytes()
        found[str(p.relative_to(folder))] = value
    return found


def strike(pattern: str, when: str, nth: int = 1) -> None:
    """From now on this process dies at the nth operation on a file whose name matches: 'write' before it gets its name (its
    temporary file stays), 'written' after, 'delete' before it is deleted, 'log' with half of a new line in it."""
    left = [nth]
    def due(path: Any) -> bool:
        if not re.fullmatch(pattern, Path(path).name): return False
        left[0] -= 1
        return left[0] == 0
    def die() -> None: os.kill(os.getpid(), signal.SIGKILL)
    name, unlink = os.replace, Path.unlink
    def rename(a: Any, b: Any, **kw: Any) -> None:
        hit = when in ('write', 'written') and due(b)
        if hit and when == 'write': die()
        name(a, b, **kw)
        if hit: die()
    def delete(self: Path, *a: Any, **kw: Any) -> None:
        if when == 'delete' and due(self): die()
        unlink(self, *a, **kw)
    os.replace, Path.unlink = rename, delete  # type: ignore[assignment]
    if when == 'log':
        from vfmvae.run import Run
        log = Run.log
        def half(self: Any, row: dict, file: str = 'log.jsonl') -> None:
            log(self, row, file)
            if due(self.dir/file):
                os.truncate(self.dir/file, os.path.getsize(self.dir/file)-20)     # half a line reached the disk
                die()
        Run.log = half  # type: ignore[method-assign]


def child(job: str, folder: Path, at: tuple | None) -> None:
    "One process: the job from its start, or from where a killed one left it."
    import torch
    torch.set_num_threads(1)
    os.environ['VFMVAE_HOME'] = str(folder.parent/'home')
    sys.stderr = sys.stdout = open(os.devnull, 'w')
    if at: strike(*at)
    folder.mkdir(parents=True, exist_ok=True)
    JOBS[job](folder)


def run(job: str, folder: Path, at: tuple | None = None, after: float | None = None) -> int:
    "Runs a job in a process of its own, killed at a point of `strike` or after so many seconds; its exit code (-9: killed)."
    CONTEXT.set_forkserver_preload(PRELOAD)
    p = CONTEXT.Process(target=child, args=(job, folder, at))
    p.start()
    p.join(after)
    if p.is_alive(): p.kill()
    p.join()
    return p.exitcode or 0


def torn(folder: Path) -> list[str]:
    "Temporary files of writers below a folder."
    return [str(p.relative_to(folder)) for p in folder.rglob('*') if p.name.startswith('.') or p.suffix == '.tmp']


def main(argv: list[str] | None = None) -> int:
    "Kills, goes on, compares; 1 if one differed or left a file."
    from vfmvae.files import write_json
    from vfmvae.runtime import provenance
    a = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    a.add_argument('--n', type=int, default=100)
    a.add_argument('--seed', type=int, default=0)
    a.add_argument('--out', type=Path)
    args = a.parse_args(argv)
    draw, rows = random.Random(args.seed), []
    with tempfile.TemporaryDirectory() as tmp:
        root = Path(tmp)
        want, length = {}, {}
        for job in JOBS:
            for _ in range(2):                       # the first one also warms the files up
                t = time.time()
                assert run(job, root/job/f'straight{len(length)}{job in length}') == 0, job
                length[job] = time.time()-t
                want[job] = state(root/job/f'straight{len(length)-1}{False}') if job not in want else want[job]
        for i in range(args.n):
            job = draw.choice(list(JOBS))
            folder, kills, code = root/job/f'{i}', 0, -9
            for _ in range(draw.choice((1, 1, 2))):  # some are killed again while they go on
                code = run(job, folder, after=draw.random()*length[job])
                kills += code == -signal.SIGKILL
            left = len(torn(folder))
            code = run(job, folder)
            same, clean = code == 0 and state(folder) == want[job], not torn(folder)
            rows.append(dict(job=job, kills=kills, torn=left, same=same, clean=clean))
            word = ('same' if same else 'DIFFERS', 'clean' if clean else f'LEFT {torn(folder)}')
            print(f'{i+1:4d}/{args.n}  {job:12s} killed {kills}  files torn {left}  {word[0]}  {word[1]}', flush=True)
    table = []
    for job in JOBS:
        mine = [r for r in rows if r['job'] == job]
        table.append(dict(job=job, runs=len(mine)) | {k: sum(r[k] for r in mine) for k in ('kills', 'torn', 'same', 'clean')})
    print(' '.join(f'{k:>11s}' for k in table[0]))
    for r in table: print(' '.join(f'{v:>11}' for v in r.values()))
    if args.out: write_json(args.out, dict(rows=table, n=args.n, made=provenance(seed=args.seed)))
    return int(not all(r['same'] and r['clean'] for r in rows))


if __name__ == '__main__': raise SystemExit(main())
