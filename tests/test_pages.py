"""`make pages`: a page shows what its cells give now, cells that tests leave out keep what they show, a page that fails stays as it was."""
import ast, base64, dataclasses, importlib, importlib.util, io, json, os, re, shutil, sys, tempfile
from pathlib import Path

import nbformat
import numpy as np
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from PIL import Image
from scope import thorough

from vfmvae import plots

ROOT = Path(__file__).resolve().parent.parent
spec = importlib.util.spec_from_file_location('pages_of_docs', ROOT/'docs/pages.py')
pages = importlib.util.module_from_spec(spec)
spec.loader.exec_module(pages)
GREY = np.full((8, 9, 3), 120, np.uint8)


def page(path, *sources, old='old'):
    cells = [new_code_cell(s, outputs=[new_output('execute_result', {'text/plain': old}, execution_count=3)]) for s in sources]
    nbformat.write(new_notebook(cells=[new_markdown_cell('# A page'), *cells]), path)
    return path


def shown(path): return [''.join(o.get('text') or o['data']['text/plain']) for c in nbformat.read(path, 4).cells if c.cell_type == 'code' for o in c.outputs]


def test_all_or_nothing_of_a_page(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv('VFMVAE_SHARED', raising=False)
    (tmp_path/'number.txt').write_text('41')
    cells = "int(open('number.txt').read())+1", '#| slow\n1/0', '#| eval: false\n1/0', '#|shared\n1/0', '#| export\nprint(2)'
    cells += '#| keep\nfound = 5\nfound', 'found+1'
    good = page(tmp_path/'good.ipynb', *cells)
    bad = page(tmp_path/'bad.ipynb', '1+1', "raise ValueError('no such number')", '3')
    dead = page(tmp_path/'dead.ipynb', 'import os; os._exit(1)')
    before = bad.read_bytes(), dead.read_bytes()
    monkeypatch.setattr(sys, 'argv', ['pages', str(bad), str(dead), str(good)])
    monkeypatch.setenv('VFMVAE_FULL', '1')
    assert pages.main()
    assert capsys.readouterr().out.splitlines() == ['bad.ipynb: ValueError: no such number', 'dead.ipynb: its process died', 'good.ipynb: done']
    assert shown(good) == ['42', 'old', 'old', 'old', '2\n', 'old', '6'] and (bad.read_bytes(), dead.read_bytes()) == before
    assert 'VFMVAE_FULL' not in os.environ                                           # pages are no trainings
    made = json.loads(good.read_text())                   # as `make export` leaves it: no counts, times, tags or widgets
    assert all(c.get('execution_count') is None and not c['metadata'] for c in made['cells']) and 'widgets' not in made['metadata']
    assert sorted(p.name for p in tmp_path.iterdir()) == ['bad.ipynb', 'dead.ipynb', 'good.ipynb', 'number.txt']
    monkeypatch.setenv('VFMVAE_SHARED', 'somewhere')
    assert pages.left_out('#| cuda\n1') and not pages.left_out('#| shared\n1') and not pages.left_out('x = "#| slow"')


def picture(a):
    (f := io.BytesIO(), Image.fromarray(a).save(f, 'PNG'))
    return base64.b64encode(f.getvalue()).decode()


def test_live_widgets_go_and_a_picture_that_is_the_same_keeps_its_bytes():
    bar, lab = {pages.WIDGET: {'model_id': 'x'}, 'text/plain': '0%'}, {pages.WIDGET: {'model_id': 'y'}, 'text/plain': 'a lab', 'image/png': picture(GREY)}
    moving = new_output('display_data', {'image/png': picture(GREY)}, metadata=plots.LIVE)
    assert pages.kept([new_output('display_data', bar), moving], []) == []
    assert [set(o.data) for o in pages.kept([new_output('display_data', lab)], [])] == [{'text/plain', 'image/png'}]
    for moved, same in ((1, True), (2, True), (3, False)):
        new = GREY.copy()
        new[3, 4, 1] += moved
        old, now = (new_output('display_data', {'image/png': picture(a)}) for a in (GREY, new))
        wanted = (old if same else now).data['image/png']
        assert pages.kept([now], [old])[0].data['image/png'] == wanted
    said = f'/some/place/probes.py:244: Notice: {tempfile.mkdtemp()}/ants lie outside\n  say(net)\nand 0.50000001 more\n'
    notice = new_output('stream', name='stderr', text=said)
    assert pages.kept([notice], [])[0].text == 'Notice: ants lie outside\nand 0.50000001 more\n'
    notice = new_output('stream', name='stderr', text='/some/kernel_7/34.py:4: UserWarning: ants\nTurn back first.\n  ants(7)\n/at/a.py:1: Notice: b\n  c\n')
    assert pages.kept([notice], [])[0].text == 'UserWarning: ants\nTurn back first.\nNotice: b\n'
    for was, same in (('a 0.41743308', True), ('a 0.4175', False), ('b 0.41743309', False), ('a 0.41743309 0.5', False)):
        old, now = (new_output('execute_result', {'text/plain': s}) for s in (was, 'a 0.41743309'))
        assert pages.kept([now], [old])[0].data['text/plain'] == (was if same else 'a 0.41743309')
    old = new_output('display_data', {'image/png': picture(GREY)})
    wide = new_output('display_data', {'image/png': picture(GREY[:, :4])})
    assert pages.kept([wide], [old])[0].data['image/png'] == picture(GREY[:, :4])


def test_a_page_that_is_not_there_is_named(monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['pages', 'nbs/paper/verdict.ipynb'])
    with pytest.raises(SystemExit): pages.main()
    assert 'no page' in (said := capsys.readouterr().err) and 'verdict.ipynb' in said


def test_every_page_that_only_draws_results_is_among_them():
    known = {p for k in pages.PAGES for p in (ROOT/'nbs').glob(k)}
    every = {p: json.loads(p.read_text(encoding='utf-8'))['cells'] for p in (ROOT/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts}
    code = {p: '\n'.join(''.join(c['source']) for c in cells if c['cell_type'] == 'code') for p, cells in every.items()}
    draws = {p for p, s in code.items() if "'results'" in s and not re.search(r'write_json|VFMVAE_MEASURE|default_exp', s)}
    assert draws and draws <= known


# those of the library show times and commits, too
EVERY = [name for k in pages.PAGES for p in sorted((ROOT/'nbs').glob(k)) if not (name := p.relative_to(ROOT/'nbs').as_posix())[0].isdigit()]


def words(page):
    """What the cells of a page show, beside pictures: the words with # for each number, and the numbers. Of a page of trainings what stands below the
    word *committed*: what a small training gives is another on each processor."""
    cells = nbformat.read(page, 4).cells
    begin = (i for i, c in enumerate(cells) if c.cell_type == 'markdown' and page.parent.name == 'train' and 'committed' in c.source)
    text = [v for c in cells[next(begin, 0):] if c.cell_type == 'code' for o in c.outputs
            for v in (o.get('text'), *(o.get('data', {}).get(k) for k in ('text/plain', 'text/html', 'text/markdown'))) if v]
    return [pages.NUMBER.sub('#', t) for t in text], np.array([float(n) for t in text for n in pages.NUMBER.findall(t)])


@pytest.mark.parametrize('name', thorough(EVERY, ['paper/verdicts.ipynb']))
def test_a_page_shows_what_its_code_and_the_results_give_today(name, tmp_path):
    "Intervals got another rule, measures another name, and pages went on showing the old ones."
    page = ROOT/'nbs'/name
    copy = tmp_path/'nbs'/name
    shutil.copytree(page.parent, copy.parent)            # beside what it opens
    assert not pages.execute(copy)
    (said, numbers), (says, now) = words(page), words(copy)
    assert said == says
    np.testing.assert_allclose(now, numbers, rtol=2e-3, atol=1.5e-3)                 # another processor rounds otherwise


def every_code_cell():
    for p in sorted((ROOT/'nbs').rglob('*.ipynb')):
        for c in nbformat.read(p, 4).cells if '.ipynb_checkpoints' not in p.parts else ():
            if c.cell_type == 'code': yield p, c


def test_what_pages_show_of_a_recipe_has_todays_fields():
    "A page went on showing a Preset with fields that had been renamed."
    ours = {n: {f.name for f in dataclasses.fields(v)} for m in ('presets', 'tokenizer_task', 'vae', 'baselines', 'dit', 'flow', 'samplers')
            for n, v in vars(importlib.import_module(f'vfmvae.{m}')).items() if isinstance(v, type) and dataclasses.is_dataclass(v)}
    asked = 0
    for p, c in every_code_cell():
        for o in c.outputs:
            try: tree = ast.parse(o.get('data', {}).get('text/plain', '').strip(), mode='eval')
            except SyntaxError: continue
            for n in ast.walk(tree):
                if not (isinstance(n, ast.Call) and isinstance(n.func, ast.Name) and n.func.id in ours): continue
                asked += 1
                assert {k.arg for k in n.keywords} <= ours[n.func.id], (p.name, c.id, n.func.id)
    assert asked


def test_no_page_decides_by_intervals_that_lie_apart():
    "The interval of the difference decides (`metrics.difference`): the low end of one less the high end of another is another rule, and was one verdict off."
    for p, c in every_code_cell():
        assert not re.search(r"low'\] ?- ?[\w.]+(\[[^\]]+\])*\[[^\]]*high'\]", c.source), (p.name, c.id)


def test_no_page_keeps_a_live_widget_a_bar_or_a_temporary_folder():
    for p in sorted((ROOT/'nbs').rglob('*.ipynb')):
        for c in nbformat.read(p, 4).cells if '.ipynb_checkpoints' not in p.parts else ():
            for o in c.get('outputs', ()):
                text = o.get('text', '') + o.get('data', {}).get('text/plain', '')
                assert pages.WIDGET not in o.get('data', {}) and '?it/s]' not in text and not re.search(r'\btmp[a-z0-9_]{8}/', text), (p.name, c.id)
