"""What people hand to the core: arrays, integers of numpy, half types, tensors they go on writing into, autocast."""

from __future__ import annotations

import pickle
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import pytest
import scipy.sparse
import torch

import compressible as cd


def target(size: int = 12) -> torch.Tensor:
    return cd.low_rank_target((size, size), 2, generator=torch.Generator().manual_seed(0))


def problem() -> cd.MatrixCompletion:
    return cd.MatrixCompletion(target(), cd.random_mask((12, 12), 0.5, generator=torch.Generator().manual_seed(1)))


def entries(values: list[complex]) -> scipy.sparse.coo_matrix:
    return scipy.sparse.coo_matrix((values, ([1, 2], [1, 2])), shape=(8, 9))


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: cd.MatrixCompletion(target().numpy(), torch.ones(12, 12)), "type of target is 'ndarray'.*from_numpy"),
        (
            lambda: cd.MatrixCompletion(target(), np.ones((12, 12))),
            "type of mask is 'ndarray', expected a torch tensor",
        ),
        (lambda: cd.MatrixFactorization([[1.0]]), "type of target is 'list', expected a torch tensor"),
        (lambda: cd.MatrixSensing(np.ones((2, 3, 4)), torch.ones(2)), "type of operators is 'ndarray'"),
        (
            lambda: cd.MatrixSensing(torch.ones(2, 3, 4), torch.tensor([1.0, np.nan])),
            "measurements hold values that are not finite",
        ),
        (lambda: cd.MatrixFactorization(target().half()), "dtype torch.float16, expected .* in float32 or float64"),
        (
            lambda: cd.MatrixFactorization(target().bfloat16()),
            "dtype torch.bfloat16, expected .* in float32 or float64",
        ),
        (lambda: cd.MatrixFactorization(torch.ones(3, 3, dtype=torch.int64)), "dtype torch.int64, expected"),
        (lambda: cd.compress_spectral(problem(), 4.0), "width is 4.0, expected an integer with 1 <= width"),
        (lambda: cd.compress_spectral(problem(), True), "width is True, expected an integer"),
        (lambda: cd.compress_spectral(problem(), 4, depth=3.0), "depth is 3.0, expected an integer >= 2"),
        (lambda: cd.compress_spectral(problem(), 4, scale=np.nan), "scale is nan, expected a finite number > 0"),
        (lambda: cd.compress_spectral(problem(), 4, surrogate=np.ones((12, 12))), "type of surrogate is 'ndarray'"),
        (lambda: cd.orthogonal_factors((12, 12), width=2.5), "width is 2.5, expected an integer >= 1"),
        (lambda: cd.orthogonal_factors((2, 12, 12)), "shape is .2, 12, 12., expected two integers"),
        (lambda: cd.low_rank_target("12", 2), "shape is '12', expected two integers"),
        (lambda: cd.random_mask((12.0, 12), 0.5), "size 0 of shape is 12.0, expected an integer >= 1"),
        (lambda: cd.gaussian_operators(5, (0, 12)), "size 0 of shape is 0, expected an integer >= 1"),
        (
            lambda: cd.descend(problem(), cd.compress_spectral(problem(), 4), 1.0, 5, snapshots=5),
            "snapshots is 5, expected iterations from 0 to steps = 5",
        ),
        (
            lambda: cd.descend(problem(), cd.compress_spectral(problem(), 4), 1.0, 5, snapshots=[2.5]),
            r"snapshots is \[2.5\], expected iterations",
        ),
        (lambda: cd.descend(problem(), cd.compress_spectral(problem(), 4), True, 5), "step_size is True, expected"),
        (lambda: cd.low_rank_target((12, 12), 2.0), "rank is 2.0, expected an integer with 1 <= rank"),
        (lambda: cd.descend(problem(), [np.eye(12)] * 3, 1.0, 5), "type of W_1 is 'ndarray', expected a torch tensor"),
        (
            lambda: cd.descend(problem(), cd.compress_spectral(problem(), 4), 1.0, 2.5),
            "steps is 2.5, expected an integer",
        ),
        (lambda: cd.SparseCompletion(entries([1j, 2.0])), "observed has dtype torch.complex128, expected real entries"),
        (lambda: cd.compress_spectral(cd.SparseCompletion(entries([0.0, 0.0])), 2), "surrogate is 0 everywhere"),
        (lambda: cd.descend(problem(), cd.compress_spectral(problem(), 4), 1.0, 5).final("Error"), "curve is 'Error'"),
    ],
)
def test_what_cannot_be_taken_is_named_with_its_value(call, told):
    with pytest.raises(ValueError, match=told):
        call()


def test_integers_of_numpy_are_integers():
    start = cd.orthogonal_factors((12, 12), depth=np.int64(3), width=np.int32(12))
    assert cd.compress_from_gradient(problem(), start, np.int64(2))[0].shape == (4, 12)
    history = cd.descend(
        problem(), cd.compress_spectral(problem(), np.int16(4)), 1.0, np.int64(10), record_every=np.int8(5)
    )
    assert history.iterations.tolist() == [0, 5, 10]


def test_a_sparse_problem_gives_all_its_singular_vectors():
    dense = target(9)[:7]
    sparse = cd.SparseCompletion(scipy.sparse.coo_matrix(dense.numpy()))
    small = cd.compress_spectral(sparse, 7, scale=1.0)
    left, _, right = torch.linalg.svd(dense)
    assert [tuple(factor.shape) for factor in small] == [(7, 9), (7, 7), (7, 7)]
    assert (small[0][:2] @ right[:2].mT).abs().diagonal().numpy() == pytest.approx(np.ones(2))
    assert (small[-1][:, :2].mT @ left[:, :2]).abs().diagonal().numpy() == pytest.approx(np.ones(2))


@pytest.mark.parametrize("kind", [cd.MatrixFactorization, lambda matrix: cd.MatrixCompletion(matrix, matrix * 0 + 1)])
def test_a_problem_keeps_what_it_was_given(kind):
    own = target()
    made, same = kind(own), kind(own.clone())
    own.zero_()
    point = torch.eye(12, dtype=torch.float64)
    assert made.loss(point) == same.loss(point)
    assert torch.equal(made.gradient(point), same.gradient(point))
    assert torch.equal(made.surrogate(), same.surrogate())


def test_measurements_may_be_written_into_afterwards():
    operators = cd.gaussian_operators(30, (12, 12), generator=torch.Generator().manual_seed(2))
    own, seen = target(), torch.einsum("kmn,mn->k", operators, target())
    made = cd.MatrixSensing(operators, seen, own)
    before, error = made.gradient(torch.eye(12, dtype=torch.float64)), made.error(torch.eye(12, dtype=torch.float64))
    seen.zero_()
    own.zero_()
    assert torch.equal(made.gradient(torch.eye(12, dtype=torch.float64)), before)
    assert torch.equal(made.error(torch.eye(12, dtype=torch.float64)), error)


def test_a_mask_may_be_written_into_afterwards():
    mask = cd.random_mask((12, 12), 0.5, generator=torch.Generator().manual_seed(1))
    made = cd.MatrixCompletion(target(), mask)
    before = made.surrogate().clone()
    mask.fill_(1.0)
    assert torch.equal(made.surrogate(), before)


def test_autocast_of_the_caller_changes_nothing():
    made = cd.MatrixCompletion(target().float(), problem().mask.float())

    def run() -> tuple[torch.Tensor, ...]:
        small = cd.compress_spectral(made, 4, scale=0.3)
        guess = cd.compress_from_gradient(
            made, cd.orthogonal_factors((12, 12), dtype=torch.float32, generator=seeded()), 2
        )
        return (*small, *guess, cd.descend(made, small, 1.0, 10).loss)

    def seeded() -> torch.Generator:
        return torch.Generator().manual_seed(2)

    plain = run()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = run()
    assert all(torch.equal(a, b) for a, b in zip(plain, cast, strict=True))


def diverging(step_size: float) -> float:
    small = cd.compress_spectral(problem(), 4, scale=0.5)
    return float(cd.descend(problem(), small, step_size, 200).final("loss"))


def test_a_divergence_can_be_pickled_and_leaves_a_pool_alive():
    with pytest.raises(cd.DivergenceError) as caught:
        diverging(1e6)
    again = pickle.loads(pickle.dumps(caught.value))
    assert (str(again), again.iteration, again.step_size) == (str(caught.value), caught.value.iteration, 1e6)
    assert torch.equal(again.history.loss[:1], caught.value.history.loss[:1]) and bool(again.history.loss[1].isnan())
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        bad, good = pool.submit(diverging, 1e6), pool.submit(diverging, 1.0)
        with pytest.raises(cd.DivergenceError, match="step size 1e\\+06"):
            bad.result(timeout=120)
        assert good.result(timeout=120) > 0


@pytest.mark.parametrize("snapshots", [[], [100], [0, 100]])
def test_a_stack_of_which_all_diverge_says_so(snapshots):
    stack = cd.stack_problems([cd.MatrixFactorization(target()) for _ in range(2)])
    factors = [torch.eye(12, dtype=torch.float64).expand(2, 12, 12) * 0.5 for _ in range(3)]
    with pytest.raises(cd.DivergenceError, match="of problem 0 in the stack of 2") as caught:
        cd.descend(stack, factors, 1e6, 200, snapshots=snapshots)
    kept = caught.value.history.snapshots
    assert all(mark == 0 or mark not in kept or bool(kept[mark][0].isnan().all()) for mark in snapshots)
