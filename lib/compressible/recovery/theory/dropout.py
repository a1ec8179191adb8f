"""P3's Example 4.1: what dropout on the hidden units of two linear factors comes to, in closed form.

W_1 (h, n), W_2 (m, h), h hidden units, inputs X (n, N), outputs Y (m, N); theta is the probability with which a unit is
kept, so that "dropout 60 %" means theta = 0.4, and what is kept is divided by theta (inverted scaling, PyTorch's). With
lambda = (1 - theta) / theta, w2_i the columns of W_2 and (W_1 X)_i the rows of W_1 X,

    E ||Y - W_2 diag(z) W_1 X / theta||_F^2 = ||Y - W_2 W_1 X||_F^2 + lambda sum_i ||w2_i||^2 ||(W_1 X)_i||^2,

whether one mask z serves all examples or each has its own. That P3 means this, the setting of Cavazza et al. (2018,
arXiv 1710.05092), is our inference. With X X^T = I the least penalty of a product M is lambda ||M||_*^2 / h (h >= its
rank): a squared nuclear norm, which fades as h grows unless theta is scaled.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from compressible.recovery.checks import expect_finite_matrix
from compressible.recovery.factors import Factors, product
from compressible.runtime.checks import expect, expect_integer


def strength(keep: float | Tensor) -> float | Tensor:
    """Return lambda = (1 - theta) / theta (...) of a keep rate theta in (0, 1]; ValueError for another."""
    rates = torch.as_tensor(keep)
    expect("keep", keep, bool(((rates > 0) & (rates <= 1)).all()), "keep rates in (0, 1]")
    return (1 - keep) / keep


def penalty(factors: Sequence[Tensor], inputs: Tensor | None = None) -> Tensor:
    """Return sum_i ||w2_i||^2 ||(W_1 X)_i||^2 (...) of [W_1, W_2]; without inputs X X^T = I."""
    hidden = factors[0] if inputs is None else factors[0] @ inputs
    return (factors[1].square().sum(-2) * hidden.square().sum(-1)).sum(-1)


def expected_loss(
    outputs: Tensor, factors: Sequence[Tensor], keep: float | Tensor, inputs: Tensor | None = None
) -> Tensor:
    """Return the mean over masks of ||Y - W_2 diag(z) W_1 X / theta||_F^2 in closed form.

    Args:
        outputs: Y (..., m, N).
        factors: [W_1 (..., h, n), W_2 (..., m, h)].
        keep: theta in (0, 1], the probability with which a hidden unit is kept; a number or (...).
        inputs: X (..., n, N); without them X = I, N = n.

    Returns:
        The expected loss (...), a sum over outputs and examples.

    Raises:
        ValueError: on a keep rate out of range.

    Example:
        >>> import torch
        >>> from compressible.recovery.theory import dropout
        >>> ones = torch.ones(1, 1)  # z is 0 or 1, W_2 diag(z) W_1 / 0.4 is 0 or 2.5: 0.6 * 1 + 0.4 * 1.5^2
        >>> round(dropout.expected_loss(ones, [ones, ones], keep=0.4).item(), 6)
        1.5

    Reference:
        P3, Example 4.1; Cavazza et al. (2018), equation 5 with their mask divided by theta.
    """
    whole = product(factors) if inputs is None else product(factors) @ inputs
    return (outputs - whole).square().sum((-2, -1)) + strength(keep) * penalty(factors, inputs)


def least_penalty(matrix: Tensor, width: int) -> Tensor:
    """Return ||M||_*^2 / h (...), the least `penalty` of factors with product M (..., m, n), X X^T = I.

    By Cauchy and Schwarz no factors have less, and `equalised_factors` have as much. Raises ValueError where the width
    h is too small for some product of this shape.
    """
    expect_finite_matrix("matrix", matrix)
    least = min(matrix.shape[-2:])
    width = expect_integer("width", width, least, told=f"an integer and at least min(m, n) = {least}")
    return torch.linalg.svdvals(matrix).sum(-1).square() / width


def equalised_factors(matrix: Tensor, width: int) -> Factors:
    """Return [W_1 (h, n), W_2 (m, h)] with product M (m, n) whose hidden units all have the same norms.

    W_2 = U S^1/2 Q^T and W_1 = Q S^1/2 V^T, where Q S Q^T has a constant diagonal. Such a rotation always exists (Schur
    and Horn): each of h - 1 plane rotations puts one entry of the diagonal at the mean.

    Args:
        matrix: M (m, n).
        width: h, at least min(m, n).

    Returns:
        Two balanced factors whose `penalty` is `least_penalty`.

    Raises:
        ValueError: where the width is too small.

    Example:
        >>> import torch
        >>> from compressible.recovery.theory import dropout
        >>> factors = dropout.equalised_factors(torch.diag(torch.tensor([3.0, 1.0])), width=4)
        >>> round(dropout.penalty(factors).item(), 4), factors[0].square().sum(1).numpy().round(4).tolist()
        (4.0, [1.0, 1.0, 1.0, 1.0])

    Reference:
        Mianjy, Arora and Vidal (2018), whose equalisation this is; P3, Example 4.1.
    """
    least_penalty(matrix, width)  # refuses a width that is too small
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    roots = torch.zeros(width, len(values), dtype=matrix.dtype, device=matrix.device)
    roots.diagonal().copy_(values.sqrt())
    rotated = equalising_rotation(roots @ roots.mT) @ roots
    return [rotated @ right, left @ rotated.mT]


def equalising_rotation(gram: Tensor) -> Tensor:
    """Return an orthogonal Q (h, h) for which Q G Q^T has a constant diagonal, G (h, h) symmetric."""
    size, mean = len(gram), (gram.trace() / len(gram)).item()
    turned, rotation = gram.clone(), torch.eye(size, dtype=gram.dtype, device=gram.device)
    for _ in range(size - 1):
        low, high = int(turned.diagonal().argmin()), int(turned.diagonal().argmax())
        if turned[high, high] - turned[low, low] <= 4 * torch.finfo(gram.dtype).eps * abs(mean):
            break
        plane = _to_mean(turned[low, low].item(), turned[low, high].item(), turned[high, high].item(), mean)
        rows = torch.tensor([low, high], device=gram.device)
        rotation[rows] = plane.to(gram) @ rotation[rows]
        turned = rotation @ gram @ rotation.mT
    return rotation


def squared_nuclear_threshold(values: Tensor, weight: float | Tensor) -> Tensor:
    """Return the level mu (...) by which the minimiser of ||Y - X||_F^2 + c ||X||_*^2 shrinks singular values.

    mu = c kappa_q / (1 + c q), kappa_q the sum of the q largest of `values` (..., k), descending, q the largest number
    with s_q > mu; c = `weight` >= 0, a number or (...).
    """
    c = torch.as_tensor(weight, dtype=values.dtype, device=values.device)
    expect("weight", weight, bool((c >= 0).all()), "numbers >= 0")
    counts = torch.arange(1, values.shape[-1] + 1, dtype=values.dtype, device=values.device)
    levels = c[..., None] * values.cumsum(-1) / (1 + c[..., None] * counts)
    kept = (values > levels).sum(-1, keepdim=True)
    return torch.where(kept > 0, levels.gather(-1, (kept - 1).clamp(min=0)), values[..., :1])[..., 0]


def squared_nuclear_shrinkage(target: Tensor, weight: float | Tensor) -> Tensor:
    """Return the minimiser of ||Y - X||_F^2 + c ||X||_*^2, soft thresholding at a level that Y itself sets.

    With c = lambda / h it is the product of the best two factors with h hidden units under dropout.

    Args:
        target: Y (..., m, n), floating point.
        weight: c >= 0, a number or (...) of them.

    Returns:
        X (..., m, n), unique.

    Raises:
        ValueError: on a negative weight.

    Example:
        >>> import torch
        >>> from compressible.recovery.theory import dropout
        >>> dropout.squared_nuclear_shrinkage(torch.diag(torch.tensor([3.0, 1.0])), weight=1.0).diagonal()
        tensor([1.5000, 0.0000])

    Reference:
        P3, Example 4.1; Cavazza et al. (2018), Theorem 3 (data-dependent thresholding).
    """
    expect_finite_matrix("target", target)
    left, values, right = torch.linalg.svd(target, full_matrices=False)
    level = squared_nuclear_threshold(values, weight)[..., None]
    return (left * (values - level).clamp(min=0)[..., None, :]) @ right


def scaled_keep_rate(base: float, width: int) -> float:
    """Return theta(h) = p / (h - (h - 1) p), for which lambda / h is (1 - p) / p whatever the width h.

    `base` is p in (0, 1], the keep rate of a single unit. Raises ValueError on another p or a width below 1.
    """
    expect("base", base, 0 < base <= 1, "a keep rate in (0, 1]")
    width = expect_integer("width", width, 1)
    return base / (width - (width - 1) * base)


def _to_mean(low: float, cross: float, high: float, mean: float) -> Tensor:
    """The plane rotation [[c, s], [-s, c]] after which [[low, cross], [cross, high]] begins with `mean`."""
    # low c^2 + 2 cross c s + high s^2 = mean with t = s / c: (high - mean) t^2 + 2 cross t + low - mean = 0.
    root = (cross**2 + (high - mean) * (mean - low)) ** 0.5
    # Its roots, written so that the smaller one does not cancel.
    first, second = (mean - low) / (cross + root), (mean - low) / (cross - root)
    tangent = first if abs(first) <= abs(second) else second
    cosine = 1 / (1 + tangent**2) ** 0.5
    turn = [[cosine, tangent * cosine], [-tangent * cosine, cosine]]
    return torch.tensor(turn, dtype=torch.float64, device="cpu")
