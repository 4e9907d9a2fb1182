"""The scripts of $VFMVAE_SHARED/faults (default ../shared/faults), each built after a public bug report: all of them say `fine`.

Each runs in a child of one process that has torch and the library loaded already; what is right is a law in the other tests, too. They say the names
of the day they were written: RENAMED has today's, and every line of it must be met."""
import ast, json, os, re, subprocess, sys
from pathlib import Path
import pytest

ROOT = Path(__file__).resolve().parent.parent
FAULTS = Path(os.environ.get('VFMVAE_SHARED') or ROOT.parent/'shared')/'faults'
SCRIPTS = sorted(FAULTS.glob('*.py'))
pytestmark = pytest.mark.skipif(not SCRIPTS, reason=f'no scripts in {FAULTS}; set VFMVAE_SHARED')

# what a script says -> what it says today (LOG.md, 2026-11-27)
RENAMED = {
    r'from vfmvae\.generate import': 'from vfmvae.generation import',
    r'from vfmvae\.align import (probe|linear_probe|knn_accuracy)\b': r'from vfmvae.probes import \1',
    r'images=16, batch=8\b': 'num_images=16, batch_size=8',
    r"'--images', 'x'": "'--data', 'world'",
    r'from vfmvae\.recipes import decode_latents, encode_images,': 'from vfmvae.latents import cache_latents\nfrom vfmvae.recipes import decode_latents,',
    r"encode_images\(tok, (.+?), (T/f?'[^']+)\.safetensors'\)": r"cache_latents(tok, \1, \2').dir",
    r'(?m)^from vfmvae\.recipes import open_tokenizer$': 'from vfmvae.tokenizer import open_tokenizer',
    r'(?m)^from vfmvae\.recipes import (.*), open_tokenizer$': r'from vfmvae.recipes import \1\nfrom vfmvae.tokenizer import open_tokenizer',
    r'(?m)^from vfmvae\.recipes import open_tokenizer, (.*)$': r'from vfmvae.recipes import \1\nfrom vfmvae.tokenizer import open_tokenizer'}


def homes() -> dict[str, list[str]]:
    "Public name -> the modules that have it."
    found: dict[str, list[str]] = {}
    for p in sorted((ROOT/'vfmvae').glob('*.py')):
        given = re.search(r'(?s)^__all__ = (\[.*?\])', p.read_text(encoding='utf-8'), re.M)
        for name in ast.literal_eval(given[1]) if given and p.stem[0] != '_' else (): found.setdefault(name, []).append(p.stem)
    return found


def renamed(source: str) -> str:
    "The script with today's names, each imported from the module that has it today."
    for old, new in RENAMED.items(): source = re.sub(old, new, source)
    known = homes()
    def split(m: re.Match) -> str:
        lines = []
        for name in m[3].split(','):
            there = known.get(name.split(' as ')[0].strip(), [m[2]])
            lines.append(f'{m[1]}from vfmvae.{m[2] if m[2] in there else there[0]} import {name.strip()}')
        return '\n'.join(lines)
    return re.sub(r'(?m)^( *)from vfmvae\.(\w+) import ([^\n(#;]+)$', split, source)


RUN = """
import json, os, runpy, sys, tempfile, warnings
import torch, timm, torchmetrics, vfmvae.cli, vfmvae.explorer, vfmvae.generation, vfmvae.recipes
torch.set_num_threads(1)
for script in sys.argv[1:]:
    read, write = os.pipe()
    if not os.fork():
        os.dup2(write, 1); os.dup2(write, 2)
        code = 1
        try:
            sys.argv = [script]
            runpy.run_path(script, run_name='__main__')
            code = 0
        except SystemExit as e:           # a bool of numpy is a code, too
            code = int(e.code) if hasattr(e.code, '__index__') or hasattr(e.code, 'item') else int(e.code is not None)
        except BaseException:
            import traceback
            traceback.print_exc()
        finally:
            sys.stdout.flush(); sys.stderr.flush()
            os._exit(code)
    os.close(write)
    with os.fdopen(read, errors='replace') as f: said = f.read()
    print(json.dumps([script, os.waitstatus_to_exitcode(os.wait()[1]), said]), flush=True)
"""


@pytest.fixture(scope='module')
def verdicts(tmp_path_factory):
    "Script -> (exit status, what it said)."
    cwd = tmp_path_factory.mktemp('faults')
    env = {**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1', 'VFMVAE_HOME': str(cwd/'home'),
           'TMPDIR': str(cwd)}
    scripts = [cwd/p.name for p in SCRIPTS]
    for p, to in zip(SCRIPTS, scripts, strict=True): to.write_text(renamed(p.read_text(encoding='utf-8')), encoding='utf-8')
    r = subprocess.run([sys.executable, '-c', RUN, *map(str, scripts)], cwd=cwd, env=env, capture_output=True,
                       text=True)
    return {Path(s).name: (code, said) for s, code, said in map(json.loads, r.stdout.splitlines())}


@pytest.mark.parametrize('script', [p.name for p in SCRIPTS])
def test_it_says_fine(script, verdicts):
    code, said = verdicts[script]
    assert code == 0 and 'fine' in said and 'FAULT' not in said and 'UNCLEAR' not in said, said[-1500:]


def test_every_name_that_changed_is_met():
    sources = [p.read_text(encoding='utf-8') for p in SCRIPTS]
    for old, new in RENAMED.items():
        assert any(re.search(old, s) for s in sources), old
        sources = [re.sub(old, new, s) for s in sources]
