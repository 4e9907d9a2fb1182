"""The course in nbs/learn: what is folded away must be what is tested, and what is committed must have run."""
import json, re, symtable
from pathlib import Path
import pytest

LEARN = sorted((Path(__file__).resolve().parent.parent/'nbs'/'learn').glob('*.ipynb'))


def cells(nb: Path, kind: str = '') -> list[dict]: return [c for c in json.loads(nb.read_text(encoding='utf-8'))['cells'] if kind in ('', c['cell_type'])]


def source(c: dict) -> str: return ''.join(c['source'])


def folded(text: str) -> list[str]: return re.findall(r'<details>.*?```python\n(.*?)```', text, re.S)


@pytest.mark.parametrize('nb', LEARN, ids=lambda p: p.stem)
def test_a_folded_solution_is_the_one_that_is_tested(nb):
    code = [source(c) for c in cells(nb, 'code')]
    blocks = [b.strip() for c in cells(nb, 'markdown') for b in folded(source(c))]
    assert [b for b in blocks if not any(b in s for s in code)] == []


def test_folded_solutions_are_found():
    assert folded('<details><summary>so</summary>\n\n```python\nx = 1\n```\n</details>') == ['x = 1\n']
    assert sum(len(folded(source(c))) for nb in LEARN for c in cells(nb, 'markdown')) > 0


@pytest.mark.parametrize('nb', LEARN, ids=lambda p: p.stem)
def test_a_solution_is_folded_below_its_exercise_and_stands_nowhere_in_the_open(nb):
    found, task = {}, None
    for c in cells(nb):
        if c['cell_type'] == 'code' and 'replace this line' in source(c): found[task := c['id']] = []
        elif c['cell_type'] == 'markdown' and task: found[task] += [b.strip() for b in folded(source(c))]
    assert found and [t for t, blocks in found.items() if not blocks] == []
    shown = [source(c) for c in cells(nb, 'code') if not source(c).startswith('#| hide')]
    assert [b for blocks in found.values() for b in blocks if any(b in s for s in shown)] == []


@pytest.mark.parametrize('nb', LEARN, ids=lambda p: p.stem)
def test_outputs_are_committed_and_exercises_are_open(nb):
    code = cells(nb, 'code')
    assert [source(c) for c in code for o in c['outputs'] if o['output_type'] == 'error'] == []
    assert sum('image/png' in o.get('data', {}) or 'image/jpeg' in o.get('data', {}) for c in code for o in c['outputs']) >= 3
    tasks = [c for c in code if 'replace this line' in source(c)]
    said = [''.join(o.get('data', {}).get('text/plain', '')) for c in tasks for o in c['outputs']]
    assert len(tasks) in (2, 3) and len(said) == len(tasks) and all('not yet' in s for s in said)


def scopes(table: symtable.SymbolTable) -> list[symtable.SymbolTable]: return [table, *(s for child in table.get_children() for s in scopes(child))]


def defined(text: str) -> set[str]: return {s.get_name() for s in symtable.symtable(text, 'cell', 'exec').get_symbols() if s.is_assigned() or s.is_imported()}


def borrowed(text: str) -> set[str]:
    "Names that a cell takes from other cells (or builtins): parameters and whatever else is local to a function are its own."
    asked = (s for t in scopes(symtable.symtable(text, 'cell', 'exec')) for s in t.get_symbols() if s.is_global() and s.is_referenced())
    return {s.get_name() for s in asked} - defined(text)


def test_borrowed_names_are_found():
    assert borrowed('def test(f):\n    g = 1\n    return f(g, h)\nwrong = [(test, lambda k: k(m), [n for n in wrong])]') == {'h', 'm'}
    assert defined('import a.b as c\ndef f(x): y = x\nclass G: z = 1\nfor i in (): pass') == {'c', 'f', 'G', 'i'}


@pytest.mark.parametrize('nb', LEARN, ids=lambda p: p.stem)
def test_a_hidden_cell_never_depends_on_what_the_student_wrote(nb):
    code = [source(c) for c in cells(nb, 'code')]
    students = set().union(*(defined(s) for s in code if 'replace this line' in s))
    hidden = [s for s in code if s.startswith('#| hide')]
    assert students and hidden
    assert {s.splitlines()[1]: sorted(found) for s in hidden if (found := borrowed(s) & students)} == {}


@pytest.mark.parametrize('nb', LEARN, ids=lambda p: p.stem)
def test_hidden_cells_are_folded_in_jupyter(nb):
    assert all(c['metadata'] == ({'jupyter': {'source_hidden': True}} if source(c).startswith('#| hide') else {}) for c in cells(nb, 'code'))
