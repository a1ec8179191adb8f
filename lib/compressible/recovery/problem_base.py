"""What every recovery problem offers, and the base of those that are functions of the (m, n) product X alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol, Self

import torch
from torch import Tensor

from compressible.recovery.checks import check_tensor, expect_matrix, expect_one_batch, expect_problem
from compressible.recovery.factors import multiply
from compressible.runtime.checks import expect


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
    start, `select` and `stacked` to be part of a stack. The engine "auto" calls these methods at every step and record
    of a class of your own, derived from one of this package's or not; "compiled", "tiled" and "persistent" compute
    `MatrixCompletion` and `MatrixFactorization` themselves and refuse any other class. Where a loss is no function of
    X, override `evaluate_factors` and `factor_gradients`: "reference" alone takes those steps.
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
        return self.evaluate(multiply(factors))

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
        return self.evaluate(self._checked(product))[0]

    def error(self, product: Tensor) -> Tensor:
        """Return the recovery error (...) at X = `product` (..., m, n)."""
        return self.evaluate(self._checked(product))[1]

    def _checked(self, product: Tensor) -> Tensor:
        """The product, where its shape is the problem's; one that broadcasts would be compared with all of it."""
        if isinstance(product, Tensor) and product.shape == (*self.batch_shape, *self.shape):
            return product
        check_tensor("product", product)
        told = f"(..., m, n) with {self.shape}"
        expect("shape of product", tuple(product.shape), tuple(product.shape[-2:]) == tuple(self.shape), told)
        expect_one_batch({"problem": tuple(self.batch_shape), "product": tuple(product.shape[:-2])})
        return product

    def _adopt(self, matrix: Tensor, name: str) -> None:
        """Take shape, batch shape, type and device from a matrix (..., m, n)."""
        expect_matrix(name, matrix)
        self.shape = (matrix.shape[-2], matrix.shape[-1])
        self.batch_shape = tuple(matrix.shape[:-2])
        self.dtype, self.device = matrix.dtype, matrix.device


def stack_problems(problems: Sequence[Problem]) -> DenseProblem:
    """Return one problem whose leading dimension runs over problems of one kind, shape and batch shape.

    Args:
        problems: S dense problems; sensing problems must share their operators, which are kept once.

    Returns:
        A problem of batch shape (S, ...).

    Raises:
        ValueError: where they differ, where they are sparse, which do not stack, or where there is none.

    Example:
        >>> import compressible as cd
        >>> runs = [cd.MatrixFactorization(cd.low_rank_target((8, 6), rank=2)) for _ in range(3)]
        >>> cd.stack_problems(runs).batch_shape
        (3,)
    """
    odd = isinstance(problems, (str, bytes, Mapping)) or hasattr(problems, "dtype")
    listed = isinstance(problems, Iterable) and not odd
    expect("type of problems", type(problems).__name__, listed, "a list of problems")
    given = list(problems)
    expect("problems", given, len(given) > 0, "at least one")
    for index, problem in enumerate(given):
        expect_problem(problem, "dtype", "device", name=f"problem {index} of problems")
    kinds = {(*(getattr(problem, name) for name in _KIND), type(problem)) for problem in given}
    dense = [problem for problem in given if isinstance(problem, DenseProblem)]
    if len(kinds) != 1 or len(dense) < len(given):
        found = sorted(f"{kind[-1].__name__} {kind[0]} {kind[1]} {kind[2]} on {kind[3]}" for kind in kinds)
        raise ValueError(f"cannot stack problems {found}, expected one dense kind, shape, batch shape and type")
    return dense[0].stacked(dense)


_KIND = ("shape", "batch_shape", "dtype", "device")


def pick(tensor: Tensor, index: Tensor, batch_shape: tuple[int, ...], trailing: int = 2) -> Tensor:
    """Rows `index` of the flattened batch after broadcasting to `batch_shape`; one row where all share one."""
    inner = tensor.shape[tensor.ndim - trailing :]
    if math.prod(tensor.shape[: tensor.ndim - trailing]) == 1:
        return tensor.reshape(1, *inner).expand(len(index), *inner)
    return tensor.expand(*batch_shape, *inner).reshape(-1, *inner)[index.to(tensor.device)]
