"""What many fine-tuning runs would take one at a time with peft, from the measured seconds of a step.

The steps are those of a real task: its rows, in the order that a run sees them, padded to the longest of a batch as a
data collator does, and moved to the device beforehand.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence

import peft
import torch
from torch import Tensor, nn

from compressible.data.tasks import Task
from compressible.finetuning.losses import first_output, run_losses
from compressible.finetuning.peft_models import adapted_by_peft
from compressible.finetuning.run import FineTuningRun, data_order
from compressible.runtime import devices
from compressible.runtime.checks import expect
from compressible.runtime.devices import matmul_precision

WARM_UP = 3  # steps before the clock starts
SMALL = 1e-4


def step_seconds(
    model: nn.Module, task: Task, run: FineTuningRun, steps: int, batch_size: int = 16, precision: str = "float32"
) -> float:
    """Return the seconds of a step of `run` as peft's users train it, the mean of `steps` after three to warm up.

    A model of `get_peft_model` in a plain loop, with dropout and AdamW (fused on a GPU); in "bfloat16" the frozen
    model is in bfloat16 and the adapters in float32. The model that is given stays as it is.

    Args:
        model: on its device.
        task: whose training rows are read.
        run: its config, subset and order.
        steps: at least 1, usually 20 to 100.
        batch_size: rows of a step.
        precision: "float32", "tf32" or "bfloat16".

    Returns:
        Seconds.

    Raises:
        ValueError: for steps below 1.

    Example:
        >>> import compressible as cd
        >>> import peft, torch
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> sizes = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> model = BertForSequenceClassification(BertConfig(**sizes, intermediate_size=16, num_labels=1))
        >>> tokens = dict.fromkeys(("input_ids", "attention_mask"), torch.ones(8, 6, dtype=torch.int64))
        >>> rows = cd.Examples(tokens, torch.rand(8), texts=(("a",),) * 8)
        >>> task = cd.Task("random", "regression", 1, "pearson", train=rows, validation=rows)
        >>> run = cd.FineTuningRun(peft.LoraConfig(r=2, target_modules=["query"]), lr=1e-4)
        >>> step_seconds(model, task, run, steps=2, batch_size=4) > 0
        True

    Reference:
        Mangrulkar et al., PEFT, https://github.com/huggingface/peft.
    """
    expect("steps", steps, steps >= 1, "at least 1")
    device = next(model.parameters()).device
    order = data_order(run, len(task.train), WARM_UP + steps, batch_size)
    batches = [_moved(task.train.batch(rows), device) for rows in order]
    adapted, adam = _adapted(model, run, precision)
    with matmul_precision(precision):
        for tokens, labels in batches[:WARM_UP]:
            _step(adapted, adam, task.kind, tokens, labels)
        devices.synchronize(str(device))
        began = time.perf_counter()
        for tokens, labels in batches[WARM_UP:]:
            _step(adapted, adam, task.kind, tokens, labels)
        devices.synchronize(str(device))
        return (time.perf_counter() - began) / steps


def extrapolated(
    model: nn.Module,
    runs: Sequence[FineTuningRun],
    task: Task,
    steps: int,
    timed: int,
    batch_size: int = 16,
    precision: str = "float32",
) -> dict[str, float]:
    """Return the "peft seconds" of all runs, `steps` each, one after the other: an extrapolation from `timed` steps.

    LoRA stands for all narrow methods and full-width Deep LoRA, as a method of peft, for itself; a step of each is
    measured, as "peft/narrow" and "peft/full". Making the models and scoring them is left out. {} if `timed` is 0.
    """
    if not timed:
        return {}
    kinds: dict[str, list[FineTuningRun]] = {}
    for run in runs:
        kinds.setdefault("full" if getattr(run.config, "variant", "") == "full" else "narrow", []).append(run)
    measured = {kind: step_seconds(model, task, _stock(of), timed, batch_size, precision) for kind, of in kinds.items()}
    total = sum(steps * len(of) * measured[kind] for kind, of in kinds.items())
    return {f"peft/{kind}": seconds for kind, seconds in measured.items()} | {"peft seconds": total}


def _stock(runs: Sequence[FineTuningRun]) -> FineTuningRun:
    """The run that is timed: a LoRA, where there is one."""
    return next((run for run in runs if isinstance(run.config, peft.LoraConfig)), runs[0])


def _adapted(model: nn.Module, run: FineTuningRun, precision: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The model as peft adapts it and its optimiser; factors are small constants, since values move no clock."""
    device = next(model.parameters()).device
    base = copy.deepcopy(model).to(torch.bfloat16 if precision == "bfloat16" else torch.float32)
    adapted = adapted_by_peft(base, run.config, run.seed, empty=True).train()  # full-width draws take half a minute
    for module in adapted.modules():
        for name, factor in list(module.named_parameters(recurse=False)):
            if factor.is_meta:
                filled = torch.full(factor.shape, SMALL, device=device)
                setattr(module, name, nn.Parameter(filled, factor.requires_grad))
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    return adapted, torch.optim.AdamW(trained, run.lr, eps=1e-6, weight_decay=0.0, fused=device.type == "cuda")


def _step(
    adapted: nn.Module, adam: torch.optim.Optimizer, kind: str, tokens: Mapping[str, Tensor], labels: Tensor
) -> None:
    run_losses(kind, first_output(adapted(**tokens)), labels, 1).sum().backward()
    adam.step()
    adam.zero_grad()


def _moved(batch: tuple[dict[str, Tensor], Tensor], device: torch.device) -> tuple[dict[str, Tensor], Tensor]:
    tokens, labels = batch
    return {name: value.to(device) for name, value in tokens.items()}, labels.to(device)
