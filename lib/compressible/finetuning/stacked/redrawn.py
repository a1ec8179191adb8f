"""LoRA's factors for one seed after the other in one model of peft's.

Most of what `get_peft_model` takes is its walk over the modules and a structure to walk over, the same for all seeds of
a config. The layers' own `update_layer`, called in the order of the walk, draws the same numbers in a fraction of that.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig
from torch import nn

from compressible.finetuning.peft_models import (
    ADAPTER,
    DRAWN,
    adapted_by_peft,
    base_of,
    chain_of,
    drawing,
    scaling_of,
    sharing,
    tuner_layers,
)
from compressible.finetuning.run import FineTuningRun
from compressible.finetuning.stacked.layers import Chain


def is_redrawable(run: FineTuningRun) -> bool:
    """Return whether the factors are all that another seed changes in a run's model."""
    marked = run.start is None or getattr(run.start, "of_factors_alone", False)
    return marked and isinstance(run.config, LoraConfig) and run.config.init_lora_weights in DRAWN


def copied(layer: Any) -> Chain:
    """Return copies of a layer's factors."""
    return [factor.detach().clone() for factor in chain_of(layer)]


class Redrawn:
    """A model of peft's that takes the factors of a seed after those of another.

    What `update_layer` draws is peft's own matter: `holds` tells whether, for the seed of the first run, it is to the
    last bit what `get_peft_model` gave.
    """

    def __init__(self, source: nn.Module, run: FineTuningRun) -> None:
        self.adapted = adapted_by_peft(sharing(source), run.config, run.seed)
        self.layers = tuner_layers(base_of(self.adapted))
        expected = {name: copied(layer) for name, layer in self.layers.items()}
        self.types = {name: [factor.dtype for factor in chain] for name, chain in expected.items()}
        self._draw(run.seed)
        self.holds = all(_are_equal(copied(layer), expected[name]) for name, layer in self.layers.items())

    def drawn(self, run: FineTuningRun) -> tuple[dict[str, Chain], dict[str, float]]:
        """Return what `get_peft_model` and the run's start give: factors by layer, and the scales of their products."""
        self._draw(run.seed)
        if run.start is not None:
            run.start(self.adapted, torch.Generator().manual_seed(int(run.seed)))  # type: ignore[operator, call-arg]
        chains = {name: copied(layer) for name, layer in self.layers.items()}
        return chains, {name: scaling_of(layer) for name, layer in self.layers.items()}

    def _draw(self, seed: int) -> None:
        config = self.adapted.peft_config[ADAPTER]
        with drawing(self.adapted, seed):
            for name, layer in self.layers.items():
                layer.update_layer(ADAPTER, layer.r[ADAPTER], lora_alpha=layer.lora_alpha[ADAPTER], config=config)
                for factor, kind in zip(chain_of(layer), self.types[name], strict=True):
                    factor.data = factor.data.to(kind)  # as peft has it of half types, after its walk


def _are_equal(found: Chain, expected: Chain) -> bool:
    pairs = zip(found, expected, strict=True)
    return all(one.dtype is other.dtype and torch.equal(one, other) for one, other in pairs)
