"""What a passing look at a model must not change, and what must not disturb the look."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

# What no_sync sets, and what the first forward pass would do besides: broadcast buffers, plan the static graph's sum.
DDP = {
    "require_backward_grad_sync": False,
    "require_forward_param_sync": False,
    "_static_graph_delay_allreduce_enqueued": True,
}


@contextmanager
def as_before(model: nn.Module) -> Iterator[None]:
    """Leave gradients, flags and training mode as they were, and after an error buffers and random numbers, too."""
    _reshard(model)
    parameters = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    modes, buffers = [(m, m.training) for m in model.modules()], [(b, b.clone()) for b in model.buffers()]
    drawn, drawn_there = torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    for parameter, _, _ in parameters:
        parameter.grad = None
    try:
        yield
    except BaseException:
        torch.set_rng_state(drawn)
        torch.cuda.set_rng_state_all(drawn_there)
        with torch.no_grad():
            for buffer, kept in buffers:
                buffer.copy_(kept)
        raise
    finally:
        _reshard(model)
        for module, mode in modes:
            module.training = mode
        for parameter, trained, grad in parameters:
            parameter.requires_grad_(trained).grad = grad


def _reshard(model: nn.Module) -> None:
    """Let fully_shard's modules hold their shards, which are the parameters that an optimiser has."""
    modules: list[Any] = list(model.modules())
    for module in modules:
        if hasattr(module, "unshard") and hasattr(module, "reshard"):
            module.reshard()


@contextmanager
def quiet(model: nn.Module) -> Iterator[None]:
    """Run without compilation and without exchanges of DDP's own.

    A compiled layer may not call its hooks, and a process that fails would let the others wait for DDP's exchange.
    """
    with ExitStack() as undo:
        for module in model.modules():
            for flag, value in DDP.items() if isinstance(module, DistributedDataParallel) else ():
                if hasattr(module, flag):
                    undo.callback(setattr, module, flag, getattr(module, flag))
                    setattr(module, flag, value)
        if "torch._dynamo" in sys.modules:
            undo.enter_context(torch.compiler.set_stance("force_eager"))
        yield
