"""Which rates a sweep has tried, which of them a method's tuning chose, and the cells that judge the choice."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from compressible.experiments.rate_grid import best_of
from compressible.experiments.tuning_cells import Cell, Cells, Scored
from compressible.experiments.tuning_sweep import Place, Sweep, planned

MATCHED = ("compressed", "thin")  # what also runs at LoRA's effective step


def mean_score(found: Scored | None) -> float:
    """Return the mean over seeds: NaN where one diverged, or there is none."""
    return math.nan if found is None else float(np.mean(found.scores))


def curve(sweep: Sweep, cells: Cells, task: str, size: int, rank: int, name: str) -> dict[float, Scored]:
    """Return what tuning has found so far by rate, ascending: the grid, and the rates by which it grew."""
    start, found = list(sweep.learning_rates), {}
    down, up = [start[0]], [start[-1]]
    for _ in range(sweep.more_rates):
        down.append(sweep.next_rate(down[-1], -1))
        up.append(sweep.next_rate(up[-1], 1))
    for rate in [*down[:0:-1], *start, *up[1:]]:
        cell = cells.get(Cell(task, size, rank, name, "choose", rate))
        if cell is not None:
            found[rate] = cell
    return found


def chosen_rate(sweep: Sweep, cells: Cells, task: str, size: int, rank: int, name: str) -> float | None:
    """Return the best rate of a finished search, which lies inside the grid or could not be found inside; else None."""
    found = {rate: mean_score(cell) for rate, cell in curve(sweep, cells, task, size, rank, name).items()}
    if any(rate not in found for rate in sweep.learning_rates):
        return None
    best, grown = best_of(found), len(found) - len(sweep.learning_rates)
    return best if min(found) < best < max(found) or grown >= sweep.more_rates else None


def matched_rate(sweep: Sweep, cells: Cells, task: str, size: int, rank: int, name: str) -> float | None:
    """Return the rate of a method whose updates are, in the mean of their logarithms, nearest to LoRA's at its best."""
    best = chosen_rate(sweep, cells, task, size, rank, "standard")
    if best is None or chosen_rate(sweep, cells, task, size, rank, name) is None:
        return None
    lora = cells.get(Cell(task, size, rank, "standard", "choose", best))
    sizes = {rate: log_norm(cell) for rate, cell in curve(sweep, cells, task, size, rank, name).items()}
    finite = {rate: value for rate, value in sizes.items() if math.isfinite(value)}
    return min(finite, key=lambda rate: abs(finite[rate] - log_norm(lora))) if finite and lora else None


def log_norm(found: Scored | None) -> float:
    """Return the mean logarithm of the updates' norms over seeds, -inf where one is zero."""
    norms = np.array([math.nan] if found is None else found.norms, float)
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(np.log(norms).mean())


def judged_cells(sweep: Sweep, cells: Cells, task: str, size: int, rank: int, name: str) -> list[Cell]:
    """Return the cells that judge a method whose rate is chosen: at it, at the published one, at LoRA's step."""
    best = chosen_rate(sweep, cells, task, size, rank, name)
    if best is None:
        return []
    rates = [best, sweep.published(name)]
    if name in MATCHED and "standard" in sweep.methods:
        rates.append(matched_rate(sweep, cells, task, size, rank, name) or best)
    return [Cell(task, size, rank, name, "judge", rate) for rate in dict.fromkeys(rates)]


def finished(sweep: Sweep, cells: Cells) -> Iterator[tuple[Place, str, list[Cell]]]:
    """Yield places and methods whose rate is chosen and judged, with all their cells."""
    for place, name in planned(sweep):
        judged = judged_cells(sweep, cells, *place, name)
        if judged and not cells.missing(judged):
            rates = curve(sweep, cells, *place, name)
            yield place, name, [Cell(*place, name, "choose", rate) for rate in rates] + judged
