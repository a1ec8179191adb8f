"""Whether a factored layer could stand for a linear layer or a convolution: nothing of the layer would be lost."""

from __future__ import annotations

from torch import nn

from compressible.runtime.shared_weights import sharers

PASSES = ("__call__", "__getattr__", "_call_impl", "_wrapped_call_impl", "forward", "_conv_forward")


def check_swappable(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Raise ValueError, by name, for a layer that is more than its weight and bias, or that shares them."""
    kind = nn.Conv2d if isinstance(layer, nn.Conv2d) else nn.Linear
    if lost := _own(layer, kind) or _shared(model, layer):
        told = f"a plain {kind.__name__} with a weight and a bias of its own"
        raise ValueError(f"layer {name!r} cannot be swapped: {lost}; expected {told}")


def _own(layer: nn.Module, kind: type[nn.Module]) -> str:
    """What a layer has beyond its kind, "" for nothing; a subclass may have other ways to be made."""
    held = vars(layer)
    if isinstance(layer._parameters.get("weight"), nn.UninitializedParameter):
        return "its sizes are not known yet, before the model has run once"
    passes = [part for part in PASSES if part in held or getattr(type(layer), part, 0) is not getattr(kind, part, 0)]
    if passes:
        return f"{type(layer).__name__} has a {passes[0]} of its own"
    if "weight" not in layer._parameters or "bias" not in layer._parameters:
        return "its weight or bias is made anew in each pass, by weight_norm, pruning or a parametrisation"
    more = [*({*layer._parameters} - {"weight", "bias"}), *layer._buffers, *layer._modules]
    if more:
        return f"{type(layer).__name__} has {more[0]!r}, too"
    hooks = [part for part, value in held.items() if part.endswith("hooks") and value]
    return f"it has {hooks[0].strip('_')}" if hooks else ""


def _shared(model: nn.Module, layer: nn.Module) -> str:
    """Which other module holds the weight or bias, "" for none."""
    for of in ("weight", "bias"):
        if others := sharers(model, {"": layer}, of)[""]:
            return f"its {of} is that of {others[0]!r}, too"
    return ""
