"""Looking at descents on their way: states one at a time, when components pass their levels, paths side by side."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compressible.descent.gradient_descent import DivergenceError, descend
from compressible.experiments.compare import Build, Start
from compressible.experiments.outcomes import Curves, first_below
from compressible.recovery.factors import Factors, product
from compressible.recovery.problems import DenseProblem, Problem
from compressible.recovery.subspaces import principal_coordinates
from compressible.runtime.progress import progress


def iterates(
    problem: Problem,
    start: tuple[Sequence[Tensor], float | Tensor, float | Tensor],
    marks: Iterable[float],
    tolerance: float = 0.0,
    show_progress: bool | None = None,
    **options: Any,
) -> Iterator[tuple[int, Factors, Tensor]]:
    """Yield (iteration, factors, training loss (...)) of one descent at each of the iterations `marks`.

    Each is given as the descent gets there and none is kept: `descend`'s snapshots hold all at once, gigabytes where
    the factors are wide. start: factors, step size, outer ratio. A problem whose loss is below `tolerance` at a mark
    stays where it is, and the descent ends where all are. `options` go to `descend`. Raises ValueError where `marks` do
    not ascend from 0 on, and DivergenceError, iterations counted from the mark before.
    """
    ends = [int(mark) for mark in marks]
    if any(first > second for first, second in pairwise([0, *ends])):
        raise ValueError(f"marks are {ends}, expected iterations >= 0 in ascending order")
    factors, step_size, ratio = start
    options |= {"outer_ratio": ratio, "tolerance": tolerance, "show_progress": False}
    with progress(max(ends, default=0), "descent", enabled=show_progress) as bar:
        for done, mark in pairwise([0, *ends]):
            factors, loss = _advance(problem, factors, step_size, done, mark, options)
            bar.update(mark - done)
            yield mark, factors, loss
            if bool((loss < tolerance).all()):
                return


def first_passage(curves: np.ndarray, levels: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Return `at` (T,) where each of the curves (S, T, r) first exceeds its level (S, r), as (S, r); NaN if never."""
    columns = [first_below(-curves[:, :, i], -levels[:, i : i + 1], at) for i in range(levels.shape[1])]
    return np.stack(columns, 1)


def pairs_in_order(first: np.ndarray) -> np.ndarray:
    """Return the share (S,) of pairs i < j with first[i] < first[j] among (S, r): .5 by chance.

    A tie counts half, a pair with a NaN (never) not at all. It is (1 + Kendall's tau) / 2 where there are no ties.
    """
    i, j = np.triu_indices(first.shape[1], 1)
    gap = first[:, j] - first[:, i]
    return ((gap > 0) + 0.5 * (gap == 0)).mean(1)


def paths_in_plane(build: Build, curves: Curves, seed: int, frames: int) -> dict[str, Tensor]:
    """Return where the products of all starts run in the plane that the first one's path spans best.

    "<name>/trajectory" (frames, 2) for each start that did not diverge, and "shares" (2,) of the first path's variance.
    The `frames` lie from 5 % before the first start's error begins to drop, by 1 %, to 5 % after its stop, as `curves`
    of `compare_starts(build, seed, ...)` tell for the first seed. ValueError where the first start diverged.
    """
    problem, starts = build(torch.Generator().manual_seed(seed))
    first = next(iter(starts))
    if curves[f"{first}/diverged"][0]:
        raise ValueError(f"{first} diverged with seed {seed}, expected a step size at which its path spans a plane")
    errors, times = curves[f"{first}/error"][:1], curves[f"{first}/iterations"]
    drop = np.nan_to_num(first_below(errors, 0.99 * errors[0, 0], times)[0])
    marks = [int(mark) for mark in np.linspace(0.95 * drop, 1.05 * curves[f"{first}/stopped"][0], frames)]
    names = [name for name in starts if not curves[f"{name}/diverged"][0]]
    paths = [torch.stack([product(f) for _, f, _ in iterates(problem, starts[name], marks)]) for name in names]
    coordinates, shares = principal_coordinates(*paths)
    return {f"{name}/trajectory": path for name, path in zip(names, coordinates, strict=True)} | {"shares": shares}


def product_gaps(
    build: Build, seed: int, stopped: Sequence[int] | np.ndarray, frames: int, exact: np.ndarray
) -> dict[str, np.ndarray]:
    """Return how far the products of two starts are apart, seed by seed (S), in units of the target's norm.

    Under full observation, where the problem's surrogate is its target. Looked at are `frames` iterations that crowd
    towards `stopped` (S,), where the first start's runs ended; `exact` (T,) is the predicted Frobenius norm of the
    difference at each iteration, largest at 0. Arrays (S, frames): "marks" (the iterations), "gap", "size" (norm of
    the first product), "theory"; per seed (S,): "bound", the prediction at 0, and "off_theory", the largest relative
    deviation from the prediction.
    """
    marks, found = np.array([crowded_marks(int(end), frames) for end in stopped]), []
    for offset, row in enumerate(marks):
        problem, starts = build(torch.Generator().manual_seed(seed + offset))
        wide, small = starts.values()
        found.append(_gap(problem, wide, small, row.tolist()))
    gap, size = np.stack([pair for pair, _ in found], 1)
    norms = np.array([norm for _, norm in found])
    theory, bound = exact[marks] / norms[:, None], exact[0] / norms
    curves = {"marks": marks, "gap": gap, "size": size, "theory": theory, "bound": bound}
    return curves | {"off_theory": np.abs(gap / theory - 1).max(1)}


def crowded_marks(end: int, frames: int) -> np.ndarray:
    """Return `frames` iterations from about 0 to `end`, evenly spaced in the logarithm of what is left to the end."""
    left = np.append(np.geomspace(max(end, 1), 1, frames - 1), 0)
    return np.round(end - left).astype(int)


def _advance(
    problem: Problem, factors: Sequence[Tensor], step_size: float | Tensor, done: int, mark: int, options: dict
) -> tuple[Factors, Tensor]:
    steps = mark - done
    try:
        history = descend(problem, factors, step_size, steps, record_every=max(steps, 1), **options)
    except DivergenceError as error:
        error.add_note(f"counted from iteration {done}")
        raise
    return history.factors, history.final("loss")


def _gap(problem: DenseProblem, wide: Start, small: Start, marks: Sequence[int]) -> tuple[np.ndarray, float]:
    """Norms (2, T) of the difference of two products and of the first, over the target's; and the target's."""
    pairs = zip(iterates(problem, wide, marks), iterates(problem, small, marks), strict=True)
    norms = []
    for (_, one, _), (_, two, _) in pairs:
        first = product(one)
        norms.append(torch.stack([(first - product(two)).norm(), first.norm()]))
    size = problem.surrogate().norm()
    return (torch.stack(norms, 1) / size).cpu().numpy(), float(size)
