"""A network beside the same one with some matrices replaced by deep linear or compressed products.

Which learning rate suits each variant (`tune`, on validation data that judges nothing), what each learns at its own
and at one shared rate (`learn`), and by how much its ends differ from another's (`compare_ends`). All take a
`Comparison` and return arrays under "<variant>/...", over S seeds, R records or N rates. What a step of each costs is
in variant_costs.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from compressible.data.images import load_images, standardised
from compressible.experiments.outcomes import prefixed
from compressible.experiments.rate_grid import best_of, is_inside, search_rates
from compressible.networks.factorize import factorize
from compressible.networks.training import Examples, NetworkHistory, train
from compressible.runtime.devices import resolve_device

Found = dict[str, np.ndarray]


@dataclass(frozen=True)
class Variant:
    """Which layers of a network are replaced, and by what; the default replaces none.

    Args:
        kind: "plain", "deep" or "compressed".
        layers: dotted names, or a regular expression that the whole name must match.
        depth: L' factors of a product, usually 3.
        width: inner width of a compressed product, usually twice the number of classes.
        init_scale: eps of the factors, usually 0.1 to 1.
        start: "orthogonal", "gradient" or "weights_and_gradient", as `factorize` has them.
        outer_ratio: learning rate of the outer factors over that of all others.
    """

    kind: str = "plain"
    layers: str | tuple[str, ...] = ()
    depth: int = 3
    width: int | None = None
    init_scale: float = 0.5
    start: str = "orthogonal"
    outer_ratio: float = 1.0


@dataclass(frozen=True)
class Comparison:
    """Variants of one network on one task, and the plan by which all are trained.

    Args:
        make: returns the plain network, drawn from PyTorch's global generator, which is seeded before.
        variants: {name: variant}.
        training, test: examples that judge.
        tuning, validation: examples that choose rates and nothing else.
        plan: what `networks.training.train` takes beside models, examples and rates: steps, batch_size, ...
        start_batch: number of tuning examples whose loss gives the gradient of a gradient start.
    """

    make: Callable[[], nn.Module]
    variants: Mapping[str, Variant]
    training: Examples
    test: Examples
    tuning: Examples
    validation: Examples
    plan: Mapping[str, Any] = field(default_factory=dict)
    start_batch: int = 1024

    def build(self, name: str, seed: int) -> nn.Module:
        """Return the network of a variant and a seed; whatever is not replaced starts alike in all variants."""
        variant = self.variants[name]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = self.make()
        if variant.kind != "plain":
            where = variant.layers if isinstance(variant.layers, str) else list(variant.layers)
            options: Any = {"depth": variant.depth, "width": variant.width, "init_scale": variant.init_scale}
            drawn: Any = {"generator": torch.Generator().manual_seed(seed), "loss_step": partial(self._loss, seed=seed)}
            factorize(model, where, variant.kind, start=variant.start, **options, **drawn)
        return model

    def train(
        self,
        name: str,
        seeds: Sequence[int],
        rates: Sequence[float],
        built: Sequence[nn.Module] | None = None,
        **changes: Any,
    ) -> NetworkHistory:
        """Train networks of a variant side by side, one for each pair of `seeds` and `rates`; test examples judge.

        A seed has the same batches in all variants. `built` are the networks where they were built before. `changes`
        go over the plan, `train_set` and `test_set` among them.
        """
        sets = {"train_set": self.training, "test_set": self.test, "outer_ratio": self.variants[name].outer_ratio}
        options: Any = {**sets, **self.plan, **changes}
        if built is None:
            each = {seed: self.build(name, seed) for seed in dict.fromkeys(seeds)}  # `train` copies what it is given
            built = [each[seed] for seed in seeds]
        return train(built, learning_rates=rates, seed=list(seeds), **options)

    def only(self, *names: str) -> Comparison:
        """Return the comparison of these variants alone."""
        return replace(self, variants={name: self.variants[name] for name in names})

    def _loss(self, model: nn.Module, seed: int) -> Tensor:
        total = len(self.tuning.targets)
        rows = torch.randperm(total, generator=torch.Generator().manual_seed(seed))[: self.start_batch]
        inputs, targets = (part[rows.to(part.device)].cpu() for part in (self.tuning.inputs, self.tuning.targets))
        return functional.cross_entropy(model(inputs), targets)


def tune(comparison: Comparison, rates: Sequence[float], seeds: Sequence[int], **changes: Any) -> Found:
    """Return what each variant comes to on the validation data at each of N rates, and its own best one.

    A variant's grid grows beyond an end that is its best, as `search_rates` has it; a single rate is taken as it is.

    Args:
        comparison: trained on its tuning examples, judged on its validation examples.
        rates: learning rates to begin with, in ascending order, a factor of about 3 apart.
        seeds: of the trained networks, three at least for a choice to be relied on; others than those judged later.
        **changes: go over the plan, fewer steps, say.

    Returns:
        "<name>/rates" (N,), ascending, N being the variant's own; "<name>/tuning" (N,), mean accuracy at the end over
        the seeds, of which a diverged one counts as 0; "<name>/own_rate" (1,), the best, of equals the lowest;
        "<name>/inside" (1,), whether it lies inside the grid, beyond whose ends the true best may lie.

    Raises:
        ValueError: rates that do not ascend.
    """
    sets = {"train_set": comparison.tuning, "test_set": comparison.validation, **_records(comparison, changes)}
    found: Found = {}
    for name in comparison.variants:
        scores_of = partial(_validated, comparison, name, seeds, {**sets, **changes})
        scores = search_rates(scores_of, rates, more=4 if len(rates) > 1 else 0)
        tried = {"rates": np.array(list(scores)), "tuning": np.array(list(scores.values()))}
        chosen = {"own_rate": np.array([best_of(scores)]), "inside": np.array([is_inside(scores)])}
        found |= prefixed(name, tried | chosen)
    return found


def explore(
    comparison: Comparison, option: str, values: Sequence[Any], seeds: Sequence[int], rate: float, **changes: Any
) -> Found:
    """Return "<name>/<option>" (S, N), end accuracies on the validation data at N values of an option of the plan.

    option: a name that `networks.training.train` knows, such as "batch_size"; all are trained at one learning rate.
    """
    sets = {"train_set": comparison.tuning, "test_set": comparison.validation, **_records(comparison, changes)}
    found: Found = {}
    for name in comparison.variants:
        plans = [{**sets, **changes, option: value} for value in values]
        histories = [comparison.train(name, seeds, [rate] * len(seeds), **plan) for plan in plans]
        found[f"{name}/{option}"] = np.stack([end(as_array(history.accuracy)) for history in histories], 1)
    return found


def learn(
    comparison: Comparison, seeds: Sequence[int], shared: float, own: Mapping[str, float] | None = None, **changes: Any
) -> Found:
    """Train S seeds of every variant side by side, at the shared rate and at each one's own; test data judge.

    Args:
        comparison: trained on its training examples, judged on its test examples.
        seeds: S seeds; the variants of a seed share batches and whatever they have in common.
        shared: learning rate of all variants.
        own: {name: rate}, of `tune`; without it the shared rate is taken alone.
        **changes: go over the plan.

    Returns:
        For each rate of "shared" and "own": "<name>/<rate>/accuracy" and "<name>/<rate>/loss" (S, R), the loss that of
        training, and "<name>/<rate>/end" (S,), the mean accuracy of the last tenth of the records; "<name>/parameters"
        (1,); "at" (R,), iterations of the records.
    """
    found: Found = {}
    for name in comparison.variants:
        rates = {"shared": shared} | ({} if own is None else {"own": float(own[name])})
        taken = list(dict.fromkeys(rates.values()))  # an own rate that is the shared one is trained once
        each = [seed for _ in taken for seed in seeds]
        history = comparison.train(name, each, [rate for rate in taken for _ in seeds], **changes)
        for kind, rate in rates.items():
            rows = slice(taken.index(rate) * len(seeds), (taken.index(rate) + 1) * len(seeds))
            curves = {"accuracy": as_array(history.accuracy)[rows], "loss": as_array(history.loss)[rows]}
            found |= prefixed(f"{name}/{kind}", curves | {"end": end(curves["accuracy"])})
        found |= {f"{name}/parameters": np.array([history.parameters]), "at": as_array(history.steps)}
    return found


def compare_ends(
    found: Mapping[str, np.ndarray],
    names: Sequence[str],
    bases: Sequence[str],
    kinds: Sequence[str] = ("shared", "own"),
) -> Found:
    """Return "<name> - <base>/<kind>" (S,), end accuracies of `learn`, paired by seed, for every name and base."""
    triples = [(name, base, kind) for name in names for base in bases for kind in kinds if name != base]
    return {f"{n} - {base}/{kind}": found[f"{n}/{kind}/end"] - found[f"{base}/{kind}/end"] for n, base, kind in triples}


def end(curves: np.ndarray, share: float = 0.1) -> np.ndarray:
    """Return the mean of the last tenth (`share`) of the records of curves (S, R), one record at least."""
    return curves[:, -max(1, round(share * curves.shape[1])) :].mean(1)


def image_examples(
    name: str, validation_rows: int, seed: int, train_rows: int = 0, test_rows: int = 0, device: str = "cpu"
) -> dict[str, Examples]:
    """Return the four parts of a data set of images that a `Comparison` takes, standardised by the training images.

    Args:
        name: as `load_images` knows it.
        validation_rows: images of the training set, drawn by the seed, that choose rates.
        seed: of that draw, >= 0.
        train_rows, test_rows: take so many images only, evenly spread since some sets are sorted; 0 for all.
        device: where they are to lie, so that not every training moves them.
    """
    data = load_images(name)
    whole, test = data.train.spread(train_rows), data.test.spread(test_rows)
    rest, held_out = whole.split(validation_rows, seed)
    examples = {}
    for part, chosen in {"training": whole, "test": test, "tuning": rest, "validation": held_out}.items():
        pixels = standardised(chosen, data.mean, data.std)
        examples[part] = Examples(pixels, chosen.labels).to(resolve_device(device))
    return examples


def _validated(
    comparison: Comparison, name: str, seeds: Sequence[int], plan: Mapping[str, Any], rates: Sequence[float]
) -> list[float]:
    """Mean end accuracies over the seeds at N rates, all trained side by side."""
    pairs = [(rate, seed) for rate in rates for seed in seeds]
    history = comparison.train(name, [seed for _, seed in pairs], [rate for rate, _ in pairs], **plan)
    ends = np.where(history.diverged, 0.0, np.nan_to_num(end(as_array(history.accuracy))))
    return ends.reshape(len(rates), len(seeds)).mean(1).tolist()


def _records(comparison: Comparison, changes: Mapping[str, Any]) -> dict[str, int]:
    """Twenty records are enough to see an end."""
    return {"evaluate_every": max(1, {**comparison.plan, **changes}["steps"] // 20)}


def as_array(values: Any) -> np.ndarray:
    """Return a tensor or a list as a numpy array."""
    return values.numpy(force=True) if isinstance(values, Tensor) else np.asarray(values)
