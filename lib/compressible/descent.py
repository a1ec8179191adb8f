"""Gradient descent on a deep factorization, with an outer-factor step ratio (P1 gamma, P2 alpha).

`descend` walks from event to event (records, snapshots); an engine (engines.py) takes the steps in between.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from .engines import choose, few_threads
from .factors import Factors, check_factors
from .problems import Problem
from .progress import progress


@dataclass
class History:
    """What a descent left behind; R records, batch shape (...) of the stack (empty for one problem).

    iterations (R,) int; loss and error (..., R) on the CPU, NaN after a problem of a stack has stopped;
    seconds (R,) wall time since the first step, without set-up; stopped (...) the iteration at which each problem
    ended; factors [W_1, ..., W_L] at that iteration; snapshots {iteration: factors},
    NaN for problems that had stopped before; setup_seconds; engine, its name.
    """

    iterations: Tensor
    loss: Tensor
    error: Tensor
    seconds: Tensor
    stopped: Tensor
    factors: Factors
    snapshots: dict[int, Factors] = field(default_factory=dict)
    setup_seconds: float = 0.0
    engine: str = ""

    def iterations_to(self, level: float, curve: str = "error") -> Tensor:
        """Return the first recorded iteration (...) at which the "loss" or "error" is below `level`; -1 if never."""
        below = getattr(self, curve) < level
        first = self.iterations[below.int().argmax(-1)]
        return torch.where(below.any(-1), first, torch.full_like(first, -1))

    def final(self, curve: str = "error") -> Tensor:
        """Return the last recorded "loss" or "error" (...) of each problem, where it stopped."""
        last = (self.iterations == self.stopped[..., None]).int().argmax(-1, keepdim=True)
        return getattr(self, curve).gather(-1, last)[..., 0]

    def as_arrays(self, prefix: str = "") -> dict[str, np.ndarray]:
        """Return the curves as numpy arrays, keys "<prefix>iterations", "<prefix>loss", ..., for a run's result."""
        names = ("iterations", "loss", "error", "seconds", "stopped")
        return {f"{prefix}{name}": np.atleast_1d(getattr(self, name).numpy()) for name in names}


class DivergenceError(RuntimeError):
    """A loss that stopped being finite; `history` holds everything up to there."""

    def __init__(self, iteration: int, step_size: float, last_loss: float, where: str, history: History) -> None:
        super().__init__(
            f"the loss{where} stopped being finite by iteration {iteration} with step size {step_size:g} "
            f"(last finite loss {last_loss:.6g}); expected a finite loss: lower step_size or outer_ratio"
        )
        self.iteration, self.step_size, self.last_loss, self.history = iteration, step_size, last_loss, history


def descend(
    problem: Problem,
    factors: Sequence[Tensor],
    step_size: float | Tensor,
    steps: int,
    outer_ratio: float | Tensor = 1.0,
    weight_decay: float = 0.0,
    record_every: int = 50,
    tolerance: float = 0.0,
    snapshots: Iterable[int] = (),
    engine: str = "auto",
    show_progress: bool | None = None,
) -> History:
    """Run gradient descent from `factors` and return its `History`; inputs are never modified.

    Inner factors take steps of `step_size` (> 0), the first and last of outer_ratio * step_size (>= 0; P1's gamma,
    usually .01, or P2's alpha, 1 to 10); both may be tensors of the batch shape, one value per problem. Losses are
    recorded at 0, every `record_every` iterations and at the end; a problem stops at the first record whose training
    loss is below `tolerance`. `snapshots` are iterations whose factors are kept. Raises ValueError on impossible
    arguments and DivergenceError where a loss stops being finite; in a stack the neighbours go on to their end first.
    """
    began = time.perf_counter()
    wanted = _check(problem, factors, step_size, steps, outer_ratio, weight_decay, record_every, tolerance, snapshots)
    run = _Run(problem, factors, step_size, outer_ratio, weight_decay, engine)
    stops = sorted({*range(0, steps + 1, record_every), steps, *wanted})
    run.start(time.perf_counter() - began)
    bar = progress(steps, "descent", enabled=show_progress)
    with bar, torch.inference_mode(), few_threads(problem, run.size):  # entered once: each costs microseconds
        for previous, iteration in zip([0, *stops[:-1]], stops, strict=True):
            run.engine.advance(iteration - previous)
            bar.update(iteration - previous)
            if iteration in wanted:
                run.snapshot(iteration)
            if iteration % record_every == 0 or iteration == steps:
                run.record(iteration, tolerance)
                if not len(run.active):
                    break
    return run.finish()


class _Run:
    """One call of `descend`: the engine over the problems still active, and what has been recorded."""

    def __init__(self, problem, factors, step_size, outer_ratio, decay, engine) -> None:
        shapes = [problem.batch_shape, *(f.shape[:-2] for f in factors), _shape(step_size), _shape(outer_ratio)]
        self.batch_shape = tuple(torch.broadcast_shapes(*shapes))
        self.size = math.prod(self.batch_shape)
        self.active = torch.arange(self.size)
        self.problem = problem.select(self.active, self.batch_shape) if self.batch_shape else problem
        flat = [_flatten(factor, self.batch_shape) for factor in factors]
        self.rates, self.decay, self.kind = self._rates(step_size, outer_ratio, len(flat)), decay, engine
        self.engine = self._build(self.problem, flat, self.rates)
        self.ends = [factor.clone() for factor in self.engine.factors]
        self.records: list[tuple[int, Tensor, Tensor]] = []  # iteration, (active, 2) loss and error, whose
        self.times: list[float] = []
        self.stopped = torch.zeros(self.size, dtype=torch.int64)
        self.snapshots: dict[int, Factors] = {}
        self.step_size = step_size

    def start(self, setup_seconds: float) -> None:
        self.engine.advance(0)  # compiles what has to be compiled, outside the clock
        self.setup_seconds = setup_seconds
        self._began = time.perf_counter()

    def record(self, iteration: int, tolerance: float) -> None:
        values = self.engine.evaluate().reshape(-1, 2)
        self.records.append((iteration, values, self.active))
        going = [math.isfinite(loss) and loss >= tolerance for loss, _ in values.tolist()]
        self.times.append(time.perf_counter() - self._began)
        if not all(going):
            self._retire(torch.tensor(going), iteration)

    @torch.inference_mode(False)  # what the caller keeps must be able to take part in gradients
    def snapshot(self, iteration: int) -> None:
        whole = [torch.full_like(end, math.nan) for end in self.ends]
        self._write(whole, torch.ones(len(self.active), dtype=torch.bool))
        self.snapshots[iteration] = [self._shaped(factor) for factor in whole]

    def finish(self) -> History:
        if len(self.active):
            self._write(self.ends, torch.ones(len(self.active), dtype=torch.bool))
            self.stopped[self.active] = self.records[-1][0]
        curves = torch.full((2, self.size, len(self.records)), math.nan, dtype=torch.float64)
        for column, (_, values, members) in enumerate(self.records):
            curves[:, members, column] = values.mT.to("cpu", torch.float64)
        loss, error = curves.unflatten(1, self.batch_shape) if self.batch_shape else curves[:, 0]
        history = History(
            iterations=torch.tensor([record[0] for record in self.records]),
            loss=loss,
            error=error,
            seconds=torch.tensor(self.times, dtype=torch.float64),
            stopped=self.stopped.reshape(self.batch_shape),
            factors=[self._shaped(factor) for factor in self.ends],
            snapshots=self.snapshots,
            setup_seconds=self.setup_seconds,
            engine=type(self.engine).__name__.lower(),
        )
        self._raise_if_diverged(history, curves[0])
        return history

    def _build(self, problem: Problem, factors: list[Tensor], rates: list):
        return choose(self.kind, problem, stacked=self.size > 1)(problem, factors, rates, self.decay)

    def _rates(self, step_size, outer_ratio, depth: int) -> list:
        """Step sizes of the layers: floats where one serves the whole stack, else (S, 1, 1) tensors."""
        inner, outer = step_size, step_size * outer_ratio
        ends = [outer, *[inner] * (depth - 2), outer]
        return [self._rate(value) for value in ends]

    def _rate(self, value: float | Tensor) -> float | Tensor:
        if not isinstance(value, Tensor) or value.ndim == 0:
            return float(value)
        like = {"dtype": self.problem.dtype, "device": self.problem.device}
        return value.to(**like).expand(self.batch_shape).reshape(-1, 1, 1)

    def _retire(self, going: Tensor, iteration: int) -> None:
        """Keep the end of the problems that stop here and go on with the others in a smaller stack."""
        self._write(self.ends, ~going)
        self.stopped[self.active[~going]] = iteration
        keep = going.nonzero()[:, 0]
        if len(keep) and self.batch_shape:
            where = keep.to(self.problem.device)
            rates = [rate[where] if isinstance(rate, Tensor) else rate for rate in self.rates]
            factors = [factor[where] for factor in self.engine.factors]
            self.problem, self.rates = self.problem.select(keep, (len(going),)), rates
            self.engine = self._build(self.problem, factors, rates)
        self.active = self.active[keep]

    def _write(self, destination: list[Tensor], which: Tensor) -> None:
        for end, factor in zip(destination, self.engine.factors, strict=True):
            if self.batch_shape:
                end[self.active[which].to(end.device)] = factor[which.to(end.device)]
            elif bool(which.any()):
                end.copy_(factor)

    def _shaped(self, factor: Tensor) -> Tensor:
        return factor.unflatten(0, self.batch_shape) if self.batch_shape else factor

    def _raise_if_diverged(self, history: History, losses: Tensor) -> None:
        """Losses (S, R) with NaN after the stop: a problem diverged if its last record is not finite."""
        last = (history.iterations == self.stopped[:, None]).int().argmax(-1)
        bad = ~torch.isfinite(losses[torch.arange(self.size), last])
        if not bool(bad.any()):
            return
        first = int(torch.where(bad, self.stopped, self.stopped.max() + 1).argmin())
        finite = losses[first][torch.isfinite(losses[first])]
        where = f" of problem {first} in the stack of {self.size}" if self.batch_shape else ""
        step = torch.as_tensor(self.step_size, dtype=torch.float64).expand(self.batch_shape).reshape(-1)[first].item()
        reached = finite[-1].item() if len(finite) else math.nan
        raise DivergenceError(int(self.stopped[first]), step, reached, where, history)


def _check(problem, factors, step_size, steps, outer_ratio, weight_decay, record_every, tolerance, snapshots):
    check_factors(factors, problem.shape)
    kind = (factors[0].dtype, factors[0].device)
    if kind != (problem.dtype, problem.device):
        raise ValueError(f"factors are {kind}, expected the problem's {(problem.dtype, problem.device)}")
    _check_number("step_size", step_size, exclusive=True)
    _check_number("outer_ratio", outer_ratio)
    _check_number("weight_decay", weight_decay)
    _check_number("tolerance", tolerance)
    for name, value, least in (("steps", steps, 0), ("record_every", record_every, 1)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name} is {value!r}, expected an integer >= {least}")
    wanted = {int(iteration) for iteration in snapshots}
    if any(not 0 <= iteration <= steps for iteration in wanted):
        raise ValueError(f"snapshots are {sorted(wanted)}, expected iterations from 0 to steps = {steps}")
    return wanted


def _check_number(name: str, value: float | Tensor, exclusive: bool = False) -> None:
    tensor = torch.as_tensor(value, dtype=torch.float64)
    if not bool(torch.isfinite(tensor).all()) or bool((tensor < 0).any()) or (exclusive and bool((tensor == 0).any())):
        raise ValueError(f"{name} is {value}, expected finite {'> 0' if exclusive else '>= 0'}")


def _shape(value: float | Tensor) -> tuple[int, ...]:
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def _flatten(factor: Tensor, batch_shape: tuple[int, ...]) -> Tensor:
    factor = factor.detach()
    if not batch_shape:
        return factor
    return factor.expand(*batch_shape, *factor.shape[-2:]).reshape(-1, *factor.shape[-2:])
