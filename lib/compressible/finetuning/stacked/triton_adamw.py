"""A step of AdamW as one Triton kernel."""

# Triton's compiler reads the kernels; Python does not run them.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from compressible.finetuning.dropout.triton_dropout import BLOCK


@triton.jit
def adam_step(
    value, mean, square, gradient, rate, scalars, total, share, rates, SHARED: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """One step of AdamW on flat vectors; scalars: 1 - b1, 1 - b2, sqrt(1 - b2^t), factor / (1 - b1^t), eps.

    SHARED: whether `share` neighbouring elements, a multiple of BLOCK, have one of the `rates` rates, in turns.
    """
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < total
    g = tl.load(gradient + at, mask=inside, other=0.0)
    kind = g.dtype
    m = tl.load(mean + at, mask=inside, other=0.0)
    v = tl.load(square + at, mask=inside, other=0.0)
    first, second = tl.load(scalars).to(kind), tl.load(scalars + 1).to(kind)
    m += first * (g - m)
    v += second * (g * g - v)
    change = m / (tl.sqrt(v) / tl.load(scalars + 2).to(kind) + tl.load(scalars + 4).to(kind))
    p = tl.load(value + at, mask=inside, other=0.0)
    if SHARED:
        own = tl.load(rate + (tl.program_id(0).to(tl.int64) * BLOCK // share) % rates)
    else:
        own = tl.load(rate + at, mask=inside, other=0.0)
    p -= change * own * tl.load(scalars + 3).to(kind)
    tl.store(mean + at, m, mask=inside)
    tl.store(square + at, v, mask=inside)
    tl.store(value + at, p, mask=inside)


def fused_adam(
    value: Tensor, mean: Tensor, square: Tensor, gradient: Tensor, rate: Tensor, scalars: Tensor, share: int
) -> None:
    """Take one step in place on flat vectors (N,); scalars (5,) float64 on the device, see `adam_step`.

    rate: one an element where `share` is 1, else one for every `share` neighbours, in turns.
    """
    adam_step[(triton.cdiv(value.numel(), BLOCK),)](
        value, mean, square, gradient, rate, scalars, value.numel(), share, rate.numel(), SHARED=share > 1, BLOCK=BLOCK
    )
