"""Our least squares beside LensKit's and Surprise's, where these are installed; and what is said where they are not."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from compressible.data.ratings import Ratings, Split

PATH = Path(__file__).parents[1] / "benchmarks" / "peers_of_completion.py"


@pytest.fixture(scope="module")
def peers():
    spec = importlib.util.spec_from_file_location("peers_of_completion", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def fold():
    """80 x 60 ratings of rank 1 with biases and noise, half of them given."""
    rng = np.random.default_rng(0)
    users, items = np.nonzero(rng.random((80, 60)) < 0.5)
    truth = 3 + rng.normal(0, 0.4, (80, 1)) + rng.normal(0, 0.4, 60) + rng.normal(0, 1, (80, 1)) * rng.normal(0, 1, 60)
    values = truth[users, items] + 0.1 * rng.normal(size=len(users))
    order, stamps, ids = rng.permutation(len(users)), np.zeros(len(users), np.int64), (np.arange(80), np.arange(60))
    ratings = Ratings("made", users, items, values, stamps, *ids, "0" * 64, "made")
    return ratings, Split("made", np.sort(order[300:]), np.sort(order[:300]))


def test_missing_libraries_are_named(peers, fold, monkeypatch):
    monkeypatch.setattr(peers, "installed", lambda package, module: "")
    assert peers.compare(fold, 1) == {"not installed": ["lenskit", "scikit-surprise"]}


def test_least_squares_is_that_of_lenskit(peers, fold, monkeypatch):
    pytest.importorskip("lenskit", reason="needs LensKit: pip install lenskit")
    monkeypatch.setattr(peers, "RANK", 1)
    found = peers.lenskit_errors(fold, 0)
    assert found["biases"] == pytest.approx(peers.own_biases(fold), abs=1e-5)
    assert found["least squares"] == pytest.approx(peers.own(fold, False, 0, peers.EPOCHS), rel=1e-3)
    assert found["least squares"] < 0.6 * found["biases"]


def test_biases_and_factors_are_those_of_surprise(peers, fold, monkeypatch):
    pytest.importorskip("surprise", reason="needs Surprise: pip install scikit-surprise")
    monkeypatch.setattr(peers, "RANK", 1)
    assert peers.surprise_error(fold, 0) == pytest.approx(peers.own(fold, True, 0, peers.SWEEPS), rel=0.02)
