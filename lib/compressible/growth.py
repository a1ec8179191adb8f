"""What a step of sparse completion costs, and how that grows with the number of entries."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .baselines import _now
from .engines import choose
from .machine import peak_memory, reset_peak_memory
from .sparse import SparseCompletion


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
            began = _now(factors[0])
            engine.advance(steps)
            seconds.append((_now(factors[0]) - began) / steps)
    return np.array(seconds)


def peak_bytes(problem: SparseCompletion, factors: Sequence[Tensor]) -> int:
    """Return the peak of device memory while an engine is made and takes two steps, all that is alive included.

    Only CUDA tells; raises ValueError elsewhere.
    """
    if problem.device.type != "cuda":
        raise ValueError(f"problem is on {problem.device}, expected cuda, which counts the bytes of its tensors")
    reset_peak_memory(str(problem.device))
    step_seconds(problem, factors, 1, 1)
    return peak_memory(str(problem.device))


def held_bytes(problem: SparseCompletion, factors: Sequence[Tensor]) -> int:
    """Return the bytes of the stored entries, hidden ones included, of the factors and of an engine's copy of them."""
    kept = [entries for entries in (problem.seen, problem.unseen) if entries is not None]
    sides = [side for entries in kept for side in (entries.rows, entries.columns)]
    tensors = [part for side in sides for part in (side.pointers, side.indices, side.values)]
    tensors += [entries.order for entries in kept] + [*factors, *factors]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def log_slope(x: Sequence[float], y: np.ndarray) -> np.ndarray:
    """Return the exponent (...) of y (..., n) ~ x^exponent by least squares on logarithms; ValueError if n < 2."""
    x, y = np.log(np.asarray(x, float)), np.log(np.asarray(y, float))
    if len(x) < 2:
        raise ValueError(f"x has {len(x)} value, expected at least two for a slope")
    x = x - x.mean()
    return (y * x).sum(-1) / (x * x).sum()
