"""Alternating least squares (ALS) on the observed entries alone, without and with biases; no m x n array is made.

Both Gram matrices of a sweep are sparse products: with M the (m, n) pattern of the observed entries and Z (n, k^2) the
outer products of the features, M Z holds every row's normal equations. m rows, n columns, r rank, N entries. float64 is
advised: the normal equations square the condition number.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from compressible.recovery.checks import MOST_RECORDS, REAL, expect_tensor
from compressible.recovery.sparse import SparseCompletion
from compressible.recovery.truncated_svd import truncated_svd
from compressible.runtime.checks import (
    expect,
    expect_flag,
    expect_generator,
    expect_integer,
    expect_iterations,
    expect_number,
    expect_one_of,
)
from compressible.runtime.devices import clock

BATCH = 2**14  # rows solved at a time: batched solvers on CUDA have limits of 2^15 and 2^16


@dataclass(frozen=True, eq=False)
class Sweeps:
    """Factors [V^T (k, n), U (m, k)] after the last sweep, biases among them, and curves over sweeps 0 to `sweeps`."""

    factors: list[Tensor]
    loss: Tensor  # half the mean squared residual over the observed
    error: Tensor  # the same over the hidden entries, NaN without
    seconds: Tensor  # solving time so far, the start included, these records not
    snapshots: dict[int, list[Tensor]]  # factors after the sweeps that were asked for


def alternate(
    problem: SparseCompletion,
    rank: int,
    ridge: float = 0.0,
    sweeps: int = 20,
    generator: torch.Generator | None = None,
    biases: bool = False,
    bias_ridge: float = 5.0,
    start: str | Tensor = "spectral",
    snapshots: Iterable[int] = (),
    weighted: bool = False,
) -> Sweeps:
    """Minimise sum over the observed of (U V^T - t)^2 + ridge (|U|^2 + |V|^2), U and V taking turns.

    `weighted` ridges count once for each entry of their row or column (Zhou et al. 2008), as those of LensKit do.

    With `biases` each row and column has a bias too, under bias_ridge * bias^2; entries should then have mean 0. start:
    "spectral", V from the rank-r SVD of Omega * Phi / p, or "random", a Gaussian V (n, r), times 0.1 with biases, drawn
    on the CPU, or V itself, (n, r) or with biases (n, r + 1), the columns' biases last; U = 0 in each case. With ridge
    0 a row with fewer observations than r gets the solution of least norm. Raises ValueError for a rank outside 1 to
    min(m, n), a negative ridge (0 with biases), sweeps < 1, another start or another kind of value.
    """
    expect("type of problem", type(problem).__name__, isinstance(problem, SparseCompletion), "SparseCompletion")
    biases, weighted = expect_flag("biases", biases), expect_flag("weighted", weighted)
    most = min(problem.shape)
    rank = expect_integer("rank", rank, 1, most, f"an integer from 1 to {most}")
    sweeps = expect_integer("sweeps", sweeps, 1, MOST_RECORDS)
    ridge = expect_number("ridge", ridge, "a finite number >= 0, > 0 with biases", 0 if biases else -math.inf, 0)
    bias_ridge = expect_number("bias_ridge", bias_ridge, "a finite number >= 0", least=0)
    expect_generator(generator)
    _check_start(start, (problem.shape[1], rank + biases))
    wanted = expect_iterations("snapshots", snapshots, sweeps, f"sweeps from 0 to {sweeps}")
    began = clock(problem.seen.rows.values)
    ones = torch.ones_like(problem.seen.rows.values)
    patterns = problem.seen.matrix(ones), problem.seen.matrix(ones, transposed=True)
    right = _start(problem, rank, start, generator, biases)
    left = torch.zeros(problem.shape[0], right.shape[1], dtype=problem.dtype, device=problem.device)
    penalty = torch.tensor([ridge] * rank + [bias_ridge] * biases, dtype=problem.dtype, device=problem.device)
    seconds, records, kept = [clock(right) - began], [problem.evaluate_factors([right.mT, left])], {}
    for sweep in range(sweeps + 1):
        if sweep:
            began = clock(right)
            left = _half(problem, patterns[0], right, penalty, rank, transposed=False, weighted=weighted)
            right = _half(problem, patterns[1], left, penalty, rank, transposed=True, weighted=weighted)
            seconds.append(seconds[-1] + clock(right) - began)
            records.append(problem.evaluate_factors([right.mT, left]))
        if sweep in wanted:
            kept[sweep] = [right.mT, left]
    loss, error = torch.tensor(
        [[float(value) for value in record] for record in records], dtype=torch.float64, device="cpu"
    ).T
    return Sweeps([right.mT, left], loss, error, torch.tensor(seconds, dtype=torch.float64, device="cpu"), kept)


def _start(
    problem: SparseCompletion, rank: int, start: str | Tensor, generator: torch.Generator | None, biases: bool
) -> Tensor:
    if isinstance(start, Tensor):
        right = start.detach().to(problem.device, problem.dtype)
    elif start == "spectral":
        _, values, right = truncated_svd(problem.surrogate(), rank)
        right = right * values.sqrt()
    else:
        draw = torch.randn(problem.shape[1], rank, generator=generator, dtype=problem.dtype, device="cpu")
        right = (0.1 if biases else 1.0) * draw.to(problem.device)
    if not biases:
        return right
    bias = right[:, rank] if right.shape[1] > rank else torch.zeros_like(right[:, 0])
    return _with_bias(right[:, :rank], bias, by_rows=False)


def _half(
    problem: SparseCompletion,
    pattern: Tensor,
    partner: Tensor,
    penalty: Tensor,
    rank: int,
    transposed: bool,
    weighted: bool,
) -> Tensor:
    """Solve one side's rows, (lines, k), given the other's; with biases k = rank + 2, else rank."""
    entries, biases = problem.seen, partner.shape[1] > rank
    side = entries.columns if transposed else entries.rows
    values, features = side.values, partner
    if biases:  # rows are [factors, bias, 1], columns [factors, 1, bias]
        one, bias = (rank + 1, rank) if transposed else (rank, rank + 1)
        values = values - partner[:, bias][side.indices.long()]
        features = torch.cat([partner[:, :rank], partner[:, one, None]], 1)
    places = pattern.crow_indices(), pattern.col_indices()
    known = torch.sparse_csr_tensor(*places, values, pattern.shape, device=values.device, check_invariants=False)
    counts = places[0].diff().clamp(min=1) if weighted else torch.ones_like(places[0][1:])
    solved = _solve(pattern, known, features, penalty * counts[:, None])
    return _with_bias(solved[:, :rank], solved[:, rank], by_rows=not transposed) if biases else solved


def _with_bias(factors: Tensor, bias: Tensor, by_rows: bool) -> Tensor:
    one = torch.ones_like(bias)
    return torch.cat([factors, torch.stack([bias, one] if by_rows else [one, bias], 1)], 1)


def _solve(pattern: Tensor, known: Tensor, features: Tensor, penalty: Tensor) -> Tensor:
    rank = features.shape[1]
    products = (features[:, :, None] * features[:, None, :]).reshape(-1, rank * rank)
    normal = (pattern @ products).reshape(-1, rank, rank) + torch.diag_embed(penalty)
    right_side = known @ features
    parts = zip(normal.split(BATCH), right_side.split(BATCH), strict=True)
    return torch.cat([_solve_each(*part, bool((penalty > 0).all())) for part in parts])


def _solve_each(normal: Tensor, right_side: Tensor, definite: bool) -> Tensor:
    factor, broken = torch.linalg.cholesky_ex(normal)  # round-off breaks it where factors are far above the ridge
    if definite and not bool(broken.any()):
        return torch.cholesky_solve(right_side[:, :, None], factor)[:, :, 0]
    values, vectors = torch.linalg.eigh(normal)
    floor = values[:, -1:] * normal.shape[-1] * torch.finfo(normal.dtype).eps  # below it an eigenvalue counts as zero
    inverse = torch.where(values > floor, 1.0 / values, torch.zeros_like(values))
    inside = torch.einsum("mki,mk->mi", vectors, right_side) * inverse
    return torch.einsum("mki,mi->mk", vectors, inside)


def _check_start(start: object, shape: tuple[int, int]) -> None:
    if not isinstance(start, Tensor):
        expect_one_of("start", start, ("spectral", "random"), "spectral, random or a tensor")
        return
    expect_tensor("start", start, f"(n, k) = {shape} of numbers", REAL)
    if tuple(start.shape) != shape:
        raise ValueError(f"start has shape {tuple(start.shape)}, expected (n, k) = {shape}")
    if not bool(torch.isfinite(start).all()):
        raise ValueError("start holds values that are not finite, expected finite ones")
