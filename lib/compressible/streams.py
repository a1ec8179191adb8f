"""Dropout whose masks depend on the run, the step, the place in the network and the element, and on nothing else.

Torch draws masks from one stream, so a run's masks would depend on which other runs share its pass. Here each mask is a
hash of (seed, step, place, coordinates): stateless, so that a run gets the same masks alone and in a stack, under
other padding, after a resume, and in a CUDA graph.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

try:
    from . import tuning_kernels as fused
except ImportError:  # triton is for Linux only; compiled passes fuse masks by themselves
    fused = None

# Odd 32-bit constants, one an axis (golden ratio and Weyl multiples), and the finaliser of Wellons' lowbias32.
AXES = (-1640531527, 2043891563, -1028477379, 668265263, 374761393)
FIRST, SECOND = 0x7FEB352D, 0x846CA68B - (1 << 32)


class RunStreams(TorchFunctionMode):
    """While entered, dropout (in attention, too) of batches (S * B, ...) draws from one stream a run.

    seeds (S,) one a run; step () int64 tensor, the step's number, which may live in a CUDA graph. Places are counted
    from each entry on.
    """

    def __init__(self, seeds: Sequence[int], step: Tensor) -> None:
        super().__init__()
        self.seeds = torch.tensor([_word(seed) for seed in seeds], dtype=torch.int32, device=step.device)
        self.step, self.place = step, 0

    def __enter__(self) -> RunStreams:
        self.place = 0
        return super().__enter__()

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is functional.dropout:
            return self._dropout(*args, **kwargs)
        if func is functional.scaled_dot_product_attention:
            return self._attention(*args, **kwargs)
        return func(*args, **kwargs)

    def _dropout(self, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        if not training or p == 0:
            return input
        if fused is not None and not torch.compiler.is_compiling() and not inplace and fused.takes(input):
            self._check(input.shape)
            self.place += 1
            return fused.Drop.apply(input, self.seeds, self.step, self.place, p, AXES)
        kept = input * (self._keep(input.shape, p, input.device).to(input.dtype) * (1 / (1 - p)))
        return input.copy_(kept) if inplace else kept

    def _attention(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
        is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
    ) -> Tensor:  # fmt: skip
        """Softmax attention written out where it drops weights; torch's own otherwise."""
        if dropout_p == 0:
            return functional.scaled_dot_product_attention(
                query, key, value, attn_mask, 0.0, is_causal, scale=scale, enable_gqa=enable_gqa
            )
        if enable_gqa:
            repeats = query.shape[-3] // key.shape[-3]
            key, value = key.repeat_interleave(repeats, -3), value.repeat_interleave(repeats, -3)
        scores = (query @ key.mT) * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
        if is_causal:
            attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        if attn_mask is not None and attn_mask.dtype is torch.bool:
            scores = scores.masked_fill(~attn_mask, -math.inf)
        elif attn_mask is not None:
            scores = scores + attn_mask
        return self._dropout(scores.softmax(-1), dropout_p) @ value

    def _keep(self, shape: torch.Size, p: float, device: torch.device) -> Tensor:
        """A mask (S * B, ...), True with probability 1 - p."""
        runs = self._check(shape)
        self.place += 1
        stream = _mix(_mix(self.seeds + AXES[3] * self.place) + self.step.to(torch.int32) * AXES[4])
        word = (stream[:, None] + _axis(shape[0] // runs, 0, device)).reshape(-1)
        for axis in range(1, len(shape)):
            word = word[..., None] + _axis(shape[axis], axis, device)
        threshold = round(p * 2**31)
        return (_mix(word) & 0x7FFFFFFF) >= threshold

    def _check(self, shape: torch.Size) -> int:
        runs = len(self.seeds)
        if shape[0] % runs or len(shape) > len(AXES):
            raise ValueError(f"dropout met a tensor of shape {tuple(shape)}, expected {runs} runs in its first axis")
        return runs


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
