"""Dropout by hash (hash.py) as one Triton kernel."""

# Triton's compiler reads the kernels; Python does not run them.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit
def _mix(x):
    """lowbias32 on signed words, right shifts made unsigned by masks; see hash.py."""
    x = (x ^ ((x >> 16) & 0xFFFF)) * 0x7FEB352D
    x = (x ^ ((x >> 15) & 0x1FFFF)) * -2073254261
    return x ^ ((x >> 16) & 0xFFFF)


@triton.jit
def dropped(
    x, out, seeds, step, numbers, place, threshold, lines, rows, d1, d2, d3, last,
    A0: tl.constexpr, A1: tl.constexpr, A2: tl.constexpr, A3: tl.constexpr, A4: tl.constexpr,
    KIND: tl.constexpr, BL: tl.constexpr, BC: tl.constexpr, AXIS: tl.constexpr, NUMBERED: tl.constexpr,
):  # fmt: skip
    """out <- x / P(keep) where kept, else 0; x (S * rows, d1, d2, d3, last), of which the last axis is number AXIS.

    seeds (S,); numbers (S * rows,) of the rows, if NUMBERED; lines = S * rows * d1 * d2 * d3, BL of them a program:
    only they need divisions.
    """
    line = tl.program_id(0) * BL + tl.arange(0, BL)
    rest = line
    i3 = rest % d3
    rest = rest // d3
    i2 = rest % d2
    rest = rest // d2
    i1 = rest % d1
    row = rest // d1
    seed = tl.load(seeds + row // rows, mask=line < lines, other=0)
    word = _mix(_mix(seed + place * A3) + tl.load(step).to(tl.int32) * A4)
    number = tl.load(numbers + row, mask=line < lines, other=0) if NUMBERED else row % rows
    word += number * A0 + i1 * A1 + i2 * A2 + i3 * A3
    column = tl.arange(0, BC)
    along = A1 if AXIS == 1 else A2 if AXIS == 2 else A3 if AXIS == 3 else A4
    keep = (_mix(word[:, None] + column[None, :] * along) & 0x7FFFFFFF) >= threshold
    inside = (line < lines)[:, None] & (column < last)[None, :]
    at = line.to(tl.int64)[:, None] * last + column[None, :]
    value = tl.load(x + at, mask=inside, other=0.0).to(KIND)
    two31 = tl.full((), 1, tl.int64) << 31
    scale = two31.to(KIND) / (two31 - threshold).to(KIND)
    tl.store(out + at, tl.where(keep, value * scale, 0.0).to(out.dtype.element_ty), mask=inside)


class Dropped(torch.autograd.Function):
    """Dropout whose backward pass makes the mask again instead of keeping it."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        seeds: Tensor,
        step: Tensor,
        numbers: Tensor | None,
        place: int,
        threshold: int,
        axes: tuple,
    ) -> Tensor:
        """Return x (S * B, ...) with dropped elements at 0; step () must stay as it is until the backward pass."""
        ctx.save_for_backward(seeds, step, numbers)
        ctx.rest = place, threshold, axes
        return _launch(x, seeds, step, numbers, place, threshold, axes)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """The same mask on the gradient."""
        return _launch(grad, *ctx.saved_tensors, *ctx.rest), *[None] * 6


def _launch(
    x: Tensor, seeds: Tensor, step: Tensor, numbers: Tensor | None, place: int, threshold: int, axes: tuple
) -> Tensor:
    x = x.contiguous()
    out = torch.empty_like(x)
    *lead, last = x.shape[1:]
    columns = triton.next_power_of_2(last)
    each, lines = max(1, 2 * BLOCK // columns), x.numel() // last
    kind = tl.float64 if x.dtype is torch.float64 else tl.float32
    dropped[(triton.cdiv(lines, each),)](
        x, out, seeds, step, seeds if numbers is None else numbers, place, threshold, lines, len(x) // len(seeds),
        *lead, *[1] * (3 - len(lead)), last, *axes,
        KIND=kind, BL=each, BC=columns, AXIS=x.dim() - 1, NUMBERED=numbers is not None,
    )  # fmt: skip
    return out
