"""Errors that say what came and what was expected, each way once."""

from __future__ import annotations

import difflib
import math
import re
import reprlib
from collections.abc import Iterable, Mapping, Set
from importlib import metadata
from numbers import Integral, Real
from typing import Any

LONG = 400  # characters up to which an error shows a value as it is


class _Short(reprlib.Repr):
    """Python's, which tells of arrays and tensors in lists what they are."""

    def repr_instance(self, value: Any, level: int) -> str:
        return _array(value) or super().repr_instance(value, level)


_SHORT = _Short()
_SHORT.maxlevel, _SHORT.maxlist, _SHORT.maxtuple, _SHORT.maxdict, _SHORT.maxset = 4, 40, 40, 40, 40
_SHORT.maxstring = _SHORT.maxlong = _SHORT.maxother = 120


def expect(name: str, value: object, holds: bool, expected: str) -> None:
    """Raise ValueError, with the value and what was expected, unless `holds`."""
    if not holds:
        raise ValueError(f"{name} is {_as_told(value)}, expected {expected}")


def is_integer(value: object, numpys: bool = True) -> bool:
    """Whether a value is an integer, of numpy, too, unless it goes to a file as it is; truth values are none."""
    return isinstance(value, Integral if numpys else int) and not isinstance(value, bool)


def expect_integer(name: str, value: object, least: int, most: float = math.inf, told: str = "") -> int:
    """Return an integer, of numpy, too, as Python's; ValueError unless it is one from `least` to `most`."""
    ends = f" >= {least}" if most == math.inf else f" from {least} to {most:g}"
    inside = is_integer(value) and least <= int(value) <= most  # type: ignore[call-overload]
    expect(name, value, inside, told or f"an integer{ends}")
    return int(value)  # type: ignore[call-overload]


def expect_sizes(name: str, value: object, expected: str, count: int | None = None, least: int = 1) -> tuple[int, ...]:
    """Return several integers >= `least`, of numpy, too, as Python's; `count` of them where that is given."""
    unordered = isinstance(value, (str, bytes, Mapping, Set)) or hasattr(value, "layout")  # a tensor's are no integers
    listed = isinstance(value, Iterable) and not unordered and getattr(value, "ndim", 1) == 1
    sizes = tuple(value) if listed and isinstance(value, Iterable) else ()
    expect(name, value, listed and count in (None, len(sizes)), expected)
    return tuple(expect_integer(f"size {at} of {name}", size, least) for at, size in enumerate(sizes))


def expect_shape(shape: object) -> tuple[int, int]:
    """Return (m, n), of numpy, too, as Python's integers; ValueError unless it is two integers >= 1."""
    m, n = expect_sizes("shape", shape, "two integers (m, n)", 2)
    return m, n


def expect_batch_shape(shape: object) -> tuple[int, ...]:
    """Return the leading dimensions of a stack as Python's integers; ValueError unless all are integers >= 1."""
    return expect_sizes("batch_shape", shape, "a tuple of integers, () for one problem")


def expect_function(name: str, value: object, expected: str) -> None:
    """Raise ValueError unless it can be called; a class, which makes another object, is no function."""
    expect(name, value, callable(value) and not isinstance(value, type), expected)


def expect_iterations(name: str, value: Any, most: int, expected: str) -> set[int]:
    """Return iterations, of numpy and torch, too, as Python's integers; ValueError unless all are from 0 to `most`."""
    try:
        listed = value.tolist() if hasattr(value, "tolist") else value
    except (RuntimeError, TypeError, NotImplementedError):  # a tensor that holds no numbers, or not in a row
        listed = None
    text = isinstance(listed, (str, bytes, Mapping))
    marks: list[Any] = list(listed) if isinstance(listed, Iterable) and not text else [None]
    expect(name, value, all(is_integer(mark) and 0 <= mark <= most for mark in marks), expected)
    return set(map(int, marks))


def is_number(value: object, above: float = -math.inf) -> bool:
    """Whether a value is a finite number above `above`; text and truth values are none."""
    if not isinstance(value, Real) or isinstance(value, bool):
        return False
    try:
        return above < float(value) < math.inf
    except OverflowError:  # an integer beyond all floats
        return False


def expect_number(name: str, value: Any, expected: str, above: float = -math.inf, least: float = -math.inf) -> float:
    """Return a finite number > `above` and >= `least`, of numpy, too, as Python's; ValueError for another."""
    expect(name, value, is_number(value, above) and float(value) >= least, expected)
    return float(value)


def expect_flag(name: str, value: object) -> bool:
    """Return a truth value, of numpy, too, as Python's; ValueError for anything else."""
    expect(name, value, type(value).__name__ in ("bool", "bool_"), "True or False")
    return bool(value)


def expect_one_of(name: str, value: object, known: Iterable[str], expected: str = "") -> None:
    """Raise ValueError unless a value is one of the names."""
    known = tuple(known)
    expect(name, value, isinstance(value, str) and value in known, expected or f"one of {', '.join(known)}")


def expect_generator(generator: Any) -> None:
    """Raise ValueError unless it is a torch.Generator of the CPU or None; known by its methods, without PyTorch."""
    methods = hasattr(generator, "initial_seed") and hasattr(generator, "get_state") and hasattr(generator, "device")
    told = "a torch.Generator on the CPU, torch.Generator().manual_seed(0) for one, or None"
    holds = methods and not isinstance(generator, type) and str(generator.device) == "cpu"
    expect("generator", generator, generator is None or holds, told)


def names(name: str, value: Any, expected: str) -> Any:
    """Return several names as a set, a string or None as it is; ValueError for anything else."""
    if value is None or isinstance(value, str):
        return value
    known = isinstance(value, Iterable) and not isinstance(value, Mapping) and all(isinstance(v, str) for v in value)
    expect(name, value, known, expected)
    return set(value)


def unknown(kind: str, name: object, known: Iterable[str]) -> str:
    """The message for a name that is none of `known`, with the closest that is."""
    return f"unknown {kind} {name!r}{closest(name, known)}"


def closest(name: object, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: the closest known one, or all of them where none is near."""
    known = sorted(known)
    found, listed = difflib.get_close_matches(str(name).lower(), known, n=1, cutoff=0.5), ", ".join(known)
    if not found:
        return f"; known are {listed or 'none'}"
    return f"; the closest is {found[0]!r}{f' of {listed}' if len(known) <= 10 else ''}"


def mistake(found: Mapping[str, Any]) -> str:
    """One of pydantic's errors in a line: where it is, what came and what was expected."""
    where, told = ".".join(map(str, found["loc"])), str(found["msg"]).removeprefix("Value error, ")
    if found["type"] == "missing":
        return f"missing {where!r}"
    if found["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"unknown key {where!r}"
    told = told.replace("Input should be", "expected").replace("String should", "expected to")
    return f"{where}: got {found['input']!r}, {told}" if where else told


def _as_told(value: Any) -> str:
    """A value's own text where that is short; arrays and tensors of more than a few numbers by shape and type."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if array := _array(value):
        return array
    try:
        text = repr(value)
    except Exception:  # an integer of too many digits, a nested tensor of none
        text = shown(value)
    text = text if len(text) <= LONG else shown(value)
    return text if len(text) <= LONG else f"{text[:LONG]}..."


def _array(value: Any) -> str:
    """What an array or tensor of more than a few numbers is, by shape and type; empty for anything else."""
    sizes, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
    if not isinstance(sizes, tuple) or dtype is None or (len(sizes) < 2 and math.prod(sizes) <= 8):
        return ""
    return f"{type(value).__name__} of shape {tuple(sizes)} and {dtype}"


def requirement(text: str) -> str:
    """Return a requirement such as "transformers>=5.18"; ValueError unless it is one as pip has it."""
    from packaging.requirements import InvalidRequirement, Requirement  # which a host of the core alone may lack

    try:
        Requirement(text)
    except InvalidRequirement:
        raise ValueError(f"{text!r}, expected a requirement as pip has it, such as 'numpy>=2'") from None
    return text


def unmet(text: str) -> str:
    """The package and version that is installed and that a requirement excludes; "" where it is met, or none is."""
    from packaging.requirements import Requirement

    asked = Requirement(text)
    try:
        found = metadata.version(asked.name)
    except metadata.PackageNotFoundError:
        return ""
    return "" if asked.specifier.contains(found, prereleases=True) else f"{asked.name} {found}"


def lacking(error: ModuleNotFoundError) -> str:
    """Which package is not installed, and how to get it where an extra of this one brings it."""
    missing = error.name or ""
    named = re.escape(missing).replace("_", "[_-]")
    try:
        needs = metadata.requires("compressible-dynamics") or []
    except metadata.PackageNotFoundError:  # a copy of the sources that nobody installed
        needs = []
    found = (re.match(rf"{named}\b(?!-).*extra == ['\"](\w+)", need, re.IGNORECASE) for need in needs)
    extra = next((each[1] for each in found if each), "")
    if not missing or not extra:
        return str(error)
    return f"{missing} is not installed: pip install 'compressible-dynamics[{extra}]'"


def shown(value: object) -> str:
    """A value as an error shows it: on one line, shortened, whatever its size and depth."""
    try:
        return _SHORT.repr(value)
    except (ValueError, RecursionError):  # Python writes no integer of more than some 4000 digits
        return f"{'an' if isinstance(value, int) else 'a'} {type(value).__name__} too large to show"


def one_line(error: BaseException, limit: int = 300) -> str:
    """An exception's name and message, shortened, in one line."""
    text = " ".join(str(error).split()) or "no message"
    return f"{type(error).__name__}: {text if len(text) <= limit else text[:limit] + '...'}"
