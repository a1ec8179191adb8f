"""Several starts on the same problem, over several seeds: the shape of almost every recovery figure.

`compare_starts` lets the runs follow one another, each alone on the machine, so that their seconds can be compared;
`stack_starts` runs the same ones in as few stacks as their widths allow, for sweeps where only iterations matter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from compressible.descent.gradient_descent import DivergenceError, History, descend
from compressible.recovery.checks import expect_problem, expect_rate
from compressible.recovery.factors import Factors, check_factors, stack_factors
from compressible.recovery.problems import DenseProblem, Problem, stack_problems
from compressible.runtime.checks import expect, expect_function, expect_integer

Start = tuple[Factors, float, float]  # factors, step size, outer ratio
Build = Callable[[torch.Generator], tuple[DenseProblem, Mapping[str, Start]]]

MOST_SEEDS = 10**6
PADDING = 4  # widths share a stack up to this ratio: padding costs work in proportion to the largest


def compare_starts(build: Build, seed: int, seeds: int, **options: Any) -> dict[str, np.ndarray]:
    """Descend from several starts on the problems of several seeds, one run after the other.

    Args:
        build: function of a `torch.Generator` that returns a problem (m, n) and its starts, {name: (factors, step size,
            outer ratio)}, the same names for every seed.
        seed: first seed, >= 0; the others follow it.
        seeds: number S of seeds, usually 1 to 20.
        **options: what else `descend` takes: steps, record_every, tolerance, engine, ...

    Returns:
        Arrays "<name>/iterations" (R,); "<name>/loss", "<name>/error" and "<name>/seconds" (S, R), NaN after the end of
        a run that stopped early; "<name>/stopped" (S,) in iterations, "<name>/diverged" (S,), True where the loss
        stopped being finite, the run kept up to there, and "<name>/parameters" (1,), the number of factors' entries.

    Raises:
        ValueError: where `build` returns something else, and what `descend` refuses.

    Example:
        >>> import compressible as cd
        >>> def build(generator):
        ...     problem = cd.MatrixFactorization(cd.low_rank_target((6, 6), 1, generator=generator))
        ...     return problem, {"small": (cd.compress_spectral(problem, 2), 2.0, 1.0)}
        >>> curves = cd.compare_starts(build, seed=0, seeds=3, steps=100, record_every=50)
        >>> curves["small/error"].shape, curves["small/iterations"].tolist()
        ((3, 3), [0, 50, 100])

    Reference:
        Kwon et al. (2024), whose recovery figures set original beside compressed networks.
    """
    seed, seeds = _check(build, seed, seeds)
    histories: dict[str, list[History]] = {}
    sizes: dict[str, int] = {}
    for offset in range(seeds):
        problem, starts = _built(build, seed + offset, set(histories))
        for name, (factors, step_size, ratio) in starts.items():
            run = descend_to_divergence(problem, factors, step_size, outer_ratio=ratio, **options)
            histories.setdefault(name, []).append(run)
            sizes[name] = _size((factors, step_size, ratio))
        del problem, starts  # before the next seed is drawn: the operators of a sensing problem fill a memory
    arrays: dict[str, np.ndarray] = {}
    for name, runs in histories.items():
        arrays |= {f"{name}/{key}": value for key, value in _gather(runs).items()}
        arrays[f"{name}/parameters"] = np.array([sizes[name]])
    return arrays


def stack_starts(build: Build, seed: int, seeds: int, **options: Any) -> dict[str, np.ndarray]:
    """Run what `compare_starts` runs, seeds and starts at once in stacks: for sweeps where only iterations matter.

    Starts of one depth whose widths differ by at most a factor of 4 share a stack, padded with zeros, which is exact.

    Args:
        build: as for `compare_starts`; the problems of all seeds have one shape.
        seed: first seed, >= 0; the others follow it.
        seeds: number S of seeds, usually 1 to 100.
        **options: what else `descend` takes: steps, record_every, tolerance, engine, ...

    Returns:
        The arrays of `compare_starts`, but "<name>/seconds" are those of the whole stack.

    Raises:
        ValueError: where the problems of the seeds cannot be stacked, and what `descend` refuses.

    Example:
        >>> import compressible as cd
        >>> def build(generator):
        ...     problem = cd.MatrixFactorization(cd.low_rank_target((6, 6), 1, generator=generator))
        ...     return problem, {f"k = {k}": (cd.compress_spectral(problem, k), 2.0, 1.0) for k in (1, 2)}
        >>> curves = cd.stack_starts(build, seed=0, seeds=20, steps=100, record_every=50)
        >>> curves["k = 1/loss"].shape, bool((curves["k = 2/loss"][:, -1] < curves["k = 2/loss"][:, 0]).all())
        ((20, 3), True)

    Reference:
        Kwon et al. (2024), whose recovery figures set original beside compressed networks.
    """
    seed, seeds = _check(build, seed, seeds)
    built = [_built(build, seed, set())]
    built += [_built(build, seed + offset, set(built[0][1])) for offset in range(1, seeds)]
    _check_stacks(built)
    problems, runs = [problem for problem, _ in built], [starts for _, starts in built]
    arrays: dict[str, np.ndarray] = {}
    for names in share_stacks(runs[0]):
        history = _descend_together(problems, [[starts[name] for name in names] for starts in runs], **options)
        arrays |= _unstack(history, names, runs[0])
    return arrays


def stacking_gain(build: Build, seed: int, seeds: int, steps: int = 200, **options: Any) -> dict[str, float]:
    """Return seconds of `steps` iterations of all starts one after the other and in stacks, and their ratio.

    Keys "serial_seconds", "stacked_seconds", "gain" and "runs"; the stopping test is off and set-up is not in them.
    """
    options |= {"steps": steps, "record_every": steps, "tolerance": 0.0}
    serial, stacked = (compare(build, seed, seeds, **options) for compare in (compare_starts, stack_starts))
    names = [key.removesuffix("/seconds") for key in serial if key.endswith("/seconds")]
    one = sum(float(serial[f"{name}/seconds"][:, -1].sum()) for name in names)
    stacks = share_stacks(build(torch.Generator().manual_seed(seed))[1])
    all_at_once = sum(float(stacked[f"{names[0]}/seconds"][0, -1]) for names in stacks)
    runs = float(seeds * len(names))
    return {"serial_seconds": one, "stacked_seconds": all_at_once, "gain": one / all_at_once, "runs": runs}


def _check(build: Build, seed: int, seeds: int) -> tuple[int, int]:
    expect_function("build", build, "a function of a torch.Generator that returns (problem, starts)")
    return expect_integer("seed", seed, 0, 2**62), expect_integer("seeds", seeds, 1, MOST_SEEDS)


def _built(build: Build, seed: int, known: set[str]) -> tuple[DenseProblem, Mapping[str, Start]]:
    """What `build` returns for a seed; ValueError unless it is a problem with its starts, of `known` names if any."""
    built = build(torch.Generator().manual_seed(seed))
    pair = isinstance(built, (tuple, list)) and len(built) == 2 and isinstance(built[1], Mapping) and len(built[1]) > 0
    kinds = [type(part).__name__ for part in built] if isinstance(built, (tuple, list)) else type(built).__name__
    expect("what build returned", kinds, pair, "(problem, {name: (factors, step size, outer ratio)})")
    problem, starts = built
    expect_problem(problem, name="problem of build")
    for name, start in starts.items():
        whole = isinstance(start, Sequence) and not isinstance(start, str) and len(start) == 3
        expect(f"start {name!r} of build", start, whole, "(factors, step size, outer ratio)")
    same = not known or set(starts) == known
    expect(
        f"names of build's starts for seed {seed}", sorted(starts), same, f"those of the first seed, {sorted(known)}"
    )
    return problem, starts


def _check_stacks(built: Sequence[tuple[DenseProblem, Mapping[str, Start]]]) -> None:
    """Raise ValueError, before anything is stacked, for what `descend` would refuse of a run alone."""
    for problem, starts in built:
        dense = isinstance(problem, DenseProblem)
        expect("type of build's problem", type(problem).__name__, dense, "a dense one, which stacks")
        for factors, step_size, ratio in starts.values():
            check_factors(factors, problem.shape)
            expect_rate("step_size", step_size, single=True)
            expect_rate("outer_ratio", ratio, positive=False, single=True)


def descend_to_divergence(
    problem: Problem, factors: Factors, step_size: float | torch.Tensor, **options: Any
) -> History:
    """Descend, and where a loss stops being finite return the history up to there."""
    try:
        return descend(problem, factors, step_size, **options)
    except DivergenceError as error:
        return error.history


def _gather(runs: Sequence[History]) -> dict[str, np.ndarray]:
    longest = max(runs, key=lambda run: len(run.iterations))
    gathered: dict[str, np.ndarray] = {"iterations": longest.iterations.numpy()}
    for name in ("loss", "error", "seconds"):
        rows = np.full((len(runs), len(longest.iterations)), np.nan)
        for row, run in zip(rows, runs, strict=True):
            row[: len(run.iterations)] = getattr(run, name).numpy()
        gathered[name] = rows
    gathered["stopped"] = np.array([int(run.stopped) for run in runs])
    gathered["diverged"] = np.array([not np.isfinite(run.loss[-1].item()) for run in runs])
    return gathered


def share_stacks(starts: Mapping[str, Start]) -> list[list[str]]:
    """Return the names of the starts in each stack: one depth, widths within a factor of `PADDING`, widest first."""
    groups: list[list[str]] = []
    for name in sorted(starts, key=lambda name: (len(starts[name][0]), -_width(starts[name]))):
        first = starts[groups[-1][0]] if groups else None
        if first and len(first[0]) == len(starts[name][0]) and PADDING * _width(starts[name]) >= _width(first):
            groups[-1].append(name)
        else:
            groups.append([name])
    return groups


def _width(start: Start) -> int:
    return max(factor.shape[-2] for factor in start[0][:-1])


def _descend_together(problems: Sequence[DenseProblem], runs: Sequence[Sequence[Start]], **options: Any) -> History:
    """One stack (seeds, starts): runs[i][j] is start j on problems[i]."""
    first = torch.zeros(1, dtype=torch.int64)
    problem = stack_problems([problem.select(first, ()) for problem in problems])  # (seeds, 1), broadcast over starts
    shape = (len(runs), len(runs[0]))
    factors = [f.unflatten(0, shape) for f in stack_factors([start[0] for starts in runs for start in starts])]
    step, ratio = (torch.tensor([[s[i] for s in starts] for starts in runs], dtype=torch.float64) for i in (1, 2))
    return descend_to_divergence(problem, factors, step, outer_ratio=ratio, **options)


def _unstack(history: History, names: Sequence[str], starts: Mapping[str, Start]) -> dict[str, np.ndarray]:
    arrays: dict[str, np.ndarray] = {}
    for column, name in enumerate(names):
        loss, stopped = history.loss[:, column], history.stopped[:, column]
        length = int((history.iterations <= stopped.max()).sum())
        last = (history.iterations == stopped[:, None]).int().argmax(-1, keepdim=True)
        seconds = history.seconds.expand(len(loss), -1)
        curves = {"loss": loss, "error": history.error[:, column], "seconds": seconds}
        arrays[f"{name}/iterations"] = history.iterations[:length].numpy()
        arrays |= {f"{name}/{key}": curve[:, :length].numpy().copy() for key, curve in curves.items()}
        arrays[f"{name}/stopped"] = stopped.numpy()
        arrays[f"{name}/diverged"] = ~torch.isfinite(loss.gather(-1, last)[:, 0]).numpy()
        arrays[f"{name}/parameters"] = np.array([_size(starts[name])])
    return arrays


def _size(start: Start) -> int:
    return sum(factor.shape[-1] * factor.shape[-2] for factor in start[0])
