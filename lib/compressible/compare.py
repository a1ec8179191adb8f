"""Several starts on the same problem, over several seeds: the shape of almost every recovery figure.

Runs follow one another, each alone on the machine, so that their seconds can be compared.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from .descent import DivergenceError, History, descend
from .factors import Factors
from .problems import Problem

Start = tuple[Factors, float, float]  # factors, step size, outer ratio
Build = Callable[[torch.Generator], tuple[Problem, Mapping[str, Start]]]


def compare_starts(build: Build, seed: int, seeds: int, **options: Any) -> dict[str, np.ndarray]:
    """Descend from every start of `build(generator)` for each of `seeds` seeds and return the curves as arrays.

    build returns a problem and {name: (factors, step_size, outer_ratio)}; `options` go to `descend`. The arrays are
    "<name>/iterations" (R,), "<name>/loss", "<name>/error" and "<name>/seconds" (seeds, R), padded with NaN where a
    run stopped early, "<name>/stopped" and "<name>/diverged" (seeds,), "<name>/parameters" (1,). A run whose loss
    stops being finite is kept up to there and marked.
    """
    histories: dict[str, list[History]] = {}
    sizes: dict[str, int] = {}
    for offset in range(seeds):
        problem, starts = build(torch.Generator().manual_seed(seed + offset))
        for name, (factors, step_size, ratio) in starts.items():
            run = _descend(problem, factors, step_size, outer_ratio=ratio, **options)
            histories.setdefault(name, []).append(run)
            sizes[name] = sum(factor.shape[-1] * factor.shape[-2] for factor in factors)
    arrays: dict[str, np.ndarray] = {}
    for name, runs in histories.items():
        arrays |= {f"{name}/{key}": value for key, value in _gather(runs).items()}
        arrays[f"{name}/parameters"] = np.array([sizes[name]])
    return arrays


def milestones(curves: Mapping[str, np.ndarray], names: Sequence[str], level: float) -> dict[str, np.ndarray]:
    """Return what `compare_starts` curves come to, per seed (S,), the first of `names` being the baseline.

    "<name>/to_level" and "<name>/seconds_to_level", where the error falls below `level` (NaN if never), "<name>/final"
    error; against the baseline "<name>/iteration_ratio", "<name>/speedup" in seconds, and "<name>/worst_ratio", the
    largest ratio of the errors at a common record.
    """
    out: dict[str, np.ndarray] = {}
    for name in names:
        error, base = curves[f"{name}/error"], curves[f"{names[0]}/error"]
        out[f"{name}/to_level"] = first_below(error, level, curves[f"{name}/iterations"])
        out[f"{name}/seconds_to_level"] = first_below(error, level, curves[f"{name}/seconds"])
        out[f"{name}/final"] = np.nanmin(error, -1)
        out[f"{name}/iteration_ratio"] = out[f"{name}/to_level"] / out[f"{names[0]}/to_level"]
        out[f"{name}/speedup"] = out[f"{names[0]}/seconds_to_level"] / out[f"{name}/seconds_to_level"]
        out[f"{name}/worst_ratio"] = worst_ratio(base, error)
    return out


def first_below(curves: np.ndarray, level: float, at: np.ndarray) -> np.ndarray:
    """Return `at` (R,) or (S, R) at the first record where curves (S, R) are below `level`; NaN if never."""
    below = curves < level
    first = below.argmax(-1)
    found = np.take_along_axis(np.broadcast_to(at, curves.shape), first[:, None], -1)[:, 0].astype(float)
    return np.where(below.any(-1), found, np.nan)


def worst_ratio(upper: np.ndarray, lower: np.ndarray) -> np.ndarray:
    """Return max over common records of lower / upper (S,), from (S, R1) and (S, R2): at most 1 if lower <= upper."""
    common = min(upper.shape[-1], lower.shape[-1])
    return np.nanmax(lower[:, :common] / upper[:, :common], -1)


def _descend(problem: Problem, factors: Factors, step_size: float, **options: Any) -> History:
    try:
        return descend(problem, factors, step_size, **options)
    except DivergenceError as error:
        return error.history


def _gather(runs: Sequence[History]) -> dict[str, np.ndarray]:
    longest = max(runs, key=lambda run: len(run.iterations))
    gathered: dict[str, np.ndarray] = {"iterations": longest.iterations.numpy()}
    for name in ("loss", "error", "seconds"):
        rows = np.full((len(runs), len(longest.iterations)), np.nan)
        for row, run in zip(rows, runs, strict=True):
            row[: len(run.iterations)] = getattr(run, name).numpy()
        gathered[name] = rows
    gathered["stopped"] = np.array([int(run.stopped) for run in runs])
    gathered["diverged"] = np.array([not np.isfinite(run.loss[-1].item()) for run in runs])
    return gathered
