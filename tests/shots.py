"""Pictures of the labs for the front page, as a browser shows them: `pytest tests/shots.py` writes data/screenshots/*."""
import io
from pathlib import Path
import pytest
from PIL import Image
import test_browser
from test_browser import APPS, Box, browser, page, pytestmark as needs, server      # noqa: F401

pytestmark = needs
OUT = Path(__file__).resolve().parent.parent/'data'/'screenshots'
WIDE = 760                      # pixels on the page
test_browser.CELLS[:] = [
    "import vfmvae.explorer as e\nlab = e.Explorer(n=128, image=40, tokenizers=('vfmvae-photo-f8d16', 'conv-photo-f8d16'), strength=15.)\nlab.widget()",
    "import vfmvae.labs as l\nl.NeighbourLab(n=96, image=17).widget()", "l.EmbeddingLab(n=96, chosen=range(14)).widget()",
    "l.LayerLab(n=96, row=5, column=3).widget()", "l.SamplerLab(net='dit-vfmvae-tiny-f8d16', step=6, label=3).widget()"]


def taken(box) -> Image.Image:
    "The lab on white, without what stands below its picture, once all its work is done."
    box.wait(lambda: box.at_rest() and not box.box.locator('.widget-hprogress:visible').count(), 'a picture is not whole', 120)
    box.page.mouse.move(2, 2)
    box.page.wait_for_timeout(600)
    im = Image.open(io.BytesIO(box.box.screenshot())).convert('RGB')
    a, b = box.box.locator('.vp').bounding_box(), box.box.bounding_box()
    low = max(c.bounding_box() and c.bounding_box()['y']+c.bounding_box()['height'] or 0 for c in box.box.locator('> .widget-vbox').first.locator('> *').all())
    high = max(a['y']+a['height'], low)-b['y']+8
    return im.crop((0, 0, min(im.width, int(a['x']-b['x']+a['width']+8)), min(im.height, int(high))))


def scaled(im: Image.Image, wide: int) -> Image.Image: return im.resize((wide, round(im.height*wide/im.width)), Image.Resampling.LANCZOS)


@pytest.mark.parametrize('server', [next(iter(APPS))], indirect=True)
def test_the_pictures_of_the_front_page(page):      # noqa: F811
    lab, frames = Box(page, 0), []
    def keep() -> None: frames.append(taken(lab))
    keep()
    for _ in range(3):
        lab.moves('strength +', 'Space')
        keep()
    lab.changes(lab.part('of its own neighbours').locator('.go').nth(2).click, 'a neighbour')
    keep()
    lab.part('VFM photo').locator('.tokens').first.locator('i').nth(28).click()
    lab.wait(lambda: lab.at_rest() and 'cosine' in lab.part('VFM photo').inner_text(), 'a token', 20)
    keep()
    size = frames[0].size
    frames = [scaled(f.crop((0, 0, *size)), WIDE) for f in frames]
    frames[0].save(OUT/'explorer.webp', save_all=True, append_images=frames[1:], duration=1300, loop=0, quality=60, method=6)
    lab.moves('back', 'Space')
    for name in ('vfmvae-efficientnet-f8d16', 'conv-f8d16.photo'): lab.moves(name, 'Space')
    taken(lab).save(OUT/'still.webp', quality=82, method=6)
    others = [scaled(taken(Box(page, i)), 640) for i in range(1, 5)]
    rows = [max(others[i].height, others[i+1].height) for i in (0, 2)]
    whole = Image.new('RGB', (1290, sum(rows)+10), 'white')
    for i, im in enumerate(others): whole.paste(im, (i % 2*650, (i//2)*(rows[0]+10)))
    whole.save(OUT/'others.webp', quality=82, method=6)
