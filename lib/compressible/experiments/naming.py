"""Names in a flat result that holds several parts: a task's, a depth's, a kind of network's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def prefixed(name: object, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values under "<name>/<key>"."""
    return {f"{name}/{key}": value for key, value in values.items()}
