"""Is it the method or the tuning? Every method at many rates, its best one chosen on rows that judge nothing.

The held-out rows are cut in two by a fixed seed: one half chooses, the other judges. On each task and size a method
runs at all rates of a grid with the tuning seeds, and the grid grows while its best rate is at an end; then it runs at
the chosen rate with fresh seeds, which the other half judges, and so at the published rate, and, for compressed and
thin Deep LoRA, at the rate whose updates are as large as those of LoRA at its best. This file says what is run and in
which order; tuning_rates.py reads the rates from the cells that there are, and tuning_worker.py computes the others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from compressible.experiments.tuned_methods import ALONE, METHODS

CORE = ("standard", "paper", "thin", "compressed")  # what answers the question first
SPLIT_SEED = 16  # which held-out rows choose
FRESH = 1000  # how far the judged seeds are from those that tune
Place = tuple[str, int, int]  # task, size, rank


@dataclass(frozen=True)
class Sweep:
    """What is run: the parameters of the notebook, whose comments say what they are.

    validation_rows: rows of each half at most, 0 for all; other_sizes: of all tasks but the first, the first of them
    with all methods; ranks: beside `adapter_rank`, on the first task with the first size; more_rates: how often a grid
    may grow.
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

        All stacked methods are compared with the first and third size of the first task and with the first of
        other_sizes of the others; elsewhere the core methods alone. What costs most, full width and what goes alone,
        has the first two places and comes last.
        """
        stacked = [name for name in self.methods if name not in (*ALONE, "full")]
        core = [name for name in stacked if name in CORE]
        rest = [name for name in stacked if name not in CORE]
        places, first = self.places(), self.tasks[0]
        main = [place for place in places if place[0] == first and place[2] == self.adapter_rank]
        ahead, later = main[::2], main[1::2]
        ranks = [place for place in places if place[2] != self.adapter_rank]
        others = [place for place in places if place[0] != first]
        wide = [[place] for place in others if place[1] == self.other_sizes[0]]
        narrow = [[place] for place in others if place[1] != self.other_sizes[0]]
        order = [(ahead, core), (ahead, rest), *((of, core) for of in wide), (later, core)]
        order += [*((of, rest) for of in wide), (ranks, core), *((of, core) for of in narrow)]
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


def planned(sweep: Sweep) -> list[tuple[Place, str]]:
    """Return the places and methods of the blocks, in their order."""
    return [(place, name) for places, names in sweep.blocks() for place in places for name in names]


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
