"""The vocabulary of notebook parameters: one line a name, checked before any work starts.

A name means the same thing in every notebook. To add one, add a line to `VOCABULARY`; to relate two
(the first never above the second), add a line to `AT_MOST`.
"""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Iterable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from compressible.runtime.checks import closest


class ParameterError(ValueError):
    """One or several parameters are unknown, of the wrong type, out of range or impossible together."""


@dataclass(frozen=True)
class Parameter:
    """What a name stands for: element type, allowed values, unit, meaning, and whether it is a list.

    `allowed` is an interval such as "(0, 1]" for numbers and a regular expression for text.
    """

    kind: type
    allowed: str
    unit: str
    meaning: str
    many: bool = False

    def expected(self) -> str:
        """What a valid value looks like, in words."""
        words = {int: "an integer", float: "a number", str: "text", bool: "True or False"}[self.kind]
        where = {str: " matching ", bool: ""}.get(self.kind, " in ")
        each = "a non-empty list, each " if self.many else ""
        return f"{each}{words}{where}{self.allowed}"


POSITIVE, NOT_NEGATIVE, COUNT = "(0, inf)", "[0, inf)", "[1, inf)"

VOCABULARY: dict[str, Parameter] = {
    "preset": Parameter(str, r"[a-z][a-z0-9_-]*", "", "label under which figures are saved"),
    # the problem
    "dimension": Parameter(int, COUNT, "rows", "side d of a square target"),
    "dimensions": Parameter(int, COUNT, "rows", "sides d to compare", many=True),
    "large_dimension": Parameter(int, COUNT, "rows", "side d of the large square target"),
    "sparse_dimension": Parameter(int, COUNT, "rows", "side d of the target of which only entries are held"),
    "entries": Parameter(int, COUNT, "", "observed entries of the sparse target"),
    "rank": Parameter(int, COUNT, "", "true rank r of the target"),
    "ranks": Parameter(int, COUNT, "", "ranks to compare", many=True),
    "observed": Parameter(float, "(0, 1]", "fraction", "share of the entries that are observed"),
    "entry_counts": Parameter(int, COUNT, "", "numbers of observed entries to compare", many=True),
    "large_observed": Parameter(float, "(0, 1]", "fraction", "share of the large target's entries that are observed"),
    "measurements": Parameter(int, COUNT, "", "number of linear measurements"),
    "smallest_value": Parameter(float, "(0, 1]", "", "smallest singular value of the target over its largest"),
    "noise": Parameter(float, NOT_NEGATIVE, "std", "standard deviation of the noise on what is observed"),
    "noises": Parameter(float, NOT_NEGATIVE, "std", "standard deviations of the noise to compare", many=True),
    "noise_ratios": Parameter(float, NOT_NEGATIVE, "", "noise over the target's root mean square entry", many=True),
    "skews": Parameter(float, NOT_NEGATIVE, "", "exponents of non-uniform observation, 0 is uniform", many=True),
    # the factorization
    "depth": Parameter(int, "[2, inf)", "factors", "number L of factors"),
    "depths": Parameter(int, "[2, inf)", "factors", "numbers of factors to compare", many=True),
    "width": Parameter(int, COUNT, "columns", "hidden width w"),
    "widths": Parameter(int, COUNT, "columns", "hidden widths to compare", many=True),
    "inner_widths": Parameter(int, COUNT, "columns", "inner widths k of the compressed network to compare", many=True),
    "guess": Parameter(int, COUNT, "", "rank that the compression assumes"),
    "rank_guesses": Parameter(int, COUNT, "", "assumed ranks to compare", many=True),
    "init_scale": Parameter(float, POSITIVE, "", "scale eps of the orthogonal initial factors"),
    "init_scales": Parameter(float, POSITIVE, "", "initial scales eps to compare", many=True),
    "product_scale": Parameter(float, POSITIVE, "", "scale eps^L at which the product of the factors starts"),
    # the descent
    "step_size": Parameter(float, POSITIVE, "", "gradient step of the inner factors"),
    "step_fraction": Parameter(float, POSITIVE, "", "gradient step over the stability limit"),
    "step_sizes": Parameter(float, POSITIVE, "", "gradient steps to compare", many=True),
    "step_fractions": Parameter(float, POSITIVE, "", "step sizes to choose from, over the stability limit", many=True),
    "depth2_step_size": Parameter(float, POSITIVE, "", "gradient step of the two-factor run"),
    "outer_ratio": Parameter(float, NOT_NEGATIVE, "", "step of the outer factors over that of the inner"),
    "outer_ratios": Parameter(float, NOT_NEGATIVE, "", "outer step ratios to compare", many=True),
    "weight_decay": Parameter(float, NOT_NEGATIVE, "", "weight decay lambda of every factor"),
    "steps": Parameter(int, NOT_NEGATIVE, "iterations", "iterations of gradient descent at most"),
    "record_every": Parameter(int, COUNT, "iterations", "iterations between two records"),
    "frames": Parameter(int, COUNT, "", "number of snapshots of the factors along the way"),
    "tolerance": Parameter(float, NOT_NEGATIVE, "", "training loss at which a run stops"),
    "depth2_init_scale": Parameter(float, POSITIVE, "", "scale of the two-factor start"),
    # repetition and machinery
    "seed": Parameter(int, NOT_NEGATIVE, "", "seed of the random numbers"),
    "seeds": Parameter(int, COUNT, "", "number of independent seeds"),
    "trials": Parameter(int, COUNT, "", "number of repeated trials"),
    "stacks": Parameter(int, "[2, inf)", "problems", "numbers of problems in a stack to compare", many=True),
    "precisions": Parameter(str, "float64|float32", "", "precisions to compare, the main one first", many=True),
    "measure_seconds": Parameter(float, POSITIVE, "s", "time that each engine is measured for in steady state"),
    "device": Parameter(str, r"auto|cpu|cuda(:\d+)?", "", "where tensors live"),
    "engine": Parameter(str, r"auto|reference|fused|compiled|graphed|tiled|persistent", "", "what takes the steps"),
    # fine-tuning
    "encoder": Parameter(str, r"[\w./-]+", "", "pretrained model: minilm, a folder, or a name on the hub"),
    "task": Parameter(str, r"[a-z0-9-]+", "", "text task to fine-tune on, such as stsb or vader-tweets"),
    "protocol": Parameter(str, "authors|clean", "", "the authors' frozen head and subsets, or a trained head"),
    "matrices": Parameter(str, r"[\w.-]+", "", "ends of the names of adapted layers, or all-dense", many=True),
    "max_length": Parameter(int, "[3, inf)", "word pieces", "longest example"),
    "validation_rows": Parameter(int, NOT_NEGATIVE, "", "validation examples to take, 0 for all"),
    "sample_sizes": Parameter(int, COUNT, "", "numbers of training examples to compare", many=True),
    "batch_size": Parameter(int, COUNT, "rows", "examples in a run's training batch"),
    "adapter_rank": Parameter(int, COUNT, "", "inner width r of LoRA and of thin and compressed adapters"),
    "learning_rate": Parameter(float, POSITIVE, "", "peak rate of AdamW"),
    "inner_learning_rate": Parameter(float, POSITIVE, "", "rate of the inner factors of compressed adapters"),
    "control_learning_rate": Parameter(float, POSITIVE, "", "second rate of LoRA's standard start, a control"),
    "inner_control_rate": Parameter(float, POSITIVE, "", "second inner rate of compressed adapters, a control"),
    "decay_ratio": Parameter(float, "[0, 1]", "", "rate at the end over the rate at the start, linear between"),
    "snapshots": Parameter(int, NOT_NEGATIVE, "steps", "steps at which the updates are looked at", many=True),
    "filter_step": Parameter(int, NOT_NEGATIVE, "steps", "snapshot at which the authors choose layers"),
    "evaluate_at": Parameter(int, NOT_NEGATIVE, "steps", "steps at which the validation score is taken", many=True),
    "precision": Parameter(str, "float32|tf32|bfloat16", "", "precision of the frozen model's products"),
    "max_stack": Parameter(int, COUNT, "runs", "most runs in one pass"),
    "encoders": Parameter(str, r"bert-base|[A-Za-z0-9][\w./-]*", "", "encoders; bert-base is that shape", many=True),
    "run_counts": Parameter(int, COUNT, "runs", "numbers of runs in a pass to compare", many=True),
    "full_runs": Parameter(int, COUNT, "runs", "runs of the full variant in a pass"),
    "tuning_precisions": Parameter(str, "float32|tf32|bfloat16", "", "precisions, the main one first", many=True),
    "length": Parameter(int, "[3, inf)", "tokens", "length of every row"),
    "compiled": Parameter(bool, "", "", "whether torch.compile is measured, too"),
    "few_rows": Parameter(int, COUNT, "rows", "rows to learn from"),
    "deep_rates": Parameter(float, POSITIVE, "", "learning rates of Deep LoRA's inner factors", many=True),
    "lora_rates": Parameter(float, POSITIVE, "", "learning rates of LoRA", many=True),
    "budget_seconds": Parameter(float, POSITIVE, "s", "time after which no other measurement begins"),
    # ratings
    "users": Parameter(int, COUNT, "", "users with the most ratings to keep"),
    "items": Parameter(int, COUNT, "", "items with the most ratings to keep"),
    "tables": Parameter(str, r"movielens-[a-z0-9-]+", "", "rating sets of the data manifest to fit", many=True),
    "split": Parameter(str, r"auto|u[1-5]|seed\d+", "", "named split into training and test ratings"),
    "splits": Parameter(str, r"auto|u[1-5]|seed\d+", "", "named splits to average over", many=True),
    "validation_fraction": Parameter(float, "(0, 1)", "fraction", "share of training ratings to tune on"),
    "centring": Parameter(str, r"none|global|user_item", "", "what is subtracted from the ratings"),
    "ridge": Parameter(float, NOT_NEGATIVE, "", "ridge penalty of the untuned baseline"),
    "ridges": Parameter(float, NOT_NEGATIVE, "", "ridge penalties to choose from", many=True),
    "epochs": Parameter(int, COUNT, "", "passes over the training ratings"),
    "sweeps": Parameter(int, COUNT, "", "alternating sweeps over both factors"),
}

AT_MOST = (
    ("rank", ("dimension", "dimensions", "large_dimension", "sparse_dimension", "users", "items", "width", "widths")),
    ("ranks", ("dimension", "dimensions", "users", "items", "width", "widths")),
    ("inner_widths", ("dimension", "dimensions", "users", "items")),
    ("guess", ("dimension", "dimensions", "users", "items")),
    ("rank_guesses", ("dimension", "dimensions", "users", "items")),
    ("batch_size", ("few_rows",)),
)
EVEN = ("adapter_rank",)  # a compressed adapter holds r / 2 directions a side


def collect(namespace: MutableMapping[str, Any]) -> dict[str, Any]:
    """The validated parameters among a notebook's globals: every public name that holds a plain value.

    A plain value is an int, float, str, bool, list or tuple, so a name that was injected by mistake is
    refused too. Raises ParameterError. When the cell is run again in the same kernel, plain values that
    later cells left behind do not count: only the names of the first time and of the cell run just before.
    """
    names = {
        name
        for name, value in namespace.items()
        if not name.startswith("_") and name not in _IPYTHON and isinstance(value, _PLAIN)
    }
    if "_parameter_names" in namespace:
        names &= namespace["_parameter_names"] | _assigned(namespace.get("In", []))
    namespace["_parameter_names"] = names & VOCABULARY.keys()
    return validate({name: value for name, value in namespace.items() if name in names})


def validate(values: Mapping[str, Any], allowed: Iterable[str] | None = None) -> dict[str, Any]:
    """Checked and normalised parameters; `allowed` narrows the known names, say to one notebook's own.

    Integers become floats where a float is meant and tuples become lists; nothing else is converted and
    text is never parsed. Raises ParameterError with one line for each problem: name, value, expected.
    """
    known = VOCABULARY.keys() if allowed is None else set(allowed)
    checked: dict[str, Any] = {}
    problems: list[str] = []
    for name, value in values.items():
        try:
            checked[name] = _checked(name, value, known)
        except ParameterError as error:
            problems.append(str(error))
    problems += _impossible(checked)
    if problems:
        raise ParameterError(problems[0] if len(problems) == 1 else "\n  ".join(["parameters:", *problems]))
    return checked


def help_text() -> str:
    """One line for each known name: what it must be, its unit and its meaning."""
    return "\n".join(
        f"{name}: {entry.meaning}{f' [{entry.unit}]' if entry.unit else ''}; {entry.expected()}"
        for name, entry in VOCABULARY.items()
    )


_PLAIN = (int, float, str, bool, list, tuple, np.generic)
_IPYTHON = {"In", "Out"}


def _assigned(cells: list[str]) -> set[str]:
    """Names assigned at the top level of the cell that ran just before the present one."""
    try:
        body = ast.parse(cells[-2]).body
    except (IndexError, SyntaxError, ValueError):
        return set()
    stores = (node for statement in body for node in ast.walk(statement))
    return {node.id for node in stores if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}


def _checked(name: str, value: Any, known: Iterable[str]) -> Any:
    if name not in known:
        raise ParameterError(f"{name}: got {value!r}, expected a known name{closest(name, known)}")
    if name not in VOCABULARY:
        raise ParameterError(f"{name}: got {value!r}, expected a name of the vocabulary in parameters.py")
    entry = VOCABULARY[name]
    if not entry.many:
        return _element(name, value, entry)
    if not isinstance(value, list | tuple) or not value:
        raise _refusal(name, value, entry)
    return [_element(f"{name}[{index}]", element, entry) for index, element in enumerate(value)]


def _element(name: str, value: Any, entry: Parameter) -> Any:
    if isinstance(value, np.generic):
        value = value.item()
    if entry.kind is float and type(value) is int and abs(value) < 2**53:
        value = float(value)
    if type(value) is not entry.kind or not _admissible(value, entry):
        raise _refusal(name, value, entry)
    return value


def _admissible(value: Any, entry: Parameter) -> bool:
    if entry.kind is str:
        return re.fullmatch(entry.allowed, value) is not None
    return entry.kind is bool or (math.isfinite(value) and _inside(value, entry.allowed))


def _inside(value: float, interval: str) -> bool:
    low, high = (float(end) for end in interval[1:-1].split(","))
    above = value >= low if interval[0] == "[" else value > low
    return above and (value <= high if interval[-1] == "]" else value < high)


def _refusal(name: str, value: Any, entry: Parameter) -> ParameterError:
    return ParameterError(f"{name}: got {value!r} ({type(value).__name__}), expected {entry.expected()}")


def _impossible(values: Mapping[str, Any]) -> list[str]:
    """Pairs of valid values that exclude each other, such as a rank above the dimension, and odd values of EVEN."""
    odd = [name for name in EVEN if values.get(name, 0) % 2]
    problems = [f"{name}: got {values[name]!r}, expected an even integer" for name in odd]
    for small, larger in AT_MOST:
        for large in larger:
            if small in values and large in values and _top(values[small]) > _bottom(values[large]):
                limit = f"{large} = {values[large]!r}"
                problems.append(f"{small}: got {values[small]!r}, expected at most {limit}")
    return problems


def _top(value: Any) -> Any:
    return max(value) if isinstance(value, list) else value


def _bottom(value: Any) -> Any:
    return min(value) if isinstance(value, list) else value
