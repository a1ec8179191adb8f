"""What several figures put around their curves: intervals as marks and as text, ticks, one legend for all panels."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.legend import Legend

from compressible.companion.claims import interval

__all__ = ["BARS", "interval_mark", "interval_text", "only_ticks", "search_curve", "shared_legend"]

BARS: Any = {"err_style": "bars", "marker": "o"}  # for over_seeds: a dot and a bar at each place, in place of a band


def interval_mark(ax: Axes, values: Any, y: float, **looks: Any) -> ErrorbarContainer:
    """A dot at the mean of `values` (seeds,) with its 95 % t interval to both sides, in the row at height `y`.

    `looks` are those of matplotlib's errorbar. Of one value there is the dot alone.
    """
    mean, low, high = interval(values)
    shown: Any = {"fmt": "o", "capsize": 2} | looks
    return ax.errorbar(mean, y, xerr=[[mean - low], [high - mean]], **shown)


def interval_text(values: Any, digits: int = 3) -> str:
    """The mean of `values` (seeds,) and its 95 % t interval, for a table.

    Example:
        >>> interval_text([1.0, 2.0, 3.0], digits=1)
        '2.0 [-0.5, 4.5]'
    """
    mean, low, high = interval(values)
    return f"{mean:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def only_ticks(axis: Axis, ticks: Sequence[float], labels: Iterable[str] | None = None) -> None:
    """Ticks at the values that were tried and no others, not even small ones, as on a logarithmic axis.

    Without `labels` they are labelled in plain numbers: 0.8, 1, 200.
    """
    axis.set_ticks(ticks, [f"{tick:g}" for tick in ticks] if labels is None else [*labels])
    axis.minorticks_off()


def search_curve(ax: Axes, tried: Any, scores: Any, chosen: float, color: str) -> None:
    """Scores of all settings that a search tried, with a triangle on the best of them, at the setting it chose."""
    ax.plot(tried, scores, "o-", markersize=2.5, color=color)
    ax.plot(chosen, max(scores), "^", color=color, markersize=6)


def shared_legend(figure: Figure, axes: Iterable[Axes], **options: Any) -> Legend:
    """One legend of a figure for what is drawn in several panels: each label once, in the order of their appearance.

    `options` are those of matplotlib's legend; where they do not say, it stands in one row or more below all panels.
    """
    pairs = (zip(*ax.get_legend_handles_labels(), strict=True) for ax in axes)
    marks = {label: mark for each in pairs for mark, label in each}
    shown: Any = {"loc": "outside lower center", "ncols": len(marks)} | options
    return figure.legend(marks.values(), marks.keys(), **shown)
