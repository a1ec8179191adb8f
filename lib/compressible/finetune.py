"""Fine-tuning of S runs at once over one frozen model: seeds, learning rates, ranks and variants in one pass.

The frozen model sees the runs' batches side by side; adapters and heads are stacked (stacked.py), dropout has a stream
a run (streams.py), and AdamW's state is one flat vector with a rate for every element. So a run goes as it would
alone; `reference_fine_tune` in reference_tuning.py, a plain model and torch's AdamW for each run, is what this is
tested against.
On a GPU each step, with its backward pass and its update, is one CUDA graph a padded length.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import importlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from .adapters import (
    DeepLoraConfig,
    _expect,
    _start,
    check_sizes,
    factor_dtype,
    first_output,
    get_deep_lora_model,
    layer_shape,
)  # fmt: skip
from .progress import progress
from .stacked import StackedAdapter, StackedLinear, compressed_starts, hold, stacked_adapters, trained
from .stacked_adam import StackedAdamW
from .streams import RunStreams
from .targets import matching, saved_modules
from .tuning_checkpoint import Checkpoint

PRECISIONS = ("float32", "tf32", "bfloat16")
BETAS, EPS = (0.9, 0.999), 1e-6  # the authors' AdamW, without weight decay
HEAD_STD = 0.02  # transformers' own start of a head
EVALUATION_ROWS = 4096  # sequences of all runs together in one pass of an evaluation
RECOMPILATIONS = 64
LENGTHS = {"cpu": 8, "cuda": 32}  # padded lengths are multiples: few graphs, little padding


class Rows(Protocol):
    """Examples: tokens by name (N, T), padded at the end, and labels (N, ...)."""

    tokens: dict[str, Tensor]
    labels: Tensor


class TaskLike(Protocol):
    """What a task needs here; `tasks.Task` is one. kind: "regression", "classification" or "generation"."""

    kind: str
    train: Rows
    validation: Rows

    def score(self, logits: Tensor, labels: Tensor) -> float: ...


@dataclass(frozen=True)
class FineTuningRun:
    """One run of a stack: what is adapted and how, its peak learning rate (P1: 1e-2 compressed, else 1e-4) and seed.

    The seed draws factors, head, data order and dropout. subset: rows of the training set, by default all.
    config.modules_to_save are linear heads that the run trains, from a fresh N(0, .02^2) start, at `head_lr` (default
    lr).
    """

    config: DeepLoraConfig
    lr: float
    seed: int = 0
    subset: Tensor | None = None
    head_lr: float | None = None
    label: str = ""


@dataclass
class RunHistory:
    """What one run left: losses (steps,) before each update, scores and what `watch` gave by step, and the factors.

    seconds and peak_bytes are of the whole pass, which `shared` runs went through together. `divergence` is None or the
    first step whose loss was not finite; scores are NaN from there on.
    """

    run: FineTuningRun
    losses: np.ndarray
    scores: dict[int, float]
    watched: dict[int, Any]
    divergence: int | None
    seconds: float
    peak_bytes: int
    shared: int
    chains: dict[str, list[Tensor]] | None = field(repr=False)
    heads: dict[str, dict[str, Tensor]] | None = field(repr=False)
    base: nn.Module = field(repr=False)

    def model(self) -> nn.Module:
        """Return the model with this run's adapters and head, as `get_deep_lora_model` makes it; to merge or export.

        Frozen weights are shared with the model that was given; copy it before you merge. Raises DivergenceError for a
        run that diverged, RuntimeError where factors were not kept.
        """
        self.check()
        if self.chains is None:
            raise RuntimeError("this history holds no factors: call fine_tune with keep_factors=True")
        model = get_deep_lora_model(_sharing(self.base), self.run.config)
        for name, chain in self.chains.items():
            model.get_submodule(name).factors = nn.ParameterList([nn.Parameter(factor.clone()) for factor in chain])
        for name, state in self.heads.items():
            for own, value in state.items():
                setattr(model.get_submodule(name), own, nn.Parameter(value.clone()))
        return model

    def check(self) -> None:
        """Raise TuningDivergenceError if the run diverged."""
        if self.divergence is not None:
            raise TuningDivergenceError(self)


class TuningDivergenceError(RuntimeError):
    """A run whose loss stopped being finite; `history` holds it up to there."""

    def __init__(self, history: RunHistory) -> None:
        step, losses = history.divergence, history.losses
        last = losses[step - 1] if step else float("nan")
        super().__init__(
            f"run {history.run.label or history.run.seed!r} stopped being finite at step {step} with lr "
            f"{history.run.lr:g} (last finite loss {last:.6g}); expected a finite loss: lower lr or init_scale"
        )
        self.history = history


@dataclass(frozen=True)
class Snapshot:
    """What `watch` gets: the step, and the updates of the S runs of this pass layer by layer."""

    step: int
    runs: list[FineTuningRun]
    _model: nn.Module = field(repr=False)

    def updates(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the layer's name and its runs' updates (S, m, n), in full float32 whatever the runs' precision."""
        for name, adapter in stacked_adapters(self._model).items():
            with _precision("float32"):
                updates = adapter.updates()
            yield name, updates


def fine_tune(
    model: nn.Module,
    runs: Sequence[FineTuningRun],
    task: TaskLike,
    steps: int,
    batch_size: int = 16,
    decay_ratio: float = 1.0,
    evaluate_at: Iterable[int] = (),
    watch_at: Iterable[int] = (),
    watch: Callable[[Snapshot], list[Any]] | None = None,
    precision: str = "float32",
    dropout: bool = True,
    compiled: bool = False,
    graphed: bool | None = None,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 100,
    max_stack: int | None = None,
    keep_factors: bool = True,
    show_progress: bool | None = None,
) -> list[RunHistory]:
    """Train all runs over the frozen `model`, as few passes as their shapes allow, and return a history a run.

    The rate decays linearly to decay_ratio of its start (1: constant). Steps of evaluate_at and watch_at count updates
    made, 0 to `steps`; `watch` returns one value a run. Precision "tf32" is the authors' (JAX's default); "bfloat16"
    is the frozen model's only. compiled: torch.compile; graphed: CUDA graphs, by default on a GPU. With `checkpoint`, a
    file name, a killed call goes on where it was. The runs of a pass are at most max_stack. Without keep_factors the
    histories hold no factors, which for many wide runs are much memory. `model` is never changed.
    Raises ValueError on impossible arguments; a run that diverges ends alone, see RunHistory.
    """
    evaluate_at, watch_at = sorted(set(evaluate_at)), sorted(set(watch_at))
    _check(runs, task, steps, batch_size, decay_ratio, evaluate_at, watch_at, watch, precision, max_stack)
    groups = list(_passes(model, runs, max_stack))
    found: dict[int, RunHistory] = {}
    for number, members in enumerate(groups):
        place = None if checkpoint is None else Path(f"{checkpoint}.{number}" if len(groups) > 1 else checkpoint)
        tuning = Tuning(model, [runs[i] for i in members], task, steps, batch_size, decay_ratio, precision, dropout)
        tuning.accelerate(compiled, graphed)
        histories = tuning.train(evaluate_at, watch_at, watch, place, checkpoint_every, show_progress)
        if not keep_factors:
            histories = [replace(history, chains=None, heads=None) for history in histories]
        found.update(zip(members, histories, strict=True))
        tuning.release()
        del tuning
    return [found[i] for i in range(len(runs))]


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
        self.streams = RunStreams([run.seed for run in runs], self.step)
        self.order = torch.stack([data_order(run, len(task.train.labels), steps, batch_size) for run in runs], 1)
        self.train_rows, self.validation_rows = _Rows(task.train, self.device), _Rows(task.validation, self.device)
        began, self.call = time.perf_counter(), self._pass
        with _precision(precision):
            self.model = self._stack()
        self.adam = StackedAdamW(self._rates(), BETAS, EPS)
        self.setup_seconds = time.perf_counter() - began
        self.graphs: dict[tuple, _Graph] | None = None

    def accelerate(self, compiled: bool = False, graphed: bool | None = None) -> None:
        """Compile the pass over the model, and replay steps as CUDA graphs (by default on a GPU)."""
        self.call = torch.compile(self._pass, dynamic=False) if compiled else self._pass
        if compiled:  # one compilation a padded length and a pass; beyond the limit PyTorch goes on uncompiled
            limits = importlib.import_module("torch._dynamo.config")
            limits.recompile_limit = max(limits.recompile_limit, RECOMPILATIONS)
        if graphed is None:
            graphed = self.device.type == "cuda"
        _expect("graphed", graphed, not graphed or self.device.type == "cuda", "False without a CUDA device")
        self.graphs = {} if graphed else None

    def train(
        self, evaluate_at: Sequence[int], watch_at: Sequence[int], watch: Callable | None = None,
        checkpoint: Path | None = None, checkpoint_every: int = 100, show_progress: bool | None = None,
    ) -> list[RunHistory]:  # fmt: skip
        """Take all steps from where the checkpoint left them and return the histories."""
        scores: dict[int, list[float]] = {}
        watched: dict[int, list[Any]] = {}
        saved = None if checkpoint is None else Checkpoint(checkpoint, self)
        begin = 0 if saved is None else saved.resume(scores, watched)
        _reset_peak(self.device)
        began = time.perf_counter()
        with progress(self.steps, f"{len(self.runs)} runs", enabled=show_progress) as bar, _precision(self.precision):
            for step in range(begin, self.steps + 1):
                if step in evaluate_at and step not in scores:
                    scores[step] = self.evaluate()
                if step in watch_at and step not in watched:
                    with torch.no_grad():
                        watched[step] = watch(Snapshot(step, self.runs, self.model))
                if saved is not None and (step == self.steps or (step > begin and step % checkpoint_every == 0)):
                    saved.save(step, scores, watched)
                if step < self.steps:
                    self.advance(step)
                    bar.update(1)
        _synchronize(self.device)
        return self._histories(scores, watched, time.perf_counter() - began)

    def release(self) -> None:
        """Let go of graphs and factors at once: bound methods make cycles, which wait for the collector otherwise."""
        self.graphs = self.call = self.model = self.adam = None
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
    def evaluate(self) -> list[float]:
        """Return the score of every run on the validation set; NaN where its logits are not finite."""
        self.model.eval()
        hold(self.model, True)
        logits = self._validation_logits()
        hold(self.model, False)
        if self.task.kind == "generation":
            return [value.item() for value in logits]
        labels = self.task.validation.labels.cpu().numpy()
        finite = [bool(np.isfinite(run).all()) for run in logits]
        pairs = zip(logits, finite, strict=True)
        return [float(self.task.score(run, labels)) if good else float("nan") for run, good in pairs]

    def _validation_logits(self) -> np.ndarray | Tensor:
        """Logits (S, N, outputs) on the CPU, in the order of the rows; for generation the mean losses (S,)."""
        runs, count = len(self.runs), len(self.task.validation.labels)
        by_length = self.validation_rows.lengths.argsort() if self.validation_rows.lengths is not None else None
        by_length = torch.arange(count) if by_length is None else by_length
        parts = []
        for rows in by_length.split(max(1, EVALUATION_ROWS // runs)):
            tokens, labels = self.validation_rows.batch(rows.repeat(runs), LENGTHS["cpu"])
            logits = first_output(self._forward(tokens, labels))
            if self.task.kind == "generation":
                parts.append(run_losses("generation", logits, labels, runs) * len(rows))
            else:
                parts.append(logits.float().view(runs, len(rows), -1).cpu())
        if self.task.kind == "generation":
            return torch.stack(parts).sum(0).cpu() / count
        stacked = torch.cat(parts, 1)
        return stacked[:, by_length.argsort()].numpy()

    def _forward(self, tokens: dict[str, Tensor], labels: Tensor) -> Any:
        if self.task.kind == "generation":
            tokens = tokens | {"labels": labels}
        return self.model(**tokens)

    def _losses(self, tokens: dict[str, Tensor], labels: Tensor) -> Tensor:
        """The losses (S,) of one training batch."""
        self.model.train(self.dropout)
        self.streams.place = 0  # outside of what may be compiled
        return self.call(tokens, labels)

    def _pass(self, tokens: dict[str, Tensor], labels: Tensor) -> Tensor:
        with self.streams:
            logits = first_output(self._forward(tokens, labels))
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
        model = copy.deepcopy(self.source).to(torch.bfloat16) if half else _sharing(self.source)
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        configs = [run.config for run in self.runs]
        layers = matching(model, configs[0]).items()
        for config in configs:
            check_sizes({name: layer_shape(layer) for name, layer in layers}, config)
        adapters = {name: StackedAdapter(layer, configs, layer_shape(layer)) for name, layer in layers}
        for name, adapter in adapters.items():
            _replace(model, name, adapter)
        for name, _ in list(saved_modules(model, configs[0])):
            _replace(model, name, self._head(name))
        starts = self._starts(model, adapters)
        for name, adapter in adapters.items():
            adapter.fill([start[name] for start in starts])
        return model

    def _starts(self, model: nn.Module, adapters: dict[str, StackedAdapter]) -> list[dict[str, list[Tensor]]]:
        """Every run's starting factors by layer: drawn, or for compressed runs from the gradient of the first batch."""
        shapes = {name: adapter.shape for name, adapter in adapters.items()}
        kind = factor_dtype(next(iter(adapters.values())).base)
        with ThreadPoolExecutor() as pool:  # orthogonal factors are drawn on the CPU: a thread a run
            starts = list(pool.map(lambda run: _drawn(run, shapes, kind, self.device), self.runs))
        which = [i for i, run in enumerate(self.runs) if run.config.variant == "compressed"]
        if not which:
            return starts
        self.model = model
        tokens, labels = self.train_rows.batch(self.order[0].reshape(-1), LENGTHS[self.device.type])
        generators = [_generator(self.runs[i], "factors") for i in which]
        loss = lambda: self._losses(tokens, labels).sum()  # noqa: E731
        found = compressed_starts(adapters, which, loss, generators)
        return [_moved(found[i], kind, self.device) if i in found else start for i, start in enumerate(starts)]

    def _head(self, name: str) -> StackedLinear:
        source = self.source.get_submodule(name)
        _expect(f"modules_to_save {name!r}", type(source).__name__, isinstance(source, nn.Linear), "a linear layer")
        drawn = [fresh_head(source, run, name) for run in self.runs]
        biases = None if source.bias is None else [bias for _, bias in drawn]
        return StackedLinear([weight for weight, _ in drawn], biases)

    def _rates(self) -> list[tuple[nn.Parameter, Tensor]]:
        """Every trained tensor and its runs' learning rates."""
        rates = []
        for module in self.model.modules():
            if isinstance(module, StackedAdapter):
                for (begin, end), chain in zip(module.spans, module.chains, strict=True):
                    members = self.runs[begin:end]
                    inner = torch.tensor([run.lr for run in members], dtype=torch.float64)
                    outer = inner * torch.tensor([run.config.lr_ratio for run in members], dtype=torch.float64)
                    ends = (0, len(chain) - 1)
                    rates += [(factor, outer if at in ends else inner) for at, factor in enumerate(chain)]
            elif isinstance(module, StackedLinear):
                own = [run.lr if run.head_lr is None else run.head_lr for run in self.runs]
                rates += [(p, torch.tensor(own, dtype=torch.float64)) for p in module.parameters()]
        assert len(rates) == len(list(trained(self.model)))
        return rates

    def _histories(self, scores: dict, watched: dict, seconds: float) -> list[RunHistory]:
        losses = self.losses.T.cpu().numpy()
        adapters = stacked_adapters(self.model)
        heads = {name: m for name, m in self.model.named_modules() if isinstance(m, StackedLinear)}
        histories = []
        for at, run in enumerate(self.runs):
            lost = np.flatnonzero(~np.isfinite(losses[at]))
            history = RunHistory(
                run, losses[at], {step: values[at] for step, values in scores.items()},
                {step: values[at] for step, values in watched.items()}, int(lost[0]) if len(lost) else None,
                seconds, _peak(self.device), len(self.runs),
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


class _Rows:
    """Examples on the device, cut to the longest of the rows that are asked for; lengths stay on the CPU."""

    def __init__(self, rows: Rows, device: torch.device) -> None:
        mask = rows.tokens.get("attention_mask")
        self.lengths = None if mask is None else mask.sum(1).cpu()
        self.tokens = {name: value.to(device) for name, value in rows.tokens.items()}
        self.labels = rows.labels.to(device)

    def batch(self, rows: Tensor, multiple: int) -> tuple[dict[str, Tensor], Tensor]:
        """Return tokens (P, T) and labels (P, ...) of `rows` (P,); T a multiple, at most what the examples have."""
        on = rows.to(self.labels.device, non_blocking=True)
        longest = None
        if self.lengths is not None:
            longest = -(-int(self.lengths[rows].max()) // multiple) * multiple
        return {name: value[on, :longest] for name, value in self.tokens.items()}, self.labels[on]


def run_losses(kind: str, logits: Tensor, labels: Tensor, runs: int) -> Tensor:
    """Return the mean loss (S,) of every run from logits (S * B, ...): squared error or cross-entropy.

    kind "generation": mean over the run's tokens whose label is not -100.
    """
    logits = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
    if kind == "regression":
        return (logits.squeeze(-1) - labels).square().view(runs, -1).mean(1)
    if kind == "classification":
        return functional.cross_entropy(logits, labels, reduction="none").view(runs, -1).mean(1)
    each = functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none", ignore_index=-100)
    return each.view(runs, -1).sum(1) / (labels != -100).view(runs, -1).sum(1)


def data_order(run: FineTuningRun, rows: int, steps: int, batch_size: int) -> Tensor:
    """Return the training rows (steps, B) of a run: new order every epoch, incomplete last batches left out.

    A subset of just one batch keeps its order (papers' trap T5).
    """
    subset = torch.arange(rows) if run.subset is None else torch.as_tensor(run.subset).cpu()
    each = len(subset) // batch_size
    if len(subset) == batch_size:
        return subset.expand(steps, batch_size)
    generator = _generator(run, "order")
    epochs = [torch.randperm(len(subset), generator=generator)[: each * batch_size] for _ in range(-(-steps // each))]
    return subset[torch.cat(epochs).view(-1, batch_size)[:steps]]


def fresh_head(source: nn.Linear, run: FineTuningRun, name: str) -> tuple[Tensor, Tensor]:
    """Return the weight (m, n), N(0, .02^2), and zero bias from which a run trains a head; float32 at least."""
    kind = factor_dtype(source)
    weight = HEAD_STD * torch.randn(source.weight.shape, generator=_generator(run, name), dtype=torch.float64)
    bias = torch.zeros(source.out_features, dtype=kind, device=source.weight.device)
    return weight.to(source.weight.device, kind), bias


def _drawn(
    run: FineTuningRun, shapes: dict[str, tuple[int, int]], kind: torch.dtype, device: torch.device
) -> dict[str, list[Tensor]]:
    """A run's starting factors by layer, in the order of the layers; empty chains for compressed."""
    generator = _generator(run, "factors")
    starts = {name: _start(shape, run.config, generator, torch.device("cpu")) for name, shape in shapes.items()}
    return _moved(starts, kind, device)


def _moved(starts: dict[str, list[Tensor]], kind: torch.dtype, device: torch.device) -> dict[str, list[Tensor]]:
    return {name: [factor.to(device, kind) for factor in chain] for name, chain in starts.items()}


def _generator(run: FineTuningRun, purpose: str) -> torch.Generator:
    """The generator of a run's seed for one purpose; independent of all others."""
    words = np.random.SeedSequence([run.seed, *purpose.encode()]).generate_state(2)
    return torch.Generator().manual_seed(int(words[0]) << 31 | int(words[1]) >> 1)


def _passes(model: nn.Module, runs: Sequence[FineTuningRun], max_stack: int | None) -> Iterator[list[int]]:
    """Indices of the runs of each pass: those with equal targets; wide factors apart; equal lengths side by side."""
    groups: dict[tuple, list[int]] = {}
    layers: dict[tuple, tuple] = {}
    for at, run in enumerate(runs):
        config = run.config
        asked = repr((config.target_modules, config.exclude_modules, config.embeddings, config.modules_to_save,
                      config.task_type))  # fmt: skip
        if asked not in layers:
            found = tuple(matching(model, config))
            if not found:
                raise ValueError(f"target_modules = {config.target_modules!r} matches no layer")
            layers[asked] = found, tuple(name for name, _ in saved_modules(model, config))
        key = (layers[asked], config.variant == "full", config.lora_dropout)
        groups.setdefault(key, []).append(at)
    for members in groups.values():
        members.sort(key=lambda i: _length(runs[i].config))
        size = max_stack or len(members)
        yield from (members[i : i + size] for i in range(0, len(members), size))


def _length(config: DeepLoraConfig) -> int:
    return config.depth + 2 * (config.variant == "compressed")


def _check(
    runs: Sequence[FineTuningRun], task: TaskLike, steps: int, batch_size: int, decay_ratio: float,
    evaluate_at: Sequence[int], watch_at: Sequence[int], watch: Callable | None, precision: str, max_stack: int | None,
) -> None:  # fmt: skip
    _expect("runs", list(runs), len(runs) > 0, "at least one run")
    _expect("steps", steps, isinstance(steps, int) and steps >= 1, "an integer >= 1")
    _expect("batch_size", batch_size, isinstance(batch_size, int) and batch_size >= 1, "an integer >= 1")
    _expect("decay_ratio", decay_ratio, 0 <= decay_ratio <= 1, "a number in [0, 1]")
    _expect("precision", precision, precision in PRECISIONS, f"one of {', '.join(PRECISIONS)}")
    _expect("max_stack", max_stack, max_stack is None or max_stack >= 1, "None or an integer >= 1")
    for name, marks in (("evaluate_at", evaluate_at), ("watch_at", watch_at)):
        _expect(name, marks, all(0 <= mark <= steps for mark in marks), f"steps from 0 to {steps}")
    _expect("watch", watch, watch is not None or not watch_at, "a function, since watch_at names steps")
    rows = len(task.train.labels)
    for run in runs:
        _expect("lr", run.lr, 0 < run.lr < float("inf"), "a finite number > 0")
        own = rows if run.subset is None else len(run.subset)
        _expect("subset", f"{own} rows", own >= batch_size, f"at least one batch of {batch_size}")
        inside = run.subset is None or (int(min(run.subset)) >= 0 and int(max(run.subset)) < rows)
        _expect("subset", run.subset, inside, f"rows from 0 to {rows - 1}")


def _sharing(model: nn.Module) -> nn.Module:
    """A copy of the structure whose parameters and buffers are the model's own tensors."""
    tensors = [*model.parameters(), *model.buffers()]
    memo = {id(t): nn.Parameter(t.data, False) if isinstance(t, nn.Parameter) else t for t in tensors}
    return copy.deepcopy(model, memo)


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _own(head: StackedLinear, at: int) -> dict[str, Tensor]:
    state = {"weight": head.stacked[at].detach().clone()}
    return state if head.biases is None else state | {"bias": head.biases[at].detach().clone()}


@contextlib.contextmanager
def _precision(name: str) -> Iterator[None]:
    """Let float32 products use TensorFloat-32 for "tf32", and not otherwise."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = name == "tf32"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
