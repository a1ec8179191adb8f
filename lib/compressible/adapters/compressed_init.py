# Copyright 2026 The Compressible Dynamics authors.
# SPDX-License-Identifier: Apache-2.0
"""The compressed start of Deep LoRA: outer factors from the gradient of the first batch (P1, section 4)."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from compressible.adapters.layer import DeepLoraLayer, factor_dtype
from compressible.runtime import devices
from compressible.runtime.checks import expect, is_integer
from compressible.runtime.module_names import plain_name, replace_module
from compressible.runtime.ranks import Ranks, spread_like
from compressible.runtime.starting_factors import compressed_chain
from compressible.runtime.undisturbed import as_before, quiet
from compressible.runtime.weight_gradients import GradientSink, collect, decompose, silent, watched

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
    raise. After an error the model, its gradients and the random numbers are as before.

    Args:
        model: of `peft.get_peft_model`, also behind torch.compile, DistributedDataParallel or fully_shard.
        loss_step: runs the model on one batch and returns the loss, a tensor (), without a backward pass.
        batches: how many gradients are added up, usually 1.
        adapter_name: peft's name of the adapter; other active adapters take part in the loss.
        generator: of the CPU, for the random half of the frames; that of the first process counts.
        restart: whether factors that are there already are drawn anew.
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
            left_out = ranks.together(lambda: _left_out(model, sinks, unreached))
            kept = {name: layer for name, layer in layers.items() if name not in left_out}
            chains = ranks.together(lambda: [_chain(kept[name], sinks[name], adapter_name, generator) for name in kept])
        for layer, chain in zip(kept.values(), chains, strict=True):
            held: Any = layer.deep_lora_factors[adapter_name]
            given = [spread_like(p, ranks.first(factor)) for p, factor in zip(held, chain, strict=True)]
            layer.set_factors(adapter_name, given)
        if left_out:
            _leave_out(model, root, {name: layers[name] for name in left_out}, list(kept), adapter_name)
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
    chain: Any = layer.deep_lora_factors[adapter]
    for factor in chain:
        whole = factor.dim() == 2 and factor.numel() and not factor.is_meta
        given = f"a factor of {name!r} is {tuple(factor.shape)} on {factor.device}"
        if not whole:
            todo = "start before FSDP1 or DeepSpeed splits the model, and offload no adapted layer"
            raise ValueError(f"{given}, expected a matrix in memory: {todo}")


def _first_gradients(
    loss_step: Callable[[], Tensor], layers: Layers, adapter: str, batches: int, ranks: Ranks
) -> dict[str, GradientSink]:
    """Collect the gradients of the layers' weights, while the adapter is not active beside those that are."""
    sinks = {name: GradientSink(layer.get_base_layer(), layer.r[adapter] // 2) for name, layer in layers.items()}
    with ExitStack() as undo:
        for layer in layers.values():
            undo.callback(setattr, layer, "_active_adapter", layer.active_adapters)
            layer._active_adapter = [active for active in layer.active_adapters if active != adapter]
        calls = undo.enter_context(watched(layers, sinks))
        collect(loss_step, sinks, batches, calls, ranks)
    ranks.together(lambda: decompose(sinks, lambda name: _blank(layers[name], ranks.device), ranks))
    return sinks


def _blank(layer: Any, device: torch.device) -> Tensor:
    """The gradient (1, m, n) of a layer that this process did not meet, as the others have it."""
    kind = factor_dtype(layer.get_base_layer().weight)
    return torch.zeros(1, layer.out_features, layer.in_features, dtype=kind, device=device)


def _left_out(model: nn.Module, sinks: Mapping[str, GradientSink], unreached: str) -> list[str]:
    """Return the layers without a gradient, if they may be left out; RuntimeError if not."""
    found = silent(sinks)
    if found and unreached == "error":
        todo = f'unreached="leave_out", exclude_modules={found} in the config, or more batches (batches=2)'
        raise RuntimeError(f"no gradient, or zero alone, reached {found[0]!r} and {len(found) - 1} more layers: {todo}")
    wrapped = any(isinstance(module, DistributedDataParallel) for module in model.modules())
    if found and (wrapped or any(hasattr(p, "device_mesh") for p in model.parameters())):
        when = "only before DistributedDataParallel or fully_shard wrap the model"
        raise RuntimeError(f"{found} can be left out {when}")
    return found


def _chain(layer: DeepLoraLayer, sink: GradientSink, adapter: str, generator: torch.Generator) -> list[Tensor]:
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
    config.exclude_modules = _excluding(config.exclude_modules, list(layers))
    if not isinstance(config.target_modules, str):  # names that match nothing any more would be warned of
        ends = config.target_modules
        config.target_modules = {end for end in ends if any(f".{name}".endswith(f".{end}") for name in kept)}
    root.peft_config[adapter] = config
    for tuner in model.modules():
        if isinstance(tuner, BaseTuner):
            tuner.targeted_module_names = [name for name in tuner.targeted_module_names if name not in layers]


def _excluding(given: Any, names: list[str]) -> str:
    """Return exclude_modules as a regular expression that matches what is given, and the names and no other.

    In a list "0" would mean "1.0", too.
    """
    ends = [] if given is None or isinstance(given, str) else [rf"(.*\.)?{re.escape(end)}" for end in sorted(given)]
    return "|".join([*([given] if isinstance(given, str) and given else []), *ends, *map(re.escape, names)])
