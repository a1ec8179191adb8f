"""Tokenised rows as tensors: examples ready for a model, and batches of them as long as their longest row.

N examples, P in a batch, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from compressible.runtime.token_rows import along_rows

IGNORED = -100  # label where no word is asked for, as PyTorch's cross entropy has it


@dataclass(frozen=True, eq=False)
class Examples:
    """N tokenised rows, ready for a model.

    Args:
        tokens: (N, T) int64 by name, "attention_mask" among them, padded at the end to the longest row. What is not as
            wide as the mask, or named `decoder_...`, such as features (N, k), is no part of the row and never cut.
        labels: (N,) float32 of a regression, (N,) int64 classes, (N, T') int64 of texts to write, -100 beyond their
            end, or of a causal language model (N, T) int64, the row's own tokens where they are asked for, else -100.
        texts: N tuples, the texts of each row.
        references: for each row every text that would be right; generation only.
        padding: what fills a row, by name of the tokens; 0 if not named.

    Example:
        >>> import compressible as cd, torch
        >>> mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
        >>> tokens = {"input_ids": mask * torch.tensor([2, 8, 9, 3]), "attention_mask": mask}
        >>> examples = cd.Examples(tokens, labels=torch.tensor([0.5, 1.0]), texts=(("a word",), ("a",)))
        >>> batch, labels = examples.batch(torch.tensor([1]), multiple=3)
        >>> batch["input_ids"].tolist(), labels.tolist()
        ([[2, 8, 0]], [1.0])
    """

    tokens: dict[str, Tensor]
    labels: Tensor
    texts: tuple[tuple[str, ...], ...]
    references: tuple[tuple[str, ...], ...] = ()
    padding: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def lengths(self) -> Tensor:
        """(N,) int64 on the CPU: tokens in each row."""
        return self.tokens["attention_mask"].sum(1).cpu()

    @cached_property
    def continued(self) -> bool:
        """Whether the labels are the rows' own tokens, where they are asked for, as of a causal language model."""
        ids = self.tokens.get("input_ids")
        if ids is None or ids.shape != self.labels.shape:
            return False
        return bool(((self.labels == ids) | (self.labels == IGNORED)).all())

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
        tokens = {name: value[here] for name, value in self.tokens.items()}
        for name in along_rows(self.tokens):
            tokens[name] = _fit(tokens[name], width, self.padding.get(name, 0))
        labels = self.labels[here]
        if labels.ndim == 2:
            longest = int((labels != IGNORED).any(0).nonzero().max()) + 1
            labels = _fit(labels, width if self.continued else _round_up(longest, multiple), IGNORED)
        return tokens, labels

    def to(self, device: str | torch.device) -> Examples:
        """The same examples with tokens and labels on `device`."""
        tokens = {name: value.to(device) for name, value in self.tokens.items()}
        return replace(self, tokens=tokens, labels=self.labels.to(device))


def padded(rows: list[list[int]], value: int) -> Tensor:
    """Rows of unequal lengths as one tensor (N, T), filled at the end with `value`."""
    lengths = np.array([len(row) for row in rows])
    filled = np.full((len(rows), lengths.max()), value, dtype=np.int64)
    filled[np.arange(lengths.max()) < lengths[:, None]] = np.concatenate(rows)
    return torch.from_numpy(filled)


def _fit(values: Tensor, width: int, value: int) -> Tensor:
    """(P, T) cut or padded to (P, width)."""
    return functional.pad(values[:, :width], (0, max(width - values.shape[1], 0)), value=value)


def _round_up(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple
