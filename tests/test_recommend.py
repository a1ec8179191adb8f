"""Deep recommenders on a small rating table: no look at the test ratings, honest scores."""

import numpy as np
import pytest
import torch

import compressible as cd
from compressible.data.ratings import Ratings, Split, center
from compressible.experiments import recommend
from compressible.recovery.theory import invariants as theory


@pytest.fixture
def table():
    """40 x 30 ratings of rank 1 plus a little noise, half of them given, in 1..5."""
    rng = np.random.default_rng(0)
    users, items = np.nonzero(rng.random((40, 30)) < 0.6)
    truth = np.outer(rng.uniform(1.2, 2.2, 40), rng.uniform(1.2, 2.2, 30))
    values = np.clip(truth[users, items] + 0.1 * rng.normal(size=len(users)), 1, 5)
    order = rng.permutation(len(users))
    ratings = Ratings(users=users, items=items, ratings=values, timestamps=np.zeros(len(users), np.int64),
                      user_ids=np.arange(40), item_ids=np.arange(30), sha256="0" * 64, source="made",
                      name="made")  # fmt: skip
    return ratings, Split("made", np.sort(order[:-100]), np.sort(order[-100:]))


OPTIONS = {"rank": 2, "depth": 3, "init_scale": 0.05, "step_fractions": (0.2, 0.5), "device": "cpu", "steps": 1500}


@pytest.mark.parametrize("kind", ["compressed", "original"])
def test_networks_recover_a_low_rank_table(table, kind):
    fit = recommend.fit_deep(*table, kind, record_every=50, **OPTIONS)
    assert fit.stopped["rmse"] < 0.35 and fit.error[0] > 1
    assert fit.setting in (pytest.approx(0.2), pytest.approx(0.5))


def test_choices_of_another_fit_can_be_taken_over(table):
    first = recommend.fit_deep(*table, "compressed", record_every=50, **OPTIONS)
    again = OPTIONS | {"step_fractions": (first.setting,)}
    second = recommend.fit_deep(*table, "compressed", record_every=50, stop=first.stop, **again)
    assert second.stopped == first.stopped and second.setting == pytest.approx(first.setting)


@pytest.mark.parametrize("centring", ["global", "user_item"])
def test_centring_is_put_back(table, centring):
    fit = recommend.fit_deep(*table, "compressed", centring=centring, record_every=50, **OPTIONS)
    assert fit.stopped["rmse"] < 0.5 and fit.stopped["half_mse"] == pytest.approx(fit.stopped["rmse"] ** 2 / 2)


def test_test_ratings_change_no_choice(table):
    """Other values in the test ratings: the same step, the same predictions, only other scores."""
    ratings, parts = table
    changed = Ratings(**(vars(ratings) | {"ratings": ratings.ratings.copy()}))
    changed.ratings[parts.test] = 1.0
    one = recommend.fit_deep(ratings, parts, "compressed", record_every=50, **OPTIONS)
    two = recommend.fit_deep(changed, parts, "compressed", record_every=50, **OPTIONS)
    assert one.setting == two.setting and one.stopped["rmse"] != two.stopped["rmse"]
    for method in (recommend.fit_alternating, recommend.fit_biased):
        pair = [method(table_, parts, 2, (0.5, 5.0), 6) for table_ in (ratings, changed)]
        assert pair[0].setting == pair[1].setting and pair[0].final["rmse"] != pair[1].final["rmse"]


def test_error_is_over_the_held_out_ratings_only(table):
    ratings, parts = table
    offsets = center(ratings, parts.train, "none")
    problem = recommend.completion_problem(ratings, parts.train, parts.test, offsets, "cpu")
    zero = torch.zeros(40, 30, dtype=torch.float64)
    assert problem.error(zero).item() == pytest.approx(np.mean(ratings.ratings[parts.test] ** 2) / 2)
    assert problem.loss(zero).item() == pytest.approx(np.mean(ratings.ratings[parts.train] ** 2) / 2)


def test_step_sizes_that_diverge_are_out(table):
    ratings, parts = table
    problem = recommend.completion_problem(
        ratings, parts.train, parts.test, center(ratings, parts.train, "none"), "cpu"
    )
    start = recommend.network(problem, "compressed", 2, 3, 0.05)
    step, iteration = recommend.choose_step(problem, start, [1.0, 1e5], 1.0, steps=500, record_every=50)
    assert step == 1.0 and 0 <= iteration <= 500
    with pytest.raises(ValueError, match="all diverge"):
        recommend.choose_step(problem, start, [1e5, 1e6], 1.0, steps=500, record_every=50)
    with pytest.raises(ValueError, match="'wide'"):
        recommend.network(problem, "wide", 2, 3, 0.05)


@pytest.mark.parametrize("depth", [2, 3, 4])
def test_stability_limit_parts_settling_from_not(depth):
    generator = torch.Generator().manual_seed(0)
    problem = cd.MatrixFactorization(cd.low_rank_target((12, 9), 1, generator=generator))
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
