"""Laws of the diffusion transformer, its loader and its feature source; what does not fit is said in one line."""
import argparse, os, pickle, re
from dataclasses import asdict

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from vfmvae.core import build_config, Gaussian, UserError
from vfmvae.tokenizer import image_seeds
from vfmvae.dit import DiT, DiTConfig, FAMILIES, NetFeatures, save_net
from vfmvae.layers import sincos_table
from vfmvae.dit_layers import Block, modulations, rope_table, rotate
from vfmvae.features import banks, FeatureSource
from vfmvae.samplers import classifier_free, internal_guidance, pack_state, sample, Sampler, velocity_field
from vfmvae.published import load_net
from vfmvae.protocols import LatentStats

SMALL = dict(in_channels=4, patch_size=2, hidden_size=48, depth=3, num_heads=4, num_classes=10, encoder_depth=2, projector_dim=40)
OWN = {'sit': {}, 'lightningdit': {}, 'repa': dict(z_dims=(24, 16)), 'reg': dict(z_dims=(24,), cls_dim=20),
       'rae': dict(patch_size=1, head_hidden_size=80, head_num_heads=4)}

def make(family, seed=0, alive=True, **more):
    torch.manual_seed(seed)
    net = DiT(DiTConfig(**{**FAMILIES[family], **SMALL, **OWN[family], **more})).eval()
    if alive:
        with torch.no_grad():
            for p in net.parameters(): p.add_(.1*torch.randn_like(p))
    return net

def batch(net, b=3, h=8, w=8, seed=1):
    g, c = torch.Generator().manual_seed(seed), net.config
    x = [torch.randn(b, c.in_channels, h, w, generator=g), torch.rand(b, generator=g), torch.randint(0, c.num_classes+1, (b,), generator=g)]
    return x + ([torch.randn(b, c.cls_dim, generator=g)] if c.cls_dim else [])

def flat(out): return torch.cat([a.flatten(1) for a in (out if isinstance(out, tuple) else (out,))], 1)

@pytest.fixture(params=FAMILIES)
def net(request): return make(request.param)

# laws ------------------------------------------------------------------------------------------------------------------------------------------

@torch.no_grad()
@pytest.mark.parametrize('family', FAMILIES)
def test_a_new_net_answers_zero_and_its_blocks_do_nothing(family):
    net = make(family, alive=False, base_depth=2)
    p = net(*batch(net), layers=net.layers)
    assert flat(net(*batch(net))).abs().max() == 0 == p.base.abs().max()
    assert all(torch.equal(p.tokens[i], p.tokens['embedder']) for i in range(net.config.depth))

@torch.no_grad()
def test_images_of_a_batch_do_not_meet(net):
    x, order = batch(net, 5), torch.tensor([3, 0, 4, 2, 1])
    want = flat(net(*x))
    torch.testing.assert_close(flat(net(*(a[order] for a in x))), want[order], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(flat(net(*(a[2:3] for a in x))), want[2:3], atol=1e-5, rtol=1e-5)
    assert flat(net(*x)).shape == (5, x[0][0].numel() + net.config.cls_dim)

@torch.no_grad()
def test_merged_is_plain(net):
    x = batch(net)
    net.merge = False
    plain, keys = net(*x, layers=net.layers), list(net.state_dict())
    net.merge = True
    merged = net(*x, layers=net.layers)
    torch.testing.assert_close(merged.v, plain.v, atol=1e-5, rtol=1e-5)
    for k in net.layers: torch.testing.assert_close(merged.tokens[k], plain.tokens[k], atol=1e-5, rtol=1e-5)
    assert list(net.state_dict()) == keys

def test_merged_gradients_are_plain_gradients():
    net = make('sit')
    grads = []
    for net.merge in (False, True):
        net.zero_grad()
        net(*batch(net)).square().mean().backward()
        grads.append({k: p.grad.clone() for k, p in net.named_parameters()})
    for k in grads[0]: torch.testing.assert_close(grads[1][k], grads[0][k], atol=1e-6, rtol=1e-4)

@torch.no_grad()
def test_labels_are_dropped_in_training_only(net):
    z, t, y, *cls = batch(net)
    y, null = torch.tensor([1, 2, 3]), torch.full((3,), 10)
    assert torch.equal(flat(net(z, t, y, *cls)), flat(net(z, t, y, *cls)))
    net.train()
    drop = torch.tensor([True, False, True])
    torch.testing.assert_close(flat(net(z, t, y, *cls, drop=drop)), flat(net.eval()(z, t, torch.where(drop, null, y), *cls)))
    with pytest.raises(UserError, match='for training only'): net(z, t, y, *cls, drop=drop)
    always = DiT(DiTConfig(**{**asdict(net.config), 'label_dropout': .999})).train()
    always.load_state_dict(net.state_dict())
    torch.manual_seed(0)
    torch.testing.assert_close(flat(always(z, t, y, *cls)), flat(net(z, t, null, *cls)))
    assert torch.equal(flat(always.eval()(z, t, y, *cls)), flat(net(z, t, y, *cls)))
    never = DiT(DiTConfig(**{**asdict(net.config), 'label_dropout': 0.})).train()
    never.load_state_dict(net.state_dict())
    assert torch.equal(flat(never(z, t, y, *cls)), flat(net(z, t, y, *cls)))

def test_the_share_of_dropped_labels():
    net = make('sit', label_dropout=.25).train()
    seen = []
    net.y_embedder.register_forward_hook(lambda m, args, out: seen.append(args[1]))
    torch.manual_seed(0)
    with torch.no_grad():
        for _ in range(20): net(*batch(net, 100, 2, 2))
    assert abs(float(torch.cat(seen).float().mean())-.25) < .04

@torch.no_grad()
def test_any_grid_and_tables_that_are_kept(net):
    p = net.config.patch_size
    for h, w in ((2*p, 6*p), (6*p, 2*p), (5*p, 5*p), (2*p, 6*p)): assert net(*batch(net, 2, h, w), layers=[]).v.shape == (2, 4, h, w)
    assert len(net._kept) == 3

@torch.no_grad()
def test_a_larger_grid_keeps_the_place_of_every_token():
    "Rows are rows and columns are columns: turning the latent on its side is not the same picture."
    assert torch.equal(sincos_table(3, 5, 16).view(3, 5, 16)[:, :2], sincos_table(3, 2, 16).view(3, 2, 16))
    assert torch.equal(rope_table(3, 5, 8).view(2, 3, 5, 8)[:, :2], rope_table(2, 5, 8).view(2, 2, 5, 8))
    q, k = torch.randn(2, 1, 1, 1, 8).expand(2, 1, 1, 15, 8)
    dots = (rotate(q, rope_table(3, 5, 8)) @ rotate(k, rope_table(3, 5, 8)).mT).view(3, 5, 3, 5)
    for dr in range(-2, 3):
        for dc in range(-4, 5):
            same = [dots[r, c, r+dr, c+dc] for r in range(3) for c in range(5) if 0 <= r+dr < 3 and 0 <= c+dc < 5]
            assert max(same)-min(same) < 1e-4
    assert (dots[0, 0, 1, 0]-dots[0, 0, 0, 1]).abs() > 1e-4

@torch.no_grad()
def test_types(net):
    z, t, y, *cls = batch(net)
    want = flat(net(z, t, y, *cls))
    assert flat(net(z.double(), t.double(), y, *(c.double() for c in cls))).dtype == torch.float64      # a float64 sampler may drive a float32 net
    torch.testing.assert_close(flat(net(z.double(), t.double(), y, *(c.double() for c in cls))).float(), want, atol=1e-5, rtol=1e-5)
    with torch.autocast('cpu', torch.bfloat16): low = flat(net(z, t, y, *cls))
    assert low.dtype == torch.float32 and (low-want).norm() < .05*want.norm()
    with torch.autocast('cpu', torch.bfloat16):
        net.merge = True
        assert (flat(net(z, t, y, *cls))-want).norm() < .05*want.norm()
    assert (flat(net.bfloat16()(z, t, y, *cls))-want).norm() < .08*want.norm()
    net.double()
    torch.testing.assert_close(flat(net(z.double(), t.double(), y, *(c.double() for c in cls))).float(), want, atol=.05, rtol=.05)

def test_tables_made_without_gradients_serve_training():
    net = make('lightningdit')
    with torch.inference_mode(): net(*batch(net))
    net(*batch(net)).square().mean().backward()
    assert net.blocks[0].attn.qkv.weight.grad.abs().max() > 0

def test_parts_carry_gradients_and_name_what_was_asked():
    net = make('reg', base_depth=1)
    p = net(*batch(net), layers=['final', 1])
    assert list(p.tokens) == ['final', 1] and p.tokens[1].shape == (3, 17, 48) and p.tokens['final'].shape == (3, 16, 16)
    assert [h.shape for h in p.projections] == [(3, 17, 24)] and p.base.shape == p.v.shape and p.v_cls.shape == (3, 20)
    (p.projections[0].square().mean() + p.base.square().mean()).backward()
    assert net.projectors[0][4].weight.grad.abs().max() > 0 < net.base_layer.linear.weight.grad.abs().max() and net.final_layer.linear.weight.grad is None

@torch.no_grad()
def test_the_flag_of_the_time_direction(net):
    turned = DiT(DiTConfig(**{**asdict(net.config), 'data_time': True})).eval()
    turned.load_state_dict(net.state_dict())
    z, t, y, *cls = batch(net)
    torch.testing.assert_close(flat(turned(z, 1-t, y, *cls)), -flat(net(z, t, y, *cls)), atol=1e-5, rtol=1e-5)

def test_start():
    net = make('sit', alive=False)
    assert all((p == 0).all() for k, p in net.named_parameters() if k.endswith('bias'))
    w = net.blocks[0].attn.qkv.weight
    assert w.abs().max() <= (6/(48+144))**.5 < 1.1*w.abs().max() and .015 < net.y_embedder.embedding_table.weight.std() < .025
    rae = make('rae', alive=False)
    assert rae.blocks[0].attn.qkv.bias.abs().max() > 0 == rae.x_embedder.proj.bias.abs().max()
    assert rae.blocks[0].attn.qkv.weight.abs().max() <= 48**-.5 and 't_embedder.W' not in dict(rae.named_parameters())

def test_modulations_of_one_layer_and_of_none(): # widths may differ, and a single layer is no special case
    blocks = [Block(16, 2, 32), Block(16, 2, 32, shift=False)]
    for merge in (False, True): assert [m.shape for m in modulations(blocks, torch.randn(3, 16), merge)] == [(3, 1, 96), (3, 1, 64)]

@torch.no_grad()
def test_samplers_drive_it(net):
    "A float64 state, guided, with and without a class token; and internal guidance from one pass."
    z, _, y, *cls = batch(net)
    state, shape = (pack_state(z, *cls), z.shape[1:]) if cls else (z, None)
    plain = sample(velocity_field(net, y, shape), state.double(), Sampler(4, 'euler'))
    guided = sample(classifier_free(net, y, net.config.num_classes, 2., shape=shape), state.double(), Sampler(4, 'euler'))
    assert guided.shape == state.shape and guided.isfinite().all() and (guided-plain)[y != net.config.num_classes].abs().max() > 1e-4
    early = DiT(DiTConfig(**{**asdict(net.config), 'base_depth': 2})).eval()
    early.load_state_dict(net.state_dict(), strict=False)
    def both(z, t):
        p = early(z, torch.full((len(z),), t), y, *cls, layers=[])
        return p.v, p.base
    whole, base = both(z, .5)
    torch.testing.assert_close(internal_guidance(both, 1.5)(z, .5), base + 1.5*(whole-base))

def test_one_graph(net):
    "Nothing breaks the graph that torch.compile makes, in training neither, and tables asked for before are not made again in it."
    x = batch(net)
    net.position_tables(*(s//net.config.patch_size for s in x[0].shape[2:]), x[0].device, torch.float32)
    graphs = []
    def count(module, inputs):
        graphs.append([n.target for n in module.graph.nodes])
        return module.forward
    torch._dynamo.reset()
    fast = torch.compile(net, backend=count, fullgraph=True)
    with torch.no_grad(): torch.testing.assert_close(flat(fast(*x)), flat(net(*x)))
    assert len(graphs) == 1 and torch.meshgrid not in graphs[0]
    p = torch.compile(net.train(), backend=count, fullgraph=True)(*x, layers=[1])
    (p.v.square().mean() + p.tokens[1].square().mean()).backward()
    assert net.blocks[0].attn.qkv.weight.grad.abs().max() > 0

# bad input -------------------------------------------------------------------------------------------------------------------------------------

def says(match): return pytest.raises(UserError, match=rf'^[^\n]*{match}[^\n]*$')

def test_bad_input(net):
    z, t, y, *cls = batch(net)
    n, p = net.config.num_classes, net.config.patch_size
    for bad in (z[:, :3], z[0], z[:, :, 0], z.long(), z[:0], z[..., :0], z[0, 0, 0, 0], None):
        with says('a latent for this net is'): net(bad, t, y, *cls)
    if p > 1:
        with says('patches of 2 do not divide a latent of 7 x 8'): net(z[:, :, :7], t, y, *cls)
    for bad in (t[:2], t[:, None], t[0], y, .5, None):
        with says('one noise level per latent'): net(z, bad, y, *cls)
    for bad in (y[:2], y.int(), y.float(), y[:, None], 3, None):
        with says('one label per latent'): net(z, t, bad, *cls)
    for bad in (-1, n+1, 1000):
        with says(f'this net knows 0 to {n-1}, and {n} for no class'): net(z, t, torch.tensor([0, bad, 1]), *cls)
    with says('no layer 99 in this net'): net(z, t, y, *cls, layers=[0, 99])
    if cls:
        with says('has a class token; give cls'): net(z, t, y)
        with says(r'cls is \(3,20\) here, not \(3, 5\)'): net(z, t, y, cls[0][:, :5])
    else:
        with says('has no class token'): net(z, t, y, torch.randn(3, 20))
    with says('bool'): net.train()(z, t, y, *cls, drop=torch.ones(3))

@pytest.mark.parametrize('bad, said', [
    (dict(num_heads=5), '5 heads do not divide a width of 48'), (dict(num_heads=24, rope=True), 'rope needs heads of 4'), (dict(depth=0), 'at least 1'),
    (dict(hidden_size=50, num_heads=5), 'multiple of 4'), (dict(norm='batch'), 'none of layer, rms'), (dict(mlp='relu'), 'none of gelu, swiglu'),
    (dict(qk_norm='batch'), 'none of none'),
    (dict(qk_norm=True), 'does not fit'), (dict(label_dropout=1.), r'not in \[0, 1\)'), (dict(z_dims=(0,)), 'widths of alignment targets'),
    (dict(z_dims=(8,), encoder_depth=4), 'more than the 3 blocks'), (dict(base_depth=4), 'more than the 3 blocks'), (dict(rope=1), 'does not fit'),
    (dict(depth='3'), 'does not fit'), (dict(head_depth=2), '0 heads do not divide'), (dict(mlp_ratio=0), 'no width'),
    (dict(head_depth=2, head_hidden_size=48, head_num_heads=4, cls_dim=8), 'do not go together'), (dict(num_head=4), 'nearest: num_heads')])
def test_bad_settings(bad, said):
    with says(said): build_config(DiTConfig, {**SMALL, **bad})
    with says(said): DiT({**SMALL, **bad})

# files -----------------------------------------------------------------------------------------------------------------------------------------

def published(net, side=8):
    "The state dict of a published file with this net's weights."
    c, n, sd = net.config, side//net.config.patch_size, dict(net.state_dict())
    sd['pos_embed'] = F.pad(sincos_table(n, n, c.hidden_size), (0, 0, int(c.cls_dim > 0), 0))[None]
    ropes = {} if not c.rope else {'enc_feat_rope': c.hidden_size//c.num_heads, 'dec_feat_rope': c.head_hidden_size//c.head_num_heads} if c.head_depth else {
        'feat_rope': c.hidden_size//c.num_heads}
    return sd | {f'{k}.freqs_{n_}': rope_table(n, n, d)[i] for k, d in ropes.items() for i, n_ in enumerate(('cos', 'sin'))}

HEADS, REPA = dict(num_heads=4), dict(num_heads=4, encoder_depth=2)
VARIANTS = [ # family, shape, what no tensor tells
    ('sit', dict(depth=5, hidden_size=32, num_heads=2, patch_size=4), dict(num_heads=2)), ('sit', dict(learn_sigma=True, in_channels=3, num_classes=7), HEADS),
    ('sit', dict(mlp_ratio=2.5), HEADS), ('lightningdit', dict(mlp_ratio=3., qk_norm='rms'), {}),
    ('lightningdit', dict(norm='layer', qk_norm='layer', shift=False), {}), ('lightningdit', dict(mlp='gelu', rope=False, patch_size=1), HEADS),
    ('lightningdit', dict(mlp_ratio=4.6875, hidden_size=64, num_heads=8), {}),
    ('repa', dict(z_dims=(12, 24, 8), encoder_depth=1, qk_norm='layer'), dict(encoder_depth=1)),
    ('repa', dict(learn_sigma=True, projector_dim=16), REPA), ('reg', dict(cls_dim=36, z_dims=(36, 12), encoder_depth=3), dict(num_heads=4, encoder_depth=3)),
    ('reg', dict(qk_norm='layer', patch_size=1), dict(encoder_depth=2)), ('rae', dict(head_depth=3, depth=1), {}),
    ('rae', dict(head_hidden_size=48, head_num_heads=12, head_depth=1), dict(depth=[3, 1])), ('rae', dict(qk_norm='rms', patch_size=2), {})]

@torch.no_grad()
@pytest.mark.parametrize('family, more, given', VARIANTS)
def test_any_shape_of_net_is_read_off_its_file(family, more, given):
    net = make(family, **more, data_time=family in ('sit', 'lightningdit'))
    got = load_net(published(net), family, **given)
    unused = {} if family in ('repa', 'reg') else dict(encoder_depth=8, projector_dim=2048)
    assert asdict(got.config) == asdict(net.config) | unused
    assert torch.equal(flat(got(*batch(net))), flat(net(*batch(net)))) and not got.training

def namespace_file(sd, path, old=False, **extra):
    torch.save({'model': {k: torch.zeros_like(v) for k, v in sd.items()}, 'ema': sd, 'opt': {'state': {}, 'param_groups': []}, 'steps': 7,
                'args': argparse.Namespace(encoder_depth=2, lr=1e-4, **extra)}, path, _use_new_zipfile_serialization=not old)
    return path

@torch.no_grad()
def test_layouts(tmp_path):
    net = make('repa')
    sd, x = published(net), batch(net)
    olden = {re.sub(r'^blocks\.2\.', 'decoder_blocks.0.', k): v for k, v in sd.items()}
    assert sum(k.startswith('decoder_blocks') for k in olden) == 10
    from safetensors.torch import save_file
    save_file({k: v.contiguous() for k, v in sd.items()}, tmp_path/'net.safetensors')
    sources = [sd, olden, {'model': sd}, {'ema': {}, 'model': sd}, {'ema': {f'module.{k}': v for k, v in olden.items()}}, tmp_path/'net.safetensors',
               namespace_file(sd, tmp_path/'a.pt'), namespace_file(olden, tmp_path/'b.pt'), namespace_file(sd, tmp_path/'c.pt', old=True)]
    for s in sources: assert torch.equal(load_net(s, 'repa', num_heads=4, encoder_depth=2)(*x), net(*x))
    assert load_net(olden, 'repa', num_heads=4).config == net.config     # old names tell where the projectors are
    with says('extra: decoder_blocks.0.'): load_net(olden, 'repa', num_heads=4, encoder_depth=1)
    assert torch.equal(load_net({k: v.half() for k, v in sd.items()}, 'repa', num_heads=4, encoder_depth=2).blocks[0].attn.qkv.weight,
                       net.blocks[0].attn.qkv.weight.half().float())
    loaded = load_net(sd, 'repa', num_heads=4, encoder_depth=2)
    loaded.blocks[0].attn.qkv.weight.fill_(0)
    assert sd['blocks.0.attn.qkv.weight'].abs().max() > 0                 # no memory is shared with the file

class Trap:
    def __init__(self, path): self.path = path
    def __reduce__(self): return os.mkdir, (self.path,)

def test_nothing_in_a_file_is_executed(tmp_path):
    sd, sprung = published(make('repa')), tmp_path/'sprung'
    for old in (False, True):
        path = namespace_file(sd, tmp_path/'bad.pt', old, more=Trap(str(sprung)))
        with says('nothing in it was executed'): load_net(path, 'repa', num_heads=4)
        assert not sprung.exists()
    (tmp_path/'raw.pt').write_bytes(pickle.dumps({'ema': {}, 'args': argparse.Namespace(x=Trap(str(sprung)))}, protocol=2))
    with says('nothing in it was executed'): load_net(tmp_path/'raw.pt', 'repa')
    assert not sprung.exists()
    torch.load(tmp_path/'bad.pt', weights_only=False)                     # the trap was armed
    assert sprung.exists()

@pytest.mark.parametrize('family', FAMILIES)
def test_every_tensor_counts(family):
    "Take any tensor away, misshape it, or add one: it is named. Including tables."
    net = make(family)
    sd, given = published(net), dict(num_heads=[4, 4] if family == 'rae' else 4, depth=[3, 2] if family == 'rae' else 3, encoder_depth=2)
    if family not in ('repa', 'reg'): del given['encoder_depth']
    if family in ('lightningdit', 'rae'): given |= dict(use_swiglu=True, use_rope=True, use_rmsnorm=True, use_qknorm=False, wo_shift=False)
    if family in ('repa', 'reg'): given |= dict(z_dims=list(net.config.z_dims))
    load_net(sd, family, **given)
    for k in [k for k in sd if not k.startswith('blocks.') or k.startswith('blocks.1.')]:
        said = 'no diffusion net' if k == 'x_embedder.proj.weight' else re.escape(k)
        with says(said): load_net({n: v for n, v in sd.items() if n != k}, family, **given)
    with says('1 extra: more.weight'): load_net(sd | {'more.weight': torch.zeros(2)}, family, **given)
    with says('misshaped: .*blocks.1.attn.proj.bias'): load_net(sd | {'blocks.1.attn.proj.bias': torch.zeros(7)}, family, **given)
    for k in (k for k in sd if k == 'pos_embed' or 'freqs' in k):
        with says(f'{re.escape(k)} in the file is up to'): load_net(sd | {k: sd[k]+1e-4}, family, **given)
        load_net(sd | {k: sd[k]+1e-6}, family, **given)

def test_settings_that_contradict_the_file():
    sd = published(make('reg', qk_norm='layer'))
    given = dict(num_heads=4, encoder_depth=2)
    for more, said in ((dict(depth=4), 'missing: blocks.3'), (dict(hidden_size=64), 'misshaped'), (dict(qk_norm=False), 'extra: blocks.0.attn.q_norm'),
                       (dict(z_dims=[24, 24]), 'missing: projectors.1'), (dict(learn_sigma=True), 'misshaped: final_layer'),
                       (dict(input_size=16), 'misshaped: pos_embed'),
                       (dict(num_classes=11), 'misshaped: y_embedder'), (dict(patch_size=1), 'misshaped'), (dict(decoder_hidden_size=64), 'is not supported'),
                       (dict(num_heads=5), '5 heads do not divide'), (dict(encoder_depth=9), 'more than the 3 blocks'), (dict(depth=[2, 1]), 'only a rae net')):
        with says(said): load_net(sd, 'reg', **{**given, **more})
    with says("no family of nets named 'dit'"): load_net(sd, 'dit')
    with says('give num_heads'): load_net(published(make('sit')), 'sit')
    with says('give encoder_depth'): load_net(sd, 'reg')
    with says('no diffusion net'): load_net({'ema': {'w': torch.zeros(1)}}, 'sit')
    with pytest.warns(UserWarning, match='ignored: colour, mood') as seen:
        net = load_net(sd, 'reg', **given, colour=1, mood=2, path_type='linear', fused_attn=True, label_dim=3, train_mode='x', num_fp16_res=0,
                       use_kl_loss=False)
    assert len(seen) == 1 and net.meta['published']['path_type'] == 'linear' and net.meta['family'] == 'reg'

@torch.no_grad()
def test_own_files(net, tmp_path):
    path = save_net(tmp_path/'net.safetensors', net, tokenizer='tiny')
    again = DiT.load(path)
    assert again.config == net.config and torch.equal(flat(again(*batch(net))), flat(net(*batch(net)))) and again.meta['tokenizer'] == 'tiny'
    path.with_suffix('.json').unlink()
    assert DiT.load(path).config == net.config                         # the head of the file holds the JSON, too
    save_file(net.state_dict(), path)
    with says('no net configuration beside it'): DiT.load(path)

# a net as a source of features -----------------------------------------------------------------------------------------------------------------

class Tiny:
    "A tokenizer that averages 4 x 4 pixels."
    name, stride, channels = 'tiny', 4, 3
    def __init__(self): self.stats = LatentStats(3)
    def encode(self, x): return self.stats.scale(Gaussian(F.avg_pool2d(x, 4), None))
    def decode(self, z): return F.interpolate(z, scale_factor=4)

@torch.no_grad()
@pytest.mark.parametrize('family', FAMILIES)
def test_net_features(family):
    source = NetFeatures(make(family, in_channels=3), Tiny())
    x = torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(0))*2-1
    assert isinstance(source, FeatureSource) and source.layers == source.net.layers
    h = source.features(x)
    n = (8//source.net.config.patch_size)**2
    assert list(h) == list(source.layers) and all(v.shape[:2] == (5, n) for v in h.values())
    for k, v in source.features(x[3:4]).items(): torch.testing.assert_close(v, h[k][3:4], atol=1e-5, rtol=1e-5)
    for k, v in source.features(x.flip(0), [1]).items(): torch.testing.assert_close(v, h[k].flip(0), atol=1e-5, rtol=1e-5)
    other = NetFeatures(source.net, Tiny(), seed=1).features(x, [1])[1]
    assert (other-h[1]).abs().max() > 1e-3
    made = banks(source, x, names=list('abcde'), layers=[0, 'final'], quiet=True, batch_size=2)
    torch.testing.assert_close(made['final'].features, h['final'].mean(1), atol=1e-5, rtol=1e-5)

@torch.no_grad()
def test_noise_of_net_features():
    x = torch.randint(0, 256, (4, 3, 64, 64), generator=torch.Generator().manual_seed(0))/127.5 - 1
    at = {t: NetFeatures(make('sit', in_channels=3), Tiny(), t=t).noised(x)[0] for t in (0, .5, 1)}
    clean = Tiny().encode(x).mode()
    assert torch.equal(at[0], clean) and torch.allclose(at[.5], .5*clean + .5*at[1]) and abs(float(at[1].std())-1) < .05 > abs(float(at[1].mean()))
    assert len({*image_seeds(x)}) == 4 and image_seeds(x)[:1] == image_seeds(x[:1]+1e-7)
    reg = NetFeatures(make('reg', in_channels=3), Tiny(), t=0, cls=lambda x: x.flatten(1)[:, :20])
    assert torch.equal(reg.noised(x)[1], x.flatten(1)[:, :20])
    with says('was built for 4'): NetFeatures(make('sit'), Tiny())
    with says('no noise level'): NetFeatures(make('sit', in_channels=3), Tiny(), t=500)
    with says('no layer 9'): reg.features(x, [9])
