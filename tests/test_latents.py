"""Latents on disk: what is read is what was encoded, whoever wrote it and however often it was interrupted."""
import json, shutil
import numpy as np
import pytest
import torch
from vfmvae import latents
from vfmvae.core import Gaussian, UserError
from vfmvae.data import World, folder, loader
from vfmvae.latents import LatentCache, cache_latents, export_latents, import_latents, latent_stats
from vfmvae.tokenizer import LatentStats, tokenizers

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
    c = cache_latents(tok, data, tmp_path/'c', batch_size=13, shard=32)
    assert len(c) == 70 and [n for _, n in c.manifest['shards']] == [32, 32, 6]
    c.check(tok)                                   # one without a scale gets it here
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
    mean, std = latent_stats(lambda: iter(parts))
    rows = z.transpose(0, 1).flatten(1)
    torch.testing.assert_close(mean, rows.mean(1), rtol=1e-12, atol=0)
    torch.testing.assert_close(std**2, rows.var(1)+torch.exp(torch.tensor(-9.).double())*rows.shape[1]/(rows.shape[1]-1), rtol=1e-9, atol=0)


def test_flips_are_the_mirrored_images_and_half_of_what_is_read(tmp_path):
    tok, data = Toy(), World(64, seed=2)
    c = cache_latents(tok, data, tmp_path/'c', flips=True, shard=40)
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
    one = cache_latents(tok, data, tmp_path/'one', shard=16)
    many = [cache_latents(tok, data, tmp_path/'many', shard=16, rank=r, processes=processes) for r in range(processes)]
    assert many[:-1] == [None]*(processes-1)
    for k in ('stats', 'scale', 'shards', 'n', 'shape'): assert one.manifest[k] == many[-1].manifest[k]
    assert torch.equal(one.batch(range(90))['mean'], many[-1].batch(range(90))['mean'])


def test_an_interrupted_cache_goes_on(tmp_path, monkeypatch):
    tok, data, seen = Toy(), World(60, seed=1), []
    whole = cache_latents(tok, data, tmp_path/'whole', shard=20)
    class Stops:
        seed, classes = data.seed, data.classes
        def __len__(self): return 60
        def batch(self, at):
            seen.extend(at)
            if max(at) >= 40 and stop: raise KeyboardInterrupt
            return data.batch(at)
    Stops.__name__ = 'World'
    stop = True
    with pytest.raises(KeyboardInterrupt): cache_latents(tok, Stops(), tmp_path/'c', shard=20)
    assert sorted(p.name for p in (tmp_path/'c').iterdir()) == ['manifest.json', 'shard-00000.safetensors', 'shard-00001.safetensors']
    with pytest.raises(UserError, match='2 of 3 shards'): LatentCache(tmp_path/'c')
    stop, seen[:] = False, []
    c = cache_latents(tok, Stops(), tmp_path/'c', shard=20)
    assert set(seen) == {0, *range(40, 60)} and torch.equal(c.batch(range(60))['mean'], whole.batch(range(60))['mean'])


@pytest.mark.parametrize('harm', ['cut', 'empty', 'gone', 'noise', 'short'])
def test_a_damaged_shard_is_named_and_made_again(tmp_path, harm):
    tok, data = Toy(), World(40, seed=1)
    c = cache_latents(tok, data, tmp_path/'c', shard=20)
    want, f = c.batch(range(40))['mean'], tmp_path/'c'/'shard-00001.safetensors'
    if harm == 'cut': f.write_bytes(f.read_bytes()[:-7])
    if harm == 'empty': f.write_bytes(b'')
    if harm == 'gone': f.unlink()
    if harm == 'noise': f.write_bytes(np.random.default_rng(0).bytes(4000))
    if harm == 'short': shutil.copy(cache_latents(tok, data, tmp_path/'d', shard=7).dir/'shard-00000.safetensors', f)
    with pytest.raises(UserError, match='shard-00001.safetensors.*cache again: only what is missing is made') as e: LatentCache(tmp_path/'c').batch([25])
    assert '\n' not in str(e.value)
    LatentCache(tmp_path/'c').batch([5])            # the others still read
    if harm in ('cut', 'empty', 'noise', 'short'): f.unlink()      # as the message says
    torch.testing.assert_close(cache_latents(tok, data, tmp_path/'c', shard=20).batch(range(40))['mean'], want)


def test_a_full_disk_is_said_and_what_is_there_is_kept(tmp_path, monkeypatch):
    tok, data = Toy(), World(40, seed=1)
    import safetensors.torch
    plain, count = safetensors.torch.save_file, [0]
    def full(tensors, path, metadata=None):
        count[0] += 1
        if count[0] == 2: raise OSError(28, 'No space left on device')
        return plain(tensors, path, metadata)
    monkeypatch.setattr(safetensors.torch, 'save_file', full)
    with pytest.raises(UserError, match='no space left for .*shard-00001.*free some and call again') as e: cache_latents(tok, data, tmp_path/'c', shard=20)
    assert '\n' not in str(e.value) and sorted(p.name for p in (tmp_path/'c').iterdir()) == ['manifest.json', 'shard-00000.safetensors']
    assert len(cache_latents(tok, data, tmp_path/'c', shard=20)) == 40
    monkeypatch.setattr(latents.shutil, 'disk_usage', lambda p: type('Usage', (), dict(free=0)))
    with pytest.raises(UserError, match='no space left'): cache_latents(tok, data, tmp_path/'d', shard=20)


def test_a_cache_of_something_else_is_refused(tmp_path):
    tok, data = Toy(), World(40, seed=1)
    c = cache_latents(tok, data, tmp_path/'c', shard=20)
    with pytest.raises(UserError, match='n: 40 there, 30 here'): cache_latents(tok, data, tmp_path/'c', 30, shard=20)
    with pytest.raises(UserError, match='data: .*seed 1 there, .*seed 2 here'): cache_latents(tok, World(40, seed=2), tmp_path/'c', shard=20)
    with pytest.raises(UserError, match=f'of toy-f8d3, not of {VFM}'): c.check(tokenizers[VFM])
    other = Toy()
    other.stats.set(other.stats.mean, other.stats.std*1.1)
    with pytest.raises(UserError, match='trained anew'): c.check(other)
    with pytest.raises(UserError, match='the scale'): cache_latents(other, data, tmp_path/'c', shard=20)
    with pytest.raises(UserError, match='no latent cache'): LatentCache(tmp_path)
    with pytest.raises(UserError, match='does not say which way'): cache_latents(tok, data, tmp_path/'f', flips=True).with_images(data)
    with pytest.raises(UserError, match='39 images for 40'): c.with_images(World(39, seed=1))
    for bad in (dict(rank=2, processes=2), dict(n=0, shard=0)):
        with pytest.raises(UserError): cache_latents(tok, data, tmp_path/'e', **bad)


def test_the_published_layouts_come_back(tmp_path):
    tok, data = Toy(), World(50, seed=1)
    c = cache_latents(tok, data, tmp_path/'c', flips=True, shard=20)
    reg = import_latents(export_latents(c, tmp_path/'reg', 'reg'), tmp_path/'r', 'reg', tok.name, data.classes)
    a, b = c.batch(range(50), epoch=0), reg.batch(range(50))
    assert b['label'].tolist() == a['label'].tolist() and not reg.augment
    want = tok.encode(data.batch(range(50))['image'])
    torch.testing.assert_close(b['mean'], want.mean, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(b['logvar'], want.logvar, atol=1e-4, rtol=1e-4)
    first = np.load(tmp_path/'reg'/json.loads((tmp_path/'reg'/'dataset.json').read_text())['labels'][0][0])
    assert first.shape == (6, 8, 8) and first.dtype == np.float32 and (first[3:] > 0).all()
    light = import_latents(export_latents(c, tmp_path/'light', 'lightningdit', seed=3), tmp_path/'l', 'lightningdit', tok.name, data.classes)
    assert light.augment and [n for _, n in light.manifest['shards']] == [20, 20, 10]
    from safetensors.torch import load_file
    t = load_file(tmp_path/'light'/'latents_rank00_shard000.safetensors')
    assert t['latents'].shape == t['latents_flip'].shape == (20, 3, 8, 8) and t['labels'].dtype == torch.int64
    stats = torch.load(tmp_path/'light'/'latents_stats.pt', weights_only=True)
    assert stats['mean'].shape == stats['std'].shape == (1, 3, 1, 1)
    raw = tok.stats.unscale(want.mean)
    width = (want.logvar/2).exp()*tok.stats.std[:, None, None]
    assert abs(((t['latents']-raw[:20])/width[:20]).std()-1) < .03                   # samples of the posterior, on the raw scale
    torch.testing.assert_close(light.check(tok).scale().std, tok.stats.std)


def test_damaged_published_files_are_named(tmp_path):
    c = cache_latents(Toy(), World(20, seed=1), tmp_path/'c', flips=True)
    made = export_latents(c, tmp_path/'light', 'lightningdit')
    f = made/'latents_rank00_shard000.safetensors'
    keep = f.read_bytes()
    f.write_bytes(keep[:100])
    with pytest.raises(UserError, match='shard000.safetensors is cut off'): import_latents(made, tmp_path/'x', 'lightningdit', 'toy')
    f.write_bytes(keep)
    (made/'latents_stats.pt').write_bytes(b'not a file')
    with pytest.raises(UserError, match='latents_stats.pt cannot be read'): import_latents(made, tmp_path/'y', 'lightningdit', 'toy')
    (made/'latents_stats.pt').unlink()
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
