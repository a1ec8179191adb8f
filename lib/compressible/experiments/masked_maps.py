"""Linear maps under masks, P3's Example 4.2 against samples and descent; notation as in `recovery.theory.masking`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from compressible.recovery.factors import orthogonal_factors
from compressible.recovery.theory import masking


def sampling_error(inputs: Tensor, mask_rates: Sequence[float], draws: int, seed: int) -> np.ndarray:
    """Return (rates,): mean loss over `draws` masks minus the closed form, in standard errors of that mean.

    For the rows of `inputs` (N, d) and a random map; about standard normal if the closed form is right.
    """
    count, size = inputs.shape
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(size, size, generator=generator, dtype=inputs.dtype).to(inputs.device) / size**0.5
    moments = inputs.mT @ inputs / count
    found = []
    for rate in mask_rates:
        losses = []
        for _ in range(draws):
            kept = torch.rand(count, size, generator=generator) >= rate
            masked = inputs * kept.to(inputs.device) / (1 - rate)
            losses.append((inputs - masked @ weight.mT).square().sum(1).mean())
        sampled, expected = torch.stack(losses), masking.expected_loss(weight, moments, rate)
        found.append(float((sampled.mean() - expected) / (sampled.std() / draws**0.5)))
    return np.array(found)


def midway_decay(moments: Tensor, rank: int) -> float:
    """Return the decay mu that keeps `rank` directions: the geometric mean of the eigenvalues beside the cut."""
    values = torch.linalg.eigvalsh(moments).flip(-1)
    return float((values[rank - 1] * values[rank]).sqrt())


def descent_errors(
    moments: Tensor, mask_rates: Sequence[float], rank: int, steps: int, seeds: Sequence[int], scale: float = 0.1
) -> dict[str, np.ndarray]:
    """Return "bottleneck" and "decay" (S, rates): ||V - V*||_F / ||V*||_F where gradient descent on two factors ends.

    Descent is of half the expected loss, in float64, from `scale` times orthogonal factors of width r = `rank`, or of
    full width with a decay that keeps r directions; V* is the closed form. Steps are 1 / 2 (lambda_1 + rho), which is
    half of what is stable. moments: (d, d), of unit diagonal.
    """
    decay = midway_decay(moments, rank)
    closed = {
        "bottleneck": torch.stack([masking.best_map(moments, rate, rank) for rate in mask_rates]),
        "decay": torch.stack([masking.decayed_map(moments, rate, decay) for rate in mask_rates]),
    }
    widths, decays = {"bottleneck": rank, "decay": len(moments)}, {"bottleneck": 0.0, "decay": decay}
    errors = {}
    for kind, wanted in closed.items():
        starts = [_start(len(moments), widths[kind], scale, seed) for seed in seeds]
        factors = [torch.stack(parts)[:, None].to(moments) for parts in zip(*starts, strict=True)]  # (S, 1, ...)
        found = _descend(factors, moments, mask_rates, decays[kind], steps)
        gap = torch.linalg.matrix_norm(found - wanted) / torch.linalg.matrix_norm(wanted)
        errors[kind] = gap.cpu().numpy()
    return errors


def _start(size: int, width: int, scale: float, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return orthogonal_factors((size, size), 2, width, scale, generator=generator, dtype=torch.float64)


def _descend(factors: list[Tensor], moments: Tensor, mask_rates: Sequence[float], decay: float, steps: int) -> Tensor:
    """V (S, rates, d, d) after gradient descent on half the expected loss and decay / 2 of both factors' squares."""
    rho = masking.penalty(torch.tensor(mask_rates, dtype=torch.float64)).to(moments)[:, None, None]
    total = moments + rho * torch.diag(moments.diagonal())
    step = 0.5 / torch.linalg.matrix_norm(total, ord=2)[:, None, None]
    first, second = (factor.expand(-1, len(mask_rates), -1, -1) for factor in factors)
    for _ in range(steps):
        gradient = second @ (first @ total) - moments
        first, second = (
            first - step * (second.mT @ gradient + decay * first),
            second - step * (gradient @ first.mT + decay * second),
        )
    return second @ first
