"""The engines of sparse completion: both sparse products of a step taken line by line, the residual never stored.

For a line of the matrix, a row i say: gather the right factors of its entries, form <left_i, right_j> - t_ij, and add
residual times right_j up at once; columns likewise from the other side. Each pass reads an entry's index, value and
k gathered numbers; that is all the traffic. `SparseReference` is the plain PyTorch that both are tested against.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numba import njit
from torch import Tensor

from compressible.descent.engines.base import Rate, Stepping
from compressible.descent.engines.numba_stack import OPTIONS, cores, pool
from compressible.recovery.sparse import Side, SparseCompletion

Scales = tuple[float, float]  # what a line keeps of itself, and the step over N


class Sampled(Stepping):
    """The same steps line by line, in place; `_lines` does one pass. CPU: numba, lines spread over the cores."""

    def __init__(
        self, problem: SparseCompletion, factors: Sequence[Tensor], rates: Sequence[Rate], decay: float
    ) -> None:
        self.problem, self.device, self.rates, self.decay = problem, problem.device, [float(r) for r in rates], decay
        self.first = factors[0].mT.clone(memory_format=torch.contiguous_format)  # (n, k): a column's numbers together
        self.inner = [factor.clone() for factor in factors[1:-1]]
        self.last = factors[-1].clone(memory_format=torch.contiguous_format)
        self.state = [self.first, *self.inner, self.last]
        self.back = torch.empty_like(self.first)
        counts = [problem.shape[0], problem.shape[0] if problem.unseen is not None else 0]
        self.sums = [torch.zeros(count, dtype=torch.float64, device=self.device) for count in counts]

    @property
    def factors(self) -> list[Tensor]:
        """The current factors, views of the engine's own memory."""
        return [self.first.mT, *self.inner, self.last]

    def prepare(self, steps: int) -> None:
        """Compile, by a look at the losses."""
        self.evaluate()

    def advance(self, steps: int) -> None:
        """Take `steps` gradient steps."""
        for _ in range(steps):
            self._step()

    def evaluate(self) -> Tensor:
        """Return loss and error as (2,) at the current iterate."""
        right = self._rises()[-1]
        values = []
        for entries, sums in zip((self.problem.seen, self.problem.unseen), self.sums, strict=True):
            if entries is not None:
                self._lines(entries.rows, self.last, right, None, (0.0, 0.0), sums)
            values.append(sums.sum() / (2 * len(entries)) if entries is not None else sums.sum() * torch.nan)
        return torch.stack(values)

    def _step(self) -> None:
        rises, seen = self._rises(), self.problem.seen
        self._lines(seen.columns, rises[-1], self.last, self.back, (0.0, -1 / len(seen)), None)
        scales = 1 - self.rates[-1] * self.decay, self.rates[-1] / len(seen)
        self._lines(seen.rows, self.last, rises[-1], self.last, scales, None)
        back = self.back
        for factor, below, rate in zip(self.inner[::-1], rises[-2::-1], self.rates[-2:0:-1], strict=True):
            gradient = back.mT @ below
            back = back @ factor
            factor.mul_(1 - rate * self.decay).sub_(gradient, alpha=rate)
        self.first.mul_(1 - self.rates[0] * self.decay).sub_(back, alpha=self.rates[0])

    def _rises(self) -> list[Tensor]:
        """(W_l ... W_1)^T, each (n, k), for l = 1, ..., L - 1."""
        rises = [self.first]
        for factor in self.inner:
            rises.append(rises[-1] @ factor.mT)
        return rises

    def _lines(
        self, side: Side, own: Tensor, other: Tensor, out: Tensor | None, scales: Scales, sums: Tensor | None
    ) -> None:
        """out <- shrink own - rate sum_j e_j other_j for every line, scales = (shrink, rate); or sum e_j^2 to sums."""
        arrays = [part.numpy() for part in (side.pointers, side.indices, side.values, own, other)]
        measure = sums is not None
        target = arrays[3] if measure else out.numpy()
        squares = sums.numpy() if measure else np.empty(0)
        bounds = np.searchsorted(arrays[0], np.linspace(0, arrays[0][-1], cores() + 1)[1:-1])
        edges = [0, *bounds.tolist(), len(arrays[0]) - 1]  # as many entries for each core

        def work(part: int) -> None:
            _pass(*arrays, target, squares, *scales, measure, edges[part], edges[part + 1])

        spread(work, cores())


def spread(work: Callable[[int], None], parts: int) -> None:
    """Do `work` for each of `parts`, side by side."""
    if parts == 1:
        work(0)
    else:
        list(pool().map(work, range(parts)))


@njit(**OPTIONS)
def _pass(pointers, indices, values, own, other, out, sums, shrink, rate, measure, begin, end):
    """Lines `begin` to `end`, two entries at a time: their sums hide each other's latency."""
    width = own.shape[1]
    mine, total = np.empty(width, own.dtype), np.empty(width, own.dtype)
    for line in range(begin, end):
        for c in range(width):
            mine[c], total[c] = own[line, c], 0
        squares = 0.0
        at, stop = pointers[line], pointers[line + 1]
        while at + 1 < stop:
            far, next_far = indices[at], indices[at + 1]
            residual, next_residual = -values[at], -values[at + 1]
            for c in range(width):
                residual += mine[c] * other[far, c]
                next_residual += mine[c] * other[next_far, c]
            squares += residual * residual + next_residual * next_residual
            for c in range(width):
                total[c] += residual * other[far, c] + next_residual * other[next_far, c]
            at += 2
        if at < stop:
            far, residual = indices[at], -values[at]
            for c in range(width):
                residual += mine[c] * other[far, c]
            squares += residual * residual
            for c in range(width):
                total[c] += residual * other[far, c]
        if measure:
            sums[line] = squares
        else:
            for c in range(width):
                out[line, c] = shrink * mine[c] - rate * total[c]
