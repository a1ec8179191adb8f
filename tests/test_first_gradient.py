"""From the first gradient to factors: against the paper's literal construction, and against a full decomposition."""

import pytest
import torch

import compressible as cd
from compressible.recovery.problems import DenseProblem
from compressible.runtime.starting_factors import compressed_chain, compressed_frames, span_and_image
from compressible.runtime.weight_gradients import GradientSink, top_frames


def _literal(m, n, depth, rank, seed):
    """The construction of the paper on explicit full-width factors, for one layer with a linear loss <G, X>."""
    g = torch.Generator().manual_seed(seed)
    gradient = torch.randn(m, n, generator=g, dtype=torch.float64) @ torch.diag(
        torch.logspace(0, -3, n, dtype=torch.float64)
    )
    factors = cd.orthogonal_factors((m, n), depth, None, 1e-2, g)

    class Linear(DenseProblem):
        def gradient(self, product, out=None):
            return gradient

    problem = Linear()
    problem.shape, problem.batch_shape = (m, n), ()
    return gradient, factors, cd.compress_from_gradient(problem, factors, rank)


@pytest.mark.parametrize(("m", "n"), [(16, 16), (12, 16), (16, 11)])
def test_the_closed_form_is_the_literal_construction(m, n):
    gradient, factors, small = _literal(m, n, 3, 2, seed=m + n)
    q = cd.product(factors) / 1e-6
    left, _, right = torch.linalg.svd(gradient, full_matrices=False)
    left, right = left[:, :2], right[:2].mT
    if m <= n:
        first = q.mT @ left
        beside = q @ torch.linalg.qr(right - first @ (first.mT @ right)).Q
        v, u = span_and_image(first, right, left, beside)
    else:
        first = q @ right
        beside = q.mT @ torch.linalg.qr(left - first @ (first.mT @ left)).Q
        u, v = span_and_image(first, left, right, beside)
    expected = small[-1] @ small[0]
    torch.testing.assert_close(u @ v.mT, expected, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize(("m", "n"), [(16, 16), (12, 16), (16, 11)])
def test_drawn_frames_have_what_the_closed_form_needs(m, n):
    g = torch.Generator().manual_seed(0)
    left = torch.linalg.qr(torch.randn(m, 2, generator=g)).Q
    right = torch.linalg.qr(torch.randn(n, 2, generator=g)).Q
    v, u = compressed_frames(left, right, (m, n), g)
    eye = torch.eye(4)
    square = v if m <= n else u  # the side on which the width is max(m, n)
    torch.testing.assert_close(square.mT @ square, eye, rtol=1e-4, atol=1e-5)
    if m == n:
        torch.testing.assert_close(u.mT @ u, eye, rtol=1e-4, atol=1e-5)
    inside = v @ (v.mT @ right) if m <= n else u @ (u.mT @ left)
    torch.testing.assert_close(inside, right if m <= n else left, rtol=1e-4, atol=1e-5)
    assert torch.linalg.matrix_rank(torch.cat([u, left], 1)) == 4
    assert torch.linalg.matrix_rank(torch.cat([v, right], 1)) == 4


@pytest.mark.parametrize(("m", "n"), [(9, 9), (6, 9), (12, 5)])
def test_leading_frames_are_those_of_a_full_decomposition(m, n):
    gradient = torch.randn(2, m, n, generator=torch.Generator().manual_seed(0))
    left, values, right = torch.linalg.svd(gradient, full_matrices=False)
    mine, theirs = top_frames(gradient, 3)
    signs = (mine * left[..., :3]).sum(-2).sign()[:, None]
    torch.testing.assert_close(mine * signs, left[..., :3], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(theirs * signs, right.mT[..., :3], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close((mine.mT @ gradient @ theirs).diagonal(dim1=-2, dim2=-1), values[:, :3])


def test_the_generator_decides():
    left, right = top_frames(torch.randn(8, 6, generator=torch.Generator().manual_seed(0)), 2)
    first, again, other = (
        compressed_chain(left, right, (8, 6), 3, 0.1, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert [tuple(factor.shape) for factor in first] == [(4, 6), (4, 4), (4, 4), (4, 4), (8, 4)]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0]) and torch.equal(first[1], 0.1 * torch.eye(4))


def test_one_bad_gradient_leaves_the_others_frames():
    stack = torch.randn(3, 6, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    bad = stack.clone()
    bad[1, 2, 3] = torch.nan
    for mine, theirs in zip(top_frames(bad, 2), top_frames(stack, 2), strict=True):
        torch.testing.assert_close(mine[[0, 2]], theirs[[0, 2]], rtol=1e-9, atol=1e-9)
        assert mine[1].isnan().all()


def test_gradients_are_summed_in_float32_where_autocast_is_on_in_the_backward_pass():
    """As it is in a GPU's: there autocast made the sum, and with it the start, half precision."""
    g = torch.Generator().manual_seed(1)
    x, grad = torch.randn(40, 6, generator=g), torch.randn(40, 5, generator=g).bfloat16()
    plain, cast = GradientSink(torch.nn.Linear(6, 5), 2), GradientSink(torch.nn.Linear(6, 5), 2)
    plain.pending = cast.pending = 1
    plain.add(x, grad)
    with torch.autocast("cpu", torch.bfloat16):
        cast.add(x, grad)
    for one, other in zip(cast.frames, plain.frames, strict=True):
        assert one.dtype is torch.float32
        torch.testing.assert_close(one, other, rtol=0, atol=0)
