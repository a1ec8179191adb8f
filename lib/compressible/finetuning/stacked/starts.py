"""The factors from which S stacked runs start, as peft draws them for each alone; gradient_starts.py has the others."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from compressible.adapters.config import DeepLoraConfig
from compressible.finetuning.peft_models import (
    ADAPTER,
    GradientStart,
    adapted_by_peft,
    base_of,
    chain_of,
    drawn_start,
    is_taken_off,
    on_meta,
    scaling_of,
    sharing,
    starts_from_gradient,
    tuner_layers,
)
from compressible.finetuning.run import FineTuningRun
from compressible.finetuning.stacked.layers import Chain


@dataclass(frozen=True)
class Start:
    """A run's factors by layer, of the right shapes alone where they await a gradient, and their products' scale.

    taken_off: [A_0, B_0] of the layers off whose frozen weights their product is taken.
    """

    chains: dict[str, Chain]
    scalings: dict[str, float]
    taken_off: dict[str, Chain] = field(default_factory=dict)


def drawn_starts(source: nn.Module, runs: Sequence[FineTuningRun]) -> list[Start]:
    """Return what `get_peft_model` gives each run; runs that differ in their rates alone share their tensors."""
    with ThreadPoolExecutor() as pool:  # full-width orthogonal factors of a BERT take a core half a minute
        found: dict[tuple, Future | Start] = {}
        for run in runs:
            key = run_key(run)
            if key in found:
                continue
            if isinstance(run.config, DeepLoraConfig) and (run.start is None or isinstance(run.start, GradientStart)):
                layers = tuner_layers(base_of(adapted_by_peft(on_meta(source), run.config, empty=True)))
                found[key] = pool.submit(_deep, layers, int(run.seed))
            elif starts_from_gradient(run.config) or isinstance(run.start, GradientStart):
                found[key] = of_peft(source, replace(run, config=drawn_start(run.config), start=None))
            else:
                found[key] = of_peft(source, run)
        done = {key: start.result() if isinstance(start, Future) else start for key, start in found.items()}
    return [done[run_key(run)] for run in runs]


def run_key(run: FineTuningRun) -> tuple:
    """Return what runs have in common that start from the same factors, if they see the same first batch."""
    return repr(run.config), run.seed, run.start


def of_peft(source: nn.Module, run: FineTuningRun, gradients: Mapping[str, Tensor] | None = None) -> Start:
    """Return what `get_peft_model` gives a run; gradients of layers' weights, in their layout, are for LoRA-GA."""
    model = copy.deepcopy(source) if is_taken_off(run.config) else sharing(source)  # peft changes weights in place
    for name, gradient in (gradients or {}).items():
        layer: Any = model.get_submodule(name)
        layer._peft_loraga_grad = gradient  # where peft's own preprocess_loraga leaves it
    places = {name: module.weight.data_ptr() for name, module in _weighed(model)}
    adapted = adapted_by_peft(model, run.config, run.seed)
    layers = tuner_layers(base_of(adapted))
    drawn = {name: _copied(layer) for name, layer in layers.items()}
    changed = [name for name, layer in layers.items() if _is_changed(source, name, layer, places)]
    if run.start is not None:
        assert not isinstance(run.start, GradientStart)  # such runs are Deep LoRA's
        run.start(adapted, torch.Generator().manual_seed(int(run.seed)))
    chains = {name: _copied(layer) for name, layer in layers.items()}
    scalings = {name: scaling_of(layer) for name, layer in layers.items()}
    return Start(chains, scalings, {name: drawn[name] for name in changed})


def _copied(layer: Any) -> Chain:
    return [factor.detach().clone() for factor in chain_of(layer)]


def _is_changed(source: nn.Module, name: str, layer: Any, places: Mapping[str, int]) -> bool:
    """Whether peft gave the frozen layer another weight, or wrote on the one that it had."""
    given: Any = source.get_submodule(name)
    weight = layer.get_base_layer().weight
    return weight.data_ptr() != places[name] or not torch.equal(weight, given.weight)


def _weighed(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Names and modules that have a weight."""
    for name, module in model.named_modules():
        if isinstance(getattr(module, "weight", None), Tensor):
            yield name, module


def _deep(layers: dict[str, Any], seed: int) -> Start:
    """The factors that `get_peft_model` draws after torch.manual_seed(seed), from a generator of their own."""
    generator, chains = torch.Generator().manual_seed(seed), {}
    for name, layer in layers.items():
        config = layer.deep_lora_config[ADAPTER]
        chains[name] = config.start(layer.out_features, layer.in_features, layer.r[ADAPTER], generator)
    return Start(chains, dict.fromkeys(chains, 1.0))
