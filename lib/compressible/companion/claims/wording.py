"""Values, intervals and bounds in few characters, and text that a cell of a markdown table can hold."""

from __future__ import annotations

import re
from typing import Any

from compressible.companion.claims.standing import Standing
from compressible.companion.claims.statement import NOT_TESTED, Claim

_MATH = re.compile(r"(\$[^$]+\$|`[^`]+`)")
_TAG = re.compile(r"<(?=[A-Za-z/!?])")
_SIGNS = re.compile(r"[|~$*]|(?<!\w)_|_(?!\w)")  # what markdown takes for a bar, strokes, a formula or emphasis


def number(value: float, digits: int = 3) -> str:
    """A value with that many digits, and with all before the point if it is below a million."""
    whole = 10.0 ** (digits - 1) <= abs(value) < 1e6
    return f"{value:.0f}" if whole else f"{value:.{digits}g}"


def ours(standing: Standing) -> str:
    """Our value with its 95 % interval; empty where nothing was judged, "not finite" where a run diverged.

    Three digits, and up to nine where fewer would not tell value and ends apart.
    """
    judged = standing.judged
    if judged is None or standing.verdict == NOT_TESTED:
        return ""
    if judged["value"] is None:
        return "not finite"
    if judged["low"] is None:
        return number(judged["value"])
    three = {judged["value"], judged["low"], judged["high"]}
    digits = next((n for n in range(3, 10) if len({number(each, n) for each in three}) == len(three)), 3)
    value, low, high = (number(judged[name], digits) for name in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def sample(standing: Standing) -> str:
    """How many values were judged, and of what: 10 seeds."""
    if standing.judged is None or standing.verdict == NOT_TESTED:
        return ""
    unit, n = standing.claim.unit, standing.judged["seeds"]
    return f"{n} {unit}{'' if n == 1 else 's'}"


def published(claim: Claim) -> str:
    """The published value as text, with its interval where it is known."""
    if claim.published_range is None:
        return claim.published
    low, high = (number(float(end)) for end in claim.published_range)
    interval = f"[{low}, {high}]"
    return claim.published if interval in claim.published else f"{claim.published} {interval}".strip()


def bound(claim: Claim) -> str:
    """The bound in signs, and where it comes from."""
    return claim.bound_text() + (f"; {claim.bound_from}" if claim.bound_from else "")


def verdict(standing: Standing) -> str:
    """The verdict in bold, in markdown, and the reason where it is not PASS."""
    return f"**{standing.verdict}**" + (f": {cell(standing.reason)}" if standing.reason else "")


def device(record: dict[str, Any]) -> str:
    """What a record was made on, without the words that say nothing."""
    return (
        re.sub(r"\((R|TM)\)|NVIDIA | \d+GB HBM3e?|Processor|CPU(?= @)| @ .*", "", record.get("device") or "").strip()
        or "?"
    )


def commit(record: dict[str, Any]) -> str:
    """The first digits of the commit that made a record."""
    return (record.get("commit") or "?")[:7]


def cell(text: str) -> str:
    """Text for a cell of a table: no bar, tag, emphasis or break of its own, formulas and code left whole.

    A bar within a formula is spelt, since GitHub and JupyterLab disagree on what a backslash before it means.
    """
    parts = _MATH.split(" ".join(text.split()))
    return "".join(_spelt(part) if i % 2 else _escaped(part) for i, part in enumerate(parts))


def table(heads: list[str], rows: list[list[str]]) -> str:
    """A markdown table of cells that are markdown already."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _escaped(text: str) -> str:
    return _TAG.sub("&lt;", _SIGNS.sub(r"\\\g<0>", text))


def _spelt(text: str) -> str:
    if text.startswith("`"):
        return text.replace("|", "\\|")
    return text.replace("\\|", "\\Vert ").replace("|", "\\vert ")
