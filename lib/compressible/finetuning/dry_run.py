"""A few rows through the model before it is trained, so that what cannot be stacked is refused before work starts."""

from __future__ import annotations

from itertools import count

import torch
from torch import Tensor

from compressible.finetuning.batches import LENGTHS
from compressible.finetuning.losses import run_losses
from compressible.finetuning.stacked.layers import stacked_adapters
from compressible.finetuning.stacked_pass import StackedPass

DRAWS = 8  # times that a model is asked whether its own draws change its outputs


def try_out(stacked: StackedPass) -> None:
    """Pass one training row of each run through the stacked model without its updates.

    Raises ValueError where a layer that must see the runs side by side sees something else, or the outputs are not
    what the task's labels ask for; RuntimeError where they depend on random numbers that the model draws itself.
    """
    adapters = stacked_adapters(stacked.model).values()
    for adapter in adapters:
        adapter.sink = lambda x, out: out
    try:
        tokens, labels = _rows(stacked)
        logits = _drawn(stacked, tokens, labels)
    finally:
        for adapter in adapters:
            adapter.sink = None
    if stacked.task.kind == "classification":
        _check_classes(stacked, logits)
    run_losses(stacked.task.kind, logits, labels, len(stacked.runs))


def _rows(stacked: StackedPass) -> tuple[dict[str, Tensor], Tensor]:
    """A training row of each run, as often as makes their number unlike every other axis, such as the tokens'."""
    tokens, labels = stacked.train_rows.batch(stacked.order[0][:, 0], LENGTHS[stacked.device.type])
    others = {size for value in (*tokens.values(), labels) for size in value.shape[1:]}
    each = next(times for times in count(1) if times * len(stacked.runs) not in others)
    repeated = {name: value.repeat_interleave(each, 0) for name, value in tokens.items()}
    return repeated, labels.repeat_interleave(each, 0)


def _drawn(stacked: StackedPass, tokens: dict[str, Tensor], labels: Tensor) -> Tensor:
    """The logits, unless the model's own draws change them; those of layerdrop at rate 0, for one, are idle."""
    device = stacked.device
    before = _random_states(device)
    logits = _forward(stacked, tokens, labels)
    if all(map(torch.equal, before, _random_states(device))):
        return logits
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        again = [_forward(stacked, tokens, labels) for _ in range(DRAWS)]
    if not all(torch.equal(logits, other) for other in again):
        kind = type(stacked.source).__name__
        raise RuntimeError(
            f"{kind} draws random numbers itself while it trains, such as for layerdrop or drop path: its runs would "
            "depend on their neighbours, expected nn.Dropout or no draws; set these rates to 0, or pass dropout=False"
        )
    return logits


def _random_states(device: torch.device) -> list[Tensor]:
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def _check_classes(stacked: StackedPass, logits: Tensor) -> None:
    for name, part in (("train", stacked.task.train), ("validation", stacked.task.validation)):
        largest = int(part.labels.max()) if len(part.labels) else -1
        if logits.dim() == 2 and largest >= logits.shape[1]:
            outputs = f"{logits.shape[1]} outputs"
            raise ValueError(f"task.{name}.labels go up to {largest}, expected classes below the model's {outputs}")


@torch.no_grad()
def _forward(stacked: StackedPass, tokens: dict[str, Tensor], labels: Tensor) -> Tensor:
    stacked.model.train(stacked.dropout)
    stacked.rows.rows = len(labels)
    with stacked.per_run:
        return stacked.forward(tokens, labels)
