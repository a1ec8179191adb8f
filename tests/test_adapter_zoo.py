"""Deep LoRA on a tiny model of many architectures: all factors train, and all ways to write it are one function."""

import pytest
import torch
from adapter_helpers import BERT, GPT2, LLAMA, close, compress, config, differ
from torch import nn

import compressible as cd

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

WORDS = torch.randint(3, 48, (3, 6), generator=torch.Generator().manual_seed(1))


def picture(size: int) -> torch.Tensor:
    return torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(1))


IMAGE = picture(8)
SOUND = torch.randn(3, 400, generator=torch.Generator().manual_seed(1))
CLASSES = torch.arange(3)
PICTURES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
            "image_size": 8, "patch_size": 4, "num_labels": 3}  # fmt: skip
WAVES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
         "conv_dim": (8, 8), "conv_kernel": (10, 3), "conv_stride": (5, 2), "num_conv_pos_embeddings": 8,
         "num_conv_pos_embedding_groups": 2, "num_labels": 3, "num_feat_extract_layers": 2,
         "classifier_proj_size": 8, "apply_spec_augment": False}  # fmt: skip
SEQ2SEQ = {"vocab_size": 48, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
           "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "pad_token_id": 0,
           "decoder_start_token_id": 1, "max_position_embeddings": 32}  # fmt: skip
LM = {"input_ids": WORDS, "labels": WORDS}
CLS = {"input_ids": WORDS, "attention_mask": torch.ones_like(WORDS), "labels": CLASSES}
VISION = {"pixel_values": IMAGE, "labels": CLASSES}
AUDIO = {"input_values": SOUND, "labels": CLASSES}

# name: class of the model, of its configuration, sizes, inputs
ZOO: dict[str, tuple[str, str, dict, dict]] = {
    "albert": ("AlbertForSequenceClassification", "AlbertConfig", BERT | {"embedding_size": 8}, CLS),
    "bart": ("BartForConditionalGeneration", "BartConfig", SEQ2SEQ, LM),
    "bert": ("BertForSequenceClassification", "BertConfig", BERT, CLS),
    "bert_mlm": ("BertForMaskedLM", "BertConfig", BERT, LM),
    "bigbird": ("BigBirdForSequenceClassification", "BigBirdConfig", BERT | {"attention_type": "original_full"},
        CLS),
    "bloom": ("BloomForCausalLM", "BloomConfig", {"vocab_size": 48, "hidden_size": 16, "n_layer": 2, "n_head": 2},
        LM),
    "clip_vision": ("CLIPVisionModelWithProjection", "CLIPVisionConfig", PICTURES | {"projection_dim": 8},
        {"pixel_values": IMAGE}),
    "convnext": ("ConvNextForImageClassification", "ConvNextConfig", {"hidden_sizes": [8, 8, 16, 16], "depths": [1,
        1, 1, 1], "num_labels": 3, "image_size": 32}, {"pixel_values": picture(32), "labels": CLASSES}),
    "deberta": ("DebertaForSequenceClassification", "DebertaConfig", BERT | {"pos_att_type": ["c2p", "p2c"],
        "relative_attention": True}, CLS),
    "deberta_v2": ("DebertaV2ForSequenceClassification", "DebertaV2Config", BERT | {"pos_att_type": ["c2p", "p2c"],
        "relative_attention": True}, CLS),
    "dinov2": ("Dinov2ForImageClassification", "Dinov2Config", PICTURES, VISION),
    "distilbert": ("DistilBertForSequenceClassification", "DistilBertConfig", {"vocab_size": 48, "dim": 16,
        "n_layers": 2, "n_heads": 2, "hidden_dim": 24, "num_labels": 3}, CLS),
    "electra": ("ElectraForSequenceClassification", "ElectraConfig", BERT | {"embedding_size": 8}, CLS),
    "falcon": ("FalconForCausalLM", "FalconConfig", {"vocab_size": 48, "hidden_size": 16, "num_hidden_layers": 2,
        "num_attention_heads": 2, "ffn_hidden_size": 24}, LM),
    "fnet": ("FNetForSequenceClassification", "FNetConfig", BERT, {"input_ids": WORDS, "labels": CLASSES}),
    "funnel": ("FunnelForSequenceClassification", "FunnelConfig", {"vocab_size": 48, "d_model": 16, "n_head": 2,
        "d_head": 8, "d_inner": 24, "block_sizes": [1, 1], "num_labels": 3, "num_decoder_layers": 1}, CLS),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", LLAMA | {"head_dim": 8, "query_pre_attn_scalar": 8}, LM),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", LLAMA | {"head_dim": 8}, LM),
    "gpt_neo": ("GPTNeoForCausalLM", "GPTNeoConfig", {"vocab_size": 48, "hidden_size": 16, "num_layers": 2,
        "num_heads": 2, "intermediate_size": 24, "attention_types": [[["global", "local"], 1]],
        "max_position_embeddings": 32}, LM),
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", LLAMA, LM),
    "gptj": ("GPTJForCausalLM", "GPTJConfig", GPT2 | {"rotary_dim": 4}, LM),
    "gpt_oss": ("GptOssForCausalLM", "GptOssConfig", LLAMA | {"head_dim": 8, "num_local_experts": 4,
        "num_experts_per_tok": 2}, LM),
    "gpt2": ("GPT2ForSequenceClassification", "GPT2Config", GPT2, CLS),
    "granite": ("GraniteForCausalLM", "GraniteConfig", LLAMA, LM),
    "hubert": ("HubertForSequenceClassification", "HubertConfig", WAVES, AUDIO),
    "ibert": ("IBertForSequenceClassification", "IBertConfig", BERT, CLS),
    "layoutlm": ("LayoutLMForSequenceClassification", "LayoutLMConfig", BERT, CLS),
    "longformer": ("LongformerForSequenceClassification", "LongformerConfig", BERT | {"attention_window": 4}, CLS),
    "mamba": ("MambaForCausalLM", "MambaConfig", {"vocab_size": 48, "hidden_size": 16, "state_size": 4,
        "num_hidden_layers": 1}, LM),
    "mamba2": ("Mamba2ForCausalLM", "Mamba2Config", {"vocab_size": 48, "hidden_size": 16, "state_size": 8,
        "num_hidden_layers": 1, "num_heads": 4, "head_dim": 8, "n_groups": 1, "chunk_size": 4}, LM),
    "mobilebert": ("MobileBertForMaskedLM", "MobileBertConfig", BERT | {"embedding_size": 8,
        "intra_bottleneck_size": 8}, LM),
    "modernbert": ("ModernBertForSequenceClassification", "ModernBertConfig", BERT | {"pad_token_id": 0,
        "global_attn_every_n_layers": 2}, CLS),
    "mpt": ("MptForCausalLM", "MptConfig", {"vocab_size": 48, "d_model": 16, "n_layers": 2, "n_heads": 2,
        "expansion_ratio": 2, "max_seq_len": 32}, LM),
    "nystromformer": ("NystromformerForSequenceClassification", "NystromformerConfig", BERT |
        {"segment_means_seq_len": 6, "num_landmarks": 2}, CLS),
    "olmo2": ("Olmo2ForCausalLM", "Olmo2Config", LLAMA, LM),
    "opt": ("OPTForCausalLM", "OPTConfig", {"vocab_size": 48, "hidden_size": 16, "ffn_dim": 24, "num_hidden_layers":
        2, "num_attention_heads": 2, "max_position_embeddings": 32, "word_embed_proj_dim": 8}, LM),
    "phi": ("PhiForCausalLM", "PhiConfig", LLAMA, LM),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", LLAMA, LM),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", LLAMA | {"head_dim": 8}, LM),
    "qwen3_moe": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", LLAMA | {"head_dim": 8, "num_experts": 4,
        "num_experts_per_tok": 2, "moe_intermediate_size": 16, "mlp_only_layers": [0]}, LM),
    "roberta": ("RobertaForSequenceClassification", "RobertaConfig", BERT | {"pad_token_id": 0}, CLS),
    "segformer": ("SegformerForImageClassification", "SegformerConfig", {"hidden_sizes": [8, 8], "depths": [1, 1],
        "num_encoder_blocks": 2, "num_attention_heads": [2, 2], "sr_ratios": [1, 1], "patch_sizes": [3, 3], "strides":
        [2, 2], "mlp_ratios": [2, 2], "num_labels": 3}, VISION),
    "siglip_vision": ("SiglipVisionModel", "SiglipVisionConfig", PICTURES, {"pixel_values": IMAGE}),
    "squeezebert": ("SqueezeBertForSequenceClassification", "SqueezeBertConfig", BERT | {"embedding_size": 16,
        "q_groups": 1, "k_groups": 1, "v_groups": 1, "intermediate_groups": 1, "output_groups": 1,
        "post_attention_groups": 1}, CLS),
    "swin": ("SwinForImageClassification", "SwinConfig", {"embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2],
        "window_size": 2, "image_size": 16, "patch_size": 2, "num_labels": 3}, {"pixel_values": picture(16), "labels":
        CLASSES}),
    "switch": ("SwitchTransformersForConditionalGeneration", "SwitchTransformersConfig", {"vocab_size": 48,
        "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "num_experts": 2,
        "decoder_start_token_id": 0, "expert_capacity": 64}, LM),
    "unispeech_sat": ("UniSpeechSatForSequenceClassification", "UniSpeechSatConfig", WAVES, AUDIO),
    "wav2vec2": ("Wav2Vec2ForSequenceClassification", "Wav2Vec2Config", WAVES, AUDIO),
    "wavlm": ("WavLMForSequenceClassification", "WavLMConfig", WAVES, AUDIO),
    "xglm": ("XGLMForCausalLM", "XGLMConfig", {"vocab_size": 48, "d_model": 16, "ffn_dim": 24, "num_layers": 2,
        "attention_heads": 2, "max_position_embeddings": 32}, LM),
    "xlnet": ("XLNetForSequenceClassification", "XLNetConfig", {"vocab_size": 48, "d_model": 16, "n_layer": 2,
        "n_head": 2, "d_inner": 24, "num_labels": 3}, CLS),
    "yoso": ("YosoForSequenceClassification", "YosoConfig", BERT | {"use_expectation": True}, CLS),
}  # fmt: skip


def made(name: str) -> nn.Module:
    model, settings, sizes, _ = ZOO[name]
    if not hasattr(transformers, model):
        pytest.skip(f"this transformers has no {model}")
    torch.manual_seed(0)
    return getattr(transformers, model)(getattr(transformers, settings)(**sizes)).eval()


def output(model: nn.Module, name: str) -> torch.Tensor:
    out = model(**ZOO[name][3])
    return next(out[key] for key in ("logits", "image_embeds", "pooler_output", "last_hidden_state") if key in out)


def loss(model: nn.Module, name: str) -> torch.Tensor:
    out = model(**ZOO[name][3])
    return out["loss"] if out.get("loss") is not None else output(model, name).square().mean()


def reached(name: str) -> set[str]:
    """Names of layers whose own weight the loss depends on: an adapter elsewhere could not train."""
    model = made(name)
    loss(model, name).backward()
    used = {n for n, value in model.named_parameters() if value.grad is not None and value.grad.any()}
    return {n.removesuffix(".weight") for n in used if n.endswith(".weight")}


def refused(name: str, error: Exception) -> list[str]:
    """The layers that an error names as those to leave out."""
    text = str(error)
    assert "exclude_modules" in text, text
    found = [n for n, _ in made(name).named_modules() if n and (f"'{n}'" in text or f".{n}'" in text)]
    assert found, text
    return found


def started(name: str, variant: str, excluded: list[str]) -> nn.Module:
    model = peft.get_peft_model(made(name), config(variant=variant, init_scale=0.5, exclude_modules=excluded or None))
    if variant == "compressed":
        compress(model, lambda: loss(model, name))
    loss(model, name).backward()
    return model


def right_or_refused(name: str, variant: str) -> nn.Module:
    """The adapted model; where an error says what to exclude, that is done."""
    excluded: list[str] = []
    for _ in range(12):
        try:
            return started(name, variant, excluded)
        except (ValueError, RuntimeError) as error:
            excluded += refused(name, error)
    raise AssertionError(f"{name} is still refused without {excluded}")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("variant", ["compressed", "thin"])
@pytest.mark.parametrize("name", ZOO)
def test_every_architecture_trains_and_is_saved_exported_and_merged_right(name, variant, tmp_path):
    plain, model = output(made(name), name).detach(), right_or_refused(name, variant)
    alive = {
        n.removeprefix("base_model.model.").split(".deep_lora")[0]: value.grad is not None and bool(value.grad.any())
        for n, value in model.named_parameters() if value.requires_grad and "deep_lora" in n
    }  # fmt: skip
    assert alive and not {n for n, moves in alive.items() if not moves} & reached(name)
    with torch.no_grad():
        expected = output(model, name)
        differ(expected, plain, 1e-5)
        model.save_pretrained(tmp_path / "own")
        close(output(peft.PeftModel.from_pretrained(made(name), tmp_path / "own").eval(), name), expected)
        try:
            cd.save_as_lora(model, tmp_path / "lora")
        except ValueError as error:  # dense layers under experts' names
            assert "exclude_modules" in str(error) and not (tmp_path / "lora").exists()
        else:
            close(output(peft.PeftModel.from_pretrained(made(name), tmp_path / "lora").eval(), name), expected, 1e-4)
        close(output(model.merge_and_unload(safe_merge=True), name), expected, 1e-4)
