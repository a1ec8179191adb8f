"""Many random matrices with orthonormal columns or rows at once, the same as `orthogonal` draws one after the other.

The numbers of one generator come in their order, on the host. Decompositions, which at full width take nearly all the
time, do not depend on each other: a GPU takes those of one shape together, by products; a CPU one a thread.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from types import TracebackType

import torch
from torch import Tensor

Shape = tuple[int, int]

TOGETHER = 2**26  # numbers at least that a GPU takes at once: half a gigabyte
LEAF = 64  # columns up to which a Cholesky factor is the library's
BLOCK = 16  # numbers that torch's normal_ makes at a time
ORTHONORMAL = 1e-11  # of what is so in double precision


class OrthogonalBatches:
    """While entered, draws for several generators, each from a thread of its own; the matrices lie on `device`."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.on_gpu = device, device.type == "cuda"
        self.threads = torch.get_num_threads()
        self.workers = 1 if self.on_gpu else self.threads

    def __enter__(self) -> OrthogonalBatches:
        if not self.on_gpu:
            torch.set_num_threads(1)  # a decomposition on one: all of them want a core
        self.pool = ThreadPoolExecutor(self.workers)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.pool.shutdown()
        torch.set_num_threads(self.threads)

    def draw(self, shapes: Sequence[Shape], generator: torch.Generator) -> list[Tensor]:
        """Return float32 matrices of the shapes (rows, columns), as `orthogonal` gives them in this order."""
        sent: list[tuple[list[int], Future]] = []
        for members, numbers in self._parcels(shapes, generator):
            sent.append((members, self.pool.submit(self._orthonormal, numbers)))
            if len(sent) > self.workers:  # or else all numbers would wait on the host
                sent[-self.workers - 1][1].result()
        found = {at: frame for members, frames in sent for at, frame in zip(members, frames.result(), strict=True)}
        return [found[at] if m >= n else found[at].mT.contiguous() for at, (m, n) in enumerate(shapes)]

    def _parcels(self, shapes: Sequence[Shape], generator: torch.Generator) -> Iterator[tuple[list[int], list[Tensor]]]:
        """Numbers (larger, smaller side) of matrices of one shape, and their places; on a CPU of one of them."""
        waiting: dict[Shape, tuple[list[int], list[Tensor]]] = defaultdict(lambda: ([], []))
        for at, shape in enumerate(shapes):
            tall = max(shape), min(shape)
            members, numbers = waiting[tall]
            members.append(at)
            numbers.append(_drawn(tall, generator, self.on_gpu))
            if not self.on_gpu or len(members) * math.prod(tall) >= TOGETHER:
                yield waiting.pop(tall)
        yield from waiting.values()

    def _orthonormal(self, numbers: list[Tensor]) -> list[Tensor]:
        if not self.on_gpu:
            return [positive_qr(each).float() for each in numbers]
        there = torch.stack([each.to(self.device) for each in numbers])
        if are_uniform(tuple(numbers[0].shape)):
            there = as_normal(there)
        return list(by_products(there).float().unbind())


def positive_qr(tall: Tensor) -> Tensor:
    """Return Q (..., m, n) of the decomposition Q R whose R has a positive diagonal, which is unique."""
    q, r = torch.linalg.qr(tall)
    return q * r.diagonal(dim1=-2, dim2=-1).sign()[..., None, :]


def by_products(tall: Tensor) -> Tensor:
    """Return `positive_qr` of (P, m, n) in float64 to the same accuracy; what is too close to singular goes through it.

    A Cholesky factor R of X^T X makes X R^-1 nearly orthonormal; that of X R^-1, which is well conditioned, the rest.
    """
    q = tall
    for _ in range(2):
        q = q @ inverse_cholesky(q.mT @ q).mT
    away = (q.mT @ q - torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)).abs().amax((-2, -1))
    bad = ~(away < ORTHONORMAL)  # NaN, too
    if bad.any():
        q[bad] = positive_qr(tall[bad])
    return q


def inverse_cholesky(gram: Tensor) -> Tensor:
    """Return the lower triangular X with X G X^T = I of positive definite G (..., n, n)."""
    half = gram.shape[-1] // 2
    if 2 * half <= LEAF:
        lower = torch.linalg.cholesky_ex(gram).L
        eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
        return torch.linalg.solve_triangular(lower, eye.expand_as(lower), upper=False)
    first = inverse_cholesky(gram[..., :half, :half])
    corner = gram[..., half:, :half] @ first.mT
    last = inverse_cholesky(gram[..., half:, half:] - corner @ corner.mT)
    whole = torch.zeros_like(gram)
    whole[..., :half, :half], whole[..., half:, half:] = first, last
    whole[..., half:, :half] = -(last @ corner @ first)
    return whole


def as_normal(uniform: Tensor) -> Tensor:
    """Return the normal numbers (..., m, n) that torch makes of these in [0, 1), of pairs BLOCK / 2 numbers apart."""
    first, second = uniform.reshape(-1, 2, BLOCK // 2).unbind(1)
    radius = (-2 * torch.log1p(-first)).sqrt()
    angle = 2 * math.pi * second
    return torch.stack((radius * angle.cos(), radius * angle.sin()), 1).view(uniform.shape)


@cache
def are_uniform(shape: Shape) -> bool:
    """Whether matrices of a shape are drawn as uniform numbers, for a GPU to make normal ones of.

    They take an eighth of the time. How torch makes them is its own matter: a few are held against its own.
    """
    if math.prod(shape) % BLOCK:
        return False
    uniform, normal = torch.empty(8, BLOCK, dtype=torch.float64), torch.empty(8, BLOCK, dtype=torch.float64)
    uniform.uniform_(generator=torch.Generator().manual_seed(0))
    normal.normal_(generator=torch.Generator().manual_seed(0))
    return torch.allclose(as_normal(uniform), normal, rtol=1e-12, atol=1e-12)


def _drawn(shape: Shape, generator: torch.Generator, uniform: bool) -> Tensor:
    """What `orthogonal` decomposes, or uniform numbers in its place."""
    numbers = torch.empty(shape, dtype=torch.float64)
    if uniform and are_uniform(shape):
        return numbers.uniform_(generator=generator)
    return numbers.normal_(generator=generator)
