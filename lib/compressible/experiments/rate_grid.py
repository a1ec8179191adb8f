"""How a learning rate is chosen: by the mean score over seeds on rows that judge nothing, on a grid that may grow.

`at_best_rate` gives what one study of networks, side by side at several rates, finds at the rate that validates best.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import nn

Found = dict[str, np.ndarray]
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
    _check_ascending(rates)
    found = dict(zip(rates, map(float, scores_of(list(rates))), strict=True))
    for _ in range(more):
        if is_inside(found):
            break
        best = best_of(found)
        beyond = _beside(best, 1 if best == max(found) else -1)
        found[beyond] = float(scores_of([beyond])[0])
    return dict(sorted(found.items()))


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
    **options: Any,
) -> Found:
    """Train make(seed) for all seeds at all rates as one stack, and return what `study` gives at the best rate.

    The best rate has the least mean of the last "validation_loss" (R S,) over the S seeds; one that diverges has none.

    Args:
        study: called as study(models, learning_rates=, seed=, **options); its arrays whose first axis is the models, R
            rates times S seeds, are cut to the best rate, all others stay.
        make: builds the network of a seed; a seed draws the same batches at every rate.
        seeds, rates: S and R of them; `rates` ascend.
        kept: names of (R S,) arrays to return at all rates, too, as "<name>_by_rate" (R, S).

    Returns:
        The study's arrays, "best_rate" (1,) and "best_is_inside" (1,), whether it is at no end of the rates.

    Raises:
        ValueError: unless the rates ascend, or if all diverge.
    """
    _check_ascending(rates)
    models = [make(seed) for _ in rates for seed in seeds]
    each = {"learning_rates": [rate for rate in rates for _ in seeds], "seed": [seed for _ in rates for seed in seeds]}
    found = study(models, **each, **options)
    grid = len(rates), len(seeds)
    losses = np.nan_to_num(found["validation_loss"].reshape(grid).mean(1), nan=np.inf, posinf=np.inf)
    best = int(losses.argmin())
    if not np.isfinite(losses[best]):
        raise ValueError(f"all of the rates {rates!r} diverge, expected one that does not")
    chosen = slice(best * len(seeds), (best + 1) * len(seeds))
    out = {name: values[chosen] if len(values) == len(models) else values for name, values in found.items()}
    out |= {f"{name}_by_rate": found[name].reshape(grid) for name in kept}
    return out | {"best_rate": np.array([rates[best]]), "best_is_inside": np.array([0 < best < len(rates) - 1])}


def _check_ascending(rates: Sequence[float]) -> None:
    if not len(rates) or list(rates) != sorted(set(rates)) or min(rates) <= 0:
        raise ValueError(f"rates are {list(rates)}, expected at least one, above 0 and ascending")


def _beside(rate: float, direction: int) -> float:
    """The next of 1, 3, 10, 30, ... times a power of ten above (1) or below (-1) a rate."""
    ladder = [float(f"{digit}e{power}") for power in range(-12, 7) for digit in (1, 3)]
    if direction > 0:
        return min(step for step in ladder if step > 1.01 * rate)
    return max(step for step in ladder if step < 0.99 * rate)
