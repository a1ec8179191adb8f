"""What is timed for fine-tuning: the cases, what they leave out and why, and the operations that make the floor."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from compressible.experiments.speed import finetuning as speed
from compressible.experiments.speed import goals

LAYERS, HIDDEN, WIDE, BATCH, LENGTH = 2, 64, 160, 2, 8


def tiny(name: str = "", seed: int = 0) -> BertForSequenceClassification:
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=50, hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=2, intermediate_size=WIDE,
        max_position_embeddings=LENGTH, num_labels=1, attn_implementation="sdpa",
    )  # fmt: skip
    return BertForSequenceClassification(config).eval()


def survey(monkeypatch, cases, budget=100.0):
    monkeypatch.setattr(speed, "load_shape", tiny)
    return speed.survey(cases, BATCH, LENGTH, "cpu", 0.01, 3, budget)


def test_every_case_is_timed_and_rates_are_of_single_runs(monkeypatch):
    cases = list(speed.cases(["tiny"], [1, 2], ["float32"], 1, compiled=False))
    out = survey(monkeypatch, cases)
    assert {case.method for case in cases} == set(speed.METHODS)
    for case in cases:
        (mode,) = {key.split("/")[3] for key in out if key.startswith(f"{case.name}/")}
        steps = out[f"{case.name}/{mode}/steps"]
        assert mode == "eager" and steps.shape == (3,) and (steps > 0).all()
        assert speed.rate(out, case.name)[1] == pytest.approx(case.runs / steps)
    assert out["tiny/float32/2 x compressed/eager/setup"] > 0
    assert speed.fastest_peft(out, "tiny", ["tf32", "float32"]) == pytest.approx(
        1 / out["tiny/float32/1 x peft/eager/steps"]
    )


def test_what_breaks_and_what_comes_too_late_say_so_and_leave_the_others(monkeypatch):
    def broken(*_):
        raise MemoryError("no room")

    monkeypatch.setattr(speed, "time_peft", broken)
    cases = [speed.Case("tiny", "float32", "peft", modes=("eager",)), speed.Case("tiny", "float32", "lora")]
    out = survey(monkeypatch, cases)
    assert out["tiny/float32/1 x peft/eager/skipped"] == "failed: MemoryError: no room"
    assert len(out["tiny/float32/1 x lora/eager/steps"]) == 3
    assert np.isnan(speed.fastest_peft(out, "tiny", ["float32"])).all()
    late = survey(monkeypatch, cases, budget=0.0)
    assert late["tiny/float32/1 x lora/graph/skipped"] == "not begun after 0 s"


def test_claims_come_first_and_no_case_twice():
    cases = list(speed.cases(["a", "b"], [1, 5, 20, 40], ["bfloat16", "tf32"], 5, compiled=True))
    assert len(cases) == len(set(cases))
    needed = [(case.method, case.runs, case.modes) for case in cases if case.encoder == "a"][:7]
    stock = ["peft", "peft", "peft-compressed", "peft-thin"]
    assert needed[:4] == [(method, 1, ("eager",)) for method in stock]
    assert needed[4:6] == [("compressed", 1, ("eager", "graph")), ("compressed", 20, ("graph",))]
    assert needed[6] == ("compressed", 20, ("compiled",))


def test_deep_lora_is_held_against_lora_of_peft_by_steps_and_memory():
    out = {"a/tf32/1 x peft/eager/steps": np.array([2.0, 4.0]), "a/tf32/1 x peft/eager/memory": 10.0}
    out |= {f"a/tf32/1 x peft-{kind}/eager/steps": np.array([3.0, 4.0]) for kind in ("compressed", "thin")}
    out["a/tf32/1 x peft-thin/eager/memory"] = 11.0
    found = goals.over_lora(out, ["a", "b"], "tf32")
    assert found["a peft-compressed steps over LoRA"].tolist() == [1.5, 1.0]
    assert found["a peft-thin memory over LoRA"] == pytest.approx([1.1])
    assert "a peft-compressed memory over LoRA" not in found and len(found) == 3
    assert goals.over_lora(out | {"a/tf32/1 x peft/eager/memory": 0.0}, ["a"], "tf32").keys() == {
        "a peft-compressed steps over LoRA",
        "a peft-thin steps over LoRA",
    }


def test_an_endless_pass_starts_its_data_again():
    stacked = speed.StackedPass(tiny(), speed.runs_of("thin", 2), speed.random_task(50, 8, LENGTH), 3, BATCH)
    trainer = speed.Trainer(stacked)
    step = speed.Endless(trainer)
    for _ in range(5):
        step()
    assert int(stacked.step) == 2 and torch.isfinite(trainer.losses).all()


def test_operations_are_those_of_the_products():
    tokens, rank = BATCH * LENGTH, speed.RANK
    square, wide = HIDDEN * HIDDEN, HIDDEN * WIDE
    layer = 4 * square + 2 * wide
    # forwards and backwards; nothing is asked of the embedding, so the first layer's q, k and v send nothing back
    frozen = 2 * tokens * (2 * LAYERS * layer - 3 * square)
    attention = 3 * 2 * LAYERS * (2 * tokens * LENGTH * HIDDEN)
    adapters = 2 * 3 * tokens * rank * LAYERS * (8 * HIDDEN + 2 * (HIDDEN + WIDE))
    found = speed.count_step(tiny(), 2 * BATCH, LENGTH) - speed.count_step(tiny(), BATCH, LENGTH)  # chains drop out
    assert found == pytest.approx(frozen + attention + adapters, rel=0.05)
