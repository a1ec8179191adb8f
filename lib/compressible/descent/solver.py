"""A descent under way: an engine over the problems still active, and what has been recorded of them."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from compressible.descent.engines.base import Engine, Rate, goes_on
from compressible.descent.engines.choose import choose
from compressible.descent.history import History, raise_if_diverged
from compressible.descent.records import Records
from compressible.recovery.checks import expect_one_batch
from compressible.recovery.factors import Factors
from compressible.recovery.problems import DenseProblem, Problem
from compressible.runtime.progress import Bar


class Solver:
    """One call of `descend`: the engine over the problems still active, and what has been recorded."""

    def __init__(
        self,
        problem: Problem,
        factors: Sequence[Tensor],
        step_size: float | Tensor,
        outer_ratio: float | Tensor,
        decay: float,
        engine: str,
    ) -> None:
        rates = {"step_size": _batch_of(step_size), "outer_ratio": _batch_of(outer_ratio)}
        starts = {f"W_{layer}": tuple(factor.shape[:-2]) for layer, factor in enumerate(factors, 1)}
        self.batch_shape = expect_one_batch({"problem": tuple(problem.batch_shape), **starts, **rates})
        self.size = math.prod(self.batch_shape)
        self.active = torch.arange(self.size, device="cpu")  # whom the engine carries
        self.alive = torch.ones(self.size, dtype=torch.bool, device="cpu")  # and who of them has not stopped
        self.problem = _selected(problem, self.active, self.batch_shape) if self.batch_shape else problem
        flat = [_flatten(factor, self.batch_shape) for factor in factors]
        step_size, outer_ratio = _exact(step_size), _exact(outer_ratio)
        outer = step_size * outer_ratio
        steps = [outer, *[step_size] * (len(flat) - 2), outer]
        self.rates = [_rate(step, self.problem, self.batch_shape) for step in steps]
        self.decay, self.kind, self.step_size = decay, engine, step_size
        self.engine = self._build(flat)
        self.ends = [factor.clone() for factor in self.engine.factors]
        self.records = Records()
        self.stopped = torch.full((self.size,), -1, device="cpu")
        self.iteration = 0
        self.snapshots: dict[int, Factors] = {}

    def start(self, stretch: int, setup_seconds: float) -> None:
        """Compile what has to be compiled for stretches of `stretch` steps, and then start the clock."""
        self.stretch = stretch
        began = time.perf_counter()
        self.engine.prepare(stretch)
        self.setup_seconds = setup_seconds + time.perf_counter() - began
        self.records.begin()

    def run(self, records: list[int], until: int, tolerance: float, bar: Bar) -> None:
        """Go on to iteration `until` with a record at each of the iterations `records`, retiring what stops."""
        while records and len(self.active):
            ahead = records[: self.engine.ahead]
            lengths = [later - sooner for sooner, later in pairwise([self.iteration, *ahead])]
            values, taken = self.engine.run(lengths, tolerance)
            done = len(values) if taken is None else int(taken.max())
            last = self.records.add(ahead[:done], values, taken, self.active)
            going = [goes_on(loss, tolerance) for loss, _ in last.tolist()]
            self.records.clock(lengths[:done])
            bar.update(ahead[done - 1] - self.iteration)
            self.iteration, records = ahead[done - 1], records[done:]
            if not all(going):
                ends = torch.tensor(ahead, device="cpu")[(done if taken is None else taken) - 1]
                self._retire(torch.tensor(going, device="cpu"), ends)
        if self.iteration < until and len(self.active):
            self.engine.advance(until - self.iteration)
            bar.update(until - self.iteration)
            self.iteration = until

    @torch.inference_mode(False)  # what the caller keeps must be able to take part in gradients
    def snapshot(self, iteration: int) -> None:
        """Keep the factors as they are, under `iteration`; NaN for the problems that had stopped before."""
        whole = [torch.full_like(end, math.nan) for end in self.ends]
        if len(self.active):  # where all have stopped the engine still holds the last of them
            self._write(whole, self.alive)
        here = self.stopped == iteration
        if bool(here.any()):
            for factor, end in zip(whole, self.ends, strict=True):
                at = here.to(end.device) if self.batch_shape else ...
                factor[at] = end[at]
        if len(self.active) or bool(here.any()):
            self.snapshots[iteration] = [self._shaped(factor) for factor in whole]

    def finish(self) -> History:
        """Return what is left behind; raises DivergenceError where a loss stopped being finite."""
        if len(self.active):
            self._write(self.ends, self.alive)
            self.stopped[self.active[self.alive]] = self.records.iterations[-1]
        curves = self.records.curves(self.size)
        loss, error = curves.unflatten(1, self.batch_shape) if self.batch_shape else curves[:, 0]
        history = History(
            iterations=torch.tensor(self.records.iterations, device="cpu"),
            loss=loss,
            error=error,
            seconds=torch.tensor(self.records.seconds, dtype=torch.float64, device="cpu"),
            stopped=self.stopped.reshape(self.batch_shape),
            factors=[self._shaped(factor) for factor in self.ends],
            snapshots=self.snapshots,
            setup_seconds=self.setup_seconds,
            engine=self.engine.name,
        )
        raise_if_diverged(history, self.step_size)
        return history

    def _build(self, factors: Sequence[Tensor]) -> Engine:
        return choose(self.kind, self.problem, factors)(self.problem, factors, self.rates, self.decay)

    def _retire(self, going: Tensor, iterations: Tensor) -> None:
        """Keep the end of the problems that stop, at `iterations`, and go on with the others in a smaller stack.

        Where the engine freezes what has stopped, a smaller one is only made when half of the stack has.
        """
        stops = self.alive & ~going
        self._write(self.ends, stops)
        self.stopped[self.active[stops]] = iterations.expand(len(going))[stops]
        self.alive &= going
        keep = self.alive.nonzero()[:, 0]
        if self.engine.freezes and 2 * len(keep) > len(going):
            return
        if len(keep) and self.batch_shape:
            where = keep.to(self.problem.device)
            self.rates = [rate[where] if isinstance(rate, Tensor) else rate for rate in self.rates]
            factors = [factor[where] for factor in self.engine.factors]
            self.problem = _selected(self.problem, keep, (len(going),))
            self.engine = self._build(factors)
            self.engine.prepare(self.stretch)
        self.active, self.alive = self.active[keep], self.alive[keep]

    def _write(self, destination: list[Tensor], which: Tensor) -> None:
        for end, factor in zip(destination, self.engine.factors, strict=True):
            if self.batch_shape:
                end[self.active[which].to(end.device)] = factor[which.to(end.device)]
            elif bool(which.any()):
                end.copy_(factor)

    def _shaped(self, factor: Tensor) -> Tensor:
        return factor.unflatten(0, self.batch_shape) if self.batch_shape else factor


def _selected(problem: Problem, index: Tensor, batch_shape: tuple[int, ...]) -> DenseProblem:
    if not isinstance(problem, DenseProblem):
        got = f"got factors, step_size or outer_ratio of batch shape {batch_shape}"
        raise ValueError(f"problem {type(problem).__name__} takes no stack, {got}, expected ()")
    return problem.select(index, batch_shape)


def _exact(value: float | Tensor) -> float | Tensor:
    """Integers as float64: their products would wrap, and those with a number be rounded to float32."""
    return value.double() if isinstance(value, Tensor) and not value.is_floating_point() else value


def _rate(step: float | Tensor, problem: Problem, batch_shape: tuple[int, ...]) -> Rate:
    """A float where one step size serves the whole stack, else (S, 1, 1) of them."""
    if not isinstance(step, Tensor) or step.ndim == 0:
        return float(step)
    return step.to(dtype=problem.dtype, device=problem.device).expand(batch_shape).reshape(-1, 1, 1)


def _batch_of(value: float | Tensor) -> tuple[int, ...]:
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def _flatten(factor: Tensor, batch_shape: tuple[int, ...]) -> Tensor:
    factor = factor.detach()
    if not batch_shape:
        return factor
    return factor.expand(*batch_shape, *factor.shape[-2:]).reshape(-1, *factor.shape[-2:])
