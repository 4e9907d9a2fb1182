"""What settings.ini declares is imported, what is imported is declared, where it is needed: the package imports its core requirements alone at the top
of a module, an extra's through `core.extra`, which names the extra."""
import ast, json, re, sys
from configparser import ConfigParser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# where a package has another name than its module
MODULE = {'pillow': 'PIL', 'scikit-learn': 'sklearn', 'pyyaml': 'yaml', 'umap-learn': 'umap', 'torch-fidelity': 'torch_fidelity', 'ipython': 'IPython',
          'griffelib': 'griffe', 'mkdocs-jupyter': 'mkdocs_jupyter', 'mkdocstrings-python': 'mkdocstrings_handlers'}
# what is used without an import: (file, the words that use it)
USED = {'jupyterlab': ('Makefile', '/jupyter lab'), 'nbconvert': ('Makefile', 'jupyter nbconvert'), 'nbdev': ('Makefile', '/nbdev-export'),
        'ruff': ('Makefile', '/ruff check'), 'mypy': ('Makefile', '/mypy'), 'pytest-xdist': ('Makefile', '--dist loadfile'),
        'mkdocs-material': ('docs/mkdocs.yml', 'name: material'), 'notebook': ('tests/test_browser.py', "'notebook'"),
        'ipykernel': ('nbs/00_core.ipynb', '"name": "python3"')}


def imports(source):
    "Top modules of a piece of code: those of its imports, of `import_module`, `importorskip`, `find_spec` and of `extra`; and those at its top."
    tree = ast.parse(re.sub(r'(?m)^\s*[%!].*', 'pass', source))
    found, top = {}, set()
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import): names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level: names = [node.module]
        elif isinstance(node, ast.Call) and re.search(r'\b(import_module|importorskip|find_spec|extra)$', ast.unparse(node.func)):
            names = [a.value for a in node.args[:1] if isinstance(a, ast.Constant)]
        for name in names: found.setdefault(name.split('.')[0], node)
        if node in tree.body: top |= {n.split('.')[0] for n in names}
    return found, top


def code(folder):
    "path -> source of each module, notebook and script of a folder."
    for f in sorted((ROOT/folder).rglob('*')):
        if f.suffix == '.py' and '_modidx' not in f.name: yield f, f.read_text(encoding='utf-8')
        if f.suffix == '.ipynb' and '.ipynb_checkpoints' not in f.parts:
            cells = json.loads(f.read_text(encoding='utf-8'))['cells']
            for c in cells:
                if c['cell_type'] == 'code': yield f, ''.join(c['source'])


def declared():
    "{'' or the name of an extra: {module: package}}."
    cfg = ConfigParser(delimiters=['='])
    cfg.read(ROOT/'settings.ini', encoding='utf-8')
    def modules(line):
        names = [re.split(r'[<>=\[~!;]', r)[0].lower() for r in line.split()]
        return {MODULE.get(n, n.replace('-', '_')): n for n in names}
    return {k.removesuffix('requirements').removesuffix('_'): modules(v) for k, v in cfg['DEFAULT'].items() if k.endswith('requirements')}


DECLARED = declared()
LOCAL = {f.stem for folder in ('tests', 'benchmarks', 'docs') for f in (ROOT/folder).glob('*.py')} | {'vfmvae'}
USES = {folder: {m: str(f.relative_to(ROOT)) for f, source in code(folder) for m in imports(source)[0]}
        for folder in ('vfmvae', 'nbs', 'tests', 'benchmarks', 'docs')}


def test_what_is_imported_is_declared():
    made_by_tests = {'slow_zoo', 'beside'}
    known = {m for modules in DECLARED.values() for m in modules} | LOCAL | sys.stdlib_module_names | {'setuptools'} | made_by_tests
    missing = {m: f for uses in USES.values() for m, f in uses.items() if m not in known | {'no_such_thing'}}
    assert missing == {}, 'declare them in settings.ini'


@pytest.mark.parametrize('extra', DECLARED)
def test_what_is_declared_is_imported(extra):
    where = {'': ['vfmvae'], 'notebooks': ['vfmvae', 'nbs'], 'dev': ['tests', 'benchmarks', 'docs']}.get(extra, ['vfmvae'])
    unused = [p for m, p in DECLARED[extra].items() if not any(m in USES[w] for w in where) and p not in USED and p != 'setuptools']
    assert unused == [], f'nothing in {where} imports them'
    for package in {*DECLARED[extra].values()} & USED.keys():
        file, words = USED[package]
        assert words in (ROOT/file).read_text(encoding='utf-8'), package


def test_no_package_is_declared_twice_and_no_exception_is_left_over():
    every = [p for modules in DECLARED.values() for p in modules.values()]
    assert len(every) == len({*every}) and {*MODULE, *USED} <= {*every}


def test_a_module_imports_only_the_core_at_its_top():
    allowed = DECLARED[''].keys() | sys.stdlib_module_names | {'vfmvae'}
    found = {f.name: imports(source)[1] - allowed for f, source in code('vfmvae')}
    assert {name: bad for name, bad in found.items() if bad} == {}


def test_the_import_of_an_extra_names_it():
    extra_of = {m: name for name, modules in DECLARED.items() for m in modules if name}
    calls = {}
    for f, source in code('vfmvae'):
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == 'extra' and isinstance(node.args[0], ast.Constant):
                module, name = node.args[0].value.split('.')[0], node.args[1].value
                assert extra_of[module] == name, f'{f.name}: {module} is in [{extra_of[module]}], not in [{name}]'
                calls.setdefault(module, f.name)
    wanted = {m for m, name in extra_of.items() if name not in ('dev', 'notebooks')} | {'umap'}
    assert {*calls} == wanted
