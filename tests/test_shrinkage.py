"""P3's Theorem 1: the closed form against convex conditions and optimisers, and descent against the closed form."""

import numpy as np
import pytest
import torch

pytest.importorskip("scipy")  # a GPU host may have PyTorch, Triton and pytest alone
from scipy.optimize import minimize

import compressible as cd
from compressible.experiments import regularised_dynamics as dynamics
from compressible.experiments import regularised_factorization as regularised
from compressible.recovery.theory import shrinkage

SHAPE = (9, 6)
VALUES = torch.tensor([4.0, 3.0, 2.0, 1.0], dtype=torch.float64)
GAMMAS = {"mu below all": 0.5, "between": 2.4, "above all": 4.5}


def target(seeds=1, values=VALUES, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return regularised.draw_targets(SHAPE, values.expand(seeds, -1), generator)


def gaussian(width, seeds=1, scale=0.4, seed=1):
    return regularised.gaussian_factors(SHAPE, width, scale, seeds, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("mu", GAMMAS.values(), ids=GAMMAS)
def test_closed_form_meets_the_conditions_of_the_convex_problem(mu):
    phi = target()[0]
    best = shrinkage.soft_thresholded_svd(phi, rank=6, decay=mu)
    assert shrinkage.subgradient_violation(best, phi, mu) < 1e-12
    other = shrinkage.soft_thresholded_svd(phi, rank=6, decay=0.8 * mu)
    assert shrinkage.subgradient_violation(other, phi, mu) > 0.05 * mu, "the conditions must notice another threshold"


def test_conditions_notice_a_wrong_rank_and_a_wrong_direction():
    phi, mu = target()[0], 0.5
    cut = shrinkage.soft_thresholded_svd(phi, rank=3, decay=mu)
    assert shrinkage.subgradient_violation(cut, phi, mu).item() == pytest.approx(0.5)  # sigma_4 - mu is left outside
    turned = torch.linalg.qr(torch.randn(9, 9, generator=torch.Generator().manual_seed(3), dtype=torch.float64)).Q
    best = shrinkage.soft_thresholded_svd(phi, rank=6, decay=mu)
    assert shrinkage.subgradient_violation(turned @ best, phi, mu) > 0.5


@pytest.mark.parametrize(("fit", "decay"), [(0.5, 0.35), (0.5, 0.7), (1.0, 0.7), (1.0, 0.35)])
@pytest.mark.parametrize("width", [2, 4, 5])
def test_an_optimiser_finds_the_closed_form_under_every_convention(fit, decay, width):
    """L-BFGS, automatic gradients, random factors: fit ||W_2 W_1 - Phi||^2 + decay (||W_1||^2 + ||W_2||^2)."""
    phi, starts = target()[0], gaussian(width)
    sizes = [factor[0].numel() for factor in starts]

    def objective(flat):
        parts = torch.tensor(flat, requires_grad=True)
        first, second = parts.split(sizes)
        first, second = first.reshape(width, 6), second.reshape(9, width)
        loss = fit * (second @ first - phi).square().sum() + decay * parts.square().sum()
        loss.backward()
        return loss.item(), parts.grad.numpy()

    flat = torch.cat([factor.flatten() for factor in starts]).numpy()
    found = minimize(objective, flat, jac=True, method="L-BFGS-B", options={"maxiter": 5000, "ftol": 0, "gtol": 1e-10})
    first, second = (torch.from_numpy(part) for part in np.split(found.x, [sizes[0]]))
    mu = shrinkage.threshold(fit, decay)
    closed = shrinkage.soft_thresholded_svd(phi, width, mu)
    assert torch.allclose(second.reshape(9, width) @ first.reshape(width, 6), closed, atol=1e-6)
    assert found.fun == pytest.approx(2 * fit * shrinkage.least_objective(phi, width, mu).item(), rel=1e-10)


@pytest.mark.parametrize("mu", [0.0, *GAMMAS.values()])
@pytest.mark.parametrize("width", [2, 4, 6])
def test_least_objective_is_attained_and_never_undercut(mu, width):
    phi = target()[0]
    left, values, right = torch.linalg.svd(shrinkage.soft_thresholded_svd(phi, width, mu), full_matrices=False)
    roots = values[:width].sqrt()
    best = [roots[:, None] * right[:width], left[:, :width] * roots]
    least = shrinkage.least_objective(phi, width, mu)
    assert shrinkage.objective(best, phi, mu).item() == pytest.approx(least.item(), rel=1e-12)
    generator = torch.Generator().manual_seed(4)
    for size in (1e-3, 0.1, 1.0):
        for _ in range(50):
            moved = [f + size * torch.randn(f.shape, generator=generator, dtype=f.dtype) for f in best]
            assert shrinkage.objective(moved, phi, mu) >= least - 1e-12


def test_half_the_squared_norms_bound_the_nuclear_norm():
    factors = gaussian(5)
    norm = shrinkage.nuclear_norm(cd.product(factors))
    assert shrinkage.squared_norms(factors) / 2 > norm
    left, values, right = torch.linalg.svd(cd.product(factors), full_matrices=False)
    balanced = [values.sqrt()[..., None] * right, left * values.sqrt()[..., None, :]]
    assert torch.allclose(shrinkage.squared_norms(balanced) / 2, norm, rtol=1e-12)


@pytest.mark.parametrize("mu", [0.0, 0.7])
def test_a_step_of_descent_changes_the_balance_by_the_stated_identity(mu):
    phi, factors, eta = target(), gaussian(4), 0.05
    before = shrinkage.imbalance(factors)
    after = shrinkage.imbalance(regularised.regularised_descent(phi, factors, mu, eta, 1).factors)
    rest = cd.product(factors) - phi
    first, second = factors[1].mT @ rest, factors[0] @ rest.mT
    expected = (1 - eta * mu) ** 2 * before + eta**2 * (first @ first.mT - second @ second.mT)
    assert torch.allclose(after, expected, atol=1e-13)
    assert (after - before).norm() > 1e-3


def test_descent_reaches_the_closed_form_from_both_starts():
    widths, decays, seeds = [2, 4, 6], [0.0, *GAMMAS.values()], 3
    starts = regularised.draw_starts(SHAPE, widths, (1e-6, 0.4), seeds, torch.Generator().manual_seed(2))
    found = regularised.reach(target(seeds), starts, widths, decays, step_size=0.05, steps=4000)
    worst = regularised.judge(found, widths, decays, rank=4)
    assert worst["arrived"].shape == (4 * 2 * 3 * seeds,)
    assert worst["worst error"].max() < 1e-10
    for name in ("gap", "imbalance", "norm gap", "violation"):
        assert worst[f"worst {name}"].max() < 1e-10
    # Without decay what a Gaussian start is out of balance by stays, and what a small one is does not show.
    assert found["imbalance"][0, 1].min() > 0.01 > 1e-10 > found["imbalance"][0, 0].max()
    assert found["violation"].isnan()[:, 0, :, 0].tolist() == [
        [True] * 3,
        [True, False, False],
        [False] * 3,
        [False] * 3,
    ]


def test_a_run_that_diverged_is_not_taken_for_one_without_a_violation():
    names = ("error", "gap", "imbalance", "norm gap", "violation")
    found = {name: torch.full((1, 2, 1, 2), 1e-12) for name in names}
    found["violation"][..., 0] = torch.nan  # the width binds
    for name in names:
        found[name][0, 1, 0, 1] = torch.nan
    worst = regularised.judge(found, [2], [0.5], rank=2)
    assert all(np.isnan(worst[f"worst {name}"]).tolist() == [False, True] for name in names)
    assert worst["arrived"].tolist() == [True, True, True, False]


def test_gap_of_a_run_that_has_not_arrived_is_seen():
    widths, seeds = [2], 2
    starts = regularised.draw_starts(SHAPE, widths, (1e-6, 0.4), seeds, torch.Generator().manual_seed(2))
    found = regularised.reach(target(seeds), starts, widths, [0.5], step_size=0.05, steps=20)
    worst = regularised.judge(found, widths, [0.5], rank=4)
    assert not worst["arrived"].any()
    assert worst["worst error"].min() > 1e-3


def test_balance_is_kept_without_decay_and_lost_at_twice_its_rate():
    phi, starts = target(3), gaussian(4, 3)
    assert dynamics.drift_order(phi, starts, 0.05, time=5.0).numpy() == pytest.approx(np.ones(3), abs=0.1)
    for mu in (0.5, 1.5):
        assert dynamics.balance_rate(phi, starts, mu).numpy() == pytest.approx(np.full(3, 1.002), abs=0.003)


def test_a_saddle_is_critical_and_left_at_the_stated_rate():
    phi, mu, width = target(3), 0.5, 2
    saddle = dynamics.saddle(phi, width, mu)
    moved = regularised.regularised_descent(phi, saddle, mu, 0.05, 1).factors
    assert max((a - b).abs().max().item() for a, b in zip(moved, saddle, strict=True)) < 1e-14
    assert (regularised.gap(saddle, phi, width, mu) > 0.1).all()
    nudged = [f + 1e-8 * g for f, g in zip(saddle, gaussian(width, 3, 1.0), strict=True)]
    assert dynamics.escape_rate(phi, nudged, width, mu, 0.02).numpy() == pytest.approx(np.ones(3), abs=1e-3)
    path = dynamics.paths(phi, nudged, width, mu, 0.05, 2000, 500)
    assert path["gap"].shape == (3, 5)
    assert path["gap"][:, -1].max() < 1e-12
    with pytest.raises(ValueError, match="width is 4"):
        dynamics.saddle(phi, 4, mu)


def test_ties_leave_the_value_and_the_spectrum():
    found = regularised.ties(SHAPE, 2, 0.5, 0.4, 0.05, 2000, 4, torch.Generator().manual_seed(5))
    assert max(found["tie gap"].max(), found["tie values"].max()) < 1e-12
    assert found["tie distance"].min() > 1e-2


def test_at_the_threshold_itself_descent_arrives_as_one_over_time():
    slope = dynamics.edge_slope(SHAPE, gaussian(3, 2), 0.04, 4000, torch.Generator().manual_seed(6))
    assert slope.numpy() == pytest.approx([2.0, 2.0], rel=5e-3)


def test_drawn_values_keep_their_distance():
    values = regularised.spread_values(6, 50, torch.Generator().manual_seed(0))
    assert values.shape == (50, 6)
    assert (-values.diff(dim=1)).min() >= 0.5
    assert torch.allclose(
        torch.linalg.svdvals(regularised.draw_targets((9, 8), values, torch.Generator()))[:, :6], values
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: shrinkage.threshold(0.0, 1.0), "fit is 0.0"),
        (lambda: shrinkage.soft_thresholded_svd(target(), 0, 0.5), "rank is 0"),
        (lambda: shrinkage.least_objective(target(), 2, -1.0), "decay is -1.0"),
        (lambda: shrinkage.subgradient_violation(target(), target(), 0.0), "decay is 0.0"),
        (lambda: regularised.check_decays([0.5, 2.2], 3), r"weight_decays hold \[2.2\]"),
        (lambda: regularised.check_decays([0.0], 3), "expected one above 0"),
    ],
)
def test_impossible_values_are_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_gpu_agrees_with_the_cpu():
    phi, starts = target(2), gaussian(4, 2)
    for form in (shrinkage.soft_thresholded_svd, shrinkage.least_objective):
        assert torch.allclose(form(phi.cuda(), 3, 0.5).cpu(), form(phi, 3, 0.5), atol=1e-12)
    ends = regularised.regularised_descent(phi.cuda(), [factor.cuda() for factor in starts], 0.5, 0.05, 3000).factors
    assert torch.allclose(cd.product(ends).cpu(), shrinkage.soft_thresholded_svd(phi, 4, 0.5), atol=1e-10)
