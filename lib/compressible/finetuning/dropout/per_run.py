"""Dropout whose masks depend on the run, the step, the place in the network and the element, and on nothing else.

Torch draws all masks from one generator, so a run's masks would depend on which other runs share its pass. Here each
mask is a hash of (seed, step, place, coordinates): stateless, so that a run gets the same masks alone and in a stack,
under other padding, after a resume, and in a CUDA graph.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from compressible.finetuning.batches import PassRows
from compressible.finetuning.dropout.hash import AXES, _axis, _mix, _word
from compressible.runtime.devices import has_triton, tensor_float_32

UNDRAWN = (  # per run
    functional.multi_head_attention_forward,
    functional.alpha_dropout,
    functional.feature_alpha_dropout,
    functional.dropout1d,
    functional.dropout2d,
    functional.dropout3d,
)
LARGEST = 128  # queries, keys and head size up to which one program of the kernel holds a head


class PerRunDropout(TorchFunctionMode):
    """While entered, dropout (in attention, too) of batches (S * B, ...) is drawn for each run by itself.

    seeds (S,) one a run; step () int64 tensor, the step's number, which may live in a CUDA graph. Places are counted
    from each entry on. rows: what first axes must have, where that is known. numbers (S * B,) int32: those of the rows
    in their runs' batches, by default 0 to B - 1.
    """

    def __init__(self, seeds: Sequence[int], step: Tensor, rows: PassRows | None = None) -> None:
        super().__init__()
        self.rows = rows or PassRows(len(seeds))
        self.seeds = torch.tensor([_word(seed) for seed in seeds], dtype=torch.int32, device=step.device)
        self.step = step
        self.numbers: Tensor | None = None
        self.room = 0  # bytes of shared memory for the kernel of attention; asked for here, where no compiler reads
        if step.is_cuda and has_triton():
            from compressible.finetuning.dropout import triton_attention  # noqa: F401  registers its operators

            properties: Any = torch.cuda.get_device_properties(step.device)  # whose stubs lack what it is asked for
            self.room = properties.shared_memory_per_block_optin
        self.begin()

    def begin(self) -> None:
        """Start at the first place and ask for what no compiler can read; called before a compiled pass enters."""
        self.place, self.rounded = 0, tensor_float_32()

    def __enter__(self) -> PerRunDropout:
        self.place = 0
        if not torch.compiler.is_compiling():
            self.begin()
        return super().__enter__()

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is functional.dropout:
            return self._dropout(*args, **kwargs)
        if func is functional.scaled_dot_product_attention:
            return self.attention(*args, **kwargs)
        if func in UNDRAWN and _drops(func, args, kwargs):
            raise ValueError(f"{func.__name__} draws for all runs at once, expected dropout or sdpa attention")
        return func(*args, **kwargs)

    def _dropout(self, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        if not training or p == 0:
            return input
        self._check(input.shape)
        self.place += 1
        if p == 1:
            return input.mul_(0) if inplace else input * 0
        threshold = round(p * 2**31)
        if torch.compiler.is_compiling() or not (input.is_cuda and has_triton()):  # a compiler reads the first only
            kept = self.written_out(input, threshold)  # which it fuses with what is around it
        else:
            from compressible.finetuning.dropout.triton_dropout import Dropped

            kept = Dropped.apply(input, self.seeds, self.step, self.numbers, self.place, threshold, AXES)
        return input.copy_(kept) if inplace else kept

    def written_out(self, input: Tensor, threshold: int) -> Tensor:
        """Return input (S * B, ...) with a share threshold / 2^31 of it at 0, in plain operations."""
        kept = self.keep(input.shape, threshold, input.device)
        return torch.where(kept, input * (2**31 / (2**31 - threshold)), 0)

    def attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """Softmax attention in one kernel or written out where it drops weights; torch's own otherwise.

        A query to which a mask of bools leaves no key gets NaN, where torch's own gives 0.
        """
        if is_causal and attn_mask is not None:
            raise ValueError("attention got attn_mask and is_causal, expected one of them")
        if dropout_p == 0:
            return functional.scaled_dot_product_attention(
                query, key, value, attn_mask, 0.0, is_causal, scale=scale, enable_gqa=enable_gqa
            )
        scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
        if dropout_p < 1 and not enable_gqa and self.attendable(query, key, value, attn_mask):
            self._check(query.shape)
            self.place += 1
            drawn = self.seeds, self.step, self.numbers, self.place, round(dropout_p * 2**31)
            return torch.ops.compressible.dropped_attention(query, key, value, attn_mask, *drawn, scale, is_causal)
        if enable_gqa:
            repeats = query.shape[-3] // key.shape[-3]
            key, value = key.repeat_interleave(repeats, -3), value.repeat_interleave(repeats, -3)
        scores = (query @ key.mT) * scale
        if is_causal:
            attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        if attn_mask is not None and attn_mask.dtype is torch.bool:
            scores = scores.masked_fill(~attn_mask, -math.inf)
        elif attn_mask is not None:
            scores = scores + attn_mask
        return self._dropout(scores.softmax(-1), dropout_p) @ value

    def attendable(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> bool:
        """Whether one Triton kernel does this attention, compiled or not: short, and in TF32 or half precision."""
        if not self.room or query.dim() != 4 or query.shape[:2] != key.shape[:2] or key.shape != value.shape:
            return False
        size = query.shape[3]
        if size != key.shape[3] or max(query.shape[2], key.shape[2], size) > LARGEST:
            return False
        if not query.dtype == key.dtype == value.dtype or (mask is not None and mask.requires_grad):
            return False
        # the weights, four tiles and a transposed one, padded to powers of two: what the backward pass takes on Hopper
        if query.element_size() * LARGEST * (LARGEST + 5 * (64 if size <= 64 else LARGEST)) > self.room:
            return False
        if query.dtype is torch.float32:
            return self.rounded
        return query.dtype in (torch.float16, torch.bfloat16)

    def _check(self, shape: torch.Size) -> None:
        self.rows.check("dropout", shape)
        if len(shape) > len(AXES):
            raise ValueError(f"dropout got {tuple(shape)}, expected at most {len(AXES)} axes")

    def keep(self, shape: Sequence[int], threshold: int, device: torch.device) -> Tensor:
        """Return a mask (S * B, ...), True with probability 1 - threshold / 2^31."""
        runs = len(self.seeds)
        drawn = _mix(_mix(self.seeds + AXES[3] * self.place) + self.step.to(torch.int32) * AXES[4])
        own = _axis(shape[0] // runs, 0, device) if self.numbers is None else self.numbers.view(runs, -1) * AXES[0]
        word = (drawn[:, None] + own).reshape(-1)
        for axis in range(1, len(shape)):
            word = word[..., None] + _axis(shape[axis], axis, device)
        return (_mix(word) & 0x7FFFFFFF) >= threshold


def _drops(func: Callable, args: tuple, kwargs: dict) -> bool:
    given = inspect.signature(func).bind(*args, **kwargs)
    given.apply_defaults()
    rate = given.arguments["dropout_p" if "dropout_p" in given.arguments else "p"]
    return given.arguments["training"] and rate > 0
