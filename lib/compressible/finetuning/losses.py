"""One mean loss a run from what the model makes of all runs' rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

KINDS = ("regression", "classification", "generation", "causal")
WRITTEN = ("generation", "causal")  # kinds whose losses are means over words


def first_output(output: Any) -> Tensor:
    """Return logits, or else the first tensor, of what a model returned."""
    if isinstance(output, Tensor):
        return output
    logits = getattr(output, "logits", None)
    return logits if logits is not None else next(value for value in tuple(output) if isinstance(value, Tensor))


def run_losses(kind: str, logits: Tensor, labels: Tensor, runs: int) -> Tensor:
    """Return the mean loss (S,) of every run from logits (S * B, ...): squared error or cross-entropy.

    kind "generation": mean over the run's tokens whose label is not -100. Raises ValueError for outputs of another
    shape than the labels ask for.
    """
    if kind == "generation":
        total, count = token_losses(logits, labels, runs)
        return total / count
    logits = widened(logits)
    if kind == "regression":
        if logits.shape not in (labels.shape, (*labels.shape, 1)):
            asked = f"{(*labels.shape, 1)}: one output a label of a regression"
            raise ValueError(f"the model's outputs are {tuple(logits.shape)}, expected {asked}")
        return (logits.reshape(labels.shape) - labels).square().view(runs, -1).mean(1)
    if logits.dim() != 2:
        raise ValueError(f"the model's outputs are {tuple(logits.shape)}, expected ({len(labels)}, classes)")
    return functional.cross_entropy(logits, labels, reduction="none").view(runs, -1).mean(1)


def token_losses(logits: Tensor, labels: Tensor, runs: int) -> tuple[Tensor, Tensor]:
    """Return the sum (S,) of every run's cross-entropies over its tokens whose label is not -100, and their number."""
    logits = widened(logits)
    each = functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none", ignore_index=-100)
    return each.view(runs, -1).sum(1), (labels != -100).view(runs, -1).sum(1)


def widened(logits: Tensor) -> Tensor:
    """Half precision has too few digits for a loss."""
    return logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
