"""The front door: `import vfmvae` is light, its names are where the one mapping says, and no module bears the name of one of them."""
import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import vfmvae
from vfmvae import _MODULES
from vfmvae.core import UserError

ROOT = Path(__file__).resolve().parent.parent
NAMES = ('VFM, World, folder, shards, open_data, open_tokenizer, tokenizers, reconstruct, train_tokenizer, train_flow, generate, evaluate_tokenizer, '
         'rfid, gfid, cknna, se_cknna, prepare, extract, show_images, Explorer, PRESETS, study').split(', ')


def fresh(code):
    "What a process of its own prints."
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_names_are_those_of_everyday_work(): assert sorted(_MODULES) == sorted(vfmvae.__all__) == sorted(NAMES)


# one slow start of torch and timm serves the children, in each of which one name is the first that anybody asks for
FIRST = """
import os, sys, torch, timm
for pair in sys.argv[1:]:
    name, module = pair.split(':')
    if not os.fork():
        import vfmvae
        x = getattr(vfmvae, name)
        print(name, x is getattr(sys.modules['vfmvae.'+module], name), flush=True)
        os._exit(0)
    os.wait()
"""


@pytest.fixture(scope='module')
def asked_first():
    pairs = [f'{name}:{_MODULES[name]}' for name in NAMES]
    done = subprocess.run([sys.executable, '-c', FIRST, *pairs], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return dict(line.split() for line in done.stdout.splitlines()), done.stderr


@pytest.mark.parametrize('name', NAMES)
def test_a_name_is_where_the_mapping_says(name, asked_first):
    found, said = asked_first
    assert name in importlib.import_module(f'vfmvae.{_MODULES[name]}').__all__ and found.get(name) == 'True', said


@pytest.mark.parametrize('name', NAMES)
def test_no_module_bears_the_name(name): assert not (ROOT/'vfmvae'/f'{name}.py').exists()


def test_editors_are_told_the_same():
    tree = ast.parse((ROOT/'vfmvae'/'__init__.py').read_text(encoding='utf-8'))
    block = next(n for n in tree.body if isinstance(n, ast.If) and ast.unparse(n.test) == 'TYPE_CHECKING')
    assert {a.name: n.module for n in block.body for a in n.names} == _MODULES and all(a.name == a.asname for n in block.body for a in n.names)


def test_nothing_heavy_is_imported_before_a_name_is_asked_for():
    heavy = '[m for m in ("torch", "numpy", "timm", "matplotlib") if m in sys.modules]'
    assert fresh(f'import vfmvae, sys; dir(vfmvae); vfmvae.__all__; vfmvae.__version__; print({heavy})') == '[]'
    assert fresh('import vfmvae, sys; vfmvae.World; print("torch" in sys.modules, "timm" in sys.modules)') == 'True False'


def test_star_completion_and_modules():
    said = fresh('from vfmvae import *; print(World.__module__, sorted(PRESETS)[:1], type(tokenizers).__name__)')
    assert said == "vfmvae.world ['conv-dinov2l-f16d32'] Registry"
    assert {*NAMES, '__version__'} <= {*dir(vfmvae)} and fresh('import vfmvae; print(vfmvae.align.cknna is vfmvae.cknna)') == 'True'
    assert fresh('import rlcompleter, vfmvae; print(rlcompleter.Completer(dict(vfmvae=vfmvae)).complete("vfmvae.se_", 0))').startswith('vfmvae.se_cknna')


def test_a_name_that_is_not_there_is_an_attribute_error_with_the_nearest():
    with pytest.raises(AttributeError, match="module 'vfmvae' has no 'open_tokeniser'; nearest: open_tokenizer"): vfmvae.open_tokeniser  # noqa: B018
    with pytest.raises(ImportError): exec('from vfmvae import nothing_of_the_kind')
    assert not hasattr(vfmvae, '__wrapped__') and not hasattr(vfmvae, '_repr_html_')


def test_what_the_door_gives_can_be_pickled():
    assert fresh('import pickle, vfmvae; print(pickle.loads(pickle.dumps((vfmvae.World, vfmvae.cknna)))[0] is vfmvae.World)') == 'True'


def test_reconstruct_takes_an_image_a_batch_or_a_set_and_any_tokenizer(tmp_path):
    from vfmvae.images import to_pil
    from vfmvae.world import World
    from vfmvae.tokenizer import reconstruct, save_tokenizer, tokenizers
    tok, x = tokenizers['conv-f8d16'], World(5, seed=9).batch(range(5))['image']
    want = reconstruct(tok, x).detach()
    assert want.shape == x.shape and reconstruct(tok, x.clone().requires_grad_()).requires_grad
    close = lambda y, w: torch.testing.assert_close(y.detach(), w, atol=1e-4, rtol=1e-4)
    close(reconstruct('conv-f8d16', x[0]), want[0])
    for data in (World(5, seed=9), list(x)): close(reconstruct(tok, data, batch_size=2), want)
    assert reconstruct(str(save_tokenizer(tmp_path/'a.safetensors', tok)), [to_pil(i) for i in x]).shape == x.shape
    for bad in ((tok, []), ('conv-f8d61', x), (tok, 7)):
        with pytest.raises(UserError): reconstruct(*bad)
