"""A recorded run to move through: a slider over its iterations, beside a picture for where no kernel runs.

It shows what the arrays of a record hold. Of the singular triplets of layers (`values_k`, `right_k`, `left_k`, as
yaras2024/03_svd_evolution records them): the values at an iteration, the angles by which vectors have turned, and how
far the values that should not move are from the recursion. Of networks that were compared (`<name>/error`,
`<name>/loss`, as yaras2024/06_compressed_factorization records them): error and loss of each, original against
compressed, and the norm of their difference beside what the theory says.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from compressible.companion import records
from compressible.companion.explorer_panels import Arrays, Move, draw_layer, draw_networks, iterations, networks
from compressible.runtime import checks, paths

__all__ = ["Explorer", "explore"]

_VIEW = "application/vnd.jupyter.widget-view+json"


def explore(source: str | Path | Arrays, preset: str = "paper", seed: int = 0) -> Explorer:
    """An explorer of a recorded run, which JupyterLab shows as a widget and a page without a kernel as a picture.

    Args:
        source: a record's path, also as text, a figure's id such as "yaras2024/03_svd_evolution", or the arrays
            themselves.
        preset: whose record, where `source` is an id.
        seed: which of the recorded seeds is shown first, from 0.

    Returns:
        The explorer; `Explorer.picture` gives it as PNG at any iteration.

    Raises:
        RecordError: there is no such record, or it was altered.
        ValueError: its arrays hold neither layers nor networks, or there is no such seed.

    Example:
        >>> curves = {f"{name}/{what}": np.ones((2, 3)) for name in ("a", "b") for what in ("error", "loss")}
        >>> explore(curves | {f"{name}/iterations": np.arange(3) for name in ("a", "b")}).iterations.tolist()
        [0, 1, 2]
    """
    return Explorer(source if isinstance(source, Mapping) else _arrays(source, preset), seed)


class Explorer:
    """Panels of a run at one iteration, and the controls that move them."""

    def __init__(self, arrays: Arrays, seed: int = 0) -> None:
        """Hold the arrays, (seeds, ...) each; ValueError where they hold nothing that can be shown."""
        self._arrays = dict(arrays)
        self.layers = sum(f"values_{k}" in arrays for k in range(1, 1 + len(arrays))) if "rhos" in arrays else 0
        self.networks = networks(arrays)
        if not self.layers and not self.networks:
            expected = "values_1, right_1, left_1 or <name>/error, <name>/loss, <name>/iterations"
            raise ValueError(f"arrays: got {checks.shown(list(arrays))}, expected {expected}")
        self.seeds = len(arrays["values_1"] if self.layers else arrays[f"{self.networks[0]}/error"])
        checks.expect_integer("seed", seed, 0, self.seeds - 1)
        self.iterations = self._times()
        self.shown = {"iteration": self.iterations[len(self.iterations) // 2].item(), "seed": int(seed), "layer": 1}
        self._drawn: tuple[Any, list[Move], tuple[int, int]] | None = None

    def picture(self, iteration: float | None = None, seed: int | None = None, layer: int | None = None) -> bytes:
        """PNG of the panels at an iteration; what is not given stays as it was shown last.

        Raises ValueError for what was not recorded: another seed or layer, from 1, or an iteration outside of the run.
        """
        given = {"iteration": iteration, "seed": seed, "layer": layer}
        asked = {name: value for name, value in given.items() if value is not None}
        self._expect_recorded(**self.shown | asked)
        self.shown |= asked
        figure, moves = self._figure()
        for move in moves:
            move(self.shown["iteration"])
        stream = io.BytesIO()
        figure.savefig(stream, format="png", dpi=100)
        return stream.getvalue()

    def widget(self) -> Any:
        """The controls over the picture, by ipywidgets: iteration, seed, and layer where there are several."""
        import ipywidgets

        options = [(f"{time:g}", time) for time in self.iterations.tolist()]
        wide = {"layout": {"width": "95%"}}
        slider = ipywidgets.SelectionSlider(options=options, description="iteration", **wide)
        choices = {"seed": range(self.seeds), "layer": range(1, self.layers + 1)}
        lists = [ipywidgets.Dropdown(options=list(n), description=name) for name, n in choices.items() if len(n) > 1]
        image = ipywidgets.Image(value=self.picture(), format="png", **wide)
        for control in (slider, *lists):
            control.value = self.shown[control.description]
            control.observe(lambda change: self._show(image, change), "value")
        return ipywidgets.VBox([slider, ipywidgets.HBox(lists), image])

    def _show(self, image: Any, change: Any) -> None:
        image.value = self.picture(**{change.owner.description: change.new})

    def _repr_mimebundle_(self, **_: Any) -> dict[str, Any]:
        """The picture, and beside it the widget where ipywidgets is installed."""
        bundle: dict[str, Any] = {"text/plain": repr(self), "image/png": base64.b64encode(self.picture()).decode()}
        try:
            widget = self.widget()
        except ImportError:
            return bundle
        return bundle | {_VIEW: widget._repr_mimebundle_()[_VIEW]}

    def __repr__(self) -> str:
        what = f"{self.layers} layers" if self.layers else ", ".join(self.networks)
        return f"Explorer of {what}: {self.seeds} seeds, {len(self.iterations)} iterations"

    def _expect_recorded(self, iteration: float, seed: int, layer: int) -> None:
        checks.expect_integer("seed", seed, 0, self.seeds - 1)
        checks.expect_integer("layer", layer, 1, max(1, self.layers))
        first, last = self.iterations[[0, -1]].tolist()
        checks.expect("iteration", iteration, first <= iteration <= last, f"{first:g} to {last:g}")

    def _times(self) -> np.ndarray:
        if self.layers:
            return np.arange(self._arrays["values_1"].shape[1])
        return iterations(self._arrays, self.networks)

    def _figure(self) -> tuple[Any, list[Move]]:
        """The figure and how its panels move, kept while seed and layer stay."""
        key = self.shown["seed"], self.shown["layer"]
        if self._drawn is None or self._drawn[2] != key:
            drawn = (
                draw_layer(self._arrays, *key) if self.layers else draw_networks(self._arrays, self.networks, key[0])
            )
            figure, moves = drawn
            for move in moves:
                move(self.shown["iteration"])
            figure.draw_without_rendering()
            figure.set_layout_engine("none")  # the panels stand still while the slider moves
            self._drawn = figure, moves, key
        return self._drawn[:2]


def _arrays(source: str | Path, preset: str) -> Arrays:
    checks.expect("source", source, isinstance(source, str | Path), "a record's path, a figure's id, or arrays by name")
    if isinstance(source, Path) or source.endswith(".json"):
        path = Path(source).expanduser()
        found = records.read(path)
    else:
        path = _place(source, preset)
        found = records.read(path, source, preset)
    kept = records.read_arrays(path, found)[0]
    return dict(dict.items(kept))  # not .items(), which asks for those, too, that were too large to keep


def _place(id: str, preset: str) -> Path:
    """The record of one's own figures, or else the committed one. Raises RecordError, with a close id, without it."""
    roots = [root / preset for root in (paths.figures_dir(), paths.repository() / "figures")]
    for root in roots:
        if (root / f"{id}.json").is_file():
            return root / f"{id}.json"
    known = {f"{file.parent.name}/{file.stem}" for root in roots for file in records.files_below(root, ".json")}
    raise records.RecordError(f"there is no record of {id} under {preset!r}{checks.closest(id, known)}")
