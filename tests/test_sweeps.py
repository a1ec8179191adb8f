"""Sweeps over widths, depths and ranks, and what they are judged by."""

import numpy as np
import pytest
import torch

import compressible as cd
from compressible.experiments import depth_sweep, rank_sweep
from compressible.experiments.components import layer_paths, moving_values


def test_a_sweep_over_widths_is_the_descents_alone():
    target = cd.low_rank_target((10, 10), 2, generator=torch.Generator().manual_seed(0))
    problem, options = cd.MatrixFactorization(target), {"steps": 300, "record_every": 10, "tolerance": 1e-4}
    generator = torch.Generator().manual_seed(5)
    out = rank_sweep.sweep_widths(problem, 3, 2.0, [4, 10], 0.3, 2, generator, **options)
    error, iterations = out["error"], out["iterations"]
    assert error.shape == iterations.shape == (2, 2) and (iterations < 300).all() and (out["loss"] < 1e-4).all()
    generator.manual_seed(5)
    narrow = cd.orthogonal_factors((10, 10), 3, 4, 0.3, generator, batch_shape=(2,))
    alone = cd.descend(problem, [factor[1] for factor in narrow], 2.0, **options)
    assert error[1, 0].item() == pytest.approx(alone.final("error").item(), rel=1e-6)
    assert iterations[1, 0] == alone.stopped


def test_a_width_that_its_budget_stops_needs_infinitely_many_iterations():
    target = cd.low_rank_target((10, 10), 2, generator=torch.Generator().manual_seed(0))
    stop = {"steps": 20, "record_every": 10, "tolerance": 1e-4}
    generator = torch.Generator().manual_seed(5)
    out = rank_sweep.sweep_widths(cd.MatrixFactorization(target), 3, 2.0, [4], 0.3, 2, generator, **stop)
    assert torch.isinf(out["iterations"]).all() and torch.isfinite(out["loss"]).all() and (out["loss"] > 1e-4).all()


def test_every_layer_moves_2r_values_as_the_theorem_says():
    target = cd.low_rank_target((10, 10), 2, (3,), torch.Generator().manual_seed(0))
    start = cd.orthogonal_factors((10, 10), 3, generator=torch.Generator().manual_seed(1), scale=1.0, batch_shape=(3,))
    kept = {"record_every": 1, "snapshots": range(31)}
    history = cd.descend(cd.MatrixFactorization(target), start, 1.0, 30, **kept)
    rhos = cd.theory.rho([1.0] * 3, 1.0 / 100, 30)
    out = layer_paths(history, 2, rhos)
    assert out["exactly_2r"].all() and (out["moving"] == 4).all() and out["moving"].shape == (3, 3)
    assert (out["rho_error"] < 1e-10).all() and (out["middle_angle"] < 1e-5).all()
    assert out["values_2"].shape == (3, 31, 10) and out["left_3"].shape == (3, 31, 5)
    assert (layer_paths(history, 2, 1.01 * rhos)["rho_error"] > 1e-3).all()


def test_moving_values_are_those_away_from_the_median():
    values = torch.tensor([[2.0, 1.0, 1.0 + 1e-9, 1.0, 0.5], [1.0, 1.0, 1.0, 1.0, 1.0]], dtype=torch.float64)
    assert moving_values(values).tolist() == [2, 0]


@pytest.fixture(scope="module")
def depth_runs():
    """Plan and builds of a factorization with 3 factors; two seeds."""
    target = cd.low_rank_target((10, 10), 2, generator=torch.Generator().manual_seed(0))
    plan = depth_sweep.plan_depth(target, 2, 3, 1e-3, 0.15, frames=20)

    def build(generator):
        problem = cd.MatrixFactorization(cd.low_rank_target((10, 10), 2, generator=generator))
        wide = cd.orthogonal_factors((10, 10), 3, scale=plan.scale, generator=generator)
        small = cd.compress_spectral(problem, 4, 3, plan.scale)
        return problem, {"original": (wide, plan.step, 1.0), "compressed": (small, plan.step, 1.0)}

    return plan, build, [build(torch.Generator().manual_seed(seed)) for seed in (0, 1)]


def test_a_plan_keeps_one_product_scale_and_one_fraction_of_stability(depth_runs):
    plan, _, runs = depth_runs
    limit = cd.theory.stability_limit(runs[0][0], 3).item()
    assert plan.scale**3 == pytest.approx(1e-3) and plan.step == pytest.approx(0.15 * limit)
    weakest = torch.linalg.svdvals(runs[0][0].target)[1].item()
    assert 20 * plan.every == pytest.approx(cd.theory.escape_time(weakest, 3, plan.scale, plan.step / 100), rel=0.2)


def test_singular_values_are_learned_in_turn_and_as_scalars(depth_runs):
    plan, build, runs = depth_runs
    errors = depth_sweep.never_behind(build, 0, 2, steps=80 * plan.every, record_every=plan.every, tolerance=1e-8)
    assert (errors["worst_ratio"] < 1.001).all() and (errors["iteration_ratio"] < 1).all()
    assert (errors["final"] < 1e-6).all()
    marks = list(range(0, 80 * plan.every, plan.every))
    turn = depth_sweep.learned_in_turn(runs, 2, marks)
    assert turn["values"].shape == (80, 3) and (turn["excess"] < 1e-2).all()
    assert ((turn["spread"] >= 0) & (turn["spread"] < 1)).all() and turn["ordered"].shape == (2,)
    scalars = depth_sweep.as_scalars(runs, 2, 3, plan, marks)
    assert (scalars["deviation"] < 1e-6).all() and ((scalars["rise"] > 0) & (scalars["rise"] < 1)).all()
    wrong = plan._replace(step=0.9 * plan.step)
    left, s, right = depth_sweep.target_triplets(runs, 2)
    torch.testing.assert_close(left * s[:, None] @ right, torch.stack([problem.target for problem, _ in runs]))
    slower = cd.theory.aligned_values(s, 3, wrong.scale, wrong.step / 100, marks[-1])[marks, 0]
    assert ((slower - scalars["theory"]).abs().max() / s[0, 0]) > 1e-3


def test_both_networks_at_their_own_steps_keep_the_order(depth_runs):
    plan, build, _ = depth_runs

    def at_steps(generator, sizes):
        problem, starts = build(generator)
        return problem, {name: (starts[name][0], sizes[name], 1.0) for name in sizes}

    stop = {"steps": 40 * plan.every, "record_every": 1, "tolerance": 1e-8}
    tuning = {"seeds": 2, "first": 4 * plan.step, "level": 1e-6, "factor": 1.5, "beside": 1} | stop
    out = depth_sweep.at_own_steps(at_steps, 0, 1, tuning, **stop)
    assert (out["own/best_steps"] > plan.step).all() and out["own/grids_closed"].all()
    assert out["own/iteration_ratio"].shape == (1,) and (out["own/iteration_ratio"] < 1).all()


def test_across_depths_takes_the_worst():
    def one(ratio, ordered, spread):
        keys = ("worst_ratio", "iteration_ratio", "own/iteration_ratio", "final")
        found = {f"completion/{key}": np.array([ratio, 0.5]) for key in keys}
        return found | {
            "deviation": torch.tensor([ratio, 0.0]),
            "excess": torch.tensor([0.0, ratio]),
            "ordered": torch.tensor(ordered),
            "spread": torch.tensor(spread),
        }

    found = {3: one(0.9, [True, True], [0.2, 0.4]), 5: one(0.8, [False, True], [0.1, 0.8])}
    out = depth_sweep.across_depths(found, ("completion",))
    assert out["worst/completion/final"].tolist() == [0.9, 0.5]
    assert out["all_ordered"].tolist() == [False, True]
    np.testing.assert_allclose(out["deepest/spread"], [0.5, 2.0])


def test_tails_are_the_least_errors_of_each_rank():
    target = cd.low_rank_target((8, 6), 3, (2,), torch.Generator().manual_seed(0))
    tails = rank_sweep.spectral_tails(target, 3)
    left, s, right = torch.linalg.svd(target, full_matrices=False)
    for k in range(4):
        best = (left[..., :k] * s[:, None, :k]) @ right[:, :k]
        np.testing.assert_allclose(tails[:, k], (best - target).square().mean((1, 2)) / 2, atol=1e-12)


def test_what_ranks_come_to_by_hand():
    curves = {"original/0/error": np.array([[1.0, 1e-7, np.nan]]), "original/0/iterations": np.array([0, 100, 200])}
    names = ("original/0", "alpha/1", "alpha/2", "alpha/4", "gradient/1", "gradient/2")
    curves |= {f"{name}/diverged": np.array([False]) for name in names}
    for size, error in ((1, [1.0, 0.5, 0.4]), (2, [1.0, 1e-7, 1e-8]), (4, [1.0, 1e-8, 1e-9])):
        curves[f"alpha/{size}/error"] = np.array([error])
        curves[f"alpha/{size}/iterations"] = np.array([0, 50, 100])
    for guess, error in ((1, [1.0, 0.6]), (2, [1.0, 1e-8])):
        curves[f"gradient/{guess}/error"] = np.array([error])
        curves[f"gradient/{guess}/iterations"] = np.array([0, 50])
    tail = np.array([[0.8, 0.2, 0.0]])
    ends = rank_sweep.judge(curves, tail, 2, {"alpha": [1, 2, 4]}, [1, 2])
    np.testing.assert_array_equal(ends["alpha/final"], [[0.4, 1e-8, 1e-9]])
    np.testing.assert_array_equal(ends["alpha/iterations"], [[np.inf, 50.0, 50.0]])
    expected = {"recovered": 1e-8, "floor": 2.0, "flatness": 1.0, "r_over_2r": 1.0, "r_over_original": 0.5}
    expected |= {"gradient_recovered": 1e-8, "gradient_floor": 3.0}
    assert {name: float(ends[name][0]) for name in expected} == pytest.approx(expected)
    late = curves | {"alpha/2/error": np.array([[1.0, 0.5, 0.4]])}  # stopped before it got there
    ends = rank_sweep.judge(late, tail, 2, {"alpha": [1, 2, 4]}, [1, 2])
    assert ends["r_over_2r"] == ends["r_over_original"] == np.inf and ends["recovered"] == [0.4]
    gone = {name: np.array([True]) for name in ("alpha/4/diverged", "gradient/1/diverged", "original/0/diverged")}
    ends = rank_sweep.judge(curves | gone, tail, 2, {"alpha": [1, 2, 4]}, [1, 2])
    assert ends["recovered"] == ends["gradient_floor"] == np.inf and np.isnan(ends["r_over_original"]).all()


def test_the_ratio_farthest_from_one_may_lie_below_it():
    ratios = np.array([[1.2, 0.5, 1.9], [1.0, 0.9, 1.2], [np.inf, 0.1, 1.0]])
    np.testing.assert_array_equal(rank_sweep.farthest_from_one(ratios), [0.5, 1.2, np.inf])


@pytest.mark.parametrize(
    ("widths", "guesses"), [([3, 6], [2, 3]), ([2, 3], [2, 3]), ([2, 3, 6], [1, 3]), ([2, 3, 6], [2])]
)
def test_sizes_that_cannot_be_judged_are_refused(widths, guesses):
    rank_sweep.check_sizes(3, [2, 3, 6], [2, 3])
    with pytest.raises(ValueError, match="expected"):
        rank_sweep.check_sizes(3, widths, guesses)
