"""Something to do once another package is imported, without importing it."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType


def when_imported(name: str, then: Callable[[], object]) -> None:
    """Call `then` at once where the module `name` is imported already, else right after its first import.

    During that import loggers say errors alone: peft imports whatever quantises, which tells of kernels it lacks.
    """
    if name in sys.modules:
        then()
    else:
        sys.meta_path.insert(0, _Waiting(name, then))


class _Waiting(MetaPathFinder):
    """Stands first among the finders until `name` is asked for, and lets the others find it."""

    def __init__(self, name: str, then: Callable[[], object]) -> None:
        self.name, self.then = name, then

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_then(module: ModuleType) -> None:
                before = logging.root.manager.disable
                logging.disable(logging.WARNING)
                try:
                    run(module)
                finally:
                    logging.disable(before)
                self.then()

            spec.loader.exec_module = run_and_then  # type: ignore[method-assign]  # of this one loader
        return spec
