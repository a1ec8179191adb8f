"""What fine-tuning steps cost: S runs in one pass of this library's engine beside peft's LoRA, a run at a time.

A case is an encoder, a precision, a method and the number of runs; its modes are how the steps are taken. Tokens are
random and all rows full, since values move no clock: nothing here measures what is learned.
"""

from __future__ import annotations

import copy
import gc
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from torch import Tensor, nn

from compressible.adapters.config import DeepLoraConfig
from compressible.data import hub
from compressible.data.tasks import Task
from compressible.experiments.speed.engines import Timing, failed
from compressible.experiments.speed.roofline import LARGE, count_operations, gemm_rate, time_calls
from compressible.experiments.speed.shapes import load_shape, task_of, writes
from compressible.finetuning.losses import first_output, run_losses
from compressible.finetuning.run import FineTuningRun
from compressible.finetuning.stacked_pass import StackedPass
from compressible.finetuning.trainer import Trainer
from compressible.runtime import devices
from compressible.runtime.devices import matmul_precision

OF_PEFT = {"peft": "lora", "peft-compressed": "compressed", "peft-thin": "thin"}  # in a plain loop, a run at a time
METHODS = (*OF_PEFT, "compressed", "thin", "lora", "full")
MODES = ("eager", "graph", "compiled")
RANK, STEPS, LR = 8, 1024, 1e-5
GOAL = 20  # runs of the goal
HEAD: dict[str, Any] = {"task_type": "SEQ_CLS", "target_modules": "all-linear"}
WORDS = HEAD | {"task_type": "CAUSAL_LM"}  # all but the layer that writes words


@dataclass(frozen=True)
class Case:
    """Something to time: `modes` of MODES, those that the device has; real: with the compressed start itself.

    A compressed case that is not `real` draws factors of the same shapes, since its gradients' eigenvectors take
    longer than the steps that are timed.
    """

    encoder: str
    precision: str
    method: str
    runs: int = 1
    modes: tuple[str, ...] = ("graph",)
    real: bool = False

    @property
    def name(self) -> str:
        """The case in words, its mode aside."""
        return f"{self.encoder}/{self.precision}/{self.runs} x {self.method}"


def cases(
    encoders: Sequence[str], run_counts: Sequence[int], precisions: Sequence[str], full_runs: int, compiled: bool
) -> Iterator[Case]:
    """Yield the cases of a survey, those that tell most first.

    Per encoder: peft in all precisions; Deep LoRA as a method of peft in the first one; there, too, compressed with the
    fewest runs and GOAL (or the most). What takes long to compile comes after that, peft compiled first, sweeps over
    run_counts in the first two precisions last.
    """
    few, first = min(run_counts), precisions[0]
    target = GOAL if GOAL in run_counts else max(run_counts)
    goals = [target] if target > few else []
    for encoder in encoders:
        yield from (Case(encoder, precision, "peft", modes=("eager",)) for precision in precisions)
        yield from (Case(encoder, first, method, modes=("eager",)) for method in list(OF_PEFT)[1:])
        yield Case(encoder, first, "compressed", few, ("eager", "graph"), real=True)
        yield from (Case(encoder, first, "compressed", count, real=True) for count in goals)
    if compiled:
        yield from (Case(encoder, first, "peft", modes=("compiled",)) for encoder in encoders)
        yield from (Case(encoder, first, "compressed", target, ("compiled",)) for encoder in encoders)
    for encoder in encoders:
        yield from (Case(encoder, first, "compressed", count) for count in run_counts if count not in (few, target))
        yield from (Case(encoder, first, method, target) for method in ("thin", "lora"))
        yield Case(encoder, first, "full", full_runs)
    if compiled:
        yield from (Case(e, first, "compressed", few, ("compiled",)) for e in encoders if goals)
    for precision in precisions[1:2]:
        yield from (Case(encoder, precision, "compressed", count) for count in run_counts for encoder in encoders)


def survey(
    chosen: Sequence[Case], batch_size: int, length: int, device: str, seconds: float, trials: int, budget: float
) -> dict[str, float | str | np.ndarray]:
    """Time the chosen cases and return "<case>/<mode>/<what>", what in steps (T,) seconds a pass, compilation, memory.

    Also "<case>/setup"; "<encoder>/operations" of the matrix products of one step of one run, "<encoder>/bytes" of its
    model in float32; and "<precision>/gemm", operations a second. What breaks has "<case>/<mode>/skipped", the reason,
    in its place; so has what had not begun after `budget` seconds.
    """
    began, place = time.perf_counter(), devices.resolve_device(device)
    out: dict = {
        f"{name}/gemm": _gemm(name, place, trials) for name in dict.fromkeys(case.precision for case in chosen)
    }
    models: dict[str, nn.Module] = {}
    for case in chosen:
        if time.perf_counter() - began > budget:
            out |= {f"{case.name}/{mode}/skipped": f"not begun after {budget:g} s" for mode in case.modes}
            continue
        if case.encoder not in models:
            models[case.encoder] = load_shape(case.encoder).to(place)
            out[f"{case.encoder}/operations"] = count_step(models[case.encoder], batch_size, length)
            out[f"{case.encoder}/bytes"] = sum(p.nbytes for p in models[case.encoder].parameters())
        timings = time_case(case, models[case.encoder], batch_size, length, seconds, trials)
        for mode, timing in timings.items():
            out |= _values(f"{case.name}/{mode}", timing)
    return out


def time_case(case: Case, model: Any, batch_size: int, length: int, seconds: float, trials: int) -> dict[str, Timing]:
    """Time one case on a model that is on its device, and return a Timing a mode; what breaks says so in `skipped`."""
    task = task_of(model, 4 * batch_size, length)
    modes = case.modes if next(model.parameters()).is_cuda else tuple(_on_cpu(case.modes))
    found: dict[str, Timing] = {}
    try:
        take = time_peft if case.method in OF_PEFT else _time_stacked
        for mode, timing in take(case, modes, model, task, batch_size, seconds, trials):
            found[mode] = timing
    except Exception as failure:
        found |= {mode: Timing(skipped=failed(failure)) for mode in modes if mode not in found}
    _let_go()
    return found


def count_step(model: Any, batch_size: int, length: int) -> int:
    """Return the operations of the matrix products in one step of one run, adapters of rank 8 included."""
    task = task_of(model, batch_size, length)
    trainer = Trainer(StackedPass(model, runs_of("thin", 1, of=model), task, STEPS, batch_size))
    return count_operations(lambda: trainer.advance(0))


def rate(out: dict, name: str, modes: Sequence[str] = MODES) -> tuple[str, np.ndarray]:
    """Return the fastest of `modes` of the case `name` in a survey and its steps of a run per second (T,).

    "" and an empty array if none of them ran.
    """
    runs = int(name.rpartition("/")[2].partition(" x ")[0])
    ran = {mode: runs / out[f"{name}/{mode}/steps"] for mode in modes if f"{name}/{mode}/steps" in out}
    best = max(ran, key=lambda mode: np.median(ran[mode]), default="")
    return best, ran.get(best, np.array([]))


def fastest_peft(out: dict, encoder: str, precisions: Sequence[str], mode: str = "eager") -> np.ndarray:
    """Return the steps per second (T,) of peft's LoRA in the precision that suits it best; NaN if none ran."""
    rates = [rate(out, f"{encoder}/{precision}/1 x peft", [mode])[1] for precision in precisions]
    return max((values for values in rates if len(values)), key=np.median, default=np.array([np.nan]))


def _on_cpu(modes: Sequence[str]) -> Iterator[str]:
    """Graphs need a GPU: their place is taken by eager steps."""
    yield from dict.fromkeys("eager" if mode == "graph" else mode for mode in modes)


def config_of(method: str, real: bool = False, of: nn.Module | None = None) -> PeftConfig:
    """Return the configuration of a method; a compressed one that is not real draws its factors at random.

    of: the model, which tells encoders from causal language models; by default an encoder.
    """
    variant, what = OF_PEFT.get(method, method), HEAD if of is None or not writes(of) else WORDS
    if variant == "lora":
        return LoraConfig(r=RANK, lora_alpha=RANK, **what)
    return DeepLoraConfig(r=RANK, variant=variant, init_weights=real or variant != "compressed", **what)


def runs_of(method: str, count: int, real: bool = False, of: nn.Module | None = None) -> list[FineTuningRun]:
    """Return `count` runs of a method on the model `of`."""
    return [FineTuningRun(config_of(method, real, of), LR, seed) for seed in range(count)]


def _time_stacked(
    case: Case, modes: Sequence[str], model: nn.Module, task: Task, batch_size: int, seconds: float, trials: int
) -> Iterator[tuple[str, Timing]]:
    device = str(next(model.parameters()).device)
    began = time.perf_counter()
    runs = runs_of(case.method, case.runs, case.real, model)
    trainer = Trainer(StackedPass(model, runs, task, STEPS, batch_size, case.precision))
    devices.synchronize(device)
    setup = time.perf_counter() - began if case.real or case.method != "compressed" else float("nan")
    for mode in modes:
        trainer.graphs = None
        _let_go()
        try:
            trainer.accelerate(mode == "compiled", mode != "eager" and device != "cpu")
            timing = _steady(Endless(trainer), device, case.precision, setup, mode, seconds, trials)
            lost = mode != "eager" and device != "cpu" and trainer.graphs is None
            yield mode, Timing(skipped="not captured") if lost else timing
        except Exception as failure:
            yield mode, Timing(skipped=failed(failure))
        if mode == "compiled":
            trainer.accelerate(graphed=False)
            torch.compiler.reset()  # which lets go of the code of this shape, and of its count of recompilations


def time_peft(
    case: Case, modes: Sequence[str], model: nn.Module, task: Task, batch_size: int, seconds: float, trials: int
) -> Iterator[tuple[str, Timing]]:
    """LoRA or Deep LoRA as peft's users run it: AdamW (fused on a GPU), batches on the device beforehand.

    Compiled, forward and backward pass are torch.compile's, on a GPU as CUDA graphs ("reduce-overhead").
    """
    device = next(model.parameters()).device
    began = time.perf_counter()
    base = copy.deepcopy(model).to(torch.bfloat16 if case.precision == "bfloat16" else torch.float32)
    with hub.quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of transformers, on what peft asks it
        adapted = get_peft_model(base, config_of(case.method, of=model)).train()
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    adam = torch.optim.AdamW(trained, LR, fused=device.type == "cuda")
    tokens = {key: value[:batch_size].to(device) for key, value in task.train.tokens.items()}
    labels = task.train.labels[:batch_size].to(device)

    def step(adapted: Callable[..., Any]) -> None:
        _peft_loss(adapted, task.kind, tokens, labels).backward()
        adam.step()
        adam.zero_grad()

    setup = time.perf_counter() - began
    for mode in modes:
        taken = torch.compile(adapted, mode="reduce-overhead") if mode == "compiled" else adapted
        yield mode, _steady(partial(step, taken), str(device), case.precision, setup, mode, seconds, trials)
        if mode == "compiled":
            torch.compiler.reset()


def _peft_loss(adapted: Callable[..., Any], kind: str, tokens: dict[str, Tensor], labels: Tensor) -> Tensor:
    if kind == "causal":
        return adapted(**tokens, labels=labels, use_cache=False).loss
    return run_losses("regression", first_output(adapted(**tokens)), labels, 1).sum()


def _steady(
    step: Callable[[], object], device: str, precision: str, setup: float, mode: str, seconds: float, trials: int
) -> Timing:
    wait = partial(devices.synchronize, device)
    with devices.peak_inside(device) as peak, matmul_precision(precision):
        began = time.perf_counter()
        for _ in range(3 if mode == "compiled" else 1):  # torch.compile's graphs warm up, are recorded, are replayed
            step()
        wait()
        compilation = time.perf_counter() - began
        steps = time_calls(step, wait, seconds, trials)
        return Timing(setup, compilation, steps, peak() if device != "cpu" else 0, mode)


class Endless:
    """Steps of a trainer without end: its data and its losses start again."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer, self.at = trainer, int(trainer.stacked.step)

    def __call__(self) -> None:
        if self.at >= self.trainer.steps:
            self.trainer.stacked.step.zero_()
            self.at = 0
        self.trainer.advance(self.at)
        self.at += 1


def _values(key: str, timing: Timing) -> dict[str, float | str | np.ndarray]:
    if timing.skipped:
        return {f"{key}/skipped": timing.skipped}
    costs: dict[str, Any] = {"setup": timing.setup, "compilation": timing.compilation, "memory": timing.memory}
    named = costs | {"steps": timing.step}
    return {f"{key}/{what}": value for what, value in named.items() if not np.isnan(value).all()}


def _gemm(precision: str, device: str, trials: int) -> float:
    kind = torch.bfloat16 if precision == "bfloat16" else torch.float32
    edge = LARGE["cpu" if device == "cpu" else "cuda"]
    with matmul_precision(precision):
        return gemm_rate((edge, edge, edge), kind, device, 0.1, trials)


def _let_go() -> None:
    """Give back what an earlier measurement held on a GPU: graphs, cached memory."""
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()
