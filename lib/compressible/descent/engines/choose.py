"""The engines behind `descend`: how a stretch of gradient steps is carried out.

One step of every engine (plain gradient descent, with E = dLoss/dX at X = W_L ... W_1):
    W_l <- (1 - rate_l lambda) W_l - rate_l (W_L ... W_{l+1})^T E (W_{l-1} ... W_1)^T.
An engine owns copies of the factors, (..., w_l, w_{l-1}), and offers `advance(steps)` and `evaluate()`; a new
backend is one more class here or beside it and one more line in `choose`. `Reference` is the one that the others
are tested against; `Fused` is the default; `Compiled` (compiled.py) serves stacks of small problems on the CPU.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from compressible.descent.engines import reference, sparse_cuda
from compressible.descent.engines.base import Stepping
from compressible.descent.engines.cuda_graphs import Graphed
from compressible.descent.engines.fused import Fused
from compressible.descent.engines.reference import Reference
from compressible.recovery.problems import MatrixSensing, Problem
from compressible.recovery.sparse import SparseCompletion
from compressible.runtime import devices
from compressible.runtime.devices import has_triton, interpreted

NARROW = 64  # width up to which a tile of X costs less to make again than to read
SMALL_PERSISTENT = (256, 32)  # columns and width up to which one program holds W_1 in registers
DEEPEST = 5  # factors that the kernels are written out for


def suited(problem: Problem, factors: Sequence[Tensor]) -> str:
    """Return the name of the engine that `auto` takes on a CUDA device, the fastest as measured on an H200."""
    narrow = _width(factors) <= NARROW and len(factors) <= DEEPEST
    return "tiled" if narrow and not isinstance(problem, MatrixSensing) and has_triton() else "graphed"


def checked(name: str, problem: Problem, factors: Sequence[Tensor]) -> type[Stepping]:
    """Return the class of "graphed", "tiled" or "persistent"; ValueError where it cannot do the problem."""
    kind = f"{type(problem).__name__} {problem.shape} with {len(factors)} factors of width {_width(factors)}"
    where = f"engine {name!r} got {kind} on {problem.device}"
    if problem.device.type != "cuda" and not (interpreted() and name == "persistent"):
        raise ValueError(f"{where}, expected a CUDA device")
    if name == "graphed":
        return Graphed
    limits = (*SMALL_PERSISTENT, DEEPEST) if name == "persistent" else (math.inf, NARROW, DEEPEST)
    found = (problem.shape[1], _width(factors), len(factors))
    if isinstance(problem, MatrixSensing) or any(a > b for a, b in zip(found, limits, strict=True)):
        raise ValueError(f"{where}, expected an entrywise problem with columns, width and depth at most {limits}")
    if not has_triton():
        raise ValueError(f"{where}, expected triton to be installed")
    from compressible.descent.engines import triton_dense as narrow  # which builds on this module

    return narrow.Persistent if name == "persistent" else narrow.Tiled


def _width(factors: Sequence[Tensor]) -> int:
    return max(factor.shape[-2] for factor in factors[:-1])


SMALL = 2**18  # entries of X up to which a stack is memory-friendly enough for one problem per thread


@contextmanager
def few_threads(problem: Problem, size: int) -> Iterator[None]:
    """Let PyTorch work with one thread on a small stack of `size` problems: more cost more than they bring."""
    threads = torch.get_num_threads()
    small = problem.device.type == "cpu" and size * problem.shape[0] * problem.shape[1] <= SMALL
    if not small or threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def choose(name: str, problem: Problem, factors: Sequence[Tensor]) -> type[Stepping]:
    """Return the engine class for `name`, one of `NAMES`.

    On the CPU "auto" takes `Compiled` for a stack of small entrywise problems (one problem per core, no barrier
    between steps) and `Fused` for the rest: a single problem is over before a compiler has started. On CUDA it takes
    what cuda.py says. Raises ValueError for another name and where the engine cannot do the problem.
    """
    if name not in NAMES:
        raise ValueError(f"engine is {name!r}, expected one of {', '.join(NAMES)}")
    if isinstance(problem, SparseCompletion):
        return _choose_sparse(name, problem)
    if name == "auto":
        name = _automatic(problem, factors)
    if name in ("reference", "fused"):
        return Reference if name == "reference" else Fused
    entrywise, on_cpu = not isinstance(problem, MatrixSensing), problem.device.type == "cpu"
    if name == "compiled":
        if not (entrywise and on_cpu):
            kind = type(problem).__name__
            raise ValueError(f'engine "compiled" got {kind} on {problem.device}, expected entrywise on the CPU')
        from compressible.descent.engines.numba_stack import (
            Compiled,  # numba takes half a second to import: only where it is used
        )

        return Compiled

    return checked(name, problem, factors)


NAMES = ("auto", "reference", "fused", "compiled", "graphed", "tiled", "persistent")


def _choose_sparse(name: str, problem: SparseCompletion) -> type[Stepping]:
    if name not in ("auto", "reference"):
        raise ValueError(f'engine is {name!r}, expected "auto" or "reference" for SparseCompletion')
    from compressible.descent.engines import sparse_numba as sampled

    if name == "reference" or (problem.device.type == "cuda" and not devices.has_triton()):
        return reference.SparseReference
    return sparse_cuda.SampledCuda if problem.device.type == "cuda" else sampled.Sampled


def _automatic(problem: Problem, factors: Sequence[Tensor]) -> str:
    if problem.device.type == "cuda":
        return suited(problem, factors)
    small = problem.shape[0] * problem.shape[1] <= SMALL
    stacked = factors[0].ndim > 2 and len(factors[0]) > 1
    return "compiled" if small and stacked and not isinstance(problem, MatrixSensing) else "fused"
