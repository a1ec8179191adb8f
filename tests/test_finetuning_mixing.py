"""Models whose rows depend on the rows beside them, on their padding or on earlier passes, found before work starts."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("transformers")  # a GPU host may have PyTorch, Triton and pytest alone
from reference_finetune import reference_fine_tune
from test_finetune import LENGTH, VOCABULARY, Sequence, assert_equal, bert, config, full_length, t5, task
from transformers import (
    FNetConfig,
    FNetForSequenceClassification,
    LongformerConfig,
    LongformerForSequenceClassification,
    XLNetConfig,
    XLNetForSequenceClassification,
)

import compressible as cd
from compressible.finetuning import batches

ON_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
SHAPE = dict(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, intermediate_size=24, num_labels=1)


def fnet() -> nn.Module:
    torch.manual_seed(0)
    return FNetForSequenceClassification(FNetConfig(**SHAPE, max_position_embeddings=LENGTH)).double().eval()


def longformer() -> nn.Module:
    torch.manual_seed(0)
    sizes = SHAPE | {"num_attention_heads": 2, "max_position_embeddings": 2 * LENGTH, "attention_window": 4}
    return LongformerForSequenceClassification(LongformerConfig(**sizes)).double().eval()


def xlnet() -> nn.Module:
    torch.manual_seed(0)
    sizes = dict(vocab_size=VOCABULARY, d_model=16, n_layer=1, n_head=2, d_inner=24, num_labels=1)
    return XLNetForSequenceClassification(XLNetConfig(**sizes)).double().eval()


class Mixing(Sequence):
    """A model over tokens that does one thing which makes rows depend on something else."""

    def __init__(self, how: str = "nothing") -> None:
        super().__init__(batch_first=True)
        self.how = how
        self.register_buffer("seen", torch.zeros(16))

    def forward(self, input_ids, attention_mask):
        x, kept = self.layer(self.embedding(input_ids)), attention_mask[:, :, None]
        if self.how == "convolution":  # each token reads the two beside it
            x = x + 0.1 * (x.roll(1, 1) + x.roll(-1, 1))
        pooled = x.mean(1) if self.how == "mean" else (x * kept).sum(1) / kept.sum(1)
        if self.how == "centred":
            pooled = pooled - pooled.mean(0)
        elif self.how == "earlier rows":
            pooled = pooled.cumsum(0)
        elif self.how == "later rows":
            pooled = pooled.flip(0).cumsum(0).flip(0)
        elif self.how == "state" and self.training:
            self.seen.lerp_(pooled.detach().mean(0), 0.5)
            pooled = pooled - self.seen
        elif self.how in ("random", "numpy") and self.training:
            pooled = pooled * (random.random() if self.how == "random" else np.random.rand())
        return self.classifier(pooled)


def runs(model: nn.Module, count: int = 2) -> list[cd.FineTuningRun]:
    given = {}
    if isinstance(model, Sequence):
        given = {"target_modules": ["layer.0"], "modules_to_save": ["classifier"], "task_type": None}
    elif isinstance(model, XLNetForSequenceClassification):
        given = {"modules_to_save": ["logits_proj"]}
    configs = [config(**given), config(depth=4, **given), config(r=2, **given)][:count]
    return [cd.FineTuningRun(each, 1e-2, seed) for seed, each in enumerate(configs)]


@pytest.mark.parametrize("how, reason", [
    ("convolution", "reads the padding"), ("mean", "reads the padding"), ("centred", "across the rows"),
    ("earlier rows", "across the rows"), ("later rows", "across the rows"),
])  # fmt: skip
def test_rows_that_depend_on_others_go_one_run_at_a_time(how, reason, tmp_path):
    model = Mixing(how).double()
    with pytest.warns(RuntimeWarning, match=f"runs go one at a time, since Mixing .*{reason}"):
        found = cd.fine_tune(model, runs(model, 3), task(), 4, 4, evaluate_at=(4,), checkpoint=tmp_path / "state")
    assert [history.shared for history in found] == [1, 1, 1]
    for one, other in zip(found, reference_fine_tune(model, runs(model, 3), task(), 4, 4), strict=True):
        np.testing.assert_allclose(one.losses, other.losses, rtol=1e-8)
    assert len(list(tmp_path.iterdir())) == 3
    with pytest.warns(RuntimeWarning):  # the states of all runs are taken up again
        again = cd.fine_tune(model, runs(model, 3), task(), 4, 4, evaluate_at=(4,), checkpoint=tmp_path / "state")
    for one, other in zip(found, again, strict=True):
        np.testing.assert_array_equal(one.losses, other.losses)


@pytest.mark.parametrize(
    "make, reason", [(fnet, "reads the padding"), (longformer, "first axis"), (xlnet, "first axis")]
)
def test_models_that_mix_rows_go_as_alone(make, reason):
    model, data = make(), task()
    with pytest.warns(RuntimeWarning, match=f"one at a time, since .*{reason}"):
        found = cd.fine_tune(model, runs(model), data, 3, 4)
    for one, other in zip(found, reference_fine_tune(model, runs(model), data, 3, 4), strict=True):
        assert_equal(one, other, 1e-8)


@pytest.mark.parametrize("make, data", [
    (bert, task()), (lambda: bert().float(), task()), (lambda: bert().bfloat16(), task()), (t5, task("generation")),
    (lambda: Mixing().double(), task()), (lambda: Mixing("mean").double(), full_length()),
    (lambda: Mixing("convolution").double(), full_length()),
])  # fmt: skip
def test_rows_that_stand_for_themselves_share_a_pass(make, data, recwarn):
    model = make()
    given = {"task_type": "SEQ_2_SEQ_LM"} if data.kind == "generation" else {}
    given |= {"target_modules": ["layer.0"]} if isinstance(model, Sequence) else {"exclude_modules": ["relative.*"]}
    chosen = [cd.FineTuningRun(config(**given), 1e-3, seed) for seed in range(2)]
    assert [history.shared for history in cd.fine_tune(model, chosen, data, 2, 4)] == [2, 2]
    assert not [each for each in recwarn if "one at a time" in str(each.message)]


@pytest.mark.parametrize("count", [1, 2])
def test_a_model_that_remembers_its_passes_is_refused_and_forgets_the_trial(count):
    model = Mixing("state").double()
    with pytest.raises(ValueError, match=r"'inner\.seen' of Mixing changes in every pass"):
        cd.fine_tune(model, runs(model, count), task(), 2, 4)
    assert not model.seen.any()
    cd.fine_tune(model, runs(model, count), task(), 2, 4, dropout=False)


@pytest.mark.parametrize("how", ["random", "numpy"])
def test_draws_from_any_generator_are_found(how):
    model = Mixing(how).double()
    with pytest.raises(RuntimeError, match="Mixing draws random numbers itself"):
        cd.fine_tune(model, runs(model), task(), 2, 4)


@pytest.mark.cuda
@ON_CUDA
@pytest.mark.parametrize("make", [fnet, longformer])
def test_models_that_mix_rows_go_as_alone_on_a_gpu(make, monkeypatch):
    monkeypatch.setitem(batches.LENGTHS, "cuda", 8)  # by 32 all of these rows would be padded to one length
    model, data = make().cuda(), task()
    with pytest.warns(RuntimeWarning, match="one at a time"):
        found = cd.fine_tune(model, runs(model), data, 3, 4)
    for one, other in zip(found, reference_fine_tune(model, runs(model), data, 3, 4), strict=True):
        assert_equal(one, other, 1e-8)
