"""Deep LoRA (P1): low-rank updates of frozen layers as products of three or more factors; LoRA is the case of two.

For a layer with weight (m, n), m outputs and n inputs, the update is W_L ... W_1 with W_1 (k, n) on the input side and
W_L (m, k) on the output side. Variants, which the papers call by one name (papers' traps T1, T2):
  full        width k = min(m, n), all factors eps times orthogonal; what P1's tables were made with
  thin        width k = r, all factors eps times (semi-)orthogonal
  compressed  outer factors from the first gradient (P1, section 4), between them `depth` times eps I of size r; r even
Use: get_deep_lora_model, for "compressed" then compress_adapters, param_groups for the optimiser. Factors stay in
float32, since eps^L = 1e-9 is below what float16 holds; the model may be in bfloat16 or under autocast.
Layers of one kind that share their weight, as T5's word embeddings do, get one update; a linear output layer tied to
an embedding does not see the embedding's, of which a warning tells.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from compressible.adapters.config import DeepLoraConfig
from compressible.adapters.targets import holders, places, saved_modules
from compressible.runtime.checks import expect

Layer = Any  # nn.Linear, nn.Embedding or transformers' Conv1D: a module with a weight


class Adapter(nn.Module):
    """A frozen layer and the factors [W_1, ..., W_L] of its update; behaves like the layer in all else."""

    base: Layer

    def __init__(self, base: Layer, config: DeepLoraConfig, generator: torch.Generator | None) -> None:
        super().__init__()
        self.base, self.config = base, config
        self.probe: Callable[[Tensor, Tensor], Tensor] | None = None
        start = starting_factors(self.shape, config, generator, base.weight.device, isinstance(base, nn.Embedding))
        self.factors = nn.ParameterList([nn.Parameter(factor.to(factor_dtype(base))) for factor in start])

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n), outputs and inputs, whatever the layout of the base's weight."""
        return layer_shape(self.base)

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
            return product(list(self.ready())) * self.config.scaling

    def contracted(self) -> tuple[Tensor, Tensor]:
        """Return W_{L-1} ... W_1 (k, n), scaled, and W_L (m, k): all but the last factor, once a step, in float32."""
        *lower, last = self.ready()
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

    def ready(self) -> nn.ParameterList:
        """Return the factors; RuntimeError where there are none yet, ValueError where they are too short of digits."""
        if not len(self.factors):
            raise RuntimeError('variant "compressed" has no factors yet: call compress_adapters(model, loss_step)')
        kinds = {factor.dtype for factor in self.factors}
        if torch.float16 in kinds or _autocast_is_half(self.weight.device.type):
            raise ValueError(f"adapters met float16, {_underflow(self.config)}")
        return self.factors


def get_deep_lora_model(
    model: nn.Module, config: DeepLoraConfig, generator: torch.Generator | None = None
) -> nn.Module:
    """Freeze `model`, put an `Adapter` in the place of every targeted layer, and return it; it is changed in place.

    Args:
        model: any with nn.Linear, nn.Embedding or transformers' Conv1D layers, in float32, float64 or bfloat16.
        config: what is adapted and how; of variant "compressed" the adapters get their factors by `compress_adapters`.
        generator: of the CPU, from which factors are drawn; by default torch's own.

    Returns:
        The same model, of which factors and modules_to_save alone are trained.

    Raises:
        ValueError: before anything is changed, where nothing matches the targets, a target is neither linear nor an
            nn.Embedding or its update would not be seen, the model has adapters already, or shares a saved module's
            weight.

    Example:
        >>> import compressible as cd
        >>> from torch import nn
        >>> config = cd.DeepLoraConfig(r=2, depth=3, variant="thin")
        >>> model = cd.get_deep_lora_model(nn.Sequential(nn.Linear(8, 4)), config)
        >>> [tuple(factor.shape) for factor in model[0].factors]
        [(2, 8), (2, 2), (4, 2)]

    Reference:
        P1 (Yaras et al. 2024), section 4, Deep LoRA.
    """
    found = places(model, config)
    _check_model(model, config, found)
    saved = list(saved_modules(model, config))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    wrapped = {name: Adapter(model.get_submodule(name), config, generator) for name in found}
    for name, names in found.items():
        for place in names:
            replace_module(model, place, wrapped[name])
    for _, module in saved:
        module.requires_grad_(True)
    vars(model)["deep_lora_config"] = config
    for name, other in tied_layers(model).items():
        warnings.warn(f"{name!r} shares its weight with {other!r}, which does not see the update", stacklevel=2)
    return model


def _check_model(model: nn.Module, config: DeepLoraConfig, found: dict[str, list[str]]) -> None:
    if not found:
        raise ValueError(f"target_modules = {config.target_modules!r} matches no layer of {type(model).__name__}")
    present = next(iter(adapters(model)), None)
    expect("the adapter of", present, present is None, "a model without adapters: merge_and_unload them first")
    layers = {name: model.get_submodule(name) for name in found}
    check_sizes({name: layer_shape(layer) for name, layer in layers.items()}, config)
    for name, layer in layers.items():
        if config.depth > 2 and layer.weight.dtype is torch.float16:
            raise ValueError(f"{name!r} is in float16, {_underflow(config)}")
    held = holders(model)
    for name, module in saved_modules(model, config):
        for parameter in module.parameters():
            outside = [at for at, _ in held[id(parameter)] if at != name and not at.startswith(f"{name}.")]
            if outside:
                shared = f"modules_to_save {name!r} shares its weight with {outside[0]!r}"
                raise ValueError(f"{shared}, expected one of its own: peft would train a copy; untie them first")


def tied_layers(model: nn.Module) -> dict[str, str]:
    """Return, by name, the adapted layers whose weight another module holds, too, and that module's name."""
    held = holders(model)
    others = {
        name: [at for at, module in held[id(adapter.weight)] if module is not adapter.base]
        for name, adapter in adapters(model).items()
    }
    return {name: at[0].removesuffix(".base") for name, at in others.items() if at}


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` in the place `name` of a model."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def check_sizes(shapes: dict[str, tuple[int, int]], config: DeepLoraConfig) -> None:
    """Raise ValueError for a layer, shapes (m, n) by name, with fewer directions than a compressed start takes."""
    for name, shape in shapes.items():
        if config.variant == "compressed" and (2 * min(shape) < config.r or max(shape) < config.r):
            size = f"{name!r} is {shape}, too small for r / 2 = {config.r // 2} directions a side"
            raise ValueError(f"{size}: lower r, or name it in exclude_modules or modules_to_save")


def layer_shape(layer: Layer) -> tuple[int, int]:
    """Return (m, n), outputs and inputs of a layer, whatever the layout of its weight."""
    rows, columns = layer.weight.shape
    return (columns, rows) if is_transposed(layer) else (rows, columns)


def is_transposed(layer: Layer) -> bool:
    """Return whether a layer keeps its weight as (n, m), as transformers' Conv1D and nn.Embedding (ids in) do."""
    return isinstance(layer, nn.Embedding) or type(layer).__name__ == "Conv1D"


def factor_dtype(layer: Layer) -> torch.dtype:
    """Return float32, or float64 for a layer in float64: eps^L needs more range than half precision has."""
    return torch.promote_types(layer.weight.dtype, torch.float32)


def adapters(model: nn.Module) -> dict[str, Adapter]:
    """Return the adapters of a model by the name of the layer that they adapt."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Adapter)}


def adapted(model: nn.Module) -> nn.Module:
    """Return the adapted model behind torch.compile and DistributedDataParallel; ValueError if there is none."""
    while "deep_lora_config" not in vars(model):
        parallel = isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel))
        inner = model.module if parallel else getattr(model, "_orig_mod", None)
        if not isinstance(inner, nn.Module):
            raise ValueError(f"{type(model).__name__} has no adapters, expected a model from get_deep_lora_model")
        model = inner
    return model


def starting_factors(
    shape: tuple[int, int],
    config: DeepLoraConfig,
    generator: torch.Generator | None,
    device: torch.device,
    embedding: bool = False,
) -> list[Tensor]:
    """Return the factors of an (m, n) update as the config starts them, none yet for "compressed"."""
    (m, n), r = shape, config.r
    if config.variant == "compressed":
        return []
    if config.depth > 2:
        width = min(m, n) if config.variant == "full" else r
        sizes = pairwise([n, *[width] * (config.depth - 1), m])
        start = [(config.init_scale * _orthogonal(rows, columns, generator)).float() for columns, rows in sizes]
    elif config.init_lora_weights == "paper" or (embedding and config.init_lora_weights == "peft"):
        start = [torch.zeros(r, n), torch.randn(m, r, generator=generator)]
    else:
        bound = 1 / math.sqrt(n)  # kaiming_uniform with a = sqrt(5), peft's
        start = [(2 * torch.rand(r, n, generator=generator) - 1) * bound, torch.zeros(m, r)]
    return [factor.to(device) for factor in start]


def product(factors: Sequence[Tensor]) -> Tensor:
    """Return W_L ... W_1 (..., m, n) of factors [W_1, ..., W_L], multiplied from W_1 on."""
    result = factors[0]
    for factor in factors[1:]:
        result = factor @ result
    return result


def _orthogonal(rows: int, columns: int, generator: torch.Generator | None) -> Tensor:
    """A uniformly random matrix with orthonormal columns, or rows where there are fewer; the tall one is drawn."""
    tall = torch.empty(max(rows, columns), min(rows, columns), dtype=torch.float64)
    nn.init.orthogonal_(tall, generator=generator)
    return tall if rows >= columns else tall.mT.contiguous()


def _underflow(config: DeepLoraConfig) -> str:
    eps = config.init_scale**config.depth
    return f"expected float32 or bfloat16: eps^L = {eps:.0e} underflows there"


def _autocast_is_half(device: str) -> bool:
    return torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) is torch.float16
