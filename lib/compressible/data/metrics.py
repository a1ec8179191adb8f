"""Scores of predictions: the metric that GLUE reports for a task, and the usual ones for written text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from types import ModuleType

import numpy as np


def pearson(outputs: np.ndarray, labels: np.ndarray) -> float:
    """Pearson's correlation of (N,) or (N, 1) outputs with (N,) labels; 0 if one is constant, NaN if not finite."""
    from scipy.stats import pearsonr

    found = outputs.reshape(len(labels)).astype(np.float64)
    if not np.isfinite(found).all():
        return float("nan")
    if np.ptp(found) == 0 or np.ptp(labels) == 0:
        return 0.0
    return float(pearsonr(found, labels.astype(np.float64)).statistic)


def matthews(outputs: np.ndarray, labels: np.ndarray) -> float:
    """Matthews' correlation of the largest of (N, C) outputs with (N,) classes; 0 if one class is always chosen."""
    from sklearn.metrics import matthews_corrcoef

    return float(matthews_corrcoef(labels, outputs.argmax(1))) if np.isfinite(outputs).all() else float("nan")


def accuracy(outputs: np.ndarray, labels: np.ndarray) -> float:
    """Share of the (N, C) outputs whose largest is the class in (N,) labels."""
    return float(np.mean(outputs.argmax(1) == labels)) if np.isfinite(outputs).all() else float("nan")


METRICS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "pearson": pearson,
    "matthews": matthews,
    "accuracy": accuracy,
}


def bleu(written: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Corpus BLEU, 0 to 1, of N texts, each with one or more references (sacrebleu's, 13a tokens, 4-grams)."""
    most = max(map(len, references))
    streams = [[found[i] if i < len(found) else None for found in references] for i in range(most)]
    return _optional("sacrebleu").corpus_bleu(list(written), streams).score / 100


def rouge(written: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Mean F1, 0 to 1, of ROUGE-1, -2, -L and -Lsum over N texts, of each the best reference (rouge-score's)."""
    kinds = ["rouge1", "rouge2", "rougeL", "rougeLsum"]
    scorer = _optional("rouge_score.rouge_scorer").RougeScorer(kinds, use_stemmer=False)
    found = [scorer.score_multi(list(known), text) for known, text in zip(references, written, strict=True)]
    return {kind: float(np.mean([score[kind].fmeasure for score in found])) for kind in kinds}


def meteor(written: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Mean METEOR, 0 to 1, over N texts (NLTK's, which needs its corpus wordnet)."""
    score, split = _optional("nltk.translate.meteor_score").meteor_score, _optional("nltk.tokenize").wordpunct_tokenize
    pairs = zip(references, written, strict=True)
    return float(np.mean([score([split(one) for one in known], split(text)) for known, text in pairs]))


def _optional(name: str) -> ModuleType:
    package = name.partition(".")[0].replace("_", "-")
    try:
        return import_module(name)
    except ImportError as error:
        raise ImportError(f"scores of written text need {package}: pip install sacrebleu rouge-score nltk") from error
