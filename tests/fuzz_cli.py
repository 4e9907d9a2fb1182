"Fuzz cases: the command line, in this process through `vfmvae.cli.main`, and sometimes as a process of its own."
import contextlib, io, os, random, subprocess, sys
from pathlib import Path
from typing import Any

import torch

import fuzz_tools as T
from fuzz_nets import write
from fuzz_tools import Case, cases, pictures, put, short
from vfmvae.cli import main
from vfmvae.core import UserError

ROOT = Path(__file__).resolve().parent.parent

START = 'import sys; from vfmvae.cli import main; sys.exit(main())'


def command(argv: list[str], alone: bool = False) -> Any:
    "Runs `vfmvae ...`: what it printed; UserError with the one line that it ended in."
    def call() -> str:
        if alone:
            r = subprocess.run([sys.executable, '-c', START, *argv], capture_output=True, text=True,
                               timeout=120, env=dict(os.environ, PYTHONPATH=str(ROOT)))
            code, out, err = r.returncode, r.stdout, r.stderr
        else:
            o, e = io.StringIO(), io.StringIO()
            with contextlib.redirect_stdout(o), contextlib.redirect_stderr(e):
                try: code = main(argv)
                except SystemExit as x: code = x.code
            out, err = o.getvalue(), e.getvalue()
        if code == 0: return out
        lines = [s for s in err.splitlines() if s.startswith('vfmvae')]
        if code != 2 or len(lines) != 1 or 'Traceback' in err:
            raise RuntimeError(f'status {code}, which said: {err[-300:]!r}')
        raise UserError(err[err.index(lines[0]):].strip())     # whatever stands behind it belongs to it: one line it must be
    return call

NUMBERS = ['-1', '0', '', 'nan', 'inf', '-inf', '1e300', '10'+'0'*30, str(2**70), 'x', '1.5', '7', '\u0663', '1_0',
           ' 3', 'True', '9'*60, '--', '-0', '1e-300']
PATHS = ['', '.', '/proc/x/y', '/dev/null', '/dev/full', 'missing', 'a\0b', 'x'*300, '~nosuchuser/x', '-', 'file',
         'file/x', 'folder', 'loop', 'a\nb', '*', 'world', '/dev/stdin', 'sub/dir/new']

@cases('cli', 3)
def inputs(rng: random.Random, box: Path) -> Case:
    "Commands that read pictures, given others or nothing."
    pictures(box/'pics', rng, 2, 64)
    prepare(box)
    what = rng.choice(['encode', 'evaluate', 'reconstruct', 'align', 'lab'])
    given = rng.choice([*PATHS[:-1], 'pics', 'empty'])
    out = {'encode': ['--out', str(box.parent/'cwd'/'z'), '--n', '2'],
           'reconstruct': ['--out', str(box.parent/'cwd'/'rec'), '--n', '2'], 'align': ['--n', '20', '--times', '20', '--transforms', 'hflip'],
           'evaluate': ['--n', '2'], 'lab': ['--dry-run', '--n', '16']}[what]
    argv = [what, '--data', str(box/given) if given in ('file', 'folder', 'loop', 'pics', 'empty', 'missing')
            else given, *out]
    good = given in ('pics', 'world')
    def right(said: str) -> bool: return good and 'nan' not in said.lower() and bool(said.strip())
    return Case(what, command(argv), right, names=('',), out=(box.parent/'cwd', box.parent/'outputs'),
                detail=short(given), control=good and what not in ('align', 'lab'))

def prepare(box: Path) -> None:
    put(box/'file', b'1')
    (box/'folder').mkdir(exist_ok=True)
    (box/'empty').mkdir(exist_ok=True)
    if not (box/'loop').is_symlink(): (box/'loop').symlink_to(box/'loop')

@cases('cli', 4)
def outs(rng: random.Random, box: Path) -> Case:
    "Where results go: it is said before the work, or it works."
    pictures(box/'pics', rng, 2, 64)
    prepare(box)
    os.symlink(box/'file', box/'link')
    what = rng.choice(['encode', 'reconstruct', 'decode', 'generate', 'evaluate-samples', 'train-tokenizer',
                       'train-flow', 'align', 'demo'])
    given = rng.choice([*PATHS, 'folder/a.safetensors', 'folder/a.json', 'file/a.safetensors', '/proc/a.safetensors',
                        'a.pth', 'x'*300+'.safetensors', 'empty', 'link', '/dev/full/a.json', 'folder.safetensors',
                        './a.safetensors', './c'])
    (box/'folder.safetensors').mkdir()
    at = str(box/given) if given in ('file', 'folder', 'loop', 'empty', 'link', 'file/x', 'folder/a.safetensors',
                                     'folder/a.json', 'file/a.safetensors', 'sub/dir/new',
                                     'folder.safetensors') else given
    if what == 'decode': small_latents(box)
    argv = {'encode': ['encode', '--data', str(box/'pics')], 'reconstruct': ['reconstruct', '--data',
            str(box/'pics')], 'decode': ['decode', '--latents', str(box/'z')],
            'generate': ['generate', '--n', '1', '--steps', '1'], 'evaluate-samples': ['evaluate-samples',
            '--samples', str(box/'pics'), '--reference', str(box/'pics')], 'align': ['align', '--data',
            str(box/'pics'), '--transforms', 'hflip', '--times', '20', '--k', '1'],
            'train-tokenizer': ['train-tokenizer', '--data', str(box/'pics'), '--held-out', str(box/'pics'),
                                '--num-images', '2', '--batch-size', '1', '--stages', 'first', '--preset', 'conv-f8d16'],
            'train-flow': ['train-flow', '--data', str(box/'pics'), '--num-images', '2', '--batch-size', '2', '--n', '2'],
            'demo': ['demo', '--data', str(box/'pics'), '--num-images', '1']}[what]
    if what == 'demo' and given in ('sub/dir/new', 'empty', 'folder', './c', '-', '*', 'world', 'missing', '.',
                                    'a\nb', 'a.pth', './a.safetensors', '~nosuchuser/x', 'folder.safetensors',
                                    'folder/a.safetensors', 'folder/a.json'):
        given, at = 'file', str(box/'file')    # a minute where it works
    argv += ['--out', at]
    if what == 'align': pictures(box/'pics', rng, 5, 64)
    return Case(what, command(argv), lambda said: given not in ('', 'file/x', '/proc/x/y', '/dev/full')
                and (given not in ('file', 'link') or what in ('evaluate-samples', 'align')), names=('',),
                out=(box.parent/'cwd', *((box/'file', box/'link') if what in ('evaluate-samples', 'align') else ()),
                     box/'sub', box/'folder', box/'empty', box/'folder.safetensors', f'{box}/missing*',
                     f'{box}/loop*'), detail=short(given))

def small_latents(box: Path) -> Path:
    from vfmvae.world import World
    from vfmvae.latents import cache_latents
    from vfmvae.tokenizer import tokenizers
    return cache_latents(tokenizers['vfmvae-tiny-f8d16'], World(2, seed=8), box/'z').dir

@cases('cli', 6)
def options(rng: random.Random, box: Path) -> Case:
    "A number or a word set to something else."
    pictures(box/'pics', rng, 4, 64)
    pics = str(box/'pics')
    cwd = box.parent/'cwd'
    base, keys = rng.choice([
        (['encode', '--data', pics, '--out', str(cwd/'z')], ['--n', '--size', '--tokenizer', '--batch-size']),
        (['evaluate', '--data', pics], ['--n', '--size', '--tokenizer']),
        (['generate', '--n', '1', '--steps', '1', '--out', str(cwd/'g')], ['--n', '--label', '--steps', '--guidance',
            '--method', '--batch-size', '--seed', '--policy', '--net']),
        (['train-tokenizer', '--data', pics, '--held-out', pics, '--num-images', '2', '--batch-size', '1', '--stages', 'first',
          '--preset', 'conv-f8d16'], ['--num-images', '--batch-size', '--lr', '--accumulate', '--workers', '--save-every',
                                      '--size', '--stages', '--start', '--discriminator', '--precision', '--seed',
                                      '--preset', '--vfm', '--run']),
        (['train-flow', '--data', pics, '--num-images', '4', '--batch-size', '2', '--n', '4'], ['--num-images', '--batch-size', '--lr',
            '--accumulate', '--workers', '--save-every', '--n', '--precision', '--seed', '--preset', '--cache',
            '--run']),
        (['align', '--data', pics, '--transforms', 'hflip', '--times', '20', '--k', '1'], ['--n', '--k', '--times',
            '--vfm-ratio', '--seed', '--transforms', '--reference', '--vfm', '--size']),
        (['evaluate-samples', '--samples', pics, '--reference', pics], ['--size', '--n', '--reference-n',
                                                                        '--extractor', '--seed', '--samples',
                                                                        '--reference']),
        (['lab', '--dry-run', '--data', pics, '--n', '4'], ['--n', '--size', '--vfm', '--tokenizers']),
        (['demo', '--data', pics, '--out', str(cwd/'d')], ['--num-images'])])
    key, v = rng.choice(keys), rng.choice(NUMBERS)
    if key == '--vfm-ratio' and v == '7': v = '.5'
    if base[0] == 'demo': v = rng.choice(['-1', '0', '', 'x', '-inf', 'nan'])
    if key == '--num-images' and base[0] == 'train-tokenizer' and v in ('10'+'0'*30,
                                                                    str(2**70)) or base[0] in ('train-tokenizer',
                                                                            'train-flow') and key in ('--num-images',
                                                                                    '--workers',
                                                                                    '--n') and len(v) > 20 and v.isdigit() and rng.random() < 2:
        v = '-7'   # it would train for ever, as asked
    def right(said: str) -> bool:
        if 'nan' in said.lower() or 'inf' in said.lower().replace('info', ''): return False
        try: number = float(v.replace('_', 'x'))
        except ValueError: number = None
        if key in ('--n', '--size', '--steps', '--batch-size', '--k', '--times', '--accumulate',
                   '--save-every', '--reference-n', '--num-images'):
            return number is not None and number >= 1 and (number < 10**9 or key == '--n'
                                                           and base[0] not in ('generate',))
        if key in ('--lr', '--vfm-ratio'): return number is not None and 1e-320 < number < 1e3
        if key == '--guidance': return number is not None and abs(number) < 1e6
        if key in ('--workers', '--label', '--seed'):
            return number is not None and (number >= 0 or key == '--seed') and number == int(number)
        return key in ('--run', '--cache', '--discriminator') and v not in ('',)
    return Case(f'{base[0]} {key}', command([*base, key, v]), right, names=('',), out=(cwd,), detail=short(v))

@cases('cli', 3)
def files_given(rng: random.Random, box: Path) -> Case:
    "Tokenizers, nets, latents and statistics that are missing, spoiled or of another kind."
    pictures(box/'pics', rng, 2, 64)
    prepare(box)
    key, base = rng.choice([('--tokenizer', ['evaluate', '--data', str(box/'pics')]),
                            ('--latents', ['decode', '--out', str(box.parent/'cwd'/'d')]),
                            ('--net', ['generate', '--n', '1', '--steps', '1', '--out', str(box.parent/'cwd'/'g')]),
                            ('--reference', ['evaluate-samples', '--samples', str(box/'pics')]),
                            ('--samples', ['evaluate-samples', '--reference', str(box/'pics')]),
                            ('--g-kwargs', ['evaluate', '--data', str(box/'pics'), '--tokenizer',
                                            str(box/'a.pth')]), ('--start', ['train-tokenizer', '--data',
            str(box/'pics'), '--num-images', '2', '--batch-size', '1', '--stages', 'first', '--preset', 'conv-f8d16']),
                            ('--vfm-weights', ['align', '--data', str(box/'pics')]),
                            ('--cache', ['train-flow', '--data', str(box/'pics'), '--num-images', '2', '--batch-size', '2',
                                         '--n', '2']), ('--g-kwargs', ['evaluate', '--data', str(box/'pics')])])
    torch.save({'a': 1}, box/'a.pth')
    small_latents(box)
    what = rng.choice(['missing', 'empty', 'noise', 'html', 'folder', 'pipe', 'loop', 'latents', 'other net',
                       'torch file', 'cut', 'npz', 'long', 'null byte', 'no suffix'])
    ext = {'--reference': '.npz', '--samples': '.npz', '--g-kwargs': '.yaml', '--latents': '',
           '--cache': ''}.get(key, rng.choice(['.safetensors', '.pth']))
    if what == 'no suffix': ext = ''
    p = box/f'x{ext}'
    b = next((box/'z').glob('*.safetensors')).read_bytes()
    if what in ('empty', 'noise', 'html', 'cut'):
        put(p, {'empty': b'', 'noise': T.noise(3000, rng), 'html': b'<html>', 'cut': b[:500]}[what])
    if what == 'folder': p.mkdir()
    if what == 'pipe': os.mkfifo(p)
    if what == 'loop': p.symlink_to(p)
    if what == 'latents': put(p, b)
    if what == 'other net':
        write('dit' if key != '--net' else 'conv', box/'y.safetensors')
        put(p, (box/'y.safetensors').read_bytes())
        put(box/'x.json', (box/'y.json').read_bytes())
    if what == 'torch file': torch.save({'w': torch.zeros(3)}, p)
    if what == 'npz': put(p, T.zipped(b'x', box/'q').read_bytes())
    given = {'long': 'x'*300+ext, 'null byte': f'a\0{ext}'}.get(what, str(p))
    return Case(f'{base[0]} {key}: {what}', command([*base, key, given]), (lambda said: True) if key in ('--cache',)
                and what in ('missing', 'folder', 'no suffix', 'null byte', 'long') else None, names=('',),
                out=(box.parent/'cwd', p if key == '--cache' else box.parent/'cwd'), detail=ext)

@cases('cli')
def words(rng: random.Random, box: Path) -> Case:
    "Commands that are none."
    argv = rng.choice([[], ['nothing'], ['--nothing'], ['encode'], ['encode', '--data'], ['decode'], [''],
                       ['evaluate', '--data', 'x', 'y'], ['generate', '--n'], ['-h', 'x'],
                       ['encode', '--images', 'world', '--n', '1'], ['train-flow', '--preset', 'tiny'],
                       ['train-tokenizer', '--preset', 'nothing'],
                       ['generate', '--net', 'nothing'], ['evaluate', '--data', 'world', '--tokenizer', 'nothing'],
                       ['align', '--data', 'world', '--vfm', 'nothing'], ['align', '--data', 'world',
            '--transforms', 'nothing'], ['lab', '--tokenizers', ',', '--dry-run'],
                       ['lab', '--tokenizers', 'a,b,c,d,e', '--dry-run'],
                       ['train-tokenizer', '--stages', ',', '--dry-run'], ['train-tokenizer', '--precision', 'fp8',
            '--num-images', '96', '--batch-size', '16'], ['evaluate-samples', '--extractor', 'nothing'],
                       ['generate', '--method', 'nothing', '--n', '1']])
    return Case(' '.join(argv)[:60], command(argv), (lambda said: 'usage' in said) if argv[:1] == ['-h'] else None,
                names=('',), out=(box.parent/'cwd',))

@cases('cli', 2)
def environment(rng: random.Random, box: Path) -> Case:
    "A home that cannot be made."
    put(box/'file', b'1')
    v = rng.choice([str(box/'file'), '/proc/x', '/dev/null/x', str(box/'a\nb'), str(box/('x'*300)), '~nosuchuser/x', '',
                    str(box/'new')])
    pictures(box/'pics', rng, 2, 64)
    argv = rng.choice([['encode', '--data', str(box/'pics')], ['train-flow', '--data', str(box/'pics'), '--n', '2',
                                                                '--num-images', '2', '--batch-size', '2'],
                       ['train-tokenizer', '--run', 'r', '--data', str(box/'pics'), '--num-images', '2', '--batch-size', '1',
                        '--stages', 'first', '--preset', 'conv-f8d16'], ['lab', '--dry-run', '--data',
            str(box/'pics'), '--n', '4']])
    inner = command(argv)
    def call() -> Any:
        old = dict(os.environ)
        os.environ.update(VFMVAE_HOME=v, HOME=str(box/'home'), XDG_CACHE_HOME=str(box/'home'))
        try: return inner()
        finally: os.environ.update(old)
    return Case(argv[0], call, lambda said: v in ('', '~nosuchuser/x', str(box/'a\nb'), str(box/'new')), names=('',),
                out=(box/'home', box/'new', box/'a\nb', box.parent/'cwd'), detail=short(v)[-40:])

@cases('cli')
def processes(rng: random.Random, box: Path) -> Case:
    "As a process of its own: what the shell sees."
    if rng.random() < .8:                # few: each takes seconds
        return Case('version', command(['--version']), lambda said: True, control=True)
    pictures(box/'pics', rng, 1, 64)
    argv, good = rng.choice([(['evaluate', '--data', str(box/'pics')], True),
                             (['evaluate', '--data', str(box/'nothing')], False),
                             (['decode', '--latents', str(box/'nothing')], False),
                             (['encode', '--data', str(box/'pics'), '--out', '/proc/x'], False)])
    inner = command(argv, alone=True)
    return Case('alone', inner, (lambda said: '"psnr"' in said) if good else None, control=good,
                names=('nothing', '/proc/x'), detail=argv[0], seconds=60, out=(box.parent/'cwd',))
