"""What dropout before the output layer does to the last activations of a network while it trains.

The last activations H (N, w) are what the output layer gets, for held-out inputs and without dropout. theta is the keep
rate, h = w the units that dropout acts on, n inputs and m outputs. Arrays are over S networks and R records.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from compressible.experiments.outcomes import prefixed
from compressible.experiments.rate_grid import at_best_rate
from compressible.networks import models
from compressible.networks.losses import squared
from compressible.networks.models import Network, features
from compressible.networks.training import Examples, train
from compressible.recovery.spectra import effective_count, singular_values, stable_count
from compressible.recovery.theory.dropout import scaled_keep_rate, squared_nuclear_shrinkage, strength

Found = dict[str, np.ndarray]


class AgainstTeacher(Network):
    """A network whose output is its distance from a linear teacher of its own, f(x) - Phi x, to be fitted to noise.

    So networks with different teachers (m, n) train side by side on one set of inputs: (f(x) - Phi x) - noise is the
    residual f(x) - y of y = Phi x + noise. `body` is f.
    """

    teacher: Tensor

    def __init__(self, network: Network, teacher: Tensor) -> None:
        names = (name.removeprefix("body.") for name in (network.penultimate, network.last))
        super().__init__(network.body, *names)
        self.register_buffer("teacher", teacher)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return f(x) - Phi x (B, m)."""
        return super().forward(inputs) - inputs @ self.teacher.mT


def with_dropout(model: Network, rate: float) -> Network:
    """Return the model with dropout at one place, on what its output layer gets; `rate` is the share dropped, below 1.

    Its `features` are those before dropout. A model without dropout gets the same layers, so that both have one form.
    """
    if not 0 <= rate < 1:
        raise ValueError(f"rate is {rate!r}, expected a share >= 0 and < 1 (P3 drops 0.6)")
    parent, _, name = model.last.rpartition(".")
    output = model.get_submodule(model.last)
    setattr(model.get_submodule(parent), name, nn.Sequential(nn.Dropout(rate), output))
    return model


def without_biases(model: Network) -> Network:
    """Return the model with the biases taken out of its linear layers: without activations it is a matrix."""
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            layer.register_parameter("bias", None)
    return model


def linear_teachers(inputs: int, ranks: Sequence[int], seed: int, seeds: int) -> Tensor:
    """Return teachers (ranks, seeds, n, n): for each seed a Gaussian one, entries of variance 1 / n, cut to each rank.

    A cut teacher is scaled to the norm of the whole one, so that signal and noise are the same for all.
    """
    drawn = [torch.randn(inputs, inputs, generator=torch.Generator().manual_seed(seed + s)) for s in range(seeds)]
    left, values, right = torch.linalg.svd(torch.stack(drawn).double() / math.sqrt(inputs))
    cut = [(left[..., :rank] * values[:, None, :rank]) @ right[:, :rank] for rank in ranks]
    norms = [torch.linalg.matrix_norm(teacher, keepdim=True) for teacher in cut]
    whole = torch.linalg.vector_norm(values, dim=-1)[:, None, None]
    return torch.stack([teacher * whole / norm for teacher, norm in zip(cut, norms, strict=True)]).float()


def gaussian_examples(count: int, inputs: int, noise: float, seed: int) -> Examples:
    """Return Gaussian inputs (N, n) and noise (N, n) of the given deviation, what `AgainstTeacher` trains on.

    The inputs are white in the sample: sum x x^T / N is the identity, as in the closed forms. Raises ValueError for
    fewer examples than inputs.
    """
    if count < inputs:
        raise ValueError(f"count is {count}, expected at least as many as the {inputs} inputs")
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(2, count, inputs, generator=generator, dtype=torch.float64)
    white = math.sqrt(count) * torch.linalg.qr(drawn[0]).Q
    return Examples(white.float(), noise * drawn[1].float())


@torch.no_grad()
def expected_objective(network: Network, examples: Examples) -> float:
    """Return the squared loss of a network `with_dropout` on all examples, in the mean over dropout's masks.

    E |b + W (m * h) / theta - y|^2 = |b + W h - y|^2 + (1 - theta) / theta sum_i |W_i|^2 h_i^2 for each example.
    """
    dropout, output = cast(tuple[nn.Dropout, nn.Linear], tuple(network.eval().get_submodule(network.last).children()))
    inputs, targets = (part.to(output.weight.device) for part in (examples.inputs, examples.targets))
    squares = features(network, inputs).square().mean(0)
    added = float(strength(1 - dropout.p)) * (output.weight.square().sum(0) * squares).sum() / 2
    return float(squared(network(inputs), targets) + added)


def activation_spectra(
    networks: Sequence[Network], train_set: Examples, held_out: Examples, *, objective: bool = False, **options: Any
) -> Found:
    """Train S networks and return what the singular values of their last activations do.

    "at" (R,) steps; (S, R): "effective" and "stable" rank of H, "centred", the effective rank of H less its mean over
    inputs, "outputs", that of what the network says on the held-out inputs (of a linear one for white inputs that of
    its matrix), "test_loss"; "values" (S, R, q), the singular values of H / sqrt(N); (S,): "end_effective",
    "end_outputs", "accuracy" and "validation_loss"; if `objective`, that of `expected_objective` on the training set,
    too. `options` go to `train`.
    """
    seen: list[tuple[Tensor, ...]] = []

    def watch(_: int, now: list[nn.Module]) -> None:
        inputs = held_out.inputs.to(next(now[0].parameters()).device)
        hidden = torch.stack([features(model, inputs) for model in now])
        outputs = torch.stack([Network.forward(cast(Network, model), inputs) for model in now])
        kinds = hidden, hidden - hidden.mean(1, keepdim=True), outputs
        seen.append(tuple(singular_values(kind).cpu() for kind in kinds))

    history = train(networks, train_set, held_out, watch=watch, **options)
    hidden, centred, outputs = (torch.stack(kind, 1) for kind in zip(*seen, strict=True))
    found = {
        "at": history.steps,
        "values": (hidden / math.sqrt(len(held_out))).numpy(),
        "effective": effective_count(hidden).numpy(),
        "stable": stable_count(hidden).numpy(),
        "centred": effective_count(centred).numpy(),
        "outputs": effective_count(outputs).numpy(),
        "test_loss": history.test_loss,
        "end_effective": effective_count(hidden[:, -1]).numpy(),
        "end_outputs": effective_count(outputs[:, -1]).numpy(),
        "validation_loss": history.validation_loss[:, -1],
        "accuracy": history.accuracy[:, -1],
    }
    if objective:
        reached = [expected_objective(cast(Network, model), train_set) for model in history.models]
        found["objective"] = np.array(reached)
    return found


def synthetic_study(
    seeds: Sequence[int],
    rates: Sequence[float],
    *,
    linear: bool,
    dimension: int,
    rank: int,
    width: int,
    dropout: float,
    noise: float,
    rows: tuple[int, int, int],
    chosen_by: str = "validation_loss",
    **options: Any,
) -> Found:
    """Return `activation_spectra` of networks on linear teachers, at one of several learning rates.

    Args:
        seeds: S in a row; a seed has its own teacher, start and batches; inputs and noise are the same for all.
        rates: learning rates, ascending.
        linear: without activations and biases, or with ReLUs; two hidden layers in both cases.
        dimension: n = m, inputs and outputs.
        rank: of the teachers.
        width: w of the hidden layers, the h units that dropout acts on.
        dropout: share that is dropped, 1 - theta.
        noise: deviation of the noise; a teacher's outputs have a mean square of about 1.
        rows: examples to train on, held-out inputs, examples that choose the rate.
        chosen_by: array whose least mean chooses the rate; "objective", what training minimises in the mean over masks,
            where the network is held against the minimiser, as one that stops short of it may validate better.
        options: of `train`.

    Returns:
        The arrays of `activation_spectra` and `at_best_rate`; for linear networks "expected" (S,), the effective rank
        of the product in closed form, beside what "end_outputs" measures.

    Raises:
        ValueError: for a value out of range.
    """
    teachers = linear_teachers(dimension, [rank], seeds[0], len(seeds))[0]
    train_set, held_out, validation_set = (gaussian_examples(n, dimension, noise, i) for i, n in enumerate(rows))

    def make(seed: int) -> Network:
        kind = "identity" if linear else "relu"
        net = models.seeded(seed, models.mlp, dimension, width, dimension, 2, kind)
        net = without_biases(net) if linear else net
        return with_dropout(AgainstTeacher(net, teachers[seed - seeds[0]]), dropout)

    options |= {"train_set": train_set, "held_out": held_out, "validation_set": validation_set, "loss": "squared"}
    options |= {"objective": True, "kept": ("end_effective", "end_outputs"), "minimised": chosen_by}
    found = at_best_rate(activation_spectra, make, seeds, rates, **options)
    return found | ({"expected": expected_rank(teachers, 1 - dropout, width)} if linear else {})


def image_study(
    make: Callable[[], Network],
    parts: dict[str, Examples],
    seeds: Sequence[int],
    rate: float,
    dropout: float,
    **options: Any,
) -> Found:
    """Return `activation_spectra` of image networks, on the first 2,000 test images, at one learning rate.

    `parts` are "train" and "test"; `make` builds a network, whose start its seed sets.
    """
    nets = [with_dropout(models.seeded(seed, make), dropout) for seed in seeds]
    held_out = Examples(parts["test"].inputs[:2000], parts["test"].targets[:2000])
    options |= {"learning_rates": [rate] * len(seeds), "seed": list(seeds)}
    return activation_spectra(nets, parts["train"], held_out, **options)


def with_and_without(study: Callable[..., Found], dropout: float) -> Found:
    """Return study(dropout=) at this rate and at 0 as "dropped/..." and "plain/...", and how they `compare`."""
    plain, dropped = study(dropout=0.0), study(dropout=dropout)
    return prefixed("plain", plain) | prefixed("dropped", dropped) | compare(plain, dropped)


def compare(plain: Found, dropped: Found) -> Found:
    """Return per network (S,) what P3 says of dropout, each meant to be > 0, for two runs of `activation_spectra`.

    "falls": effective rank of H with dropout, first less last; "below": last without dropout less last with it; the
    same of the outputs, "outputs_fall" and "outputs_below", of the stable rank, "stable_below", and of centred H,
    "centred_below".
    """
    first, last = (dropped["effective"][:, place] for place in (0, -1))
    return {
        "falls": first - last,
        "below": plain["effective"][:, -1] - last,
        "outputs_fall": dropped["outputs"][:, 0] - dropped["outputs"][:, -1],
        "outputs_below": plain["outputs"][:, -1] - dropped["outputs"][:, -1],
        "stable_below": plain["stable"][:, -1] - dropped["stable"][:, -1],
        "centred_below": plain["centred"][:, -1] - dropped["centred"][:, -1],
    }


def expected_rank(teachers: Tensor, keep: float, width: int) -> np.ndarray:
    """Return the effective rank (...) of the best product under dropout for teachers (..., m, n), in closed form.

    The minimiser of ||Phi - M||_F^2 + lambda / h ||M||_*^2, for white inputs and any number of linear layers below the
    dropped units, as they can make any H.
    """
    best = squared_nuclear_shrinkage(teachers.double(), float(strength(keep)) / width)
    return effective_count(torch.linalg.svdvals(best)).numpy()


def keep_laws(keep: float, width: int, widths: Sequence[int]) -> dict[str, list[float]]:
    """Return keep rates for every one of `widths` by two laws that agree at `width`.

    "fixed" is theta at every h; "scaled" is theta(h) = p / (h - (h - 1) p), for which the penalty lambda / h, and so
    the best product, is the same at every h.
    """
    unit = 1 / (1 + float(strength(keep)) / width)  # (1 - p) / p = lambda / h
    return {"fixed": [keep for _ in widths], "scaled": [scaled_keep_rate(unit, each) for each in widths]}


def across_widths(studies: Sequence[Found]) -> Found:
    """Return effective ranks of the trained products of linear `synthetic_study`s by width, beside the closed form.

    "product", "expected" (S, widths); (S,): "off", the largest deviation of their ratio from 1; "rise", the rank at the
    last width less that at the first; "spread", the largest less the least, over their mean; (widths,): "chosen", the
    learning rates, and "chosen_inside", whether they lie inside their grids.
    """
    product, expected = (np.stack([found[key] for found in studies], 1) for key in ("end_outputs", "expected"))
    return {
        "product": product,
        "expected": expected,
        "off": np.abs(product / expected - 1).max(1),
        "rise": product[:, -1] - product[:, 0],
        "spread": np.ptp(product, 1) / product.mean(1),
        "chosen": np.concatenate([found["best_rate"] for found in studies]),
        "chosen_inside": np.concatenate([found["best_is_inside"] for found in studies]),
    }
