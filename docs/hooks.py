"""What mkdocs and griffe are given: descriptions of pictures, and the comments beside parameters and fields (nbdev's way to document them)."""
import html, re
from functools import cache
from pathlib import Path

import griffe

from vfmvae.signatures import comments_of


@cache
def comments(file):
    "{line: comment} of a module."
    return comments_of(Path(file).read_text(encoding='utf-8'))


def on_page_content(text, **kwargs):
    "A picture without a description gets the paragraph or heading above it."
    said = ''
    def described(m):
        nonlocal said
        if m[1] is None: return f'alt="Picture to: {said}"'
        said = html.escape(html.unescape(' '.join(re.sub(r'<[^>]+>|\u00b6', '', m[1]).split()))[:200], quote=True) or said
        return m[0]
    return re.sub(r'<(?:p|h\d)\b[^>]*>(.*?)</(?:p|h\d)>|alt="No description[^"]*"', described, text, flags=re.S)


class Comments(griffe.Extension):
    "Adds an `Args:` section to functions and a docstring to fields."

    def on_object(self, *, obj, **kwargs):
        if obj.docstring: obj.docstring.value = obj.docstring.value.replace('](', ']\\(')     # an index, not a link

    def on_function_instance(self, *, node, func, **kwargs):
        a = node.args
        every = [*a.posonlyargs, *a.args, *filter(None, [a.vararg]), *a.kwonlyargs, *filter(None, [a.kwarg])]
        said = comments(func.filepath)
        last_of_line = {p.end_lineno: p.arg for p in every}
        if rows := [f'    {name}: {said[n]}' for n, name in last_of_line.items() if n in said]:
            text = func.docstring.value if func.docstring else ''
            func.docstring = griffe.Docstring('\n'.join([text, '', 'Args:', *rows]), parent=func, lineno=node.lineno)

    def on_attribute_instance(self, *, node, attr, **kwargs):
        if attr.docstring or not hasattr(node, 'lineno'): return
        said = comments(attr.filepath)
        if node.end_lineno in said: attr.docstring = griffe.Docstring(said[node.end_lineno], parent=attr, lineno=node.lineno)
