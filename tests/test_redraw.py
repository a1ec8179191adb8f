"""Records keep what their figures draw: arrays as they were, and `redraw` draws from them and computes nothing."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compressible.companion import freshness, records, runs
from compressible.companion.command_line import main
from compressible.companion.drawing_cells import ASIDE

ID = "kwon2024/01_drawn"
RUN = """\
import numpy as np
import compressible as cd
from pathlib import Path

def run(rank, step_size, ranks):
    Path("../../computed").touch()
    curve = np.random.default_rng(rank).normal(size=(3, 400)).cumsum(1)
    return {"curve": curve, "ends": curve[:, -1], "best": float("inf"), "name": "walk"}

result = cd.runs.run(run, rank=rank, step_size=step_size, ranks=ranks)
"""
DRAW = """\
figure, ax = cd.figures.panels()
ax.plot(result["curve"].T, color="{color}", label="walk")
ax.set_title(str(result["best"]))
cd.figures.save(figure, "kwon2024/01_drawn", preset, result, [])
"""
AFTER = "raise RuntimeError('what comes after the figure is not executed')"


@pytest.fixture
def write(add_notebook: Callable[..., Any], checkout: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Write the notebook, anew with a colour, another function or other cells."""
    monkeypatch.setenv("COMPRESSIBLE_CACHE", str(checkout / "cache"))
    monkeypatch.setenv("PYTHONPATH", str(Path(runs.__file__).parents[2]))

    def write(color: str = "black", run: str = RUN, *after: str) -> None:
        add_notebook("01_drawn", run, DRAW.format(color=color), *after)

    write()
    return write


def files() -> dict[str, bytes]:
    return {suffix: Path(f"figures/quick/{ID}{suffix}").read_bytes() for suffix in (".json", ".npz", ".pdf", ".png")}


def redraw() -> int:
    return main(["redraw", ID, "--preset", "quick"])


def test_a_figure_is_redrawn_from_its_record_alone(write: Callable[..., None], checkout: Path) -> None:
    assert main(["run", ID]) == 0
    first = files()
    (checkout / "computed").unlink()
    shutil.rmtree("cache")
    assert redraw() == 0 and files() == first, "the same notebook gives the same bytes"
    write("red", RUN, AFTER)
    assert freshness.state(ID, "quick") == "stale" and redraw() == 0
    assert freshness.state(ID, "quick") == "done", "drawn by the notebook that is here, computed by its function"
    again, old, new = files(), json.loads(first[".json"]), json.loads(files()[".json"])
    assert again[".npz"] == first[".npz"] and again[".png"] != first[".png"] and again[".pdf"] != first[".pdf"]
    assert {name for name in old | new if old.get(name) != new.get(name)} == {"pictures", "notebook"}
    assert new["pictures"] == {kind: hashlib.sha256(again[f".{kind}"]).hexdigest() for kind in ("pdf", "png")}
    assert not (checkout / "computed").exists() and not list(Path("figures/quick").glob(".staging-*"))


def test_cells_that_only_show_something_are_left_out_but_for_their_imports(
    add_notebook: Callable[..., Any], write: Callable[..., None], checkout: Path
) -> None:
    shown = "import math\nfrom pathlib import Path\nPath('../../shown').touch()"
    add_notebook("01_drawn", RUN, shown, "assert math.pi > 3", DRAW.format(color="black"))
    path = Path(f"notebooks/{ID}.ipynb")
    content = json.loads(path.read_text())
    (cell,) = [cell for cell in content["cells"] if "".join(cell["source"]) == shown]
    cell["metadata"]["tags"] = [ASIDE]
    path.write_text(json.dumps(content))
    assert main(["run", ID]) == 0
    (checkout / "shown").unlink()
    assert redraw() == 0 and not (checkout / "shown").exists()


def test_what_a_record_does_not_tell_is_an_error_and_changes_nothing(
    write: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    assert redraw() == 2 and "there is no record 01_drawn.json" in capsys.readouterr().err
    assert main(["run", ID]) == 0
    before = files()
    write("black", RUN.replace("normal", "uniform"))
    refused(before, capsys, "run, or what it reads, has changed since the record was made")
    write("black", RUN.replace("rank=rank", "rank=3"))
    refused(before, capsys, "the record was made with other parameters: rank 2, expected 3")
    write('black", marker=result["marker"], linestyle="')
    refused(before, capsys, "KeyError: \"'marker': expected one of curve, ends, best, name\"")


def refused(before: dict[str, bytes], capsys: pytest.CaptureFixture[str], told: str) -> None:
    assert redraw() == 2 and files() == before
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert told in error and error.endswith(f"`python -m compressible run {ID} --preset quick` makes the record anew")


def test_an_altered_or_missing_file_of_arrays_is_refused_before_a_kernel_starts(
    write: Callable[..., None], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["run", ID]) == 0
    monkeypatch.setattr("compressible.companion.batch._execute", lambda *_: pytest.fail("a kernel was started"))
    place = Path(f"figures/quick/{ID}.npz")
    place.write_bytes(place.read_bytes()[:-1] + b"?")
    refused(files(), capsys, "01_drawn.npz is not the file that its record names by its sha256")
    place.unlink()
    assert redraw() == 2 and "01_drawn.npz is missing" in capsys.readouterr().err


def test_altered_metrics_are_refused_and_a_record_of_before_their_digest_is_drawn(
    write: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", ID]) == 0
    place = Path(f"figures/quick/{ID}.json")
    record = json.loads(place.read_text())
    place.write_text(json.dumps(record | {"metrics": record["metrics"] | {"best": -1}}))
    refused(files(), capsys, "its metrics are not those that it names by 'metrics_digest'")
    place.write_text(json.dumps({name: value for name, value in record.items() if name != "metrics_digest"}))
    assert redraw() == 0 and "metrics_digest" not in json.loads(place.read_text())


def test_an_older_record_offers_its_short_arrays_and_refuses_what_it_cannot_know(tmp_path: Path) -> None:
    metrics = {"ends": [1.0, None], "flags": [True, False], "best": 0.5, "names": ["a", "b"]}
    arrays, rest = records.read_arrays(tmp_path / "x.json", {"metrics": metrics})
    np.testing.assert_array_equal(arrays["ends"], [1.0, np.nan])
    assert arrays["flags"].dtype == bool and rest == {"best": 0.5, "names": ["a", "b"]}
    assert "best" not in arrays and arrays.get("names") is None, "these are no arrays, for sure"
    asked: list[Callable[[], Any]] = [
        lambda: arrays["curve"], lambda: arrays.get("curve"), lambda: "curve" in arrays, lambda: list(arrays),
        lambda: rest | arrays, arrays.items, arrays.values,
    ]  # fmt: skip
    for ask in asked:
        with pytest.raises(records.RecordError, match=r"the record lacks .*, since it was made before"):
            ask()


def kept(tmp_path: Path, arrays: dict[str, np.ndarray], limit: int) -> tuple[records.Kept, dict[str, Any]]:
    content, told = records.pack(arrays, limit)
    assert len(content) <= limit
    (tmp_path / "x.npz").write_bytes(content)
    return records.read_arrays(tmp_path / "x.json", {"metrics": {}, "arrays": told})[0], told


def test_arrays_come_back_as_they_were(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    arrays = {
        "a/file": rng.normal(size=(2, 3000)), "file": np.arange(5), "flags": np.array([True]), "none": np.zeros((0, 3)),
        "words": np.array(["one", "three"]), "single": rng.normal(size=4).astype(np.float32),
    }  # fmt: skip
    back, told = kept(tmp_path, arrays, records.LIMIT)
    assert told["float32"] == told["left_out"] == [] and list(back) == list(arrays)
    for name, array in arrays.items():
        assert back[name].dtype == array.dtype and np.array_equal(back[name], array)
    assert records.pack(arrays) == records.pack(arrays), "the same arrays give the same bytes"
    assert back.get("absent") is None and "absent" not in back


def test_a_file_too_large_rounds_long_arrays_and_then_leaves_out_the_largest(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    arrays = {"curve": rng.normal(size=5000), "tiny": 1e-60 * rng.random(1500), "seeds": rng.normal(size=1000)}
    back, told = kept(tmp_path, arrays, 45_000)
    assert told["float32"] == ["curve"] and told["left_out"] == [], "a value that would vanish keeps its array whole"
    assert back["curve"].dtype == np.float64 and np.array_equal(back["curve"], arrays["curve"].astype(np.float32))
    assert np.array_equal(back["tiny"], arrays["tiny"]) and np.array_equal(back["seeds"], arrays["seeds"])
    back, told = kept(tmp_path, arrays, 25_000)
    assert told["left_out"] == ["curve"] and told["float32"] == []
    with pytest.raises(records.RecordError, match=r"lacks the array 'curve', since some were too large to keep"):
        back.get("curve")


def test_metrics_come_back_with_nan_and_infinities() -> None:
    exact = {"gap": float("inf"), "ends": [1.0, float("-inf")], "low": 1e-3, "name": "NaN", "flag": True, "of": []}
    texts = records.not_finite(exact)
    assert texts == {"gap": "Infinity", "ends": "[1.0, -Infinity]"}
    assert records.metrics({"metrics": exact | {"gap": None, "ends": [1.0, None]}, "not_finite": texts}) == exact
    assert np.isnan(records.metrics({"metrics": {"gap": None}})["gap"])
