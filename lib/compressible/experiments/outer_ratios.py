"""How the outer ratio alpha changes what a compressed network needs: its iterations, and how far alpha can go.

A sweep holds the original network and A ratios in ascending order, over S seeds: counts are (S, 1 + A), the original's
in the first column, NaN for a run that never arrives.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
import torch

from compressible.experiments.compare import Build, Start, compare_starts
from compressible.experiments.outcomes import Curves, first_below
from compressible.recovery.problems import DenseProblem, MatrixCompletion, MatrixFactorization
from compressible.recovery.theory.invariants import outer_ratio_limit


def arrivals(curves: Curves, names: Sequence[str], tolerance: float) -> dict[str, np.ndarray]:
    """Return iterations "to_tolerance", least "error" and whether "diverged", each (S, 1 + A), of the runs `names`.

    "worst_error" (S,) is the largest error among the runs that arrive.
    """
    counts = [first_below(curves[f"{name}/loss"], tolerance, curves[f"{name}/iterations"]) for name in names]
    errors = [np.nanmin(curves[f"{name}/error"], -1) for name in names]
    out = {"to_tolerance": np.stack(counts, 1), "error": np.stack(errors, 1)}
    out["diverged"] = np.stack([curves[f"{name}/diverged"] for name in names], 1)
    return out | {"worst_error": np.where(np.isfinite(out["to_tolerance"]), out["error"], 0).max(1)}


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

    Up to the ratio `largest`: "increases", the share of steps between ratios that cost iterations, and "end_ratio", the
    iterations at the end over the original's. Over all: the `crossing`, the "best" ratio and "best_over_limit", and how
    many arrive above the whole limit, "settled_above".
    """
    wide, small = counts[:, 0], np.nan_to_num(counts[:, 1:], nan=np.inf)
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
