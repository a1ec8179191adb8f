"""Masked autoencoding: expectation, minimisers and shrinkage in closed form, against samples, gradients and descent."""

import doctest
import itertools

import pytest
import torch

from compressible.recovery.theory import masking

SIZE = 5


def inputs(seed=0, size=SIZE, count=7):
    """X (d, N) with unequal second moments."""
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(size, count, generator=generator, dtype=torch.float64) * torch.arange(1, size + 1)[:, None] ** 0.5
    )


def moments(x):
    return x @ x.mT / x.shape[1]


def correlation(seed=0):
    found = moments(inputs(seed))
    scale = found.diagonal().rsqrt()
    return scale[:, None] * found * scale


def test_loss_is_the_mean_over_all_masks():
    """All 2^(d N) masks of a small X, each with its probability: no sampling error."""
    x = inputs(size=3, count=2)
    weight = torch.randn(3, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for rate in (0.0, 0.3, 0.75):
        total = 0.0
        for kept in itertools.product([0.0, 1.0], repeat=x.numel()):
            mask = torch.tensor(kept, dtype=torch.float64).view(x.shape)
            chance = (1 - rate) ** mask.sum() * rate ** (1 - mask).sum()
            total += chance * (x - weight @ (mask * x) / (1 - rate)).square().sum() / x.shape[1]
        torch.testing.assert_close(masking.expected_loss(weight, moments(x), rate), total, atol=1e-11, rtol=0)


def test_best_map_is_what_papers_write():
    x, theta = inputs(), 0.4
    gram = x @ x.mT
    theirs = theta * gram @ torch.linalg.inv(theta**2 * gram + theta * (1 - theta) * torch.diag(gram.diagonal()))
    torch.testing.assert_close(masking.best_map(moments(x), 1 - theta) / theta, theirs, atol=1e-11, rtol=0)


@pytest.mark.parametrize("rate", [0.0, 0.3, 0.9])
def test_gradient_vanishes_at_the_best_map(rate):
    weight = masking.best_map(moments(inputs()), rate).requires_grad_(True)
    (gradient,) = torch.autograd.grad(masking.expected_loss(weight, moments(inputs()), rate), weight)
    assert gradient.abs().max() < 1e-12


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_no_map_of_that_rank_is_better(rank):
    """L-BFGS on the factors from several starts ends at the closed form."""
    given, best = moments(inputs()), torch.inf
    for seed in range(3):
        draw = torch.Generator().manual_seed(seed)
        shapes = (rank, SIZE), (SIZE, rank)
        factors = [torch.randn(s, generator=draw, dtype=torch.float64).requires_grad_(True) for s in shapes]
        exact = {"tolerance_grad": 1e-12, "tolerance_change": 1e-16, "line_search_fn": "strong_wolfe"}
        optimizer = torch.optim.LBFGS(factors, max_iter=500, history_size=30, **exact)

        def closure(factors=factors, optimizer=optimizer):
            optimizer.zero_grad()
            loss = masking.expected_loss(factors[1] @ factors[0], given, 0.3)
            loss.backward()
            return loss

        optimizer.step(closure)
        best = min(best, closure().item())
    closed = masking.best_map(given, 0.3, rank)
    assert torch.linalg.matrix_rank(closed) == rank
    assert masking.expected_loss(closed, given, 0.3).item() == pytest.approx(best, abs=1e-8)


def test_full_rank_is_no_bottleneck():
    given = moments(inputs())
    torch.testing.assert_close(masking.best_map(given, 0.4, SIZE), masking.best_map(given, 0.4), atol=1e-11, rtol=0)


@pytest.mark.parametrize("rate", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("decay", [0.0, 0.4])
def test_decayed_map_meets_the_conditions_of_the_nuclear_norm(rate, decay):
    """V A - C + mu Z = 0 with Z = U V^T + something of norm at most 1 that is orthogonal to it: a convex optimum."""
    given = correlation()
    found = masking.decayed_map(given, rate, decay)
    values, vectors = torch.linalg.eigh(given)
    rest = given - found @ (given + masking.penalty(rate) * torch.eye(SIZE))  # = mu Z
    diagonal = vectors.mT @ rest @ vectors
    alive = values > decay
    torch.testing.assert_close(diagonal, torch.diag(diagonal.diagonal()), atol=1e-10, rtol=0)
    torch.testing.assert_close(diagonal.diagonal()[alive], torch.full_like(values[alive], decay), atol=1e-10, rtol=0)
    assert (diagonal.diagonal()[~alive].abs() <= decay + 1e-10).all()
    assert int(torch.linalg.matrix_rank(found, rtol=1e-9)) == int(alive.sum())


def test_without_decay_the_shrunk_values_are_those_of_the_best_map():
    given = correlation()
    values = torch.linalg.eigvalsh(given).flip(0)
    for rate in (0.2, 0.8):
        found = torch.linalg.svdvals(masking.best_map(given, rate))
        torch.testing.assert_close(masking.shrunk_values(values, rate), found, atol=1e-10, rtol=0)
    torch.testing.assert_close(masking.shrunk_values(values, 0.0), torch.ones(SIZE, dtype=torch.float64))


def test_stacks_are_their_matrices_alone():
    given, rates = torch.stack([moments(inputs(seed)) for seed in range(2)]), torch.tensor([0.2, 0.6])
    weights = masking.best_map(given, rates)
    for rank in (None, 2):
        weights = masking.best_map(given, rates, rank)
        losses = masking.expected_loss(weights, given, rates)
        for place in range(2):
            alone = masking.best_map(given[place], float(rates[place]), rank)
            torch.testing.assert_close(weights[place], alone, atol=1e-6, rtol=0)
            torch.testing.assert_close(losses[place], masking.expected_loss(alone, given[place], float(rates[place])),
                                       atol=1e-6, rtol=0)  # fmt: skip


def test_impossible_values_are_refused():
    given = moments(inputs())
    with pytest.raises(ValueError, match=r"mask_rate is 1\.0, expected in \[0, 1\)"):
        masking.best_map(given, 1.0)
    with pytest.raises(ValueError, match="rank is 0"):
        masking.best_map(given, 0.5, 0)
    with pytest.raises(ValueError, match="decay is -1"):
        masking.shrunk_values(torch.ones(3), 0.5, -1)
    with pytest.raises(ValueError, match="expected ones"):
        masking.decayed_map(given, 0.5, 0.1)


def test_examples_run():
    found = doctest.testmod(masking)
    assert found.attempted > 5 and found.failed == 0
