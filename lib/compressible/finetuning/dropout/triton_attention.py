"""Attention with dropout by hash (hash.py) as one Triton kernel forwards and one backwards.

A program holds all weights of one head of one row, so that they never reach memory. The backward pass makes the weights
and the mask again from its inputs: nothing but these is kept.
"""

# Triton's compiler reads the kernels; Python does not run them.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from compressible.finetuning.dropout.hash import AXES
from compressible.finetuning.dropout.triton_dropout import _mix
from compressible.runtime.devices import interpreted

INTERPRETED = tl.constexpr(interpreted())


@triton.jit
def _dot(a, b):
    if INTERPRETED:  # it would multiply the words of bfloat16 as integers
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="tf32")


@triton.jit
def _load(x, at, lines, size, BT: tl.constexpr, BD: tl.constexpr):
    """A tile (BT, BD) of lines `at` apart, 0 beyond (lines, size)."""
    line, column = tl.arange(0, BT)[:, None], tl.arange(0, BD)[None, :]
    return tl.load(x + line * at + column, mask=(line < lines) & (column < size), other=0.0)


@triton.jit
def _store(x, tile, at, lines, size, BT: tl.constexpr, BD: tl.constexpr):
    line, column = tl.arange(0, BT)[:, None], tl.arange(0, BD)[None, :]
    tl.store(x + line * at + column, tile.to(x.dtype.element_ty), mask=(line < lines) & (column < size))


@triton.jit
def _weights(
    q, k, mask, m_query, m_key, scale, queries, keys,
    MASK: tl.constexpr, LINE: tl.constexpr, CAUSAL: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Softmax (BQ, BK) of the masked scores: 0 in padded columns; no mask makes NaN of padded rows only."""
    i, j = tl.arange(0, BQ)[:, None], tl.arange(0, BK)[None, :]
    scores = _dot(q, tl.trans(k)) * scale
    if LINE:  # one line for all queries
        at, inside = j * m_key, j < keys
    else:
        at, inside = i * m_query + j * m_key, (i < queries) & (j < keys)
    if MASK == "bool":
        scores = tl.where(tl.load(mask + at, mask=inside, other=1) != 0, scores, float("-inf"))
    elif MASK == "float":
        scores += tl.load(mask + at, mask=inside, other=0.0).to(tl.float32)
    if CAUSAL:
        scores = tl.where(j <= i, scores, float("-inf"))
    scores = tl.where(j < keys, scores, float("-inf"))
    powers = tl.exp(scores - tl.max(scores, 1)[:, None])
    return powers * (1.0 / tl.sum(powers, 1))[:, None]


@triton.jit
def _kept(
    seeds, step, numbers, place, threshold, row, rows, head,
    A0: tl.constexpr, A1: tl.constexpr, A2: tl.constexpr, A3: tl.constexpr, A4: tl.constexpr,
    NUMBERED: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """The mask (BQ, BK) of one head; the hash of `dropped`."""
    word = _mix(_mix(tl.load(seeds + row // rows) + place * A3) + tl.load(step).to(tl.int32) * A4)
    number = tl.load(numbers + row) if NUMBERED else row % rows
    word += number * A0 + head * A1
    words = word + tl.arange(0, BQ)[:, None] * A2 + tl.arange(0, BK)[None, :] * A3
    return (_mix(words) & 0x7FFFFFFF) >= threshold


@triton.jit(do_not_specialize=["place", "threshold"])
def attend(
    q, q_row, q_head, q_at, k, k_row, k_head, k_at, v, v_row, v_head, v_at, mask, m_row, m_head, m_query, m_key,
    seeds, step, numbers, place, threshold, grown, scale, rows, heads, queries, keys, size, out,
    A0: tl.constexpr, A1: tl.constexpr, A2: tl.constexpr, A3: tl.constexpr, A4: tl.constexpr,
    MASK: tl.constexpr, LINE: tl.constexpr, CAUSAL: tl.constexpr, NUMBERED: tl.constexpr,
    BQ: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """out (S * rows, queries, heads, size) <- dropped attention; q, k, v (S * rows, heads, ., size) by their strides.

    Grid (S * rows * heads,). seeds (S,); numbers (S * rows,) of the rows, if NUMBERED; MASK is "", "bool" or "float";
    what is kept grows by the factor `grown`.
    """
    row, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    wide = row.to(tl.int64)
    query = _load(q + wide * q_row + head * q_head, q_at, queries, size, BQ, BD)
    key = _load(k + wide * k_row + head * k_head, k_at, keys, size, BK, BD)
    value = _load(v + wide * v_row + head * v_head, v_at, keys, size, BK, BD)
    mask += wide * m_row + head * m_head
    p = _weights(query, key, mask, m_query, m_key, scale, queries, keys, MASK, LINE, CAUSAL, BQ, BK)
    keep = _kept(seeds, step, numbers, place, threshold, row, rows, head, A0, A1, A2, A3, A4, NUMBERED, BQ, BK)
    tile = _dot(tl.where(keep, p * grown, 0.0).to(value.dtype), value)
    _store(out + (wide * queries * heads + head) * size, tile, heads * size, queries, size, BQ, BD)


@triton.jit(do_not_specialize=["place", "threshold"])
def attend_backward(
    q, q_row, q_head, q_at, k, k_row, k_head, k_at, v, v_row, v_head, v_at, mask, m_row, m_head, m_query, m_key,
    seeds, step, numbers, place, threshold, grown, scale, rows, heads, queries, keys, size,
    g, g_row, g_head, g_at, dq, dk, dv,
    A0: tl.constexpr, A1: tl.constexpr, A2: tl.constexpr, A3: tl.constexpr, A4: tl.constexpr,
    MASK: tl.constexpr, LINE: tl.constexpr, CAUSAL: tl.constexpr, NUMBERED: tl.constexpr,
    BQ: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """dq, dk, dv (S * rows, ., heads, size) <- gradients, given that g by the output; the rest as `attend`."""
    row, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    wide = row.to(tl.int64)
    query = _load(q + wide * q_row + head * q_head, q_at, queries, size, BQ, BD)
    key = _load(k + wide * k_row + head * k_head, k_at, keys, size, BK, BD)
    grad = _load(g + wide * g_row + head * g_head, g_at, queries, size, BQ, BD)
    value = _load(v + wide * v_row + head * v_head, v_at, keys, size, BK, BD)
    mask += wide * m_row + head * m_head
    p = _weights(query, key, mask, m_query, m_key, scale, queries, keys, MASK, LINE, CAUSAL, BQ, BK)
    keep = _kept(seeds, step, numbers, place, threshold, row, rows, head, A0, A1, A2, A3, A4, NUMBERED, BQ, BK)
    dropped = tl.where(keep, p * grown, 0.0).to(grad.dtype)
    from_query, from_key = (wide * queries * heads + head) * size, (wide * keys * heads + head) * size
    tile = _dot(tl.trans(dropped), grad)
    _store(dv + from_key, tile, heads * size, keys, size, BK, BD)
    dp = tl.where(keep, _dot(grad, tl.trans(value)) * grown, 0.0)
    ds = (p * (dp - tl.sum(p * dp, 1)[:, None]) * scale).to(query.dtype)
    tile = _dot(tl.trans(ds), query)
    _store(dk + from_key, tile, heads * size, keys, size, BK, BD)
    tile = _dot(ds, key)
    _store(dq + from_query, tile, heads * size, queries, size, BQ, BD)


@torch.library.custom_op("compressible::dropped_attention", mutates_args=())
def dropped_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, seeds: Tensor, step: Tensor,
    numbers: Tensor | None, place: int, threshold: int, scale: float, causal: bool,
) -> Tensor:  # fmt: skip
    """Attention (S * B, H, T, D), in memory (S * B, T, H, D); step () must stay as it is until the backward pass."""
    out = _fresh(query)
    inputs, options = _inputs(query, key, value, mask, seeds, step, numbers, place, threshold, scale, causal)
    attend[(len(query) * query.shape[1],)](*inputs, out, *AXES, **options)
    return out


@torch.library.custom_op("compressible::dropped_attention_backward", mutates_args=())
def dropped_attention_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, seeds: Tensor, step: Tensor,
    numbers: Tensor | None, place: int, threshold: int, scale: float, causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients by query, key and value, in memory as the output is."""
    outs = _fresh(query), _fresh(key), _fresh(value)
    inputs, options = _inputs(query, key, value, mask, seeds, step, numbers, place, threshold, scale, causal)
    attend_backward[(len(query) * query.shape[1],)](*inputs, *_strided(grad), *outs, *AXES, **options)
    return outs


@dropped_attention.register_fake
def _(query: Tensor, *rest: Any) -> Tensor:
    return _fresh(query)


@dropped_attention_backward.register_fake
def _(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _fresh(query), _fresh(key), _fresh(value)


def _keep_inputs(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:7])
    ctx.rest = inputs[7:]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return *dropped_attention_backward(grad, *ctx.saved_tensors, *ctx.rest), *[None] * 8


@register_flop_formula(torch.ops.compressible.dropped_attention)
def _(query: Sequence[int], key: Sequence[int], *_: Any, **__: Any) -> int:
    return 4 * math.prod(query) * key[2]


@register_flop_formula(torch.ops.compressible.dropped_attention_backward)
def _(grad: Sequence[int], query: Sequence[int], key: Sequence[int], *_: Any, **__: Any) -> int:
    return 10 * math.prod(query) * key[2]  # the weights are made again


dropped_attention.register_autograd(_backward, setup_context=_keep_inputs)


def _fresh(like: Tensor) -> Tensor:
    """Memory (R, T, H, D) for a tensor (R, H, T, D): models put the heads side by side next, which then is no copy."""
    _, heads, length, size = like.shape
    return like.new_empty_strided(like.shape, (length * heads * size, size, heads * size, 1))


def _strided(x: Tensor) -> tuple[Tensor, int, int, int]:
    x = x if x.stride(-1) == 1 else x.contiguous()
    row, head, line = x.stride()[:3]
    return x, row, head, line


def _inputs(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, seeds: Tensor, step: Tensor,
    numbers: Tensor | None, place: int, threshold: int, scale: float, causal: bool,
) -> tuple[tuple, dict[str, Any]]:  # fmt: skip
    """What both kernels take first, and their options."""
    (rows, heads, queries, size), keys = query.shape, key.shape[2]
    seen, kind = query, ""
    if mask is not None:
        kind = "bool" if mask.dtype is torch.bool else "float"
        seen = (mask.view(torch.uint8) if kind == "bool" else mask).expand(rows, heads, queries, keys)
    tensors = *_strided(query), *_strided(key), *_strided(value), seen, *seen.stride()
    drawn = seeds, step, seeds if numbers is None else numbers, place, threshold, 2**31 / (2**31 - threshold)
    inputs = *tensors, *drawn, scale, rows // len(seeds), heads, queries, keys, size
    edges = {name: max(16, triton.next_power_of_2(n)) for name, n in (("BQ", queries), ("BK", keys), ("BD", size))}
    options = {"MASK": kind, "LINE": seen.stride(2) == 0, "CAUSAL": causal, "NUMBERED": numbers is not None}
    warps = 8 if max(queries, keys) > 64 else 4  # four hold 64 x 64 in registers
    return inputs, edges | options | {"num_warps": warps}
