"""What fine-tuning reads: a task's rows, on the device, cut to the longest of those that are asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from compressible.runtime.token_rows import along_rows

LENGTHS = {"cpu": 8, "cuda": 32}  # padded lengths are multiples: few graphs, little padding


class ExamplesLike(Protocol):
    """Examples: tokens by name (N, T), padded at the end, and labels (N, ...); `along_rows` says which are cut."""

    @property
    def tokens(self) -> dict[str, Tensor]: ...
    @property
    def labels(self) -> Tensor: ...


class TaskLike(Protocol):
    """What a task needs here; `data.tasks.Task` is one. kind: "regression", "classification", "generation" or "causal".

    score is the metric of outputs (N, outputs) and labels (N,), both numpy's; for texts it is not asked.
    """

    @property
    def kind(self) -> str: ...
    @property
    def train(self) -> ExamplesLike: ...
    @property
    def validation(self) -> ExamplesLike: ...
    def score(self, outputs: np.ndarray, labels: np.ndarray, /) -> float: ...


def validation_score(task: TaskLike, outputs: np.ndarray) -> float:
    """Return the task's score of outputs (N, outputs) for its validation rows."""
    labels = task.validation.labels.cpu()
    return float(task.score(outputs, (labels.float() if labels.dtype is torch.bfloat16 else labels).numpy()))


class RunsMixError(ValueError):
    """Runs of one pass would not go as they would alone; one run in a pass by itself does."""


@dataclass
class PassRows:
    """How many rows S * B the pass in progress has, of how many runs S: what layers hold their first axis against.

    0 rows: not known, any multiple of S will do.
    """

    runs: int
    rows: int = 0

    def check(self, what: str, shape: torch.Size) -> None:
        """Raise RunsMixError unless the first axis of `what` is the pass's rows; a single run has none to mix with."""
        if self.runs == 1 or (len(shape) and (shape[0] == self.rows if self.rows else shape[0] % self.runs == 0)):
            return
        wanted = self.rows or f"a multiple of {self.runs}"
        raise RunsMixError(
            f"{what} got {tuple(shape)}, expected {wanted} in the first axis, the batches of {self.runs} runs side by "
            "side (exclude_modules leaves a layer out)"
        )


class DeviceRows:
    """Examples on the device, cut to the longest of the rows that are asked for; lengths stay on the CPU.

    labels and counts, of causal language models: the words asked for, see `asked_words`, in the place of the labels,
    and their numbers (N,) on the CPU; batches have as many as the row that asks for most. Raises ValueError where
    padding is not at the end.
    """

    def __init__(
        self,
        rows: ExamplesLike,
        device: torch.device,
        labels: Tensor | None = None,
        counts: Tensor | None = None,
    ) -> None:
        self.along = along_rows(rows.tokens)
        mask = rows.tokens["attention_mask"] if self.along else None  # masks of more axes are of more than rows
        if mask is not None and (mask[:, 1:] > mask[:, :-1]).any():
            row = int((mask[:, 1:] > mask[:, :-1]).any(1).nonzero()[0])
            todo = 'with a tokenizer of padding_side="right"'
            raise ValueError(
                f"attention_mask has tokens after padding in row {row}, expected padding at the end: {todo}"
            )
        self.lengths = None if mask is None else mask.sum(1).cpu()
        self.tokens = {name: value.to(device) for name, value in rows.tokens.items()}
        labels = rows.labels if labels is None else labels
        kind = labels.dtype if labels.is_floating_point() else torch.int64  # which cross-entropies ask for
        self.labels, self.counts = labels.to(device, kind), counts

    def batch(self, rows: Tensor, multiple: int, least: int = 0) -> tuple[dict[str, Tensor], Tensor]:
        """Return tokens (P, T) and labels (P, ...) of `rows` (P,); T >= least a multiple, at most the examples' own."""
        on = rows.to(self.labels.device, non_blocking=True)
        longest = None
        if self.lengths is not None:
            longest = -(-max(least, int(self.lengths[rows].max())) // multiple) * multiple
        labels = self.labels[on]
        if self.counts is not None:
            labels = labels[:, : -(-int(self.counts[rows].max()) // multiple) * multiple]
        tokens = {name: value[on, :longest] if name in self.along else value[on] for name, value in self.tokens.items()}
        return tokens, labels
