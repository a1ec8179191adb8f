"""The roofline of a gradient step: its operations and bytes, and the machine's rates measured beside it.

The bound of a step is the longer of two times: its operations at the rate of a large matrix product, and its bytes at
the rate of a large copy. Both rates are measured, on the device and in the precision of the step. A step of a small
problem is bound by neither: each needs the one before, so it costs at least a kernel that waits for another.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from compressible.runtime import devices

LARGE = {"cuda": 8192, "cpu": 512}  # side of a large product
LAUNCHES = 128  # dependent kernels in the graph that measures one of them


@dataclass(frozen=True)
class Work:
    """Operations (a multiplication and an addition are two) and bytes of one step of all problems of a stack."""

    operations: int
    bytes: int

    def bound(self, operations_rate: float, bytes_rate: float) -> float:
        """Return the least seconds of the step, at rates in operations and bytes per second."""
        return max(self.operations / operations_rate, self.bytes / bytes_rate)


def count_step(shape: tuple[int, int], width: int, depth: int, itemsize: int, stack: int = 1) -> Work:
    """Count one step on `stack` entrywise problems of `shape` (m, n), whose every entry of X is formed.

    Operations: 2 k an entry for each of X, W_L^T E and E P^T, over all m n entries, and 2 k^2 n for each of W_l P,
    W_l^T B and B P^T, for the depth - 2 inner factors; two an entry for the residual, two a parameter for the update.
    Bytes: the target once, NaN where nothing is observed, every factor read once and written once; X, the residual and
    partial sums never leave the chip.
    """
    m, n = shape
    inner = depth - 2
    parameters = width * (m + n) + inner * width * width
    operations = 6 * m * n * width + 6 * inner * width * width * n + 2 * m * n + 2 * parameters
    return Work(stack * operations, stack * itemsize * (m * n + 2 * parameters))


def count_sparse_step(shape: tuple[int, int], entries: int, width: int, depth: int, itemsize: int) -> Work:
    """Count one step of sparse completion from `entries` observed entries, none other being formed.

    Operations as `count_step`, with the entries in the place of m n. Bytes: two 32-bit indices and a value an entry,
    every factor read once and written once. The k numbers gathered for each entry are counted as held by a cache.
    """
    m, n = shape
    inner = depth - 2
    parameters = width * (m + n) + inner * width * width
    operations = 6 * entries * width + 6 * inner * width * width * n + 2 * entries + 2 * parameters
    return Work(operations, entries * (8 + itemsize) + 2 * itemsize * parameters)


def count_operations(call: Callable[[], object]) -> int:
    """Return the operations of all matrix products that `call` does, forwards and backwards, as PyTorch counts them."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def time_calls(call: Callable[[], object], wait: Callable[[], object], seconds: float, trials: int) -> np.ndarray:
    """Return the seconds of one `call` in each of `trials` (trials,), repeated so that all take about `seconds`.

    One call goes before, to warm up; `wait` is done before every reading of the clock.
    """
    call()
    once = _repeat(call, wait, 1)
    count = max(1, int(seconds / trials / max(once, 1e-9)))
    return np.array([_repeat(call, wait, count) / count for _ in range(trials)])


def bytes_rate(device: str, size: int = 0, seconds: float = 0.1, trials: int = 5) -> float:
    """Return bytes per second read and written by a copy of `size` bytes, by default 2 GiB on CUDA and 64 MiB else."""
    size = size or (2**31 if devices.resolve_device(device) != "cpu" else 2**26)
    source = torch.ones(size // 8, dtype=torch.float64, device=devices.resolve_device(device))
    target = torch.empty_like(source)
    times = time_calls(lambda: target.copy_(source), lambda: devices.synchronize(device), seconds, trials)
    return 2 * 8 * source.numel() / float(np.median(times))


def gemm_rate(
    sizes: tuple[int, int, int], dtype: torch.dtype, device: str, seconds: float = 0.1, trials: int = 5
) -> float:
    """Return operations per second of the product (m, k) times (k, n) for `sizes` (m, n, k)."""
    m, n, k = sizes
    shapes, place = ((m, k), (k, n), (m, n)), devices.resolve_device(device)
    left, right, out = (torch.randn(shape, dtype=dtype, device=place) for shape in shapes)  # ones would draw less power
    times = time_calls(lambda: torch.mm(left, right, out=out), lambda: devices.synchronize(device), seconds, trials)
    return 2 * m * n * k / float(np.median(times))


def launch_seconds(device: str, seconds: float = 0.05, trials: int = 5) -> float:
    """Return the seconds of a step that does next to nothing and waits for the one before.

    On CUDA a kernel in a graph of many, each adding one to the same number; elsewhere one such call of PyTorch.
    """
    number = torch.zeros(1, device=devices.resolve_device(device))
    if number.device.type != "cuda":
        return float(np.median(time_calls(lambda: number.add_(1), lambda: None, seconds, trials)))
    number.add_(1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(number.device), torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for _ in range(LAUNCHES):
            number.add_(1)
    times = time_calls(graph.replay, lambda: devices.synchronize(device), seconds, trials)
    return float(np.median(times)) / LAUNCHES


def ceilings(
    device: str, precisions: Sequence[str], side: int, seconds: float = 0.1, trials: int = 5
) -> dict[str, float]:
    """Return what a device reaches: "bytes/s", "launch" in seconds, and "<precision>/gemm" for each of `precisions`.

    "gemm" is that of a product so large that nothing else counts, "gemm of d" that of one of `side` x `side`.
    """
    out = {"bytes/s": bytes_rate(device, 0, seconds, trials), "launch": launch_seconds(device, seconds, trials)}
    large = LARGE["cpu" if devices.resolve_device(device) == "cpu" else "cuda"]
    for name in precisions:
        for key, edge in (("gemm", large), ("gemm of d", side)):
            out[f"{name}/{key}"] = gemm_rate((edge, edge, edge), getattr(torch, name), device, seconds, trials)
    return out


def _repeat(call: Callable[[], object], wait: Callable[[], object], count: int) -> float:
    wait()
    began = time.perf_counter()
    for _ in range(count):
        call()
    wait()
    return time.perf_counter() - began
