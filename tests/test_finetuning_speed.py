"""What is timed for fine-tuning: the cases, what they leave out and why, and the operations that make the floor."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from compressible.experiments.speed import decoders, goals, over_devices, shapes
from compressible.experiments.speed import finetuning as speed
from compressible.experiments.speed.shapes import random_task

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
    assert needed[6] == ("peft", 1, ("compiled",))
    assert ("compressed", 20, ("compiled",)) in {(case.method, case.runs, case.modes) for case in cases}


def test_peft_is_timed_as_torch_compiles_it_too_and_goals_keep_the_two_apart(monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "compile", lambda model, mode: asked.append(mode) or model)
    both = speed.Case("tiny", "float32", "peft", modes=("eager", "compiled"))
    out = survey(monkeypatch, [both])
    assert asked == ["reduce-overhead"]
    for mode in both.modes:
        steps = out[f"{both.name}/{mode}/steps"]
        assert speed.fastest_peft(out, "tiny", ["float32"], mode) == pytest.approx(1 / steps)
    assert np.isnan(speed.fastest_peft(out, "tiny", ["tf32"], "compiled")).all()


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
    stacked = speed.StackedPass(tiny(), speed.runs_of("thin", 2), random_task(50, 8, LENGTH), 3, BATCH)
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


# decoders, several devices


def test_decoders_have_the_published_shapes():
    for name, words, parameters in (("qwen2.5-0.5b", 151_936, 494_032_768), ("gemma-3-270m", 262_144, 268_098_176)):
        kind, sizes = shapes.DECODERS[name]
        with torch.device("meta"):
            model = shapes._decoder(kind, sizes, 0)
        assert sum(p.numel() for p in model.parameters()) == parameters and model.config.vocab_size == words
        assert shapes.writes(model) and not shapes.writes(tiny())


def test_decoders_are_timed_beside_peft_in_tokens():
    names = ["tiny-decoder"]
    out = decoders.survey(names, [1, 2], ["float32"], (2, 8), "cpu", 0.01, 3, 60.0)
    assert {key.rsplit("/", 1)[0] for key in out if key.endswith("/steps")} == {
        f"tiny-decoder/float32/{case}/eager" for case in ("1 x peft", "1 x lora", "2 x lora")
    }
    found = decoders.decoder_goals(out, names, [1, 2], ["float32"])
    assert set(found) == {"tiny-decoder 1 over peft", "tiny-decoder 2 over peft"}  # no bytes are counted on a CPU
    ours, stock = out["tiny-decoder/float32/2 x lora/eager/steps"], out["tiny-decoder/float32/1 x peft/eager/steps"]
    assert found["tiny-decoder 2 over peft"] == pytest.approx(2 / ours * stock.mean(), rel=2)
    late = decoders.survey(names, [1], ["float32"], (2, 8), "cpu", 0.01, 3, 0.0)
    assert all(key.endswith(("/skipped", "/gemm")) for key in late)


def test_memory_of_decoders_is_without_the_model_that_was_halved():
    steps = {f"d/bfloat16/{case}/steps": np.ones(2) for case in ("1 x peft/eager", "4 x lora/graph")}
    out = steps | {"d/bytes": 4, "d/bfloat16/1 x peft/eager/memory": 9, "d/bfloat16/4 x lora/graph/memory": 14}
    found = decoders.decoder_goals(out, ["d"], [4], ["bfloat16"])
    assert found["d 4 memory over peft"] == pytest.approx([10 / (4 * 5)])
    assert found["d 4 over peft"] == pytest.approx([4, 4])


def test_devices_that_are_not_there_say_so(monkeypatch):
    monkeypatch.setattr(over_devices, "load_shape", tiny)
    out = over_devices.over_devices("tiny", [1], 2, 3, (BATCH, LENGTH), "float32", "cpu", 60.0)
    assert out["1 devices/rate"] > 0
    late = over_devices.over_devices("tiny", [1], 2, 3, (BATCH, LENGTH), "float32", "cpu", -1.0)
    assert late == {"1 devices/skipped": "not begun after -1 s"}
    monkeypatch.setattr(over_devices, "resolve_device", lambda _: "cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    few = over_devices.over_devices("tiny", [2, 8], 2, 3, (BATCH, LENGTH), "float32", "auto", 60.0)
    assert few == {"2 devices/skipped": "this host has 1", "8 devices/skipped": "this host has 1"}
    rates = {"1 devices/rate": 2.0, "4 devices/rate": 7.0, "8 devices/skipped": "this host has 4"}
    assert over_devices.device_goals(rates, [1, 4, 8]) == {"4 devices over one": np.array([3.5])}
