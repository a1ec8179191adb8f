"""P1's theorem and corollary, held against runs, to rounding."""

import pytest
import torch

import compressible as cd
from compressible.recovery.compression import invariant_directions, orthogonal_scale
from compressible.recovery.theory import dropout, edges, masking, shrinkage
from compressible.recovery.theory import invariants as theory

SIZE, RANK, STEPS = 18, 2, 400


def _start(depth, scales, seed=0):
    g = torch.Generator().manual_seed(seed)
    target = cd.low_rank_target((SIZE, SIZE), RANK, generator=g)
    factors = cd.orthogonal_factors((SIZE, SIZE), depth=depth, scale=1.0, generator=g)
    return target, [eps * factor for eps, factor in zip(scales, factors, strict=True)]


def block_bases(factors, target, rank):
    """Return V^(1), ..., V^(L+1), each (d, d) orthogonal, whose last d - 2r columns never move (P1, Theorem 2.1).

    G = (W_L...W_2)^T Phi at the start; the last d - 2r columns of V^(1) span null(G) and null(G^T W_1) together, and
    V^(l+1) = W_l V^(l) / eps_l. Square problems only.
    """
    rest = target
    for factor in reversed(factors[1:]):
        rest = factor.mT @ rest
    moving = invariant_directions(rest, factors[0] / orthogonal_scale(factors[0], "W_1"), rank)
    full = torch.linalg.qr(moving, mode="complete").Q
    bases = [torch.cat([moving, full[:, moving.shape[-1] :]], -1)]
    for layer, factor in enumerate(factors, 1):
        bases.append(factor @ bases[-1] / orthogonal_scale(factor, f"W_{layer}"))
    return bases


def block_error(factors, bases, rhos, rank):
    """Return the largest deviation of W_l(t), in the bases of `block_bases`, from blkdiag(anything, rho_l I).

    factors [W_1, ..., W_L] at iteration t; rhos (L,) at the same iteration; `rank` is r.
    """
    worst = 0.0
    for layer, factor in enumerate(factors):
        blocks = bases[layer + 1].mT @ factor @ bases[layer]
        blocks[: 2 * rank, : 2 * rank] = 0
        blocks[2 * rank :, 2 * rank :].diagonal().sub_(rhos[layer].item())
        worst = max(worst, blocks.abs().max().item())
    return worst


@pytest.mark.parametrize("decay", [0.0, 0.3])
@pytest.mark.parametrize("scales", [(0.5, 0.8), (0.6, 0.6, 0.6), (0.9, 0.4, 0.7), (0.9, 0.5, 0.7, 0.8)])
def test_block_structure_with_unequal_scales_and_decay(scales, decay):
    """All t, all layers: d - 2r values follow the rho recursion and their vectors stand still."""
    target, factors = _start(len(scales), scales)
    size = SIZE * SIZE
    eta = 0.02  # on the sum loss
    marks = range(0, STEPS + 1, 50)
    history = cd.descend(
        cd.MatrixFactorization(target),
        factors,
        eta * size,
        STEPS,
        weight_decay=decay / size,
        snapshots=marks,
        engine="reference",
    )
    rhos = theory.rho(scales, eta, STEPS, decay)
    bases = block_bases(factors, target, RANK)
    for t in marks:
        assert block_error(history.snapshots[t], bases, rhos[t], RANK) < 1e-11
    moved = block_error(history.snapshots[STEPS], bases, rhos[0], RANK)
    assert moved > 1e-3, "the recursion must matter, or the check above could not fail"


def test_exactly_2r_values_move():
    target, factors = _start(3, (1.0, 1.0, 1.0))
    history = cd.descend(cd.MatrixFactorization(target), factors, 1.0, 50)
    for factor in history.factors:
        values = torch.linalg.svdvals(factor)
        assert ((values - values.median()).abs() > 1e-6).sum() == 2 * RANK


@pytest.mark.parametrize("scales", [(0.7, 0.7), (0.3, 0.3, 0.3), (0.5, 0.3, 0.6)])
def test_compression_gap_is_an_equality(scales):
    """||f(t) - f_C(t)||_F = sqrt(d - 2r) prod rho_l with frozen outer factors."""
    target, factors = _start(len(scales), scales)
    problem, eta = cd.MatrixFactorization(target), 0.02
    small = cd.compress_from_gradient(problem, factors, rank=RANK)
    marks = range(0, STEPS + 1, 40)
    size = eta * SIZE * SIZE
    wide = cd.descend(problem, factors, size, STEPS, snapshots=marks, engine="reference")
    narrow = cd.descend(problem, small, size, STEPS, outer_ratio=0.0, snapshots=marks, engine="reference")
    gaps = theory.compression_gap(theory.rho(scales, eta, STEPS), SIZE, RANK)
    for t in marks:
        gap = torch.linalg.matrix_norm(cd.product(wide.snapshots[t]) - cd.product(narrow.snapshots[t]))
        assert gap.item() == pytest.approx(gaps[t].item(), rel=1e-10, abs=1e-12)
    assert wide.loss[-1] < 0.05 * wide.loss[0]


def test_gap_holds_for_a_guess_above_the_rank():
    target, factors = _start(3, (0.3, 0.3, 0.3))
    problem = cd.MatrixFactorization(target)
    small = cd.compress_from_gradient(problem, factors, rank=RANK + 2)
    marks = (0, 200, STEPS)
    wide = cd.descend(problem, factors, 6.0, STEPS, snapshots=marks)
    narrow = cd.descend(problem, small, 6.0, STEPS, outer_ratio=0.0, snapshots=marks)
    gaps = theory.compression_gap(theory.rho((0.3,) * 3, 6.0 / SIZE**2, STEPS), SIZE, RANK + 2)
    for t in marks:
        gap = torch.linalg.matrix_norm(cd.product(wide.snapshots[t]) - cd.product(narrow.snapshots[t]))
        assert gap.item() == pytest.approx(gaps[t].item(), rel=1e-10, abs=1e-12)


def test_gap_fails_where_the_theory_does_not_reach():
    """Masked losses are outside the corollary: the equality must not hold there."""
    target, factors = _start(3, (0.3, 0.3, 0.3))
    problem = cd.MatrixCompletion(
        target, cd.random_mask((SIZE, SIZE), 0.5, generator=torch.Generator().manual_seed(2)), "all"
    )
    small = cd.compress_from_gradient(problem, factors, rank=RANK)
    wide = cd.descend(problem, factors, 6.0, STEPS)
    narrow = cd.descend(problem, small, 6.0, STEPS, outer_ratio=0.0)
    gap = torch.linalg.matrix_norm(cd.product(wide.factors) - cd.product(narrow.factors))
    assert gap > 10 * theory.compression_gap(theory.rho((0.3,) * 3, 6.0 / SIZE**2, STEPS), SIZE, RANK)[-1]


@pytest.mark.parametrize("depth", [2, 3, 4])
def test_outer_ratio_limit_parts_settling_from_not(depth):
    target = cd.low_rank_target((10, 10), 1, generator=torch.Generator().manual_seed(0))
    problem, step_size = cd.MatrixFactorization(target), 2.0
    limit = theory.outer_ratio_limit(problem, step_size, depth).item()
    assert limit > 1
    start = cd.compress_spectral(problem, 1, depth, 0.1)
    below, above = (
        cd.descend(problem, start, step_size, 3000, outer_ratio=ratio * limit, record_every=3000).final("error")
        for ratio in (0.9, 1.1)
    )
    assert below < 1e-20 < 1e-6 < above


@pytest.mark.parametrize("depth", [2, 3, 4, 6])
def test_compressed_factorization_follows_one_scalar_per_singular_value(depth):
    """At every depth, excess width included; the bases never turn."""
    target, _ = _start(2, (1.0, 1.0))
    problem, scale, steps = cd.MatrixFactorization(target), 1e-2 ** (1 / depth), 3000
    step = 0.1 * theory.stability_limit(problem, depth).item()
    marks = range(0, steps + 1, 100)
    run = cd.descend(problem, cd.compress_spectral(problem, 2 * RANK, depth, scale), step, steps, snapshots=marks)
    strengths = torch.linalg.svdvals(target)[: 2 * RANK]
    strengths[RANK:] = 0
    expected = theory.aligned_values(strengths, depth, scale, step / SIZE**2, steps)
    for t in marks:
        values = torch.linalg.svdvals(cd.product(run.snapshots[t]))[: 2 * RANK]
        torch.testing.assert_close(values, expected[t].sort(descending=True).values, rtol=1e-8, atol=1e-12)
    assert (expected[-1, :RANK] / strengths[:RANK] > 0.999).all(), "the run must pass through the whole transition"


@pytest.mark.parametrize("depth", [2, 3, 5])
def test_escape_time_is_the_leading_order_of_the_recursion(depth):
    value, product_scale, step = 7.0, 1e-5, 1e-3
    scale = product_scale ** (1 / depth)
    expected = theory.escape_time(value, depth, scale, step)
    path = theory.aligned_values(torch.tensor([value], dtype=torch.float64), depth, scale, step, round(1.5 * expected))
    first = int((path[:, 0] > value / 2).int().argmax())
    assert first == pytest.approx(expected, rel=0.05 if depth > 2 else 0.01)


def test_escape_time_needs_a_start_below_the_value():
    with pytest.raises(ValueError, match="scale is 2"):
        theory.escape_time(1.0, 3, 2.0, 0.1)


PHI, COVARIANCE = torch.eye(4, 6, dtype=torch.float64), torch.eye(6, dtype=torch.float64)
CLOSED_FORMS = {
    "soft_thresholded_svd": lambda matrix: shrinkage.soft_thresholded_svd(matrix, 2, 0.1),
    "least_objective": lambda matrix: shrinkage.least_objective(matrix, 2, 0.1),
    "violation of a matrix": lambda matrix: shrinkage.subgradient_violation(matrix, PHI, 0.1),
    "violation of a target": lambda matrix: shrinkage.subgradient_violation(PHI, matrix, 0.1),
    "least_penalty": lambda matrix: dropout.least_penalty(matrix, 6),
    "equalised_factors": lambda matrix: dropout.equalised_factors(matrix, 6),
    "squared_nuclear_shrinkage": lambda matrix: dropout.squared_nuclear_shrinkage(matrix, 0.1),
    "best_map": lambda matrix: masking.best_map(matrix, 0.5),
    "middle_bases": lambda matrix: edges.middle_bases(matrix, [COVARIANCE] * 3, 1),
}


@pytest.mark.parametrize("name", CLOSED_FORMS)
@pytest.mark.parametrize("odd", ["text", torch.eye(6).long(), torch.full((4, 6), torch.nan), torch.ones(6), None])
def test_closed_forms_name_a_matrix_that_is_none(name, odd):
    with pytest.raises(ValueError, match=r"(matrix|target|moments) (is|has|holds)|type of (matrix|target|moments) is"):
        CLOSED_FORMS[name](odd)


@pytest.mark.parametrize("rank", [1.5, 0, "2", None, True, float("nan")])
@pytest.mark.parametrize("form", [
    lambda rank: shrinkage.soft_thresholded_svd(PHI, rank, 0.1),
    lambda rank: shrinkage.least_objective(PHI, rank, 0.1),
    lambda rank: masking.best_map(COVARIANCE, 0.5, rank if rank is not None else 0),
    lambda rank: edges.middle_bases(COVARIANCE, [COVARIANCE] * 3, rank),
    lambda rank: dropout.scaled_keep_rate(0.5, rank),
    lambda rank: dropout.least_penalty(PHI, rank),
])  # fmt: skip
def test_closed_forms_count_no_parts_of_a_direction(form, rank):
    with pytest.raises(ValueError, match=r"(rank|width) is"):
        form(rank)
