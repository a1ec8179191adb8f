"""Fine-tuning of S runs at once over one frozen model: seeds, learning rates, ranks and variants in one pass.

The frozen model sees the runs' batches side by side; adapters and heads are stacked (stacked/), dropout is drawn per
run (dropout/), and AdamW's state is one flat vector with a rate for every element. So a run goes as it would alone:
the tests hold it against `peft.get_peft_model` and torch's AdamW for each run. What of peft cannot be stacked does go
alone, through the same steps (stacked/alone.py).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from compressible.finetuning.batches import RunsMixError, TaskLike
from compressible.finetuning.checks import (
    check_choices,
    check_model,
    check_runs,
    check_settings,
    check_surroundings,
    checked_marks,
)
from compressible.finetuning.devices import Pass, device_names, split
from compressible.finetuning.run import FineTuningRun, RunHistory
from compressible.finetuning.stackable import Structure, structure
from compressible.finetuning.stacked_pass import PassSnapshot, StackedPass
from compressible.finetuning.task_checks import check_ids, check_task
from compressible.finetuning.trainer import Looks, Trainer

SHOWN = 6  # runs of a pass that a message names
FULL_COST = 3.0  # of a run of wide factors, in runs of narrow ones


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
    devices: str | int | Sequence[str | torch.device] | None = None,
) -> list[RunHistory]:
    """Train all runs over the frozen `model`, in as few passes as their shapes allow, and return a history a run.

    A run has its own lr, lr_ratio and head_lr; AdamW's betas .9 and .999, eps 1e-6 and no weight decay are the
    authors'. A run that diverges ends alone, see `RunHistory`.

    Args:
        model: on its device, never changed.
        runs: S settings, see `FineTuningRun`; LoRA and Deep LoRA share passes, other methods of peft, and kinds of LoRA
            such as DoRA, go one at a time, of which a warning tells.
        task: rows, kind and metric, such as `load_task` gives; S batches share the device.
        steps: updates that each run makes.
        batch_size: rows of one run in a step, usually 16 to 32.
        decay_ratio: what the rate decays to linearly, over its start (1: constant).
        evaluate_at: numbers of updates made, 0 to `steps`, at which runs are scored.
        watch_at: the same for `watch`.
        watch: takes a `PassSnapshot`, the updates and factors of a pass's runs, and returns one value a run.
        precision: "float32", "tf32" (the authors', JAX's default) or "bfloat16" (of the frozen model only).
        dropout: whether the model's own dropout is on, drawn per run.
        compiled: whether torch.compile takes the pass.
        graphed: whether steps are CUDA graphs, by default on a GPU.
        checkpoint: a file name, with which a killed call goes on where it was; what `watch` gives must then be
            numbers, text, tensors, numpy arrays, Spectra, or lists, tuples and dicts of these.
        checkpoint_every: steps between two writings of it.
        max_stack: runs of a pass at most, by default all; one of full width, which takes the memory and the time of
            several, counts as three.
        keep_factors: whether histories hold factors, which for many wide runs are much memory.
        show_progress: whether a bar is drawn, by default where a person may see it.
        devices: where passes go, a process each, in place of the model's device in this one: "all" or a number of
            CUDA devices, or names such as ["cuda:0", "cuda:1"]. They are cut so that all devices are busy, and state
            files belong to that cut. A pass whose process dies is tried once more. `watch` works on copies there.

    Returns:
        A `RunHistory` a run, in their order, with tensors on the model's device.

    Raises:
        ValueError: on impossible arguments.
        RuntimeError: for a model that draws random numbers itself, where no gradient reaches a compressed layer, and
            for a pass whose process on one of `devices` died twice.

    Example:
        >>> import compressible as cd
        >>> import peft
        >>> import torch
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> sizes = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> model = BertForSequenceClassification(BertConfig(**sizes, intermediate_size=16, num_labels=1))
        >>> config = cd.DeepLoraConfig(r=2, variant="thin", task_type="SEQ_CLS")
        >>> lora = peft.LoraConfig(r=2, lora_alpha=2, target_modules="all-linear", task_type="SEQ_CLS")
        >>> runs = [cd.FineTuningRun(each, lr) for each in (config, lora) for lr in (1e-4, 1e-3)]
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
    flags = {"dropout": dropout, "compiled": compiled, "keep_factors": keep_factors}
    check_choices(flags, {"graphed": graphed, "show_progress": show_progress}, watch, bool(watch_at))
    check_task(task, scored=bool(evaluate_at))
    check_runs(runs, len(task.train.labels), batch_size)
    check_model(model, dropout)
    check_ids(model, task)
    check_surroundings(model, checkpoint)
    looks = Looks(evaluate_at, watch_at, watch, checkpoint_every, keep_factors, show_progress)
    settings = PassSettings(steps, batch_size, decay_ratio, precision, dropout, compiled, graphed, looks)
    names = None if devices is None else device_names(devices)
    groups = list(_passes(model, runs, max_stack))
    if names is not None:
        groups = split(groups, [_cost(run) for run in runs], len(names))
    passes = [_pass(runs, members, checkpoint, number, len(groups)) for number, members in enumerate(groups)]
    trained: Iterable[list[RunHistory]]
    if names is None:
        trained = (_run_pass(model, each.runs, task, settings, each.checkpoint) for each in passes)
    else:
        from compressible.finetuning.spread import spread  # joblib serves several devices alone

        parts = {"watch": watch, "task": task, "settings": _quiet(settings)}
        trained = spread(_run_pass, model, passes, parts, names, show_progress)
    found: dict[int, RunHistory] = {}
    for members, histories in zip(groups, trained, strict=True):
        found.update(zip(members, histories, strict=True))
    return [found[i] for i in range(len(runs))]


@dataclass(frozen=True)
class PassSettings:
    """What all passes of a call share: arguments of `fine_tune`."""

    steps: int
    batch_size: int
    decay_ratio: float
    precision: str
    dropout: bool
    compiled: bool
    graphed: bool | None
    looks: Looks


def _run_pass(
    model: nn.Module, runs: list[FineTuningRun], task: TaskLike, settings: PassSettings, checkpoint: Path | None
) -> list[RunHistory]:
    """Train the runs of one pass and return their histories; what it takes may be sent to another process."""
    given = settings.steps, settings.batch_size, settings.precision, settings.dropout
    try:
        trainer = Trainer(StackedPass(model, runs, task, *given), settings.decay_ratio)
    except RunsMixError as error:
        reason = str(error)  # without the frames that hold the pass
    else:
        try:
            trainer.accelerate(settings.compiled, settings.graphed)
            return trainer.train(settings.looks, checkpoint)
        finally:
            trainer.release()
    warnings.warn(f"runs go one at a time, since {reason}", RuntimeWarning, stacklevel=2)
    places = [None if checkpoint is None else Path(f"{checkpoint}.{at}") for at in range(len(runs))]
    return [_run_pass(model, [run], task, settings, place)[0] for run, place in zip(runs, places, strict=True)]


def _pass(
    runs: Sequence[FineTuningRun], members: list[int], checkpoint: str | Path | None, number: int, count: int
) -> Pass:
    """One of `count` passes, with the file of its state and its name in messages."""
    place = None if checkpoint is None else Path(f"{checkpoint}.{number}" if count > 1 else checkpoint)
    called = [str(runs[i].label or i) for i in members]
    shown = ", ".join(called if len(called) <= SHOWN else [*called[: SHOWN - 1], "...", called[-1]])
    named = f"pass {number + 1} of {count} (runs {shown})"
    return Pass([runs[i] for i in members], place, named, sum(_cost(runs[i]) for i in members))


def _quiet(settings: PassSettings) -> PassSettings:
    """The settings of a pass in another process, which has no screen."""
    return replace(settings, looks=replace(settings.looks, show_progress=False))


def _cost(run: FineTuningRun) -> float:
    """About what a run costs beside the others of a call."""
    return FULL_COST if getattr(run.config, "variant", None) == "full" else 1.0


def _passes(model: nn.Module, runs: Sequence[FineTuningRun], max_stack: int | None) -> Iterator[list[int]]:
    """Indices of the runs of each pass: those of one structure; wide factors apart; equal lengths side by side."""
    found: dict[tuple, Structure] = {}
    keys = [(repr(run.config), run.start) for run in runs]
    for key, run in zip(keys, runs, strict=True):
        if key not in found:
            found[key] = structure(model, run.config, run.start)
    structures = [found[key] for key in keys]
    _tell(found.values())
    _tell_of_rates(runs, structures)
    groups: dict[tuple, list[int]] = {}
    for at, own in enumerate(structures):
        groups.setdefault((at,) if own.alone else own.key, []).append(at)
    for members in groups.values():
        members.sort(key=lambda i: structures[i].length)
        size = max(1, int(max_stack / _cost(runs[members[0]]))) if max_stack else len(members)
        yield from (members[i : i + size] for i in range(0, len(members), size))


def _tell(structures: Iterable[Structure]) -> None:
    """Warn of what cannot be stacked."""
    reasons = sorted({each.alone for each in structures if each.alone})
    if reasons:
        slow = "such runs go one at a time through peft.get_peft_model, as they would alone but slower"
        warnings.warn(f"{', '.join(reasons)} cannot be stacked: {slow}", stacklevel=4)


def _tell_of_rates(runs: Sequence[FineTuningRun], structures: Sequence[Structure]) -> None:
    """Warn of rates of heads where none is trained."""
    pairs = zip(runs, structures, strict=True)
    idle = [str(run.label or at) for at, (run, own) in enumerate(pairs) if run.head_lr is not None and not own.heads]
    if idle:
        shown = ", ".join(idle if len(idle) <= SHOWN else [*idle[:SHOWN], "..."])
        todo = "task_type or modules_to_save in their config would"
        warnings.warn(f"head_lr of runs {shown} is not used, since nothing is trained whole: {todo}", stacklevel=4)
