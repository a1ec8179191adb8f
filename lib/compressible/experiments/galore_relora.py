"""P3's Theorem 4 held against runs: how far ReLoRA's variants go from GaLore's iterates, and what that costs.

Problems are "regression", a matrix from Gaussian data, "softmax" and "network", classifiers of MNIST's digits; rules
and methods are those of `low_rank_steps`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product

import numpy as np
import torch
from torch import Tensor

from compressible.data.images import ImageData
from compressible.experiments import low_rank_steps as low
from compressible.experiments.low_rank_steps import Objective, Steps

PROBLEMS = ("regression", "softmax", "network")
JUDGED = ("full", "galore", "trained", "published")  # "frozen" is "galore"
KINDS = ("shared", *low.RELORA, "rounding")
DIVERGED = 100.0  # times the first training loss


def objectives(data: ImageData, seed: int, rows: int, width: int) -> dict[str, Objective]:
    """Return the three problems of a seed: its data, its digits and its start."""
    linear, network = low.digits(data, seed, rows), low.digits(data, seed, rows, width)
    return dict(zip(PROBLEMS, (low.regression(seed), linear, network), strict=True))


def departures(objective: Objective, how: Steps) -> dict[str, np.ndarray]:
    """Return {kind: (steps + 1,)}: how far iterates are from GaLore's, over the farthest that GaLore goes.

    Both in the Frobenius norm over all matrices. Kinds: "shared", the modified ReLoRA with GaLore's own P;
    "frozen", the same with the P of its own gradients; "trained" and "published"; "rounding", GaLore itself with the
    training data in reverse order. `how` is what they share; its method is not read.
    """
    directions: low.Directions = []
    galore = replace(how, method="galore")
    theirs = [_flat(found) for found in low.matrices(objective, galore, directions=directions)]
    reach = max(float((found - theirs[0]).norm()) for found in theirs)
    paths = {name: low.matrices(objective, replace(how, method=name)) for name in low.RELORA}
    paths["shared"] = low.matrices(objective, replace(how, method="frozen"), directions=directions)
    paths["rounding"] = low.matrices(objective, galore, reordered=True)
    gaps = {
        name: [float((_flat(ours) - found).norm()) for ours, found in zip(path, theirs, strict=True)]
        for name, path in paths.items()
    }
    return {name: np.array(gaps[name]) / reach for name in KINDS}


def equality(
    problems: Sequence[Mapping[str, Objective]],
    rates: Mapping[str, float],
    periods: Sequence[int],
    rank: int,
    steps: int,
) -> dict[str, np.ndarray]:
    """Return "<rule>/<kind>" (S, problems, periods): the largest departure over a run, of {problem: objective} a seed.

    `rates` {rule: rate}. "path/<kind>" (S, steps + 1) are whole curves, of gradient descent of the network at the
    middle period.
    """
    shape = (len(problems), len(PROBLEMS), len(periods))
    out = {f"{rule}/{kind}": np.empty(shape) for rule in rates for kind in KINDS}
    out |= {f"path/{kind}": np.empty((len(problems), steps + 1)) for kind in KINDS}
    for (s, made), (p, name), (t, period), rule in product(
        enumerate(problems), enumerate(PROBLEMS), enumerate(periods), rates
    ):
        found = departures(made[name], Steps("galore", rule, rates[rule], rank, period, steps, seed=s))
        for kind, gap in found.items():
            out[f"{rule}/{kind}"][s, p, t] = gap.max()
            if (name, rule, t) == ("network", "gd", len(periods) // 2):
                out[f"path/{kind}"][s] = gap
    return out


def outcome(objective: Objective, how: Steps) -> dict[str, np.ndarray]:
    """Return the "train" losses (steps + 1,) along a run and its last "validation" and "test" losses ().

    NaN from where the training loss is not finite or a hundred times its start: the run is stopped there.
    """
    model, curve = copy.deepcopy(objective.model).requires_grad_(False), np.full(how.steps + 1, np.nan)
    out = {"train": curve, "validation": np.array(np.nan), "test": np.array(np.nan)}
    for step, found in enumerate(low.matrices(objective, how)):
        model.load_state_dict(dict(zip(model.state_dict(), found, strict=True)))
        loss = float(objective.train(model))
        if not math.isfinite(loss) or loss > DIVERGED * (curve[0] if step else loss):
            return out
        curve[step] = loss
    return out | {name: np.array(float(getattr(objective, name)(model))) for name in ("validation", "test")}


def tuned(objectives: Sequence[Objective], how: Steps, rates: Sequence[float]) -> dict[str, np.ndarray]:
    """Return what a method comes to at the rate whose mean validation loss over S objectives is least.

    "validation" (S, rates), NaN where a run diverged; "rate" () and "at_end" (), whether that is an end of the grid;
    at that rate "train" (S, steps + 1) and "test" (S,). Raises ValueError if a seed diverges at every rate.
    """
    runs = [[outcome(o, replace(how, rate=rate, seed=s)) for rate in rates] for s, o in enumerate(objectives)]
    validation = np.array([[run["validation"] for run in row] for row in runs])
    means = validation.mean(0)
    if not np.isfinite(means).any():
        raise ValueError(f"rates are {list(rates)}, expected one at which no run of {how.method!r} diverges")
    best = int(np.nanargmin(means))
    chosen = {name: np.stack([row[best][name] for row in runs]) for name in ("train", "test")}
    ends = {"rate": np.array(rates[best]), "at_end": np.array(best in (0, len(rates) - 1))}
    return {"validation": validation, **chosen, **ends}


def quality(
    objectives: Sequence[Objective], rates: Mapping[str, Sequence[float]], rank: int, period: int, steps: int
) -> dict[str, np.ndarray]:
    """Return "<rule>/<method>/<key>" of `tuned`, and "<rule>/<method> over galore" (S,), test losses.

    `rates` {rule: its grid}. Gradient descent keeps its rate, Adam's falls along a cosine.
    """
    out: dict[str, np.ndarray] = {}
    for rule, method in product(rates, JUDGED):
        how = Steps(method, rule, 1.0, rank, period, steps, cosine=rule == "adam")
        found = tuned(objectives, how, rates[rule])
        out |= {f"{rule}/{method}/{key}": value for key, value in found.items()}
    ratios = {
        f"{rule}/{method} over galore": out[f"{rule}/{method}/test"] / out[f"{rule}/galore/test"]
        for rule, method in product(rates, JUDGED)
    }
    return out | ratios


def judged(found: Mapping[str, np.ndarray], periods: Sequence[int]) -> dict[str, np.ndarray]:
    """Return per seed (S,) the largest departures of `equality`, over problems and rules.

    "shared" and "own P", of the frozen one, over all periods; "over rounding", the frozen one's at T = 1 in terms of
    GaLore's from itself, under gradient descent, a geometric mean over problems. The least ones: "both trained" over T
    above 1, "published" over all. "both trained, T = 1": what training B changes in the distance from GaLore there.
    """
    every, once = np.array(periods) > 1, np.array(periods) == 1
    stacked = {kind: np.stack([found[f"{rule}/{kind}"] for rule in low.RULES], 1) for kind in KINDS}  # (S, 2, 3, T)
    worst = {kind: values.max((1, 2)) for kind, values in stacked.items()}
    least = {kind: values.min((1, 2)) for kind, values in stacked.items()}
    ratio = np.log(found["gd/frozen"][..., once] / found["gd/rounding"][..., once])
    return {
        "shared": worst["shared"].max(1),
        "own P": worst["frozen"].max(1),
        "over rounding": np.exp(ratio.mean((1, 2))),
        "both trained": least["trained"][:, every].min(1),
        "published": least["published"].min(1),
        "both trained, T = 1": np.abs(stacked["trained"] - stacked["frozen"])[..., once].max((1, 2, 3)),
    }


def check_periods(periods: Sequence[int], steps: int) -> None:
    """Raise ValueError unless the periods are 1 and then larger ones, ascending, within the steps of a run."""
    if periods[0] != 1 or len(periods) < 2 or list(periods) != sorted(set(periods)) or periods[-1] > steps:
        raise ValueError(f"periods are {periods}, expected 1 and then larger ones, ascending, to steps = {steps}")


def _flat(found: Sequence[Tensor]) -> Tensor:
    return torch.cat([matrix.flatten() for matrix in found])
