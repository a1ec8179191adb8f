"""Where the factors of a layer start: at random, or on singular directions of what the untrained network shows.

Each returns [W_1 (w, n), ..., W_L (m, w)] in float64 on the CPU, so that a seed means the same start on every device.
The papers do not say which surrogate P2's networks were started from; "gradient" is the natural one (the top singular
vectors of -dLoss/dW, as its matrix problems start from those of a surrogate of the target), "weights_and_gradient"
that of the successor paper.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compressible.recovery.compression import invariant_directions
from compressible.recovery.factors import Factors, orthogonal_factors

STARTS = ("orthogonal", "gradient", "weights_and_gradient")


def orthogonal(shape: tuple[int, int], depth: int, width: int, scale: float, generator: torch.Generator) -> Factors:
    """Return `scale` times random (thin) orthogonal factors: the authors' helper. The product has scale^L throughout.

    At full width every singular value of every factor is `scale`; of the product, scale^L.
    """
    return orthogonal_factors(shape, depth, width, scale, generator)


def from_gradient(gradient: Tensor, depth: int, width: int, scale: float) -> Factors:
    """Return [eps V^T, eps I, ..., eps U] with U, V the top w singular vectors of -dLoss/dW (m, n), eps = `scale`.

    The product eps^L U V^T is thus a step down the loss: the sign is that of the surrogate (P2, the C-DLN).
    """
    left, _, right = torch.linalg.svd(-gradient.double().cpu(), full_matrices=False)
    inner = [scale * torch.eye(width, dtype=torch.float64) for _ in range(depth - 2)]
    return [scale * right[:width].contiguous(), *inner, scale * left[:, :width].contiguous()]


def from_weights_and_gradient(weight: Tensor, gradient: Tensor, depth: int, width: int) -> Factors:
    """Return [V^T, ..., U] with orthonormal outer factors, between them the projection U^T W V of the initial weights.

    V spans the top r = w / 2 right singular vectors of the gradient and the initial weights' pull-back of the left
    ones (P1's 2r directions), U the same of the other side. With several inner factors the projection's singular
    values are shared evenly between them, so that the product is U U^T W V V^T at every depth: there is no scale.
    """
    weight, gradient = weight.double().cpu(), gradient.double().cpu()
    right = invariant_directions(gradient, weight, width // 2)
    left = invariant_directions(gradient.mT, weight.mT, width // 2)
    return [right.mT.contiguous(), *_shared(left.mT @ weight @ right, depth - 2), left.contiguous()]


def _shared(matrix: Tensor, count: int) -> Factors:
    """`count` factors whose product is `matrix` (w, w), each with the count-th root of its singular values."""
    if count == 1:
        return [matrix]
    left, values, right = torch.linalg.svd(matrix)
    root = values ** (1 / count)
    return [root[:, None] * right, *(root.diag() for _ in range(count - 2)), left * root]
