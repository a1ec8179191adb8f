"""Adam, AdamW and SGD for parameters of which each group has its own rate: PyTorch's own fused steps.

They are called as functions, since PyTorch's optimiser objects refuse to be captured with SGD and would hold one group
for each model of a stack. The rates live in one tensor on the device, so that a captured step can follow a schedule.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

OPTIMIZERS = ("adam", "adamw", "sgd")
BETAS, EPS = (0.9, 0.999), 1e-8


@dataclass(frozen=True)
class Rule:
    """Which optimiser, and its constants; PyTorch's defaults otherwise."""

    name: str
    momentum: float = 0.9  # of sgd
    # decoupled for adamw, part of the gradient for adam and sgd; a mapping names parameters by regular expressions
    weight_decay: float | Mapping[str, float] = 0.0

    def decay_of(self, name: str) -> float:
        """Return the weight decay of the parameter of this name; of a mapping that of the first that matches, or 0."""
        if not isinstance(self.weight_decay, Mapping):
            return self.weight_decay
        return next((decay for names, decay in self.weight_decay.items() if re.fullmatch(names, name)), 0.0)


class Update:
    """The optimiser's state for groups of parameters, and its steps in place.

    parameters[g] are the tensors of group g, rates (G,) its learning rate before the schedule's factor, decays (G,) its
    weight decay.
    """

    def __init__(
        self, rule: Rule, parameters: Sequence[Sequence[Tensor]], rates: Sequence[float], decays: Sequence[float]
    ) -> None:
        self.rule, self.parameters, self.decays = rule, [list(group) for group in parameters], list(decays)
        self.device = self.parameters[0][0].device
        self.base = [float(rate) for rate in rates]
        exact = torch.float32 if self.device.type == "cuda" else torch.float64  # CUDA's kernels read float32
        self.rates = torch.tensor(self.base, device=self.device, dtype=exact)
        self.bases = self.rates.clone()
        moments = 2 if rule.name != "sgd" else 1 if rule.momentum else 0
        self.moments = [[[torch.zeros_like(p) for p in group] for group in self.parameters] for _ in range(moments)]
        self.steps = [[torch.zeros((), device=self.device) for _ in group] for group in self.parameters]

    def step(self, gradients: Sequence[Sequence[Tensor]], factor: Tensor) -> None:
        """Take one step at `factor` () times the rates; no host waits for the device on CUDA."""
        torch.mul(self.bases, factor, out=self.rates)
        rates = self.rates.unbind() if self.device.type == "cuda" else self.rates.tolist()
        for group, rate in enumerate(rates):
            self._step(group, list(map(_laid_out, gradients[group], self.parameters[group])), rate)

    def state(self) -> list[Tensor]:
        """All tensors that a step changes beside the parameters."""
        kept = [tensor for moment in self.moments for group in moment for tensor in group]
        return [*kept, *(step for group in self.steps for step in group)]

    def _step(self, group: int, gradients: list[Tensor], rate: Tensor | float) -> None:
        parameters, decay = self.parameters[group], self.decays[group]
        moments = [moment[group] for moment in self.moments]
        options: dict[str, Any] = {"fused": True, "lr": rate, "weight_decay": decay, "maximize": False}
        if self.rule.name == "sgd":
            # buffers of zeros are what PyTorch's first step makes of none, as long as there is no dampening
            held: Any = moments[0] if moments else [None] * len(parameters)
            momentum = self.rule.momentum if moments else 0.0
            sgd(parameters, gradients, held, momentum=momentum, dampening=0.0, nesterov=False, **options)
            return
        call: Any = adam if self.rule.name == "adam" else adamw
        options |= {"amsgrad": False, "beta1": BETAS[0], "beta2": BETAS[1], "eps": EPS}
        capturable = self.device.type == "cuda"
        call(parameters, gradients, *moments, [], self.steps[group], capturable=capturable, **options)


def _laid_out(gradient: Tensor, parameter: Tensor) -> Tensor:
    """The gradient with its parameter's strides, which the fused steps take for granted: they run through the memory.

    PyTorch sees to it where it fills .grad; a convolution of channels-last images returns channels-last gradients.
    """
    if gradient.stride() == parameter.stride():
        return gradient
    return torch.empty_like(parameter).copy_(gradient)
