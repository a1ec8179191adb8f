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

from .compiled import OPTIONS, cores, pool
from .cuda import Kept
from .engines import Rate, Stepping
from .sparse import Side, SparseCompletion

Scales = tuple[float, float]  # what a line keeps of itself, and the step over N


class SparseReference(Stepping):
    """Plain closed-form descent: residual at the entries, two products with sparse CSR tensors, any device."""

    def __init__(
        self, problem: SparseCompletion, factors: Sequence[Tensor], rates: Sequence[Rate], decay: float
    ) -> None:
        self.problem, self.rates, self.decay = problem, list(rates), decay
        self.factors = [factor.clone() for factor in factors]

    def advance(self, steps: int) -> None:
        """Take `steps` gradient steps."""
        for _ in range(steps):
            self.factors = [
                (1 - rate * self.decay) * factor - rate * gradient
                for factor, gradient, rate in zip(self.factors, self._gradients(), self.rates, strict=True)
            ]

    def evaluate(self) -> Tensor:
        """Return loss and error as (2,) at the current iterate."""
        return torch.stack(self.problem.evaluate_factors(self.factors))

    def _gradients(self) -> list[Tensor]:
        prefixes, seen, last = [self.factors[0]], self.problem.seen, self.factors[-1]
        for factor in self.factors[1:-1]:
            prefixes.append(factor @ prefixes[-1])
        residual = seen.residual(last, prefixes[-1].mT.contiguous()) / len(seen)
        gradients = [seen.matrix(residual) @ prefixes[-1].mT]
        back = (seen.matrix(residual, transposed=True) @ last).mT
        for factor, below in zip(reversed(self.factors[1:-1]), reversed(prefixes[:-1]), strict=True):
            gradients.append(back @ below.mT)
            back = factor.mT @ back
        return [back, *reversed(gradients)]


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


class SampledCuda(Kept, Sampled):
    """`Sampled` on a CUDA device: a Triton program a line, stretches replayed as graphs."""

    blocks = {"BE": 32, "num_warps": 2}  # noqa: RUF012

    def __init__(
        self, problem: SparseCompletion, factors: Sequence[Tensor], rates: Sequence[Rate], decay: float
    ) -> None:
        self._scales: dict[tuple[float, float], Tensor] = {}
        Sampled.__init__(self, problem, factors, rates, decay)
        start = [part.clone() for part in self.state]
        Sampled.advance(self, 1)  # compiles, and cuBLAS makes its workspaces before they would be captured
        torch._foreach_copy_(self.state, start)

    def _take(self, steps: int) -> None:
        Sampled.advance(self, steps)

    def evaluate(self) -> Tensor:
        """Return loss and error as (2,) at the current iterate."""
        return Sampled.evaluate(self)

    def _lines(
        self, side: Side, own: Tensor, other: Tensor, out: Tensor | None, scales: Scales, sums: Tensor | None
    ) -> None:
        from .sparse_kernels import line_pass

        width = own.shape[1]
        if scales not in self._scales:  # on the device, since Triton rounds numbers passed by value to float32
            self._scales[scales] = torch.tensor(scales, dtype=own.dtype, device=self.device)
        line_pass[(len(own),)](
            side.pointers, side.indices, side.values, own, other, own if out is None else out,
            own if sums is None else sums, self._scales[scales], width, BK=max(16, 1 << (width - 1).bit_length()),
            MEASURE=sums is not None, **self.blocks,
        )  # fmt: skip
