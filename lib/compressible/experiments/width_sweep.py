"""One problem, factors of several widths: how well and how soon each recovers it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from compressible.descent.gradient_descent import descend
from compressible.recovery.factors import orthogonal_factors
from compressible.recovery.problems import DenseProblem


def sweep_widths(
    problem: DenseProblem,
    depth: int,
    step_size: float,
    widths: Sequence[int],
    init_scale: float,
    trials: int,
    generator: torch.Generator,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Return the final recovery error and the iterations to the stop, both (trials, widths).

    All starts are drawn before the first run, so that they do not depend on the run; the trials of a width descend as
    one stack. `options` go to `descend`.
    """
    starts = [
        orthogonal_factors(problem.shape, depth, width, init_scale, generator, problem.dtype, None, (trials,))
        for width in widths
    ]
    runs = [descend(problem, factors, step_size, **options) for factors in starts]
    return torch.stack([run.final("error") for run in runs], 1), torch.stack([run.stopped for run in runs], 1)
