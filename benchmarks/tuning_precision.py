"""Whether the sweep of rates of beyond/07_method_or_tuning says the same in another precision of the frozen model.

    python benchmarks/tuning_precision.py --preset mpnet --precision tf32 --cells CELLS --seconds 540 --out FILE
    python benchmarks/tuning_precision.py --preset mpnet --precision tf32 --cells CELLS --sizes 16 --set devices one

For each method and size of the first task whose rate the sweep has chosen, it computes in the other precision the cells
of that rate and of its two neighbours with the tuning seeds, and of that rate with the seeds that are judged. What is
told: whether the same one of the three rates would have been chosen; and how much what each method gains over LoRA
differs, seed by seed, between the precisions, with Holm's correction over all that are compared. The cells lie beside
those of the sweep, so that a later call goes on where this one ended.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import ttest_1samp
from tuning_cells import values_of
from written import measured

import compressible as cd
from compressible.companion.claims.intervals import holm
from compressible.experiments.tuning_cells import Cell, Cells
from compressible.experiments.tuning_outcome import label
from compressible.experiments.tuning_rates import chosen_rate, curve, mean_score
from compressible.experiments.tuning_sweep import CORE, Place, Sweep, sweep_of
from compressible.experiments.tuning_worker import OutOfTimeError, Worker
from compressible.runtime.checks import expect
from compressible.runtime.paths import cache_dir

LORA = "standard"


@dataclass(frozen=True)
class Case:
    """A method at a place, the rates around the one that the sweep chose, and that one."""

    place: Place
    method: str
    rates: list[float]
    best: float

    def cells(self) -> tuple[list[Cell], Cell]:
        """Those that choose among the rates, and the one that is judged."""
        choosing = [Cell(*self.place, self.method, "choose", rate) for rate in self.rates]
        return choosing, Cell(*self.place, self.method, "judge", self.best)


def measure(asked: argparse.Namespace) -> dict[str, Any]:
    """Compute what is missing, and compare the precisions."""
    values = values_of(asked.preset, dict(asked.set))
    sweep, root = sweep_of(values), asked.cells or cache_dir() / "cells"
    expect("--precision", asked.precision, asked.precision != sweep.precision, "another one than the sweep's")
    here = replace(sweep, precision=asked.precision)
    before, now = Cells(sweep.setting(), root), Cells(here.setting(), root)
    cases = list(chosen(sweep, before, asked.methods, asked.sizes or sweep.sample_sizes))
    if asked.seconds > 0:
        devices = None if values["devices"] == "one" else values["devices"]
        compute(Worker(here, now, values["device"], devices, asked.seconds, values["max_stack"]), cases)
    told = compared(sweep, {sweep.precision: before, here.precision: now}, cases)
    print(json.dumps(told, indent=1), flush=True)
    return told


def chosen(sweep: Sweep, cells: Cells, methods: list[str], sizes: list[int]) -> Iterator[Case]:
    """The cases whose rate the sweep has chosen, each with the rates beside it that were tried."""
    for size in sizes:
        place = (sweep.tasks[0], size, sweep.adapter_rank)
        for name in methods:
            best = chosen_rate(sweep, cells, *place, name)
            if best is not None:
                tried = list(curve(sweep, cells, *place, name))
                at = tried.index(best)
                yield Case(place, name, tried[max(0, at - 1) : at + 2], best)


def compute(worker: Worker, cases: list[Case]) -> None:
    """Compute the cells of all cases side by side, until it is done or the time is used up."""
    found = [case.cells() for case in cases]
    try:
        worker.compute([judged for _, judged in found])
        worker.compute([cell for choosing, _ in found for cell in choosing])
    except OutOfTimeError:
        print("the time is used up; the next call goes on")


def compared(sweep: Sweep, cells: Mapping[str, Cells], cases: list[Case]) -> dict[str, Any]:
    """By place and method, what each precision chooses and gains, and how far the gains differ."""
    judged = {(case.place, case.method): scores(cells, case) for case in cases}
    rows = [row(sweep, cells, case) for case in cases]
    pairs = [(told, gain) for told, case in zip(rows, cases, strict=True) if (gain := gained(judged, case)) is not None]
    for (told, gain), p in zip(pairs, holm([p_value(gain) for _, gain in pairs]), strict=True):
        told |= {"gain over LoRA differs by": cd.figures.interval_text(gain), "p, Holm": p}
    return {"compared": len(pairs), "cases": rows}


def p_value(differences: np.ndarray) -> float:
    """Student's two-sided p of a mean of 0; 1 where all differences are 0."""
    return float(ttest_1samp(differences, 0).pvalue) if np.ptp(differences) else float(not differences.any())


def row(sweep: Sweep, cells: Mapping[str, Cells], case: Case) -> dict[str, Any]:
    """What each precision finds of a case: the rate it would choose of the three, and the judged scores."""
    choosing, judged = case.cells()
    told: dict[str, Any] = {"place": label(sweep, case.place), "method": case.method, "rates": case.rates}
    for name, own in cells.items():
        means = [mean_score(own.get(cell)) for cell in choosing]
        found = own.get(judged)
        complete = bool(np.isfinite(means).all())
        told[f"chosen, {name}"] = case.rates[int(np.argmax(means))] if complete else None
        told[f"choosing scores, {name}"] = means if complete else None
        told[f"judged scores, {name}"] = None if found is None else found.scores
    return told


def scores(cells: Mapping[str, Cells], case: Case) -> list[np.ndarray] | None:
    """The judged scores in both precisions, None where one lacks them."""
    found = [own.get(case.cells()[1]) for own in cells.values()]
    return None if None in found else [np.array(one.scores) for one in found if one is not None]


def gained(judged: Mapping[tuple[Place, str], list[np.ndarray] | None], case: Case) -> np.ndarray | None:
    """How much more a method gains over LoRA, seed by seed, in the second precision than in the first."""
    own, lora = judged[case.place, case.method], judged.get((case.place, LORA))
    if case.method == LORA or own is None or lora is None:
        return None
    first, second = (mine - other for mine, other in zip(own, lora, strict=True))
    return second - first


def main() -> None:
    """Read the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="mpnet", help="whose sweep")
    parser.add_argument("--precision", default="tf32", choices=("bfloat16", "tf32", "float32"))
    parser.add_argument("--methods", nargs="+", default=list(CORE), help="with LoRA itself, `standard`, among them")
    parser.add_argument("--sizes", type=int, nargs="+", help="training examples, the sweep's unless given")
    parser.add_argument("--cells", type=Path, help="folder of the sweep's cells, by default in the cache")
    parser.add_argument("--seconds", type=float, default=540.0, help="begin no further call after so long; 0: none")
    parser.add_argument("--set", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"))
    measured(parser, measure)


if __name__ == "__main__":
    main()
