"""What stands around the curves: intervals as marks and as text, ticks, one legend for several panels."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from scipy import stats

from compressible.companion import figures


@pytest.fixture
def ax() -> Axes:
    """A panel of its own."""
    return figures.panels()[1]


def drawn_labels(axis) -> list[str]:
    axis.figure.draw_without_rendering()
    return [text.get_text() for text in axis.get_ticklabels()]


def test_an_interval_mark_is_the_mean_and_the_t_interval_in_its_row(ax: Axes) -> None:
    values = np.array([1.0, 2.0, 6.0, 7.0])
    dot, caps, (bar,) = figures.interval_mark(ax, values, 3, color="red", label="gain")
    low, high = stats.t.interval(0.95, 3, values.mean(), stats.sem(values))
    assert dot.get_xydata().tolist() == [[4.0, 3.0]]
    assert np.allclose(bar.get_segments()[0], [[low, 3], [high, 3]])
    assert (len(caps), dot.get_color(), ax.get_legend_handles_labels()[1]) == (2, "red", ["gain"])


def test_an_interval_mark_of_one_value_is_the_dot_alone(ax: Axes) -> None:
    dot, _, (bar,) = figures.interval_mark(ax, [5.0], 0)
    assert dot.get_xydata().tolist() == [[5.0, 0.0]]
    assert not any(np.isfinite(segment).all() for segment in bar.get_segments() if len(segment))


@pytest.mark.parametrize(
    ("values", "digits", "text"),
    [([1.0, 3.0], 1, "2.0 [-10.7, 14.7]"), ([0.25, 0.25, 0.25], 3, "0.250 [0.250, 0.250]"), ([4], 0, "4 [nan, nan]")],
)
def test_an_interval_is_told_with_its_digits(values: list[float], digits: int, text: str) -> None:
    assert figures.interval_text(values, digits) == text


@pytest.mark.parametrize(
    ("ticks", "labels", "told"),
    [([0.5, 2, 64], None, ["0.5", "2", "64"]), ([1, 10], iter(["one", "ten"]), ["one", "ten"])],
)
def test_a_logarithmic_axis_has_only_the_ticks_that_it_was_given(ax: Axes, ticks, labels, told: list[str]) -> None:
    ax.plot([0.5, 64], [1, 100])
    ax.set(xscale="log", yscale="log")
    others = ax.yaxis.get_minorticklocs().tolist()
    figures.only_ticks(ax.xaxis, ticks, labels)
    assert drawn_labels(ax.xaxis) == told
    assert ax.xaxis.get_majorticklocs().tolist() == ticks
    assert ax.xaxis.get_minorticklocs().tolist() == []
    assert ax.yaxis.get_minorticklocs().tolist() == others != []


def test_a_search_shows_what_was_tried_and_its_best(ax: Axes) -> None:
    figures.search_curve(ax, np.array([1e-3, 1e-2, 1e-1]), np.array([0.2, 0.9, 0.4]), np.array([1e-2]), "green")
    curve, best = ax.get_lines()
    assert curve.get_xydata().tolist() == [[1e-3, 0.2], [1e-2, 0.9], [1e-1, 0.4]]
    assert (best.get_xydata().tolist(), best.get_marker()) == ([[1e-2, 0.9]], "^")


def test_a_shared_legend_names_each_label_once_in_the_order_of_the_panels() -> None:
    figure, (one, two) = figures.panels(2)
    one.plot([0, 1], color="blue", label="original")
    one.plot([0, 2], color="black", label="_hidden")
    two.plot([0, 1], color="red", label="compressed")
    two.plot([0, 1], color="blue", label="original")
    legend = figures.shared_legend(figure, [one, two])
    assert [text.get_text() for text in legend.get_texts()] == ["original", "compressed"]
    assert [line.get_color() for line in legend.get_lines()] == ["blue", "red"]
    figure.draw_without_rendering()
    first, second = (text.get_window_extent() for text in legend.get_texts())
    assert first.y0 == second.y0, "in one row"
    assert legend.get_window_extent().y1 < one.get_tightbbox().y0, "below all panels"
    legend = figures.shared_legend(figure, [one, two], loc="outside upper left", ncols=1)
    figure.draw_without_rendering()
    first, second = (text.get_window_extent() for text in legend.get_texts())
    assert first.y0 > second.y1 > one.get_tightbbox().y1, "above all panels, one below the other"


def test_dots_with_bars_are_drawn_at_each_place(ax: Axes) -> None:
    line = figures.over_seeds(ax, [1, 2], [[1, 4], [3, 8]], "red", "gain", **figures.BARS)
    assert line.get_marker() == "o"
    assert len(ax.containers) == 1


def test_a_record_tells_in_short_how_it_was_made(tmp_path: Path) -> None:
    told = {"commit": "a1", "dirty": False, "device": "cpu", "threads": 1, "wall_seconds": 2.5}
    told |= {"peak_memory_bytes": 7, "run": "k"}
    record = tmp_path / "record.json"
    record.write_text(json.dumps(told | {"id": "kwon2024/05_completion", "metrics": {}}))
    assert figures.made_by(record) == told
