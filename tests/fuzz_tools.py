"What the kinds of fuzz cases share: what a case is, how inputs are spoiled, pickles that would do harm, nets that take no time."
import io, json, os, pickle, random, struct, zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image

from vfmvae.core import Gaussian
from vfmvae.protocols import LatentStats

KINDS: dict[str, list[Callable]] = {}


@dataclass
class Case:
    "An input that is ready, what is called, and what may come of it: a refusal (one line that holds one of `names`), or what `right` accepts."
    what: str                                 # the mutation, the same for all seeds
    run: Callable[[], Any]
    right: Callable[[Any],
                    Any] | None = None # of what came back: None or True if that is right. Left out: it must be refused
    names: tuple = ()                         # one of these stands in a refusal
    control: bool = False                     # a sound input: a refusal is a fault
    out: tuple = ()                           # files and folders that may be written
    seconds: float = 0                        # more than other cases have
    detail: str = ''                          # values drawn, for the report


def cases(kind: str, weight: int = 1) -> Callable:
    "Decorator of a function (rng, folder) -> Case; one of larger `weight` is drawn so much more often."
    def add(f: Callable) -> Callable:
        KINDS.setdefault(kind, []).extend([f]*weight)
        return f
    return add


# values ---------------------------------------------------------------------------------------------------------------------------------------

JUNK: list = [None, True, False, '', 'x', '7', '\u00e9\n', float('nan'), float('inf'), -float('inf'), -1, 0, 1, 3,
              10**11, 2**63, 2**70, -2**70,
              10**400, .5, -.5, 1e300, 1e-300, [], {}, [1], [None], [float('nan')], [10**11], {'a': 1}, [[1, 2]], ['x']]
TYPED: list = [b'x', 1j, np.float32('nan'), np.int64(-1), np.bool_(True), np.array([1, 2]), torch.tensor(-1), object,
               (), (1, 2, 3), {1}]


def short(v: Any) -> str:
    "A value for a report; a number of 400 digits has no use there."
    try: s = repr(v)
    except Exception as e: s = type(e).__name__
    return s if len(s) < 60 else f'{s[:50]}... ({len(s)} characters)'


def finite(x: Any) -> bool:
    "All numbers of a tensor, or of a nest of dicts, lists and floats, are finite."
    if isinstance(x, torch.Tensor): return bool(x.isfinite().all())
    if isinstance(x, dict): return all(map(finite, x.values()))
    if isinstance(x, list | tuple): return all(map(finite, x))
    return not isinstance(x, float) or x == x and abs(x) < float('inf')


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and bool(torch.equal(a.double(), b.double()))


def near(a: Any, b: Any, tol: float) -> bool:
    a, b = (v.detach().double().numpy() if isinstance(v, torch.Tensor) else np.asarray(v, dtype=np.float64)
            for v in (a, b))
    return a.shape == b.shape and bool(np.abs(a-b).max() <= tol)


# bytes ----------------------------------------------------------------------------------------------------------------------------------------

def cut(b: bytes, rng: random.Random) -> bytes: return b[:rng.randrange(len(b))]

def flip(b: bytes, rng: random.Random, n: int = 1, within: int | None = None) -> bytes:
    "`n` bits turned over, within the first bytes if so said."
    out = bytearray(b)
    for _ in range(n): out[rng.randrange(min(len(out), within or len(out)))] ^= 1 << rng.randrange(8)
    return bytes(out)

def noise(n: int, rng: random.Random) -> bytes: return rng.randbytes(n)

def encode(a: np.ndarray, format: str, mode: str | None = None, **how: Any) -> bytes:
    "A picture as the bytes of a file."
    f = io.BytesIO()
    im = Image.fromarray(a, mode) if mode else Image.fromarray(a)
    im.save(f, format=format, **how)
    return f.getvalue()

def png(h: int, w: int, rows: bytes, depth: int = 8, colour: int = 2, more: tuple = ()) -> bytes:
    "A PNG by hand: `rows` are compressed as they are (each begins with filter 0); `more` are (name, bytes) before the pixels."
    def chunk(name: bytes, b: bytes) -> bytes:
        return struct.pack('>I', len(b)) + name + b + struct.pack('>I', zlib.crc32(name+b))
    head = struct.pack('>IIBBBBB', w, h, depth, colour, 0, 0, 0)
    return b'\x89PNG\r\n\x1a\n' + b''.join(chunk(*c) for c in ((b'IHDR', head), *more,
                                                               (b'IDAT', zlib.compress(rows, 1)), (b'IEND', b'')))

def flat_png(side: int, bytes_per_row: int, depth: int, colour: int, more: tuple = ()) -> bytes:
    "A PNG of zeros of any size, made without holding its pixels."
    z = zlib.compressobj(1)
    row = bytes(1+bytes_per_row)*64
    data = b''.join([*(z.compress(row) for _ in range(side//64)), z.compress(bytes(1+bytes_per_row)*(side % 64)),
                     z.flush()])
    def chunk(name: bytes, b: bytes) -> bytes:
        return struct.pack('>I', len(b)) + name + b + struct.pack('>I', zlib.crc32(name+b))
    return b'\x89PNG\r\n\x1a\n' + b''.join(chunk(*c)
                                           for c in ((b'IHDR', struct.pack('>IIBBBBB', side, side, depth, colour, 0,
            0, 0)), *more,
                                                               (b'IDAT', data), (b'IEND', b'')))

def picture(rng: random.Random, h: int | None = None, w: int | None = None) -> np.ndarray:
    "uint8 (h,w,3), smooth enough for lossy formats."
    h, w = h or rng.randint(9, 30), w or rng.randint(9, 30)
    y, x = np.mgrid[0:h, 0:w]
    a, b, c = (rng.uniform(0, 6) for _ in range(3))
    return np.stack([127.5+120*np.sin(a+x/w*2), 127.5+120*np.sin(b+y/h*2), 127.5+120*np.cos(c+(x+y)/(h+w)*2)],
                    -1).astype(np.uint8)

def put(path: Path, b: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b)
    return path

def pictures(folder: Path, rng: random.Random, n: int = 3, side: int = 16, format: str = 'PNG') -> list[np.ndarray]:
    "A sound folder of `n` pictures 0.png, 1.png ..., all of one side."
    folder.mkdir(parents=True, exist_ok=True)
    made = [picture(rng, side, side) for _ in range(n)]
    for i, a in enumerate(made): put(folder/f'{i}.{format.lower()}', encode(a, format))
    return made

BAD_JSON: dict[str, bytes] = {
    'empty': b'', 'not JSON': b'{"a": 1,}', 'not UTF-8': b'{"a": "\xff\xfe"}', 'UTF-16': '{"a": 1}'.encode('utf-16'),
    'deep': b'['*100_000 + b']'*100_000,
    'deep dict': b'{"a":'*50_000 + b'1' + b'}'*50_000, 'list': b'[1, 2]', 'null': b'null', 'number': b'12',
    'text': b'"abc"',
    'huge integer': b'{"n": ' + b'9'*5000 + b'}', 'zeros': bytes(100), 'html': b'<html>not found</html>',
    'cut': b'{"family": "co'}


# a net that takes no time ---------------------------------------------------------------------------------------------------------------------

class Plain:
    "A tokenizer of 4 x 4 means: 3 channels, stride 4, with a posterior of width `std`."
    channels, stride, config = 3, 4, SimpleNamespace(img_size=8)
    def __init__(self, name: str = 'plain', std: float = .1):
        self.name, self.stats, self.width = name, LatentStats(3), std
    def encode(self, x: torch.Tensor) -> Gaussian:
        z = torch.nn.functional.avg_pool2d(x.float(), 4)
        return self.stats.scale(Gaussian(z, torch.full_like(z, 2*float(np.log(self.width))) if self.width else None))
    def decode(self, z: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.interpolate(self.stats.unscale(z), scale_factor=4.)
    def own_state(self) -> dict: return self.stats.state_dict()
    def state_dict(self) -> dict: return self.stats.state_dict()


class Set:
    "A small data set: tensors in memory with all that the library asks of one."
    def __init__(self, n: int = 6, size: int = 8, classes: tuple = ('a', 'b')):
        g = torch.Generator().manual_seed(n)
        self.images, self.classes, self.size = torch.rand(n, 3, size, size, generator=g)*2-1, classes, size
        self.labels, self.keys = [i % len(classes) for i in range(n)], [f'k{i}' for i in range(n)]
    def __len__(self) -> int: return len(self.images)
    def __getitem__(self, i: int) -> dict: return dict(image=self.images[i], label=self.labels[i], key=self.keys[i])
    def batch(self, at: Any) -> dict:
        at = [int(i) for i in at]
        return dict(image=self.images[at], label=torch.tensor([self.labels[i] for i in at]),
                    key=[self.keys[i] for i in at])
    def __repr__(self) -> str: return f'{len(self)} images'


# pickles that would do harm -------------------------------------------------------------------------------------------------------------------

class Call:
    "Pickles as a call of `f` with `args`, `state` being set on what comes back."
    def __init__(self, f: Any, *args: Any, state: Any = None): self.f, self.args, self.state = f, args, state
    def __reduce__(self) -> tuple: return (self.f, self.args) if self.state is None else (self.f, self.args, self.state)

def raw_call(module: str, name: str, *args: str) -> bytes:
    "A protocol-0 pickle that calls module.name(*args) (texts), whether it can be imported here or not."
    return f'c{module}\n{name}\n('.encode() + b''.join(f'V{a}\n'.encode() for a in args) + b'tR.'

def harm(rng: random.Random, canary: Path) -> tuple[str, Any]:
    "(what, object) whose pickle touches `canary` when it is loaded without care; or bytes, where the pickle is made by hand."
    import builtins, functools, subprocess
    from importlib import import_module
    touch = f'touch {canary}'
    code = f'open({str(canary)!r}, "w").close()'
    made = [('os.system', Call(os.system, touch)), ('eval', Call(builtins.eval, code)),
            ('exec', Call(builtins.exec, code)),
            ('popen', Call(subprocess.Popen, ['touch', str(canary)])), ('open', Call(builtins.open, str(canary), 'w')),
            ('compile', Call(functools.partial, os.system, touch)), ('import', Call(import_module, 'antigravity')),
            ('getattr', Call(getattr, str, 'upper')), ('map', Call(list, Call(map, os.system, [touch]))),
            ('torch.load', Call(torch.load, str(canary))), ('torch.save', Call(torch.save, 1, str(canary))),
            ('hub', Call(torch.hub.load, str(canary.parent), 'x')),
            ('np.save', Call(np.save, str(canary), np.zeros(1))),
            ('numpy file', Call(np.ndarray.tofile, np.zeros(1), str(canary))), ('path', Call(Path.touch, canary)),
            ('posix by hand', raw_call('posix', 'system', touch)), ('os by hand', raw_call('os', 'system', touch)),
            ('builtins by hand', raw_call('__builtin__', 'eval', code)), ('builtins.exec by hand',
            raw_call('builtins', 'exec', code)),
            ('unknown class', raw_call('dnnlib.util', 'EasyDict', touch)),
            ('torch._utils', raw_call('torch.utils._config_module', 'x', touch))]
    return rng.choice(made)

def pickled(obj: Any, protocol: int = 2) -> bytes:
    return obj if isinstance(obj, bytes) else pickle.dumps(obj, protocol=protocol)

def zipped(b: bytes, path: Path, data: dict[str, bytes] | None = None, name: str = 'archive',
           deflate: bool = False) -> Path:
    "A torch zip file around the pickle `b`, made by hand."
    import zipfile
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED if deflate else zipfile.ZIP_STORED) as z:
        z.writestr(f'{name}/data.pkl', b)
        z.writestr(f'{name}/byteorder', 'little')
        for k, v in (data or {}).items(): z.writestr(f'{name}/data/{k}', v)
        z.writestr(f'{name}/version', '3\n')
    return path


# tensors --------------------------------------------------------------------------------------------------------------------------------------

def spoil_tensors(sd: dict[str, torch.Tensor], rng: random.Random) -> tuple[str, dict[str, torch.Tensor], str]:
    """(what, a spoiled copy, the name of the tensor touched) of a state dict. The names of ways that keep the meaning begin with 'harmless'."""
    names = [k for k, v in sd.items() if v.is_floating_point() and v.numel()]
    k = rng.choice(names)
    v, out = sd[k], dict(sd)
    def one(x: float) -> torch.Tensor:
        w = v.clone().flatten()
        w[rng.randrange(len(w))] = x
        return w.view(v.shape)
    ways: dict[str, Callable[[], Any]] = {
        'NaN': lambda: one(float('nan')), 'infinity': lambda: one(float('inf')), 'all NaN': lambda: torch.full_like(v,
            float('nan')),
        'int64': lambda: v.long(), 'int8': lambda: v.to(torch.int8), 'bool': lambda: v > 0,
        'complex': lambda: v.to(torch.complex64),
        'misshaped': lambda: torch.cat([v, v]) if v.ndim else v[None], 'flattened': lambda: v.flatten() if v.ndim > 1
        else v[None],
        'empty': lambda: v.flatten()[:0], 'empty rows': lambda: v[:0] if v.ndim else v[None][:0],
        'scalar': lambda: v.flatten()[0],
        'harmless float64': lambda: v.double(), 'harmless float16': lambda: v.half().float().half(),
        'harmless bfloat16': lambda: v.bfloat16(),
        'missing': lambda: None, 'all missing': lambda: None, 'extra': lambda: v, 'renamed': lambda: v,
        'text name': lambda: v}
    what = rng.choice(list(ways))
    new = ways[what]()
    if what == 'all missing': return what, {}, ''
    if what == 'extra': out['surplus.weight'] = torch.zeros(3)
    elif what in ('renamed', 'text name'): out[k+'_' if what == 'renamed' else 'a\nb'] = out.pop(k)
    elif what == 'missing': del out[k]
    else: out[k] = new
    return what, out, k


def spoil_file(path: Path, rng: random.Random) -> str:
    "Spoils the bytes of a file; says how."
    b = path.read_bytes()
    what = rng.choice(['cut', 'cut in the head', 'empty', 'noise', 'html', 'zeros', 'garbage after',
                       'bit flips in the head'])
    path.write_bytes({'cut': lambda: b[:rng.randrange(len(b)//2, len(b))],
                      'cut in the head': lambda: b[:rng.randrange(1, 64)], 'empty': lambda: b'',
                      'noise': lambda: noise(len(b) % 5000+9, rng), 'html': lambda: b'<html>404</html>',
                      'zeros': lambda: bytes(len(b)),
                      'garbage after': lambda: b + noise(100, rng), 'bit flips in the head': lambda: flip(b, rng, 3,
            200)}[what]())
    return what

def header_bomb(rng: random.Random) -> tuple[str, bytes]:
    "Safetensors files whose header lies."
    def file(head: Any, data: bytes = bytes(64)) -> bytes:
        h = head if isinstance(head, bytes) else json.dumps(head).encode()
        return struct.pack('<Q', len(h)) + h + data
    t = dict(dtype='F32', shape=[4], data_offsets=[0, 16])
    return rng.choice([
        ('length 2^63', struct.pack('<Q', 2**63)+b'{}'), ('length beyond the file', struct.pack('<Q', 10**6)+b'{}'),
        ('length 0', bytes(8)),
        ('huge shape', file({'a': dict(t, shape=[2**40, 2**40])})),
        ('negative shape', file({'a': dict(t, shape=[-4])})),
        ('offsets overlap', file({'a': t, 'b': dict(t, data_offsets=[8, 24])})),
        ('offsets beyond', file({'a': dict(t, data_offsets=[0, 10**12])})),
        ('unknown dtype', file({'a': dict(t, dtype='Q9')})), ('deep', file(b'{"a":'*50_000)),
        ('not UTF-8', file(b'{"a\xff": 1}')),
        ('a list', file([1, 2])), ('offsets turned', file({'a': dict(t, data_offsets=[16, 0])})),
        ('shape and bytes differ', file({'a': dict(t, shape=[5])})),
        ('metadata of numbers', file({'__metadata__': {'a': 1}, 'a': t})),
        ('twice', file(b'{"a":' + json.dumps(t).encode() + b',"a":' + json.dumps(t).encode() + b'}'))])
