"""P1's Table 1: what LoRA and Deep LoRA gain over each other on several tasks, and the tables that show it.

Scores of glue_runs.py are paired: a seed draws the same rows, order and dropout for every method of a task. Arrays are
by task (T), method (M) and seed (S).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from compressible.companion.claims.intervals import holm, interval, mean
from compressible.experiments.glue_runs import METHODS

BASELINES = ("paper", "standard", "full")  # what others are compared with, where they are not the same


def table(found: Mapping[str, Mapping[str, Any]], methods: Sequence[str]) -> dict[str, Any]:
    """Return the whole table from {task: what `one_task` of glue_runs.py gave}.

    Numbers are stacked over the tasks, and `gains` are added; "device seconds in all" are those of all tasks, and
    "times peft" is by how much "peft seconds", of speed.one_by_one, exceed them, where there are some.
    """
    names = next(iter(found.values()))
    out: dict[str, Any] = {name: np.stack([np.asarray(each[name]) for each in found.values()]) for name in names}
    out |= gains(out["scores"], list(found), methods)
    out["device seconds in all"] = float(out["device seconds"].sum())
    if "peft seconds" in out:
        out["times peft"] = float(out["peft seconds"].sum()) / out["device seconds in all"]
    return out


def gains(scores: np.ndarray, tasks: Sequence[str], methods: Sequence[str]) -> dict[str, np.ndarray]:
    """Return by seed (S,) what each method gains over BASELINES, from scores (T, M, S).

    "<method> - <other>, <task>", and "..., overall", the mean over the tasks, which stay the same from seed to seed.
    """
    out: dict[str, np.ndarray] = {}
    for method, other in pairs(methods):
        gain = scores[:, methods.index(method)] - scores[:, methods.index(other)]
        out |= {f"{method} - {other}, {task}": row for task, row in zip(tasks, gain, strict=True)}
        out[f"{method} - {other}, overall"] = gain.mean(0)
    return out


def pairs(methods: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield the pairs that are compared: each method with each of the baselines that stands before it."""
    for other in BASELINES:
        if other in methods:
            later = METHODS[METHODS.index(other) + 1 :]
            yield from ((method, other) for method in later if method in methods)


def compared(found: Mapping[str, Any] | Any, tasks: Sequence[str], method: str, other: str) -> dict[str, np.ndarray]:
    """Return how a method compares with another, task by task: each (T,).

    "gain" with its 95 % interval "low" and "high" by Student's t, the standard deviation "deviation" of the seeds'
    differences, the two-sided "p" that the gain is none (1 where all differences are zero), and "holm", these p
    corrected over the tasks. NaN where a run diverged; such a task still counts in the correction.
    """
    each = np.stack([found[f"{method} - {other}, {task}"] for task in tasks])
    middle, low, high = interval(each, axis=1)
    p = np.array([_two_sided(row) for row in each])
    corrected = np.array(holm(np.nan_to_num(p, nan=1.0)))
    deviation = each.std(1, ddof=1)
    return {
        "gain": middle,
        "low": low,
        "high": high,
        "deviation": deviation,
        "p": p,
        "holm": np.where(np.isnan(p), np.nan, corrected),
    }


def long_form(scores: np.ndarray, methods: Sequence[str], titles: Mapping[str, str]) -> pd.DataFrame:
    """Return scores (T, M, S) of methods in `titles` as rows of "task", its place, "score" and "method", its title."""
    rows = [
        (place, float(score), title)
        for name, title in titles.items()
        for place, of in enumerate(scores[:, methods.index(name)])
        for score in of
    ]
    return pd.DataFrame(rows, columns=["task", "score", "method"])


def published_pair(found: Mapping[str, Any] | Any, tasks: Sequence[str], methods: Sequence[str]) -> pd.DataFrame:
    """Return the table as the paper has it, a row a task: mean scores of its two methods and what `compared` gives."""
    versus = compared(found, tasks, "full", "paper")
    out = pd.DataFrame({"rows": found["validation rows"]}, index=pd.Index(tasks))
    for name, title in (("paper", "LoRA"), ("full", "Deep LoRA")):
        out[title] = found["scores"][:, methods.index(name)].mean(1).round(4)
    out["difference"] = bracketed(versus["gain"], versus["low"], versus["high"])
    return out.assign(**{"deviation": versus["deviation"].round(4), "p, Holm": versus["holm"].round(4)})


def beside(table: pd.DataFrame, authors: Mapping[str, Any]) -> pd.DataFrame:
    """Return the table with the authors' columns; as it is where its tasks are others than theirs."""
    if list(table.index) != list(authors["tasks"]):
        return table
    ends = [authors[name][: len(table)] for name in ("gain", "gain_low", "gain_high")]
    theirs = {"LoRA": authors["paper"], "Deep LoRA": authors["full"], "difference": bracketed(*ends)}
    theirs |= {"deviation": np.sqrt(authors["variance"]).round(4), "p, Holm": authors["holm"]}
    return table.assign(**{f"{name}, BERT": column for name, column in theirs.items()})


def all_methods(found: Mapping[str, Any] | Any, tasks: Sequence[str], methods: Sequence[str]) -> pd.DataFrame:
    """Return a row a method: mean scores by task, their mean, what is gained over LoRA's two starts, and the cost."""
    scores = found["scores"].mean(2).T
    out = pd.DataFrame(scores, [*methods], [*tasks]).assign(mean=scores.mean(1)).round(4)
    for other in ("paper", "standard"):
        over = [name for name, of in pairs(methods) if of == other]
        ends = [interval(found[f"{name} - {other}, overall"]) for name in over]
        out[f"over {other}"] = pd.Series(bracketed(*np.transpose(ends)) if over else [], over, dtype=str)
    out["last loss"] = found["last loss"].mean((0, 2)).round(3)
    out["diverged"] = np.isnan(found["scores"]).sum((0, 2))
    return out.assign(**{"seconds a run": found["seconds"].mean((0, 2)).round(2)}).fillna("")


def costs(found: Any, tasks: Sequence[str]) -> pd.DataFrame:
    """Return by task the seconds of all devices and, where peft was timed, those of all its steps and of one."""
    known = ("device seconds", "peft seconds", "peft/narrow", "peft/full")
    return pd.DataFrame({name: found[name] for name in known if name in found}, [*tasks]).round(4)


def bracketed(middle: Iterable[float], low: Iterable[float], high: Iterable[float]) -> list[str]:
    """Return "middle [low, high]" of each, to three digits."""
    return [f"{m:.3f} [{a:.3f}, {b:.3f}]" for m, a, b in zip(middle, low, high, strict=True)]


def _two_sided(values: np.ndarray) -> float:
    """The p value of Student's paired test of no difference; 1 where no run differs from its partner."""
    if len(values) < 2 or not np.isfinite(values).all():
        return float("nan")
    if not values.any():
        return 1.0  # the whole of the interval is zero, of which both one-sided tests are sure
    found = mean(values)
    return min(1.0, 2 * min(found.below(0.0), found.above(0.0)))
