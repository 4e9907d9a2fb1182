"""VFMs whose stages have grids of their own: what timm gives for each stage is what readers get, on one grid, and
tokenizers, discriminators and losses take the widths as they are."""
import copy, re
from dataclasses import replace
import pytest, timm, torch
from scope import thorough
import torch.nn.functional as F

from vfmvae.align import cknna, prepare
from vfmvae.core import raises, to_grid, UserError
from vfmvae.discriminators import ProjectedDiscriminator
from vfmvae.features import extract
from vfmvae.losses import perceptual, vfm_taps
from vfmvae.presets import PRESETS
from vfmvae.recipes import train_tokenizer
from vfmvae.tokenizer import load_tokenizer, save_tokenizer
from vfmvae.vae import VFMVAE
from vfmvae.vfm import VFM
from vfmvae.world import World

ANY_SIZE = ('convnext_atto', 'convnextv2_atto', 'tf_efficientnet_lite0', 'efficientnet_b0', 'mobilenetv4_conv_small', 'mobilenetv3_small_050', 'mambaout_femto',
            'regnety_002', 'regnetx_002', 'resnet18', 'fastvit_t8', 'pvt_v2_b0')
TOLD = ('swin_tiny_patch4_window7_224', 'swinv2_tiny_window8_256', 'maxvit_nano_rw_256')
FIXED = ('hiera_tiny_224', 'hiera_small_abswin_256')
SIZES = (64, 64), (96, 160), (48, 80)      # the last divides no stride of 32


def image(h, w, n=2, dtype=torch.float32): return torch.rand(n, 3, h, w, generator=torch.Generator().manual_seed(h*w)).to(dtype)*2 - 1


def opened(name, seed=0):
    "A VFM with random weights, and timm's own model with the same ones, as timm makes it; both in double precision, so that only a mistake is a difference."
    torch.manual_seed(seed)
    plain = timm.create_model(name, pretrained=False, num_classes=0).double()
    for m in plain.modules():       # statistics as after training: with those of the start little is seen of an image in deep stages
        if isinstance(m, torch.nn.BatchNorm2d): m.momentum = None
    with torch.no_grad(): plain.train()(image(*plain.pretrained_cfg['input_size'][1:], n=4, dtype=torch.float64))
    vfm = VFM(name, pretrained=False).double()
    vfm.net.load_state_dict(plain.state_dict())
    return vfm, plain.eval()


def on_grid(m, stride, rows, columns):
    "By hand: cells of 16 px."
    fold = max(1, 16//stride)
    return F.pixel_unshuffle(F.interpolate(m, (rows*fold, columns*fold), mode='bilinear'), fold)


def check(vfm, plain, size):
    x, (rows, columns) = image(*size, dtype=torch.float64), (size[0]//16, size[1]//16)
    mean, std = (torch.tensor(v).double().view(1, 3, 1, 1) for v in (vfm.mean, vfm.std))
    y = ((x+1)/2 - mean)/std
    with torch.no_grad():
        wanted = plain.forward_intermediates(y, intermediates_only=True)
        final = plain.forward_features(y)
        if final.ndim == 3: final = to_grid(final, wanted[-1].shape[2])
        elif final.shape[1] != plain.num_features: final = final.permute(0, 3, 1, 2)
    info = plain.feature_info
    strides = [f['reduction'] for f in getattr(info, 'info', info)]
    assert vfm.layers == (*range(len(wanted)), -1)
    got = vfm.features(x)
    for i, (m, stride) in enumerate(zip(wanted, strides, strict=True)):
        by_hand = on_grid(m, stride, rows, columns)
        scale = by_hand.abs().max().clamp(min=1)
        assert got[i].shape == (2, rows*columns, vfm.width(i)) and (to_grid(got[i], rows)-by_hand).abs().max() <= 1e-5*scale
        assert m.std() > 1e-3, 'nothing is seen'
    by_hand = on_grid(final, strides[-1], rows, columns)
    assert (to_grid(got[-1], rows)-by_hand).abs().max() <= 1e-5*by_hand.abs().max().clamp(min=1) and vfm.dim == got[-1].shape[-1]
    some = vfm.features(x, [-2, 0])
    assert torch.equal(some[0], got[0]) and torch.allclose(some[-2], got[len(wanted)-1], rtol=1e-5)
    own, patches = vfm.with_class(x)
    assert torch.equal(patches, got[-1]) and torch.allclose(own, patches.mean(1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('name', ANY_SIZE)
def test_stages_are_those_of_timm(name):
    vfm, plain = opened(name)
    for size in SIZES: check(vfm, plain, size)


@pytest.mark.parametrize('name', TOLD)
def test_windows_follow_timm(name):
    vfm, plain = opened(name)
    before = {k: v.clone() for k, v in vfm.net.state_dict().items()}
    check(vfm, plain, vfm.anatomy.size)
    for size in SIZES if name.startswith('swin') else SIZES[:2]:
        other = copy.deepcopy(plain)
        other.set_input_size(img_size=size)
        check(vfm, other, size)
    assert all(torch.equal(before[k], v) for k, v in vfm.net.state_dict().items())
    assert not any(p.requires_grad for p in vfm._at(SIZES[0]).parameters())


@pytest.mark.parametrize('name', FIXED)
def test_nets_of_one_size_are_built_again(name):
    vfm, plain = opened(name)
    check(vfm, plain, vfm.anatomy.size)
    for size in ((64, 64), (96, 160)):
        other = timm.create_model(name, num_classes=0, img_size=size).eval().double()
        state = plain.state_dict()
        if state['pos_embed'].ndim == 3:
            side = vfm.anatomy.size[0]//4
            table = state['pos_embed'].transpose(1, 2).unflatten(2, (side, side))
            state['pos_embed'] = F.interpolate(table, (size[0]//4, size[1]//4), mode='bicubic', antialias=True).flatten(2).transpose(1, 2)
        other.load_state_dict(state)
        check(vfm, other, size)
    shared = vfm._at((64, 64)).get_parameter('blocks.0.attn.qkv.weight')
    assert shared.data_ptr() == vfm.net.get_parameter('blocks.0.attn.qkv.weight').data_ptr()
    small = VFM(name, pretrained=False, img_size=64)
    assert small.anatomy.size == (64, 64)
    with raises(f'{name} cannot see images of 48x48 px'): vfm.features(image(48, 48))
    with raises('it was made elsewhere'): VFM('mine', net=plain).features(image(64, 64))


@pytest.mark.parametrize('name', ('convnext_atto', 'tf_efficientnet_lite0', 'regnety_002', 'swin_tiny_patch4_window7_224'))
def test_features_only_says_the_same(name):
    "The other way in which timm gives stages."
    vfm, plain = opened(name)
    net, state = timm.create_model(name, features_only=True, pretrained=False).eval().double(), plain.state_dict()
    named = {k: re.sub(r'^(stages|layers|stem)_', r'\1.', k) for k in net.state_dict()}
    named = {k: v if v in state else k for k, v in named.items()}
    net.load_state_dict({k: state[v] for k, v in named.items()})
    size = vfm.anatomy.size
    x = image(*size, dtype=torch.float64)
    with torch.no_grad(): maps = net(vfm.normalize(x).contiguous())
    for i, (m, stride) in enumerate(zip(maps, vfm.anatomy.strides[:-1], strict=True)):
        if m.shape[1] != net.feature_info.channels()[i]: m = m.permute(0, 3, 1, 2)
        assert torch.allclose(to_grid(vfm.features(x, [i])[i], size[0]//16).double(), on_grid(m, stride, size[0]//16, size[1]//16), atol=1e-5)


def first_stage(name='tiny'):
    p = PRESETS[name]
    return replace(p, stages=(replace(p.stages[0], num_images=8),), batch_size=4)


@pytest.mark.parametrize('name', thorough((*ANY_SIZE, *TOLD, *FIXED), [*ANY_SIZE[:2], TOLD[0], FIXED[0]]))
def test_a_tokenizer_of_each_trains(name, tmp_path):
    torch.manual_seed(0)
    vfm = VFM(name, pretrained=False)
    before = {k: v.clone() for k, v in vfm.state_dict().items()}
    tok, rows = train_tokenizer(first_stage(), World(16, seed=1), vfm=vfm, log_every=1, show=lambda h: None)
    assert len(rows) == 2 and all(torch.isfinite(torch.tensor(r['loss'])) for r in rows)
    c = tok.config
    assert c.in_dims == tuple(map(vfm.width, c.layers)) and len({*c.in_dims}) > 1 and c.layers[-1] == -1
    assert tok.stride == 8 and tok.encode(image(64, 64)).mean.shape == (2, 16, 8, 8) and tok.encode(image(32, 64)).mean.shape == (2, 16, 4, 8)
    assert all(torch.equal(before[k], v) for k, v in vfm.state_dict().items()), 'the VFM moved'
    path = save_tokenizer(tmp_path/'t.safetensors', tok)
    again = load_tokenizer(path, vfm=vfm)
    assert torch.equal(again.encode(image(64, 64)).mean, tok.encode(image(64, 64)).mean)
    with raises('the tokenizer was made for'): load_tokenizer(path, vfm=VFM('test_vit', pretrained=False))


@pytest.mark.parametrize('preset', ('conv-tiny-f8d16', 'rae-tiny-f8d128'))
def test_the_other_families_take_a_pyramid(preset):
    torch.manual_seed(0)
    vfm = VFM('tf_efficientnet_lite0', pretrained=False)
    p = first_stage(preset)
    if preset.startswith('rae'): p = replace(p, config=replace(p.config, img_size=64))
    tok, rows = train_tokenizer(p, World(16, seed=1), vfm=vfm, log_every=1, show=lambda h: None)
    assert len(rows) == 2 and tok.decode(tok.encode(image(64, 64)).mean).shape == (2, 3, 64, 64)


def test_a_padded_width_is_zeros_and_the_published_shape_stays():
    vfm = VFM('efficientnet-lite0')
    c = PRESETS['tiny'].config.for_vfm(vfm)
    assert c.layers == (1, 3, -1) and c.in_dims == (24*16, 112, 1280) and c.scale == 2
    tok = VFMVAE(c, vfm)
    assert tok.ldm_adapter.in_dims == [384, 128, 1280]                 # 112 is no multiple of 64
    h = [torch.rand(1, 64, d) for d in c.in_dims]
    wide = [h[0], F.pad(h[1], (0, 16)), h[2]]
    parts = [q(v) for q, v in zip(tok.ldm_adapter.patch_quants, wide, strict=True)]
    down = tok.ldm_adapter.final_quant(torch.cat(parts, -1))           # one token a latent pixel
    assert torch.allclose(tok.ldm_adapter.down(h, 8), to_grid(down, 8), atol=1e-6)
    published = PRESETS['f16d32'].config
    assert published.in_dims == (1024,)*3
    conv = VFMVAE(replace(c, projection='conv'), vfm)
    assert conv.ldm_adapter.in_dims == [384, 112, 1280] and conv.encode(image(64, 64)).mean.shape == (2, 16, 8, 8)
    own = replace(c, layers=(0, 2, -1), in_dims=(vfm.width(0), vfm.width(2), vfm.width(-1)))
    assert own.for_vfm(vfm).layers == (0, 2, -1) and VFMVAE(own, vfm).encode(image(64, 64)).mean.shape == (2, 16, 8, 8)


def test_judges_losses_and_alignment_take_stages():
    vfm, x = VFM('efficientnet-lite0'), World(24, seed=3).batch(range(24))['image']
    d = ProjectedDiscriminator(vfm, size=64)
    assert d.layers == [1, 2, 3, 4, 0]
    x4 = x[:4].clone().requires_grad_()
    d.train()(x4).sum().backward()
    assert x4.grad.abs().max() > 0
    y = x[:4].clone().requires_grad_()
    perceptual(y, x[4:8], vfm_taps(vfm)).backward()
    assert y.grad.abs().max() > 0
    h = extract(vfm, x, quiet=True)
    assert {i: v.shape[1] for i, v in h.items()} == {i: vfm.width(i) for i in vfm.layers}
    assert .999 < cknna(prepare(h[-1]), prepare(h[-1])) and cknna(prepare(h[0]), prepare(h[-1])) < .9


def test_what_is_no_vfm_says_so():
    for name in ('xcit_nano_12_p16_224', 'sequencer2d_s', 'mixer_s32_224', 'crossvit_tiny_240'):
        with raises('neither one grid of tokens nor stages'): VFM(name, pretrained=False)
    with raises('no layer 5'): VFM('convnext_atto', pretrained=False).features(image(64, 64), [5])
    with raises('patches of 16 px'): VFM('convnext_atto', pretrained=False).features(image(64, 72))
    with pytest.raises(UserError): VFM('convnext_atto', pretrained=False).width(7)


def test_a_file_of_a_pyramid_opens_strictly(tmp_path):
    from vfmvae.files import save_weights
    for name in ('convnext_atto', 'tf_efficientnet_lite0', 'regnety_002'):
        whole = timm.create_model(name, pretrained=False)        # with its classifier, as published
        path = save_weights(tmp_path/f'{name}.safetensors', whole.state_dict(), {})
        vfm = VFM(name, path)
        assert torch.equal(next(iter(vfm.net.state_dict().values())), next(iter(whole.state_dict().values())))
        state = whole.state_dict()
        state.pop(next(k for k in state if k.startswith(('stages', 'blocks', 's1'))))
        with raises('1 missing'): VFM(name, save_weights(tmp_path/f'{name}-short.safetensors', state, {}))
