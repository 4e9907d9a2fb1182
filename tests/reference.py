"""Plain forms of what the library computes in a faster order: the laws of the tests and the baselines of `benchmarks/speed.py`.

Each is what the formulas say, as one would first write it: a weight tensor per image sent through a grouped convolution, channels outermost, softmax
and norms spelled out, whole kernels of n x n. The weights are those of the model that is passed in.
"""
from math import sqrt
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vfmvae.dit import DiT
from vfmvae.dit_layers import rotate, unpatchify
from vfmvae.layers import ConvNeXt, GridAttention, ToRGB, Upsample
from vfmvae.vae import VFMVAE

# the decoder ------------------------------------------------------------------------------------------------------

def plain_modulated(x: Tensor, weight: Tensor, style: Tensor, demodulate: bool = True) -> Tensor:
    "1x1 convolution of x (b,i,h,w) by weight (o,i,1,1) modulated by style (b,i): (b,o,h,w) (StyleGAN2, section 2.2)."
    v = weight[None]*style[:, None, :, None, None]
    if demodulate: v = v*(v.square().sum(2, keepdim=True)+1e-8).rsqrt()
    return F.conv2d(x.reshape(1, -1, *x.shape[2:]), v.flatten(0, 1), groups=len(x)).view(len(x), -1, *x.shape[2:])

def conv(m: nn.Conv2d, x: Tensor) -> Tensor:
    return F.conv2d(x, m.weight, m.bias, padding=m.kernel_size[0]//2, groups=m.groups)

def plain_convnext(m: ConvNeXt, x: Tensor, w: Tensor) -> Tensor:
    t = conv(m.dwconv, x)
    if m.legacy:
        noise = (m.noise_const*m.noise_strength)[None, None]
        t = t + F.interpolate(noise, size=t.shape[2:], mode='bilinear')
    t = plain_modulated(m.norm(t), m.pwconv1.weight, m.affine_pw1(w)) + m.pwconv1.bias
    return x + m.gamma*conv(m.pwconv2, F.gelu(t))

def plain_upsample(m: Upsample, x: Tensor) -> Tensor:
    x = conv(m.pointwise, conv(m.depthwise, x if m.first else m.norm(x)))
    x = m.norm(F.pixel_shuffle(x, 2)) if m.first else F.pixel_shuffle(x, 2)
    return F.conv2d(F.pad(x, m.pad, mode='replicate'), m.blur_weight, groups=x.shape[1])

def plain_branch(m: nn.Module, x: Tensor) -> Tensor:
    if isinstance(m, nn.Sequential):
        for part in m: x = plain_branch(part, x)
        return x
    return conv(m, x) if isinstance(m, nn.Conv2d) else m(x)

def plain_attention(m: GridAttention, x: Tensor) -> Tensor:
    a: Any = m.attn
    q, k, v = (conv(f, a.norm(x)).flatten(2).unflatten(1, (a.heads, -1)).mT for f in (a.to_q, a.to_k, a.to_v))
    k, v = (torch.cat([null[None, :, None].expand(len(x), -1, 1, -1), t], 2)
            for null, t in zip(a.null_kv, (k, v), strict=True))
    x = x + conv(a.to_out, (torch.softmax(q @ k.mT/sqrt(q.shape[-1]), -1) @ v).mT.reshape(x.shape))
    return x + plain_branch(m.ff, x)

def plain_rgb(m: ToRGB, x: Tensor, w: Tensor) -> Tensor:
    return plain_modulated(x, m.weight, m.affine(w)/sqrt(x.shape[1]), demodulate=False) + m.bias

def plain_decode_scales(model: VFMVAE, z: Tensor) -> list[Tensor]:
    "`model.decode_scales(z)`; the projection and the style network are the model's own."
    deep: Tensor = model.ldm_adapter.up(model.stats.unscale(z))
    net: Any = model.synthesis
    w, x, s, images = model.mapping(deep), None, None, []
    for i, block in enumerate(net.blocks):
        new = [plain_branch(net.z_convs[str(i)], deep)] if str(i) in net.z_convs else []
        x = plain_upsample(block.seperate_upsample_conv, torch.cat([*([] if x is None else [x]), *new], 1))
        for layer in (block.conv0, *block.convs1): x = plain_convnext(layer, x, w)
        for attention in getattr(block, 'self_attns', ()): x = plain_attention(attention, x)
        if not block.paints: continue
        s = x if s is None else plain_upsample(block.last_upsample_conv, s) + x
        images.append(plain_rgb(block.torgb, s, w))
    return images[::-1]

def plain_decode(model: VFMVAE, z: Tensor) -> Tensor:
    "The largest image of `plain_decode_scales`, (b,3,H,W)."
    return plain_decode_scales(model, z)[0]

# the velocity net -------------------------------------------------------------------------------------------------

def rms_norm(x: Tensor, weight: Tensor) -> Tensor: return x*(x.square().mean(-1, keepdim=True)+1e-6).rsqrt()*weight

def modulation(m: nn.Sequential, c: Tensor, parts: int) -> tuple[Tensor, ...]:
    return F.linear(c*torch.sigmoid(c), m[1].weight, m[1].bias)[:, None].chunk(parts, -1)

def plain_block(m: Any, x: Tensor, c: Tensor, rope: Tensor) -> Tensor:
    shift1, scale1, gate1, shift2, scale2, gate2 = modulation(m.adaLN_modulation, c, 6)
    a = m.attn
    qkv = F.linear(rms_norm(x, m.norm1.weight)*(1+scale1)+shift1, a.qkv.weight, a.qkv.bias)
    q, k, v = qkv.unflatten(-1, (3, a.heads, -1)).permute(2, 0, 3, 1, 4)
    q, k = rotate(rms_norm(q, a.q_norm.weight), rope), rotate(rms_norm(k, a.k_norm.weight), rope)
    seen = (torch.softmax(q @ k.mT/sqrt(q.shape[-1]), -1) @ v).transpose(1, 2).flatten(2)
    x = x + gate1*F.linear(seen, a.proj.weight, a.proj.bias)
    hidden = F.linear(rms_norm(x, m.norm2.weight)*(1+scale2)+shift2, m.mlp.w12.weight, m.mlp.w12.bias)
    left, right = hidden.chunk(2, -1)
    return x + gate2*F.linear(left*torch.sigmoid(left)*right, m.mlp.w3.weight, m.mlp.w3.bias)

def plain_velocity(net: DiT, z: Tensor, t: Tensor, y: Tensor, drop: Tensor | None = None) -> Tensor:
    "`net(z, t, y, drop=drop)` of a LightningDiT with QK-norm, (b,c,h,w) (Yao et al. 2025, section 4)."
    c, p = net.config, net.config.patch_size
    h, w = z.shape[2]//p, z.shape[3]//p
    place: Any = net.position_tables(h, w, z.device, z.dtype)
    cond = net.t_embedder(t) + net.y_embedder(y, drop)
    x = net.x_embedder(z) + place.pos
    for m in net.blocks: x = plain_block(m, x, cond, place.rope)
    f: Any = net.final_layer
    shift, scale = modulation(f.adaLN_modulation, cond, 2)
    out = F.linear(rms_norm(x, f.norm_final.weight)*(1+scale)+shift, f.linear.weight, f.linear.bias)
    return unpatchify(out, h, w, p)[:, :c.in_channels]

# alignment --------------------------------------------------------------------------------------------------------

def plain_cknna(a: Tensor, b: Tensor, k: int = 10) -> float:
    """`align.cknna` of prepared rows a (n,d), b (n,e) in the published dense form (Huh et al. 2024): whole kernels, masks, unbiased HSIC in float32 on
    n x n matrices."""
    n = len(a)
    def hsic(K: Tensor, L: Tensor) -> Tensor:
        K, L = K.clone().fill_diagonal_(0), L.clone().fill_diagonal_(0)
        return ((K*L.T).sum() + K.sum()*L.sum()/((n-1)*(n-2)) - 2*(K@L).sum()/(n-2))/(n*(n-3))
    def mask(K: Tensor) -> Tensor:
        nearest = K.clone().fill_diagonal_(-torch.inf).topk(k).indices
        return torch.zeros_like(K).scatter_(1, nearest, 1.)
    K, L = a@a.T, b@b.T
    both = mask(K)*mask(L)
    kl, kk, ll = hsic(both*K, both*L), hsic(mask(K)*K, mask(K)*K), hsic(mask(L)*L, mask(L)*L)
    return (kl/((kk*ll).sqrt()+1e-6)).item()
