"""The problems that performance is measured on: P2's completion, single, stacked, full width, and sparse at scale."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from compressible.experiments.speed.roofline import Work, count_sparse_step, count_step
from compressible.recovery.compression import compress_spectral
from compressible.recovery.factors import Factors, orthogonal_factors
from compressible.recovery.masks import random_mask
from compressible.recovery.problems import MatrixCompletion, Problem
from compressible.recovery.sparse import SparseCompletion
from compressible.recovery.synthetic import low_rank_target, sparse_low_rank

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
    problem = MatrixCompletion(problem.target.to(device, dtype), problem.mask.to(device, dtype))
    width = dimension if full else 2 * rank
    kind, count = "full width" if full else "compressed", f"{stack} x " if stack else ""
    return Workload(
        name=f"{count}d={dimension} {kind} {_short(dtype)}",
        problem=problem,
        factors=[factor.to(device, dtype) for factor in factors],
        step_size=STEP * (dimension / 100) ** (4 / 3),
        outer_ratio=1.0 if full else 5.0,
        work=count_step(shape, width, DEPTH, dtype.itemsize, max(stack, 1)),
        stack=max(stack, 1),
    )


def sparse_completion(
    dimension: int, rank: int, entries: int, width: int, dtype: torch.dtype, device: str, seed: int
) -> Workload:
    """Return completion of a rank-`rank` matrix from `entries` entries alone, started from narrow orthogonal factors.

    The target is `sparse_low_rank`'s; nothing of size d x d is made. The step is 10 at d = 100 and keeps its share of
    the stability limit, which goes as d^(2/3) where singular values go as d. Raises ValueError where there are not as
    many entries.
    """
    generator, shape = torch.Generator().manual_seed(seed), (dimension, dimension)
    observed = sparse_low_rank(shape, rank, entries, generator, hidden=1, dtype=dtype)[0].to(device)
    factors = orthogonal_factors(shape, DEPTH, width, SCALE, generator, dtype, device)
    return Workload(
        name=f"d={dimension} sparse {_short(dtype)}",
        problem=SparseCompletion(observed),
        factors=factors,
        step_size=STEP * (dimension / 100) ** (2 / 3),
        outer_ratio=1.0,
        work=count_sparse_step(shape, entries, width, DEPTH, dtype.itemsize),
    )


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
    """Yield a workload of every kind, one by one, so that only one is held at a time.

    The sparse one of `entries` and `width`, first so that its peak of memory is its own; then both dimensions:
    compressed in each of `precisions`, of full width and, the smaller one, in `stacks` in the first of them.
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
    yield completion(large_dimension, rank, large_observed, kinds[0], device, seed, full=True)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
