"""Whether Jupyter has the kernel that is asked for, and whether it can run these notebooks."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from compressible.companion.notebooks import BatchError
from compressible.runtime import checks

NEEDED = ("ipykernel", "torch", "matplotlib", "seaborn")  # what each notebook imports, itself or by the library
# Jupyter takes the Python that runs it for these names.
OWN = ("python", f"python{sys.version_info.major}", f"python{sys.version_info.major}.{sys.version_info.minor}")
ASKS = "import sys, importlib.util as u; print(*[name for name in sys.argv[1:] if u.find_spec(name) is None])"
ANSWERS = 60  # seconds until another Python has said what it lacks
WAY = "`{python} -m ipykernel install --sys-prefix` puts this environment's own python3 first, --kernel names another"


def check_kernel(name: str) -> None:
    """Raise BatchError, with what to do, where a kernel is missing, of another language, or lacks packages."""
    from jupyter_client.kernelspec import KernelSpecManager

    known = KernelSpecManager().find_kernel_specs()
    if name not in known:
        way = f"; {_way()}" if "python3" not in known else ""
        raise BatchError(f"no Jupyter kernel {checks.shown(name)}{checks.closest(name, known)}{way}")
    try:
        spec = KernelSpecManager().get_kernel_spec(name)
    except Exception as error:  # a file that is no JSON, or lacks what it must have
        raise BatchError(
            f"kernel {name!r} in {known[name]} cannot be read: {checks.one_line(error)}; {_way()}"
        ) from error
    if reason := _unfit(spec):
        raise BatchError(f"kernel {name!r} in {known[name]} {reason}; {_way()}")


def _way() -> str:
    return WAY.format(python=sys.executable)


def _unfit(spec: Any) -> str:
    """Why a kernel cannot run the notebooks; "" where it can."""
    if spec.language.lower() != "python":
        return f"is for {checks.shown(spec.language)}, expected python"
    program = spec.argv[0] if spec.argv else ""
    if program in OWN or Path(program) == Path(sys.executable):
        return ""
    found = shutil.which(program)
    if not found:
        return f"starts {checks.shown(program)}, which is not there (any more)"
    if not re.match(r"python|pypy", os.path.basename(program)):
        return ""  # a script that starts one, of which nobody knows which
    return _lacking(found)


def _lacking(python: str) -> str:
    try:
        done = subprocess.run(
            [python, "-c", ASKS, *NEEDED], capture_output=True, text=True, timeout=ANSWERS, check=False
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"starts {python}, which does not run: {checks.one_line(error)}"
    if done.returncode:
        return f"starts {python}, which does not run: exit status {done.returncode}"
    return f"starts {python}, which lacks {', '.join(done.stdout.split())}" if done.stdout.split() else ""
