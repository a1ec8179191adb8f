"""What a stack of runs can do of peft, and what it cannot, which then goes one run at a time."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import peft
from torch import Tensor, nn

from compressible.adapters.config import DeepLoraConfig
from compressible.finetuning.peft_models import (
    DRAWN,
    GradientStart,
    Start,
    adapted_by_peft,
    base_of,
    chain_of,
    drawn_start,
    is_taken_off,
    on_meta,
    saved_wholes,
    sharing,
    tuner_layers,
)

_ALL = {  # fields of a PeftConfig that a stack honours or that say nothing of training
    "r", "target_modules", "exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern",
    "rank_pattern", "lora_dropout", "fan_in_fan_out", "task_type", "peft_type", "auto_mapping", "peft_version",
    "base_model_name_or_path", "revision",
}  # fmt: skip
HONOURED: dict[type, set[str]] = {
    peft.LoraConfig: _ALL
    | {"lora_alpha", "alpha_pattern", "use_rslora", "init_lora_weights", "loftq_config", "lora_ga_config"},
    DeepLoraConfig: _ALL | {"depth", "init_scale", "variant", "lr_ratio", "init_weights"},
}
NEVER = {"ADALORA": "reallocates ranks between steps", "XLORA": "mixes trained adapters"}


@dataclass(frozen=True)
class Structure:
    """What peft makes of a config on a model; runs of equal `key` fit one stack.

    alone: why the config cannot be stacked, or None. length: the number of a layer's factors.
    """

    layers: tuple[str, ...]
    heads: tuple[str, ...]
    length: int
    dense: bool
    dropout: float
    alone: str | None

    @property
    def key(self) -> tuple:
        """What runs of one stack have in common."""
        return self.layers, self.heads, self.dense, self.dropout


def structure(model: nn.Module, config: peft.PeftConfig, start: Start | GradientStart | None = None) -> Structure:
    """Return what peft makes of a config on a model, which is not changed; raises what peft and `start` raise.

    Raises ValueError for a method that changes between steps, where a name of modules_to_save is none, and for a
    `GradientStart` of what goes alone.
    """
    found = _structure(model, config, None if isinstance(start, GradientStart) else start)
    if isinstance(start, GradientStart) and found.alone:
        raise ValueError(f"start is a GradientStart of a run with {found.alone}, expected one that can be stacked")
    return found


def _structure(model: nn.Module, config: peft.PeftConfig, start: Start | None) -> Structure:
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if kind in NEVER:
        raise ValueError(f"peft_type is {kind}, which {NEVER[kind]}: expected a method whose parts stay as they are")
    field = unhonoured(config)
    if field is None:
        copied = on_meta(model) if start is None else sharing(model)
        adapted = base_of(adapted_by_peft(copied, drawn_start(config), start=start, empty=start is None))
    else:
        adapted = base_of(adapted_by_peft(copy.deepcopy(model), drawn_start(config), start=start))
    _check_saved(adapted, config)
    layers, dropout = tuner_layers(adapted), getattr(config, "lora_dropout", 0.0)
    length = len(chain_of(next(iter(layers.values())))) if layers else 0
    dense = getattr(config, "variant", None) == "full"
    heads = tuple(saved_wholes(adapted))
    return Structure(tuple(layers), heads, length, dense, dropout, field or odd_part(adapted))


def unhonoured(config: peft.PeftConfig) -> str | None:
    """Return the first thing of a config that a stack does not do, such as "use_dora=True", or None."""
    honoured = HONOURED.get(type(config))
    if honoured is None:
        return f"peft_type={getattr(config.peft_type, 'value', config.peft_type)}"
    start = getattr(config, "init_lora_weights", True)
    if start not in DRAWN and not is_taken_off(config):
        return f"init_lora_weights={start!r}"
    if is_taken_off(config) and getattr(config, "lora_dropout", 0) > 0:
        return f"init_lora_weights={start!r} with lora_dropout"  # what is taken off sees the inputs whole
    for field in dataclasses.fields(config):
        value, default = getattr(config, field.name), _default(field)
        if field.name not in honoured and value != default and (value or default):
            return f"{field.name}={value!r}"
    return None


def odd_part(adapted: nn.Module) -> str | None:
    """Return what a stack has no form of among the layers that peft adapted or trains whole, or None."""
    for name, layer in tuner_layers(adapted).items():
        base = layer.get_base_layer()
        if not (_is_plain(base) and chain_of(layer)):
            return f"{name} of type {type(base).__name__}"
    for name, whole in saved_wholes(adapted).items():
        for part in whole.modules():
            if any(True for _ in part.parameters(recurse=False)) and not _is_plain(part, (nn.Linear,)):
                return f"modules_to_save {name!r} with {type(part).__name__}"
    return None


def _is_plain(layer: Any, kinds: Sequence[Any] = (nn.Linear, nn.Embedding)) -> bool:
    """Whether a layer does what its kind does, with a weight of numbers."""
    if type(layer).__name__ == "Conv1D" and nn.Linear in kinds:
        return len(kinds) > 1
    if type(getattr(layer, "weight", None)) is not nn.Parameter or type(layer.weight.data) is not Tensor:
        return False
    same = any(isinstance(layer, kind) and type(layer).forward is kind.forward for kind in kinds)
    odd = any(getattr(layer, name, None) for name in ("max_norm", "scale_grad_by_freq", "sparse"))
    return same and not odd and layer.weight.is_floating_point()


def _check_saved(adapted: nn.Module, config: peft.PeftConfig) -> None:
    """Raise ValueError for a name that peft would pass over in silence."""
    wholes = saved_wholes(adapted)
    for name in getattr(config, "modules_to_save", None) or ():
        if not any(whole == name or whole.endswith(name) for whole in wholes):
            raise ValueError(f"modules_to_save = {name!r} matches no module, expected the name of one")


def _default(field: dataclasses.Field) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    return None if field.default_factory is dataclasses.MISSING else field.default_factory()
