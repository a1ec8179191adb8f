"""A fine-tuning run and what it leaves: its settings, all that its seed draws, and its history."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from compressible.adapters.config import DeepLoraConfig
from compressible.adapters.layer import factor_dtype, get_deep_lora_model

HEAD_STD = 0.02  # transformers' own start of a head


@dataclass(frozen=True)
class FineTuningRun:
    """One run of a stack: what is adapted and how, its peak learning rate (P1: 1e-2 compressed, else 1e-4) and seed.

    The seed draws factors, head, data order and dropout. subset: rows of the training set, by default all.
    config.modules_to_save are linear heads that the run trains, from a fresh N(0, .02^2) start, at `head_lr` (default
    lr).
    """

    config: DeepLoraConfig
    lr: float
    seed: int = 0
    subset: Tensor | None = None
    head_lr: float | None = None
    label: str = ""


@dataclass
class RunHistory:
    """What one run left: losses (steps,) before each update, scores and what `watch` gave by step, and the factors.

    A score is the task's metric, higher is better; for generation the mean cross-entropy of the validation set's
    tokens in nats, lower is better (no text is written while runs train, so its metric, BLEU, is not taken).

    seconds, those before a kill included, and peak_bytes are of the whole pass, which `shared` runs went through
    together. `divergence` is None or the first step whose loss was not finite, `steps` where the last update did it
    and its score or factors show it; scores are NaN from there on.
    """

    run: FineTuningRun
    losses: np.ndarray
    scores: dict[int, float]
    watched: dict[int, Any]
    divergence: int | None
    seconds: float
    peak_bytes: int
    shared: int
    chains: dict[str, list[Tensor]] | None = field(repr=False)
    heads: dict[str, dict[str, Tensor]] | None = field(repr=False)
    base: nn.Module = field(repr=False)

    def model(self) -> nn.Module:
        """Return the model with this run's adapters and head, as `get_deep_lora_model` makes it; to merge or export.

        Frozen weights are shared with the model that was given; copy it before you merge. Raises
        TuningDivergenceError for a run that diverged, RuntimeError where factors were not kept.
        """
        self.check()
        if self.chains is None:
            raise RuntimeError("this history holds no factors: call fine_tune with keep_factors=True")
        with torch.random.fork_rng(devices=[]):  # the factors drawn here are replaced
            model = get_deep_lora_model(sharing(self.base), self.run.config)
        for name, chain in self.chains.items():
            model.get_submodule(name).factors = nn.ParameterList([nn.Parameter(factor.clone()) for factor in chain])
        for name, state in self.heads.items():
            head = model.get_submodule(name)
            for own, value in state.items():  # in the model's precision, as it meets the model's values
                setattr(head, own, nn.Parameter(value.to(head.weight.dtype, copy=True)))
        return model

    def check(self) -> None:
        """Raise TuningDivergenceError if the run diverged."""
        if self.divergence is not None:
            raise TuningDivergenceError(self)


class TuningDivergenceError(RuntimeError):
    """A run that stopped being finite; `history` holds it up to there."""

    def __init__(self, history: RunHistory) -> None:
        step, losses = history.divergence, history.losses
        last = losses[step - 1] if step else float("nan")
        super().__init__(
            f"run {history.run.label or history.run.seed!r} stopped being finite at step {step} with lr "
            f"{history.run.lr:g} (last finite loss {last:.6g}); expected a finite loss: lower lr or init_scale"
        )
        self.history = history


def data_order(run: FineTuningRun, rows: int, steps: int, batch_size: int) -> Tensor:
    """Return the training rows (steps, B) of a run: new order every epoch, incomplete last batches left out.

    A subset of just one batch keeps its order (papers' trap T5).
    """
    subset = torch.arange(rows) if run.subset is None else torch.as_tensor(run.subset).cpu().long()
    each = len(subset) // batch_size
    if len(subset) == batch_size:
        return subset.expand(steps, batch_size)
    generator = run_generator(run, "order")
    epochs = [torch.randperm(len(subset), generator=generator)[: each * batch_size] for _ in range(-(-steps // each))]
    return subset[torch.cat(epochs).view(-1, batch_size)[:steps]]


def fresh_head(source: nn.Linear, run: FineTuningRun, name: str) -> tuple[Tensor, Tensor]:
    """Return the weight (m, n), N(0, .02^2), and zero bias from which a run trains a head; float32 at least."""
    kind = factor_dtype(source)
    weight = HEAD_STD * torch.randn(source.weight.shape, generator=run_generator(run, name), dtype=torch.float64)
    bias = torch.zeros(source.out_features, dtype=kind, device=source.weight.device)
    return weight.to(source.weight.device, kind), bias


def run_generator(run: FineTuningRun, purpose: str) -> torch.Generator:
    """Return the generator of a run's seed for one purpose, such as "order"; independent of all others."""
    words = np.random.SeedSequence([run.seed, *purpose.encode()]).generate_state(2)
    return torch.Generator().manual_seed(int(words[0]) << 31 | int(words[1]) >> 1)


def sharing(model: nn.Module) -> nn.Module:
    """Return a copy of the structure whose parameters and buffers are the model's own tensors."""
    tensors = [*model.parameters(), *model.buffers()]
    memo = {id(t): nn.Parameter(t.data, False) if isinstance(t, nn.Parameter) else t for t in tensors}
    return copy.deepcopy(model, memo)
