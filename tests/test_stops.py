"""What curves come to: ends, stops and needs, on curves made by hand."""

import numpy as np
import pytest

from compressible.experiments import outcomes


def _curves():
    nan = np.nan
    return {
        "a/iterations": np.array([0, 10, 20, 30]),
        "a/loss": np.array([[1.0, 0.5, 0.2, 0.05], [1.0, 0.5, 0.05, nan]]),
        "a/error": np.array([[4.0, 2.0, 1.0, 0.5], [4.0, 2.0, 1.0, nan]]),
        "a/seconds": np.array([[0.0, 1.0, 2.0, 3.0], [0.0, 1.0, 2.0, nan]]),
        "a/stopped": np.array([30, 20]),
        "a/diverged": np.array([False, False]),
        "b/iterations": np.array([0, 10, 20]),
        "b/loss": np.array([[1.0, 0.2, 0.05], [1.0, 3.0, np.inf]]),
        "b/error": np.array([[4.0, 2.0, 0.25], [4.0, 8.0, np.inf]]),
        "b/seconds": np.array([[0.0, 0.2, 0.4], [0.0, 0.2, 0.4]]),
        "b/stopped": np.array([20, 20]),
        "b/diverged": np.array([False, True]),
    }


def test_values_under_a_name():
    assert outcomes.prefixed(3, {"a": 1, "b": 2}) == {"3/a": 1, "3/b": 2}


def test_the_last_finite_value_passes_over_padding_and_overflow():
    rows = np.array([[3.0, 2.0, np.nan], [3.0, 5.0, np.inf], [3.0, 2.0, 1.0]])
    np.testing.assert_array_equal(outcomes.last_finite(rows), [2.0, 5.0, 1.0])


def test_stops_by_hand():
    out = outcomes.stops(_curves(), ["a", "b"], tolerance=0.1)
    np.testing.assert_array_equal(out["a/to_stop"], [30.0, 20.0])
    np.testing.assert_array_equal(out["b/to_stop"], [20.0, np.nan])
    np.testing.assert_allclose(out["b/stop_ratio"], [2 / 3, np.nan])
    np.testing.assert_allclose(out["a/milliseconds"], [100.0, 100.0])
    np.testing.assert_allclose(out["b/cheaper"], [5.0, 5.0])
    np.testing.assert_array_equal(out["b/end"], [0.25, np.inf])  # and not the 8 before it diverged


def test_stopping_together_means_the_same_record_of_both():
    curves = _curves() | {"b/loss": np.array([[1.0, 0.2, 0.05], [1.0, 0.2, 0.05]]), "b/diverged": np.zeros(2, bool)}
    out = outcomes.stop_together(curves, ("a", "b"), tolerance=0.1)
    assert out["same_record"].tolist() == [False, True]
    np.testing.assert_allclose(out["speedup"], [3.0 / 0.4, 2.0 / 0.4])
    np.testing.assert_array_equal(out["a/end"], [0.05, 0.05])
    never = outcomes.stop_together(_curves(), ("a", "b"), tolerance=1e-9)
    assert not never["same_record"].any() and np.isnan(never["speedup"]).all()  # neither gets there


def test_an_end_is_the_last_record_and_never_the_best_one():
    curves = _curves() | {"a/error": np.array([[4.0, 0.1, 1.0, 2.0], [4.0, 0.1, 3.0, np.nan]])}  # as noise lets it rise
    curves |= {"a/loss": curves["a/error"]}
    np.testing.assert_array_equal(outcomes.final(curves, "a"), [2.0, 3.0])
    np.testing.assert_array_equal(outcomes.milestones(curves, ["a"], level=0.5)["a/final"], [2.0, 3.0])
    assert outcomes.stop_together(curves, ("a", "b"), tolerance=0.1)["a/end"].tolist() == [2.0, 3.0]
    clock = {f"{name}/{key}": curves[f"{name}/{key}"] for name in "ab" for key in ("iterations", "seconds")}
    clock |= {"a/seconds": np.array([[0.0, 1.0, 2.0, 3.0]] * 2)}
    assert outcomes.needs_alone(curves, clock, ["a"], tolerance=0.1)["error"][:, 0].tolist() == [2.0, 3.0]


def test_a_run_stopped_by_its_budget_is_censored_and_one_that_diverges_has_no_count():
    assert outcomes.reached(_curves(), "a", 0.01, "loss").tolist() == [np.inf, np.inf]
    np.testing.assert_array_equal(outcomes.reached(_curves(), "b", 0.5, "loss"), [10.0, np.nan])
    later = _curves() | {"b/loss": np.array([[1.0, 0.2, 0.05], [1.0, 0.2, np.inf]])}
    np.testing.assert_array_equal(outcomes.reached(later, "b", 0.5, "loss"), [10.0, np.nan])  # though it was below once


def test_a_dip_below_the_level_is_no_arrival():
    loss = np.array([[1.0, 0.01, 0.5, 0.02], [1.0, 0.01, 0.5, np.nan]])
    assert outcomes.reached(_curves() | {"a/loss": loss}, "a", 0.1, "loss").tolist() == [30.0, np.inf]
    assert outcomes.reached(_curves() | {"a/loss": loss}, "a", 0.1, "loss", "seconds").tolist() == [3.0, np.inf]
    assert outcomes.reached(_curves(), "a", 0.3, "loss").tolist() == [20.0, 20.0]


def test_outcomes_of_a_run_that_diverges_are_no_success():
    out = outcomes.outcomes(_curves(), ["a", "b"], tolerance=0.1, recovered=0.3)
    np.testing.assert_array_equal(out["b/final"], [0.25, np.inf])
    np.testing.assert_array_equal(out["b/final_loss"], [0.05, np.inf])
    np.testing.assert_array_equal(out["b/recovered_at"], [20.0, np.nan])
    np.testing.assert_array_equal(out["a/recovered_at"], [np.inf, np.inf])


def test_needs_alone_are_iterations_times_the_clock_of_the_last_stretch():
    clock = {f"{name}/iterations": np.array([0, 400, 800]) for name in "ab"}
    clock |= {"a/seconds": np.array([[0.0, 9.0, 9.4]] * 2), "b/seconds": np.array([[0.0, 9.0, 9.8]] * 2)}
    out = outcomes.needs_alone(_curves(), clock, ["a", "b"], tolerance=0.1)
    np.testing.assert_array_equal(out["iterations"], [[30.0, 20.0], [20.0, np.nan]])
    np.testing.assert_allclose(out["microseconds"], [[1000.0, 2000.0]] * 2)
    np.testing.assert_allclose(out["seconds"], [[0.03, 0.04], [0.02, np.nan]])
    assert out["error"][0].tolist() == [0.5, 0.25]


def test_needs_of_two_kinds_compared():
    slow = {"iterations": np.array([[30.0, 20.0]]), "seconds": np.array([[3.0, 2.0]]), "error": np.array([[0.1, 0.2]])}
    fast = {"iterations": np.array([[10.0, 10.0]]), "seconds": np.array([[2.0, 0.5]]), "error": np.array([[0.3, 0.1]])}
    out = {name: value.tolist() for name, value in outcomes.compare_needs(slow, fast).items()}
    expected = {"ratio": [[3.0, 2.0]], "least_ratio": [2.0], "first_ratio": [3.0], "last_ratio": [2.0], "fall": [1.0]}
    expected |= {"flat": [1.0], "worst_error": [0.3], "least_speedup": [1.5]}
    assert out == {name: pytest.approx(value) if name != "ratio" else value for name, value in expected.items()}
