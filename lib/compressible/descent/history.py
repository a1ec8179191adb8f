"""What a descent leaves behind, and the error that carries it when a loss stops being finite."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from compressible.recovery.factors import Factors
from compressible.runtime.checks import expect_number, expect_one_of


@dataclass
class History:
    """What a descent left behind; R records, batch shape (...) of the stack, empty for one problem.

    Args:
        iterations: (R,) at which the records were taken, the start, 0, among them.
        loss: training losses (..., R), NaN after a problem of a stack has stopped.
        error: recovery errors (..., R), likewise.
        seconds: (R,) wall time since the first step, without set-up.
        stopped: (...) the iteration at which each problem ended.
        factors: [W_1, ..., W_L] at that iteration.
        snapshots: {iteration: factors}, NaN for problems that had stopped before.
        setup_seconds: of copies, compilation and the first look.
        engine: the name of the engine that took the steps.

    Example:
        >>> import compressible as cd
        >>> problem = cd.MatrixFactorization(cd.low_rank_target((8, 6), rank=2))
        >>> history = cd.descend(problem, cd.orthogonal_factors((8, 6), scale=0.5), step_size=1.0, steps=100)
        >>> history.iterations.tolist(), history.loss.shape, bool(history.final("error") < history.error[0])
        ([0, 50, 100], torch.Size([3]), True)
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
        below = self._curve(curve) < expect_number("level", level, "a finite number")
        first = self.iterations[below.int().argmax(-1)]
        return torch.where(below.any(-1), first, torch.full_like(first, -1))

    def final(self, curve: str = "error") -> Tensor:
        """Return the last recorded "loss" or "error" (...) of each problem, where it stopped."""
        last = (self.iterations == self.stopped[..., None]).int().argmax(-1, keepdim=True)
        return self._curve(curve).gather(-1, last)[..., 0]

    def _curve(self, name: str) -> Tensor:
        expect_one_of("curve", name, ("loss", "error"), "'loss' or 'error'")
        return getattr(self, name)


class DivergenceError(RuntimeError):
    """A loss that stopped being finite.

    Args:
        iteration: of the record that shows it.
        step_size: of that problem.
        last_loss: the last finite one, NaN if there was none.
        where: which problem of a stack, for the message.
        history: everything up to there; the neighbours in a stack have gone on to their end.

    Example:
        >>> import compressible as cd
        >>> problem = cd.MatrixFactorization(cd.low_rank_target((8, 6), rank=2))
        >>> try:
        ...     cd.descend(problem, cd.orthogonal_factors((8, 6), scale=0.5), step_size=1e3, steps=500)
        ... except cd.DivergenceError as error:
        ...     print(error.step_size, error.last_loss > 0)
        1000.0 True
    """

    def __init__(self, iteration: int, step_size: float, last_loss: float, where: str, history: History) -> None:
        super().__init__(
            f"the loss{where} stopped being finite by iteration {iteration} with step size {step_size:g} "
            f"(last finite loss {last_loss:.6g}); expected a finite loss: lower step_size or outer_ratio"
        )
        self.iteration, self.step_size, self.last_loss, self.history = iteration, step_size, last_loss, history
        self.where = where

    def __reduce__(self) -> tuple[Any, ...]:
        # An exception is pickled as its class and its message unless told otherwise: process pools wait for ever then.
        return type(self), (self.iteration, self.step_size, self.last_loss, self.where, self.history)


def raise_if_diverged(history: History, step_size: float | Tensor) -> None:
    """Raise `DivergenceError` for the first problem to diverge: one whose last record is not finite."""
    batch_shape, losses = history.stopped.shape, history.loss.reshape(-1, len(history.iterations))
    stopped, bad = history.stopped.reshape(-1), ~torch.isfinite(history.final("loss")).reshape(-1)
    if not bool(bad.any()):
        return
    first = int(torch.where(bad, stopped, stopped.max() + 1).argmin())
    finite = losses[first][torch.isfinite(losses[first])]
    where = f" of problem {first} in the stack of {len(losses)}" if batch_shape else ""
    step = torch.as_tensor(step_size, dtype=torch.float64, device="cpu").expand(batch_shape).reshape(-1)[first].item()
    raise DivergenceError(int(stopped[first]), step, finite[-1].item() if len(finite) else math.nan, where, history)
