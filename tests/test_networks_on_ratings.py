"""Networks and least squares on folds of ratings: each method its own settings, all of them reported."""

from __future__ import annotations

import numpy as np
import pytest

from compressible.data.ratings import Ratings, Split
from compressible.experiments import networks_on_ratings as protocol
from compressible.experiments.completion_fits import Fit

DEEP = {"outer_ratio": 1.0, "rank": 1, "depth": 3, "init_scale": 0.3, "step_fraction": 0.25, "most": 4,
        "steps": 400, "tuning_steps": 200, "record_every": 20}  # fmt: skip


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    users, items = np.nonzero(rng.random((30, 20)) < 0.7)
    values = np.clip(np.outer(rng.uniform(1.2, 2.2, 30), rng.uniform(1.2, 2.2, 20))[users, items], 1, 5)
    order = rng.permutation(len(users))
    stamps, ids = np.zeros(len(users), np.int64), (np.arange(30), np.arange(20))
    ratings = Ratings("made", users, items, values, stamps, *ids, "0" * 64, "made")
    return ratings, Split("made", np.sort(order[60:]), np.sort(order[:60]))


@pytest.fixture(scope="module")
def fold(data):
    fits = protocol.fit_networks(data, 0.1, "cpu", **DEEP)
    return fits | protocol.fit_baselines(data, 0.1, "cpu", 1, 0.1, 5, 4)


def test_each_network_has_its_own_step_and_stop(fold):
    assert set(fold) == {*protocol.NETWORKS, "alternating, untuned", "alternating, tuned", "biased MF, tuned"}
    assert all(1 < fold[name].tried <= 4 and fold[name].stop <= 200 for name in protocol.NETWORKS)
    assert fold["original"].stopped["rmse"] < 0.6 and fold["compressed"].stopped["rmse"] < 0.6
    assert fold["alternating, untuned"].settings == {"ridge": 0.1} and fold["alternating, untuned"].tried == 1


def test_folds_keep_all_curves_and_are_compared_one_by_one(fold):
    out = protocol.over_folds([fold, fold])
    assert out["original/curves"].shape == out["original/times"].shape == (2, 21)
    for name in ("compressed_over_original", "speedup", "speedup_to_level", "gap_to_biased", "all_inside"):
        assert out[name].shape == (2,)
    ratio = fold["compressed"].stopped["half_mse"] / fold["original"].stopped["half_mse"]
    assert out["stopped_over_original"] == pytest.approx([ratio, ratio])


def made(error, inside=True):
    count = len(error)
    score = {"rmse": error[-1], "half_mse": error[-1]}
    return Fit(np.arange(count), np.arange(1.0, count + 1), np.array(error), score, score, 1, {"ridge": 1.0}, 1.0,
               inside=inside)  # fmt: skip


def test_the_level_is_two_per_cent_above_the_originals_end_and_curves_may_end_early():
    names = (*protocol.NETWORKS, "alternating, untuned", "alternating, tuned", "biased MF, tuned")
    fold = {name: made([4.0, 2.0, 1.0]) for name in names}
    fold |= {"original": made([4.0, 3.0, 2.0, 1.0]), "compressed": made([4.0, 1.015])}
    slow = fold | {"compressed": made([4.0, 1.03], inside=False)}
    out = protocol.over_folds([fold, slow])
    assert out["speedup_to_level"].tolist() == [3.0, 0.0]
    assert out["all_inside"].tolist() == [True, False]
    early = protocol.over_folds([fold, fold | {"original": made([4.0, 3.0])}])
    assert early["original/curves"].shape == (2, 4) and np.isnan(early["original/curves"][1, 2:]).all()
