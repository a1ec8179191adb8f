"""Models and rows to time: shapes with random weights, random tokens that fill every row; values move no clock.

Decoders are of published shapes: Qwen2.5-0.5B's (494 M parameters, 151,936 words) and Gemma-3 270M's (268 M, 262,144
words), both with tied words, and a tiny one for a CPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from compressible.data.examples import Examples
from compressible.data.pretrained import load_encoder
from compressible.data.tasks import Task

SHAPE = "bert-base"  # BertConfig's defaults, random weights; a name that is none of ours is load_encoder's
_QWEN: dict[str, Any] = {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24}
_QWEN |= {"num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151_936, "tie_word_embeddings": True}
_GEMMA: dict[str, Any] = {"hidden_size": 640, "intermediate_size": 2048, "num_hidden_layers": 18, "head_dim": 256}
_GEMMA |= {"num_attention_heads": 4, "num_key_value_heads": 1, "vocab_size": 262_144, "sliding_window": 512}
_TINY = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "vocab_size": 1000}
DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2.5-0.5b": ("Qwen2", _QWEN),
    "gemma-3-270m": ("Gemma3", _GEMMA),
    "tiny-decoder": ("Qwen2", _QWEN | _TINY | {"num_attention_heads": 4}),
}


def load_shape(name: str, seed: int = 0) -> nn.Module:
    """Return "bert-base" with one output or one of DECODERS, random weights; other names are load_encoder's."""
    if name in DECODERS:
        return _decoder(*DECODERS[name], seed)
    if name != SHAPE:
        return load_encoder(name, 1, "clean", seed)[0]
    from transformers import BertConfig, BertForSequenceClassification

    head: dict[str, Any] = {"num_labels": 1, "attn_implementation": "sdpa"}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return BertForSequenceClassification(BertConfig(**head)).eval()


def random_task(vocabulary: int, rows: int, length: int, seed: int = 0, causal: bool = False) -> Task:
    """Return a task on `rows` random rows of `length` tokens, all of them attended to: a regression, or `causal`.

    A causal language model is asked for every word but the first of each row.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocabulary, (rows, length), generator=generator)
    labels = ids.clone() if causal else torch.rand(rows, generator=generator)
    part = Examples({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, labels, texts=())
    kind, outputs, metric = ("causal", 0, "bleu") if causal else ("regression", 1, "pearson")
    return Task("random tokens", kind, outputs, metric, part, part)


def task_of(model: Any, rows: int, length: int) -> Task:
    """Return the random task that a model of `load_shape` is made for."""
    return random_task(model.config.vocab_size, rows, length, causal=writes(model))


def writes(model: Any) -> bool:
    """Whether a model of transformers' is a causal language model."""
    return model.get_output_embeddings() is not None


def _decoder(kind: str, sizes: dict[str, Any], seed: int) -> nn.Module:
    import transformers

    config: Any = transformers.Qwen2Config if kind == "Qwen2" else transformers.Gemma3TextConfig
    model: Any = transformers.Qwen2ForCausalLM if kind == "Qwen2" else transformers.Gemma3ForCausalLM
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return model(config(**sizes, attn_implementation="sdpa")).eval()
