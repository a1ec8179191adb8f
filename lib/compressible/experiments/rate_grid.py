"""One study of networks at several learning rates side by side, and what it gives at the rate that validates best."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import nn

Found = dict[str, np.ndarray]


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
    if list(rates) != sorted(set(rates)) or not rates:
        raise ValueError(f"rates are {rates!r}, expected at least one, ascending")
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
