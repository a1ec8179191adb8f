"""A run that cannot be stacked: peft's own model of it, in a pass by itself."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft import initialize_lora_eva_weights
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.loraga import preprocess_loraga
from torch import Tensor, nn

from compressible.adapters.compressed_init import compress_adapters
from compressible.finetuning.batches import PassRows
from compressible.finetuning.drawing import seeded
from compressible.finetuning.peft_models import (
    ADAPTER,
    GradientStart,
    adapted_by_peft,
    attending,
    base_of,
    chain_of,
    drawn_start,
    on_meta,
    saved_linears,
    saved_wholes,
    starts_compressed,
    tuner_layers,
)
from compressible.finetuning.run import FineTuningRun, fresh_head
from compressible.finetuning.stacked.grouped_factors import ChainGroups
from compressible.finetuning.stacked.heads import Rated, StackedLinear, stack_heads


class AloneModel(nn.Module):
    """The PeftModel of one run over a copy of the base; before `begin` it is the copy alone."""

    def __init__(self, source: nn.Module, run: FineTuningRun, rows: PassRows, half: bool) -> None:
        super().__init__()
        self.runs, self.rows, self.chains = [run], rows, ChainGroups()
        vars(self)["source"] = source  # no part of this model
        model = copy.deepcopy(source)  # some starts change the weights in place
        copies = zip(model.parameters(), source.parameters(), strict=True)
        vars(self)["given"] = {id(own): given for own, given in copies}
        model = attending(model)
        self.inner: Any = (model.to(torch.bfloat16) if half else model).requires_grad_(False)

    def forward(self, **tokens: Tensor) -> Any:
        """What the model makes of rows of its run."""
        return self.inner(**tokens)

    def begin(self, losses: Callable[[], Tensor], batches: Iterable[dict[str, Tensor]]) -> None:
        """Adapt the model and bring it to its start; losses is the first loss, batches are what EVA looks at."""
        (run,) = self.runs
        config: Any = copy.deepcopy(run.config)
        source: Any = vars(self)["source"]
        start = getattr(config, "init_lora_weights", None)
        if start == "lora_ga":
            with self._fresh_heads():
                preprocess_loraga(self.inner, config, lambda: losses().backward())
        if start == "corda":
            preprocess_corda(self.inner, config, lambda: self._read_each(next(iter(batches))))
        assert not isinstance(run.start, GradientStart)  # which `structure` refuses for what goes alone
        model = adapted_by_peft(self.inner, config, run.seed, run.start)
        if start == "eva":
            with seeded(next(model.parameters()).device, int(run.seed)):  # layers that it knows nothing of are drawn
                initialize_lora_eva_weights(model.eval(), list(batches), show_progress_bar=False)
        stack_heads(base_of(model), source, self.runs, self.rows)
        self.inner = model
        if starts_compressed(config):
            compress_adapters(model, losses, generator=torch.Generator().manual_seed(int(run.seed)))
        self._check_precision()

    @torch.no_grad()
    def _read_each(self, tokens: dict[str, Tensor]) -> None:
        """Read rows one by one, since peft's CorDA takes the inputs of one row at a time."""
        for row in range(len(next(iter(tokens.values())))):
            self.inner(**{name: value[row : row + 1] for name, value in tokens.items()})

    def rated(self) -> Rated:
        """Return every trained tensor but the heads, and its rate."""
        (run,) = self.runs
        base = base_of(self.inner)
        rates: dict[int, float] = {}
        for layer in tuner_layers(base).values():
            chain, embedding = chain_of(layer), isinstance(layer.get_base_layer(), nn.Embedding)
            rates |= {id(p): run.factor_lr(at, len(chain), embedding) for at, p in enumerate(chain)}
        whole = run.lr if run.head_lr is None else run.head_lr
        rates |= {id(p): whole for module in saved_wholes(base).values() for p in module.parameters()}
        return [(p, torch.tensor(rates.get(id(p), run.lr), dtype=torch.float64)) for _, p in self._trained()]

    def updates(self) -> Iterator[tuple[str, Callable[[], Tensor]]]:
        """Yield the layer's name and what gives its update (1, m, n); ValueError of a method without such."""
        for name, layer in tuner_layers(base_of(self.inner)).items():
            if not hasattr(layer, "get_delta_weight"):
                kind = type(layer).__name__
                raise ValueError(f"{name!r} is adapted by {kind}, whose update is no matrix: expected no watch")
            yield name, partial(_update, layer)

    def factors(self) -> Iterator[tuple[str, list[list[Tensor]]]]:
        """Yield the layer's name and its run's factors; none of a method without such."""
        for name, layer in tuner_layers(base_of(self.inner)).items():
            yield name, [[factor.detach().clone() for factor in chain_of(layer)]]

    @torch.no_grad()
    def finite(self) -> Tensor:
        """Return (1,) whether all that is trained is finite."""
        first = next(iter(self._trained()))[1]
        return torch.tensor([all(bool(p.isfinite().all()) for _, p in self._trained())], device=first.device)

    def left(self, _: int) -> dict[str, Any]:
        """Return what a history keeps of the run beside its heads: factors, what else was trained or changed, config.

        The config is the one that peft ended with: EVA moves ranks between layers, prompts take sizes from the model.
        """
        layers = tuner_layers(base_of(self.inner))
        chains = {name: chain_of(layer) for name, layer in layers.items()}
        held = {id(factor) for chain in chains.values() for factor in chain}
        others = {name: p.detach().clone() for name, p in self._trained() if id(p) not in held}
        for name, layer in layers.items():
            own, given = layer.get_base_layer().weight, self._given(name, layer)
            if given is not None and (not own.is_floating_point() or own.shape != given.shape):
                continue  # a quantised one, which may pack itself anew
            if given is None or not torch.equal(own, given.to(own.dtype)):  # PiSSA, for one, takes its start off it
                others[f"base_model.model.{name}.base_layer.weight"] = own.detach().clone()
        copies = {name: [factor.detach().clone() for factor in chain] for name, chain in chains.items() if chain}
        return {"chains": copies, "others": others, "config": copy.deepcopy(self.inner.peft_config[ADAPTER])}

    def _given(self, name: str, layer: Any) -> Tensor | None:
        """The weight of the source from which an adapted layer's frozen one came, if it came from one.

        Repeated layers and wrapped tables have names of their own, but the tensor of one of the source's copies.
        """
        source: Any = vars(self)["source"]
        try:
            return source.get_submodule(name).weight
        except AttributeError:
            return vars(self)["given"].get(id(layer.get_base_layer().weight))

    def _trained(self) -> list[tuple[str, nn.Parameter]]:
        """Names and tensors of what is trained, the heads, which are like a stack's, aside."""
        heads = [m for m in self.inner.modules() if isinstance(m, StackedLinear)]
        apart = {id(p) for head in heads for p in head.parameters()}
        return [(n, p) for n, p in self.inner.named_parameters() if p.requires_grad and id(p) not in apart]

    def _check_precision(self) -> None:
        for name, parameter in self._trained():
            if torch.finfo(parameter.dtype).bits < 32:
                at = name.removeprefix("base_model.model.")
                raise ValueError(f"{at!r} would be trained in {parameter.dtype}, expected float32: leave it frozen")

    @contextmanager
    def _fresh_heads(self) -> Iterator[None]:
        """Give the base the heads that the run begins with, whose gradients its start takes."""
        (run,) = self.runs
        adapted = base_of(adapted_by_peft(on_meta(self.inner), drawn_start(run.config), empty=True))
        heads: dict[str, Any] = {name: self.inner.get_submodule(name) for name, _ in saved_linears(adapted)}
        before = {name: (head.weight.data, head.bias) for name, head in heads.items()}
        for name, head in heads.items():
            weight, bias = fresh_head(head, run, name)
            head.weight.data = weight.to(head.weight.dtype)
            head.bias = None if head.bias is None else nn.Parameter(bias.to(head.weight.dtype), False)
        try:
            yield
        finally:
            for name, head in heads.items():
                head.weight.data, head.bias = before[name]


def _update(layer: Any) -> Tensor:
    """The update (1, m, n) of a layer of peft's, whatever the layout of its weight."""
    with torch.no_grad():
        update = layer.get_delta_weight("default")
    base = layer.get_base_layer()
    turned = isinstance(base, nn.Embedding) or type(base).__name__ == "Conv1D"
    return (update.mT if turned else update)[None]
