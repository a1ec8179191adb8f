"""Completion at scale: drawn entries, sparse least squares, tuned fits and their cost, against the dense versions."""

import numpy as np
import pytest
import torch

import compressible as cd
from compressible.data.ratings import Ratings, Split
from compressible.experiments import biased_als as baselines
from compressible.experiments import sparse_recommend as sparse_fit
from compressible.experiments.speed import scaling as growth
from compressible.recovery import als
from compressible.recovery.sparse_als import alternate
from compressible.recovery.theory import invariants as theory

pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
CUDA = torch.cuda.is_available()
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not CUDA, reason="needs a CUDA device"))]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# drawn entries


@pytest.mark.parametrize(("shape", "count"), [((40, 30), 500), ((40, 30), 60), ((300, 200), 2000)])
def test_drawn_entries_are_distinct_and_of_one_low_rank_matrix(shape, count):
    observed, hidden = cd.sparse_low_rank(shape, 2, count, seeded(), hidden=50)
    assert observed.shape == hidden.shape == shape and (observed._nnz(), hidden._nnz()) == (count, 50)
    places = torch.cat([part.indices()[0] * shape[1] + part.indices()[1] for part in (observed, hidden)])
    assert len(places.unique()) == count + 50
    again = cd.sparse_low_rank(shape, 2, count, seeded(), hidden=50)[0]
    assert torch.equal(again.indices(), observed.indices()) and torch.equal(again.values(), observed.values())


def test_all_drawn_entries_together_are_the_matrix_and_have_unit_variance():
    parts = cd.sparse_low_rank((60, 50), 3, 2000, seeded(1), hidden=1000)
    values = torch.linalg.svdvals(sum(part.to_dense() for part in parts))
    assert values[3] < 1e-12 * values[0] and values[2] > 1
    assert float(values.square().sum() / 3000) == pytest.approx(1, abs=0.3)


def test_drawn_places_are_uniform():
    counts = torch.zeros(6, 5)
    for seed in range(300):
        counts += (cd.sparse_low_rank((6, 5), 1, 6, seeded(seed), hidden=1)[0].to_dense() != 0).float()
    assert float(((counts - 60) ** 2 / 60).sum()) < 60  # chi square of 29 degrees, 60 is beyond the 99.9th percentile


@pytest.mark.parametrize(("rank", "count", "hidden"), [(0, 5, 1), (4, 5, 1), (1, 0, 1), (1, 5, 0), (1, 12, 1)])
def test_impossible_draws_are_refused(rank, count, hidden):
    with pytest.raises(ValueError, match="expected"):
        cd.sparse_low_rank((3, 4), rank, count, hidden=hidden)


def pair(seed=0):
    observed, hidden = cd.sparse_low_rank((40, 30), 2, 600, seeded(seed), hidden=200)
    masks = [(part.to_dense() != 0).double() for part in (observed, hidden)]
    return observed, hidden, masks


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("depth", [2, 3, 4])
def test_the_stability_limit_of_sparse_entries_is_the_dense_one(device, depth):
    observed, hidden, (mask, _) = pair()
    dense = cd.MatrixCompletion(observed.to_dense(), mask)
    sparse = cd.SparseCompletion(observed.to(device), hidden.to(device))
    limits = [float(theory.stability_limit(problem, depth)) for problem in (dense, sparse)]
    assert limits[1] == pytest.approx(limits[0], rel=1e-6)


# least squares


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("ridge", [0.0, 0.5])
def test_sparse_least_squares_is_the_dense_one(device, ridge):
    observed, hidden, (mask, unseen) = pair()
    test = hidden.to_dense(), unseen
    slow = als.alternating_minimisation(observed.to_dense(), mask, 2, ridge, 12, seeded(), test, start="random")
    fast = alternate(cd.SparseCompletion(observed, hidden, device=device), 2, ridge, 12, seeded(), start="random")
    torch.testing.assert_close(fast.loss, slow.loss, rtol=1e-6, atol=1e-10)
    torch.testing.assert_close(fast.error, slow.error, rtol=1e-6, atol=1e-10)
    torch.testing.assert_close((fast.factors[1] @ fast.factors[0]).cpu(), slow.matrix(), rtol=1e-5, atol=1e-6)


@pytest.fixture
def table():
    """60 x 40 ratings of rank 2 with biases and noise, about half of them given."""
    rng = np.random.default_rng(0)
    users, items = np.nonzero(rng.random((60, 40)) < 0.5)
    truth = 3 + rng.normal(0, 0.4, (60, 1)) + rng.normal(0, 0.4, 40)
    truth += rng.normal(0, 0.7, (60, 1)) * rng.normal(0, 0.7, 40)
    values = truth[users, items] + 0.1 * rng.normal(size=len(users))
    order = rng.permutation(len(users))
    ratings = Ratings("made", users, items, values, np.zeros(len(users), np.int64), np.arange(60), np.arange(40),
                      "0" * 64, "made")  # fmt: skip
    return ratings, Split("made", np.sort(order[:-200]), np.sort(order[-200:]))


def test_sparse_biased_factorisation_is_the_dense_one(table):
    """The dense one starts its item biases from centred means, so both are taken to where neither moves."""
    ratings, parts = table
    model = baselines.biased_matrix_factorisation(ratings, parts.train, 1, 1.0, 300, seeded())
    task = sparse_fit.rating_task(ratings, parts, device="cpu")
    fast = alternate(task.whole, 1, 1.0, 300, seeded(), biases=True, start="random")
    torch.testing.assert_close(model.overall + fast.factors[1] @ fast.factors[0], model.matrix(), rtol=0, atol=1e-5)


def test_a_ridge_below_round_off_is_no_error():
    observed, hidden, _ = pair()
    scaled = [1e6 * part for part in (observed, hidden)]
    fit = alternate(cd.SparseCompletion(*scaled), 5, 1e-12, 5)
    assert torch.isfinite(fit.loss).all() and fit.loss[-1] < 1e-3 * fit.loss[0]


@pytest.mark.parametrize("options", [
    {"rank": 0}, {"rank": 31}, {"ridge": -1.0}, {"ridge": 0.0, "biases": True}, {"sweeps": 0}, {"start": "warm"},
])  # fmt: skip
def test_impossible_sweeps_are_refused(options):
    with pytest.raises(ValueError, match="expected"):
        alternate(cd.SparseCompletion(pair()[0]), **({"rank": 2} | options))


# tuned fits


DEEP = {"init_scales": (0.1, 0.3), "step_fractions": (0.3, 0.6), "steps": 600, "record_every": 10}


@pytest.mark.parametrize("device", DEVICES)
def test_every_method_recovers_drawn_entries(device):
    task = sparse_fit.drawn_task((150, 120), 1, 5000, seeded(), device=device)
    assert sparse_fit.rms(task.whole) == pytest.approx(1, abs=0.3)
    for depth in (2, 3):
        fit = sparse_fit.fit_descent(task, 2, depth, **DEEP)
        assert fit.stopped < 0.05 * sparse_fit.rms(task.whole) and fit.rmse[0] > 0.5
        assert fit.stopped == fit.rmse[fit.iterations == fit.stop][0] and fit.final == fit.rmse[-1]
        assert fit.settings["init_scale"] in (0.1, 0.3) and fit.settings["step_fraction"] in (0.3, 0.6)
        assert fit.seconds[0] > 0 and np.all(np.diff(fit.seconds) > 0)
    assert sparse_fit.fit_sweeps(task, 1, (1e-6, 1.0), 15).stopped < 1e-5


def test_the_slice_is_part_of_the_observed_and_the_rest_is_fitted():
    task = sparse_fit.drawn_task((30, 20), 1, 200, seeded(), 0.25, "cpu")
    parts = (task.trial.seen, task.trial.unseen, task.whole.seen)
    fit, held, whole = (entries.matrix(entries.rows.values).to_dense() for entries in parts)
    assert (len(task.trial.seen), len(task.trial.unseen), len(task.whole.unseen)) == (150, 50, 20)
    torch.testing.assert_close(fit + held, whole)


def test_test_ratings_change_no_choice(table):
    ratings, parts = table
    changed = Ratings(**(vars(ratings) | {"ratings": ratings.ratings.copy()}))
    changed.ratings[parts.test] = 1.0
    tasks = [sparse_fit.rating_task(entries, parts, device="cpu") for entries in (ratings, changed)]
    for fits in (
        [sparse_fit.fit_descent(task, 4, 3, **DEEP) for task in tasks],
        [sparse_fit.fit_sweeps(task, 2, (0.5, 5.0), 8, biases) for task in tasks for biases in (False,)],
        [sparse_fit.fit_sweeps(task, 2, (0.5, 5.0), 8, True, "random") for task in tasks],
    ):
        assert (fits[0].settings, fits[0].stop) == (fits[1].settings, fits[1].stop)
        assert fits[0].final != fits[1].final and fits[0].stopped < 0.7


def test_a_step_that_diverges_is_out_and_all_are_an_error():
    task = sparse_fit.drawn_task((30, 20), 1, 300, seeded(), device="cpu")
    options = DEEP | {"init_scales": (1.0,), "steps": 200}
    assert sparse_fit.fit_descent(task, 2, 3, **(options | {"step_fractions": (50.0, 0.3)})).settings[
        "step_fraction"
    ] == 0.3  # fmt: skip
    with pytest.raises(ValueError, match="all diverge"):
        sparse_fit.fit_descent(task, 2, 3, **(options | {"step_fractions": (50.0,)}))


def test_repetitions_are_gathered_by_method():
    curves = [np.arange(3), np.arange(3.0), np.ones(3)]
    runs = [{"ALS": sparse_fit.Trace(*curves, 0.5, 0.4 + seed, 2, {"ridge": 1.0})} for seed in range(2)]
    out = sparse_fit.gather("drawn", runs)
    assert out["drawn/methods"] == ["ALS"] and out["drawn/ALS/stopped"].tolist() == [0.4, 1.4]
    assert out["drawn/ALS/ridge"].tolist() == [1.0, 1.0] and out["drawn/ALS/rmse"].shape == (3,)


# cost


def test_held_bytes_count_every_array_once():
    problem = cd.SparseCompletion(pair()[0])
    factors = cd.orthogonal_factors((40, 30), 3, 4)
    own = 600 * (4 + 8) * 2 + 600 * 8 + 4 * (41 + 31)
    assert growth.held_bytes(problem, factors) == own + 2 * 8 * (40 * 4 + 16 + 30 * 4)


@pytest.mark.parametrize("device", DEVICES)
def test_curves_have_a_value_for_each_count_and_trial(device):
    seconds, size = growth.curve([200, 400], 10, 4, 3, device)
    assert seconds.shape == (3, 2) and (seconds > 0).all() and size.shape == (2,) and (size > 0).all()


def test_slopes_of_powers_are_their_exponents():
    x = np.array([1.0, 10.0, 300.0])
    np.testing.assert_allclose(growth.log_slope(x, np.stack([3 * x, x**2])), [1, 2])
    with pytest.raises(ValueError, match="at least two"):
        growth.log_slope([1.0], np.ones(1))
