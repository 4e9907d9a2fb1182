"""The decoder without gradients (another order of the same sums) against a plain form of the same mathematics, and its caches: none."""
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from reference import plain_decode_scales
from torch import nn

import vfmvae.layers as layers
from vfmvae.core import UserError
from vfmvae.layers import ConvNeXt, dwsep, GridAttention, Pointwise, ToRGB, Upsample, use_cpu_inference_kernel
from vfmvae.vae import VFMVAE, VFMVAEConfig

TINY = VFMVAEConfig(vfm='tiny', patch=8, scale=1.0, layers=(0, 2, -1), in_dims=(32,)*3, out_dims=(32,)*3, img_size=64, stride=8, channels=16, widen=4,
                    blocks=5, channel_base=4096, channel_max=64, res_blocks=1, fusion=(64, 32, 16, 16), attention=(1, 1), w_dim=64)
CASES = {
    'as it is': {}, 'legacy': dict(legacy=True), 'wide': dict(channel_base=16384, channel_max=128, fusion=(64, 32, 32, 32), legacy=True),
    'discrete': dict(mode='discrete', vocab=256, codebooks=4), 'conv, silu': dict(projection='conv', act='silu'),
    'gelu, odd fusion': dict(act='gelu', fusion=(32, 0, 64)), 'no fusion': dict(fusion=(64,)), 'one scale': dict(progressive=False, legacy=True),
    'one scale, no fusion': dict(progressive=False, fusion=(64,)), 'no attention': dict(attention=(), res_blocks=0), 'four blocks': dict(blocks=4, pooled=2),
}

def build(seed=0, **changes):
    "A model none of whose parts is silent, in eval mode."
    torch.manual_seed(seed)
    model = VFMVAE(replace(TINY, **changes)).eval()
    with torch.no_grad():
        for k, p in model.named_parameters():
            if k.endswith(('.gamma', '.bias', 'noise_strength', 'to_out.weight', 'ff.3.weight', 'null_kv')): p.add_(0.2*torch.randn(p.shape))
        for b in model.synthesis.blocks: nn.init.normal_(b.conv0.pwconv1.weight, std=0.3)
    return model

def close(a, b): torch.testing.assert_close(a, b, atol=2e-4, rtol=0)

@pytest.mark.parametrize('name', CASES)
@pytest.mark.parametrize('shape', [(1, 8, 8), (3, 8, 8), (1, 4, 12), (3, 12, 4)], ids=str)
def test_with_and_without_gradients_and_plainly(name, shape):
    model, z = build(**CASES[name]), torch.randn(shape[0], 16, *shape[1:])
    slow = model.decode_scales(z)
    assert slow[0].requires_grad and slow[0].shape == (shape[0], 3, 8*shape[1], 8*shape[2]) and slow[0].std() > 1e-2
    with torch.no_grad(): plain, fast = plain_decode_scales(model, z), model.decode_scales(z)
    with torch.inference_mode(): inference = model.decode_scales(z)
    assert len(slow) == len(plain) == len(fast) == (model.config.blocks if model.config.progressive else 1)
    for a, b, c, d in zip(slow, plain, fast, inference, strict=True):
        close(a, b)
        close(c, b)
        assert torch.equal(c, d) and c.is_contiguous()

@pytest.mark.parametrize('name', ['legacy', 'wide', 'one scale'])
def test_gradients_are_those_of_the_plain_form(name):
    model, z, grads = build(**CASES[name]), torch.randn(2, 16, 8, 8, requires_grad=True), []
    for form in (VFMVAE.decode_scales, plain_decode_scales):
        out = sum((i*i.detach().cos()).mean() for i in form(model, z))
        params = {'z': z} | dict(model.synthesis.named_parameters())
        grads.append(dict(zip(params, torch.autograd.grad(out, [*params.values()]), strict=True)))
    for k, a in grads[0].items():
        b = grads[1][k]
        assert b.abs().max() > 0 and (a-b).norm() <= 1e-3*b.norm() + 1e-6, k

def test_the_fast_form_is_taken(monkeypatch):
    model, z, calls = build(), torch.randn(2, 16, 8, 8), []
    monkeypatch.setattr(layers, 'residual_mlp', lambda *a, real=layers.residual_mlp: (calls.append(1), real(*a)))
    model.decode(z)
    assert not calls
    with torch.no_grad(): model.decode(z)
    assert len(calls) == 2*sum(1+len(b.convs1) for b in model.synthesis.blocks) + 2

@torch.no_grad()
def test_without_onednn(monkeypatch):
    model, z = build(legacy=True), torch.randn(2, 16, 8, 8)
    expect = model.decode(z)
    monkeypatch.setattr(layers, '_ONEDNN', False)
    close(model.decode(z), expect)

@torch.no_grad()
def test_an_image_does_not_depend_on_its_batch():
    model, z = build(legacy=True), torch.randn(5, 16, 8, 8)*torch.tensor([.1, 1, 10, 1, 3])[:, None, None, None]
    together = model.decode(z)
    for i in range(5): torch.testing.assert_close(model.decode(z[i:i+1])[0], together[i], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model.decode(z.flip(0)).flip(0), together, atol=1e-5, rtol=1e-5)

def fresh(model):
    "A model that has never decoded, with the same weights."
    twin = VFMVAE(model.config).eval()
    twin.load_state_dict(model.state_dict())
    return twin

def test_nothing_goes_stale():
    model, z = build(legacy=True), torch.randn(2, 16, 8, 8)
    with torch.no_grad(): first = model.decode(z)
    adam = torch.optim.Adam(model.parameters(), lr=1e-2)
    model.decode(z).square().mean().backward()
    adam.step()
    with torch.no_grad():
        trained = model.decode(z)
        assert (trained-first).abs().max() > 1e-3 and torch.equal(trained, fresh(model).decode(z))
        model.load_state_dict(build(seed=1, legacy=True).state_dict())
        loaded = model.decode(z)
        assert (loaded-trained).abs().max() > 1e-3 and torch.equal(loaded, fresh(model).decode(z))
        for k, b in model.named_buffers():
            if k.endswith('noise_const'): b.neg_()
        assert (model.decode(z)-loaded).abs().max() > 1e-3 and torch.equal(model.decode(z), fresh(model).decode(z))
        rounded = model.bfloat16().float().decode(z)
        assert torch.equal(rounded, fresh(model).decode(z)) and not torch.equal(rounded, fresh(build(seed=1, legacy=True)).decode(z))

@torch.no_grad()
def test_decoding_leaves_inputs_and_what_hooks_saw_alone():
    model, z, seen = build(legacy=True), torch.randn(2, 16, 8, 8), []
    for m in model.modules():
        if isinstance(m, ConvNeXt | Upsample | GridAttention | ToRGB): m.register_forward_hook(lambda m, i, o: seen.append((o, o.clone())))
    kept, state = z.clone(), {k: v.clone() for k, v in model.state_dict().items()}
    model.decode(z)
    assert torch.equal(z, kept) and all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert len(seen) > 20 and all(torch.equal(a, b) for a, b in seen)

@pytest.mark.parametrize('shape', [(1, 1), (1, 7), (5, 3), (23, 24)], ids=str)
@pytest.mark.parametrize('layer', [lambda: ConvNeXt(32, 16), lambda: ConvNeXt(32, 16, kernel=5, noise=8), lambda: Upsample(32, 16), lambda: Upsample(32, 16, 5),
                                   lambda: Upsample(32, 16, first=True), lambda: ToRGB(32, 16), lambda: GridAttention(32), lambda: Pointwise(32, 8),
                                   lambda: dwsep(32, 32)])
def test_layers_at_odd_shapes_and_in_any_memory_format(layer, shape):
    torch.manual_seed(0)
    layer = layer()
    for p in layer.parameters(): nn.init.normal_(p, std=0.3)
    x, w = torch.randn(3, 32, *shape), torch.randn(3, 16)
    args = (w,) if isinstance(layer, ConvNeXt | ToRGB) else ()
    expect = layer(x, *args)
    with torch.no_grad():
        turned, last = x.transpose(2, 3).contiguous().transpose(2, 3), x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)
        for form in (x, x.contiguous(memory_format=torch.channels_last), turned, last):
            torch.testing.assert_close(layer(form, *args), expect, atol=1e-4, rtol=1e-4)

@torch.no_grad()
def test_where_it_does_not_apply():
    model, z = build(), torch.randn(1, 16, 8, 8)
    assert use_cpu_inference_kernel(z) and not use_cpu_inference_kernel(z.double()) and not use_cpu_inference_kernel(z.to('meta'))
    expect = model.decode(z)
    with torch.autocast('cpu', torch.bfloat16):
        assert not use_cpu_inference_kernel(z)
        assert (model.decode(z)-expect).abs().mean() < 0.1*expect.std()

def test_one_scale_has_no_skip_stream_and_loads_strictly():
    one, every = build(progressive=False), build()
    lost = set(every.own_state()) - set(one.own_state())
    assert set(one.own_state()) < set(every.own_state()) and all('last_upsample_conv' in k or 'torgb' in k for k in lost)
    assert [k for k in one.own_state() if 'torgb' in k and '.blocks.4.' not in k] == []
    with pytest.raises(UserError, match='missing'): every.load_own_state(one.own_state())
    one.decode(torch.randn(1, 16, 8, 8)).square().mean().backward()
    assert all(p.grad is not None for p in one.synthesis.parameters())

def test_a_copy_shares_nothing():
    class Frozen(nn.Module):
        name, patch, dim, interpolation = 'stand-in', 8, 32, 'bilinear'
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3))
        def width(self, layer=-1): return 32
    model = VFMVAE(TINY, Frozen()).eval()
    model.meta = dict(note=['a'])
    pair = deepcopy([model, model])
    twin = pair[0]
    assert pair[1] is twin and twin is not model and twin.meta == model.meta and twin.meta['note'] is not model.meta['note']
    held = [{t.untyped_storage().data_ptr() for t in (*m.parameters(), *m.buffers())} for m in (model, twin)]
    assert held[0] and not held[0] & held[1] and list(twin.state_dict()) == list(model.state_dict()) and not twin.training
    z = torch.randn(1, 16, 8, 8)
    with torch.no_grad():
        before = model.decode(z)
        for p in twin.parameters(): p.add_(0.1)
        assert torch.equal(model.decode(z), before) and not torch.equal(twin.decode(z), before)
