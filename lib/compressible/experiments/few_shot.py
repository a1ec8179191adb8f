"""Few-shot fine-tuning: Deep LoRA's variants and LoRA's starts, each on the same few examples, seed by seed.

LoRA starts in three ways, and the standard one also runs at a second rate; Deep LoRA is of full width, thin or
compressed, the last at two rates of its inner factors. Scores are arrays by method, size of the subset, seed and step.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from compressible.adapters.config import DeepLoraConfig
from compressible.data.pretrained import head_layers
from compressible.data.tasks import Task
from compressible.finetuning.run import FineTuningRun, RunHistory

STARTS = ("paper", "standard", "peft")  # of LoRA
VARIANTS = ("full", "thin", "compressed", "slower")  # of Deep LoRA
METHODS = (*STARTS, "control", *VARIANTS)
FIXED = ["position_embeddings", "token_type_embeddings"]  # never adapted
ALL_DENSE = ["all-dense"]  # every linear layer, the pooler included, and the word embeddings (papers' trap T10)


@dataclass(frozen=True)
class Rates:
    """Learning rates: `outer` of all factors but compressed inner ones, `inner`; second ones for two controls.

    control: of LoRA's standard start. slower: of the inner factors of the compressed variant, "slower" in METHODS.
    """

    outer: float
    control: float
    inner: float
    slower: float


def methods(
    model: nn.Module, matrices: list[str], protocol: str, rank: int, init_scale: float, rates: Rates
) -> dict[str, tuple[DeepLoraConfig, float]]:
    """Return the configuration and the rate of each of METHODS for `matrices`, ends of layers' names or ALL_DENSE.

    Protocol "authors" leaves the head frozen, "clean" trains it. r = `rank`, eps = `init_scale`.
    """
    shared = _shared(model, matrices, protocol) | {"r": rank}

    def lora(start: str) -> DeepLoraConfig:
        return DeepLoraConfig(depth=2, variant="thin", init_lora_weights=start, **shared)

    def deep(variant: str, inner: float) -> DeepLoraConfig:
        ratio = rates.outer / inner
        return DeepLoraConfig(depth=3, variant=variant, init_scale=init_scale, outer_ratio=ratio, **shared)

    return {
        **{start: (lora(start), rates.outer) for start in STARTS},
        "control": (lora("standard"), rates.control),
        **{variant: (deep(variant, rates.outer), rates.outer) for variant in ("full", "thin")},
        "compressed": (deep("compressed", rates.inner), rates.inner),
        "slower": (deep("compressed", rates.slower), rates.slower),
    }


def planned_runs(
    chosen: Mapping[str, tuple[DeepLoraConfig, float]], task: Task, sizes: Sequence[int], seeds: Iterable[int]
) -> list[FineTuningRun]:
    """Return the runs by method, size and seed, the last one fastest; a head that trains takes the outer rate.

    The seed also draws the subset of the training rows, so that it is the same for all methods.
    """
    return [
        FineTuningRun(config, rate, seed, task.subset(size, seed), rate * min(1, config.outer_ratio or 1))
        for config, rate in chosen.values()
        for size in sizes
        for seed in list(seeds)
    ]


def outcome(histories: Sequence[RunHistory], sizes: Sequence[int], seeds: int) -> dict[str, np.ndarray]:
    """Return the output of `planned_runs`, whose histories these are: scores, losses, cost and `gains`.

    "scores" (methods, sizes, seeds, marks), "losses" (..., steps); of the pass that holds a method's first run "pass
    seconds" and the number of runs, "pass shared", (methods,).
    """
    shape = (len(METHODS), len(sizes), seeds, -1)
    scores = np.array([[run.scores[step] for step in sorted(run.scores)] for run in histories]).reshape(shape)
    firsts = histories[:: len(sizes) * seeds]
    return {
        "scores": scores,
        "losses": np.array([run.losses for run in histories]).reshape(shape),
        **gains(dict(zip(METHODS, scores[..., -1], strict=True)), sizes),
        "pass seconds": np.array([run.seconds for run in firsts]),
        "pass shared": np.array([run.shared for run in firsts]),
    }


def gains(scores: Mapping[str, np.ndarray], sizes: Sequence[int]) -> dict[str, np.ndarray]:
    """Return per seed (S,) what every variant gains over every other method, from scores (sizes, S) by METHODS.

    "<variant> - <other>, n = <size>" and "..., mean" over sizes, and "gain shrinks": how much less full width gains
    over the paper's LoRA at the second size than at the first. Also "<method>" (sizes,), its mean score over seeds.
    """
    others = (*STARTS, "control", "full")
    pairs = [(variant, other) for variant in VARIANTS for other in others if variant != other]
    out: dict[str, np.ndarray] = {}
    for variant, other in pairs:
        gain = scores[variant] - scores[other]
        out |= {f"{variant} - {other}, n = {size}": row for size, row in zip(sizes, gain, strict=True)}
        out[f"{variant} - {other}, mean"] = gain.mean(0)
    first, second = scores["full"][:2] - scores["paper"][:2]
    return out | {name: score.mean(1) for name, score in scores.items()} | {"gain shrinks": first - second}


def _shared(model: nn.Module, matrices: list[str], protocol: str) -> dict[str, Any]:
    head, dense = head_layers(model), matrices == ALL_DENSE
    return {
        "target_modules": "all-linear" if dense else matrices,
        "embeddings": dense,
        "task_type": "SEQ_CLS",
        "exclude_modules": FIXED + head,
        "modules_to_save": head if protocol == "clean" else None,
    }
