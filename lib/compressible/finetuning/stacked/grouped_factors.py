"""The chains of all layers of equal shape as one: a handful of products a step where layer by layer it is hundreds.

An r x r chain is too small for a GPU to notice: what it costs is the start of its kernels. A factor of all layers of
one shape is one trained tensor (layers, S', ., .); layers see slices of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import nn

from compressible.finetuning.stacked.layers import Chain, StackedAdapter, halves


class ChainGroups:
    """The trained factors of `adapters`, contracted all at once.

    starts holds the S runs' starting factors an adapter; runs with chains of equal length must be neighbours.
    """

    def __init__(self, adapters: Sequence[StackedAdapter] = (), starts: Sequence[Sequence[Chain]] = ()) -> None:
        kinds: dict[tuple, list[int]] = {}
        for at, adapter in enumerate(adapters):
            shapes = [[factor.shape for factor in start] for start in starts[at]]
            kind = repr(shapes), adapter.embedding, adapter.weight.dtype, tuple(adapter.multiples)
            kinds.setdefault(kind, []).append(at)
        self.groups = [
            _Group([adapters[at] for at in members], [starts[at] for at in members]) for members in kinds.values()
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
        """Give every adapter, until `release`, the two factors that its tokens meet, in its weight's precision."""
        for group in self.groups:
            group.contract()

    def release(self) -> None:
        """Take the contracted factors back: the next step's are others."""
        for group in self.groups:
            for adapter in group.members:
                adapter.held = None


class _Group:
    """Adapters of one shape, their runs' chains by length: `chains` of factors (layers, S', ., .), `spans` of runs."""

    def __init__(self, members: list[StackedAdapter], starts: Sequence[Sequence[Chain]]) -> None:
        self.members = members
        stacks = [adapter.stacked(start) for adapter, start in zip(members, starts, strict=True)]
        self.spans = members[0].spans
        self.chains = [
            [nn.Parameter(torch.stack(layers)) for layers in zip(*chains, strict=True)]
            for chains in zip(*stacks, strict=True)
        ]
        for layer, adapter in enumerate(members):
            adapter.source = partial(self.of, layer)

    def of(self, layer: int) -> list[Chain]:
        """Return the factors of one layer, views (S', ., .) by span of runs."""
        return [[factor[layer] for factor in chain] for chain in self.chains]

    def contract(self) -> None:
        first = self.members[0]
        lower, upper = halves(self.chains, first.scalings, first.embedding)
        if not (first.embedding or first.dense):  # there the update is added up in the factors' own precision
            lower, upper = lower.to(first.weight.dtype), upper.to(first.weight.dtype)
        for adapter, below, above in zip(self.members, lower.unbind(), upper.unbind(), strict=True):
            adapter.held = below, above
