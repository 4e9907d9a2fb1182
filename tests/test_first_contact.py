"Names, folders and other people's sets where objects are meant; classes that meet by name; one net is one source; n of a set in every table."
import io
import json
import tarfile
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from vfmvae.align import score_sources, se_cknna
from vfmvae.probes import knn_accuracy, linear_probe, probe, ridge_probe
from vfmvae.core import UserError
from vfmvae.images import to_pil, transform
from vfmvae.world import World
from vfmvae.features import extract
from vfmvae.folders import folder, shards
from vfmvae.data import take
from vfmvae.robustness import layer_scores, robustness
from vfmvae.tokenizer import LatentFeatures, save_tokenizer, tokenizers
from vfmvae.vfm import VFM
from vfmvae.views import _stream, apply_view, as_source, extract_views, group_by_source, image_set, ResizePadVFM

COLOURS = dict(ant=(220, 40, 40), bee=(40, 220, 40), cat=(40, 40, 220), dog=(220, 220, 40))
class Colour:
    "The mean colour of an image, as a source."
    name, layers = 'colour', (0,)
    def features(self, x, layers=None): return {0: x.mean((2, 3))[:, None]}


def picture(c, i): return Image.fromarray(np.clip(np.random.default_rng([i, *COLOURS[c]]).normal(0, 20, (16, 16, 3))+COLOURS[c], 0, 255).astype(np.uint8))
def as_folder(root, classes, n, start=0):
    for c in classes:
        (root/c).mkdir(parents=True)
        for i in range(n): picture(c, start+i).save(root/c/f'{i}.png')
    return folder(root, size=16)
def as_shard(path, classes, n, start=0, label=str, names=None):
    with tarfile.open(path, 'w') as tar:
        for c in classes:
            for i in range(n):
                data = io.BytesIO()
                picture(c, start+i).save(data, 'png')
                for ext, b in (('png', data.getvalue()), ('cls', label(c).encode())):
                    m = tarfile.TarInfo(f'{c}{i:03d}.{ext}')
                    m.size = len(b)
                    tar.addfile(m, io.BytesIO(b))
    if names: (path.parent/'classes.json').write_text(json.dumps(names))
    return shards(path, size=16)


@pytest.fixture(scope='module')
def sets(tmp_path_factory):
    root, every = tmp_path_factory.mktemp('sets'), list(COLOURS)
    for d in ('numbered', 'words', 'turned', 'learn'): (root/d).mkdir()
    turned = every[::-1]
    return dict(train=as_folder(root/'train', every, 12), all=as_folder(root/'all', every, 5, 50), some=as_folder(root/'some', every[1:], 5, 50),
                last=as_folder(root/'last', every[:3], 5, 50), more=as_folder(root/'more', every, 5, 50),
                words=as_shard(root/'words/a.tar', every[1:], 5, 50),
                learn=as_shard(root/'learn/a.tar', every, 9, 20, lambda c: str(every.index(c)), every),
                numbered=as_shard(root/'numbered/a.tar', every, 5, 50, lambda c: str(every.index(c)), every),
                turned=as_shard(root/'turned/a.tar', every, 5, 50, lambda c: str(turned.index(c)), turned),
                bare=as_shard(root/'bare.tar', every, 5, 50, lambda c: str(every.index(c))))


@pytest.mark.parametrize('test', ('all', 'some', 'last', 'words', 'numbered', 'turned'))
def test_classes_meet_by_name(sets, test):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        one, back = (probe(Colour(), *s, k=3, seeds=(0,))[0] for s in ((sets['train'], sets[test]), (sets['learn'], sets[test])))
    assert one['linear'] == one['knn'] == back['linear'] == back['knn'] == 1.


def test_a_class_that_training_never_saw_is_named_and_wrong(sets):
    with pytest.warns(match='never saw the class ant: 5 of 20 test images count as wrong'): row = probe(Colour(), sets['some'], sets['all'], k=3, seeds=(0,))[0]
    assert row['linear'] == row['knn'] == .75
    with pytest.raises(UserError, match='no class in common: training has ant, bee, cat, dog, the test 0, 1, 2, 3; .*classes.json'):
        probe(Colour(), sets['train'], sets['bare'])
    with pytest.raises(UserError, match='no two classes'): probe(Colour(), [picture('ant', i) for i in range(12)], sets['all'])


def test_sets_whose_labels_mean_nothing_are_refused(sets):
    class Custom:
        classes = tuple(COLOURS)
        def __init__(self, label): self.label = label
        def __len__(self): return 20
        def batch(self, at): return dict(image=sets['all'].batch(at)['image']) | ({} if self.label is None else {'label': torch.full((len(at),), self.label)})
    for label, says in ((None, 'no labels'), (-1, 'hold -1'), (9, 'a label 9 and 4 classes'), (.5, 'which is no class')):
        with pytest.raises(UserError, match=says): probe(Colour(), sets['train'], Custom(label))
    assert probe(Colour(), sets['train'], Custom(2.), seeds=(0,), k=3)[0]['linear'] == .25


def test_labels_of_any_form_give_the_same_probe():
    x = torch.randn(80, 5, generator=torch.Generator().manual_seed(0))
    y = (x[:, 0] > 0).long() + 2*(x[:, 1] > 0)
    words = np.array(['ant', 'bee', 'cat', 'dog'])[y]
    want = linear_probe(x[:50], y[:50], x[50:], y[50:]), knn_accuracy(x[:50], y[:50], x[50:], y[50:], 5)
    for z in (y[:, None], y.double(), y.half(), y.numpy(), y.tolist(), y.int()+7, words, words.tolist(), y.to(torch.uint8), [*y]):
        u, v = z[:50], z[50:]
        assert (linear_probe(x[:50].requires_grad_(), u, x[50:], v), knn_accuracy(x[:50], u, x[50:], v, 5)) == want
    x = x.detach()
    assert linear_probe(x[:50], y[:50] > 1, x[50:], y[50:] > 1).value > .8
    assert ridge_probe(x[:50], x[:50, :2].tolist(), x[50:], x[50:, :2].numpy()).value > .99
    bad = [(y[:50]+.5, y[50:], 'no class'), (y[:50]-1, y[50:], 'hold -1'), (words[:50], y[50:], 'words on one side'), (y[:50], y[50:].float()*torch.nan, 'NaN'),
           (torch.eye(4)[y[:50]], y[50:], 'class of each row'), (None, y[50:], 'not text, objects'), (y[:9], y[50:], 'one for each row'),
           (3, y[50:], 'one for each'),
           ([None]*50, y[50:], 'not text, objects'), (y[:50]*1j, y[50:], 'complex')]
    for u, v, says in bad:
        with pytest.raises(UserError, match=says) as e: linear_probe(x[:50], u, x[50:], v)
        assert '\n' not in str(e.value)
    with pytest.raises(UserError, match='give numbers'): ridge_probe(x[:50], words[:50], x[50:], words[50:])
    with pytest.raises(UserError, match='2 and 1 factors'): ridge_probe(x[:50], x[:50, :2], x[50:], x[50:, :1])


def test_a_loader_of_pairs_is_a_set_of_images():
    "A TensorDataset was taken, a DataLoader of it refused."
    x = torch.rand(7, 3, 16, 16, generator=torch.Generator().manual_seed(0))*2-1
    own = torch.utils.data.TensorDataset(x, torch.arange(7))
    for images in (torch.utils.data.DataLoader(own, 3), iter(own), torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), 2)):
        assert torch.equal(extract(Colour(), images, quiet=True)[0], x.mean((2, 3)))
    for images in (iter([[x[0], x[1]]]), iter([[x, x]])):               # a list of pictures is no pair: none is left out in silence
        with pytest.raises(UserError, match='gave a list'): extract(Colour(), images, quiet=True)


# names ----------------------------------------------------------------------------------------------------------------------------------------

def test_names_files_and_objects_are_one(tmp_path):
    tok, world = tokenizers['vfmvae-tiny-f8d16'], World(16, seed=8)
    file = save_tokenizer(tmp_path/'own.safetensors', tok)
    want = se_cknna(tok, VFM('tiny'), world, [('rotation', 90)], k=3, times=20, quiet=True)
    assert robustness([('vfmvae-tiny-f8d16', 'tiny')], world, [('rotation', 90)], k=3, times=20, quiet=True) == want
    assert [r['value'] for r in score_sources([(str(file), ('tiny', -1))], world, [('rotation', 90)], k=3, times=20, quiet=True)] == want.column('value')
    assert layer_scores([file], ['tiny'], world, k=3, times=20, quiet=True)[0]['value'] == want[0]['value']
    assert probe('tiny', World(20), World(20, seed=9), layers=[0], seeds=(0,), k=3)[0]['source'] == 'tiny'
    assert isinstance(as_source('conv-f8d16'), LatentFeatures)


@pytest.mark.parametrize('name, says', [('vfmvae-tiny-f8d61', 'nearest: vfmvae-tiny-f8d16'), ('tini', 'nearest: tiny'), ('', 'no tokenizer or VFM named'),
                                        ('gone.safetensors', 'gone.safetensors'), ('sd.ckpt', 'open_tokenizer'), (VFM, 'is a class'), (None, 'NoneType')])
def test_a_name_of_nothing_is_one_line(name, says):
    with pytest.raises(UserError, match=says) as e: se_cknna(name, 'tiny', World(20))
    assert '\n' not in str(e.value)


def test_two_objects_of_one_net_are_one_source():
    one, two, other = VFM('tiny'), VFM('tiny'), VFM('tiny', pretrained=False)
    toks = [LatentFeatures(tokenizers['conv-f8d16']) for _ in range(2)]
    found = group_by_source([(one, -1), (two, 0), (toks[0], 'latent'), (toks[1], 'latent')])
    assert found['tiny'] == (one, [-1, 0]) and found['conv-f8d16'] == (toks[0], ['latent'])
    sampled = LatentFeatures(toks[0].tokenizer, sample_seed=0)
    for a, b in ((one, other), (ResizePadVFM(one), ResizePadVFM(one, .5)), (toks[0], sampled)):      # other weights, other settings
        with pytest.raises(UserError, match='two different sources'): group_by_source([(a, a.layers[0]), (b, b.layers[0])])
    assert len(score_sources([('tiny', 'tiny'), (('tiny', 0), one)], World(12), ['hflip'], k=3, times=20, quiet=True)) == 4


def test_whatever_stands_for_images(tmp_path):
    x = World(24, seed=8).batch(range(24))['image']
    for i, p in enumerate(map(to_pil, x)): p.save(tmp_path/f'{i:02d}.png')
    class Torchvision:
        def __len__(self): return 24
        def __getitem__(self, i): return to_pil(x[i]), i % 2
    forms = [x, list(x), [to_pil(i) for i in x], sorted(tmp_path.iterdir()), [str(p) for p in sorted(tmp_path.iterdir())], Torchvision(),
             folder(tmp_path, size=64), iter(x.split(7))]
    ask = lambda ds: se_cknna(Colour(), Colour2(), ds, ['mixed', ('noise', .1)], k=3, times=20, quiet=True)
    want = ask(World(24, seed=8)).column('value')
    for ds in forms: assert ask(ds).column('value') == pytest.approx(want, abs=1e-6), type(ds)
    with pytest.warns(match='enlarged'): assert ask(str(tmp_path)).n == 24                # a path is opened at the size of a folder
    for bad, says in ((5, 'no set of images'), ('/nowhere', 'no folder and no shard'), ([], 'no images'), ({'a': 1}, 'no data set'), (['a.png'], 'a.png')):
        with pytest.raises(UserError, match=says): ask(bad)
    with pytest.raises(UserError, match='stream whose length'): image_set(iter(x), 3)


def test_n_is_spread_and_written_down(tmp_path):
    ds = as_folder(tmp_path/'x', COLOURS, 10)
    class Flat(Colour):
        def features(self, x, layers=None): return {0: x.flatten(2).transpose(1, 2)}
    t = score_sources(
        [(Flat(), Colour2())], ds, ['mixed'], k=3, times=20, quiet=True, n=12)
    assert t.n == 12 and t.taken == '12 of 40, spread' and len(t.data) == 16
    seen = extract_views({'c': (Colour(), [0])}, image_set(ds, 12), ['mixed'], quiet=True)
    assert {n.split('/')[0] for n in seen['clean', 'c', 0].names} == set(COLOURS)         # of every class
    again = extract_views({'c': (Colour(), [0])}, take(ds, 12), ['mixed'], quiet=True)['mixed', 'c', 0]
    again.check(seen['clean', 'c', 0])                                                    # places by rank of name, stamps of the same files
    p = probe(Colour(), ds, ds, k=3, seeds=(0,), n=20)
    assert (p.n_train, p.n_test, p.train['taken']) == (20, 20, '20 of 40, spread')
    assert score_sources([(Flat(), Colour2())], World(30), ['hflip'], k=3, times=20, quiet=True, n=15).taken == 'the first 15 of 30'


class Colour2(Colour):
    name = 'corner'
    def features(self, x, layers=None): return {0: x[:, :, :4, :4].mean((2, 3))[:, None]}


# what views draw ------------------------------------------------------------------------------------------------------------------------------

def test_streams_of_other_seeds_do_not_meet():
    first = {_stream(42, i) for i in range(10_000)}
    assert first == set(range(42, 10_042))
    for seed in (0, 1, 41, 43, 44, 52, 1000, -1, 2**40+1): assert not first & {_stream(seed, i) for i in range(10_000)}, seed
    x = World(1).batch([0])['image'].repeat(20, 1, 1, 1)                                  # one image 20 times: what differs is what was drawn
    of = lambda seed: {i.numpy().tobytes() for i in apply_view(x, ('colour', .4), range(20), seed)[0][1]}
    assert not of(42) & of(43) and not of(0) & of(1) and len(of(0)) == 20
    for view in (('crop', .3), ('occlusion', .2), ('translation', .2)):                   # seed 42: the draws of the studies
        assert torch.equal(apply_view(x[:1], view, [7], 42)[0][1], transform(x[:1], *view, 42+7))


def test_the_seed_reaches_the_views():
    ask = lambda seed: score_sources([(Colour(), Colour2())], World(40, seed=8), [('noise', .2), ('crop', .3)], k=3, times=20, quiet=True, seed=seed)
    zero, one = ask(0), ask(1)
    assert zero[0]['value'] == one[0]['value'] and all(zero[i]['value'] != one[i]['value'] for i in (1, 2)) and (zero.seed, one.seed) == (0, 1)
    drawn = extract_views({'c': (Colour(), [0])}, World(40, seed=8), [('noise', .2)], quiet=True, seed=42)['noise 0.2', 'c', 0]
    assert torch.equal(drawn.features, extract_views({'c': (Colour(), [0])}, World(40, seed=8), [('noise', .2)], quiet=True)['noise 0.2', 'c', 0].features)


def test_adapters_say_where_they_are():
    class Net(nn.Module):
        name, layers, patch, interpolation = 'net', (0,), 8, 'bilinear'
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(1, device='meta'))
        def features(self, x, layers=None):
            assert x.device.type == 'meta', 'images lie elsewhere'
            return {0: torch.zeros(len(x), 1, 3)}
    source = ResizePadVFM(Net())
    assert source.device.type == 'meta' and ResizePadVFM(VFM('tiny')).device.type == 'cpu'
    assert extract_views({'net': (source, [0])}, World(4), quiet=True)['clean', 'net', 0].features.shape == (4, 3)
    with pytest.raises(UserError, match='too few'): ResizePadVFM(VFM('tiny')).features(torch.zeros(1, 3, 3, 3))
    for ratio in (0, -1, float('nan'), 'x'):
        with pytest.raises(UserError, match='ratio'): ResizePadVFM(VFM('tiny'), ratio)


@pytest.mark.parametrize('call', [
    lambda w: se_cknna('tiny', 'tiny', w, k=2.5), lambda w: se_cknna('tiny', 'tiny', w, k=20), lambda w: se_cknna('tiny', 'tiny', w, k=3, times=1),
    lambda w: se_cknna('tiny', 'tiny', w, k=3, times='x'), lambda w: se_cknna('tiny', 'tiny', w, k=3, seed=.5), lambda w: se_cknna('tiny', 'tiny', w, k=3, n=0),
    lambda w: se_cknna('tiny', 'tiny', w, [('rotation', 'far')]), lambda w: se_cknna('tiny', 'tiny', w, [('rotation', float('nan'))]),
    lambda w: se_cknna('tiny', 'tiny', w, 5), lambda w: se_cknna('tiny', 'tiny', w, [5]), lambda w: se_cknna('tiny', 'tiny', w, ('rotation', 45)),
    lambda w: score_sources('tiny', w), lambda w: score_sources([('tiny',)], w), lambda w: score_sources([('tiny', ('tiny', 0, 1))], w),
    lambda w: layer_scores('tiny', ['tiny'], w), lambda w: layer_scores(['tiny'], 'tiny', w), lambda w: probe('tiny', w, w, k=0, layers=[0]),
    lambda w: probe('tiny', w, w, seeds=(.5,)), lambda w: probe('tiny', w, w, batch_size=0), lambda w: extract_views({}, w, names=['a']),
    lambda w: extract_views({}, w, batch_size=0), lambda w: extract_views({}, w, seed='x')])
def test_bad_numbers_are_one_line_before_any_work(call):
    with pytest.raises(UserError) as e: call(World(20))
    assert '\n' not in str(e.value)
