"""Tuned completion side by side: no look at the test entries, honest scores, dense and sparse problems alike."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("pydantic")  # a GPU host may have PyTorch, Triton and pytest alone
from data_helpers import offset_matrix, rating_matrix
from reference_als import factorise_with_biases

import compressible as cd
from compressible.data import ratings as data
from compressible.data.ratings import Ratings, Split, center, rating_metrics, validation_slice
from compressible.experiments import recommend
from compressible.experiments.completion_fits import Fit, gather
from compressible.experiments.completion_tasks import drawn_task, rating_task, rms
from compressible.experiments.setting_grid import GAIN
from compressible.recovery.theory import invariants as theory

CUDA = torch.cuda.is_available()
ON_CUDA = (pytest.mark.cuda, pytest.mark.slow, pytest.mark.skipif(not CUDA, reason="needs a CUDA device"))
DEVICES = ["cpu", pytest.param("cuda", marks=ON_CUDA)]
REAL = os.environ.get("COMPRESSIBLE_DATA", "")
needs_real = pytest.mark.skipif(
    not REAL or not (Path(REAL) / "movielens-100k" / "u1_test.csv.gz").is_file(),
    reason="needs COMPRESSIBLE_DATA with movielens-100k/*.csv.gz",
)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def made(values, users, items, shape, held_out):
    order = np.random.default_rng(1).permutation(len(users))
    ratings = Ratings(
        name="made",
        users=users,
        items=items,
        ratings=values,
        timestamps=np.zeros(len(users), np.int64),
        user_ids=np.arange(shape[0]),
        item_ids=np.arange(shape[1]),
        sha256="0" * 64,
        source="made",
    )
    return ratings, Split("made", np.sort(order[:-held_out]), np.sort(order[-held_out:]))


@pytest.fixture
def table():
    """40 x 30 ratings of rank 1 plus a little noise, about 60 % of them given, in 1..5."""
    rng = np.random.default_rng(0)
    users, items = np.nonzero(rng.random((40, 30)) < 0.6)
    truth = np.outer(rng.uniform(1.2, 2.2, 40), rng.uniform(1.2, 2.2, 30))
    return made(np.clip(truth[users, items] + 0.1 * rng.normal(size=len(users)), 1, 5), users, items, (40, 30), 100)


@pytest.fixture
def biased_table():
    """60 x 40 ratings of rank 1 with biases and noise, about half of them given."""
    rng = np.random.default_rng(0)
    users, items = np.nonzero(rng.random((60, 40)) < 0.5)
    truth = 3 + rng.normal(0, 0.4, (60, 1)) + rng.normal(0, 0.4, 40)
    truth += rng.normal(0, 0.7, (60, 1)) * rng.normal(0, 0.7, 40)
    return made(truth[users, items] + 0.1 * rng.normal(size=len(users)), users, items, (60, 40), 200)


def overwritten(ratings, parts):
    """The same table with other values in the test ratings."""
    changed = Ratings(**(vars(ratings) | {"ratings": ratings.ratings.copy()}))
    changed.ratings[parts.test] = 1.0
    return changed


P2 = {"rank": 2, "depth": 3, "init_scale": 0.05, "step_fraction": 0.25, "most": 6, "steps": 1500,
      "record_every": 50}  # fmt: skip
DEEP = {"init_scale": 0.1, "step_fraction": 0.3, "most": 12, "steps": 600, "record_every": 10}


def network(table, kind="compressed", centring="none", problem="dense", **options):
    task = rating_task(*table, centring, device="cpu", problem=problem)
    return recommend.fit_network(task, kind, **P2 | options)


# tasks


def test_errors_are_over_the_held_out_ratings_only(table):
    ratings, parts = table
    fit, validation = validation_slice(parts)
    tasks = [rating_task(*table, "none", device="cpu", problem=kind) for kind in ("dense", "sparse")]
    squares = ratings.ratings**2 / 2
    for task in tasks:
        zero = [torch.zeros(2, 30, dtype=torch.float64), torch.zeros(40, 2, dtype=torch.float64)]
        for problem, index, held_out in ((task.trial, fit, validation), (task.whole, parts.train, parts.test)):
            dense = isinstance(problem, cd.MatrixCompletion)
            pair = problem.evaluate(cd.product(zero)) if dense else problem.evaluate_factors(zero)
            assert [float(value) for value in pair] == pytest.approx([squares[index].mean(), squares[held_out].mean()])
    with pytest.raises(ValueError, match="problem is 'wide'"):
        rating_task(*table, problem="wide")


@pytest.mark.parametrize("centring", ["none", "global", "user_item"])
def test_scores_are_those_of_the_whole_prediction_matrix(table, centring):
    ratings, parts = table
    factors = cd.orthogonal_factors((40, 30), 3, 5, 1.0, seeded())
    task = rating_task(ratings, parts, centring, device="cpu")
    matrix = cd.product(factors).numpy() + offset_matrix(center(ratings, parts.train, centring))
    assert task.score(factors) == pytest.approx(rating_metrics(matrix, ratings, parts.test))


def test_the_slice_is_part_of_the_observed_and_the_rest_is_fitted():
    task = drawn_task((30, 20), 1, 200, seeded(), 0.25, "cpu")
    parts = (task.trial.seen, task.trial.unseen, task.whole.seen)
    fit, held, whole = (entries.matrix(entries.rows.values).to_dense() for entries in parts)
    assert (len(task.trial.seen), len(task.trial.unseen), len(task.whole.unseen)) == (150, 50, 20)
    torch.testing.assert_close(fit + held, whole)


# networks


@pytest.mark.parametrize("kind", ["compressed", "original"])
def test_networks_recover_a_low_rank_table(table, kind):
    fit = network(table, kind)
    assert fit.stopped["rmse"] < 0.35 and fit.error[0] > 1
    assert fit.setting in [0.25 * 2.0**k for k in range(-5, 6)] and fit.seconds[0] >= 0
    assert fit.settings["init_scale"] == 0.05 and 1 <= fit.tried <= 6
    assert fit.final["half_mse"] == pytest.approx(fit.error[-1])
    assert fit.stopped["half_mse"] == pytest.approx(fit.error[fit.iterations == fit.stop][0])


@pytest.mark.parametrize("kind", ["compressed", "original"])
def test_dense_and_sparse_problems_give_the_same_fit(table, kind):
    dense, sparse = (network(table, kind, problem=problem) for problem in ("dense", "sparse"))
    assert (dense.stop, dense.setting) == (sparse.stop, sparse.setting)
    np.testing.assert_allclose(sparse.error, dense.error, rtol=1e-6)
    assert sparse.stopped == pytest.approx(dense.stopped, rel=1e-6)


def test_a_grid_of_one_point_takes_the_first_and_says_that_it_is_open(table):
    fit = network(table, most=1)
    assert (fit.setting, fit.tried, fit.inside) == (0.25, 1, False)


def test_trials_may_be_shorter_than_the_run(table):
    fit = network(table, tuning_steps=400)
    assert fit.stop <= 400 and fit.iterations[-1] == 1500


def test_a_trial_ends_where_it_overfits(table, monkeypatch):
    steps = []
    descend = recommend.descend_to_divergence

    def counted(*given, **options):
        steps.append(options["steps"])
        return descend(*given, **options)

    monkeypatch.setattr(recommend, "descend_to_divergence", counted)
    task = rating_task(*table, device="cpu")
    fit = recommend.fit_descent(task, 20, 2, 0.1, 0.5, 1, steps=4000, record_every=10)
    assert sum(steps[:-1]) < 4000 and steps[-1] == 4000 and fit.stop < sum(steps[:-1])


@pytest.mark.parametrize("centring", ["global", "user_item"])
def test_centring_is_put_back(table, centring):
    fit = network(table, centring=centring)
    assert fit.stopped["rmse"] < 0.5 and fit.stopped["half_mse"] == pytest.approx(fit.stopped["rmse"] ** 2 / 2)


@pytest.mark.parametrize("problem", ["dense", "sparse"])
def test_steps_that_diverge_are_out_and_all_are_an_error(table, problem):
    task = rating_task(*table, device="cpu", problem=problem)
    options = {"steps": 500, "record_every": 50}
    fit = recommend.fit_descent(task, 4, 3, 0.05, 0.3, 8, factors=(1.0, 100.0), **options)
    assert fit.settings == {"init_scale": 0.05, "step_fraction": 0.3} and fit.inside and 0 <= fit.stop <= 500
    with pytest.raises(ValueError, match="diverge"):
        recommend.fit_descent(task, 4, 3, 1.0, 60.0, 1, **options)


def test_a_run_that_diverges_after_its_trial_is_scored_as_infinite(table, monkeypatch):
    monkeypatch.setattr(recommend, "_trial", lambda *given, **options: (1.0, 500))
    fit = recommend.fit_descent(rating_task(*table, device="cpu"), 4, 3, 1.0, 60.0, 1, steps=500, record_every=50)
    assert not fit.final["rmse"] < 1e3 and not fit.stopped["rmse"] < 1e3


def test_unknown_networks_are_refused(table):
    with pytest.raises(ValueError, match="kind is 'wide'"):
        network(table, "wide")
    with pytest.raises(ValueError, match="start is 'warm'"):
        recommend.fit_descent(rating_task(*table, device="cpu"), 4, 3, start="warm", **DEEP)


# least squares


def test_biased_factorisation_is_the_dense_one(biased_table):
    ratings, parts = biased_table
    fit = recommend.fit_biased(ratings, parts, 2, 1.0, 10, 1)
    overall, user_bias, item_bias, users, items = factorise_with_biases(ratings, parts.train, 2, 1.0, 10)
    matrix = overall + user_bias[:, None] + item_bias + users @ items.mT
    assert fit.final == pytest.approx(rating_metrics(matrix, ratings, parts.test), rel=1e-8)
    assert fit.final == fit.stopped and fit.stop == 10 and len(fit.error) == 11


def test_the_best_ridge_on_the_slice_is_taken(biased_table):
    ratings, parts = biased_table
    fit, validation = validation_slice(parts)
    found = recommend.fit_biased(ratings, parts, 1, 2.0, 6, 20)
    errors = {}
    for ridge in (found.setting / 1.5, found.setting, found.setting * 1.5):
        overall, user_bias, item_bias, users, items = factorise_with_biases(ratings, fit, 1, ridge, 6)
        matrix = overall + user_bias[:, None] + item_bias + users @ items.mT
        errors[ridge] = rating_metrics(matrix, ratings, validation)["half_mse"]
    assert found.inside and errors[found.setting] < min(errors.values()) * (1 + GAIN)


def test_least_squares_wants_the_entries(table):
    with pytest.raises(ValueError, match="task holds MatrixCompletion"):
        recommend.fit_sweeps(rating_task(*table, device="cpu", problem="dense"), 2, 1.0, 3)


# all of them


@pytest.mark.parametrize("device", DEVICES)
def test_every_method_recovers_drawn_entries(device):
    task = drawn_task((150, 120), 1, 5000, seeded(), device=device)
    assert rms(task) == pytest.approx(1, abs=0.3)
    for depth in (2, 3):
        fit = recommend.fit_descent(task, 2, depth, **DEEP)
        assert fit.stopped["rmse"] < 0.05 * rms(task) and fit.error[0] > 0.1
        assert fit.stopped["rmse"] ** 2 / 2 == pytest.approx(fit.error[fit.iterations == fit.stop][0])
        assert fit.seconds[0] >= fit.start_seconds > 0 and np.all(np.diff(fit.seconds) > 0)
    assert recommend.fit_sweeps(task, 1, 1e-6, 15).stopped["rmse"] < 1e-5


def test_test_ratings_change_no_choice(table):
    ratings, parts = table
    both = (ratings, overwritten(ratings, parts))
    tasks = [rating_task(entries, parts, device="cpu") for entries in both]
    for fits in (
        [network((entries, parts)) for entries in both],
        [recommend.fit_biased(entries, parts, 2, 0.5, 6, 8) for entries in both],
        [recommend.fit_descent(task, 4, 3, **DEEP) for task in tasks],
        [recommend.fit_sweeps(task, 2, 0.5, 8, 8, start="random") for task in tasks],
        [recommend.fit_sweeps(task, 2, 0.5, 8, 8, True, "random") for task in tasks],
    ):
        assert (fits[0].settings, fits[0].stop) == (fits[1].settings, fits[1].stop)
        assert abs(fits[0].final["rmse"] - fits[1].final["rmse"]) > 0.1 and fits[0].stopped["rmse"] < 0.7


def test_repetitions_are_gathered_by_method():
    curves = [np.arange(3), np.arange(3.0), np.full(3, 0.5)]
    runs = [{"ALS": Fit(*curves, {"rmse": 0.5}, {"rmse": 0.4 + seed}, 2, {"ridge": 1.0})} for seed in range(2)]
    out = gather("drawn", runs)
    assert out["drawn/methods"] == ["ALS"] and out["drawn/ALS/stopped"].tolist() == [0.4, 1.4]
    assert out["drawn/ALS/inside"].tolist() == [False, False] and out["drawn/ALS/tried"].tolist() == [1, 1]
    assert out["drawn/ALS/ridge"].tolist() == [1.0, 1.0] and out["drawn/ALS/rmse"].tolist() == [1.0] * 3


# real ratings


@needs_real
def test_real_biased_factorisation_reaches_the_known_error(record_property):
    loaded = data.load()
    parts = data.split(loaded, "u1")
    found = recommend.fit_biased(loaded, parts, 5, 12.0, 10, 8).final
    offsets = offset_matrix(center(loaded, parts.train))
    record_property("u1_rmse_clipped", found["rmse_clipped"])
    assert 0.88 < found["rmse_clipped"] < 0.97
    assert found["rmse"] < rating_metrics(offsets, loaded, parts.test)["rmse"]


@needs_real
def test_real_alternating_minimisation_overfits_after_its_best():
    loaded = data.load()
    parts = data.split(loaded, "u1")
    found = recommend.fit_sweeps(rating_task(loaded, parts, "none"), 10, 0.1, 20, start="random")
    assert found.error[-1] > found.error.min() * 1.1 and 0 < found.stop < 20


# the stability limit


@pytest.mark.parametrize("depth", [2, 3, 4])
def test_stability_limit_parts_settling_from_not(depth):
    problem = cd.MatrixFactorization(cd.low_rank_target((12, 9), 1, generator=seeded()))
    limit = theory.stability_limit(problem, depth).item()
    top = torch.linalg.matrix_norm(problem.target, ord=2).item()
    near = cd.compress_spectral(problem, 1, depth, scale=(top * 1.001) ** (1 / depth))
    settled = cd.descend(problem, near, 0.95 * limit, 400)
    assert settled.loss[-1] < 1e-12
    try:
        apart = cd.descend(problem, near, 1.05 * limit, 400).loss[-1].item()
    except cd.DivergenceError:
        apart = float("inf")
    assert apart > 1e-6


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("depth", [2, 3, 4])
def test_the_stability_limit_of_sparse_entries_is_the_dense_one(table, device, depth):
    ratings, parts = table
    target, mask = rating_matrix(ratings, parts.train)
    sparse = rating_task(ratings, parts, "none", device=device).whole
    limits = [float(theory.stability_limit(problem, depth)) for problem in (cd.MatrixCompletion(target, mask), sparse)]
    assert limits[1] == pytest.approx(limits[0], rel=1e-6)
