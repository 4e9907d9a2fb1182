"""Every cell with `#| cuda` runs: at a smoke size, on a CPU, with the cells of its notebook that it needs and nothing else (`smoke.py` makes its world)."""
import ast, builtins, io, json, os, re
from contextlib import redirect_stdout
from pathlib import Path

import matplotlib
import nbformat
import pytest
from scope import thorough
import smoke

from vfmvae.files import home

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = {p.stem: p for p in sorted((ROOT/'nbs').rglob('*.ipynb')) if '.ipynb_checkpoints' not in p.parts}
COST = re.compile(r'\d h\b|\bhours\b|\bminutes\b')
RUN = {'figure5_stages': 'latent_diffusion'}         # whose training it draws
# where two notebooks mean other things by one name
OWN = {'figures7_12_samples': dict(NET='reg.pt'), 'figure6_reconstructions': dict(IMAGES='folder/of/pictures')}
LEAVES = {'figure1_approaches': ['f16d32.safetensors'], 'figure2_robustness': ['figure2_imagenet.json', 'figure2_imagenet.png'],
          'figure3_architecture': ['vfmvae-siglip2l-f16d32.safetensors'], 'figure4_layers': ['figure4_imagenet.csv'],
          'figure5_stages': ['figure5_imagenet.png'],
          'figure6_reconstructions': ['figure6_photographs.csv'], 'figures7_12_samples': [f'figure{k}_class{c}.png' for k, c in ((7, 232), (12, 980))],
          'latent_diffusion': ['reg-80ep.safetensors'], 'photographs': ['vfmvae-siglip2l-f16d32.safetensors'], 'table1_tokenizers': ['table1_imagenet.json'],
          'table2_generation': ['table2_reg-80ep.json', 'reg-80ep-samples-1/000007.png'], 'table5_ablation': ['table5-no-fusion.json'],
          'text_to_image': ['vfmvae-lumina.safetensors', 'vfmvae-lumina-samples/000001.png'],
          'table6_vfms': ['table6-dinov2-l.safetensors', 'table6-dinov2-l-dit.safetensors']}

def cells_of(path): return [c.source for c in nbformat.read(path, as_version=4).cells if c.cell_type == 'code']

def flagged(source): return re.search(r'^#\|\s*cuda\b', source, re.M) is not None

def names(source):
    "(names that a cell binds, names that it reads and does not bind)."
    bound, read = set(), set()
    for n in ast.walk(ast.parse(source)):
        if isinstance(n, ast.Name): (bound if isinstance(n.ctx, ast.Store) else read).add(n.id)
        elif isinstance(n, ast.FunctionDef | ast.ClassDef): bound.add(n.name)
        elif isinstance(n, ast.Import | ast.ImportFrom): bound |= {(a.asname or a.name).split('.')[0] for a in n.names}
    return bound, read-bound-set(dir(builtins))

def needed(cells):
    "The flagged cells and those before them whose names they read, directly or not."
    kept = {i for i, c in enumerate(cells) if flagged(c)}
    todo, known = sorted(kept), [names(c) for c in cells]
    while todo:
        i = todo.pop()
        for name in known[i][1]:
            before = [j for j in range(i) if name in known[j][0]]
            if before and before[-1] not in kept:
                kept.add(before[-1])
                todo.append(before[-1])
    return [cells[i] for i in sorted(kept)]

class Said(io.StringIO):
    "What is printed; `early`: a cost was said while nothing was written yet."
    early = False
    def write(self, text):
        if COST.search(text) and not [p for p in Path('.').iterdir() if p.suffix]: self.early = True
        return super().write(text)

def run(notebook, folder, environment):
    "Runs the needed cells in `folder`; what they said, and their names."
    matplotlib.use('Agg')
    space, said = {'__name__': '__main__'}, Said()
    folder.mkdir(exist_ok=True)
    here = os.getcwd()
    os.chdir(folder)
    try:
        with smoke.world(environment, step=4), redirect_stdout(said):
            for source in needed(cells_of(NOTEBOOKS[notebook])): exec(compile(source, notebook, 'exec'), space)
    finally: os.chdir(here)
    return said, space

CUDA = [name for name, p in NOTEBOOKS.items() if any(map(flagged, cells_of(p)))]

@pytest.fixture(scope='module')
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp('smoke')
    return folder, smoke.files(folder)

def test_every_notebook_with_such_cells_is_known():
    assert set(CUDA) == set(LEAVES)
    for name in CUDA: assert not re.search(r"\.cuda\(\)|'cuda'", '\n'.join(cells_of(NOTEBOOKS[name]))), name

ON_A_CARD = ['figure4_layers', 'figure5_stages', 'figure6_reconstructions', 'figures7_12_samples', 'table2_generation']

@pytest.mark.parametrize('notebook', thorough(CUDA, [n for n in CUDA if n not in ON_A_CARD]))
def test_cells_run(notebook, made, tmp_path, monkeypatch):
    monkeypatch.setenv('VFMVAE_HOME', str(tmp_path/'home'))
    folder, environment = made
    environment = environment | {k: str(folder/v) for k, v in OWN.get(notebook, {}).items()}
    if notebook in RUN: run(RUN[notebook], tmp_path/'out', environment)
    said, space = run(notebook, tmp_path/'out', environment)
    assert said.early or notebook in RUN, said.getvalue()
    assert COST.search(said.getvalue())
    for file in LEAVES[notebook]: assert (tmp_path/'out'/file).is_file(), (file, said.getvalue())
    if notebook in AFTER: AFTER[notebook](space)

def precision_and_recall(space):
    assert all({'fd', 'sfid', 'is', 'precision', 'recall'} <= set(r['metrics']) for r in space['records'].values())

def own_scale(space):
    assert space['tok'].stats.fitted and max(abs(a-b) for a, b in zip(space['tok'].stats.std.tolist(), space['end'].meta['scale']['std'], strict=True)) < 1e-6

def published_crop(space):
    manifest = json.loads(next((home()/'latents').glob('*/manifest.json')).read_text())
    assert "crop 'adm'" in manifest['data'] and manifest['n'] == 16 and len(manifest['classes']) == 1000

AFTER = {'table2_generation': precision_and_recall, 'figure5_stages': own_scale, 'latent_diffusion': published_crop,
         'figure4_layers': lambda space: space['tok'].stats.std.eq(2).all() or pytest.fail('the statistics were forgotten')}

@pytest.mark.parametrize('notebook', ON_A_CARD)
def test_cells_put_all_on_one_device(notebook, made, tmp_path, monkeypatch):
    "Where there is a card, though a pretended one, that refuses to mix devices."
    fakecuda = pytest.importorskip('fakecuda')
    with fakecuda.cuda(): test_cells_run(notebook, made, tmp_path, monkeypatch)

@pytest.mark.parametrize('notebook', CUDA)
def test_cells_say_what_is_missing(notebook, tmp_path, monkeypatch):
    "Without files they ask for them, and start nothing."
    import vfmvae.recipes
    monkeypatch.setenv('VFMVAE_HOME', str(tmp_path/'home'))
    monkeypatch.setattr(vfmvae.recipes, 'estimate', lambda *a, **k: print('0 h'))
    said, _ = run(notebook, tmp_path/'out', {})
    assert re.search(r'\bset [A-Z]|train it with', said.getvalue()) and not list((tmp_path/'out').iterdir()), said.getvalue()
