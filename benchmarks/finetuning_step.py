"""What a step of fine-tuning costs at BERT-base's size, and where its time goes. Nothing is asserted.

    COMPRESSIBLE_MODELS=/tmp/models python benchmarks/finetuning_step.py --out step.json    # under 2 minutes on an H100
    python benchmarks/finetuning_step.py --encoder bert-base --only lora full               # random weights

Three workloads: rows of 128 random tokens, all attended to; STS-B's training rows in batches as a few-shot run meets
them, each run its own 16 rows; and the same rows one batch a step out of 256. A pass is timed over steps that are CUDA
graphs, or one by one where they cannot be captured, which is then said. The floor of the full variant is the time to
read and write factors, gradients and both moments once, at 3.35 TB/s, plus the products at the rate of a large one that
is measured beside it. Profiles name the kernels that take longest.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from written import measured

from compressible.data.tasks import Task, load_task
from compressible.experiments.speed.finetuning import Endless, _gemm, config_of, count_step
from compressible.experiments.speed.shapes import load_shape, random_task
from compressible.finetuning.run import FineTuningRun
from compressible.finetuning.stacked_pass import StackedPass
from compressible.finetuning.trainer import Trainer
from compressible.runtime import devices, starting_factors
from compressible.runtime.devices import matmul_precision

BANDWIDTH = 3.35e12  # bytes a second of an H100
METHODS = {"lora": 20, "thin": 20, "compressed": 20, "full": 5}


def quick_orthogonal(rows: int, columns: int, generator: torch.Generator | None = None) -> torch.Tensor:
    """Random numbers in an orthogonal matrix's place: those of full width take half a minute, and move no clock."""
    return torch.randn(rows, columns, generator=generator) / max(rows, columns) ** 0.5


def runs_of(method: str, count: int, rows: int, subset: int) -> list[FineTuningRun]:
    """Runs of a method, each on `subset` of the rows, 0 for all."""
    config = config_of(method)
    draws = [torch.Generator().manual_seed(seed) for seed in range(count)]
    chosen = [torch.randperm(rows, generator=draw)[:subset] if subset else None for draw in draws]
    return [FineTuningRun(config, 1e-5, seed, chosen[seed]) for seed in range(count)]


def passed(trainer: Trainer, precision: str, device: str) -> dict[str, Any]:
    """Milliseconds of a step, memory, and whether it was a graph."""
    step, wait = Endless(trainer), lambda: devices.synchronize(device)
    with warnings.catch_warnings(record=True) as said, matmul_precision(precision), devices.peak_inside(device) as peak:
        warnings.simplefilter("always")
        began = time.perf_counter()
        for _ in range(trainer.steps):  # each padded length is captured
            step()
        wait()
        first = time.perf_counter() - began
        loops = []
        for _ in range(2):
            began = time.perf_counter()
            for _ in range(trainer.steps):
                step()
            wait()
            loops.append((time.perf_counter() - began) / trainer.steps)
        took = min(loops)
        found = {"ms": round(1e3 * took, 2), "run-steps/s": round(len(trainer.stacked.runs) / took, 1)}
        found |= {"captured": trainer.graphs is not None, "first s": round(first, 1), "GB": round(peak() / 1e9, 1)}
    told = [str(each.message)[:300] for each in said if "graph" in str(each.message)]
    return found | ({"warning": told[0]} if told else {})


def padding(trainer: Trainer) -> dict[str, float]:
    """Tokens of a step: the share that is attended to, and the mean padded length."""
    steps = [trainer.stacked.batch(step)[0] for step in range(trainer.steps)]
    sizes = [mask for tokens in steps for name, mask in tokens.items() if name.endswith("attention_mask")]
    full = sum(mask.numel() for mask in sizes)
    return {
        "attended to": round(float(sum(int(mask.sum()) for mask in sizes)) / full, 3),
        "length": float(full / trainer.stacked.order.numel()),
    }


def floor_seconds(trainer: Trainer, model: Any, precision: str, device: str, operations: int) -> dict[str, float]:
    """The full variant's floor, in milliseconds, by its parts."""
    numbers = trainer.adam.value.numel()
    moved = 8 * 4 * numbers / BANDWIDTH  # two ways for the factors, their gradients and two moments
    weights, runs = 0, len(trainer.stacked.runs)
    chains = 0
    for group in trainer.stacked.chains.groups:
        m, n = group.members[0].shape
        k, layers = group.members[0].inner, len(group.members)
        weights += layers * m * n
        chains += layers * runs * 3 * 2 * (k * k * n + m * k * n)  # forwards, and twice that backwards
    tokens = sum(ids.numel() for name, ids in trainer.stacked.batch(0)[0].items() if name.endswith("input_ids"))
    products = runs * operations + 2 * tokens * weights + chains  # the gradients by the updates beside thin's
    rate = _gemm(precision, device, 3)
    return {"bytes ms": 1e3 * moved, "products ms": 1e3 * products / rate, "products": float(products)}


def profiled(trainer: Trainer, precision: str, rows: int = 22) -> str:
    """A table of the kernels that take longest in eager steps, and their sum."""
    from torch.profiler import ProfilerActivity, profile

    trainer.graphs = None
    trainer.stacked.step.zero_()  # three updates more than the trainer's last would leave its record of losses
    tokens, labels = trainer.stacked.batch(0)
    with matmul_precision(precision):
        trainer.update(tokens, labels)
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            for _ in range(2):
                trainer.update(tokens, labels)
            torch.cuda.synchronize()
    kernels = sorted(seen.key_averages(), key=lambda each: -each.self_device_time_total)
    total = sum(each.self_device_time_total for each in kernels) / 2
    lines = [f"{total / 1e3:8.2f} ms a step in {sum(each.count for each in kernels) // 2} kernels"]
    for each in kernels[:rows]:
        own = each.self_device_time_total / 2
        lines.append(f"{own / 1e3:8.2f} ms {100 * own / total:5.1f} % {each.count // 2:5d} x  {each.key[:110]}")
    return "\n".join(lines)


def workloads(encoder: str, model: Any, device: str) -> dict[str, tuple[Task, int]]:
    """Tasks by name, with the size of a run's subset."""
    found = {"16 x 128": (random_task(model.config.vocab_size, 256, 128), 0)}
    if encoder != "bert-base":
        from compressible.data.pretrained import load_tokenizer

        try:
            task = load_task("stsb", load_tokenizer(encoder), "authors", 128)
        except Exception as error:
            print(f"no STS-B: {error}", flush=True)
            return found
        task = replace(task, validation=task.validation.take(range(64)))
        found |= {"stsb, n = 16": (task, 16), "stsb, n = 256": (task, 256)}
    return found


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All cases until the time is over, those that tell most first."""
    starting_factors.orthogonal = quick_orthogonal
    began, device = time.perf_counter(), devices.resolve_device(args.device)
    model: Any = load_shape(args.encoder).to(device)
    tasks = workloads(args.encoder, model, device)
    operations = count_step(model, 16, 128)
    result: dict[str, Any] = {"on": devices.device_name(device), "torch": torch.__version__, "operations": operations}
    print(json.dumps(result), flush=True)
    for method, precision, name in planned(args, list(tasks)):
        key = f"{method}/{precision}/{name}"
        if time.perf_counter() - began > args.budget:
            result[key] = {"skipped": "no time left"}
            print(json.dumps({key: result[key]}), flush=True)
            continue
        task, subset = tasks[name]
        runs = runs_of(method, args.runs or METHODS[method], len(task.train), subset)
        trainer, profile = None, ""
        try:
            start = time.perf_counter()
            trainer = Trainer(StackedPass(model, runs, task, args.steps, 16, precision))
            trainer.accelerate(False, device != "cpu")
            own: dict[str, Any] = {"setup s": round(time.perf_counter() - start, 1)}
            own |= passed(trainer, precision, device) | padding(trainer)
            if method == "full" and name == "16 x 128":
                own |= floor_seconds(trainer, model, precision, device, operations)
                own["times floor"] = round(own["ms"] / (own["bytes ms"] + own["products ms"]), 2)
            if device != "cpu" and (method, name) in PROFILED and precision == "bfloat16":
                profile = profiled(trainer, precision)
        except Exception as error:
            own = {"failed": f"{type(error).__name__}: {str(error)[:300]}"}
        result[key] = own | ({"profile": profile} if profile else {})
        print(json.dumps({key: own}), flush=True)
        print(profile, flush=True)
        del trainer
        gc.collect()
        if device != "cpu":
            torch.cuda.empty_cache()
    return result


PROFILED = {("lora", "16 x 128"), ("lora", "stsb, n = 256"), ("full", "16 x 128")}


def planned(args: argparse.Namespace, names: Sequence[str]) -> list[tuple[str, str, str]]:
    """Method, precision and workload of each case."""
    first, *others = names
    order = [("lora", "bfloat16", name) for name in names] + [("full", "bfloat16", first)]
    order += [(method, "bfloat16", first) for method in ("thin", "compressed")]
    order += [("lora", "tf32", first), ("full", "tf32", first), ("full", "bfloat16", names[-1])]
    order += [(method, "bfloat16", names[-1]) for method in ("thin", "compressed")]
    order += [("lora", "tf32", name) for name in others]
    kept = [case for case in dict.fromkeys(order) if case[0] in args.only and case[1] in args.precisions]
    return kept


def main() -> None:
    """Print JSON lines and tables, and write one file if it is named."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--encoder", default="mpnet", help="of load_encoder, or bert-base: that shape, random weights")
    parser.add_argument("--only", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--precisions", nargs="+", default=["bfloat16", "tf32"])
    parser.add_argument("--runs", type=int, default=0, help="runs of a pass in the place of 20, and 5 of full width")
    parser.add_argument("--steps", type=int, default=24, help="of a trainer, which start again twice")
    parser.add_argument("--budget", type=float, default=95.0, help="seconds after which no case begins")
    parser.add_argument("--device", default="auto")
    measured(parser, measure)


if __name__ == "__main__":
    main()
