"""Figures under a preset's name have that preset's values, in an open notebook as in the batch.

The cell of parameters sets the label, `preset`, beside the values, which do not follow it: with "paper" there and all
else as it was, a run of seconds would take the place of the committed figure, and of the record that is judged.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from compressible.companion import notebooks, parameters


def expect_own_label(id: str, label: str, values: Mapping[str, Any]) -> None:
    """Raise ParameterError where a figure of these values would be kept under the name of a preset that has others."""
    if label == notebooks.UNCOMMITTED or id not in notebooks.ids():
        return
    if others := notebooks.other_values(id, label, values):
        told = ", ".join(f"{name} {given} for {expected}" for name, given, expected in others)
        raise parameters.ParameterError(
            f"preset: got {label!r}, whose figure this would replace with one of other values ({told}); expected a "
            "name of your own, under which the result is found in the cache; "
            f"`python -m compressible run {id} --preset {label}` runs the preset"
        )
