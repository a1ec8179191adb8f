"""A descent looked at on its way, and the order of first passages."""

import numpy as np
import pytest
import torch
from scipy.stats import kendalltau

import compressible as cd
from compressible.experiments.trajectories import first_passage, iterates, pairs_in_order


def _stack(seeds=3):
    g = torch.Generator().manual_seed(0)
    problem = cd.MatrixFactorization(cd.low_rank_target((8, 8), 2, (seeds,), g))
    return problem, cd.orthogonal_factors((8, 8), 3, scale=0.5, generator=g, batch_shape=(seeds,))


@pytest.mark.parametrize("engine", ["reference", "fused"])
@pytest.mark.parametrize("marks", [[0, 40, 80, 120], [7, 7, 40.9, 120]])
def test_iterates_are_the_snapshots_of_one_descent(engine, marks):
    problem, start = _stack()
    options = {"outer_ratio": 0.3, "engine": engine}
    ends = [int(mark) for mark in marks]
    path = list(iterates(problem, (start, 1.0, 0.3), marks, engine=engine))
    assert [iteration for iteration, _, _ in path] == ends
    for iteration, factors, loss in path:
        whole = cd.descend(problem, start, 1.0, iteration, **options)
        torch.testing.assert_close(loss, whole.final("loss"), rtol=1e-10, atol=0)
        torch.testing.assert_close(factors, whole.factors, rtol=1e-10, atol=1e-13)
    assert (path[-1][2] < 0.99 * path[0][2]).all()


def test_a_problem_that_arrived_stays_and_the_descent_ends_with_the_last():
    problem, start = _stack()
    path = list(iterates(problem, (start, 1.0, 1.0), range(0, 20_001, 20), tolerance=1e-3))
    losses = torch.stack([loss for _, _, loss in path], 1)
    arrived = losses < 1e-3
    first = arrived.int().argmax(1)
    assert len(set(first.tolist())) > 1 and first.max() == len(path) - 1 < 1000
    for row, at in zip(losses, first.tolist(), strict=True):
        torch.testing.assert_close(row[at:], row[at].expand(len(row) - at), rtol=1e-10, atol=0)
        assert (row[:at].diff() < 0).all()


def test_marks_ascend_and_divergence_is_passed_on():
    problem, start = _stack()
    for wrong in ([5, 3], [-1, 3]):
        with pytest.raises(ValueError, match="ascending"):
            next(iterates(problem, (start, 1.0, 1.0), wrong))
    with pytest.raises(cd.DivergenceError) as caught:
        list(iterates(problem, (start, 1e6, 1.0), [0, 20, 100]))
    assert caught.value.__notes__ == ["counted from iteration 0"]


def test_first_passage_by_hand():
    curves = np.array([[[0.0, 0.0], [2.0, 0.0], [3.0, 1.0]]])
    np.testing.assert_array_equal(first_passage(curves, np.array([[1.0, 0.5]]), np.array([0, 10, 20])), [[10, 20]])
    assert np.isnan(first_passage(curves, np.array([[1.0, 4.0]]), np.array([0, 10, 20]))[0, 1])


def test_pairs_in_order():
    assert pairs_in_order(np.array([[1.0, 2, 3], [3, 2, 1], [1, 1, 2], [1, np.nan, 2]])) == pytest.approx(
        [1, 0, 2.5 / 3, 1 / 3]
    )
    first = np.random.default_rng(0).random((1, 9))
    assert pairs_in_order(first)[0] == pytest.approx((1 + kendalltau(np.arange(9), first[0]).statistic) / 2)
