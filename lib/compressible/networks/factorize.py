"""Swap layers of any network, found by name as peft finds its targets, for deep-linear or compressed ones."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from compressible.networks import starts
from compressible.networks.layers import FACTORED, FactoredConv2d, FactoredLinear, weight_matrix
from compressible.networks.swappable import check_swappable
from compressible.recovery.checks import expect_depth
from compressible.recovery.factors import Factors
from compressible.runtime.checks import (
    closest,
    expect,
    expect_function,
    expect_generator,
    is_integer,
    is_number,
    unknown,
)

VARIANTS = ("plain", "deep", "compressed")
LossStep = Callable[[nn.Module], Tensor]


def factorize(
    model: nn.Module,
    target_modules: str | Sequence[str],
    variant: str = "compressed",
    *,
    depth: int = 3,
    width: int | None = None,
    init_scale: float = 0.5,
    start: str = "orthogonal",
    loss_step: LossStep | None = None,
    generator: torch.Generator | None = None,
) -> list[str]:
    """Swap the named linear layers and convolutions of a network, in place, for factored ones W_L ... W_1; keep biases.

    Factors of a weight that is not trained are not trained either. What a factored layer could not stand for is
    refused, before any change: a forward pass, parameters or hooks of a layer's own, and a weight or bias that is made
    anew in each pass or that another module holds, too.

    Args:
        model: the network, changed in place.
        target_modules: names of layers, or ends of names ("output.dense" in every block), as peft's; one string is a
            regular expression that must match the whole name.
        variant: "plain" changes nothing and returns the names, "deep" uses full width, "compressed" the given width.
        depth: L, number of factors, at least 2, usually 3; "weights_and_gradient" needs 3.
        width: k, the inner width; of "deep" min(m, n) unless given. Of "compressed" at most min(m, n), usually twice
            the number of classes.
        init_scale: eps > 0, every factor's scale, usually 0.1 to 1: the product starts at eps^L. Not used by
            "weights_and_gradient", which keeps the initial weights' own scale.
        start: "orthogonal", random; "gradient": [eps V^T, eps I, ..., eps U] on the top singular vectors of -dLoss/dW
            at the layer's initial weights W; "weights_and_gradient": bases from W and its gradient (the width is even),
            between them the projection of W.
        loss_step: maps the model to its loss on a batch, for the two starts that need a gradient; called once, in
            the mode (training or not) that the model is in.
        generator: of the random start, on the CPU; seeded with 0 unless given.

    Returns:
        The names of the layers, in the model's order.

    Raises:
        ValueError: for a name that no layer has (with the nearest that one has), a layer that cannot be swapped, a
            value out of range, a gradient start without `loss_step`, or a gradient that is zero or not finite.

    Example:
        >>> import torch, compressible as cd
        >>> net = torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.ReLU(), torch.nn.Linear(6, 3))
        >>> cd.factorize(net, ["0"], "compressed", width=2)
        ['0']
        >>> [tuple(factor.shape) for factor in net[0].factors]
        [(2, 6), (2, 2), (6, 2)]

    Reference:
        P2, nonlinear networks: "+DLN" is "deep", "+C-DLN" is "compressed" of the penultimate matrix.
    """
    _check(variant, depth, width, init_scale, start, loss_step)
    expect_generator(generator)
    layers = find_layers(model, target_modules)
    if variant == "plain":
        return list(layers)
    for name, layer in layers.items():
        check_swappable(model, name, layer)
    widths = {name: _width(name, layer, variant, width, start) for name, layer in layers.items()}
    gradients = _gradients(model, layers, loss_step) if start != "orthogonal" else {}
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    for name, layer in layers.items():
        weight = weight_matrix(layer).detach()
        factors = _start(start, weight, gradients.get(name), depth, widths[name], init_scale, generator)
        parent = model.get_submodule(name.rpartition(".")[0])
        setattr(parent, name.rpartition(".")[2], _factored(layer, [factor.to(weight) for factor in factors]))
    return list(layers)


def find_layers(model: nn.Module, target_modules: str | Sequence[str]) -> dict[str, nn.Module]:
    """Return the linear layers and convolutions that are meant, by name; ValueError where there are none."""
    expect("type of model", type(model).__name__, isinstance(model, nn.Module), "a torch.nn.Module")
    modules = dict(model.named_modules(remove_duplicate=False))
    matrices: dict[str, nn.Module] = {}
    matrices |= {name: module for name, module in modules.items() if isinstance(module, (nn.Linear, nn.Conv2d))}
    if isinstance(target_modules, str):
        found = {name: module for name, module in matrices.items() if _matches(target_modules, name)}
        hint = closest(target_modules, matrices)
        expect("target_modules", target_modules, bool(found), f"an expression that matches a matrix's name{hint}")
    else:
        ends = _names(target_modules)
        meant = [_ending(end, matrices, modules) for end in ends]
        found = {name: module for name, module in matrices.items() if any(name in names for names in meant)}
    for name, module in found.items():
        _check_layer(model, name, module, modules)
    return found


def _matches(expression: str, name: str) -> bool:
    try:
        return re.fullmatch(expression, name) is not None
    except re.error as error:
        raise ValueError(f"target_modules is {expression!r}, expected a regular expression: {error}") from error


def _names(target_modules: Any) -> list[str]:
    told = "at least one name of a layer, or a regular expression"
    odd = isinstance(target_modules, (bytes, Mapping)) or getattr(target_modules, "ndim", 1) != 1
    listed = isinstance(target_modules, Iterable) and not odd
    names = list(target_modules) if listed else []
    holds = len(names) > 0 and all(isinstance(name, str) for name in names)
    expect("target_modules", names if listed else target_modules, holds, told)
    return names


def _ending(end: str, matrices: dict[str, nn.Module], modules: dict[str, nn.Module]) -> list[str]:
    names = [name for name in matrices if name == end or name.endswith(f".{end}")]
    if not names and end in modules:
        kind = "factored already" if isinstance(modules[end], FACTORED) else type(modules[end]).__name__
        raise ValueError(f"layer {end!r} is {kind}, expected Linear or Conv2d")
    if not names:
        raise ValueError(unknown("layer", end, matrices))
    return names


def _check_layer(model: nn.Module, name: str, layer: nn.Module, modules: dict[str, nn.Module]) -> None:
    shared = [other for other, module in modules.items() if module is layer and other != name]
    expect("layer", name, not shared, f"one that the model uses under one name; it is {', '.join(shared)}, too")
    parent = model.get_submodule(name.rpartition(".")[0])
    whole = "expected one that is called"
    if isinstance(parent, (nn.MultiheadAttention, nn.TransformerEncoderLayer)) or name == "":
        where = f"its {type(parent).__name__} may read its weight without calling it" if name else "it is the model"
        raise ValueError(f"layer {name!r} cannot be swapped: {where}, {whole}")
    if isinstance(layer, nn.Conv2d) and (layer.groups != 1 or layer.padding_mode != "zeros"):
        kind = f"{layer.groups} groups and padding {layer.padding_mode!r}"
        raise ValueError(f"convolution {name!r} has {kind}, expected one group and zeros")


def _check(variant: str, depth: int, width: int | None, scale: float, start: str, loss_step: LossStep | None) -> None:
    for kind, name, known in (("variant", variant, VARIANTS), ("start", start, starts.STARTS)):
        expect(f"type of {kind}", type(name).__name__, isinstance(name, str), f"a name: {', '.join(known)}")
        if name not in known:
            raise ValueError(f"{unknown(kind, name, known)}, expected one of {', '.join(known)}")
    least = 3 if start == "weights_and_gradient" else 2
    expect("depth", depth, is_integer(depth) and depth >= least, f"an integer >= {least} for the start {start!r}")
    expect_depth(depth)
    expect("init_scale", scale, is_number(scale, 0), "a finite number > 0 (usually 0.1 to 1)")
    expect("width", width, width is None or (is_integer(width) and width >= 1), "an integer >= 1 or None")
    expect("width", width, variant != "compressed" or width is not None, "one for the variant 'compressed'")
    needs = variant != "plain" and start != "orthogonal"
    expect("loss_step", loss_step, loss_step is not None or not needs, f"a function for the start {start!r}")
    if loss_step is not None:
        expect_function("loss_step", loss_step, "a function that maps the model to its loss")


def _width(name: str, layer: nn.Module, variant: str, width: int | None, start: str) -> int:
    m, n = weight_matrix(layer).shape
    chosen = min(m, n) if width is None else width
    bounded = variant == "compressed" or start != "orthogonal"
    what = f"width of {name!r}"
    expect(what, chosen, not bounded or chosen <= min(m, n), f"at most min(m, n) = {min(m, n)}")
    expect(what, chosen, start != "weights_and_gradient" or chosen % 2 == 0, "an even number, 2r, for this start")
    return chosen


def _gradients(model: nn.Module, layers: dict[str, nn.Module], loss_step: LossStep | None) -> dict[str, Tensor]:
    """dLoss/dW (m, n) of every layer by one backward pass that leaves no .grad behind."""
    assert loss_step is not None  # _check has seen to it
    weights = [layer.get_parameter("weight") for layer in layers.values()]
    frozen = [weight for weight in weights if not weight.requires_grad]
    try:
        for weight in frozen:
            weight.requires_grad_(True)
        with torch.enable_grad():
            found = torch.autograd.grad(_loss(loss_step(model)), weights, allow_unused=True)
    finally:
        for weight in frozen:
            weight.requires_grad_(False)
    for name, gradient in zip(layers, found, strict=True):
        if gradient is None or not gradient.isfinite().all() or not gradient.any():
            kind = "no" if gradient is None else "a zero" if not gradient.any() else "an infinite"
            raise ValueError(f"layer {name!r} has {kind} gradient at its start, expected a finite one from loss_step")
    return {name: gradient.flatten(1) for name, gradient in zip(layers, found, strict=True) if gradient is not None}


def _loss(loss: object) -> Tensor:
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
        given = f"a tensor {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"loss_step returned {given}, expected one number that depends on the layers")
    return loss.reshape(())


def _start(
    start: str,
    weight: Tensor,
    gradient: Tensor | None,
    depth: int,
    width: int,
    scale: float,
    generator: torch.Generator,
) -> Factors:
    if gradient is None:
        return starts.orthogonal((weight.shape[0], weight.shape[1]), depth, width, scale, generator)
    if start == "gradient":
        return starts.from_gradient(gradient, depth, width, scale)
    return starts.from_weights_and_gradient(weight, gradient, depth, width)


def _factored(layer: nn.Module, factors: Factors) -> nn.Module:
    """The factored layer, trained where the layer is, in its mode."""
    bias = None if layer.bias is None else layer.get_parameter("bias").detach()
    new: FactoredLinear | FactoredConv2d
    if isinstance(layer, nn.Conv2d):
        kernel, stride, dilation = ((pair[0], pair[1]) for pair in (layer.kernel_size, layer.stride, layer.dilation))
        padding = layer.padding if isinstance(layer.padding, str) else (layer.padding[0], layer.padding[1])
        new = FactoredConv2d(factors, bias, kernel, stride, padding, dilation)
    else:
        new = FactoredLinear(factors, bias)
    new.factors.requires_grad_(layer.get_parameter("weight").requires_grad)
    if new.bias is not None:
        new.bias.requires_grad_(layer.get_parameter("bias").requires_grad)
    return new.train(layer.training)
