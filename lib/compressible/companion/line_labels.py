"""The label of each line beside its end, in the place of a legend."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.text import Annotation
from scipy.optimize import isotonic_regression

from compressible.companion.style import STYLE, lay_out


def label_lines(ax: Axes, gap: float = 4.0) -> list[Annotation]:
    """Write the label of each line that has one beside its end, in its colour, moved up or down not to overlap.

    `gap` is in points. Call it last: positions are solved in pixels for the limits, scales and size of then.
    """
    shown = [line for line in ax.get_lines() if not str(line.get_label()).startswith("_")]
    ends = [(line, end) for line in shown if (end := _last_point(ax, line)) is not None]
    with mpl.rc_context(STYLE):
        notes = [_note(ax, line, end, gap) for line, end in ends]
        lay_out(cast(Figure, ax.figure))
    boxes = [note.get_window_extent() for note in notes]
    for group in _columns(boxes):
        _spread(ax, [notes[i] for i in group], [boxes[i] for i in group])
    return notes


def _last_point(ax: Axes, line: Line2D) -> np.ndarray | None:
    """Display coordinates of the last point that has any, its height kept inside the axes."""
    points = ax.transData.transform(np.asarray(line.get_xydata(), float))
    points = points[np.isfinite(points).all(1)]
    box = ax.get_window_extent()
    points = points[(points[:, 0] >= box.x0 - 1) & (points[:, 0] <= box.x1 + 1)]
    return np.array([points[-1, 0], np.clip(points[-1, 1], box.y0, box.y1)]) if len(points) else None


def _note(ax: Axes, line: Line2D, end: np.ndarray, gap: float) -> Annotation:
    return ax.annotate(
        str(line.get_label()), tuple(ax.transAxes.inverted().transform(end)), xycoords="axes fraction",
        xytext=(gap, 0), textcoords="offset points", va="center", ha="left", color=line.get_color(),
        annotation_clip=False, path_effects=[withStroke(linewidth=2, foreground="white")],
    )  # fmt: skip


def _columns(boxes: Sequence[Any]) -> list[list[int]]:
    """Indices of boxes, grouped so that boxes of different groups share no horizontal extent."""
    groups: list[list[int]] = []
    reach = -math.inf
    for i in sorted(range(len(boxes)), key=lambda i: boxes[i].x0):
        if boxes[i].x0 > reach:
            groups.append([])
        groups[-1].append(i)
        reach = max(reach, boxes[i].x1)
    return groups


def _spread(ax: Axes, notes: Sequence[Annotation], boxes: Sequence[Any]) -> None:
    """Least-squares move of the notes up and down that keeps them apart and beside the axes."""
    centres = np.array([(box.y0 + box.y1) / 2 for box in boxes])
    heights = np.array([box.height for box in boxes])
    order = np.argsort(centres, kind="stable")
    steps = (heights[order][1:] + heights[order][:-1]) / 2
    offsets = np.concatenate([[0.0], np.cumsum(steps)])
    frame = ax.get_window_extent()
    low, high = frame.y0 + heights[order[0]] / 2, frame.y1 - heights[order[-1]] / 2 - offsets[-1]
    solved = isotonic_regression(centres[order] - offsets).x.clip(low, max(low, high)) + offsets
    to_points = 72 / ax.figure.dpi
    for i, target in zip(order, solved, strict=True):
        x, y = notes[i].xyann
        notes[i].xyann = (x, y + (target - centres[i]) * to_points)
