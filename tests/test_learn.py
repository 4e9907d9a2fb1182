"""The course in nbs/learn: what is folded away must be what is tested, and what is committed must have run."""
import json, re
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
