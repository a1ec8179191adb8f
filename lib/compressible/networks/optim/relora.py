"""ReLoRA (Lialin et al., arXiv 2307.05695) on peft's LoRA layers: merge the update and start it anew, many times.

A LoRA layer computes (W + s B A) x with W (m, n) frozen, A (r, n) on the input side, B (m, r) on the output side and
s = lora_alpha / r. A restart adds s B A to W, draws A anew and sets B to zero, so that a run of many restarts can move
W by more than rank r. It goes with a learning rate that falls to zero and warms up again (`restart_schedule`) and with
moments of the optimiser that are mostly thrown away. P3's Theorem 4 is about a modification, `restart_from_gradient`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from compressible.networks.optim.galore import leading_vectors
from compressible.runtime.checks import expect

LoraLayer = Any  # a layer of peft's LoRA


def lora_layers(model: nn.Module, adapter: str = "default") -> dict[str, LoraLayer]:
    """Return {dotted name: layer} of the plain LoRA layers (linear or convolution) of a peft model.

    Raises ValueError where there is none, or one that is merged or is more than W + s B A, as DoRA's are.
    """
    from peft.tuners.lora import LoraLayer as Lora

    found = {name: module for name, module in model.named_modules() if isinstance(module, Lora)}
    layers = {name: layer for name, layer in found.items() if adapter in layer.lora_A}
    if not layers:
        raise ValueError(f"adapter is {adapter!r}, expected the name of one with linear LoRA layers in this model")
    for name, layer in layers.items():
        if layer.merged or adapter in layer.lora_variant or layer.lora_bias[adapter]:
            raise ValueError(f"layer {name} is merged, has a bias or is a variant of LoRA, expected plain W + s B A")
    return layers


@torch.no_grad()
def restart(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    keep: float = 0.001,
    prune: str = "random",
    generator: torch.Generator | None = None,
    adapter: str = "default",
) -> None:
    """Merge every LoRA layer and start it anew: W <- W + s B A, A Kaiming-uniform (a = sqrt 5), B zero.

    Args:
        model: A peft model with plain LoRA layers, in place. Its outputs do not change, but for rounding.
        optimizer: Its moments of the A and B are pruned; step counts stay, as in the authors' code. None: untouched.
        keep: Share of each moment that stays, in [0, 1]: 0.001 is the authors' reset, 0.1 with prune "magnitude" their
            other choice, 1 keeps all.
        prune: "random" keeps entries by chance, "magnitude" the largest.
        generator: Draws A, and what stays by chance; on the CPU, whatever the model's device.
        adapter: Name of peft's adapter.

    Raises:
        ValueError: For a share outside [0, 1], an unknown `prune`, or layers that are not plain LoRA.

    Example:
        >>> import peft
        >>> config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["0"])
        >>> model = peft.get_peft_model(nn.Sequential(nn.Linear(6, 3)), config)
        >>> layer = lora_layers(model)["base_model.model.0"]
        >>> _ = nn.init.ones_(layer.lora_B["default"].weight)
        >>> before = model(torch.ones(1, 6))
        >>> restart(model)
        >>> bool(layer.lora_B["default"].weight.any()), torch.allclose(before, model(torch.ones(1, 6)), atol=1e-6)
        (False, True)

    Reference:
        Algorithm 1 of arXiv 2307.05695; the authors' peft_pretraining/relora.py.
    """
    expect("keep", keep, 0 <= keep <= 1, "a share in [0, 1]")
    expect("prune", prune, prune in ("random", "magnitude"), "'random' or 'magnitude'")
    for layer in lora_layers(model, adapter).values():
        _merge(layer, adapter)
        down, up = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
        drawn = torch.empty(down.shape, dtype=torch.float64)
        down.copy_(nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator))
        for weight in (down, up):
            state = {} if optimizer is None else optimizer.state.get(weight, {})
            _prune_moments(state, weight, keep, prune, generator)


def restart_from_gradient(
    model: nn.Module, loss_step: Callable[[nn.Module], Tensor], adapter: str = "default"
) -> dict[str, Tensor]:
    """Merge every LoRA layer and start it as P3's Theorem 4 wants: B = P, A zero, B frozen from then on.

    Args:
        model: A peft model with plain LoRA layers, in place.
        loss_step: Takes the model and returns its loss () on the data of the next step; the theorem needs the gradient
            of that very step.
        adapter: Name of peft's adapter.

    Returns:
        {name: P (m, r)}, the leading left singular vectors of the gradient of each layer's merged matrix, r of them.

    Raises:
        ValueError: For layers that are not plain LoRA.

    Example:
        >>> import peft
        >>> config = peft.LoraConfig(r=1, lora_alpha=1, target_modules=["0"])
        >>> model = peft.get_peft_model(nn.Sequential(nn.Linear(4, 2, bias=False)), config)
        >>> directions = restart_from_gradient(model, lambda model: model(torch.eye(4))[:, 0].sum())
        >>> {name: vectors.abs().round(decimals=4).tolist() for name, vectors in directions.items()}
        {'base_model.model.0': [[1.0], [0.0]]}

    Reference:
        P3, Theorem 4 and its proof. With a scale s = lora_alpha / r other than 1, a gradient step on A moves W by
        s^2 times GaLore's step, and one of Adam by s times.
    """
    layers = lora_layers(model, adapter)
    for layer in layers.values():
        _merge(layer, adapter)
    gradients = _base_gradients(model, layers, loss_step)
    ranks = {name: layer.lora_B[adapter].weight.shape[1] for name, layer in layers.items()}
    directions = {name: leading_vectors(gradients[name].flatten(1), rank)[0] for name, rank in ranks.items()}
    restart_along(model, directions, adapter)
    return directions


@torch.no_grad()
def restart_along(model: nn.Module, directions: Mapping[str, Tensor], adapter: str = "default") -> None:
    """Merge every LoRA layer and start it at B = directions[name] (m, r), frozen from then on, and A zero."""
    for name, layer in lora_layers(model, adapter).items():
        _merge(layer, adapter)
        up = layer.lora_B[adapter].weight
        up.requires_grad_(False).copy_(directions[name].reshape(up.shape))
        up.grad = None
        layer.lora_A[adapter].weight.zero_()


def restart_factor(
    step: int, *, steps: int, restart_every: int, warmup: int, restart_warmup: int, least: float
) -> float:
    """Return what the learning rate is multiplied by at `step`: a cosine to `least`, with a ramp after each restart."""
    if step < warmup:
        return step / warmup
    share = min(1.0, (step - warmup) / max(1, steps - warmup))
    cosine = least + (1 - least) * (1 + math.cos(math.pi * share)) / 2
    since = step % restart_every
    return cosine * min(1.0, since / restart_warmup) if step >= restart_every and restart_warmup else cosine


def restart_schedule(
    optimizer: torch.optim.Optimizer,
    *,
    steps: int,
    restart_every: int,
    warmup: int = 0,
    restart_warmup: int = 100,
    least: float = 0.1,
) -> torch.optim.lr_scheduler.LambdaLR:
    """Return ReLoRA's schedule: one cosine over the run that drops to zero at each restart and warms up again.

    Args:
        optimizer: Its groups' rates are multiplied.
        steps: Steps of the whole run.
        restart_every: Steps between restarts; the authors take 1000 to 5000.
        warmup: Steps of the first warm-up, at most `restart_every`; 500 there.
        restart_warmup: Steps of the ramp after each restart, below `restart_every`; 50 to 100 there.
        least: Share of the rate at the end of the cosine.

    Returns:
        A scheduler; call its `step` after each of the optimiser's.

    Raises:
        ValueError: For a warm-up longer than the period.

    Example:
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        >>> schedule = restart_schedule(optimizer, steps=8, restart_every=4, restart_warmup=2)
        >>> rates = []
        >>> for _ in range(8):
        ...     rates.append(round(optimizer.param_groups[0]["lr"], 2))
        ...     optimizer.step()
        ...     schedule.step()
        >>> rates
        [1.0, 0.97, 0.87, 0.72, 0.0, 0.19, 0.23, 0.13]

    Reference:
        Section 3 of arXiv 2307.05695. In the authors' code the ramp ends on the cosine too, but aims at its height at
        the restart.
    """
    if not (0 <= warmup <= restart_every and 0 <= restart_warmup < restart_every):
        found = f"warmup is {warmup} and restart_warmup {restart_warmup}"
        raise ValueError(f"{found}, expected at most, and fewer than, restart_every = {restart_every}")
    shape = {"steps": steps, "restart_every": restart_every, "warmup": warmup, "restart_warmup": restart_warmup}
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: restart_factor(step, least=least, **shape))


@torch.no_grad()
def _merge(layer: LoraLayer, adapter: str) -> None:
    """W <- W + s B A, after which B is zero, so that the layer computes what it did."""
    layer.get_base_layer().weight.add_(layer.get_delta_weight(adapter))
    layer.lora_B[adapter].weight.zero_()


def _base_gradients(
    model: nn.Module, layers: dict[str, LoraLayer], loss_step: Callable[[nn.Module], Tensor]
) -> dict[str, Tensor]:
    """Gradients of the frozen weights, outputs first, whatever layout the layers keep them in."""
    weights = [layer.get_base_layer().weight for layer in layers.values()]
    wanted = [weight.requires_grad for weight in weights]
    for weight in weights:
        weight.requires_grad_(True)
    try:
        with torch.enable_grad():
            found = torch.autograd.grad(loss_step(model), weights)
    finally:
        for weight, want in zip(weights, wanted, strict=True):
            weight.requires_grad_(want)
    turned = [getattr(layer, "fan_in_fan_out", False) for layer in layers.values()]
    return {name: g.mT if turn else g for name, g, turn in zip(layers, found, turned, strict=True)}


def _prune_moments(
    state: dict[str, Any], weight: Tensor, keep: float, prune: str, generator: torch.Generator | None
) -> None:
    """Set to zero what does not stay of every entry of a parameter's state that has its shape."""
    for moment in state.values():
        if isinstance(moment, Tensor) and moment.shape == weight.shape and keep < 1:
            if prune == "random":
                stays = torch.rand(weight.shape, generator=generator).to(weight.device) < keep
            else:
                largest = moment.abs().flatten().topk(round(keep * moment.numel())).indices
                stays = torch.zeros_like(moment, dtype=torch.bool).flatten().index_fill_(0, largest, True)
                stays = stays.view(moment.shape)
            moment.mul_(stays)
