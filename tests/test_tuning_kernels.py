"""The fused kernels of fine-tuning against their references: on a GPU where there is one, else in the interpreter."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from compressible import streams
from compressible.stacked_adam import StackedAdamW
from compressible.streams import RunStreams

kernels = pytest.importorskip("compressible.tuning_kernels", reason="triton is not installed: Linux only")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def pair(monkeypatch, made):
    """What `made` gives with the kernels, wherever tensors are, and without."""
    with monkeypatch.context() as patch:
        if DEVICE == "cpu":
            patch.setattr(kernels, "takes", lambda x: True)
        fast = made()
        patch.setattr(streams, "fused", None)
        slow = made()
    return fast, slow


@pytest.mark.parametrize("shape", [(4, 24), (4, 5, 33), (4, 2, 3, 5), (2, 3, 7, 1030)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_and_its_way_back_are_the_references(monkeypatch, shape, dtype):
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(shape, generator=generator).to(DEVICE, dtype)
    step = torch.tensor(7, device=DEVICE)

    def made():
        x = values.clone().requires_grad_()
        with RunStreams([3, 2**40 + 1], step):
            first = functional.dropout(x, 0.3)
            second = functional.dropout(first.transpose(0, -1).contiguous().transpose(0, -1), 0.1)
        second.backward(values.square())
        return first, second, x.grad

    cut = DEVICE == "cpu" and dtype is torch.bfloat16  # the interpreter cuts where a GPU rounds, twice here
    for fast, slow in zip(*pair(monkeypatch, made), strict=True):
        torch.testing.assert_close(fast, slow, rtol=2**-6 if cut else 0, atol=0)
        assert torch.equal(fast == 0, slow == 0)
        assert 0 < (fast == 0).float().mean() < 0.9


def test_a_way_back_after_the_step_was_counted_on_is_refused(monkeypatch):
    if DEVICE == "cpu":
        monkeypatch.setattr(kernels, "takes", lambda x: True)
    step = torch.tensor(0, device=DEVICE)
    x = torch.ones(2, 8, device=DEVICE, requires_grad=True)
    with RunStreams([0, 1], step):
        out = functional.dropout(x, 0.5)
    step += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("steps", [0, 3])
def test_adamw_is_the_references(monkeypatch, steps):
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(2, 700, generator=generator), torch.randn(3, 5, 7, generator=generator)]
    rates = [torch.tensor([1e-2, 1e-3]), torch.tensor([1e-1, 1e-2, 0.0])]

    def made(fused):
        monkeypatch.setattr(StackedAdamW, "_fused", fused)
        adam = StackedAdamW([(nn.Parameter(s.clone().to(DEVICE)), r) for s, r in zip(start, rates, strict=True)])
        draw = torch.Generator().manual_seed(1)
        for step in range(steps):
            adam.gradient.copy_(torch.randn(adam.gradient.shape, generator=draw))
            adam.step(torch.tensor(1 - 0.1 * step, dtype=torch.float64, device=DEVICE))
        return adam.value, adam.mean, adam.square

    for fast, slow in zip(made(True), made(False), strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-5, atol=1e-7 * bool(steps))
