"""A layer with Deep LoRA: the paper's starts, the update against its formula, and the products of a whole model."""

from __future__ import annotations

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import compressible as cd
from compressible.adapters.layer import DeepLoraLayer
from compressible.runtime.chain import inner_products, product, reference, updated


def config(**options) -> cd.DeepLoraConfig:
    usual = {"r": 4, "variant": "compressed", "init_weights": False, "init_scale": 0.6, "target_modules": ["0", "2"]}
    return cd.DeepLoraConfig(**(usual | options))


def two_layers() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 6))


def rows() -> Tensor:
    return torch.linspace(-1, 1, 60).reshape(5, 12)


def layers(model: nn.Module) -> list[DeepLoraLayer]:
    return [layer for layer in model.modules() if isinstance(layer, DeepLoraLayer)]


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize(("variant", "width"), [("full", 8), ("thin", 4)])
def test_random_starts_are_orthogonal_of_the_papers_scale(variant, width):
    model = peft.get_peft_model(two_layers(), config(variant=variant, init_scale=0.01))
    for factor in layers(model)[0].deep_lora_factors["default"]:
        values = torch.linalg.svdvals(factor.double())
        assert len(values) == min(factor.shape) and width in factor.shape
        torch.testing.assert_close(values, torch.full_like(values, 0.01), rtol=1e-5, atol=0)


def test_a_compressed_start_without_gradient_is_frames_around_the_identity():
    for layer in layers(peft.get_peft_model(two_layers(), config(depth=4))):
        first, *inner, last = layer.deep_lora_factors["default"]
        assert len(inner) == 4 and all(torch.equal(factor, 0.6 * torch.eye(4)) for factor in inner)
        torch.testing.assert_close(first @ first.mT, torch.eye(4), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(last.mT @ last, torch.eye(4), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variant", ["compressed", "thin", "full"])
def test_the_update_is_the_product_applied_to_the_inputs(variant):
    model = peft.get_peft_model(two_layers(), config(variant=variant))
    layer = layers(model)[0]
    chain = list(layer.deep_lora_factors["default"])
    expected = layer.get_base_layer()(rows()) + rows() @ product(chain).mT
    torch.testing.assert_close(layer(rows()), expected)
    torch.testing.assert_close(layer.get_delta_weight("default"), product(chain))


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
def test_the_fast_way_is_the_plain_one(kind, autocast):
    torch.manual_seed(0)
    factors = [torch.randn(shape).div(4).requires_grad_() for shape in [(4, 12), (4, 4), (4, 4), (8, 4)]]
    results = []
    for way in (reference, updated):
        x, result = torch.ones(3, 5, 12, dtype=kind).requires_grad_(), torch.ones(3, 5, 8, dtype=autocast or kind)
        with torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None):
            out = way(result, x, factors)
            assert torch.is_autocast_enabled("cpu") is (autocast is not None)
        grads = torch.autograd.grad(out.float().square().sum(), [x, *factors])
        results.append([out, *grads])
    for fast, plain in zip(*results, strict=True):
        assert fast.dtype is plain.dtype
        torch.testing.assert_close(fast, plain)


def test_dropout_is_on_the_updates_inputs_in_training_alone():
    model = peft.get_peft_model(two_layers(), config(lora_dropout=0.9))
    torch.manual_seed(1)
    assert not torch.equal(model(rows()), model(rows()))
    model.eval()
    assert torch.equal(model(rows()), model(rows()))


def test_ranks_follow_their_pattern():
    model = peft.get_peft_model(two_layers(), config(rank_pattern={"2": 6}))
    assert [layer.deep_lora_factors["default"][0].shape[0] for layer in layers(model)] == [4, 6]


def test_factors_are_set_by_shape_and_make_an_adapter_ready():
    model = peft.get_peft_model(two_layers(), config(init_weights=True))
    layer = layers(model)[0]
    assert not layer.is_compressed("default")
    with pytest.raises(ValueError, match=r"factors of \[\(1, 1\)\], expected \[\(4, 12\)"):
        layer.set_factors("default", [torch.ones(1, 1)])
    with pytest.raises(RuntimeError, match=r"'default'.* no factors yet: call compress_adapters"):
        layer(rows())
    layer.set_factors("default", [torch.ones_like(factor) for factor in layer.deep_lora_factors["default"]])
    assert layer.is_compressed("default") and layer(rows()).isfinite().all()


def test_float64_stays_float64():
    model = peft.get_peft_model(two_layers().double(), config())
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    expected = model(rows().double())
    torch.testing.assert_close(model.merge_and_unload()(rows().double()), expected, rtol=1e-12, atol=1e-12)


# the products of a whole model at once


def alone(model: nn.Module, x: Tensor) -> Tensor:
    """A pass without the model's hooks, in which each layer multiplies its own factors."""
    return model.base_model.model(x)


@pytest.mark.parametrize("depth", [3, 4])
def test_products_of_a_model_give_each_layers_gradients(depth):
    model = peft.get_peft_model(two_layers(), config(depth=depth))
    results = []
    for way in (model, lambda x: alone(model, x)):
        out = way(rows())
        out.square().sum().backward()
        results.append((out.detach(), gradients(model)))
    (fast, fast_gradients), (plain, plain_gradients) = results
    torch.testing.assert_close(fast, plain)
    assert fast_gradients.keys() == plain_gradients.keys() and len(fast_gradients) == 2 * (depth + 2)
    for name, gradient in plain_gradients.items():
        torch.testing.assert_close(fast_gradients[name], gradient)
    assert not any(layer.deep_lora_inner for layer in layers(model))


def test_layers_that_the_loss_does_not_reach_get_no_gradient_and_parts_go_back_one_by_one():
    torch.manual_seed(0)
    chains = [[torch.randn(4, 4, requires_grad=True) for _ in range(5)] for _ in range(3)]
    products = inner_products(chains)
    products[0].sum().backward()
    assert chains[0][1].grad is not None and chains[1][1].grad is None and chains[0][0].grad is None
    products[2].sum().backward()
    expected = torch.autograd.grad(product(chains[2][1:-1]).sum(), chains[2][1:-1])
    for factor, gradient in zip(chains[2][1:-1], expected, strict=True):
        torch.testing.assert_close(factor.grad, gradient)


def test_products_to_which_no_gradient_comes_back_pass_none_on():
    class Silent(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *products: Tensor) -> Tensor:
            return sum(products)

        @staticmethod
        def backward(ctx, grad: Tensor) -> tuple[None, ...]:
            return None, None

    chains = [[torch.randn(4, 4, requires_grad=True) for _ in range(5)] for _ in range(2)]
    Silent.apply(*inner_products(chains)).sum().backward()
    assert all(factor.grad is None for chain in chains for factor in chain)


def test_gradients_of_gradients_are_those_of_plain_products():
    torch.manual_seed(0)
    chains = [[torch.randn(3, 3, dtype=torch.float64, requires_grad=True) for _ in range(5)] for _ in range(2)]
    inner = [factor for chain in chains for factor in chain[1:-1]]

    def penalty(products: list[Tensor]) -> list[Tensor]:
        first = torch.autograd.grad(sum(p.square().sum() for p in products), inner, create_graph=True)
        return list(torch.autograd.grad(sum(g.square().sum() for g in first), inner))

    fast = penalty(list(inner_products(chains)))
    for found, expected in zip(fast, penalty([product(chain[1:-1]) for chain in chains]), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_layers_do_the_same_when_they_are_run_again(reentrant):
    class Checkpointed(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(super().forward, x, use_reentrant=reentrant)

    model = peft.get_peft_model(Checkpointed(*two_layers()), config())
    x = rows().requires_grad_()
    model(x).square().sum().backward()
    found = gradients(model)
    plain = nn.Sequential(*model.base_model.model)
    plain(x).square().sum().backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(found[name], gradient)


def test_a_weight_that_the_model_computes_with_is_told_and_one_that_it_asks_is_not():
    class Asks(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.to(self[0].weight.dtype).to(self[0].weight.device))

    class Computes(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return x @ self[0].weight.T

    assert peft.get_peft_model(Asks(*two_layers()), config())(rows()).shape == (5, 6)
    model = peft.get_peft_model(Computes(*two_layers()), config())
    with pytest.raises(
        RuntimeError, match=r"weight of '0' itself, which misses its update: name it in exclude_modules"
    ):
        model(rows())
