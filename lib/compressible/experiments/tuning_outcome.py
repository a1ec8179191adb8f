"""What a sweep of rates says: best against best, how wide the windows of good rates are, what one rate for all costs.

A place is a task with a size (and a rank, where it is another than the sweep's own), written "stsb, n = 16". Arrays
hold a value a seed; what lacks cells is not among them, so that its claims stay untested.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from compressible.experiments.tuned_methods import ALONE, CONTROLS, DEEP, LORA
from compressible.experiments.tuning_cells import Cell, Cells
from compressible.experiments.tuning_sweep import (
    MATCHED,
    Place,
    Sweep,
    Worker,
    chosen_rate,
    curve,
    finished,
    log_norm,
    matched_rate,
    mean_score,
    planned,
    sweep_of,
)

POINTS = 0.02  # two points: how far below the best a rate may be to count as good
VARIANTS = tuple(name for name in LORA if name not in ("paper", *ALONE))  # as 2602.04998 compares them
EVERYTHING = (*VARIANTS, "paper", *(name for name in DEEP if name != "full"))
Arrays = dict[str, np.ndarray]


def computed(given: Mapping[str, Any]) -> dict[str, Any]:
    """Compute what is missing of a notebook's sweep, within its budget_seconds, and return the `outcome` of all cells.

    given: its parameters; cells lie in the cache (COMPRESSIBLE_CACHE), and those that are there are taken as they are.
    """
    sweep = sweep_of(given)
    cells = Cells(sweep.setting())
    devices = None if given["devices"] == "one" else given["devices"]
    Worker(sweep, cells, given["device"], devices, given["budget_seconds"], given["max_stack"]).work()
    return outcome(sweep, cells)


def outcome(sweep: Sweep, cells: Cells) -> dict[str, Any]:
    """Return arrays and metrics of the cells that there are.

    By place and method, "<place>/<method>/...": "rates" (R,), "scores" (R, S) on the choosing half, "norms" (R,) of
    the updates, "best" (1,) the chosen rate, "window" (S,) decades, "judged" and "published" (S',) on the judging half
    at the chosen and at the published rate. Then what `differences` and `windows` give, and of the cells themselves:
    "cells", "cell seconds", "commits", "uncommitted cells", "cells of another library", "missing".
    """
    done: dict[tuple[Place, str], list[Cell]] = {(place, name): own for place, name, own in finished(sweep, cells)}
    found: Arrays = {}
    for place, name in done:
        found |= _of_method(sweep, cells, place, name)
    for place in sweep.places():
        found |= differences(found, label(sweep, place), sweep.methods)
    found |= _means(sweep, found)
    all_cells = [cell for own in done.values() for cell in own]
    seconds = sum(one.seconds for cell in all_cells if (one := cells.get(cell)) is not None)
    lacking = [f"{name} on {label(sweep, place)}" for place, name in planned(sweep) if (place, name) not in done]
    told = {"cells": len(all_cells), "cell seconds": seconds, "missing": lacking, "missing parts": len(lacking)}
    return {**found, **told, **cells.made_by(all_cells)}


def label(sweep: Sweep, place: Place) -> str:
    """Return the name of a place."""
    task, size, rank = place
    return f"{task}, n = {size}" + ("" if rank == sweep.adapter_rank else f", r = {rank}")


def differences(found: Mapping[str, np.ndarray], place: str, methods: Sequence[str]) -> Arrays:
    """Return what methods at a place gain over each other, seed by seed.

    "<method> - standard, <place>": best against best. "published gain of <method>, <place>": over LoRA with the
    paper's start, both at the published rate. "cost of the published rate, <method>, <place>". "compressed - <control>,
    <place>". "<method> at LoRA's step - standard, <place>". "variants apart" and "all apart, <place>": the method that
    tuning found best over the one that it found worst.
    """
    judged = {name: found[f"{place}/{name}/judged"] for name in methods if f"{place}/{name}/judged" in found}
    fixed = {name: found[f"{place}/{name}/published"] for name in judged}
    out: Arrays = {}
    for name, scores in judged.items():
        out[f"cost of the published rate, {name}, {place}"] = scores - fixed[name]
        if "standard" in judged and name != "standard":
            out[f"{name} - standard, {place}"] = _paired(scores, judged["standard"])
        if "paper" in judged and name in DEEP:
            out[f"published gain of {name}, {place}"] = _paired(fixed[name], fixed["paper"])
        if f"{place}/{name}/matched" in found and "standard" in judged:
            own = found[f"{place}/{name}/matched"]
            out[f"{name} at LoRA's step - standard, {place}"] = _paired(own, judged["standard"])
    for control in CONTROLS:
        if {"compressed", control} <= judged.keys():
            out[f"compressed - {control}, {place}"] = _paired(judged["compressed"], judged[control])
    for title, group in (("variants", VARIANTS), ("all", EVERYTHING)):
        some = [name for name in group if name in methods]
        if len(some) > 1 and all(name in judged for name in some):
            ranked = sorted(some, key=lambda name: float(found[f"{place}/{name}/chosen score"][0]))
            out[f"{title} apart, {place}"] = _paired(judged[ranked[-1]], judged[ranked[0]])
    return out


def window(rates: np.ndarray, scores: np.ndarray, points: float = POINTS) -> float:
    """Return how many decades around the best rate have scores within `points` of the best.

    Args:
        rates: (R,), ascending.
        scores: (R,), of one seed; NaN counts as worse than any.
        points: in units of the score.

    Returns:
        The width of the interval around the best rate in which the curve, linear in the logarithm of the rate, stays
        above; what lies beyond the grid is not counted.

    Example:
        >>> import numpy as np
        >>> round(window(np.array([1e-4, 1e-3, 1e-2]), np.array([0.5, 0.6, 0.5]), points=0.05), 6)
        1.0
    """
    places = np.log10(rates)
    values = np.where(np.isfinite(scores), scores, -math.inf)
    best = int(values.argmax())
    if not math.isfinite(values[best]):
        return 0.0
    level = values[best] - points
    return float(_reach(places, values, best, level, 1) + _reach(places, values, best, level, -1))


def _reach(places: np.ndarray, values: np.ndarray, best: int, level: float, step: int) -> float:
    """How far on one side of the best the curve stays above a level."""
    at = best
    while 0 <= at + step < len(places):
        nearer, farther = values[at], values[at + step]
        if farther < level:
            share = (nearer - level) / (nearer - farther) if math.isfinite(farther) else 0.0
            return abs(places[at] + share * (places[at + step] - places[at]) - places[best])
        at += step
    return abs(places[at] - places[best])


def _of_method(sweep: Sweep, cells: Cells, place: Place, name: str) -> Arrays:
    """The arrays of a method at a place, all of whose cells there are."""
    by_rate = curve(sweep, cells, *place, name)
    best = chosen_rate(sweep, cells, *place, name)
    assert best is not None  # it is finished
    rates, scores = np.array(list(by_rate)), np.array([one.scores for one in by_rate.values()])
    found = {
        "rates": rates,
        "scores": scores,
        "norms": np.exp([log_norm(one) for one in by_rate.values()]),
        "best": np.array([best]),
        "chosen score": np.array([mean_score(by_rate[best])]),
        "window": np.array([window(rates, column) for column in scores.T]),
        "judged": _judged(cells, place, name, best),
        "published": _judged(cells, place, name, sweep.published(name)),
    }
    if name in MATCHED and "standard" in sweep.methods:
        found["matched"] = _judged(cells, place, name, matched_rate(sweep, cells, *place, name) or best)
    return {f"{label(sweep, place)}/{name}/{key}": value for key, value in found.items()}


def _judged(cells: Cells, place: Place, name: str, rate: float) -> np.ndarray:
    found = cells.get(Cell(*place, name, "judge", rate))
    assert found is not None
    return np.array(found.scores)


def _means(sweep: Sweep, found: Mapping[str, np.ndarray]) -> Arrays:
    """Means over all places of the sweep's own rank, of what all of them have; and windows over LoRA's.

    "..., mean" of every difference; "..., mean of <task>" of the first task's places alone.
    """
    places = [place for place in sweep.places() if place[2] == sweep.adapter_rank]
    first = [place for place in places if place[0] == sweep.tasks[0]]
    out = _windows(sweep, found)
    known = {**found, **out}
    heads = [name[: -len(tail)] for name in known if name.endswith(tail := f", {label(sweep, first[0])}")]
    for head in heads:
        for title, some in (("mean", places), (f"mean of {sweep.tasks[0]}", first)):
            names = [f"{head}, {label(sweep, place)}" for place in some]
            if all(name in known for name in names):
                out[f"{head}, {title}"] = np.mean([known[name] for name in names], 0)
    return out


def _windows(sweep: Sweep, found: Mapping[str, np.ndarray]) -> Arrays:
    """ "window of <method> over standard, <place>": decades by which its window is wider, (S,) tuning seeds."""
    out: Arrays = {}
    for place in map(lambda place: label(sweep, place), sweep.places()):
        own = found.get(f"{place}/standard/window")
        for name in sweep.methods:
            wide = found.get(f"{place}/{name}/window")
            if own is not None and wide is not None and name != "standard":
                out[f"window of {name} over standard, {place}"] = _paired(wide, own)
    return out


def _paired(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """The difference of the seeds that both have; they begin with the same one."""
    count = min(len(one), len(other))
    return one[:count] - other[:count]
