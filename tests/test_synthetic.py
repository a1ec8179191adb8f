"""Synthetic data: targets, masks and operators as drawn."""

import pytest
import torch

import compressible as cd
from compressible.recovery import als
from compressible.recovery.masks import _floor, inclusion_probability


def test_weighted_mask_prefers_the_heavy_entries_and_keeps_the_count():
    weights = torch.ones(40, 30).double()
    weights[:10] = 5.0
    generator = torch.Generator().manual_seed(0)
    masks = cd.random_mask((40, 30), 0.2, batch_shape=(200,), generator=generator, weights=weights)
    assert (masks.sum((-2, -1)) == 240).all()
    rate = masks.mean(0)
    heavy, light = rate[:10].mean().item(), rate[10:].mean().item()
    # Each is drawn by an exponential clock of its rate: 1 - exp(-w t), with t from the total of 240.
    t = torch.linspace(0, 1, 100_001, dtype=torch.float64)
    total = 300 * (1 - torch.exp(-5 * t)) + 900 * (1 - torch.exp(-t))
    at = t[(total - 240).abs().argmin()].item()
    assert heavy == pytest.approx(1 - 2.718281828 ** (-5 * at), rel=0.02)
    assert light == pytest.approx(1 - 2.718281828 ** (-at), rel=0.03)


def test_equal_weights_change_nothing_but_the_draw():
    weights = torch.full((8, 9), 0.3)
    assert cd.random_mask((8, 9), 0.5, weights=weights).sum() == 36


@pytest.mark.parametrize("bad", [torch.zeros(4, 4), torch.ones(4, 5), torch.full((4, 4), float("inf"))])
def test_bad_weights_are_refused_with_their_minimum(bad):
    with pytest.raises(ValueError, match="weights have shape"):
        cd.random_mask((4, 4), 0.5, weights=bad)


def test_inclusion_probability_is_the_share_of_masks_that_observe_an_entry():
    weights = torch.arange(1.0, 31).double()[:, None] ** -1 * torch.arange(1.0, 21).double() ** -0.5
    masks = cd.random_mask((30, 20), 0.3, (3000,), torch.Generator().manual_seed(0), weights=weights)
    expected, found = inclusion_probability(weights, 0.3), masks.mean(0)
    assert expected.mean().item() == pytest.approx(0.3, abs=1e-12)
    spread = (expected * (1 - expected) / 3000).sqrt()
    assert ((found - expected).abs() < 5 * spread + 0.003).all() and expected.max() > 0.9 > 0.1 > expected.min()


def test_equal_weights_are_included_equally():
    torch.testing.assert_close(inclusion_probability(torch.full((4, 5), 7.0), 0.25), torch.full((4, 5), 0.25).double())
    with pytest.raises(ValueError, match="observed is 1"):
        inclusion_probability(torch.ones(2, 2), 1)


def test_operators_have_the_papers_scale():
    operators = cd.gaussian_operators(50, (20, 30), generator=torch.Generator().manual_seed(0))
    assert operators.shape == (50, 20, 30) and operators.std().item() == pytest.approx(1 / 50, rel=0.02)
    with pytest.raises(ValueError, match="count is 0"):
        cd.gaussian_operators(0, (2, 2))


@pytest.mark.parametrize(
    ("draw", "told"),
    [
        (lambda: cd.low_rank_target((4, 4), 2, generator=5), "generator is 5, expected a torch.Generator"),
        (lambda: cd.random_mask((4, 4), 0.5, generator="0"), "generator is '0'"),
        (lambda: cd.random_mask((4, 4), 0.5, generator=torch), "generator is <module 'torch'"),
        (lambda: cd.sparse_low_rank((9, 9), 2, 5, generator=1), "generator is 1"),
        (lambda: cd.gaussian_operators(2, (4, 4), generator=1), "generator is 1"),
        (lambda: cd.gaussian_operators("3", (4, 4)), "count is '3', expected at least one measurement"),
        (lambda: cd.random_mask((4, 4), "half"), "observed is 'half', expected a fraction"),
        (lambda: cd.sparse_low_rank((9, 9), 2.0, 5), "rank is 2.0, expected 1 <= rank"),
        (lambda: cd.sparse_low_rank((9, 9), 2, 5.5), "count is 5.5, expected an integer >= 1"),
        (lambda: cd.sparse_low_rank((9, 9), 2, 80), "count is 80 and hidden 8, expected at most 81 together"),
    ],
)
def test_what_cannot_be_drawn_is_refused(draw, told):
    with pytest.raises(ValueError, match=told):
        draw()


def _drawn_and_descended():
    def generator():
        return torch.Generator().manual_seed(5)

    target, mask = cd.low_rank_target((9, 7), 2, (2,), generator()), cd.random_mask((9, 7), 0.6, (), generator())
    weighted = cd.random_mask((9, 7), 0.5, (), generator(), weights=mask + 1)
    seen, unseen = cd.sparse_low_rank((9, 7), 2, 20, generator())
    crowded = cd.sparse_low_rank((9, 7), 2, 50, generator())[0]
    starts = cd.orthogonal_factors((9, 7), 3, scale=0.7, generator=generator())
    dense = cd.descend(cd.MatrixCompletion(target, mask), starts, 1.0, 60, tolerance=0.1, snapshots=(7,))
    sparse = cd.SparseCompletion(seen, unseen)
    lines = cd.descend(sparse, cd.compress_spectral(sparse, 3), 1.0, 20)
    sweeps = als.alternate(sparse, 2, 0.1, 2, generator(), start="random")
    found = [target, mask, weighted, cd.gaussian_operators(3, (9, 7), generator()), *starts, *dense.factors]
    found += [dense.loss, dense.stopped, dense.iterations, *dense.snapshots[7], *lines.factors, lines.error]
    return [*found, *sweeps.factors, sweeps.loss, sweeps.seconds * 0, *(x.values() for x in (seen, unseen, crowded))]


def test_a_default_device_of_the_caller_moves_nothing():
    expected = _drawn_and_descended()
    torch.set_default_device("meta")  # as building a large model does; a tensor there holds no numbers
    try:
        found = _drawn_and_descended()
    finally:
        torch.set_default_device(None)
    assert all(part.device.type == "cpu" for part in found)
    assert all(torch.equal(mine, other) for mine, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("observed", [0.07, 0.29, 0.57, 0.58, 0.3, 1.0])
def test_the_count_of_a_decimal_fraction_is_exact_at_any_size(observed):
    for size in (100, 10**4, 10**6, 10**8, 10**10):
        assert _floor(observed * size) == round(observed * 100) * size // 100
    assert _floor(0.5 * 9) == 4 and _floor(1 / 3 * 9) == 3 and _floor(0.999999 * 10**5) == 99999


def test_only_the_proportions_of_weights_count():
    weights = torch.rand(12, 10, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.5
    for power in (2.0**-1030, 2.0**900):  # below 2.2e-308 a weight has fewer digits
        plain = (weights * power) / power
        drawn = [
            cd.random_mask((12, 10), 0.3, (4,), torch.Generator().manual_seed(2), weights=each)
            for each in (plain, weights * power)
        ]
        assert torch.equal(*drawn)
        assert torch.equal(inclusion_probability(plain, 0.3), inclusion_probability(weights * power, 0.3))
