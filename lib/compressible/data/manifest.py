"""Data files by name: a local folder first, then the cache, then the sources of data/manifest.toml in order.

Every file that leaves this module has the sha256 of its manifest entry, wherever it came from (sources.py has
the kinds of source).
COMPRESSIBLE_DATA names the local folder, COMPRESSIBLE_CACHE the cache, and COMPRESSIBLE_OFFLINE=1 forbids the
network.
"""

from __future__ import annotations

import difflib
import hashlib
import os
import re
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path, PurePosixPath

import filelock

from compressible.data.sources import SourceError, reader, shared_archives
from compressible.runtime.paths import atomic_path, cache_dir, repository

LOCK_SECONDS = 900


class DataError(RuntimeError):
    """A data file, or the manifest that describes it, is missing, unreachable or not what it should be."""


@dataclass(frozen=True)
class Entry:
    """One data file: its name below a data folder, sha256, size in bytes, terms of use, sources (or none)."""

    name: str
    sha256: str
    size: int
    licence: str
    citation: str
    description: str
    sources: tuple[str, ...] = ()


@dataclass(frozen=True)
class DataSet:
    """What the files of one set must amount to: rows, users, items and the sha256 of the rows ("" if unknown)."""

    name: str
    rows: int
    users: int
    items: int
    licence: str
    citation: str
    sha256: str = ""


def load_manifest(path: str | Path | None = None) -> dict[str, Entry]:
    """Entries by name from `path` (default: data/manifest.toml); DataError if it is not valid."""
    tables = _read(path)
    owners = tables.get("terms", {}) | {name: vars(found) for name, found in load_sets(path).items()}
    return {
        name: _entry(name, table, owners.get(name.partition("/")[0], {}))
        for name, table in tables.get("files", {}).items()
    }


def load_sets(path: str | Path | None = None) -> dict[str, DataSet]:
    """Data sets by name from `path` (default: data/manifest.toml); DataError if it is not valid."""
    tables = _read(path).get("sets", {})
    return {name: _build(DataSet, name, table) for name, table in tables.items()}


def sha256(path: str | Path) -> str:
    """Hexadecimal sha256 of a file; OSError if it cannot be read."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def fetch(name: str, manifest: str | Path | None = None) -> Path:
    """Verified path of the file `name`; DataError with every place that was tried if it cannot be had."""
    return fetch_first([name], manifest)


def fetch_first(names: Iterable[str], manifest: str | Path | None = None) -> Path:
    """Verified path of the first of `names` to be had: a local one, else a cached one, else by its sources.

    Raises DataError once, naming every file, its size, what was tried and what to do.
    """
    entries = _select(names, manifest)
    if not entries:
        raise DataError("no data file was asked for, or the manifest has none for this data set")
    tried: dict[str, list[str]] = {entry.name: [] for entry in entries}
    for step in (_from_local, _from_cache, _from_sources):
        for entry in entries:
            found = step(entry, tried[entry.name])
            if found is not None:
                return found
    raise DataError(_failure(entries, tried))


def fetch_all(names: Iterable[str], manifest: str | Path | None = None) -> list[Path]:
    """Verified paths of all `names`, in order; an archive that holds several is downloaded once.

    Raises DataError for the first that cannot be had.
    """
    entries = _select(names, manifest)
    found = [_from_local(entry, []) or _from_cache(entry, []) for entry in entries]
    if all(found):
        return found
    try:
        # One process fills the cache; the others wait, and then find all of it there.
        with _locked(cached_path(entries[0].name).with_name("group")), shared_archives():
            return [fetch(entry.name, manifest) for entry in entries]
    except (filelock.Timeout, OSError) as error:
        raise DataError(f"cannot fetch {', '.join(entry.name for entry in entries)}: {_one_line(error)}") from error


def find(name: str, manifest: str | Path | None = None) -> Path | None:
    """Verified path of the file `name` in the local folder or the cache, without any network; else None."""
    (entry,) = _select([name], manifest)
    return _from_local(entry, []) or _from_cache(entry, [])


def cached_path(name: str) -> Path:
    """Where the cache keeps (or would keep) the file `name`."""
    return cache_dir() / "data" / name


def _read(path: str | Path | None) -> dict:
    path = Path(path) if path is not None else repository() / "data" / "manifest.toml"
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise DataError(f"cannot read the data manifest {path}: {error}") from error


def _entry(name: str, table: dict, owner: dict) -> Entry:
    inherited = {key: owner[key] for key in ("licence", "citation") if key in owner}
    entry = _build(Entry, name, inherited | table | {"sources": tuple(table.get("sources", ()))})
    parts = PurePosixPath(name).parts
    if not parts or ".." in parts or parts[0] == "/" or "\\" in name:
        raise DataError(f"data manifest: the name {name!r} must be a relative path without '..'")
    for source in entry.sources:
        try:
            reader(source)
        except SourceError as error:
            raise DataError(f"data manifest, {name!r}: {error}") from error
    return entry


def _build(kind: type, name: str, table: dict):
    """A dataclass from a manifest table, with every key and every value checked."""
    known = {field.name for field in fields(kind)} - {"name"}
    required = known - ({"sha256"} if kind is DataSet else {"sources"})
    if set(table) - known or required - set(table):
        raise DataError(f"data manifest, {name!r}: keys {sorted(table)}, expected {sorted(known)}")
    digest = table.get("sha256")
    if "sha256" in table and not re.fullmatch(r"[0-9a-f]{64}", str(digest)):
        raise DataError(f"data manifest, {name!r}: sha256 is {digest!r}, expected 64 hexadecimal digits")
    for key in known & {"size", "rows", "users", "items"}:
        if type(table[key]) is not int or table[key] < 1:
            raise DataError(f"data manifest, {name!r}: {key} is {table[key]!r}, expected a positive integer")
    return kind(name=name, **table)


def _select(names: Iterable[str], manifest: str | Path | None) -> list[Entry]:
    known = load_manifest(manifest)
    names = list(names)
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(str(name), known, n=1, cutoff=0.0)
            hint = f"; the closest known one is {close[0]!r}" if close else ""
            raise DataError(f"unknown data file {name!r}{hint} ({len(known)} in the manifest)")
    return [known[name] for name in names]


def _from_local(entry: Entry, tried: list[str]) -> Path | None:
    folder = os.environ.get("COMPRESSIBLE_DATA")
    if not folder:
        tried.append("local folder: COMPRESSIBLE_DATA is not set")
        return None
    path = Path(folder).expanduser() / entry.name
    if not path.is_file():
        tried.append(f"local folder: no file {path}")
        return None
    _verify(path, entry)
    return path


def _from_cache(entry: Entry, tried: list[str]) -> Path | None:
    path = cached_path(entry.name)
    if not path.is_file():
        tried.append(f"cache: no file {path}")
    elif (found := sha256(path)) != entry.sha256:
        tried.append(f"cache: {path} is damaged (sha256 {found}, expected {entry.sha256})")
    else:
        return path
    return None


def _from_sources(entry: Entry, tried: list[str]) -> Path | None:
    if not entry.sources:
        tried.append("sources: none, this file is only read from a local folder")
    elif os.environ.get("COMPRESSIBLE_OFFLINE") == "1":
        tried.append("sources: not tried, COMPRESSIBLE_OFFLINE is 1")
    else:
        path = cached_path(entry.name)
        try:
            with _locked(path):
                return _fill_cache(entry, path, tried)
        except filelock.Timeout:
            tried.append(f"cache: another process has held {path}.lock for {LOCK_SECONDS} s")
        except OSError as error:
            tried.append(f"cache: {_one_line(error)}")
    return None


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
                reader(source)(source, Path(temporary))
                _verify(Path(temporary), entry)
            return path
        except Exception as error:  # one source failing, however it fails, must not stop the next
            tried.append(f"{source}: {_one_line(error)}")
    return None


def _verify(path: Path, entry: Entry) -> None:
    found = sha256(path)
    if found != entry.sha256:
        raise DataError(
            f"{path} is not {entry.name}: sha256 {found} ({path.stat().st_size} bytes), "
            f"expected {entry.sha256} ({entry.size} bytes)"
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


def _one_line(error: BaseException, limit: int = 300) -> str:
    text = " ".join(str(error).split()) or "no message"
    return f"{type(error).__name__}: {text if len(text) <= limit else text[:limit] + '...'}"
