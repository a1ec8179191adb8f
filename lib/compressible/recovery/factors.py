"""A deep factorization as a plain list [W_1, ..., W_L], product W_L ... W_1.

W_1 is (..., w, n), the inner W_l are (..., w, w), W_L is (..., m, w); any leading batch dimensions.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import pad

from compressible.recovery.checks import (
    FLOATING,
    expect_depth,
    expect_device,
    expect_dtype,
    expect_entries,
    expect_factors,
    expect_scale,
)
from compressible.runtime.checks import (
    expect,
    expect_batch_shape,
    expect_generator,
    expect_integer,
    expect_shape,
)

Factors = list[Tensor]


def orthogonal_factors(
    shape: tuple[int, int],
    depth: int = 3,
    width: int | None = None,
    scale: float = 1e-3,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str | None = None,
    batch_shape: tuple[int, ...] = (),
) -> Factors:
    """Return factors that are `scale` times random (semi-)orthogonal matrices, uniform by Haar's measure.

    Args:
        shape: (m, n) of the product.
        depth: L, number of factors, at least 2.
        width: w, inner width; max(m, n) unless given.
        scale: the papers' eps > 0, usually 1e-3 to 1.
        generator: of the draw, which is made on the CPU, so that a seed means the same start on every device.
        dtype, device: of the factors.
        batch_shape: leading dimensions, a start for each problem of a stack.

    Returns:
        [W_1 (..., w, n), W_2 (..., w, w), ..., W_L (..., m, w)].

    Raises:
        ValueError: on a depth, width, shape or scale that is out of range, or another kind of value.

    Example:
        >>> import compressible as cd
        >>> [tuple(factor.shape) for factor in cd.orthogonal_factors((8, 6), depth=3, width=4)]
        [(4, 6), (4, 4), (8, 4)]

    Reference:
        P1, Theorem 2.1, whose start this is where m = n = w; P2's original networks start so, too.
    """
    m, n = expect_shape(shape)
    width = max(m, n) if width is None else width
    depth, width = expect_depth(depth), expect_integer("width", width, 1)
    batch_shape = expect_batch_shape(batch_shape)
    expect_entries("batch_shape, depth, shape and width", (*batch_shape, depth, max(m, width), max(n, width)))
    expect_generator(generator)
    expect_dtype("dtype", dtype, FLOATING)
    scale = expect_scale(scale, dtype)
    expect_device(device)
    sizes = [n, *[width] * (depth - 1), m]
    orthogonal = [_orthogonal(*batch_shape, rows, cols, generator=generator) for cols, rows in pairwise(sizes)]
    return [(scale * factor).to(dtype=dtype, device=device) for factor in orthogonal]


def product(factors: Sequence[Tensor]) -> Tensor:
    """Return the end-to-end product W_L ... W_1.

    Args:
        factors: [W_1 (..., w, n), ..., W_L (..., m, w)], the factor that acts first coming first.

    Returns:
        X (..., m, n).

    Raises:
        ValueError: where there is no factor at all, the widths of neighbours differ, or one is no matrix.

    Example:
        >>> import compressible as cd
        >>> cd.product(cd.orthogonal_factors((8, 6), depth=3)).shape
        torch.Size([8, 6])
    """
    expect_factors(factors, dtypes=None)
    return multiply(factors)


def multiply(factors: Sequence[Tensor]) -> Tensor:
    """Return W_L ... W_1 of factors that have been checked, as those of a descent have."""
    result = factors[0]
    for factor in factors[1:]:
        result = factor @ result
    return result


def stack_factors(runs: Sequence[Sequence[Tensor]]) -> Factors:
    """Stack factorizations of one depth and shape, padded with zeros to the largest width.

    The padding is exact: zero rows and columns receive zero gradients, so each run goes as it would alone.

    Args:
        runs: S lists [W_1, ..., W_L] of one depth, widths as they like.

    Returns:
        [W_1 (S, ..., w, n), ..., W_L (S, ..., m, w)] with w the largest width.

    Raises:
        ValueError: where depths, outer shapes, types or devices differ.

    Example:
        >>> import compressible as cd
        >>> narrow, wide = (cd.orthogonal_factors((8, 6), width=width) for width in (2, 5))
        >>> cd.stack_factors([narrow, wide])[0].shape
        torch.Size([2, 5, 6])
    """
    odd = isinstance(runs, (str, bytes, Mapping, Set)) or hasattr(runs, "dtype")
    listed = isinstance(runs, Iterable) and not odd
    expect("type of runs", type(runs).__name__, listed, "a list of runs, each a list [W_1, ..., W_L] of tensors")
    runs = list(runs)
    expect("runs", runs, len(runs) > 0, "at least one list [W_1, ..., W_L] of tensors")
    for index, run in enumerate(runs):
        expect_factors(run, f"run {index} of runs", None)
    depths = {len(run) for run in runs}
    ends = {(run[-1].shape[-2], run[0].shape[-1]) for run in runs}
    kinds = {
        (*map(str, (f.dtype, f.device, tuple(f.shape[:-2]))), layer) for run in runs for layer, f in enumerate(run)
    }
    if len(depths) != 1 or len(ends) != 1:
        raise ValueError(f"cannot stack depths {sorted(depths)} and shapes {sorted(ends)}, expected one of each")
    if len(kinds) != len(runs[0]):
        told = "expected one type, device and batch shape of each layer"
        raise ValueError(f"cannot stack runs of kinds {sorted({kind[:3] for kind in kinds})}, {told}")
    stacked = []
    for layer in zip(*runs, strict=True):
        rows, columns = (max(factor.shape[axis] for factor in layer) for axis in (-2, -1))
        padded = [pad(f, (0, columns - f.shape[-1], 0, rows - f.shape[-2])) for f in layer]
        stacked.append(torch.stack(padded))
    return stacked


def check_factors(factors: Sequence[Tensor], shape: tuple[int, int]) -> None:
    """Raise ValueError unless two or more chain into an (m, n) = `shape` product, in one dtype and on one device."""
    told = f"L >= 2 that multiply to {tuple(shape)}"
    expect_factors(factors, expected=told)
    sizes = [tuple(factor.shape[-2:]) for factor in factors]
    if len(sizes) < 2 or (sizes[-1][0], sizes[0][1]) != tuple(shape):
        raise ValueError(f"factors W_1..W_L have shapes {sizes}, expected {told}")


def _orthogonal(*size: int, generator: torch.Generator | None) -> Tensor:
    """Haar (semi-)orthogonal (..., rows, columns): QR of a Gaussian with the signs of R's diagonal put right."""
    *batch, rows, columns = size
    sizes = (*batch, max(rows, columns), min(rows, columns))
    gaussian = torch.randn(sizes, generator=generator, dtype=torch.float64, device="cpu")
    q, r = torch.linalg.qr(gaussian)
    q = q * r.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)
    return q if rows >= columns else q.mT.contiguous()
