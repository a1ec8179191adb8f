"""What is adapted and how: the configuration of LoRA and Deep LoRA."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from compressible.runtime.checks import expect, is_integer, is_number

VARIANTS = ("compressed", "thin", "full")
KAIMING = ("standard", "peft")
STARTS = ("paper", *KAIMING)
EPS = 1e-3
TASKS = ("SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")  # peft's
ALL_LINEAR = "all-linear"


def _renamed(kind: type) -> type:
    """Let the class be called with the old name of a field."""
    start: Callable = kind.__init__  # type: ignore[misc]  # the class is at hand, no instance

    @functools.wraps(start)
    def init(self: Any, *values: Any, **named: Any) -> None:
        if "lr_ratio" in named:
            if "outer_ratio" in named:
                raise TypeError("lr_ratio is the old name of outer_ratio, expected one of them")
            warnings.warn("lr_ratio is called outer_ratio now", DeprecationWarning, stacklevel=2)
            named["outer_ratio"] = named.pop("lr_ratio")
        start(self, *values, **named)

    kind.__init__ = init  # type: ignore[misc]
    return kind


@_renamed
@dataclass
class DeepLoraConfig:
    """What is adapted and how; names that peft's LoraConfig has mean what they mean there.

    Args:
        r: inner width, usually 4 to 64; compressed: even, r / 2 directions a side; full: not used.
        depth: number of factors L >= 2; 2 is LoRA.
        init_scale: eps, the scale of every factor of a chain of 3 or more, usually 1e-3 to 1e-1.
        variant: "compressed", "thin" or "full", see `compressible.adapters.layer`; LoRA is "thin".
        outer_ratio: step size of the outer factors over that of the inner ones, by default .01 for "compressed" and 1
            otherwise. Its old name, lr_ratio, is still understood.
        target_modules: names or their ends, a regular expression, or "all-linear".
        exclude_modules: names, or a regular expression, of what is left out.
        modules_to_save: names of what is trained whole, such as ["classifier"].
        embeddings: whether every nn.Embedding is adapted, too (papers' trap T10).
        lora_alpha: LoRA's scaling is lora_alpha / r; r by default (peft's is 8).
        use_rslora: whether LoRA's scaling is lora_alpha / sqrt(r).
        init_lora_weights: LoRA's start: "standard" (Kaiming inputs, zero outputs), "peft" or True (the same but for
            embeddings: zero inputs, N(0, 1) outputs), or "paper" (N(0, 1) outputs, zero inputs, no scaling: T2).
        lora_dropout: share of the inputs to a layer's update that is dropped, in [0, 1).
        task_type: peft's, such as "SEQ_CLS", whose head is then left out.

    Raises:
        ValueError: with the value, where a combination makes no sense.

    Example:
        >>> import compressible as cd
        >>> config = cd.DeepLoraConfig(r=8, depth=3, variant="compressed")
        >>> config.outer_ratio, config.scaling
        (0.01, 1.0)

    Reference:
        P1 (Yaras et al. 2024), section 4, Deep LoRA; Hu et al. 2021, LoRA.
    """

    r: int = 8
    depth: int = 3
    init_scale: float = EPS
    variant: str = "compressed"
    outer_ratio: float | None = None
    target_modules: str | list[str] = ALL_LINEAR
    exclude_modules: str | list[str] | None = None
    modules_to_save: list[str] | None = None
    embeddings: bool = False
    lora_alpha: float | None = None
    use_rslora: bool = False
    init_lora_weights: str | bool | None = None
    lora_dropout: float = 0.0
    task_type: str | None = None

    def __post_init__(self) -> None:
        expect("r", self.r, is_integer(self.r, numpys=False) and self.r >= 1, "an integer >= 1")
        expect("depth", self.depth, is_integer(self.depth, numpys=False) and self.depth >= 2, "an integer >= 2")
        expect("init_scale", self.init_scale, is_number(self.init_scale, 0), "a finite number > 0")
        expect("variant", self.variant, self.variant in VARIANTS, f"one of {', '.join(VARIANTS)}")
        dropout = self.lora_dropout
        expect("lora_dropout", dropout, dropout == 0 or (is_number(dropout, 0) and dropout < 1), "a number in [0, 1)")
        for name in ("embeddings", "use_rslora"):
            expect(name, getattr(self, name), isinstance(getattr(self, name), bool), "True or False")
        expect("task_type", self.task_type, self.task_type in (None, *TASKS), f"None or one of {', '.join(TASKS)}")
        self._take_names()
        self._check_factors(self.depth == 2)
        self._check_lora(self.depth == 2)

    @property
    def scaling(self) -> float:
        """What the product of the factors is multiplied by: 1 except for LoRA's standard start."""
        if self.init_lora_weights not in KAIMING:
            return 1.0
        return float(self.lora_alpha or self.r) / (math.sqrt(self.r) if self.use_rslora else self.r)

    @property
    def lr_ratio(self) -> float | None:
        """The old name of outer_ratio."""
        warnings.warn("lr_ratio is called outer_ratio now", DeprecationWarning, stacklevel=2)
        return self.outer_ratio

    def outer_lr(self, lr: float) -> float:
        """Return the step size of the outer factors where that of the inner ones is `lr`."""
        return lr * (self.outer_ratio or 0.0)

    def _take_names(self) -> None:
        """Lists of names in the place of tuples and sets, which JSON does not have."""
        targets, excluded, saved = self.target_modules, self.exclude_modules, self.modules_to_save
        self.target_modules = _names("target_modules", targets, f"names, a regular expression or {ALL_LINEAR!r}")
        if isinstance(targets, str) and targets.lower() == ALL_LINEAR:  # in capitals, too, as in peft
            self.target_modules = ALL_LINEAR
        if excluded is not None:
            self.exclude_modules = _names("exclude_modules", excluded, "names, a regular expression or None")
        if saved is not None:
            expect("modules_to_save", saved, not isinstance(saved, str), f"a list of names, such as [{saved!r}]")
            self.modules_to_save = list(_names("modules_to_save", saved, "names of modules or None")) or None

    def _check_factors(self, lora: bool) -> None:
        expect("variant", self.variant, not lora or self.variant == "thin", '"thin" with depth = 2, which is LoRA')
        even = self.variant != "compressed" or self.r % 2 == 0
        expect("r", self.r, even, 'even with variant = "compressed": it holds r / 2 directions a side')
        own = self.init_scale != EPS
        expect("init_scale", self.init_scale, not (lora and own), "none with depth = 2: LoRA's start has no eps")
        if self.outer_ratio is None:
            self.outer_ratio = 0.01 if self.variant == "compressed" else 1.0
        ratio = self.outer_ratio
        expect("outer_ratio", ratio, ratio == 0 or is_number(ratio, 0), "a finite number >= 0")
        expect("outer_ratio", ratio, not lora or ratio == 1, "1 with depth = 2, which has no inner factors")

    def _check_lora(self, lora: bool) -> None:
        if self.init_lora_weights is True:
            self.init_lora_weights = "peft"
        if lora and self.init_lora_weights is None:
            self.init_lora_weights = "standard"
        start = self.init_lora_weights
        known = start is None or (lora and start in STARTS)
        expect("init_lora_weights", start, known, f"one of {STARTS}, with depth 2")
        standard = start in KAIMING
        if standard and self.lora_alpha is None:
            self.lora_alpha = float(self.r)
        alpha = self.lora_alpha
        expect("lora_alpha", alpha, alpha is None or standard, 'None without the "standard" start')
        expect("lora_alpha", alpha, alpha is None or is_number(alpha, 0), "a finite number > 0")
        expect("use_rslora", self.use_rslora, not self.use_rslora or standard, 'False without the "standard" start')


def _names(name: str, value: Any, expected: str) -> str | list[str]:
    if isinstance(value, str):
        return value
    known = isinstance(value, Iterable) and not isinstance(value, dict) and all(isinstance(v, str) for v in value)
    expect(name, value, known, expected)
    return sorted(value) if isinstance(value, (set, frozenset)) else list(value)
