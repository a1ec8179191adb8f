"""The record of a run of everything: how long each figure took, beside the minutes that its preset expects."""

from __future__ import annotations

from collections import defaultdict

from compressible.companion import notebooks, verification
from compressible.companion.claims import wording
from compressible.companion.claims.standing import Record, read_records
from compressible.runtime import paths

HEADS = ["notebook", "preset", "expected, minutes", "computed, minutes", "device", "commit"]


def table() -> str:
    """A table in markdown of all records but those of `quick`, and below it the sum for each preset and device."""
    found = {(record["id"], record["preset"]): record for record in read_records(paths.figures_dir())}
    places = [(id, label) for id in notebooks.ids() for label in verification.labels(id)]
    rows = [[id, label, _expected(id, label), f"{_minutes(found[id, label]):.1f}", wording.device(found[id, label]),
             wording.commit(found[id, label])] for id, label in places if (id, label) in found]  # fmt: skip
    sums: dict[tuple[str, str], list[float]] = defaultdict(list)
    for place in places:
        if record := found.get(place):
            sums[place[1], wording.device(record)].append(_minutes(record))
    told = [f"- {label}, {device}: {len(each)} figures, {sum(each):.0f} minutes one after another, the longest "
            f"{max(each):.1f}." for (label, device), each in sorted(sums.items())]  # fmt: skip
    return "\n".join([wording.table(HEADS, rows), "", *told]) + "\n"


def _expected(id: str, label: str) -> str:
    preset = notebooks.presets(id).get(label)
    return f"{preset.minutes:g}" if preset else "-"


def _minutes(record: Record) -> float:
    return (record.get("wall_seconds") or 0.0) / 60
