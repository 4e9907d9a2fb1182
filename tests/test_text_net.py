"""Nets of captions: parity with other people's code, what captions may and may not change, what goes wrong in one line."""
import json, re
from dataclasses import replace
from pathlib import Path
import pytest, torch
from safetensors.torch import load_file, save_file
from vfmvae.core import UserError
from vfmvae.captions import held_out, world_captions
from vfmvae.data import Subset
from vfmvae.dit import DiT, DiTConfig, FAMILIES, save_net, TEXT_FAMILIES, TEXT_NET
from vfmvae.flow import flow_loss
from vfmvae.generation import Captioned, encoder_of, generate, train_flow
from vfmvae.presets import PRESETS
from vfmvae.published import load_net
from vfmvae.published_text import export_text_net, load_text_net, TEXT_LAYOUTS
from vfmvae.samplers import sample_latents, Sampler
from vfmvae.text import Text, Words
from vfmvae.world import World
from test_golden_dit import close

ROOT = Path(__file__).resolve().parent.parent
GOLDEN, PARAMS = ROOT.parent/'shared/golden/text', ROOT.parent/'shared/spec/params'
needs_golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason='no golden files beside the repository')
SMALL = dict(in_channels=4, hidden_size=48, depth=2, num_heads=6, kv_heads=3, text_dim=20, cond_dim=24, mlp_multiple=8)
VARIANTS = dict(out_plain={}, out_linear=dict(linear_factor=1.5, base_sequence_length=16), out_ntk=dict(ntk_factor=1.5, base_sequence_length=16))


def gen(seed): return torch.Generator().manual_seed(seed)
def normal(*shape, seed=0): return torch.randn(*shape, generator=gen(seed))


def net_of(seed=0, **more):
    "As if trained: nothing is zero."
    torch.manual_seed(seed)
    net = DiT(DiTConfig(**TEXT_NET | SMALL | more)).eval()
    with torch.no_grad():
        for i, p in enumerate(net.parameters()): p.add_(.1*normal(*p.shape, seed=seed+i))
    return net


def tied(net):
    for b in net.blocks:
        b.attn.cross_q.load_state_dict(b.attn.q.state_dict())
        b.attn.cross_q_norm.load_state_dict(b.attn.q_norm.state_dict())
    return net


def captions(b, n=5, dim=20, seed=0):
    "Of 1 to n tokens; the empty one has one."
    mask = torch.arange(n) < torch.randint(1, n+1, (b, 1), generator=gen(seed))
    return Text(normal(b, n, dim, seed=seed)*mask[..., None], mask, normal(n, dim, seed=seed+1)*(torch.arange(n) < 1)[:, None], torch.arange(n) < 1)


def golden(name):
    g = load_file(GOLDEN/f'golden_{name}_tiny.safetensors')
    sd = {k[2:]: v for k, v in g.items() if k.startswith('w.')}
    mask = g['mask'].bool() if 'mask' in g else torch.ones(g['y'].shape[:2], dtype=torch.bool)
    return g, sd, Text(g['y'], mask, torch.zeros(g['y'].shape[1:]), mask[0])


@needs_golden
@pytest.mark.parametrize('out', VARIANTS)
@torch.no_grad()
def test_it_is_lumina_next_of_diffusers(out):
    g, sd, y = golden('lumina')
    net = load_net(sd, 'lumina', **VARIANTS[out])
    v = -net(g['x'], 1-g['t'], y)                         # theirs: t = 1 is data, the velocity leads there
    close(v, g[out][:, :4])                               # in float64 ours is as far from their float32
    assert net.config.kv_heads == 2 and net.config.learn_sigma
    assert torch.equal(load_net(export_text_net(tied(net), 'lumina'), 'lumina', **VARIANTS[out])(g['x'], g['t'], y), net(g['x'], g['t'], y))


@needs_golden
@torch.no_grad()
def test_it_is_the_net_of_blip3o(tmp_path):
    g, sd, y = golden('blip3o_dit')
    save_file({f'model.dit.model.{k}': v for k, v in sd.items()} | {'model.latent_queries': torch.zeros(1, 64, 24)}, tmp_path/'blip.safetensors')
    net = load_net(tmp_path/'blip.safetensors', 'lumina')
    for given, out in ((y, 'out'), (y.null(), 'out_null')): close(net(g['x'], g['t']/1000, given), g[out])


@pytest.mark.skipif(not PARAMS.is_dir(), reason='no lists of parameters beside the repository')
@pytest.mark.parametrize('file,layout,config', [
    ('params_lumina_next_2b_original', 'lumina', dict(TEXT_FAMILIES['lumina'], learn_sigma=True)),
    ('params_lumina_next_2b_diffusers', 'diffusers', dict(TEXT_FAMILIES['lumina'], learn_sigma=True)),
    ('params_vfmvae_t2i_inferred', 'diffusers', None)])
def test_every_published_tensor_has_its_place(file, layout, config):
    with torch.device('meta'): net = DiT(PRESETS['vfmvae-lumina'].net if config is None else DiTConfig(**config))
    rows = [line.split('\t') for line in (PARAMS/f'{file}.tsv').read_text().splitlines()[1:]]
    want = {r[0]: torch.empty([int(n) for n in r[1].split('x')], device='meta') for r in rows}
    own = {k: tuple(v.shape) for k, v in net.state_dict().items()}
    assert {k: tuple(v.shape) for k, v in load_text_net(want).state_dict().items()} == own
    if layout == 'diffusers': assert sum(p.numel() for p in net.parameters()) == sum(int(r[2]) for r in rows if r[0] != 'pad_token')


@pytest.mark.parametrize('seed,shape,heads,kv,dim', [(1, (3, 4, 8, 8), 6, 3, 20), (2, (2, 4, 4, 12), 4, 4, 7), (3, (5, 4, 6, 6), 12, 1, 33)])
@torch.no_grad()
def test_padding_order_and_company_change_nothing(seed, shape, heads, kv, dim):
    net = net_of(seed, num_heads=heads, kv_heads=kv, text_dim=dim)
    z, t, y = normal(*shape, seed=seed), torch.rand(shape[0], generator=gen(seed)), captions(shape[0], 6, dim, seed)
    v = net(z, t, y)
    pad = lambda x, value=0.: torch.cat([x, torch.full((*x.shape[:-2], 4, x.shape[-1]), value)], -2)
    none = torch.zeros(shape[0], 4, dtype=torch.bool)
    longer = Text(pad(y.tokens, 7.), torch.cat([y.mask, none], 1), pad(y.empty), torch.cat([y.empty_mask, none[0]]))
    assert (net(z, t, longer)-v).abs().max() < 2e-5
    for i in range(shape[0]): assert (net(z[i:i+1], t[i:i+1], y[[i]])-v[i:i+1]).abs().max() < 2e-5
    order = torch.randperm(6, generator=gen(seed))
    assert (net(z, t, Text(y.tokens[:, order], y.mask[:, order], y.empty, y.empty_mask))-v).abs().max() < 2e-5
    assert (net(z, t, y.null())-v).abs().max() > 1e-3


@torch.no_grad()
def test_with_words_of_its_own_the_order_is_seen():
    net = net_of(vocabulary=tuple('a on ground ring red green'.split()), text_dim=16, max_tokens=8)
    say, (z, t) = encoder_of(net), (normal(1, 4, 8, 8), torch.tensor([.5]))
    one, two = (net(z, t, say([c])) for c in ('a red ring on a green ground', 'a green ring on a red ground'))
    assert (one-two).abs().max() > 1e-4
    assert torch.equal(net(z, t, say(['A red ring, on a green ground.'])), one)


@pytest.mark.parametrize('words', [False, True])
def test_a_dropped_caption_is_the_empty_one(words):
    net = net_of(vocabulary=('ring', 'red'), text_dim=16, max_tokens=5) if words else net_of()
    y = encoder_of(net)(['red ring', 'ring', 'red']) if words else captions(3)
    z, t, drop = normal(3, 4, 8, 8), torch.rand(3, generator=gen(1)), torch.tensor([True, False, True])
    with torch.no_grad():
        a = net.train()(z, t, y, drop=drop)
        b = net.eval()(z, t, y.dropped(drop))
        assert torch.allclose(a, b, atol=1e-6) and torch.allclose(a[1], net(z, t, y)[1], atol=1e-6)
        if words: assert torch.equal(net.null(3).tokens, encoder_of(net)(['']*3).tokens)
    # all dropped: a loss that does not know what was said
    loss = [flow_loss(lambda z, t, y: net.train()(z, t, y, drop=torch.ones(3, dtype=torch.bool)), z, c, generator=gen(0))['loss'] for c in (y, y.null())]
    assert torch.allclose(*loss, atol=1e-6)


@torch.no_grad()
def test_guidance_leads_away_from_the_empty_or_a_negative_caption():
    net, y = net_of(), captions(4)
    draw = lambda y, **how: sample_latents(net, y, (4, 8, 8), 3, sampler=Sampler(5, **how))
    plain, null = draw(y), draw(y.null())
    assert torch.equal(draw(y, guidance=1.), plain) and not torch.equal(plain, null)
    assert torch.allclose(draw(y.null(), guidance=3.), null, atol=1e-5)            # nothing to lead away from
    negative = Text(y.tokens, y.mask, y.tokens[0], y.mask[0])
    guided = draw(negative, guidance=3.)
    assert torch.allclose(guided[0], plain[0], atol=1e-4) and not torch.allclose(guided[1], draw(y, guidance=3.)[1], atol=1e-4)
    weak = net_of(7)
    assert not torch.equal(sample_latents(net, y, (4, 8, 8), 3, sampler=Sampler(5, guidance=2., weak='given'), weak=weak), plain)
    # a sample depends on its own seed and caption alone
    assert torch.allclose(sample_latents(net, y[[2]], (4, 8, 8), 3, [2], Sampler(5)), plain[[2]], atol=1e-5)


def test_both_layouts_are_read_strictly(tmp_path):
    net = tied(net_of(data_time=True))
    for layout in TEXT_LAYOUTS:
        sd = export_text_net(net, layout)
        for k in list(sd)[::7]:
            with pytest.raises(UserError, match=f'1 missing: {k}|has no {k}') as e: load_text_net({n: v for n, v in sd.items() if n != k})
            assert '\n' not in str(e.value)
    sd = export_text_net(net)
    with pytest.raises(UserError, match='1 extra: layers.0.attn3'): load_text_net(sd | {'layers.0.attn3': torch.zeros(2)})
    with pytest.raises(UserError, match='misshaped: layers.1.attn2.to_k'): load_text_net(sd | {'layers.1.attn2.to_k.weight': torch.zeros(3, 3)})
    with pytest.raises(UserError, match='NaN|finite|number'): load_text_net(sd | {'layers.1.gate': torch.full((6,), torch.nan)})
    for bad in ({}, {'a': torch.zeros(2)}, {'x_embedder.weight': torch.zeros(4, 4)}, {'patch_embedder.proj.weight': torch.zeros(0, 16)}):
        with pytest.raises(UserError) as e: load_text_net(bad)
        assert '\n' not in str(e.value)
    with pytest.raises(UserError, match='nearest: lumina'): load_net(sd, 'lumnia')
    with pytest.raises(UserError, match='base_tokens: 1 has no logarithm'): load_text_net(sd, base_sequence_length=1)


@pytest.mark.parametrize('odd', [dict(data_time=False), dict(time_scale=1000.), dict(z_dims=(7,), encoder_depth=1),
                                 dict(predict='data', data_time=False, text_projection=True, time_scale=1000.),
                                 dict(text_projection=True), dict(text_projection=True, time_scale=1000., data_time=True)])
def test_a_net_that_a_layout_would_bring_back_as_another_is_not_exported(odd):
    net = net_of(**(dict(data_time=True) | odd))
    with pytest.raises(UserError, match=r'^[^\n]*has no place in these layouts[^\n]*$'): export_text_net(net)


@torch.no_grad()
def test_what_is_exported_comes_back_as_it_was():
    for how in (dict(data_time=True), dict(text_projection=True, time_scale=1000., data_time=False)):
        net = net_of(**how)
        again = load_net(export_text_net(net), 'lumina', patch_size=net.config.patch_size)
        z, t, y = normal(3, net.config.in_channels, 8, 8), torch.rand(3, generator=gen(2)), captions(3)
        want = net(z, t, y)
        assert (again(z, t, y)-want).abs().max() < 1e-5*want.abs().max()


@pytest.mark.parametrize('width,heads,kv,multiple', [(56, 7, 7, 1), (48, 6, 2, 1), (88, 11, 1, 5), (40, 5, 5, 32)])
@torch.no_grad()
def test_any_width_inside_is_read_off_the_file(width, heads, kv, multiple):
    net = tied(net_of(width, hidden_size=width, num_heads=heads, kv_heads=kv, mlp_multiple=multiple, data_time=True))
    z, t, y = normal(2, 4, 4, 8), torch.tensor([.2, .7]), captions(2)
    for layout in TEXT_LAYOUTS: assert torch.equal(load_text_net(export_text_net(net, layout))(z, t, y), net(z, t, y))


def test_a_net_of_captions_is_saved_and_opened(tmp_path):
    net = net_of(vocabulary=('ring', 'red'), text_dim=16)
    again = DiT.load(save_net(tmp_path/'n.safetensors', net))
    y, z, t = encoder_of(net)(['red ring']), normal(1, 4, 8, 8), torch.tensor([.3])
    assert again.config == net.config and torch.equal(again(z, t, encoder_of(again)(['red ring'])), net(z, t, y))
    with pytest.raises(UserError, match='save_net'): export_text_net(net)
    with pytest.raises(UserError, match='a Text of one caption per latent'): net(z, t, torch.tensor([0]))
    with pytest.raises(UserError, match='int64'): DiT(DiTConfig(**FAMILIES['sit'] | dict(hidden_size=48, depth=1, num_heads=4)))(z, t, y)


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    "A short training that stops and goes on, and the straight one."
    folder = tmp_path_factory.mktemp('text')
    world = World(200, seed=100)
    kept = Subset(world, [i for i, out in enumerate(held_out(world.factors(range(200))).tolist()) if not out])
    how = dict(data=kept, cache=folder/'latents', batch_size=16, show=lambda h: None)
    p = replace(PRESETS['lumina-conv-tiny-f8d16'], cosine=0)
    straight = train_flow(p, num_images=96, **how)
    train_flow(p, num_images=48, run=folder/'run', **how)
    return folder, kept, straight, train_flow(p, num_images=96, run=folder/'run', out=folder/'net.safetensors', **how)


def test_training_resumes_to_the_bit_and_draws_what_is_said(trained):
    folder, kept, (straight, rows), (net, _) = trained
    assert all(torch.equal(a, b) for a, b in zip(straight.state_dict().values(), net.state_dict().values(), strict=True))
    prompts = ['a large ring with stripes on a green ground with waves', 'a red square on a blue ground', 'a red square on a blue ground']
    s = generate(folder/'net.safetensors', prompts, steps=2)
    assert s.images.shape == (3, 3, 64, 64) and s.classes == tuple(dict.fromkeys(prompts)) and s.labels.tolist() == [0, 1, 1]
    assert not torch.equal(s.images[1], s.images[2])          # its noise is that of its place
    one = generate(net, prompts[1], steps=2)
    assert len(one) == 1 and not torch.equal(generate(net, prompts[1], steps=2, guidance=4., negative='a cross on a red ground').images,
                                             generate(net, prompts[1], steps=2, guidance=4.).images)
    files = generate(net, prompts, out=folder/'drawn', steps=1)
    assert json.loads((folder/'drawn'/'samples.json').read_text())['names'] == list(s.classes) and len(files) == 3
    with pytest.raises(UserError, match="no word 'rign'.*nearest: ring.*line 2"): generate(net, [prompts[0], 'a rign on a red ground'])
    with pytest.raises(UserError, match='a sentence for each picture'): generate(net, 4)
    with pytest.raises(UserError, match="no class named 'a large ring.*draws no captions"): generate('dit-conv-tiny-f8d16', prompts)
    for what in (dict(negative='a ring'), dict(encoder='bert')):
        with pytest.raises(UserError, match='draws classes; leave negative and encoder out'): generate('dit-conv-tiny-f8d16', 2, steps=1, **what)
    with pytest.raises(UserError, match='words of its own; leave the encoder out'): generate(net, prompts, steps=1, encoder='bert')
    # each sentence is one line, however often it is drawn
    with pytest.raises(UserError, match="no word 'rign'.*line 2"): generate(net, [prompts[0]]*9 + ['a rign on a red ground'])
    with pytest.raises(UserError, match='holds 2 other pictures, such as 000001.png'): generate(net, prompts[:1], out=folder/'drawn', steps=1)


def test_captions_of_an_epoch_depend_on_seed_epoch_and_image_alone(trained):
    folder, kept, _, (net, _) = trained
    from vfmvae.latents import LatentCache
    c = Captioned(LatentCache(folder/'latents'), kept, encoder_of(net))
    assert c.captions([5, 2], 3, 1) == [c.captions([i], 3, 1)[0] for i in (5, 2)] and c.captions(range(40), 0, 1) != c.captions(range(40), 1, 1)
    assert c.captions([5], 3, 1) == world_captions(World(200, seed=100), None, 1, 3, [kept.at[5]])
    fixed = Captioned(c.cache, ['a ring on a red ground']*len(kept), encoder_of(net))
    assert fixed.captions([0, 1], 9) == ['a ring on a red ground']*2 and fixed.fingerprint() != c.fingerprint()
    with pytest.raises(UserError, match=f'1 captions for {len(kept)} images'): Captioned(c.cache, ['a ring'], encoder_of(net))
    with pytest.raises(UserError, match='draws classes'):
        train_flow('dit-conv-tiny-f8d16', data=kept, cache=folder/'latents', captions=['a']*len(kept), num_images=64)


def test_another_encoder_is_asked_once_for_each_caption_and_no_other_is_taken(trained):
    folder, kept, *_ = trained
    asked = []
    class Letters:
        "A frozen encoder: letters as one-hot tokens."
        name, dim, max_tokens = 'letters', 27, 12
        def __init__(self, mark='1'): self.mark = mark
        def fingerprint(self): return f'letters-{self.mark}'
        def __call__(self, texts):
            asked.extend(texts)
            tokens = torch.zeros(len(texts)+1, 12, 27)
            for row, text in zip(tokens, [*texts, ''], strict=True):
                for j, ch in enumerate(text[:12] or '`'): row[j, max(0, ord(ch)-96) % 27] = 1.
            mask = tokens.sum(2) > 0
            return Text(tokens[:-1], mask[:-1], tokens[-1], mask[-1])
    p = PRESETS['lumina-conv-tiny-f8d16']
    p = replace(p, net=replace(p.net, vocabulary=(), text_dim=27))
    said = ['ring', 'cross']*(len(kept)//2) + ['ring']*(len(kept) % 2)
    net, _ = train_flow(p, kept, folder/'latents', captions=said, encoder=Letters(), num_images=64, batch_size=16, show=lambda h: None)
    assert sorted({*asked}) == ['', 'cross', 'ring'] and len(asked) == 3
    assert generate(net, ['ring'], steps=1, encoder=Letters()).images.shape == (1, 3, 64, 64)
    with pytest.raises(UserError, match='letters-1.*not of letters-2'): generate(net, ['ring'], steps=1, encoder=Letters('2'))
    with pytest.raises(UserError, match='give its encoder'): generate(net, ['ring'], steps=1)
    # a run does not go on with another one; a caption that nobody can read is found before the first step
    how = dict(data=kept, cache=folder/'latents', captions=said, batch_size=16, run=folder/'letters', show=lambda h: None)
    train_flow(p, encoder=Letters(), num_images=32, **how)
    with pytest.raises(UserError, match='another|other'): train_flow(p, encoder=Letters('2'), num_images=64, **how)
    train_flow(p, encoder=Letters(), num_images=48, **how)
    own = replace(PRESETS['lumina-conv-tiny-f8d16'], cosine=0)
    steps = []
    with pytest.raises(UserError, match=f"image 5 of {len(kept)}: no word 'wibble'"):
        train_flow(own, kept, folder/'latents', captions=[*['a ring on a red ground']*5, 'a wibble', *['a ring on a red ground']*(len(kept)-6)],
                   num_images=64, batch_size=16, show=steps.append)
    assert not steps
    with pytest.raises(UserError, match='words of its own; leave the encoder out'): train_flow(own, kept, folder/'latents', encoder=Letters(), num_images=64)


def test_its_own_words_are_an_encoder_like_any_other():
    words = Words(['ring', 'red'], 16, 4)
    assert re.match('no word', str(pytest.raises(UserError, words.numbers, ['blue']).value)) and words.numbers(['']).mask.sum() == 1
