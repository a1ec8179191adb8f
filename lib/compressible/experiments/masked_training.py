"""Autoencoders trained on masked images, linear and not, beside the closed form of P3's Example 4.2.

The data are standardised pixels (N, d); a mask keeps each with probability 1 - q and divides it by that, as dropout
does, and the target is the whole image. The map of a trained network is its Jacobian at an unmasked image, (d, d).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap
from torch.nn import functional

from compressible.data.images import ImageData, Images
from compressible.experiments.rate_grid import best_of, is_inside, search_each
from compressible.networks import models, training
from compressible.recovery import spectra
from compressible.recovery.theory import masking
from compressible.runtime import devices
from compressible.runtime.checks import expect

KINDS = {"linear": {"hidden": 1, "activation": "identity"}, "nonlinear": {"hidden": 2, "activation": "gelu"}}
LEAST_DEVIATION = 0.1  # of the largest: pixels that vary less are left out
Found = dict[str, np.ndarray]
Pair = tuple[float, float]  # a mask rate and a learning rate


@dataclass(frozen=True)
class Pixels:
    """Standardised pixels (N, d) in float64 of three parts, and what puts them back into images (height, width).

    `moments` (d, d) are the second moments of the training part, of unit diagonal.
    """

    train: Tensor
    validation: Tensor
    test: Tensor
    mean: Tensor
    deviation: Tensor
    kept: Tensor  # (height, width), whether a pixel is among the d

    @property
    def moments(self) -> Tensor:
        """C = X X^T / N of the training part."""
        return self.train.mT @ self.train / len(self.train)

    def images(self, rows: Tensor) -> Tensor:
        """Return rows (K, d) as images (K, height, width) of values from 0 to 1, black where pixels were left out."""
        found = torch.zeros(len(rows), *self.kept.shape, dtype=rows.dtype)
        found[:, self.kept] = (rows.cpu() * self.deviation + self.mean).clamp(0, 1)
        return found


@dataclass(frozen=True)
class Setting:
    """How networks are trained: S seeds for each pair of a mask rate and a learning rate, all side by side."""

    mask_rates: Sequence[float]
    learning_rates: Sequence[float]
    seeds: Sequence[int]
    width: int
    steps: int
    batch_size: int
    precision: str = "float32"
    device: str = "auto"


class Masked(nn.Module):
    """A network behind a mask, which is there in training only; `rate` is a buffer, so that stacks can differ in it."""

    rate: Tensor

    def __init__(self, network: nn.Module, rate: float) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("rate", torch.tensor(float(rate)))

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the reconstruction (B, d) of inputs (B, d)."""
        if self.training:
            inputs = inputs * (torch.rand_like(inputs) >= self.rate) / (1 - self.rate)
        return self.network(inputs)


def standardised_pixels(data: ImageData, pooling: int, rows: int, validation_rows: int, device: str) -> Pixels:
    """Return `rows` training images, others for validation and all for the test, averaged over pooling x pooling.

    Pixels are standardised by the training images; those that hardly vary are left out.
    """
    rest, validation = data.train.split(validation_rows, 0)
    parts = [rest.split(rows, 1)[1] if len(rest) > rows else rest, validation, data.test]
    pooled = [_pooled(part, pooling) for part in parts]
    deviation = pooled[0].std(0, correction=0)
    kept = deviation >= LEAST_DEVIATION * deviation.max()
    mean, deviation = pooled[0].mean(0)[kept], deviation[kept]
    device = devices.resolve_device(device)
    train, held, test = (((part[:, kept] - mean) / deviation).to(device) for part in pooled)
    return Pixels(train, held, test, mean, deviation, kept)


def trained(kind: str, pixels: Pixels, setting: Setting) -> tuple[dict[float, list[nn.Module]], Found]:
    """Train autoencoders of a kind, and keep for each mask rate the S that did best on validation images.

    The learning rates of a mask rate grow beyond an end that is its best, as `search_each` has it; a single one is
    taken as it is. Returns {mask rate: S networks} and "learning_rates" (L,), all that were tried, "validation"
    (rates, L), mean loss a pixel at the mask rate of the training, NaN where a seed diverged or none was trained,
    "learning_rate" (rates,) that was chosen, and "inside" (rates,), whether it is at no end of its grid. Raises
    ValueError where all diverge.
    """
    nets: dict[Pair, list[nn.Module]] = {}
    losses: dict[Pair, float] = {}

    def scores_of(pairs: Sequence[Pair]) -> list[float]:
        nets.update(_side_by_side(kind, pixels, setting, pairs))
        losses.update({pair: float(np.mean([masked_loss(net, pixels.validation, pair[0]) for net in nets[pair]]))
                       for pair in pairs})  # fmt: skip
        return [-losses[pair] for pair in pairs]

    more = 4 if len(setting.learning_rates) > 1 else 0
    scores = search_each(scores_of, setting.mask_rates, setting.learning_rates, more)
    best = {q: best_of(each) for q, each in scores.items()}
    ends = np.array([losses[pair] for pair in best.items()])
    expect("learning_rates", list(setting.learning_rates), bool(np.isfinite(ends).all()), "one that converges")
    tried = sorted({rate for _, rate in losses})
    found = {
        "learning_rates": np.array(tried),
        "validation": np.array([[losses.get((q, rate), np.nan) for rate in tried] for q in setting.mask_rates]),
        "learning_rate": np.array(list(best.values())),
        "inside": np.array([is_inside(each) for each in scores.values()]),
    }
    return {q: nets[q, rate] for q, rate in best.items()}, found


def _side_by_side(kind: str, pixels: Pixels, setting: Setting, pairs: Sequence[Pair]) -> dict[Pair, list[nn.Module]]:
    """{(mask rate, learning rate): S networks}, all trained as one stack."""
    size = pixels.train.shape[1]
    shape = {"width": setting.width, "classes": size, **KINDS[kind]}
    places = [(*pair, seed) for pair in pairs for seed in setting.seeds]
    nets = [Masked(models.seeded(seed, models.mlp, size, **shape), q) for q, _, seed in places]
    history = training.train(
        nets, training.Examples(pixels.train.float(), pixels.train.float()),
        learning_rates=[rate for _, rate, _ in places], steps=setting.steps, batch_size=setting.batch_size,
        schedule="cosine", loss="squared", seed=[seed for *_, seed in places], evaluate_every=setting.steps,
        precision=setting.precision, device=setting.device, stacked=True,
    )  # fmt: skip
    count = len(setting.seeds)
    return {pair: history.models[i * count : (i + 1) * count] for i, pair in enumerate(pairs)}


@torch.no_grad()
def masked_loss(model: nn.Module, inputs: Tensor, rate: float) -> float:
    """Return the mean squared error a pixel of reconstructing inputs (N, d) from one mask each, the same every time."""
    rows, weight = masked_inputs(inputs, rate), next(model.parameters())
    found = model(rows.to(weight)).to(inputs)
    return float((inputs - found).square().mean())


def masked_inputs(inputs: Tensor, rate: float) -> Tensor:
    """Return inputs (N, d) under masks that depend on nothing but their shape and the rate, drawn on the CPU."""
    kept = torch.rand(inputs.shape, generator=torch.Generator().manual_seed(0)) >= rate
    return inputs * kept.to(inputs.device) / (1 - rate)


def measures(nets: Mapping[float, Sequence[nn.Module]], pixels: Pixels, points: int) -> Found:
    """Return what the trained networks {mask rate: S of them} are like, by seed and mask rate of the training.

    "values" (S, rates, d), singular values of the map, and "map rank" (S, rates), their effective rank, both means over
    the first `points` test images; "hidden rank" (S, rates), of the last hidden layer's centred activations on the test
    images; "loss" (S, rates, test rates) on masked test images, at the same mask rates.
    """
    values = [[_map_values(net, pixels.test[:points]) for net in row] for row in nets.values()]
    hidden = [[_hidden_rank(net, pixels.test) for net in row] for row in nets.values()]
    loss = [[[masked_loss(net, pixels.test, rate) for rate in nets] for net in row] for row in nets.values()]
    ranks = [[spectra.effective_count(found).mean() for found in row] for row in values]
    stacked = {"values": torch.stack([torch.stack([found.mean(0) for found in row]) for row in values]).numpy()}
    stacked |= {"map rank": np.array(ranks), "hidden rank": np.array(hidden), "loss": np.array(loss)}
    return {name: found.swapaxes(0, 1) for name, found in stacked.items()}


def closed_form(pixels: Pixels, mask_rates: Sequence[float]) -> Found:
    """Return the linear optimum: "values" (rates, d), "map rank" (rates,) and its test "loss" (rates,) a pixel.

    The loss is the expectation over masks at the mask rate of the map.
    """
    weights = torch.stack([masking.best_map(pixels.moments, rate) for rate in mask_rates])
    test = pixels.test.mT @ pixels.test / len(pixels.test)
    losses = masking.expected_loss(weights, test, torch.tensor(mask_rates, dtype=torch.float64))
    values = torch.linalg.svdvals(weights)
    found = {"values": values, "map rank": spectra.effective_count(values), "loss": losses / len(test)}
    return {name: value.cpu().numpy() for name, value in found.items()}


@torch.no_grad()
def pictures(model: nn.Module, pixels: Pixels, rate: float, count: int) -> np.ndarray:
    """Return (4, count, height, width): test images, the same masked, NaN where masked, and reconstructed.

    First by the linear optimum of the mask rate, then by the network. The images are evenly spaced over the test set.
    """
    picked = torch.arange(count) * (len(pixels.test) // count)
    rows, masked = pixels.test[picked], masked_inputs(pixels.test, rate)[picked]
    linear = masked @ masking.best_map(pixels.moments, rate).mT
    found = model(masked.to(next(model.parameters()))).to(rows)
    shown = torch.stack([pixels.images(part) for part in (rows, rows, linear, found)])
    hidden = torch.zeros(shown[1].shape, dtype=torch.bool)
    hidden[:, pixels.kept] = (masked == 0).cpu()
    shown[1][hidden] = torch.nan
    return shown.numpy()


def judged(found: Mapping[str, np.ndarray]) -> Found:
    """Return per seed (S,) what the claims are about; mask rates are those of the run, the first of them 0.

    "sampling", standard errors between samples and closed form, all rates together; "bottleneck" and "decay", the
    largest relative error of descent; "linear rank error", the largest of the map's effective rank, relative to the
    closed form; "<kind>/<what> order", Spearman's correlation of an effective rank with the mask rate; "nonlinear over
    linear", the largest ratio of a network's test loss to the linear optimum's; "masked over unmasked", test loss at
    the middle mask rate after training with it, over after training without.
    """
    rates, closed = found["mask_rates"], found["closed/map rank"][1:]
    losses, middle = found["nonlinear/loss"], len(rates) // 2
    own = losses.diagonal(axis1=1, axis2=2)[:, 1:]
    out = {
        "sampling": found["sampling error"].sum(1) / (len(rates) - 1) ** 0.5,
        "bottleneck": found["descent/bottleneck"].max(1),
        "decay": found["descent/decay"].max(1),
        "linear rank error": np.abs(found["linear/map rank"][:, 1:] / closed - 1).max(1),
        "nonlinear over linear": (own / found["closed/loss"][1:]).max(1),
        "masked over unmasked": losses[:, middle, middle] / losses[:, 0, middle],
    }
    for kind, what in (("linear", "map"), ("nonlinear", "map"), ("nonlinear", "hidden")):
        ranks = found[f"{kind}/{what} rank"]
        out[f"{kind}/{what} order"] = np.array([spearmanr(rates, row).statistic for row in ranks])
    return out


def check_mask_rates(rates: Sequence[float]) -> None:
    """Raise ValueError unless the mask rates are 0 and then at least two larger ones, ascending."""
    expect("mask_rates", list(rates), rates[0] == 0 and len(rates) > 2 and list(rates) == sorted(set(rates)),
           "0 and then at least two larger ones, ascending")  # fmt: skip


def _pooled(part: Images, pooling: int) -> Tensor:
    """(N, height, width) from 0 to 1, in chunks, since the whole set in float64 is 376 MB."""
    chunks = part.pixels[:, 0].split(10_000)
    return torch.cat([functional.avg_pool2d(chunk.double() / 255, pooling) for chunk in chunks])


def _map_values(model: nn.Module, inputs: Tensor, chunk: int = 16) -> Tensor:
    """Singular values (points, d) of the Jacobian of a network at each of some inputs (points, d), in float64."""
    weights = {name: value.detach() for name, value in model.named_parameters()}
    inputs = inputs.to(next(iter(weights.values())))
    at = vmap(jacrev(lambda row: functional_call(model, weights, (row[None],))[0]))
    maps = torch.cat([at(rows) for rows in inputs.split(chunk)])
    return torch.linalg.svdvals(maps.cpu().double())  # small ones, which a CPU is quicker at


@torch.no_grad()
def _hidden_rank(model: nn.Module, inputs: Tensor) -> float:
    found = models.features(model.get_submodule("network"), inputs.to(next(model.parameters()))).double()
    return float(spectra.effective_rank(found - found.mean(0)))
