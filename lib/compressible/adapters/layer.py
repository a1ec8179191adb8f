# Copyright 2026 The Compressible Dynamics authors.
# SPDX-License-Identifier: Apache-2.0
"""Deep LoRA (P1) in a layer: the update of a frozen weight as a product of three or more factors.

For a layer with m outputs and n inputs, the update is W_L ... W_1 with W_1 (k, n) on the input side and W_L (m, k) on
the output side; k and L go by the config's variant, three that the papers call by one name (papers' traps T1, T2).
Factors are kept in float32, also beside a half-precision or quantised layer, since eps^L = 1e-9 is below what float16
holds; their product is formed in float32 and meets the activations in the activations' type, float16 excepted.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features, check_adapters_to_merge
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from compressible.adapters.config import DeepLoraConfig
from compressible.runtime.adaptable import check_rows, quantization
from compressible.runtime.chain import factor_dtype, looked_up, product, updated
from compressible.runtime.ranks import whole
from compressible.runtime.stand_in import StandIn
from compressible.runtime.starting_factors import fill


class DeepLoraLayer(StandIn, BaseTunerLayer):
    """A frozen layer and, by adapter name, the factors [W_1 (k, n), ..., W_L (m, k)] of its update."""

    adapter_layer_names: tuple[str, ...] = ("deep_lora_factors",)
    other_param_names: tuple[str, ...] = ("r", "deep_lora_dropout", "deep_lora_config")
    deep_lora_factors: Any  # an nn.ModuleDict of an nn.ParameterList by adapter

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: DeepLoraConfig, r: int, **kwargs: Any) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.quantization_backend = quantization(self.get_base_layer(), kwargs.get("get_apply_tensor_subclass"))
        sizes: Any = _get_in_out_features(self.get_base_layer())
        self.in_features, self.out_features = sizes
        self.fan_in_fan_out = isinstance(self.get_base_layer(), (Conv1D, nn.Embedding))
        self.r: dict[str, int] = {}
        self.deep_lora_config: dict[str, DeepLoraConfig] = {}
        self.deep_lora_factors = nn.ModuleDict()
        self.deep_lora_dropout = nn.ModuleDict()
        self.deep_lora_unset: set[str] = set()  # adapters that await their factors
        self.deep_lora_inner: dict[str, Tensor] = {}  # during a pass of the model: W_{L-1} ... W_2 (k, k)
        self._disable_adapters, self.merged_adapters = False, []
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config, r)

    def update_layer(self, adapter_name: str, config: DeepLoraConfig, r: int) -> None:
        """Give the layer the factors of one more adapter."""
        self.r[adapter_name], self.deep_lora_config[adapter_name] = r, config
        if config.lora_dropout > 0:
            self.deep_lora_dropout[adapter_name] = nn.Dropout(config.lora_dropout)
        start = config.start(self.out_features, self.in_features, r)
        self.deep_lora_factors[adapter_name] = nn.ParameterList(start)
        if config.awaits_gradient:
            self.deep_lora_unset.add(adapter_name)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def is_compressed(self, adapter: str) -> bool:
        """Return whether an adapter's factors are there: at once, but for "compressed" after `compress_adapters`."""
        if adapter in self.deep_lora_unset:  # as long as they are zero; who loads factors need not tell
            first = next(iter(self.deep_lora_factors[adapter]))
            if not first.is_meta and whole(first).any():
                self.deep_lora_unset.discard(adapter)
        return adapter not in self.deep_lora_unset

    def ready_adapters(self) -> list[str]:
        """Return the active adapters that have their factors here."""
        ready = self.deep_lora_factors._modules.keys() - self.deep_lora_unset
        return [name for name in self.active_adapters if name in ready]

    def factors(self, adapter: str) -> list[Tensor]:
        """Return [W_1 (k, n), ..., W_L (m, k)] of an adapter; RuntimeError where they await a first gradient."""
        if adapter in self.deep_lora_unset and not self.is_compressed(adapter):
            todo = "call compress_adapters(model, loss_step), load a trained adapter, or unload this one"
            raise RuntimeError(f"adapter {adapter!r} of variant 'compressed' has no factors yet: {todo}")
        chain = self.deep_lora_factors[adapter]
        held = chain._parameters  # read directly, since indexing a ParameterList costs more than a product
        return list(held.values()) if len(held) == len(chain) else list(chain)

    def set_factors(self, adapter: str, chain: Sequence[Tensor]) -> None:
        """Copy [W_1, ..., W_L] into an adapter, which is then ready; ValueError unless the shapes are its own."""
        fill(self.deep_lora_factors[adapter], chain)
        self.deep_lora_unset.discard(adapter)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return the update in the layout of the base layer's weight: (m, n), or (n, m) for Conv1D and Embedding."""
        with torch.autocast(self.deep_lora_factors[adapter][0].device.type, enabled=False):
            delta = product([factor.to(factor_dtype(factor)) for factor in self.factors(adapter)])
        return delta.mT if self.fan_in_fan_out else delta

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the updates of the named, or all active, adapters to the base weight; safe_merge refuses NaN first."""
        for name in check_adapters_to_merge(self, adapter_names):
            if name in self.deep_lora_factors:
                self._add_to_base(self.get_delta_weight(name), safe_merge, name)
                self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Take all merged updates out of the base weight."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
        while self.merged_adapters:
            name = self.merged_adapters.pop()
            if name in self.deep_lora_factors:
                self._add_to_base(-self.get_delta_weight(name), False, name)

    @torch.no_grad()
    def _add_to_base(self, delta: Tensor, safe: bool, name: str) -> None:
        backend, cpu = self.quantization_backend, self.get_base_layer().weight.device.type == "cpu"
        if backend is not None and (not backend.supports_merge or (cpu and backend.backend_name == "bnb 4bit")):
            why = f"the base layer is quantised by {backend.backend_name}, which PEFT cannot undo"
            raise ValueError(f"cannot merge {name!r}: {why}")
        weight = self.get_base_weight()
        merged = (weight.to(factor_dtype(weight)) + delta.to(weight.device)).to(weight.dtype)
        if safe and not torch.isfinite(merged).all():
            raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
        self.set_base_weight(merged)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the base layer's output plus the share of the active adapters, in the output's type."""
        adapter_names = kwargs.pop("adapter_names", None)
        if self._disable_adapters and self.merged_adapters:
            self.unmerge()
        result = self.base_layer(x, *args, **kwargs)
        if adapter_names is not None:
            return self._mixed_batch(result, x, adapter_names)
        if self._disable_adapters or self.merged_adapters:
            return result
        if self.quantization_backend is not None:
            result = self.quantization_backend.maybe_clone_base_result(result)
        held = self.deep_lora_factors._modules
        for name in self.active_adapters:
            if name in held:
                result = self.add_update(result, x, name)
        return result

    def add_update(self, result: Tensor, x: Tensor, adapter: str) -> Tensor:
        """Return result (..., m) plus the update of one adapter applied to x; layers of each kind say how."""
        raise NotImplementedError

    def _mixed_batch(self, result: Tensor, x: Tensor, adapter_names: list[str]) -> Tensor:
        """Return result with each row's own adapter; adapter_names has a name a row, "__base__" for none."""
        check_rows(adapter_names, len(x), self.merged_adapters)
        if self._disable_adapters:
            return result
        result = result.clone()
        for name in dict.fromkeys(adapter_names):
            if name in self.deep_lora_factors:
                rows = [row for row, own in enumerate(adapter_names) if own == name]
                result[rows] = self.add_update(result[rows], x[rows], name)
        return result

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Move an adapter to the base layer's device, in float32 at least; peft would take the base's type, too."""
        found, _ = self._get_base_layer_device_and_dtype(self.get_base_layer())
        chain = self.deep_lora_factors[adapter_name] if adapter_name in self.deep_lora_factors else nn.ParameterList()
        if not any(factor.is_meta for factor in chain):
            chain.to(device or found, factor_dtype(self.get_base_layer().weight))

    def __repr__(self) -> str:
        return "deep_lora." + super().__repr__()


class Linear(DeepLoraLayer):
    """Deep LoRA of nn.Linear, transformers' Conv1D and quantised linear layers."""

    def add_update(self, result: Tensor, x: Tensor, adapter: str) -> Tensor:
        """Return result (..., m) + x W_1^T ... W_L^T for x (..., n)."""
        if adapter in self.deep_lora_dropout:
            x = self.deep_lora_dropout[adapter](x)
        chain = self.factors(adapter)
        # Under checkpointing a layer is run again, after the model's pass, and must do the same.
        if adapter in self.deep_lora_inner and torch._C._autograd._top_saved_tensors_default_hooks(False) is None:
            chain = [chain[0], self.deep_lora_inner[adapter], chain[-1]]
        return updated(result, x, chain)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Return that peft's convert_to_lora may take the update from get_delta_weight."""
        return True


class Embedding(DeepLoraLayer):
    """Deep LoRA of nn.Embedding: the inputs n are the ids."""

    def add_update(self, result: Tensor, x: Tensor, adapter: str) -> Tensor:
        """Return result (..., m) + (W_L ... W_1)[:, x] for ids x (...)."""
        return looked_up(result, x, self.factors(adapter), self.get_base_layer(), self._get_embed_scale())
