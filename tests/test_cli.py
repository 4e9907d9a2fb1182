"The command line: what is typed wrong, what the machine refuses, the doctor where nothing can be imported, labs that overwrite nothing."
import errno, json, os, subprocess, sys, warnings
from pathlib import Path
import numpy as np
import pytest
from PIL import Image
from vfmvae import cli
from vfmvae.cli import main, parser
from vfmvae.data import World, to_pil

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = {**cli._TRAINING, **cli._USING}
OPTIONS = [(name, flag, kind) for name, (_, _, *options) in COMMANDS.items() for flag, kind, _, _ in options if kind is not bool]
NUMBERS, NAMES = ([(n, f) for n, f, k in OPTIONS if (k is cli._named) == named] for named in (False, True))


def required(name: str) -> list[str]:
    return [w for flag, _, default, _ in COMMANDS[name][2:] if default is ... for w in (flag, 'x')]


@pytest.fixture
def built(monkeypatch):
    "The parser is made once for all words of a test."
    once = parser()
    monkeypatch.setattr(cli, 'parser', lambda: once)


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
    for text in ('', ' ', 'x', 'nan', 'inf', '-inf', '1_0', '0x8', '٣', '1e400', '1,5', '5 px', *(['1'*50] if flag != '--guidance' else [])):
        line = refused(capsys, name, *required(name), f'{flag}={text}')
        assert line.startswith(f'vfmvae {name}: error: argument {flag}: ') and 'invalid' not in line, line
    if flag == '--guidance': return
    for text in ('-1', '-8', '-0.5', *(['0'] if flag not in ('--seed', '--label', '--workers') else [])):
        assert f'argument {flag}: ' in refused(capsys, name, *required(name), f'{flag}={text}')


@pytest.mark.parametrize(('name', 'flag'), NAMES, ids=str)
def test_an_empty_name_is_not_the_current_folder(name, flag, capsys, built):
    for text in ('', '  ', 'a\0b'):
        assert f'argument {flag}: no name' in refused(capsys, name, *required(name), f'{flag}={text}')


@pytest.mark.parametrize(('words', 'says'), [
    (('align', '--images', 'x', '--k', '1'), '--k: 1 is out of range; give at least 2'), (('align', '--images', 'x', '--times', '19'), 'at least 20'),
    (('generate', '--seed', str(2**70)), '--seed'), (('generate', '--label', '1'+'0'*30), '--label'),
    (('encode', '--images', 'x', '--size', '7'), 'at least 8'),
    (('encode', '--images', 'x', '--size', '1000000000'), '8192'), (('train-flow', '--lr', '1e300'), 'at most 100'),
    (('generate', '--n', '2.5'), "'2.5' is not a whole number"), (('lab', '--n', '3'), 'at least 12')])
def test_the_line_says_what_would_do(words, says, capsys): assert says in refused(capsys, *words)


def test_what_is_right_is_read_as_meant():
    a = parser().parse_args(['train-flow', '--lr', '1e-3', '--seed', '0', '--images', '+7', '--workers', '0'])
    assert (a.lr, a.seed, a.images, a.workers, a.n, a.batch) == (1e-3, 0, 7, 0, None, None)
    a = parser().parse_args(['generate', '--guidance', '-.5', '--label', '0'])
    assert (a.guidance, a.label, a.steps) == (-.5, 0, None)
    assert parser().parse_args(['cache', '--images', 'x']).n is None
    shown = {k: p.format_help() for k, p in parser()._subparsers._group_actions[0].choices.items()}
    assert '(default: None)' not in str(shown) and '(default: 3000)' in shown['align']


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
    def fail(a): raise SAID[says]()
    monkeypatch.setitem(cli._USING, 'doctor', (fail, ''))
    assert says in one_line(capsys, 'doctor')


def test_a_real_fault_keeps_its_traceback(monkeypatch):
    for fault in (ZeroDivisionError, KeyError, TypeError, ValueError, RuntimeError):
        def fail(a, fault=fault): raise fault('ours')
        monkeypatch.setitem(cli._USING, 'doctor', (fail, ''))
        with pytest.raises(fault): main(['doctor'])


def test_a_warning_of_the_library_is_a_sentence_and_others_stay(capsys, monkeypatch):
    def warn(a):
        warnings.warn('these images are small', stacklevel=1)
        exec(compile('import warnings; warnings.warn("other")', '/elsewhere/x.py', 'exec'), {})
        return 0
    warn = type(warn)(warn.__code__.replace(co_filename=cli.__file__), globals())
    monkeypatch.setitem(cli._USING, 'doctor', (warn, ''))
    with warnings.catch_warnings():
        warnings.simplefilter('always')
        was = warnings.showwarning
        warnings.showwarning = lambda *a, **k: print(warnings.formatwarning(*a[:4]), file=sys.stderr, end='')
        try: assert main(['doctor']) == 0
        finally: warnings.showwarning = was
    err = capsys.readouterr().err
    assert 'note: these images are small\n' in err and 'x.py:1: UserWarning: other' in err and 'note: other' not in err


BARE = 'import sys; sys.path[:0] = {path!r}; from vfmvae import cli; cli._hub = lambda: (True, "not asked"); sys.exit(cli.main({argv!r}))'


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
    import vfmvae.generate
    import vfmvae.recipes
    def work(*a, **k): raise AssertionError('worked first')
    for module, names in ((vfmvae.recipes, 'train_tokenizer encode_images decode_latents evaluate_tokenizer'), (vfmvae.generate, 'train_flow generate'),
                          (vfmvae.align, 'se_cknna'), (vfmvae.demo, 'fresh_decoder')):
        for f in names.split(): monkeypatch.setattr(module, f, work)
    (tmp_path/'file').touch()
    kind = dict(align='.json', evaluate='.json', encode='.safetensors', train='.safetensors')
    ending = '' if flag == '--run' else kind.get(name.split('-')[0], '')
    argv = ['world' if w == 'x' else w for w in required(name)]
    assert str(tmp_path/'file') in one_line(capsys, name, *argv, flag, str(tmp_path/'file'/f'mine{ending}'))
    if ending:
        (tmp_path/f'folder{ending}').mkdir()
        assert 'is a folder' in one_line(capsys, name, *argv, flag, str(tmp_path/f'folder{ending}'))


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
    well, says = cli._tried(cli._runs)
    assert not well and 'VFMVAE_HOME' in says and '\n' not in says


def test_the_doctor_tells_an_old_package_and_an_unknown_python(monkeypatch):
    monkeypatch.setattr(cli, '_floor', lambda name: '99.1')
    assert cli._import('numpy') == (False, f'{np.__version__} is older than 99.1: pip install --upgrade numpy')
    found = []
    for version in ('3.10.9', '3.11.0', '3.13.1', '3.14.0'):
        monkeypatch.setattr(cli.platform, 'python_version', lambda version=version: version)
        found.append(cli._python())
    assert [w for w, _ in found] == [False, True, True, True] and 'older than 3.11' in found[0][1] and found[2][1] == '3.13.1' and 'tried' in found[3][1]


# labs -----------------------------------------------------------------------------------------------------------------------------------------------

def test_a_lab_overwrites_no_notebook_and_opens_the_same_state_again(tmp_path, capsys, monkeypatch):
    for name in ('jupyterlab', 'ipywidgets'): pytest.importorskip(name, reason='the [notebooks] or [widgets] extra is not installed')
    monkeypatch.setenv('VFMVAE_HOME', str(tmp_path))
    def lab(*words):
        assert main(['lab', *words, '--dry-run']) == 0
        return Path(capsys.readouterr().out.strip().split(': ', 1)[1])
    first = lab()
    book = json.loads(first.read_text())
    book['cells'].append(dict(cell_type='markdown', id='mine', metadata={}, source=['my notes\n', 'of today']))
    book['cells'][1]['source'] = book['cells'][1]['source'].splitlines(keepends=True)      # as Jupyter saves it
    first.write_text(json.dumps(book))
    kept = first.read_bytes()
    other = lab('--n', '32')
    assert lab() == first and lab('--n', '32') == other != first and first.read_bytes() == kept
    (tmp_path/'labs'/'explorer-3.ipynb').write_text('not a notebook')
    (tmp_path/'labs'/'explorer-4.ipynb').mkdir()
    assert lab('--n', '40').name == 'explorer-5.ipynb' and (tmp_path/'labs'/'explorer-3.ipynb').read_text() == 'not a notebook'


def test_words_after_two_dashes_are_jupyters(tmp_path, capsys, monkeypatch):
    for name in ('jupyterlab', 'ipywidgets'): pytest.importorskip(name, reason='the [notebooks] or [widgets] extra is not installed')
    monkeypatch.setenv('VFMVAE_HOME', str(tmp_path))
    called = []
    monkeypatch.setattr(subprocess, 'run', lambda words, **k: called.append(words) or subprocess.CompletedProcess(words, 3))
    assert main(['lab', '--n', '32', '--', '--no-browser', '--port', '8890', '--allow-root']) == 3
    (python, m, jupyter, lab, book, *more), = called
    assert (python, m, jupyter, lab) == (sys.executable, '-m', 'jupyter', 'lab') and Path(book).is_file()
    assert more == ['--no-browser', '--port', '8890', '--allow-root']
    assert 'unrecognized' in refused(capsys, 'encode', '--images', 'x', '--', '--size', '8')


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
    assert '64x48 px, not square' in one_line(capsys, *look, '--samples', str(flat), '--reference', str(ref))
    line = one_line(capsys, *look, '--samples', str(mixed), '--reference', str(ref))
    assert '0004.png' in line and '72x72 px' in line and '--size' in line and not (tmp_path/'r.json').exists()


def test_numbers_that_are_not_finite_are_null_and_no_success(capsys, monkeypatch):
    import vfmvae.recipes
    monkeypatch.setattr(vfmvae.recipes, 'evaluate_tokenizer', lambda *a, **k: dict(psnr=float('inf'), ssim=.5, l1=float('nan'), n=4))
    assert main(['evaluate', '--images', 'world', '--n', '4']) == 1
    out, err = capsys.readouterr()
    found = json.loads(out, parse_constant=lambda word: pytest.fail(word))
    assert found['psnr'] is found['l1'] is None and found['ssim'] == .5 and 'psnr, l1' in err


def test_a_word_that_would_be_ignored_is_refused(tmp_path, capsys):
    (tmp_path/'a.yaml').write_text('x: 1')
    for name in ('encode', 'reconstruct', 'evaluate', 'align', 'cache'):
        assert '--g-kwargs' in one_line(capsys, name, '--images', 'world', '--g-kwargs', str(tmp_path/'a.yaml'))


def test_cache_and_train_flow_mean_the_same_images(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv('VFMVAE_HOME', str(tmp_path/'home'))
    for k, at in (('ant', range(12)), ('bee', range(12, 24))): pictures(tmp_path/'mine', ()) and pictures(tmp_path/'mine'/k, at, 64)
    for data in ('world', str(tmp_path/'mine')):
        assert main(['cache', '--tokenizer', 'conv-f8d16', '--images', data, '--n', '8']) == 0
        said = capsys.readouterr()
        assert '8 latents' in said.out and '64 px' in said.out and '8 of ' in said.err
        before = sorted((tmp_path/'home'/'latents').iterdir())
        marks = [f.stat().st_mtime_ns for d in before for f in d.glob('shard*')]
        assert main(['train-flow', '--preset', 'dit-conv-f8d16', '--data', data, '--n', '8', '--images', '8', '--batch', '8']) == 0
        assert sorted((tmp_path/'home'/'latents').iterdir()) == before and marks == [f.stat().st_mtime_ns for d in before for f in d.glob('shard*')]
    assert len(before) == 2
