"""Statements of the papers, each judged on its evidence: PASS, WEAK, FAIL, INCONCLUSIVE or NOT TESTED.

The rules, in this order:

1. NOT TESTED when the run is smaller or other than `requires` says, when the metric is missing, or when it has
   fewer values than `seeds`. The reason is recorded. A quick run says so rather than pass.
2. FAIL when any value is NaN or infinite (or below zero under scale "log", beyond -1 or 1 under "correlation"): a run
   that diverged counts, whatever the others did. With `censored`, +inf is a run that was stopped before it arrived,
   which is known to be large and no more, and a ratio of 0 is one to such a run: see rule 6.
3. One value: PASS inside `bound` (its ends belong to it; "greater_than_zero" is > 0), WEAK inside `weak`, else FAIL.
   One censored value is INCONCLUSIVE.
4. What is said of every value, by "true" or with `every`, is refuted by one: PASS when all values are inside, WEAK when
   all are inside `weak`, else FAIL. The interval is shown and decides nothing.
5. Several values otherwise: the statistic of `scale` with its two-sided 95 % interval (intervals.py). PASS when the
   whole interval lies inside `bound`, else WEAK when it lies inside `weak`, else FAIL when it lies wholly outside of
   `bound`, else INCONCLUSIVE, as neither side is known. "share" is rule 5 for truth values: their share, at least.
6. With `censored` and at least one +inf (or, under scale "log", 0) among several values, the statistic is the median,
   by ranks.
7. What would PASS in the groups published and transferred is WEAK if our interval (our value, where there is
   none) does not meet `published_range`: the bound holds, the size is not the published one.
8. Claims of one `question` are judged together. Each that rule 5 or 6 judges has a p value: that of what its interval
   shows. What Holm's correction over them does not keep at 5 % is INCONCLUSIVE, whatever it was.

The p value of rule 8 is two-sided and belongs to the same tests as the interval. With one-sided p values, for a bound
[a, b] of which an infinite end drops out,

    p(inside) = max(p(> a), p(< b)),   p(outside) = min(p(< a), p(> b)),   p = min(1, 2 p(what was shown)).

Inside needs both sides shown: an intersection of tests, which needs no correction (TOST). Outside needs one side shown,
and a number within the bound can be at both ends only if these are one, so that doubling covers that, too. Hence
PASS by rule 5 is p(inside) <= .025, that is p <= .05; FAIL is p(outside) < .025; and each is wrong in at most 5 % of
cases. Where neither was shown, the smaller one is taken. Holm's correction keeps 5 % for all of a question together.
What rules 3 and 4 decide has no p value, and takes no part.

Two claims of a question that come to be judged on the same numbers, such as one at a network's own rate and one at a
rate for all where tuning chose that same rate, still count as two. To count them once would keep the 5 % only where
what makes the numbers equal does not hang on them, as a choice by other seeds does not; but a largest of several
values and one of these are equal by what was observed, and counts and shares by chance, and the numbers do not tell
which it is. Counting both errs on the side of INCONCLUSIVE.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Sequence

import numpy as np

from compressible.companion.claims.evidence import Evidence, judged, unmet, usable
from compressible.companion.claims.intervals import Estimate, holm, mean, median, share
from compressible.companion.claims.statement import NOT_TESTED, Claim, load_claims

PASS, WEAK, FAIL, INCONCLUSIVE = "PASS", "WEAK", "FAIL", "INCONCLUSIVE"
LEVEL = 0.05


@dataclasses.dataclass(frozen=True)
class Verdict:
    """How a claim fared: the value with its 95 % interval (None for one value), and why if not PASS.

    `rule` tells which version of the claim was judged, and of the claims that share its correction.
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


Found = tuple[Verdict, float | None]  # with its p value, where it takes part in a correction


def judge(figure_id: str, result: Evidence, claims: Sequence[Claim] | None = None) -> list[Verdict]:
    """Verdicts on all claims about one figure, from one result; ClaimError if a metric is no number."""
    mine = [claim for claim in (load_claims() if claims is None else claims) if claim.figure == figure_id]
    found = [_alone(claim, result) for claim in mine]
    for question in {claim.question for claim in mine} - {""}:
        places = [i for i, claim in enumerate(mine) if claim.question == question and found[i][1] is not None]
        corrected = _corrected([mine[i] for i in places], [found[i] for i in places])
        for i, verdict in zip(places, corrected, strict=True):
            found[i] = verdict, None
    return [verdict for verdict, _ in found]


def verdict(claim: Claim, result: Evidence) -> Verdict:
    """The verdict on one claim without the others of its question, by the rules of this module."""
    return _alone(claim, result)[0]


def _corrected(claims: Sequence[Claim], found: Sequence[Found]) -> list[Verdict]:
    """Rule 8 for the claims of one question that have a p value."""
    family = hashlib.sha256("+".join(sorted(claim.rule() for claim in claims)).encode()).hexdigest()[:12]
    adjusted = holm([p for _, p in found if p is not None])
    verdicts = [dataclasses.replace(verdict, rule=family) for verdict, _ in found]
    for i, verdict in enumerate(verdicts):
        if adjusted[i] > LEVEL and verdict.verdict != INCONCLUSIVE:
            reason = f"not after Holm's correction over {len(claims)} claims"
            verdicts[i] = dataclasses.replace(verdict, verdict=INCONCLUSIVE, reason=reason)
    return verdicts


def _alone(claim: Claim, result: Evidence) -> Found:
    """Rules 1 to 7, with the p value that rule 8 asks for."""
    if reason := unmet(claim, result):
        return _without_value(claim, NOT_TESTED, 0, reason)
    values = judged(claim, result)
    if len(values) < claim.seeds:
        return _without_value(claim, NOT_TESTED, len(values), f"{len(values)} of {claim.seeds} {claim.unit}s")
    if lost := int((~usable(claim, values)).sum()):
        return _without_value(claim, FAIL, len(values), f"{lost} of {len(values)} values not finite")
    found = _estimate(claim, values) if len(values) > 1 else None
    one_by_one = found is None or claim.every or claim.judge == "true"
    outcome, reason = _each(claim, values) if found is None or one_by_one else _whole(claim, found)
    if outcome == PASS and not _meets(claim, values, found):
        outcome, reason = WEAK, "the bound holds, the size is not the published one"
    value, low, high = (float(values[0]), None, None) if found is None else (found.value, found.low, found.high)
    verdict = Verdict(claim.id, outcome, value, low, high, len(values), claim.bound_text(), reason, claim.rule())
    return verdict, None if found is None or one_by_one else _p_value(claim, found)


def _without_value(claim: Claim, outcome: str, count: int, reason: str) -> Found:
    return Verdict(claim.id, outcome, None, None, None, count, claim.bound_text(), reason, claim.rule()), None


def _estimate(claim: Claim, values: np.ndarray) -> Estimate:
    if claim.judge in ("true", "share"):
        return share(values)
    if _stopped(claim, values):
        return median(values)
    return mean(values, claim.scale, claim.test_over_train or 0.0)


def _stopped(claim: Claim, values: np.ndarray) -> bool:
    """Whether a value is censored: infinite, or a ratio of 0, which is one to a run that was stopped."""
    return bool(np.isinf(values).any() or (claim.censored and claim.scale == "log" and not values.all()))


def _each(claim: Claim, values: np.ndarray) -> tuple[str, str]:
    """Rules 3 and 4."""
    if _stopped(claim, values):
        return INCONCLUSIVE, "stopped before it arrived"
    inside = (lambda value: value == 1) if claim.judge == "true" else _holds(claim)
    wrong = sum(not inside(value) for value in values)
    if not wrong:
        return PASS, ""
    if claim.weak is not None and all(map(_within(*claim.ends(claim.weak)), values)):
        return WEAK, "only the weak bound holds"
    return FAIL, f"outside the bound: {wrong} of {len(values)}"


def _whole(claim: Claim, found: Estimate) -> tuple[str, str]:
    """Rules 5 and 6."""
    if all(map(_holds(claim), (found.low, found.high))):
        return PASS, ""
    if claim.weak is not None and all(map(_within(*claim.ends(claim.weak)), (found.low, found.high))):
        return WEAK, "only the weak bound holds"
    bottom, top = claim.goal
    if found.high < bottom or found.low > top:
        return FAIL, "the 95 % interval is outside the bound"
    return INCONCLUSIVE, "the 95 % interval is neither inside nor outside the bound"


def _p_value(claim: Claim, found: Estimate) -> float:
    """Twice the one-sided p value of what an interval shows, by the same tests as the interval."""
    outcome = _whole(claim, found)[0]
    if outcome == WEAK:
        shown = found.inside(*claim.ends(claim.weak))
    elif outcome == INCONCLUSIVE:
        shown = min(found.inside(*claim.goal), found.outside(*claim.goal))
    else:
        shown = found.inside(*claim.goal) if outcome == PASS else found.outside(*claim.goal)
    return min(1.0, 2 * shown)


def _holds(claim: Claim) -> Callable[[float], bool]:
    return (lambda value: value > 0) if claim.judge == "greater_than_zero" else _within(*claim.goal)


def _within(low: float, high: float) -> Callable[[float], bool]:
    return lambda value: low <= value <= high


def _meets(claim: Claim, values: np.ndarray, found: Estimate | None) -> bool:
    """Whether our interval, or our one value, and the published one have a number in common."""
    if claim.published_range is None:
        return True
    low, high = (values[0], values[0]) if found is None else (found.low, found.high)
    return bool(low <= claim.published_range[1] and high >= claim.published_range[0])
