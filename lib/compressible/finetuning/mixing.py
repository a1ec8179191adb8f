"""Whether a model gives each row what it would give it alone, whatever rows stand beside it and how far it is padded.

Attention without a mask, Fourier mixing, convolutions over time and means over all tokens read the padding, which in a
pass of many runs is that of the longest of all their rows; some layers compute across rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compressible.data.examples import IGNORED
from compressible.finetuning.batches import LENGTHS, DeviceRows, RunsMixError
from compressible.finetuning.causal import Words, goes_on
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
        self.words = None if stacked.words is None else Words()
        if self.words is not None and stacked.words is not None and stacked.words.layer is not None:
            self.words.pass_over(self.model)  # as the pass does
        self.noise = NOISE.get(next(stacked.source.parameters()).dtype, HALF)

    @torch.no_grad()
    def settle(self) -> None:
        """Find how the pass is to read a causal language model, and let it."""
        words, passed = self.words, self.stacked.words
        assert words is not None and passed is not None
        self.model.eval()
        words.pass_over(self.model)
        tokens, _ = self.rows.batch(torch.zeros(EACH, dtype=torch.int64), self.multiple)
        if words.layer is not None and goes_on(self.model, words, words.inputs(self.model, tokens)):
            words.put_back()
        elif words.layer is not None:
            passed.pass_over(self.stacked.model)
        parts = self.rows, self.stacked.validation_rows
        passed.masked = any(self._mask_matters(part, words) for part in parts)

    def _mask_matters(self, rows: DeviceRows, words: Words) -> bool:
        """Whether outputs change without the mask, by a pair of rows of which one is padded most."""
        if rows.lengths is None or not len(rows.lengths):
            return False
        tokens, labels = rows.batch(torch.stack((rows.lengths.argmin(), rows.lengths.argmax())), self.multiple)
        found = []
        for words.masked in (True, False):
            with matmul_precision("float32"):
                states = words.read(self.model, words.inputs(self.model, tokens), labels)
            found.append(states.double() * (labels[..., 1:] != IGNORED))
        return self.differ(*found)

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
            given = self.stacked.inputs(chosen, labels[rows])
            if self.words is not None:
                return self.words.read(self.model, given, labels[rows]).double()
            return first_output(self.model(**given)).double()

    def differ(self, one: Tensor, other: Tensor) -> bool:
        """Whether outputs (P, ...) differ by more than rounding makes; their shapes, where tokens have outputs."""
        if one.shape != other.shape:
            return True
        return one.numel() > 0 and bool((one - other).abs().max() > self.noise * one.abs().max())
