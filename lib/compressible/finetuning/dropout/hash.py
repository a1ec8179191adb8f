"""The hash of (seed, step, place, coordinates) that decides what dropout keeps, on 32-bit words."""

from __future__ import annotations

import torch
from torch import Tensor

# Odd 32-bit constants, one an axis (golden ratio and Weyl multiples), and the finaliser of Wellons' lowbias32.
AXES = (-1640531527, 2043891563, -1028477379, 668265263, 374761393)
FIRST, SECOND = 0x7FEB352D, 0x846CA68B - (1 << 32)


def _axis(size: int, axis: int, device: torch.device) -> Tensor:
    return torch.arange(size, dtype=torch.int32, device=device) * AXES[axis]


def _mix(x: Tensor) -> Tensor:
    """A bijection of 32-bit words whose bits all depend on all (lowbias32); right shifts made unsigned by masks."""
    x = (x ^ ((x >> 16) & 0xFFFF)) * FIRST
    x = (x ^ ((x >> 15) & 0x1FFFF)) * SECOND
    return x ^ ((x >> 16) & 0xFFFF)


def _word(seed: int) -> int:
    """A seed as a signed 32-bit word."""
    return (int(seed) * 0x9E3779B1 + 0x7F4A7C15) % 2**32 - 2**31
