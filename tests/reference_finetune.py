"""Fine-tuning in plain PyTorch, one run after the other: what the stacked engine is tested against."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

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
    model: nn.Module,
    runs: Sequence[FineTuningRun],
    task: TaskLike,
    steps: int,
    batch_size: int = 16,
    decay_ratio: float = 1.0,
    evaluate_at: Sequence[int] = (),
    dropout: bool = True,
) -> list[RunHistory]:
    """Train each run alone with `get_deep_lora_model` and torch's AdamW; the meaning of `fine_tune`."""
    return [PlainRun(model, run, task, steps, batch_size, dropout).train(decay_ratio, evaluate_at) for run in runs]


class PlainRun:
    """One run over a model of its own, at its start."""

    def __init__(
        self, source: nn.Module, run: FineTuningRun, task: TaskLike, steps: int, batch_size: int, dropout: bool
    ) -> None:
        self.source, self.run, self.task, self.steps, self.dropout = source, run, task, steps, dropout
        self.device = next(source.parameters()).device
        self.counter = torch.zeros((), dtype=torch.int64, device=self.device)
        self.per_run = PerRunDropout([run.seed], self.counter)
        self.rows = DeviceRows(task.train, self.device)
        self.order = data_order(run, len(task.train.labels), steps, batch_size)
        self.model = get_deep_lora_model(copy.deepcopy(source), run.config, run_generator(run, "factors"))
        head: Any
        for name, head in saved_modules(self.model, run.config):
            weight, bias = fresh_head(head, run, name)
            head.weight.data = weight
            if head.bias is not None:
                head.bias.data = bias
        self.model.train(dropout)
        if run.config.variant == "compressed":
            compress_adapters(self.model, lambda: self.loss(0), generator=run_generator(run, "factors"))

    def loss(self, step: int) -> Tensor:
        tokens, labels = self.rows.batch(self.order[step], LENGTHS[self.device.type])
        with self.per_run:
            logits = self.logits(tokens, labels)
        return run_losses(self.task.kind, logits, labels, 1)[0]

    def logits(self, tokens: dict[str, Tensor], labels: Tensor) -> Tensor:
        return first_output(self.model(**tokens, **({"labels": labels} if self.task.kind == "generation" else {})))

    def train(self, decay_ratio: float, evaluate_at: Sequence[int]) -> RunHistory:
        steps, adam = self.steps, self.optimiser()
        decay = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: 1 - (1 - decay_ratio) * step / steps)
        losses, scores, began = np.full(steps, np.nan), {}, time.perf_counter()
        for step in range(steps + 1):
            if step in evaluate_at:
                scores[step] = self.score()
                self.model.train(self.dropout)
            if step == steps:
                break
            adam.zero_grad()
            loss = self.loss(step)
            loss.backward()
            losses[step] = loss.item()
            adam.step()
            decay.step()
            self.counter += 1
        return self.history(losses, scores, time.perf_counter() - began)

    def optimiser(self) -> torch.optim.AdamW:
        groups = param_groups(self.model, self.run.lr)
        for group in groups:
            if group["name"] == "saved" and self.run.head_lr is not None:
                group["lr"] = self.run.head_lr
        return torch.optim.AdamW(groups, betas=BETAS, eps=EPS, weight_decay=0.0)

    @torch.no_grad()
    def score(self) -> float:
        self.model.eval()
        rows, logits, losses = DeviceRows(self.task.validation, self.device), [], []
        for part in torch.arange(len(self.task.validation.labels)).split(64):
            tokens, labels = rows.batch(part, LENGTHS["cpu"])
            found = self.logits(tokens, labels)
            if self.task.kind == "generation":
                losses.append(torch.cat(token_losses(found, labels, 1)))
            else:
                logits.append(found.float().cpu())
        if losses:
            total, count = torch.stack(losses).sum(0)
            return float(total / count)
        return validation_score(self.task, torch.cat(logits).numpy())

    def history(self, losses: np.ndarray, scores: dict[int, float], spent: float) -> RunHistory:
        lost = np.flatnonzero(~np.isfinite(losses))
        divergence = int(lost[0]) if len(lost) else None
        found = adapters(self.model)
        chains = {name: [factor.detach() for factor in adapter.factors] for name, adapter in found.items()}
        heads = {name: dict(module.named_parameters()) for name, module in saved_modules(self.model, self.run.config)}
        return RunHistory(self.run, losses, scores, {}, divergence, spent, 0, 1, chains, heads, self.source)
