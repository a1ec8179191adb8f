"""What one notebook expects of its values together: conditions in Python over the names of its parameters.

They stand beside the notebooks in `notebooks/<paper>/rules.yaml`, {name of the notebook: [condition, ...]}, and are
checked with a run's values before anything starts. What holds for all notebooks stands in parameters.py.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from typing import Any

from compressible.runtime.checks import shown

FUNCTIONS = {function.__name__: function for function in (abs, all, any, len, max, min, set, sorted, sum)}


def broken(conditions: Sequence[str], values: Mapping[str, Any]) -> list[str]:
    """A line for each condition that the values do not meet: what they are, and what was expected.

    Example:
        >>> broken(["2 * rank <= dimension", "rank > 1"], {"rank": 6, "dimension": 10})
        ['got rank = 6, dimension = 10, expected 2 * rank <= dimension']
    """
    return [_told(condition, values) for condition in conditions if not _holds(condition, values)]


def _holds(condition: str, values: Mapping[str, Any]) -> bool:
    code = compile(condition, "rules.yaml", "eval")
    return bool(eval(code, {"__builtins__": {}, **FUNCTIONS, **values}))


def _told(condition: str, values: Mapping[str, Any]) -> str:
    nodes = [node for node in ast.walk(ast.parse(condition, mode="eval")) if isinstance(node, ast.Name)]
    read = dict.fromkeys(node.id for node in sorted(nodes, key=lambda node: node.col_offset))
    given = ", ".join(f"{name} = {shown(values[name])}" for name in read if name in values)
    return f"got {given}, expected {condition}"
