"""Plain PyTorch, readable and on any device: what the other engines are tested against."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from compressible.descent.engines.base import Engine, Rate
from compressible.recovery.problems import Problem


class Reference(Engine):
    """Closed-form gradient descent, one readable expression per quantity; any problem, dense or sparse."""

    name = "reference"

    def __init__(self, problem: Problem, factors: Sequence[Tensor], rates: Sequence[Rate], decay: float) -> None:
        self.problem, self.rates, self.decay = problem, list(rates), decay
        self.factors = [factor.clone() for factor in factors]

    def advance(self, steps: int) -> None:
        for _ in range(steps):
            gradients = self.problem.factor_gradients(self.factors)
            self.factors = [
                (1 - rate * self.decay) * factor - rate * gradient
                for factor, gradient, rate in zip(self.factors, gradients, self.rates, strict=True)
            ]

    def evaluate(self) -> Tensor:
        return torch.stack(self.problem.evaluate_factors(self.factors), -1)
