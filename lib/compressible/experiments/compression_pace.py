"""How soon Deep LoRA learns a few examples: of full width, thin, compressed, and what of it is the rate.

P1's figure has one seed and draws averages of the losses (weight .99) and of ten scores (.95); here curves are raw, and
averages beside them (papers' trap T7). Two controls: the thin start at the compressed one's rates, "paced", and the
compressed start at a slower inner rate, "slower".
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import product

import numpy as np
import pandas as pd
from torch import nn

from compressible.experiments import few_shot
from compressible.experiments.few_shot import Method, Rates
from compressible.finetuning.run import RunHistory

METHODS = ("full", "thin", "compressed", "paced", "slower")
LEVELS = (1.0, 0.1)  # of the raw training loss
LOSS_WEIGHT, SCORE_WEIGHT = 0.99, 0.95  # of the past in the authors' averages
PAIRS = (*((name, "full") for name in METHODS[1:]), ("paced", "compressed"))


def methods(
    model: nn.Module, matrices: list[str], protocol: str, rank: int, init_scale: float, rates: Rates
) -> dict[str, Method]:
    """Return each of METHODS; arguments as of `few_shot.methods`. "paced" has the rates of "compressed"."""
    known = few_shot.methods(model, matrices, protocol, rank, init_scale, rates)
    config = copy.deepcopy(known["thin"].config)
    config.lr_ratio = rates.outer / rates.inner  # type: ignore[attr-defined]  # a DeepLoraConfig
    return {name: known[name] if name in known else Method(config, rates.inner) for name in METHODS}


def outcome(histories: Sequence[RunHistory], seeds: int, judged_at: int) -> dict[str, np.ndarray]:
    """Return what runs by METHODS and seed come to, as arrays over S = `seeds`.

    Args:
        histories: of `few_shot.planned_runs` with one size, scored at `judged_at`.
        seeds: S.
        judged_at: the step whose scores are compared, 200 in the paper.

    Returns:
        "losses" (methods, S, steps), "scores" (methods, S, marks); (S,) each: "<method>, below <level>" of LEVELS, by
        `first_below`, and "<a> over <b>, below <level>" of PAIRS; "<method>, Pearson" at `judged_at` and "..., plotted"
        as the authors average it; "gap by averaging", how much further below full width averaging puts the thin one.
    """
    shape = (len(METHODS), seeds, -1)
    losses = np.array([run.losses for run in histories]).reshape(shape)
    scores = np.array([[run.scores[mark] for mark in sorted(run.scores)] for run in histories]).reshape(shape)
    last = sorted(histories[0].scores).index(judged_at)
    plotted = averaged(scores[..., : last + 1], SCORE_WEIGHT)[..., -1]
    out = {"losses": losses, "scores": scores} | _paces(losses)
    for at, name in enumerate(METHODS):
        out |= {f"{name}, Pearson": scores[at, :, last], f"{name}, plotted": plotted[at]}
    gaps = [out[f"full, {kind}"] - out[f"thin, {kind}"] for kind in ("plotted", "Pearson")]
    return out | {"gap by averaging": gaps[0] - gaps[1]}


def first_below(losses: np.ndarray, level: float) -> np.ndarray:
    """Return the first step, counted from 1, at which losses (..., steps) are below `level`.

    Infinite where they never are, and NaN where they stop being finite before.
    """
    below, lost = losses < level, ~np.isfinite(losses)
    never, steps = losses.shape[-1], np.arange(1, losses.shape[-1] + 1)
    first = np.where(below, steps, never + 1).min(-1)
    gone = np.where(lost, steps, never + 1).min(-1)
    return np.where(gone < first, np.nan, np.where(first > never, np.inf, first))


def averaged(values: np.ndarray, weight: float) -> np.ndarray:
    """Return running averages along the last axis, which start at the first value and keep `weight` of the past."""
    flat = pd.DataFrame(values.reshape(-1, values.shape[-1]).T)
    return flat.ewm(alpha=1 - weight, adjust=False).mean().to_numpy().T.reshape(values.shape)


def _paces(losses: np.ndarray) -> dict[str, np.ndarray]:
    """First steps below LEVELS, and their ratios by PAIRS."""
    out = {
        f"{name}, below {level:g}": first_below(losses[at], level)
        for (at, name), level in product(enumerate(METHODS), LEVELS)
    }
    for (one, other), level in product(PAIRS, LEVELS):
        steps = out[f"{one}, below {level:g}"], out[f"{other}, below {level:g}"]
        out[f"{one} over {other}, below {level:g}"] = _ratios(*steps)
    return out


def _ratios(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """One over the other: infinite where only `one` never arrives, 0 where only `other`; both never: left out."""
    known = ~(np.isinf(one) & np.isinf(other))
    return one[known] / other[known]
