"""What mkdocs and griffe are given: descriptions of pictures, the comments beside parameters and fields (nbdev's way to document them), links of
names, and a search that finds a name before the names that begin like it."""
import ast, html, json, re
from functools import cache
from pathlib import Path

import griffe

from vfmvae.signatures import comments_of

PACKAGE = Path(__file__).resolve().parent.parent/'vfmvae'


@cache
def comments(file):
    "{line: comment} of a module."
    return comments_of(Path(file).read_text(encoding='utf-8'))


@cache
def public(module):
    "{name: the first sentence said of it} of the functions, classes and constants of a module's `__all__`."
    file = PACKAGE/f'{module}.py'
    tree = ast.parse(file.read_text(encoding='utf-8'))
    made = {getattr(n, 'name', None) or ast.unparse(getattr(n, 'target', None) or n.targets[0]): n for n in tree.body
            if isinstance(n, ast.FunctionDef | ast.ClassDef | ast.Assign | ast.AnnAssign)}
    if '__all__' not in made: return {}

    def said(node):
        text = ast.get_docstring(node) if hasattr(node, 'body') else comments(file).get(node.end_lineno)
        return re.split(r'(?<=[.?]) (?=[A-Z])', ' '.join((text or '').split('\n\n')[0].split()))[0]
    return {n: said(made[n]) for n in ast.literal_eval(made['__all__'].value) if n in made}


@cache
def modules(): return sorted(p.stem for p in PACKAGE.glob('*.py') if not p.stem.startswith('_'))


@cache
def place(word, here=''):
    "What `word` names: (module, name), (module, '') or nothing. A bare name is that of the module `here`, or the only one of all modules."
    first, _, name = word.removeprefix('vfmvae.').rpartition('.')
    if first: return (first, name) if first in modules() and name in public(first) else None
    if word == f'vfmvae.{name}': return (name, '') if name in modules() else None
    if here and name in public(here): return here, name
    found = [m for m in modules() if name in public(m)]
    return (found[0], name) if len(found) == 1 else None


def linked(text, link, here='', but=()):
    "Markdown in which code that is a public name becomes a link; `link(module, name)` says where to. Headings, code blocks and links stay as they are."
    def one(m):
        at = m[1] and m[1] not in but and place(m[1], here)
        to = at and link(*at)
        return f'[{m[0]}]{to}' if to else m[0]
    keep = r'(?ms)^```.*?^```|^#.*?$|^ {4}.*?$|!?\[[^\]]*\][(\[][^)\]]*[)\]]|<a\b.*?</a>|``.*?``'
    return re.sub(keep + r'|`([\w.]+)(?:\([^`\n]*\))?`|`[^`\n]*`', one, text)


def escaped(text):
    "Markdown of a docstring, in which an index is no link and a product no emphasis."
    return re.sub(r'`[^`]*`|\](?=\()|(?<=[\w)\]])\*\*?(?=[\w(])', lambda m: m[0] if m[0][0] == '`' else ''.join(f'\\{c}' for c in m[0]), text)


def to_name(module, name):
    "Where a link of a page of the reference leads."
    return f'[vfmvae.{module}.{name}]' if name else f'({module}.md)'


def on_page_content(text, **kwargs):
    "A picture without a description gets the paragraph or heading above it."
    said = ''
    def described(m):
        nonlocal said
        if m[1] is None: return f'alt="Picture to: {said}"'
        said = html.escape(html.unescape(' '.join(re.sub(r'<[^>]+>|\u00b6', '', m[1]).split()))[:200], quote=True) or said
        return m[0]
    return re.sub(r'<(?:p|h\d)\b[^>]*>(.*?)</(?:p|h\d)>|alt="No description[^"]*"', described, text, flags=re.S)


def on_post_build(config, **kwargs):
    """The search prefers rare words, so that `cknna` would come after `cknna_pairs`. A name that others begin with is a tag, too: tags count most. Of
    two such names the shorter counts more."""
    file = Path(config['site_dir'])/'search'/'search_index.json'
    if not file.is_file(): return
    index = json.loads(file.read_text(encoding='utf-8'))
    entries = {}
    for e in index['docs']:
        e['title'] = e['title'].removesuffix('\u00b6')
        if not (m := re.fullmatch(r'reference/\w+\.html#vfmvae\.(\w+)(?:\.\w+)*?\.(\w+)', e['location'])): continue
        e['title'] = m[2]       # without its labels
        if e['location'].count('.') == 3 and m[2] in public(m[1]): entries.setdefault(m[2].lower(), []).append(e)
    rank = {}
    for name in sorted(entries, key=len, reverse=True):
        rank[name] = 1 + max((rank[n] for n in rank if n.startswith(name)), default=0)
        for e in entries[name]:
            if rank[name] > 1: e |= dict(tags=[name], boost=10.**(rank[name]-2))
    file.write_text(json.dumps(index, separators=(',', ':')), encoding='utf-8')


READ = dict(parser='google', parser_options=dict(warnings=False))       # a parameter without a type is no fault


class Comments(griffe.Extension):
    "Adds an `Args:` section to functions, a docstring to fields, and links to docstrings."

    def on_object(self, *, obj, **kwargs):
        if not obj.docstring: return
        here, own = obj.module.name, {obj.name, *(p.name for p in getattr(obj, 'parameters', ()))}
        # line by line behind its indent, for an indented line is no code block here
        obj.docstring.value = re.sub(r'(?m)^( *)(.*)', lambda m: m[1] + linked(m[2], to_name, here, own), escaped(obj.docstring.value))

    def on_function_instance(self, *, node, func, **kwargs):
        a = node.args
        every = [*a.posonlyargs, *a.args, *filter(None, [a.vararg]), *a.kwonlyargs, *filter(None, [a.kwarg])]
        said = comments(func.filepath)
        last_of_line = {p.end_lineno: p.arg for p in every}
        if rows := [f'    {name}: {said[n]}' for n, name in last_of_line.items() if n in said]:
            text = func.docstring.value if func.docstring else ''
            func.docstring = griffe.Docstring('\n'.join([text, '', 'Args:', *rows]), parent=func, lineno=node.lineno, **READ)

    def on_attribute_instance(self, *, node, attr, **kwargs):
        if attr.docstring or not hasattr(node, 'lineno'): return
        said = comments(attr.filepath)
        if node.end_lineno in said: attr.docstring = griffe.Docstring(said[node.end_lineno], parent=attr, lineno=node.lineno, **READ)
