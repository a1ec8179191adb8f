"""The leading singular triplets of a sparse matrix: Lanczos on the CPU, a randomised range finder on CUDA."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import torch
from torch import Tensor


def truncated_svd(matrix: Tensor, rank: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Return the top `rank` singular triplets U (m, k), S (k,), V (n, k) of a sparse CSR tensor, descending.

    Lanczos iteration by scipy on the CPU, accurate to round-off, from a seeded vector; where it starts anew, since
    `rank` is above the matrix's own or values are equal, from seeded ones, too (with scipy before 1.17 from ARPACK's
    own, which differ from call to call). On CUDA a randomised range finder with 8 power iterations (Halko et al.),
    seeded, whose subspace is as good as the spectrum's gap.
    """
    if rank == min(matrix.shape):  # neither Lanczos nor a range finder gives all of them
        left, values, right = torch.linalg.svd(matrix.to_dense(), full_matrices=False)
        return left, values, right.mT
    if matrix.device.type == "cpu":
        import scipy.sparse

        arrays = tuple(part.detach().numpy() for part in (matrix.values(), matrix.col_indices(), matrix.crow_indices()))
        csr = scipy.sparse.csr_array(arrays, shape=tuple(matrix.shape))
        left, values, right = _lanczos(csr, rank, seed)
        down = np.argsort(-values)
        parts = (torch.from_numpy(np.ascontiguousarray(x)) for x in (left[:, down], values[down], right[down].T))
        left, values, right = (part.to(matrix.dtype) for part in parts)
        return left, values, right
    generator = torch.Generator(matrix.device).manual_seed(seed)
    width = min(rank + 10, *matrix.shape)
    basis = torch.randn(matrix.shape[1], width, generator=generator, dtype=matrix.dtype, device=matrix.device)
    transposed = matrix.to_sparse_coo().t().to_sparse_csr()
    for _ in range(8):
        basis = torch.linalg.qr(transposed @ torch.linalg.qr(matrix @ basis).Q).Q
    frame, small = torch.linalg.qr(matrix @ basis)  # the SVD itself is of (k, k): solvers on CUDA are slow on tall ones
    left, values, right = torch.linalg.svd(small)
    return (frame @ left)[:, :rank], values[:rank], (basis @ right.mT)[:, :rank]


def _lanczos(matrix: Any, rank: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """U (m, k), S (k,) ascending, V^T (k, n) of a scipy sparse matrix, as of `svds`, but every draw is the seed's.

    `svds` hands no generator on to `eigsh`, which draws new vectors where the Krylov space is used up.
    """
    from scipy.linalg import svd
    from scipy.sparse.linalg import LinearOperator, eigsh, svds

    draws = np.random.default_rng(seed)
    start = draws.standard_normal(min(matrix.shape))
    if "rng" not in inspect.signature(eigsh).parameters:  # scipy before 1.17
        return svds(matrix, k=rank, v0=start)
    wide = matrix.shape[0] < matrix.shape[1]
    tall = matrix.T if wide else matrix
    sides = (tall.shape[1], tall.shape[1])
    gram = LinearOperator(sides, matvec=lambda x: tall.T @ (tall @ x), dtype=matrix.dtype)
    _, vectors = eigsh(gram, k=rank, v0=start, rng=draws)
    vectors, _ = np.linalg.qr(vectors)
    left, values, right = svd(tall @ vectors, full_matrices=False)
    left, values, right = left[:, ::-1], values[::-1], right[::-1]  # to the last bit as `svds` does
    return (vectors @ right.T, values, left.T) if wide else (left, values, right @ vectors.T)
