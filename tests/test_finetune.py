"""Stacked fine-tuning: every run as it would go alone, whatever shares its pass."""

from __future__ import annotations

import copy
import dataclasses
import gc
import os
import weakref

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("transformers")  # a GPU host may have PyTorch, Triton and pytest alone
pytest.importorskip("peft")
import peft
from peft.tuners.lora.config import LoraGAConfig
from reference_finetune import reference_fine_tune
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

import compressible as cd
from compressible.finetuning import stacked_pass
from compressible.finetuning.batches import PassRows
from compressible.finetuning.dropout.per_run import PerRunDropout
from compressible.finetuning.losses import run_losses
from compressible.finetuning.run import FineTuningDivergenceError, data_order
from compressible.finetuning.stacked.heads import StackedLinear
from compressible.finetuning.stacked.layers import StackedAdapter, stacked_adapters
from compressible.finetuning.stacked_pass import StackedPass
from compressible.finetuning.update_spectra import watch_spectra
from compressible.runtime.devices import matmul_precision, tensor_float_32

VOCABULARY, LENGTH = 50, 24
LINEAR = ["query", "key", "value", "dense"]
T5_LAYERS = ["q", "k", "v", "o", "wi", "wo", "embed_tokens", "relative_attention_bias"]


@dataclasses.dataclass
class Rows:
    tokens: dict
    labels: torch.Tensor


@dataclasses.dataclass
class Task:
    kind: str
    train: Rows
    validation: Rows
    name: str = "toy"

    def score(self, logits, labels):
        if self.kind == "regression":
            return float(np.corrcoef(np.asarray(logits)[:, 0], labels)[0, 1])
        return float((np.asarray(logits).argmax(1) == labels).mean())


def rows(count: int, kind: str, seed: int) -> Rows:
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (count, LENGTH), generator=draw)
    lengths = torch.randint(4, LENGTH + 1, (count,), generator=draw)
    mask = (torch.arange(LENGTH) < lengths[:, None]).long()
    tokens = {"input_ids": ids * mask, "attention_mask": mask}
    if kind == "generation":
        return Rows(tokens, torch.where(torch.rand(count, 6, generator=draw) < 0.2, -100, ids[:, :6]))
    score = (ids * mask).sum(1).double() / mask.sum(1) / VOCABULARY
    return Rows(tokens, score if kind == "regression" else (score > 0.5).long())


def task(kind: str = "regression", train: int = 40, validation: int = 11) -> Task:
    return Task(kind, rows(train, kind, 0), rows(validation, kind, 1))


def bert(
    outputs: int = 1, dropout: float = 0.1, layers: int = 2, attention: str = "sdpa", positions: int = LENGTH
) -> nn.Module:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=layers, num_attention_heads=2, intermediate_size=40,
        max_position_embeddings=positions, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout,
        num_labels=outputs, attn_implementation=attention,
    )  # fmt: skip
    return BertForSequenceClassification(config).double().eval()


def t5() -> nn.Module:
    torch.manual_seed(0)
    shape = dict(vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, pad_token_id=0)
    return T5ForConditionalGeneration(T5Config(**shape, decoder_start_token_id=0)).double().eval()


def checkpointing() -> nn.Module:
    model = bert()
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()  # the name moved
    return model


def config(variant: str = "thin", **given) -> cd.DeepLoraConfig:
    values = {"r": 4, "init_scale": 0.1, "task_type": "SEQ_CLS", "target_modules": "all-linear"}
    return cd.DeepLoraConfig(variant=variant, **(values | given))


def lora(**given) -> peft.LoraConfig:
    return peft.LoraConfig(
        **({"r": 4, "lora_alpha": 4, "target_modules": "all-linear", "task_type": "SEQ_CLS"} | given)
    )


def mixed() -> list[cd.FineTuningRun]:
    Run = cd.FineTuningRun
    return [
        Run(config("compressed"), 1e-2, 3, label="compressed"),
        Run(config("thin", r=6), 1e-3, 0, label="thin"),
        Run(lora(), 1e-3, 1, head_lr=1e-2, start=cd.paper_lora_start),
        Run(lora(r=2, lora_alpha=8), 2e-3, 2, subset=torch.arange(20), lr_ratio=4.0),
        Run(config("full"), 1e-3, 4),
        Run(config("compressed", r=2, depth=2 + 1), 2e-2, 5),
        Run(config("thin", depth=4), 1e-3, 0),
    ]


def assert_equal(found: cd.RunHistory, expected: cd.RunHistory, tolerance: float, scores: float = 1e-6) -> None:
    np.testing.assert_allclose(found.losses, expected.losses, rtol=tolerance)
    for step, score in expected.scores.items():
        assert found.scores[step] == pytest.approx(score, rel=max(tolerance, scores))
    for name, chain in expected.chains.items():
        for own, other in zip(found.chains[name], chain, strict=True):
            torch.testing.assert_close(own, other, rtol=tolerance, atol=tolerance)
    for name, head in expected.heads.items():
        for key, value in head.items():
            torch.testing.assert_close(found.heads[name][key], value.detach(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("embeddings", [False, True])
def test_every_run_of_a_mixed_stack_goes_as_the_plain_run_alone(dropout, embeddings):
    changed = {"target_modules": [*LINEAR, "word_embeddings"]}
    runs = [
        dataclasses.replace(run, config=dataclasses.replace(run.config, **changed)) if embeddings else run
        for run in mixed()
    ]
    options = {"steps": 7, "batch_size": 4, "decay_ratio": 0.1, "evaluate_at": (0, 7), "dropout": dropout}
    stacked = cd.fine_tune(bert(), runs, task(), **options)
    for found, expected in zip(stacked, reference_fine_tune(bert(), runs, task(), **options), strict=True):
        assert_equal(found, expected, 1e-8)
    assert {found.shared for found in stacked} == {1, 6}  # the full one goes by itself


@pytest.mark.parametrize("kind, outputs", [("regression", 1), ("classification", 3)])
def test_a_run_is_the_same_alone_and_in_a_stack(kind, outputs):
    runs, data = mixed(), task(kind)
    together = cd.fine_tune(bert(outputs), runs, data, 5, 4, evaluate_at=(5,))
    for run, found in zip(runs, together, strict=True):
        assert_equal(found, cd.fine_tune(bert(outputs), [run], data, 5, 4, evaluate_at=(5,))[0], 1e-9)


@pytest.mark.parametrize("runs", [[0, 1, 2], [4]])  # narrow factors, and the full variant's dense update
def test_dropout_before_the_adapters_goes_as_in_the_plain_run_alone(runs):
    chosen = [mixed()[i] for i in runs]
    given = [dataclasses.replace(r, config=dataclasses.replace(r.config, lora_dropout=0.3)) for r in chosen]
    stacked = cd.fine_tune(bert(), given, task(), 6, 4)
    for run, found, expected in zip(given, stacked, reference_fine_tune(bert(), given, task(), 6, 4), strict=True):
        assert_equal(found, expected, 1e-8)
        assert_equal(found, cd.fine_tune(bert(), [run], task(), 6, 4)[0], 1e-9)


def test_scores_of_generation_do_not_depend_on_how_many_share_the_pass(monkeypatch):
    monkeypatch.setattr(stacked_pass, "EVALUATION_ROWS", 12)
    runs = [cd.FineTuningRun(config(task_type="SEQ_2_SEQ_LM"), 1e-3, seed) for seed in range(3)]
    data = task("generation")
    together = cd.fine_tune(t5(), runs, data, 2, 4, evaluate_at=(2,))
    alone = cd.fine_tune(t5(), runs[:1], data, 2, 4, evaluate_at=(2,))
    assert together[0].scores[2] == pytest.approx(alone[0].scores[2], rel=1e-9)


def test_scores_of_generation_are_the_mean_cross_entropies_of_the_plain_runs():
    chosen = config(task_type="SEQ_2_SEQ_LM")
    runs, data = [cd.FineTuningRun(chosen, 1e-3, seed) for seed in (0, 1)], task("generation", validation=70)
    options = {"steps": 3, "batch_size": 4, "evaluate_at": (0, 3)}
    stacked, plain = cd.fine_tune(t5(), runs, data, **options), reference_fine_tune(t5(), runs, data, **options)
    for found, expected in zip(stacked, plain, strict=True):
        assert found.scores == pytest.approx(expected.scores, rel=1e-9)
    with torch.no_grad():
        loss = t5()(**data.validation.tokens, labels=data.validation.labels).loss.item()
    assert [found.scores[0] for found in stacked] == pytest.approx([loss, loss], rel=0.02)  # but for the small starts


# data order


def test_an_epoch_has_no_row_twice_leaves_an_incomplete_batch_out_and_differs_from_the_next():
    run = cd.FineTuningRun(config(), 1e-3, 3)
    order = data_order(run, 22, 12, 4)
    assert order.shape == (12, 4)
    epochs = order[:10].view(2, 20)  # of five batches, two rows are left over
    assert all(len(set(epoch.tolist())) == 20 and set(epoch.tolist()) <= {*range(22)} for epoch in epochs)
    assert epochs[0].tolist() != epochs[1].tolist() and set(order[10:].flatten().tolist()) <= {*range(22)}
    assert torch.equal(order[:7], data_order(run, 22, 7, 4))  # steps only cut it


def test_the_seed_alone_decides_the_order_and_a_subset_names_its_rows():
    subset = torch.tensor([5, 30, 7, 30, 11, 2, 19, 8])
    runs = [cd.FineTuningRun(config(), rate, seed, subset) for rate, seed in ((1e-3, 0), (1e-2, 0), (1e-3, 1))]
    first, again, other = (data_order(run, 40, 4, 4) for run in runs)
    assert torch.equal(first, again) and not torch.equal(first, other)
    for order in (first, other):
        assert all(sorted(epoch.flatten().tolist()) == sorted(subset.tolist()) for epoch in order.view(2, 8))


def test_a_subset_of_one_batch_keeps_its_order():
    subset = torch.tensor([9, 3, 3, 27])
    order = data_order(cd.FineTuningRun(config(), 1e-3, 3, subset), 40, 5, 4)
    assert torch.equal(order, subset.expand(5, 4))


def test_processes_of_their_own_runs_do_not_share_gradients(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda _: pytest.fail("each process has its own runs"))
    cd.fine_tune(bert(), mixed()[:1], task(), 2, 4)


def test_a_pass_leaves_nothing_behind_for_the_next(monkeypatch):
    seen, alive = [], []
    start = StackedPass.start

    def watched(self):
        alive.append(sum(model() is not None for model in seen))
        seen.append(weakref.ref(self.model))
        start(self)

    monkeypatch.setattr(StackedPass, "start", watched)
    cd.fine_tune(bert(), mixed(), task(), 2, 4, max_stack=1)
    assert alive == [0] * len(mixed())


def test_stacks_may_be_limited():
    runs = mixed()
    for found, expected in zip(
        cd.fine_tune(bert(), runs, task(), 3, 4, max_stack=2), cd.fine_tune(bert(), runs, task(), 3, 4), strict=True
    ):
        assert_equal(found, expected, 1e-10)
        assert found.shared <= 2


def test_a_run_of_full_width_counts_as_three():
    runs = [cd.FineTuningRun(config(variant), 1e-3, seed) for variant in ("full", "thin") for seed in range(4)]
    found = cd.fine_tune(bert(layers=1), runs, task(), 2, 4, max_stack=6)
    assert [run.shared for run in found] == [2] * 4 + [4] * 4


def test_a_decoder_with_conv1d_and_a_t5_go_as_the_plain_run():
    torch.manual_seed(0)
    gpt = GPT2ForSequenceClassification(GPT2Config(
        vocab_size=VOCABULARY, n_positions=LENGTH, n_embd=16, n_layer=2, n_head=2, num_labels=1, pad_token_id=0,
    )).double().eval()  # fmt: skip
    own = {"task_type": None, "modules_to_save": None}
    cases = ((gpt, "regression", config(modules_to_save=["score"])), (t5(), "generation", config("compressed", **own)))
    for model, kind, chosen in cases:
        runs = [cd.FineTuningRun(chosen, 1e-3, seed) for seed in (0, 1)]
        stacked = cd.fine_tune(model, runs, task(kind), 4, 4)
        for found, expected in zip(stacked, reference_fine_tune(model, runs, task(kind), 4, 4), strict=True):
            assert_equal(found, expected, 1e-8)
    scored = cd.fine_tune(t5(), runs, task("generation"), 2, 4, evaluate_at=(2,))
    assert all(np.isfinite(found.scores[2]) for found in scored)


def test_in_float32_a_stack_stays_within_noise_of_the_plain_runs():
    model = bert().float()
    runs = mixed()
    stacked = cd.fine_tune(model, runs, task(), 6, 4)
    for found, expected in zip(stacked, reference_fine_tune(model, runs, task(), 6, 4), strict=True):
        np.testing.assert_allclose(found.losses, expected.losses, rtol=2e-3)


@pytest.mark.parametrize("before", ["tf32", "ieee", "none"])
def test_precision_is_put_back_whichever_way_it_was_set(before):
    settings = torch.backends.cuda.matmul
    settings.fp32_precision = before
    try:
        for name in ("tf32", "bfloat16", "float32"):
            with matmul_precision(name):
                assert tensor_float_32() == (name != "float32") == settings.allow_tf32
            assert settings.fp32_precision == before
        cd.fine_tune(bert(), mixed()[:1], task(), 1, 4, precision="tf32")
    finally:
        settings.allow_tf32, settings.fp32_precision = False, "none"


def test_bfloat16_keeps_factors_in_float32_and_learns_the_same_within_its_noise():
    model, runs = bert(dropout=0.0).float(), mixed()
    half = cd.fine_tune(model, runs, task(), 10, 4, precision="bfloat16")
    full = cd.fine_tune(model, runs, task(), 10, 4)
    for found, expected in zip(half, full, strict=True):
        assert {factor.dtype for chain in found.chains.values() for factor in chain} == {torch.float32}
        np.testing.assert_allclose(found.losses, expected.losses, rtol=0.1, atol=0.02)
    assert next(model.parameters()).dtype is torch.float32


def test_a_diverging_run_leaves_its_neighbours_alone():
    runs = [cd.FineTuningRun(config(), 1e-3, 0), cd.FineTuningRun(config(), 1e200, 1, label="too fast")]
    good, bad = cd.fine_tune(bert(), runs, task(), 6, 4, evaluate_at=(6,))
    assert_equal(good, cd.fine_tune(bert(), runs[:1], task(), 6, 4, evaluate_at=(6,))[0], 1e-10)
    assert bad.divergence is not None and np.isnan(bad.scores[6]) and good.divergence is None
    with pytest.raises(FineTuningDivergenceError, match=r"too fast.*lr 1e\+200") as error:
        bad.model()
    assert error.value.history is bad


def test_a_diverging_run_leaves_its_neighbours_spectra():
    runs = [cd.FineTuningRun(config(), 1e-3, 0), cd.FineTuningRun(config(), 1e200, 1)]
    marks = {"watch_at": (0, 4), "watch": watch_spectra(2)}
    good, bad = cd.fine_tune(bert(), runs, task(), 4, 4, **marks)
    (alone,) = cd.fine_tune(bert(), runs[:1], task(), 4, 4, **marks)
    np.testing.assert_allclose(good.watched[4].values, alone.watched[4].values, rtol=1e-9)
    assert np.isnan(bad.watched[4].values).any() and np.isfinite(bad.watched[0].values).all()


@pytest.mark.parametrize("marks", [(), (1,)])
@pytest.mark.parametrize("variant, kind", [("thin", torch.float64), ("full", torch.float32), ("thin", torch.float32)])
def test_a_run_that_the_last_update_spoils_has_diverged(marks, variant, kind, tmp_path):
    fast = 1e200 if kind is torch.float64 else 1e30
    runs = [cd.FineTuningRun(config(variant), 1e-3, 0), cd.FineTuningRun(config(variant), fast, 1)]
    given = {"task": task(), "steps": 1, "batch_size": 4, "evaluate_at": marks, "checkpoint": tmp_path / "state"}
    for _ in range(2):  # the second from the checkpoint
        good, bad = cd.fine_tune(bert().to(kind), runs, **given)
        assert good.divergence is None and np.isfinite(bad.losses).all() and bad.divergence == 1
        with pytest.raises(FineTuningDivergenceError, match="at step 1"):
            bad.model()


def test_logits_that_overflow_with_finite_updates_have_diverged(monkeypatch):
    logits, scale = StackedPass.validation_logits, np.array([1, np.inf])[:, None, None]
    monkeypatch.setattr(StackedPass, "validation_logits", lambda self: logits(self) * scale)
    runs = [cd.FineTuningRun(config(), 1e-3, seed) for seed in (0, 1)]
    good, bad = cd.fine_tune(bert(), runs, task(), 2, 4, evaluate_at=(2,))
    assert good.divergence is None and bad.divergence == 2 and np.isnan(bad.scores[2])


def test_the_model_of_a_run_gives_its_score_is_saved_and_merges(tmp_path):
    source, data = bert().float(), task()
    before = {name: value.clone() for name, value in source.state_dict().items()}
    for number, history in enumerate(cd.fine_tune(source, mixed(), data, 4, 4, evaluate_at=(4,))):
        model = history.model().eval()
        logits = model(**data.validation.tokens).logits
        score = data.score(logits.detach(), data.validation.labels)
        assert isinstance(model, peft.PeftModel) and score == pytest.approx(history.scores[4], abs=1e-4)
        model.save_pretrained(tmp_path / str(number))
        loaded = peft.PeftModel.from_pretrained(bert().float(), tmp_path / str(number)).eval()
        torch.testing.assert_close(loaded(**data.validation.tokens).logits, logits, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in source.state_dict().items())
    merged = copy.deepcopy(model).merge_and_unload(safe_merge=True)
    torch.testing.assert_close(merged(**data.validation.tokens).logits, logits, rtol=1e-4, atol=1e-5)


def test_the_model_of_a_run_over_bfloat16_runs_and_draws_nothing():
    (history,) = cd.fine_tune(bert().bfloat16(), mixed()[1:2], task(), 2, 4)
    state = torch.get_rng_state()
    assert history.model().eval()(**task().validation.tokens).logits.isfinite().all()
    assert torch.equal(torch.get_rng_state(), state)


def test_histories_may_go_without_factors():
    (history,) = cd.fine_tune(bert(), mixed()[:1], task(), 2, 4, keep_factors=False)
    assert history.chains is None and np.isfinite(history.losses).all()
    with pytest.raises(RuntimeError, match="keep_factors=True"):
        history.model()


def test_a_pass_is_gone_before_the_next_begins(monkeypatch):
    passes, alive = [], []
    build = StackedPass.__init__

    def noted(stacked, *values, **named):
        alive.append(sum(other() is not None for other in passes))
        passes.append(weakref.ref(stacked))
        build(stacked, *values, **named)

    monkeypatch.setattr(StackedPass, "__init__", noted)
    gc.disable()
    try:
        cd.fine_tune(bert(layers=1), mixed()[1:3], task(), 2, 4, evaluate_at=(2,), max_stack=1)
    finally:
        gc.enable()
    assert alive == [0, 0]


def test_a_compressed_start_refuses_layers_that_are_too_small():
    runs = [cd.FineTuningRun(cd.DeepLoraConfig(r=4), 1e-2)]
    with pytest.raises(ValueError, match="'classifier' is \\(1, 16\\), too small"):
        cd.fine_tune(bert(), runs, task(), 2, 4)


def test_snapshots_are_in_full_precision_whatever_the_runs():
    allowed = []

    def watch(snapshot):
        for _ in snapshot.updates():
            allowed.append(torch.backends.cuda.matmul.allow_tf32)
        return [None]

    original = StackedAdapter.updates
    inside = []

    def spy(adapter):
        inside.append(torch.backends.cuda.matmul.allow_tf32)
        return original(adapter)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StackedAdapter, "updates", spy)
        cd.fine_tune(bert(), mixed()[1:2], task(), 1, 4, watch_at=(1,), watch=watch, precision="tf32")
    assert inside and not any(inside) and all(allowed)


def test_snapshots_show_the_updates_of_each_run():
    def watch(snapshot):
        norms = [update.flatten(1).norm(dim=1) for _, update in snapshot.updates()]
        return torch.stack(norms).sum(0).tolist()

    runs = [cd.FineTuningRun(config("full", init_scale=1e-3), rate, 0) for rate in (1e-3, 1e-2)]
    slow, fast = cd.fine_tune(bert(), runs, task(), 5, 4, watch_at=(0, 5), watch=watch)
    assert slow.watched[0] == pytest.approx(fast.watched[0]) and 0 < slow.watched[0] < 1e-6
    assert 0 < slow.watched[5] < fast.watched[5]


PLAINEST = os.environ.get("ATEN_CPU_CAPABILITY") == "default"
INDUCTOR = pytest.param("inductor", marks=pytest.mark.skipif(PLAINEST, reason="inductor has no plain instructions"))


@pytest.mark.parametrize("compiler", ["eager", INDUCTOR])
def test_compiled_steps_equal_eager_ones(compiler, monkeypatch):
    compile_ = torch.compile
    whole = {"backend": compiler, "fullgraph": True}
    monkeypatch.setattr(torch, "compile", lambda call, **options: compile_(call, **whole, **options))
    runs = [mixed()[i] for i in (0, 1)]
    # Two layers: the first must get its gradients. PyTorch 2.11's inductor takes sdpa's float64 on a CPU for float32.
    model = bert(layers=2) if compiler == "eager" else bert(layers=1, attention="eager")
    data = task()
    for rows_ in (data.train, data.validation):
        rows_.tokens["attention_mask"][:, :] = 1  # one length, one compilation
    torch._dynamo.reset()
    dropout = compiler == "eager"  # inductor takes a minute for the hashes on a CPU
    compiled = cd.fine_tune(model, runs, data, 4, 4, compiled=True, dropout=dropout)
    for found, expected in zip(compiled, cd.fine_tune(model, runs, data, 4, 4, dropout=dropout), strict=True):
        assert_equal(found, expected, 1e-8)


# dropout


def test_masks_have_their_rate_differ_between_everything_and_do_not_depend_on_padding():
    step = torch.zeros((), dtype=torch.int64)
    per_run = PerRunDropout([0, 1], step)
    one = torch.ones(2 * 32, 40, 64, dtype=torch.float64)

    def draw(x, per_run=per_run):
        with per_run:
            return nn.functional.dropout(x, 0.3), nn.functional.dropout(x, 0.3)

    first, second = draw(one)
    assert first.mean().item() == pytest.approx(1, abs=0.02)
    assert (first == 0).double().mean().item() == pytest.approx(0.3, abs=0.01)
    step += 1
    masks = [*(part for mask in (first, second) for part in mask.chunk(2)), *draw(one)[0].chunk(2)]
    both = torch.stack([(mask == 0).double().flatten() for mask in masks])
    assert (torch.corrcoef(both) - torch.eye(6, dtype=torch.float64)).abs().max() < 0.018  # five deviations
    neighbours = (first[:, :, 1:] == 0).double() * (first[:, :, :-1] == 0).double()
    assert neighbours.mean().item() == pytest.approx(0.09, abs=0.01)
    step -= 1
    alone = draw(one[:32, :20], PerRunDropout([1], step))[0]
    torch.testing.assert_close(alone, first[32:, :20])


def test_attention_with_dropout_equals_torchs_in_the_mean_and_without_dropout_exactly():
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 4, 2, 6, 8, dtype=torch.float64)
    mask = torch.rand(4, 1, 6, 6) > 0.3
    mask |= torch.eye(6, dtype=torch.bool)
    attention = nn.functional.scaled_dot_product_attention
    expected = attention(query, key, value, mask)
    means = []
    step = torch.zeros((), dtype=torch.int64)
    for _ in range(400):
        with PerRunDropout([0, 1], step):
            torch.testing.assert_close(attention(query, key, value, mask), expected)
            means.append(attention(query, key, value, mask, dropout_p=0.2))
        step += 1
    assert (torch.stack(means).mean(0) - expected).abs().max() < 0.15


# errors


def labelled(kind: str, labels: list) -> Task:
    data = task(kind)
    return dataclasses.replace(data, train=Rows(data.train.tokens, torch.tensor(labels)))


@pytest.mark.parametrize("changed, message", [
    ({"steps": 0}, "steps is 0"),
    ({"batch_size": 64}, "40 rows"),
    ({"decay_ratio": 2.0}, "decay_ratio is 2.0"),
    ({"evaluate_at": (9,)}, "steps from 0 to 5"),
    ({"watch_at": (1,)}, "watch"),
    ({"precision": "half"}, "'half'"),
    ({"runs": []}, "at least one run"),
    ({"graphed": True}, "CUDA"),
    ({"checkpoint_every": 0}, "checkpoint_every is 0"),
    ({"task": dataclasses.replace(task(), kind="regresion")}, "'regresion'"),
    ({"watch_at": (1,), "watch": lambda snapshot: []}, "0 values"),
    ({"runs": [cd.FineTuningRun(config(), -1.0)]}, "lr is -1.0"),
    ({"runs": [cd.FineTuningRun(config(), "fast")]}, "lr is 'fast'"),
    ({"runs": [cd.FineTuningRun(config(), 1e-3, head_lr=-1e-2)]}, "head_lr is -0.01"),
    ({"runs": [cd.FineTuningRun(config(), 1e-3, head_lr=float("nan"))]}, "head_lr is nan"),
    ({"runs": [config()]}, "expected each a FineTuningRun"),
    ({"runs": [cd.FineTuningRun(config(), 1e-3, -1)]}, "seed is -1"),
    ({"runs": [cd.FineTuningRun(config(), 1e-3, 1.5)]}, "seed is 1.5"),
    ({"evaluate_at": (2.5,)}, r"evaluate_at is \[2.5\], expected integers"),
    ({"evaluate_at": 2}, "evaluate_at is 2, expected integers"),
    ({"watch_at": (True,)}, r"watch_at is \[True\], expected integers"),
    ({"evaluate_at": torch.tensor([2.0])}, r"evaluate_at is \[2.0\], expected integers"),
    ({"max_stack": 1.5}, "max_stack is 1.5"),
    ({"runs": [cd.FineTuningRun(config(), 1e-3, subset=torch.arange(40) < 20)]}, r"mask of bools.*nonzero"),
    ({"runs": [cd.FineTuningRun(config(), 1e-3, subset=torch.arange(8.0))]}, "integers in one dimension"),
    ({"runs": [cd.FineTuningRun(config(), 1e-3, subset=torch.arange(8).view(4, 2))]}, "integers in one dimension"),
    ({"runs": [cd.FineTuningRun(config(), 1e-3, subset=[])]}, "0 rows"),
    ({"task": labelled("regression", [0.5, float("nan")] * 20)}, r"not finite in rows \[1, 3, 5, 7, 9\]"),
    ({"task": labelled("classification", [0.0, 1.0] * 20), "model": bert(2)}, "torch.float32, expected integers"),
    ({"task": labelled("classification", [0, -1] * 20), "model": bert(2)}, "classes from 0"),
    ({"task": labelled("classification", [0, 2] * 20), "model": bert(2)}, "up to 2, expected .* 2 outputs"),
    ({"task": labelled("regression", [0.5] * 40), "model": bert(4)}, r"outputs are \(1, 4\), expected \(1, 1\)"),
    ({"task": task(validation=0), "evaluate_at": (1,)}, "task.validation is '0 rows', expected at least one"),
    ({"runs": [cd.FineTuningRun(config(), 1e-3, subset=torch.tensor([1, 2, 3, 99]))]}, "rows from 0 to 39"),
    ({"runs": [cd.FineTuningRun(config(target_modules=["nothing"]), 1e-3)]}, "target_modules"),
    ({"runs": [cd.FineTuningRun(config(modules_to_save=["clasifier"]), 1e-3)]}, "'clasifier'.*matches no module"),
    ({"runs": [cd.FineTuningRun({"r": 4}, 1e-3)]}, "config is {'r': 4}, expected a DeepLoraConfig"),
    ({"runs": [cd.FineTuningRun(config(), 1e-3, start="paper")]}, "start is 'paper', expected None or a function"),
    ({"runs": [cd.FineTuningRun(config("compressed"), 1e-3, start=cd.paper_lora_start)]}, "from the first gradient"),
    ({"runs": [cd.FineTuningRun(lora(r=8), 1e-3, start=cd.paper_lora_start)]}, "scaling is 0.5"),
    ({"runs": [cd.FineTuningRun(config(), 1e-3, start=cd.paper_lora_start)]}, "adapter_name"),
    ({"runs": [cd.FineTuningRun(lora(), 1e-3, lr_ratio=-1.0)]}, "lr_ratio is -1.0"),
    ({"runs": [cd.FineTuningRun(peft.VeraConfig(), 1e-3, lr_ratio=2.0)]}, "VeraConfig, which has no outer factors"),
    ({"runs": [cd.FineTuningRun(lora(inference_mode=True), 1e-3)]}, "inference_mode is True"),
    ({"runs": [cd.FineTuningRun(peft.AdaLoraConfig(total_step=9), 1e-3)]}, "ADALORA, which reallocates ranks"),
    ({"model": bert().half()}, "float16"),
    ({"model": nn.Sequential(bert(), nn.BatchNorm1d(3))}, "'1' is BatchNorm1d"),
    ({"model": checkpointing()}, "gradient checkpointing"),
    ({"model": peft.get_peft_model(bert(), lora())}, "PeftModel.*expected a model without adapters"),
    ({"model": peft.get_peft_model(bert(), lora()).get_base_model()}, "query' is Linear, expected a model without"),
])  # fmt: skip
def test_bad_values_are_named_before_work_starts(changed, message):
    given = {"model": bert(), "runs": mixed()[:1], "task": task(), "steps": 5, "batch_size": 4} | changed
    with pytest.raises(ValueError, match=message):
        cd.fine_tune(**given)


def test_outputs_that_only_broadcast_against_the_labels_are_refused():
    with pytest.raises(ValueError, match=r"outputs are \(8, 8\), expected \(8, 1\)"):
        run_losses("regression", torch.zeros(8, 8), torch.zeros(8), 2)
    vectors = run_losses("regression", torch.ones(4, 3), torch.zeros(4, 3), 2)
    assert vectors.tolist() == [1, 1]


def test_marks_and_subsets_may_be_numpys_or_tensors_and_any_integers():
    chosen = [torch.arange(8, dtype=torch.uint8), np.arange(8), range(8), list(range(8))]
    runs = [cd.FineTuningRun(config(), 1e-3, np.int64(0), subset) for subset in chosen]
    histories = cd.fine_tune(bert(layers=1), runs, task(), 3, 4, evaluate_at=np.array([3, 0]))
    again = cd.fine_tune(bert(layers=1), runs, task(), 3, 4, evaluate_at=torch.tensor([0, 3, 3]))
    for history in [*histories, *again]:
        assert_equal(history, histories[0], 1e-10)
        assert list(history.scores) == [0, 3]


def test_padding_before_the_tokens_is_refused():
    data = task()
    data.train.tokens["attention_mask"][3] = torch.arange(LENGTH) >= 5
    with pytest.raises(ValueError, match="after padding in row 3"):
        cd.fine_tune(bert(), mixed()[:1], data, 2, 4)


def test_what_draws_for_all_runs_at_once_is_refused():
    attention, x = nn.MultiheadAttention(8, 2, dropout=0.1, batch_first=True), torch.randn(4, 3, 8)
    with PerRunDropout([0, 1], torch.zeros((), dtype=torch.int64)):
        with pytest.raises(ValueError, match="multi_head_attention_forward"):
            attention(x, x, x)
        attention.eval()(x, x, x)
        with pytest.raises(ValueError, match="dropout2d"):
            nn.functional.dropout2d(x, 0.1)
        with pytest.raises(ValueError, match="attn_mask and is_causal"):
            nn.functional.scaled_dot_product_attention(x, x, x, torch.ones(3, 3) > 0, 0.1, True)
        assert not nn.functional.dropout(x, 1.0).any()


def test_runs_with_layers_that_see_no_batch_axis_go_one_at_a_time():
    runs = [cd.FineTuningRun(config(target_modules=[*LINEAR, "position_embeddings"]), 1e-3, seed) for seed in (0, 1)]
    with pytest.warns(RuntimeWarning, match="one at a time, since an adapted layer .* in the first axis"):
        found = cd.fine_tune(bert(), runs, task(), 2, 4)
    for one, other in zip(found, cd.fine_tune(bert(), runs, task(), 2, 4, max_stack=1), strict=True):
        assert one.shared == 1
        assert_equal(one, other, 1e-10)


class Sequence(nn.Module):
    """A layer of a transformer over tokens (T, B, 16), if not batch_first, and a head."""

    def __init__(self, batch_first: bool, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.turned, self.embedding = not batch_first, nn.Embedding(VOCABULARY, 16)
        self.layer = nn.Sequential(nn.Linear(16, 16), nn.Dropout(dropout))
        self.classifier = nn.Linear(16, 1)

    def forward(self, input_ids, attention_mask):
        x = self.embedding(input_ids)
        x = self.layer(x.transpose(0, 1)).transpose(0, 1) if self.turned else self.layer(x)
        return self.classifier(x.mean(1))


class Unused(Sequence):
    """The same with a layer that is never called, and one whose output counts for nothing."""

    def __init__(self) -> None:
        super().__init__(batch_first=True)
        self.never, self.nothing = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, input_ids, attention_mask):
        idle = self.nothing(self.embedding(input_ids)).sum((1, 2)) * 0
        return super().forward(input_ids, attention_mask) + idle[:, None]


@pytest.mark.parametrize("layer", ["never", "nothing"])
def test_layers_that_no_gradient_reaches_are_named_in_a_compressed_run(layer):
    runs = [cd.FineTuningRun(config("compressed", target_modules=["layer.0", layer], task_type=None), 1e-3)]
    with pytest.raises(RuntimeError, match=rf"reached '{layer}' and 0 more .*exclude_modules=\['{layer}'\]"):
        cd.fine_tune(Unused().double(), runs, task(), 2, 4)


class Drawing(Sequence):
    """The same, with draws of its own from torch's generator, of which `rate` count."""

    def __init__(self, rate: float) -> None:
        super().__init__(batch_first=True)
        self.rate = rate

    def forward(self, input_ids, attention_mask):
        out = super().forward(input_ids, attention_mask)
        return out * (torch.rand(len(out), 1) >= self.rate) if self.training else out


def test_a_model_that_draws_random_numbers_itself_is_refused_unless_they_are_idle():
    runs = [cd.FineTuningRun(config(target_modules=["layer.0"]), 1e-3, seed) for seed in (0, 1)]
    with pytest.raises(RuntimeError, match=r"Drawing draws random numbers itself.*neighbours"):
        cd.fine_tune(Drawing(0.3).double(), runs, task(), 2, 4)
    for model, dropout in ((Drawing(0.0).double(), True), (Drawing(0.3).double(), False)):
        for found, run in zip(cd.fine_tune(model, runs, task(), 3, 4, dropout=dropout), runs, strict=True):
            assert_equal(found, cd.fine_tune(model, [run], task(), 3, 4, dropout=dropout)[0], 1e-10)


def test_fine_tuning_draws_nothing_from_torchs_generator():
    model, state = bert(), torch.get_rng_state()
    cd.fine_tune(model, mixed(), task(), 2, 4, evaluate_at=(2,))
    assert torch.equal(torch.get_rng_state(), state)


def test_dropout_between_recurrent_layers_is_refused():
    model = Sequence(batch_first=True)
    model.layer.append(nn.LSTM(16, 16, 2, dropout=0.5))
    runs = [cd.FineTuningRun(config(target_modules=["layer.0"]), 1e-3)]
    with pytest.raises(ValueError, match=r"'layer.2' is LSTM with dropout 0.5"):
        cd.fine_tune(model, runs, task(), 2, 4)


def full_length(kind: str = "regression") -> Task:
    data = task(kind)
    for part in (data.train, data.validation):
        part.tokens["attention_mask"][:] = 1
    return data


@pytest.mark.parametrize("batch_size", [4, LENGTH // 2])  # the tokens divide by the runs, and are as many as the rows
def test_layers_whose_first_axis_only_divides_by_the_runs_are_found(batch_size):
    chosen = config(target_modules=["layer.0"])
    runs = [cd.FineTuningRun(chosen, 1e-3, seed) for seed in (0, 1)]
    expected = rf"adapted layer of shape \(16, 16\) got \({LENGTH}, .*exclude_modules"
    with pytest.warns(RuntimeWarning, match=expected):
        alone = cd.fine_tune(Sequence(batch_first=False).double(), runs, full_length(), 2, batch_size)
    stacked = cd.fine_tune(Sequence(batch_first=True).double(), runs, full_length(), 2, batch_size)
    for one, other in zip(stacked, alone, strict=True):
        assert (one.shared, other.shared) == (2, 1)
        assert_equal(one, other, 1e-10)


def test_heads_and_dropout_hold_their_first_axis_against_the_rows():
    with pytest.warns(RuntimeWarning, match=rf"dropout got \({LENGTH}, "):
        runs = [cd.FineTuningRun(config(target_modules=["embedding"]), 1e-3, s) for s in (0, 1)]
        cd.fine_tune(Sequence(batch_first=False, dropout=0.1).double(), runs, full_length(), 2, 4)
    head = StackedLinear(torch.zeros(2, 1, 16), None, PassRows(2, 8))
    with pytest.raises(ValueError, match=r"trained layer of shape \(1, 16\) got \(24, 8, 16\), expected 8"):
        head(torch.zeros(24, 8, 16))
    assert head(torch.zeros(8, 24, 16)).shape == (8, 24, 1)


def test_runs_with_relative_positions_of_a_t5_go_one_at_a_time_unless_excluded():
    given = {"task_type": "SEQ_2_SEQ_LM", "target_modules": T5_LAYERS}
    runs = [cd.FineTuningRun(config(**given), 1e-3, seed) for seed in (0, 1)]
    data = task("generation")
    with pytest.warns(RuntimeWarning, match="in the first axis"):
        alone = cd.fine_tune(t5(), runs, data, 3, 4)
    for found, expected in zip(alone, reference_fine_tune(t5(), runs, data, 3, 4), strict=True):
        assert_equal(found, expected, 1e-8)
    without = config(**given, exclude_modules=["relative_attention_bias"])
    runs = [cd.FineTuningRun(without, 1e-3, seed) for seed in (0, 1)]
    for found, expected in zip(
        cd.fine_tune(t5(), runs, data, 3, 4), reference_fine_tune(t5(), runs, data, 3, 4), strict=True
    ):
        assert_equal(found, expected, 1e-8)


@pytest.mark.cuda
@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("compiled", [False, True])
def test_graphed_steps_on_a_gpu_equal_eager_ones(compiled):
    runs, model, data = mixed(), bert().cuda(), task()
    graphed = cd.fine_tune(model, runs, data, 12, 4, evaluate_at=(12,), compiled=compiled)
    for found, expected in zip(graphed, cd.fine_tune(model, runs, data, 12, 4, graphed=False), strict=True):
        assert_equal(found, expected, 1e-7)


def test_chains_of_one_shape_are_one_tensor_and_contract_as_layer_by_layer():
    stacked = StackedPass(bert(layers=3), mixed()[:4], task(), 2, 4)
    stacked.start()
    layers = stacked_adapters(stacked.model)
    shapes = {adapter.shape for adapter in layers.values()}
    assert len(layers) == 19 and len(stacked.chains.groups) == len(shapes) == 3  # 16 -> 16, 16 -> 40 and 40 -> 16
    apart = {name: adapter.contracted() for name, adapter in layers.items()}
    stacked.chains.contract()
    for name, adapter in layers.items():
        torch.testing.assert_close(adapter.contracted(), apart[name], rtol=1e-12, atol=1e-14)
    stacked.chains.release()
    assert all(adapter.held is None for adapter in layers.values())


@pytest.mark.cuda
@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="the kernel of attention needs a GPU")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("precision", ["tf32", "bfloat16"])
def test_attention_in_one_kernel_learns_the_same_within_the_precisions_noise(precision, compiled, monkeypatch):
    runs, model, data = mixed()[:3], bert().float().cuda(), task()
    options = {"steps": 6, "batch_size": 4, "precision": precision, "compiled": compiled}
    found = cd.fine_tune(model, runs, data, **options)
    monkeypatch.setattr(PerRunDropout, "attendable", lambda *_: False)
    torch._dynamo.reset()
    for one, other in zip(found, cd.fine_tune(model, runs, data, **options), strict=True):
        np.testing.assert_allclose(one.losses, other.losses, rtol=0.02)


# which layers peft means, and what a stack leaves to it


def beyond_a_stack() -> dict[str, tuple[peft.PeftConfig, str]]:
    """Configs that a stack has no form of, and what the warning says of each."""
    own = {"task_type": "SEQ_CLS", "target_modules": ["query", "value"]}
    return {
        "dora": (lora(use_dora=True), "use_dora=True"),
        "bias": (lora(bias="all"), "bias='all'"),
        "lora bias": (lora(lora_bias=True), "lora_bias=True"),
        "deep bias": (config("compressed", bias="deep_lora_only"), "bias='deep_lora_only'"),
        "norms": (lora(modules_to_save=["classifier", "LayerNorm"]), "LayerNorm"),
        "vera": (peft.VeraConfig(r=4, **own), "peft_type=VERA"),
        "ia3": (peft.IA3Config(feedforward_modules=[], **own), "peft_type=IA3"),
        "loha": (peft.LoHaConfig(r=4, **own), "peft_type=LOHA"),
        "prompt": (peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3), "peft_type=PROMPT_TUNING"),
    }


@pytest.mark.parametrize("name", beyond_a_stack())
def test_what_cannot_be_stacked_goes_alone_as_the_plain_run_and_says_so(name):
    chosen, said = beyond_a_stack()[name]
    runs = [cd.FineTuningRun(chosen, 1e-2, seed, head_lr=1e-3) for seed in (0, 1)] + mixed()[1:3]
    options = {"steps": 4, "batch_size": 4, "decay_ratio": 0.1, "evaluate_at": (0, 4)}
    model = bert(positions=2 * LENGTH)
    with pytest.warns(UserWarning, match=f"{said}.* cannot be stacked"):
        found = cd.fine_tune(model, runs, task(), **options)
    assert [history.shared for history in found] == [1, 1, 2, 2]
    for own, expected in zip(found, reference_fine_tune(model, runs[:2], task(), **options), strict=False):
        assert_equal(own, expected, *((1e-5, 1e-2) if name == "prompt" else (1e-8, 1e-6)))  # peft's are in float32
    tokens = task().validation.tokens
    logits = found[0].model().eval()(**tokens).logits
    assert task().score(logits.detach(), task().validation.labels) == pytest.approx(found[0].scores[4], abs=1e-5)


@pytest.mark.parametrize("start", ["pissa", "eva", "lora_ga"])
def test_starts_that_read_weights_or_data_go_alone_and_leave_the_model_as_it_was(start):
    more = {"lora_ga": {"lora_ga_config": LoraGAConfig()}, "eva": {"eva_config": peft.EvaConfig(rho=1.0)}}
    more = more.get(start, {}) | ({} if start == "eva" else {"lora_dropout": 0.1})
    chosen = lora(init_lora_weights=start, target_modules=["query", "value"], **more)
    model = bert().float()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    runs = [cd.FineTuningRun(chosen, 1e-2, seed) for seed in (0, 0, 1)]
    with pytest.warns(UserWarning, match=f"init_lora_weights='{start}'.* cannot be stacked"):
        first, again, other = cd.fine_tune(model, runs, task(), 4, 4, evaluate_at=(4,))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert first.losses.tolist() == again.losses.tolist() != other.losses.tolist()
    if start != "eva":  # which draws from torch's generator as it looks at the data
        (expected,) = reference_fine_tune(model, runs[:1], task(), 4, 4, evaluate_at=(4,))
        assert first.losses == pytest.approx(expected.losses, rel=1e-4)
    logits = first.model().eval()(**task().validation.tokens).logits
    assert task().score(logits.detach(), task().validation.labels) == pytest.approx(first.scores[4], abs=1e-4)


def test_runs_over_a_quantised_base_go_alone():
    quantised = pytest.importorskip("bitsandbytes").nn.Linear4bit
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2}
    model = BertForSequenceClassification(BertConfig(**sizes, num_hidden_layers=1, num_labels=1)).eval()
    attention = model.bert.encoder.layer[0].attention.self
    for name in ("query", "value"):
        layer = quantised(64, 64, compute_dtype=torch.float32)
        layer.load_state_dict(getattr(attention, name).state_dict())
        setattr(attention, name, layer.to("cpu"))  # which quantises it
    chosen = [config("compressed", target_modules=["value"]), *(lora(target_modules=[n]) for n in ("query", "key"))]
    runs = [cd.FineTuningRun(each, 1e-2) for each in chosen]
    with pytest.warns(UserWarning, match="self.query of type Linear4bit.* cannot be stacked"):
        histories = cd.fine_tune(model, runs, task(), 4, 4, evaluate_at=(4,))
    for history in histories:
        assert history.losses[3] < history.losses[0]
        logits = history.model().eval()(**task().validation.tokens).logits.detach()
        assert task().score(logits, task().validation.labels) == pytest.approx(history.scores[4], abs=1e-4)


@pytest.mark.parametrize("chosen", [
    lora(target_modules=["query", "dense"], rank_pattern={"query": 2, "layer.1.*dense": 6}, alpha_pattern={"query": 3}),
    lora(target_modules=["query"], layers_to_transform=[1], use_rslora=True, init_lora_weights="gaussian"),
    lora(target_modules=r".*layer\.0.*(key|value)", init_lora_weights=False, exclude_modules=["value"]),
    lora(init_lora_weights="orthogonal", modules_to_save=["pooler"]),
    config("compressed", rank_pattern={"query": 2}, target_modules=["query", "key"]),
    config("compressed", init_weights=False),
    config(rank_pattern={"dense": 6}, target_modules=["dense"], layers_to_transform=[0]),
])  # fmt: skip
def test_patterns_and_starts_of_peft_are_stacked(chosen):
    runs = [cd.FineTuningRun(chosen, 1e-2, seed) for seed in (0, 1)]
    found = cd.fine_tune(bert(), runs, task(), 4, 4, evaluate_at=(4,))
    for own, expected in zip(found, reference_fine_tune(bert(), runs, task(), 4, 4, evaluate_at=(4,)), strict=True):
        assert own.shared == 2
        assert_equal(own, expected, 1e-8)


def test_configs_are_left_as_they_were():
    runs = mixed()
    before = [repr(run.config) for run in runs]
    cd.fine_tune(bert(), runs, task(), 1, 4)
    assert [repr(run.config) for run in runs] == before


@pytest.mark.parametrize("watched", [lora(), lora(use_dora=True), config()])
def test_snapshots_of_all_kinds_show_what_merging_adds(watched):
    source = bert()

    def watch(snapshot):
        return [dict(snapshot.updates())]

    (history,) = cd.fine_tune(source, [cd.FineTuningRun(watched, 1e-2)], task(), 3, 4, watch_at=(3,), watch=watch)
    layers = {n: m for n, m in history.model().get_base_model().named_modules() if n in history.watched[3]}
    for name, update in history.watched[3].items():
        torch.testing.assert_close(update[0], layers[name].get_delta_weight("default"))
