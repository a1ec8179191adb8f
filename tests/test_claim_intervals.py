"""Intervals and p values of the claims: against scipy, and by simulation of what they promise."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import scipy.stats

from compressible.companion.claims.intervals import Estimate, holm, interval, mean, median, share

DRAWS = 3000  # the standard error of a coverage of .95 is .004


def coverage(draw: Callable[[np.random.Generator], np.ndarray], truth: float, estimate: Callable) -> float:
    generator = np.random.default_rng(0)
    found = [estimate(draw(generator)) for _ in range(DRAWS)]
    return float(np.mean([each.low <= truth <= each.high for each in found]))


def test_the_mean_is_scipys() -> None:
    values = np.array([0.3, 1.1, 0.7, 2.0])
    test = scipy.stats.ttest_1samp(values, 1.5)
    found = mean(values)
    assert (found.low, found.high) == pytest.approx(tuple(test.confidence_interval()))
    assert 2 * min(found.below(1.5), found.above(1.5)) == pytest.approx(test.pvalue)
    assert found.below(1.5) == pytest.approx(scipy.stats.ttest_1samp(values, 1.5, alternative="less").pvalue)
    assert [float(end) for end in interval(values)] == pytest.approx([found.value, found.low, found.high])


def test_the_log_scale_is_the_geometric_mean() -> None:
    values = np.array([1e-8, 1e-6, 1e-7])
    found, logs = mean(values, "log"), mean(np.log(values))
    assert (found.value, found.low, found.high) == pytest.approx(
        tuple(map(math.exp, (logs.value, logs.low, logs.high)))
    )
    assert found.value == pytest.approx(1e-7)
    assert found.below(1e-6) == pytest.approx(logs.below(math.log(1e-6)))
    assert (found.below(0.0), found.above(0.0)) == (1.0, 0.0)


def test_folds_have_the_variance_of_nadeau_and_bengio() -> None:
    values = np.array([0.1, 0.2, 0.4, 0.3, 0.2])
    found = mean(values, test_over_train=0.25)
    half = scipy.stats.t.ppf(0.975, 4) * values.std(ddof=1) * math.sqrt(1 / 5 + 0.25)
    assert (found.low, found.high) == pytest.approx((0.24 - half, 0.24 + half))


@pytest.mark.parametrize(("corrected", "covered"), [(0.25, 0.95), (0.0, 0.862)])
def test_five_folds_are_covered_with_the_correction_alone(corrected: float, covered: float) -> None:
    def folds(generator: np.random.Generator) -> np.ndarray:
        return math.sqrt(0.2) * generator.standard_normal() + math.sqrt(0.8) * generator.standard_normal(5)

    assert coverage(folds, 0.0, lambda x: mean(x, test_over_train=corrected)) == pytest.approx(covered, abs=0.015)


@pytest.mark.parametrize("count", [3, 5, 10])
def test_sizes_stay_above_zero_and_are_covered(count: int) -> None:
    def draw(generator: np.random.Generator) -> np.ndarray:
        return generator.standard_normal(count)

    truth = math.sqrt(2 / math.pi)
    covered = coverage(draw, truth, lambda x: mean(x, "abs"))
    assert covered == pytest.approx(0.95, abs=0.015)
    assert covered > coverage(draw, truth, lambda x: mean(np.abs(x))), "better than Student's interval of the sizes"
    assert mean(np.array([0.0, 0.9, -0.1]), "abs").low > 0
    found = mean(np.array([1.0, -2.0, 3.0]), "abs")
    half = scipy.stats.t.ppf(0.975, 2) / math.sqrt(3) / 2
    assert (found.value, found.low, found.high) == pytest.approx((2, 2 * math.exp(-half), 2 * math.exp(half)))


def test_correlations_stay_below_one_and_are_covered() -> None:
    generator = np.random.default_rng(1)
    pairs = generator.multivariate_normal([0, 0], [[1, 0.8], [0.8, 1]], size=(20_000, 10))
    centred = pairs - pairs.mean(1, keepdims=True)
    products = np.einsum("npi,npj->nij", centred, centred)
    known = products[:, 0, 1] / np.sqrt(products[:, 0, 0] * products[:, 1, 1])

    def draw(generator: np.random.Generator) -> np.ndarray:
        return generator.choice(known, 5)

    covered = coverage(draw, known.mean(), lambda x: mean(x, "correlation"))
    assert 0.92 < covered < 0.97 and covered > coverage(draw, known.mean(), mean)
    perfect = mean(np.array([1.0, 1.0, 0.9]), "correlation")
    assert perfect.value < perfect.high < 1 < mean(np.array([1.0, 1.0, 0.9])).high
    found, z = mean(np.array([0.5, 0.7]), "correlation"), math.atanh(0.6)
    half = scipy.stats.t.ppf(0.975, 1) * 0.1 / (1 - 0.36)
    assert (found.low, found.high) == pytest.approx((math.tanh(z - half), math.tanh(z + half)))


@pytest.mark.parametrize(("true", "count"), [(0, 10), (3, 10), (10, 10)])
def test_shares_are_scipys(true: int, count: int) -> None:
    found, tests = share(np.arange(count) < true), scipy.stats.binomtest(true, count, 0.4)
    exact = tests.proportion_ci()
    assert (found.value, found.low, found.high) == pytest.approx((true / count, exact.low, exact.high))
    for side, p in (("less", found.below(0.4)), ("greater", found.above(0.4))):
        assert p == pytest.approx(scipy.stats.binomtest(true, count, 0.4, alternative=side).pvalue)


def test_the_median_is_that_of_the_sign_test() -> None:
    values = np.array([3.0, 1.0, math.inf, 2.0, 5.0, 4.0, math.inf, 6.0, 7.0])
    found, exact = median(values), scipy.stats.quantile_test(np.where(np.isinf(values), 99, values), q=0, p=0.5)
    assert (found.value, found.low, found.high) == (5.0, 2.0, math.inf)
    assert found.low == exact.confidence_interval().low
    assert found.below(7.0) == pytest.approx(scipy.stats.binomtest(7, 9, alternative="greater").pvalue)
    assert found.above(2.0) == pytest.approx(scipy.stats.binomtest(8, 9, alternative="greater").pvalue)
    assert (median(values[:5]).low, median(values[:5]).high) == (-math.inf, math.inf), "five values are too few"
    six = median(np.array([1.0, 2.0, 3.0, 4.0, 5.0, math.inf]))
    assert (six.value, six.low, six.high) == (3.5, 1.0, math.inf)
    assert median(np.full(6, math.inf)).value == math.inf


@pytest.mark.parametrize("count", [6, 10, 15])
def test_medians_of_skewed_values_are_covered(count: int) -> None:
    def draw(generator: np.random.Generator) -> np.ndarray:
        values = generator.lognormal(size=count)
        return np.where(values > 3, math.inf, values)

    assert coverage(draw, 1.0, median) >= 0.945


@pytest.mark.parametrize("scale", ["linear", "log", "abs", "correlation"])
@pytest.mark.parametrize("value", [0.1, 1.0, 0.0])
def test_values_that_are_all_the_same_leave_nothing_open(scale: str, value: float) -> None:
    found = mean(np.full(3, value), scale)
    assert (found.value, found.low, found.high) == (value,) * 3
    assert (found.below(value), found.above(value)) == (0.0, 0.0)
    assert (found.below(value - 0.01), found.above(value - 0.01)) == (1.0, 0.0)


@pytest.mark.parametrize(
    ("scale", "values", "value"),
    [
        ("correlation", [1.0, 1.0, 1 - 2**-53], 1.0),  # as orders of the same kind have, whose mean rounds to 1
        ("correlation", [-1.0, -1.0, 2**-53 - 1], -1.0),
        ("log", [0.0, 1e-320], float(np.finfo(float).tiny)),
        ("linear", [1e-200, 3e-200], 2e-200),  # the square of their difference is zero
    ],
)
def test_values_that_differ_by_rounding_alone_are_judged(scale: str, values: list[float], value: float) -> None:
    found = mean(np.array(values), scale)
    assert (found.value, found.low, found.high) == pytest.approx((value,) * 3, rel=1e-12)
    assert (found.below(0.5), found.above(0.5)) == ((1.0, 0.0) if value == 1 else (0.0, 1.0))


def estimates() -> list[Estimate]:
    generator = np.random.default_rng(2)
    values = generator.uniform(0.05, 0.95, (40, 7))
    found = [mean(row, scale) for row in values for scale in ("linear", "log", "abs", "correlation")]
    return [*found, *(mean(row, "linear", 0.25) for row in values), *(share(row < 0.5) for row in values)] + [
        median(np.where(row > 0.8, math.inf, row)) for row in values
    ]


@pytest.mark.parametrize("bound", [0.2, 0.5, 0.6])
def test_interval_and_p_value_say_the_same(bound: float) -> None:
    for found in estimates():
        assert (found.high <= bound) == (found.below(bound) <= 0.025)
        assert (found.low >= bound) == (found.above(bound) <= 0.025)


def test_inside_needs_both_sides_and_outside_one() -> None:
    found = mean(np.array([0.4, 0.5, 0.6]))
    assert found.inside(0.3, 0.9) == found.above(0.3) > found.below(0.9)
    assert found.outside(0.3, 0.45) == pytest.approx(found.above(0.45)) and found.above(0.45) < found.below(0.3)
    assert found.inside(-math.inf, 0.9) == found.below(0.9) == pytest.approx(found.outside(0.9, math.inf))


def test_holm_is_the_stepwise_bonferroni() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.02, 0.02]) == [0.04, 0.04], "what is equal stays equal"
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []
