"""Sparse completion line by line: both sparse products of a step, the residual never stored.

For a line of the matrix, a row i say: gather the right factors of its entries, form <left_i, right_j> - t_ij, and add
residual times right_j up at once; columns likewise from the other side. Each pass reads an entry's index, value and
k gathered numbers; that is all the traffic.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from compressible.descent.engines.base import Engine, Rate
from compressible.recovery.sparse import Side, SparseCompletion

Scales = tuple[float, float]  # what a line keeps of itself, and the step over N


class SparseLines(Engine):
    """Gradient descent in place; a subclass does one pass over the lines of a side."""

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
    def factors(self) -> list[Tensor]:  # type: ignore[override]  # computed
        """The current factors, views of the engine's own memory."""
        return [self.first.mT, *self.inner, self.last]

    def prepare(self, steps: int) -> None:
        """Compile, by a look at the losses."""
        self.evaluate()

    def advance(self, steps: int) -> None:
        for _ in range(steps):
            self._step()

    def evaluate(self) -> Tensor:
        right = self._rises()[-1]
        values = []
        for entries, sums in zip((self.problem.seen, self.problem.unseen), self.sums, strict=True):
            if entries is not None:
                self._measure(entries.rows, self.last, right, sums)
            values.append(sums.sum() / (2 * len(entries)) if entries is not None else sums.sum() * torch.nan)
        return torch.stack(values)

    def _step(self) -> None:
        rises, seen = self._rises(), self.problem.seen
        self._update(seen.columns, rises[-1], self.last, self.back, (0.0, -1 / len(seen)))
        scales = 1 - self.rates[-1] * self.decay, self.rates[-1] / len(seen)
        self._update(seen.rows, self.last, rises[-1], self.last, scales)
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

    @abstractmethod
    def _update(self, side: Side, own: Tensor, other: Tensor, out: Tensor, scales: Scales) -> None:
        """out <- shrink own - rate sum_j e_j other_j for every line, scales = (shrink, rate)."""

    @abstractmethod
    def _measure(self, side: Side, own: Tensor, other: Tensor, sums: Tensor) -> None:
        """sums <- sum_j e_j^2 of every line."""
