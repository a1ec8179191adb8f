"""Optimisers that turn with the basis, and what of P1's theorem each leaves standing."""

import numpy as np
import pytest
import torch

import compressible as cd
from compressible.experiments import edges, optimisers
from compressible.networks.optim.basis_free import Muon, ScalarAdam, newton_schulz, polar_factor
from compressible.recovery.theory import edges as theory

SIZE, RANK, SEEDS, STEPS = 14, 2, 2, 25
OURS = [(ScalarAdam, {"eps": 0.0}), (Muon, {}), (Muon, {"nesterov": False}), (Muon, {"newton_schulz": 5})]


def _generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def drawn():
    g = _generator()
    target = cd.low_rank_target((SIZE, SIZE), RANK, (SEEDS,), g)
    return target, cd.orthogonal_factors((SIZE, SIZE), 3, scale=1.0, generator=g, batch_shape=(SEEDS,))


@pytest.fixture(scope="module")
def held():
    return optimisers.optimisers(0.9, 0.95)


def _walk(optimizer, options, gradients, lr=0.1):
    weight = torch.nn.Parameter(torch.zeros_like(gradients[0]))
    stepper = optimizer([weight], lr=lr, **options)
    for gradient in gradients:
        weight.grad = gradient
        stepper.step()
    return weight.detach()


def _gradients(count=6, shape=(4, 6), seed=1):
    return list(torch.randn(count, *shape, generator=_generator(seed), dtype=torch.float64))


def _turn(size, seed):
    return torch.linalg.qr(torch.randn(size, size, generator=_generator(seed), dtype=torch.float64)).Q


@pytest.mark.parametrize(("optimizer", "options"), OURS)
def test_steps_turn_with_the_basis(optimizer, options):
    left, right = _turn(4, 7), _turn(6, 8)
    plain = _walk(optimizer, options, _gradients())
    turned = _walk(optimizer, options, [left @ gradient @ right for gradient in _gradients()])
    torch.testing.assert_close(turned, left @ plain @ right, rtol=0, atol=1e-12)
    assert plain.norm() > 0.1


def test_adam_does_not_turn_with_the_basis():
    left = _turn(4, 7)
    plain = _walk(torch.optim.Adam, {}, _gradients())
    turned = _walk(torch.optim.Adam, {}, [left @ gradient for gradient in _gradients()])
    assert (turned - left @ plain).abs().max() > 1e-2


@pytest.mark.parametrize(("optimizer", "options"), OURS)
def test_a_stack_is_its_matrices_alone(optimizer, options):
    together = _walk(optimizer, options, _gradients(shape=(3, 4, 6)))
    for index, alone in enumerate(together):
        one = _walk(optimizer, options, [gradient[index] for gradient in _gradients(shape=(3, 4, 6))])
        torch.testing.assert_close(one, alone, rtol=0, atol=1e-13)


def test_scalar_adam_of_single_entries_is_adam():
    gradients = _gradients(shape=(5, 1, 1))
    torch.testing.assert_close(
        _walk(ScalarAdam, {}, gradients), _walk(torch.optim.Adam, {}, gradients), rtol=1e-12, atol=0
    )


def test_scalar_adam_divides_by_the_mean_square_of_a_matrix():
    gradients = _gradients(2)
    second = sum(0.01 * 0.99 ** (1 - t) * gradient.square().mean() for t, gradient in enumerate(gradients))
    first = 0.05 * gradients[1] + 0.95 * 0.05 * gradients[0]
    last = 0.1 * (first / (1 - 0.95**2)) / (second / (1 - 0.99**2)).sqrt()
    before = 0.1 * gradients[0] / gradients[0].square().mean().sqrt()
    found = _walk(ScalarAdam, {"betas": (0.95, 0.99), "eps": 0.0}, gradients)
    torch.testing.assert_close(found, -(before + last))


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon came with PyTorch 2.9")
@pytest.mark.parametrize("shape", [(4, 6), (6, 4)])
@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_is_pytorchs_but_for_bfloat16(shape, nesterov):
    gradients, common = _gradients(shape=shape), {"nesterov": nesterov}
    plain = {"weight_decay": 0.0, "adjust_lr_fn": "match_rms_adamw"} | common  # 0.2 (6)^(1/2) lr for either shape
    theirs = _walk(torch.optim.Muon, plain, gradients)
    ours = _walk(Muon, {"newton_schulz": 5} | common, gradients, lr=0.1 * 0.2 * 6**0.5)
    assert (ours - theirs).norm() / theirs.norm() < 0.05
    exact = _walk(Muon, common, gradients, lr=0.1 * 0.2 * 6**0.5)
    assert (ours - exact).norm() / exact.norm() > 0.02, "five steps are not the polar factor"


def test_polar_factor_and_its_iteration():
    matrix = _gradients(1)[0]
    polar = polar_factor(matrix)
    torch.testing.assert_close(polar @ polar.mT, torch.eye(4, dtype=torch.float64))
    torch.testing.assert_close(polar.mT @ matrix, (polar.mT @ matrix).mT)  # U S V^T with U^T of it symmetric
    values = torch.linalg.svdvals(newton_schulz(matrix))
    assert ((values > 0.6) & (values < 1.3)).all()


@pytest.mark.parametrize(("optimizer", "options"), OURS)
def test_a_zero_gradient_moves_nothing(optimizer, options):
    """A zero matrix in a stack stands still, the others go as they do alone; rows of zeros stand still, too."""
    gradients = _gradients(shape=(3, 4, 6))
    for gradient in gradients:
        gradient[1] = 0
        gradient[2, :, 3:] = 0
    found = _walk(optimizer, options if optimizer is Muon else {}, gradients)
    assert not found[1].any() and not found[2, :, 4].any() and found[2, :, :3].abs().max() > 0.1
    alone = _walk(optimizer, options if optimizer is Muon else {}, [gradient[0] for gradient in gradients])
    torch.testing.assert_close(found[0], alone, rtol=0, atol=1e-13)


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("shape", [(8, 5), (5, 8), (6, 6)])
def test_muon_moves_the_directions_of_its_gradient_alone(rank, shape):
    g = _generator(3)
    gradient = cd.low_rank_target(shape, rank, generator=g)
    moved = torch.linalg.svdvals(_walk(Muon, {"rtol": 1e-14}, [gradient]))
    assert moved.tolist() == pytest.approx([0.1] * rank + [0] * (min(shape) - rank), abs=1e-14)
    iterated = torch.linalg.svdvals(_walk(Muon, {"newton_schulz": 5}, [gradient]))
    assert (iterated > 1e-12).sum() == rank
    left, _, right = torch.linalg.svd(gradient, full_matrices=False)
    expected = left[:, :rank] @ right[:rank]
    torch.testing.assert_close(polar_factor(gradient, 1e-14), expected, rtol=0, atol=1e-13)
    torch.testing.assert_close(polar_factor(1e-12 * gradient, 1e-14), expected, rtol=0, atol=1e-13)


def test_the_polar_factor_of_a_matrix_of_full_rank_is_that_of_its_decomposition_to_the_last_bit():
    for matrix in [*_gradients(3), *_gradients(3, (2, 7, 7)), *_gradients(2, (7, 3))]:
        left, _, right = torch.linalg.svd(matrix, full_matrices=False)
        assert torch.equal(polar_factor(matrix), left @ right) and torch.equal(
            polar_factor(matrix, 1e-14), left @ right
        )


@pytest.mark.parametrize(
    ("optimizer", "options", "named"),
    [
        (ScalarAdam, {"lr": -1.0}, "lr is -1"),
        (ScalarAdam, {"betas": (0.9, 1.0)}, "betas are"),
        (Muon, {"momentum": 1.0}, "momentum is 1"),
        (Muon, {"newton_schulz": -1}, "newton_schulz is -1"),
        (Muon, {"rtol": 1.0}, "rtol is 1"),
    ],
)
def test_arguments_out_of_range_are_refused(optimizer, options, named):
    with pytest.raises(ValueError, match=named):
        optimizer([torch.nn.Parameter(torch.zeros(2, 2))], **options)
    with pytest.raises(ValueError, match=r"shape \(3,\)"):
        optimizer([torch.nn.Parameter(torch.zeros(3))])


def test_polar_recursion_walks_at_full_rate_and_overshoots():
    rhos = theory.momentum_rho([0.1] * 3, 0.03, 7, 0.95, nesterov=True, polar=True)[:, 0]
    assert rhos.tolist() == pytest.approx([0.1, 0.07, 0.04, 0.01, -0.02, -0.05, -0.08, -0.11])


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon came with PyTorch 2.9")
def test_one_by_one_is_the_stack(drawn):
    target, unit = drawn
    problem = cd.MatrixFactorization(target)
    for options in ({"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}):
        ends = [list(edges.iterates(problem, unit, 1.0, 9, one_by_one=one, **options))[-1] for one in (False, True)]
        for together, apart, first in zip(*ends, unit, strict=True):
            torch.testing.assert_close(apart, together, rtol=0, atol=1e-14)
            assert (apart - first).abs().max() > 1e-3


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon came with PyTorch 2.9")
def test_what_turns_with_the_basis_keeps_the_blocks(drawn, held):
    keep = {"gradient descent", "heavy ball", "Nesterov", "Muon", "quintic Muon", "scalar Adam"}
    for name, optimiser in held.items():
        if optimiser.matched:
            continue
        found = optimisers.structure(*drawn, RANK, 1.0, optimiser, 1.0 if optimiser.steepest else 1e-2, STEPS)
        assert (found["most_moved"] == 2 * RANK).all() == (name in keep), name  # Muon's may come back by chance
        assert (found["largest_deviation"] < 1e-12).all() == (name in keep), name
        assert (found["loss"] < 1).all(), name
        if "recursion_error" in found:
            assert found["recursion_error"].max() < 1e-12, name
            assert abs(found["recursion"][-1] - 1) > 1e-2, "rho must move, or the recursion says nothing"


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon came with PyTorch 2.9")
def test_the_compressed_network_follows_without_a_mean_over_the_matrix(drawn, held):
    target, _ = drawn
    for name in ("gradient descent", "heavy ball", "Nesterov"):
        rate = optimisers.settled_rate(target, 3, 0.4, held[name].momentum)
        found = optimisers.compression(*drawn, RANK, 0.1, held[name], rate, 200, 50)
        assert found["law_error"].max() < 1e-11, name
        assert found["over_bound"].max() < 1 + 1e-9, name
        assert (found["wide"] < 0.05).all(), f"{name}: the target must be learned, or following it says nothing"
    for name, follows in {"scalar Adam": False, "scalar Adam, matched": True, "Adam, matched": False}.items():
        found = optimisers.compression(*drawn, RANK, 0.1, held[name], 1e-2, 100, 50)
        assert (found["missed"] > 0.3).all() != follows, name
        assert (found["law_error"] < 1e-3).all() == follows, name


def test_table_has_a_row_for_each(held):
    name, numbers = "d/Muon", {"least_moved": np.array([4, 4]), "most_moved": np.array([4, 5])}
    found = {f"{name}/{key}": value for key, value in numbers.items()} | {f"{name}/loss": np.array([0.5, 0.25])}
    table = optimisers.verdict_table(found, ["Muon", "Adam"], "d")
    assert table.loc["Muon", "values that move"] == "4 to 5"
    assert table.loc["Muon", "loss left"] == "5.0e-01"
    assert (table.loc["Adam"] == "-").all()
