"""How a learning rate is chosen: by the mean score over seeds on rows that judge nothing, on a grid that may grow.

`at_best_rate` gives what one study of networks, side by side at several rates, finds at the rate that validates best.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
from torch import nn

Found = dict[str, np.ndarray]
Case = TypeVar("Case")
ROUNDING = 1e-9  # scores are means of accuracies or correlations, of the order of 1


def search_rates(
    scores_of: Callable[[Sequence[float]], Sequence[float]], rates: Sequence[float], more: int = 4
) -> dict[float, float]:
    """Return {rate: score}, ascending, of `rates` and of up to `more` rates beyond an end while that end is the best.

    Those beyond are 1, 3, 10, 30, ... times a power of ten: a grid that has these goes on by its own factor.

    Args:
        scores_of: called first with all of `rates`, so that they may train side by side, then with one more at a time;
            returns their scores, the higher the better; one that is not finite loses. A mean over three seeds or more
            falls far enough if one of them diverges or stays at chance for its rate to lose.
        rates: at least one, ascending and above 0.
        more: how often the grid may grow.

    Raises:
        ValueError: unless the rates ascend.
    """
    return search_each(lambda pairs: scores_of([rate for _, rate in pairs]), [None], rates, more)[None]


def search_each(
    scores_of: Callable[[Sequence[tuple[Case, float]]], Sequence[float]],
    cases: Sequence[Case],
    rates: Sequence[float],
    more: int = 4,
    beside: Callable[[float, int], float] | None = None,
) -> dict[Case, dict[float, float]]:
    """Return what `search_rates` does for each of several cases, whose grids grow apart; {case: {rate: score}}.

    Args:
        scores_of: called with pairs of a case and a rate, so that cases may train side by side, too: first with all,
            then with one rate more for each case that needs one; returns the pairs' scores.
        cases: what is trained, each with a rate of its own; distinct.
        rates, more: as in `search_rates`.
        beside: called with the rate at an end and 1 or -1, returns the next one above or below it; by default of
            1, 3, 10, 30, ...
    """
    _check_ascending(rates)
    found: dict[Case, dict[float, float]] = {case: {} for case in cases}
    pairs = [(case, rate) for case in cases for rate in rates]
    for grown in range(more + 1):
        for (case, rate), score in zip(pairs, scores_of(pairs), strict=True):
            found[case][rate] = float(score)
        ends = {case: scores for case, scores in found.items() if not is_inside(scores)}
        pairs = [(case, _beyond(scores, beside or _beside)) for case, scores in ends.items()]
        if not pairs or grown == more:
            break
    return {case: dict(sorted(scores.items())) for case, scores in found.items()}


def best_of(scores: Mapping[float, float]) -> float:
    """Return the rate with the highest finite score; the lowest rate where none is finite.

    Of rates whose scores are equal up to rounding it is the lowest: that is the safer one, as the seeds that are judged
    are others, and too high a rate lets some of them diverge or stay at chance, while too low a one is only slow.
    """
    finite = {rate: score if math.isfinite(score) else -math.inf for rate, score in scores.items()}
    highest = max(finite.values())
    return min(rate for rate, score in finite.items() if score >= highest - ROUNDING)


def is_inside(scores: Mapping[float, float]) -> bool:
    """Return whether the best rate is at no end of the grid, beyond which the true best may lie."""
    return min(scores) < best_of(scores) < max(scores)


def at_best_rate(
    study: Callable[..., Found],
    make: Callable[[int], nn.Module],
    seeds: Sequence[int],
    rates: Sequence[float],
    kept: Sequence[str] = (),
    minimised: str = "validation_loss",
    **options: Any,
) -> Found:
    """Train make(seed) for all seeds at all rates as one stack, and return what `study` gives at the best rate.

    The best rate has the least mean of the last "validation_loss" over the S seeds; one that diverges has none. The
    grid grows beyond an end that is its best, as `search_rates` has it; a single rate is taken as it is.

    Args:
        study: called as study(models, learning_rates=, seed=, **options), first with R rates times S seeds; the first
            axis of its arrays is the models, but of "at", the records, which are the same for all.
        make: builds the network of a seed; a seed draws the same batches at every rate.
        seeds, rates: S and R of them; `rates` ascend.
        kept: names of (S,) arrays to return at all R' rates that were tried, too, as "<name>_by_rate" (R', S).
        minimised: name of the study's (S,) array whose least mean chooses, in the place of "validation_loss".

    Returns:
        The study's arrays, "rates" (R',), ascending, "best_rate" (1,) and "best_is_inside" (1,), whether it is at no
        end of the rates.

    Raises:
        ValueError: unless the rates ascend, or if all diverge.
    """
    tried: dict[float, Found] = {}

    def scores_of(some: Sequence[float]) -> list[float]:
        tried.update(_side_by_side(study, make, seeds, some, options))
        return [-float(tried[rate][minimised].mean()) for rate in some]

    scores = search_rates(scores_of, rates, more=4 if len(rates) > 1 else 0)
    best = best_of(scores)
    if not math.isfinite(scores[best]):
        raise ValueError(f"all of the rates {list(scores)!r} diverge, expected one that does not")
    by_rate = {f"{name}_by_rate": np.stack([tried[rate][name] for rate in scores]) for name in kept}
    chosen = {"best_rate": np.array([best]), "best_is_inside": np.array([is_inside(scores)])}
    return tried[best] | by_rate | {"rates": np.array(list(scores))} | chosen


def _side_by_side(
    study: Callable[..., Found],
    make: Callable[[int], nn.Module],
    seeds: Sequence[int],
    rates: Sequence[float],
    options: Mapping[str, Any],
) -> dict[float, Found]:
    """{rate: what the study found at it}, all of them trained as one stack."""
    models = [make(seed) for _ in rates for seed in seeds]
    each = {"learning_rates": [rate for rate in rates for _ in seeds], "seed": [seed for _ in rates for seed in seeds]}
    found = study(models, **each, **options)
    parts = [slice(i * len(seeds), (i + 1) * len(seeds)) for i in range(len(rates))]
    cut = [{name: values if name == "at" else values[part] for name, values in found.items()} for part in parts]
    return dict(zip(rates, cut, strict=True))


def _check_ascending(rates: Sequence[float]) -> None:
    if not len(rates) or list(rates) != sorted(set(rates)) or min(rates) <= 0:
        raise ValueError(f"rates are {list(rates)}, expected at least one, above 0 and ascending")


def _beyond(scores: Mapping[float, float], beside: Callable[[float, int], float]) -> float:
    """The next rate beyond the end of the grid that is its best."""
    best = best_of(scores)
    return beside(best, 1 if best == max(scores) else -1)


def _beside(rate: float, direction: int) -> float:
    """The next of 1, 3, 10, 30, ... times a power of ten above (1) or below (-1) a rate."""
    ladder = [float(f"{digit}e{power}") for power in range(-12, 7) for digit in (1, 3)]
    if direction > 0:
        return min(step for step in ladder if step > 1.01 * rate)
    return max(step for step in ladder if step < 0.99 * rate)
