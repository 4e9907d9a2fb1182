"Evaluation: laws of the distances, invariance to how images are counted, files, records, and the eyes of the embedded world."
import json, math, subprocess, sys, warnings, zipfile
from pathlib import Path
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from vfmvae.core import Gaussian, Moments, UserError
from vfmvae.files import data_dir, digest, load_weights
from vfmvae.images import transform
from vfmvae.world import World
from vfmvae.folders import folder
from vfmvae.extractors import bundled_extractor, Extractor, Inception, VFMExtractor
from vfmvae.statistics import compute_statistics, CONVERSIONS, read_samples, Statistics, write_samples
from vfmvae.evaluate import compare_statistics, gfid, labels_of, Record, rfid, validate
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
def ref(eyes): return compute_statistics(World(150, seed=40), eyes, name='world 40')


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
    a = compute_statistics(world, Exact())
    for images in (world, world.batch(range(60))['image'], [world[i]['image'] for i in range(60)], (world[i] for i in range(60))):
        b = compute_statistics(images, Exact(), size)
        assert (a.mu-b.mu).abs().max() < 1e-10 and (a.sigma-b.sigma).abs().max() < 1e-10 and (a.sigma_s-b.sigma_s).abs().max() < 1e-10
        assert torch.equal(a.features, b.features) and (b.n, b.size) == (60, (64, 64))
        assert abs(compare_statistics(a, b)['fd']) < 1e-8 and compare_statistics(a, b)['precision'] == compare_statistics(a, b)['recall'] == 1


TWO = '''
import sys, torch, torch.nn.functional as F
import torch.distributed as dist
from vfmvae.core import Gaussian, UserError
from vfmvae.files import write_json
from vfmvae.world import World
from vfmvae.statistics import compute_statistics
from vfmvae.evaluate import gfid, rfid
from vfmvae.runtime import finish_distributed
class Exact:
    name, preprocessing = 'exact', 'none'
    def __call__(self, x): return dict(features=F.avg_pool2d(x.double(), 16).flatten(1), spatial=F.avg_pool2d(x.double(), 32).flatten(1))
class Counts:
    name, seen = 'counts', 0
    def encode(self, x):
        self.seen += len(x)
        return Gaussian(x)
    def decode(self, z): return z*.9
import vfmvae.evaluate
vfmvae.runtime.provenance = dict         # asks timm for its version, which takes seconds to import
rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group('gloo', init_method=f'file://{folder}/meet', rank=rank, world_size=2)
world = World(41, seed=5)
x = world.batch(range(41))['image']
for k, images in enumerate((world, x, (world[i] for i in range(41)))):
    compute_statistics(images, Exact(), 8).save(f'{folder}/{k}-{rank}.npz')
found = []
for data, n in ((world, None), (x, None), ([*x], 30)):
    tok = Counts()
    found.append((rfid(tok, data, Exact(), n, batch_size=7).json(), tok.seen))
bad = x.clone()
bad[35] = float('nan')      # the second process meets it: the first must not wait for ever
for f in (lambda: compute_statistics(bad, Exact()), lambda: rfid(Counts(), bad, Exact()), lambda: gfid(bad, f'{folder}/0-{rank}.npz', Exact())):
    try: f()
    except UserError as e: found.append(str(e))
write_json(f'{folder}/found-{rank}.json', found)
finish_distributed()
'''


def test_statistics_and_rfid_do_not_depend_on_the_number_of_processes(tmp_path):
    world = World(41, seed=5)
    alone = compute_statistics(world, Exact())
    both = [subprocess.Popen([sys.executable, '-c', TWO, str(r), str(tmp_path)], cwd=ROOT, stderr=subprocess.PIPE, text=True) for r in (0, 1)]
    class Dimmed(Identity):
        def decode(self, z): return z*.9
    with pytest.warns(UserWarning, match='feature dimensions'): all_, first = (rfid(Dimmed(), world, Exact(), n) for n in (None, 30))
    errors = [p.communicate(timeout=180)[1] for p in both]
    assert [p.returncode for p in both] == [0, 0], errors
    for k in range(3):
        for r in (0, 1):
            s = Statistics.open(tmp_path/f'{k}-{r}.npz')
            assert s.n == 41 and (s.sigma-alone.sigma).abs().max() < 1e-10 and (s.sigma_s-alone.sigma_s).abs().max() < 1e-10
            assert torch.equal(s.features, alone.features)
    for r, share in ((0, (32, 32, 30)), (1, (9, 9, 0))):         # each encodes its own part, and both know the whole
        *records, a, b, c = json.loads((tmp_path/f'found-{r}.json').read_text())
        for (record, seen), want, n in zip(records, (all_, all_, first), share, strict=True):
            assert seen == n and record['n'] == want.n
            assert math.isclose(record['value'], want.value, rel_tol=1e-6) and math.isclose(record['metrics']['sfid'], want.metrics['sfid'], rel_tol=1e-6)
        assert records[2][0]['taken'] == 'the first 30' and 'NaN' in a and 'NaN' in b and 'NaN' in c


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
    kept = json.loads((data_dir()/'results'/'extractor.json').read_text(encoding='utf-8'))
    file = data_dir()/'weights'/'extractor-world.safetensors'
    assert kept['weights'] == digest(load_weights(file)[0]) and file.stat().st_size < 2e6
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
    with pytest.raises(UserError, match='not a plain torch file of weights') as e: Inception(tmp_path/'bad.pth')
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
    a = compute_statistics(World(50, seed=2), Exact(), name='fifty')
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
    assert not r.biased and r.k == 3 and r.splits == 1 and 'balanced' in repr(r)
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
    bare = type('Bare', (Identity, torch.nn.Module), {})()         # has no weights, and so no precision; 'None' was said
    assert rfid(bare, World(40, seed=43), eyes, pr_n=0).precision is None
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


def plain(d=6, seed=0) -> Statistics:
    x = normal(4*d, d, seed=seed)
    return Statistics(*moments(x), n=4*d, extractor='exact', size=(64, 64), name='plain', features=x.float())


ODD = {'the negative': lambda c: -c, 'lopsided': lambda c: c+torch.tril(c, -1)*.01,
       'one negative variance': lambda c: c-torch.eye(len(c))*1.1*torch.linalg.eigvalsh(c)[0],
       'a negative diagonal': lambda c: c-torch.diag(2*c.diagonal()), 'nothing but off the diagonal': lambda c: c-torch.diag(c.diagonal())}


@pytest.mark.parametrize('odd', ODD)
@pytest.mark.parametrize('scale', [1e-12, 1., 1e12])
def test_what_is_no_covariance_is_refused_at_any_scale(odd, scale, tmp_path):
    s = plain()
    c = ODD[odd](s.sigma)*scale
    with pytest.raises(UserError, match='covariance') as e: Statistics(s.mu, c)
    assert one_line(e)
    np.savez(tmp_path/'a.npz', mu=s.mu, sigma=c)
    with pytest.raises(UserError, match='a.npz') as e: Statistics.open(tmp_path/'a.npz')
    assert one_line(e)
    with pytest.raises(UserError, match='covariance'): Statistics(s.mu, s.sigma, s.mu, c)


def test_covariances_that_are_singular_or_rounded_are_taken(tmp_path):
    for x in (normal(10, 300), normal(3, 40)@normal(40, 40, seed=1)*1e4, torch.ones(5, 4).double(), normal(9, 1)):
        mu, c = moments(x)
        for kind in (np.float64, np.float32):
            np.savez(tmp_path/'a.npz', mu=mu.numpy().astype(kind), sigma=c.numpy().astype(kind))
            s = Statistics.open(tmp_path/'a.npz')
            assert s.sigma.dtype == torch.float64 and (s.sigma-c).abs().max() <= 1e-6*c.abs().max() and abs(compare_statistics(s, s)['fd']) <= 1e-4*c.trace()


FACTS = [dict(n='5'), dict(n=True), dict(n=-1), dict(n=1), dict(n=2.5), dict(n=10**400), dict(n=7), dict(size=[64]), dict(size='64'), dict(size=[64, 64, 3]),
         dict(size=[64, '64']), dict(size=[0, 64]), dict(size=[True, 64]), dict(size=dict(a=1)), dict(extractor=5), dict(name=['a']), dict(preprocessing={}),
         dict(resized=1), dict(unknown=1), dict(mu=[0]), [], 5, None, 'text', b'{', b'', b'['*100_000, b'{"n": NaN}', b'{"n": 1e999}', b'{"n": '+b'1'*5000+b'}']


@pytest.mark.parametrize('facts', FACTS, ids=lambda f: str(f)[:40])
def test_facts_of_another_type_are_one_line(facts, tmp_path):
    s = plain()
    text = facts.decode() if isinstance(facts, bytes) else json.dumps(dict(n=24, extractor='exact') | facts if isinstance(facts, dict) else facts)
    np.savez(tmp_path/'a.npz', mu=s.mu, sigma=s.sigma, features=s.features, facts=np.array(text))
    with pytest.raises(UserError, match='a.npz') as e: Statistics.open(tmp_path/'a.npz')
    assert one_line(e) and len(str(e.value)) < 400


def test_arrays_of_another_type_or_shape_are_one_line(tmp_path):
    s = plain()
    good = dict(mu=s.mu.numpy(), sigma=s.sigma.numpy(), features=s.features.numpy(), facts=np.array('{"n": 24}'))
    day, d = np.datetime64('2020-01-01'), 6
    record = np.zeros(d, dtype=[('a', 'f8')])
    wrong = dict(
        mu=[*(good['mu'].astype(t) for t in (bool, int, complex, 'S8', 'U8', object, 'u1')), np.full(d, day), np.full(d, day-day), record,
            *map(np.zeros, ((), (0,), (d, 1), (d+1,)))],
        sigma=[*map(np.zeros, ((d,), (d, d+1), (d, d, 1), (0, 0))), np.eye(d, dtype=int), np.full((d, d), np.inf)],
        features=[good['features'][:9], good['features'][:, :2], good['features']*np.nan, good['features'].astype(int), np.zeros((24, d), bool)],
        probs=[np.full((24, 2), np.nan), np.zeros(24), np.zeros((9, 2))], mu_s=[s.mu.numpy()], sigma_s=[s.sigma.numpy()],
        facts=[np.array([1.]), np.array(['{}']*2), np.array(b'{}'), np.array(5)])
    for k, v in ((k, v) for k, vs in wrong.items() for v in vs):
        np.savez(tmp_path/'a.npz', **good | {k: v})
        with pytest.raises(UserError, match='a.npz') as e: Statistics.open(tmp_path/'a.npz')
        assert one_line(e), (k, v.dtype, v.shape)
    for kind in ('>f8', 'f2', 'f4'):
        np.savez(tmp_path/'b.npz', mu=np.asfortranarray(good['mu'].astype(kind)), sigma=np.asfortranarray(np.eye(d).astype(kind)))
        assert torch.equal(Statistics.open(tmp_path/'b.npz').sigma, torch.eye(d).double())


def test_a_damaged_file_is_a_line_or_what_it_was(tmp_path):
    s, rng, file = plain(), np.random.default_rng(0), tmp_path/'a.npz'
    whole = s.save(file).read_bytes()
    np.savez_compressed(tmp_path/'packed.npz', **np.load(file))
    for made in (whole, (tmp_path/'packed.npz').read_bytes()):
        cases = [made[:n] for n in rng.integers(0, len(made), 30)]
        for at, bit in zip(rng.integers(0, len(made), 120), rng.integers(0, 8, 120), strict=True):
            cases.append(made[:at]+bytes([made[at] ^ 1 << int(bit)])+made[at+1:])
        for case in cases:
            file.write_bytes(case)
            try: got = Statistics.open(file)
            except UserError as e: assert '\n' not in str(e) and 'a.npz' in str(e)
            else: assert torch.equal(got.mu, s.mu) and torch.equal(got.sigma, s.sigma)


def forged(path, name, header, body=b'', packed=True, version=1):
    "An npz with one array whose header says what one likes."
    head = header.encode() + b'\n'
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED) as z:
        size = len(head).to_bytes(2 if version == 1 else 4, 'little')
        z.writestr(f'{name}.npy', b'\x93NUMPY'+bytes([version, 0])+size+head+body)
    return path


def test_a_small_file_that_unpacks_to_gigabytes_is_refused_unread(tmp_path, monkeypatch):
    import tracemalloc
    import vfmvae.statistics as module
    monkeypatch.setattr(module, '_MOST', 2**23)
    np.savez_compressed(tmp_path/'zeros.npz', mu=np.zeros(2000), sigma=np.zeros((2000, 2000)))
    npy = "{'descr': '%s', 'fortran_order': False, 'shape': %s, }"
    cases = {'unpacks to': tmp_path/'zeros.npz', 'header': forged(tmp_path/'header.npz', 'mu', ' '*2**22, version=2)}
    cases |= {shape: forged(tmp_path/f'{i}.npz', 'mu', npy % ('<f8', shape), bytes(800))
              for i, shape in enumerate(('(10000000000,)', '(-1,)', '(100, 0)', '(99999, 99999)', '(True, 100)'))}
    for path in (forged(tmp_path/'s.npz', 'arr_0', npy % ('|u1', '(9, 90000, 90000, 3)'), bytes(300)),
                 forged(tmp_path/'t.npz', 'arr_0', npy % ('|u1', '(4, 0, 8, 3)')),
                 forged(tmp_path/'u.npz', 'conversion', npy % ('<U99999999', '()'), bytes(400))): cases[path] = path
    tracemalloc.start()
    try:
        for says, path in cases.items():
            with pytest.raises(UserError, match=path.name) as e: (read_samples if path is says else Statistics.open)(path)
            assert one_line(e) and (path is says or says not in ('unpacks to',) or says in str(e.value)), str(e.value)
        assert tracemalloc.get_traced_memory()[1] < 8e6
    finally: tracemalloc.stop()
    monkeypatch.setattr(module, '_MOST', 2**30)
    monkeypatch.setattr(module, '_WIDEST', 1000)
    with pytest.raises(UserError, match='dimensions'): Statistics.open(tmp_path/'zeros.npz')


# which images, of what size -----------------------------------------------------------------------------------------------------------------------

class Colours:
    "Mean colours; keeps those it has seen."
    name, preprocessing = 'colours', 'none'
    def __init__(self): self.seen = []
    def __call__(self, x):
        self.seen += x.mean((2, 3)).tolist()
        return dict(features=x.mean((2, 3)).double())


@pytest.fixture(scope='module')
def sorted_by_class(tmp_path_factory):
    "Three classes of 20 pictures of one colour each, 24x32 px, as a folder has them."
    from PIL import Image
    root, rng = tmp_path_factory.mktemp('sorted'), np.random.default_rng(0)
    for k, name in enumerate(('ant', 'bee', 'cat')):
        (root/name).mkdir()
        for i in range(20):
            grey = np.full((24, 32, 3), 60*(k+1)) + rng.integers(-9, 9, 3)
            Image.fromarray(grey.astype(np.uint8)).save(root/name/f'{i:02d}.png')
    return folder(root, size=16)


@pytest.mark.parametrize('n', [9, 30, 60, None])
def test_n_of_a_sorted_set_is_spread_over_it_and_said(sorted_by_class, n):
    eyes = Colours()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        r = rfid(Identity(), sorted_by_class, eyes, n)
    k = [round((c[0]+1)*127.5/60)-1 for c in eyes.seen[:r.n]]
    assert r.n == (n or 60) and len(eyes.seen) == 2*r.n and all(abs(k.count(c)-r.n/3) <= 1 for c in range(3))
    assert r.taken == (None if n in (60, None) else f'{n} of 60, spread')


def test_what_cannot_be_spread_keeps_its_first_and_says_so(eyes):
    world = World(90, seed=43)
    x = world.batch(range(90))['image']
    with pytest.warns(UserWarning, match='feature dimensions'):
        a, b, c = (rfid(Identity(), data, eyes, 20, pr_n=0) for data in (world, [*x], (x[:8], x[8:50])))
    assert a.taken == 'the first 20 of 90' and b.taken == c.taken == 'the first 20'
    assert rfid(Identity(), x, eyes, 80, pr_n=0).taken == '80 of 90, spread'
    for data, n in ((world, 91), ([*x], 91), ((x[:8], x[8:50]), 51)):
        with pytest.raises(UserError, match='1 images too few for n = '): rfid(Identity(), data, eyes, n)
    for n in (0, -1, 1, True, 2.5, '9'):
        with pytest.raises(UserError, match='n: '): rfid(Identity(), world, eyes, n)


def test_sets_of_others_are_judged_as_ours(sorted_by_class):
    at = [5, 25, 45]
    pictures = [sorted_by_class.read(i) for i in at]
    class Pairs:                                # as of torchvision
        def __len__(self): return len(pictures)
        def __getitem__(self, i):
            if i >= len(pictures): raise IndexError
            return pictures[i], i
    want = compute_statistics(torch.stack([torch.from_numpy(np.array(p)).permute(2, 0, 1)/127.5-1 for p in pictures])[..., 4:28], Colours())
    for data in (pictures, Pairs()):
        got = compute_statistics(data, Colours())
        assert (got.size, got.resized) == ((24, 24), 'from 24x32 px') and (got.mu-want.mu).abs().max() < 1e-6
        with pytest.warns(UserWarning, match='feature dimensions'): assert abs(rfid(Identity(), data, Colours()).value) < 1e-9


def test_the_size_judged_and_what_was_resized_are_in_the_record(sorted_by_class, tmp_path):
    from PIL import Image
    large, mixed = tmp_path/'large', tmp_path/'mixed'
    for d in (large, mixed): d.mkdir()
    for i in range(8):
        grey = Image.fromarray(np.full((16, 16, 3), 9*i, np.uint8))
        grey.save(large/f'{i}.png')
        grey.resize((12, 40) if i == 5 else (30, 20)).save(mixed/f'{i}.png')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        ref = compute_statistics(sorted_by_class, Colours(), name='sorted')
        same, enlarged = (gfid(folder(d, size=16), ref, Colours()) for d in (large, mixed))
        r = rfid(Identity(), folder(mixed, size=16), Colours())
    assert ref.size == same.size == (16, 16) and same.resized is None and same.reference_resized == ref.resized == 'from 24x32 px'
    assert enlarged.resized == r.resized == r.reference_resized == 'from 40x12 to 20x30 px, enlarged' and 'enlarged' in repr(r)
    assert Statistics.open(ref.save(tmp_path/'r.npz')).resized == ref.resized
    with pytest.warns(UserWarning, match='enlarged to 20 px'), pytest.raises(UserError, match=r'\(20, 20\) against'):
        gfid(folder(large, size=20), ref, Colours())


def test_the_halves_of_a_sorted_set_are_alike(sorted_by_class):
    t = validate(Colours(), sorted_by_class, 15, dict(cast=(.2, .6), missing=(1,)))
    assert t.halves < .01 and t.rises['cast'] and t.where(axis='missing')[0]['fd'] > 10*t.halves
    class Turns:                                      # every other image is of the other class
        classes = ('a', 'b')
        def __len__(self): return 40
        def batch(self, at): return dict(image=torch.stack([torch.full((3, 16, 16), i % 2-.5+i*1e-4) for i in at]), label=torch.tensor([i % 2 for i in at]))
    assert validate(Colours(), Turns(), 20, dict(cast=(.1, .4))).halves < .05


@pytest.mark.parametrize('names', [(0, 1, 2, 3), (5, 6, 7, 8), (1, 100, 2, 999), ('d', 'a', 'b', 'c')])
def test_classes_go_missing_whatever_they_are_called(names):
    "Labels from 5 on, or with gaps, lost nothing: the distance stood still, and a good judge was refused. Words were a foreign error."
    class Named:
        labels = [names[i % 4] for i in range(160)]
        def __len__(self): return 160
        def batch(self, at): return dict(image=torch.stack([torch.full((3, 16, 16), names.index(self.labels[i])/2-.75) + .01*((i//4) % 5) for i in at]))
    assert labels_of(Named()) == Named.labels
    t = validate(Colours(), Named(), 40, dict(missing=(4, 8)))
    assert t.rises['missing'] and t.column('fd')[1] > t.column('fd')[0] > 2*t.halves


WRONG = {'NaN': lambda x: x*math.nan, 'infinite': lambda x: x/0, 'of 0 to 255': lambda x: x*127.5+127.5,
         **{t: lambda x, t=t: (x*100).to(getattr(torch, t)) for t in ('uint8', 'int64', 'bool')}}


@pytest.mark.parametrize('wrong', WRONG)
def test_extractors_get_images_as_floats_between_minus_one_and_one(wrong, eyes, ref):
    x = WRONG[wrong](World(6).batch(range(6))['image'])
    for call in (lambda: eyes(x), lambda: VFMExtractor(VFM('tiny'))(x), lambda: compute_statistics(x, Exact()), lambda: gfid(x, ref, eyes),
                 lambda: rfid(Identity(), x, eyes)):
        with pytest.raises(UserError) as e: call()
        assert one_line(e)


def test_a_number_that_is_not_finite_is_told_not_returned():
    a, far = plain(), plain(seed=1)
    far = Statistics(far.mu*1e200, far.sigma, n=24)
    with pytest.raises(UserError, match='beyond what float64 holds') as e: compare_statistics(a, far)
    assert one_line(e)
    class Rows(Colours):
        def __call__(self, x): return dict(features=x.mean((2, 3)).double()[:-1])
    with pytest.raises(UserError, match='3 rows of features for 4 images'): compute_statistics(torch.zeros(4, 3, 8, 8), Rows())
    for words in (dict(batch_size=0), dict(batch_size=1.5)):
        with pytest.raises(UserError, match='batch_size'): compute_statistics(torch.zeros(4, 3, 8, 8), Colours(), **words)


def test_bad_input_is_named(tmp_path, eyes, ref):
    world = World(80, seed=1)
    small = Statistics(torch.zeros(3, dtype=torch.float64), torch.eye(3, dtype=torch.float64))
    cases = {'no place for': lambda: gfid(world, ref, eyes, step=3), 'random': lambda: gfid(world, ref, eyes, labels='uniform'),
             'cannot be compared': lambda: gfid(world, ref, Exact()), '64 and 3 dimensions': lambda: gfid(world, small, eyes),
             'NaN': lambda: gfid(torch.full((5, 3, 64, 64), math.nan), ref, eyes),
             r'\(32, 32\) against \(64, 64\)': lambda: gfid(World(80, size=32), ref, eyes),
             'no images': lambda: gfid([], ref, eyes), 'at least 2': lambda: compute_statistics(world.batch([0])['image'], eyes),
             'unequal size': lambda: compute_statistics([torch.zeros(3, 64, 64), torch.zeros(3, 64, 72)], Exact()),
             r'\(b,3,H,W\)': lambda: compute_statistics(torch.zeros(4, 1, 64, 64), eyes),
             'where 9 were asked for': lambda: write_samples(tmp_path/'x.npz', torch.zeros(5, 3, 8, 8), n=9),
             'no conversion': lambda: write_samples(tmp_path/'x.npz', world, conversion='ceil'),
             'how many images': lambda: write_samples(tmp_path/'x.npz', iter([])),
             'hold NaN': lambda: write_samples(tmp_path/'x.npz', torch.full((5, 3, 8, 8), math.nan)),
             'give each a file': lambda: write_samples(tmp_path/'x.npz', [torch.zeros(3, 8, 8), torch.zeros(3, 9, 8)]),
             'two halves': lambda: validate(eyes, World(100), 80)}
    for text, call in cases.items():
        with pytest.raises(UserError, match=text) as e: call()
        assert one_line(e), text
    assert not list(tmp_path.iterdir())      # nothing half written is left


def test_a_file_of_zip_members_without_arrays_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path/'z.npz', 'w') as z: z.writestr('arr_0.npy', b'not an array')
    with pytest.raises(UserError, match='z.npz'): read_samples(tmp_path/'z.npz')


@pytest.mark.parametrize('thing', [World(4), 3, None, torch.zeros(2, 3, 8, 8), ['a.npz'], ''], ids=lambda x: type(x).__name__)
def test_what_is_no_file_of_statistics_is_one_line(thing, eyes):
    # a data set where statistics are asked for is the likely mistake
    for call in (lambda: gfid(World(4), thing, eyes), lambda: Statistics.open(thing), lambda: read_samples(thing)):
        with pytest.raises(UserError, match='is no path') as e: call()
        assert '\n' not in str(e.value)
