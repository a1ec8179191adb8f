"""Each network at its own best step: found on seeds that judge nothing, on a grid that neither end of which is chosen.

A speed-up at one common step mixes two things: that a network needs fewer steps, and that the step suits it better.
`find_best_steps` takes the second away; `compare_at_best_steps` lets the networks run, each at the step found for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from compressible.experiments.compare import Start, compare_starts, stack_starts
from compressible.experiments.outcomes import final, reached
from compressible.experiments.rate_grid import best_of, is_inside, search_each
from compressible.recovery.problems import DenseProblem, MatrixSensing
from compressible.recovery.theory.invariants import stability_limit
from compressible.runtime.checks import expect

BuildAt = Callable[[torch.Generator, Mapping[str, float]], tuple[DenseProblem, Mapping[str, Start]]]
Tried = dict[tuple[str, float], np.ndarray]  # of a name at a step: what each tuning seed needs (S,)

TUNING = 10_000  # the seeds that choose a step lie so far behind those that judge it
MOST = 40  # steps that a grid may have


def find_best_steps(
    build: BuildAt,
    names: Sequence[str],
    *,
    seed: int,
    seeds: int,
    level: float,
    steps: int,
    first: float | Mapping[str, float] | None = None,
    factor: float = 1.25,
    beside: int = 2,
    curve: str = "error",
    record_every: int = 10,
    **options: Any,
) -> dict[str, np.ndarray]:
    """Find the step size at which each network is soonest at a level, by the median over tuning seeds.

    Each name has a geometric grid of its own, which grows beyond an end for as long as that end is the best, up to 40
    steps. A step at which a tuning seed diverges is never taken; one at which the median stays above the level loses to
    all that get there, and among these the one that ends lowest is the best. All names, steps and seeds of a round run
    in stacks; seeds of matrix sensing follow one another.

    Args:
        build: function of a `torch.Generator` and {name: step size} that returns a problem (m, n) and the starts
            {name: (factors, step size, outer ratio)}, those of `names` among them; the factors hang on no step size.
        names: the networks to tune.
        seed: first tuning seed, >= 0; none of those that judge.
        seeds: number of tuning seeds, usually 1 to 10.
        level: what the curve has to fall below, > 0.
        steps: iterations at most.
        first: the step size, or {name: step size}, that the grids start around; by default `predicted_steps`.
        factor: between neighbouring steps of a grid, > 1, usually 1.25 to 2.
        beside: steps to either side of the first in the first round, usually 1 to 4.
        curve: "error" or "loss".
        record_every: iterations between records, to which the iterations counted are rounded up.
        **options: what else `descend` takes: tolerance, engine, ...

    Returns:
        Arrays "<name>/best_step" (1,), "<name>/grid" (G,) of step sizes, ascending, "<name>/grid_iterations" (G,), the
        medians, infinite where a seed diverges or half of them never get there, and "<name>/grid_closed" (1,), whether
        the best step lies at no end of its grid and gets there.

    Raises:
        ValueError: on a factor, level or first step out of range, and what `descend` refuses.

    Example:
        >>> import compressible as cd
        >>> from compressible.experiments.best_steps import find_best_steps
        >>> def build(generator, sizes):
        ...     problem = cd.MatrixFactorization(cd.low_rank_target((6, 6), 1, generator=generator))
        ...     return problem, {"small": (cd.compress_spectral(problem, 2, scale=0.1), sizes["small"], 1.0)}
        >>> tuning = {"first": 1.0, "level": 1e-6, "steps": 400, "factor": 2.0}
        >>> found = find_best_steps(build, ["small"], seed=10_000, seeds=3, **tuning)
        >>> bool(found["small/grid_closed"]), bool(found["small/best_step"] > 1.0)
        (True, True)

    Reference:
        Kwon et al. (2024) and Yaras et al. (2024) give all networks of a figure one step.
    """
    first = predicted_steps(build, names, seed) if first is None else first
    centre = {name: float(first[name] if isinstance(first, Mapping) else first) for name in names}
    _check(factor, level, beside, centre)
    tried: Tried = {}

    def scores_of(pairs: Sequence[tuple[str, float]]) -> list[float]:
        asked = {**options, "steps": steps, "record_every": record_every}
        found = _tried(build, centre, pairs, range(seed, seed + seeds), level, curve, asked)
        tried.update({pair: needs for pair, (needs, _) in zip(pairs, found, strict=True)})
        return [_score(needs, ends, steps) for needs, ends in found]

    grid, more = [factor**place for place in range(-beside, beside + 1)], MOST - 2 * beside - 1
    scores = search_each(scores_of, names, grid, more, lambda size, direction: size * factor**direction)
    told = [_told(name, centre[name], scores[name], tried) for name in names]
    return {key: value for arrays in told for key, value in arrays.items()}


def predicted_steps(build: BuildAt, names: Sequence[str], seed: int) -> dict[str, float]:
    """Return {name: step size} at which descent from a small start should cease to settle, for the problem of a seed.

    That is the `stability_limit` of P2's entrywise losses over alpha^(2 / L), by which the outer ratio alpha raises the
    curvature. It serves to start a search, not to judge one.
    """
    problem, starts = build(torch.Generator().manual_seed(seed), dict.fromkeys(names, 1.0))
    shapes = {name: (len(starts[name][0]), starts[name][2]) for name in names}
    return {
        name: float(stability_limit(problem, depth)) / ratio ** (2 / depth) for name, (depth, ratio) in shapes.items()
    }


def best_steps(found: Mapping[str, np.ndarray], names: Sequence[str], prefix: str = "") -> dict[str, float]:
    """Return {name: step size} of what `find_best_steps` found; `prefix`, such as "own/", stands before its arrays."""
    return {name: float(found[f"{prefix}{name}/best_step"][0]) for name in names}


def compare_at_best_steps(
    build: BuildAt,
    names: Sequence[str],
    seed: int,
    seeds: int,
    *,
    tuning: Mapping[str, Any],
    run: Callable[..., dict[str, np.ndarray]] = compare_starts,
    **options: Any,
) -> dict[str, np.ndarray]:
    """Find the best step of each name on seeds behind the judged ones, and run the judged seeds at those steps.

    Args:
        build, names: as for `find_best_steps`.
        seed, seeds: the judged ones; the tuning seeds start 10,000 behind.
        tuning: what `find_best_steps` takes besides: seeds, first, level, steps, ...
        run: `compare_starts`, one after the other, or `stack_starts`.
        **options: of the judged runs, what `descend` takes: steps, record_every, tolerance, engine, ...

    Returns:
        The arrays of `find_best_steps` and those of `run`, for `names` alone.

    Raises:
        ValueError: as both do.

    Example:
        >>> import compressible as cd
        >>> from compressible.experiments.best_steps import compare_at_best_steps
        >>> def build(generator, sizes):
        ...     problem = cd.MatrixFactorization(cd.low_rank_target((6, 6), 1, generator=generator))
        ...     return problem, {"small": (cd.compress_spectral(problem, 2, scale=0.1), sizes["small"], 1.0)}
        >>> tuning = {"seeds": 2, "first": 4.0, "level": 1e-6, "steps": 400, "factor": 2.0}
        >>> curves = compare_at_best_steps(build, ["small"], 0, 2, tuning=tuning, steps=400)
        >>> curves["small/error"].shape == (2, 9), bool((curves["small/error"][:, -1] < 1e-6).all())
        (True, True)

    Reference:
        Kwon et al. (2024) and Yaras et al. (2024) give all networks of a figure one step.
    """
    found = find_best_steps(build, names, seed=seed + TUNING, **tuning)
    sizes = best_steps(found, names)

    def tuned(generator: torch.Generator) -> tuple[DenseProblem, Mapping[str, Start]]:
        problem, starts = build(generator, sizes)
        return problem, {name: starts[name] for name in names}

    return found | run(tuned, seed, seeds, **options)


def _tried(
    build: BuildAt,
    centre: Mapping[str, float],
    pairs: Sequence[tuple[str, float]],
    seeds: range,
    level: float,
    curve: str,
    options: Mapping[str, Any],
) -> list[tuple[np.ndarray, np.ndarray]]:
    """What each name at its centre times a size needs on each tuning seed (S,), as `reached` counts, and its ends."""

    def at_all_sizes(generator: torch.Generator) -> tuple[DenseProblem, dict[str, Start]]:
        problem, starts = build(generator, centre)
        chosen = [(*starts[name], centre[name] * size) for name, size in pairs]
        return problem, {f"{i}": (factors, step, ratio) for i, (factors, _, ratio, step) in enumerate(chosen)}

    problem, _ = build(torch.Generator().manual_seed(seeds[0]), centre)
    alone = isinstance(problem, MatrixSensing)  # each seed has operators of its own, and a stack has one for all
    del problem
    runs = [(seed, 1) for seed in seeds] if alone else [(seeds[0], len(seeds))]
    curves = [stack_starts(at_all_sizes, *run, **options) for run in runs]
    needs = [np.concatenate([reached(some, f"{i}", level, curve) for some in curves]) for i in range(len(pairs))]
    ends = [np.concatenate([final(some, f"{i}", curve) for some in curves]) for i in range(len(pairs))]
    return list(zip(needs, ends, strict=True))


def _score(needs: np.ndarray, ends: np.ndarray, steps: int) -> float:
    """The higher, the sooner; -inf where a seed diverges, and below -steps where too many stay above the level."""
    median = _median(needs)
    if np.isfinite(median):
        return -median
    if np.isnan(needs).any():
        return -np.inf
    return -steps * (2 + float(np.log10(np.median(ends))) / 400)  # whose logarithm lies between -324 and 309


def _median(needs: np.ndarray) -> float:
    return np.inf if np.isnan(needs).any() else float(np.median(needs))


def _told(name: str, centre: float, scores: Mapping[float, float], tried: Tried) -> dict[str, np.ndarray]:
    needs, best = {size: _median(tried[name, size]) for size in scores}, best_of(scores)
    return {
        f"{name}/best_step": np.array([centre * best]),
        f"{name}/grid": centre * np.array(list(scores)),
        f"{name}/grid_iterations": np.array(list(needs.values())),
        f"{name}/grid_closed": np.array([is_inside(scores) and np.isfinite(needs[best])]),
    }


def _check(factor: float, level: float, beside: int, centre: Mapping[str, float]) -> None:
    expect("factor", factor, factor > 1, "a number above 1")
    expect("level", level, level > 0, "a number above 0")
    expect("beside", beside, 1 <= beside < MOST // 2, f"an integer from 1 to {MOST // 2 - 1}")
    for name, step in centre.items():
        expect(f"first of {name!r}", step, step > 0, "a step size above 0")
