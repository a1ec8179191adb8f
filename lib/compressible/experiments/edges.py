"""P1's Theorem 2.1 where its assumptions end: one run of the theorem a seed, and how far spoiled runs depart from it.

Stacks are (levels, S) or (S,), S seeds. `step_size` is that of the half mean square over the m n entries, as in
`descend`; over m n it is the theory's eta. Edges with a strength that varies are in
edge_levels.py, those with runs of their own in edge_runs.py, the theory in recovery/theory/edges.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from torch.linalg import matrix_norm

from compressible.experiments.components import moving_values
from compressible.recovery.compression import invariant_directions
from compressible.recovery.factors import Factors, product
from compressible.recovery.problem_base import pick
from compressible.recovery.problems import DenseProblem, MatrixFactorization
from compressible.recovery.subspaces import principal_angles
from compressible.recovery.theory import edges as theory
from compressible.recovery.theory.invariants import compression_gap


class InputFactorization(DenseProblem):
    """Linear regression by a deep product: loss 1/2 tr((X - Phi) C (X - Phi)^T) / (m n), C the inputs' second moment.

    With inputs x_1 .. x_N and targets Phi x_i it is 1/2 mean ||(X - Phi) x_i||^2 / (m n); with other targets it is that
    loss less its least value, and Phi is the least-squares solution. C = I (white inputs) is MatrixFactorization.

    Args:
        target: Phi (..., m, n).
        moment: C = mean x_i x_i^T (..., n, n), symmetric and positive definite.

    Raises:
        ValueError: where the moment does not fit the target.

    Example:
        >>> import torch
        >>> problem = InputFactorization(torch.ones(1, 2), torch.diag(torch.tensor([1.0, 3.0])))
        >>> problem.loss(torch.zeros(1, 2)).item()
        1.0

    Reference:
        P1's authors' code, fig_nonwhitened_data (inputs that are not white).
    """

    def __init__(self, target: Tensor, moment: Tensor) -> None:
        self._adopt(target, "target")
        if moment.shape[-2:] != (target.shape[-1], target.shape[-1]):
            raise ValueError(f"moment has shape {tuple(moment.shape)}, expected (..., n, n), n = {target.shape[-1]}")
        self.batch_shape = tuple(torch.broadcast_shapes(target.shape[:-2], moment.shape[:-2]))
        self.target, self.moment, self.entries = target, moment, self.shape[0] * self.shape[1]

    def gradient(self, product: Tensor, out: Tensor | None = None) -> Tensor:
        return torch.matmul((product - self.target) / self.entries, self.moment, out=out)

    def evaluate(self, product: Tensor) -> tuple[Tensor, Tensor]:
        residual = product - self.target
        loss = (residual * self.gradient(product)).sum((-2, -1)) / 2
        return loss, residual.square().mean((-2, -1)) / 2

    def surrogate(self) -> Tensor:
        return self.target @ self.moment

    def select(self, index: Tensor, batch_shape: tuple[int, ...]) -> InputFactorization:
        return InputFactorization(*(pick(part, index, batch_shape) for part in (self.target, self.moment)))

    def stacked(self, problems: Sequence[Self]) -> InputFactorization:
        targets, moments = zip(*((problem.target, problem.moment) for problem in problems), strict=True)
        return InputFactorization(torch.stack(targets), torch.stack(moments))


@dataclass
class Ideal:
    """The theorem's run W* of each seed: target Phi of rank r and orthogonal start, every iteration, and what follows.

    scales are eps_1, ..., eps_L; rhos (T, L) the recursion, bases V^(1), ..., V^(L+1), small the path of the compressed
    network whose outer factors are frozen.
    """

    target: Tensor
    rank: int
    scales: Sequence[float]
    step_size: float
    path: list[Factors]
    rhos: Tensor
    bases: list[Tensor]
    small: list[Factors]

    def gap(self) -> Tensor:
        """Return ||f - f_C||_F (T,) of the corollary, by the recursion."""
        return compression_gap(self.rhos, self.target.shape[-1], self.rank)

    def bound(self, **spoiled: Tensor | float) -> Tensor:
        """Return `theory.departure_bound` (T, ...) along this run."""
        layers = torch.stack([torch.stack(factors) for factors in self.path])
        largest = matrix_norm(layers, ord=2).amax(1)
        residuals = torch.stack([product(factors) for factors in self.path]) - self.target
        norms = matrix_norm(residuals, ord=2), matrix_norm(residuals)
        eta = self.step_size / self.target[0].numel()
        return theory.departure_bound(largest, norms, len(self.scales), eta, **spoiled)


def iterates(
    problem: DenseProblem,
    start: Sequence[Tensor],
    step_size: float,
    steps: int,
    optimizer: type[torch.optim.Optimizer] = torch.optim.SGD,
    outer_ratio: float = 1.0,
    one_by_one: bool = False,
    **options: Any,
) -> Iterator[Factors]:
    """Yield the factors at iterations 0, 1, ..., steps, moved by one of PyTorch's optimisers with these `options`.

    Gradients are the problem's own, in closed form; the outer factors have the rate outer_ratio * step_size. SGD
    without options is `descend`, weight_decay included. `one_by_one` gives the optimiser each matrix of a stack
    (S, m, n) by itself, for one that takes matrices alone.
    """
    held = [factor.clone() for factor in start]
    weights = [[torch.nn.Parameter(part) for part in (stack if one_by_one else [stack])] for stack in held]
    ratios = [outer_ratio, *[1.0] * (len(held) - 2), outer_ratio]
    groups = [{"params": parts, "lr": step_size * ratio} for parts, ratio in zip(weights, ratios, strict=True)]
    stepper = optimizer(groups, **options)
    for step in range(steps + 1):
        factors = [stack.clone() for stack in held]  # parameters share the memory of their stack
        yield factors
        if step < steps:
            for parts, gradient in zip(weights, problem.factor_gradients(factors), strict=True):
                for weight, slope in zip(parts, gradient if one_by_one else [gradient], strict=True):
                    weight.grad = slope
            stepper.step()


def compressed_start(problem: DenseProblem, factors: Sequence[Tensor], rank: int, scales: Sequence[float]) -> Factors:
    """Return P1's compressed factors as `compress_from_gradient`, for a start that need not be orthogonal."""
    gradient = problem.factor_gradients(factors)[0]
    right = invariant_directions(gradient, factors[0] / scales[0], rank)
    left = product(factors) @ right
    for scale in scales:
        left = left / scale
    identity = torch.eye(2 * rank, dtype=right.dtype, device=right.device).expand(*right.shape[:-2], -1, -1)
    return [right.mT, *(scale * identity for scale in scales), left]


def ideal_run(
    target: Tensor,
    unit: Sequence[Tensor],
    rank: int,
    step_size: float,
    steps: int,
    scales: Sequence[float],
    sgd: Mapping[str, Any] | None = None,
) -> Ideal:
    """Return the theorem's run from the orthogonal factors `unit` (S, d, d) times `scales`.

    `sgd` may hold what torch.optim.SGD takes: momentum, nesterov and weight_decay, the last of the mean loss, as
    `descend` has it.
    """
    sgd = sgd or {}
    start = [scale * factor for scale, factor in zip(scales, unit, strict=True)]
    problem, entries = MatrixFactorization(target), target.shape[-2] * target.shape[-1]
    decay, momentum = sgd.get("weight_decay", 0.0) * entries, sgd.get("momentum", 0.0)
    rhos = theory.momentum_rho(scales, step_size / entries, steps, momentum, sgd.get("nesterov", False), decay)
    small = compressed_start(problem, start, rank, scales)
    return Ideal(
        target=target,
        rank=rank,
        scales=scales,
        step_size=step_size,
        path=list(iterates(problem, start, step_size, steps, **sgd)),
        rhos=rhos,
        bases=theory.middle_bases(target, start, rank),
        small=list(iterates(problem, small, step_size, steps, outer_ratio=0.0, **sgd)),
    )


def blocks_off(factors: Sequence[Tensor], bases: Sequence[Tensor], rhos: Tensor) -> Tensor:
    """Return how far (L, ...) each layer's block that stands still is from rho_l times an isometry, rhos (L, ...).

    The larger of ||W_l V^(l) - rho_l V^(l+1)||_F and ||W_l^T V^(l+1) - rho_l V^(l)||_F, with the bases V^(1), ... of
    `theory.middle_bases`. It sees values, vectors and coupling.
    """
    found = []
    for factor, below, above, rho in zip(factors, bases[:-1], bases[1:], rhos[..., None, None], strict=True):
        sides = matrix_norm(factor @ below - rho * above), matrix_norm(factor.mT @ above - rho * below)
        found.append(torch.maximum(*sides))
    return torch.stack(found)


def block_deviation(ideal: Ideal, factors: Sequence[Tensor], step: int) -> Tensor:
    """Return `blocks_off` (...) against the theorem's recursion, the largest over layers.

    No departure max_l ||W_l - W*_l||_F is below it.
    """
    return blocks_off(factors, ideal.bases, ideal.rhos[step]).amax(0)


def last_look(ideal: Ideal, factors: Sequence[Tensor]) -> dict[str, Tensor]:
    """Return what the factors of the last iteration are, (...), each the worst layer.

    "moving": singular values farther than 1e-6 from their median; "values": how far the d - 2r middle ones are from
    rho_l; "angle": how far their right subspace is turned from the theorem's, in radians.
    """
    inner, moving, values, angle = slice(ideal.rank, -ideal.rank), [], [], []
    for layer, factor in enumerate(factors):
        _, found, right = torch.linalg.svd(factor)
        moving.append(moving_values(found))
        values.append((found[..., inner] - ideal.rhos[-1, layer]).abs().amax(-1))
        turned = principal_angles(right[..., inner, :].mT, ideal.bases[layer].expand_as(right[..., inner, :].mT))
        angle.append(turned[..., -1])
    looks = {"moving": moving, "values": values, "angle": angle}
    return {name: torch.stack(parts).amax(0) for name, parts in looks.items()}


def held_against(
    ideal: Ideal,
    problem: DenseProblem,
    start: Sequence[Tensor],
    optimizer: type[torch.optim.Optimizer] = torch.optim.SGD,
    step_size: float | None = None,
    **options: Any,
) -> dict[str, Tensor]:
    """Return how far a run (..., S) departs from the theorem's, S seeds.

    "departure" max_l ||W_l - W*_l||_F and "block", as `block_deviation`, at every iteration, (T, ..., S); `last_look`
    at the last; there also "gap" ||f - f_C||_F over the corollary's value, f_C of P1's construction for this problem
    and start, and "gap_departure", how far f - f_C is from that of the theorem's run, Frobenius, over the same value.
    """
    rate, steps = step_size or ideal.step_size, len(ideal.path) - 1
    small = compressed_start(problem, start, ideal.rank, ideal.scales)
    runs = [
        iterates(problem, factors, rate, steps, optimizer, outer_ratio=ratio, **options)
        for factors, ratio in ((start, 1.0), (small, 0.0))
    ]
    departure, block = [], []
    for step, (factors, narrow) in enumerate(zip(*runs, strict=True)):  # noqa: B007, both are used after the last
        apart = [matrix_norm(now - then) for now, then in zip(factors, ideal.path[step], strict=True)]
        departure.append(torch.stack(apart).amax(0))
        block.append(block_deviation(ideal, factors, step))
    gap, ideal_gap = product(factors) - product(narrow), product(ideal.path[-1]) - product(ideal.small[-1])
    exact = ideal.gap()[-1]
    out = {"departure": torch.stack(departure), "block": torch.stack(block)} | last_look(ideal, factors)
    return out | {"gap": matrix_norm(gap) / exact, "gap_departure": matrix_norm(gap - ideal_gap) / exact}
