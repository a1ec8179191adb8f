"""The benchmark of the sweep in another precision compares the same runs, at the rates that the sweep chose."""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")
from test_method_or_tuning import done, loaded  # noqa: F401  (a fixture)

from compressible.experiments.tuning_cells import Cells
from compressible.experiments.tuning_rates import chosen_rate, curve
from compressible.experiments.tuning_worker import Worker

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("tuning_precision")


@pytest.fixture
def both(benchmark, done):  # noqa: F811
    """The cases of a finished sweep, and the cells of it and of those computed in bfloat16."""
    sweep, before, root = done
    here = replace(sweep, precision="bfloat16")
    now = Cells(here.setting(), root)
    cases = list(benchmark.chosen(sweep, before, sweep.methods, sweep.sample_sizes))
    benchmark.compute(Worker(here, now, load=loaded), cases)
    return sweep, {"float32": before, "bfloat16": now}, cases


def test_the_rates_are_those_around_the_chosen_one(both):
    sweep, cells, cases = both
    assert [case.method for case in cases] == sweep.methods
    for case in cases:
        tried = list(curve(sweep, cells["float32"], *case.place, case.method))
        assert case.best == chosen_rate(sweep, cells["float32"], *case.place, case.method)
        at = tried.index(case.best)
        assert case.rates == [rate for k, rate in enumerate(tried) if abs(k - at) <= 1]


def test_gains_over_lora_are_compared_seed_by_seed(benchmark, both):
    sweep, cells, cases = both
    told = benchmark.compared(sweep, cells, cases)
    rows = {row["method"]: row for row in told["cases"]}
    assert told["compared"] == 3 and "p, Holm" not in rows["standard"]
    thin, lora = ([np.array(rows[m][f"judged scores, {p}"]) for p in cells] for m in ("thin", "standard"))
    expected = (thin[1] - lora[1]) - (thin[0] - lora[0])
    case = next(case for case in cases if case.method == "thin")
    judged = {(c.place, c.method): benchmark.scores(cells, c) for c in cases}
    np.testing.assert_array_equal(benchmark.gained(judged, case), expected)
    assert all(
        row["chosen, float32"] in row["rates"] and row["chosen, bfloat16"] in row["rates"] for row in rows.values()
    )


def test_the_same_numbers_differ_by_nothing_and_a_missing_cell_is_not_compared(benchmark, both, tmp_path):
    sweep, cells, cases = both
    same = benchmark.compared(sweep, {"float32": cells["float32"], "again": cells["float32"]}, cases)
    assert {row["p, Holm"] for row in same["cases"] if row["method"] != "standard"} == {1.0}
    nothing = {"float32": cells["float32"], "tf32": Cells(replace(sweep, precision="tf32").setting(), tmp_path / "no")}
    none = benchmark.compared(sweep, nothing, cases)
    assert none["compared"] == 0 and all(row["judged scores, tf32"] is None for row in none["cases"])


def test_a_shift_of_all_seeds_is_certain(benchmark):
    assert benchmark.p_value(np.array([0.5, 0.5])) == 0.0 and benchmark.p_value(np.zeros(3)) == 1.0
