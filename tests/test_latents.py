"""Latents on disk: what is read is what was encoded, whoever wrote it and however often it was interrupted."""
import copy, json, os, shutil, subprocess
import numpy as np
import pytest
import torch
from vfmvae import latents
from vfmvae.core import Gaussian, UserError
from vfmvae.world import World
from vfmvae.folders import folder
from vfmvae.data import fingerprint, loader
from vfmvae.latents import cache_latents, cache_name, latent_digest, latent_stats, LatentCache
from vfmvae.layouts import export_latents, import_latents
from vfmvae.protocols import LatentStats
from vfmvae.tokenizer import tokenizers

VFM = 'vfmvae-tiny-f8d16'


class Toy:
    "A tokenizer that is quick: means of 8 x 8 pixels."
    name, stride, channels = 'toy-f8d3', 8, 3
    def __init__(self, scaled=True, wide=True):
        self.stats, self.wide = LatentStats(3), wide
        if scaled: self.stats.set(torch.tensor([.1, -.2, .3]), torch.tensor([.5, 2., 1.5]))
    def encode(self, x):
        mean = torch.nn.functional.avg_pool2d(x, 8)
        return self.stats.scale(Gaussian(mean, torch.full_like(mean, -4.) + mean if self.wide else None))
    def decode(self, z): return torch.nn.functional.interpolate(self.stats.unscale(z), scale_factor=8)


@pytest.mark.parametrize('scaled', [True, False])
@pytest.mark.parametrize('wide', [True, False])
def test_what_is_read_is_what_was_encoded(tmp_path, scaled, wide):
    tok, data = Toy(scaled, wide), World(70, seed=4)
    c = cache_latents(tok, data, tmp_path/'c', batch_size=13, shard_size=32)
    assert len(c) == 70 and [n for _, n in c.manifest['shards']] == [32, 32, 6]
    c.bind(tok)                                   # one without a scale gets it here
    at = [69, 0, 33, 33, 31]
    want, b = tok.encode(data.batch(at)['image']), c.batch(at)
    torch.testing.assert_close(b['mean'], want.mean, atol=1e-5, rtol=1e-5)
    assert ('logvar' in b) == wide and b['label'].tolist() == data.batch(at)['label'].tolist()
    if wide: torch.testing.assert_close(b['logvar'], want.logvar, atol=1e-5, rtol=1e-5)
    if not scaled:                                 # its own scale makes samples unit
        z = Gaussian(*(c.batch(range(70)).get(k) for k in ('mean', 'logvar'))).sample(torch.Generator().manual_seed(0))
        assert z.mean((0, 2, 3)).abs().max() < .02 and (z.std((0, 2, 3))-1).abs().max() < .05


def test_statistics_in_two_passes_survive_a_large_offset():
    g = torch.Generator().manual_seed(0)
    z = torch.randn(500, 2, 3, 3, generator=g, dtype=torch.float64)*.01 + 1e4
    parts = [dict(mean=z[i:i+77], logvar=torch.full_like(z[i:i+77], -9.)) for i in range(0, 500, 77)]
    mean, std = latent_stats(parts)
    rows = z.transpose(0, 1).flatten(1)
    torch.testing.assert_close(mean, rows.mean(1), rtol=1e-12, atol=0)
    torch.testing.assert_close(std**2, rows.var(1)+torch.exp(torch.tensor(-9.).double())*rows.shape[1]/(rows.shape[1]-1), rtol=1e-9, atol=0)


def test_flips_are_the_mirrored_images_and_half_of_what_is_read(tmp_path):
    tok, data = Toy(), World(64, seed=2)
    c = cache_latents(tok, data, tmp_path/'c', flips=True, shard_size=40)
    x = data.batch(range(64))['image']
    plain, mirrored = tok.encode(x).mean, tok.encode(x.flip(-1)).mean
    taken = []
    for epoch in range(6):
        z = c.batch(range(64), epoch=epoch, seed=9)['mean']
        is_plain = ((z-plain).abs().amax((1, 2, 3)) < 1e-5)
        assert (is_plain | ((z-mirrored).abs().amax((1, 2, 3)) < 1e-5)).all()
        taken.append(is_plain)
    share = torch.stack(taken).double().mean()
    assert .4 < share < .6 and not torch.equal(taken[0], taken[1])
    assert torch.equal(c.batch([5], epoch=3, seed=9)['mean'][0], c.batch(range(64), epoch=3, seed=9)['mean'][5])
    feed = loader(c, 16, seed=9)                    # the loader says which epoch it is
    assert torch.equal(feed.batch_at(5)['mean'], c.batch(feed.indices(5).tolist(), epoch=1, seed=9)['mean'])


@pytest.mark.parametrize('processes', [2, 3])
def test_several_processes_write_the_cache_of_one(tmp_path, processes):
    tok, data = Toy(), World(90, seed=6)
    one = cache_latents(tok, data, tmp_path/'one', shard_size=16)
    many = [cache_latents(tok, data, tmp_path/'many', shard_size=16, rank=r, num_processes=processes) for r in range(processes)]
    assert many[:-1] == [None]*(processes-1)
    for k in ('stats', 'scale', 'shards', 'n', 'shape'): assert one.manifest[k] == many[-1].manifest[k]
    assert torch.equal(one.batch(range(90))['mean'], many[-1].batch(range(90))['mean'])


def test_an_interrupted_cache_goes_on(tmp_path, monkeypatch):
    tok, data, seen = Toy(), World(60, seed=1), []
    whole = cache_latents(tok, data, tmp_path/'whole', shard_size=20)
    class Stops:
        classes = data.classes
        def fingerprint(self): return 'the same'
        def __len__(self): return 60
        def batch(self, at):
            seen.extend(at)
            if max(at) >= 40 and stop: raise KeyboardInterrupt
            return data.batch(at)
    stop = True
    with pytest.raises(KeyboardInterrupt): cache_latents(tok, Stops(), tmp_path/'c', shard_size=20)
    assert sorted(p.name for p in (tmp_path/'c').iterdir()) == ['manifest.json', 'shard-00000.safetensors', 'shard-00001.safetensors']
    with pytest.raises(UserError, match='2 of 3 shards'): LatentCache(tmp_path/'c')
    stop, seen[:] = False, []
    c = cache_latents(tok, Stops(), tmp_path/'c', shard_size=20)
    assert set(seen) == {0, *range(40, 60)} and torch.equal(c.batch(range(60))['mean'], whole.batch(range(60))['mean'])


@pytest.mark.parametrize('harm', ['cut', 'empty', 'gone', 'noise', 'short'])
def test_a_damaged_shard_is_named_and_made_again(tmp_path, harm):
    tok, data = Toy(), World(40, seed=1)
    c = cache_latents(tok, data, tmp_path/'c', shard_size=20)
    want, f = c.batch(range(40))['mean'], tmp_path/'c'/'shard-00001.safetensors'
    if harm == 'cut': f.write_bytes(f.read_bytes()[:-7])
    if harm == 'empty': f.write_bytes(b'')
    if harm == 'gone': f.unlink()
    if harm == 'noise': f.write_bytes(np.random.default_rng(0).bytes(4000))
    if harm == 'short': shutil.copy(cache_latents(tok, data, tmp_path/'d', shard_size=7).dir/'shard-00000.safetensors', f)
    with pytest.raises(UserError, match='shard-00001.safetensors.*cache again: only what is missing is made') as e: LatentCache(tmp_path/'c').batch([25])
    assert '\n' not in str(e.value)
    LatentCache(tmp_path/'c').batch([5])            # the others still read
    if harm in ('cut', 'empty', 'noise', 'short'): f.unlink()      # as the message says
    torch.testing.assert_close(cache_latents(tok, data, tmp_path/'c', shard_size=20).batch(range(40))['mean'], want)


def test_a_full_disk_is_said_and_what_is_there_is_kept(tmp_path, monkeypatch):
    tok, data = Toy(), World(40, seed=1)
    import safetensors.torch
    plain, count = safetensors.torch.save_file, [0]
    def full(tensors, path, metadata=None):
        count[0] += 1
        if count[0] == 2: raise OSError(28, 'No space left on device')
        return plain(tensors, path, metadata)
    monkeypatch.setattr(safetensors.torch, 'save_file', full)
    with pytest.raises(UserError, match='no space left for .*shard-00001.*free some and call again') as e: cache_latents(tok, data, tmp_path/'c', shard_size=20)
    assert '\n' not in str(e.value) and sorted(p.name for p in (tmp_path/'c').iterdir()) == ['manifest.json', 'shard-00000.safetensors']
    assert len(cache_latents(tok, data, tmp_path/'c', shard_size=20)) == 40
    monkeypatch.setattr(latents.shutil, 'disk_usage', lambda p: type('Usage', (), dict(free=0)))
    with pytest.raises(UserError, match='no space left'): cache_latents(tok, data, tmp_path/'d', shard_size=20)


def test_a_cache_of_something_else_is_refused(tmp_path):
    tok, data = Toy(), World(40, seed=1)
    c = cache_latents(tok, data, tmp_path/'c', shard_size=20)
    with pytest.raises(UserError, match='n: 40 there, 30 here'): cache_latents(tok, data, tmp_path/'c', 30, shard_size=20)
    with pytest.raises(UserError, match='data: .*seed 1 there, .*seed 2 here'): cache_latents(tok, World(40, seed=2), tmp_path/'c', shard_size=20)
    with pytest.raises(UserError, match=f'of toy-f8d3, not of {VFM}'): c.bind(tokenizers[VFM])
    other = Toy()
    other.stats.set(other.stats.mean, other.stats.std*1.1)
    with pytest.raises(UserError, match='trained anew'): c.bind(other)
    with pytest.raises(UserError, match='the scale'): cache_latents(other, data, tmp_path/'c', shard_size=20)
    with pytest.raises(UserError, match='no latent cache'): LatentCache(tmp_path)
    with pytest.raises(UserError, match='does not say which way'): cache_latents(tok, data, tmp_path/'f', flips=True).with_images(data)
    with pytest.raises(UserError, match='39 images for 40'): c.with_images(World(39, seed=1))
    for bad in (dict(rank=2, num_processes=2), dict(n=0, shard_size=0)):
        with pytest.raises(UserError): cache_latents(tok, data, tmp_path/'e', **bad)


def test_the_published_layouts_come_back(tmp_path):
    tok, data = Toy(), World(50, seed=1)
    c = cache_latents(tok, data, tmp_path/'c', flips=True, shard_size=20)
    reg = import_latents(export_latents(c, tmp_path/'reg', 'reg'), tmp_path/'r', 'reg', tok.name, data.classes)
    a, b = c.batch(range(50), epoch=0), reg.batch(range(50))
    assert b['label'].tolist() == a['label'].tolist() and not reg.augment
    want = tok.encode(data.batch(range(50))['image'])
    torch.testing.assert_close(b['mean'], want.mean, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(b['logvar'], want.logvar, atol=1e-4, rtol=1e-4)
    first = np.load(tmp_path/'reg'/json.loads((tmp_path/'reg'/'dataset.json').read_text())['labels'][0][0])
    assert first.shape == (6, 8, 8) and first.dtype == np.float32 and (first[3:] > 0).all()
    light = import_latents(export_latents(c, tmp_path/'light', 'lightningdit', seed=3, pickle=True), tmp_path/'l', 'lightningdit', tok.name, data.classes)
    assert light.augment and [n for _, n in light.manifest['shards']] == [20, 20, 10]
    from safetensors.torch import load_file
    t = load_file(tmp_path/'light'/'latents_rank00_shard000.safetensors')
    assert t['latents'].shape == t['latents_flip'].shape == (20, 3, 8, 8) and t['labels'].dtype == torch.int64
    stats = torch.load(tmp_path/'light'/'latents_stats.pt', weights_only=True)
    assert stats['mean'].shape == stats['std'].shape == (1, 3, 1, 1)
    raw = tok.stats.unscale(want.mean)
    width = (want.logvar/2).exp()*tok.stats.std[:, None, None]
    assert abs(((t['latents']-raw[:20])/width[:20]).std()-1) < .03                   # samples of the posterior, on the raw scale
    torch.testing.assert_close(light.bind(tok).scale().std, tok.stats.std)


def test_damaged_published_files_are_named(tmp_path):
    c = cache_latents(Toy(), World(20, seed=1), tmp_path/'c', flips=True)
    made = export_latents(c, tmp_path/'light', 'lightningdit')
    f = made/'latents_rank00_shard000.safetensors'
    keep = f.read_bytes()
    f.write_bytes(keep[:100])
    with pytest.raises(UserError, match='shard000.safetensors is cut off'): import_latents(made, tmp_path/'x', 'lightningdit', 'toy')
    f.write_bytes(keep)
    (made/'latents_stats.pt').write_bytes(b'not a file')
    with pytest.raises(UserError, match='latents_stats.pt is not a plain torch file'): import_latents(made, tmp_path/'y', 'lightningdit', 'toy')
    (made/'latents_stats.pt').unlink(), (made/'latents_stats.json').unlink()
    with pytest.raises(UserError, match='no latents_stats.pt'): import_latents(made, tmp_path/'z', 'lightningdit', 'toy')
    reg = export_latents(c, tmp_path/'reg', 'reg')
    next(reg.rglob('*.npy')).write_bytes(b'')
    with pytest.raises(UserError, match='cannot be read'): import_latents(reg, tmp_path/'w', 'reg', 'toy')


def test_a_pickle_in_a_statistics_file_is_not_executed(tmp_path):
    class Evil:
        def __reduce__(self): return (open, (str(tmp_path/'executed'), 'w'))
    made = export_latents(cache_latents(Toy(), World(20, seed=1), tmp_path/'c', flips=True), tmp_path/'light', 'lightningdit')
    torch.save(dict(mean=Evil(), std=1), made/'latents_stats.pt')
    with pytest.raises(UserError): import_latents(made, tmp_path/'x', 'lightningdit', 'toy')
    assert not (tmp_path/'executed').exists()


def test_images_that_do_not_fit_are_refused_and_nothing_is_left(tmp_path):
    from PIL import Image
    (tmp_path/'pics').mkdir()
    for i in range(3): Image.new('RGB', (80, 80), (i*40, 0, 0)).save(tmp_path/'pics'/f'{i}.png')
    with pytest.raises(UserError): cache_latents(tokenizers[VFM], folder(tmp_path/'pics', size=60), tmp_path/'c')
    assert not (tmp_path/'c').exists()
    (tmp_path/'pics'/'1.png').write_bytes(b'no image')
    with pytest.raises(UserError, match='1.png'): cache_latents(tokenizers[VFM], folder(tmp_path/'pics', size=64), tmp_path/'d')
    assert not list((tmp_path/'d').glob('*.safetensors'))


# whose latents -----------------------------------------------------------------------------------------------------------------------------------

def folder_of(root, colour, n=6, classes=('a', 'b')):
    "A folder of flat pictures, sorted by class; the same names whatever the colour is."
    from PIL import Image
    for c in classes:
        (root/c).mkdir(parents=True)
        for i in range(n): Image.new('RGB', (64, 64), (colour, 10*i, 60)).save(root/c/f'{i}.png')
    return folder(root, size=64)


def test_two_folders_of_one_name_never_share_a_cache(tmp_path):
    tok, sets = Toy(), [folder_of(tmp_path/k/'train', colour) for k, colour in (('A', 20), ('B', 220))]
    first = cache_latents(tok, sets[0], tmp_path/'c')
    with pytest.raises(UserError, match='another cache.*images of 2 classes.*choose another path or delete') as e: cache_latents(tok, sets[1], tmp_path/'c')
    assert '\n' not in str(e.value)
    with pytest.raises(UserError, match='not of these.*cache again'): first.with_images(sets[1])
    assert torch.equal(first.with_images(sets[0]).batch([3])['image'], sets[0].batch([3])['image'])
    names = {cache_name(tok, s, tmp_path/k/'train') for k, s in zip('AB', sets, strict=True)}
    assert len(names) == 2 and cache_name(tok, sets[0], tmp_path/'A'/'train') in names
    assert all(set(n) <= set('abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.-') for n in names)


def test_an_edited_picture_is_another_set(tmp_path):
    from PIL import Image
    tok, data = Toy(), folder_of(tmp_path/'train', 20)
    cache_latents(tok, data, tmp_path/'c')
    Image.new('RGB', (64, 64), 'white').save(tmp_path/'train'/'b'/'5.png')
    os.utime(tmp_path/'train'/'b'/'5.png', (1, 1))
    edited = folder(tmp_path/'train', size=64)
    with pytest.raises(UserError, match='another cache'): cache_latents(tok, edited, tmp_path/'c')
    with pytest.raises(UserError, match='files that were changed since'): LatentCache(tmp_path/'c').with_images(edited)


def test_latents_of_a_large_set_are_those_of_its_copy(tmp_path):
    def heavy(at, seconds):
        for p in (at/'train').rglob('*.png'):
            os.truncate(p, 9_000_000)      # so large together that their bytes no longer decide
            os.utime(p, (seconds, seconds))
        return folder(at/'train', size=64)
    folder_of(tmp_path/'train', 20)
    tok, data = Toy(), heavy(tmp_path, 1e9)
    name, c = cache_name(tok, data, 'train'), cache_latents(tok, data, tmp_path/'c')
    shutil.copytree(tmp_path/'train', tmp_path/'elsewhere'/'train')
    copied = heavy(tmp_path/'elsewhere', 2e9)
    assert fingerprint(copied) != fingerprint(data) and cache_name(tok, copied, 'train') == name
    with pytest.warns(UserWarning, match='were copied since'): again = cache_latents(tok, copied, tmp_path/'c')
    assert torch.equal(again.batch([3])['mean'], c.batch([3])['mean'])
    assert torch.equal(again.with_images(copied).batch([3])['image'], data.batch([3])['image'])
    from PIL import Image
    Image.new('RGB', (64, 64), 'white').save(tmp_path/'elsewhere'/'train'/'b'/'5.png')
    edited = heavy(tmp_path/'elsewhere', 2e9)       # of equal sizes and times
    with pytest.raises(UserError, match='another cache'): cache_latents(tok, edited, tmp_path/'c')
    with pytest.raises(UserError, match='files that were changed since'): LatentCache(tmp_path/'c').with_images(edited)


@pytest.mark.parametrize('name', ['conv-f8d16', 'rae-tiny-f8d128'])
def test_other_weights_under_the_same_name_and_scale_are_refused(name, tmp_path):
    tok, data = tokenizers[name], World(4, seed=1)
    c = cache_latents(tok, data, tmp_path/'c').bind(tok)
    other = copy.deepcopy(tok)
    with torch.no_grad(): next(iter(other.trainable().values())).add_(1e-3)
    with pytest.raises(UserError, match=f'other weights than {name} has now.*trained anew'): c.bind(other)
    with pytest.raises(UserError, match='another cache.*digest'): cache_latents(other, data, tmp_path/'c')
    assert cache_name(tok, data) != cache_name(other, data) and cache_name(tok, data) == cache_name(copy.deepcopy(tok), data)
    unscaled = copy.deepcopy(tok)
    unscaled.stats.set(torch.zeros_like(tok.stats.mean), torch.ones_like(tok.stats.std))
    assert latent_digest(unscaled) == latent_digest(tok) != latent_digest(tok, scale=True) != latent_digest(unscaled, scale=True)
    assert c.bind(unscaled).bind(unscaled) is c                   # it took the cache's scale; its weights are the same


def test_a_cache_of_an_older_version_is_taken_with_a_word(tmp_path):
    tok, data = Toy(), folder_of(tmp_path/'train', 20)
    cache_latents(tok, data, tmp_path/'c')
    file = tmp_path/'c'/'manifest.json'
    m = {k: v for k, v in json.loads(file.read_text()).items() if k not in ('fingerprint', 'digest', 'taken')}
    file.write_text(json.dumps(m))
    with pytest.warns(UserWarning, match='of which images and of which weights'): c = cache_latents(tok, data, tmp_path/'c')
    with pytest.warns(UserWarning, match='of which weights'): c.bind(tok)
    with pytest.warns(UserWarning, match='of which images'): c.with_images(data)
    file.write_text(json.dumps(m | dict(n=6, shards=[['shard-00000.safetensors', 6]])))       # it took the first 6, we would take 6 of all
    with pytest.raises(UserError, match='the first 6 there'): cache_latents(tok, data, tmp_path/'c', 6)


def test_n_images_are_spread_over_a_sorted_set(tmp_path):
    tok, data = Toy(), folder_of(tmp_path/'train', 20, 10, 'abc')
    c = cache_latents(tok, data, tmp_path/'c', n=9)
    assert min(c.batch(range(9))['label'].bincount(minlength=3)) >= 2 and c.manifest['taken'] == '9 of 30, spread'
    b = c.with_images(data).batch(range(9))
    torch.testing.assert_close(tok.encode(b['image']).mean, b['mean'], atol=1e-5, rtol=1e-5)
    world = World(30, seed=2)
    w = cache_latents(tok, world, tmp_path/'w', n=9)
    assert w.manifest['taken'] == 'the first 9 of 30'
    torch.testing.assert_close(w.batch(range(9))['mean'], tok.encode(world.batch(range(9))['image']).mean, atol=1e-5, rtol=1e-5)
    assert cache_latents(tok, world, tmp_path/'all').manifest['taken'] == 'all 30'


# what a shard holds ------------------------------------------------------------------------------------------------------------------------------

def _nan(t): t['mean'][0, 0, 0, 0] = float('nan')
def _infinite(t): t['logvar_flip'][3, 1, 2, 0] = float('inf')
HARMS = {'no logvar': lambda t: t.pop('logvar'), 'no flips': lambda t: [t.pop(k) for k in ('mean_flip', 'logvar_flip')],
         'one more': lambda t: t.update(x=torch.zeros(8)),
         'half': lambda t: t.update(mean=t['mean'].half()), 'labels as fractions': lambda t: t.update(label=t['label'].float()),
         'other shape': lambda t: t.update(mean=t['mean'][:, :, :4].contiguous()), 'label -99': lambda t: t['label'].fill_(-99),
         'label 10**6': lambda t: t['label'].fill_(10**6),
         'NaN': _nan, 'infinite': _infinite}


@pytest.mark.parametrize('harm', list(HARMS))
def test_a_shard_that_is_not_as_the_manifest_says_is_one_line(tmp_path, harm):
    from safetensors.torch import load_file, save_file
    tok, data = Toy(), World(16, seed=1)
    whole = cache_latents(tok, data, tmp_path/'c', flips=True, shard_size=8).batch(range(16))
    f = tmp_path/'c'/'shard-00001.safetensors'
    t = {k: v.clone() for k, v in load_file(f).items()}
    HARMS[harm](t)
    f.unlink()
    save_file(t, f)
    with pytest.raises(UserError, match='shard-00001.safetensors .*delete it and cache again') as e:
        for epoch in range(8): LatentCache(tmp_path/'c').batch(range(16), epoch=epoch)
    assert '\n' not in str(e.value)
    f.unlink()
    again = cache_latents(tok, data, tmp_path/'c', flips=True, shard_size=8).batch(range(16))
    assert all(torch.equal(whole[k], again[k]) for k in ('mean', 'logvar', 'label'))


def test_a_shard_of_another_cache_is_told_by_its_header(tmp_path):
    tok = Toy()
    a, b = (cache_latents(tok, World(16, seed=s), tmp_path/f'{s}', shard_size=8) for s in (1, 2))
    shutil.copy(b.dir/'shard-00001.safetensors', a.dir)
    with pytest.raises(UserError, match='shard-00001.* belongs to another cache'): LatentCache(a.dir).batch([9])
    again = cache_latents(tok, World(16, seed=1), a.dir, shard_size=8)                     # and it is made again
    torch.testing.assert_close(again.batch([9])['mean'], tok.encode(World(16, seed=1).batch([9])['image']).mean, atol=1e-5, rtol=1e-5)
    (b.dir/'manifest.json').write_text('{"torn": ')                                   # nobody knows whose shards these were, but they do
    c = cache_latents(tok, World(16, seed=3), b.dir, shard_size=8)
    torch.testing.assert_close(c.batch([9])['mean'], tok.encode(World(16, seed=3).batch([9])['image']).mean, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize('about', ['[]', '7', 'null', 'a file of mine', '{"whose": "x"}', '{"names": "all"}', '{"names": [1, 2]}'])
def test_a_header_of_another_kind_is_one_line(tmp_path, about):
    # safetensors lets anybody write anything into a header
    from safetensors.torch import save_file
    c = cache_latents(Toy(), World(8, seed=1), tmp_path/'a', shard_size=8)
    save_file({k: v.clone() for k, v in c.shard(0).items()}, c.dir/'shard-00000.safetensors', dict(about=about))
    with pytest.raises(UserError, match='shard-00000.*delete it and cache again') as e: LatentCache(c.dir).names()
    assert '\n' not in str(e.value)


def test_a_cache_is_closed_in_one_reading(tmp_path, monkeypatch):
    read, plain = [], latents._read_shard
    monkeypatch.setattr(latents, '_read_shard', lambda folder, m, k, values=False: (read.append((k, values)), plain(folder, m, k, values))[1])
    c = cache_latents(Toy(), World(24, seed=1), tmp_path/'a', shard_size=8)
    assert sorted(k for k, values in read if values) == [0, 1, 2]
    z = torch.cat([c.shard(k)['mean'] for k in range(3)]).double()
    spread = z.var((0, 2, 3), correction=0) + torch.cat([c.shard(k)['logvar'] for k in range(3)]).double().exp().mean((0, 2, 3))
    n = z.numel()//z.shape[1]
    kept = c.manifest['stats']
    torch.testing.assert_close(torch.tensor(kept['mean'], dtype=torch.float64), z.mean((0, 2, 3)), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(torch.tensor(kept['std'], dtype=torch.float64), (spread*n/(n-1)).sqrt(), atol=1e-6, rtol=1e-6)


ZERO, ONE = [0.]*3, [1.]*3
TAMPERED = [*(dict(scale=v) for v in (dict(mean=ZERO, std=[1., 0., 1.]), dict(mean=ZERO, std=[1., -1., 1.]), dict(mean=['x']*3, std=ONE), dict(mean=ZERO),
                                      dict(mean=ZERO, std=[None]*3), dict(mean=[10**400]*3, std=ONE), 7)),
            dict(shape=[3, 8]), dict(shape='x'), dict(n=7), dict(shards=[['shard-00000.safetensors', -1]]), dict(shards=[['../../x', 16]]), dict(shards={}),
            dict(dtype='int64'), dict(dtype='load'), dict(classes=None), dict(classes=[]), dict(flips='no'), dict(tokenizer=3), dict(digest=5),
            dict(deterministic=None)]


@pytest.mark.parametrize('change', TAMPERED, ids=lambda c: ' '.join(c))
def test_a_manifest_that_was_tampered_with_is_one_line(tmp_path, change):
    c = cache_latents(Toy(), World(16, seed=1), tmp_path/'c')
    (c.dir/'manifest.json').write_text(json.dumps(c.manifest | change))
    with pytest.raises(UserError) as e: LatentCache(c.dir).batch([0])
    assert '\n' not in str(e.value)


@pytest.mark.parametrize('bad', [b'', b'[]', b'\xff\xfe', b'{"n": NaN}', b'['*100_000])
def test_a_manifest_that_cannot_be_read_is_one_line_and_written_anew(tmp_path, bad):
    tok, data = Toy(), World(16, seed=1)
    c = cache_latents(tok, data, tmp_path/'c')
    (c.dir/'manifest.json').write_bytes(bad)
    with pytest.raises(UserError, match='manifest.json'): LatentCache(c.dir)
    assert torch.equal(cache_latents(tok, data, c.dir).batch(range(16))['mean'], c.batch(range(16))['mean'])


@pytest.mark.parametrize('std', [0., -1., float('nan'), float('inf')])
def test_a_published_scale_that_cannot_be_is_refused(tmp_path, std):
    made = export_latents(cache_latents(Toy(), World(20, seed=1), tmp_path/'c', flips=True), tmp_path/'light', 'lightningdit')
    torch.save(dict(mean=torch.zeros(1, 3, 1, 1), std=torch.tensor([1., std, 1.]).view(1, 3, 1, 1)), made/'latents_stats.pt')
    with pytest.raises(UserError, match='latents_stats.pt'): import_latents(made, tmp_path/'x', 'lightningdit', 'toy')
    assert not list((tmp_path/'x').glob('*'))


def test_published_latents_are_checked_before_they_are_believed(tmp_path):
    from safetensors.torch import load_file, save_file
    c = cache_latents(Toy(), World(20, seed=1), tmp_path/'c', flips=True)
    made = export_latents(c, tmp_path/'light', 'lightningdit')
    f = made/'latents_rank00_shard000.safetensors'
    good = {k: v.clone() for k, v in load_file(f).items()}
    z, y = good['latents'], good['labels']
    for k, change in enumerate((dict(labels=y-1), dict(labels=y+10**6), dict(latents=z*float('nan')), dict(latents=z[0]),
                                dict(latents_flip=good['latents_flip'][:, :2]), dict(labels=y[:3]))):
        save_file({n: t.contiguous() for n, t in (good | change).items()}, f)
        with pytest.raises(UserError, match='shard000.safetensors'): import_latents(made, tmp_path/f'x{k}', 'lightningdit', 'toy')
    reg = export_latents(c, tmp_path/'reg', 'reg')
    rows = json.loads((reg/'dataset.json').read_text())['labels']
    for k, bad in enumerate(([], [['../../../etc/passwd', 0]], [[rows[0][0], 'one']], [[rows[0][0], -1]], [rows[0][0]], 7)):
        (reg/'dataset.json').write_text(json.dumps(dict(labels=bad)))
        with pytest.raises(UserError): import_latents(reg, tmp_path/f'y{k}', 'reg', 'toy')
    (reg/'dataset.json').write_text(json.dumps(dict(labels=rows)))
    np.save(reg/rows[3][0], -np.ones((6, 8, 8), np.float32))
    with pytest.raises(UserError, match='standard deviation below 0'): import_latents(reg, tmp_path/'z', 'reg', 'toy')


# where it lies, and how it is asked for ------------------------------------------------------------------------------------------------------------

def test_a_path_is_a_path_however_it_is_written(tmp_path, monkeypatch):
    from pathlib import Path
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('VFMVAE_HOME', str(tmp_path/'home'))
    tok, data = Toy(), World(4, seed=1)
    (tmp_path/'there').mkdir()
    for given, lies in (('./c', 'c'), (Path('d'), 'd'), (f'{tmp_path}/e', 'e'), ('there', 'there'), ('name', 'home/latents/name')):
        assert cache_latents(tok, data, given).dir.resolve() == tmp_path/lies and len(LatentCache(given)) == 4
    for bad in ('', 'a\0b', 'x'*300):
        with pytest.raises(UserError): cache_latents(tok, data, bad)
    (tmp_path/'file').touch()
    with pytest.raises(UserError, match='file'): cache_latents(tok, data, './file/c')


@pytest.mark.parametrize('bad', [dict(n=0), dict(n=-1), dict(n=2.5), dict(batch_size=0), dict(shard_size=0), dict(rank=-1, num_processes=2),
                                 dict(rank=0, num_processes=0), dict(rank=True, num_processes=2), dict(dtype=torch.int64)], ids=str)
def test_numbers_that_cannot_be_are_one_line(tmp_path, bad):
    with pytest.raises(UserError) as e: cache_latents(Toy(), World(4, seed=1), tmp_path/'c', **bad)
    assert '\n' not in str(e.value) and not (tmp_path/'c').exists()
    assert len(cache_latents(Toy(), World(4, seed=1), tmp_path/'d', n=np.int64(3))) == 3


def test_the_type_of_the_file_is_that_of_the_cache_unless_it_is_asked_for(tmp_path):
    tok, data = Toy(), World(6, seed=1)
    half = cache_latents(tok, data, tmp_path/'c', dtype=torch.float16)
    assert cache_latents(tok, data, tmp_path/'c').manifest == half.manifest and half.shard(0)['mean'].dtype == torch.float16
    with pytest.raises(UserError, match='dtype: float16 there, float32 here'): cache_latents(tok, data, tmp_path/'c', dtype=torch.float32)


def test_latents_that_are_not_finite_are_not_written(tmp_path):
    for scale, dtype in ((float('nan'), None), (1e6, torch.float16)):              # the second overflows in half precision only
        tok = Toy()
        tok.encode = lambda x, s=scale, tok=tok: tok.stats.scale(Gaussian(torch.nn.functional.avg_pool2d(x, 8)*s))
        with pytest.raises(UserError, match='NaN or infinite'): cache_latents(tok, World(8, seed=1), tmp_path/'c', dtype=dtype)
        assert not list((tmp_path/'c').glob('*.safetensors'))
        shutil.rmtree(tmp_path/'c', ignore_errors=True)


def test_files_of_a_dead_writer_are_swept(tmp_path):
    from vfmvae import files
    dead = subprocess.Popen(['true'])
    dead.wait()
    (tmp_path/'c').mkdir()
    for pid in (dead.pid, os.getpid()): (tmp_path/'c'/f'.shard-00000.safetensors.{files._HOST}-{pid}-abcdef12.tmp').write_bytes(b'half')
    cache_latents(Toy(), World(4, seed=1), tmp_path/'c')
    assert [p.name.split('-')[-2] for p in (tmp_path/'c').glob('.*.tmp')] == [str(os.getpid())]     # one that lives may still write
