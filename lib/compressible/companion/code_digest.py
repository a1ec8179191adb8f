"""What a cached function is: its source, and all that it reads from outside itself.

Functions and classes of the user's own modules count with their sources and, in turn, with what those read. Plain
values, lists, tuples, sets, dicts and dataclasses of them count by content; what an installed package holds counts by
name. Anything else (a model, a tensor, an open file) cannot be told from another of its kind and is refused: a result
found under the wrong key would be another run's.
"""

from __future__ import annotations

import dataclasses
import dis
import enum
import hashlib
import inspect
import json
import sys
import textwrap
from collections.abc import Callable, Iterator
from operator import attrgetter
from pathlib import Path, PurePath
from types import CodeType, FunctionType, ModuleType
from typing import Any

import numpy as np
import torch

from compressible.companion.library import normal_form

_PLAIN = (
    bool, int, float, complex, str, bytes, type(None), range, slice, PurePath, np.generic, np.dtype, torch.dtype,
    torch.device,
)  # fmt: skip
_GLOBAL = {"LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS"}


def source_digest(function: Callable[..., Any]) -> str:
    """sha256 of a function's source and of what it and the functions it reaches read from outside themselves.

    Comments, blank lines and docstrings do not count. Raises TypeError when a source is not to be had, or when a value
    that is read has no content to tell it by.
    """
    parts = sorted(_sources(_bare(function), set()))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def notebook_digest(path: Path) -> str | None:
    """sha256 of a notebook's code without comments and outputs; None where there is no such notebook."""
    if not path.is_file():
        return None
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    parts = [normal_form("".join(cell["source"])) for cell in cells if cell["cell_type"] == "code"]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _sources(item: Any, seen: set[int]) -> Iterator[str]:
    if id(item) in seen:
        return
    seen.add(id(item))
    yield f"{item.__qualname__}: {normal_form(_source(item))}"
    if not _installed(getattr(item, "__globals__", {}).get("__name__", item.__module__)):
        for name, value in _members(item) if isinstance(item, type) else _used(item):
            yield from _content(name, value, item, seen)


def _content(name: str, value: Any, reader: Any, seen: set[int]) -> Iterator[str]:
    """What tells a value from any other that `reader` might find under that name."""
    value = _bare(value)
    if _known_by_name(value):
        yield f"{name} is {getattr(value, '__module__', '')}.{getattr(value, '__qualname__', value.__name__)}"
    elif isinstance(value, FunctionType | type):
        yield f"{name} is {value.__qualname__}"
        yield from _sources(value, seen)
    elif isinstance(value, _PLAIN):
        yield f"{name} = {value!r}"
    else:
        yield f"{name}: {type(value).__qualname__}"
        for part, inside in _parts(name, value, reader):
            yield from _content(part, inside, reader, seen)


def _parts(name: str, value: Any, reader: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, enum.Enum):
        yield from ((f"{name} of", type(value)), (f"{name}.name", value.name))
    elif dataclasses.is_dataclass(value):
        yield f"{name} of", type(value)
        yield from ((f"{name}.{key.name}", getattr(value, key.name)) for key in dataclasses.fields(value))
    elif type(value) in (list, tuple, dict, set, frozenset):
        items = value.items() if type(value) is dict else value
        ordered = sorted(value, key=repr) if type(value) in (set, frozenset) else items
        yield f"number in {name}", len(value)
        yield from ((f"{name}[{number}]", inside) for number, inside in enumerate(ordered))
    else:
        raise TypeError(
            f"{reader.__name__} reads {name}, a {type(value).__qualname__}, from outside itself, and cannot be "
            f"cached: nothing tells that {name} from another. Make it inside {reader.__name__} from parameters, "
            "let it be plain values (numbers, text, lists, dataclasses), or run with cache=False"
        )


def _bare(value: Any) -> Any:
    """A function without the wrappers of installed packages, such as those of torch.no_grad and functools.cache."""
    home = getattr(value, "__globals__", {}).get("__name__", type(value).__module__)
    inside = getattr(value, "__wrapped__", None)
    return _bare(inside) if isinstance(inside, FunctionType) and _installed(home) else value


def _known_by_name(value: Any) -> bool:
    """Whether a value is a module, function, class or the like that an installed package has under its own name."""
    if isinstance(value, ModuleType):
        return _installed(value.__name__)
    module, name = (getattr(value, key, None) for key in ("__module__", "__qualname__"))
    name = name or getattr(value, "__name__", None)
    if not isinstance(module, str) or not isinstance(name, str) or not _installed(module):
        return False
    try:
        return attrgetter(name)(sys.modules[module]) is value
    except (AttributeError, KeyError):
        return False


def _installed(module: str | None) -> bool:
    """Whether a module belongs to Python, to an installed package or to this library."""
    top = (module or "").partition(".")[0]
    if top == "__main__":
        return False
    if top in sys.stdlib_module_names or top == "compressible":
        return True
    found = sys.modules.get(top)
    places = [getattr(found, "__file__", None) or "", *map(str, getattr(found, "__path__", ()))]
    return any({"site-packages", "dist-packages"} & {*Path(place).parts} for place in places)


def _used(function: FunctionType) -> Iterator[tuple[str, Any]]:
    """Names that the function reads from outside itself, and its defaults, with their present values."""
    names = {name for name in _names(function.__code__) if name in function.__globals__}
    yield from ((name, function.__globals__[name]) for name in names)
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield name, cell.cell_contents
        except ValueError:  # not assigned yet: the function cannot have read it either
            continue
    yield from ((f"default {number}", value) for number, value in enumerate(function.__defaults__ or ()))
    yield from (function.__kwdefaults__ or {}).items()


def _members(kind: type) -> Iterator[tuple[str, Any]]:
    """Bases and written methods of a class; the rest is what its source says."""
    yield from ((f"base {number}", base) for number, base in enumerate(kind.__bases__))
    for name, value in vars(kind).items():
        method = _bare(getattr(value, "__func__", getattr(value, "fget", value)))
        # What dataclasses write follows from the source of the class.
        if isinstance(method, FunctionType) and method.__code__.co_filename != "<string>":
            yield name, method


def _names(code: CodeType) -> Iterator[str]:
    yield from (step.argval for step in dis.get_instructions(code) if step.opname in _GLOBAL)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _source(item: Any) -> str:
    try:
        return textwrap.dedent(inspect.getsource(getattr(item, "__code__", item)))
    except (OSError, TypeError) as error:
        raise TypeError(f"{item!r}: expected a source in a file or, of a function, a notebook") from error
