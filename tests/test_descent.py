"""`descend`: every engine takes the reference's steps, and the history says what happened."""

import math

import pytest
import torch

import compressible as cd
from compressible.descent.engines.choose import NAMES, choose
from compressible.descent.engines.reference import Reference


def _problem(kind="completion", shape=(9, 7), batch=(), dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    target = cd.low_rank_target(shape, 2, batch, g, dtype)
    if kind == "factorization":
        return cd.MatrixFactorization(target), g
    if kind == "sensing":
        operators = (torch.randn(40, *shape, generator=g, dtype=torch.float64) / 40).to(dtype)
        return cd.MatrixSensing(operators, torch.einsum("kmn,...mn->...k", operators, target), target), g
    mask = cd.random_mask(shape, 0.6, batch, g, dtype)
    mask[..., 0, :] = 0  # an empty row
    return cd.MatrixCompletion(target, mask, mean_over=kind if kind == "all" else "observed"), g


def _runs_here(name):
    try:
        return choose(name, _problem()[0], cd.orthogonal_factors((9, 7), 3)).name == name
    except (ValueError, ImportError):  # a host that lacks numba, say
        return False


# Triton's interpreter takes "persistent" on a CPU: test_kernels.py does that.
FAST = [name for name in NAMES if name not in ("auto", "reference", "persistent") and _runs_here(name)]


def test_engines_that_need_no_gpu_are_tested():
    pytest.importorskip("numba")  # a GPU host may have PyTorch, Triton and pytest alone
    assert {"fused", "compiled"} <= set(FAST)


def _compare(history, expected, dtype):
    tolerance = 1e-10 if dtype == torch.float64 else 2e-3
    torch.testing.assert_close(history.loss, expected.loss, rtol=tolerance, atol=tolerance * 1e-6)
    torch.testing.assert_close(history.error, expected.error, rtol=tolerance, atol=tolerance * 1e-6, equal_nan=True)
    for mine, theirs in zip(history.factors, expected.factors, strict=True):
        assert mine.dtype == dtype
        torch.testing.assert_close(mine, theirs, rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("batch", [(), (3,), (2, 2)])
@pytest.mark.parametrize("depth", [2, 3, 4, 5])
@pytest.mark.parametrize("engine", FAST)
def test_engines_take_the_steps_of_the_reference(engine, depth, batch, dtype):
    for number, (kind, shape) in enumerate([("completion", (9, 7)), ("all", (6, 11)), ("factorization", (8, 8))]):
        problem, g = _problem(kind, shape, batch, dtype, seed=number)
        factors = cd.orthogonal_factors(shape, depth, width=5, scale=0.8, generator=g, dtype=dtype, batch_shape=batch)
        options = {"step_size": 0.5, "steps": 130, "outer_ratio": 1.7, "weight_decay": 0.01, "record_every": 40}
        expected = cd.descend(problem, factors, engine="reference", **options)
        assert (expected.loss[..., -1] < 0.9 * expected.loss[..., 0]).all()
        _compare(cd.descend(problem, factors, engine=engine, **options), expected, dtype)


@pytest.mark.parametrize("batch", [(), (3,)])
def test_sensing(batch):
    problem, g = _problem("sensing", batch=batch)
    factors = cd.orthogonal_factors((9, 7), 3, scale=0.3, generator=g, batch_shape=batch)
    expected = cd.descend(problem, factors, 2.0, 100, engine="reference")
    _compare(cd.descend(problem, factors, 2.0, 100), expected, torch.float64)
    assert expected.error[..., -1].max() < 0.9 * expected.error[..., 0].min()


@pytest.mark.parametrize("depth", [2, 3, 5])
def test_closed_form_gradients_equal_autograd(depth):
    problem, g = _problem()
    factors = [f.requires_grad_() for f in cd.orthogonal_factors((9, 7), depth, scale=0.5, generator=g)]
    problem.loss(cd.product(factors)).backward()
    detached = [f.detach() for f in factors]
    for gradient, factor in zip(problem.factor_gradients(detached), factors, strict=True):
        torch.testing.assert_close(gradient, factor.grad, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("engine", ["reference", *FAST])
def test_a_stack_equals_its_problems_alone(engine):
    """Own targets, starts, step sizes and ratios; some stop at the tolerance long before others."""
    batch = (2, 3)
    problem, g = _problem("factorization", (8, 8), batch)
    factors = cd.orthogonal_factors((8, 8), 3, scale=0.8, generator=g, batch_shape=batch)
    steps = torch.tensor([[1.0, 1.5, 2.0], [0.8, 1.2, 1.8]])
    ratios = torch.tensor([1.0, 0.5, 2.0])
    options = {"steps": 4000, "record_every": 30, "tolerance": 1e-3}
    stack = cd.descend(problem, factors, steps, outer_ratio=ratios, engine=engine, **options)
    assert len(set(stack.stopped.flatten().tolist())) > 2
    for i in range(2):
        for j in range(3):
            alone = cd.descend(
                cd.MatrixFactorization(problem.target[i, j]),
                [f[i, j] for f in factors],
                float(steps[i, j]),
                outer_ratio=float(ratios[j]),
                engine=engine,
                **options,
            )
            length = len(alone.iterations)
            assert stack.stopped[i, j] == alone.stopped == alone.iterations[-1]
            torch.testing.assert_close(stack.loss[i, j, :length], alone.loss, rtol=1e-11, atol=0)
            assert torch.isnan(stack.loss[i, j, length:]).all()
            for mine, theirs in zip(stack.factors, alone.factors, strict=True):
                torch.testing.assert_close(mine[i, j], theirs, rtol=0, atol=1e-12)


def test_shared_target_and_separate_starts_broadcast():
    problem, g = _problem()
    factors = cd.orthogonal_factors((9, 7), 3, scale=0.4, generator=g, batch_shape=(4,))
    stack = cd.descend(problem, factors, 1.0, 60)
    alone = cd.descend(problem, [f[2] for f in factors], 1.0, 60)
    assert stack.engine == "compiled" and alone.engine == "fused"
    torch.testing.assert_close(stack.loss[2], alone.loss, rtol=1e-11, atol=0)


@pytest.mark.parametrize(("step", "ratio"), [
    (torch.tensor([16, 20], dtype=torch.uint8), torch.tensor([17, 14], dtype=torch.uint8)),
    (torch.tensor([1, 2]), 0.1), (torch.tensor(2, dtype=torch.int8), torch.tensor([100, 90], dtype=torch.int8)),
])  # fmt: skip
def test_integers_are_step_sizes_like_any_number(step, ratio):
    problem, g = _problem("factorization", (8, 8))
    factors = cd.orthogonal_factors((8, 8), 3, scale=0.1, generator=g)
    as_floats = [part.double() if isinstance(part, torch.Tensor) else part for part in (step, ratio)]
    runs = []
    for one, other in ((step, ratio), as_floats):
        runs.append(cd.descend(problem, factors, one, 2, outer_ratio=other, engine="reference"))
    assert torch.equal(runs[0].loss, runs[1].loss) and torch.equal(runs[0].factors[0], runs[1].factors[0])


def test_records_snapshots_and_inputs():
    problem, g = _problem()
    factors = cd.orthogonal_factors((9, 7), 3, scale=0.4, generator=g)
    before = [f.clone() for f in factors]
    history = cd.descend(problem, factors, 1.0, 130, record_every=50, snapshots=(0, 7, 130))
    assert history.iterations.tolist() == [0, 50, 100, 130]
    assert history.loss.shape == history.error.shape == history.seconds.shape == (4,)
    assert (history.seconds.diff() >= 0).all() and history.stopped == 130
    assert sorted(history.snapshots) == [0, 7, 130]
    for original, factor, first, last in zip(
        before, factors, history.snapshots[0], history.snapshots[130], strict=True
    ):
        assert torch.equal(original, factor) and torch.equal(original, first)
        assert last.data_ptr() != factor.data_ptr()
    seventh = cd.descend(problem, factors, 1.0, 7)
    torch.testing.assert_close(history.snapshots[7], seventh.factors, rtol=0, atol=1e-13)
    torch.testing.assert_close(history.loss[-1], problem.loss(cd.product(history.factors)))


def test_snapshots_do_not_change_the_path():
    problem, g = _problem()
    factors = cd.orthogonal_factors((9, 7), 3, scale=0.4, generator=g)
    plain = cd.descend(problem, factors, 1.0, 200)
    busy = cd.descend(problem, factors, 1.0, 200, snapshots=range(0, 201, 3))
    torch.testing.assert_close(plain.loss, busy.loss, rtol=1e-11, atol=0)


def test_tolerance_stops_at_the_first_record_below():
    problem, g = _problem("factorization", (8, 8))
    factors = cd.orthogonal_factors((8, 8), 3, scale=0.8, generator=g)
    history = cd.descend(problem, factors, 2.0, 5000, record_every=10, tolerance=1e-5)
    assert history.loss[-1] < 1e-5 <= history.loss[-2] and history.stopped < 5000
    assert history.iterations_to(1e-5, "loss") == history.stopped
    assert history.iterations_to(1e-30) == -1


@pytest.mark.parametrize("engine", ["reference", *FAST])
def test_factors_that_require_gradients_are_taken_as_values(engine):
    problem, g = _problem()
    factors = [f.requires_grad_() for f in cd.orthogonal_factors((9, 7), 3, scale=0.4, generator=g)]
    history = cd.descend(problem, factors, 1.0, 5, engine=engine)
    assert not any(factor.requires_grad for factor in history.factors)


@pytest.mark.parametrize("batch", [(), (3,)])
def test_results_can_take_part_in_gradients(batch):
    problem, g = _problem("factorization", (8, 8), batch)
    factors = cd.orthogonal_factors((8, 8), 3, scale=0.8, generator=g, batch_shape=batch)
    history = cd.descend(problem, factors, 1.0, 60, snapshots=(30,), tolerance=0.3)
    for kept in (history.factors, history.snapshots[30], [history.loss, history.error]):
        leaf = kept[0].requires_grad_()
        (leaf * leaf).nansum().backward()
        assert leaf.grad is not None


def test_zero_steps_record_the_start():
    problem, g = _problem()
    factors = cd.orthogonal_factors((9, 7), 3, generator=g)
    history = cd.descend(problem, factors, 1.0, 0)
    assert history.iterations.tolist() == [0]
    torch.testing.assert_close(history.factors, factors, rtol=0, atol=0)


def test_frozen_outer_factors_stand_still():
    problem, _ = _problem()
    small = cd.compress_spectral(problem, 3, depth=4, scale=0.5)
    history = cd.descend(problem, small, 1.0, 50, outer_ratio=0.0)
    assert torch.equal(history.factors[0], small[0]) and torch.equal(history.factors[-1], small[-1])
    assert not torch.equal(history.factors[1], small[1])


@pytest.mark.parametrize("engine", ["reference", *FAST])
def test_divergence_says_where_and_keeps_the_history(engine):
    problem, g = _problem("factorization", (8, 8))
    factors = cd.orthogonal_factors((8, 8), 3, scale=0.5, generator=g)
    with pytest.raises(cd.DivergenceError, match="step size 1000") as caught:
        cd.descend(problem, factors, 1000.0, 1000, record_every=1, engine=engine)
    error = caught.value
    assert error.iteration == error.history.iterations[-1] and error.step_size == 1000
    assert not math.isfinite(error.history.loss[-1]) and torch.isfinite(error.history.loss[:-1]).all()
    assert error.last_loss == error.history.loss[-2]


@pytest.mark.parametrize("engine", ["reference", *FAST])
def test_divergence_in_a_stack_leaves_the_neighbours_alone(engine):
    problem, g = _problem("factorization", (8, 8))
    factors = cd.orthogonal_factors((8, 8), 3, scale=0.5, generator=g)
    alone = cd.descend(problem, factors, 1.0, 200, engine=engine)
    with pytest.raises(cd.DivergenceError, match="problem 1 in the stack of 3") as caught:
        cd.descend(problem, factors, torch.tensor([1.0, 1000.0, 1.0]), 200, engine=engine)
    history = caught.value.history
    assert caught.value.step_size == 1000 and history.stopped.tolist()[::2] == [200, 200]
    torch.testing.assert_close(history.loss[0], alone.loss, rtol=1e-11, atol=0)
    torch.testing.assert_close(history.loss[2], alone.loss, rtol=1e-11, atol=0)


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"step_size": 0.0}, "step_size is 0.0"),
        ({"step_size": math.nan}, "step_size is nan"),
        ({"step_size": "1"}, "step_size is '1', expected finite > 0"),
        ({"step_size": None}, "step_size is None"),
        ({"outer_ratio": 10**400}, "outer_ratio is 1000.*, expected finite >= 0"),
        ({"steps": -1}, "steps is -1"),
        ({"steps": 1.5}, "steps is 1.5"),
        ({"record_every": 0}, "record_every is 0"),
        ({"outer_ratio": -1.0}, "outer_ratio is -1.0"),
        ({"weight_decay": math.inf}, "weight_decay is inf"),
        ({"tolerance": -1e-9}, "tolerance is -1e-09"),
        ({"snapshots": [11]}, r"snapshots is \[11\]"),
        ({"engine": "fast"}, "engine is 'fast'"),
        ({"step_size": torch.tensor([1.0, -1.0])}, "step_size is tensor"),
    ],
)
def test_bad_arguments_are_refused_before_work_starts(bad, words):
    problem, g = _problem()
    factors = cd.orthogonal_factors((9, 7), 3, generator=g)
    with pytest.raises(ValueError, match=words):
        cd.descend(problem, factors, **({"step_size": 1.0, "steps": 10} | bad))


def test_factors_that_do_not_fit_are_refused():
    problem, g = _problem()
    factors = cd.orthogonal_factors((9, 7), 3, generator=g)
    with pytest.raises(ValueError, match=r"multiply to \(9, 7\)"):
        cd.descend(problem, factors[::-1], 1.0, 10)
    with pytest.raises(ValueError, match="float32"):
        cd.descend(problem, [f.float() for f in factors], 1.0, 10)
    with pytest.raises(ValueError, match="MatrixSensing"):
        cd.descend(_problem("sensing")[0], factors, 1.0, 10, engine="compiled")


def test_auto_picks_by_problem():
    small, _ = _problem()
    sensing, _ = _problem("sensing")
    large = cd.MatrixFactorization(torch.zeros(600, 600, dtype=torch.float64))
    one = cd.orthogonal_factors((9, 7), 3)
    many, wide = [f[None].repeat(2, 1, 1) for f in one], cd.orthogonal_factors((600, 600), 2, 4, batch_shape=(2,))
    cases = [(small, one), (small, many), (sensing, many), (large, wide)]
    names = [choose("auto", problem, factors).name for problem, factors in cases]
    assert names == ["fused", "compiled", "fused", "fused"]
    assert choose("reference", small, many) is Reference
    with pytest.raises(ValueError, match="expected a CUDA device"):
        choose("tiled", small, one)


class Quartic(cd.MatrixCompletion):
    """A loss of one's own on a package's problem: 1/4 sum(Omega * (X - Phi)^4) / N."""

    def gradient(self, product, out=None):
        return (product - self.target) ** 3 * self.observed_weight  # and it leaves `out` alone

    def evaluate(self, product):
        residual = product - self.target
        return (self.observed_weight * residual**4).sum((-2, -1)) / 4, residual.square().mean((-2, -1))


class Weighted(cd.MatrixFactorization):
    """1/2 mean(v (X - Phi)^2), v = 3 in the first column."""

    def _weight(self):
        return torch.tensor([3.0, 1, 1, 1, 1, 1, 1], dtype=self.dtype) / 63

    def gradient(self, product, out=None):
        return torch.mul(product - self.target, self._weight(), out=out)

    def evaluate(self, product):
        loss = ((product - self.target).square() * self._weight()).sum((-2, -1)) / 2
        return loss, loss


class Penalised(cd.MatrixFactorization):
    """Half the squared norm of the first factor besides: no function of the product."""

    def evaluate_factors(self, factors):
        loss, error = super().evaluate_factors(factors)
        return loss + factors[0].square().sum((-2, -1)) / 20, error

    def factor_gradients(self, factors):
        first, *others = super().factor_gradients(factors)
        return [first + factors[0] / 10, *others]


@pytest.mark.parametrize(("kind", "engine"), [(Quartic, "fused"), (Weighted, "fused"), (Penalised, "reference")])
@pytest.mark.parametrize("batch", [(), (3,)])
def test_a_loss_of_ones_own_is_never_taken_for_its_parents(kind, engine, batch):
    """Gradients by autograd from the class's own loss, on stacks, too, of which some stop early."""
    base, g = _problem("completion", batch=batch)
    problem = kind(base.target, base.mask) if kind is Quartic else kind(base.target)
    factors = cd.orthogonal_factors((9, 7), 3, scale=0.8, generator=g, batch_shape=batch)
    history = cd.descend(problem, factors, 0.2, 40, record_every=10)
    assert history.engine == engine
    leaves = [factor.clone().requires_grad_() for factor in factors]
    losses = []
    for step in range(41):
        loss = problem.evaluate_factors(leaves)[0]
        losses += [loss.detach()] if step % 10 == 0 else []
        slopes = torch.autograd.grad(loss.sum(), leaves)
        leaves = [(leaf - 0.2 * slope).detach().requires_grad_() for leaf, slope in zip(leaves, slopes, strict=True)]
    torch.testing.assert_close(history.loss, torch.stack(losses, -1), rtol=1e-10, atol=0)
    if batch:
        level = float(history.loss[:, -1].median()) * 1.000001
        stopped = cd.descend(problem, factors, 0.2, 40, record_every=1, tolerance=level)
        assert stopped.stopped.min() < 40
        torch.testing.assert_close(stopped.loss[:, [0, 10]], history.loss[:, [0, 1]], rtol=1e-10, atol=0)
        alone = [problem.select(torch.tensor([index]), batch) for index in range(3)]
        assert all(type(part) is kind for part in alone) and type(cd.stack_problems(alone)) is kind
    for name in {"fused", "compiled"} - {engine} if engine == "reference" else {"compiled"}:
        if name in FAST:
            with pytest.raises(ValueError, match=f"got {kind.__name__}"):
                cd.descend(problem, factors, 0.2, 40, engine=name)


def test_an_own_sparse_loss_goes_to_the_reference():
    class Halved(cd.SparseCompletion):
        def evaluate_factors(self, factors):
            return tuple(value / 2 for value in super().evaluate_factors(factors))

        def factor_gradients(self, factors):
            return [gradient / 2 for gradient in super().factor_gradients(factors)]

    seen, unseen = cd.sparse_low_rank((20, 15), 2, 100, torch.Generator().manual_seed(0))
    factors = cd.compress_spectral(cd.SparseCompletion(seen), 3, scale=0.5)
    half = cd.descend(Halved(seen, unseen), factors, 1.0, 20)
    whole = cd.descend(cd.SparseCompletion(seen, unseen), factors, 0.5, 20)
    assert half.engine == "reference"
    torch.testing.assert_close(2 * half.loss, whole.loss, rtol=1e-10, atol=0)


def test_a_problem_that_derives_from_none_goes_to_the_reference():
    inner, g = _problem("factorization")

    class Own:
        shape, batch_shape, dtype, device = inner.shape, (), inner.dtype, inner.device
        evaluate_factors, factor_gradients = inner.evaluate_factors, inner.factor_gradients

    factors = cd.orthogonal_factors((9, 7), 3, scale=0.5, generator=g)
    found, expected = (cd.descend(problem, factors, 1.0, 20, engine="auto") for problem in (Own(), inner))
    assert found.engine == "reference"
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-12, atol=0)
    with pytest.raises(ValueError, match="engine is 'fused', expected"):
        cd.descend(Own(), factors, 1.0, 20, engine="fused")


def test_a_loss_that_no_record_would_show_is_refused():
    class Doubled(cd.MatrixFactorization):
        def loss(self, product):
            return 2 * super().loss(product)

    with pytest.raises(ValueError, match="Doubled has a method loss but MatrixFactorization's evaluate"):
        cd.descend(Doubled(torch.eye(9, 7).double()), cd.orthogonal_factors((9, 7), 3), 1.0, 5)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("batch", [(), (3,)])
def test_cuda_agrees_with_the_cpu(batch, dtype):
    problem, g = _problem("completion", (30, 20), batch, dtype)
    factors = cd.orthogonal_factors((30, 20), 3, scale=0.4, generator=g, dtype=dtype, batch_shape=batch)
    expected = cd.descend(problem, factors, 1.0, 200, outer_ratio=1.5, engine="reference")
    there = cd.MatrixCompletion(problem.target.cuda(), problem.mask.cuda())
    history = cd.descend(there, [f.cuda() for f in factors], 1.0, 200, outer_ratio=1.5)
    history.factors = [f.cpu() for f in history.factors]
    _compare(history, expected, dtype)
    wide = cd.orthogonal_factors((30, 20), scale=0.1, dtype=dtype, device="cuda", batch_shape=batch)
    for start in (cd.compress_from_gradient(there, wide, 2), cd.compress_spectral(there, 4)):
        assert all(f.is_cuda and f.dtype == dtype for f in start)
