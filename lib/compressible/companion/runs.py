"""A run is (function, parameters) -> arrays and metrics, computed once and kept on disk.

The key of a run, by which it is found again, is made in run_key.py. An entry is written atomically and every array
carries its digest; whatever does not match is dropped with a warning and computed again. What was true when the numbers
were computed (commit, digests of the code, versions, times) is kept with them and never asked again.
"""

from __future__ import annotations

import json
import os
import time
import warnings
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from compressible.companion import records, run_cache
from compressible.companion.code_digest import source_digest
from compressible.companion.library import NOTEBOOK, REACHED, notebook_digest
from compressible.companion.provenance import LIBRARY, environment, git_state
from compressible.companion.run_cache import Result
from compressible.companion.run_key import Data, arguments_of, digests_of, key_of
from compressible.runtime import checks, devices, paths

_PLACE: ContextVar[Path | None] = ContextVar("place of the checkpoint of the run in progress", default=None)
_SPARED: ContextVar[list[float] | None] = ContextVar("seconds that the cache spared the run in progress", default=None)


def run(
    function: Callable[..., dict],
    *,
    data: Data = (),
    cache: bool = True,
    reads: Mapping[str, str] | None = None,
    **values: Any,
) -> Result:
    """Result of `function(**values)`, from the cache where the same run was made before.

    `function` returns a flat dict: arrays and tensors of one or more dimensions become arrays; numbers,
    text, truth values and lists of these become metrics. `data` names what the run reads: entries of the
    data manifest, sha256 digests, or a mapping from name to digest. `preset` is dropped. Before the work starts it
    raises ParameterError, outside of a batch, which has checked it, also for what the rules of the notebook with these
    parameters do not allow; and TypeError for a function that reads from outside itself what cannot be told from
    another of its kind, a model, say. `reads` tells it, {name: digest or version}; else such a function runs with
    cache=False only. `key` is "" then. TypeError is raised for an output that cannot be stored, too. A cache that
    cannot be written is said by a RuntimeWarning, before the work where that can be known, and the result is returned.

    In `python -m compressible redraw` the result is the record's and nothing is computed; RecordError where the
    record was made with other parameters or by another function.
    """
    preset = values.get("preset")
    values, digests = arguments_of(function, values), digests_of(data)
    if place := records.redrawn_from():
        return _recorded(place, function, values, reads)
    if preset and not os.environ.get(NOTEBOOK):
        from compressible.companion import label_guard

        label_guard.expect_to_run(preset, values, function)
    key = key_of(function, values, digests, reads) if cache else ""
    result = run_cache.load(run_cache.entry(key), key) if cache else None
    if result is not None:
        _spare(result.seconds)
    else:
        place = _checkpoint_place(key) if cache else None
        reset = _PLACE.set(place)
        try:
            made = _made() | ({"function": source_digest(function, reads)} if cache else {})
            result = _compute(function, values, key, digests, made)
        finally:
            _PLACE.reset(reset)
        if place is not None:
            _keep(result, place)
    return result


def _checkpoint_place(key: str) -> Path | None:
    """Where the checkpoint of a run goes; None, with a warning, where the cache would not take the result either."""
    place = paths.cache_dir() / "checkpoints" / key[:2] / key
    reason = paths.unwritable(run_cache.entry(key).parent) or paths.unwritable(place.parent)
    if reason:
        told = f"the cache {paths.cache_dir()} cannot be written ({reason}): the result is returned and not kept"
        warnings.warn(f"{told}; COMPRESSIBLE_CACHE names another folder", RuntimeWarning, stacklevel=3)
    return None if reason else place


def _keep(result: Result, checkpoint: Path) -> None:
    """Store a result, after which its checkpoint is of no use. Work that is done is not lost where that fails."""
    try:
        run_cache.store(run_cache.entry(result.key), result)
        for file in checkpoint.parent.glob(f"{result.key}*"):  # of several passes each has its own
            file.unlink(missing_ok=True)
    except Exception as error:
        told = f"the result could not be kept in the cache {paths.cache_dir()} ({checks.one_line(error)})"
        warnings.warn(f"{told}: it is returned, and the next run computes it again", RuntimeWarning, stacklevel=3)


def checkpoint(every: int) -> dict[str, Any]:
    """Arguments of the one `fine_tune` of the run in progress, so that it goes on after a kill: a file, steps between.

    Several calls of a run append something of their own to the file's name. The files are in the cache under the run's
    key, and go when the result is stored; {} outside of a cached run, and where the cache cannot be written.
    """
    return {} if (place := _PLACE.get()) is None else {"checkpoint": place, "checkpoint_every": max(1, every)}


def provenance(result: Result, preset: str, id: str) -> dict[str, Any]:
    """JSON-ready record of where a result comes from; `commit` and `dirty` are None outside git.

    All but `notebook` and `created` was taken when the numbers were computed, and comes from the cache with them:
    `function` is the digest of the function that did it, `computed_in` that of the notebook, and `reached` that of the
    sources which it can reach of those that `library` counts, both where a batch told them; None from an older cache.
    `notebook` is the digest of the notebook that draws the figure: of the code that the batch began to execute, or, in
    an interactive session, of the file as it is saved. By these `freshness.state` tells a stale figure.
    """
    return {
        "id": id,
        "preset": preset,
        "parameters": result.parameters,
        "reached": None,
        **result.made,
        "notebook": drawn_in(id),
        "data": result.data,
        "device": result.device,
        "threads": result.threads,
        "wall_seconds": result.seconds,
        "peak_memory_bytes": result.peak_memory_bytes,
        "started": result.started,
        "ended": result.ended,
        "created": _now(),
        "run": result.key,
        "cached": result.cached,
    }


def drawn_in(id: str) -> str | None:
    """Digest of the notebook that draws: of what the batch executes, or of the file as it is saved."""
    return os.environ.get(NOTEBOOK) or notebook_digest(paths.repository() / "notebooks" / f"{id}.ipynb")


def _recorded(
    place: Path, function: Callable[..., dict], values: dict[str, Any], reads: Mapping[str, str] | None
) -> Result:
    """The result that the record at `place` keeps, of this very function and these values."""
    record = json.loads(place.read_text(encoding="utf-8"))
    arrays, metrics = records.read_arrays(place, record)
    kept, asked = record["parameters"], json.loads(json.dumps(values))
    if other := [name for name in kept | asked if kept.get(name) != asked.get(name)]:
        differ = ", ".join(f"{name} {kept.get(name)!r}, expected {asked.get(name)!r}" for name in other)
        raise records.RecordError(f"the record was made with other parameters: {differ}")
    if record.get("function") and record["function"] != source_digest(function, reads, record.get("versions")):
        raise records.RecordError(f"{function.__name__}, or what it reads, has changed since the record was made")
    return Result(
        values, arrays, metrics, record["run"], True, record["wall_seconds"], record["peak_memory_bytes"],
        record.get("started", ""), record.get("ended", ""), record["device"], record["threads"], {}, record["data"],
    )  # fmt: skip


def _made() -> dict[str, Any]:
    told = {"computed_in": os.environ.get(NOTEBOOK), "reached": os.environ.get(REACHED) or None}
    return git_state() | told | {"library": LIBRARY} | environment()


def _compute(
    function: Callable[..., dict], values: dict[str, Any], key: str, data: dict[str, str], made: dict[str, Any]
) -> Result:
    started, device = _now(), values.get("device", "cpu")
    devices.reset_peak_memory(device)
    clock, spared = time.perf_counter(), list[float]()
    reset = _SPARED.set(spared)
    try:
        output = function(**values)
    finally:
        _SPARED.reset(reset)
    devices.synchronize(device)
    seconds = time.perf_counter() - clock + sum(spared)
    _spare(sum(spared))
    arrays, metrics = _flat(output)
    return Result(
        values, arrays, metrics, key, False, seconds, devices.peak_memory(device), started, _now(),
        devices.device_name(device), torch.get_num_threads(), made, data,
    )  # fmt: skip


def _spare(seconds: float) -> None:
    """Count what a run inside of another took when it was made: the other took as long, whatever was in the cache."""
    if (spared := _SPARED.get()) is not None:
        spared.append(seconds)


def _flat(output: Any) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    if not isinstance(output, Mapping):
        raise TypeError(f"output: got {type(output).__name__}, expected a flat dict of arrays and values")
    arrays, metrics = {}, {}
    for name, item in output.items():
        value = _numpy(item) if isinstance(item, torch.Tensor) else item
        if isinstance(value, np.ndarray) and value.ndim and value.dtype != object:
            arrays[str(name)] = value
        else:
            metrics[str(name)] = _plain(name, value)
    return arrays, metrics


def _numpy(tensor: torch.Tensor) -> np.ndarray:
    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor).numpy()


def _plain(name: str, value: Any) -> Any:
    if isinstance(value, np.generic) or (isinstance(value, np.ndarray) and not value.ndim):
        value = value.item()
    if isinstance(value, list | tuple):
        return [_plain(name, element) for element in value]
    if not isinstance(value, bool | int | float | str):
        raise TypeError(f"output {name!r}: got {type(value).__name__}, expected an array or a plain value")
    return value


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
