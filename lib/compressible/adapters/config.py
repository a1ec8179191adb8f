# Copyright 2026 The Compressible Dynamics authors.
# SPDX-License-Identifier: Apache-2.0
"""What is adapted and how: the configuration of Deep LoRA, one of peft's."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any, ClassVar

from peft import PeftConfig
from torch import Generator, Tensor

from compressible.runtime.adaptable import check_names, is_pattern
from compressible.runtime.checks import expect, is_integer, is_number
from compressible.runtime.plain_layers import LEAVE
from compressible.runtime.starting_factors import framed_chain, orthogonal_chain

VARIANTS = ("compressed", "thin", "full")
BIASES = ("none", "all", "deep_lora_only")
SHARE_OF_OUTER = 0.01  # of the inner rate, in P1's experiments with compressed factors


class DeepLoraType(str, Enum):  # noqa: UP042  # as peft's own, whose format a StrEnum has not
    """The method's name: peft's enum of them cannot be extended, but its tables take any string as a key."""

    DEEP_LORA = "DEEP_LORA"


@dataclass
class DeepLoraConfig(PeftConfig):
    """Configuration of Deep LoRA, for `peft.get_peft_model`; names that LoraConfig has mean what they mean there.

    Args:
        r: width of the factors, hence the largest rank of an update, usually 4 to 64. Of variant "compressed" it is
            even, since r / 2 directions of the first gradient are taken on each side; of "full" it is not used.
        depth: number L >= 3 of factors, which "compressed" puts between its two outer ones; depth 2 is LoraConfig.
        init_scale: eps, the scale of every factor at the start, usually 1e-3 to 1e-1.
        variant: "compressed" (outer factors from the first gradient, see `compress_adapters`), "thin" (L orthogonal
            factors of width r) or "full" (L of width min(m, n), as in the paper's tables).
        lr_ratio: step size of the outer two factors over that of the inner ones, by default 0.01 for "compressed" and 1
            otherwise; what `param_groups` and `create_deep_lora_optimizer` read.
        target_modules: names or ends of names, a regular expression, or "all-linear"; None takes peft's for LoRA.
        exclude_modules: names or ends of names, or a regular expression, of what is left out.
        lora_dropout: share of the inputs to a linear layer's update that is dropped in training, in [0, 1).
        fan_in_fan_out: kept for peft's sake; whether a weight is transposed is read off each layer's class.
        bias: "none", "all" or "deep_lora_only", which biases are trained, too.
        modules_to_save: names of modules that are trained and saved whole, such as ["classifier"].
        init_weights: True for the paper's start; False draws random factors in the place of those from a gradient.
        layers_to_transform: index or indices of the layers that are adapted, where target_modules is a list.
        layers_pattern: name or names of the list that these indices count, such as "layers".
        rank_pattern: other r by regular expression of a module's name, such as {"mlp.*": 16}.
        target_parameters: not supported, None; peft's LoraConfig adapts parameters that no module owns alone.
        task_type, base_model_name_or_path, revision, inference_mode, peft_type, peft_version, auto_mapping: as in every
            config of peft.

    Raises:
        ValueError: with the value, where a combination makes no sense.

    Example:
        >>> import compressible as cd
        >>> config = cd.DeepLoraConfig(r=8, depth=3, variant="compressed")
        >>> config.peft_type.value, config.lr_ratio, config.chain(4, 20)
        ('DEEP_LORA', 0.01, [(8, 20), (8, 8), (8, 8), (8, 8), (4, 8)])

    Reference:
        P1 (Yaras et al. 2024), section 4, Deep LoRA.
    """

    papers: ClassVar[tuple[str, ...]] = (
        "Yaras, Wang, Balzano, Qu: Compressible Dynamics in Deep Overparameterized Low-Rank Learning & Adaptation, "
        "https://huggingface.co/papers/2406.04112",
    )

    r: int = field(default=8, metadata={"help": "Width of the factors, hence the largest rank of an update."})
    depth: int = field(default=3, metadata={"help": "Number of factors, at least 3."})
    init_scale: float = field(default=1e-3, metadata={"help": "Scale of every factor at the start."})
    variant: str = field(default="compressed", metadata={"help": "One of 'compressed', 'thin' and 'full'."})
    lr_ratio: float | None = field(default=None, metadata={"help": "Step size of outer factors over inner ones'."})
    target_modules: list[str] | str | None = field(default="all-linear", metadata={"help": "Names, or a pattern."})
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "Names that are left out."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Share of the inputs to an update that is dropped."})
    fan_in_fan_out: bool = field(default=False, metadata={"help": "Not needed: read off each layer's class."})
    bias: str = field(default="none", metadata={"help": "One of 'none', 'all' and 'deep_lora_only'."})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Modules trained and saved whole."})
    init_weights: bool = field(default=True, metadata={"help": "False: random factors in a gradient's place."})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "Indices of adapted layers."})
    layers_pattern: list[str] | str | None = field(default=None, metadata={"help": "List that the indices count."})
    rank_pattern: dict = field(default_factory=dict, metadata={"help": "Other r by regular expression of a name."})
    target_parameters: list[str] | None = field(default=None, metadata={"help": "Not supported."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = DeepLoraType.DEEP_LORA
        self._check_numbers()
        self._check_choices()
        check_names(self)
        if self.lr_ratio is None:
            self.lr_ratio = SHARE_OF_OUTER if self.variant == "compressed" else 1.0
        ratio = self.lr_ratio
        expect("lr_ratio", ratio, ratio == 0 or is_number(ratio, 0), "a finite number >= 0")

    def chain(self, m: int, n: int, r: int | None = None) -> list[tuple[int, int]]:
        """Return the shapes (outputs, inputs) of the factors W_1, ..., W_L of an (m, n) update, of width r if given."""
        width = min(m, n) if self.variant == "full" else r or self.r
        inner = self.depth if self.variant == "compressed" else self.depth - 2
        return [(width, n), *[(width, width)] * inner, (m, width)]

    @property
    def awaits_gradient(self) -> bool:
        """Whether the outer factors are unset until `compress_adapters`."""
        return self.variant == "compressed" and self.init_weights

    def start(self, m: int, n: int, r: int | None = None, generator: Generator | None = None) -> list[Tensor]:
        """Return the factors that training starts from; the outer ones are zero where they await a gradient."""
        shapes = self.chain(m, n, r)
        if self.variant != "compressed":
            return orthogonal_chain(shapes, self.init_scale, generator)
        return framed_chain(shapes, self.init_scale, not self.init_weights, generator)

    def check_size(self, name: str, sizes: Any, r: int) -> None:
        """Raise ValueError where a layer of `sizes` (n, m) has not r / 2 directions a side for a gradient to give."""
        if self.awaits_gradient and (2 * min(sizes) < r or max(sizes) < r):
            size = f"{name!r} is {sizes[::-1]}, too small for r / 2 = {r // 2} directions a side"
            raise ValueError(f"{size}: lower r, also by rank_pattern, or {LEAVE} or modules_to_save")

    def outer_lr(self, lr: float) -> float:
        """Return the step size of the outer factors where that of the inner ones is `lr`."""
        return lr * (self.lr_ratio or 0.0)

    def _check_numbers(self) -> None:
        patterns = self.rank_pattern
        known = patterns is None or (isinstance(patterns, dict) and all(map(is_pattern, patterns)))
        expect("rank_pattern", patterns, known, "a dict of r by regular expression, such as {'mlp.*': 16}")
        others = {f"rank_pattern[{key!r}]": r for key, r in (self.rank_pattern or {}).items()}
        for name, r in {"r": self.r, **others}.items():
            expect(name, r, is_integer(r, numpys=False) and r >= 1, "an integer >= 1")
            even = self.variant != "compressed" or r % 2 == 0
            expect(name, r, even, 'even with variant = "compressed": it holds r / 2 directions a side')
        known = is_integer(self.depth, numpys=False) and self.depth >= 3
        expect("depth", self.depth, known, "an integer >= 3: depth 2 is LoRA, which peft.LoraConfig configures")
        expect("init_scale", self.init_scale, is_number(self.init_scale, 0), "a finite number > 0")
        dropout = self.lora_dropout
        expect("lora_dropout", dropout, dropout == 0 or (is_number(dropout, 0) and dropout < 1), "a number in [0, 1)")

    def _check_choices(self) -> None:
        expect("variant", self.variant, self.variant in VARIANTS, f"one of {', '.join(VARIANTS)}")
        expect("bias", self.bias, self.bias in BIASES, f"one of {', '.join(BIASES)}")
        for name in ("init_weights", "fan_in_fan_out"):
            expect(name, getattr(self, name), isinstance(getattr(self, name), bool), "True or False")
        lora = "None: Deep LoRA adapts modules; peft.LoraConfig adapts parameters, such as fused experts"
        expect("target_parameters", self.target_parameters, not self.target_parameters, lora)
