"""Completion at scale: what its protocol reports, on a small drawn matrix."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from compressible.experiments import completion_from_entries as completion
from compressible.experiments.completion_tasks import drawn_task

FIT = {"depth": 3, "init_scale": 0.2, "step_fraction": 0.6, "steps": 200, "record_every": 20, "ridge": 10.0,
       "sweeps": 10, "most": 12}  # fmt: skip


@pytest.fixture(scope="module")
def drawn() -> dict:
    task = drawn_task((60, 60), 1, 1_800, torch.Generator().manual_seed(0), 0.1, "cpu")
    return completion.fit_drawn(task, 1, **FIT)


def test_every_method_is_fitted_to_the_drawn_matrix(drawn):
    assert drawn["drawn/methods"] == ["compressed", "two", "ALS"]
    assert drawn["drawn/compressed/stopped"] < 0.1 * drawn["drawn/rms"]
    assert drawn["drawn/ALS/stopped"] < 1e-3 * drawn["drawn/rms"]


def test_comparison_is_over_tables_and_relative_to_the_compressed_network(drawn):
    stopped = {"compressed": 1.0, "two": 1.5, "ALS": 0.5, "biased MF": 2.0}
    ratings = {f"t/{name}/stopped": np.array([value, value + 1]) for name, value in stopped.items()}
    ratings |= {f"t/{name}/inside": np.array([True, name != "two"]) for name in stopped} | {"t/methods": list(stopped)}
    found = completion.compared(drawn | ratings, ["t"])
    assert found["gap to two"].tolist() == found["gap to two, t"].tolist() == [0.5, 0.5]
    assert found["gap to biased MF"].tolist() == [1, 1]
    assert found["ratings inside"].tolist() == [True, False] and found["drawn inside"].shape == (1,)
    assert found["drawn/error"] == pytest.approx(drawn["drawn/compressed/stopped"] / drawn["drawn/rms"])
    assert found["drawn/seconds over ALS"] > 0


def test_seconds_are_those_of_the_first_record_below_the_level():
    out = {"drawn/a/seconds": np.array([1.0, 2, 3]), "drawn/a/rmse": np.array([5.0, 0.4, 0.3]), "drawn/rms": 10.0}
    assert completion.seconds_to(out, "a", 0.05) == 2
    assert completion.seconds_to(out, "a") == np.inf


def test_growth_on_a_cpu_has_exponents_and_none_of_the_cards_goals():
    out = completion.growth([200, 400, 800], 400, 10.0, 4, 2, "cpu")
    assert out["growth/seconds"].shape == (2, 3) and out["growth/time slope"].shape == (2,)
    assert 0.8 < out["growth/memory slope"] < 1.2
    assert not any("over dense" in key or "milliseconds" in key for key in out)
