"""Completion at scale: deep networks, least squares and biases from the entries alone, and how their cost grows.

Every method has a grid of its own that ends inside, and chooses on a slice of what it trains on. Keys name the data
set, the method and what is reported.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from compressible.data import ratings
from compressible.experiments import completion_fits, completion_tasks, recommend
from compressible.experiments.speed import scaling
from compressible.runtime import devices

NETWORKS = {"compressed": None, "two": 2}  # depths: the one that is asked for, and two factors
GOAL_DEVICE = "H200"  # the card that goals in seconds and bytes are set for
ACCURATE = 1e-2  # of the entries' root mean square
# Errors of drawn entries fall by decades, with two factors the more, the smaller their scale: coarser grids, and what
# changes an error by a tenth is level.
COARSE: dict[str, Any] = {"factors": (10**0.5, recommend.STEP_FACTOR), "gain": 0.2}
NO_NOISE = 1e-12  # ridge to begin with where entries have no noise: any that matters only biases the solution


def fit_all(
    task: completion_tasks.Task,
    rank: int,
    depth: int,
    init_scale: float,
    step_fraction: float,
    ridge: float,
    sweeps: int,
    most: int,
    biased: bool = False,
    **options: Any,
) -> dict[str, completion_fits.Fit]:
    """Fit the networks of width 2 `rank` and ALS of rank `rank`, for ratings (`biased`) with biases, too.

    Every method tries at most `most` points of a grid of its own, from `init_scale` and `step_fraction` or from `ridge`
    outwards. `options` (steps, record_every, factors, gain) go to `fit_descent`.
    """
    first = (init_scale, step_fraction, most)
    fits = {
        name: recommend.fit_descent(task, 2 * rank, own or depth, *first, **options) for name, own in NETWORKS.items()
    }
    fits["ALS"] = recommend.fit_sweeps(task, rank, ridge, sweeps, most)
    if biased:
        fits["biased MF"] = recommend.fit_sweeps(task, rank, ridge, sweeps, most, biases=True, start="random")
    return fits


def fit_drawn(task: completion_tasks.Task, rank: int, **fit: Any) -> dict[str, Any]:
    """Fit all methods to entries of a drawn matrix: "drawn/<method>/<what>", as `gather`, and "drawn/rms"."""
    fits = fit_all(task, rank, **COARSE, **fit | {"ridge": NO_NOISE})
    return completion_fits.gather("drawn", [fits]) | {"drawn/rms": completion_tasks.rms(task)}


def fit_table(name: str, rank: int, fraction: float, seeds: int, device: str, **fit: Any) -> dict[str, Any]:
    """Fit all methods to `seeds` splits of the rating table `name`, `fraction` of each slice held out to choose on."""
    table = ratings.load(name)
    parts = (ratings.split(table, f"seed{seed}") for seed in range(seeds))
    tasks = (completion_tasks.rating_task(table, part, "global", fraction, device) for part in parts)
    return completion_fits.gather(name, [fit_all(task, rank, biased=True, **fit) for task in tasks])


def growth(counts: Sequence[int], entries: int, a_line: float, width: int, trials: int, device: str) -> dict[str, Any]:
    """Return what a step costs from each of `counts` entries, `a_line` a line: "growth/seconds" (trials, n), "bytes".

    The exponents "time slope" and "memory slope" are over the larger half of the counts, where the entries dominate.
    On a GPU also "measured over dense", the bytes at `entries` over those of one matrix, and on an H200 what its goals
    are set for.
    """
    seconds, size = scaling.cost_curve(counts, a_line, width, trials, device)
    large = slice(len(counts) // 2, None)
    out = {
        "entries": np.array(counts),
        "seconds": seconds,
        "bytes": size,
        "time slope": scaling.log_slope(counts[large], seconds[..., large]),
        "memory slope": scaling.log_slope(counts[large], size[large]),
    }
    at = list(counts).index(entries)
    out |= _at_target(seconds[:, at], size[at], entries / a_line, device)
    return {f"growth/{name}": value for name, value in out.items()}


def compared(out: Mapping[str, Any], tables: Sequence[str]) -> dict[str, Any]:
    """Return what methods come to beside one another, from the keys of `fit_drawn` and of `fit_table` for `tables`.

    "gap to <method>" (S,): its stopped test error over that of the compressed network, mean over tables, and
    "gap to <method>, <table>" of each; "ratings inside" (S,) and "drawn inside" (1,): whether the best settings of
    every method lie inside its grid; "drawn/error", over the entries' root mean square, "drawn/two over deep", and
    "drawn/seconds over ALS".
    """
    error = {name: out[f"drawn/{name}/stopped"] / out["drawn/rms"] for name in (*NETWORKS, "ALS")}
    found: dict[str, Any] = {}
    for name in (*error, "biased MF"):
        each = [out[f"{table}/{name}/stopped"] - out[f"{table}/compressed/stopped"] for table in tables]
        found[f"gap to {name}"] = np.mean(each, 0)
        found |= {f"gap to {name}, {table}": gap for table, gap in zip(tables, each, strict=True)}
    inside = [out[f"{table}/{name}/inside"] for table in tables for name in out[f"{table}/methods"]]
    return found | {
        "ratings inside": np.all(inside, 0),
        "drawn inside": np.all([out[f"drawn/{name}/inside"] for name in error], 0),
        "drawn/error": error["compressed"],
        "drawn/two over deep": error["two"] / error["compressed"],
        "drawn/seconds over ALS": seconds_to(out, "compressed") / seconds_to(out, "ALS"),
    }


def seconds_to(out: Mapping[str, Any], method: str, level: float = ACCURATE) -> float:
    """Return the seconds until the drawn test error is below `level` of the root mean square; inf if never."""
    seconds, rmse = out[f"drawn/{method}/seconds"], out[f"drawn/{method}/rmse"]
    return np.min(seconds[rmse < level * out["drawn/rms"]], initial=np.inf)


def _at_target(seconds: np.ndarray, size: float, side: float, device: str) -> dict[str, Any]:
    if devices.resolve_device(device) == "cpu":
        return {}  # the bytes of what is stored are no measurement
    out: dict[str, Any] = {"measured over dense": size / (8 * side**2)}
    if GOAL_DEVICE in devices.device_name(device):
        out |= {f"{GOAL_DEVICE} milliseconds": 1e3 * seconds, f"{GOAL_DEVICE} gigabytes": size / 1e9}
    return out
