"""Folders beside the figures in which a job makes its files: they go away with it, or when the next one starts."""

from __future__ import annotations

import contextlib
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from compressible.runtime import process_identity

FOLDER = re.compile(rf"\.staging-({process_identity.PATTERN})-\w+")


@contextlib.contextmanager
def folder_in(root: Path) -> Iterator[Path]:
    """A new folder in `root`, from which files move to it in one step; it goes away afterwards.

    So do those of jobs that were killed and could not clear up.
    """
    forget_dead(root)
    prefix = f".staging-{process_identity.identity()}-"
    staging = Path(tempfile.mkdtemp(prefix=prefix, dir=root.resolve()))
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def forget_dead(root: Path) -> None:
    """Remove the folders in `root` whose process was one of this very system and is no more; all others stay."""
    for folder in root.glob(".staging-*"):
        owner = FOLDER.fullmatch(folder.name)
        if owner and process_identity.is_gone(owner[1]):
            shutil.rmtree(folder, ignore_errors=True)
