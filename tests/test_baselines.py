"""The tokenizers to compare with: SD-VAE's layout against diffusers, one protocol for every family, training through the same task."""
import json
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
import pytest, torch
from safetensors.torch import load_file
from vfmvae.baselines import ConvVAE, ConvVAEConfig, RAE, RAEConfig
from vfmvae.core import build_config, Gaussian, UserError
from vfmvae.files import load_weights, save_weights
from vfmvae.latents import cache_latents
from vfmvae.world import World
from vfmvae.data import loader
from vfmvae.published_baselines import load_convvae
from vfmvae.published import open_published
from vfmvae.presets import Preset, PRESETS
from vfmvae.recipes import build_training, estimate, evaluate_tokenizer, train_tokenizer
from vfmvae.tokenizer import open_tokenizer
from vfmvae.tokenizer_task import check_stage, Stage, tokenizer_losses, TokenizerTask
from vfmvae.protocols import Tokenizer
from vfmvae.tokenizer import (families, fit_stats, LatentFeatures, load_tokenizer, reconstruct, save_tokenizer,
                              tokenizers)
from vfmvae.train import fit
from vfmvae.vfm import VFM

GOLDEN = Path(__file__).parent/'golden'
CONV = ConvVAEConfig(channels=16, width=8, mults=(1, 2, 2), blocks=1, decoder_blocks=1, img_size=32)
ALIGNED = replace(CONV, mults=(1, 2, 2, 4), img_size=64, vfm='tiny', patch=8, dim=128)
FROZEN = RAEConfig('tiny', 8, 128, stride=8, img_size=64, width=32, depth=1, heads=2)


def build(config, vfm=None):
    torch.manual_seed(0)
    return families[config.family][1](config, vfm or (VFM('tiny') if config.vfm else None))


# published weights -----------------------------------------------------------------------------------------------------------------------------

def diffusers():
    g = load_file(GOLDEN/'sdvae_tiny.safetensors')
    return g, {k.removeprefix('weights.'): v.float() for k, v in g.items() if k.startswith('weights.')}


FOUR = dict(norm_num_groups=4)      # of the golden file

def test_the_layout_gives_the_numbers_of_diffusers():
    g, sd = diffusers()
    vae = load_convvae(sd, config=FOUR)
    assert vae.config == ConvVAEConfig(width=16, mults=(1, 1), blocks=1, decoder_blocks=2) and not vae.stats.fitted
    with torch.no_grad(): post = vae.encode(g['x'])
    torch.testing.assert_close(post.mean, g['mean'], atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(post.std, g['std'], atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(vae.decode(g['mean']), g['y'], atol=2e-5, rtol=1e-4)


def kl(widths=(32, 32), attend=(), seed=0, **kw):
    "A random AutoencoderKL of diffusers, nothing in it at rest."
    from diffusers import AutoencoderKL
    kinds = [['DownEncoderBlock2D', 'AttnDownEncoderBlock2D'], ['UpDecoderBlock2D', 'AttnUpDecoderBlock2D']]
    down, up = ([k[i in attend] for i in range(len(widths))] for k in kinds)
    net = AutoencoderKL(down_block_types=down, up_block_types=up[::-1], block_out_channels=widths, **kw).eval()
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters(): p.copy_(torch.randn(p.shape, generator=g)*(.3/max(1, p[0].numel())**.5 if p.ndim > 1 else .3))
    return net


KINDS = [*(dict(widths=(w, w), norm_num_groups=n) for w, n in ((32, 8), (32, 32), (64, 16), (64, 32), (96, 8), (96, 32), (128, 16))), dict(widths=(128, 256)),
    dict(widths=(32, 64, 64), attend=(1,), layers_per_block=2, latent_channels=16), dict(widths=(32, 32), attend=(0, 1), latent_channels=8),
    dict(latent_channels=16, scaling_factor=.3611, shift_factor=.1159, use_quant_conv=False, use_post_quant_conv=False),
    dict(latent_channels=3, scaling_factor=2., latents_mean=[.1, .2, -.3], latents_std=[.5, 1., 3.])]

@torch.no_grad()
@pytest.mark.parametrize('kind', KINDS, ids=lambda k: ' '.join(f'{n}={v}' for n, v in k.items()))
def test_every_width_group_count_and_switch_of_diffusers(kind):
    pytest.importorskip('diffusers')
    net, x = kl(**kind).double(), torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)*2-1
    c, want, vae = net.config, net.encode(x).latent_dist, load_convvae({k: v.float() for k, v in net.state_dict().items()}, config=dict(net.config)).double()
    close = partial(torch.testing.assert_close, atol=1e-6, rtol=1e-5)
    close(vae.stats.unscale(vae.encode(x).mean), want.mean)
    close(vae.encode(x).std*vae.stats.std[:, None, None], want.std)
    close(vae.decode(vae.stats.scale(Gaussian(want.mean)).mean), net.decode(want.mean).sample)
    mean, std = (v if v is not None else d for v, d in ((c.get('latents_mean'), c.shift_factor or 0.), (c.get('latents_std'), 1.)))
    mean, std = (torch.as_tensor(v, dtype=torch.float64).expand(c.latent_channels)[:, None, None] for v in (mean, std))
    close(vae.encode(x).mean, (want.mean-mean)*c.scaling_factor/std)
    assert (vae.channels, vae.stride) == (c.latent_channels, 2**(len(c.block_out_channels)-1))


@torch.no_grad()
def test_the_groups_come_from_a_config_or_from_latent_diffusions_names_and_else_not_at_all(tmp_path):
    pytest.importorskip('diffusers')
    net, x = kl((64, 64), norm_num_groups=16), torch.rand(1, 3, 16, 16)*2-1
    net.save_pretrained(tmp_path/'pipe/vae')
    file, want = tmp_path/'pipe/vae/diffusion_pytorch_model.safetensors', net.encode(x).latent_dist.mean
    config = json.loads((tmp_path/'pipe/vae/config.json').read_text())
    sd = net.state_dict()
    for source, told in ((file, None), (tmp_path/'pipe', None), (sd, config), (sd, tmp_path/'pipe/vae'), (sd, tmp_path/'pipe/vae/config.json'),
                         (sd, {'norm_num_groups': 16}), ({'module.'+k: v for k, v in sd.items()}, config), ({'state_dict': sd}, config)):
        torch.testing.assert_close(load_convvae(source, 1., config=told).encode(x).mean, want, atol=1e-5, rtol=1e-5)
    for d in (torch.float64, torch.bfloat16):
        near = load_convvae({k: v.to(d) for k, v in sd.items()}, config={'norm_num_groups': 16})
        assert all(v.dtype == torch.float32 for v in near.state_dict().values())
        torch.testing.assert_close(near.encode(x).mean, want, atol=1e-5 if d is torch.float64 else .1, rtol=.1)
    torch.save(sd, tmp_path/'alone.bin')
    with pytest.raises(UserError, match='no tensor tells into how many groups'): load_convvae(tmp_path/'alone.bin')
    ours = {k: v for k, v in load_convvae(sd, config={'norm_num_groups': 32}).own_state().items() if 'stats' not in k}
    net32 = kl((64, 64))
    torch.testing.assert_close(load_convvae(ours).encode(x).mean, net32.encode(x).latent_dist.mean, atol=1e-5, rtol=1e-5)   # the code of these names: 32
    torch.testing.assert_close(open_published(tmp_path/'pipe').encode(x).mean, want*net.config.scaling_factor, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_config_older_than_the_scale_means_that_of_diffusers(tmp_path):
    diffusers_ = pytest.importorskip('diffusers')
    net, x = kl((64, 64), norm_num_groups=16), torch.rand(1, 3, 16, 16)*2-1
    net.save_pretrained(tmp_path)                                  # sd-vae-ft-mse is such a folder
    told = json.loads((tmp_path/'config.json').read_text())
    del told['scaling_factor']
    (tmp_path/'config.json').write_text(json.dumps(told))
    theirs = diffusers_.AutoencoderKL.from_pretrained(tmp_path)
    want, raw = theirs.encode(x).latent_dist.mean*theirs.config.scaling_factor, net.encode(x).latent_dist.mean
    close = partial(torch.testing.assert_close, atol=1e-5, rtol=1e-5)
    for source, how in ((tmp_path, {}), (tmp_path/'diffusion_pytorch_model.safetensors', {}), (net.state_dict(), dict(config=told))):
        close(load_convvae(source, **how).encode(x).mean, want)
    close(load_convvae(tmp_path, 1.).encode(x).mean, raw)
    close(load_convvae(net.state_dict(), config={'norm_num_groups': 16}).encode(x).mean, raw)


@torch.no_grad()
@pytest.mark.parametrize('how', [{}, dict(variant='fp16'), dict(safe_serialization=False)], ids=str)
def test_weights_in_several_files_are_those_in_one(tmp_path, how):
    pytest.importorskip('diffusers')
    net, x = kl((64, 64), norm_num_groups=16), torch.rand(1, 3, 16, 16)*2-1
    net.save_pretrained(tmp_path/'one')
    net.save_pretrained(tmp_path/'many', max_shard_size='200KB', **how)
    index, = (tmp_path/'many').glob('*.index*.json')
    want = open_published(tmp_path/'one').encode(x).mean
    for source in (tmp_path/'many', index): assert torch.equal(open_published(source).encode(x).mean, want)
    told = json.loads(index.read_text())
    lost = sorted({*told['weight_map'].values()})[1]
    for files, says in (({}, 'missing'), ({'a': index.name}, 'no index'), ([], 'no index'), (None, 'no index')):
        if files != {}: (tmp_path/'many'/'odd.json').write_text(json.dumps(dict(weight_map=files)))
        else: (tmp_path/'many'/'odd.json').write_text(json.dumps(dict(weight_map={k: v for k, v in told['weight_map'].items() if v != lost})))
        with pytest.raises(UserError, match=says): load_convvae(tmp_path/'many'/'odd.json')
    (tmp_path/'many'/lost).unlink()
    with pytest.raises(UserError, match=f'no .*{lost}'): open_published(tmp_path/'many')


@pytest.mark.parametrize('config, says', [
    (dict(norm_num_groups=3), 'not divided into 3'), (dict(norm_num_groups='4'), 'norm_num_groups'), (dict(norm_num_groups=0), 'norm_num_groups'),
    (dict(norm_num_groups=1e11), 'norm_num_groups'), (dict(norm_num_groups=None), 'norm_num_groups'), (FOUR | dict(act_fn='gelu'), 'act_fn'),
    (FOUR | dict(_class_name='AutoencoderTiny'), 'AutoencoderTiny'), (FOUR | dict(block_out_channels=[16, 32]), 'block_out_channels'),
    (FOUR | dict(latent_channels=[4]), 'latent_channels'), (FOUR | dict(layers_per_block=2), 'layers_per_block'),
    (FOUR | dict(scaling_factor=0), 'scaling factor'), (FOUR | dict(scaling_factor=float('nan')), 'scaling_factor'),
    (FOUR | dict(latents_mean=[1.]), 'latents_mean'), (FOUR | dict(latents_std=[1., 0., 1., 1.], scaling_factor=1), 'latents_std'),
    (FOUR | dict(shift_factor='x', scaling_factor=1), 'shift_factor'), (FOUR | dict(in_channels=4), 'in_channels'),
    (FOUR | dict(mid_block_add_attention=False), 'mid_block_add_attention'), (7, 'config is')])
def test_a_config_of_another_net_is_one_line(config, says):
    with pytest.raises(UserError, match=says) as e: load_convvae(diffusers()[1], *([1.] if says == 'latents_mean' else []), config=config)
    assert '\n' not in str(e.value)


def test_old_names_of_diffusers_and_those_of_latent_diffusion_are_the_same_model(tmp_path):
    g, sd = diffusers()
    one = load_convvae(sd, config=FOUR)
    old = {k.replace('to_q', 'query').replace('to_k', 'key').replace('to_v', 'value').replace('to_out.0', 'proj_attn'): v for k, v in sd.items()}
    ours = {f'first_stage_model.{k}': v for k, v in one.own_state().items() if not k.startswith('stats.')}
    whole = dict(state_dict=ours | {'model.diffusion_model.x.weight': torch.zeros(1), 'betas': torch.zeros(3), 'first_stage_model.loss.logvar': torch.zeros(1)})
    torch.save(whole, tmp_path/'sd.ckpt')
    save_weights(tmp_path/'vae.safetensors', old, {})
    for other in (load_convvae(old, config=FOUR), load_convvae(tmp_path/'sd.ckpt', config=FOUR), load_convvae(tmp_path/'vae.safetensors', .18215, config=FOUR)):
        torch.testing.assert_close(reconstruct(other, g['x']), reconstruct(one, g['x']), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(other.encode(g['x']).mode(), one.encode(g['x']).mode()*.18215)
    with pytest.raises(UserError, match='has the place of another tensor'): load_convvae(old | sd, config=FOUR)


def test_every_tensor_of_sd_vae_has_its_place():
    shapes = {k: tuple(map(int, s.split(','))) for k, s in (line.split('\t') for line in (GOLDEN/'sdvae_names.tsv').read_text().splitlines())}
    vae = load_convvae({k: torch.zeros(()).expand(s) for k, s in shapes.items()}, config={'norm_num_groups': 32})
    assert vae.config == ConvVAEConfig() and len(vae.own_state()) == len(shapes) + 2


def test_vavae_is_read_with_its_alignment_map_and_without_its_foundation_model():
    vae = build(replace(ALIGNED, attention=(3,), width=32, groups=32))
    sd = {k: v for k, v in vae.own_state().items() if not k.startswith('stats.')}
    sd |= {'foundation_model.cls_token': torch.zeros(1), 'loss.logvar': torch.zeros(1)}
    again, x = load_convvae(sd, vfm=VFM('tiny')), torch.rand(1, 3, 32, 32)
    assert again.config == replace(vae.config, img_size=256)
    with torch.no_grad(): assert torch.equal(again.encode(x).mean, vae.encode(x).mean)
    assert load_convvae(sd).config.vfm == 'unknown' and torch.equal(again.linear_proj.weight, vae.linear_proj.weight)


def test_a_file_that_does_not_fit_is_one_line_that_lists_it():
    _, sd = diffusers()
    bad = {k: v for k, v in sd.items() if k != 'decoder.conv_out.bias'} | {'surplus.weight': torch.zeros(1), 'quant_conv.weight': torch.zeros(8, 8, 3, 3)}
    with pytest.raises(UserError) as e: load_convvae(bad, config=FOUR)
    assert '\n' not in (said := str(e.value))
    assert all(s in said for s in ('1 missing: decoder.conv_out.bias', '1 extra: surplus.weight', 'quant_conv.weight (8, 8, 3, 3)'))
    with pytest.raises(UserError, match='lacks encoder.conv_in.weight'): load_convvae({k: v for k, v in sd.items() if 'encoder.conv_in' not in k}, config=FOUR)
    far = sd | {'encoder.down_blocks.99999999999.resnets.0.conv1.weight': torch.zeros(1)}
    with pytest.raises(UserError, match='1 extra: encoder.down.99999999999'): load_convvae(far, config=FOUR)


@pytest.mark.parametrize('change', [dict(width=0), dict(width=10**11), dict(blocks=10**11), dict(decoder_blocks=-1), dict(mults=()), dict(mults=(1,)*99),
                                    dict(mults=(1, 10**11)), dict(groups=0), dict(groups=5), dict(channels=10**30), dict(width=1.5), dict(blocks='2')])
def test_a_conv_config_beyond_all_nets_is_one_line_before_anything_is_made(change):
    with pytest.raises(UserError) as e: build_config(ConvVAEConfig, change)
    assert '\n' not in str(e.value)


# one protocol for all --------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('name', ['vfmvae-tiny-f8d16', 'conv-f8d16', 'conv-tiny-f8d16', 'rae-tiny-f8d128'])
def test_every_bundled_tokenizer_keeps_the_protocol(name):
    tok, world = tokenizers[name], World(16, seed=8)
    assert name in tokenizers and isinstance(tok, Tokenizer) and tok.name == name and not tok.training and tok.stats.fitted
    x = world.batch(range(8))['image']
    with torch.no_grad():
        post = tok.encode(x)
        z = post.mode()
        assert z.shape == (8, tok.channels, 8, 8) and tok.decode(z).shape == x.shape
        assert tok.encode(x[:, :, :32, :16]).mode().shape == (8, tok.channels, 4, 2)
        torch.testing.assert_close(tok.encode(x[3:4]).mode(), z[3:4], atol=1e-4, rtol=1e-4)             # no image sees its batch
    many = LatentFeatures(tok).features(World(512, seed=9).batch(range(512))['image'])['latent']
    assert (many.mean((0, 1)).abs() < .25).all() and ((many.std((0, 1))-1).abs() < .25).all()             # unit scale by itself
    assert evaluate_tokenizer(tok, world, 16)['psnr'] > 18
    assert {'recipe', 'made', 'measured', 'licence', 'source'} <= {*tok.meta}


@pytest.mark.parametrize('config', [CONV, ALIGNED, FROZEN], ids=lambda c: c.name)
def test_files_come_back_as_they_were(config, tmp_path):
    tok, x = build(config), World(size=config.img_size).batch(range(4))['image']
    fit_stats(tok.eval(), x)
    f = save_tokenizer(tmp_path/'a.safetensors', tok, seed=3)
    again = open_tokenizer(f)
    assert type(again) is type(tok) and again.meta['seed'] == 3 and torch.equal(reconstruct(again, x), reconstruct(tok, x)) and again.stats.fitted
    assert not any(k.startswith('vfm.') for k in load_weights(f)[0]) and build_config(type(config), json.loads(json.dumps(asdict(config)))) == config
    assert load_tokenizer(f, vfm=False).decode(tok.encode(x).mode()).shape == x.shape
    side = json.loads(f.with_suffix('.json').read_text())
    f.with_suffix('.json').write_text(json.dumps(side | dict(family='gan')))
    with pytest.raises(UserError, match="no tokenizer family named 'gan'"): open_tokenizer(f)


# training --------------------------------------------------------------------------------------------------------------------------------------

PIXELS = dict(l1=1., l2=2.)
STAGES = {'conv': Stage('s', dict(PIXELS, kl=1e-6), (), 1e-3, 64),
          'aligned': Stage('s', dict(PIXELS, kl=1e-6, vf=1.), (), 1e-3, 64, cos_margin=.5, dist_margin=.25),
          'rae': Stage('s', PIXELS, (), 1e-3, 64)}
CONFIGS = dict(conv=CONV, aligned=ALIGNED, rae=FROZEN)


@pytest.mark.parametrize('kind', list(CONFIGS))
def test_a_few_steps_lower_the_loss_and_leave_the_vfm_alone(kind):
    tok = build(CONFIGS[kind])
    before = {k: v.clone() for k, v in tok.state_dict().items()}
    task = TokenizerTask(tok, STAGES[kind], half_life=50)
    rows = fit(task, loader(World(64, size=tok.config.img_size), 8), 8*30, lr=lambda step: 2e-3, log_every=10, show=lambda h: None)
    assert rows[-1]['l1'] < rows[0]['l1']
    moved = {k for k, v in tok.state_dict().items() if not torch.equal(v, before[k])}
    assert {k for k, _ in tok.named_parameters() if not k.startswith('vfm.')} == moved
    assert ('vf' in rows[0]) == (kind == 'aligned') and ('kl' in rows[0]) == (kind != 'rae')


def test_the_margins_of_the_alignment_count():
    tok, x = build(ALIGNED).train(), World().batch(range(4))['image']
    look = lambda **kw: tokenizer_losses(tok, x, Stage('s', dict(l1=1., vf=1.), (), **kw))['vf'].item()
    torch.manual_seed(1); free = look()
    torch.manual_seed(1); held = look(cos_margin=.5, dist_margin=.25)
    assert held < free and free-held <= .75 + 1e-6


def test_the_adaptive_weight_balances_at_the_encoders_last_convolution():
    tok, x = build(ALIGNED).train(), World().batch(range(4))['image']
    out = tokenizer_losses(tok, x, Stage('s', dict(l1=1., vf=1.), ()))
    size = lambda loss: torch.autograd.grad(loss, tok.encoder.conv_out.weight, retain_graph=True)[0].norm()
    pull, alone = size(out['l1']), size(out['vf'])
    torch.testing.assert_close(out['vf_scale'], pull/(alone+1e-4))
    torch.testing.assert_close(out['loss'], out['l1'] + out['vf_scale']*out['vf'])


def test_an_aligned_encoder_comes_closer_to_its_vfm_than_a_plain_one():
    near = {}
    for weight in (0., 2.):
        tok = build(ALIGNED)
        task = TokenizerTask(tok, Stage('s', dict(l1=1., vf=weight), (), 2e-3, 64, adaptive=False), half_life=50)
        fit(task, loader(World(256), 16), 16*40, lr=lambda step: 2e-3, show=lambda h: None)
        x = World(seed=8).batch(range(16))['image']
        parts = tok.encode_parts(x, tok.vfm_features(x))
        near[weight] = torch.nn.functional.cosine_similarity(tok.align_features(parts.posterior.mean), tok.align_target(parts)).mean().item()
    assert near[2.] > near[0.] + .3


def test_training_noise_of_an_rae_is_bounded_by_tau_and_off_in_eval():
    tok, x = build(FROZEN), World().batch(range(8))['image']
    assert tok.eval().encode(x).logvar is None
    std = tok.train().encode(x).std
    assert std.max() <= FROZEN.tau and len(std[:, 0, 0, 0].unique()) == 8 and build(replace(FROZEN, tau=0.)).train().encode(x).logvar is None


def test_what_is_measured_of_a_latent_in_training_is_that_of_eval(tmp_path):
    # a tokenizer that was just made is in train mode, in which an RAE is noisy
    tok, x = build(FROZEN), World(16)
    want, found = [fit_stats(tok.train(mode), x).state_dict() for mode in (False, True)]
    for k in want: assert torch.equal(found[k], want[k]), k
    kept = [cache_latents(tok.train(mode), x, tmp_path/str(mode)) for mode in (False, True)]
    assert tok.training and {*kept[1].batch([0])} == {*kept[0].batch([0])} and torch.equal(kept[1].batch([0, 5])['mean'], kept[0].batch([0, 5])['mean'])


def test_what_a_stage_and_a_family_cannot_do_together_is_said():
    for config, stage, says in ((FROZEN, Stage('s', dict(l1=1., kl=1.), ()), 'latent of rae-tiny-f8d128 is fixed'),
                                (FROZEN, Stage('s', dict(l1=1., vf=1.), ()), 'align=True'),
                                (CONV, Stage('s', dict(l1=1., vf=1.), ()), 'align=True'),
                                (CONV, Stage('s', dict(l1=1.), ('synthesis>32',)), 'no decoder blocks'),
                                (CONV, Stage('s', dict(l1=1.), ('ldm_adapter',)), 'no parameter of conv-f4d16')):
        with pytest.raises(UserError, match=says): check_stage(build(config), stage)
    with pytest.raises(UserError, match='bf16'): TokenizerTask(build(CONV), STAGES['conv'], precision='fp16')
    with pytest.raises(UserError, match='no VFM to fall back on'):
        build_training(PRESETS['conv-f8d4'], PRESETS['conv-f8d4'].stages, size=64, discriminator='tiny')
    with pytest.raises(UserError, match='looks at no VFM'): build_training(PRESETS['conv-f8d16'], PRESETS['conv-f8d16'].stages, 'tiny')


@pytest.mark.parametrize('name', ['conv-f8d16', 'conv-tiny-f8d16', 'rae-tiny-f8d128'])
def test_the_recipe_runs_stops_and_resumes_to_the_bit(name, tmp_path):
    kw = dict(data=World(64), batch_size=4, log_every=1, show=lambda h: None, save_every=2)
    a, _ = train_tokenizer(name, num_images=24, run=tmp_path/'a', out=tmp_path/'a.safetensors', **kw)
    with pytest.raises(KeyboardInterrupt): train_tokenizer(name, num_images=24, run=tmp_path/'b', **kw | dict(show=stop_after(4)))
    b, _ = train_tokenizer(name, num_images=24, run=tmp_path/'b', **kw)
    assert all(torch.equal(v, b.own_state()[k]) for k, v in a.own_state().items()) and a.name == name and a.stats.fitted
    assert open_tokenizer(tmp_path/'a.safetensors').meta['recipe']['images'] == 24


def stop_after(step):
    def show(history):
        if history[-1]['step'] >= step: raise KeyboardInterrupt
    return show


@pytest.mark.parametrize('name', [k for k, p in PRESETS.items() if isinstance(p, Preset) and p.config.family != 'vfmvae' and p.num_images > 1_000_000])
def test_published_shapes_have_their_published_sizes(name):
    config = PRESETS[name].config
    with torch.device('meta'): tok = families[config.family][1](config, None)
    latent = dict(zip(('conv-f8d4', 'conv-dinov2l-f16d32', 'rae-dinov2b-f16d768'), ((4, 8), (32, 16), (768, 16)), strict=True))[name]
    assert (tok.name, (tok.channels, tok.stride)) == (name, latent) and config.img_size == 256


def test_what_a_baseline_will_cost_is_said(capsys):
    rows = estimate('rae-tiny-f8d128', num_images=32, batch_size=2, steps=1)
    assert len(rows) == 1 and rows[0]['hours'] > 0 and 'together' in capsys.readouterr().out


def test_a_preset_of_a_family_takes_another_vfm_and_size():
    model, _, _ = build_training(Preset(FROZEN, (STAGES['rae'],), 8), (STAGES['rae'],), VFM('vit_tiny_patch16_224', pretrained=False, depth=1), 96)
    assert model.name == 'rae-vit_tiny_patch16_224-f8d192' and model.config.scale == 2
    assert model.encode(torch.zeros(1, 3, 96, 96)).mode().shape == (1, 192, 12, 12)
    assert isinstance(model, RAE) and isinstance(build(ALIGNED), ConvVAE)
