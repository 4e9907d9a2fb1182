"Adversarial losses and discriminators against the numbers of the published code (needs VFMVAE_SHARED)."
import csv, math, os, zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from vfmvae.discriminators import (BatchNormLocal, blur, diff_augment, feature_matching, gan_loss_d, gan_loss_g,
                                   PatchGAN, ProjectedDiscriminator)
from vfmvae.vfm import VFM

SHARED = Path(os.environ.get('VFMVAE_SHARED') or Path(__file__).resolve().parents[2]/'shared')
LOSSES, NETS, NAMES = (SHARED/f for f in ('golden/vfmvae/losses.safetensors', 'golden/vfmvae/discriminator.safetensors', 'spec/params/PARAMS_D.tsv'))
pytestmark = pytest.mark.skipif(not LOSSES.is_file(), reason='golden numbers absent; set VFMVAE_SHARED')


@pytest.fixture(scope='module')
def gold(): return load_file(LOSSES)


def close(a, b, tol=5e-7): torch.testing.assert_close(a, b.reshape(a.shape), atol=tol, rtol=1e-6)


# losses ------------------------------------------------------------------------------------------------------------------------------------------

def test_projected_losses(gold):
    x = gold['sgt.logits']
    real, fake = gan_loss_d(x, -.5*x)
    close(real, gold['sgt.d_real'])
    for got, k in ((gan_loss_d(x, x)[1], 'sgt.d_fake'), (gan_loss_g(x), 'sgt.g')): close(got, gold[k])


def scales(gold, side): return [[gold[f'patch.{side}.{s}.{j}'] for j in range(3)] for s in range(3)]


@pytest.mark.parametrize('kind', ('mse', 'bce', 'hinge'))
def test_patch_losses(gold, kind):
    real, fake = scales(gold, 'real'), scales(gold, 'fake')
    for got, k in zip((*gan_loss_d(real, fake, kind), gan_loss_g(fake, kind)), ('d_real', 'd_fake', 'g'), strict=True): close(got, gold[f'patch.{kind}.{k}'])
    assert gan_loss_g([s[-1] for s in fake], kind) == gan_loss_g(fake, kind)


def test_feature_matching(gold): close(feature_matching(scales(gold, 'fake'), scales(gold, 'real')), gold['patch.feature_matching'])


@pytest.mark.parametrize('case', ('bnlocal', 'bnlocal2d'))
@pytest.mark.parametrize('b', (4, 8, 16))
def test_batch_norm(gold, case, b):
    norm = BatchNormLocal(6)
    norm.load_state_dict({k: gold[f'bnlocal.{k}'] for k in ('weight', 'bias')})
    close(norm(gold[f'{case}.{b}.x']), gold[f'{case}.{b}.y'], 2e-6)


@pytest.mark.parametrize('sigma', (.5, 1., 2.))
def test_blur(gold, sigma): close(blur(gold['blur.img'], sigma), gold[f'blur.sigma{sigma}'])


@pytest.mark.parametrize('policy', ('color', 'translation', 'cutout', 'color,translation,cutout'))
def test_augmentation(gold, policy):
    torch.manual_seed(5)
    close(diff_augment(gold['diffaug.x'], policy), gold[f"diffaug.seed5.{policy.replace(',', '+')}"], 1e-6)
    other = diff_augment(gold['diffaug.x'], policy, torch.Generator().manual_seed(5))
    close(other, gold[f"diffaug.seed5.{policy.replace(',', '+')}"], 1e-6)


# networks ----------------------------------------------------------------------------------------------------------------------------------------

def recipe(name, shape, seed):
    "The weight rule of the golden README, as far as the discriminator's names need it."
    g, last = np.random.default_rng([zlib.crc32(name.encode()), seed]), name.rpartition('.')[2]
    n = torch.from_numpy(g.standard_normal(shape, dtype=np.float32))
    if last in ('weight_u', 'weight_v'): return n/n.norm()
    if last == 'bias': return .1*n
    if n.ndim == 1: return 1+.1*n
    return .1*n if last in ('cls_token', 'pos_embed') else n/math.prod(shape[1:])**.5


class Nets:
    def __init__(self):
        import timm
        with safe_open(NETS, 'pt') as f: seed = int(f.metadata()['seed'])
        rows = [(r['name'], tuple(int(s) for s in r['shape'].strip('[]').split(','))) for r in csv.DictReader(NAMES.open(), delimiter='\t')]
        self.state = {name: recipe(name, shape, seed) for name, shape in rows}
        self.gold = load_file(NETS)
        net = timm.create_model('vit_small_patch16_224.dino', pretrained=False, num_classes=0)  # the tag brings DINO's mean and std
        net.load_state_dict(self.under('dino.model.model.'))
        # the tokenizer's VFM, a SigLIP, decides about the published resize
        self.D = ProjectedDiscriminator(VFM('vit_small_patch16_224.dino', net=net), policy='', crop=False, mode='bilinear').train()
        self.P = PatchGAN()
        self.P.load_own_state(self.under('patchgan_discriminator.'))
    def under(self, prefix): return {k.removeprefix(prefix): v for k, v in self.state.items() if k.startswith(prefix)}
    def fill(self):
        self.D.load_own_state({k: v for k, v in self.state.items() if k.startswith('heads.')})
        return self.D


@pytest.fixture(scope='module')
def nets(): return Nets()


def test_names_and_shapes_are_the_published_ones(nets):
    own = {k: tuple(v.shape) for k, v in nets.D.own_state().items()} | {f'patchgan_discriminator.{k}': tuple(v.shape) for k, v in nets.P.own_state().items()}
    assert own == {k: tuple(v.shape) for k, v in nets.state.items() if not k.startswith('dino.')}


@torch.no_grad()
def test_readouts(nets):
    h = nets.D.vfm.features(nets.D.preprocess(nets.gold['in.x']), nets.D.layers, cls=True)
    assert nets.D.layers == [3, 6, 9, 12, 0]
    for i, layer in enumerate(nets.D.layers): torch.testing.assert_close(h[layer].mT[..., :8], nets.gold[f'dino.{i}'], atol=2e-5, rtol=1e-5)


@torch.no_grad()
def test_projected_logits(nets):
    torch.testing.assert_close(nets.fill()(nets.gold['in.x']), nets.gold['out.stylegan_t_logits'], atol=2e-5, rtol=0)


@torch.no_grad()
def test_one_power_iteration_was_taken(nets):
    # norms hide the scale of the weights before them, so the logits alone would not tell
    nets.fill()(nets.gold['in.x'])
    for k in (f'heads.{i}.{j}' for i in range(5) for j in ('main.0.0', 'main.1.fn.0', 'cls')):
        w, u = nets.state[f'{k}.weight_orig'].flatten(1), nets.state[f'{k}.weight_u']
        v = torch.nn.functional.normalize(w.mT @ u, dim=0)
        close(nets.D.get_buffer(f'{k}.weight_v'), v, 1e-5)
        close(nets.D.get_buffer(f'{k}.weight_u'), torch.nn.functional.normalize(w @ v, dim=0), 1e-5)


@torch.no_grad()
def test_patch_gan(nets):
    out = nets.P(nets.gold['in.x'])
    assert [len(s) for s in out] == [5, 5, 5]
    for s, layers in enumerate(out):
        for j, h in enumerate(layers): torch.testing.assert_close(h if j == 4 else h[:, :4], nets.gold[f'out.patchgan.{s}.{j}'], atol=2e-5, rtol=0)
