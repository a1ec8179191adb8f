"""Fine-tuning of S runs at once over one frozen model: seeds, learning rates, ranks and variants in one pass.

The frozen model sees the runs' batches side by side; adapters and heads are stacked (stacked.py), dropout has a stream
a run (streams.py), and AdamW's state is one flat vector with a rate for every element. So a run goes as it would
alone; `reference_fine_tune` in reference_tuning.py, a plain model and torch's AdamW for each run, is what this is
tested against.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from compressible.adapters.config import DeepLoraConfig
from compressible.adapters.targets import matching, saved_modules
from compressible.finetuning.batches import TaskLike
from compressible.finetuning.checks import check_model, check_runs, check_settings, check_task, checked_marks
from compressible.finetuning.run import FineTuningRun, RunHistory
from compressible.finetuning.stacked_pass import Snapshot, StackedPass
from compressible.finetuning.trainer import Trainer
from compressible.runtime.checks import expect


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
    file name, a killed call goes on where it was; what `watch` gives must then be numbers, text, tensors, numpy arrays,
    Spectra, or lists, tuples and dicts of these. The runs of a pass are at most max_stack. Without keep_factors the
    histories hold no factors, which for many wide runs are much memory. `model` is never changed.
    A run has its own lr, lr_ratio and head_lr; a call has batch_size, steps, decay_ratio and AdamW's betas .9 and .999,
    eps 1e-6 and no weight decay (the authors'). Scores are the task's metric, higher is better, but for generation the
    mean cross-entropy of the validation set's tokens in nats, lower is better.
    Raises ValueError on impossible arguments, RuntimeError for a model that draws random numbers itself or where no
    gradient reaches a compressed layer; a run that diverges ends alone, see RunHistory.
    """
    check_settings(steps, batch_size, decay_ratio, precision, max_stack, checkpoint_every)
    evaluate_at, watch_at = checked_marks("evaluate_at", evaluate_at, steps), checked_marks("watch_at", watch_at, steps)
    expect("watch", watch, watch is not None or not watch_at, "a function, since watch_at names steps")
    check_task(task, scored=bool(evaluate_at))
    check_runs(runs, len(task.train.labels), batch_size)
    check_model(model, dropout)
    groups = list(_passes(model, runs, max_stack))
    found: dict[int, RunHistory] = {}
    for number, members in enumerate(groups):
        place = None if checkpoint is None else Path(f"{checkpoint}.{number}" if len(groups) > 1 else checkpoint)
        stacked = StackedPass(model, [runs[i] for i in members], task, steps, batch_size, precision, dropout)
        trainer = Trainer(stacked, decay_ratio)
        try:
            trainer.accelerate(compiled, graphed)
            marks = (evaluate_at, watch_at, watch)
            histories = trainer.train(*marks, place, checkpoint_every, show_progress, keep_factors)
            found.update(zip(members, histories, strict=True))
        finally:
            trainer.release()
        del stacked, trainer
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
