"""A page for each notebook, the reference of each module and an index of all names, in `_docs`: `make docs`, or

    python docs/build.py [--out FOLDER] [--only NAME ...]

Nothing is executed and no server is asked; mkdocs, mkdocs-jupyter and mkdocstrings make the pages.
"""
import argparse, logging, os, re, shutil, tempfile
from pathlib import Path

import nbformat
from hooks import escaped, linked, modules, public, to_name
from mkdocs.commands.build import build
from mkdocs.config import load_config

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {'learn': 'Course', '.': 'Library', 'paper': 'The paper', 'train': 'Bundled weights'}


PAGES = {'](../data/': '](data/', '](../CONTRIBUTING.md': '](CONTRIBUTING.html', '](../docs/glossary.md': '](glossary.html',
         '](../../docs/glossary.md': '](../glossary.html', '.ipynb)': '.html)'}


def to_pages(text, known, up):
    "Links of a notebook as links of its page; names of the modules `known` lead to the reference."
    for a, b in PAGES.items(): text = text.replace(a, b)
    return linked(text, lambda m, n: m in known and f"({up}reference/{m}.html{f'#vfmvae.{m}.{n}' if n else ''})")


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


def page_of(notebook, known=()):
    "The notebook without hidden cells and directives; its title; the module that it exports, or nothing; the group that its head names."
    nb = nbformat.read(notebook, 4)
    module = next((m[1] for c in nb.cells if (m := re.match(r'#\|\s*default_exp (\w+)', c.source)) and m[1] in known), '')
    nb.cells = [c for c in nb.cells if not (c.cell_type == 'code' and re.match(r'#\|\s*(hide|default_exp)', c.source))]
    up = '../'*(notebook.parent != ROOT/'nbs')
    for c in nb.cells:
        if c.cell_type == 'code': c.source = re.sub(r'(?m)^#\|\s*export\w*\n?', '', c.source)
        else: c.source = to_pages(c.source, known, up)
        for out in c.get('outputs', ()):
            if 'text/markdown' in out.get('data', {}): out.data['text/markdown'] = to_pages(out.data['text/markdown'], known, up)
    nb.cells = [*unfolded(nb.cells)]
    nb.metadata.pop('widgets', None)
    title = re.match(r'# (.+)', nb.cells[0].source if nb.cells else '')
    if not title: raise SystemExit(f'{notebook} does not begin with a heading; its first cell says "# Title"')
    group = re.search(r'(?m)^(\w+) · in:', nb.cells[0].source)
    if module: nb.cells[0].source += f'\n\nReference: [`vfmvae.{module}`](reference/{module}.html)'
    return nb, title[1].strip(), module, group[1] if group else ''


def all_names(known):
    "The page of all public names of some modules, by letter. The search leaves it out, for it has the names' own places."
    names = sorted(((n, m, said) for m in known for n, said in public(m).items()), key=lambda x: (x[0].lower(), x))
    letters = {n[0].upper(): [] for n, *_ in names}
    for n, m, said in names:
        what = f': {linked(escaped(said), to_name, m, [n])}' if said else ''
        letters[n[0].upper()].append(f'- [`{n}`][vfmvae.{m}.{n}] of [{m}]({m}.md){what}')
    head = ['---', 'search: {exclude: true}', '---', '# All names', '',
            'Functions, classes and constants of the library. The search box at the top finds them, too.', '',
            ' '.join(f'[{a}](#{a.lower()})' for a in letters), '']
    return '\n'.join([*head, *(line for a, rows in letters.items() for line in (f'## {a}', '', *rows, ''))])


def write_sources(src, only=()):
    "Pages below the folder `src`; the navigation."
    nav = {title: [] for title in FOLDERS.values()}
    groups = {}     # in the order of the notebooks
    told = {}       # module: the link to its notebook
    known = [m for m in modules() if not only or m in only]
    for folder, title in FOLDERS.items():
        for file in sorted((ROOT/'nbs'/folder).glob('*.ipynb')):
            if only and file.stem not in only: continue
            nb, name, module, group = page_of(file, known)
            to = src/folder/file.name
            to.parent.mkdir(exist_ok=True)
            nbformat.write(nb, to)
            if module: told[module] = f'The notebook behind it: [{name}](../{file.name})\n\n'
            entry = {name: to.relative_to(src).as_posix()}
            if file.stem == 'index': nav['Home'] = entry[name]
            elif folder == '.': groups.setdefault(group, []).append(entry)
            else: nav[title].append(entry)
    if not only:
        for f in ('docs/glossary.md', 'CONTRIBUTING.md'): shutil.copy(ROOT/f, src)
    nav['Library'] = [{k: v} for k, v in groups.items()]
    (src/'reference').mkdir()
    for m in known: (src/'reference'/f'{m}.md').write_text(f'# vfmvae.{m}\n\n{told.get(m, "")}::: vfmvae.{m}\n', encoding='utf-8')
    (src/'reference'/'index.md').write_text(all_names(known), encoding='utf-8')
    nav['Reference'] = ['reference/index.md', *({f'vfmvae.{m}': f'reference/{m}.md'} for m in known)]
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
