"""Both compressed starts, against the literal constructions and against what they promise."""

import math

import pytest
import torch

import compressible as cd
from compressible.recovery import spectra
from compressible.recovery.compression import invariant_directions, orthogonal_scale


def _completion(shape=(24, 24), rank=3, observed=0.4, seed=0, batch=()):
    g = torch.Generator().manual_seed(seed)
    target = cd.low_rank_target(shape, rank, batch, g)
    return cd.MatrixCompletion(target, cd.random_mask(shape, observed, batch, g), mean_over="all"), g


def directions_by_intersection(gradient, first, rank):
    """Return V (d, 2 rank) by the literal construction: the complement of an intersection of null spaces.

    gradient g = dLoss/dW_1 (d, d), first W_1 / eps (d, d) orthogonal. Costs full SVDs of (d, d) and (d, 2d) matrices.
    """
    left, _, right = torch.linalg.svd(gradient)
    through, still = first.mT @ left[:, rank:], right.mT[:, rank:]
    null = torch.linalg.svd(torch.cat([through, -still], 1)).Vh.mT[:, gradient.shape[-1] :]
    resting = through @ null[: through.shape[1]]
    basis = torch.linalg.svd(resting).U
    return basis.flip(-1)[:, : 2 * rank]


def directions_by_stacking(gradient, first, rank):
    """Return V (d, 2 rank), another reference: the top right singular vectors of the stack [g; g^T W_1 / eps]."""
    stacked = torch.cat([gradient, gradient.mT @ first], 0)
    return torch.linalg.svd(stacked, full_matrices=False).Vh.mT[:, : 2 * rank]


@pytest.mark.parametrize("scale", [1.0, 0.1, 1e-3])
@pytest.mark.parametrize("depth", [2, 3, 4])
def test_three_constructions_span_one_subspace(scale, depth):
    """Thin SVD, null spaces and stacking under full observation; stacking mixes scales: exact in float64 only."""
    g = torch.Generator().manual_seed(1)
    problem = cd.MatrixFactorization(cd.low_rank_target((20, 20), 2, generator=g))
    factors = cd.orthogonal_factors((20, 20), depth=depth, scale=scale, generator=g)
    gradient, first = problem.factor_gradients(factors)[0], factors[0] / scale
    chosen = invariant_directions(gradient, first, 2)
    for other in (directions_by_intersection, directions_by_stacking):
        angles = spectra.principal_angles(chosen, other(gradient, first, 2))
        assert angles.max() < 1e-8, other.__name__


@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_literal_second_svd_gives_the_same_span(scale):
    problem, g = _completion()
    factors = cd.orthogonal_factors((24, 24), scale=scale, generator=g)
    gradient = problem.factor_gradients(factors)[0]
    top = torch.linalg.svd(gradient).Vh[:3].mT
    second = torch.linalg.svd(gradient.mT @ factors[0]).Vh[:3].mT
    literal = torch.linalg.qr(torch.cat([top, second], 1)).Q
    assert spectra.principal_angles(literal, invariant_directions(gradient, factors[0] / scale, 3)).max() < 1e-9


@pytest.mark.parametrize("shape", [(16, 16), (12, 16), (16, 12)])
@pytest.mark.parametrize("batch", [(), (3,)])
def test_gradient_start_has_the_documented_form(shape, batch):
    problem, g = _completion(shape, 2, batch=batch)
    factors = cd.orthogonal_factors(shape, depth=3, scale=0.2, generator=g, batch_shape=batch)
    small = cd.compress_from_gradient(problem, factors, rank=2)
    assert [tuple(f.shape) for f in small] == [(*batch, 4, shape[1]), *[(*batch, 4, 4)] * 3, (*batch, shape[0], 4)]
    eye = torch.eye(4, dtype=torch.float64).expand(*batch, 4, 4)
    for inner in small[1:-1]:
        torch.testing.assert_close(inner, 0.2 * eye)
    square = small[0].mT if shape[0] <= shape[1] else small[-1]
    torch.testing.assert_close(square.mT @ square, eye, rtol=0, atol=1e-12)
    # On its subspace the compressed product is the wide one: f V = f_C V (or V^T f for the transposed case).
    wide, narrow = cd.product(factors), cd.product(small)
    pair = (wide @ square, narrow @ square) if shape[0] <= shape[1] else (square.mT @ wide, square.mT @ narrow)
    torch.testing.assert_close(*pair, rtol=0, atol=1e-14)


def test_transposing_the_problem_transposes_the_start():
    problem, g = _completion((10, 14), 2)
    factors = cd.orthogonal_factors((10, 14), scale=0.3, generator=g)
    other = cd.MatrixCompletion(problem.target.mT, problem.mask.mT, mean_over="all")
    flipped = cd.compress_from_gradient(other, [f.mT.contiguous() for f in reversed(factors)], rank=2)
    torch.testing.assert_close(cd.product(flipped).mT, cd.product(cd.compress_from_gradient(problem, factors, rank=2)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("depth", [2, 3, 5])
@pytest.mark.parametrize("batch", [(), (2,)])
def test_spectral_start(dtype, depth, batch):
    g = torch.Generator().manual_seed(0)
    target = cd.low_rank_target((9, 7), 2, batch, g, dtype)
    small = cd.compress_spectral(cd.MatrixFactorization(target), width=4, depth=depth, scale=1e-2)
    assert len(small) == depth and all(f.dtype == dtype for f in small)
    assert small[0].shape == (*batch, 4, 7) and small[-1].shape == (*batch, 9, 4)
    left, _, right = torch.linalg.svd(target, full_matrices=False)
    expected = 1e-2**depth * left[..., :4] @ right[..., :4, :]
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    leading = left[..., :2].mT @ cd.product(small) @ right[..., :2, :].mT
    wanted = left[..., :2].mT @ expected @ right[..., :2, :].mT
    torch.testing.assert_close(leading, wanted, rtol=0, atol=tolerance * 1e-2**depth)


def test_no_square_null_space_is_built(monkeypatch):
    """Thin SVDs only: a full SVD of a (d, 2d) stack would be the authors' memory wall."""
    problem, g = _completion()
    factors = cd.orthogonal_factors((24, 24), generator=g)
    calls = []
    original = torch.linalg.svd

    def counted(matrix, full_matrices=True):
        calls.append((matrix.shape, full_matrices))
        return original(matrix, full_matrices=full_matrices)

    monkeypatch.setattr(torch.linalg, "svd", counted)
    cd.compress_from_gradient(problem, factors, rank=2)
    assert calls == [(torch.Size([24, 24]), False)]


@pytest.mark.parametrize(
    ("rank", "words"), [(0, "rank is 0"), (13, "rank is 13"), (2.0, "rank is 2.0"), (True, "rank is True")]
)
def test_gradient_guess_is_checked(rank, words):
    problem, g = _completion()
    with pytest.raises(ValueError, match=words):
        cd.compress_from_gradient(problem, cd.orthogonal_factors((24, 24), generator=g), rank=rank)


def test_starts_that_are_not_orthogonal_are_refused():
    problem, g = _completion()
    factors = cd.orthogonal_factors((24, 24), generator=g)
    factors[1] = factors[1] + 1e-6
    with pytest.raises(ValueError, match=r"W_2 is not a multiple of an orthogonal"):
        cd.compress_from_gradient(problem, factors, rank=2)
    with pytest.raises(ValueError, match="width is 12"):
        cd.compress_from_gradient(problem, cd.orthogonal_factors((24, 24), width=12, generator=g), rank=2)


def test_scale_of_rectangular_factors():
    for factor in cd.orthogonal_factors((5, 9), scale=0.25):
        assert orthogonal_scale(factor).item() == pytest.approx(0.25, rel=1e-12)


@pytest.mark.parametrize("bad", [{"width": 8}, {"width": 0}, {"depth": 1}, {"scale": math.inf}])
def test_spectral_arguments_are_checked(bad):
    problem = cd.MatrixFactorization(torch.ones(7, 9, dtype=torch.float64))
    with pytest.raises(ValueError, match=str(next(iter(bad.values())))):
        cd.compress_spectral(problem, **({"width": 2} | bad))


@pytest.mark.parametrize("former", [{"rank": 2}, {"width": 2, "rank": 2}, {}])
def test_the_former_name_of_the_width_is_refused_with_the_new_one(former):
    problem = cd.MatrixFactorization(torch.ones(7, 9, dtype=torch.float64))
    with pytest.raises(TypeError, match="expected width alone"):
        cd.compress_spectral(problem, **former)


def test_another_surrogate_can_be_given():
    problem = cd.MatrixFactorization(cd.low_rank_target((6, 5), 2))
    other = cd.low_rank_target((6, 5), 2, generator=torch.Generator().manual_seed(9))
    small = cd.compress_spectral(problem, 2, scale=0.5, surrogate=other)
    left = torch.linalg.svd(other).U[:, :2]
    torch.testing.assert_close((small[-1] / 0.5) @ (small[-1] / 0.5).mT, left @ left.mT)
    with pytest.raises(ValueError, match="surrogate has shape"):
        cd.compress_spectral(problem, 2, surrogate=other.mT)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("at", ["tiny", "max"])
def test_a_scale_that_leaves_the_type_is_refused(dtype, at):
    edge = getattr(torch.finfo(dtype), at)
    beyond = edge * 2 if at == "max" else edge / 2
    if math.isfinite(beyond):
        with pytest.raises(ValueError, match=r"scale is .*, expected a number from .* which torch"):
            cd.orthogonal_factors((8, 6), scale=beyond, dtype=dtype)
    held = cd.orthogonal_factors((8, 6), scale=edge, dtype=dtype, generator=torch.Generator().manual_seed(0))
    assert all(bool(factor.isfinite().all() and factor.any()) for factor in held)


def test_a_spectral_start_beyond_float32_is_refused_before_work():
    problem = cd.MatrixFactorization(torch.eye(6))
    with pytest.raises(ValueError, match=r"scale is 1e\+150, expected a number from 1.2e-38 to 3.4e\+38"):
        cd.compress_spectral(problem, 2, scale=1e150)


@pytest.mark.parametrize("scale", [1e-150, 1e150])
def test_a_gradient_start_whose_scales_multiply_to_nothing_is_refused(scale):
    problem = cd.MatrixFactorization(torch.eye(6, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"scales whose product is 2\^-?149\d, expected a product from 2.2e-308"):
        cd.compress_from_gradient(problem, cd.orthogonal_factors((6, 6), scale=scale), 2)
