"Fuzz cases: configurations and YAML, weights with their JSON, torch files and pickles, published checkpoints."
import copy, dataclasses, io, json, pickle, random, struct
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import fuzz_tools as T
from fuzz_tools import BAD_JSON, JUNK, TYPED, Call, Case, Plain, cases, finite, harm, header_bomb, pickled, put, short, spoil_file, spoil_tensors, zipped
from vfmvae.baselines import ConvVAE, ConvVAEConfig, RAE, RAEConfig
from vfmvae.core import build_config
from vfmvae.files import save_weights
from vfmvae.dit import DiT, DiTConfig, FAMILIES, save_net
from vfmvae.presets import FLOW_PRESETS, FlowPreset
from vfmvae.flow_task import FlowConfig
from vfmvae.checkpoints import read_checkpoint
from vfmvae.published_baselines import load_convvae
from vfmvae.published import config_of, load_net, load_vfmvae
from vfmvae.tokenizer import open_tokenizer
from vfmvae.tokenizer_task import Stage, TINY
from vfmvae.tokenizer import load_tokenizer, save_tokenizer
from vfmvae.run import read_nets, Run
from vfmvae.vae import VFMVAE, VFMVAEConfig
from vfmvae.vfm import VFM

HERE = Path(__file__).resolve().parent

# sound nets of each kind, small ----------------------------------------------------------------------------------------------------------------------

SMALL: dict[str, Any] = {
    'conv': ConvVAEConfig(channels=4, width=4, mults=(1, 2), blocks=1, decoder_blocks=1, img_size=16, patch=8, dim=8),
    'rae': RAEConfig('tiny', 8, 128, stride=8, img_size=16, width=16, depth=1, heads=2),
    'vfmvae': dataclasses.replace(TINY, img_size=32, channel_base=256, channel_max=8, w_dim=8, res_blocks=0,
                                  fusion=(8,), attention=(), blocks=3),
    'dit': DiTConfig(in_channels=4, patch_size=2, hidden_size=16, depth=2, num_heads=2, num_classes=3),
    'flow': FlowConfig(), 'stage': Stage('first', dict(l1=1.)), 'preset': FLOW_PRESETS['dit-vfmvae-tiny-f8d16']}

def build(c: Any) -> Any:
    "The net of a configuration."
    return {ConvVAEConfig: lambda: ConvVAE(c, None), RAEConfig: lambda: RAE(c, None), VFMVAEConfig: lambda: VFMVAE(c,
            None), DiTConfig: lambda: DiT(c)}[type(c)]().eval()

def works(net: Any) -> bool:
    "A pass of an untrained net gives numbers of the right shape."
    c = net.config
    with torch.no_grad():
        if isinstance(c, DiTConfig):
            z = torch.zeros(1, c.in_channels, 4*c.patch_size, 4*c.patch_size)
            v = net(z, torch.full((1,), .5), torch.zeros(1).long(), *([torch.zeros(1, c.cls_dim)] if c.cls_dim else []))
            return (v[0] if isinstance(v, tuple) else v).shape == z.shape
        x = net.decode(torch.zeros(1, net.channels, c.img_size//net.stride, c.img_size//net.stride))
        return x.shape == (1, 3, c.img_size, c.img_size) and bool(x.isfinite().all())

def moderate(c: Any) -> bool:
    "Is it small enough to be built in a test?"
    most = 1
    for v in dataclasses.asdict(c).values():
        for x in v if isinstance(v, tuple) else (v,):
            most = max(most, abs(x) if isinstance(x, int | float) and not isinstance(x, bool) else 0)
    return most < 70_000 and getattr(c, 'shuffle', 1) <= 4

def fits(value: Any, annotation: str) -> bool:
    "Is a stored value of the annotated kind, and finite? A number of one kind may stand for the other where it is the same."
    kinds = dict(int=int, float=(int, float), bool=bool, str=str)
    said = str(annotation).removeprefix("<class '").replace('collections.abc.', '')
    if value is None: return 'None' in said
    if not finite(value): return False
    if said.startswith(('tuple', 'Mapping', 'dict')):
        return isinstance(value, tuple) if said.startswith('tuple') else isinstance(value, Mapping)
    known = [v for k, v in kinds.items() if k in said]
    flat = tuple(t for k in known for t in (k if isinstance(k, tuple) else (k,)))
    if flat == (int,) and isinstance(value, float): return value.is_integer()
    return not flat or isinstance(value, flat) and not (isinstance(value, bool) and bool not in flat)

# configurations -------------------------------------------------------------------------------------------------------------------------------------

def changed(rng: random.Random, which: str, typed: bool) -> tuple[Any, str, Any]:
    "(a sound configuration, one of its fields, a value for it)"
    base = SMALL[which]
    f = rng.choice(dataclasses.fields(base))
    v = rng.choice(JUNK+TYPED if typed else JUNK)
    if rng.random() < .25:
        old = getattr(base, f.name)
        if isinstance(old, tuple): v = [*old[:-1], rng.choice(JUNK[:19])]
        elif isinstance(old, int) and not isinstance(old, bool):
            v = rng.choice([old+1, 2*old, float(old), str(old), 3*old, -old])
        elif isinstance(old, str): v = rng.choice([old.upper(), old+' ', [old]])
    return base, f.name, v

def config_case(rng: random.Random, which: str, typed: bool, make: Callable) -> Case:
    base, name, v = changed(rng, which, typed)
    note = next(f.type for f in dataclasses.fields(base) if f.name == name)
    def right(c: Any) -> bool:
        got = getattr(c, name)
        if not fits(got, note): return False
        if type(c) in (ConvVAEConfig, RAEConfig, VFMVAEConfig, DiTConfig) and moderate(c): return works(build(c))
        return True
    return Case(which, lambda: make(base, name, v), right, names=(name, *COUSINS.get(name, ())),
                detail=f'{type(base).__name__}.{name}={short(v)}')

# a rule over two fields may name either
COUSINS = {k: tuple(f.name for f in dataclasses.fields(VFMVAEConfig))
           for k in (f.name for f in dataclasses.fields(VFMVAEConfig))}
COUSINS |= {k: (*COUSINS.get(k, ()), *(f.name for f in dataclasses.fields(t))) for t in (ConvVAEConfig, RAEConfig,
        DiTConfig, FlowConfig, FlowPreset) for k in (f.name for f in dataclasses.fields(t))}
COUSINS |= {f.name: (*COUSINS.get(f.name, ()), 'stage', 'Stage') for f in dataclasses.fields(Stage)}

def direct(base: Any, name: str, v: Any) -> Any: return dataclasses.replace(base, **{name: v})
def by_dict(base: Any, name: str, v: Any) -> Any:
    return build_config(type(base), {**{f.name: getattr(base, f.name) for f in dataclasses.fields(base)}, name: v})
def by_json(base: Any, name: str, v: Any) -> Any:
    from vfmvae.core import build_config
    return build_config(type(base), json.loads(json.dumps({**dataclasses.asdict(base), name: v})))

for _which in ('vfmvae', 'conv', 'rae', 'dit', 'flow', 'stage', 'preset'):
    def _direct(rng: random.Random, box: Path, which: str = _which) -> Case:
        return config_case(rng, which, True, direct)
    def _built(rng: random.Random, box: Path, which: str = _which) -> Case:
        return config_case(rng, which, True, by_dict) if which in ('flow', 'preset', 'stage') else config_case(rng,
                which, False, by_json)
    cases('configs', 2 if _which in ('vfmvae', 'dit') else 1)(_direct)
    cases('configs', 2 if _which in ('vfmvae', 'conv', 'rae', 'dit') else 1)(_built)

@cases('configs')
def odd_keys(rng: random.Random, box: Path) -> Case:
    base = SMALL[rng.choice(['conv', 'rae', 'vfmvae', 'dit'])]
    key: Any = rng.choice(['chanels', '', 'family', '__class__', '__init__', 'self', 'x\ny', 7, None, ('a',),
                           'x'*5000, 'sides', 'name'])
    values: Any = {**dataclasses.asdict(base), key: 1}
    what = 'unknown key'
    if rng.random() < .3: what, values = 'no mapping', rng.choice([None, [], 'abc', 7, [('channels', 4)], {1, 2}])
    return Case(what, lambda: build_config(type(base), values), None, names=(type(base).__name__,), detail=short(key)
                if what == 'unknown key' else short(values))

@cases('configs')
def sound_config(rng: random.Random, box: Path) -> Case:
    base = SMALL[rng.choice(['conv', 'rae', 'vfmvae', 'dit'])]
    values = dataclasses.asdict(base) if rng.random() < .5 else json.loads(json.dumps(dataclasses.asdict(base)))
    return Case('sound', lambda: build_config(type(base), values), lambda c: c == base and works(build(c)),
                control=True)

@cache
def golden() -> tuple[dict, dict, dict]:
    "(tensors, G_kwargs, state dict) of the small published VFM-VAE of the tests."
    p = HERE/'golden'/'vae_tiny.safetensors'
    g = load_file(p)
    with safe_open(p, 'pt') as f: kwargs = json.loads(f.metadata()['config'])
    return g, kwargs, {k[3:]: v for k, v in g.items() if k.startswith('sd.')}

@cases('configs', 3)
def g_kwargs(rng: random.Random, box: Path) -> Case:
    "A key of a published YAML set to something else."
    import yaml
    kw = copy.deepcopy(golden()[1])
    inner = kw.get('synthesis_kwargs') if rng.random() < .4 else None
    where = inner if isinstance(inner, dict) and inner else kw
    key = rng.choice([*where, 'surplus', 'conditional', 'vfm_name', 'compression_mode'])
    v = rng.choice(JUNK)
    where[key] = v
    def call() -> Any:
        if rng.random() < .5: return config_of(kw)
        p = put(box/'g.yaml', yaml.safe_dump(dict(G_kwargs=kw) if rng.random() < .5 else kw,
                                             allow_unicode=True).encode())
        save_file(golden()[2], box/'a.safetensors')
        return open_tokenizer(box/'a.safetensors', p).config
    def right(c: Any) -> bool:
        note = {f.name: f.type for f in dataclasses.fields(c)}
        return all(fits(getattr(c, k), t) for k, t in note.items()) and (not moderate(c) or works(build(c)))
    return Case('one value', call, right, names=('',), detail=f'{key}={short(v)}',
                out=(box/'g.yaml', box/'a.safetensors'))

YAMLS: dict[str, bytes] = {
    'not UTF-8': b'G_kwargs:\n  act: "\xff\xfe"\n', 'UTF-16': 'act: lrelu\n'.encode('utf-16'), 'empty': b'',
    'list': b'- 1\n- 2\n', 'text': b'hello', 'number': b'7', 'tabs': b'a:\n\t- b', 'deep': b'['*20_000,
    'deep indent': b''.join(b' '*i+b'a:\n' for i in range(2000)),
    'bomb': b'a: &a [x,x,x,x,x,x,x,x,x,x]\n' + b''.join(f'{c}: &{c} [{",".join(["*"+p]*10)}]\n'.encode() for p,
                                                        c in zip('abcdefgh', 'bcdefghi', strict=True)) + b'act: *i\n',
    'bomb as list': b'a: &a [9,9,9,9,9,9,9,9,9,9]\n' + b''.join(f'{c}: &{c} [{",".join(["*"+p]*10)}]\n'.encode()
                                                                for p, c in zip('abcdefgh', 'bcdefghi', strict=True))
    + b'patch_in_dimensions: *i\n',
    'bomb as key': b'a: &a [x,x,x,x,x,x,x,x,x,x]\n' + b''.join(f'{c}: &{c} [{",".join(["*"+p]*10)}]\n'.encode() for p,
                                                               c in zip('abcdefgh', 'bcdefghi', strict=True))
    + b'synthesis_kwargs: *i\n',
    'itself': b'a: &a\n  b: *a\nact: *a\n',
    'python tag': b'act: !!python/object/apply:os.system ["touch EXECUTED"]\n',
    'twice': b'act: lrelu\nact: gelu\nact: [\n', 'date': b'act: 2020-01-01\n', 'sexagesimal': b'scale_factor: 1:30\n',
    'huge integer': b'num_blocks: ' + b'9'*5000 + b'\n', 'NaN': b'scale_factor: .nan\n',
    'keys that are no text': b'1: 2\nnull: 3\n[1, 2]: 4\n', 'zeros': bytes(50),
    'two documents': b'act: lrelu\n---\nact: gelu\n',
    'unknown alias': b'act: *nobody\n', 'set': b'act: !!set {a, b}\n', 'binary': b'act: !!binary aGVsbG8=\n',
    'omap': b'act: !!omap [a: 1]\n', 'bad timestamp': b'act: 2020-99-99\n', 'html': b'<html>\n',
    'control': b'act: "\x07\x1b"\n'}

@cases('configs', 3)
def yaml_files(rng: random.Random, box: Path) -> Case:
    what = rng.choice(list(YAMLS))
    p = put(box/'g.yaml', YAMLS[what])
    save_file(golden()[2], box/'a.safetensors')
    return Case(what, lambda: open_tokenizer(box/'a.safetensors', p), None, names=('',))

@cases('configs')
def yaml_paths(rng: random.Random, box: Path) -> Case:
    import os
    p, what = box/'g.yaml', rng.choice(['folder', 'pipe', 'missing', 'None', 'binary', 'long', 'null'])
    save_file(golden()[2], box/'a.safetensors')
    if what == 'folder': p.mkdir()
    if what == 'pipe': os.mkfifo(p)
    if what == 'binary': put(p, T.noise(4000, rng))
    given: Any = {'None': None, 'long': box/('x'*300), 'null': 'a\0b'}.get(what, p)
    published = box/'a.pth'
    torch.save(dict(G_ema=golden()[2]), published)
    return Case(what, lambda: open_tokenizer(published, given), None, names=('',))

# states of labs, and functions that take numbers --------------------------------------------------------------------------------------------------------

@cases('settings', 2)
def lab_states(rng: random.Random, box: Path) -> Case:
    import vfmvae.explorer as explorer, vfmvae.labs as labs
    found = [c for m in (labs, explorer) for n, c in sorted(vars(m).items()) if n.endswith('State')
             and dataclasses.is_dataclass(c)]
    cls: Any = rng.choice(found)
    f = rng.choice(dataclasses.fields(cls))
    v = rng.choice(JUNK+TYPED)
    return Case(cls.__name__, lambda: cls(**{f.name: v}), lambda s: fits(getattr(s, f.name), f.type), names=('',),
                detail=f'{f.name}={short(v)}')

@cases('settings', 2)
def numbers(rng: random.Random, box: Path) -> Case:
    "Functions that take whole or real numbers, given others."
    import math
    from vfmvae.align import cka, cknna
    from vfmvae.images import transform
    from vfmvae.world import World
    from vfmvae.data import loader
    from vfmvae.samplers import trajectory  # noqa: F401
    from vfmvae.generation import sample_labels
    from vfmvae.neighbours import mutual_knn, prepare
    from vfmvae.presets import PRESETS
    from vfmvae.recipes import schedule_stages as stages_of
    from vfmvae.train import warm_cosine
    v = rng.choice(JUNK+TYPED)
    x = torch.randn(12, 5, generator=torch.Generator().manual_seed(1))
    y = torch.randn(12, 5, generator=torch.Generator().manual_seed(2))
    im = torch.zeros(2, 3, 16, 16)
    w = World(20, size=16)
    calls: dict[str, tuple[Callable, Callable]] = {
        'World.n': (lambda: World(v, size=16), lambda r: type(v) is int and len(r.batch([0, v-1])['key']) == 2
                    if v < 2**31 else False),
        'World.size': (lambda: World(4, size=v).batch([0])['image'], lambda r: r.shape == (1, 3, v, v)),
        'World.seed': (lambda: World(4, seed=v, size=8).batch([1])['image'],
                       lambda r: isinstance(v, int | np.integer) and not isinstance(v, bool) and finite(r)),
        'loader.batch_size': (lambda: loader(w, v).batch_at(0)['image'], lambda r: type(v) is int and len(r) == v),
        'loader.seed': (lambda: loader(w, 2, seed=v).batch_at(0)['image'], lambda r: isinstance(v, int | np.integer)
                        and len(r) == 2),
        'loader.workers': (lambda: [len(b['image']) for b in loader(w, 5, workers=v).steps(0, 2)], lambda r: r == [5, 5]),
        'cknna.k': (lambda: cknna(prepare(x), prepare(y), k=v), lambda r: finite(r) and type(v) is int or v is None),
        'mutual_knn.k': (lambda: mutual_knn(prepare(x), prepare(y), v), lambda r: 0 <= r <= 1 and not isinstance(v,
            bool | float)), 'cka.sigma': (lambda: cka(x, y, kernel='rbf', sigma=v), lambda r: not math.isinf(float(r))),
        'cka.kernel': (lambda: cka(x, y, kernel=v), None), 'transform.strength': (lambda: transform(im, 'rotation',
            v), lambda r: finite(float(v)) and finite(r)), 'transform.name': (lambda: transform(im, v, .1), None),
        'transform.seed': (lambda: transform(im, 'noise', .1, v), lambda r: finite(r) and not isinstance(v,
            float | bool)), 'sample_labels.n': (lambda: sample_labels(v, 3), lambda r: len(r) == v
                                                and not isinstance(v, bool)),
        'sample_labels.policy': (lambda: sample_labels(4, 3, v), None),
        'plan.images': (lambda: stages_of(PRESETS['tiny'], num_images=v), lambda r: v is None
                        or sum(s.num_images for s in r) > 0 and type(v) is int),
        'plan.lr': (lambda: stages_of(PRESETS['tiny'], lr=v), lambda r: v is None or finite([s.lr for s in r])
                    and all(s.lr > 0 for s in r) and not isinstance(v, bool)),
        'plan.stages': (lambda: stages_of(PRESETS['tiny'], stages=v), lambda r: v is None or len(r) == len(v)),
        'plan.batch': (lambda: stages_of(PRESETS['tiny'], batch_size=v), lambda r: type(v) is int
                       and all(s.num_images >= v for s in r)),
        'warm_cosine.lr': (lambda: warm_cosine(v, 100)(50), lambda r: finite(r)), 'prepare': (lambda: prepare(v),
            lambda r: r.ndim == 2 and finite(r)), 'cknna': (lambda: cknna(v, v), None)}
    what = rng.choice(list(calls))
    run, right = calls[what]
    return Case(what, run, right, names=('',), detail=short(v))

@cases('settings', 3)
def measures(rng: random.Random, box: Path) -> Case:
    "Scores of features of any scale are those of the features, or NaN, or refused; never other numbers."
    import math
    from vfmvae.align import cka, cknna, cknna_score
    from vfmvae.similarity import cca, effective_rank, linear_r2, participation_ratio, procrustes, pwcca, rankme, rsa, svcca
    from vfmvae.neighbours import mutual_knn, prepare
    from vfmvae.probes import knn_accuracy, linear_probe, ridge_probe
    g = torch.Generator().manual_seed(rng.randrange(10**6))
    n, d = rng.choice([20, 40]), rng.choice([4, 12])
    a = torch.randn(n, d, generator=g, dtype=torch.float64)
    b = a @ torch.randn(d, d, generator=g, dtype=torch.float64) + .5*torch.randn(n, d, generator=g, dtype=torch.float64)
    labels = torch.randint(0, 2, (n,), generator=g)
    pairs: dict[str, tuple[Callable, float]] = {
        'cknna': (lambda a, b: cknna(prepare(a), prepare(b), k=5), 1e-3),
        'mutual_knn': (lambda a, b: mutual_knn(prepare(a), prepare(b), 5), 1e-6), 'cka': (lambda a, b: cka(a, b), 1e-3),
        'cka unbiased': (lambda a, b: cka(a, b, unbiased=True), 1e-3),
        'cka rbf': (lambda a, b: cka(a, b, kernel='rbf'), 1e-3), 'svcca': (lambda a, b: svcca(a, b, 3), 1e-3),
        'cca': (cca, 1e-3), 'pwcca': (pwcca, 1e-3),
        'procrustes': (procrustes, 1e-3), 'rsa': (rsa, 1e-3), 'linear_r2': (lambda a, b: linear_r2(a, b/b.std()),
            1e-3), 'effective_rank': (lambda a, b: effective_rank(a), 1e-3), 'rankme': (lambda a, b: rankme(a), 1e-3),
        'participation_ratio': (lambda a, b: participation_ratio(a), 1e-3), 'cknna_score': (lambda a,
            b: cknna_score(prepare(a), prepare(b), k=5, times=20).value, 1e-3),
        'linear_probe': (lambda a, b: linear_probe(a[:n//2], labels[:n//2], a[n//2:], labels[n//2:]).value, .3),
        'ridge_probe': (lambda a, b: ridge_probe(a[:n//2], b[:n//2]/b.std(), a[n//2:], b[n//2:]/b.std()).value, .05),
        'knn_accuracy': (lambda a, b: knn_accuracy(a[:n//2], labels[:n//2], a[n//2:], labels[n//2:], k=3).value, 1e-6)}
    what = rng.choice(list(pairs))
    f, tol = pairs[what]
    s = rng.choice([1e-30, 1e-12, 1e-6, 1e-3, 1e3, 1e6, 1e12, 1e20, 'NaN', 'inf', 'constant', 'zeros', 'int', 'half',
                    'one row', 'text', 'other n', '3-D', 'numpy', 'list', 'complex', 'empty', 'bool'])
    odd = {'NaN': lambda: a.masked_fill(torch.eye(n, d).bool(), float('nan')),
           'inf': lambda: a.masked_fill(torch.eye(n, d).bool(), float('inf')), 'constant': lambda: torch.ones_like(a),
           'zeros': lambda: torch.zeros_like(a),
           'int': lambda: (a*1000).long(), 'half': lambda: a.half(), 'one row': lambda: a[:1], 'text': lambda: 'abc',
           'other n': lambda: a[:-1], '3-D': lambda: a[None], 'numpy': lambda: a.numpy(), 'list': lambda: a.tolist(),
           'complex': lambda: a.to(torch.complex64), 'empty': lambda: a[:0], 'bool': lambda: a > 0}
    if isinstance(s, float):
        want = f(a, b)
        return Case(f'{what} of scaled features', lambda: f(a*s, b), lambda r: math.isnan(float(r))
                    or abs(float(r)-float(want)) <= tol, names=('',), detail=f'times {s}')
    if s in ('numpy', 'list', 'int', 'half'):
        want = f(a, b)
        return Case(f'{what} of {s}', lambda: f(odd[s](), b), lambda r: math.isnan(float(r)) or abs(float(r)-float(want)) <= max(.1, tol),
                    names=('',))
    if s in ('constant', 'zeros', 'bool', 'one row') or s == 'other n' and what in ('effective_rank', 'rankme',
            'participation_ratio'):
        return Case(f'{what} of {s}', lambda: f(odd[s](), b), lambda r: math.isnan(float(r))
                    or -1.001 <= float(r) <= max(n, d), names=('',))
    return Case(f'{what} of {s}', lambda: f(odd[s](), b), None, names=('',))

@cases('settings')
def images_into_nets(rng: random.Random, box: Path) -> Case:
    "Images of another meaning at the doors of nets."
    x = torch.rand(2, 3, 16, 16)*2-1
    odd = {'uint8': ((x+1)*127.5).byte(), 'int64': x.long(), 'bool': x > 0, 'NaN': x.masked_fill(torch.eye(16).bool(),
            float('nan')), 'inf': x/0, 'range 255': (x+1)*127.5, 'grey': x[:, :1], 'one image': x[0], 'empty': x[:0],
           'channels last': x.permute(0, 2, 3, 1), 'numpy': x.numpy(), 'complex': x.to(torch.complex64),
           'one pixel': x[..., :1, :1], 'odd size': x[..., :13, :13], 'None': None, 'five axes': x[None]}
    what = rng.choice(list(odd))
    nets: dict[str, Callable] = {'VFM': lambda: tiny_vfm().features, 'VFM-VAE': lambda: with_vfm('vfmvae').encode,
                                 'RAE': lambda: with_vfm('rae').encode, 'conv': lambda: with_vfm('conv').encode}
    which = rng.choice(list(nets))
    call = nets[which]()
    return Case(f'{what} into {which}', lambda: call(odd[what]),
                (lambda r: len(r.mean if hasattr(r, 'mean') else r[-1]) == 0) if what == 'empty' else None, names=('',))

@cache
def tiny_vfm() -> VFM: return VFM('tiny')

@cache
def with_vfm(which: str) -> Any:
    torch.manual_seed(0)
    net = build(SMALL[which])
    if which != 'conv': net.attach(tiny_vfm())
    return net

# weights and the JSON beside ---------------------------------------------------------------------------------------------------------------------------

@cache
def sound_net(which: str, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    net = build(SMALL[which])
    for p in net.parameters(): torch.nn.init.normal_(p, std=.2)
    if hasattr(net, 'stats'): net.stats.set(torch.linspace(-1, 1, net.channels), torch.linspace(.5, 2, net.channels))
    return net

def state(net: Any) -> dict: return net.own_state() if hasattr(net, 'own_state') else net.state_dict()

def write(which: str, path: Path, seed: int = 0) -> Path:
    net = sound_net(which, seed)
    return save_net(path, net) if which == 'dit' else save_tokenizer(path, net, recipe=dict(images=7))

def read(which: str, path: Path) -> Any: return DiT.load(path) if which == 'dit' else load_tokenizer(path, vfm=False)

def equals(which: str, tol: float = 0, seed: int = 0) -> Callable:
    "Is the opened net the sound one?"
    want = state(sound_net(which, seed))
    def right(net: Any) -> bool:
        got = state(net)
        return got.keys() == want.keys() and all(v.dtype == want[k].dtype and T.near(v.detach(), want[k].detach(),
                tol*max(1., float(want[k].abs().max()))) for k, v in got.items())
    return right

def rewrite(path: Path, tensors: dict, metadata: dict | None = None) -> None:
    save_file({k: v.contiguous() for k, v in tensors.items()}, path, metadata)

def parts(path: Path) -> tuple[dict, dict | None]:
    with safe_open(path, 'pt') as f: return {k: f.get_tensor(k) for k in f.keys()}, f.metadata()  # noqa: SIM118

def net_of(rng: random.Random) -> str: return rng.choice(['conv', 'dit', 'vfmvae', 'rae'])

@cases('tensors')
def sound_pair(rng: random.Random, box: Path) -> Case:
    which = net_of(rng)
    p = write(which, box/'a.safetensors')
    return Case(which, lambda: read(which, p), equals(which), control=True)

@cases('tensors', 4)
def spoiled_tensors(rng: random.Random, box: Path) -> Case:
    "Other tensors under the same JSON. What was said to belong together may be refused whatever the change."
    which = net_of(rng)
    p = write(which, box/'a.safetensors')
    tensors, more = parts(p)
    what, bad, k = spoil_tensors(tensors, rng)
    if rng.random() < .5 and what != 'text name':
        save_weights(p, bad, {k: v for k, v in json.loads(p.with_suffix('.json').read_text()).items()})
    else: rewrite(p, bad, more)
    fine = what.startswith('harmless')
    return Case(f'{which}: {what}', lambda: read(which, p), equals(which, 1e-2) if fine else None,
                names=('a.safetensors', 'a.json', k or 'missing', 'surplus', 'a\\nb'), detail=k)

@cases('tensors', 2)
def spoiled_file(rng: random.Random, box: Path) -> Case:
    which = net_of(rng)
    p = write(which, box/'a.safetensors')
    if rng.random() < .5: what = spoil_file(p, rng)
    else:
        what, b = header_bomb(rng)
        put(p, b)
    return Case(what, lambda: read(which, p), equals(which), names=('a.safetensors', 'a.json'))

@cases('tensors', 2)
def spoiled_json(rng: random.Random, box: Path) -> Case:
    which = net_of(rng)
    p = write(which, box/'a.safetensors')
    side = p.with_suffix('.json')
    what = rng.choice([*BAD_JSON, 'NaN', 'missing', 'folder', 'BOM', 'of another net'])
    if what in BAD_JSON: put(side, BAD_JSON[what])
    elif what == 'NaN': side.write_text(side.read_text().replace('"images": 7', '"images": NaN'))
    elif what == 'missing': side.unlink()
    elif what == 'folder': side.unlink(); side.mkdir()
    elif what == 'BOM': side.write_bytes(b'\xef\xbb\xbf'+side.read_bytes())
    else:
        side.write_bytes(write('conv' if which == 'dit' else 'dit',
                               box/'b.safetensors').with_suffix('.json').read_bytes())
    return Case(what, lambda: read(which, p), equals(which), names=('a.json', 'a.safetensors'))

@cases('tensors', 3)
def edited_json(rng: random.Random, box: Path) -> Case:
    "A field of the JSON set to something else."
    which = net_of(rng)
    p = write(which, box/'a.safetensors')
    side = p.with_suffix('.json')
    meta = json.loads(side.read_text())
    key, v = rng.choice(['family', 'name', 'config', 'recipe',
                         *(f'config.{k}' for k in meta['config'])]), rng.choice(JUNK)
    at = meta['config'] if '.' in key else meta
    at[key.split('.')[-1]] = v
    side.write_text(json.dumps(meta))
    def right(net: Any) -> bool:
        if key == 'name': return equals(which)(net) and isinstance(getattr(net, 'name', ''), str)
        return equals(which)(net)
    return Case(which, lambda: read(which, p), right, names=('a.json', 'a.safetensors', 'tokenizer family',
                                                             key.split('.')[-1], type(SMALL[which]).__name__,
                                                             'weights', 'configuration'), detail=f'{key}={short(v)}')

@cases('tensors', 2)
def pairs_mixed(rng: random.Random, box: Path) -> Case:
    "Two files of the same shapes: the JSON of one with the tensors of the other must not pass for either; whole pairs may be renamed."
    which, what = net_of(rng), rng.choice(['tensors swapped', 'JSON swapped', 'pair renamed', 'written over'])
    a, b = write(which, box/'a.safetensors'), write(which, box/'b.safetensors', 1)
    if what == 'tensors swapped': a.write_bytes(b.read_bytes())
    if what == 'JSON swapped': a.with_suffix('.json').write_bytes(b.with_suffix('.json').read_bytes())
    if what == 'pair renamed':
        a.rename(box/'c.safetensors')
        a.with_suffix('.json').rename(box/'c.json')
        a = box/'c.safetensors'
    if what == 'written over': write(which, b)
    # a file of tensors that carries its own JSON is whole wherever it is copied: then the other net, all of it
    right = equals(which, seed=1 if what == 'tensors swapped' else 0)
    return Case(f'{which}: {what}', lambda: read(which, b if what == 'written over' else a), right,
                control=what in ('pair renamed', 'written over'), names=('a.safetensors', 'a.json'))

@cases('tensors')
def heads(rng: random.Random, box: Path) -> Case:
    "What stands in the head of the tensors' file, spoiled; with and without the JSON beside."
    which = net_of(rng)
    p = write(which, box/'a.safetensors')
    tensors, more = parts(p)
    what = rng.choice([*BAD_JSON, 'no head', 'other pair', 'odd keys'])
    head = dict(more or {})
    if what in BAD_JSON: head['json'] = BAD_JSON[what].decode('latin-1')
    if what == 'no head': head = {}
    if what == 'other pair': head['pair'] = '0'*16
    if what == 'odd keys': head |= {'': 'x', 'é\n': 'y', 'pair ': 'z'}
    rewrite(p, tensors, head)
    if lone := rng.random() < .5: p.with_suffix('.json').unlink()
    return Case(what, lambda: read(which, p), equals(which), names=('a.safetensors', 'a.json'), detail='alone'
                if lone else '')

@cases('tensors', 2)
def statistics_of_latents(rng: random.Random, box: Path) -> Case:
    which, what = rng.choice(['conv', 'vfmvae', 'rae']), rng.choice(['std 0', 'std negative', 'std NaN', 'mean NaN',
                                                                     'mean inf', 'std inf', 'std tiny'])
    p = write(which, box/'a.safetensors')
    tensors, _ = parts(p)
    k, v = f"stats.{what.split()[0]}", {'0': 0., 'negative': -1., 'NaN': float('nan'), 'inf': float('inf'),
                                        'tiny': 1e-45}[what.split()[1]]
    tensors[k] = tensors[k].clone()
    tensors[k][rng.randrange(len(tensors[k]))] = v
    save_weights(p, tensors, json.loads(p.with_suffix('.json').read_text()))
    return Case(f'{which}: {what}', lambda: read(which, p), None if what != 'std tiny'
                else lambda net: finite(net.decode(torch.zeros(1, net.channels, 2, 2))),
                names=('a.safetensors', 'stats', 'std', 'latent'))

@cases('tensors')
def vfm_file(rng: random.Random, box: Path) -> Case:
    "Weights of a VFM from a file of one's own."
    from vfmvae.files import data_dir
    tensors = load_file(data_dir()/'weights'/'vfm-tiny.safetensors')
    kind = rng.choice(['safetensors', 'pth'])
    what, bad, k = spoil_tensors(tensors, rng) if rng.random() < .7 else ('sound', tensors, '')
    p = box/f'v.{kind}'
    if kind == 'pth': torch.save(rng.choice([bad, {'model': bad}, {'state_dict': bad}]), p)
    else: rewrite(p, bad)
    fine = what.startswith('harmless') or what == 'sound'
    def right(v: Any) -> bool:
        return all(T.near(x.detach(), tensors[n].float(), 0 if what == 'sound' else .05) for n,
                   x in v.net.state_dict().items())
    return Case(f'{kind}: {what}', lambda: VFM('tiny', p), right if fine else None, control=what == 'sound',
                names=(p.name, k or 'missing'))

@cases('tensors', 2)
def run_checkpoints(rng: random.Random, box: Path) -> Case:
    "A checkpoint of a run, edited; opened to go on from."
    from vfmvae.run import EMA
    class Task:
        def __init__(self) -> None:
            torch.manual_seed(0)
            self.nets = dict(net=torch.nn.Linear(3, 2))
            self.optimizers = dict(net=torch.optim.AdamW(self.nets['net'].parameters()))
            self.ema = EMA(self.nets['net'], constant=.9)
        def config(self) -> dict: return dict(width=3, lr=.1)
    task, fresh = Task(), Task()
    with torch.no_grad():
        for p in task.nets['net'].parameters(): p.add_(1.)
    run = Run(f'{box}/run')
    p = run.save(task, 5, 40, dict(batch=8))
    side = p.with_suffix('.json')
    meta = json.loads(side.read_text())
    tensors, more = parts(p)
    key, v = rng.choice(['step', 'images', 'config', 'loop', 'task', 'task.nets', 'task.optimizers', 'task.ema',
                         'tensors', 'file', 'json', 'none']), rng.choice(JUNK)
    what, k = key, ''
    if key == 'tensors':
        what, bad, k = spoil_tensors(tensors, rng)
        if rng.random() < .5 and what != 'text name': save_weights(p, bad, meta)
        else: rewrite(p, bad, more)
    elif key == 'file': what = spoil_file(p, rng)
    elif key == 'json': what = rng.choice(list(BAD_JSON)); put(side, BAD_JSON[what])
    elif key != 'none':
        (meta['task'] if '.' in key else meta)[key.split('.')[-1]] = v
        side.write_text(json.dumps(meta))
    by = rng.choice(['load', 'read_nets'])
    def call() -> Any:
        if by == 'load': return Run(f'{box}/run').load(fresh, dict(batch=8)), fresh.nets['net'].state_dict()
        nets, seen = read_nets(f'{box}/run')
        return seen//8, nets['net']
    def right(r: Any) -> bool:
        if by == 'read_nets' and key == 'tensors' and not what.startswith('harmless'): return r[0] == 5     # nothing here to compare with
        tol = 1e-2 if what.startswith('harmless') else 0
        return r[0] == 5 and all(T.near(r[1][n], x, tol) for n, x in task.nets['net'].state_dict().items()) and finite(r[1])
    unchanged = key in ('none', 'loop', 'images') or what in ('garbage after',
                                                              'bit flips in the head') or what.startswith('harmless')
    unread = by == 'read_nets' and key in ('step', 'config', 'task.optimizers', 'task.ema', 'tensors')
    other = key == 'tensors' and what not in ('NaN', 'infinity', 'all NaN')     # of the average or of an optimizer
    return Case(f'{by}: {what}', call, right if unchanged or unread or other else None, control=key == 'none',
                names=('step-00000005', 'run', k or 'step', key.split('.')[-1]), detail=f'{key}={short(v)}')

@cases('tensors')
def flows(rng: random.Random, box: Path) -> Case:
    "A velocity net whose JSON says odd things about its tokenizer, its scale and its sampling."
    from vfmvae.generation import generate
    net = DiT(DiTConfig(in_channels=3, patch_size=1, hidden_size=16, depth=1, num_heads=2, num_classes=2)).eval()
    tok = Plain('plain')
    meta: dict[str, Any] = dict(tokenizer='plain', latent=[3, 2, 2], scale=dict(mean=[0., 0., 0.], std=[1., 1., 1.]),
                                classes=['a', 'b'], sampling=dict(method='euler', steps=2), recipe=dict(images=8))
    key, v = rng.choice([*meta, 'scale.mean', 'scale.std', 'sampling.steps', 'sampling.method', 'sampling.guidance',
                         'sampling.interval', 'none']), rng.choice(JUNK)
    if '.' in key: meta[key.split('.')[0]][key.split('.')[1]] = v
    elif key != 'none': meta[key] = v
    p = save_net(box/'n.safetensors', net)
    side = json.loads(p.with_suffix('.json').read_text())
    p.with_suffix('.json').write_text(json.dumps(side | meta))
    def call() -> Any: return generate(p, 3, tokenizer=tok, batch_size=2)
    def right(s: Any) -> bool:
        return s.images.shape[:2] == (3, 3) and finite(s.images) and s.labels.tolist() == [0, 1,
                0] and (key == 'sampling.guidance' or key == 'none' or finite(v)) and all(isinstance(c, str)
                        for c in s.classes)
    return Case(key, call, right, control=key == 'none', names=('',), detail=short(v))

# torch files and pickles ------------------------------------------------------------------------------------------------------------------------------

def readers(p: Path, rng: random.Random) -> tuple[str, Callable]:
    "The ways in which the library opens a torch file."
    from vfmvae.extractors import Inception
    from vfmvae.layouts import import_latents
    box = p.parent
    def latents() -> Any:
        d = box.parent/'tmp'/'layout'
        d.mkdir(exist_ok=True)
        (d/'latents_stats.pt').write_bytes(p.read_bytes())
        save_file(dict(latents=torch.zeros(2, 3, 2, 2), labels=torch.zeros(2).long()),
                  d/'latents_rank00_shard000.safetensors')
        return import_latents(d, f"{box.parent/'tmp'}/made", 'lightningdit', 'plain')
    return rng.choice([('read_checkpoint', lambda: read_checkpoint(p)),
                       ('load_vfmvae', lambda: load_vfmvae(p, golden()[1])),
                       ('open_tokenizer', lambda: open_tokenizer(p, box/'g.yaml')),
                       ('VFM', lambda: VFM('tiny', p)), ('import_latents', latents),
                       ('load_convvae', lambda: load_convvae(p)), ('load_net', lambda: load_net(p, 'sit')),
                       ('Inception', lambda: Inception(p))])

@cases('pickles', 6)
def harmful(rng: random.Random, box: Path) -> Case:
    "Nothing in a file is executed, wherever it stands in it."
    name, bad = harm(rng, box.parent/'EXECUTED')
    put(box/'g.yaml', json.dumps(golden()[1]).encode())
    p, form = box/'a.pth', rng.choice(['zip', 'zip', 'old', 'bare', 'with state', 'deflated'])
    sd = {'w': torch.zeros(2)}
    if isinstance(bad, bytes):
        if form in ('bare', 'old'): put(p, bad)
        else: zipped(bad, p, deflate=form == 'deflated')
    else:
        if form == 'with state': bad.state = {'a': 1}
        obj = {'top': bad, 'beside': {'G_ema': sd, 'x': bad}, 'within': {'G_ema': {'w': bad}},
               'key': {'G_ema': sd, 'y': [(1, bad)]}}[rng.choice(['top', 'beside', 'within', 'key'])]
        try:
            if form == 'bare': put(p, pickled(obj, rng.choice([0, 2, 4])))
            elif form == 'deflated': zipped(pickled(obj), p, deflate=True)
            else: torch.save(obj, p, _use_new_zipfile_serialization=form != 'old')
        except Exception: put(p, pickle.dumps(Call(eval, '1+1'), 2))
    what, call = readers(p, rng)
    return Case(f'{what}: {name}', call, None, names=('a.pth', 'latents_stats.pt'), detail=form)

@cases('pickles', 2)
def odd_torch_files(rng: random.Random, box: Path) -> Case:
    p = box/'a.pth'
    put(box/'g.yaml', json.dumps(golden()[1]).encode())
    loop: list = []
    loop.append(loop)
    kinds: dict[str, Any] = {'list': [1, 2], 'None': None, 'number': 7, 'text': 'x', 'empty dict': {},
                             'tensor': torch.zeros(3), 'loop': loop, 'dict of itself': {'G_ema': {}},
                             'numbers as keys': {1: torch.zeros(1), None: 2},
                             'namespace': __import__('argparse').Namespace(a=1),
                             'sparse': {'w.a': torch.eye(3).to_sparse()},
                             'parameter': {'w.a': torch.nn.Parameter(torch.zeros(2))}, 'module': torch.nn.Linear(2,
            2), 'numpy': {'w': np.zeros(3)}, 'set': {1, 2},
                             'complex': {'synthesis.a': torch.zeros(2, dtype=torch.complex64)},
                             'quantised': {'synthesis.a': torch.quantize_per_tensor(torch.zeros(4), .1, 0,
            torch.qint8)}, 'meta': {'synthesis.a': torch.zeros(4, device='meta')},
                             'nested list': {'G_ema': [{'synthesis.a': torch.zeros(1)}]}, 'bool keys': {True: 1},
                             'mean of text': {'mean': 'x', 'std': 'y'}, 'mean of lists': {'mean': [0.], 'std': [1.]},
                             'mean NaN': {'mean': torch.full((1, 3, 1, 1), float('nan')), 'std': torch.ones(1, 3, 1,
            1)}, 'std 0': {'mean': torch.zeros(1, 3, 1, 1), 'std': torch.zeros(1, 3, 1, 1)}}
    what = rng.choice(list(kinds))
    torch.save(kinds[what], p, _use_new_zipfile_serialization=rng.random() < .7)
    name, call = readers(p, rng)
    def right(r: Any) -> bool:
        return name == 'read_checkpoint' and isinstance(r, dict) and isinstance(kinds[what], dict)
    return Case(f'{name}: {what}', call, right if isinstance(kinds[what], dict) else None, names=('',))

@cases('pickles', 2)
def spoiled_torch_file(rng: random.Random, box: Path) -> Case:
    p = box/'a.pth'
    put(box/'g.yaml', json.dumps(golden()[1]).encode())
    sd = {'w.a': torch.arange(6.).view(2, 3), 'w.b': torch.ones(4)}
    torch.save(sd, p, _use_new_zipfile_serialization=rng.random() < .7)
    what = spoil_file(p, rng)
    return Case(what, lambda: read_checkpoint(p), lambda r: set(r) <= {'w.a', 'w.b'} and finite(r) or 'flip' in what,
                names=('a.pth',))

@cases('pickles', 2)
def bombs(rng: random.Random, box: Path) -> Case:
    "Small files that would be large in memory, or deep."
    p = box/'a.pth'
    put(box/'g.yaml', json.dumps(golden()[1]).encode())
    one = torch.ones(1)
    what = rng.choice(['expanded tensor', 'bytearray', 'deep tuple', 'long', 'deflated zeros', 'expanded 1e9', 'memo',
                       'storage size', 'list of itself many times'])
    if what == 'expanded tensor': torch.save({'ldm_adapter.a': one.expand(10**5, 10**5)}, p)
    elif what == 'expanded 1e9':
        torch.save({'encoder.conv_in.weight': one.expand(10**9), 'x_embedder.proj.weight': one.expand(10**9),
                    'synthesis.b': one.expand(10**9)}, p)
    elif what == 'bytearray':
        zipped(b'cbuiltins\nbytearray\n(J\x00\x28\x6b\xee' + b'tR.' if False
               else b'\x80\x02cbuiltins\nbytearray\n\x8a\x05\x00(k\xee\x00\x85R.', p)
    elif what == 'deep tuple': zipped(b'\x80\x02' + b'('*200_000 + b't'*200_000 + b'.', p)
    elif what == 'long': zipped(b'\x80\x02\x8b' + struct.pack('<i', 10**6) + b'\x7f'*10**6 + b'.', p)
    elif what == 'deflated zeros': zipped(pickle.dumps({'w': 1}, 2), p, {'0': bytes(200_000_000)}, deflate=True)
    elif what == 'memo': zipped(b'\x80\x02]q\x00' + b'(h\x00h\x00h\x00e'*5000 + b'.', p)
    elif what == 'storage size':
        f = io.BytesIO()
        torch.save({'synthesis.a': torch.zeros(1000)}, f)
        put(p, f.getvalue().replace(b'1000', b'9999').replace(b'M\xe8\x03', b'M\xff\xff'))
    else:
        x: list = []
        for _ in range(60): x = [x, x]
        zipped(pickle.dumps({'synthesis.a': x}, 2), p)
    name, call = readers(p, rng)
    return Case(f'{name}: {what}', call, lambda r: name == 'read_checkpoint', names=('',))

# published checkpoints --------------------------------------------------------------------------------------------------------------------------------

@cache
def published(which: str) -> tuple[dict, Callable, Callable]:
    "(a sound state dict, how it is loaded, the numbers of a loaded net)"
    with torch.no_grad():
        if which == 'vfmvae':
            g, kw, sd = golden()
            return sd, lambda source: load_vfmvae(source, kw), lambda net: net.decode(g['in.z'])
        if which == 'sdvae':
            c = ConvVAEConfig(channels=4, width=32, mults=(1, 2), blocks=1, decoder_blocks=2, img_size=16)
            torch.manual_seed(1)
            sd = {k: v.clone() for k, v in ConvVAE(c, None).own_state().items() if not k.startswith('stats.')}
            return sd, load_convvae, lambda net: net.decode(torch.ones(1, 4, 4, 4))
        from vfmvae.published import _tables
        small: dict[str, Any] = dict(in_channels=4, patch_size=1, hidden_size=64, depth=2, num_heads=4, num_classes=5)
        more: dict[str, Any] = dict(repa=dict(z_dims=(8,), encoder_depth=1, projector_dim=16),
                                    reg=dict(z_dims=(8,), cls_dim=8, encoder_depth=1, projector_dim=16),
                                    rae=dict(head_hidden_size=32, head_depth=2, head_num_heads=2)).get(which, {})
        c = DiTConfig(**{**FAMILIES[which], **small, **more}, data_time=which in ('sit', 'lightningdit'))
        torch.manual_seed(1)
        net = DiT(c)
        for p in net.parameters(): torch.nn.init.normal_(p, std=.05)
        sd = net.state_dict() | _tables(c, {}, which, 4)
        given = dict(num_heads=4 if which != 'rae' else [4, 2], **({'encoder_depth': 1} if which in ('repa', 'reg')
                                                                   else {}))
        def call(source: Any) -> Any: return load_net(source, which, **given)
        def out(net: Any) -> Any:
            v = net(torch.ones(1, 4, 4, 4), torch.full((1,), .3), torch.ones(1).long(),
                    *([torch.zeros(1, 8)] if which == 'reg' else []))
            return v[0] if isinstance(v, tuple) else v
        return sd, call, out

PUBLISHED = ['vfmvae', 'sdvae', *FAMILIES]

@cases('published', 2)
def sound_checkpoint(rng: random.Random, box: Path) -> Case:
    which = rng.choice(PUBLISHED)
    sd, call, out = published(which)
    form = rng.choice(['dict', 'safetensors', 'pth', 'old pth', 'ema'])
    source: Any = sd
    p = box/'a.pth'
    if form == 'safetensors': save_file({k: v.contiguous() for k, v in sd.items()}, p := box/'a.safetensors')
    elif form == 'ema':
        torch.save({'G_ema' if which == 'vfmvae' else 'state_dict' if which == 'sdvae' else 'ema': sd, 'opt': [1]}, p)
    elif form != 'dict': torch.save(sd, p, _use_new_zipfile_serialization=form == 'pth')
    if form != 'dict': source = p
    with torch.no_grad(): want = out(call(sd))
    return Case(f'{which}: {form}', lambda: call(source), lambda net: T.near(out(net).detach(), want,
            1e-5*float(want.abs().max())), control=True)

@cases('published', 5)
def spoiled_checkpoint(rng: random.Random, box: Path) -> Case:
    which = rng.choice(PUBLISHED)
    sd, call, out = published(which)
    what, bad, k = spoil_tensors(sd, rng)
    source: Any = bad
    if rng.random() < .5:
        source = box/'a.pth'
        torch.save(bad, source)
    fine = what.startswith('harmless')
    with torch.no_grad(): want = out(call(sd))
    def right(net: Any) -> bool: return T.near(out(net).detach(), want, .05*max(1., float(want.abs().max())))
    # aligned nets may lack their maps of training, and classes are counted off a shape: what is left is then a smaller net, and sound
    smaller = what == 'missing' and ('linear_proj' in k
                                     or 'projector' in k) or what == 'extra' and which == 'sdvae' and False
    return Case(f'{which}: {what}', lambda: call(source), right if fine or smaller else None,
                names=('a.pth', k or 'missing', 'a\\nb', 'surplus', 'heads', 'no diffusion net',
                       'not a convolutional', 'no VFM-VAE', 'Config', 'mults', 'projectors', 'misshaped', 'extra'), detail=k)

@cases('published', 2)
def odd_shapes(rng: random.Random, box: Path) -> Case:
    "The tensors that sizes are read off, of other ranks and sizes."
    which = rng.choice(PUBLISHED)
    sd, call, out = published(which)
    keys = [k for k in sd if any(s in k for s in ('x_embedder', 's_embedder', 'conv_in', 'quant_conv', 'y_embedder',
                                                  'projectors', 'qkv', 'fc1', 'w12', 'w3', 'final_layer', 'pos_embed',
                                                  'rope', 'down.0.block.0', 'mapping.', 'noise', 'torgb'))] or list(sd)
    k = rng.choice(keys)
    v = sd[k]
    new, what = rng.choice([(torch.zeros(()), 'scalar'), (torch.zeros(0), 'empty'),
                            (torch.zeros(*([1]*max(1, v.ndim))), 'ones'), (torch.zeros(*([0]*max(1, v.ndim))),
            'no entries'), (torch.zeros(7, 7, 7), 'three axes'), (torch.cat([v, v]) if v.ndim else v[None], 'doubled'),
                            (v[:1] if v.ndim else v[None], 'one row'), (torch.zeros(1).expand(10**6, *v.shape[1:])
                                                                        if v.ndim and v[0].numel() < 100
                                                                        else torch.zeros(3), 'million rows'),
                            (v.T if v.ndim == 2 and v.shape[0] != v.shape[1] else torch.zeros(3), 'transposed')])
    bad = {**sd, k: new}
    return Case(f'{which}: {what}', lambda: call(bad), (lambda net: False) if new.shape != v.shape
                else lambda net: True, names=('',), detail=k)

@cases('published')
def odd_names(rng: random.Random, box: Path) -> Case:
    "Names with numbers that are no blocks, and of the wrong type."
    which = rng.choice(PUBLISHED)
    sd, call, _ = published(which)
    t = torch.zeros(2)
    more: dict[Any, Any] = rng.choice([{'blocks.999999999.attn.qkv.weight': torch.zeros(6, 2)},
                                       {'encoder.down.99999999.block.0.conv1.weight': t},
                                       {'decoder.up_blocks.999999.a.weight': t}, {'blocks.x.attn.qkv.weight': t},
                                       {7: t}, {None: t}, {('a',): t},
                                       {'synthesis.blocks.99999999.a': t},
                                       {'blocks.99999999999999999999.attn.qkv.weight': torch.zeros(6, 2)},
                                       {'encoder.down.0.block.99999999.conv1.weight': t},
                                       {'projectors.99999999.4.bias': t}, {'a.'*3000: t}, {'é\n.x': t}])
    return Case(f'{which}: {short(next(iter(more)))}', lambda: call({**sd, **more}),
                (lambda net: not isinstance(next(iter(more)), str)), names=('',))

@cases('published', 2)
def odd_settings(rng: random.Random, box: Path) -> Case:
    "Settings given to a loader."
    from vfmvae.published import NET_RENAMED_KEYS, NET_SWITCHES
    which = rng.choice([*FAMILIES, 'sdvae', 'vfmvae'])
    sd, call, out = published(which)
    v = rng.choice(JUNK+TYPED)
    if which == 'sdvae':
        key = 'scale_factor'
        return Case(f'{which}', lambda: load_convvae(sd, scale_factor=v), lambda net: v is None
                    or isinstance(v, int | float) and not isinstance(v, bool) and finite(out(net)), names=('scal',),
                    detail=f'{key}={short(v)}')
    if which == 'vfmvae':     # no VFM is in the file: how many heads it would have, nobody asks
        given: Any = {rng.choice(['num_heads', 'depth']): v} if rng.random() < .5 else v
        return Case(which, lambda: load_vfmvae(sd, golden()[1], vfm=given),
                    lambda net: (v is None or v == {} or given is not v and 'num_heads' in given) and finite(out(net)),
                    names=('',), detail=f'vfm={short(given)}')
    key = rng.choice([*NET_RENAMED_KEYS, *NET_SWITCHES, 'family'])
    given = dict(num_heads=4 if which != 'rae' else [4, 2], **({'encoder_depth': 1} if which in ('repa', 'reg')
                                                               else {}))
    with torch.no_grad(): want = out(call(sd))
    def run() -> Any: return load_net(sd, v, **given) if key == 'family' else load_net(sd, which, **{**given, key: v})
    return Case(f'{which}: {key}', run, lambda net: key != 'family'
                and (key in ('class_dropout_prob', 'encoder_depth', 'num_heads') or T.near(out(net).detach(), want,
            1e-4)) and finite(net.config.label_dropout), names=('',), detail=short(v))
