"""Is it the method or the tuning? Every method at many rates, its best one chosen on rows that judge nothing.

The held-out rows are cut in two by a fixed seed: one half chooses, the other judges. On each task and size a method
runs at all rates of a grid with the tuning seeds, and the grid grows while its best rate is at an end; then it runs at
the chosen rate with fresh seeds, which the other half judges, and so at the published rate, and, for compressed and
thin Deep LoRA, at the rate whose updates are as large as those of LoRA at its best. All this is made of cells
(tuning_cells.py), the most telling first, until the time is used up; what lacks then, the next call computes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from compressible.data.pretrained import load_for_task
from compressible.data.tasks import Task
from compressible.experiments.rate_grid import best_of, search_each
from compressible.experiments.tuned_methods import ALONE, METHODS, method
from compressible.experiments.tuning_cells import Cell, Cells, Scored
from compressible.finetuning.finetune import fine_tune
from compressible.finetuning.run import RunHistory
from compressible.runtime.devices import device_name

CORE = ("standard", "paper", "thin", "compressed")  # what answers the question first
MATCHED = ("compressed", "thin")  # what also runs at LoRA's effective step
SPLIT_SEED = 16  # which held-out rows choose
FRESH = 1000  # how far the judged seeds are from those that tune
COSTS = {"full": 4.0, **dict.fromkeys(ALONE, 10.0)}  # about what a run costs, in runs that share a pass
Loaded = tuple[nn.Module, Task]
Place = tuple[str, int, int]  # task, size, rank


@dataclass(frozen=True)
class Sweep:
    """What is run: the parameters of the notebook, whose comments say what they are.

    validation_rows: rows of each half at most, 0 for all; other_sizes: of all tasks but the first; ranks: beside
    `adapter_rank`, on the first task with the first size; more_rates: how often a grid may grow.
    """

    encoder: str
    protocol: str
    matrices: list[str]
    tasks: list[str]
    sample_sizes: list[int]
    other_sizes: list[int]
    adapter_rank: int
    ranks: list[int]
    methods: list[str]
    learning_rates: list[float]
    learning_rate: float
    inner_learning_rate: float
    head_rate: float
    init_scale: float
    max_length: int
    validation_rows: int
    batch_size: int
    steps: int
    precision: str
    tuning_seeds: int
    seeds: int
    alone_seeds: int
    seed: int
    more_rates: int = 4

    def setting(self) -> dict[str, Any]:
        """What all cells share that moves their numbers: another one of these is another folder."""
        apart = {
            "tasks",
            "sample_sizes",
            "other_sizes",
            "ranks",
            "methods",
            "learning_rates",
            "more_rates",
        }
        apart |= {"learning_rate", "inner_learning_rate", "adapter_rank"}
        return {name: value for name, value in asdict(self).items() if name not in apart} | {"split": SPLIT_SEED}

    def places(self) -> list[Place]:
        """Tasks, sizes and ranks, each once: the first task at all sizes, the others, then other ranks."""
        first, rank = self.tasks[0], self.adapter_rank
        found = [(first, size, rank) for size in self.sample_sizes]
        found += [(task, size, rank) for task in self.tasks[1:] for size in self.other_sizes]
        return list(dict.fromkeys(found + [(first, self.sample_sizes[0], other) for other in self.ranks]))

    def blocks(self) -> list[tuple[list[Place], list[str]]]:
        """What is computed together, the most telling first: places of one task, and methods.

        The core methods with the first and third size of the first task, then all other stacked ones there, then the
        other tasks, the other sizes, the other ranks; what costs most, full width and what goes alone, comes last.
        """
        stacked = [name for name in self.methods if name not in (*ALONE, "full")]
        core = [name for name in stacked if name in CORE]
        rest = [name for name in stacked if name not in CORE]
        places, first = self.places(), self.tasks[0]
        main = [place for place in places if place[0] == first and place[2] == self.adapter_rank]
        ahead, later = main[::2], main[1::2]
        others = [[place for place in places if place[0] == task] for task in self.tasks[1:]]
        ranks = [place for place in places if place[2] != self.adapter_rank]
        order = [(ahead, core), (ahead, rest), *((of, core) for of in others), (later, core), (ranks, core)]
        order += [(later, rest), *((of, rest) for of in others), (ranks, rest)]
        order += [([place], [name]) for name in ("full", *ALONE) if name in self.methods for place in ahead]
        return [(of, names) for of, names in order if of and names]

    def seeds_of(self, stage: str, name: str) -> list[int]:
        """The seeds of a stage; a method that goes one run at a time has fewer."""
        count = self.tuning_seeds if stage == "choose" else self.seeds
        first = self.seed + (0 if stage == "choose" else FRESH)
        return list(range(first, first + (min(count, self.alone_seeds) if name in ALONE else count)))

    def published(self, name: str) -> float:
        """The paper's rate of a method, of its inner factors where it has compressed ones of another rate."""
        return self.inner_learning_rate if name in ("compressed", "gradient", "random") else self.learning_rate

    def next_rate(self, rate: float, direction: int) -> float:
        """The rate beside one at an end of the grid, as far as its last two are apart."""
        factor = self.learning_rates[-1] / self.learning_rates[-2]
        return float(f"{rate * factor**direction:.4g}")


class OutOfTimeError(RuntimeError):
    """The time is used up; what has been computed is kept."""


@dataclass
class Worker:
    """Computes cells within a time, on these devices, with one task loaded at a time.

    devices: as `fine_tune` takes them, None for the model's own; budget: seconds, after which no further call begins
    (the first one always does); max_stack: runs of a pass at most; a call has one pass a device.
    """

    sweep: Sweep
    cells: Cells
    device: str = "cpu"
    devices: Any = None
    budget: float = math.inf
    max_stack: int = 40
    load: Callable[..., Loaded] = load_for_task
    began: float = field(default_factory=time.perf_counter)
    loaded: dict[str, Loaded] = field(default_factory=dict)
    pace: float = 0.0  # seconds a run that shares a pass, of the slowest call so far

    def work(self) -> None:
        """Compute what is missing, in the order of the blocks, until it is done or the time is used up."""
        try:
            for places, names in self.sweep.blocks():
                self._block(places, names)
        except OutOfTimeError:
            return

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
        heaviest = max(COSTS.get(cell.method, 1.0) for cell in part)  # of full width few fit a device
        options |= {"max_stack": max(1, int(self.max_stack / heaviest)), "show_progress": False}
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


def mean_score(found: Scored | None) -> float:
    """Return the mean over seeds: NaN where one diverged, or there is none."""
    return math.nan if found is None else float(np.mean(found.scores))


def curve(sweep: Sweep, cells: Cells, task: str, size: int, rank: int, name: str) -> dict[float, Scored]:
    """Return what tuning has found so far by rate, ascending: the grid, and the rates by which it grew."""
    start, found = list(sweep.learning_rates), {}
    down, up = [start[0]], [start[-1]]
    for _ in range(sweep.more_rates):
        down.append(sweep.next_rate(down[-1], -1))
        up.append(sweep.next_rate(up[-1], 1))
    for rate in [*down[:0:-1], *start, *up[1:]]:
        cell = cells.get(Cell(task, size, rank, name, "choose", rate))
        if cell is not None:
            found[rate] = cell
    return found


def chosen_rate(sweep: Sweep, cells: Cells, task: str, size: int, rank: int, name: str) -> float | None:
    """Return the best rate of a finished search, which lies inside the grid or could not be found inside; else None."""
    found = {rate: mean_score(cell) for rate, cell in curve(sweep, cells, task, size, rank, name).items()}
    if any(rate not in found for rate in sweep.learning_rates):
        return None
    best, grown = best_of(found), len(found) - len(sweep.learning_rates)
    return best if min(found) < best < max(found) or grown >= sweep.more_rates else None


def matched_rate(sweep: Sweep, cells: Cells, task: str, size: int, rank: int, name: str) -> float | None:
    """Return the rate of a method whose updates are, in the mean of their logarithms, nearest to LoRA's at its best."""
    best = chosen_rate(sweep, cells, task, size, rank, "standard")
    if best is None or chosen_rate(sweep, cells, task, size, rank, name) is None:
        return None
    lora = cells.get(Cell(task, size, rank, "standard", "choose", best))
    sizes = {rate: log_norm(cell) for rate, cell in curve(sweep, cells, task, size, rank, name).items()}
    finite = {rate: value for rate, value in sizes.items() if math.isfinite(value)}
    return min(finite, key=lambda rate: abs(finite[rate] - log_norm(lora))) if finite and lora else None


def log_norm(found: Scored | None) -> float:
    """Return the mean logarithm of the updates' norms over seeds, -inf where one is zero."""
    norms = np.array([math.nan] if found is None else found.norms, float)
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(np.log(norms).mean())


def judged_cells(sweep: Sweep, cells: Cells, task: str, size: int, rank: int, name: str) -> list[Cell]:
    """Return the cells that judge a method whose rate is chosen: at it, at the published one, at LoRA's step."""
    best = chosen_rate(sweep, cells, task, size, rank, name)
    if best is None:
        return []
    rates = [best, sweep.published(name)]
    if name in MATCHED and "standard" in sweep.methods:
        rates.append(matched_rate(sweep, cells, task, size, rank, name) or best)
    return [Cell(task, size, rank, name, "judge", rate) for rate in dict.fromkeys(rates)]


def finished(sweep: Sweep, cells: Cells) -> Iterator[tuple[Place, str, list[Cell]]]:
    """Yield places and methods whose rate is chosen and judged, with all their cells."""
    for place, name in planned(sweep):
        judged = judged_cells(sweep, cells, *place, name)
        if judged and not cells.missing(judged):
            rates = curve(sweep, cells, *place, name)
            yield place, name, [Cell(*place, name, "choose", rate) for rate in rates] + judged


def planned(sweep: Sweep) -> list[tuple[Place, str]]:
    """Return the places and methods of the blocks, in their order."""
    return [(place, name) for places, names in sweep.blocks() for place in places for name in names]


def _scored(sweep: Sweep, cell: Cell, histories: Sequence[RunHistory], seconds: float, device: str) -> Scored:
    last = max(1, sweep.steps // 10)
    norms = [float(run.watched[sweep.steps]) for run in histories]
    return Scored(
        sweep.seeds_of(cell.stage, cell.method), [float(run.scores[sweep.steps]) for run in histories],
        [float(run.losses[-last:].mean()) for run in histories], norms, seconds, device,
    )  # fmt: skip


def sweep_of(given: Mapping[str, Any]) -> Sweep:
    """Return the sweep of a notebook's parameters; ValueError for methods that there are none of, or a bad grid."""
    sweep = Sweep(**{each.name: given[each.name] for each in fields(Sweep)})
    check(sweep)
    return sweep


def check(sweep: Sweep) -> None:
    """Raise ValueError for methods that there are none of, or a grid that does not ascend."""
    unknown = [name for name in sweep.methods if name not in METHODS]
    if unknown:
        raise ValueError(f"methods has {unknown}, expected of {', '.join(METHODS)}")
    if sorted(set(sweep.learning_rates)) != list(sweep.learning_rates) or len(sweep.learning_rates) < 3:
        raise ValueError(f"learning_rates is {sweep.learning_rates}, expected at least three, ascending")
