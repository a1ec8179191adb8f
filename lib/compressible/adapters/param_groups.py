"""What the optimiser is told: the outer factors' rate is not the inner ones'."""

from __future__ import annotations

import math

from torch import nn

from compressible.adapters.config import DeepLoraConfig
from compressible.adapters.layer import adapted, adapters
from compressible.adapters.targets import saved_modules
from compressible.runtime.checks import expect


def param_groups(model: nn.Module, lr: float) -> list[dict]:
    """Return an optimiser's groups: inner factors (and modules_to_save) at `lr`, the outer two at outer_ratio * lr.

    Args:
        model: of `get_deep_lora_model`; compressed adapters after `compress_adapters`.
        lr: step size > 0 of the inner factors; P1's Deep LoRA takes 1e-2 compressed and 1e-4 otherwise.

    Returns:
        Dicts with "params", "lr" and "name" ("inner", "outer" or "saved"), for any of torch.optim.

    Raises:
        ValueError: unless lr > 0 and the model has adapters.

    Example:
        >>> import compressible as cd
        >>> from torch import nn
        >>> config = cd.DeepLoraConfig(r=2, variant="thin", outer_ratio=0.1)
        >>> model = cd.get_deep_lora_model(nn.Sequential(nn.Linear(8, 4)), config)
        >>> [(group["name"], round(group["lr"], 4)) for group in cd.param_groups(model, lr=1e-2)]
        [('inner', 0.01), ('outer', 0.001)]

    Reference:
        P1 (Yaras et al. 2024), section 4: outer factors take smaller steps, since they begin where they should end.
    """
    expect("lr", lr, 0 < lr < math.inf, "a finite number > 0")
    model = adapted(model)
    config: DeepLoraConfig = vars(model)["deep_lora_config"]
    found = adapters(model).values()
    outer = [adapter.ready()[i] for adapter in found for i in (0, -1)]
    inner = [factor for adapter in found for factor in adapter.factors[1:-1]]
    saved = [p for _, module in saved_modules(model, config) for p in module.parameters()]
    groups = {"inner": (inner, lr), "outer": (outer, config.outer_lr(lr)), "saved": (saved, lr)}
    return [{"params": params, "lr": rate, "name": name} for name, (params, rate) in groups.items() if params]
