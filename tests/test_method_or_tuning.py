"""The sweep of rates: chosen on one half and judged on the other, in parts that resume and merge, and its controls."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")
from transformers import BertConfig, BertForSequenceClassification

import compressible as cd
from compressible.companion.library import REACHED
from compressible.experiments import tuned_methods, tuning_sweep, tuning_worker
from compressible.experiments.tuned_methods import first_step, method, random_frames
from compressible.experiments.tuning_cells import Cell, Cells, Scored, merge, pack
from compressible.experiments.tuning_outcome import differences, label, outcome, stacked, unstacked, window
from compressible.experiments.tuning_rates import chosen_rate
from compressible.experiments.tuning_sweep import Sweep
from compressible.experiments.tuning_worker import Worker, halves
from compressible.runtime.starting_factors import compressed_chain
from compressible.runtime.weight_gradients import top_frames

VOCABULARY, LENGTH = 40, 8
ONES = ([1.0, 1.0], [1.0, 1.0], 1.0)  # losses, norms and seconds of two seeds


def rows(count: int, seed: int) -> cd.Examples:
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (count, LENGTH), generator=draw)
    tokens = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return cd.Examples(tokens, ids.float().mean(1) / VOCABULARY, texts=tuple((str(i),) for i in range(count)))


def loaded(encoder, task, protocol, max_length, validation_rows, device):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    model = BertForSequenceClassification(BertConfig(vocab_size=VOCABULARY, num_labels=1, **sizes)).eval()
    return model, cd.Task(task, "regression", 1, "pearson", rows(40, 0), rows(21, 1), protocol)


def sweep(**given) -> Sweep:
    values = {
        "encoder": "tiny", "protocol": "clean", "matrices": ["query", "value"], "tasks": ["one", "two"],
        "sample_sizes": [8, 16], "other_sizes": [8], "adapter_rank": 4, "ranks": [2, 4],
        "methods": ["standard", "paper", "thin", "compressed"], "learning_rates": [1e-3, 1e-2, 1e-1],
        "learning_rate": 1e-3, "inner_learning_rate": 1e-2, "head_rate": 1e-2, "init_scale": 0.1, "max_length": 16,
        "validation_rows": 0, "batch_size": 4, "steps": 3, "precision": "float32", "tuning_seeds": 2, "seeds": 3,
        "alone_seeds": 2, "seed": 0, "more_rates": 1,
    }  # fmt: skip
    return Sweep(**(values | given))


@pytest.fixture
def done(tmp_path):
    """A finished small sweep and its cells."""
    small = sweep(tasks=["one"], ranks=[4], sample_sizes=[8])
    cells = Cells(small.setting(), tmp_path)
    Worker(small, cells, load=loaded).work()
    return small, cells, tmp_path


def test_cells_that_were_trained_survive_a_folder_that_cannot_be_written(tmp_path):
    small = sweep(tasks=["one"], ranks=[4], sample_sizes=[8])
    (tmp_path / "cells").write_text("a file where a folder should be")
    cells = Cells(small.setting(), tmp_path / "cells")
    with pytest.warns(RuntimeWarning, match="could not be kept in .*the next run computes it again"):
        Worker(small, cells, load=loaded).work()
    assert outcome(small, cells)["cells"] > 0


def test_every_method_is_chosen_on_one_half_and_judged_on_the_other_with_fresh_seeds(done):
    small, cells, _ = done
    found = outcome(small, cells)
    assert found["missing"] == [] and found["cells"] > 0
    parts = unstacked(found, ["one, n = 8"], small.methods, small.alone_seeds)
    assert [name for _, name in parts] == small.methods
    for part in parts.values():
        assert part["scores"].shape[1] == 2 and len(part["scores"]) >= 3 and part["judged"].shape == (3,)
        means = dict(zip(part["rates"].tolist(), part["scores"].mean(1), strict=True))
        assert means[float(part["best"][0])] == max(means.values())
    thin, lora = (parts["one, n = 8", name]["judged"] for name in ("thin", "standard"))
    np.testing.assert_array_equal(found["thin - standard, one, n = 8"], thin - lora)
    np.testing.assert_array_equal(found["thin - standard, mean of one"], thin - lora)
    cell = next(cell for cell in cells.known if cell.stage == "judge")
    assert not set(cells.get(cell).seeds) & set(small.seeds_of("choose", cell.method))


def test_a_judged_cell_is_what_fine_tune_gives_on_the_other_half(done):
    small, cells, _ = done
    rate = chosen_rate(small, cells, "one", 8, 4, "standard")
    model, task = loaded("", "one", "clean", 0, 0, "")
    choosing, judging = halves(task)
    way = method("standard", model, 4, small.matrices, "clean", small.init_scale)
    runs = [way.run(rate, seed, task.subset(8, seed), 1e-2) for seed in small.seeds_of("judge", "standard")]
    given = cd.Task("one", "regression", 1, "pearson", task.train, judging, "clean")
    expected = cd.fine_tune(model, runs, given, 3, 4, evaluate_at=[3])
    scores = cells.get(Cell("one", 8, 4, "standard", "judge", rate)).scores
    np.testing.assert_allclose(scores, [history.scores[3] for history in expected], rtol=1e-4)
    assert len(choosing) == len(judging) == 10
    assert not set(choosing.texts) & set(judging.texts)


def test_a_sweep_that_was_cut_off_goes_on_and_computes_nothing_twice(tmp_path, monkeypatch):
    small, calls, fine_tune = sweep(), [], tuning_worker.fine_tune

    def counted(model, runs, *args, **options):
        calls.append(len(runs))
        return fine_tune(model, runs, *args, **options)

    monkeypatch.setattr(tuning_worker, "fine_tune", counted)
    part = Cells(small.setting(), tmp_path)
    Worker(small, part, load=loaded, budget=0.0).work()
    assert len(calls) == 1
    assert outcome(small, part)["missing parts"] == len(tuning_sweep.planned(small))
    for _ in range(3):
        Worker(small, Cells(small.setting(), tmp_path), load=loaded, budget=1e-9).work()
    assert len(calls) == 4  # each call of the command gets on by one at least
    whole = Cells(small.setting(), tmp_path)
    Worker(small, whole, load=loaded).work()
    assert outcome(small, whole)["missing"] == []
    before, kept = sum(calls), len(calls)
    Worker(small, Cells(small.setting(), tmp_path), load=loaded).work()
    assert len(calls) == kept
    alone = Cells(small.setting(), tmp_path / "at once")
    Worker(small, alone, load=loaded).work()
    assert sum(calls) == 2 * before
    for name, values in outcome(small, alone).items():
        if isinstance(values, np.ndarray) and not name.startswith("window") and "/window" not in name:
            np.testing.assert_allclose(values, outcome(small, whole)[name], rtol=1e-3, atol=1e-3)


def test_processes_share_a_folder_and_leave_each_other_what_is_under_way(tmp_path):
    small = sweep()
    cells = [Cells(small.setting(), tmp_path) for _ in range(3)]
    first, second, third = (Worker(small, each, load=loaded, beside_others=True) for each in cells)
    places, names = small.blocks()[0]
    with first._claimed(places[:1], names) as own, second._claimed(places[:1], names) as others:
        assert own and not others
        second.work()
    missing = set(outcome(small, cells[1])["missing"])
    assert missing == {f"{name} on {label(small, places[0])}" for name in names}
    third.work()
    assert outcome(small, cells[2])["missing"] == []
    assert {file.suffix for file in cells[0].folder.iterdir()} <= {".json", ".lock"}


def test_the_plan_has_every_place_and_method_once_and_the_telling_ones_first():
    planned = tuning_sweep.planned(sweep(methods=list(tuned_methods.METHODS), sample_sizes=[8, 12, 16]))
    assert len(planned) == len(set(planned))
    assert {place for place, _ in planned[:8]} == {("one", 8, 4), ("one", 16, 4)}
    assert {name for _, name in planned[:8]} == set(tuning_sweep.CORE)
    assert {place for place, _ in planned} == {
        ("one", 8, 4), ("one", 12, 4), ("one", 16, 4), ("two", 8, 4), ("one", 8, 2)
    }  # fmt: skip
    assert planned[-1][1] == "dora"
    others = {place for place, name in planned if name not in tuning_sweep.CORE}
    assert others == {("one", 8, 4), ("one", 16, 4), ("two", 8, 4)}


def test_cells_of_two_machines_merge_and_those_of_another_setting_are_never_met(tmp_path):
    found = Scored([0, 1], [0.5, math.nan], [1.0, 2.0], [3.0, 4.0], 1.5)
    one, other = (Cell("a", 8, 4, "standard", "choose", rate) for rate in (1e-3, 1e-2))
    here, there = Cells({"steps": 3}, tmp_path / "here"), Cells({"steps": 3}, tmp_path / "there")
    here.put(one, found)
    there.put(other, found)
    Cells({"steps": 4}, tmp_path / "there").put(one, found)
    assert merge(tmp_path / "there", tmp_path / "here") == 2
    assert merge(tmp_path / "there", tmp_path / "here") == 0
    merged = Cells({"steps": 3}, tmp_path / "here")
    assert merged.missing([one, other]) == []
    np.testing.assert_array_equal(merged.get(other).scores, found.scores)
    assert len(list((tmp_path / "here").iterdir())) == 2


def test_cells_travel_as_one_file_and_come_out_as_they_were(tmp_path):
    one, other = (Cell("a", 8, 4, "standard", "choose", rate) for rate in (1e-5, 1e-2))
    for setting, cell in (({"steps": 3}, one), ({"steps": 3}, other), ({"steps": 4}, one)):
        Cells(setting, tmp_path / "here").put(cell, Scored([0, 1], [0.5, math.nan], [1.0, 2.0], [3.0, 4.0], 1.5))
    file = tmp_path / "cells.jsonl"
    (Cells({"steps": 3}, tmp_path / "here").folder / ".a.half.json").write_text("{")  # of a process that writes now
    assert pack(tmp_path / "here", file) == 3 and len(file.read_text().splitlines()) == 5
    assert merge(file, tmp_path / "there") == 3 and merge(file, tmp_path / "there") == 0
    inside = [path.relative_to(tmp_path / "here") for path in sorted((tmp_path / "here").glob("*/[!.]*.json"))]
    assert len(inside) == 5
    for path in inside:
        assert (tmp_path / "there" / path).read_bytes() == (tmp_path / "here" / path).read_bytes()
    assert pack(tmp_path / "there", tmp_path / "again.jsonl") == 3
    assert (tmp_path / "again.jsonl").read_bytes() == file.read_bytes()


@pytest.mark.parametrize("line", ["{", "3", '{"file": "../a.json", "content": {}}', '{"content": {}}'])
def test_a_file_that_is_none_of_cells_is_refused_with_its_line(tmp_path, line):
    (tmp_path / "cells.jsonl").write_text(f"{line}\n")
    with pytest.raises(ValueError, match=r"cells.jsonl, line 1, holds no cell"):
        merge(tmp_path / "cells.jsonl", tmp_path / "there")
    assert not (tmp_path / "there").exists()


def test_a_damaged_cell_is_computed_again_and_one_of_another_library_is_marked(tmp_path, monkeypatch):
    cells, cell = Cells({"steps": 3}, tmp_path), Cell("a", 8, 4, "standard", "choose", 1e-3)
    cells.put(cell, Scored([0], [0.5], [1.0], [3.0], 1.5))
    assert cells.made_by([cell])["cells of another library"] == 0
    file = cells.folder / cell.file
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | {"made": content["made"] | {"library": "older", "commit": "abc"}}))
    again = Cells({"steps": 3}, tmp_path)
    told = again.made_by([cell])
    assert told["cells of another library"] == 1 and told["commits"] == ["abc"]
    monkeypatch.setenv(REACHED, "reached")
    again.put(cell, Scored([0], [0.5], [1.0], [3.0], 1.5, made={"library": "older"}))  # but not where it matters
    assert again.made_by([cell])["cells of another library"] == 0
    monkeypatch.setenv(REACHED, "other")
    assert again.made_by([cell])["cells of another library"] == 1
    for damaged in ("{", json.dumps(content | {"scores": []}), json.dumps(content | {"cell": {"task": "b"}})):
        file.write_text(damaged)
        with pytest.warns(RuntimeWarning, match="is no cell"):
            assert Cells({"steps": 3}, tmp_path).missing([cell]) == [cell]


def test_a_grid_whose_best_rate_is_at_an_end_grows_and_a_search_that_lacks_a_rate_is_not_finished(tmp_path):
    small = sweep(more_rates=2)
    cells = Cells(small.setting(), tmp_path)
    for place, rate in enumerate((1e-3, 1e-2, 1e-1)):
        cells.put(Cell("one", 8, 4, "standard", "choose", rate), Scored([0], [0.1 * place], [1.0], [1.0], 1.0))
    assert chosen_rate(small, cells, "one", 8, 4, "standard") is None
    cells.put(Cell("one", 8, 4, "standard", "choose", 1.0), Scored([0], [0.0], [1.0], [1.0], 1.0))
    assert chosen_rate(small, cells, "one", 8, 4, "standard") == 1e-1
    assert chosen_rate(small, cells, "one", 8, 4, "thin") is None


def test_chosen_rates_at_an_end_of_their_grids_are_told_by_task_method_and_place(tmp_path):
    methods = ["standard", "paper"]
    small = sweep(sample_sizes=[8], ranks=[4], methods=methods, more_rates=0, learning_rate=1e-2)
    cells = Cells(small.setting(), tmp_path)
    best = {("one", "standard"): 1e-2, ("one", "paper"): 1e-1, ("two", "standard"): 1e-3}  # two lacks the other
    for (task, name), rate in best.items():
        for tried in small.learning_rates:
            cells.put(Cell(task, 8, 4, name, "choose", tried), Scored([0, 1], [0.1 + (tried == rate)] * 2, *ONES))
        for judged in {rate, 1e-2}:
            cells.put(Cell(task, 8, 4, name, "judge", judged), Scored([1000, 1001], [0.5, 0.6], *ONES))
    found = outcome(small, cells)
    np.testing.assert_array_equal(found["rates inside, one"], [True, False])
    np.testing.assert_array_equal(found["rates inside, other tasks"], [False])
    assert found["rates at an end"] == ["paper on one, n = 8", "standard on two, n = 8"]


@pytest.mark.parametrize("scores, expected", [
    ([0.0, 0.5, 0.0], 0.08), ([0.5, 0.5, 0.5], 2.0), ([0.49, 0.5, math.nan], 1.0), ([math.nan] * 3, 0.0),
    ([0.5, 0.0, 0.49], 0.04),
])  # fmt: skip
def test_the_window_is_what_lies_around_the_best_rate(scores, expected):
    assert window(np.array([1e-4, 1e-3, 1e-2]), np.array(scores)) == pytest.approx(expected)


def test_random_frames_take_the_papers_first_step():
    draw = torch.Generator().manual_seed(0)
    gradient = 1e-3 * torch.randn(12, 20, generator=draw)
    config = cd.DeepLoraConfig(r=4, init_scale=1e-2)
    first, *inner, last = random_frames(gradient, config, 4, torch.Generator().manual_seed(1))
    papers = compressed_chain(*top_frames(gradient, 2), (12, 20), 3, 1e-2, torch.Generator().manual_seed(1))
    own, theirs = (a.mT @ gradient @ b.mT for a, b in ((last, first), (papers[-1], papers[0])))
    assert len(inner) == 3 and first.shape == (4, 20) and last.shape == (12, 4)
    # The scale of both frames is in the core already; what the step then moves is seen through them once more.
    scale = float((first @ first.mT)[0, 0])
    assert scale * first_step(own, 1e-2, 3) == pytest.approx(first_step(theirs, 1e-2, 3), rel=1e-4)
    torch.testing.assert_close(first @ first.mT, scale * torch.eye(4), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", tuned_methods.METHODS)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_every_method_trains_in_one_pass_but_for_what_goes_alone(name, precision):
    model, task = loaded("", "one", "clean", 0, 0, "")
    way = method(name, model, 4, ["query", "value", "word_embeddings"], "clean", 0.1)
    runs = [way.run(1e-2, seed, task.subset(8, seed), 1e-2) for seed in (0, 1)]
    options = {"evaluate_at": [4], "watch_at": [0, 4], "watch": tuning_worker.update_norms, "precision": precision}
    with pytest.warns(UserWarning) if name in tuned_methods.ALONE else nothing():
        found = cd.fine_tune(model, runs, task, 4, 4, **options)
    for history in found:
        assert np.isfinite(history.losses).all() and history.watched[4] != history.watched[0] >= 0
        assert history.shared == (1 if name in tuned_methods.ALONE else 2)


@pytest.mark.parametrize("name", tuned_methods.METHODS)
def test_a_head_that_stays_as_it_is_has_no_rate(name):
    model, task = loaded("", "one", "authors", 0, 0, "")
    rates = {}
    for protocol in ("authors", "clean"):
        way = method(name, model, 4, ["query", "value"], protocol, 0.1)
        rates[protocol] = way.run(1e-2, 0, task.subset(8, 0), 1e-3).head_lr
    assert rates == {"authors": None, "clean": 1e-3}


def nothing():
    import contextlib

    return contextlib.nullcontext()


def test_the_published_definition_of_lora_ga_starts_from_the_gradients_directions():
    gradient = torch.randn(12, 20, generator=torch.Generator().manual_seed(0))
    a, b = tuned_methods.approximated(gradient, None, 3, torch.Generator())
    u, _, vh = torch.linalg.svd(gradient)
    scale = 12**0.25 / 4
    torch.testing.assert_close((a @ vh[:3].mT).abs(), scale * torch.eye(3), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close((u[:, 3:6].mT @ b).abs(), scale * torch.eye(3), atol=1e-4, rtol=1e-4)


def test_unknown_methods_and_grids_that_do_not_ascend_are_refused():
    with pytest.raises(ValueError, match="methods has \\['nothing'\\]"):
        tuning_sweep.check(sweep(methods=["nothing"]))
    with pytest.raises(ValueError, match="learning_rates"):
        tuning_sweep.check(sweep(learning_rates=[1e-2, 1e-3, 1e-1]))
    tuning_sweep.check(sweep())


def test_outcomes_of_nothing_say_what_is_missing(tmp_path):
    small = sweep()
    found = outcome(small, Cells(small.setting(), tmp_path))
    assert found["missing parts"] == len(found["missing"]) == len(tuning_sweep.planned(small))
    assert not any(isinstance(value, np.ndarray) for value in found.values())


def test_a_method_that_diverges_at_every_rate_is_the_worst_that_tuning_found():
    scores = {"standard": 0.3, "rslora": 0.9, "plus": math.nan, "pissa": 0.5, "lora_ga": 0.7}
    judged = scores | {"plus": 0.1}  # with fresh seeds it did not
    parts = {
        name: {"chosen score": np.array([score]), "judged": np.full(2, judged[name])}
        | dict.fromkeys(("published", "window"), np.zeros(2))
        for name, score in scores.items()
    }
    np.testing.assert_allclose(differences(parts, "one")["variants apart, one"], 0.8)


def test_parts_come_back_as_they_were_stacked():
    draw = np.random.default_rng(0)

    def part(rates: int, seeds: int, judged: int, **more: np.ndarray) -> dict[str, np.ndarray]:
        given = {"rates": (rates,), "scores": (rates, seeds), "norms": (rates,), "best": (1,), "chosen score": (1,)}
        given |= {"window": (seeds,), "judged": (judged,), "published": (judged,)}
        return {name: draw.random(shape) for name, shape in given.items()} | more

    lost = part(3, 5, 4)
    lost["scores"][-1, -1] = lost["judged"][-1] = np.nan  # seeds that diverged
    parts = {
        ("a", "standard"): part(5, 5, 4), ("a", "dora"): part(4, 2, 2), ("b", "standard"): lost,
        ("b", "thin"): part(3, 5, 4, matched=draw.random(4)),
    }  # fmt: skip
    methods = ["standard", "dora", "thin"]
    back = unstacked(stacked(parts, ["a", "b", "c"], methods), ["a", "b", "c"], methods, alone_seeds=2)
    assert back.keys() == parts.keys()
    for key, expected in parts.items():
        assert back[key].keys() == expected.keys()
        for name, values in expected.items():
            np.testing.assert_array_equal(back[key][name], values)
