"""What every test shares: where the golden numbers lie, a private home folder, a sane number of threads."""
import os
from pathlib import Path
import pytest
import torch
from scope import ALL

ROOT = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get('VFMVAE_SHARED') or ROOT.parent/'shared')


def pytest_configure(config): config.addinivalue_line('markers', 'thorough: the same question once more, of another of its kind; with VFMVAE_TEST_ALL=1')


def pytest_collection_modifyitems(config, items):
    if ALL: return
    left = [i for i in items if i.get_closest_marker('thorough')]
    config.hook.pytest_deselected(items=left)
    items[:] = [i for i in items if not i.get_closest_marker('thorough')]
    if hasattr(config, 'workeroutput'): config.workeroutput['left'] = len(left)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node): node.config.left_out = getattr(node, 'workeroutput', {}).get('left', 0)       # pytest-xdist itself does not tell


def pytest_terminal_summary(terminalreporter, config):
    if n := getattr(config, 'left_out', 0): terminalreporter.write_line(f'{n} tests were left out, of others of a kind: make test-all asks them, too')


if 'OMP_NUM_THREADS' not in os.environ: torch.set_num_threads(min(4, os.cpu_count() or 1))


@pytest.fixture(autouse=True, scope='session')
def _home(tmp_path_factory):
    "Runs and latents of the tests go to a temporary home, never to the user's."
    old, os.environ['VFMVAE_HOME'] = os.environ.get('VFMVAE_HOME'), str(tmp_path_factory.mktemp('home'))
    yield
    if old is None: del os.environ['VFMVAE_HOME']
    else: os.environ['VFMVAE_HOME'] = old


@pytest.fixture(scope='session')
def shared() -> Path:
    "The folder of golden numbers and photographs; a test that needs it is skipped without it."
    if not (SHARED/'golden').is_dir(): pytest.skip(f'no golden numbers in {SHARED}; set VFMVAE_SHARED')
    return SHARED


@pytest.fixture(scope='session')
def golden(shared):
    "golden('vfmvae/evaluation') -> dict of tensors of that file below golden/."
    from safetensors.torch import load_file
    return lambda name: load_file(shared/'golden'/f'{name}.safetensors')


@pytest.fixture(scope='session')
def photos(shared) -> Path:
    "640 photographs of 256 x 256 in one flat folder."
    return shared/'data/photos256'


@pytest.fixture
def few_tokenizers(monkeypatch):
    "Labs offer three of the bundled tokenizers, of both families and sets: a lab that compares all opens each of them."
    if ALL: return
    from vfmvae.tokenizer import tokenizers
    few = ('vfmvae-photo-f8d16', 'vfmvae-tiny-f8d16', 'conv-f8d16')
    monkeypatch.setattr(tokenizers, '_f', {k: v for k, v in tokenizers._all().items() if k in few})
