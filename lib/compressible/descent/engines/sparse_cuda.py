"""compressible.descent.engines.sparse_cuda"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from compressible.descent.engines.base import Rate
from compressible.descent.engines.cuda_graphs import Kept
from compressible.descent.engines.sparse_numba import Sampled, Scales
from compressible.recovery.sparse import Side, SparseCompletion


class SampledCuda(Kept, Sampled):
    """`Sampled` on a CUDA device: a Triton program a line, stretches replayed as graphs."""

    blocks = {"BE": 32, "num_warps": 2}  # noqa: RUF012

    def __init__(
        self, problem: SparseCompletion, factors: Sequence[Tensor], rates: Sequence[Rate], decay: float
    ) -> None:
        self._scales: dict[tuple[float, float], Tensor] = {}
        Sampled.__init__(self, problem, factors, rates, decay)
        start = [part.clone() for part in self.state]
        Sampled.advance(self, 1)  # compiles, and cuBLAS makes its workspaces before they would be captured
        torch._foreach_copy_(self.state, start)

    def _take(self, steps: int) -> None:
        Sampled.advance(self, steps)

    def evaluate(self) -> Tensor:
        """Return loss and error as (2,) at the current iterate."""
        return Sampled.evaluate(self)

    def _lines(
        self, side: Side, own: Tensor, other: Tensor, out: Tensor | None, scales: Scales, sums: Tensor | None
    ) -> None:
        from compressible.descent.engines.triton_sparse_kernels import line_pass

        width = own.shape[1]
        if scales not in self._scales:  # on the device, since Triton rounds numbers passed by value to float32
            self._scales[scales] = torch.tensor(scales, dtype=own.dtype, device=self.device)
        line_pass[(len(own),)](
            side.pointers, side.indices, side.values, own, other, own if out is None else out,
            own if sums is None else sums, self._scales[scales], width, BK=max(16, 1 << (width - 1).bit_length()),
            MEASURE=sums is not None, **self.blocks,
        )  # fmt: skip
