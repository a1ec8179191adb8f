"""Two-factor (Burer-Monteiro) factorization at the exact rank, where it converges linearly, and over-ranked.

The half mean squared error (1 / 2 d^2) ||X - X*||_F^2 of a (d, d) target, as `MatrixFactorization` has it.
"""

from __future__ import annotations

import numpy as np

from compressible.experiments.compare import first_below
from compressible.recovery.theory.invariants import rho


def over_ranked_law(excess: int, dimension: int, scale: float, step_size: float, iterations: np.ndarray) -> np.ndarray:
    """Return k rho(t)^4 / 2 d^2, the error that k = `excess` directions outside the target leave at `iterations` (R,).

    Both factors start with them at `scale`, and rho is the recursion that shrinks what no gradient of the target feeds.
    """
    values = rho([scale, scale], step_size / dimension**2, int(iterations[-1]))
    return excess * values.prod(-1).square().numpy()[iterations] / (2 * dimension**2)


def linear_convergence(errors: np.ndarray, iterations: np.ndarray) -> dict[str, np.ndarray]:
    """Return per seed (S,) the iterations "to_1e-28" and "evenness", 1 where each digit takes the same iterations.

    Evenness is the iterations from an error of 1e-20 to 1e-28 over those from 1e-12 to 1e-20.
    """
    to_12, to_20, to_28 = (first_below(errors, 10.0**-digits, iterations) for digits in (12, 20, 28))
    return {"to_1e-28": to_28, "evenness": (to_28 - to_20) / (to_20 - to_12)}
