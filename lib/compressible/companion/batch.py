"""The batch: executes one notebook with checked values and publishes its figure, redraws or refreshes it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import sys
import tempfile
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from compressible.companion import records, staging
from compressible.companion.drawing_cells import as_far_as_it_saves
from compressible.companion.library import NOTEBOOK, REACHED, ROOT, notebook_digest
from compressible.companion.notebooks import BatchError, executed_path, failed_path, notebook_path, record_path
from compressible.companion.provenance import LIBRARY
from compressible.companion.reached import reached_digest
from compressible.runtime import paths

START_TIMEOUT = 180  # seconds; a busy machine has been seen to need more than Jupyter's 60
SUFFIXES = (".pdf", ".png", ".npz", ".json")  # the record comes last: its presence says that the others are whole
# The kernel's own way to show pictures, since a window's shows nothing in a notebook, and nobody's settings of them.
PICTURES = {"MPLBACKEND": "", "MATPLOTLIBRC": os.devnull}
# Jupyter interrupts a kernel before it ends it, which ipykernel's log calls an error; errors of cells come by messages.
QUIET = {"NotebookClient": {"extra_arguments": ["--IPKernelApp.log_level=50"]}}
ANSI = re.compile(r"\x1b\[[0-9;]*m")


def run(id: str, values: Mapping[str, Any], kernel: str = "python3") -> bool:
    """Execute a notebook with values from `plan`; True when it ran through and saved its figure.

    Pictures and record are published only then. A failure leaves the notebook as far as it came, and its
    traceback, under figures/<label>/failed, and whatever an earlier run had published untouched.
    """
    _expect_places(id, values["preset"])
    with _staging(values["preset"]) as folder:
        return _run_in(folder, id, values, kernel)


@contextlib.contextmanager
def _staging(label: str) -> Iterator[Path]:
    """A folder beside the figures under `label`, so that files move from it in one step; it goes away afterwards."""
    root = paths.figures_dir() / label
    expect_room(root)
    with staging.folder_in(root) as folder:
        yield folder


def _expect_places(id: str, label: str) -> None:
    """Raise BatchError where not all files of a figure can take their places: half of them would be another run's."""
    record, executed = record_path(id, label), executed_path(id, label)
    expect_room(record.parent)
    expect_room(executed.parent)
    places = [*(record.with_suffix(suffix) for suffix in SUFFIXES), executed]
    if taken := [str(place) for place in places if place.is_dir()]:
        raise BatchError(f"{taken[0]} is a folder, expected a file or none, so nothing was started")


def expect_room(folder: Path) -> None:
    """Raise BatchError where figures cannot be written in a folder, which is made where it is not there."""
    if reason := paths.unwritable(folder):
        told = f"figures cannot be written in {folder} ({reason}), so nothing was started"
        raise BatchError(f"{told}; COMPRESSIBLE_FIGURES names another place")


def warn_of_cache() -> None:
    """Say on standard error, before the work, where results cannot be kept: a kernel's warning is in its notebook."""
    if reason := paths.unwritable(paths.cache_dir() / "results"):
        told = f"warning: the cache {paths.cache_dir()} cannot be written ({reason}): results are not kept"
        print(f"{told}; COMPRESSIBLE_CACHE names another folder", file=sys.stderr)


def _run_in(folder: Path, id: str, values: Mapping[str, Any], kernel: str) -> bool:
    output, label = folder / "notebook.ipynb", values["preset"]
    executed, failed = executed_path(id, label), failed_path(id, label)
    try:
        notebook = notebook_path(id)
        _execute(notebook, output, values, kernel, _told(folder, notebook))
        _check_library((folder / label / id).with_suffix(".json"))
        _publish(folder, id, label, SUFFIXES)
    except Exception as error:
        _keep_failure(output, failed, error)
        return False
    _move(output, executed)
    failed.unlink(missing_ok=True)
    failed.with_suffix(".txt").unlink(missing_ok=True)
    return True


def redraw(id: str, label: str, kernel: str = "python3") -> None:
    """Draw the figure of a record anew with the notebook as it is now, from the record alone: nothing is computed.

    The notebook is executed as far as it saves its figure, with the record's parameters; what it runs gives the
    recorded metrics and arrays. PDF and PNG are replaced, and in the record their digests and that of the notebook.

    Raises:
        BatchError: when there is no such notebook or record, or the record lacks what the notebook draws, was made with
            other parameters or by another function. It says which command makes the record anew; all stays as it was.
    """
    notebook, place = notebook_path(id), record_path(id, label)
    try:
        record = records.read(place, id, label)
        records.expect_unaltered(record)
        records.read_arrays(place, record)
        with _staging(label) as folder:
            _redraw_in(folder, notebook, place, {**record["parameters"], "preset": label}, kernel)
    except records.RecordError as error:
        command = f"python -m compressible run {id} --preset {label}"
        raise BatchError(f"{id}: {error}; `{command}` makes the record anew") from None


def _redraw_in(folder: Path, notebook: Path, place: Path, values: Mapping[str, Any], kernel: str) -> None:
    id, label = f"{notebook.parent.name}/{notebook.stem}", values["preset"]
    kept = folder / place.name  # what is drawn from does not change meanwhile
    for file in (place, place.with_suffix(".npz")):
        if file.is_file():
            shutil.copy(file, kept.with_suffix(file.suffix))
    begun = as_far_as_it_saves(notebook, folder / "begun.ipynb")
    told = _told(folder, notebook) | {records.VARIABLE: str(kept)}
    try:
        _execute(begun, folder / "notebook.ipynb", values, kernel, told, notebook.parent)
    except Exception as error:
        raise records.RecordError(_reason(error)) from error
    if place.read_bytes() != kept.read_bytes():
        raise BatchError(f"{place.name} has changed while its figure was drawn; redraw it once more")
    _publish(folder, id, label, (".pdf", ".png", ".json"))


def _reason(error: Exception, limit: int = 300) -> str:
    """What stopped the kernel, in one line."""
    name, told = getattr(error, "ename", type(error).__name__), getattr(error, "evalue", str(error))
    text = " ".join((told if name == records.RecordError.__name__ else f"{name}: {told}").split())
    return text if len(text) <= limit else f"{text[:limit]}..."


def _told(folder: Path, notebook: Path) -> dict[str, str]:
    """What the kernel is told: where things are, where figures go, which notebook it is, and that it computes."""
    told = {"COMPRESSIBLE_FIGURES": str(folder), NOTEBOOK: notebook_digest(notebook) or ""}
    told[REACHED] = reached_digest(notebook) or ""
    return _places() | told | {records.VARIABLE: "", **PICTURES}


def _places() -> dict[str, str]:
    """Places as they are for this process, and its library first: the kernel starts in another folder.

    A library that is installed like any other package has no folder of its own to name, and the kernel finds its own.
    """
    places, library = paths.absolute_places(), str(ROOT.parent)
    if ROOT.parent.name in ("site-packages", "dist-packages"):
        return places
    searched = [library, *filter(None, [places.get("PYTHONPATH")])]
    return places | {"PYTHONPATH": os.pathsep.join(searched)}


def _check_library(record: Path) -> None:
    """Raise BatchError where the kernel computed with another library than this command's."""
    found = json.loads(record.read_text(encoding="utf-8")).get("library") if record.is_file() else None
    if found not in (None, LIBRARY):
        raise BatchError(
            f"the kernel computed with library {found[:12]}, expected {LIBRARY[:12]}, the one of {ROOT}: it was edited "
            "meanwhile, or the kernel finds another installation of compressible first; nothing was published"
        )


def _execute(
    notebook: Path,
    output: Path,
    values: Mapping[str, Any],
    kernel: str,
    told: Mapping[str, str],
    folder: Path | None = None,
) -> None:
    import papermill

    with paths.variables_set(**told), _private_sockets() as config:
        papermill.execute_notebook(
            str(notebook),
            str(output),
            parameters=dict(values),
            kernel_name=kernel,
            cwd=str(folder or notebook.parent),
            start_timeout=START_TIMEOUT,
            config=config,
            progress_bar=sys.stderr.isatty(),
        )


def _publish(folder: Path, id: str, label: str, suffixes: Sequence[str]) -> None:
    saved = [(folder / label / id).with_suffix(suffix) for suffix in suffixes]
    lacking = [file.name for file in saved if not file.exists()]
    if lacking:
        raise BatchError(f"{id} ran through but did not save {', '.join(lacking)} under preset {label!r}")
    for file in saved:
        _move(file, record_path(id, label).with_suffix(file.suffix))


def _keep_failure(output: Path, failed: Path, error: Exception) -> None:
    plain = isinstance(error, BatchError) or type(error).__name__ == "PapermillExecutionError"
    told = str(error) if plain else traceback.format_exc()
    report = ANSI.sub("", told).strip() + "\n"
    try:
        paths.write_atomic(failed.with_suffix(".txt"), report)
        if output.exists():
            _move(output, failed)
        print(f"{report}kept: {failed.with_suffix('.txt')}", file=sys.stderr)
    except OSError as other:  # a disk that is full, say, which is why it failed, too
        print(f"{report}not kept: {other}", file=sys.stderr)


def _move(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    os.replace(source, target)


@contextlib.contextmanager
def _private_sockets() -> Iterator[Any]:
    """Jupyter's configuration for a quiet kernel on Unix sockets of its own: TCP ports clash in parallel runs."""
    from traitlets.config import Config

    with tempfile.TemporaryDirectory(prefix="kernel-") as folder:
        # A socket's path holds about 100 characters; a longer one needs the default, TCP.
        fits = os.name == "posix" and len(folder) < 80
        sockets = {"KernelManager": {"transport": "ipc", "ip": f"{folder}/socket"}} if fits else {}
        yield Config(sockets | QUIET)


@contextlib.contextmanager
def _figures_aside() -> Iterator[None]:
    """Send figures to a folder that goes away: refreshing a notebook is no run of the batch."""
    with tempfile.TemporaryDirectory() as folder:
        aside = _places() | {"COMPRESSIBLE_FIGURES": f"{folder}/figures", records.VARIABLE: "", **PICTURES}
        with paths.variables_set(**aside):
            yield


def refresh(id: str, kernel: str = "python3") -> None:
    """Execute a committed notebook in place with its own defaults, keeping nothing that only makes diffs.

    Its figures are not kept: those come from `run`.
    Raises nbclient's CellExecutionError, with the file untouched, when a cell fails.
    """
    import nbclient
    import nbformat

    path = notebook_path(id)
    notebook = nbformat.read(path, as_version=4)
    with _private_sockets() as config, _figures_aside():
        nbclient.NotebookClient(
            notebook, timeout=None, startup_timeout=START_TIMEOUT, kernel_name=kernel, config=config,
            record_timing=False, resources={"metadata": {"path": str(path.parent)}},
        ).execute()  # fmt: skip
    _tidy(notebook)
    paths.write_atomic(path, nbformat.writes(notebook) + "\n")


def _tidy(notebook: Any) -> None:
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            # Without its kernel a widget is an error message; the picture beside it is not.
            output.get("data", {}).pop("application/vnd.jupyter.widget-view+json", None)
        tags = cell.metadata.get("tags")
        cell.metadata = {"tags": tags} if tags else {}
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
