"""The factors from which S stacked runs start, as peft draws them for each alone; gradient_starts.py has the others."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
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
    drawn_start,
    is_of_weights,
    is_taken_off,
    on_meta,
    scaling_of,
    sharing,
    starts_from_gradient,
    tuner_layers,
)
from compressible.finetuning.run import FineTuningRun
from compressible.finetuning.stacked.layers import Chain
from compressible.finetuning.stacked.redrawn import Redrawn, copied, is_redrawable
from compressible.runtime.orthogonal_batches import OrthogonalBatches


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
    different = {run_key(run): run for run in runs}
    deep = {key: run for key, run in different.items() if _is_deep(run)}
    found = _by_peft(source, {key: run for key, run in different.items() if key not in deep})
    layers: dict[str, dict[str, Any]] = {}
    for config in {repr(run.config): run.config for run in deep.values()}.values():
        layers[repr(config)] = tuner_layers(base_of(adapted_by_peft(on_meta(source), config, empty=True)))
    batches = OrthogonalBatches(next(source.parameters()).device)
    with batches, ThreadPoolExecutor(batches.threads) as pool:
        sent = {key: pool.submit(_deep, layers[repr(run.config)], run.seed, batches) for key, run in deep.items()}
        found |= {key: start.result() for key, start in sent.items()}
    return [found[run_key(run)] for run in runs]


def _is_deep(run: FineTuningRun) -> bool:
    """Whether factors are Deep LoRA's own, which may be drawn without a model of peft's."""
    return isinstance(run.config, DeepLoraConfig) and (run.start is None or isinstance(run.start, GradientStart))


def _by_peft(source: nn.Module, runs: Mapping[tuple, FineTuningRun]) -> dict[tuple, Start]:
    """What peft draws, or what stands for it until a gradient is known."""
    groups: dict[tuple, dict[tuple, FineTuningRun]] = {}
    for key, run in runs.items():
        plain = _without_gradient(run)
        groups.setdefault((repr(plain.config), plain.start), {})[key] = plain
    return {key: start for group in groups.values() for key, start in _of_seeds(source, group).items()}


def _of_seeds(source: nn.Module, runs: Mapping[tuple, FineTuningRun]) -> dict[tuple, Start]:
    """The starts of runs that differ in their seeds alone, in one model where that does."""
    first, *others = runs.values()
    if others and is_redrawable(first):
        model = Redrawn(source, first)
        if model.holds:
            return {key: Start(*model.drawn(run)) for key, run in runs.items()}
    start = of_peft(source, first)
    if _is_seedless(source, first, start):
        return dict.fromkeys(runs, start)
    return dict(zip(runs, [start, *(of_peft(source, run) for run in others)], strict=True))


def _is_seedless(source: nn.Module, run: FineTuningRun, start: Start) -> bool:
    """Whether factors are of the frozen weights alone, which peft does not read of embeddings."""
    embeddings = any(isinstance(source.get_submodule(name), nn.Embedding) for name in start.chains)
    return is_of_weights(run.config) and run.start is None and not embeddings


def _without_gradient(run: FineTuningRun) -> FineTuningRun:
    """The run, without a start that reads a first gradient."""
    if starts_from_gradient(run.config) or isinstance(run.start, GradientStart):
        return replace(run, config=drawn_start(run.config), start=None)
    return run


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
    drawn = {name: copied(layer) for name, layer in layers.items()}
    changed = [name for name, layer in layers.items() if _is_changed(source, name, layer, places)]
    if run.start is not None:
        assert not isinstance(run.start, GradientStart)  # such runs are Deep LoRA's
        run.start(adapted, torch.Generator().manual_seed(int(run.seed)))
    chains = {name: copied(layer) for name, layer in layers.items()}
    scalings = {name: scaling_of(layer) for name, layer in layers.items()}
    return Start(chains, scalings, {name: drawn[name] for name in changed})


def _is_changed(source: nn.Module, name: str, layer: Any, places: Mapping[str, int]) -> bool:
    """Whether peft gave the frozen layer another weight, or wrote on the one that it had."""
    given: Any = source.get_submodule(name)
    weight = layer.get_base_layer().weight
    if weight.data_ptr() == given.weight.data_ptr():  # a look at every number would take a quarter of the time
        return False
    return weight.data_ptr() != places[name] or not torch.equal(weight, given.weight)


def _weighed(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Names and modules that have a weight."""
    for name, module in model.named_modules():
        if isinstance(getattr(module, "weight", None), Tensor):
            yield name, module


def _deep(layers: dict[str, Any], seed: int, batches: OrthogonalBatches) -> Start:
    """The factors that `get_peft_model` draws after torch.manual_seed(seed), from a generator of their own."""
    generator = torch.Generator().manual_seed(int(seed))
    config: DeepLoraConfig = next(iter(layers.values())).deep_lora_config[ADAPTER]
    sizes = {name: (layer.out_features, layer.in_features, layer.r[ADAPTER]) for name, layer in layers.items()}
    if config.variant == "compressed":
        chains = {name: config.start(*size, generator) for name, size in sizes.items()}
    else:
        shapes = {name: config.chain(*size) for name, size in sizes.items()}
        drawn = iter(batches.draw([shape for chain in shapes.values() for shape in chain], generator))
        chains = {name: [config.init_scale * next(drawn) for _ in chain] for name, chain in shapes.items()}
    return Start(chains, dict.fromkeys(chains, 1.0))
