"""The two compressed starts: P1 from the first gradient, P2 from the spectrum of a surrogate.

Both return factors for `descend`. P1's are [V^T (2r, n), eps I (2r, 2r) x L, U (m, 2r)], outer factors of unit
scale (for m = n orthonormal), so `outer_ratio` is gamma <= 1. P2's are [eps V^T (k, n), eps I (k, k), ..., eps U
(m, k)], so `outer_ratio` is alpha >= 1. Same inner width 2r, different symbols: P1 guesses the `rank` r, half of it;
P2 the `width` k.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from compressible.recovery.checks import (
    PRECISIONS,
    described,
    expect_depth,
    expect_matrix,
    expect_problem,
    expect_problems_factors,
    expect_scale,
)
from compressible.recovery.factors import Factors, check_factors, product
from compressible.recovery.problem_base import DenseProblem, Problem
from compressible.recovery.truncated_svd import truncated_svd
from compressible.runtime.checks import expect, expect_integer, shown
from compressible.runtime.devices import without_autocast


@without_autocast
def compress_from_gradient(problem: Problem, factors: Sequence[Tensor], rank: int) -> Factors:
    """Return P1's compressed factors: `factors` restricted to 2r directions, for m = n those in which they move.

    The columns of V span the top r right singular vectors of g = dLoss/dW_1 and of g^T W_1, orthonormalised; U =
    W_L...W_1 V / eps^L. Only one thin SVD of g is taken: where W_1 / eps is orthogonal, the right singular vectors of
    g^T W_1 are W_1^T P / eps with P the left ones of g. For m > n the same is done to the transposed product, whose
    first factor is square.

    For m = n and a target of rank r that is seen whole, W_1 turns in these directions alone, and with outer_ratio 0
    the corollary is exact. For m != n it is a start of the same form: up to 3r directions turn, and of the two outer
    factors that of the longer side alone is orthonormal.

    Args:
        problem: what is recovered, dense or sparse.
        factors: [W_1, ..., W_L] of width max(m, n), each eps_l times a (semi-)orthogonal matrix.
        rank: r, the guessed rank (the papers' r-hat), 2 rank <= min(m, n); the inner width is 2 rank.

    Returns:
        [V^T (..., 2r, n), eps_1 I (..., 2r, 2r), ..., eps_L I, U (..., m, 2r)]: L + 2 factors, for `descend` with
        outer_ratio = gamma < 1, since the outer ones are of unit scale.

    Raises:
        ValueError: on another rank, width or start, or where the product of the scales leaves the factors' type.

    Example:
        >>> import compressible as cd
        >>> problem = cd.MatrixFactorization(cd.low_rank_target((8, 6), rank=1))
        >>> small = cd.compress_from_gradient(problem, cd.orthogonal_factors((8, 6), depth=3), rank=2)
        >>> [tuple(factor.shape) for factor in small]
        [(4, 6), (4, 4), (4, 4), (4, 4), (8, 4)]

    Reference:
        P1, Theorem 2.1 and its corollary on compression.
    """
    expect_problem(problem, "factor_gradients")
    check_factors(factors, problem.shape)
    batch = expect_problems_factors(problem, factors)
    told = f"() with {type(problem).__name__}, which takes no stack"
    expect("batch shape of factors", batch, not batch or isinstance(problem, DenseProblem), told)
    rank = _check_guess(problem, rank)
    scales = [orthogonal_scale(factor, f"W_{layer}") for layer, factor in enumerate(factors, 1)]
    if factors[0].shape[-2] != max(problem.shape):
        raise ValueError(f"width is {factors[0].shape[-2]}, expected max(m, n) = {max(problem.shape)}")
    _check_product(scales)
    gradients, end_to_end = problem.factor_gradients(factors), product(factors)
    wide = problem.shape[0] > problem.shape[1]
    if wide:  # transpose the chain: W_L^T is its square first factor
        first, gradient, scale = factors[-1].mT, gradients[-1].mT, scales[-1]
        forward = end_to_end.mT
    else:
        first, gradient, scale = factors[0], gradients[0], scales[0]
        forward = end_to_end
    inner = invariant_directions(gradient, first / scale[..., None, None], rank)
    outer = forward @ inner / torch.stack(scales).prod(0)[..., None, None]
    right, left = (outer, inner) if wide else (inner, outer)
    return [right.mT.contiguous(), *(_scaled_identity(2 * rank, eps, left) for eps in scales), left.contiguous()]


def invariant_directions(gradient: Tensor, first: Tensor, rank: int) -> Tensor:
    """Return V (..., n, 2 rank) from g = dLoss/dW_1 (..., w, n) and the orthogonal W_1 / eps (..., w, n)."""
    left, _, right = torch.linalg.svd(gradient, full_matrices=False)
    directions = torch.cat([right[..., :rank, :].mT, first.mT @ left[..., :rank]], -1)
    return torch.linalg.qr(directions).Q


@without_autocast
def compress_spectral(
    problem: Problem,
    width: int | None = None,
    depth: int = 3,
    scale: float = 1e-2,
    surrogate: Tensor | None = None,
    *,
    rank: None = None,
) -> Factors:
    """Return P2's compressed factors: `depth` of them, on the leading singular vectors of a surrogate.

    Args:
        problem: what is recovered; its `surrogate()` is taken unless another is given.
        width: k, the inner width; usually twice the true rank, at most min(m, n).
        depth: L, number of factors, at least 2.
        scale: eps > 0, usually 1e-2; every factor is eps times a matrix with orthonormal rows or columns.
        surrogate: (..., m, n) dense or (m, n) sparse CSR, whose top k singular vectors U, V are taken.
        rank: not taken; before the widths of both starts were told apart, `width` was called so.

    Returns:
        [eps V^T (..., k, n), eps I (..., k, k), ..., eps U (..., m, k)].

    Raises:
        TypeError: without a width, or with a rank.
        ValueError: on a width, depth, scale or shape that is out of range.

    Example:
        >>> import torch, compressible as cd
        >>> problem = cd.MatrixFactorization(cd.low_rank_target((8, 6), rank=2))
        >>> [tuple(factor.shape) for factor in cd.compress_spectral(problem, width=4)]
        [(4, 6), (4, 4), (8, 4)]

    Reference:
        P2, the algorithm of the compressed deep linear network (C-DLN), whose r-hat is this width.
    """
    if width is None or rank is not None:
        raise TypeError(
            f"compress_spectral got width {shown(width)} and rank {shown(rank)}, expected width alone: columns of U, V"
        )
    expect_problem(problem, "surrogate")
    most = min(problem.shape)
    width = expect_integer("width", width, 1, most, f"an integer with 1 <= width <= min(m, n) = {most}")
    depth = expect_depth(depth)
    surrogate = problem.surrogate() if surrogate is None else surrogate
    _check_surrogate(surrogate)
    scale = expect_scale(scale, surrogate.dtype)
    if tuple(surrogate.shape[-2:]) != problem.shape:
        raise ValueError(f"surrogate has shape {tuple(surrogate.shape)}, expected (..., m, n) with {problem.shape}")
    left, right = _leading(surrogate, width)
    eps = torch.full(left.shape[:-2], scale, dtype=left.dtype, device=left.device)
    inner = [_scaled_identity(width, eps, left) for _ in range(depth - 2)]
    return [scale * right.contiguous(), *inner, scale * left.contiguous()]


def orthogonal_scale(factor: Tensor, name: str = "factor") -> Tensor:
    """Return eps (...) of a factor that is eps times a (semi-)orthogonal matrix; ValueError if it is not."""
    thin = factor if factor.shape[-2] >= factor.shape[-1] else factor.mT
    gram = thin.mT @ thin
    square = gram.diagonal(dim1=-2, dim2=-1).mean(-1)
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    deviation = ((gram - square[..., None, None] * identity).abs().amax((-2, -1)) / square).max().item()
    allowed = 1e4 * torch.finfo(factor.dtype).eps
    if not deviation <= allowed:
        raise ValueError(
            f"{name} is not a multiple of an orthogonal matrix: W^T W / eps^2 differs from I by {deviation:.3g}, "
            f"expected <= {allowed:.1g} (orthogonal_factors makes such a start)"
        )
    return square.sqrt()


def _leading(surrogate: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """U (..., m, k) and V^T (..., k, n) of the top k = `width` singular triplets, dense or sparse."""
    values = surrogate if surrogate.layout is torch.strided else surrogate.values()
    if not bool(values.any()) or not bool(values.isfinite().all()):
        odd = "not finite somewhere" if bool(values.any()) else "0 everywhere"
        raise ValueError(f"surrogate is {odd}, expected observed entries from which singular vectors can be taken")
    if surrogate.layout is torch.strided:
        left, _, right = torch.linalg.svd(surrogate, full_matrices=False)
        return left[..., :width], right[..., :width, :]
    left, _, right = truncated_svd(surrogate, width)
    return left, right.mT


def _check_surrogate(surrogate: Tensor) -> None:
    sparse = isinstance(surrogate, Tensor) and surrogate.layout is torch.sparse_csr and not surrogate.is_meta
    if not sparse:
        expect_matrix("surrogate", surrogate)
    elif surrogate.ndim != 2 or surrogate.dtype not in PRECISIONS:
        raise ValueError(f"surrogate has {described(surrogate)}, expected (m, n) in float32 or float64")


def _check_product(scales: list[Tensor]) -> None:
    """Raise ValueError where eps_1 ... eps_L leaves the type: the product would be 0 or infinite, and V of nothing."""
    least, most = torch.stack(scales).double().log2().sum(0).aminmax()
    limits = torch.finfo(scales[0].dtype)
    if not math.log2(limits.tiny) <= least.item() <= most.item() <= math.log2(limits.max):
        told = f"a product from {limits.tiny:.2g} to {limits.max:.2g}, which {scales[0].dtype} holds"
        raise ValueError(f"factors have scales whose product is 2^{least.item():.0f}, expected {told}")


def _check_guess(problem: Problem, rank: int) -> int:
    half = min(problem.shape) // 2
    told = f"an integer with 1 <= rank and 2 rank <= {min(problem.shape)}"
    return expect_integer("rank", rank, 1, half, told)


def _scaled_identity(size: int, eps: Tensor, like: Tensor) -> Tensor:
    identity = torch.eye(size, dtype=like.dtype, device=like.device)
    return eps[..., None, None] * identity.expand(*like.shape[:-2], size, size)
