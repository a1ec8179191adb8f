"""P1's theorem at its edges: what stays exact, what the bounds bound, and that our loop steps as `descend` does."""

import pytest
import torch
from torch.linalg import matrix_norm

import compressible as cd
from compressible.experiments import edge_levels, edge_runs, edges
from compressible.recovery.theory import edges as theory
from compressible.recovery.theory import invariants

SIZE, RANK, SEEDS, STEPS = 14, 2, 2, 30
STRENGTHS = [1e-4, 1e-3, 1e-2, 1e-1]


def _generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def drawn():
    g = _generator()
    target = cd.low_rank_target((SIZE, SIZE), RANK, (SEEDS,), g)
    return target, *edge_levels.gaussian_factors(SIZE, 3, SEEDS, g)


@pytest.fixture(scope="module")
def ideal(drawn):
    target, unit, _ = drawn
    return edges.ideal_run(target, unit, RANK, 0.4, STEPS, [1.0] * 3)  # 30 steps of 0.4 / 14^2: short, as P1 has it


def _moment(seed=1, size=SIZE):
    inputs = torch.randn(SEEDS, size, 5 * size, generator=_generator(seed), dtype=torch.float64)
    return inputs @ inputs.mT / (5 * size)


@pytest.mark.parametrize(("ratio", "decay"), [(1.0, 0.0), (0.1, 1e-3)])
@pytest.mark.parametrize("white", [True, False])
def test_plain_steps_are_those_of_descend(drawn, ratio, decay, white):
    target, unit, _ = drawn
    problem = cd.MatrixFactorization(target) if white else edges.InputFactorization(target, _moment())
    start = [0.8 * factor for factor in unit]
    *_, ours = edges.iterates(problem, start, 2.0, 40, outer_ratio=ratio, weight_decay=decay)
    theirs = cd.descend(problem, start, 2.0, 40, ratio, decay, engine="reference").factors
    for one, two, first in zip(ours, theirs, start, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-12)
        assert (one - first).abs().max() > 1e-3, "the runs must move, or equality says nothing"


def test_white_inputs_are_a_factorization(drawn):
    target, unit, _ = drawn
    white = edges.InputFactorization(target, torch.eye(SIZE, dtype=torch.float64))
    plain, at = cd.MatrixFactorization(target), cd.product(unit)
    torch.testing.assert_close(white.gradient(at), plain.gradient(at))
    torch.testing.assert_close(white.evaluate(at)[0], plain.evaluate(at)[0])
    torch.testing.assert_close(white.surrogate(), target)


def test_inputs_are_measurements_one_by_one():
    """1/2 sum over i, j of (<e_i x_j^T, X> - y_ij)^2, with targets that no matrix meets: the same but for scale."""
    rows, columns, samples = 2, 5, 12
    inputs = torch.randn(columns, samples, generator=_generator(3), dtype=torch.float64)
    wanted = torch.randn(rows, samples, generator=_generator(4), dtype=torch.float64)
    operators = torch.einsum("ik,cj->ijkc", torch.eye(rows, dtype=torch.float64), inputs).reshape(-1, rows, columns)
    sensing = cd.MatrixSensing(operators, wanted.flatten())
    moment = inputs @ inputs.mT / samples
    ours = edges.InputFactorization(torch.linalg.lstsq(inputs.mT, wanted.mT).solution.mT, moment)
    at = torch.randn(rows, columns, generator=_generator(5), dtype=torch.float64)
    torch.testing.assert_close(ours.gradient(at), sensing.gradient(at) / (samples * rows * columns))
    difference = sensing.loss(at) - sensing.loss(torch.zeros_like(at))
    ours_too = ours.loss(at) - ours.loss(torch.zeros_like(at))
    torch.testing.assert_close(ours_too, difference / (samples * rows * columns))


def test_stacks_of_inputs_come_apart(drawn):
    problem = edges.InputFactorization(drawn[0], _moment())
    alone = [problem.select(torch.tensor([index]), (SEEDS,)) for index in range(SEEDS)]
    back, at = cd.stack_problems(alone), cd.product(drawn[1])
    torch.testing.assert_close(back.gradient(at[:, None])[:, 0], problem.gradient(at))
    with pytest.raises(ValueError, match="moment has shape"):
        edges.InputFactorization(drawn[0], torch.eye(3, dtype=torch.float64))


@pytest.mark.parametrize("shape", [(SIZE, SIZE), (RANK, SIZE)])
def test_middle_bases_chain_and_see_no_gradient(shape):
    g = _generator(7)
    target = cd.low_rank_target(shape, RANK, generator=g)
    start = [
        e * f for e, f in zip((0.9, 0.5, 0.7), cd.orthogonal_factors(shape, 3, scale=1.0, generator=g), strict=True)
    ]
    bases = theory.middle_bases(target, start, RANK)
    identity = torch.eye(SIZE - 2 * RANK, dtype=torch.float64)
    for basis in bases[:-1]:
        torch.testing.assert_close(basis.mT @ basis, identity)
    gradients = cd.MatrixFactorization(target).factor_gradients(start)
    for layer, gradient in enumerate(gradients):
        seen = gradient @ bases[layer]
        along = bases[layer + 1] @ (bases[layer + 1].mT @ seen)
        assert (seen - along).abs().max() < 1e-13, "on the middle a gradient leads nowhere else"
        assert gradient.abs().max() > 1e-3
    wide = shape[0] < SIZE
    assert (bases[-1].abs().max() < 1e-12) == wide


def test_up_to_three_times_the_rank_moves_where_the_product_is_wide():
    """r < m < n: the middle bases hold r directions that move, and without the pull-back of Phi's own none is left."""
    g = _generator(7)
    rows = 2 * RANK + 2
    target = cd.low_rank_target((rows, SIZE), RANK, generator=g)
    start = cd.orthogonal_factors((rows, SIZE), 3, scale=0.8, generator=g)
    gradient = cd.MatrixFactorization(target).factor_gradients(start)[0]
    middle = theory.middle_bases(target, start, RANK)
    seen = gradient @ middle[0]
    left = seen - middle[1] @ (middle[1].mT @ seen)
    assert torch.linalg.matrix_rank(left, atol=1e-12) == RANK
    unit = cd.product(start) / 0.8**3
    own, onto = torch.linalg.svd(target).Vh[:RANK].mT, torch.linalg.svd(target).U[:, :RANK]
    moving = torch.cat([own, unit.mT @ onto, unit.mT @ (unit @ own)], 1)
    rest = torch.linalg.qr(moving, mode="complete").Q[:, 3 * RANK :]
    turned = start[0] @ rest / 0.8
    seen = gradient @ rest
    assert (seen - turned @ (turned.mT @ seen)).abs().max() < 1e-14


def test_middle_bases_refuse_what_moves_all():
    target = cd.low_rank_target((6, 6), 3)
    with pytest.raises(ValueError, match="rank is 3"):
        theory.middle_bases(target, cd.orthogonal_factors((6, 6)), 3)


def test_momentum_recursion_without_momentum_is_the_theorems():
    scales = (0.9, 0.5, 0.7)
    plain = invariants.rho(scales, 0.02, 60, 0.3)
    torch.testing.assert_close(theory.momentum_rho(scales, 0.02, 60, 0.0, weight_decay=0.3), plain)
    torch.testing.assert_close(theory.momentum_rho(scales, 0.02, 60, 0.0, True, 0.3), plain)
    with pytest.raises(ValueError, match="momentum is 1"):
        theory.momentum_rho(scales, 0.02, 60, 1.0)


@pytest.mark.parametrize(("nesterov", "end"), [(False, 0.7360), (True, 0.7375)])
def test_momentum_recursion_has_the_value_of_an_independent_run(nesterov, end):
    """P1's setting, computed elsewhere in numpy."""
    rhos = theory.momentum_rho([1.0] * 3, 1 / 900, 50, 0.9, nesterov)
    assert rhos[-1].tolist() == pytest.approx([end] * 3, abs=5e-5)


@pytest.mark.parametrize("sgd", [{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}])
@pytest.mark.parametrize(("scales", "decay"), [((1.0, 1.0, 1.0), 0.0), ((0.9, 0.5, 0.7), 1e-3)])
def test_momentum_scales_and_decay_keep_the_theorem(drawn, sgd, scales, decay):
    target, unit, _ = drawn
    run = edges.ideal_run(target, unit, RANK, 1.0, STEPS, scales, sgd | {"weight_decay": decay})
    found = edge_runs.exactness(run)
    assert found["deviation"].max() < 1e-12
    assert found["gap_error"].max() < 1e-12
    assert found["exactly_2r"].all()
    frozen = edges.Ideal(**vars(run) | {"rhos": run.rhos[:1].expand_as(run.rhos)})
    assert edge_runs.exactness(frozen)["deviation"].max() > 1e-3, "a wrong recursion must be seen"


def test_adam_keeps_nothing(ideal):
    found = edge_runs.adam(ideal, 1e-2)
    assert (found["moving"] == SIZE - 1).all()  # the median is one of the values
    assert found["path"][0].max() < 1e-12 < 0.1 < found["path"][-1].min()


def test_compressed_start_is_p1s(drawn):
    target, unit, _ = drawn
    problem, scales = cd.MatrixFactorization(target), [0.9, 0.5, 0.7]
    start = [scale * factor for scale, factor in zip(scales, unit, strict=True)]
    for ours, theirs in zip(
        edges.compressed_start(problem, start, RANK, scales),
        cd.compress_from_gradient(problem, start, RANK),
        strict=True,
    ):
        torch.testing.assert_close(ours.expand_as(theirs), theirs)


def test_spoiled_runs_stay_within_the_bound_and_grow_in_proportion(drawn, ideal):
    found = {
        "start": edge_levels.start_edge(ideal, drawn[2], STRENGTHS),
        "noise": edge_levels.noise_edge(ideal, STRENGTHS, _generator(2)),
        "tail": edge_levels.decay_edge(ideal, [30.0, 20.0, 12.0, 4.0]),
        "inputs": edge_levels.input_edge(ideal, STRENGTHS, 10 * SIZE, _generator(2)),
    }
    for name, one in found.items():
        assert one["over_bound"].max() < 1 + 1e-6, name
        near = one["strength"].mean(1) < 1e-2
        assert (one["departure"] > one["bound"] / 20)[near].all(), (
            f"{name}: a bound twenty times too large bounds nothing"
        )
        assert one["slope_error"].max() < 0.05, name
        assert (one["block"] <= one["departure"] * (1 + 1e-9)).all(), name
        assert (one["values"] <= one["departure"] * (1 + 1e-9)).all(), f"{name}: Weyl"


def test_departure_bound_is_zero_for_the_theorem_and_adds_up(ideal):
    assert ideal.bound().max() == 0
    small = [ideal.bound(**{kind: 1e-8})[-1] for kind in ("start", "tail", "skew")]
    together = ideal.bound(start=1e-8, tail=1e-8, skew=1e-8)[-1]
    torch.testing.assert_close(sum(small), together, rtol=1e-5, atol=0)
    assert ideal.bound(tail=1e6)[-1].isinf().all(), "past use it is infinite, not NaN"
    with pytest.raises(ValueError, match="tail"):
        ideal.bound(tail=-1.0)


def test_slope_needs_two_levels_near_zero():
    with pytest.raises(ValueError, match="two levels"):
        edge_levels.slope(torch.tensor([[1e-3], [0.5]]), torch.ones(2, 1))
    x = torch.tensor([[1e-4], [1e-3], [1e-2], [1.0]], dtype=torch.float64)
    assert edge_levels.slope(x, 3 * x**2).item() == pytest.approx(2)


def test_gaussian_factors_are_gaussian_about_their_polar_part():
    unit, stretch = edge_levels.gaussian_factors(200, 2, 1, _generator())
    torch.testing.assert_close(unit[0].mT @ unit[0], torch.eye(200, dtype=torch.float64)[None])
    gaussian = unit[0] @ stretch[0]
    assert gaussian.std().item() == pytest.approx(200**-0.5, rel=0.02)
    values = torch.linalg.svdvals(gaussian)[0]
    for share in (0.1, 0.5, 0.9):
        assert values.quantile(share).item() == pytest.approx(theory.quarter_circle_value(share), abs=0.03)
    with pytest.raises(ValueError, match="share"):
        theory.quarter_circle_value(1.0)


def test_frozen_floor_and_energy_are_least_squares(drawn):
    target = drawn[0] + 0.1 * torch.randn(drawn[0].shape, generator=_generator(8), dtype=torch.float64)
    left, right = drawn[1][0][..., :4], drawn[1][1][..., :4].mT
    basis = torch.einsum("sik,slj->sijkl", left, right).reshape(SEEDS, SIZE * SIZE, 16)
    best = torch.linalg.lstsq(basis, target.reshape(SEEDS, -1, 1)).solution
    rest = (target.reshape(SEEDS, -1, 1) - basis @ best).flatten(1).norm(dim=1)
    torch.testing.assert_close(theory.frozen_floor(target, left, right), rest)
    u, s, v = torch.linalg.svd(target)
    cut = (u[..., :3] * s[:, None, :3]) @ v[:, :3]
    torch.testing.assert_close(theory.energy_outside(target, 3), matrix_norm(target - cut))


def test_updates_of_gaussian_starts_are_within_their_bound(drawn):
    target, unit, stretch = drawn
    starts = {"gaussian": [factor @ part for factor, part in zip(unit, stretch, strict=True)], "orthogonal": unit}
    found = edge_runs.low_rank_updates(target, starts, RANK, [0.1, 1.0], 2.0, 400)
    for name in starts:
        assert (found[f"{name}/over_bound"] <= 1 + 1e-6).all()
        assert (found[f"{name}/outer"] > found[f"{name}/bound"] / 20).all()
        assert (found[f"{name}/smallest"] < 0.01).all()
        assert (found[f"{name}/outer"][1] > 0.05).all(), "at scale one the update is not of low rank"


def test_low_guess_ends_at_its_floor(drawn):
    target, unit, _ = drawn
    found = edge_runs.low_guesses(target, unit, [1, 2], 0.3, 4.0, 3000, 0.1)
    assert found["below_floor"].max() <= 1 + 1e-9
    assert found["gap_over_floor"].max() < 0.01
    assert (found["floor"][0] > found["missing"][0]).all(), "frozen bases miss more than their width must"
    assert found["missing"].max() < 1e-12, "width 2 r-hat = 2 holds rank 2"
    assert (found["floor"][1] < 1e-12).all(), "and with r-hat = r the bases are the theorem's"
    assert (found["trained"][0] <= found["frozen"][0] + 1e-9).all()
    with pytest.raises(ValueError, match="rank_guesses"):
        edge_runs.low_guesses(target, unit, [2, 3], 0.3, 4.0, 10, 0.1)


def test_authors_regression_is_exact_on_white_inputs_only():
    found = edge_runs.authors_inputs(20, 2, 3, 20, 60, 2, _generator())
    assert (found["white/moving"][:, -1] == 4).all()
    assert found["white/drift"].max() < 1e-12
    assert found["white/angle"].max() < 1e-6
    assert (found["gaussian/angle"][:, -1] > 1e-3).all()
    assert (found["drift"] < 0.05).all()
    assert (found["kappa"] > 1.5).all()


def test_table_says_exact_and_slopes(ideal, drawn):
    noise = edge_levels.noise_edge(ideal, STRENGTHS, _generator(2))
    found = {f"plain/{key}": value for key, value in edge_runs.exactness(ideal).items()}
    found |= {f"noise/{key}": value for key, value in noise.items()}
    table = edge_runs.statement_table(found, ["plain"], ["noise"])
    assert table.loc["plain", "values that move"] == "exactly 2r"
    assert table.loc["noise", "middle subspace"].startswith("slope 1.00")
