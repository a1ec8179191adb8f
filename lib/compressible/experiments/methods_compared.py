"""Fine-tuning methods at their own best rates: quality over seeds, and what each trains, keeps in memory and takes.

A method's rate is chosen on rows that train and judge nothing, over seeds that judge nothing; the grid grows beyond an
end that wins. Then the methods are judged on the task's validation rows. A seed draws the same training rows, order,
head and dropout for all, so that differences are taken seed by seed. In a regression the head's bias starts at the mean
label of the run's rows: otherwise a body at a high rate learns that mean first, and saturates.
"""

from __future__ import annotations

import copy
import gc
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from compressible.adapters.config import DeepLoraConfig
from compressible.data.examples import Examples
from compressible.data.pretrained import head_layers
from compressible.data.tasks import Task
from compressible.experiments.fine_tuning_methods import (
    METHODS,
    Prepared,
    Setting,
    predicted_bytes,
    prepare,
    state_bytes,
)
from compressible.experiments.outcomes import prefixed
from compressible.experiments.rate_grid import best_of, is_inside, search_rates
from compressible.finetuning.losses import run_losses
from compressible.finetuning.run import FineTuningRun, data_order, fresh_head, run_generator
from compressible.networks.optim.relora import restart
from compressible.runtime import devices
from compressible.runtime.checks import expect

JUDGED_AT_ONCE = 128  # rows
SPLIT_SEED = 2**32  # of the rows that choose rates; no run has it


@dataclass(frozen=True)
class Trained:
    """What a run came to; the peak is NaN on a CPU, where tensors' memory is not counted."""

    score: float
    losses: np.ndarray  # (steps,) before each update
    seconds: float  # a step, with what the method does before the first and between steps
    trainable: int
    state_bytes: int
    peak_bytes: float  # of the model, gradients, optimiser's state and activations


def split_rows(task: Task, tuning_rows: int) -> tuple[Task, Examples]:
    """Return the task without `tuning_rows` of its training rows, and these, for choosing rates; the same for ever."""
    total = len(task.train)
    expect("tuning_rows", tuning_rows, 0 < tuning_rows < total, f"1 to {total - 1}")
    order = task.subset(total, seed=SPLIT_SEED, replace=False)
    return replace(task, train=task.train.take(order[tuning_rows:])), task.train.take(order[:tuning_rows])


def on_device(task: Task, device: str) -> Task:
    """Return the task with its rows on a device."""
    return replace(task, train=task.train.to(device), validation=task.validation.to(device))


def compare(
    base: nn.Module,
    task: Task,
    tuning: Examples,
    rates: Mapping[str, Sequence[float]],
    setting: Setting,
    seeds: int,
    tuning_seeds: int = 1,
) -> dict[str, Any]:
    """Tune every method of `rates` and judge it over seeds, on the device of the task's rows.

    Args:
        base: the pretrained model, on the CPU, never changed.
        task: training rows, and the validation rows that judge; of `split_rows`.
        tuning: the rows that choose rates.
        rates: {method: rates to begin with}, of METHODS, "full" and "LoRA" among them.
        setting: what all share.
        seeds: runs of a method that are judged.
        tuning_seeds: runs of a rate when it is chosen.

    Returns:
        By method "<method>/rates" and "/tuning" (R,) mean scores there, "/rate", "/inside" the grid; over seeds
        "/score", "/losses", "/seconds" a step, "/peak bytes"; "/trainable", "/state bytes" and "/predicted bytes".
        Also "judging rows", their number, and what `differences` gives.
    """
    missing = {"full", "LoRA"} - set(rates)
    known = set(rates) <= set(METHODS) and not missing
    expect("methods", sorted(rates), known, f"full, LoRA and some of {', '.join(METHODS)}")
    out: dict[str, Any] = {}
    for method, grid in rates.items():
        own = _compare_one(method, (base, task, setting), tuning, grid, seeds, tuning_seeds)
        out |= prefixed(method, own | {"predicted bytes": predicted_bytes(method, base, setting.rank)})
    return out | {"judging rows": len(task.validation)} | differences(out, list(rates))


def differences(found: Mapping[str, Any], methods: Sequence[str]) -> dict[str, Any]:
    """Return how methods compare, from what `compare` found of each.

    Over seeds "<method> - full" and "<method> - LoRA", differences of scores with the same seed, and, where peaks were
    measured, "memory saved" by LoRA, in units of the moments that full fine-tuning keeps of what LoRA leaves frozen.
    Over methods "state as predicted", to the byte, and "rates inside" their grids.
    """
    out = {
        f"{method} - {other}": found[f"{method}/score"] - found[f"{other}/score"]
        for other in ("full", "LoRA")
        for method in methods
        if method != other
    }
    saved = found["full/peak bytes"] - found["LoRA/peak bytes"]
    if np.isfinite(saved).all():
        out["memory saved"] = saved / (8.0 * (found["full/trainable"] - found["LoRA/trainable"]))
    exact = [found[f"{method}/state bytes"] == found[f"{method}/predicted bytes"] for method in methods]
    return out | {
        "state as predicted": np.array(exact),
        "rates inside": np.array([found[f"{method}/inside"] for method in methods]),
    }


def train(
    method: str, base: nn.Module, task: Task, judging: Examples, rate: float, seed: int, setting: Setting
) -> Trained:
    """Fine-tune a copy of `base` on the device of the task's rows, and score it on the rows `judging`."""
    rows = task.subset(setting.few_rows, seed, replace=False)
    run = FineTuningRun(DeepLoraConfig(), rate, seed, rows)
    start = task.train.take(rows).labels.mean().item() if task.kind == "regression" else 0.0
    order = data_order(run, len(task.train), setting.steps, setting.batch_size)
    device = task.train.labels.device
    with _own_randomness(device, seed), _peak_bytes(device) as peak:
        model = _with_fresh_head(base, run, start).to(device).train()
        began = devices.clock(task.train.labels)
        prepared = prepare(method, model, rate, setting, lambda model: _loss(model, task, order[0]))
        torch.manual_seed(seed)  # starts draw more or less; dropout is to be the same
        losses = _loop(prepared, order, lambda rows: _loss(prepared.model, task, rows), run)
        seconds = (devices.clock(task.train.labels) - began) / setting.steps
        peak_bytes = peak()
    trainable = sum(p.numel() for p in prepared.model.parameters() if p.requires_grad)
    score = judged(prepared.model, task, judging) if np.isfinite(losses).all() else math.nan
    return Trained(score, losses, seconds, trainable, state_bytes(prepared.optimizer), peak_bytes)


@torch.no_grad()
def judged(model: nn.Module, task: Task, rows: Examples) -> float:
    """Return the task's metric of a model on some rows; NaN if an output is not finite."""
    model.eval()
    batches = torch.arange(len(rows)).split(JUDGED_AT_ONCE)
    outputs = torch.cat([model(**rows.batch(batch)[0]).logits for batch in batches])
    return task.score(outputs.cpu().numpy(), rows.labels.cpu().numpy())


def _compare_one(
    method: str, given: tuple[nn.Module, Task, Setting], tuning: Examples, grid: Sequence[float], seeds: int, extra: int
) -> dict[str, Any]:
    """What `compare` returns of one method: its rates over `extra` seeds beyond those that judge, then these."""
    base, task, setting = given

    def run(rate: float, seed: int, judging: Examples) -> Trained:
        return train(method, base, task, judging, rate, seed, setting)

    def mean_scores(rates: Sequence[float]) -> list[float]:
        return [float(np.mean([run(rate, seeds + i, tuning).score for i in range(extra)])) for rate in rates]

    scores = search_rates(mean_scores, grid) if len(grid) > 1 else {grid[0]: math.nan}  # one rate needs no choice
    best = best_of(scores)
    found = [run(best, seed, task.validation) for seed in range(seeds)]
    return {
        "rates": np.array(list(scores)),
        "tuning": np.array(list(scores.values())),
        "rate": best,
        "inside": is_inside(scores),
        "score": np.array([each.score for each in found]),
        "losses": np.array([each.losses for each in found]),
        "seconds": np.array([each.seconds for each in found]),
        "peak bytes": np.array([each.peak_bytes for each in found]),
        "trainable": found[0].trainable,
        "state bytes": found[0].state_bytes,
    }


def _loop(prepared: Prepared, order: Tensor, loss_of: Callable[[Tensor], Tensor], run: FineTuningRun) -> np.ndarray:
    """Take all steps and return the losses (steps,), NaN from where GaLore met a gradient that is not finite."""
    every, generator = prepared.restart_every, run_generator(run, "restarts")
    losses = torch.full((len(order),), math.nan)
    held = []
    for step, rows in enumerate(order):
        if every and step and step % every == 0:
            restart(prepared.model, prepared.optimizer, generator=generator)
        loss = loss_of(rows)
        loss.backward()
        held.append(loss.detach())  # on its device: to look at it would wait for it
        try:
            prepared.optimizer.step()
        except torch.linalg.LinAlgError:
            held[-1] = torch.full_like(held[-1], math.nan)
            break
        prepared.optimizer.zero_grad()
        prepared.schedule.step()
    losses[: len(held)] = torch.stack(held).cpu()
    return losses.numpy()


def _loss(model: nn.Module, task: Task, rows: Tensor) -> Tensor:
    tokens, labels = task.train.batch(rows)
    return run_losses(task.kind, model(**tokens).logits, labels, 1)[0]


def _with_fresh_head(base: nn.Module, run: FineTuningRun, start: float) -> nn.Module:
    """A copy whose head is that of the run's seed, with its bias at `start`."""
    model = copy.deepcopy(base)
    for name in head_layers(model):
        head: Any = model.get_submodule(name)
        weight, bias = fresh_head(head, run, name)
        head.weight.data.copy_(weight)
        if head.bias is not None:
            head.bias.data.copy_(bias + start)
    return model


@contextmanager
def _own_randomness(device: torch.device, seed: int) -> Iterator[None]:
    """Let peft's starts and the model's dropout follow the seed inside, and leave torch's generators as they were."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


@contextmanager
def _peak_bytes(device: torch.device) -> Iterator[Callable[[], float]]:
    """Give a function for the most bytes that tensors held on a GPU beyond what is held now; NaN on a CPU."""
    gc.collect()  # what an earlier run held in circles is not this one's
    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    with devices.peak_inside(str(device)) as peak:
        yield lambda: float(peak() - before) if device.type == "cuda" else math.nan
