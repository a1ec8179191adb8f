"""Metrics of predictions: what GLUE reports for a task, and BLEU for written text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import Any

import numpy as np

from compressible.runtime.checks import expect


def pearson(outputs: np.ndarray, labels: np.ndarray) -> float:
    """Pearson's correlation of outputs and labels, each (N,) or (N, 1); 0 if one is constant, NaN if not finite."""
    from scipy.stats import pearsonr

    for name, value in (("outputs", outputs), ("labels", labels)):
        expect(name, np.shape(value), np.size(value) == len(labels), f"one a row, {len(labels)}, for a correlation")
    labels = labels.reshape(len(labels))
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
    try:
        from sacrebleu import corpus_bleu
    except ImportError as error:
        raise ImportError("BLEU needs sacrebleu: pip install 'compressible-dynamics[adapters]'") from error
    # None where a text has fewer references than others, which sacrebleu's types leave out.
    streams: list[Any] = [*map(list, zip_longest(*references))]
    return corpus_bleu(list(written), streams).score / 100
