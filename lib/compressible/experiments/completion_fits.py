"""What a tuned completion method leaves behind, and how the fits of several repetitions become a run's output."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class Fit:
    """A tuned method on the whole task.

    iterations, seconds, error (R,): the test error (half mean square) over iterations or sweeps; final and stopped:
    `Task.score` at the end and at the iteration `stop` that the slice chose, infinite after a divergence; settings:
    what else it chose, of `tried` points of the grid, the best of them `inside` or not; start_seconds: what the start
    took, of `seconds`.
    """

    iterations: np.ndarray
    seconds: np.ndarray
    error: np.ndarray
    final: dict[str, float]
    stopped: dict[str, float]
    stop: int
    settings: dict[str, float]
    start_seconds: float = 0.0
    tried: int = 1
    inside: bool = False

    @property
    def setting(self) -> float:
        """The share of the stability limit, or the ridge."""
        return self.settings["step_fraction" if "step_fraction" in self.settings else "ridge"]


def gather(name: str, runs: Sequence[dict[str, Fit]]) -> dict[str, np.ndarray | list[str]]:
    """Return a run's output from S repetitions of {method: fit}, keys "<name>/<method>/<what>", and "<name>/methods".

    Curves are those of the first repetition; final and stopped ("rmse"), stop, tried, inside and the settings are (S,).
    """
    out: dict = {f"{name}/methods": list(runs[0])}
    for method, first in runs[0].items():
        fits = [run[method] for run in runs]
        rows = [{"final": f.final["rmse"], "stopped": f.stopped["rmse"], **_chosen(f), **f.settings} for f in fits]
        values = {key: np.array([row[key] for row in rows]) for key in rows[0]}
        values |= {"iterations": first.iterations, "seconds": first.seconds, "rmse": np.sqrt(2 * first.error)}
        out |= {f"{name}/{method}/{key}": value for key, value in values.items()}
    return out


def summary(fits: Sequence[Fit]) -> dict[str, np.ndarray]:
    """Return the curves of the first fit and, per split (S,), scores, setting, seconds and least error of all.

    Curves are "iterations", "seconds" and "error" (R,); scores "final/<metric>" and "stopped/<metric>", at the end and
    at the iteration that the validation slice chose; "setting" is what else it chose, "time" the seconds of a fit and
    "best" its least test error; "stop", "tried" and "inside" as in `Fit`. Seconds are without the start,
    as P2 counts them.
    """
    first = fits[0]
    out = {"iterations": first.iterations, "seconds": first.seconds - first.start_seconds, "error": first.error}
    for key in first.final:
        out[f"final/{key}"] = np.array([fit.final[key] for fit in fits])
        out[f"stopped/{key}"] = np.array([fit.stopped[key] for fit in fits])
    out["setting"] = np.array([fit.setting for fit in fits])
    out["time"] = np.array([fit.seconds[-1] - fit.start_seconds for fit in fits])
    out |= {key: np.array([_chosen(fit)[key] for fit in fits]) for key in _chosen(first)}
    out["best"] = np.array([fit.error.min() for fit in fits])
    return out


def _chosen(fit: Fit) -> dict[str, float]:
    return {"stop": fit.stop, "tried": fit.tried, "inside": fit.inside}
