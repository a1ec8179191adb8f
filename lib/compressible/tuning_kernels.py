"""Triton kernels of fine-tuning on a GPU: dropout of many runs and AdamW's update, one kernel each.

Written in plain PyTorch, which streams.py and stacked_adam.py keep as the reference, a mask takes some thirty kernels
over whole activations and is kept for the way back. Here it is drawn in registers, and again on the way back.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ELEMENTS = 1024  # of a program
LARGEST = 2**31 - ELEMENTS  # elements that 32-bit offsets reach


@triton.jit
def _mix(x):
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def drop(
    source, out, seeds, step, place, rows, columns, run_rows, middle, inner, threshold, scale,
    A0: tl.constexpr, A1: tl.constexpr, A2: tl.constexpr, ACROSS: tl.constexpr, A3: tl.constexpr, A4: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Zero the elements (rows, columns) that streams.py's hash drops, and multiply the others by `scale`.

    A run has `run_rows` rows, an example `middle`, of which `inner` share their place on axis 1. A0 to A4 are the words
    of the axes, ACROSS that of the columns; grid (row blocks, column blocks).
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = row < rows
    seed = tl.load(seeds + row // run_rows, mask=inside, other=0).to(tl.uint32, bitcast=True)
    when = tl.load(step).to(tl.int32).to(tl.uint32, bitcast=True)
    where = (tl.zeros((ROWS,), tl.int32) + place).to(tl.uint32, bitcast=True)
    word = _mix(_mix(seed + where * A3) + when * A4)
    example = (row % run_rows) // middle
    word += example.to(tl.uint32, bitcast=True) * A0
    word += ((row % middle) // inner).to(tl.uint32, bitcast=True) * A1
    word += (row % inner).to(tl.uint32, bitcast=True) * A2
    words = word[:, None] + column.to(tl.uint32, bitcast=True)[None, :] * ACROSS
    kept = (_mix(words) & 0x7FFFFFFF) >= threshold.to(tl.uint32)
    at = row[:, None] * columns + column[None, :]
    there = inside[:, None] & (column < columns)[None, :]
    x = tl.load(source + at, mask=there, other=0.0)
    tl.store(out + at, tl.where(kept, x.to(tl.float32) * scale, 0.0).to(x.dtype), mask=there)


@triton.jit
def adamw(
    values, gradients, means, squares, rates, root, size, count,
    FIRST: tl.constexpr, SECOND: tl.constexpr, EPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One step on flat vectors; root () and size () on the device are sqrt(1 - b2^t) and factor / (1 - b1^t)."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    g = tl.load(gradients + at, mask=inside, other=0.0)
    mean = tl.load(means + at, mask=inside, other=0.0)
    square = tl.load(squares + at, mask=inside, other=0.0)
    mean = mean + (1 - FIRST) * (g - mean)
    square = SECOND * square + (1 - SECOND) * g * g
    change = mean / (tl.sqrt(square) / tl.load(root) + EPS)
    value = tl.load(values + at, mask=inside, other=0.0)
    value -= change * tl.load(rates + at, mask=inside, other=0.0) * tl.load(size)
    tl.store(means + at, mean, mask=inside)
    tl.store(squares + at, square, mask=inside)
    tl.store(values + at, value, mask=inside)


class Drop(torch.autograd.Function):
    """Dropout of (S * B, ...), up to four axes, from the streams of S runs; the mask is drawn again on the way back."""

    @staticmethod
    def forward(ctx, x: Tensor, seeds: Tensor, step: Tensor, place: int, p: float, axes: tuple[int, ...]) -> Tensor:
        ctx.save_for_backward(seeds, step)  # which refuses a way back after the step was counted on
        ctx.about = place, p, axes
        return _dropped(x, seeds, step, place, p, axes)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple:
        seeds, step = ctx.saved_tensors
        return _dropped(grad, seeds, step, *ctx.about), None, None, None, None, None


def takes(x: Tensor) -> bool:
    """Whether `Drop` takes this tensor: on a GPU, at most float32, two to four axes, within 32-bit offsets."""
    kinds = (torch.float32, torch.bfloat16, torch.float16)
    return x.is_cuda and x.dtype in kinds and 2 <= x.dim() <= 4 and 0 < x.numel() < LARGEST


def adamw_step(
    value: Tensor, gradient: Tensor, mean: Tensor, square: Tensor, rate: Tensor, root: Tensor, size: Tensor,
    betas: tuple[float, float], eps: float,
) -> None:  # fmt: skip
    """Update flat float32 vectors (N,) in place by `adamw`."""
    count = value.numel()
    grid = (triton.cdiv(count, ELEMENTS),)
    adamw[grid](value, gradient, mean, square, rate, root, size, count, *betas, eps, ELEMENTS)


def _dropped(x: Tensor, seeds: Tensor, step: Tensor, place: int, p: float, axes: tuple[int, ...]) -> Tensor:
    x = x.contiguous()
    out = torch.empty_like(x)
    columns, examples = x.shape[-1], x.shape[0]
    rows, axis = x.numel() // columns, x.dim() - 1
    middle = rows // examples
    inner = x.shape[2] if x.dim() == 4 else 1
    across = min(triton.next_power_of_2(columns), ELEMENTS)
    down = ELEMENTS // across
    scale = torch.tensor(1 / (1 - p), dtype=x.dtype).item()  # rounded as the reference rounds it
    words = [value % 2**32 for value in axes]
    drop[(triton.cdiv(rows, down), triton.cdiv(columns, across))](
        x, out, seeds, step, place, rows, columns, rows // len(seeds), middle, inner, round(p * 2**31), scale,
        words[0], words[1], words[2], words[axis], words[3], words[4], down, across,
    )  # fmt: skip
    return out
