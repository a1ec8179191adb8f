"""Which layers a method of peft can adapt: all that is refused is refused before a change, by the layer's name."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

from peft import LoraConfig
from peft.tuners.lora.model import _adapter_names_pre_forward_hook as _name_rows
from peft.tuners.tuners_utils import BaseTunerLayer, _check_lora_target_modules_mamba, _get_in_out_features
from peft.utils.constants import SEQ_CLS_HEAD_NAMES
from peft.utils.quantization_utils import (
    ForwardOnlyQuantizationBackend,
    QuantizationBackend,
    resolve_quantization_backend,
)
from torch import nn

from compressible.runtime.checks import expect, is_integer, names
from compressible.runtime.plain_layers import LEAVE, check_plain
from compressible.runtime.shared_weights import sharers, stacked_weights


def check_target(model: nn.Module, name: str, base: nn.Module) -> tuple[int, int]:
    """Return a layer's (inputs, outputs); ValueError for what is no x W^T + b, whose update would not be seen."""
    quantised = quantization(base)
    check_plain(model, name, base, None if quantised is None else quantised.layer_type)
    try:
        _check_lora_target_modules_mamba(LoraConfig(), model, name.rpartition(".")[2])
    except ValueError:  # its fused kernels read the weight
        raise ValueError(f"target {name!r}: peft adapts no such layer of Mamba; {LEAVE}") from None
    sizes: Any = _get_in_out_features(base)
    return sizes


def check_names(config: Any) -> None:
    """Raise ValueError where the names, patterns and indices of a config of peft make no sense together.

    Names become sets, those of modules_to_save a sorted list.
    """
    for name in ("target_modules", "exclude_modules"):
        setattr(config, name, names(name, getattr(config, name), "names or a regular expression"))
    saved = config.modules_to_save
    expect("modules_to_save", saved, not isinstance(saved, str), f"a list of names, such as [{saved!r}]")
    if saved is not None:
        config.modules_to_save = sorted(names("modules_to_save", saved, "names of modules"))
    for name in ("layers_to_transform", "layers_pattern"):
        value, listed = getattr(config, name), not isinstance(config.target_modules, str)
        expect(name, value, value is None or listed, "None where target_modules is a string")
    indices = config.layers_to_transform
    several = [indices] if is_integer(indices) else indices
    counted = isinstance(several, list | tuple | set | range) and all(is_integer(at) and at >= 0 for at in several)
    expect("layers_to_transform", indices, indices is None or counted, "an index or several, each an integer >= 0")
    alone = config.layers_pattern is None or config.layers_to_transform is not None
    expect("layers_pattern", config.layers_pattern, alone, "None without layers_to_transform")


def is_pattern(text: Any) -> bool:
    """Whether a text is a regular expression, as peft matches names with."""
    try:
        re.compile(f"({text})")
    except re.error:
        return False
    return isinstance(text, str)


def base_of(layer: Any) -> Any:
    """Return the layer that a tuner's layer wraps, or the layer itself."""
    return layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer


def quantization(base: nn.Module, get_apply_tensor_subclass: object = None) -> QuantizationBackend | None:
    """How a quantised base layer is read and written, or None; torchao must be told how to quantise again."""
    try:
        return resolve_quantization_backend(base, get_apply_tensor_subclass=get_apply_tensor_subclass)
    except ValueError:
        return ForwardOnlyQuantizationBackend("torchao, by other means than transformers' TorchAoConfig")


def name_rows(parts: Iterable[nn.Module], model: Any, adapter_names: list[str], num_beams: int | None) -> list[Any]:
    """Hook parts of a model to hear the names of their rows' adapters; beams repeat rows, but for an encoder's."""
    encoder = model.get_encoder() if hasattr(model, "get_encoder") else None
    once = set() if encoder is None or encoder is model else set(encoder.modules())
    repeated = [name for name in adapter_names for _ in range(num_beams or 1)]
    hooks = {part: partial(_name_rows, adapter_names=adapter_names if part in once else repeated) for part in parts}
    return [part.register_forward_pre_hook(hook, with_kwargs=True) for part, hook in hooks.items()]


def check_rows(adapter_names: list[str], rows: int, merged: list[str]) -> None:
    """Raise ValueError, as peft does, unless each row has a name and no adapter is merged."""
    if merged:
        todo = "please call `unmerge_adapter` first."
        raise ValueError(f"Cannot pass `adapter_names` when there are merged adapters, {todo}")
    if rows != len(adapter_names):
        told = f"number of inputs, but got {len(adapter_names)} and {rows} respectively."
        raise ValueError(f"Length of `adapter_names` should be the same as the {told}")


def warn_of_what_is_left_out(model: nn.Module, config: Any, found: Mapping[str, nn.Module], everything: bool) -> None:
    """Warn of names that match nothing, of weights that others share, and of experts that "all-linear" leaves out."""
    named = () if everything or isinstance(config.target_modules, str) else config.target_modules or ()
    saved = set(config.modules_to_save or ()) - {*SEQ_CLS_HEAD_NAMES, "qa_outputs"}  # which peft adds by the task
    parts = [name for name, _ in model.named_modules()]
    odd = [end for end in sorted(named) if not any(f".{name}".endswith(f".{end}") for name in parts)]
    told = [f"target_modules: {', '.join(map(repr, odd))} matches no module"] if odd else []
    unmatched = [end for end in sorted(saved) if not any(name.endswith(end) for name in parts)]
    told += [f"modules_to_save: {end!r} matches no module" for end in unmatched]
    for name, others in sharers(model, {name: base_of(layer) for name, layer in found.items()}).items():
        unseeing = [repr(at) for at in others if at.removesuffix(".base_layer") not in found]
        if unseeing:
            told.append(f"{name!r} shares its weight with {', '.join(unseeing)}, which do not see its update")
    stacks = stacked_weights(model) if everything else []
    if stacks:
        lora = "peft.LoraConfig(target_parameters=...) adapts such"
        told.append(f"{len(stacks)} stacked weights outside of linear layers, as {stacks[0]!r}, are left out: {lora}")
    for text in told if found else ():
        warnings.warn(text, stacklevel=2)
