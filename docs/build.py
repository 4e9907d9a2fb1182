"""A page for each notebook, the reference of each module and an index of all names, in `_docs`: `make docs`, or

    python docs/build.py [--out FOLDER] [--only NAME ...]

Nothing is executed and no server is asked; mkdocs, mkdocs-jupyter and mkdocstrings make the pages.
"""
import argparse, ast, logging, os, re, shutil, tempfile
from pathlib import Path

import nbformat
from mkdocs.commands.build import build
from mkdocs.config import load_config

ROOT = Path(__file__).resolve().parent.parent
# the first number of each group of library notebooks
GROUPS = {0: 'Ground', 5: 'Pictures', 10: 'Looking', 12: 'Tokenizers', 19: 'Training', 22: 'Comparing', 32: 'Generating', 39: 'Doors'}
FOLDERS = {'learn': 'Course', '.': 'Library', 'paper': 'The paper', 'train': 'Bundled weights'}


PAGES = {'](../data/': '](data/', '](../CONTRIBUTING.md': '](CONTRIBUTING.html', '](../docs/glossary.md': '](glossary.html',
         '](../../docs/glossary.md': '](../glossary.html', '.ipynb)': '.html)'}


def to_pages(text):
    "Links of a notebook as links of its page."
    for a, b in PAGES.items(): text = text.replace(a, b)
    return text


def unfolded(cells):
    "Cells whose code the notebook folds: what they show, then their code for whoever opens it."
    waiting = []
    def opened():
        code = '\n\n'.join(waiting)
        waiting.clear()
        return nbformat.v4.new_markdown_cell(f'<details><summary>code</summary>\n\n```python\n{code}\n```\n\n</details>')
    for c in cells:
        fold = c.cell_type == 'code' and c.metadata.get('jupyter', {}).get('source_hidden') and 'remove-input' not in c.metadata.get('tags', ())
        if fold: waiting.append(c.source)
        if fold and not c.outputs: continue
        if not fold and waiting: yield opened()
        if fold: c.metadata['tags'] = ['remove-input']
        yield c
        if fold: yield opened()
    if waiting: yield opened()


def page_of(notebook):
    "The notebook without hidden cells and directives; its title."
    nb = nbformat.read(notebook, 4)
    nb.cells = [c for c in nb.cells if not (c.cell_type == 'code' and re.match(r'#\|\s*(hide|default_exp)', c.source))]
    for c in nb.cells:
        if c.cell_type == 'code': c.source = re.sub(r'(?m)^#\|\s*export\w*\n?', '', c.source)
        else: c.source = to_pages(c.source)
        for out in c.get('outputs', ()):
            if 'text/markdown' in out.get('data', {}): out.data['text/markdown'] = to_pages(out.data['text/markdown'])
    nb.cells = [*unfolded(nb.cells)]
    nb.metadata.pop('widgets', None)
    title = re.match(r'# (.+)', nb.cells[0].source if nb.cells else '')
    if not title: raise SystemExit(f'{notebook} does not begin with a heading; its first cell says "# Title"')
    return nb, title[1].strip()


def public(module):
    "The functions, classes and constants of a module's `__all__`."
    tree = ast.parse(module.read_text(encoding='utf-8'))
    made = {getattr(n, 'name', None) or ast.unparse(getattr(n, 'target', None) or n.targets[0]): n for n in tree.body
            if isinstance(n, ast.FunctionDef | ast.ClassDef | ast.Assign | ast.AnnAssign)}
    return [n for n in ast.literal_eval(made['__all__'].value) if n in made] if '__all__' in made else []


def write_sources(src, only=()):
    "Pages below the folder `src`; the navigation."
    nav = {title: [] for title in FOLDERS.values()}
    groups = {title: [] for title in GROUPS.values()}
    for folder, title in FOLDERS.items():
        for file in sorted((ROOT/'nbs'/folder).glob('*.ipynb')):
            if only and file.stem not in only: continue
            nb, name = page_of(file)
            to = src/folder/file.name
            to.parent.mkdir(exist_ok=True)
            nbformat.write(nb, to)
            entry, number = {name: to.relative_to(src).as_posix()}, re.match(r'\d+', file.name)
            if file.stem == 'index': nav['Home'] = entry[name]
            elif folder == '.': groups[[t for n, t in GROUPS.items() if n <= int(number[0])][-1]].append(entry)
            else: nav[title].append(entry)
    if not only:
        for f in ('docs/glossary.md', 'CONTRIBUTING.md'): shutil.copy(ROOT/f, src)
    nav['Library'] = [{k: v} for k, v in groups.items() if v]
    modules = [m for m in sorted((ROOT/'vfmvae').glob('*.py')) if not m.stem.startswith('_') and (not only or m.stem in only)]
    names = sorted(((n, m.stem) for m in modules for n in public(m)), key=lambda x: (x[0].lower(), x))
    (src/'reference').mkdir()
    for m in modules:
        (src/'reference'/f'{m.stem}.md').write_text(f'# vfmvae.{m.stem}\n\n::: vfmvae.{m.stem}\n', encoding='utf-8')
    entries = [f'- [`{n}`][vfmvae.{m}.{n}] of [`vfmvae.{m}`]({m}.md)' for n, m in names]
    (src/'reference'/'index.md').write_text('\n'.join(['# All names', '', *entries, '']), encoding='utf-8')
    nav['Reference'] = ['reference/index.md', *({f'vfmvae.{m.stem}': f'reference/{m.stem}.md'} for m in modules)]
    for f in ('iframe-worker.js', 'pages.css'): shutil.copy(ROOT/'docs'/f, src)
    shutil.copytree(ROOT/'data'/'screenshots', src/'data'/'screenshots')
    if not only: nav |= {'Glossary': 'glossary.md', 'Add something': 'CONTRIBUTING.md'}
    return [{k: nav[k]} for k in ('Home', *FOLDERS.values(), 'Reference', 'Glossary', 'Add something') if nav.get(k)]


def make(out, only=()):
    "All pages, or those of some notebooks and modules by name, below `out`."
    os.environ.setdefault('NO_MKDOCS_2_WARNING', '1')
    logging.getLogger('mkdocs').setLevel(logging.WARNING)
    with tempfile.TemporaryDirectory() as tmp:
        src = Path(tmp).resolve()
        nav = write_sources(src, only)
        os.chdir(ROOT)
        build(load_config(str(ROOT/'docs'/'mkdocs.yml'), docs_dir=str(src), site_dir=str(Path(out).resolve()), nav=nav))


if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--out', default='_docs', help='folder of the pages')
    p.add_argument('--only', nargs='*', default=(), metavar='NAME', help='of a notebook or module; default: all')
    a = p.parse_args()
    out = Path(a.out).resolve()
    make(out, a.only)
    print(out/'index.html')
