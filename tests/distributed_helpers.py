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
    return cd.get_deep_lora_model(network(), cd.DeepLoraConfig(r=4, init_scale=0.3, outer_ratio=0.5))


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    x, y = (part[8 * rank : 8 * rank + 8] for part in batch())
    factors = train(adapted(), DistributedDataParallel, x, y)
    torch.save(factors, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def classifier() -> nn.Module:
    """A small BERT with compressed adapters, equal in every process."""
    import transformers

    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                                     intermediate_size=24, max_position_embeddings=20, num_labels=3)  # fmt: skip
    model = transformers.BertForSequenceClassification(config).eval()
    cd.get_deep_lora_model(model, cd.DeepLoraConfig(r=4, init_scale=0.3, outer_ratio=0.5))
    batch = examples(torch.arange(8))
    cd.compress_adapters(model, lambda: model(**batch).loss, generator=torch.Generator().manual_seed(2))
    return model


def examples(rows: torch.Tensor) -> dict[str, torch.Tensor]:
    ids = torch.randint(1, 50, (16, 7), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids[rows], "labels": rows % 3}


def trained(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def through_trainer(rank: int, folder: str) -> None:
    """Train with transformers' Trainer, then with accelerate under bfloat16 autocast, as one of two processes."""
    import os

    import transformers
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    torch.set_num_threads(1)
    os.environ |= {"OMP_NUM_THREADS": "1", "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
                   "MASTER_ADDR": "127.0.0.1"}  # fmt: skip
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    model = classifier()
    if rank == 0:
        torch.save(trained(model), f"{folder}/start.pt")
    options = transformers.TrainingArguments(
        output_dir=folder, max_steps=3, per_device_train_batch_size=4, report_to=[], use_cpu=True, disable_tqdm=True,
        save_strategy="no", logging_strategy="no", ddp_backend="gloo",
    )  # fmt: skip
    rows = [{key: value[0] for key, value in examples(torch.tensor([i])).items()} for i in range(16)]
    optimiser = torch.optim.AdamW(cd.param_groups(model, 1e-2))
    transformers.Trainer(model, options, train_dataset=rows, optimizers=(optimiser, None)).train()
    torch.save(trained(model), f"{folder}/trainer{rank}.pt")
    model = classifier()
    AcceleratorState._reset_state()  # the Trainer's, without autocast
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    wrapped, optimiser = accelerator.prepare(model, torch.optim.AdamW(cd.param_groups(model, 1e-2)))
    for step in range(STEPS):
        loss = wrapped(**examples((torch.arange(8) * (step + 1) + 5 * rank) % 16)).loss
        optimiser.zero_grad()
        accelerator.backward(loss)
        optimiser.step()
    torch.save(trained(model), f"{folder}/accelerate{rank}.pt")
    torch.distributed.destroy_process_group()
