"""How near written texts are to reference texts: BLEU, ROUGE and METEOR, each by the package that is known for it.

All are from 0 to 1, higher is better. BLEU is sacrebleu's, of all texts together. ROUGE-1, -2, -L and -Lsum are F
measures of rouge-score, without stemming, and METEOR is nltk's with its usual constants: means over the texts.
Sentences end where ". ", "! " or "? " does, words are those of nltk's Treebank tokenizer: so no other data than WordNet
is needed. METEOR wants WordNet's words of equal meaning: nltk's own copy where there is one, else the files of Debian's
package wordnet-base, which the manifest names; where neither can be had, METEOR is left out, and `without_meteor` says
why.
"""

from __future__ import annotations

import functools
import io
import re
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from compressible.data.manifest import DataError, fetch_all, load_manifest
from compressible.data.metrics import bleu
from compressible.runtime.checks import one_line

ROUGE = {"ROUGE-1": "rouge1", "ROUGE-2": "rouge2", "ROUGE-L": "rougeL", "ROUGE-Lsum": "rougeLsum"}
METRICS = ("BLEU", *ROUGE, "METEOR")
LEXNAMES = "".join(f"{at:02d} unnamed 0\n" for at in range(45))  # groups of words, of which METEOR asks nothing


def written_scores(written: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Each of METRICS for N texts with a reference each, N >= 1; without "METEOR" where its data is not.

    Raises ValueError for unequal numbers, ImportError where sacrebleu or rouge-score are not installed.
    """
    if len(written) != len(references) or not written:
        raise ValueError(f"{len(written)} texts and {len(references)} references, expected as many, one at least")
    found = {"BLEU": bleu(written, [[reference] for reference in references])}
    found |= _rouge(written, references)
    words, _ = _found_wordnet()
    return found if words is None else found | {"METEOR": _meteor(written, references, words)}


def without_meteor() -> str:
    """Why METEOR is left out: what was tried for WordNet; "" where it is there."""
    return _found_wordnet()[1]


@functools.cache
def _found_wordnet() -> tuple[Any, str]:
    """WordNet as nltk reads it, and "", or None, and why."""
    try:
        return _nltk_wordnet(), ""
    except ImportError as error:
        return None, one_line(error)
    except LookupError:
        try:
            return _fetched_wordnet(), ""
        except DataError as error:
            return None, f"nltk has no WordNet, and {one_line(error)}"


def _nltk_wordnet() -> Any:
    corpus = _installed("nltk.corpus").wordnet
    corpus.ensure_loaded()
    return corpus


def _fetched_wordnet() -> Any:
    names = [name for name in load_manifest() if name.startswith("wordnet/")]
    folders = {path.parent for path in fetch_all(names)}
    if len(folders) > 1:
        raise DataError(f"WordNet's files lie in {len(folders)} folders, expected one")
    return _reader(str(folders.pop()))


def _reader(folder: str) -> Any:
    """nltk's reader of a folder without a list of names and other versions of WordNet, of which METEOR asks nothing."""
    base: Any = _installed("nltk.corpus.reader.wordnet").WordNetCorpusReader

    class Reader(base):
        def open(self, file: str) -> Any:
            return io.StringIO(LEXNAMES) if file == "lexnames" else super().open(file)

        def map_wn(self, version: str = "wordnet") -> None:
            return None

    _installed("nltk.data").path.append(folder)  # nltk reads nowhere else
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The multilingual functions are not available")
        return Reader(folder, None)


def _rouge(written: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    scorer = _installed("rouge_score.rouge_scorer").RougeScorer([*ROUGE.values()], use_stemmer=False)
    each = [scorer.score(_lines(one), _lines(other)) for one, other in zip(references, written, strict=True)]
    return {name: float(np.mean([score[kind].fmeasure for score in each])) for name, kind in ROUGE.items()}


def _meteor(written: Sequence[str], references: Sequence[str], words: Any) -> float:
    score = _installed("nltk.translate.meteor_score").single_meteor_score
    pairs = zip(references, written, strict=True)
    return float(np.mean([score(_words(one), _words(other), wordnet=words) for one, other in pairs]))


def _sentences(text: str) -> list[str]:
    return re.split(r"(?<=[.!?])\s+", text.strip())


def _lines(text: str) -> str:
    return "\n".join(_sentences(text))


def _words(text: str) -> list[str]:
    tokenize = _treebank().tokenize
    return [word for sentence in _sentences(text) for word in tokenize(sentence)]


@functools.cache
def _treebank() -> Any:
    return _installed("nltk.tokenize.destructive").NLTKWordTokenizer()


def _installed(module: str) -> Any:
    from importlib import import_module

    try:
        return import_module(module)
    except ImportError as error:
        package = module.partition(".")[0].replace("_", "-")
        raise ImportError(f"{package} is not installed: pip install 'compressible-dynamics[adapters]'") from error
