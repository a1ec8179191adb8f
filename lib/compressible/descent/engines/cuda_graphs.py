"""Whole stretches of descent replayed as CUDA graphs: no launch is paid for but that of the graph.

`CapturedEngine` captures and replays, `RewindingEngine` looks at records without making the device wait, and
`GraphedFused` replays what `Fused` does. Narrow factors have engines in triton_dense.py, sparse entries in
sparse_cuda.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from compressible.descent.engines.base import Engine, Rate, goes_on
from compressible.descent.engines.fused import Fused
from compressible.recovery.problems import DenseProblem

LONGEST = 128  # steps in one graph: longer ones save nothing more and take longer to capture


class CapturedEngine(Engine):
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


class RewindingEngine(CapturedEngine):
    """Looks at a record only after the next stretch is under way, and goes back to it where the run ended there."""

    state: list[Tensor]  # all that a step changes

    def prepare(self, steps: int) -> None:
        """Capture what stretches of `steps` need, before the clock starts."""
        self._kept = [[torch.empty_like(part) for part in self.state] for _ in range(2)]
        self._seen = torch.empty_like(self.evaluate())
        super().prepare(steps)
        for turn in range(2):
            self._record(turn)

    def run(self, lengths: Sequence[int], tolerance: float) -> tuple[Tensor, None]:
        """Stretch after stretch, up to the first record at which a problem stops."""
        values = torch.empty(len(lengths), *self._seen.shape, dtype=self._seen.dtype, device="cpu", pin_memory=True)
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


class GraphedFused(RewindingEngine, Fused):
    """`Fused` in CUDA graphs: any dense problem, any width; its arithmetic is cuBLAS."""

    name = "graphed"

    def __init__(self, problem: DenseProblem, factors: Sequence[Tensor], rates: Sequence[Rate], decay: float) -> None:
        Fused.__init__(self, problem, factors, rates, decay)
        self.device, self.state = problem.device, self.factors
        start = [factor.clone() for factor in self.factors]
        Fused.advance(self, 1)  # cuBLAS makes its workspaces before they would be captured
        torch._foreach_copy_(self.factors, start)

    def _take(self, steps: int) -> None:
        Fused.advance(self, steps)
