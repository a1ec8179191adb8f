"""Other architectures: which layers each variant replaces, the sweep over alpha, and training on wrong labels."""

import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from compressible.experiments import other_architectures as other
from compressible.experiments import wrong_labels
from compressible.experiments.network_variants import Comparison, Variant
from compressible.networks import models
from compressible.networks.factorize import find_layers
from compressible.networks.layers import FactoredConv2d, FactoredLinear
from compressible.networks.training import Examples, train

needs_local_data = pytest.mark.skipif(
    "COMPRESSIBLE_DATA" not in os.environ, reason="CIFAR-10 and Cora are read from the folder COMPRESSIBLE_DATA"
)
RATIOS = [0.5, 1.0, 4.0]


def two_moons(count, seed):
    """Points (count, 8) of two classes that a line does not part."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, 8, generator=generator)
    return Examples(inputs, (inputs[:, 0] * inputs[:, 1] > 0).long())


@pytest.fixture(scope="module")
def comparison():
    variants = {"plain": Variant(), "compressed": Variant("compressed", r"body\.hidden2", width=4)}
    parts = {part: two_moons(256, i) for i, part in enumerate(("training", "test", "tuning", "validation"))}
    plan = {"steps": 40, "batch_size": 64, "evaluate_every": 10, "device": "cpu"}
    return Comparison(lambda: models.mlp(8, 32, 2), variants, **parts, plan=plan)


@pytest.mark.parametrize(
    ("name", "block", "kind"),
    [
        ("mlp", ["body.hidden2"], FactoredLinear),
        ("digits-resnet", 2, FactoredConv2d),
        ("resnet", 4, FactoredConv2d),
        ("vgg", ["body.hidden"], FactoredLinear),
    ],
)
def test_blocks_are_the_penultimate_matrix_or_the_last_stage(name, block, kind):
    one = other.ARCHITECTURES[name]
    model = one.make(64)
    found = list(find_layers(model, one.block))
    assert model.penultimate in found
    assert len(found) == block if isinstance(block, int) else found == block
    shapes = [model.get_submodule(each).weight.flatten(1).shape for each in found]
    assert min(min(shape) for shape in shapes) >= 2 * one.classes
    build = Comparison(lambda: model, other._variants(one, [2], RATIOS), *[two_moons(4, 0)] * 4).build
    replaced = [each for each, module in build("compressed", 0).named_modules() if isinstance(module, kind)]
    assert replaced == found


def test_low_rank_throughout_replaces_all_but_the_output():
    one = other.ARCHITECTURES["mlp"]
    layers = list(find_layers(one.make(64), one.everywhere))
    assert layers == ["body.input", "body.hidden1", "body.hidden2"]
    variants = other._variants(one, [2, 4], RATIOS)
    assert {f"{q}K {start}" for q in (2, 4) for start in other.STARTS} < set(variants)
    assert [variants[f"{q}K random"].width for q in (2, 4)] == [20, 40]
    assert variants["compressed, alpha = 4"] == Variant("compressed", one.block, width=20, outer_ratio=4.0)
    assert other._variants(other.ARCHITECTURES["gcn-16"], [2], RATIOS) == {"plain": Variant()}
    assert isinstance(one.make(64), nn.Module)


@needs_local_data
@pytest.mark.parametrize("name", ["resnet", "vgg"])
def test_networks_take_the_images_of_cifar10(name):
    case = other.compare(name, 1, [2], RATIOS, {"train_rows": 40, "validation_rows": 20, "test_rows": 30}, steps=1)
    sizes = [len(part.targets) for part in (case.training, case.tuning, case.validation, case.test)]
    assert sizes == [40, 20, 20, 30] and len(case.test.targets.unique()) == 10
    assert case.build("compressed", 0).eval()(case.training.inputs[:2].cpu()).shape == (2, 10)


@needs_local_data
def test_the_graph_network_of_the_published_size():
    case = other.compare("gcn-16", 1, [2], [1.0], {}, steps=1)
    model = case.make()
    assert sum(p.numel() for p in model.parameters()) == 1433 * 16 + 16 + 16 * 7 + 7
    assert [len(part.targets) for part in (case.training, case.validation, case.test)] == [140, 500, 1000]
    wide = other.compare("gcn", 1, [2], RATIOS, {}, steps=1)
    assert wide.build("compressed", 0).get_submodule("body.input").weight.shape == (256, 1433)


def test_weight_decay_of_the_first_layer_alone_is_that_of_parameter_groups():
    start, examples = models.seeded(0, models.mlp, 8, 16, 2), two_moons(32, 0)
    decays = {r"body\.input\..*": 0.5}
    history = train([start], examples, learning_rates=[0.01], steps=20, weight_decay=decays, device="cpu")
    model = models.seeded(0, models.mlp, 8, 16, 2)
    first, others = [], []
    for name, parameter in model.named_parameters():
        (first if name.startswith("body.input.") else others).append(parameter)
    optimizer = torch.optim.Adam([{"params": first, "weight_decay": 0.5}, {"params": others}], lr=0.01)
    for _ in range(20):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(examples.inputs), examples.targets).backward()
        optimizer.step()
    for mine, theirs in zip(history.models[0].parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="weight_decay"):
        train([start], examples, learning_rates=[0.01], steps=1, weight_decay={".*": -0.1})


def test_every_alpha_has_a_rate_of_its_own(comparison):
    small = comparison.variants["compressed"]
    few = {"plain": Variant()} | {
        other.alpha_name("compressed", ratio): replace(small, outer_ratio=ratio) for ratio in RATIOS
    }
    found = other.study(replace(comparison, variants=few), [1e-3, 1e-2, 3e-2], 1e-2, [9], [0, 1])
    for name in few:
        assert found[f"{name}/own/end"].shape == (2,) and len(found[f"{name}/rates"]) >= 3
        assert found[f"{name}/tuning"].shape == found[f"{name}/rates"].shape
        assert found[f"{name}/own_rate"][0] in found[f"{name}/rates"]
    assert "compressed, alpha = 4/shared/end" not in found and "compressed/shared/end" in found
    gap = found["compressed/own/end"] - found["plain/own/end"]
    np.testing.assert_allclose(found["compressed - plain/own"], gap)
    sweep = other.swept(found, "compressed", RATIOS)
    assert sweep["compressed/alpha/gains"].shape == (3, 2) and (sweep["compressed/alpha/gains"][1] == 0).all()


def test_the_best_alpha_is_chosen_on_validation_data():
    ends = {"c": [0.80, 0.70], "c, alpha = 0.5": [0.75, 0.75], "c, alpha = 4": [0.95, 0.85]}
    tuned = {"c": [0.5, 0.7], "c, alpha = 0.5": [0.8, 0.2], "c, alpha = 4": [0.6, 0.6]}
    found = {f"{name}/own/end": np.array(values) for name, values in ends.items()}
    found |= {f"{name}/tuning": np.array(values) for name, values in tuned.items()}
    out = other.swept(found, "c", RATIOS)
    assert out["c/alpha/best"] == [0.5]
    np.testing.assert_allclose(out["c/alpha/gain"], [-0.05, 0.05])
    np.testing.assert_allclose(out["c/alpha/worst"], [-0.05, 0.0])


@pytest.mark.parametrize("ratios", [[0.5, 2.0], [2.0, 1.0], [0.0, 1.0], [1.0, 1.0]])
def test_outer_ratios_ascend_and_hold_one(ratios):
    with pytest.raises(ValueError, match=r"outer_ratios are .* expected them ascending"):
        other.check_ratios(ratios)


def test_unknown_architecture_is_refused_with_those_that_are_known():
    with pytest.raises(ValueError, match=r"architecture is 'resnet50'.*mlp, digits-resnet, resnet"):
        other.compare("resnet50", 64, [2], [1.0], {"validation_rows": 10})


def test_wrong_labels_are_as_many_as_told_and_other_classes():
    truth = torch.arange(1000) % 5
    labels, wrong = wrong_labels.mislabelled(truth, 0.25, 5, torch.Generator().manual_seed(3))
    assert int(wrong.sum()) == 250 and ((labels != truth) == wrong).all() and set(labels.tolist()) == set(range(5))
    counts = torch.bincount((labels - truth)[wrong] % 5, minlength=5)
    assert counts[0] == 0 and (counts[1:] > 40).all()  # each of the four others about 62 times
    assert (truth == torch.arange(1000) % 5).all()
    same, none = wrong_labels.mislabelled(truth, 0.0, 5, torch.Generator().manual_seed(3))
    assert (same == truth).all() and not none.any()


@pytest.mark.parametrize("share", [-0.1, 1.0])
def test_a_share_of_wrong_labels_is_below_one(share):
    with pytest.raises(ValueError, match="share"):
        wrong_labels.mislabelled(torch.arange(4), share, 4, torch.Generator())


@pytest.fixture(scope="module")
def overfitting(comparison):
    """What networks come to that pass over 64 examples 200 times."""
    case = replace(comparison, plan=comparison.plan | {"steps": 400, "batch_size": 32, "evaluate_every": 40})
    return wrong_labels.under_wrong_labels(case, [0.0, 0.4], [1e-3, 1e-2], 1e-2, [9], [0, 1], rows=64, classes=2)


def test_networks_fit_wrong_labels_when_they_train_long(overfitting):
    found = overfitting
    for name in ("plain", "compressed"):
        for kind in ("own", "shared"):
            final, best, fitted = (found[f"{name}/{kind}/{key}"] for key in ("final", "best", "fitted"))
            assert final.shape == best.shape == (2, 2) and (best >= final).all()
            np.testing.assert_allclose(found[f"{name}/{kind}/drop"], best - final)
            assert np.isnan(fitted[0]).all() and ((fitted[1] >= 0) & (fitted[1] <= 1)).all()
    assert found["plain/shared/fitted"][1].mean() > 0.9
    assert found["plain/shared/final"][0].mean() > found["plain/shared/final"][1].mean() + 0.05
    for kind in ("own", "shared"):
        finals, fitted = ([found[f"{n}/{kind}/{k}"][1] for n in ("compressed", "plain")] for k in ("final", "fitted"))
        np.testing.assert_allclose(found[f"compressed - plain/{kind}/final"], finals[0] - finals[1])
        np.testing.assert_allclose(found[f"compressed - plain/{kind}/fitted"], fitted[1] - fitted[0])


def test_every_share_of_wrong_labels_has_its_own_rate(overfitting, comparison):
    for name in ("plain", "compressed"):
        assert overfitting[f"{name}/own_rate"].shape == overfitting[f"{name}/inside"].shape == (2,)
        for place, share in enumerate(("0", "0.4")):
            rates, scores = (overfitting[f"{name}/{share}/{key}"] for key in ("rates", "tuning"))
            assert rates.shape == scores.shape and overfitting[f"{name}/own_rate"][place] == rates[scores.argmax()]
    case = replace(comparison, plan=comparison.plan | {"steps": 20, "evaluate_every": 5}).only("plain")
    once = wrong_labels.under_wrong_labels(case, [0.4], [1e-3], 1e-3, [9], [0, 1], rows=64, classes=2)
    np.testing.assert_array_equal(once["plain/own/final"], once["plain/shared/final"])
    twice = wrong_labels.under_wrong_labels(case, [0.4], [1e-4], 1e-3, [9], [0, 1], rows=64, classes=2)
    np.testing.assert_array_equal(twice["plain/shared/final"], once["plain/shared/final"])
    assert (twice["plain/own/fitted"] != once["plain/own/fitted"]).any()


def test_wrong_labels_are_among_those_to_train_on_alone(comparison):
    noisy, wrong = wrong_labels._noisy(comparison, 0.25, 128, 2)
    assert len(noisy.training.targets) == 128 and len(wrong.targets) == 32
    assert noisy.validation is comparison.validation and noisy.test is comparison.test
    assert noisy.tuning is noisy.training
    source = {
        tuple(row): int(target)
        for row, target in zip(comparison.tuning.inputs.tolist(), comparison.tuning.targets, strict=True)
    }
    truth = [source[tuple(row)] for row in noisy.training.inputs.tolist()]
    assert (torch.tensor(truth) != noisy.training.targets).sum() == 32
