"""The table of all claims over all records: text for a terminal, markdown for the README."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from compressible.companion import notebooks
from compressible.companion.claims.rules import FAIL, INCONCLUSIVE, PASS, WEAK, verdict
from compressible.companion.claims.statement import NOT_TESTED, PAPERS, Claim, load_claims
from compressible.runtime import checks, paths

OWN = "own"
START, END = "<!-- claims:start -->", "<!-- claims:end -->"
TITLES = {
    "P1": "P1: Compressible Dynamics in Deep Overparameterized Low-Rank Learning & Adaptation (ICML 2024)",
    "P2": "P2: Efficient Compression of Overparameterized Deep Models (AISTATS 2024)",
    "P3": "P3: An Overview of Low-Rank Structures (2025)",
    "beyond": "Beyond the papers",
}
_HEADS = ("claim", "published", "ours", "verdict")


def table(
    records_dir: str | Path | None = None,
    format: str = "text",
    preset: str | None = None,
    claims: Sequence[Claim] | None = None,
) -> str:
    """All claims by paper, each with the published value, ours and the verdict, from the JSON records.

    `records_dir` is the root of the figures. The record of the preset that a claim names comes first, then any other;
    `preset` allows only the one it names, "own" only the claim's own. A claim that changed since is judged again on
    what the record holds. One without a record, or whose record does not suffice, is NOT TESTED, beside the command
    that would test it.
    """
    if format not in ("text", "markdown"):
        raise ValueError(f"format: got {format!r}, expected 'text' or 'markdown'")
    records = _records(Path(records_dir) if records_dir is not None else paths.figures_dir(), preset)
    only_own = preset == OWN
    known = load_claims() if claims is None else claims
    groups = {p: [_row(c, records, only_own) for c in known if c.paper == p] for p in PAPERS}
    draw = _markdown if format == "markdown" else _text
    blocks = [draw(TITLES[paper], rows) for paper, rows in groups.items() if rows]
    return "\n\n".join([*blocks, _count(row for rows in groups.values() for row in rows)]) + "\n"


def readme_block(text: str, readme: str | Path | None = None) -> Path:
    """Put `text` between the two claims marks of the README, atomically; ValueError if a mark is missing."""
    readme = paths.repository() / "README.md" if readme is None else Path(readme)
    old = readme.read_text(encoding="utf-8")
    before, start, rest = old.partition(START)
    _, end, after = rest.partition(END)
    if not start or not end:
        raise ValueError(f"{readme.name}: expected the marks {START} and {END}, in this order")
    new = f"{before}{START}\n{text.strip()}\n{END}{after}"
    return readme if new == old else paths.write_atomic(readme, new)


def check_preset(name: str) -> None:
    """Raise BatchError unless a notebook or a claim has this preset, or there are figures under this label."""
    known = {name for id in notebooks.ids() for name in notebooks.presets(id)}
    known |= {path.name for path in paths.figures_dir().glob("*") if path.is_dir()}
    known |= {OWN} | {claim.preset for claim in load_claims()}
    if name not in known:
        near = checks.closest(name, known)
        raise notebooks.BatchError(f"--preset: got {name!r}, expected {OWN!r} or a preset{near}")


def _records(root: Path, preset: str | None) -> list[dict[str, Any]]:
    """Records by preset; a file that is no record of a figure is passed over."""
    found = []
    for file in sorted(root.glob(f"{'*' if preset in (None, OWN) else preset}/*/*.json")):
        try:
            record = json.loads(file.read_text(encoding="utf-8"))
            found.append(record | {"id": record["id"], "preset": record["preset"], "claims": record["claims"]})
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return sorted(found, key=lambda record: record["preset"])


def _row(claim: Claim, records: list[dict[str, Any]], only_own: bool) -> dict[str, str]:
    statement = {"id": claim.id, "claim": claim.statement, "published": claim.published}
    reason = f"no record: {_command(claim)}"
    mine = [record for record in records if record["id"] == claim.figure]
    own = [record for record in mine if record["preset"] == claim.preset]
    for record in own if only_own else [*own, *(record for record in mine if record not in own)]:
        found: dict[str, Any] = next((v for v in record["claims"] if v["id"] == claim.id), {})
        judged = found if found.get("rule") == claim.rule() else _judged_again(claim, record)
        if judged:
            return statement | {"ours": _ours(judged, record["preset"], claim.unit), "verdict": judged["verdict"]}
        reason = f"no record since the claim changed: {_command(claim)}"
    return statement | {"ours": reason, "verdict": NOT_TESTED}


def _judged_again(claim: Claim, record: Mapping[str, Any]) -> dict[str, Any] | None:
    """The verdict by today's rule, from the parameters and metrics that a record keeps; None if they do not suffice."""
    if not isinstance(record.get("metrics"), dict) or not isinstance(record.get("parameters"), dict):
        return None
    metrics = {name: _numbers(value) for name, value in record["metrics"].items()}
    found = verdict(claim, SimpleNamespace(parameters=record["parameters"], arrays={}, metrics=metrics))
    return None if found.verdict == NOT_TESTED else vars(found)


def _numbers(value: Any) -> Any:
    """A record's value with NaN where JSON has null."""
    return [_numbers(part) for part in value] if isinstance(value, list) else math.nan if value is None else value


def _command(claim: Claim) -> str:
    """What makes the record on which a claim is judged."""
    preset = notebooks.presets(claim.figure).get(claim.preset)
    return f"`make figure ID={claim.figure} PRESET={claim.preset}{' GPUS=1' if preset and preset.gpu else ''}`"


def _ours(verdict: dict[str, Any], preset: str, unit: str) -> str:
    if verdict["value"] is None:
        return f"{verdict['reason']} ({preset})"
    ends = "" if verdict["low"] is None else f" [{_short(verdict['low'])}, {_short(verdict['high'])}]"
    count = f", {verdict['seeds']} {unit or 'seed'}s" if verdict["seeds"] > 1 else ""
    return f"{_short(verdict['value'])}{ends} ({preset}{count})"


def _short(value: float) -> str:
    return f"{value:.0f}" if 1000 <= abs(value) < 1e6 and math.isfinite(value) else f"{value:.3g}"


def _markdown(title: str, rows: list[dict[str, str]]) -> str:
    lines = [f"**{title}**", "", f"| {' | '.join(_HEADS)} |", "|---|---|---|---|"]
    for row in rows:
        cells = [f"{row['claim']} <sub>{row['id']}</sub>", *(row[head] for head in _HEADS[1:])]
        lines.append("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |")
    return "\n".join(lines)


def _text(title: str, rows: list[dict[str, str]]) -> str:
    lines = [title]
    for row in rows:
        lines += [f"  {row['verdict']:<12} {row['claim']}", f"               {row['id']}"]
        lines.append(f"               ours: {row['ours']}; published: {row['published'] or '-'}")
    return "\n".join(lines)


def _count(rows: Iterable[dict[str, str]]) -> str:
    verdicts = [row["verdict"] for row in rows]
    counts = [f"{verdicts.count(v)} {v}" for v in (PASS, WEAK, FAIL, INCONCLUSIVE, NOT_TESTED)]
    return f"{len(verdicts)} claims: {', '.join(counts)}."
