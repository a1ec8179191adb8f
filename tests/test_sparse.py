"""Sparse completion: the dense engine's steps without an m x n array, on the CPU and, where there is one, on CUDA."""

import inspect

import numpy as np
import pytest
import torch
from conftest import few

import compressible as cd
from compressible.descent.engines.reference import Reference
from compressible.descent.engines.sparse_cuda import SparseCuda
from compressible.recovery.truncated_svd import _lanczos, truncated_svd
from compressible.runtime.devices import interpreted

try:
    import scipy.sparse
    import scipy.sparse.linalg
except ModuleNotFoundError:  # a GPU host may have PyTorch alone
    scipy = None

pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
CUDA = torch.cuda.is_available()
ON_CUDA = (pytest.mark.cuda, pytest.mark.skipif(not CUDA, reason="needs a CUDA device"))
DEVICES = ["cpu", pytest.param("cuda", marks=ON_CUDA)]


class Launched(SparseCuda):
    """`SparseCuda` launched step by step, as Triton's interpreter needs it."""

    def prepare(self, steps):
        self.evaluate()

    def advance(self, steps):
        self._take(steps)


def _pair(m=23, n=31, observed=0.4, seed=0, dtype=torch.float64, device="cpu"):
    g = torch.Generator().manual_seed(seed)
    target = cd.low_rank_target((m, n), 3, generator=g, dtype=dtype)
    mask = cd.random_mask((m, n), observed, generator=g, dtype=dtype)
    mask[2] = 0
    mask[:, 5] = 0  # an empty row and an empty column
    seen, unseen = ((target * part).to_sparse_csr() for part in (mask, 1 - mask))
    dense = cd.MatrixCompletion(target.to(device), mask.to(device))
    return dense, cd.SparseCompletion(seen.to(device), unseen.to(device)), g


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("engine", ["auto", "reference"])
@pytest.mark.parametrize(("depth", "decay", "dtype"), [
    (2, 0.01, torch.float64), (3, 0.0, torch.float64), (4, 0.01, torch.float64), (5, 0.0, torch.float64),
    (3, 0.0, torch.float32),
])  # fmt: skip
def test_sparse_steps_are_the_dense_ones(device, engine, depth, decay, dtype):
    dense, sparse, g = _pair(dtype=dtype, device=device)
    factors = cd.orthogonal_factors((23, 31), depth, 6, 0.4, g, dtype, device)
    options = {"step_size": 2.0, "steps": 120, "outer_ratio": 1.5, "weight_decay": decay, "record_every": 7}
    slow = cd.descend(dense, factors, engine="reference", **options)
    fast = cd.descend(sparse, factors, engine=engine, snapshots=(0, 30), **options)
    tolerance = {"rtol": 1e-10, "atol": 1e-12} if dtype is torch.float64 else {"rtol": 2e-3, "atol": 1e-5}
    torch.testing.assert_close(fast.loss, slow.loss, **tolerance)
    torch.testing.assert_close(fast.error, slow.error, **tolerance)
    for mine, other in zip(fast.factors, slow.factors, strict=True):
        torch.testing.assert_close(mine, other, **tolerance)
    for mine, start in zip(fast.snapshots[0], factors, strict=True):
        torch.testing.assert_close(mine, start)


@pytest.mark.cuda
@pytest.mark.parametrize("seed", few(range(12 if CUDA else 3), 6))
def test_random_problems_take_the_reference_steps_in_the_kernel(seed):
    pytest.importorskip("triton", reason="triton is not installed: Linux only")
    if not CUDA and not interpreted():
        pytest.skip("needs a CUDA device or TRITON_INTERPRET=1")
    generator, largest = np.random.default_rng(seed), 300 if CUDA else 30
    (m, n), depth, decay = generator.integers(6, largest, 2), int(generator.integers(2, 6)), 0.02 * (seed % 2)
    dtype, width = torch.float32 if seed % 3 == 2 else torch.float64, int(generator.integers(1, min(m, n, 40)))
    dense, sparse, g = _pair(m, n, generator.uniform(0.1, 0.9), seed, dtype, "cuda" if CUDA else "cpu")
    factors = cd.orthogonal_factors((m, n), depth, width, 0.4, g, dtype, dense.device)
    rates = [1.5, *[0.7] * (depth - 2), 1.5]
    slow = Reference(sparse, factors, rates, decay)
    fast = (SparseCuda if CUDA else Launched)(sparse, factors, rates, decay)
    fast.prepare(2)
    tolerance = {"rtol": 1e-10, "atol": 1e-13} if dtype is torch.float64 else {"rtol": 2e-4, "atol": 1e-5}
    for steps in (0, 1, 3):
        slow.advance(steps)
        fast.advance(steps)
        torch.testing.assert_close(fast.evaluate().to(dtype), slow.evaluate(), **tolerance)
        for mine, other in zip(fast.factors, slow.factors, strict=True):
            torch.testing.assert_close(mine, other, **tolerance)


@pytest.mark.parametrize("device", DEVICES)
def test_it_stops_and_diverges_like_the_dense_problem(device):
    dense, sparse, g = _pair(device=device)
    factors = cd.orthogonal_factors((23, 31), 3, 6, 0.4, g, device=device)
    runs = [cd.descend(p, factors, 2.0, 2000, tolerance=1e-3, record_every=9) for p in (dense, sparse)]
    assert runs[0].stopped == runs[1].stopped > 0
    with pytest.raises(cd.DivergenceError, match="stopped being finite"):
        cd.descend(sparse, factors, 1e6, 200)


@pytest.mark.parametrize("make", [
    lambda t: t.to_sparse_coo(), lambda t: t.to_sparse_csr(), lambda t: scipy.sparse.csr_array(t.numpy()),
    lambda t: scipy.sparse.coo_matrix(t.numpy()), lambda t: scipy.sparse.csc_array(t.numpy()),
])  # fmt: skip
def test_every_sparse_format_gives_the_same_problem(make):
    g = torch.Generator().manual_seed(1)
    matrix = cd.random_mask((7, 9), 0.3, generator=g) * torch.randn(7, 9, generator=g, dtype=torch.float64)
    problem = cd.SparseCompletion(make(matrix))
    torch.testing.assert_close(problem.surrogate().to_dense(), matrix * 63 / 18)
    assert problem.shape == (7, 9) and len(problem.seen) == 18
    transposed = problem.seen.matrix(problem.seen.rows.values, transposed=True)
    torch.testing.assert_close(transposed.to_dense(), matrix.mT)


def test_a_stored_zero_is_an_observation():
    entries = scipy.sparse.coo_array(([0.0, 2.0], ([0, 1], [1, 0])), shape=(2, 2))
    problem = cd.SparseCompletion(entries)
    factors = [torch.ones(1, 2, dtype=torch.float64), torch.ones(2, 1, dtype=torch.float64)]
    assert problem.evaluate_factors(factors)[0] == pytest.approx((1 + 1) / 4)


def test_bad_entries_are_refused_with_the_value():
    twice = scipy.sparse.coo_array(([1.0, 2.0], ([0, 0], [1, 1])), shape=(2, 2))
    with pytest.raises(ValueError, match=r"entry \(0, 1\) twice"):
        cd.SparseCompletion(twice)
    with pytest.raises(ValueError, match="holds the value nan"):
        cd.SparseCompletion(scipy.sparse.coo_array(([np.nan], ([0], [1])), shape=(2, 2)))
    with pytest.raises(ValueError, match="no entry at all"):
        cd.SparseCompletion(scipy.sparse.coo_array((2, 2)))
    one, other = scipy.sparse.eye_array(3), scipy.sparse.eye_array(4)
    with pytest.raises(ValueError, match=r"hidden has shape \(4, 4\)"):
        cd.SparseCompletion(one, other)
    with pytest.raises(ValueError, match="expected a two-dimensional sparse"):
        cd.SparseCompletion(torch.ones(3, 3))
    with pytest.raises(ValueError, match="expected one dense kind"):
        cd.stack_problems([cd.SparseCompletion(one)] * 2)
    factors = cd.orthogonal_factors((3, 3), 3, batch_shape=(2,))
    with pytest.raises(ValueError, match="takes no stack"):
        cd.descend(cd.SparseCompletion(one), factors, 1.0, 1)


def test_entries_that_are_observed_and_hidden_are_refused():
    places = torch.tensor([[0, 2, 2], [1, 0, 3]])
    seen = torch.sparse_coo_tensor(places, torch.ones(3), (3, 4), check_invariants=True)
    hidden, apart = (
        torch.sparse_coo_tensor(torch.tensor(others), torch.ones(3), (3, 4), check_invariants=True)
        for others in ([[0, 2, 1], [2, 3, 0]], [[0, 2, 1], [2, 1, 3]])
    )
    with pytest.raises(ValueError, match=r"hidden has entry \(2, 3\), which is observed"):
        cd.SparseCompletion(seen, hidden)
    assert len(cd.SparseCompletion(seen, apart).unseen) == 3


@pytest.mark.parametrize("place", [(3, 0), (-1, 2), (0, 4), (1, -5)])
def test_entries_outside_of_the_matrix_are_refused(place):
    at = torch.tensor(place)[:, None]
    odd = torch.sparse_coo_tensor(at, torch.ones(1), (3, 4), check_invariants=False)
    with pytest.raises(ValueError, match=rf"observed has an entry at \({place[0]}, {place[1]}\), expected .* \(3, 4\)"):
        cd.SparseCompletion(odd)


def test_rows_that_are_dense_are_refused():
    hybrid = torch.sparse_coo_tensor(torch.tensor([[0, 2]]), torch.ones(2, 4), (3, 4), check_invariants=True)
    with pytest.raises(ValueError, match="of 2 dimensions, 1 of them dense, expected a two-dimensional sparse"):
        cd.SparseCompletion(hybrid)


def test_the_spectral_start_is_the_dense_one():
    dense, sparse, _ = _pair(40, 30, 0.5)
    expected, found = (cd.compress_spectral(problem, 4, 3, 0.1) for problem in (dense, sparse))
    for mine, other in zip(found, expected, strict=True):
        assert mine.shape == other.shape
    for position, flip in ((0, True), (2, False)):
        a, b = (part[position].mT if flip else part[position] for part in (found, expected))
        torch.testing.assert_close(a @ a.mT, b @ b.mT)


@pytest.mark.parametrize("device", DEVICES)
def test_truncated_svd_is_the_leading_part_and_repeats(device):
    _, sparse, _ = _pair(60, 50, 0.6, device=device)
    matrix = sparse.surrogate()
    left, values, right = truncated_svd(matrix, 3, seed=4)
    dense = torch.linalg.svdvals(matrix.to_dense())
    torch.testing.assert_close(values, dense[:3], rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(left.mT @ matrix.to_dense() @ right, torch.diag(values), rtol=1e-6, atol=1e-6)
    again = truncated_svd(matrix, 3, seed=4)
    for mine, other in zip((left, values, right), again, strict=True):  # another seed would turn the signs about
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-10)


def _few_values():
    """A rank below what is asked for: Lanczos uses its space up and draws vectors anew."""
    one_row = torch.zeros(30, 40, dtype=torch.float64)
    one_row[3, :20] = 1
    return {"one row": one_row, "tall": one_row.mT.clone()}


@pytest.mark.parametrize("kind", ["one row", "tall"])
def test_vectors_of_a_used_up_lanczos_space_repeat(kind):
    signature = inspect.signature(scipy.sparse.linalg.eigsh)
    if "rng" not in signature.parameters:
        pytest.skip("scipy before 1.17 draws them itself")
    problem = cd.SparseCompletion(_few_values()[kind].to_sparse_coo())
    first, second = (cd.compress_spectral(problem, 5) for _ in range(2))
    assert all(torch.equal(mine, other) for mine, other in zip(first, second, strict=True))


@pytest.mark.parametrize("shape", [(60, 50), (50, 60)])
def test_the_seeded_lanczos_is_svds_to_the_last_bit(shape):
    matrix = scipy.sparse.random_array(shape, density=0.2, rng=np.random.default_rng(1), format="csr")
    start = np.random.default_rng(7).standard_normal(50)
    expected = scipy.sparse.linalg.svds(matrix, k=4, v0=start)
    for mine, other in zip(_lanczos(matrix, 4, 7), expected, strict=True):
        assert np.array_equal(mine, other)


def test_the_engines_share_the_contract():
    _, sparse, g = _pair()
    factors = cd.orthogonal_factors((23, 31), 3, 6, 0.4, g)
    from compressible.descent.engines.sparse_numba import SparseNumba

    for engine in (Reference, SparseNumba):
        run = engine(sparse, factors, [1.0, 1.0, 1.0], 0.0)
        run.advance(3)
        assert run.evaluate().shape == (2,) and [f.shape for f in run.factors] == [f.shape for f in factors]
    torch.testing.assert_close(factors[0], cd.orthogonal_factors((23, 31), 3, 6, 0.4, _pair()[2])[0])
