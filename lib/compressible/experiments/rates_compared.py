"""Fine-tuning methods, each at the rate that suits it on rows that judge nothing, and the way to a plain model."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from peft import PeftConfig, PeftModel
from torch import Tensor, nn

from compressible.data.tasks import Task
from compressible.experiments.rate_grid import best_of, is_inside, search_each
from compressible.finetuning.finetune import fine_tune
from compressible.finetuning.lora import save_as_lora
from compressible.finetuning.run import FineTuningRun, RunHistory

Methods = Mapping[str, tuple[PeftConfig, Sequence[float]]]


def planned_runs(methods: Methods, seeds: Iterable[int], head_lr: float) -> list[FineTuningRun]:
    """Return a run for every rate of {name: (config, rates)} and every seed, labelled "<name>, <rate>"."""
    return [
        FineTuningRun(config, rate, seed, head_lr=head_lr, label=f"{name}, {rate:g}")
        for name, (config, rates) in methods.items()
        for rate in rates
        for seed in list(seeds)
    ]


def in_windows(losses: np.ndarray, count: int = 20) -> tuple[np.ndarray, np.ndarray]:
    """Return the middles (W,) of windows of a `count`th of the steps, and means (S, W) of losses (S, steps) in them."""
    size = max(1, losses.shape[1] // count)
    means = losses[:, : losses.shape[1] // size * size].reshape(len(losses), -1, size).mean(2)
    return size * (np.arange(means.shape[1]) + 0.5), means


def tuned(
    base: nn.Module,
    methods: Mapping[str, PeftConfig],
    task: Task,
    seeds: Sequence[int],
    rates: Sequence[float],
    most: int,
    head_lr: float,
    steps: int,
    **options: Any,
) -> tuple[Methods, dict[str, np.ndarray]]:
    """Choose each method's rate by its mean score over `seeds` on task.validation, and return the methods at theirs.

    All methods begin with the same rates, `most` of which they may try in all: a grid grows beyond an end while that is
    its best. A rate at which one seed diverges is out. `options` (batch_size, ...) go to `fine_tune`.

    Returns:
        {name: (config, [rate])}, and for the record "<name>/rates" and "<name>/rate_scores" (G,) and "rates_inside"
        (M,), whether each method's rate lies inside its grid.
    """

    def scores_of(pairs: Sequence[tuple[str, float]]) -> list[float]:
        runs = [run for name, rate in pairs for run in planned_runs({name: (methods[name], [rate])}, seeds, head_lr)]
        histories = fine_tune(base, runs, task, steps, evaluate_at=[steps], keep_factors=False, **options)
        return np.array([history.scores[steps] for history in histories]).reshape(len(pairs), -1).mean(1).tolist()

    found = search_each(scores_of, list(methods), rates, most - len(rates))
    record: dict[str, np.ndarray] = {"rates_inside": np.array([is_inside(scores) for scores in found.values()])}
    for name, scores in found.items():
        record |= {f"{name}/rates": np.array(list(scores)), f"{name}/rate_scores": np.array(list(scores.values()))}
    return {name: (methods[name], [best_of(scores)]) for name, scores in found.items()}, record


def curves(histories: Sequence[RunHistory]) -> dict[str, np.ndarray]:
    """Return "<label>/losses" (S, steps) and "<label>/pearson" (S, marks) of each label's S runs."""
    by_label: dict[str, list[RunHistory]] = {}
    for history in histories:
        by_label.setdefault(history.run.label, []).append(history)
    out: dict[str, np.ndarray] = {}
    for label, each in by_label.items():
        out[f"{label}/losses"] = np.array([history.losses for history in each])
        out[f"{label}/pearson"] = np.array([list(history.scores.values()) for history in each])
    return out


def best_minus_best(found: Mapping[str, np.ndarray], first: str, second: str) -> np.ndarray:
    """Return by how much the method `first` at its best rate ends above `second` at its own, (S,), of `curves`.

    A rate at which a seed diverged is the best only where all are such.
    """
    ends = [
        [scores[:, -1] for key, scores in found.items() if key.startswith(f"{name}, ") and key.endswith("/pearson")]
        for name in (first, second)
    ]
    best, other = (max(each, key=lambda scores: np.nan_to_num(scores.mean(), nan=-np.inf)) for each in ends)
    return best - other


@torch.no_grad()
def round_trip(model: PeftModel, base: nn.Module, tokens: Mapping[str, Tensor]) -> dict[str, float]:
    """Return the largest change of a logit when the adapters are "merged", and when stock LoRA has "loaded" them.

    model: in evaluation mode, with Deep LoRA; base: the one that it was made from; tokens: a batch of inputs.
    """
    own = model(**tokens).logits
    merged = copy.deepcopy(model).merge_and_unload(safe_merge=True)(**tokens).logits
    with tempfile.TemporaryDirectory() as folder:
        save_as_lora(model, folder)
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()(**tokens).logits
    return {"merged": (merged - own).abs().max().item(), "loaded": (loaded - own).abs().max().item()}
