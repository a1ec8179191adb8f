"""Which layers an adapter config means, by peft's rules."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from .adapters import DeepLoraConfig

HEADS = ("score", "classifier")  # peft's names of heads of sequence classification, left out of "all-linear"


def matching(model: nn.Module, config: DeepLoraConfig) -> dict[str, nn.Module]:
    """Return the layers that `config` targets, by name."""
    chosen = {}
    heads = _heads(model, config)
    for name, module in model.named_modules():
        if _excluded(name, config) or (config.target_modules == "all-linear" and name in heads):
            continue
        embedding = config.embeddings and isinstance(module, nn.Embedding)
        if config.target_modules == "all-linear":
            wanted = _is_linear(module) or embedding
        else:
            wanted = _named(name, config.target_modules) or embedding
        if wanted and not (_is_linear(module) or isinstance(module, nn.Embedding)):
            raise ValueError(f"target {name!r} is {type(module).__name__}, expected a linear layer or an embedding")
        if wanted:
            chosen[name] = module
    return chosen


def saved_modules(model: nn.Module, config: DeepLoraConfig) -> Iterator[tuple[str, nn.Module]]:
    """Yield name and module of what is trained whole; ValueError where names are given and none is found."""
    wanted = config.modules_to_save
    found = [(name, module) for name, module in model.named_modules() if wanted and _named(name, wanted)]
    if wanted and not found:
        raise ValueError(f"modules_to_save = {wanted!r} matches no module")
    yield from found


def _heads(model: nn.Module, config: DeepLoraConfig) -> set[str]:
    """Layers that "all-linear" leaves out in transformers' models: the output embedding, or a classification head."""
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if output is not None:
        return {name for name, module in model.named_modules() if module is output}
    if config.task_type != "SEQ_CLS":
        return set()
    head = next((getattr(model, name) for name in HEADS if hasattr(model, name)), None)
    return {name for name, module in model.named_modules() if module is head}


def _excluded(name: str, config: DeepLoraConfig) -> bool:
    saved = config.modules_to_save or []
    inside = any(re.match(rf"(^|.*\.){module}($|\..*)", name) for module in saved)
    return inside or bool(config.exclude_modules and _named(name, config.exclude_modules))


def _named(name: str, wanted: str | list[str]) -> bool:
    """A regular expression must match the whole name; a list names modules or the ends of their names."""
    if isinstance(wanted, str):
        return re.fullmatch(wanted, name) is not None
    return name in wanted or any(name.endswith(f".{end}") for end in wanted)


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
