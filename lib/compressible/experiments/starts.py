"""Where P2's figures start from: a random problem, its original network and the compressed ones.

m = n = d. One seed gives one problem in every figure, since the draws keep one order: target, mask, network.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from compressible.experiments.compare import Start
from compressible.recovery.compression import compress_spectral
from compressible.recovery.factors import orthogonal_factors
from compressible.recovery.masks import random_mask
from compressible.recovery.problems import MatrixCompletion, Problem
from compressible.recovery.synthetic import low_rank_target


def random_completion(dimension: int, rank: int, observed: float, generator: torch.Generator) -> MatrixCompletion:
    """Return the problem to complete a Gaussian (d, d) target of that rank from a share `observed` of its entries."""
    shape = (dimension, dimension)
    target = low_rank_target(shape, rank, generator=generator)
    return MatrixCompletion(target, random_mask(shape, observed, generator=generator))


def original_and_compressed(
    problem: Problem,
    rank: int,
    depth: int,
    init_scale: float,
    step_size: float | Mapping[str, float],
    outer_ratios: Sequence[float],
    generator: torch.Generator,
) -> dict[str, Start]:
    """Return the starts on a problem, by the names of `start_names`: full width, then width 2 `rank` at each ratio.

    `step_size` is one for all or {name: step size}.
    """
    names = start_names(outer_ratios)
    sizes = step_size if isinstance(step_size, Mapping) else dict.fromkeys(names, step_size)
    wide = orthogonal_factors(problem.shape, depth, scale=init_scale, generator=generator)
    small = compress_spectral(problem, 2 * rank, depth, init_scale)
    networks = [(wide, 1.0), *((small, ratio) for ratio in outer_ratios)]
    return {name: (factors, sizes[name], ratio) for name, (factors, ratio) in zip(names, networks, strict=True)}


def start_names(outer_ratios: Sequence[float]) -> list[str]:
    """Return "original" and "alpha = a" for each outer ratio a of the compressed network."""
    return ["original", *(f"alpha = {ratio:g}" for ratio in outer_ratios)]


def completion_starts(
    generator: torch.Generator,
    step_size: float | Mapping[str, float],
    *,
    dimension: int,
    rank: int,
    observed: float,
    **network: Any,
) -> tuple[MatrixCompletion, dict[str, Start]]:
    """Return a `random_completion` and its `original_and_compressed` starts, whose settings are `network`."""
    problem = random_completion(dimension, rank, observed, generator)
    return problem, original_and_compressed(problem, rank, step_size=step_size, generator=generator, **network)
