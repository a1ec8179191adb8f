"""What curves over seeds come to: where they end, when they arrive, when they have settled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from compressible.experiments.compare import first_below


def held(curves: np.ndarray) -> np.ndarray:
    """Return curves (S, R) in which a run that stopped, NaN from there on, stays where it ended."""
    return pd.DataFrame(curves.T).ffill().to_numpy().T


def stays_above(curves: np.ndarray, level: float, at: np.ndarray) -> np.ndarray:
    """Return `at` (R,) or (S, R) from where on each curve (S, R) exceeds the level to its end, (S,); NaN if never."""
    least_to_come = np.minimum.accumulate(curves[:, ::-1], 1)[:, ::-1]
    return first_below(-least_to_come, -level, at)


def outcomes(
    curves: Mapping[str, np.ndarray], names: Sequence[str], tolerance: float, recovered: float
) -> dict[str, np.ndarray]:
    """Return per seed (S,) what each of `compare_starts`' runs came to.

    "<name>/final" error and "<name>/final_loss"; "<name>/iterations_to" the training loss `tolerance` and
    "<name>/recovered_at", where the error falls below `recovered`: NaN if never.
    """
    out: dict[str, np.ndarray] = {}
    for name in names:
        loss, error, iterations = (curves[f"{name}/{key}"] for key in ("loss", "error", "iterations"))
        out[f"{name}/final"] = held(error)[:, -1]
        out[f"{name}/final_loss"] = held(loss)[:, -1]
        out[f"{name}/iterations_to"] = first_below(loss, tolerance, iterations)
        out[f"{name}/recovered_at"] = first_below(error, recovered, iterations)
    return out
