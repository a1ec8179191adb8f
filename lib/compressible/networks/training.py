"""Train S networks of one architecture side by side, each from its own start, on its own batches, at its own rate."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from compressible.networks.batches import Examples
from compressible.networks.layers import weight_matrix
from compressible.networks.losses import LOSSES
from compressible.networks.optim.rules import OPTIMIZERS, Rule
from compressible.networks.side_by_side import Plan, SideBySide
from compressible.runtime import devices
from compressible.runtime.checks import expect, is_integer, is_number, unknown
from compressible.runtime.progress import progress

__all__ = ["Examples", "NetworkHistory", "train"]
SCHEDULES, PRECISIONS = ("constant", "cosine"), ("float32", "tf32", "bfloat16")
LONGEST = 16  # steps in one CUDA graph
Watch = Callable[[int, list[nn.Module]], Any]


@dataclass
class NetworkHistory:
    """What a training of S networks left: R records, at step 0, at multiples of `evaluate_every` and at the last step.

    Args:
        steps: (R,) the steps of the records.
        loss: (S, R) training loss: of mini-batches the mean over the steps since the record before, each taken before
            its update (at step 0: of the first batch); of full batches the loss at the record, without dropout.
        test_loss, accuracy: (S, R) on the test set, NaN without one.
        validation_loss, validation_accuracy: (S, R) on the validation set, NaN without one.
        seconds: (R,) wall clock of the training of all S together up to the record; evaluations, `watch` and the
            capture of graphs are left out.
        diverged: (S,) whether a loss was not finite; such values stay in the records, and the others go on.
        peak_memory_bytes: the tensors' peak on CUDA, all S together; on a CPU the process's.
        parameters: trained numbers of one network.
        models: the S trained networks, in evaluation mode; those that were given are as they were.
        learning_rates: (S,).
        snapshots: by step, by name: (S, ...) copies on the CPU.
        watched: what `watch` returned, a value a record.
        stacked, captured: whether they trained stacked, and as CUDA graphs.

    Example:
        >>> import torch, compressible as cd
        >>> from compressible.networks import models
        >>> nets = [cd.networks.models.seeded(seed, models.mlp, 4, 8, 2) for seed in range(3)]
        >>> examples = cd.networks.training.Examples(torch.eye(4), torch.tensor([0, 1, 0, 1]))
        >>> history = cd.networks.training.train(nets, examples, learning_rates=[0.01, 0.02, 0.04], steps=20)
        >>> history.loss.shape, history.parameters, bool((history.loss[:, -1] < history.loss[:, 0]).all())
        ((3, 21), 202, True)
    """

    steps: np.ndarray
    loss: np.ndarray
    test_loss: np.ndarray
    accuracy: np.ndarray
    validation_loss: np.ndarray
    validation_accuracy: np.ndarray
    seconds: np.ndarray
    diverged: np.ndarray
    peak_memory_bytes: int
    parameters: int
    models: list[nn.Module] = field(repr=False)
    learning_rates: np.ndarray
    snapshots: dict[int, dict[str, Tensor]] = field(repr=False)
    watched: list[Any] = field(repr=False)
    stacked: bool
    captured: bool


def train(
    models: Sequence[nn.Module],
    train_set: Examples,
    test_set: Examples | None = None,
    *,
    learning_rates: Sequence[float],
    steps: int,
    batch_size: int | None = None,
    optimizer: str = "adam",
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    outer_ratio: float = 1.0,
    schedule: str = "constant",
    warmup: int = 0,
    loss: str = "cross_entropy",
    seed: int | Sequence[int] = 0,
    augment: str | None = None,
    evaluate_every: int | None = None,
    validation_set: Examples | None = None,
    snapshots: Sequence[int] = (),
    snapshot_of: Sequence[str] | None = None,
    watch: Watch | None = None,
    stacked: bool | str = "auto",
    captured: bool | str = "auto",
    precision: str = "float32",
    device: str = "auto",
) -> NetworkHistory:
    """Train S networks of one architecture side by side and record how they do.

    Args:
        models: S networks that differ in their numbers alone; they are copied, and stay as they are.
        train_set, test_set, validation_set: examples; all of them are moved to the device.
        learning_rates: one a model, > 0; usually 1e-4 to 1e-2 for Adam.
        steps: how many updates.
        batch_size: B, examples a step, drawn epoch by epoch without replacement; None takes all in every step.
        optimizer: "adam", "adamw" or "sgd", with PyTorch's constants.
        momentum: of sgd, 0 to below 1.
        weight_decay: >= 0; decoupled for adamw, else added to the gradient.
        outer_ratio: the papers' alpha (or gamma): multiplies the rate of the first and the last factor of every
            factored layer; usually 0.01 to 10.
        schedule: "constant", or "cosine" down to zero at the last step.
        warmup: steps over which the rate rises linearly first.
        loss: "cross_entropy", or "squared": half the squared distance, mean over the batch.
        seed: model s draws its batches with seed + s, or with its own of a sequence; the first seeds dropout, too.
        augment: None, or "crop_and_flip": images shifted by up to 4 pixels and mirrored at random.
        evaluate_every: steps between records; a twentieth of all unless given.
        snapshots: steps at which matrices are copied.
        snapshot_of: of which layers (their end-to-end matrix) or parameters, by dotted name; unless given, of the
            models' `penultimate` layer.
        watch: called as watch(step, models) at every record, without gradients, with the S networks as they are, in
            evaluation mode; the values that it returns are kept.
        stacked: True trains all in one pass over stacked parameters, False one by one; "auto" stacks small networks
            without convolutions. Both give the same up to rounding, except for dropout's masks.
        captured: whether steps run as CUDA graphs; "auto" does so on CUDA, and falls back with a warning.
        precision: "float32", or on CUDA "tf32" and "bfloat16" (autocast; parameters stay float32).
        device: "auto", "cpu" or "cuda".

    Returns:
        NetworkHistory of all of them.

    Raises:
        ValueError: for a value out of range, models that do not match, or a name that no layer has; before any work.

    Example:
        >>> import torch, compressible as cd
        >>> from compressible.networks import models, training
        >>> examples = training.Examples(torch.eye(4), torch.tensor([0, 1, 0, 1]))
        >>> net = models.seeded(0, models.mlp, 4, 8, 2)
        >>> history = training.train([net], examples, examples, learning_rates=[0.02], steps=100)
        >>> float(history.accuracy[0, -1])
        1.0

    Reference:
        P2, nonlinear networks; `outer_ratio` is its alpha.
    """
    _check_numbers(steps, batch_size, momentum, weight_decay, outer_ratio, warmup, evaluate_every)
    _check_names(optimizer, schedule, loss, augment, precision)
    _check_models(models, learning_rates)
    seeds = _seeds(seed, len(models))
    _check_sets(train_set, batch_size, augment)
    names = _snapshot_names(models[0], snapshots, snapshot_of, steps)
    device = devices.resolve_device(device)
    every = max(1, steps // 20) if evaluate_every is None else evaluate_every
    together = _together(models, stacked)
    graphs = device != "cpu" if captured == "auto" else bool(captured)
    expect("captured", captured, not graphs or device != "cpu", "False on a CPU")
    own = [copy.deepcopy(model).to(device) for model in models]
    if device != "cpu" and not together:
        own = [model.to(memory_format=torch.channels_last) for model in own]  # type: ignore[call-overload]
    dtype = next(own[0].parameters()).dtype
    sets = [part if part is None else part.to(device, dtype) for part in (train_set, validation_set, test_set)]
    plan = Plan(
        steps,
        batch_size,
        Rule(optimizer, momentum, weight_decay),
        LOSSES[loss],
        outer_ratio,
        _factors(schedule, warmup, steps),
        augment is not None,
        _autocast(precision, device),
        max(length for length in range(1, LONGEST + 1) if every % length == 0),
    )
    assert sets[0] is not None
    with _computing(precision, device), _seeded(seeds[0], device), devices.peak_inside(device) as peak:
        parts = [slice(None)] if together else [slice(index, index + 1) for index in range(len(own))]
        rates = list(map(float, learning_rates))
        runs = [SideBySide(own[part], sets[0], plan, seeds[part], rates[part]) for part in parts]
        graphs = graphs and _capture(runs, captured == "auto")
        records = _Records(runs, own, sets[1], sets[2], names, watch)
        marks = _marks(steps, every, snapshots)
        with progress(steps * len(runs), "networks") as bar:
            _go(runs, records, marks, every, steps, set(snapshots), bar)
        held = peak()
    return records.history(held, rates, together, graphs)


def _go(
    runs: list[SideBySide], records: _Records, marks: list[int], every: int, steps: int, snapshots: set[int], bar: Any
) -> None:
    """Train from mark to mark, all runs in turn; only the steps are timed."""
    before = 0
    for mark in marks:
        for run in runs:
            if mark > before:
                began = devices.clock(run.loss_sum)
                run.advance(mark - before)
                records.spent += devices.clock(run.loss_sum) - began
                bar.update(mark - before)
        before = mark
        if mark in snapshots:
            records.snap(mark)
        if mark % every == 0 or mark == steps:
            records.record(mark)


class _Records:
    """What is kept of a training."""

    def __init__(
        self,
        runs: list[SideBySide],
        models: list[nn.Module],
        validation: Examples | None,
        test: Examples | None,
        names: list[str],
        watch: Watch | None,
    ) -> None:
        self.runs, self.models, self.sets, self.names, self.watch = runs, models, (validation, test), names, watch
        self.spent = 0.0
        self.rows: list[tuple[int, float, Tensor]] = []
        self.snapshots: dict[int, dict[str, Tensor]] = {}
        self.watched: list[Any] = []

    def record(self, step: int) -> None:
        exact = step == 0 or not self.runs[0].draws
        losses = [run.first_losses() if exact else run.read_losses() for run in self.runs]
        values = [torch.cat(losses)]
        for part in self.sets:
            missing = torch.full((len(self.models),), math.nan, dtype=torch.float64)
            found = [] if part is None else [run.evaluate(part) for run in self.runs]
            values += [torch.cat([pair[index] for pair in found]) if found else missing for index in (0, 1)]
        self.rows.append((step, self.spent, torch.stack(values)))
        if self.watch is not None:
            for model in self.models:
                model.eval()
            with torch.no_grad():
                self.watched.append(self.watch(step, self.models))

    @torch.no_grad()
    def snap(self, step: int) -> None:
        """Copy the named matrices of all models."""
        self.snapshots[step] = {
            name: torch.stack([_named(model, name).detach().cpu() for model in self.models]) for name in self.names
        }

    def history(self, peak: int, rates: list[float], stacked: bool, captured: bool) -> NetworkHistory:
        """All as arrays."""
        values = torch.stack([row[2] for row in self.rows], -1).numpy()  # (5, S, R)
        loss, validation_loss, validation_accuracy, test_loss, accuracy = values
        judged = [values[0]] + [values[index] for index, part in ((1, self.sets[0]), (3, self.sets[1])) if part]
        for model in self.models:
            model.eval()
        return NetworkHistory(
            steps=np.array([row[0] for row in self.rows]),
            loss=loss,
            test_loss=test_loss,
            accuracy=accuracy,
            validation_loss=validation_loss,
            validation_accuracy=validation_accuracy,
            seconds=np.array([row[1] for row in self.rows]),
            diverged=~np.all([np.isfinite(kind).all(1) for kind in judged], 0),
            peak_memory_bytes=peak,
            parameters=sum(p.numel() for p in self.models[0].parameters() if p.requires_grad),
            models=self.models,
            learning_rates=np.array(rates),
            snapshots=self.snapshots,
            watched=self.watched,
            stacked=stacked,
            captured=captured,
        )


def _named(model: nn.Module, name: str) -> Tensor:
    """A layer's end-to-end matrix or a parameter, by name."""
    modules = dict(model.named_modules())
    return weight_matrix(modules[name]) if name in modules else model.get_parameter(name)


def _marks(steps: int, every: int, snapshots: Sequence[int]) -> list[int]:
    return sorted({0, steps, *range(0, steps + 1, every), *snapshots})


def _factors(schedule: str, warmup: int, steps: int) -> Tensor:
    """The schedule (steps,): a linear rise, then constant or a cosine down to zero at the last step's end."""
    step = torch.arange(steps, dtype=torch.float64)
    rise = ((step + 1) / warmup).clamp(max=1) if warmup else torch.ones_like(step)
    if schedule == "constant":
        return rise
    fall = (1 + torch.cos(math.pi * ((step - warmup) / max(1, steps - warmup)).clamp(min=0))) / 2
    return rise * fall


def _capture(runs: list[SideBySide], fall_back: bool) -> bool:
    """Capture every run's steps; whether that went well."""
    pool = None
    for run in runs:
        try:
            pool = run.capture(pool)
        except RuntimeError as error:
            if not fall_back:
                raise
            warnings.warn(f"steps are not captured, since {error}; they run one by one", stacklevel=3)
            for other in runs:
                other.graphs = {}
            return False
    return True


def _autocast(precision: str, device: str) -> Callable[[], Any]:
    if precision != "bfloat16":
        return nullcontext
    # no cache: a captured step must cast the weights at every replay
    return partial(torch.autocast, torch.device(device).type, torch.bfloat16, cache_enabled=False)


@contextmanager
def _computing(precision: str, device: str) -> Iterator[None]:
    """Let products and convolutions use TensorFloat-32 where asked for, and cuDNN choose by trying."""
    with devices.matmul_precision("float32" if precision == "float32" else "tf32"):
        if device == "cpu":
            yield
            return
        with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=precision != "float32"):
            yield


@contextmanager
def _seeded(seed: int, device: str) -> Iterator[None]:
    """Dropout draws from the global generators, which are left as they were."""
    with torch.random.fork_rng([] if device == "cpu" else [torch.device(device).index or 0]):
        torch.manual_seed(seed)
        yield


def _together(models: Sequence[nn.Module], stacked: bool | str) -> bool:
    modules = [module for module in models[0].modules()]
    kept = [type(m).__name__ for m in modules if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    expect("stacked", stacked, not (stacked is True and kept), "False for networks with batch norm, whose means change")
    if stacked == "auto":
        return len(models) > 1 and not kept and not any(isinstance(m, nn.Conv2d) for m in modules)
    return bool(stacked) and len(models) > 1


def _check_numbers(
    steps: int,
    batch_size: int | None,
    momentum: float,
    weight_decay: float,
    outer_ratio: float,
    warmup: int,
    evaluate_every: int | None,
) -> None:
    expect("steps", steps, is_integer(steps) and steps >= 1, "an integer >= 1")
    for name, value in (("batch_size", batch_size), ("evaluate_every", evaluate_every)):
        expect(name, value, value is None or (is_integer(value) and value >= 1), "an integer >= 1 or None")
    expect("momentum", momentum, is_number(momentum) and 0 <= momentum < 1, "a number >= 0 and < 1")
    expect("weight_decay", weight_decay, is_number(weight_decay) and weight_decay >= 0, "a finite number >= 0")
    expect("outer_ratio", outer_ratio, is_number(outer_ratio) and outer_ratio >= 0, "a finite number >= 0")
    expect("warmup", warmup, is_integer(warmup) and 0 <= warmup < steps, f"an integer from 0 to below steps = {steps}")


def _check_names(optimizer: str, schedule: str, loss: str, augment: str | None, precision: str) -> None:
    known: tuple[tuple[str, Any, Any], ...] = (
        ("optimizer", optimizer, OPTIMIZERS),
        ("schedule", schedule, SCHEDULES),
        ("loss", loss, LOSSES),
        ("augment", augment, (None, "crop_and_flip")),
        ("precision", precision, PRECISIONS),
    )
    for kind, name, names in known:
        if name not in names:
            raise ValueError(unknown(kind, name, map(str, names)))


def _seeds(seed: int | Sequence[int], count: int) -> list[int]:
    """One a model."""
    seeds = [seed + index for index in range(count)] if isinstance(seed, int) else list(seed)
    expect("seed", seed, len(seeds) == count, f"an integer, or one for each of the {count} models")
    expect("seed", seed, all(is_integer(each) and 0 <= each < 2**32 for each in seeds), "integers from 0 to 2^32 - 1")
    return seeds


def _check_models(models: Sequence[nn.Module], learning_rates: Sequence[float]) -> None:
    expect("models", list(models), len(models) >= 1, "at least one network")
    rates = list(learning_rates)
    expect("learning_rates", rates, len(rates) == len(models), f"one for each of the {len(models)} models")
    expect("learning_rates", rates, all(is_number(rate, 0) for rate in rates), "finite numbers > 0")
    shapes = [{name: tuple(value.shape) for name, value in model.state_dict().items()} for model in models]
    for index, found in enumerate(shapes):
        differing = sorted(name for name in {*found, *shapes[0]} if found.get(name) != shapes[0].get(name))
        expect(f"architecture of model {index}", differing[:3], not differing, "the tensors of model 0")
    trained = [name for name, parameter in models[0].named_parameters() if parameter.requires_grad]
    expect("trained parameters", trained, bool(trained), "at least one with requires_grad")


def _check_sets(train_set: Examples, batch_size: int | None, augment: str | None) -> None:
    fits = batch_size is None or batch_size <= len(train_set)
    expect("batch_size", batch_size, fits, f"at most the {len(train_set)} training examples")
    images = train_set.inputs.dim() == 4 and batch_size is not None
    expect("augment", augment, augment is None or images, "None without batches of images (N, C, H, W)")


def _snapshot_names(
    model: nn.Module, snapshots: Sequence[int], snapshot_of: Sequence[str] | None, steps: int
) -> list[str]:
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
