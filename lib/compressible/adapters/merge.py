"""Adapters into the weights: the plain model with the updates in it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from compressible.adapters.layer import Adapter, adapted, replace_module, tied_layers

ROUNDINGS = 4  # of a weight in half precision, by which a merged model may differ


@torch.no_grad()
def merge_and_unload(
    model: nn.Module, inputs: Mapping | Tensor | tuple | None = None, tolerance: float | None = None
) -> nn.Module:
    """Add every update to its layer's weight, in float32 at least, and take the adapters out; changed in place.

    With `inputs`, what the model is called with (keyword arguments, a tensor or a tuple), its first output is compared
    before and after, in evaluation mode. Raises RuntimeError, and leaves the model as it was, where they differ by more
    than `tolerance` of the largest value (by default 1e-4, or four roundings of a weight in half precision), and where
    a layer without adapter shares an adapted weight.
    """
    model = adapted(model)
    for name, other in tied_layers(model).items():
        raise RuntimeError(f"{name!r} shares its weight with {other!r}, which would change, too: untie them first")
    before = None if inputs is None else _evaluated(model, inputs)
    places = [(name, part) for name, part in model.named_modules(remove_duplicate=False) if isinstance(part, Adapter)]
    found = {id(adapter): adapter for _, adapter in places}.values()
    kept = [] if inputs is None else [adapter.weight.clone() for adapter in found]
    for adapter in found:
        adapter.weight.copy_(merged_weight(adapter))
    for name, adapter in places:
        replace_module(model, name, adapter.base)
    if before is not None:
        off = ((_evaluated(model, inputs) - before).abs().max() / before.abs().max()).item()
        allowed = _allowed(kept) if tolerance is None else tolerance
        if not off <= allowed:
            for name, adapter in places:
                replace_module(model, name, adapter)
            for adapter, weight in zip(found, kept, strict=True):
                adapter.weight.copy_(weight)
            raise RuntimeError(f"the merged model differs by {off:.2g} of its largest output, expected {allowed:.2g}")
    del model.deep_lora_config
    return model


@torch.no_grad()
def merged_weight(adapter: Adapter) -> Tensor:
    """Return weight plus update in the weight's own layout and precision, summed in float32 at least."""
    update, weight = adapter.update(), adapter.weight
    kind = torch.promote_types(weight.dtype, torch.float32)
    return (weight.to(kind) + (update.mT if adapter.transposed else update)).to(weight.dtype)


def first_output(output: object) -> Tensor:
    """Return logits, or else the first tensor, of what a model returned."""
    if isinstance(output, Tensor):
        return output
    logits = getattr(output, "logits", None)
    return logits if logits is not None else next(value for value in tuple(output) if isinstance(value, Tensor))


def _evaluated(model: nn.Module, inputs: Mapping | Tensor | tuple) -> Tensor:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        if isinstance(inputs, Mapping):
            return first_output(model(**inputs))
        if isinstance(inputs, (tuple, list)):
            return first_output(model(*inputs))
        if isinstance(inputs, Tensor):
            return first_output(model(inputs))
    finally:
        for module, training in modes.items():
            module.training = training
    raise ValueError(f"inputs is {type(inputs).__name__}, expected keyword arguments, a tensor or a tuple")


def _allowed(weights: list[Tensor]) -> float:
    return max([1e-4, *(ROUNDINGS * torch.finfo(w.dtype).eps for w in weights if w.dtype.itemsize < 4)])
