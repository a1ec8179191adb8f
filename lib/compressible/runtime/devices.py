"""The hardware: its names, its precision, its memory and its clock."""

from __future__ import annotations

import importlib.util
import os
import platform
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch
from torch import Tensor


def _now(like: Tensor) -> float:
    if like.is_cuda:
        torch.cuda.synchronize(like.device)
    return time.perf_counter()


def interpreted() -> bool:
    """Whether Triton runs its kernels in its Python interpreter, on CPU tensors (TRITON_INTERPRET=1)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def has_triton() -> bool:
    """Whether triton is installed."""
    return importlib.util.find_spec("triton") is not None


_earlier: dict[int, int] = {}  # peaks of a device before `peak_inside` reset them


def device_name(device: str) -> str:
    """Name of the hardware behind "cpu", "cuda", "cuda:N" or "auto": a CPU model or a GPU name."""
    resolved = resolve_device(device)
    return cpu_model() if resolved == "cpu" else torch.cuda.get_device_name(resolved)


@cache
def cpu_model() -> str:
    """The CPU's model name, as far as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def resolve_device(device: str) -> str:
    """Return "cuda" or "cpu" for "auto", any other name as it is; ValueError if CUDA is asked for and absent."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        way = "" if torch.version.cuda else "; it is the CPU build: `make distclean`, then `make GPU=1 setup`"
        raise ValueError(f"device is {device!r}, expected cpu or auto: this PyTorch sees no CUDA device{way}")
    return device


def reset_peak_memory(device: str) -> None:
    """Start a new measurement of peak memory; only CUDA can."""
    _earlier.pop(_index(device), None)
    if resolve_device(device) != "cpu":
        torch.cuda.reset_peak_memory_stats(resolve_device(device))


@contextmanager
def peak_inside(device: str) -> Iterator[Callable[[], int]]:
    """Give a function for the tensors' peak on CUDA since here, in bytes; `peak_memory` goes on counting the whole.

    On a CPU, whose peak cannot be reset, it is the process's.
    """
    name, before = resolve_device(device), peak_memory(device)
    reset_peak_memory(device)
    _earlier[_index(name)] = before
    yield lambda: torch.cuda.max_memory_allocated(name) if name != "cpu" else peak_memory(name)


def peak_memory(device: str) -> int:
    """Bytes: the process's peak resident memory on a CPU, the tensors' peak since the reset on CUDA."""
    if resolve_device(device) != "cpu":
        name = resolve_device(device)
        return max(torch.cuda.max_memory_allocated(name), _earlier.get(_index(name), 0))
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _index(device: str) -> int:
    """Number of a CUDA device, "cuda" being the current one; -1 for the CPU."""
    name = torch.device(resolve_device(device))
    return -1 if name.type == "cpu" else torch.cuda.current_device() if name.index is None else name.index


def synchronize(device: str) -> None:
    """Wait for the GPU, so that a clock read afterwards is honest."""
    if resolve_device(device) != "cpu":
        torch.cuda.synchronize(resolve_device(device))


@contextmanager
def matmul_precision(name: str) -> Iterator[None]:
    """Let CUDA's float32 products use TensorFloat-32 inside for the name "tf32", and not for any other."""
    settings, before = torch.backends.cuda.matmul, tensor_float_32()
    named = getattr(settings, "fp32_precision", None)  # PyTorch 2.9's way to say it
    settings.allow_tf32 = name == "tf32"  # sets both
    try:
        yield
    finally:
        settings.allow_tf32 = before
        if named is not None:
            settings.fp32_precision = named


def tensor_float_32() -> bool:
    """Whether CUDA's float32 products use TensorFloat-32; the older flag may not be read once the newer was set."""
    settings = torch.backends.cuda.matmul
    return settings.fp32_precision == "tf32" if hasattr(settings, "fp32_precision") else settings.allow_tf32
