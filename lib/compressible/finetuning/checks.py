"""What `fine_tune` refuses before work starts; what only a pass through the model shows is in dry_run.py."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from compressible.adapters.config import DeepLoraConfig
from compressible.data.tasks import IGNORED, Task
from compressible.finetuning.batches import ExamplesLike, TaskLike
from compressible.finetuning.losses import KINDS, WRITTEN
from compressible.finetuning.peft_models import DRAWN, GradientStart, starts_compressed
from compressible.finetuning.run import FineTuningRun
from compressible.runtime.checks import expect, is_integer, is_number

METRICS_OF = {"regression": ("pearson",), "classification": ("accuracy", "matthews")}
PLACES = ("position_embeddings", "wpe")  # ends of the names of tables that have a row a place
PRECISIONS = ("float32", "tf32", "bfloat16")


def check_settings(
    steps: int, batch_size: int, decay_ratio: float, precision: str, max_stack: int | None, checkpoint_every: int
) -> None:
    """Raise ValueError for a setting of a call that is impossible."""
    counts = {"steps": steps, "batch_size": batch_size, "checkpoint_every": checkpoint_every}
    for name, value in counts.items():
        expect(name, value, is_integer(value) and value >= 1, "an integer >= 1")
    fits = max_stack is None or (is_integer(max_stack) and max_stack >= 1)
    expect("max_stack", max_stack, fits, "None or an integer >= 1")
    expect("decay_ratio", decay_ratio, is_number(decay_ratio) and 0 <= decay_ratio <= 1, "a number in [0, 1]")
    expect("precision", precision, precision in PRECISIONS, f"one of {', '.join(PRECISIONS)}")


def check_surroundings(model: nn.Module, checkpoint: str | Path | None) -> None:
    """Raise ValueError where gradients are off or autocast is on around a call, or its file is a folder."""
    off, device = not torch.is_grad_enabled(), next(model.parameters()).device.type
    expect("the mode of gradients", "no_grad or inference_mode", not off, "gradients, which training takes")
    precise = not torch.is_autocast_enabled(device)
    expect("torch.autocast", "on", precise, "off around fine_tune, whose argument precision says what is half")
    folder = checkpoint is not None and Path(checkpoint).is_dir()
    expect("checkpoint", str(checkpoint), not folder, "a file's name, and it is a folder")


def checked_marks(name: str, marks: Iterable[int], steps: int) -> list[int]:
    """Return the steps of evaluate_at or watch_at in order, each once; ValueError unless integers from 0 to `steps`."""
    listed = marks.tolist() if hasattr(marks, "tolist") else marks
    expect(name, marks, isinstance(listed, Iterable) and not isinstance(listed, str), "integers, such as (0, 100)")
    listed = list(listed)
    expect(name, listed, all(is_integer(mark) for mark in listed), "integers")
    expect(name, listed, all(0 <= mark <= steps for mark in listed), f"steps from 0 to {steps}")
    return sorted({int(mark) for mark in listed})


def check_task(task: TaskLike, scored: bool) -> None:
    """Raise ValueError for labels that no loss is of; of the validation set, too, if it is to be `scored`."""
    expect("task.kind", task.kind, task.kind in KINDS, f"one of {', '.join(KINDS)}")
    parts = {"train": task.train} | ({"validation": task.validation} if scored else {})
    if scored and isinstance(task, Task) and task.kind not in WRITTEN:
        metrics = METRICS_OF[task.kind]
        expect("task.metric", task.metric, task.metric in metrics, f"of a {task.kind} one of {', '.join(metrics)}")
    for name, part in parts.items():
        _check_rows(f"task.{name}", part)
        labels = part.labels
        if task.kind == "regression":
            spoilt = (~torch.isfinite(labels.reshape(len(labels), -1)).all(1)).nonzero().flatten().tolist()
            expect(f"task.{name}.labels", f"not finite in rows {spoilt[:5]}", not spoilt, "finite labels")
        else:
            whole = not (labels.is_floating_point() or labels.is_complex() or labels.dtype is torch.bool)
            expect(f"task.{name}.labels", labels.dtype, whole, "integers")
        if task.kind == "causal":
            _check_words(name, part)
        if task.kind == "classification":
            found = tuple(labels.shape), int(labels.min())
            expect(f"task.{name}.labels", found, labels.dim() == 1 and found[1] >= 0, "shape (N,), classes from 0")


def _check_rows(name: str, part: ExamplesLike) -> None:
    """Raise ValueError unless labels and tokens are tensors of the same rows, each with a token."""
    given = {f"{name}.labels": part.labels} | {f"{name}.tokens[{key!r}]": each for key, each in part.tokens.items()}
    for key, value in given.items():
        expect(key, type(value).__name__, isinstance(value, Tensor), "a tensor, by torch.as_tensor")
    rows = len(part.labels)
    expect(name, f"{rows} rows", rows > 0, "at least one")
    for key, value in given.items():
        expect(key, f"{len(value)} rows", len(value) == rows, f"{rows}, one a label")
    mask = part.tokens.get("attention_mask")
    empty = [] if mask is None else (~(mask != 0).flatten(1).any(1)).nonzero().flatten().tolist()
    expect(f"{name}.tokens['attention_mask']", f"without a token in rows {empty[:5]}", not empty, "one in every row")


def check_ids(model: nn.Module, task: TaskLike) -> None:
    """Raise ValueError for ids, types or places of tokens that the model's tables have no row for.

    A GPU stops the whole process there, in the middle of a run.
    """
    words, named = _words_of(model), dict(model.named_modules())
    types = [table for name, table in named.items() if name.endswith("token_type_embeddings")]
    for name, part in (("train", task.train), ("validation", task.validation)):
        for key, tables in (("input_ids", [words]), ("token_type_ids", types)):
            for table in tables if key in part.tokens and len(part.tokens[key]) else ():
                _check_below(f"task.{name}.tokens[{key!r}]", part.tokens[key], table)
        for table in (table for end, table in named.items() if end.endswith(PLACES)):
            _check_places(f"task.{name}", part, table)


def _words_of(model: Any) -> nn.Module | None:
    try:
        return model.get_input_embeddings()
    except (AttributeError, NotImplementedError):  # as of models of no words
        return None


def _check_below(name: str, ids: Tensor, table: Any) -> None:
    if isinstance(table, nn.Embedding):
        low, high = int(ids.min()), int(ids.max())
        known = f"from 0 to {table.num_embeddings - 1}, which the model's embedding has"
        expect(name, f"from {low} to {high}", low >= 0 and high < table.num_embeddings, known)


def _check_places(name: str, part: ExamplesLike, table: Any) -> None:
    ids, mask = part.tokens.get("input_ids"), part.tokens.get("attention_mask")
    if type(table) is nn.Embedding and ids is not None and len(ids):
        first = 0 if table.padding_idx is None else table.padding_idx + 1  # as RoBERTa counts
        longest, room = ids.shape[-1] if mask is None else int(mask.sum(-1).max()), table.num_embeddings - first
        expect(name, f"a row of {longest} tokens", longest <= room, f"at most {room}, as the model has positions")


def _check_words(name: str, part: ExamplesLike) -> None:
    """Raise ValueError for labels (N, T) of a causal language model that ask for no word, or for one of the padding."""
    labels, tokens = part.labels, part.tokens
    ids = tokens.get("input_ids")
    shape = None if ids is None else tuple(ids.shape)
    expect(f"task.{name}.labels", tuple(labels.shape), tuple(labels.shape) == shape, f"the input_ids' shape, {shape}")
    asked = labels != IGNORED
    fits = bool((labels[asked] >= 0).all())
    expect(f"task.{name}.labels", int(labels.min()), fits, f"words from 0, or {IGNORED} where none is asked for")
    mask = tokens.get("attention_mask")
    own = shape if mask is None else tuple(mask.shape)
    expect(f"task.{name}.tokens['attention_mask']", own, own == shape, f"the input_ids' shape, {shape}")
    padded = [] if mask is None else (asked & (mask == 0)).any(1).nonzero().flatten().tolist()
    expect(f"task.{name}.labels", f"words in the padding of rows {padded[:5]}", not padded, f"{IGNORED} there")
    empty = (~asked[:, 1:].any(1)).nonzero().flatten().tolist()
    expect(f"task.{name}.labels", f"none in rows {empty[:5]}", not empty, "a word after the first token in every row")


def check_runs(runs: Sequence[FineTuningRun], rows: int, batch_size: int) -> None:
    """Raise ValueError for a run that cannot be trained on `rows` rows."""
    expect("runs", runs, isinstance(runs, Sequence), "a list of FineTuningRun")
    expect("runs", list(runs), len(runs) > 0, "at least one run")
    for run in runs:
        expect("runs", run, isinstance(run, FineTuningRun), "each a FineTuningRun")
        _check_config(run)
        for name, rate in (("lr", run.lr), ("head_lr", run.lr if run.head_lr is None else run.head_lr)):
            expect(name, rate, is_number(rate, above=0), "a finite number > 0")
        expect("seed", run.seed, is_integer(run.seed) and 0 <= run.seed < 2**63, "an integer >= 0, below 2^63")
        own = torch.arange(rows) if run.subset is None else _subset(run.subset)
        expect("subset", f"{len(own)} rows", len(own) >= batch_size, f"at least one batch of {batch_size}")
        expect("subset", run.subset, int(own.min()) >= 0 and int(own.max()) < rows, f"rows from 0 to {rows - 1}")


def _check_config(run: FineTuningRun) -> None:
    config = run.config
    expect("config", config, isinstance(config, PeftConfig), "a DeepLoraConfig, LoraConfig or another of peft's")
    expect("config.inference_mode", config.inference_mode, not config.inference_mode, "False, as it is to be trained")
    ratio = run.lr_ratio
    expect("lr_ratio", ratio, ratio is None or ratio == 0 or is_number(ratio, above=0), "None or a finite number >= 0")
    lora = type(config) is LoraConfig
    knows = ratio is None or lora or isinstance(config, DeepLoraConfig)
    expect("lr_ratio", ratio, knows, f"None for {type(config).__name__}, which has no outer factors")
    waits = starts_compressed(config)
    own, drawn = isinstance(run.start, GradientStart), lora and getattr(config, "init_lora_weights", True) in DRAWN
    fits = run.start is None or (own and (waits or drawn)) or (callable(run.start) and not waits)
    ours = "None or a GradientStart: the factors come from the first gradient"
    wanted = ours if waits else "None or a function, as paper_lora_start, or of LoRA drawn by peft a GradientStart"
    expect("start", run.start, fits, wanted)


def check_model(model: nn.Module, dropout: bool) -> None:
    """Raise ValueError for a model whose pass is not the sum of its runs' own."""
    if any(parameter.dtype is torch.float16 for parameter in model.parameters()):
        raise ValueError("the model is in float16, expected float32 or bfloat16: eps^L = 1e-9 underflows there")
    for name, module in model.named_modules():
        if isinstance(module, (BaseTunerLayer, PeftModel)):
            raise ValueError(
                f"{name!r} is {type(module).__name__}, expected a model without adapters: unload() it first"
            )
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            kind = type(module).__name__
            raise ValueError(f"{name!r} is {kind}, expected no statistics over a batch: a batch holds all runs")
        if dropout and isinstance(module, nn.RNNBase) and module.dropout > 0:
            kind = f"{type(module).__name__} with dropout {module.dropout:g}"
            raise ValueError(f"{name!r} is {kind}, which draws for all runs at once: expected dropout=0")
        if getattr(module, "gradient_checkpointing", False):
            raise ValueError(f"{name!r} has gradient checkpointing on: call model.gradient_checkpointing_disable()")


def _subset(subset: Any) -> Tensor:
    try:
        rows = torch.as_tensor(subset)
    except (TypeError, ValueError, RuntimeError):
        rows = torch.zeros(0, 0)
    if rows.dtype is torch.bool:
        raise ValueError("subset is a mask of bools, expected the numbers of rows: mask.nonzero().flatten()")
    whole = not (rows.is_floating_point() or rows.is_complex()) or rows.shape == (0,)
    expect("subset", subset, rows.dim() == 1 and whole, "integers in one dimension, the numbers of rows")
    return rows
