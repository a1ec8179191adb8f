"""Adapters on disk: the trainable chain itself, to resume from, and a stock peft LoRA adapter, to use elsewhere."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from compressible.adapters.config import DeepLoraConfig
from compressible.adapters.layer import Adapter, adapted, adapters, get_deep_lora_model, layer_shape
from compressible.adapters.merge import merged_weight
from compressible.adapters.targets import places, saved_by_peft, saved_modules
from compressible.runtime.paths import atomic_path, write_atomic


def save_adapter(model: nn.Module, path: str | Path) -> None:
    """Write every factor and modules_to_save to path/deep_lora.safetensors, the config to path/deep_lora.json.

    Args:
        model: of `get_deep_lora_model`; compressed adapters after `compress_adapters`.
        path: a folder, made where it is missing.

    Returns:
        Nothing; a reader never finds half a file.

    Raises:
        ValueError: for a model without adapters.
        RuntimeError: where compressed adapters have no factors yet.

    Example:
        >>> import os, tempfile
        >>> import compressible as cd
        >>> from torch import nn
        >>> config = cd.DeepLoraConfig(r=2, variant="thin")
        >>> model = cd.get_deep_lora_model(nn.Sequential(nn.Linear(8, 4)), config)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     cd.save_adapter(model, folder)
        ...     sorted(os.listdir(folder))
        ['deep_lora.json', 'deep_lora.safetensors']

    Reference:
        peft's layout, of one file of tensors and one of the config, with names and factors of our own.
    """
    model = adapted(model)
    config: DeepLoraConfig = vars(model)["deep_lora_config"]
    tensors = {
        f"{name}.factors.{i}": factor
        for name, adapter in adapters(model).items()
        for i, factor in enumerate(adapter.ready())
    }
    tensors |= {f"saved.{key}": value for key, value in _saved(model, config).items()}
    _write(Path(path), "deep_lora.safetensors", tensors, "deep_lora.json", asdict(config))


def load_adapter(model: nn.Module, path: str | Path) -> nn.Module:
    """Put the adapter of `save_adapter` on a base model and return it, trainable; the model is changed in place.

    Args:
        model: the base model that was adapted, without adapters.
        path: the folder.

    Returns:
        The same model with the adapters, as `get_deep_lora_model` makes it.

    Raises:
        ValueError: where the files do not fit the model, which then is as it was.

    Example:
        >>> import tempfile
        >>> import compressible as cd
        >>> from torch import nn
        >>> config = cd.DeepLoraConfig(r=2, variant="thin")
        >>> model = cd.get_deep_lora_model(nn.Sequential(nn.Linear(8, 4)), config)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     cd.save_adapter(model, folder)
        ...     again = cd.load_adapter(nn.Sequential(nn.Linear(8, 4)), folder)
        >>> [(a == b).all().item() for a, b in zip(again[0].factors, model[0].factors)]
        [True, True, True]

    Reference:
        The files of `save_adapter`; its place in peft is `PeftModel.from_pretrained(..., is_trainable=True)`.
    """
    settings = json.loads((Path(path) / "deep_lora.json").read_text())
    if "lr_ratio" in settings:  # of a file from before the name was settled
        settings["outer_ratio"] = settings.pop("lr_ratio")
    config = DeepLoraConfig(**settings)
    chains: dict[str, dict[int, Tensor]] = {}
    saved: dict[str, Tensor] = {}
    for key, value in load_file(Path(path) / "deep_lora.safetensors").items():
        name, _, index = key.rpartition(".factors.")
        if name:
            chains.setdefault(name, {})[int(index)] = value
        else:
            saved[key.removeprefix("saved.")] = value
    _check_fit(model, config, chains, saved, path)
    get_deep_lora_model(model, config)
    for name, adapter in adapters(model).items():
        chain = [chains[name][i] for i in range(len(chains[name]))]
        adapter.factors = nn.ParameterList(nn.Parameter(factor.to(adapter.weight.device)) for factor in chain)
    state = model.state_dict(keep_vars=True)
    with torch.no_grad():
        for key, value in saved.items():
            state[key].copy_(value)
    return model


def _check_fit(
    model: nn.Module,
    config: DeepLoraConfig,
    chains: dict[str, dict[int, Tensor]],
    saved: dict[str, Tensor],
    path: str | Path,
) -> None:
    found = places(model, config)
    if chains.keys() != found.keys():
        odd = sorted(chains.keys() ^ found.keys())
        raise ValueError(f"{path} and the model differ in {len(odd)} adapted layers, the first {odd[0]!r}")
    for name, chain in chains.items():
        sizes, shape = (chain[len(chain) - 1].shape[0], chain[0].shape[1]), layer_shape(model.get_submodule(name))
        if sizes != shape:
            raise ValueError(f"{path} holds an update of {sizes} for {name!r}, expected {shape}")
    ours, theirs = ({key: value.shape for key, value in of.items()} for of in (saved, _saved(model, config)))
    odd = sorted({key for key, _ in ours.items() ^ theirs.items()})
    if odd:
        raise ValueError(f"{path} and the model differ in {len(odd)} saved tensors, the first {odd[0]!r}")


def save_peft_adapter(model: nn.Module, path: str | Path, base_model_name: str | None = None) -> None:
    """Write path/adapter_model.safetensors and adapter_config.json, which stock peft loads as LoRA.

    The chain contracts to rank r exactly, split evenly between peft's two factors; scaling is inside them.

    Args:
        model: of `get_deep_lora_model`, trained.
        path: a folder, made where it is missing.
        base_model_name: what peft is to call the base model.

    Returns:
        Nothing; `peft.PeftModel.from_pretrained(base, path)` loads it.

    Raises:
        ValueError: for variant "full", whose updates have no small rank: merge those, or train "thin" or "compressed".

    Example:
        >>> import os, tempfile
        >>> import compressible as cd
        >>> from torch import nn
        >>> config = cd.DeepLoraConfig(r=2, variant="thin")
        >>> model = cd.get_deep_lora_model(nn.Sequential(nn.Linear(8, 4)), config)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     cd.save_peft_adapter(model, folder)
        ...     sorted(os.listdir(folder))
        ['adapter_config.json', 'adapter_model.safetensors']

    Reference:
        peft's LoRA checkpoint: adapter_model.safetensors and adapter_config.json.
    """
    model = adapted(model)
    config: DeepLoraConfig = vars(model)["deep_lora_config"]
    if config.variant == "full":
        raise ValueError('variant is "full", an update of rank min(m, n): expected "thin" or "compressed", or merge it')
    saved = saved_by_peft(model, config)
    tensors: dict[str, Tensor] = {}
    found = _alone(model, saved)
    for name, adapter in found.items():
        a, b = balanced(adapter)
        embedding = isinstance(adapter.base, nn.Embedding)
        keys = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A.weight", "lora_B.weight")
        tensors |= {f"base_model.model.{name}.{key}": part for key, part in zip(keys, (a, b), strict=True)}
    tensors |= {f"base_model.model.{key}": value for key, value in _whole(model, saved).items()}
    about = {
        "peft_type": "LORA", "task_type": config.task_type, "base_model_name_or_path": base_model_name,
        "r": config.r, "lora_alpha": config.r, "lora_dropout": config.lora_dropout, "bias": "none",
        "target_modules": sorted(found), "modules_to_save": saved or None, "inference_mode": True,
        "fan_in_fan_out": any(type(adapter.base).__name__ == "Conv1D" for adapter in found.values()),
        "use_rslora": False,
    }  # fmt: skip
    _write(Path(path), "adapter_model.safetensors", tensors, "adapter_config.json", about)


def _alone(model: nn.Module, saved: list[str]) -> dict[str, Adapter]:
    """Adapters at every place where they are used, less those in modules that peft takes whole."""
    inside = tuple(f"{name}." for name in _taken(model, saved))
    found = [(name, part) for name, part in model.named_modules(remove_duplicate=False) if isinstance(part, Adapter)]
    return {name: part for name, part in found if not f"{name}.".startswith(inside)}


def _taken(model: nn.Module, saved: list[str]) -> list[str]:
    """Names of the modules that peft's modules_to_save means: those that end so."""
    return [name for name, _ in model.named_modules() if any(name.endswith(end) for end in saved)]


def _whole(model: nn.Module, saved: list[str]) -> dict[str, Tensor]:
    """What peft takes whole, trained or frozen, with the updates of adapters inside merged."""
    tensors: dict[str, Tensor] = {}
    for name in _taken(model, saved):
        for at, part in model.get_submodule(name).named_modules(prefix=name):
            if isinstance(part, Adapter):
                tensors |= {f"{at}.{key}": value for key, value in part.base.state_dict().items()}
                tensors[f"{at}.weight"] = merged_weight(part)
            elif not isinstance(model.get_submodule(at.rpartition(".")[0]), Adapter):
                own = {**part._parameters, **part._buffers}
                tensors |= {f"{at}.{key}": value for key, value in own.items() if value is not None}
    return tensors


@torch.no_grad()
def balanced(adapter: Adapter) -> tuple[Tensor, Tensor]:
    """Return A (r, n) and B (m, r), B A the update, each with half of its singular values: eps^L is on neither side."""
    lower, last = (part.double() for part in adapter.contracted())
    left, right = torch.linalg.qr(last), torch.linalg.qr(lower.mT)
    u, values, v = torch.linalg.svd(left.R @ right.R.mT, full_matrices=False)
    root = values.sqrt()
    spare = (0, len(last.mT) - len(root))  # a layer with fewer outputs or inputs than r keeps zeros
    a, b = root[:, None] * (v @ right.Q.mT), (left.Q @ u) * root
    return functional.pad(a, (0, 0, *spare)).float(), functional.pad(b, spare).float()


def _saved(model: nn.Module, config: DeepLoraConfig) -> dict[str, Tensor]:
    found = saved_modules(model, config)
    return {f"{name}.{key}": value for name, module in found for key, value in module.state_dict().items()}


def _write(folder: Path, weights: str, tensors: dict[str, Tensor], settings: str, about: dict) -> None:
    text = json.dumps(about, indent=2) + "\n"
    copies = {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}  # no two views of one
    with atomic_path(folder / weights) as temporary:
        save_file(copies, temporary, metadata={"format": "pt"})
    write_atomic(folder / settings, text)
