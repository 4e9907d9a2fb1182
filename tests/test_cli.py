"The command line: what is typed wrong, what the machine refuses, the doctor where nothing can be imported, labs that overwrite nothing."
import errno, json, os, subprocess, sys, warnings
from pathlib import Path
import numpy as np
import pytest
from PIL import Image
from vfmvae import cli, signatures, doctor
from vfmvae.signatures import options_of
from vfmvae.cli import bundled, Command, COMMANDS, main, parser
from vfmvae.images import to_pil
from vfmvae.world import World

ROOT = Path(__file__).resolve().parent.parent
OPTIONS = [(name, k if k in cli._PLACES else '--'+k.replace('_', '-'), cli._settings(o)) for name, c in COMMANDS.items() for k, o in c.options.items()]
NUMBERS, NAMES = ([(n, f) for n, f, how in OPTIONS if 'action' not in how and 'choices' not in how and (how['metavar'] != 'N') == named]
                  for named in (False, True))


def required(name: str) -> list[str]:
    return [w for n, flag, how in OPTIONS if n == name and how.get('required') for w in ((flag, 'world') if flag.startswith('-') else ('world',))]


@pytest.fixture
def built(monkeypatch):
    "The parser is made once for all words of a test."
    once = parser()
    monkeypatch.setattr(cli, 'parser', lambda only=None: once)


def one_line(capsys, *argv) -> str:
    assert main(argv) == 2
    line, = [s for s in capsys.readouterr().err.splitlines() if s.startswith('vfmvae: ')]
    return line


def refused(capsys, *argv) -> str:
    "The line of a word that is refused before anything starts."
    with pytest.raises(SystemExit) as e: main(argv)
    assert e.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


# what is typed ----------------------------------------------------------------------------------------------------------------------------------

def test_the_commands_take_numbers_and_names():
    assert len(NUMBERS) > 40 and len(NAMES) > 40


@pytest.mark.parametrize(('name', 'flag'), NUMBERS, ids=str)
def test_every_number_is_one_within_its_range(name, flag, capsys, built):
    for text in ('', ' ', 'x', 'nan', 'inf', '-inf', '1_0', '0x8', '٣', '1e400', '1,5', '5 px', '1'*50):
        line = refused(capsys, name, *required(name), f'{flag}={text}')
        assert line.startswith(f'vfmvae {name}: error: argument {flag}: ') and 'invalid' not in line, line
    if flag == '--guidance': return
    for text in ('-1', '-8', '-0.5', *(['0'] if flag not in ('--seed', '--workers') else [])):
        assert f'argument {flag}: ' in refused(capsys, name, *required(name), f'{flag}={text}')


@pytest.mark.parametrize(('name', 'flag'), NAMES, ids=str)
def test_an_empty_name_is_not_the_current_folder(name, flag, capsys, built):
    for text in ('', '  ', 'a\0b'):
        words = [*required(name), f'{flag}={text}'] if flag.startswith('-') else [text]
        assert f'argument {flag if flag.startswith("-") else flag.upper()}: no name' in refused(capsys, name, *words)


@pytest.mark.parametrize(('words', 'says'), [
    (('align', '--data', 'world', '--k', '1'), '--k: 1 is out of range; give 2 to'), (('align', '--data', 'world', '--times', '19'), 'give 20 to'),
    (('generate', '--seed', str(2**70)), '--seed'),
    (('encode', '--data', 'world', '--size', '7'), 'give 8 to 8,192'),
    (('encode', '--data', 'world', '--size', '1000000000'), '8,192'), (('train-flow', '--lr', '1e300'), 'to 100'),
    (('generate', '--n', '2.5'), "'2.5' is not a whole number"), (('generate', '--policy', 'even'), "'balanced', 'random'"),
    (('encode', '--images', 'x'), 'required: --data'), (('encode', '--data', 'world', '--image', 'x'), 'unrecognized arguments: --image')])
def test_the_line_says_what_would_do(words, says, capsys): assert says in refused(capsys, *words)


@pytest.mark.parametrize(('label', 'says'), [('1'+'0'*30, "no class named '1"), ('9'*18, 'this net knows 0 to 15'), ('9'*5000, "no class named '9"),
                                            ('-1', "no class named '-1'"), ('solid rin', 'nearest: solid ring')])
def test_a_label_is_a_number_or_a_name(label, says, capsys, tmp_path):
    "Python reads no number of 5,000 digits."
    assert main(['generate', '--n', '1', '--steps', '1', '--label', label, '--out', str(tmp_path/'out')]) != 0
    assert says in (said := capsys.readouterr().err.splitlines()[-1]) and said.startswith('vfmvae: ') and not [*tmp_path.rglob('*.png')]


def test_a_price_is_that_of_what_is_asked(capsys):
    assert main(['train-flow', '--dry-run', '--preset', 'dit-conv-f8d16', '--num-images', '1000', '--batch-size', '8']) == 0
    assert '1,000 images in 125 steps' in capsys.readouterr().out


def test_what_is_right_is_read_as_meant():
    a = parser().parse_args(['train-flow', '--lr', '1e-3', '--seed', '0', '--num-images', '+7', '--workers', '0'])
    assert (a.lr, a.seed, a.num_images, a.workers, a.n, a.batch_size) == (1e-3, 0, 7, 0, None, None)
    a = parser().parse_args(['generate', '--guidance', '-.5', '--label', '0'])
    assert (a.guidance, a.label, a.steps) == (-.5, '0', None)
    assert parser().parse_args(['encode', '--data', 'world']).n is None
    assert parser().parse_args(['train-tokenizer', '--stages', 'ssim,gan', '--log-with', 'wandb']).stages == ('ssim', 'gan')
    shown = {k: ' '.join(p.format_help().split()) for k, p in parser()._subparsers._group_actions[0].choices.items()}
    assert 'None' not in str(shown) and '(default: 3000)' in shown['align'] and "(default: the preset's)" in shown['train-tokenizer']
    assert '{fp32,bf16,fp16}' in shown['train-flow'] and '`' not in str(shown)


# options and names, without importing anything --------------------------------------------------------------------------------------------------------

def test_options_are_what_the_functions_take():
    import importlib
    import inspect
    from dataclasses import fields
    for c in COMMANDS.values():
        for module, name in (g.split('.') for g in c.groups):
            f = getattr(importlib.import_module(f'vfmvae.{module}'), name)
            found = {o.name: o.default for o in options_of(module, name)}
            if inspect.isclass(f): assert found == {k.name: k.default for k in fields(f)}
            else:
                for k, p in inspect.signature(f).parameters.items():
                    if p.kind is p.VAR_KEYWORD: continue
                    assert found[k] is ... or found[k] == p.default, (name, k)


def test_every_option_has_a_text_and_one_meaning():
    assert [(n, f) for n, f, how in OPTIONS if not how['help'].split(' (default')[0]] == []
    kinds = {}
    for _, flag, how in OPTIONS: kinds.setdefault(flag, set()).add(str(how.get('action') or how.get('choices') or how['metavar']))
    assert {f: k for f, k in kinds.items() if len(k) > 1} == {}
    assert '--images' not in kinds and '--batch' not in kinds and '--critic' not in kinds


def test_choices_and_bundled_names_are_the_librarys():
    from vfmvae.images import CROPS
    from vfmvae.samplers import methods
    from vfmvae.generation import LABEL_POLICIES, nets
    from vfmvae.presets import PRESETS
    from vfmvae.tokenizer import tokenizers
    assert {k: cli._CHOICES[k] for k in ('method', 'crop', 'policy')} == dict(method=methods(), crop=tuple(CROPS), policy=LABEL_POLICIES)
    assert {*bundled('tokenizer')} == {*tokenizers} and {*bundled('net')} == {*nets} and {*bundled('preset')} == {*PRESETS}


MISTYPED = {'command': ('generat',), 'option': ('generate', '--stesp', '4'), 'tokenizer': ('evaluate', '--data', 'world', '--tokenizer', 'vfmvae-tiny-f8d61'),
            'preset': ('train-tokenizer', '--preset', 'tini'), 'preset of a net': ('train-flow', '--preset', 'reg-81ep'),
            'net': ('generate', '--net', 'dit-conv-f8d61'), 'data': ('encode', '--data', 'wrold'), 'held-out data': ('train-tokenizer', '--held-out', 'none')}


@pytest.mark.parametrize('what', MISTYPED)
def test_what_is_mistyped_is_answered_before_torch_is_imported(what):
    code = ('import sys\nfrom vfmvae.cli import main\ntry: main(sys.argv[1:])\nexcept SystemExit as e: '
            "print(e.code, [m for m in ('torch', 'numpy', 'timm') if m in sys.modules])")
    done = subprocess.run([sys.executable, '-c', code, *MISTYPED[what]], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == '2 []\n', done.stderr
    assert {'command': "'generate'", 'option': 'unrecognized arguments: --stesp', 'held-out data': 'no data named'}.get(what, 'nearest: ') in done.stderr


# what the machine refuses -------------------------------------------------------------------------------------------------------------------------

SAID = {'a line': lambda: __import__('vfmvae.core').core.UserError('a line'),
        'x.png: No space left on device': lambda: OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), 'x.png'),
        'Permission denied': lambda: PermissionError(13, 'Permission denied'), 'Is a directory': lambda: IsADirectoryError(21, 'Is a directory', 'y'),
        'not enough memory': MemoryError, 'take a smaller': lambda: RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 TB"),
        'nested too deeply': RecursionError, 'not UTF-8': lambda: UnicodeDecodeError('utf-8', b'\xff', 0, 1, 'invalid start byte'),
        'stopped': KeyboardInterrupt, 'pip install nix': lambda: ModuleNotFoundError("No module named 'nix'"),
        'one index': lambda: RuntimeError('operator torchvision::nms does not exist')}


@pytest.mark.parametrize('says', SAID)
def test_what_the_machine_refuses_is_one_line(says, capsys, monkeypatch):
    def fail(): raise SAID[says]()
    monkeypatch.setitem(COMMANDS, 'doctor', Command(fail))
    assert says in one_line(capsys, 'doctor')


def test_a_real_fault_keeps_its_traceback(monkeypatch):
    for fault in (ZeroDivisionError, KeyError, TypeError, ValueError, RuntimeError):
        def fail(fault=fault): raise fault('ours')
        monkeypatch.setitem(COMMANDS, 'doctor', Command(fail))
        with pytest.raises(fault): main(['doctor'])


def test_a_warning_of_the_library_is_a_sentence_and_others_stay(capsys, monkeypatch):
    def warn():
        warnings.warn('these images are small', stacklevel=1)
        exec(compile('import warnings; warnings.warn("other")', '/elsewhere/x.py', 'exec'), {})
        return 0
    warn = type(warn)(warn.__code__.replace(co_filename=cli.__file__), globals())
    monkeypatch.setitem(COMMANDS, 'doctor', Command(warn))
    with warnings.catch_warnings():
        warnings.simplefilter('always')
        was = warnings.showwarning
        warnings.showwarning = lambda *a, **k: print(warnings.formatwarning(*a[:4]), file=sys.stderr, end='')
        try: assert main(['doctor']) == 0
        finally: warnings.showwarning = was
    err = capsys.readouterr().err
    assert 'note: these images are small\n' in err and 'x.py:1: UserWarning: other' in err and 'note: other' not in err


BARE = 'import sys; sys.path[:0] = {path!r}; from vfmvae import cli, doctor; doctor._hub = lambda: (True, "not asked"); sys.exit(cli.main({argv!r}))'


def bare(*argv, path=(), **kw):
    "A process without any installed package."
    code = BARE.format(path=[*map(str, path), str(ROOT)], argv=list(argv))
    return subprocess.run([sys.executable, '-S', '-c', code], **{**dict(capture_output=True, text=True, cwd=ROOT, timeout=120), **kw})


def test_a_reader_who_leaves_is_no_fault_and_a_full_disk_is_a_line():
    r, w = os.pipe()
    os.close(r)
    try: done, helped = (bare(*argv, capture_output=False, stdout=w, stderr=subprocess.PIPE) for argv in (['doctor'], ['align', '--help']))
    finally: os.close(w)
    assert (done.returncode, done.stderr, helped.stderr) == (141, '', '')
    if Path('/dev/full').exists():
        with open('/dev/full', 'w') as full: done = bare('doctor', capture_output=False, stdout=full, stderr=subprocess.PIPE)
        assert (done.returncode, done.stderr) == (2, 'vfmvae: No space left on device\n')


@pytest.mark.parametrize(('name', 'flag'), [(n, f) for n, f in NAMES if f in ('--out', '--run')], ids=str)
def test_where_nothing_can_be_written_is_said_before_the_work(name, flag, tmp_path, capsys, monkeypatch):
    import vfmvae.align
    import vfmvae.demo
    import vfmvae.flow_task
    import vfmvae.latents
    import vfmvae.tokenizer_task
    def work(*a, **k): raise AssertionError('worked first')
    for owner, name_of in ((vfmvae.tokenizer_task.TokenizerTask, 'step'), (vfmvae.flow_task.FlowTask, 'step'), (vfmvae.latents, '_shard_of'),
                           (vfmvae.align, 'se_cknna'), (vfmvae.demo, 'train_tokenizer'), (sys.modules['vfmvae.generation'], 'sample_latents')):
        monkeypatch.setattr(owner, name_of, work)
    (tmp_path/'file').touch()
    if name == 'decode': monkeypatch.setattr(vfmvae.recipes, 'decode_latents', work)
    ending = dict(align='.json', evaluate='.json', train='.safetensors', study='.csv').get(name.split('-')[0], '') if flag == '--out' else ''
    assert str(tmp_path/'file') in one_line(capsys, name, *required(name), flag, str(tmp_path/'file'/f'mine{ending}'))
    if ending:
        (tmp_path/f'folder{ending}').mkdir()
        assert 'is a folder' in one_line(capsys, name, *required(name), flag, str(tmp_path/f'folder{ending}'))


# the doctor -----------------------------------------------------------------------------------------------------------------------------------------

TORCHES = {'raise RuntimeError("operator torchvision::nms does not exist")': 'one index', 'x = 1': 'is not torch',
           'import no_such_part': 'pip install no_such_part', 'raise OSError("libcudart.so.13: cannot open shared object file")': 'libcudart.so.13 is missing',
           'import os; os.kill(os.getpid(), 9)': 'signal 9', 'raise AttributeError': 'AttributeError', None: 'pip install torch'}


@pytest.mark.parametrize('torch', TORCHES, ids=str)
def test_the_doctor_speaks_where_torch_is_broken(torch, tmp_path):
    if torch: (tmp_path/'torch.py').write_text(torch)
    (tmp_path/'numpy.py').write_text('__version__ = "2.0"')
    done = bare('doctor', path=[tmp_path])
    lines = dict(s[4:].split(': ', 1) for s in done.stdout.splitlines() if s[:3] in ('ok ', '-- '))
    assert (done.returncode, done.stderr) == (1, '') and TORCHES[torch] in lines['torch'] and lines['numpy'] == '2.0'
    assert lines['timm'] == 'needs torch first' and 'scikit-learn' in lines['sklearn'] and done.stdout.splitlines()[-1].startswith('needs care: torch,')
    done = bare('generate', path=[tmp_path]) if torch and 'kill' not in torch and 'x =' not in torch else None
    if done: assert done.returncode == 2 and done.stderr.startswith('vfmvae: torch or numpy cannot be imported: ') and done.stderr.count('\n') == 1


@pytest.mark.parametrize('kind', ['a file', 'below a file', 'no home'])
def test_the_doctor_speaks_where_nothing_can_be_written(kind, tmp_path, monkeypatch):
    (tmp_path/'file').touch()
    monkeypatch.delenv('XDG_CACHE_HOME', raising=False)
    if kind == 'no home':
        monkeypatch.delenv('VFMVAE_HOME')
        monkeypatch.setenv('HOME', '/dev/null/none')
    else: monkeypatch.setenv('VFMVAE_HOME', str(tmp_path/'file'/'x') if kind == 'below a file' else str(tmp_path/'file'))
    well, says = doctor._tried(doctor._runs)
    assert not well and 'VFMVAE_HOME' in says and '\n' not in says


def test_the_doctor_tells_an_old_package_and_an_unknown_python(monkeypatch):
    monkeypatch.setattr(doctor, '_floor', lambda name: '99.1')
    assert doctor._import('numpy') == (False, f'{np.__version__} is older than 99.1: pip install --upgrade numpy')
    found = []
    for version in ('3.10.9', '3.11.0', '3.13.1', '3.14.0'):
        monkeypatch.setattr(doctor.platform, 'python_version', lambda version=version: version)
        found.append(doctor._python())
    assert [w for w, _ in found] == [False, True, True, True] and 'older than 3.11' in found[0][1] and found[2][1] == '3.13.1' and 'tried' in found[3][1]


# labs -----------------------------------------------------------------------------------------------------------------------------------------------

def test_a_lab_overwrites_no_notebook_and_opens_the_same_state_again(tmp_path, capsys, monkeypatch):
    for name in ('jupyterlab', 'ipywidgets'): pytest.importorskip(name, reason='the [notebooks] or [widgets] extra is not installed')
    monkeypatch.setenv('VFMVAE_HOME', str(tmp_path))
    def lab(*words):
        assert main(['lab', *words, '--dry-run']) == 0
        return Path(capsys.readouterr().out.strip().split(': ', 1)[1])
    first = lab()
    first.write_text('my notes of today')
    other = lab('--n', '32')
    assert lab() == first and lab('--n', '32') == other != first and first.read_text() == 'my notes of today'
    assert "n=32)" in json.loads(other.read_text())['cells'][1]['source'] and len([*first.parent.iterdir()]) == 2


def test_a_space_after_a_comma_is_no_part_of_a_name(tmp_path, monkeypatch, capsys):
    for name in ('jupyterlab', 'ipywidgets'): pytest.importorskip(name, reason='the [notebooks] or [widgets] extra is not installed')
    monkeypatch.setenv('VFMVAE_HOME', str(tmp_path/'home'))
    Image.new('RGB', (64, 64)).save(tmp_path/'a.png')
    assert main(['lab', '--tokenizers', 'conv-f8d16, rae-tiny-f8d128', '--data', 'world', '--dry-run']) == 0
    assert 'give a set of at least 12' in one_line(capsys, 'lab', '--data', str(tmp_path), '--dry-run')    # was: choose at most -1


def test_words_after_two_dashes_are_jupyters(tmp_path, capsys, monkeypatch):
    for name in ('jupyterlab', 'ipywidgets'): pytest.importorskip(name, reason='the [notebooks] or [widgets] extra is not installed')
    monkeypatch.setenv('VFMVAE_HOME', str(tmp_path))
    called = []
    monkeypatch.setattr(subprocess, 'run', lambda words, **k: called.append(words) or subprocess.CompletedProcess(words, 3))
    assert main(['lab', '--n', '32', '--', '--no-browser', '--port', '8890', '--allow-root']) == 3
    (python, m, jupyter, lab, book, *more), = called
    assert (python, m, jupyter, lab) == (sys.executable, '-m', 'jupyter', 'lab') and Path(book).is_file()
    assert more == ['--no-browser', '--port', '8890', '--allow-root']
    assert 'unrecognized' in refused(capsys, 'encode', '--data', 'world', '--', '--size', '8')


# what is measured -----------------------------------------------------------------------------------------------------------------------------------

def pictures(folder: Path, at, size: int = 64, harm: int = 0, side: int | None = None) -> Path:
    "Pictures of the world; harm: a checkerboard of single pixels, so many grey levels."
    folder.mkdir(exist_ok=True)
    for i in at:
        a = np.asarray(to_pil(World(999, seed=3, size=size)[i]['image'])).astype(float)
        a = a + ((np.indices((size, size)).sum(0) % 2)*2-1)[..., None]*harm
        Image.fromarray(np.clip(a, 0, 255).astype(np.uint8)[:side]).save(folder/f'{i:04d}.png')
    return folder


def judged(tmp_path, *words) -> dict:
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        assert main(['evaluate-samples', '--extractor', 'tiny', '--out', str(tmp_path/'r.json'), *map(str, words)]) == 0
    return json.loads((tmp_path/'r.json').read_text())


def test_samples_are_judged_at_their_own_size_and_the_record_says_so(tmp_path, capsys):
    ref, bad = pictures(tmp_path/'ref', range(16), 80), pictures(tmp_path/'bad', range(16, 32), 80, 40)
    own, small, full, large = (judged(tmp_path, '--samples', bad, '--reference', ref, *s) for s in ((), ('--size', 40), ('--size', 80), ('--size', 96)))
    assert own['value'] == full['value'] != small['value']
    assert [r['size'] for r in (own, small, full, large)] == [[80]*2, [40]*2, [80]*2, [96]*2]
    assert own['resized'] is full['resized'] is None and small['resized'] == small['reference_resized'] == 'from 80x80 px'
    assert large['resized'] == 'from 80x80 px, enlarged'
    world = judged(tmp_path, '--samples', bad, '--reference-n', 24)        # drawn at the samples' size
    assert (world['reference'], world['reference_n'], world['size'], world['reference_resized']) == ('world', 24, [80]*2, None)


def test_sizes_that_differ_are_one_line(tmp_path, capsys):
    ref, other = pictures(tmp_path/'ref', range(4), 64), pictures(tmp_path/'other', range(4), 96)
    flat, mixed = pictures(tmp_path/'flat', range(4), 64, side=48), pictures(tmp_path/'mixed', range(4), 64)
    pictures(mixed, range(4, 6), 72)
    look = 'evaluate-samples', '--extractor', 'tiny', '--out', str(tmp_path/'r.json')
    assert '96x96 px, pictures of 64 px' in one_line(capsys, *look, '--samples', str(other), '--reference', str(ref))
    for odd, samples, reference in ((flat, flat, flat), (mixed, mixed, ref), (mixed, ref, mixed)):
        line = one_line(capsys, *look, '--samples', str(samples), '--reference', str(reference))
        assert str(odd) in line and ('48x64' if odd == flat else '64x64 to 72x72') in line and '--size' in line and not (tmp_path/'r.json').exists()


def test_numbers_that_are_not_finite_are_null_and_no_success(capsys, monkeypatch):
    import vfmvae.recipes
    monkeypatch.setattr(vfmvae.recipes, 'evaluate_tokenizer', lambda *a, **k: dict(psnr=float('inf'), ssim=.5, l1=float('nan'), n=4))
    assert main(['evaluate', '--data', 'world', '--n', '4']) == 1
    out, err = capsys.readouterr()
    found = json.loads(out, parse_constant=lambda word: pytest.fail(word))
    assert found['psnr'] is found['l1'] is None and found['ssim'] == .5 and 'psnr, l1' in err


def test_reconstruct_looks_at_its_folder_before_it_encodes(tmp_path, capsys, monkeypatch):
    "It encoded the whole set first, hours of a large one."
    import vfmvae.latents
    mine, out = pictures(tmp_path/'mine', range(3), 64), pictures(tmp_path/'out', range(7, 8), 64)
    for data in ('world', str(mine)):
        for _ in range(2):      # the same names
            assert main(['reconstruct', '--tokenizer', 'conv-f8d16', '--data', data, '--n', '3', '--out', str(tmp_path/'made'/Path(data).name)]) == 0
    before = [p.read_bytes() for p in sorted(mine.rglob('*.png'))]
    assert 'holds 3 other pictures' in one_line(capsys, 'reconstruct', '--tokenizer', 'conv-f8d16', '--data', str(mine), '--n', '3', '--out', str(mine))
    assert [p.read_bytes() for p in sorted(mine.rglob('*.png'))] == before
    monkeypatch.setattr(vfmvae.latents, 'cache_latents', lambda *a, **k: pytest.fail('encoded before it looked'))
    for data in ('world', str(mine)):
        line = one_line(capsys, 'reconstruct', '--tokenizer', 'conv-f8d16', '--data', data, '--n', '3', '--out', str(out))
        assert f'{out} holds 1 other pictures, such as' in line and 'empty it' in line


def test_a_word_that_would_be_ignored_is_refused(tmp_path, capsys):
    (tmp_path/'a.yaml').write_text('x: 1')
    for name in ('encode', 'reconstruct', 'evaluate', 'align'):
        assert '--g-kwargs' in one_line(capsys, name, '--data', 'world', '--g-kwargs', str(tmp_path/'a.yaml'))
    for name in ('generate', 'train-flow'):         # these take the net's own tokenizer where none is named
        assert 'give --tokenizer' in one_line(capsys, name, '--g-kwargs', str(tmp_path/'a.yaml'))


def test_encode_and_train_flow_mean_the_same_images(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv('VFMVAE_HOME', str(tmp_path/'home'))
    for k, at in (('ant', range(12)), ('bee', range(12, 24))): pictures(tmp_path/'mine', ()) and pictures(tmp_path/'mine'/k, at, 64)
    for data in ('world', str(tmp_path/'mine')):
        assert main(['encode', '--tokenizer', 'conv-f8d16', '--data', data, '--n', '8']) == 0
        said = capsys.readouterr()
        assert '8 latents' in said.out and '64 px' in said.out and '8 of ' in said.err
        before = sorted((tmp_path/'home'/'latents').iterdir())
        marks = [f.stat().st_mtime_ns for d in before for f in d.glob('shard*')]
        assert main(['train-flow', '--preset', 'dit-conv-f8d16', '--data', data, '--n', '8', '--num-images', '8', '--batch-size', '8']) == 0
        assert sorted((tmp_path/'home'/'latents').iterdir()) == before and marks == [f.stat().st_mtime_ns for d in before for f in d.glob('shard*')]
    assert len(before) == 2


def test_a_comment_beside_above_or_below_is_read_as_fastcore_reads_it_and_goes_on_where_it_is_aligned(tmp_path, monkeypatch):
    import importlib
    from fastcore.docments import docments
    code = 'def f(\n      # of a\n      # in two lines\n      a=1,\n      b=2, # of b\n      c=3 # of c\n     ): pass\n'
    (tmp_path/'beside.py').write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    theirs = docments(importlib.import_module('beside').f)
    mine = signatures.comments_of(code)
    assert [mine[n] for n in (4, 5, 6)] == [' '.join(theirs[k].split()) for k in 'abc'] == ['of a in two lines', 'of b', 'of c']
    assert signatures.comments_of('def f(a, # one\n         # two\n      b): pass\n') == {1: 'one two'}
    assert signatures.comments_of('# remark\ndef f(a): pass\n') == {}
