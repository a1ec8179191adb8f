"""Cells of parameters as they are written: which names one declares and with which values, in a kernel or in a file."""

from __future__ import annotations

import ast
import json
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

TAG = "parameters"  # papermill's


def assigned(source: str) -> set[str]:
    """Names assigned at the top level of a cell; none where it is no Python."""
    stores = (node for statement in _body(source) for node in ast.walk(statement))
    return {node.id for node in stores if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}


def set_plainly(source: str) -> set[str]:
    """Names that a cell sets, if plain values for names are all that it has: one that draws sets no parameters."""
    return assigned(source) if all(map(_is_plain, _body(source))) else set()


def declared(cells: Sequence[str]) -> set[str]:
    """Names of the cell of parameters that was executed last: the one with `preset: str = ...`. None without it.

    What papermill injects is in a cell of its own, without types, and declares nothing.
    """
    for source in reversed(cells):
        typed = (line.target for line in _body(source) if isinstance(line, ast.AnnAssign))
        if any(isinstance(target, ast.Name) and target.id == "preset" for target in typed):
            return assigned(source)
    return set()


def written(notebook: str | bytes) -> dict[str, Any]:
    """Names and values in the cell of parameters of a notebook's file; {} where it is no notebook or has none.

    Names without a type, and values that are not plain ones, are left out.
    """
    values: dict[str, Any] = {}
    for line in _body(_source(notebook)):
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name) and line.value:
            with suppress(ValueError, TypeError):
                values[line.target.id] = ast.literal_eval(line.value)
    return values


def holds(notebook: str | bytes, source: str) -> bool:
    """Whether a cell of a notebook's file has this source, of a function, say."""
    return any(source.strip() in cell for cell, _ in _cells(notebook))


def _source(notebook: str | bytes) -> str:
    return next((cell for cell, tags in _cells(notebook) if TAG in tags), "")


def _cells(notebook: str | bytes) -> list[tuple[str, list[str]]]:
    try:
        cells = json.loads(notebook)["cells"]
        return [("".join(cell["source"]), cell["metadata"].get("tags", [])) for cell in cells]
    except (ValueError, KeyError, TypeError, AttributeError):
        return []


def _is_plain(line: ast.stmt) -> bool:
    if not isinstance(line, ast.Assign | ast.AnnAssign) or line.value is None:
        return False
    with suppress(ValueError, TypeError):
        ast.literal_eval(line.value)
        return True
    return False


def _body(source: str) -> list[ast.stmt]:
    try:
        return ast.parse(source).body
    except (SyntaxError, ValueError):
        return []
