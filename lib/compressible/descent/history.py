"""What a descent leaves behind, and the error that carries it when a loss stops being finite."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from compressible.recovery.factors import Factors


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
