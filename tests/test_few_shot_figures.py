"""Protocols of the few-shot figures: the pace of compression, ranks of updates, robustness to the rank."""

from __future__ import annotations

import ast
import copy
from types import SimpleNamespace

import nbformat
import numpy as np
import peft
import pytest
import torch
from conftest import REPOSITORY
from text_helpers import save_bert

import compressible as cd
from compressible.companion import notebooks
from compressible.data.pretrained import load_encoder
from compressible.experiments import compression_pace, early_subspaces, few_shot, rank_robustness, update_ranks
from compressible.experiments.rank_robustness import Setting
from compressible.experiments.update_ranks import Values
from compressible.finetuning.trainer import Trainer

RATES = few_shot.Rates(1e-4, 1e-3, 1e-2, 2e-3)
ADAPTED = (["value"], "authors")
NAMES = ("01_finetuning_subspaces", "07_deep_lora_compression", "08_few_shot", "09_update_ranks", "10_rank_robustness")
FIGURES = [f"yaras2024/{name}" for name in NAMES]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return load_encoder(str(save_bert(tmp_path_factory.mktemp("bert"))), 1, "authors", 0)[0]


@pytest.fixture(scope="module")
def task():
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 40, (24, 6), generator=draw)
    labels = ids[:, 1].float() / 40
    rows = cd.Examples({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, labels, (("a",),) * 24)
    return cd.Task("toy", "regression", 1, "pearson", train=rows, validation=rows.take(range(8)), protocol="authors")


@pytest.fixture(scope="module")
def mpnet():
    from transformers import MPNetConfig, MPNetForSequenceClassification

    sizes = {"hidden_size": 16, "num_hidden_layers": 12, "num_attention_heads": 2, "intermediate_size": 32}
    return MPNetForSequenceClassification(MPNetConfig(vocab_size=50, num_labels=1, **sizes))


# which matrices are adapted


def test_the_presets_for_mpnet_adapt_the_papers_matrices(mpnet, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    chosen = {id: notebooks.presets(id)["mpnet"].parameters["matrices"] for id in FIGURES}
    (first, *others) = chosen.values()
    assert others == [["all-dense"]] * 4
    wide = early_subspaces.full_width(mpnet, first, "authors", 3, 1e-3)
    dense = few_shot.methods(mpnet, others[0], "authors", 4, 1e-3, RATES)["thin"].config
    adapted = [
        peft.get_peft_model(copy.deepcopy(mpnet), copy.deepcopy(config)).base_model.targeted_module_names
        for config in (wide, dense)
    ]
    assert len(adapted[0]) == 72 and set(adapted[1]) - set(adapted[0]) == {"mpnet.embeddings.word_embeddings"}


# the pace of compression


def test_the_paced_thin_start_has_the_rates_of_the_compressed_one(encoder):
    ways = compression_pace.methods(encoder, *ADAPTED, 4, 1e-3, RATES)
    assert tuple(ways) == compression_pace.METHODS
    assert [way.rate for way in ways.values()] == [1e-4, 1e-4, 1e-2, 1e-2, 2e-3]
    variants = [way.config.variant for way in ways.values()]
    assert variants == ["full", "thin", "compressed", "thin", "compressed"]
    ratios = [way.config.lr_ratio for way in ways.values()]
    np.testing.assert_allclose(ratios, [1, 1, 0.01, 0.01, 0.05], rtol=1e-12)


def test_the_first_step_below_a_level_is_infinite_without_arrival_and_nan_after_a_divergence():
    nan = np.nan
    losses = np.array([[3, 2, 0.9, 4], [3, 3, 3, 1.0], [3, nan, nan, nan], [0.5, nan, nan, nan], [3, nan, 0.5, 0.4]])
    np.testing.assert_array_equal(compression_pace.first_below(losses, 1.0), [3, np.inf, nan, 1, nan])


def test_averages_are_the_authors():
    values = np.array([[4.0, 2.0, 1.0], [0.0, 1.0, 0.0]])
    expected = [[4.0, 3.8, 3.52], [0.0, 0.1, 0.09]]
    np.testing.assert_allclose(compression_pace.averaged(values, 0.9), expected)
    np.testing.assert_allclose(compression_pace.averaged(values[None], 0.9), [expected])


def test_paces_are_compared_seed_by_seed_and_what_averaging_adds_is_told():
    ends = {"full": (2, 4), "thin": (6, 99), "compressed": (3, 4), "paced": (5, 8), "slower": (99, 99)}
    histories = []
    for name in compression_pace.METHODS:
        for first in ends[name]:
            losses = np.where(np.arange(1, 11) < first, 2.0, 0.05)
            scores = {5: 0.8, 8: 0.5, 10: 9.0} if name == "full" else {5: 0.0, 8: 0.6, 10: 9.0}
            histories.append(SimpleNamespace(losses=losses, scores=scores))
    found = compression_pace.outcome(histories, 2, 8)
    assert found["losses"].shape == (5, 2, 10) and found["scores"].shape == (5, 2, 3)
    np.testing.assert_array_equal(found["thin over full, below 1"], [3, np.inf])
    np.testing.assert_array_equal(found["compressed over full, below 0.1"], [1.5, 1])
    np.testing.assert_array_equal(found["paced over compressed, below 1"], [5 / 3, 2])
    assert np.isinf(found["slower, below 1"]).all()
    np.testing.assert_allclose(found["thin, Pearson"], 0.6)
    np.testing.assert_allclose(found["thin, plotted"], 0.03)
    np.testing.assert_allclose(found["gap by averaging"], (0.95 * 0.8 + 0.05 * 0.5 - 0.03) - (0.5 - 0.6))


def test_a_ratio_without_one_arrival_is_infinite_or_0_and_without_both_there_is_none():
    losses = np.full((5, 2, 4), 2.0)
    losses[compression_pace.METHODS.index("compressed"), 0] = 0.5
    found = compression_pace._paces(losses)
    assert found["compressed over full, below 1"].tolist() == [0.0]  # the second seed has no arrival at all
    assert found["paced over compressed, below 1"].tolist() == [np.inf]


# ranks of updates


@pytest.mark.parametrize("scale", [1e-9, 1.0])
def test_values_of_a_low_rank_are_those_of_the_svd(scale):
    draw = torch.Generator().manual_seed(0)
    left, right = torch.randn(3, 40, 4, generator=draw), torch.randn(3, 4, 60, generator=draw)
    left[1, :, 2:] = 0  # of rank 2
    updates = scale * left @ right
    expected = torch.linalg.svdvals(updates.double())[:, :4]
    for most in (4, 8):
        found = update_ranks.leading_values(updates, most)
        assert found.shape == (3, most)
        torch.testing.assert_close(found[:, :4], expected, rtol=1e-9, atol=1e-6 * expected.max().item())
    assert update_ranks.leading_values(updates, None).shape == (3, 40)


def values(*layers, longest=100):
    return Values([f"layer {at}" for at in range(len(layers))], np.full(len(layers), longest), np.array(layers))


def test_ranks_are_counted_by_each_rule():
    least = 100 * 2.0**-23
    found = values([3.0, 3 * least * 1.01, 3 * least * 0.99, 0], [9e-4, 9e-4, 9e-4, 9e-4], [0, 0, 0, 0], [5, 4, 3, 2])
    np.testing.assert_array_equal(update_ranks.plain_ranks(found), [2, 4, 0, 4])
    np.testing.assert_array_equal(update_ranks.published_ranks(found, 3), [2, 0, 0, 3])
    total = 9 + 25 + 16 + 9 + 4
    assert (total - 4) / total < update_ranks.HELD
    np.testing.assert_array_equal(update_ranks.directions(found), [1, 0, 0, 4])


def test_the_rule_of_numpy_is_the_plain_one():
    update = torch.randn(30, 3, generator=torch.Generator().manual_seed(1)) @ torch.randn(3, 20)
    small = update_ranks.leading_values(update[None], None).numpy()
    assert update_ranks.plain_ranks(Values(["one"], np.array([30]), small)) == [np.linalg.matrix_rank(update.numpy())]


def test_ranks_of_trained_updates_are_told_by_method_and_seed(encoder, task, tmp_path):
    ways = update_ranks.methods(encoder, *ADAPTED, 2, 1e-2, few_shot.Rates(1e-2, 1e-2, 1e-2, 1e-2))
    runs = few_shot.planned_runs(ways, task, [8], range(2))
    assert {run.head_lr for run in runs} == {None}  # the head stays as it is
    watched = {"watch_at": [3], "watch": update_ranks.watch_values, "evaluate_at": [3]}
    watched |= {"checkpoint": tmp_path / "state"}  # which must hold what is watched
    histories = cd.fine_tune(encoder, runs, task, 3, 4, **watched, show_progress=False)
    found = update_ranks.outcome(histories, 2, 3, 2)
    methods, layers = len(update_ranks.METHODS), len(found["layers"])
    assert found["values"].shape == (methods, 2, layers, update_ranks.KEPT) and layers == 2
    for at, history in enumerate(histories):
        for layer, name in enumerate(found["layers"]):
            chain = history.chains[name]
            update = chain[0]
            for factor in chain[1:]:
                update = factor @ update
            expected = torch.linalg.svdvals(update.double()).numpy()
            told = found["values"][at // 2, at % 2, layer]
            np.testing.assert_allclose(told[: min(len(expected), 12)], expected[:12], rtol=1e-4, atol=1e-6)
            if at < 4:  # LoRA
                assert found["ranks/published"][at // 2, at % 2, layer] == np.linalg.matrix_rank(update.numpy())
    assert found["paper, all r"].tolist() == [True, True]
    assert (found["ranks/published"][2:] <= 2).all() and (found["full, published, mean"] <= 2).all()
    difference = found["paper, directions, mean"] - found["full, directions, mean"]
    np.testing.assert_array_equal(found["paper - full, directions"], difference)


def test_a_run_that_diverged_has_no_rank():
    good, bad = values([1.0, 0.5]), values([np.nan, np.nan])
    watched = [good, bad] * len(update_ranks.METHODS)
    histories = [SimpleNamespace(watched={3: each._asdict()}, scores={3: 0.1}) for each in watched]
    found = update_ranks.outcome(histories, 2, 3, 2)
    for rule in update_ranks.RULES:
        assert np.isnan(found[f"thin, {rule}, mean"]).tolist() == [False, True]
        assert np.isnan(found[f"thin, {rule}, share at most 1"]).tolist() == [False, True]
    assert found["paper, all r"].tolist() == [True, False]


# robustness to the rank

SETTING = Setting([1, 2, 8], 8, 2, 1e-4, 1e-2, [0.1, 1.0], 3, {"batch_size": 4, "show_progress": False})


def test_every_case_has_its_rank_scaling_and_start(encoder):
    ways = rank_robustness.methods(encoder, *ADAPTED, 1e-3, SETTING)
    assert list(ways) == SETTING.cases and ("compressed", 1) not in ways and len(ways) == 14
    assert all(way.config.r == rank for (_, rank), way in ways.items())
    alphas = {case: way.config.lora_alpha for case, way in ways.items() if case[0] in ("paper", "scaled", "standard")}
    assert all(alpha == (8 if name == "scaled" else rank) for (name, rank), alpha in alphas.items())
    assert {way.rate for (name, _), way in ways.items() if name == "compressed"} == {1e-2}
    assert ways["scaled", 2].start is rank_robustness.scaled_paper_start
    assert ways["paper", 2].start is cd.paper_lora_start and ways["standard", 1].start is few_shot.standard_start


def test_the_scaled_start_has_the_papers_factors(encoder):
    ways = rank_robustness.methods(encoder, *ADAPTED, 1e-3, SETTING)
    models = []
    for name in ("paper", "scaled"):
        way = ways[name, 2]
        model = peft.get_peft_model(copy.deepcopy(encoder), copy.deepcopy(way.config))
        way.start(model, torch.Generator().manual_seed(3))
        models.append(model)
    plain, scaled = (dict(model.named_parameters()) for model in models)
    for name, factor in plain.items():
        assert torch.equal(factor, scaled[name])
    layers = [layer for layer in models[1].modules() if isinstance(layer, peft.tuners.lora.LoraLayer)]
    assert {layer.scaling["default"] for layer in layers} == {4.0}


def test_the_best_place_is_the_top_of_the_parabola():
    rates = np.array([1e-5, 1e-4, 1e-3, 1e-2, np.nan])
    scores = np.array([*(1 - (np.log10(rates[:4]) + 3.3) ** 2), np.nan])
    assert rank_robustness.best_place(rates, scores) == pytest.approx(-3.3)
    assert rank_robustness.best_place(rates, np.array([0, 1, 2, 3, np.nan])) == -2
    assert rank_robustness.best_place(rates, np.array([0, 1, 2, np.nan, np.nan])) == -3
    assert np.isnan(rank_robustness.best_place(rates, np.full(5, np.nan)))


def test_exponents_are_found_seed_by_seed():
    ranks, rates = [1, 4, 16, 64], 10.0 ** np.arange(-6, 0.1, 0.5)
    grid = np.broadcast_to(rates, (5, 4, len(rates)))
    exponent = np.array([[-0.5], [0.0], [-0.25], [-1.0], [0.2]]) * [1.0, 1.1]  # (M, T)
    tops = -2.9 + exponent[:, None, None, :] * np.log10(ranks)[None, :, None, None]
    scores = -((np.log10(rates)[None, None, :, None] - tops) ** 2)
    scores[4, 0] = np.nan  # as the compressed variant at an odd rank
    np.testing.assert_allclose(rank_robustness.exponents(grid, scores, ranks), exponent, atol=1e-9)


def test_rates_are_chosen_on_rows_that_do_not_judge_and_methods_are_judged_by_other_seeds(monkeypatch, encoder, task):
    best, asked = {("paper", 1): 0.1, ("thin", 8): 3.0}, []

    def trained(model, runs, rows, steps, **options):
        asked.append((runs, rows))
        scores = []
        for run in runs:
            name = {"thin": "thin", "compressed": "compressed"}.get(getattr(run.config, "variant", ""), "paper")
            factor = run.lr / (1e-2 if name == "compressed" else 1e-4)
            top = best.get((name, run.config.r), 1.0)
            scores.append(run.seed - np.log10(factor / top) ** 2)
        return [SimpleNamespace(scores={steps: score}) for score in scores]

    monkeypatch.setattr(rank_robustness, "fine_tune", trained)
    ways = rank_robustness.methods(encoder, *ADAPTED, 1e-3, SETTING)
    found = rank_robustness.compare(encoder, task, ways, SETTING, [5, 6], [0, 1, 2], 6)
    assert {run.seed for run in asked[0][0]} == {0, 1, 2} and {run.seed for run in asked[-1][0]} == {5, 6}
    tuning, judging = asked[0][1], asked[-1][1]
    assert len(tuning.train) == len(judging.train) == 18 and len(tuning.validation) == 6
    assert judging.validation is task.validation
    together = torch.cat([tuning.train.tokens["input_ids"], tuning.validation.tokens["input_ids"]])
    assert sorted(together.tolist()) == sorted(task.train.tokens["input_ids"].tolist())
    assert found["factors"][0, 0] == 0.1 and found["factors"][3, 2] == 3.0 and np.isnan(found["factors"][4, 0])
    np.testing.assert_allclose(found["own"][3, 2], [5, 6])
    np.testing.assert_allclose(found["fixed"][3, 2], [5 - np.log10(3) ** 2, 6 - np.log10(3) ** 2])
    assert found["grid"].shape == (5, 3, 3) and found["grid scores"].shape == (5, 3, 3, 3)
    np.testing.assert_allclose(found["thin - paper, last, own"], 0, atol=1e-12)
    np.testing.assert_allclose(found["thin, last - reference, own"], 0)
    assert found["paper, exponent"].shape == (3,)
    assert found["rates inside"].tolist() == [True, True, True, False, True]  # at thin's 3 the grid may not grow more


def test_tiny_models_go_through_the_whole_protocol(encoder, task):
    setting = Setting([2, 4], 8, 2, 1e-3, 1e-2, [1.0, 3.0], 2, {"batch_size": 4, "show_progress": False})
    ways = rank_robustness.methods(encoder, *ADAPTED, 1e-2, setting)
    found = rank_robustness.compare(encoder, task, ways, setting, [2, 3], [0, 1], 6)
    assert found["fixed"].shape == found["own"].shape == (5, 2, 2)
    assert np.isfinite(found["fixed"]).all() and np.isfinite(found["grid scores"]).all()
    same = found["factors"] == 1
    np.testing.assert_array_equal(found["own"][same], found["fixed"][same])


def test_a_killed_comparison_trains_only_what_is_left(monkeypatch, encoder, task, tmp_path):
    kept = {"checkpoint": tmp_path / "state", "checkpoint_every": 2}
    options = {"batch_size": 4, "show_progress": False, "max_stack": 8} | kept
    setting = Setting([2, 4], 8, 2, 1e-3, 1e-2, [1.0, 3.0], 3, options)
    arguments = (task, rank_robustness.methods(encoder, *ADAPTED, 1e-2, setting), setting, [2, 3], [0, 1], 6)
    steps, advance = [], Trainer.advance

    def counted(trainer, step):
        if steps.count("taken") == last:
            raise KeyboardInterrupt
        steps.append("taken")
        advance(trainer, step)

    monkeypatch.setattr(Trainer, "advance", counted)
    last = None
    expected = rank_robustness.compare(encoder, *arguments)
    files = {file: file.read_bytes() for file in tmp_path.iterdir()}
    assert len({file.name.split(".")[1] for file in files}) > 2  # of a call each: rates, those beyond, what judges
    assert len(steps) == 2 * len(files)
    for file in files:
        file.unlink()
    last, total = len(steps) - 1, len(steps)
    steps.clear()
    with pytest.raises(KeyboardInterrupt):
        rank_robustness.compare(encoder, *arguments)
    last = None
    steps.clear()
    found = rank_robustness.compare(encoder, *arguments)
    assert len(steps) == 2 < total  # of the last pass, whose second step the kill took
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values)


def test_the_notebook_on_ranks_keeps_what_it_has_trained(monkeypatch):
    book_path = REPOSITORY / "notebooks/yaras2024/10_rank_robustness.ipynb"
    book = nbformat.read(book_path, as_version=4)
    [code] = [cell.source for cell in book.cells if "def setting_of" in cell.source]
    [function] = [node for node in ast.parse(code).body if getattr(node, "name", "") == "setting_of"]
    space = {"cd": cd, "robust": rank_robustness}
    exec(compile(ast.Module([function], []), "setting_of", "exec"), space)
    given = notebooks.defaults(book_path)
    monkeypatch.setattr(cd.runs, "checkpoint", lambda every: {"checkpoint": "place", "checkpoint_every": every})
    options = space["setting_of"](SimpleNamespace(**given)).options
    assert (options["checkpoint"], options["checkpoint_every"]) == ("place", given["steps"])
    assert options["devices"] is None


def test_a_seed_may_not_choose_and_judge(encoder, task):
    ways = rank_robustness.methods(encoder, *ADAPTED, 1e-3, SETTING)
    with pytest.raises(ValueError, match="seeds"):
        rank_robustness.compare(encoder, task, ways, SETTING, [2, 3], [0, 2], 6)
