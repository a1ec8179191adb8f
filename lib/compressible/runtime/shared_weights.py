"""Who holds a weight, and who computes with it: what a change to one layer's output alone would miss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

# What may be asked of a weight without computing with it.
ABOUT = {
    *("dtype", "device", "shape", "ndim", "layout", "itemsize", "nbytes", "requires_grad", "grad", "is_cuda", "is_cpu"),
    *("is_meta", "is_quantized", "size", "dim", "stride", "numel", "data_ptr", "is_contiguous", "is_floating_point"),
}


def sharers(model: nn.Module, layers: Mapping[str, nn.Module], of: str = "weight") -> dict[str, list[str]]:
    """Return, for each layer by name, the names of the other modules that hold its weight, or its bias."""
    holders: dict[int, list[tuple[str, nn.Module]]] = {}
    for name, part in model.named_modules():
        for parameter in {id(p) for p in part._parameters.values() if p is not None}:
            holders.setdefault(parameter, []).append((name, part))
    held = {name: holders.get(id(getattr(layer, of, None)), []) for name, layer in layers.items()}
    return {name: [at for at, part in held[name] if part is not layer] for name, layer in layers.items()}


def untie(model: nn.Module, layers: Mapping[str, Any]) -> list[str]:
    """Give layers weights of their own where other modules share them; return those layers' names."""
    shared = [name for name, others in sharers(model, layers).items() if others]
    for name in shared:
        weight = layers[name].weight
        layers[name].weight = nn.Parameter(weight.detach().clone(), weight.requires_grad)
    return shared


def stacked_weights(model: nn.Module) -> list[str]:
    """Return the names of parameters (E, ., .) that are many layers' weights, as those of fused experts."""
    named = [(name, key, part) for name, part in model.named_modules() for key in part._parameters]
    stacks = [(f"{name}.{key}", part._parameters[key]) for name, key, part in named if not isinstance(part, _ConvNd)]
    return [name for name, p in stacks if p is not None and p.ndim == 3 and len(p) > 1]


class WeightWatch(TorchFunctionMode):
    """RuntimeError where a model computes with a weight that a layer lent, which misses what the layer adds to it."""

    current: ClassVar[WeightWatch | None] = None

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.lent: dict[int, tuple[Tensor, nn.Module]] = {}  # aliases by their id, and whose they are

    @classmethod
    def lend(cls, weight: Tensor, owner: nn.Module) -> Tensor:
        """Return a frozen weight as one whose use is seen, where a watch is on; else the weight itself."""
        if cls.current is None or not isinstance(weight, nn.Parameter) or weight.requires_grad:
            return weight
        alias = weight.detach()
        cls.current.lent[id(alias)] = alias, owner
        return alias

    def __enter__(self) -> Any:
        WeightWatch.current = self
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        WeightWatch.current = None
        super().__exit__(*error)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = tree_leaves((args, kwargs)) if self.lent else ()
        used = [self.lent[id(leaf)][1] for leaf in given if id(leaf) in self.lent]
        asked = func.__self__ if func.__name__ == "__get__" else func
        if used and asked.__name__ not in ABOUT:
            name = next(name for name, part in self.model.named_modules() if part is used[0])
            leave = "name it in exclude_modules"
            raise RuntimeError(
                f"the model computes with the weight of {name!r} itself, which misses its update: {leave}"
            )
        return func(*args, **(kwargs or {}))
