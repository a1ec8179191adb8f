"""Tensors that a model makes on the host in each pass, kept on the device: a CUDA graph cannot copy them there.

Masks made from `torch.tensor(0.0, device=...)`, positions from `torch.arange(T).to(device)`, indices from lists: they
depend on shapes alone, as a graph does, so that one pass can make them for all that follow.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

MAKERS = (torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor)
INDEXING = (Tensor.__getitem__, Tensor.__setitem__)
_aten = torch.ops.aten
COPYING = (  # operations on the device that copy an operand from the host themselves, told by their first operand
    _aten.copy_.default,
    _aten.where.self,
    _aten.index.Tensor,
    _aten.index_put.default,
    _aten.index_put_.default,
    _aten._index_put_impl_.default,
)


class DeviceConstants:
    """While entered, for one pass, what goes from the host to the device is taken from what the first pass sent there.

    Raises RuntimeError where a later pass sends something else: a graph would go on with what it was captured with.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.kept: dict[bytes, Tensor] = {}
        self.expected: list[bytes] | None = None
        self.sent: list[bytes] = []

    def __enter__(self) -> DeviceConstants:
        self.sent = []
        self.modes = ExitStack()
        self.modes.enter_context(_Copies(self))
        self.modes.enter_context(_Makers(self))
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self.modes.close()
        if error is None and self.expected is None:
            self.expected = self.sent
        elif error is None:
            self._check(len(self.sent) == len(self.expected or ()))

    def on(self, device: Any) -> bool:
        """Whether `device`, in any of torch's spellings, is the constants' own."""
        asked = torch.device(device)
        return asked.type == self.device.type and asked.index in (None, self.device.index)

    def moved(self, host: Tensor) -> Tensor:
        """Return what `host` (any shape) is on the device; not to be written on."""
        key, at = _key(host), len(self.sent)
        self.sent.append(key)
        if self.expected is not None:
            self._check(at < len(self.expected) and self.expected[at] == key)
        if key not in self.kept:
            self.kept[key] = host.to(self.device)
        return self.kept[key]

    def _check(self, same: bool) -> None:
        if not same:
            raise RuntimeError("what the model sends from the host to the device differs from pass to pass")


class _Makers(TorchFunctionMode):
    """Lets tensors of Python's numbers be made on the host and sent in the open; torch would do both out of sight."""

    def __init__(self, constants: DeviceConstants) -> None:
        super().__init__()
        self.constants = constants

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func in INDEXING and self.constants.on(args[0].device):
            args = (args[0], _indices(args[1]), *args[2:])
        elif func in MAKERS and self._made_there(func, args, kwargs):
            rest = {name: value for name, value in kwargs.items() if name not in ("device", "requires_grad")}
            made = func(*args, **rest, device="cpu").to(self.constants.device)
            return made.requires_grad_(kwargs.get("requires_grad", False))
        return func(*args, **kwargs)

    def _made_there(self, func: Callable, args: tuple, kwargs: dict) -> bool:
        """Whether a maker makes its tensor from Python's numbers and on the device."""
        data = args[1:2] if func is Tensor.new_tensor else args[:1]
        if any(isinstance(value, Tensor) for value in (*data, kwargs.get("data"), kwargs.get("obj"))):
            return False
        own = args[0].device if func is Tensor.new_tensor else torch.get_default_device()
        device = kwargs.get("device")
        return self.constants.on(own if device is None else device)


class _Copies(TorchDispatchMode):
    """Gives operations their operands from the host as constants on the device."""

    def __init__(self, constants: DeviceConstants) -> None:
        super().__init__()
        self.constants = constants

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        there = kwargs.get("device") if func is _aten._to_copy.default else None
        if func in COPYING:
            there = args[0].device
        if there is not None and self.constants.on(there):
            args = tree_map_only(Tensor, self._there, args)
        return func(*args, **kwargs)

    def _there(self, value: Tensor) -> Tensor:
        return self.constants.moved(value) if value.device.type == "cpu" else value


def _indices(index: Any) -> Any:
    """An index whose lists and arrays are tensors on the host."""
    if isinstance(index, tuple):
        return tuple(_indices(part) for part in index)
    numbers = isinstance(index, list) and all(isinstance(each, int) for each in index)
    return torch.as_tensor(index) if numbers or isinstance(index, np.ndarray) else index


def _key(host: Tensor) -> bytes:
    """What tells a tensor on the host from others: its type, shape and values."""
    flat = host.detach().contiguous().reshape(-1).view(torch.uint8)
    described = f"{host.dtype} {tuple(host.shape)}".encode()
    return hashlib.sha256(described + flat.numpy().tobytes()).digest()
