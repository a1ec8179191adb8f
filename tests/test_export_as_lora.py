"""save_as_lora: what a Deep LoRA adapter writes is read by stock peft as LoRA and is the same function."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from adapter_helpers import LLAMA, SHAPES, TARGETS, adapt, base, batch, close, differ, logits, train
from torch import nn

import compressible as cd

pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

# Run by a Python that never sees this library: it loads what was written and stores the logits.
STOCK = """
import sys, torch, peft, transformers
from safetensors.torch import load_file, save_file
transformers.logging.set_verbosity_error()
library, *lines = sys.argv[1:]
for line in lines:
    kind, folder = line.split("=", 1)
    model = getattr(transformers, kind).from_pretrained(folder + "/base").eval()
    model = peft.PeftModel.from_pretrained(model, folder + "/lora").eval()
    with torch.no_grad():
        found = model(**load_file(folder + "/batch.safetensors")).logits
    save_file({"logits": found.contiguous()}, folder + "/logits.safetensors")
assert "compressible" not in sys.modules
sys.path.insert(0, library)
import compressible  # after peft, and nothing more, for the method's own file
model = getattr(transformers, kind).from_pretrained(folder + "/base").eval()
model = peft.PeftModel.from_pretrained(model, folder + "/own").eval()
with torch.no_grad():
    own = model(**load_file(folder + "/batch.safetensors")).logits
torch.testing.assert_close(own, found, rtol=1e-5, atol=1e-5)
"""


def trained(kind: str, variant: str = "thin", **options) -> nn.Module:
    options.setdefault("target_modules", TARGETS[kind])
    return train(adapt(base(kind), batch(kind), variant=variant, **options), batch(kind))


def stock(kind: str, folder: Path) -> nn.Module:
    return peft.PeftModel.from_pretrained(base(kind), folder).eval()


@pytest.mark.parametrize("variant", ["compressed", "thin"])
@pytest.mark.parametrize("kind", SHAPES)
def test_adapted_exported_and_merged_are_one_function(kind, variant, tmp_path):
    model, given = trained(kind, variant), batch(kind)
    expected = logits(model, given)
    differ(expected, logits(base(kind), given))
    cd.save_as_lora(model, tmp_path)
    theirs = stock(kind, tmp_path)
    assert theirs.peft_config["default"].peft_type == "LORA"
    close(logits(theirs, given), expected)
    close(logits(theirs.merge_and_unload(safe_merge=True), given), expected)
    close(logits(model.merge_and_unload(safe_merge=True), given), expected)


def test_peft_alone_reads_what_was_exported(tmp_path):
    from safetensors.torch import load_file, save_file

    expected, arguments = {}, [str(Path(cd.__file__).parent.parent)]
    for kind in ("llama", "gpt2", "t5"):
        folder, given = tmp_path / kind, batch(kind)
        model = base(kind)
        model.save_pretrained(folder / "base")
        model = train(adapt(model, given, variant="compressed", target_modules=TARGETS[kind]), given)
        model.save_pretrained(folder / "own")
        cd.save_as_lora(model, folder / "lora")
        save_file({key: value.clone() for key, value in given.items()}, folder / "batch.safetensors")
        expected[kind] = logits(model, given)
        arguments.append(f"{type(model.get_base_model()).__name__}={folder}")
    hidden = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    subprocess.run([sys.executable, "-c", STOCK, *arguments], check=True, env=hidden | {"HF_HUB_OFFLINE": "1"})
    for kind, value in expected.items():
        close(load_file(tmp_path / kind / "logits.safetensors")["logits"], value)


@pytest.mark.parametrize("variant", ["compressed", "thin"])
def test_the_exported_rank_is_the_inner_width(variant, tmp_path):
    """No SVD that cuts, and no rank that is not needed."""
    model = trained("llama", variant)
    cd.save_as_lora(model, tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    width = layer.deep_lora_factors["default"][0].shape[0]
    assert written["r"] == width and not written.get("use_dora")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["t5", "gpt2"])
def test_embeddings_are_exported(kind, tied, tmp_path):
    name = {"t5": "embed_tokens", "gpt2": "wte"}[kind]
    given, targets = batch(kind), [name, *TARGETS[kind]]

    def make() -> nn.Module:
        return base(kind, tie_word_embeddings=tied)

    model = train(adapt(make(), given, target_modules=targets), given)
    expected = logits(model, given)
    cd.save_as_lora(model, tmp_path)
    close(logits(peft.PeftModel.from_pretrained(make(), tmp_path).eval(), given), expected)


@pytest.mark.parametrize(("kind", "head"), [("mpnet", "classifier"), ("vit", "classifier"), ("bert", "classifier")])
def test_a_trained_head_goes_along(kind, head, tmp_path):
    options = {"task_type": "SEQ_CLS"} if kind != "vit" else {"modules_to_save": [head]}
    model = trained(kind, "compressed", **options)
    cd.save_as_lora(model, tmp_path)
    theirs = stock(kind, tmp_path)
    close(logits(theirs, batch(kind)), logits(model, batch(kind)))
    found = {name: value for name, value in theirs.named_parameters() if f"{head}.modules_to_save" in name}
    assert found
    for name, value in found.items():
        differ(value, dict(base(kind).named_parameters())[_plain(name)], 1e-6)


def _plain(name: str) -> str:
    return name.removeprefix("base_model.model.").replace(".modules_to_save.default", "")


@pytest.mark.parametrize("options", [
    {"layers_to_transform": [1]}, {"exclude_modules": ["o_proj"]}, {"target_modules": r".*\.0\..*(q|up)_proj"},
    {"rank_pattern": {"q_proj": 2}}, {"lora_dropout": 0.2}, {"target_modules": ["model.layers.0.self_attn.q_proj"]},
    {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}, {"bias": "all"}, {"depth": 5},
], ids=str)  # fmt: skip
def test_choices_of_the_config_survive(options, tmp_path):
    model, given = trained("llama", "thin", **options), batch("llama")
    cd.save_as_lora(model, tmp_path)
    theirs = stock("llama", tmp_path)
    close(logits(theirs, given), logits(model, given))
    mine = {name for name, part in model.named_modules() if hasattr(part, "deep_lora_factors")}
    assert mine == {name for name, part in theirs.named_modules() if hasattr(part, "lora_A") and len(part.lora_A)}


def test_an_adapter_is_exported_by_its_name_and_the_model_stays(tmp_path):
    given = batch("llama")
    model = adapt(base("llama"), given, name="first", target_modules=["q_proj"])
    model.add_adapter("second", model.peft_config["first"].__class__(
        r=2, init_scale=0.5, variant="thin", target_modules=["v_proj"]))  # fmt: skip
    model.eval().set_adapter("second")
    expected = logits(model, given)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model.set_adapter("first")
    cd.save_as_lora(model, tmp_path, adapter_name="second")
    assert model.active_adapters == ["first"]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    close(logits(stock("llama", tmp_path), given), expected)


def test_a_base_in_bfloat16_exports_factors_in_float32(tmp_path):
    given = batch("llama")
    model = train(adapt(base("llama").to(torch.bfloat16), given, variant="compressed"), given)
    cd.save_as_lora(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(base("llama").to(torch.bfloat16), tmp_path).eval()
    factors = [value for name, value in theirs.named_parameters() if "lora_" in name]
    assert factors and all(value.dtype == torch.float32 for value in factors)
    close(logits(theirs, given), logits(model, given), 0.02)


def test_exported_adapters_are_combined_by_peft(tmp_path):
    """add_weighted_adapter is LoRA's: adapters get there by way of save_as_lora."""
    given, names = batch("llama"), ("one", "two")
    model = base("llama")
    for seed, name in enumerate(names):
        mine = train(adapt(base("llama"), batch("llama", seed=seed)), batch("llama", seed=seed))
        cd.save_as_lora(mine, tmp_path / name)
        if seed == 0:
            model = peft.PeftModel.from_pretrained(model, tmp_path / name, adapter_name=name).eval()
        else:
            model.load_adapter(tmp_path / name, adapter_name=name)
    model.add_weighted_adapter(list(names), [0.5, 0.25], "both", combination_type="cat")
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    one, two, both = (layer.get_delta_weight(name) for name in (*names, "both"))
    close(both, 0.5 * one + 0.25 * two, 1e-6)
    model.set_adapter("both")
    assert logits(model, given).isfinite().all()


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_peft_converts_to_the_same_lora(kind):
    model, given = trained(kind, "compressed"), batch(kind)
    assert model.supports_lora_conversion()
    settings, tensors = peft.convert_to_lora(model, rank=model.peft_config["default"].r)
    theirs = peft.get_peft_model(base(kind), settings)
    peft.set_peft_model_state_dict(theirs, tensors)
    close(logits(theirs.eval(), given), logits(model, given), 1e-4)


def test_an_export_without_factors_is_refused_before_it_writes(tmp_path):
    model = peft.get_peft_model(base("llama"), cd.DeepLoraConfig(r=4, variant="compressed"))
    with pytest.raises(RuntimeError, match="compress_adapters"):
        cd.save_as_lora(model, tmp_path / "out")
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())


def test_an_unknown_adapter_is_refused_by_its_name(tmp_path):
    with pytest.raises(ValueError, match="unknown"):
        cd.save_as_lora(trained("llama"), tmp_path, adapter_name="unknown")


FEW = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
DENSE_FIRST = FEW | {"n_routed_experts": 4, "first_k_dense_replace": 1}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
MIXTURES: dict[str, dict] = {
    "Qwen3Moe": FEW | {"head_dim": 8, "num_experts": 4, "mlp_only_layers": [0]},
    "Qwen2Moe": FEW | {"num_experts": 4, "mlp_only_layers": [0], "shared_expert_intermediate_size": 16},
    "DeepseekV3": DENSE_FIRST | LATENT | {"n_group": 2, "topk_group": 1},
    "DeepseekV2": DENSE_FIRST | LATENT,
    "Glm4Moe": DENSE_FIRST | {"head_dim": 8, "n_group": 1, "topk_group": 1},
    "Ernie4_5_Moe": {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 16, "moe_layer_start_index": 1,
                     "moe_num_shared_experts": 1},
    "HunYuanMoEV1": {"num_experts": 4, "moe_topk": 2, "head_dim": 8},
    "Mixtral": {"num_local_experts": 4},
}  # fmt: skip


@pytest.mark.parametrize("targets", ["all-linear", ["gate_proj", "up_proj", "down_proj"], "full names"], ids=str)
@pytest.mark.parametrize("kind", MIXTURES)
def test_mixtures_of_experts_with_dense_layers_are_exported_or_refused(kind, targets, tmp_path):
    """peft turns names of dense feed-forward layers into the experts' parameters: updates must not get lost in it."""
    transformers = pytest.importorskip("transformers")

    def make() -> nn.Module:
        torch.manual_seed(0)
        settings = getattr(transformers, f"{kind}Config")(**(LLAMA | MIXTURES[kind]))
        return getattr(transformers, f"{kind}ForCausalLM")(settings).eval()

    given, model = batch("llama"), make()
    if targets == "full names":
        targets = [name for name, part in model.named_modules() if isinstance(part, nn.Linear) and "proj" in name]
    before = logits(model, given)
    try:
        model = adapt(model, given, target_modules=targets)
    except (ValueError, NotImplementedError) as refused:
        assert "target" in str(refused)
        close(logits(make(), given), before)
        return
    expected = logits(train(model, given), given)
    differ(expected, before)
    try:
        cd.save_as_lora(model, tmp_path)
    except (ValueError, NotImplementedError, RuntimeError) as refused:
        assert "expert" in str(refused) or "peft" in str(refused)
        return
    close(logits(peft.PeftModel.from_pretrained(make(), tmp_path).eval(), given), expected)
