"""What several GPUs give `fine_tune`: seconds of a call, and whether its numbers are those of one. Nothing is asserted.

    python benchmarks/finetuning_devices.py --out devices.json      # under 90 seconds on 4 H100s
    python benchmarks/finetuning_devices.py --encoder bert-base --task random --precision bfloat16

Runs of MiniLM on STS-B, which differ in their seeds, go through one pass on one GPU and then, in as many processes,
through 2 and 4 GPUs (those that there are). "first" includes the start of the processes, about what importing PyTorch
and transformers takes; "again" is a second call, which finds them alive. Differences are the largest relative ones of
losses, and absolute ones of scores, to the call on one GPU in one pass, and to one that cuts passes alike on one GPU:
the first differs as the shapes of matrix products do, which grows from step to step, the second in nothing.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import numpy as np
import torch
from torch import nn
from written import measured

import compressible as cd
from compressible.data.pretrained import load_for_task
from compressible.data.tasks import Task
from compressible.runtime.devices import device_name

EARLY = 20  # steps after which losses are compared before their differences have grown


def loaded(encoder: str, task: str) -> tuple[nn.Module, Task]:
    """The model on the CPU and a task; "random": rows of 64 random tokens, for an encoder with random weights."""
    if task != "random":
        return load_for_task(encoder, task, validation_rows=500)
    from compressible.experiments.speed.shapes import load_shape, random_task

    model: Any = load_shape(encoder)
    return model, random_task(model.config.vocab_size, 1024, 64)


def timed(model: nn.Module, runs: list, task: Task, **given: Any) -> tuple[float, list[cd.RunHistory]]:
    """Seconds of a call and what it gave."""
    began = time.perf_counter()
    histories = cd.fine_tune(model, runs, task, show_progress=False, **given)
    return time.perf_counter() - began, histories


def differences(found: list[cd.RunHistory], expected: list[cd.RunHistory]) -> dict[str, float]:
    """The largest relative difference of early and of all losses, and the largest absolute one of last scores."""
    losses, wanted = (np.array([history.losses for history in each]) for each in (found, expected))
    apart = np.abs(losses - wanted) / np.abs(wanted)
    scores = [
        abs(list(a.scores.values())[-1] - list(b.scores.values())[-1]) for a, b in zip(found, expected, strict=True)
    ]
    early = float(apart[:, :EARLY].max())
    return {f"losses of {EARLY} steps": early, "losses": float(apart.max()), "scores": float(max(scores))}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All calls, one after the other."""
    kind = "cuda:{}" if torch.cuda.is_available() else "cpu"
    model, task = loaded(args.encoder, args.task)
    model = model.to(kind.format(0))
    config = cd.DeepLoraConfig(r=args.rank, variant=args.variant, target_modules="all-linear", task_type="SEQ_CLS")
    runs = [cd.FineTuningRun(config, args.lr, seed) for seed in range(args.runs)]
    given = {"steps": args.steps, "precision": args.precision, "evaluate_at": [args.steps]}
    timed(model, runs[:1], task, **(given | {"steps": 2, "evaluate_at": [2]}))  # kernels are compiled here
    one, alone = timed(model, runs, task, **given)
    result: dict[str, Any] = {"on": device_name(kind.format(0)), **vars(args), "out": str(args.out)}
    score = float(np.mean([history.scores[args.steps] for history in alone]))
    result["1"] = {"seconds": round(one, 2), "mean score": round(score, 4)}
    print(json.dumps(result), flush=True)
    seen = torch.cuda.device_count() or max(args.devices)
    for count in (each for each in args.devices if each <= seen):
        places = [kind.format(index) for index in range(count)]
        first, _ = timed(model, runs, task, devices=places, **given)
        again, found = timed(model, runs, task, devices=places, **given)
        cut, alike = timed(model, runs, task, max_stack=-(-args.runs // count), **given)
        own = {"first": first, "again": again, "cut alike on one": cut, "one / again": one / again}
        own |= {"one / again, passes alone": max(h.seconds for h in alone) / max(h.seconds for h in found)}
        result[str(count)] = {name: round(value, 2) for name, value in own.items()}
        result[str(count)] |= {"to one pass": differences(found, alone), "to the same cut": differences(found, alike)}
        print(json.dumps({count: result[str(count)]}), flush=True)
    return result


def main() -> None:
    """Print JSON lines, and write one file if it is named."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--encoder", default="minilm", help="of load_encoder, or bert-base: that shape, random weights")
    parser.add_argument("--task", default="stsb", help="of load_task, or random")
    parser.add_argument("--variant", default="compressed", choices=("compressed", "thin", "full"))
    parser.add_argument("--precision", default="tf32", choices=("float32", "tf32", "bfloat16"))
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--devices", type=int, nargs="+", default=[2, 4], help="numbers of devices")
    measured(parser, measure)


if __name__ == "__main__":
    main()
