"""Downloads that end: no more bytes than a file has, and no longer than a slow line needs for them."""

from __future__ import annotations

import os
import resource
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from compressible.runtime.progress import progress

CONNECT_SECONDS, READ_SECONDS = 10, 60  # until a server is reached, and between two of its answers
LEAST_SECONDS, SLOWEST = 120, 50_000  # bytes a second, of which a file's time follows
LARGEST = 20_000_000_000  # bytes, of a file of which nobody says how large it is
BESIDE = 1_000_000_000  # bytes that an archive may hold beside the member that is wanted
CHUNK, MEGABYTE = 1 << 16, 1_000_000


class SourceError(RuntimeError):
    """A source did not give the file."""


@dataclass(frozen=True)
class Bound:
    """How many bytes may come, and until when by time.monotonic."""

    size: int
    seconds: float
    until: float

    def check(self, came: int) -> None:
        """Raise SourceError where too many bytes came, or too slowly."""
        if came > self.size:
            raise SourceError(f"more than the {self.size} bytes that were expected")
        if time.monotonic() > self.until:
            raise SourceError(f"{came} bytes in {self.seconds:.0f} s, expected {self.size} bytes by then")


def bound(size: int, seconds: float | None = None) -> Bound:
    """The bound of a file of `size` bytes that begins to come now: at 50 kB a second, and two minutes in any case."""
    seconds = max(LEAST_SECONDS, size / SLOWEST) if seconds is None else seconds
    return Bound(size, seconds, time.monotonic() + seconds)


class Readable(Protocol):
    """What gives bytes, up to a number of them."""

    def read(self, size: int, /) -> bytes:
        """The next bytes, none at the end."""


def copy(stream: Readable, path: Path, limit: Bound, tell: Callable[[int], Any] = int) -> None:
    """Write what a stream gives to `path`, telling `tell` the bytes of each piece; SourceError beyond the bound."""
    take, came = (
        getattr(stream, "read1", stream.read),
        0,
    )  # read1 gives what is there rather than wait for a whole chunk
    with path.open("wb") as out:
        while chunk := take(CHUNK):
            came += len(chunk)
            limit.check(came)
            out.write(chunk)
            tell(len(chunk))


def is_offline() -> bool:
    """Whether COMPRESSIBLE_OFFLINE forbids the network: by 1, and by whatever else is no "no"."""
    return os.environ.get("COMPRESSIBLE_OFFLINE", "").strip().lower() not in ("", "0", "false", "no", "off")


def expect_online() -> None:
    """Raise SourceError where the network is forbidden: all of it, the hub as well, comes through here."""
    if is_offline():
        raise SourceError(f"not tried, COMPRESSIBLE_OFFLINE is {os.environ['COMPRESSIBLE_OFFLINE']}")


def download(url: str, path: Path, limit: Bound, headers: Mapping[str, str] | None = None) -> None:
    """Write the file at an address to `path`; SourceError, or an error of requests', if it does not come in bounds."""
    import requests

    expect_online()
    waits = (CONNECT_SECONDS, READ_SECONDS)
    with closing(requests.get(url, stream=True, timeout=waits, headers=dict(headers or {}))) as answer:
        answer.raise_for_status()
        told = int(answer.headers.get("Content-Length", 0))
        if told > limit.size:
            raise SourceError(f"the server offers {told} bytes, expected {limit.size}")
        answer.raw.decode_content = True  # a file that was packed for the way only
        with progress((told or limit.size) // MEGABYTE, f"MB of {url.rpartition('/')[2][:40]}") as bar:
            copy(answer.raw, path, limit, lambda came: bar.update(came / MEGABYTE))
        if "Content-Encoding" not in answer.headers and path.stat().st_size < told:
            raise SourceError(f"the connection ended after {path.stat().st_size} of {told} bytes")


def command(
    call: Sequence[str], size: int, seconds: float, cwd: Path | None = None, beside: int | None = None
) -> tuple[int, str]:
    """Run a program that downloads an archive with a member of `size` bytes: none of its files grows far beyond.

    Returns its exit status and what it wrote to stderr. Raises SourceError where it takes longer than `seconds`.
    `beside` says how many bytes there may be beside the member, BESIDE if it is not given.
    """
    expect_online()
    with subprocess.Popen(
        call, cwd=cwd, text=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    ) as process:
        if hasattr(resource, "prlimit"):  # Linux
            most = 2 * size + (BESIDE if beside is None else beside)
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (most, most))
        try:
            told = process.communicate(timeout=seconds)[1]
            return process.returncode, told
        except subprocess.TimeoutExpired:
            shown = " ".join(part for part in call[:4] if "\n" not in part)
            raise SourceError(f"{shown} ... took longer than {seconds:.0f} s") from None
        finally:
            process.kill()  # after Ctrl-C, too, it would go on by itself; one that has ended does not notice
