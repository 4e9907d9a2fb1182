"""What only a graphics card can tell, line by line: each passes, fails with its reason, or is skipped with a word.

    python benchmarks/gpu.py [PART ...] [--smoke] [--out FILE]        # or: make gpu PARTS='decode flow'

Needs torch, timm, accelerate, safetensors, scikit-learn, torchmetrics; installs nothing. A part has a process of its own and at most 8 minutes, all
together 25. Lines are appended to data/results/gpu_<card>.json as they come. `--smoke` (or VFMVAE_SMOKE=1): the same code at tiny sizes on any machine.
To add a part: a function marked `@part` that yields `Line`s; all work belongs into their `measure`, so that one that fails leaves the others alone.
"""
import argparse, copy, gc, importlib, json, math, multiprocessing, os, re, signal, subprocess, sys, tempfile, time, timeit, traceback, warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT/'benchmarks')]
PYTHON = [sys.executable]
SMOKE = False
PARTS: dict[str, Callable] = {}


class Skip(Exception):
    "A line that cannot be measured here; the text says why, in a word."


@dataclass
class Line:
    "One measurement: `measure` returns a number, or a number and facts; it must lie in [low, high]."
    name: str
    measure: Callable[[], Any]
    low: float | None = None
    high: float | None = None
    unit: str = ''


def part(f: Callable[[], Iterator[Line]]) -> Callable:
    PARTS[f.__name__] = f
    return f


def pick(full: Any, small: Any) -> Any: return small if SMOKE else full


# what the lines share; the tests spoil these to see the lines fail ------------------------------------------------------------------------------

def device() -> Any:
    from vfmvae.runtime import best_device
    return best_device()

def on_card() -> bool: return device().type != 'cpu'

def there(x: Any) -> Any:
    "A module or tensor on the device, as a copy."
    return copy.deepcopy(x).to(device())

def seconds(f: Callable, rounds: int = 10) -> float:
    import torch
    from torch.utils.benchmark import Timer
    if SMOKE: return timeit.timeit(f, number=1)         # Timer would run it twice more to warm up
    return Timer('f()', globals=dict(f=f), num_threads=torch.get_num_threads()).timeit(rounds).mean

def backend() -> str:
    "inductor takes a minute for each net on one CPU core; the smoke size asks for the graph alone."
    return pick('inductor', 'eager')

def keyed(seed: int, index: Any, where: Any) -> Any:
    from vfmvae.core import Draws
    return Draws(seed, index, where)

def pinned(x: Any) -> Any: return x.pin_memory() if on_card() else x

def off(a: Any, b: Any) -> float:
    "Root mean square of a-b over that of b, float64."
    a, b = (x.detach().cpu().double() for x in (a, b))
    return ((a-b).square().mean()/b.square().mean().clamp(min=1e-30)).sqrt().item()

def differing(a: Any, b: Any) -> int: return int((a.cpu() != b.cpu()).sum())

def autocast(on: bool = True) -> Any:
    import torch
    return torch.autocast(device().type, torch.bfloat16, enabled=on)

def peak_gb() -> float:
    from vfmvae.train import memory_gb
    return memory_gb()

def clear() -> None:
    import torch
    torch._dynamo.reset()
    if torch.cuda.is_initialized():
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()

def syncs(f: Callable) -> int:
    "How often f makes the host wait for the device. Without a card: how often it reads a number of a tensor, which counts decisions on the CPU, too."
    import torch
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter('always')
            torch.cuda.set_sync_debug_mode('warn')
            try: f()
            finally: torch.cuda.set_sync_debug_mode('default')
        return sum('synchronizing' in str(w.message) for w in seen)
    from torch.overrides import TorchFunctionMode
    T, found = torch.Tensor, []
    reads = {T.item, T.tolist, T.__bool__, T.__float__, T.__int__}
    class Count(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func in reads and '/torch/optim/' not in sys._getframe(1).f_code.co_filename: found.append(func)
            return func(*args, **(kwargs or {}))
    with Count(): f()
    return len(found)

def matmul_tflops() -> float:
    "10^12 operations a second of the device's bf16 matrix product."
    import torch
    n = pick(8192, 256)
    a, b = torch.randn(2, n, n, device=device(), dtype=torch.bfloat16)
    return 2*n**3/seconds(lambda: a @ b, 20)/1e12


# nets and tokenizers -----------------------------------------------------------------------------------------------------------------------------

def lively(net: Any) -> Any:
    "Weights that are zero at birth get values: agreement of zeros would mean nothing."
    import torch
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in net.parameters():
            if p.requires_grad and p.std(unbiased=False) == 0: p.copy_(p + torch.randn(p.shape, generator=g)*.05)
    return net

def bundled() -> dict[str, Any]:
    from vfmvae.tokenizer import tokenizers
    return {name: partial(lambda n: tokenizers[n].eval(), name) for name in tokenizers}

def families() -> dict[str, Any]:
    "Every kind of velocity net, small, by name."
    from vfmvae.core import build_config
    from vfmvae.dit import DiT, DiTConfig, FAMILIES
    small = dict(in_channels=4, num_classes=10, patch_size=2, hidden_size=48, depth=2, num_heads=2, encoder_depth=1, projector_dim=32)
    fitted = dict(z_dims=(16,), cls_dim=16, head_hidden_size=64, head_depth=1, head_num_heads=2)
    def make(f: dict) -> Any:
        import torch
        torch.manual_seed(0)
        return lively(DiT(build_config(DiTConfig, small | {k: fitted.get(k, v) for k, v in f.items()}))).eval()
    return {k: partial(make, f) for k, f in FAMILIES.items()}

def asked(net: Any, n: int = 4) -> list[Any]:
    "Latents, times, labels and class tokens for a net, on its device."
    import torch
    g, c, at = torch.Generator().manual_seed(2), net.config, next(net.parameters()).device
    z, t, y = torch.randn(n, c.in_channels, 8, 8, generator=g), torch.rand(n, generator=g), torch.arange(n) % c.num_classes
    cls = [torch.randn(n, c.cls_dim, generator=g)] if c.cls_dim else []
    return [x.to(at) for x in (z, t, y, *cls)]

def answered(net: Any, how: Callable | None = None) -> Any:
    import torch
    with torch.no_grad(): out = (net if how is None else how)(*asked(net))
    return torch.cat([o.flatten(1) for o in out], 1) if isinstance(out, tuple) else out

def worlds(n: int, size: int = 64) -> Any:
    from vfmvae.world import World
    return World(n, 8, size=size).batch(range(n))['image']

def f16d32() -> Any:
    "The paper's tokenizer with random weights, decoder alone; the bundled tiny one at the smoke size."
    from speed import decoder_model
    return decoder_model(pick('full', 'tiny'), device())

def task_of(full: bool, compile: bool = False, precision: str = 'bf16') -> tuple[Any, dict]:
    "A tokenizer's training task with all its losses and a batch: of f16d32, or of the tiny one."
    import torch
    from vfmvae.runtime import seed_all
    from vfmvae.losses import perceptual, vfm_taps
    from vfmvae.presets import PRESETS
    from vfmvae.recipes import build_training, compile_decoder
    from vfmvae.tokenizer_task import TokenizerTask
    from vfmvae.vfm import VFM
    p = PRESETS['f16d32' if full else 'tiny']
    stage = next(s for s in p.stages if s.name == 'strong_align')
    if SMOKE: stage = replace(stage, equivariance=())      # each scale is compiled
    # without a hub: the shapes count, not the weights
    vfm, critic = (VFM(p.config.vfm, False), VFM(p.discriminator, False)) if full else (None, None)
    seen = partial(perceptual, features=vgg()) if full else partial(perceptual, features=vfm_taps(VFM('tiny').to(device())))
    model, discriminators, perceive = build_training(p, [stage], vfm, discriminator=critic, perceptual_loss=seen)
    task = TokenizerTask(model, stage, perceive, p.half_life, p.betas, p.clip, discriminators, precision)
    for net in (*task.nets.values(), task.ema.net): net.to(device())
    if compile: compile_decoder(model, backend())
    seed_all(0)
    n, side = 16 if full else pick(4, 2), p.config.img_size
    return task, dict(image=torch.rand(n, 3, side, side, device=device())*2-1)

def vgg() -> Callable:
    from torchvision.models import vgg16
    net = vgg16(weights=None).features[:23].eval().requires_grad_(False).to(device())
    return lambda x: net(x)

def flow_task(name: str, compile: bool, precision: str = 'bf16') -> tuple[Any, dict, Any]:
    "A velocity net's training task, a batch, and the net's preset."
    import torch
    from speed import latents
    from vfmvae.core import build_config
    from vfmvae.runtime import seed_all
    from vfmvae.dit import DiT, DiTConfig, SIZES
    from vfmvae.presets import FLOW_PRESETS
    from vfmvae.flow_task import FlowTask
    light, reg = FLOW_PRESETS['lightningdit-64ep'], FLOW_PRESETS['reg-80ep']
    p = dict(xl=light, reg=reg, b=replace(light, net=replace(light.net, **SIZES['B'])))[name]
    if SMOKE:
        width = dict(hidden_size=48, depth=2, num_heads=2, encoder_depth=1, projector_dim=32, in_channels=4)
        p = replace(p, net=build_config(DiTConfig, {**p.net.__dict__, **width}), latent=(4, 8, 8))
    seed_all(0)
    task = FlowTask(DiT(p.net).to(device()), p.flow, [Still() for _ in p.net.z_dims], precision, compile)
    if compile: task._forward = torch.compile(task.net, backend=backend())
    task.ema.net.to(device())
    b = latents(p, pick(128, 4), device())
    if p.net.z_dims: b['image'] = torch.rand(len(b['label']), 3, 64, 64, device=device())*2-1
    return task, b, p

class Still:
    "Stands for a frozen VFM in a training step: tokens of DINOv2-B's width, no work."
    name, patch, dim, interpolation = 'none', 14, 768, 'bicubic'
    def to(self, where: Any) -> 'Still': return self
    def twin(self) -> 'Still': return self
    def train(self, mode: bool = True) -> 'Still': return self
    def with_class(self, x: Any) -> tuple[Any, Any]:
        n = (x.shape[2]//self.patch)*(x.shape[3]//self.patch)
        return x.new_ones(len(x), self.dim), x.new_ones(len(x), n, self.dim)

def step_of(task: Any, b: dict) -> Callable:
    "One training step, with the draws that `fit` gives it."
    from vfmvae.core import Draws
    n, count = len(next(iter(b.values()))), iter(range(10**9))
    def step() -> Any:
        i = next(count)
        return task.step([dict(b, draws=Draws(0, range(i*n, (i+1)*n), device(), i))], lambda loss: loss.backward(), lambda v=True: v, (i+1)*n)
    return step


# the parts ---------------------------------------------------------------------------------------------------------------------------------------

@part
def draws() -> Iterator[Line]:
    "Keyed numbers on the device against those of the CPU."
    def equal(what: str) -> int:
        index = [-5, 0, 7, 2**40, *range(100, 100+pick(1000, 20))]
        ask = dict(uniform=lambda d: d.uniform('a', (257,)), double=lambda d: d.uniform('a', (31,), __import__('torch').float64),
                   integers=lambda d: d.integers('b', -3, 1000, (65,)))[what]
        return differing(ask(keyed(3, index, device())), ask(keyed(3, index, 'cpu')))
    yield from (Line(f'{k}: as on the CPU, to the bit', partial(equal, k), high=0, unit='numbers that differ') for k in ('uniform', 'double', 'integers'))
    def moments() -> Any:
        x = keyed(4, range(64), device()).normal('n', (pick(200_000, 2000),)).double()
        n = x.numel()
        z = (x.mean()*n**.5, (x.square().mean()-1)/(2/n)**.5, x.pow(3).mean()/(15/n)**.5, (x.pow(4).mean()-3)/(96/n)**.5)
        return max(abs(float(v)) for v in z), dict(n=n, largest=float(x.abs().max()))
    yield Line('normal: the first four moments', moments, high=5, unit='standard errors')
    def alone() -> int:
        one = keyed(5, [11], device()).normal('n', (999,))
        return differing(keyed(5, [3, 11, 12], device()).normal('n', (999,))[1:2], one)
    yield Line('normal: whatever the batch', alone, high=0, unit='numbers that differ')


@part
def tokenizers() -> Iterator[Line]:
    "Encoding and decoding on the device against float32 on the CPU, and in bf16 against float32."
    import torch
    def run(make: Callable, what: str) -> float:
        tok, x = make(), worlds(pick(4, 1))
        new = there(tok)
        was, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
        try:
            with torch.no_grad():
                z = tok.encode(x).mode()
                if what == 'encode': return off(new.encode(x.to(device())).mode(), z)
                with autocast(what == 'bf16'): return off(new.decode(z.to(device())), tok.decode(z))
        finally: torch.backends.cudnn.allow_tf32 = was
    for name, make in bundled().items():
        yield Line(f'{name} encodes as on the CPU', partial(run, make, 'encode'), high=.03, unit='of the latent (a VFM runs in bf16)')
        yield Line(f'{name} decodes as on the CPU', partial(run, make, 'decode'), high=1e-4, unit='of the picture')
        yield Line(f'{name} decodes in bf16', partial(run, make, 'bf16'), high=.05, unit='of the picture')
    def large() -> float:
        model = f16d32()
        z = torch.randn(2, model.channels, *[model.config.img_size//model.stride]*2, device=device())
        with torch.no_grad():
            whole = model.decode(z)
            with autocast(): return off(there(model).decode(z), whole)
    yield Line('f16d32 decodes in bf16', large, high=.05, unit='of the picture')


@part
def nets() -> Iterator[Line]:
    "Every family of velocity nets: velocities, bf16, sampling."
    def velocity(make: Callable) -> float: return off(answered(there(make())), answered(make()))
    def half(make: Callable) -> float:
        with autocast(): fast = answered(there(make()))
        return off(fast, answered(make()))
    def sampled(make: Callable, batch: int) -> Any:
        from vfmvae.samplers import Sampler
        from vfmvae.samplers import sample_latents
        return sample_latents(there(make()), [0, 1, 2, 3], (4, 8, 8), sampler=Sampler(4, guidance=1.5), seed=1, batch_size=batch)
    for name, make in families().items():
        yield Line(f'{name} as on the CPU', partial(velocity, make), high=1e-4, unit='of the velocity')
        yield Line(f'{name} in bf16', partial(half, make), high=.05, unit='of the velocity')
        yield Line(f'{name} samples whatever the batch', lambda make=make: off(sampled(make, 2), sampled(make, 4)), high=1e-3, unit='of the latents')


@part
def alignment() -> Iterator[Line]:
    "CKNNA: against the CPU, of bf16 features, and at the size of ImageNet's validation set."
    import torch
    from speed import two_views
    from vfmvae.align import cknna
    from vfmvae.neighbours import prepare
    n, d = pick((4000, 512), (300, 32))
    def both() -> Any: return two_views(n, d)
    def agree() -> float: return abs(cknna(*map(there, both())) - cknna(*both()))
    yield Line('CKNNA as on the CPU', agree, high=1e-4)
    def rounded() -> float: return abs(cknna(*(prepare(there(x).bfloat16()) for x in both())) - cknna(*(prepare(x) for x in both())))
    yield Line('CKNNA of features in bf16', rounded, high=.02)
    def features() -> float:
        from vfmvae.vfm import VFM
        vfm, x = VFM('tiny'), worlds(4)
        return off(there(vfm).features(x.to(device()), [-1])[-1], vfm.features(x, [-1])[-1])
    yield Line('features of a VFM as on the CPU', features, high=.03, unit='of the tokens (on a card in bf16)')
    many, wide = pick((50_000, 1024), (600, 32))
    def large() -> Any:
        a, b = (torch.nn.functional.normalize(torch.randn(many, wide, device=device()), dim=1) for _ in range(2))
        took = seconds(lambda: cknna(a, b), 2)
        return took, dict(n=many, d=wide, memory_gb=peak_gb())
    yield Line('CKNNA of 50,000 images, 1,024 wide', large, high=30, unit='s')


@part
def decode() -> Iterator[Line]:
    "f16d32's decoder: images a second, memory."
    import torch
    n = pick(64, 2)
    known: dict[bool, tuple] = {}
    def run(compile: bool) -> Any:
        if compile in known: return known[compile]
        model = f16d32()
        if compile: model.synthesis.compile(backend=backend(), dynamic=False)
        z = torch.randn(n, model.channels, *[model.config.img_size//model.stride]*2, device=device())
        def f() -> None:
            with torch.inference_mode(), autocast(): model.decode(z)
        f()
        known[compile] = n/seconds(f), dict(batch=n, memory_gb=peak_gb())
        return known[compile]
    aim = pick(1000, .01)
    yield Line('f16d32 decodes, eager', lambda: run(False), low=aim, unit='images/s')
    yield Line('f16d32 decodes, compiled', lambda: run(True), low=aim, unit='images/s')
    yield Line('memory of decoding 64 images', lambda: run(False)[1]['memory_gb'], high=40, unit='GB')


@part
def train() -> Iterator[Line]:
    "f16d32's training step with every loss of strong_align; TF32; host syncs of a step."
    import torch
    known: dict[bool, tuple] = {}
    def run(compile: bool) -> Any:
        if compile in known: return known[compile]
        task, b = task_of(not SMOKE, compile)
        step = step_of(task, b)
        step()
        known[compile] = len(b['image'])/seconds(step, 5), dict(batch=len(b['image']), memory_gb=peak_gb())
        return known[compile]
    yield Line('f16d32 trains, eager', lambda: run(False), low=pick(20, .01), unit='images/s')
    yield Line('f16d32 trains, compiled', lambda: run(True), low=pick(20, .01), unit='images/s')
    yield Line('memory of a step on 16 images', lambda: run(False)[1]['memory_gb'], high=70, unit='GB')
    def exact() -> float:
        from vfmvae.recipes import train_tokenizer
        found: list[float] = []
        def look(rows: list) -> None:
            conv = torch.nn.Conv2d(64, 64, 3, bias=False)
            x = torch.randn(2, 64, 16, 16)
            with torch.no_grad(): found.append(off(there(conv)(x.to(device())), copy.deepcopy(conv).double()(x.double())))
        train_tokenizer('conv-f8d16', num_images=4, batch_size=4, show=look)
        return found[0]
    yield Line('convolutions in training, against float64 (no TF32)', exact, high=1e-5, unit='of the result')
    def waits(task: Any, b: dict) -> int:
        step = step_of(task, b)
        step(), step()
        return syncs(step)
    yield Line('host syncs of a step of a tokenizer', lambda: waits(*task_of(False, precision='fp32')), high=pick(2, 8))
    yield Line('host syncs of a step of a net', lambda: waits(*flow_task('b', False)[:2]), high=pick(2, 16))


@part
def flow() -> Iterator[Line]:
    "LightningDiT-XL/1, REG SiT-XL/1 and LightningDiT-B/1: images a second, and the share of what the card's matrix product can do."
    from vfmvae.presets import forward_gflop
    known: dict[tuple, tuple] = {}
    def run(name: str, compile: bool) -> tuple[float, dict]:
        if (name, compile) not in known:
            task, b, p = flow_task(name, compile)
            step, n = step_of(task, b), len(b['label'])
            step()
            took, work = seconds(step, 10), 3*forward_gflop(p.net, p.latent)*n/1e3
            best = matmul_tflops()
            known[name, compile] = n/took, dict(batch=n, tflops=work/took, matmul_tflops=best, share=work/took/best, memory_gb=peak_gb())
        return known[name, compile]
    words = dict(xl='LightningDiT-XL/1', reg='REG SiT-XL/1', b='LightningDiT-B/1')
    for name, word in words.items():
        for compile in (False, True):
            how = 'compiled' if compile else 'eager'
            aim = 650 if (name, compile) == ('xl', True) else 100
            yield Line(f'{word} trains, {how}', partial(run, name, compile), low=pick(aim, .01), unit='images/s')
            yield Line(f'{word}, {how}: share of the matrix product', lambda n=name, c=compile: (run(n, c)[1]['share'], run(n, c)[1]),
                       low=pick(.12 if compile else .08, 1e-6))


@part
def compile() -> Iterator[Line]:
    "What is compiled says what it said before."
    import torch
    from vfmvae.recipes import compile_decoder
    def tokenizer(make: Callable) -> float:
        plain = there(make())
        fast = there(make())
        compile_decoder(fast, backend())
        z = torch.randn(2, plain.channels, 8, 8, device=device())
        grads = []
        for net in (fast, plain):
            y = net.decode(z.requires_grad_())
            grads.append(torch.cat([y.flatten(), torch.autograd.grad(y.square().mean(), z)[0].flatten()*y.numel()]))
        return off(*grads)
    def net(make: Callable) -> float:
        plain = there(make())
        plain.position_tables(4, 4, device(), torch.float32)
        return off(answered(plain, torch.compile(plain, backend=backend())), answered(make()))
    for name, make in bundled().items(): yield Line(f'{name} decodes, compiled', partial(tokenizer, make), high=1e-3, unit='of pictures and gradients')
    for name, make in families().items(): yield Line(f'{name}, compiled', partial(net, make), high=1e-3, unit='of the velocity')


@part
def resume() -> Iterator[Line]:
    "A run that stops and goes on is the run that never stopped."
    import torch
    def halves(make: Callable) -> Any:
        from vfmvae.run import Run
        from vfmvae.train import fit
        def weights(stops: tuple[int, ...]) -> Any:
            with tempfile.TemporaryDirectory() as tmp:
                for images in stops:
                    task, feed = make()
                    fit(task, feed, images, Run(Path(tmp)), 1e-3, log_every=1, save_every=1, show=lambda rows: None)
                return torch.cat([p.detach().flatten().cpu() for p in task.ema.net.parameters()])
        os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')
        torch.use_deterministic_algorithms(True, warn_only=True)
        n, m = pick((32, 16), (4, 2))
        try: straight, again, resumed = weights((n,)), weights((n,)), weights((m, n))
        finally: torch.use_deterministic_algorithms(False)
        return differing(straight, resumed), dict(straight_twice=differing(straight, again), of=straight.numel())
    def tokenizer() -> Any:
        from vfmvae.world import World
        from vfmvae.data import loader
        return task_of(False, precision='fp32')[0], loader(World(64, 0), pick(4, 2), seed=0)
    def net() -> Any:
        from vfmvae.data import loader
        task, b, _ = flow_task('b', False, 'fp32')
        class Rows:
            def __len__(self) -> int: return 16
            def batch(self, at: Any) -> dict: return {k: v.cpu()[torch.as_tensor(at) % len(v)] for k, v in b.items()} | dict(key=[str(i) for i in at])
        return task, loader(Rows(), pick(4, 2), seed=0)
    yield Line('a tokenizer, to the bit', lambda: halves(tokenizer), high=0, unit='numbers that differ')
    yield Line('a net, to the bit', lambda: halves(net), high=0, unit='numbers that differ')


@part
def rfid() -> Iterator[Line]:
    "rFID by a small extractor: as on the CPU, and whatever the batch."
    def score(name: str, on: Callable, batch: int) -> float:
        from vfmvae.world import World
        from vfmvae.extractors import bundled_extractor
        from vfmvae.evaluate import rfid
        record = rfid(on(bundled()[name]()), World(pick(512, 20), 8), on(bundled_extractor()), batch_size=batch, pr_n=0)
        return record.value
    def apart(name: str, *ways: tuple) -> float:
        a, b = (score(name, *w) for w in ways)
        return abs(a-b)/abs(b)
    still = lambda x: x
    for name, far in (('conv-f8d16', 1e-3), ('vfmvae-tiny-f8d16', .05)):
        yield Line(f'{name} as on the CPU', partial(apart, name, (there, 16), (still, 16)), high=far, unit='of rFID')
        yield Line(f'{name}, whatever the batch', partial(apart, name, (there, 7), (there, 32)), high=1e-4 if name[0] == 'c' else .01, unit='of rFID')


@part
def transfers() -> Iterator[Line]:
    "Batches on their way to the device: pinned, as bytes, without waiting."
    import torch
    from vfmvae.train import to_device
    def bytes_(n: int) -> Any: return torch.randint(0, 256, (n, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    def speed() -> Any:
        x = pinned(bytes_(pick(20_000, 64)))
        pageable = x.clone() if not on_card() else torch.empty_like(x, pin_memory=False).copy_(x)
        slow = seconds(lambda: pageable.to(device(), copy=True))
        return x.numel()/seconds(lambda: x.to(device(), non_blocking=True, copy=True))/1e9, dict(pageable=x.numel()/slow/1e9)
    yield Line('pinned bytes', speed, low=pick(15, 1e-3), unit='GB/s')
    yield Line('bytes are the numbers they stand for', lambda: off(to_device(dict(image=pinned(bytes_(4))), device())['image'], bytes_(4).double()/127.5-1),
               high=1e-6, unit='of the picture')
    yield Line('host syncs of a batch on its way', lambda: syncs(lambda: to_device(dict(image=pinned(bytes_(4)), key=['a']), device())), high=0)


_SHARDED = '''
import torch
from accelerate import Accelerator
from vfmvae.dit import DiT, DiTConfig
acc = Accelerator()
net = DiT(DiTConfig(hidden_size=64, depth=2, num_heads=2))
net, opt = acc.prepare(net, torch.optim.AdamW(net.parameters()))
acc.backward(net(torch.randn(2, 4, 8, 8, device=acc.device), torch.rand(2, device=acc.device), torch.zeros(2, dtype=torch.long, device=acc.device)).square().mean())
opt.step()
print('KIND', type(net).__name__, *{type(p).__name__ for p in net.parameters()})
'''

def launched(words: list[str], flags: list[str], tmp: str) -> str:
    "What a command says under `accelerate launch`, on the card or, without one, on the CPU."
    where = ['--num_processes', '1', *(flags if on_card() else ['--cpu'])]
    env = os.environ | dict(PYTHONPATH=os.pathsep.join(filter(None, [str(ROOT), os.environ.get('PYTHONPATH')])), VFMVAE_HOME=tmp, HF_HOME=tmp)
    out = subprocess.run([*PYTHON, '-m', 'accelerate.commands.launch', *where, *words], capture_output=True, text=True, cwd=tmp, env=env)
    if out.returncode:
        lines = [s for s in out.stderr.splitlines() if s.strip() and 'CalledProcessError' not in s] or [f'status {out.returncode}']
        raise RuntimeError(next((s for s in reversed(lines) if s.startswith('vfmvae:') or re.match(r'\S*Error', s)), lines[-1]))
    return out.stdout

@part
def launch() -> Iterator[Line]:
    "Both trainers, and Accelerate's FSDP, under `accelerate launch`."
    def trained(name: str, *words: str) -> Any:
        from vfmvae.files import load_weights
        with tempfile.TemporaryDirectory() as tmp:
            launched(['-m', 'vfmvae.cli', name, *words, '--out', f'{tmp}/made.safetensors'], [], tmp)
            tensors, _ = load_weights(f'{tmp}/made.safetensors')
            return sum(t.isfinite().all().item() for t in tensors.values()), dict(of=len(tensors))
    n = pick('4096', '32')
    yield Line('train-tokenizer', lambda: trained('train-tokenizer', '--preset', 'conv-f8d16', '--num-images', n, '--batch-size', '16'), low=1, unit='tensors')
    yield Line('train-flow', lambda: trained('train-flow', '--preset', 'dit-conv-f8d16', '--n', n, '--num-images', n, '--batch-size', '16'), low=1, unit='tensors')
    def sharded() -> int:
        if not on_card(): raise Skip('on a CPU Accelerate gives plain DDP and not FSDP, which is not taken for it')
        with tempfile.TemporaryDirectory() as tmp:
            Path(tmp, 'sharded.py').write_text(_SHARDED)
            said = launched([f'{tmp}/sharded.py'], ['--use_fsdp', '--fsdp_version', '2'], tmp)
        if 'FSDP' not in said and 'DTensor' not in said: raise RuntimeError(f"nothing is sharded: {said[said.find('KIND')+5:].strip() or 'no answer'}")
        return 1
    yield Line("Accelerate's FSDP", sharded, low=1)


# running them ------------------------------------------------------------------------------------------------------------------------------------

def told(e: BaseException) -> str:
    text = (str(e).strip().splitlines() or [''])[0][:300]
    if 'out of memory' in str(e).lower(): return f'out of memory: {text}'
    at = next((f'{Path(f.filename).name}:{f.lineno}' for f in reversed(traceback.extract_tb(e.__traceback__)) if str(ROOT) in f.filename), '')
    return f"{type(e).__name__}: {text}{f' ({at})' if at else ''}"

def judge(line: Line) -> dict:
    "Measures a line: its row of the record. Nothing that it raises goes further."
    begin, value, facts, reason = time.perf_counter(), None, {}, ''
    try:
        clear()
        found = line.measure()
        value, facts = found if isinstance(found, tuple) else (found, {})
        value = float(value)
        if not math.isfinite(value): reason = f'{value} is no number'
        elif line.low is not None and value < line.low: reason = f'{value:.4g} is below {line.low:g}'
        elif line.high is not None and value > line.high: reason = f'{value:.4g} is above {line.high:g}'
        result = 'fail' if reason else 'pass'
    except Skip as e: result, reason = 'skip', str(e)
    except Exception as e: result, reason = 'fail', told(e)      # out of memory, what cannot be imported, a bug: the line's own
    return dict(line=line.name, result=result, value=value, low=line.low, high=line.high, unit=line.unit, reason=reason, facts=facts,
                seconds=round(time.perf_counter()-begin, 3))

class Record:
    "The JSON of a card: a list of runs, each with its lines; whole at any moment."
    def __init__(self, path: Path, facts: dict):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        data = self.read() if path.exists() else dict(runs=[])
        data['runs'].append(dict(facts, lines=[]))
        self.write(data)
    def read(self) -> dict: return json.loads(self.path.read_text())
    def write(self, data: dict) -> None:
        new = self.path.with_name(f'.{self.path.name}.new')
        new.write_text(json.dumps(data, indent=1)+'\n')
        os.replace(new, self.path)
    def add(self, row: dict) -> None:
        data = self.read()
        data['runs'][-1]['lines'].append(row)
        self.write(data)
        bound = ' '.join(f'{w} {row[k]:g}' for k, w in (('low', '>='), ('high', '<=')) if row.get(k) is not None)
        value = '' if row.get('value') is None else f"{row['value']:.4g} {row['unit']} [{bound}]"
        print(f"{row['result']:5} {row['part']}: {row['line']}  {value}  {row['reason']}".rstrip(), flush=True)
    def lines(self) -> list[dict]: return self.read()['runs'][-1]['lines']

def work(name: str, start: int, record: Record, card: str) -> None:
    "A part from its line number `start` on: what its process does."
    os.setsid()
    try: lines = [*PARTS[name]()]
    except Exception as e: lines = [Line('begins', partial(_again, e))]
    for line in lines[start:]: record.add(dict(part=name, device=card, **judge(line)))

def _again(e: Exception) -> None: raise e

def child(f: Callable, *args: Any, limit: float) -> int | None:
    "The exit status of f in a process of its own, which is killed with all that it started after `limit` seconds; then None."
    p = multiprocessing.get_context('fork').Process(target=f, args=args)
    p.start()
    try: p.join(limit)
    finally:
        alive = p.is_alive()
        for stop in ((os.killpg, p.pid), (os.kill, p.pid)):
            try: stop[0](stop[1], signal.SIGKILL)
            except ProcessLookupError: pass
        p.join()
    return None if alive else p.exitcode

def run_part(name: str, record: Record, card: str, left: float, limit: float) -> None:
    "Every line of a part; one that ends the process fails, and the part goes on behind it."
    def note(line: str, result: str, reason: str) -> None:
        record.add(dict(part=name, line=line, result=result, value=None, low=None, high=None, unit='', reason=reason, facts={}, seconds=0, device=card))
    until, begin = time.monotonic()+min(left, limit), len(record.lines())
    while True:
        status = child(work, name, len(record.lines())-begin, record, card, limit=max(until-time.monotonic(), .01))
        if status == 0: return
        names, done = [x.name for x in PARTS[name]()], len(record.lines())-begin
        at = names[done] if done < len(names) else 'its end'
        note(at, 'fail', f'stopped: the part had {min(left, limit):.0f} s' if status is None else f'it ended its process (status {status})')
        if status is None:
            for rest in names[done+1:]: note(rest, 'skip', 'no time left')
            return

def _card(path: str) -> None:
    import torch
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else str(device())
    Path(path).write_text(re.sub(r'nvidia[- ]?|[^a-z0-9]+$', '', re.sub(r'[^a-z0-9]+', '-', name.lower())) or 'card')

def card_of() -> str:
    "A short name of the card, asked for in a process of its own: this one must not wake the card up before it forks."
    with tempfile.TemporaryDirectory() as tmp:
        child(_card, f'{tmp}/name', limit=120)
        return Path(tmp, 'name').read_text() if Path(tmp, 'name').exists() else 'none'

def load_early() -> None:
    "What the parts import, once for all of them; what is missing is the business of the lines that need it."
    modules = ('train', 'align', 'recipes', 'evaluate', 'generation', 'presets', 'tokenizer')
    for name in ('torch._dynamo', *(f'vfmvae.{m}' for m in modules), 'speed'):
        try: importlib.import_module(name)
        except Exception: continue

def main(argv: list[str] | None = None) -> int:
    global SMOKE
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('parts', nargs='*', metavar='PART', help=f"of: {', '.join(PARTS)} (default: all)")
    p.add_argument('--smoke', action='store_true', default=os.environ.get('VFMVAE_SMOKE', '0') not in ('', '0'), help='tiny sizes, on any machine')
    p.add_argument('--out', type=Path, help='JSON file (default: data/results/gpu_<card>.json, at the smoke size outputs/gpu_smoke.json)')
    p.add_argument('--limit', type=float, default=480, help='seconds of a part')
    p.add_argument('--total', type=float, default=1500, help='seconds of all')
    a = p.parse_args(argv)
    if bad := [x for x in a.parts if x not in PARTS]: p.error(f"no part {bad[0]!r} (known: {', '.join(PARTS)})")
    SMOKE, until = a.smoke, time.monotonic()+a.total
    load_early()
    card = card_of()
    if card in ('cpu', 'none') and not SMOKE:
        print('no card here; --smoke (or VFMVAE_SMOKE=1) runs the same lines at tiny sizes', file=sys.stderr)
        return 2
    try: from vfmvae import __version__ as version
    except Exception as e: version = told(e)
    facts = dict(card=card, smoke=SMOKE, date=time.strftime('%Y-%m-%d %H:%M'), version=version, commit=commit())
    record = Record(a.out or ROOT/('outputs/gpu_smoke.json' if SMOKE else f'data/results/gpu_{card}.json'), facts)
    for name in a.parts or PARTS:
        if (left := until-time.monotonic()) > 1: run_part(name, record, card, left, a.limit)
        else:
            for line in PARTS[name]():
                record.add(dict(part=name, line=line.name, result='skip', value=None, unit='', reason='no time left', facts={}, seconds=0, device=card))
    count = {k: sum(r['result'] == k for r in record.lines()) for k in ('pass', 'fail', 'skip')}
    print(', '.join(f'{v} {k}' for k, v in count.items()), f'in {a.total-(until-time.monotonic()):.0f} s; {record.path}')
    return 1 if count['fail'] else 0

def commit() -> str | None:
    out = subprocess.run(['git', 'rev-parse', '--short', 'HEAD'], cwd=ROOT, capture_output=True, text=True)
    return out.stdout.strip() or None


if __name__ == '__main__': sys.exit(main())
