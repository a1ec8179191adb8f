"""Tokens of all shapes: what lies along a row is cut to the longest of a batch, and nothing else is."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")  # a GPU host may have PyTorch, Triton and pytest alone
pytest.importorskip("peft")
import peft
import transformers
from test_finetune import VOCABULARY, Rows, Task, lora, t5

import compressible as cd
from compressible.finetuning.batches import DeviceRows
from compressible.finetuning.run import data_order
from compressible.finetuning.trainer import BETAS, EPS

ROWS, SHORT, LONG = 12, 5, 24


def drawn(*shape: int, below: int = VOCABULARY) -> torch.Tensor:
    return torch.randint(3, below, shape, generator=torch.Generator().manual_seed(len(shape)))


def padded(tokens: int = SHORT) -> dict[str, torch.Tensor]:
    mask = (torch.arange(LONG) < tokens).long().expand(ROWS, -1).contiguous()
    return {"input_ids": drawn(ROWS, LONG) * mask, "attention_mask": mask}


def trained_by_peft(model: nn.Module, run: cd.FineTuningRun, data: Task, steps: int, batch: int) -> list[float]:
    """Losses of peft's model over whole rows, by torch's AdamW, without dropout."""
    torch.manual_seed(run.seed)
    adapted = peft.get_peft_model(copy.deepcopy(model), copy.deepcopy(run.config)).eval()
    adam = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], run.lr, BETAS, EPS, 0.0)
    losses = []
    for chosen in data_order(run, ROWS, steps, batch):
        tokens = {name: value[chosen] for name, value in data.train.tokens.items()}
        loss = adapted(**tokens, labels=data.train.labels[chosen]).loss
        loss.backward()
        adam.step()
        adam.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(
    "name, other, whole",
    [
        ("features", torch.rand(ROWS, LONG - 4), True),
        ("features", torch.rand(ROWS, LONG + 4), True),
        ("task_ids", torch.arange(ROWS), True),
        ("pixels", torch.rand(ROWS, 3, LONG), True),
        ("decoder_attention_mask", torch.ones(ROWS, LONG), True),
        ("token_type_ids", torch.ones(ROWS, LONG), False),
        ("boxes", torch.rand(ROWS, LONG, 4), False),
    ],
)
def test_only_what_lies_along_a_row_is_cut(name, other, whole):
    rows, chosen = cd.Examples(padded() | {name: other}, torch.zeros(ROWS), texts=()), torch.tensor([3, 1])
    for tokens, _ in (rows.batch(chosen, 8), DeviceRows(rows, torch.device("cpu")).batch(chosen, 8)):
        assert tokens["input_ids"].shape == (2, 8)
        assert torch.equal(tokens[name], other[chosen] if whole else other[chosen][:, :8])


def test_what_a_decoder_is_given_is_as_long_as_its_labels():
    labels = drawn(ROWS, 16)
    seen = (torch.arange(16) < 12).long().expand(ROWS, -1)
    data = Rows(padded() | {"decoder_attention_mask": seen}, labels.where(seen == 1, -100))
    config = peft.LoraConfig(r=2, lora_alpha=8, target_modules=["q", "v", "wo"], task_type="SEQ_2_SEQ_LM")
    model, run = t5(), cd.FineTuningRun(config, 1e-2, 1)
    [history] = cd.fine_tune(model, [run], Task("generation", data, data), 4, 4, dropout=False)
    expected = trained_by_peft(model, run, Task("generation", data, data), 4, 4)
    assert history.losses == pytest.approx(expected, rel=1e-6)


def choices() -> Task:
    """Three texts a row, the later ones longer."""
    mask = (torch.arange(LONG) < torch.tensor([7, 12, 20])[:, None]).long().expand(ROWS, -1, -1)
    given = {"input_ids": drawn(ROWS, 3, LONG) * mask, "attention_mask": mask.contiguous()}
    data = Rows(given, torch.arange(ROWS) % 3)
    return Task("classification", data, data)


@pytest.mark.filterwarnings("ignore:runs go one at a time")
@pytest.mark.parametrize("count", [1, 2])
def test_texts_to_choose_from_may_be_of_unequal_lengths(count):
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    rates = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = transformers.BertForMultipleChoice(transformers.BertConfig(**sizes, **rates, intermediate_size=24))
    model, data = model.double().eval(), choices()
    runs = [cd.FineTuningRun(lora(target_modules=["query", "value"], task_type=None), 1e-2, s) for s in range(count)]
    found = cd.fine_tune(model, runs, data, 4, 4, evaluate_at=(0,), show_progress=False)
    for run, history in zip(runs, found, strict=True):
        assert history.losses == pytest.approx(trained_by_peft(model, run, data, 4, 4), rel=1e-6)
        logits = model(**data.validation.tokens).logits.detach().numpy()
        assert history.scores[0] == data.score(logits, data.validation.labels.numpy())
