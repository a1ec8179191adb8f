"""Texts to write for a causal language model: a prompt, then the answer, which alone is asked for.

The prompt of a row is PROMPT with the row's text in it; the answer stands behind a space and ends with the tokenizer's
mark of the end. N rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from compressible.data.tasks import IGNORED, PROTOCOLS, Examples, Task, padded, references_of
from compressible.data.text import SETS, SPLITS, Rows, read_rows
from compressible.data.word_pieces import expect_words
from compressible.runtime import checks

PROMPT = "Data: {}\nText:"


def load_causal_task(
    name: str, tokenizer: Any, protocol: str = "clean", max_length: int = 64, source: str = "auto"
) -> Task:
    """A task of texts to write, such as "e2e", tokenised for a causal language model; its kind is "causal".

    Args:
        name: a task of text.SETS whose kind is "generation": "e2e", or "wordnet-glosses", which needs no local folder.
        tokenizer: of transformers, with marks of padding and of the end, as `load_causal_lm` gives it.
        protocol: "authors" drops rows whose text or answer has more than `max_length` word pieces, by themselves;
            "clean" cuts answers there.
        max_length: word pieces of a text and of an answer at most, the mark of the end with it, from 3.
        source: as for `load_task`.

    Returns:
        The `Task`; its rows' texts are what stands in the prompts, `prompts(rows.texts)` gives these.

    Raises:
        ValueError: for an unknown name or protocol, another kind of task, or if no row is left.
        DataError: if the rows cannot be had, or the tokenizer has lost its merges.

    Example:
        >>> import compressible as cd
        >>> _, tokenizer = cd.load_causal_lm("gemma3-270m")  # doctest: +SKIP
        >>> task = cd.load_causal_task("e2e", tokenizer)  # doctest: +SKIP
        >>> task.kind, len(task.train)  # doctest: +SKIP
        ('causal', 42061)

    Reference:
        P1's Table 2 (E2E) with a decoder in the place of T5.
    """
    if protocol not in PROTOCOLS:
        raise ValueError(checks.unknown("protocol", protocol, PROTOCOLS))
    written = [known for known, task in SETS.items() if task.kind == "generation"]
    if name not in written:
        raise ValueError(checks.unknown("task", name, written))
    checks.expect("max_length", max_length, isinstance(max_length, int) and max_length >= 3, "an integer >= 3")
    found = [read_rows(name, split, source) for split in SPLITS]
    train, held = (continued(rows, tokenizer, protocol, max_length) for rows in found)
    dropped = len(found[0].labels) - len(train), len(found[1].labels) - len(held)
    sources = found[0].source, found[1].source
    return Task(name, "causal", 0, SETS[name].metric, train, held, protocol, sources, dropped)


def prompts(texts: Sequence[tuple[str, ...]]) -> list[str]:
    """What a causal language model goes on with, for each of N rows' texts."""
    return [PROMPT.format(*row) for row in texts]


def continued(rows: Rows, tokenizer: Any, protocol: str, max_length: int) -> Examples:
    """Rows as prompt and answer, by the protocol cut or dropped above `max_length`; ValueError if none is left."""
    end, padding = tokenizer.eos_token_id, tokenizer.pad_token_id
    checks.expect("the tokenizer's mark of the end", end, end is not None, "one: set tokenizer.eos_token")
    expect_words(tokenizer)
    written = [f" {label}" for label in rows.labels]
    pieces = tokenizer(written, verbose=False, add_special_tokens=False)["input_ids"]
    answers = [[*ids, end] for ids in pieces]
    keep = list(range(len(answers)))
    if protocol == "authors":
        texts = tokenizer([text for (text,) in rows.texts], verbose=False)["input_ids"]
        keep = [row for row in keep if max(len(texts[row]), len(answers[row])) <= max_length]
    if not keep:
        raise ValueError(f"no row of {rows.source} has at most {max_length} word pieces")
    kept = tuple(rows.texts[row] for row in keep)
    starts = tokenizer(prompts(kept), verbose=False)["input_ids"]
    tokens, labels = _tensors(starts, [answers[row][:max_length] for row in keep], padding)
    return Examples(tokens, labels, kept, references_of(rows, keep), {"input_ids": padding})


def _tensors(
    starts: list[list[int]], answers: list[list[int]], padding: int
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Tokens and labels (N, T): the row's own tokens where the answer stands, -100 elsewhere."""
    pairs = [*zip(starts, answers, strict=True)]
    ids = padded([start + answer for start, answer in pairs], padding)
    labels = padded([[IGNORED] * len(start) + answer for start, answer in pairs], IGNORED)
    mask = padded([[1] * (len(start) + len(answer)) for start, answer in pairs], 0)
    return {"input_ids": ids, "attention_mask": mask}, labels
