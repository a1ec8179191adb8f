"""PyTorch in place: the updates are folded into the matrix products, which add to what is there (gemm with beta)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from compressible.descent.engines.base import Engine, Rate
from compressible.recovery.problems import DenseProblem


class Fused(Engine):
    """Preallocated buffers, calls bound once, no autograd; any dense problem on any device."""

    name = "fused"

    def __init__(self, problem: DenseProblem, factors: Sequence[Tensor], rates: Sequence[Rate], decay: float) -> None:
        self.problem = problem
        self.factors = [factor.clone(memory_format=torch.contiguous_format) for factor in factors]
        # prefixes[l] = W_{l+1} ... W_1, so that prefixes[0] is W_1 itself and prefixes[-1] is X.
        self.prefixes = [self.factors[0]]
        for factor in self.factors[1:]:
            self.prefixes.append(factor @ self.prefixes[-1])
        # backs[l] = (W_L ... W_{l+1})^T E, the gradient of the loss in prefixes[l-1].
        self.backs = [torch.empty_like(prefix) for prefix in self.prefixes]
        self._look = problem.watch(self.prefixes[-1], scratch=self.backs[-1])
        self._gradient = partial(_gradient_into, problem)
        self._forward = self._plan_forward()
        self._backward = self._plan_backward(rates, decay)

    def advance(self, steps: int) -> None:
        gradient, last, back = self._gradient, self.prefixes[-1], self.backs[-1]
        forward, backward = self._forward, self._backward
        for _ in range(steps):
            for multiply, left, right, out in forward:
                multiply(left, right, out=out)
            gradient(last, out=back)
            for call in backward:
                call()

    def evaluate(self) -> Tensor:
        for multiply, left, right, out in self._forward:
            multiply(left, right, out=out)
        return self._look()

    def _plan_forward(self) -> list[tuple]:
        multiply = torch.mm if self.factors[0].ndim == 2 else torch.bmm
        steps = zip(self.factors[1:], self.prefixes[:-1], self.prefixes[1:], strict=True)
        return [(multiply, factor, below, here) for factor, below, here in steps]

    def _plan_backward(self, rates: Sequence[Rate], decay: float) -> list:
        """The backward sweep as bound calls: W_l^T B is taken before W_l is overwritten by its own update."""
        multiply = torch.mm if self.factors[0].ndim == 2 else torch.bmm
        plan = []
        for layer in range(len(self.factors) - 1, 0, -1):
            factor, back, below = self.factors[layer], self.backs[layer], self.prefixes[layer - 1].mT
            plan.append(_bind(multiply, factor.mT, back, out=self.backs[layer - 1]))
            plan.extend(_update(factor, back, below, rates[layer], decay))
        plan.extend(_update(self.factors[0], self.backs[0], None, rates[0], decay))
        return plan


def _gradient_into(problem: DenseProblem, product: Tensor, out: Tensor) -> None:
    """Write the gradient where the sweep reads it, also one of a class of one's own that gives a tensor of its own."""
    found = problem.gradient(product, out=out)
    if found is not out:
        out.copy_(found)


def _bind(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Callable[[], Any]:
    return lambda: function(*args, **kwargs)


def _update(factor: Tensor, back: Tensor, below: Tensor | None, rate: Rate, decay: float) -> list:
    """Calls that do factor <- (1 - rate decay) factor - rate back below; `below` None stands for the identity."""
    if isinstance(rate, Tensor):
        return _update_each(factor, back, below, rate, decay)
    if rate == 0:
        return []
    if below is None:
        shrink = [_bind(factor.mul_, 1 - rate * decay)] if decay else []
        return [*shrink, _bind(factor.add_, back, alpha=-rate)]
    fused = factor.addmm_ if factor.ndim == 2 else factor.baddbmm_
    return [_bind(fused, back, below, beta=1 - rate * decay, alpha=-rate)]


def _update_each(factor: Tensor, back: Tensor, below: Tensor | None, rate: Tensor, decay: float) -> list:
    calls = [_bind(factor.mul_, 1 - rate * decay)] if decay else []
    if below is None:
        return [*calls, _bind(factor.addcmul_, back, rate, value=-1)]
    gradient = torch.empty_like(factor)
    return [_bind(torch.bmm, back, below, out=gradient), *calls, _bind(factor.addcmul_, gradient, rate, value=-1)]
