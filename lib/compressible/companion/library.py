"""Digests of the sources of this library that can move a number, and of notebooks: for records, cache and batch.

The standard library is all that this file needs, so that the Snakefile can ask it before anything is installed.
"""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from threading import Lock
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# Whole rooms and single files that draw, judge, check or find; none of them moves a number in a result.
NOT_COMPUTING = frozenset({
    "__init__", "__main__", "companion", "data/bounds", "data/joined", "data/manifest", "data/sources",
    "runtime/checks", "runtime/paths", "runtime/process_identity", "runtime/progress",
})  # fmt: skip
NOTEBOOK = "COMPRESSIBLE_NOTEBOOK"  # the batch tells by it what it executes, since the file may change meanwhile
REACHED = "COMPRESSIBLE_REACHED"  # and by this the digest of the sources that this notebook can reach; see reached.py
_TOLD = (ast.FunctionDef, ast.ClassDef, ast.Module)  # what a docstring is taken from
_PARSER = Lock()  # Python 3.11's parser loses count of its recursion depth when threads share it


def computing_sources(root: Path = ROOT) -> list[Path]:
    """The library's files that can move a number, of all its folders, sorted by their place below `root`."""
    files = {file.relative_to(root).with_suffix("").as_posix(): file for file in root.rglob("*.py")}
    return [files[name] for name in sorted(files) if not {name, name.partition("/")[0]} & NOT_COMPUTING]


def library_digest(root: Path = ROOT) -> str:
    """sha256 of the syntax of all computing sources. Raises FileNotFoundError where there are none.

    The digest of nothing would be the same for any library, and edited code would be taken for the recorded.
    """
    files = computing_sources(root)
    if not files:
        raise FileNotFoundError(f"{root} holds no source that computes; expected the package compressible")
    return digest_of(files, root)


def digest_of(files: Iterable[Path], root: Path, form: Callable[[str], str] | None = None) -> str:
    """sha256 of the places of files below `root` and of what `form` makes of each, by default its syntax."""
    form = form or normal_form
    parts = [f"{file.relative_to(root).as_posix()} {form(file.read_text('utf-8'))}" for file in files]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def notebook_digest(path: Path) -> str | None:
    """sha256 of a notebook's code without comments and outputs; None where there is no such notebook."""
    if not path.is_file():
        return None
    parts = [normal_form(source) for source in notebook_sources(path, "code")]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def notebook_sources(path: Path, kind: str) -> list[str]:
    """The sources of a notebook's cells of a kind. Raises ValueError, with its path, for a file that is no notebook.

    It may be empty, as one that a full disk left, or hold the marks of a merge.
    """
    try:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == kind]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no notebook as Jupyter saves it ({type(error).__name__}: {error})") from error


def normal_form(source: str) -> str:
    """The syntax of a source without comments, blank lines and docstrings; the source itself if it does not parse.

    The same in every version of Python, unlike ast.dump's, so that a record made with another is not called stale.
    """
    try:
        return _written(parsed(source))
    except SyntaxError:
        return source


def parsed(source: str, tries: int = 3) -> ast.Module:
    """Parse a source, once more where others, who do not hold our lock, parsed meanwhile (Python before 3.11.5)."""
    for _ in range(tries - 1):
        try:
            with _PARSER:
                return ast.parse(source)
        except SystemError:  # AST constructor recursion depth mismatch
            continue
    with _PARSER:
        return ast.parse(source)


def _written(node: Any) -> str:
    """A syntax tree as text, without docstrings and the empty fields, of which each version of Python has others."""
    if isinstance(node, list):
        return f"[{', '.join([_written(each) for each in node])}]"
    if not isinstance(node, ast.AST):
        return repr(node)
    if isinstance(node, ast.Constant):
        return f"Constant(value={node.value!r})"
    if isinstance(node, _TOLD) and ast.get_docstring(node, False):
        node.body = node.body[1:]
    filled = [(name, value) for name, value in ast.iter_fields(node) if value is not None and value != []]
    return f"{type(node).__name__}({', '.join([f'{name}={_written(value)}' for name, value in filled])})"
