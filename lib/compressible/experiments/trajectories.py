"""Looking at a descent on its way: its states one at a time, when each component passes its level, in which order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compressible.descent.gradient_descent import DivergenceError, descend
from compressible.experiments.compare import first_below
from compressible.recovery.factors import Factors
from compressible.recovery.problems import Problem
from compressible.runtime.progress import progress


def stretches(
    problem: Problem,
    factors: Sequence[Tensor],
    step_size: float | Tensor,
    steps: int,
    every: int,
    tolerance: float = 0.0,
    show_progress: bool | None = None,
    **options: Any,
) -> Iterator[tuple[int, Factors, Tensor]]:
    """Yield (iteration, factors, training loss (...)) at 0 and after each `every` iterations of `descend`.

    For a look at every state where `snapshots` would hold them all in memory. A problem whose loss is below `tolerance`
    stays where it is, and the walk ends with `steps` or when all have stopped. `options` go to `descend`. Raises
    ValueError unless `every` >= 1 divides `steps`, and what `descend` raises, iterations counted within the stretch.
    """
    if every < 1 or steps % every:
        raise ValueError(f"every is {every}, expected a divisor of steps = {steps}")
    options |= {"record_every": every, "tolerance": tolerance, "show_progress": False}
    with torch.no_grad():
        loss = problem.evaluate_factors(factors)[0]
    yield 0, list(factors), loss
    with progress(steps, "descent", enabled=show_progress) as bar:
        for done in range(every, steps + 1, every):
            factors, loss = _stretch(problem, factors, step_size, every, done - every, options)
            bar.update(every)
            yield done, factors, loss
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


def _stretch(problem, factors, step_size, steps: int, done: int, options: dict) -> tuple[Factors, Tensor]:
    try:
        history = descend(problem, factors, step_size, steps, **options)
    except DivergenceError as error:
        error.add_note(f"counted from iteration {done}")
        raise
    return history.factors, history.final("loss")
