"""The steps of one pass of fine-tuning, what is looked at between them, and the histories of its runs.

On a GPU each step, with its backward pass and its update, is one CUDA graph a padded length.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compressible.finetuning.checkpoint import Checkpoint, Kept, digests, stored
from compressible.finetuning.dry_run import draws_itself, try_out
from compressible.finetuning.graphs import StepGraphs, cause
from compressible.finetuning.run import RunHistory
from compressible.finetuning.stacked.adamw import StackedAdamW
from compressible.finetuning.stacked.model import left, overflown, rated
from compressible.finetuning.stacked_pass import PassSnapshot, StackedPass
from compressible.runtime import devices
from compressible.runtime.checks import expect
from compressible.runtime.devices import matmul_precision
from compressible.runtime.progress import progress

BETAS, EPS = (0.9, 0.999), 1e-6  # the authors' AdamW, without weight decay


@dataclass(frozen=True)
class Looks:
    """What is looked at and written between steps, and what is kept of it: arguments of `fine_tune`."""

    evaluate_at: Sequence[int]
    watch_at: Sequence[int]
    watch: Callable | None
    checkpoint_every: int
    keep_factors: bool
    show_progress: bool | None


class Trainer:
    """Takes a pass's runs through all their steps, whose rate decays linearly to `decay_ratio` of its start."""

    def __init__(self, stacked: StackedPass, decay_ratio: float = 1.0) -> None:
        self.stacked, self.steps, self.decay_ratio = stacked, len(stacked.order), decay_ratio
        with matmul_precision(stacked.precision):
            try_out(stacked)
            stacked.start()
            stacked.draws = draws_itself(stacked)
        shape = self.steps, len(stacked.runs)
        self.losses = torch.full(shape, float("nan"), dtype=torch.float64, device=stacked.device)
        self.adam = StackedAdamW(rated(stacked.model), BETAS, EPS)
        self.graphs: StepGraphs | None = None

    def accelerate(self, compiled: bool = False, graphed: bool | None = None) -> None:
        """Compile the pass over the model, and replay steps as CUDA graphs (by default on a GPU) as far as they can."""
        self.stacked.compile(compiled)
        on_gpu = self.stacked.device.type == "cuda"
        graphed = on_gpu if graphed is None else graphed
        expect("graphed", graphed, not graphed or on_gpu, "False without a CUDA device")
        if graphed and any(getattr(run.config, "module_dropout", 0) for run in self.stacked.runs):
            graphed = False
            self._ungraphed("module_dropout of its config is decided on the host, which a graph would not do again")
        self.graphs = StepGraphs(self.gradients, self.update, self.stacked.device, compiled) if graphed else None

    def train(self, looks: Looks, checkpoint: Path | None = None) -> list[RunHistory]:
        """Take all steps from where the checkpoint left them and return the histories."""
        saved = None if checkpoint is None else self._checkpoint(checkpoint, looks.keep_factors)
        begin, kept = (0, Kept()) if saved is None else saved.resume(looks.evaluate_at, looks.watch_at)
        self.stacked.step.fill_(begin)
        device = str(self.stacked.device)
        with devices.peak_inside(device) as peak:
            self._train(begin, looks, kept, saved)
            devices.synchronize(device)
            held = peak() if self.stacked.device.type == "cuda" else 0
        scores = {at: kept.scores[at] for at in looks.evaluate_at}
        watched = {at: kept.watched[at] for at in looks.watch_at}
        histories = self._histories(replace(kept, scores=scores, watched=watched), held)
        return (
            histories
            if looks.keep_factors
            else [replace(each, chains=None, heads=None, others=None, taken_off=None) for each in histories]
        )

    def _train(self, begin: int, looks: Looks, kept: Kept, saved: Checkpoint | None) -> None:
        stacked = self.stacked
        bar = progress(self.steps, f"{len(stacked.runs)} runs", enabled=looks.show_progress)
        with bar, matmul_precision(stacked.precision):
            for step in range(begin, self.steps + 1):
                if step in looks.evaluate_at and step not in kept.scores:
                    with stacked.drawing("score", step):
                        kept.scores[step], kept.lost = stacked.evaluate()
                if step in looks.watch_at and step not in kept.watched:
                    snapshot = PassSnapshot(step, stacked.runs, stacked.model)
                    kept.watched[step] = _watched(looks.watch, snapshot, saved is not None)
                if step == self.steps:
                    kept.lost = sorted({*kept.lost, *overflown(stacked.model)})
                if saved is not None and (step == self.steps or (step > begin and step % looks.checkpoint_every == 0)):
                    saved.save(step, kept)
                if step < self.steps:
                    with stacked.drawing("draws", step):
                        self.advance(step)
                    bar.update(1)

    def advance(self, step: int) -> None:
        """Take one step of all runs."""
        tokens, labels = self.stacked.batch(step)
        if self.graphs is not None:
            try:
                self.graphs.step(tokens, labels)
                return
            except Exception as error:  # whatever it is: a step without a graph works, or says what is wrong
                self._ungraphed(cause(error))
        self.update(tokens, labels)

    def gradients(self, tokens: dict[str, Tensor], labels: Tensor) -> Tensor:
        """Add the gradients of the losses (S,) of these rows to those that there are, and return the losses."""
        losses = self.stacked.losses(tokens, labels)
        losses.sum().backward()
        return losses

    def update(self, tokens: dict[str, Tensor], labels: Tensor) -> None:
        """Take one step of all runs with these rows; everything that it needs is on the device."""
        self.adam.forget_gradients()
        losses, step = self.gradients(tokens, labels), self.stacked.step
        with torch.no_grad():
            self.losses.index_copy_(0, step[None], losses.detach().double()[None])
            self.adam.step(1 - (1 - self.decay_ratio) * step.double() / self.steps)
            step += 1

    def _ungraphed(self, reason: str) -> None:
        """Go on without graphs, which changes no number; a failed capture has run nothing."""
        self.graphs = None
        kind = type(self.stacked.source).__name__
        warnings.warn(
            f"the steps of {kind} are no CUDA graphs, since {reason}; they run one by one, which takes longer and "
            "gives the same: a pass that can be captured reads no value of a tensor on the host",
            RuntimeWarning,
            stacklevel=2,
        )

    def release(self) -> None:
        """Let go of graphs and factors at once."""
        self.stacked.release()
        del self.graphs, self.adam
        gc.collect()
        if self.stacked.device.type == "cuda":
            torch.cuda.empty_cache()

    def _checkpoint(self, path: Path, keep_factors: bool) -> Checkpoint:
        adam = self.adam
        state = {"losses": self.losses, "value": adam.value, "mean": adam.mean, "square": adam.square}
        key = digests(self.stacked, [self.decay_ratio, keep_factors, adam.shapes, len(adam.value)])
        return Checkpoint(path, key, state | {"count": adam.count}, self.steps, keep_factors)

    def _histories(self, kept: Kept, peak: int) -> list[RunHistory]:
        losses, seconds, stacked = self.losses.T.cpu().numpy(), kept.seconds, self.stacked
        histories = []
        for at, run in enumerate(stacked.runs):
            lost = np.flatnonzero(~np.isfinite(losses[at]))
            divergence = int(lost[0]) if len(lost) else self.steps if at in kept.lost else None
            scores, watched = ({step: of[at] for step, of in what.items()} for what in (kept.scores, kept.watched))
            costs, kept_of_it = (seconds, peak, len(stacked.runs)), left(stacked.model, at)
            seen = losses[at], scores, watched, divergence
            histories.append(RunHistory(run, *seen, *costs, base=stacked.source, **kept_of_it))
        return histories


@torch.no_grad()
def _watched(watch: Callable | None, snapshot: PassSnapshot, storable: bool) -> list[Any]:
    assert watch is not None  # fine_tune asks for it where steps are watched
    values, runs = list(watch(snapshot)), len(snapshot.runs)
    expect("watch", f"{len(values)} values", len(values) == runs, f"one for each of the pass's {runs} runs")
    if storable:  # said now: the first checkpoint may be long in coming
        stored(values, {})
    return values
