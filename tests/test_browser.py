"""The labs in a real browser: chromium drives JupyterLab and Notebook 7, the keyboard moves the controls, and pictures and words must follow.
Set VFMVAE_SHOTS to a folder to keep screenshots in both themes."""
import importlib.util, json, os, shutil, socket, subprocess, sys, time, urllib.request
from pathlib import Path
import pytest

ROOT = Path(__file__).resolve().parent.parent
CHROMIUM = next((p for n in ('chromium', 'chromium-browser', 'google-chrome') if (p := shutil.which(n))), None)
LACKS = [m for m in ('playwright', 'ipywidgets') if importlib.util.find_spec(m) is None]
pytestmark = [pytest.mark.skipif(CHROMIUM is None, reason='no chromium; apt-get install chromium'),
              pytest.mark.skipif(bool(LACKS), reason=f"{', '.join(LACKS)} is not installed; pip install -e .[dev]")]
FLAGS = ['--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking', '--disable-component-update',
         '--disable-sync', '--disable-dev-shm-usage']
SLOW = 4 if (os.cpu_count() or 1) < 4 else 2      # patience of every wait, in units of a fast machine's
CELLS = ["import vfmvae.explorer as e\nlab = e.Explorer(n=24, transform='blur', strength=1.)\nlab.widget()",
         # a lab that looks like the first, whose strength slider nobody listens to
         "deaf = e.Explorer(n=24, transform='blur', strength=1.)\nbox = deaf.widget()\ndeaf.controls['strength'].unobserve_all('value')\nbox",
         *(f'import vfmvae.labs as l\nl.{words}.widget()' for words in ('ReconstructionLab()', 'NeighbourLab(n=48)', 'LayerLab(n=48)', 'SamplerLab(step=6)',
                                                                        'EmbeddingLab(n=48)'))]
RECONSTRUCTION, NEIGHBOURS, LAYERS, SAMPLER, EMBEDDING = range(2, 7)    # places on the page

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


@pytest.fixture(scope='module', params=APPS)
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
def page(server):
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, headless=True, args=FLAGS)
        page = browser.new_page(viewport=dict(width=1150, height=1500))
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
        browser.close()


class Box:
    "A lab on the page."
    def __init__(self, page, i: int):
        self.page, self.box = page, page.locator('.jp-OutputArea-output > .widget-vbox, .jp-OutputArea-output .jupyter-widgets-view > .widget-vbox').nth(i)
        self.wait(self.at_rest, f'lab {i} did not finish its picture', 60)
    def wait(self, ok, what: str, seconds: float) -> None:
        "As `until`; a failure says what the lab shows."
        try: until(self.page, ok, what, seconds)
        except AssertionError as e: raise AssertionError(f'{e}: {self.box.inner_text()[-500:]}') from None
    def seen(self) -> tuple[str, str]:
        "(picture, words)"
        return self.box.locator('[role=img]').inner_html(), self.box.locator('[role=status]').inner_text()
    def at_rest(self) -> bool:
        return bool(self.box.locator('[role=img]').count()) and not any(w in self.seen()[1] for w in ('comput', 'sampling'))
    def control(self, name: str):
        "What has the focus when this control is used; 'k +' is the button beside the slider k."
        if name[-2:] in (' +', ' -'): return self.box.locator(f'button[title="{name}"]')
        row = self.box.locator(f'.widget-inline-hbox:has(> .widget-label:text-is("{name}"))')
        return row.locator('[tabindex="0"], input, select').first if row.count() else self.box.locator(f'button:text-is("{name}")')
    def press(self, name: str, *keys: str) -> None:
        self.control(name).scroll_into_view_if_needed()
        self.control(name).focus()
        for k in keys: self.page.keyboard.press(k) if k in ('Enter', 'Space') or k.startswith(('Arrow', 'Control')) else self.page.keyboard.type(k)
    def moves(self, name: str, *keys: str, words: str = '', patience: float = 30) -> None:
        "The keys change the picture and the words; fails otherwise."
        before = self.seen()
        self.press(name, *keys)
        def moved() -> bool:
            now = self.seen()
            return self.at_rest() and now[0] != before[0] and now[1] != before[1] and words in now[1]
        self.wait(moved, f'{name} did not change picture and words', patience)


@pytest.fixture(scope='module')
def lab(page): return Box(page, 0)


def shot(page, name: str, part=None) -> None: # part: of the page
    which = 'lab' if '/doc/' in page.url else 'notebook'
    if folder := os.environ.get('VFMVAE_SHOTS'): (part or page).screenshot(path=Path(folder)/f'{which}-{name}.png')


def test_every_control_moves_picture_and_words(lab):
    lab.moves('strength +', 'Space', words='blur 2')
    lab.moves('k -', 'Space', words='of 5 neighbours')
    lab.moves('layer -', 'Space', words='layer 6')
    lab.moves('image', 'Control+a', '7', 'Enter', words='image 7')
    lab.moves('conv-f8d16', 'Space', words='conv-f8d16: reconstruction')
    lab.moves('jpeg', 'Space', words='jpeg 70')
    lab.moves('metric +', 'Space', words='mutual k-NN')
    shot(lab.page, 'light')
    shot(lab.page, 'explorer', lab.box)


def test_a_control_without_a_handler_is_found_out(page):
    deaf = Box(page, 1)
    deaf.moves('k -', 'Space', words='of 5 neighbours')
    with pytest.raises(AssertionError, match=r'strength \+ did not change picture and words'): deaf.moves('strength +', 'Space', patience=1.5)


@pytest.mark.parametrize('place, name, control, words', [
    (RECONSTRUCTION, 'reconstruction', 'noise', 'Edit: noise'), (NEIGHBOURS, 'neighbours', 'k +', 'of 10 neighbours'),
    (LAYERS, 'layers', 'row +', 'tiny, layer 1'), (SAMPLER, 'sampler', 'guidance +', 'guidance 1.5'),
    (EMBEDDING, 'embedding', 'cluster', 'coloured by cluster'),
    (EMBEDDING, 'umap', 'UMAP, about 40 s', 'by UMAP')])
def test_the_other_labs_are_moved_by_the_keyboard_too(page, place, name, control, words):
    other = Box(page, place)
    other.moves(control, 'Space', words=words, patience=60)
    shot(page, name, other.box)


def test_bad_input_is_told_and_the_lab_lives_on(lab):
    before = lab.seen()
    lab.press('images', 'Control+a', 'nowhere', 'Enter')
    until(lab.page, lambda: 'no folder nowhere' in lab.seen()[1], 'no message')
    assert lab.seen()[0] == before[0] and lab.control('images').input_value() == 'clothes-val'
    lab.moves('image', 'Control+a', '9', 'Enter', words='image 9')


def test_the_picture_has_a_text_and_tab_reaches_every_control(lab):
    assert lab.box.locator('[role=img]').get_attribute('aria-label') == lab.seen()[1]
    names = ['images', 'image', 'vfm', 'layer', 'noise', 'rotation', 'strength', 'seed', 'k', 'k -', 'strength +', 'metric', 'conv-f8d16', 'rae-tiny-f8d128']
    for name in names: lab.control(name).evaluate('(e, name) => e.dataset.name = name', name)
    lab.control('images').focus()
    reached = set()
    for _ in range(50):
        reached.add(lab.page.evaluate('() => document.activeElement.dataset.name || ""'))
        lab.page.keyboard.press('Tab')
    assert {*names} <= reached


def test_it_is_legible_in_the_dark(lab):
    lab.page.evaluate("() => { window.jupyterapp.commands.execute('apputils:change-theme', {theme: 'JupyterLab Dark'}) }")
    light = """e => { const n = s => s.match(/[\\d.]+/g).map(Number), f = v => (v /= 255) <= .03928 ? v/12.92 : ((v+.055)/1.055)**2.4,
      l = s => { const [r, g, b] = n(s); return .2126*f(r)+.7152*f(g)+.0722*f(b) };
      let p = e; while (p.parentElement && (n(getComputedStyle(p).backgroundColor)[3] === 0)) p = p.parentElement;
      const a = l(getComputedStyle(e).color), b = l(getComputedStyle(p).backgroundColor); return [a, b, (Math.max(a, b)+.05)/(Math.min(a, b)+.05)] }"""
    def dark(): return (v := lab.box.locator('[role=status]').evaluate(light)) and v[1] < .1 and v
    assert until(lab.page, dark, 'no dark theme')[2] > 4.5
    for label in lab.box.locator('.widget-label').all(): assert label.evaluate(light)[2] > 4.5, label.inner_text()
    shot(lab.page, 'dark')


def test_nothing_went_wrong_on_the_page(page):
    assert page.faults == []
