"""What a step of sparse completion costs, and how that grows with the number of entries."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from compressible.descent.engines.choose import choose
from compressible.recovery.factors import orthogonal_factors
from compressible.recovery.sparse import SparseCompletion
from compressible.recovery.synthetic import sparse_low_rank
from compressible.runtime.devices import clock, peak_inside, resolve_device


def step_seconds(
    problem: SparseCompletion, factors: Sequence[Tensor], steps: int, trials: int, step_size: float = 1e-3
) -> np.ndarray:
    """Return seconds a gradient step (trials,), each the mean of `steps`; compiling and records are left out."""
    engine = choose("auto", problem, factors)(problem, factors, [step_size] * len(factors), 0.0)
    seconds = []
    with torch.inference_mode():
        engine.prepare(steps)
        engine.advance(steps)
        for _ in range(trials):
            began = clock(factors[0])
            engine.advance(steps)
            seconds.append((clock(factors[0]) - began) / steps)
    return np.array(seconds)


def step_cost(
    count: int, lines: int, width: int, trials: int, device: str = "auto", work: int = 1_000_000
) -> tuple[np.ndarray, int]:
    """Return seconds a step (trials,) and the bytes that descending takes, from `count` entries of a square matrix.

    m = n = `lines`, depth 3, inner width k = `width`, float64; a trial takes enough steps to touch `work` entries, at
    least five. Bytes are the peak of what is allocated, entries included, on CUDA, and `held_bytes` elsewhere. Raises
    ValueError where there are fewer than count + 1 places.
    """
    place, generator = resolve_device(device), torch.Generator().manual_seed(0)
    shape = (lines, lines)
    observed = sparse_low_rank(shape, max(width // 2, 1), count, generator, hidden=1)[0].to(place)
    problem = SparseCompletion(observed)
    del observed
    factors = orthogonal_factors(shape, 3, width, 0.1, generator, device=place)
    with peak_inside(place) as peak:
        seconds = step_seconds(problem, factors, max(5, work // count), trials)
        return seconds, peak() if place != "cpu" else held_bytes(problem, factors)


def cost_curve(
    counts: Sequence[int], a_line: float, width: int, trials: int, device: str = "auto"
) -> tuple[np.ndarray, np.ndarray]:
    """Return seconds a step (trials, n) and bytes (n,), as `step_cost`, for n `counts` of entries, `a_line` a line."""
    taken = [step_cost(count, round(count / a_line), width, trials, device) for count in counts]
    return np.stack([seconds for seconds, _ in taken], 1), np.array([float(size) for _, size in taken])


def held_bytes(problem: SparseCompletion, factors: Sequence[Tensor]) -> int:
    """Return the bytes of the stored entries, hidden ones included, of the factors and of an engine's copy of them."""
    kept = [entries for entries in (problem.seen, problem.unseen) if entries is not None]
    sides = [side for entries in kept for side in (entries.rows, entries.columns)]
    tensors = [part for side in sides for part in (side.pointers, side.indices, side.values)]
    tensors += [entries.order for entries in kept] + [*factors, *factors]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def log_slope(x: Sequence[float], y: np.ndarray) -> np.ndarray:
    """Return the exponent (...) of y (..., n) ~ x^exponent by least squares on logarithms; ValueError if n < 2."""
    if len(x) < 2:
        raise ValueError(f"x has {len(x)} value, expected at least two for a slope")
    return np.polyfit(np.log(x), np.log(y).reshape(-1, len(x)).T, 1)[0].reshape(np.shape(y)[:-1])
