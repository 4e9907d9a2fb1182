"""The labs where no JupyterLab is: as VS Code and Colab show them, by the HTML manager of ipywidgets, here on a page without a kernel.
Its script is no Python package: npm brings it, and the page is skipped without npm or a network."""
import json, re, shutil, subprocess, tarfile
from pathlib import Path
import pytest
from vfmvae.files import data_dir
from vfmvae.explorer import Explorer
from vfmvae.labs import EmbeddingLab, LayerLab, NeighbourLab, ReconstructionLab
from vfmvae.sampler_lab import PromptLab, SamplerLab
from test_browser import browser, contrasts, every, CHROMIUM, LACKS, shot      # noqa: F401

NAMES = ('vfm-photo', 'vfmvae-photo-f8d16')
pytestmark = [pytest.mark.skipif(not all((data_dir()/'weights'/f'{n}.safetensors').is_file() for n in NAMES), reason='the bundled weights are not there'),
              pytest.mark.skipif('ipywidgets' in LACKS, reason='no ipywidgets; pip install -e .[dev]')]
CORE = {'@jupyter-widgets/base', '@jupyter-widgets/controls', 'ipyevents'}      # without ipyevents the controls do the same
MAKE = dict(explorer=lambda: Explorer(n=24, k=4, transform='hflip', strength=1., tokenizers=('vfmvae-photo-f8d16', 'conv-photo-f8d16')),
            reconstruction=lambda: ReconstructionLab(edit='mask'), neighbours=lambda: NeighbourLab(n=24, k=4), layers=lambda: LayerLab(n=24, k=4),
            embedding=lambda: EmbeddingLab(n=24, chosen=range(12)), sampler=lambda: SamplerLab(net='dit-vfmvae-tiny-f8d16', step=3, steps=5),
            prompt=lambda: PromptLab(instead='cross', step=3, steps=5))


@pytest.fixture(scope='module')
def labs():
    made = {name: make() for name, make in MAKE.items()}
    for lab in made.values():
        lab.widget()
        lab.settle()
    return made


@pytest.mark.parametrize('name', MAKE)
def test_the_state_of_a_lab_is_whole_and_of_core_widgets_only(labs, name):
    from ipywidgets.embed import embed_data
    lab = labs[name]
    kept = json.loads(json.dumps(embed_data(views=[lab.widget()]), allow_nan=False))
    models = kept['manager_state']['state']
    assert {s['model_id'] for s in kept['view_specs']} == {lab.widget().model_id} and {m['model_module'] for m in models.values()} <= CORE
    assert {*re.findall('IPY_MODEL_([0-9a-f]+)', json.dumps(kept))} <= {*models}
    parts = [lab.picture, lab.sheet, lab.readout, lab.status, lab._back, *(getattr(c, 'box', c) for c in lab.controls.values())]
    assert {p.model_id for p in parts} <= {*models} and models[lab.picture.model_id]['state']['value'] == lab.picture.value


SCRIPTS = {'@jupyter-widgets/html-manager@1.0.15': 'dist/embed-amd.js', 'requirejs@2.3.8': 'require.js'}


@pytest.fixture(scope='module')
def scripts(tmp_path_factory):
    "What a page of ipywidgets loads: end of the address -> file."
    if not shutil.which('npm'): pytest.skip('no npm; apt-get install npm')
    home = tmp_path_factory.mktemp('npm')
    try: got = subprocess.run(['npm', 'pack', '--silent', '--fetch-retries=0', *SCRIPTS], cwd=home, capture_output=True, text=True, timeout=120)
    except subprocess.TimeoutExpired: pytest.skip('npm did not bring the HTML manager within two minutes')
    if got.returncode: pytest.skip(f'npm did not bring the HTML manager: {got.stderr[-200:]}')
    found = {}
    for archive, inside in zip(got.stdout.split(), SCRIPTS.values(), strict=True):
        with tarfile.open(home/archive) as f: f.extract(f'package/{inside}', home/archive.split('-')[0], filter='data')
        found[Path(inside).name] = home/archive.split('-')[0]/'package'/inside
    return found


@pytest.fixture(scope='module')
def sheet(labs, scripts, browser, tmp_path_factory):      # noqa: F811
    "All labs on one page of `ipywidgets.embed`, in a browser whose network gives it those two scripts and nothing else."
    from ipywidgets.embed import embed_minimal_html
    path = tmp_path_factory.mktemp('embed')/'labs.html'
    embed_minimal_html(path, views=[lab.widget() for lab in labs.values()], title='labs')
    path.write_text(re.sub(' integrity="[^"]*"', '', path.read_text()))      # npm has the script as it was written, not as it was made small
    page = browser.new_page(viewport=dict(width=1200, height=1500))
    page.faults, page.asked = [], []
    page.on('pageerror', lambda e: page.faults.append(str(e)))
    # in a network that gives nothing else there are neither clicks on the picture nor the icons of buttons
    page.on('console', lambda m: page.faults.append(m.text) if m.type == 'error' and not re.search('ipyevents|ERR_F', m.text) else None)
    page.on('requestfailed', lambda r: page.faults.append(r.url) if not re.search(r'/ipyevents(@|\.js)|\.(woff2?|ttf)$', r.url) else None)
    def give(route) -> None:
        known = scripts.get(Path(route.request.url).name) or scripts.get(Path(route.request.url).name.replace('.min', ''))
        page.asked.append(route.request.url)
        route.fulfill(path=known, headers={'content-type': 'text/javascript', 'access-control-allow-origin': '*'}) if known else route.abort()
    page.route(re.compile('^http'), give)
    page.goto(path.as_uri())
    page.add_style_tag(content='html{background:white}')      # as a browser shows a page that says nothing
    try: page.locator('.vfmvae-lab .vp').nth(len(labs)-1).wait_for(timeout=60_000)
    except Exception as e: raise AssertionError(f'no labs on the page: {page.faults}, {page.asked}') from e
    yield page
    page.close()


@pytest.mark.skipif(CHROMIUM is None or bool(LACKS), reason='no chromium or no playwright')
@pytest.mark.parametrize('name', MAKE)
def test_a_page_without_jupyter_shows_rail_picture_and_words(labs, sheet, name):
    lab, box = labs[name], sheet.locator('.vfmvae-lab').nth([*MAKE].index(name))
    box.scroll_into_view_if_needed()
    assert box.locator('.vp').get_attribute('aria-label') == lab.text() == box.locator('[role=status]').inner_text()
    rail, picture = (x.bounding_box() for x in (box.locator('> .widget-vbox').first, box.locator('.vp')))
    assert rail['width'] >= 300 and rail['x']+rail['width'] <= picture['x'] and picture['width'] > 400 and picture['height'] > 200
    shown = box.locator('.widget-label').all_inner_texts()
    for n, c in lab.controls.items():
        if getattr(c, 'box', c) in lab.rail.children and lab.panel(lab.state)[n].kind not in ('button', 'play', 'file'): assert n in shown, n
    assert box.locator('.vp .pic').count() == sum(len(s.tiles) for s in lab._page.sections)+box.locator('.vp .card .pic').count()
    assert all(every(box, '.vp img', 'e => e.naturalWidth > 0'))
    # a number on a cell of a heat map has the colour of its cell behind it
    assert {k: v for k, v in contrasts(box).items() if v < 4.5 and not (k[0] == 'text' and re.fullmatch(r'\d\.\d\d', k[1]))} == {}
    shot(sheet, f'embed-{name}', box)


@pytest.mark.skipif(CHROMIUM is None or bool(LACKS), reason='no chromium or no playwright')
def test_nothing_went_wrong_on_that_page(sheet, scripts):
    assert sheet.faults == [] and len({*sheet.asked}) == len(scripts)+1, sheet.asked      # and ipyevents, in vain
