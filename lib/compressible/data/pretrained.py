"""Pretrained models and their tokenizers by name, with a new head as a protocol wants it.

A name is "minilm" (all-MiniLM-L6-v2) or "mpnet" (all-mpnet-base-v2, of BERT-base's shape), both checked against
manifest.toml, a folder, or a name on the hub; a folder of that name below COMPRESSIBLE_MODELS goes first. Weights are
read from safetensors files, or one GGUF file, and are float32 in memory, whatever the file holds. Protocols (trap T3):
  clean    new head N(0, 0.02) with zero bias, to be trained; the pretrained pooler is kept
  authors  new head of truncated LeCun normal with zero bias, to stay frozen; the pooler starts anew, N(0, 0.02), its
           bias stays 0
"""

from __future__ import annotations

import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from compressible.data import gguf_files, hub
from compressible.data.bounds import SourceError
from compressible.data.manifest import DataError
from compressible.data.tasks import PROTOCOLS, Task, load_task
from compressible.data.word_pieces import expect_words
from compressible.runtime import checks, devices

KNOWN = ("minilm", "mpnet", "gemma3-270m", "bert-base-cased", "google-t5/t5-base")
DEVIATION = 0.02
TRUNCATED = 0.87962566103423978  # standard deviation of a unit normal cut at 2, by which JAX divides


def load_encoder(name: str, outputs: int, protocol: str = "clean", seed: int = 0) -> tuple[nn.Module, Any]:
    """An encoder with a new head, and its tokenizer.

    Args:
        name: "minilm", "mpnet", a folder, or a name on the hub, as explained above.
        outputs: outputs of the head: 1 for a regression, else the number of classes.
        protocol: "clean" or "authors": how head and pooler start, and what stays frozen.
        seed: all that head and pooler depend on; drawing them leaves torch's own generator alone.

    Returns:
        (model, tokenizer), the model in float32 and evaluation mode on the CPU.

    Raises:
        ValueError: for an unknown protocol, or outputs < 1.
        DataError: if the model cannot be had; it says what was tried and what to do.

    Example:
        >>> import compressible as cd
        >>> model, tokenizer = cd.load_encoder("minilm", outputs=1)  # doctest: +SKIP
        >>> model.classifier.weight.shape  # doctest: +SKIP
        torch.Size([1, 384])

    Reference:
        "authors": P1's code, cjyaras/deep-lora-transformers, which trains neither head nor the pooler's bias.
    """
    if protocol not in PROTOCOLS:
        raise ValueError(checks.unknown("protocol", protocol, PROTOCOLS))
    checks.expect("outputs", outputs, outputs >= 1, "an integer >= 1")
    problem = "regression" if outputs == 1 else "single_label_classification"
    settings = {"num_labels": outputs, "problem_type": problem, "ignore_mismatched_sizes": True}
    model, tokenizer = _load("AutoModelForSequenceClassification", name, settings), load_tokenizer(name)
    if model.config.pad_token_id is None:  # by which decoders find the last token of a row
        model.config.pad_token_id = tokenizer.pad_token_id
    head, pooler = new_parts(model)
    generator = torch.Generator().manual_seed(seed)
    for layer in head:
        _restart(layer, generator, lecun=protocol == "authors")
        layer.requires_grad_(protocol == "clean")
    for layer in pooler if protocol == "authors" else []:
        _restart(layer, generator, lecun=False)
        layer.bias.requires_grad_(False)
    return model.eval(), tokenizer


def load_for_task(
    encoder: str,
    task: str,
    protocol: str = "clean",
    max_length: int = 128,
    validation_rows: int = 0,
    device: str = "cpu",
    seed: int = 0,
) -> tuple[nn.Module, Task]:
    """An encoder with a head for a task, and the task tokenised for it.

    Args:
        encoder, protocol, seed: as for `load_encoder`.
        task, max_length: as for `load_task`.
        validation_rows: only the first so many validation examples, 0 for all.
        device: "cpu", "cuda", "cuda:N" or "auto", for the model; the task's rows stay on the CPU.

    Returns:
        (model, task).

    Raises:
        ValueError, DataError: as `load_encoder` and `load_task` do, and if validation_rows is negative.

    Example:
        >>> import compressible as cd
        >>> model, task = cd.load_for_task("minilm", "vader-tweets", validation_rows=100)  # doctest: +SKIP
        >>> len(task.train), len(task.validation)  # doctest: +SKIP
        (3360, 100)
    """
    checks.expect("validation_rows", validation_rows, validation_rows >= 0, "an integer >= 0")
    place = devices.resolve_device(device)
    loaded = load_task(task, load_tokenizer(encoder), protocol, max_length)
    model, _ = load_encoder(encoder, loaded.outputs, protocol, seed)
    rows = range(min(validation_rows or len(loaded.validation), len(loaded.validation)))
    return model.to(place), replace(loaded, validation=loaded.validation.take(rows))


def load_causal_lm(name: str) -> tuple[nn.Module, Any]:
    """A language model that goes on with a text, such as Gemma, and its tokenizer.

    Args:
        name: "gemma3-270m", 268 million parameters on Gemma's own terms, to which COMPRESSIBLE_ACCEPT=gemma agrees; a
            folder, in the hub's format or with one GGUF file; or a name on the hub.

    Returns:
        (model, tokenizer), the model in float32 and evaluation mode on the CPU. A GGUF file's numbers are widened once:
        that takes a minute, and 4 bytes a parameter stay in the cache.

    Raises:
        DataError: if the model cannot be had; it says what was tried and what to do.

    Example:
        >>> import compressible as cd
        >>> model, tokenizer = cd.load_causal_lm("gemma3-270m")  # doctest: +SKIP
        >>> model.config.num_hidden_layers, len(tokenizer)  # doctest: +SKIP
        (18, 262144)

    Reference:
        Gemma Team 2025, Gemma 3; it stands in for T5 in P1's Table 2.
    """
    return _load("AutoModelForCausalLM", name, {}).eval(), load_tokenizer(name)


def load_seq2seq(name: str) -> tuple[nn.Module, Any]:
    """A model that writes text, such as T5, and its tokenizer.

    Args:
        name: a folder, or a name on the hub, such as "google-t5/t5-base".

    Returns:
        (model, tokenizer), the model in float32 and evaluation mode on the CPU.

    Raises:
        DataError: if the model cannot be had; it says what was tried and what to do.

    Example:
        >>> import compressible as cd
        >>> model, tokenizer = cd.load_seq2seq("google-t5/t5-base")  # doctest: +SKIP

    Reference:
        P1's Table 2 (E2E) fine-tunes T5-base.
    """
    return _load("AutoModelForSeq2SeqLM", name, {}).eval(), load_tokenizer(name)


def writes_from_another(name: str) -> bool:
    """Whether a model by name writes a text from another, as T5 does, rather than goes on with it; DataError."""
    return bool(_load("AutoConfig", name, {}).is_encoder_decoder)


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a model, which pads at the end, with the mark of the end if it has no padding of its own.

    Args:
        name: "minilm", "mpnet", a folder, or a name on the hub, as explained above.

    Returns:
        A tokenizer of transformers.

    Raises:
        DataError: if it cannot be had, or has lost its merges; it says what was tried and what to do.

    Example:
        >>> import compressible as cd
        >>> cd.load_tokenizer("minilm")("A man is eating.")["input_ids"]  # doctest: +SKIP
        [101, 1037, 2158, 2003, 5983, 1012, 102]
    """
    tokenizer = _load("AutoTokenizer", name, {"padding_side": "right"})
    expect_words(tokenizer)
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is not None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def new_parts(model: Any) -> tuple[list[nn.Linear], list[nn.Linear]]:
    """(head, pooler): the linear layers of a classifier beyond its encoder, and those of its pooler."""
    return [layer for _, layer in _beyond(model)], [layer for name, layer in _linear(model) if _pools(name)]


def head_layers(model: nn.Module) -> list[str]:
    """Names of the linear layers of a classifier's head, which no pretraining has seen; a pooler's are not among them.

    They are what a protocol leaves as it is (exclude_modules) or trains (modules_to_save): "classifier" of BERT,
    "classifier.dense" and "classifier.out_proj" of RoBERTa, "score" of GPT-2, and so on.

    Args:
        model: a model for sequence classification, as of `load_encoder`.

    Returns:
        Their names, in the order of the model.

    Raises:
        ValueError: if there is no head.

    Example:
        >>> import compressible as cd
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
        >>> cd.head_layers(BertForSequenceClassification(BertConfig(vocab_size=9, **sizes)))
        ['classifier']
    """
    encoder = getattr(model, getattr(model, "base_model_prefix", ""), None)
    names = [name for name, _ in _beyond(model)] if isinstance(encoder, nn.Module) else []
    if not names:
        kind = type(model).__name__
        raise ValueError(f"{kind} has no classification head, expected a model of load_encoder, as for sequences")
    return names


def _linear(model: nn.Module) -> list[tuple[str, nn.Linear]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def _pools(name: str) -> bool:
    return "pooler" in name.split(".")


def _beyond(model: Any) -> list[tuple[str, nn.Linear]]:
    """The linear layers that are neither the encoder's, nor a pooler's, nor those that write words."""
    inner, words = f"{model.base_model_prefix}.", model.get_output_embeddings()
    return [
        (name, layer)
        for name, layer in _linear(model)
        if not name.startswith(inner) and layer is not words and not _pools(name)
    ]


def _load(kind: str, name: str, settings: dict) -> Any:
    """transformers' `kind` of a name, quietly, with one error for all that can be wrong."""
    try:
        import transformers
    except ImportError as error:
        raise DataError("transformers is not installed: pip install 'compressible-dynamics[adapters]'") from error
    place = gguf_files.readable(hub.find_model(name))
    if kind not in ("AutoTokenizer", "AutoConfig"):
        settings = settings | {"dtype": torch.float32, "attn_implementation": "sdpa", "use_safetensors": True}
    try:
        # Layers that a checkpoint lacks are drawn from the global generator: leave it as it was.
        with hub.quiet(), torch.random.fork_rng(devices=[]):
            return _from_pretrained(getattr(transformers, kind), hub.place_of(place), settings)
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(_cannot(name, place, error)) from error


def _from_pretrained(kind: Any, place: str, settings: dict) -> Any:
    """The model with the attention that is asked for, or with its own where it has no such."""
    try:
        return kind.from_pretrained(place, **settings)
    except ValueError as error:
        if "attn_implementation" not in settings or "attention" not in str(error):
            raise
        own = {name: value for name, value in settings.items() if name != "attn_implementation"}
        return kind.from_pretrained(place, **own)


def _cannot(name: str, place: str, error: Exception) -> str:
    below = os.environ.get("COMPRESSIBLE_MODELS")
    tried = [f"COMPRESSIBLE_MODELS: no folder {Path(below) / name}" if below else "COMPRESSIBLE_MODELS: not set"]
    came = str(error) if isinstance(error, SourceError) else checks.one_line(error)
    tried.append(f"{'the folder' if Path(place).is_dir() else 'the hub,'} {place}: {came}")
    if not isinstance(error, (OSError, SourceError)):  # the files were there
        return f"cannot use the model {name!r} of {tried[-1]}"
    message = hub.failure(f"model {name!r}", tried, "COMPRESSIBLE_MODELS")
    return message if name in KNOWN else f"{message}\nOr is it misspelt? {checks.unknown('model', name, KNOWN)}."


@torch.no_grad()
def _restart(layer: nn.Linear, generator: torch.Generator, lecun: bool) -> None:
    deviation = math.sqrt(1 / layer.in_features) / TRUNCATED if lecun else DEVIATION
    if lecun:
        nn.init.trunc_normal_(layer.weight, 0.0, deviation, -2 * deviation, 2 * deviation, generator)
    else:
        layer.weight.normal_(0.0, deviation, generator=generator)
    if layer.bias is not None:
        layer.bias.zero_()
