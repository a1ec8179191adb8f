"""One of two processes that train Deep LoRA together; `test_distributed` compares them with one process alone.

Every scenario runs in the same two processes, since starting them takes longer than what they do, and returns tensors
and texts, which the test reads.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

import peft
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import compressible as cd

STEPS, ROWS = 4, 8
SCENARIOS: dict[str, Callable[..., Any]] = {}


def scenario(function: Callable) -> Callable:
    SCENARIOS[function.__name__] = function
    return function


class Branches(nn.Module):
    """Two middles of which a rank may use one alone, or in an order of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(12, 10)
        self.middles = nn.ModuleList([nn.Linear(10, 10), nn.Linear(10, 10)])
        self.norm = nn.BatchNorm1d(10, momentum=0.0)  # buffers, which DDP exchanges in each forward pass
        self.last = nn.Linear(10, 3)

    def forward(self, x: torch.Tensor, use: tuple[int, ...] = (0, 1)) -> torch.Tensor:
        x = self.first(x).tanh()
        for at in use:
            x = x + self.middles[at](x).tanh()
        return self.last(x + 0 * self.norm(x.detach()))


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.randn(2 * ROWS, 12, generator=g), torch.randint(0, 3, (2 * ROWS,), generator=g)


def adapted(device: str = "cpu", **options: Any) -> nn.Module:
    """The same model in every process, whose last layer is trained whole."""
    torch.manual_seed(0)
    settings = {"r": 4, "init_scale": 0.3, "lr_ratio": 0.5, "modules_to_save": ["last"]} | options
    return peft.get_peft_model(Branches(), cd.DeepLoraConfig(**settings)).to(device)


def rows(rank: int | None, device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """A rank's half of the batch, or all of it."""
    part = slice(None) if rank is None else slice(ROWS * rank, ROWS * (rank + 1))
    x, y = batch()
    return x[part].to(device), y[part].to(device)


def compress(model: nn.Module, loss: Callable, rank: int | None = None, **options: Any) -> dict:
    """Each rank has a seed of its own, of which the first one's counts."""
    return cd.compress_adapters(model, loss, generator=torch.Generator().manual_seed(2 + (rank or 0)), **options)


def train(model: nn.Module, loss: Callable) -> None:
    optimizer = torch.optim.SGD(cd.param_groups(model, 0.5))
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()


def trained(model: nn.Module) -> dict[str, torch.Tensor]:
    """All that is trained, whole, on the CPU, by its name in the base model."""
    found = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    whole = {name: p.full_tensor() if hasattr(p, "full_tensor") else p for name, p in found.items()}
    return {name.split("base_model.model.")[-1]: p.cpu().clone() for name, p in whole.items()}


def started_and_trained(
    wrap: Callable[[nn.Module], nn.Module],
    rank: int | None,
    device: str = "cpu",
    first: bool = True,
    inner: bool = False,
    use: tuple[int, ...] = (0, 1),
) -> dict[str, dict[str, torch.Tensor]]:
    """Wrap before or after the start, and take a few steps; inner: the start is told of the model within."""
    model = adapted(device)
    x, y = rows(rank, device)
    whole = wrap(model) if first else model
    compress(model if inner else whole, lambda: nn.functional.cross_entropy(whole(x, use), y), rank)
    start = trained(whole)
    whole = whole if first else wrap(model)
    train(whole, lambda: nn.functional.cross_entropy(whole(x, use), y))
    return {"start": start, "end": trained(whole)}


def alone(device: str = "cpu") -> dict[str, dict[str, torch.Tensor]]:
    """What one process makes of the whole batch."""
    return started_and_trained(lambda model: model, None, device)


@scenario
def ddp_first(rank: int, folder: str) -> Any:
    return started_and_trained(DistributedDataParallel, rank)


@scenario
def ddp_first_inner(rank: int, folder: str) -> Any:
    return started_and_trained(DistributedDataParallel, rank, inner=True)


@scenario
def ddp_after(rank: int, folder: str) -> Any:
    return started_and_trained(DistributedDataParallel, rank, first=False)


@scenario
def ddp_find_unused(rank: int, folder: str) -> Any:
    return started_and_trained(lambda model: DistributedDataParallel(model, find_unused_parameters=True), rank)


@scenario
def ddp_static_graph(rank: int, folder: str) -> Any:
    return started_and_trained(lambda model: DistributedDataParallel(model, static_graph=True), rank)


def sharded(device: str = "cpu") -> Callable[[nn.Module], nn.Module]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    def wrap(model: nn.Module) -> nn.Module:
        mesh = init_device_mesh(device, (2,))
        for layer in model.base_model.model.middles:
            fully_shard(layer, mesh=mesh)
        return fully_shard(model, mesh=mesh)

    return wrap


@scenario
def fsdp2_first(rank: int, folder: str) -> Any:
    return started_and_trained(sharded(), rank)


@scenario
def fsdp2_after(rank: int, folder: str) -> Any:
    return started_and_trained(sharded(), rank, first=False)


@scenario
def through_accelerate(rank: int, folder: str) -> Any:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    model = adapted()
    model = accelerator.prepare(model)
    x, y = rows(rank)
    compress(model, lambda: nn.functional.cross_entropy(model(x), y), rank)
    optimizer = accelerator.prepare(torch.optim.SGD(cd.param_groups(model, 0.5)))
    start = trained(model)
    for _ in range(STEPS):
        optimizer.zero_grad()
        accelerator.backward(nn.functional.cross_entropy(model(x), y))
        optimizer.step()
    return {"start": start, "end": trained(model)}


@scenario
def through_trainer(rank: int, folder: str) -> Any:
    import adapter_helpers as helpers
    import transformers

    torch.manual_seed(5)  # of both ranks, for what peft and transformers draw
    model = peft.get_peft_model(helpers.base("bert"), cd.DeepLoraConfig(r=4, init_scale=0.3, task_type="SEQ_CLS"))
    given = helpers.batch("bert", rows=4, seed=rank)
    compress(model, lambda: model(**given).loss, rank)
    start = trained(model)
    options = transformers.TrainingArguments(
        output_dir=folder, max_steps=3, per_device_train_batch_size=4, report_to=[], use_cpu=True, disable_tqdm=True,
        save_strategy="no", logging_strategy="no", ddp_backend="gloo",
    )  # fmt: skip
    table = helpers.batch("bert", rows=16)
    data = [{key: value[at] for key, value in table.items()} for at in range(16)]
    optimizer = cd.create_deep_lora_optimizer(model, torch.optim.AdamW, lr=1e-2)
    transformers.Trainer(model, options, train_dataset=data, optimizers=(optimizer, None)).train()
    return {"start": start, "end": trained(model)}


@scenario
def ranks_use_other_layers(rank: int, folder: str) -> Any:
    """One layer sees one rank's rows alone; the start equals one process's that does the same."""
    return _start_from([(0,), (1, 0)][rank], rank)


@scenario
def ranks_use_another_order(rank: int, folder: str) -> Any:
    return _start_from([(0, 1), (1, 0)][rank], rank)


def _start_from(use: tuple[int, ...], rank: int) -> dict[str, torch.Tensor]:
    model = adapted()
    x, y = rows(rank)
    compress(model, lambda: nn.functional.cross_entropy(model(x, use), y), rank, batches=2)  # the same twice
    return trained(model)


def start_alone(uses: list[tuple[int, ...]]) -> dict[str, torch.Tensor]:
    model, (x, y) = adapted(), batch()
    parts = [(x[ROWS * rank :][:ROWS], y[ROWS * rank :][:ROWS], use) for rank, use in enumerate(uses)]
    compress(model, lambda: sum(nn.functional.cross_entropy(model(x, use), y) for x, y, use in parts))
    return trained(model)


class Fails(torch.autograd.Function):
    """The identity, which fails on the way back."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        raise OSError("the disk is full")


def _failing(trouble: str, model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    if trouble == "before":
        raise OSError("no more rows")
    if trouble == "backward":
        inner = model.module.base_model.model
        x = inner.first(x).tanh()
        return nn.functional.cross_entropy(inner.last(Fails.apply(inner.middles[0](x)) + inner.middles[1](x)), y)
    loss = nn.functional.cross_entropy(model(x), y)
    if trouble == "gradient":
        return loss + (0 * model(x).sum()).sqrt()
    return loss * torch.nan if trouble == "loss" else loss


@scenario
def one_rank_fails(rank: int, folder: str, device: str = "cpu") -> Any:
    """Both ranks raise, with the reason, and both are as before; a rank that does not would wait for ever."""
    result = {}
    model = DistributedDataParallel(adapted(device))
    x, y = rows(rank, device)
    for trouble in ("before", "loss", "backward", "gradient"):
        before = {name: value.clone() for name, value in model.state_dict().items()}
        try:
            compress(model, lambda trouble=trouble: _failing(trouble if rank else "none", model, x, y), rank)
        except Exception as error:
            after = model.state_dict()
            same = all(torch.equal(value, after[name]) for name, value in before.items())
            result[trouble] = f"{type(error).__name__}: {error}", same
    compress(model, lambda: _failing("none", model, x, y), rank)
    return result | {"start": trained(model)}


@scenario
def left_out(rank: int, folder: str) -> Any:
    x, y = rows(rank)
    model = adapted()
    loss = lambda: nn.functional.cross_entropy(model(x, (1,)), y)  # noqa: E731
    report = compress(model, loss, rank, unreached="leave_out")
    wrapped = DistributedDataParallel(adapted())
    try:
        compress(wrapped, lambda: nn.functional.cross_entropy(wrapped(x, (1,)), y), rank, unreached="leave_out")
        text = "no error"
    except RuntimeError as error:
        text = str(error)
    return {"left_out": report["left_out"], "text": text, "start": trained(model)}


@scenario
def fsdp2_saves(rank: int, folder: str) -> Any:
    model = sharded()(adapted())
    x, y = rows(rank)
    loss = lambda: nn.functional.cross_entropy(model(x), y)  # noqa: E731
    compress(model, loss, rank)
    train(model, loss)
    model.save_pretrained(f"{folder}/saved", is_main_process=rank == 0)
    torch.distributed.barrier()
    torch.manual_seed(0)
    again = peft.PeftModel.from_pretrained(Branches(), f"{folder}/saved")
    return {"there": model(x).detach(), "again": again(x).detach()}


def on_gpus(rank: int, folder: str) -> dict[str, Callable[[], Any]]:
    """What two GPUs are tried with, through NCCL."""
    device = f"cuda:{rank}"

    def autocast() -> Any:
        model = DistributedDataParallel(adapted(device), device_ids=[rank])
        x, y = rows(rank)  # on the CPU: DDP brings them
        with torch.autocast("cuda", torch.bfloat16):
            compress(model, lambda: nn.functional.cross_entropy(model(x), y.to(device)), rank)
        return {"start": trained(model)}

    def flattened() -> Any:
        from torch.distributed.fsdp import FullyShardedDataParallel

        model = FullyShardedDataParallel(adapted(device), use_orig_params=True, device_id=rank)
        try:
            compress(model, lambda: model(rows(rank, device)[0]).square().sum(), rank)
        except ValueError as error:
            return {"text": str(error)}
        return {"text": "no error"}

    return {
        "ddp_first": lambda: started_and_trained(DistributedDataParallel, rank, device),
        "fsdp2_first": lambda: started_and_trained(sharded("cuda"), rank, device),
        "fsdp2_after": lambda: started_and_trained(sharded("cuda"), rank, device, first=False),
        "one_rank_fails": lambda: one_rank_fails(rank, folder, device),
        "autocast": autocast,
        "flattened": flattened,
    }


def work(rank: int, folder: str) -> None:
    """Run all scenarios on the CPU and keep what each returns, or how it failed."""
    _meet(rank, folder, "gloo")
    _run({name: functools.partial(function, rank, folder) for name, function in SCENARIOS.items()}, rank, folder)


def work_on_gpus(rank: int, folder: str) -> None:
    """The same with NCCL on a GPU a rank."""
    torch.cuda.set_device(rank)
    torch.backends.cuda.matmul.allow_tf32 = False
    _meet(rank, folder, "nccl")
    _run(on_gpus(rank, folder), rank, folder)


def _meet(rank: int, folder: str, backend: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {"OMP_NUM_THREADS": "1", "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
                   "MASTER_ADDR": "127.0.0.1"}  # fmt: skip
    torch.distributed.init_process_group(backend, init_method=f"file://{folder}/meet", rank=rank, world_size=2,
                                         timeout=datetime.timedelta(seconds=60))  # fmt: skip


def _run(scenarios: dict[str, Callable[[], Any]], rank: int, folder: str) -> None:
    for name, function in scenarios.items():
        result: Any = None
        with contextlib.redirect_stdout(sys.stderr):
            try:
                result = function()
            except Exception:
                result = traceback.format_exc()
        torch.save(result, f"{folder}/{name}{rank}.pt")
    torch.distributed.destroy_process_group()
