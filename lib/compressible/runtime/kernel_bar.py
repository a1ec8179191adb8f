"""A bar of tqdm's that lives in one display of a notebook's running cell."""

from __future__ import annotations

import base64
import sys
from typing import Any

from tqdm import tqdm

# nbval compares every output that a cell ever showed, removed or not, but pictures: so the line comes
# into being as one transparent pixel, turns into text by updates, and is cleared at the end.
_PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkYPhfDwAChwGA60e6kgAAAABJRU5ErkJggg=="
)


class KernelBar(tqdm):
    """A bar whose text goes to one display of the running cell."""

    monitor_interval = 0  # a display from another thread would reach the wrong cell
    disable: bool  # tqdm's own
    busy_in: tuple[int, int] | None = None  # the cell whose outermost bar is open; bars inside stay silent

    def __init__(self, *args: Any, **options: Any) -> None:
        self._handle: Any = None
        self._cell = None if options.get("disable") else cell()
        if self._cell is not None:
            KernelBar.busy_in = self._cell
        super().__init__(*args, **options)

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Show the line, or its next state; tqdm calls this."""
        from IPython.display import DisplayHandle

        if self._handle is None:
            self._handle = DisplayHandle()
            self._handle.display({"image/png": base64.b64encode(_PIXEL).decode()}, raw=True)
        self._handle.update({"text/plain": msg or str(self)}, raw=True)

    def clear(self, *_: Any, **__: Any) -> None:
        """Nothing to wipe before a message of another bar: each has its own display."""

    def close(self) -> None:
        """Remove the line, if it ever showed, and let the next bar show."""
        from IPython.display import clear_output

        if self.disable:
            return
        self.disable = True
        self._decr_instances(self)
        if KernelBar.busy_in == self._cell:
            KernelBar.busy_in = None
        if self._handle is not None:
            clear_output()


def kernel() -> Any:
    """The notebook kernel's shell, or None in a terminal."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    return shell if hasattr(shell, "kernel") else None


def cell() -> tuple[int, int]:
    shell = kernel()
    return id(shell), shell.execution_count
