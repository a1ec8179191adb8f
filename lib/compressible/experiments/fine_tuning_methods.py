"""Six ways to fine-tune one model, each as a model with an optimiser, and what their state weighs by arithmetic.

    full       all parameters by AdamW
    LoRA       W + B A by peft, scaling 1, all linear layers but the head
    LoRA+      the same; B learns PLUS_RATIO times as fast as A (peft's optimiser)
    GaLore     all parameters; the moments of the same layers' matrices live in r directions, chosen anew every period
    ReLoRA     LoRA that is merged and started anew every period, with the moments reset and a short warm-up
    Deep LoRA  P1's compressed adapters: three r x r factors between outer ones from the first gradient

The head learns at one rate of its own everywhere, so that only the method's rate is tuned; AdamW's constants are the
same, without weight decay, and so is the schedule: a warm-up over the first tenth of the steps, then a cosine to a
tenth of the rate.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import peft
import torch
from peft.optimizers import create_loraplus_optimizer
from torch import Tensor, nn

from compressible.adapters.compressed_init import compress_adapters
from compressible.adapters.config import DeepLoraConfig
from compressible.data.pretrained import head_layers
from compressible.finetuning.param_groups import param_groups
from compressible.networks.optim.galore import GaLoreAdamW
from compressible.networks.optim.relora import restart_schedule
from compressible.runtime.checks import expect

METHODS = ("full", "LoRA", "LoRA+", "GaLore", "ReLoRA", "Deep LoRA")
ADAM: dict[str, Any] = {"betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": 0.0}
PLUS_RATIO = 16.0  # LoRA+'s authors' choice
GALORE_SCALE = 4.0  # of GaLore's authors where they fine-tune; .25 where they pre-train
DEPTH = 3  # r x r factors of Deep LoRA

Loss = Callable[[nn.Module], Tensor]


@dataclass(frozen=True)
class Setting:
    """What all methods share.

    Args:
        rank: r, even, usually 4 to 16.
        period: steps between GaLore's projections, and between ReLoRA's merges.
        steps: updates of a run.
        batch_size: rows in a batch.
        few_rows: training rows of a run, which its seed draws.
        head_rate: peak rate of the head.
    """

    rank: int
    period: int
    steps: int
    batch_size: int
    few_rows: int
    head_rate: float = 1e-3


@dataclass(frozen=True)
class _Rates:
    """The peak rate of the body and of the head, whose layers are named as before any wrapping."""

    body: float
    head: float
    heads: list[str]

    def groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """An optimiser's groups of what is trained: the body, then the head."""
        named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        body = [parameter for name, parameter in named if not _is_head(name, self.heads)]
        head = [parameter for name, parameter in named if _is_head(name, self.heads)]
        return [{"params": body, "lr": self.body}, {"params": head, "lr": self.head}]


@dataclass(frozen=True)
class Prepared:
    """A model ready to train: its optimiser, the schedule of all rates, and whether LoRA starts anew every period."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    restart_every: int | None = None


def prepare(method: str, model: nn.Module, rate: float, setting: Setting, first_loss: Loss) -> Prepared:
    """Make a method of METHODS of a model, which is changed in place; ValueError for any other.

    `first_loss` gives the loss of a model on its first batch, which Deep LoRA's start looks at.
    """
    expect("method", method, method in METHODS, f"one of {', '.join(METHODS)}")
    rates = _Rates(rate, setting.head_rate, head_layers(model))
    model, optimizer = _BUILDERS[method](model, rates, setting, first_loss)
    period, steps = min(setting.period, setting.steps), setting.steps
    every, ramp = (period, period // 10) if method == "ReLoRA" else (steps, 0)
    warmup = min(steps // 10, every)
    schedule = restart_schedule(optimizer, steps=steps, restart_every=every, warmup=warmup, restart_warmup=ramp)
    return Prepared(model, optimizer, schedule, every if method == "ReLoRA" else None)


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Return the bytes of memory behind an optimiser's state, each storage once, without its counts of steps."""
    held = [
        value.untyped_storage()
        for state in optimizer.state.values()
        for name, value in state.items()
        if isinstance(value, Tensor) and name != "step"
    ]
    return sum({storage.data_ptr(): storage.nbytes() for storage in held}.values())


def predicted_bytes(method: str, base: nn.Module, rank: int) -> int:
    """Return what arithmetic says of `state_bytes` in float32: two moments of 4 bytes for a trained number.

    For a matrix (m, n) of a layer with r = `rank`: LoRA and its kin 8 r (m + n); Deep LoRA 8 (r (m + n) + L r^2);
    GaLore 8 r max(m, n), and 4 r min(m, n) for the projection, and 8 for each number outside of these matrices.
    """
    everything = sum(p.numel() for p in base.parameters())
    matrices = adapted_shapes(base)
    if method == "full":
        return 8 * everything
    if method == "GaLore":
        projected = sum(8 * rank * max(shape) + 4 * rank * min(shape) for shape in matrices)
        return projected + 8 * (everything - sum(m * n for m, n in matrices))
    head = sum(p.numel() for name, p in base.named_parameters() if _is_head(name, head_layers(base)))
    squares = DEPTH * rank**2 if method == "Deep LoRA" else 0
    return 8 * (sum(rank * (m + n) + squares for m, n in matrices) + head)


def adapted_shapes(base: nn.Module) -> list[tuple[int, int]]:
    """Return (m, n) of the weight of every linear layer but the head's."""
    return [(weight.shape[0], weight.shape[1]) for weight in _matrices(base)]


def _full(model: nn.Module, rates: _Rates, setting: Setting, first_loss: Loss) -> tuple[nn.Module, Any]:
    return model, torch.optim.AdamW(rates.groups(model), **ADAM)


def _lora(model: nn.Module, rates: _Rates, setting: Setting, first_loss: Loss) -> tuple[nn.Module, Any]:
    model = _with_lora(model, setting.rank, rates.heads)
    return model, torch.optim.AdamW(rates.groups(model), **ADAM)


def _lora_plus(model: nn.Module, rates: _Rates, setting: Setting, first_loss: Loss) -> tuple[nn.Module, Any]:
    wrapped = _with_lora(model, setting.rank, rates.heads)
    asked = {"lr": rates.body, "loraplus_lr_ratio": PLUS_RATIO}
    optimizer: torch.optim.Optimizer = create_loraplus_optimizer(wrapped, torch.optim.AdamW, **asked, **ADAM)
    _, head = rates.groups(wrapped)
    apart = {id(parameter) for parameter in head["params"]}  # peft counts a head's weight as an A and its bias as a B
    for group in optimizer.param_groups:
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in apart]
    optimizer.add_param_group(head | {"weight_decay": 0.0})
    return wrapped, optimizer


def _galore(model: nn.Module, rates: _Rates, setting: Setting, first_loss: Loss) -> tuple[nn.Module, Any]:
    body, head = rates.groups(model)
    matrices = _matrices(model)
    projected = {id(matrix) for matrix in matrices}
    rest = [parameter for parameter in body["params"] if id(parameter) not in projected]
    projection = {"rank": setting.rank, "update_proj_gap": setting.period, "scale": GALORE_SCALE}
    return model, GaLoreAdamW([body | {"params": matrices} | projection, body | {"params": rest}, head], **ADAM)


def _deep_lora(model: Any, rates: _Rates, setting: Setting, first_loss: Loss) -> tuple[nn.Module, Any]:
    config = DeepLoraConfig(r=setting.rank, depth=DEPTH, modules_to_save=rates.heads, task_type="SEQ_CLS")
    model = peft.get_peft_model(model, config)
    compress_adapters(model, lambda: first_loss(model))
    groups = param_groups(model, rates.body)  # the head is what is trained beside the factors
    paced = [group | {"lr": rates.head} if group["name"] == "other" else group for group in groups]
    return model, torch.optim.AdamW(paced, **ADAM)


_BUILDERS: dict[str, Callable[[nn.Module, _Rates, Setting, Loss], tuple[nn.Module, Any]]] = {
    "full": _full, "LoRA": _lora, "LoRA+": _lora_plus, "GaLore": _galore, "ReLoRA": _lora, "Deep LoRA": _deep_lora,
}  # fmt: skip


def _with_lora(model: nn.Module, rank: int, heads: list[str]) -> Any:
    config = peft.LoraConfig(
        r=rank, lora_alpha=rank, target_modules="all-linear", modules_to_save=heads, task_type="SEQ_CLS"
    )
    return peft.get_peft_model(model, config)


def _matrices(model: nn.Module) -> list[nn.Parameter]:
    heads = head_layers(model)
    linear = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    kept = [module for name, module in linear if not _is_head(f"{name}.weight", heads)]
    return [cast(nn.Parameter, module.weight) for module in kept]


def _is_head(name: str, heads: Sequence[str]) -> bool:
    """Whether a parameter is a head's, also in a copy that peft keeps in a wrapper."""
    return any(f".{layer}." in f".{name}" for layer in heads)
