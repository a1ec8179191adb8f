"""P1's Table 1, its runs: LoRA and Deep LoRA on several tasks with few rows each, a task a GPU.

The methods are those of few_shot.py. A seed draws the same rows, order and dropout for every method of a task. All runs
of a task share its passes over the model, and a task that is done is kept in the cache by itself, whatever becomes of
the others. Arrays are by method (M) and seed (S).
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import joblib
import numpy as np
import torch
from torch import nn

from compressible.companion import runs as companion
from compressible.data.pretrained import load_for_task
from compressible.data.tasks import Task
from compressible.data.text import data_digests
from compressible.experiments import few_shot
from compressible.experiments.speed.one_by_one import extrapolated
from compressible.finetuning.devices import claimed, device_names
from compressible.finetuning.finetune import fine_tune
from compressible.finetuning.run import FineTuningRun, RunHistory
from compressible.runtime.checks import expect

METHODS = ("paper", "standard", "full", "thin", "compressed", "slower")  # of few_shot's
LAST = 50  # steps whose mean loss is kept, as in the authors' files

Job = TypeVar("Job")
Done = TypeVar("Done")


def all_tasks(tasks: Sequence[str], step_counts: Sequence[int], devices: str, **given: Any) -> dict[str, dict]:
    """Return {task: what `one_task` gives}, from the cache where it was made before.

    Args:
        tasks, step_counts: the tasks and the steps of each.
        devices: "one", which is given's "device", or "all" CUDA devices of the host, each of which takes a task at a
            time in a process of its own.
        given: all else that `one_task` takes.
    """
    jobs = [given | {"task": task, "steps": steps} for task, steps in zip(tasks, step_counts, strict=True)]
    found = over_devices(_kept, jobs, [] if devices == "one" else device_names(devices))
    return dict(zip(tasks, found, strict=True))


def over_devices(work: Callable[[Job], Done], jobs: Sequence[Job], names: Sequence[str]) -> list[Done]:
    """Return work(job) of each job, done in a process a device on one that is free; in this one for less than two."""
    if min(len(names), len(jobs)) < 2:
        return [work(job) for job in jobs]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        calls = [joblib.delayed(_on_a_device)(work, job, list(names), Path(folder)) for job in jobs]
        return list(joblib.Parallel(min(len(names), len(jobs)), backend="loky", batch_size=1)(calls))


def one_task(**given: Any) -> dict[str, Any]:
    """Load a task, train the runs of all methods and return what `trained` gives and, if asked, peft's seconds.

    given: names of the notebooks' vocabulary. task, encoder, protocol, max_length, validation_rows, device, matrices,
    adapter_rank, init_scale, learning_rate, inner_learning_rate and inner_control_rate as in few_shot.py; methods, some
    of METHODS; few_rows of a run; steps, batch_size, precision and max_stack of `fine_tune`; the first seed and their
    number, seeds; peft_steps to time, 0 for none.
    """
    p = SimpleNamespace(**given)
    model, task = load_for_task(p.encoder, p.task, p.protocol, p.max_length, p.validation_rows, p.device)
    runs = planned(p, model, task)
    shared = {"batch_size": p.batch_size, "precision": p.precision}
    options = {"max_stack": p.max_stack} | companion.checkpoint(p.steps)
    found = trained(model, runs, task, p.steps, len(p.methods), **shared, **options)
    return found | extrapolated(model, runs, task, p.steps, p.peft_steps, **shared)


def planned(p: Any, model: nn.Module, task: Task) -> list[FineTuningRun]:
    """Return the runs of a task, by method and seed; p holds what `one_task` is given."""
    rates = few_shot.Rates(p.learning_rate, p.learning_rate, p.inner_learning_rate, p.inner_control_rate)
    known = few_shot.methods(model, p.matrices, p.protocol, p.adapter_rank, p.init_scale, rates)
    seeds = range(p.seed, p.seed + p.seeds)
    return few_shot.planned_runs(chosen(known, p.methods), task, [p.few_rows], seeds)


def chosen(methods: Mapping[str, few_shot.Method], names: Sequence[str]) -> dict[str, few_shot.Method]:
    """Return the methods of these names, in their order; ValueError unless they are some of METHODS, once each."""
    good = len(set(names)) == len(names) and {"paper", "full"} <= set(names) <= set(METHODS)
    expect("methods", list(names), good, f"paper, full and others of {', '.join(METHODS)}")
    return {name: methods[name] for name in names}


def trained(
    model: nn.Module, runs: Sequence[FineTuningRun], task: Task, steps: int, methods: int, **options: Any
) -> dict[str, Any]:
    """Train the runs of one task, by method and seed, score them at the end and return what `outcome` gives.

    Also "validation rows" and "training rows", their numbers, and "device seconds", set-up and scores included; after a
    kill no less than the passes took.

    Args:
        model, runs, task, steps: as for `fine_tune`.
        methods: M, into whose equal parts the runs fall.
        options: others of `fine_tune`.
    """
    began = time.perf_counter()
    histories = fine_tune(model, runs, task, steps, evaluate_at=[steps], keep_factors=False, **options)
    wall = time.perf_counter() - began
    found = outcome(histories, methods, steps)
    rows = {"validation rows": len(task.validation), "training rows": len(task.train)}
    return found | rows | {"device seconds": max(wall, float(found["seconds"].sum()))}


def outcome(histories: Sequence[RunHistory], methods: int, step: int) -> dict[str, np.ndarray]:
    """Return what one task's runs, by method and seed, came to after `step` updates.

    "scores", "last loss" (mean of the last 50) and "seconds" of a device that a run took of its pass, each (M, S), and
    "peak bytes" (M,) of a method's passes. A run that diverged has the score NaN.
    """
    shape = methods, -1
    peaks = np.array([run.peak_bytes for run in histories]).reshape(shape)
    return {
        "scores": np.array([run.scores[step] for run in histories]).reshape(shape),
        "last loss": np.array([run.losses[-LAST:].mean() for run in histories]).reshape(shape),
        "seconds": np.array([run.seconds / run.shared for run in histories]).reshape(shape),
        "peak bytes": peaks.max(1),
    }


def _kept(given: dict[str, Any]) -> dict[str, Any]:
    """What `one_task` gives, from the cache where it was made before."""
    result = companion.run(one_task, data=data_digests(given["task"], given["encoder"]), **given)
    return result.arrays | result.metrics


def _on_a_device(work: Callable[[Job], Done], job: Job, names: list[str], folder: Path) -> Done:
    """In a process of the pool: do a job with a device that is free as the current one."""
    with claimed(names, folder) as name:
        place = torch.device(name)
        with torch.cuda.device(place) if place.type == "cuda" else nullcontext():
            return work(job)
