"""The code of this checkout's commits, and whether what a notebook reaches of it is another than a record's.

Of a commit, git gives the tree once in a process, in a folder that goes away with it.
"""

from __future__ import annotations

import atexit
import re
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from compressible.companion import git
from compressible.companion.library import ROOT, computing_sources, digest_of, notebook_digest
from compressible.companion.parameter_cells import written
from compressible.companion.reached import reached_digest, reached_sources, syntax

PACKAGE = Path("lib", "compressible")  # where a tree has it
_COMMIT = re.compile("[0-9a-f]{40}|[0-9a-f]{64}")  # nothing that git would take for an option, say


def lies_behind(commit: str) -> bool:
    """Whether a commit is an ancestor of HEAD; not where there is no git."""
    if not _COMMIT.fullmatch(commit):
        return False
    try:
        git.output("merge-base", "--is-ancestor", commit, "HEAD")
    except git.GitError:
        return False
    return True


def history() -> str:
    """Why a commit may lie behind HEAD unseen: the clone is shallow, or git does not answer; "" where it cannot."""
    try:
        shallow = git.text("rev-parse", "--is-shallow-repository") == "true"
    except git.GitError as error:
        return f"is not to be looked up: {error}"
    return "is not in this shallow clone, of which `git fetch --unshallow` brings the rest" if shallow else ""


@lru_cache
def library_of(commit: str) -> str | None:
    """`library_digest` of a commit; None where it has no library, or git does not give it."""
    root = _tree(commit) / PACKAGE
    files = computing_sources(root)
    return digest_of(files, root, syntax) if files else None


def notebook_of(commit: str, id: str) -> str | None:
    """The digest of a notebook's code at a commit; None where there is none."""
    return notebook_digest(_tree(commit) / "notebooks" / f"{id}.ipynb")


def values_of(id: str) -> dict[str, Any]:
    """What a notebook's cell of parameters says in HEAD; {} where git does not give it."""
    try:
        return written(git.output("show", f"HEAD:./notebooks/{id}.ipynb", seconds=20))
    except git.GitError:
        return {}


def reached_at(commit: str, id: str) -> str | None:
    """`reached_digest` of a notebook at a commit; None where there is none."""
    return reached_digest(_tree(commit) / "notebooks" / f"{id}.ipynb", _tree(commit) / PACKAGE)


def reaches_the_same(record: Mapping[str, Any], notebook: Path) -> bool:
    """Whether all that a notebook can reach of the library is as it was when a record's numbers were computed.

    A record says it by its digest `reached`. For one without, its commit does, if it lies behind HEAD and has the very
    library and notebook that the record names; else, or without git, nothing tells it.
    """
    if told := record.get("reached"):
        return bool(told == reached_digest(notebook, ROOT))
    commit, id = str(record.get("commit")), f"{notebook.parent.name}/{notebook.stem}"
    if not lies_behind(commit) or not _has_files_of(commit, notebook):
        return False
    names = (record.get("library"), record.get("computed_in") or record.get("notebook"))
    same = names == (library_of(commit), notebook_of(commit, id))
    return same and reached_at(commit, id) == reached_digest(notebook, ROOT)


def _has_files_of(commit: str, notebook: Path) -> bool:
    """Whether a commit has all that the notebook reaches today; where not, which is told soon, no digest is needed."""
    pairs = ((file, _tree(commit) / PACKAGE / file.relative_to(ROOT)) for file in reached_sources(notebook, ROOT))
    return all(other.is_file() and _same(other.read_text("utf-8"), file.read_text("utf-8")) for file, other in pairs)


def _same(one: str, other: str) -> bool:
    return one == other or syntax(one) == syntax(other)


@lru_cache
def _tree(commit: str) -> Path:
    """A folder with the library and the notebooks of a commit; an empty one where git does not give them."""
    folder = tempfile.mkdtemp(prefix="compressible-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    if _COMMIT.fullmatch(commit):
        with suppress(git.GitError):
            git.export(folder, commit, "lib/compressible", "notebooks")
    return Path(folder)
