"""Fine-tuning in plain PyTorch, one run after the other: what the stacked engine is tested against."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from compressible.adapters.compressed_init import compress_adapters
from compressible.adapters.layer import adapters, get_deep_lora_model
from compressible.adapters.merge import first_output
from compressible.adapters.param_groups import param_groups
from compressible.adapters.targets import saved_modules
from compressible.finetuning.batches import LENGTHS, DeviceRows, TaskLike, validation_score
from compressible.finetuning.dropout.per_run import PerRunDropout
from compressible.finetuning.losses import run_losses, token_losses
from compressible.finetuning.run import FineTuningRun, RunHistory, data_order, fresh_head, run_generator
from compressible.finetuning.trainer import BETAS, EPS


def reference_fine_tune(
    model: nn.Module, runs: Sequence[FineTuningRun], task: TaskLike, steps: int, batch_size: int = 16,
    decay_ratio: float = 1.0, evaluate_at: Sequence[int] = (), dropout: bool = True,
) -> list[RunHistory]:  # fmt: skip
    """Train each run alone with `get_deep_lora_model` and torch's AdamW; the meaning of `fine_tune`."""
    return [_one(model, run, task, steps, batch_size, decay_ratio, evaluate_at, dropout) for run in runs]


def _one(
    source: nn.Module, run: FineTuningRun, task: TaskLike, steps: int, batch_size: int,
    decay_ratio: float, evaluate_at: Sequence[int], dropout: bool,
) -> RunHistory:  # fmt: skip
    device = next(source.parameters()).device
    counter = torch.zeros((), dtype=torch.int64, device=device)
    per_run = PerRunDropout([run.seed], counter)
    rows, order = DeviceRows(task.train, device), data_order(run, len(task.train.labels), steps, batch_size)
    model = get_deep_lora_model(copy.deepcopy(source), run.config, run_generator(run, "factors"))
    head: Any
    for name, head in saved_modules(model, run.config):
        weight, bias = fresh_head(head, run, name)
        head.weight.data = weight
        if head.bias is not None:
            head.bias.data = bias
    model.train(dropout)

    def loss_of(step: int) -> torch.Tensor:
        tokens, labels = rows.batch(order[step], LENGTHS[device.type])
        with per_run:
            logits = first_output(model(**tokens, **({"labels": labels} if task.kind == "generation" else {})))
        return run_losses(task.kind, logits, labels, 1)[0]

    if run.config.variant == "compressed":
        compress_adapters(model, lambda: loss_of(0), generator=run_generator(run, "factors"))
    groups = param_groups(model, run.lr)
    for group in groups:
        if group["name"] == "saved" and run.head_lr is not None:
            group["lr"] = run.head_lr
    adam = torch.optim.AdamW(groups, betas=BETAS, eps=EPS, weight_decay=0.0)
    decay = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: 1 - (1 - decay_ratio) * step / steps)
    losses, scores, began = np.full(steps, np.nan), {}, time.perf_counter()
    for step in range(steps + 1):
        if step in evaluate_at:
            scores[step] = _score(model, task, device)
            model.train(dropout)
        if step == steps:
            break
        adam.zero_grad()
        loss = loss_of(step)
        loss.backward()
        losses[step] = loss.item()
        adam.step()
        decay.step()
        counter += 1
    lost = np.flatnonzero(~np.isfinite(losses))
    chains = {name: [factor.detach() for factor in adapter.factors] for name, adapter in adapters(model).items()}
    heads: dict[str, dict[str, torch.Tensor]] = {
        name: dict(module.named_parameters()) for name, module in saved_modules(model, run.config)
    }
    spent = time.perf_counter() - began
    return RunHistory(run, losses, scores, {}, int(lost[0]) if len(lost) else None, spent, 0, 1, chains, heads, source)


@torch.no_grad()
def _score(model: nn.Module, task: TaskLike, device: torch.device) -> float:
    model.eval()
    rows, logits, losses = DeviceRows(task.validation, device), [], []
    for part in torch.arange(len(task.validation.labels)).split(64):
        tokens, labels = rows.batch(part, LENGTHS["cpu"])
        if task.kind == "generation":
            losses.append(torch.cat(token_losses(first_output(model(**tokens, labels=labels)), labels, 1)))
        else:
            logits.append(first_output(model(**tokens)).float().cpu())
    if losses:
        total, count = torch.stack(losses).sum(0)
        return float(total / count)
    return validation_score(task, torch.cat(logits).numpy())
