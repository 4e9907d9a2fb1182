"""How fast are decoder, training steps, VFMs, CKNNA and labs? Each in turns with a plain form of the same mathematics (`tests/reference.py`), in one run.

    python benchmarks/speed.py [decoder] [cknna] [flow] [vfm] [labs]     # all of them: `make bench`

A speed is a fact about a machine and its mood; a ratio within one run is a fact about the code: compare ratios between machines. `limit` is the part
of the machine's best matrix product that is reached; memory is measured in a process of its own. Each part writes its file of data/results.
"""
import argparse, asyncio, json, multiprocessing, os, subprocess, sys, tempfile, threading, time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch.utils.benchmark import Timer
from torch.utils.benchmark.utils.timer import timer as wall_clock

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT/'tests')]

from reference import plain_cknna, plain_decode, plain_velocity

from vfmvae.align import cknna
from vfmvae.core import nearest, UserError, whole
from vfmvae.captions import captions_of
from vfmvae.files import check_out, data_dir, write_json
from vfmvae.runtime import best_device, seed_all
from vfmvae.dit import DiT
from vfmvae.presets import FLOW_PRESETS, forward_gflop, PRESETS
from vfmvae.flow_task import FlowTask
from vfmvae.layers import dense
from vfmvae.tokenizer import load_tokenizer
from vfmvae.tokenizer_task import TokenizerTask
from vfmvae.runtime import provenance
from vfmvae.text import CaptionTable, TEXT
from vfmvae.vae import VFMVAE, VFMVAEConfig
from vfmvae.vfm import VFM
from vfmvae.world import World


# the clock --------------------------------------------------------------------------------------------------------

def take_turns(runs, rounds=5):
    """Seconds of each of the functions: {name: {'wall': median, 'cpu': median of processor time, 'all': wall seconds of every round}}. A round runs
    every contestant once (after torch's own warm-up), so that a slow minute hits them all; an accelerator is waited for."""
    cpu = []
    def clock():
        now = wall_clock()
        cpu.append(time.process_time())
        return now
    timers = {k: Timer('f()', globals=dict(f=f), timer=clock, num_threads=torch.get_num_threads()) for k, f in runs.items()}
    seen = {k: [] for k in runs}
    for _ in range(rounds):
        for k, t in timers.items(): seen[k].append((t.timeit(1).median, cpu[-1]-cpu[-2]))
    return {k: dict(wall=median(w for w, _ in v), cpu=median(c for _, c in v), all=[w for w, _ in v]) for k, v in seen.items()}


def against(times, name, plain='plain'):
    "Ratio of each round, plain over `name`: median and range."
    ratios = [p/o for o, p in zip(times[name]['all'], times[plain]['all'], strict=True)]
    return dict(speedup=median(ratios), speedup_range=[min(ratios), max(ratios)])


def flops(f):
    "Floating-point operations of one call, a multiply-add being two: matrix products and convolutions."
    from torch.utils.flop_counter import FlopCounterMode
    with FlopCounterMode(display=False) as counter: f()
    return float(counter.get_total_flops())


def matmul_speed(n=2048, rounds=5, device='cpu'):
    "GFLOP/s of the best available n x n float32 matrix product; on some processors PyTorch has two."
    a, b = torch.randn(2, n, n, device=device)
    forms = {'mm': lambda: a @ b} | ({'dense': lambda: dense(a, b)} if a.device.type == 'cpu' else {})
    with torch.inference_mode(): times = take_turns(forms, rounds)
    return 2*n**3/min(t['wall'] for t in times.values())/1e9


def high_water(device='cpu'):
    "Bytes of this process at its highest."
    if torch.device(device).type == 'cuda': return torch.cuda.max_memory_allocated(device)
    status = Path('/proc/self/status')   # Linux: getrusage would report the parent's peak where that is higher
    if status.exists(): return int(status.read_text().split('VmHWM:')[1].split()[0])*1024
    import resource                      # there is none on Windows
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss*(1 if sys.platform == 'darwin' else 1024)


def lower_water(device='cpu'):
    "The mark starts again from what is held now, where the system allows it; building a model has its own peak."
    if torch.device(device).type == 'cuda': torch.cuda.reset_peak_memory_stats(device)
    elif (refs := Path('/proc/self/clear_refs')).exists(): refs.write_text('5')


def alone(f, *args):
    "f(*args) in a new process."
    for k in [k for k in os.environ if k.startswith('MALLOC_')]: del os.environ[k]   # keeping what is freed would hide growth
    with ProcessPoolExecutor(1, multiprocessing.get_context('spawn')) as pool: return pool.submit(f, *args).result()


# the decoder ------------------------------------------------------------------------------------------------------

BATCH = {'tiny decode': 32, 'tiny train': 8, 'full decode': 1, 'full train': 1}


def decoder_model(config, device):
    "The bundled tiny tokenizer without its VFM, or the published shape with random weights."
    if config == 'tiny':
        return load_tokenizer(data_dir()/'weights'/'vfmvae-tiny-f8d16.safetensors', vfm=False).to(device)
    torch.manual_seed(0)
    model = VFMVAE(VFMVAEConfig(legacy=True)).eval()
    with torch.no_grad():   # at birth most layers are the identity, and agreement would mean nothing
        for k, p in model.named_parameters():
            if k.endswith(('.gamma', 'noise_strength')) and '.norm.' not in k: p.copy_(0.3*torch.randn(p.shape))
            elif k.endswith(('to_out.weight', 'ff.3.weight', 'pwconv1.weight', 'pwconv2.weight')):
                p.copy_(torch.randn(p.shape)/p.shape[1]**.5)
    return model.to(device)


def decoder_jobs(config, job, batch, device):
    "{'ours': ..., 'plain': ...}: one batch, decoded under inference mode or trained on (L1 loss, Adam)."
    model = decoder_model(config, device)
    side = model.config.img_size//model.stride
    z = torch.randn(batch, model.channels, side, side, device=device)
    def decode(form):
        with torch.inference_mode(): return form(model, z)
    if job == 'train':
        target = torch.zeros_like(decode(VFMVAE.decode))
        adam = torch.optim.Adam(model.train().parameters(), lr=1e-5, betas=(0., .99))
    def train(form):
        adam.zero_grad()
        loss = (form(model, z)-target).abs().mean()
        loss.backward()
        adam.step()
        return loss.detach()
    work = dict(decode=decode, train=train)[job]
    return {'ours': partial(work, VFMVAE.decode), 'plain': partial(work, plain_decode)}


def decoder_peak(config, job, form, device, threads, batch):
    "MB of a process with the model loaded, and MB that one run adds to its high-water mark."
    torch.set_num_threads(threads)
    run = decoder_jobs(config, job, batch, device)[form]
    lower_water(device)
    before = high_water(device)
    run()
    return dict(model=before/1e6, extra=(high_water(device)-before)/1e6)


def decoder_row(config, job, device='cpu', rounds=None, memory=True, batch=None):
    batch, rounds = batch or BATCH[f'{config} {job}'], rounds or (9 if config == 'tiny' else 3)
    runs = decoder_jobs(config, job, batch, device)
    speed, work = matmul_speed(device=device), flops(runs['plain'])
    difference = float((runs['ours']()-runs['plain']()).abs().max()) if job == 'decode' else None
    times, forms = take_turns(runs, rounds), {}
    for k, t in times.items():
        forms[k] = dict(images_per_s=batch/t['wall'], seconds=t['wall'], cpu_seconds=t['cpu'], limit=work/1e9/speed/t['wall'])
        if memory: forms[k]['memory_mb'] = alone(decoder_peak, config, job, k, device, torch.get_num_threads(), batch)
    return dict(batch=batch, gflop_per_image=work/batch/1e9, gflop_per_s=speed, **against(times, 'ours'), difference=difference, **forms)


def decoder(a):
    "Rows of the tiny tokenizer and of the full size: against the plain decoder."
    jobs = [('tiny', 'decode'), ('tiny', 'train'), ('full', 'decode'), *([('full', 'train')] if a.full else [])]
    return {f'{c} {j}': decoder_row(c, j, a.device, a.rounds) for c, j in jobs}


# CKNNA ------------------------------------------------------------------------------------------------------------

def two_views(n, d):
    "Two prepared views (n,d) of n images, made in place: the generator's own peak must not hide what is measured."
    g = torch.Generator().manual_seed(0)
    f = torch.randn(n, 20, generator=g)
    def view():
        x = (f@torch.randn(20, d, generator=g)).tanh_()
        return F.normalize(x.add_(torch.randn(n, d, generator=g), alpha=.3), dim=1)
    return view(), view()


def cknna_peak(n, d, threads):
    "MiB that `cknna` adds to its inputs."
    torch.set_num_threads(threads)
    cknna(*two_views(1200, d))            # what libraries load once
    a, b = two_views(n, d)
    lower_water()
    before = high_water()
    cknna(a, b)
    return (high_water()-before)/2**20


def cknna_row(n=10000, d=1024, dense_n=2000, rounds=2, memory=True):
    """Processor seconds of `cknna` over those of its floor, the two symmetric products: as BLAS gives them (numpy's `a @ a.T` computes one triangle,
    `ratio`) and as half of the best plain product (`ratio_best`); MiB over the inputs; the dense published form over ours on `dense_n` rows."""
    a, b = two_views(n, d)
    block = max(1, min(n, 2**22//d))
    def best():                           # 1024 columns of each full product
        for x in (a, b):
            for s in range(0, n, block): dense(x[s:s+block], x[:1024])
    def blas():
        for x in (a.numpy(), b.numpy()): x@x.T      # dropped at once: it is n x n
    with torch.inference_mode():
        t = take_turns({**({'blas': blas} if n <= 20_000 else {}), 'best': best, 'ours': lambda: cknna(a, b)}, rounds)
    cpu = {k: v['cpu'] for k, v in t.items()} | dict(best=t['best']['cpu']*n/min(n, 1024)/2)
    out = dict(n=n, d=d, k=10, cpu_seconds=cpu, **({'ratio': cpu['ours']/cpu['blas']} if 'blas' in cpu else {}),
               ratio_best=cpu['ours']/cpu['best'], gflop_per_s={k: 2*n*n*d/v/1e9 for k, v in cpu.items()},
               floor=cpu['best']/cpu['ours'], wall_seconds=t['ours']['wall'])
    if dense_n:
        x, y = (v[:dense_n] for v in (a, b))
        t = take_turns({'ours': lambda: cknna(x, y), 'plain': lambda: plain_cknna(x, y)}, rounds)
        out |= dict(dense_n=dense_n, dense_ratio=t['plain']['cpu']/t['ours']['cpu'], difference=abs(cknna(x, y)-plain_cknna(x, y)))
    return out | (dict(extra_mib=alone(cknna_peak, n, d, torch.get_num_threads())) if memory else {})


def cknna_rows(a):
    "10,000 images, with --full also 50,000: against the two products and the dense form."
    return [cknna_row(rounds=a.rounds or 2), *([cknna_row(50000, 256, 0, 1)] if a.full else [])]


# a diffusion step -------------------------------------------------------------------------------------------------

def latents(preset, batch, device):
    draw = torch.Generator().manual_seed(0)
    mean = torch.randn(batch, *preset.latent, generator=draw)
    label = torch.randint(0, preset.net.num_classes, (batch,), generator=draw)
    return dict(mean=mean.to(device), label=label.to(device))


def our_step(preset, batch, device, compile=False, text=None):
    "The task's own: forward, backward, clipping, fused AdamW, averaging in one pass over all tensors; of a net of captions with their `Text`."
    seed_all(0)
    task = FlowTask(DiT(preset.net).to(device), preset.flow, compile=compile)
    task.ema.net.to(device)
    b = latents(preset, batch, device) | ({k: getattr(text, k).to(device) for k in TEXT} if text else {})
    return lambda: task.step([b], lambda loss: loss.backward(), lambda ok=True: ok, batch)


def plain_step(preset, batch, device):
    "The same one tensor after the other."
    seed_all(0)
    net, b, f = DiT(preset.net).to(device).train(), latents(preset, batch, device), preset.flow
    adam = torch.optim.AdamW(net.parameters(), lr=f.lr, betas=f.betas, weight_decay=0., foreach=False)
    average = [p.detach().clone() for p in net.parameters()]
    def step():
        z, noise = b['mean'], torch.randn_like(b['mean'])
        t = torch.randn(batch, device=device).sigmoid()
        level = t[:, None, None, None]
        drop = torch.rand(batch, device=device) < preset.net.label_dropout
        v, target = plain_velocity(net, (1-level)*z + level*noise, t, b['label'], drop), noise-z
        cosine = 1 - (v*target).sum(1)/(v.square().sum(1).sqrt()*target.square().sum(1).sqrt())
        ((v-target).square().mean() + cosine.mean()).backward()
        grads = [p.grad for p in net.parameters() if p.grad is not None]
        norm = torch.stack([g.norm() for g in grads]).norm().item()
        for g in grads:
            if norm > f.clip: g.mul_(f.clip/norm)
        adam.step()
        adam.zero_grad()
        with torch.no_grad():
            for old, p in zip(average, net.parameters(), strict=True): old.mul_(f.ema).add_(p, alpha=1-f.ema)
    return step


def flow_row(preset='dit-vfmvae-tiny-f8d16', batch=64, rounds=7, compile=False, device='cpu'):
    "Images/s of a training step of a LightningDiT with QK-norm and clipping: plain, ours and, with `compile`, compiled."
    if preset not in FLOW_PRESETS:
        raise UserError(f"no preset {preset!r}{nearest(preset, FLOW_PRESETS)} (known: {', '.join(FLOW_PRESETS)})")
    p = FLOW_PRESETS[preset]
    runs = {'ours': our_step(p, batch, device), 'plain': plain_step(p, batch, device)}
    if compile: runs['compiled'] = our_step(p, batch, device, True)
    times, speed, work = take_turns(runs, rounds), matmul_speed(1024, device=device), 3*forward_gflop(p.net, p.latent)*batch
    forms = {k: dict(images_per_s=batch/t['wall'], seconds=t['wall'], **against(times, k), limit=work/speed/t['wall'])
             for k, t in times.items()}
    return dict(preset=preset, batch=batch, gflop_per_image=work/batch, gflop_per_s=speed, **forms)


def flow(a):
    "A training step of a velocity net: against the plain step, with --full also compiled."
    return [flow_row(rounds=a.rounds or 7, compile=a.full, device=a.device)]


def captions_row(batch=64, rounds=7, device='cpu'):
    """A training step of a net of captions against that of a class net of its width and depth, and the ratio of their operations (`limit`);
    beside them, what it takes to make numbers of the words of its captions, and to look up the states of a language model of 384 channels that
    were made before."""
    p, c = (FLOW_PRESETS[f'{k}-vfmvae-tiny-f8d16'] for k in ('lumina', 'dit'))
    assert (p.net.hidden_size, p.net.depth, p.net.patch_size) == (c.net.hidden_size, c.net.depth, c.net.patch_size)
    said = [*dict.fromkeys(captions_of(World(4000, seed=3), None))]
    encode, sizes = DiT(p.net).y_embedder.words.numbers, torch.tensor([0, 1, *(len(t.split()) for t in said)])
    table = CaptionTable(torch.randn(int(sizes.sum()), 384).half(), sizes.cumsum(0), ['', *said], 'states', 'made up')
    some = said[::len(said)//batch][:batch]
    rows = table.rows(some)
    runs = dict(captions=our_step(p, batch, device, text=encode(some)), classes=our_step(c, batch, device),
                words=lambda: encode(some), table=lambda: table.text(rows))
    times = take_turns(runs, rounds)
    steps = {k: dict(images_per_s=batch/times[k]['wall'], **against(times, k, 'classes')) for k in ('captions', 'classes')}
    limit = forward_gflop(c.net, c.latent)/forward_gflop(p.net, p.latent)
    return dict(preset='lumina-vfmvae-tiny-f8d16', batch=batch, table=len(table), **steps, limit=limit,
                shares={k: 1/against(times, k, 'captions')['speedup'] for k in ('words', 'table')})


def captions(a):
    "A training step of a net of captions, and what its captions cost."
    return [captions_row(rounds=a.rounds or 15, device=a.device)]


# the frozen encoders ----------------------------------------------------------------------------------------------

def vfm_row(name, size, batch, device, rounds=9):
    """Features of one VFM: against timm's plain forward pass of the same net (in the order of memory that timm makes), and several layers against
    one. `step_share`: its part of a step of training the tokenizer that is made for it."""
    seed_all(0)
    vfm = VFM(name).to(device)
    net, x = vfm.twin().net.to(memory_format=torch.contiguous_format), torch.rand(batch, 3, size, size, device=device)*2-1
    mean, std = (torch.tensor(v, device=device).view(1, 3, 1, 1) for v in (vfm.mean, vfm.std))
    some = sorted({vfm.shallow, vfm.depth//2, vfm.depth}) + [-1]
    def plain(): return net.forward_features(((x+1)/2-mean)/std)
    with torch.no_grad():
        times = take_turns({'ours': lambda: vfm.features(x, [-1]), 'plain': plain, 'layers': lambda: vfm.features(x, some)}, rounds)
    forms = {k: dict(images_per_s=batch/t['wall'], seconds=t['wall'], **against(times, k)) for k, t in times.items() if k != 'plain'}
    return dict(preset=f'{name}, {size} px', batch=batch, asked=some, layers_against_one=against(times, 'ours', 'layers')['speedup'], **forms,
                step_share=vfm_share(vfm, size, device))


def vfm_share(vfm, size, device, batch=16, rounds=5):
    "Time of the VFM over that of the whole first step of training, in turns."
    p = PRESETS['tiny']
    config = p.config.for_vfm(vfm)
    task = TokenizerTask(VFMVAE(config, vfm).to(device), p.stages[0], None, p.half_life, p.betas, p.clip, {})
    images = torch.rand(batch, 3, config.img_size, config.img_size, device=device)*2-1
    def step(): task.step([dict(image=images)], lambda loss: loss.backward(), lambda ok=True: ok, batch)
    def look(): task.nets['model'].vfm_features(images)
    times = take_turns({'step': step, 'vfm': look}, rounds)
    return 1/against(times, 'vfm', 'step')['speedup']


def vfms(a):
    "The bundled VFMs at the size at which tokenizers of 64 px use them."
    return [vfm_row(name, size, 64, a.device, a.rounds or 9) for name, size in (('tiny', 64), ('photo', 64), ('efficientnet-lite0', 128))]


# the labs ---------------------------------------------------------------------------------------------------------

def latency(lab, moves, burst=()):
    """Seconds of each move (control, value) until its new picture: `p50`, `p95`, `worst`, `cpu` (median of processor time), `events`; `whole_p95` until
    nothing in it is still computed; and of the burst, moves that follow each other at once, `burst_computations`, `burst_seconds`. The clock runs from
    the control's new value to the picture's new bytes, without network and browser, under an event loop of its own as in a kernel."""
    walls, wholes, cpus, drawn = [], [], [], 0
    async def go():
        nonlocal drawn
        lab.widget()
        lab.settle()
        work = lab._latest.work
        def counted(state):
            nonlocal drawn
            drawn += 1
            return work(state)
        lab._latest.work = counted
        for name, value in moves:
            before, t, c = lab.picture.value, time.perf_counter(), time.process_time()
            lab.controls[name].value = value
            await lab._latest.task
            walls.append(time.perf_counter()-t)
            cpus.append(time.process_time()-c)
            assert lab.picture.value != before and not lab._latest.open, f'{name} = {value} gave no new picture'
            if lab._filler is not None: await lab._filler
            wholes.append(time.perf_counter()-t)
        drawn, t = 0, time.perf_counter()
        for name, value in burst:
            lab.controls[name].value = value
            await asyncio.sleep(.005)
        await lab._latest.task
        return drawn, time.perf_counter()-t
    found = []
    thread = threading.Thread(target=lambda: found.append(asyncio.run(go())))     # a notebook's thread has a loop already
    thread.start()
    thread.join()
    if not found: raise RuntimeError('the lab did not answer; see the traceback above')
    w, whole = torch.tensor([walls, wholes], dtype=torch.float64)
    out = dict(events=len(walls), p50=w.median().item(), p95=w.quantile(.95).item(), worst=w.max().item(),
               whole_p95=whole.quantile(.95).item(), cpu=torch.tensor(cpus).median().item())
    return out | (dict(burst_events=len(burst), burst_computations=found[0][0], burst_seconds=found[0][1]) if burst else {})


def opening(name, n=256, rounds=1):
    """Seconds of a lab with its defaults, after imports, from the call of its class to its first picture, and to a picture in which nothing is still
    computed: [(first, whole, processor seconds of the first)], one after the other."""
    import vfmvae.explorer, vfmvae.labs
    Which = vars(vfmvae.labs)[name] if name in vars(vfmvae.labs) else vfmvae.explorer.Explorer
    seen = []
    async def go():
        t, c = time.perf_counter(), time.process_time()
        lab = Which(**({} if name in ('ReconstructionLab', 'SamplerLab', 'PromptLab') else dict(n=n)))
        lab.widget()
        await lab._latest.task
        first, cpu = time.perf_counter()-t, time.process_time()-c
        if lab._filler is not None: await lab._filler
        seen.append((first, time.perf_counter()-t, cpu))
    for _ in range(rounds): asyncio.run(go())
    return seen


def openings(rounds=2):
    "Lab -> its first picture in new processes that find features on disk, in one whose home is empty, and again in a kernel that has opened it before."
    rows, home = {}, os.environ.get('VFMVAE_HOME')
    def row(seen):
        first, whole, cpu = torch.tensor(seen, dtype=torch.float64).T
        return dict(events=len(seen), p50=first.median().item(), p95=first.quantile(.95).item(), worst=first.max().item(),
                    whole_p95=whole.quantile(.95).item(), cpu=cpu.median().item())
    with tempfile.TemporaryDirectory() as empty:
        os.environ['VFMVAE_HOME'] = empty
        try:
            for name in ('Explorer', 'ReconstructionLab', 'NeighbourLab', 'LayerLab', 'EmbeddingLab', 'SamplerLab', 'PromptLab'):
                cold = alone(opening, name)
                rows[f'{name}, first picture, nothing on disk'] = row(cold)
                rows[f'{name}, first picture, new process'] = row([alone(opening, name)[0] for _ in range(rounds)])
                rows[f'{name}, first picture, warm kernel'] = row(alone(opening, name, 256, rounds+1)[1:])
        finally: os.environ.pop('VFMVAE_HOME') if home is None else os.environ.update(VFMVAE_HOME=home)
    return rows


def in_browser():
    "Rows of `benchmarks/browser.py`; none without JupyterLab and chromium."
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)/'rows.json'
        subprocess.run([sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', ROOT/'benchmarks/browser.py'], cwd=ROOT,
                       env=os.environ | dict(BENCH_OUT=str(out), PYTHONPATH=str(ROOT)))
        return json.loads(out.read_text()) if out.is_file() else {}


def labs(a, n=256, times=5):
    "Lab and control -> what `latency` says, with the bundled models, on n images."
    from vfmvae.explorer import Explorer
    from vfmvae.labs import EmbeddingLab, LayerLab, NeighbourLab, ReconstructionLab
    from vfmvae.sampler_lab import PromptLab, SamplerLab
    def moves(name, values, rounds=times): return [(name, v) for _ in range(rounds) for v in values]
    strengths, indices, steps = (15., 45., 90., 180., 270.), (3, 30, 7, 90, 11), (2, 4, 6, 8, 10)
    strength = dict(moves=moves('strength', strengths), burst=moves('strength', strengths, 4))
    guidance = [m for s in range(times) for m in (('seed', s+1), *moves('guidance', (1.5, 2., 3., 5., 1.), 1))]
    two = Explorer(n=n, tokenizers=('vfmvae-photo-f8d16', 'conv-photo-f8d16'))
    noisy = ReconstructionLab().set(edit='noise')
    return {**openings(), **in_browser(),
            'explorer, strength': latency(Explorer(n=n), **strength),
            'explorer, image': latency(Explorer(n=n), moves('image', indices)),
            'explorer, k': latency(Explorer(n=n), moves('k', (3, 5, 15, 20, 30))),
            'explorer, layer': latency(Explorer(n=n), moves('layer', (0, 1, 2, 3, -1))),
            'explorer, two tokenizers, strength': latency(two, **strength),
            'explorer, two tokenizers, image': latency(two, moves('image', indices)),
            'reconstruction, amount': latency(noisy, moves('amount', (0., .25, .75, 1., .1))),
            'neighbours, image': latency(NeighbourLab(n=n), moves('image', indices)),
            'layers, row': latency(LayerLab(n=n), moves('row', (1, 2, 3, 4, 0))),
            'embedding, image': latency(EmbeddingLab(n=n), moves('image', indices)),
            'sampler, step': latency(SamplerLab(), moves('step', steps)),
            'sampler, guidance': latency(SamplerLab(), guidance),
            'prompt, step': latency(PromptLab(instead='cross'), moves('step', steps))}


# the command ------------------------------------------------------------------------------------------------------

PARTS = dict(decoder=(decoder, 'bench'), cknna=(cknna_rows, 'bench_cknna'), flow=(flow, 'bench_flow'), captions=(captions, 'bench_captions'),
             vfm=(vfms, 'bench_vfm'), labs=(labs, 'bench_labs'))


def told(rows):
    "One line a row: what it says about ratios and times."
    for name, r in rows.items() if isinstance(rows, dict) else ((f"{r.get('preset') or r['n']}", r) for r in rows):
        if 'p50' in r: text = ', '.join(f'{k} {r[k]*1e3:.0f} ms' for k in ('p50', 'p95', 'whole_p95', 'cpu') if k in r)
        elif 'shares' in r:
            text = f"{r['captions']['images_per_s']:.4g} images/s, {r['captions']['speedup']:.2f} times a class net ({r['limit']:.2f} by operations); " + ', '.join(
                f'{k} {v:.2%} of a step' for k, v in r['shares'].items())
        elif 'ratio_best' in r: text = ', '.join(f'{k} {r[k]:.3g}' for k in ('ratio', 'ratio_best', 'dense_ratio', 'extra_mib') if k in r)
        elif 'step_share' in r:
            text = (f"{r['ours']['images_per_s']:.4g} images/s, {r['ours']['speedup']:.2f} times timm's plain form; layers {r['asked']} cost "
                    f"{r['layers_against_one']:.2f} times one; {r['step_share']:.0%} of a tokenizer's step")
        else:
            forms = {k: r[k] for k in ('ours', 'compiled') if k in r}
            text = '; '.join(f"{k} {f['images_per_s']:.4g} images/s, {(f if 'speedup' in f else r)['speedup']:.2f} times the plain form, "
                             f"{f['limit']:.0%} of the limit" for k, f in forms.items())
        yield f'{name:36} {text}'


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('parts', nargs='*', metavar='PART', help=f"of: {', '.join(PARTS)} (default: all)")
    p.add_argument('--full', action='store_true', help='also a training step of the full decoder (5 GB), 50,000 images, the compiled step')
    p.add_argument('--threads', type=int, help='of torch; default: as it is set')
    p.add_argument('--rounds', type=int, help='default: 9 for tiny nets, 3 for the full one, 2 for CKNNA, 7 for the diffusion step')
    p.add_argument('--device', help='such as cpu or cuda:1; default: the accelerator if there is one')
    p.add_argument('--out', default=str(ROOT/'data/results'), help='folder for bench*.json')
    a = p.parse_args(argv)
    if bad := [x for x in a.parts if x not in PARTS]: p.error(f"no part {bad[0]!r} (known: {', '.join(PARTS)})")
    try:
        a.device, out = str(best_device(a.device)), check_out(a.out)
        if a.rounds is not None: whole(a.rounds, 'rounds', 1)
        if a.threads is not None: torch.set_num_threads(whole(a.threads, 'threads', 1))
        for name in a.parts or PARTS:
            measure, file = PARTS[name]
            rows = measure(a)
            print(*told(rows), sep='\n', flush=True)
            write_json(out/f'{file}.json', dict(rows=rows, provenance=provenance()))
    except UserError as e: p.error(str(e))


if __name__ == '__main__': main()
