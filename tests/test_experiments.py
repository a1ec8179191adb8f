"""What the protocols of the recovery figures come to, by hand and against the theory."""

import numpy as np
import pytest
import torch

import compressible as cd
from compressible.experiments.completion_fits import Fit, summary
from compressible.experiments.components import (
    around,
    beside_the_loss,
    draw_stack,
    leading_alignment,
    learning_order,
    over_problems,
    triplets,
    watch,
)
from compressible.experiments.outcomes import held, linear_convergence, outcomes, stays_above
from compressible.experiments.outer_ratios import arrivals, crossing, gain_at_one_step, limits, pace, savings
from compressible.experiments.starts import completion_starts, random_completion, start_names

SETTINGS = {"dimension": 12, "rank": 2, "observed": 0.6, "depth": 3, "init_scale": 0.1, "step_size": 2.0}


def _build(generator):
    return completion_starts(generator, outer_ratios=[1.0, 3.0], **SETTINGS)


def test_starts_are_the_original_and_the_compressed_network_at_each_ratio():
    problem, starts = _build(torch.Generator().manual_seed(1))
    assert list(starts) == start_names([1.0, 3.0]) == ["original", "alpha = 1", "alpha = 3"]
    assert [start[1:] for start in starts.values()] == [(2.0, 1.0), (2.0, 1.0), (2.0, 3.0)]
    assert [start[0][0].shape[0] for start in starts.values()] == [12, 4, 4]
    sizes = dict(zip(starts, (4.0, 3.0, 1.5), strict=True))
    own = completion_starts(
        torch.Generator().manual_seed(1), outer_ratios=[1.0, 3.0], **SETTINGS | {"step_size": sizes}
    )
    assert {name: start[1] for name, start in own[1].items()} == sizes and torch.equal(own[0].mask, problem.mask)
    same = random_completion(12, 2, 0.6, torch.Generator().manual_seed(1))
    assert torch.equal(same.mask, problem.mask) and int(problem.mask.sum()) == 86
    assert torch.linalg.matrix_rank(problem.target) == 2


# outcomes


def test_a_stopped_run_stays_where_it_ended():
    np.testing.assert_array_equal(held(np.array([[3.0, 1.0, np.nan], [3.0, 2.0, 1.0]])), [[3, 1, 1], [3, 2, 1]])


def test_a_curve_that_dips_has_not_settled_before():
    curves = np.array([[0.0, 0.95, 0.5, 0.95, 1.0], [0.0, 0.0, 0.0, 0.0, 0.5], [1.0, 1.0, 1.0, 1.0, 1.0]])
    np.testing.assert_array_equal(stays_above(curves, 0.9, np.arange(0, 50, 10)), [30, np.nan, 0])
    np.testing.assert_array_equal(stays_above(curves, 0.9, 1 - curves), [1 - 0.95, np.nan, 0])


def test_outcomes_by_hand():
    curves = {
        "a/iterations": np.array([0, 10, 20]),
        "a/loss": np.array([[4.0, 1e-3, np.nan], [4.0, 3.0, 2.0]]),
        "a/error": np.array([[4.0, 0.5, np.nan], [4.0, 3.0, 1.0]]),
        "a/diverged": np.array([False, False]),
    }
    out = outcomes(curves, ["a"], tolerance=1e-2, recovered=0.8)
    np.testing.assert_array_equal(out["a/final"], [0.5, 1.0])
    np.testing.assert_array_equal(out["a/final_loss"], [1e-3, 2.0])
    np.testing.assert_array_equal(out["a/iterations_to"], [10, np.inf])
    np.testing.assert_array_equal(out["a/recovered_at"], [10, np.inf])


# components


def _factorization(generator):
    right, left = cd.orthogonal_factors((8, 8), 2, 2, 1.0, generator)
    problem = cd.MatrixFactorization(left * torch.tensor([6.0, 3.0]).double() @ right)
    return problem, {"original": (cd.orthogonal_factors((8, 8), scale=0.1, generator=generator), 2.0, 1.0)}


def test_a_stack_holds_all_seeds_of_each_build_in_turn():
    problem, factors = draw_stack([_factorization, _factorization], seed=3, seeds=2)
    alone, starts = _factorization(torch.Generator().manual_seed(4))
    for place in (1, 3):
        torch.testing.assert_close(problem.target[place], alone.target)
        torch.testing.assert_close(factors[0][place], starts["original"][0][0])


def test_the_components_of_a_factorization_are_found_the_largest_first():
    problem, factors = draw_stack([_factorization], seed=0, seeds=2)
    target = torch.linalg.svdvals(problem.target)[:, :2].numpy()
    curves = watch(problem, factors, triplets(problem.target, 2), 2.0, 6000, 50, tolerance=1e-12)
    assert curves["values"].shape == (2, len(curves["iterations"]), 4) and curves["iterations"][1] == 50
    np.testing.assert_allclose(curves["values"][:, -1, :2], target, rtol=1e-4)
    np.testing.assert_allclose(curves["components"][:, -1], target, rtol=1e-4)
    order = learning_order(curves, target)
    assert order["exactly_r"].all() and (order["pairs"] == 1).all() and (order["components"] == 1).all()
    assert (order["first"][:, 0] < order["first"][:, 1]).all() and (order["aligned"] > 0.8).all()
    assert (order["extra"] < 1e-2).all() and (order["apart"] == 1).all()


def test_what_is_learned_when_by_hand():
    values = np.array([[[0.1, 0.1, 0.0], [2.0, 0.1, 0.0], [2.0, 0.95, 0.0]]] * 3)
    values[1, 2, 2] = 0.03
    sides = np.array([[[0.3, 0.9], [0.8, 0.9], [1.0, 0.7]]] * 3)
    curves = {"values": values, "left": sides, "right": sides, "components": values[..., :2]}
    target = np.array([[2.0, 1.0], [2.0, 1.0], [9.0, 9.0]])
    order = learning_order(curves | {"iterations": np.arange(3)}, target)
    np.testing.assert_allclose(order["alignment"], [[0.8, 0.7], [0.8, 0.7], [1.0, 0.7]])  # at the end where none rises
    np.testing.assert_array_equal(order["exactly_r"], [True, False, False])
    np.testing.assert_array_equal(order["apart"], [1.0, 1.0, 0.0])
    together = curves | {"values": np.where(np.arange(3)[:, None] > 0, 2.0, values), "iterations": np.arange(3)}
    late = learning_order(together | {"values": together["values"] * [0.6, 1.0, 0.0]}, target)
    np.testing.assert_array_equal(late["apart"], [0.0, 0.0, 0.0])
    both = over_problems({"one": order, "two": {**order, "extra": order["extra"] + 1, "aligned": order["aligned"] / 2}})
    np.testing.assert_allclose(both["extra"], order["extra"] + 1)
    np.testing.assert_allclose(both["aligned/two"], order["aligned"] / 2)
    assert both["exactly_r"].tolist() == [True, False, False] and both["components"].shape == (3,)


def test_curves_are_seen_from_each_ones_own_time():
    time, curves = 10 * np.arange(5), np.arange(15.0).reshape(3, 5)
    since, seen = around(curves, time, np.array([10.0, 20.0, np.nan]))
    assert since.tolist() == [-10, 0, 10, 20]
    np.testing.assert_array_equal(seen, [[0, 1, 2, 3], [6, 7, 8, 9], [np.nan] * 4])
    assert around(curves, time, np.full(3, np.nan))[1].shape == (3, 5)


def test_when_the_leading_pair_is_found_beside_the_loss_by_hand():
    loss = np.array([[2.0, 2.0, 0.1, 0.0], [2.0, 0.1, 0.1, 0.0], [2.0, 0.1, 0.0, 0.0]])
    left = np.array([[0.0, 0.95, 0.95, 1.0], [0.0, 0.95, 0.5, 0.95], [0.0, 0.0, 0.0, 0.4]])
    out = beside_the_loss({"iterations": 10 * np.arange(4), "loss": loss, "left": left, "right": left / 1.01})
    np.testing.assert_array_equal(out["found_at"], [10, 30, np.inf])
    np.testing.assert_array_equal(out["fallen_at"], [20, 10, 10])
    np.testing.assert_array_equal(out["loss_share"], [1.0, 0.0, np.nan])
    assert out["sooner"].tolist() == [True, False, False] and out["since"].tolist() == [-10, 0, 10]
    np.testing.assert_allclose(out["alignment"][0], left[0, 1:] / 1.01)
    np.testing.assert_allclose(out["final"], left[:, -1] / 1.01)


def test_the_outer_factors_turn_to_the_leading_component():
    problem, factors = draw_stack([_factorization], seed=0, seeds=2)
    curves = watch(problem, factors, leading_alignment(problem.target), 2.0, 6000, 1000, tolerance=1e-12)
    assert (curves["left"][:, -1] > 0.99).all() and (curves["right"][:, -1] > 0.99).all()
    assert (curves["left"][:, 0] < 0.99).all()
    torch.testing.assert_close(torch.tensor(curves["loss"][:, 0]), problem.loss(cd.product(factors)))


# outer ratios


def test_crossing_is_interpolated_between_the_ratios_around_it():
    ratios = np.array([0.5, 1.0, 2.0])
    assert crossing(ratios, np.array([300.0, 200.0, 100.0]), 150.0) == pytest.approx(1.5)
    assert crossing(ratios, np.array([300.0, 200.0, 100.0]), 400.0) == 0.5
    assert crossing(ratios, np.array([300.0, 200.0, 100.0]), 50.0) == np.inf


def test_savings_by_hand():
    counts = np.array([[200.0, 300.0, 100.0, np.nan], [100.0, 200.0, 300.0, 50.0]])
    out = savings(counts, np.array([0.5, 1.0, 20.0]), np.array([2.0, 10.0]), np.array([30.0, 10.0]), largest=9.75)
    np.testing.assert_array_equal(out["increases"], [0, 1])
    np.testing.assert_array_equal(out["end_ratio"], [0.5, 3.0])
    np.testing.assert_array_equal(out["best"], [1, 20])
    np.testing.assert_array_equal(out["best_over_limit"], [0.5, 2.0])
    np.testing.assert_array_equal(out["settled_above"], [0, 1])


def test_arrivals_of_a_sweep():
    names = start_names([1.0, 3.0])
    curves = cd.stack_starts(_build, 0, 2, steps=4000, record_every=100, tolerance=1e-6)
    out = arrivals(curves, names, 1e-6)
    assert out["to_tolerance"].shape == out["error"].shape == out["diverged"].shape == (2, 3)
    assert np.isfinite(out["to_tolerance"]).all() and not out["diverged"].any()
    np.testing.assert_array_equal(out["to_tolerance"][:, 2], curves["alpha = 3/stopped"])
    np.testing.assert_array_equal(out["worst_error"], out["error"].max(1))
    never = arrivals(curves, names, 1e-300)
    assert np.isinf(never["to_tolerance"]).all() and np.isnan(never["worst_error"]).all()  # and not an error of 0


def test_savings_over_an_original_that_never_arrives_are_none():
    counts = np.array([[np.inf, 9.0, 8.0], [np.nan, 9.0, 8.0]])
    out = savings(counts, np.array([0.5, 1.0]), np.array([2.0, 2.0]), np.array([3.0, 3.0]), largest=9.75)
    assert np.isnan(out["end_ratio"]).all() and np.isinf(out["crossing"]).all()


def test_the_gain_of_ratios_at_one_step_is_over_ratio_one():
    ratios = np.array([0.5, 1.0, 2.0, 4.0])
    counts = np.array(
        [[90.0, 5.0, 10.0, 8.0, np.nan], [90.0, 20.0, 10.0, np.inf, np.nan], [90.0, 1.0, np.nan, 8.0, 9.0]]
    )
    np.testing.assert_array_equal(gain_at_one_step(counts, ratios), [0.8, 1.0, np.nan])


def test_limits_are_those_of_the_theory():
    problems = [_build(torch.Generator().manual_seed(seed))[0] for seed in (0, 1)]
    found, problem = limits(problems, step_size=2.0, depth=3), problems[1]
    whole = cd.theory.outer_ratio_limit(cd.MatrixFactorization(problem.target), 2.0, 3)
    assert found["limit"][1] == pytest.approx(float(cd.theory.outer_ratio_limit(problem, 2.0, 3)))
    assert found["whole_limit"][1] == pytest.approx(float(whole))


def test_pace_is_seconds_of_an_iteration():
    found = pace(_build, seed=0, record_every=10, steps=20, repeats=2)
    assert set(found) == {"original/pace", "compressed/pace"} and all(0 < value < 1 for value in found.values())


# ratings


def test_summary_of_fits_keeps_the_first_curves_and_the_scores_of_all():
    iterations, seconds, error = np.arange(3), np.array([0.5, 1.5, 2.5]), np.array([4.0, 1.0, 2.0])
    first = Fit(iterations, seconds, error, {"rmse": 2.0}, {"rmse": 1.0}, 1, {"ridge": 3.0}, 0.5)
    second = Fit(iterations, 2 * seconds, error - 1, {"rmse": 4.0}, {"rmse": 3.0}, 1, {"step_fraction": 0.5}, 0.5)
    out = summary([first, second])
    assert out["error"] is error and out["iterations"] is iterations and (out["seconds"] == seconds - 0.5).all()
    expected = {"final/rmse": [2, 4], "stopped/rmse": [1, 3], "setting": [3, 0.5], "time": [2.0, 4.5], "best": [1, 0]}
    for key, values in expected.items():
        np.testing.assert_array_equal(out[key], values)


# two factors


def test_over_ranked_two_factors_follow_their_law():
    problem = cd.MatrixFactorization(cd.low_rank_target((12, 12), 2, generator=torch.Generator().manual_seed(0)))
    start = cd.compress_spectral(problem, 4, 2, 1.0)
    history = cd.descend(problem, start, 5.0, 4000, record_every=100)
    law = cd.theory.over_ranked_law(2, 12, 1.0, 5.0, history.iterations.numpy())
    np.testing.assert_allclose(history.error[-1], law[-1], rtol=1e-3)
    assert law[0] == pytest.approx(2 / (2 * 12**2))


def test_each_digit_of_linear_convergence_takes_the_same_iterations():
    iterations = np.arange(0, 400)
    out = linear_convergence(10.0 ** (-iterations / 10)[None], iterations)
    np.testing.assert_allclose(out["to_1e-28"], [281], atol=1)
    np.testing.assert_allclose(out["evenness"], [1], atol=0.03)
    assert np.isnan(linear_convergence(np.ones((1, 400)), iterations)["evenness"]).all()
