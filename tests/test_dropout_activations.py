"""Dropout before the output layer: where it sits, teachers, ranks of activations, and the closed form when trained."""

import math

import numpy as np
import pytest
import torch

from compressible.experiments import dropout_activations as activations
from compressible.networks import models
from compressible.networks.losses import squared
from compressible.networks.models import features
from compressible.recovery import spectra

PLAN = {"optimizer": "sgd", "schedule": "cosine", "device": "cpu"}


def _net(seed=0, width=10, kind="relu"):
    return models.seeded(seed, models.mlp, 6, width, 4, 2, kind)


def test_dropout_acts_on_what_the_output_layer_gets_and_on_nothing_before():
    plain, inputs = _net(), torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    dropped = activations.with_dropout(_net(), 0.6)
    torch.testing.assert_close(dropped.eval()(inputs), plain(inputs))
    torch.testing.assert_close(features(dropped.train(), inputs), features(plain, inputs))
    weight, bias = (part.detach() for part in plain.get_submodule(plain.last).parameters())
    with torch.random.fork_rng([]):
        torch.manual_seed(1)
        outputs = torch.stack([dropped(inputs).detach() for _ in range(3000)])
    hidden = features(plain, inputs).detach()
    # inverted scaling: the mean stays, the variance is (1 - theta) / theta of the squares
    variance = 1.5 * hidden.square() @ weight.square().mT
    torch.testing.assert_close(outputs.mean(0), hidden @ weight.mT + bias, rtol=0, atol=0.1)
    assert (outputs.var(0) / variance).mean().item() == pytest.approx(1, abs=0.05)


def test_dropout_of_a_resnet_is_before_its_classifier():
    net = activations.with_dropout(models.seeded(0, models.resnet, 3, (4, 8), (1, 1)), 0.5)
    found = net.eval()(torch.zeros(2, 3, 8, 8))
    assert found.shape == (2, 3) and features(net, torch.zeros(2, 3, 8, 8)).shape[0] == 2
    assert isinstance(net.get_submodule(net.last)[0], torch.nn.Dropout)
    with pytest.raises(ValueError, match=r"rate is 1\.0"):
        activations.with_dropout(_net(), 1.0)


def test_a_network_against_its_teacher_has_the_residual_of_noisy_outputs():
    teacher = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    examples = activations.gaussian_examples(30, 6, 0.3, seed=2)
    noise = examples.targets[:, :4]
    plain = _net()
    against = activations.AgainstTeacher(_net(), teacher)
    outputs = examples.inputs @ teacher.mT + noise
    torch.testing.assert_close(against(examples.inputs) - noise, plain(examples.inputs) - outputs, rtol=1e-4, atol=1e-5)
    assert [name for name, _ in against.named_parameters()] == [name for name, _ in plain.named_parameters()]


def test_inputs_are_white_and_teachers_have_their_ranks_and_one_norm():
    examples = activations.gaussian_examples(40, 6, 0.3, seed=2)
    torch.testing.assert_close(examples.inputs.mT @ examples.inputs / 40, torch.eye(6), rtol=0, atol=1e-5)
    assert examples.targets.std().item() == pytest.approx(0.3, rel=0.15)
    teachers = activations.linear_teachers(12, [12, 3], seed=5, seeds=4)
    assert teachers.shape == (2, 4, 12, 12)
    assert torch.linalg.matrix_rank(teachers, rtol=1e-4).tolist() == [[12] * 4, [3] * 4]
    norms = torch.linalg.matrix_norm(teachers)
    torch.testing.assert_close(norms[0], norms[1])
    assert torch.equal(teachers[:, 1], activations.linear_teachers(12, [12, 3], seed=6, seeds=1)[:, 0])
    with pytest.raises(ValueError, match="count is 5"):
        activations.gaussian_examples(5, 6, 0.3, seed=2)


def test_spectra_of_activations_are_those_of_the_network_and_outputs_those_of_a_linear_one():
    nets = [activations.without_biases(_net(seed, kind="identity")) for seed in range(2)]
    teachers = activations.linear_teachers(6, [4], 0, 2)[0, :, :4]
    against = [activations.AgainstTeacher(net, teacher) for net, teacher in zip(nets, teachers, strict=True)]
    train_set, held_out = (activations.gaussian_examples(count, 6, 0.1, seed) for count, seed in ((30, 0), (20, 1)))
    train_set, held_out = (type(part)(part.inputs, part.targets[:, :4]) for part in (train_set, held_out))
    options = {"learning_rates": [0.05] * 2, "steps": 4, "evaluate_every": 2, "loss": "squared", **PLAN}
    found = activations.activation_spectra(against, train_set, held_out, **options)
    matrices = torch.stack([net(torch.eye(6)).mT for net in nets]).detach()
    hidden = torch.stack([features(net, held_out.inputs) for net in nets]).detach()
    np.testing.assert_allclose(found["outputs"][:, 0], spectra.effective_rank(matrices), rtol=1e-4)
    np.testing.assert_allclose(found["effective"][:, 0], spectra.effective_rank(hidden), rtol=1e-4)
    np.testing.assert_allclose(found["stable"][:, 0], spectra.stable_rank(hidden), rtol=1e-4)
    centred = hidden - hidden.mean(1, keepdim=True)
    np.testing.assert_allclose(found["centred"][:, 0], spectra.effective_rank(centred), rtol=1e-4)
    top = torch.linalg.svdvals(hidden)[:, 0] / math.sqrt(20)
    np.testing.assert_allclose(found["values"][:, 0, 0], top, rtol=1e-5)
    assert found["at"].tolist() == [0, 2, 4] and (found["test_loss"][:, -1] < found["test_loss"][:, 0]).all()
    np.testing.assert_array_equal(found["end_effective"], found["effective"][:, -1])


def test_a_linear_network_trained_with_dropout_reaches_the_closed_form():
    """Masks are drawn anew each step, so the match is close and not exact; without dropout the teacher is found."""
    task = {"linear": True, "dimension": 8, "rank": 8, "width": 16, "noise": 0.1, "rows": (256, 64, 64)}
    study = {"steps": 1200, "evaluate_every": 600, "batch_size": 64, **PLAN}
    found = activations.with_and_without(
        lambda dropout: activations.synthetic_study([0, 1], [0.02], dropout=dropout, **task, **study), dropout=0.6
    )
    np.testing.assert_allclose(found["dropped/end_outputs"], found["dropped/expected"], rtol=0.05)
    np.testing.assert_allclose(found["plain/end_outputs"], found["plain/expected"], rtol=0.01)
    assert (found["outputs_below"] > 1).all() and (found["below"] > 0).all()
    np.testing.assert_allclose(found["below"], found["plain/end_effective"] - found["dropped/end_effective"])
    np.testing.assert_allclose(found["falls"], found["dropped/effective"][:, 0] - found["dropped/end_effective"])


def test_keep_laws_agree_at_their_width_and_the_scaled_one_keeps_the_penalty():
    laws = activations.keep_laws(0.4, 64, [16, 64, 256])
    assert laws["fixed"] == [0.4] * 3 and laws["scaled"][1] == pytest.approx(0.4)
    penalties = [(1 - keep) / keep / width for keep, width in zip(laws["scaled"], (16, 64, 256), strict=True)]
    assert penalties == pytest.approx([1.5 / 64] * 3)
    teachers = activations.linear_teachers(10, [10], 0, 2)[0]
    ranks = [
        activations.expected_rank(teachers, keep, w) for keep, w in zip(laws["scaled"], (16, 64, 256), strict=True)
    ]
    np.testing.assert_allclose(ranks[0], ranks[2])
    fixed = [activations.expected_rank(teachers, 0.4, width) for width in (16, 64, 256, 10**9)]
    assert (np.diff(fixed, axis=0) > 0).all()
    np.testing.assert_allclose(fixed[-1], spectra.effective_rank(teachers.double()), rtol=1e-5)


def test_ranks_across_widths():
    chosen = {"best_rate": np.array([0.1]), "best_is_inside": np.array([True])}
    studies = [{"end_outputs": np.array([2.0, 3.0]), "expected": np.array([2.0, 2.0])} | chosen]
    studies += [{"end_outputs": np.array([4.0, 3.0]), "expected": np.array([4.0, 3.0])} | chosen]
    found = activations.across_widths(studies)
    assert found["off"].tolist() == [0, 0.5] and found["rise"].tolist() == [2, 0]
    assert found["spread"].tolist() == pytest.approx([2 / 3, 0]) and found["product"].shape == (2, 2)
    assert found["chosen"].tolist() == [0.1, 0.1] and found["chosen_inside"].all()


def test_the_expected_objective_is_the_mean_of_the_loss_over_masks():
    net, examples = activations.with_dropout(_net(), 0.6), activations.gaussian_examples(20, 6, 0.3, seed=2)
    examples = type(examples)(examples.inputs, examples.targets[:, :4])
    expected = activations.expected_objective(net, examples)
    with torch.random.fork_rng([]), torch.no_grad():
        torch.manual_seed(1)
        drawn = [squared(net.train()(examples.inputs), examples.targets).item() for _ in range(3000)]
    assert expected == pytest.approx(np.mean(drawn), abs=4 * np.std(drawn) / math.sqrt(3000))
    assert expected > 1.05 * squared(net.eval()(examples.inputs), examples.targets).item()


def test_a_rate_may_be_chosen_by_the_objective_where_an_early_stop_validates_better():
    """At .003 training stops short of the minimiser, of a higher rank, and validates better than at .01."""
    task = {"linear": True, "dimension": 8, "rank": 8, "width": 16, "noise": 0.1, "rows": (256, 64, 64), "dropout": 0.6}
    options = {"steps": 400, "evaluate_every": 200, "batch_size": 64, **PLAN}
    by_loss, by_objective = (
        activations.synthetic_study([0, 1], [1e-3, 3e-3, 1e-2, 3e-2], chosen_by=name, **task, **options)
        for name in ("validation_loss", "objective")
    )
    assert by_loss["best_rate"].item() == 0.003 < by_objective["best_rate"].item()
    assert by_objective["objective"].mean() < by_loss["objective"].mean()
    off = [abs(found["end_outputs"].mean() / found["expected"].mean() - 1) for found in (by_loss, by_objective)]
    assert off[1] < 0.03 < off[0]


def test_a_rate_that_diverges_is_not_taken():
    task = {"linear": True, "dimension": 6, "rank": 6, "width": 8, "noise": 0.1, "rows": (64, 32, 32), "dropout": 0.0}
    options = {"steps": 40, "evaluate_every": 20, "batch_size": 32, **PLAN}
    found = activations.synthetic_study([0, 1], [1e-5, 0.02, 1e3], **task, **options)
    assert found["best_rate"].tolist() == [0.02] and np.isfinite(found["effective"]).all()
    assert np.isnan(found["end_effective_by_rate"][2]).all() and found["best_is_inside"].tolist() == [True]
