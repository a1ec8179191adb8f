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


def excluding(given: Any, names: list[str]) -> str:
    """Return exclude_modules as a regular expression that matches what is given, and the names and no other.

    In a list "0" would mean "1.0", too.
    """
    ends = [] if given is None or isinstance(given, str) else [rf"(.*\.)?{re.escape(end)}" for end in sorted(given)]
    return "|".join([*([given] if isinstance(given, str) and given else []), *ends, *map(re.escape, names)])


def still_matching(ends: Any, names: list[str]) -> Any:
    """Return target_modules without the ends of names that match none of `names`; a pattern as it is."""
    if isinstance(ends, str):
        return ends
    return {end for end in ends if any(f".{name}".endswith(f".{end}") for name in names)}
