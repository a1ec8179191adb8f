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

from compressible.adapters.compressed_init import GradientSink, compressed_chain, finish
from compressible.adapters.config import DeepLoraConfig
from compressible.adapters.layer import Layer, is_transposed, product
from compressible.finetuning.batches import PassRows

Chain = list[Tensor]  # [W_1 (k, n), ..., W_L (m, k)] of one run


class StackedAdapter(nn.Module):
    """A frozen layer with the updates of S runs; takes (S * B, ..., n) run by run, ValueError where not `rows` of them.

    Its factors lie in a `ChainGroups`, which sets `source`, a function that gives them by span of runs (S', ., .).
    """

    base: Layer
    source: Callable[[], list[Chain]]

    def __init__(self, base: Layer, configs: Sequence[DeepLoraConfig], shape: tuple[int, int], rows: PassRows) -> None:
        super().__init__()
        self.rows = rows
        self.base, self.configs, self.runs, self.shape = base, list(configs), len(configs), shape
        self.embedding = isinstance(base, nn.Embedding)
        self.spans: list[tuple[int, int]] = []
        self.inner = 0
        self.scalings: list[Tensor] = []
        self.sink: Callable[[Tensor, Tensor], Tensor] | None = None
        self.held: tuple[Tensor, Tensor] | None = None

    def stacked(self, starts: Sequence[Chain]) -> list[Chain]:
        """Take the spans and the width of the S runs' starting factors and return them as stacks (S', ., .) by span.

        Raises ValueError unless runs with chains of equal length are neighbours.
        """
        lengths = [len(start) for start in starts]
        if sum(a != b for a, b in pairwise(lengths)) + 1 != len(set(lengths)):
            raise ValueError(f"chains have lengths {lengths}, expected runs of equal length side by side")
        self.spans = [(lengths.index(n), lengths.index(n) + lengths.count(n)) for n in dict.fromkeys(lengths)]
        self.inner = max(start[0].shape[0] for start in starts)
        kind, device = starts[0][0].dtype, starts[0][0].device
        scalings = torch.tensor([config.scaling for config in self.configs], dtype=kind, device=device)
        self.scalings = [scalings[begin:end, None, None] for begin, end in self.spans]
        widened = [_widened(start, self.inner) for start in starts]
        return [[torch.stack(part) for part in zip(*widened[begin:end], strict=True)] for begin, end in self.spans]

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
        return halves(self.source(), self.scalings, self.embedding)

    def updates(self) -> Tensor:
        """Return the updates (S, m, n) of all runs."""
        lower, upper = self.contracted()
        return upper @ lower

    def chain(self, run: int) -> Chain:
        """Return copies of one run's factors at their own width."""
        for (begin, end), chain in zip(self.spans, self.source(), strict=True):
            if begin <= run < end:
                config = self.configs[run]
                own = min(self.shape) if config.variant == "full" else config.r
                factors = [factor[run - begin].detach() for factor in chain]
                inner = [factor[:own, :own] for factor in factors[1:-1]]
                return [part.clone() for part in (factors[0][:own], *inner, factors[-1][:, :own])]
        raise IndexError(f"run is {run}, expected below {self.runs}")

    def forward(self, x: Tensor) -> Tensor:
        """Return base(x) plus every run's share of the update."""
        self.rows.check(f"an adapted layer of shape {self.shape}", x.shape)
        if self.sink is not None:
            return self.sink(x, self.base(x))
        lower, upper = self.contracted()
        if self.embedding:
            ids = x.reshape(self.runs, 1, -1).expand(-1, lower.shape[1], -1)
            out = self.base(x)
            return out + (upper @ lower.gather(2, ids)).mT.reshape(out.shape).to(out.dtype)
        rate = self.configs[0].lora_dropout
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

    def _dense(self, x: Tensor, update: Tensor) -> Tensor:
        weight = (self._frozen + update).mT.to(x.dtype)
        flat = x.reshape(self.runs, -1, self.shape[1])
        out = flat @ weight if self.base.bias is None else torch.baddbmm(self.base.bias, flat, weight)
        return out.view(*x.shape[:-1], self.shape[0])

    @property
    def _frozen(self) -> Tensor:
        """The frozen weight as (m, n)."""
        return self.base.weight.mT if is_transposed(self.base) else self.base.weight


def halves(chains: Sequence[Sequence[Tensor]], scalings: Sequence[Tensor], embedding: bool) -> tuple[Tensor, Tensor]:
    """Return W_{L-1} ... W_1 (..., S, k, n), scaled, and W_L (..., S, m, k) of chains (..., S', ., .) by span of runs.

    For embeddings W_1 and W_L ... W_2, scaled.
    """
    ends = [_halves(chain, scale, embedding) for chain, scale in zip(chains, scalings, strict=True)]
    lower, upper = zip(*ends, strict=True)
    return (lower[0], upper[0]) if len(ends) == 1 else (torch.cat(lower, -3), torch.cat(upper, -3))


def _halves(chain: Sequence[Tensor], scale: Tensor, embedding: bool) -> tuple[Tensor, Tensor]:
    with torch.autocast(chain[0].device.type, enabled=False):
        if embedding:
            return chain[0], product(chain[1:]) * scale
        # The narrow ones first: their products with W_1 (k, n), and the way back, are what takes time.
        inner = [product(chain[1:-1])] if len(chain) > 2 else []
        return product([chain[0], *inner]) * scale, chain[-1]


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


@torch.library.custom_op("compressible::linear_plus", mutates_args=())
def _linear_plus(x: Tensor, weight: Tensor, bias: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    """x W^T + b + left right in place of the first sum, behind a compiler's back: it would copy that sum."""
    return functional.linear(x, weight, bias).baddbmm_(left, right)


@_linear_plus.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@register_flop_formula(torch.ops.compressible.linear_plus)
def _(x: Sequence[int], weight: Sequence[int], bias: Any, left: Sequence[int], *_: Any, **__: Any) -> int:
    return 2 * math.prod(x) * weight[0] + 2 * math.prod(left) * weight[0]


class StackedLinear(nn.Module):
    """A linear layer that S runs train, each its own: weight (S, m, n), bias (S, m); keeps its own precision."""

    def __init__(self, weights: Sequence[Tensor], biases: Sequence[Tensor] | None, rows: PassRows) -> None:
        super().__init__()
        self.rows = rows
        self.weight = nn.Parameter(torch.stack(list(weights)))
        self.bias = None if biases is None else nn.Parameter(torch.stack(list(biases)))

    def forward(self, x: Tensor) -> Tensor:
        """Return (S * B, ..., m)."""
        runs, m, n = self.weight.shape
        self.rows.check(f"a trained layer of shape {(m, n)}", x.shape)
        flat = x.reshape(runs, -1, n).to(self.weight.dtype)
        out = flat @ self.weight.mT
        out = out if self.bias is None else out + self.bias[:, None]
        return out.view(*x.shape[:-1], m)


def stacked_adapters(model: nn.Module) -> dict[str, StackedAdapter]:
    """Return the stacked adapters of a model by the name of the layer that they adapt."""
    return {name: module for name, module in model.named_modules() if isinstance(module, StackedAdapter)}


def compressed_starts(
    adapters: dict[str, StackedAdapter],
    which: Sequence[int],
    losses: Callable[[], Tensor],
    generators: Sequence[torch.Generator],
) -> dict[int, dict[str, Chain]]:
    """Return, by run and layer, the compressed start of the runs `which` from one backward pass of all of them.

    losses gives the sum of the runs' losses. A layer's gradients (S', m, n) live only until their decomposition; frames
    are then drawn from each run's generator in the order of the layers. The starts are on the CPU.
    """
    which = list(which)
    sinks = {}
    for name, adapter in adapters.items():
        rank = max(adapter.configs[run].r for run in which) // 2
        sinks[name] = GradientSink(adapter.base, rank, adapter.runs, which)
    try:
        for name, adapter in adapters.items():
            adapter.sink = sinks[name].watch
        with torch.enable_grad():
            torch.autograd.backward(losses(), inputs=[sink.token for sink in sinks.values()])
    finally:
        for adapter in adapters.values():
            adapter.sink = None
    finish(sinks)
    # On the CPU: thousands of small decompositions that a GPU would only wait for.
    frames = {name: [side.cpu() for side in sink.frames or ()] for name, sink in sinks.items()}
    return {
        run: {name: _start(adapter, run, frames[name], at, generator) for name, adapter in adapters.items()}
        for at, (run, generator) in enumerate(zip(which, generators, strict=True))
    }


def _start(adapter: StackedAdapter, run: int, frames: list[Tensor], at: int, generator: torch.Generator) -> Chain:
    config = adapter.configs[run]
    left, right = (side[at, :, : config.r // 2] for side in frames)
    return compressed_chain(left, right, adapter.shape, config, generator)


def _widened(chain: Chain, width: int) -> Chain:
    """Zero rows and columns up to the inner width."""
    own = chain[0].shape[0]
    grow = width - own
    inner = [functional.pad(factor, (0, grow, 0, grow)) for factor in chain[1:-1]]
    return [functional.pad(chain[0], (0, 0, 0, grow)), *inner, functional.pad(chain[-1], (0, grow))]
