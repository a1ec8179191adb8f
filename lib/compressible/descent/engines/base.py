"""The engine contract: how a stretch of gradient steps is carried out.

One step of every engine is plain gradient descent, with E = dLoss/dX at X = W_L ... W_1:
    W_l <- (1 - rate_l lambda) W_l - rate_l (W_L ... W_{l+1})^T E (W_{l-1} ... W_1)^T.
An engine owns copies of the factors. A new one is a class in a file of its own and an entry in choose.py.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

from compressible.recovery.problems import MatrixCompletion, MatrixFactorization

Rate = float | Tensor  # one step size, or (S, 1, 1) of them for a stack
Entrywise = MatrixCompletion | MatrixFactorization  # problems whose loss is a sum over the entries of X


class Engine(ABC):
    """What `descend` asks of an engine: `factors`, `advance`, `evaluate`, and from them `run`.

    `name` is what `descend` calls it. `ahead` is how many records a call of `run` may be given. It returns losses and
    errors (R, S, 2) of the records taken and how many each problem took (S,), None for all R. An engine returns at the
    first record at which a problem stops, unless it `freezes`: then each problem stops at its own and stays as it is
    there.
    """

    name: ClassVar[str] = ""
    ahead = 1
    freezes = False
    factors: list[Tensor]  # the current ones; engines that pack them compute it, which mypy takes for an override

    @abstractmethod
    def __init__(self, problem: Any, factors: Sequence[Tensor], rates: Sequence[Rate], decay: float) -> None:
        """Copy the factors, (..., w_l, w_{l-1}), of a problem of the kind that the engine takes."""

    @abstractmethod
    def advance(self, steps: int) -> None:
        """Take `steps` gradient steps."""

    @abstractmethod
    def evaluate(self) -> Tensor:
        """Return loss and error as (..., 2) at the current iterate."""

    def prepare(self, steps: int) -> None:
        """Compile what stretches of `steps` need, before the clock starts."""
        self.advance(0)

    def run(self, lengths: Sequence[int], tolerance: float) -> tuple[Tensor, Tensor | None]:
        """Take stretches of `lengths` steps with a record after each; see the class."""
        (length,) = lengths
        self.advance(length)
        return self.evaluate().reshape(1, -1, 2), None


def goes_on(loss: float, tolerance: float) -> bool:
    """Whether a problem whose record reads `loss` continues: finite and not below the tolerance."""
    return math.isfinite(loss) and loss >= tolerance
