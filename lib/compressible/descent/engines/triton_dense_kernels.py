"""Triton kernels behind the CUDA engines of entrywise problems with narrow factors.

Shapes: S problems, W_1 (k, n), inner W_l (k, k), W_L (m, k); tiles of BM x BN entries, k padded to BK.
`seen` and `unseen` (S, m, n) hold the targets that count for the loss and for the error, NaN elsewhere; 1/N of the loss
is folded into the rates. X = W_L ... W_1 and the residual exist only tile by tile, never in memory.
`stretch` runs whole stretches of descent, one program a problem. `residual_tiles` and `update_tiles` are one step
spread over the chip: partial products are summed by the next kernel, in a fixed order, so that runs repeat.
A kernel is one long function: what lives in registers cannot be handed to another without going through memory.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _dot(a, b, PRECISION: tl.constexpr):
    return tl.dot(a, b, input_precision=PRECISION, out_dtype=a.dtype)


@triton.jit
def _residual(x, target):
    return tl.where(target == target, x - target, 0.0)  # zero where the target is NaN


@triton.jit
def _squares(x, target):
    e = _residual(x, target).to(tl.float64)
    return e * e


@triton.jit
def _tile(pointer, rows, columns, height, width):
    inside = (rows < height)[:, None] & (columns < width)[None, :]
    return tl.load(pointer + rows[:, None] * width + columns[None, :], mask=inside, other=0)


@triton.jit
def _targets(pointer, rows, columns, height, width):
    inside = (rows < height)[:, None] & (columns < width)[None, :]
    return tl.load(pointer + rows[:, None] * width + columns[None, :], mask=inside, other=float("nan"))


@triton.jit
def _put(pointer, rows, columns, height, width, values):
    inside = (rows < height)[:, None] & (columns < width)[None, :]
    tl.store(pointer + rows[:, None] * width + columns[None, :], values, mask=inside)


@triton.jit
def _rise(v2, v3, v4, w, DEPTH: tl.constexpr, PRECISION: tl.constexpr):
    """W_2 W, W_3 W_2 W, ... for a tile of columns of W_1, the last that exists repeated."""
    p2 = w
    if DEPTH >= 3:
        p2 = _dot(v2, w, PRECISION)
    p3 = p2
    if DEPTH >= 4:
        p3 = _dot(v3, p2, PRECISION)
    p4 = p3
    if DEPTH >= 5:
        p4 = _dot(v4, p3, PRECISION)
    return p2, p3, p4


@triton.jit
def _raise_all(first, tops, v2, v3, v4, rk, rn, n, k, DEPTH: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr):
    for column in range(0, n, BN):
        columns = column + rn
        _p2, _p3, top = _rise(v2, v3, v4, _tile(first, rk, columns, k, n), DEPTH, PRECISION)
        _put(tops, rk, columns, k, n, top)
    tl.debug_barrier()


@triton.jit
def stretch(
    first, inner, last, back, tops, seen, unseen, scales, rates, shrinks, lengths, curves, taken, alive, count,
    tolerance, stride, m, n, k,
    DEPTH: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`count` stretches of `lengths` steps of one problem, a record after each, until its loss is below `tolerance`.

    first (S, k, n), inner (S, DEPTH - 2, k, k), last (S, m, k) are updated in place, back and tops (S, k, n) are
    scratch; all small enough for the first-level cache. rates and shrinks (S, DEPTH); scales (S, 2); curves
    (S, count, 2) receive loss and error, taken (S,) the number of records, alive (S,) whether to go on; `stride` is
    m n, or 0 where all problems share their targets. tolerance () lies on the device: Triton rounds numbers that are
    passed by value to float32.
    """
    problem = tl.program_id(0).to(tl.int64)
    rk, rn, rm = tl.arange(0, BK), tl.arange(0, BN), tl.arange(0, BM)
    first, last = first + problem * k * n, last + problem * m * k
    back, tops = back + problem * k * n, tops + problem * k * n
    inner += problem * (DEPTH - 2) * k * k
    seen, unseen = seen + problem * stride, unseen + problem * stride
    rates, shrinks = rates + problem * DEPTH, shrinks + problem * DEPTH
    v2 = _tile(inner, rk, rk, k, k if DEPTH >= 3 else 0)
    v3 = _tile(inner + k * k, rk, rk, k, k if DEPTH >= 4 else 0)
    v4 = _tile(inner + 2 * k * k, rk, rk, k, k if DEPTH >= 5 else 0)
    r = 0
    going = (count > 0) & (tl.load(alive + problem) > 0)
    _raise_all(first, tops, v2, v3, v4, rk, rn, n, k, DEPTH, BN, PRECISION)
    while going:
        for _step in range(tl.load(lengths + r)):
            for row in range(0, m, BM):
                rows = row + rm
                u = _tile(last, rows, rk, m, k)
                g = tl.zeros_like(u)
                for column in range(0, n, BN):
                    columns = column + rn
                    top = _tile(tops, rk, columns, k, n)
                    e = _residual(_dot(u, top, PRECISION), _targets(seen, rows, columns, m, n))
                    g += _dot(e, tl.trans(top), PRECISION)
                    share = _dot(tl.trans(u), e, PRECISION)
                    if row > 0:
                        share += _tile(back, rk, columns, k, n)
                    _put(back, rk, columns, k, n, share)
                _put(last, rows, rk, m, k, tl.load(shrinks + DEPTH - 1) * u - tl.load(rates + DEPTH - 1) * g)
                tl.debug_barrier()  # what goes through memory is read back by other threads
            g2, g3, g4 = tl.zeros_like(v2), tl.zeros_like(v2), tl.zeros_like(v2)
            for column in range(0, n, BN):
                columns = column + rn
                w = _tile(first, rk, columns, k, n)
                p2, p3, _p4 = _rise(v2, v3, v4, w, DEPTH, PRECISION)
                b = _tile(back, rk, columns, k, n)
                if DEPTH >= 5:
                    g4 += _dot(b, tl.trans(p3), PRECISION)
                    b = _dot(tl.trans(v4), b, PRECISION)
                if DEPTH >= 4:
                    g3 += _dot(b, tl.trans(p2), PRECISION)
                    b = _dot(tl.trans(v3), b, PRECISION)
                if DEPTH >= 3:
                    g2 += _dot(b, tl.trans(w), PRECISION)
                    b = _dot(tl.trans(v2), b, PRECISION)
                _put(first, rk, columns, k, n, tl.load(shrinks) * w - tl.load(rates) * b)
            if DEPTH >= 3:
                v2 = tl.load(shrinks + 1) * v2 - tl.load(rates + 1) * g2
            if DEPTH >= 4:
                v3 = tl.load(shrinks + 2) * v3 - tl.load(rates + 2) * g3
            if DEPTH >= 5:
                v4 = tl.load(shrinks + 3) * v4 - tl.load(rates + 3) * g4
            tl.debug_barrier()
            _raise_all(first, tops, v2, v3, v4, rk, rn, n, k, DEPTH, BN, PRECISION)
        loss = tl.zeros((BN,), tl.float64)
        error = tl.zeros((BN,), tl.float64)
        for row in range(0, m, BM):
            rows = row + rm
            u = _tile(last, rows, rk, m, k)
            for column in range(0, n, BN):
                columns = column + rn
                x = _dot(u, _tile(tops, rk, columns, k, n), PRECISION)
                loss += tl.sum(_squares(x, _targets(seen, rows, columns, m, n)), 0)
                error += tl.sum(_squares(x, _targets(unseen, rows, columns, m, n)), 0)
        now = tl.sum(loss, 0) * tl.load(scales + 2 * problem) / 2
        at = curves + (problem * count + r) * 2
        tl.store(at, now)
        tl.store(at + 1, tl.sum(error, 0) * tl.load(scales + 2 * problem + 1) / 2)
        r += 1
        goes_on = (now >= tl.load(tolerance)) & (now < float("inf"))  # false for NaN, too
        tl.store(alive + problem, goes_on.to(tl.int32))
        going = (r < count) & goes_on
    tl.store(taken + problem, r)
    if DEPTH >= 3:
        _put(inner, rk, rk, k, k, v2)
    if DEPTH >= 4:
        _put(inner + k * k, rk, rk, k, k, v3)
    if DEPTH >= 5:
        _put(inner + 2 * k * k, rk, rk, k, k, v4)


@triton.jit
def _settled(inner, partial, rate, shrink, rk, k, parts):
    """W_l with the step that `update_tiles` left as partial gradients (parts, k, k)."""
    v = _tile(inner, rk, rk, k, k)
    g = tl.zeros_like(v)
    for part in range(parts):
        g += _tile(partial + part * k * k, rk, rk, k, k)
    return tl.load(shrink) * v - tl.load(rate) * g


@triton.jit
def residual_tiles(
    first, inner, settled, inner_parts, last, seen, unseen, rates, shrinks, back_parts, last_parts, sums, alive, stride,
    m, n, k,
    DEPTH: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
    MEASURE: tl.constexpr,
):  # fmt: skip
    """One tile of E = Omega * (X - Phi): its share of W_L^T E and of E (W_{L-1}...W_1)^T, or of loss and error.

    Grid (row tiles R, column tiles C, S). back_parts (S, R, k, n), last_parts (S, C, m, k), sums (S, R, C, 2) float64,
    inner_parts (S, DEPTH - 2, C, k, k) from the step before; `settled` receives the inner factors after that step.
    """
    row, column, problem = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    if tl.load(alive + problem) == 0:
        return
    parts = tl.num_programs(1)
    rk, columns, rows = tl.arange(0, BK), column * BN + tl.arange(0, BN), row * BM + tl.arange(0, BM)
    square = k * k
    base = problem * (DEPTH - 2)
    top = _tile(first + problem * k * n, rk, columns, k, n)
    for layer in tl.static_range(DEPTH - 2):
        at = base + layer
        rate = problem * DEPTH + layer + 1
        v = _settled(inner + at * square, inner_parts + at * parts * square, rates + rate, shrinks + rate, rk, k, parts)
        if (row == 0) & (column == 0):
            _put(settled + at * square, rk, rk, k, k, v)
        top = _dot(v, top, PRECISION)
    u = _tile(last + problem * m * k, rows, rk, m, k)
    entries = problem * stride
    x = _dot(u, top, PRECISION)
    target = _targets(seen + entries, rows, columns, m, n)
    if MEASURE:
        at = sums + ((problem * tl.num_programs(0) + row) * parts + column) * 2
        tl.store(at, tl.sum(_squares(x, target)))
        tl.store(at + 1, tl.sum(_squares(x, _targets(unseen + entries, rows, columns, m, n))))
    else:
        e = _residual(x, target)
        back = back_parts + (problem * tl.num_programs(0) + row) * k * n
        _put(back, rk, columns, k, n, _dot(tl.trans(u), e, PRECISION))
        _put(last_parts + (problem * parts + column) * m * k, rows, rk, m, k, _dot(e, tl.trans(top), PRECISION))


@triton.jit
def update_tiles(
    first, inner, settled, inner_parts, last, rates, shrinks, owed_rates, owed_shrinks, back_parts, last_parts, alive,
    row_tiles, column_tiles, m, n, k,
    DEPTH: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sum the shares and step: W_1 by tiles of BN columns, W_L by tiles of BM rows; inner gradients as shares again.

    Grid (ceil(n / BN) + ceil(m / BM), S). The step that the inner factors are now owed is left for `residual_tiles`.
    """
    part, problem = tl.program_id(0), tl.program_id(1).to(tl.int64)
    if tl.load(alive + problem) == 0:
        return
    rk = tl.arange(0, BK)
    rates, shrinks = rates + problem * DEPTH, shrinks + problem * DEPTH
    width = tl.cdiv(n, BN)
    if part >= width:
        rows = (part - width) * BM + tl.arange(0, BM)
        g = tl.zeros((BM, BK), last.dtype.element_ty)
        for column in range(column_tiles):
            g += _tile(last_parts + (problem * column_tiles + column) * m * k, rows, rk, m, k)
        u = _tile(last + problem * m * k, rows, rk, m, k)
        u = tl.load(shrinks + DEPTH - 1) * u - tl.load(rates + DEPTH - 1) * g
        _put(last + problem * m * k, rows, rk, m, k, u)
    else:
        columns = part * BN + tl.arange(0, BN)
        first += problem * k * n
        settled += problem * (DEPTH - 2) * k * k
        inner += problem * (DEPTH - 2) * k * k
        inner_parts += problem * (DEPTH - 2) * width * k * k + part * k * k
        back = tl.zeros((BK, BN), first.dtype.element_ty)
        for row in range(row_tiles):
            back += _tile(back_parts + (problem * row_tiles + row) * k * n, rk, columns, k, n)
        w1 = _tile(first, rk, columns, k, n)
        if part == 0:
            for layer in tl.static_range(DEPTH - 2):
                _put(inner + layer * k * k, rk, rk, k, k, _tile(settled + layer * k * k, rk, rk, k, k))
                at = problem * DEPTH + layer + 1
                tl.store(owed_rates + at, tl.load(rates + layer + 1))
                tl.store(owed_shrinks + at, tl.load(shrinks + layer + 1))
        if DEPTH >= 3:
            v2 = _tile(settled, rk, rk, k, k)
        if DEPTH >= 4:
            v3 = _tile(settled + k * k, rk, rk, k, k)
            p2 = _dot(v2, w1, PRECISION)
        if DEPTH >= 5:
            v4 = _tile(settled + 2 * k * k, rk, rk, k, k)
            p3 = _dot(v3, p2, PRECISION)
            _put(inner_parts + 2 * width * k * k, rk, rk, k, k, _dot(back, tl.trans(p3), PRECISION))
            back = _dot(tl.trans(v4), back, PRECISION)
        if DEPTH >= 4:
            _put(inner_parts + width * k * k, rk, rk, k, k, _dot(back, tl.trans(p2), PRECISION))
            back = _dot(tl.trans(v3), back, PRECISION)
        if DEPTH >= 3:
            _put(inner_parts, rk, rk, k, k, _dot(back, tl.trans(w1), PRECISION))
            back = _dot(tl.trans(v2), back, PRECISION)
        _put(first, rk, columns, k, n, tl.load(shrinks) * w1 - tl.load(rates) * back)


@triton.jit
def take_record(sums, scales, curves, taken, alive, tolerance, tiles, BLOCK: tl.constexpr):
    """Add up the tiles' (S, tiles, 2) `sums` of one problem into its next record, and stop it below `tolerance`.

    Grid (S,). curves (records, S, 2); taken, alive (S,) and tolerance () are on the device, so that graphs may replay.
    """
    problem = tl.program_id(0).to(tl.int64)
    if tl.load(alive + problem) == 0:
        return
    loss = tl.zeros((BLOCK,), tl.float64)
    error = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, tiles, BLOCK):
        at = start + tl.arange(0, BLOCK)
        loss += tl.load(sums + (problem * tiles + at) * 2, mask=at < tiles, other=0.0)
        error += tl.load(sums + (problem * tiles + at) * 2 + 1, mask=at < tiles, other=0.0)
    now = tl.sum(loss, 0) * tl.load(scales + 2 * problem) / 2
    r = tl.load(taken + problem)
    at = curves + (r.to(tl.int64) * tl.num_programs(0) + problem) * 2
    tl.store(at, now)
    tl.store(at + 1, tl.sum(error, 0) * tl.load(scales + 2 * problem + 1) / 2)
    tl.store(taken + problem, r + 1)
    tl.store(alive + problem, ((now >= tl.load(tolerance)) & (now < float("inf"))).to(tl.int32))
