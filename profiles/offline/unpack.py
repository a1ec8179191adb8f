"""Joins on an offline host what pack.py cut, into $COMPRESSIBLE_CACHE/data: Python alone is needed.

    python profiles/offline/unpack.py .gpu/part00 .gpu/part03      # as they come, in any order and in several calls

A file appears there, under its name in the manifest, once its last chunk has come and its sha256 is right.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import tomllib
from pathlib import Path
from urllib.parse import unquote

MANIFEST = Path(__file__).parents[2] / "lib/compressible/data/manifest.toml"


def unpack(part: Path, cache: Path, digests: dict[str, str]) -> list[str]:
    """Keep the chunks of a part, and return the names of the files that are whole now."""
    chunks, done = cache / "chunks", []
    chunks.mkdir(parents=True, exist_ok=True)
    for file in _chunks(part, digests):
        # Whole or not at all: another call may join what is here at any time, and this one may be ended at any time.
        half = chunks / f".{file.name}.{os.getpid()}"
        shutil.copyfile(file, half)
        half.rename(chunks / file.name)
    for stem, count in {tuple(file.name.rsplit(".", 2)[::2]) for file in _chunks(chunks, digests)}:
        have = [chunks / f"{stem}.{number}.{count}" for number in range(int(count))]
        if all(chunk.is_file() for chunk in have):
            _join(have, cache / "data" / unquote(stem), digests[unquote(stem)])
            done.append(unquote(stem))
    return sorted(done)


def _chunks(folder: Path, digests: dict[str, str]) -> list[Path]:
    """The chunks in a folder, of files that the manifest has; what is hidden is none. SystemExit for anything else."""
    if not folder.is_dir():
        raise SystemExit(f"{folder} is no folder, expected a part as pack.py makes it")
    found = [file for file in sorted(folder.iterdir()) if not file.name.startswith(".")]
    for file in found:
        stem, *numbers = file.name.rsplit(".", 2)
        if unquote(stem) not in digests or len(numbers) < 2 or not all(each.isdecimal() for each in numbers):
            raise SystemExit(f"{file} is no chunk of a file of the manifest that is here, NAME.NUMBER.COUNT")
    return found


def _join(chunks: list[Path], place: Path, expected: str) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    half = place.with_name(f".{place.name}.part")
    with half.open("wb") as out:
        for chunk in chunks:
            out.write(chunk.read_bytes())
    with half.open("rb") as made:
        found = hashlib.file_digest(made, "sha256").hexdigest()
    if found != expected:
        for file in (half, *chunks):  # which would stop all later calls, too
            file.unlink()
        raise SystemExit(f"{place.name} has sha256 {found[:12]}, expected {expected[:12]}: bring its parts once more")
    half.rename(place)
    for chunk in chunks:
        chunk.unlink()


def main() -> None:
    """Unpack the parts that are named."""
    cache = os.environ.get("COMPRESSIBLE_CACHE")
    if not cache or len(sys.argv) < 2:
        raise SystemExit("expected COMPRESSIBLE_CACHE to name a folder, and the folders of parts")
    files = tomllib.loads((Path(os.environ.get("COMPRESSIBLE_MANIFEST") or MANIFEST)).read_text())["files"]
    digests = {name: entry["sha256"] for name, entry in files.items()}
    for part in sys.argv[1:]:
        for name in unpack(Path(part), Path(cache), digests):
            print(f"whole: {name}")


if __name__ == "__main__":
    main()
