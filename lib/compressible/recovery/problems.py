"""What is being recovered: a matrix seen whole, through a mask, or through linear measurements.

Symbols of the papers: target Phi or X* (m, n), mask Omega, operators A_i, measurements y_i. Every problem is a
function of the end-to-end product X = W_L ... W_1 alone: loss, its gradient dLoss/dX, recovery error and the
surrogate whose singular vectors start a compressed network (P2: Phi, Omega*Phi/p, mean of y_i A_i). Any leading
batch dimensions; float32 and float64; CPU and CUDA.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Self

import torch
from torch import Tensor

from compressible.recovery.checks import REAL, expect_one_batch, expect_tensor
from compressible.recovery.problem_base import DenseProblem, Problem, pick, stack_problems
from compressible.recovery.sensing import MatrixSensing
from compressible.runtime.checks import expect_one_of

__all__ = ["DenseProblem", "MatrixCompletion", "MatrixFactorization", "MatrixSensing", "Problem", "stack_problems"]

BLOCK = 2**17  # entries of float32 residuals that are summed at a time


class MatrixCompletion(DenseProblem):
    """Recover a matrix from some of its entries: loss 1/2 sum(Omega * (X - Phi)^2) / N.

    The recovery error is the same mean over the unobserved entries whose target is known: mark the others NaN
    (ratings that nobody gave). Where all is observed it is the loss, where nothing more is known NaN.

    Args:
        target: Phi (..., m, n), floating point; leading dimensions are a stack of problems.
        mask: Omega (..., m, n) of zeros and ones, bool or number; it and the target broadcast against each other.
        mean_over: "observed" takes N = |Omega| (P2), "all" takes N = m n (P1): a step size that suits one must be
            scaled by the observed fraction p for the other.

    Raises:
        ValueError: on another mask or mean, an empty mask, a target that is not finite where it is observed, or types
            and shapes other than these.

    Example:
        >>> import torch, compressible as cd
        >>> target, mask = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[1, 0], [1, 0]])
        >>> problem = cd.MatrixCompletion(target, mask)
        >>> problem.loss(torch.zeros(2, 2)).item(), problem.error(torch.zeros(2, 2)).item()
        (2.5, 5.0)

    Reference:
        P1, figures 1, 4 and 5 (mean over all); P2's matrix completion (mean over the observed).
    """

    mask: Tensor
    target: Tensor
    weights: Tensor
    offset: Tensor

    def __init__(self, target: Tensor, mask: Tensor, mean_over: str = "observed") -> None:
        expect_one_of("mean_over", mean_over, ("observed", "all"), '"observed" (P2) or "all" (P1)')
        self._adopt(target, "target")
        target = target.detach()
        target, mask = torch.broadcast_tensors(target, _as_mask(mask, target))
        # A copy: what the caller does to its own mask afterwards would reach the surrogate and not the loss.
        self.batch_shape, self.mean_over, self.mask = tuple(target.shape[:-2]), mean_over, mask.clone()
        known = torch.isfinite(target)
        self.target = torch.where(known, target, torch.zeros_like(target))
        full = (mask == 1).all(-1, keepdim=True).all(-2, keepdim=True)
        hidden = torch.where(full, mask, (1 - mask) * known)
        counts = mask.sum((-2, -1), keepdim=True), hidden.sum((-2, -1), keepdim=True)
        if not bool((counts[0] > 0).all()):
            raise ValueError("mask observes no entry at all, expected at least one per problem")
        size = float(math.prod(self.shape))
        seen, unseen = (c if mean_over == "observed" else torch.full_like(c, size) for c in counts)
        unobserved = torch.where(counts[1] > 0, hidden / unseen, torch.full_like(mask, math.nan))
        self.weights = torch.stack([mask / seen, unobserved], -3)  # (..., 2, m, n): of the loss and of the error
        self.offset = -(self.observed_weight * self.target)

    @property
    def observed_weight(self) -> Tensor:
        """Omega / N, (..., m, n)."""
        return self.weights[..., 0, :, :]

    def gradient(self, product: Tensor, out: Tensor | None = None) -> Tensor:
        return torch.addcmul(self.offset, product, self.observed_weight, out=out)

    def evaluate(self, product: Tensor) -> tuple[Tensor, Tensor]:
        loss, error = _weighted_sums(self.weights, (product - self.target).square()).unbind(-1)
        return (loss / 2).to(product.dtype), (error / 2).to(product.dtype)

    def watch(self, product: Tensor, scratch: Tensor) -> Callable[[], Tensor]:
        if type(self).evaluate is not MatrixCompletion.evaluate:  # a subclass with a loss of its own
            return super().watch(product, scratch)
        halves = self.weights / 2
        if product.device.type == "cpu" and product.numel() <= BLOCK:
            halves = halves.double()  # as `_weighted_sums` will want them at each record

        def look() -> Tensor:
            torch.sub(product, self.target, out=scratch)
            scratch.square_()
            return _weighted_sums(halves, scratch)

        return look

    def surrogate(self) -> Tensor:
        fraction = self.mask.mean((-2, -1), keepdim=True)
        return self.mask * self.target / fraction

    def select(self, index: Tensor, batch_shape: tuple[int, ...]) -> MatrixCompletion:
        part = copy.copy(self)
        part.batch_shape = (len(index),)
        for name, trailing in (("target", 2), ("mask", 2), ("offset", 2), ("weights", 3)):
            setattr(part, name, pick(getattr(self, name), index, batch_shape, trailing))
        return part

    def stacked(self, problems: Sequence[Self]) -> MatrixCompletion:
        means = {problem.mean_over for problem in problems}
        if len(means) != 1:
            raise ValueError(f"cannot stack problems with mean_over {sorted(means)}, expected one of them")
        whole = copy.copy(self)
        whole.batch_shape = (len(problems), *self.batch_shape)
        for name in ("target", "mask", "offset", "weights"):
            setattr(whole, name, torch.stack([getattr(problem, name) for problem in problems]))
        return whole


class MatrixFactorization(DenseProblem):
    """Factor a matrix that is seen whole: loss 1/2 mean((X - Phi)^2), which is the recovery error, too.

    Args:
        target: Phi (..., m, n), floating point and finite; leading dimensions are a stack of problems.

    Raises:
        ValueError: on a target that is not finite or no floating-point matrix.

    Example:
        >>> import torch, compressible as cd
        >>> cd.MatrixFactorization(torch.ones(3, 2)).loss(torch.zeros(3, 2)).item()
        0.5

    Reference:
        P1, figure 3 and Theorem 2.1 (there the sum: its step size is this one over m n); P2's deep factorization.
    """

    def __init__(self, target: Tensor) -> None:
        self._adopt(target, "target")
        if not bool(torch.isfinite(target).all()):
            raise ValueError("target holds values that are not finite, expected finite ones")
        target = target.detach()
        self.target = target.clone()  # the caller may go on to write into its own
        self.observed_weight = torch.full((), 1.0 / math.prod(self.shape), dtype=self.dtype, device=self.device)
        self.offset = -self.observed_weight * target

    def gradient(self, product: Tensor, out: Tensor | None = None) -> Tensor:
        return torch.addcmul(self.offset, product, self.observed_weight, out=out)

    def evaluate(self, product: Tensor) -> tuple[Tensor, Tensor]:
        loss = (product - self.target).square_().mean((-2, -1)) / 2
        return loss, loss

    def surrogate(self) -> Tensor:
        return self.target.clone()  # its own, which the caller may write into

    def select(self, index: Tensor, batch_shape: tuple[int, ...]) -> MatrixFactorization:
        part = copy.copy(self)  # of the same class, whose loss may be its own
        part.batch_shape = (len(index),)
        for name in ("target", "offset"):
            setattr(part, name, pick(getattr(self, name), index, batch_shape).contiguous())
        return part

    def stacked(self, problems: Sequence[Self]) -> MatrixFactorization:
        whole = copy.copy(self)
        whole.batch_shape = (len(problems), *self.batch_shape)
        for name in ("target", "offset"):
            setattr(whole, name, torch.stack([getattr(problem, name) for problem in problems]))
        return whole


def _weighted_sums(weights: Tensor, squares: Tensor) -> Tensor:
    """Sums (..., 2) of squares (..., m, n) under weights (..., 2, m, n): one product reads the squares once for both.

    The CPU's float32 products lose digits as they grow, per cents at 5000 x 5000: there it is done in float64, a block
    at a time, which stays in the cache.
    """
    weights, column = weights.flatten(-2), squares.flatten(-2).unsqueeze(-1)
    if squares.dtype == torch.float64 or squares.device.type != "cpu":
        return (weights @ column)[..., 0]
    if squares.numel() <= BLOCK:
        return (weights.double() @ column.double())[..., 0]
    block = max(BLOCK // math.prod(squares.shape[:-2]), 1024)
    parts = zip(weights.split(block, -1), column.split(block, -2), strict=True)
    return torch.stack([some.double() @ seen.double() for some, seen in parts]).sum(0)[..., 0]


def _as_mask(mask: Tensor, target: Tensor) -> Tensor:
    expect_tensor("mask", mask, "(..., m, n) of zeros and ones, bool or number", (*REAL, torch.bool), 2)
    if tuple(mask.shape[-2:]) != tuple(target.shape[-2:]):
        raise ValueError(f"mask has shape {tuple(mask.shape)}, expected (..., {target.shape[-2]}, {target.shape[-1]})")
    expect_one_batch({"target": tuple(target.shape[:-2]), "mask": tuple(mask.shape[:-2])})
    mask = mask.detach().to(dtype=target.dtype, device=target.device)
    odd = mask[(mask != 0) & (mask != 1)]
    if odd.numel():
        raise ValueError(f"mask holds the value {odd.flatten()[0].item()}, expected zeros and ones only")
    if not bool(torch.isfinite(torch.where(mask > 0, target, torch.zeros_like(target))).all()):
        raise ValueError("target is not finite on some observed entries, expected finite ones")
    return mask
