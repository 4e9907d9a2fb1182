"""VFM-VAE against numbers of the published implementation (random weights, CPU, fp32).

The tolerances are those of the golden README: 2e-4 + 1e-3 relative on images and deep features, 1e-5 on adapter outputs, indices exact.
A small part of the numbers lies in tests/golden; the rest is read from $VFMVAE_SHARED (default ../shared) and skipped where that is absent.
"""
import json, os, zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file

from vfmvae.core import to_tokens
from vfmvae.published import config_of, load_vfmvae
from vfmvae.vae import VFMVAE

HERE = Path(__file__).resolve().parent
SHARED = Path(os.environ.get('VFMVAE_SHARED', HERE.parents[1]/'shared'))/'golden'/'vfmvae'
TINY = ['tiny_a_legacy', 'tiny_a_nolegacy', 'tiny_b_eq', 'tiny_d_discrete']
shared = pytest.mark.skipif(not SHARED.is_dir(), reason='the golden numbers are not here; set VFMVAE_SHARED')

def image_close(a, b): torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-3)
def adapter_close(a, b): torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)

def read(path):
    with safe_open(path, 'pt') as f: return json.loads(f.metadata()['config']), f.metadata()

class Case:
    "One golden file: its tensors, its settings, and the model made of them (with the VFM where its weights are there)."
    def __init__(self, path):
        self.g, (self.kwargs, self.meta) = load_file(path), read(path)
        sd = {k[3:]: v for k, v in self.g.items() if k.startswith('sd.')}
        vfm = path.with_suffix('.vfm.safetensors')
        self.has_vfm = vfm.exists()
        if self.has_vfm:
            sd |= {'vfm_encoder.encoder.vision_model.'+k: v for k, v in load_file(vfm).items() if k.startswith('vision_model.')}
        self.model = load_vfmvae(sd, self.kwargs, vfm={'num_heads': 4}).eval()
        self.features = [self.g[f'in.patch_feature.{i}'] for i in range(3)]

def whole(name):
    if not SHARED.is_dir(): pytest.skip('the golden numbers are not here; set VFMVAE_SHARED')
    return Case(SHARED/f'{name}.safetensors')

@pytest.fixture(scope='module', params=['in the clone', *TINY])
def case(request):
    "Every tiny case, and the part of one that lies in the repository."
    return Case(HERE/'golden'/'vae_tiny.safetensors') if request.param == 'in the clone' else whole(request.param)

@pytest.fixture(scope='module', params=TINY)
def full_case(request): return whole(request.param)

def watch(model, modules):
    "Runs of the named modules are written into the returned dict."
    seen = {}
    for name, m in modules.items(): m.register_forward_hook(lambda m, i, o, name=name: seen.__setitem__(name, o))
    return seen

def vf_formula(u, a):
    "Spec section 10, margins 0 and weights 1: distance-matrix term plus cosine term; u, a (b,c,h,w)."
    cos = lambda t: (n := F.normalize(to_tokens(t), dim=-1, eps=1e-12)) @ n.mT
    return (cos(u)-cos(a)).abs().mean() + (1-F.cosine_similarity(u, a, dim=1, eps=1e-8)).relu().mean()

@torch.no_grad()
def test_decode(case):
    scales = case.model.decode_scales(case.g['in.z'])
    image_close(scales[0], case.g['out.img'])
    assert len(scales) == case.kwargs['num_blocks']
    assert torch.equal(case.model.decode(case.g['in.z']), scales[0])

@torch.no_grad()
def test_scales(full_case):
    scales = full_case.model.decode_scales(full_case.g['in.z'])[1:]
    assert len(scales) == sum(k.startswith('out.multiscale') for k in full_case.g)
    for k, image in enumerate(scales): image_close(image, full_case.g[f'out.multiscale.{k}'])

@torch.no_grad()
def test_truncation(full_case):
    case = full_case
    image_close(case.model.decode(case.g['in.z'], psi=0.7), case.g['out.img_psi0.7'])
    assert (case.g['out.img_psi0.7']-case.g['out.img']).abs().max() > 1e-2

@torch.no_grad()
def test_projection(case):
    parts = case.model.project_parts(case.features)
    adapter_close(parts.moments, case.g['out.pre_quant'])
    if parts.codes is None:
        adapter_close(parts.raw.mean, case.g['out.mu'])
        adapter_close(parts.raw.logvar, case.g['out.logvar'])
        z = parts.raw.mean + parts.raw.std*case.g['in.eps']
        adapter_close(parts.raw.kl().mean()[None], case.g['out.kl_loss'])
    else:
        z, codes = parts.posterior.mode(), parts.codes
        assert torch.equal(codes.indices, case.g['out.code_indices'])
        for name, value in dict(vq_loss=codes.vq, entropy_loss=codes.entropy, codebook_usages=codes.usage).items():
            adapter_close(value[None], case.g[f'out.{name}'])
    adapter_close(z, case.g['out.z_sample'])
    adapter_close(vf_formula(case.model.align_features(z), case.model.align_target(parts))[None], case.g['out.vf_loss'])

@torch.no_grad()
def test_encoder_from_features(full_case):
    case = full_case
    features = [case.g[f'vfm.feat.{i}'] for i in range(3)]
    adapter_close(case.model.project_parts(features).moments, case.g['out.pre_quant_from_img'])

@torch.no_grad()
def test_encoder_from_image(full_case):
    case = full_case
    parts = case.model.encode_parts(case.g['in.img']*2-1)
    for i, k in enumerate(case.model.config.layers): adapter_close(parts.features[k], case.g[f'vfm.feat.{i}'])
    adapter_close(parts.moments, case.g['out.pre_quant_from_img'])

@torch.no_grad()
def test_taps(full_case):
    case = full_case
    taps, m = {k[4:]: v for k, v in case.g.items() if k.startswith('tap.')}, case.model
    if not taps: pytest.skip('this golden file has no taps')
    names = {f'patch_quants.{i}': q[0] for i, q in enumerate(m.ldm_adapter.patch_quants)}
    names |= {'final_quant': m.ldm_adapter.final_quant, 'post_quant': m.ldm_adapter.post_quant, 'ws0': m.mapping}
    names |= {f'z_convs.{i}': b for i, b in m.synthesis.z_convs.items()} | {f'block.{i}': b for i, b in enumerate(m.synthesis.blocks)}
    names |= {f'block.{i}.upsample': b.seperate_upsample_conv for i, b in enumerate(m.synthesis.blocks)}
    names |= {f'block.{i}.conv0': b.conv0 for i, b in enumerate(m.synthesis.blocks)}
    seen = watch(m, names)
    m.project([case.g[f'vfm.feat.{i}'] for i in range(3)]), m.decode(case.g['in.z'])
    for i in range(len(m.synthesis.blocks)): seen |= dict(zip([f'block.{i}.{k}' for k in ('x', 'x_sum', 'img')], seen.pop(f'block.{i}'), strict=True))
    for i in range(3):
        t = seen[f'patch_quants.{i}']
        grid = t.mT.unflatten(2, (round(t.shape[1]**.5), -1))
        seen[f'patch_quants.{i}'] = to_tokens(F.pixel_unshuffle(grid, m.config.space_to_depth))
    assert set(taps) == set(seen)
    for k, v in taps.items(): (image_close if 'block' in k or 'z_convs' in k or 'ws' in k else adapter_close)(seen[k][:len(v)], v)

@shared
def test_legacy_noise_is_the_only_difference():
    a, b = (Case(SHARED/f'tiny_a_{k}.safetensors') for k in ('legacy', 'nolegacy'))
    extra = set(a.model.own_state()) - set(b.model.own_state())
    assert extra and all('noise' in k for k in extra)
    with torch.no_grad():
        assert (a.model.decode(b.g['in.z'])-b.g['out.img']).abs().max() > 1e-2
        for k, v in a.model.state_dict().items():
            if k.endswith('noise_strength'): v.zero_()
        image_close(a.model.decode(b.g['in.z']), b.g['out.img'])

@shared
@torch.no_grad()
@pytest.mark.parametrize('s', [0.25, 0.5, 0.75])
def test_equivariance_cases(s):
    case = Case(SHARED/'tiny_b_eq.safetensors')
    z = F.interpolate(case.g['in.z'], scale_factor=s, mode='bilinear', align_corners=False).rot90(1, [-1, -2])
    adapter_close(z, case.g[f'eq.z_scale{s}_rot1'])
    image_close(case.model.decode(z), case.g[f'eq.img_scale{s}_rot1'])
    small = F.interpolate(case.g['in.img'], scale_factor=s, mode='bilinear', align_corners=False, antialias=True)
    adapter_close(case.model.encode_parts(small*2-1).moments, case.g[f'eq.pre_quant_from_img_scale{s}'])

def recipe(name, shape, seed):
    "The golden README's weights for one entry of the state dict."
    n = np.random.default_rng([zlib.crc32(name.encode()), seed]).standard_normal(shape, dtype=np.float32)
    last = name.split('.')[-1]
    if last == 'noise_const': return n
    if last == 'x_avg': return 0.1*n
    if n.ndim == 0: return 0.2*n
    if last in ('bias', 'q_bias', 'v_bias'): return 10*n if 'mapping.mlp' in name else 1+0.1*n if '.affine' in name else 0.1*n
    if last == 'gamma': return 0.3*n if n.ndim == 4 else 1+0.1*n
    if n.ndim == 1: return 1+0.1*n
    if 'mapping.mlp' in name: return 100*n
    if '.affine' in name: return 0.5*n
    if last == 'null_kv': return 0.5*n
    if '.torgb.' in name: return 0.2*n
    return n/np.float32(np.sqrt(np.prod(n.shape[1:])))

@shared
@torch.no_grad()
def test_full_size():
    path = SHARED/'full_f16d32.safetensors'
    g, (kwargs, meta) = load_file(path), read(path)
    with torch.device('meta'): model = VFMVAE(replace(config_of(kwargs), legacy=True))
    fixed = {k: v for k, v in VFMVAE(replace(model.config, legacy=True)).own_state().items() if k.split('.')[-1] in ('blur_weight', 'zero_k_bias')}
    seed = int(meta['seed'])
    weights = {k: fixed[k] if k in fixed else torch.from_numpy(np.asarray(recipe(k, tuple(v.shape), seed), dtype=np.float32))
               for k, v in model.own_state().items() if not k.startswith('stats.')}
    model = load_vfmvae(weights, kwargs).eval()
    check_full_projection(model, g, seed)
    parts = {'post_quant': model.ldm_adapter.post_quant, 'ws0': model.mapping} | {f'z_convs.{i}': b for i, b in model.synthesis.z_convs.items()}
    seen = watch(model, parts | {f'block.{i}.x': b for i, b in enumerate(model.synthesis.blocks)})
    scales = model.decode_scales(g['in.z'])
    image_close(scales[0], g['out.img'])
    for k, image in enumerate(scales[1:]): image_close(image, g[f'out.multiscale.{k}'])
    for i in range(6):
        x = seen[f'block.{i}.x'] = seen[f'block.{i}.x'][0]
        image_close(torch.stack([x.mean(), x.std()]), g[f'tap.block.{i}.x.mean_std'])
    for k, v in seen.items():
        if f'tap.{k}' in g: (adapter_close if k == 'post_quant' else image_close)(v, g[f'tap.{k}'])
    for k, v in model.state_dict().items():
        if k.endswith('noise_strength'): v.zero_()
    image_close(model.decode(g['in.z']), g['out.img_nolegacy'])

def check_full_projection(model, g, seed):
    features = []
    for i in range(3):
        draw = np.random.default_rng([zlib.crc32(f'full.pf{i}'.encode()), seed]).standard_normal((1, 1024, 1024))
        features.append(torch.from_numpy(((1+i)*draw).astype(np.float32).astype(np.float16).astype(np.float32)))
    parts = model.project_parts(features)
    adapter_close(parts.moments, g['out.pre_quant'])
    z = parts.raw.mean + parts.raw.std*g['in.eps']
    adapter_close(z, g['out.z_sample'])
    adapter_close(parts.raw.kl().mean()[None], g['out.kl_loss'])
    adapter_close(vf_formula(model.align_features(z), model.align_target(parts))[None], g['out.vf_loss'])
