"""Adapters into the weights: the plain model with the updates in it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from compressible.adapters.layer import Adapter, adapted, is_transposed, replace_module, tied_layers

ROUNDINGS = 4  # of a weight in half precision, by which a merged model may differ


@torch.no_grad()
def merge_and_unload(
    model: nn.Module, inputs: Mapping | Tensor | tuple | None = None, tolerance: float | None = None
) -> nn.Module:
    """Add every update to its layer's weight, in float32 at least, and take the adapters out; changed in place.

    Args:
        model: of `get_deep_lora_model`, trained.
        inputs: what the model is called with (keyword arguments, a tensor or a tuple), to compare its first output
            before and after, in evaluation mode; by default nothing is compared.
        tolerance: by how much of the largest value they may differ; by default 1e-4, or four roundings of a weight in
            half precision.

    Returns:
        The plain model, whose weights hold the updates.

    Raises:
        RuntimeError: where the outputs differ by more, with the model as it was, and where a layer without adapter
            shares an adapted weight.

    Example:
        >>> import compressible as cd
        >>> import torch
        >>> from torch import nn
        >>> config = cd.DeepLoraConfig(r=2, variant="thin")
        >>> model = cd.get_deep_lora_model(nn.Sequential(nn.Linear(8, 4)), config)
        >>> cd.merge_and_unload(model, inputs=torch.ones(3, 8))
        Sequential(
          (0): Linear(in_features=8, out_features=4, bias=True)
        )

    Reference:
        Hu et al. 2021, LoRA, section 4.1: no cost at inference.
    """
    model = adapted(model)
    for name, other in tied_layers(model).items():
        raise RuntimeError(f"{name!r} shares its weight with {other!r}, which would change, too: untie them first")
    before = _evaluated(model, inputs)
    places = [(name, part) for name, part in model.named_modules(remove_duplicate=False) if isinstance(part, Adapter)]
    found = {id(adapter): adapter for _, adapter in places}.values()
    kept = [] if inputs is None else [adapter.weight.clone() for adapter in found]
    for adapter in found:
        adapter.weight.copy_(merged_weight(adapter))
    for name, adapter in places:
        replace_module(model, name, adapter.base)
    after = _evaluated(model, inputs)
    if before is not None and after is not None:
        off = ((after - before).abs().max() / before.abs().max()).item()
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
    return (weight.to(kind) + (update.mT if is_transposed(adapter.base) else update)).to(weight.dtype)


def first_output(output: Any) -> Tensor:
    """Return logits, or else the first tensor, of what a model returned."""
    if isinstance(output, Tensor):
        return output
    logits = getattr(output, "logits", None)
    return logits if logits is not None else next(value for value in tuple(output) if isinstance(value, Tensor))


def _evaluated(model: nn.Module, inputs: Mapping | Tensor | tuple | None) -> Tensor | None:
    if inputs is None:
        return None
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
