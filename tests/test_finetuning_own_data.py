"""Data of one's own: what no run could be trained or judged on is refused before the first step, by its name."""

from __future__ import annotations

import dataclasses
import warnings

import numpy as np
import pytest
import torch

pytest.importorskip("peft")
from test_finetune import LENGTH, VOCABULARY, bert, config, lora, t5, task

import compressible as cd
from compressible.finetuning.trainer import Trainer

TODO = "task_type or modules_to_save in their config would"


def own(kind: str = "regression", metric: str = "pearson", labels=None, count: int = 12, **tokens) -> cd.Task:
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(3, VOCABULARY, (count, LENGTH), generator=draw)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)} | tokens
    rows = cd.Examples(given, torch.rand(count, generator=draw) if labels is None else labels, texts=())
    return cd.Task("own", kind, 1, metric, train=rows, validation=rows)


def tuned(data: cd.Task, outputs: int = 1, runs: int = 1, **options):
    given = [cd.FineTuningRun(config("thin"), 1e-2, seed) for seed in range(runs)]
    options = {"steps": 3, "batch_size": 4, "evaluate_at": (3,), "show_progress": False} | options
    return cd.fine_tune(bert(outputs), given, data, **options)


IDS = torch.full((12, LENGTH), 5)
HOLE = (torch.arange(12) != 3).long()[:, None].expand(12, LENGTH)


@pytest.mark.parametrize(
    "data, named",
    [
        (own(metric="rmse"), "task.metric is 'rmse', expected of a regression one of pearson"),
        (own("classification", labels=torch.arange(12) % 2), "task.metric is 'pearson', .* accuracy, matthews"),
        (own(labels=torch.rand(9)), r"task.train.tokens\['input_ids'\] is '12 rows', expected 9, one a label"),
        (own(attention_mask=torch.ones(11, LENGTH)), r"attention_mask'\] is '11 rows', expected 12"),
        (own(labels=np.zeros(12, np.float32)), "task.train.labels is 'ndarray', expected a tensor"),
        (own(input_ids=IDS.tolist()), r"tokens\['input_ids'\] is 'list', expected a tensor"),
        (own(attention_mask=HOLE), r"without a token in rows \[3\]"),
        (own(input_ids=IDS + VOCABULARY), f"from 0 to {VOCABULARY - 1}, which the model's embedding has"),
        (own(input_ids=IDS - 6), "is 'from -1 to -1'"),
        (own(token_type_ids=IDS), r"token_type_ids'\] is 'from 5 to 5', expected from 0 to 1"),
        (own(attention_mask=torch.ones_like(IDS).flip(1).cumsum(1).sub(1).clamp(max=1)), 'padding_side="right"'),
    ],
)  # fmt: skip
def test_what_no_run_could_be_trained_or_judged_on_is_refused_before_a_step(data, named, monkeypatch):
    monkeypatch.setattr(Trainer, "advance", lambda *_: pytest.fail("a step was taken"))
    with pytest.raises(ValueError, match=named):
        tuned(data)


def test_a_row_of_the_validation_set_that_is_longer_than_the_model_is_refused():
    data, ids = own(), torch.full((2, LENGTH + 8), 5)
    longer = cd.Examples({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, torch.rand(2), texts=())
    with pytest.raises(
        ValueError, match=f"task.validation is 'a row of {LENGTH + 8} tokens', expected at most {LENGTH}"
    ):
        tuned(dataclasses.replace(data, validation=longer))
    padded = {"input_ids": ids, "attention_mask": (torch.arange(LENGTH + 8) < 3).long().expand(2, -1)}
    tuned(dataclasses.replace(data, validation=cd.Examples(padded, torch.rand(2), texts=())))  # it is cut to its tokens


@pytest.mark.parametrize("kind", [torch.int32, torch.uint8, torch.int16])
def test_classes_of_all_integers_are_those_of_int64(kind):
    classes = torch.arange(12) % 3
    found, expected = (tuned(own("classification", "accuracy", labels), 3)[0] for labels in (classes.to(kind), classes))
    np.testing.assert_array_equal(found.losses, expected.losses)
    assert found.scores == expected.scores


@pytest.mark.parametrize("change", [lambda x: x[:, None], lambda x: x.bfloat16(), lambda x: x.double()])
def test_labels_of_a_regression_may_be_a_column_or_of_another_type(change):
    labels = torch.arange(12) / 8  # the same in all types
    found, expected = (tuned(own(labels=given))[0] for given in (change(labels), labels))
    np.testing.assert_allclose(found.losses, expected.losses, rtol=1e-6)
    assert found.scores[3] == pytest.approx(expected.scores[3], rel=1e-6)


def test_an_unknown_metric_is_named_by_the_task_itself():
    with pytest.raises(ValueError, match="unknown metric 'rmse'"):
        own(metric="rmse").score(np.zeros((12, 1)), np.zeros(12))


@pytest.mark.parametrize(
    "around, named",
    [
        (torch.no_grad, "the mode of gradients is 'no_grad or inference_mode'"),
        (torch.inference_mode, "expected gradients, which training takes"),
        (lambda: torch.autocast("cpu", torch.bfloat16), "torch.autocast is 'on', expected off around fine_tune"),
    ],
)
def test_a_call_inside_of_what_would_change_its_numbers_is_refused(around, named):
    data = own()
    with around(), pytest.raises(ValueError, match=named):
        tuned(data)


def test_a_folder_is_no_checkpoint_and_stays(tmp_path):
    with pytest.raises(ValueError, match="expected a file's name, and it is a folder"):
        tuned(own(), checkpoint=tmp_path)
    assert tmp_path.is_dir()


@pytest.mark.parametrize(
    "runs, named",
    [
        (cd.FineTuningRun(config("thin"), 1e-2), "expected a list of FineTuningRun"),
        ((run for run in ()), "expected a list of FineTuningRun"),
        ([cd.FineTuningRun(config("thin"), 1e-2, 2**63)], f"seed is {2**63}, expected an integer >= 0, below 2.63"),
    ],
)
def test_runs_are_a_list_with_seeds_that_generators_take(runs, named):
    with pytest.raises(ValueError, match=named):
        cd.fine_tune(bert(), runs, own(), 1, 4)


def test_the_largest_seed_is_taken():
    given = [cd.FineTuningRun(config(kind), 1e-2, 2**63 - 1) for kind in ("thin", "compressed")]
    assert all(run.divergence is None for run in cd.fine_tune(bert(), given, own(), 2, 4, show_progress=False))


@pytest.mark.parametrize(
    "options, named",
    [
        ({"model": None}, "model is 'NoneType', expected a torch.nn.Module"),
        ({"model": torch.nn.Flatten()}, "model is 'Flatten', expected one that has parameters"),
        ({"task": {}}, "task is 'dict', expected kind, train, validation and score"),
        ({"task": dataclasses.replace(own(), train={})}, "task.train is 'dict', expected tokens and labels"),
        ({"watch": 3}, "watch is 3, expected a function, or None"),
        ({"watch": 3, "watch_at": (1,)}, "watch is 3, expected a function, since watch_at names steps"),
        ({"checkpoint": 3}, "checkpoint is 3, expected a file's name, or None"),
        ({"dropout": "no"}, "dropout is 'no', expected True or False"),
        ({"compiled": 1}, "compiled is 1, expected True or False"),
        ({"keep_factors": None}, "keep_factors is None, expected True or False"),
        ({"graphed": "no"}, "graphed is 'no', expected True or False"),
        ({"show_progress": "yes"}, "show_progress is 'yes', expected True or False"),
        ({"task": own(labels=torch.rand(12, 2))}, r"labels is \(12, 2\), expected one a row, which its metric is of"),
    ],
)  # fmt: skip
def test_arguments_of_another_type_are_named_before_a_step(options, named, monkeypatch):
    monkeypatch.setattr(Trainer, "advance", lambda *_: pytest.fail("a step was taken"))
    given = {"model": bert(), "task": own(), "steps": 2, "batch_size": 4, "evaluate_at": (2,), "show_progress": False}
    with pytest.raises(ValueError, match=named):
        cd.fine_tune(runs=[cd.FineTuningRun(config("thin"), 1e-2)], **given | options)


def test_a_correlation_is_of_one_number_a_row():
    with pytest.raises(ValueError, match=r"labels is \(9, 2\), expected one a row, 9, for a correlation"):
        own().score(np.zeros((9, 1)), np.zeros((9, 2)))
    with pytest.raises(ValueError, match=r"outputs is \(9, 2\), expected one a row, 9"):
        own().score(np.zeros((9, 2)), np.zeros(9))


@pytest.mark.parametrize(
    "spoil, named",
    [
        (lambda labels: labels[:, 0], r"labels is \(40,\), expected shape \(N, T\), T >= 1"),
        (lambda labels: labels[:, :0], r"labels is \(40, 0\), expected shape"),
        (lambda labels: labels.clamp(min=-1), "labels is -1, expected words from 0, or -100 where none is asked for"),
        (lambda labels: labels.masked_fill(torch.arange(40)[:, None] == 3, -100), r"none in rows \[3\]', expected"),
        (lambda labels: labels + VOCABULARY * (labels > 40), f"expected words below the model's {VOCABULARY}"),
    ],
)  # fmt: skip
def test_texts_to_write_ask_for_words_that_the_model_has(spoil, named, monkeypatch):
    monkeypatch.setattr(Trainer, "advance", lambda *_: pytest.fail("a step was taken"))
    data = task("generation")
    data.train.labels = spoil(data.train.labels)
    with pytest.raises(ValueError, match=named):
        cd.fine_tune(t5(), [cd.FineTuningRun(config("thin"), 1e-2)], data, 2, 4, show_progress=False)


@pytest.mark.filterwarnings("ignore:.*cannot be stacked")
@pytest.mark.parametrize("given", [lora(), lora(use_dora=True), lora(init_lora_weights="pissa"), config("thin")])
def test_a_seed_of_numpy_is_that_of_python(given):
    runs = [cd.FineTuningRun(given, 1e-2, kind(1), start=None) for kind in (int, np.int64, np.uint8)]
    expected, *found = cd.fine_tune(bert(3).float(), runs, task("classification"), 2, 4, show_progress=False)
    for each in found:
        np.testing.assert_array_equal(each.losses, expected.losses)
    assert found[0].model() is not None


@pytest.mark.parametrize("head", [None, "SEQ_CLS"])
def test_a_rate_of_heads_is_said_to_be_idle_where_none_is_trained(head):
    runs = [cd.FineTuningRun(config("thin", task_type=head), 1e-2, head_lr=1e-3, label="named")]
    runs += [cd.FineTuningRun(config("thin", task_type=head), 1e-2)]
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        cd.fine_tune(bert(), runs, own(), 1, 4, show_progress=False)
    said = [str(each.message) for each in told if "head_lr" in str(each.message)]
    assert said == ([] if head else [f"head_lr of runs named is not used, since nothing is trained whole: {TODO}"])
