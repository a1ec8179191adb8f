"""What a sweep of rates says: best against best, how wide the windows of good rates are, what one rate for all costs.

A place is a task with a size (and a rank, where it is another than the sweep's own), written "stsb, n = 16". Arrays
hold a value a seed; what lacks cells is not among them, so that its claims stay untested.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from compressible.experiments.rate_grid import is_inside
from compressible.experiments.tuned_methods import ALONE, CONTROLS, DEEP, LORA
from compressible.experiments.tuning_cells import Cell, Cells
from compressible.experiments.tuning_rates import (
    MATCHED,
    chosen_rate,
    curve,
    finished,
    log_norm,
    matched_rate,
    mean_score,
)
from compressible.experiments.tuning_sweep import Place, Sweep, planned, sweep_of
from compressible.experiments.tuning_worker import Worker

POINTS = 0.02  # two points: how far below the best a rate may be to count as good
VARIANTS = tuple(name for name in LORA if name not in ("paper", *ALONE))  # as 2602.04998 compares them
EVERYTHING = (*VARIANTS, "paper", *(name for name in DEEP if name != "full"))
Arrays = dict[str, np.ndarray]
# By place and method: "rates" (R,), "scores" (R, S) on the choosing half, "norms" (R,) of the updates, "best" (1,) the
# chosen rate and its "chosen score" (1,), "window" (S,) decades; "judged", "published" and "matched" (S',) on the
# judging half at the chosen rate, at the published one and at LoRA's effective step.
Parts = dict[tuple[str, str], Arrays]
BY_RATE, BY_SEED = ("rates", "scores", "norms"), ("scores", "window", "judged", "published", "matched")
KEYS = ("rates", "scores", "norms", "best", "chosen score", "window", "judged", "published", "matched")


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

    The `Parts` of each finished method at a place as `stacked` has them, what `differences` gives of them, means over
    places; "rates inside, <first task>" and "rates inside, other tasks", a truth value a method and place, and "rates
    at an end", which of them are not; of the cells themselves "cells", "cell seconds", "commits", "uncommitted cells",
    "cells of another library", "missing" and "missing parts".
    """
    done = {(place, name): own for place, name, own in finished(sweep, cells)}
    parts = {(label(sweep, place), name): _part(sweep, cells, place, name) for place, name in done}
    places = [label(sweep, place) for place in sweep.places()]
    found: Arrays = {}
    for place in places:
        found |= differences({name: part for (at, name), part in parts.items() if at == place}, place)
    found |= _means(sweep, found)
    inside = {(place, name): is_inside(_mean_scores(part)) for (place, name), part in parts.items()}
    found |= _by_task(inside, sweep.tasks[0])
    all_cells = [cell for own in done.values() for cell in own]
    seconds = sum(one.seconds for cell in all_cells if (one := cells.get(cell)) is not None)
    lacking = [f"{name} on {label(sweep, place)}" for place, name in planned(sweep) if (place, name) not in done]
    told = {"cells": len(all_cells), "cell seconds": seconds, "missing": lacking, "missing parts": len(lacking)}
    told["rates at an end"] = [f"{name} on {place}" for (place, name), lies in inside.items() if not lies]
    return {**found, **stacked(parts, places, sweep.methods), **told, **cells.made_by(all_cells)}


def label(sweep: Sweep, place: Place) -> str:
    """Return the name of a place."""
    task, size, rank = place
    return f"{task}, n = {size}" + ("" if rank == sweep.adapter_rank else f", r = {rank}")


def differences(parts: Mapping[str, Arrays], place: str) -> Arrays:
    """Return what methods at a place, of which `parts` has those that are finished, gain over each other, seed by seed.

    Of Deep LoRA's variants and LoRA's paper start "<method> - standard, <place>": best against best; "published gain of
    <method>, <place>": over LoRA with the paper's start, both at the published rate; "cost of the published rate,
    <method>, <place>", of LoRA, too; "window of <method> over standard, <place>" in decades; "compressed - <control>,
    <place>"; "<method> at LoRA's step - standard, <place>"; "variants apart" and "all apart, <place>": the method that
    tuning found best over the one that it found worst, such as one that diverges at every rate.
    """
    out: Arrays = {}
    for name in (name for name in ("standard", "paper", *DEEP) if name in parts):
        out[f"cost of the published rate, {name}, {place}"] = parts[name]["judged"] - parts[name]["published"]
        if name != "standard" and "standard" in parts:
            out[f"{name} - standard, {place}"] = paired(parts, name, "standard", "judged")
            out[f"window of {name} over standard, {place}"] = paired(parts, name, "standard", "window")
        if name in DEEP and "paper" in parts:
            out[f"published gain of {name}, {place}"] = paired(parts, name, "paper", "published")
        if "matched" in parts[name] and "standard" in parts:
            gain = _less(parts[name]["matched"], parts["standard"]["judged"])
            out[f"{name} at LoRA's step - standard, {place}"] = gain
    for control in CONTROLS:
        if {"compressed", control} <= parts.keys():
            out[f"compressed - {control}, {place}"] = paired(parts, "compressed", control, "judged")
    for title, group in (("variants", VARIANTS), ("all", EVERYTHING)):
        if all(name in parts for name in group):
            ranked = sorted(group, key=lambda name: _rank(parts[name]))
            out[f"{title} apart, {place}"] = paired(parts, ranked[-1], ranked[0], "judged")
    return out


def _rank(part: Arrays) -> float:
    """The score by which tuning chose, the least of all where runs diverged at every rate: NaN has no order."""
    score = float(part["chosen score"][0])
    return score if math.isfinite(score) else -math.inf


def paired(parts: Mapping[str, Arrays], one: str, other: str, key: str) -> np.ndarray:
    """Return the difference of two methods at a place of the seeds that both have, which begin with the same one."""
    return _less(parts[one][key], parts[other][key])


def stacked(parts: Parts, places: Sequence[str], methods: Sequence[str]) -> Arrays:
    """Return parts as arrays "<place>/<key>" with an axis of all `methods`, NaN where one has less or is missing.

    A record of few arrays is a small one; `unstacked` gives the parts back.
    """
    found: Arrays = {}
    for place in places:
        own = [parts.get((place, name), {}) for name in methods]
        for key in dict.fromkeys(key for part in own for key in part):
            shapes = [part[key].shape for part in own if key in part]
            whole = np.full((len(own), *np.max(shapes, 0)), np.nan)
            for row, part in zip(whole, own, strict=True):
                if key in part:
                    row[tuple(map(slice, part[key].shape))] = part[key]
            found[f"{place}/{key}"] = whole
    return found


def unstacked(
    arrays: Mapping[str, np.ndarray], places: Sequence[str], methods: Sequence[str], alone_seeds: int
) -> Parts:
    """Return the parts of arrays of `stacked`, by place and method, of those that are finished."""
    found: Parts = {}
    for place in places:
        for at, name in enumerate(methods):
            best = arrays.get(f"{place}/best")
            if best is None or np.isnan(best[at, 0]):
                continue
            found[place, name] = part = {}
            rates = int(np.isfinite(arrays[f"{place}/rates"][at]).sum())
            for key in KEYS:
                whole = arrays.get(f"{place}/{key}")
                if whole is not None and (key != "matched" or name in MATCHED):
                    own = whole[at, :rates] if key in BY_RATE else whole[at]
                    part[key] = own[..., :alone_seeds] if name in ALONE and key in BY_SEED else own
    return found


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


def _part(sweep: Sweep, cells: Cells, place: Place, name: str) -> Arrays:
    """What is known of a method at a place, all of whose cells there are."""
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
    if name in MATCHED:
        found["matched"] = _judged(cells, place, name, matched_rate(sweep, cells, *place, name) or best)
    return found


def _judged(cells: Cells, place: Place, name: str, rate: float) -> np.ndarray:
    found = cells.get(Cell(*place, name, "judge", rate))
    assert found is not None
    return np.array(found.scores)


def _mean_scores(part: Arrays) -> dict[float, float]:
    return dict(zip(part["rates"].tolist(), part["scores"].mean(1).tolist(), strict=True))


def _by_task(inside: Mapping[tuple[str, str], bool], first: str) -> Arrays:
    """Whether rates lie inside their grids, those of the first task apart from those of the others."""
    of_first = [lies for (place, _), lies in inside.items() if place.startswith(f"{first}, ")]
    others = [lies for (place, _), lies in inside.items() if not place.startswith(f"{first}, ")]
    named = {first: of_first, "other tasks": others}
    return {f"rates inside, {task}": np.array(each) for task, each in named.items() if each}


def _means(sweep: Sweep, found: Mapping[str, np.ndarray]) -> Arrays:
    """Means over places of the sweep's own rank, of the differences that all of them have.

    "..., mean" over all tasks and sizes, "..., mean of <task>" over the first task's sizes alone.
    """
    places = [place for place in sweep.places() if place[2] == sweep.adapter_rank]
    first = [place for place in places if place[0] == sweep.tasks[0]]
    heads = [name[: -len(tail)] for name in found if name.endswith(tail := f", {label(sweep, first[0])}")]
    out: Arrays = {}
    for head in heads:
        for title, some in (("mean", places), (f"mean of {sweep.tasks[0]}", first)):
            names = [f"{head}, {label(sweep, place)}" for place in some]
            if all(name in found for name in names):
                out[f"{head}, {title}"] = np.mean([found[name] for name in names], 0)
    return out


def _less(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    count = min(len(one), len(other))
    return one[:count] - other[:count]
