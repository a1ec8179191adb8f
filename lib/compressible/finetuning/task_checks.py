"""What of a task `fine_tune` refuses before work starts: labels that no loss is of, ids that no table has a row for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from compressible.data.examples import IGNORED
from compressible.data.tasks import Task
from compressible.finetuning.batches import ExamplesLike, TaskLike
from compressible.finetuning.losses import KINDS, WRITTEN
from compressible.runtime.checks import expect

METRICS_OF = {"regression": ("pearson",), "classification": ("accuracy", "matthews")}
PLACES = ("position_embeddings", "wpe")  # ends of the names of tables that have a row a place


def check_task(task: TaskLike, scored: bool) -> None:
    """Raise ValueError for labels that no loss is of; of the validation set, too, if it is to be `scored`."""
    whole = all(hasattr(task, name) for name in ("kind", "train", "validation"))
    expect("task", type(task).__name__, whole, "kind, train, validation and score, as Task has them")
    expect("task.kind", task.kind, task.kind in KINDS, f"one of {', '.join(KINDS)}")
    parts = {"train": task.train} | ({"validation": task.validation} if scored else {})
    if scored and isinstance(task, Task) and task.kind not in WRITTEN:
        metrics = METRICS_OF[task.kind]
        expect("task.metric", task.metric, task.metric in metrics, f"of a {task.kind} one of {', '.join(metrics)}")
    for name, part in parts.items():
        known = all(hasattr(part, own) for own in ("tokens", "labels"))
        expect(f"task.{name}", type(part).__name__, known, "tokens and labels, as Examples has them")
        _check_rows(f"task.{name}", part)
        labels = part.labels
        if task.kind == "regression":
            spoilt = (~torch.isfinite(labels.reshape(len(labels), -1)).all(1)).nonzero().flatten().tolist()
            expect(f"task.{name}.labels", f"not finite in rows {spoilt[:5]}", not spoilt, "finite labels")
            single = not (scored and isinstance(task, Task)) or labels.numel() == len(labels)
            expect(f"task.{name}.labels", tuple(labels.shape), single, "one a row, which its metric is of")
        else:
            whole = not (labels.is_floating_point() or labels.is_complex() or labels.dtype is torch.bool)
            expect(f"task.{name}.labels", labels.dtype, whole, "integers")
        if task.kind == "causal":
            _check_continued(name, part)
        if task.kind == "generation":
            _check_words(name, labels, "a word in every row")
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


def _check_continued(name: str, part: ExamplesLike) -> None:
    """Raise ValueError for labels (N, T) of a causal language model that ask for no word, or for one of the padding."""
    labels, tokens = part.labels, part.tokens
    ids, mask = tokens.get("input_ids"), tokens.get("attention_mask")
    shape = None if ids is None else tuple(ids.shape)
    expect(f"task.{name}.labels", tuple(labels.shape), tuple(labels.shape) == shape, f"the input_ids' shape, {shape}")
    own = shape if mask is None else tuple(mask.shape)
    expect(f"task.{name}.tokens['attention_mask']", own, own == shape, f"the input_ids' shape, {shape}")
    _check_words(name, labels, "a word after the first token in every row", first=1)
    padded = [] if mask is None else ((labels != IGNORED) & (mask == 0)).any(1).nonzero().flatten().tolist()
    expect(f"task.{name}.labels", f"words in the padding of rows {padded[:5]}", not padded, f"{IGNORED} there")


def _check_words(name: str, labels: Tensor, wanted: str, first: int = 0) -> None:
    """Raise ValueError unless labels (N, T) ask for a word from `first` on in every row; dry_run.py has the largest."""
    expect(f"task.{name}.labels", tuple(labels.shape), labels.dim() == 2 and labels.numel() > 0, "shape (N, T), T >= 1")
    asked = labels != IGNORED
    fits = bool((labels[asked] >= 0).all())
    expect(f"task.{name}.labels", int(labels.min()), fits, f"words from 0, or {IGNORED} where none is asked for")
    empty = (~asked[:, first:].any(1)).nonzero().flatten().tolist()
    expect(f"task.{name}.labels", f"none in rows {empty[:5]}", not empty, wanted)
