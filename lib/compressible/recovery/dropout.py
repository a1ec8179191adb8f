"""Two factors of a matrix that is seen whole, under dropout on their hidden units: the loss in expectation."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor

from compressible.recovery.checks import REAL, expect_one_batch, expect_tensor
from compressible.recovery.factors import multiply
from compressible.recovery.problem_base import DenseProblem, pick
from compressible.recovery.theory import dropout
from compressible.runtime.checks import expect

_NOT_OF_THE_PRODUCT = 'the loss under dropout is no function of the product, expected engine "reference"'


class DropoutFactorization(DenseProblem):
    """Factor Phi in two while hidden units are dropped: what `MatrixFactorization` becomes in the mean over masks.

    The loss is 1/2 (||W_2 W_1 - Phi||_F^2 + lambda sum_i ||w2_i||^2 ||w1_i||^2) / (m n), lambda = (1 - theta) / theta,
    w1_i the rows of W_1. For outputs Y = Phi X of inputs with X X^T = I it is the loss of the network up to a constant.
    The error is its first part. It is no function of the product: "reference" alone takes its steps, "auto" picks it.

    Args:
        target: Phi (..., m, n), floating point and finite; leading dimensions are a stack of problems.
        keep: theta in (0, 1], the probability with which a unit is kept; a number or one for each problem (...).

    Raises:
        ValueError: on a keep rate out of range or a target that is not finite.

    Example:
        >>> import torch, compressible as cd
        >>> from compressible.recovery.dropout import DropoutFactorization
        >>> problem, factors = DropoutFactorization(torch.eye(2), keep=0.4), [torch.eye(2), torch.eye(2)]
        >>> [round(part.item(), 6) for part in problem.evaluate_factors(factors)]  # lambda = 1.5, two units of norm 1
        [0.375, 0.0]

    Reference:
        P3, Example 4.1.
    """

    def __init__(self, target: Tensor, keep: float | Tensor) -> None:
        self._adopt(target, "target")
        if not bool(torch.isfinite(target).all()):
            raise ValueError("target holds values that are not finite, expected finite ones")
        self.target = target.detach().clone()  # the caller may go on to write into its own
        _check_keep(keep)
        self.keep = torch.as_tensor(keep, dtype=self.dtype, device=self.device).detach()
        self.strength = torch.as_tensor(dropout.strength(self.keep))
        self.batch_shape = expect_one_batch({"target": self.batch_shape, "keep": tuple(self.keep.shape)})

    def evaluate_factors(self, factors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        size = 2 * math.prod(self.shape)
        fit = (multiply(factors) - self.target).square().sum((-2, -1)) / size
        return fit + self.strength * dropout.penalty(factors) / size, fit

    def factor_gradients(self, factors: Sequence[Tensor]) -> list[Tensor]:
        first, second = factors
        rest, lam = second @ first - self.target, self.strength[..., None]
        rows = lam * second.square().sum(-2)  # (..., h), what each row of W_1 is drawn to zero with
        columns = lam * first.square().sum(-1)
        gradients = [second.mT @ rest + rows[..., :, None] * first, rest @ first.mT + columns[..., None, :] * second]
        return [gradient / math.prod(self.shape) for gradient in gradients]

    def gradient(self, product: Tensor, out: Tensor | None = None) -> Tensor:
        raise NotImplementedError(_NOT_OF_THE_PRODUCT)

    def evaluate(self, product: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError(_NOT_OF_THE_PRODUCT)

    def surrogate(self) -> Tensor:
        return self.target.clone()

    def select(self, index: Tensor, batch_shape: tuple[int, ...]) -> DropoutFactorization:
        part = copy.copy(self)  # the constructor would wait for a GPU to look at all once more
        part.batch_shape = (len(index),)
        part.target = pick(self.target, index, batch_shape)
        part.keep, part.strength = (pick(each, index, batch_shape, trailing=0) for each in (self.keep, self.strength))
        return part

    def stacked(self, problems: Sequence[Self]) -> DropoutFactorization:
        whole = copy.copy(self)
        whole.batch_shape = (len(problems), *self.batch_shape)
        for name, inner in (("target", self.shape), ("keep", ()), ("strength", ())):
            parts = [getattr(problem, name).expand((*self.batch_shape, *inner)) for problem in problems]
            setattr(whole, name, torch.stack(parts))
        return whole


def _check_keep(keep: object) -> None:
    told = "keep rates in (0, 1]: a number, or one for each problem (...)"
    try:
        rates = keep if isinstance(keep, Tensor) else torch.as_tensor(keep, device="cpu")
    except (TypeError, ValueError, RuntimeError, OverflowError):  # text, None, ragged lists, huge integers
        rates = torch.tensor(math.nan, device="cpu")
    expect_tensor("keep", rates, told, REAL)
    expect("keep", keep, bool(((rates > 0) & (rates <= 1)).all()), told)
