"""Which engine takes the steps of which problem."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from compressible.descent.engines.base import Engine
from compressible.descent.engines.cuda_graphs import GraphedFused
from compressible.descent.engines.fused import Fused
from compressible.descent.engines.reference import Reference
from compressible.recovery.problems import (
    DenseProblem,
    MatrixCompletion,
    MatrixFactorization,
    MatrixSensing,
    Problem,
)
from compressible.recovery.sparse import SparseCompletion
from compressible.runtime import devices

NARROW = 64  # width up to which a tile of X costs less to make again than to read
SMALL_PERSISTENT = (256, 32)  # columns and width up to which one program holds W_1 in registers
DEEPEST = 5  # factors that the kernels are written out for
SMALL = 2**18  # entries of X up to which a stack is memory-friendly enough for one problem per thread
ENTRYWISE = (MatrixCompletion, MatrixFactorization)  # what kernels compute themselves, and themselves alone:
# they read the target and never call the problem, so that a class derived from one of these would lose its own loss


def choose(name: str, problem: Problem, factors: Sequence[Tensor]) -> type[Engine]:
    """Return the engine class for `name`, one of `NAMES`; "auto" takes the fastest, as measured.

    On the CPU that is "compiled" for a stack of small entrywise problems (one problem per core, no barrier between
    steps) and "fused" for the rest: a single problem is over before a compiler has started. On CUDA it is "tiled" for
    narrow factors and "graphed" for the rest (on an H200). Sparse problems have an engine for each device. A problem
    of a class of one's own is asked for its gradient at every step, by "fused", or by "reference" where its loss is not
    of the product. Raises ValueError for another name and where the engine cannot do the problem.
    """
    if name not in NAMES:
        raise ValueError(f"engine is {name!r}, expected one of {', '.join(NAMES)}")
    _check_records(type(problem))
    if name == "reference":
        return Reference
    if not isinstance(problem, DenseProblem):
        return _sparse(name, problem)
    if name == "auto":
        name = _fastest(problem, factors)
    return _DENSE[name](problem, factors)


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


def _check_records(kind: type) -> None:
    """Raise ValueError where a dense problem's own `loss` or `error` would not be in the records."""
    if not issubclass(kind, DenseProblem) or kind.evaluate_factors is not DenseProblem.evaluate_factors:
        return
    for name in ("loss", "error"):
        owner, evaluating = (next(base for base in kind.__mro__ if part in vars(base)) for part in (name, "evaluate"))
        if owner is not evaluating and issubclass(owner, evaluating):
            told = "expected its evaluate(product) to give both, which records are made of"
            raise ValueError(
                f"problem {kind.__name__} has a method {name} but {evaluating.__name__}'s evaluate, {told}"
            )


def _of_product(problem: DenseProblem) -> bool:
    """Whether loss and gradients are those of X, by the base's chain rule; a penalty on the factors is not."""
    kind = type(problem)
    return all(getattr(kind, name) is getattr(DenseProblem, name) for name in ("evaluate_factors", "factor_gradients"))


def _expect_of_product(name: str, problem: DenseProblem) -> None:
    if not _of_product(problem):
        kind = type(problem).__name__
        told = 'a loss that is a function of the product W_L ... W_1; "auto" and "reference" do it'
        raise ValueError(f"engine {name!r} got {kind}, which has its own gradients of the factors, expected {told}")


def _sparse(name: str, problem: Problem) -> type[Engine]:
    if name != "auto":
        raise ValueError(f'engine is {name!r}, expected "auto" or "reference" for {type(problem).__name__}')
    if type(problem) is not SparseCompletion:
        return Reference
    if problem.device.type != "cuda":
        from compressible.descent.engines.sparse_numba import SparseNumba  # numba takes half a second to import

        return SparseNumba
    if not devices.has_triton():
        return Reference
    from compressible.descent.engines.sparse_cuda import SparseCuda

    return SparseCuda


def _fastest(problem: DenseProblem, factors: Sequence[Tensor]) -> str:
    if not _of_product(problem):
        return "reference"
    entrywise = type(problem) in ENTRYWISE
    if not entrywise and type(problem) is not MatrixSensing:
        return "fused"  # a graph would replay what a gradient of one's own did at the first step
    if problem.device.type == "cuda":
        narrow = _width(factors) <= NARROW and len(factors) <= DEEPEST
        return "tiled" if narrow and entrywise and devices.has_triton() else "graphed"
    small = problem.shape[0] * problem.shape[1] <= SMALL
    stacked = factors[0].ndim > 2 and len(factors[0]) > 1
    return "compiled" if small and stacked and entrywise else "fused"


def _reference(problem: DenseProblem, factors: Sequence[Tensor]) -> type[Engine]:
    return Reference


def _fused(problem: DenseProblem, factors: Sequence[Tensor]) -> type[Engine]:
    _expect_of_product("fused", problem)
    return Fused


def _compiled(problem: DenseProblem, factors: Sequence[Tensor]) -> type[Engine]:
    if type(problem) not in ENTRYWISE or problem.device.type != "cpu":
        kind = type(problem).__name__
        raise ValueError(f'engine "compiled" got {kind} on {problem.device}, expected {_named()} itself on the CPU')
    from compressible.descent.engines.numba_stack import NumbaStack  # as above

    return NumbaStack


def _on_cuda(name: str, problem: DenseProblem, factors: Sequence[Tensor]) -> type[Engine]:
    """The class of "graphed", "tiled" or "persistent"; ValueError where it cannot do the problem."""
    kind = f"{type(problem).__name__} {problem.shape} with {len(factors)} factors of width {_width(factors)}"
    where = f"engine {name!r} got {kind} on {problem.device}"
    if problem.device.type != "cuda" and not (devices.interpreted() and name == "persistent"):
        raise ValueError(f"{where}, expected a CUDA device")
    if name == "graphed":
        _expect_of_product(name, problem)
        return GraphedFused
    limits = (*SMALL_PERSISTENT, DEEPEST) if name == "persistent" else (math.inf, NARROW, DEEPEST)
    found = (problem.shape[1], _width(factors), len(factors))
    if type(problem) not in ENTRYWISE or any(a > b for a, b in zip(found, limits, strict=True)):
        raise ValueError(f"{where}, expected {_named()} itself with columns, width and depth at most {limits}")
    if not devices.has_triton():
        raise ValueError(f"{where}, expected triton to be installed")
    from compressible.descent.engines.triton_dense import TritonPersistent, TritonTiled

    return TritonPersistent if name == "persistent" else TritonTiled


def _named() -> str:
    return " or ".join(kind.__name__ for kind in ENTRYWISE)


def _width(factors: Sequence[Tensor]) -> int:
    return max(factor.shape[-2] for factor in factors[:-1])


# The engines of dense problems: what returns the class of one, or raises ValueError where it cannot do the problem.
_DENSE: dict[str, Callable[[DenseProblem, Sequence[Tensor]], type[Engine]]] = {
    "reference": _reference,
    "fused": _fused,
    "compiled": _compiled,
    **{name: partial(_on_cuda, name) for name in ("graphed", "tiled", "persistent")},
}
NAMES = ("auto", *_DENSE)
