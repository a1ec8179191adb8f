"""How the product of a full-width adapter moves from an orthogonal start of scale one: P3's Figure 4.

The figure's panels are those of P1's Figure 3: the singular values of W_3 W_2 W_1 along training, and how far its
singular vectors turn from where they were after the first step. At the start all d values coincide. r vectors at each
end of the spectrum are followed one by one, the d - 2r in between as one subspace.

A product that starts at scale one changes the model before a step is taken, unless the frozen weight gives way:

    added      W + W_3 W_2 W_1, as the authors' code has it
    taken off  W + W_3 W_2 W_1 - its start, so that training starts from the pretrained model; all seeds share one start

S runs, T marks.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from peft import PeftConfig
from torch import Tensor, nn

from compressible.data.tasks import Task
from compressible.experiments.outcomes import prefixed
from compressible.finetuning.finetune import fine_tune
from compressible.finetuning.peft_models import base_of, set_chain, tuner_layers
from compressible.finetuning.run import FineTuningRun, RunHistory
from compressible.finetuning.stacked.starts import of_peft
from compressible.recovery.spectra import leading_share
from compressible.recovery.subspaces import principal_angles, vector_angles
from compressible.runtime.chain import product

READINGS = ("added", "taken off")
MOVED = 0.05  # share by which a singular value must change to count


def both_readings(
    model: nn.Module, task: Task, config: PeftConfig, rate: float, seeds: Sequence[int], rank: int, **options: Any
) -> dict[str, np.ndarray]:
    """Train all seeds in both readings and return "<reading>/<name>" for the names of `outcome`.

    config adapts one matrix by factors of full width; `options` go to `fine_tune`, watch_at among them.
    """
    start = SharedStart(of_peft(model, FineTuningRun(config, rate, seeds[0])).chains)
    found: dict[str, np.ndarray] = {}
    for name, base, given in zip(READINGS, (model, without(model, start)), (None, start), strict=True):
        runs = [FineTuningRun(config, rate, seed, label=f"{name}, {seed}", start=given) for seed in seeds]
        watch = watch_ends(rank, {min(options["watch_at"]), max(options["watch_at"])})
        histories = fine_tune(base, runs, task, watch=watch, keep_factors=False, **options)
        found |= prefixed(name, outcome(histories, rank))
    return found


@dataclass(frozen=True, eq=False)
class SharedStart:
    """A start for `FineTuningRun` that gives every run the same factors: [W_1, ..., W_L] by layer."""

    chains: dict[str, list[Tensor]]

    def __call__(self, model: Any, generator: torch.Generator) -> None:
        """Set the factors of a PeftModel."""
        layers = tuner_layers(base_of(model))
        for name, chain in self.chains.items():
            set_chain(layers[name], chain)


@torch.no_grad()
def without(model: nn.Module, start: SharedStart) -> nn.Module:
    """Return a copy of the model off whose weights the products of a start are taken."""
    changed = copy.deepcopy(model)
    for name, chain in start.chains.items():
        weight: Any = changed.get_submodule(name).weight
        weight -= product(chain).to(weight)
    return changed


def watch_ends(rank: int, whole: Collection[int]) -> Callable[[Any], list[dict[str, np.ndarray]]]:
    """Return a `watch` for `fine_tune` of runs that adapt one square matrix.

    Of each run it keeps "values" (d,), descending, and the first and last `rank` singular vectors, "right" and "left"
    (d, 2r); at the steps `whole` also the product itself, "product" (d, d), all vectors in float32.
    """

    def watch(snapshot: Any) -> list[dict[str, np.ndarray]]:
        layers = list(snapshot.updates())
        if len(layers) != 1:
            names = ", ".join(name for name, _ in layers[:3])
            raise ValueError(f"{len(layers)} matrices are adapted ({names}, ...), expected one, whose product is shown")
        products = layers[0][1].detach().double().cpu()
        found = [_ends(matrix, rank) for matrix in products]
        if snapshot.step in whole:
            found = [ends | {"product": matrix.float().numpy()} for ends, matrix in zip(found, products, strict=True)]
        return found

    return watch


def outcome(histories: Sequence[RunHistory], rank: int) -> dict[str, np.ndarray]:
    """Return what S runs with `watch_ends` show at the T steps that were watched, 0 and 1 first.

    "values" (S, T, d); "right" and "left" (S, T, 2r + 1), angles to step 1 in radians: r top vectors, the largest
    principal angle of the middle subspace, r bottom vectors; NaN at step 0, where they mean nothing. Judged at the end,
    (S,): "moved", how many values changed by more than MOVED of their start; "middle_angle", the larger of both sides;
    "change_share", the share of |product - start|^2 in its 2r leading directions. "losses" (S, steps), "scores" (S, .).
    """
    each = [[history.watched[step] for step in sorted(history.watched)] for history in histories]
    values = np.array([[mark["values"] for mark in run] for run in each])
    sides = "right", "left"
    right, left = (np.array([_turned([mark[side] for mark in run], rank) for run in each]) for side in sides)
    changes = np.array([run[-1]["product"].astype(float) - run[0]["product"] for run in each])
    spectra = torch.linalg.svdvals(torch.from_numpy(changes))
    return {
        "values": values,
        "right": right,
        "left": left,
        "moved": (np.abs(values[:, -1] / values[:, 0] - 1) > MOVED).sum(1),
        "middle_angle": np.maximum(right[:, -1, rank], left[:, -1, rank]),
        "change_share": leading_share(spectra, 2 * rank).numpy(),
        "losses": np.array([history.losses for history in histories]),
        "scores": np.array([[*history.scores.values()] for history in histories]),
    }


def _ends(matrix: Tensor, rank: int) -> dict[str, np.ndarray]:
    left, values, right = torch.linalg.svd(matrix)
    ends = [*range(rank), *range(len(values) - rank, len(values))]
    frames = {"right": right.mT[:, ends], "left": left[:, ends]}
    return {name: frame.float().numpy() for name, frame in frames.items()} | {"values": values.numpy()}


def _turned(frames: Sequence[np.ndarray], rank: int) -> np.ndarray:
    """Angles (T, 2r + 1) of frames (d, 2r) at T marks to those at the second; the middle's are its complement's."""
    stacked = torch.from_numpy(np.array(frames)).double()
    base = stacked[1:2].expand_as(stacked)
    ends, middle = vector_angles(base, stacked), principal_angles(base, stacked)[..., -1:]
    turned = torch.cat([ends[:, :rank], middle, ends[:, rank:]], 1)
    turned[0] = torch.nan
    return turned.numpy()
