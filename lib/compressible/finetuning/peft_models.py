"""A run's own model as peft makes it: what of it is adapted, its factors, and what is trained whole.

Which layers a config means, at which rank and scale, is peft's decision: it is read off a model of `get_peft_model`.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import peft
import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from compressible.adapters.config import DeepLoraConfig
from compressible.adapters.layer import DeepLoraLayer

DRAWN = (True, False, "gaussian", "orthogonal")  # LoRA's starts that read neither weights nor data
OF_WEIGHTS = ("pissa", "olora")  # those that read the weights and nothing else, the seed neither
TAKEN_OFF = (*OF_WEIGHTS, "lora_ga")  # its starts B0 A0 that peft takes off the frozen weight
Start = Callable[[Any, torch.Generator], None]  # gives a PeftModel's factors other values, as paper_lora_start does
AnyStart = TypeVar("AnyStart", bound=Callable)
ADAPTER = "default"  # peft's own name of a model's first adapter


@dataclass(frozen=True)
class GradientStart:
    """A start of LoRA from the run's first gradient, or another one of compressed Deep LoRA than P1's.

    chain: takes the gradient (m, n) of a layer's weight, the run's config, the width k of the factors and a generator
        of its seed, and returns [W_1 (k, n), ..., W_L (m, k)].
    taken_off: whether LoRA's product, scaled, is taken off the frozen weight.
    """

    chain: Callable[[Tensor, Any, int, torch.Generator], list[Tensor]]
    taken_off: bool = False


def adapted_by_peft(
    model: nn.Module, config: peft.PeftConfig, seed: int = 0, start: Start | None = None, empty: bool = False
) -> Any:
    """Return what `get_peft_model` makes of `model`, which it changes, and a copy of the config.

    Its draws are those after torch.manual_seed(seed); torch's generators are left as they were. start then changes
    the factors, from a generator of that seed; empty: whether they hold nothing yet.
    """
    place = torch.device("meta") if empty else nullcontext()
    with drawing(model, seed), warnings.catch_warnings(), place:
        warnings.simplefilter("ignore", FutureWarning)  # of transformers, on what peft asks it
        warnings.filterwarnings("ignore", "The PEFT config's `base_model_name_or_path` was renamed")
        adapted = peft.get_peft_model(model, copy.deepcopy(config), low_cpu_mem_usage=empty)
    if start is not None:
        start(adapted, torch.Generator().manual_seed(int(seed)))
    return adapted


@contextmanager
def drawing(model: nn.Module, seed: int) -> Iterator[None]:
    """Within it torch draws as after torch.manual_seed(seed), behind it as it would have without."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(int(seed))  # torch.manual_seed would seed every GPU of the caller's, too
        if device.type == "cuda":
            torch.cuda.default_generators[device.index].manual_seed(int(seed))
        yield


def of_factors_alone(start: AnyStart) -> AnyStart:
    """Mark a `Start` that reads and changes factors alone, so that runs of several seeds may start in one model."""
    vars(start)["of_factors_alone"] = True
    return start


def on_meta(model: nn.Module) -> nn.Module:
    """Return a copy of the structure whose tensors have shapes but no values."""
    memo: dict[int, Any] = {id(p): nn.Parameter(p.detach().to("meta"), False) for p in model.parameters()}
    return copy.deepcopy(model, memo | {id(buffer): buffer.to("meta") for buffer in model.buffers()})


def sharing(model: nn.Module) -> nn.Module:
    """Return a copy of the structure whose parameters and buffers are the model's own tensors."""
    tensors = [*model.parameters(), *model.buffers()]
    memo = {id(t): nn.Parameter(t.data, False) if isinstance(t, nn.Parameter) else t for t in tensors}
    return copy.deepcopy(model, memo)


def attending(model: nn.Module) -> nn.Module:
    """Return the model, a copy of the caller's, whose attention goes through kernels where transformers has none."""
    if any(type(module).__name__ == "MPNetEncoder" for module in model.modules()):
        from compressible.finetuning.mpnet_attention import give_kernels  # slow to import for all others

        give_kernels(model)
    return model


def base_of(adapted: Any) -> nn.Module:
    """Return the model that was adapted, with the adapters in it: names are those of the plain model."""
    return adapted.get_base_model()


def tuner_layers(model: nn.Module) -> dict[str, Any]:
    """Return the layers that peft adapted by name, each by the first of its names."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    return {name: module for name, module in found.items() if not _inside(name, found)}


def saved_wholes(model: nn.Module) -> dict[str, nn.Module]:
    """Return what peft trains whole by name, its copies of the base's modules."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, ModulesToSaveWrapper)}
    return {name: wrapper.modules_to_save[ADAPTER] for name, wrapper in found.items() if not _inside(name, found)}


def saved_linears(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Yield name, in the plain model, and module of the linear layers that peft trains whole: the heads."""
    for name, module in saved_wholes(model).items():
        for inner, part in module.named_modules():
            if isinstance(part, nn.Linear):
                yield f"{name}.{inner}" if inner else name, part


def set_heads(model: nn.Module, heads: dict[str, dict[str, Tensor]]) -> None:
    """Give heads, by name in the plain model, new weights and biases in the precision that theirs have."""
    for name, part in saved_linears(model):
        for own, value in heads.get(name, {}).items():
            setattr(part, own, nn.Parameter(value.to(part.weight.device, part.weight.dtype, copy=True)))


def chain_of(layer: Any) -> list[nn.Parameter]:
    """Return the trained factors [W_1 (k, n), ..., W_L (m, k)] of a LoRA or Deep LoRA layer; none of other methods."""
    if isinstance(layer, DeepLoraLayer):
        factors: Any = layer.deep_lora_factors[ADAPTER]
        return list(factors)
    if not isinstance(layer, LoraLayer):
        return []
    halves: Any = layer.lora_A, layer.lora_B
    if ADAPTER in layer.lora_embedding_A:
        return [layer.lora_embedding_A[ADAPTER], layer.lora_embedding_B[ADAPTER]]
    return [half[ADAPTER].weight for half in halves if ADAPTER in half]


def scaling_of(layer: Any) -> float:
    """Return what the product of a layer's factors is multiplied by."""
    return float(layer.scaling[ADAPTER]) if isinstance(layer, LoraLayer) else 1.0


def set_chain(layer: Any, chain: list[Tensor]) -> None:
    """Give a LoRA or Deep LoRA layer copies of these factors."""
    own = [nn.Parameter(factor.clone()) for factor in chain]
    if isinstance(layer, DeepLoraLayer):
        layer.deep_lora_factors[ADAPTER] = nn.ParameterList(own)
        layer.deep_lora_unset.discard(ADAPTER)
    elif ADAPTER in layer.lora_embedding_A:
        layer.lora_embedding_A[ADAPTER], layer.lora_embedding_B[ADAPTER] = own
    else:
        layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight = own


@torch.no_grad()
def take_off(layer: Any, pair: list[Tensor]) -> None:
    """Take s B A off a LoRA layer's frozen weight, which gets a tensor of its own; pair = [A (k, n), B (m, k)]."""
    base = layer.get_base_layer()
    a, b = (half.to(base.weight.device) for half in pair)
    change = scaling_of(layer) * (b @ a)
    turned = type(base).__name__ == "Conv1D"
    weight = base.weight.to(change.dtype) - (change.mT if turned else change)
    base.weight = nn.Parameter(weight.to(base.weight.dtype), requires_grad=False)


def drawn_start(config: peft.PeftConfig) -> peft.PeftConfig:
    """Return a config that adapts the same without the weights, gradients or data that its start may read."""
    changed = copy.deepcopy(config)
    if getattr(changed, "init_lora_weights", True) not in DRAWN:
        changed.init_lora_weights = True  # type: ignore[attr-defined]  # it is a LoraConfig
    return changed


def with_start_of(config: peft.PeftConfig, adapted: peft.PeftConfig) -> peft.PeftConfig:
    """Return what peft made of a config, whose start it was not told by `drawn_start`, with that start."""
    changed: Any = copy.deepcopy(adapted)
    if hasattr(config, "init_lora_weights"):
        changed.init_lora_weights = config.init_lora_weights
    return changed


def is_taken_off(config: peft.PeftConfig) -> bool:
    """Return whether LoRA's start is taken off the frozen weight, as PiSSA, OLoRA and LoRA-GA have it."""
    start = getattr(config, "init_lora_weights", True)
    return isinstance(start, str) and (start in TAKEN_OFF or start.startswith("pissa_niter_"))


def is_of_weights(config: peft.PeftConfig) -> bool:
    """Return whether LoRA's start, but of embeddings, hangs on the frozen weights alone."""
    return getattr(config, "init_lora_weights", None) in OF_WEIGHTS


def starts_from_gradient(config: peft.PeftConfig) -> bool:
    """Return whether LoRA starts from a first gradient, as LoRA-GA has it."""
    return getattr(config, "init_lora_weights", None) == "lora_ga"


def starts_compressed(config: peft.PeftConfig) -> bool:
    """Return whether the factors wait for a first gradient."""
    return isinstance(config, DeepLoraConfig) and config.awaits_gradient


def _inside(name: str, found: dict[str, Any]) -> bool:
    parts = name.split(".")
    return any(".".join(parts[:end]) in found for end in range(1, len(parts)))
