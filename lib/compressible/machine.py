"""What a number may depend on besides its parameters: code, versions, device, memory, git."""

from __future__ import annotations

import os
import platform
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from . import paths
from .library import library_digest

PACKAGES = (
    "torch", "numpy", "scipy", "pandas", "scikit-learn", "matplotlib", "safetensors", "transformers",
    "peft", "papermill", "nbclient", "triton",
)  # fmt: skip
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


def environment() -> dict[str, Any]:
    """Versions of the packages that matter and are installed, the CPU and the thread settings."""
    return {
        "cpu": cpu_model(),
        "platform": f"{platform.system()} {platform.machine()}",
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
        "versions": _versions(),
    }


def git_state() -> dict[str, Any]:
    """`commit` and `dirty` of the checkout (figures aside, which every run rewrites); None where unknown.

    COMPRESSIBLE_COMMIT ("<hash>" or "<hash>+dirty") speaks for a checkout that travelled without its .git.
    """
    if told := os.environ.get("COMPRESSIBLE_COMMIT"):
        commit, _, dirty = told.partition("+")
        return {"commit": commit, "dirty": dirty == "dirty"}
    try:
        commit = _git("rev-parse", "HEAD")
        changed = _git("status", "--porcelain", "--", ".", ":(exclude)figures")
    except (OSError, subprocess.SubprocessError):
        return {"commit": None, "dirty": None}
    return {"commit": commit, "dirty": bool(changed)}


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


def _versions() -> dict[str, str]:
    from . import __version__

    found = {name: version for name in PACKAGES if (version := _version(name))}
    return {"python": platform.python_version(), "compressible": __version__, **found}


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(paths.repository()), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()


# Read on import: a kernel that lives on while a file is edited still runs the code that it read.
LIBRARY = library_digest()
