"""Which models can be stacked, their parameters as stacks, and by the rate that they learn at."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from compressible.networks.layers import FactoredConv2d
from compressible.networks.likeness import first_difference
from compressible.networks.optim.rules import Rule
from compressible.runtime.checks import expect

Named = dict[str, Tensor]
TINY, MANY = 50_000, 10  # on a CPU one by one is faster for larger or fewer networks: a batch stays in its cache


def together(models: Sequence[nn.Module], stacked: bool | str, device: str) -> bool:
    """Whether models, in training mode, train as one stack; ValueError where that is asked for and cannot be."""
    modules = list(models[0].modules())
    kept = [type(m).__name__ for m in modules if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    expect("stacked", stacked, not (stacked is True and kept), "False for networks with batch norm, whose means change")
    if len(models) == 1 or not stacked:
        return False
    if stacked == "auto":
        tiny = sum(parameter.numel() for parameter in models[0].parameters()) < TINY and len(models) >= MANY
        convolutions = any(isinstance(module, (nn.Conv2d, FactoredConv2d)) for module in modules)
        return not kept and not convolutions and (tiny or device != "cpu") and not _unlike(models)
    told = "False for networks that differ in more than the values of parameters and buffers"
    expect("stacked", stacked, not (found := _unlike(models)), f"{told}: {found}")
    return True


def _unlike(models: Sequence[nn.Module]) -> str:
    """The first model that the first one's pass would not be right for, and why; "" where there is none."""
    for index, model in enumerate(models[1:], 1):
        if found := first_difference(models[0], model):
            return f"of model {index} {found} as of model 0"
    return ""


def stack(models: list[nn.Module], names: set[str]) -> Named:
    """Stacked parameters (S, ...); every model's own become views of them."""
    found = [dict(model.named_parameters()) for model in models]
    stacked = {}
    for name in found[0]:
        if name in names:
            stacked[name] = torch.stack([parameters[name].detach() for parameters in found])
            for index, parameters in enumerate(found):
                parameters[name].data = stacked[name][index]
    return stacked


def own(model: nn.Module, names: set[str]) -> Named:
    """One model's trained parameters, as they are."""
    return {name: parameter for name, parameter in model.named_parameters() if name in names}


def shared_or_stacked(models: list[nn.Module], names: set[str]) -> tuple[Named, dict[str, int | None]]:
    """What is not trained: once where it is the same in all models, such as a graph, else stacked (S, ...)."""
    found = [dict(model.named_parameters()) | dict(model.named_buffers()) for model in models]
    fixed: Named = {}
    dims: dict[str, int | None] = {}
    for name, first in found[0].items():
        if name not in names:
            same = all(torch.equal(first, other[name]) for other in found[1:])
            dims[name] = None if same else 0
            fixed[name] = first.detach() if same else torch.stack([other[name].detach() for other in found])
    return fixed, dims


def by_rate(
    names: list[str], rates: Sequence[float], outer: set[str], ratio: float, rule: Rule
) -> dict[tuple[float, bool, float], list[tuple[str, int | None]]]:
    """Parameters by rate and weight decay: whole stacks where all models share a rate, else the models' slices."""
    groups: dict[tuple[float, bool, float], list[tuple[str, int | None]]] = {}
    models: list[int | None] = [None] if len(set(rates)) == 1 else list(range(len(rates)))
    for index in models:
        for name in names:
            faster = name in outer and ratio != 1
            rate = rates[index or 0] * (ratio if faster else 1)
            groups.setdefault((rate, faster, rule.decay_of(name)), []).append((name, index))
    return groups
