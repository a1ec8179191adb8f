"""The Triton kernels against the reference: on a CUDA device where there is one, in Triton's interpreter elsewhere."""

import pytest
import torch
from conftest import few

import compressible as cd
from compressible.descent.engines.base import Engine
from compressible.descent.engines.cuda_graphs import GraphedFused
from compressible.descent.engines.reference import Reference

pytest.importorskip("triton", reason="triton is not installed: Linux only")
from compressible.descent.engines.triton_dense import TritonPersistent, TritonTiled

pytestmark = pytest.mark.cuda
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
ON_CUDA = pytest.mark.skipif(not CUDA, reason="needs a CUDA device: graphs have no interpreter")
# The interpreter takes seconds a case: there one small shape for all and, for one case, several tiles and a wide K.
SMALL, LARGE = (20, 17, 4), (40, 35, 18)
SHAPES = [SMALL, LARGE, (16, 70, 3), (66, 33, 7), (100, 100, 10), (130, 250, 31)] if CUDA else [SMALL, LARGE]
CASES = [
    (2, (3,), torch.float64, 0.02, "completion"),
    (3, (), torch.float64, 0.0, "factorization"),
    (3, (2,), torch.float32, 0.0, "completion"),
    (4, (), torch.float64, 0.02, "completion"),
    (5, (2,), torch.float64, 0.02, "completion"),
]
PAIRS = [(shape, *case) for shape in SHAPES for case in CASES if CUDA or shape == SMALL or case[0] == 4]
# First one shape for each case, the largest among them: on a GPU the others are left to the slow tests.
PAIRS.sort(key=lambda pair: SHAPES.index(pair[0]) != (CASES.index(pair[1:]) + 1) % len(SHAPES))


class Tiles(TritonTiled):
    """`TritonTiled` launched step by step, as the interpreter needs it."""

    def prepare(self, steps):
        self._step(self.owed[0].clone(), self.owed[1].clone())

    def advance(self, steps):
        self._take(steps)

    def _record(self):
        return type("Launch", (), {"replay": lambda _: self._take_record()})()


def _case(shape, depth, batch, dtype, seed, kind="completion"):
    (m, n, k), g = shape, torch.Generator().manual_seed(seed)
    target = cd.low_rank_target((m, n), 2, batch, g, dtype, DEVICE)
    if kind == "completion":
        mask = cd.random_mask((m, n), 0.6, batch, g, dtype, DEVICE)
        mask[..., 1, :] = 0  # an empty row
        problem = cd.MatrixCompletion(target, mask)
    else:
        problem = cd.MatrixFactorization(target)
    factors = cd.orthogonal_factors((m, n), depth, k, 0.4, g, dtype, DEVICE, batch)
    return problem, factors, g


def _drawn(seed):
    """A problem of random shape, depth, stack, kind and type, its factors, rates and decay: small where interpreted."""
    g = torch.Generator().manual_seed(seed)
    largest, widest, stacks = (200, 32, 40) if CUDA else (24, 6, 3)

    def pick(low, high):
        return int(torch.randint(low, high + 1, (), generator=g))

    m, n, depth, size = pick(2, largest), pick(2, largest), pick(2, 5), pick(0, stacks)
    batch, dtype = (size,) if size else (), (torch.float64, torch.float64, torch.float32)[pick(0, 2)]
    shape, kind = (m, n, pick(1, min(m, n, widest))), ("completion", "completion", "factorization")[pick(0, 2)]
    problem, factors, g = _case(shape, depth, batch, dtype, seed, kind)
    return problem, factors, _rates(depth, batch, g, dtype), 0.02 * pick(0, 1)


def _rates(depth, batch, g, dtype):
    if not batch:
        return [0.9, *[0.3] * (depth - 2), 0.9]
    inner = torch.rand(*batch, 1, 1, generator=g, dtype=torch.float64).to(DEVICE, dtype) + 0.2
    return [3 * inner, *[inner] * (depth - 2), 3 * inner]


@pytest.mark.parametrize("engine", [TritonPersistent, TritonTiled if CUDA else Tiles])
@pytest.mark.parametrize(("shape", "depth", "batch", "dtype", "decay", "kind"), few(PAIRS, len(CASES)))
def test_kernels_take_the_reference_steps(engine, shape, depth, batch, dtype, decay, kind):
    problem, factors, g = _case(shape, depth, batch, dtype, seed=depth + shape[0], kind=kind)
    rates = _rates(depth, batch, g, dtype)
    _compare(engine, problem, factors, rates, decay)


@pytest.mark.parametrize("seed", few(range(12 if CUDA else 4), 3))
@pytest.mark.parametrize("engine", [
    TritonPersistent, TritonTiled if CUDA else Tiles, pytest.param(GraphedFused, marks=ON_CUDA),
])  # fmt: skip
def test_random_problems_take_the_reference_steps(engine, seed):
    _compare(engine, *_drawn(seed))


def _compare(engine, problem, factors, rates, decay):
    dtype = problem.dtype
    slow, fast = Reference(problem, factors, rates, decay), engine(problem, factors, rates, decay)
    fast.prepare(4)
    tolerance = {"rtol": 1e-10, "atol": 1e-13} if dtype is torch.float64 else {"rtol": 2e-4, "atol": 1e-6}
    for steps in (0, 1, 2) if not CUDA else (0, 1, 50):
        slow.advance(steps)
        fast.advance(steps)
        torch.testing.assert_close(fast.evaluate().to(dtype), slow.evaluate(), **tolerance)
        for mine, other in zip(fast.factors, slow.factors, strict=True):
            torch.testing.assert_close(mine, other, **tolerance)


@pytest.mark.filterwarnings("ignore:.*encountered in matmul")  # the third problem diverges, in numpy where interpreted
@pytest.mark.parametrize("engine", [TritonPersistent, TritonTiled if CUDA else Tiles])
def test_each_problem_stops_at_its_own_record_and_stays_there(engine):
    problem, factors, _ = _case(SMALL, 3, (), torch.float64, 0)
    problem = problem.select(torch.zeros(3, dtype=torch.int64), ())
    factors = [factor.expand(3, *factor.shape) for factor in factors]
    rates = [torch.tensor([2.0, 0.1, 1e6], dtype=torch.float64, device=DEVICE).reshape(3, 1, 1)] * 3
    fast = engine(problem, factors, rates, 0.0)
    fast.prepare(2)
    slow = Reference(problem, factors, rates, 0.0)
    expected = [slow.evaluate().clone()]
    for _ in range(5):
        slow.advance(2)
        expected.append(slow.evaluate().clone())
    level = expected[2][0, 0].item() * 1.0001
    values, taken = fast.run([0, 2, 2, 2, 2, 2], level)
    assert taken[0] == 3 and taken[1] == 6 and taken[2] < 6
    assert not torch.isfinite(values[taken[2] - 1, 2, 0])
    torch.testing.assert_close(values[:3, 0], torch.stack(expected)[:3, 0].cpu())
    again, more = fast.run([2], 0.0)
    assert more.tolist() == [0, 1, 0]
    slow.advance(2)
    torch.testing.assert_close(again[0, 1], slow.evaluate()[1].cpu())


@pytest.mark.filterwarnings("ignore:.*encountered in matmul")
@pytest.mark.parametrize("name", ["persistent", *(pytest.param(name, marks=ON_CUDA) for name in ("tiled", "graphed"))])
def test_descend_is_the_same_with_stops_snapshots_and_divergence(name):
    problem, factors, _ = _case(SMALL, 3, (4,), torch.float64, 1)
    step = torch.tensor([1.0, 3.0, 1e9, 2.0], dtype=torch.float64)
    runs = []
    for engine in ("reference", name):
        with pytest.raises(cd.DivergenceError) as caught:
            cd.descend(problem, factors, step, 23, tolerance=0.03, record_every=5, snapshots=(7, 20), engine=engine)
        runs.append(caught.value.history)
    slow, fast = runs
    assert fast.engine == name and torch.equal(slow.stopped, fast.stopped)
    torch.testing.assert_close(fast.loss[[0, 1, 3]], slow.loss[[0, 1, 3]], equal_nan=True)
    torch.testing.assert_close(fast.error[[0, 1, 3]], slow.error[[0, 1, 3]], equal_nan=True)
    for iteration, snapshot in slow.snapshots.items():
        for mine, other in zip(fast.snapshots[iteration], snapshot, strict=True):
            torch.testing.assert_close(mine[[0, 1, 3]], other[[0, 1, 3]], equal_nan=True)
    for mine, other in zip(fast.factors, slow.factors, strict=True):
        torch.testing.assert_close(mine[[0, 1, 3]], other[[0, 1, 3]])


def test_what_the_kernels_cannot_do_is_refused():
    problem, factors, _ = _case(SMALL, 6, (), torch.float64, 0)
    with pytest.raises(ValueError, match=r"6 factors of width 4.*depth at most"):
        cd.descend(problem, factors, 1.0, 1, engine="persistent")
    own = type("Own", (type(problem),), {"gradient": lambda self, product, out=None: product})
    odd = own(problem.target, problem.mask) if hasattr(problem, "mask") else own(problem.target)
    with pytest.raises(ValueError, match=r"got Own .*expected MatrixCompletion or MatrixFactorization itself"):
        cd.descend(odd, [factors[0], factors[-1]], 1.0, 1, engine="persistent")
    if not CUDA:
        with pytest.raises(ValueError, match="expected a CUDA device"):
            cd.descend(problem, [factors[0], factors[-1]], 1.0, 1, engine="tiled")


def test_the_contract_is_the_one_of_all_engines():
    assert issubclass(TritonPersistent, Engine) and TritonPersistent.freezes and TritonTiled.ahead > 1
