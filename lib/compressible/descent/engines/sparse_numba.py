"""Sparse completion on the CPU: lines compiled by numba and spread over the cores.

`_pass` is one long function: its row of numbers stays in registers.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from compressible.descent.engines.cores import compiled, cores, pool
from compressible.descent.engines.sparse_lines import Scales, SparseLines
from compressible.recovery.sparse import Side


class SparseNumba(SparseLines):
    """`SparseLines` with as many entries for each core."""

    name = "sparse_numba"

    def _update(self, side: Side, own: Tensor, other: Tensor, out: Tensor, scales: Scales) -> None:
        _spread(side, own, other, out, np.empty(0), scales, measure=False)

    def _measure(self, side: Side, own: Tensor, other: Tensor, sums: Tensor) -> None:
        _spread(side, own, other, own, sums.numpy(), (0.0, 0.0), measure=True)


def _spread(
    side: Side, own: Tensor, other: Tensor, out: Tensor, sums: np.ndarray, scales: Scales, measure: bool
) -> None:
    """Do one pass, each core a stretch of lines."""
    arrays = [part.numpy() for part in (side.pointers, side.indices, side.values, own, other, out)]
    parts = cores()
    bounds = np.searchsorted(arrays[0], np.linspace(0, arrays[0][-1], parts + 1)[1:-1])
    edges = [0, *bounds.tolist(), len(arrays[0]) - 1]

    def work(part: int) -> None:
        _pass(*arrays, sums, *scales, measure, edges[part], edges[part + 1])

    if parts == 1:
        work(0)
    else:
        list(pool().map(work, range(parts)))


@compiled
def _pass(
    pointers: np.ndarray,
    indices: np.ndarray,
    values: np.ndarray,
    own: np.ndarray,
    other: np.ndarray,
    out: np.ndarray,
    sums: np.ndarray,
    shrink: float,
    rate: float,
    measure: bool,
    begin: int,
    end: int,
) -> None:
    """Lines `begin` to `end`, two entries at a time: their sums hide each other's latency."""
    width = own.shape[1]
    mine, total = np.empty(width, own.dtype), np.empty(width, own.dtype)
    for line in range(begin, end):
        for c in range(width):
            mine[c], total[c] = own[line, c], 0
        squares = 0.0
        at, stop = pointers[line], pointers[line + 1]
        while at + 1 < stop:
            far, next_far = indices[at], indices[at + 1]
            residual, next_residual = -values[at], -values[at + 1]
            for c in range(width):
                residual += mine[c] * other[far, c]
                next_residual += mine[c] * other[next_far, c]
            squares += residual * residual + next_residual * next_residual
            for c in range(width):
                total[c] += residual * other[far, c] + next_residual * other[next_far, c]
            at += 2
        if at < stop:
            far, residual = indices[at], -values[at]
            for c in range(width):
                residual += mine[c] * other[far, c]
            squares += residual * residual
            for c in range(width):
                total[c] += residual * other[far, c]
        if measure:
            sums[line] = squares
        else:
            for c in range(width):
                out[line, c] = shrink * mine[c] - rate * total[c]
