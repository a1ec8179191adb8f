"""Alternating least squares as a textbook has it, on dense (m, n) matrices: what `recovery.als` is tested against.

Every row's regularised normal equations are solved exactly, all rows at once.
"""

from __future__ import annotations

import torch
from data_helpers import rating_matrix
from torch import Tensor

from compressible.data.ratings import Ratings, center


def solve_rows(target: Tensor, mask: Tensor, features: Tensor, ridge: float | Tensor) -> Tensor:
    """Rows x_i (m, r) that minimise |mask_i * (features x_i - target_i)|^2 + sum_k ridge_k x_ik^2, of least norm.

    target, mask: (m, n); features: (n, r); ridge: one number or (r,).
    """
    rank = features.shape[1]
    products = (features[:, :, None] * features[:, None, :]).reshape(-1, rank * rank)
    penalty = torch.diag(torch.as_tensor(ridge, dtype=features.dtype).expand(rank))
    normal = (mask @ products).reshape(-1, rank, rank) + penalty
    return (torch.linalg.pinv(normal, hermitian=True) @ ((mask * target) @ features)[:, :, None])[:, :, 0]


def alternate_densely(
    target: Tensor, mask: Tensor, right: Tensor, ridge: float, sweeps: int
) -> tuple[list[float], Tensor]:
    """Losses after sweeps 0 to `sweeps` and the recovered matrix (m, n), from V = `right` (n, r)."""
    left = target.new_zeros(target.shape[0], right.shape[1])
    losses = [_loss(target, mask, left @ right.mT)]
    for _ in range(sweeps):
        left = solve_rows(target, mask, right, ridge)
        right = solve_rows(target.mT, mask.mT, left, ridge)
        losses.append(_loss(target, mask, left @ right.mT))
    return losses, left @ right.mT


def factorise_with_biases(
    ratings: Ratings, index, rank: int, ridge: float, sweeps: int, bias_ridge: float = 5.0
) -> tuple[float, Tensor, Tensor, Tensor, Tensor]:
    """Overall mean, user and item biases, user and item factors of the indexed ratings; start as `fit_biased`'s.

    A bias is a factor whose partner is 1, so each half-sweep solves for a bias and r factors at once.
    """
    offsets = center(ratings, index)
    target, mask = rating_matrix(ratings, index)
    rest = target - mask * offsets.overall
    penalty = torch.tensor([bias_ridge] + [ridge] * rank, dtype=rest.dtype)
    generator = torch.Generator().manual_seed(0)
    items = 0.1 * torch.randn(rest.shape[1], rank, generator=generator, dtype=rest.dtype)
    item_bias = torch.from_numpy(offsets.item)
    for _ in range(sweeps):
        user_bias, users = _half_sweep(rest, mask, item_bias, items, penalty)
        item_bias, items = _half_sweep(rest.mT, mask.mT, user_bias, users, penalty)
    return offsets.overall, user_bias, item_bias, users, items


def _half_sweep(rest: Tensor, mask: Tensor, partner_bias: Tensor, partner: Tensor, penalty: Tensor):
    features = torch.cat([torch.ones_like(partner[:, :1]), partner], dim=1)
    solved = solve_rows(rest - mask * partner_bias, mask, features, penalty)
    return solved[:, 0], solved[:, 1:]


def _loss(target: Tensor, mask: Tensor, product: Tensor) -> float:
    return float((mask * (product - target)).square().sum() / mask.sum() / 2)
