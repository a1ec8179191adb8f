"""P3's Example 4.1: the mean loss under dropout against drawn masks, its least penalty, and what descent finds."""

import math

import numpy as np
import pytest
import torch

import compressible as cd
from compressible.experiments import dropout_theory as experiment
from compressible.experiments.regularised_factorization import draw_targets, gaussian_factors
from compressible.recovery.dropout import DropoutFactorization
from compressible.recovery.theory import dropout, shrinkage

SHAPE, RANK, WIDTH = (7, 5), 3, 6


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def target(seeds=2):
    return draw_targets(SHAPE, torch.arange(RANK, 0, -1, dtype=torch.float64).expand(seeds, -1), generator())


def factors(width=WIDTH, scale=0.5, seed=1):
    return [factor[0] for factor in gaussian_factors(SHAPE, width, scale, 1, generator(seed))]


def data(columns=8):
    outputs = torch.randn(SHAPE[0], columns, generator=generator(2), dtype=torch.float64)
    return outputs, torch.randn(SHAPE[1], columns, generator=generator(3), dtype=torch.float64)


@pytest.mark.parametrize("keep", [0.25, 0.4, 1.0])
def test_expected_loss_is_the_mean_over_all_masks(keep):
    """All 2^h masks, each with its probability: no sampling."""
    outputs, inputs = data()
    first, second = factors(width=5)
    mean = 0.0
    for number in range(2**5):
        mask = torch.tensor([float(number >> unit & 1) for unit in range(5)], dtype=torch.float64)
        chance = math.prod((keep if kept else 1 - keep) for kept in mask.tolist())
        mean += chance * (outputs - second @ (mask[:, None] * (first @ inputs)) / keep).square().sum().item()
    assert dropout.expected_loss(outputs, [first, second], keep, inputs).item() == pytest.approx(mean, rel=1e-12)


def test_pytorchs_dropout_has_the_expected_loss_at_the_rate_that_drops():
    """Its p drops: "dropout 60 %" is theta = 0.4. Two-sided, 4 standard errors, which resolve 1 %."""
    outputs, inputs = data()
    first, second = factors()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        hidden = (first @ inputs).expand(40_000, -1, -1)
        losses = (outputs - second @ torch.nn.functional.dropout(hidden, p=0.6)).square().sum((-2, -1))
    error = losses.std() / len(losses) ** 0.5
    right, wrong = (dropout.expected_loss(outputs, [first, second], keep, inputs) for keep in (0.4, 0.6))
    assert error < 0.0025 * right
    assert abs(losses.mean() - right) < 4 * error
    assert abs(losses.mean() - wrong) > 20 * error


def test_monte_carlo_agrees_within_its_own_error_and_sees_a_swap():
    found = experiment.monte_carlo(SHAPE, WIDTH, 0.4, 20_000, 4, seed=0)
    assert (found["standard error"] < 0.004).all()
    # 3.3 standard errors: one seed in a thousand would be outside by chance.
    assert (np.abs(found["difference"]) < 3.3 * found["standard error"]).all()
    assert (np.abs(found["swapped"]) > 20 * found["standard error"]).all()


@pytest.mark.parametrize("width", [5, 8, 13])
def test_equalised_factors_attain_the_least_penalty(width):
    matrix = target(1)[0]
    equal = dropout.equalised_factors(matrix, width)
    assert torch.allclose(cd.product(equal), matrix, atol=1e-12)
    assert dropout.penalty(equal).item() == pytest.approx(dropout.least_penalty(matrix, width).item(), rel=1e-12)
    assert experiment.random_penalties(target(), width, 40, generator()).min() > 1.001


def test_equalising_rotation_does_what_hadamards_does():
    """For h = 8 Hadamard's matrix is an equalising rotation of any diagonal; ours is another, with the same penalty."""
    hadamard = torch.ones(1, 1, dtype=torch.float64)
    for _ in range(3):
        hadamard = torch.cat([torch.cat([hadamard, hadamard], 1), torch.cat([hadamard, -hadamard], 1)]) / 2**0.5
    gram = torch.diag(torch.tensor([5.0, 3.0, 1.0, 0, 0, 0, 0, 0], dtype=torch.float64))
    ours = dropout.equalising_rotation(gram)
    for rotation in (hadamard, ours):
        assert torch.allclose(rotation @ rotation.T, torch.eye(8, dtype=torch.float64), atol=1e-12)
        assert torch.allclose((rotation @ gram @ rotation.T).diagonal(), torch.full((8,), 9 / 8, dtype=torch.float64))


@pytest.mark.parametrize("weight", [0.0, 0.05, 0.4, 5.0])
def test_squared_nuclear_shrinkage_meets_the_conditions_of_optimality(weight):
    """d (c ||X||_*^2) is 2 c ||X||_* times the nuclear norm's subdifferential: a threshold mu = c ||X||_*."""
    matrix = target(1)[0]
    best = dropout.squared_nuclear_shrinkage(matrix, weight)
    if weight == 0:
        assert torch.allclose(best, matrix, atol=1e-12)
        return
    assert shrinkage.subgradient_violation(best, matrix, weight * shrinkage.nuclear_norm(best).item()) < 1e-12
    wrong = 0.98 * best
    assert shrinkage.subgradient_violation(wrong, matrix, weight * shrinkage.nuclear_norm(wrong).item()) > 1e-3


def test_threshold_of_a_stack_is_that_of_each():
    values = torch.tensor([[6.0, 4.0, 0.5], [3.0, 2.9, 2.8], [0.0, 0.0, 0.0]], dtype=torch.float64)
    weights = torch.tensor([[0.1], [1.0]], dtype=torch.float64)
    levels = dropout.squared_nuclear_threshold(values, weights)
    assert levels.shape == (2, 3)
    assert levels[0, 0].item() == pytest.approx(0.1 * 10 / 1.2)  # the third value is below 1.05 / 1.3
    assert levels[1, 1].item() == pytest.approx(8.7 / 4)
    assert levels[:, 2].tolist() == [0, 0]


@pytest.mark.parametrize("keep", [0.3, 1.0])
def test_gradients_of_the_problem_are_those_of_its_loss(keep):
    problem = DropoutFactorization(target(1)[0], keep)
    leaves = [factor.requires_grad_() for factor in factors()]
    loss, error = problem.evaluate_factors(leaves)
    outputs = problem.target
    size = 2 * outputs.numel()
    assert loss.item() == pytest.approx(dropout.expected_loss(outputs, leaves, keep).item() / size, rel=1e-12)
    assert error.item() == pytest.approx(cd.MatrixFactorization(outputs).loss(cd.product(leaves)).item(), rel=1e-12)
    expected = torch.autograd.grad(loss, leaves)
    for ours, theirs in zip(problem.factor_gradients(leaves), expected, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-14)


def test_a_stack_of_keep_rates_equals_its_problems_alone():
    phi, starts, keeps = target(2), gaussian_factors(SHAPE, WIDTH, 0.3, 2, generator()), [0.3, 0.8]
    options = {"record_every": 20, "engine": "reference"}
    rates = torch.tensor(keeps, dtype=torch.float64)[:, None]
    together = cd.descend(DropoutFactorization(phi, rates), starts, 1.0, 60, **options)
    problems = [DropoutFactorization(phi[seed], keep) for keep in keeps for seed in range(2)]
    assert cd.stack_problems(problems).batch_shape == (4,)
    for place, problem in enumerate(problems):
        seed = place % 2
        alone = cd.descend(problem, [factor[seed] for factor in starts], 1.0, 60, **options)
        assert torch.allclose(together.loss[place // 2, seed], alone.loss, rtol=1e-10)


def test_stacked_problems_that_share_a_target_keep_their_rates_apart():
    rates = [torch.tensor([0.3, 0.8], dtype=torch.float64), torch.tensor([0.5, 0.9], dtype=torch.float64)]
    phis, starts = target(2), factors()
    problems = [DropoutFactorization(phi, rate) for phi, rate in zip(phis, rates, strict=True)]
    losses = cd.stack_problems(problems).evaluate_factors(starts)[0]
    for mine, problem in zip(losses, problems, strict=True):
        torch.testing.assert_close(mine, problem.evaluate_factors(starts)[0])


@pytest.mark.parametrize("batch", [0, 4])
def test_auto_keeps_the_penalty_and_engines_that_see_the_product_alone_are_refused(batch):
    problem = DropoutFactorization(target(batch or 1) if batch else target(1)[0], 0.5)
    starts = gaussian_factors(SHAPE, WIDTH, 0.3, batch, generator()) if batch else factors()
    found, expected = (cd.descend(problem, starts, 1.0, 20, engine=engine) for engine in ("auto", "reference"))
    assert found.engine == "reference" and torch.equal(found.loss, expected.loss)
    for engine in ("fused", "compiled"):
        with pytest.raises(ValueError, match=f"engine [\"']{engine}[\"'] got DropoutFactorization"):
            cd.descend(problem, starts, 1.0, 20, engine=engine)


def test_descent_reaches_the_shrunk_product_and_its_rank_falls_with_the_keep_rate():
    keeps = [0.05, 0.25, 0.8]
    found = experiment.reach(target(), gaussian_factors(SHAPE, WIDTH, 0.01, 2, generator()), keeps, 0.05, 6000)
    worst = experiment.judge(found, keeps)
    assert worst["worst error"].max() < 1e-8
    assert worst["worst equality"].max() < 1e-8
    assert worst["rank falls"].all()
    assert found["rank"][:, 0].tolist() == [1, 2, 3]
    assert not experiment.judge({**found, "rank": found["rank"] + 1}, keeps)["rank falls"].any()


def test_threshold_fades_with_the_width_unless_the_keep_rate_is_scaled():
    widths = [64, 128]
    found = experiment.at_widths(target(), widths, 0.4, 0.9, 0.05, 0.05, 4000, generator())
    assert found["error"].max() < 1e-6
    fixed, scaled = experiment.exponent(widths, found["threshold"])
    assert (fixed > -1).all() and (fixed < -0.9).all()
    assert scaled.numpy() == pytest.approx(np.zeros(2), abs=1e-6)
    for width in (1, 10, 1000):
        keep = dropout.scaled_keep_rate(0.8, width)
        assert (1 - keep) / keep / width == pytest.approx(0.25)


def test_drawn_masks_lead_where_the_expected_loss_does():
    """Tolerance set beforehand: a twentieth of the target's norm, where leaving the penalty out is 20 % off."""
    starts = gaussian_factors(SHAPE, WIDTH, 0.1, 2, generator())
    path = experiment.with_masks(target(), starts, 0.4, 0.03, 300, [0, 500, 4000], seed=0)
    assert path["distance"].shape == (2, 3)
    assert path["distance"][:, -1].max() < 0.05
    assert path["off"][:, -1].min() > 0.2
    assert (path["distance"][:, -1] < path["distance"][:, 1]).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: dropout.strength(0.0), "keep is 0.0"),
        (lambda: DropoutFactorization(target(1), 1.5), "keep is"),
        (lambda: dropout.least_penalty(target(1)[0], 4), "width is 4"),
        (lambda: dropout.squared_nuclear_threshold(torch.ones(3), -1.0), "weight is -1.0"),
        (lambda: dropout.scaled_keep_rate(0.0, 4), "base is 0.0"),
        (lambda: experiment.exponent([16, 64], torch.ones(2, 1)), r"widths is \[16, 64\]"),
        (lambda: experiment.check_margin(torch.tensor([3.0, 1.0]), [0.5], 2), "keep rate 0.5"),
    ],
)
def test_impossible_values_are_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_gpu_agrees_with_the_cpu():
    starts = gaussian_factors(SHAPE, WIDTH, 0.1, 2, generator())
    on_gpu = [factor.cuda() for factor in starts]
    here, there = (
        experiment.reach(phi, start, [0.4, 0.9], 0.05, 3000)
        for phi, start in ((target(), starts), (target().cuda(), on_gpu))
    )
    assert torch.allclose(here["values"], there["values"].cpu(), atol=1e-9)
    path = experiment.with_masks(target().cuda(), on_gpu, 0.4, 0.03, 300, [0, 4000], seed=0)
    assert path["distance"][:, -1].max() < 0.05
    found = experiment.monte_carlo(SHAPE, WIDTH, 0.4, 20_000, 2, seed=0, device="cuda")
    assert (np.abs(found["difference"]) < 4 * found["standard error"]).all()
