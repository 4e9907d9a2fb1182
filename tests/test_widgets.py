"Laws of the labs: colours, states, the figure as a pure function, and controls that are moved without a browser."
import asyncio, base64, html, io, json, re, sys, threading
from dataclasses import dataclass, replace
import numpy as np
import pytest
import torch
from PIL import Image
from vfmvae.core import UserError
from vfmvae.files import data_dir
from vfmvae.images import TRANSFORMS
from vfmvae.world import World
from vfmvae.plots import Chart, Page, Section, Tile, to_png
from vfmvae.colours import pca_colours
from vfmvae.lab_base import Control, Job, Lab, Latest
from vfmvae.keeps_lab import KeepsLab, KeepsState

NAMES = ('vfm-tiny', 'vfmvae-tiny-f8d16')
MISSING = [n for n in NAMES if not (data_dir()/'weights'/f'{n}.safetensors').is_file()]
weights = pytest.mark.skipif(bool(MISSING), reason=f"the bundled weights {', '.join(MISSING)} are not there; nbs/train makes them")


def latents(*shape, seed=0):
    z = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return z*torch.linspace(4, 1, shape[1])[:, None, None]   # well separated axes


# colours ---------------------------------------------------------------------------------------------------------------------------------------

def test_colours_do_not_depend_on_how_latents_are_grouped():
    z = latents(6, 16, 4, 8)
    torch.testing.assert_close(torch.cat(pca_colours([z[:1], z[1:4], z[4:]])), pca_colours(z), rtol=0, atol=1e-5)


def test_colours_of_tokens_are_those_of_the_grid():
    z = latents(3, 8, 5, 5)
    assert torch.equal(pca_colours(z.flatten(2).transpose(1, 2)), pca_colours(z))


@pytest.mark.parametrize('scale, shift', [(1e-3, 0.), (50., 0.), (1., 1000.)])
def test_colours_know_neither_unit_nor_origin(scale, shift):
    z = latents(4, 8, 6, 6).double()
    torch.testing.assert_close(pca_colours(z*scale+shift), pca_colours(z), rtol=0, atol=1e-5)


def test_colours_of_grids_of_several_sizes_share_one_full_range():
    parts = pca_colours([latents(1, 8, 8, 8), latents(2, 8, 2, 2, seed=1), latents(1, 8, 4, 6, seed=2)])
    assert [tuple(p.shape) for p in parts] == [(1, 3, 8, 8), (2, 3, 2, 2), (1, 3, 4, 6)]
    flat = torch.cat([p.transpose(0, 1).flatten(1) for p in parts], 1)
    assert flat.amin(1).tolist() == [0, 0, 0] and flat.amax(1).tolist() == [1, 1, 1]


def test_the_first_component_is_the_strongest_direction_with_its_largest_entry_up():
    z = torch.zeros(1, 5, 4, 4)
    z[0, 2] = -torch.arange(16.).view(4, 4)*10
    z[0, 4] = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))*1e-3
    red = pca_colours(z)[0, 0].flatten()
    assert (red.diff() < 0).all()   # channel 2 falls, and the axis points along +channel 2


@pytest.mark.parametrize('bad', [[], torch.zeros(3, 4), [torch.zeros(1, 4, 2, 2), torch.zeros(1, 3, 2, 2)], torch.full((1, 4, 2, 2), float('inf'))])
def test_colours_of_nonsense_are_refused_in_one_line(bad):
    with pytest.raises(UserError, match=r'^[^\n]+$'): pca_colours(bad)


# the newest question -----------------------------------------------------------------------------------------------------------------------------

def test_stale_questions_are_dropped_and_the_loop_stays_free():
    computed, shown, gate = [], [], threading.Event()
    def work(n):
        gate.wait(10)
        computed.append(n)
        return -n
    async def drag():
        q = Latest(work, shown.append)
        for n in range(20):
            q.ask(n)
            await asyncio.sleep(0)
        await asyncio.sleep(.02)
        assert shown == []            # we are here while the work hangs: the loop is not blocked
        gate.set()
        await q.task
        q.ask(99)
        await q.task
    asyncio.run(drag())
    assert shown == [-19, -99] and len(computed) <= 3


def test_an_answer_that_was_overtaken_by_settle_is_not_shown_again():
    shown, gate, first = [], threading.Event(), []
    def work(n):
        if not first:
            first.append(n)
            gate.wait(10)
        return n
    async def go():
        q = Latest(work, shown.append)
        q.ask('old')
        while not first: await asyncio.sleep(.001)
        q.settle()
        gate.set()
        await q.task
    asyncio.run(go())
    assert shown == ['old']


def test_a_user_error_is_shown_and_the_next_question_is_answered():
    shown = []
    def work(n):
        if n < 0: raise UserError('negative')
        return n
    q = Latest(work, shown.append)
    q.ask(-1)
    q.ask(2)
    assert str(shown[0]) == 'negative' and shown[1] == 2


# state -> figure ---------------------------------------------------------------------------------------------------------------------------------

def tiles(page): return [t.pixels for t in page.sections[0].tiles]      # image, transformed, again, error, two latents
def figure(state): return KeepsLab(state).figure()
def text(state): return KeepsLab(state).text()


@weights
@pytest.mark.parametrize('name', TRANSFORMS)
def test_every_transform_at_every_strength_has_numbers(name):
    t = TRANSFORMS[name]
    for strength in (t.identity, t.grid[0], t.grid[-1]):
        page = KeepsLab(KeepsState(11, name, strength)).page()
        [row], (clean, changed, again, error, *latents) = page.rows, tiles(page)
        assert 3 < row['psnr'] < 60 and sum('cosine' in n for n in row) == 4 and all(-1 <= v <= 1.0001 for n, v in row.items() if 'cosine' in n)
        assert all(0 <= c.min() and c.max() <= 1 for c in (again, *latents)) and 0 <= error.min() <= error.max() <= 1/.3
        torch.testing.assert_close(error, (again-changed).abs().mean(0)/.3, rtol=1e-4, atol=1e-4)
        if strength == t.identity: assert torch.equal(clean, changed) and row['psnr'] == row['psnr_clean']


@weights
def test_figure_and_text_are_pure_functions_of_the_state():
    s = KeepsState(3, 'translation', .2, seed=7)
    assert to_png(figure(s)) == to_png(figure(replace(s))) and text(s) == text(replace(s))
    for change in (dict(image=4), dict(transform='occlusion'), dict(strength=.3), dict(seed=8)):
        assert to_png(figure(replace(s, **change))) != to_png(figure(s)), change


@weights
def test_what_the_figure_shows_the_text_says():
    s = KeepsState(8, 'blur', 2)
    row, said = figure(s).data[0], text(s)
    for number in (f"{row['psnr']:.1f} dB", f"{row['cosine latent']:.3f}", f"{row['cosine VFM']:.3f}", f"{row['cosine VFM of others']:.3f}",
                   'Image 8', 'blur 2'):
        assert number in said


@weights
def test_a_size_that_fits_no_grid_is_enlarged_and_said():
    page = KeepsLab(KeepsState(transform='scale', strength=.6)).page()
    assert tiles(page)[1].shape == (3, 48, 48) and 'left 38x38 px, enlarged to 48x48 px' in page.words
    assert 'enlarged' not in text(KeepsState(transform='scale', strength=.5))
    assert tiles(KeepsLab(KeepsState(), World(40, seed=1, size=50)).page())[0].shape == (3, 64, 64)


@weights
@pytest.mark.parametrize('bad', [dict(image=-1), dict(image=1.5), dict(image=True), dict(seed='a'), dict(transform='nose'), dict(strength=361),
                                 dict(seed=10**30), dict(strength=None), dict(transform='hflip', strength=.5), dict(tokenizer='vfmvae'),
                                 dict(strength=float('inf'))])
def test_a_state_that_cannot_be_shown_is_refused_in_one_line(bad):
    with pytest.raises(UserError, match=r'^[^\n]+$'): KeepsState(**bad)
    lab = KeepsLab()
    with pytest.raises(UserError, match=r'^[^\n]+$'): lab.set(**bad)
    assert lab.state == KeepsState()


# the widget --------------------------------------------------------------------------------------------------------------------------------------

MOVES = dict(image=5, transform='noise', strength=45., seed=3)


@weights
@pytest.mark.parametrize('name', MOVES)
def test_each_control_moves_state_picture_and_words(name):
    pytest.importorskip('ipywidgets')
    lab = KeepsLab(KeepsState(transform='rotation') if name != 'seed' else KeepsState(transform='noise', strength=.3))
    lab.widget()
    picture, words = lab.picture.value, lab.readout.value
    lab.controls[name].value = MOVES[name]
    assert getattr(lab.state, name) == MOVES[name]
    assert picture != lab.picture.value and lab.picture.value == lab.page().html()
    assert words != lab.readout.value and f'aria-label="{html.escape(lab.text())}"' in lab.picture.value


@weights
def test_a_line_of_code_moves_the_controls_and_draws_once():
    pytest.importorskip('ipywidgets')
    lab = KeepsLab()
    lab.widget()
    shows, show = [], lab._latest.show
    lab._latest.show = lambda answer: (shows.append(answer), show(answer))
    lab.set(image=2, transform='scale', strength=.25, seed=9)
    assert {k: c.value for k, c in lab.controls.items()} == dict(image=2, transform='scale', strength=.25, tokenizer='vfmvae-tiny-f8d16', seed=9)
    assert len(shows) == 1 and shows[0][0].words == lab.text() and shows[0][1] == lab.page().html()


@weights
def test_under_an_event_loop_only_the_last_of_many_moves_is_drawn():
    pytest.importorskip('ipywidgets')
    async def drag():
        lab = KeepsLab()
        lab.widget()
        drawn, show = [], lab._latest.show
        lab._latest.show = lambda answer: (drawn.append(answer[0].rows[0]['strength']), show(answer))
        for strength in (15., 45., 180., 270.): lab.controls['strength'].value = strength
        assert 'computing' in lab.readout.value
        await lab._latest.task
        return lab, drawn
    lab, drawn = asyncio.run(drag())
    assert drawn == [270.] and lab.picture.value == lab.page().html() and 'computing' not in lab.readout.value


@weights
def test_without_ipywidgets_the_module_works_and_the_widget_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, 'ipywidgets', None)
    lab = KeepsLab()
    assert 'dB' in lab.text()
    with pytest.raises(UserError, match=r"pip install 'vfmvae\[widgets\]'"): lab.widget()


# heavy work ---------------------------------------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Number:
    number: int = 0


class Reader(Lab):
    "A lab whose heavy work somebody else may have done: `disk` holds the pages that are there."
    State = Number
    def __init__(self, disk):
        super().__init__()
        self.disk, self.looks = disk, 0
    def compute(self, state):
        self.looks += 1
        return state.number in self.disk
    def layout(self, result): return Page([], 'the whole page' if result else 'the page is being read')
    def panel(self, state): return dict(number=Control('whole', 'of the page', last=9))
    def jobs(self, state):
        return [] if state.number in self.disk else [Job(f'page {state.number}', 1, lambda free, tick: self.disk.add(state.number))]


def in_the_look(lab):
    compute = lab.compute
    lab.compute = lambda state: (compute(state), lab.disk.add(state.number))[0]

def before_the_job(lab):
    fill = lab._fill
    lab._fill = lambda: (fill(), lab.disk.add(lab.state.number))

def in_the_job(lab):
    def run(free, tick):
        lab.disk.add(lab.state.number)
        free()
        raise AssertionError('the job of another picture went on')
    jobs = lab.jobs
    lab.jobs = lambda state: [Job(j.name, 1, run) for j in jobs(state)]


@pytest.mark.parametrize('meddle', [None, in_the_look, before_the_job, in_the_job])
def test_what_another_lab_does_meanwhile_comes_into_the_picture(meddle):
    pytest.importorskip('ipywidgets')
    lab = Reader(set())
    if meddle: meddle(lab)
    async def go():
        lab.widget()
        for number in (0, 1):
            if number: lab.controls['number'].value = number
            await lab._latest.task
            if lab._filler is not None: await asyncio.wait_for(lab._filler, 10)
            assert 'the whole page' in lab.readout.value, number
    asyncio.run(go())
    assert lab.mark.layout.visibility == 'hidden' and lab.looks == 4


@pytest.mark.parametrize('meddle', [None, in_the_look])
def test_without_an_event_loop_too(meddle):
    pytest.importorskip('ipywidgets')
    lab = Reader(set())
    if meddle: meddle(lab)
    lab.widget()
    assert 'the whole page' in lab.readout.value and lab.looks == 2
    assert lab.settle().looks == 2


def test_a_whole_picture_is_drawn_once():
    pytest.importorskip('ipywidgets')
    lab = Reader({0, 1})
    async def go():
        lab.widget()
        await lab._latest.task
        lab.controls['number'].value = 1
        await lab._latest.task
    asyncio.run(go())
    assert lab.looks == 2 and lab._filler is None and 'the whole page' in lab.readout.value


@pytest.mark.parametrize('broken', ['jobs', 'panel'])
def test_what_fails_around_the_picture_is_said_too(broken):
    pytest.importorskip('ipywidgets')
    lab = Reader({0})
    async def go():
        lab.widget()
        setattr(lab, broken, lambda state: 1/0)
        await lab._latest.task
    asyncio.run(go())
    assert 'ZeroDivisionError' in lab.readout.value
    lab.controls['number'].value = 1
    assert 'ZeroDivisionError' in lab.readout.value


# sheets, paper, pages ----------------------------------------------------------------------------------------------------------------------------

RED = torch.tensor([1., 0., 0.])[:, None, None].expand(3, 4, 4)


def images_in(page):
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(s)))).astype(int) for s in re.findall(r'base64,([^"]+)', page.html())]


def red(a): return np.argwhere((a[..., 0] > 200) & (a[..., 1] < 60))


def test_a_page_puts_its_tiles_in_order_on_paper_and_all_their_pixels_on_the_screen():
    page = Page([Section('', [Tile(torch.zeros(3, 4, 4)), Tile(RED, 'red')], columns=2)])
    a = np.asarray(Image.open(io.BytesIO(to_png(page.figure(2.), 100))).convert('RGB')).astype(int)
    at, side = red(a), 100*((2-.07)/2-.07)
    assert a.shape[1] == 200 and abs(at.min(0)[1]-(14+side)) <= 1 and np.abs(at.max(0)-at.min(0)+1-side).max() <= 2
    dark, bright = images_in(page)
    assert (dark == 0).all() and np.array_equal(bright, np.broadcast_to([255, 0, 0], (4, 4, 3)))
    assert page.html().index('alt="red"') > page.html().index('alt=""')
    large = images_in(Page([Section('', [Tile(torch.rand(3, 900, 500))])]))[0]
    assert large.shape == (400, 400, 3)                                # no more than a printer needs
    hostile = Page([Section('<b>"', [Tile(RED, '<i>')])], '"><script>').html()
    assert not re.search('<b>|<i>|<script', hostile)


def test_the_ring_of_a_point_moves_and_the_chart_is_drawn_once():
    drawn = []
    def page(x):
        return Page([Section('', chart=Chart('the same', lambda ax: (drawn.append(1), ax.plot([0, 4], [0, 1])), [(x, .5, '#FF0000')]))])
    def ring(p): return [float(v) for v in re.search(r'left:([0-9.]+)%;top:([0-9.]+)%', p.html()).groups()]
    a, b = ring(page(1.)), ring(page(3.))
    assert len(drawn) == 1 and b[0]-a[0] > 25 and a[1] == b[1]
    paper = np.asarray(Image.open(io.BytesIO(to_png(page(3.).figure(7.6), 100))).convert('RGB')).astype(int)
    middle = red(paper).mean(0)/(160, 760)*100                         # a chart of 1.6 inches fills the page but for a margin
    assert abs(middle[1]-b[0]) < 1 and abs(middle[0]-b[1]) < 4


@weights
def test_paper_and_page(tmp_path):
    lab = KeepsLab(KeepsState(image=2, transform='blur', strength=1.))
    made = lab.save(tmp_path/'fig.pdf', 'column')
    assert [p.name for p in made] == ['fig.pdf', 'fig.png', 'fig.csv'] and b'CIDFontType2' in made[0].read_bytes() and b'Type3' not in made[0].read_bytes()
    assert abs(Image.open(made[1]).width-3.25*200) <= 1 and 'psnr' in made[2].read_text().splitlines()[0]
    page = lab.export(tmp_path/'lab.html', strength=[1., 4.], transform=['blur']).read_text()
    frames = json.loads(re.search(r'frames=(.*?),form=', page)[1].replace('<\\/', '</'))
    assert sorted(frames) == ['0,0', '1,0'] and all(picture.count('iVBOR') == 6 and words in picture for picture, words in frames.values())
    assert not re.search(r'https?:|src="(?!data)|@import|<link', page) and 'blur 4' in page
    for bad in (dict(strength=[]), dict(image=range(999))):
        with pytest.raises(UserError, match=r'^[^\n]+$'): lab.export(tmp_path/'no.html', **bad)
    with pytest.raises(UserError, match='no width'): lab.save(tmp_path/'x.pdf', 'wide')


@weights
def test_whatever_goes_wrong_is_said_and_the_lab_lives_on(monkeypatch):
    pytest.importorskip('ipywidgets')
    lab = KeepsLab()
    lab.widget()
    before = lab.picture.value
    lab.attempt(lab.set, image=10_000)
    assert 'no image 10000' in lab.readout.value and lab.controls['image'].value == 0 and lab.picture.value == before
    compute = lab.compute
    monkeypatch.setattr(lab, 'compute', lambda state: 1/0)
    lab.controls['seed'].value = 1
    assert 'ZeroDivisionError' in lab.readout.value
    monkeypatch.setattr(lab, 'compute', compute)
    lab.controls['image'].value = 3
    assert 'Image 3' in lab.readout.value and lab.picture.value != before
