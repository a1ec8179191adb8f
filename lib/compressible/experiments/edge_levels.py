"""P1's Theorem 2.1 against the strength of what spoils it: starts, targets and inputs, from almost right to wrong.

Arrays are (levels, S), S seeds; the runs of all levels and seeds descend as one stack, beside the theorem's runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.linalg import matrix_norm

from compressible.experiments.edges import Ideal, InputFactorization, held_against
from compressible.recovery.problems import DenseProblem, MatrixFactorization
from compressible.recovery.theory import edges as theory

NEAR_ZERO = 1e-2  # slopes are fitted on strengths up to here


def edge(
    ideal: Ideal, problem: DenseProblem, factors: Sequence[Tensor], strength: Tensor, **spoiled: Tensor | float
) -> dict[str, np.ndarray]:
    """Return how runs from `factors` degrade with the `strength` (levels, S) of an edge.

    `spoiled` says by how much, as in `departure_bound`. (levels, S) at the last iteration: "strength", "block",
    "departure", "bound", and the looks of `held_against`. Per seed (S,): "over_bound", the largest departure over its
    bound of all levels and iterations, and the slopes against the strength on logarithmic axes near zero,
    "block_slope", "angle_slope" and "gap_slope"; "slope_error", how far the worst of the three is from 1.
    """
    found, bound = held_against(ideal, problem, factors), ideal.bound(**spoiled)
    over = (found["departure"][1:] / bound[1:]).amax((0, 1))
    slopes = {f"{name}_slope": slope(strength, found[key]) for name, key in _SLOPES.items()}
    ends = {key: value[-1] if key in ("departure", "block") else value for key, value in found.items()}
    out = ends | {"strength": strength, "bound": bound[-1], "over_bound": over}
    slopes["slope_error"] = (torch.stack(list(slopes.values())) - 1).abs().amax(0)
    return {key: value.numpy() for key, value in (out | slopes).items()}


_SLOPES = {"block": "block", "angle": "angle", "gap": "gap_departure"}


def slope(strength: Tensor, deviation: Tensor) -> Tensor:
    """Return d log(deviation) / d log(strength) (S,) by least squares over the levels (levels, S) near zero.

    The deviation at the last iteration where there are several. Raises ValueError with fewer than two such levels.
    """
    near = strength.amax(1) <= NEAR_ZERO
    if int(near.sum()) < 2:
        raise ValueError(f"strengths are {strength.amax(1).tolist()}, expected two levels up to {NEAR_ZERO}")
    x, y = strength[near].log(), deviation.reshape(-1, *strength.shape)[-1][near].log()
    x, y = x - x.mean(0), y - y.mean(0)
    return (x * y).sum(0) / x.square().sum(0)


def gaussian_factors(
    dimension: int, depth: int, seeds: int, generator: torch.Generator
) -> tuple[list[Tensor], list[Tensor]]:
    """Return the polar parts of Gaussian factors Q S (seeds, d, d) of entries of variance 1 / d.

    Q are the nearest orthogonal matrices, uniform by Haar's measure, and S symmetric, of the Gaussian's singular
    values, which fill (0, 2) by the quarter-circle law.
    """
    size = (depth, seeds, dimension, dimension)
    left, values, right = torch.linalg.svd(torch.randn(*size, generator=generator, dtype=torch.float64))
    stretch = right.mT @ (values[..., None] / dimension**0.5 * right)
    return list(left @ right), list(stretch)


def start_edge(ideal: Ideal, stretch: Sequence[Tensor], strengths: Sequence[float]) -> dict[str, np.ndarray]:
    """Return `edge` over starts W*_l(0) (I + s (S_l - I)), from orthogonal (s = 0) to Gaussian (s = 1).

    The strength is delta = max_l ||W_l^T W_l / eps_l^2 - I||_2 at iteration 0. "spread_over_law" (S,): how far the
    least of the d - 2r middle singular values of the last level is from eps_l at iteration 0, relative, mean over
    layers, over what the quarter-circle law has for a Gaussian start.
    """
    steps, identity = _levels(strengths), torch.eye(stretch[0].shape[-1], dtype=torch.float64)
    start = [ideal_factor @ (identity + steps * (part - identity)) for ideal_factor, part in _pairs(ideal, stretch)]
    grams = [f.mT @ f / scale**2 - identity for f, scale in zip(start, ideal.scales, strict=True)]
    delta = torch.stack([matrix_norm(gram, ord=2) for gram in grams]).amax(0)
    away = torch.stack([matrix_norm(f - i) for f, i in zip(start, ideal.path[0], strict=True)]).amax(0)
    least = [torch.linalg.svdvals(factor[-1])[:, -ideal.rank - 1] for factor in start]
    spread = [1 - value / scale for value, scale in zip(least, ideal.scales, strict=True)]
    law = 1 - theory.quarter_circle_value((ideal.rank + 0.5) / identity.shape[-1])
    found = edge(ideal, MatrixFactorization(ideal.target), start, delta, start=away)
    return found | {"spread_over_law": (torch.stack(spread).mean(0) / law).numpy()}


def noise_edge(ideal: Ideal, strengths: Sequence[float], generator: torch.Generator) -> dict[str, np.ndarray]:
    """Return `edge` over targets Phi + T, T Gaussian noise of full rank with ||T||_F = s ||Phi||_F, s the strength."""
    noise = torch.randn(ideal.target.shape, generator=generator, dtype=torch.float64)
    return _tail_edge(ideal, _levels(strengths) * noise * _norm(ideal.target) / _norm(noise))


def decay_edge(ideal: Ideal, exponents: Sequence[float]) -> dict[str, np.ndarray]:
    """Return `edge` over targets whose singular values go on below the r-th as sigma_r (i / r)^-a, i = r + 1, ..., d.

    The strength is the norm of that tail over ||Phi||_F. `exponents` are the a > 0; the larger, the smaller the tail.
    """
    left, values, right = torch.linalg.svd(ideal.target)
    place = torch.arange(1, values.shape[-1] + 1, dtype=torch.float64) / ideal.rank
    last, exponent = values[:, ideal.rank - 1, None], torch.tensor(exponents, dtype=torch.float64)[:, None, None]
    tail = torch.where(place > 1, last * place**-exponent, torch.zeros(()))
    return _tail_edge(ideal, (left * tail[..., None, :]) @ right)


def input_edge(ideal: Ideal, strengths: Sequence[float], samples: int, generator: torch.Generator) -> dict[str, Any]:
    """Return `edge` over inputs of second moment I + s (C - I), C that of `samples` Gaussian inputs, s from 0 to 1.

    The strength is the condition number of the second moment less one.
    """
    size = ideal.target.shape[-1]
    inputs = torch.randn(len(ideal.target), size, samples, generator=generator, dtype=torch.float64)
    skew = _levels(strengths) * (inputs @ inputs.mT / samples - torch.eye(size, dtype=torch.float64))
    moment = torch.eye(size, dtype=torch.float64) + skew
    ends = torch.linalg.eigvalsh(moment)[..., [0, -1]]
    problem = InputFactorization(ideal.target.expand(len(strengths), -1, -1, -1), moment)
    start = [factor.expand_as(moment) for factor in ideal.path[0]]
    return edge(ideal, problem, start, ends[..., 1] / ends[..., 0] - 1, skew=matrix_norm(skew, ord=2))


def _tail_edge(ideal: Ideal, tail: Tensor) -> dict[str, np.ndarray]:
    """`edge` over targets Phi + tail (levels, S, d, d); the strength is the tail's norm over Phi's."""
    size, start = matrix_norm(tail), [factor.expand_as(tail) for factor in ideal.path[0]]
    strength = size / matrix_norm(ideal.target)
    return edge(ideal, MatrixFactorization(ideal.target + tail), start, strength, tail=size)


def _levels(strengths: Sequence[float]) -> Tensor:
    """The strengths as (levels, 1, 1, 1), before a stack of matrices."""
    return torch.tensor(strengths, dtype=torch.float64)[:, None, None, None]


def _norm(matrix: Tensor) -> Tensor:
    return matrix_norm(matrix, keepdim=True)


def _pairs(ideal: Ideal, stretch: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(ideal.path[0], stretch, strict=True)
