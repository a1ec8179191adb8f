"""A descent under way: an engine over the problems still active, and what has been recorded of them."""

from __future__ import annotations

import math
import time
from itertools import accumulate, pairwise

import torch
from torch import Tensor
from tqdm import tqdm

from compressible.descent.engines.base import goes_on
from compressible.descent.engines.choose import choose
from compressible.descent.history import DivergenceError, History
from compressible.recovery.factors import Factors
from compressible.recovery.problems import Problem


class Walk:
    """One call of `descend`: the engine over the problems still active, and what has been recorded."""

    def __init__(self, problem, factors, step_size, outer_ratio, decay, engine) -> None:
        shapes = [problem.batch_shape, *(f.shape[:-2] for f in factors), batch_of(step_size), batch_of(outer_ratio)]
        self.batch_shape = tuple(torch.broadcast_shapes(*shapes))
        self.size = math.prod(self.batch_shape)
        self.active = torch.arange(self.size)  # whom the engine carries
        self.alive = torch.ones(self.size, dtype=torch.bool)  # and who of them has not stopped
        self.problem = problem.select(self.active, self.batch_shape) if self.batch_shape else problem
        flat = [_flatten(factor, self.batch_shape) for factor in factors]
        self.rates, self.decay, self.kind = self._rates(step_size, outer_ratio, len(flat)), decay, engine
        self.engine = self._build(self.problem, flat, self.rates)
        self.ends = [factor.clone() for factor in self.engine.factors]
        self.records: list[tuple[int, Tensor, Tensor]] = []  # iteration, (active, 2) loss and error, whose
        self.times: list[float] = []
        self.stopped = torch.full((self.size,), -1)
        self.iteration = 0
        self.snapshots: dict[int, Factors] = {}
        self.step_size = step_size

    def start(self, stretch: int, setup_seconds: float) -> None:
        self.stretch = stretch
        began = time.perf_counter()
        self.engine.prepare(stretch)  # compiles what has to be compiled, outside the clock
        self.setup_seconds = setup_seconds + time.perf_counter() - began
        self._began = time.perf_counter()

    def walk(self, records: list[int], until: int, tolerance: float, bar: tqdm) -> None:
        """Go on to iteration `until` with a record at each of the iterations `records`, retiring what stops."""
        while records and len(self.active):
            ahead = records[: self.engine.ahead]
            lengths = [later - sooner for sooner, later in pairwise([self.iteration, *ahead])]
            values, taken = self.engine.walk(lengths, tolerance)
            done = len(values) if taken is None else int(taken.max())
            going = self._note(ahead[:done], values, taken, tolerance)
            self._clock(lengths[:done])
            bar.update(ahead[done - 1] - self.iteration)
            self.iteration, records = ahead[done - 1], records[done:]
            if not all(going):
                self._retire(torch.tensor(going), torch.tensor(ahead)[(done if taken is None else taken) - 1])
        if self.iteration < until and len(self.active):
            self.engine.advance(until - self.iteration)
            bar.update(until - self.iteration)
            self.iteration = until

    @torch.inference_mode(False)  # what the caller keeps must be able to take part in gradients
    def snapshot(self, iteration: int) -> None:
        whole = [torch.full_like(end, math.nan) for end in self.ends]
        self._write(whole, self.alive)
        here = self.stopped == iteration
        if bool(here.any()):
            for factor, end in zip(whole, self.ends, strict=True):
                at = here.to(end.device) if self.batch_shape else ...
                factor[at] = end[at]
        if len(self.active) or bool(here.any()):
            self.snapshots[iteration] = [self._shaped(factor) for factor in whole]

    def finish(self) -> History:
        if len(self.active):
            self._write(self.ends, self.alive)
            self.stopped[self.active[self.alive]] = self.records[-1][0]
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
        return choose(self.kind, problem, factors)(problem, factors, rates, self.decay)

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

    def _note(self, iterations: list[int], values: Tensor, taken: Tensor | None, tolerance: float) -> list[bool]:
        """Keep the records (R, S, 2) that were taken, and tell which problems go on after their last."""
        for row, iteration in enumerate(iterations):
            if taken is None:
                self.records.append((iteration, values[row], self.active))
            else:
                self.records.append((iteration, values[row][taken > row], self.active[taken > row]))
        last = values[-1] if taken is None else values[taken - 1, torch.arange(len(taken))]
        return [goes_on(loss, tolerance) for loss, _ in last.tolist()]

    def _clock(self, lengths: list[int]) -> None:
        """Seconds of the records just taken; where one call took several, time went evenly over their steps."""
        now, total = time.perf_counter() - self._began, sum(lengths)
        before = self.times[-1] if self.times else 0.0
        shares = [now - before] if not total else [(now - before) * length / total for length in lengths]
        self.times.extend(before + share for share in accumulate(shares))

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
            rates = [rate[where] if isinstance(rate, Tensor) else rate for rate in self.rates]
            factors = [factor[where] for factor in self.engine.factors]
            self.problem, self.rates = self.problem.select(keep, (len(going),)), rates
            self.engine = self._build(self.problem, factors, rates)
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


def batch_of(value: float | Tensor) -> tuple[int, ...]:
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def _flatten(factor: Tensor, batch_shape: tuple[int, ...]) -> Tensor:
    factor = factor.detach()
    if not batch_shape:
        return factor
    return factor.expand(*batch_shape, *factor.shape[-2:]).reshape(-1, *factor.shape[-2:])
