"""A training step waits for the device at most twice, images travel as bytes, nothing is drawn on the wrong device: on a pretended card (`fakecuda`)."""
import accelerate
import pytest
from scope import thorough
import torch
from fakecuda import COPIED, SYNC, clear, cuda
from smoke import different_stages
from vfmvae.world import World
from vfmvae.data import loader
from vfmvae.dit import DiT, DiTConfig
from vfmvae.presets import FLOW_PRESETS
from vfmvae.flow_task import FlowConfig, FlowTask
from vfmvae.presets import PRESETS
from vfmvae.recipes import build_training, schedule_stages
from vfmvae.tokenizer_task import TokenizerTask
from vfmvae.train import fit, to_device
from vfmvae.vfm import VFM


# one of each family, with discriminators and without, with equivariance, with a target of its own
STAGES = [('tiny', 'strong_align'), ('tiny', 'gan'), ('conv-tiny-f8d16', 'first'), ('rae-tiny-f8d128', 'first'), ('photo', 'own'),
          ('vfmvae-efficientnet-f8d16', 'strong')]


class Latents:
    def __init__(self, shape): self.mean, self.label = torch.zeros(24, *shape), torch.zeros(24, dtype=torch.int64)
    def __len__(self): return len(self.mean)
    def batch(self, at): return dict(mean=self.mean[at], logvar=self.mean[at], label=self.label[at], key=list(map(str, at)))


class Pictures(Latents):
    def batch(self, at, as_bytes=False):
        return super().batch(at) | dict(image=torch.zeros(len(at), 3, 64, 64, dtype=torch.uint8 if as_bytes else torch.float32))


def counted(task, data, batch):
    "Waits and bytes copied in two steps of a training that has looked at labels and made its tables before."
    acc = accelerate.Accelerator()
    how = dict(log_every=1000, show=lambda rows: None, accelerator=acc)
    feed = loader(data, batch, device=acc.device)
    fit(task, feed, batch, **how)
    clear()
    fit(task, feed, 2*batch, **how)
    # the pretended card sums a second gradient of a convolution as a copy, which a card does not (see fakecuda); the last row of a log is read once
    waits = {k: n for k, n in SYNC.items() if 'backward' not in k and ' write ' not in k and not ('_descend' in k and 'copy_' in k)}
    return waits, sum(COPIED.values())


@pytest.mark.parametrize('preset, stage', thorough(different_stages(), STAGES))
def test_a_tokenizers_step_waits_once_a_descent_and_images_travel_as_bytes(preset, stage):
    with cuda():
        p = PRESETS[preset]
        todo = schedule_stages(p, None, None, [stage], 4)
        model, discriminators, perceive = build_training(p, todo, None, None, None, 0, None)
        task = TokenizerTask(model, todo[0], perceive, p.half_life, p.betas, p.clip, discriminators)
        waits, copied = counted(task, World(24), 4)
    assert sum(waits.values()) <= 2*(1 + bool(discriminators)), waits
    pictures = 2*4*3*64*64
    assert pictures <= copied < 1.05*pictures


@pytest.mark.parametrize('kind', ('plain', 'repa', 'reg'))
def test_a_flow_step_waits_once(kind):
    with cuda():
        p, vfm = FLOW_PRESETS['dit-vfmvae-tiny-f8d16'], VFM('tiny')
        if kind == 'plain': task, data = FlowTask(DiT(p.net), p.flow), Latents(p.latent)
        else:
            more = dict(encoder_depth=1, z_dims=(vfm.dim,), projector_dim=32) | (dict(cls_dim=vfm.dim) if kind == 'reg' else {})
            net = DiT(DiTConfig(in_channels=16, hidden_size=32, depth=2, num_heads=2, num_classes=16, patch_size=1, **more))
            task, data = FlowTask(net, FlowConfig(weights=dict(flow=1., repa=.5) | (dict(cls=.03) if kind == 'reg' else {})), [vfm]), Pictures((16, 8, 8))
        waits, copied = counted(task, data, 8)
    assert sum(waits.values()) <= 2, waits
    assert copied < 2*8*(2*16*8*8*4 + 8 + (3*64*64 if kind != 'plain' else 0)) + 4000


def test_bytes_become_the_numbers_that_they_were():
    set_ = World(6, seed=3)
    b = to_device(set_.batch(range(6), as_bytes=True), 'cpu')
    assert torch.equal(b['image'], set_.batch(range(6))['image'])
    assert loader(set_, 2).batch_at(0)['image'].dtype == torch.float32 and loader(set_, 2, device='meta').batch_at(0)['image'].dtype == torch.uint8
