"""Starts that come off the frozen weight, or from a first gradient, in a stack: as peft has them for a run alone."""

from __future__ import annotations

import dataclasses
import warnings

import numpy as np
import pytest
import torch

pytest.importorskip("peft")  # a GPU host may have PyTorch, Triton and pytest alone
import peft
from peft.tuners.lora.config import LoraGAConfig
from peft.tuners.lora.corda import preprocess_corda
from reference_finetune import reference_fine_tune
from test_finetune import LINEAR, assert_equal, bert, config, lora, mixed, task
from transformers import GPT2Config, GPT2ForSequenceClassification

import compressible as cd
from compressible.finetuning.peft_models import GradientStart
from compressible.finetuning.run import data_order
from compressible.finetuning.stacked_pass import StackedPass
from compressible.runtime.starting_factors import compressed_chain
from compressible.runtime.weight_gradients import top_frames

STARTS = {
    "pissa": lora(init_lora_weights="pissa"),
    "pissa_niter_4": lora(init_lora_weights="pissa_niter_4", lora_alpha=8),
    "olora": lora(init_lora_weights="olora", target_modules=["query", "dense"]),
    "lora_ga": lora(init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig(), target_modules=LINEAR),
    # Gradients of the last layers have rank 4, one for a row of the batch; a fourth singular vector may point anywhere.
    "lora_ga published": lora(
        init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig(stable_gamma=64), target_modules=LINEAR, r=1
    ),
}


@pytest.mark.parametrize("name", STARTS)
def test_starts_that_come_off_the_weight_are_stacked_and_go_as_peft_alone(name):
    chosen, plain = STARTS[name], lora(target_modules=STARTS[name].target_modules)
    runs = [cd.FineTuningRun(chosen, rate, seed, head_lr=1e-3) for seed in (0, 1) for rate in (1e-3, 1e-2)]
    runs.append(cd.FineTuningRun(plain, 1e-3, 0))
    model, options = bert().float(), {"steps": 5, "batch_size": 4, "decay_ratio": 0.1, "evaluate_at": (0, 5)}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = cd.fine_tune(model, runs, task(), **options)
    assert {history.shared for history in found} == {5}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for own, expected in zip(found, reference_fine_tune(model, runs, task(), **options), strict=True):
        np.testing.assert_allclose(own.losses, expected.losses, rtol=2e-4)
        assert own.scores[5] == pytest.approx(expected.scores[5], abs=2e-3)
    tokens, labels = task().validation.tokens, task().validation.labels
    for history in found:
        logits = history.model().eval()(**tokens).logits.detach()
        assert task().score(logits, labels) == pytest.approx(history.scores[5], abs=1e-4)
    assert found[-1].taken_off is None and set(found[0].taken_off) == set(found[0].chains)


@pytest.mark.filterwarnings("ignore:.* cannot be stacked")
def test_corda_goes_alone_from_the_covariances_that_peft_takes_row_by_row():
    chosen, data = lora(init_lora_weights="corda", target_modules=["query", "value"]), task()
    run = cd.FineTuningRun(chosen, 1e-12)  # which leaves the start as it is
    (found,) = cd.fine_tune(bert().float(), [run], data, 1, 4, dropout=False)
    model, config, tokens = bert().float(), dataclasses.replace(chosen), data.train.tokens
    rows = data_order(run, len(data.train.labels), 1, 4)[0]
    longest = -(-int(tokens["attention_mask"][rows].sum(1).max()) // 8) * 8

    @torch.no_grad()
    def read():
        for row in rows.tolist():
            model(**{name: value[row : row + 1, :longest] for name, value in tokens.items()})

    preprocess_corda(model, config, read)
    torch.manual_seed(0)
    expected = peft.get_peft_model(model, config).base_model.model
    for name, (a, b) in found.chains.items():
        layer = expected.get_submodule(name)
        update = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        torch.testing.assert_close(b @ a, update, atol=1e-5, rtol=1e-4)
        kept = found.model().base_model.model.get_submodule(name).base_layer.weight
        torch.testing.assert_close(kept, layer.base_layer.weight, atol=1e-5, rtol=1e-4)


def test_lora_ga_over_conv1d_and_in_double_goes_as_peft_alone():
    torch.manual_seed(0)
    sizes = dict(vocab_size=50, n_positions=24, n_embd=16, n_layer=1, n_head=2, num_labels=1, pad_token_id=0)
    model = GPT2ForSequenceClassification(GPT2Config(**sizes)).double().eval()
    given = {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True, "lora_ga_config": LoraGAConfig()}
    runs = [cd.FineTuningRun(lora(init_lora_weights="lora_ga", **given), 1e-2, seed) for seed in (0, 1)]
    found = cd.fine_tune(model, runs, task(), 4, 4, evaluate_at=(4,))
    for own, expected in zip(found, reference_fine_tune(model, runs, task(), 4, 4, evaluate_at=(4,)), strict=True):
        assert own.shared == 2
        np.testing.assert_allclose(own.losses, expected.losses, rtol=1e-5)  # peft works in float32 there


def test_what_is_taken_off_is_not_trained_and_the_update_is_zero_at_the_start():
    runs = [cd.FineTuningRun(STARTS["pissa"], 1e-2), mixed()[0], mixed()[2]]
    seen = {}

    def watch(snapshot):
        seen.setdefault(snapshot.step, {}).update({id(snapshot): dict(snapshot.updates())})
        return [None] * len(snapshot.runs)

    first, *_ = cd.fine_tune(bert().float(), runs, task(), 3, 4, watch_at=(0, 3), watch=watch, precision="float32")
    assert first.shared == 3
    for updates in seen[0].values():
        assert all(not update[0].any() for update in updates.values())
    for (name, pair), updates in zip(first.taken_off.items(), [*seen[3].values()] * 99, strict=False):
        (a, b), (first_a, first_b) = first.chains[name], pair
        torch.testing.assert_close(updates[name][0], b @ a - first_b @ first_a, rtol=1e-3, atol=1e-5)


def test_a_layer_that_peft_leaves_whole_stays_so():
    given = {"target_modules": ["query", "word_embeddings"], "init_lora_weights": "pissa"}
    runs = [cd.FineTuningRun(lora(**given), 1e-3, 1)]
    (found,) = cd.fine_tune(bert().float(), runs, task(), 4, 4, evaluate_at=(4,))
    (expected,) = reference_fine_tune(bert().float(), runs, task(), 4, 4, evaluate_at=(4,))
    assert not any("embeddings" in name for name in found.taken_off)
    np.testing.assert_allclose(found.losses, expected.losses, rtol=2e-4)


def test_in_bfloat16_a_start_off_the_weight_learns_the_same_within_the_precisions_noise():
    runs = [cd.FineTuningRun(STARTS["pissa"], 1e-2, seed) for seed in (0, 1)]
    whole, half = (cd.fine_tune(bert().float(), runs, task(), 6, 4, precision=each) for each in ("float32", "bfloat16"))
    for one, other in zip(whole, half, strict=True):
        np.testing.assert_allclose(one.losses, other.losses, rtol=0.05)


def test_a_killed_run_whose_start_came_off_the_weight_goes_on_where_it_was(tmp_path):
    runs = [cd.FineTuningRun(STARTS[name], 1e-2) for name in ("pissa", "lora_ga")]
    options = {"task": task(), "batch_size": 4, "evaluate_at": (6,)}
    expected = cd.fine_tune(bert().float(), runs, steps=6, **options)
    calls, advance = [], cd.finetuning.trainer.Trainer.advance

    def killed(trainer, step):
        calls.append(step)
        if len(calls) == 6:
            raise KeyboardInterrupt
        advance(trainer, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cd.finetuning.trainer.Trainer, "advance", killed)
        with pytest.raises(KeyboardInterrupt):
            cd.fine_tune(bert().float(), runs, steps=6, checkpoint=tmp_path / "state", checkpoint_every=2, **options)
    resumed = cd.fine_tune(bert().float(), runs, steps=6, checkpoint=tmp_path / "state", checkpoint_every=2, **options)
    for own, other in zip(resumed, expected, strict=True):
        assert_equal(own, other, 1e-6)
        assert set(own.taken_off) == set(other.taken_off)


def literal(gradient, given, width, generator):
    """P1's own start, from the whole gradient."""
    left, right = top_frames(gradient, width // 2)
    return compressed_chain(left, right, tuple(gradient.shape), given.depth, given.init_scale, generator)


def test_a_start_of_ones_own_sees_the_gradient_that_the_papers_start_sees():
    chosen = [config("compressed"), config("compressed", r=2)]
    ours = [cd.FineTuningRun(each, 1e-2, seed) for each in chosen for seed in (3, 4)]
    theirs = [dataclasses.replace(run, start=GradientStart(literal)) for run in ours]
    found = cd.fine_tune(bert(), ours + theirs, task(), 4, 4, evaluate_at=(4,))
    for own, other in zip(found[:4], found[4:], strict=True):
        assert own.shared == other.shared == 8
        assert_equal(own, other, 1e-6)


def test_runs_that_see_the_same_first_batch_share_its_gradient(monkeypatch):
    decomposed = []
    monkeypatch.setattr(
        "compressible.runtime.weight_gradients.top_frames",
        lambda gradient, rank: (decomposed.append(len(gradient)), top_frames(gradient, rank))[1],
    )
    same = [cd.FineTuningRun(config("compressed"), rate, 0) for rate in (1e-3, 1e-2, 1e-1)]
    other = cd.FineTuningRun(config("compressed"), 1e-2, 0, torch.arange(20))
    pass_of_them = StackedPass(bert(), [*same, other], task(), 2, 4)
    pass_of_them.start()
    assert set(decomposed) == {2}
    alone = cd.fine_tune(bert(), same[1:2], task(), 3, 4)[0]
    assert_equal(cd.fine_tune(bert(), same, task(), 3, 4)[1], alone, 1e-9)


@pytest.mark.parametrize("run, message", [
    (cd.FineTuningRun(config("thin"), 1e-2, start=GradientStart(literal)), "start is GradientStart.*as paper"),
    (cd.FineTuningRun(config("compressed"), 1e-2, start=cd.paper_lora_start), "None or a GradientStart"),
    (cd.FineTuningRun(config("compressed", bias="all"), 1e-2, start=GradientStart(literal)), "can be stacked"),
])  # fmt: skip
def test_starts_that_do_not_fit_their_configs_are_refused(run, message):
    with pytest.raises(ValueError, match=message):
        cd.fine_tune(bert(), [run], task(), 2, 4)


@pytest.mark.parametrize("rslora", [False, True])
def test_rslora_and_lora_plus_share_a_pass_and_go_as_peft_alone(rslora):
    runs = [cd.FineTuningRun(lora(use_rslora=rslora, lora_alpha=4), 1e-3, 0, lr_ratio=ratio) for ratio in (None, 16.0)]
    found = cd.fine_tune(bert(), runs, task(), 4, 4, evaluate_at=(4,))
    for own, expected in zip(found, reference_fine_tune(bert(), runs, task(), 4, 4, evaluate_at=(4,)), strict=True):
        assert own.shared == 2
        assert_equal(own, expected, 1e-8)


def test_peft_still_has_the_starts_that_are_taken_off():
    assert {"init_lora_weights", "lora_ga_config"} <= {field.name for field in dataclasses.fields(peft.LoraConfig)}


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_starts_of_all_kinds_are_captured_on_a_gpu():
    own = cd.FineTuningRun(config("compressed"), 1e-2, 1, start=GradientStart(literal))
    runs = [*(cd.FineTuningRun(STARTS[name], 1e-2) for name in ("pissa", "lora_ga")), mixed()[0], own]
    eager, graphed = (
        cd.fine_tune(bert().float().cuda(), runs, task(), 5, 4, evaluate_at=(5,), graphed=each)
        for each in (False, True)
    )
    for one, other in zip(eager, graphed, strict=True):
        assert one.shared == 4
        np.testing.assert_allclose(one.losses, other.losses, rtol=1e-3)


@pytest.mark.parametrize("count", [1, 2])
def test_first_batches_of_fewer_rows_than_directions_are_told_of(count):
    configs = [cd.DeepLoraConfig(r=r, task_type="SEQ_CLS", target_modules=["pooler.dense", "query"]) for r in (4, 8)]
    runs = [cd.FineTuningRun(each, 1e-2, 1) for each in configs[-count:]]
    for size, told in ((3, 1), (8, 0)):
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            cd.fine_tune(bert(2), runs, task("classification"), 1, size, show_progress=False)
        said = [str(each.message) for each in found if "directions" in str(each.message)]
        assert ["has rank 3, of which r / 2 = 4 directions are taken" in each for each in said] == [True] * told
