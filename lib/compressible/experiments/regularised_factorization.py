"""P3's Theorem 1 by gradient descent: two factors with weight decay, over thresholds, widths and starts.

Targets are (S, m, n), one a seed. Step sizes eta and weight decays mu are those of the sum,
1/2 ||W_2 W_1 - Phi||^2 + mu/2 (||W_1||^2 + ||W_2||^2); times are eta times iterations.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from compressible.descent.gradient_descent import descend
from compressible.descent.history import History
from compressible.recovery.factors import Factors, orthogonal_factors, product, stack_factors
from compressible.recovery.problems import MatrixFactorization
from compressible.recovery.theory import shrinkage

STARTS = ("small", "Gaussian")
STUCK = 1e-6  # gap of a run at a saddle: the lowest is some 1e-4 above the minimum for `spread_values`
Shape = Sequence[int]


def draw_targets(shape: Shape, values: Tensor, generator: torch.Generator) -> Tensor:
    """Return targets (S, m, n) with the singular values (S, q) and random singular vectors."""
    right, left = orthogonal_factors(
        (shape[0], shape[1]), 2, values.shape[-1], 1.0, generator, batch_shape=values.shape[:1]
    )
    return (left * values[:, None, :]) @ right


def spread_values(rank: int, seeds: int, generator: torch.Generator) -> Tensor:
    """Return singular values (S, r), descending: one within 1/4 of each of r, ..., 2, 1.

    So neighbours are at least 1/2 apart, and no value is within 1/4 of 1/2, 3/2, ...: descent settles at a known rate.
    """
    steps = torch.arange(rank, 0, -1, dtype=torch.float64)
    return steps + (torch.rand(seeds, rank, generator=generator, dtype=torch.float64) - 0.5) / 2


def draw_starts(
    shape: Shape, widths: Sequence[int], scales: Sequence[float], seeds: int, generator: torch.Generator
) -> Factors:
    """Return the two kinds of `STARTS` for each width and seed as factors (2, widths, S, ...), padded to one width.

    "small": orthogonal times the first of `scales`, balanced where w <= min(m, n); "Gaussian": the second is the
    standard deviation of the entries.
    """
    m, n = shape
    runs = []
    for width in widths:
        small = orthogonal_factors((m, n), 2, width, scales[0], generator, batch_shape=(seeds,))
        runs.append((small, gaussian_factors(shape, width, scales[1], seeds, generator)))
    return stack_factors([stack_factors([run[kind] for run in runs]) for kind in range(2)])


def gaussian_factors(shape: Shape, width: int, scale: float, seeds: int, generator: torch.Generator) -> Factors:
    """Return [W_1 (S, w, n), W_2 (S, m, w)] with independent entries of standard deviation `scale`, unbalanced."""
    sizes = (seeds, width, shape[1]), (seeds, shape[0], width)
    return [scale * torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes]


def regularised_descent(
    target: Tensor, factors: Factors, decay: float, step_size: float, steps: int, **options: int | Sequence[int]
) -> History:
    """Descend on the objective of the module, whose eta and mu are turned into those of the mean over m n entries."""
    size = target.shape[-2] * target.shape[-1]
    problem = MatrixFactorization(target)
    return descend(problem, factors, step_size * size, steps, weight_decay=decay / size, **options)  # type: ignore[arg-type]


def gap(factors: Factors, target: Tensor, width: int, decay: float) -> Tensor:
    """Return |F - least F| / (||Phi||^2 / 2) (...) of factors of width r on targets (..., m, n)."""
    least = shrinkage.least_objective(target, width, decay)
    return (shrinkage.objective(factors, target, decay) - least).abs() / (_size(target).square() / 2)


def reach(
    target: Tensor, starts: Factors, widths: Sequence[int], decays: Sequence[float], step_size: float, steps: int
) -> dict[str, Tensor]:
    """Descend from `draw_starts` for every mu, and return how far each end is from P3's Theorem 1.

    (decays, 2, widths, S): "error" ||W_2 W_1 - closed form|| / ||Phi||; "gap" |F - least F| / (||Phi||^2 / 2);
    "imbalance" ||W_1 W_1^T - W_2^T W_2|| / ||Phi||; "norm gap" between half the squared norms and the nuclear norm,
    over the target's; "violation" of the nuclear norm's optimality over sigma_1, NaN where mu = 0 or the width binds.
    And "values" (decays, 2, widths, S, q), the products' singular values.
    """
    found = [_ends(target, starts, widths, decay, step_size, steps) for decay in decays]
    return {name: torch.stack([end[name] for end in found]) for name in found[0]}


def judge(found: dict[str, Tensor], widths: Sequence[int], decays: Sequence[float], rank: int) -> dict[str, np.ndarray]:
    """Return the worst of `reach` over all mu, widths and starts, per seed (S,).

    "error" and "gap" leave out Gaussian starts with mu = 0 and a width above the rank, which nothing drives at a known
    rate; the other three are over mu > 0. "arrived" (runs,) says of every single run whether its gap is below 1e-6.
    """
    positive = torch.tensor(decays) > 0
    driven = positive[:, None, None] | (torch.tensor(widths) <= rank) | torch.tensor([True, False])[:, None]
    worst = {name: torch.where(driven[..., None], found[name], 0).amax((0, 1, 2)) for name in ("error", "gap")}
    ended = found["error"].isfinite()  # a run that diverged stays NaN; else that is a violation where none is defined
    for name in ("imbalance", "norm gap", "violation"):
        known = torch.where(ended & found[name].isnan(), 0.0, found[name])
        worst[name] = known[positive].amax((0, 1, 2))
    return {f"worst {k}": v.numpy() for k, v in worst.items()} | {"arrived": (found["gap"] < STUCK).flatten().numpy()}


def ties(
    shape: Shape,
    width: int,
    decay: float,
    scale: float,
    step_size: float,
    steps: int,
    seeds: int,
    generator: torch.Generator,
) -> dict[str, np.ndarray]:
    """Return what is true where sigma_r = sigma_{r+1}, from two Gaussian starts on each of S targets, per seed (S,).

    The target has `width` + 2 values, the last three of them one and the same. "tie gap" of F and "tie values", the
    largest deviation of the singular values from the closed form over sigma_1: the worse of the two starts. "tie
    distance" between their products, over the norm of the closed form.
    """
    values = torch.tensor([max(width + 2 - i, 3) for i in range(width + 2)], dtype=torch.float64).expand(seeds, -1)
    target = draw_targets(shape, values, generator)
    starts = stack_factors([gaussian_factors(shape, width, scale, seeds, generator) for _ in range(2)])
    ends = regularised_descent(target, starts, decay, step_size, steps, record_every=steps).factors
    closed = shrinkage.soft_thresholded_svd(target, width, decay)
    spectra = [torch.linalg.svdvals(matrix)[..., :width] for matrix in (product(ends), closed)]
    return {
        "tie gap": gap(ends, target, width, decay).amax(0).numpy(),
        "tie values": ((spectra[0] - spectra[1]).abs().amax(-1).amax(0) / values[:, 0]).numpy(),
        "tie distance": ((product(ends)[0] - product(ends)[1]).norm(dim=(-2, -1)) / closed.norm(dim=(-2, -1))).numpy(),
    }


def check_decays(decays: Sequence[float], rank: int) -> None:
    """Raise ValueError where a mu is within 0.4 of one of 1, ..., rank, near which `spread_values` may put a value.

    And where none is above 0.
    """
    if max(decays) <= 0:
        raise ValueError(f"weight_decays are {decays}, expected one above 0")
    near = [decay for decay in decays if 0.6 < decay < rank + 0.4 and abs(decay - round(decay)) < 0.4]
    if near:
        raise ValueError(f"weight_decays hold {near}, expected them at least 0.4 from each of 1, ..., {rank}")


def _ends(
    target: Tensor, starts: Factors, widths: Sequence[int], decay: float, step_size: float, steps: int
) -> dict[str, Tensor]:
    factors = regularised_descent(target, starts, decay, step_size, steps, record_every=steps).factors
    columns = [_end([f[:, place] for f in factors], target, width, decay) for place, width in enumerate(widths)]
    return {name: torch.stack([column[name] for column in columns], 1) for name in columns[0]}


def _end(factors: Factors, target: Tensor, width: int, decay: float) -> dict[str, Tensor]:
    closed, end, top = shrinkage.soft_thresholded_svd(target, width, decay), product(factors), _values(target)
    free = (top > decay).sum(-1) <= width  # the width does not bind, so the problem in X is the convex one
    violation = torch.full_like(top[..., 0], math.nan).expand(end.shape[:-2])
    if decay > 0:
        found = shrinkage.subgradient_violation(end, target, decay) / top[..., 0]
        violation = torch.where(free, found, violation)
    norms = shrinkage.squared_norms(factors) / 2 - shrinkage.nuclear_norm(end)
    return {
        "error": _size(end - closed) / _size(target),
        "gap": gap(factors, target, width, decay),
        "imbalance": _size(shrinkage.imbalance(factors)) / _size(target),
        "norm gap": norms.abs() / shrinkage.nuclear_norm(target),
        "violation": violation,
        "values": _values(end),
    }


def _size(matrix: Tensor) -> Tensor:
    return torch.linalg.matrix_norm(matrix)


def _values(matrix: Tensor) -> Tensor:
    return torch.linalg.svdvals(matrix)
