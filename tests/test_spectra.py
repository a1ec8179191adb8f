"""Angles, alignments and ranks against scipy and closed forms."""

import math

import pytest
import scipy.linalg
import torch

from compressible.recovery import spectra


def _subspace(d, k, seed):
    g = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(d, k, generator=g, dtype=torch.float64)).Q


@pytest.mark.parametrize(("k1", "k2"), [(3, 3), (2, 5), (5, 2)])
def test_principal_angles_agree_with_scipy(k1, k2):
    a, b = _subspace(9, k1, 0), _subspace(9, k2, 1)
    expected = scipy.linalg.subspace_angles(a.numpy(), b.numpy())[::-1].copy()
    torch.testing.assert_close(spectra.principal_angles(a, b), torch.tensor(expected), rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("angle", [1e-12, 1e-9, 1e-4, 0.7, 1.5, math.pi / 2])
def test_small_and_large_angles_keep_their_digits(angle):
    a = torch.eye(4, 2, dtype=torch.float64)
    b = a.clone()
    b[:, 1] = torch.tensor([0, math.cos(angle), math.sin(angle), 0], dtype=torch.float64)
    angles = spectra.principal_angles(a, b)
    assert angles[1].item() == pytest.approx(angle, rel=1e-9) and angles[0] < 1e-15
    assert spectra.vector_angles(a, -b)[1].item() == pytest.approx(angle, rel=1e-9)


def test_batches():
    a = torch.stack([_subspace(8, 3, s) for s in range(4)])
    b = torch.stack([_subspace(8, 3, s + 9) for s in range(4)])
    stacked = spectra.principal_angles(a, b)
    for i in range(4):
        torch.testing.assert_close(stacked[i], spectra.principal_angles(a[i], b[i]))


def _path(times, seed=0):
    """A curve of (7, 5) matrices in three directions, far from the origin, ends far apart."""
    g = torch.Generator().manual_seed(seed)
    directions = torch.linalg.qr(torch.randn(35, 4, generator=g, dtype=torch.float64)).Q
    curve = torch.stack([5 * times, torch.sin(3 * times), 0.3 * times**2, torch.full_like(times, 9.0)], -1)
    return (curve @ directions.mT).unflatten(-1, (7, 5))


def test_principal_coordinates_are_those_of_an_svd_of_the_centred_path():
    reference, other = _path(torch.linspace(0, 1, 12).double()), _path(torch.linspace(0.2, 2, 7).double(), seed=1)
    (mine, theirs), shares = spectra.principal_coordinates(reference, other, components=3)
    centre = reference.flatten(1).mean(0)
    left, values, right = torch.linalg.svd(reference.flatten(1) - centre, full_matrices=False)
    signs = (left[:, :3] * values[:3] / mine).mean(0).round()
    assert set(signs.abs().tolist()) == {1.0}
    torch.testing.assert_close(mine, left[:, :3] * values[:3] * signs, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(theirs, (other.flatten(1) - centre) @ right[:3].T * signs, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(shares, values[:3] ** 2 / (values**2).sum(), rtol=1e-9, atol=1e-12)
    assert (mine.gather(0, mine.abs().argmax(0, keepdim=True)) > 0).all(), "a component points to the farthest point"


def test_principal_coordinates_of_the_same_path_agree_and_keep_its_distances():
    path = _path(torch.linspace(0, 1, 9).double())
    (first, second), shares = spectra.principal_coordinates(path, path, components=3)
    torch.testing.assert_close(first, second)
    torch.testing.assert_close(torch.cdist(first, first), torch.cdist(path.flatten(1), path.flatten(1)))
    assert shares.sum().item() == pytest.approx(1)
    with pytest.raises(ValueError, match="components is 4, expected 1 to the 3"):
        spectra.principal_coordinates(path, components=4)


def test_alignment_ignores_signs():
    a = _subspace(6, 3, 0)
    torch.testing.assert_close(spectra.alignment(a, -a), torch.ones(3, dtype=torch.float64))


def test_dimensions_must_agree():
    with pytest.raises(ValueError, match="9 and 8"):
        spectra.principal_angles(_subspace(9, 2, 0), _subspace(8, 2, 0))


def test_leading_angle_takes_the_side_that_turned_more():
    g = torch.Generator().manual_seed(0)
    matrix = torch.diag(torch.tensor([3.0, 2.0, 1.0, 0.5]).double())
    turn = torch.eye(4).double()
    turn[1:3, 1:3] = torch.tensor([[math.cos(0.3), -math.sin(0.3)], [math.sin(0.3), math.cos(0.3)]])
    stack = torch.stack([matrix, matrix @ turn.mT, turn @ matrix])
    torch.testing.assert_close(spectra.leading_angle(stack, matrix, 2, 2), torch.tensor([0.0, 0.3, 0.3]).double())
    torch.testing.assert_close(spectra.leading_angle(stack, matrix, 3, 2), torch.zeros(3).double(), rtol=0, atol=1e-12)
    noise = torch.randn(4, 4, generator=g, dtype=torch.float64)
    assert spectra.leading_angle(noise, matrix, 1, 1) > 0.1


def _with_values(values, shape, seed=0):
    left, right = (_subspace(size, len(values), seed + side) for side, size in enumerate(shape))
    return left * torch.tensor(values, dtype=torch.float64) @ right.mT


def test_ranks_of_known_spectra():
    """k equal values count k; shares 1/2, 1/4, 1/4 have the entropy log 2 + 1/2 log 2, so exp of it is 2^1.5."""
    equal, uneven = _with_values([3.0] * 4, (7, 9)), _with_values([2.0, 1.0, 1.0], (6, 5))
    stacked = torch.stack([uneven, 100 * uneven, 0 * uneven])
    assert spectra.effective_rank(equal).item() == pytest.approx(4, rel=1e-12)
    assert spectra.stable_rank(equal).item() == pytest.approx(4, rel=1e-12)
    assert spectra.effective_rank(stacked).tolist() == pytest.approx([2**1.5, 2**1.5, 0], rel=1e-12)
    assert spectra.stable_rank(stacked).tolist() == pytest.approx([1.5, 1.5, 0], rel=1e-12)


def test_ranks_lie_between_one_and_the_rank_and_in_order():
    """By Renyi's entropies of the squares and of the values: stable <= effective <= rank."""
    for seed in range(5):
        matrix = _with_values(torch.rand(6, generator=torch.Generator().manual_seed(seed)).tolist(), (20, 11), seed)
        stable, effective = spectra.stable_rank(matrix).item(), spectra.effective_rank(matrix).item()
        assert 1 <= stable <= effective <= 6 + 1e-9


@pytest.mark.parametrize("shape", [(7, 4), (4, 7), (5, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_singular_values_are_those_of_the_decomposition(shape, dtype):
    g = torch.Generator().manual_seed(2)
    matrix = torch.randn(3, *shape, generator=g, dtype=torch.float64).to(dtype)
    values = spectra.singular_values(matrix)
    torch.testing.assert_close(values, torch.linalg.svdvals(matrix.double()), rtol=1e-12, atol=1e-12)
    small = spectra.singular_values(_with_values([1.0, 1e-5], (30, 20)))
    assert small[1].item() == pytest.approx(1e-5, rel=1e-5) and small[2] < 1e-7


def test_a_matrix_that_is_not_finite_has_no_values_and_the_others_of_its_stack_keep_theirs():
    stack = torch.eye(3).repeat(3, 1, 1)
    stack[0, 1, 2], stack[1, 0, 0] = torch.nan, torch.inf
    values = spectra.singular_values(stack)
    assert values.isnan().all(-1).tolist() == [True, True, False] and values[2].tolist() == [1, 1, 1]
    assert spectra.effective_count(values).isnan().tolist() == [True, True, False]
    assert spectra.stable_count(values).isnan().tolist() == [True, True, False]


def test_leading_share_is_of_squares_or_of_values():
    values = torch.tensor([[4.0, 2.0, 2.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    energy, nuclear = spectra.leading_share(values, 2), spectra.leading_share(values, 2, power=1)
    assert energy[0].item() == pytest.approx(20 / 24) and nuclear[0].item() == pytest.approx(6 / 8)
    assert energy.isnan().tolist() == [False, True] and spectra.leading_share(values, 9)[0] == 1
    with pytest.raises(ValueError, match="count is 0"):
        spectra.leading_share(values, 0)


@pytest.mark.parametrize(
    "count", [spectra.stable_count, spectra.effective_count, lambda v: spectra.leading_share(v, 1)]
)
@pytest.mark.parametrize(("dtype", "scale"), [
    (torch.uint8, 10), (torch.int64, 10**17), (torch.float16, 300), (torch.bfloat16, 1e30), (torch.float32, 1e30),
    (torch.float32, 1e-30), (torch.float64, 1e200), (torch.float64, 1e-200), (torch.float64, 1e-308),
])  # fmt: skip
def test_counts_of_values_do_not_depend_on_their_scale_or_type(count, dtype, scale):
    plain = torch.tensor([[4.0, 2.0, 1.0, 0.0], [0.0] * 4], dtype=torch.float64)
    values = (plain.long() * scale if not dtype.is_floating_point else plain * scale).to(dtype)
    precision = {torch.bfloat16: 1e-2, torch.float16: 1e-3, torch.float64: 1e-14}.get(dtype, 1e-6)
    torch.testing.assert_close(count(values).double(), count(plain), rtol=precision, atol=0, equal_nan=True)


def test_values_of_ordinary_size_count_to_the_last_bit_as_before():
    values = torch.rand(50, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values = values.sort(-1, descending=True).values * torch.logspace(-9, 9, 50, dtype=torch.float64)[:, None]
    squares, shares = values.square(), values / values.sum(-1, keepdim=True)
    assert torch.equal(spectra.stable_count(values), squares.sum(-1) / squares.amax(-1))
    assert torch.equal(spectra.effective_count(values), torch.special.entr(shares).sum(-1).exp())
    for power in (0.5, 1, 2, 3):
        powers = values**power
        assert torch.equal(spectra.leading_share(values, 2, power), powers[:, :2].sum(-1) / powers.sum(-1))
