"Fuzz cases: images in folders, and shards."
import io, os, random, socket, struct, tarfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from fuzz_tools import BAD_JSON, JUNK, TYPED, Case, Plain, cases, cut, encode, flat_png, flip, near, noise, picture, pictures, png, put, short
from vfmvae.images import open_image
from vfmvae.folders import folder, ImageSet, shards
from vfmvae.data import TensorSet
from vfmvae.latents import cache_latents
from vfmvae.recipes import decode_latents, open_data

LOSSLESS = {'png': dict(format='PNG'), 'bmp': dict(format='BMP'), 'ppm': dict(format='PPM'), 'tif': dict(format='TIFF'),
            'tiff': dict(format='TIFF', compression='tiff_lzw'), 'webp': dict(format='WEBP', lossless=True)}


def is_rgb(im: Any) -> bool: return im.mode == 'RGB' and min(im.size) >= 1 and im.width*im.height < 200_000_000

def shows(a: np.ndarray, tol: float = 0) -> Any:
    "Is the opened image this one?"
    return lambda im: im.mode == 'RGB' and near(np.asarray(im), a, tol)


# one file -----------------------------------------------------------------------------------------------------------------------------------------

@cases('images', 2)
def sound(rng: random.Random, box: Path) -> Case:
    ext, a = rng.choice(list(LOSSLESS)), picture(rng)
    p = put(box/f'a.{ext.upper() if rng.random() < .3 else ext}', encode(a, **LOSSLESS[ext]))
    return Case(ext, lambda: open_image(p), shows(a), control=True)

@cases('images')
def jpeg(rng: random.Random, box: Path) -> Case:
    a, how = picture(rng), rng.choice([dict(), dict(progressive=True), dict(subsampling=0), dict(optimize=True)])
    p = put(box/'a.jpg', encode(a, 'JPEG', quality=95, **how))
    return Case('JPEG', lambda: open_image(p), shows(a, 24), control=True)

@cases('images', 3)
def truncated(rng: random.Random, box: Path) -> Case:
    ext, a = rng.choice([*LOSSLESS, 'jpg']), picture(rng)
    b = encode(a, **LOSSLESS[ext]) if ext != 'jpg' else encode(a, 'JPEG', quality=95)
    p = put(box/f'a.{ext}', b[:-1] if rng.random() < .1 else cut(b, rng))
    return Case(ext, lambda: open_image(p), shows(a, 24 if ext == 'jpg' else 0), names=(p.name,))

@cases('images', 3)
def flipped(rng: random.Random, box: Path) -> Case:
    ext, a = rng.choice([*LOSSLESS, 'jpg']), picture(rng)
    b = encode(a, **LOSSLESS[ext]) if ext != 'jpg' else encode(a, 'JPEG', quality=95)
    p = put(box/f'a.{ext}', flip(b, rng, rng.choice([1, 1, 3]), rng.choice([None, 60])))
    return Case(ext, lambda: open_image(p), is_rgb, names=(p.name,))      # formats without a checksum cannot know

@cases('images')
def other_suffix(rng: random.Random, box: Path) -> Case:
    ext, a = rng.choice(list(LOSSLESS)), picture(rng)
    p = put(box/f"a.{rng.choice(['png', 'jpg', 'webp', 'ppm', 'tif', 'bmp'])}", encode(a, **LOSSLESS[ext]))
    return Case(ext, lambda: open_image(p), shows(a), control=True)

@cases('images', 3)
def other_format(rng: random.Random, box: Path) -> Case:
    format, a = rng.choice(['EPS', 'PDF', 'GIF', 'ICO', 'PCX', 'TGA', 'SGI', 'JPEG2000', 'IM', 'SPIDER', 'DIB', 'PSD',
                            'MPO', 'ICNS', 'WMF', 'XBM', 'AVIF', 'EPS', 'EPS']), picture(rng, 16, 16)
    if format == 'PSD': b = b'8BPS\0\1' + noise(80, rng)
    elif format == 'WMF': b = b'\xd7\xcd\xc6\x9a\0\0' + bytes(60)
    elif format == 'EPS' and rng.random() < .5:
        b = b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n%%EndComments\n20 20 moveto showpage\n%%EOF\n'
    elif format == 'XBM': b = encode(a[..., 0] > 99, 'XBM')
    elif format == 'SPIDER': b = encode(a[..., 0].astype(np.float32), 'SPIDER')
    else:
        try: b = encode(a, format)
        except (KeyError, OSError, ValueError): format, b = 'GIF', encode(a, 'GIF')
    p = put(box/'a.png', b)
    right = is_rgb if format in ('GIF', 'XBM', 'SPIDER', 'ICNS', 'ICO') else shows(a, 40)
    return Case(format, lambda: open_image(p), right, names=(p.name,))

@cases('images', 4)
def modes(rng: random.Random, box: Path) -> Case:
    h, w = rng.randint(9, 20), rng.randint(9, 20)
    a, g = picture(rng, h, w), np.random.default_rng(rng.randrange(2**31))
    grey, alpha, wide = a[..., 0], g.integers(0, 256, (h, w)).astype(np.uint8), g.integers(0, 65536,
            (h, w)).astype(np.uint16)
    three = lambda x: np.stack([x]*3, -1)
    over = lambda c, al: c*(al[..., None]/255) + 255*(1-al[..., None]/255)
    rows = lambda x: b''.join(b'\0'+r.astype('>u2').tobytes() for r in x)
    hole = int(wide[h//2, w//2])
    palette = Image.fromarray(a).quantize(16)
    at = int(np.asarray(palette)[0, 0])
    def save(im: Image.Image, format: str = 'PNG', **how: Any) -> bytes:
        f = io.BytesIO()
        im.save(f, format=format, **how)
        return f.getvalue()
    clear = np.asarray(palette.convert('RGB')).copy()
    clear[np.asarray(palette) == at] = 255
    ways: dict[str, tuple] = {
        'L': (encode(grey, 'PNG'), three(grey), 0),
        'LA': (save(Image.merge('LA', [Image.fromarray(grey), Image.fromarray(alpha)])), over(three(grey), alpha),
               1.01),
        'RGBA': (encode(np.dstack([a, alpha]), 'PNG'), over(a, alpha), 1.01),
        'P': (save(palette), np.asarray(palette.convert('RGB')), 0),
        'P with a transparent index': (save(palette, transparency=at), clear, 0),
        '1': (save(Image.fromarray(grey > 120)), three((grey > 120)*255), 0),
        '16 bit': (encode(wide, 'PNG'), three(np.round(wide/257)), 0), '16 bit TIFF': (encode(wide, 'TIFF'),
            three(np.round(wide/257)), 0),
        '16 bit with a transparent value': (png(h, w, rows(wide), 16, 0, ((b'tRNS', struct.pack('>H', hole)),)),
                                            three(np.where(wide == hole, 255, np.round(wide/257))), 0),
        '8 bit with a transparent value': (png(h, w, b''.join(b'\0'+r.tobytes() for r in grey), 8, 0,
                                               ((b'tRNS', struct.pack('>H', int(grey[1, 1]))),)),
                                           three(np.where(grey == grey[1, 1], 255, grey)), 0),
        '16 bit RGB': (png(h, w, rows(np.stack([wide]*3, -1).reshape(h, -1)), 16, 2), three(wide/257), 1.01),
        'CMYK TIFF': (save(Image.fromarray(a).convert('CMYK'), 'TIFF'), a, 3),
        'CMYK JPEG': (save(Image.fromarray(a).convert('CMYK'), 'JPEG', quality=100), a, 20),
        'int32 TIFF': (encode(grey.astype(np.int32), 'TIFF'), None, 0),
        'int32 beyond 16 bit': (encode(grey.astype(np.int32)*10**6, 'TIFF'), None, 0),
        'negative int32': (encode(-grey.astype(np.int32)-1, 'TIFF'), None, 0),
        'float TIFF': (encode(grey.astype(np.float32), 'TIFF'), None, 0),
        'float NaN': (encode(np.full((h, w), np.nan, np.float32), 'TIFF'), None, 0)}
    what = rng.choice(list(ways))
    b, want, tol = ways[what]
    p = put(box/('a.jpg' if 'JPEG' in what else 'a.tif' if 'TIFF' in what or want is None else 'a.png'), b)
    return Case(what, lambda: open_image(p), None if want is None else shows(want, tol), names=(p.name,),
                control=want is not None)

@cases('images', 2)
def turned(rng: random.Random, box: Path) -> Case:
    a = picture(rng, 12, 17)
    ways: dict[Any, Any] = {1: a, 2: a[:, ::-1], 3: a[::-1, ::-1], 4: a[::-1], 5: a.transpose(1, 0, 2),
                            6: a[::-1].transpose(1, 0, 2), 7: a[::-1, ::-1].transpose(1, 0, 2),
                            8: a[:, ::-1].transpose(1, 0, 2), 0: a, 9: a, 255: a}
    tag = rng.choice(list(ways))
    exif = Image.Exif()
    exif[0x112] = tag
    b, sound = exif.tobytes(), True
    if rng.random() < .3: b, sound = b'Exif\0\0' + flip(b[6:], rng, 3) if rng.random() < .5 else noise(60, rng), False
    ext = rng.choice(['png', 'jpg', 'webp'])
    p = put(box/f'a.{ext}', encode(a, **(LOSSLESS[ext] if ext != 'jpg' else dict(format='JPEG', quality=95)), exif=b))
    if sound:
        return Case('EXIF', lambda: open_image(p), shows(ways[tag], 24 if ext == 'jpg' else 0), control=True,
                    detail=f'{ext} {tag}')
    return Case('spoiled EXIF', lambda: open_image(p), is_rgb, names=(p.name,), detail=ext)

@cases('images', 2)
def sides(rng: random.Random, box: Path) -> Case:
    h, w = rng.choice([(1, 1), (7, 40), (8, 8), (1, 900), (8, 6000), (9, 30_000), (5, 5)])
    a = picture(rng, h, w)
    p = put(box/'a.png', encode(a, 'PNG'))
    if min(h, w) < 8: return Case('too small', lambda: open_image(p), None, names=(p.name,), detail=f'{h}x{w}')
    if rng.random() < .5: return Case('oblong', lambda: open_image(p), shows(a), control=True, detail=f'{h}x{w}')
    return Case('oblong, cropped', lambda: folder(box, size=16,
                                                  crop=rng.choice(['centre', 'adm', 'square']))[0]['image'],
                lambda x: x.shape == (3, 16, 16) and float(x.abs().max()) <= 1, names=(p.name,), detail=f'{h}x{w}')

@cases('images', 3)
def declared_huge(rng: random.Random, box: Path) -> Case:
    w, h = rng.choice([(60_000, 60_000), (2**31-1, 2**31-1), (13_000, 13_600), (30_000, 30_000), (10**9, 1),
                       (10**6, 10**6), (0, 0), (12, 0)])
    what = rng.choice(['png', 'bmp', 'ppm', 'tif', 'gif', 'webp', 'jpg', 'pgm'])
    if what == 'png': b = png(h % 2**32, w % 2**32, bytes(500))
    elif what == 'bmp':
        b = b'BM' + struct.pack('<IHHIIiiHHIIiiII', 600, 0, 0, 54, 40, w, h, 1, 24, 0, 500, 0, 0, 0, 0) + bytes(500)
    elif what in ('ppm', 'pgm'):
        b = f"P{6 if what == 'ppm' else 5} {w} {h} {rng.choice([255, 255, 65535, 0, 10**9])}\n".encode() + bytes(500)
    elif what == 'tif':
        tags = [(256, 4, w), (257, 4, h), (258, 3, 8), (259, 3, 1), (262, 3, 1), (273, 4, 8), (277, 3, 1),
                (278, 4, h), (279, 4, 100)]
        b = b'II*\0' + struct.pack('<I', 108) + bytes(100) + struct.pack('<H',
                len(tags)) + b''.join(struct.pack('<HHII', t, k, 1, v) for t, k, v in tags) + bytes(4)
    elif what == 'gif':
        b = b'GIF89a' + struct.pack('<HH', w % 65536,
                                    h % 65536) + b'\x80\0\0\0\0\0\xff\xff\xff,' + struct.pack('<HHHH', 0, 0,
                                            w % 65536, h % 65536) + b'\0\2\2D\1\0;'
    elif what == 'webp':
        b = b'RIFF' + struct.pack('<I', 40) + b'WEBPVP8X' + struct.pack('<I', 10) + bytes(4) + struct.pack('<I',
                w % 2**24)[:3] + struct.pack('<I', h % 2**24)[:3] + bytes(20)
    else:
        b = bytearray(encode(picture(rng), 'JPEG'))
        at = b.index(b'\xff\xc0')
        b[at+5:at+9] = struct.pack('>HH', h % 65536, w % 65536)
        b = bytes(b)
    p = put(box/f"a.{'ppm' if what == 'pgm' else 'png' if what == 'gif' else what}", b)
    call = rng.choice([lambda: open_image(p), lambda: folder(box, size=16, min_side=rng.choice([None, 4]))[0]])
    return Case(what, call, lambda r: min(w, h) > 0 and what == 'jpg', names=(p.name, str(box.name)), detail=f'{w}x{h}')

@cases('images')
def bomb(rng: random.Random, box: Path) -> Case:
    "Small files of many pixels, within what Pillow allows: in the smallest run one of them is opened."
    side, per, depth, colour, more = rng.choice([(13_000, 13_000*4, 8, 6, ()),
                                                 (13_300, 13_300, 8, 3, ((b'PLTE', bytes(30)), (b'tRNS', bytes(10)))),
                                                 (13_300, 13_300*2, 16, 0, ()), (13_300, 13_300*2, 8, 4, ()),
                                                 (13_300, 1663, 1, 0, ()), (30_000, 30_000*3, 8, 2, ())])
    if rng.random() < .6: side, per = side//8, -(-per//8)
    p = put(box/'a.png', flat_png(side, per, depth, colour, more))
    call = rng.choice([lambda: open_image(p).size, lambda: (folder(box, size=16, crop='adm')[0]['image'].shape[1:])])
    return Case('PNG', call, lambda s: tuple(s) in ((side, side), (16, 16)), names=(p.name,),
                detail=f'{side} px, {depth} bit, colour {colour}')

@cases('images', 2)
def no_file(rng: random.Random, box: Path) -> Case:
    "What is no file, under the name of a picture."
    pictures(box, rng, 2)
    p = box/'odd.png'
    def sock() -> None:
        s = socket.socket(socket.AF_UNIX)
        os.chdir(box)
        s.bind('odd.png')
        os.chdir(box.parent/'cwd')
    ways = dict(pipe=lambda: os.mkfifo(p), socket=sock, folder=p.mkdir, loop=lambda: p.symlink_to(p),
                dangling=lambda: p.symlink_to(box/'nothing'), zero=lambda: p.symlink_to('/dev/zero'),
                empty=lambda: p.touch(), text=lambda: p.write_text('hello'),
                unreadable=lambda: p.symlink_to('/proc/self/mem'),
                loop_of_folders=lambda: (box/'sub.png').symlink_to(box))
    what = rng.choice(list(ways))
    ways[what]()
    name = 'sub.png' if what == 'loop_of_folders' else 'odd.png'
    if rng.random() < .5: return Case(what, lambda: open_image(box/name), None, names=(name,))
    def read() -> Any:
        ds = folder(box, size=16, min_side=rng.choice([None, 8]))
        return len(ds), ds.batch(range(len(ds)))['image']
    return Case(f'{what} in a folder', read, lambda r: r[0] == 2 and r[1].shape == (2, 3, 16, 16),
                names=(name, box.name))

@cases('images', 2)
def names_of_files(rng: random.Random, box: Path) -> Case:
    a, name = picture(rng, 16, 16), rng.choice([b'a\nb', 'ü'.encode(), b'\xff\xfe', b' ', b'%s{0}', b"'", b'$(x)',
                                                'e\u0301\u202e'.encode(), b'x'*240, b'a\rb', b'-rf', b'.a'])
    path = os.fsencode(box)+b'/'+name+b'.png'
    sound = rng.random() < .5
    Path(os.fsdecode(path)).write_bytes(encode(a, 'PNG')[:None if sound else 60])
    def read() -> Any:
        ds = folder(box, size=16)
        return ds.keys, ds[0]['image']
    if name == b'.a': return Case('hidden', read, None, names=(box.name,))
    return Case('sound' if sound else 'cut', read, lambda r: len(r[0]) == 1 and near(r[1].numpy(),
            a.transpose(2, 0, 1)/127.5-1, 1e-5), control=sound, detail=repr(name[:20]))

@cases('images')
def no_path(rng: random.Random, box: Path) -> Case:
    p = rng.choice([box/'nothing.png', box/('x'*300+'.png'), box/'a\0b.png', Path('nothing.png'), box,
                    box/'nothing'/'a.png', ''])
    call, what = rng.choice([(open_image, 'open_image'), (folder, 'folder'), (open_data, 'open_data')])
    if p == box: put(box/'notes.txt', b'hello')
    return Case(what, lambda: call(p), None, names=('nothing', 'xxx', 'a\\x00b', 'in', 'path', 'folder'),
                detail=short(p)[-30:])

# a folder -----------------------------------------------------------------------------------------------------------------------------------------

@cases('images', 3)
def folder_options(rng: random.Random, box: Path) -> Case:
    made = pictures(box, rng, 3)
    key, v = rng.choice(['size', 'crop', 'min_side', 'augment']), rng.choice(JUNK+TYPED)
    def read() -> Any:
        ds = folder(box, **{'size': 16, key: v})
        return ds, ds.batch(range(len(ds)))['image']
    def right(r: Any) -> bool:
        if key == 'augment': return r[1].shape == (3, 3, 16, 16)      # truth, as Python has it
        if key == 'size': return type(v) is int and r[1].shape == (3, 3, v, v)
        return (key == 'min_side' and (v is None or type(v) is int and 0 <= v <= 16)) and near(r[1][0].numpy(),
                made[0].transpose(2, 0, 1)/127.5-1, 1e-5)
    return Case(key, read, right, names=(key, f'{v!r}'[:20], 'in'), detail=f'{key}={short(v)}')

@cases('images', 2)
def classes_of_folders(rng: random.Random, box: Path) -> Case:
    names = rng.sample(['b', 'a', 'Z', 'ü', 'a b', '10', '9', '.h'], 3)
    for n in names: pictures(box/n, rng, 2)
    twist = rng.choice(['none', 'link', 'empty class', 'link of a file', 'beside', 'nested', 'train and val'])
    if twist == 'link': (box/'linked').symlink_to(box/names[0])
    if twist == 'empty class': (box/'empty').mkdir()
    if twist == 'link of a file': (box/names[0]/'l.png').symlink_to(box/names[0]/'0.png')
    if twist == 'beside': pictures(box, rng, 1)
    if twist == 'nested': pictures(box/names[0]/'deeper'/'still', rng, 1)
    if twist == 'train and val':
        for n in names: (box/'train').mkdir(exist_ok=True); (box/n).rename(box/'train'/n)
        pictures(box/'val'/'a', rng, 1)
    seen = sorted(n for n in names if n != '.h')
    want = sorted([*seen, 'linked']) if twist == 'link' else seen      # a link is read, also to a hidden folder
    count = 2*len(want) + (twist in ('nested', 'link of a file') and names[0] != '.h')
    def right(ds: Any) -> bool:
        if twist in ('beside', 'train and val'): return False
        told = [ds.classes[k] for k in ds.labels]
        return len(ds) == count and sorted(c for c in ds.classes if c != 'empty') in (want,
                seen) and all(k.split('/')[0] == c for k, c in zip(ds.keys, told, strict=True))
    return Case(twist, lambda: folder(box, size=16), right, names=('in', *names, 'val', 'linked', '.png'),
                control=twist in ('none', 'nested'))


# shards -------------------------------------------------------------------------------------------------------------------------------------------

def member(name: str, b: bytes = b'', **more: Any) -> tuple[tarfile.TarInfo, bytes]:
    t = tarfile.TarInfo(name)
    t.size = len(b)
    for k, v in more.items(): setattr(t, k, v)
    return t, b

def tar(path: Path, members: list, format: int = tarfile.USTAR_FORMAT, mode: str = 'w', **how: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode, format=format, **how) as t:
        for info, b in members: t.addfile(info, io.BytesIO(b) if b else None)
    return path

def rows(rng: random.Random, n: int = 3, label: Any = lambda i: str(i % 2), ext: str = 'png') -> tuple[list,
        list[np.ndarray]]:
    made = [picture(rng, 16, 16) for _ in range(n)]
    out = []
    for i, a in enumerate(made):
        out.append(member(f'{i:04d}.{ext}', encode(a, 'PNG')))
        if label is not None: out.append(member(f'{i:04d}.cls', str(label(i)).encode()))
    return out, made

def reads(pattern: Any, **how: Any) -> Any:
    def call() -> Any:
        ds = shards(pattern, size=16, **how)
        return ds, ds.batch(range(len(ds)))
    return call

def holds(made: list[np.ndarray], labels: list | None = None) -> Any:
    "Are these the pictures in this order, and these the names of their classes?"
    def right(r: Any) -> bool:
        ds, b = r
        if len(ds) != len(made) or len(set(ds.keys)) != len(ds): return False
        if not near(b['image'].numpy(), np.stack(made).transpose(0, 3, 1, 2)/127.5-1, 1e-5): return False
        def plain(v: Any) -> str: return str(int(v)) if str(v).isascii() and str(v).isdigit() else str(v)
        return labels is None or [plain(ds.classes[int(k)]) for k in b['label']] == [plain(v) for v in labels]
    return right

@cases('shards', 2)
def sound_shard(rng: random.Random, box: Path) -> Case:
    m, made = rows(rng, 4)
    what = rng.choice(['ustar', 'gnu', 'pax', 'folders', 'upper case', 'other members', 'two shards',
                       'labels with line ends'])
    if what == 'folders': m = [member('d/', type=tarfile.DIRTYPE), *[member('d/'+t.name, b) for t, b in m]]
    if what == 'upper case': m, made = rows(rng, 4, ext='PNG')
    if what == 'other members': m = [member('README', b'x'), *m, member('0000.json', b'{}'), member('0000.txt', b'x')]
    if what == 'labels with line ends':
        m = [member(t.name, b+b'\n') if t.name.endswith('.cls') else (t, b) for t, b in m]
    format = dict(gnu=tarfile.GNU_FORMAT, pax=tarfile.PAX_FORMAT).get(what, tarfile.USTAR_FORMAT)
    if what == 'pax': m[0][0].pax_headers = {'comment': 'é'*50, 'mtime': '1.5'}
    p: Any = tar(box/'a-000.tar', m, format)
    if what == 'two shards':
        more, made2 = rows(rng, 3)
        tar(box/'a-001.tar', [member('b'+t.name, b) for t, b in more])
        made, p = made+made2, rng.choice([box/'a-{000..001}.tar', box/'a-*.tar', [box/'a-000.tar', box/'a-001.tar']])
        return Case(what, reads(p), holds(made, [0, 1, 0, 1, 0, 1, 0]), control=True)
    return Case(what, reads(p), holds(made, [0, 1, 0, 1]), control=True)

@cases('shards', 3)
def spoiled_bytes(rng: random.Random, box: Path) -> Case:
    m, made = rows(rng, 3)
    p = tar(box/'a.tar', m)
    b = p.read_bytes()
    what = rng.choice(['cut', 'cut at a block', 'no end', 'empty', 'noise', 'flips', 'trailing noise', 'html', 'zeros'])
    put(p, {'cut': lambda: cut(b, rng), 'cut at a block': lambda: b[:512*rng.randrange(1, len(b)//512)],
            'no end': lambda: b.rstrip(b'\0'), 'empty': lambda: b'', 'noise': lambda: noise(5000, rng),
            'flips': lambda: flip(b, rng, 2), 'trailing noise': lambda: b+noise(600, rng),
            'html': lambda: b'<html>'*99, 'zeros': lambda: bytes(10240)}[what]())
    # bits of a key, a date or an owner are data; those of a PNG have a checksum
    right = (lambda r: len(r[0]) <= 3) if what == 'flips' else holds(made)
    return Case(what, reads(p), right if what not in ('empty', 'zeros') else None, names=(p.name,))

@cases('shards')
def compressed(rng: random.Random, box: Path) -> Case:
    m, _ = rows(rng)
    how = rng.choice(['gz', 'bz2', 'xz'])
    p = tar(box/'a.tar', m, mode=f'w:{how}')
    return Case(how, reads(p), None, names=(p.name,))

@cases('shards', 4)
def names_that_leave(rng: random.Random, box: Path) -> Case:
    "Keys that point outside: pictures are never written there, neither by decoding."
    m, made = rows(rng, 3, rng.choice([None, lambda i: i]))
    bad = rng.choice([f'../../{rng.randrange(99)}escaped', str(box.parent/'elsewhere'/'x'), '../x', 'a/../../../x',
                      './../../x', 'x/../../in/../y', '~/x', 'C:\\x', f'{box.parent}/in/../y',
                      'a\nb', 'ok/inner', './here', 'é', 'x'*240, 'd/'+'y'*251, 'a/'*60+'z'])
    name = rng.choice(['0001', '0002'])
    m = [member(t.name.replace(name, bad), b) for t, b in m]
    p = tar(box/'a.tar', m, tarfile.PAX_FORMAT)
    out = box.parent/'out'
    def call() -> Any:
        ds = shards(p, size=16)
        latents = cache_latents(Plain(), ds, box.parent/'latents')
        return decode_latents(Plain(), latents, out)
    def right(files: Any) -> bool:
        there = [f for f in out.rglob('*') if f.is_file()]
        return len({Path(f).resolve()
                    for f in files}) == 3 == len(there) and all(Path(f).resolve().is_relative_to(out) for f in files)
    return Case('decode', call, right, names=('a.tar', bad.split('/')[-1][:20], 'latents',
                                              repr(bad)[1:9]), out=(out, *latent_files(box)), detail=short(bad))

def latent_files(box: Path) -> tuple: return (box.parent/'latents',)

@cases('shards', 2)
def names_in_the_header(rng: random.Random, box: Path) -> Case:
    import json
    from safetensors import safe_open
    from safetensors.torch import save_file
    names: Any = rng.choice([['../../a', 'b', 'c'], [f'{box}/../a', 'b', 'c'], [str(box.parent/'else'/'a'), 'b', 'c'],
                             ['a', 'a', 'b'], ['a.jpg', 'a.png', 'b'], ['a'], ['a', 'b', 'c', 'd'], [1, 2, 3],
                             [None, 'a', 'b'],
                            'abc', {'a': 1}, 7, ['', 'a', 'b'], ['a\0', 'b', 'c'], [['a'], 'b', 'c'],
                             ['a', 'a/b', 'c'], ['.', 'b', 'c'], ['a/', 'b', 'c'], ['a', 'b', 'c'],
                             ['x'*300, 'b', 'c'], ['a\nb', 'c', 'd'], ['A', 'a', 'b']])
    made, out = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))*2-1, box.parent/'out'
    p = cache_latents(Plain(), TensorSet(made), box/'latents').dir/'shard-00000.safetensors'
    with safe_open(p, 'pt') as s: tensors, head = {k: s.get_tensor(k).clone() for k in s.keys()}, s.metadata()  # noqa: SIM118
    p.unlink()
    save_file(tensors, p, dict(about=json.dumps(json.loads(head['about']) | dict(names=names))))
    def right(files: Any) -> bool:
        return len({Path(f).resolve() for f in files}) == 3 == sum(f.is_file()
                                                                   for f in out.rglob('*')) and all(Path(f).resolve().is_relative_to(out) for f in files)
    return Case('names', lambda: decode_latents(Plain(), box/'latents', out), right, names=(p.name, 'latents', 'name'),
                out=(out,), control=names == ['a', 'b', 'c'], detail=short(names))

@cases('shards', 3)
def odd_members(rng: random.Random, box: Path) -> Case:
    m, made = rows(rng, 3)
    first = m[0][1]
    what = rng.choice(['twice', 'two pictures of a key', 'hard link', 'symbolic link', 'link to a file outside',
                       'pipe', 'device', 'folder named png', 'no size', 'picture without label',
                       'label without picture',
                       'empty name', 'dotted key', 'label twice', 'two pictures and other names', 'sparse'])
    if what == 'twice': m = [*m, m[0]]
    if what == 'two pictures of a key': m = [*m, member('0000.jpg', encode(made[1], 'JPEG'))]
    if what == 'label twice': m = [*m, member('0000.cls', b'7')]
    if what in ('hard link', 'symbolic link'):
        m = [*m, member('l.png', type=tarfile.LNKTYPE if 'hard' in what else tarfile.SYMTYPE, linkname='0000.png'),
             member('l.cls', b'1')]
    if what == 'link to a file outside': m = [*m, member('l.png', type=tarfile.SYMTYPE, linkname='/etc/passwd')]
    if what == 'pipe': m = [*m, member('l.png', type=tarfile.FIFOTYPE)]
    if what == 'device': m = [*m, member('l.png', type=tarfile.CHRTYPE, devmajor=1, devminor=5)]
    if what == 'folder named png': m = [*m, member('l.png', type=tarfile.DIRTYPE)]
    if what == 'no size': m[0] = member('0000.png', b'')
    if what == 'picture without label': m = m[:-1]
    if what == 'label without picture': m = [t for t in m if t[0].name != '0001.png']
    if what == 'empty name': m = [*m, member('.png', first), member('.cls', b'1')]
    if what == 'dotted key':
        m = [*m, member('b.seg.png', first)]      # the key ends at the first dot: another kind of member
    if what == 'two pictures and other names': m = [*m, member('0000.seg.png', first), member('0000.depth.png', first)]
    p = tar(box/'a.tar', m, tarfile.GNU_FORMAT)
    if what == 'sparse':
        b = bytearray(p.read_bytes())
        b[156:157] = b'S'
        b[148:156] = b'%06o\0 ' % (sum(b[:148])+sum(b[156:512])+8*32)
        p.write_bytes(bytes(b))
    ignored = what in ('symbolic link', 'hard link', 'link to a file outside', 'pipe', 'device', 'folder named png',
                       'two pictures and other names', 'dotted key')
    # what is left out is counted and said
    said = what in ('label without picture', 'sparse', 'empty name')
    right = holds(made, [0, 1, 0]) if ignored else (lambda r: len(r[0]) in (2, 3) and bool(r[0].skipped)) if said else None
    return Case(what, reads(p), right, names=(p.name, 'classes of'))

@cases('shards', 3)
def labels(rng: random.Random, box: Path) -> Case:
    bad = rng.choice(['1000000000', '-3', '1_000', ' 1 ', '', 'cat', '1.0', '1e3', '9'*5000, '٣', '0x10', '1\n2',
                      'NaN', '\xff', '+1', '007', 'a'*2000, '99', '1', '-0'])
    m, made = rows(rng, 3, lambda i: bad if i == 1 else i % 2)
    if bad == '\xff': m = [(t, b'\xff\xfe') if b == '\xff'.encode() else (t, b) for t, b in m]
    for t, b in m: t.size = len(b)
    p = tar(box/'a.tar', m)
    plain = {' 1 ': '1', '+1': '1', '007': '7', '-0': '0'}.get(bad, bad)
    return Case('one label', reads(p), holds(made, [0, plain, 0]), names=(p.name, 'classes of'),
                control=bad in ('1', ' 1 '), detail=short(bad))

@cases('shards', 2)
def headers(rng: random.Random, box: Path) -> Case:
    "Sizes that lie, in the ways of tar."
    m, made = rows(rng, 3)
    p = tar(box/'a.tar', m, tarfile.GNU_FORMAT)
    b = bytearray(p.read_bytes())
    what = rng.choice(['base 256', 'base 256 huge', 'negative', 'octal junk', 'huge', 'pax size', 'pax path',
                       'pax huge', 'pax junk', 'gnu long name', 'pax of numbers'])
    def size(field: bytes) -> None:
        b[124:136] = field
        b[148:156] = b'%06o\0 ' % (sum(b[:148])+sum(b[156:512])+8*32)
    true = m[0][0].size
    if what == 'base 256': size(b'\x80' + true.to_bytes(11, 'big'))
    if what == 'base 256 huge': size(b'\x80' + rng.choice([2**63, 2**40, 10**15]).to_bytes(11, 'big'))
    if what == 'negative': size(b'\xff'*11 + bytes([rng.randrange(256)]))
    if what == 'octal junk': size(rng.choice([b'zzzzzzzzzzz\0', b'            ', b'-0000000001\0', b'99999999999\0']))
    if what == 'huge': size(b'77777777777\0')
    pax = {'pax size': {'size': str(rng.choice([-1, 10**18, 1]))}, 'pax path': {'path': '../../escaped.png'},
           'pax huge': {'comment': 'x'*3_000_000}, 'pax of numbers': {'size': 'abc', 'mtime': 'nan'},
           'pax junk': {'path': 'a\udcff.png'}}.get(what)
    if pax is not None:
        m[0][0].pax_headers = pax
        b = bytearray(tar(p, m, tarfile.PAX_FORMAT).read_bytes())
        if 'size' in pax: b = bytearray(tar(p, m, tarfile.PAX_FORMAT).read_bytes())
    if what == 'gnu long name':
        b = bytearray(tar(p, [member('x'*200_000+'.png', m[0][1]), *m[1:]], tarfile.GNU_FORMAT).read_bytes())
    p.write_bytes(bytes(b))
    return Case(what, reads(p), holds(made), names=(p.name, '.tar'), control=what == 'base 256')

@cases('shards', 3)
def patterns(rng: random.Random, box: Path) -> Case:
    m, made = rows(rng, 3)
    tar(box/'a-0.tar', m)
    pattern: Any = rng.choice(['a-{0..99999999}.tar', 'a-{0..999999999999999999}.tar', 'a-{5..2}.tar', 'a-{0..0}.tar',
                               'a-{a..b}.tar', 'b-*.tar', 'a-?.tar', 'a-[0].tar', 'a-{0..1}.tar',
                               'a-{0..9}{0..9}{0..9}{0..9}{0..9}{0..9}{0..9}.tar',
                               '', '*', 'a-{0.tar', 'a-{-1..0}.tar', 'nothing.tar', 'a-\0.tar',
                               'x'*300+'.tar'])
    given: Any = str(box/pattern) if pattern else ''
    what = 'text'
    if rng.random() < .2:
        what, given = rng.choice([('empty list', []), ('folder', box), ('list of a folder', [box]),
                                  ('list of nothing', [''])])
        pattern = short(given)
    good = pattern in ('a-{0..0}.tar', 'a-?.tar', 'a-[0].tar')
    return Case(what, reads(given), holds(made, [0, 1, 0]) if good or pattern in ('*',) else None, control=good,
                names=('tar', 'shard', 'None', '7'), detail=str(pattern)[:40])

@cases('shards')
def no_shard(rng: random.Random, box: Path) -> Case:
    p = box/'a.tar'
    ways = dict(folder=p.mkdir, pipe=lambda: os.mkfifo(p), loop=lambda: p.symlink_to(p), missing=lambda: None,
                zero=lambda: p.symlink_to('/dev/zero'), unreadable=lambda: p.symlink_to('/proc/self/mem'))
    what = rng.choice(list(ways))
    ways[what]()
    call = rng.choice([reads(p), lambda: open_data(p)])
    return Case(what, call, None, names=(p.name,))

@cases('shards')
def two_shards(rng: random.Random, box: Path) -> Case:
    "Sets of shards that do not go together."
    (m, a), (m2, a2) = rows(rng, 3), rows(rng, 3, None)
    what = rng.choice(['half labelled', 'same keys', 'same file twice', 'one empty', 'one cut'])
    if what in ('same keys', 'one cut'): m2, a2 = rows(rng, 3)
    other = [member('b'+t.name, b) for t,
             b in m2] if what == 'half labelled' else m if what == 'same file twice' else [] if what == 'one empty' else m2
    tar(box/'0.tar', m)
    q = tar(box/'1.tar', other)
    if what == 'one cut': put(q, cut(q.read_bytes(), rng))
    out = box.parent/'out'
    if what == 'same keys':
        def call() -> Any:
            ds = shards(str(box/'{0..1}.tar'), size=16)
            return decode_latents(Plain(), cache_latents(Plain(), ds, box.parent/'latents'), out)
        return Case(what, call, lambda files: len(set(files)) == 6 == sum(f.is_file() for f in out.rglob('*')),
                    names=('.tar', 'latents', '0000'), out=(out, *latent_files(box)))
    right = holds(a, [0, 1, 0]) if what == 'one empty' else holds(a+a,
                                                                  [0, 1,
                                                                   0]*2) if what == 'same file twice' else holds(a+a2) if what == 'one cut' else None
    return Case(what, reads(str(box/'{0..1}.tar')), right, names=('.tar', 'classes of'))

@cases('shards')
def sidecars(rng: random.Random, box: Path) -> Case:
    "A classes.json beside shards is read, once the library does so; a spoiled one is one line."
    m, made = rows(rng, 4)
    p = tar(box/'a.tar', m)
    what = rng.choice([*BAD_JSON, 'good', 'short', 'numbers', 'twice'])
    put(box/'classes.json', BAD_JSON.get(what) or {'good': b'["cat", "dog"]', 'short': b'["cat"]',
                                                   'numbers': b'[1, 2]', 'twice': b'["a", "a"]'}.get(what, b''))
    def right(r: Any) -> bool: return holds(made)(r) and list(map(str, r[0].classes)) in (['0', '1'], ['cat', 'dog'])
    return Case(what, reads(p), right, names=('classes.json', p.name))

@cases('shards')
def adapters(rng: random.Random, box: Path) -> Case:
    "Lists of pictures, arrays, paths and tensors through the one adapter, where there is one."
    import vfmvae.data as data
    make = getattr(data, 'as_dataset', None)
    a = [picture(rng, 16, 16) for _ in range(3)]
    pictures(box, rng, 3)
    ways: dict[str, tuple] = {'PIL': ([Image.fromarray(x) for x in a], True), 'arrays': (a, True),
                              'NaN': (torch.full((2, 3, 16, 16), float('nan')), False),
                              'uint8': (torch.zeros(2, 3, 16, 16).byte(), False),
                              'empty': ([], False), 'None': (None, False), 'mixed': ([a[0], 'x'], False),
                              'number': (7, False), 'floats': ([x/255. for x in a], False),
                              'missing': ([box/'nothing.png'], False),
                              'pairs': ([(Image.fromarray(x), i) for i, x in enumerate(a)], True),
                              'far outside': (torch.full((2, 3, 16, 16), 99.), False),
                              'one channel': (torch.zeros(2, 1, 16, 16), False)}
    what = rng.choice(list(ways))
    given, good = ways[what]
    if make is None: return Case('not there yet', lambda: folder(box, size=16), lambda ds: isinstance(ds, ImageSet))
    def call() -> Any:
        ds = make(given, size=16)
        return ds.batch(range(len(ds)))['image']
    return Case(what, call, (lambda x: near(x.numpy(), np.stack(a).transpose(0, 3, 1, 2)/127.5-1, 1e-5)) if good
                else None, control=good)
