"""Causal language models in stacks: every run as peft alone would train it, whatever is passed over to save memory."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")  # a GPU host may have PyTorch, Triton and pytest alone
pytest.importorskip("peft")
import peft
import transformers

import compressible as cd
from compressible.finetuning import causal, stacked_pass
from compressible.finetuning.batches import RunsMixError
from compressible.finetuning.run import data_order
from compressible.finetuning.stacked_pass import StackedPass
from compressible.finetuning.trainer import BETAS, EPS, Trainer

VOCABULARY, LENGTH = 90, 20
SMALL = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
SHAPE = SMALL | {"num_key_value_heads": 2, "intermediate_size": 24}


def qwen(**given) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.Qwen2Config(**SHAPE | {"tie_word_embeddings": True} | given)
    return transformers.Qwen2ForCausalLM(config).double().eval()


def gemma() -> nn.Module:
    """Whose logits are capped after the layer that writes words."""
    torch.manual_seed(0)
    config = transformers.Gemma2Config(**SHAPE, head_dim=4, final_logit_softcapping=0.5, pad_token_id=0)
    return transformers.Gemma2ForCausalLM(config).double().eval()


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    rates = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    config = transformers.GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=32, **rates)
    return transformers.GPT2LMHeadModel(config).double().eval()


def rows(count: int, seed: int) -> cd.Examples:
    """Prompts of 1 to 5 tokens, whose continuations are asked for."""
    draw = torch.Generator().manual_seed(seed)
    places = torch.arange(LENGTH)
    lengths = torch.randint(7, LENGTH + 1, (count, 1), generator=draw)
    prompts = torch.randint(1, 6, (count, 1), generator=draw)
    mask = (places < lengths).long()
    ids = torch.randint(1, VOCABULARY, (count, LENGTH), generator=draw) * mask
    labels = torch.where((places >= prompts) & (mask == 1), ids, -100)
    return cd.Examples({"input_ids": ids, "attention_mask": mask}, labels, (("",),) * count)


def task(train: int = 24, validation: int = 9) -> cd.Task:
    return cd.Task("toy", "causal", 0, "bleu", rows(train, 0), rows(validation, 1))


def lora(**given) -> peft.LoraConfig:
    known = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    return peft.LoraConfig(**known | given)


def runs() -> list[cd.FineTuningRun]:
    deep = cd.DeepLoraConfig(r=3, variant="thin", init_scale=0.3, task_type="CAUSAL_LM")
    return [cd.FineTuningRun(lora(), 1e-2, 0), cd.FineTuningRun(lora(r=2), 3e-2, 1), cd.FineTuningRun(deep, 1e-2, 2)]


def trained_by_peft(model: nn.Module, run: cd.FineTuningRun, data: cd.Task, steps: int, batch: int) -> list[float]:
    """Losses and the last validation loss of peft's model and torch's AdamW."""
    torch.manual_seed(run.seed)
    adapted = peft.get_peft_model(copy.deepcopy(model), copy.deepcopy(run.config)).train()
    parameters = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    adam = torch.optim.AdamW(parameters, run.lr, betas=BETAS, eps=EPS, weight_decay=0.0)
    losses = []
    for chosen in data_order(run, len(data.train), steps, batch):
        tokens, labels = data.train.batch(chosen)
        loss = mean_loss(adapted, tokens, labels)
        loss.backward()
        adam.step()
        adam.zero_grad()
        losses.append(loss.item())
    with torch.no_grad():
        losses.append(mean_loss(adapted.eval(), data.validation.tokens, data.validation.labels).item())
    return losses


def mean_loss(model: nn.Module, tokens: dict, labels: torch.Tensor) -> torch.Tensor:
    """transformers' own loss, which rounds to float32, in full; peft's prompts have logits of their own before."""
    output = model(**tokens, labels=labels)
    logits = output.logits[:, -labels.shape[1] : -1].flatten(0, 1)
    loss = nn.functional.cross_entropy(logits, labels[:, 1:].flatten())
    assert loss.item() == pytest.approx(output.loss.item(), rel=1e-6)
    return loss


@pytest.mark.parametrize("make", [qwen, gemma, gpt2])
@pytest.mark.parametrize("logits", [causal.LOGITS, 7 * VOCABULARY])
def test_a_stack_of_runs_equals_peft_alone(make, logits, monkeypatch):
    monkeypatch.setattr(causal, "LOGITS", logits)
    model, data, given = make(), task(), runs()
    histories = cd.fine_tune(model, given, data, 5, 4, evaluate_at=(5,), show_progress=False)
    for run, history in zip(given, histories, strict=True):
        assert history.shared == 3
        expected = trained_by_peft(model, run, data, 5, 4)
        assert [*history.losses, history.scores[5]] == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize("given", [{"target_modules": ["q_proj", "lm_head"]}, {"modules_to_save": ["lm_head"]}])
def test_a_layer_of_words_that_is_trained_is_not_passed_over(given):
    model, data = qwen(tie_word_embeddings=False), task()
    both = [cd.FineTuningRun(lora(**given), 1e-2, seed) for seed in (0, 1)]
    stacked = StackedPass(model, both, data, 3, 4)
    Trainer(stacked)
    assert stacked.words.layer is None
    together = cd.fine_tune(model, both, data, 3, 4, show_progress=False)
    if "target_modules" in given:  # a saved head starts anew, and peft's own does not
        expected = trained_by_peft(model, both[1], data, 3, 4)[:3]
        assert together[1].losses == pytest.approx(expected, rel=1e-8)
    [alone] = cd.fine_tune(model, both[1:], data, 3, 4, show_progress=False)
    assert together[1].losses == pytest.approx(alone.losses, rel=1e-9)


@pytest.mark.parametrize(("make", "passed"), [(qwen, True), (gpt2, True), (gemma, False)])
def test_logits_are_not_taken_whole_unless_the_model_goes_on_with_them(make, passed):
    stacked = StackedPass(make(), runs(), task(), 3, 4)
    Trainer(stacked)
    assert (stacked.words.layer is not None) == passed
    tokens, labels = stacked.batch(0)
    stacked.model.eval()
    stacked.rows.rows = len(labels)
    found = stacked.forward(tokens, labels)
    asked = int((labels[..., 1] != -100).sum(1).max())
    assert asked <= labels.shape[1] < asked + 8
    assert found.shape == (12, labels.shape[1], 16 if passed else VOCABULARY)


def test_a_run_that_goes_alone_is_peft_s_own():
    model, data, dora = qwen(), task(), cd.FineTuningRun(lora(use_dora=True), 1e-2, 3)
    with pytest.warns(UserWarning, match="use_dora"):
        [history] = cd.fine_tune(model, [dora], data, 4, 4, evaluate_at=(4,), show_progress=False)
    assert [*history.losses, history.scores[4]] == pytest.approx(trained_by_peft(model, dora, data, 4, 4), rel=1e-8)


def test_the_mask_is_left_out_only_where_no_token_sees_the_padding():
    stacked = StackedPass(qwen(), runs(), task(), 3, 4)
    Trainer(stacked)
    assert not stacked.words.masked
    torch.manual_seed(0)
    config = transformers.BertConfig(**SMALL, intermediate_size=24, max_position_embeddings=LENGTH)
    both_ways = transformers.BertLMHeadModel(config).double().eval()  # which is no decoder, and reads what follows
    stacked = StackedPass(both_ways, runs(), task(), 3, 4)
    Trainer(stacked)
    assert stacked.words.masked


def test_scores_do_not_depend_on_the_parts_of_an_evaluation(monkeypatch):
    given, data = runs(), task()
    whole = cd.fine_tune(qwen(), given, data, 2, 4, evaluate_at=(2,), show_progress=False)
    monkeypatch.setattr(stacked_pass, "EVALUATION_TOKENS", 7 * LENGTH)
    parts = cd.fine_tune(qwen(), given, data, 2, 4, evaluate_at=(2,), show_progress=False)
    assert [run.scores[2] for run in parts] == pytest.approx([run.scores[2] for run in whole], rel=1e-9)


def test_words_asked_for_are_those_after_a_place():
    labels = torch.tensor([[5, -100, 7, 8], [5, -100, -100, 3], [1, 2, -100, -100]])
    words, counts = causal.asked_words(labels)
    assert counts.tolist() == [2, 1, 1]
    assert words.tolist() == [[[1, 7], [2, 8]], [[2, 3], [0, -100]], [[0, 2], [0, -100]]]


def test_chunks_give_the_losses_and_gradients_of_all_logits(monkeypatch):
    monkeypatch.setattr(causal, "LOGITS", 3 * 11)
    draw = torch.Generator().manual_seed(0)
    states = torch.randn(8, 5, dtype=torch.float64, generator=draw, requires_grad=True)
    weight, bias = (torch.randn(*shape, dtype=torch.float64, generator=draw) for shape in ((11, 5), (11,)))
    words = torch.tensor([0, 3, -100, 10, 5, -100, 2, 2])
    losses = causal._WordLosses.apply(states, words, weight, bias, True)
    each = nn.functional.cross_entropy(states @ weight.T + bias, words, reduction="none", ignore_index=-100)
    torch.testing.assert_close(losses, each)
    scale = torch.rand(8, dtype=torch.float64, generator=draw)
    found, expected = (torch.autograd.grad(value @ scale, states)[0] for value in (losses, each))
    torch.testing.assert_close(found, expected)


def test_labels_of_a_batch_are_as_wide_as_its_tokens():
    part = rows(6, 0)
    tokens, labels = part.batch(torch.tensor([2, 4]))
    assert labels.shape == tokens["input_ids"].shape
    assert ((labels == tokens["input_ids"]) | (labels == -100)).all()


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda labels: labels[:, :-1], "the input_ids' shape"),
        (lambda labels: labels.masked_fill(torch.arange(24)[:, None] == 3, -100), r"none in rows \[3\]"),
        (lambda labels: labels.clamp(min=-1), "words from 0"),
        (lambda labels: labels.where(labels >= 0, 4), "words in the padding"),
        (lambda labels: labels + 40 * (labels > 60), "below the model's 90"),
    ],
)
def test_labels_that_ask_for_no_word_are_refused(spoil, said):
    data = task()
    part = cd.Examples(data.train.tokens, spoil(data.train.labels), data.train.texts)
    with pytest.raises(ValueError, match=said):
        cd.fine_tune(qwen(), runs(), cd.Task("toy", "causal", 0, "bleu", part, data.validation), 2, 4)


def test_a_model_that_reads_on_is_found_out():
    torch.manual_seed(0)
    config = transformers.BertConfig(**SMALL, intermediate_size=24, max_position_embeddings=LENGTH)
    model = transformers.BertLMHeadModel(config).double().eval()

    def unmasked(*args, attention_mask=None, forward=model.forward, **given):
        return forward(*args, **given)

    model.forward = unmasked
    with pytest.raises(RunsMixError, match="padding"):
        Trainer(StackedPass(model, runs(), task(), 2, 4))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("precision", "compiled"), [("float32", False), ("float32", True), ("bfloat16", False)])
def test_steps_of_a_causal_model_are_graphs_and_give_the_same(precision, compiled):
    model, data, given = qwen().float().cuda(), task(), runs()
    histories = {}
    for graphed in (False, True):
        trainer = Trainer(StackedPass(model, given, data, 6, 4, precision))
        trainer.accelerate(compiled and graphed, graphed)
        for step in range(6):
            trainer.advance(step)
        assert (trainer.graphs is not None) == graphed
        histories[graphed] = trainer.losses.cpu()
    close = 1e-2 if precision == "bfloat16" else 1e-4  # a capture may sum in another order, and bfloat16 keeps 8 bits
    torch.testing.assert_close(histories[True], histories[False], rtol=close, atol=close / 10)
