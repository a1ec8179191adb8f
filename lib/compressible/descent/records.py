"""The records of a descent while it is under way: losses and errors of the problems still active, and the time."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor


class Records:
    """What was recorded so far, and when; the clock starts with `begin`."""

    def __init__(self) -> None:
        self.iterations: list[int] = []
        self.seconds: list[float] = []
        self._values: list[Tensor] = []  # (active, 2) loss and error
        self._members: list[Tensor] = []  # of which problems

    def begin(self) -> None:
        """Start the clock."""
        self._began = time.perf_counter()

    def add(self, iterations: Sequence[int], values: Tensor, taken: Tensor | None, members: Tensor) -> Tensor:
        """Keep the records (R, S, 2) that were taken, and return the last of each problem, (S, 2)."""
        for row, iteration in enumerate(iterations):
            self.iterations.append(iteration)
            self._values.append(values[row] if taken is None else values[row][taken > row])
            self._members.append(members if taken is None else members[taken > row])
        return values[-1] if taken is None else values[taken - 1, torch.arange(len(taken), device="cpu")]

    def clock(self, lengths: Sequence[int]) -> None:
        """Note the time of the records just taken; where one call took several, it went evenly over their steps."""
        now, total = time.perf_counter() - self._began, sum(lengths)
        before = self.seconds[-1] if self.seconds else 0.0
        shares = [now - before] if not total else [(now - before) * length / total for length in lengths]
        self.seconds.extend(before + share for share in accumulate(shares))

    def curves(self, size: int) -> Tensor:
        """Return losses and errors (2, size, R) on the CPU, NaN where a problem of the stack was no longer active."""
        curves = torch.full((2, size, len(self.iterations)), math.nan, dtype=torch.float64, device="cpu")
        for column, (values, members) in enumerate(zip(self._values, self._members, strict=True)):
            curves[:, members, column] = values.mT.to("cpu", torch.float64)
        return curves
