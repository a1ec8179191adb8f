"""How unequally LoRA's factors move, and what LoRA+ gains beside a larger rate: P3's Figure 5.

A update B A starts with A drawn and B zero. LoRA+ trains B at a multiple of A's rate. At one shared base rate it also
takes larger steps, so it is held against LoRA at that multiple of the rate, and both against each other at rates that
were chosen, for each, on seeds that judge nothing.

S runs, T marks, layers x adapted matrices.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from peft import LoraConfig
from torch import Tensor, nn

from compressible.data.pretrained import head_layers
from compressible.data.tasks import Task
from compressible.experiments.outcomes import prefixed
from compressible.experiments.rate_grid import best_of, is_inside, search_each
from compressible.finetuning.finetune import fine_tune
from compressible.finetuning.run import FineTuningRun, RunHistory
from compressible.finetuning.stacked.starts import of_peft

METHODS = ("LoRA", "LoRA+")
CASES = ("LoRA", "LoRA+", "LoRA, larger rate", "LoRA, own rate", "LoRA+, own rate")
SMOOTHING = 0.1  # share of the newest loss in the average, as in P1's figures


@dataclass(frozen=True)
class Study:
    """What all runs share: a model, a task, LoRA's configuration, LoRA+'s ratio of rates, the loss to reach.

    options go to `fine_tune`: steps, batch_size and so on.
    """

    model: nn.Module
    task: Task
    config: LoraConfig
    ratio: float
    level: float
    options: Mapping[str, Any]

    def runs(self, method: str, rate: float, seeds: Sequence[int]) -> list[FineTuningRun]:
        """Return a run a seed; the rate of LoRA+ is that of A."""
        ratio = self.ratio if method == "LoRA+" else 1.0
        label = f"{method} at {rate:g}"
        return [FineTuningRun(self.config, rate, seed, label=label, lr_ratio=ratio) for seed in seeds]

    def tuned(self, rates: Sequence[float], seeds: Sequence[int], more: int = 4) -> dict[str, dict[float, float]]:
        """Return {method: {rate: score}} of METHODS on grids that grow while an end is the best.

        The score is minus the mean number of steps to `level`; a run that does not arrive counts all its steps, and
        these once more as often as its last loss is that level, so that the grid is led on.
        """

        def scores_of(pairs: Sequence[tuple[str, float]]) -> list[float]:
            runs = [run for method, rate in pairs for run in self.runs(method, rate, seeds)]
            histories = fine_tune(self.model, runs, self.task, keep_factors=False, **self.options)
            needed, last = steps_to(histories, self.level), np.array([smooth(run.losses)[-1] for run in histories])
            counted = np.where(np.isfinite(needed), needed, self.options["steps"] * (1 + last / self.level))
            return [*-counted.reshape(len(pairs), len(seeds)).mean(1)]

        return search_each(scores_of, METHODS, rates, more)

    def compare(
        self,
        rate: float,
        rates: Sequence[float],
        tuning_seeds: Sequence[int],
        seeds: Sequence[int],
        evaluate_at: Sequence[int],
        watch_at: Sequence[int],
    ) -> dict[str, Any]:
        """Train CASES on `seeds` and return `outcome`, and of METHODS what `tuned` found.

        rate: the base rate that LoRA and LoRA+ share. rates: of the grids from which `tuning_seeds` choose their own.
        Also "case_rates", a rate a case, and "<method>/rates", "<method>/scores" (R,) and "<method>/inside", whether
        the best of them is at no end.
        """
        tuned = self.tuned(rates, tuning_seeds)
        own = {method: best_of(scores) for method, scores in tuned.items()}
        plan = [("LoRA", rate), ("LoRA+", rate), ("LoRA", self.ratio * rate), *own.items()]
        runs = [run for method, each in plan for run in self.runs(method, each, seeds)]
        looks: dict[str, Any] = {"evaluate_at": evaluate_at, "watch_at": watch_at, "watch": watch_factors(self, seeds)}
        histories = fine_tune(self.model, runs, self.task, keep_factors=False, **self.options, **looks)
        found = outcome(histories, len(seeds), self.level)
        for method, scores in tuned.items():
            grid = {"rates": np.array([*scores]), "scores": np.array([*scores.values()]), "inside": is_inside(scores)}
            found |= prefixed(method, grid)
        return found | {"case_rates": [each for _, each in plan]}


def lora_of(model: nn.Module, matrices: list[str], protocol: str, rank: int) -> LoraConfig:
    """Return peft's LoRA of scaling 1, A Kaiming and B zero, on `matrices`; "clean" trains the head, too."""
    head = head_layers(model)
    return LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=matrices,
        exclude_modules=head,
        modules_to_save=head if protocol == "clean" else None,
        task_type="SEQ_CLS",
    )


def watch_factors(study: Study, seeds: Sequence[int]) -> Callable[[Any], list[np.ndarray]]:
    """Return a `watch` that keeps (layers, 4) of each run.

    Frobenius' norms of A and of B, and how far their entries are from their starts, root mean squares.
    """
    starts = {seed: _starts_of(study, seed) for seed in seeds}

    def watch(snapshot: Any) -> list[np.ndarray]:
        rows: list[list[list[float]]] = [[] for _ in snapshot.runs]
        for name, chains in snapshot.factors():
            for row, run, (a, b) in zip(rows, snapshot.runs, chains, strict=True):
                moved = a.cpu() - starts[run.seed][name]
                norms = [a.norm(), b.norm(), moved.square().mean().sqrt(), b.square().mean().sqrt()]
                row.append([float(norm) for norm in norms])
        return [np.array(row) for row in rows]

    return watch


def outcome(histories: Sequence[RunHistory], seeds: int, level: float) -> dict[str, np.ndarray]:
    """Return the output of the runs of CASES, S seeds each.

    "losses" (cases, S, steps), smoothed; "scores" (cases, S, marks); "factors" (cases, S, T, layers, 4) as
    `watch_factors` has them; "needed" (cases, S), steps to the level; `moves` of LoRA at the base rate; and (S,) the
    steps of a case over those of LoRA+: "speedup", "speedup_over_larger" and "speedup_tuned".
    """
    shape = len(CASES), seeds
    factors = np.array([[run.watched[step] for step in sorted(run.watched)] for run in histories])
    factors = factors.reshape(*shape, *factors.shape[1:])
    needed = steps_to(histories, level).reshape(shape)
    lora, plus, larger, tuned, tuned_plus = needed
    return {
        "losses": np.array([smooth(run.losses) for run in histories]).reshape(*shape, -1),
        "scores": np.array([[*run.scores.values()] for run in histories]).reshape(*shape, -1),
        "factors": factors,
        "needed": needed,
        **moves(factors[0]),
        "speedup": quotient(lora, plus),
        "speedup_over_larger": quotient(larger, plus),
        "speedup_tuned": quotient(tuned, tuned_plus),
    }


def moves(factors: np.ndarray) -> dict[str, np.ndarray]:
    """Return what is judged of one case's factors (S, T, layers, 4), all (S,).

    "a_change": by which share the norm of all A together ends from its start. "b_grows": whether that of all B grew
    from each mark to the next. "move_ratio": how far entries of A ended from their starts over those of B, root mean
    squares in which all layers weigh the same.
    """
    a, b = (np.linalg.norm(factors[..., column], axis=-1) for column in (0, 1))  # (S, T), all layers together
    moved, from_zero = (np.sqrt((factors[:, -1, :, column] ** 2).mean(-1)) for column in (2, 3))
    return {
        "a_change": np.abs(a[:, -1] / a[:, 0] - 1),
        "b_grows": (np.diff(b, axis=1) > 0).all(1),
        "move_ratio": moved / from_zero,
    }


def steps_to(histories: Sequence[RunHistory], level: float) -> np.ndarray:
    """Return how many steps (S,) runs took until their smoothed loss was at most `level`.

    Infinite if it never was, NaN where the run diverged before: that is no late arrival, but none at all.
    """
    curves = np.array([smooth(run.losses) for run in histories])
    below = curves <= level
    never = np.where(np.isfinite(curves).all(1), np.inf, np.nan)
    return np.where(below.any(1), below.argmax(1) + 1.0, never)


def smooth(losses: np.ndarray) -> np.ndarray:
    """Return the exponential average (steps,) of losses; NaN from where a run diverged."""
    average = pd.Series(losses).ewm(alpha=SMOOTHING, adjust=False).mean().to_numpy()
    return np.where(np.isfinite(losses).cumprod().astype(bool), average, np.nan)


def quotient(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Return one / other of step counts; NaN where neither arrived or one diverged, 0 where only the other did not."""
    with np.errstate(invalid="ignore"):
        return one / other


def _starts_of(study: Study, seed: int) -> dict[str, Tensor]:
    """A (r, n) of every layer, as peft draws it for a seed."""
    chains = of_peft(study.model, FineTuningRun(study.config, 1.0, seed)).chains
    return {name: chain[0].cpu() for name, chain in chains.items()}
