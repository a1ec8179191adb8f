"""The compressed start of Deep LoRA: outer factors from the gradient of the first batch (P1, section 4).

The literal construction starts from full-width factors eps Q_l, takes the gradient of W_1 and keeps 2 r' = r
directions of it. It needs Q = Q_L ... Q_1 only through its action on r vectors, and Q is random: for the gradient G
(m, n) of the layer, with top singular vectors P, Z (r' each), the directions are span[Z, Q^T P], where Q^T P = H is a
uniformly random frame; Q takes H to P and what Z has beside H to a random frame orthogonal to P. So one thin SVD of G
and two random frames replace all d x d factors. A layer's gradient is taken on the way back, decomposed at once, and
let go.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from compressible.adapters.config import DeepLoraConfig
from compressible.adapters.layer import Layer, adapted, adapters, factor_dtype, layer_shape
from compressible.runtime import devices


def compress_adapters(
    model: nn.Module,
    loss_step: Callable[[], Tensor],
    batches: int = 1,
    generator: torch.Generator | None = None,
    restart: bool = False,
) -> dict[str, float]:
    """Give every adapter of variant "compressed" its factors from the gradients of `batches` calls of `loss_step`.

    With one batch each layer's gradient lives only until its SVD; with several, one gradient a layer is held on its
    device. Over several processes the gradients are averaged, so that all get the same factors.

    Args:
        model: of `get_deep_lora_model`, also behind torch.compile or DistributedDataParallel.
        loss_step: runs the model on one batch and returns the loss, a tensor ().
        batches: how many gradients are added up, usually 1.
        generator: of the CPU, for the random half of the frames; of the same seed in all processes.
        restart: whether factors that are there already are drawn anew.

    Returns:
        {"seconds": wall clock, "peak_bytes": on the GPU, 0 on a CPU}.

    Raises:
        ValueError: if batches < 1, no adapter is of that variant or, unless `restart`, there are factors already.
        RuntimeError: if the loss is not finite or a layer saw no gradient.

    Example:
        >>> import compressible as cd
        >>> import torch
        >>> from torch import nn
        >>> model = cd.get_deep_lora_model(nn.Sequential(nn.Linear(8, 4)), cd.DeepLoraConfig(r=2))
        >>> x = torch.arange(24.0).reshape(3, 8)
        >>> report = cd.compress_adapters(model, lambda: model(x).square().mean())
        >>> [tuple(factor.shape) for factor in model[0].factors]
        [(2, 8), (2, 2), (2, 2), (2, 2), (4, 2)]

    Reference:
        P1 (Yaras et al. 2024), section 4: outer factors from the first gradient, between them `depth` times eps I.
    """
    model = adapted(model)
    if batches < 1:
        raise ValueError(f"batches is {batches}, expected at least 1")
    found = {name: adapter for name, adapter in adapters(model).items() if adapter.config.variant == "compressed"}
    if not found:
        raise ValueError(f"{type(model).__name__} has no adapter of variant 'compressed', expected at least one")
    if any(len(adapter.factors) for adapter in found.values()) and not restart:
        anew = "restart=True draws new ones, after which an optimiser must be made anew"
        raise ValueError(f"the adapters have their factors already, expected none: {anew}")
    if generator is None:
        generator = torch.Generator().manual_seed(torch.initial_seed() % 2**63)
    sinks = {name: GradientSink(adapter.base, adapter.config.r // 2, shared=True) for name, adapter in found.items()}
    device, began = str(next(iter(found.values())).weight.device), time.perf_counter()
    with devices.peak_inside(device) as peak:
        try:
            for name, adapter in found.items():
                adapter.probe = sinks[name].watch
            _run(loss_step, list(sinks.values()), batches)
        finally:
            for adapter in found.values():
                adapter.probe = None
        finish(sinks)
        for name, adapter in found.items():
            left, right = (side[0] for side in sinks[name].frames or ())
            chain = compressed_chain(left, right, adapter.shape, adapter.config, generator)
            adapter.factors = nn.ParameterList([nn.Parameter(f.to(factor_dtype(adapter.base))) for f in chain])
        devices.synchronize(device)
        held = peak() if device != "cpu" else 0
    return {"seconds": time.perf_counter() - began, "peak_bytes": float(held)}


def _run(loss_step: Callable[[], Tensor], sinks: list[GradientSink], batches: int) -> None:
    for batch in range(batches):
        for sink in sinks:
            sink.last = batch == batches - 1
        # Only towards the sinks: what else is trained keeps its .grad as it was.
        with torch.enable_grad():
            torch.autograd.backward(_checked(loss_step()), inputs=[sink.token for sink in sinks])


def _checked(loss: object) -> Tensor:
    given = f"{type(loss).__name__} of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise ValueError(f"loss_step returned {given}, expected the loss, one number that a tensor holds")
    if not loss.requires_grad:
        raise RuntimeError("no gradient reached the loss: loss_step met no adapted layer, or ran under torch.no_grad")
    if not torch.isfinite(loss):
        raise RuntimeError(f"loss_step returned {loss.item()}, expected a finite loss")
    return loss.reshape(())


def compressed_chain(
    left: Tensor, right: Tensor, shape: tuple[int, int], config: DeepLoraConfig, generator: torch.Generator
) -> list[Tensor]:
    """Return [V^T (r, n), eps I (r, r) x L, U (m, r)] from the gradient's leading vectors (m, r / 2) and (n, r / 2)."""
    right, left = compressed_frames(left, right, shape, generator)
    eye = torch.eye(config.r, dtype=right.dtype, device=right.device)
    return [right.mT.contiguous(), *(config.init_scale * eye for _ in range(config.depth)), left.contiguous()]


def compressed_frames(
    left: Tensor, right: Tensor, shape: tuple[int, int], generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Return V (n, 2r) orthonormal and U = Q V (m, 2r) from the gradient's top singular vectors P (m, r), Z (n, r).

    For m > n the roles of the sides change, as in `compress_from_gradient`.
    """
    m, n = shape
    if m > n:
        outer, inner = compressed_frames(right, left, (n, m), generator)
        return inner, outer
    rank = left.shape[1]
    image = torch.cat([left, left.new_zeros(n - m, rank)])  # of H under the n x n orthogonal matrix that starts with Q
    first, beside = _frame(n, rank, None, generator, left), _frame(n, rank, image, generator, left)
    return span_and_image(first, right, left, beside[:m])


def span_and_image(first: Tensor, right: Tensor, left: Tensor, beside: Tensor) -> tuple[Tensor, Tensor]:
    """Return V = [H, Z without H] (n, 2r) and U = [P, Y] (m, 2r), where Q takes H to P and the rest of Z to Y."""
    rest = right - first @ (first.mT @ right)
    return torch.cat([first, torch.linalg.qr(rest).Q], 1), torch.cat([left, beside], 1)


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


class GradientSink:
    """Collects the gradients (R, m, n) of a layer's updates, sum over tokens of grad_out x^T, a run each.

    batches come run by run, (S * B, ...), of which the runs `which` count; `frames` are then the `rank` leading left
    (R, m, rank) and right (R, n, rank) singular vectors, taken after the last use in the `last` batch, when the
    gradients go, or in `finish`. shared: of the gradients' sum over all processes.
    """

    def __init__(
        self, layer: Layer, rank: int, runs: int = 1, which: Sequence[int] = (0,), shared: bool = False
    ) -> None:
        self.layer, self.rank, self.runs, self.which, self.shared = layer, rank, runs, list(which), shared
        self.pending, self.last = 0, True
        self.total: Tensor | None = None
        self.token = torch.zeros((), device=layer.weight.device, requires_grad=True)  # makes frozen layers recorded
        self.frames: tuple[Tensor, Tensor] | None = None

    def watch(self, x: Tensor, out: Tensor) -> Tensor:
        """Pass `out` (..., m) on and take its gradient on the way back; x (..., n), or ids for an embedding."""
        self.pending += torch.is_grad_enabled()  # a layer may be used several times
        return _Probe.apply(x, out, self.token, self)

    def add(self, x: Tensor, grad: Tensor) -> None:
        """Add one use of the layer; after the last of the last batch decompose and let the gradients go."""
        if self.frames is not None:
            raise RuntimeError("a layer's gradient came after its last use: expected all uses before the backward pass")
        m, n = layer_shape(self.layer)
        # float32 at least: a bfloat16 gradient has too few digits for its singular vectors
        kind = torch.promote_types(grad.dtype, torch.float32)
        grad = self._chosen(grad.reshape(self.runs, -1, m)).to(kind)
        if isinstance(self.layer, nn.Embedding):
            ids = self._chosen(x.reshape(self.runs, -1))
            gradient = torch.stack([g.new_zeros(n, m).index_add_(0, i, g) for i, g in zip(ids, grad, strict=True)]).mT
        else:
            gradient = grad.mT @ self._chosen(x.reshape(self.runs, -1, n)).to(kind)
        self.total = gradient if self.total is None else self.total + gradient
        self.pending -= 1
        if self.last and not self.pending:
            self.finish()

    def finish(self) -> bool:
        """Decompose what uses without gradient, a checkpointed forward pass or a batch without the layer held up."""
        if self.total is not None:
            if self.shared and torch.distributed.is_available() and torch.distributed.is_initialized():
                torch.distributed.all_reduce(self.total)
            self.frames, self.total = top_frames(self.total, self.rank), None
        return self.frames is not None

    def _chosen(self, stacked: Tensor) -> Tensor:
        return stacked if len(self.which) == self.runs else stacked[self.which]


def finish(sinks: Mapping[str, GradientSink]) -> None:
    """Decompose what is left; RuntimeError, with the first layer's name, where a layer saw no gradient."""
    missing = [name for name, sink in sinks.items() if not sink.finish()]
    if missing:
        raise RuntimeError(f"no gradient reached {missing[0]!r} and {len(missing) - 1} more; does the loss need them?")


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
        return None, grad, grad.new_zeros((), dtype=torch.float32), None


def _frame(size: int, count: int, avoid: Tensor | None, generator: torch.Generator, like: Tensor) -> Tensor:
    """A uniformly random frame (size, count), orthogonal to the orthonormal columns of `avoid`; drawn on the CPU."""
    gaussian = torch.randn(size, count, generator=generator, dtype=torch.float64).to(like.device)
    if avoid is not None:
        span = avoid.double()
        for _ in range(2):  # twice is enough (Kahan, Parlett)
            gaussian = gaussian - span @ (span.mT @ gaussian)
    return torch.linalg.qr(gaussian).Q.to(like.dtype)
