"""Masked autoencoding with a linear map (P3, Example 4.2): its expected loss, its minimisers, what they shrink.

Inputs are the columns of X (d, N), C = X X^T / N (d, d) their second moments and D the diagonal of C. A mask keeps each
entry with probability theta, independently, and the kept ones are divided by theta, as dropout does; q = 1 - theta is
the mask rate and rho = q / (1 - q). The map V (d, d) gets the masked and scaled entries; V = theta W, where W gets them
unscaled. How P3 masks could not be read, so this model of it is our assumption.

The expected loss is a ridge regression of X on itself, weighted by the second moments of the inputs:
E ||X - V (m * X) / theta||_F^2 / N = ||(I - V) C^(1/2)||_F^2 + rho ||V D^(1/2)||_F^2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compressible.recovery.checks import expect_finite_matrix
from compressible.runtime.checks import expect, expect_integer


def penalty(mask_rate: float | Tensor) -> Tensor:
    """Return rho = q / (1 - q) (...), the weight of the ridge at mask rates q (...) in [0, 1)."""
    rates = torch.as_tensor(mask_rate, dtype=torch.float64)
    expect("mask_rate", mask_rate, bool(((rates >= 0) & (rates < 1)).all()), "in [0, 1)")
    return rates / (1 - rates)


def expected_loss(weight: Tensor, moments: Tensor, mask_rate: float | Tensor) -> Tensor:
    """Return the expectation over masks of ||X - V (m * X) / theta||_F^2 / N, summed over entries of a column.

    Args:
        weight: V (..., d, d).
        moments: C (..., d, d).
        mask_rate: q, in [0, 1), a number or (...) of them.

    Returns:
        The loss (...).

    Raises:
        ValueError: For a mask rate outside [0, 1).

    Example:
        >>> import torch
        >>> from compressible.recovery.theory import masking
        >>> masking.expected_loss(torch.eye(2).double(), torch.eye(2).double(), 0.5).item()  # 0 and 2 in turn, for 1
        2.0

    Reference:
        P3, Example 4.2.
    """
    rho = penalty(mask_rate).to(moments)
    left = torch.eye(moments.shape[-1], dtype=moments.dtype, device=moments.device) - weight
    fit = ((left @ moments) * left).sum((-2, -1))
    return fit + rho * (weight.square() * _diagonal(moments)[..., None, :]).sum((-2, -1))


def best_map(moments: Tensor, mask_rate: float | Tensor, rank: int | None = None) -> Tensor:
    """Return the V of least expected loss, V = C (C + rho D)^-1, or of those of a rank at most `rank`.

    With A = C + rho D the loss is ||V A^(1/2) - C A^(-1/2)||_F^2 and a constant, so that a bottleneck of r hidden units
    gives V_r = [C A^(-1/2)]_r A^(-1/2), where [.]_r is the best approximation of rank r.

    Args:
        moments: C (..., d, d), with a positive diagonal; of full rank where the mask rate is 0.
        mask_rate: q, in [0, 1), a number or (...) of them.
        rank: r, the width of the bottleneck; None for none.

    Returns:
        V (..., d, d). W = V / (1 - q) is what papers write: theta X X^T (theta^2 X X^T + theta (1 - theta) D)^-1.

    Raises:
        ValueError: For a mask rate outside [0, 1), a rank that is no integer >= 1, or moments that are not finite.

    Example:
        >>> import torch
        >>> from compressible.recovery.theory import masking
        >>> masking.best_map(torch.diag(torch.tensor([4.0, 1.0])), 0.5).tolist()  # no entry tells of another
        [[0.5, 0.0], [0.0, 0.5]]

    Reference:
        P3, Example 4.2.
    """
    rank = None if rank is None else expect_integer("rank", rank, 1, told="None or an integer >= 1")
    expect_finite_matrix("moments", moments)
    total = moments + penalty(mask_rate).to(moments)[..., None, None] * torch.diag_embed(_diagonal(moments))
    if rank is None:
        return torch.linalg.solve(total, moments).mT
    values, vectors = torch.linalg.eigh(total)
    inverse_root = vectors * values[..., None, :].rsqrt() @ vectors.mT
    left, kept, right = torch.linalg.svd(moments @ inverse_root)
    return left[..., :rank] * kept[..., None, :rank] @ right[..., :rank, :] @ inverse_root


def shrunk_values(values: Tensor, mask_rate: float | Tensor, decay: float | Tensor = 0.0) -> Tensor:
    """Return (lambda - mu)_+ / (lambda + rho), what is left of the direction of each eigenvalue lambda of C.

    For inputs of equal second moments, D = I, where V has C's eigenvectors. mu = `decay` is a nuclear norm penalty
    mu ||V||_* beside half the loss, as decay mu / 2 (||V_1||_F^2 + ||V_2||_F^2) of the factors of V = V_2 V_1 is, if
    they are no narrower than the number of values above mu.

    Args:
        values: lambda (..., d), at least 0.
        mask_rate: q, in [0, 1), a number or (...) of them.
        decay: mu, at least 0, in units of lambda, a number or (...) of them.

    Returns:
        The singular values (..., d) of V, in the order of lambda.

    Raises:
        ValueError: For a mask rate outside [0, 1) or a negative decay.

    Example:
        >>> import torch
        >>> from compressible.recovery.theory import masking
        >>> masking.shrunk_values(torch.tensor([3.0, 1.0, 0.25]), mask_rate=0.5, decay=0.5)
        tensor([0.6250, 0.2500, 0.0000])

    Reference:
        P3, Example 4.2 with the regularisation of its Theorem 1.
    """
    mu = torch.as_tensor(decay, dtype=torch.float64).to(values)
    expect("decay", decay, bool((mu >= 0).all()), "at least 0")
    return (values - mu[..., None]).clamp(min=0) / (values + penalty(mask_rate).to(values)[..., None])


def decayed_map(moments: Tensor, mask_rate: float | Tensor, decay: float | Tensor) -> Tensor:
    """Return the V (..., d, d) of `shrunk_values` in C's eigenvectors, for moments (..., d, d) of unit diagonal.

    Raises ValueError if the diagonal is another, for which no closed form is known to us.
    """
    unit = torch.allclose(_diagonal(moments), torch.ones_like(moments[..., 0]), atol=1e-6)
    expect("the diagonal of moments", _diagonal(moments), unit, "ones")
    values, vectors = torch.linalg.eigh(moments)
    return vectors * shrunk_values(values.clamp(min=0), mask_rate, decay)[..., None, :] @ vectors.mT


def _diagonal(moments: Tensor) -> Tensor:
    return moments.diagonal(dim1=-2, dim2=-1)
