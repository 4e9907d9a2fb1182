"""The hub's words (save, load, push), one loader for everybody's tokenizers, and a tokenizer inside a pipeline of diffusers."""
import json, os, subprocess, sys, zlib
from dataclasses import asdict, replace
from pathlib import Path
import numpy as np, pytest, torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from vfmvae.baselines import ConvVAE, ConvVAEConfig, RAE, RAEConfig
from vfmvae.core import UserError
from vfmvae.files import data_dir, load_weights, read_json, save_weights
from vfmvae.dit import DiT, DiTConfig, FAMILIES
from vfmvae.published_baselines import load_rae
from vfmvae.published import DiffusersVAE
from vfmvae.tokenizer import open_tokenizer
from vfmvae.tokenizer import families, load_tokenizer, net_digest, Pretrained, save_tokenizer
from vfmvae.vae import VFMVAE, VFMVAEConfig
from vfmvae.vfm import VFM

GOLDEN = Path(__file__).parent/'golden'
VFM_FILE = data_dir()/'weights'/'vfm-tiny.safetensors'
TINY = VFMVAEConfig(vfm='tiny', patch=8, scale=1., layers=(0, 2, -1), in_dims=(128,)*3, out_dims=(8,)*3, img_size=32, stride=8, channels=4, widen=2, blocks=4,
                    channel_base=2048, channel_max=16, res_blocks=0, fusion=(8, 8), attention=(1,), w_dim=8)
CONV = ConvVAEConfig(channels=4, width=8, mults=(1, 2), blocks=1, decoder_blocks=1, img_size=16)
FROZEN = RAEConfig('tiny', 8, 128, stride=8, img_size=32, width=16, depth=1, heads=2)
CONFIGS = [TINY, replace(TINY, mode='discrete', vocab=32, codebooks=2, align=False, legacy=True, progressive=False), CONV,
           replace(CONV, mults=(1, 2, 2), vfm='tiny', patch=8, dim=128), FROZEN, replace(FROZEN, published=True, places=4, mlp=20, eps=1e-6, layer=-2)]
NET = dict(in_channels=4, hidden_size=16, depth=2, num_heads=2, num_classes=3, encoder_depth=1, projector_dim=8)
NETS = [DiTConfig(**{**FAMILIES[k], **NET, **({'head_hidden_size': 16, 'head_num_heads': 2} if k == 'rae' else {})}) for k in FAMILIES]


def made(config):
    "A net with nothing at rest, a scale and facts of its own."
    torch.manual_seed(0)
    if isinstance(config, DiTConfig): net = DiT(config)
    else:
        net = families[config.family][1](config, VFM('tiny') if config.vfm else None)
        net.stats.set(torch.randn(net.channels), torch.rand(net.channels)+.5)
        net.name = 'mine'
    with torch.no_grad():
        for k, p in net.named_parameters():
            if not k.startswith('vfm.'): p.add_(.1*torch.randn_like(p))
    net.meta = dict(note=['kept', 1], licence='CC0-1.0', **({'tokenizer': 'mine'} if isinstance(config, DiTConfig) else {}))
    return net.eval()


def line(f, *args, **kwargs):
    "The one line of the refusal."
    with pytest.raises(UserError) as e: f(*args, **kwargs)
    assert '\n' not in str(e.value)
    return str(e.value)


# save, load --------------------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('config', CONFIGS+NETS, ids=lambda c: f'{type(c).__name__}{(CONFIGS+NETS).index(c)}')
def test_what_is_saved_comes_back(config, tmp_path):
    net = made(config)
    net.save_pretrained(tmp_path/'a')
    assert sorted(os.listdir(tmp_path/'a')) == ['README.md', 'config.json', 'model.safetensors']
    again = type(net).from_pretrained(tmp_path/'a')
    base = (DiT.load if isinstance(net, DiT) else load_tokenizer)(tmp_path/'a')
    for x in (again, base):
        assert type(x) is type(net) and x.config == net.config and not x.training and getattr(x, 'name', None) == getattr(net, 'name', None)
        assert net_digest(x) == net_digest(net)                # weights, scale, VFM and configuration
        assert {k: x.meta[k] for k in net.meta} == net.meta
    again.save_pretrained(tmp_path/'b')
    assert read_json(tmp_path/'a/config.json') == read_json(tmp_path/'b/config.json')       # with a digest of every tensor
    with safe_open(tmp_path/'a/model.safetensors', 'pt') as f: assert not any(k.startswith('vfm.') for k in f.keys())   # noqa: SIM118


def test_a_vfm_is_chosen_as_load_tokenizer_does(tmp_path):
    made(TINY).save_pretrained(tmp_path)
    assert 'built without its VFM' in line(VFMVAE.from_pretrained(tmp_path, vfm=False).encode, torch.zeros(1, 3, 32, 32))
    vfm = VFM('tiny', pretrained=False)
    got = VFMVAE.from_pretrained(tmp_path, vfm=vfm, name='other')
    assert got.name == 'other' and net_digest(got.vfm) == net_digest(vfm) != net_digest(VFM('tiny'))
    assert 'patch 14' in line(VFMVAE.from_pretrained, tmp_path, vfm=VFM('vit_small_patch14_dinov2', False, depth=1))


def test_another_family_says_so(tmp_path):
    nets = {type(n): n for n in map(made, (TINY, CONV, FROZEN, NETS[0]))}
    for kind, net in nets.items():
        net.save_pretrained(tmp_path/kind.__name__)
        for other in set(nets)-{kind}:
            said = line(other.from_pretrained, tmp_path/kind.__name__)
            assert 'holds a' in said and 'open it with' in said, said
    ConvVAE(replace(CONV, mults=(1, 2, 2), vfm='dinov2-b', patch=14, dim=768)).save_pretrained(tmp_path/'far')
    assert 'holds a ConvVAE' in line(VFMVAE.from_pretrained, tmp_path/'far')       # before its VFM is asked for
    for kind, net in nets.items():
        said = line(load_tokenizer if kind is DiT else DiT.load, tmp_path/kind.__name__)
        assert ('holds a net' if kind is DiT else f'holds a {net.config.family if kind is not DiT else ""} tokenizer') in said


def spoiled(folder, tensors=None, **meta):
    t, m = load_weights(folder)
    save_weights(folder, t | (tensors or {}), m | meta)
    return folder

@pytest.mark.parametrize('config', [TINY, CONV, FROZEN, NETS[0]], ids=lambda c: type(c).__name__)
def test_what_does_not_fit_is_one_line(config, tmp_path):
    net = made(config)
    load = type(net).from_pretrained
    def fresh():
        net.save_pretrained(tmp_path)
        return tmp_path
    key = next(iter(load_weights(fresh())[0]))
    assert 'extra_tensor' in line(load, spoiled(fresh(), dict(extra_tensor=torch.zeros(1))))
    t, m = load_weights(fresh())
    save_weights(tmp_path, {k: v for k, v in t.items() if k != key}, m)
    assert key in line(load, tmp_path)
    assert 'NaN' in line(load, spoiled(fresh(), {key: t[key]*float('nan')})) and key in line(load, spoiled(fresh(), {key: torch.zeros(1)}))
    assert "no setting 'colour'" in line(load, spoiled(fresh(), config=m['config'] | dict(colour=1)))
    assert 'does not fit' in line(load, spoiled(fresh(), config=m['config'] | {next(iter(asdict(config))): [[]]}))
    fresh()
    told = read_json(tmp_path/'config.json')
    for v in (2, 'x', None):
        (tmp_path/'config.json').write_text(json.dumps(told | dict(vfmvae_format=v)))
        assert 'this version reads 1' in line(load, tmp_path)
    for text in ('', '[]', '{', '{"a": NaN}'):
        (tmp_path/'config.json').write_text(text)
        assert 'config.json' in line(load, tmp_path)
    (tmp_path/'config.json').unlink()
    assert net_digest(load(tmp_path)) == net_digest(net)         # the head of the tensors' file says it, too
    (tmp_path/'model.safetensors').write_bytes((tmp_path/'model.safetensors').read_bytes()[:-9])
    assert 'not a whole safetensors file' in line(load, tmp_path)
    (tmp_path/'model.safetensors').unlink()
    line(load, tmp_path)


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path/'config.json').write_text('{"model_type": "bert"}')
    assert 'not of this library' in line(made(CONV).save_pretrained, tmp_path) and read_json(tmp_path/'config.json') == {'model_type': 'bert'}
    (tmp_path/'file').touch()
    assert 'is a file' in line(made(CONV).save_pretrained, tmp_path/'file')
    (tmp_path/'x').mkdir()
    (tmp_path/'x/README.md').write_text('my own')
    made(CONV).save_pretrained(tmp_path/'x')
    assert (tmp_path/'x/README.md').read_text() == 'my own'


# the hub -----------------------------------------------------------------------------------------------------------------------------------------

@pytest.fixture
def hub(monkeypatch, tmp_path):
    "A hub in a folder: what is uploaded, and where downloads come from."
    import huggingface_hub.hub_mixin as mixin
    import vfmvae.tokenizer
    up = tmp_path/'hub'
    class Api:
        def __init__(self, token=None): pass
        def create_repo(self, repo_id, **kwargs): return type('Url', (), dict(repo_id=repo_id))
        def upload_folder(self, repo_id, folder_path, **kwargs):
            (up/repo_id).mkdir(parents=True)
            for f in Path(folder_path).iterdir(): (up/repo_id/f.name).write_bytes(f.read_bytes())
            return type('Commit', (), dict(commit_url=f'address of {repo_id}', __str__=lambda s: f'address of {repo_id}'))()
    def download(repo_id, filename, **kwargs):
        if not (up/repo_id/filename).is_file(): raise OSError('no such file')
        return str(up/repo_id/filename)
    monkeypatch.setattr(mixin, 'HfApi', Api)
    monkeypatch.setattr(vfmvae.tokenizer, 'hf_hub_download', download)
    return up


@pytest.mark.parametrize('config', [TINY, CONV, replace(CONV, mults=(1, 2, 2), vfm='dinov2-b', patch=14, dim=768), FROZEN, NETS[0]],
                         ids=lambda c: f'{type(c).__name__}-{getattr(c, "vfm", None)}')
def test_what_is_pushed_has_a_card_and_comes_back(config, hub):
    from huggingface_hub import ModelCard
    net = made(config) if getattr(config, 'vfm', None) in (None, 'tiny') else ConvVAE(config)
    net.meta = dict(licence='CC0-1.0') if config is not FROZEN else {}
    assert 'me/it' in str(net.push_to_hub('me/it', private=True))
    assert sorted(os.listdir(hub/'me/it')) == ['README.md', 'config.json', 'model.safetensors']
    card = ModelCard.load(hub/'me/it/README.md')
    assert card.data.library_name == 'vfmvae' and {'vfmvae', 'image-tokenizer', 'latent-diffusion'} <= set(card.data.tags)
    assert card.data.license == (None if config is FROZEN else 'cc0-1.0')
    if getattr(config, 'vfm', None):
        said = next(s for s in card.text.splitlines() if 'Frozen VFM' in s)
        assert config.vfm in said and 'Apache-2.0'.lower() in said.lower()      # of the tiny one, and of DINOv2
    assert f'{type(net).__name__}.from_pretrained' in card.text
    again = type(net).from_pretrained('me/it', **({} if isinstance(net, DiT) else dict(vfm=False)))
    mine, theirs = ({k: v for k, v in n.state_dict().items() if not k.startswith('vfm.')} for n in (net, again))
    assert mine.keys() == theirs.keys() and all(torch.equal(v, theirs[k]) for k, v in mine.items())


def test_no_repository_no_network_no_token_are_one_line(monkeypatch, hub):
    for name in ('me/none', 'nothing-of-this-name', 'a b/c', '/no/folder', 'x'*300):
        said = line(VFMVAE.from_pretrained, name)
        assert 'user/name' in said and 'network' in said and 'local folder' in said
    assert 'no path' in line(DiT.from_pretrained, '')
    import huggingface_hub.hub_mixin as mixin
    def refuses(*args, **kwargs): raise PermissionError('401: nobody is logged in\nmore')
    monkeypatch.setattr(mixin.HfApi, 'create_repo', refuses)
    said = line(made(CONV).push_to_hub, 'me/it')
    assert '401' in said and 'hf auth login' in said and 'save_pretrained' in said


def test_it_is_the_mixin_of_the_hub_and_costs_nothing_beside_timm():
    from huggingface_hub import ModelHubMixin
    assert all(issubclass(c, Pretrained) and issubclass(c, ModelHubMixin) for c in (VFMVAE, ConvVAE, RAE, DiT))
    code = 'import sys, torch, timm; a = set(sys.modules); import vfmvae.tokenizer; print(*(m for m in set(sys.modules)-a if m.split(".")[0] != "vfmvae"))'
    new = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.split()
    assert {m.split('.')[0] for m in new} <= {'huggingface_hub', 'packaging', 'numpy'} and len(new) < 10, new    # milliseconds


def test_copies_and_pickles_of_a_net_are_not_disturbed(tmp_path):
    import copy, pickle
    for net in (made(CONV), made(NETS[0])):
        assert net_digest(copy.deepcopy(net)) == net_digest(pickle.loads(pickle.dumps(net))) == net_digest(net)


# RAE of diffusers --------------------------------------------------------------------------------------------------------------------------------

def values(name, shape):
    "Weights that a name and a shape tell, as tests/golden/rae.md says."
    r = np.random.Generator(np.random.Philox(zlib.crc32(name.encode()))).standard_normal(shape)
    if name.endswith(('norm.weight', 'norm1.weight', 'norm2.weight', 'before.weight', 'after.weight')): r = 1+.1*r
    elif name in ('encoder_std', '_latents_std'): r = .3+abs(r)*.3
    elif name.endswith(('bias', 'mean')): r = .2*r
    elif len(shape) > 1 and 'embedding' not in name.replace('patch_embeddings', '') and 'token' not in name: r = r/np.prod(shape[1:])**.5
    else: r = .5*r
    return torch.from_numpy(r.astype(np.float32))

def golden_rae():
    with safe_open(GOLDEN/'rae_tiny.safetensors', 'pt') as f: return {k: json.loads(v) for k, v in f.metadata().items()}

RAES = golden_rae()

def rae_files(case, folder=None, **changed):
    "Weights and configuration of a case; written as diffusers does if there is a folder."
    sd, config = {k: values(k, s) for k, s in RAES[case]['shapes'].items()}, RAES[case]['config'] | changed
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(sd, folder/'diffusion_pytorch_model.safetensors', metadata={'format': 'pt'})
        (folder/'config.json').write_text(json.dumps(config))
    return sd, config


@torch.no_grad()
@pytest.mark.parametrize('case', sorted(RAES))
def test_autoencoder_rae_gives_the_numbers_of_diffusers(case, tmp_path):
    g, (_, c) = load_file(GOLDEN/'rae_tiny.safetensors'), rae_files(case, tmp_path)
    tok = load_tokenizer(tmp_path).double()
    x = torch.from_numpy(np.random.Generator(np.random.Philox(7)).random((1, 3, tok.config.img_size, tok.config.img_size)))
    z, y = tok.encode(x*2-1).mean, g[f'{case}.y']*2-1
    want = g[f'{case}.z'] if c['reshape_to_2d'] else g[f'{case}.z'].mT.reshape(z.shape)
    assert isinstance(tok, RAE) and tok.stride == c['patch_size'] and (tok.config.places > 0) == (case == 'dinov2-places') and tok.config.tau == c['noise_tau']
    print(case, 'latents', float((z-want).abs().max()), 'images', float((tok.decode(want)-y).abs().max()))
    torch.testing.assert_close(z, want, atol=2e-6, rtol=0)             # a VFM answers in float32
    torch.testing.assert_close(tok.decode(want), y, atol=5e-7, rtol=0)
    assert want.std() > .3 and y.std() > .1


@torch.no_grad()
def test_an_opened_rae_is_a_tokenizer_like_any_other(tmp_path):
    rae_files('dinov2-places', tmp_path/'a/vae')
    tok, plain = open_tokenizer(tmp_path/'a'), load_tokenizer(tmp_path/'a/vae/diffusion_pytorch_model.safetensors', vfm=False)
    n = tok.config.img_size
    x = torch.rand(2, 3, n, n, generator=torch.Generator().manual_seed(0))*2-1
    z = tok.encode(x).mode()
    assert tok.vfm is not None and plain.vfm is None and torch.equal(plain.decode(z), tok.decode(z))
    assert f'give images of {n} px' in line(tok.encode, torch.zeros(1, 3, n*2, n)) and 'position' in line(tok.decode, torch.zeros(1, 64, 2, 2))
    torch.manual_seed(0)
    noisy = tok.train().encode(x)
    torch.testing.assert_close(noisy.mean, z)
    raw = noisy.std*tok.place_std                                     # noise is drawn before the scale of a position: of one strength everywhere, below tau
    torch.testing.assert_close(raw, raw[:, :1, :1, :1].expand_as(raw))
    assert 0 < raw.min() and raw.max() < tok.config.tau
    tok.eval().save_pretrained(tmp_path/'ours')
    again = RAE.from_pretrained(tmp_path/'ours', vfm=tok.vfm)
    assert net_digest(again) == net_digest(tok) and torch.equal(again.encode(x).mean, z) and again.config == tok.config
    h = tok.vfm_features(x)[-2]                                                # the encoder's last block; its norm has no weights, and the file's eps
    n = RAE(replace(tok.config, eps=.5), tok.vfm).eval().encode_parts(x).moments
    torch.testing.assert_close(n.flatten(2).mT, (h-h.mean(-1, keepdim=True))/(h.var(-1, correction=0, keepdim=True)+.5).sqrt(), atol=1e-5, rtol=0)
    rae_files('mae-wide', tmp_path/'b')
    free = load_tokenizer(tmp_path/'b')
    assert free.encode(torch.zeros(1, 3, 40, 16)).mean.shape == (1, 128, 5, 2) and free.decode(torch.zeros(1, 128, 2, 5)).shape == (1, 3, 16, 40)


@pytest.mark.parametrize('changed, says', [
    (dict(encoder_type='clip'), 'none of dinov2, siglip2, mae'), (dict(encoder_type=None), 'none of'), (dict(num_channels=1), 'num_channels'),
    (dict(image_size=64), 'only 48'), (dict(colour=1), "no setting 'colour'"), (dict(noise_tou=1), 'nearest: noise_tau'), (dict(noise_tau=-1), 'noise_tau'),
    (dict(encoder_hidden_size=80), 'multiple of 64'), (dict(encoder_input_size=40), 'does not divide'), (dict(patch_size=0), 'patch_size'),
    (dict(scaling_factor=0), 'scaling_factor'), (dict(reshape_to_2d='x'), 'reshape_to_2d'), (dict(decoder_num_hidden_layers=3), 'missing: blocks.2'),
    (dict(decoder_num_hidden_layers=1), 'extra: blocks.1'), (dict(encoder_num_hidden_layers=3), 'this encoder'), (dict(decoder_hidden_size=64), 'misshaped'),
    (dict(encoder_hidden_size=128), '_latents_mean'), (dict(patch_size=8), 'misshaped: out'), (dict(encoder_type='siglip2'), 'this encoder'),
    (dict(encoder_num_hidden_layers=10**6), 'encoder_num_hidden_layers'), (dict(decoder_num_attention_heads=5), 'heads')])
def test_a_rae_that_is_not_one_is_one_line(changed, says):
    sd, config = rae_files('dinov2-places', **changed)
    assert says in line(load_rae, sd, config=config)


def test_tensors_of_a_rae_are_strict(tmp_path):
    sd, config = rae_files('siglip2-channels', tmp_path)
    tower, zeros = 'encoder.vision_model.', torch.zeros
    for key, what in (('_latents_std', zeros(64, 1, 1)), ('_latents_mean', torch.full((64, 1, 1), float('nan'))), ('encoder_std', zeros(1, 3, 1, 1)),
                      ('decoder.decoder_pred.bias', zeros(3)), (f'{tower}embeddings.position_embedding.weight', zeros(3, 64)), ('decoder.more', zeros(1)),
                      ('more', zeros(1)), (f'{tower}encoder.layers.0.self_attn.k_proj.weight', zeros(2, 2))):
        line(load_rae, sd | {key: what}, config=config)
    for key in sd:
        if '.head.' not in key: line(load_rae, {k: v for k, v in sd.items() if k != key}, config=config)
    assert 'config.json' in line(load_rae, sd)
    (tmp_path/'config.json').unlink()
    assert 'give the folder' in line(load_tokenizer, tmp_path/'diffusion_pytorch_model.safetensors')
    (tmp_path/'config.json').write_text(json.dumps(config | dict(_class_name='AutoencoderDC')))
    line(load_tokenizer, tmp_path)


@torch.no_grad()
def test_a_live_autoencoder_rae(tmp_path):
    pytest.importorskip('diffusers')
    pytest.importorskip('transformers')
    from diffusers import AutoencoderRAE
    torch.manual_seed(0)
    net = AutoencoderRAE('mae', 64, 16, 2, 48, 2, 4, 100, 16, 64, latents_mean=torch.randn(64, 4, 4), latents_std=torch.rand(64, 4, 4)+.5).eval()
    for p in net.parameters(): p.add_(.1*torch.randn_like(p))
    net.save_pretrained(tmp_path)
    net, tok, x = net.double(), load_tokenizer(tmp_path).double(), torch.rand(2, 3, 64, 64, dtype=torch.float64)
    z = net.encode(x).latent
    torch.testing.assert_close(tok.encode(x*2-1).mean, z, atol=1e-5, rtol=0)
    torch.testing.assert_close(tok.decode(z), net.decode(z).sample*2-1, atol=1e-6, rtol=0)


# one loader --------------------------------------------------------------------------------------------------------------------------------------

@torch.no_grad()
def test_load_tokenizer_opens_what_it_is_given(tmp_path):
    conv = ConvVAE(ConvVAEConfig(width=32, mults=(1, 1), blocks=1, decoder_blocks=1, groups=32, img_size=16)).eval()
    aligned = ConvVAE(replace(conv.config, vfm='tiny', patch=8, dim=128)).eval()
    x = torch.rand(1, 3, 16, 16)*2-1
    bare = lambda net: {k: v for k, v in net.own_state().items() if 'stats' not in k}
    torch.save(dict(state_dict={f'first_stage_model.{k}': v for k, v in bare(conv).items()}), tmp_path/'sd.ckpt')
    save_file(bare(conv), tmp_path/'sd.safetensors')
    torch.save(dict(state_dict=bare(aligned) | {'loss.discriminator.w': torch.zeros(1), 'foundation_model.w': torch.zeros(1)}), tmp_path/'va.pt')
    save_tokenizer(tmp_path/'ours.safetensors', conv)
    conv.save_pretrained(tmp_path/'folder')
    for name in ('sd.ckpt', 'sd.safetensors', 'va.pt', 'ours.safetensors', 'folder'):
        for opened in (load_tokenizer(tmp_path/name, name='n'), open_tokenizer(tmp_path/name)):
            net = aligned if name == 'va.pt' else conv
            assert type(opened) is ConvVAE and opened.config.align == net.config.align and torch.equal(opened.encode(x).mean, net.encode(x).mean)
        assert load_tokenizer(tmp_path/name, name='n').name == 'n'
    assert 'holds a ConvVAE, no RAE' in line(load_tokenizer, tmp_path/'sd.ckpt', of=RAE)
    save_file(load_weights(VFM_FILE)[0], tmp_path/'foreign.safetensors')
    assert 'no weights at' in line(load_tokenizer, tmp_path/'none') and 'this is a vision transformer' in line(load_tokenizer, tmp_path/'foreign.safetensors')
    assert 'a VFM with VFM' in line(load_tokenizer, VFM_FILE)
    made(NETS[0]).save_pretrained(tmp_path/'net')
    assert 'holds a net' in line(open_tokenizer, tmp_path/'net')


@torch.no_grad()
def test_load_tokenizer_opens_a_folder_of_diffusers(tmp_path):
    diffusers = pytest.importorskip('diffusers')
    torch.manual_seed(0)
    net = diffusers.AutoencoderKL(block_out_channels=(32, 32), down_block_types=['DownEncoderBlock2D']*2, up_block_types=['UpDecoderBlock2D']*2,
                                  norm_num_groups=8, scaling_factor=.5).eval()
    net.save_pretrained(tmp_path/'pipe/vae')
    x = torch.rand(1, 3, 16, 16)*2-1
    for at in ('pipe', 'pipe/vae', 'pipe/vae/diffusion_pytorch_model.safetensors'):
        torch.testing.assert_close(load_tokenizer(tmp_path/at).encode(x).mean, net.encode(x).latent_dist.mean*.5, atol=1e-5, rtol=1e-5)


# in a pipeline -----------------------------------------------------------------------------------------------------------------------------------

@torch.no_grad()
@pytest.mark.parametrize('config', [TINY, replace(CONV, mults=(1, 2, 2, 2)), FROZEN], ids=lambda c: type(c).__name__)
def test_a_tokenizer_is_the_vae_of_a_pipeline(config):
    diffusers = pytest.importorskip('diffusers')
    tok = made(config)
    torch.manual_seed(0)
    net = diffusers.DiTTransformer2DModel(num_attention_heads=2, attention_head_dim=8, in_channels=tok.channels, out_channels=tok.channels, num_layers=1,
                                          sample_size=4, patch_size=2, norm_num_groups=2, num_embeds_ada_norm=1000)
    for p in net.parameters(): p.add_(.1*torch.randn_like(p))
    seen, decode = [], tok.decode
    tok.decode = lambda z: (seen.append(z), decode(z))[1]
    pipe = diffusers.DiTPipeline(net, DiffusersVAE(tok), diffusers.DDIMScheduler(clip_sample=False)).to('cpu')
    pipe.set_progress_bar_config(disable=True)
    images = pipe([1, 2], generator=torch.Generator().manual_seed(0), num_inference_steps=3, output_type='pt').images
    want = (decode(seen[0])/2+.5).clamp(0, 1)
    assert len(seen) == 1 and seen[0].shape == (2, tok.channels, 4, 4) and torch.equal(images, want) and images.std() > .02
    assert pipe.vae.device.type == 'cpu' and pipe.vae.dtype == torch.float32 and pipe.vae.config['scaling_factor'] == pipe.vae.config.scaling_factor == 1


@torch.no_grad()
def test_image_to_image_takes_the_same_way():
    diffusers = pytest.importorskip('diffusers')
    from diffusers.image_processor import VaeImageProcessor
    tok = made(CONV)
    vae, x = DiffusersVAE(tok), torch.rand(2, 3, 16, 16)
    scale = 2**(len(vae.config.block_out_channels)-1)
    assert scale == tok.stride and DiffusersVAE(made(TINY)).config.block_out_channels == (4,)*4 and vae.config.sample_size == 16
    processor = VaeImageProcessor(vae_scale_factor=scale)
    seen = processor.preprocess(x)
    posterior = vae.encode(seen).latent_dist
    assert torch.equal(posterior.mode(), tok.encode(x*2-1).mean) and torch.equal(posterior.std, tok.encode(x*2-1).std) and posterior.std.min() > 0
    draw = lambda p: p.sample(torch.Generator().manual_seed(0))
    z = draw(vae.encode(seen, return_dict=False)[0])*vae.config.scaling_factor
    assert torch.equal(z, draw(posterior)) and not torch.equal(z, posterior.mode())
    out = processor.postprocess(vae.decode(z, return_dict=False)[0], output_type='pt')
    assert torch.equal(out, (tok.decode(z)/2+.5).clamp(0, 1)) and torch.equal(vae.decode(z).sample, tok.decode(z))
    for f in (vae.enable_slicing, vae.disable_slicing, vae.enable_tiling, vae.disable_tiling): f()
    assert diffusers and 'powers of 2' in line(DiffusersVAE, made(replace(FROZEN, stride=12, img_size=48)))


@torch.no_grad()
def test_stable_diffusion_image_to_image():
    diffusers = pytest.importorskip('diffusers')
    pytest.importorskip('transformers')
    tok = made(replace(CONV, mults=(1, 1, 2, 2), img_size=64))
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(sample_size=8, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, cross_attention_dim=8,
                                          attention_head_dim=2, down_block_types=('DownBlock2D', 'CrossAttnDownBlock2D'),
                                          up_block_types=('CrossAttnUpBlock2D', 'UpBlock2D'))
    pipe = diffusers.StableDiffusionImg2ImgPipeline(DiffusersVAE(tok), None, None, unet, diffusers.DDIMScheduler(), None, None, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    call = dict(prompt_embeds=torch.zeros(1, 2, 8), image=torch.rand(1, 3, 64, 64), guidance_scale=1., num_inference_steps=4, strength=.5)
    z, images = (pipe(**call, generator=torch.Generator().manual_seed(0), output_type=k).images for k in ('latent', 'pt'))
    assert z.shape == (1, 4, 8, 8) and torch.equal(images, (tok.decode(z)/2+.5).clamp(0, 1))
