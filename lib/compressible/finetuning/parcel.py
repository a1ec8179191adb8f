"""Objects on their way to another process: the bytes of all their tensors in one array, and what is left pickled.

A pool of processes maps one large array into all of them (joblib does, into shared memory), where a pickled model would
be copied for each. Nothing here is a file format: both arrays live as long as the call.
"""

from __future__ import annotations

import io
import math
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import cloudpickle
import numpy as np
import torch
from torch import Tensor, nn

from compressible.runtime.checks import one_line

ALIGNED = 64  # bytes: the start of every tensor


@dataclass(frozen=True)
class Parcel:
    """pickled: bytes, uint8, that name tensors by their place in content, bytes, uint8, too."""

    pickled: np.ndarray
    content: np.ndarray


def pack(value: Any) -> Parcel:
    """Return any object as a parcel; tensors arrive without gradients, equal tensors as one.

    Raises whatever pickle does for an object that cannot be sent.
    """
    file = io.BytesIO()
    packer = _Packer(file)
    packer.dump(value)
    content = np.zeros(packer.size, np.uint8)
    target = torch.from_numpy(content)
    for tensor, (_, start, *_) in packer.found.values():
        flat = tensor.detach().contiguous().flatten().view(torch.uint8)
        target[start : start + len(flat)].copy_(flat)
    return Parcel(np.frombuffer(bytearray(file.getbuffer()), np.uint8), content)


def pack_named(parts: Mapping[str, Any]) -> Parcel:
    """Return the parts as one parcel of a dict; ValueError names the first that cannot be sent."""
    try:
        return pack(dict(parts))
    except Exception as error:
        for name, value in parts.items():
            _expect_sendable(name, value)
        raise ValueError(f"{', '.join(parts)} cannot be sent to another process ({one_line(error)})") from error


def unpack(parcel: Parcel, device: torch.device, own: bool = False) -> Any:
    """Return the object: what was on a GPU is on `device`, all else on the CPU, in the parcel's memory or its `own`."""
    return _Unpacker(parcel, device, own).load()


class _Packer(cloudpickle.Pickler):
    """Leaves plain tensors out, and notes where their bytes will be; others, such as quantised ones, pickle themselves.

    found: by id the tensor, which keeps the id its own, and its name: number, start, dtype, shape, gradient, GPU.
    """

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self.found: dict[int, tuple[Tensor, tuple]] = {}
        self.size = 0

    def persistent_id(self, obj: Any) -> tuple | None:
        if type(obj) not in (Tensor, nn.Parameter) or not _plain(obj):
            return None
        if id(obj) not in self.found:
            trained = obj.requires_grad if isinstance(obj, nn.Parameter) else None
            name = (len(self.found), self.size, obj.dtype, tuple(obj.shape), trained, obj.is_cuda)
            self.found[id(obj)] = obj, name
            self.size += -(-obj.numel() * obj.element_size() // ALIGNED) * ALIGNED
        return self.found[id(obj)][1]


class _Unpacker(pickle.Unpickler):
    def __init__(self, parcel: Parcel, device: torch.device, own: bool) -> None:
        super().__init__(io.BytesIO(parcel.pickled.data))
        content = parcel.content if parcel.content.flags.writeable else parcel.content.copy()  # ray maps it read-only
        self.content, self.device, self.own = torch.from_numpy(content), device, own
        self.made: dict[int, Tensor] = {}

    def persistent_load(self, pid: tuple) -> Tensor:
        number, start, dtype, shape, trained, on_gpu = pid
        if number not in self.made:
            flat = self.content[start : start + math.prod(shape) * dtype.itemsize]
            target = self.device if on_gpu else torch.device("cpu")
            tensor = flat.view(dtype).view(shape).to(target, copy=self.own)
            self.made[number] = tensor if trained is None else nn.Parameter(tensor, trained)
        return self.made[number]


def _plain(tensor: Tensor) -> bool:
    """Whether a tensor is its bytes and a shape."""
    told = tensor.layout is torch.strided and tensor.device.type in ("cpu", "cuda")
    return told and not (tensor.is_quantized or tensor.is_complex() or tensor.is_neg())


def _expect_sendable(name: str, value: Any) -> None:
    try:
        pack(value)
    except Exception as error:
        reason = f"{name} cannot be sent to another process ({one_line(error)})"
        raise ValueError(f"{reason}: expected no open file, lock, generator or thread in it") from error
