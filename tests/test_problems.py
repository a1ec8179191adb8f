"""Losses, gradients, surrogates and errors of the three problems."""

import math

import pytest
import torch

import compressible as cd


def _problems(batch=(), dtype=torch.float64):
    g = torch.Generator().manual_seed(3)
    target = cd.low_rank_target((7, 5), 2, batch, g, dtype)
    mask = cd.random_mask((7, 5), 0.4, batch, g, dtype)
    operators = torch.randn(30, 7, 5, generator=g, dtype=torch.float64).to(dtype) / 30
    measurements = torch.einsum("kmn,...mn->...k", operators, target)
    return {
        "observed": cd.MatrixCompletion(target, mask),
        "all": cd.MatrixCompletion(target, mask, mean_over="all"),
        "factorization": cd.MatrixFactorization(target),
        "sensing": cd.MatrixSensing(operators, measurements, target),
    }


@pytest.mark.parametrize("kind", ["observed", "all", "factorization", "sensing"])
@pytest.mark.parametrize("batch", [(), (4,), (2, 3)])
def test_gradient_is_that_of_the_loss(kind, batch):
    problem = _problems(batch)[kind]
    product = torch.randn(*batch, 7, 5, dtype=torch.float64, requires_grad=True)
    problem.loss(product).sum().backward()
    torch.testing.assert_close(problem.gradient(product.detach()), product.grad, rtol=1e-12, atol=1e-14)
    out = torch.full_like(product, math.nan, requires_grad=False)
    problem.gradient(product.detach(), out=out)
    torch.testing.assert_close(out, product.grad, rtol=1e-12, atol=1e-14)


def test_completion_normalisations_by_hand():
    target, mask = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[1, 0], [0, 0]])
    zero = torch.zeros(2, 2)
    loss, error = cd.MatrixCompletion(target, mask).evaluate(zero)
    assert (loss.item(), error.item()) == pytest.approx((1 / 2, (4 + 9 + 16) / 3 / 2))
    loss, error = cd.MatrixCompletion(target, mask, mean_over="all").evaluate(zero)
    assert (loss.item(), error.item()) == pytest.approx((1 / 8, (4 + 9 + 16) / 8))


@pytest.mark.parametrize("batch", [(), (3,)])
def test_large_float32_residuals_are_summed_to_float32s_own_precision(batch):
    """A constant residual, the worst case of a sum that rounds as it grows: loss and error are half its square."""
    target = torch.randn(*batch, 1200, 1000, generator=torch.Generator().manual_seed(0))
    mask = cd.random_mask((1200, 1000), 0.3, generator=torch.Generator().manual_seed(1), dtype=torch.float32)
    problem, product = cd.MatrixCompletion(target, mask), target + 0.7
    residual = (product - target).double().square()
    exact = torch.stack([(part * residual).sum((-2, -1)) / part.sum() / 2 for part in (mask, 1 - mask)], -1)
    look = problem.watch(product, torch.empty_like(product))
    for found in (torch.stack(problem.evaluate(product), -1), look()):
        torch.testing.assert_close(found.double(), exact, rtol=3e-7, atol=0)
    assert problem.loss(product).dtype is torch.float32


def test_fully_observed_completion_equals_factorization():
    target = cd.low_rank_target((6, 6), 2, generator=torch.Generator().manual_seed(0))
    product = torch.randn(6, 6, dtype=torch.float64)
    for mean_over in ("observed", "all"):
        whole = cd.MatrixCompletion(target, torch.ones(6, 6), mean_over=mean_over)
        torch.testing.assert_close(
            torch.stack(whole.evaluate(product)), torch.stack(cd.MatrixFactorization(target).evaluate(product))
        )


def test_surrogates():
    problems = _problems()
    completion = problems["observed"]
    expected = completion.mask * completion.target / completion.mask.mean()
    torch.testing.assert_close(completion.surrogate(), expected)
    sensing = problems["sensing"]
    by_hand = sum(y * a for y, a in zip(sensing.measurements, sensing.operators, strict=True)) / 30
    torch.testing.assert_close(sensing.surrogate(), by_hand)


def test_sensing_error_is_relative_and_nan_without_target():
    sensing = _problems()["sensing"]
    assert sensing.error(sensing.target * 1.5).item() == pytest.approx(0.5)
    blind = cd.MatrixSensing(sensing.operators, sensing.measurements)
    assert math.isnan(blind.error(sensing.target).item()) and blind.loss(sensing.target).item() < 1e-25


def test_sensing_holds_the_operator_once():
    operators = torch.randn(9, 4, 4, dtype=torch.float64)
    sensing = cd.MatrixSensing(operators, torch.zeros(9, dtype=torch.float64))
    held = {part.untyped_storage().data_ptr() for part in vars(sensing).values() if isinstance(part, torch.Tensor)}
    assert held == {operators.untyped_storage().data_ptr(), sensing.measurements.untyped_storage().data_ptr()}


@pytest.mark.parametrize("kind", ["observed", "factorization", "sensing"])
@pytest.mark.parametrize("shape", [(5,), (1, 5), (7, 1), (5, 7), (2, 7, 5)])
def test_a_product_of_another_shape_is_refused(kind, shape):
    problem, product = _problems((3,))[kind], torch.zeros(shape, dtype=torch.float64)
    for look in (problem.loss, problem.error):
        with pytest.raises(ValueError, match=r"shape of product is|batch shape of product is"):
            look(product)
    assert problem.loss(torch.zeros(4, 1, 7, 5, dtype=torch.float64)).shape == (4, 3)


@pytest.mark.parametrize("kind", ["observed", "factorization", "sensing"])
def test_a_surrogate_is_the_callers_to_write_into(kind):
    problem, point = _problems()[kind], torch.ones(7, 5, dtype=torch.float64)
    before = problem.loss(point)
    problem.surrogate().zero_()
    assert problem.loss(point) == before and bool(problem.surrogate().any())


def test_targets_alone_may_make_a_stack_of_sensing_problems():
    sensing, start = _problems()["sensing"], cd.orthogonal_factors((7, 5), 3, scale=0.3)
    targets = torch.stack([sensing.target, 2 * sensing.target])
    stack = cd.MatrixSensing(sensing.operators, sensing.measurements, targets)
    assert stack.batch_shape == (2,)
    history = cd.descend(stack, start, 0.1, 10)
    for index, target in enumerate(targets):
        alone = cd.descend(cd.MatrixSensing(sensing.operators, sensing.measurements, target), start, 0.1, 10)
        torch.testing.assert_close(history.error[index], alone.error, rtol=1e-10, atol=0)


def test_a_sensing_problem_without_a_target_takes_none_from_its_neighbours():
    """Measurements (2, k) of one target each, so that the stack's leading dimension is not the target's."""
    sensing = _problems((2,))["sensing"]
    shared = cd.MatrixSensing(sensing.operators, sensing.measurements, sensing.target[0])
    stack = cd.stack_problems([shared, cd.MatrixSensing(sensing.operators, sensing.measurements), sensing])
    errors = stack.error(torch.zeros(3, 2, 7, 5, dtype=torch.float64))
    assert torch.isnan(errors[1]).all()
    torch.testing.assert_close(errors[[0, 2]], torch.ones(2, 2, dtype=torch.float64))
    part = stack.select(torch.tensor([1, 4]), stack.batch_shape)
    assert torch.equal(part.measurements, sensing.measurements[[1, 0]])
    assert torch.equal(part.target, torch.stack([sensing.target[0], sensing.target[0]]))


@pytest.mark.parametrize("kind", ["observed", "factorization", "sensing"])
def test_select_equals_the_problem_alone(kind):
    stack = _problems((2, 3))[kind]
    product = torch.randn(2, 3, 7, 5, dtype=torch.float64)
    part = stack.select(torch.tensor([4, 1]), (2, 3))
    chosen = product.reshape(6, 7, 5)[[4, 1]]
    expected = stack.loss(product).reshape(6)[[4, 1]]
    torch.testing.assert_close(part.loss(chosen), expected)
    torch.testing.assert_close(part.gradient(chosen), stack.gradient(product).reshape(6, 7, 5)[[4, 1]])


def test_masks_have_exactly_floor_p_entries():
    mask = cd.random_mask((100, 100), 0.3, (5,), torch.Generator().manual_seed(1))
    assert mask.sum((-2, -1)).tolist() == [3000.0] * 5
    assert cd.random_mask((3, 3), 0.5).sum() == 4


def test_targets_have_the_rank_and_scale():
    target = cd.low_rank_target((100, 100), 5, generator=torch.Generator().manual_seed(1))
    values = torch.linalg.svdvals(target)
    assert values[5] < 1e-12 and 15 < values[4] < values[0] < 21


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: cd.MatrixCompletion(torch.ones(3, 3), torch.full((3, 3), 0.5)), "0.5"),
        (lambda: cd.MatrixCompletion(torch.ones(3, 3), torch.zeros(3, 3)), "no entry"),
        (lambda: cd.MatrixCompletion(torch.ones(3, 3), torch.ones(2, 3)), r"\(2, 3\)"),
        (lambda: cd.MatrixCompletion(torch.ones(3, 3), torch.ones(3, 3), mean_over="some"), "some"),
        (lambda: cd.MatrixCompletion(torch.full((3, 3), math.nan), torch.ones(3, 3)), "not finite"),
        (lambda: cd.MatrixFactorization(torch.ones(3)), r"\(3,\)"),
        (lambda: cd.MatrixFactorization(torch.ones(3, 3, dtype=torch.int64)), "int64"),
        (lambda: cd.MatrixSensing(torch.ones(4, 3, 3), torch.ones(5)), r"\(5,\)"),
        (lambda: cd.low_rank_target((3, 3), 4), "rank is 4"),
        (lambda: cd.random_mask((3, 3), 1.5), "1.5"),
        (lambda: cd.random_mask((3, 3), math.nan), "nan"),
    ],
)
def test_bad_input_names_the_value(build, words):
    with pytest.raises(ValueError, match=words):
        build()


def test_error_counts_only_entries_whose_target_is_known():
    target = torch.tensor([[1.0, math.nan], [2.0, 3.0]], dtype=torch.float64)
    zero = torch.zeros(2, 2, dtype=torch.float64)
    loss, error = cd.MatrixCompletion(target, torch.tensor([[1, 0], [1, 0]])).evaluate(zero)
    assert (loss.item(), error.item()) == pytest.approx((5 / 4, 9 / 2))
    problem = cd.MatrixCompletion(target, torch.tensor([[1, 0], [1, 1]]))
    assert math.isnan(problem.error(zero)) and torch.isfinite(problem.gradient(zero)).all()
