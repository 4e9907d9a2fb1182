"""How fast do sets of ImageNet's size open, and what do they hold in memory? 200,000 files in class folders beside torchvision's ImageFolder, and
1.28 million images in 128 shards, for the first time and again; each in a process of its own, in turns. A number is the median of the turns.

    python benchmarks/sets.py                            # about ten minutes and 4 GB in the temporary folder; writes data/results/sets.json
    python benchmarks/sets.py --before ../before         # another tree of the library in the same turns
"""
import argparse, io, json, os, subprocess, sys, tarfile, tempfile
from pathlib import Path
from PIL import Image

OPEN = '''
import json, os, sys, time, tracemalloc
what, root, traced = sys.argv[1], sys.argv[2], sys.argv[3] == 'memory'
from vfmvae.folders import folder, shards
from vfmvae.data import fingerprint, loader
from torchvision.datasets import ImageFolder
calls = dict(ImageFolder=lambda: ImageFolder(root+'/files'), folder=lambda: folder(root+'/files', size=8),
             shards=lambda: shards(root+'/shards/*.tar', size=8))
if traced: tracemalloc.start()
t, clock = time.process_time(), time.time()
ds = calls[what]()
row = dict(cpu=time.process_time()-t, wall=time.time()-clock, n=len(ds))
if traced: row.update(zip(('bytes', 'peak'), tracemalloc.get_traced_memory()))
elif what != 'ImageFolder':
    t = time.process_time()
    loader(ds, 64).batch_at(0)
    row['batch'] = time.process_time()-t
    t = time.process_time()
    row['print'], row['fingerprint'] = fingerprint(ds), time.process_time()-t
print(json.dumps(row))
'''


def picture(form):
    Image.new('RGB', (8, 8), (90, 120, 40)).save(b := io.BytesIO(), form)
    return b.getvalue()


def make_files(root, n, classes=1000):
    "Images of 8 x 8 in class folders, all with the same bytes."
    data = picture('png')
    for k in range(min(classes, n)):
        (at := root/f'n{k:08d}').mkdir(parents=True)
        for i in range(k, n, classes): (at/f'n{k:08d}_{i}.png').write_bytes(data)


def member(name, data):
    "The blocks of a member in the way of webdataset: a tar with the ownership of somebody, its name and size filled in later."
    info = tarfile.TarInfo(name)
    info.size, info.mode, info.uname, info.gname, info.mtime = len(data), 0o444, 'bigdata', 'bigdata', 1_600_000_000
    return info.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % 512)


def renamed(block, name):
    "The same member under another name of equal length: the header's checksum is mended, which is ten times faster than to make it anew."
    told = int(block[148:154], 8) + sum(name)-sum(block[:len(name)])
    return name + block[len(name):148] + b'%06o' % told + block[154:]


def make_shards(root, n, parts, classes=1000):
    "Pairs of key.jpg and key.cls."
    root.mkdir(parents=True)
    data, labels = picture('jpeg'), [member('0'*20+'.cls', str(k).encode()) for k in range(classes)]
    image = member('0'*20+'.jpg', data)
    for s in range(parts):
        with open(root/f'train-{s:06d}.tar', 'wb') as f:
            for i in range(s*n//parts, (s+1)*n//parts):
                key = b'n%08d_%010d' % (i % classes, i)
                f.write(renamed(image, key+b'.jpg') + renamed(labels[i % classes], key+b'.cls'))
            f.write(bytes(1024))


def opened(tree, home, what, root, kind='time'):
    env = dict(os.environ, PYTHONPATH=str(Path(tree).resolve()), OMP_NUM_THREADS='1', VFMVAE_HOME=str(home))
    done = subprocess.run([sys.executable, '-c', OPEN, what, str(root), kind], env=env, cwd=tree, capture_output=True, text=True)
    if done.returncode: raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


MEMORY = (('folder, memory', 'folder', 'memory'), ('shards, memory', 'shards', 'memory'))    # from the index, where there is one


def measure(trees, root, turns):
    "tree -> name -> the rows of all turns; shards are opened in a new home, then in the same again."
    rows = {}
    for turn in range(turns):
        for label, tree in trees.items() if turn % 2 else reversed(trees.items()):
            with tempfile.TemporaryDirectory() as home:
                for name, *call in (('ImageFolder', 'ImageFolder'), ('folder', 'folder'), ('shards, first', 'shards'), ('shards, again', 'shards'),
                                    *(MEMORY if not turn and tree == '.' else ())):
                    row = opened(tree, home, call[0], root, *call[1:])
                    rows.setdefault(label, {}).setdefault(name, []).append(row)
                    print(label, name, {k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
    return rows


def middle(rows, key): return sorted(r[key] for r in rows)[len(rows)//2]


def summary(rows):
    out = {name: {k: round(middle(got, k), 3) for k in ('cpu', 'wall', 'batch', 'fingerprint') if k in got[0]} for name, got in rows.items() if 'memory' not in name}
    for name in ('folder', 'shards') if 'folder, memory' in rows else ():
        held = rows[f'{name}, memory'][0]
        out[f'{name}, memory'] = {f'{k}_per_image': round(held[k]/held['n'], 1) for k in ('bytes', 'peak')}
    ratios = sorted(a['cpu']/b['cpu'] for a, b in zip(rows['folder'], rows['ImageFolder'], strict=True))
    return dict(out, folder_over_ImageFolder=round(ratios[len(ratios)//2], 3))


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--files', type=int, default=200_000)
    p.add_argument('--images', type=int, default=1_280_000, help='in shards')
    p.add_argument('--shards', type=int, default=128)
    p.add_argument('--turns', type=int, default=3)
    p.add_argument('--before', help='a folder that holds another tree of the library')
    p.add_argument('--root', help='where the sets are made, or lie from an earlier call; the default is temporary')
    p.add_argument('--out', default='data/results/sets.json')
    a = p.parse_args()
    with tempfile.TemporaryDirectory() as tmp:
        root = Path(a.root or tmp)
        if not (root/'files').is_dir(): make_files(root/'files', a.files)
        if not (root/'shards').is_dir(): make_shards(root/'shards', a.images, a.shards)
        rows = measure({**({'before': a.before} if a.before else {}), 'after': '.'}, root, a.turns)
    from vfmvae.runtime import provenance
    got = dict(what='processor seconds (cpu), seconds (wall), bytes of memory an image; the trees and openings in turns', files=a.files,
               images=a.images, shards=a.shards, turns=a.turns, processor_seconds={k: summary(r) for k, r in rows.items()}, made=provenance())
    Path(a.out).write_text(json.dumps(got, indent=1)+'\n')
    print(json.dumps(got['processor_seconds'], indent=1))


if __name__ == '__main__': main()
