"""One network on examples of which a share has wrong labels: does a compressed block fit fewer of them?

One draw of wrong labels serves all seeds, so intervals over seeds say what starts and batches change, and no more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from compressible.experiments.network_variants import Comparison, Found, end, tune
from compressible.networks.training import Examples
from compressible.runtime.checks import expect


def mislabelled(targets: Tensor, share: float, classes: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return labels (N,) of which round(share N), drawn at random, are another class, and whether each is (N,).

    Args:
        targets: true labels (N,), 0 to classes - 1.
        share: of labels to be wrong, [0, 1).
        classes: number K of classes, at least 2; each wrong one is as likely as another.
        generator: source of randomness, on the CPU.

    Raises:
        ValueError: for a share out of range.

    Example:
        >>> labels, wrong = mislabelled(torch.arange(10), 0.3, 10, torch.Generator().manual_seed(0))
        >>> int(wrong.sum()), bool(((labels != torch.arange(10)) == wrong).all())
        (3, True)
    """
    expect("share", share, 0 <= share < 1, "at least 0 and below 1")
    rows = torch.randperm(len(targets), generator=generator)[: round(share * len(targets))].to(targets.device)
    labels = targets.clone()
    others = torch.randint(1, classes, (len(rows),), generator=generator).to(targets.device)
    labels[rows] = (labels[rows] + others) % classes
    return labels, labels != targets


def under_wrong_labels(
    comparison: Comparison,
    shares: Sequence[float],
    rates: Sequence[float],
    tuning_seeds: Sequence[int],
    seeds: Sequence[int],
    rows: int,
    classes: int,
) -> Found:
    """Train every variant on `rows` examples of which a share has wrong labels; the test labels are all right.

    The validation labels are as often wrong as those of training, for nobody has better ones where these are bad. One
    draw of wrong labels serves all seeds.

    Args:
        comparison: its tuning and validation examples are taken, and its test data judge.
        shares: of labels to be wrong, [0, 1), ascending.
        rates: grid from which each variant takes its own learning rate at each share.
        tuning_seeds, seeds: those that choose the rates, and S others that are judged.
        rows: examples to train on, few enough for the plan's steps to pass over them often.
        classes: number K of classes.

    Returns:
        Arrays (shares, S) at each variant's own best rate: "<name>/final" test accuracy, "<name>/best" on the way,
        "<name>/drop" from there to the end, "<name>/fitted", the share of wrong labels that the network has learned
        (NaN where none is wrong).
    """
    by_share = [_noisy(comparison, share, rows, classes) for share in shares]
    found: dict[str, list[np.ndarray]] = {}
    for noisy, wrong in by_share:
        tuned = tune(noisy, rates, tuning_seeds, evaluate_every=noisy.plan["evaluate_every"])
        for name in noisy.variants:
            rate = float(tuned[f"{name}/own_rate"][0])
            for key, values in _fit(noisy, wrong, name, seeds, rate).items():
                found.setdefault(f"{name}/{key}", []).append(values)
    return {key: np.stack(values) for key, values in found.items()}


def less_overfit(found: Found, name: str, base: str = "plain") -> Found:
    """Return by how much `name` ends above `base`, drops less, fits fewer wrong labels at the largest share, (S,)."""
    signs = {"final": 1, "drop": -1, "fitted": -1}
    return {f"{name} - {base}/{k}": s * (found[f"{name}/{k}"] - found[f"{base}/{k}"])[-1] for k, s in signs.items()}


def _noisy(comparison: Comparison, share: float, rows: int, classes: int) -> tuple[Comparison, Examples | None]:
    """The comparison on fewer examples with wrong labels, and those that are wrong, None for none."""
    generator = torch.Generator().manual_seed(0)
    known, held = comparison.tuning, comparison.validation
    few = torch.randperm(len(known.targets), generator=generator)[:rows]
    labels, wrong = mislabelled(known.targets[few], share, classes, generator)
    held_labels, _ = mislabelled(held.targets, share, classes, generator)
    noisy = Examples(known.inputs[few], labels)
    validation = Examples(held.inputs, held_labels)
    changed = replace(comparison, training=noisy, tuning=noisy, validation=validation)
    return changed, Examples(noisy.inputs[wrong], labels[wrong]) if wrong.any() else None


def _fit(
    comparison: Comparison, wrong: Examples | None, name: str, seeds: Sequence[int], rate: float
) -> dict[str, np.ndarray]:
    history = comparison.train(name, seeds, [rate] * len(seeds), validation_set=wrong)
    final, best = end(history.accuracy), history.accuracy.max(1)
    return {"final": final, "best": best, "drop": best - final, "fitted": history.validation_accuracy[:, -1]}
