"""Which optimisers keep the invariant subspaces of P1's theorem, and with which the compressed network follows.

A step D with D(P G Q) = P D(G) Q for all orthogonal P and Q keeps the blocks: the gradient of W_l is G~_l on 2r
directions and g_l times an isometry on the other d - 2r, and turning these among themselves leaves it as it is, hence
its step, too. The compressed network, which knows G~_l alone, follows where the step on its block is D(G~_l), hence
where nothing is summed over the whole matrix. Stacks are (S, d, d), S seeds; float64.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.linalg import matrix_norm

from compressible.experiments.edges import blocks_off, compressed_start, iterates
from compressible.networks.optim.basis_free import Muon, ScalarAdam
from compressible.recovery.factors import Factors, product
from compressible.recovery.problems import MatrixFactorization
from compressible.recovery.theory.edges import middle_bases, momentum_rho
from compressible.recovery.theory.invariants import compression_gap, stability_limit

Found = dict[str, np.ndarray]
STANDS = 1e-6  # a singular value that is farther than this from the middle value has moved


@dataclass(frozen=True)
class Optimiser:
    """One of PyTorch's optimisers or ours, and what theory says of it beforehand.

    momentum is that of rho's recursion, None where it has none of its own; matched multiplies the compressed network's
    rate by d / 2r, the ratio of the sides; one_by_one as in `edges.iterates`.
    """

    kind: type[torch.optim.Optimizer]
    options: Mapping[str, Any] = field(default_factory=dict)
    momentum: float | None = None
    matched: bool = False
    one_by_one: bool = False

    @property
    def steepest(self) -> bool:
        """Whether its steps are gradients, scaled with the loss, rather than of a size of their own."""
        return self.kind is torch.optim.SGD

    def run(self, problem: MatrixFactorization, start: Factors, rate: float, steps: int, **more: Any) -> Iterator[Any]:
        """Yield the factors of a run, as `edges.iterates`."""
        return iterates(problem, start, rate, steps, self.kind, one_by_one=self.one_by_one, **more, **self.options)

    def recursion(self, scales: Sequence[float], rate: float, steps: int, entries: int) -> Tensor | None:
        """Return rho_l(t) (steps + 1, L) by its recursion, where that needs nothing but itself."""
        if self.momentum is None:
            return None
        ahead, step_size = bool(self.options.get("nesterov", False)), rate / entries if self.steepest else rate
        return momentum_rho(scales, step_size, steps, self.momentum, ahead, polar=not self.steepest)


def optimisers(momentum: float, polar_momentum: float) -> dict[str, Optimiser]:
    """Return the optimisers that are compared, by name.

    `momentum` is that of heavy ball and Nesterov, `polar_momentum` Muon's, which looks ahead. "Muon" takes the exact
    polar factor, "quintic Muon" five Newton-Schulz steps in float64, "torch's Muon" the same in bfloat16, as people
    use it. "<name>, matched" gives the compressed network the rate times d / 2r: where the second moment is a mean over
    entries, steps have norms in proportion to the side of the matrix. RuntimeError where PyTorch is older than 2.9 and
    has no Muon.
    """
    if not hasattr(torch.optim, "Muon"):
        raise RuntimeError(f"PyTorch is {torch.__version__}, expected 2.9 or later, which has torch.optim.Muon")
    heavy, ahead = {"momentum": momentum}, {"momentum": polar_momentum, "nesterov": True}
    free = {"eps": 0.0}  # 1e-8 would be felt beside gradients of 1e-6
    return {
        "gradient descent": Optimiser(torch.optim.SGD, momentum=0.0),
        "heavy ball": Optimiser(torch.optim.SGD, heavy, momentum),
        "Nesterov": Optimiser(torch.optim.SGD, heavy | {"nesterov": True}, momentum),
        "Muon": Optimiser(Muon, ahead, polar_momentum),
        "quintic Muon": Optimiser(Muon, ahead | {"newton_schulz": 5}),
        "scalar Adam": Optimiser(ScalarAdam, free),
        "torch's Muon": Optimiser(torch.optim.Muon, ahead | {"weight_decay": 0.0}, one_by_one=True),
        "Adam": Optimiser(torch.optim.Adam),
        "RMSProp": Optimiser(torch.optim.RMSprop),
        "scalar Adam, matched": Optimiser(ScalarAdam, free, matched=True),
        "Adam, matched": Optimiser(torch.optim.Adam, matched=True),
    }


def structure(
    target: Tensor, unit: Factors, rank: int, scale: float, optimiser: Optimiser, rate: float, steps: int
) -> Found:
    """Return whether the blocks that the theorem has stand still under an optimiser.

    By iteration: "deviation" (T, S), how far they are from an isometry times rho, over their norm, in the worst layer;
    "rho" (T, S), the middle value of layer 1; "recursion" (T,) of it, where there is one; "values" (T, d), the singular
    values of layer 1, first seed. Per seed (S,): "largest_deviation" of all iterations; "least_moved" and "most_moved",
    how many singular values are farther than `STANDS` from rho at the end, over layers, and "exactly_2r";
    "recursion_error", the largest distance from the recursion; "loss", its value at the end over that at the start.
    """
    problem, start = MatrixFactorization(target), [scale * factor for factor in unit]
    bases, looks, losses, last = middle_bases(target, start, rank), [], [], start
    for last in optimiser.run(problem, start, rate, steps):
        looks.append(_look(last, bases))
        losses.append(problem.loss(product(last)))
    deviation, rhos, values = (torch.stack(parts) for parts in zip(*looks, strict=True))
    moved = ((torch.linalg.svdvals(torch.stack(last)) - rhos[-1].abs()[..., None]).abs() > STANDS).sum(-1)
    out = {"deviation": deviation, "rho": rhos[:, 0], "values": values, "loss": losses[-1] / losses[0]}
    out |= {"least_moved": moved.amin(0), "most_moved": moved.amax(0), "exactly_2r": (moved == 2 * rank).all(0)}
    out["largest_deviation"] = deviation.amax(0)
    known = optimiser.recursion([scale] * len(unit), rate, steps, target[0].numel())
    if known is not None:
        out |= {"recursion": known[:, 0], "recursion_error": (rhos - known[..., None]).abs().amax((0, 1))}
    return {key: value.numpy() for key, value in out.items()}


def compression(
    target: Tensor, unit: Factors, rank: int, scale: float, optimiser: Optimiser, rate: float, steps: int, early: int
) -> Found:
    """Return whether P1's compressed network with frozen outer factors follows the wide one under an optimiser.

    By iteration: "gap" (T, S), ||f - f_C||_F over the bound (d - 2r)^(1/2) eps^L of the corollary. Per seed (S,):
    "over_bound", its largest; "law_error", the largest distance of the gap from (d - 2r)^(1/2) |prod rho_l|, over the
    bound, of rho's recursion or, where there is none, of the middle values of the run, and "early_law_error", that of
    the first `early` iterations; "missed", the largest gap over ||Phi||; "wide" and "small", how far the two networks
    are from Phi at the end, over ||Phi||.
    """
    problem, start, size = MatrixFactorization(target), [scale * factor for factor in unit], target.shape[-1]
    small, bases = compressed_start(problem, start, rank, [scale] * len(unit)), middle_bases(target, start, rank)
    theirs = rate * size / (2 * rank) if optimiser.matched else rate
    frozen = optimiser.run(problem, small, theirs, steps, outer_ratio=0.0)
    gaps, middles, ends = [], [], (target, target)
    for wide, narrow in zip(optimiser.run(problem, start, rate, steps), frozen, strict=True):
        ends = product(wide), product(narrow)
        gaps.append(matrix_norm(ends[0] - ends[1]))
        middles.append(_middle_values(wide, bases))
    gap, norm = torch.stack(gaps), matrix_norm(target)
    bound = compression_gap(torch.full((len(unit),), scale, dtype=torch.float64), size, rank)
    rhos = optimiser.recursion([scale] * len(unit), rate, steps, target[0].numel())
    rhos = torch.stack(middles).mT if rhos is None else rhos[:, None]
    off = (gap - compression_gap(rhos, size, rank).abs()).abs() / bound
    out = {"gap": gap / bound, "over_bound": gap.amax(0) / bound, "missed": gap.amax(0) / norm}
    out |= {"law_error": off.amax(0), "early_law_error": off[: early + 1].amax(0)}
    wide_end, small_end = (matrix_norm(end - target) / norm for end in ends)
    return {key: value.numpy() for key, value in (out | {"wide": wide_end, "small": small_end}).items()}


def settled_rate(target: Tensor, depth: int, fraction: float, momentum: float) -> float:
    """Return the step size `fraction` of the largest at which gradient descent can settle, times 1 - momentum.

    The least over seeds; a momentum mu sums gradients to 1 / (1 - mu) of one, so that all learn at one speed.
    """
    return fraction * (1 - momentum) * float(stability_limit(MatrixFactorization(target), depth).min())


def verdict_table(found: Mapping[str, np.ndarray], names: Sequence[str], prefix: str) -> pd.DataFrame:
    """Return a row for each optimiser: what moves, how far blocks are off, and what compression keeps.

    `found` holds "<prefix>/<name>/<key>" of `structure` and, under "<prefix>/<name>/compressed/<key>", of
    `compression`; "-" where one was not run. Ranges are over seeds, other numbers the worst seed's.
    """
    columns = {
        "values that move": ("least_moved", "most_moved"),
        "blocks off by": ("largest_deviation",),
        "off the recursion": ("recursion_error",),
        "loss left": ("loss",),
        "gap / bound": ("compressed/over_bound",),
        "gap off its law": ("compressed/early_law_error", "compressed/law_error"),
        "gap / target": ("compressed/missed",),
        "left to learn, wide": ("compressed/wide",),
        "compressed": ("compressed/small",),
    }
    rows = {name: [_cell(found, f"{prefix}/{name}", keys) for keys in columns.values()] for name in names}
    return pd.DataFrame.from_dict(rows, orient="index", columns=list(columns))


def _cell(found: Mapping[str, np.ndarray], name: str, keys: Sequence[str]) -> str:
    held = [found[f"{name}/{key}"] for key in keys if f"{name}/{key}" in found]
    if not held:
        return "-"
    if keys[0] == "least_moved":
        least, most = int(held[0].min()), int(held[1].max())
        return f"{least}" if least == most else f"{least} to {most}"
    return ", ".join(f"{values.max():.1e}" for values in held)


def _look(factors: Factors, bases: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    rhos = _middle_values(factors, bases)
    sizes = torch.stack([matrix_norm(factor @ basis) for factor, basis in zip(factors, bases[:-1], strict=True)])
    return (blocks_off(factors, bases, rhos) / sizes).amax(0), rhos, torch.linalg.svdvals(factors[0][0])


def _middle_values(factors: Factors, bases: Sequence[Tensor]) -> Tensor:
    """rho_l (L, S), the mean of what is on the middle block's diagonal, whether the block stands still or not."""
    triples = zip(factors, bases[:-1], bases[1:], strict=True)
    return torch.stack([(above * (factor @ below)).sum((-2, -1)) / below.shape[-1] for factor, below, above in triples])
