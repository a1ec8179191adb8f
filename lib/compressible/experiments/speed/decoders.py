"""What fine-tuning steps of causal language models cost: S runs in one pass beside peft's LoRA, a run at a time.

The yardstick is tokens of all runs per second. peft is its stock LoRA in a plain loop with transformers' own loss.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from compressible.experiments.speed import finetuning
from compressible.experiments.speed.finetuning import Case, fastest_peft, rate

BEST_OF = 2  # precisions in which peft is timed


def cases(decoder: str, run_counts: Sequence[int], precisions: Sequence[str]) -> Iterator[Case]:
    """Yield peft's cases, then one run alone, which tells what a graph gains without company, then those of many."""
    yield from (Case(decoder, precision, "peft", modes=("eager",)) for precision in precisions[:BEST_OF])
    yield Case(decoder, precisions[0], "lora", 1, ("eager", "graph"))
    yield from (Case(decoder, precisions[0], "lora", count) for count in run_counts if count > 1)


def survey(
    decoders: Sequence[str],
    run_counts: Sequence[int],
    precisions: Sequence[str],
    sizes: tuple[int, int],
    device: str,
    seconds: float,
    trials: int,
    budget: float,
) -> dict[str, Any]:
    """Time the cases of all decoders, one model on the device at a time; keys as `finetuning.survey` has them.

    sizes: rows of a run's batch, tokens in a row. What had not begun after `budget` seconds says so.
    """
    began = time.perf_counter()
    out: dict[str, Any] = {}
    for decoder in decoders:
        left = budget - (time.perf_counter() - began)
        chosen = list(cases(decoder, run_counts, precisions))
        out |= finetuning.survey(chosen, *sizes, device, seconds, trials, left)
    return out


def decoder_goals(
    out: Mapping[str, Any], decoders: Sequence[str], run_counts: Sequence[int], precisions: Sequence[str]
) -> dict[str, np.ndarray]:
    """Return what a survey says on any card: "<decoder> <S> over peft" (T,), tokens per second over peft's best.

    Also "<decoder> <S> memory over peft" (1,), bytes at the peak over those of S runs of peft side by side, a process
    each, in bfloat16, where bytes were counted; both without the float32 model that the halved one was made from.
    """
    found: dict[str, np.ndarray] = {}
    for decoder in decoders:
        stock = fastest_peft(dict(out), decoder, precisions[:BEST_OF])
        spare, one = out.get(f"{decoder}/bytes", 0), out.get(f"{decoder}/{precisions[0]}/1 x peft/eager/memory", 0)
        for count in run_counts:
            name = f"{decoder}/{precisions[0]}/{count} x lora"
            mode, rates = rate(dict(out), name)
            if len(rates) and np.isfinite(stock).all():
                found[f"{decoder} {count} over peft"] = rates / stock
            if mode and one and precisions[0] == "bfloat16":
                share = (out[f"{name}/{mode}/memory"] - spare) / (count * (one - spare))
                found[f"{decoder} {count} memory over peft"] = np.array([share])
    return found
