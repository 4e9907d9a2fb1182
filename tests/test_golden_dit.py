"""Diffusion nets against numbers of the published implementations (random weights, fp32, CPU).

Tolerances are those of the golden README: models and features 2e-5 of the largest value, gradients 2e-4 of it with a floor of 1e-6.
"""
import csv, json, math, os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from vfmvae.dit import DiT, DiTConfig, FAMILIES, SIZES
from vfmvae.layers import sincos_table
from vfmvae.dit_layers import rope_table
from vfmvae.flow import flow_loss, FLOW_WEIGHTS, FlowTargets
from vfmvae.published import load_net

SHARED = Path(os.environ.get('VFMVAE_SHARED') or Path(__file__).resolve().parents[2]/'shared')
GOLDEN, PARAMS = SHARED/'golden'/'diffusion', SHARED/'spec'/'params'
pytestmark = pytest.mark.skipif(not GOLDEN.is_dir(), reason='the golden numbers are not here; set VFMVAE_SHARED')
FILES = {'sit_tiny_ls1': 'sit', 'sit_tiny_ls0': 'sit', 'lightningdit_tiny_published': 'lightningdit', 'lightningdit_tiny_qknorm_vfmvae': 'lightningdit',
         'lightningdit_tiny_plain': 'lightningdit', 'lightningdit_tiny_woshift_p2': 'lightningdit', 'repa_sit_tiny': 'repa', 'reg_sit_tiny': 'reg',
         'reg_vfmvae_sit_tiny': 'reg', 'rae_ditdh_tiny': 'rae'}
DATA_TIME = ('sit', 'lightningdit')

def close(a, b, rel=2e-5): assert (a-b).abs().max() <= rel*b.abs().max(), f'{float((a-b).abs().max()/b.abs().max()):.1e}'

class Case:
    "One golden file and the net loaded from it; velocities and times in the file's own direction."
    def __init__(self, name):
        self.g, self.family = load_file(GOLDEN/f'{name}.safetensors'), FILES[name]
        self.cfg = json.loads((GOLDEN/'manifest.json').read_text())[name]['cfg']
        self.sd = {k[3:]: v for k, v in self.g.items() if k.startswith('sd.')}
        self.net = load_net(self.sd, self.family, **self.cfg)
        self.sign = -1 if self.family in DATA_TIME else 1
    def time(self, t): return 1-t if self.sign < 0 else t
    def v(self, x, t, y, cls=None):
        v = self.net(x, self.time(t), y, cls)
        return tuple(self.sign*a for a in v) if isinstance(v, tuple) else self.sign*v

@pytest.fixture(scope='module', params=FILES)
def case(request): return Case(request.param)

@pytest.fixture(scope='module', params=[k for k, f in FILES.items() if f not in ('sit', 'rae')])
def trained(request): return Case(request.param)

@torch.no_grad()
@pytest.mark.filterwarnings('error')
def test_output_and_features(case):
    g, net = case.g, case.net
    seen, hooks = {}, []
    for k in g:
        if k.startswith('feat.'):
            hooks.append(net.get_submodule(k[5:]).register_forward_hook(lambda m, i, o, k=k: seen.__setitem__(k, o)))
    p = net(g['in.x'], case.time(g['in.t']), g['in.y'], g.get('in.cls'), layers=net.layers)
    for h in hooks: h.remove()
    close(case.sign*p.v, g['out.v'])
    assert {k for k in g if k.startswith('feat.')} == set(seen) and len(seen) > 8
    for k, out in seen.items(): close(out[0] if isinstance(out, tuple) else out, g[k])
    for i in range(len(net.blocks)): assert torch.equal(p.tokens[i], seen[f'feat.blocks.{i}'])
    close(p.tokens['final'], g['feat.final_layer'])
    assert len(p.projections) == len(case.cfg.get('z_dims', ()))
    for j, h in enumerate(p.projections): close(h, g[f'out.zs{j}'])
    assert (p.v_cls is None) == ('out.v_cls' not in g)
    if p.v_cls is not None: close(case.sign*p.v_cls, g['out.v_cls'])

@torch.no_grad()
def test_settings_can_be_read_off(case):
    "Without any setting but the heads (and for REPA's head the depth that no shape tells) the same net comes out."
    few = {k: case.cfg[k] for k in ('num_heads', 'encoder_depth') if k in case.cfg}
    net = load_net(case.sd, case.family, **few)
    assert net.config == case.net.config
    x = [case.g[f'in.{k}'] for k in ('x', 't', 'y')] + [case.g.get('in.cls')]
    assert torch.equal(net(*x, layers=[]).v, case.net(*x, layers=[]).v)

@torch.no_grad()
def test_guidance(case):
    "[cond; null] on the same x: channels 0 to 2 (RAE: all) become null + s (cond - null), the others stay; outside the interval s is 1."
    keys = [k for k in case.g if k.startswith('cfg.out')]
    assert len(keys) == {'sit': 1, 'lightningdit': 3, 'rae': 2}.get(case.family, 0)
    for key in keys:
        y, half = case.g['cfg.y'], case.g['cfg.x'][:len(case.g['cfg.y'])//2]
        t = case.g['cfg.t'] if 'cfg.t' in case.g else torch.full((len(y),), float(key.split('_t')[1]))
        lo, hi = (.3, .9) if 'int0.3-0.9' in key else (.125 if 'start0.125' in key else 0, 1)
        s = float(key.split('scale')[1].split('_')[0]) if lo <= float(t[0]) <= hi else 1
        v = case.v(torch.cat([half, half]), t, y)
        k = v.shape[1] if case.family == 'rae' else 3
        cond, null = v[:, :k].chunk(2)
        close(torch.cat([(null + s*(cond-null)).repeat(2, 1, 1, 1), v[:, k:]], 1), case.g[key])

def mean(x): return x.flatten(1).mean(1)

def losses(case):
    "(values by golden name, total) of the training loss, as the spec writes it."
    g, out = case.g, {}
    if case.family == 'lightningdit':
        t, x1, x0 = g['in.t'], g['in.x'], g['loss.x0']
        s = t[:, None, None, None]
        v, u = case.v(s*x1 + (1-s)*x0, t, g['in.y']), x1-x0
        out = {'mse_per_sample': mean((v-u)**2), 'cos_per_sample': mean(1-F.cosine_similarity(v, u, dim=1))}
        return out | {'total': out['mse_per_sample'].mean() + out['cos_per_sample'].mean()}
    t, x, e = g['loss.t'], g['in.x'], g['loss.noise']
    s = t[:, None, None, None]
    cls = None if case.family == 'repa' else (1-t[:, None])*g['in.cls'] + t[:, None]*g['loss.noise_cls']
    p = case.net((1-s)*x + s*e, t, g['in.y'], cls, layers=[])
    out['denoise_per_sample'] = mean((p.v-(e-x))**2)
    out['proj'] = torch.stack([-F.cosine_similarity(h, g[f'in.z{j}'], dim=-1).mean() for j, h in enumerate(p.projections)]).mean()
    total = out['denoise_per_sample'].mean() + .5*out['proj']
    if cls is not None:
        out['denoise_cls_per_sample'] = mean((p.v_cls-(g['loss.noise_cls']-g['in.cls']))**2)
        total = total + .03*out['denoise_cls_per_sample'].mean()
    return out | {'total': total}

def test_losses_and_gradients(trained):
    got = losses(trained)
    want = {k[5:] for k in trained.g if k.startswith('loss.')} - {'x0', 't', 'noise', 'noise_cls'}
    assert set(got) == want
    for k in want: close(got[k].detach(), trained.g[f'loss.{k}'])
    trained.net.zero_grad()
    got['total'].backward()
    grads = {k[5:] for k in trained.g if k.startswith('grad.')}
    assert grads == {k for k, p in trained.net.named_parameters() if p.grad is not None} == {k for k, _ in trained.net.named_parameters()}
    for k, p in trained.net.named_parameters():
        ref = trained.g[f'grad.{k}']
        assert (p.grad-ref).abs().max() <= max(1e-6, 2e-4*float(ref.abs().max())), k

def test_the_library_computes_the_same_total(trained):
    g, family = trained.g, trained.family
    def net(*inputs): return trained.net(*inputs, layers=[])
    t, noise = (1-g['in.t'], g['loss.x0']) if family == 'lightningdit' else (g['loss.t'], g['loss.noise'])
    cls = (g['in.cls'], g['loss.noise_cls']) if family == 'reg' else (None, None)
    targets = FlowTargets(*cls, [g[k] for k in sorted(g) if k.startswith('in.z')])
    with torch.no_grad(): close(flow_loss(net, g['in.x'], g['in.y'], FLOW_WEIGHTS[family], t, noise, targets=targets)['loss'], g['loss.total'])

# the lists of full-size files ------------------------------------------------------------------------------------------------------------------

FULL = {'SiT-XL-2_official256': ('sit', 675_129_632), 'SiT-XL-2_nosigma': ('sit', 675_111_184), 'LightningDiT-XL-1_vavae': ('lightningdit', 675_256_736),
        'LightningDiT-XL-1_vfmvae': ('lightningdit', 675_260_768), 'LightningDiT-B-1': ('lightningdit', 130_557_728), 'REPA-SiT-XL-2': ('repa', 683_242_512),
        'REG-SiT-XL-2': ('reg', 685_017_360), 'REG-SiT-XL-1_vfmvae': ('reg', 685_062_304), 'RAE-DiTDH-XL_dinov2b': ('rae', 838_675_796)}
OWN = {'SiT-XL-2_official256': dict(learn_sigma=True), 'SiT-XL-2_nosigma': {}, 'LightningDiT-XL-1_vavae': dict(in_channels=32, patch_size=1),
       'LightningDiT-XL-1_vfmvae': dict(in_channels=32, patch_size=1, qk_norm='rms'), 'LightningDiT-B-1': dict(in_channels=32, patch_size=1, qk_norm='rms'),
       'REPA-SiT-XL-2': {}, 'REG-SiT-XL-2': {}, 'REG-SiT-XL-1_vfmvae': dict(in_channels=32, patch_size=1, qk_norm='layer'),
       'RAE-DiTDH-XL_dinov2b': dict(in_channels=768, patch_size=1)}

def listed(name): # [(key, shape, kind)] of a parameter list
    with open(PARAMS/f'PARAMS_{name}.tsv', newline='') as f:
        rows = [r for r in csv.reader(f, delimiter='\t') if len(r) == 4 and not r[0].startswith('#')]
    return [(k, tuple(map(int, s.split('x'))), kind) for k, s, _, kind in rows]

@pytest.mark.parametrize('name', FULL)
def test_full_size_names_shapes_and_counts(name):
    family, count = FULL[name]
    rows = listed(name)
    with torch.device('meta'): net = DiT(DiTConfig(**{**FAMILIES[family], **SIZES['B' if '-B-' in name else 'XL'], **OWN[name]}))
    table = {k for k, _, _ in rows if k == 'pos_embed' or 'rope' in k}
    assert {k: tuple(v.shape) for k, v in net.state_dict().items()} == {k: s for k, s, _ in rows if k not in table}
    assert {k for k, _ in net.named_parameters()} == {k for k, _, kind in rows if kind == 'trainable'}
    assert count == sum(math.prod(s) for _, s, kind in rows if kind != 'buffer')
    assert count == sum(v.numel() for v in net.state_dict().values()) + math.prod(dict((k, s) for k, s, _ in rows)['pos_embed'])

@pytest.mark.parametrize('name', FULL)
def test_full_size_files_load_without_settings(name):
    family, _ = FULL[name]
    with torch.device('meta'): sd = {k: torch.empty(s) for k, s, _ in listed(name)}
    for k, v in sd.items():
        if 'freqs' in k: sd[k] = rope_table(16, 16, v.shape[1])[int('sin' in k)]
    n, dim = sd['pos_embed'].shape[1:]
    sd['pos_embed'] = F.pad(sincos_table(16, 16, dim), (0, 0, n-256, 0))[None]
    net = load_net(sd, family)
    own = DiTConfig(**{**FAMILIES[family], **SIZES['B' if '-B-' in name else 'XL'], **OWN[name], 'data_time': family in DATA_TIME})
    assert net.config == own
