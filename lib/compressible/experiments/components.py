"""How singular components move along a descent: those of the target, when each is found, and those of every layer.

S stacked problems, T looks at the product on its way, r components; u_i*, v_i* and s_i are the target's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from compressible.descent.history import History
from compressible.experiments.compare import Build
from compressible.experiments.outcomes import first_below, stays_above
from compressible.experiments.trajectories import first_passage, iterates, pairs_in_order
from compressible.recovery.factors import Factors, product, stack_factors
from compressible.recovery.problems import Problem, stack_problems
from compressible.recovery.subspaces import alignment, svd_evolution

Look = Callable[[Factors, Tensor], dict[str, Tensor]]


def draw_stack(builds: Sequence[Build], seed: int, seeds: int) -> tuple[Problem, Factors]:
    """Return the problems of all builds and seeds, one start each, as one stack: the seeds of the first build first."""
    built = [build(torch.Generator().manual_seed(seed + offset)) for build in builds for offset in range(seeds)]
    starts = [factors for _, runs in built for factors, _, _ in runs.values()]
    return stack_problems([problem for problem, _ in built]), stack_factors(starts)


def watch(
    problem: Problem, factors: Factors, look: Look, step_size: float, steps: int, every: int, tolerance: float
) -> dict[str, np.ndarray]:
    """Return what `look(factors, loss)` sees at 0 and after each `every` iterations, (S, T, ...).

    "iterations" (T,) say when. A problem whose loss is below `tolerance` stays where it is; the descent ends when all
    have stopped.
    """
    visited = iterates(problem, (factors, step_size, 1.0), range(0, steps + 1, every), tolerance)
    path = [look(state, loss) for _, state, loss in visited]
    curves = {name: torch.stack([seen[name] for seen in path], 1).numpy() for name in path[0]}
    return curves | {"iterations": every * np.arange(len(path))}


def leading_alignment(target: Tensor) -> Look:
    """Return the look at "left" |<u_1(W_L), u_1*>|, "right" |<v_1(W_1), v_1*>| and the training "loss"."""
    u, v = _leading(target)

    def look(factors: Factors, loss: Tensor) -> dict[str, Tensor]:
        left, right = _leading(factors[-1])[0], _leading(factors[0])[1]
        return {"left": alignment(left, u)[..., 0], "right": alignment(right, v)[..., 0], "loss": loss}

    return look


def beside_the_loss(curves: Mapping[str, np.ndarray], near: float = 0.9, fallen: float = 0.1) -> dict[str, np.ndarray]:
    """Return per seed (S,) when the leading pair is found and when the loss falls, from curves of `leading_alignment`.

    "final" and "final_loss", the lower of the two alignments and the training loss at the end; "found_at", the
    iteration from which on both alignments exceed `near`, and "fallen_at", where less than the share `fallen` of the
    initial loss is left: infinite if not by the end. "sooner": found before the loss has fallen; "loss_share" is what
    is left of it at "found_at", NaN if that never comes; "sides_apart", the largest difference of the two alignments.

    Seen from each seed's own "fallen_at", U looks that all of them have: "since" (U,) iterations, (S, U) the lower
    "alignment" and the "share" of the initial loss; of a seed whose loss never falls NaN.
    """
    time, share = curves["iterations"], curves["loss"] / curves["loss"][:, :1]
    least = np.minimum(curves["left"], curves["right"])
    found, drop = stays_above(least, near, time), first_below(share, fallen, time)
    since, seen = around(np.stack([least, share]), time, drop)
    return {
        "final": least[:, -1],
        "final_loss": curves["loss"][:, -1],
        "found_at": np.where(np.isnan(found), np.inf, found),
        "fallen_at": np.where(np.isnan(drop), np.inf, drop),
        "sooner": found < drop,
        "loss_share": stays_above(least, near, share),
        "sides_apart": np.abs(curves["left"] - curves["right"]).max(1),
        **{"since": since, "alignment": seen[0], "share": seen[1]},
    }


def around(curves: np.ndarray, time: np.ndarray, when: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return curves (..., S, T) at `time` (T,), evenly spaced from 0, as seen from each seed's own `when` (S,).

    (U,) iterations from there, those that every seed has, and the curves (..., S, U); NaN where `when` is not finite,
    at all times where it never is.
    """
    known, every = np.isfinite(when), time[1] - time[0]
    places = np.where(known, when, 0).astype(int) // every
    ahead, left = (places[known].max(), places[known].min()) if known.any() else (0, 0)
    window = np.arange(-left, len(time) - ahead)
    seen = np.take_along_axis(curves, np.broadcast_to(places[:, None] + window, (*curves.shape[:-1], len(window))), -1)
    return every * window, np.where(known[:, None], seen, np.nan)


def triplets(target: Tensor, rank: int) -> Look:
    """Return the look at the product's triplets beside the target's.

    "values", its 2r largest; "left" |<u_i, u_i*>| and "right" |<v_i, v_i*>|; "components" u_i*^T X v_i* on the target's
    own triplets.
    """
    left, _, right = torch.linalg.svd(target)
    u, v = left[..., :rank], right[..., :rank, :].mT

    def look(factors: Factors, _: Tensor) -> dict[str, Tensor]:
        matrix = product(factors)
        left, values, right = torch.linalg.svd(matrix)
        sides = {"left": alignment(left[..., :rank], u), "right": alignment(right[..., :rank, :].mT, v)}
        return sides | {"values": values[..., : 2 * rank], "components": (u * (matrix @ v)).sum(-2)}

    return look


def learning_order(curves: Mapping[str, np.ndarray], target: np.ndarray) -> dict[str, np.ndarray]:
    """Return, for curves of `triplets` and the target's values (S, r), whether the largest are learned first.

    "first" (S, r), the iteration at which each value passes its half; "pairs" and "components", the share of pairs
    i < j in order, of the values and of the components on the target's own triplets; "apart", the share of the values
    that have risen to 90 % when the next one passes its half; "alignment" (S, r), the mean alignment of the i-th
    vectors when the i-th value has risen to 90 %, at the last look if it never does, and "aligned", its mean over i;
    "extra", the largest sigma_(r+1) ever over s_1; "exactly_r", whether all r values rise and "extra" is at most 0.01.
    """
    rank, time = target.shape[1], curves["iterations"]
    values, extra = curves["values"][..., :rank], (curves["values"][..., rank] / target[:, :1]).max(1)
    first, risen = (first_passage(values, share * target, time) for share in (0.5, 0.9))
    up = values > 0.9 * target[:, None]
    when = np.where(up.any(1), up.argmax(1), len(time) - 1)[:, None]
    sides = [np.take_along_axis(curves[side], when, 1)[:, 0] for side in ("left", "right")]
    alignments = np.mean(sides, 0)
    return {
        "first": first,
        "pairs": pairs_in_order(first),
        "components": pairs_in_order(first_passage(curves["components"], target / 2, time)),
        "apart": (risen[:, :-1] <= first[:, 1:]).mean(1),
        "alignment": alignments,
        "aligned": alignments.mean(1),
        "extra": extra,
        "exactly_r": np.all(np.any(up, 1), 1) & (extra <= 0.01),
    }


def over_problems(found: Mapping[str, Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Return {problem: measures of `learning_order`} as one: per seed (S,), at the worst of the problems.

    "exactly_r" holds in all, "components" and "apart" are the least, "extra" is the largest; "aligned/<problem>" stays.
    """
    worst: dict[str, Callable[..., np.ndarray]] = {
        "exactly_r": np.all,
        "components": np.min,
        "apart": np.min,
        "extra": np.max,
    }
    out = {key: take([one[key] for one in found.values()], axis=0) for key, take in worst.items()}
    return out | {f"aligned/{problem}": one["aligned"] for problem, one in found.items()}


def layer_paths(history: History, rank: int, rhos: Tensor) -> dict[str, Tensor]:
    """Return how the singular triplets of every layer move, from a history that keeps every iteration of S runs.

    rhos (T, L) is the theorem's recursion (`theory.rho`) and `rank` the true rank r. For each layer k from 1:
    "values_k" (S, T, d), "right_k" and "left_k" (S, T, 2r + 1) as in `svd_evolution`. Per seed, over all layers:
    "moving" (L, S), the values that end away from the common one; "exactly_2r" (S,), whether these are 2r everywhere;
    "rho_error" (S,), the largest deviation of the others from the recursion; "middle_angle" (S,), how far their
    subspace turns from iteration 1 on, in radians.
    """
    depth = rhos.shape[1]
    paths = [torch.stack([factors[k] for factors in history.snapshots.values()], 1) for k in range(depth)]
    evolutions = [svd_evolution(path, rank) for path in paths]
    out: dict[str, Tensor] = {}
    for k, moves in enumerate(evolutions, 1):
        out |= {f"values_{k}": moves.values, f"right_{k}": moves.right, f"left_{k}": moves.left}
    moving = torch.stack([moving_values(moves.values[:, -1]) for moves in evolutions])
    middles = [moves.values[..., rank:-rank] - rhos[:, k, None] for k, moves in enumerate(evolutions)]
    turned = [torch.maximum(moves.right[:, 1:, rank], moves.left[:, 1:, rank]).amax(1) for moves in evolutions]
    out |= {"moving": moving, "exactly_2r": (moving == 2 * rank).all(0), "rhos": rhos}
    out["rho_error"] = torch.stack([middle.abs().amax((1, 2)) for middle in middles]).amax(0)
    return out | {"middle_angle": torch.stack(turned).amax(0)}


def moving_values(values: Tensor, least: float = 1e-6) -> Tensor:
    """Return how many (...) of the singular values (..., d) are farther than `least` from their median."""
    return ((values - values.median(-1, keepdim=True).values).abs() > least).sum(-1)


def _leading(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The top left and right singular vectors (S, d, 1) of matrices (S, d, d)."""
    left, _, right = torch.linalg.svd(matrix)
    return left[..., :1], right[..., :1, :].mT
