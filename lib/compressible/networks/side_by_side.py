"""S networks that step together: stacked parameters under vmap, or one network as it is; eager or as a CUDA graph.

Nothing in a step waits for the device or reads a number from it: batches are picked on the device by a cursor, rates
follow a table by the number of the step, and losses are added up there. So a step can be captured as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap

from compressible.networks.batches import Draws, Examples, crop_and_flip
from compressible.networks.evaluation import evaluate_one, evaluate_stacked
from compressible.networks.layers import outer_factors
from compressible.networks.losses import Loss
from compressible.networks.optim.rules import Rule, Update
from compressible.networks.stacks import Named, by_rate, own, shared_or_stacked, stack

CHUNK_BYTES = 2**26  # of the order of the examples that lies on the device at a time


@dataclass(frozen=True)
class Plan:
    """What all models of a training share."""

    steps: int
    batch_size: int | None
    rule: Rule
    loss: Loss
    outer_ratio: float
    factors: Tensor  # (steps,) the schedule
    augment: bool
    autocast: Callable[[], AbstractContextManager[Any]]
    stretch: int  # steps in one CUDA graph


class SideBySide:
    """S models, trained in place, whose parameters are views of stacked tensors (S, ...); one is left as it is."""

    def __init__(
        self, models: list[nn.Module], train_set: Examples, plan: Plan, seeds: Sequence[int], rates: Sequence[float]
    ) -> None:
        self.models, self.train_set, self.plan = models, train_set, plan
        self.stacked = len(models) > 1
        self.device = train_set.inputs.device
        names = {name for name, parameter in models[0].named_parameters() if parameter.requires_grad}
        self.parameters = stack(models, names) if self.stacked else own(models[0], names)
        self.fixed, self.fixed_dims = shared_or_stacked(models, names) if self.stacked else ({}, {})
        self.groups = by_rate(list(self.parameters), rates, outer_factors(models[0]), plan.outer_ratio, plan.rule)
        tensors = [[self._part(self.parameters, *place) for place in places] for places in self.groups.values()]
        self.update = Update(plan.rule, tensors, [key[0] for key in self.groups], [key[2] for key in self.groups])
        self.factors = plan.factors.to(self.update.rates)
        self.step, self.cursor = (torch.zeros(1, dtype=torch.int64, device=self.device) for _ in range(2))
        self.loss_sum = torch.zeros(len(models), dtype=torch.float64, device=self.device)
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self.taken = 0  # steps since the losses were read
        self._prepare_batches(seeds)
        torch.manual_seed(seeds[0])
        self.random = self._random_state()

    # the batches

    def _prepare_batches(self, seeds: Sequence[int]) -> None:
        self.draws: list[Draws] = []
        if self.plan.batch_size is None:
            self.length = self.at = self.left = self.plan.steps
            return
        size, augment = self.plan.batch_size, self.plan.augment
        self.draws = [Draws(len(self.train_set), size, seed, augment) for seed in seeds]
        room = CHUNK_BYTES // (8 * len(seeds) * size * (4 if augment else 1))
        self.length = min(self.plan.steps, max(1, room // self.plan.stretch) * self.plan.stretch)
        shape = (self.length, len(seeds), size)
        self.order = torch.zeros(shape, dtype=torch.int64, device=self.device)
        self.shifts = torch.zeros(*shape, 3, dtype=torch.int64, device=self.device) if augment else None
        self.left = self.plan.steps
        self._refill()

    def _refill(self) -> None:
        """Bring the next chunk of the order to the device."""
        count = min(self.length, self.left)
        self.order[:count].copy_(torch.stack([draw.rows(count) for draw in self.draws], 1))
        if self.shifts is not None:
            self.shifts[:count].copy_(torch.stack([draw.shifts(count) for draw in self.draws], 1))
        self.cursor.zero_()
        self.at, self.left = 0, self.left - count

    def _batch(self) -> tuple[Tensor, Tensor]:
        """Inputs and targets (S, B, ...) of the step, (B, ...) of one model, (N, ...) for all where all are taken."""
        if not self.draws:
            return self.train_set.inputs, self.train_set.targets
        rows = self.order.index_select(0, self.cursor)[0]  # (S, B)
        inputs, targets = (part.index_select(0, rows.flatten()) for part in self._parts())
        if self.shifts is not None:
            inputs = crop_and_flip(inputs, self.shifts.index_select(0, self.cursor).view(-1, 3))
        if not self.stacked:
            return inputs, targets
        return inputs.unflatten(0, rows.shape), targets.unflatten(0, rows.shape)

    def _parts(self) -> tuple[Tensor, Tensor]:
        return self.train_set.inputs, self.train_set.targets

    # one step

    def _one(self, parameters: Named, fixed: Named, inputs: Tensor, targets: Tensor) -> Tensor:
        return self.plan.loss(functional_call(self.models[0], (parameters, fixed), (inputs,)), targets)

    def _gradients(self, inputs: Tensor, targets: Tensor) -> tuple[Named, Tensor]:
        """Gradients by name and losses (S,)."""
        with self.plan.autocast():
            if not self.stacked:
                loss = self.plan.loss(self.models[0](inputs), targets)
            else:
                over = 0 if self.draws else None
                dims = (0, self.fixed_dims, over, over)
                each = vmap(grad_and_value(self._one), in_dims=dims, randomness="different")
                return each(self.parameters, self.fixed, inputs, targets)
        found = torch.autograd.grad(loss, list(self.parameters.values()), allow_unused=True, materialize_grads=True)
        return dict(zip(self.parameters, found, strict=True)), loss.detach()[None]

    def _take(self) -> None:
        """One step, in place."""
        gradients, losses = self._gradients(*self._batch())
        with torch.no_grad():
            self.loss_sum += losses
            grouped = [[self._part(gradients, *place) for place in places] for places in self.groups.values()]
            self.update.step(grouped, self.factors.index_select(0, self.step)[0])
            self.step += 1
            self.cursor += 1

    def _part(self, named: Named, name: str, index: int | None) -> Tensor:
        return (named[name] if index is None else named[name][index]).detach()

    # many steps

    def advance(self, count: int) -> None:
        """Take `count` steps of all models; their dropout goes on where it was."""
        self._mode(True)
        self.taken += count
        self._go_on(self.random)
        self._advance(count)
        self.random = self._random_state()

    def _advance(self, count: int) -> None:
        while count:
            if self.draws and self.at == self.length:
                self._refill()
            ahead = min(count, self.length - self.at) if self.draws else count
            length = self.plan.stretch if self.graphs and ahead >= self.plan.stretch else 1
            if self.graphs:
                self.graphs[length].replay()
            else:
                self._take()
            self.at, count = self.at + length, count - length

    def capture(self, pool: Any = None) -> Any:
        """Capture a step, and a stretch of them, as CUDA graphs; return the memory pool for other models' graphs."""
        self._mode(True)
        state = self._state()
        kept = [tensor.clone() for tensor in state]
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):  # libraries pick their kernels and workspaces before they would be captured
            for _ in range(3):
                self.step.zero_()
                self.cursor.zero_()
                self._take()
        torch.cuda.current_stream(self.device).wait_stream(stream)
        graphs: dict[int, torch.cuda.CUDAGraph] = {}
        try:
            for length in {1, self.plan.stretch}:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.device(self.device), torch.cuda.graph(graph, pool=pool):
                    for _ in range(length):
                        self._take()
                graphs[length], pool = graph, graph.pool()
        finally:  # capturing runs nothing, but the warm-up took steps
            with torch.no_grad():
                for tensor, before in zip(state, kept, strict=True):
                    tensor.copy_(before)
        self.graphs = graphs
        return pool

    def _state(self) -> list[Tensor]:
        """All tensors that a step changes."""
        buffers = [buffer for model in self.models for buffer in model.buffers()]
        parameters = [parameter.detach() for parameter in self.parameters.values()]
        return [*parameters, *buffers, *self.update.state(), self.loss_sum, self.step, self.cursor]

    def _random_state(self) -> list[Tensor]:
        cuda = [torch.cuda.get_rng_state(self.device)] if self.device.type == "cuda" else []
        return [torch.get_rng_state(), *cuda]

    def _go_on(self, states: list[Tensor]) -> None:
        torch.set_rng_state(states[0])
        if len(states) > 1:
            torch.cuda.set_rng_state(states[1], self.device)

    def _mode(self, training: bool) -> None:
        for model in self.models:
            model.train(training)

    # what is recorded

    def read_losses(self) -> Tensor:
        """Return the mean training loss (S,) of the steps since the last reading, float64 on the CPU."""
        mean = (self.loss_sum / max(self.taken, 1)).cpu()
        self.loss_sum.zero_()
        self.taken = 0
        return mean

    def first_losses(self) -> Tensor:
        """Return the loss (S,) of every model's first batch, or of all examples where all are taken."""
        if not self.draws:
            return self.evaluate(self.train_set)[0]
        batches = [Examples(*(part.index_select(0, rows) for part in self._parts())) for rows in self.order[0]]
        return torch.stack([self._alone(model, batch)[0] for model, batch in zip(self.models, batches, strict=True)])

    def evaluate(self, examples: Examples) -> tuple[Tensor, Tensor]:
        """Return the mean loss (S,) and the accuracy (S,) on examples, in evaluation mode, float64 on the CPU."""
        if self.stacked:
            self._mode(False)
            plan, held = self.plan, (self.parameters, self.fixed, self.fixed_dims)
            return evaluate_stacked(self.models[0], *held, examples, plan.loss, plan.autocast)
        loss, accuracy = self._alone(self.models[0], examples)
        return loss[None], accuracy[None]

    def _alone(self, model: nn.Module, examples: Examples) -> tuple[Tensor, Tensor]:
        return evaluate_one(model, examples, self.plan.loss, self.plan.autocast)
