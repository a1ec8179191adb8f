"""Words of WordNet and what they mean: pairs of a short prompt and a short text that anybody may fetch.

A prompt is a word and its part of speech, "learn (verb)"; the text is the gloss of a set of words of equal meaning that
has the word as its first, up to the first semicolon, behind which other wordings and examples stand. A word with
several such sets gives several pairs. Chosen are WORDS words of one piece in small letters, by a fixed seed, and
validation has HELD_OUT of them, all pairs of a word with it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from compressible.data.manifest import fetch_all

PARTS = {"noun": "noun", "verb": "verb", "adj": "adjective", "adv": "adverb"}
FILES = [f"wordnet/data.{part}" for part in PARTS]
WORDS, HELD_OUT = 4000, 400
LONGEST = 60  # characters of a gloss
LICENCE = "  "  # what the lines of the licence begin with


def glosses(split: str) -> tuple[list[tuple[str]], list[str]]:
    """(texts, labels) of "train" or "validation" in the order of WordNet's files; DataError if these cannot be had."""
    pairs, held = _chosen(tuple(fetch_all(FILES)))
    rows = [(f"{word} ({part})", gloss) for word, part, gloss in pairs if (word in held) == (split == "validation")]
    return [(prompt,) for prompt, _ in rows], [gloss for _, gloss in rows]


@functools.lru_cache(maxsize=2)
def _chosen(files: tuple[Path, ...]) -> tuple[list[tuple[str, str, str]], frozenset[str]]:
    """(word, part of speech, gloss) of the chosen words, and the words that are held out."""
    known = [pair for file, part in zip(files, PARTS.values(), strict=True) for pair in _pairs(file, part)]
    words = sorted({word for word, _, _ in known})
    # The raw stream of a bit generator never changes; Generator.permutation may, between versions of numpy.
    order = np.argsort(np.random.PCG64(0).random_raw(len(words)), kind="stable")[:WORDS]
    chosen = [words[at] for at in order]
    wanted = frozenset(chosen)
    held = frozenset(chosen[: len(chosen) * HELD_OUT // WORDS])
    return [pair for pair in known if pair[0] in wanted], held


def _pairs(file: Path, part: str) -> Iterator[tuple[str, str, str]]:
    """What a file has: a line a set, its fifth column the first word, "(a)" or the like behind some adjectives."""
    with file.open(encoding="utf-8") as lines:
        for line in lines:
            if line.startswith(LICENCE):
                continue
            columns, _, told = line.partition(" | ")
            word = columns.split(" ", 5)[4].partition("(")[0]
            gloss = told.partition(";")[0].strip()
            if word.isalpha() and word.islower() and 0 < len(gloss) <= LONGEST and '"' not in gloss:
                yield word, part, gloss
