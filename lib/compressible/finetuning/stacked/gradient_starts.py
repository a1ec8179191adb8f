"""Starts that wait for first gradients: P1's compressed factors, LoRA-GA's, and those of a `GradientStart`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from compressible.adapters.gradient_rank import MeasuredSink, warn_of_rounding
from compressible.finetuning.peft_models import GradientStart, starts_compressed, starts_from_gradient
from compressible.finetuning.run import FineTuningRun
from compressible.finetuning.stacked.layers import Chain, StackedAdapter
from compressible.finetuning.stacked.starts import Start, of_peft, run_key
from compressible.runtime.starting_factors import compressed_chain
from compressible.runtime.weight_gradients import GradientSink, WholeGradients

Adapters = Mapping[str, StackedAdapter]


def finished_starts(
    source: nn.Module,
    adapters: Adapters,
    starts: Sequence[Start],
    runs: Sequence[FineTuningRun],
    losses: Callable[[], Tensor],
) -> list[Start]:
    """Return every run's start: as it was drawn, or from the gradient of `losses`, the sum of the runs' first."""
    base = next(iter(adapters.values())).base
    kind, device = torch.promote_types(base.weight.dtype, torch.float32), base.weight.device
    found = _from_gradients(source, adapters, starts, runs, losses)

    def there(chains: dict[str, Chain]) -> dict[str, Chain]:
        return {name: [factor.to(device, kind) for factor in chain] for name, chain in chains.items()}

    whole = [found.get(i, start) for i, start in enumerate(starts)]
    return [replace(start, chains=there(start.chains), taken_off=there(start.taken_off)) for start in whole]


@dataclass
class _Sinks:
    """What sees the first gradients: of the runs `which`, each of which stands for all that see the same first batch.

    place: by run the number of the one in `which` that stands for it.
    """

    which: list[int]
    place: dict[int, int]
    of: dict[str, Any]

    @classmethod
    def over(
        cls, runs: Sequence[FineTuningRun], members: Sequence[int], make: Callable[[list[int]], dict[str, Any]]
    ) -> _Sinks:
        """Sinks by layer, which `make` gives for the numbers of runs, of those of the runs that differ in their rows.

        What runs adapt plays no part in a first gradient, as adapters are off: seed and subset decide.
        """
        subsets = [None if run.subset is None else tuple(torch.as_tensor(run.subset).tolist()) for run in runs]
        first: dict[tuple, int] = {}
        for run in members:
            first.setdefault((runs[run].seed, subsets[run]), run)
        which = list(first.values())
        place = {run: which.index(first[runs[run].seed, subsets[run]]) for run in members}
        return cls(which, place, make(which) if which else {})


def _from_gradients(
    source: nn.Module,
    adapters: Adapters,
    starts: Sequence[Start],
    runs: Sequence[FineTuningRun],
    losses: Callable[[], Tensor],
) -> dict[int, Start]:
    """By run the starts that await a first gradient, from one backward pass of all of them."""
    framed = [i for i, run in enumerate(runs) if starts_compressed(run.config) and run.start is None]
    widths = {name: [starts[i].chains[name][0].shape[0] // 2 for i in framed] for name in adapters}
    frames = _Sinks.over(runs, framed, lambda which: {
        name: MeasuredSink(adapter.base, max(widths[name]), adapter.runs, which) for name, adapter in adapters.items()
    })  # fmt: skip
    own = [i for i, run in enumerate(runs) if isinstance(run.start, GradientStart)]
    gradients = _Sinks.over(runs, own, lambda which: _whole(adapters, which))
    approximated = [i for i, run in enumerate(runs) if starts_from_gradient(run.config)]
    plain = {name: adapter for name, adapter in adapters.items() if not adapter.embedding}  # as peft's LoRA-GA has it
    estimates = _Sinks.over(runs, approximated, lambda which: _whole(plain, which))
    if not (framed or own or approximated):
        return {}
    _gather(adapters, [frames.of, gradients.of, estimates.of], losses)
    _check_met(frames.of, gradients.of)
    return {
        **_compressed(adapters, frames, starts, runs),
        **_by_their_own(gradients, starts, runs),
        **_approximated(source, plain, estimates, runs),
    }


def _whole(adapters: Adapters, which: list[int]) -> dict[str, WholeGradients]:
    return {name: WholeGradients(adapter.base, adapter.runs, which) for name, adapter in adapters.items()}


def _compressed(
    adapters: Adapters, sinks: _Sinks, starts: Sequence[Start], runs: Sequence[FineTuningRun]
) -> dict[int, Start]:
    """P1's compressed starts; frames are drawn from each run's generator in the order of the layers, on the CPU."""
    # On the CPU: thousands of small decompositions that a GPU would only wait for.
    frames = {name: [side.cpu() for side in sink.frames or ()] for name, sink in sinks.of.items()}
    found: dict[int, Start] = {}
    for run, at in sinks.place.items():
        config: Any = runs[run].config
        generator = torch.Generator().manual_seed(int(runs[run].seed))
        own: dict[str, Chain] = {}
        for name, adapter in adapters.items():
            half = starts[run].chains[name][0].shape[0] // 2
            left, right = (side[at, :, :half] for side in frames[name])
            own[name] = compressed_chain(left, right, adapter.shape, config.depth, config.init_scale, generator)
        found[run] = replace(starts[run], chains=own)
    warn_of_rounding(_lacking(sinks, starts), stacklevel=2)
    return found


def _lacking(sinks: _Sinks, starts: Sequence[Start]) -> dict[str, tuple[int | None, int]]:
    """By layer the rank of the gradient of the run that lacks most directions, None if none does, and what it asks."""
    found: dict[str, tuple[int | None, int]] = {}
    for name, sink in sinks.of.items():
        asked = {(at, starts[run].chains[name][0].shape[0] // 2) for run, at in sinks.place.items()}
        pairs = [(sink.lacking(at, half), half) for at, half in asked]
        found[name] = min(pairs, key=lambda pair: 0 if pair[0] is None else pair[0] - pair[1])
    return found


def _by_their_own(sinks: _Sinks, starts: Sequence[Start], runs: Sequence[FineTuningRun]) -> dict[int, Start]:
    """What the runs' own `GradientStart` make of their gradients; runs that differ in their rates alone share it."""
    made: dict[tuple, dict[str, Chain]] = {}
    found: dict[int, Start] = {}
    for run, at in sinks.place.items():
        given, key = runs[run], (*run_key(runs[run]), at)
        if key not in made:
            generator = torch.Generator().manual_seed(int(given.seed))
            own: Any = given.start
            made[key] = {
                name: own.chain(sink.whole[at], given.config, starts[run].chains[name][0].shape[0], generator)
                for name, sink in sinks.of.items()
            }
        off = made[key] if isinstance(given.start, GradientStart) and given.start.taken_off else {}
        found[run] = replace(starts[run], chains=made[key], taken_off=off)
    return found


def _approximated(
    source: nn.Module, adapters: Adapters, sinks: _Sinks, runs: Sequence[FineTuningRun]
) -> dict[int, Start]:
    """LoRA-GA's starts as peft makes them of the gradients' means over a layer's uses; other layers as drawn."""
    made: dict[tuple, Start] = {}
    for run, at in sinks.place.items():
        key = (*run_key(runs[run]), at)
        if key in made:
            continue
        means = {name: sink.whole[at] / sink.uses for name, sink in sinks.of.items() if sink.whole is not None}
        laid = {name: mean.mT if adapters[name].turned else mean for name, mean in means.items()}
        made[key] = of_peft(source, runs[run], laid)
    return {run: made[*run_key(runs[run]), at] for run, at in sinks.place.items()}


def _gather(adapters: Adapters, sinks: Sequence[dict[str, Any]], losses: Callable[[], Tensor]) -> None:
    """Let the sinks see the gradients of one backward pass without updates."""
    try:
        for name, adapter in adapters.items():
            adapter.sink = _watching([of[name] for of in sinks if name in of])
        with torch.enable_grad():
            torch.autograd.backward(losses(), inputs=[sink.token for of in sinks for sink in of.values()])
    finally:
        for adapter in adapters.values():
            adapter.sink = None
    for of in sinks:
        for sink in of.values():
            sink.finish()


def _watching(sinks: Sequence[GradientSink]) -> Callable[[Tensor, Tensor], Tensor]:
    """One sink after the other over a layer's output."""

    def watch(x: Tensor, out: Tensor) -> Tensor:
        for sink in sinks:
            out = sink.watch(x, out)
        return out

    return watch


def _check_met(*sinks: dict[str, Any]) -> None:
    """Raise RuntimeError where no gradient reached a layer of a compressed run."""
    silent = list(dict.fromkeys(name for of in sinks for name, sink in of.items() if not _all_met(sink)))
    if silent:
        reached = f"no gradient, or zero alone, reached {silent[0]!r} and {len(silent) - 1} more layers"
        given = f"{reached} of a run that starts from it"
        raise RuntimeError(f"{given}, expected one: exclude_modules={silent} in its config, or a larger batch")


def _all_met(sink: GradientSink) -> bool:
    """Whether no run's gradient is zero; that of a run that diverges at once is NaN."""
    return sink.largest is not None and not bool((sink.largest == 0).any())
