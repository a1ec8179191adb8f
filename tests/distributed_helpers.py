"""One of two processes that train Deep LoRA together; the test compares them with one process alone."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import compressible as cd

STEPS = 4


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 8))


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.randn(16, 12, generator=g), torch.randn(16, 8, generator=g)


def train(model: nn.Module, wrap, x: torch.Tensor, y: torch.Tensor) -> list[torch.Tensor]:
    """Compress on (x, y), take a few steps, and return the factors."""
    cd.compress_adapters(model, lambda: nn.functional.mse_loss(model(x), y), generator=torch.Generator().manual_seed(2))
    optimiser = torch.optim.SGD(cd.param_groups(model, 0.5))
    wrapped = wrap(model)
    for _ in range(STEPS):
        loss = nn.functional.mse_loss(wrapped(x), y)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return [factor.detach().clone() for adapter in (model[0], model[2]) for factor in adapter.factors]


def adapted() -> nn.Module:
    return cd.get_deep_lora_model(network(), cd.DeepLoraConfig(r=4, init_scale=0.3, lr_ratio=0.5))


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    x, y = (part[8 * rank : 8 * rank + 8] for part in batch())
    factors = train(adapted(), DistributedDataParallel, x, y)
    torch.save(factors, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()
