"""The labs in a real browser: chromium drives JupyterLab and Notebook 7, the keyboard moves the controls, and pictures and words must follow.
Set VFMVAE_SHOTS to a folder to keep screenshots in both themes."""
import importlib.util, json, os, shutil, socket, subprocess, sys, time, urllib.request
from pathlib import Path
import pytest
from scope import thorough

ROOT = Path(__file__).resolve().parent.parent
CHROMIUM = next((p for n in ('chromium', 'chromium-browser', 'google-chrome') if (p := shutil.which(n))), None)
LACKS = [m for m in ('playwright', 'ipywidgets') if importlib.util.find_spec(m) is None]
pytestmark = [pytest.mark.skipif(CHROMIUM is None, reason='no chromium; apt-get install chromium'),
              pytest.mark.skipif(bool(LACKS), reason=f"{', '.join(LACKS)} is not installed; pip install -e .[dev]")]
FLAGS = ['--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking', '--disable-component-update',
         '--disable-sync', '--disable-dev-shm-usage']
SLOW = 4 if (os.cpu_count() or 1) < 4 else 2      # patience of every wait, in units of a fast machine's
CELLS = ["import vfmvae.explorer as e\nlab = e.Explorer(n=24, transform='blur', strength=1., image=1)\nlab",
         # a lab that looks like the first, to whose strength slider and mouse nobody listens
         "deaf = e.Explorer(n=24, transform='blur', strength=1., image=1)\nbox = deaf.widget()\n"
         "deaf.controls['strength'].unobserve_all('value')\ndeaf.mouse.reset_callbacks()\nbox",
         *(f'import vfmvae.labs as l\nl.{words}.widget()' for words in ('ReconstructionLab()', 'NeighbourLab(n=24)', 'LayerLab(n=48)', 'SamplerLab(step=6)',
                                                                        'EmbeddingLab(n=48)')),
         "from vfmvae.sampler_lab import PromptLab\nPromptLab(instead='cross', steps=5, step=3).widget()"]
RECONSTRUCTION, NEIGHBOURS, LAYERS, SAMPLER, EMBEDDING, PROMPT = range(2, 8)    # places on the page

# The notebook model says when a run is over: every code cell has a count, and the kernel is idle.
STATE = """() => {
  const p = window.jupyterapp?.shell?.currentWidget, ctx = p?.sessionContext ?? p?.context?.sessionContext;
  const k = ctx?.session?.kernel, m = p?.content?.model;
  if (!k || !m) return {ready: false};
  let todo = 0, errs = [];
  for (let i = 0; i < m.cells.length; i++) {
    const c = m.cells.get(i);
    if (c.type !== 'code') continue;
    if (c.executionCount === null) todo++;
    for (const o of c.outputs.toJSON()) if (o.output_type === 'error') errs.push(o.ename + ': ' + o.evalue);
  }
  return {ready: true, status: k.status, todo, errs};
}"""


def free_port() -> int:
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


# how each is started, and where it opens a notebook
APPS = dict(lab=(['--LabApp.expose_app_in_browser=True', '--LabApp.news_url=', '--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate'],
                 'doc/tree/labs.ipynb?token=t0ken&reset'),
            notebook=(['--JupyterNotebookApp.expose_app_in_browser=True'], 'notebooks/labs.ipynb?token=t0ken'))


@pytest.fixture(scope='module', params=thorough(APPS, ['lab']))
def server(request, tmp_path_factory):
    "JupyterLab or Notebook with settings, configuration and kernels of its own: nothing of the user's is read or written."
    needs = 'jupyterlab' if request.param == 'lab' else 'notebook'
    if importlib.util.find_spec(needs) is None: pytest.skip(f'no {needs}; pip install -e .[dev]')
    flags, place = APPS[request.param]
    home = tmp_path_factory.mktemp('lab')
    (root := home/'work').mkdir()
    code = [dict(cell_type='code', id=f'c{i}', metadata={}, source=s, outputs=[], execution_count=None) for i, s in enumerate(CELLS)]
    (root/'labs.ipynb').write_text(json.dumps(dict(cells=code, metadata=dict(kernelspec=dict(name='python3', display_name='python3', language='python')),
                                                   nbformat=4, nbformat_minor=5)))
    settings = {'notebook-extension/tracker': dict(windowingMode='none')}
    if request.param == 'lab': settings['apputils-extension/notification'] = dict(fetchNews='false', checkForUpdates=False)
    for ext, values in settings.items():
        f = home/'settings/@jupyterlab'/f'{ext}.jupyterlab-settings'
        f.parent.mkdir(parents=True, exist_ok=True)
        f.write_text(json.dumps(values))
    dirs = dict(JUPYTERLAB_SETTINGS_DIR='settings', JUPYTER_CONFIG_DIR='config', JUPYTER_RUNTIME_DIR='runtime', IPYTHONDIR='ipython',
                JUPYTERLAB_WORKSPACES_DIR='workspaces', VFMVAE_HOME='home')
    env = {**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1', 'NO_PROXY': '127.0.0.1', **{k: str(home/d) for k, d in dirs.items()}}
    port = free_port()
    with open(home/'lab.log', 'w') as log:
        run = subprocess.Popen([sys.executable, '-m', 'jupyter', request.param, '--no-browser', '--allow-root', '--ip=127.0.0.1', f'--port={port}',
                                '--ServerApp.port_retries=0', '--IdentityProvider.token=t0ken', f'--ServerApp.root_dir={root}', *flags],
                               env=env, stdout=log, stderr=subprocess.STDOUT)
    try:
        end = time.time()+30*SLOW
        while True:
            assert run.poll() is None and time.time() < end, (home/'lab.log').read_text()[-2000:]
            try:
                urllib.request.urlopen(f'http://127.0.0.1:{port}/api?token=t0ken', timeout=2)
                break
            except OSError: time.sleep(.2)
        yield f'http://127.0.0.1:{port}/{place}'
    finally:
        run.terminate()
        try: run.wait(10)
        except subprocess.TimeoutExpired: run.kill()


def until(page, ok, what: str, seconds: float = 30):
    "Asks again and again until `ok()` answers; its answer."
    end = time.time()+seconds*SLOW
    while time.time() < end:
        if answer := ok(): return answer
        page.wait_for_timeout(60)
    raise AssertionError(f'{what} within {seconds*SLOW} s')


@pytest.fixture(scope='module')
def browser():
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        made = p.chromium.launch(executable_path=CHROMIUM, headless=True, args=FLAGS)
        yield made
        made.close()


@pytest.fixture(scope='module')
def page(server, browser):
    page = browser.new_page(viewport=dict(width=1440, height=1500))
    page.faults = []
    page.on('pageerror', lambda e: page.faults.append(str(e)))
    page.goto(server, wait_until='domcontentloaded')
    until(page, lambda: (s := page.evaluate(STATE))['ready'] and s['status'] == 'idle', 'the kernel did not start', 60)
    page.faults.clear()      # what Jupyter itself trips over before a lab is there
    page.evaluate("() => { window.jupyterapp.commands.execute('notebook:run-all-cells') }")      # not awaited
    def ran() -> dict | None:
        s = page.evaluate(STATE)
        return s if s['ready'] and (s['errs'] or (s['todo'] == 0 and s['status'] == 'idle')) else None
    s = until(page, ran, 'the cells did not run', 60)
    assert not s['errs'], s['errs']
    yield page
    page.close()


class Box:
    "A lab on the page."
    def __init__(self, page, i: int):
        self.page, self.box = page, page.locator('.vfmvae-lab').nth(i)
        self.wait(self.at_rest, f'lab {i} did not finish its picture', 60)
    def wait(self, ok, what: str, seconds: float) -> None:
        "As `until`; a failure says what the lab shows."
        try: until(self.page, ok, what, seconds)
        except AssertionError as e: raise AssertionError(f'{e}: {self.status()} {self.seen()[1][:700]}') from None
    def seen(self) -> tuple[str, str]:
        "(picture, words)"
        return self.box.locator('.vp').inner_html(), self.box.locator('[role=status]').inner_text()
    def status(self) -> str:
        "What is being done, or what went wrong."
        return self.box.locator('.vfmvae-status').inner_text().strip()
    def at_rest(self) -> bool:
        if not self.box.locator('.vp').count() or self.status(): return False
        picture, words = self.seen()
        return 'sampling: ' not in picture and not any(w in words for w in ('comput', 'sampling'))
    def settled(self) -> bool:
        "At rest, and still the same after a moment: a place to click is where it was read."
        now = self.seen()
        self.page.wait_for_timeout(300)
        return self.at_rest() and self.seen() == now
    def still(self) -> tuple[str, str]:
        "What is seen once nothing moves any more: what shall be compared with it later would else be another picture on a slow machine."
        self.wait(self.settled, 'the lab does not come to rest', 30)
        return self.seen()
    def control(self, name: str):
        "What has the focus when this control is used; 'k +' is the button beside the slider k."
        if name[-2:] in (' +', ' -') or name in ('back', 'forward'): return self.box.locator(f'button[title="{name}"]')
        tick = self.box.locator(f'.widget-checkbox label:has(span:text-is("{name}")) input')
        if tick.count(): return tick.first
        row = self.box.locator(f'.widget-inline-hbox:has(> .widget-label:text-is("{name}"))')
        return row.locator('[tabindex="0"], input, select').first if row.count() else self.box.locator(f'button:text-is("{name}")')
    def press(self, name: str, *keys: str) -> None:
        self.control(name).scroll_into_view_if_needed()
        self.control(name).focus()
        for k in keys: self.page.keyboard.press(k) if k in ('Enter', 'Space') or k.startswith(('Arrow', 'Control')) else self.page.keyboard.type(k)
    def changes(self, act, what: str, words: str = '', patience: float = 30) -> None:
        "What is done changes the picture and the words; fails otherwise."
        before = self.seen()
        act()
        def moved() -> bool:
            now = self.seen()
            return self.at_rest() and now[0] != before[0] and now[1] != before[1] and words in now[1]
        self.wait(moved, f'{what} did not change picture and words', patience)
    def moves(self, name: str, *keys: str, words: str = '', patience: float = 30) -> None:
        "The keys change the picture and the words."
        self.changes(lambda: self.press(name, *keys), name, words, patience)
    def part(self, heading: str):
        "The section whose heading has these words."
        return self.box.locator('.vp section', has=self.page.locator(f'h4:has-text("{heading}")')).first


@pytest.fixture(scope='module')
def lab(page): return Box(page, 0)


def shot(page, name: str, part=None) -> None: # part: of the page
    which = 'lab' if '/doc/' in page.url else 'notebook'
    if folder := os.environ.get('VFMVAE_SHOTS'): (part or page).screenshot(path=Path(folder)/f'{which}-{name}.png')


def test_every_control_moves_picture_and_words(lab):
    lab.moves('strength +', 'Space', words='blur 2')
    lab.moves('k -', 'Space', words='of 5 of its own neighbours')
    lab.moves('layer -', 'Space', words='layer 6')
    lab.moves('image', 'Control+a', '7', 'Enter', words='image 7')
    lab.moves('conv-f8d16.photo', 'Space', words='conv-f8d16.photo: reconstruction')
    lab.moves('transform +', 'Space', words='jpeg 70')
    lab.moves('reference_state +', 'Space', words='the VFM sees the clean images')
    lab.moves('metric +', 'Space', words='mutual k-NN')
    shot(lab.page, 'light')
    shot(lab.page, 'explorer', lab.box)


def test_a_click_goes_where_it_points_and_back_comes_back(lab):
    there = lab.still()[1]
    near = lab.part('of its own neighbours').locator('.go').nth(1)
    number = near.get_attribute('aria-label').split()[1]      # 'image 412 ...'
    lab.changes(near.click, 'a neighbour', f'image {number} of')
    lab.still()
    point = lab.box.locator('.vp .spot.go').nth(1)
    lab.changes(lambda: point.click(force=True), 'a point of the curve', 'jpeg ')
    lab.page.mouse.move(2, 2)
    before = lab.still()[0]
    lab.part('VFM photo').locator('.tokens').first.locator('i').nth(20).click()
    lab.wait(lambda: lab.at_rest() and 'cosine' in lab.part('VFM photo').inner_text(), 'a token did nothing', 20)
    assert lab.box.locator('.vp').inner_html() != before
    lab.press('back', 'Space')
    lab.wait(lambda: lab.at_rest() and 'cosine' not in lab.part('VFM photo').inner_text(), 'back did nothing', 20)
    lab.moves('back', 'Space')
    lab.changes(lab.control('back').click, 'back by the mouse')
    assert lab.seen()[1] == there
    lab.moves('forward', 'Space', words=f'image {number} of')


def test_the_mouse_shows_a_card_without_asking_the_kernel(lab):
    near = lab.part('of its own neighbours').locator('figure').nth(2)
    near.scroll_into_view_if_needed()
    card = near.locator('.card')
    def seen() -> bool: return card.is_visible() and card.evaluate('e => getComputedStyle(e).opacity') == '1'
    assert not seen()
    near.locator('.pic').hover()
    until(lab.page, seen, 'no card', 5)
    assert 'image ' in card.inner_text() and lab.at_rest()
    lab.page.mouse.move(2, 2)
    until(lab.page, lambda: not seen(), 'the card stays', 5)


def test_controls_without_a_handler_are_found_out(page):
    deaf = Box(page, 1)
    deaf.moves('k -', 'Space', words='of 5 of its own neighbours')
    with pytest.raises(AssertionError, match=r'strength \+ did not change picture and words'): deaf.moves('strength +', 'Space', patience=1.5)
    with pytest.raises(AssertionError, match='a neighbour did not change'):
        deaf.changes(deaf.part('of its own neighbours').locator('.go').nth(1).click, 'a neighbour', patience=1.5)


OTHER = [
    (RECONSTRUCTION, 'reconstruction', 'edit +', 'Edit: swap'), (NEIGHBOURS, 'neighbours', 'k +', 'of 10 neighbours'),
    (LAYERS, 'layers', 'row +', 'photo, layer 1'), (SAMPLER, 'sampler', 'guidance +', 'guidance 1.5'),
    (EMBEDDING, 'embedding', 'colour -', 'coloured by class'),
    (EMBEDDING, 'umap', 'UMAP, about 40 s', 'by UMAP')]


@pytest.mark.parametrize('place, name, control, words', thorough(OTHER, OTHER[:-1]))
def test_the_other_labs_are_moved_by_the_keyboard_too(page, place, name, control, words):
    other = Box(page, place)
    if name == 'embedding': other.moves('colour +', 'Space', words='coloured by transform')
    other.moves(control, 'Space', words=words, patience=60)
    shot(page, name, other.box)


@pytest.mark.parametrize('place, at, words', [(NEIGHBOURS, ('all against all', 30), 'CKNNA'), (LAYERS, ('', 9), 'CKNNA'), (SAMPLER, ('', 2), 'step 2 of 10'),
                                              (EMBEDDING, ('', 5), 'Image 5')])
def test_a_click_on_a_chart_goes_there(page, place, at, words):
    other = Box(page, place)
    spot = (other.part(at[0]) if at[0] else other.box).locator('.spot.go').nth(at[1])
    other.changes(lambda: spot.click(force=True), 'a click on the chart', words)


def test_a_line_around_points_chooses_their_images(page):
    other = Box(page, EMBEDDING)
    pad = other.box.locator('.pad')
    pad.scroll_into_view_if_needed()
    b = pad.bounding_box()
    corners = [(.02, .02), (.98, .02), (.98, .97), (.02, .97), (.02, .1)]
    def draw() -> None:
        page.mouse.move(b['x']+.02*b['width'], b['y']+.02*b['height'])
        page.mouse.down()
        page.wait_for_timeout(300*SLOW)
        for x, y in corners: page.mouse.move(b['x']+x*b['width'], b['y']+y*b['height'], steps=6); page.wait_for_timeout(120)
        page.mouse.up()
    other.changes(draw, 'a line', 'chosen images: CKNNA', 30)
    assert 'The 48 chosen images' in other.seen()[1]
    shot(page, 'lasso', other.box)
    other.moves('let go', 'Space')
    def leave() -> None:
        "A box; the button goes up outside of the picture, and the mouse comes back."
        pad.scroll_into_view_if_needed()
        b = pad.bounding_box()
        page.mouse.move(b['x']+.02*b['width'], b['y']+.02*b['height'])
        page.keyboard.down('Control')
        page.mouse.down()
        page.wait_for_timeout(300*SLOW)
        for at in (.5, .9, .97): page.mouse.move(b['x']+at*b['width'], b['y']+at*b['height'], steps=6); page.wait_for_timeout(120)
        page.wait_for_timeout(120*SLOW)
        page.keyboard.up('Control')
        page.mouse.move(2, 2)
        page.mouse.up()
        page.mouse.move(b['x']+.5*b['width'], b['y']+.5*b['height'], steps=6)
    other.changes(leave, 'a line whose end was outside', 'The 48 chosen images', 30)
    assert 'polygon' not in ''.join(every(page, '.vfmvae-lab style', 'e => e.textContent'))
    other.moves('let go', 'Space')


def test_a_subset_is_chosen_by_the_keyboard(page):
    other = Box(page, EMBEDDING)
    other.moves('choose 12 more', 'Space', words='The 12 chosen images: CKNNA')
    assert other.part('12 chosen').locator('figure').count() == 12
    other.moves('choose 12 more', 'Space', words='The 24 chosen images: CKNNA')
    other.moves('back', 'Space', words='The 12 chosen images')
    other.moves('choose its group', 'Space')
    shot(page, 'chosen', other.box)
    other.moves('let go', 'Space')


def test_the_trajectory_is_played_by_the_keyboard(page):
    other = Box(page, SAMPLER)
    other.moves('step -', 'Space')
    play, stop = (other.box.locator(f'.widget-play button:has(.fa-{icon})') for icon in ('play', 'pause, .fa-stop'))
    before = other.still()[1]
    play.focus()
    page.keyboard.press('Space')
    other.wait(lambda: other.seen()[1] != before, 'playing moved nothing', 20)
    if stop.count() and stop.first.is_visible(): stop.first.focus(); page.keyboard.press('Space')
    other.wait(other.at_rest, 'it plays on', 20)


def test_a_sentence_is_chosen_and_typed_and_a_word_is_clicked(page):
    other = Box(page, PROMPT)
    assert "'a large cross with" in other.seen()[1]
    other.moves('step +', 'Space', words='step 4 of 5')
    # by the keyboard a list's letters are Jupyter's own commands ('r' makes the cell raw)
    other.changes(lambda: other.control('ground').select_option('red'), 'ground', 'on a red ground')
    looks = other.part('where each word is looked at')
    other.changes(looks.locator('.go').nth(1).click, 'a word', "'a cross ring with")
    shot(page, 'prompt', other.box)
    other.moves('prompt', 'Control+a', 'a small cross on a blue ground', 'Enter', words="'a small cross on a blue ground': step 4")
    before = other.still()
    other.press('prompt', 'Control+a', 'a small crosss', 'Enter')
    other.wait(lambda: "'crosss'" in other.status(), 'an unknown word is not named', 20)
    assert other.seen() == before
    other.moves('prompt', 'Control+a', 'a large square', 'Enter', words="'a large square'")


def test_an_image_of_ones_own(lab, tmp_path):
    from PIL import Image
    Image.radial_gradient('L').convert('RGB').save(tmp_path/'mine.png')
    def choose() -> None:
        with lab.page.expect_file_chooser() as chooser: lab.box.locator('button:has-text("upload")').click()
        chooser.value.set_files(tmp_path/'mine.png')
    lab.changes(choose, 'an upload', 'image mine.png')
    lab.moves('back', 'Space')


def test_bad_input_is_told_at_the_top_and_the_lab_lives_on(lab):
    before = lab.still()
    lab.press('images', 'Control+a', 'nowhere', 'Enter')
    until(lab.page, lambda: 'no folder nowhere' in lab.status(), 'no message')
    assert lab.seen()[0] == before[0] and lab.control('images').input_value() == 'clothes-val'
    lab.moves('image', 'Control+a', '9', 'Enter', words='image 9')


def test_the_picture_has_a_text_and_tab_reaches_every_control(lab):
    assert lab.box.locator('.vp').get_attribute('aria-label') == lab.seen()[1]
    names = ['images', 'image', 'vfm', 'layer', 'transform', 'strength', 'k', 'k -', 'strength +', 'metric', 'reference_state +', 'conv-f8d16.photo',
             'label', 'back']
    for name in names: lab.control(name).evaluate('(e, name) => e.dataset.name = name', name)
    lab.control('images').focus()
    lab.page.keyboard.press('Shift+Tab'); lab.page.keyboard.press('Shift+Tab')
    reached = set()
    for _ in range(60):
        reached.add(lab.page.evaluate('() => document.activeElement.dataset.name || ""'))
        lab.page.keyboard.press('Tab')
    assert {*names} <= reached


def test_slider_and_curve_are_in_one_view_with_four_tokenizers(lab):
    for name in ('vfmvae-efficientnet-f8d16', 'conv-photo-f8d16'): lab.moves(name, 'Space', words=f'{name}: reconstruction')
    lab.page.set_viewport_size(dict(width=1440, height=900))
    try:
        lab.control('strength +').scroll_into_view_if_needed()
        lab.control('strength +').evaluate("e => e.closest('.vfmvae-lab').scrollIntoView({block: 'start'})")
        boxes = [x.bounding_box() for x in (lab.control('strength +'), lab.box.locator('.vp .chart').first)]
        assert all(b['y'] >= 0 and b['y']+b['height'] <= 900 and b['x']+b['width'] <= 1440 for b in boxes), boxes
        shot(lab.page, 'four')
    finally: lab.page.set_viewport_size(dict(width=1440, height=1500))


# text of an element against the first opaque background behind it
CONTRAST = """e => { const n = s => s.match(/[\\d.]+/g).map(Number), f = v => (v /= 255) <= .03928 ? v/12.92 : ((v+.055)/1.055)**2.4,
      l = s => { const [r, g, b] = n(s); return .2126*f(r)+.7152*f(g)+.0722*f(b) };
      let p = e; while (p.parentElement && (n(getComputedStyle(p).backgroundColor)[3] === 0)) p = p.parentElement;
      const svg = e instanceof SVGElement, a = l(getComputedStyle(e)[svg ? 'fill' : 'color']), b = l(getComputedStyle(p).backgroundColor);
      return [a, b, (Math.max(a, b)+.05)/(Math.min(a, b)+.05)] }"""
TEXTS = '.vp h4, .vp figcaption, .vp svg text, .vp .sign, .vp .card, [role=status], .widget-label, .widget-html b'


def every(where, which: str, ask: str) -> list:
    "What `ask` says of each element, found and asked in one step of the page: between two steps a lab may draw itself anew."
    return (where.locator('body') if hasattr(where, 'goto') else where).evaluate(
        f'(box, which) => [...box.querySelectorAll(which)].map({ask})', which)


def contrasts(where):
    return {(tag, text): c for tag, text, c in every(where, TEXTS, f'e => [e.tagName, e.textContent, ({CONTRAST})(e)[2]]')}


def test_it_is_legible_in_the_dark(lab):
    lab.page.evaluate("() => { window.jupyterapp.commands.execute('apputils:change-theme', {theme: 'JupyterLab Dark'}) }")
    # the old theme's styles go before the new ones come: the page says when they are there
    until(lab.page, lambda: lab.page.evaluate("document.body.dataset.jpThemeName") == 'JupyterLab Dark', 'no dark theme')
    lab.still()
    assert every(lab.box, '[role=status]', CONTRAST)[0][1] < .1
    found = contrasts(lab.box)
    assert len(found) > 30 and {k: v for k, v in found.items() if v < 4.5} == {}
    shot(lab.page, 'dark')


def test_nothing_went_wrong_on_the_page(page):
    assert page.faults == []


def test_a_saved_notebook_shows_picture_and_words_without_a_kernel(page, lab):
    words = lab.seen()[1]
    below = page.locator('.jp-OutputArea-child', has=page.locator('.vfmvae-lab')).first.locator('xpath=following-sibling::*[1]//img')
    page.wait_for_timeout(2500)      # a lab that rests brings up to date what is kept
    assert below.count() == 1 and not below.is_visible()      # hidden while the lab lives
    page.evaluate("async () => { await window.jupyterapp.commands.execute('docmanager:save') }")
    page.reload(wait_until='domcontentloaded')
    kept = page.locator('.jp-OutputArea-output img').first
    until(page, lambda: kept.count() and kept.is_visible(), 'no picture in the saved notebook', 60)
    assert words[:60] in page.locator('.jp-RenderedMarkdown.jp-OutputArea-output').first.inner_text()
    assert not page.locator('.vfmvae-lab').count() and 'Explorer(' in page.locator('.jp-RenderedMarkdown.jp-OutputArea-output').first.inner_text()
    shot(page, 'reopened')


# a page for those who have no kernel -------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def exported(tmp_path_factory):
    from vfmvae.explorer import Explorer
    lab = Explorer(n=24, transform='blur', strength=1., image=1, tokenizers=('vfmvae-photo-f8d16', 'conv-f8d16.photo'))
    near = lab.page() and lab.compute(lab.state).nets[0].overlap.near[0]
    at = lab.session.cache(lab.state.images).images.at[near]
    return lab.export(tmp_path_factory.mktemp('export')/'lab.html', strength=[0., 1., 2.], image=[1, at]), at


@pytest.fixture(scope='module', params=['light', 'dark'])
def sheet(request, exported, browser):
    page = browser.new_page(viewport=dict(width=390, height=844), color_scheme=request.param)
    page.asked = []
    page.on('request', lambda r: page.asked.append(r.url))
    page.goto(exported[0].as_uri())
    yield page
    page.close()


def test_an_exported_lab_needs_no_network_and_is_read_on_a_telephone(sheet):
    assert all(u.startswith(('file:', 'data:')) for u in sheet.asked)
    sizes = every(sheet, '.vp h4, .vp figcaption, .vp svg text, [role=status]',
                  'e => e instanceof SVGElement ? e.getBoundingClientRect().height : parseFloat(getComputedStyle(e).fontSize)')
    assert len(sizes) > 20 and min(sizes) >= 8.9, min(sizes)
    assert sheet.evaluate('() => document.documentElement.scrollWidth') <= 390
    assert {k: v for k, v in contrasts(sheet).items() if v < 4.5} == {}


def test_an_exported_lab_is_moved_clicked_linked_and_taken_back(sheet, exported):
    words = sheet.locator('[role=status]')
    sheet.locator('input[type=range]').first.focus()
    sheet.keyboard.press('ArrowRight')
    until(sheet, lambda: 'blur 2' in words.inner_text(), 'the slider does nothing', 5)
    assert 'strength=2' in sheet.url
    mine = sheet.locator('.vp section', has=sheet.locator('h4:has-text("vfmvae-photo-f8d16")')).first
    mine.locator('xpath=following-sibling::*[1]').locator('.go').first.click()
    until(sheet, lambda: f'image {exported[1]} of' in words.inner_text(), 'a neighbour does nothing', 5)
    address = sheet.url
    sheet.go_back()
    until(sheet, lambda: 'image 1 of' in words.inner_text(), 'back does nothing', 5)
    sheet.goto('about:blank')
    sheet.goto(address)
    until(sheet, lambda: f'image {exported[1]} of' in words.inner_text() and 'blur 2' in words.inner_text(), 'the address does not hold the state', 5)


def test_a_click_in_an_export_finds_numbers_names_and_places(browser, tmp_path):
    "JSON of Python and of a browser differ: 45.0 and 45, '\\u00e9' and '\u00e9', [1, 2] and [1,2]; such a click did nothing."
    import numpy as np
    from vfmvae.lab_parts import export_html
    from vfmvae.pages import Page, Section, Tile
    moves = dict(strength=[0., 45.], name=['b', '\u00e9t\u00e9'], place=[(), (.5, .25)], rate=[1., 1e-5])
    at = [[(0, 1)[i >> k & 1] for k in range(4)] for i in range(16)]
    go = [Tile(np.zeros((3, 8, 8)), k, go={k: v[1]}) for k, v in moves.items()]
    frames = {','.join(map(str, i)): [Page([Section('', go)]).html(), 'frame '+''.join(map(str, i))] for i in at}
    axes = [dict(name=k, values=[str(x) for x in v], raw=v, start=0, slide=False) for k, v in moves.items()]
    (tmp_path/'lab.html').write_text(export_html('t', axes, frames, Page([]).style), encoding='utf-8')
    page = browser.new_page()
    page.goto((tmp_path/'lab.html').as_uri())
    words = page.locator('[role=status]')
    for i, k in enumerate(moves):
        page.locator('.vp .go').nth(i).click()
        until(page, lambda: words.inner_text() == 'frame '+'1'*(i+1)+'0'*(3-i), f'a click on {k} does nothing', 5)  # noqa: B023
    page.close()
