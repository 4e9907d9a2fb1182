"""Samples and pictures on disk: whose they are, that none overwrites another or leaves its folder, and one line for what cannot be."""
import copy, io, json, tarfile
from dataclasses import replace
from functools import partial
from pathlib import Path
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from vfmvae.core import Notice, UserError
from vfmvae.world import CLASSES, World
from vfmvae.folders import folder, shards
from vfmvae.dit import DiT
from vfmvae.presets import FLOW_PRESETS
from vfmvae.generation import evaluate_samples, generate, open_net, sample_labels, Samples, tokenizer_of, train_flow
from vfmvae.latents import cache_latents, LatentCache
from vfmvae.recipes import decode_latents, evaluate_equivariance, evaluate_tokenizer, open_data
from vfmvae.tokenizer import open_tokenizer
from test_latents import Toy, folder_of

PRESET = FLOW_PRESETS['dit-conv-f8d16']


def one_line(f, *args, **kw):
    "The message of the UserError that a call must end in."
    with pytest.raises(UserError) as e: f(*args, **kw)
    assert '\n' not in str(e.value)
    return str(e.value)


def small(steps=2):
    "A preset that trains in a second."
    return replace(PRESET, net=replace(PRESET.net, in_channels=3, hidden_size=32, depth=1, num_heads=2), latent=(3, 8, 8), num_images=16*steps, batch_size=16)


def net_of(channels=3):
    "A net that is quick, over latents of 2 x 2."
    torch.manual_seed(0)
    net = DiT(replace(PRESET.net, in_channels=channels, hidden_size=32, depth=1, num_heads=2, patch_size=1)).eval()
    for p in net.parameters(): torch.nn.init.normal_(p, std=.2)
    net.meta = dict(tokenizer='toy-f8d3', latent=[channels, 2, 2])
    return net


# files named by others ---------------------------------------------------------------------------------------------------------------------------

def tar(path, *names):
    "A shard of pictures of different greys, with these names."
    with tarfile.open(path, 'w') as t:
        for k, name in enumerate(names):
            b = io.BytesIO()
            Image.new('RGB', (16, 16), (20*k+10,)*3).save(b, 'PNG')
            i = tarfile.TarInfo(name)
            i.size = len(b.getvalue())
            t.addfile(i, io.BytesIO(b.getvalue()))
    return path


class Grey(Toy):
    "Each picture's own grey, so that pictures can be told apart."
    def __init__(self):
        super().__init__(scaled=False, wide=False)
        self.stats.set(torch.zeros(3), torch.full((3,), .5))
    def encode(self, x): return self.stats.scale(type(super().encode(x))(torch.nn.functional.avg_pool2d(x, 8)))


class Named:
    "Pictures with these names, each of its own grey."
    classes = ('0',)
    def __init__(self, names): self.names, self.x = names, torch.stack([torch.full((3, 16, 16), (20*k+10)/127.5-1) for k in range(len(names))])
    def __len__(self): return len(self.names)
    def batch(self, at): return dict(image=self.x[list(at)], label=torch.zeros(len(at)).long(), key=[self.names[i] for i in at])


def greys(files): return [int(np.asarray(Image.open(f))[4, 4, 0]) for f in files]


@pytest.mark.parametrize('names', [('a.jpg', 'a.png', 'b.png'), ('a.png', 'A.png', 'a.webp'), ('c/a.png', 'd/a.png', 'c/b.png'),
                                   ('a.v1.png', 'a.v2.png', 'a.png'), ('a.jpg', 'a.png', 'a.jpg.png'), ('x.jpg', 'x.png/y.jpg', 'x.png/z.jpg'),
                                   ('a-2.png', 'a.png', 'a.bmp'), ('a', 'a', 'a')], ids=' '.join)
def test_every_picture_gets_a_file_of_its_own(tmp_path, names):
    tok, cache = Grey(), cache_latents(Grey(), Named(names), tmp_path/'z', shard_size=2)
    assert LatentCache(tmp_path/'z').names() == list(names)
    files = decode_latents(tok, cache, tmp_path/'out', batch_size=2)
    assert sorted(files) == sorted(f for f in (tmp_path/'out').rglob('*.png') if f.is_file()) and greys(files) == [20*k+10 for k in range(len(names))]
    assert len({str(f).casefold() for f in files}) == len(names)
    assert all(f.parent.relative_to(tmp_path/'out').as_posix() == (n.rpartition('/')[0] or '.') for f, n in zip(files, names, strict=True))


def test_keys_that_repeat_across_shards_and_folders_stay_apart(tmp_path):
    tar(tmp_path/'0.tar', '000.png', '001.png')
    tar(tmp_path/'1.tar', '000.png', '001.png', 'x/000.png')
    cache_latents(Grey(), shards(str(tmp_path/'{0..1}.tar'), size=16), tmp_path/'z')
    files = decode_latents(Grey(), tmp_path/'z', tmp_path/'out')
    assert len({*files}) == 5 == len(list((tmp_path/'out').rglob('*.png'))) and greys(files) == [10, 30, 10, 30, 50]


def test_mirrored_latents_are_not_decoded_in_their_place(tmp_path):
    tok, data = open_tokenizer('conv-f8d16'), World(4, seed=8)
    files = [decode_latents(tok, cache_latents(tok, data, tmp_path/f'{flips}', flips=flips), tmp_path/f'png{flips}') for flips in (False, True)]
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(*files, strict=True))


@pytest.mark.parametrize('name', ['../../x.png', '/vfmvae-away/x.png', 'a/../../x', '..', '.', '', 'a\0b', 'n'*300, 'C:\\x'])
def test_a_name_that_leaves_the_folder_is_refused_before_anything_is_written(tmp_path, name):
    tok, cache = Grey(), cache_latents(Grey(), Named(['fine', name]), tmp_path/'z')
    there = sorted(tmp_path.rglob('*'))
    one_line(decode_latents, tok, cache, tmp_path/'a'/'b'/'out')
    assert sorted(tmp_path.rglob('*')) == there or not list((tmp_path/'a').rglob('*.png'))
    assert not list(tmp_path.rglob('x*.png'))


def test_a_link_in_the_folder_does_not_lead_out_of_it(tmp_path):
    (tmp_path/'out').mkdir()
    (tmp_path/'away').mkdir()
    (tmp_path/'out'/'c').symlink_to(tmp_path/'away')
    one_line(decode_latents, Grey(), cache_latents(Grey(), Named(['c/x.png', 'y']), tmp_path/'z'), tmp_path/'out')
    assert not list((tmp_path/'away').iterdir())


def spoil(cache, names=None, **tensors):
    "Rewrites the first shard of a cache."
    f = cache.dir/'shard-00000.safetensors'
    with safe_open(f, 'pt') as s: kept, head = {k: s.get_tensor(k).clone() for k in s.keys()}, s.metadata()      # noqa: SIM118
    f.unlink()
    save_file(kept | tensors, f, head if names is None else dict(about=names))


BROKEN = {'NaN': torch.full((2, 3, 2, 2), float('nan')), 'infinite': torch.full((2, 3, 2, 2), float('-inf')), 'none': torch.zeros(0, 3, 2, 2),
          'other channels': torch.zeros(2, 4, 2, 2), 'no grid': torch.zeros(2, 3), 'complex': torch.zeros(2, 3, 2, 2, dtype=torch.complex64)}


@pytest.mark.parametrize('kind', list(BROKEN))
def test_latents_that_cannot_be_are_refused_and_nothing_is_written(tmp_path, kind):
    spoil(cache_latents(Grey(), Named(['a', 'b']), tmp_path/'z'), mean=BROKEN[kind])
    one_line(decode_latents, Grey(), tmp_path/'z', tmp_path/'out')
    assert not list(tmp_path.rglob('*.png'))


@pytest.mark.parametrize('names', ['{"names": ["a"]}', '{"names": "ab"}', '{"names": ["a", 7]}', '{"names": ["a", ""]}', '["a", "b"]', '{'])
def test_names_that_are_none_are_refused(tmp_path, names):
    spoil(cache_latents(Grey(), Named(['a', 'b']), tmp_path/'z'), names)
    assert 'shard-00000.safetensors' in one_line(decode_latents, Grey(), tmp_path/'z', tmp_path/'out')


def test_pictures_of_an_earlier_run_are_not_left_among_the_new_ones(tmp_path):
    "Who measures the folder would measure both."
    net, toy, out = net_of(), Toy(), tmp_path/'drawn'
    generate(net, 4, tokenizer=toy, out=out, steps=1)
    assert len(generate(net, 4, seed=5, tokenizer=toy, out=out, steps=1)) == 4                # all of them are written anew
    (out/'.000007.png.host-1-ab.tmp').mkdir()                                                # another process is writing, or was killed
    (out/'.000007.png.host-1-ab.tmp'/'000007.png').write_bytes(b'')
    generate(net, 4, tokenizer=toy, out=out, steps=1)
    before = {f.name: f.read_bytes() for f in out.iterdir() if f.is_file()}
    assert 'holds 2 other pictures, such as 000002.png; empty it' in one_line(generate, net, 2, tokenizer=toy, out=out, steps=1)
    assert {f.name: f.read_bytes() for f in out.iterdir() if f.is_file()} == before
    (tmp_path/'seen'/'a').mkdir(parents=True)
    (tmp_path/'seen'/'a'/'old.png').write_bytes(b'')
    cache = cache_latents(toy, World(3, seed=8, size=16), tmp_path/'latents')
    assert 'holds 1 other pictures, such as a/old.png' in one_line(decode_latents, toy, cache, tmp_path/'seen')
    (tmp_path/'seen'/'a'/'old.png').rename(tmp_path/'seen'/'a'/'old.JPG')               # whoever measures the folder would read it, too
    assert 'holds 1 other pictures, such as a/old.JPG' in one_line(decode_latents, toy, cache, tmp_path/'seen')


def test_where_no_name_is_known_there_are_numbers(tmp_path):
    spoil(cache_latents(Grey(), Named(['a', 'b', 'c']), tmp_path/'z', shard_size=2), '{}')
    assert [f.name for f in decode_latents(Grey(), tmp_path/'z', tmp_path/'out')] == ['000000.png', '000001.png', 'c.png']


def test_latents_of_other_weights_or_another_scale_are_not_decoded(tmp_path):
    tok, data = open_tokenizer('conv-f8d16'), World(2, seed=8)
    f = cache_latents(tok, data, tmp_path/'z').dir
    for change, says in (('weights', 'other weights than conv-f8d16'), ('scale', 'another scale than conv-f8d16')):
        other = copy.deepcopy(tok)
        if change == 'scale': other.stats.set(other.stats.mean+1, other.stats.std)
        else:
            with torch.no_grad(): next(iter(other.trainable().values())).add_(1e-3)
        assert says in one_line(decode_latents, other, f, tmp_path/'out')
    assert len(decode_latents(copy.deepcopy(tok), f, tmp_path/'out')) == 2


def test_a_flat_picture_is_encoded_too(tmp_path):
    from vfmvae.data import TensorSet
    tok = open_tokenizer('conv-f8d16')
    assert len(decode_latents(tok, cache_latents(tok, TensorSet(torch.zeros(1, 3, 64, 64)), tmp_path/'z'), tmp_path/'out')) == 1


# not finite --------------------------------------------------------------------------------------------------------------------------------------

class Sick(Grey):
    "Its decoder overflows."
    def decode(self, z): return super().decode(z)*float('inf')


@pytest.mark.parametrize('measure', [evaluate_tokenizer, evaluate_equivariance])
def test_a_tokenizer_that_gives_nan_is_no_number(measure): assert 'NaN or infinite' in one_line(measure, Sick(), World(4, seed=8))


def test_pictures_and_latents_that_are_not_finite_are_not_written(tmp_path):
    f = cache_latents(Grey(), World(2, seed=8), tmp_path/'z').dir
    one_line(decode_latents, Sick(), f, tmp_path/'out')
    one_line(generate, net_of(), 2, tokenizer=Sick(), steps=2, out=tmp_path/'out')
    net = net_of()
    with torch.no_grad(): next(net.parameters()).fill_(float('nan'))
    for more in (dict(out=tmp_path/'out'), {}): assert 'NaN or' in one_line(generate, net, 1, tokenizer=Grey(), steps=1, **more)
    assert not list(tmp_path.rglob('*.png'))


def test_a_perfect_reconstruction_is_said_to_be_infinite():
    class Same(Toy):
        def encode(self, x): return super().encode(x).__class__(x[:, :, ::8, ::8], None)
        def decode(self, z): return torch.nn.functional.interpolate(z, scale_factor=8)
    from vfmvae.data import TensorSet
    with pytest.warns(UserWarning, match='psnr is not finite'): assert evaluate_tokenizer(Same(), TensorSet(torch.zeros(2, 3, 16, 16)))['psnr'] == float('inf')


# what is asked for -------------------------------------------------------------------------------------------------------------------------------

UNDRAWN = [*(dict(labels=v) for v in ([], 0, -3, [-3], [16], [10**30], [.5], 2.5, ['a'], [[1]], True, None, 'four')), dict(batch_size=0),
           dict(batch_size=-1), dict(seed=2**70), dict(seed=.5), dict(rank=1, num_processes=2), dict(rank=2, num_processes=2, out='x'), dict(num_processes=0),
           dict(policy='even'), dict(out='/dev/null/x')]


@pytest.mark.parametrize('bad', UNDRAWN, ids=str)
def test_what_cannot_be_sampled_is_one_line(bad, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one_line(generate, net_of(), **{'labels': 2, 'steps': 1, 'tokenizer': Grey(), **bad})
    assert not list(tmp_path.rglob('*.png'))


def test_a_class_has_a_name_and_a_number():
    net, how = net_of(), dict(tokenizer=Grey(), steps=1)
    net.meta['classes'] = ['crane', *(f'class {i}' for i in range(14)), 'crane']        # as ImageNet has two
    want = generate(net, [3, 7, 3], **how)
    for names in (['class 2', 'class 6', 'class 2'], ('class 2', 'class 6', 'class 2')):
        got = generate(net, names, **how)
        assert torch.equal(got.images, want.images) and got.labels.tolist() == [3, 7, 3] and got.classes == tuple(net.meta['classes'])
    assert torch.equal(generate(net, 'class 2', **how).images, generate(net, [3], **how).images)
    assert 'nearest: class 2' in one_line(generate, net, ['clas 2'], **how) and 'share a name' in one_line(generate, net, ['crane'], **how)
    one_line(generate, net, ['class 2', 3], **how)


def test_a_number_that_is_a_name_is_the_name():
    "Folders called 1, 2 ... are usual; from a shell there are only words."
    net, how = net_of(), dict(tokenizer=Grey(), steps=1)
    net.meta['classes'] = ['1', '10', '11', '2', *'abcdefghijkl']
    with pytest.warns(Notice, match="'2' is the class of this name, number 3"): assert generate(net, '2', **how).labels.tolist() == [3]
    assert generate(net, ['5'], **how).labels.tolist() == [5] == generate(net, [5], **how).labels.tolist()      # no name: a number
    assert generate(net, [2], **how).labels.tolist() == [2]
    for bad in ('16', '9'*30): one_line(generate, net, bad, **how)


def test_numbers_of_numpy_and_torch_count(tmp_path):
    call = partial(generate, net_of(), tokenizer=Grey(), steps=1)
    want = call([0, 1]).images
    for labels in (np.int64(2), torch.tensor(2), [0, 1], np.array([0, 1], np.int32), torch.tensor([0, 1]), (np.int64(0), 1), 2.):
        assert torch.equal(call(labels).images, want)
    assert sample_labels(np.int64(4), 3).tolist() == [0, 1, 2, 0]
    assert sample_labels(9, 5, 'random', 7).tolist() == np.random.default_rng(7).integers(0, 5, 9).tolist()
    files = [call(3, out=tmp_path, batch_size=1, rank=r, num_processes=2) for r in range(2)]
    assert sorted(f.name for part in files for f in part) == ['000000.png', '000001.png', '000002.png']
    assert json.loads((tmp_path/'samples.json').read_text())['classes'] == [0, 1, 2]


@pytest.mark.parametrize('bad', [
    dict(num_images=0), dict(batch_size=0), dict(batch_size=-1), dict(num_images=8), dict(num_imagse=8), dict(n=0), dict(lr=-1.), dict(lr=float('nan')),
    dict(lr=float('inf')), dict(accumulate=0), dict(workers=-1), dict(seed=2**70), dict(out='net.pt'), dict(out='/dev/null/x/net.safetensors'),
    dict(run='/dev/null/x/'), dict(data=''), dict(data=['a.tar', 'b.tar'])], ids=str)
def test_a_training_that_cannot_be_is_refused_before_anything_is_cached(bad, tmp_path, monkeypatch):
    monkeypatch.setenv('VFMVAE_HOME', str(tmp_path/'home'))
    one_line(train_flow, small(), **{'data': World(32, seed=1), 'tokenizer': Toy(), **bad})
    assert not list((tmp_path/'home').rglob('*.safetensors'))


def test_default_caches_of_two_folders_of_one_name_are_two(tmp_path, monkeypatch):
    monkeypatch.setenv('VFMVAE_HOME', str(tmp_path/'home'))
    for k, colour in (('A', 20), ('B', 220)): folder_of(tmp_path/k/'train', colour, n=8)
    nets = [train_flow(small(), tmp_path/k/'train', tokenizer=Toy())[0] for k in 'ABA']
    dirs = sorted((tmp_path/'home'/'latents').iterdir())
    assert len(dirs) == 2 and not torch.equal(nets[0].x_embedder.proj.weight, nets[1].x_embedder.proj.weight)
    assert all(torch.equal(a, b) for a, b in zip(nets[0].parameters(), nets[2].parameters(), strict=True))
    assert {n.meta['recipe']['fingerprint'] for n in nets} == {LatentCache(d).manifest['fingerprint'] for d in dirs}


class Grown(Toy):
    "With weights; they change nothing that its scale would tell."
    def __init__(self, weight):
        super().__init__()
        self.weights = torch.nn.Linear(2, 2)
        torch.nn.init.constant_(self.weights.weight, weight)
        torch.nn.init.zeros_(self.weights.bias)


def test_a_net_knows_the_weights_of_its_tokenizer(tmp_path):
    tok, other = Grown(1.), Grown(1.1)
    net, _ = train_flow(small(), World(16, seed=1), tmp_path/'c', tok, out=tmp_path/'net.safetensors')
    assert tokenizer_of(open_net(tmp_path/'net.safetensors'), Grown(1.)).name == tok.name
    assert 'other weights than when the net learned' in one_line(generate, net, 1, tokenizer=other, steps=1)
    with pytest.raises(UserError, match='trained anew'): train_flow(small(), World(16, seed=1), LatentCache(tmp_path/'c'), other)
    net.meta.pop('digest')                        # a file of an older version: its scale is compared, as ever
    assert len(generate(net, 1, tokenizer=other, steps=1)) == 1


# sets ---------------------------------------------------------------------------------------------------------------------------------------------

def test_everything_a_user_has_at_hand_is_a_data_set(tmp_path):
    folder_of(tmp_path/'d', 20, n=2)
    files = sorted((tmp_path/'d').rglob('*.png'))
    want = folder(tmp_path/'d', size=32).batch(range(4))['image']
    tar(tmp_path/'a.tar', '0.png')
    tar(tmp_path/'b.tar', '1.png')
    pils = [Image.open(f) for f in files]
    for spec in (tmp_path/'d', str(tmp_path/'d'), files, [str(f) for f in files], pils, [(p, 0) for p in pils], want):
        ds = open_data(spec, size=32)
        torch.testing.assert_close(ds.batch(range(4))['image'], want, atol=1e-6, rtol=0)
    assert len(open_data(tmp_path/'{a,b}.tar'.replace('{a,b}', '*'), size=16)) == 2 == len(open_data([tmp_path/'a.tar', str(tmp_path/'b.tar')], size=16))
    assert open_data(files[0], size=None).batch([0])['image'].shape == (1, 3, 64, 64) and open_data(tmp_path/'d', size=None).size == 64
    w = World(3)
    assert open_data(w) is w and len(open_data('world', n=5)) == 5
    for bad in ('', '  ', 'nowhere', 'x.tar', ['a.tar', 'b.tar'], [], None, 7, {}, dict(train=files), [tmp_path/'a.tar', files[0]], 'https://x.y/z'):
        one_line(open_data, bad)
    for size in (0, -8, 10**9, 'big', 1.5): one_line(open_data, tmp_path/'d', size)
    for kw in (dict(n=0), dict(n=-1), dict(seed=2**70), dict(size=0), dict(size=10**9)): one_line(open_data, 'world', **kw)


def test_n_of_a_sorted_set_is_spread_in_every_measure(tmp_path):
    ds = folder_of(tmp_path/'d', 20, n=10, classes='abc')
    seen = []
    class Watch:
        classes, size, keys, labels = ds.classes, 64, ds.keys, ds.labels
        def __len__(self): return len(ds)
        def batch(self, at):
            seen.extend(at)
            return ds.batch(at)
    r = evaluate_tokenizer(Grey(), Watch(), 6)
    assert {ds.labels[i] for i in seen} == {0, 1, 2} and (r['n'], r['of'], r['size']) == (6, 30, 64) and 'enlarged' not in r
    seen.clear()
    evaluate_equivariance(Grey(), Watch(), 6)
    assert {ds.labels[i] for i in seen} == {0, 1, 2}
    assert evaluate_tokenizer(Grey(), World(9, seed=8), 4)['psnr'] == evaluate_tokenizer(Grey(), World(4, seed=8), None)['psnr']   # its first
    for bad in (0, -1, 2.5): one_line(evaluate_tokenizer, Grey(), World(9), bad)
    one_line(evaluate_tokenizer, Grey(), World(9), batch_size=0)
    with pytest.warns(UserWarning, match='enlarged to 128 px'): assert evaluate_tokenizer(Grey(), folder(tmp_path/'d', size=128), 6)['enlarged'] == 6


def test_accuracy_is_measured_where_the_extractor_is():
    places = []
    class Judge(torch.nn.Module):
        name, preprocessing = 'judge', 'none'
        def __init__(self):
            super().__init__()
            self.w = torch.nn.Parameter(torch.ones(1, device='meta'))
        def forward(self, x): raise AssertionError
    judge = Judge()
    def look(x):
        places.append(x.device.type)
        return dict(probs=torch.eye(16)[:len(x)])
    judge.forward = look
    import vfmvae.generation as g
    was, g.gfid = g.gfid, lambda *a, **k: type('R', (), dict(metrics={}))()
    try:
        import dataclasses
        replace_facts = lambda s, **facts: dataclasses.replace(s, facts=s.facts | facts)
        replace, g.replace = g.replace, lambda r, **k: k['metrics']
        samples = Samples(torch.zeros(2, 3, 8, 8), torch.arange(2), dict(net='x', labels='given'), CLASSES)
        assert evaluate_samples(samples, 'ref', judge)['accuracy'] == 1.
        said = replace_facts(samples, labels='captions')      # as many captions as the judge has classes are no classes
        assert evaluate_samples(said, 'ref', judge).metrics == {}
        g.replace = replace
        assert dataclasses.replace is replace
    finally: g.gfid = was
    assert places == ['meta', 'meta']


def test_a_cache_takes_the_sets_of_others(tmp_path):
    x = World(4, seed=1).batch(range(4))['image']
    a, b = (cache_latents(Toy(), d, tmp_path/k) for k, d in dict(a=x, b=[*x]).items())
    assert torch.equal(a.batch(range(4))['mean'], b.batch(range(4))['mean']) and a.manifest['fingerprint'] == b.manifest['fingerprint']


@pytest.mark.parametrize('wrong', [3, None, ['a'], Path('nowhere'), 'dit-vfmvae-tiny-f8d61'], ids=str)
def test_what_is_no_name_of_a_net_is_one_line(wrong):
    with pytest.raises(UserError, match='^no net named .*train_flow') as e: open_net(wrong)
    assert '\n' not in str(e.value)


def test_a_record_says_whether_labels_were_counted_named_or_said(monkeypatch):
    "One class by its name was recorded as 'balanced'; names in an array of numpy were refused."
    import vfmvae.generation as g
    monkeypatch.setattr(g, 'sample_latents', lambda net, y, *_: torch.zeros(len(y), 16, 8, 8))
    monkeypatch.setattr(g, '_decoded', lambda tok, z: torch.zeros(len(z), 3, 8, 8))
    net = open_net('dit-conv-f8d16')
    one, two = net.meta['classes'][:2]
    for labels, said in ((2, 'balanced'), (one, 'given'), (np.array([one, two]), 'given')):
        drawn = generate(net, labels, steps=1, method='euler')
        assert drawn.facts['labels'] == said and drawn.labels.tolist() == [0, 1][:len(drawn)]
