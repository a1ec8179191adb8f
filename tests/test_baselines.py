"""Alternating least squares is exact, monotone and recovers; the biased model reaches its known error."""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from data_helpers import small_table

from compressible.data import ratings
from compressible.experiments import biased_als as baselines
from compressible.recovery import als

REAL = os.environ.get("COMPRESSIBLE_DATA", "")
needs_real = pytest.mark.skipif(
    not REAL or not (Path(REAL) / "movielens-100k" / "u1_test.csv.gz").is_file(),
    reason="needs COMPRESSIBLE_DATA with movielens-100k/*.csv.gz",
)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def low_rank(m: int, n: int, rank: int, p: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = seeded(seed)
    left = torch.randn(m, rank, generator=generator, dtype=torch.float64)
    right = torch.randn(n, rank, generator=generator, dtype=torch.float64)
    mask = (torch.rand(m, n, generator=generator, dtype=torch.float64) < p).double()
    return left @ right.T, mask


@pytest.mark.parametrize("ridge", [0.0, 0.3])
def test_rows_equal_lstsq_also_when_short_or_empty(ridge):
    target, mask = low_rank(9, 14, 6, 0.6)
    target = target + torch.randn(9, 14, generator=seeded(2), dtype=torch.float64)
    mask[3] = 0.0  # no observation
    mask[5] = 0.0
    mask[5, :2] = 1.0  # fewer observations than the rank
    features = torch.randn(14, 4, generator=seeded(1), dtype=torch.float64)
    solved = als.solve_rows(target, mask, features, ridge).numpy()
    for row in range(9):
        seen = mask[row].bool()
        design = np.vstack([features[seen].numpy(), math.sqrt(ridge) * np.eye(4)])
        values = np.concatenate([target[row, seen].numpy(), np.zeros(4)])
        exact = np.linalg.lstsq(design, values, rcond=1e-10)[0]
        assert np.allclose(solved[row], exact, atol=1e-10)
    assert (solved[3] == 0).all()


def test_one_sweep_is_two_exact_solves():
    target, mask = low_rank(12, 10, 3, 0.7)
    found = als.alternating_minimisation(target, mask, 2, 0.1, 1, seeded(), start="random")
    right = torch.randn(10, 2, generator=seeded(), dtype=torch.float64)
    left = als.solve_rows(target, mask, right, 0.1)
    assert torch.equal(found.left, left)
    assert torch.equal(found.right, als.solve_rows(target.mT, mask.mT, left, 0.1))


@pytest.mark.parametrize("start", ["spectral", "random"])
@pytest.mark.parametrize("ridge", [0.0, 0.5])
def test_objective_never_rises(start, ridge):
    target, mask = low_rank(40, 30, 8, 0.5)
    found = als.alternating_minimisation(target, mask, 3, ridge, 40, seeded(), start=start)
    objective = found.objective
    assert len(objective) == 41 and (objective[1:] <= objective[:-1] * (1 + 1e-12)).all()
    by_hand = (mask * (found.matrix() - target)).square().sum()
    assert found.loss[-1] == pytest.approx(float(by_hand / mask.sum() / 2))
    squares = found.left.square().sum() + found.right.square().sum()
    assert objective[-1] == pytest.approx(float(by_hand + ridge * squares))
    assert (found.seconds.diff() >= 0).all() and found.error is None


@pytest.mark.parametrize("start", ["spectral", "random"])
def test_exact_low_rank_matrix_is_recovered(start):
    target, mask = low_rank(60, 50, 3, 0.5)
    test = (target, 1 - mask)
    found = als.alternating_minimisation(target, mask, 3, 0.0, 60, seeded(), test, start)
    assert found.error[-1] < 1e-20
    assert torch.allclose(found.matrix(), target, atol=1e-9)


def test_full_mask_gives_the_best_approximation():
    target, _ = low_rank(20, 15, 10, 1.0)
    found = als.alternating_minimisation(target, torch.ones_like(target), 4, 0.0, 300, seeded(), start="random")
    tail = torch.linalg.svdvals(target)[4:].square().sum()
    assert found.objective[-1] == pytest.approx(float(tail), rel=1e-9)


def test_same_seed_same_numbers_and_input_untouched():
    target, mask = low_rank(20, 15, 2, 0.5)
    copies = target.clone(), mask.clone()
    runs = [als.alternating_minimisation(target, mask, 2, 0.1, 5, seeded(3), start="random") for _ in "ab"]
    assert torch.equal(runs[0].left, runs[1].left) and torch.equal(runs[0].loss, runs[1].loss)
    assert torch.equal(target, copies[0]) and torch.equal(mask, copies[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 0}, "rank is 0"),
        ({"rank": 16}, "rank is 16, expected an integer from 1 to 15"),
        ({"ridge": -1.0}, "ridge is -1"),
        ({"ridge": math.nan}, "ridge is nan"),
        ({"iterations": 0}, "iterations is 0"),
        ({"start": "warm"}, "start is 'warm'"),
        ({"mask": torch.full((20, 15), 0.5, dtype=torch.float64)}, "other than 0 and 1"),
        ({"mask": torch.zeros(20, 15, dtype=torch.float64)}, "no 1"),
        ({"mask": torch.ones(15, 20, dtype=torch.float64)}, "expected the same"),
        ({"target": torch.full((20, 15), math.inf, dtype=torch.float64)}, "300 non-finite"),
    ],
)
def test_impossible_input_is_refused(change, message):
    target, mask = low_rank(20, 15, 2, 0.5)
    with pytest.raises(ValueError, match=message):
        als.alternating_minimisation(**({"target": target, "mask": mask, "rank": 2} | change))


@pytest.fixture
def small(tmp_path, monkeypatch) -> ratings.Ratings:
    """A small rating set, through the library's own local-folder path."""
    from data_helpers import set_facts, write_manifest

    monkeypatch.setenv("COMPRESSIBLE_DATA", str(tmp_path))
    table, path = small_table(), tmp_path / "movielens-100k" / "ratings.csv.gz"
    path.parent.mkdir()
    table.to_csv(path, index=False)
    files = {"movielens-100k/ratings.csv.gz": (path.read_bytes(), [])}
    return ratings.load(manifest=write_manifest(tmp_path / "m.toml", files, {"movielens-100k": set_facts(table)}))


def test_biased_model_is_stationary_at_convergence(small):
    index = ratings.split(small, "seed0").train
    model = baselines.biased_matrix_factorisation(small, index, 2, 1.5, 2000, seeded(), bias_ridge=0.5)
    target, mask = ratings.to_matrix(small, index)
    parts = [part.clone().requires_grad_() for part in (model.user_bias, model.item_bias, model.users, model.items)]
    a, b, p, q = parts
    residual = mask * (model.overall + a[:, None] + b + p @ q.T - target)
    penalty = 0.5 * (a.square().sum() + b.square().sum()) + 1.5 * (p.square().sum() + q.square().sum())
    (residual.square().sum() + penalty).backward()
    assert max(float(part.grad.abs().max()) for part in parts) < 1e-6
    assert model.overall == pytest.approx(small.ratings[index].mean())


def test_biased_model_is_deterministic_and_keeps_its_curve(small):
    parts = ratings.split(small, "seed1")
    runs = [
        baselines.biased_matrix_factorisation(small, parts.train, 2, 3.0, 4, seeded(5), evaluate=parts.test)
        for _ in "ab"
    ]
    assert torch.equal(runs[0].matrix(), runs[1].matrix()) and np.array_equal(runs[0].curve, runs[1].curve)
    found = ratings.rating_metrics(runs[0].matrix(), small, parts.test)
    assert len(runs[0].curve) == 4 and runs[0].curve[-1] == pytest.approx(found["rmse_clipped"])
    for change in ({"rank": 0}, {"sweeps": 0}, {"ridge": 0.0}, {"bias_ridge": math.nan}):
        with pytest.raises(ValueError, match="expected"):
            baselines.biased_matrix_factorisation(small, parts.train, **change)


def test_tuning_takes_the_best_of_its_table_and_no_overlap(small):
    fit, validation = ratings.validation_slice(ratings.split(small, "seed0"), 0.3)
    tuned = baselines.tune(small, fit, validation, ranks=(1, 3), ridges=(0.1, 5.0), sweeps=4)
    assert len(tuned.table) == 4 and (tuned.rank, tuned.ridge, tuned.rmse) == min(tuned.table, key=lambda r: r[2])
    again = baselines.biased_matrix_factorisation(small, fit, tuned.rank, tuned.ridge, 4, seeded(0))
    assert baselines.clipped_rmse(again, small, validation) == tuned.rmse
    with pytest.raises(ValueError, match="overlap"):
        baselines.tune(small, fit, fit[:3])
    with pytest.raises(ValueError, match="at least one"):
        baselines.tune(small, fit, validation, ranks=())


@needs_real
def test_real_biased_model_reaches_the_known_error(record_property):
    loaded = ratings.load()
    parts = ratings.split(loaded, "u1")
    tuned = baselines.tune(loaded, *ratings.validation_slice(parts), ranks=(5,), ridges=(8.0, 12.0, 16.0), sweeps=8)
    model = baselines.biased_matrix_factorisation(loaded, parts.train, tuned.rank, tuned.ridge, 10, seeded())
    found = ratings.rating_metrics(model.matrix(), loaded, parts.test)
    offsets = ratings.center(loaded, parts.train).matrix()
    record_property("u1_rmse_clipped", found["rmse_clipped"])
    assert 0.88 < found["rmse_clipped"] < 0.97
    assert found["rmse"] < ratings.rating_metrics(offsets, loaded, parts.test)["rmse"]


@needs_real
def test_real_alternating_minimisation_overfits_after_its_best():
    loaded = ratings.load()
    parts = ratings.split(loaded, "u1")
    train, test = ratings.to_matrix(loaded, parts.train), ratings.to_matrix(loaded, parts.test)
    found = als.alternating_minimisation(*train, 10, 0.1, 20, seeded(), test, start="random")
    assert found.error[-1] > found.error.min() * 1.1 and found.loss[-1] < found.loss[int(found.error.argmin())]
