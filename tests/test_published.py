"""Published VFM-VAE files: layouts, strictness, safety. Shapes come from the parameter lists in $VFMVAE_SHARED (default ../shared)."""
import csv, json, os, pickle, sys, types, warnings
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from vfmvae.core import UserError
from vfmvae.published import config_of, load_vfmvae, read_checkpoint
from vfmvae.vae import VFMVAE

HERE = Path(__file__).resolve().parent
SHARED = Path(os.environ.get('VFMVAE_SHARED', HERE.parents[1]/'shared'))
PREFIX = 'vfm_encoder.encoder.vision_model.'
shared = pytest.mark.skipif(not SHARED.is_dir(), reason='the golden numbers are not here; set VFMVAE_SHARED')

def golden(path):
    "(tensors, G_kwargs, state dict) of a golden file, the VFM's weights included where they lie beside it."
    g = load_file(path)
    with safe_open(path, 'pt') as f: kwargs = json.loads(f.metadata()['config'])
    sd, vfm = {k[3:]: v for k, v in g.items() if k.startswith('sd.')}, path.with_suffix('.vfm.safetensors')
    if vfm.exists(): sd |= {PREFIX+k: v for k, v in load_file(vfm).items() if k.startswith('vision_model.')}
    return g, kwargs, sd

def easy_dict(**values):
    "A dict subclass with attribute access whose class nobody can import any more."
    def get(self, k):
        try: return self[k]
        except KeyError: raise AttributeError(k) from None
    cls = type('EasyDict', (dict,), {'__module__': 'dnnlib.util', '__getattr__': get, '__setattr__': dict.__setitem__})
    return cls(**values)

@pytest.fixture
def save(tmp_path):
    "Saves with the module of EasyDict present, as in the training run, and absent afterwards."
    def save(obj, name='file.pth'):
        cls = type(easy_dict())
        for m in ('dnnlib', 'dnnlib.util'): sys.modules[m] = types.ModuleType(m)
        obj = rebuild(obj, cls)
        sys.modules['dnnlib.util'].EasyDict = cls
        try: torch.save(obj, tmp_path/name)
        finally:
            for m in ('dnnlib', 'dnnlib.util'): del sys.modules[m]
        return tmp_path/name
    return save

def rebuild(obj, cls):
    "The same object with every EasyDict made of one class, which pickle insists on."
    if type(obj).__name__ == 'EasyDict': return cls({k: rebuild(v, cls) for k, v in obj.items()})
    return {k: rebuild(v, cls) for k, v in obj.items()} if type(obj) is dict else obj

@pytest.fixture(scope='module')
def tiny(): return golden(HERE/'golden'/'vae_tiny.safetensors')

LAYOUTS = {
    'plain': lambda sd: sd,
    'G_ema': lambda sd: {'G_ema': sd},
    'G': lambda sd: {'G': sd, 'D': {'w': torch.zeros(3)}},
    'training': lambda sd: {'G': {k: v+1 for k, v in sd.items()}, 'D': {'w': torch.zeros(3)}, 'G_ema': sd, 'training_set_kwargs': {'path': ['a']}},
    'EasyDict': lambda sd: {'G_ema': sd, 'training_set_kwargs': easy_dict(path='a.tar', deeper=easy_dict(size=256), flip=True)},
    'EasyDict inside': lambda sd: {'G_ema': sd, 'training_set_kwargs': {'x': easy_dict(n=1)}},
}

@torch.no_grad()
@pytest.mark.parametrize('layout', LAYOUTS)
def test_layouts(layout, tiny, save):
    g, kwargs, sd = tiny
    model = load_vfmvae(save(LAYOUTS[layout](sd)), kwargs)
    torch.testing.assert_close(model.decode(g['in.z']), g['out.img'], atol=2e-4, rtol=1e-3)
    with pytest.raises(UserError, match='without its VFM'): model.encode(torch.zeros(1, 3, 128, 128))

@torch.no_grad()
def test_safetensors_half_and_old_format(tiny, tmp_path):
    g, kwargs, sd = tiny
    save_file(sd, tmp_path/'x.safetensors')
    torch.save({'G_ema': sd}, tmp_path/'old.pth', _use_new_zipfile_serialization=False)
    want = load_vfmvae(sd, kwargs).decode(g['in.z'])
    for name in ('x.safetensors', 'old.pth'): assert torch.equal(load_vfmvae(tmp_path/name, kwargs).decode(g['in.z']), want)
    half = load_vfmvae({k: v.half() for k, v in sd.items()}, kwargs)
    assert all(v.dtype == torch.float32 for v in half.state_dict().values())

@shared
@torch.no_grad()
@pytest.mark.parametrize('name', ['tiny_a_legacy', 'tiny_d_discrete'])
def test_encode_with_the_vfm_in_the_file(name, save):
    g, kwargs, sd = golden(SHARED/'golden'/'vfmvae'/f'{name}.safetensors')
    model = load_vfmvae(save({'G_ema': sd, 'training_set_kwargs': easy_dict(n=1)}), kwargs, vfm={'num_heads': 4})
    torch.testing.assert_close(model.encode_parts(g['in.img']*2-1).moments, g['out.pre_quant_from_img'], atol=1e-5, rtol=1e-5)
    given = load_vfmvae({k: v for k, v in sd.items() if not k.startswith('vfm_encoder')}, kwargs, vfm=model.vfm)
    assert torch.equal(given.encode(g['in.img']).mean, model.encode(g['in.img']).mean) and not given.stats.fitted
    with pytest.raises(UserError, match='num_heads only, not depth'): load_vfmvae(sd, kwargs, vfm={'depth': 3})

@shared
def test_golden_settings_are_known():
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        for p in (SHARED/'golden'/'vfmvae').glob('*_*.safetensors'):
            if '.vfm' not in p.name:
                with safe_open(p, 'pt') as f: config_of(json.loads(f.metadata()['config']))
    with pytest.warns(UserWarning, match='ignored: a_new_key, z_new') as w: config_of({'z_new': 1, 'a_new_key': 2})
    assert len(w) == 1

def names(file): # {name: shape} of a parameter list
    with open(SHARED/'spec'/'params'/file, newline='') as f:
        return {r['name']: tuple(json.loads(r['shape'])) for r in csv.DictReader(f, delimiter='\t')}

FULL = dict(vfm_name='google/siglip2-large-patch16-512', legacy=True, use_vf_loss=False, use_kl_loss=False, num_fp16_res=0, conditional=False,
            label_type='cls2text', label_dim=1000, img_resolution=256)

@shared
def test_full_names_and_shapes():
    with torch.device('meta'): model = VFMVAE(config_of(FULL))
    got = {k: tuple(v.shape) for k, v in model.state_dict().items() if not k.startswith('stats.')}
    assert got == names('PARAMS.tsv') and len(got) == 783

@shared
def test_full_file(save):
    own, vfm = names('PARAMS.tsv'), names('PARAMS_VFM_KEYS.tsv')
    assert len(vfm) == 400
    del own['ldm_adapter.linear_proj.weight']                      # as after stages 2 and 3
    one, two = torch.full((1,), 0.01), torch.full((1,), 0.02)      # one stored number each: the file has the full shapes and a few kilobytes
    sd = lambda v: {k: v.expand(s) if s else v[0] for k, s in {**own, **vfm}.items()}
    path = save({'G': sd(one), 'D': {'x': one}, 'G_ema': sd(two), 'training_set_kwargs': easy_dict(class_name='data', resolution=256)})
    model = load_vfmvae(path, FULL)
    assert all((v == two).all() for k, v in model.own_state().items() if not k.startswith('stats.'))
    assert (model.vfm.dim, model.vfm.depth, model.vfm.patch, model.vfm.spec['num_heads']) == (1024, 24, 16, 16)
    assert sum(p.numel() for p in model.trainable().values()) == 139_770_680 - 32_768 and model.name == 'vfmvae-siglip2l-f16d32'
    with torch.no_grad(): assert model.encode(torch.zeros(1, 3, 64, 64)).mean.shape == (1, 32, 4, 4)

def one_line(e): assert '\n' not in str(e.value) and len(str(e.value)) < 1000

def test_what_does_not_fit_is_listed(tiny):
    g, kwargs, sd = tiny
    short = {k: v for k, v in sd.items() if '.torgb.' not in k}
    with pytest.raises(UserError, match=r'24 missing: synthesis.blocks.0.torgb.*, \.\.\.') as e: load_vfmvae(short, kwargs)
    one_line(e)
    with pytest.raises(UserError, match='2 extra: surplus, more'): load_vfmvae(sd | {'surplus': torch.zeros(1), 'more': torch.zeros(1)}, kwargs)
    with pytest.raises(UserError, match=r'1 misshaped: mapping.x_avg \(7,\) for \(24,\)'): load_vfmvae(sd | {'mapping.x_avg': torch.zeros(7)}, kwargs)
    with pytest.raises(UserError, match='misshaped') as e: load_vfmvae(sd, dict(kwargs, decompress_factor=8))
    one_line(e)
    with pytest.raises(UserError, match='legacy=True disagrees with the file, which has no noise maps'): load_vfmvae(sd, dict(kwargs, legacy=True))
    with pytest.raises(UserError, match='conditional=True is not supported'): load_vfmvae(sd, dict(kwargs, conditional=True))
    bare = load_vfmvae({k: v for k, v in sd.items() if 'linear_proj' not in k}, kwargs)
    assert not bare.config.align
    with pytest.raises(UserError, match='no alignment map'): bare.align_features(g['in.z'])

class Trap:
    def __init__(self, f, *args): self.f, self.args = f, args
    def __reduce__(self): return self.f, self.args

def fire(path): Path(path).touch()

@pytest.mark.parametrize('where', ['top', 'beside', 'within'])
@pytest.mark.parametrize('call', ['system', 'eval', 'exec', 'getattr', 'own', 'partial'])
def test_malicious_pickles_are_refused(call, where, tiny, tmp_path):
    import builtins, functools
    sprung = tmp_path/'sprung'
    trap = {'system': Trap(os.system, f'touch {sprung}'), 'eval': Trap(builtins.eval, f'open({str(sprung)!r}, "w")'),
            'exec': Trap(builtins.exec, f'open({str(sprung)!r}, "w")'), 'getattr': Trap(builtins.getattr, str, 'upper'),
            'own': Trap(fire, str(sprung)), 'partial': Trap(functools.partial, os.system, f'touch {sprung}')}[call]
    obj = {'top': trap, 'beside': {'G_ema': tiny[2], 'training_set_kwargs': trap}, 'within': {'G_ema': {'w': trap}}}[where]
    for old in (False, True):
        path = tmp_path/f'bad{old}.pth'
        if old: path.write_bytes(pickle.dumps(obj, protocol=2))
        else: torch.save(obj, path)
        with pytest.raises(UserError, match='nothing in it was executed') as e: load_vfmvae(path, tiny[1])
        one_line(e)
        assert not sprung.exists()
    if call in ('system', 'eval', 'exec', 'own'):
        torch.load(tmp_path/'badFalse.pth', weights_only=False)      # the trap was armed
        assert sprung.exists()

def test_not_a_checkpoint(tmp_path):
    (tmp_path/'a.pth').write_text('<html>not found</html>')
    (tmp_path/'b.safetensors').write_text('<html>not found</html>')
    for p, said in {'a.pth': 'not a plain checkpoint', 'b.safetensors': 'not a whole safetensors file', 'c.pth': 'no checkpoint at'}.items():
        with pytest.raises(UserError, match=said) as e: read_checkpoint(tmp_path/p)
        one_line(e)
    with pytest.raises(UserError, match='holds no VFM-VAE'): load_vfmvae({'G_ema': {'w': torch.zeros(1)}}, {})
