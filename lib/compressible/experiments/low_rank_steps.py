"""Descent of small objectives in float64 by GaLore, by ReLoRA, and by the modified ReLoRA of P3's Theorem 4.

An objective is a network of matrices without biases, all (m, n) with m < n, and its loss on all of its training data.
Methods:
  full       all entries are trained
  galore     steps along r leading left singular vectors P of the gradient, taken anew every T steps
  frozen     P3's modification of ReLoRA: every T steps merge, B = P, A = 0; B does not move in between
  trained    the same restarts, but B is trained with A
  published  ReLoRA: every T steps merge, A anew from Kaiming's distribution, B = 0; both are trained
Rules: "gd", gradient descent, or "adam", whose moments stay at a restart, except that the published method prunes
99.9 % of them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from compressible.data.images import ImageData
from compressible.networks.optim import relora
from compressible.networks.optim.galore import GaLoreAdamW, GaLoreSGD

RULES: dict[str, Callable[..., torch.optim.Optimizer]] = {"gd": GaLoreSGD, "adam": partial(GaLoreAdamW, eps=1e-8)}
RELORA = ("frozen", "trained", "published")
METHODS = ("full", "galore", *RELORA)
RESTARTS = 10_000  # seeds of restarts lie so far behind those of networks, whose first matrices they would resemble
Loss = Callable[[nn.Module], Tensor]
Directions = list[list[Tensor]]  # P (m, r) of each matrix, at each refresh


@dataclass(frozen=True)
class Objective:
    """A network of matrices in float64 and its losses: what is trained on, and what chooses and judges.

    `reordered` is the training loss with its rows in reverse order: the same but for rounding.
    """

    model: nn.Sequential
    train: Loss
    reordered: Loss
    validation: Loss
    test: Loss


@dataclass(frozen=True)
class Steps:
    """How an objective is descended: the method, its rule, rate, rank r, period T and the number of steps.

    `cosine`: the rate falls along a cosine to a tenth, with a ramp of T / 10 steps after each restart of the published
    method, as its authors have it. `seed` draws the published method's A.
    """

    method: str
    rule: str
    rate: float
    rank: int
    period: int
    steps: int
    seed: int = 0
    cosine: bool = False

    def __post_init__(self) -> None:
        for name, value, known in (("method", self.method, METHODS), ("rule", self.rule, RULES)):
            if value not in known:
                raise ValueError(f"{name} is {value!r}, expected one of {', '.join(known)}")


def regression(seed: int, size: int = 16, inputs: int = 24, rows: int = 96) -> Objective:
    """Least squares for a matrix (size, inputs) from Gaussian data, noise 0.1; the target's values fall like 1 / k.

    Inputs are scaled to a covariance whose largest eigenvalue is 1, so that descent settles for steps below 2.
    """
    generator = torch.Generator().manual_seed(seed)
    draw = partial(torch.randn, generator=generator, dtype=torch.float64)
    left, right = (torch.linalg.qr(draw(side, size)).Q for side in (size, inputs))
    target = left / torch.arange(1, size + 1) @ right.mT
    drawn = [draw(rows, inputs) for _ in range(3)]
    scale = torch.linalg.matrix_norm(drawn[0], ord=2) / rows**0.5
    parts = [(x / scale, x @ target.mT + 0.1 * draw(rows, size)) for x in drawn]
    return _objective(_network([inputs, size], generator), _half_square, parts)


def digits(data: ImageData, seed: int, rows: int, width: int = 0) -> Objective:
    """Cross-entropy of digits of MNIST, 14 x 14 pixels: `rows` for training and as many for validation.

    Without a width a linear (softmax) classifier from zero, else tanh units between two matrices. Pixels are centred
    and scaled to a covariance whose largest eigenvalue is 1. The test digits are the same for all seeds.
    """
    rest, validation = data.train.split(rows, seed)
    parts = [rest.split(rows, seed)[1], validation, data.test]
    pixels = [functional.avg_pool2d(part.pixels.double() / 255, 2).flatten(1) for part in parts]
    shift = pixels[0].mean(0)
    scale = torch.linalg.matrix_norm(pixels[0] - shift, ord=2) / rows**0.5
    sizes = [pixels[0].shape[1], *([width] if width else []), len(data.classes)]
    network = _network(sizes, torch.Generator().manual_seed(seed))
    pairs = [((x - shift) / scale, part.labels) for x, part in zip(pixels, parts, strict=True)]
    return _objective(network, functional.cross_entropy, pairs)


def matrices(
    objective: Objective, how: Steps, *, reordered: bool = False, directions: Directions | None = None
) -> Iterator[list[Tensor]]:
    """Yield the merged matrices before the first step and after each, as copies.

    `reordered` sums the training loss in another order. `directions` is a list that "galore" fills with its P at each
    refresh, and from which "frozen" takes them instead of its own.
    """
    model, loss = copy.deepcopy(objective.model), objective.reordered if reordered else objective.train
    if how.method in RELORA:
        yield from _relora(model, loss, how, directions)
    else:
        yield from _full_matrices(model, loss, how, directions)


def _full_matrices(
    model: nn.Sequential, loss: Loss, how: Steps, directions: Directions | None
) -> Iterator[list[Tensor]]:
    weights = list(model.parameters())
    low = {"rank": how.rank, "update_proj_gap": how.period, "scale": 1.0, "proj_type": "left"}
    optimizer = RULES[how.rule]([{"params": weights, **(low if how.method == "galore" else {})}], lr=how.rate)
    for step in range(how.steps + 1):
        yield [weight.detach().clone() for weight in weights]
        _set_rate(optimizer, how, step)
        _step(model, loss, optimizer)
        if directions is not None and step % how.period == 0:
            directions.append([optimizer.state[weight]["left"].clone() for weight in weights])


def _relora(base: nn.Sequential, loss: Loss, how: Steps, directions: Directions | None) -> Iterator[list[Tensor]]:
    """Through peft's LoRA layers with s = 1: gradients are those of A and B, and of W at a restart alone."""
    import peft

    targets = [name for name, layer in base.named_children() if isinstance(layer, nn.Linear)]
    model = peft.get_peft_model(base, peft.LoraConfig(r=how.rank, lora_alpha=how.rank, target_modules=targets))
    layers = relora.lora_layers(model)
    weights = [weight for name, weight in model.named_parameters() if "lora_" in name]
    optimizer = RULES[how.rule](weights, lr=how.rate)
    generator = torch.Generator().manual_seed(RESTARTS + how.seed)
    for step in range(how.steps + 1):
        yield [(layer.base_layer.weight + layer.get_delta_weight("default")).detach() for layer in layers.values()]
        period, begins = divmod(step, how.period)
        if not begins and how.method == "published":
            relora.restart(model, optimizer, keep=0.001, generator=generator)
        elif not begins and directions is not None:
            relora.restart_along(model, dict(zip(layers, directions[period], strict=True)))
        elif not begins:
            relora.restart_from_gradient(model, loss)
        for layer in layers.values():
            layer.lora_B["default"].weight.requires_grad_(how.method != "frozen")
        _set_rate(optimizer, how, step)
        _step(model, loss, optimizer)


def _set_rate(optimizer: torch.optim.Optimizer, how: Steps, step: int) -> None:
    if how.cosine:
        ramp = how.period // 10 if how.method == "published" else 0
        shape = {"steps": how.steps, "restart_every": how.period, "restart_warmup": ramp}
        factor = relora.restart_factor(step, warmup=0, least=0.1, **shape)
        for group in optimizer.param_groups:
            group["lr"] = how.rate * factor


def _step(model: nn.Module, loss: Loss, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    loss(model).backward()
    optimizer.step()


def _network(sizes: Sequence[int], generator: torch.Generator) -> nn.Sequential:
    """Matrices between layers of these sizes with tanh between them; one alone starts at zero, two at N(0, 1 / n)."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Tanh()] if layers else []
        layers.append(layer := nn.Linear(inputs, outputs, bias=False, dtype=torch.float64))
        nn.init.normal_(layer.weight, std=inputs**-0.5 if len(sizes) > 2 else 0.0, generator=generator)
    return nn.Sequential(*layers)


def _objective(
    network: nn.Sequential, measure: Callable[[Tensor, Tensor], Tensor], parts: Sequence[tuple[Tensor, Tensor]]
) -> Objective:
    train, validation, test = parts
    pairs = (train, (train[0].flip(0), train[1].flip(0)), validation, test)
    return Objective(network, *(partial(_loss, measure, pair) for pair in pairs))


def _half_square(outputs: Tensor, wanted: Tensor) -> Tensor:
    return (outputs - wanted).square().sum(1).mean() / 2


def _loss(measure: Callable[[Tensor, Tensor], Tensor], pair: tuple[Tensor, Tensor], model: nn.Module) -> Tensor:
    return measure(model(pair[0]), pair[1])
