"""outer/inner rates; LoRA+ next"""

from __future__ import annotations

import math

from torch import nn

from compressible.adapters.config import DeepLoraConfig
from compressible.adapters.layer import adapted, adapters
from compressible.adapters.targets import saved_modules
from compressible.runtime.checks import expect


def param_groups(model: nn.Module, lr: float) -> list[dict]:
    """Return the optimiser's groups: inner factors (and modules_to_save) at `lr`, the outer two at lr_ratio * lr.

    P1's Deep LoRA takes lr = 1e-2 compressed and 1e-4 otherwise. Raises ValueError unless lr > 0.
    """
    expect("lr", lr, 0 < lr < math.inf, "a finite number > 0")
    model = adapted(model)
    config: DeepLoraConfig = model.deep_lora_config
    found = adapters(model).values()
    outer = [adapter._ready()[i] for adapter in found for i in (0, -1)]
    inner = [factor for adapter in found for factor in adapter.factors[1:-1]]
    saved = [p for _, module in saved_modules(model, config) for p in module.parameters()]
    groups = {"inner": (inner, lr), "outer": (outer, config.lr_ratio * lr), "saved": (saved, lr)}
    return [{"params": params, "lr": rate, "name": name} for name, (params, rate) in groups.items() if params]
