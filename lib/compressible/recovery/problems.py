"""What is being recovered: a matrix seen whole, through a mask, or through linear measurements.

Symbols of the papers: target Phi or X* (m, n), mask Omega, operators A_i, measurements y_i. Every problem is a
function of the end-to-end product X = W_L ... W_1 alone: loss, its gradient dLoss/dX, recovery error and the
surrogate whose singular vectors start a compressed network (P2: Phi, Omega*Phi/p,
mean of y_i A_i). Any leading batch dimensions; float32 and float64; CPU and CUDA.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class Problem:
    """Base of the three problems; `shape` is (m, n), `batch_shape` the leading dimensions."""

    shape: tuple[int, int]
    batch_shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def gradient(self, product: Tensor, out: Tensor | None = None) -> Tensor:
        """Return dLoss/dX (..., m, n) at X = `product` (..., m, n)."""
        raise NotImplementedError

    def evaluate(self, product: Tensor) -> tuple[Tensor, Tensor]:
        """Return the training loss and the recovery error, each (...), at X = `product` (..., m, n)."""
        raise NotImplementedError

    def watch(self, product: Tensor, scratch: Tensor) -> Callable[[], Tensor]:
        """Return a function that gives loss and error as (..., 2) at what the buffer `product` holds by then.

        `scratch` (..., m, n) may be overwritten. Views and weights are made once: at every record they would cost more
        than the arithmetic.
        """
        return lambda: torch.stack(self.evaluate(product), -1)

    def surrogate(self) -> Tensor:
        """Return the (..., m, n) matrix whose leading singular vectors start a compressed network (P2)."""
        raise NotImplementedError

    def select(self, index: Tensor, batch_shape: tuple[int, ...]) -> Problem:
        """Return the problem of the flat positions `index` of a stack of shape `batch_shape`."""
        raise NotImplementedError

    def stacked(self, problems: Sequence[Problem]) -> Problem:
        """Return `problems`, all like this one, as one stack; call `stack_problems`, which checks them."""
        raise NotImplementedError

    def loss(self, product: Tensor) -> Tensor:
        """Return the training loss (...) at X = `product` (..., m, n)."""
        return self.evaluate(product)[0]

    def error(self, product: Tensor) -> Tensor:
        """Return the recovery error (...) at X = `product` (..., m, n)."""
        return self.evaluate(product)[1]

    def _adopt(self, matrix: Tensor, name: str) -> None:
        _check_matrix(matrix, name)
        self.shape = (matrix.shape[-2], matrix.shape[-1])
        self.batch_shape = tuple(matrix.shape[:-2])
        self.dtype, self.device = matrix.dtype, matrix.device


class MatrixCompletion(Problem):
    """Recover a matrix from some of its entries: loss 1/2 sum(Omega * (X - Phi)^2) / N.

    target (..., m, n) floating point, mask (..., m, n) of zeros and ones (bool or number), broadcast against each
    other. mean_over="observed" takes N = |Omega| (P2), "all" takes N = m n (P1): a step size that suits one must be
    scaled by the observed fraction p for the other. The recovery error is the same mean over the unobserved entries
    whose target is known: mark the others NaN (ratings that nobody gave). Where all is observed it is the loss, where
    nothing more is known NaN. Raises ValueError on a mask with other values, an empty mask, or a target that is not
    finite on the observed entries.
    """

    def __init__(self, target: Tensor, mask: Tensor, mean_over: str = "observed") -> None:
        if mean_over not in ("observed", "all"):
            raise ValueError(f'mean_over is {mean_over!r}, expected "observed" (P2) or "all" (P1)')
        self._adopt(target, "target")
        target, mask = torch.broadcast_tensors(target, _as_mask(mask, target))
        self.batch_shape, self.mean_over, self.mask = tuple(target.shape[:-2]), mean_over, mask
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
        squares = (product - self.target).square().flatten(-2).unsqueeze(-1)
        loss, error = (self.weights.flatten(-2) @ squares)[..., 0].unbind(-1)
        return loss / 2, error / 2

    def watch(self, product: Tensor, scratch: Tensor) -> Callable[[], Tensor]:
        halves, squares = self.weights.flatten(-2) / 2, scratch.flatten(-2).unsqueeze(-1)

        def look() -> Tensor:
            torch.sub(product, self.target, out=scratch)
            scratch.square_()
            return (halves @ squares)[..., 0]  # one product reads the residual once, for loss and error

        return look

    def surrogate(self) -> Tensor:
        fraction = self.mask.mean((-2, -1), keepdim=True)
        return self.mask * self.target / fraction

    def select(self, index: Tensor, batch_shape: tuple[int, ...]) -> MatrixCompletion:
        part = MatrixCompletion.__new__(MatrixCompletion)
        part.shape, part.dtype, part.device = self.shape, self.dtype, self.device
        part.batch_shape, part.mean_over = (len(index),), self.mean_over
        for name in ("target", "mask", "offset"):
            setattr(part, name, _pick(getattr(self, name), index, batch_shape))
        part.weights = _pick(self.weights, index, batch_shape, trailing=3)
        return part

    def stacked(self, problems: Sequence[MatrixCompletion]) -> MatrixCompletion:
        means = {problem.mean_over for problem in problems}
        if len(means) != 1:
            raise ValueError(f"cannot stack problems with mean_over {sorted(means)}, expected one")
        whole = MatrixCompletion.__new__(MatrixCompletion)
        whole.shape, whole.dtype, whole.device, whole.mean_over = self.shape, self.dtype, self.device, self.mean_over
        whole.batch_shape = (len(problems), *self.batch_shape)
        for name in ("target", "mask", "offset", "weights"):
            setattr(whole, name, torch.stack([getattr(problem, name) for problem in problems]))
        return whole


class MatrixFactorization(Problem):
    """Factor a matrix that is seen whole: loss 1/2 mean((X - Phi)^2); target (..., m, n); error equals loss."""

    def __init__(self, target: Tensor) -> None:
        self._adopt(target, "target")
        if not bool(torch.isfinite(target).all()):
            raise ValueError("target holds values that are not finite")
        self.target = target
        self.observed_weight = torch.full((), 1.0 / math.prod(self.shape), dtype=self.dtype, device=self.device)
        self.offset = -self.observed_weight * target

    def gradient(self, product: Tensor, out: Tensor | None = None) -> Tensor:
        return torch.addcmul(self.offset, product, self.observed_weight, out=out)

    def evaluate(self, product: Tensor) -> tuple[Tensor, Tensor]:
        loss = (product - self.target).square_().mean((-2, -1)) / 2
        return loss, loss

    def surrogate(self) -> Tensor:
        return self.target

    def select(self, index: Tensor, batch_shape: tuple[int, ...]) -> MatrixFactorization:
        return MatrixFactorization(_pick(self.target, index, batch_shape))

    def stacked(self, problems: Sequence[MatrixFactorization]) -> MatrixFactorization:
        return MatrixFactorization(torch.stack([problem.target for problem in problems]))


class MatrixSensing(Problem):
    """Recover a matrix from linear measurements y_i = <A_i, X*>: loss 1/2 sum_i (<A_i, X> - y_i)^2.

    operators (k, m, n) are shared by all problems of a stack and kept once, as given; measurements (..., k);
    target (..., m, n) is used for the error ||X - X*||_F / ||X*||_F only, without it the error is NaN.
    Raises ValueError where the shapes disagree.
    """

    def __init__(self, operators: Tensor, measurements: Tensor, target: Tensor | None = None) -> None:
        if operators.ndim != 3:
            raise ValueError(f"operators have shape {tuple(operators.shape)}, expected (k, m, n)")
        self._adopt(operators, "operators")
        if measurements.shape[-1:] != operators.shape[:1]:
            raise ValueError(
                f"measurements have shape {tuple(measurements.shape)}, expected (..., {operators.shape[0]})"
            )
        if target is not None and tuple(target.shape[-2:]) != self.shape:
            raise ValueError(f"target has shape {tuple(target.shape)}, expected (..., m, n) with {self.shape}")
        self.operators, self.measurements, self.target = operators, measurements, target
        self._rows = operators.reshape(operators.shape[0], -1)  # (k, m n), a view: the operator is held once
        self.batch_shape = tuple(measurements.shape[:-1])

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
        measurements = _pick(self.measurements, index, batch_shape, trailing=1)
        target = None if self.target is None else _pick(self.target, index, batch_shape)
        return MatrixSensing(self.operators, measurements, target)

    def stacked(self, problems: Sequence[MatrixSensing]) -> MatrixSensing:
        if any(problem.operators is not self.operators for problem in problems):
            raise ValueError("cannot stack sensing problems with different operators: they would be held many times")
        targets = [problem.target for problem in problems]
        target = None if any(t is None for t in targets) else torch.stack(targets)
        return MatrixSensing(self.operators, torch.stack([problem.measurements for problem in problems]), target)


def stack_problems(problems: Sequence[Problem]) -> Problem:
    """Return one problem whose leading dimension (S, ...) runs over `problems` of one kind, shape and batch shape.

    Raises ValueError where they differ; sensing problems must share their operators, which are kept once.
    """
    kinds = {(type(problem), problem.shape, problem.batch_shape) for problem in problems}
    if len(kinds) != 1:
        found = sorted(f"{kind.__name__} {shape} {batch}" for kind, shape, batch in kinds)
        raise ValueError(f"cannot stack {found}, expected one kind, shape and batch shape")
    return problems[0].stacked(problems)


def _check_matrix(matrix: Tensor, name: str) -> None:
    if matrix.ndim < 2 or not matrix.is_floating_point() or matrix.numel() == 0:
        raise ValueError(
            f"{name} has shape {tuple(matrix.shape)} and dtype {matrix.dtype}, expected a non-empty floating-point "
            "(..., m, n)"
        )


def _as_mask(mask: Tensor, target: Tensor) -> Tensor:
    if tuple(mask.shape[-2:]) != tuple(target.shape[-2:]):
        raise ValueError(f"mask has shape {tuple(mask.shape)}, expected (..., {target.shape[-2]}, {target.shape[-1]})")
    mask = mask.to(dtype=target.dtype, device=target.device)
    odd = mask[(mask != 0) & (mask != 1)]
    if odd.numel():
        raise ValueError(f"mask holds the value {odd.flatten()[0].item()}, expected zeros and ones only")
    if not bool(torch.isfinite(torch.where(mask > 0, target, torch.zeros_like(target))).all()):
        raise ValueError("target is not finite on some observed entries")
    return mask


def _pick(tensor: Tensor, index: Tensor, batch_shape: tuple[int, ...], trailing: int = 2) -> Tensor:
    """Rows `index` of the flattened batch after broadcasting to `batch_shape`; one row where all share one."""
    inner = tensor.shape[tensor.ndim - trailing :]
    if math.prod(tensor.shape[: tensor.ndim - trailing]) == 1:
        return tensor.reshape(1, *inner).expand(len(index), *inner)
    return tensor.expand(*batch_shape, *inner).reshape(-1, *inner)[index.to(tensor.device)]
