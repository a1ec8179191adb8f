"""Completion from noisy entries and under uneven masks: stacks of problems over levels, and what compression loses.

Every stack is (levels, seeds S); targets are (S, d, d).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compressible.descent.gradient_descent import descend
from compressible.descent.history import History
from compressible.experiments.compare import Start, stacking_gain
from compressible.experiments.outcomes import prefixed
from compressible.recovery.factors import Factors
from compressible.recovery.masks import inclusion_probability, random_mask
from compressible.recovery.problems import DenseProblem, MatrixCompletion
from compressible.recovery.subspaces import leading_angle

LEVEL = 1e-6  # recovery error at which a matrix counts as recovered
Found = Mapping[str, np.ndarray]


def noisy_completion(
    target: Tensor, observed: float, ratios: Sequence[float], generator: torch.Generator
) -> MatrixCompletion:
    """Return problems (ratios, S) of one mask and one Gaussian noise a seed, the noise scaled by each of `ratios`.

    Ratios are to the target's root mean square entry; the noise is on the observed entries, errors are against the
    clean target (S, d, d).
    """
    seeds, rows, columns = target.shape
    mask = random_mask((rows, columns), observed, (seeds,), generator)
    noise = torch.randn(target.shape, generator=generator, dtype=torch.float64)
    noise = noise * target.square().mean((1, 2), keepdim=True).sqrt()
    levels = torch.tensor(ratios, dtype=torch.float64)[:, None, None, None]
    return MatrixCompletion(torch.where(mask > 0, target + levels * noise, target), mask)


def skewed_completion(
    target: Tensor, observed: float, skews: Sequence[float], generator: torch.Generator
) -> tuple[MatrixCompletion, Tensor]:
    """Return problems (skews, S) whose masks weigh entry (i, j) by (i j)^-skew, and their reweighted surrogates.

    The surrogate (skews, S, d, d) divides each observed entry by the probability with which it is observed.
    """
    places = torch.arange(1, target.shape[-1] + 1, dtype=torch.float64)
    weights = [torch.outer(places**-skew, places**-skew) for skew in skews]
    shape, batch = (target.shape[1], target.shape[2]), (len(target),)
    masks = torch.stack([random_mask(shape, observed, batch, generator, weights=w) for w in weights])
    chances = torch.stack([inclusion_probability(w, observed) for w in weights])
    return MatrixCompletion(target, masks), masks * target / chances[:, None]


def descend_from(
    problem: MatrixCompletion, starts: Mapping[str, Factors], **options: Any
) -> dict[str, np.ndarray | float]:
    """Descend from every start on the whole stack of problems, and return what each comes to.

    "<name>/curve" (levels, R), the mean error over seeds, "<name>/at" (R,) iterations; (levels, S): "<name>/final"
    error, "<name>/best", the least on the way, "<name>/overfits", iterations to twice that after it, "<name>/times",
    iterations to an error of 1e-6; infinite if not by the end. Beside them what `stacking_gain` says of the stacks.
    `options` go to `descend`, which refuses runs that diverge.
    """
    gain = stacking_gain(partial(_one, problem, starts), 0, math.prod(problem.batch_shape), steps=100)
    found: dict[str, np.ndarray | float] = {**gain}
    for name, factors in starts.items():
        found |= prefixed(name, _outcome(descend(problem, factors, **options)))
    return found


def surrogate_angles(target: Tensor, rank: int, surrogates: Mapping[str, tuple[Tensor, int]]) -> dict[str, np.ndarray]:
    """Return "<name>/angle" (levels, S) between the leading subspaces of {name: (surrogate, width)} and the target.

    The largest principal angle of the left and right side, in radians.
    """
    pairs = surrogates.items()
    return {f"{name}/angle": leading_angle(guess, target, k, rank).numpy() for name, (guess, k) in pairs}


def least_squares_error(target: Tensor, rank: int, observed: float, ratios: np.ndarray) -> np.ndarray:
    """Return the error (ratios, S) of rank-r least squares, sigma^2/2 q/(1-q) with q = r (2d - r) / (p d^2)."""
    share = rank * (2 * target.shape[-1] - rank) / (observed * target[0].numel())
    return ratios[:, None] ** 2 * target.square().mean((1, 2)).numpy() / 2 * share / (1 - share)


def judge_noise(found: Found, ratios: Sequence[float], expected: np.ndarray) -> dict[str, np.ndarray]:
    """Return per seed (S,) how "width 2r" and "width r" bear noise beside "original", at the worst of the noisy levels.

    "<name> over original": final errors, and "r at most noise", that of width r at the last level; "best over
    original": best errors of width 2r; up to a ratio of one half: "r over least squares", final error of width r over
    `expected` (levels, S). At the largest of these: "turn", how much the angle of width 2r grows, and "overfit ratio",
    iterations until its error is twice the best one over the original's. "least squares" is `expected`.
    """
    levels = np.array(ratios)
    some, wide = levels > 0, found["original/final"]
    few = some & (levels <= max(0.5, levels[1]))
    shown, angle = np.flatnonzero(few)[-1], found["width 2r/angle"]
    sooner, later = (found[f"{name}/overfits"][shown] for name in ("width 2r", "original"))
    out = {f"{n} over original": (found[f"{n}/final"] / wide)[some].max(0) for n in ("width 2r", "width r")}
    return out | {
        "best over original": (found["width 2r/best"] / found["original/best"])[some].max(0),
        "r over least squares": (found["width r/final"][few] / expected[few]).max(0),
        "r at most noise": found["width r/final"][-1] / wide[-1],
        "turn": angle[shown] / angle[0],
        "overfit ratio": _iterations_over(sooner, later, found["original/at"][-1]),
        "least squares": expected,
    }


def judge_skew(found: Found, skews: Sequence[float]) -> dict[str, np.ndarray]:
    """Return per seed (S,) how "width 2r" bears uneven masks beside "original".

    "recovers to": the largest skew up to which it recovers to 1e-6 (-1 if none); "as original": whether it does
    wherever the original does; "iteration ratio": at the worst skew where one of them does; "reweighting": the angle
    it saves.
    """
    recovers, original = (found[f"{name}/final"] <= LEVEL for name in ("width 2r", "original"))
    ratio = _iterations_over(found["width 2r/times"], found["original/times"], found["original/at"][-1])
    return {
        "recovers to": np.where(np.cumprod(recovers, 0), np.array(skews)[:, None], -1).max(0),
        "as original": (~original | recovers).all(0),
        "iteration ratio": np.nanmax(ratio, 0),
        "reweighting": (found["width 2r/angle"] - found["reweighted/angle"])[1:].mean(0),
    }


def check_levels(**levels: Sequence[float]) -> None:
    """Raise ValueError unless each list of levels is 0 and then larger ones, ascending."""
    for name, values in levels.items():
        if values[0] != 0 or len(values) < 2 or list(values) != sorted(set(values)):
            raise ValueError(f"{name} are {values}, expected 0 and then larger ones, ascending")


def _outcome(history: History) -> dict[str, np.ndarray]:
    times, error, at = history.iterations_to(LEVEL).numpy(), history.error.numpy(), history.iterations.numpy()
    best = np.nanmin(error, -1)  # NaN after the end of a run that stopped
    later = np.arange(len(at)) > np.nanargmin(error, -1)[..., None]
    over = later & (error > 2 * best[..., None])
    return {
        "curve": error.mean(1),
        "at": at,
        "final": history.final("error").numpy(),
        "best": best,
        "overfits": np.where(over.any(-1), at[over.argmax(-1)], np.inf),
        "times": np.where(times < 0, np.inf, times),
    }


def _iterations_over(above: np.ndarray, below: np.ndarray, budget: float) -> np.ndarray:
    """Ratio of iterations, the denominator at least `budget` where it never arrived; NaN where neither did."""
    neither = np.isinf(above) & np.isinf(below)
    return np.where(neither, np.nan, above / np.where(np.isinf(below), budget, below))


def _one(
    problem: MatrixCompletion, starts: Mapping[str, Factors], generator: torch.Generator
) -> tuple[DenseProblem, dict[str, Start]]:
    """The problem and its starts at one place of a stack, which the generator's seed counts."""
    index, shape = divmod(generator.initial_seed(), problem.batch_shape[1]), (*problem.batch_shape, -1, -1)
    single = MatrixCompletion(problem.target[index], problem.mask[index])
    return single, {name: ([f.expand(shape)[index] for f in factors], 1.0, 1.0) for name, factors in starts.items()}
