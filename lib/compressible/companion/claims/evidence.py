"""What a claim is judged on: the values of its metric, and whether the run was large enough."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from compressible.companion.claims.statement import Claim, ClaimError

_RANGES = {"log": (0.0, math.inf), "correlation": (-1.0, 1.0)}
_ROUNDING = 1e-9  # a correlation of 1 comes out a little above


class Evidence(Protocol):
    """What a claim is judged on; a `runs.Result` is one."""

    @property
    def parameters(self) -> dict[str, Any]: ...
    @property
    def arrays(self) -> dict[str, np.ndarray]: ...
    @property
    def metrics(self) -> dict[str, Any]: ...


def judged(claim: Claim, result: Evidence) -> np.ndarray:
    """The values (n,) of a claim's metric, their sizes under scale "abs"; ClaimError if they are no numbers."""
    found = result.arrays.get(claim.metric, result.metrics.get(claim.metric))
    values, truth = np.atleast_1d(np.asarray(found)), claim.judge in ("true", "share")
    if values.ndim != 1 or values.dtype.kind not in "biuf" or (truth and not np.isin(values, (0, 1)).all()):
        kind = "truth values" if truth else "numbers"
        raise ClaimError(f"{claim.id}: metric {claim.metric!r} is {found!r}, expected {kind} over {claim.unit}s")
    values = values.astype(float)
    if claim.scale == "correlation":
        values = np.where(np.abs(values) <= 1 + _ROUNDING, np.clip(values, -1, 1), values)
    return np.abs(values) if claim.scale == "abs" else values


def usable(claim: Claim, values: np.ndarray) -> np.ndarray:
    """Which values (n,) can be judged; the others are those of runs that diverged."""
    least, most = _RANGES.get(claim.scale, (-math.inf, math.inf))
    known = np.isfinite(values) | (claim.censored & np.isposinf(values))
    return known & (values >= least) & (values <= most)


def unmet(claim: Claim, result: Evidence) -> str:
    """Why a result is too small to judge a claim, or nothing."""
    short = [text for name, need in claim.requires.items() if (text := _short(name, need, result.parameters))]
    if not short and claim.metric not in result.arrays and claim.metric not in result.metrics:
        short = [f"no metric {claim.metric!r}"]
    return "; ".join(short)


def _short(name: str, need: Any, given: Mapping[str, Any]) -> str:
    if name not in given:
        return f"no parameter {name!r}"
    value, limits = given[name], need if isinstance(need, Mapping) else {"at_least": need}
    exact = need if isinstance(need, str | bool | list) else limits.get("exactly")
    if exact is not None:
        return "" if _equal(value, exact) else f"{name} is {value!r}, needs {exact!r}"
    value = len(value) if isinstance(value, list) else value
    if value < limits.get("at_least", -math.inf):
        return f"{name} is {value}, needs at least {limits['at_least']}"
    if value > limits.get("at_most", math.inf):
        return f"{name} is {value}, needs at most {limits['at_most']}"
    return ""


def _equal(value: Any, need: Any) -> bool:
    """Equal in kind and value, numbers but for rounding: 1e-4 of a file is 1e-4 of a command line."""
    if isinstance(need, list):
        return isinstance(value, list) and len(value) == len(need) and all(map(_equal, value, need))
    if isinstance(need, str | bool) or isinstance(value, str | bool | list):
        return type(value) is type(need) and value == need
    return math.isclose(value, need, rel_tol=1e-9)
