"""GaLore (Zhao et al., arXiv 2403.03507): the optimiser's moments live in r leading directions of the gradient.

Every T steps P becomes the r leading singular vectors of the gradient G (m, n) of that step; between, G is projected,
the rule of the optimiser is taken there and its step is carried back, so that W (m, n) moves by rank r in a period and
the moments hold r max(m, n) numbers instead of m n each. Names, defaults and the order of operations are those of
galore-torch 1.0, the authors' package, of March 2024, which nobody has kept since: it needs bitsandbytes at its import,
and its state, an object, cannot be saved. There P comes from an SVD in float32 for every dtype; here in float64 where
the weights have that. Moments are carried over a change of P as they are, as there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

PROJECTION = {"update_proj_gap": 200, "scale": 0.25, "proj_type": "std"}  # theirs, where a group gives a rank alone
_SIDES = {
    "std": lambda m, n: ("left",) if m < n else ("right",),
    "reverse_std": lambda m, n: ("right",) if m < n else ("left",),
    "left": lambda m, n: ("left",),
    "right": lambda m, n: ("right",),
    "full": lambda m, n: ("left", "right"),
}


def leading_vectors(gradient: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the r = `rank` leading left (m, r) and right (r, n) singular vectors of a gradient (m, n)."""
    exact = gradient if gradient.dtype == torch.float64 else gradient.float()
    left, _, right = torch.linalg.svd(exact, full_matrices=False)
    return left[:, :rank].to(gradient.dtype, copy=True), right[:rank].to(gradient.dtype, copy=True)  # not a view of all


class _GaLore(torch.optim.Optimizer):
    """Projection of the gradients of groups with a `rank`; a rule says how a projected gradient becomes a step."""

    def __init__(self, params: Iterable[Any], defaults: dict[str, Any]) -> None:
        for name in ("lr", "weight_decay"):
            if not defaults[name] >= 0:
                raise ValueError(f"{name} is {defaults[name]}, expected at least 0")
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group as torch does; one with a `rank` gets the other three names and must hold matrices only."""
        if "rank" in param_group:
            param_group.update({name: param_group.get(name, value) for name, value in PROJECTION.items()})
        super().add_param_group(param_group)
        if "rank" in param_group:
            _check_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step on the gradients that the parameters hold; returns what `closure` returns, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)
        return loss

    def _update(self, weight: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[weight]
        taken = state.setdefault("step", 0)
        if "rank" in group and taken % group["update_proj_gap"] == 0:
            vectors = dict(zip(("left", "right"), leading_vectors(gradient, group["rank"]), strict=True))
            state.update({side: vectors[side] for side in _SIDES[group["proj_type"]](*weight.shape)})
        state["step"] = taken + 1
        move = self._rule(_project(gradient, state), state, group)
        if "rank" in group:
            move = group["scale"] * _project_back(move, state)
        weight.sub_(move)
        if group["weight_decay"] > 0:  # at full rank, after the step
            weight.mul_(1 - group["lr"] * group["weight_decay"])

    def _rule(self, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        raise NotImplementedError


class GaLoreAdamW(_GaLore):
    """AdamW whose moments live in the projected space, as galore-torch's GaLoreAdamW.

    Args:
        params: Parameters or groups. A group with a `rank` holds matrices only, whose gradients (m, n) are projected;
            it may also say `update_proj_gap`, the period T in steps (200; 50 to 1000), `scale`, the factor of
            the step (0.25), and `proj_type`: "std" projects the shorter side, "reverse_std" the longer, "left" or
            "right" that one, "full" both. Groups without a rank are plain AdamW.
        lr: Learning rate; with scale 0.25 their README takes 0.01.
        betas: Decay of the first and second moment.
        eps: Added to the root of the second moment, which is not yet corrected for its bias.
        weight_decay: Decay of the whole matrix, times lr.
        correct_bias: Whether the moments' zero start is corrected.

    Raises:
        ValueError: For a negative rate or decay, a group with a rank below 1 or above a matrix's smaller side, a
            period below 1, a vector in such a group, or an unknown proj_type.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(4, 6))
        >>> optimizer = GaLoreAdamW([{"params": [weight], "rank": 2, "update_proj_gap": 10}], lr=0.01)
        >>> (weight - torch.arange(24.0).reshape(4, 6)).square().sum().backward()
        >>> optimizer.step()
        >>> int(torch.linalg.matrix_rank(weight)), tuple(optimizer.state[weight]["exp_avg"].shape)
        (2, (2, 6))

    Reference:
        Algorithm 2 of arXiv 2403.03507; galore-torch 1.0, adamw.py and galore_projector.py.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        correct_bias: bool = True,
    ) -> None:
        if not (0 <= betas[0] < 1 and 0 <= betas[1] < 1):
            raise ValueError(f"betas are {betas}, expected two numbers in [0, 1)")
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "correct_bias": correct_bias}
        super().__init__(params, defaults)

    def _rule(self, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        if "exp_avg" not in state:
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(gradient), torch.zeros_like(gradient)
        (beta1, beta2), first, second = group["betas"], state["exp_avg"], state["exp_avg_sq"]
        first.mul_(beta1).add_(gradient, alpha=1 - beta1)
        second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        size = group["lr"]
        if group["correct_bias"]:
            size *= math.sqrt(1 - beta2 ** state["step"]) / (1 - beta1 ** state["step"])
        return size * first / (second.sqrt() + group["eps"])


class GaLoreSGD(_GaLore):
    """Gradient descent on projected gradients, W <- W - eta P P^T G: the GaLore of P3's Theorem 4 (there scale is 1).

    Args:
        params: Parameters or groups, as for `GaLoreAdamW`.
        lr: Step size eta.
        weight_decay: Decay of the whole matrix, times lr.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(2, 2))
        >>> optimizer = GaLoreSGD([{"params": [weight], "rank": 1, "scale": 1.0}], lr=0.5)
        >>> (weight - torch.diag(torch.tensor([4.0, 2.0]))).square().sum().backward()
        >>> optimizer.step()
        >>> [[round(entry, 4) + 0.0 for entry in row] for row in weight.tolist()]
        [[4.0, 0.0], [0.0, 0.0]]

    Reference:
        P3, Theorem 4.
    """

    def __init__(self, params: Iterable[Any], lr: float = 1e-3, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    def _rule(self, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        return group["lr"] * gradient


def _project(gradient: Tensor, state: dict[str, Any]) -> Tensor:
    """P^T G, G Q^T or both, with the vectors that the state holds; G itself without."""
    if "left" in state:
        gradient = state["left"].mT @ gradient
    return gradient @ state["right"].mT if "right" in state else gradient


def _project_back(move: Tensor, state: dict[str, Any]) -> Tensor:
    if "left" in state:
        move = state["left"] @ move
    return move @ state["right"] if "right" in state else move


def _check_group(group: dict[str, Any]) -> None:
    if group["proj_type"] not in _SIDES:
        raise ValueError(f"proj_type is {group['proj_type']!r}, expected one of {', '.join(_SIDES)}")
    if group["update_proj_gap"] < 1:
        raise ValueError(f"update_proj_gap is {group['update_proj_gap']}, expected at least 1 step")
    for weight in group["params"]:
        if weight.ndim != 2 or not 1 <= group["rank"] <= min(weight.shape):
            shape = tuple(weight.shape)
            raise ValueError(f"rank is {group['rank']} for a parameter {shape}, expected a matrix and 1 to its sides")
