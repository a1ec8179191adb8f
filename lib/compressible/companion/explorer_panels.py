"""The panels of an explorer: each is drawn once, and moves to an iteration by changing what depends on it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from compressible.companion import figures
from compressible.companion.palette import COLORS, PALETTE, colors

Arrays = Mapping[str, np.ndarray]
Move = Callable[[float], None]
_LEAST = 1e-17  # below any rounding: where a logarithmic axis shows a zero


def networks(arrays: Arrays) -> list[str]:
    """Names of the networks whose curves are there: error, loss and the iterations of both; the original first."""
    names = [key.removesuffix("/error") for key in arrays if key.endswith("/error")]
    whole = [name for name in names if {f"{name}/loss", f"{name}/iterations"} <= arrays.keys()]
    curves = [name for name in whole if "/" not in name and _are_curves(arrays, name)]
    return sorted(curves, key=lambda name: name != "original")


def _are_curves(arrays: Arrays, name: str) -> bool:
    """Whether they are curves (S, T) over iterations (T,), and not a value for each width, say."""
    times = np.shape(arrays[f"{name}/iterations"])
    shapes = [np.shape(arrays[f"{name}/{of}"]) for of in ("error", "loss")]
    return len(times) == 1 and all(len(shape) == 2 and shape[1:] == times for shape in shapes)


def iterations(arrays: Arrays, names: Sequence[str]) -> np.ndarray:
    """The recorded iterations of networks, from a little before the first error begins to fall: before, all stands."""
    times = np.unique(np.concatenate([arrays[f"{name}/iterations"] for name in names]))
    falls = [_fall(arrays[f"{name}/iterations"], arrays[f"{name}/error"]) for name in names]
    return times[times >= min(falls) - 0.2 * (times[-1] - min(falls))]


def _fall(times: np.ndarray, errors: np.ndarray) -> float:
    """The last iteration at which no seed's error (S, T) has fallen by 1 %."""
    fallen = np.flatnonzero((errors < 0.99 * errors[:, :1]).any(0))
    return float(times[max(0, fallen[0] - 1)] if len(fallen) else times[0])


def draw_layer(arrays: Arrays, seed: int, layer: int) -> tuple[Any, list[Move]]:
    """Singular values of a layer, how far its vectors have turned, how far its middle values are from the theory."""
    figure, (left, middle, right) = figures.panels(3, height=2.6)
    values, rhos = arrays[f"values_{layer}"][seed], arrays["rhos"][:, layer - 1]  # (T, d), (T,)
    rank = arrays[f"right_{layer}"].shape[-1] // 2
    off = np.abs(values[:, rank:-rank] - rhos[:, None]).max(1)
    moves = [_values(left, values, rhos, rank), _angles(middle, arrays, seed, layer, rank)]
    moves.append(_curves(right, {"middle values": (np.arange(len(off)), off)}, {"middle values": COLORS["baseline"]}))
    right.set(title="Off the recursion", xlabel="iteration", ylabel="largest deviation")
    return figure, moves


def draw_networks(arrays: Arrays, names: Sequence[str], seed: int) -> tuple[Any, list[Move]]:
    """Error and loss of each network, and where it is there, the norm of what lies between their products."""
    differ = {"gap", "theory", "marks", "size"} <= arrays.keys()
    figure, axes = figures.panels(2 + differ, height=2.6)
    shades = colors(names)
    moves = []
    for ax, what in zip(axes, ("error", "loss"), strict=False):
        found = {name: (arrays[f"{name}/iterations"], arrays[f"{name}/{what}"][seed]) for name in names}
        moves.append(_curves(ax, found, shades))
        ax.set(title=what.capitalize(), xlabel="iteration", ylabel="half mean square")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(names))
    moves += [_difference(axes[2], arrays, seed)] if differ else []
    shown = iterations(arrays, names)
    for ax in axes:
        ax.set_xlim(shown[0], shown[-1] + 0.02 * (shown[-1] - shown[0]))
    return figure, moves


def _values(ax: Axes, values: np.ndarray, rhos: np.ndarray, rank: int) -> Move:
    count = values.shape[1]
    groups = {"top r": (0, rank, PALETTE[0]), "the others": (rank, count - rank, COLORS["baseline"]),
              "bottom r": (count - rank, count, PALETTE[1])}  # fmt: skip
    points = [(ax.plot(np.arange(first, last) + 1, values[0, first:last], "o", color=color, label=name)[0], first, last)
              for name, (first, last, color) in groups.items()]  # fmt: skip
    line = ax.axhline(rhos[0], color="k", linestyle=":", label="recursion")
    low, high = values.min(), values.max()
    ax.set(title="Singular values", xlabel="index", ylabel="value")
    ax.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))
    ax.legend(loc="upper right")

    def move(iteration: float) -> None:
        for shown, first, last in points:
            shown.set_ydata(values[int(iteration), first:last])
        line.set_ydata([rhos[int(iteration)]] * 2)

    return move


def _angles(ax: Axes, arrays: Arrays, seed: int, layer: int, rank: int) -> Move:
    """Angles (T, 2r + 1) of the top r, the middle subspace and the bottom r to where they were at iteration 1."""
    for side, dash in (("right", "-"), ("left", "--")):
        turned = arrays[f"{side}_{layer}"][seed]
        shades = [PALETTE[0]] * rank + [COLORS["baseline"]] + [PALETTE[1]] * rank
        for column, color in enumerate(shades):
            ax.plot(np.arange(1, len(turned)), turned[1:, column], dash, color=color, linewidth=1)
        ax.plot([], [], dash, color="k", linewidth=1, label=f"{side} vectors")
    ax.set(title="Angles", xlabel="iteration", ylabel="turned since iteration 1 (rad)")
    ax.set_ylim(top=1.4 * ax.get_ylim()[1])  # room for the legend
    ax.legend(loc="upper left")
    return _moving_line(ax)


def _difference(ax: Axes, arrays: Arrays, seed: int) -> Move:
    marks, theory = arrays["marks"][seed], np.maximum(arrays["theory"][seed], _LEAST)
    ax.plot(marks, arrays["size"][seed], color=COLORS["original"], linewidth=2, label="original")
    ax.plot(marks, np.maximum(arrays["gap"][seed], _LEAST), "o", color=COLORS["compressed"], label="minus compressed")
    ax.plot(marks, theory, "k--", linewidth=1, label="the same, exact")
    ax.set(title="Products", xlabel="iteration", ylabel="norm over the target's", yscale="log")
    ax.set_ylim(0.01 * theory.min(), 1e6)  # room for the legend
    ax.legend(loc="upper left")
    return _moving_line(ax)


def _curves(ax: Axes, found: Mapping[str, tuple[np.ndarray, np.ndarray]], shades: Mapping[str, str]) -> Move:
    """Curves over iterations on a logarithmic axis, with a point of each where the slider stands."""
    points = []
    for k, (name, (times, values)) in enumerate(found.items()):
        height = np.maximum(values, _LEAST)  # NaN, where a run diverged, stays NaN
        looks: Any = {"color": shades[name], "linestyle": "--" if k else "-", "linewidth": 1.5 if k else 2.5}
        ax.plot(times, height, label=name, **looks)
        points.append((ax.plot(times[:1], height[:1], "o", color=shades[name])[0], times, height))
    ax.set_yscale("log")
    follow = _moving_line(ax)

    def move(iteration: float) -> None:
        follow(iteration)
        for point, times, height in points:
            last = max(0, int(np.searchsorted(times, iteration, side="right")) - 1)
            point.set_data([times[last]], [height[last]])

    return move


def _moving_line(ax: Axes) -> Move:
    line = ax.axvline(0, color=COLORS["baseline"], linewidth=0.8)

    def move(iteration: float) -> None:
        line.set_xdata([iteration, iteration])

    return move
