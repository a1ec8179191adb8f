"""P3's Example 4.1 by experiment: dropout on the hidden units of two linear factors, in the mean and with real masks.

Targets Phi are (S, m, n), one a seed, for outputs Y = Phi X of inputs with X X^T = I; steps eta are those of the sum
1/2 ||Y - W_2 diag(z) W_1 X / theta||^2, and lambda = (1 - theta) / theta.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from compressible.descent.gradient_descent import descend
from compressible.experiments.regularised_factorization import Shape, gaussian_factors
from compressible.recovery.dropout import DropoutFactorization
from compressible.recovery.factors import Factors, orthogonal_factors, product
from compressible.recovery.theory import dropout
from compressible.runtime.checks import expect

ZERO = 1e-6  # singular values up to this share of the target's largest count as zero
WIDE = 64  # hidden units from which on the law of large widths is fitted: the threshold falls as 1 / (h + lambda q)
CHUNK = 2**22  # entries of the masked hidden layers that are drawn at a time


def draw_masks(shape: Sequence[int], keep: float, generator: torch.Generator) -> Tensor:
    """Return zeros and ones, each one with the probability `keep`, on the generator's device."""
    drawn = torch.rand(tuple(shape), generator=generator, dtype=torch.float64, device=generator.device)
    return (drawn < keep).to(torch.float64)


def monte_carlo(
    shape: Shape, width: int, keep: float, draws: int, seeds: int, seed: int, device: str = "cpu"
) -> dict[str, np.ndarray]:
    """Return how the mean loss over drawn masks compares with the closed form, per seed (S,).

    Gaussian outputs (m, 2n), inputs (n, 2n) that are not white, factors of width h; half of the `draws` give all
    examples one mask, half give each its own. "difference" and "standard error" over the closed form; "swapped" is the
    difference where theta is mistaken for the drop rate. Masks are drawn on the device.
    """
    (m, n), found = shape, []
    generator, masks = torch.Generator().manual_seed(seed), torch.Generator(device).manual_seed(seed)
    for _ in range(seeds):
        outputs, inputs = (torch.randn(rows, 2 * n, generator=generator, dtype=torch.float64) for rows in (m, n))
        factors = [factor[0].to(device) for factor in gaussian_factors(shape, width, 0.3, 1, generator)]
        outputs, inputs = outputs.to(device), inputs.to(device)
        losses = torch.cat([_losses(outputs, inputs, factors, keep, draws // 2, own, masks) for own in (False, True)])
        exact, swapped = (dropout.expected_loss(outputs, factors, theta, inputs) for theta in (keep, 1 - keep))
        halves = losses.unflatten(0, (2, -1))
        error = (halves.var(1) / halves.shape[1]).sum().sqrt() / 2  # the two halves have variances of their own
        found.append(torch.stack([losses.mean() / exact - 1, error / exact, losses.mean() / swapped - 1]))
    names = ("difference", "standard error", "swapped")
    return dict(zip(names, torch.stack(found, 1).cpu().numpy(), strict=True))


def random_penalties(target: Tensor, width: int, tries: int, generator: torch.Generator) -> Tensor:
    """Return the least (S,) over random factorisations of the target of its penalty over the closed-form minimum.

    Half of the tries are balanced factors turned at random, half are not balanced either.
    """
    least = dropout.least_penalty(target, width)
    left, values, right = torch.linalg.svd(target, full_matrices=False)
    roots, ratios = values.sqrt(), []
    for place in range(tries):
        turn = draw_turn(width, values.shape, generator)
        stretch = torch.ones_like(roots) if place % 2 else torch.rand(roots.shape, generator=generator) + 0.5
        first = turn @ ((roots * stretch)[..., None] * right)
        second = (left * (roots / stretch)[..., None, :]) @ turn.mT
        ratios.append(dropout.penalty([first, second]) / least)
    return torch.stack(ratios).amin(0)


def draw_turn(width: int, shape: Shape, generator: torch.Generator) -> Tensor:
    """Return (S, h, q) with random orthonormal columns, for `shape` (S, q) and h >= q."""
    return orthogonal_factors((width, shape[1]), 2, shape[1], 1.0, generator, batch_shape=(shape[0],))[1]


def reach(target: Tensor, starts: Factors, keeps: Sequence[float], step_size: float, steps: int) -> dict[str, Tensor]:
    """Descend on the expected loss at every keep rate, and return where it ends, (keeps, S).

    "error" ||W_2 W_1 - closed form|| / ||Phi||; "equality" penalty over ||W_2 W_1||_*^2 / h; "rank" and "values"
    (keeps, S, q) of the product; "predicted rank"; "threshold", by how much its kept values are below the target's.
    """
    width, size = starts[0].shape[-2], target.shape[-2] * target.shape[-1]
    rates = torch.tensor(keeps, dtype=target.dtype, device=target.device)[:, None]
    problem, options = DropoutFactorization(target, rates), {"record_every": steps, "engine": "reference"}
    factors = descend(problem, starts, step_size * size, steps, **options).factors  # type: ignore[arg-type]
    end, closed = product(factors), dropout.squared_nuclear_shrinkage(target, dropout.strength(rates) / width)
    values, wanted, given = (torch.linalg.svdvals(matrix) for matrix in (end, closed, target))
    kept = wanted > ZERO * given[..., :1]
    norms = [torch.linalg.matrix_norm(matrix) for matrix in (end - closed, target)]
    return {
        "error": norms[0] / norms[1],
        "equality": dropout.penalty(factors) / (values.sum(-1).square() / width),
        "rank": (values > ZERO * given[..., :1]).sum(-1),
        "predicted rank": kept.sum(-1),
        "threshold": ((given - values) * kept).sum(-1) / kept.sum(-1),
        "values": values,
    }


def at_widths(
    target: Tensor,
    widths: Sequence[int],
    keep: float,
    base: float,
    scale: float,
    step_size: float,
    steps: int,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """Return "threshold" and "error" of `reach` at every width, (widths, 2, S): theta fixed, and theta scaled with h.

    Starts are Gaussian with the standard deviation scale / sqrt(h); `base` is p of the scaled rate.
    """
    found = []
    for width in widths:
        rates = [keep, dropout.scaled_keep_rate(base, width)]
        starts = gaussian_factors(target.shape[1:], width, scale / width**0.5, len(target), generator)
        found.append(reach(target, [f.to(target.device) for f in starts], rates, step_size, steps))
    return {name: torch.stack([end[name] for end in found]) for name in ("threshold", "error")}


def exponent(widths: Sequence[int], values: Tensor) -> Tensor:
    """Return the slope (...) of log `values` (widths, ...) over log h, by least squares over the widths h >= `WIDE`.

    Raises ValueError where fewer than two widths are as large.
    """
    chosen = torch.tensor([width >= WIDE for width in widths])
    expect("widths", list(widths), int(chosen.sum()) >= 2, f"two of them at least {WIDE}")
    x = torch.tensor(widths, dtype=torch.float64)[chosen].log()
    x = (x - x.mean()).reshape(-1, *[1] * (values.ndim - 1))
    return (x * values.cpu()[chosen].log()).sum(0) / x.square().sum()


def with_masks(
    target: Tensor, factors: Factors, keep: float, step_size: float, halving: int, marks: Sequence[int], seed: int
) -> dict[str, Tensor]:
    """Train with drawn masks, one for every example and step, and return the products' distances at `marks`, (S, R).

    "distance" to the closed form and "off" to the target, both over the target's norm. X (n, 2n) has orthonormal rows.
    The step at t is step_size / (1 + t / halving), decreasing so that the noise of the masks fades.
    """
    n, width = target.shape[-1], factors[0].shape[-2]
    inputs = orthogonal_factors((n, 2 * n), 2, n, 1.0, torch.Generator().manual_seed(0))[0].to(target)
    closed = dropout.squared_nuclear_shrinkage(target, dropout.strength(keep) / width)
    seen: dict[str, list[Tensor]] = {"distance": [], "off": []}
    masks = torch.Generator(target.device).manual_seed(seed)
    path = _masked(target @ inputs, inputs, factors, keep, step_size, halving, masks)
    for step, (first, second) in enumerate(path):
        if step in marks:
            for name, goal in (("distance", closed), ("off", target)):
                seen[name].append(torch.linalg.matrix_norm(second @ first - goal) / torch.linalg.matrix_norm(target))
        if step == max(marks):
            break
    return {name: torch.stack(values, 1) for name, values in seen.items()}


def judge(found: dict[str, Tensor], keeps: Sequence[float]) -> dict[str, np.ndarray]:
    """Return per seed (S,), over all keep rates of `reach`: the "worst error", the "worst equality" (penalty over its
    minimum, less 1), and whether the "rank falls": as predicted everywhere, never rising as theta falls, and lower at
    the least theta than at the largest.
    """
    order = torch.tensor(keeps).argsort(descending=True)
    ranks = found["rank"][order].cpu()
    falls = (ranks.diff(dim=0) <= 0).all(0) & (ranks[-1] < ranks[0])
    falls &= (found["rank"] == found["predicted rank"]).all(0).cpu()
    worst = {"worst error": found["error"].amax(0), "worst equality": (found["equality"] - 1).abs().amax(0)}
    return {name: value.cpu().numpy() for name, value in worst.items()} | {"rank falls": falls.numpy()}


def check_margin(values: Tensor, keeps: Sequence[float], width: int, least: float = 0.05) -> None:
    """Raise ValueError where a keep rate puts the threshold within `least` of one of `values` (q,): descent is slow."""
    for keep in keeps:
        level = dropout.squared_nuclear_threshold(values, dropout.strength(keep) / width)
        if keep < 1 and float((values - level).abs().min()) < least:
            raise ValueError(
                f"keep rate {keep:g} has the threshold {level:.3f}, expected it {least} off {values.tolist()}"
            )


def _losses(
    outputs: Tensor, inputs: Tensor, factors: Factors, keep: float, draws: int, own: bool, generator: torch.Generator
) -> Tensor:
    """Losses (draws,) with one mask for all examples or, `own`, one for each."""
    first, second = factors
    hidden = first @ inputs / keep  # (h, N)
    part, found = max(1, CHUNK // hidden.numel()), []
    for begin in range(0, draws, part):
        count = min(part, draws - begin)
        masks = draw_masks((count, len(hidden), hidden.shape[1] if own else 1), keep, generator)
        found.append((outputs - second @ (masks * hidden)).square().sum((-2, -1)))
    return torch.cat(found)


def _masked(
    outputs: Tensor,
    inputs: Tensor,
    factors: Factors,
    keep: float,
    step_size: float,
    halving: int,
    generator: torch.Generator,
) -> Iterator[Factors]:
    """The factors before every step of gradient descent whose every forward pass draws new masks."""
    first, second = (factor.clone() for factor in factors)
    step = 0
    while True:
        yield [first, second]
        hidden = first @ inputs
        masks = draw_masks(hidden.shape, keep, generator) / keep
        dropped = masks * hidden
        rest = second @ dropped - outputs
        rate = step_size / (1 + step / halving)
        back = (second.mT @ rest) * masks @ inputs.mT
        first, second = first - rate * back, second - rate * rest @ dropped.mT
        step += 1
