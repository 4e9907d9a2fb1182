"VFM against plain timm, family by family, and against the golden SigLIP features."
import json, pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
import timm
from safetensors.torch import save_file
from torchvision.transforms import Normalize

from vfmvae.core import UserError
from vfmvae.files import save_weights
from vfmvae.published_baselines import _hf_shapes, vfm_from_hf_siglip
from vfmvae.vfm import _at_size, _FAMILIES, _family, _interpolation, ALIASES, BUNDLED, tiny_vit, VFM, vfms

# family -> (name, arguments): class token or not, registers, rotary, relative bias, pre-norm, distillation token, patch 14, hybrid stem
SMALL = {
    'tiny': ('tiny', {}),
    'vit': ('test_vit', {}),
    'vit-registers': ('test_vit3', {}),
    'deit-distilled': ('deit_tiny_distilled_patch16_224', dict(depth=2)),
    'deit3': ('deit3_small_patch16_224', dict(depth=2)),
    'dinov2': ('vit_small_patch14_dinov2', dict(depth=2, img_size=112)),
    'dinov2-registers': ('vit_small_patch14_reg4_dinov2', dict(depth=2, img_size=112)),
    'dinov3': ('vit_small_patch16_dinov3_qkvb', dict(depth=2)),
    'eva02': ('eva02_tiny_patch14_224', dict(depth=2)),
    'pe': ('vit_pe_core_tiny_patch16_384', dict(depth=2, img_size=128)),
    'beit': ('beit_base_patch16_224', dict(depth=2, img_size=96)),
    'mae': ('vit_base_patch16_224.mae', dict(depth=2)),
    'clip': ('vit_xsmall_patch16_clip_224', dict(depth=2)),
    'siglip': ('vit_base_patch16_siglip_224', dict(depth=2)),
    'relative': ('vit_relpos_small_patch16_224', dict(depth=2)),
    'hybrid': ('vit_tiny_r_s16_p8_224', dict(depth=2)),
}

def make(family: str) -> VFM:
    torch.manual_seed(0)
    name, kwargs = SMALL[family]
    vfm = VFM(name, pretrained=False, **kwargs)
    for p in vfm.net.parameters():  # zero-initialised class tokens, biases and layer scales would hide mistakes
        if p.abs().max() < 1e-3: nn.init.normal_(p, std=.1)
    return vfm

def image(*size: int) -> torch.Tensor: return torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(1))*2 - 1

def hooked(vfm: VFM, x: torch.Tensor) -> list[torch.Tensor]:
    "Every layer by hooks on a plain timm forward pass: embedding, blocks, final norm."
    net, seen, hooks = vfm.net, [], []
    first = net.norm_pre if hasattr(net, 'norm_pre') else net.blocks[0]
    hooks.append(first.register_forward_pre_hook(lambda m, args: seen.append(args[0])))
    hooks += [b.register_forward_hook(lambda m, args, out: seen.append(out)) for b in net.blocks]
    with torch.no_grad(): last = net.forward_features(((x+1)/2 - torch.tensor(vfm.mean).view(3, 1, 1))/torch.tensor(vfm.std).view(3, 1, 1))
    for h in hooks: h.remove()
    return [h[:, net.num_prefix_tokens:] for h in (*seen, last)]

@pytest.mark.parametrize('family', SMALL)
def test_layers_are_those_of_plain_timm(family):
    vfm = make(family)
    x = image(*vfm.net.patch_embed.img_size)
    want, depth = hooked(vfm, x), vfm.depth
    assert len(want) == depth+2 and vfm.layers == (*range(depth+1), -1)
    got = vfm.features(x, [*vfm.layers, -2, -3])
    for i in range(depth+1): assert torch.allclose(got[i], want[i], atol=1e-5)
    assert torch.allclose(got[-1], want[-1], atol=1e-5)
    assert torch.equal(got[-2], got[depth]) and torch.equal(got[-3], got[depth-1])
    n = x.shape[2]//vfm.patch * (x.shape[3]//vfm.patch)
    assert all(h.shape == (2, n, vfm.dim) and h.dtype == torch.float32 for h in got.values())
    assert torch.equal(vfm.features(x, [1])[1], got[1])  # stopping early changes nothing

@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('family', SMALL)
def test_other_sizes_errors_and_frozenness(family):
    vfm = make(family)
    p = vfm.patch
    x = image(4*p, 6*p)
    if not hasattr(vfm.net, 'set_input_size') and not getattr(vfm.net, 'dynamic_img_size', False):      # some families in timm's first versions
        with pytest.raises(UserError, match='upgrade timm'): vfm.features(x)
        return
    h = vfm.features(x, [0, -1])
    assert h[0].shape == h[-1].shape == (2, 24, vfm.dim)
    again = vfm.features(image(*vfm.net.patch_embed.img_size), [-1])[-1]
    assert torch.equal(vfm.features(x, [-1])[-1], h[-1]) and again.shape[1] == vfm.net.patch_embed.num_patches  # one size leaves no trace on another
    for bad in (image(4*p, 6*p+1), image(4*p, 6*p)[0], image(4*p, 6*p)[:, :1]):
        with pytest.raises(UserError) as e: vfm.features(bad)
        assert '\n' not in str(e.value)
    for layer in (vfm.depth+1, -vfm.depth-3, 'last', True):
        with pytest.raises(UserError, match='no layer'): vfm.features(x, [layer])
    before = {k: v.clone() for k, v in vfm.state_dict().items()}
    vfm.train()
    assert not any(m.training for m in vfm.modules()) and not any(q.requires_grad for q in vfm.parameters())
    vfm.features(x)
    assert all(torch.equal(v, before[k]) for k, v in vfm.state_dict().items())

@pytest.mark.parametrize('family', ['tiny', 'vit-registers', 'dinov3', 'eva02', 'beit', 'clip'])
def test_gradient_to_the_image_is_plain_autograd(family):
    vfm = make(family)
    a, b = (image(*vfm.net.patch_embed.img_size).requires_grad_() for _ in range(2))
    vfm.features(a, [-1], grad=True)[-1].square().mean().backward()
    x = ((b+1)/2 - torch.tensor(vfm.mean).view(3, 1, 1))/torch.tensor(vfm.std).view(3, 1, 1)
    vfm.net.forward_features(x)[:, vfm.net.num_prefix_tokens:].square().mean().backward()
    assert a.grad.abs().max() > 0 and torch.allclose(a.grad, b.grad, rtol=1e-4, atol=1e-4*b.grad.abs().max())
    assert all(p.grad is None for p in vfm.parameters()) and not vfm.features(a, [-1])[-1].requires_grad

def test_autocast_is_for_accelerators_and_never_in_the_gradient(monkeypatch):
    vfm, x = make('tiny'), image(64, 64)
    full = vfm(x)
    monkeypatch.setattr('vfmvae.vfm._AMP', ('cpu',))  # the same switch, on the device at hand
    rough, exact = vfm(x), vfm.features(x, [-1], grad=True)[-1]
    assert rough.dtype == torch.float32 and torch.equal(exact, full) and not torch.equal(rough, full) and torch.allclose(rough, full, atol=.1)

def test_resampled_copies_follow_weights_and_dtype():
    vfm = VFM('tiny', net=tiny_vit(), pos_antialias=False)
    x = image(32, 48)
    before = vfm(x)
    vfm.load_state_dict({k: v*2 if k.endswith('pos_embed') else v for k, v in vfm.state_dict().items()})
    table = F.interpolate(vfm.net.pos_embed.unflatten(1, (8, 8)).permute(0, 3, 1, 2), size=(4, 6), mode='bicubic').flatten(2).mT
    want = vfm.net.patch_embed(vfm.normalize(x)).flatten(1, 2) + table
    assert torch.allclose(vfm.features(x, [0])[0], want, atol=1e-5) and not torch.allclose(vfm(x), before)
    assert vfm.double()(x.double()).dtype == torch.float32
    assert torch.allclose(pickle.loads(pickle.dumps(vfm))(x), vfm(x))

def test_strict_loading(tmp_path):
    net = tiny_vit()
    path = save_weights(tmp_path/'a.safetensors', net.state_dict(), {'licence': 'Apache-2.0'})
    assert VFM('tiny', path).spec['licence'] == 'Apache-2.0' and VFM('tiny', path).spec['source'] == str(path)
    assert torch.equal(VFM('tiny', path)(image(64, 64)), VFM('tiny', net=net)(image(64, 64)))
    torch.save({'model': net.state_dict() | {'head.weight': torch.zeros(2, 128)}}, tmp_path/'b.pth')
    assert torch.equal(VFM('tiny', tmp_path/'b.pth')(image(64, 64)), VFM('tiny', net=net)(image(64, 64)))
    sd = net.state_dict()
    lost = sd.pop('norm.weight')
    save_weights(tmp_path/'c.safetensors', sd | {'extra': lost.clone(), 'norm.bias': torch.zeros(7)}, {})
    with pytest.raises(UserError,
                       match=r'1 missing: norm.weight; 1 extra: extra; 1 misshaped: norm.bias \(7,\) for \(128,\)'): VFM('tiny', tmp_path/'c.safetensors')
    (tmp_path/'d.pth').write_bytes(b'no')
    for f in ('d.pth', 'none.pth', 'none.safetensors'):
        with pytest.raises(UserError): VFM('tiny', tmp_path/f)

def test_names(monkeypatch):
    import huggingface_hub.constants as hub
    monkeypatch.setattr(hub, 'HF_HUB_OFFLINE', True)
    monkeypatch.setattr(hub, 'HF_HUB_CACHE', '/nonexistent')
    def refused(*a, **k):
        with pytest.raises(UserError) as e: VFM(*a, **k)
        assert '\n' not in str(e.value)
        return str(e.value)
    assert 'dinov2-b' in refused('dinov2b', False) and 'tiny' in refused('tinny', False)
    assert 'lvd142m' in refused('vit_small_patch14_dinov2.lvd', False) and 'plain vision transformer' in refused('mixer_s32_224', False)
    assert 'check the arguments' in refused('test_vit', False, depht=2)
    assert all(w in refused('vit_tiny_patch16_224') for w in ("pretrained='path'", 'pretrained=False', "VFM('tiny')"))
    assert hub.HF_HUB_OFFLINE is True

def test_bundled_ones_are_small_have_cards_and_take_what_they_should(monkeypatch):
    import timm
    from vfmvae.files import data_dir
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    for name in BUNDLED:
        file, vfm = data_dir()/f'weights/vfm-{name}.safetensors', VFM(name)
        assert file.stat().st_size < 10e6 and vfm.spec['licence'] == 'Apache-2.0' and vfm.spec['source'] and vfm.name == name
        assert vfm.mean == vfm.std == (.5,)*3 and all(p.dtype == torch.float32 for p in vfm.net.parameters())
        h = vfm.features(image(96, 64))
        assert all(v.shape[1] == 96*64//vfm.patch**2 and v.isfinite().all() and v.std() > 0 for v in h.values())
    assert sum(p.numel() for p in VFM('photo').net.parameters()) <= 3e6
    lite = VFM('efficientnet-lite0')
    assert lite.layers == (0, 1, 2, 3, 4, -1) and lite.dim == 1280 and [lite.width(i) for i in (1, 2, 4)] == [24*16, 40*4, 320]
    assert timm.is_model('tf_efficientnet_lite0') and not timm.is_model('efficientnet-lite0')       # our name is nobody else's
    other = VFM('tf_efficientnet_lite0', pretrained=data_dir()/'weights/vfm-efficientnet-lite0.safetensors')
    assert torch.equal(other(image(64, 64)), lite(image(64, 64)))

def test_short_names_exist_in_timm():
    import timm
    assert set(ALIASES.values()) <= set(timm.list_pretrained()) and set(vfms) == {*BUNDLED, *ALIASES}

def tower(depth=2, dim=64, hidden=100, patch=8, n=16, prefix='vision_model.'):
    g = torch.Generator().manual_seed(0)
    return {prefix+k: torch.randn(s, generator=g)/8 for k, s in _hf_shapes(depth, dim, hidden, patch, n).items()}

@pytest.mark.parametrize('prefix', ['', 'vision_model.', 'vfm_encoder.encoder.vision_model.vision_model.'])
def test_siglip_prefixes_and_optional_head(prefix):
    want = vfm_from_hf_siglip(tower(), num_heads=4)(image(32, 32))
    sd = tower(prefix=prefix)
    assert torch.equal(vfm_from_hf_siglip(sd, num_heads=4)(image(32, 32)), want)
    assert torch.equal(vfm_from_hf_siglip({k: v for k, v in sd.items() if f'{prefix}head.' not in k}, 4)(image(32, 32)), want)
    vfm = vfm_from_hf_siglip(sd)
    assert (vfm.spec['num_heads'], vfm.patch, vfm.depth, vfm.mean, vfm.std, vfm.interpolation) == (1, 8, 2, (.5,)*3, (.5,)*3, 'bilinear')

def test_siglip_refuses_what_it_does_not_know():
    sd, e = tower(), 'vision_model.encoder.layers.1.'
    for bad, say in [({k: v for k, v in sd.items() if k != e+'mlp.fc1.bias'}, 'missing: encoder.layers.1.mlp.fc1.bias'),
                     (sd | {'logit_scale': torch.zeros(1)}, 'extra: logit_scale'), (sd | {'vision_model.head.extra': torch.zeros(1)}, 'extra: head.extra'),
                     (sd | {e+'layer_norm1.bias': torch.zeros(3)}, r'misshaped: encoder.layers.1.layer_norm1.bias \(3,\) for \(64,\)'),
                     ({}, 'not a SigLIP'), (tower(n=15), 'square')]:
        with pytest.raises(UserError, match=say): vfm_from_hf_siglip(bad, num_heads=4)
    with pytest.raises(UserError, match='give num_heads'): vfm_from_hf_siglip(tower(dim=32))


@torch.no_grad()
@pytest.mark.parametrize('dim, heads, theirs', [(768, 12, 'vit_base_patch16_siglip_256'), (1024, 16, 'vit_large_patch16_siglip_256'),
                                                (1152, 16, 'vit_so400m_patch16_siglip_256'), (1536, 16, 'vit_giantopt_patch16_siglip_256')])
def test_every_published_width_of_siglip_has_its_heads(dim, heads, theirs):
    transformers = pytest.importorskip('transformers')
    with torch.device('meta'): timms = timm.create_model(theirs)
    assert (timms.embed_dim, timms.blocks[0].attn.num_heads) == (dim, heads)
    c = transformers.SiglipVisionConfig(hidden_size=dim, num_attention_heads=heads, num_hidden_layers=1, intermediate_size=64, image_size=32, patch_size=16)
    net = transformers.SiglipVisionModel(c).eval()
    vfm, x = vfm_from_hf_siglip(net.state_dict()), image(32, 32)
    assert vfm.heads == vfm.spec['num_heads'] == heads
    torch.testing.assert_close(vfm(x), net(x).last_hidden_state, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_files_as_others_save_them(tmp_path):
    "Meta's file of DINOv2 has a mask token beside timm's names, training in parallel or compiled a prefix."
    name, kw, x = 'vit_small_patch14_dinov2', dict(depth=1, embed_dim=32, num_heads=2, img_size=28), image(28, 28)
    net = timm.create_model(name, num_classes=0, **kw).eval()
    want, sd = VFM(name, net=net)(x), net.state_dict()
    for given in (sd | {'mask_token': torch.zeros(1, 32)}, {f'module.{k}': v for k, v in sd.items()}, {f'_orig_mod.module.{k}': v for k, v in sd.items()}):
        torch.save(given, tmp_path/'a.pth')
        save_file({k: v.contiguous() for k, v in given.items()}, tmp_path/'a.safetensors')
        for file in ('a.pth', 'a.safetensors'): assert torch.equal(VFM(name, tmp_path/file, **kw)(x), want)
    torch.save(sd | {'module.norm.weight': sd['norm.weight']}, tmp_path/'b.pth')
    with pytest.raises(UserError, match='share a name'): VFM(name, tmp_path/'b.pth', **kw)
    torch.save(sd | {'stranger': torch.zeros(1)}, tmp_path/'c.pth')
    with pytest.raises(UserError, match='1 extra: stranger'): VFM(name, tmp_path/'c.pth', **kw)


def test_weights_of_timms_hub_bring_their_preprocessing(tmp_path):
    from timm.models._hub import save_config_for_hf
    name, kw = 'vit_small_patch16_224', dict(depth=1, embed_dim=32, num_heads=2, img_size=32)
    net = timm.create_model(name, **kw).eval()
    save_weights(tmp_path/'alone'/'model.safetensors', net.state_dict(), {})
    (tmp_path/'alone'/'config.json').write_text('{"model_type": "other"}')
    own = VFM(name, tmp_path/'alone'/'model.safetensors', **kw)
    net.pretrained_cfg |= dict(mean=(.485, .456, .406), std=(.229, .224, .225), interpolation='bilinear')
    save_weights(tmp_path/'hub'/'model.safetensors', net.state_dict(), {})
    save_config_for_hf(net, tmp_path/'hub'/'config.json')
    vfm, x = VFM(name, tmp_path/'hub'/'model.safetensors', **kw), image(32, 32)
    assert (vfm.mean, vfm.std, vfm.interpolation) == ((.485, .456, .406), (.229, .224, .225), 'bilinear')
    assert vfm.mean != own.mean == VFM(name, False, **kw).mean                       # no other net of that name has changed
    want = net.forward_features(Normalize(vfm.mean, vfm.std)(x/2+.5))[:, 1:]
    torch.testing.assert_close(vfm(x), want.detach(), atol=1e-5, rtol=1e-5)
    told = json.loads((tmp_path/'hub'/'config.json').read_text())
    (tmp_path/'hub'/'config.json').write_text(json.dumps(told | dict(architecture='vit_base_patch16_224')))      # a folder may hold several nets
    assert VFM(name, tmp_path/'hub'/'model.safetensors', **kw).mean == own.mean
    for k, bad in (('mean', [1, 2]), ('mean', 'x'), ('std', [0, 1, 1]), ('std', None), ('mean', ['a', 1, 1]), ('interpolation', [])):
        (tmp_path/'hub'/'config.json').write_text(json.dumps(told | dict(pretrained_cfg=told['pretrained_cfg'] | {k: bad})))
        with pytest.raises(UserError, match=f'config.json: {k} = '): VFM(name, tmp_path/'hub'/'model.safetensors', **kw)


def test_patches_that_are_not_square_are_refused():
    with pytest.raises(UserError, match='patches of 8 x 16 px'): VFM('vit_small_patch16_224', False, depth=1, embed_dim=32, num_heads=2, patch_size=(8, 16))


@pytest.mark.parametrize('name, given', [('vit_tiny_patch16_224', dict(in_chans=1)), ('resnet18', dict(in_chans=4)), ('resnet18', dict(num_classes=10)),
                                         ('tiny', dict(depth=2)), ('vit_tiny_patch16_224', dict(depth=2**20))])
def test_what_no_vfm_of_that_name_takes_is_refused(name, given):
    "An image of one channel failed at the first picture, in torch's words."
    with pytest.raises(UserError, match=f'{[*given][0]}=.*: {name} takes no such argument'): VFM(name, pretrained=False, **given)
    assert VFM('vit_tiny_patch16_224', pretrained=False, in_chans=3, depth=1).patch == 16


def test_siglip_shrinks_its_table_without_antialiasing():
    vfm = vfm_from_hf_siglip(tower(n=64), num_heads=4)
    got = _at_size(vfm.net, (24, 16), antialias=False).pos_embed
    want = F.interpolate(vfm.net.pos_embed.mT.unflatten(2, (8, 8)), size=(3, 2), mode='bicubic', align_corners=False).flatten(2).mT
    assert torch.equal(got, want)

@pytest.mark.parametrize('stem', ['tiny_a_legacy', 'tiny_a_nolegacy', 'tiny_b_eq', 'tiny_d_discrete'])
def test_golden_siglip(stem, shared):
    from safetensors import safe_open
    from safetensors.torch import load_file
    folder = shared/'golden'/'vfmvae'
    tower, main = (load_file(folder/f'{stem}{end}') for end in ('.vfm.safetensors', '.safetensors'))
    with safe_open(folder/f'{stem}.safetensors', 'pt') as f: meta = {k: json.loads(f.metadata()[k]) for k in ('config', 'vfm')}
    vfm = vfm_from_hf_siglip({k: v for k, v in tower.items() if k.startswith('vision_model.')}, meta['vfm']['num_attention_heads'])
    assert (vfm.dim, vfm.depth, vfm.patch) == tuple(meta['vfm'][k] for k in ('hidden_size', 'num_hidden_layers', 'patch_size'))
    for x, want in ((tower['in.img'], [tower[f'out.feat.{i}'] for i in range(3)]), (main['in.img'], [main[f'vfm.feat.{i}'] for i in range(3)])):
        got = vfm.features(F.interpolate(x, scale_factor=2., mode='bilinear')*2 - 1, meta['config']['patch_from_layers'])
        for g, w in zip(got.values(), want, strict=True): assert (g-w).abs().max() < 1e-5


def test_threads_that_share_a_vfm_do_not_mix_their_features():
    from concurrent.futures import ThreadPoolExecutor
    vfm = VFM('tiny', pretrained=False)
    images = [torch.rand(1+i % 5, 3, 64, 64)*2-1 for i in range(40)]
    alone = [vfm.features(x, [0, 2, -1]) for x in images]
    with ThreadPoolExecutor(4) as pool: together = list(pool.map(lambda x: vfm.features(x, [0, 2, -1]), images))
    for a, b in zip(alone, together, strict=True):
        for k in a: torch.testing.assert_close(a[k], b[k], atol=1e-5, rtol=1e-4)


PUBLISHED = [('tiny', '', 'bilinear', True), ('vit_base_patch16_224.mae', 'mae', 'bilinear', False),
             ('eva02_large_patch14_224.mim_m38m', 'eva', 'bicubic', False),
             ('vit_small_patch14_dinov2.lvd142m', 'dino', 'bicubic', True), ('vit_small_patch16_224.dino', 'dino', 'bicubic', True),
             ('vit_base_patch16_siglip_512.v2_webli', 'siglip', 'bilinear', True)]

@pytest.mark.parametrize('called', ['as it is', 'maestro', 'eva', 'my-dino.siglip', 'evaluate'])
@pytest.mark.parametrize('name,family,mode,antialias', PUBLISHED)
def test_resizing_follows_what_a_vfm_is_and_not_what_it_is_called(name, family, mode, antialias, called):
    net, x = tiny_vit(), torch.rand(1, 3, 64, 64)
    arch, _, tag = name.partition('.')
    if family: net.pretrained_cfg = dict(net.pretrained_cfg, architecture=arch, tag=tag, interpolation='bicubic')
    vfm = VFM(name if called == 'as it is' else called, net=net)
    assert (vfm.family, vfm.interpolation) == (family, mode) and vfm.spec['architecture'] == (name if family else 'vfm-tiny')
    wanted = F.interpolate(x, (48, 48), mode='bilinear' if not antialias else mode, antialias=antialias)
    assert torch.equal(vfm.shrink(x, .75), wanted)

def test_the_published_word_is_found_in_every_name_of_timm():
    "What the published code finds by a part of the name, in all architectures that a VFM can be; the words of a name tell the same."
    import timm
    words = {'siglip': 'bilinear', 'mae': 'bilinear', 'dino': 'bicubic', 'eva': 'bicubic', 'qwen': 'bicubic'}
    names = [n for m in _FAMILIES for a in timm.list_models(module=m) for n in (a, *timm.list_pretrained(f'{a}.*'))]
    assert len(names) > 200
    for n in (*names, *ALIASES.values()):
        said = next((w for w in words if w in n), '')
        assert (_family(n), _interpolation(n, {'interpolation': 'bilinear'})) == (said, words.get(said, 'bilinear')), n

GRIDS = [((14, 14), (7, 28)), ((7, 28), (14, 14)), ((14, 14), (28, 7)), ((14, 14), (14, 14)), ((14, 14), (7, 7)), ((6, 8), (8, 6)), ((6, 8), (9, 5))]

@pytest.mark.parametrize('antialias', [True, False])
@pytest.mark.parametrize('dynamic', [True, False])
@pytest.mark.parametrize('cls', ['none', 'in the table', 'outside'])
@pytest.mark.parametrize('old,new', GRIDS)
def test_position_tables_of_any_grid_by_hand(old, new, cls, dynamic, antialias):
    "With every version of timm that settings.ini allows: some tell two grids apart by their number of tokens only."
    from timm.models import VisionTransformer
    torch.manual_seed(0)
    net = VisionTransformer(img_size=[8*n for n in old], patch_size=8, embed_dim=16, depth=1, num_heads=2, num_classes=0, dynamic_img_size=dynamic,
                            class_token=cls != 'none', no_embed_class=cls == 'outside', global_pool='avg')
    nn.init.normal_(net.pos_embed)
    vfm, x, own = VFM('mine', net=net, pos_antialias=antialias), image(*(8*n for n in new)), int(cls == 'in the table')
    table = net.pos_embed[:, own:].detach().reshape(1, *old, 16).permute(0, 3, 1, 2)
    if new != old: table = F.interpolate(table, new, mode='bicubic', antialias=antialias)
    want = net.patch_embed.proj(vfm.normalize(x)).flatten(2).mT + table.flatten(2).mT
    for _ in range(2):                                                         # made, then kept
        got = vfm.features(x, [0, -1])
        torch.testing.assert_close(got[0], want, atol=1e-5, rtol=0)
        torch.testing.assert_close(vfm.with_class(x)[1], got[-1], atol=1e-5, rtol=1e-5)
