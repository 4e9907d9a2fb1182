"""Files of weights: what loads is whole, of this very shape, finite, of the right type; everything else is one line, in little memory, and runs nothing."""
import io, json, pickle, struct, tarfile, tracemalloc, zipfile
from collections import OrderedDict
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from test_copies import NET_TINY, VFMVAE_TINY, line, make, same, says
from vfmvae.core import build_config, UserError
from vfmvae.dit import DiT, DiTConfig, save_net
from vfmvae.tokenizer import load_tokenizer, save_tokenizer
from vfmvae.vae import VFMVAEConfig
from vfmvae.checkpoints import read_torch
from vfmvae.published_baselines import _hf_shapes, vfm_from_hf_siglip
from vfmvae.vfm import tiny_vit, VFM

def tower(): return {k: torch.randn(s)/8 for k, s in _hf_shapes(depth=1, dim=64, hidden=96, patch=8, n=16).items()}

def spoiled(tensors, key):
    "(what is wrong, tensors), each with one tensor that is no usable weight."
    t = tensors[key].float()
    nan, inf = t.clone(), t.clone()
    nan.view(-1)[-1], inf.view(-1)[0] = float('nan'), float('-inf')
    for name, bad in dict(nan=nan, inf=inf, int=t.long(), bool=t > 0, complex=t.to(torch.complex64), sparse=t.to_sparse(), overflow=t.double()+1e300,
                          shape=t[..., :-1].clone(), quantised=torch.quantize_per_tensor(t, .1, 0, torch.qint8)).items():
        yield name, tensors | {key: bad}
    yield 'missing', {k: v for k, v in tensors.items() if k != key}
    yield 'extra', tensors | {'one.more': t}

def written(path, tensors, meta):
    save_file({k: v.contiguous().clone() for k, v in tensors.items()}, path)
    path.with_suffix('.json').write_text(meta if isinstance(meta, str) else json.dumps(meta))
    return path

SAFE = ('sparse', 'quantised')     # safetensors cannot hold them

def test_a_spoiled_tensor_is_refused_wherever_it_comes_in(tmp_path):
    tok, net, vfm = make('vfmvae'), make('net'), VFM('tiny')
    own, about = tok.own_state(), dict(family='vfmvae', config=asdict(VFMVAE_TINY))
    had = says(tok)
    for key in ('synthesis.blocks.0.conv0.dwconv.weight', 'stats.std'):
        for name, bad in spoiled(own, key):
            assert key in line(tok.load_own_state, bad) or name == 'extra' or key == 'stats.std', (key, name)
            if key == 'stats.std' and name not in SAFE: line(load_tokenizer, written(tmp_path/'t.safetensors', bad, about), False)
    assert same(says(tok), had)
    for name, bad in spoiled(net.state_dict(), 'blocks.1.attn.qkv.weight'):
        if name not in SAFE: line(DiT.load, written(tmp_path/'n.safetensors', bad, dict(family='dit', config=asdict(NET_TINY))))
    for name, bad in spoiled(vfm.net.state_dict(), 'norm.weight'):
        torch.save(bad, tmp_path/'v.pt')
        line(VFM, 'tiny', tmp_path/'v.pt' if name in SAFE else written(tmp_path/'v.safetensors', bad, {}))
    for _, bad in spoiled(tower(), 'post_layernorm.weight'): line(vfm_from_hf_siglip, bad, 4)

def test_stats_are_finite_and_positive(tmp_path):
    tok = make('vfmvae')
    for mean, std in ((0, 0), (0, -1), (0, float('nan')), (float('inf'), 1), (0, float('inf')), (0, 1e-60)):
        m, s = (torch.full((16,), v, dtype=torch.float64) for v in (mean, std))
        for f in (tok.stats.set, tok.stats.adopt_or_compare,
                  lambda m, s: tok.load_own_state(tok.own_state() | {'stats.mean': m, 'stats.std': s})): line(f, m, s)
    line(tok.stats.set, [0.]*16, [1.]*16)
    line(tok.stats.set, torch.zeros(3), torch.ones(3))
    assert tok.stats.std.eq(1).all() and not tok.stats.fitted

@pytest.mark.parametrize('kind', ['vfmvae', 'conv', 'net'])
def test_sound_files_of_any_float_type_load(kind, tmp_path):
    net, path = make(kind), tmp_path/'x.safetensors'
    (save_net if kind == 'net' else save_tokenizer)(path, net, family='mine', config=1, note='kept')
    read = DiT.load if kind == 'net' else load_tokenizer
    again = read(path)
    assert same(says(again), says(net)) and again.meta['note'] == 'kept' and again.meta['family'] != 'mine'
    for dtype in (torch.float16, torch.float64):
        other = read(written(tmp_path/'y.safetensors', {k: v.to(dtype) for k, v in load_file(path).items()}, again.meta))
        assert all(p.dtype == torch.float32 for p in other.parameters()) and (dtype == torch.float16 or same(says(other), says(net)))

ODD = [None, [], {}, 0, -1, 3.5, 'x', True, [[]], {'a': {}}, 10**11, 1e300, '\0']

def test_json_of_a_tokenizer_that_says_nonsense(tmp_path):
    tok, path = make('vfmvae'), tmp_path/'t.safetensors'
    about, own = dict(family='vfmvae', name='t', config=asdict(VFMVAE_TINY)), tok.own_state()
    for key in ('family', 'config'):
        for odd in ODD: line(load_tokenizer, written(path, own, about | {key: odd}), False)
    for odd in ([], {}, 3, ['a']): line(load_tokenizer, written(path, own, about | {'name': odd}), False)
    for text in ('', '[]', '3', '{', 'null', '{"a": NaN}', '['*5000): line(load_tokenizer, written(path, own, text), False)
    for i, (f, default) in enumerate(asdict(VFMVAE_TINY).items()):
        for odd in ODD[i % 6::6]:
            if odd == default or isinstance(default, bool) and odd is True or isinstance(default, str) and f == 'vfm' and isinstance(odd, str): continue
            try: load_tokenizer(written(path, own, about | {'config': about['config'] | {f: odd}}), False)
            except UserError as e: assert '\n' not in str(e) and len(str(e)) < 600, (f, odd)
            else: assert f in ('patch', 'scale', 'vocab', 'codebooks', 'img_size', 'align', 'layers', 'fusion', 'attention') or odd in (1, True), (f, odd)

def test_json_of_a_net_that_says_nonsense(tmp_path):
    net, path = make('net'), tmp_path/'n.safetensors'
    about, own = dict(family='dit', config=asdict(NET_TINY)), net.state_dict()
    for key in ('family', 'config'):
        for odd in ODD: line(DiT.load, written(path, own, about | {key: odd}))
    for i, f in enumerate(asdict(NET_TINY)):
        for odd in ODD[i % 6::6]:
            try: DiT.load(written(path, own, about | {'config': about['config'] | {f: odd}}))
            except UserError as e: assert '\n' not in str(e) and len(str(e)) < 600, (f, odd)
    good = dict(tokenizer='t', latent=[16, 8, 8], scale=dict(mean=[0.]*16, std=[1.]*16), classes=['a', 'b', 'c'], step=3,
                sampling=dict(steps=4), recipe=dict(flow=dict(ema=.9)))
    assert DiT.load(written(path, own, about | good)).meta['step'] == 3
    for k, bads in dict(tokenizer=[[], 3], latent=['x', [16], [15, 8, 8], [16, -8, 8], [16, 8, 10**11], [16, 8, 'a']], classes=['abc', [1, 2, 3], ['a']],
                        scale=[[1], dict(mean=[0.]*16), dict(mean=[0.]*16, std=[0.]*16), dict(mean='x', std=[1.]*16), dict(mean=[0.]*3, std=[1.]*3)],
                        sampling=['heun', [1]], recipe=[3, dict(flow=4)], step=['many', 1.5, [3]]).items():
        for odd in bads: line(DiT.load, written(path, own, about | good | {k: odd}))

@pytest.mark.parametrize('cls,base', [(VFMVAEConfig, VFMVAE_TINY), (DiTConfig, NET_TINY)])
def test_sizes_that_no_machine_holds_are_refused_before_anything_is_built(cls, base):
    numbers = [f for f, v in asdict(base).items() if isinstance(v, int | float | tuple) and not isinstance(v, bool)]
    for f in numbers:
        for n in (10**11, 10**300, -10**11, float('inf'), float('nan')):
            line(build_config, cls, asdict(base) | {f: [n] if isinstance(getattr(base, f), tuple) else n})
        for odd in ('x', None, {}, [['a']]):
            with pytest.raises(UserError): replace(base, **{f: odd})
    for f in ('depth', 'res_blocks', 'quant_layers', 'post_layers', 'blocks', 'head_depth'):
        if hasattr(base, f): line(build_config, cls, asdict(base) | {f: 10_000})

# torch files ------------------------------------------------------------------------------------------------------------------------------------

def zipped(path, data, pkl=None, method=zipfile.ZIP_STORED, **storages):
    with zipfile.ZipFile(path, 'w', method) as z:
        z.writestr('a/data.pkl', data)
        z.writestr('a/byteorder', 'little')
        z.writestr('a/version', '3\n')
        for k, v in storages.items(): z.writestr(f'a/data/{k}', v)
    return path

class Call:
    def __init__(self, f, *args, state=None): self.it = (f, args) if state is None else (f, args, state)
    def __reduce__(self): return self.it

class Pickler(pickle.Pickler):
    def persistent_id(self, x): return x.pid if isinstance(x, Store) else None

class Store:
    def __init__(self, numel, key='0'): self.pid = ('storage', torch.FloatStorage, key, 'cpu', numel)

def pickled(x):
    out = io.BytesIO()
    Pickler(out, 2).dump(x)
    return out.getvalue()

rebuild = torch._utils._rebuild_tensor_v2

def bombs():
    "Pickles that ask for more than they hold; none calls anything that torch's weights-only reading would not."
    few = b'\0'*16
    yield 'bytearray', dict(a=Call(bytearray, 4*10**9)), {}
    yield 'tensor class', dict(a=Call(torch.FloatTensor, 10**9)), {}
    yield 'storage class', dict(a=Call(torch.UntypedStorage, 4*10**9)), {}
    yield 'storage that is longer than its member', dict(a=Call(rebuild, Store(10**9), 0, (10**9,), (1,), False, OrderedDict())), {'0': few}
    yield 'storage that is not there', dict(a=Call(rebuild, Store(4, '7'), 0, (4,), (1,), False, OrderedDict())), {'0': few}
    yield 'tensor that is longer than its storage', dict(a=Call(rebuild, Store(4), 0, (10**9,), (1,), False, OrderedDict())), {'0': few}
    yield 'one number expanded', dict(a=Call(rebuild, Store(4), 0, (40_000, 40_000), (0, 0), False, OrderedDict())), {'0': few}
    yield 'the same by another way', dict(a=Call(torch._tensor._rebuild_from_type_v2, bytearray, torch.Tensor, (4*10**9,), {})), {}
    text = 'x'*10_000
    yield 'many copies of one text', [Call(__import__('_codecs').encode, text, 'latin1') for _ in range(10_000)], {}
    yield 'many copies of one list', (big := list(range(10_000)), [Call(set, big) for _ in range(3000)]), {}
    yield 'a system call', dict(a=Call(exec, 'raise SystemExit')), {}

BOMBS = {name: (pickled(x), stores) for name, x, stores in bombs()}

@pytest.mark.parametrize('name', BOMBS)
def test_a_pickle_that_asks_for_more_than_the_file_holds(name, tmp_path):
    data, stores = BOMBS[name]
    line(read_torch, zipped(tmp_path/'a.pt', data, **stores))
    head = 0x1950a86a20f9469cfc6c, 1001, dict(protocol_version=1001, little_endian=True, type_sizes={})
    (tmp_path/'b.pt').write_bytes(b''.join(pickle.dumps(x, 2) for x in head) + data + pickle.dumps([], 2))
    line(read_torch, tmp_path/'b.pt')
    for f in ('a.pt', 'b.pt'): line(VFM, 'tiny', tmp_path/f)

def test_other_files_of_torch(tmp_path):
    state = tiny_vit().state_dict()
    torch.save(state, tmp_path/'z.pt')
    torch.save(state, tmp_path/'o.pt', _use_new_zipfile_serialization=False)
    whole = {f: (tmp_path/f).read_bytes() for f in ('z.pt', 'o.pt')}
    want = says(VFM('tiny', tmp_path/'z.pt'))
    assert same(says(VFM('tiny', tmp_path/'o.pt')), want)
    for wrapped in (dict(model=state), dict(state_dict=dict(state), epoch=3, args=dict(lr=.1))):
        torch.save(wrapped, tmp_path/'w.pt')
        assert same(says(VFM('tiny', tmp_path/'w.pt')), want)
    for b in whole.values():
        for n in (0, 1, 10, 100, len(b)//2, len(b)-1):
            (tmp_path/'cut.pt').write_bytes(b[:n])
            line(read_torch, tmp_path/'cut.pt')
        for at in range(3, 2000, 401):       # flipped bits: refused, or a weight is another number
            (tmp_path/'bit.pt').write_bytes(b[:at]+bytes([b[at] ^ 64])+b[at+1:])
            try: read_torch(tmp_path/'bit.pt')
            except UserError as e: assert '\n' not in str(e)
    with zipfile.ZipFile(tmp_path/'z.pt') as z, zipfile.ZipFile(tmp_path/'packed.pt', 'w', zipfile.ZIP_DEFLATED) as out:
        for i in z.infolist(): out.writestr(i.filename, z.read(i) if 'data/' not in i.filename else bytes(i.file_size*50))
    with tarfile.open(tmp_path/'tar.pt', 'w') as t:
        for n in ('storages', 'tensors', 'pickle'):
            t.addfile(tarfile.TarInfo(n), io.BytesIO(b''))
    (tmp_path/'folder.pt').mkdir()
    for x, f in (([1, 2], 'list.pt'), ({'a': 1}, 'number.pt'), ({3: torch.zeros(1)}, 'keys.pt'), (3, 'three.pt')): torch.save(x, tmp_path/f)
    (tmp_path/'text.pt').write_text('hello')
    (tmp_path/'deep.pt').write_bytes(b'\x80\x02' + b'('*10**6 + b'.')
    (tmp_path/'memo.pt').write_bytes(b'\x80\x02Nr' + struct.pack('<I', 2**31) + b'.')
    zipped(tmp_path/'memo2.pt', b'\x80\x02Nr' + struct.pack('<I', 2**31) + b'.')
    zipped(tmp_path/'wide.pt', b'\x80\x02' + b'}'*(2**24+1) + b'.')
    np.savez(tmp_path/'numpy.npz', a=np.zeros(3))
    odd = [p for p in tmp_path.iterdir() if p.name not in (*whole, 'w.pt', 'cut.pt', 'bit.pt')]
    assert len(odd) == 13
    for f in (*odd, tmp_path/'no.pt'): line(VFM, 'tiny', f)

def test_a_bomb_takes_no_memory(tmp_path):
    path, data = tmp_path/'a.pt', pickled(dict(a=Call(bytearray, 3*10**8)))
    tracemalloc.start()
    try:
        line(read_torch, zipped(path, data))
        assert tracemalloc.get_traced_memory()[1] < 10**7
        torch.load(path, weights_only=True)           # what it would have taken
        assert tracemalloc.get_traced_memory()[1] > 10**8
    finally: tracemalloc.stop()
