"""The heads of S runs: linear layers that each run trains whole, from fresh weights of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from compressible.finetuning.batches import PassRows
from compressible.finetuning.peft_models import ADAPTER, base_of, saved_linears
from compressible.finetuning.run import FineTuningRun, fresh_head
from compressible.runtime.module_names import replace_module

Rated = list[tuple[nn.Parameter, Tensor]]  # trained tensors and the rates that broadcast against them


class StackedLinear(nn.Module):
    """A linear layer that S runs train, each its own: weight (S, m, n), bias (S, m); keeps its own precision."""

    def __init__(self, weights: Sequence[Tensor], biases: Sequence[Tensor] | None, rows: PassRows) -> None:
        super().__init__()
        self.rows = rows
        self.weight = nn.Parameter(torch.stack(list(weights)))
        self.bias = None if biases is None else nn.Parameter(torch.stack(list(biases)))

    def forward(self, x: Tensor) -> Tensor:
        """Return (S * B, ..., m)."""
        runs, m, n = self.weight.shape
        self.rows.check(f"a trained layer of shape {(m, n)}", x.shape)
        flat = x.reshape(runs, -1, n).to(self.weight.dtype)
        out = flat @ self.weight.mT
        out = out if self.bias is None else out + self.bias[:, None]
        return out.view(*x.shape[:-1], m)


def stack_heads(model: nn.Module, source: nn.Module, runs: Sequence[FineTuningRun], rows: PassRows) -> None:
    """Put stacks of fresh heads, one a run, in the place of the linear layers that peft trains whole."""
    for name, part in list(saved_linears(model)):
        own: Any = source.get_submodule(name)
        drawn = [fresh_head(own, run, name) for run in runs]
        biases = None if part.bias is None else [bias for _, bias in drawn]
        replace_module(model, part, StackedLinear([weight for weight, _ in drawn], biases, rows))


def stacked_heads(model: nn.Module) -> dict[str, StackedLinear]:
    """Return the stacked heads of a pass's model by their names in the plain one."""
    inner = getattr(model, "inner", model)
    inner = base_of(inner) if isinstance(inner, PeftModel) else inner
    found = {name: module for name, module in inner.named_modules() if isinstance(module, StackedLinear)}
    return {name.replace(f".modules_to_save.{ADAPTER}", ""): module for name, module in found.items()}
