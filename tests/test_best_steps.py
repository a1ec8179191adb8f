"""Each network at its own best step: how the grids grow, what closes an end, and that other seeds judge."""

import numpy as np
import pytest
import torch

import compressible as cd
from compressible.experiments import best_steps
from compressible.experiments.compare import compare_starts, stack_starts
from compressible.experiments.outcomes import reached
from compressible.recovery.theory.invariants import stability_limit


def _build(generator, sizes):
    problem = cd.MatrixFactorization(cd.low_rank_target((8, 8), 2, generator=generator))
    wide = cd.orthogonal_factors((8, 8), scale=0.1, generator=generator)
    small = cd.compress_spectral(problem, 4, scale=0.1)
    return problem, {"wide": (wide, sizes["wide"], 1.0), "small": (small, sizes["small"], 3.0)}


NAMES = ["wide", "small"]
TUNING = {"seeds": 3, "level": 1e-6, "steps": 1500, "factor": 1.5}


def _needs(name, step, seeds=3, steps=1500):
    """What a network needs on the tuning seeds, one run after the other."""
    curves = compare_starts(lambda g: _build(g, {"wide": step, "small": step}), 50, seeds, steps=steps, record_every=10)
    return reached(curves, name, 1e-6)


@pytest.mark.parametrize("first", [0.02, {"wide": 300.0, "small": 0.5}, {"wide": 1e-4, "small": 5.0}])
def test_grids_grow_until_the_best_step_lies_inside_wherever_they_start(first):
    found = best_steps.find_best_steps(_build, NAMES, seed=50, first=first, **TUNING)
    for name in NAMES:
        grid, needs = found[f"{name}/grid"], found[f"{name}/grid_iterations"]
        best = int(needs.argmin())
        assert found[f"{name}/best_step"] == grid[best] and 0 < best < len(grid) - 1 and len(grid) <= 40
        assert found[f"{name}/grid_closed"].tolist() == [True]
        np.testing.assert_allclose(grid[1:] / grid[:-1], 1.5)
        assert needs[best] == np.median(_needs(name, grid[best])) and np.isfinite(needs[best])
        assert min(needs[best - 1], needs[best + 1]) > needs[best]
    assert best_steps.best_steps(found, NAMES) == {name: found[f"{name}/best_step"][0] for name in NAMES}


def test_a_step_is_never_taken_where_a_tuning_seed_diverges():
    found = best_steps.find_best_steps(_build, ["wide", "small"], seed=50, **TUNING | {"factor": 1.1})
    grid, needs = found["wide/grid"], found["wide/grid_iterations"]
    for step, need in zip(grid, needs, strict=True):
        expected = _needs("wide", step)
        assert need == (np.inf if np.isnan(expected).any() else np.median(expected))


def test_a_level_that_no_step_reaches_leaves_the_grid_open_and_says_so():
    found = best_steps.find_best_steps(_build, NAMES, seed=50, first=1.0, **TUNING | {"level": 1e-6, "steps": 10})
    for name in NAMES:
        assert not found[f"{name}/grid_closed"].any() and np.isinf(found[f"{name}/grid_iterations"]).all()
        assert len(found[f"{name}/grid"]) <= 40


def test_where_the_first_steps_are_too_large_to_settle_the_grid_goes_down():
    """Steps that neither diverge nor get there lie above those that do: the one that ends lowest leads the way."""

    def build(generator, sizes):  # in a plane the overshoot of two factors stays finite
        target = torch.diag(torch.tensor([1.0, 0.5], dtype=torch.float64))
        problem = cd.MatrixFactorization(target)
        return problem, {"two": (cd.compress_spectral(problem, 2, 2, 0.1), sizes["two"], 1.0)}

    found = best_steps.find_best_steps(build, ["two"], seed=0, seeds=1, first=4.6, level=1e-9, steps=2000, factor=1.05)
    needs = found["two/grid_iterations"]
    assert np.isinf(needs[-4:]).all() and np.isfinite(needs.min()) and found["two/grid_closed"].all()


def test_seeds_of_sensing_are_tuned_one_after_the_other():
    def build(generator, sizes):
        target = cd.low_rank_target((6, 6), 1, generator=generator)
        operators = cd.gaussian_operators(60, (6, 6), generator=generator)
        problem = cd.MatrixSensing(operators, operators.flatten(1) @ target.flatten(), target)
        return problem, {"small": (cd.compress_spectral(problem, 2, scale=0.1), sizes["small"], 1.0)}

    tuning = {"level": 1e-2, "steps": 2000, "factor": 2.0, "curve": "error"}
    found = best_steps.find_best_steps(build, ["small"], seed=7, seeds=2, first=10.0, **tuning)
    assert found["small/grid_closed"].all()
    step = float(found["small/best_step"][0])
    curves = compare_starts(lambda g: build(g, {"small": step}), 7, 2, steps=2000, record_every=10)
    assert found["small/grid_iterations"].min() == np.median(reached(curves, "small", 1e-2))


@pytest.mark.parametrize("run", [compare_starts, stack_starts])
def test_other_seeds_judge_than_those_that_choose(run):
    asked = []

    def build(generator, sizes):
        asked.append((generator.initial_seed(), dict(sizes)))
        return _build(generator, sizes)

    tuning = TUNING | {"first": 4.0}
    out = best_steps.compare_at_best_steps(build, NAMES, 3, 2, tuning=tuning, run=run, steps=200, record_every=20)
    found = best_steps.find_best_steps(_build, NAMES, seed=10_003, **tuning)
    chosen = best_steps.best_steps(found, NAMES)
    assert {seed for seed, _ in asked} == {3, 4, 10_003, 10_004, 10_005}
    assert all(sizes == chosen for seed, sizes in asked if seed < 10)
    alone = run(lambda generator: _build(generator, chosen), 3, 2, steps=200, record_every=20)
    assert out.keys() == found.keys() | alone.keys()
    np.testing.assert_array_equal(out["small/error"], alone["small/error"])


def test_only_the_names_that_are_asked_for_are_tuned_and_run():
    def build(generator, sizes):
        problem, starts = _build(generator, {"wide": 1.0, **sizes})
        return problem, starts

    out = best_steps.compare_at_best_steps(build, ["small"], 0, 1, tuning=TUNING | {"first": 4.0}, steps=50)
    assert not [key for key in out if key.startswith("wide")] and out["small/error"].shape[0] == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"factor": 1.0}, "factor is 1.0, expected a number above 1"),
        ({"level": 0.0}, "level is 0.0, expected a number above 0"),
        ({"beside": 0}, "beside is 0, expected an integer from 1"),
        ({"first": {"wide": 1.0, "small": -1.0}}, "first of 'small' is -1.0, expected a step size above 0"),
    ],
)
def test_impossible_settings_are_refused_before_anything_is_built(change, message):
    def build(generator, sizes):
        raise AssertionError

    with pytest.raises(ValueError, match=message):
        best_steps.find_best_steps(build, NAMES, seed=0, **{**TUNING, "first": 1.0, **change})


def test_a_tuned_generator_is_of_the_seed():
    first = best_steps.find_best_steps(_build, ["wide", "small"], seed=50, first=4.0, **TUNING)
    again = best_steps.find_best_steps(_build, ["wide", "small"], seed=50, first=4.0, **TUNING)
    assert first.keys() == again.keys() and torch.tensor(first["wide/grid_iterations"]).isfinite().any()
    np.testing.assert_array_equal(first["wide/grid_iterations"], again["wide/grid_iterations"])


def test_the_search_starts_by_default_at_the_edge_of_stability_that_theory_gives():
    problem, _ = _build(torch.Generator().manual_seed(50), dict.fromkeys(NAMES, 1.0))
    edge = float(stability_limit(problem, 3))
    predicted = best_steps.predicted_steps(_build, NAMES, 50)
    assert predicted == {"wide": pytest.approx(edge), "small": pytest.approx(edge / 3 ** (2 / 3))}
    found = best_steps.find_best_steps(_build, NAMES, seed=50, **TUNING | {"factor": 1.1})
    for name in NAMES:
        assert predicted[name] in found[f"{name}/grid"]
        assert 0.6 < found[f"{name}/best_step"][0] / predicted[name] < 1.4  # and lies near it
