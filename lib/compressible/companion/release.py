"""A release: source archive, wheel, site and an archive of the records, with checksums, whole or not at all.

The packages and the records are of the files of HEAD, exported into a folder that goes away, and of nothing else that
lies in the checkout; the site is built of the checkout, in which all files must be committed.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

from compressible import __version__
from compressible.companion import git, pins, site
from compressible.runtime import paths

SUMS = "SHA256SUMS"
# What the records need beside them to be read and judged, and how to cite them.
WITH_RECORDS = ("figures", "data", "notebooks", "CLAIMS.md", "GALLERY.md", "CHANGELOG.md", "CITATION.bib", "LICENSE")
PINS = "constraints*.txt"


class ReleaseError(RuntimeError):
    """A checkout that cannot be released, or a part that could not be made; nothing was left behind."""


def build(out: Path | None = None) -> Path:
    """Make all files of a release in a new folder, `dist/<version>` by default, and return it.

    Raises:
        ReleaseError: Files are not committed, the folder is there already, or a part cannot be made.
        GitError: Git does not say what is committed.
    """
    root = paths.repository()
    out = root / "dist" / __version__ if out is None else out
    if out.exists():
        raise ReleaseError(f"{out} is there already, expected none: a release is made once; remove it to make it again")
    if changed := git.text("status", "--porcelain", seconds=None).splitlines():
        raise ReleaseError(f"{len(changed)} files are not committed, {changed[0].strip()} for one; expected none")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".release-", dir=out.parent) as folder:
        tree, made = Path(folder, "tree"), Path(folder, "made")
        made.mkdir()
        git.export(tree, "HEAD")
        _cite(tree)
        _packages(tree, made)
        _archive(made / f"compressible-dynamics-records-{__version__}.tar.gz", tree, _records(tree))
        pages = site.build(Path(folder, "site")).parent
        _archive(made / f"compressible-dynamics-site-{__version__}.tar.gz", pages, [pages])
        for name in ("CITATION.cff", ".zenodo.json"):
            shutil.copy(tree / name, made)
        paths.write_atomic(made / SUMS, sums(made))
        made.rename(out)
    return out


def sums(folder: Path) -> str:
    """Lines of SHA-256 and name as sha256sum writes and checks them, of all files of a folder but that of the lines."""
    files = sorted(file for file in folder.iterdir() if file.name != SUMS)
    return "".join(f"{pins.sha256(file.read_bytes())}  {file.name}\n" for file in files)


def _cite(tree: Path) -> None:
    """Say in the exported CITATION.cff which version this is, and of which day and commit."""
    day, commit = git.text("show", "-s", "--format=%cs %H", "HEAD").split()
    with (tree / "CITATION.cff").open("a", encoding="utf-8") as file:
        file.write(f'version: "{__version__}"\ndate-released: "{day}"\ncommit: {commit}\n')


def _packages(tree: Path, made: Path) -> None:
    """Source archive and, from it, the wheel."""
    command = [sys.executable, "-m", "build", "--outdir", str(made), str(tree)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode:
        told = (ended.stderr or ended.stdout).strip().splitlines()[-3:]
        raise ReleaseError(f"python -m build failed: {' '.join(told)}")


def _records(tree: Path) -> list[Path]:
    return [tree / name for name in WITH_RECORDS] + sorted(tree.glob(PINS)) + [tree / "CITATION.cff"]


def _archive(target: Path, root: Path, parts: Iterable[Path]) -> None:
    """A .tar.gz of files and folders below one folder of the archive's name, owned by nobody."""

    def plain(member: tarfile.TarInfo) -> tarfile.TarInfo:
        member.uid = member.gid = 0
        member.uname = member.gname = ""
        return member

    name = target.name.removesuffix(".tar.gz")
    with tarfile.open(target, "w:gz") as archive:
        for part in parts:
            archive.add(part, Path(name, part.relative_to(root)), filter=plain)


def report(folder: Path, began: float) -> str:
    """What a release consists of, a line a file."""
    files = sorted(folder.iterdir())
    lines = [f"{file.stat().st_size / 1e6:9.2f} MB  {file.name}" for file in files]
    return "\n".join([*lines, f"release: {folder}, made in {time.perf_counter() - began:.0f} s"])
