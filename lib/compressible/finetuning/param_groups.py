"""What the optimiser is told: the outer factors' rate is not the inner ones'."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Optimizer

from compressible.adapters.layer import DeepLoraLayer
from compressible.runtime.checks import expect, is_number


def param_groups(model: nn.Module, lr: float) -> list[dict]:
    """Return an optimiser's groups: inner factors at `lr`, the outer two at lr_ratio * lr, all else at `lr`.

    Args:
        model: of `peft.get_peft_model`, also behind torch.compile, DistributedDataParallel or fully_shard.
        lr: step size > 0 of the inner factors; P1's Deep LoRA takes 1e-2 compressed and 1e-4 otherwise.

    Returns:
        Dicts with "params", "lr" and "name" ("inner", "outer" or "other"), of what is trained, for any of torch.optim.

    Raises:
        ValueError: unless lr > 0 and the model trains factors of Deep LoRA.

    Example:
        >>> import compressible as cd
        >>> import peft
        >>> from torch import nn
        >>> config = cd.DeepLoraConfig(r=2, variant="thin", lr_ratio=0.1)
        >>> model = peft.get_peft_model(nn.Sequential(nn.Linear(8, 4)), config)
        >>> [(group["name"], round(group["lr"], 4)) for group in cd.param_groups(model, lr=1e-2)]
        [('inner', 0.01), ('outer', 0.001)]

    Reference:
        P1 (Yaras et al. 2024), section 4: outer factors take smaller steps, since they begin where they should end.
    """
    expect("lr", lr, is_number(lr, above=0), "a finite number > 0")
    known = isinstance(model, nn.Module)
    expect("the model", type(model).__name__, known, "one of peft.get_peft_model with a DeepLoraConfig")
    rates: dict[int, tuple[str, float]] = {}
    for layer in model.modules():
        if isinstance(layer, DeepLoraLayer):
            for name, (first, *inner, last) in layer.deep_lora_factors.items():
                outer = layer.deep_lora_config[name].outer_lr(lr)
                rates |= {id(factor): ("inner", lr) for factor in inner}
                rates |= {id(factor): ("outer", outer) for factor in (first, last)}
    groups: dict[tuple[str, float], list] = {("inner", lr): []}
    for parameter in model.parameters():
        if parameter.requires_grad:
            groups.setdefault(rates.get(id(parameter), ("other", lr)), []).append(parameter)
    found = bool(groups["inner", lr])
    expect(
        "the model",
        type(model).__name__,
        found,
        "one that trains Deep LoRA: peft.get_peft_model(base, DeepLoraConfig(...))",
    )
    return [{"params": params, "lr": rate, "name": name} for (name, rate), params in groups.items() if params]


def create_deep_lora_optimizer(
    model: nn.Module, optimizer_cls: type[Optimizer], *, lr: float, **kwargs: Any
) -> Optimizer:
    """Return an optimiser with the rates of `param_groups`, for Trainer(optimizers=(optimizer, None)).

    Args:
        model: of `peft.get_peft_model`; compressed adapters may get their factors before or after.
        optimizer_cls: any of torch.optim, such as torch.optim.AdamW.
        lr: step size > 0 of the inner factors, usually 1e-4 to 1e-2.
        kwargs: the optimiser's other arguments; P1 and `fine_tune` have AdamW's eps=1e-6 and weight_decay=0. Torch's
            1e-8 and .01 make the first steps larger.

    Returns:
        The optimiser; a scheduler scales the rates of all groups alike.

    Raises:
        ValueError: as `param_groups`, and for an optimizer_cls that cannot be called.

    Example:
        >>> import compressible as cd
        >>> import peft
        >>> import torch
        >>> config = cd.DeepLoraConfig(r=2, variant="thin", lr_ratio=0.5)
        >>> model = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(8, 4)), config)
        >>> adam = {"lr": 1e-2, "eps": 1e-6, "weight_decay": 0.0}  # P1's; torch's eps is 1e-8
        >>> optimizer = cd.create_deep_lora_optimizer(model, torch.optim.AdamW, **adam)
        >>> [group["lr"] for group in optimizer.param_groups]
        [0.01, 0.005]

    Reference:
        As peft's create_loraplus_optimizer; P1 (Yaras et al. 2024), section 4.
    """
    wanted = "one of torch.optim's classes, such as torch.optim.AdamW"
    expect("optimizer_cls", optimizer_cls, callable(optimizer_cls), wanted)
    return optimizer_cls(param_groups(model, lr), **kwargs)  # type: ignore[call-arg]  # every optimiser has more
