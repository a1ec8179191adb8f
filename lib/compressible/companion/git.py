"""What git says of the checkout that this is, and the files of its commits."""

from __future__ import annotations

import io
import os
import subprocess
import zipfile

from compressible.runtime import paths
from compressible.runtime.checks import one_line


class GitError(RuntimeError):
    """Git is not here, this is no checkout of it, or it refuses."""


def output(*arguments: str, seconds: float | None = 60) -> bytes:
    """What git says in the repository's folder. Raises GitError, in a line, where it says nothing, or takes longer."""
    try:
        command = ["git", "-C", str(paths.repository()), *arguments]
        return subprocess.run(command, capture_output=True, check=True, timeout=seconds).stdout
    except subprocess.CalledProcessError as error:
        said = " ".join(error.stderr.decode(errors="replace").split()) or f"exit status {error.returncode}"
        raise GitError(f"git {arguments[0]}: {said}") from error
    except (OSError, subprocess.SubprocessError) as error:
        raise GitError(f"git {arguments[0]}: {one_line(error)}") from error


def text(*arguments: str, seconds: float | None = 60) -> str:
    """The same as text, without space around it."""
    return output(*arguments, seconds=seconds).decode(errors="replace").strip()


def export(folder: str | os.PathLike[str], commit: str, *parts: str) -> None:
    """Put the files of a commit into a folder: all, or those of its `parts`. Raises GitError where it has none."""
    if not commit or commit.startswith("-"):  # an option, by which git would write into a file, say
        raise GitError(f"commit is {commit!r}, expected one as git names it")
    content = output("archive", "--format=zip", commit, *parts, seconds=None)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        archive.extractall(folder)
