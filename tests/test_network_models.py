"""The networks: their shapes, which matrix is the penultimate one, and that they are what they are called."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from compressible.networks import models
from compressible.networks.factorize import factorize
from compressible.networks.layers import weight_matrix
from compressible.networks.models import normalised_adjacency
from compressible.networks.training import Examples, train

SMALL = {
    "mlp": (lambda: models.mlp(3 * 8 * 8, 16, 5), (16, 16), 16),
    "vgg": (lambda: models.vgg(5, [4, "M", 6, "M"], 12, image=8), (12, 24), 12),
    "resnet": (lambda: models.resnet(5, (4, 6), (1, 2)), (6, 54), 6),
    "vit": (lambda: models.vit(5, width=12, layers=2, heads=2, image=8), (12, 48), 12),
}


def pictures(count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", SMALL)
def test_networks_name_their_penultimate_matrix_and_can_have_it_swapped(name):
    make, shape, width = SMALL[name]
    net = models.seeded(0, make).eval()
    assert net(pictures()).shape == (2, 5)
    assert tuple(weight_matrix(net.get_submodule(net.penultimate)).shape) == shape
    seen = models.features(net, pictures())
    assert seen.shape == (2, width)
    assert torch.allclose(net.get_submodule(net.last)(seen), net(pictures()))
    assert factorize(net, [net.penultimate], width=4) == [net.penultimate]
    net(pictures()).sum().backward()
    assert all(factor.grad.any() for factor in net.get_submodule(net.penultimate).factors)


def test_the_penultimate_layers_are_the_ones_that_the_docstrings_name():
    assert SMALL["mlp"][0]().penultimate == "body.hidden2"
    assert SMALL["vgg"][0]().penultimate == "body.hidden"
    convolutions = [n for n, m in SMALL["resnet"][0]().named_modules() if isinstance(m, nn.Conv2d)]
    assert SMALL["resnet"][0]().penultimate == convolutions[-1]
    vit = SMALL["vit"][0]()
    assert vit.get_submodule(vit.penultimate).in_features == 4 * 12 and ".1." in vit.penultimate


def test_published_sizes():
    def count(net):
        return sum(parameter.numel() for parameter in net.parameters())

    assert count(models.resnet()) == 11_173_962  # ResNet-18 with the stem for CIFAR-10
    assert count(models.mlp(784, 784, 10)) == 3 * (784 * 784 + 784) + 7850
    convolutions = [m for m in models.vgg(layers="vgg16").modules() if isinstance(m, nn.Conv2d)]
    assert len(convolutions) == 13


def test_an_mlp_without_activation_is_its_product():
    net = models.seeded(0, models.mlp, 6, 5, 3, hidden=2, activation="identity").double()
    inputs = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    matrices = [net.body.get_submodule(name) for name in ("input", "hidden1", "output")]
    weight = matrices[2].weight @ matrices[1].weight @ matrices[0].weight
    zero = net(torch.zeros(1, 6, dtype=torch.float64))
    assert torch.allclose(net(inputs) - zero, inputs @ weight.mT)


def test_a_seed_gives_the_weights_and_leaves_the_generator():
    state = torch.get_rng_state()
    first, again, other = (models.seeded(seed, models.mlp, 6, 5, 3) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.body.input.weight, again.body.input.weight)
    assert not torch.equal(first.body.input.weight, other.body.input.weight)


def graph() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(9, 6, generator=generator), torch.randint(9, (2, 14), generator=generator), torch.arange(9) % 3


def test_the_adjacency_is_symmetric_and_has_spectral_norm_one():
    _, edges, _ = graph()
    found = normalised_adjacency(edges, 9)
    assert torch.equal(found, found.mT)
    assert torch.linalg.eigvalsh(found)[-1].item() == pytest.approx(1, abs=1e-12)
    assert torch.equal(normalised_adjacency(edges.flip(0), 9), found)
    pair = normalised_adjacency(torch.tensor([[0], [1]]), 3)
    assert torch.allclose(pair, torch.tensor([[0.5, 0.5, 0], [0.5, 0.5, 0], [0, 0, 1]], dtype=torch.float64))


def test_the_graph_network_is_kipf_and_wellings_formula():
    inputs, edges, _ = graph()
    net = models.seeded(0, models.gcn, inputs, edges, 3, width=4).eval()
    adjacency = normalised_adjacency(edges, 9).float()
    hidden, output = net.body.input, net.body.output
    first = torch.relu(adjacency @ (inputs @ hidden.weight.mT + hidden.bias))
    wanted = adjacency @ (first @ output.weight.mT + output.bias)
    assert torch.allclose(net(torch.tensor([7, 2])), wanted[[7, 2]], atol=1e-6)
    assert net.penultimate == "body.input" and models.gcn(inputs, edges, 3, hidden=2).penultimate == "body.hidden1"


def test_graph_networks_train_stacked_with_one_graph_as_one_by_one():
    inputs, edges, labels = graph()
    nets = [models.seeded(seed, models.gcn, inputs, edges, 3, width=4, dropout=0.0) for seed in range(3)]
    train_set, test_set = Examples(torch.arange(6), labels[:6]), Examples(torch.arange(6, 9), labels[6:])
    kinds = [
        train(nets, train_set, test_set, learning_rates=[0.05] * 3, steps=30, stacked=stacked)
        for stacked in (True, False)
    ]
    assert np.allclose(kinds[0].loss, kinds[1].loss, rtol=1e-4)
    assert np.allclose(kinds[0].test_loss, kinds[1].test_loss, rtol=1e-4)
    assert (kinds[0].loss[:, -1] < kinds[0].loss[:, 0]).all()


@pytest.mark.parametrize("name", ["resnet", "vit"])
def test_image_networks_learn_one_batch(name):
    net, labels = models.seeded(0, SMALL[name][0]), torch.tensor([0, 1, 2, 3])
    history = train([net], Examples(pictures(4), labels), learning_rates=[0.01], steps=40, evaluate_every=40)
    assert history.loss[0, -1] < 0.5 * history.loss[0, 0]


def test_a_vit_may_be_stacked_although_it_trains_one_by_one_by_itself():
    nets = [models.seeded(seed, SMALL["vit"][0]) for seed in range(2)]
    data = Examples(pictures(8), torch.arange(8) % 5)
    kinds = [
        train(nets, data, learning_rates=[1e-3] * 2, steps=5, batch_size=4, stacked=stacked)
        for stacked in (True, "auto")
    ]
    assert kinds[0].stacked and not kinds[1].stacked
    assert np.allclose(kinds[0].loss, kinds[1].loss, rtol=1e-3)


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: models.mlp(6, 5, 3, activation="relu6"), "unknown activation 'relu6'; the closest is 'relu'"),
        (lambda: models.mlp(6, 5, 3, hidden=0), "hidden is 0, expected at least 1"),
        (lambda: models.mlp(6, 5, 3, dropout=1.0), "dropout is 1.0, expected a share >= 0 and < 1"),
        (lambda: models.vgg(layers="vgg12"), "unknown VGG 'vgg12'; the closest is 'vgg1"),
        (lambda: models.vgg(image=28), "image is 28, expected a side that survives 5 halvings"),
        (lambda: models.vit(width=100, heads=3), "heads is 3, expected a divisor of the width 100"),
        (lambda: models.vit(image=30), "patch is 4, expected a divisor of the image's side 30"),
        (lambda: models.gcn(torch.ones(3, 2), torch.ones(3, 2), 2), r"edges is \(3, 2\), expected the shape \(2, E\)"),
    ],
)
def test_networks_refuse_what_does_not_fit(build, message):
    with pytest.raises(ValueError, match=message):
        build()
