"""Text tasks: which rows, which tokens, which score; and that a local copy and the hub's give the same."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import os
import sys
import tarfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from data_helpers import write_manifest
from text_helpers import PAIRS, hub_cache, save_bert, tiny_tokenizer

from compressible import data
from compressible.data import metrics, tasks, text
from compressible.runtime import checks

REAL = Path(os.environ.get("COMPRESSIBLE_DATA") or "/nowhere")
needs_glue = pytest.mark.skipif(
    not (REAL / "glue-stsb/train.csv.gz").is_file(), reason="needs COMPRESSIBLE_DATA with glue-*/*.csv.gz"
)
VADER = "vader/hutto_ICWSM_2014.tar.gz"
needs_vader = pytest.mark.skipif(
    data.find(VADER) is None and os.environ.get("COMPRESSIBLE_NETWORK_TESTS") != "1",
    reason=f"needs {VADER} in the cache, or COMPRESSIBLE_NETWORK_TESTS=1",
)


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def stsb_rows(count: int) -> pd.DataFrame:
    pairs = [PAIRS[row % len(PAIRS)] for row in range(count)]
    columns = {"sentence1": [f"{a} {row}" for row, (a, _) in enumerate(pairs)], "sentence2": [b for _, b in pairs]}
    return pd.DataFrame(columns | {"score": [round(row % 6 * 0.9, 1) for row in range(count)]})


def rated_archive(lines: list[str]) -> bytes:
    buffer, content = io.BytesIO(), "\r\n".join(lines).encode()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        item = tarfile.TarInfo("hutto_ICWSM_2014/amazonReviewSnippets_GroundTruth.txt")
        item.size = len(content)
        archive.addfile(item, io.BytesIO(content))
    return buffer.getvalue()


@pytest.fixture
def local(tmp_path, monkeypatch):
    """Function {name: content} that writes files into COMPRESSIBLE_DATA, and their manifest."""
    monkeypatch.setenv("COMPRESSIBLE_DATA", str(tmp_path / "local"))
    monkeypatch.setenv("COMPRESSIBLE_CACHE", str(tmp_path / "cache"))

    def write(files: dict[str, bytes]) -> Path:
        for name, content in files.items():
            (tmp_path / "local" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "local" / name).write_bytes(content)
        return write_manifest(tmp_path / "manifest.toml", {name: (content, []) for name, content in files.items()})

    return write


def as_gzip(table: pd.DataFrame) -> bytes:
    buffer = io.BytesIO()
    table.to_csv(buffer, index=False, compression="gzip")
    return buffer.getvalue()


@pytest.fixture
def stsb(local):
    files = {f"glue-stsb/{split}.csv.gz": as_gzip(stsb_rows(n)) for split, n in (("train", 60), ("validation", 20))}
    return local(files)


# rows


def test_local_rows_are_those_of_the_file(stsb):
    rows = text.read_rows("stsb", "train", "local")
    table = stsb_rows(60)
    assert rows.texts == list(zip(table.sentence1, table.sentence2, strict=True))
    assert rows.labels == table.score.tolist() and rows.source == "glue-stsb/train.csv.gz"


def test_texts_that_look_like_missing_values_or_numbers_stay_texts(local):
    table = pd.DataFrame({"sentence": ["NA", "null", "", "1999"], "label": [0, 1, 0, 1]})
    local({"glue-cola/train.csv.gz": as_gzip(table)})
    rows = text.read_rows("cola", "train", "local")
    assert rows.texts == [("NA",), ("null",), ("",), ("1999",)] and rows.labels == [0, 1, 0, 1]


def test_rated_reviews_are_split_whole_and_share_no_text(local):
    lines = [f"{review}_{i}\t{(review - 50) / 20}\treview {review} says {i}" for review in range(100) for i in (1, 2)]
    lines += [f"{review}_3\t0.5\tthe same" for review in range(100)]
    local({VADER: rated_archive(lines)})
    train, held = (text.read_rows("vader-products", split) for split in text.SPLITS)
    reviews = [{text.split()[1] for (text,) in rows.texts if text != "the same"} for rows in (train, held)]
    assert [len(found) for found in reviews] == [80, 20] and not reviews[0] & reviews[1]
    assert len(train.texts) == 160 and len(held.texts) == 60 and not set(train.texts) & set(held.texts)
    assert text.read_rows("vader-products", "train") == train


@needs_vader
@pytest.mark.parametrize(
    ("name", "train", "held"),
    [("tweets", 3360, 840), ("movies", 8483, 2121), ("products", 2907, 798), ("news", 4125, 1065)],
)
def test_rated_sentences_as_published(name, train, held):
    parts = [text.read_rows(f"vader-{name}", split) for split in text.SPLITS]
    assert [len(rows.labels) for rows in parts] == [train, held]
    assert not set(parts[0].texts) & set(parts[1].texts)
    labels = np.array(parts[0].labels + parts[1].labels)
    assert -4 <= labels.min() < -2.5 and 2.5 < labels.max() <= 4


@needs_glue
@pytest.mark.parametrize(
    ("name", "train", "held", "labels"),
    [
        ("stsb", 5749, 1500, (0.0, 5.0)), ("cola", 8551, 1043, (0, 1)), ("sst2", 67349, 872, (0, 1)),
        ("mrpc", 3668, 408, (0, 1)), ("rte", 2490, 277, (0, 1)), ("qnli", 9999, 5463, (0, 1)),
        ("mnli", 9999, 9815, (0, 2)), ("qqp", 9999, 19699, (0, 1)),
    ],
)  # fmt: skip
def test_local_tables_are_whole(name, train, held, labels):
    parts = [text.read_rows(name, split, "local") for split in text.SPLITS]
    assert [len(rows.labels) for rows in parts] == [train, held]
    assert all((min(rows.labels), max(rows.labels)) == labels for rows in parts)
    assert all(isinstance(text, str) and text for rows in parts for texts in rows.texts for text in texts)


@needs_glue
def test_e2e_has_several_right_texts_for_an_input(tokenizer):
    rows = text.read_rows("e2e", "validation", "local")
    assert len(rows.labels) == 4672 and len(set(rows.texts)) == 547
    some = text.Rows(rows.texts[:50], rows.labels[:50], rows.source)
    examples = tasks.examples(some, "generation", tokenizer, "clean", 64)
    assert all(label in known for label, known in zip(some.labels, examples.references, strict=True))
    written = (examples.labels != tasks.IGNORED).sum(1)
    assert examples.labels.shape == (50, written.max()) and len(set(written.tolist())) > 1


@pytest.mark.parametrize("layout", ["main", "converted"])
def test_the_hub_gives_what_the_local_table_gives(stsb, tmp_path, monkeypatch, layout, tokenizer):
    pytest.importorskip("pyarrow")
    known = dataclasses.replace(text.SETS["stsb"], sizes=(60, 20))
    monkeypatch.setitem(text.SETS, "stsb", known)
    files = {"train": stsb_rows(60), "validation": stsb_rows(20), "test": stsb_rows(5)}
    name = "stsb/{}-00000-of-00001.parquet" if layout == "main" else "stsb/{}/0000.parquet"
    hub_cache(
        tmp_path / "hub", monkeypatch, "datasets--nyu-mll--glue",
        {name.format(split): table.rename(columns={"score": "label"}).to_parquet() for split, table in files.items()},
    )  # fmt: skip
    there, here = (tasks.load_task("stsb", tokenizer, source=source) for source in ("hub", "local"))
    assert there.sources == ("hub:nyu-mll/glue/stsb/train", "hub:nyu-mll/glue/stsb/validation")
    for one, other in ((there.train, here.train), (there.validation, here.validation)):
        assert one.texts == other.texts and torch.equal(one.labels, other.labels)
        assert all(torch.equal(value, other.tokens[key]) for key, value in one.tokens.items())
    monkeypatch.delenv("COMPRESSIBLE_DATA")
    assert tasks.load_task("stsb", tokenizer).sources == there.sources  # auto: no local copy


def test_hub_data_of_the_wrong_size_is_refused(tmp_path, monkeypatch):
    pytest.importorskip("pyarrow")
    content = stsb_rows(7).rename(columns={"score": "label"}).to_parquet()
    hub_cache(tmp_path, monkeypatch, "datasets--nyu-mll--glue", {"stsb/train-00000-of-00001.parquet": content})
    with pytest.raises(data.DataError, match="7 rows, expected 5749"):
        text.read_rows("stsb", "train", "hub")


def test_data_that_cannot_be_had_says_what_was_tried_and_what_to_do(tmp_path, monkeypatch):
    pytest.importorskip("pyarrow")
    hub_cache(tmp_path / "hub", monkeypatch, "datasets--nyu-mll--glue", {})
    monkeypatch.setenv("COMPRESSIBLE_DATA", str(tmp_path / "local"))
    monkeypatch.setenv("COMPRESSIBLE_CACHE", str(tmp_path / "cache"))
    with pytest.raises(data.DataError) as caught:
        text.read_rows("mrpc", "train")
    for part in (
        "nyu-mll/glue (mrpc, train)",
        "what to do",
        "COMPRESSIBLE_DATA",
        str(tmp_path / "local" / "glue-mrpc"),
    ):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("stbs", "train"), "unknown task 'stbs'; the closest is 'stsb'"),
        (("stsb", "test"), "unknown split"),
        (("stsb", "train", "web"), "unknown source"),
    ],
)
def test_unknown_names_are_refused_with_the_closest(arguments, message):
    with pytest.raises(ValueError, match=message):
        text.read_rows(*arguments)


def test_rated_sentences_are_not_on_the_hub():
    with pytest.raises(data.DataError, match="not on the hub"):
        text.read_rows("vader-news", "train", "hub")


# tokens


def test_tokens_are_padded_at_the_end_to_the_longest(stsb, tokenizer):
    task = tasks.load_task("stsb", tokenizer)
    train = task.train
    assert (task.kind, task.metric, task.outputs, len(train), len(task.validation)) == (
        "regression",
        "pearson",
        1,
        60,
        20,
    )
    assert set(train.tokens) == {"input_ids", "attention_mask", "token_type_ids"}
    assert all(
        value.dtype == torch.int64 and value.shape == (60, train.lengths.max()) for value in train.tokens.values()
    )
    for row in (0, 7, 33):
        alone = tokenizer(*train.texts[row])
        for name, ids in alone.items():
            padding = tokenizer.pad_token_id if name == "input_ids" else 0
            assert train.tokens[name][row].tolist() == ids + [padding] * (train.tokens[name].shape[1] - len(ids))
    assert train.labels.dtype == torch.float32 and train.labels.max() == pytest.approx(4.5)


def test_protocols_cut_or_drop_long_rows(stsb, tokenizer):
    whole = tasks.load_task("stsb", tokenizer, max_length=500)
    middle = int(whole.train.lengths.median())
    clean, authors = (tasks.load_task("stsb", tokenizer, name, middle) for name in tasks.PROTOCOLS)
    assert len(clean.train) == 60 and len(clean.validation) == 20 and clean.dropped == (0, 0)
    assert clean.train.lengths.tolist() == whole.train.lengths.clamp(max=middle).tolist()
    short = (
        (whole.train.lengths <= middle).nonzero().flatten(),
        (whole.validation.lengths <= middle).nonzero().flatten(),
    )
    assert 0 < len(short[0]) < 60 and authors.dropped == (60 - len(short[0]), 20 - len(short[1]))
    for part, full, rows in ((authors.train, whole.train, short[0]), (authors.validation, whole.validation, short[1])):
        assert part.texts == full.take(rows).texts and torch.equal(part.labels, full.labels[rows])


def test_batch_is_as_long_as_its_longest_row_rounded_up(stsb, tokenizer):
    train = tasks.load_task("stsb", tokenizer).train
    rows = torch.tensor([[3, 3], [40, 8]])
    tokens, labels = train.batch(rows)
    width = tokens["input_ids"].shape[1]
    longest = int(train.lengths[rows].max())
    assert (
        width % 8 == 0 and longest <= width < longest + 8 and labels.tolist() == train.labels[rows.flatten()].tolist()
    )
    assert tokens["attention_mask"].sum(1).tolist() == train.lengths[rows.flatten()].tolist()
    wide, _ = train.batch(rows, multiple=64)
    assert wide["input_ids"].shape == (4, 64) and (wide["input_ids"][:, longest:] == tokenizer.pad_token_id).all()
    exact, _ = train.batch(rows, multiple=1)
    assert exact["input_ids"].shape == (4, longest)
    with pytest.raises(ValueError, match="multiple is 0"):
        train.batch(rows, multiple=0)


def test_padding_is_the_tokenizers_own():
    train = tasks.Examples(
        {"input_ids": torch.full((2, 3), 9), "attention_mask": torch.ones(2, 3)}, torch.zeros(2), (("a",), ("b",))
    )
    assert train.batch(torch.tensor([0]))[0]["input_ids"][0].tolist() == [9, 9, 9, 0, 0, 0, 0, 0]
    other = dataclasses.replace(train, padding={"input_ids": 1})
    assert other.batch(torch.tensor([0]))[0]["input_ids"][0].tolist() == [9, 9, 9, 1, 1, 1, 1, 1]


def test_taking_and_moving_rows_keeps_them(stsb, tokenizer):
    train = tasks.load_task("stsb", tokenizer).train
    some = train.take([5, 5, 2]).to("cpu")
    assert len(some) == 3 and some.texts == (train.texts[5], train.texts[5], train.texts[2])
    assert (
        torch.equal(some.labels, train.labels[[5, 5, 2]]) and some.lengths.tolist() == train.lengths[[5, 5, 2]].tolist()
    )


# subset


def test_subset_is_fixed_for_ever_and_nested(stsb, tokenizer):
    task = tasks.load_task("stsb", tokenizer)
    assert task.subset(8, 0).tolist() == [11, 3, 20, 13, 2, 59, 53, 48]
    assert task.subset(60, 3).sort().values.tolist() == list(range(60))
    assert task.subset(30, 3).tolist() == task.subset(60, 3).tolist()[:30] != task.subset(30, 4).tolist()


def test_authors_draw_with_replacement(stsb, tokenizer):
    clean, authors = (tasks.load_task("stsb", tokenizer, name) for name in tasks.PROTOCOLS)
    assert len(set(clean.subset(60, 0).tolist())) == 60
    drawn = authors.subset(60, 0)
    assert len(set(drawn.tolist())) < 60 and drawn.min() >= 0 and drawn.max() < 60
    assert torch.equal(drawn, clean.subset(60, 0, replace=True)) and len(authors.subset(1000, 0)) == 1000
    for size, replace in ((61, None), (0, None), (0, True)):
        with pytest.raises(ValueError, match=f"size is {size}"):
            clean.subset(size, 0, replace)


# scores


def task_of(kind: str, metric: str) -> tasks.Task:
    empty = tasks.Examples({}, torch.zeros(0), ())
    return tasks.Task("test", kind, 1, metric, empty, empty)


def test_pearson_of_a_perfect_a_reversed_and_a_constant_prediction():
    task, labels = task_of("regression", "pearson"), np.array([0.0, 1.5, 3.0, 5.0])
    assert task.score(2 * labels[:, None] - 7, labels) == pytest.approx(1)
    assert task.score(-labels, labels) == pytest.approx(-1)
    assert task.score(np.ones((4, 1)), labels) == 0
    assert np.isnan(task.score(np.full((4, 1), np.nan), labels))
    assert task.score(np.array([[1.0], [2.0], [2.0], [3.0]]), labels) == pytest.approx(5 / (2 * 13.6875) ** 0.5)


def test_matthews_and_accuracy_by_hand():
    labels, logits = np.array([0, 0, 1, 1, 1]), np.array([[2.0, 1], [0, 1], [0, 1], [0, 1], [3, 1]])
    assert task_of("classification", "accuracy").score(logits, labels) == pytest.approx(0.6)
    # tp 2, tn 1, fp 1, fn 1
    assert task_of("classification", "matthews").score(logits, labels) == pytest.approx((2 - 1) / 36**0.5)
    assert task_of("classification", "matthews").score(np.ones((5, 2)), labels) == 0
    with pytest.raises(ValueError, match="5 outputs and 4 labels"):
        task_of("classification", "accuracy").score(logits, labels[:4])


def test_written_text_is_scored_by_bleu():
    pytest.importorskip("sacrebleu")
    task = task_of("generation", "bleu")
    references = [["a cheap pub by the river in town"], ["a b c d e", "one two three four"]]
    assert task.score([references[0][0], references[1][1]], references) == pytest.approx(1)
    # Right are six of seven words, five of six pairs, four of five triples and three of four quadruples.
    found = metrics.bleu(["the cat sat on the mat today"], [["no", "the cat sat on the mat now"]])
    assert found == pytest.approx((6 / 7 * 5 / 6 * 4 / 5 * 3 / 4) ** 0.25)


def test_bleu_without_its_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(ImportError, match=r"BLEU needs sacrebleu: pip install 'compressible-dynamics\[adapters\]'"):
        task_of("generation", "bleu").score(["a pub"], [["a pub"]])


# errors before any work


def test_load_task_refuses_what_cannot_be(tokenizer, stsb):
    with pytest.raises(ValueError, match="the closest is 'vader-tweets'"):
        tasks.load_task("vader-tweet", tokenizer)
    with pytest.raises(ValueError, match="unknown protocol 'author'; the closest is 'authors'"):
        tasks.load_task("stsb", tokenizer, "author")
    with pytest.raises(ValueError, match="max_length is 2"):
        tasks.load_task("stsb", tokenizer, max_length=2)
    with pytest.raises(ValueError, match="max_length is '128'"):
        tasks.load_task("stsb", tokenizer, max_length="128")
    with pytest.raises(ValueError, match=r"no row of .* has at most 3"):
        tasks.load_task("stsb", tokenizer, "authors", 3)
    padless = tiny_tokenizer()
    padless.pad_token = None
    with pytest.raises(ValueError, match="no padding token"):
        tasks.load_task("stsb", padless)
    assert checks.one_line(OSError("a\n  b" * 200)).endswith("...")


@needs_glue
def test_tasks_of_the_manifest_have_its_digests():
    known = data.load_manifest()
    for names, files in {
        ("stsb",): ["glue-stsb/train.csv.gz", "glue-stsb/validation.csv.gz"],
        ("vader-tweets",): [VADER],
    }.items():
        assert text.data_digests(*names) == {file: known[file].sha256 for file in files}


def test_models_have_the_digests_of_the_files_that_are_read(tmp_path, monkeypatch):
    known = data.load_manifest()
    monkeypatch.delenv("COMPRESSIBLE_MODELS", raising=False)
    assert text.data_digests("minilm")["minilm/model.safetensors"] == known["minilm/model.safetensors"].sha256
    own = save_bert(tmp_path / "models" / "minilm")
    files = {path.name: data.sha256(path) for path in own.iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= {*files}
    assert text.data_digests(str(own)) == {f"{own}/{name}": digest for name, digest in files.items()}
    monkeypatch.setenv("COMPRESSIBLE_MODELS", str(tmp_path / "models"))
    assert text.data_digests("minilm") == {f"minilm/{name}": digest for name, digest in files.items()}
    (own / "model.safetensors").write_bytes(b"another checkpoint")
    assert text.data_digests("minilm")["minilm/model.safetensors"] != files["model.safetensors"]


def test_what_the_hub_holds_has_digests_too(tmp_path, monkeypatch):
    monkeypatch.delenv("COMPRESSIBLE_MODELS", raising=False)
    monkeypatch.setenv("COMPRESSIBLE_DATA", str(tmp_path / "none"))
    monkeypatch.setenv("COMPRESSIBLE_CACHE", str(tmp_path / "cache"))
    model = {"model.safetensors": b"weights", "config.json": b"{}", "pytorch_model.bin": b"never read"}
    hub_cache(tmp_path / "hub", monkeypatch, "models--owner--name", model)
    tables = {f"stsb/{split}-00000-of-00001.parquet": split.encode() for split in text.SPLITS}
    hub_cache(tmp_path / "hub", monkeypatch, "datasets--nyu-mll--glue", tables)
    found = text.data_digests("owner/name", "stsb")
    expected = {"owner/name/model.safetensors": b"weights", "owner/name/config.json": b"{}"}
    expected |= {f"nyu-mll/glue/stsb/{split}/{split}-00000-of-00001.parquet": split.encode() for split in ("train",)}
    assert found.items() >= {name: hashlib.sha256(content).hexdigest() for name, content in expected.items()}.items()
    assert len(found) == 4
    with pytest.raises(data.DataError, match="owner/other"):
        text.data_digests("owner/other")
