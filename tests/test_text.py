"Captions: what is said is seen, whose caption it is, and what nets get of it."
import io, itertools, re, tarfile, warnings
from collections import Counter
import numpy as np
import pytest
import torch
from PIL import Image
from fakecuda import CPU, CUDA, cuda
from vfmvae.captions import (caption, captions_of, held_out, HUES, hue_of, hue_words, OPTIONAL, parse, read_prompts, split, TRAINED, VALUES, VOCABULARY,
                             WORDINGS, words_of, world_captions)
from vfmvae.core import Notice, raises, UserError
from vfmvae.data import as_dataset, select_classes, stamps, Subset, take, TensorSet
from vfmvae.files import load_weights, save_weights
from vfmvae.folders import folder, photographs, shards
from vfmvae.text import caption_table, CaptionTable, HFText, load_captions, load_text, Text, TextEncoder, Words
from vfmvae.world import factors, render_buffers, World


# what is seen ----------------------------------------------------------------------------------------------------------------------------------

def test_hues_are_those_of_colorsys():
    import colorsys
    rgb = torch.rand(500, 3, generator=torch.Generator().manual_seed(0))
    want = torch.tensor([colorsys.rgb_to_hsv(*c) for c in rgb.tolist()])
    hue, saturation = hue_of(rgb)
    assert ((hue-want[:, 0]+.5) % 1 - .5).abs().max() < 1e-4 and (saturation-want[:, 1]).abs().max() < 1e-5
    pure = torch.tensor([[1, 0, 0], [1, 1, 0], [0, 1, 0], [0, 1, 1], [0, 0, 1], [1, 0, 1.]])
    assert hue_words(hue_of(pure)[0]) == list(HUES) and hue_words(torch.tensor([.99, .0, .084, -.01])) == ['red', 'red', 'yellow', 'red']
    assert all(t.isfinite().all() for t in hue_of(torch.zeros(2, 3)))


@pytest.mark.parametrize('seed,size', [(8, 64), (21, 48)])
def test_what_is_said_is_seen(seed, size):
    f = factors(seed, range(300))
    said, (img, known) = words_of(f), render_buffers(f, size)
    def colour(mask): return hue_words(hue_of(((img/2+.5)*mask).sum((2, 3))/mask.sum((2, 3)).clamp(min=1))[0])
    plain = (render_buffers(dict(f, distractors=f['distractors']*0), size)[0] == img).all(1, keepdim=True)
    ground, paint = colour((known['mask'] == 0) & plain), colour((known['mask'] == 1) & (known['texture'] == 0))
    assert np.mean([w['ground'] == g for w, g in zip(said, ground, strict=True)]) > .92
    shown = ((known['mask'] == 1) & (known['texture'] < .5)).flatten(1).any(1)
    assert all(bool(w['paint']) == bool(s) for w, s in zip(said, shown, strict=True))       # a paint is said where and only where it shows
    assert np.mean([w['paint'].split()[-1] == p for w, p in zip(said, paint, strict=True) if w['paint']]) > .96
    area = known['mask'].sum((1, 2, 3))
    for shape in range(4):
        at = {k: [i for i, w in enumerate(said) if w['size'] == k and f['shape'][i] == shape] for k in ('small', 'large')}
        assert area[at['large']].mean() > 1.2*area[at['small']].mean()
    assert [w['shape'] for w in said] == [VALUES['shape'][i] for i in f['shape']] and [w['kind'] for w in said] == [VALUES['kind'][i] for i in f['background']]


def test_the_ground_is_the_middle_of_its_hues():
    red = torch.tensor([[1., .1, 0]]), torch.tensor([[1., 0, .3]])       # 6 and 342 degrees: their plain mean were cyan
    f = {k: v[:1] for k, v in factors(0, range(1)).items()}
    assert words_of(dict(f, ground=red[0], ground2=red[1]))[0]['ground'] == 'red'


# wordings --------------------------------------------------------------------------------------------------------------------------------------

def meanings():
    for w in itertools.product(*(VALUES[k] for k in ('shape', 'texture', 'size', 'ground', 'kind'))):
        for paint in (*VALUES['paint'], *(['']*(w[1] == 'solid'))): yield dict(zip(('shape', 'texture', 'size', 'ground', 'kind'), w, strict=True), paint=paint)


@pytest.mark.parametrize('wording', range(len(WORDINGS)))
def test_captions_are_read_back(wording):
    every = list(itertools.islice(meanings(), 0, None, 7))
    assert len([*meanings()]) == 9408 and len({caption(w, wording) for w in every}) == len(every)
    for i, w in enumerate(every):
        parts = [p for j, p in enumerate(OPTIONAL) if i >> j & 1]
        text = caption(w, wording, parts)
        assert parse(text) == parse(f'  {text.upper()}. ') == {k: v if k in ('shape', 'ground', *parts) else '' for k, v in w.items()}
        assert {*split(text)} <= {*VOCABULARY} and '  ' not in text and ' ,' not in text and text == text.strip()


def test_different_meanings_never_share_a_sentence_across_wordings():
    every = list(itertools.islice(meanings(), 0, None, 11))
    seen = {}
    for w, k in itertools.product(every, range(len(WORDINGS))): assert seen.setdefault(caption(w, k), w) == w


def test_held_out_wordings_are_new_and_words_all_occur():
    every = [*itertools.islice(meanings(), 0, None, 5)]
    used = [{w for m in every for w in split(caption(m, k))} for k in range(len(WORDINGS))]
    assert set.union(*used) == {*VOCABULARY} and len(VOCABULARY) == len({*VOCABULARY})
    trained = set.union(*used[:TRAINED])
    assert used[3] <= trained and all({*split(caption(m, 4))} - trained for m in every)
    order = {p for k in range(TRAINED) for m in every for p in itertools.pairwise(split(caption(m, k)))}
    assert all({*itertools.pairwise(split(caption(m, 3)))} - order for m in every)


def test_bad_captions_are_one_line():
    w = dict(shape='ring', ground='red')
    with raises('part', 'colour'): caption(w, parts=['colour'])
    with raises('wording'): caption(w, -1)
    with raises('wording'): caption(w, True)
    with raises('no shape or no ground'): caption(dict(shape='ring', ground=''))
    for bad in ('', 'a ring', 'ring on a red ground', 'a ring on a red ground with', 'a pale ring on a red ground', 'a ring on a red ground\non a red ground'):
        with raises('no caption of the world'): parse(bad)


@pytest.mark.parametrize('bad', [[None], ['a ring', 5], [b'a ring'], [['a ring']], None, 5, 'a ring', object()])
def test_captions_that_are_no_texts_are_one_line(bad):
    "They ended in AttributeError and TypeError; a single text was read letter by letter."
    encoder, words = HFText(made('bert'), tokenizer()), Words()
    for reads in (encoder, words.numbers, lambda c: caption_table(encoder, c, quiet=True)):
        with raises('captions are ', 'give a list of texts'): reads(bad)
    for reads in (split, parse):
        if not isinstance(bad, str):
            with raises('is no caption; give a text'): reads(bad)


# worlds ----------------------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('seed,epoch,world', [(0, 0, 0), (3, 17, 1), (-5, 2, 9)])
def test_captions_of_a_world_are_a_pure_function(seed, epoch, world):
    ds = World(700, world)
    every = world_captions(ds, None, seed, epoch)
    at = np.random.default_rng(0).permutation(700)[:90]
    assert world_captions(ds, None, seed, epoch, at) == [every[i] for i in at] == world_captions(ds.factors(at), None, seed, epoch, at)
    assert [c for a in range(0, 700, 64) for c in world_captions(ds, None, seed, epoch, range(a, min(a+64, 700)))] == every
    for other in (world_captions(ds, None, seed+1, epoch), world_captions(ds, None, seed, epoch+1)):
        assert sum(a != b for a, b in zip(every, other, strict=True)) > 500
    assert world_captions(ds, 3, seed, epoch) == [caption(w, 3) for w in words_of(ds.factors(range(700)))]
    assert world_captions(ds, None, index=[]) == []


def test_what_is_drawn_does_not_tell_the_picture():
    # the draws have the seed of the world; they are not its factors again
    ds = World(4000, seed=5)
    every, said = world_captions(ds, None, seed=0, epoch=5), words_of(ds.factors(range(4000)))
    first = [c.split()[0] == 'on' for c in every]
    for k, v in (('ground', 'red'), ('size', 'large'), ('kind', 'waves'), ('texture', 'dots')):
        of = np.array([w[k] == v for w in said])
        assert abs(np.mean(np.array(first)[of]) - np.mean(first)) < .06
    for p in OPTIONAL: assert abs(np.mean([bool(parse(c)[p]) for c, w in zip(every, said, strict=True) if w[p]]) - .75) < .03


def test_held_out_cells_keep_every_value():
    f = factors(4, range(3000))
    words, out = words_of(f), held_out(f)
    assert torch.equal(out, held_out(words)) and .34 < out.float().mean() < .41 and held_out([]).shape == (0,)
    for k, gone in (('texture', 4), ('ground', 4)):
        cells = {(w['shape'], w[k]) for w, o in zip(words, out, strict=True) if not o}
        assert len(cells) == 4*len(VALUES[k])-gone
        assert min([*Counter(a for a, _ in cells).values(), *Counter(b for _, b in cells).values()]) >= 3
    by_label = torch.tensor([t.float().mean() for t in (out[f['label'] == c] for c in range(16))])
    assert (by_label == 1).nonzero()[:, 0].tolist() == [0, 5, 10, 15]       # a diagonal of shape and texture


# one's own images ------------------------------------------------------------------------------------------------------------------------------

TEXTS = {'a.png': b'\xef\xbb\xbfA red box.\r\n', 'b.c.jpg': 'grün, naïve ☂'.encode(), 'd.webp': b' \n\t', 'e.png': None, 'f.JPG': b'two\nlines\r\n here'}
TOLD = ['A red box.', 'grün, naïve ☂', '', '', 'two lines here']


def write(root, texts=TEXTS):
    for i, (name, text) in enumerate(texts.items()):
        (p := root/name).parent.mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (16, 16), (i*20, 9, 9)).save(p, {'.webp': 'WEBP', '.png': 'PNG'}.get(p.suffix.lower(), 'JPEG'))
        if text is not None: p.with_suffix('.txt').write_bytes(text)
    return root


def told(ds, notices=1):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        found = captions_of(ds)
    assert len(said) == notices and all(s.category is Notice for s in said)
    return (found, str(said[0].message)) if notices else found


@pytest.mark.parametrize('inner', ['', 'klass/', 'deep.dir/x.y/'])
def test_captions_beside_images(tmp_path, inner):
    ds = folder(write(tmp_path/'set', {inner+k: v for k, v in TEXTS.items()}), 16)
    texts, said = told(ds)
    assert texts == TOLD and '1 of 5 images lack a caption, 1 have an empty one' in said and str(tmp_path/'set') in said
    assert told(Subset(Subset(ds, [4, 3, 1, 0]), [3, 0, 2]), 0) == [TOLD[0], TOLD[4], TOLD[1]]
    files = [tmp_path/'set'/k for k in ds.keys]
    for given in (files, [(f, 'ring') for f in files], [[str(f), 3] for f in files], [dict(image=f, label=0) for f in files]):
        pics = as_dataset(given, 16)
        assert told(pics)[0] == TOLD and stamps(pics) == stamps(ds)
    for f in files:
        if f.with_suffix('.txt').exists(): f.with_suffix('.txt').rename(f.with_suffix('.TXT'))
    assert told(ds)[0] == TOLD
    assert len(told(take(ds, 3))[0] if '' in [TOLD[i] for i in take(ds, 3).at] else told(take(ds, 3), 0)) == 3


@pytest.mark.parametrize('form', [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_captions_in_shards(tmp_path, form):
    root, paths = write(tmp_path/'set'), [tmp_path/f's{k}.tar' for k in range(2)]
    for path in paths:
        with tarfile.open(path, 'w', format=form) as t:
            members = [f for f in root.iterdir() if f.name != 'b.c.jpg']
            for f in sorted(members, key=lambda f: (f.suffix != '.txt', f.name)): t.add(f, f'./sub.x/{"n"*90}{f.name}')     # captions first
    ds = shards([*paths], 16)
    texts, said = told(ds)
    want = [t for t in TOLD if not t.startswith('gr')]
    assert texts == want*2 and '2 of 8 images lack a caption, 2 have an empty one' in said
    assert told(select_classes(ds, ds.classes))[0] == texts and told(Subset(ds, [7, 0]), 0) == [want[3], want[0]]


def test_captions_of_shards_written_by_webdataset(tmp_path):
    wds = pytest.importorskip('webdataset')
    pics = np.random.default_rng(0).integers(0, 256, (12, 16, 16, 3), dtype=np.uint8)
    said = [f'Bild {i}, ä' if i % 5 else '' for i in range(12)]
    for k in range(2):
        with wds.TarWriter(str(tmp_path/f'w-{k}.tar')) as sink:
            for i in range(6*k, 6*k+6): sink.write({'__key__': f'set.a/n{i:03d}', 'png': pics[i], 'cls': i % 3, 'txt': said[i], 'json': {'txt': 'no'}})
    assert told(shards(str(tmp_path/'w-{0..1}.tar'), 16))[0] == said
    back = {s['__key__']: s['txt'].decode() for s in wds.WebDataset([str(tmp_path/f'w-{k}.tar') for k in range(2)], shardshuffle=False)}
    assert [*back.values()] == said and [*back] == shards(str(tmp_path/'w-{0..1}.tar'), 16).keys[:]


def test_bad_captions_of_images_are_one_line(tmp_path):
    ds = folder(write(tmp_path/'set'), 16)
    for raw in ('naïve'.encode('latin-1'), 'ring'.encode('utf-16'), 'ring'.encode('utf-16-le'), b'\xff\xfe'):
        (tmp_path/'set'/'d.txt').write_bytes(raw)
        with raises('d.txt is not UTF-8'): captions_of(ds)
    (tmp_path/'set'/'d.txt').unlink()
    (tmp_path/'set'/'d.txt').mkdir()
    with raises('d.txt cannot be read'): captions_of(ds)
    for bare in (folder(write(tmp_path/'bare', dict.fromkeys(TEXTS)), 16), folder(write(tmp_path/'empty', dict.fromkeys(TEXTS, b'\n')), 16),
                 TensorSet(torch.zeros(2, 3, 16, 16)), photographs('examples')):
        with raises('has no captions', 'name.txt'): captions_of(bare)
    png = (tmp_path/'set'/'a.png').read_bytes()
    def shard(name, *members):
        with tarfile.open(tmp_path/name, 'w') as t:
            for k, raw in members:
                info = tarfile.TarInfo(k)
                info.size = len(raw)
                t.addfile(info, io.BytesIO(raw))
        return shards(tmp_path/name, 16)
    with raises('x/a.txt in ', 'bad.tar is not UTF-8'): captions_of(shard('bad.tar', ('x/a.png', png), ('x/a.txt', b'\xe9')))
    with raises('two captions of the key'): captions_of(shard('two.tar', ('a.png', png), ('a.txt', b'x'), ('a.TXT', b'y')))
    gone = shard('gone.tar', ('a.png', png), ('a.txt', b'x'))
    (tmp_path/'gone.tar').unlink()
    with raises('gone.tar cannot be read any more'): captions_of(gone)


def test_prompts(tmp_path):
    p = tmp_path/'p.txt'
    for raw, want in ((b'\xef\xbb\xbfa\r\n\r\n  b  c\t\n', ['a', 'b c']), ('é\rü'.encode(), ['é', 'ü']), (b'one', ['one'])):
        p.write_bytes(raw)
        assert read_prompts(p) == read_prompts(str(p)) == want
    for raw, why in ((b'', 'holds no prompt'), (b'\xef\xbb\xbf\n', 'holds no prompt'), (b'\xe9\n', 'not UTF-8'), ('a'.encode('utf-16-le'), 'not UTF-8')):
        p.write_bytes(raw)
        with raises('p.txt', why): read_prompts(p)
    with raises('no file'): read_prompts(tmp_path/'none.txt')
    with raises('cannot be read'): read_prompts(tmp_path)


# words of our own ------------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('how', [dict(), dict(dim=32, max_tokens=17, depth=1, heads=2), dict(dim=48, max_tokens=40, depth=3, heads=6)])
def test_padding_and_the_rest_of_a_batch_change_nothing(how):
    torch.manual_seed(1)
    words, f = Words(**how), World(60, 3)
    text = words.numbers([*world_captions(f, None), *world_captions(f, 4), ''])
    assert text.tokens.shape == (121, words.max_tokens) and text.tokens.dtype == torch.int64 and torch.equal(text.mask, text.tokens > 0)
    for mode in (True, False):          # torch has another path for nets in evaluation
        words.train(mode)
        with torch.no_grad(): h = words(text)
        assert h.shape == (121, words.max_tokens, words.dim) and (h[~text.mask] == 0).all() and h.isfinite().all()
        some, n = text[[120, 7]], int(text.mask[[120, 7]].sum(1).max())
        short = Text(some.tokens[:, :n], some.mask[:, :n], some.empty[:n], some.empty_mask[:n])
        with torch.no_grad(): got = words(short)
        assert (got-h[[120, 7], :n]).abs().max() < 2e-5
        if mode: first = h
    assert (first-h).abs().max() < 2e-5
    null = text.dropped(torch.tensor([True]*60+[False]*61))
    with torch.no_grad(): assert (words(null)[:60]-h[120]).abs().max() < 2e-5       # the empty caption is that of the null condition


def test_gradients_reach_words_and_places():
    words = Words()
    words(words.numbers(['a red ring on a blue ground'])).square().mean().backward()
    moved = words.embed.weight.grad.abs().sum(1) > 0
    assert {words.vocabulary[i-2] for i in moved.nonzero()[:, 0].tolist()} == {'a', 'red', 'ring', 'on', 'blue', 'ground'}
    assert (words.positions.grad.abs().sum(1) > 0).tolist() == [True]*7 + [False]*13


def test_words_compile_into_one_graph():
    torch.manual_seed(0)
    words = Words().train()
    text = words.numbers(world_captions(World(8)))
    graph = torch.compile(words, fullgraph=True, backend='eager')
    assert (graph(text)-words(text)).abs().max() < 1e-6


def test_words_are_forgiven_and_refused():
    words = Words(['cat', 'naïve', "dog's"])
    assert words.numbers(['Cat, "NAÏVE" dog\'s!']).tokens[0, :4].tolist() == [2, 3, 4, 0]
    assert torch.equal(words.numbers(['', ' ., ']).tokens, words.numbers([]).empty.expand(2, -1)) and len(words.numbers([])) == 0
    with raises("no word 'cst'", 'nearest: cat', "line 3: 'a"): Words(['a', 'cat']).numbers(['a', 'cat', 'a '*18+'cst'])
    with raises('no word'): words.numbers(['\N{PILE OF POO}'])
    with raises('21 words, at most 20', 'line 1'): words.numbers(['cat '*21])
    again = Words(words.vocabulary)
    again.load_state_dict(words.state_dict())
    assert torch.equal(again.numbers(['dog\'s']).tokens, words.numbers(['dog\'s']).tokens)


# language models -------------------------------------------------------------------------------------------------------------------------------

hf = pytest.importorskip('transformers', reason='the [text] extra is not installed')
VOCAB = {w: i for i, w in enumerate(['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', ',', *VOCABULARY])}
SOME = ['a ring on a red ground', 'on a green ground with waves, a large red ring with stripes', '', 'before a blue woven ground, a small dotted cross']


def tokenizer(**how): return hf.BertTokenizerFast(vocab=VOCAB, **how)


def made(kind):
    torch.manual_seed(3)
    size = dict(vocab_size=len(VOCAB), num_hidden_layers=3, hidden_size=32, intermediate_size=64, num_attention_heads=4, pad_token_id=0)
    if kind == 'bert': return hf.BertModel(hf.BertConfig(**size))
    if kind == 'roberta': return hf.RobertaModel(hf.RobertaConfig(**size))
    if kind == 't5': return hf.T5EncoderModel(hf.T5Config(vocab_size=len(VOCAB), num_layers=3, d_model=32, d_kv=8, num_heads=4, d_ff=64))
    if kind == 't5 with decoder': return hf.T5Model(hf.T5Config(vocab_size=len(VOCAB), num_layers=3, d_model=32, d_kv=8, num_heads=4, d_ff=64))
    if kind == 'clip': return hf.CLIPTextModel(hf.CLIPTextConfig(**size, bos_token_id=2, eos_token_id=3))
    if kind == 'qwen': return hf.Qwen2Model(hf.Qwen2Config(**size, num_key_value_heads=2))
    if kind == 'gemma': return hf.Gemma2Model(hf.Gemma2Config(**size, num_key_value_heads=2, head_dim=8, query_pre_attn_scalar=8))
    seen = dict(depth=1, hidden_size=32, num_heads=2, intermediate_size=32, out_hidden_size=32, fullatt_block_indexes=[0])
    text = dict(size, num_key_value_heads=2, rope_scaling=dict(type='mrope', mrope_section=[1, 1, 2]))
    return hf.Qwen2_5_VLModel(hf.Qwen2_5_VLConfig(text_config=text, vision_config=seen))


KINDS = ['bert', 'roberta', 't5', 't5 with decoder', 'clip', 'qwen', 'gemma', 'qwen that sees']


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('layer', [-1, -2, 0])
def test_states_are_those_of_transformers(kind, layer):
    net = made(kind).eval()
    inner = net.encoder if kind == 't5 with decoder' else net
    encoder = HFText(net, tokenizer(), kind, layer)
    text = encoder(SOME)
    assert isinstance(encoder, TextEncoder) and text.tokens.dtype == torch.float32 and text.tokens.shape[2] == encoder.dim == 32
    for i, c in enumerate(SOME):
        ids = tokenizer()(c, return_tensors='pt')['input_ids']
        with torch.no_grad(): out = inner(input_ids=ids, output_hidden_states=True) if kind != 'qwen that sees' else net.language_model(
            input_ids=ids, output_hidden_states=True)
        want = out.last_hidden_state[0] if layer == -1 else out.hidden_states[layer][0]
        n = len(want)
        assert (text.tokens[i, :n]-want).abs().max() < 5e-6*max(1, float(want.abs().max()))
        assert text.mask[i].tolist() == [True]*n + [False]*(text.mask.shape[1]-n) and (text.tokens[i, n:] == 0).all()
    assert torch.equal(text.tokens[2], text.empty) and torch.equal(text.mask[2], text.empty_mask)
    pooled = (text.tokens*text.mask[..., None]).sum(1)/text.mask.sum(1, keepdim=True)
    alone = encoder(SOME[:1])
    assert (alone.tokens[0].sum(0)/alone.mask[0].sum()-pooled[0]).abs().max() < 5e-6*max(1, float(pooled.abs().max()))


def test_queries_are_asked_after_each_caption():
    net, queries = made('qwen that sees').eval(), torch.randn(6, 32)
    encoder = HFText(net, tokenizer(), queries=queries, template='a {} , [MASK]')
    text = encoder(SOME)
    assert text.tokens.shape == (4, 6, 32) and encoder.max_tokens == 6 and text.mask.all() and (text.empty == 0).all() and text.empty_mask.all()
    for i, c in enumerate(SOME):
        ids = tokenizer()(f'a {c} , [MASK]', return_tensors='pt')['input_ids']
        x = torch.cat([net.language_model.get_input_embeddings()(ids), queries[None]], 1)
        with torch.no_grad(): want = net.language_model(inputs_embeds=x).last_hidden_state[0, -6:]
        assert (text.tokens[i]-want).abs().max() < 5e-6*max(1, float(want.abs().max()))
    assert encoder.fingerprint() != HFText(net, tokenizer(), queries=queries+1, template='a {} , [MASK]').fingerprint()


def test_what_a_tokenizer_does_by_itself_is_off():
    net, odd = made('bert'), tokenizer(padding_side='left', model_max_length=4)
    odd.backend_tokenizer.enable_padding(length=128, direction='left')
    odd.backend_tokenizer.enable_truncation(3)
    a, b = HFText(net, odd), HFText(net, tokenizer())
    assert torch.equal(a(SOME).tokens, b(SOME).tokens) and torch.equal(a(SOME).mask, b(SOME).mask)
    nothing = type(odd.backend_tokenizer).from_str(odd.backend_tokenizer.to_str())      # no marks: an empty text has no token at all
    nothing.post_processor = None
    bare = hf.PreTrainedTokenizerFast(tokenizer_object=nothing, pad_token='[PAD]', eos_token='[SEP]')
    text = HFText(made('qwen'), bare)(['', 'a ring'])
    assert text.mask.sum(1).tolist() == [1, 2] and text.empty_mask.sum() == 1


def test_long_captions_are_cut_and_said():
    encoder = HFText(made('t5'), tokenizer(), 'tiny', max_tokens=6)
    with pytest.warns(Notice, match='tiny: 2 captions have more than 6 tokens'): text = encoder(['a ring', 'a '*9, 'a '*5])
    assert text.mask.sum(1).tolist() == [4, 6, 6]
    with raises('without a token'): HFText(made('t5'), tokenizer(), skip=2)(['a ring'])
    for bad in (3.5, 4, -5, True): # of three layers
        with raises('layer'): HFText(made('bert'), tokenizer(), layer=bad)


@pytest.mark.parametrize('kind', ['bert', 't5', 'qwen'])
def test_states_are_made_where_the_model_is(kind):
    def call(device):
        encoder = HFText(made(kind).to(device), tokenizer())
        queries = HFText(encoder.model, tokenizer(), queries=torch.ones(3, 32, device=device))
        table = caption_table(encoder, SOME, quiet=True)
        assert table.tokens.device == CPU
        return [encoder(SOME), queries(SOME), table.to(device).text(SOME), table.to(device).text(table.rows(SOME))], encoder.fingerprint()
    want, mark = call(CPU)
    with cuda(): got, there = call(CUDA)
    assert there == mark and all(t.tokens.device == t.empty_mask.device == CUDA for t in got)
    assert all((g.to('cpu').tokens-w.tokens).abs().max() < 2e-6 and torch.equal(g.to('cpu').mask, w.mask) for g, w in zip(got, want, strict=True))


def test_half_precision_gives_float32():
    text = HFText(made('bert').bfloat16(), tokenizer())(SOME)
    assert text.tokens.dtype == torch.float32 and (text.tokens-HFText(made('bert'), tokenizer())(SOME).tokens).abs().max() < .1


def test_a_fingerprint_tells_what_decides():
    net = made('bert')
    base = HFText(net, tokenizer())
    mark = base.fingerprint()
    base(SOME)
    assert base.fingerprint() == mark == HFText(made('bert'), tokenizer(), 'another name').fingerprint()
    others = [HFText(net, tokenizer(), layer=-2), HFText(net, tokenizer(), template='say {}'), HFText(net, tokenizer(), skip=1),
              HFText(net, tokenizer(do_lower_case=False)), HFText(made('roberta'), tokenizer())]
    marks = [mark, *(e.fingerprint() for e in others)]
    with torch.no_grad(): net.embeddings.word_embeddings.weight[5, 3] += 1e-3
    assert len({*marks, base.fingerprint()}) == len(marks)+1


@pytest.mark.parametrize('kind', ['bert', 't5', 't5 with decoder', 'qwen'])
def test_encoders_are_loaded_by_name(tmp_path, kind):
    net = made(kind)
    net.save_pretrained(tmp_path/'m')
    tokenizer().save_pretrained(tmp_path/'m')
    got = load_text(tmp_path/'m', layer=-2)
    # transformers gives a Qwen the tokenizer of Qwens, whatever is saved
    want = HFText(net, got.text_tokenizer if kind == 'qwen' else tokenizer(), layer=-2)
    assert torch.equal(got(SOME).tokens, want(SOME).tokens) and got.name == str(tmp_path/'m')
    assert 'decoder' not in ' '.join(dict(got.model.named_parameters()))
    (tmp_path/'m'/'config.json').write_text('{}')
    with raises('no text encoder that can be loaded'): load_text(tmp_path/'m')


def placed(kind, places=16):
    "A model with few places."
    torch.manual_seed(3)
    size = dict(vocab_size=len(VOCAB), num_hidden_layers=2, hidden_size=32, intermediate_size=64, num_attention_heads=4, pad_token_id=0,
                max_position_embeddings=places)
    if kind == 'gpt2':
        return hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=len(VOCAB), n_embd=32, n_layer=2, n_head=4, n_positions=places, bos_token_id=2, eos_token_id=3))
    if kind == 'distilbert':
        return hf.DistilBertModel(hf.DistilBertConfig(vocab_size=len(VOCAB), dim=32, n_layers=2, n_heads=4, hidden_dim=64, max_position_embeddings=places))
    if kind == 'opt':
        return hf.OPTModel(hf.OPTConfig(vocab_size=len(VOCAB), hidden_size=32, num_hidden_layers=2, ffn_dim=64, num_attention_heads=4, word_embed_proj_dim=32,
                                        max_position_embeddings=places))
    if kind == 'whole clip':
        seen = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, image_size=32, patch_size=16)
        return hf.CLIPModel(hf.CLIPConfig(text_config=dict(size, bos_token_id=2, eos_token_id=3), vision_config=seen))
    return {'masked bert': lambda: hf.BertForMaskedLM(hf.BertConfig(**size)), 'masked roberta': lambda: hf.RobertaForMaskedLM(hf.RobertaConfig(**size)),
            'qwen with a head': lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**size, num_key_value_heads=2))}[kind]()


PLACED = ['masked bert', 'masked roberta', 'gpt2', 'distilbert', 'opt', 'whole clip', 'qwen with a head']


@pytest.mark.parametrize('kind', PLACED)
def test_whole_models_are_read_below_their_heads_and_never_beyond_their_places(kind):
    net, many = placed(kind).eval(), 'ring '*40
    encoder = HFText(net, tokenizer(), 'tiny')
    core = net.text_model if kind == 'whole clip' else net.base_model
    with pytest.warns(Notice, match='tiny: 1 captions have more than'): text = encoder(['a ring', many])
    used = text.mask.sum(1).tolist()
    assert used[0] == 4 and used[1] == encoder.max_tokens in (16, 15)                      # RoBERTa's kind begins to count behind its padding
    with torch.no_grad(): want = core(input_ids=torch.tensor([tokenizer()('a ring')['input_ids']])).last_hidden_state[0]
    assert (text.tokens[0, :4]-want).abs().max() < 2e-6


@pytest.mark.parametrize('kind', ['masked bert', 'masked roberta', 'gpt2', 'whole clip'])
def test_the_files_of_a_model_give_one_fingerprint_and_lack_nothing(tmp_path, kind):
    placed(kind).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    got, again = load_text(tmp_path), load_text(tmp_path)          # of masked ones the pooler, which nothing asks, is new each time
    assert got.fingerprint() == again.fingerprint() and torch.equal(got(SOME[:2]).tokens, again(SOME[:2]).tokens)
    tensors, _ = load_weights(tmp_path/'model.safetensors')
    lost = [k for k in tensors if re.search(r'(q_proj|query|c_attn)\.weight$', k) and 'vision' not in k][0]
    save_weights(tmp_path/'model.safetensors', {k: v for k, v in tensors.items() if k != lost}, dict(format='pt'))
    with pytest.raises(UserError, match='lack 1 tensors, such as .*; copy them again'): load_text(tmp_path)


def test_counts_and_queries_that_cannot_be_are_one_line():
    net = placed('masked bert')
    for bad in (0, 2, -3, 'a'):
        with raises('max_tokens'): HFText(net, tokenizer(), max_tokens=bad)
    with raises('queries are'): HFText(net, tokenizer(), queries=torch.zeros(3, 7))
    with raises('no room for a caption'): HFText(net, tokenizer(), queries=torch.zeros(14, 32))
    assert HFText(net, tokenizer(), queries=torch.zeros(8, 32))(['ring '*40]).tokens.shape == (1, 8, 32)
    odd = tokenizer(truncation_side='left')
    HFText(net, odd)
    assert odd.truncation_side == 'left'                                                   # it is somebody else's
    left, right = (HFText(net, tokenizer(**how), max_tokens=6)(['a red ring on a blue ground']).tokens for how in (dict(truncation_side='left'), {}))
    assert torch.equal(left, right)


def test_without_transformers_it_says_what_to_install(monkeypatch):
    import sys
    monkeypatch.setitem(sys.modules, 'transformers', None)
    with raises("pip install 'vfmvae[text]'", 'text.Words'): load_text('google/t5')


# states that are kept --------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('kind,n,batch', [('bert', 50, 7), ('t5', 33, 64), ('qwen', 64, 1)])
def test_a_table_says_what_its_encoder_says(tmp_path, kind, n, batch):
    encoder = HFText(made(kind), tokenizer(), kind)
    captions = [*world_captions(World(n, 2), None), *SOME]
    table = caption_table(encoder, captions*2, batch, quiet=True)
    assert len(table) == len({*captions, ''}) and table.tokens.dtype == torch.float16 and table.texts[0] == ''
    table.save(tmp_path/'t.safetensors')
    again = load_captions(tmp_path/'t.safetensors', encoder)
    for t in (table, again, again.to('cpu')):
        want, got = encoder(captions), t.text(captions)
        k = want.mask.shape[1]
        assert got.mask.shape == (len(captions), t.n) and torch.equal(got.mask[:, :k], want.mask) and not got.mask[:, k:].any()
        assert (got.tokens[:, :k]-want.tokens).abs().max() < 2e-3 and (got.tokens[:, k:] == 0).all() and got.tokens.dtype == torch.float32
        assert torch.equal(t.text(['']).tokens[0], got.empty) and torch.equal(t.text(['']).mask[0], got.empty_mask)
        assert torch.equal(t.text(t.rows(captions)).tokens, got.tokens) and len(t.text([])) == 0
    assert torch.equal(got[[3]].tokens, table.text(captions[3:4]).tokens)
    for bad in (0, -1, .5):
        with raises('batch_size'): caption_table(encoder, SOME, bad, quiet=True)


def test_a_table_of_another_encoder_is_refused(tmp_path):
    encoder = HFText(made('bert'), tokenizer(), 'tiny-bert')
    table, path = caption_table(encoder, SOME, quiet=True), tmp_path/'t.safetensors'
    table.save(path)
    assert load_captions(path).fingerprint == encoder.fingerprint()
    for other in (HFText(made('bert'), tokenizer(), layer=-2), HFText(made('t5'), tokenizer())):
        with raises('t.safetensors holds states of another encoder (tiny-bert)'): load_captions(path, other)
    with raises("'a rign' is not among the 4 captions"): table.text(['a ring on a red ground', 'a rign'])
    tensors, meta = load_weights(path)
    for name, odd in (('short', dict(tensors, ends=tensors['ends'][:-1])), ('cut', dict(tensors, tokens=tensors['tokens'][:-1])),
                      ('back', dict(tensors, ends=tensors['ends'].flip(0)))):
        save_weights(tmp_path/f'{name}.safetensors', odd, meta)
        with raises('no states of captions'): load_captions(tmp_path/f'{name}.safetensors')
    save_weights(tmp_path/'other.safetensors', dict(x=torch.zeros(2)), {})
    with raises('no table of captions'): load_captions(tmp_path/'other.safetensors')
    with raises('no weights at'): load_captions(tmp_path/'none.safetensors')
    with raises('range of float16', 'tiny-bert'): CaptionTable(table.tokens*torch.inf, table.ends, table.texts, 'tiny-bert', '')
