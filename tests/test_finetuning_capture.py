"""Steps as CUDA graphs: what a model sends to the device in each pass, and what keeps its steps from being captured.

The meta device stands for a GPU that is being captured: it has no values for the host, and copies to it are seen.
"""

from __future__ import annotations

import contextlib
import warnings

import numpy as np
import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")  # a GPU host may have PyTorch, Triton and pytest alone
from test_finetune import LENGTH, VOCABULARY, Sequence, assert_equal, bert, config, task
from transformers import MPNetConfig, MPNetForSequenceClassification

import compressible as cd
from compressible.finetuning import batches, trainer
from compressible.finetuning.constants import DeviceConstants
from compressible.finetuning.graphs import cause, rehearse
from compressible.finetuning.stacked_pass import StackedPass

META = torch.device("meta")
ON_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
SHAPE = dict(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=40)


def mpnet() -> nn.Module:
    torch.manual_seed(0)
    sizes = SHAPE | {"max_position_embeddings": LENGTH + 2, "num_labels": 1}
    return MPNetForSequenceClassification(MPNetConfig(**sizes)).double().eval()


class HostMade(Sequence):
    """A model that makes masks, positions, indices and numbers on the host in every pass, as many models do."""

    def forward(self, input_ids, attention_mask):
        x = self.embedding(input_ids)
        positions = torch.arange(x.shape[1])
        near = torch.exp(-(((positions[:, None] - positions) / 4.0) ** 2)).to(x.device, x.dtype)
        nothing = torch.tensor(0.0, device=x.device, dtype=x.dtype)
        mask = torch.where(attention_mask[:, :, None] > 0, x.new_tensor([1.0]), nothing)
        x = self.layer(torch.einsum("st,btn->bsn", near, x * mask))
        x[:, [0, 2]] *= torch.as_tensor([0.5], device=x.device, dtype=x.dtype)
        x = x[:, np.arange(3)] + x[:, torch.tensor([1, 2, 0])] * torch.tensor(0.25)
        return self.classifier(x.mean(1))


class Reading(Sequence):
    """A model that reads a value of its input on the host, or whose shapes depend on it, as experts' routers do."""

    def __init__(self, how: str) -> None:
        super().__init__(batch_first=True)
        self.how = how

    def forward(self, input_ids, attention_mask):
        x = self.layer(self.embedding(input_ids))
        if self.how == "item" or (self.how == "long" and x.shape[1] > 16):
            x = x * (1 + 0.1 * (attention_mask.sum() > 0).item())
        elif self.how == "nonzero":
            x = x.flatten(0, 1).index_add(0, (attention_mask.flatten() > 0).nonzero()[:, 0], x[attention_mask > 0])
            x = x.view(*input_ids.shape, -1)
        elif self.how == "unique":  # of which PyTorch's debug mode may not know
            x = x + 0 * torch.unique(input_ids).numel()
        return self.classifier((x * attention_mask[:, :, None]).sum(1))


class Changing(Sequence):
    """A model that sends another number to the device in every pass."""

    passes = 0

    def forward(self, input_ids, attention_mask):
        self.passes += 1
        out = super().forward(input_ids, attention_mask)
        return out * torch.tensor(1 + 0.1 * self.passes, device=out.device, dtype=out.dtype)


def eager_bert() -> nn.Module:
    return bert(attention="eager")


def host_made() -> nn.Module:
    return HostMade(batch_first=True).double()


def runs(model: nn.Module) -> list[cd.FineTuningRun]:
    """Two runs over all layers of a model of transformers, or over the layer of one of ours."""
    given = {"target_modules": ["layer.0"]} if isinstance(model, Sequence) else {}
    return [cd.FineTuningRun(config(**given), 1e-2, seed) for seed in (0, 1)]


def rehearsed(model: nn.Module, monkeypatch) -> DeviceConstants:
    """Rehearse a step of two runs of `model` on the meta device and return the constants that it needs."""
    monkeypatch.setitem(batches.LENGTHS, "meta", 8)
    monkeypatch.setattr(trainer, "try_out", lambda stacked: None)  # which looks at values
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # has no dtype for this device
    trained = trainer.Trainer(StackedPass(model.to(META), runs(model), task(), 2, 4))
    tokens, labels = trained.stacked.batch(0)
    constants = DeviceConstants(META)
    rehearse(lambda: trained.gradients(tokens, labels), META, constants)
    return constants


@pytest.mark.parametrize("make, sent", [(mpnet, 0), (eager_bert, 0), (bert, 0), (host_made, 8)])
def test_what_a_pass_makes_on_the_host_is_sent_once(make, sent, monkeypatch):
    constants = rehearsed(make(), monkeypatch)
    assert len(constants.sent) == len(constants.expected) >= sent
    assert all(value.device == META for value in constants.kept.values())


@pytest.mark.parametrize("how, named", [("item", "attention_mask.sum"), ("nonzero", "nonzero")])
def test_what_reads_a_value_on_the_host_is_found_in_the_rehearsal(how, named, monkeypatch):
    with pytest.raises((RuntimeError, NotImplementedError)) as found:
        rehearsed(Reading(how).double(), monkeypatch)
    assert "test_finetuning_capture.py" in cause(found.value) and named in cause(found.value)


def test_what_changes_from_pass_to_pass_is_no_constant(monkeypatch):
    with pytest.raises(RuntimeError, match="differs from pass to pass"):
        rehearsed(Changing(batch_first=True).double(), monkeypatch)
    constants = DeviceConstants(META)
    with constants:
        torch.tensor(1.0, device=META)
    with pytest.raises(RuntimeError, match="differs from pass to pass"), constants:
        pass
    with pytest.raises(ZeroDivisionError), constants:  # an error of its own comes through
        1 / 0  # noqa: B018


def elsewhere(x: Tensor) -> list[Tensor]:
    """Tensors from the host in the ways that Python has, on the device of x (4, 5)."""
    there = x.device
    written = x.clone()
    written[:, [0, 1]] = 7.0
    written[torch.tensor([2, 3]), 4] = torch.tensor(9.0, dtype=x.dtype)
    filled = x.clone().copy_(torch.arange(5, dtype=x.dtype))
    return [
        torch.tensor([[1, 2], [3, 4]], device=there), torch.tensor(2.5, device=str(there)), torch.tensor(1).to(there),
        torch.as_tensor(np.arange(3), device=there), torch.asarray([1.5], device=there), x.new_tensor([1, 2]),
        torch.tensor([0.1], dtype=torch.bfloat16).to(there), torch.arange(4).type_as(x), torch.ones(0).to(there),
        x[:, [0, 2]], x[torch.arange(2)], x[np.array([0, 1])], torch.where(x > 0, torch.tensor(0.5, dtype=x.dtype), x),
        x * torch.tensor(2.0), written, filled, torch.tensor(3.0, device=there, requires_grad=True).detach(),
    ]  # fmt: skip


def test_tensors_from_the_host_are_seen_in_all_spellings(monkeypatch):
    x = torch.zeros(4, 5, dtype=torch.float64, device=META)
    constants, moves = DeviceConstants(META), []
    plain = elsewhere(x)
    for _ in range(2):
        with constants:
            found = elsewhere(x)
        moves.append(len(constants.sent))
    assert moves == [18, 18] and len(constants.kept) <= 18
    for one, other in zip(found, plain, strict=True):
        assert (one.shape, one.dtype, one.device) == (other.shape, other.dtype, other.device)


def test_a_model_may_write_on_what_it_made(monkeypatch):
    constants = DeviceConstants(torch.device("cpu", 0))  # every copy is one to the device
    monkeypatch.setattr(DeviceConstants, "on", lambda self, device: True)
    for _ in range(3):
        with constants:
            made = torch.tensor([1.0, 2.0], device="cpu")
            made += 1
        assert made.tolist() == [2, 3]


def test_a_pass_goes_on_without_graphs_at_the_first_step_that_is_none():
    class Refusing:
        def step(self, tokens, labels):
            raise RuntimeError("Cannot copy")

    trained = trainer.Trainer(StackedPass(bert(), runs(bert()), task(), 2, 4))
    trained.graphs = Refusing()
    with pytest.warns(
        RuntimeWarning, match="steps of BertFor.* no CUDA graphs, since RuntimeError: Cannot copy"
    ) as seen:
        trained.advance(0)
        trained.advance(1)
    assert len(seen) == 1 and trained.graphs is None
    (expected, _) = cd.fine_tune(bert(), runs(bert()), task(), 2, 4)
    np.testing.assert_allclose(trained.losses[:, 0].numpy(), expected.losses, rtol=1e-10)


# on a GPU


@pytest.mark.cuda
@ON_CUDA
@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("make", [mpnet, eager_bert, bert, host_made])
def test_models_that_make_tensors_on_the_host_are_captured(make, dropout):
    given = make().cuda(), runs(make()), task(), 8, 4
    options = {"evaluate_at": (8,), "dropout": dropout}
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        graphed = cd.fine_tune(*given, **options)
    for found, expected in zip(graphed, cd.fine_tune(*given, graphed=False, **options), strict=True):
        assert_equal(found, expected, 1e-8)


@pytest.mark.cuda
@ON_CUDA
@pytest.mark.parametrize("how", ["item", "nonzero", "unique"])
def test_a_model_that_needs_the_host_goes_on_without_graphs_and_leaves_the_gpu_clean(how):
    model, data = Reading(how).double().cuda(), task()
    torch.cuda.manual_seed(5)
    torch.rand(3, device="cuda")
    state = torch.cuda.get_rng_state()
    with pytest.warns(RuntimeWarning, match="no CUDA graphs, since .*test_finetuning_capture.py") as seen:
        found = cd.fine_tune(model, runs(model), data, 8, 4, evaluate_at=(8,))
    assert sum("no CUDA graphs" in str(each.message) for each in seen) == 1
    assert torch.equal(torch.cuda.get_rng_state(), state)
    assert torch.cuda.current_stream() == torch.cuda.default_stream() and torch.cuda.get_sync_debug_mode() == 0
    assert torch.rand(1000, device="cuda").mean().item() == pytest.approx(0.5, abs=0.1)
    expected = cd.fine_tune(model, runs(model), data, 8, 4, evaluate_at=(8,), graphed=False)
    for one, other in zip(found, expected, strict=True):
        assert_equal(one, other, 1e-10)
    with warnings.catch_warnings():  # another model is captured after the one that was not
        warnings.simplefilter("error", RuntimeWarning)
        given = mpnet().cuda(), runs(mpnet()), data, 4, 4
        captured = cd.fine_tune(*given)
    for one, other in zip(captured, cd.fine_tune(*given, graphed=False), strict=True):
        assert_equal(one, other, 1e-8)


@pytest.mark.cuda
@ON_CUDA
def test_a_pass_loses_its_graphs_at_the_first_length_that_needs_the_host(monkeypatch):
    monkeypatch.setitem(batches.LENGTHS, "cuda", 8)
    model, data = Reading("long").double().cuda(), task()
    given = model, runs(model)[:1], data, 30, 2  # few rows, so that many batches are short
    with pytest.warns(RuntimeWarning, match="no CUDA graphs, since .*item"):
        found = cd.fine_tune(*given, evaluate_at=(30,))
    assert_equal(found[0], cd.fine_tune(*given, evaluate_at=(30,), graphed=False)[0], 1e-10)


@pytest.mark.cuda
@pytest.mark.slow
@ON_CUDA
def test_a_compiled_model_that_needs_the_host_goes_on_compiled():
    model, data = Reading("item").double().cuda(), task()
    with pytest.warns(RuntimeWarning, match="no CUDA graphs"):
        found = cd.fine_tune(model, runs(model), data, 4, 4, compiled=True)
    for one, other in zip(found, cd.fine_tune(model, runs(model), data, 4, 4, graphed=False), strict=True):
        assert_equal(one, other, 1e-8)


@pytest.mark.cuda
@ON_CUDA
def test_a_model_whose_numbers_change_from_pass_to_pass_is_not_captured():
    with pytest.warns(RuntimeWarning, match="differs from pass to pass"):
        model = Changing(batch_first=True).double()
        cd.fine_tune(model.cuda(), runs(model)[:1], task(), 4, 4)
