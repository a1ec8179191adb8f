"""Edges of P1's theorem that need runs of their own: what keeps it exactly, Gaussian starts of any scale, a guess below
the rank, and the authors' inputs that are not white. The common machinery is in edges.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.linalg import matrix_norm

from compressible.experiments.components import moving_values
from compressible.experiments.edges import (
    Ideal,
    InputFactorization,
    block_deviation,
    compressed_start,
    held_against,
    iterates,
    last_look,
)
from compressible.recovery.factors import Factors, orthogonal_factors, product
from compressible.recovery.problems import MatrixFactorization
from compressible.recovery.subspaces import svd_evolution
from compressible.recovery.theory.edges import energy_outside, frozen_floor

Found = dict[str, np.ndarray]
LOOKS = 10  # at long runs, evenly spaced


def exactness(ideal: Ideal) -> Found:
    """Return how exactly a run keeps the theorem: scales, weight decay and momentum are the run's own.

    Per seed (S,): "deviation", the largest block deviation of all layers and iterations; "gap_error", the largest
    relative deviation of ||f - f_C|| from the corollary; "moving", the values that leave the common one in the worst
    layer, and "exactly_2r". "path" (T, S): the deviation by iteration; "middle" (T, S, L): the median singular value
    of each layer; "rhos" (T, L): the recursion.
    """
    path = torch.stack([block_deviation(ideal, factors, step) for step, factors in enumerate(ideal.path)])
    gaps = [matrix_norm(product(wide) - product(small)) for wide, small in zip(ideal.path, ideal.small, strict=True)]
    off = (torch.stack(gaps) / ideal.gap()[:, None] - 1).abs().amax(0)
    layers = torch.stack([torch.stack(factors, 1) for factors in ideal.path])
    moving = last_look(ideal, ideal.path[-1])["moving"]
    out = {"deviation": path.amax(0), "gap_error": off, "moving": moving, "exactly_2r": moving == 2 * ideal.rank}
    out |= {"path": path, "middle": torch.linalg.svdvals(layers).median(-1).values, "rhos": ideal.rhos}
    return {key: value.numpy() for key, value in out.items()}


def adam(ideal: Ideal, learning_rate: float) -> Found:
    """Return "moving", "angle" (S,) and the block deviation "path" (T, S) of Adam from the start of the ideal run."""
    problem = MatrixFactorization(ideal.target)
    found = held_against(ideal, problem, ideal.path[0], torch.optim.Adam, learning_rate)
    return {"moving": found["moving"].numpy(), "angle": found["angle"].numpy(), "path": found["block"].numpy()}


def low_rank_updates(
    target: Tensor, starts: Mapping[str, Factors], rank: int, scales: Sequence[float], step_size: float, steps: int
) -> Found:
    """Return the share of the update W_l(t) - W_l(0) outside its best 2r directions, for starts of several scales.

    `starts` are factors (S, d, d) of scale one, each taken times every one of `scales`. For each name, (levels, S)
    after `steps`: "<name>/outer", the worst of the first and last layer, and its bound "<name>/bound"; "<name>/inner",
    the worst of the others. "<name>/over_bound" (S,): the largest share over its bound of all scales and LOOKS looks;
    "<name>/smallest" (S,): the worst share of any layer at the first scale.

    The bound: W_1(t) - W_1(0) = eta sum A^T Phi - R with R = eta sum A^T (W_L...W_1), A = W_L...W_2. The rows of the
    first lie in those of Phi, so it has rank at most r, and what is outside the best 2r directions is at most what R
    has outside its best r. The same holds for the columns of W_L.
    """
    out: Found = {}
    level = torch.tensor(scales, dtype=torch.float64)[:, None, None, None]
    for name, unit in starts.items():
        looks = _update_shares(target, [level * factor for factor in unit], rank, step_size, steps)
        outer, inner, bound, over = (torch.stack([look[i] for look in looks]) for i in range(4))
        out |= {f"{name}/outer": outer[-1].numpy(), f"{name}/inner": inner[-1].numpy()}
        out |= {f"{name}/bound": bound[-1].numpy(), f"{name}/over_bound": over.amax((0, 1)).numpy()}
        out |= {f"{name}/smallest": torch.maximum(outer, inner)[-1, 0].numpy()}
    return out


def _update_shares(
    target: Tensor, start: Factors, rank: int, step_size: float, steps: int
) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """At each look: the worst shares of outer and inner layers, the outer ones' bound, and the worst over its bound."""
    problem, eta = MatrixFactorization(target), step_size / (target.shape[-2] * target.shape[-1])
    rests = [torch.zeros_like(start[0]), torch.zeros_like(start[-1])]
    marks = {round(steps * (look + 1) / LOOKS) for look in range(LOOKS)}
    looks = []
    for step, factors in enumerate(iterates(problem, start, step_size, steps)):
        if step in marks:
            looks.append(_look_at_updates(factors, start, rests, rank))
        above, below = product(factors[1:]), product(factors[:-1])
        whole = above @ factors[0]
        rests[0] = rests[0] + eta * (above.mT @ whole)
        rests[1] = rests[1] + eta * (whole @ below.mT)
    return looks


def _look_at_updates(
    factors: Factors, start: Factors, rests: Sequence[Tensor], rank: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    updates = torch.stack([now - before for now, before in zip(factors, start, strict=True)])
    size = matrix_norm(updates)
    shares = energy_outside(updates, 2 * rank) / size
    bounds = energy_outside(torch.stack(list(rests)), rank) / size[[0, -1]]
    outer = shares[[0, -1]]
    inner = shares[1:-1].amax(0) if len(shares) > 2 else torch.zeros_like(outer[0])
    return outer.amax(0), inner, bounds.amax(0), (outer / bounds).amax(0)


def low_guesses(
    target: Tensor,
    unit: Factors,
    rank_guesses: Sequence[int],
    scale: float,
    step_size: float,
    steps: int,
    outer_ratio: float,
) -> Found:
    """Return what P1's compressed network reaches with a guess r-hat below the rank, as (guesses, S) over ||Phi||.

    "frozen" and "trained": ||f_C - Phi|| at the end with frozen outer factors and with outer steps of `outer_ratio`;
    "gap": ||f - f_C|| with frozen ones, f the wide network; "floor": the least that frozen ones allow, `frozen_floor`;
    "missing": the least that width 2 r-hat allows. Per seed (S,): "wide", ||f - Phi|| at the end; "below_floor", the
    floor over the frozen network's distance, the largest of all guesses and looks, at most one. Of the guesses below
    the rank: "gap_over_floor", the largest |gap / floor - 1|; "trained_wide_enough", the largest "trained" of those
    whose width 2 r-hat is not below the rank. Raises ValueError where there is none of those.
    """
    rank, guesses = int(torch.linalg.matrix_rank(target).max()), torch.tensor(rank_guesses)
    low = guesses < rank
    if not bool((enough := low & (2 * guesses >= rank)).any()):
        raise ValueError(f"rank_guesses are {list(rank_guesses)}, expected one from r / 2 to r - 1, r = {rank}")
    problem, start = MatrixFactorization(target), [scale * factor for factor in unit]
    *_, wide = iterates(problem, start, step_size, steps)
    ends = product(wide)
    found = [_one_guess(problem, start, g, scale, ends, outer_ratio, step_size, steps) for g in rank_guesses]
    out = {key: torch.stack([one[key] for one in found]) for key in found[0]}
    out["below_floor"] = out["below_floor"].amax(0)
    out["gap_over_floor"] = (out["gap"] / out["floor"] - 1).abs()[low].amax(0)
    out["trained_wide_enough"] = out["trained"][enough].amax(0)
    out["wide"] = matrix_norm(product(wide) - target) / matrix_norm(target)
    return {key: value.numpy() for key, value in out.items()}


def _one_guess(
    problem: MatrixFactorization,
    start: Factors,
    guess: int,
    scale: float,
    wide: Tensor,
    outer_ratio: float,
    step_size: float,
    steps: int,
) -> dict[str, Tensor]:
    """What `low_guesses` has of one guess, from the wide network's end."""
    target, size = problem.target, matrix_norm(problem.target)
    small = compressed_start(problem, start, guess, [scale] * len(start))
    floor, below = frozen_floor(target, small[-1], small[0]), torch.zeros_like(size)
    for step, factors in enumerate(iterates(problem, small, step_size, steps, outer_ratio=0.0)):
        if step % max(1, steps // LOOKS) == 0:
            below = torch.maximum(below, floor / matrix_norm(product(factors) - target))
    *_, trained = iterates(problem, small, step_size, steps, outer_ratio=outer_ratio)
    norms = {"frozen": product(factors) - target, "trained": product(trained) - target, "gap": wide - product(factors)}
    out = {key: matrix_norm(difference) / size for key, difference in norms.items()}
    return out | {"floor": floor / size, "missing": energy_outside(target, 2 * guess) / size, "below_floor": below}


def authors_inputs(
    dimension: int, outputs: int, depth: int, steps: int, later: int, seeds: int, generator: torch.Generator
) -> Found:
    """Return how the layers of the authors' regression move: Gaussian inputs over 15 and targets, step 1, scale 1.

    A network from `dimension` = d inputs to `outputs` = m < d / 2, on 10 d samples a seed (theirs: 30, 3, 300); the
    loss is the half mean over all outputs. It runs `later` iterations, theirs ran `steps`. For white inputs of the same
    size and for Gaussian ones, "white/..." and "gaussian/...": "values" (T, d) of the first layer and seed; and for
    each seed, the worst of all layers but the last, "drift" (S, T), how far the d - 2m middle values are from 1,
    "angle" (S, T), how far their subspaces are turned from iteration 1, in radians, and "moving" (S, T), the values
    farther than 1e-6 from their median. "kappa" (S,): the condition number of the inputs' second moment; "drift" and
    "angle" (S,): of the Gaussian inputs after `steps`.
    """
    samples = 10 * dimension
    drawn = torch.randn(seeds, dimension + outputs, samples, generator=generator, dtype=torch.float64)
    inputs, wanted = drawn[:, :dimension] / 15, drawn[:, dimension:]
    moment = inputs @ inputs.mT / samples
    target = torch.linalg.solve(moment, inputs @ wanted.mT / samples).mT
    start = orthogonal_factors((outputs, dimension), depth, scale=1.0, generator=generator, batch_shape=(seeds,))
    white = torch.eye(dimension, dtype=torch.float64).expand_as(moment) / 15**2
    out: Found = {"kappa": torch.linalg.cond(moment).numpy()}
    for name, second in (("white", white), ("gaussian", moment)):
        problem = InputFactorization(target, second)
        # Their loss divides by the outputs and the samples, ours by the outputs and the inputs.
        path = list(iterates(problem, start, float(dimension), later))
        out |= {f"{name}/{key}": value.numpy() for key, value in _square_layers(path, outputs).items()}
    return out | {key: out[f"gaussian/{key}"][:, steps] for key in ("drift", "angle")}


def _square_layers(path: Sequence[Factors], rank: int) -> dict[str, Tensor]:
    layers = torch.stack([torch.stack(factors[:-1], 1) for factors in path], 2)  # (S, L - 1, T, d, d)
    moves = svd_evolution(layers, rank)
    moving = moving_values(moves.values).amax(1)
    drift = (moves.values[..., rank:-rank] - 1).abs().amax((1, 3))
    turned = torch.maximum(moves.right[..., rank], moves.left[..., rank]).amax(1)
    turned[:, 0] = 0  # all values coincide at the start, and a subspace means nothing
    return {"values": moves.values[0, 0], "moving": moving, "drift": drift, "angle": turned}


def statement_table(found: Mapping[str, np.ndarray], exact: Sequence[str], spoiled: Sequence[str]) -> pd.DataFrame:
    """Return each edge (rows) against each part of the statement, in words, from the arrays of a run.

    `found` holds "<name>/<key>" of `exactness` for the names `exact` and of `edge` for `spoiled`. Means over seeds; the
    slopes are near zero, and in brackets is the value at the end of the edge, its largest strength.
    """
    rows = {}
    for name in exact:
        deviation, gap = found[f"{name}/deviation"].max(), found[f"{name}/gap_error"].max()
        moving = "exactly 2r" if found[f"{name}/exactly_2r"].all() else f"{found[f'{name}/moving'].max()}"
        rows[name] = [moving, f"exact, {deviation:.0e}", f"exact, {deviation:.0e}", f"exact, {gap:.0e}"]
    for name in spoiled:
        slopes = [found[f"{name}/{key}_slope"].mean() for key in ("angle", "block", "gap")]
        worst = found[f"{name}/strength"].mean(1).argmax()
        moving, *ends = (found[f"{name}/{key}"][worst].mean() for key in ("moving", "angle", "values", "gap"))
        units = (" rad", " off rho", " of the corollary's")
        parts = zip(slopes, ends, units, strict=True)
        rows[name] = [f"{moving:.0f}", *(f"slope {slope:.2f} [{end:.2f}{unit}]" for slope, end, unit in parts)]
    columns = ["values that move", "middle subspace", "recursion", "compression"]
    return pd.DataFrame.from_dict(rows, orient="index", columns=columns)
