"""What every recovery problem offers, and the base of those that are functions of the (m, n) product X alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol, Self

import numpy as np
import torch
from torch import Tensor

from compressible.recovery.factors import product
from compressible.runtime.checks import expect

PRECISIONS = (torch.float32, torch.float64)  # half types have no SVD, and lose what a descent has to tell apart


class Problem(Protocol):
    """What `descend` and the compressed starts ask of a problem, dense or sparse; `shape` is (m, n)."""

    shape: tuple[int, int]
    batch_shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def evaluate_factors(self, factors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Return the training loss and the recovery error, each (...), of [W_1, ..., W_L]."""
        raise NotImplementedError

    def factor_gradients(self, factors: Sequence[Tensor]) -> list[Tensor]:
        """Return [dLoss/dW_1, ..., dLoss/dW_L], shaped as the factors, in closed form."""
        raise NotImplementedError

    def surrogate(self) -> Tensor:
        """Return the (..., m, n) matrix whose leading singular vectors start a compressed network (P2)."""
        raise NotImplementedError


class DenseProblem(Problem):
    """A `Problem` whose loss is a function of X = W_L ... W_1 (m, n); problems stack along leading dimensions.

    A subclass needs what it is asked for: `gradient` for the steps, `evaluate` for the records, `surrogate` for P2's
    start, `select` and `stacked` to be part of a stack.
    """

    def gradient(self, product: Tensor, out: Tensor | None = None) -> Tensor:
        """Return dLoss/dX (..., m, n) at X = `product` (..., m, n)."""
        raise NotImplementedError

    def evaluate(self, product: Tensor) -> tuple[Tensor, Tensor]:
        """Return the training loss and the recovery error, each (...), at X = `product` (..., m, n)."""
        raise NotImplementedError

    def select(self, index: Tensor, batch_shape: tuple[int, ...]) -> DenseProblem:
        """Return the problem of the flat positions `index` of a stack of shape `batch_shape`."""
        raise NotImplementedError

    def stacked(self, problems: Sequence[Self]) -> DenseProblem:
        """Return `problems`, all like this one, as one stack; call `stack_problems`, which checks them."""
        raise NotImplementedError

    def watch(self, product: Tensor, scratch: Tensor) -> Callable[[], Tensor]:
        """Return a function that gives loss and error as (..., 2) at what the buffer `product` holds by then.

        `scratch` (..., m, n) may be overwritten. Views and weights are made once: at every record they would cost more
        than the arithmetic.
        """
        return lambda: torch.stack(self.evaluate(product), -1)

    def evaluate_factors(self, factors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        return self.evaluate(product(factors))

    def factor_gradients(self, factors: Sequence[Tensor]) -> list[Tensor]:
        prefixes = [factors[0]]
        for factor in factors[1:]:
            prefixes.append(factor @ prefixes[-1])
        back = self.gradient(prefixes[-1])
        gradients = []
        for factor, below in zip(reversed(factors[1:]), reversed(prefixes[:-1]), strict=True):
            gradients.append(back @ below.mT)
            back = factor.mT @ back
        return [back, *reversed(gradients)]

    def loss(self, product: Tensor) -> Tensor:
        """Return the training loss (...) at X = `product` (..., m, n)."""
        return self.evaluate(product)[0]

    def error(self, product: Tensor) -> Tensor:
        """Return the recovery error (...) at X = `product` (..., m, n)."""
        return self.evaluate(product)[1]

    def _adopt(self, matrix: Tensor, name: str) -> None:
        """Take shape, batch shape, type and device from a matrix (..., m, n)."""
        check_tensor(name, matrix)
        if matrix.ndim < 2 or matrix.dtype not in PRECISIONS or matrix.numel() == 0:
            got = f"{name} has shape {tuple(matrix.shape)} and dtype {matrix.dtype}"
            raise ValueError(f"{got}, expected a non-empty floating-point (..., m, n) in float32 or float64")
        self.shape = (matrix.shape[-2], matrix.shape[-1])
        self.batch_shape = tuple(matrix.shape[:-2])
        self.dtype, self.device = matrix.dtype, matrix.device


def check_tensor(name: str, value: object) -> None:
    """Raise ValueError unless `value` is a tensor; an array is told how to become one."""
    hint = " (torch.from_numpy makes one of an array)" if isinstance(value, np.ndarray) else ""
    expect(f"type of {name}", type(value).__name__, isinstance(value, Tensor), f"a torch tensor{hint}")


def stack_problems(problems: Sequence[Problem]) -> DenseProblem:
    """Return one problem whose leading dimension runs over problems of one kind, shape and batch shape.

    Args:
        problems: S dense problems; sensing problems must share their operators, which are kept once.

    Returns:
        A problem of batch shape (S, ...).

    Raises:
        ValueError: where they differ, or where they are sparse, which do not stack.

    Example:
        >>> import compressible as cd
        >>> runs = [cd.MatrixFactorization(cd.low_rank_target((8, 6), rank=2)) for _ in range(3)]
        >>> cd.stack_problems(runs).batch_shape
        (3,)
    """
    kinds = {(type(problem), problem.shape, problem.batch_shape) for problem in problems}
    dense = [problem for problem in problems if isinstance(problem, DenseProblem)]
    if len(kinds) != 1 or len(dense) < len(problems):
        found = sorted(f"{kind.__name__} {shape} {batch}" for kind, shape, batch in kinds)
        raise ValueError(f"cannot stack {found}, expected one dense kind, shape and batch shape")
    return dense[0].stacked(dense)


def pick(tensor: Tensor, index: Tensor, batch_shape: tuple[int, ...], trailing: int = 2) -> Tensor:
    """Rows `index` of the flattened batch after broadcasting to `batch_shape`; one row where all share one."""
    inner = tensor.shape[tensor.ndim - trailing :]
    if math.prod(tensor.shape[: tensor.ndim - trailing]) == 1:
        return tensor.reshape(1, *inner).expand(len(index), *inner)
    return tensor.expand(*batch_shape, *inner).reshape(-1, *inner)[index.to(tensor.device)]
