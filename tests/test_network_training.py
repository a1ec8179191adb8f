"""Training several networks: all ways to step give the same as PyTorch's own loop, and records say what happened."""

from __future__ import annotations

import copy
import doctest
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from compressible.networks import losses, models, side_by_side, training
from compressible.networks.batches import PADDING, Draws, crop_and_flip
from compressible.networks.factorize import factorize
from compressible.networks.layers import outer_factors, weight_matrix
from compressible.networks.training import Examples, train

NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
ON_CUDA = (pytest.mark.cuda, NEEDS_CUDA)
DEVICES = ["cpu", pytest.param("cuda", marks=ON_CUDA)]
RATES = [0.01, 0.02, 0.005]


def examples(count=96, inputs=12, classes=4, seed=0, dtype=torch.float32) -> Examples:
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn(count, inputs, generator=generator).to(dtype)
    rule = torch.randn(inputs, classes, generator=generator).to(dtype)
    return Examples(points, (points @ rule).argmax(1))


def networks(count=3, dtype=torch.float32, **options) -> list[models.Network]:
    nets = [models.seeded(seed, models.mlp, 12, 16, 4, **options).to(dtype) for seed in range(count)]
    for seed, net in enumerate(nets):
        factorize(net, [net.penultimate], width=6, generator=torch.Generator().manual_seed(seed))
    return nets


def images(count=48, channels=3, side=8, classes=3) -> Examples:
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(classes, (count,), generator=generator)
    return Examples(torch.randn(count, channels, side, side, generator=generator) + labels[:, None, None, None], labels)


def reference(net, data, rate, steps, batch_size, seed, make, outer_ratio=1.0, factor=lambda step: 1.0, augment=False):
    """PyTorch's own loop over one network, with its optimiser, its loss and its way to fill gradients."""
    net = copy.deepcopy(net).train()
    outer = outer_factors(net)
    named = list(net.named_parameters())
    groups = [
        {"params": [p for name, p in named if (name in outer) is chosen], "lr": rate * (outer_ratio if chosen else 1)}
        for chosen in (False, True)
    ]
    optimizer, draws = make([group for group in groups if group["params"]]), Draws(len(data), batch_size, seed, augment)
    rows, shifts = draws.rows(steps), draws.shifts(steps) if augment else None
    base = [group["lr"] for group in optimizer.param_groups]
    losses = []
    for step in range(steps):
        for group, start in zip(optimizer.param_groups, base, strict=True):
            group["lr"] = start * factor(step)
        inputs = data.inputs[rows[step]].to(named[0][1].dtype)
        inputs = inputs if shifts is None else crop_and_flip(inputs, shifts[step])
        optimizer.zero_grad()
        value = functional.cross_entropy(net(inputs), data.targets[rows[step]])
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return net, losses


OPTIMIZERS = {
    "adam": lambda groups: torch.optim.Adam(groups, weight_decay=0.01, foreach=False, fused=False),
    "adamw": lambda groups: torch.optim.AdamW(groups, weight_decay=0.01, foreach=False, fused=False),
    "sgd": lambda groups: torch.optim.SGD(groups, weight_decay=0.01, momentum=0.8, foreach=False, fused=False),
}


@pytest.mark.parametrize("stacked", [True, False])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_way_to_step_is_pytorchs_own_loop(optimizer, stacked):
    data, nets = examples(dtype=torch.float64), networks(dtype=torch.float64)
    history = train(
        nets, data, learning_rates=RATES, steps=40, batch_size=16, optimizer=optimizer, momentum=0.8,
        weight_decay=0.01, outer_ratio=3.0, seed=7, evaluate_every=1, stacked=stacked, device="cpu",
    )  # fmt: skip
    assert history.stacked is stacked and history.loss.shape == (3, 41)
    for index, rate in enumerate(RATES):
        net, losses = reference(nets[index], data, rate, 40, 16, 7 + index, OPTIMIZERS[optimizer], 3.0)
        assert np.allclose(history.loss[index, 1:], losses, rtol=1e-9)
        assert history.loss[index, 0] == pytest.approx(losses[0], rel=1e-12)
        for name, parameter in net.named_parameters():
            assert torch.allclose(history.models[index].get_parameter(name), parameter, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("device", DEVICES)
def test_stacked_and_one_by_one_agree_in_float32(device):
    data, nets = examples(), networks()
    kinds = [
        train(nets, data, data, learning_rates=RATES, steps=50, batch_size=16, stacked=stacked, device=device)
        for stacked in (True, False)
    ]
    assert np.allclose(kinds[0].loss, kinds[1].loss, rtol=1e-4)
    assert np.allclose(kinds[0].test_loss, kinds[1].test_loss, rtol=1e-4)


def test_equal_rates_step_as_whole_stacks_and_as_slices_alike():
    data, nets = examples(dtype=torch.float64), networks(dtype=torch.float64)
    options = {"steps": 20, "batch_size": 16, "outer_ratio": 0.5, "stacked": True, "device": "cpu"}
    whole = train(nets, data, learning_rates=[0.01] * 3, **options)
    slices = train(nets, data, learning_rates=[0.01, 0.01, 0.02], **options)
    assert np.allclose(whole.loss[:2], slices.loss[:2], rtol=1e-12)


@pytest.mark.parametrize("stacked", [True, False])
def test_weight_decay_by_name_is_pytorchs_decay_of_a_group(stacked):
    data, nets = examples(dtype=torch.float64), networks(2, torch.float64)
    history = train(
        nets, data, learning_rates=[0.01] * 2, steps=20, weight_decay={r"body\.input\..*": 0.3}, stacked=stacked,
        device="cpu",
    )  # fmt: skip
    for index, net in enumerate(nets):
        own = copy.deepcopy(net)
        decayed = list(own.body.input.parameters())
        rest = [p for name, p in own.named_parameters() if not name.startswith("body.input.")]
        optimizer = torch.optim.Adam([{"params": decayed, "weight_decay": 0.3}, {"params": rest}], lr=0.01)
        for _ in range(20):
            optimizer.zero_grad()
            functional.cross_entropy(own(data.inputs), data.targets).backward()
            optimizer.step()
        for name, parameter in own.named_parameters():
            assert torch.allclose(history.models[index].get_parameter(name), parameter, rtol=1e-8, atol=1e-11)


def test_the_schedule_warms_up_and_falls():
    data, net = examples(dtype=torch.float64), networks(1, torch.float64)[0]
    options = {"steps": 30, "batch_size": 16, "warmup": 5, "evaluate_every": 1, "device": "cpu"}
    history = train([net], data, learning_rates=[0.02], schedule="cosine", **options)

    def factor(step):
        return min((step + 1) / 5, 1) * (1 + math.cos(math.pi * max(step - 5, 0) / 25)) / 2

    adam = {"weight_decay": 0.0, "foreach": False}
    _, losses = reference(net, data, 0.02, 30, 16, 0, lambda groups: torch.optim.Adam(groups, **adam), factor=factor)
    assert np.allclose(history.loss[0, 1:], losses, rtol=1e-9)


def test_convolutions_with_batch_norm_train_as_in_pytorchs_loop():
    """Moved images are channels last, and so are the gradients of kernels, which the optimiser must not mix up."""
    data = images()
    net = models.seeded(0, models.vgg, 3, [4, "M", 5, "M"], 6, image=8).double()
    factorize(net, ["features.4", "hidden"], width=3)
    history = train(
        [net], data, data, learning_rates=[0.02], steps=12, batch_size=16, optimizer="sgd", momentum=0.8,
        weight_decay=0.01, evaluate_every=1, augment="crop_and_flip", device="cpu",
    )  # fmt: skip
    trained, losses = reference(net, data, 0.02, 12, 16, 0, OPTIMIZERS["sgd"], augment=True)
    assert np.allclose(history.loss[0, 1:], losses, rtol=1e-9)
    trained.eval()
    right = (trained(data.inputs.double()).argmax(1) == data.targets).double().mean().item()
    assert history.accuracy[0, -1] == right
    for name, value in trained.state_dict().items():
        assert torch.allclose(history.models[0].state_dict()[name], value, rtol=1e-8, atol=1e-11)


def test_full_batches_record_the_exact_loss_and_squared_errors_are_half_sums():
    data, net = examples(dtype=torch.float64), models.seeded(0, models.mlp, 12, 16, 4, activation="identity").double()
    history = train(
        [net], data, learning_rates=[0.01], steps=4, optimizer="sgd", momentum=0.0, loss="squared", evaluate_every=1
    )
    net = copy.deepcopy(net)
    for step in range(5):
        units = functional.one_hot(data.targets, 4).double()
        loss = (net(data.inputs) - units).square().sum() / (2 * len(data))
        assert history.loss[0, step] == pytest.approx(loss.item(), rel=1e-10)
        for parameter, gradient in zip(
            net.parameters(), torch.autograd.grad(loss, list(net.parameters())), strict=True
        ):
            parameter.data -= 0.01 * gradient


@pytest.mark.parametrize("stacked", [True, False])
def test_a_model_that_diverges_leaves_the_others_alone(stacked):
    data, nets = examples(), networks()
    options = {"steps": 30, "batch_size": 16, "optimizer": "sgd", "stacked": stacked, "evaluate_every": 1}
    history = train(nets, data, data, learning_rates=[0.05, 1e6, 0.05], device="cpu", **options)
    assert history.diverged.tolist() == [False, True, False]
    assert not np.isfinite(history.loss[1, -1]) and len(history.steps) == 31
    alone = train(nets[2:], data, data, learning_rates=[0.05], device="cpu", seed=2, **options)
    assert np.allclose(history.test_loss[2], alone.test_loss[0], rtol=1e-4)


def test_given_networks_and_the_global_generator_stay_as_they_were():
    data, nets = examples(), networks(dropout=0.2)
    before, state = copy.deepcopy(nets[0].state_dict()), torch.get_rng_state()
    history = train(nets, data, learning_rates=RATES, steps=5)
    assert all(torch.equal(value, before[name]) for name, value in nets[0].state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert history.models[0] is not nets[0] and not history.models[0].training


def test_records_snapshots_and_watch_see_the_networks_as_they_are():
    data, nets = examples(), networks()

    def watch(step, live):
        assert not live[0].training and not torch.is_grad_enabled()
        return step, torch.stack([models.features(net, data.inputs[:5]) for net in live])

    history = train(
        nets, data, data, validation_set=examples(seed=3), learning_rates=RATES, steps=23, batch_size=16,
        evaluate_every=10, snapshots=(0, 7, 23), snapshot_of=[nets[0].penultimate, "body.output.bias"], watch=watch,
        stacked=True,
    )  # fmt: skip
    assert history.steps.tolist() == [0, 10, 20, 23]
    assert [step for step, _ in history.watched] == [0, 10, 20, 23]
    assert history.watched[-1][1].shape == (3, 5, 16)
    assert list(history.snapshots) == [0, 7, 23]
    first, last = history.snapshots[0][nets[0].penultimate], history.snapshots[23][nets[0].penultimate]
    assert first.shape == (3, 16, 16) and not torch.allclose(first, last)
    assert torch.allclose(first[1], weight_matrix(nets[1].get_submodule(nets[1].penultimate)))
    assert torch.allclose(last[1], weight_matrix(history.models[1].get_submodule(nets[1].penultimate)))
    assert history.snapshots[7]["body.output.bias"].shape == (3, 4)
    outputs = history.models[2](data.inputs)
    assert history.test_loss[2, -1] == pytest.approx(functional.cross_entropy(outputs, data.targets).item(), rel=1e-5)
    assert history.accuracy[2, -1] == (outputs.argmax(1) == data.targets).double().mean().item()
    assert not np.array_equal(history.validation_accuracy, history.accuracy)
    assert (np.diff(history.seconds) > 0).all() and history.seconds[0] == 0


def test_losses_of_a_record_are_the_mean_since_the_one_before():
    data, nets = examples(), networks(1)
    options = {"learning_rates": [0.01], "steps": 12, "batch_size": 16}
    each = train(nets, data, evaluate_every=1, **options).loss[0]
    some = train(nets, data, evaluate_every=5, **options).loss[0]
    assert np.allclose(some, [each[0], each[1:6].mean(), each[6:11].mean(), each[11:].mean()])


def test_a_short_chunk_of_the_order_changes_nothing(monkeypatch):
    data, nets = images(), [models.seeded(seed, models.mlp, 192, 8, 3) for seed in range(2)]
    options = {"steps": 40, "batch_size": 16, "evaluate_every": 4, "augment": "crop_and_flip", "stacked": True}
    long = train(nets, data, learning_rates=[0.01] * 2, **options)
    monkeypatch.setattr(side_by_side, "CHUNK_BYTES", 8 * 2 * 16 * 4 * 8)
    short = train(nets, data, learning_rates=[0.01] * 2, **options)
    assert np.allclose(long.loss, short.loss, rtol=1e-5)


# batches


def test_an_epoch_shows_every_example_once_and_chunks_do_not_matter():
    draws, again = (Draws(10, 3, 5, True) for _ in range(2))
    rows = draws.rows(9).view(3, 9)
    assert all(len(set(epoch.tolist())) == 9 for epoch in rows)
    assert torch.equal(torch.cat([again.rows(2), again.rows(3), again.rows(4)]), rows.view(9, 3))
    shifts = draws.shifts(9)
    assert torch.equal(torch.cat([again.shifts(4), again.shifts(5)]), shifts)


def test_shifts_cover_their_range_evenly():
    shifts = Draws(100, 100, 0, True).shifts(400).view(-1, 3)
    assert shifts.amin(0).tolist() == [0, 0, 0] and shifts.amax(0).tolist() == [2 * PADDING, 2 * PADDING, 1]
    means, deviations = shifts.double().mean(0), torch.tensor([2.582, 2.582, 0.5]) / 200  # uniform, 40,000 draws
    assert ((means - torch.tensor([4, 4, 0.5])).abs() < 5 * deviations).all()


def test_crop_and_flip_is_a_padded_window_mirrored():
    pictures = torch.randn(6, 3, 8, 10, generator=torch.Generator().manual_seed(0))
    shifts = torch.tensor([[4, 4, 0], [0, 8, 0], [8, 0, 1], [4, 4, 1], [3, 5, 0], [2, 7, 1]])
    moved = crop_and_flip(pictures, shifts)
    assert torch.equal(moved[0], pictures[0]) and torch.equal(moved[3], pictures[3].flip(-1))
    padded = functional.pad(pictures, (4, 4, 4, 4))
    for index, (down, right, mirrored) in enumerate(shifts.tolist()):
        window = padded[index, :, down : down + 8, right : right + 10]
        assert torch.equal(moved[index], window.flip(-1) if mirrored else window)


# dropout


def test_stacked_models_get_masks_of_their_own():
    """Twins with the same batches part only if their masks differ."""
    data, net = examples(), networks(1, dropout=0.5)[0]
    history = train(
        [net, net], data, learning_rates=[0.01] * 2, steps=3, batch_size=16, seed=[4, 4], evaluate_every=1, stacked=True
    )
    assert history.loss[0, 0] == history.loss[1, 0]
    assert history.loss[0, 1] != history.loss[1, 1]


def test_dropout_of_models_one_by_one_does_not_depend_on_company_or_records():
    data, nets = examples(), networks(2, dropout=0.5)
    options = {"steps": 6, "batch_size": 16, "stacked": False}
    both = train(nets, data, data, learning_rates=[0.01] * 2, evaluate_every=1, **options)
    second = train(nets[1:], data, data, learning_rates=[0.01], seed=1, evaluate_every=3, **options)
    assert both.test_loss[1, -1] == pytest.approx(second.test_loss[0, -1], rel=1e-5)


# precision, refusals


def test_bfloat16_trains_the_same_network_with_fewer_digits():
    data, nets = examples(), networks()
    kinds = [
        train(nets, data, learning_rates=RATES, steps=30, batch_size=16, precision=precision, device="cpu")
        for precision in ("float32", "bfloat16")
    ]
    difference = np.abs(kinds[0].loss - kinds[1].loss)[:, :10]  # later on training adds to it
    assert 0 < difference.max() < 0.05
    assert next(kinds[1].models[0].parameters()).dtype == torch.float32


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"steps": 0}, "steps is 0, expected an integer >= 1"),
        ({"batch_size": 97}, "batch_size is 97, expected at most the 96 training examples"),
        ({"learning_rates": [0.1]}, r"learning_rates is \[0.1\], expected one for each of the 2 models"),
        ({"learning_rates": [0.1, math.inf]}, "expected finite numbers > 0"),
        ({"optimizer": "adan"}, "unknown optimizer 'adan'; the closest is 'adam"),
        ({"schedule": "linear"}, "unknown schedule 'linear'"),
        ({"loss": "hinge"}, "unknown loss 'hinge'"),
        ({"precision": "float16"}, "unknown precision 'float16'"),
        ({"augment": "crop_and_flip"}, "expected None without batches of images"),
        ({"momentum": 1.0}, "momentum is 1.0, expected a number >= 0 and < 1"),
        ({"weight_decay": {"body.inpt.*": 0.1}}, "'body.inpt.*', which matches no trained parameter; the closest is"),
        ({"weight_decay": {"[": 0.1}}, r"weight_decay names '\[', expected a regular expression: unterminated"),
        ({"weight_decay": {3: 0.1}}, "type of a name in weight_decay is 'int', expected a regular expression"),
        ({"outer_ratio": -1.0}, "outer_ratio is -1.0"),
        ({"warmup": 5}, "warmup is 5, expected an integer from 0 to below steps = 5"),
        ({"snapshots": [6]}, r"snapshots is \[6\], expected steps from 0 to 5"),
        ({"snapshots": [0], "snapshot_of": ["body.hiden2"]}, "unknown layer or parameter 'body.hiden2'; the closest"),
        ({"seed": [1]}, r"seed is \[1\], expected an integer, or one for each of the 2 models"),
        ({"captured": True, "device": "cpu"}, "captured is True, expected False on a CPU"),
    ],
)
def test_train_refuses_what_cannot_be_done(arguments, message):
    options = {"learning_rates": [0.1, 0.1], "steps": 5} | arguments
    with pytest.raises(ValueError, match=message):
        train(networks(2), examples(), **options)


CLASSES = torch.arange(96) % 4


@pytest.mark.parametrize(
    "loss, targets, message",
    [
        ("squared", CLASSES + 1, r"least and largest of targets of test_set is \(1, 4\), expected from 0 to 3"),
        ("squared", CLASSES - 1, r"is \(-1, 2\), expected from 0 to 3"),
        ("squared", CLASSES[:, None], r"expected \(N,\) class numbers in int64, or floating-point numbers"),
        ("squared", CLASSES[:, None].float(), r"is \(96, 1\), expected \('N', 4\), as the outputs"),
        ("squared", CLASSES.float(), r"shape of targets of test_set is \(96,\), expected \('N', 4\)"),
        ("cross_entropy", CLASSES + 1, r"is \(1, 4\), expected from 0 to 3"),
        ("cross_entropy", CLASSES[:, None], r"kind of targets of test_set .* expected \(N,\) class numbers in int64"),
        ("cross_entropy", functional.one_hot(CLASSES).float(), r"expected \(N,\) class numbers in int64"),
        ("cross_entropy", CLASSES.int(), r"expected \(N,\) class numbers in int64"),
    ],
)
def test_train_refuses_targets_that_the_loss_cannot_hold_against_outputs(loss, targets, message):
    good, bad = examples(), Examples(examples().inputs, targets)
    options = {"learning_rates": [0.1, 0.1], "steps": 1, "loss": loss, "device": "cpu"}
    with pytest.raises(ValueError, match=message):
        train(networks(2), good, bad, **options)
    with pytest.raises(ValueError, match=message.replace("test_set", "train_set")):
        train(networks(2), bad, batch_size=16, **options)


@pytest.mark.parametrize("targets", [torch.ones(5, 1), torch.ones(1, 4), torch.ones(4), CLASSES[:5, None], CLASSES[0]])
def test_the_squared_loss_broadcasts_no_targets(targets):
    with pytest.raises(ValueError, match=r"shape of targets is .*, expected \(5,.*\), by the outputs"):
        losses.squared(torch.ones(5, 4), targets)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("stacked", [True, False])
@pytest.mark.parametrize("batch_size", [16, None])
def test_train_trains_whatever_mode_it_is_called_in(mode, stacked, batch_size):
    options = {"learning_rates": RATES, "steps": 8, "batch_size": batch_size, "stacked": stacked, "device": "cpu"}
    usual = train(networks(dropout=0.1), examples(), examples(), **options)
    with mode():
        found = train(networks(dropout=0.1), examples(), examples(), **options)
    np.testing.assert_array_equal(found.loss, usual.loss)
    np.testing.assert_array_equal(found.test_loss, usual.test_loss)
    assert all(parameter.requires_grad and not parameter.is_inference() for parameter in found.models[0].parameters())


def test_train_refuses_networks_of_two_kinds_and_stacked_batch_norm():
    with pytest.raises(ValueError, match=r"architecture of model 1 is \['body.hidden2.bias'"):
        train([models.mlp(12, 8, 4), models.mlp(12, 8, 4, hidden=2)], examples(), learning_rates=[0.1] * 2, steps=1)
    nets = [models.seeded(s, models.vgg, 3, [4, "M"], 6, image=8) for s in range(2)]
    with pytest.raises(ValueError, match="expected False for networks with batch norm"):
        train(nets, images(), learning_rates=[0.1] * 2, steps=1, stacked=True)
    with pytest.raises(ValueError, match="3 inputs and 2 targets"):
        Examples(torch.ones(3, 2), torch.ones(2))


# CUDA graphs


def both_ways(nets, data, **options):
    return [train(nets, data, data, captured=captured, device="cuda", **options) for captured in (True, False)]


@pytest.mark.cuda
@NEEDS_CUDA
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("stacked", [True, False])
def test_captured_steps_are_the_eager_ones(stacked, optimizer):
    options = {"learning_rates": RATES, "steps": 37, "batch_size": 16, "optimizer": optimizer, "weight_decay": 0.01}
    options |= {"outer_ratio": 3.0, "schedule": "cosine", "warmup": 3, "evaluate_every": 10, "stacked": stacked}
    captured, eager = both_ways(networks(), examples(), **options)
    assert captured.captured and not eager.captured
    assert np.allclose(captured.loss, eager.loss, rtol=1e-4) and np.allclose(captured.accuracy, eager.accuracy)
    cpu = train(networks(), examples(), examples(), device="cpu", **options)
    assert np.allclose(captured.loss, cpu.loss, rtol=1e-3)


@pytest.mark.cuda
@NEEDS_CUDA
@pytest.mark.parametrize("precision", ["float32", "tf32", "bfloat16"])
def test_captured_convolutions_are_the_eager_ones(precision):
    nets = [models.seeded(seed, models.vgg, 3, [8, "M", 8, "M"], 8, image=8) for seed in range(2)]
    options = {"steps": 20, "batch_size": 16, "augment": "crop_and_flip", "evaluate_every": 8, "precision": precision}
    captured, eager = both_ways(nets, images(), learning_rates=[0.01, 0.02], **options)
    assert captured.captured and np.allclose(captured.loss, eager.loss, rtol=1e-3 if precision == "float32" else 0.05)


@pytest.mark.cuda
@NEEDS_CUDA
@pytest.mark.parametrize("stacked", [True, False])
def test_every_replay_draws_new_dropout_masks(stacked):
    """At a rate that moves nothing, full batches in another order differ by their masks alone."""
    data, nets = examples(), networks(dropout=0.5)
    history = train(
        nets, data, learning_rates=[1e-12] * 3, steps=40, batch_size=len(data), evaluate_every=1, stacked=stacked,
        captured=True, device="cuda",
    )  # fmt: skip
    assert len(np.unique(history.loss[:, 1:].round(6))) > 100
    twins = train(
        [nets[0]] * 2, data, learning_rates=[1e-12] * 2, steps=8, batch_size=len(data), evaluate_every=8, seed=[0, 0],
        stacked=True, captured=True, device="cuda",
    )  # fmt: skip
    assert twins.loss[0, 1] != twins.loss[1, 1]


@pytest.mark.cuda
@NEEDS_CUDA
def test_what_cannot_be_captured_falls_back_with_a_warning():
    class Reads(nn.Linear):
        def forward(self, inputs):
            return super().forward(inputs) * (1.0 if float(inputs.detach().sum()) < 1e30 else 0.0)

    net, data = nn.Sequential(Reads(12, 4)), examples()
    with pytest.warns(UserWarning, match="steps are not captured"):
        history = train([net], data, learning_rates=[0.01], steps=10, batch_size=16, device="cuda")
    assert not history.captured and np.isfinite(history.loss).all()


@pytest.mark.parametrize("item", [train, training.NetworkHistory])
def test_examples_of_the_docstrings_run(item):
    [found] = [t for t in doctest.DocTestFinder(recurse=False).find(item, item.__name__, globs={}) if t.examples]
    assert doctest.DocTestRunner().run(found).failed == 0
