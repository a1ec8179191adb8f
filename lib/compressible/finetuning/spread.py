"""The passes of one call on several devices of a host, a process each, in joblib's pool.

The processes are loky's, or those of the backend that `joblib.parallel_config` names, such as dask's or ray's on this
host. Model and task are sent once, as arrays that all processes map; a pass takes whichever device is free.
"""

from __future__ import annotations

import gc
import pickle
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import joblib
import numpy as np
import torch
from joblib.parallel import BACKENDS, get_active_backend
from torch import nn

from compressible.finetuning.devices import Pass, claimed
from compressible.finetuning.parcel import Parcel, pack, pack_named, unpack
from compressible.runtime.checks import one_line
from compressible.runtime.progress import progress

if TYPE_CHECKING:  # a process imports peft only when it is sent something of it
    from compressible.finetuning.run import FineTuningRun, RunHistory

TRIES = 2  # of a pass whose process dies
Train = Callable[..., "list[RunHistory]"]  # (model, runs, task, settings, checkpoint)


@dataclass(frozen=True)
class _Job:
    """What a process is told of the call besides the parcel."""

    train: Train
    names: list[str]
    devices: list[str]
    folder: Path


def spread(
    train: Train,
    model: nn.Module,
    passes: Sequence[Pass],
    parts: dict[str, Any],
    devices: Sequence[str],
    show_progress: bool | None = None,
) -> list[list[RunHistory]]:
    """Return what `train` gives for each pass on one of the devices, its tensors on the model's device.

    parts: "task" and "settings" for `train`; further ones only name what cannot be sent. A pass whose process dies is
    tried once more. Raises ValueError for what cannot be sent, RuntimeError for a pass whose process died twice, and
    an error of `train` with a note that names the pass.
    """
    places = [replace(each, checkpoint=each.checkpoint and each.checkpoint.absolute()) for each in passes]
    own = {"model": model, "passes": places, "dtype": torch.get_default_dtype()}
    parcel = pack_named(parts | own)
    home = next(model.parameters()).device
    found: dict[int, list[RunHistory]] = {}
    told: set[tuple] = set()
    bar = progress(len(passes), f"{len(passes)} passes on {len(devices)} devices", enabled=show_progress)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, bar:
        job = _Job(train, [each.name for each in passes], list(devices), Path(folder))
        with closing(_results(job, parcel, passes)) as results:
            for number, result in results:
                histories, warned = unpack(result, home, own=True)
                found[number] = [
                    _at_home(history, run, model, home)
                    for history, run in zip(histories, passes[number].runs, strict=True)
                ]
                _repeat([each for each in warned if each not in told])
                told.update(warned)
                bar.update(1)
    return [found[number] for number in range(len(passes))]


def _results(job: _Job, parcel: Parcel, passes: Sequence[Pass]) -> Generator[tuple[int, Parcel], None, None]:
    """Yield number and result of each pass as it ends, costly ones begun first; those of dead processes once more."""
    left = sorted(range(len(passes)), key=lambda number: -passes[number].cost)
    deaths: Counter[int] = Counter()
    alone = min(len(job.devices), len(passes)) == 1
    while left:
        count = 1 if alone else min(len(job.devices), max(2, len(left)))  # a second try is in a process, too
        calls = [joblib.delayed(_work)(job, parcel.pickled, parcel.content, number) for number in left]
        try:
            for number, result in _outputs(count, calls):
                left.remove(number)
                yield number, result
        except BrokenProcessPool as error:
            lost = [number for number in left if _running(job.folder, number).exists()] or left
            names = "; ".join(passes[number].name for number in lost)
            deaths.update(lost)
            if max(deaths.values()) == TRIES:
                reason = f"a process died, and had died before, while these ran: {names} ({one_line(error)})"
                more = "expected enough memory for each device's process: give fewer devices, or max_stack"
                raise RuntimeError(f"{reason}; {more}") from error
            warnings.warn(f"a process died; tried once more: {names} ({one_line(error)})", stacklevel=4)
            for number in lost:
                _running(job.folder, number).unlink(missing_ok=True)


def _outputs(count: int, calls: list) -> Iterator[tuple[int, Parcel]]:
    """Results of calls in `count` processes, as they come where the backend can; in this process if count is 1."""
    backend, _ = get_active_backend(prefer="processes")
    unfit = getattr(backend, "uses_threads", False) or type(backend) is BACKENDS.get("multiprocessing")
    streams = unfit or getattr(backend, "supports_return_generator", False)
    options = {"return_as": "generator_unordered"} if streams and count > 1 else {}
    # Pages are shared until written: a model may write its buffers, which loky maps read-only otherwise.
    pool = joblib.Parallel(count, backend="loky" if unfit else None, batch_size=1, mmap_mode="c", **options)
    outputs = pool(calls)
    with closing(outputs) if hasattr(outputs, "close") else nullcontext():
        yield from outputs


def _work(job: _Job, pickled: np.ndarray, content: np.ndarray, number: int) -> tuple[int, Parcel]:
    """In a process of the pool: train one pass on a device that is free and return its histories, without the model."""
    with claimed(job.devices, job.folder) as device, _on(device) as place:
        _running(job.folder, number).touch()
        try:
            with warnings.catch_warnings(record=True) as warned:
                histories = _train(job.train, unpack(Parcel(pickled, content), place), number, place)
            told = [(each.category, str(each.message)) for each in warned]
            for history in histories:  # which stay here
                history.run = history.base = cast(Any, None)
            return number, pack((histories, told))
        except Exception as error:
            raise _sendable(error, f"in {job.names[number]}, on {device}") from error.__cause__
        finally:
            _running(job.folder, number).unlink(missing_ok=True)


def _train(train: Train, given: dict[str, Any], number: int, place: torch.device) -> list[RunHistory]:
    part, default = given["passes"][number], torch.get_default_dtype()
    torch.set_default_dtype(given["dtype"])
    try:
        return train(given["model"].to(place), part.runs, given["task"], given["settings"], part.checkpoint)
    finally:
        torch.set_default_dtype(default)


@contextmanager
def _on(device: str) -> Iterator[torch.device]:
    """Make a device the current one, on which streams and kernels are, and let go of its memory afterwards."""
    place = torch.device(device)
    with torch.cuda.device(place) if place.type == "cuda" else nullcontext():
        try:
            yield place
        finally:
            if place.type == "cuda":
                gc.collect()
                torch.cuda.empty_cache()


def _sendable(error: Exception, note: str) -> Exception:
    """The error with a note; one that cannot be read again, which would pass for a dead process, as its message."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        error = RuntimeError(one_line(error))
    error.add_note(note)
    return error


def _running(folder: Path, number: int) -> Path:
    """The file that exists while a pass is trained."""
    return folder / f"pass.{number}"


def _at_home(history: RunHistory, run: FineTuningRun, model: nn.Module, home: torch.device) -> RunHistory:
    parts = {name: _moved(getattr(history, name), home) for name in ("chains", "heads", "others", "taken_off")}
    return replace(history, run=run, base=model, **parts)


def _moved(value: Any, home: torch.device) -> Any:
    if isinstance(value, dict):
        return {key: _moved(each, home) for key, each in value.items()}
    if isinstance(value, list):
        return [_moved(each, home) for each in value]
    return None if value is None else value.to(home)


def _repeat(warned: Sequence[tuple[type[Warning], str]]) -> None:
    """Say again here what processes have said, who may have no screen."""
    for category, text in warned:
        warnings.warn(text, category, stacklevel=4)
