"""Completion methods side by side, each tuned on a validation slice of the entries that it trains on.

Deep factorizations, and alternating least squares (ALS) without and with biases; the test entries are scored along the
way and never chosen on. Entries are ratings (m users, n items) or drawn from a known matrix.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import scipy.sparse
import torch
from torch import Tensor

from compressible.data.ratings import Ratings, Split, center, rating_metrics, validation_slice
from compressible.descent.gradient_descent import descend
from compressible.experiments.compare import descend_to_divergence
from compressible.recovery.als import Sweeps, alternate
from compressible.recovery.compression import compress_spectral
from compressible.recovery.factors import Factors, orthogonal_factors, product
from compressible.recovery.problems import MatrixCompletion
from compressible.recovery.sparse import Entries, SparseCompletion
from compressible.recovery.synthetic import sparse_low_rank
from compressible.recovery.theory.invariants import stability_limit
from compressible.runtime.devices import clock, resolve_device

Completion = SparseCompletion | MatrixCompletion


@dataclass(frozen=True, eq=False)
class Task:
    """`trial` trains on the fit part and errs over the validation slice, `whole` on both parts and over `test`.

    Of a rating table, `ratings` and `index` (N,) say which ratings the test entries are.
    """

    trial: Completion
    whole: Completion
    test: Entries
    ratings: Ratings | None = None
    index: np.ndarray = field(default_factory=lambda: np.empty(0, int))

    def score(self, factors: Sequence[Tensor]) -> dict[str, float]:
        """Return the errors of [W_1, ..., W_L] on the test entries: "rmse", for ratings all of `rating_metrics`."""
        residual = self.test.residual(factors[-1], product(factors[:-1]).mT.contiguous()).cpu().numpy()
        if self.ratings is None:
            return {"rmse": float(np.sqrt(np.mean(residual**2)))}
        return rating_metrics(self.ratings.ratings[self.index] + residual, self.ratings, self.index)


def rating_task(
    ratings: Ratings,
    parts: Split,
    centring: str = "global",
    fraction: float = 0.1,
    device: str = "auto",
    problem: str = "sparse",
) -> Task:
    """Return the task of a rating table (m users, n items); offsets as in `ratings.center`, from what is trained on.

    A "dense" `problem` holds all m n residuals of a step, as P2's loop does, a "sparse" one those of the entries alone.
    Networks of full width take their steps many times faster on the dense one.
    """
    if problem not in ("sparse", "dense"):
        raise ValueError(f'problem is {problem!r}, expected "sparse" or "dense"')
    pairs = [validation_slice(parts, fraction), (parts.train, np.sort(parts.test))]
    trial, whole = (_completion(ratings, *pair, centring, resolve_device(device)) for pair in pairs)
    made = [_dense(each) if problem == "dense" else each for each in (trial, whole)]
    return Task(made[0], made[1], _hidden(whole), ratings, pairs[1][1])


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
    order, cut = torch.randperm(count, generator=generator), round(fraction * count)
    place = resolve_device(device)
    trial = SparseCompletion(_subset(observed, order[cut:]).to(place), _subset(observed, order[:cut]).to(place))
    whole = SparseCompletion(observed.to(place), hidden.to(place))
    return Task(trial, whole, _hidden(whole))


@dataclass(frozen=True, eq=False)
class Fit:
    """A tuned method on the whole task.

    iterations, seconds, error (R,): the test error (half mean square) over iterations or sweeps; final and stopped:
    `Task.score` at the end and at the iteration `stop` that the slice chose; settings: what else it chose;
    start_seconds: what the start took, of `seconds`.
    """

    iterations: np.ndarray
    seconds: np.ndarray
    error: np.ndarray
    final: dict[str, float]
    stopped: dict[str, float]
    stop: int
    settings: dict[str, float]
    start_seconds: float = 0.0

    @property
    def setting(self) -> float:
        """The share of the stability limit, or the ridge."""
        return self.settings["step_fraction" if "step_fraction" in self.settings else "ridge"]


def fit_descent(
    task: Task,
    width: int,
    depth: int,
    init_scales: Sequence[float],
    step_fractions: Sequence[float],
    outer_ratio: float = 1.0,
    start: str = "spectral",
    stop: int | None = None,
    limit: float | None = None,
    **options: Any,
) -> Fit:
    """Choose scale, step size and stopping iteration on the slice, then descend on all training entries.

    start: "spectral", P2's of inner width k = `width`, or "orthogonal", of that width; step sizes are `step_fractions`
    of `limit`, by default of each problem's own `stability_limit`; `options` (steps, record_every) go to `descend`.
    Seconds include the start. A step size that diverges is out; raises ValueError if all do. With `stop` nothing is
    chosen: that iteration, the first scale and the first fraction are taken.
    """
    scale, fraction = init_scales[0], step_fractions[0]
    if stop is None:
        trials = list(itertools.product(init_scales, step_fractions))
        begun = _begin(task.trial, width, depth, start, limit)
        scale, fraction, stop = _choose(task.trial, begun, trials, outer_ratio, options)
    begun = _begin(task.whole, width, depth, start, limit)
    options |= {"outer_ratio": outer_ratio, "snapshots": (stop,)}
    history = descend(task.whole, begun.scaled(scale), fraction * begun.limit, **options)
    return Fit(
        iterations=history.iterations.numpy(),
        seconds=history.seconds.numpy() + begun.seconds,
        error=history.error.numpy(),
        final=task.score(history.factors),
        stopped=task.score(history.snapshots[stop]),
        stop=stop,
        settings={"init_scale": scale, "step_fraction": fraction},
        start_seconds=begun.seconds,
    )


def fit_sweeps(
    task: Task,
    rank: int,
    ridges: Sequence[float],
    sweeps: int,
    biases: bool = False,
    start: str | tuple[Tensor, Tensor] = "spectral",
    stop: int | None = None,
) -> Fit:
    """Alternating least squares (`alternate`), its ridge and stopping sweep chosen on the slice, the task sparse.

    start: as `alternate` knows, or V for the trial and V for the whole. With `stop` the ridge alone is chosen, by the
    error after that sweep.
    """
    starts = (start, start) if isinstance(start, str) else start

    def solve(problem: Completion, ridge: float, start: str | Tensor, snapshots: Sequence[int] = ()) -> Sweeps:
        if not isinstance(problem, SparseCompletion):
            raise ValueError(f"task holds {type(problem).__name__}, expected SparseCompletion for least squares")
        generator = torch.Generator().manual_seed(0)
        return alternate(problem, rank, ridge, sweeps, generator, biases, start=start, snapshots=snapshots)

    errors = torch.stack([solve(task.trial, ridge, starts[0]).error for ridge in ridges]).nan_to_num(torch.inf)
    row, stop = divmod(int(errors.argmin()), sweeps + 1) if stop is None else (int(errors[:, stop].argmin()), stop)
    result = solve(task.whole, ridges[row], starts[1], (stop,))
    return Fit(
        iterations=np.arange(sweeps + 1),
        seconds=result.seconds.numpy(),
        error=result.error.numpy(),
        final=task.score(result.factors),
        stopped=task.score(result.snapshots[stop]),
        stop=stop,
        settings={"ridge": ridges[row]},
        start_seconds=float(result.seconds[0]),
    )


def fit_network(
    task: Task, kind: str, rank: int, depth: int, init_scale: float, step_fractions: Sequence[float], **options: Any
) -> Fit:
    """Fit P2's "original" network (width min(m, n)) or its "compressed" one (width 2 rank), as `fit_descent`.

    One step size serves slice and whole: a share of the stability limit of the slice's problem. P2's loop is that of a
    dense problem: see `rating_task`.
    """
    if kind not in ("original", "compressed"):
        raise ValueError(f'kind is {kind!r}, expected "original" or "compressed"')
    width, start = (2 * rank, "spectral") if kind == "compressed" else (min(task.whole.shape), "orthogonal")
    limit = float(stability_limit(task.trial, depth))
    return fit_descent(task, width, depth, (init_scale,), step_fractions, start=start, limit=limit, **options)


def fit_biased(
    ratings: Ratings, parts: Split, rank: int, ridges: Sequence[float], sweeps: int, validation_fraction: float = 0.1
) -> Fit:
    """Biased matrix factorisation to the last sweep, from centred means, its ridge chosen on the validation slice."""
    task = rating_task(ratings, parts, "global", validation_fraction, "cpu")
    draw = 0.1 * torch.randn(ratings.shape[1], rank, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    means = [center(ratings, index).item for index in (validation_slice(parts, validation_fraction)[0], parts.train)]
    first, second = (torch.cat([draw, torch.from_numpy(mean)[:, None]], 1) for mean in means)
    return fit_sweeps(task, rank, ridges, sweeps, True, (first, second), sweeps)


def gather(name: str, runs: Sequence[dict[str, Fit]]) -> dict[str, np.ndarray | list[str]]:
    """Return a run's output from S repetitions of {method: fit}, keys "<name>/<method>/<what>", and "<name>/methods".

    Curves are those of the first repetition; final and stopped ("rmse"), stop and the settings are (S,).
    """
    out: dict = {f"{name}/methods": list(runs[0])}
    for method, first in runs[0].items():
        fits = [run[method] for run in runs]
        rows = [{"final": f.final["rmse"], "stopped": f.stopped["rmse"], "stop": f.stop, **f.settings} for f in fits]
        values = {key: np.array([row[key] for row in rows]) for key in rows[0]}
        values |= {"iterations": first.iterations, "seconds": first.seconds, "rmse": np.sqrt(2 * first.error)}
        out |= {f"{name}/{method}/{key}": value for key, value in values.items()}
    return out


def summary(fits: Sequence[Fit]) -> dict[str, np.ndarray]:
    """Return the curves of the first fit and, per split (S,), scores, setting, seconds and least error of all.

    Curves are "iterations", "seconds" and "error" (R,); scores "final/<metric>" and "stopped/<metric>", at the end and
    at the iteration that the validation slice chose; "setting" is what else it chose, "time" the seconds of a fit and
    "best" its least test error. Seconds are without the start, as P2 counts them.
    """
    first = fits[0]
    out = {"iterations": first.iterations, "seconds": first.seconds - first.start_seconds, "error": first.error}
    for key in first.final:
        out[f"final/{key}"] = np.array([fit.final[key] for fit in fits])
        out[f"stopped/{key}"] = np.array([fit.stopped[key] for fit in fits])
    out["setting"] = np.array([fit.setting for fit in fits])
    out["time"] = np.array([fit.seconds[-1] - fit.start_seconds for fit in fits])
    out["best"] = np.array([fit.error.min() for fit in fits])
    return out


def rms(task: Task) -> float:
    """Return the root mean square of the test entries."""
    return float(task.test.rows.values.square().mean().sqrt())


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


def _choose(
    problem: Completion, start: _Start, trials: list[tuple[float, float]], outer_ratio: float, options: dict[str, Any]
) -> tuple[float, float, int]:
    """The (scale, fraction, iteration) of least held-out error; the trials of a dense problem are one stack."""
    found: list[tuple[float, float, float, int]] = []
    for group in [trials] if isinstance(problem, MatrixCompletion) else [[trial] for trial in trials]:
        scaled = [start.scaled(scale) for scale, _ in group]
        sizes = torch.tensor([fraction * start.limit for _, fraction in group], dtype=torch.float64)
        stack = isinstance(problem, MatrixCompletion)
        factors = [torch.stack(layer) for layer in zip(*scaled, strict=True)] if stack else scaled[0]
        size = sizes if stack else float(sizes)
        history = descend_to_divergence(problem, factors, size, outer_ratio=outer_ratio, **options)
        usable = torch.isfinite(history.error) & torch.isfinite(history.final("loss"))[..., None]
        errors = history.error.masked_fill(~usable, torch.inf).reshape(len(group), -1)
        for trial, row, at in zip(group, errors, errors.argmin(1).tolist(), strict=True):
            found.append((float(row[at]), *trial, int(history.iterations[at])))
    error, scale, fraction, stop = min(found)
    if error == float("inf"):
        raise ValueError(f"step_fractions are {[f for _, f in trials]}: all diverge, expected one that does not")
    return scale, fraction, stop


def _completion(
    ratings: Ratings, train: np.ndarray, held_out: np.ndarray, centring: str, device: str
) -> SparseCompletion:
    offsets = center(ratings, train, centring)

    def entries(index: np.ndarray) -> scipy.sparse.coo_array:
        users, items = ratings.users[index], ratings.items[index]
        values = ratings.ratings[index] - offsets.at(users, items)
        return scipy.sparse.coo_array((values, (users, items)), shape=ratings.shape)

    return SparseCompletion(entries(train), entries(held_out), device=device)


def _dense(problem: SparseCompletion) -> MatrixCompletion:
    target = torch.full(problem.shape, torch.nan, dtype=problem.dtype, device=problem.device)
    for entries in (_hidden(problem), problem.seen):
        target[entries.rows.lines(), entries.rows.indices.long()] = entries.rows.values
    mask = problem.seen.matrix(torch.ones_like(problem.seen.rows.values)).to_dense()
    return MatrixCompletion(target, mask)


def _hidden(problem: SparseCompletion) -> Entries:
    if problem.unseen is None:
        raise ValueError("the problem hides no entry, expected some to err over")
    return problem.unseen


def _subset(entries: Tensor, index: Tensor) -> Tensor:
    indices, values = entries.indices()[:, index], entries.values()[index]
    return torch.sparse_coo_tensor(indices, values, entries.shape, check_invariants=False)
