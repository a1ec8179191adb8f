"""Tiny models of many architectures, drawn at random, and the steps that all tests of adapters in peft take."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import compressible as cd

VARIANTS = ("compressed", "thin", "full")
VOCABULARY = 48
LLAMA = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
         "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 32, "pad_token_id": 0,
         "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
BERT = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 2, "max_position_embeddings": 32, "num_labels": 3}  # fmt: skip
GPT2 = {"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "pad_token_id": 0,
        "bos_token_id": 1, "eos_token_id": 2, "num_labels": 3}  # fmt: skip
T5 = {"vocab_size": VOCABULARY, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2,
      "decoder_start_token_id": 0}  # fmt: skip
VIT = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 8,
       "patch_size": 4, "num_labels": 3}  # fmt: skip

# A class of transformers, its configuration's class, and the sizes.
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", LLAMA),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT2),
    "t5": ("T5ForConditionalGeneration", "T5Config", T5),
    "vit": ("ViTForImageClassification", "ViTConfig", VIT),
    "mpnet": ("MPNetForSequenceClassification", "MPNetConfig", BERT),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", LLAMA | {"num_local_experts": 4}),
    "bert": ("BertForSequenceClassification", "BertConfig", BERT),
}
SHAPES = ("llama", "gpt2", "t5", "vit", "mpnet", "mixtral")
# What a user of peft names for each: peft's own defaults, with the layers of a feed-forward net.
TARGETS = {
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "t5": ["q", "k", "v", "o", "wi", "wo"],
    "vit": "all-linear",
    "mpnet": ["q", "k", "v", "o", "intermediate.dense", "output.dense"],
    "mixtral": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "bert": "all-linear",
}


def base(kind: str, seed: int = 0, **changes: Any) -> nn.Module:
    """A model of `kind` with weights drawn from `seed`, in eval mode."""
    import transformers

    model, config, sizes = MODELS[kind]
    torch.manual_seed(seed)
    return getattr(transformers, model)(getattr(transformers, config)(**(sizes | changes))).eval()


def batch(kind: str, rows: int = 3, seed: int = 1, labels: bool = True) -> dict[str, torch.Tensor]:
    """Inputs of a model of `kind`, with labels."""
    generator = torch.Generator().manual_seed(seed)
    classes = {"labels": torch.arange(rows) % 3} if labels else {}
    if kind == "vit":
        return {"pixel_values": torch.randn(rows, 3, 8, 8, generator=generator)} | classes
    ids = torch.randint(3, VOCABULARY, (rows, 6), generator=generator)
    found = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if kind in ("bert", "mpnet"):
        return found | classes
    if kind == "t5":
        return found | ({"labels": ids.flip(1)} if labels else {"decoder_input_ids": ids.flip(1)})
    return found | ({"labels": ids} if labels else {})


def config(**options: Any) -> Any:
    """A DeepLoraConfig whose updates are large enough to be seen."""
    return cd.DeepLoraConfig(**({"r": 4, "init_scale": 0.3, "variant": "thin"} | options))


def compress(model: nn.Module, loss: Callable[[], torch.Tensor], name: str = "default") -> None:
    cd.compress_adapters(model, loss, adapter_name=name, generator=torch.Generator().manual_seed(4))


def adapt(model: nn.Module, given: dict[str, torch.Tensor], name: str = "default", **options: Any) -> nn.Module:
    """The model with an adapter `name`, compressed where it is of that variant."""
    import peft

    settings = config(**options)
    torch.manual_seed(3)
    adapted = peft.get_peft_model(model, settings, adapter_name=name)
    if options.get("variant") == "compressed":
        compress(adapted, lambda: adapted(**given).loss, name)
    return adapted


def train(model: nn.Module, given: dict[str, torch.Tensor], steps: int = 3, lr: float = 0.1) -> nn.Module:
    """A few steps of AdamW with the two rates of the method."""
    optimizer = torch.optim.AdamW(cd.param_groups(model, lr=lr))
    for _ in range(steps):
        optimizer.zero_grad()
        model(**given).loss.backward()
        optimizer.step()
    return model.eval()


def logits(model: nn.Module, given: dict[str, torch.Tensor], **more: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**given, **more).logits


def close(found: torch.Tensor, expected: torch.Tensor, bound: float = 1e-5) -> None:
    """Equal up to the order of sums in float32."""
    torch.testing.assert_close(found, expected, rtol=bound, atol=bound)


def differ(found: torch.Tensor, other: torch.Tensor, at_least: float = 1e-3) -> None:
    """Not the same function, so that equalities beside it say something."""
    assert (found - other).abs().max() > at_least


def trainable(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}


def rows(count: int = 4, size: int = 8) -> torch.Tensor:
    """Inputs of a plain net."""
    return torch.randn(count, size, generator=torch.Generator().manual_seed(5))


def copied(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def unchanged(model: nn.Module, before: dict[str, torch.Tensor]) -> None:
    """The model has the tensors that it had, under the names that it had."""
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(value, before[name]) for name, value in after.items())
