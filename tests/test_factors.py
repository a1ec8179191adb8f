"""Orthogonal starts, products and exact padding."""

import pytest
import torch

import compressible as cd
from compressible.recovery.factors import check_factors


@pytest.mark.parametrize("shape", [(8, 8), (8, 5), (5, 8)])
@pytest.mark.parametrize("width", [None, 3, 12])
@pytest.mark.parametrize("batch", [(), (2,)])
def test_factors_are_scaled_orthogonal(shape, width, batch):
    factors = cd.orthogonal_factors(shape, depth=4, width=width, scale=0.1, batch_shape=batch)
    check_factors(factors, shape)
    w = width or 8
    assert [tuple(f.shape[-2:]) for f in factors] == [(w, shape[1]), (w, w), (w, w), (shape[0], w)]
    for factor in factors:
        thin = factor if factor.shape[-2] >= factor.shape[-1] else factor.mT
        eye = 0.01 * torch.eye(thin.shape[-1], dtype=torch.float64).expand(*batch, -1, -1)
        torch.testing.assert_close(thin.mT @ thin, eye, rtol=0, atol=1e-15)


def test_orthogonal_law_is_rotation_invariant():
    """Haar: entries of a d x d orthogonal matrix have mean 0 and variance 1/d, determinants of both signs occur."""
    g = torch.Generator().manual_seed(0)
    (first, _) = cd.orthogonal_factors((4, 4), depth=2, scale=1.0, generator=g, batch_shape=(4000,))
    assert first.mean((0,)).abs().max() < 4 * (1 / 4 / 4000) ** 0.5 + 1e-3
    torch.testing.assert_close(first.var(0), torch.full((4, 4), 0.25, dtype=torch.float64), rtol=0.15, atol=0)
    assert 0.45 < (torch.linalg.det(first) > 0).double().mean() < 0.55


def test_same_seed_same_start_and_global_state_untouched():
    before = torch.get_rng_state()
    a = cd.orthogonal_factors((6, 6), generator=torch.Generator().manual_seed(5))
    b = cd.orthogonal_factors((6, 6), generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(a, b, rtol=0, atol=1e-14)
    assert torch.equal(before, torch.get_rng_state())


def test_product_multiplies_from_the_left():
    factors = [torch.randn(2, *s, dtype=torch.float64) for s in [(4, 3), (6, 4), (5, 6)]]
    torch.testing.assert_close(cd.product(factors), factors[2] @ factors[1] @ factors[0])


def test_padding_is_exact():
    g = torch.Generator().manual_seed(0)
    problem = cd.MatrixCompletion(
        cd.low_rank_target((12, 10), 2, generator=g), cd.random_mask((12, 10), 0.6, generator=g)
    )
    runs = [cd.orthogonal_factors((12, 10), width=w, scale=0.3, generator=g) for w in (3, 7, 12)]
    stacked = cd.descend(problem, cd.stack_factors(runs), 2.0, 400, engine="reference")
    for index, run in enumerate(runs):
        alone = cd.descend(problem, run, 2.0, 400, engine="reference")
        torch.testing.assert_close(stacked.loss[index], alone.loss, rtol=1e-11, atol=0)
        width = run[0].shape[0]
        assert not stacked.factors[0][index, width:].any()
        torch.testing.assert_close(stacked.factors[0][index, :width], alone.factors[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("bad", [{"depth": 1}, {"width": 0}, {"scale": 0.0}, {"scale": float("nan")}])
def test_bad_arguments_name_the_value(bad):
    with pytest.raises(ValueError, match=str(next(iter(bad.values())))):
        cd.orthogonal_factors((4, 4), **bad)


def test_stack_refuses_mixed_depths():
    with pytest.raises(ValueError, match=r"\[2, 3\]"):
        cd.stack_factors([cd.orthogonal_factors((4, 4), depth=2), cd.orthogonal_factors((4, 4), depth=3)])


def test_no_factor_and_factors_that_pass_by_are_refused():
    with pytest.raises(ValueError, match=r"factors are \[\], expected at least one"):
        cd.product([])
    problem = cd.MatrixFactorization(torch.eye(3, dtype=torch.float64))
    with pytest.raises(ValueError, match="type of factors is 'generator', expected a list"):
        cd.descend(problem, (torch.eye(3, dtype=torch.float64) for _ in range(3)), 0.1, 3)
