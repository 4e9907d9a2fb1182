"""`make docs`, once: every page and every name is there, links lead somewhere, no page asks a server, the search finds things, also in a browser."""
import ast, json, re, subprocess, sys
from pathlib import Path
from urllib.parse import unquote, urldefrag

import pytest
from scope import thorough
from test_browser import CHROMIUM, FLAGS, SLOW, until

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


def test_a_notebook_of_the_library_stands_under_the_group_that_its_head_names(site):
    home, want = site[2]['index.html'], {}
    for p in sorted((ROOT/'nbs').glob('[0-9]*.ipynb')):
        head = ''.join(json.loads(p.read_text(encoding='utf-8'))['cells'][0]['source'])
        want.setdefault(re.search(r'(?m)^(\w+) · in:', head)[1], []).append(p.with_suffix('.html').name)
    menu = home[home.index('md-nav--primary'):]
    assert len(want) > 5
    for group, pages in want.items():        # the sub-menu that bears its name
        own = re.search(rf'<nav class="md-nav"[^>]*>\s*<label class="md-nav__title"[^>]*>\s*<span[^>]*></span>\s*{group}\s*</label>(.*?)</nav>', menu, re.S)
        assert own and re.findall(r'href="(\d\w+\.html)"', own[1]) == pages, group


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


def test_names_in_texts_and_types_in_signatures_are_links(site):
    pages = site[2]
    def links(page, code): return re.findall(rf'<a [^>]*href="([^"]*)"[^>]*><code>{re.escape(code)}</code></a>', pages[page])
    assert {*links('reference/align.html', 'knn_graph(a, k)')} == {'neighbours.html#vfmvae.neighbours.knn_graph'}
    found = {(name, to) for name in pages if not name.startswith('reference/') for to in re.findall(r'href="([^"]*reference/\w+\.html#[^"]*)"', pages[name])}
    assert len(found) > 50 and 'reference/align.html' in pages['25_align.html'] and '../25_align.html' in pages['reference/align.html']
    entry = pages['reference/align.html'].split('id="vfmvae.align.cknna"')[1].split('<h3')[0]
    signature = entry.split('<pre>')[1].split('</pre>')[0]
    assert 'href="neighbours.html#vfmvae.neighbours.Features"' in signature
    assert len(re.findall(r'<li\b', entry)) >= 5, 'a list of parameters'


WIDE, PHONE = dict(width=1440, height=900), dict(width=390, height=844)
STARTS = ('learn/06_brittle_and_robust_alignment.html', 'paper/figure2_robustness.html', '32_evaluate.html')
PAGES = ['index.html', 'reference/index.html', 'reference/align.html', 'glossary.html', 'CONTRIBUTING.html', *STARTS]
FOUND = """() => {
  const r = document.getElementById('vfmvae.align.cknna')?.getBoundingClientRect();
  return !!r && r.top >= document.querySelector('.md-header').getBoundingClientRect().bottom-1 && r.bottom <= innerHeight;
}"""


@pytest.fixture(scope='module')
def chromium():
    if CHROMIUM is None: pytest.skip('no chromium; apt-get install chromium')
    with pytest.importorskip('playwright.sync_api').sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, headless=True, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def visit(site, chromium):
    "Opens a page from disk, in a theme and a size; in the end nobody may have asked for more than files, and no script may have failed."
    faults, contexts = [], []

    def guard(route):
        if route.request.url.startswith('file:'): return route.continue_()
        faults.append(route.request.url)
        route.abort()

    def opened(name, theme='light', size=WIDE):
        contexts.append(context := chromium.new_context(viewport=size, color_scheme=theme))
        context.set_default_timeout(10_000*SLOW)
        context.route(re.compile('^(?!data:|blob:)'), guard)
        page = context.new_page()
        page.on('pageerror', lambda e: faults.append(str(e)))
        page.goto((site[0]/name).as_uri())
        return page
    yield opened
    for c in contexts: c.close()
    assert faults == []


def first_hit(page, words):
    "What a search lists first, as seen: the topmost link."
    page.keyboard.type(words)
    page.locator('.md-search-result__link').first.wait_for()
    page.wait_for_timeout(400)
    return min((a for a in page.locator('.md-search-result__link').all() if a.is_visible()), key=lambda a: a.bounding_box()['y'])


@pytest.mark.parametrize('theme', ['light', 'dark'])
@pytest.mark.parametrize('start', thorough(STARTS, STARTS[:1]))
def test_cknna_is_two_clicks_from_anywhere(visit, start, theme):
    page = visit(start, theme)
    page.locator('.md-search__input').click()
    first_hit(page, 'cknna').click()
    until(page, lambda: page.evaluate(FOUND), 'a click on the first hit of the search did not lead to cknna', 10)
    page = visit(start, theme)
    page.locator('.md-tabs__link', has_text='Reference').click()
    page.locator('.md-content li > a:first-child', has_text=re.compile('^cknna$')).click()
    until(page, lambda: page.evaluate(FOUND), 'the index of names did not lead to cknna', 10)


@pytest.mark.parametrize('words', thorough(['compare', 'robustness', 'open_data', 'Tokenizer', 'World'], ['compare', 'World']))
def test_the_search_finds_a_name_before_longer_ones(visit, words):
    page = visit('index.html', 'dark', PHONE)
    page.locator('.md-header label[for=__search]').first.click()
    hit = first_hit(page, words)
    assert hit.locator('h2').inner_text() == words and re.search(rf'/reference/\w+\.html.*#vfmvae\.\w+\.{words}$', hit.get_attribute('href'))


# the texts of a page that one can see and whose contrast with the ground is below 4.5; how many there are in all
FAINT = """() => {
  const pen = Object.assign(document.createElement('canvas'), {width: 1, height: 1}).getContext('2d', {willReadFrequently: true});
  const rgba = s => { pen.clearRect(0, 0, 1, 1); pen.fillStyle = s; pen.fillRect(0, 0, 1, 1);
                      const d = pen.getImageData(0, 0, 1, 1).data; return [d[0], d[1], d[2], d[3]/255]; };
  const over = (a, b) => [0, 1, 2].map(i => a[i]*a[3] + b[i]*(1-a[3]));
  const light = c => { const [r, g, b] = c.map(x => (x /= 255) <= .04045 ? x/12.92 : ((x+.055)/1.055)**2.4); return .2126*r + .7152*g + .0722*b; };
  const faint = new Set(), texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  let n = 0;
  while (texts.nextNode()) {
    const text = texts.currentNode.data.trim(), e = texts.currentNode.parentElement;
    if (!text || e.closest('script, style, noscript, svg') || !e.checkVisibility({opacityProperty: true, visibilityProperty: true})) continue;
    if (e.getBoundingClientRect().width < 2) continue;
    const around = [];
    for (let p = e; p; p = p.parentElement) around.unshift(getComputedStyle(p));
    const ground = around.reduce((b, s) => over(rgba(s.backgroundColor), b), [255, 255, 255]), ink = rgba(getComputedStyle(e).color);
    ink[3] *= around.reduce((o, s) => o*s.opacity, 1);
    const [a, b] = [light(over(ink, ground)), light(ground)], contrast = (Math.max(a, b)+.05)/(Math.min(a, b)+.05);
    n++;
    if (contrast < 4.5) faint.add(`${contrast.toFixed(2)} ${e.tagName}.${e.className} ${text.slice(0, 30)}`);
  }
  return [[...faint].slice(0, 20), n];
}"""


@pytest.mark.parametrize('theme', ['light', 'dark'])
@pytest.mark.parametrize('name', thorough(PAGES, PAGES[::3]))
def test_texts_can_be_read_in_both_themes_and_on_a_phone(visit, name, theme):
    for size in (WIDE, PHONE):
        page = visit(name, theme, size)
        page.wait_for_timeout(300)
        faint, n = page.evaluate(FAINT)
        assert faint == [] and n > 50
        assert page.evaluate('document.documentElement.scrollWidth <= innerWidth')
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r'\d+', ground)[:3])) < 200) == (theme == 'dark')
