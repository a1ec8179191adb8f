"""Where P2's nonlinear networks end: other architectures, low rank throughout, the outer ratio alpha.

`compare` makes a `Comparison` of an `Architecture`, a network with its task and the layers to replace, and `study` lets
every variant learn at its own best rate and at the shared one. Every alpha is a variant with a rate of its own: at one
rate for all, a larger alpha would be a larger rate in disguise. Accuracies are arrays over S seeds.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from torch import nn

from compressible.data import graphs, images
from compressible.experiments.network_variants import (
    Comparison,
    Found,
    Variant,
    compare_ends,
    image_examples,
    learn,
    tune,
)
from compressible.networks import models
from compressible.networks.training import Examples
from compressible.runtime.checks import expect

CORA = "cora"
STARTS = {"random": "orthogonal", "gradient": "gradient", "successor": "weights_and_gradient"}


@dataclass(frozen=True)
class Architecture:
    """A network with its task and the layers that variants replace.

    data: name of the images, or "cora"; classes K; rate: the usual learning rate of the plain network; make: builder
    from the width; block: layers of the variants "deep" and "compressed", "" for none; everywhere: layers of the
    variants of low rank throughout, "" for none; plan: what `train` takes beside.
    """

    data: str
    classes: int
    rate: float
    make: Callable[[int], nn.Module]
    block: str = ""
    everywhere: str = ""
    plan: Mapping[str, Any] = field(default_factory=dict)


def _mlp(width: int) -> nn.Module:
    return models.mlp(784, width, 10)


def _digits_resnet(_: int) -> nn.Module:
    return models.resnet(10, (8, 16, 32), (1, 1, 1), channels=1)


def _resnet(_: int) -> nn.Module:
    return models.resnet(10, (32, 64, 128), (2, 2, 2))


def _vgg(_: int) -> nn.Module:
    return models.vgg(10, "vgg11")


@cache
def _graph() -> graphs.Graph:
    return graphs.load_cora()


@cache
def _gcn_once(hidden: int) -> nn.Module:
    """One network of each width, whose graph all others share."""
    graph = _graph()
    with torch.random.fork_rng(devices=[]):  # a first call draws no more than the others
        return models.gcn(graph.features, graph.edges, graph.classes, width=hidden)


def _gcn(hidden: int) -> Callable[[int], nn.Module]:
    """A builder of Kipf and Welling's network with their start, Glorot's."""

    def make(_: int) -> nn.Module:
        once = _gcn_once(hidden)
        model = copy.deepcopy(once, {id(buffer): buffer for buffer in once.buffers()})
        for layer in model.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)
        return model

    return make


_LAST_STAGE = r"body\.resnet\.encoder\.stages\.2\..*\.layer\.\d+\.convolution"
_SCHEDULED = {"batch_size": 512, "schedule": "cosine"}
_KIPF: dict[str, Any] = {"batch_size": None, "weight_decay": {r"body\.input\..*": 5e-4}}

ARCHITECTURES = {
    "mlp": Architecture(
        "fashion-mnist", 10, 1e-3, _mlp, r"body\.hidden2", r"body\.(input|hidden\d+)", {"batch_size": 256}
    ),
    "digits-resnet": Architecture("mnist", 10, 1e-3, _digits_resnet, _LAST_STAGE, plan={"batch_size": 32}),
    "resnet": Architecture("cifar10", 10, 1e-3, _resnet, _LAST_STAGE, plan=_SCHEDULED),
    "vgg": Architecture("cifar10", 10, 1e-3, _vgg, r"body\.hidden", plan=_SCHEDULED),
    "gcn": Architecture(CORA, 7, 1e-2, _gcn(256), r"body\.input", plan=_KIPF),
    "gcn-16": Architecture(CORA, 7, 1e-2, _gcn(16), plan=_KIPF),
}


def digests(names: Sequence[str]) -> dict[str, str]:
    """Return {file: sha256} of what the tasks of these architectures read."""
    found: dict[str, str] = {}
    for name in names:
        one = _known(name)
        found |= _graph().digests if one.data == CORA else images.digests(one.data)
    return found


def compare(
    name: str,
    width: int,
    multiples: Sequence[int],
    outer_ratios: Sequence[float],
    rows: Mapping[str, int],
    **plan: Any,
) -> Comparison:
    """Return the variants of an architecture with the examples of its task.

    "plain"; "deep" and "compressed", inner width 2K, for its block, with random orthogonal starts; "compressed, alpha =
    a" for the outer ratios other than 1; where it has one, "<q>K <start>", every hidden matrix of inner width q K for
    the `multiples` q, from each of `STARTS`.

    Args:
        name: one of `ARCHITECTURES`.
        width: of the MLP's hidden layers; the others have theirs.
        multiples: inner widths over the number K of classes of the networks of low rank throughout.
        outer_ratios: alphas, 1 among them, ascending.
        rows: "validation_rows", and "train_rows" and "test_rows", 0 for all; Cora has its published split.
        **plan: goes over the architecture's: steps, device, precision, ...; the networks without convolutions, which
            are small, take "tf32" where "bfloat16" is asked for.
    """
    one = _known(name)
    check_ratios(outer_ratios)
    if plan.get("precision") == "bfloat16" and one.plan is not _SCHEDULED:
        plan["precision"] = "tf32"
    examples: Any
    if one.data == CORA:
        examples = _cora()
    else:
        examples = image_examples(one.data, seed=0, device=plan.get("device", "auto"), **rows)
    variants = _variants(one, multiples, outer_ratios)
    return Comparison(partial(one.make, width), variants, **examples, plan={**one.plan, **plan})


def study(
    comparison: Comparison, rates: Sequence[float], shared: float, tuning_seeds: Sequence[int], seeds: Sequence[int]
) -> Found:
    """Return what `tune` and `learn` find of a comparison, and every variant's accuracy less that of "plain" (S,).

    The keys are theirs and those of `compare_ends`; a start of low rank throughout is set beside the random one, too. A
    variant "..., alpha = a" is trained at its own rate alone.
    """
    found = tune(comparison, rates, tuning_seeds, evaluate_every=comparison.plan["evaluate_every"])
    own = {name: float(found[f"{name}/own_rate"][0]) for name in comparison.variants}
    at_both = {name: variant for name, variant in comparison.variants.items() if variant.outer_ratio == 1}
    found |= learn(replace(comparison, variants=at_both), seeds, shared, own)
    for name in (each for each in own if each not in at_both):
        alone = learn(replace(comparison, variants={name: comparison.variants[name]}), seeds, own[name])
        found |= {key.replace("/shared/", "/own/"): values for key, values in alone.items()}
    for name in at_both:
        bases = {"plain", f"{name.split()[0]} random"} & (at_both.keys() - {name})
        found |= compare_ends(found, [name], sorted(bases))
    return found


def swept(found: Found, name: str, outer_ratios: Sequence[float]) -> Found:
    """Return how the accuracy of the variant `name` depends on alpha, each at its own rate, of what `study` found.

    "<name>/alpha/gains" (A, S) over alpha = 1; "<name>/alpha/best" (1,), the alpha of the best accuracy on validation
    data, and "<name>/alpha/gain" (S,), what it gains on the test data; "<name>/alpha/worst" (S,) of all A.
    """
    names = [alpha_name(name, ratio) for ratio in outer_ratios]
    ends = np.stack([found[f"{each}/own/end"] for each in names])
    gains = ends - found[f"{name}/own/end"]
    best = int(np.argmax([found[f"{each}/tuning"].max() for each in names]))
    out = {"gains": gains, "best": np.array([outer_ratios[best]]), "gain": gains[best], "worst": gains.min(0)}
    return {f"{name}/alpha/{key}": values for key, values in out.items()}


def check_ratios(outer_ratios: Sequence[float]) -> None:
    """Raise ValueError unless the outer ratios ascend and hold 1, with which the others are compared."""
    if list(outer_ratios) != sorted(set(outer_ratios)) or 1 not in outer_ratios or min(outer_ratios) <= 0:
        raise ValueError(f"outer_ratios are {list(outer_ratios)}, expected them ascending, above 0, 1 among them")


def alpha_name(name: str, ratio: float) -> str:
    """Return the name of a variant at an outer ratio."""
    return name if ratio == 1 else f"{name}, alpha = {ratio:g}"


def _variants(one: Architecture, multiples: Sequence[int], outer_ratios: Sequence[float]) -> dict[str, Variant]:
    variants = {"plain": Variant()}
    small = Variant("compressed", one.block, width=2 * one.classes)
    if one.block:
        variants |= {"deep": Variant("deep", one.block), "compressed": small}
        variants |= {alpha_name("compressed", a): replace(small, outer_ratio=a) for a in outer_ratios}
    if one.everywhere:
        # Scale 1: factors that are orthonormal, for shrunken ones in every layer would let no signal through.
        low = Variant("compressed", one.everywhere, init_scale=1.0)
        for multiple in multiples:
            width = multiple * one.classes
            variants |= {f"{multiple}K {n}": replace(low, width=width, start=start) for n, start in STARTS.items()}
    return variants


def _cora() -> dict[str, Examples]:
    """The published split: the 140 nodes to train on choose rates together with the 500 for validation."""
    graph = _graph()
    nodes = {"training": graph.train, "test": graph.test, "tuning": graph.train, "validation": graph.validation}
    return {part: Examples(each, graph.labels[each]) for part, each in nodes.items()}


def _known(name: str) -> Architecture:
    expect("architecture", name, name in ARCHITECTURES, f"one of {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[name]
