"""What a training of several networks leaves: records, copies of matrices, the trained networks."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from compressible.networks.batches import Examples
from compressible.networks.layers import weight_matrix
from compressible.networks.side_by_side import SideBySide

Watch = Callable[[int, list[nn.Module]], Any]


@dataclass
class NetworkHistory:
    """What a training of S networks left: R records, at step 0, at multiples of `evaluate_every` and at the last step.

    Args:
        steps: (R,) the steps of the records.
        loss: (S, R) training loss: of mini-batches the mean over the steps since the record before, each taken before
            its update (at step 0: of the first batch); of full batches the loss at the record, without dropout.
        test_loss, accuracy: (S, R) on the test set, NaN without one.
        validation_loss, validation_accuracy: (S, R) on the validation set, NaN without one.
        seconds: (R,) wall clock of the training of all S together up to the record; evaluations, `watch` and the
            capture of graphs are left out.
        diverged: (S,) whether a loss was not finite; such values stay in the records, and the others go on.
        peak_memory_bytes: the tensors' peak on CUDA, all S together; on a CPU the process's.
        parameters: trained numbers of one network.
        models: the S trained networks, in evaluation mode; those that were given are as they were.
        learning_rates: (S,).
        snapshots: by step, by name: (S, ...) copies on the CPU.
        watched: what `watch` returned, a value a record.
        stacked, captured: whether they trained stacked, and as CUDA graphs.

    Example:
        >>> import torch, compressible as cd
        >>> from compressible.networks import models
        >>> nets = [cd.networks.models.seeded(seed, models.mlp, 4, 8, 2) for seed in range(3)]
        >>> examples = cd.networks.training.Examples(torch.eye(4), torch.tensor([0, 1, 0, 1]))
        >>> history = cd.networks.training.train(nets, examples, learning_rates=[0.01, 0.02, 0.04], steps=20)
        >>> history.loss.shape, history.parameters, bool((history.loss[:, -1] < history.loss[:, 0]).all())
        ((3, 21), 202, True)
    """

    steps: np.ndarray
    loss: np.ndarray
    test_loss: np.ndarray
    accuracy: np.ndarray
    validation_loss: np.ndarray
    validation_accuracy: np.ndarray
    seconds: np.ndarray
    diverged: np.ndarray
    peak_memory_bytes: int
    parameters: int
    models: list[nn.Module] = field(repr=False)
    learning_rates: np.ndarray
    snapshots: dict[int, dict[str, Tensor]] = field(repr=False)
    watched: list[Any] = field(repr=False)
    stacked: bool
    captured: bool


class Records:
    """What is kept of a training."""

    def __init__(
        self,
        runs: list[SideBySide],
        models: list[nn.Module],
        validation: Examples | None,
        test: Examples | None,
        names: list[str],
        watch: Watch | None,
    ) -> None:
        self.runs, self.models, self.sets, self.names, self.watch = runs, models, (validation, test), names, watch
        self.spent = 0.0
        self.rows: list[tuple[int, float, Tensor]] = []
        self.snapshots: dict[int, dict[str, Tensor]] = {}
        self.watched: list[Any] = []

    def record(self, step: int) -> None:
        exact = step == 0 or not self.runs[0].draws
        losses = [run.first_losses() if exact else run.read_losses() for run in self.runs]
        values = [torch.cat(losses)]
        for part in self.sets:
            missing = torch.full((len(self.models),), math.nan, dtype=torch.float64)
            found = [] if part is None else [run.evaluate(part) for run in self.runs]
            values += [torch.cat([pair[index] for pair in found]) if found else missing for index in (0, 1)]
        self.rows.append((step, self.spent, torch.stack(values)))
        if self.watch is not None:
            for model in self.models:
                model.eval()
            with torch.no_grad():
                self.watched.append(self.watch(step, self.models))

    @torch.no_grad()
    def snap(self, step: int) -> None:
        """Copy the named matrices of all models."""
        self.snapshots[step] = {
            name: torch.stack([_named(model, name).detach().cpu() for model in self.models]) for name in self.names
        }

    def history(self, peak: int, rates: list[float], stacked: bool, captured: bool) -> NetworkHistory:
        """All as arrays."""
        values = torch.stack([row[2] for row in self.rows], -1).numpy()  # (5, S, R)
        loss, validation_loss, validation_accuracy, test_loss, accuracy = values
        judged = [values[0]] + [values[index] for index, part in ((1, self.sets[0]), (3, self.sets[1])) if part]
        for model in self.models:
            model.eval()
        return NetworkHistory(
            steps=np.array([row[0] for row in self.rows]),
            loss=loss,
            test_loss=test_loss,
            accuracy=accuracy,
            validation_loss=validation_loss,
            validation_accuracy=validation_accuracy,
            seconds=np.array([row[1] for row in self.rows]),
            diverged=~np.all([np.isfinite(kind).all(1) for kind in judged], 0),
            peak_memory_bytes=peak,
            parameters=sum(p.numel() for p in self.models[0].parameters() if p.requires_grad),
            models=self.models,
            learning_rates=np.array(rates),
            snapshots=self.snapshots,
            watched=self.watched,
            stacked=stacked,
            captured=captured,
        )


def _named(model: nn.Module, name: str) -> Tensor:
    """A layer's end-to-end matrix or a parameter, by name."""
    modules = dict(model.named_modules())
    return weight_matrix(modules[name]) if name in modules else model.get_parameter(name)
