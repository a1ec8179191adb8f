"""What `watch` gives, as JSON and tensors by name, and back: equal, and of the same types."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .update_spectra import Spectra

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
