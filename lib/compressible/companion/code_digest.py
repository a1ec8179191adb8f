"""What a cached function is: its source, and all that it reads from outside itself.

Functions of the user's own modules count with their sources and, in turn, with what those read. Plain values, and
lists, dicts and configurations of them, count by content; what an installed package holds counts by name. Anything
else (a model, a tensor, an object of the user's own class) cannot be told from another of its kind, and a result found
under the wrong key would be another run's: it is refused, unless `reads` says what tells it.
"""

from __future__ import annotations

import dataclasses
import dis
import hashlib
import inspect
import pydoc
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping
from types import CodeType, FunctionType, ModuleType
from typing import Any

import numpy as np
import torch

from compressible.companion.library import normal_form

_PLAIN = (bool, int, float, complex, str, bytes, type(None), range, np.generic, torch.dtype, torch.device)
_GLOBAL = {"LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS"}
_KNOWN = {"compressible", *sys.stdlib_module_names} - {"__main__"}


def source_digest(
    function: Callable[..., Any], reads: Mapping[str, str] | None = None, versions: Mapping[str, str] | None = None
) -> str:
    """sha256 of a function's source and of what it and the functions it reaches read from outside themselves.

    Comments, blank lines and docstrings do not count. `versions` gives the digest as it was with other packages: a
    configuration of peft's holds the version that made it. Raises TypeError when nothing tells a value that is read.
    """
    told = _Told(dict(reads or {}), dict(versions or {}))
    parts = sorted(_parts(function.__qualname__, function, "", told, set()))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


@dataclasses.dataclass(frozen=True)
class _Told:
    """What the caller tells of values that are read, and of packages."""

    reads: dict[str, str]
    versions: dict[str, str]

    def field(self, key: str, value: Any) -> Any:
        """The value of a configuration's field, or the version of the package that the field is named after."""
        return self.versions.get(key.removesuffix("_version"), value) if key.endswith("_version") else value


def _parts(name: str, value: Any, reader: str, told: _Told, seen: set[int]) -> Iterator[str]:
    """What tells a value from any other that `reader` might find under that name."""
    kind, inside = type(value).__qualname__, list[tuple[str, Any]]()
    code = value if _by_name(value) else inspect.unwrap(value, stop=_is_users)
    if name in told.reads:
        kind = f"told {told.reads[name]!r}"
    elif _by_name(value):
        kind = f"is {getattr(value, '__module__', '')}.{getattr(value, '__qualname__', value.__name__)}"
    elif isinstance(code, FunctionType):
        source = inspect.getsource(code.__code__)  # of a wrapped function that of its wrapper
        kind, reader = f"is {code.__qualname__}: {normal_form(textwrap.dedent(source))}", code.__qualname__
        inside = [] if id(code) in seen else [*_read(code)]
        seen.add(id(code))
    elif isinstance(value, list | tuple | set | frozenset | dict):
        items = sorted(value, key=repr) if isinstance(value, set | frozenset) else value
        inside = [(f"{name}[{k}]", item) for k, item in enumerate(value.items() if isinstance(value, dict) else items)]
    elif dataclasses.is_dataclass(value) and _by_name(type(value)) and not isinstance(value, type):
        inside = [(f"{name}.{key}", told.field(key, item)) for key, item in vars(value).items()]
    elif isinstance(value, _PLAIN):
        kind = f"= {value!r}"
    else:
        raise TypeError(
            f"{reader} reads {name}, a {kind}, from outside itself, and cannot be cached: nothing tells that {name} "
            f"from another. Make it inside {reader} from parameters, let it be plain values (numbers, text, lists), "
            "say what tells it in `reads`, or run with cache=False"
        )
    yield f"{name} {kind} {len(inside)}"
    for key, item in inside:
        yield from _parts(key, item, reader, told, seen)


def _read(function: FunctionType) -> Iterator[tuple[str, Any]]:
    """Names that a function reads from outside itself, and its defaults, with their present values."""
    names = {name for name in _names(function.__code__) if name in function.__globals__}
    yield from ((name, function.__globals__[name]) for name in names)
    yield from inspect.getclosurevars(function).nonlocals.items()
    yield from ((f"default {k}", value) for k, value in enumerate(function.__defaults__ or ()))
    yield from (function.__kwdefaults__ or {}).items()


def _names(code: CodeType) -> Iterator[str]:
    yield from (step.argval for step in dis.get_instructions(code) if step.opname in _GLOBAL)
    for inner in code.co_consts:
        yield from _names(inner) if isinstance(inner, CodeType) else ()


def _is_users(value: Any) -> bool:
    return isinstance(value, FunctionType) and not _installed(value.__globals__.get("__name__"))


def _by_name(value: Any) -> bool:
    """Whether a value is a module, function or class that an installed package has under its own name."""
    if isinstance(value, ModuleType):
        return _installed(value.__name__)
    module, name = (getattr(value, key, None) for key in ("__module__", "__qualname__"))
    return _installed(module) and pydoc.locate(f"{module}.{name}") is value


def _installed(module: str | None) -> bool:
    """Whether a module belongs to Python, to an installed package or to this library."""
    top = (module or "").partition(".")[0]
    spec = getattr(sys.modules.get(top), "__spec__", None)
    return top in _KNOWN or "-packages" in (getattr(spec, "origin", None) or "")
