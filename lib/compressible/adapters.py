"""Deep LoRA (P1): low-rank updates of frozen layers as products of three or more factors; LoRA is the case of two.

For a layer with weight (m, n), m outputs and n inputs, the update is W_L ... W_1 with W_1 (k, n) on the input side and
W_L (m, k) on the output side. Variants, which the papers call by one name (papers' traps T1, T2):
  full        width k = min(m, n), all factors eps times orthogonal; what P1's tables were made with
  thin        width k = r, all factors eps times (semi-)orthogonal
  compressed  outer factors from the first gradient (P1, section 4), between them `depth` times eps I of size r; r even
Use: get_deep_lora_model, for "compressed" then compress_adapters, param_groups for the optimiser. Factors stay in
float32, since eps^L = 1e-9 is below what float16 holds; the model may be in bfloat16 or under autocast.
Not for layers that share their weight with others: the shared use would not see the update.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from .factors import orthogonal_factors, product
from .targets import matching, saved_modules

VARIANTS = ("compressed", "thin", "full")
STARTS = ("paper", "standard")


@dataclass
class DeepLoraConfig:
    """What is adapted and how; names that peft's LoraConfig has mean what they mean there.

    r: inner width (compressed: even, it holds r / 2 directions a side); depth L >= 2, of 2 is LoRA, whose start
    `init_lora_weights` is "paper" (N(0, 1) outputs, zero inputs, no scaling: T2) or "standard" (Kaiming inputs, zero
    outputs, scaling lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora). init_scale is eps. lr_ratio is the step
    of the outer factors over the inner ones, by default .01 for "compressed" and 1 otherwise. target_modules: names or
    their ends, a regular expression, or "all-linear"; embeddings=True adapts nn.Embedding, too (T10).
    modules_to_save are trained whole. Raises ValueError, with the value, where a combination makes no sense.
    """

    r: int = 8
    depth: int = 3
    init_scale: float = 1e-3
    variant: str = "compressed"
    lr_ratio: float | None = None
    target_modules: str | list[str] = "all-linear"
    exclude_modules: str | list[str] | None = None
    modules_to_save: list[str] | None = None
    embeddings: bool = False
    lora_alpha: float | None = None
    use_rslora: bool = False
    init_lora_weights: str | None = None
    lora_dropout: float = 0.0
    task_type: str | None = None

    def __post_init__(self) -> None:
        _expect("r", self.r, isinstance(self.r, int) and self.r >= 1, "an integer >= 1")
        _expect("depth", self.depth, isinstance(self.depth, int) and self.depth >= 2, "an integer >= 2")
        _expect("init_scale", self.init_scale, 0 < self.init_scale < math.inf, "a finite number > 0")
        _expect("variant", self.variant, self.variant in VARIANTS, f"one of {', '.join(VARIANTS)}")
        _expect("lora_dropout", self.lora_dropout, 0 <= self.lora_dropout < 1, "a number in [0, 1)")
        lora = self.depth == 2
        _expect("variant", self.variant, not lora or self.variant == "thin", '"thin" with depth = 2, which is LoRA')
        even = self.variant != "compressed" or self.r % 2 == 0
        _expect("r", self.r, even, 'even with variant = "compressed": it holds r / 2 directions a side')
        if self.lr_ratio is None:
            self.lr_ratio = 0.01 if self.variant == "compressed" else 1.0
        _expect("lr_ratio", self.lr_ratio, 0 <= self.lr_ratio < math.inf, "a finite number >= 0")
        self._check_lora(lora)

    @property
    def scaling(self) -> float:
        """What the product of the factors is multiplied by: 1 except for LoRA's standard start."""
        if self.init_lora_weights != "standard":
            return 1.0
        return float(self.lora_alpha) / (math.sqrt(self.r) if self.use_rslora else self.r)

    def _check_lora(self, lora: bool) -> None:
        if lora and self.init_lora_weights is None:
            self.init_lora_weights = "standard"
        start = self.init_lora_weights
        known = start is None or (lora and start in STARTS)
        _expect("init_lora_weights", start, known, f"one of {STARTS}, with depth 2")
        if start == "standard" and self.lora_alpha is None:
            self.lora_alpha = float(self.r)
        standard = start == "standard"
        _expect("lora_alpha", self.lora_alpha, self.lora_alpha is None or standard, 'None without the "standard" start')
        _expect("use_rslora", self.use_rslora, not self.use_rslora or standard, 'False without the "standard" start')


class Adapter(nn.Module):
    """A frozen layer and the factors [W_1, ..., W_L] of its update; behaves like the layer in all else."""

    def __init__(self, base: nn.Module, config: DeepLoraConfig, generator: torch.Generator | None) -> None:
        super().__init__()
        self.base, self.config, self.probe = base, config, None
        start = _start(self.shape, config, generator, base.weight.device)
        self.factors = nn.ParameterList([nn.Parameter(factor.to(factor_dtype(base))) for factor in start])

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n), outputs and inputs, whatever the layout of the base's weight."""
        return layer_shape(self.base)

    @property
    def transposed(self) -> bool:
        """Whether the base keeps its weight as (n, m), as transformers' Conv1D and nn.Embedding (ids in) do."""
        return is_transposed(self.base)

    @property
    def weight(self) -> Tensor:
        """The frozen layer's weight: models ask layers for its dtype and device."""
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        """The frozen layer's bias."""
        return getattr(self.base, "bias", None)

    def update(self) -> Tensor:
        """Return the update W_L ... W_1 (m, n), scaled, in the factors' precision."""
        with torch.autocast(self.weight.device.type, enabled=False):
            return product(list(self._ready())) * self.config.scaling

    def contracted(self) -> tuple[Tensor, Tensor]:
        """Return W_{L-1} ... W_1 (k, n), scaled, and W_L (m, k): all but the last factor, once a step, in float32."""
        *lower, last = self._ready()
        with torch.autocast(self.weight.device.type, enabled=False):
            return product(lower) * self.config.scaling, last

    def forward(self, x: Tensor) -> Tensor:
        """Return base(x) plus the update's share; in the base's dtype."""
        out = self.base(x)
        if self.probe is not None:
            return self.probe(x, out)
        lower, last = self.contracted()
        if isinstance(self.base, nn.Embedding):
            return out + (functional.embedding(x, lower.mT) @ last.mT).to(out.dtype)
        dropped = functional.dropout(x, self.config.lora_dropout, self.training)
        kind = out.dtype
        return out + functional.linear(functional.linear(dropped.to(kind), lower.to(kind)), last.to(kind))

    def _ready(self) -> nn.ParameterList:
        if not len(self.factors):
            raise RuntimeError('variant "compressed" has no factors yet: call compress_adapters(model, loss_step)')
        kinds = {factor.dtype for factor in self.factors}
        if torch.float16 in kinds or _autocast_is_half(self.weight.device.type):
            eps = self.config.init_scale**self.config.depth
            raise ValueError(f"adapters met float16, expected float32 or bfloat16: eps^L = {eps:.0e} underflows there")
        return self.factors


def get_deep_lora_model(
    model: nn.Module, config: DeepLoraConfig, generator: torch.Generator | None = None
) -> nn.Module:
    """Freeze `model`, put an `Adapter` in the place of every targeted layer, and return it; it is changed in place.

    Raises ValueError where nothing matches the targets, or a target is neither linear nor, with embeddings, an
    embedding.
    """
    targets = matching(model, config)
    if not targets:
        raise ValueError(f"target_modules = {config.target_modules!r} matches no layer of {type(model).__name__}")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    wrapped = {name: Adapter(layer, config, generator) for name, layer in targets.items()}
    check_sizes({name: adapter.shape for name, adapter in wrapped.items()}, config)
    for name, adapter in wrapped.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, adapter)
    for _, module in saved_modules(model, config):
        module.requires_grad_(True)
    model.deep_lora_config = config
    return model


def check_sizes(shapes: dict[str, tuple[int, int]], config: DeepLoraConfig) -> None:
    """Raise ValueError for a layer, shapes (m, n) by name, with fewer directions than a compressed start takes."""
    for name, shape in shapes.items():
        if config.variant == "compressed" and 2 * min(shape) < config.r:
            size = f"{name!r} is {shape}, too small for r / 2 = {config.r // 2} directions a side"
            raise ValueError(f"{size}: lower r, or name it in exclude_modules or modules_to_save")


def layer_shape(layer: nn.Module) -> tuple[int, int]:
    """Return (m, n), outputs and inputs of a layer, whatever the layout of its weight."""
    rows, columns = layer.weight.shape
    return (columns, rows) if is_transposed(layer) else (rows, columns)


def is_transposed(layer: nn.Module) -> bool:
    """Return whether a layer keeps its weight as (n, m), as transformers' Conv1D and nn.Embedding (ids in) do."""
    return isinstance(layer, nn.Embedding) or type(layer).__name__ == "Conv1D"


def factor_dtype(layer: nn.Module) -> torch.dtype:
    """Return float32, or float64 for a layer in float64: eps^L needs more range than half precision has."""
    return torch.promote_types(layer.weight.dtype, torch.float32)


def adapters(model: nn.Module) -> dict[str, Adapter]:
    """Return the adapters of a model by the name of the layer that they adapt."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Adapter)}


def param_groups(model: nn.Module, lr: float) -> list[dict]:
    """Return the optimiser's groups: inner factors (and modules_to_save) at `lr`, the outer two at lr_ratio * lr.

    P1's Deep LoRA takes lr = 1e-2 compressed and 1e-4 otherwise. Raises ValueError unless lr > 0.
    """
    _expect("lr", lr, 0 < lr < math.inf, "a finite number > 0")
    config: DeepLoraConfig = model.deep_lora_config
    found = adapters(model).values()
    outer = [adapter._ready()[i] for adapter in found for i in (0, -1)]
    inner = [factor for adapter in found for factor in adapter.factors[1:-1]]
    saved = [p for _, module in saved_modules(model, config) for p in module.parameters()]
    groups = {"inner": (inner, lr), "outer": (outer, config.lr_ratio * lr), "saved": (saved, lr)}
    return [{"params": params, "lr": rate, "name": name} for name, (params, rate) in groups.items() if params]


@torch.no_grad()
def merge_and_unload(model: nn.Module, inputs: dict | None = None, tolerance: float = 1e-4) -> nn.Module:
    """Add every update to its layer's weight, in float32, and take the adapters out again; changed in place.

    With `inputs` (keyword arguments of the model) its first output is compared before and after, in evaluation mode.
    Raises RuntimeError where they differ by more than `tolerance` of the largest value.
    """
    model.eval()
    before = None if inputs is None else first_output(model(**inputs))
    for name, adapter in adapters(model).items():
        update = adapter.update()
        weight = adapter.base.weight
        weight.copy_((weight.float() + (update.mT if adapter.transposed else update)).to(weight.dtype))
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, adapter.base)
    del model.deep_lora_config
    if before is not None:
        after = first_output(model(**inputs))
        off = ((after - before).abs().max() / before.abs().max()).item()
        if not off <= tolerance:
            raise RuntimeError(f"the merged model differs by {off:.2g} of its largest output, expected {tolerance:g}")
    return model


def first_output(output: object) -> Tensor:
    """Return logits, or else the first tensor, of what a model returned."""
    if isinstance(output, Tensor):
        return output
    logits = getattr(output, "logits", None)
    return logits if logits is not None else next(value for value in tuple(output) if isinstance(value, Tensor))


def _start(
    shape: tuple[int, int], config: DeepLoraConfig, generator: torch.Generator | None, device: torch.device
) -> list[Tensor]:
    """The factors of an (m, n) update as the config starts them; none yet for "compressed"."""
    (m, n), r = shape, config.r
    if config.variant == "compressed":
        return []
    if config.depth > 2:
        width = min(m, n) if config.variant == "full" else r
        start = orthogonal_factors(shape, config.depth, width, config.init_scale, generator, torch.float32, device)
    elif config.init_lora_weights == "paper":
        start = [torch.zeros(r, n), torch.randn(m, r, generator=generator)]
    else:
        bound = 1 / math.sqrt(n)  # kaiming_uniform with a = sqrt(5), peft's
        start = [(2 * torch.rand(r, n, generator=generator) - 1) * bound, torch.zeros(m, r)]
    return [factor.to(device) for factor in start]


def _autocast_is_half(device: str) -> bool:
    return torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) is torch.float16


def _expect(name: str, value: object, holds: bool, expected: str) -> None:
    if not holds:
        raise ValueError(f"{name} is {value!r}, expected {expected}")
