"""What several processes must do as one does: run by `tests/test_processes.py` under torchrun. Arguments: the folder to write to, the steps,
and names of jobs (all). Steps of every kind of bundled stage, at a learning rate at which Adam's first steps do not magnify rounding; the same in
parts (sharded), stopped and gone on; a cache, rFID, samples, a bank."""
import hashlib
import json
import sys
from dataclasses import replace
from pathlib import Path

import torch

from smoke import different_stages, joint_task
from vfmvae.world import World
from vfmvae.data import loader
from vfmvae.dit import DiT
from vfmvae.extractors import bundled_extractor
from vfmvae.evaluate import rfid
from vfmvae.features import banks
from vfmvae.presets import FLOW_PRESETS
from vfmvae.flow_task import FlowTask
from vfmvae.generation import generate
from vfmvae.latents import cache_latents
from vfmvae.presets import PRESETS
from vfmvae.recipes import build_training, schedule_stages
from vfmvae.text import TEXT
from vfmvae.tokenizer_task import Stage, TINY, TokenizerTask
from vfmvae.tokenizer import tokenizers
from vfmvae.runtime import finish_distributed, make_accelerator
from vfmvae.run import Run
from vfmvae.train import fit
from vfmvae.vae import VFMVAE
from vfmvae.vfm import VFM

acc, found = make_accelerator(), {}
n, rank = acc.num_processes, acc.process_index
out, steps, batch = Path(sys.argv[1]), int(sys.argv[2]), 4     # images of a step, one for each of four processes
quiet = dict(log_every=1, show=lambda h: None, accelerator=acc)


class Latents:
    def __init__(self, shape, classes):
        g = torch.Generator().manual_seed(0)
        self.mean, self.label = torch.randn(48, *shape, generator=g), torch.randint(classes, (48,), generator=g)
    def __len__(self): return len(self.mean)
    def batch(self, at): return dict(mean=self.mean[at], logvar=torch.full_like(self.mean[at], -2), label=self.label[at], key=list(map(str, at)))


CAPTIONS = 'a red ring on a blue ground', '', 'a small cross on a green ground'


class Said(Latents):
    "With a caption each."
    def __init__(self, shape, net):
        super().__init__(shape, 16)
        self.say = net.y_embedder.words.numbers
    def batch(self, at):
        text = self.say([CAPTIONS[i % 3] for i in at])
        return super().batch(at) | {k: getattr(text, k) for k in TEXT}


def flow(p, **how):
    torch.manual_seed(0)
    task = FlowTask(net := DiT(p.net), p.flow)
    ds = Said(p.latent, net) if p.net.text_dim else Latents(p.latent, p.net.num_classes)
    return task, fit(task, loader(ds, batch, 5, rank, n), how.pop('images', batch*steps), seed=7, **quiet, **how)


def tokenizer(model, stage, discriminators, perceive, p, **how):
    task = TokenizerTask(model, stage, perceive, p.half_life, p.betas, p.clip, discriminators)
    return task, fit(task, loader(World(48), batch, 5, rank, n), how.pop('images', batch*steps), lr=1e-4, seed=7, **quiet, **how)


def recipe(name, stage, smooth=False, **how):
    p = PRESETS[name]
    todo = schedule_stages(p, None, None, [stage], batch)
    if smooth: todo = [replace(todo[0], weights={k: w for k, w in todo[0].weights.items() if k not in ('l1', 'multiscale')} | dict(l2=1.))]
    model, discriminators, perceive = build_training(p, todo, None, None, None, 0, None)
    return tokenizer(model, todo[0], discriminators, perceive, p, **how)


def discrete(**how):
    torch.manual_seed(0)
    model = VFMVAE(replace(TINY, mode='discrete', vocab=64, codebooks=4, channels=32), VFM('tiny'))
    return tokenizer(model, Stage('d', dict(l1=1., vq=1., entropy=.1, vf=1.)), {}, None, PRESETS['tiny'], **how)


def joint(**how):
    task = joint_task()
    return task, fit(task, loader(World(48), batch, 5, rank, n), how.pop('images', batch*steps), lr=1e-4, seed=7, **quiet, **how)


def numbers(rows): return [{k: v for k, v in r.items() if k not in ('images_per_s', 'memory_gb')} for r in rows]


jobs = {'/'.join(k): (recipe, k) for k in different_stages()}
jobs |= {name: (flow, (p,)) for name, p in FLOW_PRESETS.items() if p.tokenizer in {k if k != 'tiny' else 'vfmvae-tiny-f8d16' for k in PRESETS}}
jobs |= {'joint': (joint, ()), 'discrete': (discrete, ()), 'smooth/strong_align': (recipe, ('tiny', 'strong_align', True))}       # without absolute differences
if len(sys.argv) > 3: jobs = {k: v for k, v in jobs.items() if k in sys.argv[3].split(',')}
for name, (f, given) in jobs.items(): found[name] = numbers(f(*given)[1])

cut = [k for k in ('dit-vfmvae-tiny-f8d16', 'smooth/strong_align', 'conv-tiny-f8d16/first', 'rae-tiny-f8d128/first') if k in jobs]
for name in cut if n > 1 else ():
    f, given = jobs[name]
    task, rows = f(*given, shard=True)
    run = Run(out/f"{name.replace('/', '-')}-{n}")
    f(*given, shard=True, run=run, images=batch*(steps//2), save_every=1)
    again, _ = f(*given, shard=True, run=run)
    found[f'{name} sharded'] = numbers(rows)
    a, b = (t.ema.net.state_dict() for t in (task, again))
    found[f'{name} resumed'] = all(torch.equal(a[k], b[k]) for k in a) and {type(v) for v in a.values()} == {torch.Tensor}
    found[f'{name} files'] = sorted(p.name for p in run.dir.iterdir())


flow(FLOW_PRESETS['dit-vfmvae-tiny-f8d16'], images=3*batch, run=Run(out/f'told-{n}'), trackers='tensorboard', save_every=99)   # the group goes on

# what two processes began, four go on with; one does it straight
found['grows'] = numbers(flow(FLOW_PRESETS['dit-vfmvae-tiny-f8d16'], images=3*batch if n == 2 else 6*batch,
                              **(dict(shard=True, run=Run(out/'grows')) if n > 1 else {}))[1])


def marks(folder): return {p.name: hashlib.blake2b(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir()) if p.suffix in ('.png', '.safetensors')}


tok = tokenizers['vfmvae-tiny-f8d16']
cache_latents(tok, World(40), out/f'cache-{n}', shard_size=8, batch_size=5, flips=True)
generate('dit-vfmvae-tiny-f8d16', 10, 3, out=out/f'samples-{n}', steps=2, batch_size=4)
record = rfid(tok, World(150, seed=3), bundled_extractor(), sample=True, batch_size=7 + n, pr_n=100)
bank = banks(VFM('tiny'), World(20), layers=[-1], quiet=True)[-1]
found['files'] = {k: marks(out/f'{k}-{n}') for k in ('cache', 'samples')}
found['rfid'], found['bank'] = record.metrics, bank.features.double().sum(0).tolist()
if acc.is_main_process: (out/f'losses-{n}.json').write_text(json.dumps(found))
finish_distributed()
