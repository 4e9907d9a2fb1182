"Laws of the pages: everything public has its entry, and a page asks no server."
import ast, importlib.util, re
from pathlib import Path
import pytest
from vfmvae.docs import find_pages, main, reference

ROOT = Path(__file__).resolve().parent.parent
needs_nbconvert = pytest.mark.skipif(importlib.util.find_spec('nbconvert') is None, reason='nbconvert is not installed; pip install -e .[dev]')


@pytest.mark.parametrize('file', sorted((ROOT/'vfmvae').glob('[a-z]*.py')), ids=lambda f: f.stem)
def test_every_public_function_and_class_has_its_entry_and_no_other(file):
    source = file.read_text()
    made = {n.name for n in ast.parse(source).body if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    names = next(ast.literal_eval(n.value) for n in ast.parse(source).body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == '__all__')
    assert set(re.findall(r'(?m)^### (\w+)$', reference(source))) == made & {*names}


def test_bodies_stay_out_and_decorated_and_one_line_definitions_stay_whole():
    text = reference("""__all__ = ['f', 'g', 'C']
@cache
def f(a: int = 3): return a**5
def g(x, # metres
      *more):
    'Words: with a colon.'
    return secret
class C(B):
    'A thing.'
    size: int = 2   # pixels
    _own: int = 3
    def __init__(self, n: int = 1): # how many
        self.n = n
    def go(self) -> None: 'Goes.'
""")
    for seen in ('def f(a: int = 3):', '# metres', '*more):', 'Words: with a colon.', 'size: int = 2   # pixels', '# how many', '#### go', 'Goes.'):
        assert seen in text, seen
    for unseen in ('a**5', 'secret', '_own', 'self.n'): assert unseen not in text, unseen


@needs_nbconvert
def test_a_page_asks_no_server_and_its_links_lead_somewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    main(['--out', str(tmp_path), 'index', '03_features', 'learn/05_neighbours_by_hand'])
    files = {f.relative_to(tmp_path).as_posix(): f.read_text() for f in tmp_path.rglob('*.html')}
    assert {*files} == {'index.html', '03_features.html', 'learn/05_neighbours_by_hand.html'}
    known = {f'{p.path}.html' for p in find_pages(ROOT/'nbs')}
    for name, page in files.items():
        assert not re.search(r'<(script|link|img|iframe)[^>]*(src|href)="(?!data:|#)|import[(].https?:|@import', page), name
        links = [(tmp_path/name).parent/href for href in re.findall(r'<a href="([^"#:]+\.html)', page)]
        assert links and {f.resolve().relative_to(tmp_path.resolve()).as_posix() for f in links} <= known
    for page in files.values(): assert 'No description' not in page
    assert 'Picture to: ' in files['index.html']
    assert len(re.findall('<dt>', files['index.html'])) == len(known)-1
    assert '#| export' not in files['03_features.html'] and '#| hide' not in files['learn/05_neighbours_by_hand.html']


@pytest.mark.parametrize('words, said', [(['14_flaw'], "no notebook '14_flaw'"), (['--nbs', 'nowhere'], 'no notebooks in nowhere')])
def test_what_is_no_notebook_is_told(tmp_path, monkeypatch, capsys, words, said):
    pytest.importorskip('nbformat')
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit): main(['--out', str(tmp_path), *words])
    assert said in capsys.readouterr().err and not any(tmp_path.iterdir())
