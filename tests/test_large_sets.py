"Sets of ImageNet's size, tried at small sizes: bytes an image, an index of shards, heads of tar, images that travel as bytes, crops by number."
import bz2, gzip, hashlib, io, itertools, json, os, pickle, random, signal, subprocess, sys, tarfile, time, tracemalloc
from collections import Counter
from pathlib import Path
import numpy as np
import pytest
import torch
from PIL import Image
import vfmvae.data as data

import vfmvae.images as images
import vfmvae.tar as tar
from vfmvae.core import Draws, Notice, UserError
from vfmvae.files import to_json
from vfmvae.images import random_crop_flip, to_tensor
from vfmvae.world import World
from vfmvae.folders import folder, shards
from vfmvae.data import as_dataset, fingerprint, fingerprints, loader, spread, stamps, Subset, take, TensorSet
from vfmvae.run import run_identity

sys.path.insert(0, str(Path(__file__).resolve().parent.parent/'benchmarks'))
import sets  # noqa: E402

OLD = 1_500_000_000    # a time of files


def make_tar(path, members, form=tarfile.USTAR_FORMAT, **how):
    "members: name, or (name, data), or a TarInfo, or (TarInfo, data)."
    with tarfile.open(path, 'w', format=form, **how) as t:
        for m in members:
            info, data = m if isinstance(m, tuple) else (m, b'')
            info = tarfile.TarInfo(info) if isinstance(info, str) else info
            info.size = info.size or len(data)
            t.addfile(info, io.BytesIO(data) if data else None)
    return path


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv('VFMVAE_HOME', str(tmp_path/'home'))
    return tmp_path/'home'


@pytest.fixture
def two(tmp_path, home):
    "Two shards that are large enough for an index, and of another day."
    sets.make_shards(tmp_path/'s', 1200, 2, 7)
    for p in (tmp_path/'s').iterdir(): os.utime(p, (OLD, OLD))
    return tmp_path/'s'


@pytest.fixture
def reads(monkeypatch):
    "How often shards are read."
    calls, real = [], tar._read_shards
    monkeypatch.setattr(tar, '_read_shards', lambda paths: (calls.append(1), real(paths))[1])
    return calls


def known(ds): return ds.keys[:], ds.labels[:], ds.classes, ds.pieces[:], ds.skipped


# a list in arrays -----------------------------------------------------------------------------------------------------------------------------

TEXTS = {'none': [], 'one': ['a'], 'paths': [f'n{i % 7}/n{i}.png' for i in range(9000)], 'empty': ['', 'a', '', ''], 'all empty': ['']*3,
         'languages': ['ä', '日本語', 'x', 'é'*50, '🐜'], 'zeros': ['a\0b', '\0', 'c', '\0\0'], 'surrogates': ['a\udc80', '\ud83d', '\ude00', 'b'],
         'mixed blocks': [f'k{i}' + 'ü'*(i == 5000) + '\0'*(i == 8500) for i in range(9000)]}


@pytest.mark.parametrize('kind', [*TEXTS, 'numbers', 'part'])
def test_a_column_is_a_list(kind):
    if kind == 'numbers': want, got = [*range(-5, 5000)], tar.number_column(np.arange(-5, 5000, dtype=np.int32))
    elif kind == 'part': want, got = TEXTS['paths'][10:8000:7], data._some(tar.text_column(*tar.pack_texts(TEXTS['paths'])), range(10, 8000, 7))
    else: want, got = TEXTS[kind], tar.text_column(*tar.pack_texts(iter(TEXTS[kind])))
    n = len(want)
    assert len(got) == n and list(got) == want and got == want and want == got and got.tolist() == want == [*reversed([*reversed(got)])]
    assert not got == [*want, 'x'] and (not want or not got == [*want[:-1], None]) and got != 'x' and sorted(got) == sorted(want)
    for s in (slice(None), slice(3), slice(-3, None), slice(5, 2), slice(None, None, -1), slice(1, 9999, 3), slice(4090, 4100)): assert got[s] == want[s], s
    for i in {0, -1, n//2, n-1, 4095, 4096} & {*range(-n, n)}: assert got[i] == want[i] == got[np.int64(i)] and type(got[i]) is type(want[i])
    for i in (n, -n-1):
        with pytest.raises(IndexError): got[i]
    assert all(x in got for x in want[:3]) and 'nowhere' not in got and got.count(want[0] if want else 0) == want.count(want[0] if want else 0)
    assert not want or got.index(want[-1]) == want.index(want[-1])
    assert np.array_equal(np.asarray(got), np.asarray(want)) and to_json(got) == to_json(want)
    assert repr(got) == repr(want) if n <= 100 else len(repr(got)) < 300 and f'{n:,}' in repr(got)
    with pytest.raises(TypeError): hash(got)


@pytest.mark.parametrize('kind', ['folder', 'shards'])
def test_an_image_takes_less_than_150_bytes(tmp_path, home, kind):
    n = 20_000
    if kind == 'folder': sets.make_files(tmp_path/'files', n, 40)
    else: sets.make_shards(tmp_path/'shards', n, 4, 40)
    opened = (lambda: folder(tmp_path/'files', size=8)) if kind == 'folder' else (lambda: shards(tmp_path/'shards'/'*.tar', size=8))
    take(opened(), n//2).batch([0])                                                # what is imported and read once
    tracemalloc.start()
    try:
        ds = opened()
        assert len(ds) == n and tracemalloc.get_traced_memory()[0] < 100*n
        part = take(ds, n//2)
        assert len(fingerprint(ds)) == len(fingerprint(part)) == 16 and len(loader(part, 8).batch_at(0)['key']) == 8
        assert tracemalloc.get_traced_memory()[0] < 150*n
    finally: tracemalloc.stop()


# folders ----------------------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('seed', range(6))
def test_a_folder_is_in_the_order_of_its_paths(tmp_path, seed):
    rng, made = random.Random(seed), set()
    names = ['a', 'a.b', 'a-b', 'a b', 'A', 'ä', 'b', 'z', 'a\udc80'[:1+seed % 2]]
    for _ in range(60):
        parts = [rng.choice(names) for _ in range(rng.randint(1, 3))]
        at = tmp_path.joinpath('r', *parts, rng.choice(names)+rng.choice(['.png', '.JPG', '.jpeg.webp']))
        at.parent.mkdir(parents=True, exist_ok=True)
        at.touch()
        made.add(at.relative_to(tmp_path/'r'))
    want = sorted(made, key=lambda p: p.parts)
    ds = folder(tmp_path/'r', size=8)
    assert ds.keys == [p.as_posix() for p in want] and [ds.classes[k] for k in ds.labels] == [p.parts[0] for p in want]
    assert [Path(p) for p, _, _ in ds.pieces] == [tmp_path/'r'/p for p in want]


@pytest.mark.parametrize('name,taken', [('a.png', 1), ('a.PnG', 1), ('.a.png', 0), ('a.', 0), ('a', 0), ('png', 0), ('a.png.txt', 0), ('a..jpg', 1),
                                        ('.png', 0)])
def test_what_is_a_picture_in_a_folder(tmp_path, name, taken):
    (tmp_path/'x.png').touch()
    (tmp_path/name).touch()
    kind = os.path.splitext(name)[1] or 'file without ending'
    if not taken and not name.startswith('.') and kind == 'file without ending':
        with pytest.warns(Notice): ds = folder(tmp_path)
    else: ds = folder(tmp_path)
    assert len(ds) == 1+taken and ds.skipped == ({} if taken or name.startswith('.') else {kind: 1})


# heads of tar -------------------------------------------------------------------------------------------------------------------------------------

def info(name, **more):
    t = tarfile.TarInfo(name)
    for k, v in more.items(): setattr(t, k, v)
    return t


PAIRS = [m for i in range(3) for m in ((f'd/k{i}.jpg', bytes([i])*(700*i+3)), (f'd/k{i}.cls', str(i).encode()))]


def patched(data, at, new, mend=True):
    "A tar with other bytes at a place of its second head; its checksum mended."
    b, second = bytearray(data), 1024
    b[second+at:second+at+len(new)] = new
    if mend:
        b[second+148:second+156] = b' '*8
        b[second+148:second+156] = b'%06o\0 ' % sum(b[second:second+512])
    return bytes(b)


CHANGES = [('size in 256s', 124, b'\x80'+bytes(10)+b'\1', False), ('negative size', 124, b'\xff'*11+b'\0', False),     # name, place in a head, bytes, plain?
           ('minus', 124, b'-0000000512\0', False), ('huge size', 124, b'77777777777\0', False), ('spaces before size', 124, b'          1\0', False),
           ('octal 9', 124, b'00000000009\0', False), ('underline', 124, b'0000000_001\0', False), ('twelve digits', 124, b'000000000010', False),
           ('bad owner', 108, b'abc', False), ('digits after blanks', 108, b'00 0000\0', False), ('a space for a zero', 107, b' ', True),
           ('sparse', 156, b'S', False), ('old file', 156, b'\0', True), ('old folder', 156, b'\0', False), ('volume', 156, b'V', False),
           ('bytes after a name', 90, b'x', False), ('no name', 0, bytes(100), True), ('major', 329, b'x', False), ('no major', 329, bytes(16), True),
           ('magic', 257, b'nothing', True), ('folder with a size', 156, b'5', False), ('pax of nothing', 156, b'x', False)]


def odd_tars(root):
    "name -> (file, whether it is plain)."
    out, at = {}, itertools.count()
    def add(name, plain, members=PAIRS, form=tarfile.USTAR_FORMAT, **how): out[name] = make_tar(root/f'{next(at)}.tar', members, form, **how), plain
    def raw(name, plain, data):
        out[name] = root/f'{next(at)}.tar', plain
        out[name][0].write_bytes(data)
    for form, kind in ((tarfile.USTAR_FORMAT, 'ustar'), (tarfile.GNU_FORMAT, 'gnu'), (tarfile.PAX_FORMAT, 'pax')): add(kind, True, form=form)
    add('no classes', True, PAIRS[::2])
    add('empty tar', True, [])
    add('folders', True, [info('d', type=tarfile.DIRTYPE), *PAIRS])
    add('times in pax', True, [(info(n, mtime=OLD+.5), b) for n, b in PAIRS], tarfile.PAX_FORMAT)
    add('owners in pax', True, [(info(n, uid=2**30, gid=2**29), b) for n, b in PAIRS], tarfile.PAX_FORMAT)
    add('prefix', True, [('p'*80+'/'+'q'*60+'/'+n, b) for n, b in PAIRS])
    add('a hundred characters', True, [('n'*96+n[-4:], b) for n, b in PAIRS[:2]])
    add('languages', True, [('ä/日'+n, b) for n, b in PAIRS])
    add('no utf-8', True, [('\udc80'+n, b) for n, b in PAIRS])
    add('other members', True, [*PAIRS, ('x.txt', b'a'), ('y', b''), ('d/.jpg', b'a'), ('z.TAR.GZ', b'z'), ('empty.png', b''), ('empty.cls', b'1')])
    add('long labels', False, [*PAIRS, ('l.jpg', b'a'), ('l.cls', b'1'+b' '*511+b'2')])
    add('label of a word', True, [*PAIRS[::2], *[(n, 'größe'.encode()) for n, _ in PAIRS[1::2]]])
    add('bad label', False, [*PAIRS[:2], ('x.jpg', b'a'), ('x.cls', b'-1')])
    add('twice', False, [*PAIRS, PAIRS[0]])
    add('two classes', False, [*PAIRS, PAIRS[1]])
    add('label of a part', True, PAIRS[:-1])
    add('pax names', False, [('n'*150+n, b) for n, b in PAIRS], tarfile.PAX_FORMAT)
    add('gnu long names', False, [('n'*150+n, b) for n, b in PAIRS], tarfile.GNU_FORMAT)
    add('owners in 256s', False, [(info(n, uid=2**40), b) for n, b in PAIRS], tarfile.GNU_FORMAT)
    add('size in pax', False, [(info(n, pax_headers={'size': str(len(b))}), b) for n, b in PAIRS], tarfile.PAX_FORMAT)
    add('path in pax', False, [(info(n, pax_headers={'path': 'other/'+n}), b) for n, b in PAIRS], tarfile.PAX_FORMAT)
    add('sparse in pax', False, [(info('s.png', pax_headers={'GNU.sparse.size': '3', 'GNU.sparse.map': '0,3'}), b'abc'), *PAIRS], tarfile.PAX_FORMAT)
    add('global head', False, PAIRS, tarfile.PAX_FORMAT, pax_headers={'comment': 'x'})
    for k in ('SYM', 'LNK', 'FIFO', 'CHR', 'CONT'): add(f'type {k}', False, [info('l.jpg', type=getattr(tarfile, f'{k}TYPE'), linkname='d/k0.jpg'), *PAIRS])
    add('unknown type', False, [(info('l.jpg', type=b'Z'), b'a'), *PAIRS])
    good = out['ustar'][0].read_bytes()
    for n in (0, 100, 512, 600, 1024, 1500, 1536, 2048, *range(2560, len(good)-9000, 512)): raw(f'cut after {n}', n == 10**9, good[:n])
    raw('zeros', True, bytes(1024))
    raw('half of the end', True, good.rstrip(b'\0')+bytes(-len(good.rstrip(b'\0')) % 512+512))
    raw('text after the end', True, good+b'text')
    raw('text instead of the end', False, good.rstrip(b'\0')+bytes(-len(good.rstrip(b'\0')) % 512)+b'text'*500)
    for name, pack in (('gzip', gzip.compress), ('bzip2', bz2.compress)): raw(name, False, pack(good))
    for name, at_, new, plain in CHANGES:
        data = patched(good, at_, new)
        if name == 'old folder': data = patched(data, 0, b'd/k0.cls/\0')
        raw(name, plain, data)
    times = out['times in pax'][0].read_bytes()
    raw('times of nothing', False, times[:1024]+bytes(1024))
    raw('wrong checksum', False, patched(good, 148, b'000001', False))
    raw('checksum in seven digits', False, patched(good, 148, b'%07o\0' % sum(good[1024:1172]+b' '*8+good[1180:1536]), False))
    raw('a byte of a name', False, patched(good, 3, b'K', False))
    return out


@pytest.mark.parametrize('records,plain', [(b'20 mtime=1500000000\n', True), (b'14 mtime=-1.5\n9 uid=70\n', True), (b'21 mtime=1500000000\n', False),
                                           (b'19 mtime=1500000000\n', False), (b'11 path=a.b\n', False), (b'20 mtime=1500000000', False), (b'', False)])
def test_what_may_be_said_of_the_next_member(records, plain):
    row = bytes(512) + records.ljust(512, b'\0')
    if plain: assert tar._aside(ord('x'), 'a', len(records), row)
    else:
        with pytest.raises(ValueError): tar._aside(ord('x'), 'a', len(records), row)


def told(path, by):
    "What a shard holds, or the words of its error."
    try:
        images, labels = by(str(path), skipped := Counter())
        return [*images.items()], [*labels.items()], [*skipped.items()]
    except UserError as e: return str(e)


def by_tarfile(path, skipped, monkeypatch):
    def never(p): raise ValueError
    with monkeypatch.context() as m:
        m.setattr(tar, '_plain_members', never)
        return tar._shard_index(path, skipped)


def test_a_shard_is_what_tarfile_says(tmp_path, monkeypatch):
    for name, (path, plain) in odd_tars(tmp_path).items():
        fast, asked, real = [], [], tar._by_tarfile
        with monkeypatch.context() as m:
            m.setattr(tar, '_by_tarfile', lambda *a, asked=asked, real=real: (asked.append(1), real(*a))[1])
            fast = told(path, tar._shard_index)
        assert fast == told(path, lambda p, s: by_tarfile(p, s, monkeypatch)), name
        assert bool(asked) != plain, name


@pytest.mark.parametrize('seed', range(4))
def test_any_damage_to_a_head_is_seen_as_tarfile_sees_it(tmp_path, monkeypatch, seed):
    rng, seen = random.Random(seed), Counter()
    good = make_tar(tmp_path/'a.tar', [(info(n, mtime=OLD+.25*(seed % 2)), b) for n, b in PAIRS], tarfile.PAX_FORMAT).read_bytes()
    heads = [m.offset for m in tarfile.open(tmp_path/'a.tar')] + [m.offset_data-512 for m in tarfile.open(tmp_path/'a.tar')]
    for _ in range(150):
        bad, at = bytearray(good), rng.choice(heads)
        bad[at+rng.choice([rng.randrange(512), rng.randrange(100, 160), rng.randrange(512, 560)])] = rng.choice([rng.randrange(256), 0, 32, 48, 57, 0x80])
        if rng.random() < .7:
            bad[at+148:at+156] = b' '*8
            bad[at+148:at+156] = b'%06o\0 ' % sum(bad[at:at+512])
        (tmp_path/'b.tar').write_bytes(bad)
        want = told(tmp_path/'b.tar', lambda p, s: by_tarfile(p, s, monkeypatch))
        assert told(tmp_path/'b.tar', tar._shard_index) == want
        seen[type(want)] += 1
    assert min(seen.values()) > 5 and len(seen) == 2                               # some of these are errors, and some are not


@pytest.mark.parametrize('side', [1, 40, 400])
def test_pictures_of_any_size_between_heads(tmp_path, monkeypatch, side):
    rng = np.random.default_rng(side)
    data = [rng.integers(0, 256, int(rng.integers(1, 60*side)), np.uint8).tobytes() for _ in range(1300)]
    path = make_tar(tmp_path/'a.tar', [m for i, b in enumerate(data) for m in ((f'{i}.jpg', b), (f'{i}.cls', str(i % 9).encode()))])
    images, labels = tar._keyed(tar._plain_members(str(path)), tar._first, 'a', Counter())
    assert (images, labels) == by_tarfile(str(path), Counter(), monkeypatch) and len(images) == 1300
    raw = path.read_bytes()
    assert [raw[a:a+n] for a, n in images.values()] == data


def test_a_key_of_several_shards_carries_the_name_of_its_shard(tmp_path, home):
    for s in 'ab': make_tar(tmp_path/f'{s}.tar', [(f'{i}.png', b'x') for i in range(3)])
    make_tar(tmp_path/'c.tar', [])
    ds = shards([tmp_path/f'{s}.tar' for s in 'acb'])
    assert ds.keys == [f'{s}/{i}' for s in 'ab' for i in range(3)] and [Path(p).stem for p, _, _ in ds.pieces] == [*'aaabbb']
    assert shards([tmp_path/'a.tar', tmp_path/'a.tar']).keys == [f'{s:05d}/{i}' for s in range(2) for i in range(3)]
    assert shards(tmp_path/'a.tar').keys == [*'012']


# the index ----------------------------------------------------------------------------------------------------------------------------------------

def test_the_second_opening_reads_no_byte_of_a_shard(two, home, reads):
    first = known(shards(two/'*.tar'))
    assert len(reads) == 1 and len([*(home/'shards').glob('*.npz')]) == 1
    for p in two.iterdir():                          # the same names, sizes and times; anybody who looks inside would see it
        p.write_bytes(bytes(p.stat().st_size))
        os.utime(p, (OLD, OLD))
    assert known(shards(two/'*.tar')) == first == known(shards([*sorted(two.iterdir())])) and len(reads) == 1


@pytest.mark.parametrize('change', ['size', 'time', 'name', 'order', 'fewer', 'endings', 'content and time'])
def test_an_index_of_other_shards_is_not_taken(two, reads, monkeypatch, change):
    first, (a, b) = known(shards(two/'*.tar')), sorted(two.iterdir())
    pattern = two/'*.tar'
    if change == 'size': b.write_bytes(b.read_bytes()+bytes(512)); os.utime(b, (OLD, OLD))
    if change == 'time': os.utime(b, ns=(OLD*10**9, OLD*10**9+1))
    if change == 'name': b.rename(two/'train-000002.tar')
    if change == 'order': pattern = [b, a]
    if change == 'fewer': pattern = a
    if change == 'endings': monkeypatch.setattr(tar, 'SUFFIXES', images.SUFFIXES | {'.gif'})
    if change == 'content and time': b.write_bytes(b.read_bytes().replace(b'n0000', b'm0000', 3))
    if change == 'content and time':
        with pytest.raises(UserError, match=b.name): shards(pattern)             # its heads are wrong now
        assert len(reads) == 2
        return
    again = known(shards(pattern))
    assert len(reads) == 2 and (again != first) == (change in ('name', 'order', 'fewer')) and known(shards(pattern)) == again and len(reads) == 2
    n = 1200 if change != 'fewer' else 600
    assert len(again[0]) == n


def flip(at): return lambda b: b[:at] + bytes([b[at] ^ 64]) + b[at+1:]


def about(two): return json.dumps([1, sorted(images.SUFFIXES), tar._known_by(sorted(map(str, two.iterdir())))]).encode()


@pytest.mark.parametrize('spoil', [*(flip(int(k)) for k in np.linspace(0, 55_000, 12)), lambda b: b[:-1], lambda b: b[:len(b)//2], lambda b: b'',
                                   lambda b: bytes(len(b)), lambda b: pickle.dumps(dict(about=1)), lambda b: b[::-1]])
def test_a_damaged_index_is_not_trusted(two, home, reads, spoil):
    first = known(shards(two/'*.tar'))
    file, = (home/'shards').glob('*.npz')
    good = file.read_bytes()
    assert len(good) > 56_000
    file.write_bytes(spoil(good))
    assert known(shards(two/'*.tar')) == first
    assert tar._load_index(file, about(two)) is not None                             # mended, or it was a byte that says nothing


def test_every_byte_of_an_index_that_matters_is_checked(two, home):
    shards(two/'*.tar')
    file, = (home/'shards').glob('*.npz')
    good, told = file.read_bytes(), about(two)
    want = tar._load_index(file, told)
    rng = random.Random(0)
    file.write_bytes(good.replace(b"'shape': (1200, 2", b"'shape': (1000, 2"))
    assert tar._load_index(file, told) is None
    file.write_bytes(good)
    assert want is not None and tar._load_index(file, told+b' ') is None
    for at in [rng.randrange(len(good)) for _ in range(300)]:
        file.write_bytes(flip(at)(good))
        got = tar._load_index(file, told)
        assert got is None or all(np.array_equal(got[k], v) and got[k].dtype == v.dtype for k, v in want.items()), at


@pytest.mark.parametrize('home_', ['a file', 'no folder for shards', 'small shards'])
def test_where_no_index_can_be_there_is_none(two, home, reads, monkeypatch, home_):
    want = known(shards(two/'*.tar'))
    if home_ == 'a file': monkeypatch.setenv('VFMVAE_HOME', str(next(two.iterdir())))
    else:
        monkeypatch.setenv('VFMVAE_HOME', str(home.parent/'h2'))
        (home.parent/'h2').mkdir()
    if home_ == 'no folder for shards': (home.parent/'h2'/'shards').touch()
    if home_ != 'small shards': assert [known(shards(two/'*.tar')) == want for _ in range(2)] == [True]*2 and len(reads) == 3
    else: assert len(shards(make_tar(home.parent/'x.tar', PAIRS))) == 3 and not [*(home.parent/'h2').iterdir()]


def test_an_index_that_cannot_be_written_is_no_error(two, reads, monkeypatch):
    def full(path, write): raise UserError('no space left')
    monkeypatch.setattr(tar, 'write_atomic', full)
    assert known(shards(two/'*.tar')) == known(shards(two/'*.tar')) and len(reads) == 2


def test_a_shard_that_changes_while_it_is_read_leaves_no_index(two, home, monkeypatch):
    real = tar._read_shards
    monkeypatch.setattr(tar, '_read_shards', lambda paths: (real(paths), os.utime(paths[0]))[0])
    assert len(shards(two/'*.tar')) == 1200 and not [*(home/'shards').glob('*.npz')]


@pytest.mark.parametrize('age,least,most', [(0, .01, .02), (None, 1.5, 2), (60, 0, 0), (-60, 0, 0)])
def test_a_shard_of_just_now_is_read_once_the_clock_of_files_went_on(two, monkeypatch, age, least, most):
    slept, now = [], time.time_ns()
    for p in two.iterdir(): os.utime(p, ns=(now, now//10**9*10**9 if age is None else (now-age*10**9)//10*10+1))
    monkeypatch.setattr(time, 'time_ns', lambda: now+10**6)
    monkeypatch.setattr(time, 'sleep', slept.append)
    shards(two/'*.tar')
    assert least <= sum(slept) <= most or (age is None and now % 10**9 > 4*10**8)


OPEN = """
import sys, time
from vfmvae import data, folders, tar
real = tar._read_shards
def slow(paths):
    open(sys.argv[2], 'a').write('x')
    time.sleep(1.)
    return real(paths)
tar._read_shards = slow
ds = folders.shards(sys.argv[1]+'/*.tar')
print(len(ds), data.fingerprint(ds))
"""


def test_processes_that_start_at_once_read_the_shards_once(two, tmp_path, reads):
    env = dict(os.environ, PYTHONPATH=str(Path(data.__file__).parent.parent))
    kids = [subprocess.Popen([sys.executable, '-c', OPEN, str(two), str(tmp_path/'log')], env=env, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    said = {k.communicate(timeout=120)[0] for k in kids}
    ds = shards(two/'*.tar')
    assert said == {f'{len(ds)} {fingerprint(ds)}\n'} and (tmp_path/'log').read_text() == 'x' and not reads


HOLD = "import sys, fcntl, time; f = open(sys.argv[1], 'ab'); fcntl.flock(f, fcntl.LOCK_EX); print('has it', flush=True); time.sleep(600)"


@pytest.mark.parametrize('maker', ['killed', 'stopped'])
def test_nobody_waits_for_ever_for_another_process(two, home, reads, monkeypatch, maker):
    want = known(shards(two/'*.tar'))
    file, = (home/'shards').glob('*.npz')
    file.unlink()
    kid = subprocess.Popen([sys.executable, '-c', HOLD, str(file.with_suffix('.lock'))], stdout=subprocess.PIPE, text=True)
    try:
        assert kid.stdout.readline() == 'has it\n'
        if maker == 'killed':
            kid.send_signal(signal.SIGKILL)
            kid.wait()
        else: monkeypatch.setattr(tar, '_PATIENCE', .3)
        begun = time.monotonic()
        assert known(shards(two/'*.tar')) == want and len(reads) == 2 and file.is_file()
        assert maker == 'killed' or time.monotonic()-begun > .3                    # it did wait
    finally:
        kid.kill()
        kid.wait()


# identity -----------------------------------------------------------------------------------------------------------------------------------------

def slow_fingerprint(ds, marks):
    h = hashlib.blake2b(digest_size=8)
    h.update(repr((len(ds), ds.classes, ds.size, ds.augment, ds.crop)).encode())
    for row in zip([*ds.keys], [*ds.labels], marks, strict=True): h.update(repr(row).encode())
    return h.hexdigest()


@pytest.mark.parametrize('small', [True, False])
def test_fingerprints_are_of_names_classes_and_stamps(two, tmp_path, monkeypatch, small):
    sets.make_files(tmp_path/'f', 30, 3)
    if not small: monkeypatch.setattr(data._FileStamps, '__init__', lambda self, pieces: self.__dict__.update(_small=False))
    for ds in (folder(tmp_path/'f', size=8), shards(two/'*.tar', size=8)):
        def mark(path, offset, length):
            s, f = os.stat(path), Path(path).read_bytes()
            if small: return hashlib.blake2b(f if length is None else f[offset:offset+length], digest_size=8).hexdigest()
            return f'{s.st_size}-{s.st_mtime_ns}' + ('' if length is None else f'-{offset}-{length}')
        marks = [mark(*p) for p in ds.pieces[:40]] + stamps(ds)[40:]
        part, inner = Subset(ds, [5, 2, 9]), Subset(Subset(ds, range(20, 0, -1)), [3, 1])
        assert stamps(ds) == marks and fingerprint(ds) == slow_fingerprint(ds, marks)
        assert stamps(part) == [marks[i] for i in (5, 2, 9)] and fingerprint(part) == slow_fingerprint(part, stamps(part))
        assert stamps(inner) == [marks[i] for i in (17, 19)] and inner.keys == [ds.keys[i] for i in (17, 19)]


def test_a_shard_is_looked_at_once_for_all_its_images(two, monkeypatch):
    ds = shards(two/'*.tar')
    monkeypatch.setattr(data._FileStamps, '__init__', lambda self, pieces: self.__dict__.update(_small=False))
    looked, real = [], os.stat
    monkeypatch.setattr(os, 'stat', lambda *a, **k: (looked.append(a), real(*a, **k))[1])
    assert len(stamps(ds)) == 1200 and len(looked) == 2
    stamps(take(ds, 10))
    assert len(looked) == 4


@pytest.mark.parametrize('small', [True, False])
def test_both_fingerprints_take_one_walk(two, tmp_path, monkeypatch, small):
    "A training asked for the one with times and the one without, and read every file twice."
    sets.make_files(tmp_path/'f', 80, 3)
    seen, real = Counter(), (open, os.stat)
    monkeypatch.setattr('builtins.open', lambda *a, **k: (seen.update(opened=1), real[0](*a, **k))[1])
    monkeypatch.setattr(os, 'stat', lambda *a, **k: (seen.update(looked=1), real[1](*a, **k))[1])
    def cost(f, *a): return seen.clear() or (f(*a), Counter(seen))
    if not small: monkeypatch.setattr(data._FileStamps, '__init__', lambda self, pieces: self.__dict__.update(_small=False))
    for ds in (folder(tmp_path/'f', size=8), Subset(folder(tmp_path/'f', size=8), range(70)), shards(two/'*.tar', size=8)):
        for warm in (fingerprint, lambda ds: [ds.batch([i]) for i in spread(64, len(ds))]): warm(ds)       # modules are opened, too
        was, once = cost(fingerprint, ds)
        _, pixels = cost(lambda ds: [ds.batch([i]) for i in spread(64, len(ds))], ds)
        identity, both = cost(run_identity, None, loader(ds, 4))
        assert both == once + pixels and (once['opened'] == len(ds) if small else both['opened'] == pixels['opened'])
        assert [identity[k] for k in ('data', 'sample')] == fingerprints(ds, True, False) == [was, fingerprint(ds, False)] and was != identity['sample']


# bytes on the way -----------------------------------------------------------------------------------------------------------------------------------

def picture(i, w=50, h=37): return Image.fromarray(np.random.default_rng(i).integers(0, 256, (h, w, 3), dtype=np.uint8))


@pytest.fixture(scope='module')
def every(tmp_path_factory):
    root = tmp_path_factory.mktemp('every')
    for i in range(8):
        (root/'f'/f'c{i % 2}').mkdir(parents=True, exist_ok=True)
        picture(i).save(root/'f'/f'c{i % 2}'/f'{i}.png')
    files = sorted((root/'f').rglob('*.png'))
    make_tar(root/'a.tar', [(f'{i}.png', p.read_bytes()) for i, p in enumerate(files)])
    world, grey = World(16, seed=3, size=20), torch.arange(256.).view(1, 1, 16, 16).expand(2, 3, -1, -1)/127.5-1
    pics, wild = folder(root/'f', size=32), folder(root/'f', size=32, augment=True)
    return {**{f'folder, {c}': folder(root/'f', size=32, crop=c) for c in images.CROPS}, 'augmented': wild, 'shards': shards(root/'a.tar', size=24),
            'augmented shards': shards(root/'a.tar', size=16, augment=True), 'list': as_dataset([picture(i) for i in range(5)], size=16), 'world': world,
            'large world': World(40, size=64), 'tensors': TensorSet(world.batch(range(8))['image']), 'greys': TensorSet(grey),
            'part': Subset(pics, [3, 1, 2]), 'part of a world': Subset(world, [5, 2, 9]), 'augmented part': Subset(wild, [3, 1, 2])}


def test_bytes_are_the_same_images(every):
    for name, ds in every.items():
        at = [*range(len(ds))][::-1]
        for how in ({}, dict(epoch=2, seed=5)) if 'augmented' in name else ({},):
            x, u = ds.batch(at, **how), ds.batch(at, as_bytes=True, **how)
            assert u['image'].dtype == torch.uint8 and u['image'].is_contiguous() and x['image'].is_contiguous(), name
            assert torch.equal(u['image'].float()/127.5-1, x['image']) and x['key'] == u['key'] and torch.equal(x['label'], u['label']), name
    assert torch.equal(every['folder, centre'][3]['image'], every['folder, centre'].batch([3])['image'][0])


@pytest.mark.parametrize('x', [torch.rand(2, 3, 8, 8)*2-1, torch.full((2, 3, 8, 8), 1.5), torch.ones(2, 3, 8, 8).double(), torch.full((1, 3, 8, 8), .01)])
def test_images_that_are_no_bytes_stay_what_they_are(x):
    got = TensorSet(x).batch([0], as_bytes=True)['image']
    assert got.dtype == x.dtype and torch.equal(got, x[:1])


# crops and flips --------------------------------------------------------------------------------------------------------------------------------------

def test_a_crop_belongs_to_an_image_in_an_epoch(every):
    ds, seen = every['augmented'], []
    for epoch, seed in itertools.product(range(3), range(3)):
        b = ds.batch([6, 0, 3, 3], epoch=epoch, seed=seed)['image']
        u = Draws(seed, [3]).uniform(f'crop/{epoch}', (4,))[0].tolist()
        want = to_tensor(random_crop_flip(ds.read(3), 32, images.GivenUniforms(u)))
        assert torch.equal(b[2], want) and torch.equal(b[3], want) and torch.equal(ds.image(3, epoch, seed), want)
        for other in (ds.batch([3, 7], epoch=epoch, seed=seed), Subset(ds, [3]).batch([0], epoch=epoch, seed=seed)): assert torch.equal(other['image'][0], want)
        seen += [x.sum().item() for x in b[:3]]
    assert len({*seen}) == 27


class Canvas:
    "A picture of 400 x 300 that keeps what is done to it."
    width, height, size = 400, 300, (400, 300)
    def __init__(self): self.box, self.turned = None, 0
    def crop(self, box): self.box = box; return self
    def resize(self, size, how): return self
    def transpose(self, how): self.turned = 1; return self


def test_crops_are_drawn_as_they_always_were():
    n, rows = 20_000, []
    for u in Draws(0, range(n)).uniform('crop/0', (4,)).tolist():
        random_crop_flip(c := Canvas(), 32, images.GivenUniforms(u))
        left, top, right, bottom = c.box
        assert right-left == bottom-top and 0 <= left and 0 <= top and right <= 400 and bottom <= 300
        rows.append((right-left, left/(400-right+left), top/max(1, 300-bottom+top), c.turned))
    side, left, top, turned = np.array(rows).T
    assert side.min() == 150 and side.max() == 299 and abs(side.mean()-224.5) < 1.6 and abs(np.std(side)-150/12**.5) < 1     # whole pixels of U(150, 300)
    for x in (left, top):                                                          # narrow ranges of whole pixels round
        assert abs(x[side < 250].mean()-.5) < .012 and abs(np.std(x[side < 250])-12**-.5) < .01 and x.min() == 0 and x.max() == 1
    assert abs(turned.mean()-.5) < .018 and abs(np.corrcoef(np.array(rows).T)-np.eye(4)).max() < .03
    random_crop_flip(c := Canvas(), 32, images.GivenUniforms([0, 1-2**-24, 1-2**-24, .5]))
    assert c.box == (250, 150, 400, 300) and not c.turned                          # the last place counts
    random_crop_flip(c := Canvas(), 32, images.GivenUniforms([1-2**-24, 0, 0, .49]))
    assert c.box == (0, 0, 299, 299) and c.turned


# the benchmark ------------------------------------------------------------------------------------------------------------------------------------------

def test_the_benchmark_measures_the_sets_that_it_makes(tmp_path):
    sets.make_files(tmp_path/'files', 30, 3)
    sets.make_shards(tmp_path/'shards', 80, 2, 4)
    files, tars = folder(tmp_path/'files', size=8), shards(tmp_path/'shards'/'*.tar', size=8)
    assert len(files) == 30 and files.batch([29])['image'].shape == (1, 3, 8, 8) and len(files.classes) == 3
    assert len(tars) == len({*tars.keys}) == 80 and tars.labels == [i % 4 for i in range(80)] and tars.batch([79])['image'].shape == (1, 3, 8, 8)
    rows = {k: [dict(cpu=2., wall=2., batch=1., fingerprint=1.)] for k in ('folder', 'ImageFolder', 'shards, first', 'shards, again')}
    for k in ('folder', 'shards'): rows[f'{k}, memory'] = [dict(bytes=50, peak=100, n=2)]
    got = sets.summary(rows)
    assert got['folder_over_ImageFolder'] == 1 and got['shards, memory'] == dict(bytes_per_image=25, peak_per_image=50) and got['shards, first']['cpu'] == 2
    row = sets.opened(Path(data.__file__).parent.parent, tmp_path/'home', 'shards', tmp_path)
    assert row['n'] == 80 and row['print'] == fingerprint(tars)
