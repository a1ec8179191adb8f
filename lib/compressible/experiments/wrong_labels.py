"""One network on examples of which a share has wrong labels: does a compressed block fit fewer of them?

The learning rate decides that as much as the network does: a low one has not learned the wrong labels when training
ends, and too high a one never does, so that accuracy may have two humps over the rates. A rate of a network's own is
therefore chosen for each share, on a grid wide enough for both humps, and one rate for all stands beside it.

One draw of wrong labels serves all seeds, so intervals over seeds say what starts and batches change, and no more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from compressible.experiments.network_variants import Comparison, Found, end, tune
from compressible.experiments.outcomes import prefixed
from compressible.networks.training import Examples
from compressible.runtime.checks import expect

KINDS = ("own", "shared")
SIGNS = {"final": 1, "drop": -1, "fitted": -1}  # whether more is better


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
    shared: float,
    tuning_seeds: Sequence[int],
    seeds: Sequence[int],
    rows: int,
    classes: int,
) -> Found:
    """Train every variant on `rows` examples of which a share has wrong labels; all other labels are right.

    A variant's own rate is chosen at each share: on the same rows with the same wrong labels, after the same steps, by
    the accuracy at the end on validation examples, whose labels are right. Who has such labels can thus avoid learning
    the wrong ones by a rate that is too low for it, and no training is stopped on the way.

    Args:
        comparison: "plain" and others; its tuning and validation examples are taken, and its test data judge.
        shares: of labels to be wrong, [0, 1), ascending.
        rates: grid from which each variant takes its own learning rate at each share, as `tune` has it; wide, a factor
            of 3,000 or so from end to end, for the best of a narrow one may be the lower of two humps.
        shared: learning rate of all variants, for the comparison beside.
        tuning_seeds, seeds: those that choose the rates, and S others that are judged.
        rows: examples to train on, few enough for the plan's steps to pass over them often.
        classes: number K of classes.

    Returns:
        Arrays (shares, S) for each kind of rate, "own" and "shared": "<name>/<kind>/final" test accuracy, ".../best" on
        the way, ".../drop" from there to the end, ".../fitted", the share of wrong labels that the network has learned
        (NaN where none is wrong). Of the choice, as `tune` has them: "<name>/own_rate" and "<name>/inside" (shares,),
        "<name>/<share>/rates" and "<name>/<share>/tuning" (N,), N being those of a variant and a share. And what
        `less_overfit` makes of each variant beside "plain".
    """
    found: dict[str, list[np.ndarray]] = {}
    grids: Found = {}
    for share in shares:
        noisy, wrong = _noisy(comparison, share, rows, classes)
        tuned = tune(noisy, rates, tuning_seeds, evaluate_every=noisy.plan["evaluate_every"])
        for name in noisy.variants:
            grids |= {f"{name}/{share:g}/{key}": tuned[f"{name}/{key}"] for key in ("rates", "tuning")}
            chosen = {key: tuned[f"{name}/{key}"][0] for key in ("own_rate", "inside")}
            kinds = {"own": float(chosen["own_rate"]), "shared": shared}
            for key, values in (chosen | _fit(noisy, wrong, name, seeds, kinds)).items():
                found.setdefault(f"{name}/{key}", []).append(values)
    stacked = {key: np.stack(values) for key, values in found.items()}
    others = [name for name in comparison.variants if name != "plain"]
    return grids | stacked | less_overfit(stacked, others)


def less_overfit(found: Found, names: Sequence[str], base: str = "plain") -> Found:
    """Return "<name> - <base>/<kind>/<key>" (S,), how much better each name is than `base` at the largest share.

    For "final" it is by how much it ends above, for "drop" and "fitted" by how much less it drops and fits.
    """
    kinds = [(name, f"{kind}/{key}", sign) for name in names for kind in KINDS for key, sign in SIGNS.items()]
    return {f"{n} - {base}/{k}": sign * (found[f"{n}/{k}"] - found[f"{base}/{k}"])[-1] for n, k, sign in kinds}


def _noisy(comparison: Comparison, share: float, rows: int, classes: int) -> tuple[Comparison, Examples | None]:
    """The comparison on fewer examples with wrong labels, and those that are wrong, None for none."""
    generator = torch.Generator().manual_seed(0)
    known = comparison.tuning
    few = torch.randperm(len(known.targets), generator=generator)[:rows]
    labels, wrong = mislabelled(known.targets[few], share, classes, generator)
    noisy = Examples(known.inputs[few], labels)
    changed = replace(comparison, training=noisy, tuning=noisy)
    return changed, Examples(noisy.inputs[wrong], labels[wrong]) if wrong.any() else None


def _fit(
    comparison: Comparison, wrong: Examples | None, name: str, seeds: Sequence[int], kinds: Mapping[str, float]
) -> Found:
    """What the seeds come to at each kind of rate, {kind: rate}, all trained side by side, (S,) each."""
    taken = list(dict.fromkeys(kinds.values()))  # an own rate that is the shared one is trained once
    each = [seed for _ in taken for seed in seeds]
    history = comparison.train(name, each, [rate for rate in taken for _ in seeds], validation_set=wrong)
    final, best, fitted = end(history.accuracy), history.accuracy.max(1), history.validation_accuracy[:, -1]
    found: Found = {}
    for kind, rate in kinds.items():
        rows = slice(taken.index(rate) * len(seeds), (taken.index(rate) + 1) * len(seeds))
        values = {"final": final, "best": best, "drop": best - final, "fitted": fitted}
        found |= prefixed(kind, {key: value[rows] for key, value in values.items()})
    return found
