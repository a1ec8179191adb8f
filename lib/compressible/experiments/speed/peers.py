"""What the engines are measured against: the loop as it is usually written in PyTorch, and the authors' in JAX.

`Autograd` is a loss, `backward()` and `torch.optim.SGD`. `Jax` is our own version of the authors' algorithm: the
gradient by `jax.grad`, the steps inside one `jax.jit`. JAX is imported only here and only where it is asked for; the
project does not depend on it.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compressible.descent.engines.base import Engine, Rate, goes_on
from compressible.recovery.factors import product
from compressible.recovery.problems import MatrixCompletion, MatrixFactorization, Problem
from compressible.recovery.sparse import SparseCompletion
from compressible.runtime import devices


class Peer(Engine):
    """An engine outside `descend`: it can be waited for and run to a tolerance by itself."""

    device: torch.device

    def wait(self) -> None:
        """Return when all steps asked for are taken."""
        devices.synchronize(str(self.device))

    def until(self, steps: int, every: int, tolerance: float) -> int:
        """Step until every loss of a record is below `tolerance`, at most `steps`; return the iterations taken.

        A record is taken every `every` steps, as `descend` does.
        """
        taken = 0
        while taken < steps and any(goes_on(loss, tolerance) for loss in self.evaluate().reshape(-1, 2)[:, 0].tolist()):
            self.advance(every)
            taken += every
        return taken


class Autograd(Peer):
    """Plain PyTorch: leaves that require gradients, a loss, `backward`, `SGD` with a group a factor."""

    name = "autograd"

    def __init__(self, problem: Problem, factors: Sequence[Tensor], rates: Sequence[Rate], decay: float) -> None:
        if any(isinstance(rate, Tensor) for rate in rates):
            raise ValueError("the autograd loop got a step size for each problem, expected one step size a factor")
        self._loss = _loss(problem)
        self.problem, self.device = problem, problem.device
        self.factors = [factor.detach().clone().requires_grad_() for factor in factors]
        groups = [{"params": [factor], "lr": rate} for factor, rate in zip(self.factors, rates, strict=True)]
        self._optimizer = torch.optim.SGD(groups, lr=1.0, weight_decay=decay)

    def advance(self, steps: int) -> None:
        """Take `steps` gradient steps."""
        with torch.enable_grad():
            for _ in range(steps):
                self._optimizer.zero_grad()
                self._loss(self.factors).backward()
                self._optimizer.step()

    @torch.no_grad()
    def evaluate(self) -> Tensor:
        """Return loss and error as (..., 2) at the current iterate."""
        return torch.stack(self.problem.evaluate_factors(self.factors), -1)


class Jax(Peer):
    """The authors' algorithm: jit over whole stretches, `jax.grad` of the loss, plain gradient descent.

    Raises ValueError for another problem than dense completion, and where JAX or its device is missing.
    """

    # The second half of its methods are what is traced: JAX is no dependency and is imported when one is made.
    name = "jax"

    def __init__(self, problem: Problem, factors: Sequence[Tensor], rates: Sequence[Rate], decay: float) -> None:
        reason = without_jax(problem)
        if reason or not isinstance(problem, MatrixCompletion):
            raise ValueError(reason)
        self._jax, self.device = _import_jax(), problem.device
        place = self._jax.devices("gpu" if problem.device.type == "cuda" else "cpu")[problem.device.index or 0]

        def move(value: Tensor | float) -> Any:
            tensor = torch.as_tensor(value, dtype=problem.dtype).detach()
            return self._jax.device_put(tensor.cpu().numpy(), place)

        counts = problem.mask.sum((-2, -1), keepdim=True)
        if problem.mean_over == "all":
            counts = torch.full_like(counts, problem.shape[0] * problem.shape[1])
        self._weights = tuple(move(factor) for factor in factors)
        self._data = {
            "target": move(problem.target),
            "mask": move(problem.mask),
            "count": move(counts),
            "weights": move(problem.weights),
            "rates": [move(rate) for rate in rates],
            "decay": move(decay),
        }
        self._compiled: dict[tuple, Callable] = {}

    @property
    def factors(self) -> list[Tensor]:  # type: ignore[override]  # computed
        """The current factors, copied to the problem's device."""
        return [torch.from_numpy(np.array(weight)).to(self.device) for weight in self._weights]

    def prepare(self, steps: int) -> None:
        """Compile stretches of `steps`, which the first call does."""
        self._jax.block_until_ready(self._stretch(steps)(self._weights, self._data))

    def advance(self, steps: int) -> None:
        """Take `steps` gradient steps; the call returns before they are done."""
        self._weights = self._stretch(steps)(self._weights, self._data)

    def wait(self) -> None:
        """Return when all steps asked for are taken."""
        self._jax.block_until_ready(self._weights)

    def evaluate(self) -> Tensor:
        """Return loss and error as (..., 2) at the current iterate."""
        return torch.from_numpy(np.array(self._once("look", self._look)(self._weights, self._data)))

    def until(self, steps: int, every: int, tolerance: float) -> int:
        """As `Peer.until`, the whole of it one compiled loop that keeps every record; `steps` are rounded up."""

        def run(weights: Sequence[Any], data: dict[str, Any], level: float) -> tuple:
            return self._whole(weights, data, level, steps, every)

        whole = self._once(("until", steps, every), run)
        self._weights, iterations, _ = whole(self._weights, self._data, tolerance)
        return int(iterations)

    def _stretch(self, steps: int) -> Callable:
        return self._once(("stretch", steps), lambda weights, data: self._steps(weights, data, steps))

    def _once(self, key: Any, function: Callable) -> Callable:
        if key not in self._compiled:
            self._compiled[key] = self._jax.jit(function)
        return self._compiled[key]

    def _product(self, weights: Sequence[Any]) -> Any:
        result = weights[0]
        for weight in weights[1:]:  # full precision: XLA's default on a GPU rounds float32 to tf32
            result = self._jax.numpy.matmul(weight, result, precision=self._jax.lax.Precision.HIGHEST)
        return result

    def _loss(self, weights: Sequence[Any], data: dict[str, Any]) -> Any:
        squares = (self._product(weights) - data["target"]) ** 2
        return (data["mask"] * squares / data["count"]).sum() / 2

    def _steps(self, weights: Sequence[Any], data: dict[str, Any], steps: int) -> tuple:
        gradient, decay = self._jax.grad(self._loss), data["decay"]

        def step(_: int, weights: Sequence[Any]) -> tuple:
            moved = zip(weights, gradient(weights, data), data["rates"], strict=True)
            return tuple(weight - rate * (slope + decay * weight) for weight, slope, rate in moved)

        return self._jax.lax.fori_loop(0, steps, step, weights)

    def _look(self, weights: Sequence[Any], data: dict[str, Any]) -> Any:
        squares = (self._product(weights) - data["target"]) ** 2
        return (data["weights"] * squares[..., None, :, :]).sum((-2, -1)) / 2

    def _whole(self, weights: Sequence[Any], data: dict[str, Any], level: float, steps: int, every: int) -> tuple:
        jnp, first = self._jax.numpy, self._look(weights, data)
        records = jnp.full((-(-steps // every) + 1, *first.shape), jnp.nan, first.dtype).at[0].set(first)

        def goes(state: tuple) -> Any:
            loss = state[2][state[1] // every][..., 0]
            return (state[1] < steps) & (jnp.isfinite(loss) & (loss >= level)).any()

        def stretch(state: tuple) -> tuple:
            moved, taken = self._steps(state[0], data, every), state[1] + every
            return moved, taken, state[2].at[taken // every].set(self._look(moved, data))

        return self._jax.lax.while_loop(goes, stretch, (weights, 0, records))


def without_jax(problem: Problem) -> str:
    """Return why `Jax` cannot take a problem here, "" where it can."""
    if importlib.util.find_spec("jax") is None:
        return "jax is not installed"
    if not isinstance(problem, MatrixCompletion):
        size = f"{problem.shape[0]} x {problem.shape[1]}"
        return f"the authors' loop takes completion with dense arrays, got {type(problem).__name__} of {size}"
    try:
        _import_jax().devices("gpu" if problem.device.type == "cuda" else "cpu")
    except RuntimeError as error:
        return f"jax has no device like {problem.device}: {str(error).splitlines()[0]}"
    return ""


def _import_jax() -> Any:
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # else it takes three quarters of the memory
    import jax

    jax.config.update("jax_enable_x64", True)
    return jax


def _loss(problem: Problem) -> Callable[[Sequence[Tensor]], Tensor]:
    if isinstance(problem, SparseCompletion):
        return _sparse_loss(problem)
    if isinstance(problem, MatrixCompletion):
        target, weight = problem.target, problem.observed_weight
        return lambda factors: (weight * (product(factors) - target).square()).sum() / 2
    if isinstance(problem, MatrixFactorization):
        whole = problem.target
        return lambda factors: (product(factors) - whole).square().mean((-2, -1)).sum() / 2
    raise ValueError(f"the autograd loop got {type(problem).__name__}, expected an entrywise problem")


def _sparse_loss(problem: SparseCompletion) -> Callable[[Sequence[Tensor]], Tensor]:
    rows, columns = problem.seen.rows.lines(), problem.seen.rows.indices.long()
    values = problem.seen.rows.values

    def loss(factors: Sequence[Tensor]) -> Tensor:
        predicted = (factors[-1][rows] * product(factors[:-1]).mT[columns]).sum(-1)
        return (predicted - values).square().mean() / 2

    return loss
