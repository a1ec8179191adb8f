"""The one style of all figures, and their layout."""

from __future__ import annotations

import warnings
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import seaborn as sns
from matplotlib.figure import Figure

from compressible.companion.palette import PALETTE

_TICKS = {"major.size": 3.5, "major.width": 0.8, "minor.size": 2, "minor.width": 0.6}
# What belongs to the session rather than to a picture.
_NO_STYLE = (
    "backend",
    "date.epoch",
    "docstring",
    "interactive",
    "keymap",
    "macosx",
    "timezone",
    "tk.",
    "toolbar",
    "webagg",
)


def _defaults() -> dict[str, Any]:
    """Matplotlib's own settings of pictures, whatever the user's matplotlibrc says."""
    names = [name for name in mpl.rcParamsDefault if not name.startswith(_NO_STYLE)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", mpl.MatplotlibDeprecationWarning)
        return {name: mpl.rcParamsDefault[name] for name in names}


# Matplotlib's defaults, seaborn's theme for papers, and what this project wants otherwise.
STYLE: Any = {
    **_defaults(),
    **sns.axes_style("whitegrid"),
    **sns.plotting_context("paper"),
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 8,
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 8,
    "axes.edgecolor": "black",
    "axes.linewidth": 0.8,
    "axes.prop_cycle": plt.cycler(color=PALETTE),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.6,
    "lines.markersize": 4,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "legend.title_fontsize": 8,
    "xtick.bottom": True,
    "xtick.labelsize": 7.5,
    "ytick.left": True,
    "ytick.labelsize": 7.5,
    **{f"{axis}tick.{name}": size for axis in "xy" for name, size in _TICKS.items()},
    "figure.dpi": 110,
    "savefig.facecolor": "white",
    "figure.constrained_layout.use": True,
    "figure.constrained_layout.w_pad": 0.08,
    "pdf.fonttype": 42,
    "svg.hashsalt": "compressible",
}


def lay_out(figure: Figure) -> None:
    """Place everything; ValueError that names the axes where a logarithmic one has no value to show."""
    try:
        figure.draw_without_rendering()
    except ValueError as error:
        if "log-scaled" not in str(error):
            raise
        logarithmic = [ax for ax in figure.axes if "log" in (ax.get_xscale(), ax.get_yscale())]
        where = f"one of the logarithmic panels {', '.join(repr(ax.get_title('left')) for ax in logarithmic)}"
        why = "every run diverged, or the values are impossible: lower step_size or outer_ratio"
        raise ValueError(f"{where} has no value that is finite and above 0, expected one: {why}") from error
