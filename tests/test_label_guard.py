"""No figure of other values takes the place of a preset's, whoever saves it: the batch, an open notebook, papermill."""

from __future__ import annotations

import inspect
import json
import subprocess
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest

from compressible.companion import figures, label_guard, notebooks, runs
from compressible.companion.command_line import main
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


def edit(id: str, before: str, after: str) -> None:
    """Change the cell of parameters as JupyterLab saves it."""
    path = notebooks.notebook_path(id)
    text = path.read_text()
    assert before in text
    path.write_text(text.replace(before, after))


@pytest.fixture
def committed(id: str) -> str:
    for words in (("init", "-q"), ("add", "notebooks"), ("commit", "-q", "-m", "all")):
        subprocess.run(["git", "-c", "user.name=t", "-c", "user.email=t@localhost", *words], check=True)
    return id


def test_an_edited_cell_of_parameters_does_not_make_its_values_a_preset_s(
    committed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    edit(committed, "[1, 2]", "[1]")  # of the values that the preset leaves to the notebook
    told = r"ranks \[1\] for \[1, 2\]\); expected a name .*; the cell of parameters in notebooks/.* is edited: `git "
    with pytest.raises(ParameterError, match=told):
        save(committed, "paper", **PAPER | {"ranks": [1]})
    assert main(["run", committed, "--preset", "paper", "--check"]) == 2
    assert "(ranks [1] for [1, 2])" in capsys.readouterr().err and not Path("figures").exists()
    assert save(committed, "paper", **PAPER) == PAPER


def test_a_batch_says_which_edited_values_it_takes_from_the_notebook(
    committed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", committed, "--check"]) == 0 and capsys.readouterr().err == ""
    edit(committed, "rank: int = 2", "rank: int = 3")
    assert main(["run", committed, "--check"]) == 0
    assert capsys.readouterr().err.startswith(f"note: {committed} takes rank 3 for 2 from its cell of parameters")
    assert main(["run", committed, "--check", "--preset", "paper"]) == 0 and capsys.readouterr().err == ""


def never(**values: Any) -> dict[str, Any]:
    raise AssertionError("the work began")


def test_an_open_notebook_is_refused_before_its_work_as_the_batch_refuses_it(
    id: str, add_notebook: Callable[..., str]
) -> None:
    id = add_notebook("02_never", inspect.getsource(never))
    Path("notebooks/kwon2024/rules.yaml").write_text("02_never: [max(ranks) <= rank]\n")
    with pytest.raises(ParameterError, match=rf"^{id}: got ranks = \[1, 2\], rank = 1, expected max"):
        runs.run(never, preset="mine", **QUICK | {"rank": 1})
    with pytest.raises(ParameterError, match=r"^preset: got 'paper'"):
        runs.run(never, preset="paper", **QUICK)


def test_a_copy_with_another_function_or_other_names_is_nobody_else_s(
    id: str, add_notebook: Callable[..., str]
) -> None:
    add_notebook("02_never", inspect.getsource(never))
    Path("notebooks/kwon2024/rules.yaml").write_text("02_never: [max(ranks) <= rank]\n")
    assert runs.run(work, preset="paper", **QUICK | {"rank": 1})["twice"] == 2
    with pytest.raises(AssertionError, match="began"):
        runs.run(never, preset="paper", rank=1)


def test_outside_of_a_checkout_no_notebook_is_asked(id: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere() -> list[str]:
        raise FileNotFoundError("no pyproject.toml")

    monkeypatch.setattr(notebooks, "ids", nowhere)
    assert save(id, "paper", **QUICK) == QUICK


@pytest.mark.parametrize(
    ("now", "told"), [({"rank": 3}, "rank 2, now 3"), ({"ranks": "x"}, r"ranks \[1, 2\], now 'x'")]
)
def test_a_figure_of_other_values_than_the_cell_of_parameters_has_by_now_is_told(
    now: dict[str, Any], told: str, id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    namespace = {"_parameter_names": {*QUICK, "preset"}, "preset": "mine", **QUICK, "step_size": np.float64(0.1)}
    monkeypatch.setattr(label_guard, "kernel", lambda: SimpleNamespace(user_ns=namespace))
    with warnings.catch_warnings(action="error"):
        assert save(id, "mine", **QUICK) == QUICK
    namespace |= now
    with pytest.warns(RuntimeWarning, match=f"the result was computed with {told}: run all cells"):
        assert save(id, "mine", **QUICK) == QUICK
