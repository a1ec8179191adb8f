"""AdamW over the stacked tensors of S runs: one flat vector, with a rate for every element."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

try:
    from . import tuning_kernels as fused
except ImportError:  # triton is for Linux only
    fused = None


class StackedAdamW:
    """AdamW without weight decay whose parameters (S', ...) have one rate a run; steps can live in a CUDA graph.

    parameters: pairs of a tensor and the rates (S',) of its leading axis. Values and gradients become views of flat
    vectors, so that a step is a handful of kernels however many layers there are. A run whose values are no longer
    finite does not touch the others.
    """

    def __init__(
        self, parameters: Sequence[tuple[nn.Parameter, Tensor]], betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
    ) -> None:  # fmt: skip
        self.betas, self.eps = betas, eps
        first = parameters[0][0]
        total = sum(parameter.numel() for parameter, _ in parameters)
        empty = [torch.zeros(total, dtype=first.dtype, device=first.device) for _ in range(5)]
        self.value, self.gradient, self.mean, self.square, self.rate = empty
        self.count = torch.zeros((), dtype=torch.float64, device=first.device)
        begin = 0
        for parameter, rates in parameters:
            view = slice(begin, begin + parameter.numel())
            begin = view.stop
            self.value[view].view_as(parameter).copy_(parameter.detach())
            shape = (-1, *[1] * (parameter.dim() - 1))
            self.rate[view].view_as(parameter).copy_(rates.to(first.device, first.dtype).view(shape))
            parameter.data = self.value[view].view_as(parameter)
            parameter.grad = self.gradient[view].view_as(parameter)
        if self._fused:  # compiled here, since a graph that is being captured loads no kernel; a step of size 0
            one = torch.ones((), dtype=first.dtype, device=first.device)
            self._take(one, 0 * one)

    def zero(self) -> None:
        """Set the gradients to zero."""
        self.gradient.zero_()

    @torch.no_grad()
    def step(self, factor: Tensor) -> None:
        """Take one step at `factor` () times the rates."""
        (first, second), kind = self.betas, self.value.dtype
        self.count += 1
        root = (1 - second**self.count).sqrt().to(kind)
        size = (factor / (1 - first**self.count)).to(kind)
        if self._fused:
            self._take(root, size)
            return
        self.mean.lerp_(self.gradient, 1 - first)
        self.square.mul_(second).addcmul_(self.gradient, self.gradient, value=1 - second)
        change = (self.square.sqrt() / root).add_(self.eps)
        torch.div(self.mean, change, out=change)
        self.value.sub_(change.mul_(self.rate).mul_(size))

    @property
    def _fused(self) -> bool:
        return fused is not None and self.value.is_cuda and self.value.dtype is torch.float32

    def _take(self, root: Tensor, size: Tensor) -> None:
        vectors = (self.value, self.gradient, self.mean, self.square, self.rate)
        fused.adamw_step(*vectors, root, size, self.betas, self.eps)
