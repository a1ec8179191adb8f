"""Fine-tuning in plain PyTorch, one run after the other: what the stacked engine is tested against."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import peft
import torch
from peft.optimizers import create_loraplus_optimizer
from peft.tuners.lora.loraga import preprocess_loraga
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

import compressible as cd
from compressible.adapters.layer import DeepLoraLayer
from compressible.finetuning.batches import LENGTHS, DeviceRows, TaskLike, validation_score
from compressible.finetuning.dropout.per_run import PerRunDropout
from compressible.finetuning.losses import first_output, run_losses, token_losses
from compressible.finetuning.run import FineTuningRun, RunHistory, data_order, fresh_head
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
    """Train each run alone with `peft.get_peft_model` and torch's AdamW; the meaning of `fine_tune`."""
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
        base, config = copy.deepcopy(source), copy.deepcopy(run.config)
        if getattr(config, "init_lora_weights", None) == "lora_ga":
            self.approximate(base, config)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(run.seed)
            self.model = peft.get_peft_model(base, config)
        generator = torch.Generator().manual_seed(int(run.seed))
        if run.start is not None:
            run.start(self.model, generator)
        for name, head in self.heads().items():
            weight, bias = fresh_head(head, run, name)
            head.weight.data = weight
            if head.bias is not None:
                head.bias.data = bias
        self.model.train(dropout)
        if getattr(run.config, "variant", None) == "compressed" and run.config.init_weights:
            cd.compress_adapters(self.model, lambda: self.loss(0), generator=generator)

    def approximate(self, base: Any, config: Any) -> None:
        """Give LoRA-GA the gradient of the first batch, which the run's fresh head sees."""
        self.model = base
        for name, module in base.named_modules():
            if name.endswith(("classifier", "score")):
                weight, bias = fresh_head(module, self.run, name)
                module.weight.data = weight
                if module.bias is not None:
                    module.bias.data = bias
        base.train(self.dropout)
        preprocess_loraga(base, config, lambda: self.loss(0).backward())

    def heads(self) -> dict[str, Any]:
        """The linear layers that peft trains whole, by their names in the plain model."""
        found = {}
        for name, module in self.model.get_base_model().named_modules():
            if isinstance(module, ModulesToSaveWrapper):
                for inner, part in module.modules_to_save["default"].named_modules():
                    if isinstance(part, nn.Linear):
                        found[f"{name}.{inner}".rstrip(".")] = part
        return found

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
        """With the rates of `param_groups`, or of peft's LoRA+; the heads at a rate of their own."""
        run, given = self.run, {"betas": BETAS, "eps": EPS, "weight_decay": 0.0}
        if isinstance(run.config, cd.DeepLoraConfig):
            adam = torch.optim.AdamW(cd.param_groups(self.model, run.lr), **given)
        else:
            rates = {"lr": run.lr, "loraplus_lr_ratio": run.lr_ratio or 1.0, "loraplus_lr_embedding": run.lr}
            adam = create_loraplus_optimizer(self.model, torch.optim.AdamW, **rates, **given)
        wholes = [module for module in self.model.modules() if isinstance(module, ModulesToSaveWrapper)]
        heads = [parameter for module in wholes for parameter in module.modules_to_save.parameters()]
        apart = {id(parameter) for parameter in heads}
        for group in adam.param_groups:
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in apart]
        if heads:
            adam.add_param_group({"params": heads, "lr": run.lr if run.head_lr is None else run.head_lr, **given})
        return adam

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
        chains = {}
        for name, layer in self.model.get_base_model().named_modules():
            if isinstance(layer, DeepLoraLayer):
                chains[name] = [factor.detach() for factor in layer.deep_lora_factors["default"]]
            elif isinstance(layer, peft.tuners.lora.Embedding):
                chains[name] = [layer.lora_embedding_A["default"].detach(), layer.lora_embedding_B["default"].detach()]
            elif isinstance(layer, peft.tuners.lora.LoraLayer):
                chains[name] = [layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()]
        heads = {name: dict(module.named_parameters()) for name, module in self.heads().items()}
        return RunHistory(self.run, losses, scores, {}, divergence, spent, 0, 1, chains, heads, self.source)
