"""Gradient descent on a deep factorization, with an outer-factor step ratio (P1 gamma, P2 alpha).

`descend` goes from snapshot to snapshot; a `Walk` (walk.py) takes the records in between and lets an engine
(engines.py) take the steps.
"""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from compressible.descent.engines.choose import few_threads
from compressible.descent.history import DivergenceError, History
from compressible.descent.solver import Walk
from compressible.recovery.factors import check_factors
from compressible.recovery.problems import Problem
from compressible.runtime.progress import progress

__all__ = ["DivergenceError", "History", "descend"]


def descend(
    problem: Problem,
    factors: Sequence[Tensor],
    step_size: float | Tensor,
    steps: int,
    outer_ratio: float | Tensor = 1.0,
    weight_decay: float = 0.0,
    record_every: int = 50,
    tolerance: float = 0.0,
    snapshots: Iterable[int] = (),
    engine: str = "auto",
    show_progress: bool | None = None,
) -> History:
    """Run gradient descent from `factors` and return its `History`; inputs are never modified.

    Inner factors take steps of `step_size` (> 0), the first and last of outer_ratio * step_size (>= 0; P1's gamma,
    usually .01, or P2's alpha, 1 to 10); both may be tensors of the batch shape, one value per problem. Losses are
    recorded at 0, every `record_every` iterations and at the end; a problem stops at the first record whose training
    loss is below `tolerance`. `snapshots` are iterations whose factors are kept. Raises ValueError on impossible
    arguments and DivergenceError where a loss stops being finite; in a stack the neighbours go on to their end first.
    """
    began = time.perf_counter()
    wanted = _check(problem, factors, step_size, steps, outer_ratio, weight_decay, record_every, tolerance, snapshots)
    run = Walk(problem, factors, step_size, outer_ratio, weight_decay, engine)
    run.start(record_every, time.perf_counter() - began)
    records = sorted({*range(0, steps + 1, record_every), steps})
    bar = progress(steps, "descent", enabled=show_progress)
    with bar, torch.inference_mode(), few_threads(problem, run.size):  # entered once: each costs microseconds
        for mark in sorted({*wanted, steps}):
            before = bisect_right(records, mark)
            run.walk(records[:before], mark, tolerance, bar)
            del records[:before]
            if mark in wanted:
                run.snapshot(mark)
    return run.finish()


def _check(problem, factors, step_size, steps, outer_ratio, weight_decay, record_every, tolerance, snapshots):
    check_factors(factors, problem.shape)
    kind = (factors[0].dtype, factors[0].device)
    if kind != (problem.dtype, problem.device):
        raise ValueError(f"factors are {kind}, expected the problem's {(problem.dtype, problem.device)}")
    _check_number("step_size", step_size, exclusive=True)
    _check_number("outer_ratio", outer_ratio)
    _check_number("weight_decay", weight_decay)
    _check_number("tolerance", tolerance)
    for name, value, least in (("steps", steps, 0), ("record_every", record_every, 1)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name} is {value!r}, expected an integer >= {least}")
    wanted = {int(iteration) for iteration in snapshots}
    if any(not 0 <= iteration <= steps for iteration in wanted):
        raise ValueError(f"snapshots are {sorted(wanted)}, expected iterations from 0 to steps = {steps}")
    return wanted


def _check_number(name: str, value: float | Tensor, exclusive: bool = False) -> None:
    tensor = torch.as_tensor(value, dtype=torch.float64)
    if not bool(torch.isfinite(tensor).all()) or bool((tensor < 0).any()) or (exclusive and bool((tensor == 0).any())):
        raise ValueError(f"{name} is {value}, expected finite {'> 0' if exclusive else '>= 0'}")
