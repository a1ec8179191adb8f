"""The cells of a notebook by which its figure is drawn, which are all that `redraw` executes."""

from __future__ import annotations

import ast
from pathlib import Path

ASIDE = "aside"  # tag of a cell that shows a reader something and that no figure needs


def as_far_as_it_saves(notebook: Path, begun: Path) -> Path:
    """Write a copy of the notebook that ends with the last cell that saves a figure: what comes after draws nothing.

    Nor do cells with the tag "aside" before it, of which the imports stay, since later cells may use them.
    """
    import nbformat

    content = nbformat.read(notebook, as_version=4)
    saving = [k for k, cell in enumerate(content.cells) if cell.cell_type == "code" and "figures.save(" in cell.source]
    content.cells = content.cells[: max(saving, default=len(content.cells)) + 1]
    for cell in content.cells:
        if cell.cell_type == "code" and ASIDE in cell.metadata.get("tags", []):
            cell.source = _imports(cell.source)
    nbformat.write(content, begun)
    return begun


def _imports(source: str) -> str:
    found = [each for each in ast.parse(source).body if isinstance(each, ast.Import | ast.ImportFrom)]
    return "\n".join(ast.unparse(each) for each in found)
