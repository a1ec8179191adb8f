"""Looking at a descent on its way: its states one at a time, when each component passes its level, in which order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from torch import Tensor

from compressible.descent.gradient_descent import DivergenceError, descend
from compressible.experiments.compare import first_below
from compressible.recovery.factors import Factors
from compressible.recovery.problems import Problem
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
