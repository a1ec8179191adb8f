"""A matrix seen through linear measurements: the same operators for all problems of a stack, held once."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor

from compressible.recovery.checks import expect_measurements
from compressible.recovery.problem_base import DenseProblem, pick


class MatrixSensing(DenseProblem):
    """Recover a matrix from linear measurements y_i = <A_i, X*>: loss 1/2 sum_i (<A_i, X> - y_i)^2.

    Args:
        operators: A (k, m, n), shared by all problems of a stack and kept once, as given.
        measurements: y (..., k); leading dimensions are a stack of problems.
        target: X* (..., m, n), for the recovery error ||X - X*||_F / ||X*||_F alone; without it the error is NaN, also
            in a stack with others that have one.

    Raises:
        ValueError: where shapes, types or devices disagree, or a value is not finite.

    Example:
        >>> import torch, compressible as cd
        >>> operators, target = torch.ones(5, 3, 2), torch.ones(3, 2)
        >>> problem = cd.MatrixSensing(operators, torch.einsum("kmn,mn->k", operators, target), target)
        >>> problem.loss(torch.zeros(3, 2)).item(), problem.error(torch.zeros(3, 2)).item()
        (90.0, 1.0)

    Reference:
        P2's matrix sensing, with the operators of `gaussian_operators`.
    """

    def __init__(self, operators: Tensor, measurements: Tensor, target: Tensor | None = None) -> None:
        self._adopt(operators, "operators")
        if operators.ndim != 3:
            raise ValueError(f"operators have shape {tuple(operators.shape)}, expected (k, m, n)")
        batch_shape = expect_measurements(operators, measurements, target)
        for name, given in (("operators", operators), ("measurements", measurements), ("target", target)):
            # both ends, without another array of its size
            if given is not None and not all(bool(torch.isfinite(end).all()) for end in given.aminmax()):
                raise ValueError(f"{name} hold values that are not finite, expected finite ones")
        # Copies, which nobody else writes into; the operators are too large for that.
        self.operators, self.measurements = operators, measurements.detach().clone()
        self.target = None if target is None else target.detach().clone()
        self._rows = operators.detach().reshape(operators.shape[0], -1)  # (k, m n), a view: the operator is held once
        self.batch_shape = batch_shape

    def residual(self, product: Tensor) -> Tensor:
        """Return <A_i, X> - y_i as (..., k) at X = `product` (..., m, n)."""
        return product.flatten(-2) @ self._rows.T - self.measurements

    def gradient(self, product: Tensor, out: Tensor | None = None) -> Tensor:
        result = (self.residual(product) @ self._rows).unflatten(-1, self.shape)
        return result if out is None else out.copy_(result)

    def evaluate(self, product: Tensor) -> tuple[Tensor, Tensor]:
        loss = self.residual(product).square().sum(-1) / 2
        if self.target is None:
            return loss, torch.full_like(loss, math.nan)
        norms = torch.linalg.matrix_norm(product - self.target), torch.linalg.matrix_norm(self.target)
        return loss, norms[0] / norms[1]

    def surrogate(self) -> Tensor:
        return (self.measurements @ self._rows).unflatten(-1, self.shape) / self._rows.shape[0]

    def select(self, index: Tensor, batch_shape: tuple[int, ...]) -> MatrixSensing:
        part = copy.copy(self)  # the constructor would read all operators once more
        part.batch_shape = (len(index),)
        part.measurements = pick(self.measurements, index, batch_shape, trailing=1).clone()
        part.target = None if self.target is None else pick(self.target, index, batch_shape).clone()
        return part

    def stacked(self, problems: Sequence[Self]) -> MatrixSensing:
        if any(problem.operators is not self.operators for problem in problems):
            many = "they would be held many times"
            raise ValueError(f"cannot stack problems of sensing with different operators, expected the same: {many}")
        measurements = [problem.measurements.expand((*self.batch_shape, -1)) for problem in problems]
        whole = copy.copy(self)
        whole.batch_shape = (len(problems), *self.batch_shape)
        whole.measurements, whole.target = torch.stack(measurements), None
        if any(problem.target is not None for problem in problems):
            unknown = torch.full(self.shape, math.nan, dtype=self.dtype, device=self.device)  # whose error is NaN
            targets = [unknown if problem.target is None else problem.target for problem in problems]
            whole.target = torch.stack([target.expand((*self.batch_shape, *self.shape)) for target in targets])
        return whole
