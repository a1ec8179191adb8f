"""The kernels of fine-tuning, and its steps as CUDA graphs: on a CUDA device, or in Triton's interpreter."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import compressible as cd
from compressible.finetuning.dropout.hash import AXES
from compressible.finetuning.dropout.per_run import PerRunDropout
from compressible.finetuning.stacked import adamw
from compressible.finetuning.stacked.adamw import StackedAdamW
from compressible.runtime.devices import interpreted

pytestmark = pytest.mark.cuda


@pytest.mark.filterwarnings("ignore:overflow encountered")  # words wrap around, in numpy where interpreted
@pytest.mark.parametrize("numbered", [False, True])
@pytest.mark.parametrize("kind", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(6, 5), (6, 3, 700), (4, 2, 3, 5), (2, 3, 2, 3, 2)])
def test_the_kernel_drops_what_the_plain_form_drops(kind, shape, numbered):
    from compressible.finetuning.dropout.triton_dropout import Dropped

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not interpreted():
        pytest.skip("needs a CUDA device or Triton's interpreter")
    per_run = PerRunDropout([3, 9], torch.tensor(5, device=device))
    per_run.place = 4
    per_run.numbers = torch.arange(90, 90 - 5 * shape[0], -5).int().to(device) if numbered else None
    x = torch.randn(shape, dtype=kind, device=device, requires_grad=True)
    expected = per_run.written_out(x, round(0.3 * 2**31))
    found = Dropped.apply(x, per_run.seeds, per_run.step, per_run.numbers, per_run.place, round(0.3 * 2**31), AXES)
    torch.testing.assert_close(found, expected)
    weight = torch.randn(shape, dtype=kind, device=device)
    slopes = [torch.autograd.grad((out * weight).sum(), x)[0] for out in (found, expected)]
    torch.testing.assert_close(*slopes)


@pytest.mark.parametrize("kind", [torch.float64, torch.float32])
def test_the_kernel_of_adamw_takes_the_plain_steps_and_torchs(kind):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not interpreted():
        pytest.skip("needs a CUDA device or Triton's interpreter")
    start = [torch.randn(2, 3, 5, dtype=kind, device=device), torch.randn(2, 4, dtype=kind, device=device)]
    rates = torch.tensor([1e-2, 3e-2], dtype=torch.float64)
    shaped = [rates[:, None, None], rates[:, None]]
    given = [[(nn.Parameter(p.clone()), r) for p, r in zip(start, shaped, strict=True)] for _ in range(2)]
    fused, plain = (StackedAdamW(pairs) for pairs in given)
    own = [nn.Parameter(p[run].clone()) for run in (0, 1) for p in start]
    groups = [{"params": own[2 * run : 2 * run + 2], "lr": rates[run].item()} for run in (0, 1)]
    torchs = torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.0)
    for _ in range(4):
        parts = [torch.randn_like(p) for p in start]
        for run in (0, 1):
            for at, part in enumerate(parts):
                own[2 * run + at].grad = part[run].clone()
        factor = torch.tensor(1.0, dtype=torch.float64, device=device)
        for adam, pairs, name in zip((fused, plain), given, ("step_fused", "step_plain"), strict=True):
            for (p, _), part in zip(pairs, parts, strict=True):
                p.grad.copy_(part)
            adam.step_fused = adam.step_plain = getattr(adam, name)
            adam.step(factor)
        torchs.step()
    torch.testing.assert_close(fused.value, plain.value)
    for at, (p, _) in enumerate(given[0]):
        torch.testing.assert_close(p.detach(), torch.stack([own[at], own[2 + at]]).detach())


@pytest.mark.parametrize("kind", [torch.float64, torch.float32])
def test_tensors_begin_where_a_gpus_products_are_aligned_and_gaps_stay_zero(kind, monkeypatch):
    monkeypatch.setattr(adamw, "WIDE", 4096)
    shapes = [(5, 1), (5,), (3, 5, 8, 24), (2, 5, 64, 32)]  # two parts of a head, two factors, of which one is wide
    pairs = [(nn.Parameter(torch.ones(shape, dtype=kind)), torch.tensor(0.1)) for shape in shapes]
    adam = StackedAdamW(pairs)
    assert len(adam.wide) == 1 and adam.small % adamw.PLACE == 0
    assert [p.data_ptr() % 16 for p, _ in pairs] == [0] * 4
    assert [(p.data_ptr() - adam.value.data_ptr()) % (adamw.PLACE * p.element_size()) for p, _ in pairs] == [0] * 4
    sum((p**2).sum() for p, _ in pairs).backward()
    adam.step(torch.tensor(1.0, dtype=torch.float64))
    inside = sum(p.numel() for p, _ in pairs)
    assert int((adam.value != 0).sum()) == inside < len(adam.value) and bool((adam.value < 1).all())


@dataclass
class Rows:
    tokens: dict[str, Tensor]
    labels: Tensor


@dataclass
class Sums:
    train: Rows
    validation: Rows
    kind: str = "regression"
    name: str = "sums"

    def score(self, predicted: np.ndarray, expected: np.ndarray) -> float:
        return -float(((predicted[:, 0] - expected) ** 2).mean())


class Bag(nn.Module):
    """Mean of embedded tokens through two linear layers and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.hidden, self.head = nn.Embedding(20, 16), nn.Linear(16, 16), nn.Linear(16, 1)
        self.dropout = nn.Dropout(0.1)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.dropout(torch.tanh(self.hidden(self.embed(input_ids)))).mean(1))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("variant", ["compressed", "thin", "full"])
def test_graphed_steps_are_the_eager_ones(variant):
    pytest.importorskip("peft")
    pytest.importorskip("safetensors")  # fine_tune keeps its checkpoints in this format
    torch.manual_seed(0)
    model = Bag().double().cuda()
    rows = [Rows({"input_ids": torch.randint(20, (24, 7))}, torch.rand(24, dtype=torch.float64)) for _ in range(2)]
    config = cd.DeepLoraConfig(r=2, variant=variant, target_modules=["hidden"], modules_to_save=["head"])
    runs = [cd.FineTuningRun(config, lr=rate, seed=seed) for seed, rate in enumerate((1e-3, 1e-2, 3e-3))]
    options = {"steps": 9, "batch_size": 4, "evaluate_at": [9]}
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # which says that steps are not captured
        graphed, eager = (cd.fine_tune(model, runs, Sums(*rows), graphed=graph, **options) for graph in (True, False))
    for one, other in zip(graphed, eager, strict=True):
        np.testing.assert_allclose(one.losses, other.losses, rtol=1e-9)
        assert one.scores[9] == pytest.approx(other.scores[9], rel=1e-9)
    assert len({history.losses[-1].item() for history in graphed}) == 3
