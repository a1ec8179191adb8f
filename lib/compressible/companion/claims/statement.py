"""What is claimed: the entries of data/claims.toml, read and checked. How they are judged is in claims.py."""

from __future__ import annotations

import hashlib
import json
import math
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compressible.runtime import paths

PAPERS = ("P1", "P2", "P3", "beyond")
NOT_TESTED = "NOT TESTED"
SCALES = ("linear", "abs", "log")
_BOUNDS = {"at_most": 1, "at_least": 1, "between": 2, "greater_than_zero": 0, "true": 0}


class ClaimError(ValueError):
    """The claims file, or a metric that a claim names, cannot be understood."""


@dataclass(frozen=True)
class Claim:
    """One statement with the way it is judged; the keys are explained in data/claims.toml."""

    id: str
    paper: str
    statement: str
    metric: str
    judge: str
    source: str
    published: str = ""
    bound: Any = None
    weak: Any = None
    scale: str = "linear"
    every: bool = False
    seeds: int = 1
    preset: str = "paper"
    requires: dict[str, Any] = field(default_factory=dict)

    @property
    def figure(self) -> str:
        """Id of the figure that the claim belongs to."""
        return self.id.split(".", 1)[0]

    def bound_text(self) -> str:
        """The bound in signs, with the weak one beside it."""
        if self.judge in ("true", "greater_than_zero"):
            return "true" if self.judge == "true" else "> 0"
        weak = "" if self.weak is None else f" (weak: {_in_signs(*self.ends(self.weak))})"
        return _in_signs(*self.ends(self.bound)) + weak

    def rule(self) -> str:
        """Digest of everything that a verdict depends on, so that an outdated verdict can be told."""
        spoken = ("id", "paper", "statement", "source", "published", "preset")
        parts = {name: value for name, value in vars(self).items() if name not in spoken}
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]

    def ends(self, bound: Any) -> tuple[float, float]:
        """Ends of the interval that `bound`, or `weak` in its place, stands for."""
        if self.judge == "between":
            return bound[0], bound[1]
        return (-math.inf, bound) if self.judge == "at_most" else (bound, math.inf)


def load_claims(path: str | Path | None = None) -> list[Claim]:
    """The claims of a file, by default the repository's data/claims.toml; ClaimError lists every mistake."""
    path = paths.repository() / "data" / "claims.toml" if path is None else Path(path)
    try:
        entries = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ClaimError(f"{path.name}: {error}") from error
    problems = [f"unknown table {name!r}, expected 'claim'" for name in entries if name != "claim"]
    claims: list[Claim] = []
    for entry in entries.get("claim", []):
        found = _mistakes(entry, {claim.id for claim in claims})
        problems += [f"{entry.get('id', 'a claim without id')}: {mistake}" for mistake in found]
        if not found:
            claims.append(Claim(**entry))
    if problems:
        raise ClaimError("\n  ".join([f"{path.name}:", *problems]))
    return claims


def published(figure_id: str, path: str | Path | None = None) -> dict[str, Any]:
    """Numbers that the papers or their authors' runs report for a figure, to draw beside ours; never judged on.

    They are in data/published.toml, each table with its `source`. Raises ClaimError for a figure without any.
    """
    path = paths.repository() / "data" / "published.toml" if path is None else Path(path)
    tables = tomllib.loads(path.read_text(encoding="utf-8"))
    if figure_id not in tables:
        raise ClaimError(f"{path.name}: got {figure_id!r}, expected one of {', '.join(tables)}")
    if not tables[figure_id].get("source"):
        raise ClaimError(f"{path.name}: {figure_id} has no source, expected where its numbers come from")
    return tables[figure_id]


def _in_signs(low: float, high: float) -> str:
    if math.isinf(low):
        return f"<= {high:g}"
    if math.isinf(high):
        return f">= {low:g}"
    return f"in [{low:g}, {high:g}]"


def _mistakes(entry: Mapping[str, Any], ids: set[str]) -> list[str]:
    """What is wrong with an entry of the file."""
    needed = ("id", "paper", "statement", "metric", "judge", "source")
    texts = {name for name, value in entry.items() if isinstance(value, str) and value}
    missing = [f"missing {name!r}" for name in needed if name not in texts]
    unknown = [f"unknown key {key!r}" for key in entry if key not in Claim.__dataclass_fields__]
    if missing or unknown:
        return missing + unknown
    checks = {
        "this id is there twice": entry["id"] in ids,
        "id: expected a figure id, a dot and a name": not _is_claim_id(entry["id"]),
        f"paper: got {entry['paper']!r}, expected one of {PAPERS}": entry["paper"] not in PAPERS,
        f"judge: got {entry['judge']!r}, expected one of {tuple(_BOUNDS)}": entry["judge"] not in _BOUNDS,
        f"scale: expected one of {SCALES}": entry.get("scale", "linear") not in SCALES,
        "published: expected text": not isinstance(entry.get("published", ""), str),
        f"preset: got {entry.get('preset')!r}, expected a preset's name": not _is_label(entry.get("preset", "paper")),
        "seeds: expected a count": type(entry.get("seeds", 1)) is not int or entry.get("seeds", 1) < 1,
        "every: expected true or false": type(entry.get("every", False)) is not bool,
        "requires: expected a table": not isinstance(entry.get("requires", {}), dict),
    }
    return [text for text, wrong in checks.items() if wrong] or _need_mistakes(entry) or _bound_mistakes(entry)


def _need_mistakes(entry: Mapping[str, Any]) -> list[str]:
    words = "an integer (least value or length), text, true, a list (both exact), { exactly } or { at_least, at_most }"
    needs = entry.get("requires", {}).items()
    return [f"requires: {name} is {need!r}, expected {words}" for name, need in needs if not _is_need(need)]


def _is_need(need: Any) -> bool:
    if isinstance(need, dict):
        limits = set(need) <= {"at_least", "at_most"} or set(need) == {"exactly"}
        return bool(need) and limits and all(type(value) in (int, float) for value in need.values())
    return type(need) in (int, str, bool, list)


def _bound_mistakes(entry: Mapping[str, Any]) -> list[str]:
    count = _BOUNDS[entry["judge"]]
    for name in ("bound", "weak"):
        value = entry.get(name)
        if (value is None) != (count == 0) and not (name == "weak" and value is None):
            return [f"{name}: got {value!r}, expected {count or 'no'} number(s) for {entry['judge']}"]
        if value is not None and not _is_bound(value, count):
            return [f"{name}: got {value!r}, expected {count} number(s), the lower first"]
    claim = Claim(**entry)
    if claim.scale == "log" and (count == 0 or min(_numbers(claim.bound) + _numbers(claim.weak)) <= 0):
        return ["scale: log needs bounds above zero"]
    if claim.weak is None:
        return []
    (low, high), (weak_low, weak_high) = claim.ends(claim.bound), claim.ends(claim.weak)
    looser = weak_low <= low and high <= weak_high
    return [] if looser else [f"weak: got {claim.weak!r}, expected a bound looser than {claim.bound!r}"]


def _numbers(bound: Any) -> list[float]:
    return bound if isinstance(bound, list) else [] if bound is None else [bound]


def _is_bound(value: Any, count: int) -> bool:
    ends = _numbers(value)
    numbers = all(type(end) in (int, float) and math.isfinite(end) for end in ends)
    return numbers and isinstance(value, list) == (count == 2) and len(ends) == count and ends == sorted(ends)


def _is_label(text: Any) -> bool:
    return isinstance(text, str) and re.fullmatch(r"[a-z][a-z0-9_-]*", text) is not None


def _is_claim_id(text: str) -> bool:
    figure, dot, name = text.partition(".")
    return bool(dot and name and figure.count("/") == 1 and all(figure.split("/")))
