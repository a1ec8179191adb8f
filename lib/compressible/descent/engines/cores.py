"""What the engines on the CPU share: compilation by numba, the threads of the process, and BLAS on one of them."""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any

from numba import njit
from threadpoolctl import ThreadpoolController

from compressible.runtime.checks import expect

# Sums may be reordered (they are vectorised), NaN and infinities must survive: divergence is told by them.
OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": {"contract", "reassoc", "nsz"}}


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function compiled when it is first called, and kept on disk where there is a place for it.

    Where the library is read-only and the user has no cache, as in some containers, each process compiles anew.
    """
    try:
        return njit(**OPTIONS, cache=True)(function)
    except RuntimeError:  # numba found no place
        return njit(**OPTIONS)(function)


@functools.cache
def pool() -> ThreadPoolExecutor:
    """The threads that share the work of one process."""
    return ThreadPoolExecutor(cores())


def cores() -> int:
    """Cores this process may use; COMPRESSIBLE_THREADS overrides. OMP_NUM_THREADS bounds barriers, not this pool."""
    asked = os.environ.get("COMPRESSIBLE_THREADS", "").strip()
    told = "an integer >= 1, or 0 or nothing for all cores"
    expect("COMPRESSIBLE_THREADS", asked, not asked or (asked.isascii() and asked.isdigit()), told)
    return int(asked or 0) or len(os.sched_getaffinity(0))


class _OneThread:
    """BLAS on one thread while anybody is inside: the first to come sets it, and the last to go puts it back.

    Each on its own would take the other's one thread for what there was before, and leave the process there.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Start with nobody inside."""
        self.lock, self.inside, self.undo = threading.Lock(), 0, ExitStack()

    @contextmanager
    def __call__(self) -> Iterator[None]:
        with self.lock:
            if not self.inside:
                self.undo.enter_context(_blas().limit(limits=1, user_api="blas"))
            self.inside += 1
        try:
            yield
        finally:
            with self.lock:
                self.inside -= 1
                if not self.inside:
                    self.undo.close()


@functools.cache
def _blas() -> ThreadpoolController:
    import scipy.linalg.cython_blas  # noqa: F401  the library that numba calls, or the controller would not see it

    return ThreadpoolController()  # looks through all loaded libraries: milliseconds, so once


one_blas_thread = _OneThread()


def _after_fork() -> None:
    """A child process has none of its parent's threads: work given to them would never be done."""
    pool.cache_clear()
    one_blas_thread.reset()


os.register_at_fork(after_in_child=_after_fork)
