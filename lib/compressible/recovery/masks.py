"""Masks: which entries of a matrix are observed, all equally likely or in proportion to weights.

Drawn on the CPU, so that a seed means the same mask on every device; moved to `device` afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from compressible.recovery.checks import REAL, expect_draw, expect_tensor
from compressible.runtime.checks import expect, expect_batch_shape, expect_shape, is_number


def random_mask(
    shape: tuple[int, int],
    observed: float,
    batch_shape: tuple[int, ...] = (),
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """Return a mask with exactly floor(observed m n) ones, drawn without replacement.

    Args:
        shape: (m, n).
        observed: p, the observed fraction in (0, 1]; the papers take 0.2 or 0.3.
        batch_shape: leading dimensions, a mask for each problem of a stack.
        generator: of the draw.
        dtype, device: of the mask.
        weights: (m, n) > 0; entries are drawn one after another in proportion to their weight (Efraimidis and
            Spirakis). Without weights all are equally likely.

    Returns:
        Omega (..., m, n) of zeros and ones.

    Raises:
        ValueError: if `observed` is out of range or leaves no entry, or a weight is not finite and positive.

    Example:
        >>> import compressible as cd
        >>> cd.random_mask((10, 10), observed=0.3).sum().item()
        30.0
    """
    size = math.prod(shape := expect_shape(shape))
    batch_shape = expect_batch_shape(batch_shape)
    expect_draw((*batch_shape, size), generator, dtype, device, (*REAL, torch.bool))
    fraction = is_number(observed, above=0) and observed <= 1
    count = _floor(observed * size) if fraction else 0
    expect("observed", observed, count >= 1, "a fraction in (0, 1] that leaves at least one entry")
    keys = torch.rand(*batch_shape, size, generator=generator, dtype=torch.float64, device="cpu")
    if weights is not None:  # the smallest of exponential clocks with these rates
        keys = -torch.log1p(-keys) / _check_weights(weights, shape)
    order = keys.argsort(-1)
    mask = torch.zeros(*batch_shape, size, dtype=dtype, device="cpu").scatter_(-1, order[..., :count], 1.0)
    return mask.unflatten(-1, shape).to(device=device)


def inclusion_probability(weights: Tensor, observed: float) -> Tensor:
    """Return the probability (m, n) with which `random_mask` observes each entry under `weights` (m, n) > 0.

    1 - exp(-t w) with t such that the probabilities sum to `observed` m n: the limit of large m n, where the count is
    as good as fixed. Raises ValueError if `observed` is outside (0, 1) or a weight is not finite and positive.
    """
    expect("observed", observed, is_number(observed, above=0) and observed < 1, "a fraction in (0, 1)")
    rates = _check_weights(weights)
    low, high = torch.tensor(0.0, dtype=torch.float64, device="cpu"), 1 / rates.min() * -math.log1p(-observed)
    for _ in range(200):  # bisection: the least weight alone bounds t from above
        middle = (low + high) / 2
        short = -torch.expm1(-middle * rates).mean() < observed
        low, high = (middle, high) if short else (low, middle)
    return -torch.expm1(-high * rates).reshape(weights.shape).to(weights.device)


def _floor(count: float) -> int:
    """The floor of p m n, which is rounded: 0.3 * 100 is 29.999..., and 0.29 * 10^8 is short by more than 1e-9."""
    return math.floor(count + max(1e-9, 2 * math.ulp(count)))


def _check_weights(weights: Tensor, shape: Sequence[int] | None = None) -> Tensor:
    expect_tensor("weights", weights, f"numbers {shape or '(m, n)'} and > 0", REAL)
    shape = weights.shape if shape is None else shape
    if tuple(weights.shape) != tuple(shape) or not bool((torch.isfinite(weights) & (weights > 0)).all()):
        least = weights.min().item() if weights.numel() else math.nan
        raise ValueError(f"weights have shape {tuple(weights.shape)} and minimum {least}, expected {shape} and > 0")
    rates = weights.detach().to("cpu", torch.float64).flatten()
    mantissa, _ = torch.frexp(rates.max())
    return rates / (rates.max() / mantissa)  # by a power of two, so that no clock of small weights overflows
