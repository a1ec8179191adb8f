"""P2's networks beside alternating least squares and biased factorisation on folds of a rating table.

Each method, the original network too, has a grid of its own and chooses on a validation slice of each fold's training
ratings: a slice of one fold holds test ratings of the others, so that no fold may choose for another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from compressible.data.ratings import Ratings, Split
from compressible.experiments.completion_fits import Fit, summary
from compressible.experiments.completion_tasks import rating_task
from compressible.experiments.recommend import fit_biased, fit_network, fit_sweeps

CENTRED = {"compressed, mean removed": "global", "compressed, biases removed": "user_item"}
NETWORKS = ("compressed", "original", *CENTRED)
NEAR = 1.02  # of the original's held-out error at its end: what P2's picture lets one tell apart
FIRST_RIDGE = 10.0  # where the grids of tuned least squares begin
BIASED_SWEEPS = 15  # of the biased factorisation, at most


def fit_networks(
    data: tuple[Ratings, Split], fraction: float, device: str, outer_ratio: float, **deep: Any
) -> dict[str, Fit]:
    """Fit P2's two networks, uncentred, and the compressed one to ratings less their mean and less their biases.

    `fraction` of the training ratings chooses; outer_ratio is the compressed networks'. `deep` (rank, depth,
    init_scale, step_fraction, most, steps, tuning_steps, record_every) goes to `fit_network`.
    """
    task = rating_task(*data, "none", fraction, device, "dense")
    fits = {"compressed": fit_network(task, "compressed", outer_ratio=outer_ratio, **deep)}
    fits["original"] = fit_network(task, "original", **deep)
    for name, centring in CENTRED.items():
        task = rating_task(*data, centring, fraction, device, "dense")
        fits[name] = fit_network(task, "compressed", outer_ratio=outer_ratio, **deep)
    return fits


def fit_baselines(
    data: tuple[Ratings, Split],
    fraction: float,
    device: str,
    rank: int,
    ridge: float,
    sweeps: int,
    most: int,
) -> dict[str, Fit]:
    """Fit alternating least squares at `ridge` and at its best one, and a biased factorisation at its best."""
    task = rating_task(*data, "none", fraction, device)
    return {
        "alternating, untuned": fit_sweeps(task, rank, ridge, sweeps, start="random"),
        "alternating, tuned": fit_sweeps(task, rank, FIRST_RIDGE, sweeps, most, start="random"),
        "biased MF, tuned": fit_biased(*data, rank, FIRST_RIDGE, min(sweeps, BIASED_SWEEPS), most, fraction, device),
    }


def over_folds(folds: Sequence[Mapping[str, Fit]]) -> dict[str, np.ndarray]:
    """Return "<method>/<what>" as `summary` has it, "<method>/curves" and "/times" (F, R), and comparisons, (F,).

    Of curves that end early the rest is NaN. "compressed_over_original" and "stopped_over_original": held-out errors at
    the end and at the chosen iterations; "speedup": seconds of as many iterations; "speedup_to_level": seconds until
    the held-out error is first within 2 % of the original's at its end; "gap_to_...": how far others are above;
    "all_inside": whether every method's best settings lie inside its grid.
    """
    out: dict[str, np.ndarray] = {}
    for method in folds[0]:
        fits = [fold[method] for fold in folds]
        out |= {f"{method}/{key}": value for key, value in summary(fits).items()}
        longest = max(fits, key=lambda fit: len(fit.error))
        out[f"{method}/iterations"] = longest.iterations
        out[f"{method}/curves"] = _padded([fit.error for fit in fits])
        out[f"{method}/times"] = _padded([fit.seconds - fit.start_seconds for fit in fits])
    deep, wide = out["compressed/final/half_mse"], out["original/final/half_mse"]
    own = [name for name in folds[0] if name != "alternating, untuned"]
    return out | {
        "compressed_over_original": deep / wide,
        "stopped_over_original": out["compressed/stopped/half_mse"] / out["original/stopped/half_mse"],
        "speedup": out["original/time"] / out["compressed/time"],
        "speedup_to_level": np.array([_speedup_to_level(fold) for fold in folds]),
        "gap_to_untuned": out["alternating, untuned/best"] - np.maximum(deep, wide),
        "gap_to_tuned_stopped": out["alternating, tuned/stopped/half_mse"] - out["compressed/stopped/half_mse"],
        "gap_to_biased": out["biased MF, tuned/final/rmse"] - out["compressed/stopped/rmse"],
        "all_inside": np.all([out[f"{name}/inside"] for name in own], 0),
    }


def _padded(rows: Sequence[np.ndarray]) -> np.ndarray:
    width = max(len(row) for row in rows)
    return np.array([np.pad(row.astype(float), (0, width - len(row)), constant_values=np.nan) for row in rows])


def _speedup_to_level(fold: Mapping[str, Fit]) -> float:
    """The original's seconds to its level over the compressed network's; 0 where only the latter never gets there."""
    level = NEAR * fold["original"].error[-1]
    seconds = {}
    for name in ("compressed", "original"):
        fit = fold[name]
        seconds[name] = float(np.min((fit.seconds - fit.start_seconds)[fit.error <= level], initial=np.inf))
    return seconds["original"] / seconds["compressed"]
