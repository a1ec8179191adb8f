"""Whether two networks are alike in all but the values of their parameters and buffers, so that one's pass is both's.

A dropout rate, an activation, a frozen layer or a hook is no tensor of the state, and may sit in any attribute of any
module. So both are walked side by side through all that Python can say of an object: its attributes and items, the code
and the closure of a function, or else what pickle would keep. What cannot be looked into counts as different.
"""

from __future__ import annotations

import types
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.utils.hooks import RemovableHandle

from compressible.runtime.checks import shown

EXACT = (bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size)
HOOKS = frozenset(name for name in vars(nn.Module()) if name.endswith("hooks"))  # by numbers that no two models share
MARKED = {  # hooks that are called in another way, by the same numbers
    "_forward_hooks_with_kwargs": "_forward_hooks",
    "_forward_hooks_always_called": "_forward_hooks",
    "_forward_pre_hooks_with_kwargs": "_forward_pre_hooks",
}
RENEWED = ("_flat_weights", "_flat_weight_refs")
OF_CLASSES = {"__dict__", "__weakref__", "__doc__", "_abc_impl", "__firstlineno__", "__static_attributes__"}
BY_PYTHON = 1 << 9  # a class's flag, Py_TPFLAGS_HEAPTYPE: by a class statement, or by a call of type
NOTHING = type("Nothing", (), {"__repr__": lambda self: "nothing"})()  # where one of two has no such part
SHARED = "is in several places of one of the two models alone"
Parts = Iterable[tuple[str, Any, Any]]  # what it is, of the first, of the second


def first_difference(first: nn.Module, second: nn.Module) -> str:
    """Return where and how the second model differs from the first, "body.dropout0.p is 0.8, not 0.0"; "" if nowhere.

    Values of registered parameters and buffers may differ, and their devices.
    """
    try:
        return _Walk(first).look("", first, second)
    except RecursionError:
        return "it nests deeper than can be looked into"


class _Walk:
    """What has been met on the way; `look` returns the first difference, or ""."""

    def __init__(self, first: nn.Module) -> None:
        self.registered = {id(module) for module in first.modules()}
        self.met: dict[tuple[int, int], tuple[Any, Any]] = {}  # kept, so that no other object gets their ids
        self.there: dict[int, Any] = {}
        self.back: dict[int, Any] = {}

    def look(self, where: str, one: Any, other: Any) -> str:
        """Compare two objects and all that is in them."""
        module = isinstance(one, nn.Module)
        if one is other and not module:
            return ""
        if one is NOTHING or other is NOTHING:
            return _told(where, one, other)
        if isinstance(one, EXACT) and type(one) is type(other):
            return "" if repr(one) == repr(other) else _told(where, one, other)
        if module and not self._paired(one, other):
            return f"{_named(where)} {SHARED}"
        if (id(one), id(other)) in self.met:
            return ""
        self.met[id(one), id(other)] = one, other
        try:
            for part in self._parts(where, one, other):
                if found := self.look(*part):
                    return found
        except RecursionError:
            raise
        except Exception as told:  # an object that does not say what it holds, or _Differ
            return (isinstance(told, _Differ) and str(told)) or _told(where, one, other)
        return ""

    def _paired(self, one: Any, other: Any) -> bool:
        """Whether what is one object in a model, maybe in several places, is one in the other."""
        return self.there.setdefault(id(one), other) is other and self.back.setdefault(id(other), one) is one

    def _parts(self, where: str, one: Any, other: Any) -> Parts:
        """What must be alike for two objects to be so; _Differ where they cannot be."""
        if isinstance(one, type):
            yield from _of_classes(where, one, other)
            return
        if type(one) is not type(other):
            yield f"the type of {_named(where)}", _kind(one), _kind(other)
        yield from self._of_modules(where, one, other) if isinstance(one, nn.Module) else _of_objects(where, one, other)

    def _of_modules(self, where: str, one: nn.Module, other: nn.Module) -> Parts:
        mine, theirs = dict(vars(one)), dict(vars(other))
        for name in (*MARKED, *HOOKS, "_non_persistent_buffers_set"):
            if not mine[name] and not theirs[name]:  # nearly always
                del mine[name], theirs[name]
            elif name in MARKED:
                mine[name], theirs[name] = ([at in vars(m)[name] for at in vars(m)[MARKED[name]]] for m in (one, other))
            elif name in HOOKS:
                mine[name], theirs[name] = list(mine[name].values()), list(theirs[name].values())
        if isinstance(one, nn.RNNBase):  # which renews them where a parameter is set, as a stacked pass does
            mine, theirs = ({name: held[name] for name in held if name not in RENEWED} for held in (mine, theirs))
        if id(one) in self.registered:
            for kind in ("_parameters", "_buffers"):
                yield from self._of_state(where, mine.pop(kind), theirs.pop(kind))
        for name in ("_parameters", "_buffers", "_modules"):
            yield from _items(mine.pop(name, {}), theirs.pop(name, {}), where, _inside)
        yield from _items(dict(sorted(mine.items())), dict(sorted(theirs.items())), where, _inside)

    def _of_state(self, where: str, mine: dict[str, Tensor | None], theirs: dict[str, Tensor | None]) -> Parts:
        """All of registered tensors but their values: names, what they are, and which is another's, too."""
        for at, one, other in _items(mine, theirs, where, _inside):
            if not isinstance(one, Tensor) or not isinstance(other, Tensor):
                yield at, one, other
                continue
            for what in ("requires_grad", "dtype", "shape", "layout", "__class__"):
                if (value := getattr(one, what)) != getattr(other, what):
                    yield f"{what.strip('_')} of {at}", value, getattr(other, what)
            if not self._paired(one, other):
                raise _Differ(f"{at} {SHARED}")


class _Differ(Exception):
    """Two objects that have no parts by which they could be alike."""


def _of_objects(where: str, one: Any, other: Any) -> Parts:
    if isinstance(one, RemovableHandle):  # it holds a hook's number; the hook itself is looked at in its module
        return []
    if isinstance(one, Tensor):  # in no module's state: the first one's would be taken for all
        same = one.device == other.device and one.dtype == other.dtype and torch.equal(one, other)
        return _agree(same and not one.requires_grad and not other.requires_grad)
    if isinstance(one, types.FunctionType):
        _agree(one.__globals__ is other.__globals__ and one.__code__ == other.__code__)
        told = ("__defaults__", "__kwdefaults__", "__dict__")
        parts = [(f"{name} of {where}", getattr(one, name), getattr(other, name)) for name in told]
        cells = zip(one.__code__.co_freevars, one.__closure__ or (), other.__closure__ or (), strict=True)
        return [*parts, *((f"{name} of {where}", mine, theirs) for name, mine, theirs in cells)]
    if isinstance(one, types.MethodType):
        return [(where, one.__func__, other.__func__), (where, one.__self__, other.__self__)]
    if isinstance(one, types.CellType):
        return [(where, one.cell_contents, other.cell_contents)]
    if isinstance(one, (staticmethod, classmethod)):
        return [(where, one.__func__, other.__func__)]
    if isinstance(one, property):
        return [(where, getattr(one, part), getattr(other, part)) for part in ("fget", "fset", "fdel")]
    if isinstance(one, weakref.ref):
        return [(where, one(), other())]
    if type(one) in (dict, types.MappingProxyType):
        return _items(one, other, where)
    if type(one) in (list, tuple):
        return _items(dict(enumerate(one)), dict(enumerate(other)), where)
    if type(one) in (set, frozenset):
        return _agree(one == other)
    return _of_pickles(where, one, other)


def _of_pickles(where: str, one: Any, other: Any) -> Parts:
    """What pickle would keep of an object: how it is made, of what, its attributes and its items."""
    mine, theirs = one.__reduce_ex__(4), other.__reduce_ex__(4)
    if isinstance(mine, str):  # the name of something that is not made anew
        return _agree(one == other)
    lists = [[list(part) if isinstance(part, Iterator) else part for part in kept] for kept in (mine, theirs)]
    return [(where, part, match) for part, match in zip_longest(*lists, fillvalue=NOTHING)]


def _kind(one: Any) -> Any:
    """An object's class; of a parametrised module that before, as PyTorch makes one for each of them."""
    return type(one).__bases__ if isinstance(one, nn.Module) and is_parametrized(one) else type(one)


def _of_classes(where: str, one: type, other: Any) -> Parts:
    """Classes that the same text made twice, in a function."""
    made = isinstance(other, type) and one.__flags__ & other.__flags__ & BY_PYTHON
    yield from _agree(bool(made) and (one.__module__, one.__qualname__) == (other.__module__, other.__qualname__))
    yield where, one.__bases__, other.__bases__
    mine, theirs = ({name: vars(kind)[name] for name in sorted({*vars(kind)} - OF_CLASSES)} for kind in (one, other))
    yield from _items(mine, theirs, where, _inside)


def _agree(holds: bool) -> Parts:
    if not holds:
        raise _Differ
    return []


def _items(
    mine: Mapping[Any, Any], theirs: Mapping[Any, Any], where: str, at: Callable[[str, Any], str] = "{}[{!r}]".format
) -> Parts:
    """Values by their keys, and the order of these, which a Sequential's modules are called in."""
    for key in [*mine, *(key for key in theirs if key not in mine)]:
        one, other = mine.get(key, NOTHING), theirs.get(key, NOTHING)
        if one is not other or isinstance(one, (nn.Module, Tensor)):
            yield at(where, key), one, other
    if list(mine) != list(theirs):
        raise _Differ(f"the order of {_named(where)} is {shown(list(theirs))}, not {shown(list(mine))}")


def _inside(where: str, name: str) -> str:
    return f"{where}.{name}".lstrip(".")


def _named(where: str) -> str:
    return where or "the model"


def _told(where: str, one: Any, other: Any) -> str:
    return f"{_named(where)} is {shown(other)}, not {shown(one)}"
