"""Small numerics of subspaces and spectra.

A subspace is a matrix with orthonormal columns (..., d, k). Angles are in radians.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compressible.recovery.checks import (
    FLOATING,
    PRECISIONS,
    expect_finite_matrix,
    expect_matching_columns,
    expect_matrix,
    expect_pair,
    expect_tensor,
    expect_values,
)
from compressible.runtime.checks import expect, expect_integer, expect_number


@dataclass
class Evolution:
    """How the singular triplets of a (..., T, d, d) path move; the middle block is one subspace.

    values (..., T, d) descending; right and left (..., T, 2r + 1) angles in radians to the reference time: r top
    vectors one by one, the largest principal angle of the d - 2r middle ones, r bottom vectors.
    """

    values: Tensor
    right: Tensor
    left: Tensor


def svd_evolution(path: Tensor, rank: int, reference: int = 1) -> Evolution:
    """Return the `Evolution` of a path (..., T, d, d), `rank` = r moving triplets at each end of the spectrum.

    The reference time is 1 because at 0 the singular values of an orthogonal start coincide and single vectors mean
    nothing. Raises ValueError unless 2 rank < d and the reference lies on the path.
    """
    expect_tensor("path", path, "a non-empty (..., T, d, d) in float32 or float64", PRECISIONS, 3)
    expect_finite_matrix("path", path)
    size, times = min(path.shape[-2:]), path.shape[-3]
    rank = expect_integer("rank", rank, 1, (size - 1) // 2, f"an integer >= 1 with 2 rank < {size}")
    told = f"a time on the path, from 0 to {times - 1}"
    reference = expect_integer("reference", reference, 0, times - 1, told)
    left, values, right = torch.linalg.svd(path, full_matrices=False)
    return Evolution(values, _turned(right.mT, rank, reference), _turned(left, rank, reference))


def _turned(vectors: Tensor, rank: int, reference: int) -> Tensor:
    base = vectors[..., reference : reference + 1, :, :].expand_as(vectors)
    ends = vector_angles(base, vectors)
    middle = slice(rank, vectors.shape[-1] - rank)
    block = principal_angles(base[..., middle], vectors[..., middle])[..., -1:]
    return torch.cat([ends[..., :rank], block, ends[..., -rank:]], -1)


def principal_coordinates(reference: Tensor, *paths: Tensor, components: int = 2) -> tuple[list[Tensor], Tensor]:
    """Return where paths of matrices run in the plane, or space, that one of them spans best.

    `reference` (T, m, n) sets the principal components about its mean; the answer is its coordinates (T, components),
    those of each of `paths` (T_i, m, n) about the same mean, and the shares (components,) of its variance. A component
    points to where the reference goes farthest. It takes the T x T products of the points and no singular value
    decomposition of their T x (m n) entries. Raises ValueError if the reference spans fewer components.
    """
    components = expect_integer("components", components, 1)
    named = {"reference": reference, **{f"path {index} of paths": path for index, path in enumerate(paths)}}
    for name, path in named.items():
        expect_tensor(name, path, "a non-empty (T, m, n) in float32 or float64", PRECISIONS, 2)
        kind = (path.shape[1:], path.dtype, path.device)
        same = kind == (reference.shape[1:], reference.dtype, reference.device)
        expect(
            f"kind of {name}", (tuple(path.shape), path.dtype), same, f"that of the reference {tuple(reference.shape)}"
        )
    expect_finite_matrix("reference", reference)
    flat = reference.flatten(1)
    gram = flat @ flat.T
    mean = gram.mean(0, keepdim=True)  # <m, x_j>
    values, vectors = torch.linalg.eigh(gram - mean - mean.T + mean.mean())
    values, vectors = values.flip(-1).clamp(min=0), vectors.flip(-1)
    rounding = len(values) * torch.finfo(values.dtype).eps * gram.diagonal().max()
    spanned = int((values > rounding).sum())
    if not 1 <= components <= spanned:
        raise ValueError(f"components is {components}, expected 1 to the {spanned} that the reference path spans")
    basis = vectors[:, :components] / values[:components].sqrt()  # of the directions, in centred points
    basis = basis * _farthest_sign(vectors[:, :components])
    coordinates = []
    for path in (reference, *paths):
        overlaps = path.flatten(1) @ flat.T  # <y_i, x_j>
        coordinates.append((overlaps - overlaps.mean(1, keepdim=True) - mean + mean.mean()) @ basis)
    return coordinates, values[:components] / values.sum()


def principal_angles(first: Tensor, second: Tensor) -> Tensor:
    """Return the principal angles (..., min(k1, k2)) between two subspaces, ascending, in [0, pi/2].

    Bjorck and Golub: the cosine loses an angle below 1e-8 and the sine one near pi/2, so each serves where it is
    accurate. Raises ValueError unless both are (..., d, k) with the same d.
    """
    expect_pair(first, second)
    for name, basis in (("first", first), ("second", second)):
        expect_finite_matrix(name, basis)
    if first.shape[-2] != second.shape[-2]:
        dimensions = f"{first.shape[-2]} and {second.shape[-2]}"
        raise ValueError(f"subspaces first and second live in dimensions {dimensions}, expected the same")
    if first.shape[-1] < second.shape[-1]:
        first, second = second, first
    overlap = first.mT @ second
    cosines = torch.linalg.svdvals(overlap).clamp(max=1)
    sines = torch.linalg.svdvals(second - first @ overlap).flip(-1).clamp(max=1)
    return torch.where(cosines**2 < 0.5, cosines.arccos(), sines.arcsin())


def leading_angle(first: Tensor, second: Tensor, first_rank: int, second_rank: int) -> Tensor:
    """Return the largest principal angle (...) between leading singular subspaces of two matrices (..., m, n).

    Those of the first `first_rank` and `second_rank` singular vectors, the larger of the left and of the right side.
    """
    expect_matching_columns(first, second)
    for name, matrix in (("first", first), ("second", second)):
        expect_finite_matrix(name, matrix)
    most = min(first.shape[-2:])
    first_rank = expect_integer("first_rank", first_rank, 1, most)
    second_rank = expect_integer("second_rank", second_rank, 1, most)
    (left, _, right), (other_left, _, other_right) = (
        torch.linalg.svd(matrix, full_matrices=False) for matrix in (first, second)
    )
    sides = (left, other_left), (right.mT, other_right.mT)
    angles = [principal_angles(one[..., :first_rank], two[..., :second_rank])[..., -1] for one, two in sides]
    return torch.maximum(*angles)


def vector_angles(first: Tensor, second: Tensor) -> Tensor:
    """Return the angles (..., k) in [0, pi/2] between matching unit columns (..., d, k), whatever their signs."""
    expect_matching_columns(first, second)
    cosines = (first * second).sum(-2, keepdim=True)
    sines = torch.linalg.vector_norm(second - first * cosines, dim=-2)
    return torch.atan2(sines, cosines[..., 0, :].abs())


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


def _farthest_sign(columns: Tensor) -> Tensor:
    """The sign (k,) of the entry of largest size in each column (T, k)."""
    return columns.gather(0, columns.abs().argmax(0, keepdim=True))[0].sign()


def alignment(first: Tensor, second: Tensor) -> Tensor:
    """Return |<u_i, v_i>| (..., k) of matching columns: 1 where the directions agree, about 1/sqrt(d) by chance."""
    expect_matching_columns(first, second)
    return (first * second).sum(-2).abs()
