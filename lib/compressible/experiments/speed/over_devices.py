"""Runs over several devices of a host: how many times the steps of one they take together."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from compressible.data.tasks import Task
from compressible.experiments.speed.finetuning import runs_of
from compressible.experiments.speed.shapes import load_shape, task_of
from compressible.finetuning.finetune import fine_tune
from compressible.runtime.devices import resolve_device


def over_devices(
    encoder: str,
    counts: Sequence[int],
    each: int,
    steps: int,
    sizes: tuple[int, int],
    precision: str,
    device: str,
    budget: float,
) -> dict[str, Any]:
    """Return "<k> devices/rate", steps of a run per second by one `fine_tune` on k devices, for each k of `counts`.

    Every device has `each` LoRA runs of its own; the seconds are those of the call, with its set-up, after a short one
    that starts the processes. Where a host has fewer GPUs, or `budget` seconds are over, "<k> devices/skipped" says so.
    On a CPU, k processes share it. sizes: rows of a run's batch, tokens in a row.
    """
    began, place = time.perf_counter(), torch.device(resolve_device(device)).type
    there = torch.cuda.device_count() if place == "cuda" else max(counts)
    out: dict[str, Any] = {}
    model = load_shape(encoder)
    task = task_of(model, 4 * sizes[0], sizes[1])
    for count in counts:
        spent = time.perf_counter() - began
        if count > there or spent > budget:
            reason = f"this host has {there}" if count > there else f"not begun after {budget:g} s"
            out[f"{count} devices/skipped"] = reason
            continue
        names = [f"cuda:{index}" for index in range(count)] if place == "cuda" else ["cpu"] * count
        if place == "cuda" or count > 1:
            _seconds(model, task, 1, 2, sizes[0], precision, names)
        taken = _seconds(model, task, each, steps, sizes[0], precision, names)
        out[f"{count} devices/rate"] = count * each * steps / taken
    return out


def device_goals(out: Mapping[str, Any], counts: Sequence[int]) -> dict[str, np.ndarray]:
    """Return "<k> devices over one" (1,), the rate of k devices over that of one, where both were measured."""
    rates = {count: out[f"{count} devices/rate"] for count in counts if f"{count} devices/rate" in out}
    many = [count for count in rates if count > 1 and 1 in rates]
    return {f"{count} devices over one": np.array([rates[count] / rates[1]]) for count in many}


def _seconds(
    model: nn.Module, task: Task, each: int, steps: int, batch_size: int, precision: str, names: Sequence[str]
) -> float:
    """Seconds of a call with `each` runs a device."""
    runs = runs_of("lora", each * len(names), of=model)
    options: dict[str, Any] = {"max_stack": each, "keep_factors": False, "show_progress": False, "devices": names}
    began = time.perf_counter()
    fine_tune(model, runs, task, steps, batch_size, precision=precision, **options)
    return time.perf_counter() - began
