"""Each figure, table and theorem of the papers: which claims bear on it, and whether it was reproduced.

The items are in data/status.toml, their status follows from the verdicts.
"""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass

from compressible.companion.claims import wording
from compressible.companion.claims.rules import INCONCLUSIVE, PASS, WEAK
from compressible.companion.claims.standing import Standing
from compressible.companion.claims.statement import NOT_TESTED, ClaimError
from compressible.runtime import checks, paths

START, END = "<!-- status:start -->", "<!-- status:end -->"
REPRODUCED, PARTLY, NOT, NOT_KNOWN = "reproduced", "partly", "not reproduced", "not known"
UNTESTED, NOT_RUN = "not tested", "not run"
UNKNOWN = "contents unknown"
Text = Annotated[str, Field(min_length=1)]


@dataclass(frozen=True, config=ConfigDict(strict=True, extra="forbid"))
class Item:
    """A figure, table or theorem of a paper; the keys are explained in data/status.toml."""

    paper: Literal["P1", "P2", "P3"]
    name: Text
    shows: str = ""
    notebooks: list[Text] = field(default_factory=list)
    claims: list[Text] = field(default_factory=list)
    moved_to: str = ""
    unknown: bool = False
    note: str = ""

    def covers(self, id: str) -> bool:
        """Whether a claim of this id bears on the item."""
        return any(fnmatchcase(id, pattern) for pattern in self.claims)

    def of(self, standing: Sequence[Standing], group: str) -> list[Standing]:
        """The claims of a group that bear on the item."""
        return [each for each in standing if each.claim.group == group and self.covers(each.claim.id)]


def load_items(path: str | Path | None = None) -> list[Item]:
    """The items of a file, by default the repository's data/status.toml; ClaimError lists every mistake."""
    path = paths.repository() / "data" / "status.toml" if path is None else Path(path)
    items, problems = [], []
    for entry in _read(path).get("item", []):
        try:
            items.append(Item(**entry))
        except ValidationError as error:
            problems += [f"{entry.get('name', 'an item without name')}: {checks.mistake(e)}" for e in error.errors()]
    if problems:
        raise ClaimError("\n  ".join([f"{path.name}:", *problems]))
    return items


def questions(path: str | Path | None = None) -> dict[str, str]:
    """The question that each figure answers, by its id."""
    path = paths.repository() / "data" / "status.toml" if path is None else Path(path)
    return _read(path).get("questions", {})


def status(item: Item, standing: Sequence[Standing]) -> str:
    """In a few words whether an item was reproduced, with how many of its claims have PASS.

    Claims on the published setting decide; where none was judged, those that were transferred do, and the words say
    to what. "reproduced" needs PASS of all, "partly" of one, or one WEAK; "not known" says that all that were judged
    are INCONCLUSIVE, "not tested" that a notebook is there and no run of it suffices.
    """
    if item.unknown:
        return UNKNOWN
    groups = [item.of(standing, group) for group in ("published", "transferred")]
    own, moved = ([] if all(each.verdict == NOT_TESTED for each in found) else found for found in groups)
    if not own and not moved:
        return UNTESTED if item.notebooks else NOT_RUN
    words = _words(own) if own else f"{_words(moved)}, transferred to {item.moved_to or 'another setting'}"
    return f"{words}; {item.note}" if item.note else words


def status_table(items: Sequence[Item], standing: Sequence[Standing]) -> str:
    """The table of all items in markdown, one block a paper."""
    rows = []
    for item in items:
        name = f"{item.paper} {item.name}" + (f": {item.shows}" if item.shows else "")
        links = ", ".join(f"[{_short(id)}](notebooks/{id}.ipynb)" for id in item.notebooks)
        rows.append([wording.cell(name), links, status(item, standing)])
    return wording.table(["of the papers", "notebook", "status"], rows)


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except tomllib.TOMLDecodeError as error:
        raise ClaimError(f"{path.name}: {error}") from error


def _words(standing: Sequence[Standing]) -> str:
    verdicts = [each.verdict for each in standing]
    passed, untested = verdicts.count(PASS), verdicts.count(NOT_TESTED)
    if passed == len(verdicts):
        word = REPRODUCED
    elif passed or WEAK in verdicts:
        word = PARTLY
    else:
        word = NOT_KNOWN if set(verdicts) <= {INCONCLUSIVE, NOT_TESTED} else NOT
    return f"{word}, {passed} of {len(verdicts)}" + (f", {untested} not tested" if untested else "")


def _short(id: str) -> str:
    """kwon2024/05_completion is kwon2024/05 beside other words."""
    paper, name = id.split("/")
    return f"{paper}/{name.split('_')[0]}"
