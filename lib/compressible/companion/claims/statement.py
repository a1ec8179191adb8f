"""What is claimed: the entries of data/claims.toml, read and checked. How they are judged is in rules.py."""

from __future__ import annotations

import hashlib
import json
import math
import tomllib
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, ConfigDict, Field, PositiveInt, ValidationError, model_validator
from pydantic.dataclasses import dataclass

from compressible.runtime import checks, paths

NOT_TESTED = "NOT TESTED"
RULES = 2  # counts up when a rule of rules.py changes, so that verdicts by older rules can be told
Paper = Literal["P1", "P2", "P3", "beyond"]
PAPERS: tuple[str, ...] = get_args(Paper)
Text = Annotated[str, Field(min_length=1)]
Unit = Literal["seed", "start", "fold", "split", "timing", "run"]
OVERLAPPING = ("fold", "split")
Group = Literal["published", "transferred", "own", "goal"]
_BOUNDS = {"at_most": 1, "at_least": 1, "between": 2, "greater_than_zero": 0, "true": 0, "share": 1}
_SPOKEN = ("id", "paper", "statement", "source", "published", "preset", "unit", "group", "bound_from", "after_looking")


class ClaimError(ValueError):
    """The claims file, or a metric that a claim names, cannot be understood."""


def _needs(requires: dict[str, Any]) -> dict[str, Any]:
    words = "an integer (least value or length), text, true, a list (both exact), { exactly } or { at_least, at_most }"
    for name, need in requires.items():
        if isinstance(need, dict):
            known = set(need) <= {"at_least", "at_most"} or set(need) == {"exactly"}
            understood = bool(need) and known and all(type(value) in (int, float) for value in need.values())
        else:
            understood = type(need) in (int, str, bool, list)
        if not understood:
            raise ValueError(f"{name} is {need!r}, expected {words}")
    return requires


@dataclass(frozen=True, config=ConfigDict(strict=True, extra="forbid"))
class Claim:
    """One statement with the way it is judged; the keys are explained in data/claims.toml."""

    id: Annotated[str, Field(pattern=r"^[^/.]+/[^/.]+\..+$")]  # the figure's id, a dot and a name
    paper: Paper
    statement: Text
    metric: Text
    judge: Literal["at_most", "at_least", "between", "greater_than_zero", "true", "share"]
    source: Text
    unit: Unit
    group: Group
    bound_from: Text
    published: str = ""
    published_range: list[int | float] | None = None
    bound: Any = None
    weak: Any = None
    scale: Literal["linear", "abs", "log", "correlation"] = "linear"
    every: bool = False
    censored: bool = False
    seeds: PositiveInt = 1
    test_over_train: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    question: Annotated[str, Field(pattern=r"^([a-z0-9]+(-[a-z0-9]+)*)?$")] = ""
    after_looking: bool = False
    preset: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_-]*$")] = "paper"
    requires: Annotated[dict[str, Any], AfterValidator(_needs)] = field(default_factory=dict)

    @model_validator(mode="after")
    def _bounds_fit_the_judge(self) -> Claim:
        count = _BOUNDS[self.judge]
        for name, bound in (("bound", self.bound), ("weak", self.weak)):
            absent = count == 0 or name == "weak"
            if not (_is_bound(bound, count) if count and bound is not None else bound is None and absent):
                raise ValueError(f"{name}: got {bound!r}, expected {count or 'no'} number(s), the lower first")
        low, high, words = _RANGES[self.judge if self.judge == "share" else self.scale]
        outside = [end for end in _numbers(self.bound) + _numbers(self.weak) if not low <= end <= high]
        if outside or (self.scale in ("abs", "log") and count == 0):
            raise ValueError(f"{self.judge} under scale {self.scale}: got {outside or 'no bound'}, expected {words}")
        if self.weak is not None:
            (low, high), (weak_low, weak_high) = self.ends(self.bound), self.ends(self.weak)
            if not (weak_low <= low and high <= weak_high):
                raise ValueError(f"weak: got {self.weak!r}, expected a bound looser than {self.bound!r}")
        return self

    @model_validator(mode="after")
    def _values_fit_the_statistic(self) -> Claim:
        overlap, asked = self.unit in OVERLAPPING, self.test_over_train is not None
        if overlap != asked:
            expected = "rows judged over rows trained on" if overlap else f"none, as a {self.unit} shares no rows"
            raise ValueError(f"test_over_train: got {self.test_over_train!r}, expected {expected}")
        truth = self.judge in ("true", "share")
        if truth and (self.scale != "linear" or self.every):
            raise ValueError(f"judge: {self.judge} is of truth values, expected no scale and no 'every'")
        if overlap and (self.judge == "share" or self.censored):
            raise ValueError(
                f"unit: got {self.unit!r}, expected values that share no rows, whose ranks and shares count"
            )
        if self.censored and (truth or self.every or self.scale in ("abs", "correlation")):
            raise ValueError("censored: got true, expected it for counts and ratios alone, not with 'every'")
        return self

    @model_validator(mode="after")
    def _published_range_is_one(self) -> Claim:
        ends = self.published_range
        if ends is not None and not (len(ends) == 2 and ends[0] <= ends[1]):
            raise ValueError(f"published_range: got {ends}, expected two numbers, the lower first")
        if ends is not None and self.group not in ("published", "transferred"):
            raise ValueError(f"published_range: got {ends} with group {self.group!r}, which is not held against any")
        return self

    @property
    def figure(self) -> str:
        """Id of the figure that the claim belongs to."""
        return self.id.split(".", 1)[0]

    def bound_text(self) -> str:
        """The bound in signs, with the weak one beside it."""
        if self.judge in ("true", "greater_than_zero"):
            return "true" if self.judge == "true" else "> 0"
        if self.judge == "share":
            return f"true for a share >= {self.bound:g}"
        weak = "" if self.weak is None else f" (weak: {_in_signs(*self.ends(self.weak))})"
        return _in_signs(*self.ends(self.bound)) + weak

    def rule(self) -> str:
        """Digest of everything that a verdict depends on, so that an outdated verdict can be told."""
        parts = {name: value for name, value in vars(self).items() if name not in _SPOKEN} | {"rules": RULES}
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]

    @property
    def goal(self) -> tuple[float, float]:
        """Ends of the interval that the value must lie in, which belong to it: above zero it begins beside it."""
        return (_LEAST, math.inf) if self.judge == "greater_than_zero" else self.ends(self.bound)

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
        try:
            claims.append(Claim(**entry))
            found = ["this id is there twice"] if entry["id"] in {claim.id for claim in claims[:-1]} else []
        except ValidationError as error:
            found = [checks.mistake(one) for one in error.errors()]
        problems += [f"{entry.get('id', 'a claim without id')}: {mistake}" for mistake in found]
    problems += _questions(claims)
    if problems:
        raise ClaimError("\n  ".join([f"{path.name}:", *problems]))
    return claims


def _questions(claims: list[Claim]) -> list[str]:
    """Questions whose claims are not judged on one record, so that no correction over them could be made."""
    asked: dict[str, set[str]] = {}
    for claim in claims:
        asked.setdefault(claim.question, set()).add(f"{claim.figure} at {claim.preset}")
    spread = {question: sorted(where) for question, where in asked.items() if question and len(where) > 1}
    return [f"question {name!r}: got {', '.join(where)}, expected one of them" for name, where in spread.items()]


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


def _numbers(bound: Any) -> list[float]:
    return bound if isinstance(bound, list) else [] if bound is None else [bound]


_LEAST = math.nextafter(0, 1)
_RANGES = {
    "linear": (-math.inf, math.inf, "numbers"),
    "abs": (0.0, math.inf, "bounds of at least zero"),
    "log": (_LEAST, math.inf, "bounds above zero"),
    "correlation": (-1.0, 1.0, "bounds from -1 to 1"),
    "share": (_LEAST, 1.0, "a bound above 0, at most 1"),
}


def _is_bound(value: Any, count: int) -> bool:
    ends = _numbers(value)
    numbers = all(type(end) in (int, float) and math.isfinite(end) for end in ends)
    return numbers and isinstance(value, list) == (count == 2) and len(ends) == count and ends == sorted(ends)
