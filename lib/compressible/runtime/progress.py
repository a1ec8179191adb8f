"""A progress line for long loops that leaves nothing behind, in a terminal or in a saved notebook."""

from __future__ import annotations

import io
from collections.abc import Iterable
from typing import Any, Protocol

DELAY, INTERVAL = 1.0, 0.2  # seconds: before anything shows, and between two updates


class Bar(Protocol):
    """What a loop asks of a bar."""

    def update(self, n: float = 1) -> Any:
        """Count `n` steps more."""


def progress(work: Iterable[Any] | int, description: str = "", enabled: bool | None = None) -> Any:
    """A bar over an iterable, or over a number of steps counted by `bar.update(n)` and closed by `with`.

    It shows after a second, at most five times a second: in a terminal, and as one line in a notebook,
    where clearing it takes along what the same cell showed before. `enabled` overrides the choice.
    """
    try:
        from compressible.runtime.kernel_bar import KernelBar, cell, kernel, tqdm
    except ModuleNotFoundError:  # tqdm is no need of the mathematics: a GPU host may have PyTorch alone
        return _NoBar() if isinstance(work, int) else work
    counted = isinstance(work, int)
    options: dict[str, Any] = {"total": work} if counted else {"iterable": work}
    options |= {"desc": description, "leave": False, "delay": DELAY, "mininterval": INTERVAL}
    if kernel() is not None:
        hidden = enabled is False or KernelBar.busy_in == cell()
        return KernelBar(**options, file=io.StringIO(), ncols=80, disable=hidden)
    return tqdm(**options, dynamic_ncols=True, disable=None if enabled is None else not enabled)


class _NoBar:
    """Nothing to see."""

    def update(self, n: float = 1) -> None:
        """Count nothing."""

    def __enter__(self) -> _NoBar:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing to close."""
