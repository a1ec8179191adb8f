"""Gradient descent on a deep factorization, with an outer-factor step ratio (P1 gamma, P2 alpha).

`descend` goes from snapshot to snapshot; a `Solver` takes the records in between and lets an engine take the steps.
"""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from compressible.descent.engines.choose import NAMES, few_threads
from compressible.descent.history import DivergenceError, History
from compressible.descent.solver import Solver
from compressible.recovery.checks import MOST_RECORDS, expect_problem, expect_problems_factors, expect_rate
from compressible.recovery.factors import check_factors
from compressible.recovery.problems import Problem
from compressible.runtime.checks import expect, expect_flag, expect_integer, expect_iterations, expect_one_of
from compressible.runtime.devices import without_autocast
from compressible.runtime.progress import progress

__all__ = ["DivergenceError", "History", "descend"]

MOST_STEPS = 10**15  # years of any machine


@without_autocast
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
    """Run gradient descent from `factors`; inputs are never modified.

    Args:
        problem: what is recovered, (m, n), a leading batch shape (...) being a stack of problems.
        factors: [W_1 (..., w, n), ..., W_L (..., m, w)] to start from, of the problem's type and device.
        step_size: eta > 0 of the inner factors; here and in outer_ratio a tensor (...) is a value for each problem.
        steps: iterations at most, and at most 10^15.
        outer_ratio: the first and last factor take steps of outer_ratio * step_size, >= 0: P1's gamma, usually 0.01,
            or P2's alpha, 1 to 10.
        weight_decay: lambda >= 0 of lambda/2 sum ||W_l||_F^2; the recorded loss is without it.
        record_every: iterations between records, of which there are at most 10^7; records at 0 and at the end, too.
        tolerance: a problem stops at the first record whose training loss is below it.
        snapshots: iterations whose factors are kept.
        engine: "auto" picks; "reference", "fused", "compiled" (CPU), "graphed", "tiled" or "persistent" (CUDA).
        show_progress: whether there is a bar; by default in a terminal or notebook, after a second.

    Returns:
        The `History`: curves, last factors, snapshots.

    Raises:
        ValueError: on impossible arguments.
        DivergenceError: where a loss stops being finite; in a stack the neighbours go on to their end first.

    Example:
        >>> import torch, compressible as cd
        >>> generator = torch.Generator().manual_seed(0)
        >>> problem = cd.MatrixFactorization(cd.low_rank_target((20, 20), rank=2, generator=generator))
        >>> small = cd.compress_spectral(problem, width=2, scale=0.1)
        >>> history = cd.descend(problem, small, step_size=2.0, steps=2000, outer_ratio=2.0, tolerance=1e-12)
        >>> bool(history.final("error") < 1e-12), bool(history.stopped < 2000)
        (True, True)

    Reference:
        P1, Theorem 2.1 (gradient descent with weight decay) and P1's gamma; P2's alpha.
    """
    began = time.perf_counter()
    expect_problem(problem, "dtype", "device", "evaluate_factors", "factor_gradients")
    check_factors(factors, problem.shape)
    expect_problems_factors(problem, factors)
    step_size, outer_ratio = (
        expect_rate("step_size", step_size),
        expect_rate("outer_ratio", outer_ratio, positive=False),
    )
    weight_decay, tolerance = (
        expect_rate(name, value, positive=False, single=True)
        for name, value in (("weight_decay", weight_decay), ("tolerance", tolerance))
    )
    steps, record_every = _check_records(steps, record_every)
    wanted = expect_iterations("snapshots", snapshots, steps, f"iterations from 0 to steps = {steps}")
    expect_one_of("engine", engine, NAMES)
    show_progress = None if show_progress is None else expect_flag("show_progress", show_progress)
    solver = Solver(problem, factors, step_size, outer_ratio, weight_decay, engine)
    solver.start(record_every, time.perf_counter() - began)
    records = sorted({*range(0, steps + 1, record_every), steps})
    bar = progress(steps, "descent", enabled=show_progress)
    with bar, torch.inference_mode(), few_threads(problem, solver.size):  # entered once: each costs microseconds
        for mark in sorted({*wanted, steps}):
            before = bisect_right(records, mark)
            solver.run(records[:before], mark, tolerance, bar)
            del records[:before]
            if mark in wanted:
                solver.snapshot(mark)
    return solver.finish()


def _check_records(steps: int, record_every: int) -> tuple[int, int]:
    steps = expect_integer("steps", steps, 0, MOST_STEPS)
    record_every = min(expect_integer("record_every", record_every, 1), max(steps, 1))
    count = steps // record_every + 1
    told = f"at most {MOST_RECORDS} records, not {count}: with steps = {steps} one every {-(-steps // MOST_RECORDS)}"
    expect("record_every", record_every, count <= MOST_RECORDS, told)
    return steps, record_every
