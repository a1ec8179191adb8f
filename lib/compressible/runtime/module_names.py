"""Modules by their names and places in a model."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

_WRAPPED = re.compile(r"(?<![^.])(_orig_mod|_checkpoint_wrapped_module)\.")


def plain_name(name: str) -> str:
    """Return a module's or parameter's name as it is without torch.compile and checkpointing around any module."""
    return _WRAPPED.sub("", name)


def replace_module(model: nn.Module, old: Any, new: nn.Module) -> None:
    """Put a module in the place of another, wherever the model has it."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is old:
                parent._modules[name] = new
