"""What curves over seeds come to: when they pass a level, where they end, when they have settled, what that costs.

Curves are the arrays of `compare_starts` and `stack_starts`: S seeds (or trials) by R records, NaN after the end. A run
that diverges has no success to tell: it ends at infinity and its counts are NaN. One that its budget of steps stops is
censored: it would need more iterations than it had, so that its count is infinite while its end is where it stood.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

Curves = Mapping[str, np.ndarray]


def prefixed(name: object, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values under "<name>/<key>"."""
    return {f"{name}/{key}": value for key, value in values.items()}


def first_below(curves: np.ndarray, level: float | np.ndarray, at: np.ndarray) -> np.ndarray:
    """Return `at` (R,) or (S, R) at the first record where curves (S, R) are below `level`; NaN if never."""
    below = curves < level
    first = below.argmax(-1)
    found = np.take_along_axis(np.broadcast_to(at, curves.shape), first[:, None], -1)[:, 0].astype(float)
    return np.where(below.any(-1), found, np.nan)


def worst_ratio(upper: np.ndarray, lower: np.ndarray) -> np.ndarray:
    """Return max over common records of lower / upper (S,), from (S, R1) and (S, R2): at most 1 if lower <= upper.

    NaN is padding after a run's end, so that this is for runs that do not diverge; `milestones` asks that first.
    """
    common = min(upper.shape[-1], lower.shape[-1])
    with np.errstate(invalid="ignore"):  # both may overflow
        return np.nanmax(lower[:, :common] / upper[:, :common], -1)


def held(curves: np.ndarray) -> np.ndarray:
    """Return curves (S, R) in which a run that stopped, NaN from there on, stays where it ended."""
    return pd.DataFrame(curves.T).ffill().to_numpy().T


def stays_above(curves: np.ndarray, level: float, at: np.ndarray) -> np.ndarray:
    """Return `at` (R,) or (S, R) from where on each curve (S, R) exceeds the level to its end, (S,); NaN if never."""
    least_to_come = np.minimum.accumulate(curves[:, ::-1], 1)[:, ::-1]
    return first_below(-least_to_come, -level, at)


def last_finite(curves: np.ndarray) -> np.ndarray:
    """Return the last finite value (S,) of each row of (S, R): of a run that diverges the one before it does."""
    return np.array([row[np.isfinite(row)][-1] for row in curves])


def final(curves: Curves, name: str, key: str = "error") -> np.ndarray:
    """Return where each run ended (S,): the last record of its "error" or "loss"; infinite where it diverged."""
    return np.where(curves[f"{name}/diverged"], np.inf, last_finite(curves[f"{name}/{key}"]))


def reached(curves: Curves, name: str, level: float, key: str = "error", at: str = "iterations") -> np.ndarray:
    """Return the "iterations" or "seconds" (S,) until a run's "error" or "loss" is below `level`, and stays there.

    Close to the edge of stability an error dips below a level and rises again, which is no arrival. Infinite where its
    budget or its tolerance stops a run above the level, NaN where it diverges, were it later on.
    """
    first = stays_above(-held(curves[f"{name}/{key}"]), -level, curves[f"{name}/{at}"])
    return np.where(curves[f"{name}/diverged"], np.nan, np.where(np.isnan(first), np.inf, first))


def milestones(curves: Curves, names: Sequence[str], level: float) -> dict[str, np.ndarray]:
    """Return what `compare_starts` curves come to, per seed (S,), the first of `names` being the baseline.

    "<name>/to_level" and "<name>/seconds_to_level", where the error falls below `level` (inf if never), "<name>/final"
    error; against the baseline "<name>/iteration_ratio", "<name>/speedup" in seconds, and "<name>/worst_ratio", the
    largest ratio of the errors at a common record. All are NaN or infinite where a run that they need diverges. A
    baseline that never gets there counts with all that it took, so that the network's lead over it is told too small;
    where the baseline's own lead is asked for that is too large, and `times_the_iterations` takes the ratio's place.
    """
    out: dict[str, np.ndarray] = {}
    baseline = names[0]
    taken = [_at_least(curves, baseline, level, at) for at in ("iterations", "seconds")]
    for name in names:
        out[f"{name}/to_level"] = reached(curves, name, level)
        out[f"{name}/seconds_to_level"] = reached(curves, name, level, at="seconds")
        out[f"{name}/final"] = final(curves, name)
        out[f"{name}/iteration_ratio"] = out[f"{name}/to_level"] / taken[0]
        out[f"{name}/speedup"] = taken[1] / out[f"{name}/seconds_to_level"]
        ratio = worst_ratio(curves[f"{baseline}/error"], curves[f"{name}/error"])
        ratio = np.where(curves[f"{baseline}/diverged"], np.nan, ratio)
        out[f"{name}/worst_ratio"] = np.where(curves[f"{name}/diverged"], np.inf, ratio)
    return out


def times_the_iterations(marks: Mapping[str, np.ndarray], name: str, baseline: str) -> np.ndarray:
    """Return how many times the baseline's iterations a network needs (S,), of `milestones`, to claim that it is more.

    0 where the baseline alone never gets there, infinite where the network alone does not, NaN where neither does: a
    baseline that stops in a wrong interpolant is not ahead of what arrives later.
    """
    with np.errstate(invalid="ignore"):
        return marks[f"{name}/to_level"] / marks[f"{baseline}/to_level"]


def outcomes(curves: Curves, names: Sequence[str], tolerance: float, recovered: float) -> dict[str, np.ndarray]:
    """Return per seed (S,) what each of `compare_starts`' runs came to.

    "<name>/final" error and "<name>/final_loss", infinite where it diverged; "<name>/iterations_to" the training loss
    `tolerance` and "<name>/recovered_at", where the error falls below `recovered`, both as `reached` counts.
    """
    out: dict[str, np.ndarray] = {}
    for name in names:
        out[f"{name}/final"] = final(curves, name)
        out[f"{name}/final_loss"] = final(curves, name, "loss")
        out[f"{name}/iterations_to"] = reached(curves, name, tolerance, "loss")
        out[f"{name}/recovered_at"] = reached(curves, name, recovered)
    return out


def stops(curves: Curves, names: Sequence[str], tolerance: float) -> dict[str, np.ndarray]:
    """Return per seed (S,) where runs stop, the first of `names` being the baseline.

    "<name>/to_stop": iterations to a training loss below `tolerance`, as `reached` counts; "<name>/stop_ratio": over
    the baseline's; "<name>/milliseconds" an iteration, "<name>/cheaper": how many times less than the baseline's;
    "<name>/end": the last error, infinite where the run diverged.
    """
    out: dict[str, np.ndarray] = {}
    for name in names:
        seconds = np.nanmax(curves[f"{name}/seconds"], 1)
        out[f"{name}/to_stop"] = reached(curves, name, tolerance, "loss")
        out[f"{name}/milliseconds"] = 1e3 * seconds / np.maximum(curves[f"{name}/stopped"], 1)
        out[f"{name}/stop_ratio"] = out[f"{name}/to_stop"] / out[f"{names[0]}/to_stop"]
        out[f"{name}/cheaper"] = out[f"{names[0]}/milliseconds"] / out[f"{name}/milliseconds"]
        out[f"{name}/end"] = final(curves, name)
    return out


def stop_together(curves: Curves, names: Sequence[str], tolerance: float) -> dict[str, np.ndarray]:
    """Return per seed (S,) whether two runs get below `tolerance` at the same record, and how much sooner in seconds.

    "same_record" (False where one never does), "speedup" of the second over the first in seconds to the stop (NaN where
    one never gets there), and of each "<name>/stop_seconds" and "<name>/end", its last training loss.
    """
    first, second = (reached(curves, name, tolerance, "loss") for name in names)
    both = np.isfinite(first) & np.isfinite(second)
    out = {f"{name}/stop_seconds": np.nanmax(curves[f"{name}/seconds"], 1) for name in names}
    out["speedup"] = np.where(both, np.divide(*out.values()), np.nan)
    out |= {f"{name}/end": final(curves, name, "loss") for name in names}
    return out | {"same_record": both & (first == second)}


def linear_convergence(errors: np.ndarray, iterations: np.ndarray) -> dict[str, np.ndarray]:
    """Return per seed (S,) the iterations "to_1e-28" and "evenness", 1 where each digit takes the same iterations.

    Evenness is the iterations from an error of 1e-20 to 1e-28 over those from 1e-12 to 1e-20.
    """
    to_12, to_20, to_28 = (first_below(errors, 10.0**-digits, iterations) for digits in (12, 20, 28))
    return {"to_1e-28": to_28, "evenness": (to_28 - to_20) / (to_20 - to_12)}


def needs_alone(curves: Curves, clock: Curves, names: Sequence[str], tolerance: float) -> dict[str, np.ndarray]:
    """Return what each of N `names` needs to a training loss below `tolerance`, as arrays (S, N).

    "iterations", as `reached` counts, and the last recovery "error" from `curves`; "microseconds" an iteration from the
    last stretch of `clock`, where each network ran alone and the first stretch warmed up; "seconds" is their product.
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
    iterations = reached(curves, name, tolerance, "loss")
    stretch = np.diff(clock[f"{name}/iterations"])[-1]
    one = np.diff(clock[f"{name}/seconds"], axis=1)[:, -1] / stretch
    errors = final(curves, name)
    return {"iterations": iterations, "seconds": one * iterations, "microseconds": 1e6 * one, "error": errors}


def _at_least(curves: Curves, name: str, level: float, at: str) -> np.ndarray:
    """What `reached` returns, but where a run is stopped above the level what it took up to there."""
    to_level = reached(curves, name, level, at=at)
    spent = np.where(np.isfinite(curves[f"{name}/error"]), curves[f"{name}/{at}"], 0.0).max(-1)
    return np.where(np.isinf(to_level), spent, to_level)
