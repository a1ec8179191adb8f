"""Completion from a list of observed entries: nothing of size m x n exists anywhere.

One step needs the residuals e_ij = (<row i of W_L, column j of P> - t_ij) / N at the observed entries, with
P = W_{L-1} ... W_1, and the two sparse products E P^T (m, k) and W_L^T E (k, n). Entries are kept by rows and by
columns; the engines sparse_numba and sparse_cuda never store the residual.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compressible.recovery.checks import PRECISIONS, expect_device, expect_dtype
from compressible.recovery.factors import multiply
from compressible.recovery.problem_base import Problem
from compressible.runtime.checks import expect

CHUNK = 2**20  # entries whose gathered factors are alive at a time in plain PyTorch


@dataclass
class Side:
    """Entries in the order of one side's lines: pointers (lines + 1,), indices (N,) of the other side, values (N,)."""

    pointers: Tensor
    indices: Tensor
    values: Tensor

    def lines(self) -> Tensor:
        """The line of each entry, (N,)."""
        counts = self.pointers.diff().long()
        return torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)


@dataclass
class Entries:
    """A sparse (m, n) matrix by rows and by columns; `order` (N,) takes values by rows to values by columns."""

    shape: tuple[int, int]
    rows: Side
    columns: Side
    order: Tensor

    def __len__(self) -> int:
        return self.rows.values.numel()

    def residual(self, left: Tensor, right: Tensor) -> Tensor:
        """Return <left_i, right_j> - t_ij (N,) by rows, from left (m, k) and right (n, k)."""
        lines, out = self.rows.lines(), torch.empty_like(self.rows.values)
        for start in range(0, len(self), CHUNK):
            part = slice(start, start + CHUNK)
            out[part] = (left[lines[part]] * right[self.rows.indices[part].long()]).sum(-1)
        return out.sub_(self.rows.values)

    def matrix(self, values: Tensor, transposed: bool = False) -> Tensor:
        """Return the sparse CSR (m, n) tensor with other `values` by rows, or its transpose."""
        side, shape = (self.columns, self.shape[::-1]) if transposed else (self.rows, self.shape)
        values = values[self.order] if transposed else values
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
            places, there = (side.pointers, side.indices), values.device
            return torch.sparse_csr_tensor(*places, values, shape, device=there, check_invariants=False)


class SparseCompletion(Problem):
    """Recover an (m, n) matrix from sparse observed entries: loss 1/2 mean over them of (X_ij - t_ij)^2.

    There is no (m, n) array, so no gradient in X, and it does not stack.

    Args:
        observed: torch sparse COO or CSR tensor or anything scipy.sparse knows, (m, n); stored zeros count as observed.
        hidden: such a matrix of other entries, whose mean is the recovery error; without it the error is NaN.
        dtype, device: those of the values unless given; float32 or float64. Integers, truth values and half types are
            taken where a dtype is given.

    Raises:
        ValueError: on shapes that differ, entries given twice, observed and hidden at once or outside of the shape,
            values that are not finite or of another type, or nothing observed.

    Example:
        >>> import scipy.sparse, torch, compressible as cd
        >>> problem = cd.SparseCompletion(scipy.sparse.eye_array(3))
        >>> zeros = [torch.zeros(2, 3, dtype=torch.float64), torch.zeros(3, 2, dtype=torch.float64)]
        >>> problem.evaluate_factors(zeros)[0].item()
        0.5

    Reference:
        P2's matrix completion, the loss of `MatrixCompletion` with mean_over="observed".
    """

    batch_shape: tuple[int, ...] = ()

    def __init__(
        self,
        observed: Any,
        hidden: Any = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        if dtype is not None:
            expect_dtype("dtype", dtype)
        expect_device(device)
        self.seen = read_entries(observed, "observed", dtype, device)
        self.unseen = None if hidden is None else read_entries(hidden, "hidden", self.seen.rows.values.dtype, device)
        if self.unseen is not None and self.unseen.shape != self.seen.shape:
            raise ValueError(f"hidden has shape {self.unseen.shape}, expected that of observed, {self.seen.shape}")
        if not len(self.seen):
            raise ValueError("observed holds no entry at all, expected at least one")
        if self.unseen is not None:
            _expect_apart(self.seen, self.unseen)
        self.shape = self.seen.shape
        self.dtype, self.device = self.seen.rows.values.dtype, self.seen.rows.values.device

    def evaluate_factors(self, factors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        right = multiply(factors[:-1])
        means = [
            torch.tensor(torch.nan, dtype=self.dtype, device=self.device)
            if entries is None
            else entries.residual(factors[-1], right.mT.contiguous()).square().mean() / 2
            for entries in (self.seen, self.unseen)
        ]
        return means[0], means[1]

    def factor_gradients(self, factors: Sequence[Tensor]) -> list[Tensor]:
        prefixes, last = [factors[0]], factors[-1]
        for factor in factors[1:-1]:
            prefixes.append(factor @ prefixes[-1])
        residual = self.seen.residual(last, prefixes[-1].mT.contiguous()) / len(self.seen)
        gradients = [self.seen.matrix(residual) @ prefixes[-1].mT]
        back = (self.seen.matrix(residual, transposed=True) @ last).mT
        for factor, below in zip(reversed(factors[1:-1]), reversed(prefixes[:-1]), strict=True):
            gradients.append(back @ below.mT)
            back = factor.mT @ back
        return [back, *reversed(gradients)]

    def surrogate(self) -> Tensor:
        """Return Omega * Phi / p as a sparse CSR (m, n) tensor; p is the observed fraction."""
        return self.seen.matrix(self.seen.rows.values * (self.shape[0] * self.shape[1] / len(self.seen)))


def read_entries(matrix: Any, name: str, dtype: torch.dtype | None, device: torch.device | str | None) -> Entries:
    """Return `matrix`, torch sparse or scipy sparse, as `Entries`; ValueError as `SparseCompletion`."""
    rows, columns, values, shape = _triplets(matrix, name)
    if values.is_complex() or values.is_meta or (dtype is None and values.dtype not in PRECISIONS):
        kinds = "real entries in float32 or float64, or a dtype that they become"
        raise ValueError(f"{name} has dtype {values.dtype}{' on meta' if values.is_meta else ''}, expected {kinds}")
    device = values.device if device is None else device
    values = values.detach().to(device, dtype or values.dtype)
    rows, columns = rows.to(device, torch.int64), columns.to(device, torch.int64)
    outside = ((rows < 0) | (rows >= shape[0]) | (columns < 0) | (columns >= shape[1])).nonzero()
    if len(outside):
        at = int(outside[0])
        raise ValueError(
            f"{name} has an entry at ({int(rows[at])}, {int(columns[at])}), expected one inside of {shape}"
        )
    if not bool(torch.isfinite(values).all()):
        bad = values[~torch.isfinite(values)][0].item()
        raise ValueError(f"{name} holds the value {bad}, expected finite entries")
    order = torch.argsort(rows * shape[1] + columns)
    rows, columns, values = rows[order], columns[order], values[order]
    twice = ((rows.diff() == 0) & (columns.diff() == 0)).nonzero()
    if len(twice):
        at = int(twice[0])
        raise ValueError(f"{name} gives entry ({int(rows[at])}, {int(columns[at])}) twice, expected each once")
    order = torch.argsort(columns, stable=True)
    by_columns = Side(_pointers(columns, shape[1]), rows[order].int(), values[order])
    return Entries(shape, Side(_pointers(rows, shape[0]), columns.int(), values), by_columns, order)


def _expect_apart(seen: Entries, unseen: Entries) -> None:
    """Raise ValueError where an entry is observed and hidden: the error would be that of what is fitted."""
    places = [entries.rows.lines() * entries.shape[1] + entries.rows.indices for entries in (seen, unseen)]  # ascending
    nearest = torch.searchsorted(places[0], places[1]).clamp(max=len(seen) - 1)
    both = places[1][places[0][nearest] == places[1]]
    if len(both):
        row, column = divmod(int(both[0]), seen.shape[1])
        raise ValueError(f"hidden has entry ({row}, {column}), which is observed, expected other entries")


def _triplets(matrix: Any, name: str) -> tuple[Tensor, Tensor, Tensor, tuple[int, int]]:
    sparse = isinstance(matrix, Tensor) and matrix.layout in (torch.sparse_coo, torch.sparse_csr) and matrix.ndim == 2
    if sparse and (matrix.layout is torch.sparse_csr or matrix.dense_dim() == 0):
        coo = matrix if matrix.layout is torch.sparse_coo else matrix.to_sparse_coo()
        indices = coo._indices()
        return indices[0], indices[1], coo._values(), (matrix.shape[0], matrix.shape[1])
    import scipy.sparse

    if scipy.sparse.issparse(matrix) and matrix.ndim == 2:
        coo = matrix.tocoo()
        kind = coo.data.dtype
        known = kind.kind in "biufc" and kind.isnative and kind.itemsize <= (16 if kind.kind == "c" else 8)
        expect(f"dtype of {name}", str(kind), known, "one that torch knows, such as float64")
        rows, columns, values = (torch.from_numpy(np.ascontiguousarray(x)) for x in (coo.row, coo.col, coo.data))
        return rows, columns, values, (int(matrix.shape[0]), int(matrix.shape[1]))
    kind = f"{type(matrix).__name__} {getattr(matrix, 'layout', '')}".strip()
    dims = f" of {matrix.ndim} dimensions" if hasattr(matrix, "ndim") else ""
    dims += f", {matrix.dense_dim()} of them dense" if sparse else ""
    raise ValueError(
        f"{name} is {kind}{dims}, expected a two-dimensional sparse COO or CSR tensor or scipy.sparse matrix"
    )


def _pointers(lines: Tensor, count: int) -> Tensor:
    pointers = torch.zeros(count + 1, dtype=torch.int32, device=lines.device)
    pointers[1:] = torch.bincount(lines, minlength=count).cumsum(0)
    return pointers
