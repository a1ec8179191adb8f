"""Fine-tuning of S runs at once over one frozen model: seeds, learning rates, ranks and variants in one pass.

The frozen model sees the runs' batches side by side; adapters and heads are stacked (stacked/), dropout is drawn per
run (dropout/), and AdamW's state is one flat vector with a rate for every element. So a run goes as it would alone:
the tests hold it against a plain model and torch's AdamW for each run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from compressible.adapters.config import DeepLoraConfig
from compressible.adapters.targets import places, saved_modules
from compressible.finetuning.batches import TaskLike
from compressible.finetuning.checks import check_model, check_runs, check_settings, check_task, checked_marks
from compressible.finetuning.run import FineTuningRun, RunHistory
from compressible.finetuning.stacked_pass import PassSnapshot, StackedPass
from compressible.finetuning.trainer import Looks, Trainer
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
    watch: Callable[[PassSnapshot], list[Any]] | None = None,
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
    """Train all runs over the frozen `model`, in as few passes as their shapes allow, and return a history a run.

    A run has its own lr, outer_ratio and head_lr; AdamW's betas .9 and .999, eps 1e-6 and no weight decay are the
    authors'. A run that diverges ends alone, see `RunHistory`.

    Args:
        model: on its device, never changed.
        runs: S settings, see `FineTuningRun`.
        task: rows, kind and metric, such as `load_task` gives; S batches share the device.
        steps: updates that each run makes.
        batch_size: rows of one run in a step, usually 16 to 32.
        decay_ratio: what the rate decays to linearly, over its start (1: constant).
        evaluate_at: numbers of updates made, 0 to `steps`, at which runs are scored.
        watch_at: the same for `watch`.
        watch: takes a `PassSnapshot`, the updates of a pass's runs, and returns one value a run.
        precision: "float32", "tf32" (the authors', JAX's default) or "bfloat16" (of the frozen model only).
        dropout: whether the model's own dropout is on, drawn per run.
        compiled: whether torch.compile takes the pass.
        graphed: whether steps are CUDA graphs, by default on a GPU.
        checkpoint: a file name, with which a killed call goes on where it was; what `watch` gives must then be
            numbers, text, tensors, numpy arrays, Spectra, or lists, tuples and dicts of these.
        checkpoint_every: steps between two writings of it.
        max_stack: runs of a pass at most, by default all that fit.
        keep_factors: whether histories hold factors, which for many wide runs are much memory.
        show_progress: whether a bar is drawn, by default where a person may see it.

    Returns:
        A `RunHistory` a run, in their order.

    Raises:
        ValueError: on impossible arguments.
        RuntimeError: for a model that draws random numbers itself or where no gradient reaches a compressed layer.

    Example:
        >>> import compressible as cd
        >>> import torch
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> sizes = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> model = BertForSequenceClassification(BertConfig(**sizes, intermediate_size=16, num_labels=1))
        >>> config = cd.DeepLoraConfig(r=2, variant="thin", task_type="SEQ_CLS", modules_to_save=["classifier"])
        >>> runs = [cd.FineTuningRun(config, lr, seed) for lr in (1e-4, 1e-3) for seed in (0, 1)]
        >>> ids = torch.arange(48).reshape(8, 6)
        >>> rows = cd.Examples({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, torch.rand(8), texts=())
        >>> task = cd.Task("toy", "regression", 1, "pearson", train=rows, validation=rows)
        >>> histories = cd.fine_tune(model, runs, task, steps=3, batch_size=4, show_progress=False)
        >>> [(history.losses.shape, history.shared) for history in histories]
        [((3,), 4), ((3,), 4), ((3,), 4), ((3,), 4)]

    Reference:
        P1 (Yaras et al. 2024), Table 1 and Figures 6 to 9: fine-tuning with few samples.
    """
    check_settings(steps, batch_size, decay_ratio, precision, max_stack, checkpoint_every)
    evaluate_at, watch_at = checked_marks("evaluate_at", evaluate_at, steps), checked_marks("watch_at", watch_at, steps)
    expect("watch", watch, watch is not None or not watch_at, "a function, since watch_at names steps")
    check_task(task, scored=bool(evaluate_at))
    check_runs(runs, len(task.train.labels), batch_size)
    check_model(model, dropout)
    looks = Looks(evaluate_at, watch_at, watch, checkpoint_every, keep_factors, show_progress)
    groups = list(_passes(model, runs, max_stack))
    found: dict[int, RunHistory] = {}
    for number, members in enumerate(groups):
        place = None if checkpoint is None else Path(f"{checkpoint}.{number}" if len(groups) > 1 else checkpoint)
        stacked = StackedPass(model, [runs[i] for i in members], task, steps, batch_size, precision, dropout)
        trainer = Trainer(stacked, decay_ratio)
        try:
            trainer.accelerate(compiled, graphed)
            found.update(zip(members, trainer.train(looks, place), strict=True))
        finally:
            trainer.release()
        del stacked, trainer
    return [found[i] for i in range(len(runs))]


def _passes(model: nn.Module, runs: Sequence[FineTuningRun], max_stack: int | None) -> Iterator[list[int]]:
    """Indices of the runs of each pass: those with equal targets; wide factors apart; equal lengths side by side."""
    groups: dict[tuple, list[int]] = {}
    layers: dict[str, tuple] = {}
    for at, run in enumerate(runs):
        config = run.config
        named = config.target_modules, config.exclude_modules, config.embeddings, config.modules_to_save
        asked = repr((*named, config.task_type))
        if asked not in layers:
            found = tuple(places(model, config))
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
