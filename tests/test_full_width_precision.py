"""The benchmark of full-width runs in other precisions trains what the figure's notebook trains."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")  # a GPU host may have PyTorch, Triton and pytest alone
pytest.importorskip("peft")
from test_finetuning_devices import bert, task

from compressible.companion import notebooks

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    spec = importlib.util.spec_from_file_location("full_width_precision", BENCHMARKS / "full_width_precision.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.chdir(BENCHMARKS.parent)
    return module


def test_the_runs_are_those_that_the_notebook_plans(benchmark):
    values = notebooks.defaults(notebooks.notebook_path(benchmark.ID)) | {"sample_sizes": [4, 8], "seeds": 3, "seed": 2}
    p, data = SimpleNamespace(**values), task()
    found = benchmark.full_width(p, bert(), data)
    assert [(run.seed, len(run.subset)) for run in found] == [(p.seed + k, n) for n in (4, 8) for k in range(p.seeds)]
    for run in found:
        assert (run.config.variant, run.lr, run.config.init_scale) == ("full", p.learning_rate, p.init_scale)
        assert torch.equal(torch.as_tensor(run.subset), torch.as_tensor(data.subset(len(run.subset), run.seed)))
        assert run.config.r == p.adapter_rank and run.start is None


@pytest.fixture
def table(benchmark):
    """Parameters of Table 1 for a tiny model: two tasks of two and four steps, three seeds from 4 on."""
    values = notebooks.defaults(notebooks.notebook_path(benchmark.TABLE))
    values |= {"tasks": ["other", "toy"], "step_counts": [2, 4], "seeds": 3, "seed": 4, "few_rows": 6}
    return SimpleNamespace(**values | {"matrices": ["value"], "learning_rate": 3e-4, "max_stack": 10, "device": "cpu"})


def test_the_runs_of_the_table_are_those_of_full_width(benchmark, table):
    found = benchmark.full_width_of_table(table, bert(), task())
    assert [run.seed for run in found] == [4, 5, 6]
    assert {(run.config.variant, run.lr, len(run.subset)) for run in found} == {("full", 3e-4, 6)}


def test_a_task_of_the_table_is_held_against_its_record(benchmark, table, monkeypatch):
    scores = np.full((2, len(table.methods), 3), np.nan)
    scores[1, table.methods.index("full")] = 0, 0, 0.5
    monkeypatch.setattr(benchmark, "recorded", lambda *_: (table, {"scores": scores}))
    monkeypatch.setattr(benchmark, "load", lambda p: (bert(), task()))
    (told,) = benchmark.measure(SimpleNamespace(tasks=["toy"]))["parts"]
    assert (told["task"], told["rate"]) == ("toy", 3e-4)
    assert told["record"] == {"runs": 3, "constant": 2, "mean of the others": 0.5}
    assert told["here"]["runs"] == 3 and told["here"]["constant"] == 0
    assert told["fisher p"] == pytest.approx(0.4)
    losses = next(value for name, value in told.items() if name.startswith("mean training loss"))
    assert np.shape(losses) == (3, 4) and np.isfinite(losses).all()


def test_one_answer_for_all_rows_is_told_from_others(benchmark):
    scores, shares = np.array([[0.625, 0.7], [0.375, 0.5]]), np.array([0.625, 0.375])
    assert benchmark.counted(scores, shares) == {"runs": 4, "constant": 2, "mean of the others": 0.6}
    assert benchmark.counted(np.zeros(3), np.zeros(1)) == {"runs": 3, "constant": 3, "mean of the others": None}


def test_one_answer_scores_a_classs_share_or_no_correlation(benchmark):
    rows = replace(task().validation, labels=torch.tensor([0] * 10 + [1] * 30))
    classes = replace(task(), kind="classification", outputs=2, metric="accuracy", validation=rows)
    assert benchmark.constant_scores(classes).tolist() == [0.25, 0.75]
    assert [classes.score(np.eye(2)[[label] * 40], rows.labels.numpy()) for label in (0, 1)] == [0.25, 0.75]
    assert benchmark.constant_scores(task()).tolist() == [0] == [task().score(np.ones((40, 1)), np.arange(40.0))]
