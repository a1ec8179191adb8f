"""The Triton kernel of sparse completion: one line of the matrix a program."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def line_pass(
    pointers, indices, values, own, other, out, sums, scales, k,
    BK: tl.constexpr, BE: tl.constexpr, MEASURE: tl.constexpr,
):  # fmt: skip
    """One line: out <- shrink own - rate sum_j e_j other_j, e_j = <own, other_j> - t_j, scales = (shrink, rate).

    Grid (lines,). own and out (lines, k), other (N', k); with MEASURE the sum of e_j^2 goes to sums (lines,) instead.
    """
    line = tl.program_id(0).to(tl.int64)
    rk, re = tl.arange(0, BK), tl.arange(0, BE)
    mine = tl.load(own + line * k + rk, mask=rk < k, other=0.0)
    total = tl.zeros_like(mine)
    squares = tl.zeros((BE,), tl.float64)
    end = tl.load(pointers + line + 1)
    for start in range(tl.load(pointers + line), end, BE):
        at = start + re
        far = tl.load(indices + at, mask=at < end, other=0).to(tl.int64)
        inside = (at < end)[:, None] & (rk < k)[None, :]
        theirs = tl.load(other + far[:, None] * k + rk[None, :], mask=inside, other=0.0)
        e = tl.sum(theirs * mine[None, :], 1) - tl.load(values + at, mask=at < end, other=0.0)
        squares += (e * e).to(tl.float64)
        total += tl.sum(theirs * e[:, None], 0)
    if MEASURE:
        tl.store(sums + line, tl.sum(squares, 0))
    else:
        updated = tl.load(scales) * mine - tl.load(scales + 1) * total
        tl.store(out + line * k + rk, updated, mask=rk < k)
