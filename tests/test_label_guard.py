"""No figure of other values takes the place of a preset's, whoever saves it: the batch, an open notebook, papermill."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import pytest

from compressible.companion import figures, runs
from compressible.companion.parameters import ParameterError

QUICK = {"rank": 2, "step_size": 0.1, "ranks": [1, 2]}
PAPER = QUICK | {"rank": 5, "step_size": 1e-3}


@pytest.fixture
def id(add_notebook: Callable[..., str], monkeypatch: pytest.MonkeyPatch, checkout: Path) -> Iterator[str]:
    """A notebook with the presets quick and paper in a checkout that has no figure yet."""
    monkeypatch.setenv("COMPRESSIBLE_CACHE", str(checkout / "cache"))
    with mpl.rc_context({"backend": "agg"}):
        yield add_notebook("01_guarded")
    plt.close("all")


def work(**values: Any) -> dict[str, Any]:
    return {"twice": 2 * values["rank"]}


def save(id: str, preset: str, **values: Any) -> dict[str, Any]:
    figure, ax = figures.panels()
    ax.plot([0, 1], [0, 1])
    path = figures.save(figure, id, preset, runs.run(work, preset=preset, **values), [])
    return json.loads(path.read_text())["parameters"]


def test_a_preset_s_own_values_go_under_its_name_and_others_under_any_that_is_none(id: str) -> None:
    assert save(id, "paper", **PAPER) == PAPER and save(id, "quick", **QUICK) == QUICK
    assert save(id, "mine", **QUICK) == QUICK and save(id, "quick", **QUICK | {"rank": 3})["rank"] == 3


@pytest.mark.parametrize(
    ("values", "told"),
    [
        (QUICK, r"rank 2 for 5, step_size 0\.1 for 0\.001"),  # the label alone was set in the cell of parameters
        (PAPER | {"ranks": [1]}, r"ranks \[1\] for \[1, 2\]"),
        ({"rank": 5, "step_size": 1e-3}, r"ranks no parameter for \[1, 2\]"),
    ],
)
def test_other_values_are_refused_and_leave_the_preset_s_figure(id: str, values: dict[str, Any], told: str) -> None:
    save(id, "paper", **PAPER)
    before = {file: file.read_bytes() for file in Path("figures/paper").rglob("*.*")}
    with pytest.raises(
        ParameterError, match=rf"preset: got 'paper', whose figure .*\({told}\); expected a name of your"
    ):
        save(id, "paper", **values)
    assert before == {file: file.read_bytes() for file in Path("figures/paper").rglob("*.*")}


def test_figures_of_notebooks_that_are_not_here_are_nobody_else_s(id: str) -> None:
    assert save("kwon2024/02_elsewhere", "paper", **QUICK) == QUICK
