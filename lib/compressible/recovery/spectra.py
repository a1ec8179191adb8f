"""Small numerics of spectra: singular values, and how many of them there are in effect.

Those of subspaces, in subspaces.py, are had from here, too: `cd.spectra` is both.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compressible.recovery.checks import FLOATING, PRECISIONS, expect_finite_matrix, expect_matrix, expect_values
from compressible.recovery.subspaces import (
    Evolution,
    alignment,
    leading_angle,
    principal_angles,
    principal_coordinates,
    svd_evolution,
    vector_angles,
)
from compressible.runtime.checks import expect_integer, expect_number

__all__ = [
    "Evolution",
    "alignment",
    "effective_count",
    "effective_rank",
    "leading_angle",
    "leading_share",
    "principal_angles",
    "principal_coordinates",
    "singular_values",
    "stable_count",
    "stable_rank",
    "svd_evolution",
    "vector_angles",
]


def singular_values(matrix: Tensor) -> Tensor:
    """Return all singular values, descending, in float64, from the Gram matrix of the smaller side.

    Many times faster than a decomposition where a matrix is long or there are many, above all on a GPU; what lies below
    1e-8 of the largest value is rounding. That is less than float32 resolves.

    Args:
        matrix: (..., m, n), of any float type.

    Returns:
        (..., min(m, n)), not negative; NaN for a matrix with an entry that is not finite, such as a run that diverged,
        or whose square is not, beyond 1e154; 0 for values whose square is, below 1e-162.

    Raises:
        ValueError: for anything but a matrix of floating-point numbers.
        torch.linalg.LinAlgError: PyTorch's own, if the eigenvalues do not converge.

    Example:
        >>> import torch, compressible as cd
        >>> cd.spectra.singular_values(torch.tensor([[3.0, 0.0], [0.0, -4.0], [0.0, 0.0]])).tolist()
        [4.0, 3.0]
    """
    expect_matrix("matrix", matrix, FLOATING)
    matrix = matrix.double()
    gram = matrix @ matrix.mT if matrix.shape[-2] < matrix.shape[-1] else matrix.mT @ matrix
    finite = gram.isfinite().all(-1).all(-1)[..., None]
    values = torch.linalg.eigvalsh(torch.where(finite[..., None], gram, 0)).flip(-1).clamp(min=0).sqrt()
    return torch.where(finite, values, torch.nan)


def leading_share(values: Tensor, count: int, power: float = 2) -> Tensor:
    """Return the share of sum s_i^power that the `count` largest singular values hold: energy for power 2.

    Args:
        values: (..., k) >= 0, descending.
        count: how many are leading, at least 1; all of them if there are fewer.
        power: 2 for the share of ||X||_F^2, 1 for that of the nuclear norm.

    Returns:
        (...) in [0, 1]; NaN for a matrix of zeros, which has none.

    Raises:
        ValueError: if `count` or `power` is out of range, or a value below 0.

    Example:
        >>> import torch, compressible as cd
        >>> round(cd.spectra.leading_share(torch.tensor([4.0, 3.0]), 1).item(), 4)
        0.64

    Reference:
        P2 and P3, Figure 1 (version 1): few singular values of an update hold nearly all of it.
    """
    expect_values(values)
    count = expect_integer("count", count, 1)
    power = expect_number("power", power, "a finite number > 0", above=0)
    plain, scaled = _wide(values) ** power, _scaled(values) ** power
    largest, limits = plain.amax(-1), torch.finfo(plain.dtype)
    held = (largest < limits.max / values.shape[-1]) & (largest > limits.tiny / limits.eps)  # else powers lost digits
    shares = (powers[..., :count].sum(-1) / powers.sum(-1) for powers in (plain, scaled))
    return _as_given(torch.where(held, next(shares), next(shares)), values)


def effective_count(values: Tensor) -> Tensor:
    """Return how many of the values (..., k) >= 0 there are in effect: exp of the entropy of their shares.

    k equal values count k, one value beside zeros counts 1, none counts 0. It is `effective_rank` where the values are
    singular values.
    """
    expect_values(values)
    scaled = _scaled(values)
    total = scaled.sum(-1, keepdim=True)
    shares = scaled / torch.where(total == 0, 1, total)
    return _as_given(torch.where(total[..., 0] == 0, 0, torch.special.entr(shares).sum(-1).exp()), values)


def effective_rank(matrix: Tensor) -> Tensor:
    """Return exp of the entropy of the singular values divided by their sum.

    A rank that small values raise little, without a threshold; it does not change with the matrix's scale.

    Args:
        matrix: (..., m, n).

    Returns:
        (...), between 1 and the rank; 0 for a matrix of zeros.

    Raises:
        ValueError: for anything but a matrix of float32 or float64, or if an entry is not finite.

    Example:
        >>> import torch, compressible as cd
        >>> round(cd.spectra.effective_rank(torch.diag(torch.tensor([1.0, 1.0, 0.0]))).item(), 4)
        2.0

    Reference:
        Roy and Vetterli, "The effective rank", EUSIPCO 2007; P3, Figure 2 (version 1) shows what falls.
    """
    expect_finite_matrix("matrix", matrix)
    return effective_count(torch.linalg.svdvals(matrix))


def stable_count(values: Tensor) -> Tensor:
    """Return the sum of squares of the values (..., k) >= 0 over the largest square; 0 where all are zero."""
    expect_values(values)
    squares = _scaled(values).square()
    top = squares.amax(-1)
    return _as_given(squares.sum(-1) / torch.where(top == 0, 1, top), values)


def stable_rank(matrix: Tensor) -> Tensor:
    """Return ||X||_F^2 / ||X||_2^2, which the largest singular value sets more than `effective_rank`.

    Args:
        matrix: (..., m, n).

    Returns:
        (...), between 1 and the rank; 0 for a matrix of zeros.

    Raises:
        ValueError: for anything but a matrix of float32 or float64, or if an entry is not finite.

    Example:
        >>> import torch, compressible as cd
        >>> round(cd.spectra.stable_rank(torch.diag(torch.tensor([2.0, 1.0, 1.0]))).item(), 4)
        1.5

    Reference:
        Rudelson and Vershynin, "Sampling from large matrices", J. ACM 2007 (there the numerical rank).
    """
    expect_finite_matrix("matrix", matrix)
    return stable_count(torch.linalg.svdvals(matrix))


def _wide(values: Tensor) -> Tensor:
    """Values in a precision that holds their powers: integers wrap, half types end at 65504 or have 3 digits."""
    return values if values.dtype in PRECISIONS else values.double()


def _scaled(values: Tensor) -> Tensor:
    """Values (..., k) over the power of two next above the largest, which changes no digit and keeps squares finite."""
    wide = _wide(values)
    top = wide.detach().amax(-1, keepdim=True)
    mantissa, _ = torch.frexp(top)
    return wide / torch.where(top == 0, 1, top / mantissa)


def _as_given(count: Tensor, values: Tensor) -> Tensor:
    return count.to(values.dtype if values.is_floating_point() else torch.get_default_dtype())
