"""How fresh figures are: whether a record was made by the code that is here, with the values that its preset sets."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from compressible.companion import committed, notebooks
from compressible.companion import parameters as vocabulary
from compressible.companion.library import notebook_digest
from compressible.companion.provenance import LIBRARY
from compressible.runtime import checks, paths


def own_labels(id: str) -> list[str]:
    """Labels that are no preset's name and under which a figure of a notebook lies, or has failed; sorted."""
    root = paths.figures_dir()
    files = [*root.glob(f"*/{id}.json"), *root.glob(f"*/failed/{id}.txt")]
    return sorted({file.relative_to(root).parts[0] for file in files} - notebooks.presets(id).keys())


def state(id: str, label: str) -> str:
    """How fresh a figure is, in one word.

    done     its record was made by the code that is here, as far as the notebook can reach it by imports, with the
             values that the preset sets, if the label is one's
    stale    it was made by other code, or with other values
    unknown  its record does not say by which code: no digest of the notebook or of the library, or no record at all
    failed   the last run ended with an error, after whatever figure there is
    missing  there is no record
    """
    record, failed = notebooks.record_path(id, label), notebooks.failed_path(id, label).with_suffix(".txt")
    made = record.stat().st_mtime if record.exists() else -1.0
    if failed.exists() and failed.stat().st_mtime >= made:
        return "failed"
    if made < 0:
        return "missing"
    try:
        content = json.loads(record.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # half a file, which a full disk left, say
        return "unknown"
    if not isinstance(content, dict) or not isinstance(content.get("parameters", {}), dict):
        return "unknown"
    if differences(id, label, content):
        return "stale"
    return "done" if content.get("notebook") and content.get("library") else "unknown"


def differences(id: str, label: str, record: Mapping[str, Any]) -> list[str]:
    """In what a record differs from what would be made now: by other code, or with other values than the preset sets.

    Told by content, since a fresh clone gives all files one time. Code counts as far as the record has its digests.
    An edit of the library counts where the notebook reaches it, which is asked only where nothing else differs.
    """
    notebook = notebooks.notebook_path(id)
    code = ["notebook has changed since"] if record.get("notebook") not in (None, notebook_digest(notebook)) else []
    others = other_values(id, label, record["parameters"]) if "parameters" in record else []
    values = [f"{name} was {was}, now {now}" for name, was, now in others]
    if record.get("library") not in (None, LIBRARY) and (
        code or values or not committed.reaches_the_same(record, notebook)
    ):
        code.append("library has changed since")
    return code + values


def other_values(
    id: str, label: str, given: Mapping[str, Any], own: Mapping[str, Any] | None = None
) -> list[tuple[str, str, str]]:
    """Parameters that are other than a preset sets them: name, as given, as set. None where a label is no preset's.

    What the preset does not set is the notebook's own: as its file says it, or `own` where that has the name.
    """
    if label not in notebooks.presets(id):  # one's own values, which nothing sets
        return []
    here = notebooks.defaults(notebooks.notebook_path(id))
    here |= {name: value for name, value in (own or {}).items() if name in here}
    values = vocabulary.validate(here | notebooks.chosen(id, label).parameters)

    def shown(name: str, of: Mapping[str, Any]) -> str:
        return checks.shown(of[name]) if name in of else "no parameter"

    return [(name, shown(name, given), shown(name, values)) for name in notebooks.unlike(values, given)]


def has_values(id: str, label: str, values: Mapping[str, Any]) -> bool:
    """Whether a figure's record has these values, those of `plan`, and the notebook's own beside them."""
    record = json.loads(notebooks.record_path(id, label).read_text(encoding="utf-8"))
    wanted = vocabulary.validate(notebooks.defaults(notebooks.notebook_path(id)) | dict(values))
    return not notebooks.unlike(wanted, record.get("parameters", {}))
