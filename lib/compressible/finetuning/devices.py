"""Several devices for the passes of one call: which they are, how runs are shared out, who holds one."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from compressible.runtime.checks import expect, is_integer
from compressible.runtime.devices import resolve_device

if TYPE_CHECKING:
    from compressible.finetuning.run import FineTuningRun

SLACK = 1.25  # the busiest device may have so much more than the mean before passes are cut further
PIECES = 4  # a device, at most
WAIT = 0.05  # seconds between two looks for a free device

_used: set[str] = set()  # devices that this process has had, and so holds a context on


@dataclass(frozen=True)
class Pass:
    """Runs that are trained together, the file of their state, their name in messages, their cost in any unit."""

    runs: list[FineTuningRun]
    checkpoint: Path | None
    name: str
    cost: float = 1.0


def device_names(devices: Any) -> list[str]:
    """Return the names of `devices`: "all" or a number of CUDA devices, or names, of which one may come twice."""
    if is_integer(devices) or isinstance(devices, str):
        counted = torch.cuda.device_count()
        seen = f"1 to {counted}" if counted else "a list such as ['cpu', 'cpu']"
        reason = f"{seen}, since this PyTorch sees {counted} CUDA devices"
        number = counted if devices == "all" else devices
        expect("devices", devices, is_integer(number), "'all', a number of CUDA devices or a list of names")
        expect("devices", devices, 1 <= number <= counted, reason)
        return [f"cuda:{index}" for index in range(number)]
    expect("devices", devices, isinstance(devices, Iterable), "'all', a number of CUDA devices or a list of names")
    names = [_name(each) for each in devices]
    expect("devices", devices, len(names) > 0, "at least one")
    return names


def split(passes: Sequence[Sequence[int]], costs: Sequence[float], devices: int) -> list[list[int]]:
    """Return the passes, each the numbers of its runs, cut into equal pieces until the devices are about equally busy.

    costs: of every run, in any unit. What is cut is the pass whose pieces cost most.
    """
    parts = [1] * len(passes)
    mean = sum(costs[run] for members in passes for run in members) / devices
    shortest, best = np.inf, [list(members) for members in passes]
    while True:
        cut = [np.array_split(np.array(members), count) for members, count in zip(passes, parts, strict=True)]
        pieces = [piece.tolist() for of in cut for piece in of]
        busiest = _busiest([sum(costs[run] for run in piece) for piece in pieces], devices)
        if busiest < shortest * (1 - 1e-9):
            shortest, best = busiest, pieces
        left = [at for at, members in enumerate(passes) if parts[at] < len(members)]
        if shortest <= SLACK * mean or not left or len(pieces) >= PIECES * devices:
            return best
        parts[max(left, key=lambda at: sum(costs[run] for run in cut[at][0]))] += 1


def _busiest(costs: Sequence[float], devices: int) -> float:
    """What the busiest device has when each takes the next costly piece once it is free."""
    busy = [0.0] * devices
    for cost in sorted(costs, reverse=True):
        busy[int(np.argmin(busy))] += cost
    return max(busy)


@contextmanager
def claimed(devices: Sequence[str], folder: Path) -> Iterator[str]:
    """Give one of the devices, which no other process gets meanwhile; waits until one is free.

    A device is a file lock, which the system releases if the process dies. One that this process had is preferred.
    """
    from filelock import FileLock, Timeout  # a GPU host may have PyTorch alone

    while True:
        for at in sorted(range(len(devices)), key=lambda at: devices[at] not in _used):
            lock = FileLock(folder / f"device.{at}")
            try:
                lock.acquire(blocking=False)
            except Timeout:
                continue
            try:
                _used.add(devices[at])
                yield devices[at]
            finally:
                lock.release()
            return
        time.sleep(WAIT)


def _name(device: Any) -> str:
    expect("devices", device, isinstance(device, str | torch.device), "names such as 'cuda:0'")
    try:
        named = torch.device(device)
    except RuntimeError:
        named = torch.device("meta")
    expect("devices", str(device), named.type in ("cpu", "cuda"), "'cpu' or 'cuda:0' and so on")
    if named.type == "cpu":
        return "cpu"
    resolve_device(str(named))
    counted = torch.cuda.device_count()
    index = torch.cuda.current_device() if named.index is None else named.index
    expect("devices", str(device), index < counted, f"'cuda:0' to 'cuda:{counted - 1}'")
    return f"cuda:{index}"
