# Copyright 2026 The Compressible Dynamics authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""From the first gradient of a layer's weight to the factors of its update (P1, section 4).

The literal construction starts from full-width factors eps Q_l, takes the gradient of W_1 and keeps 2 r' = r
directions of it. It needs Q = Q_L ... Q_1 only through its action on r vectors, and Q is random: for the gradient G
(m, n) of the layer, with top singular vectors P, Z (r' each), the directions are span[Z, Q^T P], where Q^T P = H is a
uniformly random frame; Q takes H to P and what Z has beside H to a random frame orthogonal to P. So one thin SVD of G
and two random frames replace all d x d factors.
"""

from __future__ import annotations

import torch
from torch import Tensor


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
