"""Whether runs of full width that end with a constant output owe it to bfloat16 or to their rate.

    python benchmarks/full_width_precision.py --precision tf32
    python benchmarks/full_width_precision.py --precision bfloat16 --rate 3e-5

Trains the full-width runs of a preset of yaras2024/08_few_shot again, with the same seeds, in another precision of the
frozen model or at another rate, and holds their scores against the record's: how many ended with one output for all
rows (a Pearson of exactly 0), Fisher's exact test on the two counts, and the mean of all others.
"""

from __future__ import annotations

import argparse
import ast
import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from scipy.stats import fisher_exact
from written import measured

import compressible as cd
from compressible.companion import notebooks, records
from compressible.experiments import few_shot
from compressible.runtime import devices

ID = "yaras2024/08_few_shot"
FULL = few_shot.METHODS.index("full")


def measure(asked: argparse.Namespace) -> dict[str, Any]:
    """Scores (sizes, seeds) of the record and of the runs made here, and what is told by them."""
    place = notebooks.record_path(ID, asked.preset)
    record = json.loads(place.read_text(encoding="utf-8"))
    p = SimpleNamespace(**record["parameters"])
    p.precision = asked.precision or p.precision
    p.learning_rate = asked.rate or p.learning_rate
    sizes = asked.sizes or p.sample_sizes
    chosen = [p.sample_sizes.index(size) for size in sizes]
    before = records.read_arrays(place, record)[0]["scores"][FULL, chosen, :, -1]
    p.sample_sizes = sizes
    histories = train(p)
    scores = np.array([run.scores[p.steps] for run in histories]).reshape(before.shape)
    told = {"device": devices.device_name(p.device), "precision": p.precision, "rate": p.learning_rate, "sizes": sizes}
    told |= {"seconds": sum({run.seconds for run in histories}), "record": counted(before), "here": counted(scores)}
    constant = [[told[name]["constant"], told[name]["runs"] - told[name]["constant"]] for name in ("record", "here")]
    told["fisher p"] = float(fisher_exact(constant).pvalue)
    print(json.dumps(told, indent=1))
    return told | {"scores": scores.round(4).tolist(), "scores of the record": before.round(4).tolist()}


def train(p: SimpleNamespace) -> list[cd.RunHistory]:
    """The histories of the full-width runs by size and seed."""
    model, task = cd.load_for_task(p.encoder, p.task, p.protocol, p.max_length, p.validation_rows, p.device)
    options = {"evaluate_at": [p.steps], "precision": p.precision, "max_stack": p.max_stack, "keep_factors": False}
    shared = "all" if torch.cuda.device_count() > 1 else None
    return cd.fine_tune(model, full_width(p, model, task), task, p.steps, p.batch_size, devices=shared, **options)


def full_width(p: SimpleNamespace, model: torch.nn.Module, task: cd.Task) -> list[cd.FineTuningRun]:
    """Of the runs that the notebook plans, by method, size and seed, those of full width."""
    count = len(p.sample_sizes) * p.seeds
    return planned()(p, model, task)[FULL * count : (FULL + 1) * count]


def planned() -> Callable[..., list[cd.FineTuningRun]]:
    """The notebook's own function, so that what is trained here is what its record tells of."""
    cells = json.loads(notebooks.notebook_path(ID).read_text(encoding="utf-8"))["cells"]
    (source,) = (text for cell in cells if "def planned(" in (text := "".join(cell["source"])))
    (found,) = (node for node in ast.parse(source).body if getattr(node, "name", "") == "planned")
    space: dict[str, Any] = {"few_shot": few_shot}
    exec(compile(ast.Module([found], []), ID, "exec"), space)
    return space["planned"]


def counted(scores: np.ndarray) -> dict[str, Any]:
    """Of scores (sizes, seeds): runs, those that ended with a constant output, the mean of the others."""
    constant = scores == 0
    return {"runs": scores.size, "constant": int(constant.sum()), "mean of the others": float(scores[~constant].mean())}


def main() -> None:
    """Read the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="mpnet", choices=sorted(notebooks.presets(ID)), help="whose record")
    parser.add_argument("--precision", choices=("bfloat16", "tf32", "float32"), help="the record's, unless given")
    parser.add_argument("--rate", type=float, help="learning rate, the record's unless given")
    parser.add_argument("--sizes", type=int, nargs="+", help="training examples, the record's unless given")
    measured(parser, measure)


if __name__ == "__main__":
    main()
