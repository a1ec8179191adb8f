"""Deep factorizations as recommenders: ratings as a completion problem, tuned without a look at the test ratings.

m users, n items. P2 completes the raw ratings (no centring) and reports half the mean squared error; beside it
stand centred ratings and stopping at the iteration that a validation slice prefers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from compressible.data.ratings import Offsets, Ratings, Split, center, rating_metrics, to_matrix, validation_slice
from compressible.descent.gradient_descent import DivergenceError, descend
from compressible.experiments.biased_als import biased_matrix_factorisation, tune
from compressible.recovery.als import Alternation, alternating_minimisation
from compressible.recovery.compression import compress_spectral
from compressible.recovery.factors import Factors, orthogonal_factors, product
from compressible.recovery.problems import MatrixCompletion
from compressible.recovery.theory.invariants import stability_limit
from compressible.runtime.devices import resolve_device


@dataclass(frozen=True, eq=False)
class Fit:
    """A method fitted to the training ratings.

    iterations, seconds, error (R,): the test error (half mean square, in stars^2) over iterations or sweeps; final and
    stopped: `ratings.rating_metrics` on the test ratings at the end, as P2 reports, and at the iteration that the
    validation slice chose, `stop`; setting: the ridge, or the share of the stability limit, that it chose.
    """

    iterations: np.ndarray
    seconds: np.ndarray
    error: np.ndarray
    final: dict[str, float]
    stopped: dict[str, float]
    setting: float
    stop: int


def completion_problem(
    ratings: Ratings, fit: np.ndarray, held_out: np.ndarray, offsets: Offsets, device: str = "auto"
) -> MatrixCompletion:
    """Return the problem (m, n) that trains on the ratings `fit` less `offsets`; its error is over `held_out` only."""
    target, _ = to_matrix(ratings, np.concatenate([fit, held_out]), offsets=offsets)
    _, mask = to_matrix(ratings, fit)
    _, known = to_matrix(ratings, np.concatenate([fit, held_out]))
    place = resolve_device(device)
    return MatrixCompletion(target.masked_fill(known == 0, float("nan")).to(place), mask.to(place))


def network(problem: MatrixCompletion, kind: str, rank: int, depth: int, scale: float, seed: int = 0) -> Factors:
    """Return the start of P2's "original" network (width min(m, n)) or its "compressed" one (width 2 rank)."""
    if kind == "compressed":
        return compress_spectral(problem, 2 * rank, depth, scale)
    if kind != "original":
        raise ValueError(f'kind is {kind!r}, expected "original" or "compressed"')
    generator, width = torch.Generator().manual_seed(seed), min(problem.shape)
    return orthogonal_factors(problem.shape, depth, width, scale, generator, device=problem.device)


def choose_step(
    problem: MatrixCompletion, factors: Factors, step_sizes: Sequence[float], outer_ratio: float, **options
) -> tuple[float, int]:
    """Descend with all `step_sizes` as one stack; return the (step size, iteration) of least held-out error.

    A step size that diverges is out, whatever it reached before. Raises ValueError if all diverge.
    """
    try:
        history = descend(problem, factors, torch.tensor(step_sizes), outer_ratio=outer_ratio, **options)
    except DivergenceError as error:
        history = error.history
    usable = torch.isfinite(history.error) & torch.isfinite(history.final("loss"))[:, None]
    if not bool(usable.any()):
        raise ValueError(f"step_sizes are {list(step_sizes)}: all diverge, expected at least one that does not")
    errors = history.error.masked_fill(~usable, torch.inf)
    row, column = divmod(int(errors.argmin()), errors.shape[1])
    return float(step_sizes[row]), int(history.iterations[column])


def fit_deep(
    ratings: Ratings,
    parts: Split,
    kind: str,
    rank: int,
    depth: int,
    init_scale: float,
    step_fractions: Sequence[float],
    outer_ratio: float = 1.0,
    centring: str = "none",
    validation_fraction: float = 0.1,
    device: str = "auto",
    stop: int | None = None,
    **options,
) -> Fit:
    """Choose step size and stopping iteration on a validation slice of the training ratings, then fit on all of them.

    kind "original" or "compressed"; rank r, the compressed width is 2r; step sizes are `step_fractions` of
    `theory.stability_limit`; centring as in `ratings.center`; `options` (steps, record_every) go to `descend`. The
    test ratings are scored, never chosen on. With `stop` nothing is chosen: the first step fraction and that iteration
    are taken, as another network's fit on the same slice found them.
    """
    fit, validation = validation_slice(parts, validation_fraction)
    trial = completion_problem(ratings, fit, validation, center(ratings, fit, centring), device)
    limit = float(stability_limit(trial, depth))
    sizes = [fraction * limit for fraction in step_fractions]
    step_size = sizes[0]
    if stop is None:
        start = network(trial, kind, rank, depth, init_scale)
        step_size, stop = choose_step(trial, start, sizes, outer_ratio, **options)
    offsets = center(ratings, parts.train, centring)
    problem = completion_problem(ratings, parts.train, parts.test, offsets, device)
    start = network(problem, kind, rank, depth, init_scale)
    history = descend(problem, start, step_size, outer_ratio=outer_ratio, snapshots=(stop,), **options)
    score = partial(_score, offsets=offsets, ratings=ratings, parts=parts)
    final, stopped = score(product(history.factors)), score(product(history.snapshots[stop]))
    curves = (np.asarray(curve) for curve in (history.iterations, history.seconds, history.error))
    return Fit(*curves, final, stopped, step_size / limit, stop)


def fit_alternating(
    ratings: Ratings, parts: Split, rank: int, ridges: Sequence[float], sweeps: int, validation_fraction: float = 0.1
) -> Fit:
    """Alternating minimisation on the raw ratings, its ridge and stopping sweep chosen on the validation slice."""
    fit, validation = validation_slice(parts, validation_fraction)
    errors = [_alternate(ratings, fit, validation, rank, ridge, sweeps)[0].error for ridge in ridges]
    row, stop = divmod(int(torch.stack(errors).argmin()), sweeps + 1)
    whole, none = _alternate(ratings, parts.train, parts.test, rank, ridges[row], sweeps)
    early, _ = _alternate(ratings, parts.train, parts.test, rank, ridges[row], max(stop, 1))
    scores = [_score(result.matrix(), none, ratings, parts) for result in (whole, early)]
    return Fit(np.arange(sweeps + 1), whole.seconds.numpy(), whole.error.numpy(), *scores, ridges[row], stop)


def fit_biased(
    ratings: Ratings, parts: Split, rank: int, ridges: Sequence[float], sweeps: int, validation_fraction: float = 0.1
) -> Fit:
    """Biased matrix factorisation (`baselines`), its ridge chosen on the validation slice."""
    chosen = tune(ratings, *validation_slice(parts, validation_fraction), (rank,), ridges, sweeps)
    generator = torch.Generator().manual_seed(0)
    model = biased_matrix_factorisation(ratings, parts.train, rank, chosen.ridge, sweeps, generator)
    scores = rating_metrics(model.matrix(), ratings, parts.test)
    last = np.array([sweeps]), np.array([model.seconds]), np.array([scores["half_mse"]])
    return Fit(*last, scores, scores, chosen.ridge, sweeps)


def _alternate(
    ratings: Ratings, fit: np.ndarray, held_out: np.ndarray, rank: int, ridge: float, sweeps: int
) -> tuple[Alternation, Offsets]:
    target, mask = to_matrix(ratings, fit)
    test = to_matrix(ratings, held_out)
    generator = torch.Generator().manual_seed(0)
    result = alternating_minimisation(target, mask, rank, ridge, sweeps, generator, test, start="random")
    return result, center(ratings, fit, "none")


def _score(matrix: torch.Tensor, offsets: Offsets, ratings: Ratings, parts: Split) -> dict[str, float]:
    return rating_metrics(matrix.cpu().numpy() + offsets.matrix(), ratings, parts.test)
