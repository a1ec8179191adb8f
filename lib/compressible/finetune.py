"""Fine-tuning of S runs at once over one frozen model: seeds, learning rates, ranks and variants in one pass.

The frozen model sees the runs' batches side by side; adapters and heads are stacked (stacked.py), dropout has a stream
a run (streams.py), and AdamW's state is one flat vector with a rate for every element. So a run goes as it would
alone; `reference_fine_tune` in reference_tuning.py, a plain model and torch's AdamW for each run, is what this is
tested against.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .adapter_config import DeepLoraConfig, expect
from .targets import matching, saved_modules
from .tuning import Snapshot, Tuning
from .tuning_data import KINDS, TaskLike
from .tuning_runs import FineTuningRun, RunHistory

PRECISIONS = ("float32", "tf32", "bfloat16")


def fine_tune(
    model: nn.Module,
    runs: Sequence[FineTuningRun],
    task: TaskLike,
    steps: int,
    batch_size: int = 16,
    decay_ratio: float = 1.0,
    evaluate_at: Iterable[int] = (),
    watch_at: Iterable[int] = (),
    watch: Callable[[Snapshot], list[Any]] | None = None,
    precision: str = "float32",
    dropout: bool = True,
    compiled: bool = False,
    graphed: bool | None = None,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 100,
    max_stack: int | None = None,
    keep_factors: bool = True,
    show_progress: bool | None = None,
) -> list[RunHistory]:
    """Train all runs over the frozen `model`, as few passes as their shapes allow, and return a history a run.

    The rate decays linearly to decay_ratio of its start (1: constant). Steps of evaluate_at and watch_at count updates
    made, 0 to `steps`; `watch` returns one value a run. Precision "tf32" is the authors' (JAX's default); "bfloat16"
    is the frozen model's only. compiled: torch.compile; graphed: CUDA graphs, by default on a GPU. With `checkpoint`, a
    file name, a killed call goes on where it was. The runs of a pass are at most max_stack. Without keep_factors the
    histories hold no factors, which for many wide runs are much memory. `model` is never changed.
    Raises ValueError on impossible arguments and RuntimeError where no gradient reaches a compressed layer; a run that
    diverges ends alone, see RunHistory.
    """
    evaluate_at, watch_at = sorted(set(evaluate_at)), sorted(set(watch_at))
    _check(runs, task, steps, batch_size, decay_ratio, evaluate_at, watch_at, watch, precision, max_stack)
    expect("checkpoint_every", checkpoint_every, checkpoint_every >= 1, "an integer >= 1")
    _check_model(model)
    groups = list(_passes(model, runs, max_stack))
    found: dict[int, RunHistory] = {}
    for number, members in enumerate(groups):
        place = None if checkpoint is None else Path(f"{checkpoint}.{number}" if len(groups) > 1 else checkpoint)
        tuning = Tuning(model, [runs[i] for i in members], task, steps, batch_size, decay_ratio, precision, dropout)
        try:
            tuning.accelerate(compiled, graphed)
            histories = tuning.train(evaluate_at, watch_at, watch, place, checkpoint_every, show_progress)
            if not keep_factors:
                histories = [replace(history, chains=None, heads=None) for history in histories]
            found.update(zip(members, histories, strict=True))
        finally:
            tuning.release()
        del tuning
    return [found[i] for i in range(len(runs))]


def _passes(model: nn.Module, runs: Sequence[FineTuningRun], max_stack: int | None) -> Iterator[list[int]]:
    """Indices of the runs of each pass: those with equal targets; wide factors apart; equal lengths side by side."""
    groups: dict[tuple, list[int]] = {}
    layers: dict[tuple, tuple] = {}
    for at, run in enumerate(runs):
        config = run.config
        asked = repr((config.target_modules, config.exclude_modules, config.embeddings, config.modules_to_save,
                      config.task_type))  # fmt: skip
        if asked not in layers:
            found = tuple(matching(model, config))
            if not found:
                raise ValueError(f"target_modules = {config.target_modules!r} matches no layer")
            layers[asked] = found, tuple(name for name, _ in saved_modules(model, config))
        key = (layers[asked], config.variant == "full", config.lora_dropout)
        groups.setdefault(key, []).append(at)
    for members in groups.values():
        members.sort(key=lambda i: _length(runs[i].config))
        size = max_stack or len(members)
        yield from (members[i : i + size] for i in range(0, len(members), size))


def _length(config: DeepLoraConfig) -> int:
    return config.depth + 2 * (config.variant == "compressed")


def _check(
    runs: Sequence[FineTuningRun], task: TaskLike, steps: int, batch_size: int, decay_ratio: float,
    evaluate_at: Sequence[int], watch_at: Sequence[int], watch: Callable | None, precision: str, max_stack: int | None,
) -> None:  # fmt: skip
    expect("runs", list(runs), len(runs) > 0, "at least one run")
    expect("steps", steps, isinstance(steps, int) and steps >= 1, "an integer >= 1")
    expect("batch_size", batch_size, isinstance(batch_size, int) and batch_size >= 1, "an integer >= 1")
    expect("decay_ratio", decay_ratio, 0 <= decay_ratio <= 1, "a number in [0, 1]")
    expect("precision", precision, precision in PRECISIONS, f"one of {', '.join(PRECISIONS)}")
    expect("task.kind", task.kind, task.kind in KINDS, f"one of {', '.join(KINDS)}")
    expect("max_stack", max_stack, max_stack is None or max_stack >= 1, "None or an integer >= 1")
    for name, marks in (("evaluate_at", evaluate_at), ("watch_at", watch_at)):
        expect(name, marks, all(0 <= mark <= steps for mark in marks), f"steps from 0 to {steps}")
    expect("watch", watch, watch is not None or not watch_at, "a function, since watch_at names steps")
    rows = len(task.train.labels)
    for run in runs:
        expect("lr", run.lr, 0 < run.lr < float("inf"), "a finite number > 0")
        own = rows if run.subset is None else len(run.subset)
        expect("subset", f"{own} rows", own >= batch_size, f"at least one batch of {batch_size}")
        inside = run.subset is None or (int(min(run.subset)) >= 0 and int(max(run.subset)) < rows)
        expect("subset", run.subset, inside, f"rows from 0 to {rows - 1}")


def _check_model(model: nn.Module) -> None:
    """Raise ValueError for a model whose pass is not the sum of its runs' own."""
    if any(parameter.dtype is torch.float16 for parameter in model.parameters()):
        raise ValueError("the model is in float16, expected float32 or bfloat16: eps^L = 1e-9 underflows there")
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            kind = type(module).__name__
            raise ValueError(f"{name!r} is {kind}, expected no statistics over a batch: a batch holds all runs")
        if getattr(module, "gradient_checkpointing", False):
            raise ValueError(f"{name!r} has gradient checkpointing on: call model.gradient_checkpointing_disable()")
