"""What users of LoRA report, tried with Deep LoRA: the right value, or a clear error before anything is changed."""

import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from adapter_helpers import (
    BERT,
    GPT2,
    adapt,
    base,
    batch,
    close,
    compress,
    config,
    copied,
    differ,
    logits,
    rows,
    train,
    trainable,
    unchanged,
)
from torch import nn

import compressible as cd

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")


def net(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(*layers).eval()


def small(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return net(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))


# compression: gradients that are no start


def equal_pair(model: nn.Module) -> torch.Tensor:
    """A contrastive loss whose square root is taken at zero: the loss is finite, its gradient is not."""
    a, b = rows(), torch.cat([rows()[:3].flip(0), rows()[3:]])
    return (model(a) - model(b)).square().sum(1).sqrt().mean()


def silent(model: nn.Module) -> torch.Tensor:
    """A loss that depends on the second layer through a factor of zero."""
    return (model(rows()) * 0.0).sum()


@pytest.mark.parametrize("bad", [equal_pair, silent])
def test_a_gradient_that_is_no_start_names_its_layer_and_leaves_the_model(bad):
    model = peft.get_peft_model(small(), config(variant="compressed", target_modules=["0", "2"]))
    before = copied(model)
    with pytest.raises(RuntimeError, match=r"'(0|2)'"):
        compress(model, lambda: bad(model))
    unchanged(model, before)
    with pytest.raises(RuntimeError, match="compress_adapters"):
        model(rows())
    compress(model, lambda: model(rows()).square().mean())  # and one can go on from there
    assert model(rows()).isfinite().all()


def test_a_later_batch_whose_gradient_is_not_finite_is_met_as_well():
    model = peft.get_peft_model(small(), config(variant="compressed", target_modules=["0", "2"]))
    before, losses = copied(model), iter([lambda model: model(rows()).square().mean(), equal_pair])
    with pytest.raises(RuntimeError, match="exclude_modules"):
        cd.compress_adapters(model, lambda: next(losses)(model), batches=2)
    unchanged(model, before)


@pytest.mark.parametrize("loss", [torch.nan, torch.inf])
def test_a_loss_that_is_not_finite_leaves_the_model(loss):
    model = peft.get_peft_model(small(), config(variant="compressed", target_modules=["0", "2"]))
    before = copied(model)
    with pytest.raises(RuntimeError, match="finite"):
        cd.compress_adapters(model, lambda: model(rows()).sum() * loss)
    unchanged(model, before)


def test_a_loss_that_raises_leaves_the_model():
    model = peft.get_peft_model(small(), config(variant="compressed", target_modules=["0", "2"]))
    before = copied(model)

    def broken() -> torch.Tensor:
        raise KeyError(f"labels, after {model(rows()).shape}")

    with pytest.raises(KeyError, match="labels"):
        cd.compress_adapters(model, broken)
    unchanged(model, before)
    compress(model, lambda: model(rows()).square().mean())


def test_a_loss_under_no_grad_says_so():
    model = peft.get_peft_model(small(), config(variant="compressed", target_modules=["0", "2"]))
    with torch.no_grad():
        compress(model, lambda: model(rows()).square().mean())  # compression turns gradients on
    other = peft.get_peft_model(small(), config(variant="compressed", target_modules=["0", "2"]))
    with pytest.raises(RuntimeError, match="gradient"):
        compress(other, lambda: other(rows()).detach().square().mean())


def mean_pooled(model: nn.Module) -> torch.Tensor:
    return model(batch("bert", labels=False)["input_ids"]).last_hidden_state.mean(1).square().sum()


def bert(pooler: bool = True) -> nn.Module:
    torch.manual_seed(0)
    sizes = {key: value for key, value in BERT.items() if key != "num_labels"}
    return transformers.BertModel(transformers.BertConfig(**sizes), add_pooling_layer=pooler).eval()


def test_an_unused_pooler_is_named_and_is_no_dead_end():
    """Everybody's first sentence encoder: mean pooling, and a pooler that no loss reaches."""
    model, ids = peft.get_peft_model(bert(), config(variant="compressed")), batch("bert", labels=False)["input_ids"]
    with pytest.raises(RuntimeError, match=r"pooler\.dense") as raised:
        compress(model, lambda: mean_pooled(model))
    assert "exclude_modules" in str(raised.value)
    plain = model.unload()
    close(plain(ids).last_hidden_state, bert()(ids).last_hidden_state, 0)
    again = peft.get_peft_model(plain, config(variant="compressed", exclude_modules=["pooler.dense"]))
    compress(again, lambda: mean_pooled(again))
    before = again(ids).last_hidden_state
    optimizer = torch.optim.AdamW(cd.param_groups(again, lr=0.1))
    mean_pooled(again).backward()
    optimizer.step()
    differ(again(ids).last_hidden_state, before)


def test_layers_that_the_loss_does_not_reach_can_be_left_out(tmp_path):
    model, ids = peft.get_peft_model(bert(), config(variant="compressed")), batch("bert", labels=False)["input_ids"]
    found = cd.compress_adapters(model, lambda: mean_pooled(model), unreached="leave_out")
    assert found["left_out"] == ["pooler.dense"] or [name.endswith("pooler.dense") for name in found["left_out"]] == [
        True
    ]
    assert not any("pooler" in name for name in trainable(model))
    expected = model(ids).last_hidden_state
    model.save_pretrained(tmp_path / "own")
    cd.save_as_lora(model, tmp_path / "lora")
    for folder in ("own", "lora"):
        again = peft.PeftModel.from_pretrained(bert(), tmp_path / folder).eval()
        close(again(ids).last_hidden_state, expected, 1e-5)


class Experts(nn.Module):
    """Two experts, of which a batch may meet one alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(x)
        for part, chosen in ((self.first, x[:, 0] > 0), (self.second, x[:, 0] <= 0)):
            if chosen.any():
                out = out.index_put((chosen,), part(x[chosen]))
        return out


def test_an_expert_without_tokens_asks_for_more_batches():
    torch.manual_seed(0)
    model = peft.get_peft_model(Experts(), config(variant="compressed", target_modules=["first", "second"]))
    positive, negative = rows().abs(), -rows().abs()
    with pytest.raises(RuntimeError, match="second") as raised:
        compress(model, lambda: model(positive).square().mean())
    assert "batches" in str(raised.value) and "exclude_modules" in str(raised.value)
    batches = iter([positive, negative])
    cd.compress_adapters(model, lambda: model(next(batches)).square().mean(), batches=2)
    assert all(value.any() for value in trainable(model).values())


# half precision


@pytest.mark.parametrize("variant", ["compressed", "thin", "full"])
def test_float16_autocast_is_right_or_refused_with_a_reason(variant):
    model = adapt_plain(small(), variant)
    expected = model(rows())
    with torch.autocast("cpu", dtype=torch.float16):
        try:
            found = model(rows())
        except RuntimeError as refused:
            assert "float16" in str(refused)
            return
        found.float().square().mean().backward()
    close(found.float(), expected, 5e-3)
    assert all(value.grad.isfinite().all() and value.grad.any() for value in model.parameters() if value.requires_grad)


@pytest.mark.parametrize("variant", ["compressed", "thin"])
def test_a_float16_base_keeps_its_factors_in_float32(variant):
    model, given = base("llama").to(torch.float16), batch("llama")
    model = adapt(model, given, variant=variant, init_scale=1e-3)
    assert {value.dtype for value in trainable(model).values()} == {torch.float32}
    model(**given).loss.backward()
    assert all(value.grad.isfinite().all() for value in model.parameters() if value.requires_grad)


def adapt_plain(model: nn.Module, variant: str = "thin", **options) -> nn.Module:
    model = peft.get_peft_model(model, config(variant=variant, target_modules=["0", "2"], **options))
    if variant == "compressed":
        compress(model, lambda: model(rows()).square().mean())
    return model


# targets


def mixtral() -> nn.Module:
    return base("mixtral")


def test_targets_that_match_nothing_are_named():
    with pytest.warns(UserWarning, match="typo") as caught:
        peft.get_peft_model(base("llama"), config(target_modules=["q_proj", "typo"]))
    assert not any("q_proj" in str(warning.message) for warning in caught if "typo" in str(warning.message))


def test_experts_that_are_left_out_are_named():
    """Three quarters of such a model are fused experts, which all-linear does not mean."""
    with pytest.warns(UserWarning, match=r"experts"):
        peft.get_peft_model(mixtral(), config(target_modules="all-linear"))


def test_fused_experts_are_not_taken_in_silence():
    try:
        with pytest.warns(UserWarning, match=r"down_proj|experts"):
            peft.get_peft_model(mixtral(), config(target_modules=["q_proj", "down_proj"]))
    except (ValueError, NotImplementedError) as refused:
        assert "target_parameters" in str(refused)


def test_nothing_is_said_where_all_targets_match():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        peft.get_peft_model(base("llama"), config(target_modules=["q_proj", "layers.1.mlp.up_proj"]))
        peft.get_peft_model(base("llama"), config(target_modules="all-linear", exclude_modules=["q_proj"]))


@pytest.mark.parametrize("options", [
    {"target_parameters": ["experts.down_proj"]}, {"depth": 2}, {"variant": "deep"}, {"r": 3, "variant": "compressed"},
    {"r": 0}, {"init_scale": 0.0}, {"lora_dropout": 1.0}, {"bias": "some"}, {"modules_to_save": "classifier"},
], ids=str)  # fmt: skip
def test_what_makes_no_sense_is_refused_by_the_config(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        config(**options)


@pytest.mark.parametrize("name", ["use_dora", "use_rslora", "lora_alpha", "embeddings", "init_lora_weights"])
def test_what_is_loras_alone_is_no_field(name):
    with pytest.raises(TypeError, match=name):
        config(**{name: True})


def test_a_width_that_a_layer_has_no_gradient_for_is_refused_before_anything_is_changed():
    """r / 2 directions a side need as many rows and columns."""
    model = small()
    before = copied(model)
    try:
        adapted = peft.get_peft_model(model, config(r=18, variant="compressed", target_modules=["0", "2"]))
    except ValueError as refused:
        assert "18" in str(refused) or "9" in str(refused)
        unchanged(model, before)
        return
    with pytest.raises((ValueError, RuntimeError), match=r"9|18"):
        compress(adapted, lambda: adapted(rows()).square().mean())


@pytest.mark.parametrize("options", [
    {"modules_to_save": ["clasifier"]}, {"exclude_modules": ["typo"]}, {"rank_pattern": {"typo": 2}},
    {"layers_to_transform": [7], "target_modules": ["q_proj"]}, {"target_modules": "typo"},
    {"layers_pattern": "blocks", "layers_to_transform": [0], "target_modules": ["q_proj"]},
], ids=str)  # fmt: skip
def test_a_name_without_a_match_is_told_or_refused(options):
    """One word or the other: peft's own where it has one."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            model = peft.get_peft_model(base("llama"), config(**options))
        except ValueError:
            return
    told = " ".join(str(warning.message) for warning in caught)
    assert any(word in told for word in ("clasifier", "typo", "7", "blocks")), told
    assert trainable(model)


# heads


@pytest.mark.parametrize(("kind", "task", "head"), [
    ("BertForSequenceClassification", "SEQ_CLS", "classifier"),
    ("BertForTokenClassification", "TOKEN_CLS", "classifier"),
    ("BertForQuestionAnswering", "QUESTION_ANS", "qa_outputs"), ("GPT2ForSequenceClassification", "SEQ_CLS", "score"),
])  # fmt: skip
def test_a_task_trains_its_new_head_and_saves_it(kind, task, head, tmp_path):
    def make() -> nn.Module:
        torch.manual_seed(0)
        settings = (
            transformers.GPT2Config(**GPT2 | {"num_labels": 2})
            if "GPT2" in kind
            else transformers.BertConfig(**BERT | {"num_labels": 2})
        )
        return getattr(transformers, kind)(settings).eval()

    given = batch("bert", labels=False)
    more = {"labels": torch.arange(3) % 2}
    if task == "TOKEN_CLS":
        more = {"labels": given["input_ids"] % 2}
    if task == "QUESTION_ANS":
        more = {"start_positions": torch.tensor([0, 1, 2]), "end_positions": torch.tensor([2, 3, 4])}
    try:
        model = adapt(make(), given | more, task_type=task, variant="compressed", target_modules="all-linear")
    except (TypeError, ValueError) as refused:  # as LoRA, which takes the head of SEQ_CLS alone out of all-linear
        assert task != "SEQ_CLS" and "modules_to_save" in str(refused)
        model = adapt(make(), given | more, task_type=task, variant="compressed", target_modules=["query", "value"])
    heads = {name: value for name, value in trainable(model).items() if head in name}
    assert heads and not any("deep_lora" in name for name in heads)
    train(model, given | more)
    for name, value in heads.items():
        differ(dict(model.named_parameters())[name], value, 1e-4)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(make(), tmp_path).eval()
    for found, expected in zip(again(**given).to_tuple(), model(**given).to_tuple(), strict=True):
        if isinstance(found, torch.Tensor):
            close(found, expected, 1e-6)


# tied weights


@pytest.mark.parametrize("variant", ["compressed", "thin", "full"])
@pytest.mark.parametrize("kind", ["t5", "gpt2"])
def test_a_tied_embedding_is_saved_loaded_and_tied_again(kind, variant, tmp_path):
    name, given = {"t5": "embed_tokens", "gpt2": "wte"}[kind], batch(kind)
    model = train(adapt(base(kind), given, variant=variant, target_modules=[name]), given)
    expected = logits(model, given)
    differ(expected, logits(base(kind), given))
    model.get_base_model().tie_weights()
    close(logits(model, given), expected, 0)
    model.save_pretrained(tmp_path)
    close(logits(peft.PeftModel.from_pretrained(base(kind), tmp_path).eval(), given), expected)


def test_the_name_of_a_shared_weight_that_nothing_calls_is_not_taken_in_silence():
    """T5's encoder and decoder call embeddings of their own, which share the weight of `shared`."""
    given = batch("t5")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            model = peft.get_peft_model(base("t5"), config(target_modules=["shared", "q"]))
            model(**given).loss.backward()
        except (ValueError, RuntimeError) as refused:
            assert "shared" in str(refused)
            return
    dead = [name for name, value in model.named_parameters() if value.requires_grad and value.grad is None]
    assert not dead or any("shared" in str(warning.message) for warning in caught)


# files that name the base


def test_transformers_opens_an_adapters_folder_as_a_model(tmp_path):
    base("llama").save_pretrained(tmp_path / "base")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = train(adapt(model, batch("llama"), task_type="CAUSAL_LM"), batch("llama"))
    model.save_pretrained(tmp_path / "adapter")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    close(logits(again, batch("llama")), logits(model, batch("llama")), 1e-6)


@pytest.mark.parametrize("tied", [True, False])
def test_a_merged_model_is_saved_and_loaded_as_a_plain_one(tied, tmp_path):
    """Merging words of tied embeddings gives the output layer another weight, which a file must not tie again."""
    given = batch("gpt2")
    plain = base("gpt2", tie_word_embeddings=tied)
    model = train(adapt(plain, given, variant="compressed", target_modules=["wte", "c_attn"]), given)
    expected = logits(model, given)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            merged = model.merge_and_unload(safe_merge=True)
    except (ValueError, RuntimeError) as refused:
        assert "wte" in str(refused) and tied
        return
    close(logits(merged, given), expected)
    merged.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    close(logits(again, given), expected)


# many runs over one model


def task(length: int = 10) -> Any:
    """Rows of unequal length, padded, as fine_tune takes them."""
    ids = torch.randint(3, 48, (16, length), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(length) < length - torch.arange(16)[:, None] % 4).long()
    given = SimpleNamespace(tokens={"input_ids": ids * mask, "attention_mask": mask}, labels=torch.arange(16) % 3)
    return SimpleNamespace(kind="classification", train=given, validation=given, score=lambda out, labels: 0.0)


MIXERS = {
    "fnet": ("FNetForSequenceClassification", "FNetConfig", {}),
    "longformer": ("LongformerForSequenceClassification", "LongformerConfig", {"attention_window": 4}),
    "bert": ("BertForSequenceClassification", "BertConfig", {}),
}


@pytest.mark.parametrize("variant", ["compressed", "thin"])
@pytest.mark.parametrize("kind", MIXERS)
def test_a_run_goes_as_it_would_alone_or_is_refused_with_a_way_that_works(kind, variant):
    """Models that read padding (FNet), or change a layer's output in place (Longformer)."""
    model_class, config_class, more = MIXERS[kind]
    torch.manual_seed(0)
    settings = getattr(transformers, config_class)(**(BERT | more | {"num_hidden_layers": 1}))
    model = getattr(transformers, model_class)(settings).double().eval()
    own = {"variant": variant, "init_scale": 0.3, "task_type": "SEQ_CLS"}
    if kind == "longformer":  # the last layer's first token attends to all, by other layers than these
        own["exclude_modules"] = r".*layer\.0\.attention\.self\.(query|key|value)"
    runs = [cd.FineTuningRun(config(**own), lr=1e-2, seed=seed) for seed in range(2)]
    options = {"steps": 2, "batch_size": 4, "dropout": False, "show_progress": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        alone = cd.fine_tune(model, runs, task(), max_stack=1, **options)
        try:
            stacked = cd.fine_tune(model, runs, task(), **options)
        except (ValueError, RuntimeError) as refused:
            assert "max_stack=1" in str(refused)
            return
    for one, other in zip(alone, stacked, strict=True):
        close(torch.as_tensor(other.losses), torch.as_tensor(one.losses), 1e-8)
