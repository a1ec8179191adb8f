"""Layers that are more than x W^T + b, or whose weight others read: refused by name, or right in all they are for."""

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from adapter_helpers import LLAMA, adapt, base, batch, close, config, copied, differ, logits, rows, unchanged
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrizations, prune

import compressible as cd

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")


def net(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(*layers).eval()


# weights that are read without a call


def wavlm() -> tuple[nn.Module, dict]:
    settings = transformers.WavLMConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, conv_dim=(8, 8),
        conv_kernel=(10, 3), conv_stride=(5, 2), num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2,
        num_labels=3, num_feat_extract_layers=2, classifier_proj_size=8, apply_spec_augment=False)  # fmt: skip
    sound = torch.randn(3, 400, generator=torch.Generator().manual_seed(1))
    return transformers.WavLMForSequenceClassification(settings), {"input_values": sound, "labels": torch.arange(3)}


def mobilebert() -> tuple[nn.Module, dict]:
    settings = transformers.MobileBertConfig(
        vocab_size=48, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
        embedding_size=8, intra_bottleneck_size=8, max_position_embeddings=32)  # fmt: skip
    ids = batch("bert", labels=False)["input_ids"]
    return transformers.MobileBertForMaskedLM(settings), {"input_ids": ids, "labels": ids}


def mamba() -> tuple[nn.Module, dict]:
    settings = transformers.MambaConfig(vocab_size=48, hidden_size=16, state_size=4, num_hidden_layers=1)
    ids = batch("bert", labels=False)["input_ids"]
    return transformers.MambaForCausalLM(settings), {"input_ids": ids, "labels": ids}


class Called(nn.Module):
    """A module whose forward takes x and gives a loss, in the way of transformers' models."""

    def __init__(self, inner: nn.Module, call: Callable[[nn.Module, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.inner, self.call = inner, call

    def forward(self, x: torch.Tensor):
        out = self.call(self.inner, x)
        return transformers.modeling_outputs.SequenceClassifierOutput(loss=out.square().mean(), logits=out)


class Reader(nn.Module):
    """Uses the weight of one layer itself, and calls the other."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.called = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.called(functional.linear(x, self.read.weight, self.read.bias).tanh())


def reader() -> tuple[nn.Module, dict]:
    return Called(Reader(), lambda inner, x: inner(x)), {"x": rows()}


def attention() -> tuple[nn.Module, dict]:
    layer = nn.MultiheadAttention(8, 2, batch_first=True)
    return Called(layer, lambda inner, x: inner(x[None], x[None], x[None])[0]), {"x": rows()}


def encoder_layer() -> tuple[nn.Module, dict]:
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
    return Called(layer, lambda inner, x: inner(x[None])), {"x": rows()}


READERS = {"wavlm": wavlm, "mobilebert": mobilebert, "mamba": mamba, "reader": reader, "attention": attention,
           "encoder_layer": encoder_layer}  # fmt: skip


@pytest.mark.parametrize("name", READERS)
def test_layers_whose_weight_is_read_are_refused_or_take_part(name):
    """In training and without gradients, where nn.TransformerEncoderLayer takes another way."""
    torch.manual_seed(0)
    model, given = READERS[name]()
    plain = copied(model)
    try:
        adapted = peft.get_peft_model(model.eval(), config())
    except ValueError as refused:
        assert "exclude_modules" in str(refused)
        unchanged(model, plain)
        return
    try:
        adapted(**given).loss.backward()
    except RuntimeError as refused:
        assert "exclude_modules" in str(refused)
        return
    assert all(value.grad is not None for value in adapted.parameters() if value.requires_grad)
    expected = adapted(**given).logits
    close(logits(adapted, given), expected)
    close(logits(adapted.merge_and_unload(), given), expected)


# layers with a forward pass of their own


class Scaled(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 3 * super().forward(x)


class Rounded(nn.Linear):
    """Quantises its weight on the way, as training for few bits does."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, (self.weight * 4).round() / 4, self.bias)


class Noisy(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + torch.randn(self.out_features)


class Clipped(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).clamp(-0.1, 0.1)


class Pair(nn.Linear):
    """Megatron's convention: output and bias apart."""

    def forward(self, x: torch.Tensor) -> tuple:
        return functional.linear(x, self.weight), self.bias


class Named(nn.Linear):
    """A subclass that adds a name and no forward pass."""


class Same(nn.Linear):
    """Its forward pass is written out, as in Falcon, and means the same."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight.T + self.bias


class Doubled(nn.Embedding):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 2


@pytest.mark.parametrize("kind", [Scaled, Rounded, Noisy, Clipped, Pair])
def test_a_linear_layer_with_another_forward_pass_is_refused_or_merges_right(kind):
    torch.manual_seed(0)
    model = net(kind(8, 8), nn.Tanh(), nn.Linear(8, 3))
    before = copied(model)
    try:
        adapted = peft.get_peft_model(model, config(target_modules=["0", "2"]))
    except (ValueError, TypeError) as refused:
        assert "0" in str(refused) and kind.__name__ in str(refused)
        unchanged(model, before)
        return
    expected = adapted(rows())
    close(adapted.merge_and_unload()(rows()), expected)


@pytest.mark.parametrize("kind", [Named, Same])
def test_a_linear_layer_under_another_name_is_adapted(kind):
    torch.manual_seed(0)
    model = peft.get_peft_model(net(kind(8, 8), nn.Tanh(), nn.Linear(8, 3)), config(target_modules=["0", "2"]))
    expected = model(rows())
    close(model.merge_and_unload()(rows()), expected)


def test_a_scaled_embedding_is_refused_or_merges_right(tmp_path):
    torch.manual_seed(0)
    model, ids = net(Doubled(12, 8), nn.Linear(8, 3)), torch.arange(12)
    before = copied(model)
    try:
        adapted = peft.get_peft_model(model, config(target_modules=["0"]))
    except (ValueError, TypeError) as refused:
        assert "Doubled" in str(refused)
        unchanged(model, before)
        return
    expected = adapted(ids)
    cd.save_as_lora(adapted, tmp_path)
    torch.manual_seed(0)
    close(peft.PeftModel.from_pretrained(net(Doubled(12, 8), nn.Linear(8, 3)), tmp_path)(ids), expected)
    close(adapted.merge_and_unload()(ids), expected)


@pytest.mark.parametrize("kind", ["Gemma3TextModel", "BartModel"])
def test_word_embeddings_that_transformers_scales_are_right_or_refused(kind, tmp_path):
    def make() -> nn.Module:
        torch.manual_seed(0)
        if kind == "BartModel":
            settings = transformers.BartConfig(
                vocab_size=48, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
                decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, scale_embedding=True)  # fmt: skip
            return transformers.BartModel(settings).eval()
        return transformers.Gemma3TextModel(transformers.Gemma3TextConfig(**(LLAMA | {"head_dim": 8}))).eval()

    model, given = make(), {"input_ids": batch("llama")["input_ids"]}
    plain = model(**given).last_hidden_state
    try:
        adapted = peft.get_peft_model(model, config(target_modules=["embed_tokens"], init_scale=1.0))
    except (ValueError, TypeError):
        close(model(**given).last_hidden_state, plain, 0)
        return
    expected = adapted(**given).last_hidden_state
    differ(expected, plain)
    adapted.save_pretrained(tmp_path)
    close(peft.PeftModel.from_pretrained(make(), tmp_path).eval()(**given).last_hidden_state, expected)
    close(adapted.merge_and_unload()(**given).last_hidden_state, expected)


@pytest.mark.parametrize("how", ["weight_norm", "spectral_norm", "orthogonal"])
def test_a_parametrised_weight_is_refused_or_merges_right(how):
    torch.manual_seed(0)
    model = net(getattr(parametrizations, how)(nn.Linear(8, 8)), nn.Tanh(), nn.Linear(8, 3))
    before = copied(model)
    try:
        adapted = peft.get_peft_model(model, config(target_modules=["0", "2"]))
    except (ValueError, TypeError) as refused:
        assert "0" in str(refused)
        unchanged(model, before)
        return
    expected = adapted(rows())
    try:
        merged = adapted.merge_and_unload()
    except (ValueError, RuntimeError, NotImplementedError):
        close(adapted(rows()), expected)
    else:
        close(merged(rows()), expected)


@pytest.mark.parametrize("layer", [
    nn.Conv2d(3, 4, 2), nn.Bilinear(4, 4, 4), nn.LayerNorm(8), nn.GRU(4, 4), nn.ReLU(), nn.LazyLinear(8),
    nn.EmbeddingBag(4, 4),
], ids=lambda layer: type(layer).__name__)  # fmt: skip
def test_what_is_no_linear_layer_is_refused_by_its_name(layer):
    model = net(nn.Linear(8, 8), copy.deepcopy(layer))
    before = {name: type(part) for name, part in model.named_modules()}
    with pytest.raises(ValueError, match=type(layer).__name__):
        peft.get_peft_model(model, config(target_modules=["0", "1"]))
    assert {name: type(part) for name, part in model.named_modules()} == before


# other ways to change a layer's weight or output


def hooked(layer: nn.Linear) -> nn.Module:
    layer.register_forward_hook(lambda module, args, out: 2 * out)
    return layer


def prehooked(layer: nn.Linear) -> nn.Module:
    layer.register_forward_pre_hook(lambda module, args: (args[0].tanh(),))
    return layer


def replaced(layer: nn.Linear) -> nn.Module:
    """A forward pass that was put on the instance, as offloading and patching tools do."""
    plain = layer.forward
    layer.forward = lambda x: 2 * plain(x)
    return layer


def masked(layer: nn.Linear) -> nn.Module:
    return prune.l1_unstructured(layer, "weight", amount=0.5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("change", [nn.utils.weight_norm, nn.utils.spectral_norm, masked, hooked, prehooked, replaced],
                         ids=lambda change: change.__name__)  # fmt: skip
def test_a_layer_that_something_changes_is_refused_or_merges_right(change, tmp_path):
    """A weight that is made anew in each pass forgets what is merged into it; a hook changes what was added, too."""

    def make() -> nn.Module:
        torch.manual_seed(0)
        return net(change(nn.Linear(8, 8)), nn.Tanh(), nn.Linear(8, 3))

    model = make()
    before = model(rows())
    try:
        adapted = peft.get_peft_model(model, config(target_modules=["0", "2"], init_scale=0.7))
    except (ValueError, TypeError) as refused:
        assert "'0'" in str(refused)
        close(model(rows()), before, 0)
        return
    expected = adapted(rows())
    cd.save_as_lora(adapted, tmp_path)
    close(peft.PeftModel.from_pretrained(make(), tmp_path)(rows()), expected)
    try:
        merged = adapted.merge_and_unload()
    except (ValueError, RuntimeError, NotImplementedError) as refused:
        assert "'0'" in str(refused)
        close(adapted(rows()), expected)
    else:
        close(merged(rows()), expected)


class Tied(nn.Module):
    """Small language models often read their embedding's weight as the output layer."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.inner = nn.Embedding(12, 8), nn.Linear(8, 8)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.inner(self.words(ids)).tanh() @ self.words.weight.T


def test_words_that_are_called_and_read_are_refused_or_merge_right():
    torch.manual_seed(0)
    ids = torch.arange(12)[None]
    try:
        adapted = peft.get_peft_model(Tied(), config(target_modules=["words", "inner"], init_scale=0.7))
        expected = adapted(ids)
        merged = adapted.merge_and_unload()
    except (ValueError, RuntimeError) as refused:
        assert "words" in str(refused)
    else:
        close(merged(ids), expected)


def test_conv1d_tells_its_sizes():
    model = adapt(base("gpt2"), batch("gpt2"))
    layer = model.base_model.model.transformer.h[0].attn.c_attn
    assert (layer.in_features, layer.out_features) == (16, 48)
    assert (layer.nx, layer.nf) == (16, 48)


# attributes


def test_a_layer_tells_what_its_base_tells():
    """diffusers and others read sizes from layers that may be adapted."""
    model = peft.get_peft_model(
        net(nn.Embedding(10, 8, padding_idx=0), nn.Linear(8, 6)), config(target_modules=["0", "1"])
    )
    words, linear = model.base_model.model
    assert (linear.in_features, linear.out_features, tuple(linear.weight.shape)) == (8, 6, (6, 8))
    assert linear.bias is linear.get_base_layer().bias
    assert (words.num_embeddings, words.embedding_dim, words.padding_idx) == (10, 8, 0)
    assert tuple(words.weight.shape) == (10, 8)


def test_padding_gets_no_update_and_no_gradient():
    """As nn.Embedding: the row of padding_idx has no gradient, so that its update does not move."""
    torch.manual_seed(0)
    ids = torch.tensor([[0, 3, 0, 5]])
    model = peft.get_peft_model(net(nn.Embedding(10, 8, padding_idx=0), nn.Linear(8, 6)), config(target_modules=["0"]))
    model(ids).square().sum().backward()
    first = next(value for value in model.parameters() if value.requires_grad)
    assert not first.grad[:, 0].any() and first.grad[:, 3].any()


def test_resizing_words_of_an_adapted_embedding_is_right_or_refused():
    model, given = (
        adapt(base("llama"), batch("llama"), target_modules=["embed_tokens", "q_proj"]).eval(),
        batch("llama"),
    )
    expected = logits(model, given)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.get_base_model().resize_token_embeddings(56)
    except (TypeError, ValueError, RuntimeError):
        close(logits(model, given), expected, 0)
    else:
        close(logits(model, given)[..., :48], expected)


@pytest.mark.parametrize("options", [
    {"max_norm": 0.5}, {"sparse": True}, {"scale_grad_by_freq": True}, {"padding_idx": 3},
], ids=str)  # fmt: skip
def test_embeddings_options_are_right_or_refused(options):
    torch.manual_seed(0)
    ids, model = torch.tensor([[1, 1, 3, 7]]), net(nn.Embedding(10, 8, **options), nn.Linear(8, 6))
    before = copied(model)
    try:
        adapted = peft.get_peft_model(model, config(target_modules=["0"], init_scale=0.7))
    except ValueError as refused:
        assert "'0'" in str(refused)
        unchanged(model, before)
        return
    factors = [value for value in adapted.parameters() if value.requires_grad]
    held = [value.detach().clone() for value in factors]
    expected = adapted(ids)
    expected.square().sum().backward()
    assert all(torch.equal(value, old) for value, old in zip(factors, held, strict=True))
    assert all(value.grad is not None and value.grad.any() for value in factors)
    close(adapted.merge_and_unload()(ids), expected)


@pytest.mark.parametrize("bias", ["all", "deep_lora_only"])
def test_trained_biases_are_saved_and_exported(bias, tmp_path):
    def make() -> nn.Module:
        torch.manual_seed(0)
        return net(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))

    model = peft.get_peft_model(make(), config(target_modules=["0"], bias=bias))
    optimizer = torch.optim.SGD(cd.param_groups(model, lr=0.5))
    model(rows()).square().sum().backward()
    optimizer.step()
    expected = model(rows())
    model.save_pretrained(tmp_path / "own")
    cd.save_as_lora(model, tmp_path / "lora")
    for folder in ("own", "lora"):
        close(peft.PeftModel.from_pretrained(make(), tmp_path / folder)(rows()), expected)


def test_a_hook_that_looks_on_is_left_in_place():
    model, seen = net(nn.Linear(8, 8)), []
    model[0].register_forward_hook(lambda module, args, out: seen.append(len(out)))
    adapted = peft.get_peft_model(model, config(target_modules=["0"]))
    adapted(rows(5))
    assert seen[-1] == 5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_words_under_autocast_are_near_what_they_are_without(dtype):
    torch.manual_seed(0)
    adapted = peft.get_peft_model(net(nn.Embedding(10, 8), nn.Linear(8, 6)), config(target_modules=["0", "1"]))
    expected = adapted(torch.arange(10))
    with torch.autocast("cpu", dtype=dtype):
        found = adapted(torch.arange(10))
    close(found.float(), expected, 0.03)
