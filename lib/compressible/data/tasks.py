"""Text tasks: rows of a data set tokenised, the few-shot subset, the score.

Two protocols (papers' traps T3 to T5):
  clean    every row is kept, cut at max_length; a subset holds no row twice
  authors  rows of more than max_length word pieces are dropped, from the validation rows too; a subset is drawn with
           replacement (P1's own draws, by JAX, cannot be repeated here)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compressible.data import metrics
from compressible.data.examples import IGNORED, Examples, padded
from compressible.data.text import SETS, SPLITS, Rows, read_rows
from compressible.runtime import checks

__all__ = ["IGNORED", "PROTOCOLS", "Examples", "Task", "examples", "load_task", "padded", "references_of"]

PROTOCOLS = ("clean", "authors")


@dataclass(frozen=True, eq=False)
class Task:
    """A task ready to train on: its rows and its metric.

    Args:
        name: what it is called.
        kind: "regression", "classification", "generation" of a text from another, or "causal", where the text goes on.
        outputs: number of a head's outputs; 0 for no head.
        metric: "pearson", "matthews", "accuracy" or "bleu".
        train, validation: the rows.
        protocol: "clean" or "authors", as explained above.
        sources: where the rows of each split came from.
        dropped: how many rows of each split were too long for the authors' protocol.

    Example:
        >>> import compressible as cd, numpy as np, torch
        >>> rows = cd.Examples({"attention_mask": torch.ones(4, 3)}, torch.arange(4.0), (("a",),) * 4)
        >>> task = cd.Task("mine", "regression", 1, "pearson", train=rows, validation=rows)
        >>> sorted(task.subset(4, seed=0).tolist())
        [0, 1, 2, 3]
        >>> round(task.score(np.array([[1.0], [3.0], [5.0], [7.0]]), rows.labels.numpy()), 6)
        1.0

    Reference:
        P1's few-shot experiments on GLUE and E2E; its authors' code, cjyaras/deep-lora-transformers.
    """

    name: str
    kind: str
    outputs: int
    metric: str
    train: Examples
    validation: Examples
    protocol: str = "clean"
    sources: tuple[str, str] = ("", "")
    dropped: tuple[int, int] = (0, 0)

    def subset(self, size: int, seed: int, replace: bool | None = None) -> Tensor:
        """(size,) int64 indices into the training rows; the same for ever, and those of a smaller size come first.

        `replace` is whether a row may come twice; None: as the protocol has it, in `authors` it may. Raises ValueError
        for a size below 1, or above the number of rows where none may come twice.
        """
        replace = self.protocol == "authors" if replace is None else replace
        rows = len(self.train)
        expected = "at least 1" if replace else f"1 to {rows}"
        if not 1 <= size <= (math.inf if replace else rows):
            raise ValueError(f"subset: size is {size!r}, expected {expected}")
        # The raw stream of a bit generator never changes; Generator.choice may, between versions of numpy.
        raw = np.random.PCG64(seed).random_raw(size if replace else rows)
        chosen = raw % np.uint64(rows) if replace else np.argsort(raw, kind="stable")[:size]
        return torch.as_tensor(chosen.astype(np.int64))

    def score(self, outputs: np.ndarray | Sequence[str], labels: np.ndarray | Sequence[Sequence[str]]) -> float:
        """The task's metric, higher is better, of outputs (N, outputs) and labels (N,) as numpy arrays.

        For generation: N texts and, for each, one or more references. Raises ValueError if N differs, or for
        an unknown metric.
        """
        if len(outputs) != len(labels):
            raise ValueError(f"score: {len(outputs)} outputs and {len(labels)} labels, expected as many")
        if self.metric == "bleu":
            return metrics.bleu(list(outputs), [[*known] for known in labels])
        if self.metric not in metrics.METRICS:
            raise ValueError(checks.unknown("metric", self.metric, [*metrics.METRICS, "bleu"]))
        return metrics.METRICS[self.metric](np.asarray(outputs), np.asarray(labels))


def load_task(name: str, tokenizer: Any, protocol: str = "clean", max_length: int = 128, source: str = "auto") -> Task:
    """A text task, tokenised.

    Args:
        name: one of text.SETS: GLUE's "stsb", "cola", "sst2", "mrpc", "rte", "qnli", "mnli", "qqp", then "e2e" and
            "wordnet-glosses", and sentences with human ratings, "vader-tweets", "-movies", "-products", "-news".
        tokenizer: a tokenizer of transformers with a padding token, as `load_tokenizer` gives it.
        protocol: "clean" or "authors", as explained above.
        max_length: longest row in word pieces, from 3; usually 128, for "e2e" 64.
        source: "local" (COMPRESSIBLE_DATA, cache, package index), "hub", or "auto", which is local first.

    Returns:
        The `Task` with all of its rows; `task.subset(size, seed)` chooses few.

    Raises:
        ValueError: for an unknown name, protocol or source, a tokenizer without padding, or if no row is left.
        DataError: if the rows cannot be had; it says what was tried and what to do.

    Example:
        >>> import compressible as cd
        >>> task = cd.load_task("stsb", cd.load_tokenizer("minilm"))  # doctest: +SKIP
        >>> task.kind, task.metric, len(task.train)  # doctest: +SKIP
        ('regression', 'pearson', 5749)

    Reference:
        The tasks of P1's Table 1 (GLUE), Table 2 (E2E) and Figure 7 (STS-B).
    """
    if protocol not in PROTOCOLS:
        raise ValueError(checks.unknown("protocol", protocol, PROTOCOLS))
    if tokenizer.pad_token_id is None:
        raise ValueError(f"{type(tokenizer).__name__} has no padding token, expected one: set tokenizer.pad_token")
    if not isinstance(max_length, int) or max_length < 3:
        raise ValueError(f"max_length is {max_length!r}, expected an integer >= 3")
    rows, held = (read_rows(name, split, source) for split in SPLITS)
    known = SETS[name]
    train, validation = (examples(part, known.kind, tokenizer, protocol, max_length) for part in (rows, held))
    dropped = len(rows.labels) - len(train), len(held.labels) - len(validation)
    sources = rows.source, held.source
    return Task(name, known.kind, known.outputs, known.metric, train, validation, protocol, sources, dropped)


def examples(rows: Rows, kind: str, tokenizer: Any, protocol: str, max_length: int) -> Examples:
    """Tokenised rows, by the protocol cut at `max_length` word pieces or dropped above; ValueError if none is left."""
    drop = protocol == "authors"
    cut = {"truncation": False} if drop else {"truncation": True, "max_length": max_length}
    columns = [list(column) for column in zip(*rows.texts, strict=True)]
    encoded = dict(tokenizer(*columns, padding=False, verbose=False, **cut))
    written = tokenizer(text_target=rows.labels, verbose=False, **cut)["input_ids"] if kind == "generation" else None
    sizes = [encoded["input_ids"], *([written] if written else [])]
    keep = [row for row in range(len(rows.labels)) if not drop or all(len(ids[row]) <= max_length for ids in sizes)]
    if not keep:
        raise ValueError(f"no row of {rows.source} has at most {max_length} word pieces")
    padding = {"input_ids": tokenizer.pad_token_id, "token_type_ids": tokenizer.pad_token_type_id}
    tokens = {name: padded([ids[row] for row in keep], padding.get(name, 0)) for name, ids in encoded.items()}
    if written:
        labels = padded([written[row] for row in keep], IGNORED)
    else:
        dtype = torch.float32 if kind == "regression" else torch.int64
        labels = torch.tensor([rows.labels[row] for row in keep], dtype=dtype)
    texts = tuple(rows.texts[row] for row in keep)
    return Examples(tokens, labels, texts, references_of(rows, keep) if written else (), padding)


def references_of(rows: Rows, keep: list[int]) -> tuple[tuple[str, ...], ...]:
    """For each kept row all texts that the split has for the same input."""
    known: dict[tuple[str, ...], list[str]] = {}
    for texts, label in zip(rows.texts, rows.labels, strict=True):
        known.setdefault(texts, []).append(label)
    return tuple(tuple(known[rows.texts[row]]) for row in keep)
