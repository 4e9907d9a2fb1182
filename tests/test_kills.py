"""Who is killed while training, caching, extracting, sampling or evaluating and starts again: the same bits, a clean folder."""
import signal, sys
from pathlib import Path
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent/'benchmarks'))
from kills import run, state, torn  # noqa: E402

MOMENTS = {'a checkpoint is being written': ('flow', r'step-0*4\.safetensors', 'write'),
           'a checkpoint has no JSON yet': ('flow', r'step-0*4\.safetensors', 'written'),
           'half of an old checkpoint is gone': ('flow', r'step-0*2\.json', 'delete'),
           'a preview is being written': ('tokenizer', r'preview\.png', 'write', 2),
           'half a row of the log is on disk': ('flow', r'log\.jsonl', 'log', 5),
           'a row of a watch is half on disk': ('flow', r'watch\.jsonl', 'log', 2),
           'a shard of latents is being written': ('cache', r'shard-00001\.safetensors', 'write'),
           'a bank has no JSON yet': ('extraction', r'layer2\.safetensors', 'written'),
           'a picture is being written': ('sampling', r'000003\.png', 'write'),
           'a record is being written': ('evaluation', r'rfid\.json', 'write')}


@pytest.fixture(scope='module')
def straight(tmp_path_factory):
    known = {}
    def of(job):
        if job not in known:
            folder = tmp_path_factory.mktemp('straight')/job
            assert run(job, folder) == 0
            known[job] = state(folder)
        return known[job]
    return of


@pytest.mark.parametrize('moment', MOMENTS)
def test_killed_when(moment, straight, tmp_path):
    job, *at = MOMENTS[moment]
    want, folder = straight(job), tmp_path/job
    assert run(job, folder, tuple(at)) == -signal.SIGKILL                # it was killed, and there
    if at[1] == 'write': assert torn(folder)                             # what it left
    assert run(job, folder) == 0
    got = state(folder)
    assert torn(folder) == [] and got.keys() == want.keys() and [k for k in want if got[k] != want[k]] == []
