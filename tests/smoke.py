"""A small world in which full-size cells and README's lines run on a CPU. Their code stays as it is; other are only the files that the environment names
(tiny random nets in the published layouts, a few pictures), the sizes of PRESETS, and what would be downloaded (the same architecture, shallow and narrow)."""
import io, json, os, tarfile, zipfile
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from unittest.mock import patch

import numpy as np
import torch
import yaml
from scope import ALL

from vfmvae import demo, extractors, presets, published_baselines, recipes, statistics, vfm
from vfmvae.baselines import ConvVAE, ConvVAEConfig
from vfmvae.captions import VOCABULARY, world_captions
from vfmvae.images import to_pil
from vfmvae.world import World
from vfmvae.dit import DiT, DiTConfig, FAMILIES
from vfmvae.extractors import bundled_extractor
from vfmvae.flow import FLOW_WEIGHTS
from vfmvae.flow_task import FlowTask
from vfmvae.generation import JOINT, JointTask
from vfmvae.statistics import compute_statistics
from vfmvae.presets import FlowPreset
from vfmvae.published import _tables, RENAMED_KEYS, SIGLIP_PREFIX
from vfmvae.vae import VFMVAE, VFMVAEConfig

DIM, SIDE = 64, 64      # width of a stand-in VFM, pixels of a picture
F16D32 = VFMVAEConfig(layers=(0, 2, -1), in_dims=(DIM,)*3, out_dims=(16,)*3, img_size=SIDE, widen=2, blocks=4, channel_base=2048, channel_max=16, res_blocks=1,
                      fusion=(16, 8, 8), attention=(1,), w_dim=16)
NET = dict(hidden_size=32, depth=2, num_heads=2, projector_dim=32, encoder_depth=1)

def different_stages():
    "(preset, stage) of the bundled size, one of those that differ in nothing but name, images, rate, how much a loss weighs (family, kind of VFM, the rest)"
    found = {}
    for name, p in presets.PRESETS.items():
        for s in p.stages if hasattr(p, 'stages') and p.config.img_size == 64 else ():
            rest = {k: repr(v) for k, v in vars(s).items() if k not in ('name', 'num_images', 'lr', 'weights')}
            vfm_kind = 'efficientnet' in str(getattr(p.config, 'vfm', ''))
            found.setdefault((type(p.config), vfm_kind, frozenset(s.weights), *rest.items()), (name, s.name))
    return [*found.values()]

def small(p, step):
    "A preset of the same kind with as many stages: bundled shapes as they are, published ones narrow; two steps of a net, one of each stage of a tokenizer."
    if isinstance(p, FlowPreset):
        published = p.crop == 'adm'
        aligned = {k: v for k, v in dict(z_dims=(DIM,)*len(p.net.z_dims), cls_dim=DIM*(p.net.cls_dim > 0)).items() if published}
        latent = (p.latent[0], 4, 4) if published else p.latent
        return replace(p, net=replace(p.net, **NET, **aligned), latent=latent, batch_size=step, num_images=2*step, sampling=replace(p.sampling, steps=3))
    c = p.config
    if isinstance(c, VFMVAEConfig) and c.vfm != 'tiny': c = replace(F16D32, scale=c.scale, img_size=round(2*SIDE/c.scale), out_dims=(round(64/c.scale**2),)*3)
    if isinstance(c, ConvVAEConfig): c = replace(c, width=8, mults=(1,)*len(c.mults), blocks=1, decoder_blocks=1, img_size=SIDE, dim=DIM if c.vfm else c.dim)
    return replace(p, config=c, batch_size=step, patch_width=8, discriminator_size=SIDE, stages=tuple(replace(s, num_images=step) for s in p.stages))

BASE = presets.FLOW_PRESETS['dit-conv-tiny-f8d16']
JOINT_NET = replace(BASE, net=replace(BASE.net, hidden_size=32, depth=2, num_heads=2, z_dims=(128,), encoder_depth=1, projector_dim=32),
                    flow=replace(BASE.flow, weights=FLOW_WEIGHTS['repa']), vfms=('tiny',))
JOINT_STAGE = replace(JOINT, weights=dict(l1=1., repa=1.5), lr=1e-3)

def joint_task(preset='conv-tiny-f8d16', stage=JOINT_STAGE, net=JOINT_NET, **how):
    "A tokenizer and a small net that learn together; the net answers from its first step on, where a fresh one says 0 and nothing flows back through it."
    torch.manual_seed(0)
    model, judges, perceptual = recipes.build_training(presets.PRESETS[preset], [stage], discriminator='tiny')
    dit = DiT(net.net)
    for p in dit.parameters():
        if p.requires_grad and not p.any(): torch.nn.init.normal_(p, std=.05)
    return JointTask(model, stage, FlowTask(dit, net.flow, [vfm.VFM('tiny')]), perceptual, discriminators=judges, **how)

def pictures(folder, n=16):
    "n pictures of the world, 80 px, in two class folders."
    x = World(n, seed=8, size=80).batch(range(n))['image']
    for i, im in enumerate(x):
        file = folder/('ant', 'bee')[i % 2]/f'{i:03d}.png'
        file.parent.mkdir(parents=True, exist_ok=True)
        to_pil(im).save(file)

def captioned(folder, n=16):
    "The same pictures with a caption beside each."
    pictures(folder, n)
    for i, file in enumerate(sorted(folder.rglob('*.png'))): file.with_suffix('.txt').write_text(world_captions(World(n, seed=8), index=[i])[0])

def text_model(folder):
    "A language model with random weights, as transformers saves one."
    import transformers as hf
    vocab = {w: i for i, w in enumerate(['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', ',', *VOCABULARY])}
    hf.BertTokenizerFast(vocab=vocab).save_pretrained(folder)
    shape = dict(vocab_size=len(vocab), num_hidden_layers=2, hidden_size=32, intermediate_size=64, num_attention_heads=2)
    hf.BertModel(hf.BertConfig(**shape)).save_pretrained(folder)

def shards(folder, n=16):
    "The same in two shards, with numbers of ImageNet's thousand classes."
    x = World(n, seed=8, size=80).batch(range(n))['image']
    for s in range(2):
        with tarfile.open(folder/f'imagenet-train-{s:04d}.tar', 'w') as tar:
            for i in range(s, n, 2):
                to_pil(x[i]).save(f := io.BytesIO(), format='PNG')
                for end, raw in (('png', f.getvalue()), ('cls', str(i*41 % 1000).encode())):
                    member = tarfile.TarInfo(f'{i:06d}.{end}')
                    member.size = len(raw)
                    tar.addfile(member, io.BytesIO(raw))
    (folder/'classes.json').write_text(json.dumps([f'class {k}' for k in range(1000)]))

def published_vfmvae(folder):
    "(checkpoint with a SigLIP tower inside, YAML of its training)."
    own = VFMVAE(F16D32).state_dict()
    shapes = published_baselines._hf_shapes(depth=4, dim=DIM, hidden=2*DIM, patch=16, n=64)
    tower = {f'{SIGLIP_PREFIX}vision_model.{k}': torch.randn(s)/8 for k, s in shapes.items()}
    g = {there: getattr(F16D32, here) for there, here in RENAMED_KEYS.items()} | dict(vfm_name='google/siglip2-large-patch16-512', attn_depths=[1],
         concat_z_mapped_dims=[*F16D32.fusion])
    sd = {k: v for k, v in own.items() if not k.startswith('stats.')} | tower
    torch.save(dict(G_ema=sd), folder/'vfm_vae_f16d32_..._legacy.pth')
    (folder/'training.yaml').write_text(yaml.safe_dump(dict(G_kwargs={k: list(v) if isinstance(v, tuple) else v for k, v in g.items()})))
    return str(folder/'vfm_vae_f16d32_..._legacy.pth'), str(folder/'training.yaml')

def published_net(file, family):
    "A net of that family with its position tables."
    wide = dict(z_dims=(DIM,), cls_dim=DIM) if family == 'reg' else {}
    qk = 'rms' if family == 'lightningdit' else 'layer'
    c = DiTConfig(**{**FAMILIES[family], **NET, **wide, 'depth': 4, 'encoder_depth': 4}, in_channels=32, patch_size=1, qk_norm=qk)
    sd = DiT(c).state_dict()
    torch.save(dict(ema=sd | _tables(c, sd, family, 4)), file)

def adm_reference(file, eye):
    "ADM's file: statistics of many pictures, and pixels of a few for precision and recall; no features."
    x = World(200, seed=9).batch(range(200))['image']
    s = compute_statistics(x, eye, keep=False)
    statistics.write_samples(file, x[:16])
    with zipfile.ZipFile(file, 'a') as z:
        for k in ('mu', 'sigma', 'mu_s', 'sigma_s'):
            with z.open(f'{k}.npy', 'w') as f: np.lib.format.write_array(f, getattr(s, k).numpy())

def files(folder):
    "Makes them; the environment that names them."
    torch.manual_seed(0)
    folder.mkdir(parents=True, exist_ok=True)
    for name in ('folder/of/pictures', 'imagenet/train'): pictures(folder/name)
    shards(folder)
    captioned(folder/'captioned')
    text_model(folder/'text-model')
    vfm_vae, config = published_vfmvae(folder)
    for name, channels, levels in (('sd', 4, 4), ('va', 32, 5)):
        own = ConvVAE(ConvVAEConfig(width=32, blocks=1, decoder_blocks=1, channels=channels, mults=(1,)*levels)).state_dict()
        torch.save(dict(state_dict={k: v for k, v in own.items() if not k.startswith('stats.')}), folder/f'{name}.ckpt')
    for family in ('lightningdit', 'reg'): published_net(folder/f'{family}.pt', family)
    torch.save(dict(mean=torch.zeros(1, 32, 1, 1)+.1, std=torch.ones(1, 32, 1, 1)*2), folder/'latents_stats.pt')
    adm_reference(folder/'adm.npz', Inception())
    here = dict(IMAGENET='imagenet-train-{0000..0001}.tar', IMAGENET_VAL='folder/of/pictures', SD_VAE='sd.ckpt', VA_VAE='va.ckpt',
                NET='lightningdit.pt', CAPTIONED='captioned', TEXT_MODEL='text-model', LATENTS_STATS='latents_stats.pt', ADM_REFERENCE='adm.npz')
    return {**{k: str(folder/v) for k, v in here.items()}, 'VFM_VAE': vfm_vae, 'VFM_VAE_YAML': config}

def Inception(weights=None):
    "Another eye under its name, in 64 dimensions instead of 2,048."
    eye = bundled_extractor()
    eye.name = 'inception-v3-compat'
    return eye

@contextmanager
def short_demo():
    "While open the demo has its sections as they are, measured on few images, drawn in one step, of two classes; test_recipes.py runs it whole."
    def few(f, **less): return lambda *given, **how: f(*given, **how | less)
    with ExitStack() as stack:
        for name, new in dict(evaluate_tokenizer=lambda net, data, n, **how: recipes.evaluate_tokenizer(net, data, 2, **how),
                              generate=few(demo.generate, steps=1), CLASSES=demo.CLASSES[:2], score_sources=few(demo.score_sources, n=16, times=20)).items():
            stack.enter_context(patch.object(demo, name, new))
        yield

@contextmanager
def world(environment=None, step=8): # step: images of one
    """While open: small presets, narrow VFMs for those that would be downloaded, a small Inception, no compiler; `environment` beside VFMVAE_SMOKE=1. In
    `make test` float32 alone: processors without bfloat16 take twenty times as long for it. That a step in bf16 is right, test_train.py and `make gpu` say."""
    load, known, autocast = vfm._load, {**presets.PRESETS}, torch.autocast
    def exact(device, dtype=None, enabled=True, **how): return autocast(device, dtype, enabled and (ALL or dtype is not torch.bfloat16), **how)
    def narrow(name, pretrained, **kwargs):
        if pretrained is not True or name in vfm.BUNDLED: return load(name, pretrained, **kwargs)
        vfm.check_vfm(name)
        torch.manual_seed(0)
        return vfm._create(name, False, **dict(depth=4, embed_dim=DIM, num_heads=2, mlp_ratio=2.) | kwargs), dict(source='random', licence=None)
    with ExitStack() as stack:
        stack.enter_context(patch.dict(os.environ, {'VFMVAE_SMOKE': '1', **(environment or {})}))
        for table in (presets.PRESETS, presets.FLOW_PRESETS):
            stack.enter_context(patch.dict(table, {k: small(p, step) for k, p in known.items() if k in table}))
        stack.enter_context(patch.object(vfm, '_load', narrow))
        # one measured step of a stage says as much as two
        stack.enter_context(patch.object(recipes.estimate, '__defaults__', tuple(1 if d == 2 else d for d in recipes.estimate.__defaults__ or ())))
        stack.enter_context(patch.object(extractors, 'Inception', Inception))
        stack.enter_context(short_demo())
        stack.enter_context(patch.object(torch, 'autocast', exact))
        stack.enter_context(torch.compiler.set_stance('force_eager'))
        yield
