"""The full variant: d x d factors, their updates formed for all layers at once, and AdamW tensor by tensor."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("transformers")  # a GPU host may have PyTorch, Triton and pytest alone
from reference_finetune import reference_fine_tune
from test_finetune import assert_equal, bert, config, task

import compressible as cd
from compressible.finetuning.stacked import adamw
from compressible.finetuning.stacked.layers import stacked_adapters
from compressible.finetuning.stacked_pass import StackedPass
from compressible.runtime.devices import interpreted

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"


@pytest.fixture
def wide(monkeypatch):
    """Let the small tensors of these tests count as wide."""
    monkeypatch.setattr(adamw, "WIDE", 2)
    monkeypatch.setattr(adamw, "SHARE", 1)


def full_runs(count: int = 2) -> list[cd.FineTuningRun]:
    return [cd.FineTuningRun(config("full"), 1e-3 * (seed + 1), seed) for seed in range(count)]


@pytest.mark.parametrize("trained", [True, False])
def test_runs_with_wide_tensors_go_as_they_would_alone(wide, trained):
    given = {} if trained else {"exclude_modules": ["classifier"], "modules_to_save": None}
    runs = [cd.FineTuningRun(config(v, **given), 1e-3 * (s + 1), s) for v in ("full", "thin") for s in (0, 1)]
    found = cd.fine_tune(bert(), runs, task(), 5, 4, evaluate_at=(5,))
    for one, other in zip(found, reference_fine_tune(bert(), runs, task(), 5, 4, evaluate_at=(5,)), strict=True):
        assert_equal(one, other, 1e-8)


def test_a_killed_call_with_wide_tensors_goes_on_where_it_was(wide, tmp_path):
    whole = cd.fine_tune(bert(), full_runs(), task(), 6, 4)
    runs = full_runs()

    def stop(snapshot):
        raise KeyboardInterrupt

    given = {"checkpoint": tmp_path / "state", "checkpoint_every": 2}
    with pytest.raises(KeyboardInterrupt):
        cd.fine_tune(bert(), runs, task(), 6, 4, watch_at=(5,), watch=stop, **given)
    for one, other in zip(cd.fine_tune(bert(), runs, task(), 6, 4, **given), whole, strict=True):
        np.testing.assert_array_equal(one.losses, other.losses)


def test_all_layers_of_a_shape_form_their_updates_at_once():
    stacked = StackedPass(bert(layers=3), full_runs(), task(), 2, 4)
    stacked.start()
    adapters = stacked_adapters(stacked.model)
    stacked.chains.contract()
    for adapter in adapters.values():
        torch.testing.assert_close(adapter.formed, adapter.updates(), rtol=1e-12, atol=1e-14)
    assert len({adapter.formed.data_ptr() for adapter in adapters.values()}) == len(adapters) == 19
    bases = {adapter.formed._base.data_ptr() for adapter in adapters.values()}
    assert len(bases) == len(stacked.chains.groups) == 3
    stacked.chains.release()
    assert all(adapter.formed is None for adapter in adapters.values())


@pytest.mark.cuda
@pytest.mark.parametrize("kind", [torch.float64, torch.float32])
def test_the_kernel_takes_the_plain_steps_of_wide_tensors_and_torchs(kind, monkeypatch):
    if not CUDA and not interpreted():
        pytest.skip("needs a CUDA device or Triton's interpreter")
    monkeypatch.setattr(adamw, "WIDE", 4096)
    torch.manual_seed(0)
    rates = torch.tensor([1e-2, 3e-2], dtype=torch.float64)
    shapes = {(3, 2, 32, 64): rates[:, None, None], (2, 5, 7): rates[:, None, None], (70, 70): torch.tensor(2e-2)}
    start = [torch.randn(shape, dtype=kind, device=DEVICE) for shape in shapes]
    made = [[(nn.Parameter(p.clone()), r) for p, r in zip(start, shapes.values(), strict=True)] for _ in range(2)]
    adams = [adamw.StackedAdamW(pairs) for pairs in made]
    assert all(len(adam.wide) == 2 and adam.small == 128 for adam in adams)  # 70 numbers and a gap
    own = [nn.Parameter(part.clone()) for part in (start[0][:, 0], start[0][:, 1], start[1][0], start[1][1], start[2])]
    groups = [{"params": [p], "lr": rate} for p, rate in zip(own, [1e-2, 3e-2, 1e-2, 3e-2, 2e-2], strict=True)]
    torchs = torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.0)
    for _ in range(3):
        gradients = [torch.randn_like(p) for p in start]
        parts = gradients[0][:, 0], gradients[0][:, 1], gradients[1][0], gradients[1][1], gradients[2]
        for p, part in zip(own, parts, strict=True):
            p.grad = part.clone()
        for adam, pairs, name in zip(adams, made, ("step_fused", "step_plain"), strict=True):
            adam.forget_gradients()
            (sum((p * g).sum() for (p, _), g in zip(pairs, gradients, strict=True))).backward()
            adam.step_fused = adam.step_plain = getattr(adam, name)
            adam.step(torch.tensor(1.0, dtype=torch.float64, device=DEVICE))
        torchs.step()
    for pairs in made:
        first, second, third = (p.detach() for p, _ in pairs)
        for found, expected in zip((first[:, 0], first[:, 1], *second, third), own, strict=True):
            torch.testing.assert_close(found, expected.detach())


@pytest.mark.cuda
@pytest.mark.parametrize("precision", ["bfloat16", "tf32"])
def test_what_full_runs_learn_in_low_precision_differs_by_far_less_than_seeds_do(precision):
    """What rounding moves must not show beside what a run's seed does, which is what figures average over."""
    if precision == "tf32" and not CUDA:
        pytest.skip("a CPU has no TensorFloat-32")
    model, data = bert(dropout=0.0).float().to(DEVICE), task()
    given = {"steps": 40, "batch_size": 8, "evaluate_at": (40,)}
    runs = [cd.FineTuningRun(config("full"), 2e-3, seed) for seed in range(5)]
    exact, rounded = (cd.fine_tune(model, runs, data, precision=name, **given) for name in ("float32", precision))
    losses, found = (np.array([each.losses for each in histories]) for histories in (exact, rounded))
    between = np.std(losses[:, -20:].mean(1), ddof=1)
    assert np.abs(found[:, -20:].mean(1) - losses[:, -20:].mean(1)).max() < 0.05 * between
    for one, other in zip(exact, rounded, strict=True):
        for name, chain in one.chains.items():
            update, moved = chain[2] @ chain[1] @ chain[0], other.chains[name]
            apart = moved[2] @ moved[1] @ moved[0] - update
            assert apart.norm() < 0.1 * update.norm()
