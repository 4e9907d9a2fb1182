"""Small faults that were found and mended, each with what it did wrong: compiled decoders, a forgotten image size, a pickle, half precision, launches."""
import json, math, os, signal, subprocess, sys, tarfile, time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from scope import thorough
from test_latents import Toy

from vfmvae.baselines import ConvVAE, ConvVAEConfig
from vfmvae.checkpoints import read_weights
from vfmvae.cli import main
from vfmvae.core import at_least_float32, Notice, resized, UserError
from vfmvae.data import loader
from vfmvae.dit import DiT, DiTConfig, save_net
from vfmvae.files import write_json
from vfmvae.world import World
from vfmvae.flow_task import vfm_targets
from vfmvae.generation import open_net, train_flow
from vfmvae.latents import cache_latents
from vfmvae.layouts import export_latents, import_latents
from vfmvae.losses import multiscale, perceptual, resize, target_transform, vfm_taps
from vfmvae.layers import Pointwise
from vfmvae.presets import Preset, PRESETS
from vfmvae.recipes import evaluate_equivariance, open_data, start_size, train_tokenizer
from vfmvae.run import read_nets, Run
from vfmvae.runtime import make_accelerator
from vfmvae.tokenizer_task import fitting_scales, Stage, TINY, TokenizerTask
from vfmvae.tokenizer import fit_stats, load_tokenizer, open_tokenizer, save_tokenizer
from vfmvae.train import fit
from vfmvae.vfm import VFM
from vfmvae.protocols import FrozenVFMMixin
from vfmvae.views import ResizePadVFM

HALVES = (torch.bfloat16, torch.float16)


# resizing ----------------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('dtype', HALVES)
def test_every_resize_takes_half_precision(dtype):
    g = torch.Generator().manual_seed(0)
    x, vfm = torch.rand(2, 3, 64, 64, generator=g)*2-1, VFM('tiny')
    h = x.to(dtype)
    forms = dict(
        core=lambda v: resized(v, (40, 24)), bicubic=lambda v: resized(v, (40, 24), 'bicubic'), plain=lambda v: resized(v, (90, 70), antialias=False),
        losses=lambda v: resize(v, 40), target=lambda v: target_transform(v, .5, 1), shrink=lambda v: vfm.shrink(v, .5),
        without_vfm=lambda v: FrozenVFMMixin().shrink(v, .5))
    for name, f in forms.items():
        half, whole = f(h), f(h.float())
        assert half.dtype == dtype, name
        assert torch.equal(half, whole.to(dtype)), name           # as if the numbers had been float32: nothing is lost but the last rounding
    net = perceptual(h, x, features=vfm_taps(vfm, size=32))
    values = [vfm_targets(vfm, h, (4, 4))[1], ResizePadVFM(vfm, .75).features(h, [-1])[-1], net, torch.stack(multiscale([h], x[..., ::2, ::2]))]
    wanted = [vfm_targets(vfm, h.float(), (4, 4))[1], ResizePadVFM(vfm, .75).features(h.float(), [-1])[-1],
              perceptual(h.float(), x, features=vfm_taps(vfm, size=32)),
              torch.stack(multiscale([h.float()], x[..., ::2, ::2]))]
    for a, b in zip(values, wanted, strict=True): torch.testing.assert_close(at_least_float32(a), b, atol=.05, rtol=.05)


def test_float64_and_gradients_pass_through():
    x = torch.rand(1, 3, 16, 16, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: resized(v, (7, 9)), x)
    ramp = torch.arange(8.).expand(1, 1, 8, 8)
    torch.testing.assert_close(resized(ramp, (4, 4))[0, 0, 0, 1:3], torch.tensor([2.5, 4.5]))       # pixel centres, not corners
    assert resized((ramp*20).to(torch.uint8), (4, 4)).dtype == torch.float32


# --compile ---------------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('preset, named, compiled', [
    ('tiny', 'synthesis', 1), ('conv-f8d16', 'decoder', 1), ('conv-tiny-f8d16', 'decoder', 1), ('rae-tiny-f8d128', 'blocks', 4)])
def test_every_family_trains_compiled(preset, named, compiled, monkeypatch):
    seen = []
    plain = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, 'compile', lambda m, *a, **k: (seen.append(m), plain(m, *a, **k))[1])
    how = dict(num_images=8, batch_size=4, stages=['first'])
    torch._dynamo.reset()
    counted = torch._dynamo.utils.counters['stats']
    counted.clear()
    _, fast = train_tokenizer(preset, compile='eager', **how)
    assert len(seen) == compiled and counted['unique_graphs'] >= 1              # it was compiled, and what was compiled ran
    _, slow = train_tokenizer(preset, **how)
    assert fast[-1]['loss'] == pytest.approx(slow[-1]['loss'], rel=1e-4)


def test_a_net_is_compiled_by_the_backend_that_was_named(monkeypatch):
    # train_flow took the name for a yes, and compiled by inductor
    asked = []
    monkeypatch.setattr(torch, 'compile', lambda net, **how: (asked.append(how), net)[1])
    for compile in ('eager', True): train_flow('dit-vfmvae-tiny-f8d16', World(16, seed=100), n=16, num_images=8, batch_size=4, compile=compile)
    assert asked == [dict(backend='eager'), dict(backend='inductor')]


def test_a_compiled_decoder_can_be_balanced_against_the_alignment():
    # the adaptive weight asks the compiled graph for gradients twice, so a backward may not write into what the forward kept
    import torch._functorch.config as compiled
    torch._dynamo.reset()
    shape = ConvVAEConfig(4, 4, (1, 1), 1, 1, img_size=16, vfm='tiny', patch=8, dim=128)
    recipe = Preset(shape, (Stage('first', dict(l1=1., vf=1.), (), num_images=4),), 4)
    during, before = [], compiled.donated_buffer
    def look(rows): during.append(compiled.donated_buffer)
    (_, fast), (_, slow) = (train_tokenizer(recipe, compile=c, show=look) for c in ('aot_eager', False))
    assert during == [False]*2 and compiled.donated_buffer is before
    assert fast[-1]['loss'] == pytest.approx(slow[-1]['loss'], rel=1e-4) and fast[-1]['vf_scale'] == pytest.approx(slow[-1]['vf_scale'], rel=1e-3)


def test_a_compiler_never_meets_the_lean_forms():
    x, layer = torch.randn(1, 4, 8, 8), Pointwise(4, 6)
    torch._dynamo.reset()
    graphs = []
    def keep(graph, inputs):
        graphs.append(str(graph.graph))
        return graph.forward
    with torch.no_grad(): torch.testing.assert_close(torch.compile(layer, backend=keep)(x), layer(x))
    assert len(graphs) == 1 and 'conv2d' in graphs[0] and '_linear_pointwise' not in graphs[0]


def test_what_cannot_be_compiled_is_said():
    from vfmvae.recipes import compile_decoder
    with pytest.raises(UserError, match='no decoder that can be compiled'): compile_decoder(Toy())


# --start -----------------------------------------------------------------------------------------------------------------------------------

def test_start_keeps_the_size_of_what_it_starts_from(tmp_path):
    how = dict(batch_size=4, stages=['first'])
    first, _ = train_tokenizer('conv-f8d16', World(16, seed=1, size=32), num_images=4, size=32, run=tmp_path/'run', out=tmp_path/'a.safetensors', **how)
    assert first.config.img_size == 32 and start_size(None) is None
    for start in (tmp_path/'a.safetensors', tmp_path/'run'):
        assert start_size(start) == 32
        assert train_tokenizer('conv-f8d16', num_images=4, start=start, **how)[0].config.img_size == 32
        assert train_tokenizer('conv-f8d16', num_images=4, start=start, size=48, **how)[0].config.img_size == 48
    (tmp_path/'a.json').unlink()                                         # the head of the tensors' file says it, too
    assert start_size(tmp_path/'a.safetensors') == 32
    plain = save_tokenizer(tmp_path/'b.safetensors', load_tokenizer(Path('data/weights/conv-f8d16.safetensors')))
    assert start_size(plain) == 64


# latents_stats -----------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('layout', ['lightningdit', 'reg'])
def test_an_export_holds_no_pickle_unless_asked_and_comes_back(layout, tmp_path):
    c = cache_latents(Toy(), World(20, seed=1), tmp_path/'c', flips=True)
    plain = export_latents(c, tmp_path/'plain', layout)
    assert not [p for p in plain.rglob('*') if p.suffix in ('.pt', '.pth', '.pkl') or p.is_file() and p.read_bytes()[:2] in (b'PK', b'\x80\x02')]
    assert len([*plain.glob('*.safetensors')]) == (1 if layout == 'lightningdit' else 0)       # LightningDiT takes every one for latents
    both = export_latents(c, tmp_path/'both', layout, pickle=True)
    theirs, ours = torch.load(both/'latents_stats.pt', weights_only=True), json.loads((both/'latents_stats.json').read_text())
    for k in ('mean', 'std'):
        assert theirs[k].shape == (1, 3, 1, 1) and torch.equal(theirs[k].flatten(), torch.tensor(ours[k]))
    back = [import_latents(f, tmp_path/f'{f.name}-back', layout, 'toy') for f in (plain, both)]
    for b in back: assert torch.equal(b.scale().mean, c.scale().mean) and torch.equal(b.scale().std, c.scale().std)
    export_latents(c, both, layout)
    assert not (both/'latents_stats.pt').exists()                        # a scale of an earlier export does not stay


@pytest.mark.parametrize('text, said', [('{"mean": [0, 0, 0]}', 'no mean and std'), ('{"mean": 3, "std": 1}', 'no mean and std'),
                                        ('{"mean": [0,0,0], "std": [1,0,1]}', 'no mean and std'), ('[1]', 'list, not an object'), ('{', 'not JSON')])
def test_a_scale_that_is_none_is_said(text, said, tmp_path):
    made = export_latents(cache_latents(Toy(), World(20, seed=1), tmp_path/'c', flips=True), tmp_path/'light', 'lightningdit')
    (made/'latents_stats.json').write_text(text)
    with pytest.raises(UserError, match=said): import_latents(made, tmp_path/'x', 'lightningdit', 'toy')


# accelerate launch ---------------------------------------------------------------------------------------------------------------------------

_SCRIPT = '''
import os, sys, time
import vfmvae.cli as cli
def run(argv):
    import torch.distributed as d
    alone = 'WORLD_SIZE' not in os.environ
    if argv[0] == 'talk':
        n = 1
        if not alone:
            d.init_process_group('gloo')
            import torch
            t = torch.ones(1); d.all_reduce(t); n = int(t)
        os.write(1, f"rank {os.environ.get('RANK')} of {n}\\n".encode())
        if not alone: d.barrier(); d.destroy_process_group()
    if argv[0] == 'fail' and os.environ.get('RANK') == '1': return 7
    if argv[0] in ('fail', 'wait'):
        print('waiting', flush=True)
        time.sleep(120)
    return 0
cli._run = run
if argv := sys.argv[2:]: sys.argv[1:] = argv
sys.exit(cli.main())
'''
_MPI = ('MASTER_ADDR', 'MASTER_PORT', 'WORLD_SIZE', 'RANK', 'LOCAL_RANK', 'ACCELERATE_USE_CPU')


def launch(tmp_path, *more, wait=True):
    script = tmp_path/'script.py'
    script.write_text(_SCRIPT)
    env = {k: v for k, v in os.environ.items() if k not in _MPI} | dict(HF_HOME=str(tmp_path))      # no file of defaults of this machine
    words = [sys.executable, '-m', 'accelerate.commands.launch', *more]
    words = words[:-1] + [str(script), '--', words[-1]]
    # where the tests run in the background, a shell has told them to ignore Ctrl-C, and they would hand that down
    p = subprocess.Popen(words, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
                         preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    if not wait: return p
    out, err = p.communicate(timeout=300)
    return p.returncode, out, err


@pytest.mark.parametrize('n', thorough((1, 2, 3), [2]))
def test_accelerate_starts_as_many_processes_as_it_was_told(n, tmp_path):
    status, out, err = launch(tmp_path, '--cpu', '--num_processes', str(n), 'talk')
    ranks = [None] if n == 1 else list(range(n))
    assert status == 0 and sorted(out.split('\n')[:-1]) == [f'rank {r} of {n}' for r in ranks], err


def test_a_file_of_defaults_says_how_many(tmp_path):
    file = tmp_path/'c.yaml'
    file.write_text('compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_CPU\nuse_cpu: true\nnum_processes: 2\nnum_machines: 1\nmachine_rank: 0\n'
                    "mixed_precision: 'no'\n")
    status, out, err = launch(tmp_path, '--config_file', str(file), 'talk')
    assert status == 0 and sorted(out.split('\n')[:-1]) == ['rank 0 of 2', 'rank 1 of 2'], err


def test_one_that_fails_ends_all(tmp_path):
    begin = time.monotonic()
    status, out, err = launch(tmp_path, '--cpu', '--num_processes', '2', 'fail')
    assert status and 'exit status 7' in err and out.count('waiting') == 1 and time.monotonic()-begin < 110


@pytest.mark.parametrize('how', thorough((signal.SIGINT, signal.SIGTERM), [signal.SIGTERM]))
def test_a_signal_reaches_all(how, tmp_path):
    p = launch(tmp_path, '--cpu', '--num_processes', '2', 'wait', wait=False)
    assert [p.stdout.readline() for _ in range(2)] == ['waiting\n']*2
    os.killpg(p.pid, how)                                                # as a terminal does
    p.communicate(timeout=60)
    until = time.monotonic()+20
    while time.monotonic() < until and alive(p.pid): time.sleep(.1)
    assert not alive(p.pid)


def alive(group: int) -> bool:
    try: os.killpg(group, 0)
    except ProcessLookupError: return False
    return True


def test_the_module_is_the_command_too():
    # accelerate launch -m vfmvae.cli ...: it did nothing, and said nothing
    out = subprocess.run([sys.executable, '-m', 'vfmvae.cli', 'encode', '--tokenizer', 'no-such'], capture_output=True, text=True)
    assert out.returncode == 2 and "no tokenizer named 'no-such'" in out.stderr


def test_where_gloo_is_missing_a_line_says_so(monkeypatch, capsys):
    import vfmvae.cli as cli
    monkeypatch.setattr(cli, '_asked', lambda: 2)
    monkeypatch.setattr(torch.distributed, 'is_gloo_available', lambda: False)
    assert cli._launched() is None and 'no gloo, so this is one process, not 2' in capsys.readouterr().err
    monkeypatch.setattr(cli, '_asked', lambda: 0)
    assert cli._launched() is None and 'torchrun --nproc_per_node' in capsys.readouterr().err


def test_nobody_else_is_taken_for_accelerate(monkeypatch):
    import vfmvae.cli as cli
    for k in _MPI: monkeypatch.delenv(k, raising=False)
    assert cli._asked() == 1
    monkeypatch.setenv('ACCELERATE_USE_CPU', 'True')
    monkeypatch.setenv('MASTER_ADDR', '127.0.0.1')
    assert cli._asked() == 1                                             # the parent is pytest
    monkeypatch.setenv('WORLD_SIZE', '2')
    assert cli._asked() == 1


# what a launcher asks of Accelerate ----------------------------------------------------------------------------------------------------------

SMALL = ConvVAEConfig(channels=4, width=8, mults=(1, 2, 2, 2), blocks=1, decoder_blocks=1, img_size=16)


def test_the_gradient_is_ours_whatever_accelerate_was_told(monkeypatch):
    "Its own `backward` divides by its accumulation steps, and multiplies by the scale of its float16: clipping and the log were of another gradient."
    def lengths(**how):
        torch.manual_seed(0)
        task = TokenizerTask(ConvVAE(SMALL), Stage('a', dict(l1=1.), ()), clip=.1)
        return [r['grad_norm'] for r in fit(task, loader(World(8, size=16), 4), 8, log_every=1, show=lambda h: None, **how)]
    plain, acc = lengths(), make_accelerator()
    acc.scaler = SimpleNamespace(scale=lambda loss: loss*1024, get_scale=lambda: 1024.)
    assert lengths(accelerator=acc) == plain
    monkeypatch.setenv('ACCELERATE_GRADIENT_ACCUMULATION_STEPS', '4')        # accelerate launch --gradient_accumulation_steps 4
    assert lengths() == plain
    monkeypatch.setattr(type(acc), 'mixed_precision', 'bf16')                # ... --mixed_precision bf16
    with pytest.warns(Notice, match='asked for bf16, this task computes in fp32'): assert lengths() == plain


class Begins(Exception): pass


@pytest.mark.parametrize('batch, fits', [(20, False), (18, True)])
def test_groups_of_the_discriminators_are_those_of_all_processes(batch, fits, monkeypatch):
    "Twenty images in two processes were found not to split after the stages before the discriminators; eighteen, which split, were refused."
    p = Preset(SMALL, (Stage('a', dict(l1=1.), (), num_images=60), Stage('b', dict(l1=1., gan=.1), (), num_images=60)), 4, discriminator='tiny')
    def begins(*a, **k): raise Begins
    monkeypatch.setattr('vfmvae.recipes.make_accelerator', lambda: SimpleNamespace(num_processes=2, process_index=0, device=torch.device('cpu')))
    monkeypatch.setattr('vfmvae.recipes.open_data', begins)
    with pytest.raises(Begins if fits else UserError, match=None if fits else 'groups of at most 8'): train_tokenizer(p, batch_size=batch)


# sizes that no preset has --------------------------------------------------------------------------------------------------------------------

def test_a_training_is_priced_and_measured_at_the_size_that_it_has(tmp_path, monkeypatch):
    "`--start` of a tokenizer of another size was priced at the preset's, and a later stage of a run measured at it."
    stages = tuple(Stage(k, dict(l1=1.), (), num_images=4) for k in 'ab')
    monkeypatch.setitem(PRESETS, 'conv-f8d16', Preset(SMALL, stages, 4))
    priced, measured, line = [], [], ['train-tokenizer', '--preset', 'conv-f8d16', '--run', str(tmp_path/'run'), '--batch-size', '4']
    monkeypatch.setattr('vfmvae.recipes.estimate', lambda **how: priced.append(how['size']))
    monkeypatch.setattr('vfmvae.recipes.evaluate_tokenizer', lambda net, ds, n: measured.append((net.config.img_size, ds.size)) or dict(psnr=1., ssim=1., n=4))
    assert main([*line, '--size', '24', '--stages', 'a', '--num-images', '4', '--out', str(tmp_path/'a.safetensors')]) == 0
    assert main([*line, '--stages', 'b', '--num-images', '4']) == 0
    assert measured == [(24, 24)]*2
    assert main(['train-tokenizer', '--preset', 'conv-f8d16', '--start', str(tmp_path/'a.safetensors'), '--dry-run']) == 0
    assert priced == [24]


@pytest.mark.parametrize('size', [8, 40, 56])
def test_equivariance_is_measured_at_the_nearest_size_that_fits(size):
    "Half of five latent pixels are two, not two and a half; half of one is none: both ended in an error."
    found = evaluate_equivariance(ConvVAE(replace(SMALL, img_size=size)).eval(), World(4, size=size))
    assert {*found} == {'turned', 'shrunk'} and all(map(math.isfinite, found.values()))
    assert fitting_scales(None, (.5, 1.), 5) == (.4, 1.) and fitting_scales(TINY, (.5,), 6) == (4/6,)      # a decoder of even sides


def test_the_small_scales_may_count_for_ever():
    "A number was asked for where the rule for infinity stood, and infinity was refused."
    on = dict(l1=1., multiscale=.1)
    assert [*Stage('a', on, multiscale_until=None).active(10**12)] == [*on] and [*Stage('a', on).active(10**12)] == ['l1']


# names and places of files -------------------------------------------------------------------------------------------------------------------

def test_what_is_refused_leaves_the_scale_as_it_was():
    tok = ConvVAE(SMALL).eval()
    fit_stats(tok, World(8, size=16))
    before = {k: v.clone() for k, v in tok.stats.state_dict().items()}
    for bad in ([], torch.full((2, 3, 16, 16), math.nan)):
        with pytest.raises(UserError): fit_stats(tok, bad)
        assert all(torch.equal(v, before[k]) for k, v in tok.stats.state_dict().items())
    for k, v in fit_stats(tok, World(8, size=16)).state_dict().items(): torch.testing.assert_close(v, before[k])


def test_a_tokenizer_or_net_is_written_where_it_is_found_again(tmp_path):
    "`mine.pt`, and a folder that was not there yet, were written and could not be opened."
    tok, net = ConvVAE(SMALL).eval(), DiT(DiTConfig(in_channels=4, num_classes=2, hidden_size=32, depth=1, num_heads=2))
    for name in ('mine', 'mine.pt', 'folder/mine'):
        for save, what in ((save_tokenizer, tok), (save_net, net)):
            with pytest.raises(UserError, match='ends with .safetensors'): save(tmp_path/name, what)
    assert not list(tmp_path.rglob('*.json'))
    tok.save_pretrained(tmp_path/'tok')
    net.save_pretrained(tmp_path/'net')
    assert open_net(str(tmp_path/'net')).config == net.config                # as `vfmvae generate --net` says
    assert {*read_nets(tmp_path/'tok')[0]['ema']} == {*tok.own_state()}      # as `--start` of a finished tokenizer


def test_a_long_name_of_wide_letters_can_be_written(tmp_path):
    (path := tmp_path/('\u5b57'*80+'.json')).write_text('{}')               # the system lets it
    assert write_json(path, dict(a=1)) == path and len(list(tmp_path.iterdir())) == 1


def test_a_shard_may_lie_in_a_folder_with_brackets(tmp_path):
    Image.new('RGB', (16, 16)).save(tmp_path/'a.png')
    (tmp_path/'data [v2]').mkdir()
    with tarfile.open(tmp_path/'data [v2]'/'a.tar', 'w') as t: t.add(tmp_path/'a.png', 'a.png')
    assert len(open_data(tmp_path/'data [v2]'/'a.tar', 16)) == 1


def test_a_path_may_begin_at_home_wherever_one_is_taken(tmp_path, monkeypatch):
    "A shell writes out `~` at the beginning of a word alone, not in --out=~/x, and Python nowhere: some doors knew it, others made a folder named `~`."
    import vfmvae.studies as s
    monkeypatch.setenv('HOME', str(tmp_path))
    tok, kept = ConvVAE(SMALL).eval(), []
    tok.save_pretrained('~/tok')
    assert open_tokenizer('~/tok').config == SMALL
    task = TokenizerTask(ConvVAE(SMALL), Stage('a', dict(l1=1.), ()))
    Run('~/runs/a').save(task, 1, 4)
    assert read_nets('~/runs/a')[1] == 4
    torch.save(tok.state_dict(), tmp_path/'x.pt')
    assert {*read_weights('~/x.pt')[0]} == {*tok.state_dict()}
    for k in 'ab': Image.new('RGB', (16, 16)).save(tmp_path/f'{k}.png')
    for data in ('~/a.png', ['~/a.png', '~/b.png']): assert open_data(data, 16).batch([0])['image'].shape == (1, 3, 16, 16)
    monkeypatch.setattr(s, '_earlier', lambda file, runs: kept.extend((file, runs[0].root)) or {})
    monkeypatch.setattr(s, 'price', lambda *a: None)
    picture = dict(path='world', n=20)
    s.study(dict(data=dict(w=dict(train=picture, test=picture, exam=picture)), tokenizers=dict(a='conv-f8d16'), tokenizer_images=8), '~/runs', '~/t.csv', True)
    assert kept == [tmp_path/'t.json', tmp_path/'runs']
