"""Text tasks as tensors: examples ready for an encoder, the few-shot subset, the score.

N examples, P in a batch, T tokens. Two protocols (papers' traps T3 to T5):
  clean    every row is kept, cut at max_length; a subset holds no row twice
  authors  rows of more than max_length word pieces are dropped, from the validation rows too; a subset is drawn with
           replacement (P1's own draws, by JAX, cannot be repeated here)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from compressible.data import metrics as scores
from compressible.data.text import SETS, SOURCES, SPLITS, Rows, read_rows
from compressible.runtime import checks

PROTOCOLS = ("clean", "authors")
IGNORED = -100  # label beyond the end of a text to write, as PyTorch's cross entropy has it


@dataclass(frozen=True, eq=False)
class Examples:
    """N tokenised rows: tokens (N, T) int64 by name, padded at the end to the longest row, and labels.

    Labels are (N,) float32 of a regression, (N,) int64 classes, or (N, T') int64 of texts to write, -100 beyond their
    end. `references` has for each row every text that would be right (generation only).
    """

    tokens: dict[str, Tensor]
    labels: Tensor
    texts: tuple[tuple[str, ...], ...]
    references: tuple[tuple[str, ...], ...] = ()
    padding: dict[str, int] = field(default_factory=dict)  # by name of the tokens, 0 if not named

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def lengths(self) -> Tensor:
        """(N,) int64 on the CPU: tokens in each row."""
        return self.tokens["attention_mask"].sum(1).cpu()

    def take(self, indices: Tensor | Sequence[int]) -> Examples:
        """The rows at `indices` (P,), in that order."""
        chosen = torch.as_tensor(indices, dtype=torch.int64).flatten()
        rows, here = chosen.tolist(), chosen.to(self.labels.device)
        return replace(
            self,
            tokens={name: value[here] for name, value in self.tokens.items()},
            labels=self.labels[here],
            texts=tuple(self.texts[row] for row in rows),
            references=tuple(self.references[row] for row in rows) if self.references else (),
        )

    def batch(self, indices: Tensor, multiple: int = 8) -> tuple[dict[str, Tensor], Tensor]:
        """(tokens, labels) of `indices`, of any shape, flattened to P rows, on the device of the examples.

        Tokens are (P, T''): as long as the longest of these rows, rounded up to `multiple`. Keep `indices` on the CPU:
        then the length is known without waiting for the device. Raises ValueError for a multiple below 1.
        """
        if multiple < 1:
            raise ValueError(f"multiple is {multiple!r}, expected an integer >= 1")
        indices = torch.as_tensor(indices, dtype=torch.int64).flatten()
        here = indices.to(self.labels.device)
        width = _round_up(int(self.lengths[indices.cpu()].max()), multiple)
        tokens = {name: _fit(value[here], width, self.padding.get(name, 0)) for name, value in self.tokens.items()}
        labels = self.labels[here]
        if labels.ndim == 2:
            longest = int((labels != IGNORED).sum(1).max())
            labels = _fit(labels, _round_up(longest, multiple), IGNORED)
        return tokens, labels

    def to(self, device: str | torch.device) -> Examples:
        """The same examples with tokens and labels on `device`."""
        tokens = {name: value.to(device) for name, value in self.tokens.items()}
        return replace(self, tokens=tokens, labels=self.labels.to(device))


@dataclass(frozen=True, eq=False)
class Task:
    """A task ready to train on: kind "regression", "classification" or "generation", its metric and its rows.

    `outputs` is the number of a head's outputs (0: no head), `sources` where the rows came from, `dropped` how many
    rows of each split were too long for the authors' protocol.
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

    def score(self, outputs: Any, labels: Any) -> float:
        """The task's metric, higher is better: outputs (N, outputs) and labels (N,), arrays or tensors.

        For generation: N texts and, for each, one or more references. Raises ValueError if N differs.
        """
        if len(outputs) != len(labels):
            raise ValueError(f"score: {len(outputs)} outputs and {len(labels)} labels, expected as many")
        if self.kind == "generation":
            return scores.bleu(outputs, [[one] if isinstance(one, str) else one for one in labels])
        return scores.METRICS[self.metric](_array(outputs), _array(labels))


def load_task(
    name: str,
    tokenizer: Any,
    protocol: str = "clean",
    max_length: int = 128,
    source: str = "auto",
    manifest: str | Path | None = None,
) -> Task:
    """A task of text_data.SETS, tokenised; `source` is "local", "hub", or "auto", local first.

    Raises ValueError for an unknown name, protocol or source, data.DataError if the rows cannot be had.
    """
    for kind, value, known in (("task", name, SETS), ("protocol", protocol, PROTOCOLS), ("source", source, SOURCES)):
        if value not in known:
            raise ValueError(checks.unknown(kind, value, known))
    if tokenizer.pad_token_id is None:
        raise ValueError(f"{type(tokenizer).__name__} has no padding token, expected one: set tokenizer.pad_token")
    if not isinstance(max_length, int) or max_length < 3:
        raise ValueError(f"max_length is {max_length!r}, expected an integer >= 3")
    known = SETS[name]
    found = [read_rows(name, split, source, manifest) for split in SPLITS]
    parts = [examples(rows, known.kind, tokenizer, protocol, max_length) for rows in found]
    dropped = tuple(len(rows.labels) - len(part) for rows, part in zip(found, parts, strict=True))
    sources = tuple(rows.source for rows in found)
    return Task(name, known.kind, known.outputs, known.metric, *parts, protocol, sources, dropped)


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
    tokens = {name: _padded([ids[row] for row in keep], padding.get(name, 0)) for name, ids in encoded.items()}
    if written:
        labels = _padded([written[row] for row in keep], IGNORED)
    else:
        dtype = torch.float32 if kind == "regression" else torch.int64
        labels = torch.tensor([rows.labels[row] for row in keep], dtype=dtype)
    texts = tuple(rows.texts[row] for row in keep)
    return Examples(tokens, labels, texts, _references(rows, keep) if written else (), padding)


def _references(rows: Rows, keep: list[int]) -> tuple[tuple[str, ...], ...]:
    """For each kept row all texts that the split has for the same input."""
    known: dict[tuple[str, ...], list[str]] = {}
    for texts, label in zip(rows.texts, rows.labels, strict=True):
        known.setdefault(texts, []).append(label)
    return tuple(tuple(known[rows.texts[row]]) for row in keep)


def _padded(rows: list[list[int]], value: int) -> Tensor:
    lengths = np.array([len(row) for row in rows])
    filled = np.full((len(rows), lengths.max()), value, dtype=np.int64)
    filled[np.arange(lengths.max()) < lengths[:, None]] = np.concatenate(rows)
    return torch.from_numpy(filled)


def _fit(values: Tensor, width: int, value: int) -> Tensor:
    """(P, T) cut or padded to (P, width)."""
    return functional.pad(values[:, :width], (0, max(width - values.shape[1], 0)), value=value)


def _round_up(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple


def _array(values: Any) -> np.ndarray:
    return values.detach().float().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
