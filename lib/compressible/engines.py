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

from .factors import product
from .problems import MatrixSensing, Problem
from .sparse import SparseCompletion

Rate = float | Tensor  # one step size, or (S, 1, 1) of them for a stack

SMALL = 2**18  # entries of X up to which a stack is memory-friendly enough for one problem per thread


class Stepping:
    """What `descend` asks of an engine: `advance`, `evaluate`, and from them `walk`.

    `ahead` is how many records a call of `walk` may be given. It returns losses and errors (R, S, 2) of the records
    taken and how many each problem took (S,), None for all R. An engine returns at the first record at which a problem
    stops, unless it `freezes`: then each problem stops at its own and stays as it is there.
    """

    ahead = 1
    freezes = False

    def prepare(self, steps: int) -> None:
        """Compile what stretches of `steps` need, before the clock starts."""
        self.advance(0)

    def advance(self, steps: int) -> None:
        """Take `steps` gradient steps."""
        raise NotImplementedError

    def evaluate(self) -> Tensor:
        """Return loss and error as (..., 2) at the current iterate."""
        raise NotImplementedError

    def walk(self, lengths: Sequence[int], tolerance: float) -> tuple[Tensor, Tensor | None]:
        """Take stretches of `lengths` steps with a record after each; see the class."""
        (length,) = lengths
        self.advance(length)
        return self.evaluate().reshape(1, -1, 2), None


def goes_on(loss: float, tolerance: float) -> bool:
    """Whether a problem whose record reads `loss` continues: finite and not below the tolerance."""
    return math.isfinite(loss) and loss >= tolerance


class Reference(Stepping):
    """Plain closed-form gradient descent on any device, one readable expression per quantity."""

    def __init__(self, problem: Problem, factors: Sequence[Tensor], rates: Sequence[Rate], decay: float) -> None:
        self.problem, self.rates, self.decay = problem, list(rates), decay
        self.factors = [factor.clone() for factor in factors]

    def advance(self, steps: int) -> None:
        """Take `steps` gradient steps."""
        for _ in range(steps):
            gradients = layer_gradients(self.factors, self.problem)
            self.factors = [
                (1 - rate * self.decay) * factor - rate * gradient
                for factor, gradient, rate in zip(self.factors, gradients, self.rates, strict=True)
            ]

    def evaluate(self) -> Tensor:
        """Return loss and error as (..., 2) at the current iterate."""
        return torch.stack(self.problem.evaluate(product(self.factors)), -1)


class Fused(Stepping):
    """The same steps in place: preallocated buffers, updates folded into the products (gemm with beta), no autograd."""

    def __init__(self, problem: Problem, factors: Sequence[Tensor], rates: Sequence[Rate], decay: float) -> None:
        self.problem = problem
        self.factors = [factor.clone(memory_format=torch.contiguous_format) for factor in factors]
        # prefixes[l] = W_{l+1} ... W_1, so that prefixes[0] is W_1 itself and prefixes[-1] is X.
        self.prefixes = [self.factors[0]]
        for factor in self.factors[1:]:
            self.prefixes.append(factor @ self.prefixes[-1])
        # backs[l] = (W_L ... W_{l+1})^T E, the gradient of the loss in prefixes[l-1].
        self.backs = [torch.empty_like(prefix) for prefix in self.prefixes]
        self._look = problem.watch(self.prefixes[-1], scratch=self.backs[-1])
        self._forward = self._plan_forward()
        self._backward = self._plan_backward(rates, decay)

    def advance(self, steps: int) -> None:
        """Take `steps` gradient steps."""
        gradient, last, back = self.problem.gradient, self.prefixes[-1], self.backs[-1]
        forward, backward = self._forward, self._backward
        for _ in range(steps):
            for multiply, left, right, out in forward:
                multiply(left, right, out=out)
            gradient(last, out=back)
            for call in backward:
                call()

    def evaluate(self) -> Tensor:
        """Return loss and error as (..., 2) at the current iterate."""
        for multiply, left, right, out in self._forward:
            multiply(left, right, out=out)
        return self._look()

    def _plan_forward(self) -> list[tuple]:
        multiply = torch.mm if self.factors[0].ndim == 2 else torch.bmm
        steps = zip(self.factors[1:], self.prefixes[:-1], self.prefixes[1:], strict=True)
        return [(multiply, factor, below, here) for factor, below, here in steps]

    def _plan_backward(self, rates: Sequence[Rate], decay: float) -> list:
        """The backward sweep as bound calls: W_l^T B is taken before W_l is overwritten by its own update."""
        multiply = torch.mm if self.factors[0].ndim == 2 else torch.bmm
        plan = []
        for layer in range(len(self.factors) - 1, 0, -1):
            factor, back, below = self.factors[layer], self.backs[layer], self.prefixes[layer - 1].mT
            plan.append(_bind(multiply, factor.mT, back, out=self.backs[layer - 1]))
            plan.extend(_update(factor, back, below, rates[layer], decay))
        plan.extend(_update(self.factors[0], self.backs[0], None, rates[0], decay))
        return plan


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


def layer_gradients(factors: Sequence[Tensor], problem: Problem) -> list[Tensor]:
    """Return [dLoss/dW_1, ..., dLoss/dW_L], shaped as the factors, in closed form."""
    prefixes = [factors[0]]
    for factor in factors[1:]:
        prefixes.append(factor @ prefixes[-1])
    back = problem.gradient(prefixes[-1])
    gradients = []
    for factor, below in zip(reversed(factors[1:]), reversed(prefixes[:-1]), strict=True):
        gradients.append(back @ below.mT)
        back = factor.mT @ back
    return [back, *reversed(gradients)]


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
        from .compiled import Compiled  # numba takes half a second to import: only where it is used

        return Compiled
    from . import cuda  # after this module, whose engines it builds on

    return cuda.checked(name, problem, factors)


NAMES = ("auto", "reference", "fused", "compiled", "graphed", "tiled", "persistent")


def _choose_sparse(name: str, problem: SparseCompletion) -> type[Stepping]:
    if name not in ("auto", "reference"):
        raise ValueError(f'engine is {name!r}, expected "auto" or "reference" for SparseCompletion')
    from . import cuda, sampled

    if name == "reference" or (problem.device.type == "cuda" and not cuda.has_triton()):
        return sampled.SparseReference
    return sampled.SampledCuda if problem.device.type == "cuda" else sampled.Sampled


def _automatic(problem: Problem, factors: Sequence[Tensor]) -> str:
    if problem.device.type == "cuda":
        from . import cuda

        return cuda.suited(problem, factors)
    small = problem.shape[0] * problem.shape[1] <= SMALL
    stacked = factors[0].ndim > 2 and len(factors[0]) > 1
    return "compiled" if small and stacked and not isinstance(problem, MatrixSensing) else "fused"


def _bind(function, *args, **kwargs):
    return lambda: function(*args, **kwargs)


def _update(factor: Tensor, back: Tensor, below: Tensor | None, rate: Rate, decay: float) -> list:
    """Calls that do factor <- (1 - rate decay) factor - rate back below; `below` None stands for the identity."""
    if isinstance(rate, Tensor):
        return _update_each(factor, back, below, rate, decay)
    if rate == 0:
        return []
    if below is None:
        shrink = [_bind(factor.mul_, 1 - rate * decay)] if decay else []
        return [*shrink, _bind(factor.add_, back, alpha=-rate)]
    fused = factor.addmm_ if factor.ndim == 2 else factor.baddbmm_
    return [_bind(fused, back, below, beta=1 - rate * decay, alpha=-rate)]


def _update_each(factor: Tensor, back: Tensor, below: Tensor | None, rate: Tensor, decay: float) -> list:
    calls = [_bind(factor.mul_, 1 - rate * decay)] if decay else []
    if below is None:
        return [*calls, _bind(factor.addcmul_, back, rate, value=-1)]
    gradient = torch.empty_like(factor)
    return [_bind(torch.bmm, back, below, out=gradient), *calls, _bind(factor.addcmul_, gradient, rate, value=-1)]
