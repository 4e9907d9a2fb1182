"""What a user installs: the source archive holds all that the wheel needs, the wheel holds the data and the command."""
import ast, json, os, re, shutil, subprocess, sys, tarfile, zipfile
from pathlib import Path
import pytest

ROOT = Path(__file__).resolve().parent.parent


def run(*command, cwd, **env) -> str:
    "Runs a command and returns its output; a failure shows what it said."
    out = subprocess.run(list(map(str, command)), cwd=cwd, capture_output=True, text=True, env={**os.environ, **env})
    assert out.returncode == 0, f'{command}\n{out.stdout[-1500:]}\n{out.stderr[-3000:]}'
    return out.stdout.strip()


@pytest.fixture(scope='module')
def built(tmp_path_factory):
    "The wheel of the source archive of a copy of the repository: (names in the wheel, its folder unpacked, names in the archive)."
    tmp = tmp_path_factory.mktemp('package')
    skip = shutil.ignore_patterns('.*', 'venv', 'outputs', 'build', 'dist', '*.egg-info', '__pycache__', 'nbs', 'tests')
    shutil.copytree(ROOT, tmp/'copy', ignore=skip)
    build = "from setuptools import build_meta; import sys; print(build_meta.build_sdist(sys.argv[1]))"
    archive = tmp/'sdist'/run(sys.executable, '-c', build, tmp/'sdist', cwd=tmp/'copy').splitlines()[-1]
    with tarfile.open(archive) as t:
        sources = ['/'.join(n.split('/')[1:]) for n in t.getnames()]
        t.extractall(tmp/'source', filter='data')
    source, = (tmp/'source').iterdir()
    run(sys.executable, '-m', 'pip', 'wheel', '--quiet', '--no-deps', '--no-build-isolation', '-w', tmp/'wheel', source, cwd=tmp)
    wheel, = (tmp/'wheel').glob('vfmvae-*.whl')
    with zipfile.ZipFile(wheel) as z:
        z.extractall(tmp/'site')
        return z.namelist(), tmp/'site', sources


def test_the_source_archive_can_build(built):
    assert {'settings.ini', 'README.md', 'LICENSE', 'setup.py', 'pyproject.toml', 'data/README.md'} <= set(built[2])


def test_the_wheel_holds_every_module_and_all_data(built):
    names = set(built[0])
    assert {f'vfmvae/{p.name}' for p in (ROOT/'vfmvae').glob('*.py')} <= names
    hidden = [p for p in (ROOT/'data').rglob('*') if p.is_file() and not any(s.startswith('.') for s in p.relative_to(ROOT).parts)]
    assert {f'vfmvae/{p.relative_to(ROOT).as_posix()}' for p in hidden} <= names
    assert not [n for n in names if n.startswith(('nbs/', 'tests/', 'data/'))]


def test_the_wheel_has_the_command(built):
    info, = built[1].glob('vfmvae-*.dist-info')
    assert 'vfmvae = vfmvae.cli:main' in (info/'entry_points.txt').read_text()


def test_the_metadata_come_from_settings_ini(built):
    from configparser import ConfigParser
    from email import message_from_string
    cfg = ConfigParser(delimiters=['='])
    cfg.read(ROOT/'settings.ini')
    info, = built[1].glob('vfmvae-*.dist-info')
    meta = message_from_string((info/'METADATA').read_text())
    assert meta['Summary'] == cfg['DEFAULT']['description'] and meta['Requires-Python'] == f">={cfg['DEFAULT']['min_python']}"
    core = {r for r in meta.get_all('Requires-Dist') if 'extra ==' not in r}
    assert len(core) == len(cfg['DEFAULT']['requirements'].split()) and any(r.startswith('torch>=') for r in core)
    assert set(meta.get_all('Provides-Extra')) == {'widgets', 'notebooks', 'eval', 'diffusers', 'text', 'ode', 'dev'}


def test_the_unpacked_wheel_finds_its_data(built, tmp_path):
    probe = 'from vfmvae.files import data_dir; import vfmvae; print(vfmvae.__file__); print(data_dir())'
    package, data = run(sys.executable, '-c', probe, cwd=tmp_path, PYTHONPATH=str(built[1])).splitlines()
    assert Path(package).parent == built[1]/'vfmvae' and Path(data) == built[1]/'vfmvae'/'data'


def test_the_wheel_is_small(built):
    wheel, = built[1].parent.glob('wheel/vfmvae-*.whl')
    size = wheel.stat().st_size
    assert size <= 75e6, f'{size/1e6:.1f} MB: store weights with `files.halve`'


def test_half_precision_moves_nothing_that_is_printed(tmp_path):
    # numbers of the bundled nets that were halved, before and after: LOG.md
    import torch
    from vfmvae.files import data_dir, halve, load_weights, save_weights
    from vfmvae.world import World
    from vfmvae.recipes import evaluate_tokenizer
    from vfmvae.tokenizer import load_tokenizer
    # the bundled file is in half precision: its weights get the low bits again that a training leaves
    tensors, meta = load_weights(data_dir()/'weights'/'vfmvae-tiny-f8d16.safetensors')
    g = torch.Generator().manual_seed(0)
    tensors = {k: v.float()*(1+(torch.rand(v.shape, generator=g)-.5)/1024) for k, v in tensors.items()}
    path = save_weights(tmp_path/'mine.safetensors', tensors, meta)
    nets = {'float32': load_tokenizer(path), 'half': load_tokenizer(halve(path))}
    rows = {k: evaluate_tokenizer(net, World(10_000, seed=8), 64) for k, net in nets.items()}
    assert rows['half'] != rows['float32']
    assert abs(rows['half']['psnr'] - rows['float32']['psnr']) < .005 and abs(rows['half']['ssim'] - rows['float32']['ssim']) < .0005
    for f in (data_dir()/'weights').glob('*.safetensors'):
        halved = any(t.dtype == torch.float16 for t in load_weights(f)[0].values())
        assert halved == (not f.stem.startswith('known-')), f.name
        if f.stem.startswith(('dit-', 'lumina-')):      # and rounded, because such files pack better
            assert all(torch.equal(t, t.bfloat16().half()) for t in load_weights(f)[0].values() if t.ndim > 1), f.name
    assert all(p.dtype == torch.float32 for net in nets.values() for p in net.parameters())
    from vfmvae.generation import nets as bundled
    from vfmvae.tokenizer import tokenizers
    for net in (tokenizers['conv-f8d16'], bundled['dit-conv-f8d16']):
        assert all(p.dtype == torch.float32 for p in net.parameters())


def unhalved(code: str, nets: bool) -> list[str]:
    "The files that the code of a recipe writes and never halves; for diffusion nets, those it does not round, too."
    calls = [(c.func.id, c) for c in ast.walk(ast.parse(code)) if isinstance(c, ast.Call) and isinstance(c.func, ast.Name)]
    halves = [c for name, c in calls if name == 'halve' and (not nets or any('bfloat16' in ast.unparse(a) for a in c.args[1:]))]
    done = {ast.unparse(c.args[0]) for c in halves}
    wrote = [c for name, c in calls if name in ('save_weights', 'save_net') and not re.search('known-|drawings', ast.unparse(c.args[0]))]
    left = [ast.unparse(c.args[0]) for c in wrote if not {ast.unparse(c), ast.unparse(c.args[0])} & done]
    return left or ([] if done else ['all'])

def test_every_recipe_stores_half_precision():
    assert unhalved('save_weights(out, t)', False) == unhalved('halve(out, digits=1); save_net(out, t)', True) == ['out']
    assert unhalved('train_tokenizer(out=out)', False) == ['all'] and unhalved("halve(save_weights(out, t)); save_weights('known-x', t)", False) == []
    recipes: dict[str, bool] = {}
    for f in (ROOT/'data/weights').glob('*.safetensors'):
        found = re.search(r'nbs/train/\w+\.ipynb', json.loads(f.with_suffix('.json').read_text())['source'])
        assert found or f.stem.startswith('known-'), f.name
        if found and not f.stem.startswith('known-'): recipes[found[0]] = f.stem.startswith('dit-')
    assert len(recipes) >= 9
    for path, nets in recipes.items():
        cells = [''.join(c['source']) for c in json.loads((ROOT/path).read_text())['cells'] if c['cell_type'] == 'code']
        assert unhalved('\n'.join(cells), nets) == [], path
