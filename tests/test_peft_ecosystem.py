"""What users of peft do with any adapter: names, mixed batches, merging, half precision, checkpointing, compiling."""

import copy
import json
import os
import shutil
import warnings

import pytest
import torch
from adapter_helpers import (
    TARGETS,
    VARIANTS,
    adapt,
    base,
    batch,
    close,
    compress,
    config,
    differ,
    logits,
    train,
    trainable,
)
from torch import nn

import compressible as cd

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

PLAINEST = os.environ.get("ATEN_CPU_CAPABILITY") == "default"


def trained(kind: str = "llama", variant: str = "thin", **options) -> nn.Module:
    return train(adapt(base(kind), batch(kind), variant=variant, **options), batch(kind))


def loaded(folder, kind: str = "llama", **options) -> nn.Module:
    return peft.PeftModel.from_pretrained(base(kind), folder, **options).eval()


# files


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5", "vit"])
def test_what_is_saved_is_loaded(kind, variant, tmp_path):
    model, given = trained(kind, variant, target_modules=TARGETS[kind]), batch(kind)
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    again = loaded(tmp_path, kind)
    close(logits(again, given), logits(model, given), 1e-6)
    differ(logits(again, given), logits(base(kind), given))
    assert not trainable(again)
    more = loaded(tmp_path, kind, is_trainable=True)
    differ(logits(train(more, given, 1), given), logits(again, given), 1e-5)


@pytest.mark.parametrize("low", [True, False])
def test_a_saved_adapter_needs_no_compression(low, tmp_path):
    model, given = trained("llama", "compressed"), batch("llama")
    model.save_pretrained(tmp_path)
    again = loaded(tmp_path, low_cpu_mem_usage=low)
    close(logits(again, given), logits(model, given), 1e-6)
    assert not any(value.is_meta for value in again.parameters())


def test_the_config_file_is_plain_and_comes_back(tmp_path):
    model = trained(
        "llama", "compressed", r=6, depth=4, lr_ratio=0.05, target_modules=["q_proj"], task_type="CAUSAL_LM"
    )
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (written["peft_type"], written["r"], written["depth"], written["variant"]) == (
        "DEEP_LORA",
        6,
        4,
        "compressed",
    )
    again = peft.PeftConfig.from_pretrained(tmp_path)
    assert type(again) is cd.DeepLoraConfig and again.lr_ratio == 0.05 and again.target_modules == {"q_proj"}


def test_a_model_is_found_by_its_adapter_alone(tmp_path):
    """peft fills in base_model_name_or_path, which AutoPeftModel and pipelines ask for."""
    base("llama").save_pretrained(tmp_path / "base")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = train(adapt(model, batch("llama"), task_type="CAUSAL_LM", variant="compressed"), batch("llama"))
    model.save_pretrained(tmp_path / "adapter")
    again = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    close(logits(again, batch("llama")), logits(model, batch("llama")))
    cd.save_as_lora(model, tmp_path / "lora")
    again = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "lora").eval()
    close(logits(again, batch("llama")), logits(model, batch("llama")))


def test_a_file_of_another_shape_is_refused(tmp_path):
    trained().save_pretrained(tmp_path)
    wide = base("llama", hidden_size=32)
    with pytest.raises((RuntimeError, ValueError), match=r"size|shape"):
        peft.PeftModel.from_pretrained(wide, tmp_path)


# transformers' own way to peft


@pytest.mark.parametrize("variant", ["compressed", "thin"])
def test_transformers_adds_saves_loads_and_deletes_the_adapter(variant, tmp_path):
    given, model = batch("llama"), base("llama")
    before = logits(model, given)
    model.add_adapter(config(variant=variant), "mine")
    if variant == "compressed":
        compress(model, lambda: model(**given).loss, "mine")
    expected = logits(train(model, given), given)
    differ(expected, before)
    model.disable_adapters()
    close(logits(model, given), before, 0)
    model.enable_adapters()
    model.save_pretrained(tmp_path)
    again = base("llama")
    again.load_adapter(tmp_path, adapter_name="mine")
    close(logits(again.eval(), given), expected, 1e-6)
    again.delete_adapter("mine")
    close(logits(again, given), before, 1e-6)


# several adapters


def two(kind: str = "llama", **second) -> nn.Module:
    model = adapt(base(kind), batch(kind), name="one", target_modules=TARGETS[kind])
    model.add_adapter("two", config(**({"r": 2, "init_scale": 0.5, "target_modules": TARGETS[kind]} | second)))
    return model.eval()


def test_adapters_have_names_and_are_switched():
    model, given = two(variant="compressed", r=4), batch("llama")
    with pytest.raises(RuntimeError, match="compress_adapters"):
        model.set_adapter("two")
        model(**given)
    compress(model, lambda: model(**given).loss, "two")
    found = {name: (model.set_adapter(name), logits(model, given))[1] for name in ("one", "two")}
    differ(found["one"], found["two"])
    assert {name.split(".")[-2] for name in trainable(model)} == {"two"}
    with model.disable_adapter():
        close(logits(model, given), logits(base("llama"), given), 0)
    model.delete_adapter("one")
    assert list(model.peft_config) == ["two"] and not any(".one." in name for name in model.state_dict())
    close(logits(model, given), found["two"], 0)
    close(logits(model.unload(), given), logits(base("llama"), given), 0)


def test_two_active_adapters_add_up():
    model, given = two(), batch("llama")
    model.base_model.set_adapter(["one", "two"])
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        deltas = sum(layer.get_delta_weight(name) for name in ("one", "two"))
        close(layer(x), layer.get_base_layer()(x) + x @ deltas.mT)
        expected = logits(model, given)
    close(logits(model.merge_and_unload(adapter_names=["one", "two"]), given), expected)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_a_batch_of_several_adapters_is_each_alone(kind):
    model, given = two(kind), batch(kind, rows=4)
    names = ["two", "__base__", "one", "two"]
    mixed = logits(model, given, adapter_names=names)
    alone = {"__base__": logits(base(kind), given)}
    for name in ("one", "two"):
        model.set_adapter(name)
        alone[name] = logits(model, given)
    for row, name in enumerate(names):
        close(mixed[row], alone[name][row])
    differ(alone["one"], alone["two"])
    differ(alone["one"], alone["__base__"])


def test_a_batch_of_several_adapters_with_embeddings():
    model, given = two("gpt2"), batch("gpt2")
    model.add_adapter("words", config(target_modules=["wte"]))
    mixed = logits(model.eval(), given, adapter_names=["words", "one", "__base__"])
    model.set_adapter("words")
    close(mixed[0], logits(model, given)[0])
    close(mixed[2], logits(base("gpt2"), given)[2])


@pytest.mark.parametrize(("names", "match"), [
    (["one"], "length|number"), (["one", "three", "two"], "three"),
])  # fmt: skip
def test_a_batch_of_wrong_names_is_refused(names, match):
    with pytest.raises(ValueError, match=match):
        two()(**batch("llama"), adapter_names=names)


def test_a_batch_of_several_adapters_is_for_inference():
    with pytest.raises(ValueError, match="train"):
        two().train()(**batch("llama"), adapter_names=["one", "two", "one"])


def test_generation_takes_mixed_batches():
    model, ids = two(), batch("llama")["input_ids"]
    options = {"max_new_tokens": 3, "do_sample": False}
    mixed = model.generate(input_ids=ids, adapter_names=["one", "two", "__base__"], **options)
    model.set_adapter("two")
    assert torch.equal(mixed[1], model.generate(input_ids=ids, **options)[1])


# merging


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_merged_is_adapted_and_unmerged_is_the_base(kind, variant):
    model, given = trained(kind, variant, target_modules=TARGETS[kind]), batch(kind)
    expected, weights = logits(model, given), copy.deepcopy(base(kind).state_dict())
    model.merge_adapter(safe_merge=True)
    close(logits(model, given), expected)
    differ(logits(model, given), logits(base(kind), given))
    model.unmerge_adapter()
    close(logits(model, given), expected)
    plain = model.unload()
    for name, value in plain.state_dict().items():
        close(value, weights[name], 1e-5)


def test_merging_what_is_not_finite_changes_nothing():
    model = trained()
    layer = model.base_model.model.model.layers[1].mlp.up_proj
    with torch.no_grad():
        layer.deep_lora_factors["default"][0][0, 0] = torch.nan
    before = layer.get_base_layer().weight.clone()
    with pytest.raises(ValueError, match=r"NaN|nan|finite"):
        model.merge_and_unload(safe_merge=True)
    assert torch.equal(layer.get_base_layer().weight, before)


def test_merging_before_compression_changes_nothing():
    model, given = peft.get_peft_model(base("llama"), config(variant="compressed")), batch("llama")
    with pytest.raises(RuntimeError, match="compress_adapters"):
        model.merge_adapter()
    with model.disable_adapter():
        close(logits(model, given), logits(base("llama"), given), 0)
    close(logits(model.unload(), given), logits(base("llama"), given), 0)


def test_tied_embeddings_merge_without_changing_the_output_layer_or_are_refused():
    given = batch("gpt2")
    model = trained("gpt2", target_modules=["wte", "c_attn"])
    expected = logits(model, given)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            merged = model.merge_and_unload(safe_merge=True)
    except (ValueError, RuntimeError) as refused:
        assert "wte" in str(refused)
        close(logits(model, given), expected, 0)
    else:
        close(logits(merged, given), expected)


# precision


@pytest.mark.parametrize("variant", ["compressed", "thin"])
def test_a_base_in_bfloat16_has_factors_in_float32(variant, tmp_path):
    given = batch("llama")
    model = adapt(base("llama").to(torch.bfloat16), given, variant=variant)
    assert {value.dtype for value in trainable(model).values()} == {torch.float32}
    before = logits(model, given)
    assert before.dtype == torch.bfloat16
    train(model, given)
    expected = logits(model, given)
    differ(expected, before)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(base("llama").to(torch.bfloat16), tmp_path).eval()
    close(logits(again, given), expected, 1e-3)
    assert {value.dtype for value in model.state_dict().values()} >= {torch.float32, torch.bfloat16}
    close(logits(model.merge_and_unload(safe_merge=True), given).float(), expected.float(), 0.05)


def test_autocast_to_bfloat16_trains():
    given = batch("llama")
    model = adapt(base("llama"), given, variant="compressed")
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**given).loss
    loss.backward()
    gradients = [value.grad for value in model.parameters() if value.requires_grad]
    assert all(grad.dtype == torch.float32 and grad.isfinite().all() for grad in gradients)
    assert all(grad.abs().max() > 0 for grad in gradients)


def test_factors_can_be_left_in_the_type_of_the_base():
    model = peft.get_peft_model(base("llama").to(torch.bfloat16), config(), autocast_adapter_dtype=False)
    given = batch("llama")
    loss = model(**given).loss
    loss.backward()
    assert loss.isfinite() and len({value.dtype for value in trainable(model).values()}) == 1


# gradient checkpointing


def gradients(model: nn.Module, given: dict) -> dict[str, torch.Tensor]:
    model.train().zero_grad()
    model(**given).loss.backward()
    return {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}


def started(variant: str, checkpointing: dict | None) -> tuple[dict, dict]:
    """The factors at the start and their gradients."""
    given, model = batch("llama"), peft.get_peft_model(base("llama"), config(variant=variant)).train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=checkpointing)
        model.enable_input_require_grads()
    if variant == "compressed":
        compress(model, lambda: model(**given).loss)
    return trainable(model), gradients(model, given)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("variant", ["compressed", "thin"])
def test_gradient_checkpointing_gives_the_same_start_and_gradients(variant, reentrant):
    found = started(variant, {"use_reentrant": reentrant})
    for checkpointed, plain in zip(found, started(variant, None), strict=True):
        assert plain.keys() == checkpointed.keys() and plain
        for name, value in plain.items():
            close(checkpointed[name], value)


# torch.compile


FEW = ["q_proj", "down_proj"]  # a graph of few nodes compiles in little time


def shallow() -> nn.Module:
    return base("llama", num_hidden_layers=1)


def has_compiler() -> bool:
    from torch.utils import cpp_extension

    return shutil.which(cpp_extension.get_cxx_compiler()) is not None


@pytest.mark.parametrize("variant", ["compressed", "thin"])
def test_a_compiled_model_is_the_same_function_and_is_saved_under_the_same_names(variant, tmp_path):
    given, model = batch("llama"), adapt(shallow(), batch("llama"), variant=variant, target_modules=FEW)
    expected = gradients(model, given)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    found = gradients(compiled, given)
    for name, value in expected.items():
        close(found[f"_orig_mod.{name}"], value, 1e-4)
    train(compiled, given, 1)
    compiled.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(shallow(), tmp_path).eval()
    close(logits(again, given), logits(model.eval(), given), 1e-6)


@pytest.mark.skipif(PLAINEST, reason="inductor has no plain instructions")
def test_an_adapted_layer_is_one_graph_that_inductor_compiles():
    if not has_compiler():
        pytest.skip("inductor needs a C++ compiler")
    given, model = {"x": torch.linspace(-1, 1, 60).reshape(5, 12)}, adapt(Plain(), {}, target_modules=["layer"])
    expected = gradients(model, given)
    torch._dynamo.reset()
    found = gradients(torch.compile(model, fullgraph=True), given)
    for name, value in expected.items():
        close(found[f"_orig_mod.{name}"], value, 1e-4)


def test_layers_compiled_one_by_one_can_be_saved_and_loaded(tmp_path):
    """model.compile() and regional compilation put _orig_mod into names, which must not reach the file's reader."""
    given, model = batch("llama"), trained()
    expected = logits(model, given)
    model.compile(backend="eager")
    model.save_pretrained(tmp_path / "whole")
    close(logits(loaded(tmp_path / "whole"), given), expected, 1e-6)


@pytest.mark.parametrize("targets", ["all-linear", FEW], ids=str)
def test_a_compiled_base_is_adapted_or_refused_before_it_is_changed(targets, tmp_path):
    given, plain = batch("llama"), shallow()
    before = logits(plain, given)
    torch._dynamo.reset()
    try:
        model = adapt(torch.compile(plain, backend="eager"), given, target_modules=targets)
    except ValueError:
        close(logits(plain, given), before, 0)
        return
    expected = logits(train(model, given), given)
    differ(expected, before)
    model.save_pretrained(tmp_path)
    close(logits(peft.PeftModel.from_pretrained(shallow(), tmp_path).eval(), given), expected)


# quantised bases


def quantised(folder, four: bool, **options) -> nn.Module:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes quantises the base")
    base("llama", hidden_size=64, intermediate_size=128).save_pretrained(folder)
    settings = transformers.BitsAndBytesConfig(load_in_4bit=four, load_in_8bit=not four, **options)
    return transformers.LlamaForCausalLM.from_pretrained(folder, quantization_config=settings, device_map="cpu").eval()


@pytest.mark.parametrize("four", [True, False], ids=["nf4", "int8"])
@pytest.mark.parametrize("variant", ["compressed", "thin"])
def test_adapters_of_a_base_in_few_bits_train_and_are_loaded(variant, four, tmp_path):
    options, given = ({"bnb_4bit_quant_type": "nf4"} if four else {}), batch("llama")
    model = peft.prepare_model_for_kbit_training(quantised(tmp_path, four, **options))
    model = adapt(model, given, variant=variant)
    kind = type(model.base_model.model.model.layers[0].mlp.up_proj.get_base_layer()).__name__
    assert kind == ("Linear4bit" if four else "Linear8bitLt")
    before = model(**given).loss.item()
    train(model, given, lr=0.02)
    assert model(**given).loss.item() < before
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(quantised(tmp_path, four, **options), tmp_path / "adapter").eval()
    close(logits(again, given), logits(model, given), 0.02)
    cd.save_as_lora(model, tmp_path / "lora")
    again = peft.PeftModel.from_pretrained(quantised(tmp_path, four, **options), tmp_path / "lora").eval()
    close(logits(again, given), logits(model, given), 0.02)


@pytest.mark.parametrize("four", [True, False], ids=["nf4", "int8"])
def test_merging_into_few_bits_is_near_or_refused_by_a_clear_error(four, tmp_path):
    given, options = batch("llama"), ({"bnb_4bit_quant_type": "nf4"} if four else {})
    model = adapt(quantised(tmp_path, four, **options), given)
    expected = logits(model, given)
    try:
        merged = model.merge_and_unload()
    except (ValueError, NotImplementedError, RuntimeError) as refused:
        assert "quanti" in str(refused) or "bit" in str(refused)
        close(logits(model, given), expected, 1e-3)
    else:
        without = logits(quantised(tmp_path, four, **options), given)
        assert (logits(merged, given) - expected).norm() < 0.5 * (without - expected).norm()


def test_sfttrainers_cast_of_factors_to_bfloat16_is_taken(tmp_path):
    given, model = batch("llama"), adapt(quantised(tmp_path, True), batch("llama"), variant="compressed")
    for value in model.parameters():
        if value.requires_grad:
            value.data = value.data.to(torch.bfloat16)
    loss = model(**given).loss
    loss.backward()
    assert loss.isfinite() and all(value.grad is not None for value in model.parameters() if value.requires_grad)


@pytest.mark.parametrize("variant", ["compressed", "thin"])
def test_a_base_of_torchaos_integers_trains_and_is_not_merged(variant):
    torchao = pytest.importorskip("torchao.quantization", reason="torchao quantises the base")
    given, model = batch("llama"), base("llama", hidden_size=64, intermediate_size=128)
    torchao.quantize_(model.model, torchao.Int8WeightOnlyConfig())
    model = adapt(model, given, variant=variant)
    before = model(**given).loss.item()
    train(model, given, lr=0.02)
    assert model(**given).loss.item() < before
    expected = logits(model, given)
    try:
        close(logits(model.merge_and_unload(), given), expected, 0.05)
    except (ValueError, NotImplementedError) as refused:
        assert "torchao" in str(refused) or "quanti" in str(refused)
        close(logits(model, given), expected)


def test_transformers_torchao_config_trains_and_merges(tmp_path):
    torchao = pytest.importorskip("torchao.quantization", reason="torchao quantises the base")
    given = batch("llama")
    base("llama", hidden_size=64, intermediate_size=128).save_pretrained(tmp_path)
    settings = transformers.TorchAoConfig(torchao.Int8WeightOnlyConfig())
    plain = transformers.LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=settings).eval()
    model = train(adapt(plain, given, variant="compressed"), given, lr=0.02)
    expected = logits(model, given)
    close(logits(model.merge_and_unload(), given), expected, 0.05)


# accounts of a model


def test_peft_counts_and_names_what_is_there():
    model = two()
    status = peft.get_model_status(model)
    assert status.adapter_model_type == "DeepLoraModel" and status.available_adapters == ["one", "two"]
    assert status.trainable_params == sum(value.numel() for value in trainable(model).values())
    layers = peft.get_layer_status(model)
    assert len(layers) == 14 and all(layer.active_adapters == ["one"] for layer in layers)


@pytest.mark.parametrize("variant", VARIANTS)
def test_parameters_are_as_many_as_the_chain_says(variant):
    model = adapt(nn_model(), {"x": torch.ones(2, 12)}, variant=variant, r=2, depth=3, target_modules=["layer"])
    m, n, r = 8, 12, 2
    counts = {"compressed": r * (m + n) + 3 * r * r, "thin": r * (m + n) + r * r, "full": m * (m + n) + m * m}
    assert sum(value.numel() for value in trainable(model).values()) == counts[variant]


class Plain(nn.Module):
    """One layer and a loss, called as transformers' models are."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(12, 8)

    def forward(self, x):
        out = self.layer(x)
        return transformers.modeling_outputs.SequenceClassifierOutput(loss=out.square().mean(), logits=out)


def nn_model() -> nn.Module:
    torch.manual_seed(0)
    return Plain()


# what else is done with a model


def fresh() -> nn.Module:
    """An adapter of variant "compressed" that nobody compressed."""
    return peft.get_peft_model(base("llama"), config(variant="compressed"))


@pytest.mark.parametrize("assign", [True, False])
def test_a_state_dict_brings_the_factors(assign):
    model, given = trained("llama", "compressed"), batch("llama")
    again = fresh()
    again.load_state_dict({key: value.clone() for key, value in model.state_dict().items()}, assign=assign)
    close(logits(again.eval(), given), logits(model, given), 1e-6)
    once_more = fresh()
    peft.set_peft_model_state_dict(once_more, peft.get_peft_model_state_dict(model))
    close(logits(once_more.eval(), given), logits(model, given), 1e-6)


def test_a_copy_trains_apart():
    model, given = trained("llama", "compressed"), batch("llama")
    expected, other = logits(model, given), copy.deepcopy(model)
    close(logits(other, given), expected, 0)
    train(other, given, 1)
    close(logits(model, given), expected, 0)
    differ(logits(other, given), expected, 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_may_be_cast_after_it_is_adapted(dtype):
    model, given = trained("llama", "compressed"), batch("llama")
    expected = logits(model, given)
    close(logits(model.to(dtype), given).float(), expected, 0.03)


def test_gradients_of_single_rows_come_from_vmap():
    model, x = adapt(Plain(), {}, target_modules=["layer"]), torch.linspace(-1, 1, 60).reshape(5, 12)
    plain = model.base_model.model
    factors = {name: value for name, value in plain.named_parameters() if value.requires_grad}

    def loss(values: dict, row: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(plain, values, (row[None],)).loss

    rows = torch.vmap(torch.func.grad(loss), (None, 0))(factors, x)
    gradients = torch.autograd.grad(plain(x).loss, list(factors.values()))
    for found, expected in zip(rows.values(), gradients, strict=True):
        close(found.mean(0), expected)


def test_an_adapter_is_traced_and_exported():
    model, x = adapt(Plain(), {}, target_modules=["layer"]).base_model.model.layer, torch.ones(2, 12)
    close(torch.jit.trace(model, (x,), check_trace=False)(x), model(x))
    close(torch.export.export(model, (x,)).module()(x), model(x))


class Towers(nn.Module):
    """Two towers that share nothing, as for images and texts, of which a pass may run one alone."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = (nn.Sequential(nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 12)) for _ in range(2))

    def forward(self, left: torch.Tensor | None, right: torch.Tensor | None) -> tuple:
        return None if left is None else self.left(left), None if right is None else self.right(right)


def towers() -> nn.Module:
    torch.manual_seed(0)
    model = peft.get_peft_model(Towers(), config(variant="compressed", target_modules=["0", "2"]))
    x = torch.linspace(-1, 1, 60).reshape(5, 12)
    compress(model, lambda: sum(out.square().mean() for out in model(x, x)))
    return model


def test_losses_of_one_pass_that_share_nothing_go_back_one_by_one():
    model, x = towers(), torch.linspace(-1, 1, 60).reshape(5, 12)
    left, right = model(x, x)
    left.square().mean().backward()
    right.square().mean().backward()
    found = {name: value.grad.clone() for name, value in model.named_parameters() if value.requires_grad}
    model.zero_grad()
    sum(out.square().mean() for out in model(x, x)).backward()
    for name, value in model.named_parameters():
        if value.requires_grad:
            close(found[name], value.grad)


def test_a_tower_that_did_not_run_is_not_moved():
    """An optimiser skips what has no gradient: no weight decay, no momentum."""
    model, x = towers(), torch.linspace(-1, 1, 60).reshape(5, 12)
    before = trainable(model)
    optimizer = torch.optim.AdamW(cd.param_groups(model, lr=0.1), weight_decay=0.5)
    model(x, None)[0].square().mean().backward()
    optimizer.step()
    for name, value in trainable(model).items():
        assert torch.equal(value, before[name]) == (".right." in name), name
