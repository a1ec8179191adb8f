"""How a grid of learning rates grows, and which of its rates is taken."""

from __future__ import annotations

import math

import numpy as np
import pytest

from compressible.experiments import rate_grid


@pytest.mark.parametrize(
    ("peak", "rates", "expected"),
    [
        (1e-3, [1e-4, 1e-3, 1e-2], [1e-4, 1e-3, 1e-2]),
        (1e-2, [1e-4, 1e-3], [1e-4, 1e-3, 3e-3, 1e-2, 3e-2]),
        (1e-5, [1e-4, 1e-3], [3e-6, 1e-5, 3e-5, 1e-4, 1e-3]),
        (1e-4, [1e-4, 1e-3], [3e-5, 1e-4, 1e-3]),
        (1.0, [9e-4, 2e-3], [9e-4, 2e-3, 3e-3, 1e-2, 3e-2, 1e-1]),  # four more at most
        (1e-9, [4e-4, 9e-4], [1e-5, 3e-5, 1e-4, 3e-4, 4e-4, 9e-4]),
    ],
)
def test_a_grid_grows_beyond_an_end_that_wins(peak, rates, expected):
    asked = []

    def scores_of(some):
        asked.append(list(some))
        return [-abs(math.log(rate / peak)) for rate in some]

    found = rate_grid.search_rates(scores_of, rates)
    assert list(found) == pytest.approx(expected)
    assert asked[0] == rates and all(len(some) == 1 for some in asked[1:])  # the grid first, in one call
    assert sorted(rate for some in asked for rate in some) == pytest.approx(expected)
    assert list(found.values()) == pytest.approx([-abs(math.log(rate / peak)) for rate in expected])
    assert rate_grid.is_inside(found) == (expected[0] < peak < expected[-1])


def test_a_grid_goes_on_by_its_own_factor_though_its_numbers_are_rounded():
    factors = [1e-2 * factor for factor in (0.1, 0.3, 1.0, 3.0, 10.0)]
    for best, beyond in ((0, [1e-4, 3e-4]), (4, [0.3, 1.0])):
        scores = {factors[best]: 1.0, beyond[1 if best == 0 else 0]: 2.0}  # the next one wins, the one after loses
        found = rate_grid.search_rates(lambda some, scores=scores: [_near(scores, rate) for rate in some], factors)
        assert sorted(set(found) - set(factors)) == pytest.approx(beyond)


def _near(scores, rate):
    return next((score for known, score in scores.items() if math.isclose(known, rate)), 0.0)


def test_grids_of_several_cases_grow_apart_and_are_scored_together():
    peaks, asked = {"low": 1e-5, "inside": 1e-3, "high": 3e-1}, []

    def scores_of(pairs):
        asked.append(list(pairs))
        return [-abs(math.log(rate / peaks[case])) for case, rate in pairs]

    found = rate_grid.search_each(scores_of, list(peaks), [1e-4, 1e-3, 1e-2, 1e-1])
    assert asked[0] == [(case, rate) for case in peaks for rate in (1e-4, 1e-3, 1e-2, 1e-1)]
    assert [[case for case, _ in some] for some in asked[1:]] == [["low", "high"], ["low", "high"], ["low"]]
    for case, peak in peaks.items():
        assert rate_grid.best_of(found[case]) == pytest.approx(peak) and rate_grid.is_inside(found[case])
    assert list(found["inside"]) == [1e-4, 1e-3, 1e-2, 1e-1]


def test_growth_can_be_forbidden():
    assert list(rate_grid.search_rates(lambda some: some, [0.1, 0.3], more=0)) == [0.1, 0.3]


def test_of_equal_scores_the_lowest_rate_is_taken_and_rounding_decides_nothing():
    third = np.mean([0.1, 0.1, 0.1])
    assert third > 0.1  # by rounding alone
    assert rate_grid.best_of({0.01: 0.1, 0.03: third}) == 0.01
    assert rate_grid.best_of({0.01: third, 0.03: 0.1}) == 0.01
    assert rate_grid.best_of({0.01: 0.1, 0.03: 0.1 + 1e-6}) == 0.03
    flat = rate_grid.search_rates(lambda some: [0.5] * len(some), [0.01, 0.03])
    assert list(flat) == pytest.approx([1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2])  # towards the safer ones
    assert rate_grid.best_of(flat) == min(flat)


def test_scores_that_are_not_finite_lose():
    scores = {3e-4: 0.1, 1e-3: 0.2, 1e-2: math.nan, 1e-1: math.inf}
    assert rate_grid.best_of(scores) == 1e-3
    assert rate_grid.best_of({2.0: math.nan, 1.0: math.nan}) == 1.0
    found = rate_grid.search_rates(lambda some: [scores[rate] for rate in some], [3e-4, 1e-3, 1e-2])
    assert list(found) == [3e-4, 1e-3, 1e-2] and math.isnan(found[1e-2])


@pytest.mark.parametrize("rates", [[], [0.1, 0.01], [0.1, 0.1], [0.0, 0.1]])
def test_rates_ascend(rates):
    with pytest.raises(ValueError, match=r"rates are \[.*\], expected at least one, above 0 and ascending"):
        rate_grid.search_rates(lambda some: pytest.fail("scored"), rates)


def test_a_grid_goes_on_by_the_factor_that_it_is_given():
    def scores_of(pairs):
        return [-abs(rate - 8.0) for _, rate in pairs]

    found = rate_grid.search_each(scores_of, ["a"], [1.0, 2.0], more=9, beside=lambda rate, way: rate * 2.0**way)
    assert list(found["a"]) == [1.0, 2.0, 4.0, 8.0, 16.0]
