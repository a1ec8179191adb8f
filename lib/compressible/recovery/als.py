"""alternating least squares, dense"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from compressible.runtime.devices import _now


@dataclass(frozen=True, eq=False)
class Alternation:
    """Factors after the last sweep and curves over sweeps 0 (the start) to `sweeps`, each (sweeps + 1,)."""

    left: Tensor  # U (m, r)
    right: Tensor  # V (n, r)
    objective: Tensor  # sum over the observed of squared residuals + ridge (|U|^2 + |V|^2)
    loss: Tensor  # half the mean squared residual over the observed
    error: Tensor | None  # half the mean squared error over the test entries
    seconds: Tensor  # solving time so far, the start included, these records not

    def matrix(self) -> Tensor:
        """The recovered matrix U V^T, (m, n)."""
        return self.left @ self.right.mT


def alternating_minimisation(
    target: Tensor,
    mask: Tensor,
    rank: int,
    ridge: float = 0.0,
    iterations: int = 100,
    generator: torch.Generator | None = None,
    test: tuple[Tensor, Tensor] | None = None,
    start: str = "spectral",
) -> Alternation:
    """Minimise sum over mask of (U V^T - target)^2 + ridge (|U|^2 + |V|^2), U and V taking turns.

    target, mask: (m, n), mask in {0, 1}; test: such a pair for the error curve. start: "spectral" (rank-r SVD
    of mask * target / p) or "random" (Gaussian V from `generator`, U = 0). With ridge 0 a row with fewer
    observations than r gets the solution of least norm, eigenvalues under r * machine epsilon of the largest
    being taken for zero; a row without observations is 0. Raises ValueError for impossible input.
    """
    _check(target, mask, rank, ridge, iterations, start)
    if test is not None:
        _check(*test, rank, ridge, iterations, start)
    began = _now(target)
    left, right = _spectral(target, mask, rank) if start == "spectral" else _random(target, rank, generator)
    rows = [_record(target, mask, test, left, right, ridge)]
    seconds = [_now(target) - began]
    for _ in range(iterations):
        began = _now(target)
        left = solve_rows(target, mask, right, ridge)
        right = solve_rows(target.mT, mask.mT, left, ridge)
        seconds.append(seconds[-1] + _now(target) - began)
        rows.append(_record(target, mask, test, left, right, ridge))
    objective, loss, error = torch.tensor(rows, dtype=torch.float64).T
    return Alternation(left, right, objective, loss, error if test else None, torch.tensor(seconds))


def solve_rows(target: Tensor, mask: Tensor, features: Tensor, ridge: float | Tensor) -> Tensor:
    """Rows x_i (m, r) that minimise |mask_i * (features x_i - target_i)|^2 + sum_k ridge_k x_ik^2.

    target, mask: (m, n); features: (n, r); ridge: one number or (r,). Where the ridge is 0, of least norm.
    """
    rank = features.shape[1]
    products = (features[:, :, None] * features[:, None, :]).reshape(-1, rank * rank)
    normal = (mask @ products).reshape(-1, rank, rank)
    right_side = (mask * target) @ features
    penalty = torch.as_tensor(ridge, dtype=features.dtype, device=features.device).expand(rank)
    if (penalty > 0).all():
        factor = torch.linalg.cholesky(normal + torch.diag(penalty))
        return torch.cholesky_solve(right_side[:, :, None], factor)[:, :, 0]
    return _least_norm(normal + torch.diag(penalty), right_side)


def _least_norm(normal: Tensor, right_side: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(normal)
    floor = values[:, -1:] * normal.shape[-1] * torch.finfo(normal.dtype).eps
    inverse = torch.where(values > floor, 1.0 / values, torch.zeros_like(values))
    inside = torch.einsum("mki,mk->mi", vectors, right_side) * inverse
    return torch.einsum("mki,mi->mk", vectors, inside)


def _spectral(target: Tensor, mask: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    left, values, right = torch.linalg.svd(mask * target / mask.mean(), full_matrices=False)
    root = values[:rank].sqrt()
    return left[:, :rank] * root, right[:rank].mT * root


def _random(target: Tensor, rank: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    # Drawn on the CPU, so that a seed means the same start on every device.
    right = torch.randn(target.shape[1], rank, generator=generator, dtype=target.dtype).to(target.device)
    return target.new_zeros(target.shape[0], rank), right


def _record(
    target: Tensor,
    mask: Tensor,
    test: tuple[Tensor, Tensor] | None,
    left: Tensor,
    right: Tensor,
    ridge: float,
) -> tuple[float, float, float]:
    product = left @ right.mT
    squares = (mask * (product - target)).square().sum()
    penalty = ridge * (left.square().sum() + right.square().sum())
    error = math.nan
    if test is not None:
        error = float(0.5 * (test[1] * (product - test[0])).square().sum() / test[1].sum())
    return float(squares + penalty), float(0.5 * squares / mask.sum()), error


def _check(target: Tensor, mask: Tensor, rank: int, ridge: float, iterations: int, start: str) -> None:
    if target.ndim != 2 or target.shape != mask.shape or target.dtype != mask.dtype:
        got = f"{tuple(target.shape)} {target.dtype} and {tuple(mask.shape)} {mask.dtype}"
        raise ValueError(f"target and mask are {got}, expected the same (m, n) and floating type")
    bad = int((~torch.isfinite(target)).sum())
    if bad or not target.dtype.is_floating_point:
        raise ValueError(f"target is {target.dtype} with {bad} non-finite values, expected finite floats")
    if not ((mask == 0) | (mask == 1)).all() or not mask.any():
        raise ValueError("mask has values other than 0 and 1, or no 1, expected 1 where an entry is observed")
    if not isinstance(rank, int) or not 1 <= rank <= min(target.shape):
        raise ValueError(f"rank is {rank!r}, expected an integer from 1 to {min(target.shape)}")
    if not 0 <= ridge < math.inf:
        raise ValueError(f"ridge is {ridge!r}, expected a finite number >= 0")
    if not isinstance(iterations, int) or iterations < 1:
        raise ValueError(f"iterations is {iterations!r}, expected an integer >= 1")
    if start not in ("spectral", "random"):
        raise ValueError(f"start is {start!r}, expected spectral or random")
