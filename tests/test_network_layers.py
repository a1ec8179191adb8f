"""Factored layers: they are their product's layer, found by name, and start where they say."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn import functional
from torch.nn.utils import parametrizations, prune

import compressible as cd
from compressible.networks import models, starts
from compressible.networks.factorize import factorize, find_layers
from compressible.networks.layers import outer_factors, weight_matrix


def draw(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def factors(shape=(8, 6), width=3, depth=3, seed=0):
    return cd.orthogonal_factors(shape, depth, width, 0.7, torch.Generator().manual_seed(seed))


def test_a_factored_linear_layer_is_the_layer_of_its_product():
    layer, bias, inputs = cd.FactoredLinear(factors(), draw(8)), draw(8), draw(5, 4, 6)
    assert layer.weight.shape == (8, 6)
    assert torch.allclose(layer(inputs), functional.linear(inputs, cd.product(factors()), bias))


@pytest.mark.parametrize("stride, padding, dilation", [(1, 0, 1), (2, 1, 1), (1, "same", 2)])
def test_a_convolution_factored_at_full_rank_by_its_svd_is_the_convolution(stride, padding, dilation):
    plain = nn.Conv2d(3, 7, (3, 2), stride, padding, dilation, dtype=torch.float64)
    left, values, right = torch.linalg.svd(weight_matrix(plain).detach(), full_matrices=False)
    chain, bias = [right, values.diag(), left], plain.bias.detach()
    settings = [(3, 2), (stride, stride), padding if padding == "same" else (padding,) * 2, (dilation, dilation)]
    factored, images = cd.FactoredConv2d(chain, bias, *settings), draw(2, 3, 9, 8)
    assert torch.allclose(factored(images), plain(images), atol=1e-12)
    assert torch.allclose(weight_matrix(factored), weight_matrix(plain), atol=1e-12)


def test_factored_layers_stack_under_vmap():
    layers = [cd.FactoredLinear(factors(seed=seed), draw(8, seed=seed)) for seed in range(3)]
    parameters, buffers = stack_module_state(layers)
    inputs = draw(3, 5, 6)
    stacked = vmap(lambda p, b, x: functional_call(layers[0], (p, b), (x,)))(parameters, buffers, inputs)
    alone = torch.stack([layer(x) for layer, x in zip(layers, inputs, strict=True)])
    assert torch.allclose(stacked, alone)


def test_only_the_first_and_last_factor_are_outer():
    net = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2))
    factorize(net, ["1"], width=2, depth=4)
    assert outer_factors(net) == {"1.factors.0", "1.factors.3"}
    assert outer_factors(net[1]) == {"factors.0", "factors.3"}


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: cd.FactoredLinear([draw(3, 6)]), "expected L >= 2"),
        (lambda: cd.FactoredLinear([draw(3, 6), draw(8, 4)]), "have shapes"),
        (lambda: cd.FactoredLinear(factors(), draw(7)), r"bias has shape \(7,\), expected \(8,\)"),
        (lambda: cd.FactoredConv2d(factors(), None, (3, 3)), "6 columns, expected a multiple of the kernel's 9 taps"),
    ],
)
def test_layers_refuse_what_does_not_fit(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_weight_matrix_wants_a_layer_with_a_matrix():
    with pytest.raises(TypeError, match="module is ReLU, expected Linear"):
        weight_matrix(nn.ReLU())


# names


def test_layers_are_found_by_ends_of_names_or_by_an_expression():
    net = models.vit(width=12, layers=3, heads=2)
    assert list(find_layers(net, ["layers.1.mlp.fc2"])) == ["body.vit.layers.1.mlp.fc2"]
    assert len(find_layers(net, ["q_proj", "v_proj"])) == 6
    assert list(find_layers(net, r".*layers\.[01]\.mlp\.fc1")) == [f"body.vit.layers.{i}.mlp.fc1" for i in (0, 1)]


@pytest.mark.parametrize(
    "names, message",
    [
        (["body.hiden1"], "unknown layer 'body.hiden1'; the closest is 'body.hidden1'"),
        (["body.activation1"], "'body.activation1' is ReLU, expected Linear or Conv2d"),
        (r".*attention", "an expression that matches a matrix's name"),
        ([], "at least one name"),
    ],
)
def test_a_wrong_name_is_told_with_the_nearest(names, message):
    with pytest.raises(ValueError, match=message):
        factorize(models.mlp(6, 6, 2), names, width=2)


def test_layers_that_cannot_be_swapped_are_refused():
    shared = nn.Linear(4, 4)
    with pytest.raises(ValueError, match="expected one that the model uses under one name; it is 1, too"):
        factorize(nn.Sequential(shared, shared), ["0"], width=2)
    with pytest.raises(ValueError, match="2 groups and padding 'zeros', expected one group"):
        factorize(nn.Sequential(nn.Conv2d(4, 4, 3, groups=2)), ["0"], width=2)
    with pytest.raises(ValueError, match="MultiheadAttention may read its weight without calling it"):
        factorize(nn.Sequential(nn.MultiheadAttention(4, 2)), ["out_proj"], width=2)
    net = models.mlp(6, 6, 2)
    factorize(net, ["hidden1"], width=2)
    with pytest.raises(ValueError, match=r"'body\.hidden1' is factored already, expected Linear or Conv2d"):
        factorize(net, ["body.hidden1"], width=2)


class Doubled(nn.Linear):
    def forward(self, inputs):
        return 2 * super().forward(inputs)


class Renamed(nn.Linear):
    """A linear layer with another way to be made."""

    def __init__(self, size: int) -> None:
        super().__init__(size, size)


def tied(part):
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    setattr(net[1], part, getattr(net[0], part))
    return net


def with_hook(register):
    net = nn.Sequential(nn.Linear(4, 4))
    getattr(net[0], register)(lambda *_: None)
    return net


def with_more(add):
    net = nn.Sequential(nn.Linear(4, 4))
    add(net[0])
    return net


WHOLE = {
    "forward": (lambda: nn.Sequential(Doubled(4, 4)), "Doubled has a forward of its own"),
    "forward of one": (
        lambda: with_more(lambda layer: setattr(layer, "forward", layer.forward)), "Linear has a forward of its own",
    ),
    "weight_norm": (lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 4))), "is made anew in each pass"),
    "spectral_norm": (lambda: nn.Sequential(parametrizations.spectral_norm(nn.Conv2d(2, 3, 3))), "is made anew"),
    "weight_norm of old": (lambda: nn.Sequential(nn.utils.weight_norm(nn.Linear(4, 4))), "is made anew"),
    "pruned": (lambda: with_more(lambda layer: prune.random_unstructured(layer, "weight", 0.5)), "is made anew"),
    "pruned bias": (lambda: with_more(lambda layer: prune.random_unstructured(layer, "bias", 0.5)), "is made anew"),
    "lazy": (lambda: nn.Sequential(nn.LazyLinear(4)), "its sizes are not known yet"),
    "tied": (lambda: tied("weight"), "its weight is that of '1', too"),
    "tied bias": (lambda: tied("bias"), "its bias is that of '1', too"),
    "forward hook": (lambda: with_hook("register_forward_hook"), "it has forward_hooks"),
    "pre-hook": (lambda: with_hook("register_forward_pre_hook"), "it has forward_pre_hooks"),
    "backward hook": (lambda: with_hook("register_full_backward_hook"), "it has backward_hooks"),
    "state hook": (lambda: with_hook("register_state_dict_post_hook"), "it has state_dict_hooks"),
    "buffer": (
        lambda: with_more(lambda layer: layer.register_buffer("mean", torch.ones(4))), "Linear has 'mean', too",
    ),
    "parameter": (
        lambda: with_more(lambda layer: setattr(layer, "gain", nn.Parameter(torch.ones(4)))), "has 'gain', too",
    ),
    "module": (lambda: with_more(lambda layer: setattr(layer, "act", nn.ReLU())), "Linear has 'act', too"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated")
@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("names", [["0"], r"\d"])
def test_what_a_factored_layer_cannot_stand_for_is_refused_before_any_change(name, names):
    build, message = WHOLE[name]
    net = build()
    before = list(net.modules())
    with pytest.raises(ValueError, match=f"layer '0' cannot be swapped: .*{message}.*; expected a plain"):
        factorize(net, names, width=2)
    assert list(net.modules()) == before
    assert factorize(net, ["0"], "plain") == ["0"] and list(net.modules()) == before


def test_a_subclass_that_passes_as_its_base_does_is_swapped():
    net = nn.Sequential(Renamed(4), nn.Linear(4, 2))
    factorize(net, ["0"], width=2)
    assert isinstance(net[0], cd.FactoredLinear)


@pytest.mark.parametrize("build", [lambda: nn.Linear(6, 6), lambda: nn.Conv2d(3, 4, 3)])
def test_what_is_frozen_stays_frozen_and_the_mode_stays(build):
    for frozen in ((), ("weight",), ("bias",), ("weight", "bias")):
        net = nn.Sequential(build(), nn.ReLU()).eval()
        for name in frozen:
            net[0].get_parameter(name).requires_grad_(False)
        factorize(net, ["0"], width=2)
        assert [factor.requires_grad for factor in net[0].factors] == ["weight" not in frozen] * 3
        assert net[0].bias.requires_grad == ("bias" not in frozen)
        assert not any(module.training for module in net.modules())


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"variant": "thin"}, "unknown variant 'thin'"),
        ({"start": "svd"}, "unknown start 'svd'"),
        ({}, "width is None, expected one for the variant 'compressed'"),
        ({"width": 9}, r"width of 'body.hidden2' is 9, expected at most min\(m, n\) = 6"),
        ({"width": 2, "depth": 1}, "depth is 1, expected an integer >= 2"),
        ({"width": 2, "init_scale": 0.0}, "init_scale is 0.0, expected a finite number > 0"),
        ({"width": 2, "start": "gradient"}, "loss_step is None, expected a function for the start 'gradient'"),
    ],
)
def test_factorize_refuses_what_is_out_of_range(arguments, message):
    net = models.mlp(6, 6, 2)
    with pytest.raises(ValueError, match=message):
        factorize(net, ["body.hidden2"], **arguments)
    assert isinstance(net.body.hidden2, nn.Linear)


# starts


def test_variants_have_the_shapes_and_parameters_that_the_paper_counts():
    for variant, width, count in (("plain", None, 36), ("deep", None, 3 * 36), ("compressed", 2, 2 * 6 * 2 + 4)):
        net = models.mlp(6, 6, 2)
        bias = net.body.hidden2.bias.detach().clone()
        assert factorize(net, [net.penultimate], variant, width=width) == ["body.hidden2"]
        numbers = sum(parameter.numel() for parameter in net.body.hidden2.parameters())
        assert numbers == count + 6
        assert torch.equal(net.body.hidden2.bias, bias)


def test_a_full_width_orthogonal_start_has_all_singular_values_eps():
    net = models.mlp(6, 6, 2).double()
    factorize(net, ["hidden2"], "deep", init_scale=0.3, generator=torch.Generator().manual_seed(3))
    for factor in net.body.hidden2.factors:
        assert torch.allclose(torch.linalg.svdvals(factor), torch.full((6,), 0.3, dtype=torch.float64))
    product = torch.linalg.svdvals(net.body.hidden2.weight)
    assert torch.allclose(product, torch.full((6,), 0.3**3, dtype=torch.float64))


def test_the_gradient_start_of_a_linear_layer_is_the_spectral_start_of_its_target():
    """At W = 0 and whitened inputs -dLoss/dW is the target over its number of entries, whatever its sign."""
    target = cd.low_rank_target((8, 6), 3, generator=torch.Generator().manual_seed(1))
    layer = nn.Sequential(nn.Linear(6, 8, bias=False)).double()
    nn.init.zeros_(layer[0].weight)
    problem, inputs = cd.MatrixFactorization(target), torch.eye(6, dtype=torch.float64)
    factorize(
        layer, ["0"], width=3, init_scale=0.2, start="gradient",
        loss_step=lambda net: (net(inputs) - target.mT).square().mean() / 2,
    )  # fmt: skip
    wanted = cd.compress_spectral(problem, width=3, depth=3, scale=0.2)
    assert torch.allclose(layer[0].weight, cd.product(wanted), atol=1e-12)
    assert torch.equal(layer[0].factors[1], 0.2 * torch.eye(3, dtype=torch.float64))


@pytest.mark.parametrize("shape", [(6, 6), (5, 7), (7, 5)])
def test_weights_and_gradient_span_the_directions_of_p1(shape):
    """In a chain of three linear layers, the first one's V spans what `compress_from_gradient` finds for the chain."""
    m, n = shape
    target = cd.low_rank_target(shape, 2, generator=torch.Generator().manual_seed(2))
    chain = cd.orthogonal_factors((m, n), 3, max(m, n), 0.6, torch.Generator().manual_seed(5))
    net = nn.Sequential(*(nn.Linear(f.shape[1], f.shape[0], bias=False) for f in chain)).double()
    for layer, factor in zip(net, chain, strict=True):
        layer.weight.data.copy_(factor)
    inputs, name = torch.eye(n, dtype=torch.float64), "0" if m <= n else "2"  # P1 takes the square outer factor
    small = cd.compress_from_gradient(cd.MatrixFactorization(target), chain, rank=2)
    factorize(
        net, [name], width=4, start="weights_and_gradient",
        loss_step=lambda net: (net(inputs) - target.mT).square().mean() / 2,
    )  # fmt: skip
    found = net[int(name)].factors
    inner, wanted = (found[0].mT, small[0].mT) if m <= n else (found[-1], small[-1])
    assert torch.allclose(inner @ inner.mT, wanted @ wanted.mT, atol=1e-10)
    square = chain[int(name)]
    projection = found[-1] @ found[-1].mT @ square @ found[0].mT @ found[0]
    assert torch.allclose(net[int(name)].weight, projection, atol=1e-10)


def test_a_convolutions_gradient_start_is_the_steepest_of_its_width():
    """Of all products of norm one and rank k, that of the top singular vectors goes down the loss most steeply."""
    net = models.seeded(0, models.vgg, 3, [4, "M", 5], 6, image=8).double()
    images, labels = draw(6, 3, 8, 8), torch.arange(6) % 3
    plain = net.body.features[4].weight
    [gradient] = torch.autograd.grad(functional.cross_entropy(net(images), labels), [plain])
    values = torch.linalg.svdvals(gradient.flatten(1))
    factorize(
        net, ["features.4"], width=2, init_scale=1.0, start="gradient",
        loss_step=lambda net: functional.cross_entropy(net(images), labels),
    )  # fmt: skip
    slope = (gradient.flatten(1) * net.body.features[4].weight).sum()
    assert slope.item() == pytest.approx(-values[:2].sum().item(), rel=1e-8)


def test_the_projection_does_not_depend_on_the_depth():
    weight, gradient = draw(8, 6), draw(8, 6, seed=1)
    products = [cd.product(starts.from_weights_and_gradient(weight, gradient, depth, 4)) for depth in (3, 4, 6)]
    assert torch.allclose(products[1], products[0]) and torch.allclose(products[2], products[0])
    inner = starts.from_weights_and_gradient(weight, gradient, 5, 4)[1:-1]
    values = [torch.linalg.svdvals(factor) for factor in inner]
    assert torch.allclose(values[0], values[1]) and torch.allclose(values[2], values[1])


def test_gradient_starts_leave_no_trace_and_need_a_gradient():
    net, inputs = models.seeded(0, models.mlp, 6, 6, 2), draw(3, 6).float()
    net.body.hidden2.weight.requires_grad_(False)
    factorize(net, ["hidden2"], width=2, start="gradient", loss_step=lambda net: net(inputs).square().sum())
    assert all(parameter.grad is None for parameter in net.parameters())
    for bad, message in (
        (lambda net: net(inputs).sum() * 0, "has a zero gradient"),
        (lambda net: 1.0, "returned float"),
    ):
        with pytest.raises(ValueError, match=message):
            factorize(models.mlp(6, 6, 2), ["hidden2"], width=2, start="gradient", loss_step=bad)


def test_a_seed_means_the_same_start():
    first, again, other = (models.mlp(6, 6, 2) for _ in range(3))
    for net, seed in ((first, 4), (again, 4), (other, 5)):
        factorize(net, ["hidden2"], width=2, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(first.body.hidden2.weight, again.body.hidden2.weight)
    assert not torch.equal(first.body.hidden2.weight, other.body.hidden2.weight)
