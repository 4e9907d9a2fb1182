"""Executes pages once more, so that they show what `data/results` holds now: `make pages`, or

    python docs/pages.py [--jobs N] [NOTEBOOK ...]

Without names: the front page, the library, the lessons, the pages of the paper and those of trainings, at their smoke sizes. Cells that the tests leave out
(`#| slow`, `#| cuda`, `#| eval: false`; `#| shared` without VFMVAE_SHARED) keep what they show, and so does one with `#| keep`, which runs: what it
shows another run would not give again (a full training, a time). A page of which a cell fails stays as it was, and the others go on.
"""
import argparse, base64, io, os, re, subprocess, sys, tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
import numpy as np
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
PAGES = '*.ipynb', 'learn/*.ipynb', 'paper/*.ipynb', 'train/*.ipynb'
LEFT, WIDGET = 'skip-execution', 'application/vnd.jupyter.widget-view+json'
PICTURES = {'image/png', 'image/jpeg'}
NUMBER = re.compile(r'\d+\.\d+(?:e[-+]?\d+)?')
TEMPORARY = re.compile(re.escape(tempfile.gettempdir()) + r'/tmp\w+/')
# as Python writes a warning: file, line, words in one line or more, and the code
NOTICE = re.compile(r'(?m)^\S+\.py:\d+: (\w+: .*\n(?:(?!\S+\.py:\d+: )\S.*\n)*)  .*\n?')


def flagged(source, *kinds):
    "Whether a cell has one of these flags."
    return bool(re.search(rf'(?m)^#\|\s*({"|".join(kinds)})\b', source))


def left_out(source):
    "Whether the tests leave a cell out."
    return flagged(source, 'slow', 'cuda', r'eval:\s*false', *(() if 'VFMVAE_SHARED' in os.environ else ('shared',)))


def same_picture(a, b):
    "Whether two pictures in base64 differ by two levels at most, as the rounding of another processor makes them."
    x, y = (np.asarray(Image.open(io.BytesIO(base64.b64decode(v))).convert('RGBA'), dtype=int) for v in (a, b))
    return x.shape == y.shape and abs(x-y).max() <= 2


def same_text(a, b):
    "Whether two texts have the same words, and numbers that differ by rounding alone."
    x, y = ([float(n) for n in NUMBER.findall(t)] for t in (a, b))
    return NUMBER.sub('#', a) == NUMBER.sub('#', b) and np.allclose(x, y, rtol=1e-5, atol=1e-12)


def kept(outputs, old):
    """What a page keeps: no live widgets, plots and bars of progress, which need a kernel; of a notice its words, not its place; no names of temporary
    folders; what is the same as it was, but for the rounding of another processor, as it was."""
    old, found = [(k, v) for o in old for k, v in (o.get('data') or {'text': o.get('text', '')}).items()], []
    for o in outputs:
        data = o.get('data', {})
        if o.get('metadata', {}).get('live') or data.pop(WIDGET, None) and data.keys() <= {'text/plain'}: continue
        if o.output_type == 'stream': data = {'text': NOTICE.sub(r'\1', o.text)}
        for k in data:
            if k.startswith('text'): data[k] = TEMPORARY.sub('', data[k])
            same = same_picture if k in PICTURES else same_text
            if k in PICTURES or k.startswith('text'): data[k] = next((v for kind, v in old if kind == k and same(v, data[k])), data[k])
        if o.output_type == 'stream': o.text = data['text']
        found.append(o)
    return found


def execute(page):
    "Writes a page with what its cells show now; returns what went wrong, in a line, or ''."
    nb = nbformat.read(page, 4)
    code = [c for c in nb.cells if c.cell_type == 'code']
    before, left = [[*c.outputs] for c in code], [c for c in code if left_out(c.source)]
    for c in left: c.metadata['tags'] = [*c.metadata.get('tags', ()), LEFT]
    how = dict(skip_cells_with_tag=LEFT, store_widget_state=False, record_timing=False, timeout=None,
               extra_arguments=['--log-level=40'])          # errors alone: a kernel warns of its own transport
    try: NotebookClient(nb, resources=dict(metadata=dict(path=str(page.parent))), **how).execute()
    except CellExecutionError as e: return f'{e.ename}: {e.evalue}'.splitlines()[0]
    except DeadKernelError: return 'its process died'
    for c, old in zip(code, before, strict=True): c.outputs = old if flagged(c.source, 'keep') else kept(c.outputs, old)
    for c in left:
        c.metadata['tags'].remove(LEFT)
        if not c.metadata['tags']: del c.metadata['tags']
    with tempfile.TemporaryDirectory(dir=page.parent, prefix='.') as folder:
        new = Path(folder)/page.name
        nbformat.write(nb, new)
        subprocess.run([Path(sys.executable).with_name('nbdev-clean'), '--fname', new], check=True)
        os.replace(new, page)
    return ''


def main():
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument('notebooks', nargs='*', type=Path, help='pages to execute')
    ask.add_argument('--jobs', type=int, default=2, help='pages at once')
    given = ask.parse_args()
    pages = [p.resolve() for p in given.notebooks] or [p for k in PAGES for p in sorted((ROOT/'nbs').glob(k))]
    if missing := [str(p) for p in pages if not p.is_file()]: ask.error(f'no page {", ".join(missing)}')
    for k in ('FULL', 'MEASURE', 'READER'): os.environ.pop(f'VFMVAE_{k}', None)                # which would train
    failed = 0
    with ThreadPoolExecutor(given.jobs) as pool:
        for page, why in zip(pages, pool.map(execute, pages), strict=True):
            print(f'{page.name}: {why or "done"}', flush=True)
            failed += bool(why)
    return bool(failed)


if __name__ == '__main__': sys.exit(main())
