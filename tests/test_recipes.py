"""Recipes and the command line: the main job, and one clear line for every mistake a user can make."""
import json, re, warnings
import numpy as np
import pytest, torch
from PIL import Image
from vfmvae.cli import main
from vfmvae.core import Notice, UserError
from vfmvae.images import to_pil
from vfmvae.world import World
from vfmvae.presets import Preset, PRESETS
from vfmvae.recipes import build_training, estimate, evaluate_tokenizer, open_data, schedule_stages, train_tokenizer
from vfmvae.tokenizer import open_tokenizer
from vfmvae.tokenizer_task import SCALES, Stage, TINY
from vfmvae.protocols import Tokenizer
from vfmvae.tokenizer import reconstruct, tokenizers


@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
    d = tmp_path_factory.mktemp('pictures')
    for i, x in enumerate(World(3, seed=9, size=80).batch(range(3))['image']): to_pil(x).save(d/f'{i}.png')
    return d


def one_line(capsys, *argv):
    "The single line on stderr of a command that must fail with status 2."
    try: status = main([str(a) for a in argv])
    except SystemExit as e: status = e.code
    out = capsys.readouterr()
    assert status == 2
    lines = [x for x in out.err.splitlines() if x.startswith('vfmvae')]
    assert len(lines) == 1 and 'Traceback' not in out.err, out.err
    return lines[0]


@pytest.mark.parametrize('name', list(tokenizers))
def test_every_registered_tokenizer_keeps_the_protocol(name):
    tok, x = tokenizers[name], World(4, seed=9).batch(range(4))['image']
    g = tok.encode(x)
    assert isinstance(tok, Tokenizer) and tok.name == name
    assert g.mean.shape == (4, tok.channels, 64//tok.stride, 64//tok.stride) == tok.decode(g.mode()).shape[:1] + g.mean.shape[1:]
    assert torch.equal(reconstruct(tok, x), tok.decode(g.mode()))
    assert torch.equal(g.sample(torch.Generator().manual_seed(3)), g.sample(torch.Generator().manual_seed(3)))
    assert .5 < g.mean.std() < 1.5                                   # unit scale
    small = tok.encode(torch.nn.functional.avg_pool2d(x, 2))
    assert small.mean.shape[2:] == (32//tok.stride,)*2


def test_reconstruction_does_not_depend_on_the_batch():
    tok, x = open_tokenizer('vfmvae-tiny-f8d16'), World(5, seed=9).batch(range(5))['image']
    with torch.no_grad(): torch.testing.assert_close(reconstruct(tok, x), torch.cat([reconstruct(tok, i[None]) for i in x]), atol=1e-4, rtol=1e-4)


def test_bundled_tokenizer_keeps_layout_and_colours():
    r = evaluate_tokenizer(open_tokenizer('vfmvae-tiny-f8d16'), World(10_000, seed=31), n=96)
    assert r['psnr'] >= 24, r


def test_demo_leaves_one_page(tmp_path, pictures, capsys, recwarn):
    assert main(['demo', '--data', str(pictures), '--out', str(tmp_path), '--num-images', '64']) == 0
    page, results = (tmp_path/'index.html').read_text(), json.loads((tmp_path/'results.json').read_text())
    assert str(tmp_path/'index.html') in capsys.readouterr().out
    outside = 'these pictures lie outside it'                   # the pictures are drawn: said once, for all three tokenizers
    assert sum(outside in str(w.message) for w in recwarn) == page.count(outside) == 1
    titles = re.findall('<h2>(.*?)</h2>', page)
    assert len({*titles}) == len(titles) and 'From noise to photographs' in titles
    assert page.count('data:image/png;base64') == 8 and page.count('<tr>') == 1+9 and len(results['rows']) == 9
    three = 'vfmvae-photo-f8d16', 'conv-photo-f8d16', 'conv-f8d16.photo'
    assert {*results['rows']} > {f'{n}, {of}' for n in three for of in ('clothes', 'your images')} | {'vfmvae-tiny-f8d16, the world'}
    untrained, trained = (r['psnr'] for k, r in results['rows'].items() if 'trained' in k)
    assert trained > untrained and all(results['rows'][f'{n}, clothes']['psnr'] > trained for n in three)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['index.html', 'results.json', 'samples']
    assert len(list((tmp_path/'samples').glob('*.png'))) == 3*8+16


def test_train_resume_and_use_from_the_command_line(tmp_path, pictures, capsys):
    args = ['train-tokenizer', '--data', str(pictures), '--batch-size', '2', '--run', str(tmp_path/'run'), '--out', str(tmp_path/'mine.safetensors')]
    assert main([*args, '--num-images', '4', '--stages', 'first']) == 0 and main([*args, '--num-images', '8', '--stages', 'first']) == 0
    assert main(['reconstruct', '--tokenizer', str(tmp_path/'mine.safetensors'), '--data', str(pictures), '--out', str(tmp_path/'out')]) == 0
    assert len(list((tmp_path/'out').glob('*.png'))) == 3
    assert 'training images' in capsys.readouterr().out


def test_another_vfm_takes_the_place_of_the_presets():
    from vfmvae.vfm import VFM
    tok, _ = train_tokenizer('tiny', vfm=VFM('vit_tiny_patch16_224', pretrained=False, depth=2), num_images=10, batch_size=2)
    assert (tok.config.scale, tok.config.in_dims, tok.config.layers) == (2, (192,)*3, (0, 1, -1))
    assert tok.encode(World()[0]['image'][None]).mean.shape == (1, 16, 8, 8)
    tok, _ = train_tokenizer('tiny', vfm=VFM('test_vit3', pretrained=False), num_images=10, batch_size=2)      # no multiple of 64: padded
    assert tok.config.in_dims == (96,)*3 and tok.ldm_adapter.in_dims == [128]*3


def test_all_stages_on_a_folder_at_another_size_and_a_branch(tmp_path, pictures, capsys):
    args = ['train-tokenizer', '--data', str(pictures), '--batch-size', '2', '--size', '128']
    assert main([*args, '--num-images', '10', '--run', str(tmp_path/'run'), '--out', str(tmp_path/'mine.safetensors')]) == 0
    said = capsys.readouterr().out
    assert [f'after {s.name}' in said for s in PRESETS['tiny'].stages] == [True]*5
    assert sorted(p.name for p in (tmp_path/'run').iterdir()) == sorted(s.name for s in PRESETS['tiny'].stages)
    assert (tmp_path/'run/gan/preview.png').stat().st_size > 1000
    tok = open_tokenizer(tmp_path/'mine.safetensors')
    assert tok.config.img_size == 128 and tok.encode(World(1, size=128).batch([0])['image']).mean.shape == (1, 16, 16, 16)
    # the branch: the SSIM stage once more, from another stage of that run
    assert main([*args, '--num-images', '2', '--stages', 'ssim', '--start', str(tmp_path/'run/strong_align'), '--run', str(tmp_path/'branch')]) == 0
    config = json.loads((tmp_path/'branch/ssim/config.json').read_text())
    before = schedule_stages(PRESETS['tiny'], 10, batch_size=2)[:2]
    assert config['task']['start'] == sum(x.num_images for x in before) and config['task']['stage']['name'] == 'ssim'


SHORT = Preset(TINY, (Stage('a', dict(l1=1., vf=1., kl=1e-6), lr=1e-3, num_images=16),
                      Stage('b', dict(l1=1., vf=1., gan=.1), lr=1e-3, num_images=24, equivariance=SCALES),
                      Stage('c', dict(gan=.1, patchgan=.1, feature_matching=1.), ('synthesis>32',), 1e-3, num_images=16)),
               4, 40, discriminator='tiny', patch_width=4, cosine=True)


def test_a_training_that_was_stopped_within_a_stage_ends_as_the_straight_one(tmp_path):
    class Stop(Exception): pass
    def stop(history):
        if 'gan' in history[-1] and history[-1]['step'] == 4: raise Stop
    kw = dict(log_every=1, save_every=3)
    a, straight = train_tokenizer(SHORT, run=tmp_path/'a', show=lambda h: None, **kw)
    with pytest.raises(Stop): train_tokenizer(SHORT, run=tmp_path/'b', show=stop, **kw)
    assert not (tmp_path/'b/c').exists()
    b, pieces = train_tokenizer(SHORT, run=tmp_path/'b', show=lambda h: None, **kw)
    assert all(torch.equal(v, b.own_state()[k]) for k, v in a.own_state().items())
    drop = ('images_per_s', 'memory_gb')
    assert [{k: v for k, v in r.items() if k not in drop} for r in straight] == [{k: v for k, v in r.items() if k not in drop} for r in pieces]
    assert [r['images'] for r in pieces] == list(range(4, 57, 4)) and [r['stage'] for r in pieces] == ['a']*4 + ['b']*6 + ['c']*4


def test_a_stage_picked_alone_goes_on_from_the_one_before_it_in_the_run(tmp_path):
    kw = dict(run=tmp_path/'a', show=lambda h: None)
    train_tokenizer(SHORT, stages=['a'], **kw)
    train_tokenizer(SHORT, stages=['b'], **kw)
    assert json.loads((tmp_path/'a/b/config.json').read_text())['task']['start'] == 16
    # a stage before it made longer would leave b hanging in the air: said before anything is trained
    before = sorted(p.name for p in (tmp_path/'a/a').iterdir())
    with pytest.raises(UserError, match='began after 16 images'): train_tokenizer(SHORT, num_images=112, **kw)
    assert sorted(p.name for p in (tmp_path/'a/a').iterdir()) == before


def test_a_later_stage_that_follows_nothing_says_so(tmp_path):
    kw = dict(num_images=8, show=lambda h: None)
    for run in (None, tmp_path/'a'):
        with pytest.warns(Notice, match='stage b begins from random weights: this run has no a; give start'):
            train_tokenizer(SHORT, stages=['b'], run=run, **kw)
    with warnings.catch_warnings(action='error', category=Notice):
        train_tokenizer(SHORT, stages=['a'], run=tmp_path/'b', **kw)
        train_tokenizer(SHORT, stages=['b'], run=tmp_path/'b', **kw)
        train_tokenizer(SHORT, stages=['b'], start=tmp_path/'b/a', **kw)
        train_tokenizer(SHORT, stages=['b'], run=tmp_path/'a', **kw)              # it goes on from its own checkpoint


def test_an_impossible_later_stage_is_refused_before_the_first_is_trained(tmp_path):
    for kw, says in ((dict(size=32), 'synthesis>32'), (dict(batch_size=20), 'groups of at most 8'), (dict(accumulate=0), 'accumulate'),
                     (dict(accumulate=3), 'micro-batches'), (dict(out='a.pt'), 'safetensors'), (dict(size=72), 'multiple of 16'),
                     (dict(workers=-1), 'workers'), (dict(batch_size=0), 'batch_size: 0')):
        with pytest.raises(UserError, match=says): train_tokenizer(SHORT, run=tmp_path/'a', **{'num_images': 600, **kw})
    assert not list(tmp_path.rglob('*.safetensors'))


@pytest.mark.parametrize('size', [64, 192, 512])
def test_shapes_fit_from_64_to_512_px(size):
    from vfmvae.vfm import VFM
    for preset, vfm in (('tiny', None), ('tiny', VFM('vit_tiny_patch16_224', pretrained=False, depth=2))):
        model, discriminators, _ = build_training(PRESETS[preset], PRESETS[preset].stages, vfm, size)
        z = torch.zeros(1, 16, size//8, size//8)
        with torch.no_grad():
            image = model.decode(z)
            assert image.shape == (1, 3, size, size) and model.encode(image).mean.shape == z.shape
            assert discriminators['gan'](image).shape[0] == 1 and len(discriminators['patchgan'](image)) == 3


def test_what_a_training_will_cost_is_said_before_it_starts(capsys):
    assert main(['train-tokenizer', '--dry-run', '--batch-size', '2', '--num-images', '10']) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [x.split(':')[0] for x in lines[-6:-1]] == [s.name for s in PRESETS['tiny'].stages] and 'together' in lines[-1]


BAD = {
    'no folder': (('encode', '--data', '{tmp}/none'), 'none'),
    'empty folder': (('encode', '--data', '{tmp}/empty'), 'empty'),
    'truncated image': (('encode', '--data', '{tmp}/torn'), 'half.png'),
    'not an image': (('encode', '--data', '{tmp}/text'), 'note.png'),
    'unknown tokenizer': (('encode', '--data', 'world', '--tokenizer', 'vfmvae-tiny-f8d61'), 'nearest: vfmvae-tiny-f8d16'),
    'unknown VFM': (('train-tokenizer', '--vfm', 'vit_large_patch16_siglip_513'), 'siglip'),
    'no network': (('train-tokenizer', '--vfm', 'vit_base_patch16_siglip_224.v2_webli'), 'pretrained'),
    'size off the grid': (('encode', '--data', '{tmp}/fine', '--size', '60'), '60'),
    'latents of nothing': (('decode', '--latents', '{tmp}/none.safetensors'), 'none.safetensors'),
    'a file that is no tokenizer': (('encode', '--data', 'world', '--tokenizer', '{tmp}/fine/a.png'), 'a.png'),
    'published without YAML': (('encode', '--data', 'world', '--tokenizer', '{tmp}/x.pth'), 'x.pth'),
    'unknown preset': (('train-tokenizer', '--preset', 'tini'), 'nearest: tiny'),
    'unknown stage': (('train-tokenizer', '--stages', 'gna'), 'nearest: gan'),
    'no run to start from': (('train-tokenizer', '--start', '{tmp}/none'), 'no checkpoint'),
    'unknown precision': (('train-tokenizer', '--precision', 'fp7'), 'fp32'),
    'a size that does not fit': (('train-tokenizer', '--size', '100'), 'multiple of 16'),
    'unknown discriminator': (('train-tokenizer', '--discriminator', 'dinov9'), 'dino'),
    'a batch that does not split into groups of eight': (('train-tokenizer', '--batch-size', '13', '--num-images', '200', '--stages', 'gan'), 'batch of 13'),
    'no shards': (('train-tokenizer', '--data', '{tmp}/none-*.tar'), 'none-'),
    'unknown transform': (('align', '--data', 'world', '--n', '20', '--transforms', 'rotatoin'), 'nearest: rotation'),
    'too few images for k': (('align', '--data', 'world', '--n', '8'), 'k = 10 neighbours among 8 rows'),
}


@pytest.mark.parametrize('case', list(BAD))
def test_bad_input_is_one_line_and_leaves_nothing(case, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    for d in ('empty', 'torn', 'text', 'fine'): (tmp_path/d).mkdir()
    to_pil(World()[0]['image']).save(tmp_path/'fine/a.png')
    (tmp_path/'torn/half.png').write_bytes((tmp_path/'fine/a.png').read_bytes()[:900])
    (tmp_path/'text/note.png').write_text('not a picture')
    argv, says = BAD[case]
    argv = [a.format(tmp=tmp_path) for a in argv]
    if argv[0] == 'train-tokenizer': argv += ['--out', str(tmp_path/'out.safetensors')]
    if argv[0] == 'encode': argv += ['--out', str(tmp_path/'out')]
    if argv[0] == 'align': argv += ['--out', str(tmp_path/'out.json')]
    if argv[0] == 'decode': argv += ['--out', str(tmp_path/'out')]
    assert says in one_line(capsys, *argv)
    assert not list(tmp_path.glob('out*.safetensors')) and not list(tmp_path.glob('out/*.safetensors')) and not list(tmp_path.rglob('*.tmp'))


def test_a_command_takes_leave_of_its_fellows(tmp_path):
    import torch.distributed as d
    import vfmvae.train      # noqa: F401
    d.init_process_group('gloo', init_method=f'file://{tmp_path}/meet', rank=0, world_size=1)
    try:
        assert main(['doctor']) in (0, 1) and not d.is_initialized()
    finally:
        if d.is_initialized(): d.destroy_process_group()


def test_alignment_from_the_command_line(tmp_path, capsys):
    assert main(['align', '--data', 'world', '--n', '40', '--k', '5', '--times', '20', '--transforms', 'hflip', '--out', str(tmp_path/'a.json')]) == 0
    said, kept = capsys.readouterr().out, json.loads((tmp_path/'a.json').read_text())
    assert 'hflip 1' in said and 'reference same' in said and [r['transform'] for r in kept['rows']] == ['clean', 'hflip 1']
    assert kept['mean'] == kept['rows'][1]['value'] and (kept['n'], kept['k'], kept['tokenizer'], kept['vfm']) == (40, 5, 'vfmvae-tiny-f8d16', 'tiny')


def test_a_tokenizer_file_of_another_model_is_refused(tmp_path):
    from vfmvae.files import load_weights, save_weights
    from vfmvae.tokenizer import save_tokenizer
    tok = open_tokenizer('vfmvae-tiny-f8d16')
    f = save_tokenizer(tmp_path/'a.safetensors', tok)
    tensors, meta = load_weights(f)
    del tensors['mapping.x_avg']
    save_weights(f, tensors, meta)
    with pytest.raises(UserError, match='1 missing: mapping.x_avg'): open_tokenizer(f)
    save_weights(f, dict(x=torch.zeros(1)), {})
    with pytest.raises(UserError, match='no tokenizer configuration'): open_tokenizer(f)


def test_grey_alpha_and_palette_pictures_are_read(tmp_path):
    x = np.arange(80*80, dtype=np.uint8).reshape(80, 80)
    for mode in ('L', 'RGBA', 'P', 'LA'): Image.fromarray(x).convert('RGB').convert(mode).save(tmp_path/f'{mode}.png')
    assert main(['encode', '--data', str(tmp_path), '--out', str(tmp_path/'z')]) == 0


def test_doctor_recognises_the_torchvision_mix():
    from vfmvae.doctor import diagnose
    assert 'one index' in diagnose('RuntimeError: operator torchvision::nms does not exist')


# one line, before the work ------------------------------------------------------------------------------------------------------------------------

WRONG = dict(num_images=(0, -1, 2.5), batch_size=(0, -1, 'x'), num_imagse=(8,),
             lr=(-1., 0., float('nan'), float('inf')), accumulate=(0,), workers=(-1,), seed=(2**70, .5),
             size=(0, -8, 10**9), stages=([],), out=('a.pt', '/dev/null/x/a.safetensors'), run=('/dev/null/x/',), data=('', 7), held_out=('',),
             save_every=(0,), log_every=(0,))
NUMBERS = [{k: v} for k, values in WRONG.items() for v in values]


@pytest.mark.parametrize('wrong', NUMBERS, ids=str)
def test_a_training_that_cannot_be_is_one_line_before_its_first_step(tmp_path, wrong, monkeypatch):
    monkeypatch.setattr('vfmvae.tokenizer_task.TokenizerTask.step', lambda *a: pytest.fail('it trained'))
    with pytest.raises(UserError) as e: train_tokenizer(SHORT, **{'data': World(32), 'run': tmp_path/'a', **wrong})
    assert '\n' not in str(e.value) and not list(tmp_path.rglob('*.safetensors'))


@pytest.mark.parametrize('wrong', [dict(num_images=0), dict(batch_size=0), dict(size=0), dict(steps=0), dict(micro_batch=0), dict(stages=[])], ids=str)
def test_nothing_is_no_default(wrong):
    with pytest.raises(UserError): estimate(SHORT, **wrong)


def test_a_finished_tokenizer_says_what_it_was_trained_on(tmp_path, monkeypatch):
    from vfmvae.files import load_weights
    from vfmvae.data import as_dataset, fingerprint
    short = Preset(TINY, (Stage('a', dict(l1=1.), lr=1e-3, num_images=4),), 4, 40)
    was, during = torch.backends.cudnn.allow_tf32, []
    monkeypatch.setattr('vfmvae.recipes.fit', lambda *a, **k: during.append(torch.backends.cudnn.allow_tf32) or [])
    monkeypatch.setattr('vfmvae.recipes.fit_stats', lambda *a: None)
    for data in (World(8, seed=3), [Image.new('RGB', (64, 64), (20*k, 0, 0)) for k in range(8)]):
        train_tokenizer(short, data, out=tmp_path/'a.safetensors')
        recipe, ds = load_weights(tmp_path/'a.safetensors')[1]['recipe'], as_dataset(data, 64, True)
        assert recipe['fingerprint'] == fingerprint(ds) and recipe['data'] == ('World, seed 3' if isinstance(data, World) else repr(ds))
    assert torch.backends.cudnn.allow_tf32 is was and during == [False]*2          # published for the training alone


def test_what_is_watched_stands_still(pictures, monkeypatch):
    import vfmvae.recipes as r
    looks = []
    monkeypatch.setattr(r, 'fit', lambda task, feed, *a, preview=None, **k: looks.append((feed.ds, preview)) or [])
    monkeypatch.setattr(r, 'fit_stats', lambda *a: None)
    monkeypatch.setattr(r, '_preview', lambda task, x: x)
    train_tokenizer(Preset(TINY, (Stage('a', dict(l1=1.), lr=1e-3, num_images=2),), 2, 40), pictures)
    ds, look = looks[0]
    assert ds.augment and torch.equal(look(), open_data(pictures, 64).batch(range(3))['image'])


BOMB = b'a: &a [x,x,x,x,x,x,x,x,x]\n' + b''.join(b'%c: &%c [%s]\n' % (98+i, 98+i, b','.join([b'*%c' % (97+i)]*9)) for i in range(12))
SETTINGS = {'not UTF-8': b'\xff\xfe\x00', 'a list': b'- 1\n- 2', 'a word': b'hello', 'nothing': b'', 'not YAML': b'{a: [', 'deep': b'['*2000,
            'names that are numbers': b'G_kwargs: {1: 2}', 'a bomb': BOMB, 'python': b'!!python/object/apply:os.system [id]', 'dates': b'G_kwargs: 2001-01-01'}


@pytest.mark.parametrize('kind', list(SETTINGS))
def test_settings_that_are_no_settings_are_one_line(kind, tmp_path):
    from vfmvae.files import save_weights
    (tmp_path/'g.yaml').write_bytes(SETTINGS[kind])
    torch.save({'ldm_adapter.x': torch.zeros(1), 'synthesis.x': torch.zeros(1)}, tmp_path/'a.pt')
    save_weights(tmp_path/'b.safetensors', {'ldm_adapter.x': torch.zeros(1), 'synthesis.x': torch.zeros(1)}, {})
    for file in ('a.pt', 'b.safetensors'):
        with pytest.raises(UserError) as e: open_tokenizer(tmp_path/file, tmp_path/'g.yaml')
        assert '\n' not in str(e.value)


def test_a_file_is_opened_as_what_it_is(tmp_path):
    from vfmvae.tokenizer import save_tokenizer
    tok = open_tokenizer('conv-f8d16')
    assert open_tokenizer(tok) is tok
    f = save_tokenizer(tmp_path/'mine.safetensors', tok)
    x = World(1, seed=9).batch([0])['image']
    for side in (True, False):
        if not side: f.with_suffix('.json').unlink()       # it stands in the head of the file, too
        assert torch.equal(open_tokenizer(str(f)).encode(x).mean, tok.encode(x).mean)
    torch.save(dict(state_dict={f'first_stage_model.{k}': v for k, v in vae_of_others().items() if not k.startswith('stats.')}), tmp_path/'vae.ckpt')
    vae = open_tokenizer(tmp_path/'vae.ckpt')
    assert vae.config.family == 'conv' and vae.channels == 4
    for bad in (tmp_path/'none.ckpt', tmp_path, 7, None, '', tmp_path/'vae.json'):
        with pytest.raises(UserError): open_tokenizer(bad)


def vae_of_others():
    "Random weights of latent diffusion's own layout."
    from vfmvae.baselines import ConvVAE, ConvVAEConfig
    return ConvVAE(ConvVAEConfig(width=32, mults=(1, 1), blocks=1, decoder_blocks=2)).state_dict()


def test_pictures_outside_of_what_a_net_has_seen_are_said_to_be_so_once(tmp_path, recwarn):
    from vfmvae.latents import cache_latents
    noise = [Image.fromarray(np.random.default_rng(k).integers(0, 256, (64, 64, 3), np.uint8)) for k in range(4)]
    for call in (lambda d: evaluate_tokenizer('vfmvae-tiny-f8d16', d, batch_size=2),
                 lambda d: cache_latents(open_tokenizer('vfmvae-tiny-f8d16'), d, tmp_path/f'{len(d)}-{id(d)}', batch_size=2)):
        for data, times in ((noise, 1), (World(4, seed=8), 0)):
            recwarn.clear()
            call(data)
            assert sum('only ever seen' in str(w.message) for w in recwarn) == times
