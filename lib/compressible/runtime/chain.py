"""An update W_L ... W_1 applied to activations in few launches, with gradients by hand and a plain reference."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

Key = TypeVar("Key", bound=Hashable)


def reference(result: Tensor, x: Tensor, factors: Sequence[Tensor]) -> Tensor:
    """Return result (..., m) + x W_1^T ... W_L^T in plain operations, the product of W_2 to W_L in float32."""
    kind = torch.float32 if result.dtype is torch.float16 else result.dtype
    with torch.autocast(result.device.type, enabled=False):
        first, *rest = (factor.to(factor_dtype(factor)) for factor in factors)
        hidden = functional.linear(x.to(kind), first.to(kind))
        return result + functional.linear(hidden, product(rest).to(kind)).to(result.dtype)


def updated(result: Tensor, x: Tensor, factors: Sequence[Tensor]) -> Tensor:
    """Return what `reference` does, by the same operations with little around them in eager mode."""
    device = result.device.type
    if torch.compiler.is_compiling():
        return reference(result, x, factors)
    autocast = torch.is_autocast_enabled(device)
    if autocast:
        torch.set_autocast_enabled(device, False)  # as a context it would cost as much as two products
    try:
        first, last, kind = factors[0], product(factors[1:]), result.dtype
        if kind is not first.dtype and kind is not torch.float16:
            first, last = first.to(kind), last.to(kind)
        if x.dtype is not first.dtype:
            x = x.to(first.dtype)
        update = functional.linear(functional.linear(x, first), last)
        return result + (update if update.dtype is kind else update.to(kind))
    finally:
        if autocast:
            torch.set_autocast_enabled(device, True)


def looked_up(result: Tensor, ids: Tensor, factors: Sequence[Tensor], table: Any, scale: Tensor | None) -> Tensor:
    """Return result (..., m) + (W_L ... W_1)[:, ids] for ids (...), scaled where the embedding `table` is so."""
    with torch.autocast(result.device.type, enabled=False):
        rows = functional.embedding(ids, factors[0].mT, table.padding_idx, scale_grad_by_freq=table.scale_grad_by_freq)
        update = rows @ product(factors[1:]).mT
    return result + (update if scale is None else update * scale.to(update.dtype)).to(result.dtype)


class _InnerProducts(torch.autograd.Function):
    """Products W_{L-1} ... W_2 of many layers at once: a few batched launches in the place of some for every layer."""

    @staticmethod
    def forward(ctx: Any, depth: int, *factors: Tensor) -> tuple[Tensor, ...]:
        """Take the inner factors (k, k) layer by layer, `depth` of each, and return a product (k, k) a layer."""
        ctx.set_materialize_grads(False)
        stack = torch.stack(factors).unflatten(0, (-1, depth))
        products = [stack[:, 0]]
        with torch.autocast(stack.device.type, enabled=False):
            for level in range(1, depth):
                products.append(torch.bmm(stack[:, level], products[-1]))
        ctx.stack, ctx.products = stack, products  # copies, kept so that parts of a graph may go back one by one
        ctx.save_for_backward(*factors)
        return products[-1].unbind()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        reached = [place for place, grad in enumerate(grads) if grad is not None]
        if not reached:  # what is downstream gave no gradient to any
            return (None,) * (1 + len(grads) * ctx.stack.shape[1])
        if torch.is_grad_enabled():  # gradients that can be differentiated again
            return None, *_chains_again(ctx.saved_tensors, ctx.stack.shape[1], grads)
        depth, rows = ctx.stack.shape[1], slice(None) if len(reached) == len(grads) else reached
        grad, levels = torch.stack([given for given in grads if given is not None]), []
        for level in range(depth - 1, 0, -1):
            levels.append(torch.bmm(grad, ctx.products[level - 1][rows].mT).unbind())
            grad = torch.bmm(ctx.stack[rows, level].mT, grad)
        found: list[Tensor | None] = [None] * (len(grads) * depth)
        for at, parts in enumerate([grad.unbind(), *reversed(levels)]):
            for place, part in zip(reached, parts, strict=True):
                found[place * depth + at] = part
        return None, *found


def _chains_again(factors: Sequence[Tensor], depth: int, grads: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
    """What `_InnerProducts.backward` returns, by the graph of plain products."""
    chains = [factors[start : start + depth] for start in range(0, len(factors), depth)]
    reached = [(product(chain), grad) for chain, grad in zip(chains, grads, strict=True) if grad is not None]
    results, wanted = zip(*reached, strict=True)
    return torch.autograd.grad(results, factors, wanted, create_graph=True, allow_unused=True)


def inner_products(chains: Sequence[Sequence[Tensor]]) -> Sequence[Tensor]:
    """Return W_{L-1} ... W_2 (k, k) of each of several chains [W_1, ..., W_L] of one length, width and device."""
    return _InnerProducts.apply(len(chains[0]) - 2, *(factor for chain in chains for factor in chain[1:-1]))


def grouped_inner_products(chains: Mapping[Key, Sequence[Tensor]]) -> dict[Key, Tensor]:
    """Return `inner_products` of those chains that have more than one inner factor, in as few launches as shapes allow.

    Only of plain matrices in float32, not of those that are split over processes.
    """
    groups: dict[tuple, list[Key]] = {}
    for key, chain in chains.items():
        inner = chain[1]
        if len(chain) > 3 and type(inner) is nn.Parameter and inner.dtype is torch.float32 and inner.ndim == 2:
            groups.setdefault((len(chain), inner.shape, inner.device), []).append(key)
    found: dict[Key, Tensor] = {}
    for keys in groups.values():
        found |= zip(keys, inner_products([chains[key] for key in keys]), strict=True)
    return found


def product(factors: Sequence[Tensor]) -> Tensor:
    """Return W_L ... W_1 (..., m, n) of factors [W_1, ..., W_L], multiplied from W_1 on."""
    result = factors[0]
    for factor in factors[1:]:
        result = factor @ result
    return result


def factor_dtype(weight: Tensor) -> torch.dtype:
    """Return float32, or float64 beside a weight in float64: eps^L needs more range than half precision has."""
    return torch.promote_types(weight.dtype, torch.float32) if weight.is_floating_point() else torch.float32
