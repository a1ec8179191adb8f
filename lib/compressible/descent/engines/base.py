"""the engine contract"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

Rate = float | Tensor  # one step size, or (S, 1, 1) of them for a stack


class Stepping:
    """What `descend` asks of an engine: `advance`, `evaluate`, and from them `walk`.

    `ahead` is how many records a call of `walk` may be given. It returns losses and errors (R, S, 2) of the records
    taken and how many each problem took (S,), None for all R. An engine returns at the first record at which a problem
    stops, unless it `freezes`: then each problem stops at its own and stays as it is there.
    """

    ahead = 1
    freezes = False

    def prepare(self, steps: int) -> None:
        """Compile what stretches of `steps` need, before the clock starts."""
        self.advance(0)

    def advance(self, steps: int) -> None:
        """Take `steps` gradient steps."""
        raise NotImplementedError

    def evaluate(self) -> Tensor:
        """Return loss and error as (..., 2) at the current iterate."""
        raise NotImplementedError

    def walk(self, lengths: Sequence[int], tolerance: float) -> tuple[Tensor, Tensor | None]:
        """Take stretches of `lengths` steps with a record after each; see the class."""
        (length,) = lengths
        self.advance(length)
        return self.evaluate().reshape(1, -1, 2), None


def goes_on(loss: float, tolerance: float) -> bool:
    """Whether a problem whose record reads `loss` continues: finite and not below the tolerance."""
    return math.isfinite(loss) and loss >= tolerance
