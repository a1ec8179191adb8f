"""Whether a tokenizer cuts texts into the parts of words that its vocabulary holds, or has lost how to merge them.

transformers before 5.18 reads the tokenizer of a GGUF file of Gemma without its merges: every text is cut into single
characters then. A model that was trained on parts of words understands nothing of it, and no error tells so.
"""

from __future__ import annotations

from typing import Any

from compressible.data.manifest import DataError
from compressible.runtime.paths import cache_dir

WORDS = 1000  # entries of a vocabulary that must hold parts of words: bytes and characters are fewer
LOOKED_AT = 500  # entries, evenly over the vocabulary
LOST = 0.9  # pieces a character where entries are cut into single ones; about .2 where they stay whole


def expect_words(tokenizer: Any) -> None:
    """Raise DataError for a tokenizer of transformers that cuts its own entries into single characters.

    Only entries of several letters or digits tell: a vocabulary without them, or of few entries, is meant to be so.
    """
    entries = len(tokenizer)
    if entries <= WORDS:
        return
    words = [*filter(_is_word, map(_plain, _some_entries(tokenizer)))]
    pieces = tokenizer(words, verbose=False, add_special_tokens=False)["input_ids"] if words else []
    found, characters = sum(map(len, pieces)), sum(map(len, words))
    if found > LOST * characters:
        told = f"the tokenizer, of {entries} entries, cuts texts of {characters} characters into {found} pieces"
        why = "expected parts of words: its merges are lost, as transformers before 5.18 loses those of a GGUF file"
        what = f"pip install 'transformers>=5.18', for whose version {cache_dir() / 'widened'} keeps the file anew"
        raise DataError(f"{told}, {why}; what to do: {what}")


def _some_entries(tokenizer: Any) -> list[str]:
    """Texts of entries, evenly over the vocabulary, whose numbers may have gaps."""
    known = sorted(tokenizer.get_vocab().values())
    return tokenizer.batch_decode([[entry] for entry in known[:: max(1, len(known) // LOOKED_AT)]])


def _plain(text: str) -> str:
    """An entry without its space, or BERT's mark of a piece that goes on."""
    return text.strip().removeprefix("##")


def _is_word(text: str) -> bool:
    return len(text) > 1 and text.isalnum()
