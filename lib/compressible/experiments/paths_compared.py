"""The end-to-end products of several networks on their way: in one plane, and how far two of them are apart."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from compressible.experiments.compare import Build, Start, first_below
from compressible.experiments.stops import Curves
from compressible.experiments.trajectories import iterates
from compressible.recovery.factors import product
from compressible.recovery.problems import DenseProblem
from compressible.recovery.spectra import principal_coordinates


def paths_in_plane(build: Build, curves: Curves, seed: int, frames: int) -> dict[str, Tensor]:
    """Return where the products of all starts run in the plane that the first one's path spans best.

    "<name>/trajectory" (frames, 2) for each start that did not diverge, and "shares" (2,) of the first path's variance.
    The `frames` lie from 5 % before the first start's error begins to drop, by 1 %, to 5 % after its stop, as `curves`
    of `compare_starts(build, seed, ...)` tell for the first seed.
    """
    problem, starts = build(torch.Generator().manual_seed(seed))
    first = next(iter(starts))
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
    the first product), "theory"; per seed (S,): "bound", "gap_over_bound" and "off_theory", the largest relative
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
    out = {"marks": marks, "gap": gap, "size": size, "theory": theory, "bound": bound}
    return out | {"gap_over_bound": gap.max(1) / bound, "off_theory": np.abs(gap / theory - 1).max(1)}


def crowded_marks(end: int, frames: int) -> np.ndarray:
    """Return `frames` iterations from about 0 to `end`, evenly spaced in the logarithm of what is left to the end."""
    left = np.append(np.geomspace(max(end, 1), 1, frames - 1), 0)
    return np.round(end - left).astype(int)


def _gap(problem: DenseProblem, wide: Start, small: Start, marks: Sequence[int]) -> tuple[np.ndarray, float]:
    """Norms (2, T) of the difference of two products and of the first, over the target's; and the target's."""
    pairs = zip(iterates(problem, wide, marks), iterates(problem, small, marks), strict=True)
    norms = []
    for (_, one, _), (_, two, _) in pairs:
        first = product(one)
        norms.append(torch.stack([(first - product(two)).norm(), first.norm()]))
    size = problem.surrogate().norm()
    return (torch.stack(norms, 1) / size).cpu().numpy(), float(size)
