"""One copy of a model's structure that S runs share: stacked adapters and heads in the places of peft's."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from compressible.finetuning.batches import PassRows
from compressible.finetuning.peft_models import (
    ADAPTER,
    adapted_by_peft,
    attending,
    base_of,
    drawn_start,
    sharing,
    tuner_layers,
)
from compressible.finetuning.run import FineTuningRun
from compressible.finetuning.stackable import structure
from compressible.finetuning.stacked.alone import AloneModel
from compressible.finetuning.stacked.gradient_starts import finished_starts
from compressible.finetuning.stacked.grouped_factors import ChainGroups
from compressible.finetuning.stacked.heads import Rated, stack_heads, stacked_heads
from compressible.finetuning.stacked.layers import Chain, StackedAdapter, stacked_adapters
from compressible.finetuning.stacked.starts import Start, drawn_starts
from compressible.runtime.module_names import replace_module


def stacked_model(
    source: nn.Module, runs: Sequence[FineTuningRun], rows: PassRows, half: bool
) -> StackedModel | AloneModel:
    """Return the model of a pass, with frozen weights in half precision or shared; not yet at its runs' start."""
    if len(runs) == 1 and structure(source, runs[0].config).alone:
        return AloneModel(source, runs[0], rows, half)
    return StackedModel(source, runs, rows, half)


class StackedModel(nn.Module):
    """The model of S runs; `starts` holds their factors until `begin` takes them."""

    def __init__(self, source: nn.Module, runs: Sequence[FineTuningRun], rows: PassRows, half: bool) -> None:
        super().__init__()
        self.runs = list(runs)
        vars(self)["source"] = source  # no part of this model
        self.starts: list[Start] = drawn_starts(source, runs)
        model = copy.deepcopy(source).to(torch.bfloat16) if half else sharing(source)
        model = base_of(adapted_by_peft(attending(model), drawn_start(runs[0].config), empty=True))
        rate = getattr(runs[0].config, "lora_dropout", 0.0)
        for name, layer in tuner_layers(model).items():
            scalings = [start.scalings[name] for start in self.starts]
            replace_module(model, layer, StackedAdapter(layer.get_base_layer(), scalings, rows, rate))
        stack_heads(model, source, runs, rows)
        for module in list(model.modules()):
            if isinstance(module, ModulesToSaveWrapper):
                replace_module(model, module, module.modules_to_save[ADAPTER])
        self.inner = model
        self.chains = ChainGroups()

    def forward(self, **tokens: Tensor) -> Any:
        """What the model makes of rows of all runs."""
        return self.inner(**tokens)

    def begin(self, losses: Callable[[], Tensor], batches: Iterable[dict[str, Tensor]]) -> None:
        """Give the adapters the factors that their runs start from; losses is the sum of the runs' first."""
        adapters = stacked_adapters(self.inner)
        source: Any = vars(self)["source"]
        starts = finished_starts(source, adapters, self.starts, self.runs, losses)
        self.starts = []
        chains = [[start.chains[name] for start in starts] for name in adapters]
        pairs = [[start.taken_off.get(name) for start in starts] for name in adapters]
        self.chains = ChainGroups(list(adapters.values()), chains, pairs)

    def rated(self) -> Rated:
        """Return every factor and the rates of its runs."""
        pairs: Rated = []
        for parameter, of, place in self.chains.parameters():
            rates = [self.runs[run].factor_lr(*place) for run in of]
            pairs.append((parameter, torch.tensor(rates, dtype=torch.float64)[:, None, None]))
        return pairs

    def updates(self) -> Iterator[tuple[str, Callable[[], Tensor]]]:
        """Yield the layer's name and what gives its runs' updates (S, m, n)."""
        for name, adapter in stacked_adapters(self.inner).items():
            yield name, adapter.updates

    def factors(self) -> Iterator[tuple[str, list[Chain]]]:
        """Yield the layer's name and its runs' factors."""
        for name, adapter in stacked_adapters(self.inner).items():
            yield name, [adapter.chain(run) for run in range(len(self.runs))]

    @torch.no_grad()
    def finite(self) -> Tensor:
        """Return (S,) whether a run's updates stay below what their precision holds, by the norms of the factors."""
        adapters = stacked_adapters(self.inner)
        good = torch.ones(len(self.runs), dtype=torch.bool, device=next(iter(adapters.values())).weight.device)
        for adapter in adapters.values():
            lower, upper = (half.double().flatten(1).norm(dim=1) for half in adapter.contracted())
            good &= lower * upper < torch.finfo(adapter.source()[0][0].dtype).max  # False for NaN
        return good

    def left(self, run: int) -> dict[str, Any]:
        """Return what a history keeps of a run beside its heads."""
        adapters = stacked_adapters(self.inner)
        pairs = {name: adapter.pair(run) for name, adapter in adapters.items()}
        taken_off = {name: pair for name, pair in pairs.items() if pair is not None}
        chains = {name: adapter.chain(run) for name, adapter in adapters.items()}
        return {"chains": chains, "taken_off": taken_off or None}


def rated(model: StackedModel | AloneModel) -> Rated:
    """Return every trained tensor of a pass and the rates of its runs."""
    runs = model.runs
    rates = torch.tensor([run.lr if run.head_lr is None else run.head_lr for run in runs], dtype=torch.float64)
    heads = [parameter for head in stacked_heads(model).values() for parameter in head.parameters()]
    return model.rated() + [(p, rates.view(-1, *[1] * (p.dim() - 1))) for p in heads]


@torch.no_grad()
def overflown(model: StackedModel | AloneModel) -> list[int]:
    """Return the runs whose updates or heads may hold more than their precision can."""
    good = model.finite()
    for head in stacked_heads(model).values():
        for part in head.parameters():
            good &= part.flatten(1).isfinite().all(1)
    return (~good).nonzero().flatten().tolist()


def left(model: StackedModel | AloneModel, run: int) -> dict[str, Any]:
    """Return what a history keeps of a run of the pass: its chains, heads and what else it trained."""
    heads = {
        name: {own: value[run].detach().clone() for own, value in head.named_parameters()}
        for name, head in stacked_heads(model).items()
    }
    return {**model.left(run), "heads": heads}
