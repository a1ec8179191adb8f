"""Pages of the library's reference, one for each room, whose text Sphinx takes from the docstrings."""

from __future__ import annotations

import inspect
from types import ModuleType
from typing import Any

ROOMS = {
    "recovery": "Problems, factors and compression",
    "descent": "Gradient descent",
    "adapters": "Deep LoRA, a method of peft",
    "finetuning": "Fine-tuning",
    "networks": "Compressed layers in networks",
    "data": "Data and pretrained models",
    "experiments": "Protocols",
    "companion": "Runs, parameters, figures, claims",
}


def pages() -> dict[str, str]:
    """The markdown of each page by its place: api/index.md, then one for each room of the public names."""
    import compressible

    found = {name: getattr(compressible, name) for name in compressible.__all__}
    rooms = {room: {name: each for name, each in found.items() if _room(each) == room} for room in ROOMS}
    texts = {f"api/{room}.md": _page(ROOMS[room], members) for room, members in rooms.items() if members}
    return {"api/index.md": _index(rooms)} | texts


def _index(rooms: dict[str, dict[str, Any]]) -> str:
    parts = ["# Reference", "`import compressible as cd` gives these names; `cd.spectra` and its like are modules."]
    for room, members in rooms.items():
        names = "\n".join(f"   {_address(name, each)}" for name, each in members.items())
        parts += [f"## [{ROOMS[room]}]({room}.md)", _rst(f".. autosummary::\n\n{names}")] if members else []
    return "\n\n".join(
        [*parts, "```{toctree}\n:hidden:\n\n" + "\n".join(room for room in rooms if rooms[room]) + "\n```"]
    )


def _page(title: str, members: dict[str, Any]) -> str:
    known: set[int] = {id(each) for each in members.values()}
    return "\n\n".join([f"# {title}", *(_section(name, each, known) for name, each in members.items())])


def _section(name: str, each: Any, known: set[int]) -> str:
    text = _module(each, known) if isinstance(each, ModuleType) else _object(name, each)
    return f"## cd.{name}\n\n{_rst(text)}"


def _object(name: str, each: Any) -> str:
    kind, members = ("class", "\n   :members:") if inspect.isclass(each) else ("function", "")
    return f".. auto{kind}:: {_address(name, each)}{members}"


def _module(module: ModuleType, known: set[int]) -> str:
    """A module with what it offers, but for what the page has already: two modules may offer one thing."""
    offered = {name: getattr(module, name) for name in getattr(module, "__all__", vars(module)) if name[0] != "_"}
    own = {name: each for name, each in offered.items() if _is_documented(module, each) and id(each) not in known}
    known.update(map(id, own.values()))
    return f".. automodule:: {module.__name__}\n   :members: {', '.join(own)}\n   :imported-members:"


def _is_documented(module: ModuleType, each: Any) -> bool:
    mine = hasattr(module, "__all__") or getattr(each, "__module__", "") == module.__name__
    return mine and (inspect.isclass(each) or inspect.isfunction(each))


def _address(name: str, each: Any) -> str:
    return each.__name__ if isinstance(each, ModuleType) else f"compressible.{name}"


def _room(each: Any) -> str:
    module = each.__name__ if isinstance(each, ModuleType) else each.__module__
    return module.split(".")[1]


def _rst(text: str) -> str:
    return f"```{{eval-rst}}\n{text}\n```"
