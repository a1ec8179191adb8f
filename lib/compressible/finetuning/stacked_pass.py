"""One pass: S runs over one copy of the model's structure, what a batch of them gives and how well they do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from compressible.finetuning.batches import LENGTHS, DeviceRows, ExamplesLike, PassRows, TaskLike, validation_score
from compressible.finetuning.causal import Words, asked_words
from compressible.finetuning.drawing import seeded
from compressible.finetuning.dropout.per_run import PerRunDropout
from compressible.finetuning.losses import WRITTEN, first_output, run_losses, token_losses
from compressible.finetuning.padding import Parts, are_parts, joined, parts_of
from compressible.finetuning.run import FineTuningRun, data_order, seed_of
from compressible.finetuning.stacked.alone import AloneModel
from compressible.finetuning.stacked.grouped_factors import ChainGroups
from compressible.finetuning.stacked.model import stacked_model
from compressible.runtime.devices import matmul_precision

EVALUATION_ROWS = 4096  # sequences of all runs together in one pass of an evaluation
EVALUATION_TOKENS = 2**16  # of them, where a model writes after every token
RECOMPILATIONS = 64


@dataclass(frozen=True)
class PassSnapshot:
    """What `watch` gets: the step, and the updates and factors of the S runs of this pass layer by layer."""

    step: int
    runs: list[FineTuningRun]
    _model: Any = field(repr=False)

    def updates(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the layer's name and its runs' updates (S, m, n), in full float32 whatever the precision."""
        for name, form in self._model.updates():
            with matmul_precision("float32"):
                updates = form()
            yield name, updates

    def factors(self) -> Iterator[tuple[str, list[list[Tensor]]]]:
        """Yield the layer's name and copies of each run's factors [W_1, ..., W_L], A and B for LoRA."""
        yield from self._model.factors()


class StackedPass:
    """S runs whose stacked adapters fit one copy of the model's structure; they have no factors before `start`.

    step () int64 on the device is the number of the step, which dropout depends on; order (steps, S, B) the runs' rows.
    """

    def __init__(
        self,
        model: nn.Module,
        runs: list[FineTuningRun],
        task: TaskLike,
        steps: int,
        batch_size: int = 16,
        precision: str = "float32",
        dropout: bool = True,
    ) -> None:
        self.device = next(model.parameters()).device
        self.source, self.runs, self.task, self.precision, self.dropout = model, runs, task, precision, dropout
        self.step = torch.zeros((), dtype=torch.int64, device=self.device)
        self.rows = PassRows(len(runs))
        self.per_run = PerRunDropout([run.seed for run in runs], self.step, self.rows)
        self.order = torch.stack([data_order(run, len(task.train.labels), steps, batch_size) for run in runs], 1)
        self.words = Words() if task.kind == "causal" else None
        self.train_rows, self.validation_rows = (self._rows(part) for part in (task.train, task.validation))
        self.call, self.chains = self._losses, ChainGroups()
        self.parts: Parts | None = None
        self.draws = False  # whether the model draws by itself, which a run alone may
        self.model = stacked_model(model, runs, self.rows, precision == "bfloat16")

    def start(self) -> None:
        """Give the adapters the factors that their runs start from."""
        batches = (self.inputs(*self.whole(step)) for step in range(len(self.order)))
        passed_over = self.words is not None and self.words.layer is not None
        if self.words is not None and isinstance(self.model, AloneModel):
            self.words.put_back()  # peft may adapt or copy that layer
        self.model.begin(lambda: self.losses(*self.whole(0)).sum(), batches)
        self.chains = self.model.chains
        if self.words is not None and passed_over:
            self.words.pass_over(self.model)
        self.parts = self._parted()

    def _parted(self) -> Parts | None:
        """How steps are taken in parts; not of texts, nor of a run alone, of which nobody knows if it reads padding."""
        lengths = self.train_rows.lengths
        if lengths is None or len(self.runs) == 1 or self.task.kind in WRITTEN:
            return None
        parts = Parts(self.order, lengths, "cpu" if self.device.type == "cpu" else "cuda")
        return parts if len(parts.ends) > 1 else None

    def drawing(self, purpose: str, step: int) -> AbstractContextManager[None]:
        """Let what a run alone draws by itself come from its seed and the step, not from the caller's generators."""
        return seeded(self.device, seed_of(self.runs[0], f"{purpose} {step}")) if self.draws else nullcontext()

    def compile(self, compiled: bool) -> None:
        """Take losses from a compiled pass over the model, or from the plain one."""
        self.call = torch.compile(self._losses, dynamic=False) if compiled else self._losses
        if compiled:  # one compilation a padded length and a pass; beyond the limit PyTorch goes on uncompiled
            from torch._dynamo import config as limits

            self.parts = None  # they are not worth a compiler's time
            limits.recompile_limit = max(limits.recompile_limit, RECOMPILATIONS)

    def batch(self, step: int) -> tuple[dict[str, Tensor], Tensor]:
        """Return the tokens and labels (S * B, ...) of a step, run by run, whole or in parts (padding.py)."""
        return self.whole(step) if self.parts is None else self.parts.batch(self.train_rows, step)

    def whole(self, step: int) -> tuple[dict[str, Tensor], Tensor]:
        """Return the tokens (S * B, T) and labels (S * B, ...) of a step in one."""
        return self.train_rows.batch(self.order[step].reshape(-1), LENGTHS[self.device.type])

    def forward(self, tokens: dict[str, Tensor], labels: Tensor) -> Tensor:
        """Return what the model makes of rows of all runs; for generation it gets the labels, too.

        For a causal language model these are states, or logits, before the words that are asked for.
        """
        given = self.inputs(tokens, labels)
        if self.words is not None:
            return self.words.read(self.model, given, labels)
        return first_output(self.model(**given))

    def inputs(self, tokens: dict[str, Tensor], labels: Tensor) -> dict[str, Tensor]:
        """Return what the model is called with."""
        if self.words is not None:
            return self.words.inputs(self.source, tokens)
        return tokens | {"labels": labels} if self.task.kind == "generation" else tokens

    def run_losses(self, found: Tensor, labels: Tensor) -> Tensor:
        """Return the mean loss (S,) of every run from what `forward` gave."""
        if self.words is None:
            return run_losses(self.task.kind, found, labels, len(self.runs))
        total, count = self.words.losses(found, labels, len(self.runs))
        return total / count

    def losses(self, tokens: dict[str, Tensor], labels: Tensor) -> Tensor:
        """Return the losses (S,) of one training batch."""
        self.model.train(self.dropout)
        self.per_run.begin()  # outside of what may be compiled
        self.rows.rows = len(labels)
        try:
            return self.call(tokens, labels)
        except BaseException:
            self.chains.release()
            raise

    def _losses(self, tokens: dict[str, Tensor], labels: Tensor) -> Tensor:
        self.chains.contract()
        if self.parts is None or not are_parts(tokens):
            with self.per_run:
                logits = self.forward(tokens, labels)
        else:
            logits = joined([self._part(*part, labels) for part in parts_of(tokens)], len(self.runs))
        self.chains.release()
        return self.run_losses(logits, labels)

    def _part(self, tokens: dict[str, Tensor], numbers: Tensor, labels: Tensor) -> Tensor:
        """What `forward` gives for the rows of these numbers (S * B',) in their runs' batches."""
        self.rows.rows, self.per_run.numbers = len(numbers), numbers
        try:
            with self.per_run:
                return self.forward(tokens, labels)
        finally:
            self.rows.rows, self.per_run.numbers = len(labels), None

    @torch.no_grad()
    def evaluate(self) -> tuple[list[float], list[int]]:
        """Return the score of every run on the validation set, and the runs, with NaN, whose logits are not finite."""
        self.model.eval()
        self.chains.contract()
        try:
            logits = self.validation_logits()
        finally:
            self.chains.release()
        finite = [bool(np.isfinite(run).all()) for run in logits]
        lost = [at for at, good in enumerate(finite) if not good]
        if self.task.kind in WRITTEN:
            return [float(value) for value in logits], lost
        pairs = zip(logits, finite, strict=True)
        return [validation_score(self.task, run) if good else float("nan") for run, good in pairs], lost

    def validation_logits(self) -> np.ndarray:
        """Return logits (S, N, outputs), in the order of the rows; of texts the mean losses (S,)."""
        runs, count = len(self.runs), len(self.task.validation.labels)
        lengths = self.validation_rows.lengths
        by_length = torch.arange(count) if lengths is None else lengths.argsort()
        parts = []
        for rows in by_length.split(max(1, self._rows_at_once() // runs)):
            tokens, labels = self.validation_rows.batch(rows.repeat(runs), LENGTHS["cpu"])
            self.rows.rows = len(labels)
            logits = self.forward(tokens, labels)
            if self.words is not None:
                parts.append(torch.stack(self.words.losses(logits, labels, runs)))
            elif self.task.kind == "generation":
                parts.append(torch.stack(token_losses(logits, labels, runs)))
            else:
                parts.append(logits.float().view(runs, len(rows), -1).cpu())
        if self.task.kind in WRITTEN:
            total, number = torch.stack(parts).sum(0).cpu()  # not a mean of means: passes differ in their parts
            return (total / number).numpy()
        stacked = torch.cat(parts, 1)
        return stacked[:, by_length.argsort()].numpy()

    def _rows(self, part: ExamplesLike) -> DeviceRows:
        given = () if self.words is None else asked_words(part.labels)
        return DeviceRows(part, self.device, *given)

    def _rows_at_once(self) -> int:
        """Rows of all runs in one pass of an evaluation."""
        if self.words is None:
            return EVALUATION_ROWS
        return min(EVALUATION_ROWS, EVALUATION_TOKENS // self.task.validation.labels.shape[1])

    def release(self) -> None:
        """Let go of model and factors: bound methods make cycles, which wait for the collector otherwise."""
        for name in ("call", "model", "chains"):
            delattr(self, name)
