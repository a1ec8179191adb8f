# Copyright 2026 The Compressible Dynamics authors.
# SPDX-License-Identifier: Apache-2.0
"""Which layers can be adapted: all that is refused is refused before anything is changed, by the layer's name."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer, _check_lora_target_modules_mamba, _get_in_out_features
from peft.utils.constants import SEQ_CLS_HEAD_NAMES
from peft.utils.quantization_utils import (
    ForwardOnlyQuantizationBackend,
    QuantizationBackend,
    resolve_quantization_backend,
)
from torch import nn

from compressible.adapters.config import DeepLoraConfig
from compressible.runtime.plain_layers import LEAVE, check_plain
from compressible.runtime.shared_weights import sharers, stacked_weights


def check_target(model: nn.Module, name: str, base: nn.Module, config: DeepLoraConfig, r: int) -> None:
    """Raise ValueError for what is no layer x W^T + b, whose update would not be seen, or that is too small for r."""
    quantised = quantization(base)
    check_plain(model, name, base, None if quantised is None else quantised.layer_type)
    try:
        _check_lora_target_modules_mamba(LoraConfig(), model, name.rpartition(".")[2])
    except ValueError:  # its fused kernels read the weight
        raise ValueError(f"target {name!r}: peft adapts no such layer of Mamba; {LEAVE}") from None
    sizes: Any = _get_in_out_features(base)
    if config.awaits_gradient and (2 * min(sizes) < r or max(sizes) < r):
        size = f"{name!r} is {sizes[::-1]}, too small for r / 2 = {r // 2} directions a side"
        raise ValueError(f"{size}: lower r, also by rank_pattern, or {LEAVE} or modules_to_save")


def base_of(layer: Any) -> Any:
    """Return the layer that a tuner's layer wraps, or the layer itself."""
    return layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer


def quantization(base: nn.Module, get_apply_tensor_subclass: object = None) -> QuantizationBackend | None:
    """How a quantised base layer is read and written, or None; torchao must be told how to quantise again."""
    try:
        return resolve_quantization_backend(base, get_apply_tensor_subclass=get_apply_tensor_subclass)
    except ValueError:
        return ForwardOnlyQuantizationBackend("torchao, by other means than transformers' TorchAoConfig")


def warn_of_what_is_left_out(
    model: nn.Module, config: DeepLoraConfig, found: Mapping[str, nn.Module], everything: bool
) -> None:
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
