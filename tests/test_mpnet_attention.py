"""MPNet's attention by kernels against transformers' own, written out: on the CPU, interpreted, and on CUDA."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")  # a GPU host may have PyTorch, Triton and pytest alone
from test_finetune import assert_equal, config, task
from test_finetuning_capture import mpnet
from transformers.models.mpnet.modeling_mpnet import MPNetEncoder, MPNetSelfAttention

import compressible as cd
from compressible.finetuning.dropout.per_run import PerRunDropout
from compressible.finetuning.peft_models import attending, sharing
from compressible.finetuning.stacked_pass import StackedPass
from compressible.runtime.devices import has_triton, interpreted, matmul_precision

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"


def tokens(rows: int = 6, length: int = 24, padded: bool = True) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    lengths = torch.randint(2, length + 1, (rows,), generator=draw) if padded else torch.full((rows,), length)
    mask = (torch.arange(length) < lengths[:, None]).long()
    ids = torch.where(mask > 0, torch.randint(3, 50, (rows, length), generator=draw), 1)
    return {"input_ids": ids.to(DEVICE), "attention_mask": mask.to(DEVICE)}


def passed(model, kind, drawn, given) -> list[torch.Tensor]:
    """Logits, and the gradients of the first layer's four matrices by their sum of squares."""
    model = model.to(kind)
    weights = [layer.weight.requires_grad_() for layer in model.modules() if isinstance(layer, torch.nn.Linear)][:4]
    with drawn:
        out = model(**given).logits
    return [out, *torch.autograd.grad(out.square().sum(), weights)]


@pytest.mark.cuda
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("padded", [True, False])
def test_the_kernels_give_what_the_form_written_out_gives(training, padded):
    plain = mpnet().to(DEVICE).train(training)
    kernels = attending(sharing(plain))
    found, expected = (
        passed(model, torch.float64, PerRunDropout([3, 9], torch.tensor(5, device=DEVICE)), tokens(padded=padded))
        for model in (kernels, plain)
    )
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)
    assert {type(module) for module in plain.modules()} >= {MPNetEncoder, MPNetSelfAttention}  # it is left as it was


@pytest.mark.cuda
@pytest.mark.filterwarnings("ignore:overflow encountered")  # words wrap around, in numpy where interpreted
@pytest.mark.skipif(not (CUDA or (has_triton() and interpreted())), reason="needs CUDA or Triton's interpreter")
def test_the_kernel_of_dropped_attention_takes_the_position_bias(monkeypatch):
    taken, original = [], PerRunDropout.attendable
    monkeypatch.setattr(PerRunDropout, "attendable", lambda *a: taken.append(original(*a)) or taken[-1])
    from compressible.finetuning.dropout import triton_attention  # noqa: F401  registers its operators

    plain = mpnet().to(DEVICE).train()
    kernels = attending(sharing(plain))
    drawn = [PerRunDropout([3, 9], torch.tensor(5, device=DEVICE)) for _ in range(2)]
    drawn[0].room = 227 * 1024  # an H200's
    with matmul_precision("tf32"):
        found = passed(kernels, torch.float32, drawn[0], tokens())
    assert taken == [True, True] and drawn[0].place == 9  # three dropouts in each of two layers, and three around them
    expected = passed(plain, torch.float64, drawn[1], tokens())
    for one, other in zip(found, expected, strict=True):
        tolerance = 2e-2 if CUDA else 1e-4  # TensorFloat-32 on CUDA
        torch.testing.assert_close(one.double(), other, rtol=tolerance, atol=tolerance * other.abs().max().item())


def test_weights_of_attention_are_given_where_they_are_asked_for():
    plain = mpnet()
    kernels = attending(sharing(plain))
    given = {name: value.cpu() for name, value in tokens().items()} | {"output_attentions": True}
    for one, other in zip(kernels.cpu()(**given).attentions, plain(**given).attentions, strict=True):
        torch.testing.assert_close(one, other)


def test_runs_go_as_they_would_alone_and_on_attention_written_out(monkeypatch):
    from reference_finetune import reference_fine_tune

    runs = [cd.FineTuningRun(config(variant), 1e-3, seed) for variant in ("thin", "compressed") for seed in (0, 1)]
    found = cd.fine_tune(mpnet(), runs, task(), 4, 4, evaluate_at=(4,))
    for one, other in zip(found, reference_fine_tune(mpnet(), runs, task(), 4, 4, evaluate_at=(4,)), strict=True):
        assert_equal(one, other, 1e-8)


@pytest.mark.cuda
@pytest.mark.skipif(not CUDA, reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("precision", ["tf32", "bfloat16"])
def test_captured_steps_through_the_kernel_are_those_without_graphs_and_without_it(precision, monkeypatch):
    runs = [cd.FineTuningRun(config(), 1e-3, seed) for seed in (0, 1, 2)]
    given, options = (mpnet().float().cuda(), runs, task(), 8, 4), {"precision": precision}
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # of steps that are no graphs
        graphed = cd.fine_tune(*given, **options)
    eager = cd.fine_tune(*given, **options, graphed=False)
    monkeypatch.setattr(PerRunDropout, "attendable", lambda *_: False)
    plain = cd.fine_tune(*given, **options, graphed=False)
    for one, other, third in zip(graphed, eager, plain, strict=True):
        np.testing.assert_allclose(one.losses, other.losses, rtol=1e-4)
        np.testing.assert_allclose(one.losses, third.losses, rtol=0.02)


def test_the_bias_is_made_once_a_pass_and_for_one_row(monkeypatch):
    stacked = StackedPass(mpnet(), [cd.FineTuningRun(config(), 1e-3, seed) for seed in (0, 1)], task(), 2, 4)
    stacked.start()
    made, original = [], MPNetEncoder.compute_position_bias
    monkeypatch.setattr(MPNetEncoder, "compute_position_bias", lambda *a: made.append(a[1].shape) or original(*a))
    stacked.losses(*stacked.whole(0))
    assert len(made) == 1 and made[0][0] == 1
