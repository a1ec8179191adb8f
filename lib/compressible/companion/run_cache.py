"""What a run gave, and its entry in the cache: one archive, whose metadata and arrays each carry a digest."""

from __future__ import annotations

import contextlib
import hashlib
import json
import warnings
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from compressible.runtime import paths


@dataclass(frozen=True)
class Result:
    """What a run gave: arrays (name -> numpy array), metrics (name -> plain value), and how it was made.

    `seconds` is the wall time of the computation, also when `cached`, and with that of parts that were;
    `peak_memory_bytes` is the peak of the process on a CPU and of the run's tensors on CUDA; `data` maps names to
    sha256 digests. `made` holds what was true when the computation began: commit and dirty flag, digests of library,
    function and, in a batch, notebook, versions, CPU and thread settings.
    """

    parameters: dict[str, Any]
    arrays: dict[str, np.ndarray]
    metrics: dict[str, Any]
    key: str
    cached: bool
    seconds: float
    peak_memory_bytes: int
    started: str
    ended: str
    device: str
    threads: int
    made: dict[str, Any]
    data: dict[str, str] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Any:
        """The array or metric of that name; KeyError lists what there is."""
        if name in self.arrays:
            return self.arrays[name]
        if name in self.metrics:
            return self.metrics[name]
        raise KeyError(f"{name!r}: expected one of {', '.join([*self.arrays, *self.metrics])}")


def entry(key: str) -> Path:
    return paths.cache_dir() / "results" / key[:2] / f"{key}.npz"


_META = [f.name for f in fields(Result) if f.name not in ("arrays", "cached")]


def store(path: Path, result: Result) -> None:
    meta = {name: getattr(result, name) for name in _META}
    meta["digests"] = {name: _array_digest(array) for name, array in result.arrays.items()}
    text = json.dumps(meta).encode()
    members = {f"array:{name}": array for name, array in result.arrays.items()}
    members["meta"] = np.frombuffer(text, np.uint8)
    members["meta_sha256"] = np.frombuffer(hashlib.sha256(text).digest(), np.uint8)
    with paths.atomic_path(path) as temporary:
        np.savez(temporary, allow_pickle=False, **members)


def load(path: Path, key: str) -> Result | None:
    try:
        return _read(path, key)
    except (FileNotFoundError, NotADirectoryError, PermissionError):  # what is in the way is said before the work
        return None
    except Exception as error:  # a damaged archive fails in ways that zipfile, zlib and numpy do not list
        warnings.warn(f"dropped a damaged cache entry, {path.name}: {error}", RuntimeWarning, stacklevel=3)
        with contextlib.suppress(OSError):  # a cache that may only be read
            path.unlink(missing_ok=True)
        return None


def _read(path: Path, key: str) -> Result:
    with path.open("rb") as stream, np.load(stream, allow_pickle=False) as members:
        text = members["meta"].tobytes()
        _require(hashlib.sha256(text).digest() == members["meta_sha256"].tobytes(), "digest of the metadata")
        meta = json.loads(text)
        digests = meta.pop("digests")
        arrays = {name: members[f"array:{name}"] for name in digests}
    _require(meta["key"] == key, "key")
    for name, array in arrays.items():
        _require(_array_digest(array) == digests[name], f"digest of array {name!r}")
    return Result(arrays=arrays, cached=True, **meta)


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise ValueError(f"the {what} does not match")


def _array_digest(array: np.ndarray) -> str:
    head = f"{array.dtype.str} {array.shape} ".encode()
    return hashlib.sha256(head + np.ascontiguousarray(array).tobytes()).hexdigest()
