"Fuzz cases: banks, latent caches and published latents, statistics and samples."
import io, json, random, shutil, zipfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

import fuzz_tools as T
from fuzz_nets import parts, rewrite
from fuzz_tools import BAD_JSON, JUNK, TYPED, Case, Plain, Set, cases, cut, finite, header_bomb, put, short, spoil_file, spoil_tensors
from vfmvae.files import save_weights
from vfmvae.statistics import compute_statistics, read_samples, Statistics, write_samples
from vfmvae.evaluate import compare_statistics, gfid
from vfmvae.features import Bank
from vfmvae.latents import cache_latents, LatentCache
from vfmvae.layouts import export_latents, import_latents

# banks ------------------------------------------------------------------------------------------------------------------------------------------------

def bank(seed: int = 0) -> Bank:
    return Bank(torch.randn(5, 4, generator=torch.Generator().manual_seed(seed)), tuple('abcde'),
                dict(source='x', layer=seed))

def same_bank(b: Any, seed: int = 0) -> bool:
    want = bank(seed)
    return b.names == want.names and b.meta == want.meta and T.same(b.features, want.features)

@cases('banks')
def sound_bank(rng: random.Random, box: Path) -> Case:
    name = rng.choice(['a.safetensors', 'feat.layer3', 'b', 'ü.safetensors', 'a.b.c.safetensors'])
    def call() -> Any:
        bank(1).save(box/'feat.layer4')
        bank().save(box/name)
        bank(2).save(box/'other.safetensors')
        return Bank.load(box/name)
    return Case('names of files', call, same_bank, control=True, out=(f'{box}/*',), detail=name)

@cases('banks', 2)
def bank_of(rng: random.Random, box: Path) -> Case:
    x, names = bank().features, list('abcde')
    odd = {'too few names': (x, names[:4]), 'a name twice': (x, [*names[:4], 'a']), 'no names': (x, None),
           'names a text': (x, 'abcde'), 'numbers as names': (x, range(5)), 'NaN': (x/0*0, names),
           'integers': (x.long(), names), 'bool': (x > 0, names), 'one axis': (x[:, 0], names),
           'three axes': (x[None], ['a']), 'a list': (x.tolist(), names), 'numpy': (x.numpy(), names),
           'None': (None, names), 'empty': (x[:0], []), 'scalar': (x[0, 0], ['a']), 'complex': (x.to(torch.complex64),
            names), 'names of None': (x, [None]*5), 'half': (x.half(), names)}
    what = rng.choice(list(odd))
    f, n = odd[what]
    def right(b: Any) -> bool:
        return what in ('names a text', 'numbers as names', 'numpy', 'a list', 'half', 'empty', 'integers',
                        'three axes') and len(b) == len(f) and finite(torch.as_tensor(b.features).float())
    return Case(what, lambda: Bank(f, n, {}), right, names=('',))

@cases('banks', 3)
def spoiled_bank(rng: random.Random, box: Path) -> Case:
    "The JSON in the head of the tensors' file may stand for one beside it that is spoiled or of another bank."
    p = bank().save(box/'a.safetensors')
    tensors, more = parts(p)
    how = rng.choice(['tensors', 'tensors', 'file', 'header', 'json', 'swapped', 'renamed'])
    side, k, what = p.with_suffix('.json'), '', 'pair renamed' if how == 'renamed' else how
    meta = json.loads(side.read_text())
    if how == 'tensors':
        what, bad, k = spoil_tensors(tensors, rng)
        if rng.random() < .5 and what != 'text name': save_weights(p, bad, meta)
        else: rewrite(p, bad, more)
    if how == 'file': what = spoil_file(p, rng)
    if how == 'header': what, b = header_bomb(rng); put(p, b)
    if how == 'json': what = rng.choice(list(BAD_JSON)); put(side, BAD_JSON[what])
    if how == 'swapped': side.write_bytes(bank(1).save(box/'b.safetensors').with_suffix('.json').read_bytes())
    if how == 'renamed': p.rename(box/'c.safetensors'); side.rename(box/'c.json'); p = box/'c.safetensors'
    def right(b: Any) -> bool:
        return T.near(b.features, bank().features,
                      .1) and b.names == tuple('abcde') if what.startswith('harmless') else same_bank(b)
    fine = what.startswith('harmless') or what in ('pair renamed', 'garbage after', 'bit flips in the head', 'extra',
                                                   'swapped', *BAD_JSON)
    return Case(what, lambda: Bank.load(p), right if fine else None, names=('a.safetensors', 'a.json'),
                control=how == 'renamed')

@cases('banks', 2)
def edited_bank(rng: random.Random, box: Path) -> Case:
    p = bank().save(box/'a.safetensors')
    side = p.with_suffix('.json')
    meta = json.loads(side.read_text())
    key = rng.choice(['names', 'meta', 'names.0'])
    v = rng.choice([*JUNK, ['a', 'b', 'c', 'd', 'a'], ['a'], list(range(5)), [None]*5, [[1]]*5, 'abcde',
                    {c: 1 for c in 'abcde'}])
    if key == 'names.0': meta['names'][0] = v
    else: meta[key] = v
    side.write_text(json.dumps(meta))
    def right(b: Any) -> bool:
        return T.same(b.features, bank().features) and len(b.names) == 5 and isinstance(b.meta,
                dict) and all(isinstance(n, str) for n in b.names) and key != 'names'
    return Case(key, lambda: Bank.load(p), right, names=('a.safetensors', 'a.json', 'name'), detail=short(v))

@cases('banks', 2)
def use_of_banks(rng: random.Random, box: Path) -> Case:
    v = rng.choice([['a', 'z'], 'abc', ['a', 'a'], ['e', 'a'], [], ['x'], [None], [1], 'x', '', ['\u00e9\n'],
                    ['a'*5000]])
    what = rng.choice(['select', 'save', 'load'])
    b = bank()
    if what == 'select':
        return Case(what, lambda: b.select(v), lambda r: list(r.names) == list(v)
                    and all(n in 'abcde' for n in r.names), names=('',), detail=short(v))
    path: Any = rng.choice(['', box, box/'x'/'y'/'a.safetensors', box/'no'/'a.safetensors', box/('x'*300), 'a\0b',
                            '/proc/a.safetensors', '/dev/full/a', box/'taken.safetensors'])
    put(box/'taken.json', b'{"mine": 1}')     # a file of one's own beside, which stays as it is
    put(box/'no', b'a file')
    if what == 'load': return Case(what, lambda: Bank.load(path), None, names=('',), detail=short(path)[-30:])
    return Case(what, lambda: Bank.load(b.save(path)), lambda r: same_bank(r)
                and path in (box/'x'/'y'/'a.safetensors', box/'taken.safetensors'), names=('',),
                out=(box/'x', box/'taken.safetensors'), detail=short(path)[-30:])

# caches of latents ----------------------------------------------------------------------------------------------------------------------------------------

@cache
def sound_cache(flips: bool, width: bool, scaled: bool) -> tuple[Path, dict]:
    "A cache of 7 latents in shards of 3, made once in a process, and what it gives."
    import tempfile
    d = Path(tempfile.mkdtemp(dir=Path(tempfile.gettempdir()).parent.parent))
    tok = Plain('plain', .1 if width else 0)
    if scaled: tok.stats.set(torch.tensor([.1, 0., -.1]), torch.tensor([.5, 2., 1.]))
    c: Any = cache_latents(tok, Set(7), f'{d}/c', flips=flips, shard_size=3)
    return d/'c', c.batch(range(7))

def fresh_cache(rng: random.Random, box: Path) -> tuple[Path, dict, dict]:
    how = dict(flips=rng.random() < .5, width=rng.random() < .6, scaled=rng.random() < .3)
    src, want = sound_cache(**how)
    shutil.copytree(src, box/'c')
    return box/'c', want, how

def opened(p: Path) -> Any:
    def call() -> Any:
        c = LatentCache(p)
        return c, c.batch(range(len(c))), c.scale()
    return call

def gives(want: dict, tol: float = 0) -> Any:
    def right(r: Any) -> bool:
        c, b, _ = r
        return len(c) == 7 and b.keys() == want.keys() and all(T.near(b[k], want[k], tol) for k in ('mean', 'logvar',
                'label') if k in want) and list(c.classes) == ['a', 'b']
    return right

NAMED = ('shard-0000', 'manifest.json', 'cache', 'c')

@cases('caches')
def sound_caches(rng: random.Random, box: Path) -> Case:
    p, want, how = fresh_cache(rng, box)
    return Case('opened', opened(p), gives(want), control=True, detail=str(how))

@cases('caches', 3)
def spoiled_shard(rng: random.Random, box: Path) -> Case:
    p, want, how = fresh_cache(rng, box)
    f = p/f'shard-0000{rng.randrange(3)}.safetensors'
    t, more = parts(f)
    n = len(t['label'])
    what = rng.choice(['tensors', 'tensors', 'file', 'header', 'missing', 'swapped', 'short', 'long', 'labels beyond',
                       'labels negative', 'labels of floats', 'no labels', 'no width', 'no flips', 'half',
                       'other shape', 'NaN', 'logvar huge', 'logvar NaN', 'folder', 'extra'])
    fine: Any = None
    if what == 'tensors':
        what, bad, k = spoil_tensors(t, rng)
        rewrite(f, bad, more)
        fine = gives(want, .05) if what.startswith('harmless') else None
    elif what == 'file': what = spoil_file(f, rng); fine = gives(want)
    elif what == 'header': what, b = header_bomb(rng); put(f, b)
    elif what == 'missing': f.unlink()
    elif what == 'folder': f.unlink(); f.mkdir()
    elif what == 'swapped':
        a, b2 = p/'shard-00000.safetensors', p/'shard-00001.safetensors'
        x = a.read_bytes()
        a.write_bytes(b2.read_bytes())
        b2.write_bytes(x)
    elif what == 'short': rewrite(f, {k: v[:-1] for k, v in t.items()}, more)
    elif what == 'long': rewrite(f, {k: torch.cat([v, v]) for k, v in t.items()}, more)
    elif what.startswith('labels'):
        rewrite(f, t | dict(label=torch.full((n,), {'beyond': 10**6, 'negative': -99}.get(what.split()[1], .5))), more)
    elif what == 'no labels': rewrite(f, {k: v for k, v in t.items() if k != 'label'}, more)
    elif what == 'no width':
        rewrite(f, {k: v for k, v in t.items() if 'logvar' not in k}, more)
        fine = gives(want) if not how['width'] else None
    elif what == 'no flips':
        rewrite(f, {k: v for k, v in t.items() if 'flip' not in k}, more)
        fine = gives(want) if not how['flips'] else None
    elif what == 'half':
        rewrite(f, {k: v.half() if v.is_floating_point() else v for k, v in t.items()}, more)
        fine = gives(want, 1e-2)
    elif what == 'other shape': rewrite(f, {k: v[:, :, :1] if v.ndim == 4 else v for k, v in t.items()}, more)
    elif what == 'NaN': rewrite(f, {k: v*float('nan') if v.is_floating_point() else v for k, v in t.items()}, more)
    elif what == 'logvar huge': rewrite(f, t | {'logvar': torch.full_like(t['mean'], 1e30)}, more)
    elif what == 'logvar NaN': rewrite(f, t | {'logvar': torch.full_like(t['mean'], float('nan'))}, more)
    elif what == 'extra': rewrite(f, t | {'surplus': torch.zeros(n)}, more); fine = gives(want)
    return Case(what, opened(p), fine, names=NAMED, detail=str(how))

@cases('caches', 3)
def edited_manifest(rng: random.Random, box: Path) -> Case:
    p, want, how = fresh_cache(rng, box)
    file = p/'manifest.json'
    m = json.loads(file.read_text())
    key, v = rng.choice([*m, 'shards.0', 'shards.0.0', 'shards.0.1', 'scale.mean', 'scale.std', 'stats.std', 'bytes',
                         'missing']), rng.choice([*JUNK, [1, 1, 1], ['a', 'b', 'c'], '../x', [0., 0., 0.],
                                                  [-1., 1., 1.]])
    what = key
    if key == 'bytes': what = rng.choice(list(BAD_JSON)); put(file, BAD_JSON[what])
    elif key == 'missing': del m[rng.choice(list(m))]; file.write_text(json.dumps(m))
    else:
        at: Any = m
        *way, last = key.split('.')
        for k in way: at = at[int(k) if k.isdigit() else k]
        at[int(last) if last.isdigit() else last] = v
        file.write_text(json.dumps(m))
    def right(r: Any) -> bool:
        if key.startswith('scale') and v == [1, 1, 1]: return True       # a scale like any other: nothing tells it from the first
        return gives(want)(r) or key in ('classes',) and isinstance(v, list) and len(v) >= 2 and all(isinstance(c,
                str) for c in v)
    return Case(what, opened(p), right, names=(*NAMED, key.split('.')[0]), detail=f'{short(v)} {how}')

@cases('caches', 2)
def used_with_others(rng: random.Random, box: Path) -> Case:
    "A cache checked with a tokenizer, or gone on with, of other data or another tokenizer."
    p, want, how = fresh_cache(rng, box)
    tok: Any = Plain('plain', .1 if how['width'] else 0)
    if how['scaled']: tok.stats.set(torch.tensor([.1, 0., -.1]), torch.tensor([.5, 2., 1.]))
    what = rng.choice(['same', 'other name', 'other scale', 'other data', 'other count', 'other size', 'other flips',
                       'other classes', 'lost shard', 'other weights', 'half'])
    data, more = Set(7), dict(flips=how['flips'], shard_size=3)
    if what == 'other name': tok.name = 'other'
    if what == 'other scale': tok.stats.set(torch.ones(3), torch.full((3,), 3.))
    if what == 'other data': data.images = data.images.flip(0)*.9
    if what == 'other count': data = Set(8)
    if what == 'other size': data = Set(7, 16)
    if what == 'other flips': more['flips'] = not how['flips']
    if what == 'other classes': data.classes = ('x', 'y')
    if what == 'lost shard': (p/'shard-00001.safetensors').unlink()
    if what == 'half': more['dtype'] = torch.float16
    if what == 'other weights': tok.width = .5 if how['width'] else 0
    def call() -> Any:
        c: Any = cache_latents(tok, data, str(p), **more)
        return c, c.batch(range(len(c))), c.scale()
    good = what in ('same', 'lost shard') or what == 'other weights'
    right = gives(want, 1e-6) if what != 'other weights' else (lambda r: True)
    return Case(what, call, right if good else None, control=what in ('same', 'lost shard'),
                names=(*NAMED, 'plain', 'other'), out=(p,), detail=str(how))

@cases('caches', 2)
def arguments(rng: random.Random, box: Path) -> Case:
    key, v = rng.choice(['n', 'shard_size', 'batch_size', 'rank', 'num_processes', 'path',
                         'flips']), rng.choice(JUNK+TYPED)
    if key == 'path':
        v = rng.choice(['', '.', './c', box/'file', box/'file'/'x', '/proc/x', 'x'*300, 'a\0b', 'a\nb'])
    put(box/'file', b'1')
    if key == 'n' and type(v) is int and v > 7: v = 8
    args: dict[str, Any] = dict(path=f'{box}/c', shard_size=3) | {key: v}
    def call() -> Any:
        c: Any = cache_latents(Plain(), Set(7), **args)
        return c and (c, c.batch(range(len(c))))
    def right(r: Any) -> bool:
        if key in ('rank', 'num_processes'):
            return v is None or isinstance(v, int) and not isinstance(v, bool) and (r is None or len(r[0]) == 7)
        if key == 'path': return v in ('./c', 'a\nb') or isinstance(v, str) and len(r[0]) == 7 and v not in ('',)
        if key == 'flips': return len(r[0]) == 7
        want = 7 if key != 'n' or v is None else v if v != 8 else 7
        return (type(v) is int and v > 0 or key == 'n' and v is None) and len(r[0]) == want and finite(r[1]['mean'])
    return Case(key, call, right, names=('',), out=(box/'c', box.parent/'cwd', box/'x', box.parent/'x'),
                detail=short(v)[-40:])

@cases('caches')
def indices(rng: random.Random, box: Path) -> Case:
    p, want, _ = fresh_cache(rng, box)
    v = rng.choice([*JUNK, *TYPED, [0, 7], [-1], [3, 3, 1], range(2), np.array([5, 0]), torch.tensor([6])])
    def call() -> Any:
        try: return LatentCache(p).batch(v)
        except (IndexError, TypeError, ValueError) as e:            # Python's own words for what is no index
            from vfmvae.core import UserError
            raise UserError(f'an index: {e}') from None
    return Case('batch', call, lambda b: len(b['key']) == len(b['label']) == len(list(v)) and finite(b['mean']),
                names=('',), detail=short(v))

@cases('caches', 3)
def published_latents(rng: random.Random, box: Path) -> Case:
    layout = rng.choice(['lightningdit', 'reg'])
    src, _ = sound_cache(True, True, False)
    d = box/'layout'
    cache = LatentCache(src)
    if layout == 'reg': src, _ = sound_cache(False, True, False); cache = LatentCache(src)
    export_latents(cache, d, layout)
    what = rng.choice(['sound', 'scale', 'scale', 'file', 'tensors', 'layout', 'missing', 'dataset.json', 'labels',
                       'npy', 'outside'])
    detail, fine, lost = '', False, False
    files = sorted(f for f in d.rglob('*') if f.is_file() and f.suffix in ('.safetensors', '.npy'))
    f = rng.choice(files)
    if what == 'scale':
        v: Any = rng.choice([torch.zeros(3), -torch.ones(3), torch.full((3,), float('nan')),
                             torch.full((3,), float('inf')), torch.ones(2), torch.ones(()), 'x', None, [1., 1., 1.],
                             torch.ones(3).long(), torch.ones(3, dtype=torch.complex64), torch.ones(1, 3, 1, 1)])
        key = rng.choice(['mean', 'std'])
        torch.save({k: (v if k == key else torch.ones(1, 3, 1, 1)) for k in ('mean', 'std')}, d/'latents_stats.pt')
        detail = f'{key} {short(v)}'
        floats = isinstance(v, torch.Tensor) and v.numel() == 3 and v.is_floating_point() and bool(v.isfinite().all())
        fine = floats and (key == 'mean' or bool((v > 0).all())) or isinstance(v,
                torch.Tensor) and v.dtype == torch.int64
    elif what == 'file': detail = spoil_file(f, rng); fine = detail in ('garbage after', 'bit flips in the head')
    elif what == 'tensors' and f.suffix == '.safetensors':
        detail, bad, _ = spoil_tensors(load_file(f), rng)
        save_file({k: v.contiguous() for k, v in bad.items()}, f)
        fine = detail.startswith('harmless') or detail == 'extra'
    elif what == 'missing':
        f.unlink()
        lost = layout == 'lightningdit' and len(files) > 1      # a layout without a list of its files
    elif what == 'dataset.json' and layout == 'reg':
        detail = rng.choice(list(BAD_JSON))
        put(d/'dataset.json', BAD_JSON[detail])
    elif what == 'labels' and layout == 'reg':
        rows = json.loads((d/'dataset.json').read_text())
        rows['labels'][0] = rng.choice([[rows['labels'][0][0], v] for v in (-1, 10**9, 'x', None, 1.5, True, [1])]
                                       + [[1, 1], [rows['labels'][0][0]], None, 7])
        put(d/'dataset.json', json.dumps(rows).encode())
        detail = short(rows['labels'][0])
    elif what == 'labels':
        t = load_file(f)
        detail = rng.choice(['-1', '1000000000'])
        t['labels'][0] = int(detail)
        save_file(t, f)
    elif what == 'npy' and layout == 'reg':
        a: Any = rng.choice([np.zeros(3), np.array([object()]), np.full((6, 2, 2), np.nan), np.zeros((6, 2, 2), int),
                             -np.ones((6, 2, 2)), np.zeros((6, 2, 2), complex), np.zeros((5, 2, 2)), np.array('x'),
                             np.zeros((6, 3, 3))])
        with open(f, 'wb') as h: np.save(h, a, allow_pickle=True)
        detail = f'{a.dtype} {a.shape}'
    elif what == 'outside' and layout == 'reg':
        rows = json.loads((d/'dataset.json').read_text())
        shutil.copy(d/rows['labels'][0][0], box/'x.npy')
        rows['labels'][0][0] = rng.choice(['../x.npy', str(box/'x.npy'), '/etc/passwd', '../../../../etc/passwd'])
        put(d/'dataset.json', json.dumps(rows).encode())
        fine = rows['labels'][0][0].endswith('x.npy')
    elif what == 'layout':
        detail = short(v := rng.choice([*JUNK, 'reg' if layout == 'lightningdit' else 'lightningdit']))
        layout = v
    else: what, fine = 'sound', True
    def call() -> Any:
        c = import_latents(d, f'{box}/made', layout, 'plain')
        return c, c.batch(range(len(c))), c.scale()
    def right(r: Any) -> bool:
        return lost and len(r[0]) < 7 or len(r[0]) == 7 and finite(r[1]['mean']) and bool((r[1]['label'] == torch.arange(7) % 2).all())
    return Case(f'{what}', call, right if fine or lost else None, control=what == 'sound', names=('',),
                out=(box/'made',),
                detail=detail)

# statistics and samples -----------------------------------------------------------------------------------------------------------------------------------

def statistics(seed: int = 0, d: int = 4) -> Statistics:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(30, d, generator=g, dtype=torch.float64)
    return Statistics(x.mean(0), x.T.cov(), n=30, extractor='e', preprocessing='p', size=(8, 8), name='s',
                      features=x.float(), probs=torch.rand(30, 3, generator=g).softmax(1))

def npz(path: Path, arrays: dict[str, Any], compress: bool = False) -> Path:
    with open(path, 'wb') as f: (np.savez_compressed if compress else np.savez)(f, **arrays)
    return path

def content(path: Path) -> dict[str, Any]:
    with np.load(path) as f: return {k: f[k] for k in f.files}

def compared(p: Any) -> Any:
    def call() -> Any:
        s = Statistics.open(p)
        return s, compare_statistics(statistics(1), s)
    return call

def as_it_was(tol: float = 1e-9) -> Any:
    want = compare_statistics(statistics(1), statistics())
    def right(r: Any) -> bool:
        return T.near(r[0].mu, statistics().mu, tol) and all(abs(r[1][k]-want[k]) <= max(tol*100, 1e-6)
                                                             for k in r[1]) and finite(r[1])
    return right

@cases('statistics')
def sound_statistics(rng: random.Random, box: Path) -> Case:
    p = statistics().save(box/'s.npz')
    what = rng.choice(['saved', 'ADM', 'compressed', 'float32'])
    a = content(p)
    if what == 'ADM': npz(p, {k: a[k] for k in ('mu', 'sigma')})
    if what == 'compressed': npz(p, a, True)
    if what == 'float32': npz(p, a | {k: a[k].astype(np.float32) for k in ('mu', 'sigma')})
    return Case(what, compared(p), as_it_was(1e-5), control=True)

@cases('statistics', 5)
def spoiled_statistics(rng: random.Random, box: Path) -> Case:
    p = statistics().save(box/'s.npz')
    a = content(p)
    ways: dict[str, Any] = {
        'object array': lambda: a | dict(mu=np.array([object()]*4)), 'texts': lambda: a
        | dict(mu=np.array(list('abcd'))), 'dates': lambda: a | dict(mu=np.array(['2020-01-01']*4, 'M8[D]')),
        'bool': lambda: a | dict(mu=a['mu'] > 0), 'complex': lambda: a | dict(mu=a['mu']+1j),
        'NaN': lambda: a | dict(mu=a['mu']*np.nan), 'inf': lambda: a | dict(sigma=a['sigma']/0),
        'negative sigma': lambda: a | dict(sigma=-a['sigma']), 'lopsided sigma': lambda: a
        | dict(sigma=np.triu(a['sigma'])+np.eye(4)), 'one entry lopsided': lambda: a
        | dict(sigma=a['sigma']+np.eye(4, k=1)*.5),
        'sigma with a negative direction': lambda: a | dict(sigma=a['sigma']-np.eye(4)*np.trace(a['sigma'])),
        'negative variance': lambda: a | dict(sigma=np.diag([1., -1, 1, 1])), 'sigma of one axis': lambda: a
        | dict(sigma=a['sigma'][0]), 'other size': lambda: a | dict(sigma=np.eye(5)),
        'scalar': lambda: a | dict(mu=np.array(1.)), 'empty': lambda: a | dict(mu=np.zeros(0),
            sigma=np.zeros((0, 0))), 'no mu': lambda: {k: v for k, v in a.items() if k != 'mu'},
        'only mu_s': lambda: a | dict(mu_s=np.zeros(3)), 'features of another width': lambda: a
        | dict(features=np.zeros((30, 5), np.float32)),
        'features NaN': lambda: a | dict(features=a['features']*np.float32('nan')), 'probs negative': lambda: a
        | dict(probs=a['probs']-1), 'probs NaN': lambda: a | dict(probs=a['probs']*np.float32('nan')),
        'features of one axis': lambda: a | dict(features=a['features'][0]), 'other count of features': lambda: a
        | dict(features=a['features'][:3]),
        'int mu': lambda: a | dict(mu=np.zeros(4, int), sigma=np.eye(4, dtype=int)), 'half': lambda: a
        | dict(mu=a['mu'].astype(np.float16)), 'big endian': lambda: a
        | {k: a[k].astype('>f8') for k in ('mu', 'sigma')}, 'Fortran order': lambda: a
        | dict(sigma=np.asfortranarray(a['sigma'])), 'surplus': lambda: a | dict(surplus=np.zeros(3)),
        'void': lambda: a | dict(mu=np.zeros(4, 'V8')), 'structured': lambda: a | dict(mu=np.zeros(4, [('a', 'f8')])),
        'three axes': lambda: a | dict(mu=a['mu'][None])}
    what = rng.choice(list(ways))
    npz(p, ways[what]())
    right: Any = as_it_was() if what in ('big endian', 'Fortran order', 'surplus',
                                         'other count of features') else as_it_was(1e-2) if what == 'half' else None
    if what == 'int mu': right = lambda r: finite(r[1])
    return Case(what, compared(p), right, names=('s.npz', 'mu', 'sigma', ' s '), control=what in ('big endian',
            'Fortran order', 'surplus'))

@cases('statistics', 2)
def facts(rng: random.Random, box: Path) -> Case:
    p = statistics().save(box/'s.npz')
    a = content(p)
    f = json.loads(str(a['facts']))
    key, v = rng.choice([*f, 'surplus', 'bytes', 'mu', 'array']), rng.choice(JUNK)
    if key == 'bytes':
        b = rng.choice(list(BAD_JSON.values()))
        a['facts'] = np.array(b.decode('latin-1')) if rng.random() < .5 else np.frombuffer(b or b' ', np.uint8)
    elif key == 'array':
        a['facts'] = rng.choice([np.zeros(3), np.array(['{}', '{}']), np.array(7), np.array(b'{}'), np.array('')])
    else:
        f[key] = v
        a['facts'] = np.array(json.dumps(f))
    npz(p, a)
    def right(r: Any) -> bool:
        s = r[0]
        return as_it_was()(r) and (s.n is None or type(s.n) is int and s.n > 0) and all(isinstance(getattr(s, k),
                str | None) for k in ('extractor', 'preprocessing', 'name')) and (s.size is None
                        or all(type(x) is int for x in s.size) and len(s.size) == 2)
    return Case(key, compared(p), right, names=('',), detail=short(v))

@cases('statistics', 2)
def spoiled_npz(rng: random.Random, box: Path) -> Case:
    p = statistics().save(box/'s.npz')
    what = rng.choice(['file', 'file', 'npy', 'bomb', 'header', 'folder', 'missing', 'pickle', 'empty zip',
                       'member twice', 'huge header', 'member outside', 'encrypted flag', 'pipe'])
    if what == 'file': what = spoil_file(p, rng)
    elif what == 'npy':
        with open(p, 'wb') as h: np.save(h, np.zeros(3))
    elif what == 'bomb':
        side = rng.choice([12_000, 30_000])
        f = io.BytesIO()
        np.lib.format.write_array_header_1_0(f, dict(descr='<f8', fortran_order=False, shape=(side, side)))
        with zipfile.ZipFile(p, 'w', zipfile.ZIP_DEFLATED, compresslevel=1) as z, z.open('sigma.npy', 'w',
                force_zip64=True) as h:
            h.write(f.getvalue())
            for _ in range(side//1000 if side == 12_000 else 1): h.write(bytes(8*1000*side if side == 12_000 else 1000))
        with zipfile.ZipFile(p, 'a') as z:
            f = io.BytesIO()
            np.save(f, np.zeros(4))
            z.writestr('mu.npy', f.getvalue())
    elif what in ('header', 'huge header'):
        head = {'header': b"{'descr': '<f8', 'fortran_order': False, 'shape': (10**9999999,), }", 'huge header': b'{'
                + b' '*60_000 + b'}'}[what]
        with zipfile.ZipFile(p, 'w') as z:
            z.writestr('mu.npy', b'\x93NUMPY\1\0' + len(head).to_bytes(2, 'little') + head + bytes(32))
            z.writestr('sigma.npy', b'x')
    elif what == 'folder': p.unlink(); p.mkdir()
    elif what == 'pipe':
        import os
        p.unlink(); os.mkfifo(p)
    elif what == 'missing': p.unlink()
    elif what == 'pickle':
        name, bad = T.harm(rng, box.parent/'EXECUTED')
        put(p, T.pickled(bad) if not isinstance(bad, bytes) else bad)
    elif what == 'empty zip':
        with zipfile.ZipFile(p, 'w'): pass
    elif what == 'member twice':
        import warnings
        with warnings.catch_warnings(), zipfile.ZipFile(p, 'a') as z:
            warnings.simplefilter('ignore')
            z.writestr('mu.npy', b'x')
    elif what == 'member outside':
        with zipfile.ZipFile(p, 'a') as z: z.writestr('../../escaped.npy', b'x')
    else:
        b = bytearray(p.read_bytes())
        b[6] |= 1
        put(p, bytes(b))
    call, name = rng.choice([(compared(p), 'open'), (lambda: list(read_samples(p)), 'read_samples')])
    fine = name == 'open' and what in ('garbage after', 'bit flips in the head', 'member outside', 'encrypted flag')
    return Case(f'{name}: {what}', call, as_it_was() if fine else None, names=('s.npz',))

@cases('statistics', 2)
def samples(rng: random.Random, box: Path) -> Case:
    x = (torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(1))*2-1)
    p = box/'s.npz'
    write_samples(p, x)
    a = content(p)
    u = a['arr_0']
    ways: dict[str, Any] = {'sound': lambda: a, 'float': lambda: dict(arr_0=u/255.),
                            'int64': lambda: dict(arr_0=u.astype(int)), 'grey': lambda: dict(arr_0=u[..., :1]),
                            'channels first': lambda: dict(arr_0=u.transpose(0, 3, 1, 2)),
                            'no arr_0': lambda: dict(x=u), 'empty': lambda: dict(arr_0=u[:0]),
                            'no pixels': lambda: dict(arr_0=u[:, :0]),
                            'object': lambda: dict(arr_0=np.array([object()])), 'one image': lambda: dict(arr_0=u[0]),
                            'Fortran': lambda: dict(arr_0=np.asfortranarray(u)), 'conversion a number': lambda: a
                            | dict(conversion=np.array(7)), 'conversion an array': lambda: a
                            | dict(conversion=np.array(['a', 'b'])),
                            'conversion object': lambda: a | dict(conversion=np.array(object())), 'labels': lambda: a
                            | dict(arr_1=np.arange(6))}
    what = rng.choice([*ways, 'cut', 'flips', 'NaN', 'uint8 tensor', 'one', 'shape lies'])
    if what in ways: npz(p, ways[what]())
    elif what == 'cut': put(p, cut(p.read_bytes(), rng))
    elif what == 'flips':
        b = bytearray(p.read_bytes())
        at = b.index(b'NUMPY')+200+rng.randrange(500)
        b[at] ^= 1 << rng.randrange(8)
        put(p, bytes(b))
    elif what == 'shape lies': put(p, p.read_bytes().replace(b'(6, 8, 8, 3)', b'(9, 8, 8, 3)'))
    def call() -> Any:
        if what == 'NaN': return write_samples(box/'out.npz', x/0)
        if what == 'uint8 tensor': return write_samples(box/'out.npz', x.byte())
        if what == 'one': return gfid(x[:1], statistics(), Features())
        return torch.cat([b if b.ndim == 4 else b[None] for b in read_samples(p)])
    right = (lambda t: T.near(t, torch.from_numpy(u.copy()).permute(0, 3, 1, 2).float()/127.5-1,
                              1e-6)) if what in ('sound', 'labels',
                                                 'Fortran') or what.startswith('conversion') else None
    return Case(what, call, right, control=what in ('sound', 'labels'), names=('',), out=(box/'out.npz',))

class Features(torch.nn.Module):
    "An extractor of four numbers."
    name, preprocessing = 'e', 'p'
    def forward(self, x: torch.Tensor) -> dict:
        return dict(features=torch.cat([x.float().mean((2, 3)), x.float().std((1, 2, 3))[:, None]], 1))

@cases('statistics')
def references(rng: random.Random, box: Path) -> Case:
    "Statistics of images that are no images."
    x = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(1))*2-1
    odd = {'sound': x, 'NaN': x/0, 'uint8': ((x+1)*127).byte(), 'one': x[:1], 'none': x[:0], 'list': list(x),
           'unequal sizes': [x[0], x[1, :, :4]], 'one image': x[0], 'bool': x > 0}
    what = rng.choice(list(odd))
    how: dict[str, Any] = {}
    small = [v for v in JUNK if not isinstance(v, int) or v < 2**62]
    if what == 'sound' and rng.random() < .6: how = {rng.choice(['batch_size', 'name', 'keep']): rng.choice(small)}
    def right(s: Any) -> bool:
        v = how.get('batch_size', 3)
        return what in ('sound',
                        'list') and type(v) is int and v > 0 and s.n == 6 and finite(s.mu) and (s.name is None
                                or isinstance(s.name, str))
    return Case(what, lambda: compute_statistics(odd[what], Features(), **how), right, control=what in ('sound', 'list')
                and not how, names=('',), detail=short(how))
