"""Data files by name: a local folder first, then the cache, then the sources of the manifest in order.

Every file that leaves this module has the sha256 of its entry in manifest.toml (entries.py reads it), wherever it came
from (sources.py has the kinds of source). COMPRESSIBLE_DATA names the local folder, COMPRESSIBLE_CACHE the cache,
COMPRESSIBLE_MANIFEST a manifest in the place of the package's own, and COMPRESSIBLE_OFFLINE=1 forbids the network.
Files with terms that one has to agree to are downloaded only where COMPRESSIBLE_ACCEPT holds the terms' word.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

import filelock

from compressible.data.bounds import is_offline
from compressible.data.entries import DataError, DataSet, Entry, Terms, load_joined, load_manifest, load_sets
from compressible.data.joined import PREFIX, joined_name, read_joined
from compressible.data.sources import read, shared_archives
from compressible.runtime.checks import one_line, unknown, unmet
from compressible.runtime.paths import atomic_path, cache_dir

__all__ = [
    "DataError",
    "DataSet",
    "Entry",
    "Terms",
    "cached_path",
    "fetch",
    "fetch_all",
    "fetch_first",
    "find",
    "load_manifest",
    "load_sets",
    "sha256",
]

LOCK_SECONDS = 900


def sha256(path: str | Path) -> str:
    """Hexadecimal sha256 of a file; OSError if it cannot be read."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def fetch(name: str) -> Path:
    """Verified path of the file `name`; DataError with every place that was tried if it cannot be had."""
    return fetch_first([name])


def fetch_first(names: Iterable[str]) -> Path:
    """Verified path of the first of `names` to be had: a local one, else a cached one, else by its sources.

    Raises DataError once, naming every file, its size, what was tried and what to do.
    """
    entries = _select(names)
    if not entries:
        raise DataError("no data file was asked for, or the manifest has none for this data set")
    _expect_readers(entries)
    tried: dict[str, list[str]] = {entry.name: [] for entry in entries}
    for step in (_from_local, _from_cache, _from_sources):
        for entry in entries:
            found = step(entry, tried[entry.name])
            if found is not None:
                return found
    raise DataError(_failure(entries, tried))


def fetch_all(names: Iterable[str]) -> list[Path]:
    """Verified paths of all `names`, in order; an archive that holds several is downloaded once.

    Raises DataError for the first that cannot be had.
    """
    entries = _select(names)
    _expect_readers(entries)
    here = [path for entry in entries if (path := _here(entry))]
    if len(here) == len(entries):
        return here
    try:
        # One process fills the cache; the others wait, and then find all of it there.
        with _locked(cached_path(entries[0].name).with_name("group")), shared_archives():
            return [fetch(entry.name) for entry in entries]
    except (filelock.Timeout, OSError) as error:
        raise DataError(f"cannot fetch {', '.join(entry.name for entry in entries)}: {one_line(error)}") from error


def find(name: str) -> Path | None:
    """Verified path of the file `name` in the local folder or the cache, without any network; else None."""
    (entry,) = _select([name])
    return _here(entry)


def cached_path(name: str) -> Path:
    """Where the cache keeps (or would keep) the file `name`."""
    return cache_dir() / "data" / name


def _select(names: Iterable[str]) -> list[Entry]:
    known = load_manifest()
    names = list(names)
    for name in names:
        if name not in known:
            raise DataError(unknown("data file", name, known))
    return [known[name] for name in names]


def _expect_readers(entries: list[Entry]) -> None:
    """Raise DataError where what would read a file here is known to read it wrong."""
    for entry in entries:
        if entry.reader and (found := unmet(entry.reader)):
            told = f"{entry.name} needs {entry.reader}, since other versions read it wrong, and {found} is installed"
            raise DataError(f"{told}; what to do: pip install '{entry.reader}'")


def _here(entry: Entry) -> Path | None:
    return _from_local(entry, []) or _from_cache(entry, [])


def _from_local(entry: Entry, tried: list[str]) -> Path | None:
    folder = os.environ.get("COMPRESSIBLE_DATA")
    if not folder:
        tried.append("local folder: COMPRESSIBLE_DATA is not set")
        return None
    path = Path(folder).expanduser() / entry.name
    if not path.is_file():
        tried.append(f"local folder: no file {path}")
        return None
    try:
        _verify(path, entry)
    except OSError as error:  # a file of somebody else's, a disk that fails: the sources may still have it
        tried.append(f"local folder: cannot read {path}: {one_line(error)}")
        return None
    return path


def _from_cache(entry: Entry, tried: list[str]) -> Path | None:
    path = cached_path(entry.name)
    try:
        if not path.is_file():
            tried.append(f"cache: no file {path}")
        elif (found := sha256(path)) != entry.sha256:
            tried.append(f"cache: {path} is damaged (sha256 {found}, expected {entry.sha256})")
        else:
            return path
    except OSError as error:
        tried.append(f"cache: cannot read {path}: {one_line(error)}")
    return None


def _from_sources(entry: Entry, tried: list[str]) -> Path | None:
    if not entry.sources:
        tried.append("sources: none, this file is only read from a local folder")
    elif is_offline():
        tried.append(f"sources: not tried, COMPRESSIBLE_OFFLINE is {os.environ['COMPRESSIBLE_OFFLINE']}")
    elif entry.accept and entry.accept not in _accepted():
        tried.append(
            f"sources: not tried, since nobody has agreed to its terms ({entry.licence}): read {entry.address}, and "
            f"set COMPRESSIBLE_ACCEPT={entry.accept} if you agree"
        )
    else:
        path = cached_path(entry.name)
        try:
            with _locked(path):
                return _fill_cache(entry, path, tried)
        except filelock.Timeout:
            tried.append(f"cache: another process has held {path}.lock for {LOCK_SECONDS} s")
        except OSError as error:
            tried.append(f"cache: {one_line(error)}")
    return None


def _accepted() -> list[str]:
    """The words of the terms that the user has agreed to, which commas part."""
    return [word.strip() for word in os.environ.get("COMPRESSIBLE_ACCEPT", "").split(",")]


def _locked(path: Path) -> filelock.BaseFileLock:
    path.parent.mkdir(parents=True, exist_ok=True)
    return filelock.FileLock(f"{path}.lock", timeout=LOCK_SECONDS)


def _fill_cache(entry: Entry, path: Path, tried: list[str]) -> Path | None:
    # Another process may have fetched the file while this one waited for the lock.
    if _from_cache(entry, []) is not None:
        return path
    path.unlink(missing_ok=True)
    for source in entry.sources:
        try:
            with atomic_path(path) as temporary:
                if source.startswith(PREFIX):
                    read_joined(source, load_joined()[joined_name(source)], temporary, entry.size)
                else:
                    read(source, temporary, entry.size)
                _verify(temporary, entry)
            return path
        except Exception as error:  # one source failing, however it fails, must not stop the next
            tried.append(f"{source}: {one_line(error)}")
    return None


def _verify(path: Path, entry: Entry) -> None:
    found = sha256(path)
    if found != entry.sha256:
        raise DataError(
            f"not {entry.name}: sha256 {found} ({path.stat().st_size} bytes), "
            f"expected {entry.sha256} ({entry.size} bytes), of {path}"  # last, as a long one is cut
        )


def _failure(entries: list[Entry], tried: dict[str, list[str]]) -> str:
    lines = []
    for entry in entries:
        lines.append(f"cannot get {entry.name} ({entry.size / 1e6:.2f} MB), tried:")
        lines += [f"  - {reason}" for reason in tried[entry.name]]
    places = " or ".join(entry.name for entry in entries)
    lines.append(f"what to do: set COMPRESSIBLE_DATA to a folder that holds it as {places},")
    lines.append(f"or put it at {' or '.join(str(cached_path(entry.name)) for entry in entries)},")
    lines.append("or go on-line and run again (without COMPRESSIBLE_OFFLINE=1).")
    return "\n".join(lines)
