"""Networks of many widths on the same problems: which widths recover, and how soon.

Runs are named "<start>/<size>", as "alpha = 1/5" for the spectral start of width 5; S seeds, K sizes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compressible.descent.gradient_descent import descend
from compressible.experiments.outcomes import Curves, final, reached
from compressible.recovery.factors import orthogonal_factors
from compressible.recovery.problems import DenseProblem

Ends = Mapping[str, np.ndarray]


def sweep_widths(
    problem: DenseProblem,
    depth: int,
    step_size: float,
    widths: Sequence[int],
    init_scale: float,
    trials: int,
    generator: torch.Generator,
    tolerance: float,
    **options: Any,
) -> dict[str, Tensor]:
    """Return where descents from `trials` starts of each width end, all (trials, widths).

    "error", the recovery error at the stop; "loss", the training loss there; "iterations" to a training loss below
    `tolerance`, infinite where the budget of steps ends before. All starts are drawn before the first run, so that they
    do not depend on the run; the trials of a width descend as one stack. `options` go to `descend`.
    """
    starts = [
        orthogonal_factors(problem.shape, depth, width, init_scale, generator, problem.dtype, None, (trials,))
        for width in widths
    ]
    runs = [descend(problem, factors, step_size, tolerance=tolerance, **options) for factors in starts]
    out = {name: torch.stack([run.final(name) for run in runs], 1) for name in ("error", "loss")}
    stopped = torch.stack([run.stopped for run in runs], 1).to(torch.float64)
    return out | {"iterations": stopped.where(out["loss"] < tolerance, torch.inf)}


def judge(
    curves: Curves, tail: np.ndarray, rank: int, widths: Mapping[str, Sequence[int]], guesses: Sequence[int]
) -> dict[str, np.ndarray]:
    """Return `ends_by_size` of all runs, and what `judge_spectral` and `judge_gradient` make of them.

    `widths` are {start: widths} of the spectral starts, all the same ones; the runs "gradient/<guess>" and "original/0"
    are beside them.
    """
    ends = ends_by_size(curves, {**widths, "gradient": guesses, "original": [0]})
    spectral = judge_spectral(ends, tail, rank, next(iter(widths.values())), list(widths))
    return ends | spectral | judge_gradient(ends, tail, rank, guesses)


def ends_by_size(curves: Curves, sizes: Mapping[str, Sequence[int]], level: float = 1e-6) -> dict[str, np.ndarray]:
    """Return for each start (S, K): "<start>/final", the error at the end, and "<start>/iterations" to `level`.

    `sizes` are {start: sizes}. Errors are infinite where a run diverged, iterations where it never got to `level`.
    """
    out = {}
    for start, row in sizes.items():
        names = [f"{start}/{size}" for size in row]
        out[f"{start}/final"] = np.stack([final(curves, name) for name in names], 1)
        out[f"{start}/iterations"] = np.stack([reached(curves, name, level) for name in names], 1)
    return out


def spectral_tails(targets: Tensor, rank: int) -> np.ndarray:
    """Return the least mean error of rank 0, 1, ..., `rank` on targets (S, m, n) of that rank: (S, rank + 1).

    1 / (2 m n) times the sum of the squared singular values beyond that rank.
    """
    squares = torch.linalg.svdvals(targets)[:, :rank].square().flip(-1).cumsum(-1).flip(-1)
    return torch.nn.functional.pad(squares, (0, 1)).numpy() / (2 * targets[0].numel())


def judge_spectral(
    ends: Ends, tail: np.ndarray, rank: int, widths: Sequence[int], starts: Sequence[str]
) -> dict[str, np.ndarray]:
    """Return per seed (S,) what the widths of the spectral start come to, at the worst of `starts`.

    "recovered": largest error from width r on; "flatness": most over fewest iterations from 2r on; "r_over_original":
    iterations at r over the original's, of the first start. Farthest from 1, to either side: "floor", an error below r
    over the tail (S, r + 1), and "r_over_2r", iterations at r over those at 2r. A ratio of iterations is infinite where
    either run never got there.
    """
    k = np.array(widths)
    errors, times = (np.stack([ends[f"{start}/{key}"] for start in starts]) for key in ("final", "iterations"))
    at_rank, at_twice = times[:, :, widths.index(rank)], times[:, :, widths.index(2 * rank)]
    late, below = times[:, :, k >= 2 * rank], k < rank
    ratios = np.moveaxis(errors[:, :, below] / tail[:, k[below]], 1, 0)
    return {
        "recovered": errors[:, :, k >= rank].max((0, 2)),
        "floor": farthest_from_one(ratios.reshape(len(tail), -1)),
        "flatness": _over(late.max(2), late.min(2)).max(0),
        "r_over_2r": farthest_from_one(_over(at_rank, at_twice).T),
        "r_over_original": _over(at_rank[0], ends["original/iterations"][:, 0]),
    }


def judge_gradient(ends: Ends, tail: np.ndarray, rank: int, guesses: Sequence[int]) -> dict[str, np.ndarray]:
    """Return per seed (S,) what the guesses of the gradient start come to.

    "gradient_recovered": largest error from r on; "gradient_floor": least error over the tail (S, r + 1) of guesses
    below r whose inner width, twice the guess, would do; infinite where one of them diverged.
    """
    guess, ended = np.array(guesses), ends["gradient/final"]
    between = (guess < rank) & (2 * guess >= rank)
    ratios = ended[:, between] / tail[:, guess[between]]
    return {
        "gradient_recovered": ended[:, guess >= rank].max(1),
        "gradient_floor": np.where(np.isfinite(ratios).all(1), ratios.min(1), np.inf),
    }


def farthest_from_one(ratios: np.ndarray) -> np.ndarray:
    """Return the one (S,) of each row of ratios (S, n) > 0 that is farthest from 1 in its logarithm."""
    distance = np.abs(np.log(ratios))
    return np.take_along_axis(ratios, distance.argmax(1)[:, None], 1)[:, 0]


def check_sizes(rank: int, widths: Sequence[int], guesses: Sequence[int]) -> None:
    """Raise ValueError unless widths and guesses hold what the two judges compare."""
    if not {rank, 2 * rank} <= set(widths) or min(widths) >= rank:
        raise ValueError(f"inner_widths are {widths}, expected {rank}, {2 * rank} and one below {rank} among them")
    if max(guesses) < rank or not any(rank / 2 <= guess < rank for guess in guesses):
        raise ValueError(f"rank_guesses are {guesses}, expected one of {rank} or more and one in [{rank}/2, {rank})")


def _over(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """above / below, infinite where either is: what never arrived is no measure to be ahead of."""
    known = np.isfinite(above) & np.isfinite(below)
    return np.where(known, above / np.where(known, below, 1.0), np.where(np.isnan(above + below), np.nan, np.inf))
