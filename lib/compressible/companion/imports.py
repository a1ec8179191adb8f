"""What a source asks to be imported of this library, told from its syntax alone.

Import statements count wherever they stand, in functions, too; so do `cd.NAME` where a notebook says `import
compressible as cd`, `import_module` with a name that is written out, and text that names a module, as for
`when_imported`. Whatever might import something that is not written out cannot be told, and stands for all sources.
What takes a module from `sys.modules`, or a function by its own module's name, finds what is imported already.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

from compressible.companion.library import parsed

PACKAGE = "compressible"
CELLS, MODULE, TOP = "cells", "module", "top"  # kinds of source; the last is the package's own __init__
# By these, other code runs or is imported; the names of the first are methods of other things, too, as model.eval().
_BUILT_IN = frozenset({"exec", "eval", "__import__", "get_ipython", "__builtins__"})
_LOADERS = frozenset({
    "__import__", "run_module", "run_path", "load_module", "resolve_name", "spec_from_file_location",
    "SourceFileLoader",
})  # fmt: skip
_NAMED = re.compile(rf"\b{PACKAGE}(?:\.\w+)+")
_CODE = re.compile(rf"\b(?:import|from) +{PACKAGE}\b")
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


class Asked(NamedTuple):
    """A module that is asked for, as it is written."""

    module: str  # without the dots before it
    name: str = ""  # what is taken from it; "" for itself
    level: int = 0  # dots before it
    how: str = ""  # "own": relative to who asks, as to a package; "text": named in a text, perhaps with more behind it


class _Untold(Exception):
    """What is imported here is not written out."""


@lru_cache(1024)
def asked(source: str, kind: str = MODULE) -> frozenset[Asked] | None:
    """What a source asks for of this library; None where that cannot be told, as of what does not parse."""
    try:
        tree = parsed(source)
        nodes = list(ast.walk(tree))
        _expect_plain(nodes)
        found = [*_statements(nodes), *_attributes(nodes, kind), *_calls(tree, nodes, kind), *_texts(nodes)]
    except (_Untold, SyntaxError, ValueError, RecursionError):
        return None
    return frozenset(found)


def _expect_plain(nodes: list[ast.AST]) -> None:
    """Raise _Untold where a source runs code or loads files by other means, or hands the means on."""
    used = {id(node.value) for node in nodes if isinstance(node, ast.Attribute)}
    called = {id(node.func) for node in nodes if isinstance(node, ast.Call)}
    bare = {id(node.func) for node in nodes if isinstance(node, ast.Call) and _without_built_ins(node)}
    for node in nodes:
        name = _name(node)
        plain = isinstance(node, ast.Name) and id(node) not in bare
        if name in _LOADERS or (plain and name in _BUILT_IN) or (name == "import_module" and id(node) not in called):
            raise _Untold
        if plain and name == "importlib" and id(node) not in used:
            raise _Untold
        if isinstance(node, ast.Import | ast.ImportFrom):
            _expect_known(node)


def _without_built_ins(call: ast.Call) -> bool:
    """Whether an expression is evaluated where nothing imports: `eval(text, {"__builtins__": {}, ...})`."""
    names = call.args[1] if _name(call.func) == "eval" and len(call.args) == 2 else None
    pairs = zip(names.keys, names.values, strict=True) if isinstance(names, ast.Dict) else ()
    return any(isinstance(key, ast.Constant) and key.value == "__builtins__" and isinstance(value, ast.Dict)
               and not value.keys for key, value in pairs)  # fmt: skip


def _expect_known(node: ast.Import | ast.ImportFrom) -> None:
    """Raise _Untold where a statement takes all names of what may be ours, or gives the means other names."""
    of, level = (node.module or "", node.level) if isinstance(node, ast.ImportFrom) else ("", 0)
    for each in node.names:
        last = each.name.rpartition(".")[2]
        if each.name == "*" and (_is_ours(of) or level or of == "importlib"):
            raise _Untold
        if last in _LOADERS or (each.asname and last in ("import_module", "importlib")) or each.name == "builtins":
            raise _Untold


def _is_ours(module: str) -> bool:
    return module.partition(".")[0] == PACKAGE


def _name(node: ast.AST) -> str:
    """The name that stands in a source, alone or behind a dot; "" for anything else."""
    return getattr(node, "id", "") if isinstance(node, ast.Name) else getattr(node, "attr", "")


def _statements(nodes: list[ast.AST]) -> Iterator[Asked]:
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (Asked(each.name) for each in node.names if _is_ours(each.name))
        elif isinstance(node, ast.ImportFrom) and (node.level or _is_ours(node.module or "")):
            yield from (Asked(node.module or "", each.name, node.level) for each in node.names)


def _attributes(nodes: list[ast.AST], kind: str) -> Iterator[Asked]:
    """What is taken from the package itself, which imports each name when it is first used."""
    bound = {
        each.asname or PACKAGE
        for node in nodes if isinstance(node, ast.Import)
        for each in node.names if _is_ours(each.name) and (each.name == PACKAGE or not each.asname)
    }  # fmt: skip
    if bound and kind != CELLS:  # whoever imports this module could take the package from it
        raise _Untold
    taken = {id(node.value): node.attr for node in nodes if isinstance(node, ast.Attribute)}
    for node in nodes:
        if isinstance(node, ast.Name) and node.id in bound:
            if id(node) not in taken:
                raise _Untold
            yield Asked(PACKAGE, taken[id(node)])


def _calls(tree: ast.Module, nodes: list[ast.AST], kind: str) -> Iterator[Asked]:
    """What `import_module` is given. The package's own looks up the tables by a name, which `_attributes` has told."""
    lazy = {
        id(inner)
        for node in tree.body if kind == TOP and isinstance(node, _FUNCTIONS) and node.name == "__getattr__"
        for inner in ast.walk(node)
    }  # fmt: skip
    for node in nodes:
        if isinstance(node, ast.Call) and _name(node.func) == "import_module":
            texts = _texts_given(tree, nodes, node)
            if texts is None and id(node) not in lazy:
                raise _Untold
            yield from (_literal(text, node) for text in texts or ())


def _literal(text: str, call: ast.Call) -> Asked:
    module = text.lstrip(".")
    if module == text:
        return Asked(module) if module != PACKAGE else _refuse()
    to = [*call.args[1:], *(each.value for each in call.keywords if each.arg == "package")]
    if len(to) != 1 or not isinstance(to[0], ast.Name) or to[0].id not in ("__name__", "__package__"):
        raise _Untold
    return Asked(module, "", len(text) - len(module), "own" if to[0].id == "__name__" else "")


def _refuse() -> Asked:
    """The package itself, by a name that nobody can follow."""
    raise _Untold


def _texts_given(tree: ast.Module, nodes: list[ast.AST], call: ast.Call) -> list[str] | None:
    """The texts that a call may get first: its own, or those of all calls of the private function around it."""
    first = call.args[0] if call.args else None
    if isinstance(first, ast.Constant) and isinstance(first.value, str):
        return [first.value]
    around = [node for node in tree.body if isinstance(node, ast.FunctionDef) and call in ast.walk(node)]
    if not around or not isinstance(first, ast.Name) or not _is_called_here(around[0].name):
        return None
    arguments, inside = around[0].args, ast.walk(around[0])
    written = any(node.id == first.id and not isinstance(node.ctx, ast.Load)
                  for node in inside if isinstance(node, ast.Name))  # fmt: skip
    if [each.arg for each in arguments.args] != [first.id] or arguments.defaults or written or around[0].decorator_list:
        return None
    return _only_argument(around[0].name, nodes)


def _is_called_here(function: str) -> bool:
    """Whether a function is private to its source; Python itself calls those with two underscores, as __getattr__."""
    return function.startswith("_") and not function.startswith("__")


def _only_argument(function: str, nodes: list[ast.AST]) -> list[str] | None:
    """What a function of one argument is given wherever its name stands; None unless it is called with a text there."""
    calls = {id(node.func): node for node in nodes if isinstance(node, ast.Call)}
    texts = []
    for node in nodes:
        if _name(node) == function:
            call = calls.get(id(node))
            given = call.args[0] if call and len(call.args) == 1 and not call.keywords else None
            if not isinstance(given, ast.Constant) or not isinstance(given.value, str):
                return None
            texts.append(given.value)
    return texts


def _texts(nodes: list[ast.AST]) -> Iterator[Asked]:
    """Modules that texts name, but for docstrings, which show others how to import."""
    told = {
        id(node.body[0].value)
        for node in nodes if isinstance(node, (ast.Module, ast.ClassDef, *_FUNCTIONS)) and node.body
        if isinstance(node.body[0], ast.Expr)
    }  # fmt: skip
    for node in nodes:
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in told:
            if _CODE.search(node.value):
                raise _Untold
            yield from (Asked(name, how="text") for name in _NAMED.findall(node.value))
