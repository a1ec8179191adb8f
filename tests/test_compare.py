"""Several starts over seeds: gathered curves and what they come to."""

import weakref
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import compressible as cd
from compressible.experiments.compare import compare_starts, share_stacks, stack_starts, stacking_gain
from compressible.experiments.outcomes import first_below, milestones, times_the_iterations, worst_ratio
from compressible.experiments.starts import completion_starts


def _build(generator):
    problem = cd.MatrixFactorization(cd.low_rank_target((10, 10), 2, generator=generator))
    wide = cd.orthogonal_factors((10, 10), scale=0.5, generator=generator)
    small = cd.compress_spectral(problem, 4, scale=0.5)
    return problem, {"wide": (wide, 2.0, 1.0), "small": (small, 2.0, 1.0), "wild": (wide, 1e4, 1.0)}


def test_curves_are_those_of_the_seeds_alone():
    arrays = compare_starts(_build, seed=3, seeds=2, steps=300, record_every=20, tolerance=1e-3)
    problem, starts = _build(torch.Generator().manual_seed(4))
    alone = cd.descend(problem, starts["small"][0], 2.0, 300, record_every=20, tolerance=1e-3)
    length = len(alone.iterations)
    np.testing.assert_allclose(arrays["small/error"][1, :length], alone.error.numpy(), rtol=1e-12)
    assert np.isnan(arrays["small/error"][1, length:]).all() and arrays["small/stopped"][1] == alone.stopped
    assert arrays["wide/parameters"][0] == 300 and arrays["small/parameters"][0] == 96
    assert arrays["wild/diverged"].all() and not arrays["small/diverged"].any()


def test_milestones_by_hand():
    curves = {"a/iterations": np.array([0, 10, 20]), "a/error": np.array([[4.0, 2.0, 0.5], [4.0, 3.0, 2.0]]),
              "a/seconds": np.array([[0.0, 1.0, 2.0], [0.0, 1.0, 2.0]]),
              "b/iterations": np.array([0, 10]), "b/error": np.array([[4.0, 0.5], [4.0, 0.1]]),
              "b/seconds": np.array([[0.0, 0.5], [0.0, 0.5]]),
              "a/diverged": np.zeros(2, bool), "b/diverged": np.zeros(2, bool)}  # fmt: skip
    out = milestones(curves, ["a", "b"], level=1.0)
    np.testing.assert_array_equal(out["a/to_level"], [20.0, np.inf])  # the second is stopped by its budget
    np.testing.assert_array_equal(out["b/iteration_ratio"], [0.5, 0.5])  # over the 20 that it took at least
    np.testing.assert_array_equal(out["b/speedup"], [4.0, 4.0])
    np.testing.assert_array_equal(milestones(curves, ["b", "a"], level=1.0)["a/iteration_ratio"], [2.0, np.inf])
    np.testing.assert_allclose(out["b/worst_ratio"], [1.0, 1.0])
    np.testing.assert_allclose(out["b/final"], [0.5, 0.1])


def test_a_baseline_that_stops_in_a_wrong_interpolant_has_no_lead():
    ends = {"a": [0.1, 0.1, 0.5], "b": [0.1, 5.0, 5.0], "c": [5.0, 0.1, 5.0]}  # of three seeds
    curves = {f"{name}/iterations": np.array([0, 10 if name == "a" else 30]) for name in ends}
    curves |= {f"{name}/error": np.array([[4.0, end] for end in row]) for name, row in ends.items()}
    for name in ends:
        curves |= {f"{name}/seconds": curves[f"{name}/error"], f"{name}/diverged": np.zeros(3, bool)}
    marks = milestones(curves, ["c", "a", "b"], level=1.0)
    assert marks["a/iteration_ratio"][2] == 10 / 30  # over what the baseline took at least
    np.testing.assert_array_equal(times_the_iterations(marks, "c", "b"), [np.inf, 0.0, np.nan])
    np.testing.assert_array_equal(times_the_iterations(marks, "b", "a"), [3.0, np.inf, np.inf])


@pytest.mark.parametrize(("wild", "worst"), [("a", np.nan), ("b", np.inf)])
def test_a_run_that_diverges_is_behind_whatever_its_records_before(wild, worst):
    curves = {f"{name}/iterations": np.array([0, 10, 20]) for name in "ab"}
    curves |= {f"{name}/seconds": np.array([[0.0, 1.0, 2.0]]) for name in "ab"}
    curves |= {"a/error": np.array([[4.0, 2.0, 0.5]]), "b/error": np.array([[2.0, 1.0, 0.2]])}
    curves |= {"a/diverged": np.array([False]), "b/diverged": np.array([False])}
    assert milestones(curves, ["a", "b"], level=1.0)["b/worst_ratio"] == [0.5]
    for last in (np.nan, np.inf):
        lost = np.append(curves[f"{wild}/error"][:, :2], [[last]], 1)
        out = milestones(curves | {f"{wild}/error": lost, f"{wild}/diverged": np.array([True])}, ["a", "b"], level=1.0)
        np.testing.assert_array_equal(out["b/worst_ratio"], [worst])
        assert out[f"{wild}/final"] == [np.inf] and not np.isfinite(out["b/iteration_ratio"]).any()
        assert np.isnan(out[f"{wild}/to_level"]).all() and np.isnan(out["b/speedup"]).all()


def test_networks_that_all_diverge_pass_no_claim():
    """With step 600 every network of P2's completion figure diverges, which once passed as "never behind"."""
    setting = {"dimension": 100, "rank": 5, "observed": 0.3, "depth": 3, "init_scale": 1e-2, "step_size": 600.0}
    build, names = (
        partial(completion_starts, outer_ratios=[1.0, 5.0], **setting),
        ["original", "alpha = 1", "alpha = 5"],
    )
    curves = compare_starts(build, seed=0, seeds=5, steps=2000, record_every=50)
    assert all(curves[f"{name}/diverged"].all() for name in names)
    marks = milestones(curves, names, level=1e-6)
    marks["worst_final"] = np.max([marks[f"{name}/final"] for name in names], 0)
    claimed = {"step_size": 10.0, "tolerance": 1e-12, "record_every": 50, "outer_ratios": [1.0, 5.0]}  # or not tested
    found = SimpleNamespace(parameters=setting | claimed, arrays=curves | marks, metrics={})
    verdicts = {verdict.id.split(".")[1]: verdict for verdict in cd.claims.judge("kwon2024/05_completion", found)}
    judged = {name: verdict.verdict for name, verdict in verdicts.items() if not name.endswith("own_steps")}
    assert set(judged.values()) == {"FAIL"} and "compressed_never_behind" in judged


def test_first_below_and_worst_ratio_ignore_padding():
    error = np.array([[3.0, 1.0, np.nan]])
    assert first_below(error, 2.0, np.array([0, 5, 10]))[0] == 5
    assert worst_ratio(error, np.array([[1.5, 2.0]]))[0] == pytest.approx(2.0)


def _sweep(generator):
    problem = cd.MatrixCompletion(cd.low_rank_target((12, 10), 2, generator=generator),
                                  cd.random_mask((12, 10), 0.6, generator=generator))  # fmt: skip
    starts = {f"k={k}": (cd.compress_spectral(problem, k, scale=0.3), 0.1 * k, 2.0) for k in (2, 5, 9)}
    wide = cd.orthogonal_factors((12, 10), 3, 60, scale=0.3, generator=generator)
    two = cd.orthogonal_factors((12, 10), 2, 4, 0.3, generator)
    return problem, starts | {"wide": (wide, 0.5, 1.0), "two": (two, 0.2, 1.0)}


@pytest.mark.parametrize("build", [_sweep, _build])
def test_stacked_starts_are_the_serial_ones(build):
    options = {"seed": 1, "seeds": 3, "steps": 400, "record_every": 20, "tolerance": 1e-4}
    serial, stacked = compare_starts(build, **options), stack_starts(build, **options)
    assert serial.keys() == stacked.keys()
    for key, expected in serial.items():
        if "seconds" not in key:
            np.testing.assert_allclose(stacked[key], expected, rtol=1e-7, atol=1e-13, err_msg=key)


def test_starts_share_a_stack_only_where_padding_is_cheap():
    _, starts = _sweep(torch.Generator().manual_seed(0))
    assert share_stacks(starts) == [["two"], ["wide"], ["k=9", "k=5"], ["k=2"]]
    assert share_stacks({"a": starts["k=2"], "b": starts["k=5"]}) == [["b", "a"]]


def test_stacking_gain_counts_every_run():
    gain = stacking_gain(_sweep, seed=0, seeds=2, steps=40)
    assert gain["runs"] == 10 and gain["gain"] == pytest.approx(gain["serial_seconds"] / gain["stacked_seconds"])


def test_problems_that_differ_are_not_stacked():
    target, mask = torch.eye(3).double(), torch.ones(3, 3).double()
    p1, p2 = cd.MatrixCompletion(target, mask), cd.MatrixCompletion(target, mask, mean_over="all")
    with pytest.raises(ValueError, match="mean_over"):
        cd.stack_problems([p1, p2])
    with pytest.raises(ValueError, match="cannot stack"):
        cd.stack_problems([p1, cd.MatrixFactorization(target)])
    sensing = [cd.MatrixSensing(torch.ones(2, 3, 3).double(), torch.ones(2).double()) for _ in range(2)]
    with pytest.raises(ValueError, match="operators"):
        cd.stack_problems(sensing)
    shared = cd.MatrixSensing(sensing[0].operators, torch.zeros(2).double())
    assert cd.stack_problems([sensing[0], shared]).batch_shape == (2,)


def test_seeds_of_sensing_hold_one_operator_at_a_time(capfd):
    count, shape, alive = 300, (30, 30), []

    def build(generator):
        assert not any(operators() is not None for operators in alive)
        operators = cd.gaussian_operators(count, shape, generator=generator, device="cpu")
        alive.append(weakref.ref(operators))
        target = cd.low_rank_target(shape, 1, generator=generator)
        problem = cd.MatrixSensing(operators, operators.flatten(1) @ target.flatten(), target)
        wide = cd.orthogonal_factors(shape, scale=1e-2, generator=generator)
        return problem, {"wide": (wide, 5.0, 1.0), "small": (cd.compress_spectral(problem, 2), 5.0, 1.0)}

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as measured:
        compare_starts(build, seed=0, seeds=3, steps=20, record_every=10)
    size = 8 * count * shape[0] * shape[1]
    large = [event.self_cpu_memory_usage for event in measured.events() if event.self_cpu_memory_usage > size / 4]
    assert large == [size] * 3  # the draws, and nothing else: neither a cast, nor a transpose, nor a reshape
