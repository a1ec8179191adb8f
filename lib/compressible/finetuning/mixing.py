"""Whether a model gives each row what it would give it alone, whatever rows stand beside it and how far it is padded.

Attention without a mask, Fourier mixing, convolutions over time and means over all tokens read the padding, which in a
pass of many runs is that of the longest of all their rows; some layers compute across rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compressible.finetuning.batches import LENGTHS, DeviceRows, RunsMixError
from compressible.finetuning.dropout.per_run import PerRunDropout
from compressible.finetuning.losses import first_output
from compressible.finetuning.peft_models import sharing
from compressible.finetuning.stacked_pass import StackedPass
from compressible.runtime.devices import matmul_precision

# Shares of the largest output: what rounding makes, of softmaxes in float32, too, when kernels change with the shape.
NOISE = {torch.float64: 1e-6, torch.float32: 1e-4}
HALF = 5e-2
EACH = 2  # rows a run of the trial


class Trial:
    """The model itself, without adapters, in a pass of two runs with a few rows."""

    def __init__(self, stacked: StackedPass) -> None:
        self.stacked, self.rows = stacked, stacked.train_rows
        self.model = sharing(stacked.source).train(stacked.dropout)
        self.count, self.multiple = len(self.rows.labels), LENGTHS[stacked.device.type]
        self.noise = NOISE.get(next(stacked.source.parameters()).dtype, HALF)

    def check(self) -> None:
        """Raise RunsMixError where the outputs of a row are not its own alone."""
        kind = type(self.stacked.source).__name__
        if self.neighbours_matter():
            raise RunsMixError(f"{kind} computes across the rows of a batch")
        if self.padding_matters():
            raise RunsMixError(f"{kind} reads the padding, which is that of the longest row of all runs")

    def neighbours_matter(self) -> bool:
        """Whether the outputs of one run's rows change with the rows of the other."""
        four = torch.arange(4 * EACH) % self.count
        tokens, labels = self.rows.batch(four, self.multiple)
        a, b, c, d = torch.arange(4 * EACH, device=labels.device).split(EACH)
        first, kept, moved = (self.outputs(tokens, labels, torch.cat(pair)) for pair in ((a, b), (a, c), (d, b)))
        return self.differ(first[:EACH], kept[:EACH]) or self.differ(first[EACH:], moved[EACH:])

    def padding_matters(self) -> bool:
        """Whether the outputs of a row change when it is padded as far as the longest."""
        parts = (self.rows, self.multiple), (self.stacked.validation_rows, LENGTHS["cpu"])
        return any(self._padding_matters(*part) for part in parts)

    def _padding_matters(self, rows: DeviceRows, multiple: int) -> bool:
        if rows.lengths is None or not len(rows.lengths):
            return False
        own = (rows.lengths + multiple - 1) // multiple * multiple
        spare = torch.where(own < own.max(), own - rows.lengths, multiple)
        fullest = spare.argmin()  # it has the least padding between its tokens and the end, which convolutions see
        if spare[fullest] == multiple:
            return False
        pair = fullest.repeat(2 * EACH)
        short, padded = rows.batch(pair, multiple), rows.batch(pair, multiple, int(own.max()))
        every = torch.arange(2 * EACH, device=short[1].device)
        return self.differ(self.outputs(*short, every), self.outputs(*padded, every))

    @torch.no_grad()
    def outputs(self, tokens: dict[str, Tensor], labels: Tensor, rows: Tensor) -> Tensor:
        """What the model makes of these of the rows, which are those of two runs, in full precision."""
        chosen = {name: value[rows] for name, value in tokens.items()}
        with matmul_precision("float32"), PerRunDropout([0, 1], self.stacked.step):
            return first_output(self.model(**self.stacked.inputs(chosen, labels[rows]))).double()

    def differ(self, one: Tensor, other: Tensor) -> bool:
        """Whether outputs (P, ...) differ by more than rounding makes; their shapes, where tokens have outputs."""
        if one.shape != other.shape:
            return True
        return bool((one - other).abs().max() > self.noise * one.abs().max())
