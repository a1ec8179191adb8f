"""What fits of one method to several splits of the ratings came to."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from compressible.experiments.recommend import Fit


def summary(fits: Sequence[Fit]) -> dict[str, np.ndarray]:
    """Return the curves of the first fit and, per split (S,), scores, setting, seconds and least error of all.

    Curves are "iterations", "seconds" and "error" (R,); scores "final/<metric>" and "stopped/<metric>", at the end and
    at the iteration that the validation slice chose; "setting" is what else it chose, "time" the seconds of a fit and
    "best" its least test error.
    """
    first = fits[0]
    out = {"iterations": first.iterations, "seconds": first.seconds, "error": first.error}
    for key in first.final:
        out[f"final/{key}"] = np.array([fit.final[key] for fit in fits])
        out[f"stopped/{key}"] = np.array([fit.stopped[key] for fit in fits])
    out["setting"] = np.array([fit.setting for fit in fits])
    out["time"] = np.array([fit.seconds[-1] for fit in fits])
    out["best"] = np.array([fit.error.min() for fit in fits])
    return out
