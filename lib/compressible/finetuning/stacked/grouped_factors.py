"""The chains of all layers of equal shape as one: a handful of products a step where layer by layer it is hundreds.

An r x r chain is too small for a GPU to notice: what it costs is the start of its kernels. A factor of all layers of
one shape is one trained tensor (layers, S', ., .); layers see slices of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import nn

from compressible.finetuning.stacked.layers import Chain, StackedAdapter, halves, widened_chain

Pairs = Sequence[Chain | None]  # by run what was taken off the weight, A_0 and B_0


class ChainGroups:
    """The trained factors of `adapters`, contracted all at once.

    starts holds the S runs' starting factors an adapter; runs with chains of equal length must be neighbours. taken_off
    holds, where some were taken off the frozen weights, the runs' pairs A_0, B_0 an adapter, or None.
    """

    def __init__(
        self,
        adapters: Sequence[StackedAdapter] = (),
        starts: Sequence[Sequence[Chain]] = (),
        taken_off: Sequence[Pairs] = (),
    ) -> None:
        kinds: dict[tuple, list[int]] = {}
        for at, adapter in enumerate(adapters):
            shapes = [[factor.shape for factor in start] for start in starts[at]]
            kind = repr(shapes), adapter.embedding, adapter.weight.dtype, tuple(adapter.multiples)
            kinds.setdefault(kind, []).append(at)
        pairs = taken_off or [[None] * len(of) for of in starts]
        self.groups = [
            _Group([adapters[at] for at in members], [starts[at] for at in members], [pairs[at] for at in members])
            for members in kinds.values()
        ]

    def parameters(self) -> Iterator[tuple[nn.Parameter, range, tuple[int, int, bool]]]:
        """Yield every trained tensor (layers, S', ., .), the runs that it is of, and its place.

        The place is its number in the chain, the chain's length, and whether embeddings are adapted.
        """
        for group in self.groups:
            for span, chain in zip(group.spans, group.chains, strict=True):
                for at, factor in enumerate(chain):
                    yield factor, range(*span), (at, len(chain), group.members[0].embedding)

    def contract(self) -> None:
        """Give every adapter, until `release`, what its tokens meet, in its weight's precision.

        These are two factors, or the updates where these have to be formed.
        """
        for group in self.groups:
            group.contract()

    def release(self) -> None:
        """Take the contracted factors back: the next step's are others."""
        for group in self.groups:
            for adapter in group.members:
                adapter.held = adapter.formed = None


class _Group:
    """Adapters of one shape, their runs' chains by length: `chains` of factors (layers, S', ., .), `spans` of runs.

    `pairs` has for each span what was taken off the weights, (layers, S', ., .) and frozen, or None.
    """

    def __init__(
        self, members: list[StackedAdapter], starts: Sequence[Sequence[Chain]], taken_off: Sequence[Pairs]
    ) -> None:
        self.members = members
        stacks = [adapter.stacked(start) for adapter, start in zip(members, starts, strict=True)]
        self.spans = members[0].spans
        self.chains = [
            [nn.Parameter(torch.stack(layers)) for layers in zip(*chains, strict=True)]
            for chains in zip(*stacks, strict=True)
        ]
        self.pairs = [self._pair(span, starts, taken_off) for span in self.spans]
        for layer, adapter in enumerate(members):
            adapter.source, adapter.taken_off = partial(self.of, layer), partial(self.off, layer)

    def of(self, layer: int) -> list[Chain]:
        """Return the factors of one layer, views (S', ., .) by span of runs."""
        return [[factor[layer] for factor in chain] for chain in self.chains]

    def off(self, layer: int) -> list[Chain | None]:
        """Return the pairs that were taken off the weight of one layer, (S', ., .) by span of runs."""
        return [pair and [factor[layer] for factor in pair] for pair in self.pairs]

    def _pair(
        self, span: tuple[int, int], starts: Sequence[Sequence[Chain]], taken_off: Sequence[Pairs]
    ) -> Chain | None:
        """The pairs of a span's runs in all layers, zeros where a run has none; None where no run has one."""
        own = [pairs[slice(*span)] for pairs in taken_off]
        if all(pair is None for pairs in own for pair in pairs):
            return None
        width, stacks = self.members[0].inner, []
        for chains, pairs in zip((of[slice(*span)] for of in starts), own, strict=True):
            filled = [
                [half.new_zeros(half.shape) for half in chain] if pair is None else pair
                for chain, pair in zip(chains, pairs, strict=True)
            ]
            widened = [widened_chain(pair, width) for pair in filled]
            stacks.append([torch.stack(halves_of) for halves_of in zip(*widened, strict=True)])
        return [torch.stack(layers) for layers in zip(*stacks, strict=True)]

    def contract(self) -> None:
        first = self.members[0]
        lower, upper = halves(self.chains, first.scalings, first.embedding, self.pairs)
        if first.dense and not first.rate:  # else dropout stands between the layer's tokens and its factors
            for adapter, update in zip(self.members, (upper @ lower).to(first.weight.dtype).unbind(), strict=True):
                adapter.formed = update
            return
        if not (first.embedding or first.dense):
            lower, upper = lower.to(first.weight.dtype), upper.to(first.weight.dtype)
        for adapter, below, above in zip(self.members, lower.unbind(), upper.unbind(), strict=True):
            adapter.held = below, above
