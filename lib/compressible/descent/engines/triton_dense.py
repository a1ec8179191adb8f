"""The Triton engines for entrywise problems whose factors are narrow; the kernels are in triton_dense_kernels.py.

`TritonPersistent` carries a stack of small problems through whole stretches in one launch, one program a problem,
records and stopping test on the device. `TritonTiled` takes two launches a step, replayed as CUDA graphs, and never
writes X or the residual to memory.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from compressible.descent.engines.base import Engine, Entrywise, Rate
from compressible.descent.engines.cuda_graphs import CapturedEngine
from compressible.descent.engines.triton_dense_kernels import residual_tiles, stretch, take_record, update_tiles
from compressible.recovery.problems import MatrixCompletion


class _PackedEngine(Engine):
    """The state that both Triton engines share: packed factors, target, role of each entry, rates over N."""

    def __init__(self, problem: Entrywise, factors: Sequence[Tensor], rates: Sequence[Rate], decay: float) -> None:
        self.single = factors[0].ndim == 2
        stacked = [factor[None] if self.single else factor for factor in factors]
        self.first, self.last = (stacked[i].clone(memory_format=torch.contiguous_format) for i in (0, -1))
        size, (m, n), k = len(self.first), problem.shape, self.first.shape[-2]
        inner = torch.stack(stacked[1:-1], 1) if len(stacked) > 2 else self.first.new_empty(size, 0, k, k)
        self.inner = inner.contiguous()
        self.size, self.depth, self.sizes = size, len(stacked), (m, n, k)
        self.seen, self.unseen, scales = _entries(problem, size)
        self.stride = 0 if len(self.seen) == 1 else m * n
        each = [torch.as_tensor(rate, dtype=problem.dtype, device=problem.device) for rate in rates]
        steps = torch.stack([rate.reshape(-1).expand(size) for rate in each], 1)
        self.shrinks = 1 - steps * decay
        self.rates = steps * scales[:, :1].to(steps.dtype)
        self.scales = scales.contiguous()
        self.alive = torch.ones(size, dtype=torch.int32, device=problem.device)
        self.tile = {"DEPTH": self.depth, "BK": max(16, _power(k)), "PRECISION": "ieee"}

    @property
    def factors(self) -> list[Tensor]:  # type: ignore[override]  # computed
        """The current factors, views of the engine's own memory."""
        parts = [self.first, *self.inner.unbind(1), self.last]
        return [part[0] for part in parts] if self.single else parts


class TritonPersistent(_PackedEngine):
    """Whole stretches in one launch, one program a problem; each problem stops at its own record."""

    name = "persistent"
    ahead = 256
    freezes = True
    blocks = {"BM": 64, "BN": 32, "num_warps": 4}  # noqa: RUF012

    def prepare(self, steps: int) -> None:
        """Compile the kernel: a run of no steps."""
        self.evaluate()

    def advance(self, steps: int) -> None:
        self._launch([steps], 0.0, self.alive.clone())

    def evaluate(self) -> Tensor:
        values, _ = self._launch([0], 0.0, torch.ones_like(self.alive))
        return values[0, 0] if self.single else values[:, 0]

    def run(self, lengths: Sequence[int], tolerance: float) -> tuple[Tensor, Tensor]:
        """Stretch after stretch, every problem until it stops."""
        values, taken = self._launch(lengths, tolerance, self.alive)
        return values.movedim(1, 0).cpu(), taken.cpu().long()

    def _launch(self, lengths: Sequence[int], tolerance: float, alive: Tensor) -> tuple[Tensor, Tensor]:
        device = self.first.device
        curves = torch.full((self.size, len(lengths), 2), torch.nan, dtype=torch.float64, device=device)
        taken = torch.zeros(self.size, dtype=torch.int32, device=device)
        plan = torch.tensor(lengths, dtype=torch.int32, device="cpu").to(device, non_blocking=True)
        level = torch.tensor(tolerance, dtype=torch.float64, device=device)
        scratch = torch.empty_like(self.first), torch.empty_like(self.first)
        stretch[(self.size,)](
            self.first, self.inner, self.last, *scratch, self.seen, self.unseen, self.scales, self.rates, self.shrinks,
            plan, curves, taken, alive, len(lengths), level, self.stride, *self.sizes, **self.tile, **self.blocks,
        )  # fmt: skip
        return curves, taken


class TritonTiled(_PackedEngine, CapturedEngine):
    """Two launches a step over tiles of X, replayed as a graph; partial products are summed in a fixed order."""

    name = "tiled"
    freezes = True

    def __init__(self, problem: Entrywise, factors: Sequence[Tensor], rates: Sequence[Rate], decay: float) -> None:
        _PackedEngine.__init__(self, problem, factors, rates, decay)
        self.device = problem.device
        (m, n, k), size, zeros = self.sizes, self.size, self.first.new_zeros
        few = -(-m // 64) * -(-n // 64) * size < 128  # large tiles would leave multiprocessors idle
        self.blocks = {"BM": 32 if few else 64, "BN": 32 if few else 64, "num_warps": 4}
        self.grid = (-(-m // self.blocks["BM"]), -(-n // self.blocks["BN"]), size)
        self.settled = torch.empty_like(self.inner)
        self.inner_parts = zeros(size, self.depth - 2, self.grid[1], k, k)
        self.back_parts = zeros(size, self.grid[0], k, n)
        self.last_parts = zeros(size, self.grid[1], m, k)
        self.sums = zeros(size, self.grid[0] * self.grid[1], 2, dtype=torch.float64)
        self.curves = torch.empty(self.ahead, size, 2, dtype=torch.float64, device=self.device)
        self.taken, self.tolerance = zeros(size, dtype=torch.int32), zeros((), dtype=torch.float64)
        # The step that the inner factors are owed when a launch begins: none so far.
        self.owed = [torch.zeros_like(self.rates), torch.ones_like(self.shrinks)]

    @property
    def factors(self) -> list[Tensor]:  # type: ignore[override]  # computed
        """The current factors; the inner ones with the step that they are owed."""
        rate, shrink = (owed[:, 1:-1, None, None] for owed in self.owed)
        inner = shrink * self.inner - rate * self.inner_parts.sum(2)
        parts = [self.first, *inner.unbind(1), self.last]
        return [part[0] for part in parts] if self.single else parts

    def prepare(self, steps: int) -> None:
        """Compile the kernels, by a step of size zero, and capture."""
        self._step(self.owed[0].clone(), self.owed[1].clone())
        self.evaluate()
        super().prepare(steps)
        self._record()

    def evaluate(self) -> Tensor:
        alive, self.alive = self.alive, torch.ones_like(self.alive)
        self.taken.zero_()
        self._take_record()
        self.alive = alive
        values = self.curves[0].clone()
        return values[0] if self.single else values

    def run(self, lengths: Sequence[int], tolerance: float) -> tuple[Tensor, Tensor]:
        """Stretch after stretch, every problem until it stops."""
        self.tolerance.fill_(tolerance)
        self.taken.zero_()
        for length in lengths:
            self.advance(length)
            self._record().replay()
        return self.curves[: len(lengths)].cpu(), self.taken.cpu().long()

    def _record(self) -> torch.cuda.CUDAGraph:
        return self._graph("record", 0, self._take_record)

    def _take(self, steps: int) -> None:
        for _ in range(steps):
            self._step(self.rates, self.shrinks)

    def _step(self, rates: Tensor, shrinks: Tensor) -> None:
        self._residual(measure=False)
        rows, columns, size = self.grid
        update_tiles[(columns + rows, size)](
            self.first, self.inner, self.settled, self.inner_parts, self.last, rates, shrinks, *self.owed,
            self.back_parts, self.last_parts, self.alive, rows, columns, *self.sizes, **self.tile, **self.blocks,
        )  # fmt: skip

    def _residual(self, measure: bool) -> None:
        residual_tiles[self.grid](
            self.first, self.inner, self.settled, self.inner_parts, self.last, self.seen, self.unseen, *self.owed,
            self.back_parts, self.last_parts, self.sums, self.alive, self.stride, *self.sizes, **self.tile,
            **self.blocks, MEASURE=measure,
        )  # fmt: skip

    def _take_record(self) -> None:
        self._residual(measure=True)
        take_record[(self.size,)](
            self.sums, self.scales, self.curves, self.taken, self.alive, self.tolerance, self.sums.shape[1], BLOCK=128
        )


def _entries(problem: Entrywise, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Targets that count for the loss and for the error (S or 1, m, n), NaN elsewhere; 1/N of both means (S, 2)."""
    if not isinstance(problem, MatrixCompletion):
        target = _stack(problem.target)
        scales = torch.full((size, 2), 1 / (target.shape[-1] * target.shape[-2]), dtype=torch.float64, device="cpu")
        return target, target, scales.to(target.device)
    shown = [torch.where(weight > 0, problem.target, torch.nan) for weight in problem.weights.unbind(-3)]
    scales = problem.weights.amax((-2, -1)).to(torch.float64).expand(size, 2)
    seen, unseen = (_stack(part) for part in shown)
    return seen, unseen, scales


def _stack(matrix: Tensor) -> Tensor:
    """(S, m, n), or (1, m, n) where all problems share one."""
    shared = matrix.ndim == 2 or matrix.stride(0) == 0
    return (matrix if not shared else matrix.reshape(-1, *matrix.shape[-2:])[:1]).contiguous()


def _power(number: int) -> int:
    return 1 << (number - 1).bit_length()
