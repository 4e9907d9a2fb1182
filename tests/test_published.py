"""Published VFM-VAE files: layouts, strictness, safety. Shapes come from the parameter lists in $VFMVAE_SHARED (default ../shared)."""
import csv, json, os, pickle, re, sys, types, warnings
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from vfmvae.baselines import ConvVAE, ConvVAEConfig
from vfmvae.core import UserError
from vfmvae.dit import DiT, DiTConfig
from vfmvae.layers import sincos_table
from vfmvae.checkpoints import read_checkpoint
from vfmvae.published_baselines import load_convvae
from vfmvae.published import config_of, load_net, load_vfmvae, open_published
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


# whatever a file or its settings hold: the right net or one line -------------------------------------------------------------------------------

CONV = dict(norm_num_groups=32, block_out_channels=[32, 64], layers_per_block=1, latent_channels=4, scaling_factor=.18, act_fn='silu')
NET = dict(num_heads=4, encoder_depth=1, input_size=8, patch_size=2, depth=2, hidden_size=48, mlp_ratio=4., num_classes=10, z_dims=[24])

def weights(net): return torch.cat([v.flatten() for k, v in net.state_dict().items() if v.is_floating_point() and 'stats' not in k])

@pytest.fixture(scope='module')
def nets(tiny):
    "kind -> (loader of tensors and settings, tensors, settings, a number that depends on the weights)."
    torch.manual_seed(0)
    conv = ConvVAE(ConvVAEConfig(width=32, mults=(1, 2), blocks=1, decoder_blocks=2, groups=32))
    dit = DiT(DiTConfig(hidden_size=48, depth=2, num_heads=4, num_classes=10, z_dims=(24,), projector_dim=20, encoder_depth=1))
    with torch.no_grad():
        for p in (*conv.parameters(), *dit.parameters()): p.add_(.1*torch.randn_like(p))
    z, t, y = torch.randn(1, 4, 8, 8), torch.rand(1), torch.tensor([3])
    return dict(vfmvae=(load_vfmvae, tiny[2], tiny[1], weights),
                conv=(lambda sd, c: load_convvae(sd, config=c), {k: v for k, v in conv.state_dict().items() if 'stats' not in k}, CONV, lambda m: m.decode(z)),
                net=(lambda sd, c: load_net(sd, 'repa', **c), dit.state_dict() | {'pos_embed': sincos_table(4, 4, 48)[None]}, NET, lambda m: m(z, t, y)))

KINDS = 'vfmvae', 'conv', 'net'

@torch.no_grad()
@pytest.mark.parametrize('kind', KINDS)
def test_wrappers_prefixes_and_dtypes_are_the_same_net(kind, nets, tmp_path):
    load, sd, settings, number = nets[kind]
    want, other = number(load(sd, settings)), {k: v+1 for k, v in sd.items()}
    prefixed = {f'module._orig_mod.{k}': v for k, v in sd.items()} | {'n_averaged': torch.tensor(3)}
    compiled = {re.sub(r'((?:blocks|up|down)\.\d+\.)', r'\1_orig_mod.', k): v for k, v in sd.items()}     # block by block
    assert compiled.keys() != sd.keys()
    for content in (prefixed, compiled, {'state_dict': sd, 'step': 3},
                    {'model': {'state_dict': prefixed}}, {'ema': sd, 'model': other}, {'ema': {}, 'model': sd},
                    {k: v.double() for k, v in sd.items()}, {k: v.t().contiguous().t() if v.ndim == 2 else v for k, v in sd.items()}):
        assert torch.equal(number(load(content, settings)), want)
    torch.save({'model': sd}, tmp_path/'a.pt')
    assert torch.equal(number(load(tmp_path/'a.pt', settings)), want)
    for half in (torch.float16, torch.bfloat16):
        net = load({k: v.to(half) for k, v in sd.items()}, settings)
        assert all(torch.equal(v, sd[k].to(half).float()) for k, v in net.state_dict().items() if k in sd and v.dtype == torch.float32)
    with pytest.raises(UserError, match='share a name'): load(sd | {f'module.{next(iter(sd))}': torch.zeros(1)}, settings)

SPOILT = {'NaN': lambda v: v*float('nan'), 'infinite': lambda v: v/0., 'too large for float32': lambda v: v.double()*0 + 1e300, 'int': lambda v: v.long(),
          'bool': lambda v: v > 0, 'complex': lambda v: v.cfloat(), 'sparse': lambda v: v.to_sparse(), 'meta': lambda v: v.to('meta'),
          'empty': lambda v: v[:0], 'quantised': lambda v: torch.quantize_per_tensor(v, .1, 0, torch.qint8), 'scalar': lambda v: v.new_zeros(()),
          'not a tensor': lambda v: v.numpy(), 'a small storage': lambda v: v.new_zeros(()).expand(10**6, 10**6), 'None': lambda v: None,
          'one dimension more': lambda v: v[None]}

@pytest.mark.parametrize('how', SPOILT)
@pytest.mark.parametrize('kind', KINDS)
def test_a_spoilt_tensor_is_one_line(kind, how, nets):
    load, sd, settings, _ = nets[kind]
    named = [k for k, v in sd.items() if v.ndim > 1 and v.abs().min() > 0]
    for k in (named[0], named[-1]):
        with pytest.raises(UserError) as e: load(sd | {k: SPOILT[how](sd[k])}, settings)
        one_line(e)

@pytest.mark.parametrize('kind', KINDS)
def test_what_is_no_dict_of_tensors_is_one_line(kind, nets):
    load, sd, settings, _ = nets[kind]
    loop = {}
    loop['model'] = loop
    for source in (None, 5, [sd], set(sd), b'x', '', 'none.pt', {}, {'state_dict': None}, {5: sd}, loop, {'model': [1]}, dict(enumerate(sd.values()))):
        with pytest.raises(UserError) as e: load(source, settings)
        one_line(e)
    for k in ('0', '99999999999'):
        name = next(n for n in sd if '.0.' in n)
        with pytest.raises(UserError) as e: load({n: v for n, v in sd.items() if n != name} | {name.replace('.0.', f'.{k}9.', 1): sd[name]}, settings)
        one_line(e)

ODD = [-1, 1.5, float('nan'), float('inf'), 10**11, 10**30, 1e300, 'x', [], [10**11], ['a'], [[1]], {'a': 1}, {1}, b'x', 1j, torch.zeros(2), object()]
SETTINGS = {'vfmvae': ('num_blocks', 'z_dimension', 'img_resolution', 'patch_in_dimensions', 'concat_z_block_indices', 'attn_depths', 'attn_block_indices',
                       'vfm_name', 'scale_factor', 'legacy', 'use_self_attn', 'compression_mode', 'synthesis_kwargs', 'z_pooled_resolution', 'conditional'),
            'conv': ('norm_num_groups', 'block_out_channels', 'latent_channels', 'layers_per_block', 'scaling_factor', 'act_fn', 'use_quant_conv'),
            'net': ('depth', 'hidden_size', 'num_heads', 'mlp_ratio', 'input_size', 'encoder_depth', 'z_dims', 'learn_sigma', 'qk_norm', 'use_rope')}

@pytest.mark.parametrize('kind, name', [(kind, name) for kind in KINDS for name in SETTINGS[kind]])
def test_an_odd_setting_is_one_line_before_anything_of_its_size_is_made(kind, name, nets):
    load, sd, settings, _ = nets[kind]
    for v in ODD:
        if (name, str(v)) in (('scaling_factor', '1.5'), ('vfm_name', 'x'), ('synthesis_kwargs', "{'a': 1}")): continue       # these are right
        with pytest.raises(UserError) as e: load(sd, dict(settings, **{name: v}))
        one_line(e)

@pytest.mark.parametrize('g_kwargs', [None, 5, 'x', [], {5: 1}, {'synthesis_kwargs': {'num_res_blocks': 10**11}}, {'synthesis_kwargs': {'channel_base': -1}},
                                      {'synthesis_kwargs': {5: 1}}, {'synthesis_kwargs': {'synthesis_kwargs': {}}}])
def test_settings_that_are_no_settings(g_kwargs, tiny):
    with pytest.raises(UserError) as e: load_vfmvae(tiny[2], dict(tiny[1], **g_kwargs) if isinstance(g_kwargs, dict) and 5 not in g_kwargs else g_kwargs)
    one_line(e)

class Call:
    def __init__(self, f, *args): self.f, self.args = f, args
    def __reduce__(self): return self.f, self.args

def test_a_file_that_asks_for_memory_is_refused_before_it_is_given_any(tmp_path):
    import tracemalloc
    for i, f in enumerate((bytearray, torch.FloatTensor, torch.Tensor, torch.DoubleTensor)):
        for old in (False, True): torch.save({'state_dict': {'w': Call(f, 4*10**9)}}, tmp_path/f'{i}{old}.pt', _use_new_zipfile_serialization=not old)
    (tmp_path/'deep.pt').write_bytes(b'\x80\x02' + b']'*10**5 + b'a'*(10**5-1) + b'.')
    tracemalloc.start()
    for path in tmp_path.iterdir():
        with pytest.raises(UserError, match='nothing in it was executed') as e: read_checkpoint(path)
        one_line(e)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**28

@torch.no_grad()
def test_one_door_tells_what_a_file_is(nets, tiny, tmp_path):
    g, kwargs, sd = tiny
    conv = nets['conv'][1]
    torch.save({'G_ema': sd}, tmp_path/'vfmvae.pth')
    whole = {f'first_stage_model.{k}': v for k, v in conv.items()} | {'model.diffusion_model.x_embedder.proj.weight': torch.zeros(1)}
    torch.save({'state_dict': whole}, tmp_path/'sd.ckpt')
    save_file(conv, tmp_path/'vavae.safetensors')
    (tmp_path/'training.yaml').write_text('G_kwargs: '+json.dumps(kwargs))
    (tmp_path/'training.json').write_text(json.dumps(kwargs))
    for settings in (kwargs, tmp_path/'training.yaml', str(tmp_path/'training.json')):
        assert torch.equal(weights(open_published(tmp_path/'vfmvae.pth', settings)), weights(load_vfmvae(sd, kwargs)))
    for name in ('sd.ckpt', 'vavae.safetensors'): assert open_published(tmp_path/name).config.groups == 32
    for content, says in ((sd, 'give the YAML of its training'), (nets['net'][1], 'a diffusion net'),
                          ({'vision_model.embeddings.patch_embedding.weight': g['in.z']}, 'vision tower'),
                          ({'patch_embed.proj.weight': g['in.z']}, 'VFM.name'), (conv | {'quantize.embedding.weight': g['in.z']}, 'codebook'),
                          ({'features.0.weight': g['in.z']}, 'lpips'), ({'w': g['in.z']}, 'no tokenizer: 1 tensors such as w'), ({}, 'no tokenizer')):
        with pytest.raises(UserError, match=says) as e: open_published(content)
        one_line(e)
    (tmp_path/'bad.yaml').write_bytes(b'\xff\xfe\x00: [')
    (tmp_path/'list.yaml').write_text('- 1')
    (tmp_path/'deep.yaml').write_text('['*5000)
    for name in ('bad.yaml', 'list.yaml', 'deep.yaml', 'none.yaml'):
        with pytest.raises(UserError) as e: open_published(tmp_path/'vfmvae.pth', tmp_path/name)
        one_line(e)
    (tmp_path/'folder').mkdir()
    with pytest.raises(UserError, match='no weights in'): open_published(tmp_path/'folder')
