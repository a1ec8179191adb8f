"""A language model of .26 million parameters, trained in seconds on the task's own texts, where none is at hand.

It stands in for a pretrained model where that would be a download on terms of its own, or minutes on a CPU: what it
shows is that the protocol runs, not what a language model learns of few examples.
"""

from __future__ import annotations

from typing import Any

import torch

from compressible.data.examples import Examples
from compressible.data.prompts import continued, prompts
from compressible.data.text import Rows, read_rows

TINY = "tiny"
PIECES, WIDTH, LAYERS, HEADS, LENGTH = 800, 96, 2, 4, 256
STEPS, BATCH, RATE = 250, 16, 4e-3
MARKS = ["<pad>", "<s>", "</s>"]


def tiny_writer(task: str, seed: int = 0, steps: int = STEPS) -> tuple[Any, Any]:
    """(model, tokenizer): a decoder from a random start after `steps` batches of prompts and answers of a task."""
    rows = read_rows(task, "train")
    tokenizer = _tokenizer(rows)
    given = continued(rows, tokenizer, "clean", LENGTH)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randint(len(given), (steps, BATCH), generator=generator)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # transformers draws weights from it
        model = _model(len(tokenizer))
    return _trained(model, given, order).eval(), tokenizer


def _tokenizer(rows: Rows) -> Any:
    """Bytes, and pairs of them that are frequent in the rows."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=PIECES, special_tokens=MARKS, initial_alphabet=letters, show_progress=False
    )
    inner.train_from_iterator([*prompts(rows.texts), *(f" {label}" for label in rows.labels)], trainer)
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def _model(pieces: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes: dict[str, Any] = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
    sizes |= {"vocab_size": pieces, "intermediate_size": 2 * WIDTH, "max_position_embeddings": LENGTH}
    sizes |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": True}
    return LlamaForCausalLM(LlamaConfig(**sizes, attn_implementation="sdpa"))  # type: ignore[call-arg]


def _trained(model: Any, given: Examples, order: torch.Tensor) -> Any:
    """The model after AdamW's steps, whose rate falls to zero in a line."""
    optimizer = torch.optim.AdamW(model.parameters(), RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, len(order))
    for rows in order:
        tokens, labels = given.batch(rows)
        model(**tokens, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return model
