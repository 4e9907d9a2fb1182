"""`make docs`, once: every page and every name is there, links lead somewhere, no page asks a server, the search finds things."""
import ast, json, re, subprocess, sys
from pathlib import Path
from urllib.parse import unquote, urldefrag

import pytest

ROOT = Path(__file__).resolve().parent.parent
MODULES = sorted(p.stem for p in (ROOT/'vfmvae').glob('*.py') if not p.stem.startswith('_'))


@pytest.fixture(scope='module')
def site(tmp_path_factory):
    "The folder of the pages; what the generator said; path -> text."
    pytest.importorskip('mkdocs_jupyter')
    pytest.importorskip('mkdocstrings_handlers')
    out = tmp_path_factory.mktemp('docs')
    made = subprocess.run([sys.executable, 'docs/build.py', '--out', out], cwd=ROOT, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr[-3000:]
    pages = {f.relative_to(out).as_posix(): f.read_text(encoding='utf-8') for f in out.rglob('*.html')}
    return out, made.stderr, pages


def anchors(page): return set(re.findall(r'\bid="([^"]+)"', page))


def test_each_notebook_and_each_module_has_its_page(site):
    out, said, pages = site
    notebooks = {p.relative_to(ROOT/'nbs').with_suffix('.html').as_posix() for p in (ROOT/'nbs').rglob('*.ipynb')
                 if '.ipynb_checkpoints' not in p.parts}
    assert notebooks | {f'reference/{m}.html' for m in MODULES} | {'reference/index.html', 'glossary.html', 'CONTRIBUTING.html'} == pages.keys() - {'404.html'}
    assert not re.search(r'ERROR|Could not find', said), said


def test_every_group_of_the_library_has_its_pages(site):
    # the groups begin at numbers of notebooks; whoever renumbers those moves them
    home = site[2]['index.html']
    groups = dict(ast.literal_eval(re.search(r'(?s)^GROUPS = (\{.*?\})', (ROOT/'docs'/'build.py').read_text(), re.M)[1]))
    numbers = sorted(int(re.match(r'\d+', p.name)[0]) for p in (ROOT/'nbs').glob('[0-9]*.ipynb'))
    starts = sorted(groups)
    for first, last in zip(starts, [*starts[1:], 100], strict=True):
        assert any(first <= n < last for n in numbers), groups[first]
        assert groups[first] in re.sub(r'\s+', ' ', home), groups[first]


@pytest.mark.parametrize('module', MODULES)
def test_every_public_function_and_class_has_its_entry(site, module):
    tree = ast.parse((ROOT/'vfmvae'/f'{module}.py').read_text(encoding='utf-8'))
    lists = [n.value for n in tree.body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == '__all__']
    names = ast.literal_eval(lists[0]) if lists else []
    wanted = {f'vfmvae.{module}.{n.name}' for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef) and n.name in names}
    assert wanted <= anchors(site[2][f'reference/{module}.html'])
    for name in wanted: assert f'{module}.html#{name}"' in site[2]['reference/index.html'], name


def test_comments_of_parameters_and_fields_are_shown(site):
    page = site[2]['reference/world.html']
    source = (ROOT/'vfmvae'/'world.py').read_text(encoding='utf-8')
    one = re.search(r'^def \w+\((?:\n\s+)?\w+: .*?# ([a-z ]{8,})$', source, re.M)
    assert one and one[1].strip() in page


def test_links_lead_somewhere(site):
    out, _, pages = site
    known, broken, seen = {name: anchors(page) for name, page in pages.items()}, [], 0
    for name, page in pages.items():
        if name == '404.html': continue
        for link in re.findall(r'<(?:a|img|script|link)\b[^>]*?\b(?:href|src)="([^"]+)"', page):
            to, mark = urldefrag(link)
            if re.match(r'[a-z]+:', to): continue
            target = (out/name).parent/unquote(to) if to else out/name
            if target.is_dir(): target = target/'index.html'
            seen += 1
            inside = target.resolve().relative_to(out.resolve()).as_posix()
            if not target.is_file() or mark and inside in known and unquote(mark) not in known[inside]: broken.append((name, link))
    assert not broken and seen > 1000, broken[:10]


def test_no_page_asks_a_server(site):
    out, _, pages = site
    asks = r'<(?:script|link|img|iframe|source)\b[^>]*?(?:src|href)="(?:https?:)?//|url\(["\']?(?:https?:)?//|@import ["\']?(?:https?:)?//'
    for name, page in pages.items():
        assert re.findall(asks, page) == [] and 'pre class="mermaid"' not in page, name        # scripts of others only load for diagrams
    for f in out.rglob('*.css'): assert re.findall(asks, f.read_text(encoding='utf-8')) == [], f


def test_hidden_cells_are_left_out_and_pictures_are_described(site):
    for name, page in site[2].items():
        assert not re.search(r'(?m)^#\| ?(export|hide)', re.sub(r'<[^>]+>', '', page)) and 'No description' not in page, name
    assert 'Picture to: ' in site[2]['index.html']


def test_the_search_knows_pages_and_names(site):
    out = site[0]
    entries = json.loads((out/'search'/'search_index.json').read_text(encoding='utf-8'))['docs']
    places = {e['location'] for e in entries}
    assert 'reference/align.html#vfmvae.align.cknna' in places and any(p.startswith('paper/') for p in places)
    assert (out/'search'/'search_index.js').is_file() and (out/'objects.inv').is_file()
    assert 'iframe-worker.js' in site[2]['index.html']          # the search of a page opened from disk
