"What a lab shows is of the nets, pictures and settings that it names: never of others of that name, of an older file, or of another thread."
import copy, io, math, os, threading, time, warnings
from concurrent.futures import ThreadPoolExecutor
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from vfmvae.core import UserError
from vfmvae.files import data_dir
from vfmvae.images import to_pil, to_uint8
from vfmvae.world import World
from vfmvae.folders import folder
from vfmvae.data import as_dataset
from vfmvae.dit import DiT, DiTConfig
from vfmvae.session import FeatureCache, fingerprint, ReferenceImages, same_net
from vfmvae.explorer import Explorer, ExplorerState
from vfmvae.generation import open_net
from vfmvae.labs import EmbeddingLab, EmbeddingState, LayerLab, NeighbourLab, ReconstructionLab
from vfmvae.flow import convert
from vfmvae.pages import _rgb
from vfmvae.sampler_lab import SamplerLab, SamplerState
from vfmvae.samplers import ImageNoise, Sampler, trajectory, velocity_field
from vfmvae.plots import curves, paper_style, STYLE, to_png
from vfmvae.tokenizer import save_tokenizer, tokenizers
from vfmvae.vfm import VFM
from vfmvae.tokenizer import LatentFeatures
from vfmvae.views import as_source
from vfmvae.lab_parts import lab_images

NAMES = ('vfm-tiny', 'vfmvae-tiny-f8d16', 'conv-f8d16')
pytestmark = pytest.mark.skipif(not all((data_dir()/'weights'/f'{n}.safetensors').is_file() for n in NAMES), reason='the bundled weights are not there')
ONE_LINE = r'^[^\n]+$'


@pytest.fixture(autouse=True)
def own_home(tmp_path_factory, monkeypatch, few_tokenizers): monkeypatch.setenv('VFMVAE_HOME', str(tmp_path_factory.mktemp('home')))


def changed(net, name=None):
    "A copy in which some weights have changed places: their sums are the same, what it computes is not."
    twin = copy.deepcopy(net)
    twin.name = name or net.name
    with torch.no_grad(): next(p for p in twin.parameters() if p.ndim > 1).copy_(next(p for p in net.parameters() if p.ndim > 1).flip(-1))
    return twin


@pytest.fixture(scope='module')
def conv(): return tokenizers['conv-f8d16']


@pytest.fixture(scope='module')
def tiny(): return VFM('tiny')


def pictures(root, n=14, classes=(''), seed=5):
    "n pictures in each class folder."
    world = World(seed=seed)
    for c, k in enumerate(classes or ('',)):
        (root/k).mkdir(parents=True, exist_ok=True)
        for i in range(n): to_pil(world[c*n+i]['image']).save(root/k/f'{i:02d}.png')
    return root


def rows(lab): return lab.figure().data
def adds(lab): return [r['adds'] for r in rows(lab)]
def tiles(lab): return [t.pixels for s in lab.page().sections for t in s.tiles]


LATENTS = 'vfmvae-tiny-f8d16'      # that the nets here stand for


CONV = dict(second='conv-f8d16')      # of a neighbour lab


# one name, one net ------------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('Which', [Explorer, ReconstructionLab, NeighbourLab, LayerLab, EmbeddingLab])
def test_two_different_nets_of_one_name_are_refused(Which, conv, tiny):
    mine, eye = changed(conv, 'mine'), copy.deepcopy(tiny)
    eye.name = 'mine'
    for own in ([mine, changed(mine)], [changed(conv)], [changed(tiny)], [mine, eye], changed(conv)):
        with pytest.raises(UserError, match=r'^two different nets are named [^\n]+$'): Which(own=own)
    again = copy.deepcopy(conv)
    assert list(Which(own=[mine, copy.deepcopy(mine), again]).session.own) == ['mine', 'conv-f8d16']     # two objects of one net are one source


@pytest.mark.parametrize('bad', [3, [3], [nn.Linear(2, 2)], ['no-such-net'], [None]])
def test_what_is_no_net_is_refused_in_one_line(bad):
    with pytest.raises(UserError, match=ONE_LINE): ReconstructionLab(own=bad)


def dit(seed=0, channels=16):
    torch.manual_seed(seed)
    made = DiT(DiTConfig(in_channels=channels, patch_size=1, hidden_size=24, depth=2, num_heads=2, num_classes=16)).eval()
    with torch.no_grad(): made.final_layer.linear.weight.normal_(std=.1)
    return made


def test_a_velocity_net_has_a_name_of_its_own_too(tiny):
    name, tok = 'dit-vfmvae-tiny-f8d16', tokenizers['vfmvae-tiny-f8d16']
    for nets in ({name: (dit(), tok)}, {'tiny': (dit(), tok)}, {'conv-f8d16': (dit(), tok)}):
        with pytest.raises(UserError, match=ONE_LINE): LayerLab(nets=nets)
    assert LayerLab(nets={name: open_net(name), 'again': name, 'pair': (name, 'vfmvae-tiny-f8d16')}).velocity[:3] == (name, 'again', 'pair')


def test_a_mark_tells_weights_settings_and_code_apart(conv, tiny):
    class Own(nn.Module):
        name, layers = 'own', ('a',)
    assert fingerprint(conv) == fingerprint(copy.deepcopy(conv)) and same_net(tiny, VFM('tiny'))
    assert len({fingerprint(s) for s in (conv, changed(conv), tiny, changed(tiny), LatentFeatures(conv), LatentFeatures(conv, sample_seed=1),
                                  LatentFeatures(conv, sample_seed=2))}) == 7
    assert fingerprint(Own()) == '' and not same_net(Own(), Own())                # code of one's own: none can tell
    twin = copy.deepcopy(conv)
    before = fingerprint(twin)
    with torch.no_grad(): twin.decoder.conv_out.weight.mul_(2)
    assert fingerprint(twin) != before


# what changes under an open lab -------------------------------------------------------------------------------------------------------------------

def test_a_net_that_is_trained_on_under_an_open_lab_is_looked_at_anew(conv):
    mine = copy.deepcopy(conv)
    mine.name = 'mine'
    lab = Explorer(n=16, k=4, own=[mine], tokenizers='mine', transform='hflip', strength=1.)
    first = rows(lab)
    with torch.no_grad():
        mine.encoder.conv_in.weight.mul_(-.5)
        mine.decoder.conv_out.weight.mul_(.5)
    def fresh():
        twin = copy.deepcopy(mine)
        return rows(Explorer(lab.state, n=16, own=[twin]))
    assert rows(lab) == fresh() != first and rows(lab)[0]['agrees_with_vfm'] != first[0]['agrees_with_vfm']
    mine.decoder.conv_out = nn.Conv2d(mine.decoder.conv_out.in_channels, 3, 3, padding=1)      # a part that is another
    mine.encoder.conv_in = copy.deepcopy(conv.encoder.conv_in)
    assert rows(lab) == fresh() and rows(lab)[0]['agrees_with_vfm'] == first[0]['agrees_with_vfm']


def test_a_tokenizer_file_that_is_rewritten_under_an_open_lab_is_opened_anew(conv, tmp_path):
    path = save_tokenizer(tmp_path/'mine.safetensors', conv)
    labs = [Explorer(n=16, k=4, tokenizers=str(path), transform='hflip', strength=1.), ReconstructionLab(tokenizer=str(path)),
            NeighbourLab(n=16, k=4, second=str(path))]
    first = [rows(lab) for lab in labs]
    save_tokenizer(path, changed(conv))
    os.utime(path, ns=(0, 0))
    for lab, before in zip(labs, first, strict=True):
        more = dict(n=16) if hasattr(lab.state, 'k') else {}
        assert rows(lab) == rows(type(lab)(lab.state, **more)) != before


def test_two_files_of_one_inner_name_stand_side_by_side(conv, tmp_path):
    paths = [str(save_tokenizer(tmp_path/f'{i}.safetensors', net)) for i, net in enumerate((conv, changed(conv)))]
    how = dict(n=16, k=4, transform='hflip', strength=1.)
    both = rows(Explorer(tokenizers=paths, **how))
    for p in paths:
        keep = ('tokenizer', 'strength', 'value', 'psnr')
        assert [[r.get(k) for k in keep] for r in both if r['tokenizer'] == p] == [[r.get(k) for k in keep] for r in rows(Explorer(tokenizers=p, **how))]
    assert len({r['agrees_with_vfm'] for r in both if r['strength'] == 0}) == 2


def invert(path, times=False):
    was = os.stat(path)
    im = Image.fromarray(255-np.asarray(Image.open(path)))
    im.save(path)
    if times: os.utime(path, ns=(was.st_atime_ns, was.st_mtime_ns))


def edited(root): invert(root/'03.png')
def edited_and_dated_back(root): invert(root/'03.png', times=True)
def removed(root): (root/'13.png').unlink()
def added(root): Image.new('RGB', (64, 64), 'red').save(root/'000.png')
def replaced(root):
    root.rename(root.with_name('old'))
    pictures(root, seed=6)


@pytest.mark.parametrize('change', [edited, edited_and_dated_back, removed, added, replaced])
def test_a_folder_that_changes_under_an_open_lab_is_read_anew(change, tmp_path):
    root = pictures(tmp_path/'set')
    lab, handed = (NeighbourLab(images=s, n=14, k=3, **CONV) for s in (str(root), folder(root, size=64)))
    first = adds(lab)
    assert adds(handed) == first
    change(root)
    now = adds(lab)
    assert now == adds(NeighbourLab(lab.state, images=str(root), n=14)) != first
    if change in (edited, edited_and_dated_back): assert adds(handed) == now         # a set that was handed over keeps its list of files


@pytest.mark.parametrize('Which, how', [(Explorer, dict(k=3, tokenizers='conv-f8d16', transform='hflip', strength=1.)), (EmbeddingLab, dict(colour='cluster')),
                                        (LayerLab, dict(k=3, second='conv-f8d16'))])
def test_every_lab_reads_an_edited_picture_anew(Which, how, tmp_path):
    def make(): return Which(images=str(tmp_path), n=14, **how)
    for name in ('00.png', '07.png'):
        pictures(tmp_path)
        one = make()
        before = rows(one)
        invert(tmp_path/name, times=True)
        assert rows(one) == rows(make()) != before


def test_the_widget_reads_an_edited_picture_at_the_next_move(tmp_path):
    pytest.importorskip('ipywidgets')
    lab = NeighbourLab(images=str(pictures(tmp_path)), n=14, k=3)
    lab.widget()
    lab.settle()
    for i in range(14): invert(tmp_path/f'{i:02d}.png')
    lab.controls['image'].value = 5
    lab.settle()
    assert 'computed' not in lab.readout.value and lab.picture.value == NeighbourLab(lab.state, images=str(tmp_path), n=14).page().html()
    (tmp_path/'05.png').write_bytes(b'no picture any more')
    lab.controls['image'].value = 6
    lab.settle()
    assert '05.png' in lab.status.value and 'Traceback' not in lab.status.value


def test_two_folders_of_one_name_are_two_sets(tmp_path, monkeypatch):
    for k, seed in (('A', 5), ('B', 6)): pictures(tmp_path/k/'train', seed=seed)
    a, b = (rows(NeighbourLab(images=str(tmp_path/k/'train'), n=14, k=3)) for k in 'AB')
    assert a != b
    monkeypatch.chdir(tmp_path/'A')
    lab = NeighbourLab(images='train', n=14, k=3)
    assert rows(lab) == a
    monkeypatch.chdir(tmp_path/'B')
    assert rows(lab) == b


def test_features_on_disk_are_of_these_pixels_and_these_weights(conv, tmp_path):
    tall, wide = torch.rand(16, 3, 32, 16)*2-1, None
    wide = tall.reshape(16, 3, 16, 32)                 # the same bytes
    one, two = (FeatureCache(ReferenceImages(as_dataset(x)), tmp_path) for x in (tall, wide))
    one.job([as_source(conv)], None).run(lambda: None, lambda n: None)
    assert one.get(as_source(conv), None) is not None and two.get(as_source(conv), None) is None
    assert FeatureCache(one.images, tmp_path).get(as_source(changed(conv)), None) is None
    views = [one.key(as_source(conv), v)[1] for v in (None, ('blur', .1), ('blur', .1000001), ('noise', .1))]
    assert len({*views}) == 4 and one.key(as_source(conv), ('noise', .1), 1) != one.key(as_source(conv), ('noise', .1), 2)


# n of a set -----------------------------------------------------------------------------------------------------------------------------------------

def test_n_of_a_sorted_folder_has_all_classes_and_says_so(tmp_path):
    pictures(tmp_path, 10, 'abcd')
    shelf = ReferenceImages(folder(tmp_path, size=64), 20)
    assert torch.bincount(shelf.labels).tolist() == [5, 5, 5, 5]
    for lab in (Explorer(images=str(tmp_path), n=20, k=3, tokenizers='conv-f8d16', transform='hflip', strength=1.),
                NeighbourLab(images=str(tmp_path), n=20, k=3, **CONV), LayerLab(images=str(tmp_path), n=20, k=3, second='conv-f8d16'),
                EmbeddingLab(images=str(tmp_path), n=20)):
        assert '20 of 40' in lab.text() and {r['taken'] for r in rows(lab)} == {shelf.taken}, lab
    assert {r['key'] for r in rows(NeighbourLab(images=str(tmp_path), n=20, k=3, **CONV))} == {*shelf.names}
    assert 'all 40' in NeighbourLab(images=str(tmp_path), n=99, k=3).text() and 'the first 16 of 10000' in NeighbourLab(images='world', n=16, k=3).text()


def test_an_image_is_not_its_own_neighbour_wherever_it_stands(tmp_path):
    pictures(tmp_path, 10, 'abcd')
    lab, shelf = Explorer(images=str(tmp_path), n=20, k=3, transform='hflip', strength=1.), ReferenceImages(folder(tmp_path, size=64), 20)
    keys = folder(tmp_path, size=64).keys
    for i in (0, 7, 21, 39):
        lab.set(image=i).finish()
        r = lab.compute(lab.state)
        assert all(shelf.names[j] != keys[i] for s in (r.overlap, r.nets[0].overlap) for j in s.near)
        assert torch.equal(to_uint8(r.clean), to_uint8(folder(tmp_path, size=64)[i]['image']))


# other people's sets --------------------------------------------------------------------------------------------------------------------------------

def test_whatever_stands_for_a_set_gives_the_same_numbers(tmp_path):
    pictures(tmp_path)
    files = sorted(tmp_path.iterdir())
    ims = [Image.open(f) for f in files]
    tensors = torch.stack([World(seed=5)[i]['image'] for i in range(14)])
    from torchvision.datasets import ImageFolder
    pictures(tmp_path/'one'/'class')
    sets = [str(tmp_path/'one'), files, [*map(str, files)], ims, [(im, 0) for im in ims], tensors, ImageFolder(tmp_path/'one'), [np.asarray(i) for i in ims]]
    assert len({ReferenceImages(lab_images(s)).digest for s in sets}) == 1
    for Which, how in ((NeighbourLab, dict(n=14, k=3, **CONV)), (ReconstructionLab, dict(image=3, other=4, tokenizer='conv-f8d16'))):
        a, b = (rows(Which(images=s, **how)) for s in (sets[0], ims))
        assert [{k: v for k, v in r.items() if k != 'key'} for r in a] == [{k: v for k, v in r.items() if k != 'key'} for r in b]
    lab = Explorer(images=ims, n=14, k=3, tokenizers='conv-f8d16', transform='hflip', strength=1.)
    assert lab.state.images == 'list' and lab.set(images=tensors).state.images == 'Tensor' and lab.set(images='list').state.images == 'list'
    assert lab.set(images=[*ims[::-1]]).state.images == 'list 2' and len(rows(lab)) == 2


class Bad:
    "A set of somebody's own."
    def __init__(self, image): self.x = image
    def __len__(self): return 20
    def batch(self, indices): return dict(image=self.x.expand(len(list(indices)), -1, -1, -1))


@pytest.mark.parametrize('image, words', [(torch.zeros(1, 3, 64, 64, dtype=torch.uint8), 'integers'), (torch.full((1, 3, 64, 64), float('nan')), 'NaN'),
                                          (torch.full((1, 3, 64, 64), 200.), 'reach'), (torch.zeros(1, 1, 64, 64), 'are .b,3,H,W.')])
@pytest.mark.parametrize('Which', [Explorer, ReconstructionLab, NeighbourLab, LayerLab, EmbeddingLab])
def test_pictures_without_meaning_are_told_in_one_line(Which, image, words):
    lab = Which(images=Bad(image))
    with pytest.raises(UserError, match=words) as e: lab.text()
    assert '\n' not in str(e.value)


@pytest.mark.parametrize('bad', [[], 3, object(), dict(a=1), ['nowhere.png'], [3]])
@pytest.mark.parametrize('Which', [Explorer, ReconstructionLab, NeighbourLab])
def test_what_is_no_set_is_told_in_one_line(Which, bad):
    with pytest.raises(UserError, match=ONE_LINE): Which(images=bad).text()


@pytest.mark.parametrize('how', [dict(size='a'), dict(size=0), dict(size=10**9), dict(size=True), dict(n=-1), dict(n=0), dict(n=2.5), dict(n='all')])
@pytest.mark.parametrize('Which', [Explorer, NeighbourLab])
def test_options_of_another_kind_are_told_in_one_line(Which, how, tmp_path):
    with pytest.raises(UserError, match=ONE_LINE): Which(**how)
    with pytest.raises(UserError, match=ONE_LINE): Which(images=pictures(tmp_path), **how)


def test_a_small_upload_is_said_to_be_enlarged_and_a_strange_one_to_be_strange():
    lab = Explorer(n=16, k=4, transform='hflip', strength=1.)
    def give(name, side):
        Image.new('RGB', (side, side), 'green').save(f := io.BytesIO(), 'PNG')
        lab.receive(name, f.getvalue())
    give('small.png', 10)
    assert 'small.png has 10 x 10 px and was enlarged' in lab.text() and 'enlarged' in rows(lab)[0]['note']
    give('large.png', 90)
    assert 'enlarged' not in lab.text()
    assert 'vfmvae-photo-f8d16 has only ever seen' in lab.text() and 'note' not in rows(lab.set(uploaded=''))[0]     # plain green


def test_a_set_that_its_net_does_not_know_is_said_to_be_so(monkeypatch, tmp_path):
    asked = []
    def says(tok, images):
        asked.append((tok.name, tuple(images.shape)))
        return f'{tok.name} never saw such images' if tok.name == 'conv-f8d16' else ''
    monkeypatch.setattr('vfmvae.lab_parts.unfamiliar', says)
    root = str(pictures(tmp_path))
    labs = [Explorer(images=root, n=14, k=3, tokenizers=('conv-f8d16', 'vfmvae-tiny-f8d16'), transform='hflip', strength=1.),
            ReconstructionLab(images=root, tokenizer='conv-f8d16'), NeighbourLab(images=root, n=14, k=3, second='conv-f8d16'),
            LayerLab(images=root, n=14, k=3, second='conv-f8d16'), EmbeddingLab(images=root, n=14, source='conv-f8d16')]
    for lab in labs:
        assert lab.text().count('never saw such images.') == 1 and all('never saw' in r['note'] for r in rows(lab)), lab
    assert {s[0] for _, s in asked} == {14}
    n = len(asked)
    for lab in labs: lab.figure()
    assert len(asked) == n                      # asked once, whatever moves
    Image.new('RGB', (64, 64)).save(f := io.BytesIO(), 'PNG')
    labs[0].receive('a.png', f.getvalue())
    assert labs[0].text().count('never saw') == 1 and asked[-1][1][0] == 1


def test_copies_and_what_is_left_out_are_said(tmp_path):
    pictures(tmp_path)
    (tmp_path/'99.png').write_bytes((tmp_path/'03.png').read_bytes())
    (tmp_path/'moving.gif').write_bytes(b'GIF89a')
    lab = NeighbourLab(images=str(tmp_path), n=20, k=3, **CONV)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        assert '1 of the 15 images are copies' in lab.text() and 'Left out of the set: 1 ' in lab.text() and '.gif' in rows(lab)[0]['note']
    assert 'copies' not in NeighbourLab(n=16, k=3, **CONV).text()


# states -------------------------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('name, strength', [('blur', 30.), ('scale', .007)])
def test_whether_a_transform_fits_depends_on_the_size_of_the_images(name, strength):
    for State in (ExplorerState, EmbeddingState): State(transform=name, strength=strength)
    large = World(20, seed=8, size=128)
    assert Explorer(images=large, n=14, k=3, transform=name, strength=strength).state.strength == strength
    small = [Explorer(n=14, k=3), EmbeddingLab(n=14, colour='transform')]
    for lab in small:
        before = lab.state
        with pytest.raises(UserError, match=ONE_LINE): lab.set(transform=name, strength=strength)
        assert lab.state is before


@pytest.mark.parametrize('bad', [dict(transform='blur', strength=101), dict(transform='hflip', strength=.5), dict(transform='nose'), dict(seed=2**31),
                                 dict(strength=np.float32('inf')), dict(image=np.array([1, 2])), dict(transform=np.array(['a', 'b']))])
def test_a_state_that_no_image_could_show_is_refused(bad):
    for State in (ExplorerState, EmbeddingState):
        with pytest.raises(UserError, match=ONE_LINE): State(**bad)


def test_numbers_of_numpy_and_torch_are_numbers():
    a, b = EmbeddingState(image=np.int64(3), strength=np.float32(45), seed=torch.tensor(2)), EmbeddingState(image=3, strength=45., seed=2)
    assert a == b and hash(a) == hash(b) and type(a.image) is int and type(a.strength) is float
    lab = SamplerLab(dit(), LATENTS, steps=np.int64(4), step=np.int64(2))
    assert lab.set(steps=np.int64(8)).state.step == 4


# threads ------------------------------------------------------------------------------------------------------------------------------------------

def test_figures_drawn_by_many_threads_leave_the_users_settings_alone():
    import matplotlib
    assert matplotlib.rcParams['font.size'] != STYLE['font.size']
    before = dict(matplotlib.rcParams)
    plain = to_png(curves({'a': [1, 2, 1]}, 'x', 'y'))
    with ThreadPoolExecutor(4) as pool: made = [*pool.map(lambda _: to_png(curves({'a': [1, 2, 1]}, 'x', 'y')), range(8))]
    assert dict(matplotlib.rcParams) == before and all(m == plain for m in made)
    inside, go = threading.Event(), threading.Event()
    def slow():
        with paper_style():
            inside.set()
            go.wait(10)
    t = threading.Thread(target=slow)
    t.start()
    inside.wait(10)
    second = threading.Thread(target=lambda: paper_style().__enter__ and to_png(curves({'a': [1, 2]}, 'x', 'y')))
    second.start()                                        # enters only when the first has left
    matplotlib.rcParams['lines.linewidth'] = 7            # somebody's own choice, made meanwhile
    go.set()
    for thread in (t, second): thread.join()
    try: assert dict(matplotlib.rcParams) == before | {'lines.linewidth': 7}
    finally: matplotlib.rcParams.update(before)


def test_a_way_that_two_threads_ask_for_is_one(monkeypatch):
    from vfmvae import sampler_lab
    made, real, lab = [], sampler_lab.Trajectory, SamplerLab(dit(), LATENTS, steps=4)
    def slow(*how):
        time.sleep(.05)
        made.append(real(*how))
        return made[-1]
    monkeypatch.setattr(sampler_lab, 'Trajectory', slow)
    gate, (stage,) = threading.Barrier(3), lab.stages(lab.state)
    def ask(_):
        gate.wait(10)
        return lab.trajectory(lab.state, stage)
    with ThreadPoolExecutor(3) as pool: found = [*pool.map(ask, range(3))]
    assert len(made) == 1 and all(f is made[0] for f in found)
    for seed in range(40): lab.trajectory(SamplerState(net='net', steps=4, seed=seed), stage)
    assert len(lab.trajectories) <= 33


def test_a_way_of_a_net_that_failed_or_was_trained_on_starts_anew():
    net = dit()
    lab = SamplerLab(net, LATENTS, steps=3, step=3)
    end = tiles(lab)[2]
    hook = net.register_forward_pre_hook(lambda *_: 1/0)
    lab.set(seed=1)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError): lab.page()
    hook.remove()
    assert torch.equal(tiles(lab)[2], tiles(SamplerLab(net, LATENTS, state=lab.state))[2])
    with torch.no_grad(): net.final_layer.linear.weight.mul_(2)
    lab.set(seed=0)
    assert torch.equal(tiles(lab)[2], tiles(SamplerLab(net, LATENTS, state=lab.state))[2]) and not torch.equal(tiles(lab)[2], end)


@pytest.mark.parametrize('guidance', [-1., 1e5, 1e300, float('nan')])
def test_a_guidance_that_leaves_all_numbers_is_told(guidance):
    with pytest.raises(UserError, match=r'^guidance[^\n]+$'): SamplerLab(dit(), LATENTS, steps=3, step=3, guidance=guidance)


def test_nets_may_be_names_and_files(tmp_path):
    path = str(save_tokenizer(tmp_path/'mine.safetensors', tokenizers['conv-f8d16']))
    assert list(Explorer(own=['tiny', 'conv-f8d16', path]).session.own) == ['tiny', 'conv-f8d16', path]
    a, b = (rows(NeighbourLab(n=16, k=4, own=own, second=t)) for own, t in (([path], path), ((), path)))
    assert a == b and [r['adds'] for r in a] == [r['adds'] for r in rows(NeighbourLab(n=16, k=4, second='conv-f8d16'))]
    name = 'dit-vfmvae-tiny-f8d16'
    assert torch.equal(tiles(SamplerLab(name, step=2, steps=3))[2], tiles(SamplerLab(dict(a=open_net(name)), step=2, steps=3))[2])
    with pytest.raises(UserError, match=ONE_LINE): SamplerLab('no-such-net')


def test_no_curve_is_left_out_by_a_logarithmic_axis():
    from vfmvae.plots import loss_curves, training_curves
    rows = [dict(images=16*i, loss=1/i, repa=-.1*i, net_repa=-.05*i) for i in (1, 2, 3)]
    (a,), (b,) = (loss_curves(rows, keys).axes for keys in (('loss',), ('loss', 'repa')))
    assert (a.get_yscale(), b.get_yscale()) == ('log', 'linear')
    for y in (0., -1.): assert curves({'a': [1, 2], 'b': [2, y]}, 'x', 'y', log=True).axes[0].get_yscale() == 'linear'
    assert curves({'a': [1., math.nan]}, 'x', 'y', log=True).axes[0].get_yscale() == 'log'
    panels = {ax.get_ylabel(): ax.get_yscale() for ax in training_curves(rows).axes if ax.lines}
    assert panels == {'loss': 'log', 'REPA (minus cosine)': 'linear'}


# sets as they come: copies, labels without a name, one picture -----------------------------------------------------------------------------------

SMALL = dict(n=13, source='tiny', second='tiny')

class Bare:
    "Pictures with labels, of which not all have a name."
    name, size = 'bare', 64
    def __init__(self, labels, classes=None):
        self.x, self.labels = World(13, seed=3).batch(range(13))['image'], labels
        if classes: self.classes = classes
    def __len__(self): return 13
    def batch(self, at): return dict(image=self.x[[*at]], label=torch.tensor([self.labels[i] for i in at]), key=[f'k{i}' for i in at])


def test_an_image_with_copies_is_not_its_own_neighbour_in_the_plane():
    "The first of the nearest was taken for the image itself; with copies it was one of those, and itself stood in their place."
    x = World(13, seed=3).batch(range(13))['image']
    x[4] = x[9] = x[2]
    for i, copies in ((4, [2, 9]), (9, [2, 4]), (2, [4, 9])):
        lab = EmbeddingLab(images=x, image=i, **SMALL)
        tiles = [t.go['image'] for t in lab.page().sections[1].tiles]
        assert tiles[0] == i and len(tiles) == 9 and i not in tiles[1:] and sorted(tiles[1:3]) == copies


@pytest.mark.parametrize(('labels', 'classes', 'shown'), [
    ([0, 1, 2]*4+[0], None, {'label 0', 'label 1', 'label 2'}), ([-1, 0, 1]*4+[1], ('\u00e9t\u00e9', 'b'), {'label -1', '\u00e9t\u00e9', 'b'}),
    ([0, 1, 7]*4+[0], ('a', 'b'), {'a', 'b', 'label 7'}), ([0, 1]*6+[0], ('a', 'b', 'c'), {'a', 'b'})], ids=['no names', 'minus one', 'beyond', 'unused'])
def test_a_label_without_a_name_is_called_by_its_number(labels, classes, shown):
    "-1 was taken for the last class, a number beyond the classes ended in an error of Python."
    rows = EmbeddingLab(images=Bare(labels, classes), **SMALL).page().rows
    assert {r['group'] for r in rows} == shown
    assert [r['group'] for r in rows] == [classes[k] if classes and 0 <= k < len(classes) else f'label {k}' for k in labels]


def test_a_lab_about_one_picture_opens():
    "The default of the other image is 1, which is not there."
    x = World(2, seed=3).batch(range(2))['image']
    lab = ReconstructionLab(images=x[:1], tokenizer='conv-f8d16')
    assert lab.state.other == 0 and 'Image 0 by conv-f8d16' in lab.text()
    assert ReconstructionLab(images=x, tokenizer='conv-f8d16').state.other == 1
    with pytest.raises(UserError, match='no image 1; there are 1'): lab.set(other=1)


def test_a_sampler_lab_draws_latents_of_the_size_that_the_net_learned():
    "8 x 8, whatever its file says."
    net = copy.deepcopy(open_net('dit-vfmvae-tiny-f8d16'))
    def drawn(**how): return [t.pixels.shape[-2:] for t in SamplerLab(net, steps=1, method='euler', **how).page().sections[-2].tiles][3:]
    assert drawn() == [(8, 8)]*3 and drawn(side=4) == [(4, 4)]*3
    net.meta = net.meta | dict(latent=[16, 4, 6])
    assert drawn() == [(4, 6)]*3 and drawn(side=4) == [(4, 4)]*3
    net.meta = {k: v for k, v in net.meta.items() if k != 'latent'}
    assert drawn() == [(8, 8)]*3


def test_a_sampler_lab_goes_along_the_path_that_the_net_learned():
    net = copy.deepcopy(open_net('dit-vfmvae-tiny-f8d16'))
    net.meta = net.meta | dict(recipe=dict(flow=dict(path='gvp')))
    lab = SamplerLab(net, steps=4, step=2, method='euler', guidance=1.)
    lab.finish()
    [stage] = lab.stages(lab.state)
    way = lab.trajectory(lab.state, stage).done
    noise = ImageNoise(0, [0], (16, 8, 8))
    with torch.no_grad():
        want = [*trajectory(velocity_field(net, torch.tensor([0]), path='gvp'), noise, Sampler(4, 'euler', path='gvp'))]
        (t, z), [*_, latents] = way[2], lab._row(lab.state, stage)
        guess = convert(net(z, torch.full((1,), t), torch.tensor([0])), z, t, 'velocity', 'data', 'gvp')
    for (a, x), (b, y) in zip(way, want, strict=True): assert a == b and torch.equal(x, y.float())
    torch.testing.assert_close(latents[1:2], guess)


def test_a_wide_picture_stays_wide(): # beyond 400 pixels both sides were cut to 400
    for shape, want in {(3, 200, 800): (100, 400, 3), (900, 300): (400, 133, 3), (3, 300, 400): (300, 400, 3), (3, 8, 8): (8, 8, 3)}.items():
        assert _rgb(torch.rand(shape)).shape == want
