"""What P1's theorem says of each layer's singular triplets, measured along a whole descent."""

from __future__ import annotations

import torch
from torch import Tensor

from compressible.descent.history import History
from compressible.recovery.spectra import svd_evolution


def layer_paths(history: History, rank: int, rhos: Tensor) -> dict[str, Tensor]:
    """Return how the singular triplets of every layer move, from a history that keeps every iteration of S runs.

    rhos (T, L) is the theorem's recursion (`theory.rho`) and `rank` the true rank r. For each layer k from 1:
    "values_k" (S, T, d), "right_k" and "left_k" (S, T, 2r + 1) as in `svd_evolution`. Per seed, over all layers:
    "moving" (L, S), the values that end away from the common one; "exactly_2r" (S,), whether these are 2r everywhere;
    "rho_error" (S,), the largest deviation of the others from the recursion; "middle_angle" (S,), how far their
    subspace turns from iteration 1 on, in radians.
    """
    depth = rhos.shape[1]
    paths = [torch.stack([factors[k] for factors in history.snapshots.values()], 1) for k in range(depth)]
    evolutions = [svd_evolution(path, rank) for path in paths]
    out: dict[str, Tensor] = {}
    for k, moves in enumerate(evolutions, 1):
        out |= {f"values_{k}": moves.values, f"right_{k}": moves.right, f"left_{k}": moves.left}
    moving = torch.stack([moving_values(moves.values[:, -1]) for moves in evolutions])
    middles = [moves.values[..., rank:-rank] - rhos[:, k, None] for k, moves in enumerate(evolutions)]
    turned = [torch.maximum(moves.right[:, 1:, rank], moves.left[:, 1:, rank]).amax(1) for moves in evolutions]
    out |= {"moving": moving, "exactly_2r": (moving == 2 * rank).all(0), "rhos": rhos}
    out["rho_error"] = torch.stack([middle.abs().amax((1, 2)) for middle in middles]).amax(0)
    return out | {"middle_angle": torch.stack(turned).amax(0)}


def moving_values(values: Tensor, least: float = 1e-6) -> Tensor:
    """Return how many (...) of the singular values (..., d) are farther than `least` from their median."""
    return ((values - values.median(-1, keepdim=True).values).abs() > least).sum(-1)
