"""Whether a layer computes x W^T + b, or looks its rows up, with a weight of its own, and is really called for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

KINDS = (nn.Linear, nn.Embedding, Conv1D)
PLAIN = tuple(kind.forward for kind in KINDS)
LEAVE = "name it in exclude_modules"


def check_plain(model: nn.Module, name: str, layer: nn.Module, quantised: str | None = None) -> None:
    """Raise ValueError, by name, where adding to a layer's output would not be what adding to its weight is.

    quantised: what a quantised layer computes, such as "linear"; None for a layer whose weight is what it seems.
    """
    base: Any = layer
    kind = type(base).__name__
    if isinstance(getattr(base, "weight", None), nn.UninitializedParameter):
        raise ValueError(f"target {name!r} is {kind}, whose sizes are not known yet: run the model once first")
    if not isinstance(base, KINDS) and quantised != "linear":
        raise ValueError(f"target {name!r} is {kind}, expected nn.Linear, Conv1D or nn.Embedding: {LEAVE}")
    if quantised is None and ("weight" not in base._parameters or getattr(base, "max_norm", None) is not None):
        why = "weight_norm, pruning, a parametrisation or max_norm makes its weight anew in each pass; undo that"
        raise ValueError(f"target {name!r}: {why}, or {LEAVE}")
    own = type(base).forward not in PLAIN or "forward" in vars(base) or base._forward_hooks or base._forward_pre_hooks
    if quantised is None and own and not _as_its_base_class(base):
        raise ValueError(f"target {name!r} is {kind}, whose own forward pass or hooks change what it gives: {LEAVE}")
    _check_called(model, name)


def _check_called(model: nn.Module, name: str) -> None:
    """Raise ValueError where PyTorch reads a layer's weight in the place of calling the layer."""
    parent = model.get_submodule(name.rpartition(".")[0])
    if isinstance(parent, nn.MultiheadAttention):
        raise ValueError(f"target {name!r}: nn.MultiheadAttention reads its weight without calling it; {LEAVE}")
    if isinstance(parent, nn.TransformerEncoderLayer) and torch.backends.mha.get_fastpath_enabled():
        switch = "call torch.backends.mha.set_fastpath_enabled(False) first"
        raise ValueError(f"target {name!r}: nn.TransformerEncoderLayer may not call it; {switch}, or {LEAVE}")


@torch.no_grad()
def _as_its_base_class(layer: Any) -> bool:
    """Whether a subclass of nn.Linear, Conv1D or nn.Embedding computes what its base class does, tried on two rows."""
    weight, was = layer.weight, layer.training
    if weight.is_meta:
        return True
    n = weight.shape[1 if isinstance(layer, nn.Linear) else 0]
    try:
        if isinstance(layer.eval(), nn.Embedding):
            ids = torch.tensor([[0, n - 1]], device=weight.device)
            expected, got = functional.embedding(ids, weight) * getattr(layer, "embed_scale", 1.0), layer(ids)
        else:
            rows = torch.linspace(-1, 1, 2 * n, device=weight.device, dtype=weight.dtype).reshape(2, n)
            expected = functional.linear(rows, weight.mT if isinstance(layer, Conv1D) else weight, layer.bias)
            got = layer(rows)
        return got.shape == expected.shape and torch.allclose(got, expected, rtol=1e-2, atol=1e-3)
    except Exception:  # other arguments, other shapes: a forward pass of its own
        return False
    finally:
        layer.train(was)
