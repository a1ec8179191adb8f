"""What a survey of speed says on its goals, from surveys that are written down here."""

from __future__ import annotations

import numpy as np
import pytest

from compressible.experiments.speed import goals

SIDES = (100, 1000, 5000)
STEPS = {"small": "d=100 compressed float64", "large": "d=1000 compressed float64", "wide": "d=1000 full width float64"}


@pytest.fixture
def card(monkeypatch):
    monkeypatch.setattr(goals.devices, "device_name", lambda device: "NVIDIA H200" if device == "cuda" else "a CPU")


def survey() -> dict:
    out = {f"{name}/auto/steps": np.array([1e-3, 2e-3]) for name in STEPS.values()}
    out |= {f"{STEPS['small']}/jax/steps": np.array([3e-3, 2e-3]), f"{STEPS['small']}/recording": np.array([0.1])}
    out |= {f"{s} x d=100 compressed float64/auto/steps": np.array([t]) for s, t in ((8, 1e-9), (256, 1e-2), (512, 1))}
    return out | {f"{STEPS['wide']}/operations": 10, "float64/gemm of d": 1e4}


def test_goals_of_descent_are_rates_and_ratios_by_trial(card):
    found = goals.descent_goals(survey(), "cuda", ["float64"], *SIDES, [8, 256, 512, 1024])
    assert {key for key in found if "sparse" in key} == set()  # was not measured
    np.testing.assert_allclose(found["small rate"], [1000, 500])
    np.testing.assert_allclose(found["small over jax"], [3, 1])
    np.testing.assert_allclose(found["share of gemm"], [1, 0.5])
    np.testing.assert_allclose(found["stack rate"], [25_600])  # of those from 128 problems the fastest
    assert found["recording"] == [0.1] and "large over jax" not in found


@pytest.mark.parametrize(("device", "precision"), [("cpu", "float64"), ("cuda", "float32")])
def test_other_devices_and_precisions_have_no_goals(card, device, precision):
    assert goals.descent_goals(survey(), device, [precision], *SIDES, [256]) == {}
    assert goals.finetuning_goals({}, device, ["minilm"], ["float32"]) == {}


def test_goals_of_finetuning_are_over_pefts_fastest_precision(card):
    out = {"m/bfloat16/1 x peft/eager/steps": np.array([0.1]), "m/float32/1 x peft/eager/steps": np.array([0.05])}
    out |= {"m/bfloat16/20 x compressed/graph/steps": np.array([0.1, 0.2])}
    found = goals.finetuning_goals(out, "cuda", ["m", "n"], ["bfloat16", "float32"])
    assert set(found) == {"m many rate", "m many over peft"}
    np.testing.assert_allclose(found["m many rate"], [200, 100])
    np.testing.assert_allclose(found["m many over peft"], [10, 5])
    compiled = out | {"m/bfloat16/1 x peft/compiled/steps": np.array([0.01])}
    found = goals.finetuning_goals(compiled, "cuda", ["m"], ["bfloat16", "float32"])
    np.testing.assert_allclose(found["m many over peft"], [10, 5])
    np.testing.assert_allclose(found["m many over compiled peft"], [2, 1])
    alone = goals.finetuning_goals({"m/bfloat16/1 x compressed/graph/steps": np.ones(1)}, "cuda", ["m"], ["bfloat16"])
    assert set(alone) == {"m one rate"}  # nothing to compare with
