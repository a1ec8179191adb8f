"""Links of the repository's pages as the site has them: to its own pages, to files beside them, or as plain text.

The site keeps the repository's folders, so that a relative link from page to page stays as it is. A file that is no
page is carried along, and linked by HTML, since Sphinx would copy it to a folder of its own. GALLERY.md is the front
page there, and CLAIMS.md a page that is made anew, whose anchors Sphinx does not know.
"""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Collection
from html import escape
from pathlib import Path

MADE = {"GALLERY.md": "index.html", "CLAIMS.md": "CLAIMS.html"}
# A link or picture comes first, as its text may hold code; what stands in code otherwise is none.
_FOUND = re.compile(
    r"(?P<picture>!?)\[(?P<text>(?:!\[[^\]]*\]\([^)]*\)|[^\[\]])*)\]\((?P<to>[^()\s]+)\)|```.*?```|`[^`\n]*`", re.DOTALL
)


def for_site(text: str, place: str, pages: Collection[str], root: Path, carried: set[Path]) -> str:
    """Markdown of the file `place`, relative to `root`, with its links as the site has them.

    Args:
        text: the markdown.
        place: where it stands, such as "docs/usage.md".
        pages: files that become pages, relative to `root`.
        root: the checkout.
        carried: gets each file that a link asks for.
    """

    def site_link(found: re.Match[str]) -> str:
        if found["to"] is None:
            return found[0]
        inner = _FOUND.sub(site_link, found["text"]) if "](" in found["text"] else found["text"]
        return _link(found, inner, place, pages, root, carried)

    return _FOUND.sub(site_link, text)


def _link(found: re.Match[str], inner: str, place: str, pages: Collection[str], root: Path, carried: set[Path]) -> str:
    to, _, anchor = found["to"].partition("#")
    if not to or re.match(r"[a-z]+:", to):
        return f"{found['picture']}[{inner}]({found['to']})"
    target = posixpath.normpath(posixpath.join(posixpath.dirname(place), to))
    if made := MADE.get(target):
        return f'<a href="{escape(_relative(made, place))}{"#" if anchor else ""}{escape(anchor)}">{inner}</a>'
    if target in pages:
        return _to_page(found, inner, target, place)
    if not (root / target).is_file():
        return inner  # a folder, or what is not there: the words stay
    carried.add(Path(target))
    address = escape(_relative(target, place))
    return f'<img src="{address}" alt="{escape(inner)}">' if found["picture"] else f'<a href="{address}">{inner}</a>'


def _to_page(found: re.Match[str], inner: str, target: str, place: str) -> str:
    if inner.startswith("<img"):
        page = posixpath.splitext(_relative(target, place))[0]
        return f'<a href="{escape(page)}.html">{inner}</a>'
    return f"[{inner}]({found['to']})"


def _relative(target: str, place: str) -> str:
    return Path(os.path.relpath(target, posixpath.dirname(place) or ".")).as_posix()
