"""Completion methods side by side on the observed entries alone, each tuned on a validation slice of them.

Deep factorizations from the compressed spectral start, and alternating least squares without and with biases; the
test entries are scored along the way and never chosen on. Entries may be ratings or drawn from a known matrix.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.sparse
import torch

from compressible.data.ratings import Ratings, Split, center, validation_slice
from compressible.descent.gradient_descent import DivergenceError, descend
from compressible.descent.history import History
from compressible.recovery.compression import compress_spectral
from compressible.recovery.sparse import SparseCompletion
from compressible.recovery.sparse_als import alternate
from compressible.recovery.synthetic import sparse_low_rank
from compressible.recovery.theory.invariants import stability_limit
from compressible.runtime.devices import _now, resolve_device


@dataclass(frozen=True, eq=False)
class Task:
    """`trial` trains on the fit part and errs over the validation slice, `whole` on both parts and over the test."""

    trial: SparseCompletion
    whole: SparseCompletion


def rating_task(
    ratings: Ratings, parts: Split, centring: str = "global", fraction: float = 0.1, device: str = "auto"
) -> Task:
    """Return the task of a rating table (m users, n items); offsets as in `ratings.center`, from what is trained on."""
    fit, validation = validation_slice(parts, fraction)

    def problem(train: np.ndarray, held_out: np.ndarray) -> SparseCompletion:
        offsets = center(ratings, train, centring)
        return _problem(ratings, offsets, train, held_out, resolve_device(device))

    return Task(problem(fit, validation), problem(parts.train, parts.test))


def drawn_task(
    shape: tuple[int, int],
    rank: int,
    count: int,
    generator: torch.Generator | None = None,
    fraction: float = 0.1,
    device: str = "auto",
) -> Task:
    """Return the task of `count` entries of a rank-r matrix (`sparse_low_rank`), the test a tenth as many hidden ones.

    The slice is a random `fraction` of the observed entries. Raises ValueError as `sparse_low_rank`.
    """
    observed, hidden = sparse_low_rank(shape, rank, count, generator)
    cut = round(fraction * count)
    order = torch.randperm(count, generator=generator)
    parts = [_subset(observed, order[cut:]), _subset(observed, order[:cut])]
    place = resolve_device(device)
    pairs = [[part.to(place) for part in pair] for pair in (parts, (observed, hidden))]
    return Task(*(SparseCompletion(*pair) for pair in pairs))


@dataclass(frozen=True, eq=False)
class Trace:
    """A tuned method on the whole task.

    iterations, seconds, rmse (R,): the root mean square test error over iterations or sweeps; final and stopped: that
    error at the end and at the iteration `stop` that the slice chose; settings: what else it chose.
    """

    iterations: np.ndarray
    seconds: np.ndarray
    rmse: np.ndarray
    final: float
    stopped: float
    stop: int
    settings: dict[str, float]


def fit_descent(
    task: Task,
    width: int,
    depth: int,
    init_scales: Sequence[float],
    step_fractions: Sequence[float],
    outer_ratio: float = 1.0,
    **options,
) -> Trace:
    """Choose scale, step size and stopping iteration on the slice, then descend on all observed entries.

    The start is P2's of inner width k = `width`; step sizes are `step_fractions` of each problem's `stability_limit`;
    `options` (steps, record_every) go to `descend`. Seconds include the start. A step size that diverges is out;
    raises ValueError if all do.
    """
    runs, start = [], _start(task.trial, width, depth)
    for scale, fraction in itertools.product(init_scales, step_fractions):
        try:
            history = _descend(task.trial, start, scale, fraction, outer_ratio, options)
        except DivergenceError:
            continue
        at = int(history.error.argmin())
        runs.append((float(history.error[at]), scale, fraction, int(history.iterations[at])))
    if not runs:
        raise ValueError(f"step_fractions are {list(step_fractions)}: all diverge, expected one that does not")
    _, scale, fraction, stop = min(runs)
    start = _start(task.whole, width, depth)
    history = _descend(task.whole, start, scale, fraction, outer_ratio, options)
    settings = {"init_scale": scale, "step_fraction": fraction}
    return _trace(history.iterations, history.seconds + start.seconds, history.error, stop, settings)


def fit_sweeps(
    task: Task, rank: int, ridges: Sequence[float], sweeps: int, biases: bool = False, start: str = "spectral"
) -> Trace:
    """Alternating least squares (`alternate`), its ridge and stopping sweep chosen on the slice."""

    def solve(problem: SparseCompletion, ridge: float):
        return alternate(problem, rank, ridge, sweeps, torch.Generator().manual_seed(0), biases, start=start)

    errors = torch.stack([solve(task.trial, ridge).error for ridge in ridges])
    row, stop = divmod(int(errors.nan_to_num(torch.inf).argmin()), sweeps + 1)
    result = solve(task.whole, ridges[row])
    return _trace(torch.arange(sweeps + 1), result.seconds, result.error, stop, {"ridge": ridges[row]})


def gather(name: str, runs: Sequence[dict[str, Trace]]) -> dict[str, np.ndarray | list[str]]:
    """Return a run's output from S repetitions of {method: trace}, keys "<name>/<method>/<what>", and "<name>/methods".

    Curves are those of the first repetition; final, stopped, stop and the settings are (S,).
    """
    out: dict = {f"{name}/methods": list(runs[0])}
    for method, trace in runs[0].items():
        traces = [run[method] for run in runs]
        rows = [{"final": t.final, "stopped": t.stopped, "stop": t.stop, **t.settings} for t in traces]
        values = {key: np.array([row[key] for row in rows]) for key in rows[0]}
        values |= {curve: getattr(trace, curve) for curve in ("iterations", "seconds", "rmse")}
        out |= {f"{name}/{method}/{key}": value for key, value in values.items()}
    return out


def rms(problem: SparseCompletion) -> float:
    """Return the root mean square of the hidden entries."""
    return float(problem.unseen.rows.values.square().mean().sqrt())


@dataclass(frozen=True, eq=False)
class _Start:
    """P2's factors at eps = 1, which every scale shares, the seconds that they took, and the limit of the step."""

    factors: list[torch.Tensor]
    seconds: float
    limit: float


def _start(problem: SparseCompletion, width: int, depth: int) -> _Start:
    began = _now(problem.seen.rows.values)
    factors = compress_spectral(problem, width, depth, 1.0)
    seconds = _now(factors[0]) - began
    return _Start(factors, seconds, float(stability_limit(problem, depth)))


def _descend(problem: SparseCompletion, start: _Start, scale: float, fraction: float, outer_ratio, options) -> History:
    factors = [scale * factor for factor in start.factors]
    return descend(problem, factors, fraction * start.limit, outer_ratio=outer_ratio, **options)


def _trace(iterations, seconds, error, stop: int, settings: dict[str, float]) -> Trace:
    steps, clock, rmse = (np.asarray(curve) for curve in (iterations, seconds, (2 * error).sqrt()))
    return Trace(steps, clock, rmse, float(rmse[-1]), float(rmse[steps == stop][0]), stop, settings)


def _problem(ratings: Ratings, offsets, train: np.ndarray, held_out: np.ndarray, device: str) -> SparseCompletion:
    matrices = []
    for index in (train, held_out):
        users, items = ratings.users[index], ratings.items[index]
        values = ratings.ratings[index] - offsets.at(users, items)
        matrices.append(scipy.sparse.coo_array((values, (users, items)), shape=ratings.shape))
    return SparseCompletion(*matrices, device=device)


def _subset(entries: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    indices, values = entries.indices()[:, index], entries.values()[index]
    return torch.sparse_coo_tensor(indices, values, entries.shape, check_invariants=False)
