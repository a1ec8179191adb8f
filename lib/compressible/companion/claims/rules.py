"""Statements of the papers, each judged on its evidence: PASS, WEAK, FAIL, INCONCLUSIVE or NOT TESTED.

The rules, in this order:

1. NOT TESTED when the run is smaller or other than `requires` says, when the metric is missing, or when it has
   fewer values than `seeds`. The reason is recorded. A quick run says so rather than pass.
2. FAIL when any value is NaN or infinite (or not positive under scale "log"): a run that diverged counts.
3. One value: PASS inside `bound`, WEAK inside `weak`, else FAIL.
4. Several values (seeds): the statistic is their mean with its 95 % t interval. PASS when the whole
   interval lies inside `bound`; WEAK when only the mean does, or when the mean lies inside `weak`; else FAIL.
   With `every`, PASS needs each single value inside `bound` instead of the interval.
5. "greater_than_zero" is rule 3 or 4 with the bound > 0, so PASS means an interval that excludes 0.
   "true" passes when every value is true, is WEAK when more than half are, and fails otherwise.
6. A claim that names its `unit` is judged two-sided instead of by rules 4 and 5: PASS when the whole 95 % interval lies
   inside `bound`, FAIL when the whole interval lies outside, and INCONCLUSIVE where neither side is shown. The interval
   of sizes (scale "abs") ends at 0, that of a "share" of true values is Clopper and Pearson's. One value outside
   refutes what is said of all ("true", `every`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from scipy.special import betaincinv, stdtrit

from compressible.companion.claims.statement import NOT_TESTED, Claim, ClaimError, load_claims

PASS, WEAK, FAIL, INCONCLUSIVE = "PASS", "WEAK", "FAIL", "INCONCLUSIVE"


class Evidence(Protocol):
    """What a claim is judged on; a `runs.Result` is one."""

    @property
    def parameters(self) -> dict[str, Any]: ...
    @property
    def arrays(self) -> dict[str, np.ndarray]: ...
    @property
    def metrics(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Verdict:
    """How a claim fared: the value with its 95 % interval (None for one value), and why if not PASS.

    `rule` tells which version of the claim was judged.
    """

    id: str
    verdict: str
    value: float | None
    low: float | None
    high: float | None
    seeds: int
    bound: str
    reason: str
    rule: str


def judge(figure_id: str, result: Evidence, claims: list[Claim] | None = None) -> list[Verdict]:
    """Verdicts on all claims about one figure, from one result; ClaimError if a metric is no number."""
    every = load_claims() if claims is None else claims
    return [verdict(claim, result) for claim in every if claim.figure == figure_id]


def verdict(claim: Claim, result: Evidence) -> Verdict:
    """The verdict on one claim, by the rules of this module."""
    if reason := _unmet(claim, result):
        return _without_value(claim, NOT_TESTED, 0, reason)
    values = _values(claim, result)
    if len(values) < claim.seeds:
        return _without_value(claim, NOT_TESTED, len(values), f"{len(values)} of {claim.seeds} seeds")
    if lost := int((~np.isfinite(values)).sum()):
        return _without_value(claim, FAIL, len(values), f"{lost} of {len(values)} values not finite")
    back: Callable[[float], float] = math.exp if claim.scale == "log" else float
    mean, low, high = (back(float(end)) for end in (share if claim.judge == "share" else interval)(values))
    low = max(low, 0.0) if claim.unit and claim.scale == "abs" else low
    judged = _two_sided if claim.unit else _outcome
    outcome, reason = judged(claim, [back(value) for value in values], mean, low, high)
    ends = (None, None) if math.isnan(low) else (low, high)
    return Verdict(claim.id, outcome, mean, ends[0], ends[1], len(values), claim.bound_text(), reason, claim.rule())


def interval(values: Any, axis: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean, low and high end of its 95 % t interval along an axis; the ends of a single value are NaN."""
    values = np.asarray(values, float)
    count, mean = values.shape[axis], values.mean(axis)
    if count < 2:
        return mean, np.full_like(mean, np.nan), np.full_like(mean, np.nan)
    half = stdtrit(count - 1, 0.975) * values.std(axis, ddof=1) / math.sqrt(count)
    return mean, mean - half, mean + half


def share(values: np.ndarray) -> tuple[float, float, float]:
    """Share of true values with Clopper and Pearson's 95 % interval, the exact one of a binomial share."""
    count, true = len(values), int(np.count_nonzero(values))
    low = float(betaincinv(true, count - true + 1, 0.025)) if true else 0.0
    high = float(betaincinv(true + 1, count - true, 0.975)) if true < count else 1.0
    return true / count, low, high


def _without_value(claim: Claim, outcome: str, count: int, reason: str) -> Verdict:
    return Verdict(claim.id, outcome, None, None, None, count, claim.bound_text(), reason, claim.rule())


def _outcome(claim: Claim, values: list[float], mean: float, low: float, high: float) -> tuple[str, str]:
    if claim.judge == "true":
        outcome = PASS if all(values) else WEAK if mean > 0.5 else FAIL
        return outcome, "" if outcome == PASS else f"true for {int(sum(values))} of {len(values)}"
    inside = _test(claim, claim.bound)
    parts = values if claim.every else [mean] if math.isnan(low) else [low, high]
    if all(inside(part) for part in parts):
        return PASS, ""
    if inside(mean):
        return WEAK, "not every seed is inside" if claim.every else "the 95 % interval is not inside"
    if claim.weak is not None and _test(claim, claim.weak)(mean):
        return WEAK, "only the weak bound holds"
    return FAIL, "outside the bound"


def _two_sided(claim: Claim, values: list[float], mean: float, low: float, high: float) -> tuple[str, str]:
    inside = (lambda value: value > 0.5) if claim.judge == "true" else _test(claim, claim.bound)
    if claim.every or claim.judge == "true" or math.isnan(low):  # NaN: one value has no interval
        wrong = sum(not inside(value) for value in values)
        if wrong and claim.weak is not None and all(map(_test(claim, claim.weak), values)):
            return WEAK, "only the weak bound holds"
        return (FAIL, f"outside the bound: {wrong} of {len(values)}") if wrong else (PASS, "")
    if inside(low) and inside(high):
        return PASS, ""
    if claim.weak is not None and all(map(_test(claim, claim.weak), (low, high))):
        return WEAK, "only the weak bound holds"
    bottom, top = (0.0, math.inf) if claim.judge == "greater_than_zero" else claim.ends(claim.bound)
    if high < bottom or low > top or high == bottom == 0:
        return FAIL, "the 95 % interval is outside the bound"
    return INCONCLUSIVE, "the 95 % interval is neither inside nor outside the bound"


def _test(claim: Claim, bound: Any) -> Callable[[float], bool]:
    if claim.judge == "greater_than_zero":
        return lambda value: value > 0
    low, high = claim.ends(bound)
    return lambda value: low <= value <= high


def _values(claim: Claim, result: Evidence) -> np.ndarray:
    found = result.arrays.get(claim.metric, result.metrics.get(claim.metric))
    values = np.atleast_1d(np.asarray(found))
    if values.ndim != 1 or values.dtype.kind not in "biuf":
        raise ClaimError(f"{claim.id}: metric {claim.metric!r} is {found!r}, expected numbers over seeds")
    values = values.astype(float)
    if claim.scale == "log":
        with np.errstate(invalid="ignore"):
            return np.log(np.where(values == 0, np.finfo(float).tiny, values))
    return np.abs(values) if claim.scale == "abs" else values


def _unmet(claim: Claim, result: Evidence) -> str:
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
