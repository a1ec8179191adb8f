"""Parameters are refused with the name, the value and what was expected, all problems at once."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from IPython.core.interactiveshell import InteractiveShell

from compressible.companion.parameters import ParameterError, collect, validate
from compressible.runtime import checks

GOOD = {
    "preset": "quick", "dimension": 100, "rank": 5, "depth": 3, "width": 10, "widths": [10, 20],
    "observed": 0.3, "init_scale": 1e-2, "step_size": 10.0, "step_sizes": [1.0, 2.0], "outer_ratio": 0.0,
    "steps": 1, "record_every": 1, "tolerance": 0.0, "seed": 0, "seeds": 1,
    "rank_guesses": [5, 8], "device": "cuda:1", "users": 943, "items": 1682,
    "splits": ["u1"], "validation_fraction": 0.1, "ridges": [0.0, 0.1],
}  # fmt: skip


def test_valid_values_pass_unchanged() -> None:
    assert validate(GOOD) == GOOD


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rank", 0), ("rank", -1), ("rank", 2.0), ("rank", True), ("rank", "5"), ("rank", None),
        ("rank", [5]), ("depth", 1), ("steps", -1), ("record_every", 0), ("seed", -1), ("seeds", 0),
        ("observed", 0.0), ("observed", 1.0001), ("observed", -0.3), ("observed", math.nan),
        ("observed", "0.3"), ("init_scale", 0.0), ("step_size", 0.0), ("step_size", math.inf),
        ("step_size", False), ("trials", 0),
        ("step_size", 10**40), ("outer_ratio", -0.1), ("ridge", -1e-9), ("tolerance", -math.inf),
        ("ridge", np.float64("nan")), ("validation_fraction", 1.0), ("validation_fraction", 0.0),
        ("device", "gpu"), ("device", "cuda:x"), ("device", "cuda:0\n"), ("precision", "fp8"), ("splits", ["u1", "u6"]),
        ("seed", 2**62), ("seeds", 1_000_000), ("width", 1_000_000), ("measurements", 2**53 + 1),
        ("widths", [1, 10**9]),
        ("dimension", 10**400), ("depth", 10**6), ("preset", ""), ("preset", "../up"), ("preset", 3),
        ("widths", []), ("widths", 10), ("widths", "10"), ("widths", [10, 0]), ("widths", [10, [20]]),
        ("step_sizes", [1.0, math.nan]), ("ridges", {0.1}),
    ],
)  # fmt: skip
def test_bad_values_are_refused_with_name_and_value(name: str, value: Any) -> None:
    with pytest.raises(ParameterError) as caught:
        validate({name: value})
    assert name in str(caught.value)
    assert "expected" in str(caught.value)
    told = value[1] if isinstance(value, list) and len(value) > 1 else value
    assert checks.shown(told.item() if isinstance(told, np.generic) else told) in str(caught.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rank": 30, "dimension": 20}, "rank: got 30, expected at most dimension = 20"),
        ({"rank": 30, "users": 100, "items": 20}, "rank: got 30, expected at most items = 20"),
        ({"rank": 5, "width": 4}, "rank: got 5, expected at most width = 4"),
        ({"rank": 5, "widths": [10, 4]}, r"rank: got 5, expected at most widths = \[10, 4\]"),
        ({"rank_guesses": [5, 30], "dimension": 20}, "rank_guesses: got .* at most dimension = 20"),
        ({"ranks": [5, 30], "users": 20}, "ranks: got .* at most users = 20"),
        (
            {"observed": 0.001, "dimension": 20},
            "observed: got 0.001, expected at least one entry of dimension = 20",
        ),
        ({"outer_ratios": [1.0, 5.0, 1.0]}, "outer_ratios: got .* expected each value once"),
        ({"widths": [10, 10]}, "widths: got .* expected each value once"),
        ({"adapter_rank": 7}, "adapter_rank: got 7, expected an even integer"),
    ],
)
def test_impossible_combinations(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        validate(values)


def test_lists_that_go_along_with_others_may_repeat_a_value() -> None:
    values = {"dimensions": [200, 200, 60], "seed": 2**62 - 1, "seeds": 10_000, "observed": 0.01, "dimension": 10}
    assert validate(values) == values


def test_conversions_are_few() -> None:
    checked = validate({"step_size": 3, "widths": (10, 20), "ridges": [1], "rank": np.int64(4)})
    assert checked == {"step_size": 3.0, "widths": [10, 20], "ridges": [1.0], "rank": 4}
    assert [type(checked[name]) for name in ("step_size", "widths", "rank")] == [float, list, int]
    assert type(checked["ridges"][0]) is float


def test_unknown_names_get_the_closest_known_one() -> None:
    with pytest.raises(ParameterError, match=r"stepsize: got 0.1, .*'step_size'"):
        validate({"stepsize": 0.1})
    with pytest.raises(ParameterError, match=r"width: got 3, .*'widths'"):
        validate({"width": 3}, allowed=["rank", "widths"])
    with pytest.raises(ParameterError, match="qqq: got 1, expected a known name; known are rank, widths"):
        validate({"qqq": 1}, allowed=["rank", "widths"])
    with pytest.raises(ParameterError, match="vocabulary"):
        validate({"qqq": 1}, allowed=["qqq"])


def test_all_problems_come_together_one_a_line() -> None:
    with pytest.raises(ParameterError) as caught:
        validate({"rnak": 3, "observed": 2.0, "steps": -1, "rank": 9, "dimension": 8})
    lines = str(caught.value).splitlines()
    assert [line.split(":")[0].strip() for line in lines[1:]] == ["rnak", "observed", "steps", "rank"]


def test_collect_takes_plain_public_values_only() -> None:
    namespace = {"rank": 5, "widths": (10, 20), "_private": 3, "In": ["x"], "Out": {}, "np": np, "f": len}
    assert collect(namespace) == {"rank": 5, "widths": [10, 20]}


def test_collect_refuses_what_papermill_injected_by_mistake() -> None:
    with pytest.raises(ParameterError, match="'decay_ratio'"):
        collect({"rank": 5, "decay_raito": 0.1})


@pytest.fixture
def shell() -> InteractiveShell:
    shell = InteractiveShell()
    shell.run_cell("from compressible.companion.parameters import collect, ParameterError", store_history=True)
    return shell


def run_cells(shell: InteractiveShell, *cells: str) -> Any:
    return [shell.run_cell(cell, store_history=True) for cell in cells][-1]


def test_collect_again_in_a_used_kernel(shell: InteractiveShell) -> None:
    again = "found = collect(globals())"
    run_cells(shell, "rank = 5", again, "rows = [1, 2]; steps = 7; print_me = 'x'").raise_error()
    run_cells(shell, "rank = 6\nseed: int = 1", again).raise_error()
    assert shell.user_ns["found"] == {"rank": 6, "seed": 1}


def test_a_mistake_can_be_made_and_mended_in_a_used_kernel(shell: InteractiveShell) -> None:
    again = "found = collect(globals())"
    run_cells(shell, "rank = 5", again).raise_error()
    wrong = run_cells(shell, "rank = 5\nstepsize = 0.1", again)
    assert isinstance(wrong.error_in_exec, ParameterError)
    run_cells(shell, "rank = 5\nstep_size = 0.1", again).raise_error()
    assert shell.user_ns["found"] == {"rank": 5, "step_size": 0.1}


CELL = 'preset: str = "quick"\nrank: int = 5'


def test_a_parameter_of_other_notebooks_is_refused_where_it_was_injected(shell: InteractiveShell) -> None:
    wrong = run_cells(shell, CELL, "# Parameters\nrank = 6\ntrials = 5", "found = collect(globals())")
    assert "trials: got 5, expected a known name" in str(wrong.error_in_exec)
    run_cells(shell, CELL, "# Parameters\nrank = 6", "found = collect(globals())").raise_error()
    assert shell.user_ns["found"] == {"preset": "quick", "rank": 6}


def test_a_line_that_leaves_the_cell_of_parameters_leaves_the_parameters(shell: InteractiveShell) -> None:
    again = "found = collect(globals())"
    run_cells(shell, f"{CELL}\ntrials: int = 5", again).raise_error()
    run_cells(shell, CELL, again).raise_error()
    assert shell.user_ns["found"] == {"preset": "quick", "rank": 5}


def test_a_cell_that_works_sets_no_parameters(shell: InteractiveShell) -> None:
    again = "found = collect(globals())"
    run_cells(shell, CELL, again, "names = list('ab')\nfor name in names: rank = 7", again).raise_error()
    assert shell.user_ns["found"] == {"preset": "quick", "rank": 7}  # as the notebook has it by now
    wrong = run_cells(shell, f"{CELL}\nrnak: int = 4", again)
    assert "rnak: got 4, expected a known name; the closest is 'rank'" in str(wrong.error_in_exec)
    run_cells(shell, CELL, "rank = 8", again).raise_error()
    assert shell.user_ns["found"] == {"preset": "quick", "rank": 8}
