"""Writes the site: a tree of sources as the repository has its folders, then HTML by Sphinx. Nothing is executed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from compressible import __version__
from compressible.companion import notebooks
from compressible.companion.claims import Standing, status
from compressible.companion.site import api, claims_page, gallery, mathjax, notebook_page
from compressible.companion.site.cards import PAPERS, Card, read
from compressible.companion.site.links import for_site
from compressible.runtime import paths

MARK = ".compressible-site"
SETTINGS = "site.json"  # what the build tells conf.py
TEXTS = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")


class SiteError(RuntimeError):
    """A site that Sphinx could not build, or a checkout that has nothing to build one from."""


def build(out: Path | None = None) -> Path:
    """Build the site of this checkout below `out`, build/site by default; returns its front page.

    The pages are made of the committed records, claims and executed notebooks and of docstrings; no notebook runs.

    Raises:
        SiteError: Sphinx is not installed, or refuses the sources; or `out` has folders that are no site's.
    """
    try:
        from sphinx.cmd.build import build_main
    except ImportError as error:
        raise SiteError(
            f'{error}; `python -m pip install -c constraints.txt -e ".[site]"` brings what it needs'
        ) from error
    root = paths.repository()
    out = root / "build" / "site" if out is None else out
    sources, html = out / "sources", out / "html"
    _claim(out, (sources, html))
    for folder in (sources, html):
        shutil.rmtree(folder, ignore_errors=True)
    write_sources(root, sources)
    if ended := build_main(["-q", "-j", "auto", "-b", "html", "-d", str(out / "doctrees"), str(sources), str(html)]):
        raise SiteError(f"sphinx ended with status {ended}")
    return html / "index.html"


def _claim(out: Path, folders: Sequence[Path]) -> None:
    """Mark a folder as a site's, whose folders a build removes; SiteError where they are somebody else's."""
    mark = out / MARK
    own = out == paths.repository() / "build" / "site" or mark.is_file()
    others = [folder for folder in folders if not own and folder.exists()]
    if others:
        raise SiteError(
            f"{others[0]} is there already and no site of ours: it would be removed, so name another folder"
        )
    paths.write_atomic(mark, "")


def write_sources(root: Path, sources: Path) -> None:
    """Write all that Sphinx reads: conf.py and its files, pages, notebooks, and under extra/ what is linked."""
    shutil.copytree(root / "docs" / "site", sources)
    lacking = mathjax.fetch(sources / "static" / "mathjax" / "tex-svg.js")
    paths.write_atomic(sources / SETTINGS, json.dumps({"version": __version__, "no_mathjax": lacking}))
    carried: set[Path] = set()
    cards, standing = read(root)
    for place, text in (_texts(root, cards, standing, carried) | _notebooks(root, cards, carried)).items():
        paths.write_atomic(sources / place, text)
    for card in (card for card in cards if card.quick):
        paths.write_atomic(sources / "extra" / gallery.quick_place(card), card.quick)
    for file in carried:
        (sources / "extra" / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(root / file, sources / "extra" / file)


def page_files(root: Path) -> list[str]:
    """Files of the checkout that become pages, relative to it."""
    found = [*root.glob("docs/*.md"), *root.glob("notebooks/*/*.md")]
    texts = [name for name in TEXTS if (root / name).is_file()]
    return [*texts, *(file.relative_to(root).as_posix() for file in sorted(found)), *map(_file, notebooks.ids())]


def _texts(root: Path, cards: Sequence[Card], standing: Sequence[Standing], carried: set[Path]) -> dict[str, str]:
    known = page_files(root)
    written = {place: (root / place).read_text(encoding="utf-8") for place in known if place.endswith(".md")}
    written["CLAIMS.md"] = claims_page.page(standing, status.load_items())
    written["index.md"] = gallery.page(cards, root, carried) + "\n\n" + _contents(written)
    return {place: for_site(text, place, known, root, carried) for place, text in written.items()} | api.pages()


def _notebooks(root: Path, cards: Sequence[Card], carried: set[Path]) -> dict[str, str]:
    known = page_files(root)
    return {_file(id): _notebook(id, root, [card for card in cards if card.id == id], known, carried)
            for id in notebooks.ids()}  # fmt: skip


def _notebook(id: str, root: Path, cards: Sequence[Card], known: Sequence[str], carried: set[Path]) -> str:
    content = json.loads((root / _file(id)).read_text(encoding="utf-8"))
    content["cells"] = [_linked(cell, _file(id), known, root, carried) for cell in content["cells"]]
    return json.dumps(notebook_page.with_about(content, notebook_page.about(id, root, cards, carried)))


def _linked(cell: Mapping, place: str, known: Sequence[str], root: Path, carried: set[Path]) -> dict:
    if cell["cell_type"] != "markdown":
        return dict(cell)
    return {**cell, "source": for_site("".join(cell["source"]), place, known, root, carried)}


def _contents(written: Mapping[str, str]) -> str:
    """The tables of contents, which stand at the side of every page."""
    docs = [place for place in written if place.startswith("docs/")]
    start = ["Gallery <self>", "Read me <README>", "Claims <CLAIMS>", *docs]
    parts = [_toctree("", start)]
    for paper, title in PAPERS.items():
        names = [id for id in notebooks.ids() if id.startswith(f"{paper}/")]
        beside = [place for place in written if place.startswith(f"notebooks/{paper}/")]
        parts.append(_toctree(title, [*(f"{_short(id)} <notebooks/{id}>" for id in names), *beside]))
    return "\n\n".join([*parts, _toctree("Library", ["api/index", "CONTRIBUTING", "CHANGELOG"])])


def _toctree(caption: str, entries: Sequence[str]) -> str:
    lines = [":hidden:", *([f":caption: {caption}"] if caption else []), "", *(e.removesuffix(".md") for e in entries)]
    return "\n".join(["```{toctree}", *lines, "```"])


def _short(id: str) -> str:
    """kwon2024/05_completion is 05 completion beside its paper."""
    return id.partition("/")[2].replace("_", " ")


def _file(id: str) -> str:
    return f"notebooks/{id}.ipynb"
