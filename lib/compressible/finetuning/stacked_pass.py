"""forward, losses, scores of S runs"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import Tensor, nn

from compressible.finetuning.run import FineTuningRun
from compressible.finetuning.stacked.layers import stacked_adapters
from compressible.runtime.devices import matmul_precision

EVALUATION_ROWS = 4096  # sequences of all runs together in one pass of an evaluation


@dataclass(frozen=True)
class Snapshot:
    """What `watch` gets: the step, and the updates of the S runs of this pass layer by layer."""

    step: int
    runs: list[FineTuningRun]
    _model: nn.Module = field(repr=False)

    def updates(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the layer's name and its runs' updates (S, m, n), in full float32 whatever the precision."""
        for name, adapter in stacked_adapters(self._model).items():
            with matmul_precision("float32"):
                updates = adapter.updates()
            yield name, updates
