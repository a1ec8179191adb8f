"""What the deep factorizations are compared with: alternating least squares, without and with rating biases.

Both solve, for one factor at a time, every row's regularised normal equations exactly and all rows at once.
Dense (m, n) matrices throughout, on the device and in the type of the input (float64 is advised: the normal
equations square the condition number). m rows (users), n columns (items), r rank, N ratings.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from .ratings import HIGHEST, LOWEST, Ratings, center, rmse, to_matrix


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


@dataclass(frozen=True, eq=False)
class BiasedModel:
    """prediction = overall + user_bias_i + item_bias_j + users_i . items_j, in stars."""

    overall: float
    user_bias: Tensor  # (m,)
    item_bias: Tensor  # (n,)
    users: Tensor  # (m, r)
    items: Tensor  # (n, r)
    curve: np.ndarray  # (sweeps,) clipped RMSE on `evaluate` after each sweep; empty without
    seconds: float  # of the fit, evaluation left out

    def matrix(self) -> Tensor:
        """All predictions, (m, n), not clipped."""
        return self.overall + self.user_bias[:, None] + self.item_bias + self.users @ self.items.mT


def biased_matrix_factorisation(
    ratings: Ratings,
    fit_index: np.ndarray,
    rank: int = 10,
    ridge: float = 10.0,
    sweeps: int = 15,
    generator: torch.Generator | None = None,
    bias_ridge: float = 5.0,
    evaluate: np.ndarray | None = None,
    device: str | torch.device | None = None,
) -> BiasedModel:
    """Biased matrix factorisation by alternating least squares on the indexed ratings, in float64.

    A bias is a factor whose partner is 1, so each half-sweep solves for a bias and r factors at once, under
    bias_ridge * bias^2 + ridge * |factors|^2. Usual: rank 5 to 30, ridge 5 to 20. Raises ValueError for a
    rank < 1, ridges <= 0 or sweeps < 1.
    """
    for label, value, least in (("rank", rank, 1), ("sweeps", sweeps, 1)):
        if not isinstance(value, int) or value < least:
            raise ValueError(f"{label} is {value!r}, expected an integer >= {least}")
    if not (0 < ridge < math.inf and 0 < bias_ridge < math.inf):
        raise ValueError(f"ridge is {ridge}, bias_ridge {bias_ridge}, expected numbers > 0")
    began = time.perf_counter()
    offsets = center(ratings, fit_index)
    target, mask = (matrix.to(device) for matrix in to_matrix(ratings, fit_index))
    rest = target - mask * offsets.overall
    penalty = torch.tensor([bias_ridge] + [ridge] * rank, dtype=rest.dtype, device=device)
    items = 0.1 * torch.randn(rest.shape[1], rank, generator=generator, dtype=rest.dtype).to(device)
    item_bias, curve, seconds = torch.as_tensor(offsets.item).to(device), [], 0.0
    for _ in range(sweeps):
        user_bias, users = _half_sweep(rest, mask, item_bias, items, penalty)
        item_bias, items = _half_sweep(rest.mT, mask.mT, user_bias, users, penalty)
        seconds += _now(rest) - began
        model = BiasedModel(offsets.overall, user_bias, item_bias, users, items, np.array(curve), seconds)
        if evaluate is not None:
            curve.append(clipped_rmse(model, ratings, evaluate))
        began = _now(rest)
    return replace(model, curve=np.array(curve))


def clipped_rmse(model: BiasedModel, ratings: Ratings, index: np.ndarray) -> float:
    """RMSE in stars of a model's predictions, clipped to 1..5, on the indexed ratings."""
    users, items = ratings.users[index], ratings.items[index]
    values = model.matrix()[users, items].cpu().numpy()
    return rmse(values, ratings.ratings[index], clip=(LOWEST, HIGHEST))["rmse"]


@dataclass(frozen=True)
class Tuned:
    """The best (rank, ridge) of a grid by clipped RMSE on the validation slice, and the whole grid."""

    rank: int
    ridge: float
    rmse: float
    table: tuple[tuple[int, float, float], ...]  # (rank, ridge, rmse)


def tune(
    ratings: Ratings,
    fit_index: np.ndarray,
    validation_index: np.ndarray,
    ranks: Sequence[int] = (5, 10, 20),
    ridges: Sequence[float] = (5.0, 10.0, 15.0, 20.0),
    sweeps: int = 15,
    seed: int = 0,
) -> Tuned:
    """Choose rank and ridge of biased_matrix_factorisation: fitted on one part, judged on the other.

    Neither part may hold test ratings (ratings.validation_slice makes such a pair). Raises ValueError if the
    parts overlap or the grid is empty.
    """
    if np.intersect1d(fit_index, validation_index).size:
        raise ValueError("tune: fit_index and validation_index overlap, expected disjoint indices")
    if not ranks or not ridges:
        raise ValueError(f"tune: ranks are {ranks}, ridges {ridges}, expected at least one of each")
    table = []
    for rank in ranks:
        for ridge in ridges:
            generator = torch.Generator().manual_seed(seed)
            model = biased_matrix_factorisation(ratings, fit_index, rank, ridge, sweeps, generator)
            table.append((rank, ridge, clipped_rmse(model, ratings, validation_index)))
    return Tuned(*min(table, key=lambda row: row[2]), tuple(table))


def _half_sweep(
    rest: Tensor, mask: Tensor, partner_bias: Tensor, partner: Tensor, penalty: Tensor
) -> tuple[Tensor, Tensor]:
    features = torch.cat([torch.ones_like(partner[:, :1]), partner], dim=1)
    solved = solve_rows(rest - mask * partner_bias, mask, features, penalty)
    return solved[:, 0], solved[:, 1:]


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


def _now(like: Tensor) -> float:
    if like.is_cuda:
        torch.cuda.synchronize(like.device)
    return time.perf_counter()


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
