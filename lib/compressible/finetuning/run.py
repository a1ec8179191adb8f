"""A fine-tuning run and what it leaves: its settings, all that its seed draws, and its history."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import peft
import torch
from torch import Tensor, nn

from compressible.finetuning.peft_models import (
    ADAPTER,
    GradientStart,
    Start,
    adapted_by_peft,
    base_of,
    drawn_start,
    set_chain,
    set_heads,
    sharing,
    take_off,
    tuner_layers,
    with_start_of,
)

HEAD_STD = 0.02  # transformers' own start of a head


@dataclass(frozen=True)
class FineTuningRun:
    """One run of a stack, over the model that `peft.get_peft_model` makes after torch.manual_seed(seed).

    Args:
        config: what is adapted and how, a DeepLoraConfig, LoraConfig or any other of peft's. What peft trains whole,
            such as a task_type's head, starts from fresh N(0, .02^2) weights where it is linear.
        lr: peak step size of the inner factors, > 0 (P1: 1e-2 compressed, else 1e-4).
        seed: >= 0; draws factors, head, data order, dropout and what a method of peft draws in training.
        subset: numbers (k,) of the training rows that it sees, by default all.
        head_lr: peak step size of what is trained whole, by default lr.
        label: its name in messages.
        lr_ratio: step size of the outer factors over that of the inner ones, by default the config's; for a LoraConfig
            that of B over A in linear layers, LoRA+'s ratio, by default 1.
        start: a function of a PeftModel and a generator that gives the factors other values than the config's start,
            such as `paper_lora_start`; or a `GradientStart`, of LoRA and of compressed Deep LoRA.

    Raises:
        ValueError: by `fine_tune`, which checks all runs before it begins.

    Example:
        >>> import compressible as cd
        >>> import peft
        >>> deep = cd.DeepLoraConfig(r=8, variant="compressed")
        >>> lora = peft.LoraConfig(r=8, lora_alpha=8, target_modules="all-linear")
        >>> runs = [cd.FineTuningRun(deep, lr=1e-2), cd.FineTuningRun(lora, lr=1e-4, start=cd.paper_lora_start)]
        >>> [run.seed for run in runs]
        [0, 0]

    Reference:
        P1 (Yaras et al. 2024), Table 1 and Figures 6 to 9, fine-tuning of BERT and T5.
    """

    config: peft.PeftConfig
    lr: float
    seed: int = 0
    subset: Tensor | None = None
    head_lr: float | None = None
    label: str = ""
    lr_ratio: float | None = None
    start: Start | GradientStart | None = None

    def factor_lr(self, at: int, length: int, embedding: bool = False) -> float:
        """Return the peak step size of the factor `at` (0: W_1) of a chain of `length`, 2 for LoRA."""
        if length == 2:
            outer, own = at == 1 and not embedding, 1.0  # as peft's LoRA+
        else:
            outer, own = at in (0, length - 1), self.config.lr_ratio  # type: ignore[attr-defined]  # a DeepLoraConfig
        ratio = own if self.lr_ratio is None else self.lr_ratio
        return self.lr * ratio if outer else self.lr


@dataclass
class RunHistory:
    """What one run left, made by `fine_tune`.

    Args:
        run: its settings.
        losses: (steps,) before each update.
        scores: by step, the task's metric, higher is better; for texts the mean cross-entropy of the validation
            set's words in nats, lower is better (no text is written while runs train, so BLEU is not taken).
        watched: by step, what `watch` gave.
        divergence: None or the first step whose loss was not finite, `steps` where the last update did it and its
            score or factors show it; scores are NaN from there on.
        seconds: of the whole pass, those before a kill included.
        peak_bytes: of the whole pass on its GPU, 0 on a CPU.
        shared: how many runs went through the pass together.
        chains: factors [W_1, ..., W_L] by layer, A and B for LoRA, or None.
        heads: "weight" (m, n) and "bias" (m,) by head, or None.
        base: the model that was given.
        others: of a run that went alone, what else of peft's model was trained or changed, by name, or None.
        taken_off: [A, B] by layer of the start that was taken off the frozen weight (PiSSA, OLoRA, LoRA-GA), or None.
        config: of a run that went alone, what peft made of its config: EVA's ranks and a prompt's sizes; or None.

    Raises:
        FineTuningDivergenceError: by `model` and `check`, for a run that diverged.

    Example:
        >>> import compressible as cd
        >>> import torch
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> sizes = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> model = BertForSequenceClassification(BertConfig(**sizes, intermediate_size=16, num_labels=1))
        >>> run = cd.FineTuningRun(cd.DeepLoraConfig(r=2, variant="thin", target_modules=["query"]), lr=1e-3)
        >>> rows = cd.Examples({"input_ids": torch.arange(48).reshape(8, 6)}, torch.rand(8), texts=())
        >>> task = cd.Task("random", "regression", 1, "pearson", train=rows, validation=rows)
        >>> [history] = cd.fine_tune(model, [run], task, steps=3, batch_size=4, evaluate_at=[3], show_progress=False)
        >>> history.losses.shape, list(history.scores), history.divergence
        ((3,), [3], None)
        >>> type(history.model()).__name__  # to merge or to save
        'PeftModel'

    Reference:
        P1 (Yaras et al. 2024), Figure 6: training loss and validation metric over the steps.
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
    others: dict[str, Tensor] | None = field(default=None, repr=False)
    taken_off: dict[str, list[Tensor]] | None = field(default=None, repr=False)
    config: peft.PeftConfig | None = field(default=None, repr=False)

    def model(self) -> nn.Module:
        """Return the PeftModel with this run's factors and head, as `get_peft_model` makes it; to merge or to save.

        Frozen weights are shared with the model that was given; copy it before you merge. Raises
        FineTuningDivergenceError for a run that diverged, RuntimeError where factors were not kept.
        """
        self.check()
        if self.chains is None:
            raise RuntimeError("this history holds no factors: call fine_tune with keep_factors=True")
        run, ended = self.run, self.run.config if self.config is None else self.config
        model = adapted_by_peft(sharing(self.base), drawn_start(ended), run.seed, empty=self.others is None)
        made = model.peft_config[ADAPTER] if self.config is None else ended
        model.peft_config[ADAPTER] = with_start_of(run.config, made)
        layers = tuner_layers(base_of(model))
        for name, chain in self.chains.items():
            set_chain(layers[name], chain)
        for name, pair in (self.taken_off or {}).items():
            take_off(layers[name], pair)
        for name, value in (self.others or {}).items():
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, nn.Parameter(value.clone()))
        set_heads(base_of(model), self.heads or {})
        return model

    def check(self) -> None:
        """Raise FineTuningDivergenceError if the run diverged."""
        if self.divergence is not None:
            raise FineTuningDivergenceError(self)


class FineTuningDivergenceError(RuntimeError):
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
    kind = torch.promote_types(source.weight.dtype, torch.float32)
    weight = HEAD_STD * torch.randn(source.weight.shape, generator=run_generator(run, name), dtype=torch.float64)
    bias = torch.zeros(source.out_features, dtype=kind, device=source.weight.device)
    return weight.to(source.weight.device, kind), bias


def run_generator(run: FineTuningRun, purpose: str) -> torch.Generator:
    """Return the generator of a run's seed for one purpose, such as "order"; independent of all others."""
    return torch.Generator().manual_seed(seed_of(run, purpose))


def seed_of(run: FineTuningRun, purpose: str) -> int:
    """Return the seed, below 2^63, of a run's draws for one purpose."""
    words = np.random.SeedSequence([run.seed, *purpose.encode()]).generate_state(2)
    return int(words[0]) << 31 | int(words[1]) >> 1
