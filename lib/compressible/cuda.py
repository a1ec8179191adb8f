"""CUDA graphs of whole stretches, and which CUDA engine serves which problem.

`Kept` looks at a record only after the next stretch is under way, so that the device does not wait, and keeps the state
of the record before for when the run should have ended there. `Graphed` replays what `Fused` does; narrow.py has the
engines for narrow factors, sampled.py those for sparse observations.
"""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .engines import Fused, Rate, Stepping, goes_on
from .problems import MatrixSensing, Problem

LONGEST = 128  # steps in one graph: longer ones save nothing more and take longer to capture
NARROW = 64  # width up to which a tile of X costs less to make again than to read
SMALL = (256, 32)  # columns and width up to which one program holds W_1 in registers
DEEPEST = 5  # factors that the kernels are written out for


def interpreted() -> bool:
    """Whether Triton runs its kernels in its Python interpreter, on CPU tensors (TRITON_INTERPRET=1)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def suited(problem: Problem, factors: Sequence[Tensor]) -> str:
    """Return the name of the engine that `auto` takes on a CUDA device, the fastest as measured on an H200."""
    narrow = _width(factors) <= NARROW and len(factors) <= DEEPEST
    return "tiled" if narrow and not isinstance(problem, MatrixSensing) and has_triton() else "graphed"


def checked(name: str, problem: Problem, factors: Sequence[Tensor]) -> type[Stepping]:
    """Return the class of "graphed", "tiled" or "persistent"; ValueError where it cannot do the problem."""
    kind = f"{type(problem).__name__} {problem.shape} with {len(factors)} factors of width {_width(factors)}"
    where = f"engine {name!r} got {kind} on {problem.device}"
    if problem.device.type != "cuda" and not (interpreted() and name == "persistent"):
        raise ValueError(f"{where}, expected a CUDA device")
    if name == "graphed":
        return Graphed
    limits = (*SMALL, DEEPEST) if name == "persistent" else (math.inf, NARROW, DEEPEST)
    found = (problem.shape[1], _width(factors), len(factors))
    if isinstance(problem, MatrixSensing) or any(a > b for a, b in zip(found, limits, strict=True)):
        raise ValueError(f"{where}, expected an entrywise problem with columns, width and depth at most {limits}")
    if not has_triton():
        raise ValueError(f"{where}, expected triton to be installed")
    from . import narrow  # which builds on this module

    return narrow.Persistent if name == "persistent" else narrow.Tiled


class Captured(Stepping):
    """Stretches replayed as CUDA graphs, each captured once; a subclass takes the steps in place."""

    ahead = 32
    device: torch.device

    def _take(self, steps: int) -> None:
        raise NotImplementedError

    def prepare(self, steps: int) -> None:
        """Capture what stretches of `steps` need, before the clock starts."""
        self._graphs: dict[tuple[str, int], torch.cuda.CUDAGraph] = {}
        for length in {min(steps, LONGEST), steps % LONGEST} - {0}:
            self._stretch(length)

    def advance(self, steps: int) -> None:
        """Take `steps` gradient steps."""
        while steps:
            length = min(steps, LONGEST)
            self._stretch(length).replay()
            steps -= length

    def _stretch(self, length: int) -> torch.cuda.CUDAGraph:
        return self._graph("stretch", length, lambda: self._take(length))

    def _graph(self, kind: str, number: int, work: Callable[[], None]) -> torch.cuda.CUDAGraph:
        if (kind, number) not in self._graphs:
            graph = torch.cuda.CUDAGraph()
            # thread_local: threads of other libraries, JAX's say, may allocate meanwhile
            with torch.cuda.device(self.device), torch.cuda.graph(graph, capture_error_mode="thread_local"):
                work()
            self._graphs[kind, number] = graph
        return self._graphs[kind, number]


class Kept(Captured):
    """Captured stretches whose records are looked at one behind, the state of the record before kept meanwhile."""

    state: list[Tensor]  # all that a step changes

    def prepare(self, steps: int) -> None:
        """Capture what stretches of `steps` need, before the clock starts."""
        self._kept = [[torch.empty_like(part) for part in self.state] for _ in range(2)]
        self._seen = torch.empty_like(self.evaluate())
        super().prepare(steps)
        for turn in range(2):
            self._record(turn)

    def walk(self, lengths: Sequence[int], tolerance: float) -> tuple[Tensor, None]:
        """Stretch after stretch, up to the first record at which a problem stops."""
        values = torch.empty(len(lengths), *self._seen.shape, dtype=self._seen.dtype, pin_memory=True)
        events = []
        for index, length in enumerate(lengths):
            self.advance(length)
            self._record(index % 2).replay()
            values[index].copy_(self._seen, non_blocking=True)
            events.append(torch.cuda.Event())
            events[-1].record()
            if index and self._ended(values[index - 1], events[index - 1], tolerance):
                torch._foreach_copy_(self.state, self._kept[(index - 1) % 2])
                return values[:index].reshape(index, -1, 2), None
        events[-1].synchronize()
        return values.reshape(len(values), -1, 2), None

    def _record(self, turn: int) -> torch.cuda.CUDAGraph:
        return self._graph("record", turn, lambda: self._look_and_keep(turn))

    def _look_and_keep(self, turn: int) -> None:
        self._seen.copy_(self.evaluate())
        torch._foreach_copy_(self._kept[turn], self.state)

    def _ended(self, record: Tensor, event: torch.cuda.Event, tolerance: float) -> bool:
        event.synchronize()
        return not all(goes_on(loss, tolerance) for loss in record.reshape(-1, 2)[:, 0].tolist())


class Graphed(Kept, Fused):
    """`Fused` in CUDA graphs: any problem, any width; its arithmetic is cuBLAS."""

    def __init__(self, problem: Problem, factors: Sequence[Tensor], rates: Sequence[Rate], decay: float) -> None:
        Fused.__init__(self, problem, factors, rates, decay)
        self.device, self.state = problem.device, self.factors
        start = [factor.clone() for factor in self.factors]
        Fused.advance(self, 1)  # cuBLAS makes its workspaces before they would be captured
        torch._foreach_copy_(self.factors, start)

    def evaluate(self) -> Tensor:
        """Return loss and error as (..., 2) at the current iterate."""
        return Fused.evaluate(self)

    def _take(self, steps: int) -> None:
        Fused.advance(self, steps)


def _width(factors: Sequence[Tensor]) -> int:
    return max(factor.shape[-2] for factor in factors[:-1])


def has_triton() -> bool:
    """Whether triton is installed."""
    return importlib.util.find_spec("triton") is not None
