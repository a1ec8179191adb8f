"""Which layers can be adapted: all that is refused is refused before anything is changed, by the layer's name."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer, _check_lora_target_modules_mamba, _get_in_out_features
from peft.utils.constants import SEQ_CLS_HEAD_NAMES
from peft.utils.quantization_utils import (
    ForwardOnlyQuantizationBackend,
    QuantizationBackend,
    resolve_quantization_backend,
)
from torch import nn
from torch.nn import functional
from torch.nn.modules.conv import _ConvNd
from transformers.pytorch_utils import Conv1D

from compressible.adapters.config import DeepLoraConfig

PLAIN = (nn.Linear.forward, nn.Embedding.forward, Conv1D.forward)


def check_layer(model: nn.Module, name: str, layer: nn.Module, config: DeepLoraConfig, r: int) -> None:
    """Raise ValueError for what is no layer x W^T + b, whose update would not be seen, or that is too small for r."""
    base: Any = layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer
    kind, leave = type(base).__name__, "name it in exclude_modules"
    if isinstance(getattr(base, "weight", None), nn.UninitializedParameter):
        raise ValueError(f"target {name!r} is {kind}, whose sizes are not known yet: run the model once first")
    quantised = quantization(base)
    if not isinstance(base, (nn.Linear, nn.Embedding, Conv1D)) and (
        quantised is None or quantised.layer_type != "linear"
    ):
        raise ValueError(f"target {name!r} is {kind}, expected nn.Linear, Conv1D or nn.Embedding: {leave}")
    if quantised is None and ("weight" not in base._parameters or getattr(base, "max_norm", None) is not None):
        why = "weight_norm, pruning, a parametrisation or max_norm makes its weight anew in each pass; undo that"
        raise ValueError(f"target {name!r}: {why}, or {leave}")
    own = type(base).forward not in PLAIN or "forward" in vars(base) or base._forward_hooks or base._forward_pre_hooks
    if quantised is None and own and not _is_plain(base):
        raise ValueError(f"target {name!r} is {kind}, whose own forward pass or hooks change what it gives: {leave}")
    try:
        _check_lora_target_modules_mamba(LoraConfig(), model, name.rpartition(".")[2])
    except ValueError:  # its fused kernels read the weight
        raise ValueError(f"target {name!r}: peft adapts no such layer of Mamba; {leave}") from None
    parent = model.get_submodule(name.rpartition(".")[0])
    if isinstance(parent, nn.MultiheadAttention):
        raise ValueError(f"target {name!r}: nn.MultiheadAttention reads its weight without calling it; {leave}")
    if isinstance(parent, nn.TransformerEncoderLayer) and torch.backends.mha.get_fastpath_enabled():
        switch = "call torch.backends.mha.set_fastpath_enabled(False) first"
        raise ValueError(f"target {name!r}: nn.TransformerEncoderLayer may not call it; {switch}, or {leave}")
    sizes: Any = _get_in_out_features(base)
    if config.variant == "compressed" and config.init_weights and (2 * min(sizes) < r or max(sizes) < r):
        size = f"{name!r} is {sizes[::-1]}, too small for r / 2 = {r // 2} directions a side"
        raise ValueError(f"{size}: lower r, also by rank_pattern, or {leave} or modules_to_save")


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
    parts = dict(model.named_modules())
    held = [(name, key, p) for name, part in parts.items() for key, p in part._parameters.items() if p is not None]
    wanted: set[str] = (
        set() if everything or isinstance(config.target_modules, str) else set(config.target_modules or ())
    )
    odd = sorted(end for end in wanted if not any(name == end or name.endswith(f".{end}") for name in parts))
    told = [f"target_modules: {', '.join(map(repr, odd))} matches no module"] if odd else []
    saved = set(config.modules_to_save or ()) - {*SEQ_CLS_HEAD_NAMES, "qa_outputs"}  # which peft adds by the task
    told += [
        f"modules_to_save: {end!r} matches no module" for end in saved if not any(at.endswith(end) for at in parts)
    ]
    for name, layer in found.items():
        others = [
            at for at, _, p in held if p is getattr(layer, "weight", None) and at not in (name, f"{name}.base_layer")
        ]
        if unseeing := [at for at in others if at.removesuffix(".base_layer") not in found]:
            told.append(
                f"{name!r} shares its weight with {', '.join(map(repr, unseeing))}, which do not see its update"
            )
    stacks = [
        f"{name}.{key}" for name, key, p in held if p.ndim == 3 and len(p) > 1 and not isinstance(parts[name], _ConvNd)
    ]
    if everything and stacks:
        lora = "peft.LoraConfig(target_parameters=...) adapts such"
        told.append(f"{len(stacks)} stacked weights outside of linear layers, as {stacks[0]!r}, are left out: {lora}")
    for text in told if found else ():
        warnings.warn(text, stacklevel=2)


@torch.no_grad()
def _is_plain(base: Any) -> bool:
    """Whether a subclass of nn.Linear, Conv1D or nn.Embedding computes what its base class does, tried on two rows."""
    weight = base.weight
    if weight.is_meta:
        return True
    was: bool = base.training
    n: Any = _get_in_out_features(base)[0]
    try:
        if isinstance(base.eval(), nn.Embedding):
            ids = torch.tensor([[0, n - 1]], device=weight.device)
            expected, got = functional.embedding(ids, weight) * getattr(base, "embed_scale", 1.0), base(ids)
        else:
            rows = torch.linspace(-1, 1, 2 * n, device=weight.device, dtype=weight.dtype).reshape(2, n)
            expected = functional.linear(rows, weight.mT if isinstance(base, Conv1D) else weight, base.bias)
            got = base(rows)
        return got.shape == expected.shape and torch.allclose(got, expected, rtol=1e-2, atol=1e-3)
    except Exception:  # other arguments, other shapes: a forward pass of its own
        return False
    finally:
        base.train(was)
