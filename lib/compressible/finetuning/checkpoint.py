"""What a killed fine-tuning goes on from: one safetensors file, written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import math
import re
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from compressible.finetuning.stacked_pass import StackedPass
from compressible.finetuning.update_spectra import Spectra
from compressible.runtime.checks import one_line
from compressible.runtime.paths import atomic_path, cache_dir

MOVES_NOTHING = ("_name_or_path", "transformers_version")  # of a model's config: where it came from


@dataclass
class Kept:
    """What a pass has given so far: by step its runs' scores and what `watch` gave.

    began: on perf_counter; lost: the runs whose logits were not finite when last seen, at the end also whose updates.
    """

    scores: dict[int, list[float]] = field(default_factory=dict)
    watched: dict[int, list[Any]] = field(default_factory=dict)
    began: float = field(default_factory=time.perf_counter)
    lost: list[int] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """Seconds spent on the pass, before a kill and since."""
        return time.perf_counter() - self.began


class Checkpoint:
    """The state of one pass in the file `path`, bound by `key` to the model, the runs and the settings that made it.

    state holds the live tensors by name, all on one device; after the last of `steps` the file has "losses" alone, and
    "value", the factors, if they are kept, as nothing else would be read.
    """

    def __init__(
        self, path: Path, key: dict[str, str], state: Mapping[str, Tensor], steps: int, keep_factors: bool = True
    ) -> None:
        self.path, self.key, self.state, self.steps = Path(path), key, state, steps
        self.last = ("losses", "value") if keep_factors else ("losses",)

    def resume(self, evaluate_at: Sequence[int] = (), watch_at: Sequence[int] = ()) -> tuple[int, Kept]:
        """Load the state, if there is one, and return the step to go on from and what it holds.

        Raises ValueError if it is of other runs or lacks scores, or what `watch` gives, of steps that it is past.
        """
        if not self.path.exists():
            return 0, Kept()
        try:
            meta, tensors = self._read()
        except _DamagedError as error:
            if not self.path.absolute().is_relative_to(cache_dir().absolute()):
                raise
            # Nobody named a file of the cache, so nobody could be asked to delete it.
            warnings.warn(f"{error}; the run begins again", stacklevel=2)
            return 0, Kept()
        for name, live in self._live(meta["step"]).items():
            live.copy_(tensors[name])
        scores = {int(step): values for step, values in meta["scores"].items()}
        watched = {int(step): [restored(v, tensors) for v in values] for step, values in meta["watched"].items()}
        for name, marks, held in (("evaluate_at", evaluate_at, scores), ("watch_at", watch_at, watched)):
            lacking = [mark for mark in marks if mark <= meta["step"] and mark not in held]
            self._expect_marks(name, lacking, meta["step"])
        return meta["step"], Kept(scores, watched, time.perf_counter() - meta["seconds"], meta["lost"])

    def _read(self) -> tuple[dict, dict[str, Tensor]]:
        """The metadata and the tensors, on the pass's device."""
        try:
            with safe_open(self.path, "pt", device=str(self.state["losses"].device)) as file:
                meta = json.loads(file.metadata()["state"])
                key = meta["key"]
                names = file.keys() if key == self.key else ()
                tensors = {name: file.get_tensor(name) for name in names}
                found, expected = _digest_of(file.metadata()["state"], tensors), file.metadata()["sha256"]
                if key == self.key and found != expected:
                    raise ValueError(f"sha256 of its content {found[:12]}, expected {expected[:12]}")
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            reason = f"is no checkpoint, or damaged ({type(error).__name__}: {error})"
            raise _DamagedError(f"{self.path} {reason}: delete it, or name another") from error
        if key != self.key:
            known = key if isinstance(key, dict) else {}
            other = ", ".join(name for name, own in self.key.items() if known.get(name) != own)
            raise ValueError(f"{self.path} belongs to other runs, by its {other}: delete it, or name another")
        return meta, tensors

    def _expect_marks(self, name: str, lacking: list[int], step: int) -> None:
        if lacking:
            past = f"{self.path} is at step {step} and holds nothing of steps {lacking}"
            raise ValueError(f"{past}, which {name} asks for: leave them out, delete it, or name another")

    def _live(self, step: int) -> dict[str, Tensor]:
        """The tensors that count at a step."""
        return {name: live for name, live in self.state.items() if step < self.steps or name in self.last}

    def save(self, step: int, kept: Kept) -> None:
        """Write the state after `step` steps; where that fails, say so and leave the last one that was written."""
        tensors: dict[str, Tensor] = {}
        watched = {at: [stored(value, tensors) for value in values] for at, values in kept.watched.items()}
        meta = {"key": self.key, "step": step, "scores": kept.scores, "watched": watched}
        meta |= {"seconds": kept.seconds, "lost": kept.lost}
        whole, state = tensors | self._live(step), json.dumps(meta)
        try:
            with atomic_path(self.path) as temporary:
                save_file(whole, temporary, {"state": state, "sha256": _digest_of(state, whole)})
        except (OSError, SafetensorError) as error:  # a full disk is no reason to lose the steps taken
            warnings.warn(f"no checkpoint at step {step}: {self.path}: {one_line(error)}", RuntimeWarning, stacklevel=2)


class _DamagedError(ValueError):
    """A file that is no checkpoint, or not as it was written."""


def _digest_of(state: str, tensors: Mapping[str, Tensor]) -> str:
    """sha256 of all that a file holds: a flipped bit changes no name and no shape."""
    parts = [state, *(f"{name} {list(value.shape)} {_bytes(value)}" for name, value in sorted(tensors.items()))]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def digests(stacked: StackedPass, settings: list) -> dict[str, str]:
    """Return what must be equal for a state to be of use: of runs, data and model of a pass, and further `settings`."""
    from compressible import __version__

    subsets = [None if run.subset is None else torch.as_tensor(run.subset).tolist() for run in stacked.runs]
    runs = [{**asdict(run), "subset": subset} for run, subset in zip(stacked.runs, subsets, strict=True)]
    model, task = stacked.source, stacked.task
    rows = [_bytes(tensor) for part in (task.train, task.validation) for tensor in (part.labels, *part.tokens.values())]
    weights = {name: _bytes(tensor) for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    config: dict = getattr(getattr(model, "config", None), "to_dict", dict)()
    structure = {name: config[name] for name in config if name not in MOVES_NOTHING}, repr(model)
    settings = [*settings, list(stacked.order.shape), stacked.precision, stacked.dropout]
    parts: dict[str, Any] = {"runs": runs, "settings": settings, "model": [weights, structure]}
    parts |= {"task": [rows, task.kind, getattr(task, "metric", None)], "version of compressible": __version__}
    return {name: _digest(part) for name, part in parts.items()}


def _digest(part: Any) -> str:
    text = re.sub(" at 0x[0-9a-f]+", "", json.dumps(part, sort_keys=True, default=_plain))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _plain(value: Any) -> Any:
    """Sets in order, numpy's numbers as Python's, all else as text."""
    if isinstance(value, (set, frozenset)):
        return sorted(value, key=str)
    return value.item() if hasattr(value, "item") else str(value)


def _bytes(tensor: Tensor) -> str:
    values = tensor.detach().cpu().contiguous().flatten()
    return f"{tensor.dtype} {hashlib.sha256(values.view(torch.uint8).numpy().data).hexdigest()}"


PLAIN = (bool, int, float, str, type(None))


def stored(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Return what JSON can hold of `value` and put its tensors into `tensors`.

    Raises ValueError, with the type's name, for what is none of: numbers, text, tensors, numpy's arrays and scalars,
    `Spectra`, and lists, tuples and dicts (keys of text) of these.
    """
    kind = type(value)
    if kind in PLAIN:
        return {"plain": value}
    if kind in (list, tuple):
        return {kind.__name__: [stored(item, tensors) for item in value]}
    if kind is dict and all(type(key) is str for key in value):
        return {"dict": {key: stored(item, tensors) for key, item in value.items()}}
    if kind is Spectra:
        return {"Spectra": {key: stored(item, tensors) for key, item in vars(value).items()}}
    if isinstance(value, Tensor) and value.layout is torch.strided and not (value.is_complex() or value.is_quantized):
        kept = value.detach().clone(memory_format=torch.contiguous_format)  # a file holds no two views of one memory
        return {"tensor": _named(kept, tensors), "device": str(value.device)}
    if isinstance(value, np.ndarray | np.generic) and not (value.dtype.hasobject or value.dtype.names):
        form = "array" if isinstance(value, np.ndarray) else "scalar"
        content = torch.from_numpy(np.frombuffer(value.tobytes(), np.uint8).copy())
        return {form: _named(content, tensors), "dtype": value.dtype.str, "shape": list(value.shape)}
    raise ValueError(
        f"watch gave {_described(value)}, which a checkpoint cannot hold: expected numbers, text, tensors, numpy "
        "arrays, Spectra, or lists, tuples and dicts (keys of text) of these"
    )


def restored(form: dict, tensors: dict[str, Tensor]) -> Any:
    """Return the value of which `stored` gave `form`."""
    kind, content = next(iter(form.items()))
    if kind == "plain":
        return content
    if kind in ("list", "tuple"):
        return {"list": list, "tuple": tuple}[kind](restored(item, tensors) for item in content)
    if kind in ("dict", "Spectra"):
        items = {key: restored(item, tensors) for key, item in content.items()}
        return Spectra(**items) if kind == "Spectra" else items
    if kind == "tensor":
        return tensors[content].to(form["device"])
    array = np.frombuffer(tensors[content].cpu().numpy().tobytes(), form["dtype"], math.prod(form["shape"]))
    array = array.reshape(form["shape"]).copy()
    return array if kind == "array" else array[()]


def _named(tensor: Tensor, tensors: dict[str, Tensor]) -> str:
    name = f"watched.{len(tensors)}"
    tensors[name] = tensor
    return name


def _described(value: Any) -> str:
    kind = type(value).__name__
    if isinstance(value, dict):
        return f"a {kind} with keys of {', '.join(sorted({type(key).__name__ for key in value}))}"
    if isinstance(value, Tensor | np.ndarray | np.generic):
        return f"a {kind} of {value.dtype}" + (f" and {value.layout}" if isinstance(value, Tensor) else "")
    return f"a {kind}"
