"""Parameters of several models as stacks, and by the rate that they learn at."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from compressible.networks.optim.rules import Rule

Named = dict[str, Tensor]


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
