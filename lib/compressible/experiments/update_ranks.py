"""Of what rank the updates are that fine-tuning learns, by the rule that P1's figure counts by, and without it.

    plain       singular values above s_1 max(m, n) 2^-23, as numpy's matrix_rank counts in float32
    published   the same; for Deep LoRA at most r, and 0 where s_1 <= 1e-3 (papers' trap T8)
    directions  a layer's share of the singular values that hold 99 % of sum s_i^2 over all layers, one rule for all

An update that hardly left a small start has many equal values, so its plain rank is full. Under "directions" it has
next to none, since it weighs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from compressible.experiments import few_shot
from compressible.experiments.few_shot import Method, Rates
from compressible.finetuning.run import RunHistory
from compressible.recovery.spectra import singular_values

METHODS = ("paper", "standard", "full", "thin", "compressed")
RULES = ("published", "plain", "directions")
TOLERANCE = float(np.finfo(np.float32).eps)
NEGLIGIBLE = 1e-3  # spectral norm up to which the authors call an update of Deep LoRA zero
HELD = 0.99  # of sum s_i^2
KEPT = 12  # singular values of a layer in the record


class Values(NamedTuple):
    """Singular values (layers, k) of a run's updates, descending, zeros behind; names and longer sides (layers,)."""

    layers: list[str]
    longest: np.ndarray
    values: np.ndarray


def methods(
    model: nn.Module, matrices: list[str], protocol: str, rank: int, init_scale: float, rates: Rates
) -> dict[str, Method]:
    """Return each of METHODS; arguments as of `few_shot.methods`."""
    known = few_shot.methods(model, matrices, protocol, rank, init_scale, rates)
    return {name: known[name] for name in METHODS}


def watch_values(snapshot: Any) -> list[dict[str, Any]]:
    """Return the `Values` of every run of a pass, as a dict, which checkpoints hold; it is `fine_tune`'s `watch`.

    All of them for factors of full width, else the r that factors of width r allow.
    """
    narrow = [run.config.r for run in snapshot.runs if getattr(run.config, "variant", None) != "full"]
    most = max(narrow) if len(narrow) == len(snapshot.runs) else None
    names, longest, found = [], [], []
    for name, updates in snapshot.updates():
        names.append(name)
        longest.append(max(updates.shape[-2:]))
        found.append(leading_values(updates, most).cpu())
    widest = max(values.shape[-1] for values in found)
    padded = torch.stack([nn.functional.pad(values, (0, widest - values.shape[-1])) for values in found], 1)
    return [Values(names, np.array(longest), run.numpy())._asdict() for run in padded]


def leading_values(updates: Tensor, most: int | None) -> Tensor:
    """Return the singular values of (S, m, n) in float64; the first `most`, where the rank is no higher.

    These come from the row space of Gaussian images, which contains that of a matrix of such a rank almost surely: what
    float32 made of its product adds less than 1e-6 of the largest value.
    """
    m, n = updates.shape[-2:]
    if most is None or 2 * most >= min(m, n):
        return singular_values(updates)[..., :most]
    draw = torch.randn(2 * most, m, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    matrices = updates.double()
    frame = torch.linalg.qr((draw.to(matrices.device) @ matrices).mT).Q  # (S, n, 2 most)
    return singular_values(matrices @ frame)[..., :most]


def plain_ranks(found: Values) -> np.ndarray:
    """Return (layers,) ranks by the rule "plain"."""
    least = found.values[:, :1] * (found.longest * TOLERANCE)[:, None]
    return (found.values > least).sum(1)


def published_ranks(found: Values, most: int) -> np.ndarray:
    """Return (layers,) ranks by the rule "published" for Deep LoRA, r = `most`."""
    return np.where(found.values[:, 0] <= NEGLIGIBLE, 0, np.minimum(plain_ranks(found), most))


def directions(found: Values) -> np.ndarray:
    """Return (layers,) how many of the values that hold HELD of all layers' sum s_i^2 are the layer's."""
    energies = np.sort(np.square(found.values).ravel())[::-1]
    before = int((np.cumsum(energies) < HELD * energies.sum()).sum())  # the next one reaches it, and is counted, too
    return ((np.square(found.values) >= energies[before]) & (found.values > 0)).sum(1)


def outcome(histories: Sequence[RunHistory], seeds: int, step: int, rank: int) -> dict[str, Any]:
    """Return what runs by METHODS and seed come to, which were watched by `watch_values` and scored at `step`.

    Returns:
        "layers", their names; "ranks/<rule>" of RULES (methods, seeds, layers); "values" (methods, seeds, layers,
        KEPT), the largest; over seeds "<method>, <rule>, mean" of the layers and "..., share at most 1",
        "<method>, all r" whether all plain ranks are `rank`, "<method>, Pearson", and "<start> - <method>, directions"
        of LoRA's two starts, by the means.
        A run that diverged has NaN, and ranks of -1.
    """
    watched = [Values(**run.watched[step]) for run in histories]
    by_rule = {rule: np.array([_ranks(rule, at // seeds, found, rank) for at, found in enumerate(watched)])
               for rule in RULES}  # fmt: skip
    shape = (len(METHODS), seeds, -1)
    tops = np.array([_padded(found.values) for found in watched]).reshape(*shape, KEPT)
    out: dict[str, Any] = {"layers": watched[0].layers, "values": tops}
    for rule, ranks in by_rule.items():
        out |= {f"ranks/{rule}": ranks.reshape(shape)} | _told(rule, ranks.reshape(shape))
    scores = np.array([run.scores[step] for run in histories]).reshape(len(METHODS), seeds)
    for at, name in enumerate(METHODS):
        out |= {f"{name}, Pearson": scores[at], f"{name}, all r": (out["ranks/plain"][at] == rank).all(1)}
    means = {name: out[f"{name}, directions, mean"] for name in METHODS}
    pairs = [(start, name) for start in METHODS[:2] for name in METHODS[2:]]
    return out | {f"{start} - {name}, directions": means[start] - means[name] for start, name in pairs}


def _ranks(rule: str, method: int, found: Values, rank: int) -> np.ndarray:
    if not np.isfinite(found.values).all():
        return np.full(len(found.layers), -1)
    rules: dict[str, Callable[[Values], np.ndarray]] = {
        "plain": plain_ranks,
        "published": plain_ranks if METHODS[method] in few_shot.STARTS else lambda each: published_ranks(each, rank),
        "directions": directions,
    }
    return rules[rule](found)


def _told(rule: str, ranks: np.ndarray) -> dict[str, np.ndarray]:
    """Mean rank and share of layers of rank 0 or 1, by method over seeds; NaN for a run that diverged."""
    known = np.where(ranks < 0, np.nan, ranks)
    shares = np.where(np.isnan(known), np.nan, known <= 1).mean(-1)
    means = known.mean(-1)
    out = {f"{name}, {rule}, mean": means[at] for at, name in enumerate(METHODS)}
    return out | {f"{name}, {rule}, share at most 1": shares[at] for at, name in enumerate(METHODS)}


def _padded(values: np.ndarray) -> np.ndarray:
    """The first KEPT values (layers, KEPT), zeros behind where there are fewer."""
    kept = values[:, :KEPT]
    return np.pad(kept, ((0, 0), (0, KEPT - kept.shape[1])))
