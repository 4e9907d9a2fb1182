"Laws of the labs: colours, states, the figure as a pure function, and controls that are moved without a browser."
import asyncio, base64, html, io, json, re, sys, threading
from dataclasses import asdict, dataclass, replace
import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image
from vfmvae.core import UserError
from vfmvae.files import data_dir
from vfmvae.images import TRANSFORMS
from vfmvae.world import World
from vfmvae.plots import bars, curves, heat, scatter_fit, show_images, to_png
from vfmvae.pages import Chart, clicked, Page, Section, Sheet, Spot, Tile
from vfmvae.colours import pca_colours
from vfmvae.lab_base import Lab, Latest
from vfmvae.lab_parts import Control, Job
from vfmvae.explorer import Explorer
from vfmvae.labs import EmbeddingLab, LayerLab, NeighbourLab, ReconstructionLab, ReconstructionState
from vfmvae.sampler_lab import PromptLab, SamplerLab

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


# names -------------------------------------------------------------------------------------------------------------------------------------------

ODD = ('a$b$', '$\\alpha^{$', '_hidden', '50% <off>', 'x_{1}', 'plain')      # of folders, files, nets: no formula, though Matplotlib would take some for one


def drawn_texts(fig):
    "What a figure says, as it is drawn."
    fig.savefig(f := io.StringIO(), format='svg', metadata=dict(Date=None))
    return html.unescape(re.sub('<[^>]*>', '', f.getvalue())).replace('\u200b', '')


def test_a_name_is_drawn_letter_by_letter():
    "A folder called '$\\alpha^{$' ended every picture of its set, 'a$b$' stood there in italics without its dollars, and '_hidden' in no legend."
    rows = {n: [i, i+1.] for i, n in enumerate(ODD)}
    figures = [curves(rows, 'x', 'y'), bars({n: v[0] for n, v in rows.items()}, 'y'), bars({'one': {n: v[0] for n, v in rows.items()}}, 'y'),
               heat(np.eye(len(ODD)), ODD, ODD), scatter_fit(range(len(ODD)), range(len(ODD)), labels=ODD),
               show_images(torch.zeros(len(ODD), 3, 8, 8), ODD), Page([Section(n, [Tile(np.zeros((8, 8)), n)]) for n in ODD]).figure()]
    with matplotlib.rc_context({'svg.fonttype': 'none'}): said = [drawn_texts(f) for f in figures]
    for text in said: assert all(n in text for n in ODD), text


@weights
def test_classes_of_odd_names_are_in_the_picture_of_a_set(tmp_path):
    for k, name in enumerate(ODD):
        (tmp_path/name).mkdir()
        for i in range(3): Image.new('RGB', (32, 32), (40*k, 80*i, 90)).save(tmp_path/name/f'{k}{i}.png')
    lab = EmbeddingLab(images=str(tmp_path), n=18, source='tiny')
    svg = html.unescape(lab.page().html().replace('\u200b', ''))
    assert all(f'>{n}</text>' in svg for n in ODD) and [p.suffix for p in lab.save(tmp_path/'fig.pdf')] == ['.pdf', '.png', '.csv']


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

def figure(state): return ReconstructionLab(state).figure()
def text(state): return ReconstructionLab(state).text()


@weights
@pytest.mark.parametrize('name', TRANSFORMS)
def test_every_transform_at_every_strength_has_numbers(name):
    t, lab = TRANSFORMS[name], Explorer(images='world', tokenizers='vfmvae-tiny-f8d16', vfm='tiny', image=11, n=14, k=3)
    for strength in (t.identity, t.grid[0], t.grid[-1]):
        r = lab.compute(lab.set(transform=name, strength=strength).state)       # before any set is read
        net, = r.nets
        assert 3 < net.psnr < 60 and net.overlap is None and all(0 <= m.min() and m.max() <= 1 for m in (*r.maps, *net.maps))
        torch.testing.assert_close(net.error, (net.again-r.changed).abs().mean(0)/2, rtol=1e-4, atol=1e-4)
        if strength == t.identity: assert torch.equal(r.clean, r.changed)


@weights
def test_figure_and_text_are_pure_functions_of_the_state():
    s = ReconstructionState(3, edit='mask', amount=.2, seed=7)
    assert to_png(figure(s)) == to_png(figure(replace(s))) and text(s) == text(replace(s))
    for change in (dict(image=4), dict(edit='noise'), dict(amount=.3), dict(seed=8)):
        assert to_png(figure(replace(s, **change))) != to_png(figure(s)), change


@weights
def test_what_the_figure_shows_the_text_says():
    s = ReconstructionState(8, edit='noise', amount=.25)
    row, said = figure(s).data[-1], text(s)
    for number in (f"{row['psnr']:.1f} dB", f"{row['psnr_plain']:.1f} dB", 'Image 8', 'noise 0.25'): assert number in said


@weights
@pytest.mark.parametrize('bad', [dict(image=-1), dict(image=1.5), dict(image=True), dict(seed='a'), dict(edit='nose'), dict(amount=2.),
                                 dict(seed=10**30), dict(amount=None), dict(tokenizer=3), dict(amount=float('inf'))])
def test_a_state_that_cannot_be_shown_is_refused_in_one_line(bad):
    with pytest.raises(UserError, match=r'^[^\n]+$'): ReconstructionState(**bad)
    lab = ReconstructionLab()
    with pytest.raises(UserError, match=r'^[^\n]+$'): lab.set(**bad)
    with pytest.raises(UserError, match=r'^[^\n]+$'): lab.state = bad
    assert lab.state == ReconstructionState() and not lab.past


# keeping a state ---------------------------------------------------------------------------------------------------------------------------------

LABS = dict(explorer=(Explorer, dict(n=16, k=4, image=3, tokenizers=('vfmvae-tiny-f8d16', 'conv-f8d16'), place=(.5, .25), images='world', label='dots ring')),
            reconstruction=(ReconstructionLab, dict(images='world', edit='swap', amount=.25, other=7)),
            neighbours=(NeighbourLab, dict(n=24, k=3, second='conv-f8d16')), layers=(LayerLab, dict(n=24, row=2, first='tiny')),
            embedding=(EmbeddingLab, dict(n=24, chosen=(1, 2, 5), colour='cluster')), sampler=(SamplerLab, dict(step=3, label=9, steps=5)),
            prompt=(PromptLab, dict(prompt='a small cross on a red ground', word=6, instead='blue', step=2)))


@weights
@pytest.mark.parametrize('name', LABS)
def test_a_state_is_json_and_a_lab_is_a_line_of_code(name):
    Which, how = LABS[name]
    lab = Which(**how)
    kept = json.loads(json.dumps(asdict(lab.state)))
    other = Which()
    other.state = kept
    assert other.state == lab.state and hash(other.state) == hash(lab.state)
    again = eval(lab.code)
    assert again.state == lab.state and again.code == lab.code and all(f'{k}=' in lab.code for k in how)
    assert Which().code in (f'{Which.__name__}()', "SamplerLab(net='dit-vfmvae-photo-f8d16')", "PromptLab(net='lumina-vfmvae-tiny-f8d16')")


@weights
def test_code_says_what_it_cannot_write():
    class Mine:
        name, layers = 'mine', ('a',)
        def features(self, x, layers=None): return {'a': x.flatten(2).transpose(1, 2)}
    assert 'own=(...,)' in NeighbourLab(own=[Mine()], n=24).code and "own=('tiny',)" in NeighbourLab(own=['tiny'], n=24).code


@weights
def test_code_says_with_what_a_lab_was_made():
    "A set of one's own was a name that no lab knows, an array ended in ValueError (and every picture with it), nets and the device were left out."
    assert Explorer(images=World(20), n=16, k=4).code == 'Explorer(n=16, images=..., k=4)'
    assert ReconstructionLab(images=np.zeros((5, 64, 64, 3), np.uint8), image=2).code == 'ReconstructionLab(images=..., image=2)'
    assert LayerLab(nets={'mine': 'dit-conv-f8d16'}, second='mine', device='cpu', n=24).code == "LayerLab(nets=..., device='cpu', n=24, second='mine')"
    assert SamplerLab('dit-conv-f8d16', steps=3, side=4).code == "SamplerLab(nets='dit-conv-f8d16', side=4, net='net', steps=3)"


@weights
def test_what_is_written_or_kept_is_of_the_field_or_a_line(tmp_path):
    "NumPy's numbers ended an export after all its frames were drawn; widths, names of files and keys that are none ended in ValueError and TypeError."
    lab = ReconstructionLab()
    page = lab.export(tmp_path/'lab.html', image=[np.int64(1)], amount=[np.float32(.25)]).read_text()
    assert '"raw": [1, 0]' in page and '"raw": [0.25, 0.5]' in page
    for bad in (lambda: lab.export(tmp_path/'lab.html', image=['a']), lambda: lab.save(''), lambda: lab.save('.'), lambda: lab.save(3),
                *(lambda w=w: lab.figure(w) for w in (0, -1, float('nan'), None, 1e6)), lambda: setattr(lab, 'state', {1: 2})):
        with pytest.raises(UserError, match=r'^[^\n]+$'): bad()


@weights
def test_an_image_is_chosen_once():
    "Twelve times the same image gave a CKNNA of nan."
    assert EmbeddingLab(chosen=[3, 1, 3]).state.chosen == (3, 1)
    with pytest.raises(UserError, match='^no net named'): LayerLab(nets={'mine': ('dit-conv-f8d16', 'conv-f8d16', 3)})      # was a ValueError


@weights
def test_back_and_forward():
    lab = ReconstructionLab()
    with pytest.raises(UserError, match='no state before'): lab.back()
    for i in (3, 4, 5): lab.set(image=i)
    lab.set(image=5)                                                 # no change, nothing to take back
    assert [lab.back().state.image for _ in range(3)] == [4, 3, 0]
    with pytest.raises(UserError, match='no state before'): lab.back()
    assert lab.forward().forward().state.image == 4 and lab.set(edit='mask').state == replace(lab.state, image=4, edit='mask')
    with pytest.raises(UserError, match='nothing was taken back'): lab.forward()
    with pytest.raises(UserError): lab.set(image=10**6)              # what was refused leaves no trace
    assert lab.back().state == ReconstructionState(image=4)


# the widget --------------------------------------------------------------------------------------------------------------------------------------

MOVES = dict(image=5, edit='noise', amount=.75, seed=3)


@weights
@pytest.mark.parametrize('name', MOVES)
def test_each_control_moves_state_picture_and_words(name):
    pytest.importorskip('ipywidgets')
    lab = ReconstructionLab(edit='mask')
    lab.widget()
    picture, words = lab.picture.value, lab.readout.value
    lab.controls[name].value = MOVES[name]
    assert getattr(lab.state, name) == MOVES[name]
    assert picture != lab.picture.value and lab.picture.value == lab.page().html()
    assert words != lab.readout.value and f'aria-label="{html.escape(lab.text())}"' in lab.picture.value


@weights
def test_a_line_of_code_moves_the_controls_and_draws_once():
    pytest.importorskip('ipywidgets')
    lab = ReconstructionLab()
    lab.widget()
    assert {*lab.panel(lab.state)} == {'image', 'tokenizer', 'edit'}     # the others would do nothing
    shows, show = [], lab._latest.show
    lab._latest.show = lambda answer: (shows.append(answer), show(answer))
    lab.set(image=2, edit='noise', amount=.25, seed=9)
    assert {k: lab.controls[k].value for k in lab.panel(lab.state)} == dict(image=2, edit='noise', amount=.25, tokenizer='vfmvae-photo-f8d16', seed=9)
    assert len(shows) == 1 and shows[0][0].words == lab.text() and shows[0][1] == lab.page().html()
    assert all(getattr(lab.controls[n], 'box', lab.controls[n]) in lab.rail.children for n in lab.panel(lab.state))


@weights
def test_a_move_makes_no_new_widgets():
    "The headings of the groups were made anew at every move, 18 widgets each, and kept in kernel and page as long as these lived."
    made = pytest.importorskip('ipywidgets.widgets.widget')._instances
    lab = ReconstructionLab(edit='noise')
    lab.widget()
    before = {*made}
    for image in range(1, 4): lab.set(image=image)
    assert {*made} == before


@weights
def test_under_an_event_loop_only_the_last_of_many_moves_is_drawn():
    pytest.importorskip('ipywidgets')
    async def drag():
        lab = ReconstructionLab(edit='noise')
        lab.widget()
        drawn, show = [], lab._latest.show
        lab._latest.show = lambda answer: (drawn.append(answer[0].rows[0]['amount']), show(answer))
        for amount in (.1, .25, .75, 1.): lab.controls['amount'].value = amount
        assert 'computing' in lab.status.value
        await lab._latest.task
        return lab, drawn
    lab, drawn = asyncio.run(drag())
    assert drawn == [1.] and lab.picture.value == lab.page().html() and lab.status.value == ''


@weights
def test_without_ipywidgets_the_module_works_and_the_widget_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, 'ipywidgets', None)
    lab = ReconstructionLab()
    assert 'dB' in lab.text()
    with pytest.raises(UserError, match=r"pip install 'vfmvae\[widgets\]'"): lab.widget()


@weights
def test_without_ipyevents_the_controls_do_the_same(monkeypatch):
    pytest.importorskip('ipywidgets')
    monkeypatch.setitem(sys.modules, 'ipyevents', None)
    lab = ReconstructionLab()
    lab.widget()
    lab.controls['image'].value = 4
    assert lab.state.image == 4 and 'Image 4' in lab.readout.value


def changes(text): return [clicked(c) for c in re.findall('class="([^"]* go-[^"]*)"', text)]


def test_a_click_on_a_page_that_is_being_replaced_means_what_was_seen():
    pytest.importorskip('ipywidgets')
    lab = Next()
    lab.widget()
    lab.settle()
    old = re.findall('class="([^"]* go-[^"]*)"', lab.picture.value)
    lab.set(number=4)
    lab.settle()
    assert changes(lab.picture.value) == [dict(number=5), dict(number=6)]
    for c, number in zip(old, (1, 2), strict=True):                # the browser had not shown the new page yet
        lab.touched(dict(type='click', target=dict(className=c)))
        assert lab.state == Number(number) and not lab.status.value.startswith('<')


@pytest.mark.parametrize('odd', [None, 3, [], 'image', SamplerLab])
def test_what_is_no_state_is_one_line(odd):
    lab = ReconstructionLab(image=4)
    with pytest.raises(UserError, match=r'^a state is a ReconstructionState or a dict of its fields[^\n]*$'): lab.state = odd
    assert lab.state.image == 4


def test_a_click_on_nothing_does_nothing():
    pytest.importorskip('ipywidgets')
    lab = Reader({0})
    lab.widget()
    for event in (dict(type='click', target=dict(className='vp')), dict(type='click', target=dict(className={})), dict(type='click'),
                  dict(type='click', target=dict(className='go go-99')), dict(type='click', target=dict(className='go go-')),
                  dict(type='mouseup', target=dict(className='chart pad')), {}): lab.touched(event)
    assert lab.state == Number() and not lab.status.value


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


class Next(Lab):
    "The two numbers that follow can be clicked."
    State = Number
    def compute(self, state): return Page([Section('', [Tile(RED, str(n), go=dict(number=n)) for n in (state.number+1, state.number+2)])])
    def panel(self, state): return dict(number=Control('whole', 'of the page', last=9))


class Plane(Lab):
    "Three spots; `got`: those inside of each line that was drawn."
    State = Number
    def compute(self, state):
        spots = [Spot(.1, .1), Spot(.9, .1), Spot(.9, .9)]
        return Page([Section(chart=Chart('plane', lambda ax: ax.set(xlim=(0, 1), ylim=(0, 1)), spots, lasso=True, margins=(0, 0, 0, 0)))])
    def panel(self, state): return {}
    def enclosed(self, spots): self.got.append(spots)


def drawn(*moves):
    "What a lab took from a mouse that did this: (type, x, y) in pixels of the chart, and what else an event has."
    lab = Plane()
    lab.got = []
    lab.widget()
    for kind, x, y, *more in moves:
        event = dict(type=kind, target=dict(className='chart pad'), offsetX=x, offsetY=y, clientX=x+40, clientY=y+70, buttons=int(kind != 'mouseup'),
                     ctrlKey=False, metaKey=False)
        lab.touched(event | (more[0] if more else {}))
    return lab


AROUND = [('mousedown', 600, 0), ('mousemove', 760, 0), ('mousemove', 760, 300), ('mousemove', 600, 300)]      # the two spots at the right


@pytest.mark.parametrize('end', [('mouseup', 600, 300), ('mousemove', 20, 300, dict(buttons=0))])
def test_a_line_ends_where_the_button_goes_up_or_was_let_go_outside(end):
    pytest.importorskip('ipyevents')
    lab = drawn(*AROUND, end)
    assert lab.got == [[1, 2]] and not lab._line and not lab.dragged.watched_events and 'polygon' not in lab.overlay.value
    open_ = drawn(*AROUND)
    assert open_.got == [] and 'polygon' in open_.overlay.value and open_.dragged.watched_events == ['mousemove']
    for move in (('mousemove', 5, 5), ('mousemove', 5, 5, dict(buttons=0)), ('mouseup', 5, 5)): assert drawn(*AROUND, end, move).got == [[1, 2]]


@pytest.mark.parametrize('key', ['ctrlKey', 'metaKey'])
def test_with_ctrl_or_cmd_it_is_a_box(key):
    pytest.importorskip('ipyevents')
    assert drawn(('mousedown', 600, 0), *(('mousemove', x, y, {key: True}) for x, y in ((10, 5), (700, 200), (760, 80))), ('mouseup', 760, 80)).got == [[2]]
    assert drawn(('mousedown', 1, 1), ('mouseup', 1, 1)).got == []        # a click is no line


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
    assert 'ZeroDivisionError' in lab.status.value
    lab.controls['number'].value = 1
    assert 'ZeroDivisionError' in lab.status.value


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
    assert large.shape == (400, 222, 3)                                # no more than a printer needs, in its proportions
    hostile = Page([Section('<b>"', [Tile(RED, '<i>')])], '"><script>').html()
    assert not re.search('<b>|<i>|<script', hostile)


def test_the_ring_of_a_point_moves_and_the_chart_is_drawn_once():
    drawn = []
    def page(x):
        return Page([Section('', chart=Chart('the same', lambda ax: (drawn.append(1), ax.plot([0, 4], [0, 1])), [Spot(x, .5, '#FF0000')]))])
    def ring(p): return [float(v) for v in re.search(r'left:([0-9.]+)%;top:([0-9.]+)%', p.html().split('</style>')[-1]).groups()]
    a, b = ring(page(1.)), ring(page(3.))
    assert len(drawn) == 1 and b[0]-a[0] > 25 and a[1] == b[1]
    paper = np.asarray(Image.open(io.BytesIO(to_png(page(3.).figure(7.6), 100))).convert('RGB')).astype(int)
    middle = red(paper).mean(0)/(160, 760)*100                         # a chart of 1.6 inches fills the page but for a margin
    assert abs(middle[1]-b[0]) < 1 and abs(middle[0]-b[1]) < 4


def test_a_page_says_what_a_click_changes_and_shows_a_card():
    sheet = Sheet(torch.arange(3*3*4*4, dtype=torch.uint8).view(3, 3, 4, 4))
    tiles = [Tile(RED, 'near', 'both', dict(image=7), 'number 7', sprite=2), Tile(RED, tokens=(1, 2))]
    cells = Chart('cells', lambda ax: ax.imshow([[0, 1]]), [Spot(1, 0, '', dict(row=0, column=1), 'a <b>', width=1.)])
    page = Page([Section('', tiles, columns=2), Section(chart=cells)], sheet=sheet)
    text = page.html()
    assert changes(text) == [dict(image=7), dict(place=[.25, .5]), dict(place=[.75, .5]), dict(row=0, column=1)]
    assert 'a &lt;b&gt;' in text and text.count('number 7') == 2
    assert text.count(sheet.name) == 1 and sheet.css not in text and 'base64' in sheet.css and sheet.side == 2
    assert 'stroke: #000000' not in text and 'fill: #ffffff' not in text


def test_a_line_around_spots_finds_them():
    chart = Chart('plane', lambda ax: ax.set(xlim=(0, 1), ylim=(0, 1)), [Spot(.1, .1), Spot(.9, .1), Spot(.9, .9)], lasso=True)
    page = Page([Section('other'), Section(chart=chart, share=.5)])
    assert page.enclosed([(190, 0), (380, 0), (380, 999), (190, 999)]) == [1, 2] and page.enclosed([(0, 0), (1, 0), (0, 1)]) == []


@weights
def test_paper_and_page(tmp_path):
    lab = ReconstructionLab(ReconstructionState(image=2, edit='mask', amount=.25))
    made = lab.save(tmp_path/'fig.pdf', 'column')
    assert [p.name for p in made] == ['fig.pdf', 'fig.png', 'fig.csv'] and b'CIDFontType2' in made[0].read_bytes() and b'Type3' not in made[0].read_bytes()
    assert abs(Image.open(made[1]).width-3.25*200) <= 1 and 'psnr' in made[2].read_text().splitlines()[0]
    page = lab.export(tmp_path/'lab.html', amount=[.25, 1.], edit=['mask']).read_text()
    frames = json.loads(re.search(r'frames=(.*?),form=', page)[1].replace('<\\/', '</'))
    assert sorted(frames) == ['0,0', '1,0'] and all(picture.count('iVBOR') == 13 and words in picture for picture, words in frames.values())
    assert not re.search(r'https?:(?!//www.w3.org|//matplotlib)|src="(?!data)|@import|<link', page) and 'mask 1' in page
    for bad in (dict(amount=[]), dict(image=range(999)), dict(zzz=[1]), dict(image=3), dict(edit='mask')):
        with pytest.raises(UserError, match=r'^[^\n]+$'): lab.export(tmp_path/'no.html', **bad)
    with pytest.raises(UserError, match='no width'): lab.save(tmp_path/'x.pdf', 'wide')


@weights
def test_whatever_goes_wrong_is_said_and_the_lab_lives_on(monkeypatch):
    pytest.importorskip('ipywidgets')
    lab = ReconstructionLab(edit='noise')
    lab.widget()
    before = lab.picture.value
    lab.attempt(lab.set, image=10_000)
    assert 'no image 10000' in lab.status.value and lab.controls['image'].value == 0 and lab.picture.value == before
    compute = lab.compute
    monkeypatch.setattr(lab, 'compute', lambda state: 1/0)
    lab.controls['seed'].value = 1
    assert 'ZeroDivisionError' in lab.status.value
    monkeypatch.setattr(lab, 'compute', compute)
    lab.controls['image'].value = 3
    assert 'Image 3' in lab.readout.value and lab.picture.value != before and not lab.status.value


@weights
@pytest.mark.parametrize('name', LABS)
def test_what_a_screen_shows_can_be_printed(name, tmp_path):
    Which, how = LABS[name]
    made = Which(**how).save(tmp_path/'fig')
    assert [p.suffix for p in made] == ['.pdf', '.png', '.csv'] and Image.open(made[1]).width == 6.75*200


@weights
def test_a_lab_whose_first_picture_fails_says_so_where_a_cell_ends_with_it(monkeypatch):
    pytest.importorskip('ipywidgets')
    monkeypatch.setattr(ReconstructionLab, 'compute', lambda self, state: 1/0)
    lab = ReconstructionLab()
    lab._ipython_display_()
    assert 'ZeroDivisionError' in lab.settle().status.value


def test_a_late_picture_does_not_wipe_an_error_away():
    "What was begun before the mistake ends after it: the reason was there for some milliseconds."
    lab = NeighbourLab(images='world', first='tiny', second='vfmvae-tiny-f8d16', n=24)
    lab.widget()
    lab.settle()
    lab.attempt(lab.set, image=10**6)
    assert 'role="alert"' in lab.status.value
    lab.say('the words of a picture')
    assert 'role="alert"' in lab.status.value
    lab.set(image=3).settle()
    assert lab.status.value == ''
