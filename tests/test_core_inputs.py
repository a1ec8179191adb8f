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
from compressible.recovery import als
from compressible.recovery.dropout import DropoutFactorization


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


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: descend(snapshots="ab"), "snapshots is 'ab', expected iterations from 0 to steps = 5"),
        (lambda: descend(engine=["fused"]), r"engine is \['fused'\], expected one of auto, reference, fused"),
        (lambda: descend(show_progress="no"), "show_progress is 'no', expected True or False"),
        (lambda: descend(step_size=torch.ones(2, dtype=torch.bool)), "step_size has shape .2,. and dtype torch.bool"),
        (
            lambda: descend(step_size=[1.0, 2.0]),
            r"step_size is \[1.0, 2.0\], expected finite > 0: a number, or a tensor",
        ),
        (lambda: descend(weight_decay=torch.ones(2)), "weight_decay is tensor.*, expected finite >= 0: a number"),
        (lambda: descend(steps=10**16), "steps is 10000000000000000, expected an integer from 0 to 1e.15"),
        (
            lambda: descend(steps=10**9, record_every=1),
            "record_every is 1, expected at most 10000000 records, not 1000000001: with steps = .* one every 100",
        ),
        (
            lambda: cd.descend(stack(), stacked(), torch.ones(3), 5),
            r"batch shape of step_size is \(3,\), expected one that broadcasts with \(2,\)",
        ),
        (
            lambda: cd.descend(stack(), stacked(), 1.0, 5, outer_ratio=torch.ones(2, 3)),
            r"batch shape of outer_ratio is \(2, 3\), expected one that broadcasts with \(2,\)",
        ),
        (
            lambda: cd.descend(cd.SparseCompletion(entries([1.0, 2.0])), start((8, 9)), torch.ones(2), 5),
            r"SparseCompletion takes no stack, got .*step_size.* of batch shape \(2,\), expected \(\)",
        ),
        (
            lambda: cd.descend(cd.MatrixCompletion, start(), 1.0, 5),
            "problem is the class MatrixCompletion, expected a rec",
        ),
        (lambda: cd.descend(problem(), start()[0], 1.0, 5), "type of factors is 'Tensor', expected a list"),
        (lambda: cd.product(start()[0]), "type of factors is 'Tensor', expected a list"),
        (
            lambda: cd.product([start()[0], start()[2].float()]),
            "factors have kinds .*expected one floating dtype on one",
        ),
        (
            lambda: cd.product([torch.ones(3, 5), torch.ones(6, 4)]),
            r"shapes \[\(3, 5\), \(6, 4\)\], expected widths of neighbours to be equal",
        ),
        (
            lambda: cd.FactoredLinear([f.to_sparse() for f in start()]),
            "W_1 has .*torch.sparse_coo, expected a dense mat",
        ),
        (lambda: cd.FactoredLinear(start()[0]), "type of factors is 'Tensor', expected a list"),
        (
            lambda: cd.FactoredConv2d([torch.ones(3, 9), torch.ones(6, 3)], kernel_size=3),
            "kernel_size is 3, expected a pair of integers >= 1",
        ),
        (
            lambda: cd.FactoredConv2d([torch.ones(3, 9), torch.ones(6, 3)], stride=2, padding="same"),
            "padding is 'same', expected 'same' .with stride 1., 'valid', or integers",
        ),
        (
            lambda: cd.factorize(torch.nn.Sequential(torch.nn.Linear(3, 3)), ["0"], width=1, loss_step=5),
            "loss_step is 5, expected a function that maps the model to its loss",
        ),
        (
            lambda: cd.factorize(torch.nn.Sequential(torch.nn.Linear(3, 3)), "[", width=1),
            r"target_modules is '\[', exp",
        ),
        (
            lambda: sensing(measured=torch.ones(3).int()),
            "measurements has .* dtype torch.int32, expected .* the operators' torch.float64",
        ),
        (lambda: sensing(target=target().int()), "target has .* dtype torch.int32, expected .* float32 or float64"),
        (lambda: sensing(target=target().to_sparse()), "target has .*torch.sparse_coo, expected a non-empty floating"),
        (lambda: sensing(target=target().to("meta")), "target has .* on meta, expected a non-empty floating-point"),
        (lambda: sensing(target=target() * np.nan), "target hold values that are not finite"),
        (
            lambda: sensing(target=target().expand(3, 12, 12), measured=torch.ones(2, 3, dtype=torch.float64)),
            r"batch shape of target is \(3,\), expected one that broadcasts with \(2,\)",
        ),
        (lambda: cd.SparseCompletion(entries([1, 2])), "observed has dtype torch.int64, expected real .* or a dtype"),
        (
            lambda: cd.SparseCompletion(torch.eye(4).half().to_sparse()),
            "observed has dtype torch.float16, expected real entries in float32 or float64",
        ),
        (lambda: cd.SparseCompletion(entries([1.0, 2.0]), dtype=torch.float16), "dtype is torch.float16, expected one"),
        (
            lambda: cd.stack_problems([problem(), cd.MatrixCompletion(target().float(), torch.ones(12, 12))]),
            "cannot stack problems .*float32.*float64.*expected one dense kind",
        ),
        (lambda: cd.stack_problems([problem(), 1]), "problem 1 of problems is 1, expected a recovery problem"),
        (lambda: cd.stack_problems([]), r"problems is \[\], expected at least one"),
        (
            lambda: cd.stack_factors([start(), [factor.float() for factor in start()]]),
            "cannot stack runs of kinds .*expected one type, device and batch shape of each layer",
        ),
        (lambda: cd.low_rank_target((4, 4), 2, batch_shape=3), "batch_shape is 3, expected a tuple of integers"),
        (
            lambda: cd.low_rank_target((4, 4), 2, batch_shape=(2.0,)),
            "size 0 of batch_shape is 2.0, expected an integer",
        ),
        (
            lambda: cd.low_rank_target((4, 4), 2, dtype=torch.int64),
            "dtype is torch.int64, expected one of torch.float32",
        ),
        (lambda: cd.low_rank_target((4, 4), 2, device="gpu"), "device is 'gpu', expected cpu, a CUDA device that this"),
        (
            lambda: cd.low_rank_target((10**12, 10**12), 2),
            r"size by .*shape is .*, expected at most 1.09951e.12 entries",
        ),
        (lambda: cd.orthogonal_factors((4, 4), generator=7), "generator is 7, expected a torch.Generator on the CPU"),
        (
            lambda: cd.orthogonal_factors((4, 4), generator=torch.Generator),
            "generator is the class Generator, expected",
        ),
        (lambda: cd.random_mask((4, 4), 0.5, weights=[1.0]), "type of weights is 'list', expected a torch tensor"),
        (lambda: cd.spectra.effective_rank(torch.tensor([[np.nan]])), "matrix holds values that are not finite"),
        (lambda: cd.spectra.stable_count(torch.tensor([1.0, -1.0])), "values hold -1, expected numbers >= 0"),
        (
            lambda: cd.compare_starts(lambda generator: problem(), 0, 1, steps=1),
            "what build returned is 'MatrixCompletion",
        ),
        (
            lambda: cd.compare_starts(odd_start, 0, 1, steps=1),
            "start 'wide' of build is .*, expected .factors, step size",
        ),
        (
            lambda: cd.stack_starts(entries_alone, 0, 1, steps=1),
            "type of build's problem is 'SparseCompletion', expected",
        ),
    ],
)
def test_what_had_errors_of_torch_or_none_is_named_with_its_value(call, told):
    with pytest.raises(ValueError, match=told):
        call()


def start(shape: tuple[int, int] = (12, 12)) -> list[torch.Tensor]:
    return cd.orthogonal_factors(shape, scale=0.1, generator=torch.Generator().manual_seed(3))


def stack() -> cd.MatrixCompletion:
    return cd.stack_problems([problem()] * 2)


def stacked() -> list[torch.Tensor]:
    return cd.stack_factors([start()] * 2)


def descend(step_size: object = 1.0, steps: int = 5, **options: object) -> cd.History:
    return cd.descend(problem(), start(), step_size, steps, **options)


def sensing(measured: torch.Tensor | None = None, target: torch.Tensor | None = None) -> cd.MatrixSensing:
    operators = cd.gaussian_operators(3, (12, 12))
    return cd.MatrixSensing(operators, torch.ones(3, dtype=torch.float64) if measured is None else measured, target)


def odd_start(generator: torch.Generator) -> tuple:
    return problem(), {"wide": (start(), 1.0)}


def entries_alone(generator: torch.Generator) -> tuple:
    return cd.SparseCompletion(entries([1.0, 2.0])), {"wide": (start((8, 9)), 1.0, 1.0)}


def test_whole_numbers_become_entries_of_a_named_type():
    made = cd.SparseCompletion(entries([1, 2]), dtype=torch.float32)
    assert (made.dtype, made.seen.rows.values.tolist()) == (torch.float32, [1.0, 2.0])


@pytest.mark.parametrize("engine", ["reference", "fused", "compiled"])
def test_tensors_that_ask_for_gradients_change_no_descent(engine):
    asks = target().requires_grad_(), [factor.requires_grad_() for factor in stacked()]
    rate = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    plain = cd.descend(cd.MatrixFactorization(target()), stacked(), rate.detach(), 20, record_every=5, engine=engine)
    asked = cd.descend(cd.MatrixFactorization(asks[0]), asks[1], rate, 20, record_every=5, engine=engine)
    assert torch.equal(plain.loss, asked.loss) and not asked.loss.requires_grad


def test_records_of_ten_million_are_the_most():
    assert descend(steps=3, record_every=10**30).iterations.tolist() == [0, 3]
    history = descend(steps=10**15, record_every=10**9, tolerance=1e9)  # it stops at its first record
    assert history.iterations.tolist() == [0]


def test_integers_of_numpy_are_integers():
    wide = cd.orthogonal_factors((12, 12), depth=np.int64(3), width=np.int32(12))
    assert cd.compress_from_gradient(problem(), wide, np.int64(2))[0].shape == (4, 12)
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


def test_als_takes_integers_of_numpy():
    made = cd.SparseCompletion(scipy.sparse.coo_matrix(target().numpy()))
    plain, numpys = als.alternate(made, 2, sweeps=2), als.alternate(made, np.int64(2), sweeps=np.int8(2))
    assert torch.equal(plain.loss, numpys.loss)


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


def test_a_target_under_dropout_may_be_written_into_afterwards():
    own = target()
    made, same = DropoutFactorization(own, 0.5), DropoutFactorization(own.clone(), 0.5)
    own.zero_()
    factors = [torch.eye(12, dtype=torch.float64)] * 2
    assert made.evaluate_factors(factors) == same.evaluate_factors(factors)


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
