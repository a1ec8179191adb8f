"""P1's Theorem 2.1 at its edges: bases of what stands still, momentum, and how far a spoiled setting can lead away.

The theorem: orthogonal starts, a target of rank r, white inputs, plain gradient descent; then d - 2r directions of each
layer share one value rho_l(t) and never turn. `step_size` is eta on the sum loss 1/2 ||W_L...W_1 - Phi||_F^2 throughout
(for a mean over N entries: the step over N).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from scipy.optimize import brentq
from torch import Tensor

from compressible.recovery.checks import expect_finite_matrix
from compressible.recovery.factors import product
from compressible.runtime.checks import is_integer


def middle_bases(target: Tensor, factors: Sequence[Tensor], rank: int) -> list[Tensor]:
    """Return orthonormal bases of the directions in which no layer ever moves, those of the theorem.

    V^(1) spans what null(Phi) and null(Phi^T W_L...W_1) share, and V^(l+1) = W_l V^(l) / eps_l. For m = n, then, at
    every iteration W_l V^(l) = rho_l V^(l+1) and W_l^T V^(l+1) = rho_l V^(l). So it is for r = m < n, where V^(L+1) is
    zero and so is rho_L. For r < m < n it is not: W_L^T W_L / eps_L^2 is a projection, up to 3r directions move, and
    these bases hold r of them.

    Args:
        target: Phi (..., m, n) of rank r; m = n, or r = m < n.
        factors: [W_1 (..., n, n), ..., W_L (..., m, n)] at the start, each eps_l times a (semi-)orthogonal matrix.
        rank: r, 2 rank < n.

    Returns:
        [V^(1), ..., V^(L)] (..., n, n - 2r) and V^(L+1) (..., m, n - 2r).

    Raises:
        ValueError: where 2 rank >= n, so that nothing would stand still, or m > n.

    Example:
        >>> import compressible as cd
        >>> start = cd.orthogonal_factors((8, 8), depth=3)
        >>> [tuple(basis.shape) for basis in middle_bases(cd.low_rank_target((8, 8), rank=2), start, rank=2)]
        [(8, 4), (8, 4), (8, 4), (8, 4)]

    Reference:
        P1, Theorem 2.1; the null spaces are those of G = (W_L...W_2)^T Phi and of G^T W_1.
    """
    expect_finite_matrix("target", target)
    rows, columns = target.shape[-2:]
    if not is_integer(rank) or not 1 <= rank < columns / 2 or rows > columns:
        told = "expected an integer with 1 <= rank < n / 2, and m <= n"
        raise ValueError(f"rank is {rank} and shape {(rows, columns)}, {told}")
    left, _, right = torch.linalg.svd(target, full_matrices=False)
    moved = [right[..., :rank, :].mT, product(factors).mT @ left[..., :rank]]
    scales = [torch.linalg.matrix_norm(factor, ord=2)[..., None, None] for factor in factors]
    moved[1] = moved[1] / torch.stack(scales).prod(0)
    bases = [torch.linalg.qr(torch.cat(moved, -1), mode="complete").Q[..., 2 * rank :]]
    for factor, scale in zip(factors, scales, strict=True):
        bases.append(factor @ bases[-1] / scale)
    return bases


def momentum_rho(
    scales: Sequence[float],
    step_size: float,
    steps: int,
    momentum: float,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    polar: bool = False,
) -> Tensor:
    """Return rho_l(t), the value that d - 2r singular values of layer l share, under gradient descent with momentum.

    On those directions the gradient of W_l is g_l = rho_l (lambda + prod_{k != l} rho_k^2) times a fixed isometry. The
    buffer is a sum of gradients, so it is v_l times the same isometry: v_l <- mu v_l + g_l, and rho_l <- rho_l -
    eta v_l (heavy ball) or rho_l - eta (g_l + mu v_l) (Nesterov), as torch.optim.SGD has them. The polar factor of a
    multiple of an isometry is its sign times that isometry, so Muon's step is eta times the sign of that move.

    Args:
        scales: eps_1, ..., eps_L of the orthogonal start; 0 for the last where m < n.
        step_size: eta > 0 on the sum loss; with `polar` Muon's rate, which no loss scales.
        steps: iterations.
        momentum: mu in [0, 1), usually 0.9; 0 is plain gradient descent, `invariants.rho`.
        nesterov: whether the gradient is looked at ahead.
        weight_decay: lambda >= 0 on the sum loss.
        polar: whether the step is the exact polar factor of the move, as in Muon.

    Returns:
        rho (steps + 1, L), float64.

    Raises:
        ValueError: on a momentum outside [0, 1).

    Example:
        >>> [round(value, 4) for value in momentum_rho([1.0, 1.0, 1.0], 1 / 900, 50, momentum=0.9)[-1].tolist()]
        [0.736, 0.736, 0.736]

    Reference:
        P1, Theorem 2.1, without momentum; the authors' code draws heavy ball and states nothing.
    """
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum is {momentum}, expected a number in [0, 1)")
    values, buffers = [float(scale) for scale in scales], [0.0] * len(scales)
    path = [values]
    for _ in range(steps):
        squares = [value * value for value in values]
        others = [math.prod(squares[:layer] + squares[layer + 1 :]) for layer in range(len(squares))]
        slopes = [value * (weight_decay + other) for value, other in zip(values, others, strict=True)]
        buffers = [momentum * buffer + slope for buffer, slope in zip(buffers, slopes, strict=True)]
        ahead = [g + momentum * v if nesterov else v for g, v in zip(slopes, buffers, strict=True)]
        moves = [math.copysign(1.0, move) if move else 0.0 for move in ahead] if polar else ahead
        values = [value - step_size * move for value, move in zip(values, moves, strict=True)]
        path.append(values)
    return torch.tensor(path, dtype=torch.float64, device="cpu")


def departure_bound(
    largest: Tensor,
    residual: tuple[Tensor, Tensor],
    depth: int,
    step_size: float,
    start: Tensor | float = 0.0,
    tail: Tensor | float = 0.0,
    skew: Tensor | float = 0.0,
) -> Tensor:
    """Return a bound on max_l ||W_l(t) - W*_l(t)||_F, how far a spoiled run can be from the theorem's run W*.

    Spoiled are the start, W_l(0) - W*_l(0) of norm at most `start`; the target, Phi + T with ||T||_F = `tail`; the
    inputs, of second moment I + H with ||H||_2 = `skew`. With m = max_l ||W*_l||_2 and E* the residual of the
    theorem's run, D its value now and p = (m + D)^(L-1), telescoping the products gives the discrete Gronwall step

    D <- D + eta [(p - m^(L-1)) ||E*||_2 + p (f + (1 + skew) tail + skew (||E*||_F + f))],  f = (m + D)^L - m^L.

    It is linear in (start, tail, skew) while D is small, needs the theorem's run alone, and soon grows past use where
    eta t times the curvature is above a few units. A wrong singular value, block or subspace follows by Weyl and Wedin.

    Args:
        largest: m (T, ...), the largest singular value of any layer of the theorem's run at iterations 0, ..., T - 1.
        residual: ||W*_L...W*_1 - Phi||_2 and the same in the Frobenius norm, (T, ...) each.
        depth: L.
        step_size: eta > 0 on the sum loss.
        start, tail, skew: what is spoiled; numbers or tensors that broadcast with (...).

    Returns:
        D (T, ...).

    Raises:
        ValueError: unless all are finite and not negative.

    Example:
        >>> import torch
        >>> flat = torch.ones(3, dtype=torch.float64)
        >>> [round(value, 4) for value in departure_bound(flat, (flat, flat), 2, 0.1, tail=0.01).tolist()]
        [0.0, 0.001, 0.0023]

    Reference:
        This project; P1, Theorem 2.1 is the case start = tail = skew = 0, in which it is zero.
    """
    spoiled = [torch.as_tensor(value, dtype=largest.dtype, device=largest.device) for value in (start, tail, skew)]
    if not all(bool((torch.isfinite(value) & (value >= 0)).all()) for value in spoiled):
        raise ValueError(f"start, tail and skew are {start}, {tail}, {skew}, expected finite numbers >= 0")
    first, tail, skew = torch.broadcast_tensors(*spoiled)
    path = [first.expand(torch.broadcast_shapes(first.shape, largest.shape[1:]))]
    for m, spectral, frobenius in zip(largest[:-1], residual[0][:-1], residual[1][:-1], strict=True):
        now = path[-1]
        outer = (m + now) ** (depth - 1)
        drift = (m + now) ** depth - m**depth
        pushed = (outer - m ** (depth - 1)) * spectral
        pushed = pushed + outer * (drift + (1 + skew) * tail + skew * (frobenius + drift))
        path.append((now + step_size * pushed).nan_to_num(nan=math.inf, posinf=math.inf))  # past use, and so it stays
    return torch.stack(path)


def energy_outside(matrix: Tensor, directions: int) -> Tensor:
    """Return (sum_{i > k} sigma_i^2)^(1/2) (...), what the best k = `directions` triplets leave of (..., m, n).

    No product of inner width k is nearer to the matrix (Eckart and Young).
    """
    return torch.linalg.vector_norm(torch.linalg.svdvals(matrix)[..., directions:], dim=-1)


def frozen_floor(target: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Return min_M ||Phi - U M V^T||_F (...), what frozen outer factors U (..., m, k) and V^T (..., k, n) leave out.

    With orthonormal columns it is (||Phi||^2 - ||U^T Phi V||^2)^(1/2): a compressed network with frozen outer factors
    is nowhere nearer to its target, at any iteration, and converges to U U^T Phi V V^T.
    """
    inside = left @ (left.mT @ target @ right.mT) @ right
    return torch.linalg.matrix_norm(target - inside)


def quarter_circle_value(share: float) -> float:
    """Return the singular value below which `share` in (0, 1) of those of a large square Gaussian matrix lie.

    Entries of variance 1 / d: the values fill (0, 2) with density (4 - x^2)^(1/2) / pi, the quarter-circle law, so that
    a Gaussian start has no two equal singular values, let alone d - 2r. Raises ValueError for another share.
    """
    if not 0 < share < 1:
        raise ValueError(f"share is {share}, expected a number in (0, 1)")
    return float(brentq(lambda x: (x * math.sqrt(4 - x * x) / 2 + 2 * math.asin(x / 2)) / math.pi - share, 0.0, 2.0))
