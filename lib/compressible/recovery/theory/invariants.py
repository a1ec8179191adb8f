"""P1's theorem and corollary as code, and P2's scalar dynamics, so that runs can be held against them.

Gradient descent on 1/2 ||W_L...W_1 - Phi||_F^2 + lambda/2 sum ||W_l||_F^2 with rank(Phi) = r, from W_l(0) = eps_l
times orthogonal (d, d). Then W_l(t) = U_l blkdiag(W~_l(t), rho_l(t) I_{d-2r}) V_l^T for all t: d - 2r singular values
per layer share one value rho_l, and their vectors stand still. With a loss that is a mean over N entries the
step size on the sum loss is step_size / N and the weight decay N * weight_decay.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from compressible.recovery.checks import (
    FLOATING,
    LARGEST,
    MOST_RECORDS,
    expect_depth,
    expect_problem,
    expect_rate,
    expect_tensor,
)
from compressible.recovery.problem_base import Problem
from compressible.recovery.truncated_svd import truncated_svd
from compressible.runtime.checks import expect, expect_integer, expect_iterations, expect_number, is_number

_POSITIVE = "a finite number > 0"


def rho(scales: Sequence[float], step_size: float, steps: int, weight_decay: float = 0.0) -> Tensor:
    """Return rho_l(t) as (steps + 1, L): the value that d - 2r singular values of layer l share (P1, Theorem 2.1).

    rho_l(t+1) = rho_l(t) [1 - eta lambda - eta prod_{k != l} rho_k(t)^2], rho_l(0) = eps_l; `step_size` is eta on the
    sum loss.
    """
    told = "a list of finite numbers, one for each layer"
    if isinstance(scales, Tensor):
        expect_tensor("scales", scales, told, FLOATING, 1)
    numbers = scales.tolist() if isinstance(scales, (Tensor, np.ndarray)) else scales
    known = isinstance(numbers, Sequence) and not isinstance(numbers, bytes) and len(numbers) > 0
    expect("scales", scales, known and all(map(is_number, numbers)), told)
    step_size = expect_number("step_size", step_size, _POSITIVE, above=0)
    steps = expect_integer("steps", steps, 0, MOST_RECORDS)
    weight_decay = expect_number("weight_decay", weight_decay, "a finite number >= 0", least=0)
    values = [[float(scale) for scale in numbers]]
    for _ in range(steps):  # plain numbers: tensors of L entries would take ten times as long
        squares = [value * value for value in values[-1]]
        others = [math.prod(squares[:layer] + squares[layer + 1 :]) for layer in range(len(squares))]
        kept = [1 - step_size * weight_decay - step_size * other for other in others]
        values.append([value * factor for value, factor in zip(values[-1], kept, strict=True)])
    return torch.tensor(values, dtype=torch.float64, device="cpu")


def over_ranked_law(excess: int, dimension: int, scale: float, step_size: float, iterations: np.ndarray) -> np.ndarray:
    """Return k rho(t)^4 / 2 d^2, the error that k = `excess` directions outside the target leave at `iterations` (R,).

    Both factors start with them at `scale`, and rho is the recursion that shrinks what no gradient of the target feeds.
    """
    dimension = expect_integer("dimension", dimension, 1, LARGEST)
    excess = expect_integer("excess", excess, 0, dimension)
    scale = expect_number("scale", scale, _POSITIVE, above=0)
    step_size = expect_number("step_size", step_size, _POSITIVE, above=0)
    told = f"an array of integers from 0 to {MOST_RECORDS}"
    expect("iterations", iterations, isinstance(iterations, (np.ndarray, Tensor, Sequence)), told)
    expect("iterations", iterations, len(expect_iterations("iterations", iterations, MOST_RECORDS, told)) > 0, told)
    marks = np.asarray(iterations)
    values = rho([scale, scale], step_size / dimension**2, int(marks.max()))
    return excess * values.prod(-1).square().numpy()[marks] / (2 * dimension**2)


def compression_gap(rhos: Tensor, size: int, rank: int) -> Tensor:
    """Return ||f(t) - f_C(t)||_F = sqrt(d - 2r) prod_l rho_l(t), (...) from rhos (..., L).

    P1's corollary on compression, as an equality: f is the wide product, f_C the compressed one with frozen outer
    factors (outer_ratio 0), under full observation.
    """
    expect_tensor("rhos", rhos, "numbers (..., L)", FLOATING, 1)
    size = expect_integer("size", size, 1, LARGEST)
    rank = expect_integer("rank", rank, 0, size // 2, f"an integer >= 0 with 2 rank <= size = {size}")
    return (size - 2 * rank) ** 0.5 * rhos.prod(-1)


def stability_limit(problem: Problem, depth: int) -> Tensor:
    """Return the step size 2 / lambda_max (...) above which descent cannot settle at the top singular triplet.

    Where one triplet s of the surrogate is fitted by L balanced factors, the loss 1/2 ||X - Phi||^2 / (m n) has the
    curvature L s^(2 - 2/L) / (m n) along it. Exact for a factorization, an estimate under a mask that is observed
    evenly (mean_over="observed"). Equal step sizes in all layers.
    """
    expect_problem(problem, "surrogate")
    depth = expect_depth(depth, 1)
    surrogate = problem.surrogate()
    dense = surrogate.layout is torch.strided
    top = torch.linalg.matrix_norm(surrogate, ord=2) if dense else truncated_svd(surrogate, 1)[1][0]
    return 2 * problem.shape[0] * problem.shape[1] / (depth * top ** (2 - 2 / depth))


def outer_ratio_limit(problem: Problem, step_size: float, depth: int) -> Tensor:
    """Return the outer ratio alpha (...) above which descent cannot settle at the top singular triplet.

    Small factors grow towards s_outer^2 = alpha s_inner^2, which multiplies the curvature of `stability_limit` by
    alpha^(2 / L): the limit is (stability_limit / step_size)^(L / 2). Below 1 the step size is too large by itself.
    """
    step_size = expect_rate("step_size", step_size)
    return (stability_limit(problem, depth) / step_size) ** (depth / 2)


def escape_time(value: float, depth: int, scale: float, step_size: float) -> float:
    """Return about how many iterations a singular value s = `value` of the target takes from eps^L to its own size.

    eps^(2-L) / ((L - 2) eta s) for L > 2 and log(s / eps^2) / (2 eta s) for L = 2, eps = `scale`: L balanced, aligned
    factors, leading order in eps; `step_size` is eta on the sum loss. Raises ValueError unless eps^L < s.
    """
    value, depth = expect_number("value", value, _POSITIVE, above=0), expect_depth(depth)
    scale = expect_number("scale", scale, _POSITIVE, above=0)
    step_size = expect_number("step_size", step_size, _POSITIVE, above=0)
    if scale > max(1, value) or not 0 < scale**depth < value:  # the former, where the power is beyond all floats
        raise ValueError(f"scale is {scale} and value {value}, expected 0 < scale^{depth} < value")
    growth = scale ** (2 - depth) / (depth - 2) if depth > 2 else math.log(value / scale**2) / 2
    return growth / (step_size * value)


def aligned_values(values: Tensor, depth: int, scale: float, step_size: float, steps: int) -> Tensor:
    """Return the singular values (steps + 1, ...) of P2's compressed product while it factors its own surrogate.

    The factors of `compress_spectral` stay diagonal in the target's singular bases, so that each of its singular values
    s = `values` (...) is followed by sigma(t) = a(t)^L with a(0) = eps = `scale` and
    a(t+1) = a(t) + eta a(t)^(L-1) (s - a(t)^L). Full observation, one step size in all layers (alpha = 1);
    `step_size` is eta on the sum loss.
    """
    expect_tensor("values", values, "numbers (...)", FLOATING)
    depth = expect_depth(depth, 1)
    scale = expect_number("scale", scale, _POSITIVE, above=0)
    step_size = expect_number("step_size", step_size, _POSITIVE, above=0)
    steps = expect_integer("steps", steps, 0, MOST_RECORDS)
    path = values.new_empty(steps + 1, *values.shape)
    path[0] = scale
    for t in range(steps):
        path[t + 1] = path[t] + step_size * path[t] ** (depth - 1) * (values - path[t] ** depth)
    return path**depth
