"""The problems that performance is measured on: P2's completion, single, stacked, full width, and sparse at scale."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .compress import compress_spectral
from .factors import Factors, orthogonal_factors
from .floors import Work, count_sparse_step, count_step
from .problems import MatrixCompletion, Problem
from .sampling import low_rank_target, random_mask
from .sparse import CHUNK, SparseCompletion

DEPTH, SCALE, STEP = 3, 1e-2, 10.0  # P2's factors, start and step at d = 100


@dataclass
class Workload:
    """A problem with a start: `name`, step sizes, the counted `work` of a step, and how many problems it `stack`s."""

    name: str
    problem: Problem
    factors: Factors
    step_size: float
    outer_ratio: float
    work: Work
    stack: int = 1

    @property
    def rates(self) -> list[float]:
        """Step sizes of the factors, first to last."""
        outer = self.step_size * self.outer_ratio
        return [outer, *[self.step_size] * (len(self.factors) - 2), outer]


def completion(
    dimension: int,
    rank: int,
    observed: float,
    dtype: torch.dtype,
    device: str,
    seed: int,
    stack: int = 0,
    full: bool = False,
) -> Workload:
    """Return P2's completion problem, or `stack` > 0 of them: compressed to width 2 rank (alpha = 5) or of full width.

    The step is 10 at d = 100 and keeps its share of the stability limit, which goes as d^(4/3) for the mean loss. Drawn
    in float64 and rounded, so that a seed means one problem.
    """
    generator, shape, batch = torch.Generator().manual_seed(seed), (dimension, dimension), (stack,) if stack else ()
    target = low_rank_target(shape, rank, batch, generator)
    problem = MatrixCompletion(target, random_mask(shape, observed, batch, generator))
    if full:
        factors = orthogonal_factors(shape, DEPTH, None, SCALE, generator, batch_shape=batch)
    else:
        factors = compress_spectral(problem, 2 * rank, DEPTH, SCALE)
    like = {"dtype": dtype, "device": device}
    problem = MatrixCompletion(problem.target.to(**like), problem.mask.to(**like))
    width = dimension if full else 2 * rank
    kind, count = "full width" if full else "compressed", f"{stack} x " if stack else ""
    return Workload(
        f"{count}d={dimension} {kind} {_short(dtype)}", problem, [factor.to(**like) for factor in factors],
        STEP * (dimension / 100) ** (4 / 3), 1.0 if full else 5.0,
        count_step(shape, width, DEPTH, dtype.itemsize, max(stack, 1)), max(stack, 1),
    )  # fmt: skip


def sparse_completion(
    dimension: int, rank: int, entries: int, width: int, dtype: torch.dtype, device: str, seed: int
) -> Workload:
    """Return completion of a rank-`rank` matrix from `entries` entries alone, started from narrow orthogonal factors.

    The target is a product of Gaussian factors with entries of variance one; nothing of size d x d is made. Raises
    ValueError where there are not as many entries.
    """
    generator, shape = torch.Generator().manual_seed(seed), (dimension, dimension)
    at = distinct_entries(shape, entries, generator, device)
    left, right = (torch.randn(dimension, rank, generator=generator, dtype=torch.float64) for _ in range(2))
    left, right = left.to(device) / rank**0.5, right.to(device)
    rows, columns = at // dimension, at % dimension
    values = torch.empty(entries, dtype=dtype, device=device)
    for start in range(0, entries, CHUNK):
        part = slice(start, start + CHUNK)
        values[part] = (left[rows[part]] * right[columns[part]]).sum(-1)
    with torch.sparse.check_sparse_tensor_invariants(False):
        observed = torch.sparse_coo_tensor(torch.stack([rows, columns]), values, shape)
    factors = orthogonal_factors(shape, DEPTH, width, SCALE, generator, dtype, device)
    return Workload(
        f"d={dimension} sparse {_short(dtype)}", SparseCompletion(observed), factors,
        STEP * (dimension / 100) ** (4 / 3), 1.0, count_sparse_step(shape, entries, width, DEPTH, dtype.itemsize),
    )  # fmt: skip


def distinct_entries(shape: tuple[int, int], count: int, generator: torch.Generator, device: str) -> Tensor:
    """Return `count` distinct positions i n + j of an (m, n) matrix, uniformly drawn on the CPU, ascending (count,).

    Raises ValueError unless 1 <= count <= m n / 2: what is drawn twice is drawn again.
    """
    size = shape[0] * shape[1]
    if not 1 <= count <= size // 2:
        raise ValueError(f"entries is {count}, expected 1 <= entries <= half of the {size} of a {shape} matrix")
    found = torch.empty(0, dtype=torch.int64, device=device)
    while len(found) < count:
        more = torch.randint(size, (count - len(found),), generator=generator).to(device)
        found = torch.cat([found, more]).unique()
    return found


def all_workloads(
    dimension: int,
    observed: float,
    large_dimension: int,
    large_observed: float,
    rank: int,
    stacks: Sequence[int],
    precisions: Sequence[str],
    sparse_dimension: int,
    entries: int,
    width: int,
    device: str,
    seed: int,
) -> Iterator[Workload]:
    """Yield the notebook's workloads one by one, so that only one is held at a time.

    The sparse one, then both dimensions, compressed and of full width, in each of `precisions` ("float64" first if
    given), the full width of the first and the stacks in the first precision only.
    """
    kinds = [getattr(torch, name) for name in precisions]
    yield sparse_completion(sparse_dimension, rank, entries, width, kinds[0], device, seed)
    for kind in kinds:
        yield completion(dimension, rank, observed, kind, device, seed)
    yield completion(dimension, rank, observed, kinds[0], device, seed, full=True)
    for stack in stacks:
        yield completion(dimension, rank, observed, kinds[0], device, seed, stack)
    for kind in kinds:
        yield completion(large_dimension, rank, large_observed, kind, device, seed)
        yield completion(large_dimension, rank, large_observed, kind, device, seed, full=True)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
