"""Errors that say what came and what was expected, each way once."""

from __future__ import annotations

import difflib
import math
import reprlib
from collections.abc import Iterable, Mapping
from numbers import Integral, Real
from typing import Any

_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxlist, _SHORT.maxtuple, _SHORT.maxdict, _SHORT.maxset = 4, 40, 40, 40, 40
_SHORT.maxstring = _SHORT.maxlong = _SHORT.maxother = 120


def expect(name: str, value: object, holds: bool, expected: str) -> None:
    """Raise ValueError, with the value and what was expected, unless `holds`."""
    if not holds:
        raise ValueError(f"{name} is {value!r}, expected {expected}")


def is_integer(value: object, numpys: bool = True) -> bool:
    """Whether a value is an integer, of numpy, too, unless it goes to a file as it is; truth values are none."""
    return isinstance(value, Integral if numpys else int) and not isinstance(value, bool)


def expect_integer(name: str, value: object, least: int, most: float = math.inf, told: str = "") -> int:
    """Return an integer, of numpy, too, as Python's; ValueError unless it is one from `least` to `most`."""
    ends = f" >= {least}" if most == math.inf else f" from {least} to {most:g}"
    inside = is_integer(value) and least <= int(value) <= most  # type: ignore[call-overload]
    expect(name, value, inside, told or f"an integer{ends}")
    return int(value)  # type: ignore[call-overload]


def expect_shape(shape: object) -> tuple[int, int]:
    """Return (m, n), of numpy, too, as Python's integers; ValueError unless it is two integers >= 1."""
    sizes = tuple(shape) if isinstance(shape, Iterable) and not isinstance(shape, str) else ()
    expect("shape", shape, len(sizes) == 2, "two integers (m, n)")
    m, n = (expect_integer(f"size {at} of shape", size, 1) for at, size in enumerate(sizes))
    return m, n


def is_number(value: object, above: float = -math.inf) -> bool:
    """Whether a value is a finite number above `above`; text and truth values are none."""
    return isinstance(value, Real) and not isinstance(value, bool) and above < float(value) < math.inf


def expect_generator(generator: object) -> None:
    """Raise ValueError unless it is a torch.Generator or None; known by its methods, without PyTorch."""
    holds = generator is None or (hasattr(generator, "initial_seed") and hasattr(generator, "get_state"))
    expect("generator", generator, holds, "a torch.Generator, torch.Generator().manual_seed(0) for one, or None")


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
