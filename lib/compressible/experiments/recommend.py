"""Completion methods side by side, each with the settings that do best on a validation slice of what it trains on.

Deep factorizations, and alternating least squares (ALS) without and with biases. Every method has a grid of its own
that grows until the best point lies inside (`search_settings`); the test entries are scored and never chosen on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compressible.data.ratings import Ratings, Split, center, validation_slice
from compressible.descent.history import History
from compressible.experiments.compare import descend_to_divergence
from compressible.experiments.completion_fits import Fit
from compressible.experiments.completion_tasks import Completion, Task, rating_task
from compressible.experiments.setting_grid import GAIN, Search, Settings, search_settings
from compressible.recovery.als import Sweeps, alternate
from compressible.recovery.compression import compress_spectral
from compressible.recovery.factors import Factors, orthogonal_factors
from compressible.recovery.sparse import SparseCompletion
from compressible.recovery.theory.invariants import stability_limit
from compressible.runtime.devices import clock

SCALE_FACTOR, STEP_FACTOR, RIDGE_FACTOR = 10**0.25, 2.0, 1.5  # between neighbours of a grid
CHUNKS = 3  # parts of a trial, each with a set-up of its own; after each one that overfits is given up
OVERFIT = 1.1  # its held-out error over the least so far: 5 % in root mean square


def fit_descent(
    task: Task,
    width: int,
    depth: int,
    init_scale: float,
    step_fraction: float,
    most: int,
    outer_ratio: float = 1.0,
    start: str = "spectral",
    limit: float | None = None,
    tuning_steps: int | None = None,
    factors: Settings = (SCALE_FACTOR, STEP_FACTOR),
    gain: float = GAIN,
    **options: Any,
) -> Fit:
    """Choose scale, step size and stopping iteration on the slice, then descend on all training entries.

    start: "spectral", P2's of inner width k = `width`, or "orthogonal", of that width. The grid of at `most` points
    goes out from `init_scale` and `step_fraction`, the latter of `limit`, by default each problem's own
    `stability_limit`; a factor of 1 in `factors` leaves a setting as it is; `gain` as for `search_settings`. Trials
    take `tuning_steps`, by default all `steps`, and end where they overfit. `options` (steps, record_every) go to
    `descend`. Seconds include the start. A step size that diverges is out; raises ValueError if all do.
    """
    trial = _begin(task.trial, width, depth, start, limit)
    shorter = options | {"steps": options["steps"] if tuning_steps is None else tuning_steps}
    found: dict[Settings, tuple[float, int]] = {}

    def error_of(at: Settings) -> float:
        found[at] = _trial(task.trial, trial.scaled(at[0]), at[1] * trial.limit, task.floor, outer_ratio, **shorter)
        return found[at][0]

    search = search_settings(error_of, (init_scale, step_fraction), factors, most, gain, task.floor)
    stop, begun = found[search.settings][1], _begin(task.whole, width, depth, start, limit)
    options |= {"outer_ratio": outer_ratio, "snapshots": (stop,)}
    scale, fraction = search.settings
    history = descend_to_divergence(task.whole, begun.scaled(scale), fraction * begun.limit, **options)
    return _fit_of(task, history, stop, search, begun.seconds)


def fit_sweeps(
    task: Task,
    rank: int,
    ridge: float,
    sweeps: int,
    most: int = 1,
    biases: bool = False,
    start: str | tuple[Tensor, Tensor] = "spectral",
    stop: int | None = None,
) -> Fit:
    """Alternating least squares (`alternate`), ridge and stopping sweep chosen on the slice, the task sparse.

    The grid of at most `most` ridges goes out from `ridge`; with 1 it is as given. start: as `alternate` knows, or V
    for trial and whole. With `stop` the ridge alone is chosen, by the error after that sweep.
    """
    starts = (start, start) if isinstance(start, str) else start

    def solve(problem: Completion, ridge: float, start: str | Tensor, snapshots: Sequence[int] = ()) -> Sweeps:
        if not isinstance(problem, SparseCompletion):
            raise ValueError(f"task holds {type(problem).__name__}, expected SparseCompletion for least squares")
        generator = torch.Generator().manual_seed(0)
        return alternate(problem, rank, ridge, sweeps, generator, biases, start=start, snapshots=snapshots)

    stops: dict[Settings, int] = {}

    def error_of(at: Settings) -> float:
        errors = solve(task.trial, at[0], starts[0]).error.nan_to_num(torch.inf)
        stops[at] = int(errors.argmin()) if stop is None else stop
        return float(errors[stops[at]])

    search = search_settings(error_of, (ridge,), (RIDGE_FACTOR,), most, floor=task.floor)
    result = solve(task.whole, search.settings[0], starts[1], (stops[search.settings],))
    return Fit(
        iterations=np.arange(sweeps + 1),
        seconds=result.seconds.numpy(),
        error=result.error.numpy(),
        final=_score(task, result.factors),
        stopped=_score(task, result.snapshots[stops[search.settings]]),
        stop=stops[search.settings],
        settings={"ridge": search.settings[0]},
        start_seconds=float(result.seconds[0]),
        tried=len(search.tried),
        inside=search.inside,
    )


def fit_network(task: Task, kind: str, rank: int, depth: int, init_scale: float, **options: Any) -> Fit:
    """Fit P2's "original" network (width min(m, n)) or its "compressed" one (width 2 rank), as `fit_descent`.

    The scale stays as given. One step size serves slice and whole: a share of the stability limit of the slice's
    problem. P2's loop is that of a dense problem: see `rating_task`.
    """
    if kind not in ("original", "compressed"):
        raise ValueError(f'kind is {kind!r}, expected "original" or "compressed"')
    width, start = (2 * rank, "spectral") if kind == "compressed" else (min(task.whole.shape), "orthogonal")
    fixed: dict[str, Any] = {"start": start, "limit": float(stability_limit(task.trial, depth))}
    return fit_descent(task, width, depth, init_scale, factors=(1.0, STEP_FACTOR), **fixed, **options)


def fit_biased(
    ratings: Ratings,
    parts: Split,
    rank: int,
    ridge: float,
    sweeps: int,
    most: int,
    validation_fraction: float = 0.1,
    device: str = "cpu",
) -> Fit:
    """Biased matrix factorisation to the last sweep, from centred means, its ridge chosen on the validation slice."""
    task = rating_task(ratings, parts, "global", validation_fraction, device)
    draw = 0.1 * torch.randn(ratings.shape[1], rank, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    means = [center(ratings, index).item for index in (validation_slice(parts, validation_fraction)[0], parts.train)]
    first, second = (torch.cat([draw, torch.from_numpy(mean)[:, None]], 1) for mean in means)
    return fit_sweeps(task, rank, ridge, sweeps, most, True, (first, second), sweeps)


@dataclass(frozen=True, eq=False)
class _Start:
    """Factors at eps = 1, which every scale shares, the seconds that they took, and the limit of the step."""

    factors: Factors
    seconds: float
    limit: float

    def scaled(self, scale: float) -> Factors:
        return [scale * factor for factor in self.factors]


def _begin(problem: Completion, width: int, depth: int, start: str, limit: float | None) -> _Start:
    like = torch.empty(0, device=problem.device)
    began = clock(like)
    if start == "spectral":
        factors = compress_spectral(problem, width, depth, 1.0)
    elif start == "orthogonal":
        generator = torch.Generator().manual_seed(0)
        factors = orthogonal_factors(problem.shape, depth, width, 1.0, generator, device=problem.device)
    else:
        raise ValueError(f'start is {start!r}, expected "spectral" or "orthogonal"')
    seconds = clock(like) - began
    return _Start(factors, seconds, float(stability_limit(problem, depth)) if limit is None else limit)


def _trial(
    problem: Completion,
    factors: Factors,
    step_size: float,
    floor: float,
    outer_ratio: float,
    steps: int,
    record_every: int,
    **options: Any,
) -> tuple[float, int]:
    """The least held-out error and its iteration, of a descent that is given up once it overfits, infinite if it
    diverges; it ends below `floor`, too.
    """
    chunk, done, least, stop = record_every * -(-steps // (CHUNKS * record_every)), 0, torch.inf, 0
    options |= {"outer_ratio": outer_ratio, "record_every": record_every}
    while done < steps:
        history = descend_to_divergence(problem, factors, step_size, steps=min(chunk, steps - done), **options)
        last, at = float(history.error[-1]), int(history.error.nan_to_num(torch.inf).argmin())
        if not (np.isfinite(last) and torch.isfinite(history.final("loss"))):
            return torch.inf, 0
        if history.error[at] < least:
            least, stop = float(history.error[at]), done + int(history.iterations[at])
        if last > OVERFIT * least or least <= floor:
            break
        factors, done = history.factors, done + chunk
    return least, stop


def _fit_of(task: Task, history: History, stop: int, search: Search, start_seconds: float) -> Fit:
    return Fit(
        iterations=history.iterations.numpy(),
        seconds=history.seconds.numpy() + start_seconds,
        error=history.error.numpy(),
        final=_score(task, history.factors),
        stopped=_score(task, history.snapshots.get(stop, history.factors)),
        stop=stop,
        settings=dict(zip(("init_scale", "step_fraction"), search.settings, strict=True)),
        start_seconds=start_seconds,
        tried=len(search.tried),
        inside=search.inside,
    )


def _score(task: Task, factors: Sequence[Tensor]) -> dict[str, float]:
    """`Task.score`, infinite where the factors are not finite."""
    if all(bool(torch.isfinite(factor).all()) for factor in factors):
        return task.score(factors)
    return dict.fromkeys(task.score([torch.zeros_like(factor) for factor in factors]), torch.inf)
