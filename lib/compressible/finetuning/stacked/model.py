"""One copy of a model's structure that S runs share: stacked adapters and heads, and their starts."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn

from compressible.adapters.layer import check_sizes, factor_dtype, layer_shape, replace_module, starting_factors
from compressible.adapters.targets import places, saved_modules
from compressible.finetuning.batches import PassRows
from compressible.finetuning.run import FineTuningRun, fresh_head, run_generator, sharing
from compressible.finetuning.stacked.layers import (
    Chain,
    StackedAdapter,
    StackedLinear,
    compressed_starts,
    stacked_adapters,
)
from compressible.runtime.checks import expect


def stacked_model(source: nn.Module, runs: Sequence[FineTuningRun], rows: PassRows, half: bool) -> nn.Module:
    """Return the model with stacked adapters and heads; frozen weights are shared if they need not be in half."""
    model = copy.deepcopy(source).to(torch.bfloat16) if half else sharing(source)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    configs = [run.config for run in runs]
    found = places(model, configs[0])
    layers = {name: model.get_submodule(name) for name in found}
    shapes = {name: layer_shape(layer) for name, layer in layers.items()}
    for config in configs:
        check_sizes(shapes, config)
    adapters = {name: StackedAdapter(layers[name], configs, shapes[name], rows) for name in found}
    for name, names in found.items():
        for place in names:
            replace_module(model, place, adapters[name])
    for name, _ in list(saved_modules(model, configs[0])):
        replace_module(model, name, _head(source.get_submodule(name), name, runs, rows))
    return model


def starting_chains(
    adapters: dict[str, StackedAdapter], runs: Sequence[FineTuningRun], losses: Callable[[], Tensor]
) -> list[dict[str, Chain]]:
    """Return every run's starting factors by layer: drawn, or for compressed runs from the gradient of `losses`."""
    base = next(iter(adapters.values())).base
    kind, device = factor_dtype(base), base.weight.device
    with ThreadPoolExecutor() as pool:  # orthogonal factors are drawn on the CPU: a thread a run
        starts = list(pool.map(lambda run: _moved(_drawn(run, adapters), kind, device), runs))
    which = [i for i, run in enumerate(runs) if run.config.variant == "compressed"]
    if not which:
        return starts
    generators = [run_generator(runs[i], "factors") for i in which]
    found = compressed_starts(adapters, which, losses, generators)
    return [_moved(found[i], kind, device) if i in found else start for i, start in enumerate(starts)]


def stacked_heads(model: nn.Module) -> dict[str, StackedLinear]:
    """Return the stacked heads of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, StackedLinear)}


@torch.no_grad()
def overflown(model: nn.Module, runs: int) -> list[int]:
    """Return the runs whose updates may hold more than their precision can, by the norms of the two factors."""
    adapters = stacked_adapters(model)
    good = torch.ones(runs, dtype=torch.bool, device=next(iter(adapters.values())).weight.device)
    for adapter in adapters.values():
        lower, upper = (half.double().flatten(1).norm(dim=1) for half in adapter.contracted())
        good &= lower * upper < torch.finfo(adapter.source()[0][0].dtype).max  # False for NaN
    for head in stacked_heads(model).values():
        for part in head.parameters():
            good &= part.flatten(1).isfinite().all(1)
    return (~good).nonzero().flatten().tolist()


def _head(source: nn.Module, name: str, runs: Sequence[FineTuningRun], rows: PassRows) -> StackedLinear:
    expect(f"modules_to_save {name!r}", type(source).__name__, isinstance(source, nn.Linear), "a linear layer")
    assert isinstance(source, nn.Linear)
    drawn = [fresh_head(source, run, name) for run in runs]
    biases = None if source.bias is None else [bias for _, bias in drawn]
    return StackedLinear([weight for weight, _ in drawn], biases, rows)


def _drawn(run: FineTuningRun, adapters: dict[str, StackedAdapter]) -> dict[str, Chain]:
    """A run's starting factors on the CPU, drawn in the order of the layers; empty chains for compressed."""
    generator, cpu = run_generator(run, "factors"), torch.device("cpu")
    return {
        name: starting_factors(adapter.shape, run.config, generator, cpu, adapter.embedding)
        for name, adapter in adapters.items()
    }


def _moved(starts: dict[str, Chain], kind: torch.dtype, device: torch.device) -> dict[str, Chain]:
    return {name: [factor.to(device, kind) for factor in chain] for name, chain in starts.items()}
