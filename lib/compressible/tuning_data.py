"""What fine-tuning reads, and its losses: rows on the device, cut to their longest, and one mean loss a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

KINDS = ("regression", "classification", "generation")
LENGTHS = {"cpu": 8, "cuda": 32}  # padded lengths are multiples: few graphs, little padding


class Rows(Protocol):
    """Examples: tokens by name (N, T), padded at the end, and labels (N, ...)."""

    tokens: dict[str, Tensor]
    labels: Tensor


class TaskLike(Protocol):
    """What a task needs here; `tasks.Task` is one. kind: "regression", "classification" or "generation".

    score is the metric of outputs (N, outputs) and labels (N,); for generation it is not asked.
    """

    kind: str
    train: Rows
    validation: Rows

    def score(self, logits: Tensor, labels: Tensor) -> float: ...


@dataclass
class PassRows:
    """How many rows S * B the pass in progress has, of how many runs S: what layers hold their first axis against.

    0 rows: not known, any multiple of S will do.
    """

    runs: int
    rows: int = 0

    def check(self, what: str, shape: torch.Size) -> None:
        """Raise ValueError unless the first axis of `what` is the pass's rows; a single run has none to mix with."""
        if self.runs == 1 or (len(shape) and (shape[0] == self.rows if self.rows else shape[0] % self.runs == 0)):
            return
        wanted = self.rows or f"a multiple of {self.runs}"
        raise ValueError(
            f"{what} got {tuple(shape)}, expected {wanted} in the first axis, the batches of {self.runs} runs side by "
            "side: leave the layer out by exclude_modules, or train run by run with max_stack=1"
        )


class DeviceRows:
    """Examples on the device, cut to the longest of the rows that are asked for; lengths stay on the CPU.

    Raises ValueError where padding is not at the end.
    """

    def __init__(self, rows: Rows, device: torch.device) -> None:
        mask = rows.tokens.get("attention_mask")
        if mask is not None and (mask[:, 1:] > mask[:, :-1]).any():
            row = int((mask[:, 1:] > mask[:, :-1]).any(1).nonzero()[0])
            raise ValueError(f"attention_mask has tokens after padding in row {row}, expected padding at the end")
        self.lengths = None if mask is None else mask.sum(1).cpu()
        self.tokens = {name: value.to(device) for name, value in rows.tokens.items()}
        self.labels = rows.labels.to(device)

    def batch(self, rows: Tensor, multiple: int) -> tuple[dict[str, Tensor], Tensor]:
        """Return tokens (P, T) and labels (P, ...) of `rows` (P,); T a multiple, at most what the examples have."""
        on = rows.to(self.labels.device, non_blocking=True)
        longest = None
        if self.lengths is not None:
            longest = -(-int(self.lengths[rows].max()) // multiple) * multiple
        return {name: value[on, :longest] for name, value in self.tokens.items()}, self.labels[on]


def run_losses(kind: str, logits: Tensor, labels: Tensor, runs: int) -> Tensor:
    """Return the mean loss (S,) of every run from logits (S * B, ...): squared error or cross-entropy.

    kind "generation": mean over the run's tokens whose label is not -100. Raises ValueError for outputs of another
    shape than the labels ask for.
    """
    if kind == "generation":
        total, count = token_losses(logits, labels, runs)
        return total / count
    logits = _widened(logits)
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
    logits = _widened(logits)
    each = functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none", ignore_index=-100)
    return each.view(runs, -1).sum(1), (labels != -100).view(runs, -1).sum(1)


def _widened(logits: Tensor) -> Tensor:
    """Half precision has too few digits for a loss."""
    return logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
