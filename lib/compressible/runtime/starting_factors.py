"""The factors from which a layer's update W_L ... W_1 starts: drawn, or from a first gradient (P1, section 4).

Of the second the literal construction starts from full-width factors eps Q_l, takes the gradient of W_1 and keeps 2 r'
= r directions of it. It needs Q = Q_L ... Q_1 only through its action on r vectors, and Q is random: for the gradient
G (m, n) of the layer, with top singular vectors P, Z (r' each), the directions are span[Z, Q^T P], where Q^T P = H is
a uniformly random frame; Q takes H to P and what Z has beside H to a random frame orthogonal to P. So one thin SVD of
G and two random frames replace all d x d factors.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

Shapes = Sequence[tuple[int, int]]


def orthogonal_chain(shapes: Shapes, eps: float, generator: torch.Generator | None = None) -> list[Tensor]:
    """Return factors of the shapes, each eps times a random matrix with orthonormal rows or columns."""
    return [eps * orthogonal(*shape, generator) for shape in shapes]


def framed_chain(shapes: Shapes, eps: float, drawn: bool, generator: torch.Generator | None = None) -> list[Tensor]:
    """Return eps times the identity between outer factors that are drawn, or zero where they await a gradient."""
    first, *inner, last = shapes
    between = [eps * torch.eye(*shape) for shape in inner]
    if not drawn:
        return [torch.zeros(*first), *between, torch.zeros(*last)]
    return [orthogonal(*first, generator), *between, orthogonal(*last, generator)]


@torch.no_grad()
def fill(held: Iterable[Tensor], chain: Sequence[Tensor]) -> None:
    """Copy the factors of a chain into parameters; ValueError unless the shapes are theirs."""
    parameters, given = list(held), [tuple(factor.shape) for factor in chain]
    if given != [tuple(parameter.shape) for parameter in parameters]:
        raise ValueError(f"factors of {given}, expected {[tuple(parameter.shape) for parameter in parameters]}")
    for parameter, factor in zip(parameters, chain, strict=True):
        parameter.copy_(factor)


def check_whole(name: str, chain: Iterable[Tensor]) -> None:
    """Raise ValueError, by the layer's name, where a factor is no matrix in memory."""
    for factor in chain:
        whole = factor.dim() == 2 and factor.numel() and not factor.is_meta
        given = f"a factor of {name!r} is {tuple(factor.shape)} on {factor.device}"
        if not whole:
            todo = "start before FSDP1 or DeepSpeed splits the model, and offload no adapted layer"
            raise ValueError(f"{given}, expected a matrix in memory: {todo}")


def orthogonal(rows: int, columns: int, generator: torch.Generator | None = None) -> Tensor:
    """A uniformly random matrix with orthonormal columns, or rows where there are fewer; the tall one is drawn."""
    tall = torch.empty(max(rows, columns), min(rows, columns), dtype=torch.float64)
    nn.init.orthogonal_(tall, generator=generator)
    return (tall if rows >= columns else tall.mT.contiguous()).float()


def compressed_chain(
    left: Tensor, right: Tensor, shape: tuple[int, int], depth: int, eps: float, generator: torch.Generator
) -> list[Tensor]:
    """Return [V^T (2r, n), eps I (2r, 2r) x depth, U (m, 2r)] from the leading singular vectors (m, r) and (n, r)."""
    right, left = compressed_frames(left, right, shape, generator)
    eye = torch.eye(right.shape[1], dtype=right.dtype, device=right.device)
    return [right.mT.contiguous(), *(eps * eye for _ in range(depth)), left.contiguous()]


def compressed_frames(
    left: Tensor, right: Tensor, shape: tuple[int, int], generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Return V (n, 2r) orthonormal and U = Q V (m, 2r) from the gradient's top singular vectors P (m, r), Z (n, r).

    For m > n the roles of the sides change, as in `compress_from_gradient`.
    """
    m, n = shape
    if m > n:
        outer, inner = compressed_frames(right, left, (n, m), generator)
        return inner, outer
    rank = left.shape[1]
    image = torch.cat([left, left.new_zeros(n - m, rank)])  # of H under the n x n orthogonal matrix that starts with Q
    first, beside = _frame(n, rank, None, generator, left), _frame(n, rank, image, generator, left)
    return span_and_image(first, right, left, beside[:m])


def span_and_image(first: Tensor, right: Tensor, left: Tensor, beside: Tensor) -> tuple[Tensor, Tensor]:
    """Return V = [H, Z without H] (n, 2r) and U = [P, Y] (m, 2r), where Q takes H to P and the rest of Z to Y."""
    rest = right - first @ (first.mT @ right)
    return torch.cat([first, torch.linalg.qr(rest).Q], 1), torch.cat([left, beside], 1)


def _frame(size: int, count: int, avoid: Tensor | None, generator: torch.Generator, like: Tensor) -> Tensor:
    """A uniformly random frame (size, count), orthogonal to the orthonormal columns of `avoid`; drawn on the CPU."""
    gaussian = torch.randn(size, count, generator=generator, dtype=torch.float64).to(like.device)
    if avoid is not None:
        span = avoid.double()
        for _ in range(2):  # twice is enough (Kahan, Parlett)
            gaussian = gaussian - span @ (span.mT @ gaussian)
    return torch.linalg.qr(gaussian).Q.to(like.dtype)
