# Copyright 2026 The Compressible Dynamics authors.
# SPDX-License-Identifier: Apache-2.0
"""How many directions first gradients have: of those that are asked for beyond them, rounding alone would choose.

A batch of B rows of which the loss sees one token each, as of a classifier on the first, gives the last layers'
weights a gradient of rank B at most.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from compressible.runtime.weight_gradients import GradientSink

ROUNDINGS = 4  # what sums leave beside a gradient's rank is about a tenth of a rounding of its largest singular value


class MeasuredSink(GradientSink):
    """Keeps the singular values (R, rank) of the frames, `strengths`, in shares of the largest; as float64."""

    strengths: Tensor | None = None
    rounding: float = 0.0

    def keep(self, total: Tensor) -> None:
        """Take the frames of the gradients (R, m, n), and how strong they are."""
        super().keep(total)
        left, right = (side.double() for side in self.frames or ())
        with torch.autocast(total.device.type, enabled=False):
            values = (left * (total.double() @ right)).sum(-2).abs()
        self.strengths = values / values.amax(-1, keepdim=True)
        self.rounding = torch.finfo(total.dtype).eps

    def lacking(self, run: int, asked: int) -> int | None:
        """Return the rank of a run's gradient, if it is below what is `asked`; None, too, where it is not finite."""
        assert self.strengths is not None
        own = self.strengths[run, :asked].cpu()
        rank = int((own > ROUNDINGS * self.rounding).sum())
        return rank if rank < asked and bool(own.isfinite().all()) else None


def warn_of_rounding(lacking: Mapping[str, tuple[int | None, int]], stacklevel: int) -> None:
    """Warn of layers whose first gradients have a smaller rank than the directions that are asked of them."""
    found: dict[str, Any] = {name: pair for name, pair in lacking.items() if pair[0] is not None}
    if found:
        name = min(found, key=lambda each: found[each][0] - found[each][1])
        rank, asked = found[name]
        more = f", and {len(found) - 1} more layers have too few" if len(found) > 1 else ""
        told = f"the first gradient of {name!r} has rank {rank}, of which r / 2 = {asked} directions are taken{more}"
        todo = "expected a first batch of more rows, or a smaller r"
        warnings.warn(f"{told}: rounding alone chooses the others, {todo}", stacklevel=stacklevel + 1)
