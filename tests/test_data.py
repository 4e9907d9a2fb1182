"""Crops, published draws, sets and the loader: parity with golden numbers, laws, bad input."""
import json, random
import numpy as np
import pytest
import torch
from PIL import Image
from vfmvae.core import UserError
from fuzz import peak, reset_peak
from vfmvae.images import (adm_crop, CROPS, from_uint8, open_image, published_draw, published_noise, random_crop_flip, square_crop,
                           to_pil, to_tensor, to_uint8, transform, TRANSFORMS)
from vfmvae.folders import folder, shards
from vfmvae.data import loader


def chw(im): return np.asarray(im).transpose(2, 0, 1)


# parity -----------------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('case', 'abc')
def test_adm_crop_is_the_published_one(golden, case):
    g = golden('vfmvae/evaluation')
    out = adm_crop(Image.fromarray(g[f'adm_crop64.{case}.in'].numpy()), 64)
    assert np.array_equal(np.asarray(out), g[f'adm_crop64.{case}.out'].numpy())


@pytest.mark.parametrize('seed', range(3))
def test_augmentation_is_the_published_one(golden, seed):
    g = golden('vfmvae/evaluation')
    out = random_crop_flip(Image.fromarray(g['aug.in'].numpy()), 64, random.Random(seed))
    assert np.array_equal(chw(out), g[f'aug.res64.pyseed{seed}'].numpy())


def test_crop_without_augmentation_is_the_published_one(golden):
    g = golden('vfmvae/evaluation')
    assert np.array_equal(chw(square_crop(Image.fromarray(g['aug.in'].numpy()), 64)), g['aug.res64.off'].numpy())


@pytest.mark.parametrize('level', ['0.05', '0.2'])
def test_noise_sets_are_the_published_ones(golden, level):
    g = golden('vfmvae/evaluation')
    assert np.array_equal(published_noise(g['noise.in'].numpy(), float(level), 3), g[f'noise.l{level}.idx3.seed42'].numpy())


def test_equivariance_draws_are_the_published_ones(shared):
    want = json.loads((shared/'golden/vfmvae/equivariance_params.json').read_text())
    assert published_draw(50, want['seed']) == want['params_idx0_49']


# photographs and shards ---------------------------------------------------------------------------------------------------------------------

def test_photographs(photos):
    ds = folder(photos, size=256)
    assert len(ds) == 640 and ds.keys == sorted(ds.keys) and set(ds.labels) == {0}
    b = ds.batch([0, 639])
    raw = np.asarray(Image.open(photos/b['key'][1]).convert('RGB'))
    assert np.array_equal(to_uint8(b['image'][1]).permute(1, 2, 0).numpy(), raw)   # 256 px photographs pass the evaluation crop untouched


def test_cifar_shards(shared):
    ds = shards(str(shared/'data/cifar10/cifar10-train-{000000..000001}.tar'), size=32)
    names = json.loads((shared/'data/cifar10/classes.json').read_text())
    assert len(ds) == len(set(ds.keys)) == 10_000 and len(ds.classes) == len(names) == 10
    assert ds.batch([9_999, 0])['image'].shape == (2, 3, 32, 32)


def test_shards_written_by_webdataset(tmp_path):
    wds = pytest.importorskip('webdataset')
    rng = np.random.default_rng(0)
    pics = rng.integers(0, 256, (7, 20, 20, 3), dtype=np.uint8)
    with wds.TarWriter(str(tmp_path/'w-000.tar')) as sink:
        for i, p in enumerate(pics): sink.write({'__key__': f'set.a/n{i:03d}', 'png': p, 'cls': i % 3})
    ds = shards(tmp_path/'w-000.tar', size=20, crop='square')
    assert ds.labels == [i % 3 for i in range(7)]
    assert np.array_equal(to_uint8(ds.batch(range(7))['image']).permute(0, 2, 3, 1).numpy(), pics)


# laws ---------------------------------------------------------------------------------------------------------------------------------------

class Numbers:
    "A set whose images are their indices."
    def __init__(self, n): self.n = n
    def __len__(self): return self.n
    def batch(self, indices): return dict(image=torch.tensor(indices), label=torch.tensor(indices), key=list(map(str, indices)))


@pytest.mark.parametrize('n,batch,world', [(24, 8, 1), (25, 8, 2), (31, 12, 4), (8, 8, 8)])
def test_ranks_share_the_batch_of_one_process(n, batch, world):
    one, many = loader(Numbers(n), batch, seed=5), [loader(Numbers(n), batch, seed=5, rank=r, world_size=world) for r in range(world)]
    for step in range(3*len(one)):
        parts = [m.batch_at(step)['image'] for m in many]
        assert all(len(p) == batch//world for p in parts)
        assert torch.equal(torch.cat(parts), one.batch_at(step)['image'])


@pytest.mark.parametrize('n,batch', [(24, 8), (25, 8), (7, 3), (5, 5), (20, 8)])
def test_every_epoch_shows_every_image_once(n, batch):
    dl = loader(Numbers(n), batch, seed=1)
    stream = torch.cat([dl.batch_at(s)['image'] for s in range(4*n)]).tolist()
    epochs = [stream[i:i+n] for i in range(0, 4*n, n)]
    assert all(sorted(e) == list(range(n)) for e in epochs) and len({tuple(e) for e in epochs}) == 4       # another order in every epoch
    assert epochs[0] != torch.cat([loader(Numbers(n), batch, seed=2).batch_at(s)['image'] for s in range(n)])[:n].tolist()
    assert len(dl) == -(-n//batch)


@pytest.mark.parametrize('n,batch,parts', [(20, 8, 2), (20, 8, 4), (33, 12, 3), (64, 16, 2)])
@pytest.mark.parametrize('world', [1, 2])
def test_a_step_is_the_same_images_however_it_is_split(n, batch, parts, world):
    if batch//parts % world: pytest.skip('the ranks cannot share so small a part')
    def seen(b, step): return [i for r in range(world) for i in loader(Numbers(n), b, seed=3, rank=r, world_size=world).indices(step).tolist()]
    for s in range(3*n//batch): assert seen(batch, s) == [i for k in range(parts) for i in seen(batch//parts, parts*s+k)]


@pytest.mark.parametrize('workers', [0, 1, 3])
def test_resuming_is_calling_with_a_larger_step(workers):
    whole = [b['key'] for b in loader(Numbers(20), 6, seed=9).steps(0, 11)]
    assert [b['key'] for b in loader(Numbers(20), 6, seed=9, workers=workers).steps(7, 11)] == whole[7:]


def test_endless_steps_can_be_left(tmp_path):
    it = loader(Numbers(20), 6, workers=2).steps()
    assert [len(next(it)['key']) for _ in range(8)] == [6]*8
    it.close()


def test_reading_ahead_passes_errors_on(tmp_path):
    for i in range(4): Image.new('RGB', (20, 20)).save(tmp_path/f'{i}.png')
    (tmp_path/'2.png').write_bytes((tmp_path/'2.png').read_bytes()[:40])
    with pytest.raises(UserError, match='2.png'): list(loader(folder(tmp_path, size=16), 4, workers=2).steps(0, 1))


@pytest.mark.parametrize('name', list(TRANSFORMS))
def test_batch_size_does_not_change_a_transform(name):
    x = torch.rand(5, 3, 24, 24, generator=torch.Generator().manual_seed(0))*2-1
    for s in TRANSFORMS[name].grid[:2]:
        split = torch.cat([transform(x[:2], name, s, seed=10), transform(x[2:], name, s, seed=12)])
        assert torch.allclose(transform(x, name, s, seed=10), split, atol=1e-6)


@pytest.mark.parametrize('name', list(TRANSFORMS))
@pytest.mark.parametrize('kind', [torch.bfloat16, torch.float16, torch.float64])
def test_a_transform_takes_any_precision(name, kind):
    x = torch.rand(2, 3, 24, 24, generator=torch.Generator().manual_seed(0))*2-1
    y = transform(x.to(kind), name, TRANSFORMS[name].grid[0], seed=3)
    assert y.dtype == kind and (y.float()-transform(x.to(kind).float(), name, TRANSFORMS[name].grid[0], seed=3)).abs().max() < .01


@pytest.mark.parametrize('k', [1, 2, 3])
def test_quarter_turns_of_an_oblong_are_exact(k):
    x = torch.rand(1, 3, 10, 14)
    assert torch.equal(transform(transform(x, 'rotation', 90*k), 'rotation', 360-90*k), x)


def test_translation_moves_by_its_length():
    x = torch.zeros(64, 3, 40, 40)
    x[:, :, 20, 20] = 1
    at = torch.stack([i[0].nonzero()[0] for i in transform(x, 'translation', .2)]).float() - 20
    length = at.norm(dim=1)
    assert (length - 8).abs().max() <= 1 and len({tuple(a) for a in at.tolist()}) > 16   # whole pixels, in many directions


# bad input ----------------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('suffix', ['jpg', 'png', 'webp'])
@pytest.mark.parametrize('part', [0, .01, .3, .9])
def test_a_truncated_image_is_named(tmp_path, suffix, part):
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(tmp_path/f'a.{suffix}')
    data = (tmp_path/f'a.{suffix}').read_bytes()
    (tmp_path/f'a.{suffix}').write_bytes(data[:int(part*len(data))])
    with pytest.raises(UserError, match=f'a.{suffix}') as e: folder(tmp_path, size=16)[0]
    assert '\n' not in str(e.value)


@pytest.mark.parametrize('make', [lambda p: folder(p/'none'), lambda p: folder(p), lambda p: shards(p/'none.tar'), lambda p: open_image(p),
                                  lambda p: open_image(p/'none.png'), lambda p: folder(p, crop='middle')])
def test_one_line_errors(tmp_path, make):
    with pytest.raises(UserError) as e: make(tmp_path)
    assert '\n' not in str(e.value) and len(str(e.value)) > 20


def test_crops_are_square_for_odd_sizes():
    for w, h in ((9, 200), (200, 9), (33, 34), (127, 129), (64, 64)):
        for name, crop in CROPS.items(): assert crop(Image.new('RGB', (w, h)), 32).size == (32, 32), (name, w, h)
        assert random_crop_flip(Image.new('RGB', (w, h)), 32, random.Random(0)).size == (32, 32)


@pytest.mark.parametrize('upright', [False, True])
@pytest.mark.parametrize('name', CROPS)
def test_a_strip_is_not_made_wide_before_its_middle_is_taken(name, upright):
    "1.5 kB of 8 x 60,000 pixels took 2 GB at 256 px. The middle is that of the whole strip, drawn large."
    wave = (127+100*np.sin(np.arange(4001)/9)).astype(np.uint8)
    strip = Image.fromarray(np.broadcast_to(wave[None, :, None], (8, 4001, 3)).copy())
    strip = strip.transpose(Image.Transpose.TRANSPOSE) if upright else strip
    reset_peak()
    before = peak()
    got = np.asarray(CROPS[name](strip, 256)).astype(int)
    after = peak()
    wide = strip.resize((256, 4001*32) if upright else (4001*32, 256), Image.Resampling.BICUBIC)
    left, top = ((v-256)//2 for v in wide.size)
    want = np.asarray(wide.crop((left, top, left+256, top+256))).astype(int)
    assert got.shape == (256, 256, 3) and np.abs(got-want).mean() < 4
    assert after-before < 60e6


def test_round_trip_of_pixels():
    x = torch.arange(256).view(1, 16, 16).expand(3, -1, -1)/127.5-1
    assert torch.equal(to_tensor(to_pil(x)), x.float())
    for picture in (np.random.rand(9, 8, 3), np.zeros((9, 8, 3), np.uint16), Image.new('L', (8, 9)), Image.new('RGBA', (8, 9))):
        with pytest.raises(UserError, match='give an RGB image'): to_tensor(picture)
    with pytest.raises(UserError, match='no conversion'): from_uint8(x)
