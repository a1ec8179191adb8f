"""MathJax for a site that asks no one else: one file of its package, by npm, with a digest that is checked."""

from __future__ import annotations

import contextlib
import hashlib
import subprocess
import tarfile
import tempfile
from pathlib import Path

from compressible.data import bounds
from compressible.runtime import checks, paths

VERSION = "3.2.2"  # Apache-2.0
SHA256 = "d4295dc33744836935c1399feece5159577b34c5c8ffb9f1c6324cd82e03a882"
MEMBER = "package/es5/tex-svg.js"
SECONDS = 60  # a build goes on without formulas rather than wait


def fetch(target: Path) -> str:
    """Put MathJax's file at `target`, from the cache or by npm; returns why it could not be had, else ""."""
    kept = paths.cache_dir() / "site" / f"mathjax-{VERSION}-tex-svg.js"
    try:
        content = kept.read_bytes() if kept.is_file() and _digest(kept.read_bytes()) == SHA256 else _packed()
    except (OSError, ValueError, KeyError, tarfile.TarError, subprocess.SubprocessError, bounds.SourceError) as error:
        return checks.one_line(error)
    with contextlib.suppress(OSError):  # a cache that cannot be written costs the next build a download
        paths.write_atomic(kept, content)
    paths.write_atomic(target, content)
    return ""


def _packed() -> bytes:
    """The file out of the package as npm gives it. Raises ValueError where it is another than the one we know."""
    bounds.expect_online()
    with tempfile.TemporaryDirectory() as folder:
        command = ["npm", "pack", f"mathjax@{VERSION}", "--silent", "--pack-destination", folder]
        subprocess.run(command, check=True, capture_output=True, timeout=SECONDS, cwd=folder)
        (archive,) = Path(folder).glob("*.tgz")
        with tarfile.open(archive) as members:
            member = members.extractfile(MEMBER)
            content = member.read() if member else b""
    if (found := _digest(content)) != SHA256:
        raise ValueError(f"{MEMBER} of mathjax {VERSION} has the sha256 {found}, expected {SHA256}")
    return content


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
