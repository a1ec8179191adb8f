"""What a killed fine-tuning goes on from: one safetensors file, written whole or not at all."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from .paths import atomic_path

if TYPE_CHECKING:
    from .tuning import Tuning


class Checkpoint:
    """The state of one pass in the file `path`, bound to the runs and the settings that made it.

    What `watch` gave is kept if it is tensors or dicts of tensors; other values are JSON.
    """

    def __init__(self, path: Path, tuning: Tuning) -> None:
        self.path, self.tuning = Path(path), tuning
        self.key = _digest(tuning)

    def resume(self, scores: dict[int, list[float]], watched: dict[int, list[Any]]) -> int:
        """Load the state, if there is one, and return the step to go on from; ValueError if it is of other runs."""
        if not self.path.exists():
            return 0
        tuning = self.tuning
        with safe_open(self.path, "pt", device=str(tuning.device)) as stored:
            meta = json.loads(stored.metadata()["state"])
            if meta["key"] != self.key:
                other = f"{self.path} is {meta['key']}, expected {self.key}"
                raise ValueError(f"{other}: it belongs to other runs; delete it, or name another")
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        for name in _NAMES:
            getattr(tuning.adam, name).copy_(tensors[name])
        tuning.losses.copy_(tensors["losses"])
        tuning.step.fill_(meta["step"])
        scores.update({int(step): values for step, values in meta["scores"].items()})
        for step, values in meta["watched"].items():
            watched[int(step)] = [_restored(value, tensors) for value in values]
        return meta["step"]

    def save(self, step: int, scores: dict[int, list[float]], watched: dict[int, list[Any]]) -> None:
        """Write the state after `step` steps."""
        tuning, tensors = self.tuning, {}
        kept = {
            at: [_stored(value, f"watched.{at}.{run}", tensors) for run, value in enumerate(values)]
            for at, values in watched.items()
        }
        meta = {"key": self.key, "step": step, "scores": scores, "watched": kept}
        tensors |= {name: getattr(tuning.adam, name) for name in _NAMES} | {"losses": tuning.losses}
        with atomic_path(self.path) as temporary:
            save_file({n: t.contiguous() for n, t in tensors.items()}, temporary, {"state": json.dumps(meta)})


_NAMES = ("value", "mean", "square", "count")


def _digest(tuning: Tuning) -> str:
    """What must be equal for a state to be of use."""
    runs = [
        {**asdict(run), "config": asdict(run.config),
         "subset": None if run.subset is None else torch.as_tensor(run.subset).tolist()}
        for run in tuning.runs
    ]  # fmt: skip
    parts = tuning.task.train, tuning.task.validation
    rows = [_bytes(tensor) for part in parts for tensor in (part.labels, *part.tokens.values())]
    weights = [_bytes(parameter.detach().flatten()[:1024]) for parameter in tuning.source.parameters()]
    settings = [tuning.steps, tuning.size, tuning.decay_ratio, tuning.precision, tuning.dropout, rows, weights]
    settings.append([list(shape) for shape in tuning.adam.shapes])  # the order of what the state's vectors hold
    return hashlib.sha256(json.dumps([runs, settings], sort_keys=True).encode()).hexdigest()[:16]


def _bytes(tensor: torch.Tensor) -> str:
    values = tensor.double() if tensor.is_floating_point() else tensor
    return hashlib.sha256(values.cpu().contiguous().numpy().tobytes()).hexdigest()


def _stored(value: Any, name: str, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, dict):
        return {"dict": {key: _stored(item, f"{name}.{key}", tensors) for key, item in value.items()}}
    return {"value": value}


def _restored(value: dict, tensors: dict[str, torch.Tensor]) -> Any:
    if "tensor" in value:
        return tensors[value["tensor"]]
    if "dict" in value:
        return {key: _restored(item, tensors) for key, item in value["dict"].items()}
    return value["value"]
