"""The six fine-tuning methods side by side: what each trains and keeps, by arithmetic, and how they are compared."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import compressible as cd
from compressible.experiments import fine_tuning_methods as methods
from compressible.experiments import methods_compared as compared
from compressible.experiments.rate_grid import best_of
from compressible.finetuning.run import FineTuningRun, data_order, fresh_head

SETTING = methods.Setting(rank=2, period=2, steps=6, batch_size=4, few_rows=8, head_rate=0.02)
WIDTH, INNER, WORDS, ROWS = 16, 24, 30, 24
SHAPES = [(WIDTH, WIDTH)] * 4 + [(INNER, WIDTH), (WIDTH, INNER), (WIDTH, WIDTH)]  # of one layer, then the pooler
HEAD = WIDTH + 1


@pytest.fixture(scope="module")
def base():
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"vocab_size": WORDS, "hidden_size": WIDTH, "intermediate_size": INNER, "max_position_embeddings": 8}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = BertConfig(num_hidden_layers=1, num_attention_heads=2, num_labels=1, **sizes)
        return BertForSequenceClassification(config).eval()


@pytest.fixture(scope="module")
def task():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(WORDS, (ROWS, 6), generator=generator)
    labels = (ids < WORDS // 2).float().mean(1)
    rows = cd.Examples({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, labels, texts=(("",),) * ROWS)
    return cd.Task("small", "regression", 1, "pearson", train=rows, validation=rows)


def prepared(base, method, rate=0.01, setting=SETTING):
    def first_loss(model):
        return model(input_ids=torch.arange(6)[None]).logits.square().sum()

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return methods.prepare(method, copy.deepcopy(base).train(), rate, setting, first_loss)


@pytest.mark.parametrize("method", methods.METHODS)
def test_what_is_trained_and_kept_is_what_arithmetic_says(base, task, method):
    found = compared.train(method, base, task, task.validation, 1e-3, 0, SETTING)
    everything, r = sum(p.numel() for p in base.parameters()), SETTING.rank
    factors = sum(r * (m + n) for m, n in SHAPES)
    outside = everything - sum(m * n for m, n in SHAPES)
    trainable = {
        **dict.fromkeys(("full", "GaLore"), everything),
        **dict.fromkeys(("LoRA", "LoRA+", "ReLoRA"), factors + HEAD),
        "Deep LoRA": factors + len(SHAPES) * 3 * r**2 + HEAD,
    }
    assert sorted(methods.adapted_shapes(base)) == sorted(SHAPES)
    assert found.trainable == trainable[method]
    moments = 8 * (r * sum(map(max, SHAPES)) + outside) if method == "GaLore" else 8 * trainable[method]
    projections = 4 * r * sum(map(min, SHAPES)) if method == "GaLore" else 0
    assert found.state_bytes == moments + projections == methods.predicted_bytes(method, base, r)
    assert found.losses.shape == (6,) and -1 <= found.score <= 1
    assert math.isnan(found.peak_bytes) and found.seconds > 0


@pytest.mark.parametrize("method", methods.METHODS)
def test_every_trained_number_is_in_one_group_at_its_rate(base, method):
    setting = replace(SETTING, steps=100)  # the warm-up begins at zero, so look at what it multiplies
    ready = prepared(base, method, 0.01, setting)
    named = {id(p): name for name, p in ready.model.named_parameters() if p.requires_grad}
    found = [(named[id(p)], group["initial_lr"]) for group in ready.optimizer.param_groups for p in group["params"]]
    assert sorted(name for name, _ in found) == sorted(named.values())
    assert all(group["weight_decay"] == 0 for group in ready.optimizer.param_groups)
    for name, rate in found:
        expected = 0.02 if "classifier" in name else 0.01
        if method == "LoRA+" and "lora_B" in name:
            expected = 0.16
        if method == "Deep LoRA" and name.endswith(("factors.default.0", "factors.default.4")):
            expected = 1e-4
        assert rate == pytest.approx(expected), name


def test_the_rates_warm_up_and_fall_and_relora_warms_up_again(base):
    setting = replace(SETTING, steps=40, period=20)
    rates = {}
    for method in ("LoRA", "ReLoRA"):
        ready, rates[method] = prepared(base, method, 1.0, setting), []
        for _ in range(40):
            rates[method].append(ready.optimizer.param_groups[0]["lr"])
            ready.optimizer.step()
            ready.schedule.step()
    cosine = [0.1 + 0.45 * (1 + math.cos(math.pi * (step - 4) / 36)) for step in range(40)]
    assert rates["LoRA"] == pytest.approx([step / 4 for step in range(4)] + cosine[4:])
    assert rates["ReLoRA"][20] == 0 and rates["ReLoRA"][21] == pytest.approx(cosine[21] / 2)
    same = [step for step in range(40) if step not in (20, 21)]
    assert [rates["ReLoRA"][step] for step in same] == pytest.approx([rates["LoRA"][step] for step in same])


def test_full_fine_tuning_goes_as_a_plain_loop(base, task):
    found = compared.train("full", base, task, task.validation, 0.01, 3, SETTING)
    run = FineTuningRun(cd.DeepLoraConfig(), 0.01, 3, task.subset(8, 3))
    model = copy.deepcopy(base).train()
    weight, bias = fresh_head(model.classifier, run, "classifier")
    model.classifier.weight.data, model.classifier.bias.data = weight, bias + task.train.labels[run.subset].mean()
    named = dict(model.named_parameters())
    head = [named.pop("classifier.weight"), named.pop("classifier.bias")]
    groups = [{"params": [*named.values()], "lr": 0.01}, {"params": head, "lr": 0.02}]
    adam = torch.optim.AdamW(groups, eps=1e-6, weight_decay=0)
    losses = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        for step, rows in enumerate(data_order(run, ROWS, 6, 4)):
            for group, rate in zip(adam.param_groups, (0.01, 0.02), strict=True):  # the cosine
                group["lr"] = rate * (0.1 + 0.45 * (1 + math.cos(math.pi * step / 6)))
            tokens, labels = task.train.batch(rows)
            loss = (model(**tokens).logits[:, 0] - labels).square().mean()
            loss.backward()
            losses.append(loss.item())
            adam.step()
            adam.zero_grad()
    assert found.losses == pytest.approx(losses, rel=1e-4)
    score = np.corrcoef(model.eval()(**task.train.tokens).logits[:, 0].detach(), task.train.labels)[0, 1]
    assert found.score == pytest.approx(score, abs=1e-4)


def test_methods_begin_at_the_same_loss_and_leave_base_and_generators_alone(base, task):
    before, state = copy.deepcopy(base.state_dict()), torch.random.get_rng_state()
    first = [
        compared.train(method, base, task, task.validation, 1e-3, 0, SETTING).losses[0] for method in methods.METHODS
    ]
    assert first == pytest.approx([first[0]] * 6, rel=1e-5)  # dropout, rows and head are the same
    other = compared.train("full", base, task, task.validation, 1e-3, 1, SETTING).losses[0]
    assert abs(other - first[0]) > 1e-3
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), state)


def test_relora_is_lora_until_its_first_restart(base, task):
    setting = replace(SETTING, period=3)
    lora, relora = (
        compared.train(method, base, task, task.validation, 0.05, 0, setting).losses for method in ("LoRA", "ReLoRA")
    )
    assert np.array_equal(lora[:4], relora[:4]) or np.allclose(lora[:4], relora[:4], rtol=1e-5)
    assert abs(lora[5] - relora[5]) > 1e-5  # the merge alone changes no output, the step after it does
    alone = compared.train("ReLoRA", base, task, task.validation, 0.05, 0, replace(setting, period=6)).losses
    assert alone == pytest.approx(lora, rel=1e-5)


def test_a_run_that_diverges_has_no_score_and_stops_nothing(base, task):
    for method in ("full", "GaLore"):
        found = compared.train(method, base, task, task.validation, 1e30, 0, SETTING)
        assert math.isnan(found.score) and found.losses.shape == (6,)


def test_rows_that_choose_rates_are_apart(task):
    numbered = replace(task.train, labels=torch.arange(ROWS, dtype=torch.float32))
    rest, tuning = compared.split_rows(replace(task, train=numbered), 5)
    assert (len(rest.train), len(tuning)) == (ROWS - 5, 5)
    assert sorted([*rest.train.labels.tolist(), *tuning.labels.tolist()]) == list(range(ROWS))
    assert compared.split_rows(replace(task, train=numbered), 5)[1].labels.tolist() == tuning.labels.tolist()
    with pytest.raises(ValueError, match=rf"tuning_rows is {ROWS}, expected 1 to {ROWS - 1}"):
        compared.split_rows(task, ROWS)


def test_a_comparison_tunes_and_judges_on_different_rows_and_seeds(base, task, monkeypatch):
    rest, tuning = compared.split_rows(task, 6)
    calls, original = [], compared.train

    def watched(method, base, task, judging, rate, seed, setting):
        calls.append((method, judging is tuning, rate, seed))
        return original(method, base, task, judging, rate, seed, setting)

    monkeypatch.setattr(compared, "train", watched)
    rates = {"full": [1e-3], "LoRA": [1e-3, 1e-2], "Deep LoRA": [1e-2]}
    setting = replace(SETTING, steps=2)
    found = compared.compare(base, rest, tuning, rates, setting, seeds=2, tuning_seeds=2)
    assert {seed for _, for_tuning, _, seed in calls if for_tuning} == {2, 3}
    assert {seed for _, for_tuning, _, seed in calls if not for_tuning} == {0, 1}
    best = best_of(dict(zip(found["LoRA/rates"], found["LoRA/tuning"], strict=True)))
    assert (
        {rate for method, tuned, rate, _ in calls if method == "LoRA" and not tuned} == {best} == {found["LoRA/rate"]}
    )
    assert found["Deep LoRA - LoRA"] == pytest.approx(found["Deep LoRA/score"] - found["LoRA/score"])
    assert found["full/losses"].shape == (2, 2) and found["state as predicted"].tolist() == [True] * 3
    assert found["rates inside"][0] == found["full/inside"] and not found["full/inside"]
    assert not any(tuned for method, tuned, _, _ in calls if method != "LoRA")  # a single rate is not tried
    assert "memory saved" not in found  # on a CPU


def test_memory_saved_counts_in_moments_of_what_is_frozen():
    each = {"score": np.zeros(2), "state bytes": 8, "predicted bytes": 8, "inside": True}
    found = {f"{name}/{key}": value for name in ("full", "LoRA") for key, value in each.items()}
    found |= {"full/trainable": 110, "LoRA/trainable": 10}
    found |= {"full/peak bytes": np.array([2000.0, 2400.0]), "LoRA/peak bytes": np.array([1200.0, 1200.0])}
    assert compared.differences(found, ["full", "LoRA"])["memory saved"].tolist() == [1.0, 1.5]


@pytest.mark.parametrize("rates", [{"full": [1e-3]}, {"full": [1e-3], "LoRA": [1e-3], "QLoRA": [1e-3]}])
def test_a_comparison_needs_both_baselines_and_known_methods(base, task, rates):
    with pytest.raises(ValueError, match=r"methods is \[.*\], expected full, LoRA and some of full, LoRA, LoRA\+"):
        compared.compare(base, task, task.validation, rates, SETTING, seeds=1)


def test_an_unknown_method_is_refused(base):
    with pytest.raises(ValueError, match="method is 'lora', expected one of full, LoRA, "):
        prepared(base, "lora")
