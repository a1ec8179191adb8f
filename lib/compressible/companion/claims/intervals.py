"""What several values tell of one number: an estimate, its 95 % interval, and p values for its side of a bound.

Every interval here is a set of tests turned round, so that interval and p value cannot disagree: the upper end is below
x where `Estimate.below(x)`, the p value of "the number lies below x", is under .025, and likewise from above.

Where n values x have mean m and standard deviation s, each scale has its own statistic:

- "linear": the mean, with Student's interval m -+ t e on n - 1 degrees of freedom, where e = s / sqrt(n).
- "log": the geometric mean, which is Student's interval of the logarithms.
- "abs": the mean size m of |x|. It cannot be negative, so the interval is that of its logarithm: to first order
  log m has the standard error e / m, which gives m exp(-+ t e / m).
- "correlation": the mean correlation. It stays within -1 and 1, so the interval is that of Fisher's z = artanh m, whose
  standard error to first order is e / (1 - m^2). The z of the mean is taken, not the mean of the z, as a single
  correlation of exactly 1 (a perfect order of ten widths) would make the latter infinite.
- Truth values have the exact interval of Clopper and Pearson, from the tails of the binomial distribution.
- Values of which some are infinite, as a run was stopped before it arrived, have ranks but no mean. The statistic is
  the median with the interval of the sign test: between the k-th least and the k-th largest value, k being the largest
  for which a fair coin shows fewer than k heads in n throws with a probability of at most .025. Under six values
  there is none, and the interval is the whole line.

Values from overlapping training sets (folds, repeated splits) are correlated by about test / (test + train) rows, so
e = s sqrt(1/n + test/train) (Nadeau and Bengio), which is exact for normal values of that correlation.

Reference: Nadeau and Bengio, "Inference for the Generalization Error", Machine Learning 52 (2003); Clopper and Pearson,
Biometrika 26 (1934); Holm, Scandinavian Journal of Statistics 6 (1979).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import bdtr, bdtrc, betainc, betaincinv, stdtr, stdtrit

TAIL = 0.025  # of each side, which makes a two-sided interval of 95 %


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval; `below(x)` and `above(x)` are one-sided p values of its lying there."""

    value: float
    low: float
    high: float
    below: Callable[[float], float]
    above: Callable[[float], float]

    def inside(self, low: float, high: float) -> float:
        """The p value of lying within [low, high]: both sides must be shown, so the larger one counts."""
        return max(0.0 if low == -math.inf else self.above(low), 0.0 if high == math.inf else self.below(high))

    def outside(self, low: float, high: float) -> float:
        """The p value of lying outside of [low, high]: one side is enough, so the smaller one counts.

        The ends are inside, so that a value at one, as where two runs took the same steps, is no evidence of that.
        """
        under, over = math.nextafter(low, -math.inf), math.nextafter(high, math.inf)
        return min(1.0 if low == -math.inf else self.below(under), 1.0 if high == math.inf else self.above(over))


def interval(values: Any, axis: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean, low and high end of its 95 % t interval along an axis; the ends of a single value are NaN."""
    values = np.asarray(values, float)
    count, mean = values.shape[axis], values.mean(axis)
    if count < 2:
        return mean, np.full_like(mean, np.nan), np.full_like(mean, np.nan)
    half = stdtrit(count - 1, 1 - TAIL) * values.std(axis, ddof=1) / math.sqrt(count)
    return mean, mean - half, mean + half


def mean(values: np.ndarray, scale: str = "linear", test_over_train: float = 0.0) -> Estimate:
    """The mean of n > 1 finite values on a scale (see above).

    Args:
        values: (n,), positive or zero under "log", within -1 and 1 under "correlation". Zero counts as the least
            positive number under "log".
        scale: "linear", "log", "abs" or "correlation".
        test_over_train: Rows judged over rows trained on, of folds and splits; 0 for independent values.

    Example:
        >>> found = mean(np.array([1.0, 2.0, 3.0]))
        >>> print(f"{found.value} [{found.low:.2f}, {found.high:.2f}], p = {2 * found.above(0):.3f}")
        2.0 [-0.48, 4.48], p = 0.074
    """
    values = np.abs(values) if scale == "abs" else values
    if np.ptp(values) == 0:
        return _certain(float(values[0]))
    if scale == "log":
        values = np.log(np.maximum(values, np.finfo(float).tiny))
    centre = float(values.mean())
    error = float(values.std(ddof=1)) * math.sqrt(1 / len(values) + test_over_train)
    if scale == "abs":
        centre, error = math.log(centre), error / centre
    elif scale == "correlation" and abs(centre) < 1:
        centre, error = math.atanh(centre), error / (1 - centre**2)
    elif scale == "correlation":
        error = 0.0
    if error == 0:  # values that differ by less than their mean, or the square of a difference, can hold
        return _certain(centre if scale in ("linear", "correlation") else math.exp(centre))
    return _student(centre, error, len(values) - 1, scale)


def share(values: np.ndarray) -> Estimate:
    """The share of true ones among n values, exactly."""
    count, true = len(values), int(np.count_nonzero(values))
    false = count - true
    return Estimate(
        true / count,
        float(betaincinv(true, false + 1, TAIL)) if true else 0.0,
        float(betaincinv(true + 1, false, 1 - TAIL)) if false else 1.0,
        lambda x: float(betainc(false, true + 1, 1 - x)) if false else 1.0,
        lambda x: float(betainc(true, false + 1, x)) if true else 1.0,
    )


def median(values: np.ndarray) -> Estimate:
    """The median of n values, of which some may be infinite, by the sign test."""
    count, ordered = len(values), np.sort(values)
    kth = sum(bdtr(np.arange(count // 2), count, 0.5) <= TAIL)  # the first of these is P(no head at all)
    low, high = (ordered[kth - 1], ordered[-kth]) if kth else (-math.inf, math.inf)
    middle = float(ordered[(count - 1) // 2]), float(ordered[count // 2])
    return Estimate(
        math.inf if math.inf in middle else sum(middle) / 2,
        float(low),
        float(high),
        lambda x: _heads(int((values <= x).sum()), count),
        lambda x: _heads(int((values >= x).sum()), count),
    )


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p values: of m tests, those at most .05 keep the risk of any wrong decision at 5 %.

    Example:
        >>> [round(p, 3) for p in holm([0.01, 0.04, 0.03])]
        [0.03, 0.06, 0.06]
    """
    adjusted, largest = [0.0] * len(p_values), 0.0
    for place, index in enumerate(np.argsort(p_values, kind="stable").tolist()):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def _student(centre: float, error: float, freedom: int, scale: str) -> Estimate:
    there, back = _SCALES[scale]
    half = float(stdtrit(freedom, 1 - TAIL)) * error
    return Estimate(
        back(centre),
        back(centre - half),
        back(centre + half),
        lambda x: float(stdtr(freedom, (centre - there(x)) / error)),
        lambda x: float(stdtr(freedom, (there(x) - centre) / error)),
    )


def _certain(value: float) -> Estimate:
    """Values that are all the same leave nothing open: p is 0 on the value's side of a bound, and 1 on the other."""
    return Estimate(value, value, value, lambda x: float(value > x), lambda x: float(value < x))


def _heads(least: int, count: int) -> float:
    """Probability of at least so many heads."""
    return float(bdtrc(least - 1, count, 0.5)) if least else 1.0


def _log(x: float) -> float:
    return math.log(x) if x > 0 else -math.inf


def _exp(x: float) -> float:
    return math.exp(x) if x < 709 else math.inf


def _atanh(x: float) -> float:
    return math.atanh(x) if abs(x) < 1 else math.copysign(math.inf, x)


_SCALES: dict[str, tuple[Callable[[float], float], Callable[[float], float]]] = {
    "linear": (float, float),
    "log": (_log, _exp),
    "abs": (_log, _exp),
    "correlation": (_atanh, math.tanh),
}
