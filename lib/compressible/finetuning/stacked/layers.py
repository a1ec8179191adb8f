"""Adapters and heads of S runs side by side on one frozen layer: factors (S, ., .), batches (S * B, ...) run by run.

Runs whose chains have the same number of factors are stacked into one chain, padded with zeros to the largest width,
which is exact: padded rows and columns get zero gradients. Every chain contracts, once a step, to an input and an
output factor of one size, so that LoRA, thin and compressed runs meet the tokens in the same two batched products.
Where the width is too large for that to pay (the full variant) the update is formed and added to the weight instead.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import register_flop_formula

from compressible.finetuning.batches import PassRows
from compressible.runtime.chain import product

Layer = Any  # nn.Linear, nn.Embedding or transformers' Conv1D: a module with a weight
Chain = list[Tensor]  # [W_1 (k, n), ..., W_L (m, k)] of one run


class StackedAdapter(nn.Module):
    """A frozen layer with the updates of S runs; takes (S * B, ..., n) run by run, ValueError where not `rows` of them.

    scalings (S,) multiply the updates; dropout is the share of inputs that is dropped. Its factors lie in a
    `ChainGroups`, which sets `source`, a function that gives them by span of runs (S', ., .), and `taken_off`, one that
    gives the frozen pairs A_0, B_0 of starts that come off the weight, or None.
    """

    base: Layer
    source: Callable[[], list[Chain]]
    taken_off: Callable[[], list[Chain | None]]

    def __init__(self, base: Layer, scalings: Sequence[float], rows: PassRows, dropout: float = 0.0) -> None:
        super().__init__()
        self.rows, self.rate = rows, dropout
        self.base, self.runs = base, len(scalings)
        self.embedding = isinstance(base, nn.Embedding)
        self.turned = self.embedding or type(base).__name__ == "Conv1D"  # whose weight is (n, m)
        rows_of_it, columns = base.weight.shape
        self.shape = (columns, rows_of_it) if self.turned else (rows_of_it, columns)
        self.spans: list[tuple[int, int]] = []
        self.widths: list[int] = []
        self.multiples = list(scalings)
        self.scalings: list[Tensor | None] = []
        self.sink: Callable[[Tensor, Tensor], Tensor] | None = None
        self.held: tuple[Tensor, Tensor] | None = None
        self.formed: Tensor | None = None  # the updates (S, m, n), where `dense`

    def stacked(self, starts: Sequence[Chain]) -> list[Chain]:
        """Take the spans and the width of the S runs' starting factors and return them as stacks (S', ., .) by span.

        Raises ValueError unless runs with chains of equal length are neighbours.
        """
        lengths = [len(start) for start in starts]
        if sum(a != b for a, b in pairwise(lengths)) + 1 != len(set(lengths)):
            raise ValueError(f"chains have lengths {lengths}, expected runs of equal length side by side")
        self.spans = [(lengths.index(n), lengths.index(n) + lengths.count(n)) for n in dict.fromkeys(lengths)]
        self.widths = [start[0].shape[0] for start in starts]
        kind, device = starts[0][0].dtype, starts[0][0].device
        scalings = torch.tensor(self.multiples, dtype=kind, device=device)
        self.scalings = [
            None if set(self.multiples[begin:end]) == {1} else scalings[begin:end, None, None]
            for begin, end in self.spans
        ]
        widened = [widened_chain(start, self.inner) for start in starts]
        return [[torch.stack(part) for part in zip(*widened[begin:end], strict=True)] for begin, end in self.spans]

    @property
    def inner(self) -> int:
        """The width that all runs' factors are padded to."""
        return max(self.widths, default=0)

    @property
    def weight(self) -> Tensor:
        """The frozen layer's weight: models ask layers for its dtype and device."""
        return self.base.weight

    @property
    def dense(self) -> bool:
        """Whether forming the update costs less per token than two factors of its width."""
        m, n = self.shape
        return not self.embedding and self.inner * (m + n) >= m * n

    def contracted(self) -> tuple[Tensor, Tensor]:
        """Return W_{L-1} ... W_1 (S, k, n), scaled, and W_L (S, m, k); embeddings: W_1 and W_L ... W_2, scaled."""
        if self.held is not None:
            return self.held
        return halves(self.source(), self.scalings, self.embedding, self.taken_off())

    def updates(self) -> Tensor:
        """Return the updates (S, m, n) of all runs."""
        lower, upper = self.contracted()
        return upper @ lower

    def chain(self, run: int) -> Chain:
        """Return copies of one run's factors at their own width."""
        for (begin, end), chain in zip(self.spans, self.source(), strict=True):
            if begin <= run < end:
                own = self.widths[run]
                factors = [factor[run - begin].detach() for factor in chain]
                inner = [factor[:own, :own] for factor in factors[1:-1]]
                return [part.clone() for part in (factors[0][:own], *inner, factors[-1][:, :own])]
        raise IndexError(f"run is {run}, expected below {self.runs}")

    def pair(self, run: int) -> Chain | None:
        """Return copies of what was taken off the weight for one run, at its own width, or None."""
        for (begin, end), pair in zip(self.spans, self.taken_off(), strict=True):
            if begin <= run < end and pair is not None:
                own, (a, b) = self.widths[run], (factor[run - begin] for factor in pair)
                return [a[:own].clone(), b[:, :own].clone()] if bool(a.any() and b.any()) else None
        return None

    def forward(self, x: Tensor) -> Tensor:
        """Return base(x) plus every run's share of the update."""
        self.rows.check(f"an adapted layer of shape {self.shape}", x.shape)
        if self.sink is not None:
            return self.sink(x, self.base(x))
        if self.formed is not None:
            return self._dense(x, self.formed)
        lower, upper = self.contracted()
        if self.embedding:
            out = self.base(x)
            return out + (upper @ self._embedded(x, lower)).mT.reshape(out.shape).to(out.dtype)
        rate = self.rate
        if self.dense and not (rate and self.training):
            return self._dense(x, upper @ lower)
        flat = x.reshape(self.runs, -1, self.shape[1])
        lower, upper = lower.to(self.base.weight.dtype), upper.to(self.base.weight.dtype)
        if not (rate and self.training) and x.dtype == lower.dtype:
            out = _LowRankLinear.apply(flat, self._frozen, self.base.bias, lower, upper)
        else:
            out = self.base(flat)
            kept = functional.dropout(x, rate, self.training).reshape(flat.shape)  # drawn as it is for a run alone
            out = out + kept.to(lower.dtype) @ lower.mT @ upper.mT
        return out.view(*x.shape[:-1], self.shape[0])

    def _embedded(self, x: Tensor, lower: Tensor) -> Tensor:
        """Columns (S, k, P) of W_1 for ids x; those of the padding are not trained, as torch's embeddings have it."""
        ids = x.reshape(self.runs, 1, -1).expand(-1, lower.shape[1], -1)
        columns = lower.gather(2, ids)
        padding = self.base.padding_idx
        return columns if padding is None else torch.where(ids == padding, columns.detach(), columns)

    def _dense(self, x: Tensor, update: Tensor) -> Tensor:
        flat = x.reshape(self.runs, -1, self.shape[1])
        if x.dtype == self.weight.dtype == torch.bfloat16:  # a sum of both would round small updates away
            out = _FullLinear.apply(flat, self._frozen, self.base.bias, update.to(x.dtype))
            return out.view(*x.shape[:-1], self.shape[0])
        weight = (self._frozen + update).mT.to(x.dtype)
        out = flat @ weight if self.base.bias is None else torch.baddbmm(self.base.bias, flat, weight)
        return out.view(*x.shape[:-1], self.shape[0])

    @property
    def _frozen(self) -> Tensor:
        """The frozen weight as (m, n)."""
        return self.base.weight.mT if self.turned else self.base.weight


def halves(
    chains: Sequence[Sequence[Tensor]],
    scalings: Sequence[Tensor | None],
    embedding: bool,
    taken_off: Sequence[Chain | None] = (),
) -> tuple[Tensor, Tensor]:
    """Return W_{L-1} ... W_1 (..., S, k, n), scaled, and W_L (..., S, m, k) of chains (..., S', ., .) by span of runs.

    For embeddings W_1 and W_L ... W_2, scaled. A span with a pair A_0, B_0 gives B A - B_0 A_0 and twice the width. A
    scaling of None is 1.
    """
    pairs = taken_off or [None] * len(chains)
    ends = [_halves(*each, embedding) for each in zip(chains, scalings, pairs, strict=True)]
    lower, upper = zip(*ends, strict=True)
    if len(ends) == 1:
        return lower[0], upper[0]
    width = max(half.shape[-2] for half in lower)
    lower = tuple(functional.pad(half, (0, 0, 0, width - half.shape[-2])) for half in lower)
    upper = tuple(functional.pad(half, (0, width - half.shape[-1])) for half in upper)
    return torch.cat(lower, -3), torch.cat(upper, -3)


def _halves(
    chain: Sequence[Tensor], scale: Tensor | None, pair: Chain | None, embedding: bool
) -> tuple[Tensor, Tensor]:
    with torch.autocast(chain[0].device.type, enabled=False):
        if embedding:
            return chain[0], _scaled(product(chain[1:]), scale)
        if pair is not None:
            # B A - B_0 A_0 = (B - B_0) A + B_0 (A - A_0): zero at the start in any precision, and small afterwards,
            # where the difference of two large products would lose its digits.
            (a, b), (first_a, first_b) = chain, pair
            return _scaled(torch.cat([a, a - first_a], -2), scale), torch.cat([b - first_b, first_b], -1)
        # The narrow ones first: their products with W_1 (k, n), and the way back, are what takes time.
        inner = [product(chain[1:-1])] if len(chain) > 2 else []
        return _scaled(product([chain[0], *inner]), scale), chain[-1]


def _scaled(factor: Tensor, scale: Tensor | None) -> Tensor:
    return factor if scale is None else factor * scale


class _LowRankLinear(torch.autograd.Function):
    """x W^T + b + x A^T B^T, run by run, with both sums inside the products: no pass over the tokens of their own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, lower: Tensor, upper: Tensor) -> Tensor:
        """x (S, P, n), weight (m, n) frozen, A = lower (S, k, n), B = upper (S, m, k); returns (S, P, m)."""
        inner = x @ lower.mT
        ctx.save_for_backward(x, weight, lower, upper, inner)
        return _linear_plus(x, weight, bias, inner, upper.mT)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, Tensor, Tensor]:
        """Gradients of x, A and B."""
        x, weight, lower, upper, inner = ctx.saved_tensors
        narrow = grad @ upper
        back = _linear_plus(grad, weight.mT, None, narrow, lower) if ctx.needs_input_grad[0] else None
        return back, None, None, narrow.mT @ x, grad.mT @ inner


class _FullLinear(torch.autograd.Function):
    """x W^T + b + x U^T, run by run, with the second product's sum inside it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, update: Tensor) -> Tensor:
        """x (S, P, n), weight (m, n) frozen, U = update (S, m, n); returns (S, P, m)."""
        ctx.save_for_backward(x, weight, update)
        return _linear_plus(x, weight, bias, x, update.mT)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, Tensor]:
        """Gradients of x and U."""
        x, weight, update = ctx.saved_tensors
        back = _linear_plus(grad, weight.mT, None, grad, update) if ctx.needs_input_grad[0] else None
        return back, None, None, grad.mT @ x


@torch.library.custom_op("compressible::linear_plus", mutates_args=())
def _linear_plus(x: Tensor, weight: Tensor, bias: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    """x W^T + b + left right in place of the first sum, behind a compiler's back: it would copy that sum."""
    out = functional.linear(x, weight, bias)  # which may be a view, on which no model could write
    return torch.ops.aten._unsafe_view(out, out.shape).baddbmm_(left, right)


@_linear_plus.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@register_flop_formula(torch.ops.compressible.linear_plus)
def _(x: Sequence[int], weight: Sequence[int], bias: Any, left: Sequence[int], *_: Any, **__: Any) -> int:
    return 2 * math.prod(x) * weight[0] + 2 * math.prod(left) * weight[0]


def stacked_adapters(model: nn.Module) -> dict[str, StackedAdapter]:
    """Return the stacked adapters of a model by the name of the layer that they adapt."""
    return {name: module for name, module in model.named_modules() if isinstance(module, StackedAdapter)}


def widened_chain(chain: Chain, width: int) -> Chain:
    """Return factors with zero rows and columns up to the inner width."""
    own = chain[0].shape[0]
    grow = width - own
    inner = [functional.pad(factor, (0, grow, 0, grow)) for factor in chain[1:-1]]
    return [functional.pad(chain[0], (0, 0, 0, grow)), *inner, functional.pad(chain[-1], (0, grow))]
