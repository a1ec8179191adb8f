"""The two losses of the networks' figures, and how well logits say the class."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from compressible.runtime.checks import expect

Loss = Callable[[Tensor, Tensor], Tensor]


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy of logits (B, classes) at class numbers (B,).

    Written out, since vmap takes PyTorch's own apart in ways that a CUDA graph need not like.
    """
    return -functional.log_softmax(_widened(logits), -1).gather(-1, targets[:, None]).mean()


def squared(outputs: Tensor, targets: Tensor) -> Tensor:
    """Half the squared distance of outputs (B, m) from targets (B, m), mean over the batch; a class is a unit vector.

    It is P1's (1/2) ||f - Phi||_F^2 divided by B. ValueError for targets of another shape, which would be broadcast.
    """
    outputs, classes = _widened(outputs), not targets.is_floating_point()
    wanted = outputs.shape[:1] if classes else outputs.shape
    if targets.shape != wanted:
        expect("shape of targets", tuple(targets.shape), False, f"{tuple(wanted)}, by the outputs")
    if classes:
        targets = (targets[:, None] == torch.arange(outputs.shape[-1], device=outputs.device)).to(outputs.dtype)
    return (outputs - targets).square().sum(-1).mean() / 2


LOSSES: dict[str, Loss] = {"cross_entropy": cross_entropy, "squared": squared}


def correct(outputs: Tensor, targets: Tensor) -> Tensor:
    """How many of the outputs (B, classes) are largest at their class (B,); for float targets at their largest one."""
    wanted = targets.argmax(-1) if targets.is_floating_point() else targets
    return (outputs.argmax(-1) == wanted).sum()


def _widened(outputs: Tensor) -> Tensor:
    """Half precision has too few digits for a loss."""
    return outputs.float() if outputs.dtype in (torch.bfloat16, torch.float16) else outputs
