"""How soon is a lab's new picture on the screen of JupyterLab, and a card under the mouse? Measured in the page, by its own clock:

    BENCH_OUT=rows.json pytest benchmarks/browser.py        # `benchmarks/speed.py labs` calls it

The clock runs from a click on a button of a control to the frame after the picture with new words. A card waits 125 ms by design before it is seen:
its seconds are counted from the end of those.
"""
import json, os, sys
from pathlib import Path
import numpy as np
import pytest

sys.path.append(str(Path(__file__).resolve().parent.parent/'tests'))
import test_browser
from test_browser import APPS, Box, browser, page, pytestmark as needs, server      # noqa: F401

pytestmark = needs
test_browser.CELLS[:] = [
    "import vfmvae.explorer as e\nlab = e.Explorer(n=256, tokenizers=('vfmvae-photo-f8d16', 'conv-photo-f8d16'))\nlab.widget()",
    "import vfmvae.labs as l\nl.EmbeddingLab(n=256).widget()", "l.ReconstructionLab(edit='noise').widget()"]
MOVE = """(button) => new Promise((done, fail) => {
  const lab = button.closest('.vfmvae-lab'), words = () => lab.querySelector('.vp')?.getAttribute('aria-label'), before = words(), t = performance.now(),
    o = new MutationObserver(() => { if (words() && words() !== before) {
      o.disconnect(); requestAnimationFrame(() => setTimeout(() => done((performance.now()-t)/1000))) } });
  o.observe(lab, {childList: true, subtree: true});
  setTimeout(() => fail(new Error('no new picture')), 60000);
  button.click() })"""
HOVER = """(place) => { window.card = new Promise(done => { setTimeout(() => done(null), 5000); place.addEventListener('mouseenter', () => {
  const card = place.matches('.spot') ? place.querySelector('.card') : place.parentElement.querySelector('.card'), t = performance.now(),
    look = () => getComputedStyle(card).opacity === '1' ? done((performance.now()-t-125)/1000) : requestAnimationFrame(look);
  look() }, {once: true}) }) }"""


def row(seconds: list[float]) -> dict:
    return dict(events=len(seconds), p50=float(np.median(seconds)), p95=float(np.quantile(seconds, .95)), worst=max(seconds))


def moved(box: Box, name: str, times: int, there: str = '---', back: str = '+++') -> dict:
    "A control to and fro."
    seen = []
    for i in range(times):
        box.wait(box.at_rest, 'the lab', 60)
        seen.append(box.control(f'{name} {(there+back)[i % len(there+back)]}').evaluate(MOVE))
    return row(seen)


def hovered(box: Box, places: str, times: int) -> dict:
    "Place after place, with the mouse elsewhere in between."
    seen = []
    for i in range(times):
        place = box.box.locator(places).nth(i)
        place.scroll_into_view_if_needed()
        box.page.mouse.move(2, 2)
        place.evaluate(HOVER)
        place.hover(force=True)
        seen.append(box.page.evaluate('() => window.card'))
    return row([s for s in seen if s is not None])      # a point may lie below another


@pytest.mark.parametrize('server', [next(iter(APPS))], indirect=True)
def test_seconds_in_the_page(page):      # noqa: F811
    test_browser.SLOW = max(4, test_browser.SLOW)      # the first pictures wait for the features of 256 images
    explorer, embedding, reconstruction = (Box(page, i) for i in range(3))
    rows = {'explorer, two tokenizers, strength, in JupyterLab': moved(explorer, 'strength', 24),
            'embedding, colour, in JupyterLab': moved(embedding, 'colour', 12, '++', '--'),
            'reconstruction, amount, in JupyterLab': moved(reconstruction, 'amount', 24),
            'explorer, card of a neighbour, after its 125 ms': hovered(explorer, '.pic.sprite.go', 12),
            'embedding, card of a point, after its 125 ms': hovered(embedding, '.spot.go', 12)}
    Path(os.environ['BENCH_OUT']).write_text(json.dumps(rows))
