"""Figures under a preset's name have that preset's values, in an open notebook as in the batch.

The cell of parameters sets the label, `preset`, beside the values, which do not follow it: with "paper" there and all
else as it was, a run of seconds would take the place of the committed figure, and of the record that is judged. What a
preset does not set is what the notebook's cell says in the last commit: JupyterLab saves an edited one by itself.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from typing import Any

from compressible.companion import committed, freshness, notebooks, parameter_cells, parameters, rules
from compressible.runtime import checks
from compressible.runtime.kernel_bar import kernel


def expect_own_label(id: str, label: str, values: Mapping[str, Any]) -> None:
    """Raise ParameterError where a figure of these values would be kept under the name of a preset that has others."""
    if label == notebooks.UNCOMMITTED or id not in _ids():
        return
    if others := freshness.other_values(id, label, values, committed.values_of(id)):
        told = ", ".join(f"{name} {given} for {expected}" for name, given, expected in others)
        raise parameters.ParameterError(
            f"preset: got {label!r}, whose figure this would replace with one of other values ({told}); expected a "
            f"name of your own, under which the result is found if it is in the cache; {_way(id, label)}"
        )


def expect_to_run(label: str, values: Mapping[str, Any], function: Callable[..., Any]) -> None:
    """Refuse, before the work, values that a notebook's rules do not allow, and the name of a preset that has others.

    For an open notebook and for papermill, which no batch has checked. Which notebook it is, its function and the names
    of its parameters tell; where they are none's, as in an edited copy, nothing is asked. Raises ParameterError.
    """
    if (id := _having(values.keys(), function)) is None:
        return
    if lines := rules.broken(notebooks.conditions(id), values):
        raise parameters.ParameterError(f"{id}: {'; '.join(lines)}")
    expect_own_label(id, label, values)


def warn_of_changed(values: Mapping[str, Any]) -> None:
    """Warn where a notebook's parameters are others by now than those of a result, whose figure is to be saved.

    The cells that draw read titles and axes from them: after a change of the cell of parameters alone they would tell
    of values that the numbers do not have.
    """
    namespace = getattr(kernel(), "user_ns", {})
    names = sorted(namespace.get("_parameter_names", set()) & values.keys() & namespace.keys())
    changed = [name for name in names if not _same(name, namespace, values)]
    told = [f"{name} {checks.shown(values[name])}, now {checks.shown(namespace[name])}" for name in changed]
    if told:
        advice = "run all cells from the cell of parameters on, as what is drawn may tell of values that it has not"
        warnings.warn(f"the result was computed with {'; '.join(told)}: {advice}", RuntimeWarning, stacklevel=3)


def _same(name: str, namespace: Mapping[str, Any], values: Mapping[str, Any]) -> bool:
    try:
        return bool(parameters.validate({name: namespace[name]})[name] == values[name])
    except parameters.ParameterError:
        return False


def _having(names: Collection[str], function: Callable[..., Any]) -> str | None:
    """The one notebook of this checkout that has this function, and a cell of these parameters, beside `preset`."""
    try:
        source, wanted = inspect.getsource(function), {*names, "preset"}
    except (OSError, TypeError):  # of a class, say, or typed into a terminal
        return None
    texts = {id: notebooks.notebook_path(id).read_bytes() for id in _ids()}
    named = [id for id, text in texts.items() if parameter_cells.written(text).keys() == wanted]
    found = [id for id in named if parameter_cells.holds(texts[id], source)]
    return found[0] if len(found) == 1 else None


def _ids() -> list[str]:
    """Notebooks that are here; none outside of a checkout."""
    with suppress(FileNotFoundError):
        return notebooks.ids()
    return []


def _way(id: str, label: str) -> str:
    """What gives a preset's figure."""
    if edited(id):
        file = f"notebooks/{id}.ipynb"
        return f"the cell of parameters in {file} is edited: `git checkout {file}` takes that back, a commit keeps it"
    return f"`python -m compressible run {id} --preset {label}` runs the preset"


def edited(id: str) -> dict[str, str]:
    """Values in a notebook's cell of parameters that are others than in the last commit, "5 for 2" by name."""
    before, now = committed.values_of(id), notebooks.defaults(notebooks.notebook_path(id))
    return {
        name: f"{checks.shown(now[name])} for {checks.shown(before[name])}"
        for name in now
        if name in before and now[name] != before[name] and name != "preset"
    }


def expect_of_commit(id: str, values: Mapping[str, Any]) -> str:
    """What a batch says where the values that it takes from a notebook are edited; "" where they are not.

    `values` are those of `plan`. Raises ParameterError as `expect_own_label` does.
    """
    taken = {name: told for name, told in edited(id).items() if name not in values}
    if not taken:
        return ""
    expect_own_label(id, values["preset"], {**notebooks.defaults(notebooks.notebook_path(id)), **values})
    told = ", ".join(f"{name} {change}" for name, change in taken.items())
    return f"note: {id} takes {told} from its cell of parameters, which is edited since the last commit"
