"""What a number may depend on besides its parameters: code, versions, device, memory, git."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from typing import Any

from compressible.companion import git, pins
from compressible.companion.library import library_digest

PACKAGES = (
    "torch", "numpy", "scipy", "pandas", "scikit-learn", "matplotlib", "safetensors", "transformers",
    "peft", "papermill", "nbclient", "triton",
)  # fmt: skip


def environment() -> dict[str, Any]:
    """Versions of the packages that matter and are installed, which pinned environment they are, CPU and threads."""
    from compressible.runtime.devices import cpu_model  # imports PyTorch, seconds that `list` can do without

    return {
        "cpu": cpu_model(),
        "platform": f"{platform.system()} {platform.machine()}",
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
        "versions": _versions(),
        "environment": pins.state(PACKAGES),
    }


def git_state() -> dict[str, Any]:
    """`commit` and `dirty` of the checkout (figures aside, which every run rewrites); None where unknown.

    COMPRESSIBLE_COMMIT ("<hash>" or "<hash>+dirty") speaks for a checkout that travelled without its .git.
    """
    if told := os.environ.get("COMPRESSIBLE_COMMIT"):
        commit, _, dirty = told.partition("+")
        return {"commit": commit, "dirty": dirty == "dirty"}
    try:
        commit = git.text("rev-parse", "HEAD", seconds=20)
        changed = git.text("status", "--porcelain", "--", ".", ":(exclude)figures", seconds=20)
    except git.GitError:
        return {"commit": None, "dirty": None}
    return {"commit": commit, "dirty": bool(changed)}


def _versions() -> dict[str, str]:
    from compressible import __version__

    found = {name: version for name in PACKAGES if (version := _version(name))}
    return {"python": platform.python_version(), "compressible": __version__, **found}


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


# Read on import: a kernel that lives on while a file is edited still runs the code that it read.
LIBRARY = library_digest()
