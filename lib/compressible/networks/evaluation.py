"""How well networks do on a whole set: mean loss and accuracy, without gradients and in evaluation mode."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from compressible.networks.batches import Examples
from compressible.networks.losses import Loss, correct
from compressible.networks.stacks import Named

STACKED = {"cpu": 1024, "cuda": 2**15}  # cases of all models together in one pass
ALONE = {"cpu": 512, "cuda": 2048}  # of one model, which may be large
Context = Callable[[], AbstractContextManager[Any]]


@torch.no_grad()
def evaluate_stacked(
    model: nn.Module,
    parameters: Named,
    fixed: Named,
    dims: dict[str, int | None],
    examples: Examples,
    loss: Loss,
    autocast: Context,
) -> tuple[Tensor, Tensor]:
    """Return mean loss (S,) and accuracy (S,) of stacked parameters; `model` is in evaluation mode."""

    def one(parameters: Named, fixed: Named, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        outputs = functional_call(model, (parameters, fixed), (inputs,))
        return loss(outputs, targets).double(), correct(outputs, targets)

    each = vmap(one, in_dims=(0, dims, None, None))
    count = len(next(iter(parameters.values())))
    rows = max(1, STACKED[examples.inputs.device.type] // count)
    with autocast():
        parts = [(*each(parameters, fixed, *part), len(part[0])) for part in _split(examples, rows)]
    return _means(parts, len(examples))


@torch.no_grad()
def evaluate_one(model: nn.Module, examples: Examples, loss: Loss, autocast: Context) -> tuple[Tensor, Tensor]:
    """Return mean loss () and accuracy () of one model."""
    model.eval()
    parts = []
    with autocast():
        for inputs, targets in _split(examples, ALONE[examples.inputs.device.type]):
            outputs = model(inputs)
            parts.append((loss(outputs, targets).double(), correct(outputs, targets), len(inputs)))
    return _means(parts, len(examples))


def _split(examples: Examples, rows: int) -> Iterator[tuple[Tensor, Tensor]]:
    yield from zip(examples.inputs.split(rows), examples.targets.split(rows), strict=True)


def _means(parts: list[tuple[Tensor, Tensor, int]], count: int) -> tuple[Tensor, Tensor]:
    loss = torch.stack([loss * size for loss, _, size in parts]).sum(0) / count
    right = torch.stack([right for _, right, _ in parts]).sum(0).double() / count
    return loss.cpu(), right.cpu()
