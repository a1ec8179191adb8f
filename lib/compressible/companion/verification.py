"""Whether each record is what it says: of this code, these data and a pinned environment, whole, and of a commit here.

What a record holds is held against the checkout: the digests of the notebook and of what it can reach of the library,
the preset's values, the data manifest, the pinned environment, the pictures and arrays beside it; and its metrics
against their own digest. Its commit must lie behind HEAD, and the library and the notebook of that commit must have the
very digests that the record names: a digest that is typed by hand, or of code that nobody committed, is told.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from compressible.companion import committed, freshness, notebooks, pins, records
from compressible.data import manifest
from compressible.runtime import checks, paths

DIGEST = re.compile("[0-9a-f]{64}")
HELD = ("library", "notebook", "function", "computed_in", "run", records.DIGEST)


def labels(id: str) -> list[str]:
    """Labels under which a notebook has a record, but for `quick`, which is never committed."""
    known = [*notebooks.presets(id), *freshness.own_labels(id)]
    return [label for label in known if label != "quick" and notebooks.record_path(id, label).is_file()]


def reasons(id: str, label: str) -> list[str]:
    """Why the record of a figure cannot be trusted as one of this checkout; none where it can."""
    try:
        return _reasons(id, label)
    except records.RecordError as error:
        return [str(error)]
    except (AttributeError, KeyError, TypeError) as error:  # a field of another kind than a run's
        return [f"is no record of a run: {checks.one_line(error)}"]


def _reasons(id: str, label: str) -> list[str]:
    path = notebooks.record_path(id, label)
    record = records.read(path, id, label)
    told = [f"does not hold the digest {name!r}" for name in HELD if not DIGEST.fullmatch(str(record.get(name)))]
    other = freshness.differences(id, label, record)
    told += [*other, *_data(record), *_environment(record), *_files(path, record)]
    return told + _commit(record, compare=not told)


def _data(record: Mapping[str, Any]) -> list[str]:
    if not isinstance(record.get("data"), dict):
        return ["does not hold the digests of its data"]
    known = {name: entry.sha256 for name, entry in manifest.load_manifest().items()}
    held = record["data"].items()
    return [f"read {name} {digest[:12]}, the manifest has {known[name][:12]}" for name, digest in held
            if known.get(name, digest) != digest]  # fmt: skip


def _environment(record: Mapping[str, Any]) -> list[str]:
    held = record.get("environment")
    if not isinstance(held, dict):
        return ["does not name its environment"]
    if not held.get("pinned"):
        if held.get("installed") in {pins.sha256(pins.written(pins.read(file)).encode()) for file in pins.files()}:
            return []  # a file that has been written since names all that was there, to the version
        few = "; ".join(held.get("differs", [])[:3]) or "there was no file of pins"
        return [f"was made in no pinned environment ({few})"]
    file = paths.repository() / held["pinned"]
    same = file.is_file() and pins.sha256(file.read_bytes()) == held["sha256"]
    return [] if same else [f"was made in another {held['pinned']} than the one that is here"]


def _files(path: Path, record: Mapping[str, Any]) -> list[str]:
    told = []
    for suffix, digest in record.get("pictures", {}).items():
        picture = path.with_suffix(f".{suffix}")
        if not picture.is_file() or pins.sha256(picture.read_bytes()) != digest:
            told.append(f"{picture.name} is missing, or is not the picture that was drawn")
    try:
        records.expect_unaltered(record)
    except records.RecordError as error:
        told.append(str(error))
    try:
        arrays, exact = records.read_arrays(path, record)[0], records.metrics(record)
    except records.RecordError as error:
        return [*told, str(error)]
    # Short arrays stand among the metrics as well, by which claims are judged.
    return told + [f"its metric {name!r} is not the array of that name" for name, array in dict.items(arrays)
                   if name in exact and record.get("arrays") and not _equal(array, exact[name])]  # fmt: skip


def _equal(array: np.ndarray, metric: Any) -> bool:
    try:
        return np.array_equal(array, np.asarray(metric), equal_nan=array.dtype.kind in "fc")
    except (TypeError, ValueError, OverflowError):  # a list of lists, or text
        return False


def _commit(record: Mapping[str, Any], compare: bool) -> list[str]:
    """What is wrong with the commit; with `compare`, also whether its tree has the digests that the record names."""
    commit, told = (
        record.get("commit"),
        ["was made with changes that were not committed"] if record.get("dirty") else [],
    )
    if not commit:
        return ["does not name its commit"]
    if not committed.lies_behind(commit):
        return [*told, f"its commit {commit[:12]} {committed.history() or 'does not lie behind HEAD'}"]
    if compare and not told:
        names = {"library": committed.library_of(commit), "computed_in": committed.notebook_of(commit, record["id"])}
        names |= {"reached": committed.reached_at(commit, record["id"])} if record.get("reached") else {}
        told = [f"{name} is not the digest of commit {commit[:12]}" for name in names if record[name] != names[name]]
    return told
