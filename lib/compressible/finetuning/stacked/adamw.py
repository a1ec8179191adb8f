"""AdamW over the stacked tensors of S runs: one flat vector, with a rate for every element, and wide tensors apart."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from compressible.runtime.devices import has_triton

# Numbers from which a tensor has a step of its own, and what one run's share of it must be a multiple of, since a
# program of the kernel has one rate.
WIDE, SHARE = 2**22, 1024
# Tensors begin at multiples of so many numbers: from an odd place, which the bias of a head is enough for, a GPU's
# library takes its kernels for unaligned matrices, and the products of full width take several times as long.
PLACE = 64


@dataclass(frozen=True)
class _Wide:
    """A large tensor (..., S, ., .), of whose run every `share` neighbouring numbers are; rates () or (S, 1, ...)."""

    parameter: nn.Parameter
    view: slice
    rates: Tensor
    share: int


class StackedAdamW:
    """AdamW without weight decay whose elements have rates of their own, one a run; steps can live in a CUDA graph.

    parameters: pairs of a tensor and the rates that broadcast against it, () or one a run on the first axis of theirs.
    Values become views of a flat vector, and so do gradients, so that a step is a handful of kernels however many
    layers there are; gaps between them stay zero. The gradients of wide tensors, of which there are few, stay where a
    backward pass puts them, which spares them four passes through memory; the wide come last. A run whose values are no
    longer finite does not touch the others.
    """

    def __init__(
        self,
        parameters: Sequence[tuple[nn.Parameter, Tensor]],
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
    ) -> None:
        self.betas, self.eps = betas, eps
        ordered = sorted(parameters, key=lambda pair: _is_wide(*pair))
        self.shapes = [tuple(parameter.shape) for parameter, _ in ordered]
        first = ordered[0][0]
        kind = functools.reduce(torch.promote_types, [parameter.dtype for parameter, _ in ordered])
        self.small = sum(_room(parameter) for parameter, rates in ordered if not _is_wide(parameter, rates))
        total = sum(_room(parameter) for parameter, _ in ordered)
        sizes = [total] * 3 + [self.small] * 2
        empty = [torch.zeros(size, dtype=kind, device=first.device) for size in sizes]
        self.value, self.mean, self.square, self.gradient, self.rate = empty
        self.count = torch.zeros((), dtype=torch.float64, device=first.device)
        scalars = [1 - betas[0], 1 - betas[1], 1.0, 1.0, eps]
        self.scalars = torch.tensor(scalars, dtype=torch.float64, device=first.device)
        self.wide: list[_Wide] = []
        begin = 0
        for parameter, rates in ordered:
            view = slice(begin, begin + parameter.numel())
            begin += _room(parameter)
            self._place(parameter, view, rates.to(first.device, kind))

    def _place(self, parameter: nn.Parameter, view: slice, rates: Tensor) -> None:
        """Give a tensor its place in the flat vectors."""
        self.value[view].view_as(parameter).copy_(parameter.detach())
        parameter.data = self.value[view].view_as(parameter)
        if view.stop > self.small:
            parameter.grad = None
            self.wide.append(_Wide(parameter, view, rates, _share(parameter, rates)))
            return
        self.rate[view].view_as(parameter).copy_(rates)
        parameter.grad = self.gradient[view].view_as(parameter)

    def forget_gradients(self) -> None:
        """Begin a step."""
        self.gradient.zero_()
        for wide in self.wide:
            wide.parameter.grad = None

    @torch.no_grad()
    def step(self, factor: Tensor) -> None:
        """Take one step at `factor` () times the rates; the wide tensors' gradients are gone then."""
        (first, second), fused = self.betas, self.value.is_cuda and has_triton()
        self.count += 1
        root, scaled = (1 - second**self.count).sqrt(), factor / (1 - first**self.count)
        (self.step_fused if fused else self.step_plain)(root, scaled)
        for wide in self.wide:
            wide.parameter.grad = None

    def step_fused(self, root: Tensor, scaled: Tensor) -> None:
        """Take one step as one kernel a tensor, by sqrt(1 - b2^t) () and factor / (1 - b1^t) ()."""
        from compressible.finetuning.stacked.triton_adamw import fused_adam

        torch.stack([root, scaled], out=self.scalars[2:4])
        if self.small:
            fused_adam(*self._parts(slice(0, self.small)), self.gradient, self.rate, self.scalars, 1)
        for wide in self.wide:
            if wide.parameter.grad is not None:
                gradient = wide.parameter.grad.reshape(-1)
                fused_adam(*self._parts(wide.view), gradient, wide.rates, self.scalars, wide.share)

    def step_plain(self, root: Tensor, scaled: Tensor) -> None:
        """The same in plain operations."""
        self._plain(slice(0, self.small), self.gradient, self.rate, root, scaled)
        for wide in self.wide:
            if wide.parameter.grad is not None:
                rates = wide.rates.expand(wide.parameter.shape)
                self._plain(wide.view, wide.parameter.grad, rates, root, scaled)

    def _plain(self, view: slice, gradient: Tensor, rate: Tensor, root: Tensor, scaled: Tensor) -> None:
        (first, second), kind = self.betas, self.value.dtype
        value, mean, square = (part.view(gradient.shape) for part in self._parts(view))
        mean.lerp_(gradient, 1 - first)
        square.mul_(second).addcmul_(gradient, gradient, value=1 - second)
        change = (square.sqrt() / root.to(kind)).add_(self.eps)
        torch.div(mean, change, out=change)
        value.sub_(change.mul_(rate).mul_(scaled.to(kind)))

    def _parts(self, view: slice) -> tuple[Tensor, Tensor, Tensor]:
        return self.value[view], self.mean[view], self.square[view]


def _room(parameter: Tensor) -> int:
    """How many numbers of the flat vector a tensor takes, up to where the next may begin."""
    return -(-parameter.numel() // PLACE) * PLACE


def _share(parameter: Tensor, rates: Tensor) -> int:
    """How many neighbouring numbers of a tensor are one run's."""
    return math.prod(parameter.shape[parameter.dim() - rates.dim() + 1 :]) if rates.dim() else parameter.numel()


def _is_wide(parameter: Tensor, rates: Tensor) -> bool:
    return parameter.numel() >= WIDE and (not rates.dim() or _share(parameter, rates) % SHARE == 0)
