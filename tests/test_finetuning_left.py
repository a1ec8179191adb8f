"""The model that a run leaves: it scores as the run did, is saved as peft's own, and is loaded by peft."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")  # a GPU host may have PyTorch, Triton and pytest alone
pytest.importorskip("peft")
import peft
import test_finetune
import transformers
from test_causal import SHAPE, lora, mean_loss, qwen, task
from test_finetuning_prompts import PROMPTS

import compressible as cd

TARGETS = ["q_proj", "v_proj", "o_proj", "down_proj"]
MOVING = {"init_lora_weights": "eva", "r": 2, "target_modules": TARGETS}
TOKENS = {"trainable_token_indices": [4, 7], "target_modules": TARGETS}
TWICE = {"layer_replication": [(0, 2), (1, 2)], "target_modules": TARGETS}
CONFIGS = PROMPTS | {
    "cartridge": peft.CartridgeConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "eva": lora(**MOVING, eva_config=peft.EvaConfig()),
    "eva, unscaled": lora(**MOVING, eva_config=peft.EvaConfig(adjust_scaling_factors=False)),
    "tokens": lora(**TOKENS),
    "twice": lora(**TWICE),
    "twice and taken off": lora(**TWICE, init_lora_weights="pissa"),
    "twice with words": lora(**TWICE, trainable_token_indices=[4]),
    "dora": lora(use_dora=True),
    "lora": lora(),
    "pissa": lora(init_lora_weights="pissa"),
    "deep lora": cd.DeepLoraConfig(r=4, task_type="CAUSAL_LM"),
}


def base(kind: str) -> nn.Module:
    """Qwen2, whose config counts its layers, cannot have them repeated by peft; PiSSA asks for float32."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SHAPE, pad_token_id=0)
    model = transformers.LlamaForCausalLM(config).double().eval() if kind.startswith("twice") else qwen()
    return model.float() if CONFIGS[kind].to_dict().get("init_lora_weights") == "pissa" else model


def trained(config: peft.PeftConfig, model: nn.Module) -> cd.RunHistory:
    [history] = cd.fine_tune(
        model, [cd.FineTuningRun(config, 3e-2, 1)], task(), 3, 8, evaluate_at=(3,), show_progress=False
    )
    return history


@pytest.mark.filterwarnings("ignore:.*cannot be stacked", "ignore:lora with eva", "ignore:Unsupported layer type")
@pytest.mark.parametrize("kind", CONFIGS)
def test_the_model_that_a_run_leaves_scores_as_the_run_and_is_loaded_by_peft(kind, tmp_path):
    model, data = base(kind), task().validation
    before = {name: value.clone() for name, value in model.state_dict().items()}
    history = trained(CONFIGS[kind], model)
    adapted = history.model().eval()
    with torch.no_grad():
        own = mean_loss(adapted, data.tokens, data.labels).item()
        adapted.save_pretrained(tmp_path)
        loaded = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path).eval()
        again = mean_loss(loaded, data.tokens, data.labels).item()
    assert own == pytest.approx(history.scores[3], rel=1e-6)
    assert again == pytest.approx(own, rel=1e-5)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.filterwarnings("ignore:.*cannot be stacked")
@pytest.mark.parametrize("kind", ["lora", "pissa", "dora", "deep lora", "prefix", "tokens"])
def test_the_config_that_is_saved_is_what_peft_makes_of_it(kind):
    config = CONFIGS[kind]
    expected = peft.get_peft_model(base(kind), copy.deepcopy(config)).peft_config["default"].to_dict()
    assert trained(config, base(kind)).model().peft_config["default"].to_dict() == expected


@pytest.mark.filterwarnings("ignore:.*cannot be stacked")
@pytest.mark.parametrize("given", [{}, {"use_dora": True}])
def test_heads_are_named_in_the_config_that_is_saved(given):
    config = peft.LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS", **given)
    run = cd.FineTuningRun(config, 1e-2)
    [history] = cd.fine_tune(test_finetune.bert(), [run], test_finetune.task(), 2, 4, show_progress=False)
    saved = history.model().peft_config["default"]
    assert saved.modules_to_save == ["classifier", "score"] and saved.target_modules == {"query"}
    assert config.modules_to_save is None
