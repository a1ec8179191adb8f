"""The vocabulary of notebook parameters: what each name may hold, checked before any work starts.

What a name means, its unit and usual range are said by the comment in the parameters cell of each notebook; here is
only what is checked. To add one, put it into a line of `_NAMES`; to relate two (the first never above the second), add
a line to `AT_MOST`. What a single notebook expects of its values together stands in its paper's rules.yaml.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from compressible.companion import parameter_cells
from compressible.runtime.checks import closest, shown


class ParameterError(ValueError):
    """One or several parameters are unknown, of the wrong type, out of range or impossible together."""


@dataclass(frozen=True)
class Parameter:
    """What a name may hold: element type, allowed values, and whether it is a list of them.

    `allowed` is an interval such as "(0, 1]" for numbers and a regular expression for text.
    """

    kind: type
    allowed: str = ""
    many: bool = False

    def expected(self) -> str:
        """What a valid value looks like, in words."""
        words = {int: "an integer", float: "a number", str: "text", bool: "True or False"}[self.kind]
        where = {str: " matching ", bool: ""}.get(self.kind, " in ")
        each = "a non-empty list, each " if self.many else ""
        return f"{each}{words}{where}{self.allowed}"


# The upper ends are generous: what is beyond them is beyond any machine, or a slip of the finger.
_SIZE, _WIDTH, _REPEATS, _COUNT = "[1, 1_000_000]", "[1, 65_536]", "[1, 10_000]", "[1, 1_000_000_000]"
_COUNT_OR_NONE, _SEED = "[0, 1_000_000_000]", "[0, 4_611_686_018_427_387_904)"  # those that follow stay below 2^63
_NOT_NEGATIVE, _POSITIVE = "[0, 1e12]", "[1e-12, 1e12]"  # products of a few of these neither vanish nor overflow
_PRECISIONS = "float32|tf32|bfloat16"
_NAMES: tuple[tuple[Parameter, str], ...] = (
    (Parameter(int, _SIZE), "dimension large_dimension sparse_dimension users items"),
    (Parameter(int, _WIDTH), "rank guess width inner_width patch layers heads adapter_rank pooling"),
    (
        Parameter(int, _REPEATS),
        "seeds trials tuning_seeds alone_seeds sweeps max_stack full_runs records most_settings",
    ),
    (
        Parameter(int, _COUNT),
        "entries measurements tuning_steps record_every frames batch_size few_rows tuning_rows noisy_rows noisy_steps"
        " period draws written_rows written_length decoder_batch",
    ),
    (Parameter(int, _SIZE, many=True), "dimensions"),
    (Parameter(int, _WIDTH, many=True), "ranks rank_guesses widths inner_widths"),
    (
        Parameter(int, _REPEATS, many=True),
        "run_counts seed_counts tuning_counts width_multiples decoder_counts device_counts",
    ),
    (Parameter(int, _COUNT, many=True), "entry_counts sample_sizes other_sizes batch_sizes periods step_counts"),
    (Parameter(int, _SEED), "seed"),
    (
        Parameter(int, _COUNT_OR_NONE),
        "steps validation_rows filter_step judged_at train_rows test_rows warmup long_steps descent_steps peft_steps"
        " more_rates",
    ),
    (Parameter(int, _COUNT_OR_NONE, many=True), "snapshots evaluate_at"),
    (Parameter(int, "[1, 100]"), "beams"),
    (Parameter(int, "[2, 1_000]"), "depth"),
    (Parameter(int, "[2, 1_000]", many=True), "depths"),
    (Parameter(int, "[2, 100_000]", many=True), "stacks"),
    (Parameter(int, "[3, 1_000_000]"), "length max_length decoder_length"),
    (
        Parameter(float, _POSITIVE),
        "init_scale depth2_init_scale product_scale step_size depth2_step_size step_fraction"
        " learning_rate inner_learning_rate control_learning_rate inner_control_rate measure_seconds budget_seconds"
        " small_init_scale long_step_size head_rate",
    ),
    (
        Parameter(float, _POSITIVE, many=True),
        "init_scales step_sizes step_fractions deep_rates lora_rates"
        " full_rates plus_rates galore_rates relora_rates"
        " learning_rates"
        " layer_scales tail_exponents"
        " adam_rates rate_factors noisy_factors",
    ),
    (Parameter(float, "[0, 10]"), "tolerance"),
    (Parameter(float, _NOT_NEGATIVE), "outer_ratio ridge weight_decay noise_ratio"),
    (Parameter(float, _NOT_NEGATIVE, many=True), "outer_ratios noise_ratios skews ridges weight_decays"),
    (Parameter(float, "(0, 1]"), "observed large_observed smallest_value keep_rate single_keep_rate"),
    (Parameter(float, "(0, 1]", many=True), "keep_rates strengths"),
    (Parameter(float, "(0, 1)"), "validation_fraction"),
    (Parameter(float, "(1, inf)"), "step_factor"),
    (Parameter(float, "[0, 1)"), "momentum"),
    (Parameter(float, "[0, 1)", many=True), "wrong_shares"),
    (Parameter(float, "[0, 1]"), "decay_ratio"),
    (Parameter(float, "[0, 1)", many=True), "mask_rates"),
    (Parameter(bool), "compiled"),
    (Parameter(str, r"[a-z][a-z0-9_-]{0,99}"), "preset"),
    (Parameter(str, r"auto|cpu|cuda(:\d+)?"), "device"),
    (Parameter(str, "one|all"), "devices"),
    (Parameter(str, "float64|float32", many=True), "precisions"),
    (Parameter(str, _PRECISIONS), "precision"),
    (Parameter(str, _PRECISIONS, many=True), "tuning_precisions"),
    (Parameter(str, r"[\w./-]+"), "encoder language_model"),
    (Parameter(str, r"bert-base|[A-Za-z0-9][\w./-]*", many=True), "encoders"),
    (Parameter(str, r"[a-z][a-z0-9.-]*", many=True), "decoders"),
    (Parameter(str, r"deep-linear|mlp|vgg|vit|resnet", many=True), "networks"),
    (Parameter(str, r"[a-z0-9-]+"), "task"),
    (Parameter(str, r"[a-z0-9-]+", many=True), "tasks"),
    (
        Parameter(
            str,
            r"paper|standard|full|thin|compressed|slower|rslora|plus|pissa|lora_ga|dora|even|gradient|random",
            many=True,
        ),
        "methods",
    ),
    (Parameter(str, r"mlp|digits-resnet|resnet|vgg|gcn|gcn-16", many=True), "architectures"),
    (Parameter(str, "authors|clean"), "protocol"),
    (Parameter(str, r"[\w.-]+", many=True), "matrices"),
    (Parameter(str, r"movielens-[a-z0-9-]+", many=True), "tables"),
    (Parameter(str, r"auto|u[1-5]|seed\d+", many=True), "splits"),
)
VOCABULARY = {name: entry for entry, names in _NAMES for name in names.split()}
assert len(VOCABULARY) == sum(len(names.split()) for _, names in _NAMES), "a name stands twice in _NAMES"

AT_MOST = (
    ("inner_width", ("width",)),
    ("heads", ("width",)),
    ("tuning_steps", ("steps",)),
    ("record_every", ("steps",)),
    ("rank", ("dimension", "dimensions", "large_dimension", "sparse_dimension", "users", "items", "width", "widths")),
    ("ranks", ("dimension", "dimensions", "users", "items", "width", "widths")),
    ("inner_widths", ("dimension", "dimensions", "users", "items")),
    ("guess", ("dimension", "dimensions", "users", "items")),
    ("rank_guesses", ("dimension", "dimensions", "users", "items")),
    ("batch_size", ("few_rows",)),
)
SHARES = (("observed", "dimension"), ("large_observed", "large_dimension"))  # of d x d entries, one at least
# Each value of a list is a curve or a column of its own, but in these, which go along with another list.
ALONGSIDE = {"dimensions", "step_sizes", "step_counts", "seed_counts", "tuning_counts", "init_scales", "layer_scales"}
EVEN = ("adapter_rank",)  # a compressed adapter holds r / 2 directions a side


def collect(namespace: MutableMapping[str, Any]) -> dict[str, Any]:
    """The validated parameters among a notebook's globals: every public name that holds a plain value.

    A plain value is an int, float, str, bool, list or tuple, so a name that was injected by mistake is
    refused too, as is one that other notebooks have and this one's cell does not declare. Raises ParameterError.
    When the cell is run again in the same kernel, plain values that later cells left behind do not count: only the
    names that the cell of parameters has by then, and those of a cell run just before that does nothing but set some.
    """
    cells = namespace.get("In", [])
    declared = parameter_cells.declared(cells[:-1])
    names = {
        name
        for name, value in namespace.items()
        if not name.startswith("_") and name not in _IPYTHON and isinstance(value, _PLAIN)
    }
    if "_parameter_names" in namespace:
        names &= (declared or namespace["_parameter_names"]) | parameter_cells.set_plainly("".join(cells[-2:-1]))
    namespace["_parameter_names"] = names & VOCABULARY.keys()
    values = validate({name: value for name, value in namespace.items() if name in names})
    return validate(values, declared) if declared else values


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


_PLAIN = (int, float, str, bool, list, tuple, np.generic)
_IPYTHON = {"In", "Out"}


def _checked(name: str, value: Any, known: Iterable[str]) -> Any:
    if name not in known:
        raise ParameterError(f"{name}: got {shown(value)}, expected a known name{closest(name, known)}")
    if name not in VOCABULARY:
        raise ParameterError(f"{name}: got {shown(value)}, expected a name of the vocabulary in parameters.py")
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
    return entry.kind is bool or _inside(value, entry.allowed)  # which no NaN and no infinity is


def _inside(value: float, interval: str) -> bool:
    low, high = (float(end) for end in interval[1:-1].split(","))
    above = value >= low if interval[0] == "[" else value > low
    return above and (value <= high if interval[-1] == "]" else value < high)


def _refusal(name: str, value: Any, entry: Parameter) -> ParameterError:
    return ParameterError(f"{name}: got {shown(value)} ({type(value).__name__}), expected {entry.expected()}")


def _impossible(values: Mapping[str, Any]) -> list[str]:
    """What is valid alone and not together: a rank above the dimension, no entry observed, a value twice in a list."""
    odd = [name for name in EVEN if values.get(name, 0) % 2]
    problems = [f"{name}: got {values[name]!r}, expected an even integer" for name in odd]
    for name, value in values.items():
        if isinstance(value, list) and name not in ALONGSIDE and len(set(value)) < len(value):
            problems.append(f"{name}: got {shown(value)}, expected each value once")
    for share, side in SHARES:
        if share in values and side in values and values[share] * values[side] ** 2 + 1e-9 < 1:
            entries = f"{side} = {values[side]}, {values[side] ** 2} entries"
            problems.append(f"{share}: got {values[share]!r}, expected at least one entry of {entries}")
    for small, larger in AT_MOST:
        for large in larger:
            if small in values and large in values and _top(values[small]) > _bottom(values[large]):
                limit = f"{large} = {shown(values[large])}"
                problems.append(f"{small}: got {shown(values[small])}, expected at most {limit}")
    return problems


def _top(value: Any) -> Any:
    return max(value) if isinstance(value, list) else value


def _bottom(value: Any) -> Any:
    return min(value) if isinstance(value, list) else value
