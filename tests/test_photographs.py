"""Photographs: the bundled ones, chosen classes, unknown names, and files as cameras and telephones write them."""
import hashlib, subprocess, sys, tarfile, warnings
from pathlib import Path
import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from vfmvae.core import Notice, UserError
from vfmvae.files import data_dir, load_weights
from vfmvae.images import from_uint8, to_uint8
from vfmvae.world import World
from vfmvae.folders import folder, photographs, PHOTOGRAPHS, shards
from vfmvae.data import as_dataset, fingerprint, gives_bytes, loader, select_classes, stamps, Subset, take, taken
from vfmvae.recipes import open_data, training_data

ROOT = Path(__file__).resolve().parent.parent
BUNDLED = data_dir()/'photographs'
COUNT = {'clothes': (3068, 10, 64), 'clothes-val': (713, 10, 64), 'examples': (8, 8, 256)}     # images, classes, pixels


# what is bundled ------------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('name', COUNT)
def test_a_bundled_set_is_whole(name):
    n, classes, size = COUNT[name]
    ds = open_data(name, size=None)
    x = ds.batch(range(n), as_bytes=True)
    assert (len(ds), len(ds.classes), ds.size) == (n, classes, size) and x['image'].shape == (n, 3, size, size) and x['image'].dtype == torch.uint8
    assert {*x['label'].tolist()} == {*range(classes)} and x['label'].tolist() == ds.labels and x['key'] == ds.keys and len({*ds.keys}) == n
    assert len({*stamps(ds)}) == n and x['image'].float().std((1, 2, 3)).min() > 5        # pictures, each one of its own
    assert torch.equal(open_data(name, size=size).batch([n-1, 0])['image'], from_uint8(x['image'][[n-1, 0]]))


def test_no_photograph_is_in_both_parts():
    train, val = photographs('clothes'), photographs('clothes-val')
    assert train.classes == val.classes and not {*stamps(train)} & {*stamps(val)} and not {*train.keys} & {*val.keys}
    def pixels(ds): return {hashlib.blake2b(x.numpy().tobytes()).digest() for x in ds.batch(range(len(ds)), as_bytes=True)['image']}
    assert not pixels(train) & pixels(val)


def test_the_files_are_small_and_say_where_they_come_from():
    sizes = {f.name: f.stat().st_size for f in BUNDLED.iterdir()}
    assert {*sizes} == {f'{stem}.{end}' for stem in ('clothes', 'examples') for end in ('json', 'safetensors')}
    assert sizes['clothes.safetensors'] < 10e6 and sizes['examples.safetensors'] < 400e3
    page = (data_dir()/'README.md').read_text(encoding='utf-8')
    for stem in ('clothes', 'examples'):
        held, meta = load_weights(BUNDLED/f'{stem}.safetensors')
        assert f'photographs/{stem}.safetensors' in page and {'origin', 'licence', 'jpeg'} <= {*meta}
        assert 'CC0' in meta['licence'] and 'nbs/train/photographs_bundled.ipynb' in meta['made']
        assert sum(meta['parts'].values()) == meta['images'] == len(held['labels']) == len(held['ends'])-1
        assert {k: len(photographs(k)) for k, (file, _) in PHOTOGRAPHS.items() if file == stem} == meta['parts']
    said = meta['pictures']
    assert [*said] == meta['classes'] and all({'origin', 'licence', 'sha256', 'file'} <= {*p} for p in said.values())
    assert all('CC0' in p['licence'] or 'public domain' in p['licence'] for p in said.values())


def test_a_bundled_set_is_like_any_other(tmp_path):
    # the same JPEGs in class folders are the same set: labels, pixels, crops, stamps
    ds, (held, _) = photographs('clothes-val', 48), load_weights(BUNDLED/'clothes.safetensors')
    at = np.flatnonzero(held['split'].numpy() == 1)[:40]
    for i, k in zip(at, ds.keys, strict=False):
        (to := tmp_path/'d'/ds.classes[held['labels'][i]]).mkdir(parents=True, exist_ok=True)
        (to/f'{k}.jpg').write_bytes(held['jpeg'].numpy()[held['ends'][i]:held['ends'][i+1]].tobytes())
    files = folder(tmp_path/'d', 48)
    place = [ds.keys.tolist().index(Path(k).stem) for k in files.keys]
    x, y = ds.batch(place), files.batch(range(40))
    assert torch.equal(x['image'], y['image']) and [ds.classes[k] for k in x['label']] == [files.classes[k] for k in y['label']]
    assert [stamps(ds)[i] for i in place] == stamps(files)
    drawn = photographs('clothes-val', 48, augment=True)
    assert not torch.equal(drawn.batch([3])['image'], ds.batch([3])['image']) and torch.equal(drawn.image(3, 1, 5), drawn.image(3, 1, 5))
    others = (photographs('clothes-val', 32), photographs('clothes-val', 48, crop='adm'), photographs('clothes', 48))
    prints = [fingerprint(d) for d in (ds, drawn, *others)]
    assert len({*prints}) == 5 and fingerprint(photographs('clothes-val', 48)) == prints[0]
    assert taken(take(ds, 50)) == '50 of 713, spread' and len({*take(ds, 50).labels}) >= 9


def test_other_sizes_are_made_and_enlarging_is_said():
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert open_data('clothes', size=32).batch([0, 9])['image'].shape[-1] == 32 and open_data('examples', size=128)[0]['image'].shape[-1] == 128
    big = open_data('clothes-val', size=96)
    with pytest.warns(Notice, match='enlarged to 96 px .*64 x 64.*size=64'): big.batch(range(4))
    assert big.enlarged == 4 and training_data('clothes', 64, crop='square').crop == 'square'


def test_a_folder_of_a_bundled_name_is_said(tmp_path, monkeypatch):
    (tmp_path/'examples').mkdir()
    Image.new('RGB', (20, 20)).save(tmp_path/'examples'/'a.png')
    monkeypatch.chdir(tmp_path)
    with pytest.warns(Notice, match=f'{tmp_path.name}/examples'): assert len(open_data('examples')) == 8
    assert len(open_data('./examples', size=20)) == 1


# names ----------------------------------------------------------------------------------------------------------------------------------------

NEEDED = ('known: world, clothes, clothes-val, examples', 'a folder of pictures for each class', '*.tar', 'key.jpg + key.cls', 'classes.json')


@pytest.mark.parametrize('name, near', [('cifar10', ''), ('imagenet', ''), ('imagenet-1k', ''), ('cloths', 'nearest: clothes'),
                                        ('exampels', 'nearest: examples'), ('wrold', 'nearest: world')])
def test_an_unknown_name_says_which_files_are_needed(name, near, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as said: open_data(name)
    line = str(said.value)
    assert '\n' not in line and all(w in line for w in (name, near, *NEEDED))
    (tmp_path/name/'ant').mkdir(parents=True)
    Image.new('RGB', (16, 16)).save(tmp_path/name/'ant'/'a.png')
    assert open_data(name, size=16).classes == ('ant',) == open_data(Path(name), size=16).classes


def command(*words):
    done = subprocess.run([sys.executable, '-m', 'vfmvae.cli', *words], capture_output=True, text=True, cwd=ROOT)
    return done.returncode, done.stdout + done.stderr


def test_the_command_line_knows_the_names(tmp_path):
    from vfmvae.cli import bundled, parser
    assert bundled('data') == ('world', *PHOTOGRAPHS)
    given = parser().parse_args(['train-tokenizer', '--data', 'clothes', '--held-out', 'clothes-val'])
    assert (given.data, given.held_out) == ('clothes', 'clothes-val')
    for bad in ('cifar10', 'cloths'):
        code, said = command('encode', '--data', bad)
        assert code == 2 and f"no data named '{bad}'" in said and all(w in said for w in NEEDED)
    assert 'nearest: clothes' in said and ', clothes, clothes-val, examples)' in ' '.join(command('encode', '--help')[1].split())
    code, said = command('evaluate', '--data', 'clothes-val', '--n', '4')
    assert code == 0 and 'PSNR' in said.upper(), said


# some classes ---------------------------------------------------------------------------------------------------------------------------------

def letters(n=12): return as_dataset([(Image.fromarray(np.full((16, 16, 3), 20*i, np.uint8)), 'abc'[i % 3]) for i in range(n)], size=16)


SETS = {'world': lambda: World(90), 'part of the world': lambda: Subset(World(90), range(5, 90)), 'clothes': lambda: take(photographs('clothes'), 90),
        'list': letters}


@pytest.mark.parametrize('name', SETS)
def test_chosen_classes_are_those_images_numbered_anew(name):
    ds = SETS[name]()
    whole, order = ds.batch(range(len(ds))), [2, 0]
    some = select_classes(ds, order)
    at = [i for i, k in enumerate(whole['label'].tolist()) if k in order]
    x = some.batch(range(len(some)))
    assert some.classes == tuple(ds.classes[k] for k in order) and len(some) == len(at) > 0
    assert x['label'].tolist() == [order.index(whole['label'][i]) for i in at] == some.labels and x['key'] == [whole['key'][i] for i in at]
    assert torch.equal(x['image'], whole['image'][at]) and stamps(some) == [stamps(ds)[i] for i in at]
    assert gives_bytes(some) and torch.equal(some.batch([1], as_bytes=True)['image'], to_uint8(whole['image'][at[1:2]]))
    by_name = select_classes(ds, [ds.classes[k] for k in order])
    assert fingerprint(by_name) == fingerprint(some) != fingerprint(select_classes(ds, order[::-1]))
    part, batch = take(some, 3), loader(some, 2, seed=1).batch_at(0)
    assert part.classes == some.classes and part.labels == part.batch(range(3))['label'].tolist()
    assert batch['label'].tolist() == [some.labels[x['key'].index(k)] for k in batch['key']]
    again = select_classes(some, [ds.classes[0]])
    assert again.classes == (ds.classes[0],) and {*again.labels} == {0} and len(again) == whole['label'].tolist().count(0)


def test_classes_held_out_of_training_are_not_in_it():
    ds = World(300)
    kept = [k for k in range(16) if k % 5 != 2]
    seen, unseen = select_classes(ds, kept), select_classes(ds, [k for k in range(16) if k % 5 == 2])
    def keys(d): return {*d.batch(range(len(d)))['key']}
    assert not keys(seen) & keys(unseen) and len(seen)+len(unseen) == 300 and len(seen.classes) == 13


def test_chosen_classes_keep_the_augmentation():
    ds = photographs('clothes-val', 32, augment=True)
    some = select_classes(ds, ['hat', 'shoes'])
    places = [i for i, k in enumerate(ds.labels) if ds.classes[k] in ('hat', 'shoes')]
    assert some.augment and torch.equal(some.batch([0, 5], epoch=2, seed=3)['image'], ds.batch([places[0], places[5]], epoch=2, seed=3)['image'])
    steps = loader(some, 4, seed=3)
    assert not torch.equal(steps.batch_at(0)['image'], select_classes(photographs('clothes-val', 32), ['hat', 'shoes']).batch(steps.indices(0))['image'])


@pytest.mark.parametrize('classes, says', [(['d'], "no class named 'd'"), (['aa'], 'nearest: a'), (['a', 'a'], "'a' is given twice"), (['a', 0], 'twice'),
                                           ([], 'no classes'), ('a', 'no classes'), (None, 'no classes'), ([3], 'at most 2'),
                                           ([-1], 'at least 0'), ([.5], 'whole'), ([True], 'whole')])
def test_classes_that_cannot_be_chosen(classes, says):
    with pytest.raises(UserError, match=says) as said: select_classes(letters(), classes)
    assert '\n' not in str(said.value)


def test_classes_without_images_or_names_cannot_be_chosen():
    with pytest.raises(UserError, match="no image of the class 'b'"): select_classes(Subset(letters(), [0, 3]), ['a', 'b'])
    bare = type('Bare', (), dict(__len__=lambda s: 1, batch=lambda s, i: {}))()
    with pytest.raises(UserError, match='no classes to choose from'): select_classes(bare, [0])


# files as they come ---------------------------------------------------------------------------------------------------------------------------

Y, X = np.mgrid[0:90, 0:60]
SMOOTH = np.stack([X*4, Y*2, X+Y], -1).astype(np.uint8)          # a portrait that a JPEG hardly changes


def kinds():
    "Name of a file -> (what is saved, how, the picture it shows, grey levels that may differ)."
    im, alpha, wide = Image.fromarray(SMOOTH), (X*4).astype(np.uint8), (X*1000).astype(np.uint16)
    (clear := im.copy()).putalpha(Image.fromarray(alpha))
    def three(a): return np.repeat(np.asarray(a)[..., None], 3, -1)
    def over(a): return a*(alpha/255)[..., None] + 255*(1-(alpha/255)[..., None])                # on white
    grey, deep = three(im.convert('L')), three(np.round(wide/257))
    return {'cmyk.jpg': (im.convert('CMYK'), dict(quality=95), SMOOTH, 6), 'cmyk.tif': (im.convert('CMYK'), {}, SMOOTH, 1),
            'grey.jpg': (im.convert('L'), dict(quality=95), grey, 2), 'grey alpha.png': (clear.convert('LA'), {}, over(grey), 1),
            'alpha.png': (clear, {}, over(SMOOTH), 1), 'alpha.webp': (clear, dict(lossless=True, exact=True), over(SMOOTH), 1),
            'deep.png': (Image.fromarray(wide), {}, deep, 0), 'deep.tif': (Image.fromarray(wide), {}, deep, 0),
            'UPPER.JPG': (im, dict(format='JPEG', quality=95), SMOOTH, 6)}


def doors(path):
    "The same file as a class folder, a shard, a list of paths, of bytes and of PIL images."
    root = path.parent.parent
    with tarfile.open(root.parent/'a.tar', 'w') as t: t.add(path, f'0{path.suffix}')
    return [folder(root, 60), shards(root.parent/'a.tar', 60), *(as_dataset([x], 60) for x in (path, path.read_bytes(), Image.open(path)))]


@pytest.mark.parametrize('name', kinds())
def test_every_kind_of_file_gives_its_picture_through_every_door(name, tmp_path):
    im, how, want, most = kinds()[name]
    (tmp_path/'d'/'one').mkdir(parents=True)
    im.save(path := tmp_path/'d'/'one'/name, **how)
    for ds in doors(path):
        got = to_uint8(ds.batch([0])['image'])[0].permute(1, 2, 0).numpy().astype(float)
        assert got.shape == (60, 60, 3) and np.abs(got-want[15:75]).max() <= most, type(ds)


@pytest.mark.parametrize('turn', range(1, 9))
def test_a_turned_photograph_stands_upright_through_every_door(turn, tmp_path):
    (tmp_path/'d'/'one').mkdir(parents=True)
    (exif := Image.Exif())[0x112] = turn
    Image.fromarray(SMOOTH).save(path := tmp_path/'d'/'one'/'a.jpg', quality=95, exif=exif)
    with Image.open(path) as im: upright = ImageOps.exif_transpose(im)
    assert upright.size == ((60, 90) if turn < 5 else (90, 60))
    left, top = (upright.width-60)//2, (upright.height-60)//2
    want = from_uint8(torch.from_numpy(np.array(upright.crop((left, top, left+60, top+60)))).permute(2, 0, 1))
    for ds in doors(path): assert torch.equal(ds.batch([0])['image'][0], want)


@pytest.mark.parametrize('shape', [(3000, 2000), (2000, 3000)], ids=['portrait', 'landscape'])
def test_a_large_photograph_is_shrunk_as_torchvision_does(shape, tmp_path):
    from torchvision.transforms import v2
    y, x = np.mgrid[0:shape[0], 0:shape[1]]
    Image.fromarray(np.stack([x//12 % 256, y//12 % 256, (x//40+y//40) % 2*255], -1).astype(np.uint8)).save(tmp_path/'a.jpg', quality=95)
    with Image.open(tmp_path/'a.jpg') as im: want = v2.Compose([v2.Resize(64, antialias=True), v2.CenterCrop(64), v2.PILToTensor()])(im)
    got = folder(tmp_path, 64)
    assert torch.equal(to_uint8(got.batch([0])['image'])[0], want) and got.enlarged == 0


def test_a_class_of_one_and_films_and_empty_classes(tmp_path):
    for c, n in (('ant', 1), ('bee', 3)):
        (tmp_path/'d'/c).mkdir(parents=True)
        for i in range(n): Image.fromarray(SMOOTH).save(tmp_path/'d'/c/f'{i}.png')
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        ds = folder(tmp_path/'d', 32)
    assert ds.labels == [0, 1, 1, 1] and len(select_classes(ds, ['ant'])) == 1 and loader(ds, 4).batch_at(0)['image'].shape == (4, 3, 32, 32)
    (tmp_path/'d'/'films').mkdir()
    (tmp_path/'d'/'empty').mkdir()
    for name in ('a.mp4', 'b.MOV'): (tmp_path/'d'/'films'/name).write_bytes(b'\0\0\0\x18ftypmp42')
    with pytest.warns(Notice, match='left out 1 .m.*, 2 folder without images'): ds = folder(tmp_path/'d', 32)
    assert ds.classes == ('ant', 'bee') and ds.skipped == {'.mp4': 1, '.mov': 1, 'folder without images': 2}
    for open_it in (folder, open_data):
        with pytest.raises(UserError, match='no images in .*films; looked for .*saw 1 .m.*, 1 .m'): open_it(tmp_path/'d'/'films')
    with tarfile.open(tmp_path/'a.tar', 'w') as t:
        t.add(tmp_path/'d'/'ant'/'0.png', '0.png')
        t.add(tmp_path/'d'/'films'/'a.mp4', '1.mp4')
    with pytest.warns(Notice, match='left out 1 .mp4'): assert len(shards(tmp_path/'a.tar', 32)) == 1
