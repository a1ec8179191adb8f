"""Few-shot writing: what is adapted, what is written of, and that a record says what the runs wrote."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from data_helpers import write_wordnet
from text_helpers import save_t5

import compressible as cd
from compressible.data import text
from compressible.experiments import few_shot, tiny_writer
from compressible.experiments import few_shot_writing as writing

SEARCH = writing.Search(beams=2, longest=12, rows=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COMPRESSIBLE_MANIFEST", "")  # set by the next line, and as before after it
        write_wordnet(place)
    return place


def use(folder, patch):
    patch.setenv("COMPRESSIBLE_DATA", str(folder))
    patch.setenv("COMPRESSIBLE_MANIFEST", str(folder / "manifest.toml"))


@pytest.fixture(autouse=True)
def wordnet(folder, monkeypatch):
    use(folder, monkeypatch)
    monkeypatch.setattr(writing, "without_meteor", lambda: "")  # these files are too few for METEOR


@pytest.fixture(scope="module")
def subject(folder):
    few_steps = (0, min(tiny_writer.STEPS, 5))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny_writer.tiny_writer, "__defaults__", few_steps)
        use(folder, patch)
        yield writing.load_subject("tiny", "wordnet-glosses", 128, 4, "cpu")


def planned(subject, seeds=2, rate=5e-2):
    methods = writing.methods(subject.model, 4, 0.3, rate, rate)
    return few_shot.planned_runs(methods, subject.task, [8], range(seeds))


def scored(written, references):
    """Characters in a text, and whether it is its reference: numbers that tell runs apart."""
    return {"BLEU": float(np.mean([len(each) for each in written])), "METEOR": float(written == references)}


def test_every_linear_layer_but_the_words_is_adapted(subject):
    names = writing.linear_layers(subject.model)
    assert len(names) == 2 * 7 and "lm_head" not in names and not any("embed" in name for name in names)
    methods = writing.methods(subject.model, 4, 1e-3, 1e-4, 1e-2)
    assert list(methods) == list(writing.METHODS)
    assert methods["compressed"].rate == 1e-2 and methods["compressed"].config.lr_ratio == pytest.approx(1e-2)
    assert methods["thin"].config.lr_ratio == 1 and methods["thin"].config.variant == "thin"
    assert methods["paper"].start is cd.paper_lora_start and methods["standard"].start is None


def test_each_meaning_is_written_of_once_and_keeps_all_references(subject):
    rows = subject.task.validation
    assert len(rows) == 4 == len(set(rows.texts)) and all(len(known) >= 1 for known in rows.references)
    whole = text.read_rows("wordnet-glosses", "validation")
    firsts: dict = {}
    for meaning, label in zip(whole.texts, whole.labels, strict=True):
        firsts.setdefault(meaning, label)
    assert subject.references == [firsts[meaning] for meaning in rows.texts]
    everything = writing.load_subject("tiny", "wordnet-glosses", 128, 0, "cpu").task.validation
    assert len(everything) == len(firsts) > 30 and everything.texts[0] == rows.texts[0]
    with pytest.raises(ValueError, match="validation_rows is -1"):
        writing.one_a_meaning(rows, -1)


def test_a_record_holds_what_the_runs_wrote(subject):
    runs = planned(subject)
    assert torch.equal(runs[0].subset, runs[2].subset) and not torch.equal(runs[0].subset, runs[1].subset)
    histories = cd.fine_tune(subject.model, runs, subject.task, 3, 8, evaluate_at=[3], show_progress=False)
    found = writing.outcome(histories, subject, SEARCH, 2, scored)
    assert found["metrics"] == ["BLEU", "METEOR"] and found["scores"].shape == (4, 2, 2) and found["meanings"] == 4
    assert found["losses"].shape == (4, 2, 3) and np.isfinite(found["validation losses"]).all()
    own = writing.merged_model(histories[5])
    texts = writing.written_texts(own, subject.tokenizer, subject.prompts, SEARCH.beams, SEARCH.longest)
    assert found["scores"][2, 1, 0] == scored(texts, subject.references)["BLEU"]
    gain = found["scores"][2, :, 0] - found["scores"][0, :, 0]
    assert np.array_equal(found["thin - paper, BLEU"], gain) and gain.any()
    before = found["scores"][3, :, 0] - found["untuned"][0]
    assert np.array_equal(found["compressed - untuned, BLEU"], before)
    meaning, reference, *written = found["examples"][0]
    assert (meaning,) in subject.task.validation.texts and reference in subject.references and len(written) == 5


def test_a_run_that_diverged_wrote_nothing_and_hides_behind_no_mean(subject):
    histories = cd.fine_tune(subject.model, planned(subject, 1), subject.task, 1, 8, evaluate_at=[1])
    histories[2] = dataclasses.replace(histories[2], divergence=0, scores={1: float("nan")})
    found = writing.outcome(histories, subject, SEARCH, 1, scored)
    assert np.isnan(found["scores"][2]).all() and np.isnan(found["thin - paper, BLEU"]).all()
    assert np.isfinite(found["scores"][[0, 1, 3]]).all() and np.isfinite(found["compressed - paper, BLEU"]).all()
    assert found["examples"][0][5] == "" and np.isnan(found["several references"][2, 0])


def test_a_model_of_two_halves_goes_the_same_way(tmp_path):
    subject = writing.load_subject(str(save_t5(tmp_path)), "wordnet-glosses", 400, 2, "cpu")
    assert subject.task.kind == "generation" and subject.prompts[0].endswith(" (noun)")
    names = writing.linear_layers(subject.model)
    assert names and "lm_head" not in names and all("relative" not in name for name in names)
    histories = cd.fine_tune(subject.model, planned(subject, 1), subject.task, 2, 8, evaluate_at=[2])
    found = writing.outcome(histories, subject, SEARCH, 1, scored)
    assert found["scores"].shape == (4, 1, 2) and np.isfinite(found["validation losses"]).all()


def test_the_tiny_writer_is_the_same_for_a_seed_and_learns(subject):
    one, tokenizer = tiny_writer.tiny_writer("wordnet-glosses", 3, steps=2)
    other, _ = tiny_writer.tiny_writer("wordnet-glosses", 3, steps=2)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    rows = subject.task.train.take(range(16))
    losses = []
    for steps in (1, 12):
        model, _ = tiny_writer.tiny_writer("wordnet-glosses", 3, steps=steps)
        losses.append(model(**rows.tokens, labels=rows.labels).loss.item())
    assert losses[1] < losses[0] - 0.5
    unseen = "It is £20-25, OK?"
    assert tokenizer.decode(tokenizer(unseen)["input_ids"], skip_special_tokens=True) == unseen
