"""How each claim stands on the records of the figures: its verdict, and the record that it rests on."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from compressible.companion import notebooks
from compressible.companion import records as kept
from compressible.companion.claims.rules import FAIL, INCONCLUSIVE, PASS, WEAK, judge
from compressible.companion.claims.statement import NOT_TESTED, Claim, ClaimError, load_claims
from compressible.runtime import checks, paths

OWN = "own"
VERDICTS = (PASS, WEAK, FAIL, INCONCLUSIVE, NOT_TESTED)
Record = dict[str, Any]


@dataclass(frozen=True)
class Standing:
    """A claim with its verdict, as the fields of a `Verdict`, and the record judged; without a record both are None.

    `reason` says why the verdict is not PASS.
    """

    claim: Claim
    judged: Mapping[str, Any] | None
    record: Record | None
    reason: str

    @property
    def verdict(self) -> str:
        """PASS, WEAK, FAIL, INCONCLUSIVE or NOT TESTED."""
        return NOT_TESTED if self.judged is None else self.judged["verdict"]


def standings(
    records_dir: str | Path | None = None, preset: str | None = None, claims: Sequence[Claim] | None = None
) -> list[Standing]:
    """How each claim stands, in the order of the claims.

    Args:
        records_dir: Root of the figures; by default the repository's.
        preset: Only records of this preset; "own": only those of the preset that a claim names. Without one, the
            claim's own preset comes first, then any other.
        claims: By default those of data/claims.toml.

    The claims of a figure are judged together on what a record holds, by the rules of today: a correction over the
    claims of one question needs them all. Where a record lacks a metric, the verdict that it kept stands, if the claim
    is the one that was judged. A claim without a record that suffices is NOT TESTED, beside the command that tests it.
    """
    known = load_claims() if claims is None else list(claims)
    records = read_records(Path(records_dir) if records_dir is not None else paths.figures_dir(), preset)
    judged = {(record["id"], record["preset"]): _judged(record, known) for record in records}
    return [_standing(claim, records, judged, preset == OWN) for claim in known]


def read_records(root: Path, preset: str | None = None) -> list[Record]:
    """Records by preset; a file that is no record of a figure is passed over."""
    found = []
    labels = sorted(root.glob("[!.]*")) if preset in (None, OWN) else [root / str(preset)]
    for file in (file for label in labels for file in kept.files_below(label, ".json")):
        try:
            record = json.loads(file.read_text(encoding="utf-8"))
            named = {"id": record["id"], "preset": record["preset"], "claims": record["claims"], "file": file}
            kinds = {"id": str, "preset": str, "device": str, "metrics": dict, "not_finite": dict, "arrays": dict}
            fits = all(isinstance(record.get(name, kind()), kind) for name, kind in kinds.items())
            fits &= isinstance(record.get("commit"), str | None) and isinstance(record.get("wall_seconds"), Real | None)
            if fits and all(verdict["id"] and verdict["verdict"] for verdict in record["claims"]):
                found.append(record | named)
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return sorted(found, key=lambda record: record["preset"])


def check_preset(name: str) -> None:
    """Raise BatchError unless a notebook or a claim has this preset, or there are figures under this label."""
    known = {name for id in notebooks.ids() for name in notebooks.presets(id)}
    known |= {path.name for path in paths.figures_dir().glob("*") if path.is_dir()}
    known |= {OWN} | {claim.preset for claim in load_claims()}
    if name not in known:
        near = checks.closest(name, known)
        raise notebooks.BatchError(f"--preset: got {name!r}, expected {OWN!r} or a preset{near}")


def count(standing: Iterable[Standing]) -> dict[str, int]:
    """How many claims have each verdict, all five in their order."""
    verdicts = [each.verdict for each in standing]
    return {verdict: verdicts.count(verdict) for verdict in VERDICTS}


def _standing(claim: Claim, records: list[Record], judged: Mapping[Any, Any], only_own: bool) -> Standing:
    lacking = "no record"
    mine = [record for record in records if record["id"] == claim.figure]
    own = [record for record in mine if record["preset"] == claim.preset]
    for record in own if only_own else [*own, *(record for record in mine if record not in own)]:
        found = judged[record["id"], record["preset"]].get(claim.id)
        if found:
            return Standing(claim, found, record, found["reason"])
        lacking = "no record since the claim changed"
    return Standing(claim, None, None, f"{lacking}: {_command(claim)}")


def _judged(record: Record, claims: list[Claim]) -> dict[str, Mapping[str, Any]]:
    """Verdicts by a claim's id: of today's rules where the record has the metric, else those that it kept."""
    mine = [claim for claim in claims if claim.figure == record["id"]]
    # Claims of another preset are judged apart: they ask for another run, and share no correction with these.
    apart = [claim for claim in mine if claim.preset == record["preset"]]
    groups = [apart, *([claim] for claim in mine if claim not in apart)]
    found = {verdict["id"]: verdict for group in groups for verdict in _judged_again(group, record)}
    rules = {claim.id: claim.rule() for claim in mine}
    former = [verdict for verdict in record["claims"] if verdict.get("rule") == rules.get(verdict["id"])]
    return {verdict["id"]: verdict for verdict in former} | found


def _judged_again(claims: list[Claim], record: Record) -> list[Mapping[str, Any]]:
    """Verdicts from what a record keeps, of those claims for which it suffices."""
    if not isinstance(record.get("metrics"), dict) or not isinstance(record.get("parameters"), dict):
        return []
    metrics = kept.metrics(record)
    arrays = _arrays({claim.metric for claim in claims} - metrics.keys(), record)
    evidence = SimpleNamespace(parameters=record["parameters"], arrays=arrays, metrics=metrics)
    try:
        judged = judge(record["id"], evidence, claims)
    except ClaimError as error:
        raise ClaimError(f"{record['file']}: {error}") from None
    except (TypeError, ValueError, OverflowError) as error:  # lists of lists, or a parameter of another kind
        raise ClaimError(f"{record['file']} cannot be judged, expected numbers: {checks.one_line(error)}") from error
    return [vars(found) for found in judged if found.verdict != NOT_TESTED]


def _arrays(names: set[str], record: Record) -> dict[str, np.ndarray]:
    """Arrays too long for the record itself, from the file beside it; none where that is missing or altered."""
    if not names or "arrays" not in record:
        return {}
    try:
        found = dict.items(
            kept.read_arrays(record["file"], record)[0]
        )  # not .items(), which asks for all that there were
    except kept.RecordError:
        return {}
    return {name: array for name, array in found if name in names}


def _command(claim: Claim) -> str:
    """What makes the record on which a claim is judged."""
    preset = notebooks.presets(claim.figure).get(claim.preset)
    return f"`make figure ID={claim.figure} PRESET={claim.preset}{' GPUS=1' if preset and preset.gpu else ''}`"
