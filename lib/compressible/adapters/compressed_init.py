# Copyright 2026 The Compressible Dynamics authors.
# SPDX-License-Identifier: Apache-2.0
"""The compressed start of Deep LoRA: outer factors from the gradient of the first batch (P1, section 4)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn

from compressible.adapters.gradient_rank import MeasuredSink, warn_of_rounding
from compressible.adapters.layer import DeepLoraLayer, factor_dtype
from compressible.runtime import devices, weight_gradients
from compressible.runtime.checks import expect, expect_function, expect_generator, is_integer
from compressible.runtime.module_names import excluding, plain_name, replace_module, still_matching
from compressible.runtime.ranks import Ranks, spread_like
from compressible.runtime.starting_factors import check_whole, compressed_chain
from compressible.runtime.undisturbed import as_before, quiet
from compressible.runtime.weight_gradients import first_gradients

Layers = dict[str, DeepLoraLayer]
UNREACHED = ("error", "leave_out")


def compress_adapters(
    model: nn.Module,
    loss_step: Callable[[], Tensor],
    batches: int = 1,
    adapter_name: str = "default",
    generator: torch.Generator | None = None,
    restart: bool = False,
    unreached: str = "error",
    group: Any = None,
) -> dict[str, Any]:
    """Give an adapter of variant "compressed" its factors from the gradients of `batches` calls of `loss_step`.

    The gradient of each adapted weight is summed from the layer's inputs and its output's gradients, so the weight may
    be quantised, in half precision, offloaded or sharded. With one batch it lives only until its decomposition; with
    several, one gradient a layer is held on its device. Of several processes (DDP, accelerate, FSDP2: fully_shard),
    which may wrap the model before or after, all get the factors of their summed gradients, and where one fails all
    raise. After an error the model, its gradients and the random numbers are as before. A warning names a layer whose
    gradient has fewer directions than the r / 2 that are taken, as of fewer rows: rounding chooses the others.

    Args:
        model: of `peft.get_peft_model`, also behind torch.compile, DistributedDataParallel or fully_shard.
        loss_step: runs the model on one batch and returns the loss, a tensor (), without a backward pass.
        batches: how many gradients are added up, usually 1.
        adapter_name: peft's name of the adapter; other active adapters take part in the loss.
        generator: of the CPU, for the random half of the frames; that of the first process counts. By default one with
            torch.initial_seed(), so that calls after one torch.manual_seed, of several adapters too, draw the same.
        restart: whether factors that are there already are drawn anew, which the same batch and seed give again.
        unreached: "error", or "leave_out": a layer whose gradient is zero or missing loses its adapter, as if
            exclude_modules had named it.
        group: torch.distributed's group of the processes that share the batch, all by default.

    Returns:
        {"seconds": wall clock, "peak_bytes": on the GPU, 0 on a CPU, "left_out": names of layers}.

    Raises:
        ValueError: for an argument out of range, an adapter of another variant or, unless `restart`, with factors.
        RuntimeError: where the loss or a layer's gradient is not finite, or a layer's gradient is zero or missing.

    Example:
        >>> import compressible as cd
        >>> import peft, torch
        >>> model = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(8, 4)), cd.DeepLoraConfig(r=2))
        >>> x = torch.arange(24.0).reshape(3, 8)
        >>> report = cd.compress_adapters(model, lambda: model(x).square().mean())
        >>> [tuple(factor.shape) for factor in model.base_model.model[0].deep_lora_factors["default"]]
        [(2, 8), (2, 2), (2, 2), (2, 2), (4, 2)]

    Reference:
        P1 (Yaras et al. 2024), section 4: outer factors from the first gradient, between them `depth` times eps I.
    """
    expect("the model", type(model).__name__, isinstance(model, nn.Module), "one of peft.get_peft_model")
    expect_function("loss_step", loss_step, "a function that runs the model on a batch and returns the loss")
    expect_generator(generator)
    where = next((p.device for p in model.parameters() if p.is_cuda), torch.device("cpu"))
    ranks = Ranks(where, group)
    expect("batches", batches, is_integer(batches) and batches >= 1, "an integer >= 1")
    expect("unreached", unreached, unreached in UNREACHED, f"one of {UNREACHED}")
    if generator is None:
        generator = torch.Generator().manual_seed(torch.initial_seed() % 2**63)
    with devices.measured(where) as cost:
        root, layers = ranks.together(lambda: _adapted(model, adapter_name, restart))
        with as_before(model), quiet(model):
            sinks = _first_gradients(loss_step, layers, adapter_name, batches, ranks)
            left_out = ranks.together(lambda: weight_gradients.unreached(model, sinks, unreached == "leave_out"))
            kept = {name: layer for name, layer in layers.items() if name not in left_out}
            chains = ranks.together(lambda: [_chain(kept[name], sinks[name], adapter_name, generator) for name in kept])
        for layer, chain in zip(kept.values(), chains, strict=True):
            held: Any = layer.deep_lora_factors[adapter_name]
            given = [spread_like(p, ranks.first(factor)) for p, factor in zip(held, chain, strict=True)]
            layer.set_factors(adapter_name, given)
        if left_out:
            _leave_out(model, root, {name: layers[name] for name in left_out}, list(kept), adapter_name)
    halves = {name: layer.r[adapter_name] // 2 for name, layer in kept.items()}
    warn_of_rounding({name: (sinks[name].lacking(0, half), half) for name, half in halves.items()}, stacklevel=2)
    return {**cost, "left_out": left_out}


def _adapted(model: nn.Module, adapter: str, restart: bool) -> tuple[Any, Layers]:
    """Return the module whose peft_config counts, with names as peft knows them, and the adapter's layers."""
    holders: list[Any] = [module for module in model.modules() if "peft_config" in vars(module)]
    known = list(holders[-1].peft_config) if holders else []
    expect("adapter_name", adapter, adapter in known, f"one of {known}, which peft.get_peft_model makes")
    root = holders[-1]
    variant = getattr(root.peft_config[adapter], "variant", None)
    known_start = variant == "compressed"
    expect(f"the variant of {adapter!r}", variant, known_start, '"compressed", which alone has such a start')
    found = ((name, module) for name, module in root.named_modules() if isinstance(module, DeepLoraLayer))
    layers = {plain_name(name): layer for name, layer in found if adapter in layer.deep_lora_factors}
    for name, layer in layers.items():
        _check_layer(name, layer, adapter, restart)
    return root, layers


def _check_layer(name: str, layer: DeepLoraLayer, adapter: str, restart: bool) -> None:
    if layer.is_compressed(adapter) and not restart:
        anew = "restart=True draws new ones, which an optimiser's moments do not fit"
        raise ValueError(f"{adapter!r} has its factors already, at {name!r}, expected none: {anew}")
    if adapter in layer.merged_adapters:
        raise ValueError(f"{adapter!r} is merged into {name!r}, expected an unmerged one: model.unmerge_adapter()")
    check_whole(name, layer.deep_lora_factors[adapter])


def _first_gradients(
    loss_step: Callable[[], Tensor], layers: Layers, adapter: str, batches: int, ranks: Ranks
) -> dict[str, MeasuredSink]:
    """Collect the gradients of the layers' weights, while the adapter is not active beside those that are."""
    sinks = {name: MeasuredSink(layer.get_base_layer(), layer.r[adapter] // 2) for name, layer in layers.items()}
    with ExitStack() as undo:
        for layer in layers.values():
            undo.callback(setattr, layer, "_active_adapter", layer.active_adapters)
            layer._active_adapter = [active for active in layer.active_adapters if active != adapter]
        first_gradients(loss_step, layers, sinks, batches, lambda name: _blank(layers[name], ranks.device), ranks)
    return sinks


def _blank(layer: Any, device: torch.device) -> Tensor:
    kind = factor_dtype(layer.get_base_layer().weight)
    return torch.zeros(1, layer.out_features, layer.in_features, dtype=kind, device=device)


def _chain(layer: DeepLoraLayer, sink: MeasuredSink, adapter: str, generator: torch.Generator) -> list[Tensor]:
    left, right = (side[0] for side in sink.frames or ())
    config, shape = layer.deep_lora_config[adapter], (layer.out_features, layer.in_features)
    with torch.autocast(left.device.type, enabled=False):  # which would make products of frames in half precision
        return compressed_chain(left, right, shape, config.depth, config.init_scale, generator)


def _leave_out(model: nn.Module, root: Any, layers: Layers, kept: list[str], adapter: str) -> None:
    """Take an adapter off layers, and say so in a copy of its config, so that saving and loading know."""
    for layer in layers.values():
        active = layer.active_adapters
        layer._active_adapter = [name for name in active if name != adapter]  # else peft would activate another
        layer.delete_adapter(adapter)
        layer._active_adapter = active
        if not len(layer.deep_lora_factors):
            replace_module(root, layer, layer.base_layer)
    config = copy.copy(root.peft_config[adapter])
    config.exclude_modules = excluding(config.exclude_modules, list(layers))
    config.target_modules = still_matching(config.target_modules, kept)  # what matches nothing would be warned of
    root.peft_config[adapter] = config
    for tuner in model.modules():
        if isinstance(tuner, BaseTuner):
            tuner.targeted_module_names = [name for name in tuner.targeted_module_names if name not in layers]
