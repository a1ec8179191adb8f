# Copyright 2026 The Compressible Dynamics authors.
# SPDX-License-Identifier: Apache-2.0
"""Deep LoRA in a model: which layers are adapted, and the method's entry in peft's tables."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _maybe_include_all_linear_layers
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, get_quantization_kwargs
from peft.utils.other import AuxiliaryTrainingWrapper, get_pattern_key
from torch import Tensor, nn

from compressible.adapters.config import DeepLoraConfig, DeepLoraType
from compressible.adapters.layer import DeepLoraLayer, Embedding, Linear
from compressible.runtime.adaptable import base_of, check_target, name_rows, warn_of_what_is_left_out
from compressible.runtime.chain import grouped_inner_products
from compressible.runtime.module_names import plain_name
from compressible.runtime.ranks import whole
from compressible.runtime.shared_weights import WeightWatch, untie

Tensors = dict[str, Tensor]


class DeepLoraModel(BaseTuner):
    """A model whose targeted layers are each wrapped in a `DeepLoraLayer`; made by `peft.get_peft_model`.

    Args:
        model: any with nn.Linear, nn.Embedding or transformers' Conv1D layers, quantised linear ones among them.
        peft_config: a `DeepLoraConfig`.
        adapter_name: of the first adapter, "default" by peft's default.
        low_cpu_mem_usage, state_dict: as in every tuner of peft.

    Example:
        >>> import compressible as cd
        >>> import peft
        >>> from torch import nn
        >>> model = peft.get_peft_model(nn.Sequential(nn.Linear(8, 4)), cd.DeepLoraConfig(r=2, variant="thin"))
        >>> type(model.base_model).__name__, model.targeted_module_names
        ('DeepLoraModel', ['0'])

    Reference:
        P1 (Yaras et al. 2024), section 4, Deep LoRA.
    """

    prefix: str = "deep_lora_"
    tuner_layer_cls = DeepLoraLayer
    target_module_mapping: Any = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    found: list[DeepLoraLayer] | None = None
    passed = False  # whether a first forward pass has shown that every layer's update is seen

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        """Look at all targets before anything is changed."""
        self.found = None
        everything = isinstance(peft_config.target_modules, str)
        _maybe_include_all_linear_layers(peft_config, model)
        if not isinstance(peft_config.target_modules, str):  # names as they are without torch.compile around the base
            peft_config.target_modules = {plain_name(name) for name in peft_config.target_modules or ()}
        adapted = tuple(f"{name}." for name, part in model.named_modules() if isinstance(part, BaseTunerLayer))
        outside = {name: module for name, module in model.named_modules() if not name.startswith(adapted)}
        found = {name: outside[name] for name in outside if self._check_target_module_exists(peft_config, name)}
        for name, module in found.items():
            sizes = check_target(model, name, base_of(module))
            peft_config.check_size(name, sizes, self._rank(peft_config, name))
        warn_of_what_is_left_out(model, peft_config, found, everything)

    def _create_and_replace(
        self,
        config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        r = self._rank(config, current_key)
        if isinstance(target, DeepLoraLayer):
            target.update_layer(adapter_name, config, r)
            return
        kind = Embedding if isinstance(base_of(target), nn.Embedding) else Linear
        layer = kind(target, adapter_name, config, r, **get_quantization_kwargs(self.model))
        if adapter_name not in self.active_adapters:  # an additional adapter is not trained at once
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    @staticmethod
    def _rank(config: DeepLoraConfig, name: str) -> int:
        return config.rank_pattern.get(get_pattern_key(list(config.rank_pattern), name), config.r)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """Put a layer in its place, and nothing else: a layer moves its factors by itself."""
        setattr(parent, child_name, new_module)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Cast factors, made in float32, to their base layers' types where the caller of peft does not want float32."""
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        if not autocast_adapter_dtype:
            for layer in self._layers():
                kind = layer.get_base_layer().weight.dtype
                if adapter_name in layer.deep_lora_factors:
                    layer.deep_lora_factors[adapter_name].to(kind if kind.is_floating_point else None)

    def _layers(self) -> list[DeepLoraLayer]:
        """All adapted layers, looked for once after each new adapter."""
        if self.found is None:
            self.found = [layer for layer in self.model.modules() if isinstance(layer, DeepLoraLayer)]
        return self.found

    @classmethod
    def _get_adapter_state_dict(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: Tensors, unwanted_adapter_names: list[str]
    ) -> Tensors:
        """Select what is saved, whole where fully_shard split it; RuntimeError where that would be no factors yet."""
        for layer in model.modules():
            if isinstance(layer, DeepLoraLayer) and adapter_name in layer.deep_lora_factors:
                layer.factors(adapter_name)
        for key, value in state_dict.items():  # from which peft takes trained modules and biases, too
            trained = cls.prefix in key or ".modules_to_save." in key or key.endswith(".bias")
            state_dict[key] = whole(value) if trained else value
        return super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        """The key in a file, which knows nothing of what is wrapped around the base or its layers."""
        return plain_name(super()._remove_adapter_name_from_key(key, adapter_name))

    def _check_merge_allowed(self) -> None:
        """Give a layer a weight of its own where another module, which would change, too, shares it."""
        super()._check_merge_allowed()
        layers = {name: part for name, part in self.model.named_modules() if isinstance(part, DeepLoraLayer)}
        plain = {name: layer.get_base_layer() for name, layer in layers.items() if layer.quantization_backend is None}
        for name in untie(self.model, plain):
            told = f"{name!r} shares its weight with another module, from which merging unties it"
            warnings.warn(told, stacklevel=3)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Around a forward pass: each row's own adapter, if asked for, and the first time a look at what is called."""
        handles = [] if kwargs.get("adapter_names") is None else self._give_names(**kwargs)
        layers = self._give_products()
        try:
            if self.passed or torch.compiler.is_compiling():
                yield
            else:
                with WeightWatch(self.model):
                    yield
                self.passed = True
        finally:
            for handle in handles:
                handle.remove()
            for layer in layers:
                layer.deep_lora_inner.clear()

    def _give_products(self) -> list[DeepLoraLayer]:
        """Hand layers the products of their inner factors, batched over the model, where gradients are taken."""
        if not torch.is_grad_enabled() or torch.compiler.is_compiling() or getattr(self, "_is_replica", False):
            return []
        used = [layer for layer in self._layers() if not layer._disable_adapters and not layer.merged_adapters]
        chains = {(layer, name): layer.factors(name) for layer in used for name in layer.ready_adapters()}
        for (layer, name), inner in grouped_inner_products(chains).items():
            layer.deep_lora_inner[name] = inner
        return used

    def _give_names(self, adapter_names: list[str], num_beams: int | None = None, **rest: Any) -> list[Any]:
        """Hooks that hand each layer the names of its rows' adapters; beams repeat rows, but for an encoder's."""
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        layers = [part for part in self.modules() if isinstance(part, (DeepLoraLayer, AuxiliaryTrainingWrapper))]
        known = {"__base__"}.union(*(part.deep_lora_factors for part in layers if isinstance(part, DeepLoraLayer)))
        if not known.issuperset(adapter_names):
            unknown = ", ".join(sorted({*adapter_names} - known))
            raise ValueError(f"Trying to infer with non-existing adapter(s): {unknown}")
        return name_rows(layers, self.model, adapter_names, num_beams)


METHOD: Any = DeepLoraType.DEEP_LORA
PEFT_TYPE_TO_CONFIG_MAPPING[METHOD] = DeepLoraConfig
PEFT_TYPE_TO_TUNER_MAPPING[METHOD] = DeepLoraModel
PEFT_TYPE_TO_PREFIX_MAPPING[METHOD] = DeepLoraModel.prefix
