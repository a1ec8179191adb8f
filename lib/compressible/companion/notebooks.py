"""The catalogue: which notebooks exist, what a preset sets, which values a run gets, where its figure goes.

A notebook is named by its id, `<paper>/<name>`, in every function here. Presets are kept beside the
notebooks in `notebooks/<paper>/presets.yaml`: {name: {preset: {minutes, gpu, needs, parameters}}}.
"""

from __future__ import annotations

import ast
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field, StrictBool, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from compressible.companion import parameters as vocabulary
from compressible.companion import rules
from compressible.companion.library import notebook_sources
from compressible.companion.yaml_files import BatchError, read_yaml
from compressible.runtime import checks, paths

UNCOMMITTED = "quick"  # the preset for trying values out; figures under the others' names are the committed ones


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Preset:
    """What a preset says about a notebook: minutes, whether a GPU is wanted, what must be had, parameters."""

    minutes: Annotated[float, Field(gt=0, strict=True)]
    gpu: StrictBool = False
    parameters: dict[str, Any] = field(default_factory=dict)
    needs: str = ""


def ids() -> list[str]:
    """Ids of all notebooks of the repository, sorted; what Jupyter keeps in hidden folders is none."""
    root = paths.repository() / "notebooks"
    found = (file.relative_to(root) for file in root.glob("[!.]*/[!.]*.ipynb"))
    return sorted(file.with_suffix("").as_posix() for file in found)


def notebook_path(id: str) -> Path:
    """File of a notebook. Raises BatchError, with the closest known id, when there is none."""
    path = paths.repository() / "notebooks" / f"{id}.ipynb"
    if id not in ids():
        raise BatchError(f"no notebook {id!r}{checks.closest(id, ids())}")
    return path


def presets(id: str) -> dict[str, Preset]:
    """Presets of a notebook by name; empty when its paper's presets.yaml does not mention it."""
    paper, name = id.split("/")
    file = paths.repository() / "notebooks" / paper / "presets.yaml"
    entries = read_yaml(file) if file.exists() else {}
    return {
        label: _preset(f"{id}, {label} in {file.name}", entry) for label, entry in (entries.get(name) or {}).items()
    }


def _preset(where: str, entry: Any) -> Preset:
    try:
        return TypeAdapter(Preset).validate_python(entry)
    except ValidationError as error:
        raise BatchError(f"preset {where}: {'; '.join(map(checks.mistake, error.errors()))}") from None


def defaults(notebook: Path) -> dict[str, Any]:
    """Parameters of a notebook and their defaults, as papermill reads its parameters cell.

    Raises BatchError when a default is not a plain literal, ValueError for a file that is no notebook.
    """
    notebook_sources(notebook, "code")  # papermill's error would not say in which file
    with _without_grammar_of_addresses():
        import papermill
    found = papermill.inspect_notebook(str(notebook))
    try:
        return {name: ast.literal_eval(entry["default"]) for name, entry in found.items()}
    except (ValueError, SyntaxError) as error:
        raise BatchError(f"{notebook}: a parameter's default is not a plain literal: {error}") from error


@contextmanager
def _without_grammar_of_addresses() -> Iterator[None]:
    """Let jsonschema, by which notebooks are checked, be imported without a package that builds a grammar of web
    addresses meanwhile: each command would start a second later for what no notebook's schema asks for."""
    name = "rfc3987_syntax"
    if name in sys.modules:
        yield
        return
    sys.modules[name] = None  # type: ignore[assignment]  # as absent, of which jsonschema takes no notice
    try:
        yield
    finally:
        del sys.modules[name]


def parse(text: str, default: Any) -> Any:
    """Value of a command line's text for a parameter whose default is given; a string stays as it is."""
    if isinstance(default, str):
        return text
    for read in (json.loads, ast.literal_eval):
        try:
            return read(text)
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
            continue
    return text


def plan(
    id: str,
    preset: str = "quick",
    files: Sequence[Path] = (),
    overrides: Mapping[str, str] | None = None,
    label: str | None = None,
) -> dict[str, Any]:
    """Values to hand to a notebook: its preset's, then those of YAML files, then the command line's.

    Everything is checked together with the notebook's own defaults. Raises BatchError for a notebook, preset or name
    that does not exist, and for other values than the preset's that would be kept under its name, unless it is quick;
    ParameterError for values that do not fit.
    """
    known = defaults(notebook_path(id))
    if "preset" not in known:
        raise BatchError(f"{id} has no cell tagged 'parameters' that sets preset: it cannot run in a batch")
    values = dict(chosen(id, preset).parameters)
    for file in files:
        values |= read_yaml(Path(file))
    values |= {name: parse(text, known.get(name)) for name, text in (overrides or {}).items()}
    _check_names(id, values, known)
    values["preset"] = _own_label(id, preset, label or preset)
    checked = vocabulary.validate(known | values, allowed=known)
    if lines := rules.broken(conditions(id), checked):
        raise BatchError(f"{id}: {'; '.join(lines)}")
    if values["preset"] == preset != UNCOMMITTED:
        _expect_set_by(preset, vocabulary.validate(known | chosen(id, preset).parameters, allowed=known), checked)
    return {name: checked[name] for name in values}


def _expect_set_by(preset: str, values: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Refuse other values than a preset's: the figure would stand in the place of the one that its claims judge."""
    if told := [f"{name} is {checks.shown(given[name])}" for name in unlike(values, given)]:
        these = f"{', '.join(told)}, other than in preset {preset}, whose figure this would replace"
        raise BatchError(f"{these}; expected a label of your own: --label NAME, or LABEL=NAME for make")


def conditions(id: str) -> list[str]:
    """What a notebook expects of its values together, as its paper's rules.yaml says it; see rules.py."""
    paper, name = id.split("/")
    file = paths.repository() / "notebooks" / paper / "rules.yaml"
    return list(read_yaml(file).get(name) or []) if file.exists() else []


def chosen(id: str, preset: str) -> Preset:
    """A preset of a notebook. Raises BatchError, with the closest known name, when there is none of either."""
    notebook_path(id)
    available = presets(id)
    if preset not in available:
        raise BatchError(f"{id} has no preset {preset!r}{checks.closest(preset, available)}")
    return available[preset]


def checked_label(label: str) -> str:
    """The name of a folder of figures. Raises BatchError where it is none, but leads elsewhere, say."""
    form = vocabulary.VOCABULARY["preset"].allowed
    if not re.fullmatch(form, label):
        raise BatchError(f"label: got {checks.shown(label)}, expected text matching {form}: it names a folder")
    return label


def _own_label(id: str, preset: str, label: str) -> str:
    """The label, which is no name of another preset: its figure would stand in the place of that preset's."""
    if checked_label(label) != preset and label in presets(id):
        told = f"label: {label} is the name of a preset, whose figure one with the values of {preset} would replace"
        raise BatchError(f"{told}; expected --preset {label}, or a label that is none")
    return label


def _check_names(id: str, values: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    if "preset" in values:
        raise BatchError(f"preset = {checks.shown(values['preset'])} is not a value to pass: use --preset, or --label")
    unknown = [f"{checks.shown(name)}{checks.closest(name, known)}" for name in values if name not in known]
    if unknown:
        raise BatchError(f"{id} has no parameter " + ", nor ".join(unknown))


def record_path(id: str, label: str) -> Path:
    """JSON record of a notebook's figure under a label (usually the preset's name)."""
    return paths.figures_dir() / label / f"{id}.json"


def executed_path(id: str, label: str) -> Path:
    """Notebook as it was last executed with success."""
    return paths.figures_dir() / label / "executed" / f"{id}.ipynb"


def failed_path(id: str, label: str) -> Path:
    """Notebook as far as its last, failed execution came; the traceback is beside it with suffix .txt."""
    return paths.figures_dir() / label / "failed" / f"{id}.ipynb"


def unlike(values: Mapping[str, Any], given: Mapping[str, Any]) -> list[str]:
    """Names that are in one alone, or differ; what a figure is kept under is no value of its run."""
    names = sorted((values.keys() | given.keys()) - {"preset"})
    return [name for name in names if name not in given or name not in values or given[name] != values[name]]
