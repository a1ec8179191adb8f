"""What computes the cells of a sweep: calls of `fine_tune` within a time, the most telling first.

All is made of cells (tuning_cells.py): what lacks when the time is used up, the next call computes.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor, nn

from compressible.data.pretrained import load_for_task
from compressible.data.tasks import Task
from compressible.experiments.rate_grid import search_each
from compressible.experiments.tuned_methods import ALONE, method
from compressible.experiments.tuning_cells import Cell, Cells, Scored
from compressible.experiments.tuning_rates import judged_cells, mean_score
from compressible.experiments.tuning_sweep import SPLIT_SEED, Place, Sweep
from compressible.finetuning.finetune import FULL_COST, fine_tune
from compressible.finetuning.run import RunHistory
from compressible.runtime.devices import device_name

COSTS = {"full": FULL_COST, **dict.fromkeys(ALONE, 10.0)}  # about what a run costs, in runs that share a pass
Loaded = tuple[nn.Module, Task]


class OutOfTimeError(RuntimeError):
    """The time is used up; what has been computed is kept."""


@dataclass
class Worker:
    """Computes cells within a time, on these devices, with one task loaded at a time.

    devices: as `fine_tune` takes them, None for the model's own; budget: seconds, after which no further call begins
    (the first one always does); max_stack: runs of a pass at most; a call has one pass a device. beside_others: whether
    processes share the folder of cells: a place's methods are computed by the first that comes, and left by all others.
    """

    sweep: Sweep
    cells: Cells
    device: str = "cpu"
    devices: Any = None
    budget: float = math.inf
    max_stack: int = 40
    beside_others: bool = False
    load: Callable[..., Loaded] = load_for_task
    began: float = field(default_factory=time.perf_counter)
    loaded: dict[str, Loaded] = field(default_factory=dict)
    pace: float = 0.0  # seconds a run that shares a pass, of the slowest call so far

    def work(self) -> None:
        """Compute what is missing, in the order of the blocks, until it is done or the time is used up."""
        try:
            for places, names in self.sweep.blocks():
                for some in [[place] for place in places] if self.beside_others else [places]:
                    with self._claimed(some, names) as own:
                        if own:
                            self._block(some, names)
        except OutOfTimeError:
            return

    @contextlib.contextmanager
    def _claimed(self, places: list[Place], names: list[str]) -> Iterator[bool]:
        """Whether nobody else computes these now; the system forgets the claim of a process that ends, however."""
        if not self.beside_others:
            yield True
            return
        self.cells.folder.mkdir(parents=True, exist_ok=True)
        task, size, rank = places[0]
        lock = FileLock(self.cells.folder / f".{task}.n{size}.r{rank}.{'.'.join(names)}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            yield False
            return
        try:
            yield True
        finally:
            lock.release()

    def _block(self, places: list[Place], names: list[str]) -> None:
        """Choose the rates of methods at places, side by side, and judge them."""
        cases = [(*place, name) for place in places for name in names]

        def scores_of(pairs: Sequence[tuple[tuple[str, int, int, str], float]]) -> list[float]:
            wanted = [Cell(*case, "choose", rate) for case, rate in pairs]
            self.compute(wanted)
            return [mean_score(self.cells.get(cell)) for cell in wanted]

        search_each(scores_of, cases, self.sweep.learning_rates, self.sweep.more_rates, self.sweep.next_rate)
        self.compute([cell for case in cases for cell in judged_cells(self.sweep, self.cells, *case)])

    def compute(self, wanted: Sequence[Cell]) -> None:
        """Compute those of the cells that are missing; OutOfTimeError where the time does not reach."""
        left = self.cells.missing(wanted)
        while left:
            part = self._together(left)
            expected = self.pace * self._cost(part)
            spent = time.perf_counter() - self.began
            if self.pace and spent + expected > self.budget:
                raise OutOfTimeError
            self._call(part)
            left = [cell for cell in left if cell not in part]

    def _cost(self, part: Sequence[Cell]) -> float:
        """About what cells cost, in runs that share a pass."""
        return sum(COSTS.get(cell.method, 1.0) * len(self.sweep.seeds_of(cell.stage, cell.method)) for cell in part)

    def _together(self, left: Sequence[Cell]) -> list[Cell]:
        """The first cells that one call takes: of one task and stage, a pass for each device."""
        alike = [cell for cell in left if (cell.task, cell.stage) == (left[0].task, left[0].stage)]
        count = 1
        while count < len(alike) and self._cost(alike[: count + 1]) <= self.max_stack * self.shared:
            count += 1
        return alike[:count]

    def _call(self, part: Sequence[Cell]) -> None:
        """Train all runs of some cells in one call and write them."""
        sweep, before = self.sweep, time.perf_counter()
        model, task = self._loaded(part[0].task)
        given = replace(task, validation=halves(task, sweep.validation_rows)[part[0].stage == "judge"])
        runs, counts = [], []
        for cell in part:
            way = method(cell.method, model, cell.rank, sweep.matrices, sweep.protocol, sweep.init_scale)
            seeds = sweep.seeds_of(cell.stage, cell.method)
            runs += [way.run(cell.rate, seed, task.subset(cell.size, seed), sweep.head_rate) for seed in seeds]
            counts.append(len(seeds))
        options: dict[str, Any] = {"precision": sweep.precision, "devices": self.devices, "keep_factors": False}
        options |= {"evaluate_at": [sweep.steps], "watch_at": [sweep.steps], "watch": update_norms}
        options |= {"max_stack": self.max_stack, "show_progress": False}
        histories = iter(fine_tune(model, runs, given, sweep.steps, sweep.batch_size, **options))
        spent, device = time.perf_counter() - before, device_name(str(next(model.parameters()).device))
        self.pace = max(self.pace, spent / self._cost(part))
        for cell, count in zip(part, counts, strict=True):
            own = [next(histories) for _ in range(count)]
            self.cells.put(cell, _scored(sweep, cell, own, spent * self.shared * count / len(runs), device))

    @property
    def shared(self) -> int:
        """How many devices share a call."""
        if self.devices is None:
            return 1
        return torch.cuda.device_count() if self.devices == "all" else len(self.devices)

    def _loaded(self, task: str) -> Loaded:
        if task not in self.loaded:
            sweep = self.sweep
            self.loaded = {task: self.load(sweep.encoder, task, sweep.protocol, sweep.max_length, 0, self.device)}
        return self.loaded[task]


def halves(task: Task, most: int = 0) -> tuple[Any, Any]:
    """Return the held-out rows that choose and those that judge, `most` of each at most (0: all), by a fixed seed."""
    count = len(task.validation.labels)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(SPLIT_SEED))
    half = count // 2
    size = min(most or half, half)
    return task.validation.take(order[:size]), task.validation.take(order[half : half + size])


@torch.no_grad()
def update_norms(snapshot: Any) -> list[float]:
    """Return the Frobenius norm of each run's updates of all layers together; `watch` of `fine_tune`."""
    norms: list[Tensor] = [torch.linalg.vector_norm(update.flatten(1), dim=1) for _, update in snapshot.updates()]
    return torch.stack(norms).double().square().sum(0).sqrt().tolist()


def _scored(sweep: Sweep, cell: Cell, histories: Sequence[RunHistory], seconds: float, device: str) -> Scored:
    last = max(1, sweep.steps // 10)
    norms = [float(run.watched[sweep.steps]) for run in histories]
    return Scored(
        sweep.seeds_of(cell.stage, cell.method), [float(run.scores[sweep.steps]) for run in histories],
        [float(run.losses[-last:].mean()) for run in histories], norms, seconds, device,
    )  # fmt: skip
