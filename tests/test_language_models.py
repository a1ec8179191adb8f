"""Language models: read from a GGUF file, asked after prompts, writing by beam search, judged by three packages."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
import torch
from data_helpers import write_manifest, write_wordnet
from text_helpers import save_bert, save_t5, tiny_unigram

import compressible as cd
from compressible.data import gguf_files, prompts, tasks, text, word_pieces, written_metrics
from compressible.data.manifest import DataError, find, load_manifest
from compressible.finetuning.writing import merged_model, written_texts

WORDS = ["The", "Mill", "is", "a", "pub", "cafe", "near", "bar", "Data", "Text", ":", "name", "[", "]", ",", "."]


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("COMPRESSIBLE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write_gguf(path, seed=0):
    """A Gemma 3 of two narrow layers, as llama.cpp names its parts: norms are one above transformers' own."""
    gguf = pytest.importorskip("gguf")
    width, heads, size, hidden, layers = 32, 2, 16, 64, 2
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefgh", "ab"]
    draw = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, "gemma3")
    writer.add_context_length(64)
    writer.add_embedding_length(width)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(hidden)
    writer.add_head_count(heads)
    writer.add_head_count_kv(1)
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(1e6)
    writer.add_sliding_window(16)
    writer.add_vocab_size(len(pieces))
    kinds = [gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.UNKNOWN] + [gguf.TokenType.BYTE] * 256
    writer.add_tokenizer_model("llama")
    writer.add_token_list(pieces)
    writer.add_token_scores([float(-at) for at in range(len(pieces))])
    writer.add_token_types([*kinds, *[gguf.TokenType.NORMAL] * (len(pieces) - len(kinds))])
    writer.add_bos_token_id(2)
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(0)
    writer.add_unk_token_id(3)
    shapes = {"token_embd": (len(pieces), width), "output_norm": (width,)}
    for at in range(layers):
        norms = ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm")
        inner: dict = dict.fromkeys(norms, (width,))
        inner |= {"attn_q": (heads * size, width), "attn_k": (size, width), "attn_v": (size, width)}
        inner |= {"attn_output": (width, heads * size), "attn_q_norm": (size,), "attn_k_norm": (size,)}
        inner |= {"ffn_gate": (hidden, width), "ffn_up": (hidden, width), "ffn_down": (width, hidden)}
        shapes |= {f"blk.{at}.{name}": shape for name, shape in inner.items()}
    for name, shape in shapes.items():
        values = draw.normal(size=shape).astype(np.float32) * 0.1 + (1 if len(shape) == 1 else 0)
        kind = gguf.GGMLQuantizationType.Q8_0
        packed = gguf.quants.quantize(values, kind) if "attn_q.weight" in f"{name}.weight" else values
        writer.add_tensor(f"{name}.weight", packed, raw_dtype=kind if packed is not values else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_file_is_read_once_and_then_from_what_was_kept(tmp_path, own_cache, monkeypatch):
    from transformers import AutoModelForCausalLM

    folder = tmp_path / "model"
    folder.mkdir()
    file = write_gguf(folder / "tiny.gguf")
    model, tokenizer = cd.load_causal_lm(str(folder))
    theirs = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file.name, dtype=torch.float32)
    assert model.state_dict().keys() == theirs.state_dict().keys()
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in theirs.state_dict().items())
    assert {value.dtype for value in model.parameters()} == {torch.float32} and not model.training
    assert tokenizer("ab")["input_ids"][0] == 2 and tokenizer.pad_token_id == 0 and tokenizer.eos_token_id == 1

    def again(*_):
        raise AssertionError("the file was read again")

    with monkeypatch.context() as patch:
        patch.setattr(gguf_files, "_write", again)
        kept, _ = cd.load_causal_lm(str(folder))
        assert torch.equal(kept.lm_head.weight, model.lm_head.weight)
        damaged = next(own_cache.glob("widened/*/model.safetensors"))
        damaged.write_bytes(damaged.read_bytes()[:-4] + b"0000")
        with pytest.raises(AssertionError, match="read again"):
            cd.load_causal_lm(str(folder))
    whole, _ = cd.load_causal_lm(str(folder))
    assert torch.equal(whole.lm_head.weight, model.lm_head.weight)


def test_what_another_version_of_transformers_widened_is_not_read(tmp_path, own_cache, monkeypatch):
    folder = tmp_path / "model"
    folder.mkdir()
    write_gguf(folder / "tiny.gguf")
    ours = gguf_files.readable(str(folder))
    monkeypatch.setattr(gguf_files, "version", {"transformers": "5.17.0"}.get)
    theirs = gguf_files.readable(str(folder))
    assert ours != theirs and theirs.endswith("-transformers-5.17.0")
    monkeypatch.undo()
    monkeypatch.setenv("COMPRESSIBLE_CACHE", str(own_cache))
    monkeypatch.setattr(gguf_files, "_write", lambda *_: pytest.fail("widened anew"))
    assert gguf_files.readable(str(folder)) == ours


def test_a_file_whose_merges_are_lost_is_not_kept(tmp_path, own_cache, monkeypatch):
    from transformers import AutoTokenizer

    folder = tmp_path / "model"
    folder.mkdir()
    write_gguf(folder / "tiny.gguf")
    with monkeypatch.context() as patch:
        patch.setattr(AutoTokenizer, "from_pretrained", lambda *_, **__: letters(5000))
        with pytest.raises(DataError, match=r"^the tokenizer, of 5000 entries.*merges are lost.*transformers>=5\.18"):
            cd.load_encoder(str(folder), 2)
    assert not list(own_cache.glob("widened/*/"))
    assert cd.load_encoder(str(folder), 2)[0].config.num_labels == 2  # since the guard had kept nothing


def test_a_cache_that_cannot_be_written_is_said_before_a_file_is_widened(tmp_path, monkeypatch):
    (tmp_path / "cache").write_text("a file where the cache should be")
    monkeypatch.setenv("COMPRESSIBLE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "tiny.gguf").write_bytes(b"never read")
    with pytest.raises(DataError, match=r"tiny\.gguf is widened once.*cannot be written.*COMPRESSIBLE_CACHE names"):
        cd.load_causal_lm(str(tmp_path / "model"))


def test_folders_of_several_files_or_of_none_that_can_be_read_are_refused(tmp_path, own_cache):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "one.gguf").write_bytes(b"GGUF but no more")
    with pytest.raises(DataError, match=r"cannot read .*one\.gguf"):
        cd.load_causal_lm(str(folder))
    assert not list(own_cache.glob("widened/*/*.json"))
    (folder / "two.gguf").write_bytes(b"")
    with pytest.raises(DataError, match=r"holds one\.gguf, two\.gguf, expected one GGUF file"):
        cd.load_causal_lm(str(folder))


def tiny_words():
    """A tokenizer of WORDS with marks of start and end; others are unknown."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    names = ["<pad>", "<s>", "</s>", "<unk>", *WORDS]
    inner = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    marks = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, **marks)


def tiny_decoder(kind="Gemma3", seed=0):
    import transformers

    sizes = {"vocab_size": len(WORDS) + 4, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 1, "intermediate_size": 32, "pad_token_id": 0, "eos_token_id": 2}
    sizes |= {"head_dim": 8} if kind == "Gemma3" else {}
    config = getattr(transformers, "Gemma3TextConfig" if kind == "Gemma3" else f"{kind}Config")(**sizes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, f"{kind}ForCausalLM")(config)
    for value in model.parameters():
        value.data.mul_(4)  # so that words differ in their odds
    return model.eval()


ROWS = text.Rows(
    [("name[Mill]",), ("name[Mill], near[bar]",), ("name[Mill]",)],
    ["The Mill is a pub.", "The Mill is a cafe near a bar.", "Mill is a pub"], "rows",
)  # fmt: skip


def test_only_answers_are_asked_for_and_end_with_the_mark():
    tokenizer = tiny_words()
    found = prompts.continued(ROWS, tokenizer, "clean", 64)
    ids, labels = found.tokens["input_ids"], found.labels
    for row, (prompt, answer) in enumerate(zip(prompts.prompts(ROWS.texts), ROWS.labels, strict=True)):
        start = tokenizer(prompt)["input_ids"]
        end = [*tokenizer(answer, add_special_tokens=False)["input_ids"], 2]
        count = len(start) + len(end)
        assert ids[row, :count].tolist() == [*start, *end] and found.tokens["attention_mask"][row].sum() == count
        assert labels[row, : len(start)].eq(tasks.IGNORED).all() and labels[row, len(start) : count].tolist() == end
        assert labels[row, count:].eq(tasks.IGNORED).all() and ids[row, count:].eq(0).all()
    assert found.references[0] == ("The Mill is a pub.", "Mill is a pub") == found.references[2]


def test_long_rows_are_cut_or_dropped_by_the_protocol():
    tokenizer = tiny_words()
    cut = prompts.continued(ROWS, tokenizer, "clean", 6)
    assert len(cut) == 3 and (cut.labels != tasks.IGNORED).sum(1).tolist() == [6, 6, 5]
    kept = prompts.continued(ROWS, tokenizer, "authors", 8)  # the second meaning has more, the second answer, too
    assert [row[0] for row in kept.texts] == ["name[Mill]", "name[Mill]"]
    with pytest.raises(ValueError, match="no row of rows has at most 3 word pieces"):
        prompts.continued(ROWS, tokenizer, "authors", 3)


def letters(pieces):
    """A tokenizer of single characters with a vocabulary of so many pieces, as one that has lost its merges."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    known = [*map(chr, range(32, 127)), "<eos>", *(f"piece{at}" for at in range(pieces - 96))]
    backend = Tokenizer(models.BPE({piece: at for at, piece in enumerate(known)}, []))
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<eos>")


def test_a_tokenizer_that_lost_its_merges_is_refused(own_cache):
    told = (
        r"of 5000 entries, cuts texts of \d+ characters into \d+ pieces.*merges are lost.*transformers>=5\.18.*widened"
    )
    with pytest.raises(DataError, match=told):
        prompts.continued(ROWS, letters(5000), "clean", 64)
    assert len(prompts.continued(ROWS, letters(96), "clean", 64)) == len(ROWS.labels)  # characters by design


def test_a_classifier_whose_tokenizer_lost_its_merges_is_refused(tmp_path, own_cache):
    save_bert(tmp_path / "bert")
    cd.load_encoder(str(tmp_path / "bert"), 2)
    letters(5000).save_pretrained(tmp_path / "bert")
    for load in (cd.load_tokenizer, lambda name: cd.load_encoder(name, 2)):
        with pytest.raises(DataError, match=r"of 5000 entries, cuts texts of \d+ characters into \d+ pieces"):
            load(str(tmp_path / "bert"))


def test_vocabularies_of_many_single_characters_are_no_lost_merges():
    """A tokenizer of characters by design, as CANINE's, has no entry that it could have kept whole."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    known = {chr(0x4E00 + at): at for at in range(3000)}
    word_pieces.expect_words(PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(known, []))))


@pytest.fixture
def small_wordnet(tmp_path, own_cache, monkeypatch):
    monkeypatch.setenv("COMPRESSIBLE_DATA", str(tmp_path))
    monkeypatch.setenv("COMPRESSIBLE_MANIFEST", "")
    monkeypatch.setenv("COMPRESSIBLE_OFFLINE", "1")
    write_wordnet(tmp_path)
    return tmp_path


def test_words_are_explained_by_their_glosses(small_wordnet):
    train, held = (text.read_rows("wordnet-glosses", split) for split in text.SPLITS)
    words = [{row.partition(" ")[0] for (row,) in rows.texts} for rows in (train, held)]
    assert len(words[0] | words[1]) == 301 and len(words[1]) == 30 and not words[0] & words[1]
    pairs = [*zip([row for (row,) in train.texts + held.texts], train.labels + held.labels, strict=True)]
    assert len(pairs) == 300 + 100 + 1 + 1 and len(set(pairs)) == len(pairs)
    assert {gloss for row, gloss in pairs if row == "aaaer (noun)"} == {
        "a round thing that is found in the sea", "another meaning of it"
    }  # fmt: skip
    assert ("aaaer (verb)", "make round") in pairs and ("placed (adjective)", "standing before its noun") in pairs
    assert text.read_rows("wordnet-glosses", "train") == train
    task = cd.load_causal_task("wordnet-glosses", tiny_words(), "clean", 32)
    assert (task.kind, task.metric, len(task.train)) == ("causal", "bleu", len(train.labels))
    assert len(text.data_digests("wordnet-glosses")) == 4 and task.sources == ("wordnet, train", "wordnet, validation")


def test_where_wordnet_cannot_be_had_it_is_said_what_to_do(small_wordnet):
    (small_wordnet / "wordnet" / "data.verb").unlink()
    with pytest.raises(DataError, match=r"cannot get wordnet/data\.verb(?s:.*)what to do: set COMPRESSIBLE_DATA"):
        cd.load_causal_task("wordnet-glosses", tiny_words())
    with pytest.raises(DataError, match="wordnet-glosses is not on the hub"):
        text.read_rows("wordnet-glosses", "train", "hub")
    for name, wrong in (("stsb", "unknown|expected"), ("wordnet-glosse", "wordnet-glosses")):
        with pytest.raises(ValueError, match=wrong):
            cd.load_causal_task(name, tiny_words())


WORDNET = [name for name in load_manifest() if name.startswith("wordnet/data.")]


@pytest.mark.skipif(
    None in map(find, WORDNET) and os.environ.get("COMPRESSIBLE_NETWORK_TESTS") != "1",
    reason="needs WordNet's files in the cache, or COMPRESSIBLE_NETWORK_TESTS=1",
)
def test_glosses_of_wordnet_itself():
    train, held = (text.read_rows("wordnet-glosses", split) for split in text.SPLITS)
    words = [{row.partition(" ")[0] for (row,) in rows.texts} for rows in (train, held)]
    assert [len(each) for each in words] == [3600, 400] and not words[0] & words[1]
    assert [len(train.labels), len(held.labels)] == [5523, 629]
    assert all(0 < len(gloss) <= 60 and ";" not in gloss for gloss in train.labels + held.labels)


def greedy(model, tokenizer, prompt, longest):
    """The likeliest word each time, one prompt alone and without a cache."""
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    start = ids.shape[1]
    for _ in range(longest):
        word = model(input_ids=ids, use_cache=False).logits[0, -1].argmax()
        ids = torch.cat((ids, word[None, None]), 1)
        if word == tokenizer.eos_token_id:
            break
    return tokenizer.decode(ids[0, start:], skip_special_tokens=True).strip()


@pytest.mark.parametrize("kind", ["Gemma3", "Qwen2"])
def test_prompts_of_unequal_lengths_are_answered_as_each_alone(kind):
    tokenizer, model = tiny_words(), tiny_decoder(kind)
    given = ["The Mill is a pub near a bar.", "Mill", "a cafe near", "The Mill"]
    alone = [greedy(model, tokenizer, each, 9) for each in given]
    assert len(set(alone)) > 1
    for rows in (1, 3, 64):
        assert written_texts(model, tokenizer, given, beams=1, longest=9, rows=rows) == alone
    wide = written_texts(model, tokenizer, given, beams=4, longest=9)
    assert wide == [written_texts(model, tokenizer, [each], beams=4, longest=9)[0] for each in given]
    with pytest.raises(ValueError, match="beams is 0, expected an integer >= 1"):
        written_texts(model, tokenizer, given, beams=0)


def test_a_model_of_two_halves_writes_from_another_text(tmp_path):
    from compressible.data.pretrained import writes_from_another

    model, tokenizer = cd.load_seq2seq(str(save_t5(tmp_path)))
    assert writes_from_another(str(tmp_path))
    for value in model.parameters():
        value.data.mul_(3)
    given = ["a pub", "The Mill near a cafe"]
    ids = [tokenizer(each, return_tensors="pt") for each in given]
    said = [model.generate(**each, max_new_tokens=6, num_beams=2, do_sample=False) for each in ids]
    alone = [tokenizer.decode(each[0], skip_special_tokens=True).strip() for each in said]
    assert written_texts(model, tokenizer, given, beams=2, longest=6) == alone
    assert tiny_unigram().eos_token_id == tokenizer.eos_token_id


def test_a_merged_run_writes_as_its_adapters_do_and_leaves_the_base():
    tokenizer, model = tiny_words(), tiny_decoder()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rows = prompts.continued(ROWS, tokenizer, "clean", 64)
    task = cd.Task("mine", "causal", 0, "bleu", rows, rows)
    run = cd.FineTuningRun(cd.DeepLoraConfig(r=4, variant="thin", init_scale=0.5, target_modules=["q_proj"]), lr=0.05)
    [history] = cd.fine_tune(model, [run], task, steps=4, batch_size=3, show_progress=False)
    merged, ids = merged_model(history), rows.tokens["input_ids"]
    theirs, ours = history.model()(input_ids=ids).logits, merged(input_ids=ids).logits
    assert torch.allclose(theirs, ours, atol=1e-4) and not torch.allclose(ours, model(input_ids=ids).logits, atol=1e-2)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.fixture
def no_wordnet(monkeypatch, tmp_path, own_cache):
    pytest.importorskip("nltk")
    written_metrics._found_wordnet.cache_clear()
    monkeypatch.setattr(written_metrics, "_nltk_wordnet", lambda: (_ for _ in ()).throw(LookupError("none")))
    monkeypatch.setenv("COMPRESSIBLE_DATA", str(tmp_path / "local"))
    monkeypatch.setenv("COMPRESSIBLE_OFFLINE", "1")
    yield tmp_path / "local" / "wordnet"
    written_metrics._found_wordnet.cache_clear()


def test_metrics_are_those_of_their_packages(no_wordnet):
    pytest.importorskip("rouge_score")
    same = written_metrics.written_scores(["The Mill is a pub."], ["The Mill is a pub."])
    assert same == pytest.approx(dict.fromkeys(["BLEU", "ROUGE-1", "ROUGE-2", "ROUGE-L", "ROUGE-Lsum"], 1.0))
    assert "wordnet/" in written_metrics.without_meteor()
    # three of five words of which two pairs stand together: by hand
    found = written_metrics.written_scores(["The Mill is good"], ["The Mill was good indeed"])
    precision, recall = 3 / 4, 3 / 5
    assert found["ROUGE-1"] == found["ROUGE-L"] == pytest.approx(2 * precision * recall / (precision + recall))
    assert found["ROUGE-2"] == pytest.approx(2 * (1 / 3) * (1 / 4) / (1 / 3 + 1 / 4))
    with pytest.raises(ValueError, match="1 texts and 2 references"):
        written_metrics.written_scores(["a"], ["a", "b"])


def test_sentences_in_another_order_count_for_one_metric_only(no_wordnet):
    pytest.importorskip("rouge_score")
    found = written_metrics.written_scores(
        ["It is near a bar. The Mill is good."], ["The Mill is good. It is near a bar."]
    )
    assert found["ROUGE-Lsum"] == pytest.approx(1.0) and found["ROUGE-L"] < 0.7


def test_meteor_takes_words_of_equal_meaning(no_wordnet, monkeypatch):
    noun = "00000000 06 n 02 cafe 0 bar 0 000 | a place to sit  \n"
    files = {f"{kind}.{part}": "  the licence\n" for kind in ("index", "data") for part in ("adj", "adv", "verb")}
    files |= {f"{part}.exc": "odd even\n" for part in ("adj", "adv", "noun", "verb")} | {"data.noun": noun}
    files["index.noun"] = "".join(f"{word} n 1 0 1 0 00000000  \n" for word in ("bar", "cafe"))
    no_wordnet.mkdir(parents=True)
    for name, content in files.items():
        (no_wordnet / name).write_text(content)
    write_manifest(no_wordnet / "manifest.toml", {f"wordnet/{name}": (c.encode(), []) for name, c in files.items()})
    monkeypatch.setenv("COMPRESSIBLE_MANIFEST", str(no_wordnet / "manifest.toml"))
    near, far = (written_metrics.written_scores([f"It is a {word}"], ["It is a bar"]) for word in ("cafe", "pub"))
    assert near["METEOR"] == pytest.approx(1 - 0.5 * (1 / 4) ** 3)  # four words in one piece
    assert far["METEOR"] == pytest.approx(0.75 * (1 - 0.5 * (1 / 3) ** 3))
    assert near["BLEU"] == far["BLEU"] and written_metrics.without_meteor() == ""


def test_contents_of_what_is_kept_name_every_file(tmp_path, own_cache):
    folder = tmp_path / "model"
    folder.mkdir()
    write_gguf(folder / "tiny.gguf")
    kept = gguf_files.readable(str(folder))
    listed = json.loads((own_cache / "widened" / kept.rpartition("/")[2] / "contents.json").read_text())
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(listed)
