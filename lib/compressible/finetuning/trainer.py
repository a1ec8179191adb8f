"""One pass of fine-tuning: S runs over one copy of the model's structure, trained, evaluated and looked at.

On a GPU each step, with its backward pass and its update, is one CUDA graph a padded length.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from compressible.adapters.layer import check_sizes, factor_dtype, layer_shape, replace_module, starting_factors
from compressible.adapters.merge import first_output
from compressible.adapters.targets import places, saved_modules
from compressible.finetuning.batches import LENGTHS, DeviceRows, PassRows, TaskLike
from compressible.finetuning.checkpoint import Checkpoint, Kept, stored
from compressible.finetuning.dropout.per_run import RunStreams
from compressible.finetuning.dry_run import try_out
from compressible.finetuning.losses import run_losses, token_losses
from compressible.finetuning.run import FineTuningRun, RunHistory, data_order, fresh_head, run_generator, sharing
from compressible.finetuning.stacked.adamw import StackedAdamW
from compressible.finetuning.stacked.grouped_factors import ChainGroups
from compressible.finetuning.stacked.layers import StackedAdapter, StackedLinear, compressed_starts, stacked_adapters
from compressible.finetuning.stacked_pass import EVALUATION_ROWS, Snapshot
from compressible.runtime import devices
from compressible.runtime.checks import expect
from compressible.runtime.devices import matmul_precision
from compressible.runtime.progress import progress

BETAS, EPS = (0.9, 0.999), 1e-6  # the authors' AdamW, without weight decay
RECOMPILATIONS = 64


class Tuning:
    """One pass: S runs whose stacked adapters fit one copy of the model's structure."""

    def __init__(
        self, model: nn.Module, runs: list[FineTuningRun], task: TaskLike, steps: int, batch_size: int = 16,
        decay_ratio: float = 1.0, precision: str = "float32", dropout: bool = True,
    ) -> None:  # fmt: skip
        self.device = next(model.parameters()).device
        self.source, self.runs, self.task, self.steps, self.size = model, runs, task, steps, batch_size
        self.precision, self.decay_ratio, self.dropout = precision, decay_ratio, dropout
        self.step = torch.zeros((), dtype=torch.int64, device=self.device)
        self.losses = torch.full((steps, len(runs)), float("nan"), dtype=torch.float64, device=self.device)
        self.rows = PassRows(len(runs))
        self.streams = RunStreams([run.seed for run in runs], self.step, self.rows)
        self.order = torch.stack([data_order(run, len(task.train.labels), steps, batch_size) for run in runs], 1)
        self.train_rows = DeviceRows(task.train, self.device)
        self.validation_rows = DeviceRows(task.validation, self.device)
        self.call, self.chains = self._pass, ChainGroups()
        with matmul_precision(precision):
            self.model = self._stack()
        self.adam = StackedAdamW(self._rates(), BETAS, EPS)
        self.graphs: dict[tuple, _Graph] | None = None

    def accelerate(self, compiled: bool = False, graphed: bool | None = None) -> None:
        """Compile the pass over the model, and replay steps as CUDA graphs (by default on a GPU)."""
        self.call = torch.compile(self._pass, dynamic=False) if compiled else self._pass
        if compiled:  # one compilation a padded length and a pass; beyond the limit PyTorch goes on uncompiled
            from torch._dynamo import config as limits

            limits.recompile_limit = max(limits.recompile_limit, RECOMPILATIONS)
        if graphed is None:
            graphed = self.device.type == "cuda"
        expect("graphed", graphed, not graphed or self.device.type == "cuda", "False without a CUDA device")
        self.graphs = {} if graphed else None

    def train(
        self, evaluate_at: Sequence[int], watch_at: Sequence[int], watch: Callable | None = None,
        checkpoint: Path | None = None, checkpoint_every: int = 100, show_progress: bool | None = None,
        keep_factors: bool = True,
    ) -> list[RunHistory]:  # fmt: skip
        """Take all steps from where the checkpoint left them and return the histories."""
        saved = None if checkpoint is None else Checkpoint(checkpoint, self, keep_factors)
        begin, kept = (0, Kept()) if saved is None else saved.resume(evaluate_at, watch_at)
        device = str(self.device)
        with devices.peak_inside(device) as peak:
            self._train(begin, evaluate_at, watch_at, watch, kept, saved, checkpoint_every, show_progress)
            devices.synchronize(device)
            held = peak() if self.device.type == "cuda" else 0
        scores, watched = {at: kept.scores[at] for at in evaluate_at}, {at: kept.watched[at] for at in watch_at}
        histories = self._histories(replace(kept, scores=scores, watched=watched), held)
        return histories if keep_factors else [replace(history, chains=None, heads=None) for history in histories]

    def _train(
        self, begin: int, evaluate_at: Sequence[int], watch_at: Sequence[int], watch: Callable | None,
        kept: Kept, saved: Checkpoint | None, checkpoint_every: int, show_progress: bool | None,
    ) -> None:  # fmt: skip
        bar = progress(self.steps, f"{len(self.runs)} runs", enabled=show_progress)
        with bar, matmul_precision(self.precision):
            for step in range(begin, self.steps + 1):
                if step in evaluate_at and step not in kept.scores:
                    kept.scores[step], kept.lost = self.evaluate()
                if step in watch_at and step not in kept.watched:
                    kept.watched[step] = self._watched(watch, step, saved is not None)
                if step == self.steps:
                    kept.lost = sorted({*kept.lost, *self._overflown()})
                if saved is not None and (step == self.steps or (step > begin and step % checkpoint_every == 0)):
                    saved.save(step, kept)
                if step < self.steps:
                    self.advance(step)
                    bar.update(1)

    @torch.no_grad()
    def _watched(self, watch: Callable, step: int, storable: bool) -> list[Any]:
        values, runs = list(watch(Snapshot(step, self.runs, self.model))), len(self.runs)
        expect("watch", f"{len(values)} values", len(values) == runs, f"one for each of the pass's {runs} runs")
        if storable:  # said now: the first checkpoint may be long in coming
            stored(values, {})
        return values

    def release(self) -> None:
        """Let go of graphs and factors at once: bound methods make cycles, which wait for the collector otherwise."""
        self.graphs = self.call = self.model = self.adam = self.chains = None
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def advance(self, step: int) -> None:
        """Take one step of all runs."""
        rows = self.order[step].reshape(-1)
        tokens, labels = self.train_rows.batch(rows, LENGTHS[self.device.type])
        if self.graphs is None:
            self._update(tokens, labels)
            return
        key = tuple(value.shape for value in tokens.values())
        if key not in self.graphs:
            self.graphs[key] = _Graph(self, tokens, labels)
        self.graphs[key].replay(tokens, labels)

    @torch.no_grad()
    def evaluate(self) -> tuple[list[float], list[int]]:
        """Return the score of every run on the validation set, and the runs, with NaN, whose logits are not finite."""
        self.model.eval()
        self.chains.contract()
        try:
            logits = self._validation_logits()
        finally:
            self.chains.release()
        finite = [bool(np.isfinite(run).all()) for run in logits]
        lost = [at for at, good in enumerate(finite) if not good]
        if self.task.kind == "generation":
            return [value.item() for value in logits], lost
        labels = self.task.validation.labels.cpu().numpy()
        pairs = zip(logits, finite, strict=True)
        return [float(self.task.score(run, labels)) if good else float("nan") for run, good in pairs], lost

    @torch.no_grad()
    def _overflown(self) -> list[int]:
        """The runs whose updates may hold more than their precision can, by the norms of the two factors."""
        good = torch.ones(len(self.runs), dtype=torch.bool, device=self.device)
        for adapter in stacked_adapters(self.model).values():
            lower, upper = (half.double().flatten(1).norm(dim=1) for half in adapter.contracted())
            good &= lower * upper < torch.finfo(adapter.source()[0][0].dtype).max  # False for NaN
        for head in (module for module in self.model.modules() if isinstance(module, StackedLinear)):
            for part in head.parameters():
                good &= part.flatten(1).isfinite().all(1)
        return (~good).nonzero().flatten().tolist()

    def _validation_logits(self) -> np.ndarray | Tensor:
        """Logits (S, N, outputs) on the CPU, in the order of the rows; for generation the mean losses (S,)."""
        runs, count = len(self.runs), len(self.task.validation.labels)
        by_length = self.validation_rows.lengths.argsort() if self.validation_rows.lengths is not None else None
        by_length = torch.arange(count) if by_length is None else by_length
        parts = []
        for rows in by_length.split(max(1, EVALUATION_ROWS // runs)):
            tokens, labels = self.validation_rows.batch(rows.repeat(runs), LENGTHS["cpu"])
            self.rows.rows = len(labels)
            logits = first_output(self._forward(tokens, labels))
            if self.task.kind == "generation":
                parts.append(torch.stack(token_losses(logits, labels, runs)))
            else:
                parts.append(logits.float().view(runs, len(rows), -1).cpu())
        if self.task.kind == "generation":
            total, tokens = torch.stack(parts).sum(0).cpu()  # not a mean of means: passes differ in their parts
            return total / tokens
        stacked = torch.cat(parts, 1)
        return stacked[:, by_length.argsort()].numpy()

    def _forward(self, tokens: dict[str, Tensor], labels: Tensor) -> Any:
        if self.task.kind == "generation":
            tokens = tokens | {"labels": labels}
        return self.model(**tokens)

    def _losses(self, tokens: dict[str, Tensor], labels: Tensor) -> Tensor:
        """The losses (S,) of one training batch."""
        self.model.train(self.dropout)
        self.streams.begin()  # outside of what may be compiled
        self.rows.rows = len(labels)
        try:
            return self.call(tokens, labels)
        except BaseException:
            self.chains.release()
            raise

    def _pass(self, tokens: dict[str, Tensor], labels: Tensor) -> Tensor:
        self.chains.contract()
        with self.streams:
            logits = first_output(self._forward(tokens, labels))
        self.chains.release()
        return run_losses(self.task.kind, logits, labels, len(self.runs))

    def _update(self, tokens: dict[str, Tensor], labels: Tensor) -> None:
        self.adam.zero()
        losses = self._losses(tokens, labels)
        losses.sum().backward()
        with torch.no_grad():
            self.losses.index_copy_(0, self.step[None], losses.detach().double()[None])
            self.adam.step(1 - (1 - self.decay_ratio) * self.step.double() / self.steps)
            self.step += 1

    def _stack(self) -> nn.Module:
        """A copy of the model's structure with stacked adapters and heads; frozen weights are shared if they can be."""
        half = self.precision == "bfloat16"
        model = copy.deepcopy(self.source).to(torch.bfloat16) if half else sharing(self.source)
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        configs = [run.config for run in self.runs]
        found = places(model, configs[0])
        layers = {name: model.get_submodule(name) for name in found}
        shapes = {name: layer_shape(layer) for name, layer in layers.items()}
        for config in configs:
            check_sizes(shapes, config)
        adapters = {name: StackedAdapter(layers[name], configs, shapes[name], self.rows) for name in found}
        for name, names in found.items():
            for place in names:
                replace_module(model, place, adapters[name])
        for name, _ in list(saved_modules(model, configs[0])):
            replace_module(model, name, self._head(name))
        self.model = model
        try_out(self, adapters.values())
        starts = self._starts(adapters)
        self.chains = ChainGroups(list(adapters.values()), [[start[name] for start in starts] for name in adapters])
        return model

    def _starts(self, adapters: dict[str, StackedAdapter]) -> list[dict[str, list[Tensor]]]:
        """Every run's starting factors by layer: drawn, or for compressed runs from the gradient of the first batch."""
        shapes = {name: (adapter.shape, adapter.embedding) for name, adapter in adapters.items()}
        kind = factor_dtype(next(iter(adapters.values())).base)
        with ThreadPoolExecutor() as pool:  # orthogonal factors are drawn on the CPU: a thread a run
            starts = list(pool.map(lambda run: _drawn(run, shapes, kind, self.device), self.runs))
        which = [i for i, run in enumerate(self.runs) if run.config.variant == "compressed"]
        if not which:
            return starts
        tokens, labels = self.train_rows.batch(self.order[0].reshape(-1), LENGTHS[self.device.type])
        generators = [run_generator(self.runs[i], "factors") for i in which]
        loss = lambda: self._losses(tokens, labels).sum()  # noqa: E731
        found = compressed_starts(adapters, which, loss, generators)
        return [_moved(found[i], kind, self.device) if i in found else start for i, start in enumerate(starts)]

    def _head(self, name: str) -> StackedLinear:
        source = self.source.get_submodule(name)
        expect(f"modules_to_save {name!r}", type(source).__name__, isinstance(source, nn.Linear), "a linear layer")
        drawn = [fresh_head(source, run, name) for run in self.runs]
        biases = None if source.bias is None else [bias for _, bias in drawn]
        return StackedLinear([weight for weight, _ in drawn], biases, self.rows)

    def _rates(self) -> list[tuple[nn.Parameter, Tensor]]:
        """Every trained tensor and its runs' learning rates, as they broadcast against it."""
        inner = torch.tensor([run.lr for run in self.runs], dtype=torch.float64)
        outer = inner * torch.tensor([run.config.lr_ratio for run in self.runs], dtype=torch.float64)
        head = torch.tensor([run.lr if run.head_lr is None else run.head_lr for run in self.runs], dtype=torch.float64)
        chains = [(p, (outer if ends else inner)[of, None, None]) for p, of, ends in self.chains.parameters()]
        heads = [p for module in self.model.modules() if isinstance(module, StackedLinear) for p in module.parameters()]
        return chains + [(p, head.view(-1, *[1] * (p.dim() - 1))) for p in heads]

    def _histories(self, kept: Kept, peak: int) -> list[RunHistory]:
        losses, seconds = self.losses.T.cpu().numpy(), kept.seconds
        adapters = stacked_adapters(self.model)
        heads = {name: m for name, m in self.model.named_modules() if isinstance(m, StackedLinear)}
        histories = []
        for at, run in enumerate(self.runs):
            lost = np.flatnonzero(~np.isfinite(losses[at]))
            divergence = int(lost[0]) if len(lost) else self.steps if at in kept.lost else None
            history = RunHistory(
                run, losses[at], {step: values[at] for step, values in kept.scores.items()},
                {step: values[at] for step, values in kept.watched.items()}, divergence, seconds, peak, len(self.runs),
                {name: adapter.chain(at) for name, adapter in adapters.items()},
                {name: _own(head, at) for name, head in heads.items()}, self.source,
            )  # fmt: skip
            histories.append(history)
        return histories


class _Graph:
    """One step for one padded length as a CUDA graph over buffers of its own."""

    def __init__(self, tuning: Tuning, tokens: dict[str, Tensor], labels: Tensor) -> None:
        self.tokens = {name: value.clone() for name, value in tokens.items()}
        self.labels = labels.clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # warm up libraries and compiled code; gradients are zeroed before use
            for _ in range(2):
                tuning._losses(self.tokens, self.labels).sum().backward()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        shared = next(iter(tuning.graphs.values())).graph.pool() if tuning.graphs else None
        with torch.cuda.graph(self.graph, pool=shared):
            tuning._update(self.tokens, self.labels)

    def replay(self, tokens: dict[str, Tensor], labels: Tensor) -> None:
        """Take one step with these rows."""
        for name, value in tokens.items():
            self.tokens[name].copy_(value)
        self.labels.copy_(labels)
        self.graph.replay()


def _drawn(
    run: FineTuningRun, shapes: dict[str, tuple[tuple[int, int], bool]], kind: torch.dtype, device: torch.device
) -> dict[str, list[Tensor]]:
    """A run's starting factors by layer, in the order of the layers; empty chains for compressed."""
    generator, cpu = run_generator(run, "factors"), torch.device("cpu")
    return _moved({name: starting_factors(shape, run.config, generator, cpu, embedding)
                   for name, (shape, embedding) in shapes.items()}, kind, device)  # fmt: skip


def _moved(starts: dict[str, list[Tensor]], kind: torch.dtype, device: torch.device) -> dict[str, list[Tensor]]:
    return {name: [factor.to(device, kind) for factor in chain] for name, chain in starts.items()}


def _own(head: StackedLinear, at: int) -> dict[str, Tensor]:
    state = {"weight": head.stacked[at].detach().clone()}
    return state if head.biases is None else state | {"bias": head.biases[at].detach().clone()}
