"""Few-shot fine-tuning: Deep LoRA's variants and LoRA's starts, each on the same few examples, seed by seed.

LoRA starts in three ways, and the standard one also runs at a second rate; Deep LoRA is of full width, thin or
compressed, the last at two rates of its inner factors. Scores are arrays by method, size of the subset, seed and step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftConfig
from peft.tuners.lora import Embedding
from torch import nn

from compressible.adapters.config import DeepLoraConfig
from compressible.data.pretrained import head_layers
from compressible.data.tasks import Task
from compressible.finetuning.lora import paper_lora_start
from compressible.finetuning.peft_models import of_factors_alone
from compressible.finetuning.run import FineTuningRun, RunHistory

STARTS = ("paper", "standard", "peft")  # of LoRA: the paper's; Kaiming and zeros everywhere; peft's own
VARIANTS = ("full", "thin", "compressed", "slower")  # of Deep LoRA
METHODS = (*STARTS, "control", *VARIANTS)
FIXED = ["position_embeddings", "token_type_embeddings", "relative_attention_bias"]  # never adapted
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


@dataclass(frozen=True)
class Method:
    """A configuration, the peak rate of its inner factors, and what gives its factors another start than peft's."""

    config: PeftConfig
    rate: float
    start: Callable[[Any, torch.Generator], None] | None = None


def methods(
    model: nn.Module, matrices: list[str], protocol: str, rank: int, init_scale: float, rates: Rates
) -> dict[str, Method]:
    """Return each of METHODS for `matrices`, ends of layers' names or ALL_DENSE.

    Protocol "authors" leaves the head frozen, "clean" trains it. r = `rank`, eps = `init_scale`.
    """
    shared = _shared(model, matrices, protocol) | {"r": rank}

    def deep(variant: str, inner: float) -> Method:
        ratio = rates.outer / inner
        return Method(DeepLoraConfig(depth=3, variant=variant, init_scale=init_scale, lr_ratio=ratio, **shared), inner)

    lora = LoraConfig(lora_alpha=rank, **shared)
    return {
        "paper": Method(lora, rates.outer, paper_lora_start),
        "standard": Method(lora, rates.outer, standard_start),
        "peft": Method(lora, rates.outer),
        "control": Method(lora, rates.control, standard_start),
        "full": deep("full", rates.outer),
        "thin": deep("thin", rates.outer),
        "compressed": deep("compressed", rates.inner),
        "slower": deep("compressed", rates.slower),
    }


@of_factors_alone
@torch.no_grad()
def standard_start(model: nn.Module, generator: torch.Generator) -> None:
    """Start LoRA of embeddings as of linear layers, Kaiming A (r, n) and B zero; peft has A zero and B from N(0, 1)."""
    for layer in model.modules():
        if isinstance(layer, Embedding):
            for name, a in layer.lora_embedding_A.items():
                a.copy_((2 * torch.rand(a.shape, generator=generator) - 1) / a.shape[1] ** 0.5)
                layer.lora_embedding_B[name].zero_()


def planned_runs(
    chosen: Mapping[Any, Method], task: Task, sizes: Sequence[int], seeds: Iterable[int]
) -> list[FineTuningRun]:
    """Return the runs by method, size and seed, the last one fastest; a head that trains takes the outer rate.

    The seed also draws the subset of the training rows, so that it is the same for all methods.
    """
    return [
        FineTuningRun(way.config, way.rate, seed, task.subset(size, seed), _head_rate(way), start=way.start)
        for way in chosen.values()
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


def _head_rate(way: Method) -> float | None:
    """That of the outer factors, none where the head stays as it is."""
    if not getattr(way.config, "modules_to_save", None):
        return None
    return way.rate * min(1, getattr(way.config, "lr_ratio", 1))


def _shared(model: nn.Module, matrices: list[str], protocol: str) -> dict[str, Any]:
    head = head_layers(model)
    dense = [name for name, layer in model.named_modules() if isinstance(layer, (nn.Linear, nn.Embedding))]
    return {
        "target_modules": dense if matrices == ALL_DENSE else matrices,
        "exclude_modules": FIXED + head,
        "modules_to_save": head if protocol == "clean" else None,
    }
