"""One device rule: every source, tokenizer, net, extractor, loss, measure, command and lab computes where its weights are, or on the device that
was asked for, and answers on the CPU. Run on a pretended card (`fakecuda`), with the numbers of the CPU. What is looked at is found by going
through the library: a new name that is not looked at, or put aside with a reason, is an error here."""
import importlib, inspect, json, math, pkgutil
from functools import cache, partial
from pathlib import Path
import pytest
from scope import thorough
import smoke
import torch
from torch import Tensor, nn
import vfmvae
from fakecuda import COPIED, CPU, CUDA, SYNC, clear, cuda
from vfmvae import cli, discriminators, extractors, labs, sampler_lab, losses, similarity, probes, colours, lab_base
from vfmvae.discriminators import PatchGAN, ProjectedDiscriminator
from vfmvae.neighbours import knn_graph
from vfmvae.align import (cka, cknna, cknna_null, cknna_pairs, cknna_parts, cknna_score, score_banks, score_sources,
                          se_cknna, summarize)
from vfmvae.core import box_muller, Draws, UserError
from vfmvae.diffusability import (diffusability, fdr6, FDR6, interpolation_fd, local_continuity, local_label_consistency, path_shape,
                                  spatial_structure, spectral_energy, viv)
from vfmvae.files import load_weights
from vfmvae.runtime import best_device, device_of
from vfmvae.images import to_pil, TRANSFORMS
from vfmvae.world import World
from vfmvae.data import loader
from vfmvae.dit import DiT, DiTConfig, FAMILIES, NetFeatures, TEXT_FAMILIES
from vfmvae.extractors import bundled_extractor, VFMExtractor
from vfmvae.statistics import compute_statistics, read_samples, write_samples
from vfmvae.evaluate import gfid, rfid, validate
from vfmvae.explorer import DecibelSource, Explorer, neighbour_overlap
from vfmvae.features import banks, extract, pool
from vfmvae.flow import FLOW_WEIGHTS
from vfmvae.samplers import guide, methods, pack_state, sample, Sampler, unpack_state
from vfmvae.samplers import sample_latents
from vfmvae.flow_task import FlowConfig, FlowMonitor, FlowTask, loss_by_level, vfm_targets
from vfmvae.generation import evaluate_samples, generate, nets, tokenizer_of
from vfmvae.latents import cache_latents, cache_name, latent_digest
from vfmvae.metrics import (frechet, frechet_features, frechet_interval, inception_score, kid, moments, precision_recall, psnr, ssim,
                            ssim_signed)
from vfmvae.neighbours import mutual_knn, prepare
from vfmvae.probes import knn_accuracy, linear_probe, probe, ridge_probe
from vfmvae.published import DiffusersVAE
from vfmvae.reader import Reader
from vfmvae.recipes import decode_latents, default_perceptual_loss, evaluate_equivariance, evaluate_tokenizer
from vfmvae.tokenizer import opened
from vfmvae.robustness import layer_scores, robustness
from vfmvae.text import Words
from vfmvae.tokenizer_task import Stage, TokenizerTask
from vfmvae.tokenizer import (families, fit_stats, image_seeds, LatentFeatures, load_tokenizer, net_digest, reconstruct,
                              save_tokenizer, tokenizers, unfamiliar)
from vfmvae.train import fit
from vfmvae.vfm import BUNDLED, VFM, vfms
from vfmvae.views import apply_view, as_source, extract_views, group_by_source, ResizePadVFM, say_unfamiliar

TINY, NET = 'vfmvae-tiny-f8d16', 'dit-vfmvae-tiny-f8d16'
quiet = lambda rows: None
pytestmark = pytest.mark.filterwarnings('ignore::UserWarning')      # sets are as small as they can be


@pytest.fixture(autouse=True)
def _plain(monkeypatch, tmp_path):
    """float32, and normal numbers by the card's formula, on both, so that answers are equal; nothing of one device is read from the disk by the
    other; a bootstrap is short."""
    def normal(self, use, shape, dtype=torch.float32):
        n = math.prod(shape)
        return box_muller(self._raw(use, n + n % 2))[:, :n].reshape(len(self), *shape).to(dtype)
    monkeypatch.setattr(Draws, 'normal', normal)
    monkeypatch.setattr('vfmvae.vfm._AMP', ())
    monkeypatch.setattr('vfmvae.probes._bootstrap', partial(probes._bootstrap, times=20))
    monkeypatch.setenv('VFMVAE_HOME', str(tmp_path/'home'))
    monkeypatch.chdir(tmp_path)
    yield


def gen(seed=0): return torch.Generator().manual_seed(seed)
def normal(*shape, seed=0): return torch.randn(*shape, generator=gen(seed))
def images(n=4, side=64, seed=0): return World(n, seed=seed, size=side).batch(range(n))['image']
@cache
def world(n=24): return World(n, seed=3)


def lies(x) -> list[Tensor]:
    "Every tensor in an answer."
    if isinstance(x, Tensor): return [x]
    if isinstance(x, dict): return lies([*x.values()])
    if isinstance(x, list | tuple): return [t for y in x for t in lies(y)] + (lies(x.facts) if hasattr(x, 'facts') else [])
    return lies(vars(x)) if hasattr(x, '__dataclass_fields__') else []


def same(got, want, path='') -> None:
    "Equal to the rounding of float32, whatever the device."
    if isinstance(want, Tensor):
        assert got.shape == want.shape and got.dtype == want.dtype, path
        torch.testing.assert_close(got.cpu(), want, atol=2e-4, rtol=2e-3, equal_nan=True, msg=lambda m: f'{path}: {m}')
    elif hasattr(want, '__dataclass_fields__'):      # `made` tells the hour, a shelf holds the images that both were given
        same(*({k: v for k, v in vars(x).items() if k not in ('made', 'shelf')} for x in (got, want)), path)
    elif isinstance(want, dict):
        assert {*got} == {*want}, path
        for k in want: same(got[k], want[k], f'{path}.{k}')
    elif isinstance(want, list | tuple):
        assert len(got) == len(want), path
        for i, (a, b) in enumerate(zip(got, want, strict=True)): same(a, b, f'{path}[{i}]')
    elif isinstance(want, float): assert got == pytest.approx(want, rel=2e-3, abs=2e-4, nan_ok=True), path
    else: assert got == want, path


def both(call, stays=False) -> None:
    "`call(device)` on the CPU and with everything on the card: the same answer, on the CPU, or where the tensors were that it was given."
    want = call(CPU)
    clear()
    with cuda(): got = call(CUDA)
    assert COPIED or SYNC, 'nothing was computed on the card'
    assert {t.device for t in lies(got)} <= {CUDA if stays else CPU}
    same(got, want)


# what there is ------------------------------------------------------------------------------------------------------------------------------------

LIBRARY = [importlib.import_module(f'vfmvae.{m.name}') for m in pkgutil.iter_modules(vfmvae.__path__) if not m.name.startswith('_')]
CLASSES = {n: c for m in LIBRARY for n, c in vars(m).items() if inspect.isclass(c) and c.__module__ == m.__name__ and not n.startswith('_')}


def tok(device, name=TINY):
    "A tokenizer of its own on this device."
    return tokenizers[name].to(device)


def dit(family, device=CPU, **more):
    torch.manual_seed(0)
    shape = dict(in_channels=16, num_classes=4, patch_size=2, hidden_size=32, depth=2, num_heads=2, projector_dim=8, encoder_depth=1)
    if family in ('repa', 'reg'): shape |= dict(z_dims=(128,)) | (dict(cls_dim=128) if family == 'reg' else {})
    if family == 'rae': shape |= dict(head_hidden_size=32, head_num_heads=2)
    if family == 'lumina': shape |= dict(text_dim=16, vocabulary=('a', 'ring'), max_tokens=6, kv_heads=1, cond_dim=24, mlp_multiple=8)
    net = DiT(DiTConfig(**(FAMILIES | TEXT_FAMILIES)[family] | shape | more)).eval()
    for p in net.parameters():
        if not p.any(): nn.init.normal_(p, std=.05)
    return net.to(device)


def inception(device):
    "The architecture with random weights."
    fx = pytest.importorskip('torch_fidelity.feature_extractor_inceptionv3', reason='the [eval] extra is not installed')
    with pytest.MonkeyPatch.context() as m:
        m.setattr(extractors, '_inception_weights', lambda path: path)
        m.setattr(torch, 'load', lambda *_, **__: None)
        m.setattr(fx.FeatureExtractorInceptionV3, 'load_state_dict', lambda *_, **__: None)
        torch.manual_seed(0)
        net = extractors.Inception('random')
    for p in net.parameters(): p.data = p.data*.1 if p.ndim < 2 else p.data
    return net.to(device)


SOURCES = {'VFM': lambda d: VFM('tiny').to(d), 'ResizePadVFM': lambda d: ResizePadVFM(VFM('tiny').to(d), .9),
           'LatentFeatures': lambda d: LatentFeatures(tok(d), sample_seed=1), 'NetFeatures': lambda d: NetFeatures(dit('lightningdit', d), tok(d)),
           'DecibelSource': lambda d: DecibelSource(tok(d))}
EXTRACTORS = {'WorldExtractor': lambda d: bundled_extractor().to(d), 'Inception': inception, 'VFMExtractor': lambda d: VFMExtractor(VFM('tiny').to(d), 32)}
JUDGES = {'ProjectedDiscriminator': lambda d: ProjectedDiscriminator(VFM('tiny')).to(d), 'PatchGAN': lambda d: PatchGAN(8).to(d)}
WHOLE = {*SOURCES, *EXTRACTORS, *JUDGES, 'DiT', 'VFMVAE', 'ConvVAE', 'RAE', 'DiffusersVAE', 'Words', 'Reader'}
# parts of the nets above, which run when these run
PARTS = {*'''BatchNormLocal SpectralConv TokenHead ResBlock AttnBlock PatchEmbed TimeEmbed LabelEmbed RMSNorm Attention MLP SwiGLU Block FinalLayer WorldNet
             GeGLU PoolAttention ProjBlock AttnProj ConvProj EqualLinear Style Depthwise Pointwise ConvNeXt Upsample ToRGB ChannelNorm GridAttention LatentStats
             Codebook Quantizer Adapter MappingNetwork TokenizerModel Synthesis ConvStem FrozenVFMMixin
             PriorTarget TextAttention TextBlock CaptionEmbed'''.split()}


def test_every_net_and_source_of_the_library_is_looked_at():
    protocols = {'FeatureSource', 'Statistics'}       # the second has a field of that name
    found = {n for n, c in CLASSES.items() if issubclass(c, nn.Module) or hasattr(c, 'features')} - protocols
    assert found == WHOLE | PARTS
    assert {type(tok(CPU, n)).__name__ for n in tokenizers} == {c.__name__ for _, c in map(families.__getitem__, families)} <= WHOLE


@pytest.mark.parametrize('train', [True, False])
def test_words_compute_where_they_are(train):
    def call(d):
        words = fixed(Words).to(d).train(train)
        text = words.numbers(['a ring on a red ground', '']).to(d)
        with torch.no_grad(): return [words(text), words(text.null()), words(text[[1]])]
    both(call, stays=True)


# nets and adapters ----------------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('name', SOURCES)
def test_a_source_computes_where_it_is(name):
    make = SOURCES[name]
    both(lambda d: extract(make(d), images(), None, 'none', 3, quiet=True))
    both(lambda d: {k: b.features for k, b in banks(make(d), world(), batch_size=16, quiet=True).items()})
    both(lambda d: {k: b.features for k, b in extract_views({'x': (make(d), make(CPU).layers)}, world(6), ['noise', 'mixed'], quiet=True).items()})
    with cuda():
        assert device_of(make(CUDA)) == make(CUDA).device == CUDA
        moved = make(CPU)
        extract(moved, images(2), device='cuda', quiet=True)
        assert device_of(moved) == CUDA


@pytest.mark.parametrize('name', [*vfms])
def test_every_vfm_does(name):
    small = dict(depth=2, embed_dim=48, num_heads=4, img_size=56) if name not in BUNDLED else {}
    torch.manual_seed(0)
    vfm = VFM(name, name in BUNDLED, **small)
    x = images(2, 8*vfm.patch)
    want = vfm.features(x)
    with cuda():
        vfm.to(CUDA)
        same({k: h.cpu() for k, h in vfm.features(x.to(CUDA)).items()}, want)
        with pytest.raises(UserError, match='move one of them'): vfm.features(x)
        vfm.with_class(x.to(CUDA))


@pytest.mark.parametrize('name', thorough(tokenizers, ['vfmvae-tiny-f8d16', 'vfmvae-photo-f8d16', 'conv-f8d16', 'rae-tiny-f8d128']))
def test_every_tokenizer_does(name):
    def call(d):
        t = tok(d, name)
        g = t.encode(images().to(d))
        return g.mean, g.logvar, t.decode(g.mode()), t.decode_scales(g.mode()) if hasattr(t, 'decode_scales') else None
    both(call, stays=True)
    both(lambda d: reconstruct(tok(d, name), images()), stays=True)
    both(lambda d: [t.cpu() for t in fit_stats(tok(d, name), world(), 8).state_dict().values()])
    both(lambda d: [latent_digest(tok(d, name)), net_digest(LatentFeatures(tok(d, name)))])
    with cuda():
        for wrong in (lambda t: t.encode(images(2)), lambda t: t.decode(torch.zeros(1, t.channels, 8, 8))):
            with pytest.raises(UserError, match='move one of them'): wrong(tok(CUDA, name))


def test_a_tokenizer_for_diffusers_does():
    pytest.importorskip('diffusers')
    both(lambda d: [(vae := DiffusersVAE(tok(d))).device == d, vae.decode(vae.encode(images(2).to(d)).latent_dist.mode()).sample], stays=True)


@pytest.mark.parametrize('family', FAMILIES)
def test_every_velocity_net_does(family):
    def call(d):
        net = dit(family, d)
        cls = [normal(3, 128, seed=2).to(d)] if net.config.cls_dim else []
        out = net(normal(3, 16, 8, 8).to(d), torch.tensor([.1, .5, .9]).to(d), torch.tensor([0, 3, 4]).to(d), *cls, layers=net.layers)
        return out.v, out.v_cls, [*out.projections], out.tokens
    both(call, stays=True)
    both(lambda d: extract(NetFeatures(dit(family, d), tok(d)), images(), quiet=True))


def test_a_net_of_captions_does():
    both(lambda d: fixed(Reader).eval().to(d)(images().to(d)), stays=True)
    both(lambda d: len(fixed(Reader).to(d).words(images(), 2)))
    say = lambda d: dit('lumina', d).y_embedder.words.numbers(['a ring', '', 'ring'])
    both(lambda d: dit('lumina', d)(normal(3, 16, 8, 8).to(d), torch.tensor([.1, .5, .9]).to(d), say(d).to(d)), stays=True)
    both(lambda d: sample_latents(dit('lumina', d), say(d), (16, 4, 4), sampler=Sampler(3, guidance=2.)))
    both(lambda d: extract(NetFeatures(dit('lumina', d), tok(d)), images(), quiet=True))
    with cuda():
        from vfmvae.text import TEXT
        class Said(Latents):
            def batch(self, *args, **how):
                b = super().batch(*args, **how)
                text = say(CUDA)[[i % 3 for i in range(len(b['label']))]]
                return b | {k: getattr(text, k) for k in TEXT}
        task = FlowTask(dit('lumina', CPU), FlowConfig())
        fit(task, loader(Said(), 4), 8, log_every=1, show=quiet)
        assert device_of(task.ema.net) == CUDA


@pytest.mark.parametrize('name', EXTRACTORS)
def test_every_extractor_does(name):
    make = EXTRACTORS[name]
    both(lambda d: make(d)(images(1).to(d)), stays=True)
    both(lambda d: compute_statistics(images(2), make(d), 1))
    with cuda(): assert device_of(make(CUDA)) == make(CUDA).device == CUDA


@pytest.mark.parametrize('name', JUDGES)
def test_every_discriminator_does(name):
    def call(d):
        torch.manual_seed(0)
        judge = JUDGES[name](d).eval()
        return judge(images(4).to(d))
    both(call, stays=True)
    with cuda():
        judge = JUDGES[name](CUDA).train()
        lies(judge(images(4).to(CUDA)))[0].sum().backward()
        assert judge.device == CUDA


def test_what_is_opened_by_its_name_goes_to_the_best_device_and_objects_stay():
    with cuda():
        assert best_device() == best_device('cuda') == CUDA and best_device('cpu') == CPU
        mine = tokenizers[TINY]
        assert device_of(opened(TINY)) == device_of(as_source('tiny')) == device_of(as_source(TINY)) == CUDA
        assert device_of(opened(TINY, device='cpu')) == device_of(opened(mine)) == device_of(as_source(mine)) == CPU
        evaluate_tokenizer(mine, world(2), 2)
        generate(net := nets[NET], 1, steps=1, tokenizer=mine)
        assert device_of(mine) == device_of(net) == device_of(tokenizers[TINY]) == device_of(nets[NET]) == CPU
        assert device_of(tokenizer_of(net)) == CPU and device_of(tokenizer_of(net.to(CUDA))) == CUDA
        with_own = load_tokenizer(save_tokenizer('t.safetensors', mine), vfm=(vfm := VFM('tiny').to(CUDA)))
        assert device_of(with_own.vfm) == CPU and device_of(vfm) == CUDA and reconstruct(with_own, images(1)).device == CPU
    with pytest.raises(UserError, match="no device 'abacus' here"): extract(VFM('tiny'), images(1), device='abacus')
    with pytest.raises(UserError, match="no device 'meta'"): best_device('meta')


# every function -------------------------------------------------------------------------------------------------------------------------------------

def rows(d, seed=0, n=40, width=12): return (normal(n, width, seed=9) + .5*normal(n, width, seed=seed)).to(d)
def classes(n=40): return torch.arange(n) % 3
def source(d): return ResizePadVFM(VFM('tiny').to(d))
def maps(d, grid=6): return normal(2, grid*grid, 5).to(d)


def graded(loss, d, *more):
    "A loss and its gradient, both where the pictures are."
    x = images(4, seed=1).to(d).requires_grad_()
    value = loss(x, images(4, seed=2).to(d), *more)
    return value.detach(), torch.autograd.grad(value, x)[0]


class Latents:
    "Held-out latents in memory."
    augment, shape = False, (16, 4, 4)
    def __init__(self, n=12): self.mean, self.label = normal(n, 16, 4, 4), torch.arange(n) % 4
    def __len__(self): return len(self.mean)
    def batch(self, at):
        at = list(at)
        return dict(mean=self.mean[at], label=self.label[at], key=[str(i) for i in at], image=images(len(self))[at])


def flow_task(family, device=CPU):
    return FlowTask(dit(family).to(device), FlowConfig(FLOW_WEIGHTS.get(family, FLOW_WEIGHTS['sit']), lr=1e-3, clip=1., ema=.9),
                    [VFM('tiny').to(device)] if family in ('repa', 'reg') else [])


def levels(d):
    task = flow_task('sit')
    task.ema.net.to(d)
    return loss_by_level(task, Latents(), 2, 12)


def distance_of(x, y): return (x-y).abs().mean()
def drawn(d): return generate(nets[NET].to(d), 4, steps=2, tokenizer=tok(d))
class Difference(nn.Module):
    "As the net of LPIPS is called."
    def __init__(self):
        super().__init__()
        self.w = nn.Conv2d(3, 4, 3)
    def forward(self, x, y): return (self.w(x)-self.w(y)).square()


UNARY = {'effective_rank', 'rankme', 'participation_ratio', 'uniformity'}
MAPS = {'lds', 'cds', 'rmsc', 'srss', 'spatial'}
FEW = dict(k=3, times=20, quiet=True)
def twice(f, **how): return lambda d: f(rows(d), rows(d, 1), **how)
def listed(f): return lambda d: [*f(d)]
def near(f): return lambda d: f(normal(2, 4, 3, 3).to(d), normal(2, 4, 6, 6, seed=1).to(d))
def seen(d, *transforms): return extract_views({'x': (source(d), [0, -1])}, world(), transforms, quiet=True)
def eye(d): return bundled_extractor().to(d)
@cache
def known(): return compute_statistics(world(), bundled_extractor())
def measure(name):
    f = getattr(similarity, name)
    if name in ('srss', 'spatial'): return lambda d: f(maps(d), (normal(2, 36) > 0).to(d))
    return (lambda d: f(maps(d))) if name in MAPS else (lambda d: f(rows(d))) if name in UNARY else twice(f)


def latents(d): return normal(24, 4, 6, 6).to(d)
def ground(d): return (normal(24, 6, 6, seed=1) > 0).to(d)


def compared(d):
    table = similarity.compare(rows(d), rows(d, 1), k=5)
    assert {r['metric'] for r in table} == {*similarity.METRICS}
    return [*table]


CALLS = {
    'features.pool': lambda d: pool(normal(2, 3, 4).to(d)),
    'features.extract': lambda d: extract(source(d), images(), quiet=True),
    'features.banks': lambda d: [*banks(source(d), world(), quiet=True)],
    'views.apply_view': lambda d: [apply_view(images(3).to(d), v, [0, 5, 9]) for v in (('mixed', 1.), *((k, float(t.grid[0])) for k, t in TRANSFORMS.items()))],
    'views.group_by_source': lambda d: [*group_by_source([(source(d), -1), (source(d), 0)])],
    'views.say_unfamiliar': lambda d: say_unfamiliar([source(d)], images().to(d)),
    'views.extract_views': lambda d: [b.features for b in seen(d, 'noise', 'rotation').values()],
    'align.cknna': lambda d: cknna(prepare(rows(d)), prepare(rows(d, 1))),
    'align.cknna_parts': twice(cknna_parts),
    'align.cknna_null': twice(cknna_null, times=20),
    'align.cknna_score': twice(cknna_score, times=20),
    'align.cknna_pairs': lambda d: [*cknna_pairs({'a': rows(d)}, {'b': rows(d, 1)}, times=20)],
    'align.cka': lambda d: [cka(rows(d), rows(d, 1), k, unbiased=u) for k in ('linear', 'rbf') for u in (False, True)],
    'align.score_banks': lambda d: [*score_banks(seen(d, 'hflip'), [(('x', 0), ('x', -1))], ['hflip'], k=3, times=20)],
    'align.score_sources': lambda d: [*score_sources([(tok(d), source(d))], world(), ['hflip'], **FEW)],
    'align.summarize': lambda d: [*summarize(score_sources([((source(d), 0), source(d))], world(), ['hflip'], **FEW))],
    'align.se_cknna': lambda d: se_cknna(tok(d), source(d), world(), 'published', **FEW).facts,
    'probes.knn_accuracy': listed(lambda d: knn_accuracy(rows(d), classes(), rows(d, 1), classes().to(d), 5)),
    'probes.linear_probe': listed(lambda d: linear_probe(rows(d), classes().to(d), rows(d, 1), classes())),
    'probes.ridge_probe': listed(lambda d: ridge_probe(rows(d), normal(40, 2).to(d), rows(d, 1), normal(40, 2, seed=3).to(d))),
    'probes.probe': listed(lambda d: probe(source(d), world(), World(20, seed=5), [-1], k=3, seeds=[0])),
    'robustness.robustness': listed(lambda d: robustness([(tok(d), source(d))], world(), ['hflip'], **FEW)),
    'robustness.layer_scores': listed(lambda d: layer_scores([NetFeatures(dit('sit', d), tok(d))], [source(d)], world(), **FEW)),
    'metrics.psnr': lambda d: psnr(images().to(d), images(seed=1).to(d)),
    'metrics.ssim': lambda d: ssim(images().to(d), images(seed=1).to(d)),
    'metrics.ssim_signed': lambda d: ssim_signed(images().to(d), images(seed=1).to(d)),
    'metrics.moments': listed(lambda d: moments(rows(d))),
    'metrics.frechet': lambda d: frechet(*moments(rows(d)), *moments(rows(d, 1))),
    'metrics.frechet_features': twice(frechet_features),
    'metrics.frechet_interval': listed(lambda d: frechet_interval(rows(d), rows(d, 1))),
    'metrics.kid': twice(kid),
    'metrics.inception_score': lambda d: inception_score(normal(20, 5).softmax(1).to(d), 2),
    'metrics.precision_recall': twice(precision_recall),
    'neighbours.prepare': lambda d: prepare(rows(d)),
    'neighbours.knn_graph': lambda d: [(g := knn_graph(rows(d), 4)).idx, g.val],
    'neighbours.mutual_knn': twice(mutual_knn, k=5),
    'statistics.compute_statistics': lambda d: compute_statistics(images().to(d), eye(d)),
    'statistics.write_samples': lambda d: [*read_samples(write_samples(f'{d.type}.npz', images().to(d)))],
    'evaluate.rfid': lambda d: [rfid(tok(d), world(), eye(d), sample=s, pr_n=0).value for s in (False, True)],
    'evaluate.gfid': lambda d: gfid(images(12, seed=5).to(d), known(), eye(d)).metrics,
    'evaluate.validate': listed(lambda d: validate(eye(d), World(40, seed=3), 20, dict(blur=(1.,), cast=(.2,)))),
    'diffusability.viv': lambda d: [viv(latents(d), classes(24).to(d)), viv(latents(d), classes(24), .5)],
    'diffusability.spectral_energy': lambda d: spectral_energy(latents(d)),
    'diffusability.local_label_consistency': lambda d: [local_label_consistency(latents(d), classes(24).to(d), 5, m) for m in (None, ground(CPU), ground(d))],
    'diffusability.spatial_structure': lambda d: [*spatial_structure(latents(d), ground(d))],
    'diffusability.local_continuity': lambda d: [*local_continuity(tok(d), normal(4, 16, 4, 4).to(d), distance_of, (.5, 1.), batch_size=3)],
    'diffusability.path_shape': lambda d: path_shape(normal(4, 3, 2, 2, 2).to(d)),
    'diffusability.interpolation_fd': lambda d: interpolation_fd(tok(d), normal(8, 16, 8, 8).to(d), eye(d), known()).metrics,
    'diffusability.diffusability': lambda d: [*diffusability(tok(d), world(), labels=classes(24), mask=normal(24, 8, 8) > 0)],
    'diffusability.fdr6': lambda d: [*fdr6(images(6).to(d), images(6, seed=1).to(d), {k: eye(d) for k in FDR6})],
    'samplers.sample': lambda d: sample(lambda z, t: -z, normal(3, 4).to(d), Sampler(3)),
    'samplers.guide': lambda d: guide(lambda z, t: -z, lambda z, t: z, 2.)(normal(3, 4).to(d), .5),
    'samplers.pack_state': lambda d: pack_state(normal(2, 3, 4, 4).to(d), normal(2, 5, seed=1).to(d)),
    'samplers.unpack_state': lambda d: unpack_state(normal(2, 53).to(d), (3, 4, 4)),
    'generation.tokenizer_of': lambda d: tokenizer_of(nets[NET].to(d)).name,
    'generation.generate': lambda d: drawn(d),
    'generation.evaluate_samples': lambda d: evaluate_samples(drawn(CPU), known(), eye(d), pr_n=0).metrics,
    'tokenizer.opened': lambda d: opened(TINY, device=d).name,
    'recipes.evaluate_tokenizer': lambda d: [evaluate_tokenizer(tok(d), world(), 6, 4, loss) for loss in (losses._Mean(fixed(Difference)), losses.pixel)],
    'recipes.evaluate_equivariance': lambda d: evaluate_equivariance(tok(d), world(), 4),
    'recipes.default_perceptual_loss': lambda d: graded(default_perceptual_loss(tok(d), quiet), d),
    'recipes.decode_latents': lambda d: len(decode_latents(tok(d), cache_latents(tok(CPU), world(6), Path('z')), 'out')),
    'latents.latent_digest': lambda d: latent_digest(tok(d)),
    'latents.cache_name': lambda d: cache_name(tok(d), world()),
    'latents.cache_latents': lambda d: cache_latents(tok(d), world(6), d.type, flips=True, batch_size=4).bind(tok(d)).batch(range(6))['mean'],
    'flow_task.vfm_targets': listed(lambda d: vfm_targets(VFM('tiny').to(d), images().to(d), (4, 4))),
    'samplers.sample_latents': lambda d: sample_latents(dit('sit', d), [0, 1, 4], (16, 4, 4), sampler=Sampler(3, guidance=1.5)),
    'flow_task.loss_by_level': lambda d: levels(d),
    'tokenizer.reconstruct': lambda d: reconstruct(tok(d), images()),
    'tokenizer.fit_stats': lambda d: fit_stats(tok(d), world(), 8).std,
    'tokenizer.image_seeds': lambda d: image_seeds(images(3).to(d)),
    'tokenizer.net_digest': lambda d: net_digest(tok(d)),
    'tokenizer.save_tokenizer': lambda d: load_weights(save_tokenizer(f'{d.type}.safetensors', tok(d)))[0],
    'tokenizer.unfamiliar': lambda d: unfamiliar(tok(d), images().to(d)),
    'losses.resize': lambda d: losses.resize(images().to(d), 32),
    'losses.target_transform': lambda d: losses.target_transform(images().to(d), .5, 1),
    'losses.latent_transform': lambda d: losses.latent_transform(normal(2, 4, 8, 8).to(d), .5, 3),
    'losses.pixel': lambda d: graded(losses.pixel, d),
    'losses.multiscale': lambda d: graded(lambda x, y: losses.multiscale([x[..., ::2, ::2]], y)[0], d),
    'losses.ssim_loss': lambda d: graded(losses.ssim_loss, d),
    'losses.perceptual': lambda d: graded(losses.perceptual, d, losses.vfm_taps(VFM('tiny').to(d))),
    'losses.lpips': lambda d: graded(losses._Mean(fixed(Difference)).to(d), d),
    'losses.vfm_taps': lambda d: losses.vfm_taps(VFM('tiny').to(d), size=32)(images().to(d)),
    'losses.marginal_cosine': near(losses.marginal_cosine),
    'losses.distance_matrix': near(losses.distance_matrix),
    'losses.align_loss': near(losses.align_loss),
    'losses.ssr_loss': near(losses.ssr_loss),
    'losses.scr_loss': near(losses.scr_loss),
    'losses.mcr_loss': lambda d: losses.mcr_loss(lambda z: z[:, :3].repeat_interleave(2, 3), normal(2, 4, 3, 3).to(d), losses.pixel, Draws(0, range(2))),
    'losses.moved_latents': lambda d: losses.moved_latents(normal(2, 4, 3, 3).to(d), draws=Draws(0, range(2))),
    'losses.adaptive_weight': lambda d: losses.adaptive_weight((w := normal(3).to(d).requires_grad_()).square().sum(), w.sum(), w, 2.),
    'discriminators.gan_loss_d': listed(lambda d: discriminators.gan_loss_d(normal(3, 4).to(d), normal(3, 4, seed=1).to(d))),
    'discriminators.gan_loss_g': lambda d: discriminators.gan_loss_g(normal(3, 4).to(d)),
    'discriminators.feature_matching': lambda d: discriminators.feature_matching(*(fixed(PatchGAN, 8).to(d)(images(seed=i).to(d)) for i in (0, 1))).detach(),
    'discriminators.diff_augment': lambda d: discriminators.diff_augment(images().to(d), 'color,translation,cutout').shape,
    'discriminators.blur': lambda d: discriminators.blur(images().to(d), 1.),
    'colours.pca_colours': lambda d: colours.pca_colours(normal(2, 5, 4, 4).to(d)),
    'labs.edit_latent': lambda d: [labs.edit_latent(normal(1, 4, 4, 4).to(d), normal(1, 4, 4, 4, seed=1).to(d), e, .5) for e in labs.EDITS],
    'colours.principal_axes': lambda d: colours.principal_axes(normal(9, 5).to(d)),
    'explorer.neighbour_overlap': lambda d: neighbour_overlap(rows(CPU), rows(d, 1)[:2], 5),
    'similarity.compare': compared,
    **{f'similarity.{n}': measure(n) for n in similarity.__all__ if n not in ('METRICS', 'Measure', 'compare')}}
STAYS = {'samplers.sample', 'samplers.guide', 'samplers.pack_state', 'samplers.unpack_state',
         'features.pool', 'views.apply_view', 'neighbours.prepare', 'neighbours.knn_graph', 'metrics.psnr', 'metrics.ssim',
         'metrics.ssim_signed', 'metrics.moments',
         'recipes.default_perceptual_loss', 'flow_task.vfm_targets', 'tokenizer.reconstruct', 'tokenizer.fit_stats', 'labs.edit_latent',
         'colours.principal_axes', *(f'similarity.{n}' for n in MAPS),
         *(k for k in CALLS if k.startswith(('losses.', 'discriminators.')))}
REASONS = {
    'runs as a command, below': '''trials.reconstruction trials.alignment trials.recognition trials.curve trials.finish trials.inside
        trials.diffusable trials.path generation.train_flow recipes.train_tokenizer studies.study studies.train_trial studies.work studies.price
        recipes.estimate recipes.accelerator_on recipes.build_training
        recipes.compile_decoder''',
    'trains on the card in tests/test_joint.py': 'generation.train_jointly',
    'names and numbers only': """trials.vfm_of trials.joint_stage generation.encoder_of reader.score_words
        trials.open_study trials.override trials.plan trials.rows_at evaluate.labels_of trials.measure trials.decoder_parameters
        studies.table_of align.check_enough align.with_layer latents.as_scale latents.all_finite
        views.view_name views.views views.image_set views.images_seen features.layer_index features.as_images features.batches generation.sample_labels
        recipes.open_data recipes.training_data recipes.start_size recipes.schedule_stages recipes.get_preset losses.sample_equivariance latents.described
        recipes.picture_files tokenizer.check_config tokenizer.check_sides protocols.check_trainable extractors.vfm_root extractors.check_judge
        samplers.methods presets.cost_text presets.flow_cost presets.forward_gflop
        lab_parts.slider_values lab_parts.transform_controls lab_parts.default_strength explorer.layer_name
        lab_parts.as_field explorer.lab_notebook
        lab_parts.check_state lab_parts.grouped lab_parts.export_html lab_parts.class_name lab_parts.about_set lab_parts.join_sentences
        lab_parts.make_page session.find_layer session.is_tokenizer tokenizer.in_name""",
    'parts of the labs, which are looked at': '''explorer.explorer_page lab_parts.image_tile lab_parts.about_nets lab_parts.read_images
        session.fingerprint session.identity session.same_net session.claim_name session.nets_by_name
        session.tokens_of session.encode_cpu session.decode_cpu''',
    'reads files, or makes what is moved later': """trials.trained_tokenizer reader.bundled_reader text.load_text text.text_encoder
        text.load_captions text.caption_table latents.cache_folder latents.write_latent_shard latents.finish_cache
        lab_parts.file_stamps lab_parts.files_of_set lab_parts.lab_images
        views.as_source extractors.bundled_extractor statistics.read_samples generation.open_net
        tokenizer.open_tokenizer latents.latent_stats layouts.import_latents layouts.export_latents tokenizer.load_tokenizer""",
    'parts of functions that are looked at': """features.samples features.move_source features.on_cpu features.extract_rows features.as_banks
        features.check_banks features.load_bank neighbours.row_blocks neighbours.unit_rows neighbours.nearest_rows neighbours.copies_of
        neighbours.warn_of_copies neighbours.graph_of neighbours.two_graphs metrics.gaussian losses.structural_similarity
        samplers.trajectory samplers.classifier_free samplers.internal_guidance samplers.velocity_field samplers.time_grid samplers.diffusion
        statistics.with_progress statistics.own_part statistics.own_statistics statistics.images_at_once""",
    'of rows that are there': '''diffusability.compare_diffusability diffusability.epochs_to probes.classes_of probes.share robustness.robustness_figure
        robustness.layer_figure evaluate.compare_statistics evaluate.compare_judges
        metrics.difference metrics.verdict pages.clicked''',
    }
ASIDE = {name: why for why, names in REASONS.items() for name in names.split()}
LOOKED = ('features', 'views', 'align', 'robustness', 'similarity', 'probes', 'metrics', 'neighbours', 'extractors', 'statistics', 'evaluate',
          'diffusability', 'reader', 'text', 'samplers', 'generation', 'recipes', 'presets', 'trials', 'studies', 'latents', 'layouts',
          'flow_task', 'protocols',
          'tokenizer', 'losses', 'discriminators', 'colours', 'pages', 'lab_parts', 'lab_base', 'session', 'sampler_lab', 'labs', 'explorer')


def fixed(make, *args):
    torch.manual_seed(0)
    return make(*args)


def test_every_function_is_looked_at_or_put_aside():
    there = {f'{m}.{n}' for m in LOOKED for n in importlib.import_module(f'vfmvae.{m}').__all__
             if inspect.isfunction(f := getattr(importlib.import_module(f'vfmvae.{m}'), n)) and inspect.unwrap(f).__module__ == f'vfmvae.{m}'}
    assert there == {*CALLS} | {*ASIDE} and not {*CALLS} & {*ASIDE}


@pytest.mark.parametrize('name', CALLS)
def test_a_function_answers_the_same(name): both(CALLS[name], name in STAYS)


# sampling, training, watching -------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('family', FAMILIES)
def test_sampling_waits_for_no_step(family):
    def waits(steps, method, **how):
        clear()
        with cuda(): z = sample_latents(dit(family, CUDA), [0, 1, 4], (16, 4, 4), sampler=Sampler(steps, method, guidance=1.5, **how))
        assert z.shape == (3, 16, 4, 4) and z.device == CPU
        return sum(SYNC.values())
    for method in methods() if family == 'sit' else ('heun',):
        if method != 'dopri5': assert waits(2, method) == waits(4, method) <= 3, (method, SYNC)        # which chooses its own steps, by looking


@pytest.mark.parametrize('family', FAMILIES)
def test_every_net_trains_on_the_card(family):
    with cuda():
        task = flow_task(family)
        fit(task, loader(Latents(), 4), 8, log_every=1, show=quiet)
        assert device_of(task.net) == device_of(task.ema.net) == CUDA


@pytest.mark.parametrize('name', thorough(tokenizers, ['vfmvae-tiny-f8d16', 'vfmvae-photo-f8d16', 'conv-f8d16', 'rae-tiny-f8d128']))
def test_every_tokenizer_trains_on_the_card(name):
    with cuda():
        discriminators = dict(gan=ProjectedDiscriminator(VFM('tiny')), patchgan=PatchGAN(8))
        weights = dict(l1=1., l2=1., ssim=.1, gan=.2, patchgan=.2, feature_matching=1.)
        task = TokenizerTask(tokenizers[name].train(), Stage('x', weights, (), 1e-4), half_life=100, betas=(.9, .99), clip=1., discriminators=discriminators)
        fit(task, loader(world(), 4, seed=0), 4, log_every=1, show=quiet)
        assert device_of(task.ema.net) == CUDA


def test_a_watch_looks_on_the_card(tmp_path):
    def call(d):
        task, data = flow_task('sit', d), Latents()
        task.ema.net.to(d)
        watch = FlowMonitor(task, data, 8, tokenizer=tok(d), vfm=source(d), images=world(), n=6, sampler=Sampler(2))
        return [watch.evaluate(8), FlowMonitor(task, data, 8, tokenizer=tok(d), labels=[0, 1], n=6, sampler=Sampler(2)).evaluate(8)['images']]
    both(call)


def test_extraction_waits_once_a_batch_and_probes_once_a_part():
    with cuda():
        s = source(CUDA)
        for call, waits in ((lambda: extract(s, images(8), None, batch_size=2, quiet=True), 4),
                            (lambda: extract_views({'x': (s, [0, 1, -1])}, images(4), ['hflip'], batch_size=2, quiet=True), 4)):
            clear()
            call()
            assert sum(SYNC.values()) == waits, SYNC
        for probe_of, y in ((linear_probe, classes()), (ridge_probe, normal(40, 2))):
            a, b = rows(CUDA), rows(CUDA, 1)
            clear()
            probe_of(a, y, b, y)
            assert sum(SYNC.values()) == 2, SYNC


# commands -----------------------------------------------------------------------------------------------------------------------------------------------

def pictures() -> str:
    folder = Path('pictures')
    for i, x in enumerate(images(4)):
        (folder/f'{i % 2}').mkdir(parents=True, exist_ok=True)
        to_pil(x).save(folder/f'{i % 2}'/f'{i}.png')
    return str(folder)


def small_study() -> list[str]:
    from test_studies import SPEC
    tiny = dict(SPEC, tokenizers=dict(plain='conv-f8d16'), tokenizer_images=12, net_images=64, latents=64, samples=24, final_samples=24, steps=1)
    for k in ('test', 'exam'): tiny['data'] = dict(world=dict(tiny['data']['world'], **{k: dict(path='world', n=64, seed=8)}))
    n = len([*Path().glob('study-*.json')])         # all measures on the card; on the CPU, one shows where it computes
    Path(f'study-{n}.json').write_text(json.dumps(tiny | dict(measures=['reconstruction'] if n else [])))
    return [f'study-{n}.json', '--folder', f'runs-{n}']


COMMANDS = {
    'demo': lambda: ['--num-images', '16', '--out', 'demo'],
    'train-tokenizer': lambda: ['--preset', 'conv-tiny-f8d16', '--num-images', '4', '--batch-size', '4', '--size', '32', '--out', 't.safetensors',
                                '--held-out', pictures()],
    'train-flow': lambda: ['--n', '8', '--num-images', '8', '--batch-size', '4', '--cache', 'cache', '--out', 'n.safetensors'],
    'reconstruct': lambda: ['--data', pictures()], 'encode': lambda: ['--data', pictures(), '--out', f"cache-{len([*Path().glob('cache-*')])}"],
    'decode': lambda: ['--latents', str(cache_latents(tok(CPU), images(2), Path('z')).dir)],
    'generate': lambda: ['--n', '2', '--steps', '1'],
    'evaluate': lambda: ['--data', pictures()],
    'evaluate-samples': lambda: ['--n', '8', '--steps', '1', '--reference-n', '8', '--out', 'r.json'],
    'align': lambda: ['--data', 'world', '--n', '12', '--k', '3', '--times', '20', '--transforms', 'hflip'],
    'study': small_study,
    'lab': lambda: ['--dry-run', '--n', '12']}


def test_every_command_that_computes_takes_a_device():
    assert {*COMMANDS} == {*cli.COMMANDS} - {'doctor'}
    assert all(('device' in c.options) == (name != 'doctor') for name, c in cli.COMMANDS.items())


# demo and study are trainings and measures of the others, once more, and take four times as long as the other ten together
@pytest.mark.parametrize('name', thorough(COMMANDS, {*COMMANDS} - {'demo', 'study'}))
def test_a_command_computes_where_it_is_told(name, capsys):
    for words, on in ((['--device', 'cuda'], True), (['--device', 'cpu'], False), *([([], True)] if name == 'encode' else [])):
        clear()
        with cuda(), smoke.short_demo(): assert cli.main([name, *COMMANDS[name](), *words]) == 0
        moved = sum(COPIED.values())
        assert (moved > 1e5) == on if name != 'lab' else moved == 0, (name, words, moved)
    said = capsys.readouterr().out
    if name == 'lab': assert "device='cpu'" in Path(said.split('notebook: ')[-1].strip()).read_text()


@pytest.mark.parametrize('name', COMMANDS)
def test_a_device_that_is_not_there_is_one_line_before_any_work(name, capsys, monkeypatch):
    was, words = cli.COMMANDS[name], [w for o in cli.COMMANDS[name].options.values() if o.default is ...
                                  for w in (['world'] if o.name in cli._PLACES else [f'--{o.name}', 'world'])]
    class Began(cli.Command):
        options = was.options
    monkeypatch.setitem(cli.COMMANDS, name, Began(lambda **how: pytest.fail('began')))
    for device in ('abacus', 'meta', 'cuda:-2', *([] if torch.cuda.is_available() else ['cuda', 'cuda:9'])):
        assert cli.main([name, *words, '--device', device]) == 2
        line, = capsys.readouterr().err.splitlines()
        assert f"no device '{device}' here" in line and 'cpu' in line


# labs ------------------------------------------------------------------------------------------------------------------------------------------------------

LABS = {'Explorer': lambda d: (Explorer(images='world', tokenizers=TINY, vfm='tiny', n=12, k=3, device=d, transform='hflip'),
                              [dict(tokenizers=(TINY, 'conv-tiny-f8d16'), image=2), dict(layer=0, metric='cka')]),
        'ReconstructionLab': lambda d: (labs.ReconstructionLab(images='world', tokenizer=TINY, device=d),
                                        [dict(edit='noise'), dict(tokenizer='rae-tiny-f8d128', edit='swap')]),
        'NeighbourLab': lambda d: (labs.NeighbourLab(images='world', first='tiny', second=TINY, n=12, k=3, device=d), [dict(image=4)]),
        'LayerLab': lambda d: (labs.LayerLab(images='world', first='tiny', second=TINY, n=12, k=3, device=d), [dict(second=NET, column=1)]),
        'EmbeddingLab': lambda d: (labs.EmbeddingLab(images='world', source='tiny', second=TINY, n=14, device=d),
                                   [dict(colour='transform'), dict(source=TINY, colour='cluster'), dict(chosen=range(13))]),
        'SamplerLab': lambda d: (sampler_lab.SamplerLab(steps=3, net=NET, device=d), [dict(guidance=2., step=2), dict(method='euler', step=1)]),
        'PromptLab': lambda d: (sampler_lab.PromptLab(steps=3, device=d), [dict(instead='cross', step=2), dict(ground='red', guidance=1.)])}


def test_every_lab_is_looked_at():
    assert {*LABS} == {n for n, c in CLASSES.items() if issubclass(c, lab_base.Lab)} - {'Lab', 'SetLab'}


@pytest.mark.parametrize('name', LABS)
def test_a_lab_shows_the_same_from_the_card(name, monkeypatch, request):
    if name == 'NeighbourLab': request.getfixturevalue('few_tokenizers')
    def call(d):
        monkeypatch.setenv('VFMVAE_HOME', str(Path(d.type).resolve()))
        lab, moves = LABS[name](d)
        shown = []
        for move in ({}, *moves):
            lab.set(**move)
            lab.finish()
            page = lab.page()
            shown += [[t.pixels for s in page.sections for t in s.tiles], [s.heading for s in page.sections], page.words, page.rows]
        return shown
    both(call)


# the list of what differs -----------------------------------------------------------------------------------------------------------------------------------

def test_the_pretended_card_refuses_what_a_card_refuses():
    with cuda():
        x = torch.ones(3, device='cuda:0')
        assert (x+1).device == x.to('cuda:0').device == torch.full((2,), 1., device=CUDA).device == CUDA and (x+1).cpu().tolist() == [2, 2, 2]
        for wrong in (lambda: x+torch.ones(3), lambda: torch.ones(3)[x.long()], lambda: nn.Linear(3, 3)(x), lambda: torch.stack([x, torch.ones(3)]),
                      lambda: torch.randn(3, generator=gen(), device='cuda:0'), lambda: nn.Linear(3, 3).to(CUDA)(torch.ones(3))):
            with pytest.raises(RuntimeError, match=r'device'): wrong()
        for wrong in (x.numpy, lambda: x.__array__()):
            with pytest.raises(TypeError, match='numpy'): wrong()
        clear()
        x.sum().item(), bool((x > 0).all()), x.tolist(), x.cpu(), x.nonzero()
        assert sum(SYNC.values()) == 5
        torch.ones(10).to(CUDA)
        assert sum(COPIED.values()) == 40
    assert not isinstance(torch.ones(2), type(x)) and best_device() == (best_device() if torch.accelerator.is_available() else CPU)
