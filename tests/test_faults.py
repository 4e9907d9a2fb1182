"""The scripts of $VFMVAE_SHARED/faults (default ../shared/faults), each built after a public bug report: all of them say `fine`.

Each runs in a child of one process that has torch and the library loaded already; what is right is a law in the other tests, too."""
import json, os, subprocess, sys
from pathlib import Path
import pytest

ROOT = Path(__file__).resolve().parent.parent
FAULTS = Path(os.environ.get('VFMVAE_SHARED') or ROOT.parent/'shared')/'faults'
SCRIPTS = sorted(FAULTS.glob('*.py'))
pytestmark = pytest.mark.skipif(not SCRIPTS, reason=f'no scripts in {FAULTS}; set VFMVAE_SHARED')

RUN = """
import json, os, runpy, sys, tempfile, warnings
import torch, timm, torchmetrics, vfmvae.cli, vfmvae.explorer, vfmvae.generate, vfmvae.recipes
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
        except SystemExit as e: code = 1 if isinstance(e.code, str) else int(bool(e.code))     # numpy's False is no failure
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
    r = subprocess.run([sys.executable, '-c', RUN, *map(str, SCRIPTS)], cwd=cwd, env=env, capture_output=True,
                       text=True)
    return {Path(s).name: (code, said) for s, code, said in map(json.loads, r.stdout.splitlines())}


@pytest.mark.parametrize('script', [p.name for p in SCRIPTS])
def test_it_says_fine(script, verdicts):
    code, said = verdicts[script]
    assert code == 0 and 'fine' in said and 'FAULT' not in said and 'UNCLEAR' not in said, said[-1500:]
