"Evaluation: laws of the distances, invariance to how images are counted, files, records, and the eyes of the embedded world."
import json, math, subprocess, sys, zipfile
from pathlib import Path
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from vfmvae.core import Gaussian, UserError, data_dir
from vfmvae.data import World, transform
from vfmvae.evaluate import (CONVERSIONS, Extractor, Inception, Moments, Record, Statistics, VFMExtractor, bundled_extractor, compare_statistics, gfid,
                             read_samples, reference, rfid, validate, write_samples)
from vfmvae.metrics import frechet, frechet_features, moments
from vfmvae.tokenizer import tokenizers
from vfmvae.vfm import VFM

ROOT = Path(__file__).resolve().parent.parent
gen = lambda seed: torch.Generator().manual_seed(seed)
def normal(*shape, seed=0): return torch.randn(*shape, generator=gen(seed), dtype=torch.float64)


class Exact:
    "float64 means of 16x16 px: no rounding of its own."
    name, preprocessing = 'exact', 'none'
    def __call__(self, x): return dict(features=F.avg_pool2d(x.double(), 16).flatten(1), spatial=F.avg_pool2d(x.double(), 32).flatten(1))


class Identity:
    name = 'identity'
    def encode(self, x): return Gaussian(x)
    def decode(self, z): return z


@pytest.fixture(scope='module')
def eyes(): return bundled_extractor()


@pytest.fixture(scope='module')
def ref(eyes): return reference(World(150, seed=40), eyes, name='world 40')


def one_line(e): return '\n' not in str(e.value)


# laws -------------------------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(('n', 'm', 'd'), [(400, 300, 16), (150, 90, 64), (50, 60, 80)])   # the last: fewer images than dimensions
def test_the_distance_is_torch_fidelitys(n, m, d):
    fid = pytest.importorskip('torch_fidelity.metric_fid', reason='the [eval] extra is not installed')
    a, b = normal(n, d, seed=d)@normal(d, d, seed=1)+3, normal(m, d, seed=d+1)@normal(d, d, seed=2)
    other = fid.fid_statistics_to_metric(*(fid.fid_features_to_statistics(x) for x in (a, b)), False)['frechet_inception_distance']
    assert math.isclose(frechet_features(a, b), other, rel_tol=1e-4)
    total = [Moments(), Moments()]
    for t, x in zip(total, (a, b), strict=True):
        for part in x.split(37): t.add(part)
    assert math.isclose(frechet(*total[0].result(), *total[1].result()), other, rel_tol=1e-4)


@pytest.mark.parametrize('size', [1, 2, 13, 100, 331])
def test_moments_do_not_depend_on_the_grouping(size):
    x = normal(331, 24)*torch.logspace(-3, 3, 24, dtype=torch.float64) + 1e3
    mean, cov = moments(x)
    parts = x.split(size)
    one, left, right = Moments(), Moments(), Moments()
    for i, p in enumerate(parts):
        one.add(p)
        (left if i % 2 else right).add(p)
    left.merge(right)
    for m in (one, left):
        got = m.result()
        assert m.n == 331 and (got[0]-mean).abs().max() < 1e-10*1e3 and (got[1]-cov).abs().max() < 1e-10*cov.abs().max()


@pytest.mark.parametrize('size', [1, 7, 60])
def test_statistics_do_not_depend_on_the_batch(size):
    world = World(60, seed=3)
    a = reference(world, Exact())
    for images in (world, world.batch(range(60))['image'], [world[i]['image'] for i in range(60)], (world[i] for i in range(60))):
        b = reference(images, Exact(), size)
        assert (a.mu-b.mu).abs().max() < 1e-10 and (a.sigma-b.sigma).abs().max() < 1e-10 and (a.sigma_s-b.sigma_s).abs().max() < 1e-10
        assert torch.equal(a.features, b.features) and (b.n, b.size) == (60, (64, 64))
        assert abs(compare_statistics(a, b)['fd']) < 1e-8 and compare_statistics(a, b)['precision'] == compare_statistics(a, b)['recall'] == 1


TWO = '''
import sys, torch, torch.nn.functional as F
import torch.distributed as dist
from vfmvae.data import World
from vfmvae.evaluate import reference
from vfmvae.train import leave
class Exact:
    name, preprocessing = 'exact', 'none'
    def __call__(self, x): return dict(features=F.avg_pool2d(x.double(), 16).flatten(1), spatial=F.avg_pool2d(x.double(), 32).flatten(1))
rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group('gloo', init_method=f'file://{folder}/meet', rank=rank, world_size=2)
world = World(41, seed=5)
for k, images in enumerate((world, world.batch(range(41))['image'], (world[i] for i in range(41)))):
    reference(images, Exact(), 8).save(f'{folder}/{k}-{rank}.npz')
leave()
'''


def test_statistics_do_not_depend_on_the_number_of_processes(tmp_path):
    alone = reference(World(41, seed=5), Exact())
    both = [subprocess.Popen([sys.executable, '-c', TWO, str(r), str(tmp_path)], cwd=ROOT, stderr=subprocess.PIPE, text=True) for r in (0, 1)]
    errors = [p.communicate(timeout=180)[1] for p in both]
    assert [p.returncode for p in both] == [0, 0], errors
    for k in range(3):
        for r in (0, 1):
            s = Statistics.open(tmp_path/f'{k}-{r}.npz')
            assert s.n == 41 and (s.sigma-alone.sigma).abs().max() < 1e-10 and (s.sigma_s-alone.sigma_s).abs().max() < 1e-10
            assert torch.equal(s.features, alone.features)


def test_equal_sets_are_at_distance_zero(eyes, ref):
    r = gfid(World(150, seed=40), ref, eyes, batch_size=17)
    assert abs(r.value) < 1e-4 and abs(r.metrics['sfid']) < 1e-4 and r.metrics['precision'] == r.metrics['recall'] == 1
    assert 1 < r.metrics['is'] <= 16
    assert abs(rfid(Identity(), World(80, seed=40), eyes).value) < 1e-4


# the bundled extractor --------------------------------------------------------------------------------------------------------------------------

def test_the_bundled_extractor_sees_what_is_wrong(eyes):
    axes = dict(blur=(1, 3), noise=(.05, .2), cast=(.1, .3), colour=(.3, .7), missing=(2, 8), jpeg=(85, 95))
    t = validate(eyes, World(1280, seed=50), 320, axes)
    assert t.ok, t
    assert t.where(axis='blur')[0]['fd'] > 2*t.halves and t.where(axis='noise')[-1]['fd'] > 10*t.halves


def test_blobs_are_worse_than_good_reconstructions(eyes):
    class Blobs(Identity):
        name = 'blobs'
        def encode(self, x): return Gaussian(F.interpolate(x, (8, 8), mode='bilinear', antialias=True))
        def decode(self, z): return F.interpolate(z, (64, 64), mode='bilinear')
    class Blur(Identity):
        name = 'blur'
        def encode(self, x): return Gaussian(transform(x, 'blur', 5))
    with pytest.warns(UserWarning, match='feature dimensions'): rfid(Identity(), World(40, seed=60), eyes)
    good, blobs, blur = (rfid(t, World(100, seed=60), eyes, pr_n=0).value for t in (tokenizers['conv-f8d16'], Blobs(), Blur()))
    assert 0 < 3*good < min(blobs, blur)


def test_its_committed_validation_is_of_these_weights_and_passes(eyes):
    import hashlib
    kept = json.loads((data_dir()/'results'/'extractor.json').read_text(encoding='utf-8'))
    file = data_dir()/'weights'/'extractor-world.safetensors'
    assert kept['weights'] == hashlib.sha256(file.read_bytes()).hexdigest() and file.stat().st_size < 2e6
    assert kept['ok'] and kept['accuracy']['clean'] >= .93 and sum(p.numel() for p in eyes.parameters()) <= 400_000
    for axis in kept['rises']:
        fds = [kept['halves'], *(r['fd'] for r in kept['rows'] if r['axis'] == axis)]
        assert fds == sorted(fds)
    b = World(400, seed=61).batch(range(400))
    assert (eyes(b['image'])['probs'].argmax(1) == b['label']).float().mean() > .93


def test_validation_can_fail():
    class Blind(Exact):
        def __call__(self, x): return dict(features=x.mean((2, 3)).double())
    t = validate(Blind(), World(300, seed=9), 150, dict(blur=(1, 4), cast=(.1, .4)))
    assert not t.ok and t.rises['cast'] and not t.rises['blur']      # mean colours do not see a blur


# other extractors ---------------------------------------------------------------------------------------------------------------------------------

def test_any_vfm_is_an_extractor():
    x = World(4).batch(range(4))['image']
    pooled, cls = VFMExtractor(VFM('tiny')), VFMExtractor(VFM('vit_tiny_patch16_224', pretrained=False, depth=1), size=96)
    assert isinstance(pooled, Extractor) and 'mean of the patch tokens' in pooled.name and 'class token (96 px)'.split()[0] in cls.name
    assert pooled(x)['features'].shape == (4, 128) and cls(x)['features'].shape == (4, 192)
    from torchvision.transforms.functional import InterpolationMode, resize
    up = resize(x, [96, 96], InterpolationMode(cls.vfm.interpolation), antialias=True).clamp(-1, 1)
    vit = cls.vfm
    assert torch.allclose(cls(x)['features'], vit._at((96, 96)).forward_features(vit.normalize(up))[:, 0], atol=1e-4)


def test_inception_says_what_is_missing(tmp_path, monkeypatch):
    pytest.importorskip('torch_fidelity', reason='the [eval] extra is not installed')
    with pytest.raises(UserError, match='no Inception weights') as e: Inception(tmp_path/'none.pth')
    assert one_line(e)
    (tmp_path/'bad.pth').write_bytes(b'nothing')
    with pytest.raises(UserError, match='not a weights-only torch file') as e: Inception(tmp_path/'bad.pth')
    assert one_line(e)
    def offline(*a, **k): raise OSError('no route')
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path/'hub'))
    monkeypatch.setattr(torch.hub, 'download_url_to_file', offline)
    with pytest.raises(UserError, match='cannot get the Inception weights') as e: Inception()
    assert one_line(e) and not list((tmp_path/'hub').rglob('*.pth'))
    monkeypatch.setitem(sys.modules, 'torch_fidelity.feature_extractor_inceptionv3', None)
    with pytest.raises(UserError, match=r"pip install 'vfmvae\[eval\]'"): Inception()


def test_inception_layers_are_those_of_adm(tmp_path):
    fx = pytest.importorskip('torch_fidelity.feature_extractor_inceptionv3', reason='the [eval] extra is not installed')
    torch.manual_seed(0)
    names = {}
    class Bare(fx.FeatureExtractorInceptionV3):       # random weights of the right shapes, so that nothing is fetched
        def load_state_dict(self, sd, *a, **k): return None
    was, fx.torch.load = fx.torch.load, lambda *a, **k: names
    try: net = Bare('x', ['2048', 'logits_unbiased'], feature_extractor_weights_path='x')
    finally: fx.torch.load = was
    torch.save(net.state_dict(), tmp_path/'random.pth')
    inception = Inception(tmp_path/'random.pth')
    out = inception(World(2).batch(range(2))['image'])
    assert {k: tuple(v.shape) for k, v in out.items()} == dict(features=(2, 2048), spatial=(2, 2023), probs=(2, 1008))
    assert torch.allclose(out['probs'], (out['features']@net.fc.weight.T).softmax(1), atol=1e-6) and (out['spatial'] >= 0).all()


# files ------------------------------------------------------------------------------------------------------------------------------------------

def test_statistics_survive_a_file_and_admS_open(tmp_path):
    a = reference(World(50, seed=2), Exact(), name='fifty')
    b = Statistics.open(a.save(tmp_path/'a.npz'))
    assert all(torch.equal(getattr(a, k), getattr(b, k)) for k in ('mu', 'sigma', 'mu_s', 'sigma_s', 'features'))
    assert (b.n, b.extractor, b.size, b.name, b.probs) == (50, 'exact', (64, 64), 'fifty', None)
    pixels = np.zeros((4, 8, 8, 3), np.uint8)
    np.savez(tmp_path/'VIRTUAL_x.npz', arr_0=pixels, **{k: getattr(a, k).numpy() for k in ('mu', 'sigma', 'mu_s', 'sigma_s')})
    adm = Statistics.open(tmp_path/'VIRTUAL_x.npz')
    assert (adm.n, adm.extractor, adm.name) == (None, None, 'VIRTUAL_x') and torch.equal(adm.sigma_s, a.sigma_s)
    assert len(read_samples(tmp_path/'VIRTUAL_x.npz')) == 4
    r = gfid(World(60, seed=2), tmp_path/'VIRTUAL_x.npz', Exact())
    assert r.reference == 'VIRTUAL_x' and r.reference_n is None and 'sfid' in r.metrics and 'precision' not in r.metrics
    assert {*np.load(tmp_path/'a.npz', allow_pickle=False).files} == {'facts', 'mu', 'sigma', 'mu_s', 'sigma_s', 'features'}


@pytest.mark.parametrize('conversion', CONVERSIONS)
def test_samples_survive_a_file(tmp_path, conversion):
    x = torch.rand(70, 3, 8, 12, generator=gen(1))*2.2 - 1.1
    file = read_samples(write_samples(tmp_path/'s.npz', x, conversion=conversion))
    want = dict(round=((x+1)*127.5).round(), sit=(127.5*x+128).floor(), repa=(255*(x+1)/2).floor())[conversion].clamp(0, 255)
    assert np.array_equal(np.load(file.path, allow_pickle=False)['arr_0'], want.permute(0, 2, 3, 1).numpy().astype(np.uint8))
    assert file.conversion == conversion and file.shape == (70, 8, 12, 3) and not list(tmp_path.glob('.*'))
    back = torch.cat(list(file))
    assert torch.equal(CONVERSIONS['round'](back), want.to(torch.uint8))
    write_samples(tmp_path/'again.npz', back, n=33)
    assert np.array_equal(np.load(tmp_path/'again.npz')['arr_0'], np.load(file.path)['arr_0'][:33])
    np.savez_compressed(tmp_path/'packed.npz', np.load(file.path)['arr_0'])
    assert torch.equal(torch.cat(list(read_samples(tmp_path/'packed.npz'))), back) and read_samples(tmp_path/'packed.npz').conversion is None


def test_gfid_of_a_file_is_gfid_of_its_images(tmp_path, eyes, ref):
    world = World(100, seed=41)
    path = write_samples(tmp_path/'s.npz', world, conversion='sit')
    file, plain = gfid(path, ref, eyes), gfid(torch.cat(list(read_samples(path))), ref, eyes)
    assert math.isclose(file.value, plain.value, rel_tol=1e-6) and file.subject == 's.npz' and 'by sit' in file.preprocessing
    ref.save(tmp_path/'ref.npz')
    assert math.isclose(gfid(world, tmp_path/'ref.npz', eyes).value, plain.value, rel_tol=1e-6)


# records and bad input ----------------------------------------------------------------------------------------------------------------------------

def test_a_record_keeps_what_was_said_and_invents_nothing(eyes, ref):
    how = dict(sampler='euler', steps=50, shift=.3, guidance=dict(scale=1.5, interval=(0., .7)), labels='balanced', ema=.9999, precision='bfloat16', seed=7)
    r = gfid(World(100, seed=42), ref, eyes, **how)
    assert isinstance(r, Record) and r.value == r.metrics['fd'] and (r.n, r.reference, r.reference_n, r.extractor) == (100, 'world 40', 150, 'world')
    j = json.loads(json.dumps(r.json()))
    assert j['guidance']['interval'] == [0., .7] and j['made']['versions']['torch'] == torch.__version__ and j['labels'] == 'balanced'
    assert not r.biased and r.neighbours == 3 and r.splits == 1 and 'balanced' in repr(r)
    with pytest.raises(AttributeError): r.value = 0.
    bare = gfid(World(100, seed=42), ref, eyes)
    assert all(getattr(bare, k) is None for k in (*how, 'subject', 'latent'))
    with pytest.warns(UserWarning, match='feature dimensions'): few = gfid(World(50, seed=42), ref, eyes)
    assert few.biased and 'biased' in repr(few)


def test_rfid_samples_by_pixels_and_counts(eyes):
    tok, world = tokenizers['conv-f8d16'], World(90, seed=43)
    a, b = (rfid(tok, world, eyes, n=80, sample=True, batch_size=s, pr_n=0).value for s in (32, 11))
    assert math.isclose(a, b, rel_tol=1e-3)
    mode = rfid(tok, world, eyes, n=80, pr_n=0)
    assert (mode.n, mode.latent, mode.kind, mode.subject, mode.precision) == (80, 'mode', 'rFID', tok.name, 'float32') and 'precision' not in mode.metrics
    with pytest.raises(UserError, match='images too few') as e: rfid(tok, world, eyes, n=91)
    assert one_line(e)
    with pytest.raises(UserError, match='walks through the data twice'): rfid(tok, iter([world[0]['image']]), eyes)


def bad_files(tmp_path):
    write_samples(tmp_path/'s.npz', torch.zeros(40, 3, 16, 16))
    whole = (tmp_path/'s.npz').read_bytes()
    (tmp_path/'cut.npz').write_bytes(whole[:len(whole)//2])
    flipped = bytearray(whole)
    flipped[len(whole)//2] ^= 255
    (tmp_path/'flipped.npz').write_bytes(flipped)
    (tmp_path/'text.npz').write_text('hello')
    np.savez(tmp_path/'pickled.npz', arr_0=np.array([dict()], dtype=object), mu=np.array([dict()], dtype=object), sigma=np.eye(2))
    np.savez(tmp_path/'float.npz', arr_0=np.zeros((4, 8, 8, 3)))
    np.savez(tmp_path/'other.npz', x=np.zeros(3))
    np.savez(tmp_path/'empty.npz', arr_0=np.zeros((0, 8, 8, 3), np.uint8))
    return ('cut', 'flipped', 'text', 'pickled', 'float', 'other', 'empty', 'missing')


def test_bad_sample_files_are_named(tmp_path):
    for name in bad_files(tmp_path):
        with pytest.raises(UserError, match=f'{name}.npz') as e: list(read_samples(tmp_path/f'{name}.npz'))
        assert one_line(e), name


def test_bad_statistics_are_named(tmp_path):
    bad_files(tmp_path)
    np.savez(tmp_path/'shapes.npz', mu=np.zeros(3), sigma=np.eye(2))
    np.savez(tmp_path/'nan.npz', mu=np.full(3, np.nan), sigma=np.eye(3))
    for name in ('cut', 'text', 'pickled', 'other', 'missing', 'shapes', 'nan'):
        with pytest.raises(UserError, match=name) as e: Statistics.open(tmp_path/f'{name}.npz')
        assert one_line(e), name


def test_bad_input_is_named(tmp_path, eyes, ref):
    world = World(80, seed=1)
    small = Statistics(torch.zeros(3, dtype=torch.float64), torch.eye(3, dtype=torch.float64))
    cases = {'no place for': lambda: gfid(world, ref, eyes, step=3), 'random': lambda: gfid(world, ref, eyes, labels='uniform'),
             'cannot be compared': lambda: gfid(world, ref, Exact()), '64 and 3 dimensions': lambda: gfid(world, small, eyes),
             'NaN': lambda: gfid(torch.full((5, 3, 64, 64), math.nan), ref, eyes),
             r'\(32, 32\) against \(64, 64\)': lambda: gfid(World(80, size=32), ref, eyes),
             'no images': lambda: gfid([], ref, eyes), 'at least 2': lambda: reference(world.batch([0])['image'], eyes),
             'unequal size': lambda: reference([torch.zeros(3, 64, 64), torch.zeros(3, 64, 72)], Exact()),
             r'\(b,3,H,W\)': lambda: reference(torch.zeros(4, 1, 64, 64), eyes),
             'where 9 were asked for': lambda: write_samples(tmp_path/'x.npz', torch.zeros(5, 3, 8, 8), n=9),
             'no conversion': lambda: write_samples(tmp_path/'x.npz', world, conversion='ceil'),
             'how many images': lambda: write_samples(tmp_path/'x.npz', iter([])),
             'samples contain NaN': lambda: write_samples(tmp_path/'x.npz', torch.full((5, 3, 8, 8), math.nan)),
             'give each a file': lambda: write_samples(tmp_path/'x.npz', [torch.zeros(3, 8, 8), torch.zeros(3, 9, 8)]),
             'two halves': lambda: validate(eyes, World(100), 80)}
    for text, call in cases.items():
        with pytest.raises(UserError, match=text) as e: call()
        assert one_line(e), text
    assert not list(tmp_path.iterdir())      # nothing half written is left


def test_a_file_of_zip_members_without_arrays_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path/'z.npz', 'w') as z: z.writestr('arr_0.npy', b'not an array')
    with pytest.raises(UserError, match='z.npz'): read_samples(tmp_path/'z.npz')
