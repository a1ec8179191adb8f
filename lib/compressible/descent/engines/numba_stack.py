"""The CPU engine for stacks of small problems: whole stretches of descent compiled by numba, BLAS inside.

A stack of S problems advanced by batched products streams S times its working set through the cache at every step.
Here each problem runs a whole stretch alone, its target, mask and factors staying in one core's cache, and the
cores take problems from the stack side by side: numba releases Python's lock, and the products are the BLAS that
scipy carries. Compilation costs about two seconds, once per precision; numba keeps it on disk where it can.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from compressible.descent.engines.base import Engine, Entrywise, Rate
from compressible.descent.engines.cores import compiled, cores, one_blas_thread, pool
from compressible.recovery.problems import MatrixCompletion

Arrays = tuple[np.ndarray, ...]  # one a layer


class NumbaStack(Engine):
    """Gradient descent on entrywise problems on the CPU, problems of a stack spread over the cores."""

    name = "compiled"

    def __init__(self, problem: Entrywise, factors: Sequence[Tensor], rates: Sequence[Rate], decay: float) -> None:
        self.single = factors[0].ndim == 2
        stacked = [factor[None] if self.single else factor for factor in factors]
        self._stack = [factor.clone(memory_format=torch.contiguous_format) for factor in stacked]
        size = len(self._stack[0])
        entries, self._scales = _entries(problem, size)
        # 1/N is folded into the rates, so that a mask is stored as exact float32 zeros and ones: half the bytes.
        steps = np.stack([_per_problem(rate, size) for rate in rates], 1)  # (S, L)
        scaled, shrinks = (x.astype(entries[0].dtype) for x in (steps * self._scales[:, :1], 1 - steps * decay))
        arrays = [tuple(factor[i].numpy() for factor in self._stack) for i in range(size)]
        self._runs = [(arrays[i], *(entry[i] for entry in entries[:2]), scaled[i], shrinks[i]) for i in range(size)]
        self._looks = [(arrays[i], *(entry[i] for entry in entries)) for i in range(size)]
        self._sums = np.empty((size, 2))
        self._scratch = [_scratch(self._stack) for _ in range(min(size, cores()))]

    @property
    def factors(self) -> list[Tensor]:  # type: ignore[override]  # computed
        """The current factors, views of the engine's own memory."""
        return [factor[0] for factor in self._stack] if self.single else self._stack

    def advance(self, steps: int) -> None:
        def work(index: int, scratch: tuple) -> None:
            _descend(*self._runs[index], *scratch, steps)

        self._spread(work)

    def evaluate(self) -> Tensor:
        def work(index: int, scratch: tuple) -> None:
            self._sums[index] = _squares(*self._looks[index], scratch[0])

        self._spread(work)
        values = torch.from_numpy(self._sums * self._scales / 2)
        return values[0] if self.single else values

    def _spread(self, work: Callable[[int, tuple], None]) -> None:
        """Do `work` for every problem; a core that is done takes the next one, since cores need not be equally fast."""
        waiting = iter(range(len(self._runs)))  # next() on it is atomic

        def drain(scratch: tuple) -> None:
            for index in waiting:
                work(index, scratch)

        with one_blas_thread():
            if len(self._scratch) == 1:
                drain(self._scratch[0])
            else:
                list(pool().map(drain, self._scratch))


@compiled
def _descend(
    factors: Arrays,
    target: np.ndarray,
    mask: np.ndarray,
    rates: np.ndarray,
    shrinks: np.ndarray,
    prefixes: Arrays,
    backs: Arrays,
    gradients: Arrays,
    steps: int,
) -> None:
    """`steps` steps of one problem; prefixes[l] = W_{l+1}...W_1, backs[l] = (W_L...W_{l+2})^T E.

    E overwrites X: prefixes[-1] and backs[-1] are one buffer, which keeps the working set in the cache.
    """
    last = len(factors) - 1
    for _ in range(steps):
        _forward(factors, prefixes)
        _residual(prefixes[last], target, mask)
        for layer in range(last, 0, -1):
            below = prefixes[layer - 1] if layer > 1 else factors[0]
            np.dot(factors[layer].T, backs[layer], backs[layer - 1])
            np.dot(backs[layer], below.T, gradients[layer])
            _update(factors[layer], gradients[layer], rates[layer], shrinks[layer])
        _update(factors[0], backs[0], rates[0], shrinks[0])


@compiled
def _forward(factors: Arrays, prefixes: Arrays) -> None:
    for layer in range(1, len(factors)):
        below = prefixes[layer - 1] if layer > 1 else factors[0]
        np.dot(factors[layer], below, prefixes[layer])


@compiled
def _residual(values: np.ndarray, target: np.ndarray, mask: np.ndarray) -> None:
    flat, wanted, seen = values.reshape(-1), target.reshape(-1), mask.reshape(-1)
    for i in range(flat.size):
        flat[i] = (flat[i] - wanted[i]) * seen[i]


@compiled
def _update(factor: np.ndarray, gradient: np.ndarray, rate: float, shrink: float) -> None:
    flat, slope = factor.reshape(-1), gradient.reshape(-1)
    for i in range(flat.size):
        flat[i] = shrink * flat[i] - rate * slope[i]


@compiled
def _squares(
    factors: Arrays, target: np.ndarray, mask: np.ndarray, hidden: np.ndarray, prefixes: Arrays
) -> tuple[float, float]:
    """Sums of squared residuals over the observed and over the hidden entries, in float64."""
    _forward(factors, prefixes)
    flat, wanted = prefixes[len(factors) - 1].reshape(-1), target.reshape(-1)
    seen, unseen = mask.reshape(-1), hidden.reshape(-1)
    inside, outside = 0.0, 0.0
    for i in range(flat.size):
        square = np.float64(flat[i] - wanted[i]) ** 2
        inside += square * seen[i]
        outside += square * unseen[i]
    return inside, outside


def _entries(problem: Entrywise, size: int) -> tuple[tuple[np.ndarray, ...], np.ndarray]:
    """(target, mask, hidden), each (S, m, n), shared ones as views that repeat nothing; 1/N of both means (S, 2)."""
    if isinstance(problem, MatrixCompletion):
        shown = problem.weights > 0
        mask, hidden = (shown[..., which, :, :].to(torch.float32) for which in (0, 1))
        scales = problem.weights.to(torch.float64).amax((-2, -1)).expand(size, 2)
    else:
        mask = hidden = torch.ones(problem.shape, dtype=torch.float32, device="cpu")
        scales = torch.full((size, 2), 1 / mask.numel(), dtype=torch.float64, device="cpu")
    entries = (problem.target, mask, hidden)
    return tuple(entry.contiguous().expand(size, *problem.shape).numpy() for entry in entries), scales.numpy()


def _per_problem(rate: Rate, size: int) -> np.ndarray:
    return torch.as_tensor(rate, dtype=torch.float64, device="cpu").reshape(-1).expand(size).numpy()


def _scratch(stack: list[Tensor]) -> tuple[tuple, tuple, tuple]:
    """Buffers of one worker: prefixes and backs (w_l, n), gradients as the factors."""
    columns, rows = stack[0].shape[-1], [factor.shape[-2] for factor in stack]
    dtype = stack[0].numpy().dtype
    prefixes = tuple(np.empty((row, columns), dtype) for row in rows)
    backs = (*(np.empty((row, columns), dtype) for row in rows[:-1]), prefixes[-1])
    return prefixes, backs, tuple(np.empty(factor.shape[1:], dtype) for factor in stack)
