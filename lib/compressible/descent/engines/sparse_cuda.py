"""Sparse completion on a CUDA device: a Triton program a line, stretches replayed as CUDA graphs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from compressible.descent.engines.base import Rate
from compressible.descent.engines.cuda_graphs import RewindingEngine
from compressible.descent.engines.sparse_lines import Scales, SparseLines
from compressible.recovery.sparse import Side, SparseCompletion


class SparseCuda(RewindingEngine, SparseLines):
    """`SparseLines` by the Triton kernel of triton_sparse_kernels.py."""

    name = "sparse_cuda"
    blocks = {"BE": 32, "num_warps": 2}  # noqa: RUF012

    def __init__(
        self, problem: SparseCompletion, factors: Sequence[Tensor], rates: Sequence[Rate], decay: float
    ) -> None:
        self._scales: dict[Scales, Tensor] = {}
        SparseLines.__init__(self, problem, factors, rates, decay)
        start = [part.clone() for part in self.state]
        SparseLines.advance(self, 1)  # compiles, and cuBLAS makes its workspaces before they would be captured
        torch._foreach_copy_(self.state, start)

    def _take(self, steps: int) -> None:
        SparseLines.advance(self, steps)

    def _update(self, side: Side, own: Tensor, other: Tensor, out: Tensor, scales: Scales) -> None:
        self._launch(side, own, other, out, own, scales, measure=False)

    def _measure(self, side: Side, own: Tensor, other: Tensor, sums: Tensor) -> None:
        self._launch(side, own, other, own, sums, (0.0, 0.0), measure=True)

    def _launch(
        self, side: Side, own: Tensor, other: Tensor, out: Tensor, sums: Tensor, scales: Scales, measure: bool
    ) -> None:
        from compressible.descent.engines.triton_sparse_kernels import line_pass

        if scales not in self._scales:  # on the device, since Triton rounds numbers passed by value to float32
            self._scales[scales] = torch.tensor(scales, dtype=own.dtype, device=self.device)
        arrays, width = (side.pointers, side.indices, side.values, own, other, out, sums), own.shape[1]
        sizes = {"BK": max(16, 1 << (width - 1).bit_length()), "MEASURE": measure, **self.blocks}
        line_pass[(len(own),)](*arrays, self._scales[scales], width, **sizes)
