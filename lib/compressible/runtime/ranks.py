"""Processes that compute one thing together: they add up in one order, and where one fails, none waits for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from compressible.runtime.checks import one_line

Result = TypeVar("Result")
TEXT = 400  # bytes of a message that the others hear


class RankError(RuntimeError):
    """Another process failed, or has come to another place; all of them raise."""


class Ranks:
    """The processes of a group, or this one alone where torch.distributed has not been started.

    device: where the model lies, through which NCCL speaks. group: a ProcessGroup; all processes by default.
    """

    def __init__(self, device: torch.device, group: Any = None) -> None:
        started = distributed.is_available() and distributed.is_initialized()
        self.group, self.count = group, distributed.get_world_size(group) if started else 1
        self.rank = distributed.get_rank(group) if started else 0
        if started and self.rank < 0:
            raise ValueError("this process is not in group, expected one of its own")
        nccl = started and distributed.get_backend(group) == "nccl"
        here = device.type == "cuda" or not nccl
        self.device = device if here else torch.device("cuda", torch.cuda.current_device())

    def together(self, work: Callable[[], Result]) -> Result:
        """Return what `work` returns, after all have done theirs; where one failed all raise."""
        try:
            result = work()
        except RankError:  # all know of it
            raise
        except Exception as error:
            self.meet(error)
            raise
        self.meet()
        return result

    def meet(self, error: Exception | None = None, place: int = 0) -> None:
        """Wait for the others; RankError where one of them comes with an error, or to another place."""
        if self.count == 1:
            return
        failed, most, least = self._largest([0 if error is None else self.rank + 1, place, -place])
        if failed:
            text = "" if error is None or failed != self.rank + 1 else one_line(error, TEXT // 4)
            told = self._told(text)
            if error is None:
                raise RankError(f"rank {failed - 1} failed: {told}")
        elif most != -least:
            raise RankError(f"ranks are at {-least} and {most}, expected one place: does each run the same model?")

    def same(self, value: int) -> bool:
        """Whether all have the same value."""
        most, least = self._largest([value, -value])
        return most == -least

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum over all, added in place; equal bit by bit on all."""
        if self.count > 1:
            distributed.all_reduce(tensor, group=self.group)
        return tensor

    def first(self, tensor: Tensor) -> Tensor:
        """Return the first rank's tensor, in place; adding zeros asks for no rank's global number."""
        return self.sum(tensor if self.rank == 0 else tensor.zero_())

    def _largest(self, values: list[int]) -> list[int]:
        if self.count == 1:
            return values
        held = torch.tensor(values, dtype=torch.int64, device=self.device)
        distributed.all_reduce(held, distributed.ReduceOp.MAX, group=self.group)
        return held.tolist()

    def _told(self, text: str) -> str:
        held = torch.zeros(TEXT, dtype=torch.int32, device=self.device)
        spoken = text.encode()[:TEXT]
        held[: len(spoken)] = torch.tensor(list(spoken), dtype=torch.int32)
        return bytes(self.sum(held).cpu().tolist()).rstrip(b"\0").decode(errors="replace")


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor that fully_shard has split, gathered from all ranks, or one that is whole as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def spread_like(parameter: Any, tensor: Tensor) -> Tensor:
    """Return a whole tensor split over the ranks as the parameter is that takes it, if that is."""
    if not hasattr(parameter, "device_mesh"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    mesh = parameter.device_mesh
    return distribute_tensor(tensor.to(mesh.device_type), mesh, parameter.placements)
