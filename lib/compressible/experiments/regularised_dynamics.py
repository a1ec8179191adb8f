"""How two factors with weight decay move on the way to P3's Theorem 1: balance, saddles, and what arrives slowly.

Targets are (S, m, n), factors [W_1 (S, r, n), W_2 (S, m, r)], one a seed; F, eta and mu are those of
`regularised_factorization`, and a time is eta times the iterations.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compressible.experiments.regularised_factorization import Shape, draw_targets, gap, regularised_descent
from compressible.recovery.factors import Factors, product
from compressible.recovery.theory import shrinkage

FINE = 0.002  # eta mu where a rate of gradient flow is measured


def paths(
    target: Tensor, starts: Factors, width: int, decay: float, step_size: float, steps: int, every: int
) -> dict[str, Tensor]:
    """Return "gap" and "imbalance" of `reach` on the way of factors (S, ...), each (S, T), and the "at" (T,)."""
    marks = range(0, steps + 1, every)
    kept = regularised_descent(target, starts, decay, step_size, steps, record_every=steps, snapshots=marks).snapshots
    gaps = [gap(kept[mark], target, width, decay) for mark in marks]
    sizes = [shrinkage.imbalance(kept[mark]).norm(dim=(-2, -1)) for mark in marks]
    return {"gap": torch.stack(gaps, 1), "imbalance": torch.stack(sizes, 1), "at": torch.tensor(list(marks))}


def balance_rate(target: Tensor, starts: Factors, decay: float) -> Tensor:
    """Return the rate (S,) at which ||W_1 W_1^T - W_2^T W_2|| decays, over 2 mu: 1 under gradient flow.

    Between the times 5 / mu and 10 / mu, where it has fallen to e^-10 and e^-20 of its start. A step eta multiplies it
    by 1 - 2 eta mu, where the residual is mu, so that the rate of descent is larger by a share eta mu: here 0.002.
    """
    step_size = FINE / decay
    marks = [round(time / decay / step_size) for time in (5, 10)]
    kept = regularised_descent(target, starts, decay, step_size, marks[1], snapshots=marks).snapshots
    early, late = (shrinkage.imbalance(kept[mark]).norm(dim=(-2, -1)) for mark in marks)
    return (early / late).log() / ((marks[1] - marks[0]) * step_size * 2 * decay)


def drift_order(target: Tensor, starts: Factors, step_size: float, time: float) -> Tensor:
    """Return the order (S,) in eta with which descent without weight decay moves W_1 W_1^T - W_2^T W_2 by `time`.

    A step moves it by eta^2 and there are time / eta of them: 1. Fitted over eta, eta / 2, eta / 4 and eta / 8.
    """
    rates, drifts = [step_size / 2**k for k in range(4)], []
    for rate in rates:
        ends = regularised_descent(target, starts, 0.0, rate, round(time / rate)).factors
        drifts.append((shrinkage.imbalance(ends) - shrinkage.imbalance(starts)).norm(dim=(-2, -1)))
    logs, x = torch.stack(drifts).log(), torch.tensor(rates, dtype=torch.float64).log()
    x = x - x.mean()
    return (x[:, None] * logs).sum(0) / x.square().sum()


def saddle(target: Tensor, width: int, decay: float) -> Factors:
    """Return balanced factors (S, ...) at the critical point of F that keeps triplets 2 to r + 1 and misses the first.

    Raises ValueError unless the target has a value r + 1 above mu.
    """
    left, values, right = torch.linalg.svd(target, full_matrices=False)
    kept = slice(1, width + 1)
    roots = values[:, kept] - decay
    if roots.shape[-1] < width or not bool((roots > 0).all()):
        raise ValueError(f"width is {width} and decay {decay}, expected singular value {width + 1} above the decay")
    roots = roots.sqrt()
    return [roots[..., None] * right[:, kept], left[..., kept] * roots[:, None, :]]


def escape_rate(target: Tensor, nudged: Factors, width: int, decay: float, step_size: float) -> Tensor:
    """Return how fast (S,) the missing triplet grows from beside a `saddle`, over log(1 + eta delta) / eta.

    delta = sigma_1 - sigma_{r+1} is the saddle's most negative curvature; growth is taken over the shortest time
    4 / delta of all seeds, along u_1 and v_1 in the place of the triplet that is to be replaced.
    """
    left, values, right = torch.linalg.svd(target, full_matrices=False)
    delta = values[:, 0] - values[:, width]
    steps = round(4 / float(delta.max()) / step_size)
    end = regularised_descent(target, nudged, decay, step_size, steps).factors
    before, after = (_along(factors, left[:, :, 0], right[:, 0], width - 1) for factors in (nudged, end))
    return (after / before).log() / steps / (step_size * delta).log1p()


def edge_slope(shape: Shape, starts: Factors, step_size: float, steps: int, generator: torch.Generator) -> Tensor:
    """Return d(1 / p) / d(eta t) (S,) of the product's value p whose singular value is mu exactly: 2 in theory.

    There neither growth nor decay is left: w' = -w^3 in both factors, so that p falls as 1 / (2 eta t), not
    exponentially. The target has the values 3, 2 and 1, mu is 2; the slope is over the second half of `steps`.
    """
    values = torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64).expand(len(starts[0]), -1)
    target, marks = draw_targets(shape, values, generator), (steps // 2, steps)
    left, _, right = torch.linalg.svd(target, full_matrices=False)
    kept = regularised_descent(target, starts, 2.0, step_size, steps, record_every=steps, snapshots=marks).snapshots
    early, late = (_on_triplet(product(kept[mark]), left[..., 1], right[..., 1, :]) for mark in marks)
    return (1 / late - 1 / early) / (step_size * (marks[1] - marks[0]))


def _along(factors: Factors, left: Tensor, right: Tensor, place: int) -> Tensor:
    """|u^T W_2 e_j + e_j^T W_1 v| (S,), the growing mode of direction (u, v) in the place j of a hidden unit."""
    up = (factors[1][..., place] * left).sum(-1)
    return (up + (factors[0][..., place, :] * right).sum(-1)).abs()


def _on_triplet(matrix: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """u^T X v (S,)."""
    return torch.einsum("sm,smn,sn->s", left, matrix, right)
