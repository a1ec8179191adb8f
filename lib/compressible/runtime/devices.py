"""The device that computes: which it is, what it is called, its precision, its memory and its clock."""

from __future__ import annotations

import importlib.util
import os
import platform
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache, wraps
from pathlib import Path
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

Given = ParamSpec("Given")
Found = TypeVar("Found")


def resolve_device(device: str) -> str:
    """Return "cuda" or "cpu" for "auto", any other name as it is; ValueError if CUDA is asked for and absent."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        way = "" if torch.version.cuda else "; it is the CPU build: `make distclean`, then `make GPU=1 setup`"
        raise ValueError(f"device is {device!r}, expected cpu or auto: this PyTorch sees no CUDA device{way}")
    return device


def without_autocast(function: Callable[Given, Found]) -> Callable[Given, Found]:
    """The function in the precision of its own tensors, wherever a caller has switched autocast on."""

    @wraps(function)
    def plain(*given: Given.args, **named: Given.kwargs) -> Found:
        with ExitStack() as stack:
            for kind in ("cpu", "cuda"):
                if torch.is_autocast_enabled(kind):
                    stack.enter_context(torch.autocast(kind, enabled=False))
            return function(*given, **named)

    return plain


def has_triton() -> bool:
    """Whether triton is installed."""
    return importlib.util.find_spec("triton") is not None


def interpreted() -> bool:
    """Whether Triton runs its kernels in its Python interpreter, on CPU tensors (TRITON_INTERPRET=1)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


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


def tensor_float_32() -> bool:
    """Whether CUDA's float32 products use TensorFloat-32; the older flag may not be read once the newer was set."""
    settings = torch.backends.cuda.matmul
    return settings.fp32_precision == "tf32" if hasattr(settings, "fp32_precision") else settings.allow_tf32


@contextmanager
def matmul_precision(name: str) -> Iterator[None]:
    """Let CUDA's float32 products use TensorFloat-32 inside for "tf32" and "bfloat16", and for no other name.

    What stays in float32 beside bfloat16, such as adapters' factors, would else be the slowest by far.
    """
    settings, before = torch.backends.cuda.matmul, tensor_float_32()
    named = getattr(settings, "fp32_precision", None)  # PyTorch 2.9's way to say it
    settings.allow_tf32 = name in ("tf32", "bfloat16")  # sets both
    try:
        yield
    finally:
        settings.allow_tf32 = before
        if named is not None:
            settings.fp32_precision = named


_earlier: dict[int, int] = {}  # peaks of a device before `peak_inside` reset them


def reset_peak_memory(device: str) -> None:
    """Start a new measurement of peak memory; only CUDA can."""
    name = resolve_device(device)
    if name != "cpu":
        _earlier.pop(_index(name), None)
        torch.cuda.reset_peak_memory_stats(name)


def peak_memory(device: str) -> int:
    """Bytes: the process's peak resident memory on a CPU, the tensors' peak since the reset on CUDA."""
    name = resolve_device(device)
    if name != "cpu":
        return max(torch.cuda.max_memory_allocated(name), _earlier.get(_index(name), 0))
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@contextmanager
def peak_inside(device: str) -> Iterator[Callable[[], int]]:
    """Give a function for the tensors' peak on CUDA since here, in bytes; `peak_memory` goes on counting the whole.

    On a CPU, whose peak cannot be reset, it is the process's.
    """
    name = resolve_device(device)
    if name == "cpu":
        yield lambda: peak_memory(name)
        return
    before = peak_memory(name)
    reset_peak_memory(name)
    _earlier[_index(name)] = before
    yield lambda: torch.cuda.max_memory_allocated(name)


@contextmanager
def measured(device: torch.device) -> Iterator[dict[str, float]]:
    """Give a dict that holds, once all is done, the wall clock's "seconds" and "peak_bytes" on the GPU, 0 on a CPU."""
    cost, began = dict[str, float](), time.perf_counter()
    with peak_inside(str(device)) as peak:
        yield cost
        synchronize(str(device))
        cost |= {"seconds": time.perf_counter() - began, "peak_bytes": 0.0 if device.type == "cpu" else float(peak())}


def _index(name: str) -> int:
    """Number of a CUDA device, "cuda" being the current one."""
    number = torch.device(name).index
    return torch.cuda.current_device() if number is None else number


def synchronize(device: str) -> None:
    """Wait for the GPU, so that a clock read afterwards is honest."""
    name = resolve_device(device)
    if name != "cpu":
        torch.cuda.synchronize(name)


def clock(like: Tensor) -> float:
    """Seconds of a clock, read once all work on the tensor's device is done."""
    if like.is_cuda:
        torch.cuda.synchronize(like.device)
    return time.perf_counter()
