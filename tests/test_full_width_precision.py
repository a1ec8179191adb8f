"""The benchmark of full-width runs in other precisions trains what the figure's notebook trains."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace

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
