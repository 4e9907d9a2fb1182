"What the published recipes need at full size: a tokenizer by name, their crop, all images, 512 px."
from contextlib import nullcontext, suppress
from unittest.mock import patch

import pytest
import torch
from PIL import Image

from vfmvae.cli import main
from vfmvae.core import UserError
from vfmvae.images import adm_crop, centre_crop, to_tensor
from vfmvae.presets import FLOW_PRESETS
from vfmvae.generation import train_flow
from vfmvae.latents import cache_name, LatentCache
from vfmvae.presets import PRESETS
from vfmvae.recipes import open_data, training_data
from vfmvae.tokenizer import open_tokenizer
from vfmvae.vae import VFMVAE


@pytest.fixture(scope='module')
def oblong(tmp_path_factory):
    "Twelve pictures, three times as large as what is cut from them."
    folder = tmp_path_factory.mktemp('oblong')
    for i in range(12):
        noise = torch.rand(3, 190, 260, generator=torch.Generator().manual_seed(i)).mul(255).byte()
        (folder/'ab'[i % 2]).mkdir(exist_ok=True)
        Image.fromarray(noise.permute(1, 2, 0).numpy()).save(folder/'ab'[i % 2]/f'{i}.png')
    return folder


def test_published_nets_crop_as_published_and_bundled_ones_as_before():
    assert {k: p.crop for k, p in FLOW_PRESETS.items()} == {k: 'centre' if k.startswith(('dit-', 'lumina-')) else 'adm' for k in FLOW_PRESETS}


@pytest.mark.parametrize(('crop', 'made'), [('centre', centre_crop), ('adm', adm_crop)])
def test_a_set_opened_by_name_is_cut_by_that_crop(oblong, crop, made):
    ds = training_data(oblong, 64, crop=crop)
    assert torch.equal(ds[3]['image'], to_tensor(made(ds.read(3), 64))) and len(ds) == 12
    one = open_data(sorted(oblong.rglob('*.png'))[0], 64, crop=crop)
    assert one.crop == crop and torch.equal(one[0]['image'], to_tensor(made(one.read(0), 64)))
    with pytest.raises(UserError, match="no crop named 'amd'; nearest: adm"): training_data(oblong, 64, crop='amd')
    assert training_data(ds, 64, crop='centre') is ds                       # a set that is open stays as it is


def test_a_cache_knows_its_crop(oblong, tmp_path, capsys):
    tok = open_tokenizer('vfmvae-tiny-f8d16')
    names = {cache_name(tok, training_data(oblong, 64, crop=c), oblong) for c in ('centre', 'adm', 'square')}
    assert len(names) == 3
    assert main(['encode', '--data', str(oblong), '--crop', 'adm', '--out', str(tmp_path/'adm')]) == 0
    cache = LatentCache(tmp_path/'adm')
    assert len(cache) == 12 and "crop 'adm'" in cache.manifest['data']
    train = ['train-flow', '--data', str(oblong), '--cache', str(tmp_path/'adm'), '--num-images', '8', '--batch-size', '4']
    assert main(train) == 2 and "crop 'adm'" in capsys.readouterr().err      # the bundled preset crops otherwise
    with patch.dict(PRESETS, {k: PRESETS[k].__class__(**{**vars(PRESETS[k]), 'crop': 'adm'}) for k in ('dit-vfmvae-tiny-f8d16',)}): assert main(train) == 0


def test_train_flow_names_the_tokenizer(tmp_path, capsys):
    def refused(*words):
        with suppress(SystemExit): assert main(['train-flow', *words]) == 2
        return capsys.readouterr().err
    assert 'vfmvae-siglip2l-f16d32, which is not bundled; give its file' in refused('--preset', 'reg-80ep')
    assert 'give --tokenizer' in refused('--g-kwargs', 'training.yaml')
    assert 'no weights at none.pth' in refused('--preset', 'reg-80ep', '--tokenizer', 'none.pth', '--g-kwargs', 'training.yaml')
    assert 'does not apply' in refused('--tokenizer', 'conv-f8d16', '--g-kwargs', 'training.yaml')
    short = '--n', '16', '--num-images', '8', '--batch-size', '4', '--cache', str(tmp_path/'c')
    assert main(['train-flow', '--tokenizer', 'conv-f8d16', *short]) == 0 and LatentCache(tmp_path/'c').tokenizer == 'conv-f8d16'
    with pytest.raises(UserError, match='which is not bundled'): train_flow('lightningdit-64ep')


@pytest.mark.parametrize('name', ['f16d32', 'f16d32-512'])
def test_the_512_px_tokenizer_is_the_same_decoder_on_a_grid_of_twice_the_side(name):
    c = PRESETS[name].config
    side = c.img_size//c.stride
    with torch.device('meta'), patch('torch.autocast', lambda *_, **__: nullcontext()):
        model = VFMVAE(c).eval()
        tokens = (int(c.img_size*c.scale)//c.patch)**2
        posterior = model.project([torch.empty(1, tokens, d) for d in c.in_dims])
        pictures = model.decode_scales(posterior.mode())
    assert tuple(posterior.mean.shape) == (1, 32, side, side) and int(c.img_size*c.scale) == 512        # SigLIP2 sees its own 512 px in both
    assert [p.shape[-1] for p in pictures] == [c.img_size >> i for i in range(6)]
    assert sum(p.numel() for k, p in model.named_parameters() if k.startswith(('synthesis', 'mapping', 'ldm_adapter.post'))) == 128_144_914
    assert PRESETS[name].stages == PRESETS['f16d32'].stages and c.size_multiple <= 64
