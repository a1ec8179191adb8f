"""Gradients of layers' weights and their leading directions, seen at the layers' outputs, of all processes together.

A layer's gradient is summed from what goes into the layer and what comes back to its output, so that its weight may be
quantised, sharded or frozen; it is decomposed at once, and let go.

What NCCL and gloo need is the same order of exchanges everywhere. So ranks meet after each forward pass, where one
that failed says so; layers are summed on the way back if all ranks called them in one order, each after a short
exchange that a failing rank joins, too, and otherwise at the end, in the order of the sinks.
"""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from compressible.runtime.ranks import Ranks


class GradientSink:
    """Collects the gradients (R, m, n) of a layer's weight, sum over tokens of grad_out x^T, a run each.

    batches come run by run, (S * B, ...), of which the runs `which` count. After the last use in the `last` batch, or
    in `finish`, the gradients pass through `reduce` and go; what is left are `frames`, their `rank` leading left
    (R, m, rank) and right (R, n, rank) singular vectors, and `largest` (R,), the largest absolute values.
    """

    def __init__(self, layer: nn.Module, rank: int, runs: int = 1, which: Sequence[int] = (0,)) -> None:
        self.ids = layer if isinstance(layer, nn.Embedding) else None
        self.rank, self.runs, self.which = rank, runs, list(which)
        self.pending, self.counting, self.hidden, self.last, self.uses = 0, True, False, True, 0
        self.reduce: Callable[[Tensor], Tensor] = lambda total: total
        self.total: Tensor | None = None
        self.token = torch.zeros((), requires_grad=True)  # makes frozen layers recorded
        self.frames: tuple[Tensor, Tensor] | None = None
        self.largest: Tensor | None = None

    def watch(self, x: Tensor, out: Tensor) -> Tensor:
        """Pass `out` (..., m) on and take its gradient on the way back; x (..., n), or ids for an embedding."""
        if self.counting:  # not when a checkpoint calls the layer again on the way back
            self.pending += torch.is_grad_enabled()  # a layer may be used several times
            self.hidden |= not torch.is_grad_enabled()
        return _Probe.apply(x, out, self.token, self)

    def add(self, x: Tensor, grad: Tensor) -> None:
        """Add one use of the layer; after the last of the last batch decompose and let the gradients go."""
        if self.largest is not None:
            raise RuntimeError("a layer's gradient came after its last use: expected all uses before the backward pass")
        # float32 at least: a bfloat16 gradient has too few digits for its singular vectors
        kind = torch.promote_types(grad.dtype, torch.float32)
        grad = self._chosen(grad.reshape(self.runs, -1, grad.shape[-1])).to(kind)
        x = self._chosen(x.to(grad.device).reshape(self.runs, -1, *(x.shape[-1:] if self.ids is None else ())))
        with torch.autocast(grad.device.type, enabled=False):  # which is on again in a GPU's backward pass
            gradient = grad.mT @ x.to(kind) if self.ids is None else torch.stack([*map(self._by_id, x, grad)]).mT
        self.total = gradient if self.total is None else self.total + gradient
        self.pending, self.uses = self.pending - 1, self.uses + 1
        if self.last and not self.pending:
            self.finish()

    def finish(self) -> bool:
        """Decompose what uses without gradient, a checkpointed forward pass or a batch without the layer held up."""
        if self.total is not None:
            total = self.reduce(self.total)
            self.largest, self.total = total.abs().amax((-2, -1)), None
            self.keep(total)
        return self.largest is not None

    def keep(self, total: Tensor) -> None:
        """Take what is left of the gradients (R, m, n)."""
        self.frames = top_frames(total, self.rank)

    def _by_id(self, ids: Tensor, grad: Tensor) -> Tensor:
        """Sum the gradients of the same ids, (vocabulary, m); the padding's is none, as in the layer's own backward."""
        layer: Any = self.ids
        summed = grad.new_zeros(layer.num_embeddings, grad.shape[-1]).index_add_(0, ids, grad)
        if layer.padding_idx is not None:
            summed[layer.padding_idx] = 0
        return summed

    def _chosen(self, stacked: Tensor) -> Tensor:
        return stacked if len(self.which) == self.runs else stacked[self.which]


class WholeGradients(GradientSink):
    """Keeps the gradients as they are, `whole` (R, m, n), for starts that ask for more than leading directions."""

    def __init__(self, layer: nn.Module, runs: int = 1, which: Sequence[int] = (0,)) -> None:
        super().__init__(layer, 0, runs, which)
        self.whole: Tensor | None = None

    def keep(self, total: Tensor) -> None:
        """Take the gradients whole."""
        self.whole = total


def first_gradients(
    loss_step: Callable[[], Tensor],
    modules: Mapping[str, nn.Module],
    sinks: Mapping[str, GradientSink],
    batches: int,
    blank: Callable[[str], Tensor],
    ranks: Ranks,
) -> None:
    """Let the sinks see, and decompose, the summed gradients of modules of the same names over `batches` calls.

    blank gives the gradient (1, m, n) of a module that this process did not meet, as the others have it.
    """
    with watched(modules, sinks) as calls:
        collect(loss_step, sinks, batches, calls, ranks)
    ranks.together(lambda: decompose(sinks, blank, ranks))


def collect(
    loss_step: Callable[[], Tensor], sinks: Mapping[str, GradientSink], batches: int, calls: list[str], ranks: Ranks
) -> None:
    """Add up the gradients of all batches; in the last, layers are decomposed at once if all ranks meet them alike."""
    for place, sink in enumerate(sinks.values(), 1):
        sink.reduce = functools.partial(_summed, ranks, place)
    for batch in range(batches):
        calls.clear()
        for sink in sinks.values():
            sink.pending, sink.counting, sink.hidden = 0, True, False
        with torch.enable_grad():
            loss = ranks.together(lambda: _checked(loss_step()))
        at_once = batch == batches - 1 and ranks.same(zlib.crc32(repr(calls).encode()))
        for sink in sinks.values():
            sink.counting, sink.last = False, at_once
        ranks.together(functools.partial(_backward, loss, list(sinks.values())))


@contextmanager
def watched(modules: Mapping[str, nn.Module], sinks: Mapping[str, GradientSink]) -> Iterator[list[str]]:
    """Show the sinks what modules of the same names take and give; yields these names as the modules are called."""
    calls: list[str] = []

    def shown(name: str, _: nn.Module, args: tuple, kwargs: dict, out: Tensor) -> Tensor:
        calls.append(name)
        return sinks[name].watch(args[0] if args else kwargs["x"], out)

    with ExitStack() as undo:
        for name, module in modules.items():
            hook = functools.partial(shown, name)
            undo.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
        yield calls


def _summed(ranks: Ranks, place: int, total: Tensor) -> Tensor:
    ranks.meet(place=place)
    return ranks.sum(total)


def _checked(loss: object) -> Tensor:
    given = f"{type(loss).__name__} of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise ValueError(f"loss_step returned {given}, expected the loss, one number that a tensor holds")
    if not loss.requires_grad:
        raise RuntimeError("no gradient reached the loss: loss_step met no adapted layer, or ran under torch.no_grad")
    if not torch.isfinite(loss):
        raise RuntimeError(f"loss_step returned {loss.item()}, expected a finite loss")
    return loss.reshape(())


def _backward(loss: Tensor, sinks: list[GradientSink]) -> None:
    """Towards the sinks alone, unless a layer ran without gradients: reentrant checkpoints go all the way or refuse."""
    hidden = any(sink.hidden and not sink.pending for sink in sinks)
    torch.autograd.backward(loss, inputs=None if hidden else [sink.token for sink in sinks])


def decompose(sinks: Mapping[str, GradientSink], blank: Callable[[str], Tensor], ranks: Ranks) -> None:
    """Sum and decompose what is left, in the order of the sinks; what a rank alone did not meet is `blank` there."""
    met = [sink.frames is not None or sink.total is not None for sink in sinks.values()]
    reached = ranks.sum(torch.tensor(met, dtype=torch.int32, device=ranks.device)).tolist()
    for (name, sink), count in zip(sinks.items(), reached, strict=True):
        if count and sink.frames is None:
            sink.total = blank(name) if sink.total is None else sink.total
            sink.finish()


def silent(sinks: Mapping[str, GradientSink]) -> list[str]:
    """Return the layers whose gradient is zero or missing; RuntimeError where all are so, or one is not finite."""
    largest = {name: 0.0 if sink.largest is None else sink.largest.item() for name, sink in sinks.items()}
    broken = [name for name, value in largest.items() if not math.isfinite(value)]
    if broken:
        todo = f"exclude_modules={broken} in the config, or other batches, or a scaled loss under float16"
        raise RuntimeError(f"the gradient of {broken[0]!r} holds {largest[broken[0]]}, expected finite numbers: {todo}")
    found = [name for name, value in largest.items() if value == 0]
    if len(found) == len(sinks):
        raise RuntimeError(
            f"no gradient, or zero alone, reached {found[0]!r} or any other layer: is the loss constant?"
        )
    return found


def unreached(model: nn.Module, sinks: Mapping[str, GradientSink], leave_out: bool) -> list[str]:
    """Return the layers without a gradient, if they may be left out; RuntimeError if not."""
    found = silent(sinks)
    if found and not leave_out:
        todo = f'unreached="leave_out", exclude_modules={found} in the config, or more batches (batches=2)'
        raise RuntimeError(f"no gradient, or zero alone, reached {found[0]!r} and {len(found) - 1} more layers: {todo}")
    wrapped = any(isinstance(module, DistributedDataParallel) for module in model.modules())
    if found and (wrapped or any(hasattr(p, "device_mesh") for p in model.parameters())):
        when = "only before DistributedDataParallel or fully_shard wrap the model"
        raise RuntimeError(f"{found} can be left out {when}")
    return found


def top_frames(gradient: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the leading left (..., m, rank) and right (..., n, rank) singular vectors of gradients (..., m, n).

    From the eigenvectors of the smaller Gram matrix in float64, which a GPU finds many times faster than an SVD; the
    other side is its image, made orthonormal again.
    """
    kind, tall = gradient.dtype, gradient.shape[-2] > gradient.shape[-1]
    wide = (gradient.mT if tall else gradient).double()
    scale = wide.abs().amax((-2, -1), keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    wide = wide / scale
    finite = wide.isfinite().all(-1, keepdim=True).all(-2, keepdim=True)  # one diverged run must not stop the others
    wide = torch.where(finite, wide, 0.0)
    small = torch.linalg.eigh(wide @ wide.mT).eigenvectors[..., -rank:].flip(-1)
    other = torch.linalg.qr(wide.mT @ small)
    signs = other.R.diagonal(dim1=-2, dim2=-1).sign()
    large = other.Q * torch.where(signs == 0, 1.0, signs)[..., None, :]
    left, right = (large, small) if tall else (small, large)
    return torch.where(finite, left, torch.nan).to(kind), torch.where(finite, right, torch.nan).to(kind)


class _Probe(torch.autograd.Function):
    """The identity on `out`, whose backward pass shows the gradient to a sink."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, out: Tensor, token: Tensor, sink: GradientSink) -> Tensor:
        ctx.save_for_backward(x)
        ctx.sink = sink
        return out.clone()  # a view could not be changed in place, as activations do

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, Tensor, None]:
        ctx.sink.add(ctx.saved_tensors[0], grad)
        return None, grad, torch.zeros(()), None
