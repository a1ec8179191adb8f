"""What `fine_tune` refuses before work starts; tasks are in task_checks.py, what only a pass shows is in dry_run.py."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from compressible.adapters.config import DeepLoraConfig
from compressible.finetuning.peft_models import DRAWN, GradientStart, starts_compressed
from compressible.finetuning.run import FineTuningRun
from compressible.runtime.checks import expect, expect_flag, is_integer, is_number

PRECISIONS = ("float32", "tf32", "bfloat16")


def check_settings(
    steps: int, batch_size: int, decay_ratio: float, precision: str, max_stack: int | None, checkpoint_every: int
) -> None:
    """Raise ValueError for a setting of a call that is impossible."""
    counts = {"steps": steps, "batch_size": batch_size, "checkpoint_every": checkpoint_every}
    for name, value in counts.items():
        expect(name, value, is_integer(value) and value >= 1, "an integer >= 1")
    fits = max_stack is None or (is_integer(max_stack) and max_stack >= 1)
    expect("max_stack", max_stack, fits, "None or an integer >= 1")
    expect("decay_ratio", decay_ratio, is_number(decay_ratio) and 0 <= decay_ratio <= 1, "a number in [0, 1]")
    expect("precision", precision, precision in PRECISIONS, f"one of {', '.join(PRECISIONS)}")


def check_choices(flags: Mapping[str, Any], choices: Mapping[str, Any], watch: Any, watched: bool) -> None:
    """Raise ValueError unless flags are truth values, choices these or None, and watch a function where steps ask."""
    for name, value in {**flags, **{name: value for name, value in choices.items() if value is not None}}.items():
        expect_flag(name, value)
    wanted = "a function, since watch_at names steps" if watched else "a function, or None"
    expect("watch", watch, callable(watch) or (watch is None and not watched), wanted)


def check_surroundings(model: nn.Module, checkpoint: str | Path | None) -> None:
    """Raise ValueError where gradients are off or autocast is on around a call, or its file is a folder or no name."""
    named = checkpoint is None or isinstance(checkpoint, str | os.PathLike)
    expect("checkpoint", checkpoint, named, "a file's name, or None")
    off, device = not torch.is_grad_enabled(), next(model.parameters()).device.type
    expect("the mode of gradients", "no_grad or inference_mode", not off, "gradients, which training takes")
    precise = not torch.is_autocast_enabled(device)
    expect("torch.autocast", "on", precise, "off around fine_tune, whose argument precision says what is half")
    folder = checkpoint is not None and Path(checkpoint).is_dir()
    expect("checkpoint", str(checkpoint), not folder, "a file's name, and it is a folder")


def checked_marks(name: str, marks: Iterable[int], steps: int) -> list[int]:
    """Return the steps of evaluate_at or watch_at in order, each once; ValueError unless integers from 0 to `steps`."""
    listed = marks.tolist() if hasattr(marks, "tolist") else marks
    expect(name, marks, isinstance(listed, Iterable) and not isinstance(listed, str), "integers, such as (0, 100)")
    listed = list(listed)
    expect(name, listed, all(is_integer(mark) for mark in listed), "integers")
    expect(name, listed, all(0 <= mark <= steps for mark in listed), f"steps from 0 to {steps}")
    return sorted({int(mark) for mark in listed})


def check_runs(runs: Sequence[FineTuningRun], rows: int, batch_size: int) -> None:
    """Raise ValueError for a run that cannot be trained on `rows` rows."""
    expect("runs", runs, isinstance(runs, Sequence), "a list of FineTuningRun")
    expect("runs", list(runs), len(runs) > 0, "at least one run")
    for run in runs:
        expect("runs", run, isinstance(run, FineTuningRun), "each a FineTuningRun")
        _check_config(run)
        for name, rate in (("lr", run.lr), ("head_lr", run.lr if run.head_lr is None else run.head_lr)):
            expect(name, rate, is_number(rate, above=0), "a finite number > 0")
        expect("seed", run.seed, is_integer(run.seed) and 0 <= run.seed < 2**63, "an integer >= 0, below 2^63")
        own = torch.arange(rows) if run.subset is None else _subset(run.subset)
        expect("subset", f"{len(own)} rows", len(own) >= batch_size, f"at least one batch of {batch_size}")
        expect("subset", run.subset, int(own.min()) >= 0 and int(own.max()) < rows, f"rows from 0 to {rows - 1}")


def _check_config(run: FineTuningRun) -> None:
    config = run.config
    expect("config", config, isinstance(config, PeftConfig), "a DeepLoraConfig, LoraConfig or another of peft's")
    expect("config.inference_mode", config.inference_mode, not config.inference_mode, "False, as it is to be trained")
    ratio = run.lr_ratio
    expect("lr_ratio", ratio, ratio is None or ratio == 0 or is_number(ratio, above=0), "None or a finite number >= 0")
    lora = type(config) is LoraConfig
    knows = ratio is None or lora or isinstance(config, DeepLoraConfig)
    expect("lr_ratio", ratio, knows, f"None for {type(config).__name__}, which has no outer factors")
    waits = starts_compressed(config)
    own, drawn = isinstance(run.start, GradientStart), lora and getattr(config, "init_lora_weights", True) in DRAWN
    fits = run.start is None or (own and (waits or drawn)) or (callable(run.start) and not waits)
    ours = "None or a GradientStart: the factors come from the first gradient"
    wanted = ours if waits else "None or a function, as paper_lora_start, or of LoRA drawn by peft a GradientStart"
    expect("start", run.start, fits, wanted)


def check_model(model: nn.Module, dropout: bool) -> None:
    """Raise ValueError for a model whose pass is not the sum of its runs' own."""
    expect("model", type(model).__name__, isinstance(model, nn.Module), "a torch.nn.Module, such as transformers has")
    expect("model", type(model).__name__, any(True for _ in model.parameters()), "one that has parameters")
    if any(parameter.dtype is torch.float16 for parameter in model.parameters()):
        raise ValueError("the model is in float16, expected float32 or bfloat16: eps^L = 1e-9 underflows there")
    for name, module in model.named_modules():
        if isinstance(module, (BaseTunerLayer, PeftModel)):
            raise ValueError(
                f"{name!r} is {type(module).__name__}, expected a model without adapters: unload() it first"
            )
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            kind = type(module).__name__
            raise ValueError(f"{name!r} is {kind}, expected no statistics over a batch: a batch holds all runs")
        if dropout and isinstance(module, nn.RNNBase) and module.dropout > 0:
            kind = f"{type(module).__name__} with dropout {module.dropout:g}"
            raise ValueError(f"{name!r} is {kind}, which draws for all runs at once: expected dropout=0")
        if getattr(module, "gradient_checkpointing", False):
            raise ValueError(f"{name!r} has gradient checkpointing on: call model.gradient_checkpointing_disable()")


def _subset(subset: Any) -> Tensor:
    try:
        rows = torch.as_tensor(subset)
    except (TypeError, ValueError, RuntimeError):
        rows = torch.zeros(0, 0)
    if rows.dtype is torch.bool:
        raise ValueError("subset is a mask of bools, expected the numbers of rows: mask.nonzero().flatten()")
    whole = not (rows.is_floating_point() or rows.is_complex()) or rows.shape == (0,)
    expect("subset", subset, rows.dim() == 1 and whole, "integers in one dimension, the numbers of rows")
    return rows
