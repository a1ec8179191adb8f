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

from compressible.data.ratings import HIGHEST, LOWEST, Ratings, center, rmse, to_matrix
from compressible.recovery.als import solve_rows
from compressible.runtime.devices import _now


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
