"""A large sweep as small files: one cell is some seeds of a method, at one rate, on one task and size.

A sweep of hours goes in parts, over several calls and machines. Its cells lie in one folder a setting of the whole
(model, steps, batch and so on), named by the digest of that setting, which `setting.json` spells out: a cell of another
setting is never met. A cell is one JSON file, written whole or not at all, so that a killed part loses no other, and
folders of two machines merge by copying what is lacking. Each says of which commit and library it is.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from compressible.companion.library import REACHED
from compressible.companion.provenance import LIBRARY, git_state
from compressible.runtime.checks import expect, one_line
from compressible.runtime.paths import cache_dir, write_atomic

STAGES = ("choose", "judge")
PLACE = re.compile(r"[0-9a-f]{12}/[\w.+-]+\.json")  # of a cell below a root


@dataclass(frozen=True, order=True)
class Cell:
    """Some seeds of a method on a task: those of its stage, "choose" for tuning, "judge" for fresh ones.

    size: training examples; rank: r; rate: of the inner factors, or of A.
    """

    task: str
    size: int
    rank: int
    method: str
    stage: str
    rate: float

    @property
    def file(self) -> str:
        """The name of its file."""
        return f"{self.task}.n{self.size}.r{self.rank}.{self.method}.{self.stage}.{self.rate:.6g}.json"


@dataclass(frozen=True)
class Scored:
    """What a cell found, a value a seed: NaN where the run diverged.

    scores: the task's metric after the last step; losses: mean training loss of the last tenth of the steps; norms:
    Frobenius norm of all updates together after the last step; seconds: of the device, for all of them.
    """

    seeds: list[int]
    scores: list[float]
    losses: list[float]
    norms: list[float]
    seconds: float
    device: str = ""
    made: dict[str, Any] = field(default_factory=dict)


class Cells:
    """The cells of one setting in their folder, `root`/<digest of the setting>; root by default in the cache."""

    def __init__(self, setting: Mapping[str, Any], root: str | Path | None = None) -> None:
        self.setting = json.loads(json.dumps(dict(setting), sort_keys=True))
        digest = hashlib.sha256(json.dumps(self.setting, sort_keys=True).encode()).hexdigest()[:12]
        self.folder = (cache_dir() / "cells" if root is None else Path(root)) / digest
        self.known: dict[Cell, Scored] = {}

    def get(self, cell: Cell) -> Scored | None:
        """Return what a cell found, None where it has not run; a damaged file counts as none, with a warning."""
        if cell not in self.known:
            file = self.folder / cell.file
            if not file.is_file():
                return None
            try:
                self.known[cell] = _read(file, cell)
            except (OSError, ValueError, KeyError, TypeError) as error:
                warnings.warn(f"{file.name} is no cell ({error}) and is computed again", RuntimeWarning, stacklevel=2)
                return None
        return self.known[cell]

    def put(self, cell: Cell, found: Scored) -> None:
        """Write a cell, with the commit and the library that made it; where that fails, it is known to this process."""
        made = git_state() | _sources() | found.made
        whole = {"cell": asdict(cell), **asdict(found), "made": made}
        self.known[cell] = Scored(**{**asdict(found), "made": made})
        try:
            described = self.folder / "setting.json"
            if not described.is_file():
                write_atomic(described, json.dumps(self.setting, indent=1, sort_keys=True) + "\n")
            write_atomic(self.folder / cell.file, json.dumps(_strict(whole), indent=1) + "\n")
        except OSError as error:
            told = f"{cell.file} could not be kept in {self.folder} ({error}): the next run computes it again"
            warnings.warn(told, RuntimeWarning, stacklevel=2)

    def missing(self, cells: Sequence[Cell]) -> list[Cell]:
        """Return those that have not run, in their order."""
        return [cell for cell in cells if self.get(cell) is None]

    def made_by(self, cells: Sequence[Cell]) -> dict[str, Any]:
        """Return the commits of cells, whether all were committed, and how many another library made than this one.

        Of the library counts what the sweep can reach by imports, where whoever started it told that (`REACHED`).
        """
        made = [found.made for cell in cells if (found := self.get(cell)) is not None]
        return {
            "commits": sorted({str(each.get("commit")) for each in made}),
            "uncommitted cells": sum(each.get("dirty") is not False for each in made),
            "cells of another library": sum(_is_foreign(each) for each in made),
        }


def merge(source: str | Path, target: str | Path) -> int:
    """Copy the cells that the root `target` lacks from `source`, such a folder of several settings or a file of `pack`.

    Returns how many. Raises ValueError where the file is none of `pack`.
    """
    copied = 0
    for inside, content in _files_of(Path(source)):
        place = Path(target) / inside
        if not place.exists():
            write_atomic(place, content)
            copied += place.name != "setting.json"
    return copied


def pack(source: str | Path, file: str | Path) -> int:
    """Write all cells and settings below `source` to one file, a line each, in order; return how many cells there are.

    So a sweep that goes on elsewhere, or another day, travels as one file, whose lines can be compared.
    """
    files = _files_of(Path(source))
    lines = [json.dumps({"file": inside, "content": json.loads(content)}) for inside, content in files]
    write_atomic(file, "".join(f"{line}\n" for line in lines))
    return sum(not inside.endswith("/setting.json") for inside, _ in files)


def _files_of(source: Path) -> list[tuple[str, str]]:
    """Places, below a root, and contents of cells and settings, those of a folder or of a file of `pack`."""
    if source.is_dir():
        files = sorted(source.glob("*/[!.]*.json"))  # none that is half written
        return [(f"{file.parent.name}/{file.name}", file.read_text("utf-8")) for file in files]
    found = []
    for number, line in enumerate(source.read_text("utf-8").splitlines(), 1):
        try:
            held = json.loads(line)
            inside, content = held["file"], held["content"]
            expect("file", inside, bool(PLACE.fullmatch(inside)), "DIGEST/NAME.json")
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{source}, line {number}, holds no cell ({one_line(error)})") from error
        found.append((inside, json.dumps(content, indent=1) + "\n"))
    return found


def _sources() -> dict[str, Any]:
    """The digests of the library, and of what of it a notebook reaches, if that was told."""
    return {"library": LIBRARY, "reached": os.environ.get(REACHED) or None}


def _is_foreign(made: Mapping[str, Any]) -> bool:
    """Whether other sources made a cell than would make it now."""
    own = _sources()
    return made.get("library") != LIBRARY and (not own["reached"] or made.get("reached") != own["reached"])


def _read(file: Path, cell: Cell) -> Scored:
    content = json.loads(file.read_text(encoding="utf-8"))
    if Cell(**content.pop("cell")) != cell:
        raise ValueError("it holds another one")
    lists = {name: [math.nan if v is None else v for v in content[name]] for name in ("scores", "losses", "norms")}
    found = Scored(**{**content, **lists})
    if not len(found.seeds) == len(found.scores) == len(found.losses) == len(found.norms) > 0:
        raise ValueError("its lists differ in length")
    return found


def _strict(value: Any) -> Any:
    """The same for strict JSON: what is not finite becomes null."""
    if isinstance(value, dict):
        return {name: _strict(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_strict(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
