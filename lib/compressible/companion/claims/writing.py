"""Puts what the records show where readers look: CLAIMS.md, GALLERY.md, the README's table and each notebook.

In the README and in a notebook's first cell it stands between two marks, and nothing else of the file changes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

from compressible.companion import notebooks
from compressible.companion.claims import pages, status, wording
from compressible.companion.claims.standing import OWN, Record, Standing, read_records, standings
from compressible.companion.library import notebook_sources
from compressible.runtime import paths

START, END = "<!-- record:start -->", "<!-- record:end -->"
# What stood in the place of the marks: a sentence that ends with a colon, and the picture.
_BEFORE = re.compile(r"\n*The committed figure [^\n]*:\n\n!\[[^\]]*\]\([^)]*\)\s*$")


def written(root: Path | None = None) -> dict[Path, str]:
    """Each file that the verdicts of the committed records are written to, with the text that it should have.

    Raises:
        ValueError: The README lacks a mark, or a notebook is not JSON as Jupyter writes it.
    """
    root = paths.repository() if root is None else root
    records, standing, items = read_records(root / "figures"), standings(root / "figures", OWN), status.load_items()
    mine = [id for id in notebooks.ids() if notebooks.presets(id)]  # not one that somebody tries something out in
    titles = {id: title(root / "notebooks" / f"{id}.ipynb") for id in mine}
    texts = {root / "CLAIMS.md": pages.claims_page(standing, items)}
    texts[root / "GALLERY.md"] = pages.gallery_page(standing, records, titles, status.questions())
    counts = pages.counts_table(standing, linked=False)
    texts[root / "README.md"] = between(root / "README.md", f"{counts}\n\n{status.status_table(items, standing)}")
    for id in titles:
        path = root / "notebooks" / f"{id}.ipynb"
        texts[path] = with_region(path, region(id, standing, records))
    return texts


def write(root: Path | None = None) -> list[Path]:
    """Write each of these files that is not as it should be, atomically; returns which."""
    changed = [
        (path, text) for path, text in written(root).items() if not path.exists() or path.read_text("utf-8") != text
    ]
    return [paths.write_atomic(path, text) for path, text in changed]


def between(path: Path, text: str, start: str = status.START, end: str = status.END) -> str:
    """A file's text with `text` between two marks; ValueError if a mark is missing."""
    before, found, rest = path.read_text(encoding="utf-8").partition(start)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"{path.name}: expected the marks {start} and {end}, in this order")
    return f"{before}{start}\n{text.strip()}\n{end}{after}"


def region(id: str, standing: Sequence[Standing], records: Sequence[Record]) -> str:
    """What a notebook shows of its records: picture and verdicts of each; a line where there is none."""
    shown = pages.own_records(id, standing, records)
    if not shown:
        return f"**At full scale** this figure has not been run; `make figure ID={id} PRESET=paper` does."
    mine = [each for each in standing if each.claim.figure == id]
    parts = [_shown(id, record, pages.judged_on(record, mine)) for record in shown]
    lost = [each for each in mine if each.record is None]
    if lost:
        parts.append(f"Not tested: {', '.join(_linked(each) for each in lost)}.")
    return "\n\n".join([*parts, "The cells below run the quick preset, which is smaller."])


def with_region(path: Path, text: str) -> str:
    """A notebook's text with a region in its first markdown cell, which is added at the end where it is missing."""
    raw = path.read_text(encoding="utf-8")
    notebook = json.loads(raw)
    if _dumped(notebook) != raw:
        raise ValueError(f"{path.name}: expected JSON as Jupyter writes it, with an indent of 1")
    cell = next(cell for cell in notebook["cells"] if cell["cell_type"] == "markdown")
    source = "".join(cell["source"])
    before, found, rest = source.partition(START)
    before, after = (before, rest.partition(END)[2]) if found else (_BEFORE.sub("", source).rstrip() + "\n\n", "")
    cell["source"] = f"{before}{START}\n{text.strip()}\n{END}{after}".splitlines(keepends=True)
    return _dumped(notebook)


def _shown(id: str, record: Record, standing: Sequence[Standing]) -> str:
    stem = f"../../figures/{record['preset']}/{id}"
    head = f"**The record at full scale**, preset `{record['preset']}`: {pages.counts_in_words(standing)}"
    head += f" ({pages.made_on(record)}; [record]({stem}.json), [PDF]({stem}.pdf))."
    rows = [[*map(wording.cell, _cells(each)), f"**{each.verdict}**"] for each in standing]
    verdicts = wording.table(["statement", "published", "ours", "verdict"], rows)
    return "\n\n".join([head, f"![The figure at full scale]({stem}.png)", verdicts])


def _cells(each: Standing) -> list[str]:
    mark = " †" if each.claim.after_looking else ""
    sample = wording.sample(each)
    ours = f"{wording.ours(each)}{f', {sample}' if sample and not sample.startswith('1 ') else ''}"
    return [each.claim.statement + mark, wording.published(each.claim), ours]


def _linked(each: Standing) -> str:
    return f"[{each.claim.id.split('.', 1)[1]}](../../CLAIMS.md#{each.claim.id})"


def title(path: Path) -> str:
    """The title of a notebook, which is what its figure shows, without a full stop; its name where it has no text."""
    texts = notebook_sources(path, "markdown")
    return texts[0].partition("\n")[0].lstrip("# ").rstrip(" .") if texts else path.stem


def _dumped(notebook: object) -> str:
    return json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"
