"""What a training step of each variant of a network costs, and what that comes to against a baseline.

The variants are those of network_variants.py. Seconds are of one network alone: a stack's are no one's.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from compressible.experiments.network_variants import Comparison, Found, as_array
from compressible.experiments.outcomes import first_below, prefixed
from compressible.networks.training import NetworkHistory
from compressible.runtime.devices import resolve_device

STRETCH = 16  # steps that one CUDA graph may hold, where they divide the steps between records
STATE_BYTES = 16  # of a parameter under Adam: its float32 value, its gradient and two moments


def places(device: str) -> list[str]:
    """Return where steps are timed: on the CPU, and on the device where that is another."""
    return list(dict.fromkeys(["cpu", resolve_device(device)]))


def timed_places(arrays: Iterable[str]) -> list[str]:
    """Return where the steps of a result were timed, by its arrays' names, which begin with the place.

    A result may come from another machine: its record is drawn where there is no GPU, too.
    """
    return [place for place in ("cpu", "cuda") if any(name.startswith(f"{place}/") for name in arrays)]


def time_alone(comparison: Comparison, repeats: int, seconds: float, **changes: Any) -> Found:
    """Time a training step of each variant, one network at a time, the variants taking turns.

    Args:
        comparison: whose plan says batch, optimiser, precision and device.
        repeats: T rounds; in each every variant is timed once, so that what else the machine does falls on all.
        seconds: about how long a variant is timed in a round, after half as long to warm up.
        **changes: go over the plan, such as device="cpu".

    Returns:
        "<name>/step_seconds" (T,), seconds a step without evaluation; "<name>/operations" (1,) of its matrix products;
        "<name>/state_bytes" (1,), parameters, gradients and Adam's moments by count; "<name>/peak_bytes" (1,), peak
        memory of the tensors on CUDA, data included, of the process on a CPU.
    """
    found: Found = {}
    paces: dict[str, list[float]] = {name: [] for name in comparison.variants}
    counts: dict[str, int] = {}
    built = {name: comparison.build(name, 0) for name in comparison.variants}
    for name, network in built.items():  # a round before tells how many steps fill the time, and is not kept
        pace, history = _pace(comparison, name, network, 4, **changes)
        half = max(2, round(seconds / pace / 2))
        counts[name] = 2 * (half if half < STRETCH else half - half % STRETCH)
        sizes = {"state_bytes": STATE_BYTES * history.parameters, "peak_bytes": history.peak_memory_bytes}
        sizes["operations"] = _operations(comparison, network, **changes)
        found |= prefixed(name, {key: np.array([value]) for key, value in sizes.items()})
    for _ in range(repeats):
        for name, each in paces.items():
            each.append(_pace(comparison, name, built[name], counts[name], **changes)[0])
    return found | {f"{name}/step_seconds": np.array(each) for name, each in paces.items()}


def time_widths(
    comparison_of: Callable[[int], Comparison],
    widths: Sequence[int],
    widest_on_cpu: int,
    device: str,
    repeats: int,
    seconds: float,
) -> Found:
    """Return `time_alone` of `comparison_of(width)` for all widths, under "<place>/<width>/", at all `places`.

    Beside a GPU a CPU is too slow for larger widths than `widest_on_cpu`.
    """
    found: Found = {}
    where = places(device)
    for place in where:
        for width in widths:
            if place == where[-1] or width <= widest_on_cpu:
                each = time_alone(comparison_of(width), repeats, seconds, device=place)
                found |= prefixed(f"{place}/{width}", each)
    return found


def compare_seconds(
    found: Mapping[str, np.ndarray],
    clock: Mapping[str, np.ndarray],
    name: str,
    base: str,
    kind: str = "own",
    margin: float = 0.005,
) -> Found:
    """Return what `name` takes over what `base` takes, in a step and to the same accuracy.

    Args:
        found: of `learn`.
        clock: of `time_alone`.
        name, base: two variants.
        kind: "own" or "shared", the rates at which they learned.
        margin: the accuracy is the lower of the two ends less this, so that both reach it and the noise of the last
            records does not decide.

    Returns:
        "<name> / <base>/step" (T,), seconds of a step in the same round; "<name> / <base>/<kind>/iterations" (S,) to
        that accuracy, and ".../seconds" (S,), which are iterations times seconds of a step, each seed's by a round of
        its own as far as there are enough, so that intervals hold what either varies by.
    """
    level = np.minimum(found[f"{name}/{kind}/end"], found[f"{base}/{kind}/end"]) - margin
    first, other = (arrival(found[f"{each}/{kind}/accuracy"], level, found["at"]) for each in (name, base))
    own, theirs = clock[f"{name}/step_seconds"], clock[f"{base}/step_seconds"]
    key, ratio, step = f"{name} / {base}", first / other, own / theirs
    together = {f"{key}/{kind}/iterations": ratio, f"{key}/{kind}/seconds": ratio * np.resize(step, ratio.shape)}
    return {f"{key}/step": step} | together


def arrival(accuracy: np.ndarray, level: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Return `at` (R,) where curves (S, R) first exceed their levels (S,), between records by a straight line.

    NaN where a curve never does; the first record where it does from the start.
    """
    later = first_below(-accuracy, -level[:, None], at)
    index = np.searchsorted(at, np.where(np.isfinite(later), later, at[0]))
    before, rows = np.maximum(index - 1, 0), np.arange(len(accuracy))
    low, high = accuracy[rows, before], accuracy[rows, index]
    share = np.where(index > 0, (level - low) / np.where(high > low, high - low, 1.0), 1.0)
    return np.where(np.isfinite(later), at[before] + share * (at[index] - at[before]), np.nan)


def _pace(
    comparison: Comparison, name: str, network: nn.Module, steps: int, **changes: Any
) -> tuple[float, NetworkHistory]:
    """Seconds a step over the last two thirds of one network's steps, nothing evaluated."""
    half = steps // 2
    plan = {"steps": 3 * half, "evaluate_every": half, "warmup": 0, "test_set": None, "stacked": False} | changes
    history = comparison.train(name, [0], [1e-4], [network], **plan)
    seconds = as_array(history.seconds)
    return float(seconds[-1] - seconds[-3]) / (2 * half), history


def _operations(comparison: Comparison, network: nn.Module, **changes: Any) -> int:
    """Operations of the matrix products of one step, forwards and backwards, as PyTorch counts them by shapes alone."""
    size = {**comparison.plan, **changes}.get("batch_size")
    model = copy.deepcopy(network).to("meta").train()
    inputs, targets = (part[:size].to("meta") for part in (comparison.training.inputs, comparison.training.targets))
    with FlopCounterMode(display=False) as counter:
        functional.cross_entropy(model(inputs), targets).backward()
    return counter.get_total_flops()
