"""LoRA, which is peft's own: the paper's start for it, and an exact export of Deep LoRA as LoRA."""

from __future__ import annotations

import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import transformers_weight_conversion as conversion
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from compressible.adapters.layer import DeepLoraLayer, Embedding
from compressible.finetuning.peft_models import of_factors_alone
from compressible.runtime.chain import product
from compressible.runtime.checks import expect, expect_generator
from compressible.runtime.module_names import plain_name
from compressible.runtime.paths import atomic_path
from compressible.runtime.ranks import whole

PREFIX = "base_model.model."


@of_factors_alone
@torch.no_grad()
def paper_lora_start(model: nn.Module, generator: torch.Generator | None = None, adapter_name: str = "default") -> None:
    """Start peft's LoRA as P1's baseline does: N(0, 1) on the output side, zeros on the input side, no scaling.

    Args:
        model: of `peft.get_peft_model` with a LoraConfig whose lora_alpha is r.
        generator: of the CPU, from which B is drawn, layer by layer; by default torch's own.
        adapter_name: which adapter.

    Returns:
        Nothing; B (m, r) and A (r, n) are changed in place.

    Raises:
        ValueError: where the model has no such adapter, or it is scaled or of another kind, such as DoRA.

    Example:
        >>> import compressible as cd
        >>> import peft
        >>> from torch import nn
        >>> config = peft.LoraConfig(r=2, lora_alpha=2, target_modules=["0"])
        >>> model = peft.get_peft_model(nn.Sequential(nn.Linear(8, 4)), config)
        >>> cd.paper_lora_start(model)
        >>> model.base_model.model[0].lora_A["default"].weight.abs().sum().item()
        0.0

    Reference:
        P1 (Yaras et al. 2024), section 4, its LoRA baseline (papers' trap T2).
    """
    expect_generator(generator)
    layers = [layer for layer in model.modules() if isinstance(layer, LoraLayer) and adapter_name in layer.r]
    expect("adapter_name", adapter_name, bool(layers), "the name of a LoRA adapter of the model")
    for layer in layers:
        expect("scaling", layer.scaling[adapter_name], layer.scaling[adapter_name] == 1, "1, which is lora_alpha = r")
        plain = adapter_name not in layer.lora_variant
        expect("the adapter", layer.lora_variant.get(adapter_name), plain, "plain LoRA")
    for layer in layers:
        a: Any
        b: Any
        if adapter_name in layer.lora_A:
            a, b = layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight
        else:
            a, b = layer.lora_embedding_A[adapter_name], layer.lora_embedding_B[adapter_name]
        a.zero_()
        b.copy_(torch.randn(b.shape, generator=generator))


def save_as_lora(model: nn.Module, path: str | Path, adapter_name: str = "default") -> None:
    """Write adapter_model.safetensors and adapter_config.json, which stock peft loads as LoRA: the same function.

    A is the first factor and B the product of the others, so nothing is approximated; a power of two between them keeps
    both far from underflow. modules_to_save and biases go along.

    Args:
        model: of `peft.get_peft_model` with a DeepLoraConfig, also compiled or wrapped; sharded, all ranks must call.
        path: a folder, made where it is missing.
        adapter_name: which adapter.

    Returns:
        Nothing; `peft.PeftModel.from_pretrained(base, path)` loads it, without this package.

    Raises:
        ValueError: before anything is written, where the model has no such adapter, or peft would read a name as that
            of fused experts (Qwen-MoE with dense layers): merge_and_unload, or exclude_modules.
        RuntimeError: where a compressed adapter awaits its factors.

    Example:
        >>> import os, tempfile
        >>> import compressible as cd
        >>> import peft
        >>> from torch import nn
        >>> model = peft.get_peft_model(nn.Sequential(nn.Linear(8, 4)), cd.DeepLoraConfig(r=2, variant="thin"))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     cd.save_as_lora(model, folder)
        ...     sorted(os.listdir(folder))
        ['adapter_config.json', 'adapter_model.safetensors']

    Reference:
        Hu et al. 2021, LoRA; peft's checkpoint format. peft.convert_to_lora does the same by an SVD.
    """
    model = _unwrapped(model)
    layers = {name: part for name, part in model.named_modules() if isinstance(part, DeepLoraLayer)}
    layers = {name: layer for name, layer in layers.items() if adapter_name in layer.deep_lora_factors}
    expect("adapter_name", adapter_name, bool(layers), "the name of a Deep LoRA adapter of the model")
    config = _lora_config(model, layers, adapter_name)
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        keys = (
            ("lora_embedding_A", "lora_embedding_B")
            if isinstance(layer, Embedding)
            else ("lora_A.weight", "lora_B.weight")
        )
        tensors |= {f"{name}.{key}": part for key, part in zip(keys, _halves(layer, adapter_name), strict=True)}
    saved = get_peft_model_state_dict(model, adapter_name=adapter_name)
    tensors |= {key: whole(value) for key, value in saved.items() if ".deep_lora_factors." not in key}
    tensors = {plain_name(key): value.detach().cpu().contiguous().clone() for key, value in tensors.items()}
    with atomic_path(Path(path) / "adapter_model.safetensors") as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
    config.save_pretrained(str(path))


def _lora_config(model: Any, layers: dict[str, DeepLoraLayer], adapter_name: str) -> LoraConfig:
    own = model.peft_config[adapter_name]
    ranks = {_plain(name): layer.deep_lora_factors[adapter_name][0].shape[0] for name, layer in layers.items()}
    r = Counter(ranks.values()).most_common(1)[0][0]
    other = {f"^{re.escape(name)}": rank for name, rank in ranks.items() if rank != r}
    config = LoraConfig(
        r=r, lora_alpha=r, rank_pattern=other, alpha_pattern=dict(other), target_modules=_targets(model, set(ranks)),
        lora_dropout=own.lora_dropout, bias=own.bias.replace("deep_lora", "lora"), modules_to_save=own.modules_to_save,
        fan_in_fan_out=any(isinstance(layer.get_base_layer(), Conv1D) for layer in layers.values()),
        task_type=own.task_type, base_model_name_or_path=own.base_model_name_or_path, inference_mode=True,
    )  # fmt: skip
    _check_names(model, config)
    return config


def _targets(model: nn.Module, names: set[str]) -> Any:
    """The names, or a regular expression where peft would take others that end so, too."""
    everything = {_plain(name) for name, _ in model.named_modules() if name.startswith(PREFIX)} - names
    if any(other.endswith(f".{name}") for other in everything for name in names if name in other):
        return "|".join(re.escape(name) for name in sorted(names))
    return names


def _check_names(model: Any, config: LoraConfig) -> None:
    """Raise ValueError where peft would take names of dense layers for experts', as it does for some MoE models."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if hasattr(getattr(base, "config", None), "model_type"):
        read = LoraConfig(r=config.r, target_modules=config.target_modules)
        mapping = conversion.get_model_conversion_mapping(base)
        conversion.convert_peft_config_for_transformers(read, model=base, conversions=mapping)
        taken = sorted(read.target_parameters or [])
        kept = (
            "layers whose names peft leaves alone: name those of the dense MLPs in exclude_modules, or merge_and_unload"
        )
        expect("what peft would adapt instead of the dense layers", taken, not taken, kept)


def _halves(layer: DeepLoraLayer, adapter_name: str) -> tuple[Tensor, Tensor]:
    """A (k, n) and B (m, k), B A the update, of about equal norms."""
    first, *rest = (whole(factor).double() for factor in layer.factors(adapter_name))
    last = product(rest)
    a, b = first.norm().item(), last.norm().item()
    half = 2.0 ** round(math.log2(b / a) / 2) if 0 < a < math.inf and 0 < b < math.inf else 1.0
    return (first * half).float(), (last / half).float()


def _plain(name: str) -> str:
    return plain_name(name.removeprefix(PREFIX))


def _unwrapped(model: Any) -> Any:
    """The model behind torch.compile and DistributedDataParallel."""
    while not isinstance(getattr(model, "base_model", None), BaseTuner):
        inner = getattr(model, "_orig_mod", None) or getattr(model, "module", None)
        expect("the model", type(model).__name__, isinstance(inner, nn.Module), "one of peft.get_peft_model")
        model = inner
    return model
