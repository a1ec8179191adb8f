"""AdamW over the stacked tensors of S runs: one flat vector, with a rate for every element."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from compressible.runtime.devices import has_triton


class StackedAdamW:
    """AdamW without weight decay whose elements have rates of their own, one a run; steps can live in a CUDA graph.

    parameters: pairs of a tensor and the rates that broadcast against it. Values and gradients become views of flat
    vectors, so that a step is a handful of kernels however many layers there are. A run whose values are no longer
    finite does not touch the others.
    """

    def __init__(
        self,
        parameters: Sequence[tuple[nn.Parameter, Tensor]],
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
    ) -> None:
        self.betas, self.eps = betas, eps
        self.shapes = [tuple(parameter.shape) for parameter, _ in parameters]
        first = parameters[0][0]
        total = sum(parameter.numel() for parameter, _ in parameters)
        kind = functools.reduce(torch.promote_types, [parameter.dtype for parameter, _ in parameters])
        empty = [torch.zeros(total, dtype=kind, device=first.device) for _ in range(5)]
        self.value, self.gradient, self.mean, self.square, self.rate = empty
        self.count = torch.zeros((), dtype=torch.float64, device=first.device)
        scalars = [1 - betas[0], 1 - betas[1], 1.0, 1.0, eps]
        self.scalars = torch.tensor(scalars, dtype=torch.float64, device=first.device)
        begin = 0
        for parameter, rates in parameters:
            view = slice(begin, begin + parameter.numel())
            begin = view.stop
            self.value[view].view_as(parameter).copy_(parameter.detach())
            self.rate[view].view_as(parameter).copy_(rates.to(first.device, kind))
            parameter.data = self.value[view].view_as(parameter)
            parameter.grad = self.gradient[view].view_as(parameter)

    @torch.no_grad()
    def step(self, factor: Tensor) -> None:
        """Take one step at `factor` () times the rates."""
        (first, second), fused = self.betas, self.value.is_cuda and has_triton()
        self.count += 1
        root, scaled = (1 - second**self.count).sqrt(), factor / (1 - first**self.count)
        (self.step_fused if fused else self.step_plain)(root, scaled)

    def step_fused(self, root: Tensor, scaled: Tensor) -> None:
        """Take one step as one kernel, by sqrt(1 - b2^t) () and factor / (1 - b1^t) ()."""
        from compressible.finetuning.stacked.triton_adamw import fused_adam

        torch.stack([root, scaled], out=self.scalars[2:4])
        fused_adam(self.value, self.gradient, self.mean, self.square, self.rate, self.scalars)

    def step_plain(self, root: Tensor, scaled: Tensor) -> None:
        """The same in plain operations."""
        (first, second), kind = self.betas, self.value.dtype
        self.mean.lerp_(self.gradient, 1 - first)
        self.square.mul_(second).addcmul_(self.gradient, self.gradient, value=1 - second)
        change = (self.square.sqrt() / root.to(kind)).add_(self.eps)
        torch.div(self.mean, change, out=change)
        self.value.sub_(change.mul_(self.rate).mul_(scaled.to(kind)))
