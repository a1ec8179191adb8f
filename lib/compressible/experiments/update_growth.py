"""How many singular values of a weight matrix move while a network trains, and beside what that is few.

An update is W(t) - W(0) of the penultimate matrix (m, n); K is the number of classes. Arrays are over S networks and
R records, at steps 0 to the last; at step 0 the update is zero and has no shares.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from compressible.data.images import load_images, standardised
from compressible.experiments.outcomes import prefixed
from compressible.networks.layers import weight_matrix
from compressible.networks.training import Examples, train
from compressible.recovery.factors import orthogonal_factors
from compressible.recovery.spectra import leading_share, singular_values
from compressible.runtime.checks import expect

Found = dict[str, np.ndarray]
ENERGY = 0.95  # the share of sum s_i^2 that counts as nearly all
MOVED = 1e-6  # of the largest value: below it is what float64 makes of a zero


def update_spectra(
    models: Sequence[nn.Module], train_set: Examples, test_set: Examples | None = None, *, leading: int, **options: Any
) -> Found:
    """Train S networks and return what the singular values of their penultimate matrix's update do.

    "at" (R,) steps, "values" (S, R, 2 leading) the largest singular values, "energy" and "nuclear" (S, R) the shares of
    sum s_i^2 and of sum s_i in the `leading` largest. At the end (S,): "end_energy", "end_half_energy" of half as many,
    "end_nuclear", "needed", how many hold 95 % of the energy, "moved", how many are above 1e-6 of the largest,
    "accuracy" and "validation_loss" (NaN without such a set); "spectrum" (S, q) over the root of the energy. "gaussian"
    and "gaussian_spectrum" are the energy and the spectrum of random matrices of the shape. `options` go to `train`.
    """
    name = str(models[0].penultimate)
    start = _matrices(models, name)
    spectra: list[Tensor] = []

    def watch(_: int, now: list[nn.Module]) -> None:
        spectra.append(
            singular_values(_matrices(now, name) - start.to(weight_matrix(now[0].get_submodule(name)))).cpu()
        )

    history = train(models, train_set, test_set, watch=watch, **options)
    values = torch.stack(spectra, 1)  # (S, R, q)
    found = {"at": history.steps, "values": values[..., : 2 * leading].numpy(), "accuracy": history.accuracy[:, -1]}
    found |= {"validation_loss": history.validation_loss[:, -1]}
    found |= {name: leading_share(values, leading, power).numpy() for name, power in (("energy", 2), ("nuclear", 1))}
    found |= at_the_end(values[:, -1], leading)
    random = at_the_end(gaussian_values(start.shape), leading)
    return found | {"gaussian": random["end_energy"], "gaussian_spectrum": random["spectrum"]}


def at_the_end(values: Tensor, leading: int) -> Found:
    """Return the (S,) arrays and "spectrum" (S, q) of `update_spectra`, but "gaussian", of singular values (S, q)."""
    energies = values.square().cumsum(-1) / values.square().sum(-1, keepdim=True)
    found = {
        "end_energy": leading_share(values, leading),
        "end_half_energy": leading_share(values, leading // 2),
        "end_nuclear": leading_share(values, leading, power=1),
        "needed": (energies < ENERGY).sum(-1) + 1,
        "moved": (values > MOVED * values[:, :1]).sum(-1),
        "spectrum": values / torch.linalg.vector_norm(values, dim=-1, keepdim=True),
    }
    return {name: value.numpy() for name, value in found.items()}


def compare_controls(sgd: Found, adam: Found, random: Found, widths: Sequence[Found]) -> Found:
    """Return the study of a network with its controls: Adam, random labels and other widths, by prefix, and (S,).

    "adam_below" and "random_below" say how much less energy they have in the leading values, start by start;
    "widths_least" the least that any width has.
    """
    energies = [found["end_energy"] for found in (sgd, *widths)]
    found = sgd | {"widths_least": np.min(energies, 0)}
    for name, other in (("adam", adam), ("random", random)):
        found |= prefixed(name, other) | {f"{name}_below": sgd["end_energy"] - other["end_energy"]}
    return found


def gaussian_values(shape: Sequence[int]) -> Tensor:
    """Return the singular values (S, q) of S Gaussian matrices, `shape` = (S, m, n): updates without a direction."""
    return singular_values(torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64))


def linear_network(model: nn.Module, scale: float, seed: int) -> nn.Module:
    """Return the model without biases, the weights of its linear layers `scale` times orthogonal, drawn under `seed`.

    It is what P1's theorem starts from, for a model without activations; the hidden layers have one width.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    ends = layers[-1].out_features, layers[0].in_features
    generator = torch.Generator().manual_seed(seed)
    drawn = orthogonal_factors(ends, len(layers), layers[0].out_features, scale, generator)
    for layer, weight in zip(layers, drawn, strict=True):
        layer.register_parameter("bias", None)
        layer.weight.data = weight.to(layer.weight)
    return model


def whitened(inputs: Tensor, components: int) -> Tensor:
    """Return inputs (N, components) whose second moment sum x x^T / N is the identity: P1's assumption on the data.

    They are the leading left singular vectors of inputs (N, n), times sqrt(N), in float64. Raises ValueError unless the
    inputs span that many directions.
    """
    left, values, _ = torch.linalg.svd(inputs.double(), full_matrices=False)
    spanned = int((values > 1e-6 * values[0]).sum())
    expect("components", components, 1 <= components <= spanned, f"1 to the {spanned} directions of the inputs")
    return left[:, :components] * math.sqrt(len(inputs))


def whitened_examples(examples: Examples, components: int) -> Examples:
    """Return the examples with `whitened` inputs."""
    return Examples(whitened(examples.inputs, components), examples.targets)


def image_examples(name: str, rows: int = 0, held_out: int = 0, flat: bool = False) -> dict[str, Examples]:
    """Return standardised images of a set by name: "train", "validation" (`held_out` images of it, if any) and "test".

    `rows` > 0 takes so many training images, evenly spaced in the set, as the digits are sorted by class; `flat` gives
    pixels as rows (N, C H W).
    """
    data = load_images(name)
    expect("rows", rows, 0 <= rows <= len(data.train), f"0 for all, or at most the set's {len(data.train)}")
    parts = {"train": data.train.spread(rows)}
    if held_out:
        parts["train"], parts["validation"] = parts["train"].split(held_out, seed=0)
    found = {}
    for kind, part in (parts | {"test": data.test}).items():
        pixels = standardised(part, data.mean, data.std)
        found[kind] = Examples(pixels.flatten(1) if flat else pixels, part.labels)
    return found


def with_random_labels(examples: Examples, seed: int) -> Examples:
    """Return the examples with their labels (N,) dealt out anew: as many of each class, and nothing to learn."""
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed))
    return Examples(examples.inputs, examples.targets[order])


def _matrices(models: Sequence[nn.Module], name: str) -> Tensor:
    return torch.stack([weight_matrix(model.get_submodule(name)).detach() for model in models])
