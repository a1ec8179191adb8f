"""One style for every figure, and `save`, which leaves PDF, PNG, arrays and a JSON record side by side."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from compressible.companion import claims, label_guard, parameters, records, runs
from compressible.companion.claims import interval
from compressible.companion.line_labels import label_lines
from compressible.companion.marks import BARS, interval_mark, interval_text, only_ticks, search_curve, shared_legend
from compressible.companion.palette import COLORS, PALETTE, colors
from compressible.companion.style import STYLE, lay_out
from compressible.runtime import paths
from compressible.runtime.kernel_bar import kernel

__all__ = [
    "BARS",
    "COLORS",
    "PALETTE",
    "RANGE",
    "STYLE",
    "colors",
    "interval",
    "interval_mark",
    "interval_text",
    "label_lines",
    "made_by",
    "only_ticks",
    "over_seeds",
    "panels",
    "plain_log_ticks",
    "save",
    "search_curve",
    "shared_legend",
]

WIDTH = 6.75  # inches, both columns of the papers
RANGE: Any = {"estimator": "median", "errorbar": ("pi", 100)}  # for over_seeds: the middle of all seeds and their range
_TOLD = ("commit", "dirty", "device", "threads", "wall_seconds", "peak_memory_bytes", "run")
_ID = re.compile(r"[a-z]+\d{0,4}/(\d\d|table\d)_[a-z0-9_]+")


def panels(ncols: int = 1, nrows: int = 1, height: float = 2.4, width: float = WIDTH, **options: Any) -> Any:
    """(figure, axes) as plt.subplots gives them; `height` is inches a row.

    A notebook shows the figure where a cell ends with its name, finished, not where it was begun: pyplot forgets it
    at once. The house style stays on for the session, since matplotlib reads it again with each line and title.
    """
    mpl.rcParams.update(STYLE)
    options["figsize"] = (width, height * nrows)
    _show_in_notebooks()
    try:
        figure, axes = plt.subplots(nrows, ncols, **options)
    except ImportError:  # settings name a backend that cannot be loaded, a window's on a server, say
        mpl.use("agg")
        figure, axes = plt.subplots(nrows, ncols, **options)
    plt.close(figure)
    return figure, axes


def _show_in_notebooks() -> None:
    """In a kernel, take its own backend where settings name one that shows nothing in a notebook."""
    named = str(mpl.rcParams["backend"]).lower()
    if (
        (shell := kernel())
        and not named.startswith("module://")
        and named not in ("inline", "ipympl", "widget", "nbagg")
    ):
        shell.enable_matplotlib("inline")


def over_seeds(ax: Axes, x: Any, values: Any, color: str, label: str, **options: Any) -> Line2D:
    """The mean of `values`, (seeds, n), with its 95 % t interval as a band, by seaborn. Returns the line.

    `options` are those of seaborn's lineplot: `**RANGE` for the range of all seeds, `err_style="bars"` for bars.
    Seaborn takes the statistics on the scale of the axis, so call it when that stands: where it is logarithmic, the
    mean is geometric. A place where a seed has no finite value is left out, as a mean of the others would mislead.
    """
    values = np.atleast_2d(np.asarray(values, float))
    values = np.where(np.isfinite(values).all(0), values, np.nan)
    places = np.broadcast_to(np.asarray(x), values.shape)
    looks: dict[str, Any] = {"color": color, "markeredgecolor": color, "label": label, "legend": False}
    looks["err_kws"] = {"elinewidth": 1, "capsize": 2} if options.get("err_style") == "bars" else {"linewidth": 0}
    before = len(ax.get_lines())
    t_interval = {"errorbar": lambda found: interval(found)[1:]}
    sns.lineplot(x=places.ravel(), y=values.ravel(), ax=ax, **t_interval | looks | options)
    return ax.get_lines()[before]


def plain_log_ticks(axis: Axis) -> None:
    """Label a logarithmic axis that spans about a decade or less with plain numbers: 0.8, 1, 2, 5.

    Call it when the limits stand.
    """
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high > 5 * low else (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8, 9)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def save(
    figure: Figure, id: str, preset: str, result: runs.Result, verdicts: Iterable[claims.Verdict] | None = None
) -> Path:
    """Write <figures>/<preset>/<id>.pdf, .png, .npz and .json; returns the record's path, that of the JSON file.

    The record holds provenance, metrics and their digest, the verdicts on the figure's claims and the digests of the
    other three: two pictures, and the result's arrays, from which the figure can be redrawn (records.py says which are
    rounded). It is renamed last, so where it stands, the others are whole. In `python -m compressible redraw` the
    record stays as it is but for the pictures and the notebook that drew them. Raises ValueError for a malformed id,
    ParameterError for a malformed preset, and for the name of one whose values are others than the result's; OSError
    where nothing can be written.
    """
    if not _ID.fullmatch(id):
        raise ValueError(f"id: got {id!r}, expected paper/NN_name such as 'kwon2024/05_completion'")
    parameters.validate({"preset": preset})
    path = paths.figures_dir() / preset / f"{id}.json"
    if place := records.redrawn_from():
        record = records.read(place, id, preset)
        _write(figure, path, record | {"notebook": runs.drawn_in(id)})
        return path
    label_guard.expect_own_label(id, preset, result.parameters)
    label_guard.warn_of_changed(result.parameters)
    _expect_room(path.parent)
    judged = claims.judge(id, result) if verdicts is None else verdicts
    metrics = result.metrics | _per_seed(result.arrays)
    arrays, told = records.pack(result.arrays)
    record = runs.provenance(result, preset, id)
    record |= {"metrics": _strict(metrics), "not_finite": records.not_finite(metrics)}
    record[records.DIGEST] = records.metrics_digest(record)
    _write(figure, path, record | {"claims": [asdict(verdict) for verdict in judged], "arrays": told}, arrays)
    return path


def _expect_room(folder: Path) -> None:
    """Raise OSError, with what to do, where no figure can be written: the notebook runs anew in seconds."""
    if reason := paths.unwritable(folder):
        told = f"figures cannot be written in {folder} ({reason}); COMPRESSIBLE_FIGURES names another place"
        raise OSError(f"{told}, and what was computed is in the cache, if that can be written")


def made_by(record: Path) -> dict[str, Any]:
    """What a record says of the making of its numbers, in short: of which code, where, how long, and the run's key."""
    provenance = json.loads(record.read_text(encoding="utf-8"))
    return {name: provenance[name] for name in _TOLD}


def _write(figure: Figure, path: Path, record: dict[str, Any], arrays: bytes | None = None) -> None:
    suffixes = (".json", *([] if arrays is None else [".npz"]), ".png", ".pdf")
    with ExitStack() as stack:
        # The stack unwinds backwards: the record, entered first, takes its place last.
        json_file, *npz, png, pdf = (
            stack.enter_context(paths.atomic_path(path.with_suffix(suffix))) for suffix in suffixes
        )
        _draw(figure, png, pdf, record["id"])
        for file in npz:
            file.write_bytes(arrays or b"")
        pictures = {"pdf": _sha256(pdf), "png": _sha256(png)}
        text = json.dumps(_strict(record | {"pictures": pictures}), indent=1, allow_nan=False)
        json_file.write_text(text + "\n", encoding="utf-8")
        path.unlink(missing_ok=True)


def _draw(figure: Figure, png: Path, pdf: Path, title: str) -> None:
    """Both pictures, without a date, so that the same figure gives the same bytes.

    The layout is settled once and then kept, since every draw would move it by another fraction of a pixel.
    """
    with mpl.rc_context(STYLE):
        lay_out(figure)
        figure.set_layout_engine("none")
        figure.savefig(png, dpi=160, metadata={"Title": title, "Software": "compressible"})
        figure.savefig(pdf, dpi=300, metadata={"Title": title, "Creator": "compressible", "CreationDate": None})


def _per_seed(arrays: dict[str, np.ndarray], most: int = 32) -> dict[str, list]:
    """Short one-dimensional arrays: a value for each seed, width or split. Curves are in the .npz file alone."""
    return {name: array.tolist() for name, array in arrays.items() if array.ndim == 1 and array.size <= most}


def _strict(value: Any) -> Any:
    """The same value for strict JSON: NaN and infinities become null."""
    if isinstance(value, dict):
        return {str(key): _strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
