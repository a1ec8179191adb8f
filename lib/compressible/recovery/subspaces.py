"""Small numerics of subspaces: angles between them, and how those of a path of matrices turn.

A subspace is a matrix with orthonormal columns (..., d, k). Angles are in radians.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compressible.recovery.checks import (
    PRECISIONS,
    expect_finite_matrix,
    expect_matching_columns,
    expect_pair,
    expect_tensor,
)
from compressible.runtime.checks import expect, expect_integer


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


def _farthest_sign(columns: Tensor) -> Tensor:
    """The sign (k,) of the entry of largest size in each column (T, k)."""
    return columns.gather(0, columns.abs().argmax(0, keepdim=True))[0].sign()


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


def alignment(first: Tensor, second: Tensor) -> Tensor:
    """Return |<u_i, v_i>| (..., k) of matching columns: 1 where the directions agree, about 1/sqrt(d) by chance."""
    expect_matching_columns(first, second)
    return (first * second).sum(-2).abs()
