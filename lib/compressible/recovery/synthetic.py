"""Synthetic data: what recovery problems are drawn from, low-rank targets, masks and measurement operators.

All on the CPU, so that a seed means the same problem on every device; moved to `device` afterwards. Masks: masks.py.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from compressible.recovery.checks import expect_draw, expect_dtype, expect_entries
from compressible.recovery.masks import inclusion_probability, random_mask
from compressible.runtime.checks import expect_batch_shape, expect_generator, expect_integer, expect_shape

__all__ = ["gaussian_operators", "inclusion_probability", "low_rank_target", "random_mask", "sparse_low_rank"]


def low_rank_target(
    shape: tuple[int, int],
    rank: int,
    batch_shape: tuple[int, ...] = (),
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str | None = None,
) -> Tensor:
    """Return a Gaussian matrix cut to its largest singular triplets, values kept (about 2 sqrt(d) for d x d).

    Args:
        shape: (m, n).
        rank: r, from 1 to min(m, n).
        batch_shape: leading dimensions, a target for each problem of a stack.
        generator: of the draw.
        dtype, device: of the target; it is drawn and cut in float64 on the CPU.

    Returns:
        Phi (..., m, n) of exact rank r.

    Raises:
        ValueError: if the rank is out of range, or for another kind of value, as all of this file.

    Example:
        >>> import torch, compressible as cd
        >>> torch.linalg.matrix_rank(cd.low_rank_target((8, 6), rank=2)).item()
        2

    Reference:
        The target of all synthetic figures of P1 and P2.
    """
    shape = expect_shape(shape)
    rank = expect_integer("rank", rank, 1, min(shape), f"an integer with 1 <= rank <= min(m, n) = {min(shape)}")
    batch_shape = expect_batch_shape(batch_shape)
    expect_draw((*batch_shape, *shape), generator, dtype, device)
    gaussian = torch.randn(*batch_shape, *shape, generator=generator, dtype=torch.float64, device="cpu")
    left, values, right = torch.linalg.svd(gaussian, full_matrices=False)
    cut = (left[..., :rank] * values[..., None, :rank]) @ right[..., :rank, :]
    return cut.to(dtype=dtype, device=device)


def sparse_low_rank(
    shape: tuple[int, int],
    rank: int,
    count: int,
    generator: torch.Generator | None = None,
    hidden: int | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """Return observed and hidden entries of one random matrix of exact rank, never the matrix itself.

    The matrix is A B^T / sqrt(r) with Gaussian A (m, r) and B (n, r): entries of variance 1, singular values about
    sqrt(m n / r). All entries are drawn uniformly without replacement, so that none is both observed and hidden.

    Args:
        shape: (m, n).
        rank: r, from 1 to min(m, n).
        count: number of observed entries.
        generator: of the draw.
        hidden: number of hidden entries, for the recovery error; count / 10 unless given.
        dtype: of the entries.

    Returns:
        Two sparse COO tensors (m, n) on the CPU, for `SparseCompletion`.

    Raises:
        ValueError: if the rank is out of range or if there are not so many entries.

    Example:
        >>> import compressible as cd
        >>> observed, hidden = cd.sparse_low_rank((1000, 1000), rank=2, count=5000)
        >>> observed._nnz(), hidden._nnz()
        (5000, 500)
    """
    size = math.prod(shape := expect_shape(shape))
    expect_entries("shape", shape, most=2**62)  # places are numbered; there is no such array
    expect_generator(generator)
    expect_dtype("dtype", dtype)
    rank = expect_integer("rank", rank, 1, min(shape), f"1 <= rank <= min(m, n) = {min(shape)}")
    count = expect_integer("count", count, 1)
    hidden = expect_integer("hidden", max(count // 10, 1) if hidden is None else hidden, 1)
    expect_entries("count, hidden, and rank on shape", (count + hidden + rank * sum(shape),))
    if count + hidden > size:
        raise ValueError(f"count is {count} and hidden {hidden}, expected at most {size} together")
    left, right = (torch.randn(side, rank, generator=generator, dtype=torch.float64, device="cpu") for side in shape)
    left /= math.sqrt(rank)
    places = _distinct(size, count + hidden, generator)
    parts = (places[:count], places[count:])
    observed, unobserved = (_entries_at(part.sort().values, left, right, shape, dtype) for part in parts)
    return observed, unobserved


def gaussian_operators(
    count: int,
    shape: tuple[int, int],
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str | None = None,
) -> Tensor:
    """Return measurement matrices with entries N(0, 1/k^2): the sum of vec(A_i) vec(A_i)^T is about I / k.

    Args:
        count: k, number of measurements, at least 1.
        shape: (m, n).
        generator: of the draw.
        dtype, device: of the operators; P2's 4000 x 200 x 200 take 1.3 GB in float64.

    Returns:
        A (k, m, n), for `MatrixSensing`.

    Raises:
        ValueError: if k < 1.

    Example:
        >>> import compressible as cd
        >>> cd.gaussian_operators(50, (8, 6)).shape
        torch.Size([50, 8, 6])

    Reference:
        P2's matrix sensing.
    """
    count = expect_integer("count", count, 1, told="at least one measurement")
    shape = expect_shape(shape)
    expect_draw((count, *shape), generator, dtype, device)
    gaussian = torch.randn(count, *shape, generator=generator, dtype=torch.float64, device="cpu")
    return gaussian.div_(count).to(dtype=dtype, device=device)


def _distinct(size: int, count: int, generator: torch.Generator | None) -> Tensor:
    """`count` distinct numbers below `size`, uniform and in random order; memory of the order of `count`."""
    if 2 * count >= size:
        return torch.randperm(size, generator=generator, device="cpu")[:count]
    found = torch.empty(0, dtype=torch.int64, device="cpu")
    while len(found) < count:  # what is left of draws with replacement is a uniform set of its size
        extra = torch.randint(size, (count - len(found) + count // 50 + 16,), generator=generator, device="cpu")
        found = torch.unique(torch.cat([found, extra]))
    return found[torch.randperm(len(found), generator=generator, device="cpu")[:count]]


def _entries_at(places: Tensor, left: Tensor, right: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    indices = torch.stack([places // shape[1], places % shape[1]])
    values = torch.empty(len(places), dtype=dtype, device="cpu")
    for start in range(0, len(places), 2**20):  # the gathered factors of a part at a time
        part = slice(start, start + 2**20)
        values[part] = (left[indices[0, part]] * right[indices[1, part]]).sum(-1)
    return torch.sparse_coo_tensor(indices, values, shape, device="cpu", is_coalesced=True, check_invariants=False)
