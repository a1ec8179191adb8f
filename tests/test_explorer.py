"""The explorer of a recorded run: what it shows, how its controls move it, and the picture beside the widget."""

from __future__ import annotations

import base64
import io
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import REPOSITORY
from PIL import Image

from compressible.companion.explorer import Explorer, explore
from compressible.companion.explorer_panels import draw_layer, draw_networks
from compressible.companion.records import RecordError

LAYERS, NETWORKS = "yaras2024/03_svd_evolution", "yaras2024/06_compressed_factorization"
VIEW = "application/vnd.jupyter.widget-view+json"


@pytest.fixture(autouse=True)
def in_the_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.delenv("COMPRESSIBLE_FIGURES", raising=False)


def arrays(id: str) -> dict[str, np.ndarray]:
    with np.load(REPOSITORY / "figures" / "paper" / f"{id}.npz") as kept:
        return {name: kept[name] for name in kept.files}


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


@pytest.mark.parametrize(("id", "layers", "networks"), [(LAYERS, 3, []), (NETWORKS, 0, ["original", "compressed"])])
def test_a_record_is_found_by_its_id_and_by_its_path(id: str, layers: int, networks: list[str]) -> None:
    for source in (id, REPOSITORY / "figures" / "paper" / f"{id}.json"):
        found = explore(source)
        assert (found.layers, found.networks) == (layers, networks)
        assert found.seeds in (5, 10) and len(found.iterations) > 5


def test_a_record_is_read_wherever_it_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for suffix in (".json", ".npz"):
        shutil.copy(REPOSITORY / "figures" / "paper" / f"{LAYERS}{suffix}", tmp_path)
    name = Path(LAYERS).name + ".json"
    assert explore(str(tmp_path / name)).layers == 3  # as text, and as a copy
    monkeypatch.chdir(tmp_path)
    assert explore(Path(name)).layers == explore(name).layers == 3


def test_the_slider_moves_what_is_drawn_to_the_recorded_values() -> None:
    kept = arrays(LAYERS)
    figure, moves = draw_layer(kept, seed=2, layer=1)
    for iteration in (0, 17, 50):
        for move in moves:
            move(iteration)
        points = [line.get_ydata() for line in figure.axes[0].get_lines() if line.get_marker() == "o"]
        assert np.array_equal(np.concatenate(points), kept["values_1"][2, iteration])
        assert figure.axes[1].get_lines()[-1].get_xdata() == [iteration, iteration]


def test_original_and_compressed_stand_at_their_last_record() -> None:
    kept = arrays(NETWORKS)
    figure, moves = draw_networks(kept, ["original", "compressed"], seed=1)
    times = kept["original/iterations"]
    for move in moves:
        move(times[-3] + 1)
    points = [line for line in figure.axes[0].get_lines() if line.get_marker() == "o"]
    heights = [kept[f"{name}/error"][1, -3] for name in ("original", "compressed")]
    assert [point.get_xdata()[0] for point in points] == [times[-3]] * 2
    assert [point.get_ydata()[0] for point in points] == heights


def test_controls_change_the_picture_and_come_back_to_it() -> None:
    found = explore(LAYERS)
    box = found.widget()
    (slider, lists, image), first = box.children, box.children[2].value
    seed, layer = lists.children
    slider.value = 40
    moved = image.value
    assert found.shown["iteration"] == 40 and not np.array_equal(pixels(moved), pixels(first))
    seed.value = 3
    layer.value = 2
    assert found.shown == {"iteration": 40, "seed": 3, "layer": 2}
    seed.value, layer.value = 0, 1
    assert np.array_equal(pixels(image.value), pixels(moved))


def test_a_page_gets_the_picture_beside_the_widget(monkeypatch: pytest.MonkeyPatch) -> None:
    found = explore(NETWORKS)
    bundle = found._repr_mimebundle_()
    assert VIEW in bundle and pixels(base64.b64decode(bundle["image/png"])).std() > 0
    monkeypatch.setattr(Explorer, "widget", lambda self: (_ for _ in ()).throw(ImportError("no ipywidgets")))
    assert set(found._repr_mimebundle_()) == {"text/plain", "image/png"}


def test_runs_that_diverged_and_runs_of_other_lengths_are_shown() -> None:
    curves = {"a/iterations": np.arange(4), "b/iterations": np.arange(6)}
    for name, count in (("a", 4), ("b", 6)):
        curves |= {f"{name}/{what}": np.geomspace(1, 1e-3, count)[None] for what in ("error", "loss")}
    curves["a/error"][0, -1] = np.nan
    found = explore(curves)
    assert found.iterations.tolist() == [0, 1, 2, 3, 4, 5]
    assert pixels(found.picture(5)).std() > 0


@pytest.mark.parametrize(
    ("source", "options", "told"),
    [
        ({"values": np.ones(3)}, {}, r"got \['values'\], expected values_1"),
        ("yaras2024/02_depth_and_width", {}, r"expected values_1, .*<name>/error"),  # a value for each width and trial
        (LAYERS, {"seed": 10}, "seed is 10, expected an integer from 0 to 9"),
        ("yaras2024/03_svd", {}, "there is no record"),
        (LAYERS, {"preset": "none"}, "there is no record"),
        ("03_svd_evolution", {}, f"under 'paper'; the closest is '{LAYERS}'"),
        ("nowhere/record.json", {}, "there is no record nowhere/record.json"),
        (None, {}, "source is None, expected a record's path, a figure's id"),
    ],
)
def test_what_cannot_be_shown_is_refused(source: object, options: dict, told: str) -> None:
    with pytest.raises((ValueError, RecordError), match=told):
        explore(source, **options)


@pytest.mark.parametrize("asked", [
    {"iteration": -1}, {"iteration": 1e9}, {"iteration": float("nan")}, {"seed": 10}, {"layer": 0}, {"layer": 9},
])  # fmt: skip
def test_a_picture_of_what_was_not_recorded_is_refused_and_nothing_moves(asked: dict) -> None:
    explorer = explore(LAYERS)
    before = dict(explorer.shown)
    ((name, value),) = asked.items()
    with pytest.raises(ValueError, match=re.escape(f"{name} is {value!r}, expected ")):
        explorer.picture(**asked)
    assert explorer.shown == before


def test_refreshed_notebooks_keep_the_picture_and_not_the_widget(add_notebook) -> None:
    import nbformat

    from compressible.companion import batch, notebooks

    id = add_notebook(
        "01_good", f"from IPython.display import display\ndisplay({{'{VIEW}': {{}}, 'text/plain': 'it'}}, raw=True)"
    )
    batch.refresh(id)
    content = nbformat.read(Path(notebooks.notebook_path(id)), as_version=4)
    assert [dict(output.data) for output in content.cells[-1].outputs] == [{"text/plain": "it"}]
