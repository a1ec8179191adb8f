"""Tiny tokenizers and models with real word pieces, and folders laid out as the hub's cache lays them out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import compressible as cd

PAIRS = [
    ("A man with a hard hat is dancing .", "A man wearing a hard hat is dancing ."),
    ("A child rides a horse .", "A young child is riding a horse along the beach while nobody looks ."),
    ("Rates rose .", "The bank raised its rates ."),
    ("A plane is taking off .", "An air plane is taking off ."),
    ("It rained all day in the hills , and on the coast too .", "The sun was out ."),
]


def tiny_tokenizer():
    """A WordPiece tokenizer of the words of PAIRS, letters and digits."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = sorted({word.lower() for pair in PAIRS for text in pair for word in text.split()})
    letters = [letter for one in "abcdefghijklmnopqrstuvwxyz0123456789" for letter in (one, f"##{one}")]
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *dict.fromkeys([*words, *letters])]
    inner = Tokenizer(models.WordPiece({name: i for i, name in enumerate(names)}, unk_token="[UNK]"))
    inner.normalizer = normalizers.BertNormalizer(lowercase=True)
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        model_max_length=512, model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )  # fmt: skip


def tiny_unigram():
    """A Unigram tokenizer with an end mark, as T5's is."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,[]▁"
    inner = Tokenizer(models.Unigram([("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((x, -3.0) for x in letters)], 2))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def rated_task():
    """Twelve rows of nine tokens each, rated from 0 to 5, as both parts of a task."""
    ids = torch.randint(5, 40, (12, 9), generator=torch.Generator().manual_seed(0))
    tokens = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    part = cd.Examples(tokens, torch.linspace(0, 5, 12), (("",),) * 12)
    return cd.Task("toy", "regression", 1, "pearson", part, part)


def save_bert(folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """A BERT of two narrow layers, saved without a classifier but with a pooler."""
    from transformers import BertConfig, BertModel

    tokenizer = tiny_tokenizer()
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(5)
    model = BertModel(BertConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **sizes))
    model.pooler.dense.bias.data.fill_(0.5)
    model.to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_t5(folder: Path) -> Path:
    """A T5 of one narrow layer a side."""
    from transformers import T5Config, T5ForConditionalGeneration

    tokenizer = tiny_unigram()
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    model = T5ForConditionalGeneration(T5Config(vocab_size=len(tokenizer), decoder_start_token_id=0, **sizes))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def hub_cache(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, files: dict[str, bytes]) -> Path:
    """The hub's cache at `folder`, off-line, with one repository such as "models--owner--name" in it."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    commit = "0" * 40
    (folder / name / "refs").mkdir(parents=True, exist_ok=True)
    (folder / name / "refs" / "main").write_text(commit)
    snapshot = folder / name / "snapshots" / commit
    snapshot.mkdir(parents=True, exist_ok=True)
    for file, content in files.items():
        (snapshot / file).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / file).write_bytes(content)
    return snapshot
