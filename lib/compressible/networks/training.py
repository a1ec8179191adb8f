"""Train S networks of one architecture side by side, each from its own start, on its own batches, at its own rate."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from compressible.networks.batches import Examples
from compressible.networks.history import NetworkHistory, Records, Watch
from compressible.networks.losses import LOSSES
from compressible.networks.optim.rules import Rule
from compressible.networks.side_by_side import Plan, SideBySide
from compressible.networks.stacks import together
from compressible.networks.training_checks import (
    check_choices,
    check_decay,
    check_examples,
    check_models,
    check_names,
    check_numbers,
    check_sets,
    check_targets,
    seeds_of,
    snapshot_names,
)
from compressible.recovery.checks import expect_device
from compressible.runtime import devices
from compressible.runtime.checks import expect
from compressible.runtime.progress import progress

__all__ = ["Examples", "NetworkHistory", "train"]
LONGEST = 16  # steps in one CUDA graph


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
    weight_decay: float | Mapping[str, float] = 0.0,
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
        models: S networks with the same names and shapes of parameters and buffers; they are copied, and stay as they
            are. To be stacked they must differ in the values of these alone: not in what is trained, a hook or any
            attribute of a module, as a dropout rate is, unless a buffer holds it.
        train_set, test_set, validation_set: examples; all of them are moved to the device.
        learning_rates: one a model, > 0; usually 1e-4 to 1e-2 for Adam.
        steps: how many updates.
        batch_size: B, examples a step, drawn epoch by epoch without replacement; None takes all in every step.
        optimizer: "adam", "adamw" or "sgd", with PyTorch's constants.
        momentum: of sgd, 0 to below 1.
        weight_decay: >= 0; decoupled for adamw, else added to the gradient. A mapping {regular expression: decay} names
            parameters, as r"body\\.input\\..*"; those that none matches have no decay.
        outer_ratio: the papers' alpha (or gamma): multiplies the rate of the first and the last factor of every
            factored layer; usually 0.01 to 10.
        schedule: "constant", or "cosine" down to zero at the last step.
        warmup: steps over which the rate rises linearly first.
        loss: "cross_entropy", or "squared": half the squared distance, mean over the batch.
        seed: model s draws its batches and dropout with seed + s, or with its own of a sequence; stacked models share
            one stream of dropout, of the first one's seed, from which each gets masks of its own.
        augment: None, or "crop_and_flip": images shifted by up to 4 pixels and mirrored at random.
        evaluate_every: steps between records; a twentieth of all unless given.
        snapshots: steps at which matrices are copied.
        snapshot_of: of which layers (their end-to-end matrix) or parameters, by dotted name; unless given, of the
            models' `penultimate` layer.
        watch: called as watch(step, models) at every record, without gradients, with the S networks as they are, in
            evaluation mode; the values that it returns are kept.
        stacked: True trains all in one pass over stacked parameters, False one by one; "auto" stacks networks without
            convolutions that can be stacked, on a CPU only many tiny ones. Both give the same up to rounding, except
            for dropout's masks.
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
    check_numbers(steps, batch_size, momentum, weight_decay, outer_ratio, warmup, evaluate_every)
    check_names(optimizer, schedule, loss, augment, precision)
    check_examples("train_set", train_set, needed=True)
    for name, examples in (("test_set", test_set), ("validation_set", validation_set)):
        check_examples(name, examples)
    check_choices(stacked, captured, watch)
    check_models(models, learning_rates)
    check_decay(models, weight_decay)
    seeds = seeds_of(seed, len(models))
    check_sets(train_set, batch_size, augment)
    names = snapshot_names(models[0], snapshots, snapshot_of, steps)
    for model in models[1:] if names else ():
        snapshot_names(model, snapshots, names, steps)
    expect("device", device, isinstance(device, str), "auto, cpu or cuda")
    device = devices.resolve_device(device)
    expect_device(device)
    every = max(1, steps // 20) if evaluate_every is None else evaluate_every
    graphs = device != "cpu" if captured == "auto" else bool(captured)
    expect("captured", captured, not graphs or device != "cpu", "False on a CPU")
    with torch.inference_mode(False), torch.enable_grad():  # whatever the caller is in
        own = [copy.deepcopy(model).to(device) for model in models]
        for model in own:
            model.train()
        joined = together(own, stacked, device)
        if device != "cpu" and not joined:
            own = [model.to(memory_format=torch.channels_last) for model in own]  # type: ignore[call-overload]
        dtype = next(own[0].parameters()).dtype
        training, validation, test = (
            part if part is None else part.to(device, dtype) for part in (train_set, validation_set, test_set)
        )
        assert training is not None
        plan = Plan(
            steps,
            batch_size,
            Rule(optimizer, momentum, weight_decay),
            LOSSES[loss],
            outer_ratio,
            _factors(schedule, warmup, steps),
            augment is not None,
            _autocast(precision, device),
            _stretch(every),
        )
        with _own_randomness(device), plan.autocast():
            given = {"train_set": training, "validation_set": validation, "test_set": test}
            check_targets(own[0], loss, given, batch_size)
        with _computing(precision, device), _own_randomness(device), devices.peak_inside(device) as peak:
            parts = [slice(None)] if joined else [slice(index, index + 1) for index in range(len(own))]
            rates = list(map(float, learning_rates))
            runs = [SideBySide(own[part], training, plan, seeds[part], rates[part]) for part in parts]
            graphs = graphs and _capture(runs, captured == "auto")
            records = Records(runs, own, validation, test, names, watch)
            marks = _marks(steps, every, snapshots)
            with progress(steps * len(runs), "networks") as bar:
                _go(runs, records, marks, every, steps, set(snapshots), bar)
            held = peak()
        return records.history(held, rates, joined, graphs)


def _go(
    runs: list[SideBySide], records: Records, marks: list[int], every: int, steps: int, snapshots: set[int], bar: Any
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


def _marks(steps: int, every: int, snapshots: Sequence[int]) -> list[int]:
    return sorted({0, steps, *range(0, steps + 1, every), *snapshots})


def _stretch(every: int) -> int:
    """Steps in one CUDA graph: they fill the time between two records, or most of it and single steps the rest."""
    whole = max(length for length in range(1, LONGEST + 1) if every % length == 0)
    return whole if whole >= LONGEST // 2 else min(LONGEST // 2, every)


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
def _own_randomness(device: str) -> Iterator[None]:
    """Dropout draws from the global generators, which are left as they were."""
    with torch.random.fork_rng([] if device == "cpu" else [torch.device(device).index or 0]):
        yield
