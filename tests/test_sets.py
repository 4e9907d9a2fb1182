"Sets of images: whose classes, which of them, still the same ones, nothing left out in silence, nobody else's set refused."
import io, json, os, shutil, tarfile, warnings
from collections.abc import Sequence
import numpy as np
import pytest
import torch
from PIL import Image
from vfmvae.core import Notice, UserError
from vfmvae.images import to_pil, to_uint8
from vfmvae.world import World
from vfmvae.folders import folder, number_classes, shards
from vfmvae.data import as_dataset, fingerprint, spread, stamps, Subset, take, taken
from vfmvae.checkpoints import read_checkpoint
from vfmvae.features import Bank, banks, batches
from vfmvae.files import check_out, data_dir
from vfmvae.generation import open_net
from vfmvae.recipes import open_data, start_size
from vfmvae.run import read_nets
from vfmvae.session import is_tokenizer
from vfmvae.tokenizer import open_tokenizer, save_tokenizer
from vfmvae.vfm import VFM
from vfmvae.views import as_source, image_set

CLASSES = ('ant', 'bee', 'cat')


def picture(c, i, side=24):
    "A picture that no other (class, number) has."
    return Image.fromarray(np.random.default_rng([c, i]).integers(0, 256, (side, side, 3), dtype=np.uint8))


def png(im, form='PNG', **how):
    im.save(b := io.BytesIO(), form, **how)
    return b.getvalue()


def write_tar(path, members):
    with tarfile.open(path, 'w') as t:
        for name, data in members:
            (info := tarfile.TarInfo(name)).size = len(data)
            t.addfile(info, io.BytesIO(data))
    return path


def with_a_link(tar):
    "The same archive behind a member that only `tarfile` can read."
    (link := tarfile.TarInfo('link')).type, link.linkname = tarfile.SYMTYPE, 'x'
    return link.tobuf() + tar


@pytest.fixture
def root(tmp_path):
    for k, c in enumerate(CLASSES):
        (tmp_path/'animals'/c).mkdir(parents=True)
        for i in range(4): picture(k, i).save(tmp_path/'animals'/c/f'{i}.png')
    return tmp_path/'animals'


# other people's sets --------------------------------------------------------------------------------------------------------------------------

def same(a, b):
    x, y = a.batch(range(len(a))), b.batch(range(len(b)))
    return torch.equal(x['image'], y['image']) and [a.classes[k] for k in x['label']] == [b.classes[k] for k in y['label']]


def test_a_folder_through_torchvision_is_the_same_set(root):
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import ToTensor
    ours = folder(root, size=24)
    assert same(as_dataset(ImageFolder(str(root))), ours)
    with pytest.warns(Notice, match='from 0 to 1'): tensors = as_dataset(ImageFolder(str(root), transform=ToTensor()))
    assert same(tensors, ours)
    part = as_dataset(torch.utils.data.Subset(ImageFolder(str(root)), [5, 1]))
    assert part.classes == CLASSES and part.labels == [1, 0] and torch.equal(part.batch([0])['image'], ours.batch([5])['image'])


def test_normalised_pictures_are_refused_not_guessed(root):
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import Compose, Normalize, ToTensor
    ds = as_dataset(ImageFolder(str(root), transform=Compose([ToTensor(), Normalize((.485, .456, .406), (.229, .224, .225))])), size=24)
    with pytest.raises(UserError, match='leave the normalisation out'): ds.batch(range(12))


def test_a_set_of_torchvision_without_files():
    from torchvision.datasets import FakeData
    ds = as_dataset(FakeData(6, (3, 20, 20), 3))
    assert len(ds) == 6 and ds.batch([0, 5])['image'].shape == (2, 3, 20, 20) and all(0 <= k < 3 for k in ds.labels)


def test_a_split_of_hugging_face(root, tmp_path):
    datasets = pytest.importorskip('datasets')
    ours = folder(root, size=24)
    rows = dict(image=[str(root/k) for k in ours.keys], label=ours.labels)
    kinds = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=list(CLASSES)))
    split = datasets.Dataset.from_dict(rows, features=kinds)
    got = as_dataset(split)
    assert same(got, ours) and fingerprint(got) != fingerprint(as_dataset(split.select(range(11))))
    with pytest.raises(UserError, match='dictionary of splits .train, test.'): as_dataset(datasets.DatasetDict(train=split, test=split))
    with pytest.raises(UserError, match='without streaming'): as_dataset(split.to_iterable_dataset())
    with pytest.raises(UserError, match='no column of pictures among label'): as_dataset(split.remove_columns('image'))
    assert len(list(batches(split, 5))) == 3


@pytest.mark.parametrize('make', [lambda f: [Image.open(p) for p in f], lambda f: f, lambda f: [str(p) for p in f], tuple,
                                  lambda f: [p.read_bytes() for p in f],
                                  lambda f: [np.asarray(Image.open(p)) for p in f], lambda f: [dict(image=Image.open(p)) for p in f]])
def test_lists_of_pictures(root, make):
    ours = folder(root, size=24)
    got = as_dataset(make([root/k for k in ours.keys]))
    assert torch.equal(got.batch(range(12))['image'], ours.batch(range(12))['image']) and len({*got.keys}) == 12
    assert torch.equal(torch.cat([b['image'] for b in batches(make([root/k for k in ours.keys]), 5)]), ours.batch(range(12))['image'])


def test_an_ending_in_capitals_is_the_same_ending(root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with tarfile.open('A.TAR', 'w') as t:
        for p in sorted(root.rglob('*.*'))[:3]: t.add(p, p.name)
    assert len(open_data('A.TAR', 24)) == len(open_data([tmp_path/'A.TAR'], 24)) == len(image_set('A.TAR')) == 3
    for name, kind in (('conv-f8d16', open_tokenizer), ('dit-conv-f8d16', open_net), ('vfm-tiny', lambda f: VFM('tiny', f))):
        for end in ('safetensors', 'json'):
            if (f := data_dir()/'weights'/f'{name}.{end}').exists(): shutil.copy(f, f'{name}.{end.upper() if end == "safetensors" else end}')
        kind(f'{name}.SAFETENSORS')
    assert as_source('conv-f8d16.SAFETENSORS').name == 'conv-f8d16' and is_tokenizer('x.PTH') and start_size('conv-f8d16.SAFETENSORS') == 64
    assert read_nets('conv-f8d16.SAFETENSORS')[0]['model'] and read_checkpoint('conv-f8d16.SAFETENSORS')
    saved = save_tokenizer(check_out('MINE.SAFETENSORS', '.safetensors'), open_tokenizer('conv-f8d16'))
    assert sorted(map(str, tmp_path.glob('MINE*'))) == sorted(map(str, (saved.absolute(), tmp_path/'MINE.json')))


def test_a_shard_that_vanishes_is_said(root, tmp_path):
    "FileNotFoundError, where a folder's picture had its line."
    with tarfile.open(tmp_path/'a.tar', 'w') as t:
        for p in sorted(root.rglob('*.*'))[:3]: t.add(p, p.name)
    ds = shards(tmp_path/'a.tar', size=24)
    ds.batch([0])
    (tmp_path/'a.tar').unlink()
    with pytest.raises(UserError, match=r'a.tar cannot be read any more \(No such file or directory\); open the data set again'): ds.batch([1])


@pytest.mark.parametrize('low', [0., -1.])
def test_a_list_of_tensors_is_what_the_same_tensors_with_labels_are(low):
    tensors = [torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(i))*(1-low)+low for i in range(12)]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        alone, sized, pairs = (as_dataset(x, size) for x, size in ((tensors, None), (tensors, 16), ([(t, 0) for t in tensors], None)))
    assert len(said) == 3*(low == 0) and all('from 0 to 1' in str(w.message) for w in said)
    want = torch.stack(tensors)*(2+low)-1-low           # of [0,1] 2x-1, of [-1,1] x
    torch.testing.assert_close(alone.batch(range(12))['image'], want, atol=0, rtol=0)
    for ds in (sized, pairs): torch.testing.assert_close(ds.batch(range(12))['image'], want, atol=.5/127.5+1e-6, rtol=0)


def test_a_folder_has_every_picture_that_torchvision_finds_in_it(tmp_path):
    ImageFolder = pytest.importorskip('torchvision.datasets').ImageFolder
    from torchvision.datasets.folder import IMG_EXTENSIONS
    for i, end in enumerate((*IMG_EXTENSIONS, '.JPE', '.jfif')):
        (tmp_path/'a').mkdir(exist_ok=True)
        kind = {'.pgm': 'PPM', '.JPE': 'JPEG', '.jfif': 'JPEG'}.get(end) or Image.registered_extensions()[end]
        picture(0, i).convert('L' if end == '.pgm' else 'RGB').save(tmp_path/'a'/f'{i:02d}{end}', kind)
    ours, theirs = folder(tmp_path, size=24), as_dataset(ImageFolder(str(tmp_path)))
    assert len(ours) == len(theirs)+2 == len(IMG_EXTENSIONS)+2
    torch.testing.assert_close(ours.batch(range(len(theirs)))['image'], theirs.batch(range(len(theirs)))['image'], atol=0, rtol=0)


@pytest.mark.parametrize('size', [None, 16, 24])
@pytest.mark.parametrize('spoil', [lambda x: ((x+1)*127.5).byte(), lambda x: x.int(), lambda x: x*9, lambda x: x/0])
def test_a_tensor_that_holds_no_pictures_is_refused_at_any_size(size, spoil):
    "With another size, bytes were taken for pictures, which every other door refuses."
    x = torch.rand(3, 3, 24, 24, generator=torch.Generator().manual_seed(0))*2-1
    assert as_dataset(x, size).batch([0])['image'].shape[-1] == (size or 24)
    with pytest.raises(UserError, match='integers|-1,1|NaN|finite'): as_dataset(spoil(x), size)


@pytest.mark.parametrize('shape, size', [((40, 40), 16), ((40, 56), 40), ((24, 30), 48)])
@pytest.mark.parametrize('low', [0., -1.])
def test_a_tensor_of_images_has_the_size_that_was_asked_for(shape, size, low):
    "Of one tensor `size` was passed over in silence; and one tensor is in [-1,1], dark pictures or not."
    x = torch.rand(3, 3, *shape, generator=torch.Generator().manual_seed(0))*(1-low)+low
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', message='.*enlarged')
        got, want = (as_dataset(i, size).batch(range(3))['image'] for i in (x, [to_pil(i) for i in x]))
    assert got.shape == (3, 3, size, size) and torch.equal(got, want)
    assert torch.equal(as_dataset(x).batch(range(3))['image'], x)


def test_numbers_that_name_few_of_many_classes_are_noticed():
    with pytest.warns(Notice, match='2 numbers up to 90000 are taken for 90,001 classes'): as_dataset([(picture(0, 0), 7), (picture(0, 1), 90_000)])
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert len(as_dataset([(picture(0, 0), 7), (picture(0, 1), 999)]).classes) == 1000
        named = [f'class {i}' for i in range(3000)]                     # who gives names has said how many there are
        assert number_classes(['class 7'], named, 'x') == ([7], named) == number_classes([7], named, 'x')


@pytest.mark.parametrize('size', [None, 8])
def test_a_sequence_that_opens_its_pictures_is_asked_for_few_of_them(size):
    "Whether all are tensors was asked of all, before a picture was needed."
    class Lazy(Sequence):
        targets, opened = [0]*200, 0
        def __len__(self): return 200
        def __getitem__(self, i):
            Lazy.opened += 1
            return picture(0, [*range(200)][i])
    as_dataset(Lazy(), size)
    assert Lazy.opened <= 12


def test_classes_are_found_below_any_parts_of_a_set(root):
    from torch.utils.data import ConcatDataset, Subset as Part
    from torchvision.datasets import ImageFolder
    whole = ImageFolder(str(root))
    splits = [Part(Part(whole, [5, 1, 11]), [1, 0]), ConcatDataset([Part(whole, [1]), whole]), Part(ConcatDataset([whole, whole]), [1, 17])]
    try:
        import datasets
        splits.append(Part(datasets.Dataset.from_dict(dict(image=[str(root/'ant'/'1.png'), str(root/'bee'/'1.png')], label=[0, 1]),
                           features=datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=list(CLASSES)))), [0, 1]))
    except ImportError: pass
    for some in splits:
        ds = as_dataset(some)
        assert ds.classes == CLASSES and ds.labels == [some[i][1] if isinstance(some[i], tuple) else some[i]['label'] for i in range(len(some))]
    (root.parent/'b'/'dog').mkdir(parents=True)
    picture(5, 5).save(root.parent/'b'/'dog'/'0.png')
    assert as_dataset(ConcatDataset([whole, ImageFolder(str(root.parent/'b'))])).classes == ('0', '1', '2')       # nobody knows


@pytest.mark.parametrize('kind', [int, str, np.int64, torch.tensor])
def test_the_label_of_an_item_is_believed_before_a_list_beside_the_set(kind):
    class View:
        "Its own order of another set, whose list it keeps."
        targets = [kind(k) if kind is not str else CLASSES[k] for k in (0, 1, 2, 1)]
        def __len__(self): return 4
        def __getitem__(self, i): return picture(0, 3-i), self.targets[3-i]
    ds = as_dataset(View())
    assert [ds.classes[k] for k in ds.labels] == ([CLASSES[k] for k in (1, 2, 1, 0)] if kind is str else ['1', '2', '1', '0'])


def test_a_split_of_hugging_face_with_a_transform_undecoded_or_with_two_columns(root):
    datasets = pytest.importorskip('datasets')
    ours = folder(root, size=24)
    kinds = datasets.Features(mask=datasets.Image(), image=datasets.Image(), label=datasets.ClassLabel(names=list(CLASSES)))
    blank = picture(9, 9)
    split = datasets.Dataset.from_dict(dict(mask=[blank]*12, image=[str(root/k) for k in ours.keys], label=ours.labels), features=kinds)
    with pytest.warns(Notice, match='columns of pictures image, mask the first is taken'): assert same(as_dataset(split), ours)
    one = split.remove_columns('mask')
    renamed = one.with_transform(lambda rows: dict(pixel_values=[np.asarray(i) for i in rows['image']]))
    for some in (renamed, one.with_format('torch'), one.with_format('numpy'), one.cast_column('image', datasets.Image(decode=False))):
        assert same(as_dataset(some), ours)


def test_what_a_foreign_set_raises_is_one_line_that_names_the_picture(tmp_path):
    class Broken:
        def __len__(self): return 9
        def __getitem__(self, i):
            if i == 5: raise KeyError('gone')
            return picture(0, i)
    with pytest.raises(UserError, match='images 5 cannot be read .KeyError: .gone'): as_dataset(Broken())
    (tmp_path/'a.jpg').write_bytes(png(picture(0, 0, 64), 'JPEG')[:900])
    lazy = as_dataset([picture(0, 1), Image.open(tmp_path/'a.jpg')], size=24)
    with pytest.raises(UserError, match='images 000001 cannot be read .OSError: .*truncated'): lazy.batch([1])
    with pytest.raises(UserError, match='images 000000 cannot be read'): as_dataset([(torch.rand(3, 0, 16), 0)])


@pytest.mark.parametrize('head', [lambda b: b, with_a_link], ids=['plain', 'read by tarfile'])
def test_images_behind_the_end_of_a_shard_are_not_left_out_in_silence(tmp_path, head):
    one, two = (write_tar(tmp_path/f'{k}.tar', [(f'{k}{i}.png', png(picture(k, i))) for i in range(3)]).read_bytes() for k in (0, 1))
    for name, after in (('cat', two), ('far', bytes(2**21) + two)):
        (tmp_path/f'{name}.tar').write_bytes(head(one) + after)
        with pytest.raises(UserError, match=f'{name}.tar goes on after its end, 3 images'): shards(tmp_path/f'{name}.tar', size=24)
    for name, after in (('zeros', bytes(2**21)), ('noise', b'x'), ('text', b'text'*500)):           # no archive: nothing is lost
        (tmp_path/f'{name}.tar').write_bytes(head(one) + after)
        assert len(shards(tmp_path/f'{name}.tar', size=24)) == 3


# classes by name ------------------------------------------------------------------------------------------------------------------------------

def test_one_set_through_every_door_has_one_naming(root, tmp_path):
    ours = folder(root, size=24)
    raw = [(root/k).read_bytes() for k in ours.keys]
    def members(label): return [m for i, d in enumerate(raw) for m in ((f'{i:03d}.png', d), (f'{i:03d}.cls', label(ours.labels[i])))]
    (tmp_path/'n').mkdir()
    write_tar(tmp_path/'n'/'a.tar', members(lambda k: str(k).encode()))
    (tmp_path/'n'/'classes.json').write_text(json.dumps(CLASSES))
    doors = dict(numbers=shards(tmp_path/'n'/'a.tar', size=24), words=shards(write_tar(tmp_path/'w.tar', members(lambda k: CLASSES[k].encode())), size=24),
                 pairs=as_dataset([(Image.open(root/k), CLASSES[c]) for k, c in zip(ours.keys, ours.labels, strict=True)]))
    for name, ds in doors.items(): assert same(ds, ours), name
    for form in (dict(classes=CLASSES, origin='x'), {c: k for k, c in enumerate(CLASSES)}):
        (tmp_path/'n'/'classes.json').write_text(json.dumps(form))
        assert shards(tmp_path/'n'/'a.tar').classes == CLASSES
    for bad in ('[1]', '{}', '{"a": 5}', '["a", "a", "b"]', 'x', '[]'):
        (tmp_path/'n'/'classes.json').write_text(bad)
        with pytest.raises(UserError, match='classes.json'): shards(tmp_path/'n'/'a.tar')


@pytest.mark.parametrize('parts,ok', [(('train', 'val'), False), (('Train', 'TEST'), False), (('train', 'val', 'notes'), False),
                                      (('train', 'car'), True), (('valid',), False)])
def test_parts_of_a_set_are_no_classes(tmp_path, parts, ok):
    for p in parts:
        (tmp_path/'d'/p).mkdir(parents=True)
        picture(0, 0).save(tmp_path/'d'/p/'0.png')
    if ok: assert folder(tmp_path/'d').classes == tuple(sorted(parts))              # a train is a vehicle, too
    else:
        with pytest.raises(UserError, match='parts of a data set'): folder(tmp_path/'d')


def test_parts_with_classes_in_them_are_no_classes(tmp_path):
    for p in ('train/ant', 'train/bee', 'other/ant'):
        (tmp_path/p).mkdir(parents=True)
        picture(0, 0).save(tmp_path/p/'0.png')
    with pytest.raises(UserError, match='give one of them'): folder(tmp_path)


# n of a set -----------------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('total,n', [(120, 50), (12, 3), (1000, 10), (640, 640), (5, 9), (1, 1), (99_991, 1000)])
def test_n_of_a_sorted_set_has_every_class_in_its_share(total, n):
    at = spread(n, total)
    assert len(at) == len({*at}) == min(n, total) and at == sorted(at) and 0 <= at[0] and at[-1] < total
    for k in range(3):                                                             # thirds of the set, as of sorted classes
        share = sum(k*total//3 <= a < (k+1)*total//3 for a in at)
        assert abs(share-len(at)/3) < 2


@pytest.mark.parametrize('period', [2, 10, 16, 100])
def test_the_choice_does_not_fall_into_step_with_a_set(period):
    kinds = np.bincount([a % period for a in spread(2000, 2000*period)], minlength=period)
    assert kinds.min() > 0 and kinds.max() < 3*2000/period


def test_a_part_of_a_set_is_a_set(root):
    ds = folder(root, size=24)
    part = take(ds, 6)
    assert isinstance(part, Subset) and [part.labels.count(k) for k in range(3)] == [2, 2, 2] and taken(part) == '6 of 12, spread' and taken(ds) == 'all 12'
    assert part.keys == part.batch(range(6))['key'] == [ds.keys[i] for i in part.at] and part.classes == ds.classes and take(ds, 12) is ds is take(ds)
    assert stamps(part) == [stamps(ds)[i] for i in part.at] and fingerprint(part) != fingerprint(ds) and len(take(part, 2)) == 2
    assert take(World(100, seed=3), 7).batch(range(7))['key'] == World(100, seed=3).batch(range(7))['key']
    for bad in (0, -1, 1.5, 'x', float('nan')):
        with pytest.raises(UserError, match='n: '): take(ds, bad)


# identity -------------------------------------------------------------------------------------------------------------------------------------

def test_two_folders_of_one_name_are_two_sets(tmp_path):
    for k, side in enumerate('AB'):
        (tmp_path/side/'train').mkdir(parents=True)
        for i in range(3):
            Image.new('RGB', (16, 16), (100*k, 50, 50)).save(f := tmp_path/side/'train'/f'{i}.bmp')
            os.utime(f, (1e9, 1e9))                                                # same names, sizes and times: the bytes tell
    a, b = (folder(tmp_path/s/'train', size=16) for s in 'AB')
    assert fingerprint(a) != fingerprint(b) and fingerprint(a) == fingerprint(folder(tmp_path/'A'/'train', size=16))


def test_a_large_set_is_known_by_sizes_and_times(tmp_path, monkeypatch):
    import vfmvae.data as d
    for i in range(3): picture(0, i).save(tmp_path/f'{i}.png')
    monkeypatch.setattr(d._FileStamps, '__init__', lambda self, pieces: self.__dict__.update(_small=False))
    ds = folder(tmp_path, size=24)
    was, marks = fingerprint(ds), stamps(ds)
    assert fingerprint(folder(tmp_path, size=24)) == was
    os.utime(tmp_path/'1.png', (1e9, 1e9))
    assert fingerprint(ds) != was and [a == b for a, b in zip(stamps(ds), marks, strict=True)] == [True, False, True]


def test_an_edited_renamed_added_or_relabelled_picture_is_another_set(root):
    seen = {fingerprint(folder(root, size=24))}
    def new():
        seen.add(fingerprint(folder(root, size=24)))
        return len(seen)
    picture(9, 9).save(root/'ant'/'0.png')
    assert new() == 2
    (root/'ant'/'0.png').rename(root/'ant'/'00.png')
    assert new() == 3
    (root/'ant'/'00.png').rename(root/'bee'/'00.png')
    assert new() == 4
    picture(9, 8).save(root/'ant'/'0.png')
    assert new() == 5
    assert len({fingerprint(folder(root, size=24, **how)) for how in ({}, dict(augment=True), dict(crop='adm'))} | {fingerprint(folder(root, size=32))}) == 4


def test_a_bank_of_an_edited_picture_is_told(root):
    class Mean:
        name, layers = 'mean', ('rgb',)
        def features(self, x, layers=None): return {'rgb': x.mean((2, 3))[:, None]}
    before = banks(Mean(), folder(root, size=24), quiet=True)['rgb']
    picture(9, 9).save(root/'bee'/'1.png')
    after = banks(Mean(), folder(root, size=24), quiet=True)['rgb']
    with pytest.raises(UserError, match='bee/1.png changed'): before.check(after)
    rest = [n for n in before.names if n != 'bee/1.png']
    assert before.select(rest).check(after.select(rest)) is None
    assert Bank.load(after.save(root.parent/'b.safetensors')).stamps == after.stamps


def test_a_set_whose_files_have_gone_says_so(root):
    ds = folder(root, size=24)
    (root/'ant'/'0.png').unlink()
    with pytest.raises(UserError, match='0.png'): fingerprint(ds)
    with pytest.raises(UserError, match='0.png'): ds.batch([0])


# nothing left out, nothing enlarged, in silence ----------------------------------------------------------------------------------------------

def test_what_is_seen_and_not_read_is_counted_and_said(root):
    (root/'ant'/'x.gif').touch()
    (root/'ant'/'raw').touch()
    (root/'ant'/'note.txt').touch()
    os.symlink(root/'nowhere.png', root/'ant'/'lost.png')
    os.symlink(root, root/'ant'/'loop')
    os.mkfifo(root/'ant'/'pipe.png')
    with pytest.warns(Notice, match='left out') as said: ds = folder(root, size=24)
    assert ds.skipped == {'.gif': 1, 'file without ending': 1, '.txt': 1, 'broken link': 1, 'link to a folder above it': 1, 'pipe or device': 1}
    assert len(ds) == 12 and '.txt' not in str(said[0].message) and '1 .gif' in str(said[0].message) and '.txt' in repr(ds)


def test_links_to_files_and_folders_are_read(root, tmp_path):
    (tmp_path/'sub'/'ant').mkdir(parents=True)
    for i in range(2): os.symlink(root/'ant'/f'{i}.png', tmp_path/'sub'/'ant'/f'{i}.png')
    os.symlink(root/'bee', tmp_path/'sub'/'bee')
    ds = folder(tmp_path/'sub', size=24)
    assert ds.classes == ('ant', 'bee') and len(ds) == 6 and not ds.skipped


def test_members_of_a_shard_that_are_no_pictures_are_counted(tmp_path):
    d = png(picture(0, 0))
    path = write_tar(tmp_path/'a.tar', [('0.png', d), ('0.cls', b'0'), ('0.txt', b'a caption'), ('0.gif', b'x'), ('1.cls', b'1')])
    with tarfile.open(path, 'a') as t:
        (link := tarfile.TarInfo('2.png')).type, link.linkname = tarfile.SYMTYPE, '0.png'
        t.addfile(link)
    with pytest.warns(Notice, match='left out'): ds = shards(path, size=24)
    assert ds.skipped == {'.txt': 1, '.gif': 1, 'class without a picture': 1, 'member that is a link or sparse': 1} and len(ds) == 1


def test_enlarging_is_said_once_and_counted(root):
    ds = folder(root, size=64)
    with pytest.warns(Notice, match='enlarged to 64 px .*24 x 24.*size=24') as said: ds.batch(range(12))
    assert len(said) == 1 and ds.enlarged == 12
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        for size in (24, 16): folder(root, size=size).batch(range(12))


@pytest.mark.parametrize('size', [0, -8, 1.5, 10**9, 'x', None, float('nan'), True])
def test_a_size_that_is_none(root, size):
    with pytest.raises(UserError, match='size'): folder(root, size=size)


@pytest.mark.parametrize('mode,value,grey', [('I;16', 65535, 255), ('I;16', 0, 0), ('I;16', 25700, 100), ('L', 77, 77)])
def test_grey_of_any_depth(tmp_path, mode, value, grey):
    kind = np.uint16 if '16' in mode else np.uint8
    for form in ('png', 'tif'):
        Image.fromarray(np.full((16, 16), value, kind)).save(tmp_path/f'g.{form}')
        x = to_uint8(folder(tmp_path, size=16).batch([0])['image'])
        assert x.unique().tolist() == [grey]
        (tmp_path/f'g.{form}').unlink()


# what the bundled nets know --------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('name', ['vfmvae-tiny-f8d16', 'conv-f8d16'])
def test_photographs_are_outside_of_what_a_bundled_net_knows_and_its_world_is_not(name, photos, shared):
    from vfmvae.images import transform
    from vfmvae.tokenizer import LatentFeatures, tokenizers, unfamiliar
    tok, world = tokenizers[name], World(48, seed=77)
    x = world.batch(range(48))['image']
    for inside in (world, x, x[:1], transform(x, 'noise', .1), transform(x, 'rotation', 30), World(32, seed=5, size=128).batch(range(32))['image']):
        assert unfamiliar(tok, inside) == ''
    for outside in (folder(photos, size=64), shards(str(shared/'data/cifar10/cifar10-test-000000.tar'), size=32),
                    [Image.open(p) for p in sorted(photos.iterdir())[:9]], torch.rand(4, 3, 64, 64)*2-1):
        said = unfamiliar(tok, outside)
        assert said.startswith(f'{name} has only ever seen the procedural world') and 'distance of features' in said and '\n' not in said
        assert unfamiliar(LatentFeatures(tok), outside) == said
    tok.meta = {k: v for k, v in tok.meta.items() if k != 'known'}
    assert unfamiliar(tok, folder(photos, size=64)) == ''                           # a net of one's own says nothing about itself

def test_a_bundled_vfm_says_what_it_knows_of(photos, shared):
    from vfmvae.recipes import open_data
    from vfmvae.tokenizer import unfamiliar
    from vfmvae.vfm import VFM
    inside = (open_data('clothes-val'), folder(photos, size=64), shards(str(shared/'data/photos64/photos64-val-000000.tar'), size=64),
              shards(str(shared/'data/cifar10/cifar10-test-000000.tar'), size=32))
    world = World(48, seed=77)
    drawn = (world, world.batch(range(48))['image'], torch.rand(4, 3, 64, 64)*2-1)
    vfm = VFM('tiny')
    assert [unfamiliar(vfm, x) for x in drawn[:2]] == ['', '']
    assert all(unfamiliar(vfm, x).startswith('tiny has only ever seen the procedural world') for x in (*inside, drawn[2]))
    # photo knows photographs, and by the eyes of its teacher it can say so; the card of the teacher says nothing
    assert [unfamiliar(VFM('photo'), x) for x in inside] == ['']*4
    assert all(unfamiliar(VFM('photo'), x).startswith('photo has only ever seen photographs') for x in drawn)
    assert unfamiliar(VFM('efficientnet-lite0'), world) == ''
