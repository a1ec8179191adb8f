"""Archives of a size for the way back from an offline host: what is published of figures, and what jobs said."""

from __future__ import annotations

import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path

SKIPPED = re.compile(r"(^|/)(executed|failed|\.[^/]*)(/|$)")  # of folders of figures: what is not published


def collect(out: Path, folders: Sequence[Path], lanes: Path, size: float) -> list[Path]:
    """Write archives of at most about `size` MB of all published files in the folders, and the logs of the lanes.

    Returns:
        The archives. A folder, such as the cache's, is packed under its place relative to the current one. Those of
        an earlier call go: unpacked after these, what they hold would take the place of what is newer.

    Raises:
        SystemExit: a folder is none.
    """
    if absent := [str(folder) for folder in folders if not folder.is_dir()]:
        raise SystemExit(f"{', '.join(absent)} is no folder, expected folders of figures")
    out.mkdir(parents=True, exist_ok=True)
    files = [file for folder in folders for file in sorted(folder.rglob("*")) if file.is_file()]
    files = [file for file in files if not SKIPPED.search(file.as_posix())]
    files += [*sorted(lanes.glob("ended/*.json")), *sorted(lanes.glob("logs/*"))]
    made: list[Path] = []
    for number, part in enumerate(_parts(files, size * 1e6)):
        made.append(out / f"collected{number}.tar.gz")
        half = out / f".{made[-1].name}"  # a call may be ended at any time, and half an archive looks like one
        with tarfile.open(half, "w:gz") as archive:
            for file in part:
                inside = os.path.relpath(file, lanes) if lanes in file.parents else os.path.relpath(file)
                archive.add(file, arcname=inside.replace("../", ""))
        half.rename(made[-1])
    for old in set(out.glob("collected*.tar.gz")) - set(made):
        old.unlink()
    return made


def _parts(files: Sequence[Path], size: float) -> Iterator[list[Path]]:
    part, held = list[Path](), 0.0
    for file in files:
        own = file.stat().st_size
        if part and held + own > size:
            yield part
            part, held = [], 0.0
        part.append(file)
        held += own
    if part:
        yield part
