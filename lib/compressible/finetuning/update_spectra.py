"""Spectra and leading subspaces of the updates that fine-tuning makes, layer by layer and run by run.

`watch_spectra` is what `fine_tune` takes as `watch`; the rest compares what it kept of one run at several steps with
the last of them. Singular vectors come from the smaller Gram matrix in float64 (top_frames), all runs of a
layer at once: many times faster on a GPU than singular value decompositions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compressible.runtime.weight_gradients import top_frames

SIDES = ("outputs", "inputs")


@dataclass(frozen=True)
class Spectra:
    """Leading triplets of one run's updates: names of the layers, values (layers, k) descending, frames by layer.

    outputs[i] (m, k) and inputs[i] (n, k) are float32 on the CPU.
    """

    layers: list[str]
    values: np.ndarray
    outputs: list[Tensor]
    inputs: list[Tensor]


def watch_spectra(count: int) -> Callable[[Any], list[Spectra]]:
    """Return a `watch` for `fine_tune` that keeps the `count` leading triplets of every layer, or all if fewer."""
    if count < 1:
        raise ValueError(f"count is {count!r}, expected an integer >= 1")

    def watch(snapshot: Any) -> list[Spectra]:
        names, triplets = [], []
        for name, updates in snapshot.updates():
            names.append(name)
            triplets.append([part.cpu() for part in leading_triplets(updates, min(count, *updates.shape[-2:]))])
        every = range(len(snapshot.runs))
        lists = [[[layer[part][run] for layer in triplets] for part in range(3)] for run in every]
        return [Spectra(names, np.array(_even(values)), left, right) for left, values, right in lists]

    return watch


def leading_triplets(matrices: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return U (..., m, count), singular values (..., count), descending, and V (..., n, count) of (..., m, n)."""
    left, right = top_frames(matrices, count)
    images = matrices.double() @ right.double()
    return left, torch.linalg.vector_norm(images, dim=-2), right


def cosines(watched: Mapping[int, Spectra], directions: int, side: str = "outputs") -> np.ndarray:
    """Return (steps, layers, directions): cosines of the principal angles between each step's and the last subspace.

    The subspaces are those of the `directions` leading singular vectors; largest cosine first, which alone is what the
    authors drew (papers' trap T9).
    """
    overlaps = _overlaps(watched, directions, side)
    return np.array([[torch.linalg.svdvals(overlap).clamp(max=1).tolist() for overlap in step] for step in overlaps])


def captured(watched: Mapping[int, Spectra], directions: int, side: str = "outputs") -> np.ndarray:
    """Return (steps, layers): the share of the last update's leading part that lies in each step's subspace.

    The share of sum s_i^2 over its `directions` leading singular values, so that a direction counts by its size.
    """
    weights = torch.as_tensor(watched[max(watched)].values[:, :directions]).square()
    weights = weights / weights.sum(1, keepdim=True)
    shares = [[overlap.square().sum(0) for overlap in step] for step in _overlaps(watched, directions, side)]
    return np.array([[float(s @ weight) for s, weight in zip(step, weights, strict=True)] for step in shares])


def _overlaps(watched: Mapping[int, Spectra], directions: int, side: str) -> list[list[Tensor]]:
    """Inner products (directions, directions) in float64 of each step's frames, in order, and the last; by layer."""
    if side not in SIDES:
        raise ValueError(f"side is {side!r}, expected one of {', '.join(SIDES)}")
    kept = min(watched[max(watched)].values.shape[1], *(f.shape[1] for f in getattr(watched[max(watched)], side)))
    if not 1 <= directions <= kept:
        raise ValueError(f"directions is {directions!r}, expected 1 to the {kept} that were kept")
    frames = [[frame[:, :directions].double() for frame in getattr(watched[step], side)] for step in sorted(watched)]
    return [[now.mT @ end for now, end in zip(step, frames[-1], strict=True)] for step in frames]


def _even(values: list[Tensor]) -> list[list[float]]:
    """Singular values of all layers, zeros behind where a layer has fewer."""
    longest = max(len(each) for each in values)
    return [each.tolist() + [0.0] * (longest - len(each)) for each in values]
