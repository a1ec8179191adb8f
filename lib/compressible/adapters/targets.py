"""Which layers an adapter config means, by peft's rules."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from compressible.adapters.config import ALL_LINEAR, DeepLoraConfig

CLASSIFIERS = ("classifier", "score")
HEADS = {"SEQ_CLS": CLASSIFIERS, "TOKEN_CLS": CLASSIFIERS, "QUESTION_ANS": ("qa_outputs",)}  # peft saves them whole


def places(model: nn.Module, config: DeepLoraConfig) -> dict[str, list[str]]:
    """Return the names of all targets by the first of those that share a weight, such as T5's word embeddings.

    Raises ValueError for a target whose update its model would not see.
    """
    output = _output_embedding(model)
    found: dict[tuple, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if _excluded(name, config) or not _wanted(name, module, config, output):
            continue
        _check_layer(model, name, module)
        key = (type(module), id(module.weight), id(getattr(module, "bias", None)))
        found.setdefault(key, []).append(name)
    return {names[0]: names for names in found.values()}


def saved_modules(model: nn.Module, config: DeepLoraConfig) -> Iterator[tuple[str, nn.Module]]:
    """Yield name and module of what is trained whole; ValueError where names are given and none is found."""
    wanted = config.modules_to_save
    found = [(name, module) for name, module in model.named_modules() if wanted and _named(name, wanted)]
    if wanted and not found:
        raise ValueError(f"modules_to_save = {wanted!r} matches no module")
    yield from found


def saved_by_peft(model: nn.Module, config: DeepLoraConfig) -> list[str]:
    """Return the ends of names that peft's modules_to_save gets: the config's own and its task's head."""
    names = [name for name, _ in model.named_modules()]
    heads = [head for head in HEADS.get(config.task_type or "", ()) if any(name.endswith(head) for name in names)]
    return list(dict.fromkeys([*(config.modules_to_save or []), *heads]))


def holders(model: nn.Module) -> dict[int, list[tuple[str, nn.Module]]]:
    """Return, by a parameter's id, name and module of all that hold it: several for tied weights."""
    held: dict[int, list[tuple[str, nn.Module]]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            held.setdefault(id(parameter), []).append((name, module))
    return held


def _wanted(name: str, module: nn.Module, config: DeepLoraConfig, output: nn.Module | None) -> bool:
    if config.embeddings and isinstance(module, nn.Embedding):
        return True
    if config.target_modules == ALL_LINEAR:
        return _is_linear(module) and module is not output
    return _named(name, config.target_modules)


def _output_embedding(model: nn.Module) -> nn.Module | None:
    """The layer that "all-linear" leaves out in transformers' language models."""
    return getattr(model, "get_output_embeddings", lambda: None)()


def _check_layer(model: nn.Module, name: str, module: Any) -> None:
    """Raise ValueError for what is no layer x W^T + b, or whose weight is read without calling it."""
    kind, leave = type(module).__name__, "name it in exclude_modules"
    if isinstance(module, nn.Embedding) and type(module) is not nn.Embedding:
        raise ValueError(f"target {name!r} is {kind}, an embedding with a forward pass of its own: {leave}")
    if not (_is_linear(module) or isinstance(module, nn.Embedding)):
        raise ValueError(f"target {name!r} is {kind}, expected a linear layer or an embedding")
    if not module.weight.is_floating_point():
        raise ValueError(f"target {name!r} has a weight of {module.weight.dtype}, expected an unquantised one")
    parent = model.get_submodule(name.rpartition(".")[0])
    if isinstance(parent, nn.MultiheadAttention):
        raise ValueError(f"target {name!r}: nn.MultiheadAttention reads its weight without calling it; {leave}")
    if isinstance(parent, nn.TransformerEncoderLayer) and torch.backends.mha.get_fastpath_enabled():
        switch = "call torch.backends.mha.set_fastpath_enabled(False) first"
        raise ValueError(f"target {name!r}: nn.TransformerEncoderLayer may not call it; {switch}, or {leave}")


def _excluded(name: str, config: DeepLoraConfig) -> bool:
    saved = [*(config.modules_to_save or []), *HEADS.get(config.task_type or "", ())]
    inside = any(re.match(rf"(^|.*\.){module}($|\..*)", name) for module in saved)
    return inside or bool(config.exclude_modules and _named(name, config.exclude_modules))


def _named(name: str, wanted: str | list[str]) -> bool:
    """A regular expression must match the whole name; a list names modules or the ends of their names."""
    if isinstance(wanted, str):
        return re.fullmatch(wanted, name) is not None
    return name in wanted or any(name.endswith(f".{end}") for end in wanted)


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
