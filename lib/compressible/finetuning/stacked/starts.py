"""The factors from which S stacked runs start: as peft draws them for each alone, or from the runs' first gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compressible.adapters.config import DeepLoraConfig
from compressible.finetuning.peft_models import (
    ADAPTER,
    adapted_by_peft,
    base_of,
    chain_of,
    on_meta,
    scaling_of,
    sharing,
    starts_compressed,
    tuner_layers,
)
from compressible.finetuning.run import FineTuningRun
from compressible.finetuning.stacked.layers import Chain, StackedAdapter
from compressible.runtime.starting_factors import compressed_chain
from compressible.runtime.weight_gradients import GradientSink


@dataclass(frozen=True)
class Start:
    """A run's factors by layer, of the right shapes alone where they await a gradient, and their products' scale."""

    chains: dict[str, Chain]
    scalings: dict[str, float]


def drawn_starts(source: nn.Module, runs: Sequence[FineTuningRun]) -> list[Start]:
    """Return what `get_peft_model` gives each run; runs that differ in their rates alone share their tensors."""
    keys = [(repr(run.config), run.seed, run.start) for run in runs]
    with ThreadPoolExecutor() as pool:  # full-width orthogonal factors of a BERT take a core half a minute
        found: dict[tuple, Future | Start] = {}
        for key, run in zip(keys, runs, strict=True):
            if key in found:
                continue
            if isinstance(run.config, DeepLoraConfig) and run.start is None:
                layers = tuner_layers(base_of(adapted_by_peft(on_meta(source), run.config, empty=True)))
                found[key] = pool.submit(_deep, layers, int(run.seed))
            else:
                layers = tuner_layers(base_of(adapted_by_peft(sharing(source), run.config, run.seed, run.start)))
                chains = {name: [factor.detach() for factor in chain_of(layer)] for name, layer in layers.items()}
                found[key] = Start(chains, {name: scaling_of(layer) for name, layer in layers.items()})
        done = {key: start.result() if isinstance(start, Future) else start for key, start in found.items()}
    return [done[key] for key in keys]


def _deep(layers: dict[str, Any], seed: int) -> Start:
    """The factors that `get_peft_model` draws after torch.manual_seed(seed), from a generator of their own."""
    generator, chains = torch.Generator().manual_seed(seed), {}
    for name, layer in layers.items():
        config = layer.deep_lora_config[ADAPTER]
        chains[name] = config.start(layer.out_features, layer.in_features, layer.r[ADAPTER], generator)
    return Start(chains, dict.fromkeys(chains, 1.0))


def starting_chains(
    adapters: dict[str, StackedAdapter],
    starts: Sequence[Start],
    runs: Sequence[FineTuningRun],
    losses: Callable[[], Tensor],
) -> list[dict[str, Chain]]:
    """Return every run's starting factors by layer: drawn, or for compressed runs from the gradient of `losses`."""
    base = next(iter(adapters.values())).base
    kind, device = torch.promote_types(base.weight.dtype, torch.float32), base.weight.device
    which = [i for i, run in enumerate(runs) if starts_compressed(run.config)]
    found = _compressed(adapters, which, starts, runs, losses) if which else {}
    chains = [found.get(i, start.chains) for i, start in enumerate(starts)]
    return [{name: [factor.to(device, kind) for factor in chain] for name, chain in of.items()} for of in chains]


def _compressed(
    adapters: dict[str, StackedAdapter],
    which: list[int],
    starts: Sequence[Start],
    runs: Sequence[FineTuningRun],
    losses: Callable[[], Tensor],
) -> dict[int, dict[str, Chain]]:
    """By run and layer the compressed start of the runs `which`, from one backward pass of all of them.

    losses gives the sum of the runs' losses. A layer's gradients (S', m, n) live only until their decomposition; frames
    are then drawn from each run's generator in the order of the layers. The starts are on the CPU.
    """
    widths = {name: [starts[run].chains[name][0].shape[0] for run in which] for name in adapters}
    sinks = {
        name: GradientSink(adapter.base, max(widths[name]) // 2, adapter.runs, which)
        for name, adapter in adapters.items()
    }
    _gather(adapters, sinks, losses)
    # On the CPU: thousands of small decompositions that a GPU would only wait for.
    frames = {name: [side.cpu() for side in sink.frames or ()] for name, sink in sinks.items()}
    found = {}
    for at, run in enumerate(which):
        config: Any = runs[run].config
        generator = torch.Generator().manual_seed(int(runs[run].seed))
        own: dict[str, Chain] = {}
        for name, adapter in adapters.items():
            left, right = (side[at, :, : widths[name][at] // 2] for side in frames[name])
            own[name] = compressed_chain(left, right, adapter.shape, config.depth, config.init_scale, generator)
        found[run] = own
    return found


def _gather(adapters: dict[str, StackedAdapter], sinks: dict[str, GradientSink], losses: Callable[[], Tensor]) -> None:
    """Let the sinks see the gradients of one backward pass without updates."""
    try:
        for name, adapter in adapters.items():
            adapter.sink = sinks[name].watch
        with torch.enable_grad():
            torch.autograd.backward(losses(), inputs=[sink.token for sink in sinks.values()])
    finally:
        for adapter in adapters.values():
            adapter.sink = None
    silent = [name for name, sink in sinks.items() if not (sink.finish() and _all_met(sink))]
    if silent:
        given = (
            f"no gradient, or zero alone, reached {silent[0]!r} and {len(silent) - 1} more layers of a compressed run"
        )
        raise RuntimeError(f"{given}, expected one: exclude_modules={silent} in its config, or a larger batch")


def _all_met(sink: GradientSink) -> bool:
    """Whether no run's gradient is zero; that of a run that diverges at once is NaN."""
    return sink.largest is not None and not bool((sink.largest == 0).any())
