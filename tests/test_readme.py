"""Every command and every piece of code of README.md runs, in the order in which they stand there, at a smoke size (`smoke.py`): what is typed is what is
in SMOKE. A command that README gains, or that changes, fails here until SMOKE knows it."""
import json, os, re, runpy, shutil, subprocess, sys
from pathlib import Path
from unittest.mock import patch

import pytest
import smoke
import torch
from scope import ALL

from vfmvae.cli import main

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT/'README.md').read_text(encoding='utf-8')
TWO = 'accelerate launch --cpu --num_machines 1 --num_processes 2 --main_process_port $PORT $(command -v vfmvae)'
# one launch of processes is enough, but for make test-all: the others are typed without it
TWO_MORE, MACHINES = (TWO, 'accelerate launch --cpu --num_machines 1 --num_processes 1 --machine_rank $MACHINE --main_process_ip $HEAD '
                      '--main_process_port $PORT $(command -v vfmvae)') if ALL else ('vfmvae',)*2
LATER = ''              # not run here, for the reason beside it; that make would run this very line is checked
# a line of README, or what its make says that it would run -> what runs instead; None: the line itself
SMOKE = {
    'make demo': None, 'make demo IMAGES=folder/of/pictures': None,
    # what installs: that the tool is there
    "pip install -e '.[widgets,notebooks]'": 'pip --version',
    'make train IMAGES=folder/of/pictures ARGS=\'--size 128 --num-images 50000 --run mine\'': None,
    'make lab': None, 'make docs': None, 'make test': None, 'make test-all': None, 'make bench': None, 'make gpu': None,
    'vfmvae demo': LATER,                                                    # the same with images, below
    'vfmvae demo --data "folder/of/pictures"': 'vfmvae demo --data "folder/of/pictures" --num-images 32',
    'vfmvae train-tokenizer --data "folder/of/pictures" --out outputs/tokenizer.safetensors --size 128 --num-images 50000 --run mine':
        'vfmvae train-tokenizer --data "folder/of/pictures" --out outputs/tokenizer.safetensors --size 64 --num-images 40 --run mine',
    'jupyter lab nbs/index.ipynb': LATER,                                    # a server
    'python docs/build.py': LATER,                                           # tests/test_docs.py makes the pages
    'python benchmarks/speed.py': LATER,                                     # tests/test_reference.py runs its smoke size
    'python3 benchmarks/gpu.py': LATER,                                      # tests/test_gpu.py runs its smoke size
    'python benchmarks/sets.py': LATER,                                      # it writes sets of ImageNet's size
    'ruff check': LATER, 'mypy': LATER, 'OMP_NUM_THREADS=1 nbdev-test --n-workers 2': LATER,                       # what runs this test
    'OMP_NUM_THREADS=1 python -m pytest -n 2 --dist loadfile --no-loadscope-reorder': LATER,
    'vfmvae lab': 'vfmvae lab --dry-run --n 32',
    'vfmvae lab -- --no-browser --port 8890': 'vfmvae lab --dry-run --n 32 -- --no-browser --port 8890',
    'vfmvae doctor': None,
    'vfmvae study data/studies/small.json --dry-run': f'vfmvae study {ROOT}/data/studies/small.json --dry-run',
    'vfmvae study data/studies/small.json --out study.csv': LATER,           # it trains; tests/test_studies.py runs smaller ones
    'vfmvae train-tokenizer --data folder/of/pictures --vfm dinov2-s --discriminator tiny --size 256 --dry-run':
        'vfmvae train-tokenizer --data folder/of/pictures --vfm dinov2-s --discriminator tiny --size 64 --dry-run',
    'vfmvae train-tokenizer --data folder/of/pictures --stages ssim,gan --start mine/weak_align --run branch': None,
    'export FULL="train-tokenizer --preset f16d32 --data imagenet-train-{0000..1023}.tar --precision bf16 --workers 12 --run big"':
        'export FULL="train-tokenizer --preset f16d32 --data imagenet-train-{0000..0001}.tar --precision bf16 --workers 12 --run big"',
    'vfmvae $FULL --accumulate 16': 'vfmvae $FULL --accumulate 2',
    'accelerate launch $(command -v vfmvae) $FULL --accumulate 2': f'{TWO} $FULL-2 --accumulate 2 --stages strong_align',
    'accelerate launch --num_machines 8 --num_processes 64 --machine_rank $MACHINE --main_process_ip $HEAD --main_process_port 29500 '
    '$(command -v vfmvae) $FULL':
        f'{MACHINES} $FULL-8 --stages strong_align',
    'vfmvae train-tokenizer --preset f16d32-512 --dry-run': None,
    'vfmvae align --data folder/of/pictures --tokenizer conv-tiny-f8d16': 'vfmvae align --data folder/of/pictures --tokenizer conv-tiny-f8d16 --times 20',
    'vfmvae train-flow --preset reg-80ep --dry-run': None,
    'export TOKENIZER="--tokenizer vfm_vae_f16d32_..._legacy.pth --g-kwargs training.yaml"': None,
    'accelerate launch $(command -v vfmvae) train-flow --preset reg-80ep $TOKENIZER --data imagenet/train --compile --run reg --out reg.safetensors':
        f'{TWO_MORE} train-flow --preset reg-80ep $TOKENIZER --data imagenet/train --compile --run reg --out reg.safetensors',
    'vfmvae generate --net mine-dit.safetensors --n 64 --guidance 3 --out samples':
        'vfmvae generate --net mine-dit.safetensors --n 4 --guidance 3 --out samples',
    "vfmvae generate --net lumina-vfmvae-tiny-f8d16 --prompt 'a large ring with stripes on a green ground with waves' --out drawn": None,
    'vfmvae evaluate-samples --net mine-dit.safetensors --n 2048': 'vfmvae evaluate-samples --net mine-dit.safetensors --n 16 --reference-n 64'}
# the same of a piece of code
CODE = {'World(3000, seed=8)': 'World(40, seed=8)', 'n=1000': 'n=12, times=20'}
COMMAND = re.compile(r'(?:vfmvae|make|accelerate|pip|python|export|torchrun) \S.*')

def pieces():
    "(kind, text) in the order of README: 'sh' for a line that is typed, 'python' for a piece of code."
    for block in re.finditer(r'^```(\w*)\n(.*?)^```$|`([^`\n]+)`', TEXT, re.M | re.S):
        kind, body, span = block.groups()
        if span is not None:
            if COMMAND.fullmatch(span): yield 'sh', span
        elif kind == 'sh':
            for line in body.splitlines():
                typed, _, beside = line.partition('#')
                for words in (typed.strip(), beside.strip().removeprefix('or: ')):
                    if COMMAND.fullmatch(words): yield 'sh', words
        elif kind in ('', 'python'): yield 'python', body
        else: assert kind == 'bibtex', kind

@pytest.fixture(scope='module')
def place(tmp_path_factory):
    "A folder with all that README's lines name, a `vfmvae` on the path that stands in the small world, an environment that make finds made."
    folder = tmp_path_factory.mktemp('readme')
    smoke.files(folder/'here')
    bin, here = folder/'made'/'bin', folder/'here'
    bin.mkdir(parents=True)
    (bin/'vfmvae').write_text(f'''#!{sys.executable}
import sys
sys.path[:0] = [{str(ROOT/'tests')!r}]
import smoke
from pathlib import Path
from vfmvae.cli import main
with smoke.world(): status = main()
if 'accelerate' in sys.modules:
    from accelerate.state import PartialState
    if PartialState._shared_state: Path('%d of %d' % (PartialState().process_index, PartialState().num_processes)).touch()
sys.exit(status)
''')
    (bin/'vfmvae').chmod(0o755)
    (bin/'python').write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (bin/'python').chmod(0o755)
    for name in ('Makefile', 'settings.ini', 'setup.py', 'pyproject.toml'): shutil.copy(ROOT/name, here/name)
    (here/'nbs').mkdir()
    (here/'nbs'/'index.ipynb').touch()
    mark = subprocess.run('pwd | cksum | cut -d" " -f1', shell=True, cwd=here, capture_output=True, text=True).stdout.strip()
    for kind in ('core', 'dev'): (folder/'made'/f'.vfmvae-{kind}-{mark}').touch()
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get('PYTHONPATH')])])
    return here, dict(os.environ, VIRTUAL_ENV=str(folder/'made'), PATH=f"{bin}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
                      PYTHONPATH=paths, VFMVAE_HOME=str(folder/'home'), MACHINE='0', HEAD='127.0.0.1', PORT='29521')

def shell(line, place):
    here, env = place
    return subprocess.run(['bash', '-c', line], cwd=here, env=env, capture_output=True, text=True, timeout=300)

def made_by(line, place):
    "What make would run."
    done = shell(f'{line} --dry-run --no-print-directory', place)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.replace('\\\n', ' ').replace(f"{place[1]['VIRTUAL_ENV']}/bin/", '').splitlines()
    return [' '.join(w.split()) for w in lines if not w.startswith(('make ', '/usr/bin/make '))]

def typed(line, place):
    "Types the line as SMOKE has it: a plain vfmvae in this process, accelerate as processes of its own; False where it is left for another place."
    assert line in SMOKE, f'README (or its Makefile) has a line that no rule knows: {line}'
    small = line if SMOKE[line] is None else SMOKE[line]
    if not small: return False
    if small.startswith('make '): return [typed(w, place) for w in made_by(small, place)]
    if small.startswith('export '):
        done = shell(f'{small}; env -0', place)
        place[1].update(dict(w.partition('=')[::2] for w in done.stdout.split('\0') if w.startswith(small[7:].split('=')[0])))
        return True
    if small.startswith('vfmvae '):
        words = shell(f"printf '%s\\0' {small}", place).stdout.split('\0')[1:-1]
        with smoke.world(): assert main(words) == 0, line
        return True
    if small.startswith('python -m vfmvae'):
        with patch.object(sys, 'argv', small.split()[2:]), pytest.raises(SystemExit) as end: runpy.run_module(small.split()[2], run_name='__main__')
        return end.value.code == 0
    done = shell(small, place)
    assert done.returncode == 0, (small, done.stderr[-3000:])
    return True

def test_readme_runs(place, monkeypatch, capsys):
    here, env = place
    monkeypatch.chdir(here)
    monkeypatch.setenv('VFMVAE_HOME', env['VFMVAE_HOME'])
    g = torch.Generator().manual_seed(0)
    space = dict(A=torch.randn(64, 8, generator=g), B=torch.randn(64, 8, generator=g))
    seen, code = [], 0
    for kind, text in pieces():
        if kind == 'python':
            for a, b in CODE.items(): text = text.replace(a, b)
            monkeypatch.setenv('VFMVAE_HOME', env['VFMVAE_HOME']+'-python')       # a run 'mine' of its own
            with smoke.world(): exec(compile(text, 'README.md', 'exec'), space)
            monkeypatch.setenv('VFMVAE_HOME', env['VFMVAE_HOME'])
            code += 1
        elif text not in seen:
            seen.append(text)
            typed(text, place)
    assert len(seen) > 20 and code > 8
    runs = Path(env['VFMVAE_HOME'])/'runs'
    assert {f'{r}/{s}' for r, s in (('mine', 'weak_align'), ('branch', 'gan'), ('big', 'gan'), ('big-2', 'strong_align'), ('big-8', 'strong_align'))} <= {
        p.parent.relative_to(runs).as_posix() for p in runs.rglob('step-*.safetensors')}
    assert (here/'0 of 2').exists() and (here/'1 of 2').exists()
    said = capsys.readouterr().out
    assert 'hours on one' in said and 'f16d32' not in said and 'step' in said
    for made in ('mine.safetensors', 'outputs/tokenizer.safetensors', 'reg.safetensors', 'samples/000003.png', 'outputs/demo/index.html'):
        assert (here/made).exists(), made
    from vfmvae.dit import DiT
    assert DiT.load(here/'reg.safetensors').meta['recipe']['latents'] == 16      # all of the pictures
    assert "crop 'adm'" in DiT.load(here/'reg.safetensors').meta['recipe']['data']

def test_no_rule_is_left_over(place):
    "A line that README dropped is dropped from SMOKE, too."
    lines = {text for kind, text in pieces() if kind == 'sh'}
    made = {w for line in lines if line.startswith('make ') for w in made_by(line, place)}
    assert set(SMOKE) == lines | made and all(any(a in text for kind, text in pieces() if kind == 'python') for a in CODE)


def test_every_cell_that_is_shown_has_an_output():
    notebook = json.loads((ROOT/'nbs'/'index.ipynb').read_text(encoding='utf-8'))
    code = [(''.join(c['source']), c['outputs']) for c in notebook['cells'] if c['cell_type'] == 'code']
    assert [s[:60] for s, out in code if not s.startswith('#| hide') and not out] == []


def test_the_explorer_in_motion_is_small_and_moves():
    from PIL import Image
    file = ROOT/'data'/'screenshots'/'explorer.webp'
    assert file.stat().st_size < 1.5e6 and Image.open(file).n_frames >= 5
