"""Where runs stop, and what it costs them to get there.

Curves are the arrays of `compare_starts` and `stack_starts`: S seeds (or trials) by R records, NaN after the end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from compressible.experiments.compare import first_below

Curves = Mapping[str, np.ndarray]


def last_finite(curves: np.ndarray) -> np.ndarray:
    """Return the last finite value (S,) of each row of (S, R): of a run that diverges the one before it does."""
    return np.array([row[np.isfinite(row)][-1] for row in curves])


def stops(curves: Curves, names: Sequence[str], tolerance: float) -> dict[str, np.ndarray]:
    """Return per seed (S,) where runs stop, the first of `names` being the baseline.

    "<name>/to_stop": iterations to a training loss below `tolerance` (NaN if never), "<name>/stop_ratio": over the
    baseline's; "<name>/milliseconds" an iteration, "<name>/cheaper": how many times less than the baseline's;
    "<name>/end": the last finite error.
    """
    out: dict[str, np.ndarray] = {}
    for name in names:
        loss, iterations = curves[f"{name}/loss"], curves[f"{name}/iterations"]
        seconds = np.nanmax(curves[f"{name}/seconds"], 1)
        out[f"{name}/to_stop"] = first_below(loss, tolerance, iterations)
        out[f"{name}/milliseconds"] = 1e3 * seconds / np.maximum(curves[f"{name}/stopped"], 1)
        out[f"{name}/stop_ratio"] = out[f"{name}/to_stop"] / out[f"{names[0]}/to_stop"]
        out[f"{name}/cheaper"] = out[f"{names[0]}/milliseconds"] / out[f"{name}/milliseconds"]
        out[f"{name}/end"] = last_finite(curves[f"{name}/error"])
    return out


def stop_together(curves: Curves, names: Sequence[str], tolerance: float) -> dict[str, np.ndarray]:
    """Return per seed (S,) whether two runs get below `tolerance` at the same record, and how much sooner in seconds.

    "same_record" (False where one never does), "speedup" of the second over the first in seconds to the stop, and of
    each "<name>/stop_seconds" and "<name>/end", its least training loss.
    """
    first, second = (first_below(curves[f"{n}/loss"], tolerance, curves[f"{n}/iterations"]) for n in names)
    out = {f"{name}/stop_seconds": np.nanmax(curves[f"{name}/seconds"], 1) for name in names}
    out["speedup"] = np.divide(*out.values())
    out |= {f"{name}/end": np.nanmin(curves[f"{name}/loss"], 1) for name in names}
    return out | {"same_record": first == second}


def needs_alone(curves: Curves, clock: Curves, names: Sequence[str], tolerance: float) -> dict[str, np.ndarray]:
    """Return what each of N `names` needs to a training loss below `tolerance`, as arrays (S, N).

    "iterations" (NaN if never) and the least recovery "error" from `curves`; "microseconds" an iteration from the last
    stretch of `clock`, where each network ran alone and the first stretch warmed up; "seconds" is their product.
    """
    columns = [_need(curves, clock, name, tolerance) for name in names]
    return {key: np.stack([column[key] for column in columns], 1) for key in columns[0]}


def compare_needs(slow: Curves, fast: Curves) -> dict[str, np.ndarray]:
    """Return per seed (S,) how the needs of two kinds of networks (S, N), of `needs_alone`, compare over N sizes.

    "ratio" (S, N) of iterations, slow over fast, its "least_ratio", "first_ratio", "last_ratio" and "fall" from first
    to last; "least_speedup" in seconds; "flat": most over fewest iterations of the fast; "worst_error" of all.
    """
    ratio, steady = slow["iterations"] / fast["iterations"], fast["iterations"]
    first, last = ratio[:, 0], ratio[:, -1]
    return {
        **{"ratio": ratio, "least_ratio": ratio.min(1), "first_ratio": first, "last_ratio": last, "fall": first - last},
        "flat": steady.max(1) / steady.min(1),
        "worst_error": np.maximum(slow["error"].max(1), fast["error"].max(1)),
        "least_speedup": (slow["seconds"] / fast["seconds"]).min(1),
    }


def _need(curves: Curves, clock: Curves, name: str, tolerance: float) -> dict[str, np.ndarray]:
    iterations = first_below(curves[f"{name}/loss"], tolerance, curves[f"{name}/iterations"])
    stretch = np.diff(clock[f"{name}/iterations"])[-1]
    one = np.diff(clock[f"{name}/seconds"], axis=1)[:, -1] / stretch
    errors = np.nanmin(curves[f"{name}/error"], 1)
    return {"iterations": iterations, "seconds": one * iterations, "microseconds": 1e6 * one, "error": errors}
