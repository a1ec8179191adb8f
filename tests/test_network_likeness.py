"""Which networks may be stacked: those that are alike in all but the values of parameters and buffers."""

from __future__ import annotations

import copy
import math
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from compressible.networks import models
from compressible.networks.factorize import factorize
from compressible.networks.likeness import first_difference
from compressible.networks.training import Examples, train


class Scaled(nn.Module):
    """A layer with attributes of its own, which no state dict holds."""

    def __init__(self, **attributes) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        for name, value in attributes.items():
            setattr(self, name, value)


def times(factor):
    return lambda inputs: inputs * factor


def made_here():
    class Here(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, inputs):
            return self.layer(inputs)

    return Here()


def hooked(hook):
    net = Scaled()
    net.handle = net.layer.register_forward_hook(hook)
    return net


def aliased(layers):
    net = Scaled()
    net.other = layers(net)
    return net


def shared(which):
    net = nn.Sequential(*(nn.Linear(3, 3) for _ in range(3)))
    net[which].weight = net[0].weight
    return net


def factored():
    net = models.mlp(4, 8, 2)
    factorize(net, [net.penultimate], width=2)
    return net


ALIKE = {
    "mlp": partial(models.mlp, 4, 8, 2, dropout=0.3),
    "factored": factored,
    "graph": partial(models.gcn, torch.eye(5), torch.tensor([[0, 1], [1, 2]]), 2),
    "transformer": partial(models.vit, 3, 12, 2, 2, image=8),
    "convolutions": partial(models.resnet, 3, (8, 8), (1, 1)),
    "recurrent": partial(nn.LSTM, 3, 4),
    "attention": partial(nn.TransformerEncoderLayer, 4, 2, 8),
    "function": lambda: Scaled(call=times(2), then=partial(torch.clamp, min=0.0)),
    "method": lambda: aliased(lambda net: net.layer.forward),
    "not a number": lambda: Scaled(value=math.nan, table={"a": [1, (2, {3})]}),
    "arrays": lambda: Scaled(mask=torch.ones(2), also=np.arange(3)),
    "class of its own": made_here,
    "parametrised": lambda: parametrizations.weight_norm(nn.Linear(3, 3)),
    "orthogonal": lambda: parametrizations.orthogonal(nn.Linear(3, 3)),
    "hooked": lambda: hooked(print),
    "module in a list, too": lambda: aliased(lambda net: [net.layer]),
    "one module twice": lambda: nn.Sequential(*[nn.Linear(3, 3)] * 2),
    "tied": lambda: shared(1),
}


@pytest.mark.parametrize("name", ALIKE)
def test_models_of_one_text_are_alike_whatever_their_numbers(name):
    first, second = (models.seeded(seed, ALIKE[name]) for seed in range(2))
    assert first_difference(first, second) == first_difference(second, first) == ""
    assert first_difference(copy.deepcopy(first), copy.deepcopy(second)) == ""
    assert "training is False, not True" in first_difference(first, copy.deepcopy(second).eval())


DIFFERENT = {
    "dropout": (models.mlp(4, 8, 2, dropout=0.1), models.mlp(4, 8, 2, dropout=0.8), "body.dropout0.p is 0.8, not 0.1"),
    "activation": (models.mlp(4, 8, 2), models.mlp(4, 8, 2, activation="gelu"), "the type of body.activation0 is"),
    "order": (nn.Sequential(nn.ReLU(), nn.Tanh()), nn.Sequential(nn.Tanh(), nn.ReLU()), "the type of 0 is"),
    "frozen": (Scaled(), Scaled().requires_grad_(False), "requires_grad of layer.weight is False, not True"),
    "dtype": (Scaled(), Scaled().double(), "dtype of layer.weight is torch.float64, not torch.float32"),
    "number": (Scaled(scale=1.0), Scaled(scale=-1.0), "scale is -1.0, not 1.0"),
    "sign of zero": (Scaled(scale=0.0), Scaled(scale=-0.0), "scale is -0.0, not 0.0"),
    "kind of number": (Scaled(scale=1), Scaled(scale=True), "the type of scale is"),
    "missing": (Scaled(scale=1.0), Scaled(), "scale is nothing, not 1.0"),
    "code": (Scaled(call=lambda x: x), Scaled(call=lambda x: -x), "call is <function"),
    "closure": (Scaled(call=times(2)), Scaled(call=times(3)), "factor of call is 3, not 2"),
    "partial": (Scaled(call=partial(max, 1)), Scaled(call=partial(max, 2)), "is 2, not 1"),
    "inside": (Scaled(table={"a": [1, 2]}), Scaled(table={"a": [1, 3]}), "table['a'][1] is 3, not 2"),
    "array": (Scaled(mask=torch.ones(2)), Scaled(mask=torch.zeros(2)), "mask is tensor([0., 0.])"),
    "hook": (Scaled(), hooked(print), "layer._forward_hooks[0] is <built-in function print>, not nothing"),
    "parametrised": (nn.Linear(3, 3), parametrizations.weight_norm(nn.Linear(3, 3)), "the type of the model is"),
    "one module twice": (ALIKE["one module twice"](), nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), "in several"),
    "tied elsewhere": (shared(1), shared(2), "several places of one of the two models alone"),
    "not tied": (shared(1), nn.Sequential(*(nn.Linear(3, 3) for _ in range(3))), "several places of one"),
    "trained outside of the state": (
        aliased(lambda net: [net.layer.weight]), aliased(lambda net: [net.layer.weight]), "other[0] is Parameter",
    ),
    "module outside of the state": (
        aliased(lambda _: [nn.Linear(3, 3)]), aliased(lambda _: [nn.Linear(3, 3)]), "other[0].weight is Parameter",
    ),
    "what cannot be looked into": (Scaled(of=(i for i in "a")), Scaled(of=(i for i in "a")), "of is <generator"),
}  # fmt: skip


@pytest.mark.parametrize("name", DIFFERENT)
def test_a_difference_is_told_by_its_place(name):
    first, second, told = DIFFERENT[name]
    assert told in first_difference(first, second)
    assert first_difference(second, first) != ""
    assert first_difference(first, first) == "" or "other[0]" in told or "generator" in told


# what it means for training


DATA = Examples(torch.randn(64, 12, generator=torch.Generator().manual_seed(0)), torch.arange(64) % 4)
OPTIONS = {"steps": 20, "batch_size": 16, "evaluate_every": 20, "device": "cpu"}


def alone(nets, rates):
    histories = [
        train([net], DATA, learning_rates=[rate], seed=index, stacked=False, **OPTIONS)
        for index, (net, rate) in enumerate(zip(nets, rates, strict=True))
    ]
    return np.concatenate([history.loss for history in histories])


def frozen_input(net):
    net.body.input.requires_grad_(False)
    return net


UNLIKE = {
    "dropout": lambda: models.mlp(12, 16, 4, dropout=0.8),
    "activation": lambda: models.mlp(12, 16, 4, activation="silu", dropout=1e-9),
    "frozen": lambda: frozen_input(models.mlp(12, 16, 4, dropout=1e-9)),
}


@pytest.mark.parametrize("name", UNLIKE)
def test_networks_that_differ_train_one_by_one_unless_a_stack_is_asked_for(name):
    rates = [0.01] * 10
    nets = [models.seeded(seed, models.mlp, 12, 16, 4, dropout=1e-9) for seed in range(9)]
    assert train([*nets, nets[0]], DATA, learning_rates=rates, **OPTIONS).stacked
    nets.append(models.seeded(9, UNLIKE[name]))
    history = train(nets, DATA, learning_rates=rates, **OPTIONS)
    assert not history.stacked
    np.testing.assert_array_equal(history.loss, alone(nets, rates))
    if name == "frozen":
        assert torch.equal(history.models[9].body.input.weight, nets[9].body.input.weight)
    with pytest.raises(ValueError, match=r"stacked is True, expected False .* of model 9 .* as of model 0"):
        train(nets, DATA, learning_rates=rates, stacked=True, **OPTIONS)


def test_a_mode_that_training_does_not_set_counts():
    class Keeps(nn.Dropout):
        def train(self, mode=True):
            return self

    def make(training):
        net = nn.Sequential(models.mlp(12, 16, 4), Keeps(0.5))
        net[1].training = training
        return net

    nets = [models.seeded(seed, make, False) for seed in range(10)]
    assert train(
        [net.eval() if seed % 2 else net for seed, net in enumerate(nets)], DATA, learning_rates=[0.01] * 10, **OPTIONS
    ).stacked
    nets[3] = make(True)
    assert not train(nets, DATA, learning_rates=[0.01] * 10, **OPTIONS).stacked


def test_networks_that_differ_in_a_buffer_stay_a_stack():
    class Dropped(nn.Module):
        def __init__(self, rate) -> None:
            super().__init__()
            self.net = models.mlp(12, 16, 4)
            self.register_buffer("rate", torch.tensor(rate))

        def forward(self, inputs):
            return self.net(inputs) * (1 - self.rate)

    nets = [models.seeded(seed, Dropped, seed / 20) for seed in range(10)]
    history = train(nets, DATA, learning_rates=[0.01] * 10, **OPTIONS)
    assert history.stacked
    np.testing.assert_allclose(history.loss, alone(nets, [0.01] * 10), rtol=1e-5)


def test_every_network_trains_something_and_takes_the_same_kind_of_numbers():
    nets = [models.mlp(12, 16, 4) for _ in range(2)]
    nets[1].requires_grad_(False)
    with pytest.raises(ValueError, match=r"trained parameters of model 1 is \[\], expected at least one"):
        train(nets, DATA, learning_rates=[0.01] * 2, **OPTIONS)
    nets[1].requires_grad_(True).double()
    with pytest.raises(ValueError, match=r"dtype of model 1 is torch.float64, expected torch.float32 as of model 0"):
        train(nets, DATA, learning_rates=[0.01] * 2, **OPTIONS)
