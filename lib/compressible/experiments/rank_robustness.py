"""Methods at many ranks, each at the published rate and at a rate of its own, and how that rate falls with the rank.

    paper       LoRA with P1's start, N(0, 1) and zeros, unscaled (papers' traps T2 and T6)
    scaled      the same times 8 / r, which is alpha / r with alpha = 8: the same at r = 8
    standard    LoRA with its standard start, Kaiming and zeros, unscaled
    thin        Deep LoRA, three orthogonal factors of width r
    compressed  Deep LoRA with outer factors from the first gradient, for even r

A rate is chosen by its mean score over other seeds on training rows that neither train nor judge. If the best rate is
c r^k, P1's one rate for all ranks is wrong by r^k; theory for unscaled LoRA has k = -1/2
(learning rates across ranks, arXiv 2602.06204).
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import nn

from compressible.data.tasks import Task
from compressible.experiments import few_shot
from compressible.experiments.few_shot import Method, Rates
from compressible.experiments.methods_compared import split_rows
from compressible.experiments.rate_grid import best_of, is_inside, search_each
from compressible.finetuning.finetune import fine_tune
from compressible.finetuning.lora import paper_lora_start
from compressible.finetuning.peft_models import of_factors_alone
from compressible.finetuning.run import FineTuningRun
from compressible.runtime.checks import expect

METHODS = ("paper", "scaled", "standard", "thin", "compressed")
REFERENCE = 8  # the paper's rank elsewhere, to which others are compared, and alpha of "scaled"
Case = tuple[str, int]  # method and rank
Scores = dict[tuple[Case, float], np.ndarray]  # (S,) by case and rate factor


@dataclass(frozen=True)
class Setting:
    """What all runs share.

    Args:
        ranks: ascending, usually 1 to 64.
        rows: training rows of a run, which its seed draws.
        steps: updates of a run, 200 in the paper.
        outer, inner: published rates of all factors but compressed inner ones, and of those.
        factors: of the published rate, ascending, 1 usually among them: the grid to begin with.
        most: rates of a case that may be tried in all.
        options: of `fine_tune`: batch_size, precision, max_stack, devices; checkpoint and checkpoint_every, where the
            calls of a comparison append a name of their own to the file.
    """

    ranks: Sequence[int]
    rows: int
    steps: int
    outer: float
    inner: float
    factors: Sequence[float]
    most: int
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def cases(self) -> list[Case]:
        """Method and rank, those of equal rank side by side, so that they share passes."""
        return [(name, rank) for rank in self.ranks for name in METHODS if name != "compressed" or rank % 2 == 0]


def methods(
    model: nn.Module, matrices: list[str], protocol: str, init_scale: float, setting: Setting
) -> dict[Case, Method]:
    """Return the method of every case at the published rate; arguments as of `few_shot.methods`."""
    rates = Rates(setting.outer, setting.outer, setting.inner, setting.inner)
    made: dict[Case, Method] = {}
    for rank in setting.ranks:
        known = few_shot.methods(model, matrices, protocol, 2 * rank, init_scale, rates)  # even at every rank
        made |= {(name, rank): _of_rank(known[name if name in known else "paper"], name, rank) for name in METHODS}
    return {case: made[case] for case in setting.cases}


@of_factors_alone
@torch.no_grad()
def scaled_paper_start(model: nn.Module, generator: torch.Generator) -> None:
    """Start LoRA with the very factors of the paper's start where the config scales them."""
    layers = [layer for layer in model.modules() if isinstance(layer, LoraLayer)]
    kept = [dict(layer.scaling) for layer in layers]
    for layer in layers:
        layer.scaling = dict.fromkeys(layer.scaling, 1.0)
    paper_lora_start(model, generator)
    for layer, scaling in zip(layers, kept, strict=True):
        layer.scaling = scaling


def compare(
    model: nn.Module,
    task: Task,
    chosen: Mapping[Case, Method],
    setting: Setting,
    seeds: Sequence[int],
    tuning_seeds: Sequence[int],
    tuning_rows: int,
) -> dict[str, Any]:
    """Choose a rate for every case, then judge all at the published and at their own rates with fresh seeds.

    Args:
        model, task: of `load_for_task`.
        chosen: of `methods`.
        setting: what all share.
        seeds: S of them, which judge on task.validation.
        tuning_seeds: T others, which choose.
        tuning_rows: training rows on which rates are chosen; no run trains on them.

    Returns:
        By method, rank and seed "fixed" and "own" (M, R, S), NaN where there is no such case; "factors" (M, R), the own
        rate over the published one; "grid" (M, R, G) and "grid scores" (M, R, G, T) of the rates that were tried, NaN
        behind; "rates inside" (M,), whether all own rates of a method lie within their grids; and what `judged` gives.
    """
    expect("seeds", list(seeds), not set(seeds) & set(tuning_seeds), f"none of tuning_seeds {list(tuning_seeds)}")
    rest, held = split_rows(task, tuning_rows)
    tried: Scores = {}

    def scores_of(pairs: Sequence[tuple[Case, float]]) -> list[float]:
        tried.update(_scores(model, replace(rest, validation=held), chosen, pairs, setting, tuning_seeds))
        return [float(tried[pair].mean()) for pair in pairs]

    more = setting.most - len(setting.factors)
    found = search_each(scores_of, setting.cases, setting.factors, more)
    best = {case: best_of(scores) for case, scores in found.items()}
    pairs = list(dict.fromkeys((case, factor) for case in setting.cases for factor in (1.0, best[case])))
    scores = _scores(model, rest, chosen, pairs, setting, seeds)
    out = _arrays(setting, scores, best, tried, len(seeds), len(tuning_seeds))
    inside = np.array([all(is_inside(found[case]) for case in setting.cases if case[0] == name) for name in METHODS])
    return out | {"rates inside": inside} | judged(out, setting.ranks)


def judged(found: Mapping[str, np.ndarray], ranks: Sequence[int]) -> dict[str, np.ndarray]:
    """Return what claims are judged on, from the arrays of `compare`.

    (S,) each: "<method>, last - reference, <kind>" of kinds fixed and own, the score at the largest rank less that at
    REFERENCE, or at the least rank where that is not among them; "thin - <other>, last, <kind>" against LoRA's starts.
    (T,) "<method>, exponent" of `exponents`.
    """
    at = list(ranks).index(REFERENCE) if REFERENCE in ranks else 0
    out: dict[str, np.ndarray] = {}
    for kind in ("fixed", "own"):
        scores = dict(zip(METHODS, found[kind], strict=True))
        out |= {f"{name}, last - reference, {kind}": each[-1] - each[at] for name, each in scores.items()}
        others = ("paper", "scaled", "standard")
        out |= {f"thin - {other}, last, {kind}": scores["thin"][-1] - scores[other][-1] for other in others}
    slopes = exponents(found["grid"], found["grid scores"], ranks)
    return out | {f"{name}, exponent": slopes[place] for place, name in enumerate(METHODS)}


def exponents(grid: np.ndarray, scores: np.ndarray, ranks: Sequence[int]) -> np.ndarray:
    """Return (M, T) exponents k of best rate = c r^k, method by method and seed by seed.

    By least squares on logarithms, from factors `grid` (M, R, G) and scores (M, R, G, T), NaN where there are none. Of
    a rank the best rate is where a parabola through the best and its two neighbours is highest (`best_place`).
    """
    logs = np.log10(np.asarray(ranks, float))
    out = np.full((len(scores), scores.shape[-1]), np.nan)
    for method, seed in np.ndindex(out.shape):
        pairs = zip(grid[method], scores[method, ..., seed], strict=True)
        places = np.array([best_place(rates, each) for rates, each in pairs])
        known = np.isfinite(places)
        if known.sum() > 1:
            out[method, seed] = np.polyfit(logs[known], places[known], 1)[0]
    return out


def best_place(rates: np.ndarray, scores: np.ndarray) -> float:
    """Return log10 of the rate where a parabola through the best score and its neighbours is highest.

    At an end of the grid, or where a neighbour's run diverged, it is the best rate itself; NaN without any score.
    """
    known = np.isfinite(rates)
    places, scores = np.log10(rates[known]), scores[known]
    if not np.isfinite(scores).any():
        return float("nan")
    best = int(np.nanargmax(scores))
    near = slice(best - 1, best + 2)
    if not 0 < best < len(places) - 1 or not np.isfinite(scores[near]).all():
        return float(places[best])
    curvature, slope, _ = np.polyfit(places[near] - places[best], scores[near], 2)
    return float(places[best] - slope / (2 * curvature)) if curvature < 0 else float(places[best])


def _of_rank(way: Method, name: str, rank: int) -> Method:
    config: Any = copy.deepcopy(way.config)  # which LoRA's starts share
    config.r = rank
    if isinstance(config, LoraConfig):
        config.lora_alpha = REFERENCE if name == "scaled" else rank
    return Method(config, way.rate, scaled_paper_start if name == "scaled" else way.start)


def _scores(
    model: nn.Module,
    task: Task,
    chosen: Mapping[Case, Method],
    pairs: Sequence[tuple[Case, float]],
    setting: Setting,
    seeds: Sequence[int],
) -> Scores:
    """The last score (S,) of each pair of a case and a factor of its rate; a run that diverged has NaN."""
    ways = {pair: replace(chosen[pair[0]], rate=chosen[pair[0]].rate * pair[1]) for pair in pairs}
    runs: list[FineTuningRun] = few_shot.planned_runs(ways, task, [setting.rows], seeds)
    options = {"evaluate_at": [setting.steps], "keep_factors": False, **_of_call(setting.options, pairs, seeds)}
    histories = fine_tune(model, runs, task, setting.steps, **options)
    scores = np.array([history.scores[setting.steps] for history in histories]).reshape(len(pairs), -1)
    return dict(zip(pairs, scores, strict=True))


def _of_call(options: Mapping[str, Any], pairs: Sequence[tuple[Case, float]], seeds: Sequence[int]) -> dict[str, Any]:
    """Options of one call of `fine_tune` among several, whose states lie in files of its own, by what it trains."""
    if "checkpoint" not in options:
        return dict(options)
    called = hashlib.sha256(repr((list(pairs), list(seeds))).encode()).hexdigest()[:16]
    return {**options, "checkpoint": f"{options['checkpoint']}.{called}"}


def _arrays(
    setting: Setting, scores: Scores, best: Mapping[Case, float], tried: Scores, seeds: int, tuning_seeds: int
) -> dict[str, np.ndarray]:
    """Scores as arrays by method and rank."""
    shape = (len(METHODS), len(setting.ranks))
    grids = {case: sorted(factor for other, factor in tried if other == case) for case in setting.cases}
    longest = max(map(len, grids.values()))
    fixed, own = (np.full((*shape, seeds), np.nan) for _ in range(2))
    factors, grid = np.full(shape, np.nan), np.full((*shape, longest), np.nan)
    grid_scores = np.full((*shape, longest, tuning_seeds), np.nan)
    for case in setting.cases:
        at = METHODS.index(case[0]), list(setting.ranks).index(case[1])
        fixed[at], own[at], factors[at] = scores[case, 1.0], scores[case, best[case]], best[case]
        grid[at][: len(grids[case])] = grids[case]
        grid_scores[at][: len(grids[case])] = [tried[case, factor] for factor in grids[case]]
    return {"fixed": fixed, "own": own, "factors": factors, "grid": grid, "grid scores": grid_scores}
