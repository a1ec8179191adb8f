"""Optimisers whose step turns with the basis: for orthogonal P and Q, the step of P G Q is P times that of G times Q.

Gradient descent, with momentum or without, is one of them; Adam and RMSProp, which divide entry by entry, are not.
Here are Adam with one second moment a matrix, and Muon at its weights' own precision, where torch.optim.Muon works in
bfloat16 and takes matrices alone. Stacks (..., m, n) are many matrices, each by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.linalg import matrix_norm

QUINTIC = (3.4445, -4.7750, 2.0315)  # Keller Jordan's coefficients, which torch.optim.Muon has, too


class _BasisFree(torch.optim.Optimizer):
    """Steps `lr` times what a rule makes of each gradient."""

    def __init__(self, params: Iterable[Any], defaults: dict[str, Any]) -> None:
        if not defaults["lr"] >= 0:
            raise ValueError(f"lr is {defaults['lr']}, expected at least 0")
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group as torch does; ValueError for a parameter that is no matrix or stack of them."""
        super().add_param_group(param_group)
        for weight in self.param_groups[-1]["params"]:
            if weight.ndim < 2:
                raise ValueError(f"a parameter has shape {tuple(weight.shape)}, expected matrices (..., m, n)")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step on the gradients that the parameters hold; returns what `closure` returns, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    weight.sub_(group["lr"] * self._rule(weight.grad, self.state[weight], group))
        return loss

    def _rule(self, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        raise NotImplementedError


class ScalarAdam(_BasisFree):
    """Adam with one scalar second moment a matrix, the mean of the squares of all its entries.

    Args:
        params: Parameters (..., m, n) or groups of them.
        lr: Learning rate, usually 1e-3 to 1e-1: the first step has the norm lr (m n)^(1/2).
        betas: Decay of the first and second moment, in [0, 1).
        eps: Added to the root of the second moment.

    Raises:
        ValueError: For a negative rate, a decay outside [0, 1), or a parameter that is no matrix.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(1, 2, dtype=torch.float64))
        >>> weight.grad = torch.tensor([[1.0, 7.0]], dtype=torch.float64)
        >>> ScalarAdam([weight], lr=0.5).step()
        >>> [round(value, 4) for value in weight.detach()[0].tolist()]  # 0.5 / 5 of the gradient
        [-0.1, -0.7]

    Reference:
        Kingma and Ba, Adam, arXiv 1412.6980, Algorithm 1, with the mean of g^2 over a matrix in the place of g^2.
    """

    def __init__(
        self, params: Iterable[Any], lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8
    ) -> None:
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas are {betas}, expected two numbers in [0, 1)")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps})

    def _rule(self, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        square = gradient.square().mean((-2, -1), keepdim=True)
        if not state:
            state.update(step=0, exp_avg=torch.zeros_like(gradient), exp_avg_sq=torch.zeros_like(square))
        state["step"] += 1
        first, second = group["betas"]
        state["exp_avg"].lerp_(gradient, 1 - first)
        state["exp_avg_sq"].lerp_(square, 1 - second)
        mean = state["exp_avg"] / (1 - first ** state["step"])
        spread = state["exp_avg_sq"] / (1 - second ** state["step"])
        return mean / (spread.sqrt() + group["eps"])


class Muon(_BasisFree):
    """Muon: the step is the orthogonal polar factor of the momentum, exact or by Newton and Schulz's iteration.

    Args:
        params: Parameters (..., m, n) or groups of them.
        lr: Learning rate: how far every singular value of the step reaches, usually 1e-3 to 1e-1.
        momentum: mu in [0, 1), usually 0.95.
        nesterov: Whether the gradient is looked at ahead.
        newton_schulz: Steps of the quintic iteration, usually 5, at the weights' precision, which multiply what is
            tiny by 3.4^5 or less and keep a zero; 0 is the exact polar factor from an SVD.
        rtol: Of the exact polar factor: singular values of the momentum up to this share of its largest are zero, and
            nothing moves in their directions, [0, 1). By default only what is zero to the last digit stands still, as
            the whole of a zero gradient, but not what rounding makes of the zeros of a matrix of lower rank: 1e-14 is
            for that in float64, 1e-5 in float32.

    Raises:
        ValueError: For a negative rate, a momentum or rtol outside [0, 1), steps that are negative, or a parameter that
            is no matrix.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(2, 2, dtype=torch.float64))
        >>> weight.grad = torch.diag(torch.tensor([3.0, 1e-3], dtype=torch.float64))
        >>> Muon([weight], lr=0.1).step()
        >>> [round(value, 12) for value in weight.detach().diagonal().tolist()]
        [-0.1, -0.1]

    Reference:
        K. Jordan et al., Muon, 2024, kellerjordan.github.io/posts/muon; torch.optim.Muon, which works in bfloat16.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        momentum: float = 0.95,
        nesterov: bool = True,
        newton_schulz: int = 0,
        rtol: float = 0.0,
    ) -> None:
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum is {momentum}, expected a number in [0, 1)")
        if newton_schulz < 0:
            raise ValueError(f"newton_schulz is {newton_schulz}, expected 0 (exact) or a number of steps")
        if not 0 <= rtol < 1:
            raise ValueError(f"rtol is {rtol}, expected a number in [0, 1)")
        held = {"lr": lr, "momentum": momentum, "nesterov": nesterov, "newton_schulz": newton_schulz, "rtol": rtol}
        super().__init__(params, held)

    def _rule(self, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        mu = group["momentum"]
        buffer = state.setdefault("momentum_buffer", torch.zeros_like(gradient)).lerp_(gradient, 1 - mu)
        move = gradient.lerp(buffer, mu) if group["nesterov"] else buffer
        steps = group["newton_schulz"]
        return newton_schulz(move, steps) if steps else polar_factor(move, group.get("rtol", 0.0))


def polar_factor(matrix: Tensor, rtol: float = 0.0) -> Tensor:
    """Return U V^T (..., m, n) of the singular value decomposition U S V^T, the nearest (semi-)orthogonal matrix.

    Values up to `rtol` times the largest are zero. Where a value is, several matrices are as near; this one is zero in
    its directions, as Newton and Schulz's iteration and the sign of a number are, and of a zero matrix zero.
    """
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    zero = (values <= rtol * values[..., :1])[..., None, :]
    return left.clone().masked_fill_(zero, 0) @ right  # a copy with its strides, by which products round


def newton_schulz(matrix: Tensor, steps: int = 5) -> Tensor:
    """Return U f(S) V^T (..., m, n), f(S) roughly 0.7 to 1.2 unless a value is tiny beside the Frobenius norm.

    The quintic iteration X <- a X + (b X X^T + c (X X^T)^2) X from X / ||X||_F, at the precision of the matrix.
    """
    a, b, c = QUINTIC
    tall = matrix.shape[-2] > matrix.shape[-1]
    x = matrix.mT if tall else matrix
    x = x / matrix_norm(x, keepdim=True).clamp_min(1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x
