"""plain PyTorch, the oracle"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from compressible.descent.engines.base import Rate, Stepping
from compressible.recovery.factors import layer_gradients, product
from compressible.recovery.problems import Problem
from compressible.recovery.sparse import SparseCompletion


class Reference(Stepping):
    """Plain closed-form gradient descent on any device, one readable expression per quantity."""

    def __init__(self, problem: Problem, factors: Sequence[Tensor], rates: Sequence[Rate], decay: float) -> None:
        self.problem, self.rates, self.decay = problem, list(rates), decay
        self.factors = [factor.clone() for factor in factors]

    def advance(self, steps: int) -> None:
        """Take `steps` gradient steps."""
        for _ in range(steps):
            gradients = layer_gradients(self.factors, self.problem)
            self.factors = [
                (1 - rate * self.decay) * factor - rate * gradient
                for factor, gradient, rate in zip(self.factors, gradients, self.rates, strict=True)
            ]

    def evaluate(self) -> Tensor:
        """Return loss and error as (..., 2) at the current iterate."""
        return torch.stack(self.problem.evaluate(product(self.factors)), -1)


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
