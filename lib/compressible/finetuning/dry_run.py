"""A few rows through the model before it is trained, so that what cannot be stacked is found before work starts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count

import torch
from torch import Tensor

from compressible.finetuning.batches import LENGTHS
from compressible.finetuning.causal import writer
from compressible.finetuning.drawing import random_states, undrawn
from compressible.finetuning.losses import WRITTEN
from compressible.finetuning.mixing import Trial
from compressible.finetuning.stacked.alone import AloneModel
from compressible.finetuning.stacked.layers import stacked_adapters
from compressible.finetuning.stacked_pass import StackedPass

DRAWS = 8  # times that a model is asked whether its own draws change its outputs


def try_out(stacked: StackedPass) -> None:
    """Pass one training row of each run through the stacked model without its updates.

    Raises RunsMixError where a layer that must see the runs side by side sees something else, or a row's outputs depend
    on other runs' rows; ValueError where they are not what the task's labels ask for, or the model remembers its
    passes; RuntimeError where they depend on random numbers that the model draws itself.
    """
    with _forgetting(stacked):
        if stacked.task.kind in WRITTEN:
            _check_words(stacked)
        if stacked.words is not None:
            Trial(stacked).settle()
        logits, labels = _tried(stacked)
        if stacked.task.kind == "classification":
            _check_classes(stacked, logits)
        stacked.run_losses(logits, labels)
        if len(stacked.runs) > 1:
            Trial(stacked).check()


def draws_itself(stacked: StackedPass) -> bool:
    """Return whether a run that goes alone draws by itself in training, as PVeRA does, once its method is there."""
    if not isinstance(stacked.model, AloneModel):
        return False  # whose adapters draw per run, and whose model `try_out` has asked
    with _forgetting(stacked), undrawn(stacked.device):
        before = random_states(stacked.device)
        _forward(stacked, *_rows(stacked))
        return random_states(stacked.device) != before


def _tried(stacked: StackedPass) -> tuple[Tensor, Tensor]:
    """Outputs and labels of a row of each run, without adapters."""
    adapters = stacked_adapters(stacked.model).values()
    for adapter in adapters:
        adapter.sink = lambda x, out: out
    try:
        tokens, labels = _rows(stacked)
        return _drawn(stacked, tokens, labels), labels
    finally:
        for adapter in adapters:
            adapter.sink = None


@contextmanager
def _forgetting(stacked: StackedPass) -> Iterator[None]:
    """Leave the model's buffers as they were; ValueError where passes change those that all runs share."""
    before = {name: (buffer, buffer.clone()) for name, buffer in stacked.model.named_buffers()}
    changed = []
    try:
        yield
    finally:
        for name, buffer in stacked.model.named_buffers():
            kept = before.get(name, (None, buffer))[1]  # one that grows, or is new, is a cache
            if buffer.shape == kept.shape and not torch.equal(buffer, kept):
                changed.append(name)
        for buffer, kept in before.values():
            buffer.copy_(kept)
    if changed and not isinstance(stacked.model, AloneModel):  # which has a copy of its own
        kind = type(stacked.source).__name__
        raise ValueError(
            f"{changed[0]!r} of {kind} changes in every pass, and all runs share it: expected no such state"
        )


def _rows(stacked: StackedPass) -> tuple[dict[str, Tensor], Tensor]:
    """A training row of each run, as often as makes their number unlike every other axis, such as the tokens'."""
    tokens, labels = stacked.train_rows.batch(stacked.order[0][:, 0], LENGTHS[stacked.device.type])
    others = {size for value in (*tokens.values(), labels) for size in value.shape[1:]}
    each = next(times for times in count(1) if times * len(stacked.runs) not in others)
    repeated = {name: value.repeat_interleave(each, 0) for name, value in tokens.items()}
    return repeated, labels.repeat_interleave(each, 0)


def _drawn(stacked: StackedPass, tokens: dict[str, Tensor], labels: Tensor) -> Tensor:
    """The logits, unless the model's own draws change them; those of layerdrop at rate 0, for one, are idle."""
    before = random_states(stacked.device)
    logits = _forward(stacked, tokens, labels)
    if before == random_states(stacked.device):
        return logits
    with undrawn(stacked.device):
        again = [_forward(stacked, tokens, labels) for _ in range(DRAWS)]
    if not all(torch.equal(logits, other) for other in again):
        kind = type(stacked.source).__name__
        raise RuntimeError(
            f"{kind} draws random numbers itself while it trains, such as for layerdrop or drop path: its runs would "
            "depend on their neighbours, expected nn.Dropout or no draws; set these rates to 0, or pass dropout=False"
        )
    return logits


def _check_classes(stacked: StackedPass, logits: Tensor) -> None:
    for name, part in (("train", stacked.task.train), ("validation", stacked.task.validation)):
        largest = int(part.labels.max()) if len(part.labels) else -1
        if logits.dim() == 2 and largest >= logits.shape[1]:
            outputs = f"{logits.shape[1]} outputs"
            raise ValueError(f"task.{name}.labels go up to {largest}, expected classes below the model's {outputs}")


def _check_words(stacked: StackedPass) -> None:
    weight = getattr(writer(stacked.source), "weight", None)
    for name, part in (("train", stacked.task.train), ("validation", stacked.task.validation)):
        largest = int(part.labels.max()) if len(part.labels) else -1
        if weight is not None and largest >= len(weight):
            raise ValueError(f"task.{name}.labels go up to {largest}, expected words below the model's {len(weight)}")


@torch.no_grad()
def _forward(stacked: StackedPass, tokens: dict[str, Tensor], labels: Tensor) -> Tensor:
    stacked.model.train(stacked.dropout)
    stacked.rows.rows = len(labels)
    with stacked.per_run:
        return stacked.forward(tokens, labels)
