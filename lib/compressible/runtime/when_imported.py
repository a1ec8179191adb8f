"""Something to do once another package is imported, without importing it."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def when_imported(name: str, then: Callable[[], object]) -> None:
    """Call `then` at once where the module `name` is imported already, else right after its first import.

    None in its place in `sys.modules` blocks the import of it: then `then` waits, until somebody takes that away.
    During that import loggers say errors alone: peft imports whatever quantises, which tells of kernels it lacks.
    """
    if sys.modules.get(name) is not None:
        then()
    else:
        sys.meta_path.insert(0, _Waiting(name, then))


class _Waiting(MetaPathFinder):
    """Stands first among the finders until `name` has been imported, and lets the others find it.

    Others only ask whether it could be found, as transformers does, which is no import yet.
    """

    def __init__(self, name: str, then: Callable[[], object]) -> None:
        self.name, self.then = name, then

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        others = (finder.find_spec(fullname, path, target) for finder in sys.meta_path if finder is not self)
        spec = next((found for found in others if found is not None), None)
        if spec is not None and spec.loader is not None:
            self._follow(spec.loader)
        return spec

    def _follow(self, loader: Any) -> None:
        run = loader.exec_module

        def run_and_then(module: ModuleType) -> None:
            before = logging.root.manager.disable
            logging.disable(logging.WARNING)
            try:
                run(module)
            finally:
                logging.disable(before)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
                self.then()

        loader.exec_module = run_and_then  # of this one loader
