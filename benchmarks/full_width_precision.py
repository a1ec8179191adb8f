"""Whether runs of full width that end with a constant output owe it to bfloat16 or to their rate.

    python benchmarks/full_width_precision.py --precision tf32
    python benchmarks/full_width_precision.py --precision bfloat16 --rate 3e-5
    python benchmarks/full_width_precision.py --precision tf32 --tasks stsb qnli qqp

Trains the full-width runs of a preset of yaras2024/08_few_shot again, or those of tasks of yaras2024/table1_glue, with
the same seeds, in another precision of the frozen model or at another rate, and holds their scores against the
record's: how many ended with one answer for all rows (a correlation of exactly 0, an accuracy that is a class's
share), Fisher's exact test on the two counts, and the mean of all others. Of every run also the training loss, so that
one sees when it is lost.
"""

from __future__ import annotations

import argparse
import ast
import json
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from scipy.stats import fisher_exact
from written import measured

import compressible as cd
from compressible.companion import notebooks, records
from compressible.experiments import few_shot, glue_runs
from compressible.runtime import devices

ID, TABLE = "yaras2024/08_few_shot", "yaras2024/table1_glue"
FULL = few_shot.METHODS.index("full")
LOSSES = 100  # means of the training loss that are kept of a run, at most


def measure(asked: argparse.Namespace) -> dict[str, Any]:
    """What is told by the scores of the record and of the runs made here, after each other where there are tasks."""
    made = [of_task(asked, task) for task in asked.tasks] if asked.tasks else [of_few_shot(asked)]
    return {"parts": made} if asked.tasks else made[0]


def of_few_shot(asked: argparse.Namespace) -> dict[str, Any]:
    """The full-width runs of the few-shot figure, whose scores are (sizes, seeds)."""
    p, arrays = recorded(ID, asked)
    sizes = asked.sizes or p.sample_sizes
    chosen = [p.sample_sizes.index(size) for size in sizes]
    before = arrays["scores"][FULL, chosen, :, -1]
    p.sample_sizes = sizes
    model, task = load(p)
    histories = train(p, model, task, full_width(p, model, task))
    return outcome(p, histories, before, np.zeros(1)) | {"sizes": sizes}


def of_task(asked: argparse.Namespace, name: str) -> dict[str, Any]:
    """The full-width runs of a task of Table 1, whose scores are (seeds,)."""
    p, arrays = recorded(TABLE, asked)
    place = p.tasks.index(name)
    before = arrays["scores"][place, p.methods.index("full")]
    p.task, p.steps = name, p.step_counts[place]
    model, task = load(p)
    histories = train(p, model, task, full_width_of_table(p, model, task))
    return outcome(p, histories, before, constant_scores(task)) | {"task": name}


def recorded(notebook: str, asked: argparse.Namespace) -> tuple[SimpleNamespace, dict[str, np.ndarray]]:
    """Parameters of a record, with the precision and the rate that are asked for, and its arrays."""
    place = notebooks.record_path(notebook, asked.preset)
    record = json.loads(place.read_text(encoding="utf-8"))
    p = SimpleNamespace(**record["parameters"])
    p.precision = asked.precision or p.precision
    p.learning_rate = asked.rate or p.learning_rate
    return p, records.read_arrays(place, record)[0]


def load(p: SimpleNamespace) -> tuple[torch.nn.Module, cd.Task]:
    """Model and task of a record's parameters."""
    return cd.load_for_task(p.encoder, p.task, p.protocol, p.max_length, p.validation_rows, p.device)


def train(
    p: SimpleNamespace, model: torch.nn.Module, task: cd.Task, runs: list[cd.FineTuningRun]
) -> list[cd.RunHistory]:
    """The histories of these runs, over all GPUs that are shown."""
    options = {"evaluate_at": [p.steps], "precision": p.precision, "max_stack": p.max_stack, "keep_factors": False}
    shared = "all" if torch.cuda.device_count() > 1 else None
    return cd.fine_tune(model, runs, task, p.steps, p.batch_size, devices=shared, **options)


def full_width(p: SimpleNamespace, model: torch.nn.Module, task: cd.Task) -> list[cd.FineTuningRun]:
    """Of the runs that the notebook plans, by method, size and seed, those of full width."""
    count = len(p.sample_sizes) * p.seeds
    return planned()(p, model, task)[FULL * count : (FULL + 1) * count]


def full_width_of_table(p: SimpleNamespace, model: torch.nn.Module, task: cd.Task) -> list[cd.FineTuningRun]:
    """Of the runs that the table's task has, by method and seed, those of full width."""
    first = p.methods.index("full") * p.seeds
    return glue_runs.planned(p, model, task)[first : first + p.seeds]


def planned() -> Callable[..., list[cd.FineTuningRun]]:
    """The notebook's own function, so that what is trained here is what its record tells of."""
    cells = json.loads(notebooks.notebook_path(ID).read_text(encoding="utf-8"))["cells"]
    (source,) = (text for cell in cells if "def planned(" in (text := "".join(cell["source"])))
    (found,) = (node for node in ast.parse(source).body if getattr(node, "name", "") == "planned")
    space: dict[str, Any] = {"few_shot": few_shot}
    exec(compile(ast.Module([found], []), ID, "exec"), space)
    return space["planned"]


def constant_scores(task: cd.Task) -> np.ndarray:
    """Scores of one answer for all validation rows: 0 for a correlation, else the share of each class."""
    if task.metric != "accuracy":
        return np.zeros(1)
    labels = task.validation.labels.cpu().numpy()
    return np.bincount(labels) / len(labels)


def outcome(
    p: SimpleNamespace, histories: Sequence[cd.RunHistory], before: np.ndarray, constants: np.ndarray
) -> dict[str, Any]:
    """What is told by the record's scores and by those of these runs, in the same shape."""
    scores = np.array([run.scores[p.steps] for run in histories]).reshape(before.shape)
    counts = {"record": counted(before, constants), "here": counted(scores, constants)}
    constant = [[told["constant"], told["runs"] - told["constant"]] for told in counts.values()]
    told = {"device": devices.device_name(p.device), "precision": p.precision, "rate": p.learning_rate}
    told |= {"seconds": sum({run.seconds for run in histories})} | counts
    told["fisher p"] = float(fisher_exact(constant).pvalue)
    print(json.dumps(told, indent=1), flush=True)
    parts = min(LOSSES, p.steps)
    losses = [[round(float(part.mean()), 4) for part in np.array_split(run.losses, parts)] for run in histories]
    both = {"scores": scores.round(4).tolist(), "scores of the record": before.round(4).tolist()}
    return told | both | {f"mean training loss of each of {parts} parts of the run": losses}


def counted(scores: np.ndarray, constants: np.ndarray) -> dict[str, Any]:
    """Of scores: runs, those that ended with one answer for all rows, the mean of the others."""
    constant = (np.abs(scores[..., None] - constants) < 1e-6).any(-1)
    others = float(scores[~constant].mean()) if (~constant).any() else None
    return {"runs": scores.size, "constant": int(constant.sum()), "mean of the others": others}


def main() -> None:
    """Read the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="mpnet", choices=sorted(notebooks.presets(ID)), help="whose record")
    parser.add_argument("--precision", choices=("bfloat16", "tf32", "float32"), help="the record's, unless given")
    parser.add_argument("--rate", type=float, help="learning rate, the record's unless given")
    parser.add_argument("--sizes", type=int, nargs="+", help="training examples, the record's unless given")
    parser.add_argument("--tasks", nargs="+", help="tasks of Table 1, in the place of the few-shot figure")
    measured(parser, measure)


if __name__ == "__main__":
    main()
