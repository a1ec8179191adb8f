"""Which sources that compute a notebook can reach by imports, and their digest, by which `freshness.state` tells stale.

Never too few: what imports.py cannot tell, or what is not where it is asked for, makes it all sources. Companion files
are gone through, since they import some that compute, and are not counted, as nowhere.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from compressible.companion.imports import CELLS, MODULE, PACKAGE, TOP, Asked, asked
from compressible.companion.library import ROOT, computing_sources, digest_of, normal_form, notebook_sources, parsed

_TABLES = ("_HOME", "_MODULES")  # by which the package's own __init__ finds what is asked of it
_OWN = frozenset({"__version__", "__name__", "__doc__", "__file__", "__path__", "__all__"})  # imports nothing
syntax = lru_cache(1024)(normal_form)  # of two trees, most files are the same


class _Tree(NamedTuple):
    """The modules below a root, each with its file, None for a folder without one; where the package's names are."""

    files: Mapping[str, Path | None]
    homes: Mapping[str, tuple[str, ...]]


def reached_sources(notebook: Path, root: Path = ROOT) -> list[Path]:
    """The computing sources that a notebook's code can reach, in the order of all; all where it cannot be told.

    Args:
        notebook: File of the notebook, of which only the code cells count.
        root: Folder of the package `compressible`.

    Example:
        >>> cell = {"cell_type": "code", "source": "from compressible.runtime import checks, devices"}
        >>> import json, tempfile
        >>> with tempfile.NamedTemporaryFile("w", suffix=".ipynb") as file:
        ...     print(json.dump({"cells": [cell]}, file), file.flush())
        ...     [source for source in reached_sources(Path(file.name)) if source.match("runtime/devices.py")] != []
        None None
        True
    """
    code = "\n".join(notebook_sources(notebook, "code"))
    modules, every = _reached(_tree(root), asked(code, CELLS)), computing_sources(root)
    return [file for file in every if file in modules] or every


def reached_digest(notebook: Path, root: Path = ROOT) -> str | None:
    """sha256 of the syntax of these sources, as `library_digest` of all; None where there is no such notebook."""
    return digest_of(reached_sources(notebook, root), root, syntax) if notebook.is_file() else None


def _tree(root: Path) -> _Tree:
    files: dict[str, Path | None] = {}
    for file in root.rglob("*.py"):
        *parents, last = (PACKAGE, *file.relative_to(root).with_suffix("").parts)
        for k in range(1, len(parents) + 1):
            files.setdefault(".".join(parents[:k]), None)
        name = ".".join(parents if last == "__init__" else [*parents, last])
        if last == "__init__" or not files.get(name):  # a package goes before a module of its name
            files[name] = file
    top = files.get(PACKAGE)
    return _Tree(files, _homes(top.read_text(encoding="utf-8")) if top else {})


@lru_cache(16)
def _homes(source: str) -> dict[str, tuple[str, ...]]:
    """The modules of each name of the package, by its tables; a table that is not written out has none."""
    found: dict[str, tuple[str, ...]] = {}
    if asked(source, TOP) is None:
        return found
    for node in parsed(source).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if any(isinstance(each, ast.Name) and each.id in _TABLES for each in targets):
            try:
                table = dict(ast.literal_eval(node.value))  # type: ignore[attr-defined]
            except (ValueError, TypeError):
                continue
            found |= {name: (*found.get(name, ()), f"{PACKAGE}.{home}") for name, home in table.items()}
    return found


def _reached(tree: _Tree, first: Iterable[Asked] | None) -> set[Path]:
    """The files of all modules that are imported, directly or by others; none where that cannot be told."""
    seen, waiting = set[str](), _modules(tree, first, "")
    while waiting:
        name = waiting.pop()
        if name == "":
            return set()
        seen.add(name)
        if file := tree.files[name]:
            kind = TOP if name == PACKAGE else MODULE
            waiting |= _modules(tree, asked(file.read_text(encoding="utf-8"), kind), name) - seen
    return {file for name in seen if (file := tree.files[name])}


def _modules(tree: _Tree, wanted: Iterable[Asked] | None, importer: str) -> set[str]:
    """Names of the modules that are asked for, with the packages around them; "" among them for what cannot be told."""
    if wanted is None:
        return {""}
    found = {name for each in wanted for name in _resolved(tree, each, importer)}
    return {".".join(parts[:k]) for parts in (name.split(".") for name in found) for k in range(1, len(parts) + 1)}


def _resolved(tree: _Tree, each: Asked, importer: str) -> Iterable[str]:
    """The modules that one asks for; [""] where they are not there, or are not to be told."""
    place = _absolute(tree, each, importer)
    if each.how == "text":
        return [name for name in [_longest(tree, place)] if name]
    if place.partition(".")[0] != PACKAGE and not each.level:
        return []
    if place not in tree.files:
        return [""]
    inner = f"{place}.{each.name}"
    homes = tree.homes.get(each.name, ()) if place == PACKAGE else ()
    found = [place, *homes, *([inner] if inner in tree.files else [])]
    known = len(found) > 1 or not each.name or each.name in _OWN or (place != PACKAGE and tree.files[place])
    return found if known and tree.files.keys() >= set(found) else [""]


def _absolute(tree: _Tree, each: Asked, importer: str) -> str:
    """The whole name of a module that is asked for; "" for one that is relative to nothing."""
    if not each.level:
        return each.module
    file = tree.files.get(importer)
    own = each.how == "own" or (file is not None and file.name == "__init__.py")
    base = importer.split(".")
    base = base[: len(base) - each.level + (1 if own else 0)]
    return ".".join([*base, *filter(None, [each.module])]) if importer and base else ""


def _longest(tree: _Tree, name: str) -> str:
    """The longest beginning of a name that is a module; "" where only the package is."""
    while name and name not in tree.files:
        name = name.rpartition(".")[0]
    return name if name != PACKAGE else ""
