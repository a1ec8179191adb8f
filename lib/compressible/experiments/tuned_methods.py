"""What is tuned against what: LoRA's variants, Deep LoRA's, and controls of what its start and its step do.

    paper       LoRA as P1 starts it: B from N(0, 1), A zero, no scaling
    standard    LoRA, A from Kaiming's uniform and B zero, word embeddings too; scaling 1
    rslora      the same with scaling sqrt(r), rank-stabilised
    plus        the same; B learns 16 times as fast as A (LoRA+)
    pissa       the r leading singular directions of the weight, taken off it (PiSSA, fast SVD)
    lora_ga     leading singular directions of the first gradient, taken off the weight (LoRA-GA, as published)
    dora        LoRA with a trained magnitude a row (DoRA); no stack holds it, so it goes one run at a time
    thin        Deep LoRA, three factors of width r
    compressed  Deep LoRA from the first gradient, P1's; outer factors learn at a hundredth of the inner rate
    even        the same with one rate for all factors
    full        Deep LoRA, three factors of width min(m, n)
    gradient    control: compressed, whose frames are the leading singular vectors of the gradient, both sides
    random      control: compressed, whose frames are random, at P1's first step

"random" is scaled to P1's first step: the inner factors' first AdamW step D is A(g), A(g) = g / (|g| + 1e-6) entry by
entry, of g = c^2 eps^(L-1) U^T G V, with outer factors c U and c V, and the update changes, to first order in it, by
c^2 L eps^(L-1) |D| (times the rate) in Frobenius norm. c is 1 for P1's frames, and for random ones what gives the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftConfig
from torch import Tensor, nn

from compressible.adapters.config import DeepLoraConfig
from compressible.data.pretrained import head_layers
from compressible.experiments.few_shot import ALL_DENSE, FIXED, standard_start
from compressible.finetuning.lora import paper_lora_start
from compressible.finetuning.peft_models import GradientStart, Start
from compressible.finetuning.run import FineTuningRun
from compressible.runtime.starting_factors import compressed_chain, orthogonal
from compressible.runtime.weight_gradients import top_frames

LORA = ("standard", "paper", "rslora", "plus", "pissa", "lora_ga", "dora")
DEEP = ("thin", "compressed", "even", "full")
CONTROLS = ("gradient", "random")
METHODS = (*LORA, *DEEP, *CONTROLS)
ALONE = ("dora",)  # what goes one run at a time
PLUS_RATIO = 16.0  # LoRA+'s authors' choice
GAMMA = 16.0  # of LoRA-GA's stable scale, its authors' choice
ADAM_EPS = 1e-6


@dataclass(frozen=True)
class Method:
    """A configuration, its start where that is not peft's, and the rate of B over A, or of outer over inner factors."""

    config: PeftConfig
    start: Start | GradientStart | None = None
    lr_ratio: float | None = None

    def run(self, rate: float, seed: int, subset: Tensor, head_rate: float) -> FineTuningRun:
        """Return a run at a rate, which is that of A, of B but in LoRA+, of Deep LoRA's inner factors.

        head_rate: of a head that the configuration trains; where it trains none, the run has no such rate.
        """
        of_head = head_rate if getattr(self.config, "modules_to_save", None) else None
        return FineTuningRun(self.config, rate, seed, subset, of_head, lr_ratio=self.lr_ratio, start=self.start)


def method(name: str, model: nn.Module, rank: int, matrices: Sequence[str], protocol: str, eps: float) -> Method:
    """Return one of METHODS for `matrices`, ends of layers' names or ALL_DENSE; ValueError for any other.

    rank: r, even; protocol: "authors" leaves the head frozen, "clean" trains it; eps: scale of Deep LoRA's start.
    """
    if name not in METHODS:
        raise ValueError(f"method is {name!r}, expected one of {', '.join(METHODS)}")
    shared = _shared(model, matrices, protocol) | {"r": rank}

    def lora(**given: Any) -> LoraConfig:
        return LoraConfig(lora_alpha=rank, **shared | given)

    def deep(variant: str, **given: Any) -> DeepLoraConfig:
        return DeepLoraConfig(depth=3, variant=variant, init_scale=eps, **shared | given)

    made: dict[str, Callable[[], Method]] = {
        "standard": lambda: Method(lora(), standard_start),
        "paper": lambda: Method(lora(), paper_lora_start),
        "rslora": lambda: Method(lora(use_rslora=True), standard_start),
        "plus": lambda: Method(lora(), standard_start, PLUS_RATIO),
        "pissa": lambda: Method(lora(init_lora_weights="pissa_niter_16"), standard_start),
        "lora_ga": lambda: Method(lora(), GradientStart(approximated, taken_off=True)),
        "dora": lambda: Method(lora(use_dora=True), standard_start),
        "thin": lambda: Method(deep("thin")),
        "compressed": lambda: Method(deep("compressed")),
        "even": lambda: Method(deep("compressed", lr_ratio=1.0)),
        "full": lambda: Method(deep("full")),
        "gradient": lambda: Method(deep("compressed"), GradientStart(gradient_frames)),
        "random": lambda: Method(deep("compressed"), GradientStart(random_frames)),
    }
    return made[name]()


def approximated(gradient: Tensor, config: Any, width: int, generator: torch.Generator) -> list[Tensor]:
    """Return LoRA-GA's A (r, n), the r leading right singular vectors of G, and B (m, r), its next r left ones.

    Both are scaled by m^(1/4) / sqrt(gamma), as its authors' "stable" start is; peft 0.21 scales B alone, and by the
    gradient's singular values besides. Where G has less than 2 r directions, B takes the last r.
    """
    left, right = top_frames(gradient, min(2 * width, *gradient.shape))
    scale = gradient.shape[0] ** 0.25 / GAMMA**0.5
    return [scale * right[:, :width].mT.contiguous(), scale * left[:, -width:].contiguous()]


def gradient_frames(gradient: Tensor, config: Any, width: int, generator: torch.Generator) -> list[Tensor]:
    """Return compressed factors whose frames are the `width` leading singular vectors of the gradient, both sides."""
    left, right = top_frames(gradient, width)
    return _framed(left, right, config)


def random_frames(gradient: Tensor, config: Any, width: int, generator: torch.Generator) -> list[Tensor]:
    """Return compressed factors with random frames, scaled to the first step of P1's frames (see above)."""
    m, n = gradient.shape
    half, eps, depth = top_frames(gradient, width // 2), config.init_scale, config.depth
    first, *_, last = compressed_chain(*half, (m, n), depth, eps, generator)
    left, right = (orthogonal(size, width, generator).to(gradient) for size in (m, n))
    wanted = first_step(last.mT @ gradient @ first.mT, eps, depth)
    scale = matching_scale(left.mT @ gradient @ right, eps, depth, wanted)
    return _framed(scale * left, scale * right, config)


def first_step(core: Tensor, eps: float, depth: int, scale: float = 1.0) -> float:
    """Return c^2 |A(c^2 eps^(L-1) core)| of core = U^T G V (k, k), c = `scale`: the first step but for constants."""
    gradient = scale**2 * eps ** (depth - 1) * core.double()
    return scale**2 * float((gradient / (gradient.abs() + ADAM_EPS)).norm())


def matching_scale(core: Tensor, eps: float, depth: int, wanted: float) -> float:
    """Return the c at which `first_step` is `wanted`, which grows with c, by bisection; 1 where no c can give it."""
    low, high = -12.0, 12.0  # of log c
    if not (first_step(core, eps, depth, math.exp(low)) < wanted < first_step(core, eps, depth, math.exp(high))):
        return 1.0
    for _ in range(80):
        middle = (low + high) / 2
        below = first_step(core, eps, depth, math.exp(middle)) < wanted
        low, high = (middle, high) if below else (low, middle)
    return math.exp((low + high) / 2)


def _framed(left: Tensor, right: Tensor, config: Any) -> list[Tensor]:
    eye = torch.eye(right.shape[1], dtype=right.dtype, device=right.device)
    inner = [config.init_scale * eye for _ in range(config.depth)]
    return [right.mT.contiguous(), *inner, left.contiguous()]


def _shared(model: nn.Module, matrices: Sequence[str], protocol: str) -> dict[str, Any]:
    head = head_layers(model)
    dense = [name for name, layer in model.named_modules() if isinstance(layer, (nn.Linear, nn.Embedding))]
    return {
        "target_modules": dense if list(matrices) == ALL_DENSE else list(matrices),
        "exclude_modules": FIXED + head,
        "modules_to_save": head if protocol == "clean" else None,
    }
