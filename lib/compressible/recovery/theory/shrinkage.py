"""P3's Theorem 1: what two factors with weight decay settle at, the soft-thresholded singular values of the target.

Objective F(W_1, W_2) = 1/2 ||W_2 W_1 - Phi||_F^2 + mu/2 (||W_1||_F^2 + ||W_2||_F^2), W_1 (r, n), W_2 (m, r). P3's own
statement of it could not be read in full, so the halves are our convention; a ||W_2 W_1 - Phi||_F^2 +
b (||W_1||_F^2 + ||W_2||_F^2) has the threshold mu = b / a (`threshold`): 2 lambda for 1/2 and lambda, lambda for 1 and
lambda, lambda / 2 for 1 and lambda / 2. Here all is a sum: `MatrixFactorization` takes the mean over m n entries, whose
step size is m n times, and whose weight decay is 1 / (m n) of, the one on the sum.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from compressible.recovery.checks import expect_finite_matrix
from compressible.recovery.factors import product
from compressible.runtime.checks import expect, expect_integer


def threshold(fit: float, decay: float) -> float:
    """Return the threshold mu = decay / fit of the objective fit ||W_2 W_1 - Phi||^2 + decay (||W_1||^2 + ||W_2||^2).

    Raises ValueError unless fit > 0 and decay >= 0.
    """
    expect("fit", fit, fit > 0, "a number > 0")
    expect("decay", decay, decay >= 0, "a number >= 0")
    return decay / fit


def soft_thresholded_svd(target: Tensor, rank: int, decay: float | Tensor) -> Tensor:
    """Return U_r (Sigma_r - mu I)_+ V_r^T, the product W_2 W_1 of every global minimiser of F.

    Unique where sigma_r > sigma_{r+1} or sigma_r <= mu; in a tie one of several that are equally good.

    Args:
        target: Phi (..., m, n), floating point.
        rank: r, the inner width of the factors, at least 1; above min(m, n) it binds no more.
        decay: mu >= 0, a number or (...) of them, in units of the target's singular values.

    Returns:
        The product (..., m, n); for mu = 0 the best approximation of rank r (Eckart and Young).

    Raises:
        ValueError: on a rank that is no integer >= 1, a negative mu, or a target that is no finite matrix.

    Example:
        >>> import torch
        >>> from compressible.recovery.theory import shrinkage
        >>> shrinkage.soft_thresholded_svd(torch.diag(torch.tensor([3.0, 2.0, 1.0])), rank=2, decay=0.5).diagonal()
        tensor([2.5000, 1.5000, 0.0000])

    Reference:
        P3, Theorem 1.
    """
    expect_finite_matrix("target", target)
    left, values, right = torch.linalg.svd(target, full_matrices=False)
    return (left * _shrunk(values, rank, decay)[..., None, :]) @ right


def least_objective(target: Tensor, rank: int, decay: float | Tensor) -> Tensor:
    """Return the global minimum (...) of F, from the singular values of the target (..., m, n) alone.

    A value that is kept, sigma > mu among the r largest, costs mu sigma - mu^2 / 2, any other sigma^2 / 2. Raises
    ValueError on a rank below 1 or a negative mu.
    """
    expect_finite_matrix("target", target)
    values = torch.linalg.svdvals(target)
    kept = _shrunk(values, rank, decay) > 0
    mu = torch.as_tensor(decay, dtype=values.dtype, device=values.device)[..., None]
    return torch.where(kept, mu * values - mu.square() / 2, values.square() / 2).sum(-1)


def objective(factors: Sequence[Tensor], target: Tensor, decay: float | Tensor) -> Tensor:
    """Return F (...) at [W_1 (..., r, n), W_2 (..., m, r)] for the target (..., m, n)."""
    return ((product(factors) - target).square().sum((-2, -1)) + decay * squared_norms(factors)) / 2


def squared_norms(factors: Sequence[Tensor]) -> Tensor:
    """Return ||W_1||_F^2 + ||W_2||_F^2 (...), which is at least twice the nuclear norm of the product."""
    first, second = factors
    return first.square().sum((-2, -1)) + second.square().sum((-2, -1))


def nuclear_norm(matrix: Tensor) -> Tensor:
    """Return the sum of the singular values (...) of (..., m, n), the least of 1/2 (||W_1||^2 + ||W_2||^2)."""
    return torch.linalg.svdvals(matrix).sum(-1)


def imbalance(factors: Sequence[Tensor]) -> Tensor:
    """Return D = W_1 W_1^T - W_2^T W_2 (..., r, r), zero at every minimiser with mu > 0.

    Gradient flow keeps D for mu = 0, and D(t) = exp(-2 mu t) D(0) otherwise. A step eta of descent does
    D <- (1 - eta mu)^2 D + eta^2 (W_2^T E E^T W_2 - W_1 E^T E W_1^T), E = W_2 W_1 - Phi, without remainder.
    """
    first, second = factors
    return first @ first.mT - second.mT @ second


def subgradient_violation(matrix: Tensor, target: Tensor, decay: float, tolerance: float = 1e-6) -> Tensor:
    """Return by how much (...) a matrix fails to minimise 1/2 ||X - Phi||_F^2 + mu ||X||_*, which is convex.

    X = U S V^T does if and only if Phi - X = mu (U V^T + Z) with U^T Z = 0, Z V = 0 and ||Z||_2 <= 1. The largest
    deviation of these conditions, in spectral norms, without a decomposition of Phi.

    Args:
        matrix: X (..., m, n).
        target: Phi (..., m, n).
        decay: mu > 0.
        tolerance: singular values of X up to this count as zero.

    Returns:
        The violation (...) >= 0, in units of Phi's singular values.

    Raises:
        ValueError: unless mu is positive.

    Example:
        >>> import torch
        >>> from compressible.recovery.theory import shrinkage
        >>> target = torch.diag(torch.tensor([3.0, 1.0]))
        >>> shrinkage.subgradient_violation(torch.diag(torch.tensor([2.0, 0.0])), target, decay=1.0).item()
        0.0
        >>> shrinkage.subgradient_violation(torch.diag(torch.tensor([2.0, 0.0])), target, decay=0.5).item()
        0.5

    Reference:
        P3, Theorem 1 by way of the nuclear norm; the subdifferential is Watson's (1992).
    """
    expect("decay", decay, decay > 0, "a number > 0")
    for name, given in (("matrix", matrix), ("target", target)):
        expect_finite_matrix(name, given)
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    support = (values > tolerance).to(matrix.dtype)
    left, right = left * support[..., None, :], right * support[..., :, None]
    rest = target - matrix
    outside = rest - left @ (left.mT @ rest)
    outside = outside - (outside @ right.mT) @ right
    on_support = torch.linalg.matrix_norm(rest - outside - decay * (left @ right), ord=2)
    return torch.maximum(on_support, (torch.linalg.matrix_norm(outside, ord=2) - decay).clamp(min=0))


def _shrunk(values: Tensor, rank: int, decay: float | Tensor) -> Tensor:
    """(sigma_i - mu)_+ for the `rank` largest of descending values (..., q), zero for the others."""
    rank = expect_integer("rank", rank, 1)
    mu = torch.as_tensor(decay, dtype=values.dtype, device=values.device)
    expect("decay", decay, bool((mu >= 0).all()), "numbers >= 0")
    shrunk = (values - mu[..., None]).clamp(min=0)
    return torch.where(torch.arange(values.shape[-1], device=values.device) < rank, shrunk, 0.0)
