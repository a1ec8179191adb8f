"""A descent looked at on its way, and the order of first passages."""

import numpy as np
import pytest
import torch
from scipy.stats import kendalltau

import compressible as cd
from compressible.experiments.trajectories import first_passage, pairs_in_order, stretches


def _stack(seeds=3):
    g = torch.Generator().manual_seed(0)
    problem = cd.MatrixFactorization(cd.low_rank_target((8, 8), 2, (seeds,), g))
    return problem, cd.orthogonal_factors((8, 8), 3, scale=0.5, generator=g, batch_shape=(seeds,))


@pytest.mark.parametrize("engine", ["reference", "fused"])
def test_stretches_are_the_states_of_one_descent(engine):
    problem, start = _stack()
    whole = cd.descend(problem, start, 1.0, 120, record_every=40, snapshots=range(0, 121, 40), engine=engine)
    path = list(stretches(problem, start, 1.0, 120, 40, engine=engine))
    assert [iteration for iteration, _, _ in path] == [0, 40, 80, 120]
    for column, (iteration, factors, loss) in enumerate(path):
        torch.testing.assert_close(loss, whole.loss[:, column], rtol=1e-12, atol=0)
        for mine, expected in zip(factors, whole.snapshots[iteration], strict=True):
            torch.testing.assert_close(mine, expected, rtol=1e-12, atol=1e-14)


def test_a_stopped_problem_stays_and_the_walk_ends_with_the_last():
    problem, start = _stack()
    whole = cd.descend(problem, start, 1.0, 20_000, record_every=20, tolerance=1e-3)
    assert len(set(whole.stopped.tolist())) > 1
    path = list(stretches(problem, start, 1.0, 20_000, 20, tolerance=1e-3))
    assert path[-1][0] == whole.stopped.max()
    torch.testing.assert_close(path[-1][2], whole.final("loss"), rtol=1e-10, atol=0)


def test_stretches_refuse_a_remainder_and_pass_divergence_on():
    problem, start = _stack()
    with pytest.raises(ValueError, match="every is 7, expected a divisor of steps = 100"):
        next(stretches(problem, start, 1.0, 100, 7))
    with pytest.raises(cd.DivergenceError) as caught:
        list(stretches(problem, start, 1e6, 100, 20))
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
