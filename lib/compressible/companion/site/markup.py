"""Pieces of HTML that several pages of the site share."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from html import escape

_MATH = re.compile(r"\$([^$]+)\$|`([^`]+)`")


def words(text: str) -> str:
    """A line of markdown as HTML: formulas for MathJax, code, and the rest escaped."""
    parts, end = [], 0
    for found in _MATH.finditer(text):
        parts.append(escape(text[end : found.start()]))
        parts.append(formula(found[1]) if found[1] else f"<code>{escape(found[2])}</code>")
        end = found.end()
    return "".join([*parts, escape(text[end:])])


def formula(tex: str) -> str:
    """TeX in the place where MathJax looks for it; without MathJax it reads as TeX."""
    return f'<span class="math notranslate nohighlight">\\({escape(tex)}\\)</span>'


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], label: str) -> str:
    """A table of lines of markdown, in a region that scrolls by itself and is reached by the keyboard."""
    body = [
        [f'<th scope="row">{words(first)}</th>', *(f"<td>{words(cell)}</td>" for cell in rest)] for first, *rest in rows
    ]
    return framed([f'<th scope="col">{words(head)}</th>' for head in heads], [(row, "") for row in body], label)


def framed(heads: Sequence[str], rows: Sequence[tuple[Sequence[str], str]], label: str, kind: str = "docutils") -> str:
    """A table of finished cells in such a region; beside the cells of a row stand its attributes."""
    body = "".join(f"<tr{attributes}>{''.join(cells)}</tr>" for cells, attributes in rows)
    return (f'<div class="scrolls" tabindex="0" role="region" aria-label="{escape(label)}"><table class="{kind}">'
            f"<thead><tr>{''.join(heads)}</tr></thead><tbody>{body}</tbody></table></div>")  # fmt: skip


def filters(lists: Mapping[str, Mapping[str, str]], told: str, search: bool = False) -> str:
    """Lists to choose from, and a field for words, with the number of what is left; the script shows them.

    `lists` has a name, which is that of a data attribute, and its values with the words that stand for them.
    """
    chosen = "".join(_choice(name, options) for name, options in lists.items())
    field = '<label>words <input type="search" name="words"></label>' if search else ""
    return f'<form class="filters" hidden>{chosen}{field}<output aria-live="polite">{escape(told)}</output></form>'


def _choice(name: str, options: Mapping[str, str]) -> str:
    listed = "".join(f'<option value="{escape(value)}">{escape(told)}</option>' for value, told in options.items())
    return f'<label>{name} <select name="{name}"><option value="">all</option>{listed}</select></label>'


def token(name: str) -> str:
    """A name as one word of an attribute: NOT TESTED is not-tested."""
    return "-".join(name.lower().split())


def tokens(names: Sequence[str]) -> str:
    """Names as words of an attribute."""
    return " ".join(map(token, names))


def data(**values: str) -> str:
    """Attributes data-name="value"."""
    return "".join(f' data-{name}="{escape(value)}"' for name, value in values.items())
