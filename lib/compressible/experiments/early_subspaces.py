"""How early fine-tuning finds the subspaces that its updates end in, layer by layer, run by run.

Arrays are (T, layers, ...) over the T steps that were watched, of one run; a stack of S runs puts S in front.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from torch import nn

from compressible.adapters.config import DeepLoraConfig
from compressible.data.pretrained import head_layers
from compressible.finetuning.run import RunHistory
from compressible.finetuning.update_spectra import SIDES, Spectra, captured, cosines

ALIGNED = 0.5  # largest cosine above which the authors draw a layer
SIGNIFICANT = 0.01  # of the largest singular value
SMOOTHING = 0.1  # share of the newest loss in the authors' average


def full_width(model: nn.Module, matrices: list[str], protocol: str, depth: int, init_scale: float) -> DeepLoraConfig:
    """Return P1's adapters of full width on `matrices`, ends of layers' names; "clean" trains the head, too."""
    head = head_layers(model)
    return DeepLoraConfig(
        variant="full",
        depth=depth,
        init_scale=init_scale,
        target_modules=matrices,
        exclude_modules=head,
        modules_to_save=head if protocol == "clean" else None,
    )


def outcome(
    histories: Sequence[RunHistory], directions: int, steps: int, filter_step: int
) -> dict[str, np.ndarray | list[str] | float]:
    """Return what S runs with `watch_spectra` come to, as `of_run` for each, with "layers" and "pass_seconds"."""
    found = [of_run(history, directions, steps, filter_step) for history in histories]
    stacked = {name: np.array([one[name] for one in found]) for name in found[0]}
    layers = histories[0].watched[min(histories[0].watched)].layers
    return stacked | {"layers": layers, "pass_seconds": histories[0].seconds}


def of_run(history: RunHistory, directions: int, steps: int, filter_step: int) -> dict[str, Any]:
    """Return subspaces, spectra, losses and scores of one run that was watched at 0, filter_step, steps / 4 and steps.

    "outputs/cosines" and the like as `subspaces`; "values" (layers, k), final singular values; "smooth" (steps,)
    losses; "scores" over the marks; and what claims are judged on: `at_a_quarter`, "significant", the median number of
    singular values above SIGNIFICANT, "final_score" and "loss_ratio", smoothed loss over that at a quarter.
    """
    seen, values = subspaces(history.watched, directions), history.watched[steps].values
    smooth = pd.Series(history.losses).ewm(alpha=SMOOTHING, adjust=False).mean().to_numpy()
    at = sorted(history.watched).index
    judged = at_a_quarter(seen["outputs/cosines"], seen["outputs/captured"], at(filter_step), at(steps // 4))
    return {
        **seen,
        **judged,
        "significant": np.median((values > SIGNIFICANT * values[:, :1]).sum(1)),
        "final_score": history.scores[steps],
        "loss_ratio": smooth[-1] / smooth[steps // 4 - 1],
        "values": values,
        "smooth": smooth,
        "scores": [*history.scores.values()],
    }


def subspaces(watched: Mapping[int, Spectra], directions: int) -> dict[str, np.ndarray]:
    """Return "<side>/cosines" (T, layers, directions) and "<side>/captured" (T, layers) of both sides."""
    found = {f"{side}/cosines": cosines(watched, directions, side) for side in SIDES}
    return found | {f"{side}/captured": captured(watched, directions, side) for side in SIDES}


def at_a_quarter(angles: np.ndarray, share: np.ndarray, early: int, quarter: int) -> dict[str, float]:
    """Return medians over layers at the snapshot `quarter`, from cosines (T, layers, d), descending, and shares.

    "chosen": how many layers exceed ALIGNED at the snapshot `early`, "chosen_cosine", their largest cosine, NaN without
    any; over all layers the "mean_cosine", "smallest_cosine" and what is "captured".
    """
    chosen = angles[quarter, angles[early, :, 0] > ALIGNED, 0]
    return {
        "chosen": chosen.size,
        "chosen_cosine": np.median(chosen) if chosen.size else np.nan,
        "mean_cosine": np.median(angles[quarter].mean(-1)),
        "smallest_cosine": np.median(angles[quarter].min(-1)),
        "captured": np.median(share[quarter]),
    }
