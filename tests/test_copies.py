"""Copies own what they hold: no net that moves, is converted, trained or loaded changes another; and a net is known by its weights, not by its name."""
import copy
import shutil
from dataclasses import replace

import pytest
import torch

from vfmvae.discriminators import ProjectedDiscriminator
from vfmvae.baselines import ConvVAE, ConvVAEConfig, RAE, RAEConfig
from vfmvae.core import UserError
from vfmvae.dit import DiT, DiTConfig, NetFeatures, save_net
from vfmvae.tokenizer import LatentFeatures, load_tokenizer, net_digest, save_tokenizer
from vfmvae.run import EMA
from vfmvae.vae import VFMVAE, VFMVAEConfig
from vfmvae.vfm import tiny_vit, VFM
from vfmvae.views import ResizePadVFM

VFMVAE_TINY = VFMVAEConfig(vfm='tiny', patch=8, scale=1.0, layers=(0, 2, -1), in_dims=(128,)*3, out_dims=(32,)*3, img_size=64, stride=8, channels=16,
                           widen=4, blocks=5, channel_base=1024, channel_max=32, res_blocks=0, fusion=(32,), attention=(), w_dim=16)
CONV_TINY = ConvVAEConfig(channels=4, width=8, mults=(1, 1, 2, 2), blocks=1, decoder_blocks=1, img_size=64, vfm='tiny', patch=8, dim=128)
RAE_TINY = RAEConfig(vfm='tiny', patch=8, channels=128, stride=8, img_size=64, width=32, depth=1, heads=2)
NET_TINY = DiTConfig(in_channels=16, patch_size=2, hidden_size=32, depth=2, num_heads=2, num_classes=3)

def images(n=2): return torch.rand(n, 3, 64, 64, generator=torch.Generator().manual_seed(1))*2-1

def make(kind, vfm=None, seed=0):
    torch.manual_seed(seed)
    vfm = vfm or VFM('tiny')
    return {'vfmvae': lambda: VFMVAE(VFMVAE_TINY, vfm), 'conv': lambda: ConvVAE(CONV_TINY, vfm), 'rae': lambda: RAE(RAE_TINY, vfm), 'vfm': lambda: vfm,
            'net': lambda: DiT(NET_TINY), 'judge': lambda: ProjectedDiscriminator(vfm, size=64)}[kind]().eval()

@torch.no_grad()
def says(net):
    "Everything that a net says about the same input."
    if isinstance(net, VFM): return [*net.features(images()).values(), *[net.features(images()[:, :, :, :32])[-1]]]
    if isinstance(net, DiT): return [net(torch.linspace(-1, 1, 2*16*64).view(2, 16, 8, 8), torch.tensor([.1, .9]), torch.tensor([0, 3]))]
    if isinstance(net, ProjectedDiscriminator): return [net(images())]
    z = net.encode(images()).mode()
    return [z, net.decode(z), *net.vfm_features(images()).values()]

def same(a, b): return all(torch.equal(i, j) for i, j in zip(a, b, strict=True))

KINDS = ['vfmvae', 'conv', 'rae', 'vfm', 'net', 'judge']
USES = {
    'half': lambda m: m.half(), 'bfloat16': lambda m: m.bfloat16(), 'double': lambda m: m.double(), 'meta': lambda m: m.to('meta'),
    'zeroed': lambda m: [p.data.zero_() for p in (*m.parameters(), *m.buffers())],
    'loaded': lambda m: m.load_state_dict({k: torch.zeros_like(v) for k, v in m.state_dict().items()}),
    'assigned': lambda m: m.load_state_dict({k: torch.zeros_like(v) for k, v in m.state_dict().items()}, assign=True),
    'half of the VFM': lambda m: getattr(m, 'vfm', m).half(),
}

@pytest.mark.parametrize('kind', KINDS)
def test_whatever_happens_to_a_copy_the_original_stays(kind):
    net = make(kind)
    before, state = says(net), {k: v.clone() for k, v in net.state_dict().items()}
    for name, use in USES.items():
        twin = copy.deepcopy(net)
        assert same(says(twin), before)
        use(twin)
        assert same(says(net), before), name
        assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items()) and {p.device.type for p in net.parameters()} == {'cpu'}, name

@pytest.mark.parametrize('kind', KINDS)
def test_and_the_other_way_round(kind):
    net = make(kind)
    twin, before = copy.deepcopy(net), says(net)
    USES['zeroed'](net)
    net.half()
    assert same(says(twin), before)

@pytest.mark.parametrize('kind', KINDS[:3])
def test_an_average_owns_its_vfm(kind):
    net = make(kind)
    before, ema = says(net), EMA(net, rampup=None)
    ema.update(net, 8, 8)
    assert same(says(ema.net.eval()), before)
    ema.net.half().to('meta')
    assert same(says(net), before)

@pytest.mark.parametrize('use', [k for k in USES if k != 'zeroed'])
@pytest.mark.parametrize('kind', [k for k in KINDS if k not in ('vfm', 'net')])
def test_nets_that_were_given_one_vfm_do_not_move_each_other(kind, use):
    vfm = VFM('tiny')
    first, second = make(kind, vfm), make(kind, vfm)
    at_first, seen = says(first), says(vfm)
    assert same(says(second), at_first)
    USES[use](second)
    assert same(says(first), at_first) and same(says(vfm), seen)
    USES[use](vfm)
    assert same(says(first), at_first)

def test_two_vfms_of_one_timm_net_are_two_and_leave_it_to_its_owner():
    net = tiny_vit()
    a, b = VFM('a', net=net), VFM('b', net=net, pos_antialias=False)
    want = says(a)
    b.half()
    b.load_state_dict({k: v*0 for k, v in b.state_dict().items()})
    assert same(says(a), want) and all(p.requires_grad and p.dtype == torch.float32 and p.device.type == 'cpu' for p in net.parameters())

def test_twins_take_no_memory_until_they_part():
    vfm = VFM('tiny')
    toks = [make(k, vfm) for k in KINDS[:3]]
    where = {k: p.data_ptr() for k, p in vfm.named_parameters()}
    assert all({k: p.data_ptr() for k, p in t.vfm.named_parameters()} == where and t.vfm is not vfm for t in toks)
    vfm.net.load_state_dict({k: v+1 for k, v in vfm.net.state_dict().items()})
    assert not {p.data_ptr() for p in vfm.parameters()} & {*where.values()}

def test_tables_of_other_sizes_follow_the_weights_of_their_own_net():
    vfm = VFM('tiny', net=tiny_vit(), pos_antialias=False)
    x = images()[:, :, :32]
    before = vfm.features(x)
    twin = copy.deepcopy(vfm)                     # with the tables it has made
    twin.load_state_dict({k: v*2 if k.endswith('pos_embed') else v for k, v in twin.state_dict().items()})
    assert not torch.equal(twin.features(x)[0], before[0]) and all(torch.equal(h, before[k]) for k, h in vfm.features(x).items())
    twin.double()
    assert torch.equal(vfm.features(x)[0], before[0])

# identity ---------------------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('kind', KINDS[:5])
def test_a_net_is_known_by_its_weights(kind):
    net = make(kind)
    name, twin = net_digest(net), copy.deepcopy(net)
    twin.name = 'another'
    assert len(name) == 16 and int(name, 16) >= 0 and net_digest(twin) == name == net_digest(net)
    for k, t in [*twin.state_dict().items()][::7]:
        was = t.clone()
        t.view(-1)[-1] += 1
        assert net_digest(twin) != name, k
        t.copy_(was)
    assert net_digest(twin) == name

def test_what_weights_cannot_tell_counts_too():
    state = make('net').state_dict()
    nets = [DiT(replace(NET_TINY, num_heads=h, data_time=d)) for h in (2, 4) for d in (False, True)]
    for n in nets: n.load_state_dict(state)
    net, bare = tiny_vit(), []
    for mean in (.5, .4):
        net.pretrained_cfg = dict(net.pretrained_cfg, mean=(mean,)*3)
        bare += [VFM('x', net=net, pos_antialias=a) for a in (True, False)]
    tok, vfm = make('vfmvae'), bare[0]
    adapters = [LatentFeatures(tok), LatentFeatures(tok, 1), LatentFeatures(tok, 2), ResizePadVFM(vfm), ResizePadVFM(vfm, .5), NetFeatures(nets[0], tok),
                NetFeatures(nets[0], tok, .25), NetFeatures(nets[0], tok, seed=1), NetFeatures(nets[1], tok), VFMVAE(VFMVAE_TINY)]
    class Plain:
        layers = (0,)
        def __init__(self, name, k=1): self.name, self.k = name, k
    every = [net_digest(s) for s in (*nets, *bare, tok, *adapters, Plain('a'), Plain('b'), Plain('a', 2))]
    assert len({*every}) == len(every)
    assert net_digest(Plain('a')) == net_digest(Plain('a')) and net_digest(ResizePadVFM(copy.deepcopy(vfm))) == net_digest(ResizePadVFM(vfm))

def test_a_file_that_is_written_anew_is_read_anew_and_changes_nothing_that_is_open(tmp_path):
    nets, toks = [make('net', seed=i) for i in (1, 2)], [make('vfmvae', seed=i) for i in (1, 2)]
    for i in (0, 1):
        save_net(tmp_path/f'{i}.safetensors', nets[i])
        save_tokenizer(tmp_path/f't{i}.safetensors', toks[i])
    opened, tok = DiT.load(tmp_path/'0.safetensors'), load_tokenizer(tmp_path/'t0.safetensors')
    had = says(opened), says(tok)
    for a, b in (('0', '1'), ('t0', 't1')):
        for end in ('safetensors', 'json'): shutil.copyfile(tmp_path/f'{b}.{end}', tmp_path/f'{a}.{end}')       # in place, as cp does
    assert same(says(opened), had[0]) and same(says(tok), had[1])
    assert same(says(DiT.load(tmp_path/'0.safetensors')), says(nets[1])) and same(says(load_tokenizer(tmp_path/'t0.safetensors')), says(toks[1]))

# doors ------------------------------------------------------------------------------------------------------------------------------------------

def line(f, *args):
    with pytest.raises(UserError) as e: f(*args)
    assert '\n' not in str(e.value) and len(str(e.value)) < 600
    return str(e.value)

@pytest.mark.parametrize('kind', [k for k in KINDS if k not in ('net', 'judge')])
def test_images_of_another_meaning_are_refused(kind):
    net, x = make(kind), images()
    see = net.features if kind == 'vfm' else net.encode
    for odd in (((x+1)*127.5).byte(), ((x+1)*127.5).int(), x > 0, x[0], x[:, :1], x[:, :, :30], x[:0]):
        for mode in (True, False):
            net.train(mode)
            line(see, odd)
    for odd in (torch.full_like(x, float('nan')), x/0, (x+1)*127.5):
        line(see, odd)
        net.train()
        see(odd)                                  # the losses of a training name it, and skip the step
        net.eval()

@pytest.mark.parametrize('kind', [k for k in KINDS if k not in ('net', 'judge')])
@pytest.mark.parametrize('dtype', [torch.float64, torch.float16, torch.bfloat16])
def test_floats_of_another_type_are_taken(kind, dtype):
    net, x = make(kind), images().to(dtype)
    see = (lambda x: net.features(x, [-1])[-1]) if kind == 'vfm' else lambda x: net.encode(x).mean
    assert torch.equal(see(x), see(x.float()))

@pytest.mark.parametrize('kind', KINDS[:3])
def test_latents_that_are_none_are_refused(kind):
    net = make(kind)
    z = net.encode(images()).mode()
    for odd in (z.int(), z[0], z[:, 1:], torch.cat([z, z], 1), z[:0], z[..., :0], z.tolist()): line(net.decode, odd)
    assert torch.equal(net.decode(z.double()), net.decode(z))

def test_a_vfmvae_in_half_precision_on_a_cpu_encodes_and_says_why_it_does_not_decode():
    tok, x = make('vfmvae'), images()
    want = tok.encode(x).mean
    tok.bfloat16()
    got = tok.encode(x.bfloat16()).mean
    assert (got-want).abs().max() < .1*want.abs().max() and 'float32' in line(tok.decode, got)
