"""Texts that a fine-tuned language model writes: beam search over many prompts at once, with transformers' generate."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from compressible.data import hub
from compressible.finetuning.run import RunHistory
from compressible.runtime.checks import expect
from compressible.runtime.devices import matmul_precision


def merged_model(history: RunHistory) -> nn.Module:
    """The plain model of a run, its factors added to copies of the weights: it writes as fast as before fine-tuning.

    Raises what `RunHistory.model` raises: for a run that diverged, or whose factors were not kept.
    """
    adapted: Any = history.model()
    return copy.deepcopy(adapted).merge_and_unload()  # frozen weights are shared with the base, which stays as it is


@torch.no_grad()
def written_texts(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    beams: int = 4,
    longest: int = 64,
    rows: int = 64,
    precision: str = "float32",
) -> list[str]:
    """The texts that a model writes for prompts, in their order: the likeliest that beam search finds.

    Args:
        model: a causal language model, which goes on with a prompt, or one that writes a text from another, as T5 does.
        tokenizer: its tokenizer.
        prompts: N texts.
        beams: width of the search, 1 takes the likeliest word each time; usually 4.
        longest: word pieces of a text at most, the mark of the end with it.
        rows: prompts side by side, each with its beams; more are faster, up to what rows x beams x vocabulary weighs.
        precision: of products of matrices, "float32" or "tf32".

    Returns:
        N texts without marks and without spaces at their ends.

    Raises:
        ValueError: if a number is below 1.

    Example:
        >>> import compressible as cd
        >>> from compressible.finetuning.writing import written_texts
        >>> model, tokenizer = cd.load_causal_lm("gemma3-270m")  # doctest: +SKIP
        >>> written_texts(model, tokenizer, ["The capital of France is"], longest=8)  # doctest: +SKIP
        ['the capital of the country of France.']
    """
    for name, value in (("beams", beams), ("longest", longest), ("rows", rows)):
        expect(name, value, value >= 1, "an integer >= 1")
    order = sorted(range(len(prompts)), key=lambda at: len(prompts[at]))  # like lengths side by side: little padding
    texts = [""] * len(prompts)
    settings = _settings(model, tokenizer, beams, longest)
    with hub.quiet(), matmul_precision(precision):
        for start in range(0, len(order), rows):
            part = order[start : start + rows]
            found = _written(model, tokenizer, [prompts[at] for at in part], settings)
            for at, text in zip(part, found, strict=True):
                texts[at] = text
    return texts


def _settings(model: Any, tokenizer: Any, beams: int, longest: int) -> Any:
    """What generate is told, and nothing of what a model's own file says of how it likes to write."""
    from transformers import GenerationConfig

    start = getattr(model.config, "decoder_start_token_id", None)
    marks = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    return GenerationConfig(
        num_beams=beams, max_new_tokens=longest, do_sample=False, decoder_start_token_id=start, **marks
    )


def _written(model: Any, tokenizer: Any, prompts: list[str], settings: Any) -> list[str]:
    goes_on = not model.config.is_encoder_decoder
    side = "left" if goes_on else "right"  # what goes on must stand at the end
    given = tokenizer(prompts, return_tensors="pt", padding=True, padding_side=side, verbose=False)
    given = {name: value.to(model.device) for name, value in given.items() if name != "token_type_ids"}
    ids = model.generate(**given, generation_config=settings)
    ids = ids[:, given["input_ids"].shape[1] :] if goes_on else ids
    return [text.strip() for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]
