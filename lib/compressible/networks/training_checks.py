"""What `train` refuses, by name and before any work."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any

import torch
from torch import Tensor, nn

from compressible.networks.batches import Examples
from compressible.networks.evaluation import ALONE
from compressible.networks.layers import weight_matrix
from compressible.networks.losses import LOSSES
from compressible.networks.optim.rules import OPTIMIZERS
from compressible.runtime.checks import closest, expect, expect_function, is_integer, is_number, unknown

AUTO, MOST_STEPS = "auto", 10**9  # the schedule is a number a step
SCHEDULES, PRECISIONS = ("constant", "cosine"), ("float32", "tf32", "bfloat16")


def check_numbers(
    steps: int,
    batch_size: int | None,
    momentum: float,
    weight_decay: float | Mapping[str, float],
    outer_ratio: float,
    warmup: int,
    evaluate_every: int | None,
) -> None:
    expect("steps", steps, is_integer(steps) and 1 <= steps <= MOST_STEPS, f"an integer >= 1 and <= {MOST_STEPS:g}")
    for name, value in (("batch_size", batch_size), ("evaluate_every", evaluate_every)):
        expect(name, value, value is None or (is_integer(value) and value >= 1), "an integer >= 1 or None")
    expect("momentum", momentum, is_number(momentum) and 0 <= momentum < 1, "a number >= 0 and < 1")
    decays = list(weight_decay.values()) if isinstance(weight_decay, Mapping) else [weight_decay]
    expect("weight_decay", weight_decay, all(is_number(each) and each >= 0 for each in decays), "finite numbers >= 0")
    expect("outer_ratio", outer_ratio, is_number(outer_ratio) and outer_ratio >= 0, "a finite number >= 0")
    expect("warmup", warmup, is_integer(warmup) and 0 <= warmup < steps, f"an integer from 0 to below steps = {steps}")


def check_names(optimizer: str, schedule: str, loss: str, augment: str | None, precision: str) -> None:
    known: tuple[tuple[str, Any, Any], ...] = (
        ("optimizer", optimizer, OPTIMIZERS),
        ("schedule", schedule, SCHEDULES),
        ("loss", loss, LOSSES),
        ("augment", augment, (None, "crop_and_flip")),
        ("precision", precision, PRECISIONS),
    )
    for kind, name, names in known:
        if not isinstance(name, (str, type(None))) or name not in names:
            raise ValueError(unknown(kind, name, map(str, names)))


def seeds_of(seed: int | Sequence[int], count: int) -> list[int]:
    """One a model."""
    several = isinstance(seed, Sequence) and not isinstance(seed, (str, bytes))
    told = f"an integer from 0 to 2^32 - 1, or one for each of the {count} models"
    expect("seed", seed, several or is_integer(seed), told)
    seeds = list(seed) if isinstance(seed, Sequence) else [seed + index for index in range(count)]
    expect("seed", seed, len(seeds) == count, f"an integer, or one for each of the {count} models")
    expect("seed", seed, all(is_integer(each) and 0 <= each < 2**32 for each in seeds), "integers from 0 to 2^32 - 1")
    return seeds


def check_decay(models: Sequence[nn.Module], weight_decay: float | Mapping[str, float]) -> None:
    """Raise ValueError for what is no regular expression, or names no parameter that is trained in any model."""
    if not isinstance(weight_decay, Mapping):
        return
    known = {name: None for model in models for name, value in model.named_parameters() if value.requires_grad}
    for names in weight_decay:
        expect("type of a name in weight_decay", type(names).__name__, isinstance(names, str), "a regular expression")
        try:
            found = any(re.fullmatch(names, name) for name in known)
        except re.error as error:
            raise ValueError(f"weight_decay names {names!r}, expected a regular expression: {error}") from error
        if not found:
            raise ValueError(f"weight_decay names {names!r}, which matches no trained parameter{closest(names, known)}")


def check_models(models: Sequence[nn.Module], learning_rates: Sequence[float]) -> None:
    listed = isinstance(models, (Sequence, nn.ModuleList)) and all(isinstance(model, nn.Module) for model in models)
    expect("models", models, listed and len(models) >= 1, "a list of networks, at least one")
    given = learning_rates
    one = (
        isinstance(given, Iterable) and not isinstance(given, (str, bytes, Mapping)) and getattr(given, "ndim", 1) == 1
    )
    expect("learning_rates", given, one, f"one for each of the {len(models)} models")
    rates = learning_rates.tolist() if hasattr(learning_rates, "tolist") else list(learning_rates)
    expect("learning_rates", rates, len(rates) == len(models), f"one for each of the {len(models)} models")
    expect("learning_rates", rates, all(is_number(rate, 0) for rate in rates), "finite numbers > 0")
    shapes = [{name: tuple(value.shape) for name, value in model.state_dict().items()} for model in models]
    for index, found in enumerate(shapes):
        differing = sorted(name for name in {*found, *shapes[0]} if found.get(name) != shapes[0].get(name))
        expect(f"architecture of model {index}", differing[:3], not differing, "the tensors of model 0")
    for index, model in enumerate(models):
        trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        expect(f"trained parameters of model {index}", trained, bool(trained), "at least one with requires_grad")
    kinds = [next(model.parameters()).dtype for model in models]
    for index, kind in enumerate(kinds):
        told = f"{kinds[0]} as of model 0, which the examples are brought to"
        expect(f"dtype of model {index}", kind, kind == kinds[0], told)


def check_examples(name: str, examples: object, needed: bool = False) -> None:
    """Raise ValueError unless it is a set of examples, or None where none is needed."""
    holds = isinstance(examples, Examples) or (examples is None and not needed)
    expect(f"type of {name}", type(examples).__name__, holds, f"Examples{'' if needed else ' or None'}")


def check_choices(stacked: object, captured: object, watch: object) -> None:
    for name, value in (("stacked", stacked), ("captured", captured)):
        known = isinstance(value, bool) or (isinstance(value, str) and value == AUTO)
        expect(name, value, known, f"True, False or {AUTO!r}")
    if watch is not None:
        expect_function("watch", watch, "a function of the step and the models, or None")


def check_sets(train_set: Examples, batch_size: int | None, augment: str | None) -> None:
    fits = batch_size is None or batch_size <= len(train_set)
    expect("batch_size", batch_size, fits, f"at most the {len(train_set)} training examples")
    images = train_set.inputs.dim() == 4 and batch_size is not None
    expect("augment", augment, augment is None or images, "None without batches of images (N, C, H, W)")


@torch.no_grad()
def check_targets(model: nn.Module, loss: str, sets: Mapping[str, Examples | None], batch_size: int | None) -> None:
    """Raise ValueError for targets that a loss cannot hold against what a model says of the first inputs."""
    inputs = next(part.inputs for part in sets.values() if part is not None)
    outputs = model.eval()(inputs[: batch_size or ALONE[inputs.device.type]])
    for name, part in sets.items():
        if part is not None:
            _check_targets(f"targets of {name}", part.targets, outputs, loss)


def _check_targets(name: str, targets: Tensor, outputs: Tensor, loss: str) -> None:
    if loss == "squared" and targets.is_floating_point():
        shape = tuple(outputs.shape[1:])
        expect(f"shape of {name}", tuple(targets.shape), targets.shape[1:] == shape, f"{('N', *shape)}, as the outputs")
        return
    told = "(N,) class numbers in int64" + (", or floating-point numbers" if loss == "squared" else "")
    kind = targets.dim() == 1 and (
        targets.dtype == torch.int64 if loss == "cross_entropy" else not targets.is_complex()
    )
    expect(f"kind of {name}", (tuple(targets.shape), targets.dtype), kind, told)
    ends, classes = (int(targets.min()), int(targets.max())), outputs.shape[-1]
    expect(f"least and largest of {name}", ends, ends[0] >= 0 and ends[1] < classes, f"from 0 to {classes - 1}")


def snapshot_names(
    model: nn.Module, snapshots: Sequence[int], snapshot_of: Sequence[str] | None, steps: int
) -> list[str]:
    for name, value in (("snapshots", snapshots), ("snapshot_of", () if snapshot_of is None else snapshot_of)):
        listed = isinstance(value, (Sequence, Set)) and not isinstance(value, (str, bytes))
        named = name == "snapshots" or (listed and all(isinstance(each, str) for each in value))
        told = "a list of steps" if name == "snapshots" else "a list of names of layers or parameters, or None"
        expect(name, value, listed and named, told)
    wrong = [step for step in snapshots if not (is_integer(step) and 0 <= step <= steps)]
    expect("snapshots", wrong, not wrong, f"steps from 0 to {steps}")
    if not snapshots:
        return []
    penultimate = getattr(model, "penultimate", None)
    names = [str(penultimate)] if snapshot_of is None else list(snapshot_of)
    known = [*dict(model.named_modules()), *dict(model.named_parameters())]
    for name in names:
        if name not in known:
            raise ValueError(unknown("layer or parameter", name, known))
        if name in dict(model.named_modules()):
            weight_matrix(model.get_submodule(name))
    return names
