"""A notebook as a page: under its title stand downloads, parameters and provenance of its records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from compressible.companion.claims import wording
from compressible.companion.site.cards import Card
from compressible.companion.site.markup import table

FILES = {"PDF": ".pdf", "picture (PNG)": ".png", "record (JSON)": ".json", "arrays (npz)": ".npz"}
UP = "../../"


def with_about(notebook: Mapping[str, Any], text: str) -> dict[str, Any]:
    """The notebook with a markdown cell of that text after its first one."""
    cells = list(notebook["cells"])
    first = next(i for i, each in enumerate(cells) if each["cell_type"] == "markdown")
    cells.insert(first + 1, {"cell_type": "markdown", "id": "about", "metadata": {}, "source": text})
    return {**notebook, "cells": cells}


def about(id: str, root: Path, cards: Sequence[Card], carried: set[Path]) -> str:
    """Markdown with downloads, parameters and provenance; `carried` gets the files that it links."""
    kept = [card for card in cards if card.record]
    parts = ["## Downloads, parameters, provenance", _downloads(id, root, kept, carried)]
    parts.append(_folded("Parameters", _parameters(root / "notebooks" / f"{id}.ipynb", kept)))
    parts += [_folded("Provenance", _provenance(kept))] if kept else []
    return "\n\n".join([*parts, "## Notebook"])


def downloads(card: Card, root: Path) -> dict[str, str]:
    """Files of a card's record that are there, relative to the checkout, by what they are."""
    places = {name: card.file(suffix) for name, suffix in FILES.items()}
    return {name: place for name, place in places.items() if (root / place).is_file()}


def _downloads(id: str, root: Path, kept: Sequence[Card], carried: set[Path]) -> str:
    files = {"": {"notebook (ipynb)": f"notebooks/{id}.ipynb"}} | {c.preset: downloads(c, root) for c in kept}
    carried.update(Path(place) for places in files.values() for place in places.values())
    lines = []
    for preset, places in files.items():
        links = ", ".join(f'<a href="{UP}{place}" download>{name}</a>' for name, place in places.items())
        told = f"preset <code>{escape(preset)}</code>: " if preset else "as it is below, at the quick preset: "
        lines.append(f"<li>{told}{links}</li>")
    return f'<ul class="downloads">{"".join(lines)}</ul>'


def _folded(title: str, content: str) -> str:
    return f"<details><summary>{title}</summary>{content}</details>"


def _parameters(notebook: Path, kept: Sequence[Card]) -> str:
    import papermill

    heads = ["parameter", "quick", *(card.preset for card in kept), "what it is"]
    found = papermill.inspect_notebook(str(notebook))
    rows = [[f"`{name}`", entry["default"], *(_value(card, name) for card in kept), entry["help"]]
            for name, entry in found.items() if name != "preset"]  # fmt: skip
    return table(heads, rows, "Parameters")


def _value(card: Card, name: str) -> str:
    values = (card.record or {}).get("parameters", {})
    return repr(values[name]) if name in values else "-"


def _provenance(kept: Sequence[Card]) -> str:
    told = [_told(card.record or {}) for card in kept]
    rows = [[name, *(each[name] for each in told)] for name in told[0]]
    return table(["", *(card.preset for card in kept)], rows, "Provenance")


def _told(record: Mapping[str, Any]) -> dict[str, str]:
    """What is known of how a record was made, in words, each of them for every record."""
    versions = ", ".join(f"{name} {version}" for name, version in (record.get("versions") or {}).items())
    memory = record.get("peak_memory_bytes")
    return {
        "made": str(record.get("started") or record.get("created") or "not recorded"),
        "commit": wording.commit(dict(record))
        + (", with changes that were not committed" if record.get("dirty") else ""),
        "device": str(record.get("device") or "not recorded"),
        "processor": f"{record.get('cpu') or 'not recorded'}, {record.get('threads') or '?'} thread(s)",
        "seconds": f"{record.get('wall_seconds') or 0:.1f}",
        "peak memory": f"{memory / 1e6:.0f} MB" if memory else "not recorded",
        "versions": versions or "not recorded",
        "library, sha256": str(record.get("library") or "not recorded"),
        "notebook, sha256": str(record.get("notebook") or "not recorded"),
        "data, sha256": ", ".join(f"{name} {digest}" for name, digest in (record.get("data") or {}).items()) or "none",
    }
