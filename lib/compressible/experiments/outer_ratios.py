"""How the outer ratio alpha changes what a compressed network needs: its iterations, and how far alpha can go.

A sweep holds the original network and A ratios in ascending order, over S seeds: counts are (S, 1 + A), the original's
in the first column, infinite for a run that its budget stops before it arrives and NaN for one that diverges.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from compressible.experiments.best_steps import best_steps, compare_at_best_steps
from compressible.experiments.compare import Build, Start, compare_starts, stack_starts
from compressible.experiments.outcomes import Curves, final, reached
from compressible.experiments.starts import start_names
from compressible.recovery.problems import DenseProblem, MatrixCompletion, MatrixFactorization
from compressible.recovery.theory.invariants import outer_ratio_limit


def arrivals(curves: Curves, names: Sequence[str], tolerance: float) -> dict[str, np.ndarray]:
    """Return iterations "to_tolerance", last "error" and whether "diverged", each (S, 1 + A), of the runs `names`.

    "worst_error" (S,) is the largest error among the runs that arrive, NaN where none does.
    """
    counts = [reached(curves, name, tolerance, "loss") for name in names]
    errors = [final(curves, name) for name in names]
    out = {"to_tolerance": np.stack(counts, 1), "error": np.stack(errors, 1)}
    out["diverged"] = np.stack([curves[f"{name}/diverged"] for name in names], 1)
    worst = np.where(np.isfinite(out["to_tolerance"]), out["error"], -np.inf).max(1)
    return out | {"worst_error": np.where(np.isfinite(worst), worst, np.nan)}


def limits(problems: Sequence[MatrixCompletion], step_size: float, depth: int) -> dict[str, np.ndarray]:
    """Return the largest stable outer ratios (S,): "limit" from the surrogate, and "whole_limit" from the target."""
    limit = partial(outer_ratio_limit, step_size=step_size, depth=depth)
    known = [limit(problem) for problem in problems]
    whole = [limit(MatrixFactorization(problem.target)) for problem in problems]
    return {"limit": torch.stack(known).numpy(), "whole_limit": torch.stack(whole).numpy()}


def savings(
    counts: np.ndarray, ratios: np.ndarray, limit: np.ndarray, whole_limit: np.ndarray, largest: float
) -> dict[str, np.ndarray]:
    """Return per seed (S,) what larger ratios save; a run that never arrives takes infinitely many iterations.

    Where the original never does there is nothing to compare with: "end_ratio" is NaN and the crossing infinite.

    Up to the ratio `largest`: "increases", the share of steps between ratios that cost iterations, and "end_ratio", the
    iterations at the end over the original's. Over all: the `crossing`, the "best" ratio and "best_over_limit", and how
    many arrive above the whole limit, "settled_above".
    """
    wide, small = counts[:, 0], _arrived(counts[:, 1:])
    wide = np.where(np.isfinite(wide), wide, np.nan)
    upto = small[:, ratios <= largest]
    best = ratios[small.argmin(1)]
    return {
        "increases": (np.diff(upto) > 0).mean(1),
        "end_ratio": upto[:, -1] / wide,
        "crossing": np.array([crossing(ratios, row, level) for row, level in zip(small, wide, strict=True)]),
        "best": best,
        "best_over_limit": best / limit,
        "settled_above": (np.isfinite(small) & (ratios > whole_limit[:, None])).sum(1),
    }


def gain_at_one_step(counts: np.ndarray, ratios: np.ndarray) -> np.ndarray:
    """Return the fewest iterations of all ratios from 1 on over those at 1, per seed (S,); NaN if that never arrives.

    At the step that is best for ratio 1 this tells whether a larger ratio does more than a larger step would.
    """
    small = _arrived(counts[:, 1:])
    one = small[:, ratios == 1.0][:, 0]
    return small[:, ratios >= 1.0].min(1) / np.where(np.isfinite(one), one, np.nan)


def at_best_steps(
    build: Callable[..., tuple[DenseProblem, Mapping[str, Start]]],
    ratios: Sequence[float],
    seed: int,
    seeds: int,
    *,
    tuning: Mapping[str, Any],
    **descent: Any,
) -> dict[str, np.ndarray]:
    """Let original, ratio 1 and the largest ratio run at their own best steps, and sweep all at that of ratio 1.

    Args:
        build: `completion_starts` without its step_size and outer_ratios; a function of a generator and these.
        ratios: A of them, ascending, 1 among them.
        seed, seeds: S of them; those that tune lie behind.
        tuning: of `find_best_steps`: seeds, factor, beside, ...; level and curve are those of the training loss.
        descent: steps, tolerance, record_every, ...

    Returns:
        The arrays of `compare_at_best_steps` for "original", "alpha = 1" and that of the largest ratio; "one_ratio" and
        "end_ratio" (S,), the iterations of the latter two over the original's (NaN where that never arrives); the sweep
        at the best step of ratio 1, "ratios" (A,), "swept" (S, A) iterations, and its `gain_at_one_step`, "gain" (S,).
    """
    names, tolerance = start_names([1.0, ratios[-1]]), descent["tolerance"]
    goal = {"curve": "loss", "level": tolerance, "tolerance": tolerance, "steps": descent["steps"], **tuning}
    few = partial(build, outer_ratios=[1.0, ratios[-1]])
    own = compare_at_best_steps(few, names, seed, seeds, tuning=goal, run=stack_starts, **descent)
    counts = arrivals(own, names, tolerance)["to_tolerance"]
    wide = np.where(np.isfinite(counts[:, :1]), counts[:, :1], np.nan)
    own |= {"one_ratio": counts[:, 1] / wide[:, 0], "end_ratio": counts[:, 2] / wide[:, 0]}
    swept = partial(build, step_size=best_steps(own, names)[names[1]], outer_ratios=ratios)
    at_one = arrivals(stack_starts(swept, seed, seeds, **descent), start_names(ratios), tolerance)["to_tolerance"]
    gain = gain_at_one_step(at_one, np.array(ratios))
    return own | {"ratios": np.array(ratios), "swept": at_one[:, 1:], "gain": gain}


def crossing(ratios: np.ndarray, iterations: np.ndarray, level: float) -> float:
    """Return the first ratio (A,) whose iterations (A,) are at most `level`, interpolated; inf if there is none."""
    first = int((iterations <= level).argmax())
    if first == 0:
        return float(ratios[0]) if iterations[0] <= level else np.inf
    before, after = iterations[first - 1] - level, level - iterations[first]
    return float((ratios[first - 1] * after + ratios[first] * before) / (before + after))


def pace(build: Build, seed: int, record_every: int, steps: int = 1000, repeats: int = 3) -> dict[str, float]:
    """Return seconds an iteration takes in a run alone: "original/pace", and "compressed/pace" at the first ratio.

    The best of as many runs of `steps` iterations as there are `repeats`.
    """

    def pair(generator: torch.Generator) -> tuple[DenseProblem, Mapping[str, Start]]:
        problem, starts = build(generator)
        return problem, dict(list(starts.items())[:2])

    alone = compare_starts(pair, seed, repeats, steps=steps, record_every=record_every)
    best = [float(alone[key][:, -1].min()) / steps for key in alone if key.endswith("/seconds")]
    return {"original/pace": best[0], "compressed/pace": best[1]}


def _arrived(counts: np.ndarray) -> np.ndarray:
    """The counts, infinite for every run that did not arrive."""
    return np.nan_to_num(counts, nan=np.inf, posinf=np.inf)
