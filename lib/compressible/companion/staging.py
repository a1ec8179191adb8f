"""Folders beside the figures in which a job makes its files: they go away with it, or when the next one starts."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

BOOT, TABLE = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")


@contextlib.contextmanager
def folder_in(root: Path) -> Iterator[Path]:
    """A new folder in `root`, from which files move to it in one step; it goes away afterwards.

    So do those of jobs that were killed and could not clear up.
    """
    forget_dead(root)
    owner = f"{system() or 'x'}-{os.getpid()}"
    staging = Path(tempfile.mkdtemp(prefix=f".staging-{owner}-", dir=root.resolve()))
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def forget_dead(root: Path) -> None:
    """Remove the folders in `root` whose process was one of this very system and is no more; all others stay.

    A folder may be a live job's on another host, in another container, or of before a restart: these have other names.
    """
    here = system()
    if not here:
        return
    for folder in root.glob(f".staging-{here}-*"):
        owner = re.fullmatch(rf"\.staging-{here}-(\d+)-\w+", folder.name)
        if owner and not _is_alive(int(owner[1])):
            shutil.rmtree(folder, ignore_errors=True)


def system() -> str:
    """Names this host, its boot and its table of processes, within which a number means one process; "" if unknown."""
    try:
        told = f"{platform.node()} {BOOT.read_text().strip()} {os.readlink(TABLE)}"
    except OSError:
        return ""
    return hashlib.sha256(told.encode()).hexdigest()[:16]


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):  # someone else's, or no number of a process: not ours to judge
        return True
    return True
