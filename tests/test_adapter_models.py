"""Deep LoRA on models as users have them: heads, tied weights, half precision, wrappers, what must be refused."""

import copy
import json
import warnings

import distributed_helpers
import pytest
import torch
from torch import nn

import compressible as cd
from compressible.adapters import compressed_init
from compressible.adapters.compressed_init import GradientSink, top_frames
from compressible.adapters.layer import adapters

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

SMALL = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16, "vocab_size": 40}
ENCODER = SMALL | {"intermediate_size": 24, "max_position_embeddings": 24, "num_labels": 3}
HEADS = {
    "bert": lambda: transformers.BertForSequenceClassification(transformers.BertConfig(**ENCODER)),
    "roberta": lambda: transformers.RobertaForSequenceClassification(
        transformers.RobertaConfig(**ENCODER, pad_token_id=0)
    ),
    "distilbert": lambda: transformers.DistilBertForSequenceClassification(
        transformers.DistilBertConfig(vocab_size=40, dim=16, n_layers=2, n_heads=2, hidden_dim=24, num_labels=3)
    ),
    "gpt2": lambda: transformers.GPT2ForSequenceClassification(
        transformers.GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, num_labels=3, pad_token_id=0)
    ),
}


def headed(kind: str = "bert") -> nn.Module:
    torch.manual_seed(0)
    return HEADS[kind]().eval()


def t5() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.T5Config(vocab_size=40, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4,
                                   decoder_start_token_id=0)  # fmt: skip
    return transformers.T5ForConditionalGeneration(config).eval()


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=20)
    return transformers.GPT2LMHeadModel(config).eval()


def inputs(labels: bool = True, seed: int = 1) -> dict:
    ids = torch.randint(2, 40, (3, 7), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)} | (
        {"labels": torch.tensor([0, 1, 2])} if labels else {}
    )


def text(seed: int = 1) -> dict:
    ids = inputs(seed=seed)["input_ids"]
    return {"input_ids": ids, "labels": ids}


def adapt(model: nn.Module, given: dict, **options) -> nn.Module:
    config = cd.DeepLoraConfig(**({"r": 4, "init_scale": 0.3} | options))
    model = cd.get_deep_lora_model(model, config, torch.Generator().manual_seed(3))
    if config.variant == "compressed":
        cd.compress_adapters(model, lambda: model(**given).loss, generator=torch.Generator().manual_seed(4))
    return model


def train(model: nn.Module, given: dict, steps: int = 4) -> nn.Module:
    optimiser = torch.optim.AdamW(cd.param_groups(model, 0.1))
    for _ in range(steps):
        optimiser.zero_grad()
        model(**given).loss.backward()
        optimiser.step()
    return model.eval()


def logits(model: nn.Module, given: dict) -> torch.Tensor:
    with torch.no_grad():
        return model(**given).logits


# peft and heads


@pytest.mark.parametrize("saved", [None, ["classifier"]])
@pytest.mark.parametrize("kind", HEADS)
def test_peft_loads_adapters_of_classifiers_whether_their_heads_train_or_not(kind, saved, tmp_path):
    saved = ["score"] if saved and kind == "gpt2" else saved
    model = train(adapt(headed(kind), inputs(), task_type="SEQ_CLS", modules_to_save=saved), inputs())
    cd.save_peft_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(headed(kind), tmp_path).eval()
    torch.testing.assert_close(logits(theirs, inputs()), logits(model, inputs()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["bert", "roberta", "gpt2"])  # peft cannot adapt DistilBERT's all-linear
def test_a_task_leaves_out_what_peft_leaves_out(kind):
    theirs = peft.get_peft_model(headed(kind), peft.LoraConfig(target_modules="all-linear", task_type="SEQ_CLS"))
    names = {name.removeprefix("base_model.model.") for name, module in theirs.named_modules()
             if isinstance(module, peft.tuners.lora.LoraLayer)}  # fmt: skip
    options = {"variant": "thin", "task_type": "SEQ_CLS", "target_modules": "All-Linear"}
    mine = set(adapters(adapt(headed(kind), inputs(), **options)))
    assert mine == {name for name in names if "modules_to_save" not in name and "original_module" not in name}


@pytest.mark.parametrize(("start", "zero"), [("peft", 0), (True, 0), ("standard", 1)])
def test_pefts_start_of_an_embedding_is_its_own(start, zero):
    options = {"depth": 2, "variant": "thin", "init_scale": 1e-3, "init_lora_weights": start, "embeddings": True}
    layers = adapters(adapt(headed(), inputs(), **options))
    factors = layers["bert.embeddings.word_embeddings"].factors
    assert not factors[zero].any() and factors[1 - zero].any() and layers["classifier"].config.scaling == 1
    assert (0.7 < factors[1].std() < 1.3) == (zero == 0) and not layers["classifier"].factors[1].any()


def assert_same_logits(found, expected):
    """Not to the bit: a file's tensors lie elsewhere in memory."""
    torch.testing.assert_close(logits(found, inputs()), logits(expected, inputs()), rtol=1e-5, atol=1e-6)


# one weight, several layers


def test_tied_embeddings_get_one_update_that_trains_and_reaches_peft(tmp_path):
    with pytest.warns(UserWarning, match="'shared' shares its weight with 'lm_head'"):
        model = adapt(t5(), text(), embeddings=True, target_modules=["q", "v"],
                      exclude_modules=r".*relative_attention_bias")  # fmt: skip
    shared = adapters(model)["shared"]
    assert model.encoder.embed_tokens is model.decoder.embed_tokens is shared
    before = [factor.detach().clone() for factor in shared.factors]
    train(model, text())
    assert all(not torch.equal(a, b) for a, b in zip(before, shared.factors, strict=True))
    cd.save_peft_adapter(model, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's word on tied layers
        theirs = peft.PeftModel.from_pretrained(t5(), tmp_path).eval()
    torch.testing.assert_close(logits(theirs, text()), logits(model, text()), rtol=1e-5, atol=1e-5)


def test_merging_refuses_to_change_a_tied_output_layer_and_leaves_the_model():
    with pytest.warns(UserWarning, match="lm_head"):
        model = adapt(gpt2(), text(), embeddings=True)
    before = logits(model, text())
    with pytest.raises(RuntimeError, match=r"'transformer.wte' shares its weight with 'lm_head'"):
        cd.merge_and_unload(model)
    assert torch.equal(logits(model, text()), before)


@pytest.mark.parametrize(("make", "name"), [(gpt2, "wte"), (gpt2, "lm_head"), (t5, "shared"), (t5, "lm_head")])
def test_tied_modules_are_not_saved_whole(make, name):
    with pytest.raises(ValueError, match=f"{name}' shares its weight with"):
        adapt(make(), text(), modules_to_save=[name])


# merging


def test_merging_in_bfloat16_allows_its_own_rounding():
    model = train(adapt(headed().to(torch.bfloat16), inputs()), inputs())
    before = logits(model, inputs())
    merged = cd.merge_and_unload(model, inputs(labels=False))
    assert not adapters(merged) and (logits(merged, inputs()) - before).abs().max() < 0.05 * before.abs().max()


def test_a_merge_that_fails_leaves_weights_adapters_and_modes():
    model = adapt(headed(), inputs()).train()
    head = adapters(model)["classifier"]
    head.forward = lambda x: head.base(x) * 1.5
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(RuntimeError, match="merged model differs by"):
        cd.merge_and_unload(model, inputs())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert model.training and adapters(model)["classifier"] is head and hasattr(model, "deep_lora_config")


def test_plain_modules_merge_in_float64_by_what_they_are_called_with():
    x = torch.randn(5, 12, dtype=torch.float64)
    net = nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 4)).double().train()
    for given in (x, (x,)):
        model = cd.get_deep_lora_model(copy.deepcopy(net), cd.DeepLoraConfig(r=4, variant="thin", init_scale=0.3))
        before = model(x)
        merged = cd.merge_and_unload(model, given)
        torch.testing.assert_close(merged(x), before, rtol=1e-13, atol=1e-13)
        assert merged.training
    with pytest.raises(ValueError, match="inputs is str"):
        cd.merge_and_unload(cd.get_deep_lora_model(net, cd.DeepLoraConfig(r=4, variant="thin")), "text")


# what is refused, before anything is changed


@pytest.mark.parametrize(("bad", "match"), [
    ({"modules_to_save": ["clasifier"], "r": 4}, "matches no module"), ({"r": 18}, "too small for r / 2 = 9"),
    ({"embeddings": True, "r": 8}, "token_type_embeddings"),
])  # fmt: skip
def test_a_refused_model_is_untouched(bad, match):
    model = headed()
    with pytest.raises(ValueError, match=match):
        cd.get_deep_lora_model(model, cd.DeepLoraConfig(**bad))
    assert not adapters(model) and all(p.requires_grad for p in model.parameters())


def test_an_adapted_model_is_not_adapted_again():
    with pytest.raises(ValueError, match="expected a model without adapters"):
        adapt(adapt(headed(), inputs()), inputs())


def test_layers_that_a_model_does_not_call_are_refused():
    def encoder():
        layer = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, batch_first=True)
        return nn.TransformerEncoder(layer, 1, enable_nested_tensor=False).eval()

    thin = {"r": 4, "variant": "thin", "init_scale": 0.5}
    with pytest.raises(ValueError, match=r"'layers.0.self_attn.out_proj'.*MultiheadAttention"):
        cd.get_deep_lora_model(encoder(), cd.DeepLoraConfig(**thin))
    options = thin | {"exclude_modules": ["out_proj"]}
    with pytest.raises(ValueError, match="set_fastpath_enabled"):
        cd.get_deep_lora_model(encoder(), cd.DeepLoraConfig(**options))
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        model, x = cd.get_deep_lora_model(encoder(), cd.DeepLoraConfig(**options)), torch.randn(2, 5, 16)
        with torch.no_grad():
            evaluated = model(x)
        torch.testing.assert_close(evaluated, model.train()(x))
        with torch.no_grad():
            assert (cd.merge_and_unload(model, x)(x) - encoder()(x)).abs().max() > 1e-3
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def test_embeddings_with_their_own_forward_pass_are_refused():
    class Scaled(nn.Embedding):
        def forward(self, ids):
            return 3 * super().forward(ids)

    net = nn.Sequential(Scaled(10, 8), nn.Linear(8, 8))
    with pytest.raises(ValueError, match="'0' is Scaled"):
        cd.get_deep_lora_model(net, cd.DeepLoraConfig(r=4, variant="thin", embeddings=True))


def test_a_model_in_float16_takes_lora_and_no_deep_lora():
    with pytest.raises(ValueError, match=r"is in float16, expected float32 or bfloat16: eps\^L = 1e-09"):
        cd.get_deep_lora_model(headed().half(), cd.DeepLoraConfig(variant="thin"))
    assert adapters(cd.get_deep_lora_model(headed().half(), cd.DeepLoraConfig(depth=2, variant="thin", r=4)))


@pytest.mark.parametrize(("bad", "match"), [
    ({"init_scale": "1e-3"}, "init_scale is '1e-3'"), ({"lora_dropout": None}, "lora_dropout is None"),
    ({"outer_ratio": "x"}, "outer_ratio is 'x'"), ({"r": True}, "r is True"),
    ({"embeddings": "yes"}, "embeddings is 'yes'"),
    ({"depth": 2, "variant": "thin", "lora_alpha": 0}, "lora_alpha is 0"), ({"task_type": "SEQ"}, "SEQ_CLS"),
    ({"depth": 2, "variant": "thin", "lora_alpha": "16"}, "lora_alpha is '16'"),
    ({"depth": 2, "variant": "thin", "init_scale": 0.1}, "init_scale is 0.1"),
    ({"depth": 2, "variant": "thin", "outer_ratio": 0.1}, "outer_ratio is 0.1"),
    ({"target_modules": None}, "target_modules is None"), ({"target_modules": 5}, "target_modules is 5"),
    ({"modules_to_save": "classifier"}, r"a list of names, such as \['classifier'\]"),
])  # fmt: skip
def test_fields_of_the_wrong_kind_are_named(bad, match):
    with pytest.raises(ValueError, match=match):
        cd.DeepLoraConfig(**bad)


def test_sets_and_tuples_of_names_are_lists_on_disk(tmp_path):
    model = adapt(headed(), inputs(), target_modules={"query", "value"}, modules_to_save=("classifier",))
    cd.save_adapter(model, tmp_path)
    assert json.loads((tmp_path / "deep_lora.json").read_text())["target_modules"] == ["query", "value"]
    assert_same_logits(cd.load_adapter(headed(), tmp_path), model)


def test_true_is_pefts_default_start():
    assert cd.DeepLoraConfig(depth=2, variant="thin", init_lora_weights=True).init_lora_weights == "peft"


# compression


def linear_sum(net: nn.Sequential, seeds: range) -> dict[str, torch.Tensor]:
    """Gradients of a sum of losses, by plain autograd."""
    plain = copy.deepcopy(net)
    sum(plain(batch(seed)).square().sum() for seed in seeds).backward()
    return {name: module.weight.grad for name, module in plain.named_modules() if isinstance(module, nn.Linear)}


def batch(seed: int) -> torch.Tensor:
    return torch.randn(6, 12, generator=torch.Generator().manual_seed(seed))


def network(inplace: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 20), nn.ReLU(inplace=inplace), nn.Linear(20, 9))


def holds_leading(adapter: nn.Module, gradient: torch.Tensor) -> None:
    left, _, right = torch.linalg.svd(gradient, full_matrices=False)
    for side, leading in ((adapter.factors[0].mT, right[:2].mT), (adapter.factors[-1], left[:, :2])):
        span = torch.linalg.qr(side.detach()).Q
        torch.testing.assert_close(span @ (span.mT @ leading), leading, rtol=1e-3, atol=1e-4)


def test_different_batches_add_up():
    model, seeds = cd.get_deep_lora_model(network(), cd.DeepLoraConfig(r=4)), iter(range(3))
    cd.compress_adapters(model, lambda: model(batch(next(seeds))).square().sum(), batches=3)
    for name, gradient in linear_sum(network(), range(3)).items():
        holds_leading(adapters(model)[name], gradient)


def test_one_gradient_is_alive_at_a_time(monkeypatch):
    alive, add, sinks = [], GradientSink.add, []

    def watched(self, x, grad):
        sinks.append(self)
        add(self, x, grad)
        alive.append(sum(sink.total is not None for sink in sinks))

    monkeypatch.setattr(compressed_init.GradientSink, "add", watched)
    adapt(headed(), inputs())
    assert len(alive) == 14 and max(alive) == 0  # decomposed before the next layer's comes


@pytest.mark.parametrize("trouble", ["inplace", "unused forward", "first batch only", "checkpointing"])
def test_gradients_are_found_whatever_the_model_does(trouble):
    model = cd.get_deep_lora_model(network(trouble == "inplace"), cd.DeepLoraConfig(r=4))
    calls = []

    def loss():
        calls.append(0)
        if trouble == "unused forward":
            model(batch(7))
        if trouble == "first batch only" and len(calls) == 2:
            return model[2](torch.zeros(1, 20)).square().sum()
        if trouble == "checkpointing":
            return torch.utils.checkpoint.checkpoint(model, batch(0), use_reentrant=False).square().sum()
        return model(batch(0)).square().sum()

    cd.compress_adapters(model, loss, batches=2 if trouble == "first batch only" else 1)
    holds_leading(adapters(model)["0"], linear_sum(network(), range(1))["0"])


def test_a_second_compression_asks_first():
    model = adapt(headed(), inputs())
    before = adapters(model)["classifier"].factors[0].detach().clone()
    with pytest.raises(ValueError, match="restart=True"):
        cd.compress_adapters(model, lambda: model(**inputs()).loss)
    assert torch.equal(adapters(model)["classifier"].factors[0], before)
    cd.compress_adapters(model, lambda: model(**inputs()).loss, restart=True)
    assert not torch.equal(adapters(model)["classifier"].factors[0], before)


@pytest.mark.parametrize(("loss", "match"), [
    (lambda model: None, "NoneType"), (lambda model: model(**inputs()).logits, r"Tensor of shape \(3, 3\)"),
    (lambda model: model(**inputs()).loss * torch.nan, "returned nan"),
    (lambda model: model(**inputs()).loss.detach(), "no gradient reached the loss"),
])  # fmt: skip
def test_a_loss_step_that_gives_no_loss_is_refused(loss, match):
    model = cd.get_deep_lora_model(headed(), cd.DeepLoraConfig(r=4))
    with pytest.raises((ValueError, RuntimeError), match=match):
        cd.compress_adapters(model, lambda: loss(model))


def test_one_bad_gradient_leaves_the_others_frames():
    stack = torch.randn(3, 6, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    bad = stack.clone()
    bad[1, 2, 3] = torch.nan
    for mine, theirs in zip(top_frames(bad, 2), top_frames(stack, 2), strict=True):
        torch.testing.assert_close(mine[[0, 2]], theirs[[0, 2]], rtol=1e-9, atol=1e-9)
        assert mine[1].isnan().all()


# wrappers


def test_compiled_and_parallel_models_are_looked_through(tmp_path):
    model = adapt(headed(), inputs())
    for wrapped in (torch.compile(model, backend="eager"), nn.DataParallel(model)):
        assert {id(p) for g in cd.param_groups(wrapped, 0.1) for p in g["params"]} == {
            id(p) for p in model.parameters() if p.requires_grad
        }
        cd.save_adapter(wrapped, tmp_path)
        assert_same_logits(cd.load_adapter(headed(), tmp_path), model)
    for call in (cd.merge_and_unload, lambda m: cd.param_groups(m, 0.1), lambda m: cd.save_adapter(m, tmp_path)):
        with pytest.raises(ValueError, match="BertForSequenceClassification has no adapters"):
            call(headed())


def test_two_processes_train_through_trainer_and_accelerate(tmp_path):
    torch.multiprocessing.spawn(distributed_helpers.through_trainer, (str(tmp_path),), nprocs=2)
    ranks = [torch.load(tmp_path / f"{name}{rank}.pt") for rank in range(2) for name in ("trainer", "accelerate")]
    for name, first, second in zip(("trainer", "accelerate"), ranks[:2], ranks[2:], strict=True):
        torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-7, msg=name)
        start = torch.load(tmp_path / "start.pt")
        assert all(not torch.equal(first[key], start[key]) for key in first), name
