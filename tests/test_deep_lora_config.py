"""The configuration of Deep LoRA, its rates, the start of peft's LoRA, and how the method comes to peft."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import fields

import peft
import pytest
import torch
from torch import nn

import compressible as cd


def two_layers() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 6))


@pytest.mark.parametrize(("options", "shapes"), [
    ({"variant": "thin"}, [(4, 20), (4, 4), (6, 4)]),
    ({"variant": "thin", "depth": 5}, [(4, 20), (4, 4), (4, 4), (4, 4), (6, 4)]),
    ({"variant": "full"}, [(6, 20), (6, 6), (6, 6)]),
    ({"variant": "compressed"}, [(4, 20), (4, 4), (4, 4), (4, 4), (6, 4)]),
], ids=str)  # fmt: skip
def test_a_chain_has_the_papers_shapes(options, shapes):
    assert cd.DeepLoraConfig(r=4, **options).chain(6, 20) == shapes


@pytest.mark.parametrize(("options", "match"), [
    ({"depth": 2}, r"depth is 2, expected an integer >= 3.*LoraConfig"),
    ({"depth": 3.0}, r"depth is 3\.0"),
    ({"r": 3}, r"r is 3, expected even"),
    ({"r": True}, r"r is True, expected an integer"),
    ({"rank_pattern": {"q": 5}}, r"rank_pattern\['q'\] is 5, expected even"),
    ({"rank_pattern": ["q"]}, r"rank_pattern is \['q'\], expected a dict"),
    ({"rank_pattern": {"(": 4}}, r"rank_pattern is \{'\(': 4\}, expected a dict of r by regular expression"),
    ({"target_modules": ["q"], "layers_to_transform": "0"}, r"layers_to_transform is '0', expected an index"),
    ({"target_modules": ["q"], "layers_to_transform": [-1]}, r"layers_to_transform is \[-1\], expected an index"),
    ({"target_modules": ["q"], "layers_to_transform": [True]}, r"layers_to_transform is \[True\]"),
    ({"variant": "deep"}, r"variant is 'deep', expected one of compressed, thin, full"),
    ({"init_scale": -1.0}, r"init_scale is -1\.0"),
    ({"lr_ratio": -1.0}, r"lr_ratio is -1\.0"),
    ({"lora_dropout": 1.0}, r"lora_dropout is 1\.0"),
    ({"bias": "lora_only"}, r"bias is 'lora_only', expected one of none, all, deep_lora_only"),
    ({"init_weights": "yes"}, r"init_weights is 'yes'"),
    ({"modules_to_save": "head"}, r"modules_to_save is 'head', expected a list"),
    ({"target_modules": 3}, r"target_modules is 3"),
    ({"exclude_modules": {"a": 1}}, r"exclude_modules is"),
    ({"target_parameters": ["w"]}, r"target_parameters is \['w'\].*LoraConfig"),
    ({"layers_to_transform": [0]}, r"layers_to_transform is \[0\], expected None where target_modules is a string"),
    ({"target_modules": ["q"], "layers_pattern": "h"}, r"layers_pattern is 'h', expected None without"),
    ({"task_type": "NONE"}, r"task type"),
], ids=str)  # fmt: skip
def test_what_makes_no_sense_is_refused_with_the_value(options, match):
    with pytest.raises(ValueError, match=match):
        cd.DeepLoraConfig(**options)


def test_fields_that_peft_has_are_named_as_there():
    own = {"depth", "init_scale", "variant", "lr_ratio", "init_weights"}
    ours, theirs = ({field.name for field in fields(kind)} for kind in (cd.DeepLoraConfig, peft.LoraConfig))
    assert ours - theirs == own


@pytest.mark.parametrize("targets", [["q", "v"], ("q", "v"), {"q", "v"}], ids=lambda value: type(value).__name__)
def test_a_config_comes_back_from_its_file(targets, tmp_path):
    config = cd.DeepLoraConfig(r=6, depth=4, variant="thin", target_modules=targets, rank_pattern={"q": 2})
    config.save_pretrained(tmp_path)
    again = peft.PeftConfig.from_pretrained(tmp_path)
    assert type(again) is cd.DeepLoraConfig and again == config
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "DEEP_LORA"


@pytest.mark.parametrize(("variant", "ratio"), [("compressed", 0.01), ("thin", 1.0), ("full", 1.0)])
def test_outer_factors_have_the_papers_rate(variant, ratio):
    model = peft.get_peft_model(two_layers(), cd.DeepLoraConfig(r=4, variant=variant, init_weights=False))
    groups = cd.param_groups(model, lr=1e-2)
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    trained = [p for p in model.parameters() if p.requires_grad]
    assert sorted(rates) == sorted(map(id, trained)) and len(trained) == sum(len(g["params"]) for g in groups)
    for layer in (model.base_model.model[0], model.base_model.model[2]):
        first, *inner, last = layer.deep_lora_factors["default"]
        assert all(rates[id(outer)] == pytest.approx(1e-2 * ratio) for outer in (first, last))
        assert all(rates[id(factor)] == 1e-2 for factor in inner)


def test_each_adapter_has_its_own_ratio_and_all_else_that_trains_the_inner_rate():
    config = cd.DeepLoraConfig(r=2, variant="thin", lr_ratio=0.5, target_modules=["0"], modules_to_save=["2"])
    model = peft.get_peft_model(two_layers(), config)
    model.add_adapter("other", cd.DeepLoraConfig(r=2, variant="thin", lr_ratio=0.1, target_modules=["0"]))
    model.base_model.set_adapter(["default", "other"])
    groups = {(group["name"], round(group["lr"], 6)): len(group["params"]) for group in cd.param_groups(model, 1e-2)}
    assert groups == {("inner", 0.01): 2, ("outer", 0.005): 2, ("outer", 0.001): 2, ("other", 0.01): 2}


def test_rates_need_something_to_train():
    for model in (two_layers(), peft.get_peft_model(two_layers(), peft.LoraConfig(target_modules=["0"]))):
        with pytest.raises(ValueError, match="one that trains Deep LoRA"):
            cd.param_groups(model, 1e-2)
    for rate in (0, -1.0, True, "1e-2", None, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"lr is {rate!r}, expected a finite number > 0"):
            cd.param_groups(two_layers(), rate)
    with pytest.raises(ValueError, match="the model is 'NoneType', expected one of peft"):
        cd.param_groups(None, 1e-2)


def test_an_optimiser_is_made_by_what_can_be_called():
    model = peft.get_peft_model(two_layers(), cd.DeepLoraConfig(r=2, variant="thin"))
    with pytest.raises(ValueError, match="optimizer_cls is 'adamw', expected one of torch"):
        cd.create_deep_lora_optimizer(model, "adamw", lr=1e-2)
    with pytest.raises(ValueError, match="generator is 3, expected a torch"):
        cd.paper_lora_start(model, 3)


def test_the_papers_lora_start_is_normal_outputs_and_zero_inputs():
    base = nn.Sequential(nn.Embedding(40, 64), nn.Linear(64, 300))
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, lora_alpha=4, target_modules=["0", "1"]))
    cd.paper_lora_start(model, torch.Generator().manual_seed(0))
    words, linear = model.base_model.model
    assert not words.lora_embedding_A["default"].any() and not linear.lora_A["default"].weight.any()
    torch.manual_seed(0)
    for b in (words.lora_embedding_B["default"], linear.lora_B["default"].weight):
        torch.testing.assert_close(b.detach(), torch.randn(b.shape))
    with pytest.raises(ValueError, match="adapter_name is 'none'"):
        cd.paper_lora_start(model, adapter_name="none")
    for options, match in (
        ({"lora_alpha": 8}, r"scaling is 2\.0"),
        ({"lora_alpha": 4, "use_dora": True}, "plain LoRA"),
    ):
        other = peft.get_peft_model(two_layers(), peft.LoraConfig(r=4, target_modules=["0"], **options))
        with pytest.raises(ValueError, match=match):
            cd.paper_lora_start(other)


# Interpreters that hold what peft imports, which takes seconds, and neither peft nor this library.
FORKED = """
import os, sys
import accelerate, torch, transformers
from transformers import PreTrainedModel
assert not {"peft", "compressible"} & set(sys.modules)
failed = []
for order in sys.argv[1:]:
    if not (child := os.fork()):
        try:
            exec(order)
            os._exit("DEEP_LORA" not in sys.modules["peft"].mapping.PEFT_TYPE_TO_TUNER_MAPPING)
        finally:
            os._exit(2)
    failed += [order] if os.waitpid(child, 0)[1] else []
sys.exit(", ".join(failed) or 0)
"""


def test_the_method_is_registered_in_either_order():
    orders = [
        "import compressible; import peft", "import peft; import compressible",
        "import compressible.adapters.config; import peft", "from compressible import DeepLoraConfig; import peft",
        "import compressible.adapters.model; import peft",
    ]  # fmt: skip
    done = subprocess.run([sys.executable, "-c", FORKED, *orders], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_package_alone_imports_neither_torch_nor_peft():
    code = "import compressible, sys; sys.exit(bool({'torch', 'peft'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
