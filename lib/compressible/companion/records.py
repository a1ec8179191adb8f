"""What a record keeps so that its figure can be redrawn: the arrays of the run beside it, and the way back to them.

The arrays lie in `<id>.npz`, whose digest the record holds, as they were computed. Where that file would exceed 1.5 MB,
arrays of float64 with more than 1000 values are kept as float32, unless a value would overflow or vanish; where it
would still be larger, the largest arrays are left out, and the record names them. A record from before has no such
file; then only the short arrays are known that stand among its metrics, and asking for any other is an error rather
than an empty panel.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from compressible.runtime.checks import one_line

LIMIT = 1_500_000  # bytes of one file of arrays, as a clone gets all of them
SHORT = 1000  # values up to which an array is never rounded
DIGEST = "metrics_digest"  # the field of a record that shows whether its metrics are those that were saved
VARIABLE = "COMPRESSIBLE_REDRAW"  # the command `redraw` tells by it which record stands for the computation


class RecordError(ValueError):
    """A record that is absent, was altered, or lacks what is asked of it."""


def files_below(folder: Path, suffix: str) -> list[Path]:
    """Files `*/*<suffix>` below a label's folder, sorted; those of jobs under way, which may go meanwhile, are none."""
    found: list[Path] = []
    with suppress(FileNotFoundError, NotADirectoryError):
        for place in sorted(each for each in folder.iterdir() if not each.name.startswith(".")):
            with suppress(FileNotFoundError, NotADirectoryError):
                found += sorted(file for file in place.iterdir() if file.name.endswith(suffix))
    return found


class Kept(dict[str, np.ndarray]):
    """The arrays of a record. Where not all are kept, it refuses to say that there is no array of some name."""

    def __init__(self, arrays: Mapping[str, np.ndarray], elsewhere: set[str], lacking: str = "") -> None:
        """Hold `arrays`; `elsewhere` are names of no arrays, `lacking` the message where arrays are missing."""
        super().__init__(arrays)
        self._elsewhere, self._lacking = elsewhere, lacking

    def __contains__(self, name: object) -> bool:
        if super().__contains__(name) or name in self._elsewhere or not self._lacking:
            return super().__contains__(name)
        self._refuse(f"the array {name!r}")

    def get(self, name: str, default: Any = None) -> Any:
        """The array of that name, or `default` where the record is sure to have none."""
        return super().get(name, default) if name in self else default

    def __missing__(self, name: str) -> NoReturn:
        self._refuse(f"the array {name!r}")

    def __iter__(self) -> Iterator[str]:
        if self._lacking:
            self._refuse("the names of all arrays")
        return super().__iter__()

    def keys(self) -> Any:
        """The names of all arrays; RecordError where they are not known."""
        return dict.fromkeys(self).keys()

    def items(self) -> Any:
        """All arrays by name; RecordError where they are not known."""
        return {name: self[name] for name in self}.items()

    def values(self) -> Any:
        """All arrays; RecordError where they are not known."""
        return {name: self[name] for name in self}.values()

    def _refuse(self, what: str) -> NoReturn:
        raise RecordError(f"the record lacks {what}{self._lacking and f', since {self._lacking}'}")


def pack(arrays: Mapping[str, np.ndarray], limit: int = LIMIT) -> tuple[bytes, dict[str, Any]]:
    """An .npz file of arrays of at most `limit` bytes, and what the record says of it.

    Returns:
        The file's content, and {"sha256", "float32": names of rounded arrays, "left_out": names of those not kept}.
    """
    kept = dict(arrays)
    if sum(map(_size, kept, kept.values())) > limit:
        kept = {name: _rounded(array) for name, array in kept.items()}
    sizes = {name: _size(name, array) for name, array in kept.items()}
    left_out = []
    while sum(sizes.values()) > limit:
        left_out.append(max(sizes, key=lambda name: sizes[name]))
        del sizes[left_out[-1]]
    rounded = [name for name in sizes if kept[name].dtype != arrays[name].dtype]
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:  # as numpy.savez_compressed, for any name
        for name in sizes:
            with archive.open(f"{name}.npy", "w") as member:
                np.lib.format.write_array(member, np.asanyarray(kept[name]), allow_pickle=False)
    content = stream.getvalue()
    told = {"sha256": hashlib.sha256(content).hexdigest(), "float32": sorted(rounded), "left_out": sorted(left_out)}
    return content, told


def _size(name: str, array: np.ndarray) -> int:
    """Bytes of an array in the file, or a little more: its values compressed, its heads in a zip file."""
    return len(zlib.compress(np.ascontiguousarray(array).tobytes(), 6)) + 512 + 2 * len(name)


def _rounded(array: np.ndarray) -> np.ndarray:
    if array.dtype != np.float64 or array.size <= SHORT:
        return array
    with np.errstate(over="ignore", under="ignore"):
        single = array.astype(np.float32)
    whole = np.array_equal(np.isfinite(single), np.isfinite(array)) and np.array_equal(single == 0, array == 0)
    return single if whole else array


def not_finite(metrics: Mapping[str, Any]) -> dict[str, str]:
    """The metrics that strict JSON cannot hold, as the text of Python's own JSON: "Infinity", "[1.0, NaN]"."""
    texts = {name: json.dumps(value) for name, value in metrics.items()}
    return {name: text for name, text in texts.items() if _has_constant(text)}


def _has_constant(text: str) -> bool:
    found: list[str] = []
    json.loads(text, parse_constant=found.append)
    return bool(found)


def metrics(record: Mapping[str, Any]) -> dict[str, Any]:
    """The metrics of a record with NaN and infinities as they were; of an older record, NaN where it has null."""
    exact = {name: json.loads(text) for name, text in record.get("not_finite", {}).items()}
    return {name: _numbers(value) for name, value in record["metrics"].items()} | exact


def _numbers(value: Any) -> Any:
    return [_numbers(part) for part in value] if isinstance(value, list) else float("nan") if value is None else value


def metrics_digest(record: Mapping[str, Any]) -> str:
    """The sha256 of the metrics as they stand in the record's JSON, in whatever order and layout."""
    held = [record["metrics"], record.get("not_finite", {})]
    return hashlib.sha256(json.dumps(held, sort_keys=True).encode()).hexdigest()


def expect_unaltered(record: Mapping[str, Any]) -> None:
    """Raise RecordError where the metrics are not those that were saved; a record without their digest is of before."""
    if record.get(DIGEST) and record[DIGEST] != metrics_digest(record):
        raise RecordError(f"its metrics are not those that it names by {DIGEST!r}")


def read(path: Path, id: str | None = None, preset: str | None = None) -> dict[str, Any]:
    """The record of a figure, or without a name the one at `path`, wherever that lies.

    Raises RecordError where it is absent, no record of a run, or another's.
    """
    if not path.is_file():
        named = path if id is None else f"{path.name} of {id} under {preset!r}"
        raise RecordError(f"there is no record {named}")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        found = (record.get("id"), record.get("preset"))
    except (OSError, ValueError, AttributeError) as error:  # half a file, or something else
        raise RecordError(f"{path} is no record: {one_line(error)}") from error
    if id is not None and found != (id, preset):
        raise RecordError(f"{path.name} is the record of {found}, expected {(id, preset)}")
    held = {name: record.get(name) for name in ("parameters", "metrics")}
    held |= {"not_finite": record.get("not_finite", {}), "arrays": record.get("arrays") or {}}  # not in older ones
    if wrong := [name for name, value in held.items() if not isinstance(value, dict)]:
        raise RecordError(f"{path.name} is no record of a run: it holds no table {' or '.join(wrong)}")
    return record


def read_arrays(path: Path, record: Mapping[str, Any]) -> tuple[Kept, dict[str, Any]]:
    """Arrays and metrics of the record that lies at `path`. Raises RecordError where the file of arrays was altered."""
    exact, told = metrics(record), record.get("arrays")
    if told is None:
        short = {name: np.array(value) for name, value in exact.items() if _is_array(value)}
        rest = {name: value for name, value in exact.items() if name not in short}
        return Kept(short, set(rest), "it was made before records kept arrays"), rest
    arrays = _unpack(path.with_suffix(".npz"), told)
    rest = {name: value for name, value in exact.items() if name not in arrays}
    return Kept(arrays, set(rest), "some were too large to keep" if told["left_out"] else ""), rest


def _unpack(path: Path, told: Mapping[str, Any]) -> dict[str, np.ndarray]:
    content = path.read_bytes() if path.is_file() else None
    if content is None or hashlib.sha256(content).hexdigest() != told["sha256"]:
        state = "is missing" if content is None else "is not the file that its record names by its sha256"
        raise RecordError(f"{path.name} {state}")
    with np.load(io.BytesIO(content), allow_pickle=False) as members:
        arrays = {name: members[name] for name in members.files}
    return arrays | {name: arrays[name].astype(np.float64) for name in told["float32"]}


def _is_array(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(part, bool | int | float) for part in value)


def redrawn_from() -> Path | None:
    """The record that `python -m compressible redraw` put in the place of a computation; None but in its kernel."""
    place = os.environ.get(VARIABLE)
    return Path(place) if place else None
