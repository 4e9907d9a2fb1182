"""The switches of the study: at their neutral value nothing changes, to the bit; each does what its paper says; nonsense is one line."""
import json
from dataclasses import asdict, replace
import pytest, torch
import torch.nn.functional as F
from vfmvae.baselines import ConvVAE, ConvVAEConfig, RAE, RAEConfig
from vfmvae.core import build_config, to_grid, UserError
from vfmvae.layers import fuse_layers, FUSIONS
from vfmvae.tokenizer import load_tokenizer, save_tokenizer
from vfmvae.tokenizer_task import TINY
from vfmvae.vae import VFMVAE, VFMVAEConfig
from vfmvae.vfm import VFM
from vfmvae.world import World

PLAIN = ConvVAEConfig(channels=16, width=8, mults=(1, 2, 4, 8), blocks=1, decoder_blocks=1, img_size=64)
CONV = replace(PLAIN, vfm='tiny', patch=8, dim=128)
FROZEN = RAEConfig('tiny', 8, 128, stride=8, img_size=64, width=32, depth=1, heads=2)
CONFIGS = dict(vfmvae=TINY, conv=CONV, plain=PLAIN, rae=FROZEN)
CLASSES = {VFMVAEConfig: VFMVAE, ConvVAEConfig: ConvVAE, RAEConfig: RAE}


def build(config, seed=0):
    torch.manual_seed(seed)
    return CLASSES[type(config)](config, VFM('tiny') if config.vfm else None)


def images(n=4): return World(n, seed=3).batch(range(n))['image']


def one_line(says, make):
    with pytest.raises(UserError, match=says) as e: make()
    assert '\n' not in str(e.value)


def without(config, *new):
    "A configuration as a file from before the switch has it."
    return {k: v for k, v in json.loads(json.dumps(asdict(config))).items() if k not in new}


# fusion of layers --------------------------------------------------------------------------------------------------------------------------------

def test_one_layer_of_an_rae_is_the_norm_of_that_layer_to_the_bit():
    x, h = images(), VFM('tiny').features(images(), [-1, 2])
    for k, layer in ((dict(), -1), (dict(layer=2), 2), (dict(layers=(2,)), 2), *((dict(layers=(-1,), fuse=f), -1) for f in FUSIONS)):
        z = build(replace(FROZEN, **k)).eval().encode(x).mode()
        assert torch.equal(z, to_grid(F.layer_norm(h[layer], (128,), eps=FROZEN.eps), 8)), k


def test_fused_layers_are_what_their_names_say():
    x, at = images(), (0, 2, -1)
    each = [F.layer_norm(h, (128,), eps=FROZEN.eps) for h in VFM('tiny').features(x, at).values()]
    latent = lambda **k: build(replace(FROZEN, layers=at, **k)).eval().encode(x).mode()
    torch.testing.assert_close(latent(fuse='mean'), to_grid(sum(each)/3, 8))
    torch.testing.assert_close(latent(fuse='sum'), to_grid(sum(each), 8))
    torch.testing.assert_close(latent(fuse='last'), to_grid(each[-1], 8))
    torch.testing.assert_close(latent(fuse='concat', channels=384), to_grid(torch.cat(each, -1), 8))
    torch.testing.assert_close(latent(global_mean=True), to_grid(sum(each)/3 + each[-1].mean(1, keepdim=True), 8))


@pytest.mark.parametrize('fuse', FUSIONS)
def test_a_fused_latent_decodes_trains_and_comes_back_from_its_file(fuse, tmp_path):
    for config in (replace(FROZEN, layers=(0, -1), fuse=fuse, channels=256 if fuse == 'concat' else 128), replace(TINY, fuse=fuse)):
        assert build_config(type(config), json.loads(json.dumps(asdict(config)))) == config
        tok, x = build(config), images(2)
        tok.decode(tok.train().encode(x).sample()).square().mean().backward()
        own = [p for k, p in tok.trainable().items() if k.startswith(('ldm_adapter.patch_quants', 'inp'))]
        assert own and all(p.grad is not None for p in own)
        again = load_tokenizer(save_tokenizer(tmp_path/'a.safetensors', tok.eval()))
        assert again.config == config and torch.equal(again.encode(x).mode(), tok.encode(x).mode())


def test_a_fused_vfmvae_projects_one_map_to_as_many_channels():
    x, plain, mixed = images(2), build(TINY).eval(), build(replace(TINY, fuse='mean')).eval()
    assert torch.equal(build(replace(TINY, fuse='concat')).encode(x).mean, plain.encode(x).mean)
    assert (plain.config.projected, mixed.config.projected) == (((128, 64),)*3, ((128, 192),))
    h = plain.vfm_features(x)
    same = mixed.ldm_adapter.final_quant(mixed.ldm_adapter.patch_quants[0](F.pad(fuse_layers([*h.values()]), (0, 64))))
    assert torch.equal(mixed.encode_parts(x).moments, to_grid(same, 8))


def test_files_from_before_the_fusion_are_read_as_they_were():
    assert build_config(RAEConfig, without(FROZEN, 'layers', 'fuse', 'global_mean')) == FROZEN
    assert build_config(VFMVAEConfig, without(TINY, 'fuse')) == TINY


@pytest.mark.parametrize('says, make', [
    ("no fusion of RAEConfig.fuse named 'men'", lambda: replace(FROZEN, fuse='men')),
    ("choose fuse='mean'", lambda: replace(FROZEN, layers=(0, -1), fuse='concat', channels=256, global_mean=True)),
    ('config.for_vfm', lambda: build(replace(FROZEN, layers=(0, -1), fuse='concat'))),
    ('layer', lambda: build(replace(FROZEN, layers=(99,)))),
    ('layers', lambda: replace(FROZEN, layers='all')),
    ('is not one of last, mean, sum, concat', lambda: replace(TINY, fuse='max')),
    ("use fuse='concat'", lambda: replace(TINY, fuse='mean', in_dims=(128, 64, 128))),
    ('no fusion named', lambda: fuse_layers([torch.zeros(1, 2, 3)], 'all'))])
def test_a_fusion_that_cannot_be_is_one_line(says, make): one_line(says, make)
