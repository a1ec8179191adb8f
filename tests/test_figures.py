"""Figures are saved whole with their record, the same twice, and their labels keep clear of each other."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.figure import Figure

from compressible.companion import figures, records, runs
from compressible.companion.claims import rules as claims
from compressible.companion.parameters import ParameterError

ID = "kwon2024/05_completion"


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Cache and figures in a folder of the test, matplotlib as it was afterwards."""
    monkeypatch.setenv("COMPRESSIBLE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COMPRESSIBLE_FIGURES", str(tmp_path / "figures"))
    with mpl.rc_context({"backend": "agg"}):
        yield tmp_path / "figures"
    plt.close("all")


def work(rank: int) -> dict[str, Any]:
    many = [1.0, float("nan")]
    lines = {"curve": np.ones(100), "loss": np.ones(rank)}
    return lines | {"ratio": 0.5, "gap": float("inf"), "names": ["a"], "many": many}


@pytest.fixture
def result() -> runs.Result:
    """A small result."""
    return runs.run(work, rank=3)


def draw(ends: tuple[float, ...] = (1e-6, 1.1e-6, 1.2e-6), scale: str = "log") -> Figure:
    figure, axes = figures.panels(2)
    for ax in axes:
        for number, end in enumerate(ends):
            ax.plot([0, 10], [1, end], color=figures.PALETTE[number], label=f"curve {number}")
        ax.set(yscale=scale, xlabel="iteration", ylabel="recovery error", title="Curves")
    return figure


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_save_writes_two_pictures_arrays_and_a_record(places: Path, result: runs.Result) -> None:
    path = figures.save(draw(), ID, "quick", result, verdicts=[])
    assert path == places / "quick" / "kwon2024" / "05_completion.json"
    assert sorted(file.suffix for file in path.parent.iterdir()) == [".json", ".npz", ".pdf", ".png"]
    record = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert record["pictures"] == {kind: digest(path.with_suffix(f".{kind}")) for kind in ("pdf", "png")}
    assert record["arrays"] == {"sha256": digest(path.with_suffix(".npz")), "float32": [], "left_out": []}
    with np.load(path.with_suffix(".npz")) as arrays:
        assert {name: arrays[name].shape for name in arrays} == {"curve": (100,), "loss": (3,)}
    plain = {"ratio": 0.5, "gap": None, "names": ["a"], "many": [1.0, None]}
    assert record["metrics"] == plain | {"loss": [1.0, 1.0, 1.0]}, "curves are in the file of arrays alone"
    assert record["not_finite"] == {"gap": "Infinity", "many": "[1.0, NaN]"}
    assert record["metrics_digest"] == records.metrics_digest(record), "of what is read again"
    assert (record["id"], record["preset"], record["run"]) == (ID, "quick", result.key)
    assert path.with_suffix(".pdf").read_bytes().startswith(b"%PDF")
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_the_same_figure_gives_the_same_bytes(result: runs.Result) -> None:
    figure = draw()
    saved = [figures.save(each, ID, "quick", result, []).read_text() for each in (figure, figure, draw())]
    first, again, anew = (json.loads(text)["pictures"] for text in saved)
    assert first == again == anew


def test_claims_are_judged_on_the_way(result: runs.Result, monkeypatch: pytest.MonkeyPatch) -> None:
    told: Any = {"unit": "seed", "group": "own", "bound_from": "a margin"}
    claim = claims.Claim(f"{ID}.half", "P2", "a half", "ratio", "at_most", "here", bound=0.6, **told)
    monkeypatch.setattr(claims, "load_claims", lambda: [claim])
    record = json.loads(figures.save(draw(), ID, "quick", result).read_text())
    assert [(v["id"], v["verdict"], v["value"]) for v in record["claims"]] == [(f"{ID}.half", "PASS", 0.5)]


@pytest.mark.parametrize("id", ["05_completion", "kwon2024/completion", "../x/05_a", "a/05_a/b", "Kwon/05_a"])
def test_malformed_ids_are_refused(id: str, result: runs.Result, places: Path) -> None:
    with pytest.raises(ValueError, match="expected paper/NN_name"):
        figures.save(draw(), id, "quick", result)
    assert not places.exists()


def test_malformed_presets_are_refused(result: runs.Result) -> None:
    with pytest.raises(ParameterError, match="preset"):
        figures.save(draw(), ID, "../paper", result)


def test_a_place_that_takes_no_figure_is_said_with_what_to_do(
    result: runs.Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("COMPRESSIBLE_FIGURES", str(tmp_path / "file"))
    with pytest.raises(
        OSError, match=r"figures cannot be written in .*file/quick/.*COMPRESSIBLE_FIGURES names another"
    ):
        figures.save(draw(), ID, "quick", result, [])


def test_a_failing_save_leaves_the_former_files(result: runs.Result, monkeypatch: pytest.MonkeyPatch) -> None:
    path = figures.save(draw(), ID, "quick", result, verdicts=[])
    before = {file.name: digest(file) for file in path.parent.iterdir()}
    broken = draw((1.0,))
    whole = Figure.savefig

    def no_pdf(self: Figure, file: Path, **options: Any) -> None:
        if file.suffix == ".pdf":
            raise OSError("disk full")
        whole(self, file, **options)

    monkeypatch.setattr(Figure, "savefig", no_pdf)
    with pytest.raises(OSError, match="disk full"):
        figures.save(broken, ID, "quick", result, verdicts=[])
    assert {file.name: digest(file) for file in path.parent.iterdir()} == before


def boxes(figure: Figure, notes: list) -> list:
    figure.draw_without_rendering()
    return [note.get_window_extent() for note in notes]


@pytest.mark.parametrize("scale", ["log", "linear"])
@pytest.mark.parametrize("ends", [(1e-6, 1.1e-6, 1.2e-6), (1.0, 1.0, 1.0, 1.0), (1e-6, 1e-3, 1.0), (0.5,)])
def test_labels_stand_apart_beside_the_axes(ends: tuple[float, ...], scale: str) -> None:
    figure = draw(ends, scale)
    ax = figure.axes[0]
    notes = figures.label_lines(ax)
    assert [note.get_text() for note in notes] == [f"curve {i}" for i in range(len(ends))]
    assert [note.get_color() for note in notes] == [line.get_color() for line in ax.get_lines()]
    extents = sorted(boxes(figure, notes), key=lambda box: box.y0)
    for low, high in pairwise(extents):
        assert high.y0 >= low.y1 - 0.5
    frame = ax.get_window_extent()
    assert extents[0].y0 >= frame.y0 - 1
    assert extents[-1].y1 <= frame.y1 + 1


def test_labels_with_room_stay_at_their_lines() -> None:
    figure = draw((1e-6, 1e-3, 1.0))
    ax = figure.axes[0]
    middle = boxes(figure, figures.label_lines(ax))[1]
    height = ax.transData.transform((10, 1e-3))[1]
    assert abs((middle.y0 + middle.y1) / 2 - height) < 2


def test_labels_pass_over_what_has_no_end() -> None:
    _, ax = figures.panels()
    ax.plot([1, 2], [np.nan, np.nan], label="nothing")
    ax.plot([1, 2, 3], [1, 2, np.nan], label="cut short")
    ax.plot([1, 2], [1, 1])
    notes = figures.label_lines(ax)
    assert [note.get_text() for note in notes] == ["cut short"]


@pytest.mark.parametrize(("scale", "middle"), [("linear", [2.5, 2.0]), ("log", [2.0, 2.0])])
def test_seaborn_draws_the_mean_over_seeds_and_its_t_interval(scale: str, middle: list[float]) -> None:
    values = np.array([[1.0, 2.0], [4.0, 2.0]])  # (seeds, n)
    _, ax = figures.panels()
    ax.set_yscale(scale)
    line = figures.over_seeds(ax, [1, 2], values, figures.COLORS["original"], "original", marker="o")
    assert (line.get_label(), line.get_color(), line.get_marker()) == ("original", figures.COLORS["original"], "o")
    np.testing.assert_allclose(line.get_ydata(), middle)
    on_scale = np.log10(values) if scale == "log" else values
    ends = np.stack(figures.interval(on_scale)[1:])
    drawn = ax.collections[0].get_paths()[0].vertices
    expected = 10**ends if scale == "log" else ends
    for place in (1, 2):
        heights = drawn[drawn[:, 0] == place][:, 1]
        np.testing.assert_allclose([heights.min(), heights.max()], expected[:, place - 1])
    assert figures.over_seeds(ax, [1, 2], values[:1], "black", "one seed").get_ydata().tolist() == [1.0, 2.0]


def test_a_place_without_a_value_of_each_seed_is_left_out() -> None:
    _, ax = figures.panels()
    line = figures.over_seeds(ax, [1, 2, 3], [[1.0, np.nan, 3.0], [2.0, 2.0, 4.0]], "black", "two seeds")
    assert line.get_xydata().tolist() == [[1.0, 1.5], [3.0, 3.5]]


def test_seaborn_draws_the_range_of_all_seeds_and_bars() -> None:
    values = np.array([[1.0, 2.0], [4.0, 2.5], [2.0, 9.0]])
    _, ax = figures.panels()
    line = figures.over_seeds(ax, [1, 2], values, "black", "range", **figures.RANGE)
    assert line.get_ydata().tolist() == [2.0, 2.5]
    assert ax.collections[0].get_datalim(ax.transData).intervaly.tolist() == [1.0, 9.0]
    line = figures.over_seeds(ax, [1, 2], values, "black", "bars", err_style="bars", linestyle="none", marker="o")
    assert (line.get_label(), line.get_linestyle(), line.get_marker()) == ("bars", "None", "o")
    (bars,) = ax.containers
    low, high = bars[2][0].get_segments()[0][:, 1]
    np.testing.assert_allclose([low, high], np.ravel(figures.interval(values[:, 0])[1:]))


def lab(color: str) -> np.ndarray:
    """A colour in CIELAB, where about 2 is the least difference that shows side by side."""
    part = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    linear = np.where(part <= 0.04045, part / 12.92, ((part + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array([[0.4339, 0.3762, 0.1899], [0.2126, 0.7152, 0.0722], [0.0177, 0.1095, 0.8728]])
    xyz = to_xyz @ linear
    x, y, z = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def test_twelve_colours_can_be_told_apart_and_a_thirteenth_is_refused() -> None:
    assert len(set(figures.COLORS.values())) == len(figures.COLORS)
    given = figures.colors(range(12))
    assert list(given) == list(range(12)) and list(given.values())[:7] == list(figures.PALETTE)
    places = [lab(color) for color in given.values()]
    assert min(np.linalg.norm(a - b) for i, a in enumerate(places) for b in places[:i]) > 25
    with pytest.raises(ValueError, match=r"names: got 13 of them, expected at most 12"):
        figures.colors(range(13))


def test_roles_keep_their_colours_and_other_names_get_what_is_left() -> None:
    given = figures.colors(["deep", "compressed", "alpha = 1", "original"])
    assert given["compressed"] == figures.COLORS["compressed"] and given["original"] == figures.COLORS["original"]
    assert list(given) == ["deep", "compressed", "alpha = 1", "original"] and len(set(given.values())) == 4
    assert len(set(figures.colors([*figures.COLORS, *range(4)]).values())) == 12
    with pytest.raises(ValueError, match="expected each of them once"):
        figures.colors(["deep", "deep"])


HOSTILE = """\
backend: QtAgg
text.usetex: True
savefig.bbox: tight
savefig.format: svg
savefig.transparent: True
savefig.dpi: 7
savefig.facecolor: red
font.family: No Such Font
lines.linewidth: 20
axes.prop_cycle: cycler('color', ['r'])
axes.formatter.use_locale: True
figure.autolayout: True
path.sketch: 3, 100, 2
image.cmap: flag
axes.xmargin: 0.9
axes.facecolor: black
"""
DRAWS = """\
import sys
from pathlib import Path
import numpy as np
from compressible.companion import figures
figure, (left, right) = figures.panels(2)
left.imshow(np.eye(3))
left.plot([1, 2, 3], [1, 4, 9], label="plain")
left.legend()
figures.over_seeds(right, [1, 2, 3], np.array([[1.0, 2, 3], [1, 3, 5]]), "C0", "mean")
figures.label_lines(right)
figures._draw(figure, Path(sys.argv[1], "a.png"), Path(sys.argv[1], "a.pdf"), "kwon2024/05_completion")
"""


def test_no_matplotlibrc_moves_a_pixel(tmp_path: Path) -> None:
    (tmp_path / "matplotlibrc").write_text(HOSTILE)
    drawn = []
    for told in ({}, {"MATPLOTLIBRC": str(tmp_path)}, {"MATPLOTLIBRC": str(tmp_path), "MPLBACKEND": "module://absent"}):
        folder = tmp_path / str(len(drawn))
        folder.mkdir()
        subprocess.run(
            [sys.executable, "-c", DRAWS, str(folder)], env=os.environ | told, check=True, cwd=tmp_path / ".."
        )
        drawn.append([(folder / name).read_bytes() for name in ("a.png", "a.pdf")])
    assert drawn[0] == drawn[1] == drawn[2]


def test_a_notebook_shows_figures_whatever_backend_the_user_s_settings_name(monkeypatch: pytest.MonkeyPatch) -> None:
    import nbclient
    import nbformat

    monkeypatch.setenv("MPLBACKEND", "QtAgg")
    cell = nbformat.v4.new_code_cell("import compressible as cd\nfigure, axes = cd.figures.panels()\nfigure")
    notebook = nbformat.v4.new_notebook(cells=[cell])
    nbclient.NotebookClient(notebook, kernel_name="python3").execute()
    assert "image/png" in notebook.cells[0].outputs[-1].data


def test_a_logarithmic_panel_without_a_value_is_an_error_that_says_which() -> None:
    figure, (left, right) = figures.panels(2)
    left.plot([0, 1], [1, 2])
    right.plot([0, 1], [float("nan"), float("nan")])
    right.set(title="Floors", yscale="log")
    right.set_xscale("log")
    right.set_xticks([1, 2])
    with pytest.raises(ValueError, match=r"'Floors' has no value that is finite and above 0.*lower step_size"):
        figures.lay_out(figure)
