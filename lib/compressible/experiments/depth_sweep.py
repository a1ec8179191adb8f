"""Wide and compressed networks of several depths: never behind, and singular values learned in turn.

S seeds; time is counted in records of `every` iterations, of which `frames` are one predicted escape time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from compressible.descent.gradient_descent import descend
from compressible.experiments.best_steps import BuildAt, compare_at_best_steps
from compressible.experiments.compare import Build, Start, stack_starts
from compressible.experiments.outcomes import milestones
from compressible.recovery.factors import product, stack_factors
from compressible.recovery.problems import MatrixCompletion, MatrixFactorization, stack_problems
from compressible.recovery.theory.invariants import aligned_values, escape_time, stability_limit

Runs = Sequence[tuple[MatrixCompletion | MatrixFactorization, Mapping[str, Start]]]  # one build for each seed


class Plan(NamedTuple):
    """Settings of one depth: scale eps of each factor, step size on the mean loss, iterations between records."""

    scale: float
    step: float
    every: int


def plan_depth(target: Tensor, rank: int, depth: int, product_scale: float, step_fraction: float, frames: int) -> Plan:
    """Return settings under which depths compare: one scale eps^L, one fraction of the limit of stability.

    `frames` records fit into the predicted escape of the weakest of the `rank` singular values of target (d, d).
    """
    scale, weakest = product_scale ** (1 / depth), torch.linalg.svdvals(target)[rank - 1].item()
    step = step_fraction * stability_limit(MatrixFactorization(target), depth).item()
    time = escape_time(weakest, depth, scale, step / target.numel())
    return Plan(scale, step, max(1, round(time / frames)))


def never_behind(build: Build, seed: int, seeds: int, **options: Any) -> dict[str, np.ndarray]:
    """Return the error curves of "original" and "compressed", and per seed (S,) what they come to.

    "worst_ratio" of the errors at a common record, "iteration_ratio" to an error of 1e-6, and "final", the larger of
    the two last errors. `options` go to `descend`.
    """
    curves = stack_starts(build, seed, seeds, **options)
    marks = milestones(curves, ["original", "compressed"], level=1e-6)
    out = {key: value for key, value in curves.items() if key.endswith(("iterations", "error"))}
    out["final"] = np.maximum(marks["original/final"], marks["compressed/final"])
    return out | {key: marks[f"compressed/{key}"] for key in ("worst_ratio", "iteration_ratio")}


def at_own_steps(
    build: BuildAt, seed: int, seeds: int, tuning: Mapping[str, Any], **options: Any
) -> dict[str, np.ndarray]:
    """Return what "original" and "compressed" come to, each at its own best step, as `compare_at_best_steps` finds it.

    "own/iteration_ratio" (S,) to an error of 1e-6, compressed over original; "own/best_steps" (2,), the original's
    first; "own/grids_closed" (2,), whether neither is the end of its grid. `options` go to `descend`.
    """
    names = ["original", "compressed"]
    curves = compare_at_best_steps(build, names, seed, seeds, tuning=tuning, run=stack_starts, **options)
    marks = milestones(curves, names, level=1e-6)
    best, closed = (np.concatenate([curves[f"{name}/{key}"] for name in names]) for key in ("best_step", "grid_closed"))
    found = {"iteration_ratio": marks["compressed/iteration_ratio"], "best_steps": best, "grids_closed": closed}
    return {f"own/{key}": value for key, value in found.items()}


def learned_in_turn(runs: Runs, rank: int, marks: Sequence[int]) -> dict[str, np.ndarray | Tensor]:
    """Follow "original" once more through the iterations `marks` (T), and see which singular value it learns when.

    A component counts as learned when its strength u_i*^T X v_i* passes s_i / 2. Of the first seed: "values"
    (T, r + 1); per seed (S,): "ordered", whether all are learned and the larger first; "spread", (last - first) / last
    of the times; "excess", the largest value beyond the rank over s_1.
    """
    left, s, right = target_triplets(runs, rank)
    products = products_at(runs, "original", marks)
    values = torch.linalg.svdvals(products)[..., : rank + 1]
    strength = torch.einsum("sik,stij,skj->skt", left, products, right)
    times = torch.tensor(marks)[(strength > s[..., None] / 2).int().argmax(-1)]
    ordered = (times.diff(dim=-1) >= 0).all(-1) & (strength[..., -1] > s / 2).all(-1)
    spread = 1 - times.amin(-1) / times.amax(-1)
    excess = values[..., -1].amax(-1) / s[:, 0]
    return {"marks": np.array(marks), "values": values[0], "ordered": ordered, "spread": spread, "excess": excess}


def as_scalars(runs: Runs, rank: int, depth: int, plan: Plan, marks: Sequence[int]) -> dict[str, Tensor]:
    """Follow "compressed" through `marks` (T) of a factorization and hold it against `theory.aligned_values`.

    "theory" (T, r) of the first seed; per seed (S,): "deviation" of the singular values from the recursion, over s_1;
    "rise", the share of its time to .9 s_1 that the first value takes from .1 s_1 on, by the recursion.
    """
    products = products_at(runs, "compressed", marks)
    _, s, _ = target_triplets(runs, rank)
    step = plan.step / products[0, 0].numel()  # on the sum loss
    path = aligned_values(s, depth, plan.scale, step, marks[-1]).transpose(0, 1)
    found, expected = torch.linalg.svdvals(products)[..., :rank], path[:, marks]
    low, high = ((path[..., 0] > level * s[:, :1]).int().argmax(-1).double() for level in (0.1, 0.9))
    deviation = (found - expected).abs().amax((1, 2)) / s[:, 0]
    return {"theory": expected[0], "rise": (high - low) / high, "deviation": deviation}


def products_at(runs: Runs, name: str, marks: Sequence[int]) -> Tensor:
    """Return the products (S, T, d, d) of the starts of that name at the iterations `marks` (T)."""
    problem = stack_problems([problem for problem, _ in runs])
    starts = [starts[name] for _, starts in runs]
    factors, step = stack_factors([factors for factors, _, _ in starts]), starts[0][1]
    history = descend(problem, factors, step, marks[-1], record_every=marks[-1], snapshots=marks)
    return torch.stack([product(factors) for factors in history.snapshots.values()], 1)


def target_triplets(runs: Runs, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the leading singular triplets of the targets: U (S, d, r), s (S, r) and V^T (S, r, d)."""
    left, s, right = torch.linalg.svd(torch.stack([problem.target for problem, _ in runs]))
    return left[..., :rank], s[:, :rank], right[:, :rank]


def across_depths(found: Mapping[int, Mapping[str, Any]], tasks: Sequence[str]) -> dict[str, np.ndarray]:
    """Return per seed (S,) the worst over depths, {depth: results}, as "worst/<name>", and what compares them.

    Own steps, "own/iteration_ratio", may be there for some of the depths, and the worst is then that of these.
    "all_ordered": ordered at every depth; "deepest/spread": the spread of the deepest over that of the shallowest.
    """
    depths, keys = list(found), ("worst_ratio", "iteration_ratio", "own/iteration_ratio", "final")
    names = [*(f"{task}/{key}" for task in tasks for key in keys), "deviation", "excess"]
    out = {
        f"worst/{name}": np.max([np.asarray(found[L][name]) for L in depths if name in found[L]], 0) for name in names
    }
    out["all_ordered"] = np.all([np.asarray(found[L]["ordered"]) for L in depths], 0)
    return out | {"deepest/spread": np.asarray(found[depths[-1]]["spread"] / found[depths[0]]["spread"])}
