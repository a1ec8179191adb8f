"""The table of all claims over all records, as text for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from compressible.companion.claims import pages, status, wording
from compressible.companion.claims.standing import Standing, count, standings
from compressible.companion.claims.statement import PAPERS, Claim

TITLES = {
    "P1": "P1: Compressible Dynamics in Deep Overparameterized Low-Rank Learning & Adaptation (ICML 2024)",
    "P2": "P2: Efficient Compression of Overparameterized Deep Models (AISTATS 2024)",
    "P3": "P3: An Overview of Low-Rank Structures (2025)",
    "beyond": "Beyond the papers",
}


def table(
    records_dir: str | Path | None = None,
    format: str = "text",
    preset: str | None = None,
    claims: Sequence[Claim] | None = None,
) -> str:
    """All claims with the published value, ours and the verdict, from the JSON records.

    By paper as text, or as the page CLAIMS.md where `format` is "markdown"; the other arguments are those of
    `standings`.
    """
    if format not in ("text", "markdown"):
        raise ValueError(f"format: got {format!r}, expected 'text' or 'markdown'")
    standing = standings(records_dir, preset, claims)
    if format == "markdown":
        return pages.claims_page(standing, status.load_items())
    groups = {paper: [each for each in standing if each.claim.paper == paper] for paper in PAPERS}
    blocks = [_block(TITLES[paper], found) for paper, found in groups.items() if found]
    counts = ", ".join(f"{n} {verdict}" for verdict, n in count(standing).items())
    return "\n\n".join([*blocks, f"{len(standing)} claims: {counts}."]) + "\n"


def _block(title: str, standing: Sequence[Standing]) -> str:
    lines = [title]
    for each in standing:
        lines += [f"  {each.verdict:<12} {each.claim.statement}", f"               {each.claim.id}"]
        lines.append(f"               ours: {_ours(each)}; published: {wording.published(each.claim) or '-'}")
    return "\n".join(lines)


def _ours(each: Standing) -> str:
    if each.judged is None or each.record is None:
        return each.reason
    preset, count = each.record["preset"], each.judged["seeds"]
    if each.judged["value"] is None:
        return f"{each.reason} ({preset})"
    return f"{wording.ours(each)} ({preset}{f', {wording.sample(each)}' if count > 1 else ''})"
