"""A module in the place of another, which it holds as its base layer: what a model asks of it, the base may tell."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from compressible.runtime.shared_weights import WeightWatch


class StandIn(nn.Module):
    """Passes on to the base layer what a model reads from, or ties to, a layer that was there before."""

    base_layer: Any
    get_base_layer: Callable[[], Any]

    @property
    def weight(self) -> Tensor:
        """The base layer's weight, which some models read for its type or its device, as the first pass makes sure."""
        return WeightWatch.lend(self.get_base_layer().weight, self)

    def __getattr__(self, name: str) -> Any:
        """What the layer has not, its base may tell, such as num_embeddings."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer" or name.startswith("_"):
                raise
            return getattr(self.base_layer, name)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Hand a weight that is tied to this layer's name to the base layer, as transformers' tie_weights means it."""
        if name in ("weight", "bias"):
            setattr(self.get_base_layer(), name, param)
        else:
            super().register_parameter(name, param)
